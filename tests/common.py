"""What several tests need: where the reference numbers are, and the tiny reference models as loadable folders."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
GOLDENS = Path(__file__).parent / "goldens"
MODELS = ["tiny-openvla", "tiny-openvla-v01"]


def shared(path: str) -> Path:
    """A file that is not part of the repository: below OPENVLA_TEST_DATA or ../shared. Skips the test without it."""
    places = [os.environ.get("OPENVLA_TEST_DATA"), ROOT.parent / "shared"]
    for place in filter(None, places):
        if (Path(place) / path).exists():
            return Path(place) / path
    pytest.skip(f"needs {path} in ../shared or in OPENVLA_TEST_DATA")


def simulator():
    """Skips the test where robosuite cannot be imported or cannot draw."""
    probe = "import os; os.environ.update(MUJOCO_GL='egl', PYOPENGL_PLATFORM='egl'); import robosuite"
    probe = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"needs the optional simulator, requirements-libero.txt: {probe.stderr.strip().splitlines()[-1]}")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def golden(name: str) -> tuple[dict, dict]:
    """Tensors and JSON of a golden file."""
    return load_file(GOLDENS / f"{name}.golden.safetensors"), json.loads((GOLDENS / f"{name}.golden.json").read_text())


def vision_configs(arch: dict) -> list[dict]:
    """Our config key for the towers that a tiny_arch.json describes."""
    out = []
    for name in arch["towers"].values():
        kind, sizes = arch["dinov2" if "dinov2" in name else "siglip"], arch["timm_overrides"][name]
        mlp = int(sizes["embed_dim"] * kind["mlp_ratio"])
        flags = dict(cls_token=kind["class_token"], reg_tokens=kind["reg_tokens"], layer_scale=kind["layer_scale"])
        out.append({**sizes, "mlp_dim": mlp, "patch_size": 14, "img_size": 224, **flags})
    return out


def make_folder(name: str, to: Path) -> Path:
    """A golden checkpoint as a folder of its own in which config.json says how large its towers are."""
    shutil.copytree(GOLDENS / name, to)
    config = json.loads((to / "config.json").read_text())
    config["vision_configs"] = vision_configs(json.loads((to / "tiny_arch.json").read_text()))
    (to / "config.json").write_text(json.dumps(config))
    return to


def with_tokenizer(folder: Path) -> Path:
    shutil.copy(shared("data/llama2-tokenizer/tokenizer.model"), folder / "tokenizer.model")
    return folder


def pixels(info: dict, example: dict) -> torch.Tensor:
    """pixel_values (1, C, 224, 224) of a golden example, computed here and not by image.py."""
    u8 = np.asarray(Image.open(GOLDENS / example["resized_png"])).transpose(2, 0, 1).astype(np.float32) / 255
    towers = [
        (u8 - np.float32(p["mean"])[:, None, None]) / np.float32(p["std"])[:, None, None]
        for p in info["tvf_normalize_params"]
    ]
    return torch.from_numpy(np.concatenate(towers).astype(np.float32))[None]
