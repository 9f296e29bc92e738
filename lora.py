"""
LoRA: W x becomes W x + B A x * alpha / rank, and only the small A and B train.

    add_lora(model, rank=32)             wrap, base weights frozen        merge_lora(model)     fold B A into W
    save_adapter(model, folder)          PEFT's adapter_*.json/.safetensors      unmerge_lora(model)   exactly as before
    load_adapter(model, folder)          a PEFT adapter onto the base model      merge(run, out)       folder to folder

LoRA https://arxiv.org/abs/2106.09685; the modules are those that PEFT 0.11 finds for target_modules="all-linear" in the
official code (vla-scripts/finetune.py). It also adapts what never runs (last ViT block, attention pool): those A and B
live in `model.unused`, so that files and counts agree. File format: github.com/huggingface/peft, 0.11.1.
Axes: r rank.
"""

import json
import re
import shutil
import warnings
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from checkpoint import ADAPTER_CONFIG as CONFIG
from checkpoint import ADAPTER_WEIGHTS as WEIGHTS
from checkpoint import base_of, check_folder, fingerprint, read_layout, weight_files
from model import OpenVLA, write_atomically, write_json

PARTS = dict(vision="vision_backbone", projector="projector", language="language_model")
PREFIX = "base_model.model."


class LoRALinear(nn.Module):
    """A linear layer, or the patch convolution, with its low-rank bypass. B starts at zero: nothing changes yet."""

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        self.base_layer, self.scaling, self.dropout = base, alpha / rank, nn.Dropout(dropout)
        self.unmerged: Tensor | None = None  # the base weight, while another with B A in it stands in its place
        if isinstance(base, nn.Conv2d):
            self.lora_A = nn.Conv2d(base.in_channels, rank, base.kernel_size, base.stride, bias=False)
            self.lora_B = nn.Conv2d(rank, base.out_channels, 1, bias=False)
        else:
            self.lora_A = nn.Linear(base.in_features, rank, bias=False)
            self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.normal_(self.lora_A.weight, std=1 / rank)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        if self.unmerged is not None:
            return y
        bypass = self.lora_B(self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype))))
        return (y + bypass * self.scaling).to(y.dtype)


def delta(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """What is added to the weight, in float32: A (r, in) and B (out, r), or A (r, in, k, k) and B (out, r, 1, 1)."""
    return (B.float().flatten(1) @ A.float().flatten(1)).view(len(B), *A.shape[1:]) * scaling


def adapted_modules(model: OpenVLA, targets: Iterable[str] = PARTS) -> list[str]:
    """
    Names of the modules that get an adapter: all with a matrix or a kernel as weight, embeddings excepted. Raises
    ValueError for a target that is none of vision, projector, language.
    """
    targets = list(targets)
    if unknown := set(targets) - set(PARTS):
        raise ValueError(f"lora_targets {sorted(unknown)}: must be some of {', '.join(PARTS)}")
    parts = tuple(PARTS[t] + "." for t in targets)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers()) | model.unused
    weights = {name.removesuffix("_nf4"): w for name, w in tensors.items() if w.dim() in (2, 4)}
    return [name.removesuffix(".weight") for name in weights
            if name.endswith(".weight") and name.startswith(parts) and "embed_tokens" not in name]  # fmt: skip


def add_lora(model: OpenVLA, rank: int = 32, alpha: float = 0.0, dropout: float = 0.0, targets=tuple(PARTS)) -> OpenVLA:
    """
    Freeze the model and put an adapter (float32) around every module of `targets`: vision, projector, language.
    alpha 0: min(rank, 16), as the official recipe. In place; returns the model.
    """
    alpha = alpha or min(rank, 16)
    wrap(model, adapted_modules(model, targets), rank, alpha, dropout)
    model.lora = dict(r=rank, lora_alpha=alpha, lora_dropout=dropout, targets=tuple(targets))
    return model


def wrap(model: OpenVLA, names: list[str], rank: int, alpha: float, dropout: float):
    model.requires_grad_(False)
    for name in names:
        weight = model.unused.get(f"{name}.weight")
        if weight is not None:  # never runs: no module to wrap
            model.unused[f"{name}.lora_A.weight"] = torch.randn(rank, *weight.shape[1:]) / rank
            model.unused[f"{name}.lora_B.weight"] = torch.zeros(len(weight), rank, *[1] * (weight.dim() - 2))
            continue
        *path, last = name.split(".")
        parent, base = model.get_submodule(".".join(path)), model.get_submodule(name)
        device = next(chain(base.parameters(), base.buffers())).device
        wrapped = LoRALinear(base, rank, alpha, dropout).to(device=device).train(model.training)
        if isinstance(parent, nn.ModuleDict):
            parent[last] = wrapped
        else:
            setattr(parent, last, wrapped)


def lora_layers(model: OpenVLA) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def lora_state(model: OpenVLA) -> dict[str, Tensor]:
    """Every A and B by name, also those of modules that never run."""
    return {name: w for name, w in (model.state_dict() | model.unused).items() if ".lora_" in name}


@torch.no_grad()
def merge_lora(model: OpenVLA):
    """Fold the adapters into the weights: float32, rounded once. Keeps the base weights, for `unmerge_lora`."""
    for name, layer in lora_layers(model).items():
        if layer.unmerged is not None:
            raise ValueError(f"{name} is merged already")
        if not hasattr(layer.base_layer, "weight"):
            raise ValueError(f"{name} is quantised; merge onto the base checkpoint (finetune_lora.py --merge)")
        base = layer.base_layer.weight
        layer.unmerged = base.data
        base.data = (base.float() + delta(layer.lora_A.weight, layer.lora_B.weight, layer.scaling)).to(base.dtype)


def unmerge_lora(model: OpenVLA):
    """Undo `merge_lora`, bit for bit."""
    for layer in lora_layers(model).values():
        if layer.unmerged is not None:
            layer.base_layer.weight.data, layer.unmerged = layer.unmerged, None


# -----------------------------------------------------------------------------
# Files, as PEFT keeps them


def save_adapter(model: OpenVLA, folder: str | Path, base: str, state: dict[str, Tensor] | None = None):
    """
    Write adapter_model.safetensors and adapter_config.json, which PEFT loads. base: the folder or name of the base
    model. state: the adapters' weights, if the model does not hold them whole (sharded training).
    """
    state, lora = state or lora_state(model), model.lora
    names = sorted({name.rsplit(".", 3)[-3] for name in state})
    if set(lora["targets"]) != set(PARTS):  # PEFT takes a pattern too; a list would match in every part
        parts = "|".join(PARTS[t] for t in lora["targets"])
        names = rf"({parts})\.(.*\.)?({'|'.join(names)})"
    config = dict(peft_type="LORA", base_model_name_or_path=str(base), r=lora["r"], lora_alpha=lora["lora_alpha"])
    config |= dict(lora_dropout=lora["lora_dropout"], target_modules=names, bias="none", init_lora_weights="gaussian")
    config |= dict(fan_in_fan_out=False, inference_mode=True, task_type=None, use_dora=False, use_rslora=False)
    tensors = {PREFIX + name: w.detach().cpu().contiguous() for name, w in state.items()}
    about = {"format": "pt"} | ({"base": fingerprint(base)} if Path(base).is_dir() else {})  # PEFT reads on over it
    write_atomically(Path(folder) / WEIGHTS, lambda tmp: save_file(tensors, tmp, about))
    write_json(Path(folder) / CONFIG, config | dict(modules_to_save=None, rank_pattern={}, alpha_pattern={}))


def read_adapter(folder: str | Path) -> tuple[dict, dict[str, Tensor], dict[str, Tensor]]:
    """
    The config, the adapters' weights by name, and base weights that PEFT stored beside them. Raises ValueError or
    FileNotFoundError, naming the file, for what is not plain LoRA.
    """
    folder = Path(folder)
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file}: missing; an adapter is {CONFIG} and {WEIGHTS}")
    config = json.loads((folder / CONFIG).read_text("utf-8"))
    plain = dict(peft_type="LORA", bias="none", use_dora=False, use_rslora=False, modules_to_save=None)
    plain |= dict(fan_in_fan_out=False, alpha_pattern={}, rank_pattern={})
    for key, value in plain.items():
        if (found := config.get(key, value)) != value and (found or value):
            raise ValueError(f"{folder / CONFIG}: {key} is {found!r}; only plain LoRA is read here, {value!r}")
    adapters, stored = {}, {}
    for name, w in load_file(folder / WEIGHTS).items():
        short = name.removeprefix(PREFIX)
        if not name.startswith(PREFIX) or not re.search(r"\.(lora_[AB]|base_layer)\.weight$", name):
            raise ValueError(f"{folder / WEIGHTS}: {name} is no tensor of a LoRA adapter of PEFT")
        (adapters if ".lora_" in short else stored)[short] = w
    return config, adapters, stored


def warn_other_base(run: str | Path):
    """An adapter belongs to the weights that it was trained on; others in their place change what it does."""
    with safe_open(Path(run) / WEIGHTS, framework="pt") as file:
        trained_on = (file.metadata() or {}).get("base")
    if trained_on and (base := base_of(run)) and fingerprint(base) != trained_on:
        warnings.warn(f"{run} was trained on other weights than {base} holds now", stacklevel=2)


def load_adapter(model: OpenVLA, folder: str | Path) -> OpenVLA:
    """
    Put a PEFT adapter onto its base model, in place, in float32. Raises ValueError if a tensor does not fit, or if the
    file holds base weights that are not this model's.
    """
    config, adapters, stored = read_adapter(folder)
    warn_other_base(folder)
    file, rank = Path(folder) / WEIGHTS, config["r"]
    base = model.state_dict() | model.unused
    modules = sorted({name.rsplit(".", 2)[0] for name in adapters})
    for name in modules:
        if f"{name}.weight" not in base:
            raise ValueError(f"{file}: adapter for {name}, which the base model does not have")
        weight = base[f"{name}.weight"]
        kernel = [1] * (weight.dim() - 2)
        shapes = dict(lora_A=(rank, *weight.shape[1:]), lora_B=(len(weight), rank, *kernel))
        for key, shape in shapes.items():
            found = adapters.get(f"{name}.{key}.weight")
            if found is None or tuple(found.shape) != shape:
                what = "missing" if found is None else f"{tuple(found.shape)}"
                raise ValueError(f"{file}: {name}.{key} is {what}, the base model makes it {shape}")
    for name, w in stored.items():
        mine = base[name.replace(".base_layer", "")]
        if not torch.equal(mine.cpu(), w.to(mine.dtype)):
            raise ValueError(f"{file}: {name} differs from the base model's: the adapter was trained on another one")
    alpha, dropout = config["lora_alpha"], config.get("lora_dropout", 0.0)
    wrap(model, modules, rank, alpha, dropout)
    model.lora = dict(r=rank, lora_alpha=alpha, lora_dropout=dropout)
    model.lora["targets"] = tuple(t for t, part in PARTS.items() if any(m.startswith(part + ".") for m in modules))
    for name, w in adapters.items():
        if name in model.unused:
            model.unused[name] = w.float()
        else:
            model.get_submodule(name.removesuffix(".weight")).weight.data.copy_(w)
    return model


def merge_file(file: Path, to: Path, adapters: dict[str, Tensor], scaling: float):
    """Copy a weight file, then put each adapted tensor in its place: one at a time in memory."""
    shutil.copyfile(file, to)
    start, layout = read_layout(file)
    with open(to, "rb+") as f:
        for name, entry in layout.items():
            module = name.removesuffix(".weight")
            if (A := adapters.get(f"{module}.lora_A.weight")) is None:
                continue
            with safe_open(file, framework="pt") as base:
                weight = base.get_tensor(name)
            merged = delta(A, adapters[f"{module}.lora_B.weight"], scaling).add_(weight).to(weight.dtype)
            f.seek(start + entry["data_offsets"][0])
            f.write(merged.flatten().view(torch.uint8).numpy())


def merge(run: str | Path, out: str | Path):
    """
    A run (adapter) and its base checkpoint -> a folder as any other, tensor by tensor: float32, rounded once to the
    base's dtype. Raises ValueError or OSError before long work; `out` appears when it is whole.
    """
    run, out = Path(run), Path(out)
    if out.exists():
        raise ValueError(f"{out} exists; choose another --out, or remove it")
    check_folder(run)  # and the base with it
    base = base_of(run)
    config, adapters, _ = read_adapter(run)
    warn_other_base(run)
    files = weight_files(base)
    out.parent.mkdir(parents=True, exist_ok=True)
    need, free = sum(f.stat().st_size for f in files), shutil.disk_usage(out.absolute().parent).free
    if free < need:
        raise OSError(f"{out}: {need / 1e9:.1f} GB needed, the disk has {free / 1e9:.1f}")
    scaling, tmp = config["lora_alpha"] / config["r"], out.with_name(f".{out.name}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    for file in tqdm(files, "merging", unit="file"):
        write_atomically(tmp / file.name, lambda to, file=file: merge_file(file, to, adapters, scaling))
    skip = {CONFIG, WEIGHTS, "config.json", "metrics.jsonl", *(f.name for f in files)}
    for source in (base, run):  # tokenizer, preprocessing, statistics, index: the run's where it has its own
        for path in source.iterdir():
            if path.is_file() and path.name not in skip and path.suffix != ".png" and path.name[0] != ".":
                shutil.copyfile(path, tmp / path.name)
    hf = json.loads((base / "config.json").read_text("utf-8"))
    write_json(tmp / "config.json", hf | {"norm_stats": check_folder(run).extra["norm_stats"]})
    tmp.rename(out)
