"""The examples of docs/your-data.md, from recordings to a trained step and an action in the units of the robot."""

import re
from pathlib import Path

import numpy as np
import pytest
from common import GOLDENS, ROOT

import finetune_oft
import train
from configurator import configure
from policy import action_dimensions, load_policy, predict_action, predict_chunk
from tokenizer import make_standin

SMALL = """
_vit = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 28, "mlp_dim": 32}
_text = {
    "vocab_size": 32064,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
random_model = {"vision_configs": [_vit, _vit], "text_config": _text}
"""
OPTIONS = """
batch_size = 2
micro_batch_size = 2
max_steps = 1
num_workers = 0
image_aug = False
activation_checkpointing = False
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in, with a tokenizer."""
    monkeypatch.chdir(tmp_path)
    make_standin(tmp_path / "tokenizer.model")
    (tmp_path / "recordings").mkdir()
    return tmp_path


def example(words: str) -> str:
    """Return the Python block of docs/your-data.md with these words in it."""
    page = (ROOT / "docs" / "your-data.md").read_text()
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if words in block]
    assert len(block.splitlines()) <= 20
    return block


def train_small(name: str, block: str, *options: str) -> Path:
    """Train a small model for one step on the data of a block, and return its checkpoint."""
    Path(f"{name}.py").write_text(block + SMALL + OPTIONS)
    arguments = ["--config", f"{name}.py", "--tokenizer", "tokenizer.model", "--run_dir", name, *options]
    train.train(configure(train.Config, arguments))
    return Path(name) / "checkpoint"


def record(path: str, steps: int, **shapes):
    rng = np.random.default_rng(steps)
    arrays = {}
    for key, shape in shapes.items():
        if len(shape) == 3:
            arrays[key] = rng.integers(0, 255, (steps, *shape), dtype=np.uint8)
        else:
            arrays[key] = rng.normal(scale=0.5, size=(steps, *shape))
    np.savez(path, **arrays)


def test_training_warns_of_what_is_probably_wrong(place, capsys):
    for i in range(2):
        record(f"recordings/episode{i}.npz", 20 + i, image=(40, 60, 3), joints=(14,))
    arms = example("two_arms").replace("gripper=False", "gripper=True").replace('"fold the cloth"', '""')
    train_small("arms", arms)
    out = capsys.readouterr().out
    assert "warning: two_arms: the gripper is -" in out and "gripper=False" in out
    assert "warning: two_arms: 100.0% of the frames have no instruction" in out


def test_two_arms(place):
    for i in range(2):
        record(f"recordings/episode{i}.npz", 20 + i, image=(40, 60, 3), joints=(14,))
    policy = load_policy(train_small("arms", example("two_arms")))
    action = predict_action(policy, [np.zeros((40, 60, 3), np.uint8)], "fold the cloth")
    stats = policy.norm_stats["two_arms"]["action"]
    assert action.shape == (1, 14) and all(stats["mask"])
    assert (action >= stats["q01"]).all() and (action <= stats["q99"]).all()
    assert action_dimensions(policy.norm_stats["two_arms"])[13] == ("13", "")


def test_two_cameras_and_state_for_oft(place):
    record("recordings/cups.npz", 100, front=(40, 60, 3), wrist=(30, 30, 3), state=(6,), action=(7,))
    cups = example("cups")
    base = train_small("base", cups.replace('cameras=("front", "wrist")', 'cameras="front"'))
    Path("cups.py").write_text(cups + OPTIONS)
    options = ["--config", "cups.py", "--base_checkpoint", str(base), "--run_dir", "oft", "--action_chunk", "4"]
    finetune_oft.main(configure(finetune_oft.Config, [*options, "--lora_rank", "2"]))

    policy = load_policy("oft")
    assert (policy.num_images, policy.action_chunk, policy.state_dim) == (2, 4, 6)
    images = [np.zeros((40, 60, 3), np.uint8), np.zeros((30, 30, 3), np.uint8)]
    chunk = predict_chunk(policy, [images], ["stack the cups"], np.zeros((1, 6)))
    assert chunk.shape == (1, 4, 7) and np.isfinite(chunk).all()
    assert action_dimensions(policy.norm_stats["cups"])[0] == ("dx", "m")


def test_an_arm_from_lerobot(place):
    pytest.importorskip("pyarrow")
    pytest.importorskip("av")
    arm = example("LeRobot(").replace("~/data/my_robot", str(GOLDENS / "lerobot" / "v30_video"))
    policy = load_policy(train_small("arm", arm))
    ((name, entry),) = policy.norm_stats.items()
    action = predict_action(policy, [np.zeros((48, 64, 3), np.uint8)], "go")
    assert action.shape == (1, len(entry["action"]["q01"])) and all(entry["action"]["mask"])
    assert (action >= entry["action"]["q01"]).all() and (action <= entry["action"]["q99"]).all()
