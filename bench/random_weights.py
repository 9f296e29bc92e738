"""
Random weights that are made where they are used, so that a benchmark of 7 billion of them reads no file of 15 GB.

A tensor's numbers depend on its name, shape, dtype and device alone. So a model and the official classes, which name
their tensors alike, get the same weights in two processes. The official environment imports this file, too: it needs
PyTorch and nothing of this project.
"""

import zlib

import torch
from torch import nn

TABLE_SPREAD = 0.2  # of embeddings and positions, which are looked up or added, as in OpenVLA.init_weights


@torch.no_grad()
def fill_random(model: nn.Module) -> nn.Module:
    """
    Draw all weights of a model in place, on its device, with the spreads of OpenVLA.init_weights. Returns the model.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
            continue
        if parameter.dim() == 1:  # norms and layer scales
            parameter.fill_(1.0)
            continue

        spread = parameter[0].numel() ** -0.5  # a signal keeps its size
        if name.endswith(("pos_embed", "_token", "embed_tokens.weight")):
            spread = TABLE_SPREAD
        generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()))
        parameter.normal_(0, spread, generator=generator)
    return model
