"""`python -m bench train`: one step of training, forward, backward and AdamW, on random images. No data is read."""

import time

import numpy as np
import torch

from bench.common import Config, peak_gb, random_config, report
from metrics import flops_per_sample
from model import OpenVLA
from policy import pick_device
from tokenizer import IGNORE_INDEX
from train import Config as TrainConfig
from train import build_optimizer

TEXT_TOKENS = 40  # of a sample: the prompt, seven tokens of an action and </s>
TRAINED_TOKENS = 8
WARM_UP_STEPS = 2  # not counted
MIN_STEPS = 4


def bench_train(cfg: Config):
    """Measure training steps of a random model for cfg.seconds, and print the median."""
    device = pick_device(cfg.device)
    device_type = torch.device(device).type
    model = OpenVLA(random_config(cfg.shape)).init_weights().to(device)
    optimizer = build_optimizer(model, TrainConfig(), fused=device_type == "cuda")
    input_ids, labels, pixel_values = random_batch(model, cfg.batch_size, device)

    seconds = []  # of each step
    end = time.perf_counter() + cfg.seconds
    while time.perf_counter() < end or len(seconds) < MIN_STEPS:
        start = time.perf_counter()
        with torch.autocast(device_type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            _, loss = model(input_ids, pixel_values, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the GPU
        seconds.append(time.perf_counter() - start)

    s_per_step = float(np.median(seconds[WARM_UP_STEPS:]))
    flops_per_step = cfg.batch_size * flops_per_sample(model, model.cfg.num_patches + TEXT_TOKENS)
    report(
        {
            "shape": cfg.shape,
            "dtype": cfg.dtype,
            "device": device,
            "batch_size": cfg.batch_size,
            "s_per_step": s_per_step,
            "samples_per_s": cfg.batch_size / s_per_step,
            "tflops": flops_per_step / s_per_step / 1e12,
            "peak_gb": peak_gb(device),
        }
    )


def random_batch(model: OpenVLA, batch_size: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return input_ids and labels (B, T) int64, and pixel_values (B, 6, 224, 224) float32."""
    input_ids = torch.randint(3, 30000, (batch_size, TEXT_TOKENS), device=device)
    labels = input_ids.clone()
    labels[:, :-TRAINED_TOKENS] = IGNORE_INDEX
    channels = 3 * len(model.cfg.vision)
    size = model.cfg.vision[0].img_size
    pixel_values = torch.randn(batch_size, channels, size, size, device=device)
    return input_ids, labels, pixel_values
