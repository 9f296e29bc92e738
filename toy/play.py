"""
A policy in the toy world, in closed loop: how often it does what it was told, with pictures to look at.

    python play.py --checkpoint runs/toy/checkpoint --out runs/toy

Three numbers over the same unseen scenes: the policy's success; that of the same model before training; and how often
the originally named object is picked up when the instruction names another one (a policy that does not listen would not
notice). Success is read off the world's state.

Axes: n scenes, T steps, A action dimensions.
"""

import json
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configurator import configure, fail
from metrics import plot_actions, wilson
from oft import predict_chunk
from sample import Policy, dataset_stats, load, predict_action
from toy import world as toy


@dataclass
class Config:
    checkpoint: str = "runs/toy/checkpoint"
    out: str = "runs/toy"  # where rollouts.gif and actions.png go
    scenes: int = 200  # unseen ones
    open_loop: int = 0  # of an OFT policy: actions of a chunk that are carried out before the next question; 0: all
    unnorm_key: str = ""  # whose statistics give the action its units; may be left out if the checkpoint has one


MOVING = {0: "dx (m)", 1: "dy (m)", 2: "dz (m)", 6: "gripper"}  # dimensions of an action


def play(policy: Policy, scenes: int, unnorm_key: str = "", open_loop: int = 1, **options) -> toy.Result:
    """
    The policy in that many unseen scenes. open_loop: actions of an answer that are carried out before the next question
    (a token model's answers have one); further options as those of toy.rollout.
    """

    def act(images: np.ndarray, instructions: list[str]) -> np.ndarray:
        return predict_chunk(policy, [[image] for image in images], instructions, None, unnorm_key)[:, :open_loop]

    return toy.rollout(act, toy.TEST, scenes, **options)


def report(name: str, ok: np.ndarray):
    low, high = wilson(int(ok.sum()), len(ok))
    print(f"{name:48s} {ok.mean():6.1%}   (95 % interval {low:.1%} to {high:.1%}, {len(ok)} unseen scenes)")


def evaluate(policy: Policy, scenes: int, out: Path, unnorm_key: str = "") -> dict:
    """Print and return the three success rates (fractions); write a film of eight rollouts and a plot to `out`."""
    start = time.perf_counter()
    trained = play(policy, scenes, unnorm_key, record=8)
    swapped = play(policy, scenes, unnorm_key, swap=True)
    toy.save_gif(out / "rollouts.gif", trained.episodes)
    plot_actions(out / "actions.png", compare(policy, unnorm_key), MOVING)
    weights = {k: v.clone() for k, v in policy.model.state_dict().items()}
    policy.model.init_weights(seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an untrained model writes no actions; they are decoded all the same
        untrained = play(policy, scenes, unnorm_key)
    policy.model.load_state_dict(weights)
    rows = dict(success=trained.success, success_untrained=untrained.success, success_swapped=swapped.success)
    for name, ok in {**rows, "success of the other object, when that is named": swapped.other}.items():
        report(name, ok)
    print(f"{trained.steps.mean():.1f} steps on average; {time.perf_counter() - start:.0f} s")
    return {f"toy/{name}": float(ok.mean()) for name, ok in rows.items()}


def compare(policy: Policy, unnorm_key: str, episodes: int = 4) -> list[tuple[np.ndarray, np.ndarray]]:
    """What the expert did in unseen episodes, and what the policy says to the same pictures, (T, A) each."""
    out = []
    for e in toy.demonstrations(toy.VAL, episodes):
        T = len(e["action"])
        out.append((e["action"], predict_action(policy, e["image"][:T], [e["instruction"]] * T, unnorm_key)))
    return out


def main(cfg: Config):
    if cfg.scenes < 1:
        fail(f"--scenes {cfg.scenes}: must be 1 or more")
    try:
        policy = load(cfg.checkpoint)
        dataset_stats(policy.norm_stats, cfg.unnorm_key, cfg.checkpoint)
    except (ValueError, OSError) as error:
        fail(error)
    if oft := getattr(policy.model, "oft", None):
        steps = cfg.open_loop or oft.action_chunk
        ok = play(policy, cfg.scenes, cfg.unnorm_key, open_loop=steps).success
        report(f"success, {steps} of {oft.action_chunk} actions carried out", ok)
        return
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    print(json.dumps(evaluate(policy, cfg.scenes, Path(cfg.out), cfg.unnorm_key)))


if __name__ == "__main__":
    main(configure(Config))
