"""
LoRA: the weights stay frozen, and each layer gets a small bypass that trains in their place.

             x (in)
               |
               +-------------------.
               |                   |
               |               A (r, in)      trains; starts random
         W (out, in)               |
            frozen             B (out, r)     trains; starts at zero, so that at first nothing changes
               |                   |
               |              * alpha / r
               |                   |
               +<------------------'
               |
             y (out) = W x + B A x * alpha / r

Merged, W + B A * alpha / r is one weight of the old size, and the bypass costs nothing more.

    add_lora(model, rank=32)            freeze the model, wrap its layers
    merge_lora(model)                   add the bypasses to the weights; unmerge_lora(model) takes them out again
    save_adapter(model, folder, base)   write adapter_config.json and adapter_model.safetensors, as PEFT does
    load_adapter(model, folder)         put such an adapter onto its base model
    merge(run, out)                     a run folder and its base checkpoint -> a checkpoint folder as any other

The layers are those that PEFT 0.11 finds for target_modules="all-linear" in the official code. It also adapts modules
that never run (the last ViT block, the attention pool). Their A and B live in `model.unused`, so that files and
parameter counts agree with the official ones.

LoRA https://arxiv.org/abs/2106.09685; vla-scripts/finetune.py of github.com/openvla/openvla; the files are those of
github.com/huggingface/peft, 0.11.1; those of 0.21.2 are read, too.

Axes: r rank, in and out channels of a layer, k width of a convolution's kernel.
"""

import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    EXPORT_RECORD,
    PEFT_PREFIX,
    adapted_layers,
    adapter_names,
    base_of,
    check_adapter_fits,
    check_stored_base,
    fingerprint,
    open_checkpoint,
    rank_and_alpha,
    read_adapter_config,
    read_layout,
)
from fast import FAST_FOLDER, record_action_tokens
from files import atomic_write, read_json, write_json
from hub import find_cached_model, find_model, is_hub_name, parse_hub_name
from model import OpenVLA
from progress import no_progress

# What can be adapted -> the name of that module in an OpenVLA
PARTS = {"vision": "vision_backbone", "projector": "projector", "language": "language_model"}


@dataclass
class LoRAConfig:
    """How a model is adapted; add_lora and load_adapter keep it as `model.lora`."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]  # keys of PARTS


# -----------------------------------------------------------------------------
# One layer


class LoRALinear(nn.Module):
    """A linear layer, or the patch convolution, with its low-rank bypass."""

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        self.base_layer = base
        self.scaling = alpha / rank
        self.dropout = nn.Dropout(dropout)
        # The base layer's own weight, as long as the merged one stands in its place.
        self.weight_before_merge: Tensor | None = None

        if isinstance(base, nn.Conv2d):
            self.lora_A = nn.Conv2d(base.in_channels, rank, base.kernel_size, base.stride, bias=False)
            self.lora_B = nn.Conv2d(rank, base.out_channels, kernel_size=1, bias=False)
        else:
            self.lora_A = nn.Linear(base.in_features, rank, bias=False)
            self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.normal_(self.lora_A.weight, std=1 / rank)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        if self.weight_before_merge is not None:
            return y  # merged: the base layer has B A in its weight

        x = x.to(self.lora_A.weight.dtype)  # adapters train in float32 beside a model in bfloat16
        bypass = self.lora_B(self.lora_A(self.dropout(x)))
        return (y + bypass * self.scaling).to(y.dtype)


def lora_update(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """
    Return what an adapter adds to the weight, B A * scaling, in float32: (out, in), or (out, in, k, k).
    A (r, in) and B (out, r); of a convolution A (r, in, k, k) and B (out, r, 1, 1).
    """
    product = B.float().flatten(1) @ A.float().flatten(1)  # (out, in * k * k)
    return product.view(len(B), *A.shape[1:]) * scaling


def default_alpha(rank: int) -> int:
    """Return the alpha of the official recipe."""
    return min(rank, 16)


# -----------------------------------------------------------------------------
# The whole model


def add_lora(
    model: OpenVLA,
    rank: int = 32,
    alpha: float = 0.0,
    dropout: float = 0.0,
    targets: Iterable[str] = tuple(PARTS),
) -> OpenVLA:
    """
    Freeze the model and put a float32 adapter around every layer of the targets, in place. Returns the model.

    alpha: 0 means min(rank, 16), as in the official recipe. targets: some of vision, projector, language.
    Raises ValueError for another target.
    """
    if not alpha:
        alpha = default_alpha(rank)
    targets = tuple(targets)
    names = adapted_modules(model, targets)

    model.lora = LoRAConfig(rank, alpha, dropout, targets)
    wrap_modules(model, {name: (rank, alpha) for name in names})
    return model


def adapted_modules(model: OpenVLA, targets: Iterable[str] = tuple(PARTS)) -> list[str]:
    """
    Return the names of the modules that get an adapter: all whose weight is a matrix or a kernel, except embeddings.
    Raises ValueError for a target that is none of vision, projector, language.
    """
    targets = list(targets)
    unknown = set(targets) - PARTS.keys()
    if unknown:
        raise ValueError(f"lora_targets {sorted(unknown)}: must be some of {', '.join(PARTS)}")
    prefixes = tuple(f"{PARTS[target]}." for target in targets)

    names = []
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers()), **model.unused}
    for name, tensor in tensors.items():
        name = name.removesuffix("_nf4")  # a weight that speed/nf4.py keeps in 4 bits
        is_matrix_or_kernel = name.endswith(".weight") and tensor.dim() in (2, 4)
        if is_matrix_or_kernel and name.startswith(prefixes) and "embed_tokens" not in name:
            names.append(name.removesuffix(".weight"))
    return names


def wrap_modules(model: OpenVLA, sizes: dict[str, tuple[int, float]]):
    """Freeze the model and put adapters around modules. sizes: name -> rank and alpha."""
    model.requires_grad_(False)
    for name, (rank, alpha) in sizes.items():
        if f"{name}.weight" in model.unused:
            add_unused_adapter(model, name, rank)
        else:
            wrap_module(model, name, rank, alpha)


def wrap_module(model: OpenVLA, name: str, rank: int, alpha: float):
    """Put a LoRALinear in the place of a module, around it."""
    parent, _, child = name.rpartition(".")
    base = model.get_submodule(name)
    tensor = next(chain(base.parameters(), base.buffers()))  # a layer in 4 bits has buffers only

    wrapped = LoRALinear(base, rank, alpha, model.lora.dropout)
    wrapped = wrapped.to(device=tensor.device).train(model.training)
    setattr(model.get_submodule(parent), child, wrapped)


def add_unused_adapter(model: OpenVLA, name: str, rank: int):
    """Make the A and B of a module that never runs, and so is only a tensor."""
    out_channels, *in_shape = model.unused[f"{name}.weight"].shape
    kernel_of_B = [1] * (len(in_shape) - 1)  # (out, r) of a matrix, (out, r, 1, 1) of a convolution
    model.unused[f"{name}.lora_A.weight"] = torch.randn(rank, *in_shape, device="cpu") / rank
    model.unused[f"{name}.lora_B.weight"] = torch.zeros(out_channels, rank, *kernel_of_B, device="cpu")


def random_adapters(model: OpenVLA, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the whole first values of each A and B: together they change nothing yet."""
    generator = torch.Generator().manual_seed(seed)
    for name, layer in lora_layers(model).items():
        shape = layer.lora_A.weight.shape
        yield f"{name}.lora_A.weight", torch.randn(shape, generator=generator) / model.lora.rank
        yield f"{name}.lora_B.weight", torch.zeros(layer.lora_B.weight.shape)


def lora_layers(model: OpenVLA) -> dict[str, LoRALinear]:
    """Return the layers with an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def lora_state(model: OpenVLA) -> dict[str, Tensor]:
    """Return every A and B by name, also those of modules that never run."""
    tensors = {**model.state_dict(), **model.unused}
    return {name: tensor for name, tensor in tensors.items() if ".lora_" in name}


@torch.no_grad()
def merge_lora(model: OpenVLA):
    """
    Add the adapters to the weights, in float32, rounded once. The base weights are kept, for `unmerge_lora`.
    Raises ValueError if a layer is merged already, or is quantized.
    """
    for name, layer in lora_layers(model).items():
        if layer.weight_before_merge is not None:
            raise ValueError(f"{name} is merged already")
        if not hasattr(layer.base_layer, "weight"):
            raise ValueError(f"{name} is quantized; merge onto the base checkpoint (convert_weights.py merge-lora)")

        weight = layer.base_layer.weight
        layer.weight_before_merge = weight.data
        update = lora_update(layer.lora_A.weight, layer.lora_B.weight, layer.scaling)
        weight.data = (weight.float() + update).to(weight.dtype)


def unmerge_lora(model: OpenVLA):
    """Undo `merge_lora`, bit for bit."""
    for layer in lora_layers(model).values():
        if layer.weight_before_merge is not None:
            layer.base_layer.weight.data = layer.weight_before_merge
            layer.weight_before_merge = None


# -----------------------------------------------------------------------------
# An adapter's files, as PEFT keeps them


def save_adapter(
    model: OpenVLA,
    folder: str | Path,
    base: str | Path,
    state: dict[str, Tensor] | None = None,
    has_record: bool = False,
):
    """
    Write adapter_model.safetensors and adapter_config.json, which PEFT loads.

    base: the folder of the base model, or its name on the hub. state: the adapters' weights by name, where the model
    does not hold them whole (sharded training); None: those of the model. has_record: other files belong to the
    adapter, and checkpoint.complete_export says when all of them are there.
    """
    folder = Path(folder)
    if state is None:
        state = lora_state(model)

    tensors = {PEFT_PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    metadata = {"format": "pt"}
    base_folder = find_cached_model(base)
    if base_folder:
        metadata["base"] = fingerprint(base_folder)  # our own entry, for `warn_other_base`; PEFT ignores it
    if has_record:
        metadata["record"] = EXPORT_RECORD
    with atomic_write(folder / ADAPTER_WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata)

    config = {
        "peft_type": "LORA",
        **describe_base(base),
        "r": model.lora.rank,
        "lora_alpha": model.lora.alpha,
        "lora_dropout": model.lora.dropout,
        "target_modules": target_modules(state, model.lora.targets),
        "bias": "none",
        "init_lora_weights": "gaussian",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    write_json(folder / ADAPTER_CONFIG, config)


def describe_base(base: str | Path) -> dict:
    """Return what adapter_config.json says of the base, in PEFT's keys: its folder, or its name and revision."""
    if not is_hub_name(base):
        return {"base_model_name_or_path": str(base)}
    repository = parse_hub_name(base)
    return {"base_model_name_or_path": repository.name, "revision": repository.revision}


def target_modules(adapter_names: Iterable[str], targets: tuple[str, ...]) -> list[str] | str:
    """
    Return what adapter_config.json says of the adapted modules: a list of their last names, which PEFT looks for
    everywhere, or a pattern for the whole name where only some parts are adapted.
    """
    last_names = sorted({name.split(".")[-3] for name in adapter_names})  # "... .q_proj.lora_A.weight" -> "q_proj"
    if set(targets) == PARTS.keys():
        return last_names
    parts = "|".join(PARTS[target] for target in targets)
    return rf"({parts})\.(.*\.)?({'|'.join(last_names)})"


def read_adapter(folder: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """
    Return the config, and the adapters' weights by our names. Raises ValueError or FileNotFoundError, naming the file,
    for what is not plain LoRA.
    """
    folder = Path(folder)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise FileNotFoundError(
            f"{folder / ADAPTER_CONFIG}: missing; an adapter is {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}"
        )
    config = read_adapter_config(folder)
    names = adapter_names(folder)
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    adapters = {name: tensors[peft_name] for name, peft_name in names.items() if ".lora_" in name}
    return config, adapters


def load_adapter(model: OpenVLA, folder: str | Path, base: Path | None = None) -> OpenVLA:
    """
    Put a PEFT adapter onto its base model, in place, in float32. Returns the model. Raises ValueError if a tensor does
    not fit, or if the file holds base weights that are not this model's. base: the folder of that model, as
    `open_checkpoint` has found it; None: as `base_of` finds it.
    """
    folder = Path(folder)
    config, adapters = read_adapter(folder)
    warn_other_base(folder, base)
    tensors = {**model.state_dict(), **model.unused}
    check_adapter_fits(folder, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    check_stored_base(folder, tensors.get)

    # Wrap the layers.
    modules = adapted_layers(adapters)
    targets = []
    for target, part in PARTS.items():
        has_adapter = any(name.startswith(f"{part}.") for name in modules)
        if has_adapter:
            targets.append(target)
    model.lora = LoRAConfig(config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0), tuple(targets))
    wrap_modules(model, {name: rank_and_alpha(config, name) for name in modules})

    # Fill in the weights.
    for name, tensor in adapters.items():
        if name in model.unused:
            model.unused[name] = tensor.float()
        else:
            model.get_parameter(name).data.copy_(tensor)
    return model


def warn_other_base(adapter: str | Path, base: Path | None):
    """
    Warn if the base weights are not the ones that this adapter was trained on. An adapter of PEFT does not say.
    base: None: as `base_of` finds it.
    """
    with safe_open(Path(adapter) / ADAPTER_WEIGHTS, framework="pt") as file:
        metadata = file.metadata() or {}
    if "base" not in metadata:
        return
    base = base or base_of(adapter)
    if base and fingerprint(base) != metadata["base"]:
        warnings.warn(f"{adapter} was trained on other weights than {base} holds now", stacklevel=2)


# -----------------------------------------------------------------------------
# Merge folders


def merge(run: str | Path, out: str | Path, base_checkpoint: str = "", progress: Callable = no_progress):
    """
    Merge a run (an adapter) with its base checkpoint into a folder as any other: tensor by tensor, in float32, rounded
    once to the base's dtype. base_checkpoint: as `open_checkpoint` takes it. Raises ValueError or OSError before long
    work. `out` appears when it is whole.
    """
    run = find_model(run)
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} exists; choose another folder, or remove it")
    checkpoint = open_checkpoint(run, base_checkpoint)  # checks all that loading checks, also of the base
    if not checkpoint.adapter:
        raise ValueError(f"{run}: nothing to merge, it has no {ADAPTER_CONFIG}; give the folder of a LoRA run")
    config, adapters = read_adapter(checkpoint.adapter)
    warn_other_base(checkpoint.adapter, checkpoint.base)
    checkpoint.check_copied_files()
    weight_files = sorted(set(checkpoint.weight_map.values()))
    check_room(out, weight_files)

    unfinished = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for file in progress(weight_files, "merging", "files"):
        with atomic_write(unfinished / file.name) as temporary:
            merge_weight_file(file, temporary, adapters, config)
    copy_other_files(checkpoint.base, run, unfinished, skip={file.name for file in weight_files})
    if checkpoint.fast:
        checkpoint.fast.save_pretrained(unfinished / FAST_FOLDER)

    hf = read_json(checkpoint.base / "config.json")
    about = record_action_tokens(hf, checkpoint.fast)
    write_json(unfinished / "config.json", {**about, "norm_stats": checkpoint.norm_stats})
    unfinished.rename(out)


def check_room(out: Path, weight_files: list[Path]):
    """Raise OSError if the disk of `out` has no room for a copy of the weight files."""
    out.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(file.stat().st_size for file in weight_files)
    free = shutil.disk_usage(out.absolute().parent).free
    if free < needed:
        raise OSError(f"{out}: {needed / 1e9:.1f} GB needed, the disk has {free / 1e9:.1f}")


def merge_weight_file(source: Path, target: Path, adapters: dict[str, Tensor], config: dict):
    """
    Copy a weight file, then overwrite each adapted tensor in the copy: only one at a time is in memory. config: of
    `read_adapter`.
    """
    shutil.copyfile(source, target)
    data_start, layout = read_layout(source)
    with open(target, "rb+") as file:
        for name, entry in layout.items():
            module = name.removesuffix(".weight")
            if f"{module}.lora_A.weight" not in adapters:
                continue

            A = adapters[f"{module}.lora_A.weight"]
            B = adapters[f"{module}.lora_B.weight"]
            with safe_open(source, framework="pt") as base:
                weight = base.get_tensor(name)
            rank, alpha = rank_and_alpha(config, module)
            merged = lora_update(A, B, alpha / rank).add_(weight).to(weight.dtype)
            file.seek(data_start + entry["data_offsets"][0])
            file.write(merged.flatten().view(torch.uint8).numpy())


def copy_other_files(base: Path, run: Path, out: Path, skip: set[str]):
    """Copy tokenizer, preprocessing, statistics, index and OFT components: the run's where it has its own."""
    skip = {ADAPTER_CONFIG, ADAPTER_WEIGHTS, EXPORT_RECORD, "config.json", "metrics.jsonl", *skip}
    for folder in (base, run):  # the run comes last, so its files replace those of the base
        for path in folder.iterdir():
            is_curve = path.suffix == ".png"
            is_hidden = path.name.startswith(".")
            if path.is_file() and path.name not in skip and not is_curve and not is_hidden:
                shutil.copyfile(path, out / path.name)
