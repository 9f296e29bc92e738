"""
What a stopped run leaves, and how the next one continues it.

    runs/NAME/checkpoints/step-NNNNNN/    weights and optimizer, in the files of torch.distributed.checkpoint
    runs/NAME/checkpoints/step-NNNNNN/train.json    step, options, statistics of the data, fingerprint of the base

A step folder is written beside training, under another name, and renamed when it is whole: a process that is killed
leaves either all of it or nothing that counts. It can be read by any number of processes. Frozen weights are not in it:
the base checkpoint has them, or the seed of a random model.

https://docs.pytorch.org/docs/stable/distributed.checkpoint.html
"""

import errno
import io
import pickle
import shutil
import warnings
from concurrent.futures import Future
from pathlib import Path

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from checkpoint import EXPORT_RECORD
from distributed import barrier, is_main_process
from files import read_json_object, refuse_special, write_json
from formats.dataset import HOLD_OUT
from model import INDEX

# Options of train.py and finetune_*.py that a resumed run may not change: it would be another run.
FIXED_ON_RESUME = {
    "data_mix",
    "hold_out",
    "image_aug",
    "random_model",
    "train_parts",
    "short_head",
    "batch_size",
    "seed",
    "lora_rank",
    "lora_alpha",
    "lora_targets",
    "quantize_base",
    "action_chunk",
    "action_tokenizer",
    "fast_scale",
    "fast_vocab_size",
    "views",
    "use_proprio",
    "head",
    "film",
    "method",
    "environment",
    "starts",
    "rollouts",
    "groups",
    "most_draws",
    "epochs",
    "demo_share",
}

# Options that it may change, and says so.
REPORTED_ON_RESUME = {
    "max_steps",
    "lr",
    "schedule",
    "warmup_steps",
    "decay_step",
    "weight_decay",
    "beta2",
    "grad_clip",
    "bf16",
    "lora_dropout",
    "temperature",
    "clip_low",
    "clip_high",
}

TRAINED_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)


# -----------------------------------------------------------------------------
# One run at a time


def lock_run(run: Path):
    """
    Claim the run folder for this process. Returns what `unlock_run` takes. The lock ends with the process, however that
    ends. Raises ValueError if another process has it.
    """
    if not is_main_process() or fcntl is None:
        return None
    refuse_special(run / ".lock")
    file = open(run / ".lock", "a")  # not "w": if it is a link, what it leads to stays as it is
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise ValueError(
            f"{run}: another run is writing into this folder; wait for it, stop it, or give another --run_dir. "
            f"(Several processes of one run are started by torchrun.)"
        ) from None
    except OSError:
        pass  # a file system without locks
    return file


def unlock_run(lock):
    if lock is not None:
        lock.close()


def remove_leftovers(run: Path):
    """Delete what a killed save or export has left half written. To be called with the lock of the run."""
    if not is_main_process():
        return
    remove_unfinished(run)
    for folder in (run, run / "checkpoint"):
        for path in folder.glob(".*.tmp"):  # of files.atomic_write
            path.unlink(missing_ok=True)


def remove_unfinished(run: Path):
    """Delete checkpoints that are not whole."""
    for folder in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(folder, ignore_errors=True)


# -----------------------------------------------------------------------------
# Save and load


class Saver:
    """
    Writes the checkpoints of a run beside its training. `save` copies weights and optimizer, for which training stands
    still, and a thread writes the copy. The end of a `with` block waits for what is being written.
    """

    def __init__(self, run: Path, keep: int):
        """keep: how many checkpoints stay; the oldest beyond are deleted."""
        self.run = run
        self.keep = keep
        self.published: Future | None = None  # of the checkpoint that is being written
        # The thread must not mix its messages to other processes with those of training.
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        # The thread warns, too, so this filter stays on.
        ignore_one_process_warning()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_):
        self.wait()

    def save(self, step: int, model, optimizer, about: dict):
        """
        Begin to write checkpoints/step-NNNNNN. about: the rest of train.json, as `describe_run` returns it. Waits for
        the one before, and raises OSError if that could not be written.
        """
        self.wait()
        unfinished = self.run / "checkpoints" / f".step-{step:06d}"
        if is_main_process():
            shutil.rmtree(unfinished, ignore_errors=True)
        barrier()

        weights, moments = get_state_dict(model, optimizer, options=TRAINED_ONLY)
        state = {"model": weights, "optimizer": moments}
        published = Future()
        self.published = published
        writing = dcp.async_save(state, checkpoint_id=unfinished, process_group=self.group)
        writing.add_done_callback(lambda writing: self.publish(writing, unfinished, step, about, published))

    def publish(self, writing: Future, unfinished: Path, step: int, about: dict, published: Future):
        """Make a checkpoint count, now that every process has written its files. This runs in the thread."""
        try:
            writing.result()
            if is_main_process():
                write_json(unfinished / "train.json", {"step": step, **about})
                final = unfinished.with_name(f"step-{step:06d}")
                shutil.rmtree(final, ignore_errors=True)
                unfinished.rename(final)
                for old in complete_checkpoints(self.run)[: -self.keep]:
                    shutil.rmtree(old)
            published.set_result(step)
        except BaseException as error:  # torch's CheckpointException is no Exception
            published.set_exception(error)

    def check(self):
        """Raise what went wrong in the thread, if something did. Does not wait."""
        if self.published and self.published.done():
            self.wait()

    def wait(self):
        """Wait until nothing is being written. Raises OSError if the disk was full."""
        if not self.published:
            return
        published = self.published
        self.published = None
        try:
            published.result()
        except (Exception, CheckpointException) as error:
            if not is_disk_problem(error, self.run):
                raise
            remove_unfinished(self.run)
            raise OSError(
                f"{self.run / 'checkpoints'}: a step could not be saved, the disk is full (or files may not grow so "
                f"large); make room and run the same command again, it continues from the checkpoint before"
            ) from None


def ignore_one_process_warning():
    """Silence a warning of torch.distributed.checkpoint: that there is one process is meant so."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def is_disk_problem(error: BaseException | None, run: Path) -> bool:
    """True if an error, or one that it came from, says that a file could not grow; or if next to nothing is free."""
    if isinstance(error, CheckpointException):
        return any(is_disk_problem(cause, run) for cause, _ in error.failures.values())
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            return True
        if "unexpected pos" in str(error):  # all that torch's writer says when the end of a file cannot be written
            return True
        error = error.__cause__ or error.__context__
    return shutil.disk_usage(run).free < 10**6


def load_checkpoint(folder: Path, model, optimizer) -> int:
    """Read a step folder into the model and the optimizer. Returns the number of steps done."""
    weights, moments = get_state_dict(model, optimizer, options=TRAINED_ONLY)
    state = {"model": weights, "optimizer": moments}
    reader = DataOnlyReader(folder)
    reader.read_metadata()  # first by itself, as dcp.load wraps its error
    try:
        with warnings.catch_warnings():
            ignore_one_process_warning()
            dcp.load(state, storage_reader=reader, planner=DataOnlyPlanner())
    except CheckpointException as error:
        messages = [str(cause) or type(cause).__name__ for cause, _ in error.failures.values()]
        causes = {message.splitlines()[0] for message in messages}
        raise ValueError(
            f"{folder}: cannot be resumed from, {'; '.join(sorted(causes))}. Nothing of it was run. Give another "
            f"--resume folder, or --resume never to start anew"
        ) from None
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=TRAINED_ONLY,
    )
    return read_train_record(folder)["step"]


def read_train_record(folder: Path) -> dict:
    """Read the train.json of a step folder. Raises ValueError if it is none."""
    record = read_json_object(folder / "train.json")
    kinds = {"step": int, "config": dict, "statistics": dict}
    for key, kind in kinds.items():
        if not isinstance(record.get(key), kind):
            raise ValueError(
                f"{folder / 'train.json'}: {key} is {record.get(key)!r:.80}, expected a {kind.__name__}; give another "
                f"--resume folder, or --resume never to start anew"
            )
    return record


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
# Read a step folder without running code from it
#
# torch.distributed.checkpoint keeps its index (.metadata) and numbers such as the learning rate as pickles. A pickle
# can name any function of Python and have it called. So only the classes that describe tensors are let through.


class DataOnlyUnpickler(pickle._Unpickler):
    """
    Read a pickle that holds nothing but the description of tensors. Raises UnpicklingError for anything else. This is
    the unpickler in Python: with that in C, a file of eight bytes can take all memory (it numbers an object 2**31).
    """

    ALLOWED = {
        "torch.distributed.checkpoint.metadata": {
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size", "device"},
        "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
        "collections": {"OrderedDict"},
    }

    def find_class(self, module: str, name: str):
        if module == "pathlib._local":  # what Python 3.13 calls pathlib, and no other
            module = "pathlib"
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in self.ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


class DataOnlyReader(FileSystemReader):
    """Read the files of a step folder, with an index that may only describe tensors inside this folder."""

    def read_metadata(self, *args, **kwargs) -> Metadata:
        path = Path(self.path) / ".metadata"
        refuse_special(path)
        try:
            with open(path, "rb") as file:
                metadata = DataOnlyUnpickler(file).load()
            if not isinstance(metadata, Metadata):
                raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}")
            for info in metadata.storage_data.values():
                if Path(info.relative_path).name != info.relative_path:
                    raise pickle.UnpicklingError(f"it points to {info.relative_path}, outside the folder")
                refuse_special(Path(self.path) / info.relative_path)
        except FileNotFoundError:
            raise
        except Exception as error:  # a broken pickle raises all kinds
            raise ValueError(
                f"{path}: refused, {error}; it must hold the description of tensors only. Nothing of it was run. "
                f"Give another --resume folder, or --resume never to start anew"
            ) from None
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class DataOnlyPlanner(DefaultLoadPlanner):
    """Read the entries that are no tensors (learning rate, betas, ...) with nothing but plain values allowed."""

    def load_bytes(self, read_item, value: io.BytesIO) -> None:
        plain = torch.load(value, weights_only=True)

        # The base class unpickles whatever it is given. So it gets the checked values, written anew.
        checked = io.BytesIO()
        torch.save(plain, checked)
        checked.seek(0)
        super().load_bytes(read_item, checked)


# -----------------------------------------------------------------------------
# Which checkpoint to continue, and whether it is the same run


def complete_checkpoints(run: Path) -> list[Path]:
    """Return the complete step folders of a run, oldest first. (By number: as text, step-1000000 is before step-2.)"""
    folders = [path.parent for path in (run / "checkpoints").glob("step-*/train.json")]
    return sorted(folders, key=step_of)


def step_of(folder: Path) -> int:
    """Return the number of a step folder."""
    return int(folder.name.removeprefix("step-"))


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
    before = read_train_record(folder)
    if without_notes(before["statistics"]) != without_notes(statistics):
        raise ValueError(
            f"{folder}: trained with statistics of {sorted(before['statistics'])} that are not those of the data now, "
            f"{sorted(statistics)}; give the same data, or --resume never to start anew"
        )

    # An option that is newer than the run had its default, but hold_out, which was fixed.
    defaults = {**printable(type(cfg)()), "hold_out": HOLD_OUT}
    options_before = {**defaults, **before["config"]}
    for key, value in printable(cfg).items():
        if options_before[key] == value:
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
    """
    Raise ValueError if the frozen weights are not those that the step folder was trained with. The folder of the base
    may have another name than then. base: the fingerprint of its weights now.
    """
    before = read_train_record(folder)
    folder_before = before["config"]["base_checkpoint"]
    recorded = before.get("base")
    if recorded and recorded != base:
        raise ValueError(
            f"{folder}: its frozen parts are not the weights that {base_checkpoint} holds now (the run began with "
            f"{folder_before}); give the same --base_checkpoint, or another --run_dir"
        )
    is_same_folder = Path(folder_before).resolve() == Path(base_checkpoint).resolve()
    if not recorded and not is_same_folder:  # older runs recorded the folder only
        raise ValueError(
            f"{folder}: its frozen parts are in {folder_before}, not in {base_checkpoint}; give that --base_checkpoint"
        )


def without_notes(statistics: dict) -> dict:
    """Return statistics without what older runs did not write beside them."""
    notes = ("scheme", "action_names")
    without = {}
    for name, entry in statistics.items():
        without[name] = {key: value for key, value in entry.items() if key not in notes}
    return without


def archive_later_checkpoints(run: Path, step: int):
    """
    Move the checkpoints of later steps away, now that the run continues from `step`: they belong to another course of
    it, and would be taken for its newest.
    """
    later = [folder for folder in complete_checkpoints(run) if step_of(folder) > step]
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
    exports = (run / "checkpoint" / INDEX, run / EXPORT_RECORD)
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
