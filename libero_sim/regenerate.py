"""
LIBERO demonstrations as OpenVLA learns from them: replayed in the simulator, without idle steps, in large images.

    python -m libero_sim.regenerate --source libero_spatial/ --task_suite libero_spatial --out data

The source is a folder of raw demonstrations (https://libero-project.github.io/datasets, one NAME_demo.hdf5 per task) or
of a run of eval_libero.py (episodes/*.npz). Each demonstration is replayed from its initial state. Those that still
succeed become an RLDS dataset, data/libero_spatial_no_noops/1.0.0. The same command again goes on where it stopped.

Follows experiments/robot/libero/regenerate_libero_dataset.py of github.com/openvla/openvla and the modified_libero_rlds
sets.

Axes: T steps of a demonstration, A = 7 dimensions of an action, as the simulator takes it (gripper -1 open, 1 closed).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from configurator import configure, fail
from files import atomic_write
from formats.write_rlds import encode_episode, write_examples
from image import encode_jpeg
from libero_sim.jobs import (
    MAX_BYTES,
    check_actions,
    demonstration_file,
    parse_tasks,
    read_arrays,
    recorded_episodes,
    unfinished,
)
from libero_sim.report import open_run, read_rows, warn
from libero_sim.simulator import CAMERAS, IMAGE_SIZE, SETTLE, SUITES, Simulator, set_up_libero, tasks, versions
from libero_sim.workers import look_at_simulator, play_jobs, read_warnings

SHAPES = {  # of one step
    "image": (IMAGE_SIZE, IMAGE_SIZE, 3),
    "wrist_image": (IMAGE_SIZE, IMAGE_SIZE, 3),
    "state": (8,),
    "joint_state": (7,),
    "action": (7,),
}
NO_H5PY = "reading raw LIBERO demonstrations needs h5py: pip install h5py"


@dataclass
class Config:
    source: str = ""  # folder with raw NAME_demo.hdf5 files, or a run of eval_libero.py
    task_suite: str = "libero_spatial"  # libero_object, libero_goal, libero_10, libero_90
    tasks: str = ""  # such as 0-4,7; "": all of the suite
    num_envs: int = 1  # simulator processes; each takes 1.3 to 2.2 GB of memory
    out: str = "runs/libero_data"  # folder for the dataset
    assets: str = ""  # LIBERO's assets folder; "": inside the installed package


# -----------------------------------------------------------------------------
# Demonstrations


def find_demonstrations(source: Path, suite: str, wanted_tasks: list[int]) -> list[dict]:
    """
    Return a job (libero_sim/jobs.py) for each demonstration of the wanted tasks, in a run of eval_libero.py or in raw
    HDF5 files. Raises ValueError if there is none, or if a task's file is missing or cannot be read.
    """
    recorded = recorded_episodes(source)
    if recorded:
        jobs = [job for job in recorded if job["task"] in wanted_tasks]
        if not jobs:
            raise ValueError(f"{source}/episodes: no episode of the tasks {wanted_tasks}")
        return jobs

    jobs = []
    for task in wanted_tasks:
        path = source / f"{tasks(suite)[task].name}_demo.hdf5"
        if not path.is_file():
            raise ValueError(f"{path}: missing; --source takes the folder with {suite}'s NAME_demo.hdf5 files")
        with open_hdf5(path) as file:
            num_demonstrations = len(file["data"])
        for trial in range(num_demonstrations):
            jobs.append({"task": task, "trial": trial, "source": str(path)})
            read_demonstration(jobs[-1])  # what cannot be read is found now, not in an hour
    return jobs


@contextmanager
def open_hdf5(path: Path | str) -> Iterator:
    """Give an open HDF5 file. Raises ValueError that names the file, whatever goes wrong in the block."""
    try:
        import h5py
    except ImportError:
        raise ValueError(NO_H5PY) from None
    try:
        with h5py.File(path, "r") as file:
            yield file
    except Exception as error:  # of h5py: OSError, RuntimeError, KeyError, ...
        raise ValueError(f"{path}: no demonstrations of LIBERO can be read ({error}); get it again") from None


def read_demonstration(job: dict) -> tuple[np.ndarray, np.ndarray]:
    """
    Return the simulator's state at the start, before settling, and the actions (T, A) float64. Raises
    FileNotFoundError, or ValueError that names the file.
    """
    source = job["source"]
    if source.endswith(".npz"):
        state, actions = read_arrays(source, ("initial_state", "actions"))
    else:
        with open_hdf5(source) as file:
            demonstration = file["data"][f"demo_{job['trial']}"]
            num_bytes = demonstration["states"].nbytes + demonstration["actions"].nbytes
            if num_bytes > MAX_BYTES:
                raise ValueError(f"{num_bytes:,} bytes, a demonstration has at most {MAX_BYTES:,}")
            state = demonstration["states"][0]
            actions = demonstration["actions"][()].astype(np.float64)

    check_actions(actions, source)
    if state.ndim != 1 or state.dtype.kind != "f" or not np.isfinite(state).all():
        raise ValueError(f"{source}: the first state is {state.dtype} {state.shape}, expected finite numbers")
    return state, actions


def is_noop(action: np.ndarray, previous: np.ndarray | None, threshold: float = 1e-4) -> bool:
    """True if an action (A,) moves nothing: no motion, and the gripper as in the last action that was kept."""
    stands_still = np.linalg.norm(action[:-1]) < threshold
    same_gripper = previous is None or action[-1] == previous[-1]
    return bool(stands_still and same_gripper)


def without_noops(actions: np.ndarray) -> np.ndarray:
    """Return the actions (T, A) that move something, (fewer, A)."""
    moving = []
    previous = None
    for action in actions:
        if not is_noop(action, previous):
            moving.append(action)
            previous = action
    return np.array(moving).reshape(-1, actions.shape[1])


# -----------------------------------------------------------------------------
# Replay


def replay(sim: Simulator, job: dict, out: Path) -> dict:
    """
    Replay one demonstration, to its end, and write it to `out` if it still succeeds. Returns the fields of its row.
    Raises ValueError if it has nothing but no-ops.
    """
    state, original = read_demonstration(job)
    actions = without_noops(original)
    if len(actions) == 0:
        raise ValueError(f"{job['source']}, demonstration {job['trial']}: nothing but no-ops")

    sim.start(job["trial"], state)
    images = []
    wrist_images = []
    states = []
    joint_states = []
    for action in actions:
        images.append(encode_jpeg(sim.image("image")))
        wrist_images.append(encode_jpeg(sim.image("wrist_image")))
        states.append(sim.state())
        joint_states.append(sim.obs["robot0_joint_pos"].astype(np.float32))
        sim.step(action)

    if sim.success:
        episode = {
            "image": images,
            "wrist_image": wrist_images,
            "state": np.stack(states),
            "joint_state": np.stack(joint_states),
            "action": actions.astype(np.float32),
            "instruction": sim.instruction,
        }
        with atomic_write(out) as temporary:
            temporary.write_bytes(encode_episode(episode))
    return {
        "success": bool(sim.success),
        "steps": len(actions),
        "noops": len(original) - len(actions),
    }


def play_demonstration(sim: Simulator, job: dict, conn: Connection, work: Path) -> dict:
    """Replay a demonstration in a simulator's process, see `simulate` of workers.py."""
    return replay(sim, job, demonstration_file(work, job))


def assemble(folder: Path, suite: str, replayed: list[Path]) -> Path:
    """Write folder/SUITE_no_noops/1.0.0 with all in one split "train", as the modified_libero_rlds sets are."""
    records = {"train": (path.read_bytes() for path in replayed)}
    return write_examples(folder, records, SHAPES, name=f"{suite}_no_noops", shard=16)


# -----------------------------------------------------------------------------
# Command line


def main(cfg: Config):
    if cfg.task_suite not in SUITES:
        fail(f"--task_suite {cfg.task_suite}: must be one of {', '.join(SUITES)}")
    if not cfg.source:
        fail("give --source: a folder with raw NAME_demo.hdf5 files, or a run of eval_libero.py")
    if cfg.num_envs < 1:
        fail(f"--num_envs {cfg.num_envs}: must be at least 1")
    work = Path(cfg.out) / f".{cfg.task_suite}_no_noops"  # what has been replayed so far
    try:
        set_up_libero(cfg.assets)
        jobs = find_demonstrations(Path(cfg.source), cfg.task_suite, parse_tasks(cfg.tasks, cfg.task_suite))
        protocol = {
            "regenerate": cfg.source,
            "task_suite": cfg.task_suite,
            "settle_steps": SETTLE,
            **versions(),
        }
        open_run(work, protocol)
        left = unfinished(jobs, read_rows(work / "episodes.jsonl"))
        if left:
            look_at_simulator(work, cfg.task_suite, cfg.assets, needs_images=True)
        warnings = read_warnings(work)
    except (ValueError, OSError) as error:
        fail(error)
    for text in warnings:
        warn(text)

    if left:
        play = partial(play_demonstration, work=work)
        cameras = tuple(CAMERAS)
        blind = False
        play_jobs(left, cfg.num_envs, (play, cfg.task_suite, cfg.assets, cameras, blind), None, work)
    rows = read_rows(work / "episodes.jsonl")
    write_dataset(cfg, work, rows)
    if any("error" in row for row in rows):
        raise SystemExit(1)


def write_dataset(cfg: Config, work: Path, rows: list[dict]):
    """Print what became of the demonstrations, and write the dataset unless one of them ended in an error."""
    errors = [row for row in rows if "error" in row]
    successes = [row for row in rows if row.get("success")]
    for row in errors:
        warn(f"task {row['task']}, demonstration {row['trial']}: {row['error']}")
    num_noops = sum(row.get("noops", 0) for row in rows)
    print(f"{len(rows)} demonstrations: {len(successes)} succeed when replayed, {num_noops} no-ops left out")

    if errors:
        warn(f"{len(errors)} ended in an error, the dataset is not written; the same command again repeats them")
    elif successes:
        replayed = [demonstration_file(work, row) for row in successes]
        print(assemble(Path(cfg.out), cfg.task_suite, replayed))
    else:
        warn("nothing to write")


if __name__ == "__main__":
    main(configure(Config))
