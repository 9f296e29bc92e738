"""
What is in this checkpoint folder, and is it complete?

    checkpoint = open_checkpoint("openvla-7b")
    checkpoint.config, checkpoint.norm_stats, checkpoint.tokenizer, checkpoint.processor, checkpoint.is_oft, ...

`open_checkpoint` reads config.json, the index and the headers of the safetensors files (8 bytes of length, JSON, data;
https://github.com/huggingface/safetensors), and compares every name, shape and file size with what config.json
describes. It raises ValueError or FileNotFoundError that says what was found, what was expected and how to fix it.
No weight is loaded, and no code of the folder is run. What it learned is kept in a record, so that nobody asks twice.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fast import ACTION_TOKENIZER, FAST, FAST_FOLDER, MAX_VOCAB
from files import read_json, read_json_object, refuse_special, write_json
from hub import HUB_PREFIX, OUR_FOLDERS, find_model, is_hub_name
from image import CROPPED, ImageProcessor
from model import INDEX, LM_HEAD, OpenVLA, OpenVLAConfig, is_unused, read_config, weight_map
from speed.quantize import use_quantized_layers
from tokenizer import Tokenizer, prompt_for

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
OFFICIAL_ADAPTER = "lora_adapter"  # the folder in a run of the official OFT script that holds the two files above
OFT_RECORD = "oft_config.json"
EXPORT_RECORD = "export.json"  # of a LoRA or OFT run: a fingerprint of each file of its last complete export
STATISTICS = "dataset_statistics.json"
# How the official scripts note their base: the place where it was in their cache.
IN_CACHE = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>\w+)")
COMPONENT_ENDING = "checkpoint.pt"  # of the parts that OFT adds: NAME--latest_checkpoint.pt, NAME--150000_checkpoint.pt

# How safetensors files call the dtypes that weights may have. (Those of our quantized folders are integers besides.)
WEIGHT_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
MOST_HEADER_BYTES = 10**8  # the bound of the safetensors library, too


@dataclass
class Checkpoint:
    """
    A checkpoint folder that is complete: a model in Hugging Face layout, a LoRA run with its base, or either of them
    with the components of OpenVLA-OFT beside it.
    """

    folder: Path
    base: Path | None  # the base checkpoint of a LoRA run; None for any other folder
    adapter: Path | None  # where the adapter of a LoRA run is, see `adapter_folder`; None for any other folder
    config: OpenVLAConfig
    skeleton: OpenVLA  # the model without weights, on the meta device
    weight_map: dict[str, Path]  # tensor name -> the file that holds it
    is_oft: bool

    @property
    def norm_stats(self) -> dict:
        """unnorm_key -> statistics of that dataset, which give actions their units."""
        return self.config.extra["norm_stats"]

    @property
    def quantization(self) -> dict | None:
        """{"bits", "group"} of a folder with 8 or 4 bit weights, else None."""
        return self.config.extra.get("quantization")

    @property
    def stored_dtype(self) -> torch.dtype:
        """
        The dtype that config.json says the weights are in. If it says nothing, that of the last norm's weight.
        Raises ValueError for a name that is none.
        """
        name = self.config.extra.get("torch_dtype")
        if not name:
            norm = "language_model.model.norm.weight"
            _, layout = read_layout(self.weight_map[norm])
            return WEIGHT_DTYPES[layout[norm]["dtype"]]
        known = {str(dtype).removeprefix("torch."): dtype for dtype in WEIGHT_DTYPES.values()}
        plain_name = str(name).removeprefix("torch.")
        if plain_name not in known:
            raise ValueError(
                f"{self.folder}: config.json has torch_dtype {name!r}; it must be one of {', '.join(known)}"
            )
        return known[plain_name]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer with prompt and action tokens of this model. Raises FileNotFoundError or ValueError."""
        path = self.folder_with("tokenizer.model") / "tokenizer.model"
        remedy = "copy it from openvla-7b or Llama-2, it is the same for all (tokenizer.json is not read)"
        tokenizer = Tokenizer(require_file(path, remedy), prompt_for(self.config.extra))
        tokenizer.fast = self.fast
        return tokenizer

    @cached_property
    def fast(self) -> FAST | None:
        """
        The FAST tokenizer of a model that generates chunks of actions; None for bins, and for an OFT policy. A LoRA run
        says it by its own folder fast/, a model also by its config.json, so that a copy without that folder is noticed.
        Raises FileNotFoundError or ValueError.
        """
        if self.is_oft:
            return None
        folder = self.folder / FAST_FOLDER
        if self.base is None:
            recorded = self.config.extra.get(ACTION_TOKENIZER, "bins")
            if recorded not in ("bins", "fast"):
                raise ValueError(f"{self.folder}: config.json has {ACTION_TOKENIZER} {recorded!r}; it is bins or fast")
            if is_there(folder) != (recorded == "fast"):
                raise ValueError(
                    f"{self.folder}: config.json says that actions are {recorded} tokens, and {FAST_FOLDER}/ is "
                    f"{'there' if is_there(folder) else 'missing'}; copy the whole folder again"
                )
        if not is_there(folder):
            return None

        fast = FAST.from_pretrained(folder)
        if not fast.time_horizon or not fast.action_dim or fast.vocab_size > MAX_VOCAB:
            raise ValueError(
                f"{folder}: chunks of {fast.time_horizon} x {fast.action_dim} actions and {fast.vocab_size} tokens; a "
                f"policy has two sizes, and at most {MAX_VOCAB} tokens; copy the folder again from the run"
            )
        return fast

    @cached_property
    def processor(self) -> ImageProcessor:
        """The image processor. Raises FileNotFoundError or ValueError."""
        folder = self.folder_with("preprocessor_config.json")
        processor = ImageProcessor.from_pretrained(folder)
        sizes = [vit.img_size for vit in self.config.vision]
        if [processor.size] * len(processor.means) != sizes:
            raise ValueError(
                f"{folder / 'preprocessor_config.json'}: it makes {len(processor.means)} image(s) of {processor.size} "
                f"pixels, but the vision encoders of config.json take {sizes}; copy the file from the model that this "
                f"one was trained from"
            )
        if self.is_oft and not processor.trained_on:
            # Released OFT folders do not record it, but all of them were trained on random crops.
            processor.trained_on = CROPPED
        return processor

    def folder_with(self, file: str) -> Path:
        """The folder that has `file`: this one, or the base of a LoRA run that does not bring its own."""
        return self.base if self.base and not is_there(self.folder / file) else self.folder

    def check_copied_files(self):
        """Raise ValueError or FileNotFoundError if files that are copied into a converted folder cannot be used."""
        has_tokenizer = (self.folder_with("tokenizer.model") / "tokenizer.model").exists()
        has_processor = (self.folder_with("preprocessor_config.json") / "preprocessor_config.json").exists()
        if has_tokenizer:
            _ = self.tokenizer  # reads it, or raises
        if has_processor:
            _ = self.processor
        _ = self.fast

    def refuse_quantized(self):
        """Raise ValueError for a quantized folder: training, merging, adapters and OFT need the weights themselves."""
        if self.quantization:
            raise ValueError(
                f"{self.folder} is quantized, for inference only; take the checkpoint that it was made from"
            )


# -----------------------------------------------------------------------------
# Open a folder


def open_checkpoint(folder: str | Path, base_checkpoint: str | Path = "") -> Checkpoint:
    """
    Check that a folder is complete, and return what is known about it. A LoRA run is checked with its base, and has the
    statistics of the data that it was trained on, not those of the base. A name of the hub is downloaded (hub.py).

    base_checkpoint: of a LoRA run, its base; "": what its adapter_config.json says, see `base_of`.
    """
    folder = find_model(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such checkpoint folder{hint_for_missing(folder)}")
    if folder.name == OFFICIAL_ADAPTER and (folder.parent / STATISTICS).is_file():
        raise ValueError(
            f"{folder}: only the adapter of an OFT policy; give the folder of all its parts, {folder.parent}"
        )
    base = base_of(folder, base_checkpoint)
    if base:
        return open_lora_run(folder, base)
    if base_checkpoint:
        raise ValueError(f"{folder} is no LoRA run and has no base; leave out --base_checkpoint {base_checkpoint}")

    file = folder / "config.json"
    if not file.is_file() and not file.is_symlink():
        raise FileNotFoundError(
            f"{folder}: not a checkpoint in Hugging Face layout, it has no config.json{hint_for_other(folder)}"
        )
    require_file(file, "")  # a link may lead nowhere
    try:
        hf = read_config(folder)
        check_quantization(hf)
        config = OpenVLAConfig.from_dict(hf)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        hint = "" if list(folder.glob("*.safetensors")) else hint_for_other(folder)
        raise ValueError(f"{folder}: config.json or {STATISTICS} cannot be used ({error}){hint}") from None

    with torch.device("meta"):
        skeleton = OpenVLA(config)
    if config.extra.get("quantization"):
        use_quantized_layers(skeleton, config.extra["quantization"])
    files = check_tensors(folder, skeleton)
    return Checkpoint(folder, None, None, config, skeleton, files, is_oft(folder))


def open_lora_run(folder: Path, base: Path) -> Checkpoint:
    """Check an adapter and its base checkpoint."""
    adapter = adapter_folder(folder)
    if adapter_folder(base):
        raise ValueError(
            f"{folder}: its base {base} is a LoRA run itself; merge that first (python convert_weights.py merge-lora "
            f"{base} OUT) and set base_model_name_or_path in {adapter / ADAPTER_CONFIG} to OUT"
        )
    checkpoint = open_checkpoint(base)
    checkpoint.refuse_quantized()
    check_adapter(adapter)
    check_film(folder, adapter)
    check_export(adapter)
    check_adapter_fits(adapter, read_shapes(checkpoint.weight_map))
    check_stored_base(adapter, lambda name: read_tensor(checkpoint.weight_map[name], name))
    config = checkpoint.config
    if (folder / STATISTICS).is_file():
        config.extra["norm_stats"] = read_json_object(folder / STATISTICS)
    return Checkpoint(folder, base, adapter, config, checkpoint.skeleton, checkpoint.weight_map, is_oft(folder))


def check_quantization(hf: dict):
    """Raise ValueError if config.json says that another tool has quantized the weights: its codes are no weights."""
    for part in (hf, hf.get("text_config") or {}):
        about = part.get("quantization_config")
        if about:
            tool = about.get("quant_method") if isinstance(about, dict) else about
            raise ValueError(
                f"quantization_config: the folder was quantized by another tool ({tool}), which is not read here; take "
                f"the checkpoint that it was made from, and `convert_weights.py quantize`"
            )


def check_tensors(folder: Path, skeleton: OpenVLA) -> dict[str, Path]:
    """Compare all tensors of a folder with those of the model. Returns tensor name -> file."""
    missing = skeleton.state_dict()
    files = {}
    for path in weight_files(folder):
        _, layout = read_layout(path)
        for name, entry in layout.items():
            shape = tuple(entry["shape"])
            is_repeated = name in files
            files[name] = path
            if is_unused(name, skeleton.cfg):
                continue

            if is_repeated:
                raise ValueError(
                    f"{path}: tensor {name} is in another weight file, too; remove the files of an old save"
                )
            if name not in missing:
                hint = hint_for_wrapper(name, skeleton)
                raise ValueError(f"{path}: unexpected tensor {name} {shape}; config.json describes another model{hint}")
            expected = missing.pop(name)
            if shape != tuple(expected.shape):
                raise ValueError(
                    f"{path}: tensor {name} has shape {shape}, config.json makes it {tuple(expected.shape)}"
                )
            if expected.is_floating_point() and entry["dtype"] not in WEIGHT_DTYPES:
                raise ValueError(
                    f"{path}: tensor {name} is {entry['dtype']}: quantized codes, not weights (BF16, F16 or F32); take "
                    f"the checkpoint that this one was made from"
                )
    if missing:
        first = next(iter(missing))
        hint = ""
        if list(missing) == [LM_HEAD]:
            hint = (
                "; if the model was saved with tie_word_embeddings, save it again with lm_head.weight, a copy of "
                "model.embed_tokens.weight"
            )
        raise ValueError(f"{folder}: {len(missing)} tensors are in no weight file, the first is {first}{hint}")
    return files


def is_oft(folder: str | Path) -> bool:
    """True if the folder holds a policy of oft.py, ours or an official one."""
    folder = Path(folder)
    has_record = (folder / OFT_RECORD).is_file()
    return has_record or len(component_files(folder)) > 0


def component_files(folder: Path, name: str = "*") -> list[Path]:
    """Return the files of a component of an OFT policy (action_head, proprio_projector, ...), or of all components."""
    return sorted(folder.glob(f"{name}--*{COMPONENT_ENDING}"))


def adapter_folder(folder: str | Path) -> Path | None:
    """
    Return where the adapter of a LoRA run is: in the folder itself, or in the lora_adapter/ of the official OFT script.
    None for a folder that is no LoRA run. A merged official folder is none: it has weights of its own beside
    lora_adapter/.
    """
    folder = Path(folder)
    if is_there(folder / ADAPTER_CONFIG):
        return folder
    has_weights = (folder / INDEX).is_file() or any(folder.glob("*.safetensors"))
    if not has_weights and is_there(folder / OFFICIAL_ADAPTER / ADAPTER_CONFIG):
        return folder / OFFICIAL_ADAPTER
    return None


def base_of(folder: str | Path, given: str | Path = "") -> Path | None:
    """
    Return the base checkpoint of a LoRA run, or None for a folder that is no LoRA run. given: its name, a folder or a
    name of the hub; "": that of adapter_config.json, which is looked for as it is, inside the run, beside it and on the
    hub. Raises FileNotFoundError or ValueError.
    """
    folder = Path(folder)
    adapter = adapter_folder(folder)
    if not adapter:
        return None
    if given:
        base = find_model(given)
        if not base.is_dir():
            raise FileNotFoundError(f"--base_checkpoint {given}: no such folder{hint_for_missing(base)}")
        return base

    file = adapter / ADAPTER_CONFIG
    name = base_name(file)
    for place in places_of_base(folder, name):
        if place.is_dir():
            return place
    on_hub = hub_name_of_base(file)
    if on_hub:
        try:
            return find_model(on_hub)
        except OSError as error:
            raise FileNotFoundError(f"{file}: its base checkpoint, {error}; or give --base_checkpoint FOLDER") from None
    raise FileNotFoundError(
        f"{file}: the base checkpoint {name!r} is not there; set base_model_name_or_path to its folder, or give "
        f"--base_checkpoint FOLDER{hint_for_missing(Path(name))}"
    )


def base_name(file: Path) -> str:
    """Return what an adapter_config.json calls its base; "" if nothing. Raises ValueError."""
    name = read_json_object(file).get("base_model_name_or_path") or ""
    if not isinstance(name, str):
        raise ValueError(f"{file}: base_model_name_or_path is {name!r}, it must be the folder of the base checkpoint")
    return name


def places_of_base(folder: Path, name: str) -> list[Path]:
    """Return the folders that a LoRA run's base of this name may be."""
    if not name:
        return []
    in_cache = IN_CACHE.search(name)
    short_name = in_cache["name"] if in_cache else Path(name).name
    return [Path(name).expanduser(), folder / name, folder.parent / short_name]


def hub_name_of_base(file: Path) -> str:
    """Return the name on the hub of the base of an adapter_config.json, as hub.py takes it; "" if it has none."""
    name = base_name(file)
    in_cache = IN_CACHE.search(name)
    if in_cache:
        return f"{HUB_PREFIX}{in_cache['owner']}/{in_cache['name']}@{in_cache['commit']}"
    name = f"{HUB_PREFIX}{name}"
    if not is_hub_name(name) or Path(base_name(file)).parts[0] in OUR_FOLDERS:
        return ""
    revision = read_json_object(file).get("revision")  # PEFT's key for the revision of the base
    return f"{name}@{revision}" if isinstance(revision, str) and "@" not in name else name


def weight_files(folder: Path) -> list[Path]:
    """
    Return the safetensors files of a folder: those that its index names, or model.safetensors. Raises FileNotFoundError
    if one is missing, and ValueError for a LoRA run, which has no model of its own.
    """
    if adapter_folder(folder):
        raise ValueError(
            f"{folder} is a LoRA run, not a model of its own; merge it first: python convert_weights.py merge-lora "
            f"{folder} OUT"
        )
    index = folder / INDEX
    if index.is_file():
        refuse_pointer(index)
        paths = sorted(set(weight_map(folder).values()))
        hint = f"{INDEX} names it; download it again"
    else:
        paths = [folder / "model.safetensors"]
        pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
        hint = f"and there is no {INDEX}; download it again"
        if pickles:
            hint = f"there is only {pickles[0]}, a pickle; save the model again with safe_serialization=True"
    for path in paths:
        require_file(path, hint, kind="weight file ")
    return paths


def fingerprint(folder: str | Path) -> str:
    """A hash of a checkpoint's weights: sixteen places of each file, as reading all of it would take minutes."""
    return fingerprint_files(weight_files(find_model(folder)))


def fingerprint_files(paths: list[Path]) -> str:
    """Return a hash of names, sizes and sixteen places of some files."""
    digest = hashlib.sha256()
    for path in paths:
        refuse_special(path)
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for i in range(16):
                file.seek(i * size // 16)
                digest.update(file.read(4096))
    return digest.hexdigest()[:16]


# -----------------------------------------------------------------------------
# What to do about a folder that is none


def require_file(path: Path, remedy: str, kind: str = "") -> Path:
    """Return the path of a file. Raises FileNotFoundError with the remedy if it is not there."""
    if path.is_file():
        return path
    if path.is_symlink():
        raise FileNotFoundError(
            f"{path}: a link to {path.readlink()}, which is not there: a folder of the Hugging Face cache that was "
            f"copied without its blobs; copy it with cp -rL, or download it again"
        )
    raise FileNotFoundError(f"{path}: {kind}missing, {remedy}")


def is_there(path: Path) -> bool:
    """True if the name is taken, also by a link that leads nowhere: reading it is an error, not the lack of a file."""
    return path.exists() or path.is_symlink()


def hint_for_missing(folder: Path) -> str:
    """Return how to get a checkpoint that may be meant by the name of a folder that is not there."""
    if folder.is_file():
        return "; it is a file: give the folder that it is in"
    if is_hub_name(f"{HUB_PREFIX}{folder}") and str(folder.parent) not in OUR_FOLDERS:
        return f"; if it is a name on huggingface.co, and no folder: {HUB_PREFIX}{folder}"
    return ""


def hint_for_other(folder: Path) -> str:
    """Return what a folder is that is no model in Hugging Face layout, and which folder may be meant."""
    snapshots = sorted(path.parent for path in folder.glob("snapshots/*/config.json"))
    if snapshots:
        return f"; it is a folder of the Hugging Face cache, the model is in {snapshots[-1]}"
    if (folder / "checkpoint" / "config.json").is_file():
        return f"; it is a run folder, its model is in {folder / 'checkpoint'}"
    if list(folder.glob("checkpoints/step-*/train.json")) or (folder / "train.json").is_file():
        return "; it is a run that has not finished: the command that started it continues it"
    if list(folder.rglob("*.pt")):
        return "; convert_weights.py turns .pt checkpoints into this layout"
    configs = [*folder.glob("*/config.json"), *folder.glob(f"*/{ADAPTER_CONFIG}")]
    if configs:
        return f"; is {min(configs).parent} meant?"
    return ""


def hint_for_wrapper(name: str, skeleton: OpenVLA) -> str:
    """Return what to do about a tensor that is the model's but for what a wrapper has put in front of its name."""
    for own in skeleton.state_dict():
        if name.endswith(f".{own}"):
            prefix = name.removesuffix(own)
            return f" (a wrapper has put {prefix} in front; save the model that is inside it)"
    return ""


# -----------------------------------------------------------------------------
# Adapters, as PEFT keeps them

PEFT_PREFIX = "base_model.model."  # before each of our names

# Before the names of vision encoders that the official OFT script has wrapped with FiLM. Such adapters are in the
# policy's vision_backbone component, too, and taken from there. Officially they are left out as well: when the adapter
# is merged into the base, which has no modules of that name.
FILM_PREFIX = "vision_backbone.vision_backbone."

# What adapter_config.json must say, if it says anything of it. PEFT (0.21) knows more kinds of adapters.
PLAIN_LORA = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "use_qalora": False,
    "use_bdlora": None,
    "lora_bias": False,
    "modules_to_save": None,
    "fan_in_fan_out": False,
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
}

# What says which layers an adapter has (their tensors tell), how it started or trained, or something about the file.
WITHOUT_EFFECT = (
    "task_type auto_mapping peft_version base_model_name_or_path revision inference_mode target_modules "
    "exclude_modules layers_to_transform layers_pattern megatron_config megatron_core qalora_group_size loftq_config "
    "eva_config corda_config lora_ga_config velora_config runtime_config ensure_weight_tying"
).split()
READ_HERE = ("r", "lora_alpha", "lora_dropout", "init_lora_weights", "use_rslora", "rank_pattern", "alpha_pattern")
# How A and B may have started. PiSSA, OLoRA, CorDA, LoftQ and others change the base as well: their adapter is wrong on
# the base that is in the files.
PLAIN_STARTS = (None, True, False, "true", "false", "gaussian", "orthogonal", "eva")


def read_adapter_config(folder: Path) -> dict:
    """Return the content of adapter_config.json. Raises ValueError, naming the file, for what is not plain LoRA."""
    file = folder / ADAPTER_CONFIG
    config = read_json_object(file)
    for key, expected in PLAIN_LORA.items():
        value = config.get(key, expected)
        is_off = not value and not expected  # None, False and {} all say that it is not used
        if value != expected and not is_off:
            raise ValueError(f"{file}: {key} is {value!r}; only plain LoRA is read here, {expected!r}")
    for key, value in config.items():
        is_known = key in PLAIN_LORA or key in WITHOUT_EFFECT or key in READ_HERE
        if value and not is_known:
            raise ValueError(
                f"{file}: {key} is {value!r:.80}, which this code does not know and so cannot apply; if it changes "
                f"nothing in what the adapter computes, remove the key"
            )

    start = config.get("init_lora_weights")
    if isinstance(start, str):
        start = start.lower()
    if start not in PLAIN_STARTS:
        raise ValueError(
            f"{file}: init_lora_weights is {start!r}, an adapter for a base that was changed with it; convert it to "
            f"plain LoRA with PEFT (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    rank = config.get("r")
    if type(rank) is not int or rank < 1:
        raise ValueError(f"{file}: r is {rank!r}, it must be the rank, a whole number above 0")
    alpha = config.get("lora_alpha")
    if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        raise ValueError(f"{file}: lora_alpha is {alpha!r}, it must be a number above 0")
    if type(config.get("use_rslora", False)) is not bool:
        raise ValueError(f"{file}: use_rslora is {config['use_rslora']!r}, it must be true or false")
    check_pattern(file, "rank_pattern", config, lambda value: type(value) is int and value > 0)
    check_pattern(file, "alpha_pattern", config, lambda value: type(value) in (int, float) and 0 < value < math.inf)
    dropout = config.get("lora_dropout", 0.0)
    if type(dropout) not in (int, float) or not 0 <= dropout <= 1:
        raise ValueError(f"{file}: lora_dropout is {dropout!r}, it must be a number from 0 to 1")
    return config


def check_pattern(file: Path, key: str, config: dict, is_good: Callable):
    """
    Raise ValueError unless rank_pattern or alpha_pattern of an adapter_config.json is {name of a layer: value}. PEFT
    takes any regular expression there; one from a stranger's file could take forever.
    """
    pattern = config.get(key) or {}
    if not isinstance(pattern, dict) or not all(is_good(value) for value in pattern.values()):
        raise ValueError(f"{file}: {key} is {pattern!r:.80}, it must be {{name: number above 0}}")
    for name in pattern:
        if not re.fullmatch(r"[\w.]+", name):
            raise ValueError(
                f"{file}: {key} has the pattern {name!r:.80}; only names of layers are read here, or their last parts, "
                f"such as q_proj; write one entry for each"
            )


def rank_and_alpha(config: dict, layer: str) -> tuple[int, float]:
    """
    Return rank and alpha of a layer, such that alpha / rank scales its adapter. config: of `read_adapter_config`.
    Rank-stabilised LoRA (https://arxiv.org/abs/2312.03732) has alpha / sqrt(rank).
    """
    rank = value_of_layer(config.get("rank_pattern") or {}, layer, config["r"])
    alpha = value_of_layer(config.get("alpha_pattern") or {}, layer, config["lora_alpha"])
    if config.get("use_rslora"):
        alpha = alpha * math.sqrt(rank)
    return rank, alpha


def value_of_layer(pattern: dict, layer: str, default: float) -> float:
    """Return the value of the first name in a pattern that is the layer's or its last parts, or the default."""
    for name, value in pattern.items():
        if layer == name or layer.endswith(f".{name}"):
            return value
    return default


def adapter_names(folder: Path) -> dict[str, str]:
    """Return our name -> the name in the file, of each tensor of adapter_model.safetensors but those of FiLM."""
    file = folder / ADAPTER_WEIGHTS
    hint = f"an adapter is {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}"
    if (folder / "adapter_model.bin").is_file():
        hint = (
            'there is only adapter_model.bin of an older PEFT, a pickle; turn it into this file: python -c "import '
            "torch; from safetensors.torch import save_file; save_file(torch.load('adapter_model.bin', "
            "weights_only=True), 'adapter_model.safetensors')\""
        )
    names = {}
    for peft_name in read_header(require_file(file, hint)):
        if not peft_name.startswith(PEFT_PREFIX) or not peft_name.endswith(".weight"):
            raise ValueError(f"{file}: {peft_name} is no tensor of a LoRA adapter of PEFT")
        if not peft_name.startswith(PEFT_PREFIX + FILM_PREFIX):
            names[peft_name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")] = peft_name
    return names


def check_adapter(folder: Path):
    """
    Raise ValueError or FileNotFoundError unless a folder holds a plain LoRA adapter, in which each layer has an A and a
    B of the rank that adapter_config.json says. To be checked without a base.
    """
    config = read_adapter_config(folder)
    names = adapter_names(folder)
    shapes = read_header(folder / ADAPTER_WEIGHTS)
    modules = adapted_layers(names)
    if not modules:
        raise ValueError(f"{folder / ADAPTER_WEIGHTS}: it holds no adapter; save it again")
    for module in modules:
        rank, _ = rank_and_alpha(config, module)
        A = shapes.get(names.get(f"{module}.lora_A.weight"), ())
        B = shapes.get(names.get(f"{module}.lora_B.weight"), ())
        has_rank = A[:1] == (rank,) and B[1:2] == (rank,)
        if not has_rank:
            raise ValueError(
                f"{folder / ADAPTER_WEIGHTS}: {PEFT_PREFIX}{module}.weight needs a lora_A and a lora_B of rank {rank}, "
                f"as {ADAPTER_CONFIG} says (r); they are {A or 'missing'} and {B or 'missing'}"
            )


def check_film(folder: Path, adapter: Path):
    """Raise ValueError if an adapter has been trained with FiLM, and the component that holds its part is not there."""
    has_film = any(name.startswith(PEFT_PREFIX + FILM_PREFIX) for name in read_header(adapter / ADAPTER_WEIGHTS))
    if has_film and not component_files(folder, "vision_backbone"):
        raise ValueError(
            f"{folder}: vision_backbone--*{COMPONENT_ENDING} is missing, but {adapter / ADAPTER_WEIGHTS} was trained "
            f"with FiLM; copy that file, too"
        )


def adapted_layers(names) -> list[str]:
    """Return the layers to which the A and B of these names belong."""
    layers = {name.rsplit(".", 2)[0] for name in names if ".lora_" in name}  # "... .q_proj.lora_A.weight" -> q_proj
    return sorted(layers)


def check_adapter_fits(folder: Path, base_shapes: dict[str, tuple]):
    """Raise ValueError unless each tensor of an adapter fits the base. base_shapes: name -> shape of its tensors."""
    file = folder / ADAPTER_WEIGHTS
    config = read_adapter_config(folder)
    names = adapter_names(folder)
    found = read_header(file)

    expected = {}
    for module in adapted_layers(names):
        if f"{module}.weight" not in base_shapes:
            raise ValueError(f"{file}: adapter for {module}, which the base model does not have")
        rank, _ = rank_and_alpha(config, module)
        out_channels, *in_shape = base_shapes[f"{module}.weight"]
        kernel_of_B = [1] * (len(in_shape) - 1)
        expected[f"{module}.lora_A.weight"] = (rank, *in_shape)
        expected[f"{module}.lora_B.weight"] = (out_channels, rank, *kernel_of_B)
    for name in names:
        if name not in expected and name not in base_shapes:
            raise ValueError(f"{file}: {names[name]} is no tensor of a LoRA adapter of PEFT, nor of its base model")
        if name not in expected:
            expected[name] = base_shapes[name]

    for name, shape in expected.items():
        if name not in names:
            raise ValueError(f"{file}: {name} is missing, the base model makes it {shape}")
        if found[names[name]] != shape:
            raise ValueError(
                f"{file}: {name} is {found[names[name]]}, the base model makes it {shape} (with the rank of "
                f"{ADAPTER_CONFIG}, r {config['r']})"
            )


def check_stored_base(folder: Path, find: Callable[[str], Tensor]):
    """
    Raise ValueError if base weights that PEFT has stored beside an adapter (lm_head, embeddings) are not those of the
    base. find: name -> the base's own weight.
    """
    for name, peft_name in adapter_names(folder).items():
        if ".lora_" in name:
            continue
        stored = read_tensor(folder / ADAPTER_WEIGHTS, peft_name)
        if not is_same_weight(find(name).cpu(), stored):
            raise ValueError(
                f"{folder / ADAPTER_WEIGHTS}: {peft_name} differs from the base model's: the adapter was trained on "
                f"another one, or trained this weight, too; set base_model_name_or_path to that base"
            )


def is_same_weight(a: Tensor, b: Tensor) -> bool:
    """True if two tensors are equal, or where their dtypes differ, equal but for rounding to bfloat16."""
    if a.dtype == b.dtype:
        return torch.equal(a, b)
    return torch.allclose(a.float(), b.float(), rtol=2**-7, atol=2**-24)


# -----------------------------------------------------------------------------
# Exports of several files: an adapter and, of OFT, the components that were trained with it


@contextmanager
def complete_export(run: Path) -> Iterator[None]:
    """
    Wrap the writing of all files of an export. A process that is killed in between leaves no record, and the folder is
    refused instead of being loaded as a mixture of old and new files.
    """
    (run / EXPORT_RECORD).unlink(missing_ok=True)
    yield
    write_json(run / EXPORT_RECORD, {path.name: fingerprint_files([path]) for path in export_files(run)})


def export_files(run: Path) -> list[Path]:
    """Return the files of an export that belong together."""
    names = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, OFT_RECORD, STATISTICS)
    present = [run / name for name in names if (run / name).is_file()]
    return present + component_files(run) + sorted((run / FAST_FOLDER).glob("*.json"))


def check_export(folder: Path):
    """Raise ValueError if the files of a run's export do not belong together. Adapters of others have no record."""
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        metadata = file.metadata() or {}
    if "record" not in metadata:
        return
    expected = read_json(folder / EXPORT_RECORD) if (folder / EXPORT_RECORD).is_file() else {}
    found = {path.name: fingerprint_files([path]) for path in export_files(folder)}
    if found != expected:
        raise ValueError(
            f"{folder}: its export is not complete, or is being written; wait for the run, or give its command again"
        )


# -----------------------------------------------------------------------------
# Headers of safetensors files


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor in a safetensors file. Raises ValueError if the file is not whole."""
    _, layout = read_layout(path)
    return {name: tuple(entry["shape"]) for name, entry in layout.items()}


def read_shapes(files: dict[str, Path]) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of all tensors of a checkpoint. files: name -> file."""
    shapes = {}
    for path in sorted(set(files.values())):
        shapes.update(read_header(path))
    return shapes


def read_tensor(path: Path, name: str) -> Tensor:
    """Map one tensor of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def read_layout(path: Path) -> tuple[int, dict[str, dict]]:
    """
    Return where the data of a safetensors file begins, and name -> {dtype, shape, data_offsets} (bytes from there).
    Raises ValueError if the file is not whole.
    """
    refuse_pointer(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > size:
            raise ValueError(f"{path}: cut off or no safetensors file, {size:,} bytes; download it again")
        if length > MOST_HEADER_BYTES:
            raise ValueError(
                f"{path}: no safetensors file, its header would have {length:,} bytes, {MOST_HEADER_BYTES:,} is the "
                f"most; download it again"
            )
        text = file.read(length)

    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        ends = [entry["data_offsets"][1] for entry in header.values()]
        expected = 8 + length + max(ends, default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise ValueError(f"{path}: no safetensors file, its header cannot be read; download it again") from None
    if size != expected:
        raise ValueError(f"{path}: {size:,} bytes where {expected:,} are expected; download it again")
    try:
        with safe_open(path, framework="pt"):  # it checks each dtype, shape and place
            pass
    except SafetensorError as error:
        raise ValueError(f"{path}: no safetensors file ({error}); download it again") from None
    return 8 + length, header


def refuse_pointer(path: Path):
    """Raise ValueError for a Git LFS pointer, which git leaves in place of a large file; and for a device or a pipe."""
    refuse_special(path)
    with open(path, "rb") as file:
        start = file.read(40)
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` in {path.parent}")


# -----------------------------------------------------------------------------
# Files of torch.save


def open_pt(path: str | Path, mmap: bool = True) -> dict:
    """
    Return the content of a file of torch.save. mmap: leave the tensors on the disk until their values are used.
    Raises ValueError if the file is not whole, or holds more than tensors.
    """
    refuse_pointer(Path(path))
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except UnpicklingError as error:
        asks_for = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"asks for {asks_for[1]}" if asks_for else "cannot be read"
        raise ValueError(
            f"{path}: refused, its pickle {reason}; a checkpoint holds tensors only. None of its code was run"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError, IndexError, OSError) as error:
        reason = (str(error) or type(error).__name__).split(". ")[0].splitlines()[0]
        raise ValueError(f"{path}: cut off, or no zip file of torch.save ({reason}); copy it again") from None
