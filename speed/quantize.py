"""
Smaller weights for inference: the language model's linear layers in 8 or 4 bits, everything else as it is.

    python quantize.py --checkpoint openvla-7b --out openvla-7b-int4 --bits 4
    python sample.py --checkpoint openvla-7b-int4 ...

    int8   weight (out, in) int8, one scale per output:    w = weight * scale
    int4   two codes 0 ... 15 to a byte, a scale and a middle for each `group` inputs:  w = (code - 8) * scale + middle

Activations stay in 16 or 32 bits and PyTorch's kernels unpack the weights as they multiply: a pass over one token reads
a half or a quarter of the bytes (on CUDA, 8 bits are unpacked first). The towers and the projector stay as they are:
they see many patches at once, where the weights' bytes are not what costs.

Section 5.4 of https://arxiv.org/abs/2406.09246 has OpenVLA in 4 bits at 71.9 % success, in bfloat16 at 71.3 %.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from checkpoint import check_folder, is_oft
from configurator import configure, fail
from model import INDEX, OpenVLA, OpenVLAConfig, is_unused, weight_map, write_atomically, write_json

SHARD = 10**9  # bytes of a file, and of memory while writing
FEW = 32  # rows up to which unpacking while multiplying is faster than unpacking first


@dataclass
class Config:
    checkpoint: str = ""  # folder in Hugging Face layout
    out: str = ""  # new folder
    bits: int = 4  # 8 or 4
    group: int = 128  # of 4 bits: inputs that share a scale; 32, 64, 128 or 256


def quantize(weight: Tensor, bits: int, group: int) -> dict[str, Tensor]:
    """(out, in) floats -> the tensors of an Int8Linear or Int4Linear. Codes are chosen for the scales as stored."""
    w = weight.float()
    if bits == 8:
        scale = (w.abs().amax(1) / 127).clamp_min(1e-12).bfloat16()
        codes = (w / scale.float()[:, None]).round().clamp(-127, 127)
        return dict(weight=codes.to(torch.int8), scale=scale)
    w = w.view(len(w), -1, group)  # (out, in / group, group)
    low, high = w.amin(-1), w.amax(-1)
    scale = ((high - low) / 15).clamp_min(1e-12).bfloat16()
    middle = (low + 8 * scale.float()).bfloat16()
    codes = ((w - middle.float()[..., None]) / scale.float()[..., None] + 8).round().clamp(0, 15)
    codes = codes.to(torch.uint8).flatten(1)  # (out, in)
    return dict(weight=codes[:, ::2] << 4 | codes[:, 1::2], scale=torch.stack([scale, middle], dim=-1))


class Int8Linear(nn.Module):
    def __init__(self, linear: nn.Linear, group: int):
        super().__init__()
        self.register_buffer("weight", torch.empty(linear.weight.shape, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(linear.out_features))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) <= FEW and rows.shape[1] % 32 == 0 and not x.is_cuda:  # other widths it reads beyond the end of
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            y = F.linear(rows, self.weight.to(x.dtype) * self.scale[:, None])
        return y.view(*x.shape[:-1], -1)


class Int4Linear(nn.Module):
    def __init__(self, linear: nn.Linear, group: int):
        super().__init__()
        self.out_features, self.in_features, self.group = linear.out_features, linear.in_features, group
        self.register_buffer("weight", torch.empty(linear.out_features, linear.in_features // 2, dtype=torch.uint8))
        self.register_buffer("scale", torch.empty(linear.out_features, linear.in_features // group, 2))

    def pack(self):
        """From the layout of the file to that of the device's kernel."""
        if self.weight.is_cuda:
            tiles = next((t for t in (8, 4, 2) if self.in_features % (16 * t) == 0), 0)
            if not tiles or self.out_features % 8:
                raise ValueError(
                    f"4 bits on CUDA want inputs in steps of 32, outputs of 8; a layer has {self.weight.shape}"
                )
            self.weight = torch._convert_weight_to_int4pack(self.weight, tiles)
        else:
            codes = torch.stack([self.weight >> 4, self.weight & 15], dim=-1).flatten(1).int()
            self.weight = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
        self.scale = self.scale.transpose(0, 1).clone(memory_format=torch.contiguous_format)  # (in / group, out, 2)

    def forward(self, x: Tensor) -> Tensor:
        multiply = torch._weight_int4pack_mm if x.is_cuda else torch._weight_int4pack_mm_for_cpu
        y = multiply(x.reshape(-1, x.shape[-1]), self.weight, self.group, self.scale)
        return y.view(*x.shape[:-1], -1)


def targets(model: OpenVLA) -> list[str]:
    layers = model.language_model.model.layers
    return [f"language_model.model.layers.{k}" for k, m in layers.named_modules() if isinstance(m, nn.Linear)]


def prepare(model: OpenVLA) -> OpenVLA:
    """Swap the modules of an empty model for what its config.json says the folder holds."""
    if how := model.cfg.extra.get("quantization"):
        if how.get("bits") not in (4, 8) or "group" not in how:
            raise ValueError(f"config.json: quantization is {how}, this code knows bits 4 and 8, and their group")
        for name in targets(model):
            parent, _, child = name.rpartition(".")
            kind = {8: Int8Linear, 4: Int4Linear}[how["bits"]]
            with torch.device("meta"):
                setattr(model.get_submodule(parent), child, kind(model.get_submodule(name), how["group"]))
    return model


def load_quantized(folder, dtype=torch.bfloat16, device="cpu", progress=lambda names: names) -> OpenVLA:
    """A folder that `write` made -> the model. Raises ValueError where PyTorch has no kernel for it."""
    device, bits = torch.device(device), check_folder(folder).extra["quantization"]["bits"]
    if bits == 4 and (device.type not in ("cpu", "cuda") or (device.type == "cuda" and dtype != torch.bfloat16)):
        raise ValueError(f"{folder}: 4 bits run on a CPU, or on CUDA in bfloat16; not on {device.type} in {dtype}")
    model = OpenVLA.from_pretrained(folder, dtype, device, progress, prepare)
    for module in model.modules():
        if isinstance(module, Int4Linear):
            module.pack()
    return model


# -----------------------------------------------------------------------------
# Writing


def write(checkpoint: str | Path, out: str | Path, bits: int, group: int):
    """A folder in Hugging Face layout -> one with smaller weights, tensor by tensor. Raises ValueError or OSError."""
    checkpoint, out = Path(checkpoint), Path(out)
    config = check_before(checkpoint, out, bits, group)
    with torch.device("meta"):
        names = {f"{name}.weight" for name in targets(OpenVLA(config))}
    tmp = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    where, part = {}, {}
    sources = weight_map(checkpoint)

    def finish():
        file = f"model-{len(set(where.values())) + 1:05d}.safetensors"
        where.update(dict.fromkeys(part, file))
        write_atomically(tmp / file, lambda to: save_file(part, to, {"format": "pt"}))
        part.clear()

    for name, file in tqdm(sources.items(), "quantizing", unit=" tensors", leave=False):
        if is_unused(name, config):
            continue
        with safe_open(checkpoint / file, framework="pt") as f:
            tensor = f.get_tensor(name)
        if name in names:
            parts = quantize(tensor, bits, group)
            part |= {f"{name.removesuffix('weight')}{kind}": t.contiguous() for kind, t in parts.items()}
        else:
            part[name] = tensor.clone()
        if sum(t.nbytes for t in part.values()) > SHARD:
            finish()
    finish()
    write_json(tmp / INDEX, {"metadata": {}, "weight_map": where})
    for path in checkpoint.iterdir():
        if path.is_file() and path.suffix in (".json", ".model") and path.name not in (INDEX, "config.json"):
            shutil.copyfile(path, tmp / path.name)
    hf = json.loads((checkpoint / "config.json").read_text("utf-8"))
    write_json(tmp / "config.json", hf | {"quantization": dict(bits=bits, group=group)})
    tmp.rename(out)


def check_before(checkpoint: Path, out: Path, bits: int, group: int) -> OpenVLAConfig:
    if (checkpoint / "adapter_config.json").is_file():
        raise ValueError(f"{checkpoint} is a LoRA run; make it one folder first: finetune_lora.py --merge {checkpoint}")
    if is_oft(checkpoint):
        raise ValueError(f"{checkpoint} is an OFT policy; only token models are quantized")
    config = check_folder(checkpoint)
    text = config.text
    if bits not in (4, 8) or group not in (32, 64, 128, 256):
        raise ValueError(f"--bits {bits} --group {group}: bits must be 8 or 4, group 32, 64, 128 or 256")
    if config.extra.get("quantization"):
        raise ValueError(f"{checkpoint} is quantized already: {config.extra['quantization']}")
    if bits == 4 and (wrong := [n for n in (text.hidden_size, text.intermediate_size) if n % group]):
        raise ValueError(
            f"--group {group} does not divide the layers' {wrong[0]} inputs; choose a smaller one, or 8 bits"
        )
    if out.exists():
        raise ValueError(f"{out} exists; choose another --out, or remove it")
    return config


def main(cfg: Config):
    if not cfg.checkpoint or not cfg.out:
        fail("give --checkpoint FOLDER and --out NEW_FOLDER")
    try:
        write(cfg.checkpoint, cfg.out, cfg.bits, cfg.group)
    except (ValueError, OSError) as error:
        fail(error)
    sizes = [sum(f.stat().st_size for f in Path(p).glob("*.safetensors")) / 1e9 for p in (cfg.checkpoint, cfg.out)]
    print(f"{cfg.out}: {sizes[1]:.2f} GB, {cfg.checkpoint} has {sizes[0]:.2f}")


if __name__ == "__main__":
    main(configure(Config))
