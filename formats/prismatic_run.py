"""
What is in a training run of the official code?

    run = find_run("runs/prism-dinosiglip-224px+mx-bridge")   # the folder, or one .pt of it
    tensors = open_run(run.weights)                           # by the names of Hugging Face layout, memory-mapped
    config = infer_config(run.weights, tensors, run.config)   # the sizes, which the tensors tell

The official training code is built on Prismatic, and so is the layout of its runs: config.json,
dataset_statistics.json and checkpoints/*.pt. Such a .pt holds {"model": {"vision_backbone", "projector",
"llm_backbone"}}. If the vision encoders were frozen, as in the base VLMs, they are not in it; files of timm have them.
A .pt is a pickle, which could run code: one that asks for more than tensors is refused.

prismatic/models/load.py and prismatic/training/strategies of github.com/openvla/openvla. convert_weights.py turns such
runs into Hugging Face layout, and back.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from checkpoint import STATISTICS, open_pt, read_header
from files import read_json_object
from model import VISION_ENCODERS, LlamaConfig, OpenVLA, OpenVLAConfig, ViTConfig, is_unused
from tokenizer import PAD

# "base_vlm" or "model_id" in a run's config.json -> what config.json in Hugging Face layout says of that base VLM
BASE_VLMS = {
    "prism-dinosiglip-224px+7b": {
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "llm_backbone_id": "llama2-7b-pure",
        "hf_llm_id": "meta-llama/Llama-2-7b-hf",
        "image_resize_strategy": "resize-naive",
    },
    "siglip-224px+7b": {
        "vision_backbone_id": "siglip-vit-so400m",
        "llm_backbone_id": "vicuna-v15-7b",
        "hf_llm_id": "lmsys/vicuna-7b-v1.5",
        "image_resize_strategy": "letterbox",
    },
}
BASE_VLM_KEYS = ("vision_backbone_id", "llm_backbone_id", "hf_llm_id", "image_resize_strategy")

# Names in Hugging Face layout -> names in a training run
RENAMES = {
    "projector.fc1.": "projector.projector.0.",
    "projector.fc2.": "projector.projector.2.",
    "projector.fc3.": "projector.projector.4.",
    "language_model.": "llm_backbone.llm.",
    ".scale_factor": ".gamma",  # because transformers renames whatever contains "gamma"
}
# The same for two vision encoders. A lone one is called "featurizer" in both.
ENCODER_RENAMES = {
    "vision_backbone.featurizer.": "vision_backbone.dino_featurizer.",
    "vision_backbone.fused_featurizer.": "vision_backbone.siglip_featurizer.",
}
ENCODER_PREFIXES = tuple(ENCODER_RENAMES)
VOCABULARY = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")

LATEST = Path("checkpoints/latest-checkpoint.pt")  # where a run has its newest weights
LLM_MAX_LENGTH = 2048  # tokens; the official code writes it into config.json
VOCABULARY_MULTIPLE = 64  # the rows of the vocabulary are a multiple of this


class OptionNeeded(ValueError):
    """Raised for a run that lacks something which an option of convert_weights.py can give."""


# -----------------------------------------------------------------------------
# Names


def to_hf(name: str) -> str:
    """Return the Hugging Face name of a tensor of a training run."""
    for hf, prismatic in {**ENCODER_RENAMES, **RENAMES}.items():
        name = name.replace(prismatic, hf)
    return name


def to_prismatic(name: str, fused: bool) -> str:
    """Return the name of a tensor in a training run. fused: the model has two vision encoders."""
    renames = {**ENCODER_RENAMES, **RENAMES} if fused else RENAMES
    for hf, prismatic in renames.items():
        name = name.replace(hf, prismatic)
    return name


# -----------------------------------------------------------------------------
# Read: files -> memory-mapped tensors by Hugging Face name


def open_safetensors(files: Iterable[str | Path]) -> dict[str, Tensor]:
    """Map the tensors of safetensors files. Raises ValueError if a file is not whole."""
    tensors = {}
    for path in files:
        read_header(Path(path))  # raises if the file is not whole
        file = safe_open(path, framework="pt")
        for name in file.keys():
            tensors[name] = file.get_tensor(name)
    return tensors


def open_run(path: Path, vision: Iterable[str] = ()) -> dict[str, Tensor]:
    """
    Map the tensors of a training checkpoint. vision: files of timm for the vision encoders that it lacks.
    Raises ValueError if a file is none of that.
    """
    content = open_pt(path)
    model = content.get("model") if isinstance(content, dict) else None
    parts = {}
    if isinstance(model, dict):
        parts = {part: tensors for part, tensors in model.items() if isinstance(tensors, dict)}
    if "projector" not in parts or "llm_backbone" not in parts:
        raise ValueError(f"{path}: no OpenVLA: it needs model/projector and model/llm_backbone, found {list(parts)}")

    tensors = {}
    for prefix, file in zip(ENCODER_PREFIXES, vision, strict=False):
        for name, tensor in open_timm(file).items():
            tensors[prefix + to_hf(name)] = tensor
    for part, state in parts.items():
        for name, value in state.items():
            if torch.is_tensor(value):
                tensors[to_hf(f"{part}.{name}")] = value
    return tensors


def open_timm(file: str | Path) -> dict[str, Tensor]:
    """
    Map a vision encoder as huggingface.co/timm has it: alone, or (SigLIP) in a file of open_clip, where a text
    transformer stands beside it. Raises ValueError if the file holds none.
    """
    tensors = open_safetensors([file]) if str(file).endswith(".safetensors") else open_pt(file)
    trunk = "visual.trunk."
    visual = {name.removeprefix(trunk): tensor for name, tensor in tensors.items() if name.startswith(trunk)}
    if visual:
        tensors = visual
    if "pos_embed" not in tensors or "patch_embed.proj.weight" not in tensors:
        raise ValueError(f"{file}: no vision transformer of timm, it holds {list(tensors)[:3]}")

    patch_size = tensors["patch_embed.proj.weight"].shape[-1]
    side = 224 // patch_size
    return {**tensors, "pos_embed": resample_positions(tensors["pos_embed"], side)}


def resample_positions(pos_embed: Tensor, side: int) -> Tensor:
    """
    Return the position embeddings (1, N, D) of side * side patches. DINOv2 has learned those of 518 pixels, a grid of
    37 * 37; timm resamples them in the same way.
    """
    if pos_embed.shape[1] == side**2:
        return pos_embed
    old_side = math.isqrt(pos_embed.shape[1])
    grid = pos_embed.float().transpose(1, 2).unflatten(2, (old_side, -1))  # (1, D, old_side, old_side)
    grid = F.interpolate(grid, (side, side), mode="bicubic", antialias=True)  # (1, D, side, side)
    return grid.flatten(2).transpose(1, 2)


# -----------------------------------------------------------------------------
# What is a training run? config.json names its parts, the tensors have the sizes


@dataclass
class TrainingRun:
    """A run of the official training code, or of hf-to-prismatic."""

    weights: Path  # the .pt
    config: dict  # config.json
    statistics: dict  # dataset_statistics.json; empty for a base VLM, which has no actions


def find_run(path: Path) -> TrainingRun:
    """
    Find a run by its folder, whose latest .pt is taken, or by one of its .pt files. Raises FileNotFoundError if a file
    of it is missing.
    """
    if path.suffix == ".pt":
        folder = path.absolute().parent.parent
        weights = path
    else:
        folder = path
        weights = folder / LATEST
        if not weights.is_file():
            weights = max(folder.glob("checkpoints/step-*.pt"), default=weights)
    if not weights.is_file() or not (folder / "config.json").is_file():
        expected = weights.absolute().relative_to(folder.absolute())
        raise FileNotFoundError(f"{folder}: no training run, it needs config.json and {expected}")

    config = read_json_object(folder / "config.json")
    for key in ("vla", "model", "text_config"):
        if not isinstance(config.get(key, {}), dict):
            raise ValueError(
                f"{folder / 'config.json'}: {key} is {config[key]!r:.60}, in a training run it is {{...}}; copy it"
            )
    is_base_vlm = "vla" not in config
    if is_base_vlm:
        return TrainingRun(weights, config, statistics={})
    statistics = folder / STATISTICS
    if not statistics.is_file():
        raise FileNotFoundError(f"{statistics}: missing, but needed to turn tokens into actions; copy it from the run")
    return TrainingRun(weights, config, read_json_object(statistics))


def infer_config(path: Path, tensors: dict[str, Tensor], run: dict) -> OpenVLAConfig:
    """
    Return the config of a run's model, with the sizes that its tensors tell.

    path: of the weights, for messages. run: the content of its config.json. If the model is not of the released size,
    "vision_configs" and "text_config" there must have what tensors do not tell.
    Raises OptionNeeded if these or the vision encoders are missing, else ValueError if the tensors do not fit together.
    """
    base = find_base_vlm(path, run)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    given_vision = run.get("vision_configs", [{}, {}])
    given_text = run.get("text_config", {})
    try:
        vision = []
        for prefix, timm_id, given in zip(ENCODER_PREFIXES, timm_ids(base), given_vision, strict=False):
            vision.append(infer_vit(shapes, prefix, timm_id, given))
        text = infer_llama(shapes, given_text)
        config = OpenVLAConfig(vision, text, extra_config(base))
        check_shapes(shapes, config)
        OpenVLAConfig.from_dict(config.to_dict())  # checks what tensors do not tell, as loading will
    except OptionNeeded as error:
        raise OptionNeeded(f"{path}: {error}") from None
    except KeyError as error:
        raise ValueError(f"{path}: it has no tensor {error}") from None
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        message = " ".join(str(error).split())  # in one line
        raise ValueError(f"{path}: {message[:500]}") from None
    return config


def find_base_vlm(path: Path, run: dict) -> str:
    """Return which of BASE_VLMS a run started from, or is. Raises ValueError for another one."""
    base = run.get("vla", {}).get("base_vlm") or run.get("model", {}).get("model_id")
    name = Path(str(base)).name  # it may be a folder
    if name not in BASE_VLMS:
        raise ValueError(f"{path}: the run's config.json names the base VLM {name!r}, known are {', '.join(BASE_VLMS)}")
    return name


def timm_ids(base: str) -> list[str]:
    """Return timm's names of the vision encoders of a base VLM: DINOv2 and SigLIP, or SigLIP alone."""
    names = list(VISION_ENCODERS)
    return names if "dino" in base else names[1:]


def extra_config(base: str) -> dict:
    """Return the entries of config.json that follow from the base VLM and are no sizes."""
    return {
        **BASE_VLMS[base],
        "llm_max_length": LLM_MAX_LENGTH,
        "pad_to_multiple_of": VOCABULARY_MULTIPLE,
        "timm_override_act_layers": [None for _ in timm_ids(base)],
        "output_projector_states": False,
    }


def infer_vit(shapes: dict[str, tuple], prefix: str, timm_id: str, given: dict) -> ViTConfig:
    """Return the config of the vision encoder whose tensors start with `prefix`. given: sizes that were told."""
    vit = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    if not vit:
        raise OptionNeeded(
            f"has no {prefix}*: frozen vision encoders are not saved; --vision FILE [FILE] takes them from "
            f"huggingface.co/timm, DINOv2 first ({timm_id})"
        )
    embed_dim, _, patch_size, _ = vit["patch_embed.proj.weight"]
    num_patches = vit["pos_embed"][1]

    # The last block never runs. A model that this code trained from random weights has neither it nor the final norm.
    depth = len({name.split(".")[1] for name in vit if name.startswith("blocks.")})
    if "norm.weight" not in vit:
        depth += 1

    sizes = {
        "embed_dim": embed_dim,
        "depth": depth,
        "patch_size": patch_size,
        "img_size": patch_size * math.isqrt(num_patches),
        "mlp_dim": vit["blocks.0.mlp.fc1.bias"][0],
        "cls_token": "cls_token" in vit,
        "reg_tokens": vit["reg_token"][1] if "reg_token" in vit else 0,
        "layer_scale": "blocks.0.ls1.scale_factor" in vit,
    }
    return with_sizes(VISION_ENCODERS[timm_id], sizes, given, heads="num_heads", part=prefix)


def infer_llama(shapes: dict[str, tuple], given: dict) -> LlamaConfig:
    """Return the config of the language model. given: sizes that were told."""
    layers = "language_model.model.layers."
    rows, hidden_size = shapes[VOCABULARY[0]]
    rows_with_pad = max(rows, PAD + 1)  # base VLMs have Llama's own 32,000 tokens, without <PAD>
    sizes = {
        "hidden_size": hidden_size,
        "intermediate_size": shapes[f"{layers}0.mlp.gate_proj.weight"][0],
        "num_hidden_layers": len({name.split(".")[3] for name in shapes if name.startswith(layers)}),
        "vocab_size": math.ceil(rows_with_pad / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
    }
    text = with_sizes(OpenVLAConfig().text, sizes, given, heads="num_attention_heads", part="Llama")

    key_channels = shapes[f"{layers}0.self_attn.k_proj.weight"][0]
    return replace(text, num_key_value_heads=key_channels * text.num_attention_heads // hidden_size)


def with_sizes(
    released: ViTConfig | LlamaConfig, sizes: dict, given: dict, heads: str, part: str
) -> ViTConfig | LlamaConfig:
    """
    Return the released config with other sizes. Raises OptionNeeded if they differ and `given` lacks the number of
    heads (the field `heads`), which weights do not tell.
    """
    is_released = replace(released, **sizes) == released
    if not is_released and heads not in given:
        raise OptionNeeded(
            f"{part} is not of the released size ({sizes}), and weights do not tell {heads}; give "
            "--config FILE, a config.json with text_config and vision_configs, a list"
        )
    known = {key: value for key, value in given.items() if hasattr(released, key)}
    return replace(released, **{**known, **sizes})


def check_shapes(shapes: dict[str, tuple], config: OpenVLAConfig):
    """Raise RuntimeError if the tensors do not fit a model of this config. It lists all that does not fit."""
    with torch.device("meta"):
        model = OpenVLA(config)
        tensors = {}
        for name, shape in shapes.items():
            if not is_unused(name, config):
                tensors[name] = torch.empty(stored_shape(name, shape, config))
        model.load_state_dict(tensors)


def stored_shape(name: str, shape: tuple[int, ...], config: OpenVLAConfig) -> tuple[int, ...]:
    """Return the shape of a run's tensor in Hugging Face layout, where the vocabulary has more rows."""
    if name in VOCABULARY:
        return config.text.vocab_size, *shape[1:]
    return shape


# -----------------------------------------------------------------------------
# What the official code can load


def official_limits(tensors: dict[str, Tensor], config: OpenVLAConfig) -> list[str]:
    """Return what keeps the official code from loading weights that this code takes."""
    problems = []

    # The official classes want tensors that never run, see `is_unused`.
    expected = 0
    for vit in config.vision:
        expected += 12 + 2  # the last block: 6 modules with weight and bias; the final norm
        if vit.layer_scale:
            expected += 2  # ls1 and ls2 of that block
        if not vit.cls_token:
            expected += 13  # SigLIP's attention pool
    present = sum(is_unused(name, config) for name in tensors)
    if present != expected:
        problems.append(f"{expected - present} tensors are missing that never run but that it wants")

    # It builds vision encoders of the released sizes, whatever config.json says.
    released = list(VISION_ENCODERS.values())[-len(config.vision) :]
    if config.vision != released:
        problems.append("the vision encoders are not of the released size")
    return problems
