"""
Evaluate a policy in the LIBERO simulator (https://arxiv.org/abs/2306.03310), by OpenVLA's protocol: the published
benchmark.

    python eval_libero.py --checkpoint openvla-7b-finetuned-libero-spatial --task_suite libero_spatial --num_envs 4
    python eval_libero.py --policy expert --task_suite libero_spatial --trials 0-4

Each task is tried 50 times, from stored initial states. The simulators run in processes of their own, and the policy
answers those that wait in one batch (libero_sim/workers.py). The run's folder holds

    protocol.json           what the result depends on
    episodes.jsonl          one line per episode, written as soon as it ends: the same command again goes on from there
    episodes/               actions and states (.npz), videos (.gif)
    report.md, grid.png     success rates with intervals, and the last image of each episode

Follows experiments/robot/libero/run_libero_eval.py of github.com/openvla/openvla, with one difference: an episode in
which something breaks is an error here, neither a success nor a failure.

Axes: B episodes that wait for an answer, K actions of a chunk, A = 7 dimensions of an action.
"""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from checkpoint import Checkpoint, open_checkpoint
from configurator import configure, fail
from files import atomic_write
from image import CROPPED, JPEG
from libero_sim.jobs import parse_tasks, recorded_episodes, stored_trials, unfinished
from libero_sim.report import open_run, read_rows, report, save_grid, warn
from libero_sim.simulator import CAMERAS, SETTLE, SUITES, set_up_libero, versions
from libero_sim.workers import look_at_simulator, play_episode, play_jobs, read_warnings
from policy import Policy, load_policy, pick_device, pick_dtype, pick_engine, predict_chunk, uses_center_crop
from progress import show_progress

POLICIES = ("checkpoint", "noop", "random", "expert", "replay")  # all but the first check the simulator itself


@dataclass
class Config:
    # Who acts
    policy: str = "checkpoint"  # or, to check the simulator itself: noop, random, expert (libero_spatial), replay
    checkpoint: str = ""  # folder of a model or of a LoRA run, or a name on the hub (owner/name)
    base_checkpoint: str = ""  # of a LoRA run: its base; "": as its adapter_config.json says
    unnorm_key: str = ""  # "": the suite's name, or that with _no_noops
    center_crop: bool | None = None  # show the middle 90 % only; None: as the checkpoint says, else yes
    device: str = "auto"
    dtype: str = "auto"  # bfloat16, float32; auto: bfloat16 on cuda, else as the weights are stored
    engine: str = "auto"  # generate in fewer passes (speed/engine.py): auto, on, off
    open_loop: int = 0  # actions of a chunk (OFT, FAST) that are carried out before the next question; 0: all
    replay: str = ""  # for --policy replay: an episode's .npz, or a run's folder
    perturbations: float = 0.0  # share of the expert's steps that go astray: so demonstrations show how to recover
    seed: int = 7  # of the random policy and the perturbations; nothing else is drawn

    # What is played
    task_suite: str = "libero_spatial"  # libero_object, libero_goal, libero_10, libero_90
    tasks: str = ""  # such as 0-4,7; "": all of the suite
    trials: str = "0-49"  # numbers of the initial states
    max_steps: int = 0  # of an episode; 0: the official limit

    # The run
    out: str = ""  # "": runs/SUITE-POLICY
    num_envs: int = 1  # simulator processes; each takes 1.3 to 2.2 GB of memory
    assets: str = ""  # LIBERO's assets folder; "": inside the installed package
    video: bool = True  # a GIF of each episode


# -----------------------------------------------------------------------------
# The policy


def load_for_evaluation(cfg: Config) -> tuple[Policy, dict]:
    """
    Load the policy. Returns it with what protocol.json says about it: statistics, preprocessing, weights. Raises
    ValueError or OSError.
    """
    dtype = pick_dtype(cfg.dtype)
    device = pick_device(cfg.device)
    checkpoint = open_checkpoint(cfg.checkpoint, cfg.base_checkpoint)
    unnorm_key = choose_statistics(checkpoint, cfg)
    policy = load_policy(checkpoint, dtype, device, show_progress)
    policy.engine = pick_engine(policy, cfg.engine)

    if policy.num_images > len(CAMERAS):
        raise ValueError(f"{cfg.checkpoint} takes {policy.num_images} images, LIBERO has {len(CAMERAS)} cameras")
    prepare_as_trained(policy)
    if cfg.center_crop is False and uses_center_crop(policy):
        warn("this policy was trained on random crops: without the centre crop it sees everything too small")

    facts = {
        "unnorm_key": unnorm_key,
        "center_crop": uses_center_crop(policy, cfg.center_crop),
        "trained_on": policy.processor.trained_on,
        "dtype": str(policy.dtype).removeprefix("torch."),
        "weights": list_weights(checkpoint),
    }
    if policy.is_oft:
        facts["oft"] = asdict(policy.model.oft)
    if policy.fast:
        facts["fast"] = policy.fast.facts()
    if policy.gives_chunks:
        facts["open_loop"] = cfg.open_loop
    return policy, facts


def prepare_as_trained(policy: Policy):
    """Let a policy see LIBERO's images as those that its training set held, also where its folder does not say how."""
    processor = policy.processor
    if not processor.trained_on:
        # A checkpoint of the official code has no such record. This is what its LIBERO models were trained on.
        processor.trained_on = CROPPED
        warn(f"{policy.checkpoint} has no record of its preprocessing: taking the official one, {processor.trained_on}")
    if JPEG not in processor.trained_on:  # as the images of LIBERO's training sets were stored
        processor.trained_on = (JPEG, *processor.trained_on)


def choose_statistics(checkpoint: Checkpoint, cfg: Config) -> str:
    """Return the unnorm_key: --unnorm_key, or the suite's name, or that with _no_noops. Raises ValueError."""
    known = checkpoint.norm_stats
    choices = [cfg.task_suite, f"{cfg.task_suite}_no_noops"]
    if cfg.unnorm_key:
        choices = [cfg.unnorm_key]
    for key in choices:
        if key in known:
            return key
    raise ValueError(
        f"{cfg.checkpoint}: no action statistics for {' or '.join(choices)}; --unnorm_key must be one of "
        f"{', '.join(known)}"
    )


def list_weights(checkpoint: Checkpoint) -> list[tuple]:
    """Return the weight files with size and time, and the base of a LoRA run. Other weights make it another run."""
    weights = []
    folders = {checkpoint.folder, checkpoint.adapter or checkpoint.folder}
    files = [path for folder in sorted(folders) for path in sorted(folder.iterdir())]
    for path in files:
        if path.suffix in (".safetensors", ".pt"):
            weights.append((path.name, path.stat().st_size, path.stat().st_mtime_ns))
    if checkpoint.base:
        weights.append(("base", str(checkpoint.base)))
    return weights


def answer(policy: Policy, unnorm_key: str, cfg: Config, questions: list[tuple]) -> np.ndarray:
    """
    Questions of B episodes, (images, instruction, state, previous) each -> the actions to carry out (B, K, A).
    previous: the last action of the episode, zeros at its start.
    """
    images, instructions, states, previous = zip(*questions, strict=True)
    chunks = predict_chunk(
        policy, images, instructions, np.stack(states), unnorm_key, cfg.center_crop, np.stack(previous)
    )
    if cfg.open_loop:
        chunks = chunks[:, : cfg.open_loop]
    return chunks


# -----------------------------------------------------------------------------
# The protocol


def make_jobs(cfg: Config) -> list[dict]:
    """Return the episodes to play (libero_sim/jobs.py). Raises ValueError for one that does not exist."""
    tasks = parse_tasks(cfg.tasks, cfg.task_suite)
    if cfg.policy != "replay":
        return stored_trials(cfg.task_suite, tasks, cfg.trials)
    jobs = [job for job in recorded_episodes(Path(cfg.replay)) if job["task"] in tasks]
    if not jobs:
        raise ValueError(f"--replay {cfg.replay}: neither an episode's .npz nor a run with episodes/ of these tasks")
    return jobs


def describe_run(cfg: Config, policy_facts: dict) -> dict:
    """Return what the result depends on. Without tasks and trials: a run may be extended by others."""
    protocol = {
        "checkpoint": cfg.checkpoint,
        "policy": cfg.policy,
        "replay": cfg.replay,
        "task_suite": cfg.task_suite,
        "seed": cfg.seed,
        "max_steps": cfg.max_steps,
    }
    protocol = {key: value for key, value in protocol.items() if value != ""}
    if cfg.perturbations:
        protocol["shoves"] = cfg.perturbations  # as it is called in the folders of earlier versions
    return {**protocol, "settle_steps": SETTLE, **policy_facts, **versions()}


# -----------------------------------------------------------------------------
# Command line


def check_options(cfg: Config):
    """End the program if an option cannot be right."""
    if cfg.task_suite not in SUITES:
        fail(f"--task_suite {cfg.task_suite}: must be one of {', '.join(SUITES)}")
    if cfg.policy not in POLICIES:
        fail(f"--policy {cfg.policy}: must be one of {', '.join(POLICIES)}")
    if cfg.policy == "checkpoint" and not cfg.checkpoint:
        fail("give --checkpoint; or --policy noop, random, expert, replay to check the simulator")
    if cfg.num_envs < 1:
        fail(f"--num_envs {cfg.num_envs}: must be at least 1")


def main(cfg: Config):
    check_options(cfg)
    cfg.max_steps = cfg.max_steps or SUITES[cfg.task_suite]
    name = Path(cfg.checkpoint).resolve().name if cfg.policy == "checkpoint" else cfg.policy
    out = Path(cfg.out or f"runs/{cfg.task_suite}-{name}")
    try:
        # Everything that can be wrong is found before the first episode.
        set_up_libero(cfg.assets)
        jobs = make_jobs(cfg)
        if cfg.policy == "checkpoint":
            policy, facts = load_for_evaluation(cfg)
            cameras = tuple(CAMERAS)[: policy.num_images]
            act = partial(answer, policy, facts["unnorm_key"], cfg)
        else:  # it acts without looking, in the simulator's process
            facts = {}
            cameras = ()
            act = None
        needs_images = bool(cameras) or cfg.video

        protocol = describe_run(cfg, facts)
        open_run(out, protocol)
        left = unfinished(jobs, read_rows(out / "episodes.jsonl"))
        if left:
            look_at_simulator(out, cfg.task_suite, cfg.assets, needs_images)
        warnings = read_warnings(out)
    except (ValueError, OSError) as error:
        fail(error)
    for text in warnings:
        warn(text)

    if left:
        play = partial(play_episode, cfg=cfg, out=out)
        blind = not needs_images
        play_jobs(left, cfg.num_envs, (play, cfg.task_suite, cfg.assets, cameras, blind), act, out)

    rows = read_rows(out / "episodes.jsonl")
    text = report(rows, protocol, warnings)
    with atomic_write(out / "report.md") as temporary:
        temporary.write_text(text)
    save_grid(out / "grid.png", out, rows)
    print(text)
    if any("error" in row for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main(configure(Config))
