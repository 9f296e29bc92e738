"""
Started under torchrun by test_scale.py: does each process hold its rows of the model that one process would hold whole,
and can it continue a checkpoint that another number of processes has written?

    torchrun --nproc-per-node 3 tests/sharded_start.py BASE_CHECKPOINT TOKENIZER RUN_TO_CONTINUE RUN_TO_WRITE
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict

sys.path.insert(0, str(Path(__file__).parent.parent))

import finetune_lora
import finetune_oft
import train
from data import Samples
from distributed import gather, is_torchrun, shard, start_processes, world_size
from model import OpenVLA
from resume import TRAINED_ONLY, Saver, complete_checkpoints, load_checkpoint

SMALL = {
    "vision_configs": [{"embed_dim": 18, "depth": 3, "num_heads": 2, "img_size": 28, "mlp_dim": 34}] * 2,
    "text_config": {
        "vocab_size": 32064,
        "hidden_size": 20,
        "intermediate_size": 38,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
}


def recipes(base: str, tokenizer: str) -> dict:
    """Return name -> (config, its build function)."""
    common = {"tokenizer": tokenizer, "base_checkpoint": base, "lr": 0.1, "seed": 3}
    return {
        "random": (train.Config(tokenizer=tokenizer, random_model=SMALL, seed=3), train.build),
        "full": (train.Config(**common), train.build),
        "frozen": (train.Config(**common, train_parts="frozen_vision"), train.build),
        "lora": (finetune_lora.Config(**common, lora_rank=5), finetune_lora.build),
        "nf4": (finetune_lora.Config(**common, lora_rank=4, quantize_base="nf4"), finetune_lora.build),
        "oft": (finetune_oft.Config(**common, lora_rank=4, film=True, action_chunk=2), finetune_oft.build),
    }


def datasets(num_images: int) -> list:
    """Return one dataset of noise, with as many cameras as are wanted."""
    rng = np.random.default_rng(0)
    cameras = [f"camera{i}" for i in range(num_images)]
    episode = []
    for i in range(40):
        images = {camera: rng.integers(0, 255, (28, 28, 3), np.uint8) for camera in cameras}
        episode.append({**images, "action": rng.random(7), "instruction": f"do {i}", "state": rng.random(8)})
    return [Samples([episode], cameras=cameras)]


def start(cfg, build, is_sharded: bool) -> train.Trainee:
    """Return what a recipe trains, as train.py starts it."""
    num_images = 2 if isinstance(cfg, finetune_oft.Config) else 1
    trainee = build(cfg, datasets(num_images))
    if is_sharded:
        shard(trainee.model, [*trainee.vla.transformer_blocks(), trainee.vla.vision_backbone], "cpu", bf16=False)
    trainee.model.to_empty(device="cpu")
    trainee.fill(trainee, cfg)
    return trainee


def take_step(trainee: train.Trainee, cfg) -> torch.optim.Optimizer:
    """Take a step of AdamW with made-up gradients, which are the same however the weights are sharded."""
    optimizer = train.build_optimizer(trainee.model, cfg, fused=False)
    for weight in trainee.model.parameters():
        if weight.requires_grad:
            weight.grad = weight.detach() * 0.5 + 0.1
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return all weights, and the buffers of weights in 4 bits."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def moments_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return both moments of each weight that trains."""
    moments = {}
    for name, weight in model.named_parameters():
        for key, value in optimizer.state[weight].items() if weight.requires_grad else ():
            moments[f"{name} {key}"] = value
    return moments


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict, dict]:
    """Return weights and optimizer state as a checkpoint holds them."""
    return get_state_dict(model, optimizer, options=TRAINED_ONLY)


def check_equal(name: str, sharded: dict, plain: dict):
    """Raise AssertionError where a gathered tensor is not the plain one bit for bit."""
    assert sharded.keys() == plain.keys(), name
    for key, tensor in sharded.items():
        assert torch.equal(gather(tensor).detach(), plain[key].detach()), f"{name}: {key}"


def check_shares(name: str, model: torch.nn.Module):
    """Raise AssertionError if a process holds more than its share: the rows of each weight, divided and rounded up."""
    for key, weight in model.named_parameters():
        rows_each = -(-weight.shape[0] // world_size())
        assert len(weight.to_local()) <= rows_each, f"{name}: {key}"


def main(base: str, tokenizer: str, before: str, after: str):
    start_processes()
    is_sharded = is_torchrun()
    for name, (cfg, build) in recipes(base, tokenizer).items():
        plain = start(cfg, build, is_sharded=False)
        trainee = start(cfg, build, is_sharded)
        check_equal(name, tensors_of(trainee.model), tensors_of(plain.model))
        if is_sharded:
            check_shares(name, trainee.model)
        if name == "full":
            loaded = OpenVLA.from_pretrained(base, torch.float32)
            check_equal(name, dict(trainee.model.named_parameters()), dict(loaded.named_parameters()))

        # What another number of processes saved after the step is what this number has after it.
        optimizer = take_step(trainee, cfg)
        plain_optimizer = take_step(plain, cfg)
        if before != "none":
            trainee = start(cfg, build, is_sharded)
            optimizer = train.build_optimizer(trainee.model, cfg, fused=False)
            load_checkpoint(complete_checkpoints(Path(before) / name)[-1], trainee.model, optimizer)
        check_equal(name, tensors_of(trainee.model), tensors_of(plain.model))
        check_equal(name, moments_of(trainee.model, optimizer), moments_of(plain.model, plain_optimizer))
        with Saver(Path(after) / name, keep=1) as saver:
            saver.save(1, trainee.model, optimizer, {"config": {}, "statistics": {}})
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
