"""
NF4: a frozen weight in 4 bits, for fine-tuning with adapters on top of it (QLoRA).

    quantize_linears(model)     # every nn.Linear but lm_head becomes an NF4Linear

    weight --> blocks of 64 numbers --> largest size in each block --> numbers / size --> nearest of 16 levels

The levels are quantiles of a normal distribution, which the weights of a network resemble. The blocks' sizes are
quantized too ("double quantization"), to 8 bits, with one scale for 256 of them: 0.516 bytes for each weight.

QLoRA https://arxiv.org/abs/2305.14314, section 3; the levels are those of its appendix E.

Axes: R blocks of the weight ("rows"), G groups of 256 sizes.
"""

from functools import lru_cache

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # numbers that share a size
GROUP = 256  # sizes that share a scale
TINY = 1e-30  # in place of a divisor that is zero
LEVELS = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)


# -----------------------------------------------------------------------------
# Numbers -> codes, and back


def quantize(weight: Tensor) -> dict[str, Tensor]:
    """
    Return for a weight of any shape and float dtype, by name:
    weight_nf4 (R * 32, 1) uint8, two codes to a byte; sizes (G, 256) int8; scale (G, 1) and offset (), float32.
    """
    rows = blocks(weight.float(), BLOCK)  # (R, 64)

    # The sizes, in 8 bits. Their mean is subtracted first, because all of them are positive.
    largest = rows.abs().amax(dim=1)  # (R,)
    offset = largest.mean()
    centered = blocks(largest - offset, GROUP)  # (G, 256)
    scale = centered.abs().amax(dim=1, keepdim=True) / 127  # (G, 1)
    sizes = (centered / scale.clamp_min(TINY)).round().to(torch.int8)

    # The codes, chosen for the sizes as `dequantize` will read them.
    row_sizes = restore_sizes(sizes, scale, offset)[: len(rows), None]  # (R, 1)
    between_levels = (LEVELS[1:] + LEVELS[:-1]).to(weight.device) / 2
    codes = torch.bucketize(rows / row_sizes.clamp_min(TINY), between_levels)
    codes = codes.to(torch.uint8).view(-1, 2)
    packed = codes[:, :1] << 4 | codes[:, 1:]
    return {"weight_nf4": packed, "sizes": sizes, "scale": scale, "offset": offset}


def dequantize(quantized: dict[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return the weight that `quantize` made these tensors from, up to rounding, in its shape."""
    packed = quantized["weight_nf4"]
    codes = torch.cat([packed >> 4, packed & 15], dim=1).flatten().int()  # in their old order
    rows = levels_on(codes.device)[codes].view(-1, BLOCK)  # (R, 64)

    sizes = restore_sizes(quantized["sizes"], quantized["scale"], quantized["offset"])
    numbers = (rows * sizes[: len(rows), None]).flatten()
    without_padding = numbers[: torch.Size(shape).numel()]
    return without_padding.view(shape).to(dtype)


def blocks(x: Tensor, size: int) -> Tensor:
    """Return all numbers of x in their order, as (n, size); zeros fill the last row."""
    x = x.flatten()
    padding = -len(x) % size
    return F.pad(x, (0, padding)).view(-1, size)


def restore_sizes(sizes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Return the size of each block, and of the padding behind them: (G * 256,) float32."""
    return (sizes * scale + offset).flatten().clamp_min(0)


@lru_cache
def levels_on(device: torch.device) -> Tensor:
    """Return the 16 levels on a device, copied there once."""
    return LEVELS.to(device)


# -----------------------------------------------------------------------------
# Layers


class Multiply(torch.autograd.Function):
    """
    x W^T + b. The backward pass restores W once more: kept from the forward pass, it would take as much memory as if
    it had never been quantized.
    """

    @staticmethod
    def forward(ctx, x: Tensor, layer: "NF4Linear") -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, layer.restored(x.dtype), bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_x = grad @ ctx.layer.restored(grad.dtype)
        return grad_x, None


class NF4Linear(nn.Module):
    """A linear layer whose weight is frozen in 4 bits."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        for name, tensor in quantize(linear.weight.detach()).items():
            # Not in the state_dict: they are made again from the base checkpoint.
            self.register_buffer(name, tensor, persistent=False)

    def fill(self, weight: Tensor):
        """Quantize a weight, and put it in the place of this layer's."""
        for name, tensor in quantize(weight.to(self.weight_nf4.device)).items():
            setattr(self, name, tensor)

    def restored(self, dtype: torch.dtype) -> Tensor:
        """Return the weight (out_features, in_features)."""
        quantized = dict(self.named_buffers())
        return dequantize(quantized, (self.out_features, self.in_features), dtype)

    def forward(self, x: Tensor) -> Tensor:
        return Multiply.apply(x, self)


def quantize_linears(model: nn.Module) -> nn.Module:
    """Freeze a model, and replace every nn.Linear but lm_head in place, one after the other. Returns the model."""
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head":
                setattr(parent, name, NF4Linear(child))
    return model
