import os

os.environ["OMP_NUM_THREADS"] = (
    "1"  # several threads wait for each other where cores are shared; and bits stay the same
)

# No test asks the real hub, or finds in a user's cache what it does not expect (tests/test_hub.py has its own).
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_CACHE"] = "/nonexistent/hub"

import pytest
import torch
from common import make_folder

from model import OpenVLA


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Name of a golden model -> its checkpoint folder. Tests that change one take a copy."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: make_folder(name, root / name) for name in ("tiny-openvla", "tiny-openvla-v01")}


@pytest.fixture(scope="session")
def models(folders):
    """Name of a golden model -> the model in float32."""
    return {name: OpenVLA.from_pretrained(folder, torch.float32) for name, folder in folders.items()}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """No test writes an index into the home folder."""
    monkeypatch.setenv("OPENVLA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
