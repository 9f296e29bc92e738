"""
What a policy is asked for in the benchmarks of inference: images and instructions, one by one.

The images are random noise or, with --trajectories, episodes: the policy's own way through the toy world, or the
episodes of a dataset. In an episode each input knows the one of the step before, whose answer makes a good draft.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from bench.common import Config
from data import open_mixture
from image import decode
from policy import Policy, predict_action, prepare_images
from tokenizer import encode_action
from toy import world as toy

NUM_TOKENS = 7  # of an action


@dataclass
class Episode:
    images: list[np.ndarray]  # (H, W, 3) uint8
    instruction: str


@dataclass
class Input:
    """One question to the policy, and what `OpenVLA.generate` answers to it."""

    image: np.ndarray  # (H, W, 3) uint8
    input_ids: Tensor  # (1, T)
    pixel_values: Tensor  # (1, C, H, W)
    previous: "Input | None"  # of one step earlier in the same episode
    tokens: Tensor | None = None  # (1, NUM_TOKENS)
    logits: Tensor | None = None  # (1, NUM_TOKENS, V)
    drafts: dict[str, Tensor] = field(default_factory=dict)  # kind of draft -> tokens (1, NUM_TOKENS)


def make_inputs(cfg: Config, policy: Policy, unnorm_key: str) -> list[Input]:
    """Return cfg.inputs inputs, as one batch of one each, on the policy's device."""
    if policy.gives_chunks:
        raise ValueError(f"{policy.checkpoint} answers with chunks; this benchmark is for the tokens of one action")
    inputs = []
    for episode in make_episodes(cfg, policy, unnorm_key):
        prompt = policy.tokenizer.encode_prompt(episode.instruction)
        input_ids = torch.tensor([prompt], device=policy.device)  # (1, T)
        previous = None
        for image in episode.images:
            pixel_values = prepare_images(policy, [image])
            previous = Input(image, input_ids, pixel_values, previous)
            inputs.append(previous)
    return inputs[: cfg.inputs]


def answer_inputs(policy: Policy, inputs: list[Input]):
    """Let the model generate the tokens of all inputs, and keep them there."""
    for one in inputs:
        one.tokens, one.logits = policy.model.generate(one.input_ids, one.pixel_values, NUM_TOKENS)


def to_tokens(action: np.ndarray) -> Tensor:
    """A normalised action (A,) -> tokens as a draft has them, (1, A)."""
    return torch.from_numpy(encode_action(action[None]))


# -----------------------------------------------------------------------------
# Where the images come from


def make_episodes(cfg: Config, policy: Policy, unnorm_key: str) -> list[Episode]:
    """Return episodes with at least cfg.inputs images together, if there are so many."""
    if cfg.trajectories == "toy":
        return toy_episodes(policy, unnorm_key, num_episodes=cfg.inputs // 6 + 1)
    if cfg.trajectories == "data":
        return dataset_episodes(cfg)

    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (480, 640, 3), np.uint8) for _ in range(cfg.inputs)]
    return [Episode([image], "pick up the red cube") for image in images]


def toy_episodes(policy: Policy, unnorm_key: str, num_episodes: int) -> list[Episode]:
    """Return what the policy sees when it acts in the toy world."""

    def act(images: np.ndarray, instructions: list[str]) -> np.ndarray:
        return predict_action(policy, list(images), instructions, unnorm_key)

    recorded = toy.rollout(act, toy.TEST, num_episodes, record=num_episodes).episodes
    episodes = []
    for episode in recorded:
        num_actions = len(episode["action"])  # one image more was recorded, at the end
        episodes.append(Episode(list(episode["image"][:num_actions]), episode["instruction"]))
    return episodes


def dataset_episodes(cfg: Config) -> list[Episode]:
    """Return the first episodes of a dataset."""
    parts = open_mixture(cfg.data_root_dir, cfg.data_mix, skip_bad_records=True)
    if len(parts) != 1:
        raise ValueError(f"--data_mix {cfg.data_mix} is a mixture of {len(parts)} datasets; give the name of one")
    dataset, _ = parts[0]

    _, episode_numbers = dataset.all_actions()
    images = defaultdict(list)
    instructions = {}
    for i in range(min(cfg.inputs, len(dataset))):
        frame = dataset[i]
        number = int(episode_numbers[i])
        images[number].append(decode(frame["pictures"][0]))
        instructions.setdefault(number, frame["instruction"])
    return [Episode(images[number], instructions[number]) for number in images]
