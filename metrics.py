"""
What a run reports: loss, action accuracy and L1 error as the official code counts them, speed, memory.

They are written to metrics.jsonl, to the terminal, to a picture, and to W&B or TensorBoard when asked.

Accuracy is the share of right ids among action tokens. L1 is |predicted - true| of the decoded values, in normalised
units (vla-scripts/finetune.py of github.com/openvla/openvla). FAST tokens decode only as a whole row: they have no L1.

Axes: B batch, K actions of a chunk, A action dimensions, n trained positions.
"""

import importlib
import json
import math
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from distributed import is_main_process, total, world_size
from fast import FAST
from files import atomic_write, expect_object, parse_json, read_text
from model import OpenVLA
from tokenizer import EOS, decode_action, encode_action, is_action_id

MOST_BYTES = 10**9  # of metrics.jsonl
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # dense bfloat16


# -----------------------------------------------------------------------------
# Errors of predicted actions, as sums: (num_datasets, 3) float64 of action values, right ones, |error|


def count_errors(
    predicted: torch.Tensor | None, batch: dict, num_datasets: int, fast: FAST | None = None
) -> torch.Tensor:
    """
    Compare what a model predicted (as its `loss` returns it) with a batch: ids (n,) of a token model, actions
    (B, K, A) of an OFT. None, of diffusion, which predicts noise, counts as actions that are 0. fast: of a model whose
    tokens are FAST's: one of them is no number of an action, so there is no error but NaN.
    """
    if predicted is None:
        predicted = torch.zeros_like(batch["actions"])
    if predicted.is_floating_point():
        return count_actions(predicted, batch["actions"], batch["dataset"], num_datasets)

    targets = batch["labels"][:, 1:]  # (B, T - 1)
    trained = targets >= 0
    dataset = batch["dataset"][:, None].expand_as(trained)
    return count_tokens(predicted, targets[trained], dataset[trained], num_datasets, fast)


def count_tokens(predicted, targets, dataset, num_datasets: int, fast: FAST | None = None) -> torch.Tensor:
    """Count predicted ids (n,) against the true ones, per dataset (n,). Ids that are no action (</s>) are left out."""
    is_action = targets != EOS if fast else is_action_id(targets)
    predicted = predicted[is_action]
    targets = targets[is_action]
    if fast:
        error = torch.full_like(targets, torch.nan, dtype=torch.float64)
    else:
        error = (decode_action(predicted) - decode_action(targets)).abs()
    right = (predicted == targets).double()
    sums = torch.stack([torch.ones_like(error), right, error], dim=1)  # (action tokens, 3)
    return sum_by_dataset(sums, dataset[is_action], num_datasets)


def count_actions(predicted, true, dataset, num_datasets: int) -> torch.Tensor:
    """Count normalised actions (B, K, A), per dataset (B,). A value is right if it falls into the same bin."""
    right = (encode_action(predicted) == encode_action(true)).double()
    error = (predicted - true).abs().double()
    sums = torch.stack([torch.ones_like(error), right, error], dim=-1).sum((1, 2))  # (B, 3)
    return sum_by_dataset(sums, dataset, num_datasets)


def sum_by_dataset(rows: torch.Tensor, dataset: torch.Tensor, num_datasets: int) -> torch.Tensor:
    """Sum rows (n, 3) that belong to the same dataset (n,): (num_datasets, 3)."""
    sums = torch.zeros(num_datasets, 3, dtype=torch.float64, device=rows.device)
    return sums.index_add_(0, dataset, rows)


# -----------------------------------------------------------------------------
# Speed and memory


def flops_per_sample(model: OpenVLA, num_tokens: int) -> float:
    """
    Estimate the floating-point operations of forward and backward: 6 for each weight and each token that it sees.
    num_tokens: in the language model. The head sees eight: seven action tokens and </s>.
    """
    text = model.cfg.text
    vision_weights = count_weights(model.vision_backbone) + count_weights(model.projector)
    text_weights = count_weights(model.language_model.model.layers)
    head_weights = text.hidden_size * text.vocab_size
    # Queries times keys, and weights times values; causal, so half of the square.
    attention = 12 * text.num_hidden_layers * text.hidden_size * num_tokens**2 / 2
    linear = 6 * (vision_weights * model.cfg.num_patches + text_weights * num_tokens + head_weights * 8)
    return linear + attention


def count_weights(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def peak_memory_gb() -> float:
    """Return the largest memory so far: on the GPU, or of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return peak_resident_gb()


def peak_resident_gb() -> float:
    """Return the largest resident size of this process so far."""
    import resource  # not on Windows

    unit = 1e9 if sys.platform == "darwin" else 1e6  # bytes on a Mac, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def peak_flops() -> float | None:
    """Return what the GPU could do per second in bfloat16, if it is a known one."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((flops for known, flops in PEAK_FLOPS.items() if known in name), None)


class Window:
    """Sums over the steps between two lines of the log."""

    def __init__(self, num_datasets: int, device: str):
        self.losses = []  # of steps, floats: means over all processes
        self.counts = torch.zeros(num_datasets, 3, dtype=torch.float64, device=device)
        self.samples = 0
        self.tokens = 0
        self.waited = 0.0  # seconds for data
        self.start = time.perf_counter()
        self.stood_still: dict[str, float] = {}  # seconds of what is none of the steps', by its name in the log

    @contextmanager
    def not_counted(self, name: str) -> Iterator[None]:
        """Leave the time that the block takes out of all speeds, and log its seconds under this name."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self.start += seconds
        self.stood_still[name] = self.stood_still.get(name, 0.0) + seconds

    def timed_next(self, batches: Iterator[dict]) -> dict:
        """Return the next batch, and note how long it took."""
        start = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - start
        return batch

    def add(self, batch: dict, counts: torch.Tensor):
        self.counts += counts
        self.samples += len(batch["input_ids"])
        self.tokens += batch["input_ids"].numel()

    def state(self) -> dict:
        """Return the sums over all processes, for `restore`: so that a stop changes no later line of the log."""
        return {
            "losses": list(self.losses),  # a copy: training goes on while the checkpoint is written
            "counts": total(self.counts.clone()).tolist(),
            "samples": self.samples,
            "tokens": self.tokens,
        }

    def restore(self, state: dict | None):
        """Continue with the sums that `state` returned. None, of older checkpoints, changes nothing."""
        if not state:
            return
        self.losses = list(state["losses"])
        if is_main_process():
            self.counts += torch.tensor(state["counts"], dtype=torch.float64, device=self.counts.device)
        self.samples = state["samples"]
        self.tokens = state["tokens"]

    def close(self, model: OpenVLA, names: list[str]) -> dict:
        """Return the metrics over all processes. Those of one dataset of a mixture are named metric/dataset."""
        world = world_size()
        seconds = time.perf_counter() - self.start
        counts = total(self.counts)

        num_values, right, error = counts.sum(0).clamp(min=1e-9).tolist()
        metrics = {
            "loss": torch.tensor(self.losses, dtype=torch.float32).mean().item(),
            "action_accuracy": right / num_values,
        }
        has_error = not math.isnan(error)
        if has_error:
            metrics["l1_loss"] = error / num_values
        if len(names) > 1:
            for name, (num_values, right, error) in zip(names, counts.tolist(), strict=True):
                if num_values:
                    metrics[f"action_accuracy/{name}"] = right / num_values
                if num_values and has_error:
                    metrics[f"l1_loss/{name}"] = error / num_values

        length = model.cfg.num_patches + self.tokens // max(self.samples, 1)  # tokens of a sample
        flops_per_s = flops_per_sample(model, length) * self.samples / seconds  # of one process
        metrics["samples_per_s"] = self.samples * world / seconds
        metrics["tokens_per_s"] = self.samples * world * length / seconds
        metrics["s_per_step"] = seconds / len(self.losses)
        metrics["data_wait_ms"] = 1e3 * self.waited / len(self.losses)
        metrics["tflops"] = flops_per_s / 1e12
        peak = peak_flops()
        if peak:
            metrics["mfu"] = flops_per_s / peak
        metrics["memory_gb"] = peak_memory_gb()
        return {**metrics, **self.stood_still}


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """
    Return the 95 % interval of a success rate.
    https://en.wikipedia.org/wiki/Binomial_proportion_confidence_interval#Wilson_score_interval
    """
    p = successes / n
    denominator = 1 + z * z / n
    middle = (p + z * z / (2 * n)) / denominator
    half = z / denominator * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return max(middle - half, 0.0), min(middle + half, 1.0)


# -----------------------------------------------------------------------------
# The log


class Log:
    """metrics.jsonl, the terminal, W&B, TensorBoard. A resumed run drops the lines beyond its step."""

    def __init__(self, run: Path, max_steps: int, step: int, config: dict, wandb: str = "", tensorboard: bool = False):
        self.path = run / "metrics.jsonl"
        self.keep_lines_until(step)
        # A bar on a terminal only; in a file the lines of the log say how far it is.
        self.bar = tqdm(total=max_steps, initial=step, unit="step", leave=False, disable=not sys.stderr.isatty())
        self.wandb = None
        self.tensorboard = None
        if wandb:
            self.wandb = start_wandb(run, step, project=wandb, config=config)
        if tensorboard:
            # What an earlier run of this folder wrote beyond `step` is no longer shown.
            writer = import_or_say("torch.utils.tensorboard", "tensorboard").SummaryWriter
            self.tensorboard = writer(str(run), purge_step=step + 1)

    def keep_lines_until(self, step: int):
        """Remove the lines of later steps from metrics.jsonl, and one that a kill has cut off."""
        kept = []
        if self.path.exists() and step:
            text = read_text(self.path, most=MOST_BYTES)
            whole_lines = text[: text.rfind("\n") + 1].splitlines(keepends=True)
            for number, line in enumerate(whole_lines, start=1):
                place = f"{self.path}, line {number}"
                metrics = expect_object(parse_json(line, place), place)
                is_numbers = all(type(value) in (int, float) for value in metrics.values())
                if not is_numbers or "step" not in metrics:
                    raise ValueError(
                        f"{place}: expected a step and other numbers, found {line[:80]!r}; remove the line"
                    )
                if metrics["step"] <= step:
                    kept.append(line)
        with atomic_write(self.path) as temporary:
            temporary.write_text("".join(kept))

    def update_bar(self):
        self.bar.update()

    def write(self, metrics: dict, line: str = ""):
        """Write one line of metrics everywhere. line: what the terminal shows; "" for that of `format_line`."""
        with open(self.path, "a") as file:
            file.write(json.dumps(metrics) + "\n")
        self.bar.write(line or format_line(metrics))
        if self.wandb:
            self.wandb.log(metrics, step=metrics["step"])
        if self.tensorboard:
            for key, value in metrics.items():
                self.tensorboard.add_scalar(key, value, metrics["step"])

    def close(self):
        self.bar.close()
        if self.wandb:
            self.wandb.finish()
        if self.tensorboard:
            self.tensorboard.close()


def start_wandb(run: Path, step: int, project: str, config: dict):
    """
    Return a run of W&B: a new one, or the one that this folder's wandb.txt names if it is resumed. Raises ValueError if
    W&B refuses.
    """
    wandb = import_or_say("wandb", "wandb")
    id_file = run / "wandb.txt"
    is_resumed = step > 0 and id_file.is_file()
    run_id = id_file.read_text().strip() if is_resumed else secrets.token_hex(4)
    try:
        started = wandb.init(
            project=project, name=run.name, config=config, id=run_id, resume="allow", allow_val_change=True
        )
    except Exception as error:  # no login, no network, no such project
        raise ValueError(
            f"--wandb {project}: {error}; run `wandb login`, set WANDB_MODE=offline, or leave the option out"
        ) from None
    with atomic_write(id_file) as temporary:
        temporary.write_text(run_id)
    return started


def format_line(metrics: dict) -> str:
    """Return the line of the terminal."""
    parts = [
        f"step {metrics['step']:6d}",
        f"loss {metrics['loss']:7.4f}",
        f"acc {metrics['action_accuracy']:.3f}",
    ]
    if "l1_loss" in metrics:
        parts.append(f"l1 {metrics['l1_loss']:.4f}")
    parts += [
        f"lr {metrics['lr']:.1e}",
        f"{metrics['s_per_step']:.2f} s/step",
        f"{metrics['samples_per_s']:.0f} samples/s",
        f"waited {metrics['data_wait_ms']:.0f} ms",
    ]
    if "mfu" in metrics:
        parts.append(f"mfu {metrics['mfu']:.0%}")
    parts.append(f"{metrics['memory_gb']:.2f} GB")
    return " | ".join(parts)


def import_or_say(module: str, package: str):
    """Import an optional package. Raises ValueError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"{package} is not installed: pip install {package}, or leave the option out") from None


# -----------------------------------------------------------------------------
# Plots


def import_pyplot():
    """Import matplotlib so that it needs no screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot_actions(path: Path, episodes: list[tuple[np.ndarray, np.ndarray]], labels: dict[int, str]):
    """
    Plot actions (T, A) of the data (black) and of the policy (red), side by side for some episodes.
    episodes: [(actions of the data, actions of the policy)]. labels: dimension -> its name, one row each.
    """
    plt = import_pyplot()
    data = np.concatenate([actions for actions, _ in episodes])
    policy = np.concatenate([actions for _, actions in episodes])
    ends = np.cumsum([len(actions) for actions, _ in episodes])

    figure, axes = plt.subplots(len(labels), 1, figsize=(11, 1.3 * len(labels)), sharex=True, squeeze=False)
    for axis, (i, label) in zip(axes[:, 0], labels.items(), strict=True):
        axis.step(range(len(data)), data[:, i], where="mid", color="black", label="data")
        axis.step(range(len(policy)), policy[:, i], where="mid", color="tab:red", linestyle="--", label="policy")
        for end in ends[:-1]:
            axis.axvline(end - 0.5, color="lightgrey")
        axis.set_ylabel(label, fontsize=8)
    axes[0, 0].legend(ncols=2, fontsize=7, loc="upper right")
    axes[-1, 0].set_xlabel(f"frames of {len(episodes)} episodes")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def plot_curves(run: Path, keys: tuple[str, ...] = ("loss", "action_accuracy", "l1_loss")):
    """Plot the metrics that every line of metrics.jsonl has over its steps, to curves.png in the run folder."""
    plt = import_pyplot()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [metrics for metrics in lines if "loss" in metrics]
    steps = [metrics["step"] for metrics in lines]

    keys = [key for key in keys if all(key in metrics for metrics in lines)]
    figure, axes = plt.subplots(1, len(keys), figsize=(4 * len(keys), 3.2))
    for axis, key in zip(axes, keys, strict=True):
        axis.plot(steps, [metrics[key] for metrics in lines])
        axis.set(xlabel="step", title=key)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(run / "curves.png", dpi=80)
    plt.close(figure)
