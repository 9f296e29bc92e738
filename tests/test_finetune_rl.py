"""finetune_rl.py: probabilities, advantages and clipping against NumPy, and whole runs in a world of coins."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from common import ROOT
from safetensors.torch import load_file

import finetune_rl
from configurator import configure
from finetune_rl import Config, Episode, Step, clipped_loss, finetune, has_both_outcomes, leave_one_out
from image import WHOLE, ImageProcessor
from model import OpenVLA, OpenVLAConfig
from policy import Policy, load_policy
from tokenizer import Tokenizer, make_standin
from train import write_preparation

STATISTICS = {"coins": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 6 + [False]}}}

# An episode succeeds as soon as an action's dx is above `limit`. The expert always succeeds.
CONFIG = """
import numpy as np


class Coins:
    max_steps = 3
    most_at_once = 5

    def __init__(self, limit):
        self.limit = limit

    def __repr__(self):
        return f"Coins({self.limit})"

    def reset(self, seeds):
        self.seeds = list(seeds)
        self.success = np.zeros(len(seeds), bool)
        self.instructions = ["go" if seed % 2 else "go to the far end" for seed in seeds]

    def observe(self, episodes):
        return [np.random.default_rng(self.seeds[i]).integers(0, 256, (28, 28, 3)).astype(np.uint8) for i in episodes]

    def step(self, episodes, actions):
        assert not self.success[episodes].any() and actions.shape == (len(episodes), 7)
        self.success[episodes] = actions[:, 0] > self.limit

    def expert(self, episodes):
        return np.tile([0.9, 0, 0, 0, 0, 0, 1.0], (len(episodes), 1))


environment = Coins(LIMIT)
starts = 6
rollouts = 4
groups = 3
most_draws = 3
max_steps = 3
lr = 1e-3
batch_size = 16
micro_batch_size = 8
image_aug = False
save_every = 100
keep_checkpoints = 1
demo_share = 0.0
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a small random policy that was "trained" on the coins."""
    folder = tmp_path_factory.mktemp("rl") / "base"
    folder.mkdir()
    sizes = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 28, "mlp_dim": 32}
    siglip = {**sizes, "cls_token": False, "reg_tokens": 0, "layer_scale": False}
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {"vision_configs": [sizes, siglip], "text_config": {**text, "vocab_size": 32064}}
    model = OpenVLA(OpenVLAConfig.from_dict(config)).init_weights(1)
    make_standin(folder / "tokenizer.model", ("go", "to", "the", "far", "end"))
    write_preparation(folder, Tokenizer(folder), ImageProcessor(size=28, trained_on=WHOLE), STATISTICS)
    model.save_pretrained(folder, torch.float32)
    return folder


def config_of(tmp_path, base, limit: float, *options: str) -> Config:
    path = tmp_path / "coins.py"
    path.write_text(CONFIG.replace("LIMIT", str(limit)))
    argv = ["--config", str(path), "--base_checkpoint", str(base), "--run_dir", str(tmp_path / "run"), *options]
    return configure(Config, argv)


def weights_of(folder) -> dict:
    weights = {}
    for path in folder.glob("*.safetensors"):
        weights.update(load_file(path))
    return weights


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -----------------------------------------------------------------------------
# Parts


def test_probabilities_are_the_same_in_acting_and_in_learning(base):
    """One token at a time with a cache, and all at once: the ratio of a first update is 1. Rows have other lengths."""
    policy = load_policy(base)
    rng = np.random.default_rng(0)
    images = list(rng.integers(0, 256, (6, 28, 28, 3)).astype(np.uint8))
    prompts = [policy.tokenizer.encode_prompt("go to the far end"[: 2 + 3 * i]) for i in range(6)]
    assert len({len(prompt) for prompt in prompts}) > 2
    for temperature in (1.0, 0.5):
        steps = finetune_rl.sample_steps(policy, images, prompts, torch.rand(6, 7), temperature)
        tokens = torch.from_numpy(np.stack([step.tokens for step in steps]))
        pixels = finetune_rl.to_pixels(policy, images)
        again = finetune_rl.token_logprobs(policy.model, prompts, pixels, tokens, temperature)
        old = torch.from_numpy(np.stack([step.logprobs for step in steps]))
        assert (again - old).abs().max() < 1e-5
        assert ((tokens >= 31744) & (tokens < 32000)).all()


def test_samples_follow_the_distribution():
    logits = torch.full((1, 32064), -9.0)
    logits[:, 31744:31747] = torch.tensor([0.2, 0.3, 0.5]).log()
    logits[:, 5] = 99.0  # no action
    logits[:, 31747:32000] = -99.0
    sampler = finetune_rl.Sampler(torch.rand(20_000, 1, generator=torch.Generator().manual_seed(0)), 1.0)
    chosen = sampler.choose(logits.expand(20_000, 32064))
    shares = torch.bincount(chosen - 31744) / 20_000
    assert torch.allclose(shares, torch.tensor([0.2, 0.3, 0.5]), atol=0.015)
    assert torch.allclose(sampler.logprobs[0].exp(), torch.tensor([0.2, 0.3, 0.5])[chosen - 31744])
    expected = -sum(float(p * np.log(p)) for p in (0.2, 0.3, 0.5))
    assert torch.allclose(sampler.entropies[0], torch.full((20_000,), expected), atol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_advantages_and_clipping_are_those_of_ten_lines_of_numpy(seed):
    rng = np.random.default_rng(seed)
    reward = (rng.random((7, 5)) < rng.random((7, 1))).astype(float)
    expected = np.zeros_like(reward)
    for s in range(7):
        for g in range(5):
            expected[s, g] = reward[s, g] - np.delete(reward[s], g).mean()
    assert np.allclose(leave_one_out(torch.from_numpy(reward)), expected)
    is_mixed = [0 < sum(row) < 5 for row in reward]
    assert has_both_outcomes(torch.from_numpy(reward)).tolist() == is_mixed

    now, old = rng.normal(0, 0.3, (2, 9, 7))
    advantages = rng.choice([-0.6, 0.4], 9)
    now = torch.from_numpy(now).requires_grad_()
    loss, is_clipped = clipped_loss(now, torch.from_numpy(old), torch.from_numpy(advantages), 0.2, 0.28)
    ratio = np.exp(now.detach().numpy() - old)
    for b in range(9):
        for a in range(7):
            A = advantages[b]
            gain = min(ratio[b, a] * A, np.clip(ratio[b, a], 0.8, 1.28) * A)
            assert np.isclose(loss[b, a].item(), -gain)
    stopped = ((ratio > 1.28) & (advantages > 0)[:, None]) | ((ratio < 0.8) & (advantages < 0)[:, None])
    assert (is_clipped.numpy() == stopped).all() and stopped.any()
    loss.sum().backward()
    assert ((now.grad == 0).numpy() == stopped).all()


def test_only_groups_with_both_outcomes_are_learned_from():
    success = torch.tensor([[1, 1], [0, 1], [0, 0]], dtype=torch.float64)
    lengths = torch.tensor([[1, 2], [3, 2], [3, 3]], dtype=torch.float64)
    episodes = []
    for start in range(3):
        for rollout in range(2):
            steps = [Step(None, [], None) for _ in range(int(lengths[start, rollout]))]
            episodes.append(Episode(10 + start, rollout, steps))
    collected = finetune_rl.arrange(episodes, 10, success, lengths, "rloo")
    assert collected.order == [(11, 0, 0), (11, 0, 1), (11, 0, 2), (11, 1, 0), (11, 1, 1)]
    assert [collected.steps[key].advantage for key in collected.order] == [-1, -1, -1, 1, 1]
    assert len(finetune_rl.arrange(episodes, 10, success, lengths, "dagger").order) == 14


def test_nothing_is_learned_after_success(base, tmp_path):
    cfg = config_of(tmp_path, base, 0.0)
    policy = load_policy(base)
    episodes = [Episode(start, 0) for start in range(12)]
    finetune_rl.play(policy, episodes, cfg)
    assert {episode.success for episode in episodes} == {True, False}
    for episode in episodes:
        dx = [31999 - step.tokens[0] - 127 for step in episode.steps]  # positive: above 0
        assert all(x <= 0 for x in dx[:-1])  # the environment also refuses a step after success
        assert episode.success == (dx[-1] > 0)
        assert episode.success or len(episode.steps) == 3


def test_an_episode_does_not_depend_on_its_neighbours(base, tmp_path):
    cfg = config_of(tmp_path, base, 0.0)
    policy = load_policy(base)
    together = [Episode(start, 1) for start in range(4)]
    finetune_rl.play(policy, together, cfg)
    alone = [Episode(3, 1)]
    finetune_rl.play(policy, alone, cfg)
    tokens = [[step.tokens.tolist() for step in episode.steps] for episode in (together[3], alone[0])]
    assert tokens[0] == tokens[1]


def test_demonstrations_become_steps(base):
    tokenizer = Tokenizer(base)
    action = np.array([0.5, -1, 0, 0, 0, 0, 1])
    input_ids, labels = tokenizer.encode_example("go far", action)
    step = finetune_rl.demonstrated_step(
        {"input_ids": input_ids, "labels": labels, "images": np.zeros((1, 28, 28, 3), np.uint8)}
    )
    assert step.prompt == tokenizer.encode_prompt("go far")
    assert len(step.tokens) == 7 and (step.tokens == labels[-8:-1]).all()


def test_batches_leave_no_small_rest():
    for n in (1, 7, 16, 33, 100):
        batches = finetune_rl.split_evenly(list(range(n)), 16)
        assert sum(batches, []) == list(range(n))
        assert max(map(len, batches)) - min(map(len, batches)) <= 1 and max(map(len, batches)) < 25


# -----------------------------------------------------------------------------
# Runs


def test_success_rises(base, tmp_path):
    metrics = finetune(config_of(tmp_path, base, 0.6, "--max_steps", "8", "--lr", "1e-2", "--groups", "5"))
    first = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0]
    assert metrics["success"] > 0.4 + float(first.split('"success": ')[1].split(",")[0])
    assert (tmp_path / "run" / "curves.png").is_file()
    assert load_policy(tmp_path / "run" / "checkpoint").norm_stats == STATISTICS


@pytest.mark.parametrize("method", ["dagger", "clone"])
def test_imitation_reaches_the_expert(base, tmp_path, method):
    finetune(config_of(tmp_path, base, 0.6, "--method", method, "--max_steps", "4", "--lr", "1e-2"))
    policy = load_policy(tmp_path / "run" / "checkpoint")
    cfg = config_of(tmp_path, base, 0.6)
    episodes = [Episode(start, 0) for start in range(20)]
    finetune_rl.play(policy, episodes, cfg)
    assert np.mean([episode.success for episode in episodes]) >= 0.8


def test_a_resumed_run_is_an_uninterrupted_one_to_the_bit(base, tmp_path):
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    finetune(config_of(tmp_path, base, 0.5, "--run_dir", str(whole)))
    finetune(config_of(tmp_path, base, 0.5, "--run_dir", str(parts), "--max_steps", "2"))
    finetune(config_of(tmp_path, base, 0.5, "--run_dir", str(parts)))
    assert same(weights_of(whole / "checkpoint"), weights_of(parts / "checkpoint"))
    assert not same(weights_of(whole / "checkpoint"), weights_of(base))
    lines = [(run / "metrics.jsonl").read_text().splitlines() for run in (whole, parts)]
    assert len(lines[0]) == len(lines[1]) == 3
    assert [line.split('"seconds"')[0] for line in lines[0]] == [line.split('"seconds"')[0] for line in lines[1]]


def test_another_method_is_another_run(base, tmp_path):
    finetune(config_of(tmp_path, base, 0.5, "--max_steps", "1"))
    with pytest.raises(ValueError, match="trained with method 'rloo', now it is 'dagger'"):
        finetune(config_of(tmp_path, base, 0.5, "--method", "dagger"))


def test_without_success_it_stops_and_says_so(base, tmp_path):
    with pytest.raises(
        ValueError, match=r"no group with both outcomes in 3 draws of 6 start states x 4.*\(success 0.0%"
    ):
        finetune(config_of(tmp_path, base, 2.0))
    assert not (tmp_path / "run" / "checkpoint").exists()
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_with_nothing_but_success_no_weight_changes(base, tmp_path, capsys):
    finetune(config_of(tmp_path, base, -2.0))
    assert "all 72 rollouts succeed" in "".join(capsys.readouterr())
    assert same(weights_of(tmp_path / "run" / "checkpoint"), weights_of(base))


def test_adapters_learn_too(base, tmp_path):
    finetune(config_of(tmp_path, base, 0.5, "--lora_rank", "4", "--max_steps", "2"))
    run = tmp_path / "run"
    assert (run / "adapter_model.safetensors").is_file() and not (run / "checkpoint").exists()
    trained = load_policy(run)
    assert isinstance(trained, Policy)
    changed = [tensor.abs().max() for name, tensor in trained.model.named_parameters() if "lora_B" in name]
    assert max(changed) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "ppo"], "--method 'ppo' is none of rloo, dagger, clone"),
        (["--rollouts", "1"], "--rollouts 1: must be 2 or more"),
        (["--image_aug", "True"], "--lora_dropout and --image_aug must be off"),
        (["--base_checkpoint", ""], "--base_checkpoint FOLDER is missing"),
        (["--temperature", "0"], "--temperature 0.0: must be above 0"),
        (["--method", "dagger", "--demo_share", "1"], "--demo_share 1.0"),
    ],
)
def test_wrong_options_are_refused(base, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        finetune(config_of(tmp_path, base, 0.5, *options))


def test_two_processes_learn_what_one_learns(base, tmp_path):
    """Each plays half of the start states. Sums are added up in another order, so the last bits may differ."""
    finetune(config_of(tmp_path, base, 0.5, "--max_steps", "2"))
    one = weights_of(tmp_path / "run" / "checkpoint")

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--base_checkpoint", str(base), "--run_dir", str(tmp_path / "two"), "--max_steps", "2"]
    command = [*torchrun, str(ROOT / "finetune_rl.py"), "--config", str(tmp_path / "coins.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    two = weights_of(tmp_path / "two" / "checkpoint")

    # Where a gradient is next to nothing, Adam makes a whole step of its rounding. So weights are compared as a whole.
    before = weights_of(base)
    difference = sum((one[name] - two[name]).square().sum() for name in one) ** 0.5
    change = sum((one[name] - before[name]).square().sum() for name in one) ** 0.5
    assert change > 0.1 and difference < 0.02 * change
    lines = []
    for run in ("run", "two"):
        text = (tmp_path / run / "metrics.jsonl").read_text()
        lines.append([json.loads(line) for line in text.splitlines()])
    for a, b in zip(*lines, strict=True):
        for key in a.keys() - {"seconds", "cpu_seconds"}:
            assert a[key] == pytest.approx(b[key], abs=1e-4), key
