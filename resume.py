"""
What a stopped run leaves, and how the next one continues it.

    runs/NAME/checkpoints/step-NNNNNN/    weights and optimizer, in the files of torch.distributed.checkpoint
    runs/NAME/checkpoints/step-NNNNNN/train.json    step, options, statistics of the data, fingerprint of the base

A step folder is written under another name and renamed when it is whole: a process that is killed leaves either all of
it or nothing that counts. It can be read by any number of processes. Frozen weights are not in it: the base checkpoint
has them.

https://docs.pytorch.org/docs/stable/distributed.checkpoint.html
"""

import shutil
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from checkpoint import ADAPTER_WEIGHTS
from distributed import barrier, is_main_process
from files import read_json, write_json
from formats.dataset import HOLD_OUT
from model import INDEX

# Options of train.py and finetune_*.py that a resumed run may not change: it would be another run.
FIXED_ON_RESUME = {
    "data_mix", "hold_out", "image_aug", "random_model", "train_parts", "batch_size", "seed",
    "lora_rank", "lora_alpha", "lora_targets", "quantize_base",
    "action_chunk", "views", "use_proprio", "head", "film",
}  # fmt: skip

# Options that it may change, and says so.
REPORTED_ON_RESUME = {
    "max_steps", "lr", "schedule", "warmup_steps", "decay_step", "weight_decay", "beta2", "grad_clip", "bf16",
    "lora_dropout",
}  # fmt: skip

TRAINED_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)


# -----------------------------------------------------------------------------
# Save and load


def save_checkpoint(run: Path, step: int, model, optimizer, about: dict, keep: int):
    """
    Write checkpoints/step-NNNNNN of a run, then delete the oldest beyond `keep`. about: the rest of train.json, as
    `describe_run` returns it.
    """
    final = run / "checkpoints" / f"step-{step:06d}"
    unfinished = run / "checkpoints" / f".step-{step:06d}"
    if is_main_process():
        shutil.rmtree(unfinished, ignore_errors=True)
    barrier()

    weights, moments = get_state_dict(model, optimizer, options=TRAINED_ONLY)
    with no_single_process_warning():
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=unfinished)

    if is_main_process():
        write_json(unfinished / "train.json", {"step": step, **about})
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
        for old in complete_checkpoints(run)[:-keep]:
            shutil.rmtree(old)
    barrier()


def load_checkpoint(folder: Path, model, optimizer) -> int:
    """Read a step folder into the model and the optimizer. Returns the number of steps done."""
    weights, moments = get_state_dict(model, optimizer, options=TRAINED_ONLY)
    state = {"model": weights, "optimizer": moments}
    with no_single_process_warning():
        dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=TRAINED_ONLY,
    )
    return read_json(folder / "train.json")["step"]


@contextmanager
def no_single_process_warning():
    """Silence a warning of torch.distributed.checkpoint: that there is one process is meant so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def describe_run(cfg, statistics: dict, base: str) -> dict:
    """Return what train.json says besides the step. base: the fingerprint of the base checkpoint, or ""."""
    return {"config": printable(cfg), "statistics": statistics, "base": base}


def printable(cfg) -> dict:
    """Return the options as JSON can hold them."""
    plain = str | int | float | bool | dict
    return {key: value if isinstance(value, plain) else str(value) for key, value in asdict_shallow(cfg).items()}


def asdict_shallow(cfg) -> dict:
    """Return the fields of a dataclass; datasets among them stay what they are."""
    return {name: getattr(cfg, name) for name in cfg.__dataclass_fields__}


# -----------------------------------------------------------------------------
# Which checkpoint to continue, and whether it is the same run


def complete_checkpoints(run: Path) -> list[Path]:
    """Return the complete step folders of a run, oldest first."""
    return sorted(path.parent for path in (run / "checkpoints").glob("step-*/train.json"))


def checkpoint_to_resume(run: Path, resume: str) -> Path | None:
    """Return the step folder that --resume means: auto (the newest of the run), never (None), or a folder."""
    if resume == "never":
        return None
    if resume != "auto":
        return Path(resume)
    folders = complete_checkpoints(run)
    return folders[-1] if folders else None


def check_same_run(folder: Path, cfg, statistics: dict):
    """
    Raise ValueError if this run is not the one that wrote the step folder: other data, or another option of
    FIXED_ON_RESUME. Print what else has changed.
    """
    before = read_json(folder / "train.json")
    if without_scheme(before["statistics"]) != without_scheme(statistics):
        raise ValueError(
            f"{folder}: trained with statistics of {sorted(before['statistics'])} that are not those of the data now, "
            f"{sorted(statistics)}; give the same data, or --resume never to start anew"
        )

    options_before = {"hold_out": HOLD_OUT, **before["config"]}  # older runs do not name hold_out, which was fixed
    for key, value in printable(cfg).items():
        if key not in options_before or options_before[key] == value:
            continue
        if " at 0x" in f"{options_before[key]}{value}":  # an object, which has no lasting name
            continue

        if key in FIXED_ON_RESUME:
            raise ValueError(
                f"{folder}: trained with {key} {options_before[key]!r}, now it is {value!r}; give the same, or another "
                f"--run_dir, or --resume never to start anew"
            )
        if key in REPORTED_ON_RESUME and is_main_process():
            print(f"from here on {key} is {value!r}, it was {options_before[key]!r}")


def check_same_base(folder: Path, base_checkpoint: str, base: str):
    """Raise ValueError if the frozen weights are not those that the step folder was trained with."""
    before = read_json(folder / "train.json")
    if before["config"]["base_checkpoint"] != base_checkpoint:
        raise ValueError(
            f"{folder}: its frozen parts are in {before['config']['base_checkpoint']}, not in {base_checkpoint}; give "
            f"that --base_checkpoint"
        )
    if before.get("base", base) != base:
        raise ValueError(f"{folder}: its frozen parts are not the weights that {base_checkpoint} holds now")


def without_scheme(statistics: dict) -> dict:
    """Return statistics without their `scheme` entry, which older runs did not write."""
    return {name: {key: value for key, value in entry.items() if key != "scheme"} for name, entry in statistics.items()}


def archive_later_checkpoints(run: Path, step: int):
    """
    Move the checkpoints of later steps away, now that the run continues from `step`: they belong to another course of
    it, and would be taken for its newest.
    """
    later = [folder for folder in complete_checkpoints(run) if int(folder.name.removeprefix("step-")) > step]
    if later and is_main_process():
        n = 1
        while (run / f"checkpoints-before-{n}").exists():
            n += 1
        archive = run / f"checkpoints-before-{n}"
        archive.mkdir()
        for folder in later:
            folder.rename(archive / folder.name)
        print(f"checkpoints beyond step {step} are now in {archive}")
    barrier()


def is_exported(run: Path, saved: Path) -> bool:
    """True if the model (or adapter) that sample.py reads is there, and is newer than a step folder."""
    saved_at = (saved / "train.json").stat().st_mtime
    exports = (run / "checkpoint" / INDEX, run / ADAPTER_WEIGHTS)
    return any(path.is_file() and path.stat().st_mtime >= saved_at for path in exports)


def check_disk(run: Path, num_trained: int, num_exported: int, keep: int):
    """Raise OSError if the disk has no room for `keep` + 1 checkpoints and an export, given numbers of parameters."""
    bytes_per_trained = 12  # weight and two moments of AdamW, float32
    needed = num_trained * bytes_per_trained * (keep + 1) + num_exported * 4
    free = shutil.disk_usage(run).free
    if free < needed:
        raise OSError(
            f"{run}: {keep + 1} checkpoints and the export need {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f}"
        )
