"""
Let a policy act in the toy world, and count how often it does what it was asked to do.

    python -m toy.play --checkpoint runs/toy/checkpoint --out runs/toy

Three numbers, over the same unseen scenes:
- how often the policy picks up the object that the instruction names,
- how often the same model does before training, in the first 100 of them,
- how often the policy still picks up that object when the instruction names another one. A policy that does not listen
  would not notice the difference.

Success is read off the world's state. Policies that answer with chunks (OFT, FAST), and all policies with --controls
False, get the first number only.

Axes: n scenes, T steps, K actions of a chunk, A = 7 action dimensions.
"""

import json
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from configurator import configure, fail
from files import write_json
from metrics import plot_actions, wilson
from model import OpenVLA
from policy import Policy, dataset_stats, load_policy, predict_action, predict_chunk
from toy import world


@dataclass
class Config:
    checkpoint: str = "runs/toy/checkpoint"
    out: str = "runs/toy"  # where rollouts.gif, actions.png and evaluation.json go
    scenes: int = 200  # unseen ones
    open_loop: int = 0  # actions of a chunk that are carried out before the policy is asked again; 0: all
    unnorm_key: str = ""  # whose statistics give the action its units; may be left out if the checkpoint has one
    changed: bool = False  # in the changed world of toy/transfer.py
    controls: bool = True  # also an untrained model and swapped instructions, with a video and a plot


UNTRAINED_SCENES = 100  # at most, as each takes all steps that an episode may have
MOVING = {0: "dx (m)", 1: "dy (m)", 2: "dz (m)", 6: "gripper"}  # dimensions of an action that are not always 0


def play(policy: Policy, scenes: int, unnorm_key: str = "", open_loop: int = 1, **options) -> world.Result:
    """
    Let the policy act in that many unseen scenes.

    open_loop: actions of an answer that are carried out before it is asked again. (A token model's answer has one.)
    options: further ones of world.rollout, such as world, swap and record.
    """

    def act(images: np.ndarray, instructions: list[str]) -> np.ndarray:
        single_views = [[image] for image in images]
        chunks = predict_chunk(policy, single_views, instructions, unnorm_key=unnorm_key)  # (n, K, A)
        return chunks[:, :open_loop]

    return world.rollout(act, world.TEST, scenes, **options)


def evaluate(policy: Policy, scenes: int, out: Path, setting: world.World, unnorm_key: str = "") -> dict[str, float]:
    """
    Print and return the three success rates (fractions), and the 95 % interval of the first. Writes a video of eight
    rollouts and a plot to `out`.
    """
    start = time.perf_counter()
    trained = play(policy, scenes, unnorm_key, world=setting, record=8)
    swapped = play(policy, scenes, unnorm_key, world=setting, swap=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an untrained model generates no actions; they are decoded all the same
        untrained = play(without_training(policy), min(scenes, UNTRAINED_SCENES), unnorm_key, world=setting)

    world.save_gif(out / "rollouts.gif", trained.episodes)
    plot_actions(out / "actions.png", compare(policy, setting, unnorm_key), MOVING)

    rates = {
        "success": trained.success,
        "success_untrained": untrained.success,
        "success_swapped": swapped.success,
    }
    for name, success in rates.items():
        print_rate(name, success)
    print_rate("success of the other object, when that is named", swapped.other)
    print(f"{trained.steps.mean():.1f} steps on average; {time.perf_counter() - start:.0f} s")
    low, high = wilson(int(trained.success.sum()), scenes)
    means = {f"toy/{name}": float(success.mean()) for name, success in rates.items()}
    return {**means, "toy/success_low": low, "toy/success_high": high}


def without_training(policy: Policy) -> Policy:
    """Return the policy with random weights."""
    model = OpenVLA(policy.vla.cfg).init_weights(seed=1)
    return replace(policy, model=model.to(policy.device, policy.dtype))


def compare(
    policy: Policy, setting: world.World, unnorm_key: str, episodes: int = 4
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return for unseen episodes what the expert did, and what the policy answers to the same images, (T, A) each."""
    pairs = []
    for episode in world.demonstrations(world.VAL, episodes, setting):
        T = len(episode["action"])
        images = episode["image"][:T]  # without the one that shows how it ended
        answers = predict_action(policy, images, [episode["instruction"]] * T, unnorm_key)
        pairs.append((episode["action"], answers))
    return pairs


def print_rate(name: str, success: np.ndarray):
    """Print a success rate, from (n,) bool, with its 95 % interval."""
    low, high = wilson(int(success.sum()), len(success))
    interval = f"95 % interval {low:.1%} to {high:.1%}, {len(success)} unseen scenes"
    print(f"{name:48s} {success.mean():6.1%}   ({interval})")


def main(cfg: Config):
    if cfg.scenes < 1:
        fail(f"--scenes {cfg.scenes}: must be 1 or more")
    try:
        policy = load_policy(cfg.checkpoint)
        dataset_stats(policy.norm_stats, cfg.unnorm_key, cfg.checkpoint)
    except (ValueError, OSError) as error:
        fail(error)
    setting = world.CHANGED if cfg.changed else world.STANDARD

    if policy.gives_chunks or not cfg.controls:
        open_loop = cfg.open_loop or policy.action_chunk
        result = play(policy, cfg.scenes, cfg.unnorm_key, open_loop, world=setting)
        name = "success"
        if policy.gives_chunks:
            name = f"success, {open_loop} of {policy.action_chunk} actions carried out"
        print_rate(name, result.success)
        return

    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    rates = evaluate(policy, cfg.scenes, out, setting, cfg.unnorm_key)
    write_json(out / "evaluation.json", rates)
    print(json.dumps(rates))


if __name__ == "__main__":
    main(configure(Config))
