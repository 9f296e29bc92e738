"""
Is this folder a whole checkpoint? Every name, shape and file size is compared before any weight is read.

`check_folder` reads config.json, the index and the headers of the safetensors files (8 bytes of length, JSON, data;
https://github.com/huggingface/safetensors), and raises ValueError or FileNotFoundError saying what was found, what was
expected and how to mend it. No weight is loaded and no code of the folder is run.
"""

import hashlib
import json
from pathlib import Path

import torch

from model import INDEX, OpenVLA, OpenVLAConfig, is_unused, read_config

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OFT_RECORD = "oft_config.json"


def is_oft(folder: str | Path) -> bool:
    """Whether the folder holds a policy of oft.py, ours or an official one."""
    return (Path(folder) / OFT_RECORD).is_file() or any(Path(folder).glob("action_head--*"))


def base_of(folder: str | Path) -> Path | None:
    """The base checkpoint of a LoRA run, from its adapter_config.json; None for a folder that is no LoRA run."""
    file = Path(folder) / ADAPTER_CONFIG
    if not file.is_file():
        return None
    name = json.loads(file.read_text("utf-8")).get("base_model_name_or_path") or ""
    places = [Path(name).expanduser(), Path(folder) / name, Path(folder).parent / Path(name).name]
    if found := next((p for p in places if name and p.is_dir()), None):
        return found
    raise FileNotFoundError(f"{file}: the base checkpoint {name!r} is not there; set base_model_name_or_path to it")


def home_of(folder: str | Path, file: str) -> Path:
    """The folder that has `file`: this one, or the base of a LoRA run that does not bring its own."""
    return Path(folder) if (Path(folder) / file).is_file() else base_of(folder) or Path(folder)


def check_folder(folder: str | Path) -> OpenVLAConfig:
    """
    Raise if `OpenVLA.from_pretrained(folder)` could not load; else the model's config. A LoRA run is checked with its
    base, and has the statistics of the data that it was trained on, not the base's.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such checkpoint folder")
    if base := base_of(folder):
        if not (folder / ADAPTER_WEIGHTS).is_file():
            raise FileNotFoundError(f"{folder / ADAPTER_WEIGHTS}: missing beside {ADAPTER_CONFIG}")
        read_header(folder / ADAPTER_WEIGHTS)
        config, stats = check_folder(base), folder / "dataset_statistics.json"
        refuse_quantized(config, base)
        if stats.is_file():
            config.extra["norm_stats"] = json.loads(stats.read_text("utf-8"))
        return config
    if not (folder / "config.json").is_file():
        hint = "; convert_weights.py turns .pt checkpoints into this layout" if list(folder.rglob("*.pt")) else ""
        raise FileNotFoundError(f"{folder}: not a checkpoint in Hugging Face layout, it has no config.json{hint}")
    try:
        config = OpenVLAConfig.from_dict(read_config(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder}: config.json or dataset_statistics.json cannot be used ({error})") from None
    with torch.device("meta"):
        model = OpenVLA(config)
    if config.extra.get("quantization"):
        from speed.quantize import prepare

        prepare(model)
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    for path in weight_files(folder):
        for name, shape in read_header(path).items():
            if is_unused(name, config):
                continue
            if name not in expected:
                raise ValueError(f"{path}: unexpected tensor {name} {shape}; config.json describes another model")
            if expected[name] != shape:
                raise ValueError(f"{path}: tensor {name} has shape {shape}, config.json makes it {expected[name]}")
            del expected[name]
    if expected:
        raise ValueError(
            f"{folder}: {len(expected)} tensors are in no weight file, the first is {next(iter(expected))}"
        )
    return config


def stored_dtype(config: OpenVLAConfig, folder: str | Path) -> torch.dtype:
    """What config.json says that the weights are in. Raises ValueError if it is no dtype."""
    name = str(config.extra.get("torch_dtype", "bfloat16"))
    if not isinstance(dtype := getattr(torch, name, None), torch.dtype):
        raise ValueError(f"{folder}: config.json has torch_dtype {name!r}; it must be bfloat16, float32 or float16")
    return dtype


def refuse_quantized(config: OpenVLAConfig, folder: str | Path):
    """Raise for what needs the weights themselves: training, merging, adapters, OFT."""
    if config.extra.get("quantization"):
        raise ValueError(f"{folder} is quantized, for inference only; take the checkpoint that it was made from")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those its index names, or model.safetensors."""
    names = {"model.safetensors"}
    if (folder / INDEX).is_file():
        refuse_pointer(folder / INDEX)
        try:
            names = set(json.loads((folder / INDEX).read_text("utf-8"))["weight_map"].values())
        except (ValueError, KeyError) as error:
            raise ValueError(f"{folder / INDEX}: not an index of weight files ({error!r}); get it again") from None
    for name in sorted(names):
        if not (folder / name).is_file():
            by = f"named by {INDEX}" if (folder / INDEX).is_file() else f"and there is no {INDEX}"
            raise FileNotFoundError(f"{folder / name}: weight file missing, {by}; download it again")
    return [folder / name for name in sorted(names)]


def fingerprint(folder: str | Path) -> str:
    """Of a checkpoint's weights: sixteen places of each file, as reading all of it would take minutes."""
    total = hashlib.sha256()
    for path in weight_files(Path(folder)):
        size = path.stat().st_size
        total.update(f"{path.name} {size}".encode())
        with open(path, "rb") as f:
            for i in range(16):
                f.seek(i * size // 16)
                total.update(f.read(4096))
    return total.hexdigest()[:16]


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a safetensors file. ValueError if the file is not whole."""
    return {name: tuple(entry["shape"]) for name, entry in read_layout(path)[1].items()}


def read_layout(path: Path) -> tuple[int, dict[str, dict]]:
    """
    Where the data of a safetensors file begins, and name -> {dtype, shape, data_offsets} (bytes from there). ValueError
    if the file is not whole.
    """
    refuse_pointer(path)
    size = path.stat().st_size
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if 8 + length > size:
            raise ValueError(f"{path}: cut off or no safetensors file, {size:,} bytes; download it again")
        try:
            header = json.loads(f.read(length))
            header.pop("__metadata__", None)
            sizes = [(t["shape"], t["data_offsets"][1]) for t in header.values()]
            end = 8 + length + max((last for _, last in sizes), default=0)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path}: no safetensors file, its header cannot be read; download it again") from None
    if size != end:
        raise ValueError(f"{path}: {size:,} bytes where {end:,} are expected; download it again")
    return 8 + length, header


def refuse_pointer(path: Path):
    with open(path, "rb") as f:
        if f.read(40).startswith(b"version https://git-lfs"):
            raise ValueError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` in {path.parent}")
