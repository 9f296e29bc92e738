"""
Frames of robot episodes -> training batches.

    dataset (rlds.py, lerobot.py, or your own) -> mix and shuffle -> decode, resize, augment
    actions -> normalise -> chunk -> ids and labels -> collate

The order is a pure function of (seed, position): sample p of a run is the same on any number of workers and ranks, and
a run resumes from the number of its step. In each block of the stream every dataset of a mixture has exactly its share;
each dataset goes through epochs in which every frame comes once, in an order without a list (a keyed permutation, so
shuffling is perfect over the whole dataset and costs no memory).

    python data.py --data_root_dir DIR --data_mix bridge        # a table and pictures, to look before training

Your own data: any iterable of {"image": (H, W, 3) uint8, "action": (A,), "instruction": str}, see `Samples`.

OpenVLA section 3.3 and appendix A, https://arxiv.org/abs/2406.09246; prismatic/vla/datasets of github.com/openvla/
openvla. Differences from it, and why, are a table in README.md.

Axes: B batch, V views, H height, W width, T steps of an episode, K steps of an action chunk, A action dimensions.
"""

import os
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from configurator import configure, fail
from formats import oxe
from formats.rlds import HOLD_OUT, NO_BAR, RLDS
from image import augment, decode, resize_lanczos3, to_rgb
from tokenizer import PAD, SCHEME, Tokenizer, action_mask, normalize, pad_sequences

BLOCK = 4096  # positions of the stream after which the shares of a mixture are exact again


@dataclass
class Config:
    data_root_dir: str = ""  # folder with one folder per dataset
    data_mix: str = "bridge"  # a mixture or a dataset of oxe.py
    out: str = "look"  # folder for the pictures
    skip_bad_records: bool = False  # leave broken records out and count them, instead of stopping


# -----------------------------------------------------------------------------
# Datasets


class Samples(Dataset):
    """
    Your own data as a dataset: any sequence or iterable (it is read once, into a list) of dicts `image` (H, W, 3)
    uint8, path or encoded bytes, `action` (A,) in robot units, gripper last (1 open, 0 closed), and `instruction`.
    Raises ValueError naming the first sample that does not fit.
    """

    def __init__(self, samples: Iterable[dict], name: str = "mine"):
        self.samples = samples if hasattr(samples, "__getitem__") and hasattr(samples, "__len__") else list(samples)
        self.name, actions = name, []
        for i in range(len(self.samples)):
            sample = self.samples[i]
            if missing := {"image", "action", "instruction"} - sample.keys():
                raise ValueError(f"{name}: sample {i} has no {sorted(missing)}, its keys are {sorted(sample)}")
            if not isinstance(sample["instruction"], str):
                raise ValueError(f"{name}: sample {i} has instruction {sample['instruction']!r}, which is no str")
            actions.append(np.asarray(sample["action"], np.float32))
            if actions[i].shape != actions[0].shape or actions[i].ndim != 1 or not np.isfinite(actions[i]).all():
                raise ValueError(f"{name}: sample {i} has action {actions[i]}, expected finite {actions[0].shape}")
        if not actions:
            raise ValueError(f"{name}: no samples")
        x = np.stack(actions).astype(np.float64)
        moments = dict(mean=x.mean(0), std=x.std(0), max=x.max(0), min=x.min(0))
        moments |= dict(q01=np.quantile(x, 0.01, axis=0), q99=np.quantile(x, 0.99, axis=0))
        self.absolute_mask = (False,) * (x.shape[1] - 1) + (True,)
        action = {k: v.tolist() for k, v in moments.items()} | {"mask": [not m for m in self.absolute_mask]}
        self.statistics = dict(action=action, num_transitions=len(x), num_trajectories=0)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> dict:
        s = self.samples[i]
        actions = np.asarray(s["action"], np.float32)[None]
        return dict(
            pictures=[s["image"]], actions=actions, instruction=s["instruction"], proprio=np.zeros(0, np.float32)
        )


def open_mixture(data_root_dir, data_mix, split="train", views=("primary",), action_chunk=1, hold_out=HOLD_OUT,
                 skip_bad_records=False, progress=NO_BAR) -> list[tuple[Dataset, float]]:  # fmt: skip
    """
    [(dataset, weight)] for a mixture or a dataset of oxe.py, or for a list of (what, weight) where `what` is a name, an
    oxe.Dataset row with a name, or a dataset object. Raises with the nearest names, or with what is missing, at once.
    """
    try:
        parts = oxe.mixture(data_mix) if isinstance(data_mix, str) else list(data_mix)
    except KeyError as error:
        raise ValueError(error.args[0]) from None
    options = dict(split=split, views=views, action_chunk=action_chunk, hold_out=hold_out)
    options |= dict(skip_bad_records=skip_bad_records, progress=progress)
    return [(RLDS(data_root_dir, what, **options) if isinstance(what, str) else what, weight) for what, weight in parts]


def check_object(dataset, split: str, views: int, action_chunk: int):
    """Raise ValueError if a dataset object, which is what it was made as, is not what training wants."""
    chunk, pictures = getattr(dataset, "action_chunk", 1), len(dataset[0]["pictures"])
    if chunk != action_chunk:
        raise ValueError(f"{dataset.name} gives {chunk} actions at a time, training wants {action_chunk}: LeRobot(..., "
                         f"action_chunk={action_chunk}), or write it as RLDS (rlds_writer.py)")  # fmt: skip
    if pictures != views:
        raise ValueError(f"{dataset.name} gives {pictures} pictures at a time, training wants {views}; set `views`")
    if split == "val":
        raise ValueError(f"{dataset.name} is an object without a validation split; --val_every 0")


def warn_constant(stats: dict) -> list[str]:
    """One line for each normalised dimension that hardly moves: dividing by q99 - q01 would blow its noise up."""
    span = np.asarray(stats["q99"]) - np.asarray(stats["q01"])
    small = (span < 1e-4) & action_mask(stats) & (np.asarray(stats["min"]) != np.asarray(stats["max"]))
    return [f"action dimension {i} hardly moves (q99 - q01 = {span[i]:.1e})" for i in np.flatnonzero(small)]


def warn_gripper(stats: dict) -> list[str]:
    """A line if the gripper, which is not normalised, goes beyond 0 and 1: it would become one bin."""
    low, high = stats["min"][-1], stats["max"][-1]
    if action_mask(stats)[-1] or (low >= -0.01 and high <= 1.01):
        return []
    return [f"the gripper is {low:.3g} ... {high:.3g}, but should be 0 (closed) ... 1 (open)"]


# -----------------------------------------------------------------------------
# Mix and shuffle


def shuffled(i: int, n: int, key: int) -> int:
    """Element i of a random permutation of range(n) that belongs to `key`: a four-round Feistel network on the bits of
    i, walked until it falls below n. Needs no memory, whatever n is."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for r in range(4):
            h = (right * 0x9E3779B97F4A7C15 + key + r * 0xD1B54A32D192ED03) & 0xFFFFFFFFFFFFFFFF
            h = (h ^ (h >> 31)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ ((h ^ (h >> 29)) & mask)
        i = (left << half) | right
        if i < n:
            return i


@lru_cache(maxsize=256)
def permutation_key(*parts: int) -> int:
    return int(np.random.default_rng(parts).integers(1 << 63))


class Mixture(Dataset):
    """
    The endless stream of training samples: [position] -> dict(images (V, S, S, 3) uint8, input_ids, labels, actions
    (K, A) normalised, proprio, dataset number). weights count per frame: a dataset's share is weight x its frames.
    """

    def __init__(self, parts: list, tokenizer: Tokenizer, image_size=224, seed=0, image_aug=False, action_chunk=1):
        self.datasets, weights = [d for d, _ in parts], np.array([w for _, w in parts], float)
        self.tokenizer, self.image_size, self.seed = tokenizer, image_size, seed
        self.image_aug, self.action_chunk = image_aug, action_chunk
        self.sizes = np.array([len(d) for d in self.datasets])
        if min(weights) < 0 or not (weights * self.sizes).sum() > 0:
            names = [d.name for d in self.datasets]
            raise ValueError(f"nothing to draw from {names}: frames {self.sizes.tolist()}, weights {weights.tolist()}")
        self.shares = weights * self.sizes / (weights * self.sizes).sum()

    def counts(self, block: int) -> np.ndarray:
        """How often each dataset was drawn before a block; rounded down, so no share is ever off by one sample."""
        return np.floor(self.shares * block * BLOCK + 1e-9).astype(int)

    @lru_cache(maxsize=4)  # noqa: B019
    def block_order(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Dataset and running number within it for each position of a block; datasets are shuffled."""
        before, after = self.counts(block), self.counts(block + 1)
        which = np.repeat(np.arange(len(before)), after - before)
        which = np.random.default_rng((self.seed, block)).permutation(which)
        number = np.empty_like(which)
        for d in range(len(before)):  # within a dataset the order is that of its epochs, see `shuffled`
            number[which == d] = np.arange(before[d], after[d])
        return which, number

    def locate(self, position: int) -> tuple[int, int, int]:
        """Position in the stream -> (dataset number, frame number, epoch of that dataset)."""
        block = position // BLOCK + 1
        while (start := int(self.counts(block).sum())) > position:  # blocks are up to one sample per dataset shorter
            block -= 1
        while position - start >= len(self.block_order(block)[0]):
            start, block = start + len(self.block_order(block)[0]), block + 1
        which, number = (int(x[position - start]) for x in self.block_order(block))
        epoch, i = divmod(number, int(self.sizes[which]))
        return which, shuffled(i, int(self.sizes[which]), permutation_key(self.seed, which, epoch)), epoch

    def __getitem__(self, position: int) -> dict:
        which, i, _ = self.locate(position)
        rng = np.random.default_rng((self.seed, position, 1)) if self.image_aug else None
        return self.sample(which, i, rng)

    def sample(self, which: int, i: int, rng: np.random.Generator | None = None) -> dict:
        """Frame i of a dataset as a training sample; rng: augment the picture."""
        dataset = self.datasets[which]
        frame = dataset[i]
        try:
            images = [to_picture(p, self.image_size) for p in frame["pictures"]]
        except ValueError as error:
            raise ValueError(f"{dataset.name}: frame {i}: {error}") from None
        if rng is not None:
            images = [augment(image, rng) for image in images]
        stats, scheme = dataset.statistics, scheme_of(dataset)
        actions = normalize(frame["actions"], stats["action"], scheme)
        actions = chunk(actions, dataset.absolute_mask, self.action_chunk - 1)[0]
        input_ids, labels = self.tokenizer.encode_example(frame["instruction"], actions)
        proprio = normalize(frame["proprio"], stats["proprio"], scheme) if "proprio" in stats else frame["proprio"]
        out = dict(images=np.stack(images), input_ids=input_ids, labels=labels, dataset=which)
        return out | dict(actions=actions.astype(np.float32), proprio=proprio.astype(np.float32))


def scheme_of(dataset) -> str:
    """How a dataset's actions and states are normalised: as its row in oxe.py says, if it has one."""
    return dataset.row.scheme if hasattr(dataset, "row") else SCHEME


def to_picture(picture, size: int) -> np.ndarray:
    """Encoded bytes, path or (H, W, 3) array -> (size, size, 3) uint8, as the official pipeline's pixels."""
    return resize_lanczos3(decode(picture) if isinstance(picture, bytes) else to_rgb(picture), size)


def chunk(actions: np.ndarray, absolute_mask, future: int, window: int = 1, goals=None) -> np.ndarray:
    """
    Normalised actions of an episode (T, A) -> (T, window + future, A): for each step those before it, its own and those
    after. Before the start the first one repeats. Beyond the end (or beyond `goals` (T,), the last step each chunk may
    use) an absolute dimension, the gripper, repeats; a relative one is 0, the middle of its range, which need not mean
    standing still.
    """
    T = len(actions)
    where = np.arange(T)[:, None] + np.arange(window + future) - (window - 1)  # (T, window + future)
    last = np.full((T, 1), T - 1) if goals is None else np.asarray(goals)[:, None]
    beyond = (where > last)[..., None] & ~np.asarray(absolute_mask)  # (T, window + future, A)
    return np.where(beyond, np.float32(0), actions[where.clip(0, last)])


# -----------------------------------------------------------------------------
# Batches


def collate(samples: list[dict]) -> dict[str, torch.Tensor]:
    """
    images (B, V, S, S, 3) uint8 (normalised on the device: a quarter of the bytes), input_ids and labels (B, T) int64
    padded on the right, lengths (B,), actions (B, K, A) float32, proprio (B, P) float32, dataset (B,) int64.
    """
    input_ids, lengths = pad_sequences([s["input_ids"] for s in samples], PAD)
    labels, _ = pad_sequences([s["labels"] for s in samples], -100)
    images, actions = (torch.from_numpy(np.stack([s[k] for s in samples])) for k in ("images", "actions"))
    out = dict(images=images, input_ids=input_ids, labels=labels, lengths=lengths, actions=actions)
    out["dataset"] = torch.tensor([s["dataset"] for s in samples])
    if len({len(s["proprio"]) for s in samples}) == 1:  # mixtures of different robots have no common state
        out["proprio"] = torch.from_numpy(np.stack([s["proprio"] for s in samples]))
    return out


class Positions:
    """
    The positions of each micro-batch of one rank, from a step on: step s takes s G ... s G + G - 1, rank after rank
    within each micro-batch. The whole state of the data is the number of the step.
    """

    def __init__(self, batch_size: int, micro_batch_size: int, rank=0, world_size=1, start_step=0):
        self.global_size, self.micro, self.rank, self.world = batch_size, micro_batch_size, rank, world_size
        self.step = start_step

    def __iter__(self):
        step = self.step
        while True:
            for m in range(self.rank * self.micro, self.global_size, self.world * self.micro):
                start = step * self.global_size + m
                yield list(range(start, start + self.micro))
            step += 1

    def state_dict(self) -> dict:
        return {"step": self.step}

    def load_state_dict(self, state: dict):
        self.step = state["step"]


def make_loader(mixture: Mixture, positions: Positions, num_workers: int = 0, pin_memory: bool = False) -> DataLoader:
    """
    Batches in the order of `positions`, whatever the number of workers. These are forked from a server process, which
    has neither CUDA nor threads; or from this one, if a dataset's class or function is a config file's: that cannot be
    sent.
    """
    context = None
    if num_workers:
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # read by the workers: a core each, no more
            os.environ.setdefault(name, "1")
        try:
            parts = [(getattr(d, "samples", d), getattr(d, "row", None) or d) for d in mixture.datasets]
            functions = [getattr(row, k, None) for _, row in parts for k in ("standardize", "keep_frames")]
            pickle.dumps((functions, [type(own) for own, _ in parts]))
            context = torch.multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["data"])
        except (pickle.PicklingError, AttributeError):
            context = torch.multiprocessing.get_context("fork")
    options = dict(num_workers=num_workers, multiprocessing_context=context, pin_memory=pin_memory)
    return DataLoader(mixture, batch_sampler=positions, collate_fn=collate, **options)


def main(cfg: Config):
    from diagnose.look import look

    if not cfg.data_root_dir:
        fail("--data_root_dir DIR is missing: the folder that holds the datasets")
    try:
        bar = lambda files, title: tqdm(files, title, unit="file", leave=False)  # noqa: E731
        for dataset, weight in open_mixture(
            cfg.data_root_dir, cfg.data_mix, skip_bad_records=cfg.skip_bad_records, progress=bar
        ):
            look(dataset, weight, Path(cfg.out))
    except (ValueError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main(configure(Config))
