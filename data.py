"""
Frames of robot episodes -> training batches.

    dataset (formats/, or your own) -> mix and shuffle -> decode, resize, augment
    actions -> normalise -> chunk -> ids and labels -> collate

The order is a pure function of (seed, position): sample p of a run is the same on any number of workers and processes,
and a run resumes from the number of its step. In each block of the stream every dataset of a mixture has exactly its
share. Each dataset goes through epochs in which every frame comes once, in an order that needs no list (a keyed
permutation): shuffling is perfect over the whole dataset and costs no memory.

    python -m diagnose.look --data_root_dir DIR --data_mix bridge      # a table and images, to look before training

Your own data: LeRobot folders (formats/lerobot.py), RLDS (formats/rlds.py), or any frames (formats/samples.py).

OpenVLA section 3.3 and appendix A, https://arxiv.org/abs/2406.09246; prismatic/vla/datasets of github.com/openvla/
openvla. docs/differences.md says where this differs from it, and why.

Axes: B batch, V cameras, S side of an image in pixels, K actions of a chunk, A action dimensions, P state dimensions,
T tokens.
"""

import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from formats import oxe
from formats.dataset import HOLD_OUT, RobotDataset
from formats.rlds import RLDS
from formats.samples import Samples  # noqa: F401 (so that a config file finds it beside the rest)
from formats.workers import ignored_signals, serve_main_process
from hub import find_data
from image import augment, decode, resize_lanczos3, to_rgb
from normalize import normalize
from progress import no_progress
from tokenizer import IGNORE_INDEX, PAD, Tokenizer, pad_sequences

BLOCK = 4096  # positions of the stream after which the shares of a mixture are exact again


# -----------------------------------------------------------------------------
# Datasets


def parse_mixture(data_mix) -> list[tuple]:
    """
    Return [(what, weight)], where `what` is a name of formats/oxe.py, a row of your own (oxe.Dataset) or a dataset.

    data_mix: a name, a row or a dataset; or a list of them, in which each may have a weight: (what, 2.0). Without one
    it is 1. Raises ValueError for anything else.
    """
    if isinstance(data_mix, str):
        try:
            return oxe.mixture(data_mix)
        except KeyError as error:
            raise ValueError(error.args[0]) from None

    parts = data_mix if isinstance(data_mix, list | tuple) else [data_mix]
    if len(parts) == 2 and is_number(parts[1]):
        parts = [parts]  # one pair, without the list around it
    mixture = []
    for part in parts:
        has_weight = isinstance(part, list | tuple) and len(part) == 2 and is_number(part[1])
        what, weight = part if has_weight else (part, 1.0)
        check_part(what)
        mixture.append((what, float(weight)))
    if not mixture:
        raise ValueError("data_mix is empty; name a dataset")
    return mixture


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_part(what):
    """Raise ValueError for a part of data_mix that is neither a name, nor a row, nor a dataset."""
    if isinstance(what, str):
        try:
            oxe.lookup(what)
        except KeyError as error:
            raise ValueError(error.args[0]) from None
        return
    if isinstance(what, oxe.Dataset):
        if not what.name:
            raise ValueError("data_mix: a row of your own needs a name: oxe.Dataset(name=...), as its folder has")
        return
    wanted = [*RobotDataset.__annotations__, "select", "__len__", "__getitem__", "instruction", "all_actions"]
    missing = [name for name in wanted if not hasattr(what, name)]
    if missing:
        raise ValueError(
            f"data_mix: {what!r:.60} is no dataset, it lacks {', '.join(missing)}. data_mix is a name, a row "
            f"oxe.Dataset(name=...), LeRobot(...), Samples(...), or a list of them, each alone or as (dataset, weight)"
        )


def name_of_mixture(data_mix) -> str:
    """Return the name of a mixture; without one, the names of its datasets."""
    if isinstance(data_mix, str):
        return data_mix
    names = [what if isinstance(what, str) else what.name for what, _ in parse_mixture(data_mix)]
    return "+".join(names).replace("/", "_")


def names_of_folders(data_mix) -> list[str]:
    """Return the names of the datasets of a mixture that lie in --data_root_dir."""
    names = []
    for what, _ in parse_mixture(data_mix):
        if isinstance(what, str | oxe.Dataset):
            names.append(what if isinstance(what, str) else what.name)
    return names


def needs_folder(data_mix) -> bool:
    """Return True if a mixture has datasets that lie in --data_root_dir, and not only dataset objects."""
    return len(names_of_folders(data_mix)) > 0


def open_mixture(
    data_root_dir: str | Path,
    data_mix,
    split: str = "train",
    views: tuple[str, ...] = ("primary",),
    action_chunk: int = 1,
    hold_out: float = HOLD_OUT,
    skip_bad_records: bool = False,
    oft_state: bool = False,
    progress: Callable = no_progress,
) -> list[tuple[RobotDataset, float]]:
    """
    Return [(dataset, weight)].

    data_root_dir: a folder, or hf:owner/name, a repository of the hub (hub.py). data_mix: see `parse_mixture`.
    views: the cameras of datasets that formats/oxe.py describes, in their order; your own data names its cameras
        itself. action_chunk: K. hold_out: share of the episodes that is not trained on,
        where the data has no validation split. oft_state: read the robot's state as OpenVLA-OFT does.
    Raises ValueError or FileNotFoundError with the nearest names, or with what is missing.
    """
    if needs_folder(data_mix):
        data_root_dir = find_data(data_root_dir, names_of_folders(data_mix))

    mixture = []
    for what, weight in parse_mixture(data_mix):
        if not isinstance(what, str | oxe.Dataset):
            mixture.append((what.select(split, action_chunk, hold_out), weight))
            continue

        row = oxe.lookup(what) if isinstance(what, str) else what
        if oft_state:
            row = replace(row, state=row.state_oft)
        dataset = RLDS(
            data_root_dir,
            what if isinstance(what, str) else row.name,
            split=split,
            row=row,
            views=row.cameras or views,
            action_chunk=action_chunk,
            skip_bad_records=skip_bad_records,
            progress=progress,
            hold_out=hold_out,
        )
        mixture.append((dataset, weight))
    check_names([dataset for dataset, _ in mixture])
    return mixture


def check_names(datasets: list[RobotDataset]):
    """Raise ValueError if two datasets have the same name, under which a policy keeps their statistics."""
    names = [dataset.name for dataset in datasets]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"data_mix: {names.count(name)} datasets have the name {name!r}; set name= of each")


def check_cameras(datasets: list[RobotDataset], num_images: int | None = None) -> int:
    """
    Return how many images a sample of these datasets has. Raises ValueError if they differ, or if there are not
    `num_images` (None: any number).
    """
    cameras = {dataset.name: dataset.cameras for dataset in datasets}
    counts = {len(names) for names in cameras.values()}
    if len(counts) > 1:
        raise ValueError(f"the datasets give different numbers of images: {cameras}; name the cameras with cameras=")
    (count,) = counts
    if num_images is not None and count != num_images:
        raise ValueError(
            f"{count} images at a time, of the cameras {cameras}, but this model takes {num_images}; name "
            f"{num_images} with cameras= (your own data) or --views (datasets of formats/oxe.py)"
        )
    return count


# -----------------------------------------------------------------------------
# Mix and shuffle


def shuffled(i: int, n: int, key: int) -> int:
    """
    Return element i of a random permutation of range(n) that belongs to `key`. Needs no memory, whatever n is: a
    four-round Feistel network on the bits of i, applied again until the result is below n.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left = i >> half
        right = i & mask
        for r in range(4):
            h = (right * 0x9E3779B97F4A7C15 + key + r * 0xD1B54A32D192ED03) & 0xFFFFFFFFFFFFFFFF
            h = (h ^ (h >> 31)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
            mixed = left ^ ((h ^ (h >> 29)) & mask)
            left = right
            right = mixed
        i = (left << half) | right
        if i < n:
            return i


@lru_cache(maxsize=256)
def permutation_key(*parts: int) -> int:
    return int(np.random.default_rng(parts).integers(1 << 63))


class Mixture(Dataset):
    """
    The endless stream of training samples, by position.

    [position] -> images (V, S, S, 3) uint8, input_ids and labels (T,), actions (K, A) normalised, proprio (P,)
    normalised, dataset (its number). A dataset's share of the stream is its weight times its number of frames.
    """

    def __init__(
        self,
        parts: list[tuple[RobotDataset, float]],
        tokenizer: Tokenizer,
        image_size: int = 224,
        seed: int = 0,
        image_aug: bool = False,
        action_chunk: int = 1,
        max_tokens: int | None = None,
    ):
        """max_tokens: what the model's context has room for besides the images; None: no limit."""
        self.datasets = [dataset for dataset, _ in parts]
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.seed = seed
        self.image_aug = image_aug
        self.action_chunk = action_chunk
        self.max_tokens = max_tokens

        weights = np.array([weight for _, weight in parts], float)
        self.sizes = np.array([len(dataset) for dataset in self.datasets])
        weighted_sizes = weights * self.sizes
        if min(weights) < 0 or not weighted_sizes.sum() > 0:
            names = [dataset.name for dataset in self.datasets]
            raise ValueError(f"nothing to draw from {names}: frames {self.sizes.tolist()}, weights {weights.tolist()}")
        self.shares = weighted_sizes / weighted_sizes.sum()

    # Which frame stands at a position

    def drawn_before(self, block: int) -> np.ndarray:
        """Return how often each dataset is drawn before a block; rounded down, so no share is off by one sample."""
        return np.floor(self.shares * block * BLOCK + 1e-9).astype(int)

    @lru_cache(maxsize=4)  # noqa: B019
    def block_order(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return for each position of a block its dataset, and how many samples of that dataset came before it."""
        before = self.drawn_before(block)
        after = self.drawn_before(block + 1)
        datasets = np.repeat(np.arange(len(before)), after - before)
        datasets = np.random.default_rng((self.seed, block)).permutation(datasets)

        # Only the datasets are shuffled here. Within one, the order is that of its epochs: see `shuffled`.
        counters = np.empty_like(datasets)
        for d in range(len(before)):
            counters[datasets == d] = np.arange(before[d], after[d])
        return datasets, counters

    def locate(self, position: int) -> tuple[int, int, int]:
        """Position in the stream -> dataset number, frame number, epoch of that dataset."""
        # A block has BLOCK positions, less what the rounding left over. So the block that holds this position is
        # position // BLOCK or a later one.
        block = position // BLOCK
        while self.drawn_before(block + 1).sum() <= position:
            block += 1
        offset = position - int(self.drawn_before(block).sum())

        datasets, counters = self.block_order(block)
        dataset = int(datasets[offset])
        size = int(self.sizes[dataset])
        epoch, i = divmod(int(counters[offset]), size)

        # Each epoch of a dataset visits every frame once, in an order of its own.
        frame = shuffled(i, size, permutation_key(self.seed, dataset, epoch))
        return dataset, frame, epoch

    # The sample there

    def __getitem__(self, position: int) -> dict:
        dataset, frame, _ = self.locate(position)
        rng = np.random.default_rng((self.seed, position, 1)) if self.image_aug else None
        return self.sample(dataset, frame, rng)

    def sample(self, number: int, i: int, rng: np.random.Generator | None = None) -> dict:
        """Return frame i of a dataset as a training sample. rng: augment its images."""
        dataset = self.datasets[number]
        frame = dataset[i]

        # Images: decode, resize, augment.
        try:
            images = [to_image(picture, self.image_size) for picture in frame["pictures"]]
        except ValueError as error:
            raise ValueError(f"{dataset.name}: frame {i}: {error}") from None
        if rng is not None:
            images = [augment(image, rng) for image in images]

        # Actions and state: to [-1, 1].
        stats = dataset.statistics
        actions = normalize(frame["actions"], stats["action"], dataset.scheme)
        actions = pad_chunk(actions, dataset.absolute_mask, self.action_chunk)
        proprio = frame["proprio"]
        if "proprio" in stats:
            proprio = normalize(proprio, stats["proprio"], dataset.scheme)

        # Words and actions: to token ids.
        input_ids, labels = self.tokenizer.encode_example(frame["instruction"], actions)
        if self.max_tokens is not None and len(input_ids) > self.max_tokens:
            raise ValueError(
                f"{dataset.name}: frame {i}: instruction and action are {len(input_ids)} tokens, the model's context "
                f"has room for {self.max_tokens} beside the images; shorten the instruction or leave the episode out"
            )
        return {
            "images": np.stack(images),
            "input_ids": input_ids,
            "labels": labels,
            "dataset": number,
            "actions": actions.astype(np.float32),
            "proprio": proprio.astype(np.float32),
        }


def to_image(picture, size: int) -> np.ndarray:
    """Encoded bytes, a path or an (H, W, 3) array -> (size, size, 3) uint8, as the official pipeline's pixels."""
    image = decode(picture) if isinstance(picture, bytes) else to_rgb(picture)
    return resize_lanczos3(image, size)


def pad_chunk(actions: np.ndarray, absolute_mask, length: int) -> np.ndarray:
    """
    Return exactly `length` actions, (length, A), of those from one step to the end of its episode (n, A). Beyond the
    end an absolute dimension, such as the gripper, repeats its last value. A relative one is 0, the middle of its
    range, which need not mean standing still. (RLDS and OFT start no chunk that would need this.)
    """
    missing = length - len(actions)
    if missing <= 0:
        return actions[:length]
    padding = np.where(absolute_mask, actions[-1], np.float32(0))  # (A,)
    return np.concatenate([actions, np.tile(padding, (missing, 1))])


# -----------------------------------------------------------------------------
# Batches


def collate(samples: list[dict]) -> dict[str, torch.Tensor]:
    """
    Join samples to a batch: images (B, V, S, S, 3) uint8 (they are normalised on the device: a quarter of the bytes),
    input_ids and labels (B, T) int64 padded on the right, lengths (B,), actions (B, K, A) float32, proprio (B, P)
    float32, dataset (B,) int64.
    """
    input_ids, lengths = pad_sequences([sample["input_ids"] for sample in samples], PAD)
    labels, _ = pad_sequences([sample["labels"] for sample in samples], IGNORE_INDEX)
    batch = {
        "images": torch.from_numpy(np.stack([sample["images"] for sample in samples])),
        "input_ids": input_ids,
        "labels": labels,
        "lengths": lengths,
        "actions": torch.from_numpy(np.stack([sample["actions"] for sample in samples])),
        "dataset": torch.tensor([sample["dataset"] for sample in samples]),
    }
    state_sizes = {len(sample["proprio"]) for sample in samples}
    if len(state_sizes) == 1:  # mixtures of different robots have no common state
        batch["proprio"] = torch.from_numpy(np.stack([sample["proprio"] for sample in samples]))
    return batch


class Positions:
    """
    The positions of each micro-batch of one process, from a step on. Step s of a run takes the positions s G to
    s G + G - 1, where G is the batch size; a micro-batch is divided among the processes in their order. So the whole
    state of the data is the number of the step.
    """

    def __init__(self, batch_size: int, micro_batch_size: int, rank: int = 0, world_size: int = 1, start_step: int = 0):
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size
        self.start_step = start_step

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start_step
        first = self.rank * self.micro_batch_size
        stride = self.world_size * self.micro_batch_size
        while True:
            for offset in range(first, self.batch_size, stride):
                start = step * self.batch_size + offset
                yield list(range(start, start + self.micro_batch_size))
            step += 1

    def state_dict(self) -> dict:
        return {"step": self.start_step}

    def load_state_dict(self, state: dict):
        self.start_step = state["step"]


def make_loader(mixture: Mixture, positions: Positions, num_workers: int = 0, pin_memory: bool = False) -> DataLoader:
    """Return batches in the order of `positions`, whatever the number of workers."""
    context = None
    if num_workers:
        # Read by the workers: one core each, no more.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        # And by the C library of Linux: a worker keeps memory that it freed, because each image needs it again. To get
        # it back from the system costs a quarter of a sample's time.
        os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(64 * 2**20))
        os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(32 * 2**20))
        context = worker_context(mixture)
    return DataLoader(
        mixture,
        batch_sampler=positions,
        collate_fn=collate,
        num_workers=num_workers,
        multiprocessing_context=context,
        worker_init_fn=start_worker,
        pin_memory=pin_memory,
    )


def start_worker(worker: int):
    """Run first in each worker. worker: its number."""
    serve_main_process()


def worker_context(mixture: Mixture):
    """
    Return how to start workers: forked from a server process, which has neither CUDA nor threads. A class or a function
    that a config file defines cannot be sent there; then workers are forked from this process.
    """
    try:
        for dataset in mixture.datasets:
            pickle.dumps((type(dataset), dataset.user_code))
    except (pickle.PicklingError, AttributeError):
        return torch.multiprocessing.get_context("fork")
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data"])
    with ignored_signals():  # as the server inherits it
        forkserver.ensure_running()
    return context
