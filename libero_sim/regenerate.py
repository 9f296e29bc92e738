"""
LIBERO demonstrations as OpenVLA learns from them: replayed in the simulator, without idle steps, in large pictures.

    python eval_libero.py --regenerate libero_spatial/ --task_suite libero_spatial --out data

takes the raw demonstrations (https://libero-project.github.io/datasets, one NAME_demo.hdf5 per task) or a run of
eval_libero.py (its episodes/*.npz) to data/libero_spatial_no_noops/1.0.0, an RLDS dataset. Follows
experiments/robot/libero/regenerate_libero_dataset.py of github.com/openvla/openvla and the modified_libero_rlds sets.

Axes: T steps of a demonstration, A = 7 dimensions of an action, as the simulator takes it (gripper -1 open, 1 closed).
"""

from pathlib import Path

import numpy as np

from formats.write_rlds import encode_episode, jpeg, write_examples
from libero_sim.simulator import SIZE, Simulator, tasks
from model import write_atomically

SHAPES = dict(image=(SIZE, SIZE, 3), wrist_image=(SIZE, SIZE, 3), state=(8,), joint_state=(7,), action=(7,))
NO_H5PY = "reading raw LIBERO demonstrations needs h5py: pip install h5py"


def is_noop(action: np.ndarray, previous: np.ndarray | None, threshold: float = 1e-4) -> bool:
    """Whether an action (A,) moves nothing: no motion, and the gripper as in the last action that was kept."""
    still = np.linalg.norm(action[:-1]) < threshold
    return bool(still and (previous is None or action[-1] == previous[-1]))


def without_noops(actions: np.ndarray) -> np.ndarray:
    """(T, A) -> (fewer, A)."""
    kept: list[np.ndarray] = []
    for action in actions:
        if not is_noop(action, kept[-1] if kept else None):
            kept.append(action)
    return np.array(kept).reshape(-1, actions.shape[1])


def episode_file(run: Path, job: dict, suffix: str) -> Path:
    """Where a run of eval_libero.py keeps an episode's actions (.npz) and film (.gif)."""
    return run / "episodes" / f"task{job['task']:02d}_trial{job['trial']:03d}{suffix}"


def recorded(path: Path) -> list[dict]:
    """Jobs dict(task, trial, source) for a recorded episode's .npz, or for all those of a run."""
    files = [path] if path.suffix == ".npz" and path.is_file() else sorted(path.glob("episodes/task*.npz"))
    return [dict(task=int(f.stem[4:6]), trial=int(f.stem[-3:]), source=str(f)) for f in files]


def find_demonstrations(source: Path, suite: str, wanted: list[int]) -> list[dict]:
    """
    Jobs dict(task, trial, source) for the demonstrations of the wanted tasks: in raw HDF5 files, or in a run of
    eval_libero.py. Raises ValueError if there is none, or if a task's file is missing.
    """
    if found := recorded(source):
        if of_tasks := [job for job in found if job["task"] in wanted]:
            return of_tasks
        raise ValueError(f"{source}/episodes: no episode of the tasks {wanted}")
    jobs = []
    for task in wanted:
        path = source / f"{tasks(suite)[task].name}_demo.hdf5"
        if not path.is_file():
            raise ValueError(f"{path}: missing; --regenerate takes the folder with {suite}'s NAME_demo.hdf5 files")
        with open_hdf5(path) as file:
            jobs += [dict(task=task, trial=i, source=str(path)) for i in range(len(file["data"]))]
    return jobs


def open_hdf5(path: Path | str):
    try:
        import h5py
    except ImportError:
        raise ValueError(NO_H5PY) from None
    return h5py.File(path, "r")


def read_demonstration(job: dict) -> tuple[np.ndarray, np.ndarray]:
    """The simulator's state at the start, before settling, and the actions (T, A) float64."""
    if job["source"].endswith(".npz"):
        with np.load(job["source"]) as file:
            return file["initial_state"], file["actions"]
    with open_hdf5(job["source"]) as file:
        demo = file["data"][f"demo_{job['trial']}"]
        return demo["states"][0], demo["actions"][()].astype(np.float64)


def replay(sim: Simulator, job: dict, out: Path) -> dict:
    """Replay one demonstration, to the end; if it still succeeds, write it to `out`. Returns what became of it."""
    state, original = read_demonstration(job)
    actions = without_noops(original)
    if not len(actions):
        raise ValueError(f"{job['source']}, demonstration {job['trial']}: nothing but no-ops")
    sim.start(job["trial"], state)
    seen: dict[str, list] = {key: [] for key in SHAPES if key != "action"}
    for action in actions:
        seen["image"].append(jpeg(sim.picture("image")))
        seen["wrist_image"].append(jpeg(sim.picture("wrist_image")))
        seen["state"].append(sim.state())
        seen["joint_state"].append(sim.obs["robot0_joint_pos"].astype(np.float32))
        sim.step(action)
    if sim.success:
        vectors = {key: np.stack(seen.pop(key)) for key in ("state", "joint_state")}
        episode = {**seen, **vectors, "action": actions.astype(np.float32), "instruction": sim.instruction}
        write_atomically(out, lambda tmp: tmp.write_bytes(encode_episode(episode)))
    return dict(success=bool(sim.success), steps=len(actions), noops=len(original) - len(actions))


def assemble(folder: Path, suite: str, staged: list[Path]) -> Path:
    """The replayed demonstrations as folder/SUITE_no_noops/1.0.0, in one split "train", as the modified_libero_rlds."""
    records = {"train": (path.read_bytes() for path in staged)}
    return write_examples(folder, records, SHAPES, f"{suite}_no_noops", shard=16)
