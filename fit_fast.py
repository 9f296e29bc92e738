"""
Which action tokens a run has: 256 bins, or a FAST tokenizer, which is fitted to the run's own data before it starts.

    chunks of all datasets, normalised -> FAST.fit -> runs/NAME/fast     and printed: what rounding costs

train.py and finetune_lora.py ask this file (`--action_tokenizer fast --action_chunk 8`). The tokenizer lies in the run
folder from the first step on, so a resumed run has the same one. What was fitted to the same chunks once is not fitted
again: it lies in the cache folder, as the index of a dataset may.

Axes: n chunks, K actions of a chunk, A action dimensions.
"""

import hashlib
from pathlib import Path

import numpy as np

from distributed import barrier, is_main_process
from fast import FAST, FAST_FOLDER, MAX_VOCAB, remove_pretrained
from formats.dataset import END_EFFECTOR, RobotDataset
from formats.rlds_index import cache_folder
from normalize import UNITS, normalize, unnormalize
from progress import show_progress

MOST_NUMBERS = 500_000  # in the chunks that a tokenizer is fitted to: more takes minutes and changes little
NUM_TRIED = 500  # chunks of each dataset on which the costs are measured


def choose_action_tokenizer(
    cfg, run: Path, datasets: list[RobotDataset], of_base: FAST | None, resumed: Path | None
) -> FAST | None:
    """
    Return the FAST tokenizer of a run; None: bins, the tokens of one action.

    cfg: of train.py. of_base: that of the base checkpoint. resumed: the step folder that the run continues from.
    The main process makes it, the others read it. Raises ValueError or OSError that names the option or the file.
    """
    kind = cfg.action_tokenizer or ("base" if of_base else "bins")
    if kind == "bins":
        if cfg.action_chunk != 1:
            raise ValueError(
                f"--action_chunk {cfg.action_chunk}: bins are the tokens of one action; give --action_tokenizer fast, "
                f"or train with finetune_oft.py"
            )
        return None

    action_dim = common_action_dim(datasets)
    if is_main_process():
        if resumed:
            fast = FAST.from_pretrained(resumed.parent.parent / FAST_FOLDER)
        elif kind == "base":
            fast = of_base
        elif kind == "fast":
            fast = fit_to_data(cfg, datasets)
        else:
            fast = FAST.from_pretrained(kind)
        try:
            fast = fast.for_shape(cfg.action_chunk, action_dim)
        except ValueError as error:
            raise ValueError(f"--action_tokenizer {kind}, --action_chunk {cfg.action_chunk}: {error}") from None
        if fast.vocab_size > MAX_VOCAB:
            raise ValueError(
                f"--action_tokenizer {kind}: it has {fast.vocab_size} tokens, the language model has {MAX_VOCAB} ids "
                f"to give away; fit one to your data (--action_tokenizer fast)"
            )
        fast.save_pretrained(run / FAST_FOLDER)
        if not resumed:
            for dataset in datasets:
                print_costs(fast, dataset, cfg.hold_out)
    barrier()
    return FAST.from_pretrained(run / FAST_FOLDER)


def save_action_tokenizer(fast: FAST | None, folder: Path):
    """Write the action tokens of a checkpoint into its folder. None, of bins: remove those of an earlier run there."""
    if fast:
        fast.save_pretrained(folder / FAST_FOLDER)
    else:
        remove_pretrained(folder / FAST_FOLDER)


def common_action_dim(datasets: list[RobotDataset]) -> int:
    """Return A of all datasets. Raises ValueError if they differ."""
    sizes = {dataset.name: len(dataset.statistics["action"]["q01"]) for dataset in datasets}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"--action_tokenizer: a FAST tokenizer is for actions of one size, the datasets have {sizes}")
    return sizes[datasets[0].name]


# -----------------------------------------------------------------------------
# Fit


def fit_to_data(cfg, datasets: list[RobotDataset]) -> FAST:
    """Fit a tokenizer to chunks of all datasets, as many of each. What was fitted before is read."""
    numbers_of_all = cfg.action_chunk * common_action_dim(datasets) * len(datasets)
    most = max(MOST_NUMBERS // numbers_of_all, 1)
    chunks = [normalized_chunks(dataset, cfg.action_chunk, cfg.hold_out, most) for dataset in datasets]
    chunks = np.concatenate(chunks)

    key = hashlib.sha256(chunks.tobytes())
    key.update(f"{chunks.shape} {cfg.fast_scale} {cfg.fast_vocab_size}".encode())
    folder = cache_folder() / f"fast-{key.hexdigest()[:16]}"
    try:
        return FAST.from_pretrained(folder)
    except (OSError, ValueError):
        pass  # not there, or damaged

    try:
        fast = FAST.fit(chunks, cfg.fast_scale, cfg.fast_vocab_size, show_progress)
    except ValueError as error:
        raise ValueError(f"--fast_scale, --fast_vocab_size: {error}") from None
    try:
        fast.save_pretrained(folder)
    except OSError:
        pass  # a cache that cannot be written costs time, no more
    return fast


def normalized_chunks(dataset: RobotDataset, action_chunk: int, hold_out: float, most: int) -> np.ndarray:
    """
    Return up to `most` chunks of a dataset's training episodes, (n, K, A) in [-1, 1], from all over it. No image is
    read. They are those of data.py, except that they step over frames that the dataset leaves out of its episodes.
    """
    actions, episodes = dataset.select("train", 1, hold_out).all_actions()
    if episodes is None:
        episodes = np.arange(len(actions))  # each frame stands alone
    num_windows = max(len(actions) - action_chunk + 1, 0)
    is_start = episodes[:num_windows] == episodes[len(episodes) - num_windows :]  # first and last action in one episode
    starts = np.flatnonzero(is_start)
    if len(starts) > most:
        starts = starts[np.linspace(0, len(starts) - 1, most).astype(int)]
    chunks = np.asarray(actions)[starts[:, None] + np.arange(action_chunk)]
    return normalize(chunks, dataset.statistics["action"], dataset.scheme)


# -----------------------------------------------------------------------------
# What it costs


def print_costs(fast: FAST, dataset: RobotDataset, hold_out: float):
    """Print what becomes of the chunks of a dataset: how many tokens, what rounding changes, and what is clamped."""
    chunks = normalized_chunks(dataset, fast.time_horizon, hold_out, NUM_TRIED)
    before = fast.num_clamped
    rows = [fast.encode(chunk) for chunk in chunks]
    clamped = fast.num_clamped - before
    decoded = np.stack([fast.decode(row) for row in rows])

    # In robot units the same error is another number in each dimension.
    stats = dataset.statistics["action"]
    in_units = unnormalize(decoded, stats, dataset.scheme) - unnormalize(chunks, stats, dataset.scheme)
    is_end_effector = dataset.action_names == END_EFFECTOR
    parts = []
    for name, error in zip(dataset.action_names, rms(in_units, axis=(0, 1)), strict=True):
        unit = UNITS[name] if is_end_effector else ""
        parts.append(f"{name} {error:.2g} {unit}".strip())

    length = np.mean([len(row) for row in rows])
    K, A = chunks.shape[1:]
    error = decoded - chunks
    print(f"FAST, {dataset.name}: {K} x {A} numbers are {length:.1f} tokens of {fast.vocab_size} (bins: {K * A})")
    print(
        f"FAST, {dataset.name}: rounding changes a number of -1 ... 1 by {rms(error):.4f} (root mean square; at most "
        f"{np.abs(error).max():.4f}), in units: {', '.join(parts)}"
    )
    if clamped:
        print(
            f"warning: FAST, {dataset.name}: {clamped / chunks.size:.2%} of the coefficients are beyond what the "
            f"tokenizer was fitted to, and clamped; fit one to this data (--action_tokenizer fast)"
        )


def rms(error: np.ndarray, axis=None):
    """Return the root mean square."""
    return np.sqrt((error**2).mean(axis=axis))
