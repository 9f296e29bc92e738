"""
Checkpoints from one form into another: a folder in, a folder out.

    python convert_weights.py prismatic-to-hf RUN OUT --tokenizer openvla-7b   # RUN: a run folder, or one .pt of it
    python convert_weights.py hf-to-prismatic FOLDER OUT                       # for the official FSDP training script
    python convert_weights.py merge-lora RUN OUT
    python convert_weights.py quantize FOLDER OUT --bits 4
    python convert_weights.py check FOLDER                                     # what is it, and who can load it?
    python convert_weights.py push FOLDER owner/name                           # to the Hugging Face hub, with a card

    training run (Prismatic) <--> Hugging Face layout <-- LoRA run + its base checkpoint
                                          |
                                          v
                              Hugging Face layout in 8 or 4 bits, which only this code reads

formats/prismatic_run.py describes training runs, model.py and checkpoint.py the Hugging Face layout. If a run's
vision encoders were frozen, as in the base VLMs, they are not in it: --vision names files of timm that have them.
Writing a .pt needs torch >= 2.7.

A model may be larger than the memory. So files are memory-mapped, and converted one tensor at a time. All that can be
wrong is looked for before the first file is written.

vla-scripts/extern/convert_openvla_weights_to_hf.py and prismatic/models/load.py of github.com/openvla/openvla.
"""

import argparse
import json
import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from checkpoint import (
    ADAPTER_CONFIG,
    EXPORT_RECORD,
    OFFICIAL_ADAPTER,
    STATISTICS,
    Checkpoint,
    adapted_layers,
    adapter_folder,
    adapter_names,
    base_name,
    base_of,
    check_adapter,
    fingerprint_files,
    hub_name_of_base,
    is_oft,
    open_checkpoint,
    places_of_base,
    read_adapter_config,
    weight_files,
)
from configurator import fail
from fast import FAST_FOLDER
from files import atomic_write, read_json, write_json
from formats.prismatic_run import (
    BASE_VLM_KEYS,
    BASE_VLMS,
    ENCODER_PREFIXES,
    LATEST,
    LLM_MAX_LENGTH,
    OptionNeeded,
    TrainingRun,
    find_run,
    infer_config,
    official_limits,
    open_run,
    open_safetensors,
    stored_shape,
    timm_ids,
    to_prismatic,
)
from hub import choose_model_files, find_cached_model, find_model, is_hub_name, parse_hub_name, upload
from image import ImageProcessor
from lora import describe_base
from lora import merge as merge_lora
from model import INDEX, SHARD_BYTES, OpenVLAConfig, is_unused, split_into_shards, weight_map
from model_card import write_card
from oft import check_components, read_record
from policy import dataset_stats
from progress import no_progress, show_progress
from speed.quantize import layers_to_quantize, quantize
from tokenizer import BOS, EOS, PAD, Tokenizer, prompt_for

REMAP_BYTES = 10**9  # after reading so much, memory-mapped files are opened again
QUANTIZED_SHARD_BYTES = 10**9  # of a quantized file, and of memory while it is made
TRANSFORMERS_VERSION = "4.40.1"  # what the official code was exported with
SAFETENSORS_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}

# The official preprocessor_config.json has the means and standard deviations of the pixels twice: rounded to bfloat16,
# as ImageProcessor has them, and as here.
EXACT_MEANS = [[0.485, 0.456, 0.406], [0.5, 0.5, 0.5]]
EXACT_STDS = [[0.229, 0.224, 0.225], [0.5, 0.5, 0.5]]


# -----------------------------------------------------------------------------
# Read and write, tensor by tensor


def stream(reopen: Callable, names: Iterable[str], progress: Callable = no_progress) -> Iterator[Tensor]:
    """
    Yield the tensors of these names in order. reopen: maps the files and returns tensors by name. The files are mapped
    anew after every GB: this lets go of the pages that were read, which would fill the memory otherwise.
    """
    tensors = reopen()
    bytes_read = 0
    for name in progress(names, "converting", "tensors"):
        yield tensors[name]
        bytes_read += tensors[name].nbytes
        if bytes_read > REMAP_BYTES:
            tensors = reopen()
            bytes_read = 0


def check_target(out: Path, nbytes: int):
    """Raise FileExistsError if the folder holds something already, or OSError if the disk has no room."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out}: exists and is not empty; choose another folder")
    folders = [out.absolute(), *out.absolute().parents]
    nearest = next(folder for folder in folders if folder.is_dir())
    free = shutil.disk_usage(nearest).free
    if free < nbytes * 1.01:
        raise OSError(f"{out}: {nbytes / 1e9:.1f} GB will be written, the disk has {free / 1e9:.1f} GB free")


def write_safetensors(path: Path, shapes: dict[str, tuple], dtype: torch.dtype, tensors: Iterator[Tensor]):
    """
    Write a safetensors file: 8 bytes that tell the length of the header, the header in JSON, the data.

    shapes: name -> shape of the file's tensors. tensors: they come from here, in the same order, in any dtype. Those
    of the vocabulary may have fewer rows.
    """
    header = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start = end
        end = start + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    padding = -len(text) % 8  # the data starts at a multiple of 8
    text += b" " * padding

    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for shape in shapes.values():
            tensor = next(tensors)
            if tuple(tensor.shape) != shape:
                tensor = pad_rows(tensor, shape[0])
            file.write(as_bytes(tensor.to(dtype)))


def pad_rows(tensor: Tensor, rows: int) -> Tensor:
    """Add rows to a vocabulary (V, D) as transformers does: random, with a spread of 0.02. They are always the same."""
    generator = torch.Generator().manual_seed(0)
    missing = rows - len(tensor)
    new = torch.empty(missing, tensor.shape[1]).normal_(std=0.02, generator=generator)
    return torch.cat([tensor, new.to(tensor.dtype)])


def write_pt(path: Path, tensors: dict[str, Tensor], source: Iterator[Tensor]):
    """
    Write a training checkpoint. tensors: all of them, whose shapes and dtypes tell the layout. source: the same
    tensors in the same order, which are read one by one.

    torch.save lays out the file without the data; then each tensor is written to its place. So nothing has to hold, or
    map, all tensors at once.
    """
    fused = any(name.startswith(ENCODER_PREFIXES[1]) for name in tensors)
    keys = [to_prismatic(name, fused).split(".", maxsplit=1) for name in tensors]  # n of [part, name in that part]

    layout = {}
    with FakeTensorMode():  # tensors without memory
        for (part, name), tensor in zip(keys, tensors.values(), strict=True):
            layout.setdefault(part, {})[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save({"model": layout}, path)

    with FakeTensorMode():
        layout = torch.load(path, weights_only=True)["model"]  # now each storage knows its place in the file
    with open(path, "rb+") as file:
        for (part, name), tensor in zip(keys, source, strict=True):
            file.seek(layout[part][name].untyped_storage()._checkpoint_offset)
            file.write(as_bytes(tensor))


def as_bytes(tensor: Tensor):
    """Return the bytes of a tensor, as an array (n,) uint8."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy()


# -----------------------------------------------------------------------------
# prismatic-to-hf: training run -> Hugging Face layout


def prismatic_to_hf(
    run: str | Path,
    out: str | Path,
    tokenizer: str = "",
    config: str = "",
    vision: Iterable[str] = (),
    dtype: str = "bfloat16",
    progress: Callable = no_progress,
):
    """
    Convert a training run into a folder in Hugging Face layout, with all that the official classes need besides.

    run: a run folder, or one .pt of it. tokenizer: a tokenizer.model, or a folder that has one.
    config: a JSON file with "vision_configs" and "text_config", for a model of unusual size.
    vision: files of timm for vision encoders that the run lacks. dtype: of the weights that are written.
    Raises ValueError or OSError before anything is written.
    """
    out = Path(out)
    training_run = find_run(Path(run))
    if not tokenizer:
        raise ValueError("--tokenizer FILE is missing: a training run has no tokenizer.model, openvla-7b has one")
    tokenizer_files = Tokenizer(tokenizer).files()

    # What is in the run?
    tensors = open_run(training_run.weights, vision)
    sizes = read_json(config) if config else {}
    cfg = infer_config(training_run.weights, tensors, {**training_run.config, **sizes})
    describe_actions(training_run.statistics)  # raises ValueError for broken ones

    # Where does each tensor go?
    torch_dtype = getattr(torch, dtype)
    shapes = {name: stored_shape(name, tuple(tensor.shape), cfg) for name, tensor in tensors.items()}
    nbytes = {name: math.prod(shape) * torch_dtype.itemsize for name, shape in shapes.items()}
    shards = split_into_shards(nbytes, SHARD_BYTES)
    total_size = sum(nbytes.values())
    check_target(out, total_size)

    # All that is not weights.
    for name, content in tokenizer_files.items():
        with atomic_write(out / name) as temporary:
            temporary.write_bytes(content)
    write_preprocessor_config(out, cfg, training_run)
    write_generation_config(out)
    if training_run.statistics:
        write_json(out / STATISTICS, training_run.statistics)
    write_hf_config(out, cfg, training_run, dtype)

    # The weights. The index comes last: with it the folder is whole.
    source = stream(lambda: open_run(training_run.weights, vision), tensors, progress)
    files = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        with atomic_write(out / file) as temporary:
            write_safetensors(temporary, {name: shapes[name] for name in names}, torch_dtype, source)
        files.update(dict.fromkeys(names, file))
    write_json(out / INDEX, {"metadata": {"total_size": total_size}, "weight_map": files})


def write_preprocessor_config(out: Path, cfg: OpenVLAConfig, training_run: TrainingRun):
    """Write preprocessor_config.json for one or two vision encoders."""
    num_encoders = len(cfg.vision)
    processor = ImageProcessor(
        size=cfg.vision[0].img_size,
        strategy=cfg.extra["image_resize_strategy"],
        means=ImageProcessor.means[-num_encoders:],
        stds=ImageProcessor.stds[-num_encoders:],
        trained_on=tuple(training_run.config.get("trained_on", ())),
    )
    exact = {"means": EXACT_MEANS[-num_encoders:], "stds": EXACT_STDS[-num_encoders:]}
    write_json(out / "preprocessor_config.json", {**processor.to_dict(), **exact})


def write_generation_config(out: Path):
    """Write generation_config.json, which is the same for all models."""
    content = {
        "_from_model_config": True,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "transformers_version": TRANSFORMERS_VERSION,
    }
    write_json(out / "generation_config.json", content)


def write_hf_config(out: Path, cfg: OpenVLAConfig, training_run: TrainingRun, dtype: str):
    """Write config.json as the official export does."""
    content = {
        **cfg.to_dict(),
        "norm_stats": training_run.statistics,
        "torch_dtype": dtype,
        "transformers_version": TRANSFORMERS_VERSION,
    }
    content["text_config"]["torch_dtype"] = dtype
    write_json(out / "config.json", content)


# -----------------------------------------------------------------------------
# hf-to-prismatic: Hugging Face layout -> training run


def hf_to_prismatic(folder: str | Path, out: str | Path, progress: Callable = no_progress):
    """
    Convert a folder in Hugging Face layout into a training run, from which the official training script can go on.
    Prints what keeps it from doing so. Raises ValueError or OSError before anything is written.
    """
    folder = find_model(folder)
    out = Path(out)
    refuse_lora_run(folder)
    checkpoint = open_checkpoint(folder)
    checkpoint.refuse_quantized()
    base = choose_base_vlm(checkpoint)

    files = weight_files(folder)
    tensors = open_safetensors(files)
    for problem in official_limits(tensors, checkpoint.config):
        print(f"note: the official code will not load it, {problem}")
    if checkpoint.fast:
        print(f"note: {FAST_NOTE}; its tokenizer stays in {folder / FAST_FOLDER}")
    check_target(out, sum(tensor.nbytes for tensor in tensors.values()))

    # The weights.
    source = stream(lambda: open_safetensors(files), tensors, progress)
    with atomic_write(out / LATEST) as temporary:
        write_pt(temporary, tensors, source)

    # config.json comes last: with it the run is whole.
    if checkpoint.norm_stats:
        write_json(out / STATISTICS, checkpoint.norm_stats)
    write_json(out / "config.json", run_config(checkpoint, base))


def refuse_lora_run(folder: Path):
    """Raise ValueError for an adapter, which is not a model of its own."""
    if adapter_folder(folder):
        raise ValueError(
            f"{folder} is a LoRA run; make it one folder first: convert_weights.py merge-lora {folder} OUT"
        )


def choose_base_vlm(checkpoint: Checkpoint) -> str:
    """Return the base VLM of this kind of model. Raises ValueError if the official code has none."""
    config = checkpoint.config
    found = {key: config.extra.get(key) for key in BASE_VLM_KEYS}
    for base, expected in BASE_VLMS.items():
        agrees = all(found[key] in (None, expected[key]) for key in BASE_VLM_KEYS)
        if agrees and len(timm_ids(base)) == len(config.vision):
            return base
    raise ValueError(
        f"{checkpoint.folder}: config.json has {found} for {len(config.vision)} vision encoders, the official code "
        f"trains {BASE_VLMS}"
    )


def run_config(checkpoint: Checkpoint, base: str) -> dict:
    """Return the config.json of a training run: of a base VLM if the model has no statistics of actions."""
    config = checkpoint.config
    if checkpoint.norm_stats:
        content = {"vla": {"base_vlm": base}}
    else:
        model = {
            "model_id": base,
            **BASE_VLMS[base],
            "llm_max_length": LLM_MAX_LENGTH,
            "arch_specifier": config.to_dict()["arch_specifier"],
        }
        content = {"model": model}

    # Our own keys, so that nothing is lost on the way back.
    content["vision_configs"] = [asdict(vit) for vit in config.vision]
    content["text_config"] = asdict(config.text)
    if (checkpoint.folder / "preprocessor_config.json").is_file():
        content["trained_on"] = checkpoint.processor.trained_on
    return content


# -----------------------------------------------------------------------------
# quantize: the language model's layers in 8 or 4 bits


def quantize_folder(
    folder: str | Path, out: str | Path, bits: int = 4, group: int = 128, progress: Callable = no_progress
):
    """
    Write a folder in Hugging Face layout again, with the language model's layers in 8 or 4 bits. Only this code reads
    it. group: of 4 bits, how many inputs share a scale. `out` appears when it is whole.
    Raises ValueError or OSError before anything is written.
    """
    folder = find_model(folder)
    out = Path(out)
    checkpoint = check_quantizable(folder, out, bits, group)

    # A folder that was left by a killed process is started anew.
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)

    files = write_quantized_weights(temporary, checkpoint, bits, group, progress)
    write_json(temporary / INDEX, {"metadata": {}, "weight_map": files})

    # Tokenizer, image processor and statistics are the same.
    for path in folder.iterdir():
        is_of_weights = path.name in (INDEX, "config.json")
        if path.is_file() and path.suffix in (".json", ".model") and not is_of_weights:
            shutil.copyfile(path, temporary / path.name)
    if checkpoint.fast:
        checkpoint.fast.save_pretrained(temporary / FAST_FOLDER)
    config = read_json(folder / "config.json")
    write_json(temporary / "config.json", {**config, "quantization": {"bits": bits, "group": group}})
    temporary.rename(out)


def check_quantizable(folder: Path, out: Path, bits: int, group: int) -> Checkpoint:
    """Open the folder that is to be quantized. Raises ValueError if it cannot be, or OSError if a file is missing."""
    refuse_lora_run(folder)
    if is_oft(folder):
        raise ValueError(f"{folder} is an OFT policy; only token models are quantized")
    checkpoint = open_checkpoint(folder)
    checkpoint.check_copied_files()
    if bits not in (4, 8) or group not in (32, 64, 128, 256):
        raise ValueError(f"--bits {bits} --group {group}: bits must be 8 or 4, group 32, 64, 128 or 256")
    if checkpoint.quantization:
        raise ValueError(f"{folder} is quantized already: {checkpoint.quantization}")

    text = checkpoint.config.text
    for width in (text.hidden_size, text.intermediate_size):
        if bits == 4 and width % group != 0:
            raise ValueError(
                f"--group {group} does not divide the layers' {width} inputs; choose a smaller one, or 8 bits"
            )
    if out.exists():
        raise ValueError(f"{out} exists; choose another folder, or remove it")
    return checkpoint


def write_quantized_weights(out: Path, checkpoint: Checkpoint, bits: int, group: int, progress: Callable) -> dict:
    """Write the safetensors files of a quantized folder. Returns tensor name -> file name."""
    files = {}
    for i, shard in enumerate(quantized_shards(checkpoint, bits, group, progress)):
        file = f"model-{i + 1:05d}.safetensors"
        with atomic_write(out / file) as temporary:
            save_file(shard, temporary, {"format": "pt"})
        files.update(dict.fromkeys(shard, file))
    return files


def quantized_shards(checkpoint: Checkpoint, bits: int, group: int, progress: Callable) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of one file after another by name. They are gone when the next file's are asked for."""
    quantized_weights = {f"{layer}.weight" for layer in layers_to_quantize(checkpoint.skeleton)}
    shard = {}
    sources = weight_map(checkpoint.folder)  # tensor name -> file, in the order of the index
    for name, source in progress(sources.items(), "quantizing", "tensors"):
        if is_unused(name, checkpoint.config):
            continue
        with safe_open(source, framework="pt") as file:
            tensor = file.get_tensor(name)
        if name in quantized_weights:
            layer = name.removesuffix(".weight")
            for kind, part in quantize(tensor, bits, group).items():
                shard[f"{layer}.{kind}"] = part.contiguous()
        else:
            shard[name] = tensor.clone()

        if sum(part.nbytes for part in shard.values()) > QUANTIZED_SHARD_BYTES:
            yield shard
            shard.clear()  # frees the memory before more is read
    if shard:
        yield shard


# -----------------------------------------------------------------------------
# check: what is in this folder, and who can load it?

FAST_NOTE = "it generates FAST tokens, which the official code would read as bins"
ADAPTER = "a LoRA adapter"
RUN = "a training run (Prismatic)"
MODEL = "a model in Hugging Face layout"
KINDS = {  # a pattern of files -> what a folder is that has one of them; the first that matches
    ADAPTER_CONFIG: ADAPTER,
    "checkpoints/*.pt": RUN,
    "*.safetensors": MODEL,
    INDEX: MODEL,
}
ROBOTS = {  # robot -> how names of its datasets start; from the overview table of Open X-Embodiment
    "Franka": (
        "taco_play berkeley_cable viola toto stanford_hydra austin_ nyu_franka furniture_bench iamlab utaustin droid "
        "fmb cmu_playing"
    ),
    "Franka, simulated": "libero maniskill",
    "WidowX": "bridge",
    "Google robot": "fractal bc_z",
    "Sawyer": "roboturk",
    "xArm": "language_table nyu_rot ucsd_ utokyo_ berkeley_mvp berkeley_rpt",
    "KUKA iiwa": "kuka stanford_kuka",
    "UR5": "berkeley_autolab columbia_cairlab",
    "Hello Stretch": "cmu_stretch dobbe nyu_door",
    "Jaco 2": "jaco",
}


@dataclass
class Description:
    """What `check` says of a folder."""

    lines: list[str]
    official_problems: list[str] = field(default_factory=list)  # why the official code cannot load it
    incomplete: str = ""  # what is missing or wrong, if anything is


def check(folder: str | Path, base_checkpoint: str = "") -> bool:
    """
    Print what a folder is and who can load it. Returns False if something is missing or wrong. Raises ValueError or
    FileNotFoundError if it is no checkpoint. base_checkpoint: of an adapter, see `open_checkpoint`.
    """
    folder = find_model(folder)
    kind = kind_of(folder)
    print(f"{folder}: {kind}")
    try:
        if kind == ADAPTER:
            description = describe_adapter(folder, base_checkpoint)
        elif kind == RUN:
            description = describe_run(folder)
        else:
            description = describe_model(folder)
    except (ValueError, OSError) as error:
        description = Description([], incomplete=str(error))

    for line in description.lines:
        print(f"  {line}")
    if description.incomplete:
        print(f"  incomplete: {description.incomplete}")
        print("  loads neither here nor in the official code")
        return False
    problems = "; ".join(description.official_problems)
    print(f"  loads in the official code: {'no, ' + problems if problems else 'yes'}")
    return True


def kind_of(folder: Path) -> str:
    """Return which of KINDS a folder is. Raises FileNotFoundError or ValueError if it is none."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if adapter_folder(folder):
        return ADAPTER
    for pattern, kind in KINDS.items():
        if any(folder.glob(pattern)):
            return kind

    below = set()
    for pattern in KINDS:
        below.update(str(path.parent) for path in folder.glob(f"*/{pattern}"))
    hint = sorted(below) or "another folder"
    raise ValueError(f"{folder}: no checkpoint, it has none of {', '.join(KINDS)}; try {hint}")


def describe_model(folder: Path) -> Description:
    """Describe a model in Hugging Face layout. Raises ValueError or OSError if it is not whole."""
    checkpoint = open_checkpoint(folder)
    config = checkpoint.config
    dtype = str(checkpoint.stored_dtype).removeprefix("torch.")
    tensors = open_safetensors(weight_files(folder))
    strategy = checkpoint.processor.strategy
    tokenizer_files = checkpoint.tokenizer.files()

    lines = [
        *describe_tensors(tensors),
        *describe_oft(checkpoint),
        *describe_fast(checkpoint),
        *describe_actions(checkpoint.norm_stats),
        f"images: {strategy}; prompt: {prompt_for(config.extra)!r}",
        "complete: every tensor is as config.json says, tokenizer and image processor are here",
        f"loads in this code: yes, on the CPU in {dtype}",
    ]
    problems = [f"config.json has no {key}" for key in BASE_VLM_KEYS if key not in config.extra]
    problems += [f"{name} is missing" for name in tokenizer_files if not (folder / name).exists()]
    problems += official_limits(tensors, config)
    if checkpoint.fast:
        problems.append(FAST_NOTE)
    return Description(lines, problems)


def describe_run(folder: Path) -> Description:
    """Describe a training run. Raises ValueError or OSError if its files cannot be read."""
    run = find_run(folder)
    tensors = open_run(run.weights)
    kind = "a vision-language-action model" if run.statistics else "a base VLM, without actions"
    lines = [f"{run.weights.name}: {kind}", *describe_tensors(tensors), *describe_actions(run.statistics)]

    try:
        config = infer_config(run.weights, tensors, run.config)
    except OptionNeeded as error:  # all that is missing can be given
        lines.append(f"loads in this code: after `prismatic-to-hf`, but {error}")
        return Description(lines, ["not as it is"])
    except ValueError as error:
        return Description(lines, incomplete=str(error))
    lines.append("complete: every tensor is as config.json says")
    lines.append("loads in this code: after `prismatic-to-hf`")
    return Description(lines, official_limits(tensors, config))


def describe_adapter(folder: Path, base_checkpoint: str = "") -> Description:
    """
    Describe a LoRA adapter. Raises ValueError or OSError if it is not whole, or does not fit its base. A base that is
    on the hub only is not downloaded for that.
    """
    adapter = adapter_folder(folder)
    check_adapter(adapter)
    config = read_adapter_config(adapter)
    layers = adapted_layers(adapter_names(adapter))
    lines = [
        f"rank {config['r']}, alpha {config['lora_alpha']}, on {config.get('base_model_name_or_path')}",
        f"complete: {len(layers)} layers, each with lora_A and lora_B of that rank",
    ]
    on_hub = hub_name_of_base(adapter / ADAPTER_CONFIG)
    if on_hub and not base_checkpoint and not is_here(folder, on_hub):
        lines.append(f"loads in this code: with its base checkpoint {on_hub}, which is downloaded then")
        return Description(lines)
    try:
        base_of(folder, base_checkpoint)
    except FileNotFoundError as error:
        lines.append(f"loads in this code: with its base checkpoint, but {error}")
        return Description(lines)

    checkpoint = open_checkpoint(folder, base_checkpoint)
    lines += describe_oft(checkpoint)
    lines += describe_fast(checkpoint)
    lines += describe_actions(checkpoint.norm_stats)
    lines.append(f"loads in this code: yes, with {checkpoint.base}, or after `merge-lora`")
    problems = [] if adapter == folder else ["it wants the adapter merged (`merge-lora`)"]
    if checkpoint.fast:
        problems.append(FAST_NOTE)
    return Description(lines, problems)


def is_here(folder: Path, on_hub: str) -> bool:
    """True if the base of an adapter is on this machine: where `base_of` looks, or in the hub's cache."""
    name = base_name(adapter_folder(folder) / ADAPTER_CONFIG)
    if any(place.is_dir() for place in places_of_base(folder, name)):
        return True
    return find_cached_model(on_hub) is not None


def describe_oft(checkpoint: Checkpoint) -> list[str]:
    """Return a line on what makes a folder an OFT policy. Raises ValueError if it cannot be loaded as one."""
    if not checkpoint.is_oft:
        return []
    check_components(checkpoint)
    return [f"an OFT policy: {read_record(checkpoint.folder)}"]


def describe_fast(checkpoint: Checkpoint) -> list[str]:
    """Return a line on the FAST tokens of a folder that has them. Raises ValueError or OSError if they are broken."""
    fast = checkpoint.fast
    if not fast:
        return []
    return [f"FAST tokens: chunks of {fast.time_horizon} x {fast.action_dim} numbers, vocabulary of {fast.vocab_size}"]


def describe_tensors(tensors: dict[str, Tensor]) -> list[str]:
    """Return a line on the size and the dtypes of the weights."""
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    counts = ", ".join(f"{count} tensors in {dtype}" for dtype, count in dtypes.items())
    gigabytes = sum(tensor.nbytes for tensor in tensors.values()) / 1e9
    return [f"weights: {gigabytes:.3f} GB, {counts}"]


def describe_actions(norm_stats: dict) -> list[str]:
    """Return a line for each dataset: its robot, and the range of its actions. Raises ValueError for a broken one."""
    lines = []
    for dataset in norm_stats:
        action = dataset_stats(norm_stats, dataset, STATISTICS)["action"]
        pairs = zip(action["q01"], action["q99"], strict=True)
        ranges = ", ".join(f"{low:.3g} to {high:.3g}" for low, high in pairs)
        lines.append(f"actions of {dataset} ({robot_of(dataset)}): {ranges}")
    return lines


def robot_of(dataset: str) -> str:
    """Return the robot of a dataset, by the dataset's name."""
    for robot, starts in ROBOTS.items():
        if dataset.startswith(tuple(starts.split())):
            return robot
    return "robot unknown"


# -----------------------------------------------------------------------------
# push: folder -> the hub


def push(folder: str | Path, name: str, private: bool = False, base_checkpoint: str = "") -> str:
    """
    Upload a folder that is complete to a repository of the hub, in one commit, with a model card. Returns the address.

    Only files that are read go up. base_checkpoint: of an adapter, its base; a name of the hub takes the place of
    base_model_name_or_path there, so that the adapter finds its base on other machines, too.
    Raises ValueError or OSError before anything is uploaded.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    repository = parse_hub_name(name)
    checkpoint = open_checkpoint(folder, base_checkpoint)
    checkpoint.check_copied_files()

    present = [path.relative_to(folder).as_posix() for path in folder.glob("*") if path.is_file()]
    present += [path.relative_to(folder).as_posix() for path in folder.glob(f"{OFFICIAL_ADAPTER}/*") if path.is_file()]
    chosen = choose_model_files(sorted(present), str(folder), lambda: folder / INDEX)
    files = {file: folder / file for file in chosen}
    base = ""
    if checkpoint.adapter:
        base = base_for_others(checkpoint, base_checkpoint)
        files.update(with_base(checkpoint, base))

    facts = describe_adapter(folder, base_checkpoint).lines if checkpoint.adapter else describe_model(folder).lines
    about = [fact for fact in facts if not fact.startswith(ABOUT_THIS_MACHINE)]
    card = write_card(checkpoint, repository.name, base, about)
    return upload({**files, "README.md": card.encode()}, name, f"Upload {folder.name}", private)


ABOUT_THIS_MACHINE = ("rank", "loads in this code", "complete")  # lines of `check` that a model card does not need


def base_for_others(checkpoint: Checkpoint, base_checkpoint: str) -> str:
    """Return the name on the hub of an adapter's base. Raises ValueError if it is a folder of this machine only."""
    base = hub_name_of_base(checkpoint.adapter / ADAPTER_CONFIG)
    if base_checkpoint:
        base = str(base_checkpoint) if is_hub_name(base_checkpoint) else ""
    if not base:
        raise ValueError(
            f"{checkpoint.folder}: its base is {checkpoint.base}, which other machines do not have; give its name on "
            f"the hub (--base_checkpoint openvla/openvla-7b), or push the whole model (merge-lora)"
        )
    return base


def with_base(checkpoint: Checkpoint, base: str) -> dict[str, bytes]:
    """Return the adapter_config.json that names a base on the hub, and the record of an export that belongs to it."""
    config = read_json(checkpoint.adapter / ADAPTER_CONFIG)
    text = json.dumps({**config, **describe_base(base)}, indent=2).encode()
    place = (checkpoint.adapter / ADAPTER_CONFIG).relative_to(checkpoint.folder).as_posix()
    files = {place: text}
    if (checkpoint.folder / EXPORT_RECORD).is_file():
        record = read_json(checkpoint.folder / EXPORT_RECORD)
        with tempfile.TemporaryDirectory() as folder:
            changed = Path(folder) / ADAPTER_CONFIG
            changed.write_bytes(text)
            record = {**record, ADAPTER_CONFIG: fingerprint_files([changed])}
        files[EXPORT_RECORD] = json.dumps(record, indent=2).encode()
    return files


# -----------------------------------------------------------------------------
# Command line


BASE_HELP = "base of the adapter, a folder or a name on the hub; default: as its adapter_config.json says"


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("prismatic-to-hf", help="a training run of the official code -> Hugging Face layout")
    command.add_argument("source", help="the run's folder, whose latest .pt is taken; or one .pt of it")
    command.add_argument("out", help="new folder, in Hugging Face layout")
    command.add_argument("--tokenizer", default="", help="a tokenizer.model, or a folder that has one; needed")
    command.add_argument(
        "--config", default="", help="JSON with vision_configs and text_config, for a model of unusual size"
    )
    command.add_argument(
        "--vision", default=(), nargs="+", help="timm's file of each vision encoder, DINOv2 first, if the run has none"
    )
    command.add_argument(
        "--dtype",
        default="bfloat16",
        choices=["bfloat16", "float16", "float32"],
        help="of the weights that are written; default bfloat16",
    )

    command = commands.add_parser("hf-to-prismatic", help="Hugging Face layout -> a training run of the official code")
    command.add_argument("source", help="folder in Hugging Face layout")
    command.add_argument("out", help="new run folder")

    command = commands.add_parser("merge-lora", help="a LoRA run and its base checkpoint -> Hugging Face layout")
    command.add_argument("source", help="run folder of finetune_lora.py or finetune_oft.py, or an adapter of PEFT")
    command.add_argument("out", help="new folder, in Hugging Face layout")
    command.add_argument("--base_checkpoint", default="", help=BASE_HELP)

    command = commands.add_parser("quantize", help="Hugging Face layout -> the same in 8 or 4 bits, for inference")
    command.add_argument("source", help="folder in Hugging Face layout")
    command.add_argument("out", help="new folder, which only this code reads")
    command.add_argument("--bits", type=int, default=4, help="8 or 4; default 4")
    command.add_argument(
        "--group",
        type=int,
        default=128,
        help="of 4 bits: how many inputs share a scale; 32, 64, 128 or 256; default 128",
    )

    command = commands.add_parser("check", help="what a folder is, if it is complete, and who can load it")
    command.add_argument("source", help="folder, or a name on the hub")
    command.add_argument("--base_checkpoint", default="", help=BASE_HELP)

    command = commands.add_parser("push", help="a folder that is complete -> a repository of the Hugging Face hub")
    command.add_argument("source", help="folder in Hugging Face layout, or a LoRA run")
    command.add_argument("name", help="owner/name of the repository; it is made if there is none")
    command.add_argument("--private", action="store_true", help="make a private repository")
    command.add_argument("--base_checkpoint", default="", help=f"{BASE_HELP}. A name on the hub is written down")
    return parser


def run_command(args: argparse.Namespace) -> int:
    """Run one command. Returns the exit code. Raises ValueError or OSError that says what to fix."""
    if args.command == "prismatic-to-hf":
        prismatic_to_hf(
            args.source,
            args.out,
            tokenizer=args.tokenizer,
            config=args.config,
            vision=args.vision,
            dtype=args.dtype,
            progress=show_progress,
        )
    elif args.command == "hf-to-prismatic":
        hf_to_prismatic(args.source, args.out, progress=show_progress)
    elif args.command == "merge-lora":
        merge_lora(args.source, args.out, base_checkpoint=args.base_checkpoint, progress=show_progress)
    elif args.command == "quantize":
        quantize_folder(args.source, args.out, bits=args.bits, group=args.group, progress=show_progress)
    elif args.command == "check":
        is_good = check(args.source, args.base_checkpoint)
        return 0 if is_good else 2
    elif args.command == "push":
        print(push(args.source, args.name, private=args.private, base_checkpoint=args.base_checkpoint))
    return 0


def main(argv: list[str] | None = None):
    args = build_parser().parse_args(argv)
    try:
        exit_code = run_command(args)
    except (ValueError, OSError) as error:
        fail(error)
    raise SystemExit(exit_code)


if __name__ == "__main__":
    main()
