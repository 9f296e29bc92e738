"""
Smaller weights for inference: the language model's linear layers in 8 or 4 bits, everything else as it is.

    python convert_weights.py quantize openvla-7b openvla-7b-int4 --bits 4
    python sample.py --checkpoint openvla-7b-int4 ...

    8 bits   codes -127 ... 127, a scale for each output                    w = code * scale
    4 bits   codes 0 ... 15, two to a byte, a scale and a middle
             for each group of inputs                                       w = (code - 8) * scale + middle

Activations stay in 16 or 32 bits, and PyTorch's kernels unpack the weights as they multiply. So a pass over one token
reads a half or a quarter of the bytes. (On CUDA, weights in 8 bits are unpacked first.) The vision encoders and the
projector stay as they are: they see many patches at once, and then reading the weights is not what takes the time.

Section 5.4 of https://arxiv.org/abs/2406.09246: OpenVLA has 71.9 % success in 4 bits, and 71.3 % in bfloat16.

Axes: O outputs and I inputs of a layer, G groups of inputs.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import OpenVLA
from progress import no_progress

MAX_ROWS_FUSED = 32  # up to so many rows, unpacking while multiplying is faster than unpacking first
MIN_SCALE = 1e-12  # of weights that are all equal: nothing is divided by zero


# -----------------------------------------------------------------------------
# Weights -> codes


def quantize(weight: Tensor, bits: int, group: int) -> dict[str, Tensor]:
    """
    Return the tensors of an Int8Linear or an Int4Linear, by name, for a weight (O, I) of any float dtype. Scales are
    rounded to bfloat16 before the codes are chosen, so that the codes fit the scales as they are stored.
    """
    if bits == 8:
        return quantize_8_bits(weight.float())
    return quantize_4_bits(weight.float(), group)


def quantize_8_bits(weight: Tensor) -> dict[str, Tensor]:
    """Return codes (O, I) int8 and scales (O,) bfloat16."""
    largest = weight.abs().amax(dim=1)  # (O,)
    scale = (largest / 127).clamp_min(MIN_SCALE).bfloat16()
    codes = (weight / scale.float()[:, None]).round().clamp(-127, 127)
    return {"weight": codes.to(torch.int8), "scale": scale}


def quantize_4_bits(weight: Tensor, group: int) -> dict[str, Tensor]:
    """Return codes (O, I / 2) uint8, two to a byte, and (O, G, 2) bfloat16: scale and middle of each group."""
    groups = weight.view(len(weight), -1, group)  # (O, G, group)
    low = groups.amin(dim=-1)  # (O, G)
    high = groups.amax(dim=-1)
    scale = ((high - low) / 15).clamp_min(MIN_SCALE).bfloat16()
    middle = (low + 8 * scale.float()).bfloat16()

    codes = (groups - middle.float()[..., None]) / scale.float()[..., None] + 8
    codes = codes.round().clamp(0, 15).to(torch.uint8).flatten(1)  # (O, I)
    even = codes[:, ::2]
    odd = codes[:, 1::2]
    return {"weight": even << 4 | odd, "scale": torch.stack([scale, middle], dim=-1)}


# -----------------------------------------------------------------------------
# Layers


class Int8Linear(nn.Module):
    """A linear layer without bias whose weight is in 8 bits. It takes the place of `linear`, not its values."""

    def __init__(self, linear: nn.Linear, group: int):
        super().__init__()
        self.register_buffer("weight", torch.empty(linear.weight.shape, dtype=torch.int8))  # (O, I)
        self.register_buffer("scale", torch.empty(linear.out_features))  # (O,)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (..., I) -> (rows, I)
        is_few = len(rows) <= MAX_ROWS_FUSED
        fits_kernel = rows.shape[1] % 32 == 0  # for other widths the kernel reads past the end of the buffer
        if is_few and fits_kernel and not x.is_cuda:
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            y = F.linear(rows, self.weight.to(x.dtype) * self.scale[:, None])
        return y.view(*x.shape[:-1], -1)


class Int4Linear(nn.Module):
    """A linear layer without bias whose weight is in 4 bits. It takes the place of `linear`, not its values."""

    def __init__(self, linear: nn.Linear, group: int):
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.group = group
        weight = torch.empty(linear.out_features, linear.in_features // 2, dtype=torch.uint8)
        self.register_buffer("weight", weight)  # (O, I / 2)
        self.register_buffer("scale", torch.empty(linear.out_features, linear.in_features // group, 2))  # (O, G, 2)

    def pack(self):
        """Change the weight from the file's layout to that of the device's kernel. To be called once, after loading."""
        if self.weight.is_cuda:
            self.weight = torch._convert_weight_to_int4pack(self.weight, self.kernel_tiles())
        else:
            codes = torch.stack([self.weight >> 4, self.weight & 15], dim=-1).flatten(1)  # (O, I)
            self.weight = torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        self.scale = self.scale.transpose(0, 1).clone(memory_format=torch.contiguous_format)  # (G, O, 2)

    def kernel_tiles(self) -> int:
        """Return how many tiles of 16 inputs CUDA's kernel takes at once. Raises ValueError if the layer has no fit."""
        if self.out_features % 8 == 0:
            for tiles in (8, 4, 2):
                if self.in_features % (16 * tiles) == 0:
                    return tiles
        raise ValueError(
            f"4 bits on CUDA need inputs in steps of 32 and outputs in steps of 8; a layer has {self.in_features} "
            f"inputs and {self.out_features} outputs. Use 8 bits, or the CPU"
        )

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (..., I) -> (rows, I)
        if x.is_cuda:
            y = torch._weight_int4pack_mm(rows, self.weight, self.group, self.scale)
        else:
            y = torch._weight_int4pack_mm_for_cpu(rows, self.weight, self.group, self.scale)
        return y.view(*x.shape[:-1], -1)


# -----------------------------------------------------------------------------
# Models


def layers_to_quantize(model: OpenVLA) -> list[str]:
    """Return the names of the layers that are quantized: every linear layer in a block of the language model."""
    names = []
    for name, module in model.language_model.model.layers.named_modules():
        if isinstance(module, nn.Linear):
            names.append(f"language_model.model.layers.{name}")
    return names


def use_quantized_layers(model: OpenVLA, quantization: dict):
    """
    Replace the linear layers of a model on the meta device by the ones that a quantized folder holds. quantization:
    {"bits", "group"}, as in config.json. Raises ValueError for other bits.
    """
    bits = quantization.get("bits")
    if bits not in (4, 8) or "group" not in quantization:
        raise ValueError(f"config.json: quantization is {quantization}, this code knows bits 4 and 8, and their group")

    layer_class = Int8Linear if bits == 8 else Int4Linear
    for name in layers_to_quantize(model):
        with torch.device("meta"):
            quantized = layer_class(model.get_submodule(name), quantization["group"])
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, quantized)


def load_quantized(
    model: OpenVLA,
    files: dict[str, Path],
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    progress: Callable = no_progress,
) -> OpenVLA:
    """
    Load the weights of a quantized folder into its model. Raises ValueError where PyTorch has no kernel for them.
    model: on the meta device, after `use_quantized_layers`. files: tensor name -> file. dtype: of all other weights.
    """
    device = torch.device(device)
    if model.cfg.extra["quantization"]["bits"] == 4:
        check_4_bits_run_on(device, dtype)

    # copy: the kernels crash on the memory of a mapped file, which may start at any byte.
    model.load_weights(files, dtype, device, progress, copy=True)
    for module in model.modules():
        if isinstance(module, Int4Linear):
            module.pack()
    return model


def check_4_bits_run_on(device: torch.device, dtype: torch.dtype):
    """Raise ValueError if PyTorch has no kernel for 4 bits on this device, for activations of this dtype."""
    if device.type == "cpu":
        return
    if device.type == "cuda" and dtype == torch.bfloat16:
        return
    raise ValueError(f"4 bits run on a CPU, or on CUDA in bfloat16; not on {device.type} in {dtype}")
