"""
Checkpoints of the official training code to Hugging Face layout and back, and what a folder holds.

    python convert_weights.py prismatic-to-hf RUN OUT --tokenizer openvla-7b   # RUN: a run folder, or one .pt of it
    python convert_weights.py hf-to-prismatic FOLDER OUT                       # for the official FSDP training script
    python convert_weights.py merge-lora RUN OUT
    python convert_weights.py check FOLDER

A training run ("Prismatic") is config.json, dataset_statistics.json and checkpoints/*.pt: {"model": {"vision_backbone",
"projector", "llm_backbone"}}. If its towers were frozen, as in the base VLMs, they are not in it: --vision names
timm files that have them. A .pt is a pickle: one that asks for more than tensors is refused and never run. Files are
memory-mapped and go through memory one tensor at a time. Writing a .pt needs torch >= 2.7.

vla-scripts/extern/convert_openvla_weights_to_hf.py and prismatic/models/load.py of github.com/openvla/openvla.
"""

import argparse
import json
import math
import re
import shutil
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

from checkpoint import check_folder, read_header, refuse_pointer, refuse_quantized, weight_files
from configurator import fail
from image import ImageProcessor
from lora import merge as merge_lora
from model import INDEX, SHARD_BYTES, TOWERS, OpenVLA, OpenVLAConfig, is_unused, write_atomically, write_json
from tokenizer import PAD, Tokenizer, prompt_for

RENAMES = [  # Hugging Face layout, training run
    ("vision_backbone.featurizer.", "vision_backbone.dino_featurizer."),  # of two towers; a lone one has the same name
    ("vision_backbone.fused_featurizer.", "vision_backbone.siglip_featurizer."),
    ("projector.fc1.", "projector.projector.0."),
    ("projector.fc2.", "projector.projector.2."),
    ("projector.fc3.", "projector.projector.4."),
    ("language_model.", "llm_backbone.llm."),
    (".scale_factor", ".gamma"),  # because transformers renames whatever contains "gamma"
]
IDS = ("vision_backbone_id", "llm_backbone_id", "hf_llm_id", "image_resize_strategy")  # in the exported config.json
LLAMA, VICUNA = ("llama2-7b-pure", "meta-llama/Llama-2-7b-hf"), ("vicuna-v15-7b", "lmsys/vicuna-7b-v1.5")
BASE_VLMS = {  # "base_vlm" or "model_id" in a run's config.json -> those ids
    "prism-dinosiglip-224px+7b": ("dinosiglip-vit-so-224px", *LLAMA, "resize-naive"),
    "siglip-224px+7b": ("siglip-vit-so400m", *VICUNA, "letterbox"),
}
TOWER_NAMES = ("vision_backbone.featurizer.", "vision_backbone.fused_featurizer.")
VOCABULARY = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}  # safetensors' names


def to_hf(name: str) -> str:
    for hf, prismatic in RENAMES:
        name = name.replace(prismatic, hf)
    return name


def to_prismatic(name: str, fused: bool) -> str:
    for hf, prismatic in RENAMES[not fused :]:
        name = name.replace(hf, prismatic)
    return name


# -----------------------------------------------------------------------------
# Reading: files -> memory-mapped tensors by Hugging Face name


def open_safetensors(files: list) -> dict[str, Tensor]:
    for path in files:
        read_header(Path(path))  # raises if the file is not whole
    return {name: f.get_tensor(name) for f in [safe_open(p, framework="pt") for p in files] for name in f.keys()}


def open_pt(path) -> dict:
    refuse_pointer(Path(path))
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        wants = re.search(r"GLOBAL (\S+)", str(error))
        wants = f"asks for {wants[1]}" if wants else "cannot be read"
        raise ValueError(f"{path}: refused, its pickle {wants}; a checkpoint holds tensors only. Nothing ran") from None
    except RuntimeError as error:
        raise ValueError(f"{path}: cut off, or no zip file of torch.save ({str(error).split('. ')[0]})") from None


def open_run(path: Path, vision: tuple = ()) -> dict[str, Tensor]:
    """A training checkpoint. vision: timm's files for the towers that it lacks."""
    content = open_pt(path)
    model = content.get("model") if isinstance(content, dict) else None
    parts = {k: v for k, v in model.items() if isinstance(v, dict)} if isinstance(model, dict) else {}
    if not parts.keys() >= {"projector", "llm_backbone"}:
        raise ValueError(f"{path}: no OpenVLA: it needs model/projector and model/llm_backbone, found {list(parts)}")
    towers = zip(TOWER_NAMES, map(open_timm, vision), strict=False)
    tensors = {tower + to_hf(k): t for tower, tensors in towers for k, t in tensors.items()}
    return tensors | {to_hf(f"{part}.{k}"): t for part in parts for k, t in parts[part].items() if torch.is_tensor(t)}


def open_timm(file: str) -> dict[str, Tensor]:
    """A tower as huggingface.co/timm has it: alone, or (SigLIP) in open_clip's file with a text tower beside it."""
    tensors, trunk = open_safetensors([file]) if file.endswith(".safetensors") else open_pt(file), "visual.trunk."
    tensors = {k.removeprefix(trunk): t for k, t in tensors.items() if k.startswith(trunk)} or tensors
    if not tensors.keys() >= {"pos_embed", "patch_embed.proj.weight"}:
        raise ValueError(f"{file}: no vision transformer of timm, it holds {list(tensors)[:3]}")
    pos, grid = tensors["pos_embed"], 224 // tensors["patch_embed.proj.weight"].shape[-1]
    if pos.shape[1] != grid**2:  # DINOv2 has learned 518 pixels; timm resamples in the same way
        pos = pos.float().transpose(1, 2).unflatten(2, (math.isqrt(pos.shape[1]), -1))  # (1, D, 37, 37)
        pos = F.interpolate(pos, (grid, grid), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    return tensors | {"pos_embed": pos}


def stream(reopen, names):
    """Yield tensors in order. The files are mapped anew after every GB, which lets go of the pages already read."""
    tensors, seen = reopen(), 0
    for name in tqdm(names, "converting", unit=" tensors", leave=False):
        yield tensors[name]
        seen += tensors[name].nbytes
        if seen > 10**9:
            tensors, seen = reopen(), 0


# -----------------------------------------------------------------------------
# What a run is: config.json names its parts, the tensors have the sizes


def find_run(path: Path) -> tuple[Path, dict, dict]:
    """A run folder, or one of its .pt files -> the .pt (of a folder: the latest), config.json and statistics."""
    folder = path.absolute().parent.parent if path.suffix == ".pt" else path
    if path.suffix != ".pt" and not (path := folder / "checkpoints" / "latest-checkpoint.pt").is_file():
        path = max(folder.glob("checkpoints/step-*.pt"), default=path)
    if not path.is_file() or not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no training run, it needs config.json and {path.relative_to(folder)}")
    run, stats = json.loads((folder / "config.json").read_text("utf-8")), folder / "dataset_statistics.json"
    if "vla" not in run:  # a base VLM has no actions
        return path, run, {}
    if not stats.is_file():
        raise FileNotFoundError(f"{stats}: missing, but needed to turn tokens into actions; copy it from the run")
    return path, run, json.loads(stats.read_text("utf-8"))


def infer_config(path: Path, tensors: dict, run: dict) -> OpenVLAConfig:
    """The config of a run's model. `run`: its config.json, and what tensors do not tell if the size is not released."""
    base = Path(str(run.get("vla", {}).get("base_vlm") or run.get("model", {}).get("model_id"))).name
    if base not in BASE_VLMS:
        raise ValueError(f"{path}: the run's config.json names the base VLM {base!r}, known are {', '.join(BASE_VLMS)}")
    extra = dict(zip(IDS, BASE_VLMS[base], strict=True)) | dict(llm_max_length=2048, pad_to_multiple_of=64)
    timm_ids, vision = list(TOWERS) if "dino" in base else list(TOWERS)[1:], []
    extra |= dict(timm_override_act_layers=[None for _ in timm_ids], output_projector_states=False)
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    try:
        for tower, name, given in zip(TOWER_NAMES, timm_ids, run.get("vision_configs", [{}, {}]), strict=False):
            vit = {k.removeprefix(tower): shape for k, shape in shapes.items() if k.startswith(tower)}
            if not vit:
                raise ValueError(f"has no {tower}*: frozen towers are not saved; --vision FILE [FILE] takes them from "
                                 f"huggingface.co/timm, DINOv2 first ({name})")  # fmt: skip
            (dim, _, patch, _), mlp_dim = vit["patch_embed.proj.weight"], vit["blocks.0.mlp.fc1.bias"][0]
            blocks = {k.split(".")[1] for k in vit if k.startswith("blocks.")}
            found = dict(embed_dim=dim, depth=len(blocks) + ("norm.weight" not in vit))  # norm goes with the last block
            found |= dict(patch_size=patch, img_size=patch * math.isqrt(vit["pos_embed"][1]), mlp_dim=mlp_dim)
            found |= dict(cls_token="cls_token" in vit, reg_tokens=vit.get("reg_token", (1, 0))[1])
            found |= dict(layer_scale="blocks.0.ls1.scale_factor" in vit)
            vision.append(sized(TOWERS[name], found, given, "num_heads", tower))
        (vocab, dim), layers = shapes[VOCABULARY[0]], "language_model.model.layers."
        found = dict(hidden_size=dim, intermediate_size=shapes[f"{layers}0.mlp.gate_proj.weight"][0])
        found |= dict(num_hidden_layers=len({k.split(".")[3] for k in shapes if k.startswith(layers)}))
        found |= dict(vocab_size=(rows := math.ceil(max(vocab, PAD + 1) / 64) * 64))  # <PAD>, and steps of 64 rows
        text = sized(OpenVLAConfig().text, found, run.get("text_config", {}), "num_attention_heads", "Llama")
        kv_heads = shapes[f"{layers}0.self_attn.k_proj.weight"][0] * text.num_attention_heads // dim
        config = OpenVLAConfig(vision, replace(text, num_key_value_heads=kv_heads), extra)
        shapes |= dict.fromkeys(VOCABULARY, (rows, dim))
        with torch.device("meta"):
            used = {k: torch.empty(shape) for k, shape in shapes.items() if not is_unused(k, config)}
            OpenVLA(config).load_state_dict(used)  # its error lists all that does not fit
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())[:500]}") from None
    return config


def sized(released, found: dict, given: dict, heads: str, what: str):
    """The released config with the sizes found. Weights do not tell the number of heads: it may have to be given."""
    if heads not in given and replace(released, **found) != released:
        raise ValueError(f"{what} is not of the released size ({found}), and weights do not tell {heads}; give "
                         "--config FILE, a config.json with text_config and vision_configs, a list")  # fmt: skip
    return replace(released, **{k: v for k, v in given.items() if hasattr(released, k)} | found)


def pad_rows(tensor: Tensor, rows: int) -> Tensor:
    """New rows of a vocabulary as transformers makes them: random, std 0.02 (but always the same)."""
    new = torch.empty(rows - len(tensor), tensor.shape[1]).normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    return torch.cat([tensor, new.to(tensor.dtype)]) if len(new) else tensor


# -----------------------------------------------------------------------------
# Writing: the layout first, then tensor by tensor


def prepare(out: Path, nbytes: int):
    """Raise if the folder holds something already, or the disk has no room."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out}: exists and is not empty; choose another folder")
    disk = next(p for p in (out.absolute(), *out.absolute().parents) if p.is_dir())
    if (free := shutil.disk_usage(disk).free) < nbytes * 1.01:
        raise OSError(f"{out}: {nbytes / 1e9:.1f} GB will be written, the disk has {free / 1e9:.1f} GB free")


def raw(tensor: Tensor):
    return tensor.contiguous().flatten().view(torch.uint8).numpy()


def write_safetensors(path: Path, shapes: dict, dtype: torch.dtype, tensors):
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = dict(dtype=DTYPES[dtype], shape=list(shape), data_offsets=[start, end])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for shape, tensor in zip(shapes.values(), tensors, strict=False):
            f.write(raw((tensor if tuple(tensor.shape) == shape else pad_rows(tensor, shape[0])).to(dtype)))


def write_pt(path: Path, like: dict, tensors):
    """torch.save lays out the file without the data, so nothing has to hold, or map, all tensors at once."""
    fused, parts = any(name.startswith(TOWER_NAMES[1]) for name in like), {}
    places = [to_prismatic(name, fused).split(".", 1) for name in like]
    with FakeTensorMode():
        for (part, key), tensor in zip(places, like.values(), strict=True):
            parts.setdefault(part, {})[key] = torch.empty(tensor.shape, dtype=tensor.dtype)
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save({"model": parts}, path)
    with FakeTensorMode():
        parts = torch.load(path, weights_only=True)["model"]
    with open(path, "rb+") as f:
        for (part, key), tensor in zip(places, tensors, strict=True):
            f.seek(parts[part][key].untyped_storage()._checkpoint_offset)
            f.write(raw(tensor))


# -----------------------------------------------------------------------------
# Commands. They raise ValueError or OSError before anything is written.


def prismatic_to_hf(run, out, tokenizer="", config="", vision=(), dtype="bfloat16"):
    (path, info, stats), out, torch_dtype = find_run(Path(run)), Path(out), getattr(torch, dtype)
    if not tokenizer:
        raise ValueError("--tokenizer FILE is missing: a training run has no tokenizer.model, openvla-7b has one")
    files, tensors = Tokenizer(tokenizer).files(), open_run(path, vision)
    cfg = infer_config(path, tensors, info | (json.loads(Path(config).read_text("utf-8")) if config else {}))
    shards, room, total, n = [], 0, 0, len(cfg.vision)
    for name, tensor in tensors.items():
        shape = (cfg.text.vocab_size, tensor.shape[1]) if name in VOCABULARY else tuple(tensor.shape)
        if (nbytes := math.prod(shape) * torch_dtype.itemsize) > room:
            shards, room = [*shards, {}], SHARD_BYTES
        shards[-1][name] = shape
        room, total = room - nbytes, total + nbytes
    prepare(out, total)
    for name, content in files.items():
        write_atomically(out / name, lambda tmp, content=content: tmp.write_bytes(content))
    means, stds = ImageProcessor.means[-n:], ImageProcessor.stds[-n:]  # rounded to bfloat16, as tvf_* are officially
    processor = ImageProcessor(cfg.vision[0].img_size, cfg.extra["image_resize_strategy"], means, stds)
    processor.trained_on = tuple(info.get("trained_on", ()))
    means, stds = [[0.485, 0.456, 0.406], [0.5] * 3][-n:], [[0.229, 0.224, 0.225], [0.5] * 3][-n:]
    write_json(out / "preprocessor_config.json", processor.to_dict() | dict(means=means, stds=stds))
    version = dict(transformers_version="4.40.1")
    tokens = dict(_from_model_config=True, bos_token_id=1, eos_token_id=2, pad_token_id=PAD)
    write_json(out / "generation_config.json", tokens | version)
    if stats:
        write_json(out / "dataset_statistics.json", stats)
    hf = cfg.to_dict() | dict(norm_stats=stats, torch_dtype=dtype) | version
    hf["text_config"]["torch_dtype"] = dtype
    write_json(out / "config.json", hf)
    source, where = stream(lambda: open_run(path, vision), tensors), {}
    for i, part in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_atomically(out / file, lambda tmp, part=part: write_safetensors(tmp, part, torch_dtype, source))
        where |= dict.fromkeys(part, file)
    write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": where})  # last: now the folder is whole


def hf_to_prismatic(folder, out):
    cfg, files, out = check_folder(folder), weight_files(Path(folder)), Path(out)
    refuse_quantized(cfg, folder)
    tensors, stats, ids = open_safetensors(files), cfg.extra["norm_stats"], {cfg.extra.get(key) for key in IDS}
    bases = [b for b, v in BASE_VLMS.items() if ("dino" in b) == (len(cfg.vision) == 2) and ids <= {None, *v}]
    if not bases:
        raise ValueError(f"{folder}: config.json has {ids}, the official code trains {list(BASE_VLMS.values())}")
    for problem in official_limits(tensors, cfg):
        print(f"note: the official code will not load it, {problem}")
    prepare(out, sum(t.nbytes for t in tensors.values()))
    source = stream(lambda: open_safetensors(files), tensors)
    write_atomically(out / "checkpoints/latest-checkpoint.pt", lambda tmp: write_pt(tmp, tensors, source))
    model = dict(zip(IDS, BASE_VLMS[bases[0]], strict=True)) | dict(llm_max_length=2048)
    model |= dict(arch_specifier=cfg.to_dict()["arch_specifier"])
    run = {"vla": {"base_vlm": bases[0]}} if stats else {"model": {"model_id": bases[0], **model}}
    run |= dict(vision_configs=[asdict(v) for v in cfg.vision], text_config=asdict(cfg.text))  # our own keys
    if (Path(folder) / "preprocessor_config.json").is_file():
        run["trained_on"] = ImageProcessor.from_pretrained(folder).trained_on
    if stats:
        write_json(out / "dataset_statistics.json", stats)
    write_json(out / "config.json", run)


# -----------------------------------------------------------------------------
# check: what a folder is, and who can load it

ROBOTS = {  # by the start of a dataset's name; from the overview table of Open X-Embodiment
    "Franka": "taco_play berkeley_cable viola toto stanford_hydra austin_ nyu_franka furniture_bench iamlab utaustin "
              "droid fmb cmu_playing",
    "Franka, simulated": "libero maniskill", "WidowX": "bridge", "Google robot": "fractal bc_z", "Sawyer": "roboturk",
    "xArm": "language_table nyu_rot ucsd_ utokyo_ berkeley_mvp berkeley_rpt", "KUKA iiwa": "kuka stanford_kuka",
    "UR5": "berkeley_autolab columbia_cairlab", "Hello Stretch": "cmu_stretch dobbe nyu_door", "Jaco 2": "jaco",
}  # fmt: skip


def check(folder) -> bool:
    """Print what a folder is and who can load it. False if something is missing or wrong."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    kinds = {"adapter_config.json": ("a LoRA adapter", check_adapter)}
    kinds |= {"checkpoints/*.pt": ("a training run (Prismatic)", check_run)}
    kinds |= dict.fromkeys(("*.safetensors", INDEX), ("a model in Hugging Face layout", check_hf))
    found = [kind for pattern, kind in kinds.items() if any(Path(folder).glob(pattern))]
    if not found:
        below = sorted({str(path.parent) for name in kinds for path in Path(folder).glob(f"*/{name}")})
        raise ValueError(f"{folder}: no checkpoint, it has none of {', '.join(kinds)}; try {below or 'another folder'}")
    (what, look), official = found[0], []
    print(f"{folder}: {what}")
    try:
        for line in look(Path(folder), official):
            print(f"  {line}")
    except (ValueError, OSError) as error:
        print(f"  incomplete: {error}\n  loads neither here nor in the official code")
        return False
    print(f"  loads in the official code: {'no, ' + '; '.join(official) if official else 'yes'}")
    return True


def check_hf(folder: Path, official: list):
    cfg = check_folder(folder)
    tensors, files = open_safetensors(weight_files(folder)), Tokenizer(folder).files()
    strategy = ImageProcessor.from_pretrained(folder).strategy
    yield from describe(tensors, cfg.extra["norm_stats"])
    yield f"pictures: {strategy}; prompt: {prompt_for(cfg.extra)!r}"
    yield "complete: every tensor is as config.json says, tokenizer and image processor are here"
    yield "loads in this code: yes"
    official += [f"config.json has no {key}" for key in IDS if key not in cfg.extra]
    official += [f"{name} is missing" for name in files if not (folder / name).exists()] + official_limits(tensors, cfg)


def check_run(folder: Path, official: list):
    path, run, stats = find_run(folder)
    tensors = open_run(path)
    yield f"{path.name}: {'a vision-language-action model' if stats else 'a base VLM, without actions'}"
    yield from describe(tensors, stats)
    try:
        official += official_limits(tensors, infer_config(path, tensors, run))
        yield "complete: every tensor is as config.json says"
        yield "loads in this code: after `prismatic-to-hf`"
    except ValueError as error:
        if not re.search("--(config|vision) FILE", str(error)):  # all that is missing can be given
            raise
        yield f"loads in this code: after `prismatic-to-hf`, but {error}"
        official.append("not as it is")


def check_adapter(folder: Path, official: list):
    info = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    shapes, rank = read_header(folder / "adapter_model.safetensors"), info.get("r")
    halves = [{name.replace(half, ".") for name in shapes if half in name} for half in (".lora_A.", ".lora_B.")]
    wrong = halves[0] ^ halves[1] or {name for name, s in shapes.items() if ".lora_A." in name and s[0] != rank}
    if wrong:
        raise ValueError(f"{min(wrong)} needs a lora_A and a lora_B of rank {rank}, as adapter_config.json says")
    yield f"rank {rank}, alpha {info.get('lora_alpha')}, on {info.get('base_model_name_or_path')}"
    yield f"complete: {len(halves[0])} layers, each with lora_A and lora_B of that rank"
    yield "loads in this code: on its base checkpoint, or after `merge-lora`"


def describe(tensors: dict, stats: dict):
    counts = Counter(str(t.dtype).removeprefix("torch.") for t in tensors.values())
    size = sum(t.nbytes for t in tensors.values()) / 1e9
    yield f"weights: {size:.3f} GB, {', '.join(f'{n} tensors in {dtype}' for dtype, n in counts.items())}"
    for key, entry in stats.items():
        robot = next((r for r, names in ROBOTS.items() if key.startswith(tuple(names.split()))), "robot unknown")
        limits = zip(entry["action"]["q01"], entry["action"]["q99"], strict=True)
        yield f"actions of {key} ({robot}): {', '.join(f'{low:.3g} to {high:.3g}' for low, high in limits)}"


def official_limits(tensors: dict, cfg: OpenVLAConfig) -> list[str]:
    """What keeps the official code from loading these weights, which this code takes."""
    lost = sum(14 + 2 * v.layer_scale + 13 * (not v.cls_token) for v in cfg.vision)  # a block, a norm, SigLIP's pool
    lost -= sum(is_unused(name, cfg) for name in tensors)
    problems = [f"{lost} tensors are missing that never run but that it wants"] if lost else []
    released = cfg.vision == list(TOWERS.values())[-len(cfg.vision) :]
    return problems if released else [*problems, "the towers are not of the released size"]


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    functions = {"prismatic-to-hf": prismatic_to_hf, "hf-to-prismatic": hf_to_prismatic, "merge-lora": merge_lora}
    functions["check"] = check
    for name in functions:
        commands.add_parser(name).add_argument("source")
        if name != "check":
            commands.choices[name].add_argument("out")
    add = commands.choices["prismatic-to-hf"].add_argument
    add("--tokenizer", default="", help="tokenizer.model, or a folder that has one")
    add("--config", default="", help="JSON with vision_configs and text_config, for a model of unusual size")
    add("--vision", default=(), nargs="+", help="timm's file of each tower, DINOv2 first, if the run lacks them")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    args = vars(parser.parse_args(argv))
    try:
        good = functions[args.pop("command")](args.pop("source"), **args)
    except (ValueError, OSError) as error:
        fail(error)
    raise SystemExit(2 if good is False else 0)


if __name__ == "__main__":
    main()
