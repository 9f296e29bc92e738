"""
NF4: a weight in 4 bits, for QLoRA. Each block of 64 numbers is divided by its largest and each quotient replaced by the
nearest of 16 levels, quantiles of a normal distribution. The blocks' sizes are kept in 8 bits ("double quantisation").

QLoRA https://arxiv.org/abs/2305.14314, section 3; levels as in its appendix E. 0.516 bytes a weight.
"""

from functools import lru_cache

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

BLOCK, GROUP = 64, 256  # numbers that share a size; sizes that share a scale
LEVELS = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def blocks(x: Tensor, size: int) -> Tensor:
    """All numbers in order, as (n, size); zeros fill the last row."""
    x = x.flatten()
    return F.pad(x, (0, -len(x) % size)).view(-1, size)


def quantize(weight: Tensor) -> dict[str, Tensor]:
    """Any shape -> weight_nf4 (n, 1) uint8, two to a byte; sizes (g, 256) int8, each scale[g] * sizes + offset."""
    rows = blocks(weight.float(), BLOCK)
    largest = rows.abs().amax(1)  # (rows,)
    middles = (LEVELS[1:] + LEVELS[:-1]).to(weight.device) / 2
    offset = largest.mean()
    sizes = blocks(largest - offset, GROUP)
    scale = sizes.abs().amax(1, keepdim=True) / 127
    sizes = (sizes / scale.clamp_min(1e-30)).round().to(torch.int8)
    kept = restore_sizes(sizes, scale, offset)[: len(rows), None]  # as it will be read
    codes = torch.bucketize(rows / kept.clamp_min(1e-30), middles).to(torch.uint8).view(-1, 2)
    return dict(weight_nf4=codes[:, :1] << 4 | codes[:, 1:], sizes=sizes, scale=scale, offset=offset)


def restore_sizes(sizes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    return (sizes * scale + offset).flatten().clamp_min(0)


@lru_cache
def levels_on(device: torch.device) -> Tensor:
    return LEVELS.to(device)


def dequantize(q: dict[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    codes = torch.cat([q["weight_nf4"] >> 4, q["weight_nf4"] & 15], dim=1).flatten().int()  # in their old order
    values = levels_on(codes.device)[codes].view(-1, BLOCK)
    values = values * restore_sizes(q["sizes"], q["scale"], q["offset"])[: len(values), None]
    return values.flatten()[: torch.Size(shape).numel()].view(shape).to(dtype)


class Multiply(torch.autograd.Function):
    """x W^T + b. W is restored again in the backward pass, not kept: it would be as large as before."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: "NF4Linear") -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.restored(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad @ ctx.layer.restored(grad.dtype), None


class NF4Linear(nn.Module):
    """A linear layer whose weight is frozen in 4 bits."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        for name, tensor in quantize(linear.weight.detach()).items():
            self.register_buffer(name, tensor, persistent=False)  # made again from the base checkpoint

    def restored(self, dtype: torch.dtype) -> Tensor:
        return dequantize(dict(self.named_buffers()), (self.out_features, self.in_features), dtype)

    def forward(self, x: Tensor) -> Tensor:
        return Multiply.apply(x, self)


def quantize_linears(model: nn.Module) -> nn.Module:
    """Every nn.Linear but lm_head, in place, one after the other. Freezes the model."""
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head":
                parent._modules[name] = NF4Linear(child)
    return model
