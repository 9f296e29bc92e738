"""
What is in this checkpoint folder, and is it complete?

    checkpoint = open_checkpoint("openvla-7b")
    checkpoint.config, checkpoint.norm_stats, checkpoint.tokenizer, checkpoint.processor, checkpoint.is_oft, ...

`open_checkpoint` reads config.json, the index and the headers of the safetensors files (8 bytes of length, JSON, data;
https://github.com/huggingface/safetensors), and compares every name, shape and file size with what config.json
describes. It raises ValueError or FileNotFoundError that says what was found, what was expected and how to fix it.
No weight is loaded, and no code of the folder is run. What it learned is kept in a record, so that nobody asks twice.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open

from files import read_json, write_json
from image import CROPPED, ImageProcessor
from model import INDEX, OpenVLA, OpenVLAConfig, is_unused, read_config
from speed.quantize import use_quantized_layers
from tokenizer import Tokenizer, prompt_for

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
OFT_RECORD = "oft_config.json"
EXPORT_RECORD = "export.json"  # of a LoRA or OFT run: a fingerprint of each file of its last complete export
STATISTICS = "dataset_statistics.json"


@dataclass
class Checkpoint:
    """
    A checkpoint folder that is complete: a model in Hugging Face layout, a LoRA run with its base, or either of them
    with the components of OpenVLA-OFT beside it.
    """

    folder: Path
    base: Path | None  # the base checkpoint of a LoRA run; None for any other folder
    config: OpenVLAConfig
    skeleton: OpenVLA  # the model without weights, on the meta device
    weight_map: dict[str, Path]  # tensor name -> the file that holds it
    is_oft: bool

    @property
    def norm_stats(self) -> dict:
        """unnorm_key -> statistics of that dataset, which give actions their units."""
        return self.config.extra["norm_stats"]

    @property
    def quantization(self) -> dict | None:
        """{"bits", "group"} of a folder with 8 or 4 bit weights, else None."""
        return self.config.extra.get("quantization")

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype that config.json says the weights are in. Raises ValueError if it names none."""
        name = str(self.config.extra.get("torch_dtype", "bfloat16"))
        dtype = getattr(torch, name, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(
                f"{self.folder}: config.json has torch_dtype {name!r}; it must be bfloat16, float32 or float16"
            )
        return dtype

    @cached_property
    def tokenizer(self) -> "Tokenizer":
        """The tokenizer with the prompt of this model. Raises FileNotFoundError or ValueError."""
        return Tokenizer(self.folder_with("tokenizer.model"), prompt_for(self.config.extra))

    @cached_property
    def processor(self) -> ImageProcessor:
        """The image processor. Raises FileNotFoundError or ValueError."""
        processor = ImageProcessor.from_pretrained(self.folder_with("preprocessor_config.json"))
        if self.is_oft and not processor.trained_on:
            # Released OFT folders do not record it, but all of them were trained on random crops.
            processor.trained_on = CROPPED
        return processor

    def folder_with(self, file: str) -> Path:
        """The folder that has `file`: this one, or the base of a LoRA run that does not bring its own."""
        if self.base and not (self.folder / file).is_file():
            return self.base
        return self.folder

    def refuse_quantized(self):
        """Raise ValueError for a quantized folder: training, merging, adapters and OFT need the weights themselves."""
        if self.quantization:
            raise ValueError(
                f"{self.folder} is quantized, for inference only; take the checkpoint that it was made from"
            )


# -----------------------------------------------------------------------------
# Open a folder


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """
    Check that a folder is complete, and return what is known about it. A LoRA run is checked with its base, and has the
    statistics of the data that it was trained on, not those of the base.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such checkpoint folder")
    base = base_of(folder)
    if base:
        return open_lora_run(folder, base)

    if not (folder / "config.json").is_file():
        hint = "; convert_weights.py turns .pt checkpoints into this layout" if list(folder.rglob("*.pt")) else ""
        raise FileNotFoundError(f"{folder}: not a checkpoint in Hugging Face layout, it has no config.json{hint}")
    try:
        config = OpenVLAConfig.from_dict(read_config(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder}: config.json or {STATISTICS} cannot be used ({error})") from None

    with torch.device("meta"):
        skeleton = OpenVLA(config)
    if config.extra.get("quantization"):
        use_quantized_layers(skeleton, config.extra["quantization"])
    weight_map = check_tensors(folder, skeleton)
    return Checkpoint(folder, None, config, skeleton, weight_map, is_oft(folder))


def open_lora_run(folder: Path, base: Path) -> Checkpoint:
    """Check an adapter and its base checkpoint."""
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder / ADAPTER_WEIGHTS}: missing beside {ADAPTER_CONFIG}")
    read_header(folder / ADAPTER_WEIGHTS)
    check_export(folder)

    checkpoint = open_checkpoint(base)
    checkpoint.refuse_quantized()
    config = checkpoint.config
    if (folder / STATISTICS).is_file():
        config.extra["norm_stats"] = read_json(folder / STATISTICS)
    return Checkpoint(folder, base, config, checkpoint.skeleton, checkpoint.weight_map, is_oft(folder))


def check_tensors(folder: Path, skeleton: OpenVLA) -> dict[str, Path]:
    """Compare all tensors of a folder with those of the model. Returns tensor name -> file."""
    missing = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    weight_map = {}
    for path in weight_files(folder):
        for name, shape in read_header(path).items():
            weight_map[name] = path
            if is_unused(name, skeleton.cfg):
                continue

            if name not in missing:
                raise ValueError(f"{path}: unexpected tensor {name} {shape}; config.json describes another model")
            expected = missing.pop(name)
            if shape != expected:
                raise ValueError(f"{path}: tensor {name} has shape {shape}, config.json makes it {expected}")
    if missing:
        first = next(iter(missing))
        raise ValueError(f"{folder}: {len(missing)} tensors are in no weight file, the first is {first}")
    return weight_map


def is_oft(folder: str | Path) -> bool:
    """True if the folder holds a policy of oft.py, ours or an official one."""
    folder = Path(folder)
    return (folder / OFT_RECORD).is_file() or any(folder.glob("action_head--*"))


def base_of(folder: str | Path) -> Path | None:
    """
    The base checkpoint of a LoRA run, from its adapter_config.json; None for a folder that is no LoRA run. The name
    that stands there is looked for as it is, inside the run and beside it. Raises FileNotFoundError.
    """
    folder = Path(folder)
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        return None

    name = read_json(file).get("base_model_name_or_path") or ""
    if name:
        for place in (Path(name).expanduser(), folder / name, folder.parent / Path(name).name):
            if place.is_dir():
                return place
    raise FileNotFoundError(f"{file}: the base checkpoint {name!r} is not there; set base_model_name_or_path to it")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those that its index names, or model.safetensors."""
    index = folder / INDEX
    if index.is_file():
        refuse_pointer(index)
        try:
            names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        except (ValueError, KeyError) as error:
            raise ValueError(f"{index}: not an index of weight files ({error!r}); download it again") from None
        hint = f"named by {INDEX}"
    else:
        names = {"model.safetensors"}
        hint = f"and there is no {INDEX}"

    for name in sorted(names):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: weight file missing, {hint}; download it again")
    return [folder / name for name in sorted(names)]


def fingerprint(folder: str | Path) -> str:
    """A hash of a checkpoint's weights: sixteen places of each file, as reading all of it would take minutes."""
    return fingerprint_files(weight_files(Path(folder)))


def fingerprint_files(paths: list[Path]) -> str:
    """Return a hash of names, sizes and sixteen places of some files."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for i in range(16):
                file.seek(i * size // 16)
                digest.update(file.read(4096))
    return digest.hexdigest()[:16]


# -----------------------------------------------------------------------------
# Exports of several files: an adapter and, of OFT, the components that were trained with it


@contextmanager
def complete_export(run: Path) -> Iterator[None]:
    """
    Wrap the writing of all files of an export. A process that is killed in between leaves no record, and the folder is
    refused instead of being loaded as a mixture of old and new files.
    """
    (run / EXPORT_RECORD).unlink(missing_ok=True)
    yield
    write_json(run / EXPORT_RECORD, {path.name: fingerprint_files([path]) for path in export_files(run)})


def export_files(run: Path) -> list[Path]:
    """Return the files of an export that belong together."""
    names = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, OFT_RECORD, STATISTICS)
    return [run / name for name in names if (run / name).is_file()] + sorted(run.glob("*--*_checkpoint.pt"))


def check_export(folder: Path):
    """Raise ValueError if the files of a run's export do not belong together. Adapters of others have no record."""
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        metadata = file.metadata() or {}
    if "record" not in metadata:
        return
    expected = read_json(folder / EXPORT_RECORD) if (folder / EXPORT_RECORD).is_file() else {}
    found = {path.name: fingerprint_files([path]) for path in export_files(folder)}
    if found != expected:
        raise ValueError(
            f"{folder}: its export is not complete, or is being written; wait for the run, or give its command again"
        )


# -----------------------------------------------------------------------------
# Headers of safetensors files


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor in a safetensors file. Raises ValueError if the file is not whole."""
    _, layout = read_layout(path)
    return {name: tuple(entry["shape"]) for name, entry in layout.items()}


def read_layout(path: Path) -> tuple[int, dict[str, dict]]:
    """
    Return where the data of a safetensors file begins, and name -> {dtype, shape, data_offsets} (bytes from there).
    Raises ValueError if the file is not whole.
    """
    refuse_pointer(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > size:
            raise ValueError(f"{path}: cut off or no safetensors file, {size:,} bytes; download it again")
        text = file.read(length)

    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        for entry in header.values():
            entry["shape"]  # a KeyError here means that it is some other JSON
        ends = [entry["data_offsets"][1] for entry in header.values()]
        expected = 8 + length + max(ends, default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: no safetensors file, its header cannot be read; download it again") from None
    if size != expected:
        raise ValueError(f"{path}: {size:,} bytes where {expected:,} are expected; download it again")
    return 8 + length, header


def refuse_pointer(path: Path):
    """Raise ValueError for a Git LFS pointer, which git leaves in place of a large file."""
    with open(path, "rb") as file:
        start = file.read(40)
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` in {path.parent}")
