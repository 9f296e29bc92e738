"""
What a run reports: loss, action-token accuracy and L1 error as the official code counts them, speed, memory; written to
metrics.jsonl, to the terminal, to a picture, and to W&B or TensorBoard when asked.

Accuracy is the share of right ids among action tokens; L1 is |predicted - true| of the decoded values, in normalised
units (vla-scripts/finetune.py of github.com/openvla/openvla). Axes: n trained positions, V ids.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from model import OpenVLA
from tokenizer import decode_action, encode_action, is_action_id

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # dense bf16


def count(logits, labels, which, num_datasets: int) -> torch.Tensor:
    """Per dataset: action tokens, right ones, sum of |error| in normalised units; (num_datasets, 3) float64."""
    action = is_action_id(labels)
    predicted, true, which = logits.argmax(-1)[action], labels[action], which[action]
    error = (decode_action(predicted) - decode_action(true)).abs()
    sums = torch.stack([torch.ones_like(error), (predicted == true).double(), error], dim=1)
    return torch.zeros(num_datasets, 3, dtype=torch.float64, device=sums.device).index_add_(0, which, sums)


def count_actions(predicted, true, which, num_datasets: int) -> torch.Tensor:
    """The same of normalised actions (B, K, A), for policies that do not write tokens: right is the same bin."""
    same, error = (encode_action(predicted) == encode_action(true)).double(), (predicted - true).abs().double()
    sums = torch.stack([torch.ones_like(error), same, error], dim=-1).sum((1, 2))  # (B, 3)
    return torch.zeros(num_datasets, 3, dtype=torch.float64, device=sums.device).index_add_(0, which, sums)


def flops_per_sample(model: OpenVLA, tokens: int) -> float:
    """Multiply-adds of forward and backward, twice, for `tokens` in the language model; 6 per weight and token."""
    vision = sum(p.numel() for p in model.vision_backbone.parameters()) + sum(
        p.numel() for p in model.projector.parameters()
    )
    layers, text = sum(p.numel() for p in model.language_model.model.layers.parameters()), model.cfg.text
    patches = (model.cfg.vision[0].img_size // model.cfg.vision[0].patch_size) ** 2
    attention = 12 * text.num_hidden_layers * text.hidden_size * tokens**2 / 2  # causal: half of the square
    return 6 * (vision * patches + layers * tokens + text.hidden_size * text.vocab_size * 8) + attention


def total(x: torch.Tensor) -> torch.Tensor:
    """Sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


class Window:
    """Sums over the steps between two lines of the log."""

    def __init__(self, num_datasets: int, device: str):
        self.losses, self.counts = [], torch.zeros(num_datasets, 3, dtype=torch.float64, device=device)
        self.samples = self.tokens = 0
        self.waited, self.start = 0.0, time.perf_counter()

    def add(self, batch: dict, sums: torch.Tensor):
        self.counts += sums
        self.samples += len(batch["input_ids"])
        self.tokens += batch["input_ids"].numel()

    def close(self, model: OpenVLA, names: list[str]) -> dict:
        """The metrics over all processes; those of a single dataset of a mixture are named metric/dataset."""
        world = dist.get_world_size() if dist.is_initialized() else 1
        seconds, counts = time.perf_counter() - self.start, total(self.counts)
        n, right, error = counts.sum(0).clamp(min=1e-9).tolist()
        loss = total(torch.stack(self.losses).mean()).item() / world
        out = {"loss": loss, "action_accuracy": right / n, "l1_loss": error / n}
        for name, (n, right, error) in zip(names, counts.tolist(), strict=True):
            if n and len(names) > 1:
                out |= {f"action_accuracy/{name}": right / n, f"l1_loss/{name}": error / n}
        patches = (model.cfg.vision[0].img_size // model.cfg.vision[0].patch_size) ** 2
        length = patches + self.tokens // max(self.samples, 1)
        flops = flops_per_sample(model, length) * self.samples / seconds  # of one process
        out |= dict(samples_per_s=self.samples * world / seconds, tokens_per_s=self.samples * world * length / seconds)
        out |= dict(s_per_step=seconds / len(self.losses), data_wait_ms=1e3 * self.waited / len(self.losses))
        out |= dict(tflops=flops / 1e12)
        if torch.cuda.is_available():
            peak = next((f for name, f in PEAK_FLOPS.items() if name in torch.cuda.get_device_name()), None)
            return (
                out | ({"mfu": flops / peak} if peak else {}) | {"memory_gb": torch.cuda.max_memory_allocated() / 1e9}
            )
        return out | {"memory_gb": peak_memory_gb()}


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a success rate; https://en.wikipedia.org/wiki/Binomial_proportion_confidence_interval"""
    p, d = successes / n, 1 + z * z / n
    middle, half = (p + z * z / (2 * n)) / d, z / d * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return max(middle - half, 0.0), min(middle + half, 1.0)


def peak_memory_gb() -> float:
    """Largest resident size of this process so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


class Log:
    """metrics.jsonl (a resumed run drops the lines beyond its step), terminal, W&B, TensorBoard."""

    def __init__(self, run: Path, max_steps: int, step: int, config: dict, wandb: str = "", tensorboard: bool = False):
        self.path = run / "metrics.jsonl"
        lines = self.path.read_text().splitlines(keepends=True) if self.path.is_file() else []
        old = [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may have been cut by a kill
        self.path.write_text("".join(json.dumps(m) + "\n" for m in old if m.get("step", 0) <= step and step))
        self.bar = tqdm(total=max_steps, initial=step, unit="step", leave=False)
        self.wandb = self.tensorboard = None
        if wandb:
            self.wandb = import_or_say("wandb", "wandb").init(project=wandb, name=run.name, config=config)
        if tensorboard:
            self.tensorboard = import_or_say("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(run))

    def write(self, m: dict):
        with open(self.path, "a") as f:
            f.write(json.dumps(m) + "\n")
        line = (
            f"step {m['step']:6d} | loss {m['loss']:7.4f} | acc {m['action_accuracy']:.3f} | l1 {m['l1_loss']:.4f} | "
        )
        line += f"lr {m['lr']:.1e} | {m['s_per_step']:.2f} s/step | {m['samples_per_s']:.0f} samples/s | "
        line += f"waited {m['data_wait_ms']:.0f} ms | " + (f"mfu {m['mfu']:.0%} | " if "mfu" in m else "")
        self.bar.write(line + f"{m['memory_gb']:.2f} GB")
        if self.wandb:
            self.wandb.log(m, step=m["step"])
        if self.tensorboard:
            for key, value in m.items():
                self.tensorboard.add_scalar(key, value, m["step"])

    def close(self):
        self.bar.close()
        if self.wandb:
            self.wandb.finish()
        if self.tensorboard:
            self.tensorboard.close()


def import_or_say(module: str, package: str):
    """Import an optional package, or say how to install it."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"{package} is not installed: pip install {package}, or leave the option out") from None


def plot_actions(path: Path, episodes: list[tuple[np.ndarray, np.ndarray]], labels: dict[int, str]):
    """
    Actions (T, A) of the data (black) and of the policy (red) in some episodes, side by side; a row for each dimension
    in `labels`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    true, said = (np.concatenate(x) for x in zip(*episodes, strict=True))
    figure, axes = plt.subplots(len(labels), 1, figsize=(11, 1.3 * len(labels)), sharex=True, squeeze=False)
    for axis, (i, label) in zip(axes[:, 0], labels.items(), strict=True):
        axis.step(range(len(true)), true[:, i], where="mid", color="black", label="data")
        axis.step(range(len(said)), said[:, i], where="mid", color="tab:red", linestyle="--", label="policy")
        for end in np.cumsum([len(t) for t, _ in episodes])[:-1]:
            axis.axvline(end - 0.5, color="lightgrey")
        axis.set_ylabel(label, fontsize=8)
    axes[0, 0].legend(ncols=2, fontsize=7, loc="upper right")
    axes[-1, 0].set_xlabel(f"frames of {len(episodes)} episodes")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def plot_curves(run: Path):
    """curves.png in the run folder: loss, accuracy and L1 over the steps of metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [m for m in lines if "loss" in m]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2))
    for axis, key in zip(axes, ("loss", "action_accuracy", "l1_loss"), strict=True):
        axis.plot([m["step"] for m in lines], [m[key] for m in lines])
        axis.set(xlabel="step", title=key)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(run / "curves.png", dpi=80)
    plt.close(figure)
