"""
Which episodes a run plays, and how their files are called.

A job is one episode to play, a dict: "task" and "trial" are its numbers; "source" is the file with its actions, if it
is a recorded one. The numbers also name its files in the folder of the run:

    episodes/task00_trial003.npz        actions and states
    episodes/task00_trial003.gif        video
    episodes/task00_demo003.example     a demonstration that was replayed (libero_sim/regenerate.py)
"""

import re
import zipfile
from pathlib import Path

import numpy as np

from libero_sim.simulator import initial_states, tasks

MAX_BYTES = 1 << 28  # of the arrays of one episode; a real one has less than a megabyte


def episode_file(run: Path, job: dict, suffix: str) -> Path:
    """Return where a run of eval_libero.py keeps the actions (.npz) and the video (.gif) of an episode."""
    return run / "episodes" / f"task{job['task']:02d}_trial{job['trial']:03d}{suffix}"


def demonstration_file(run: Path, job: dict) -> Path:
    """Return where a replayed demonstration waits for the others."""
    return run / "episodes" / f"task{job['task']:02d}_demo{job['trial']:03d}.example"


def recorded_episodes(path: Path) -> list[dict]:
    """
    Return the jobs that play recorded episodes again: of one .npz file, or of all those in a run's folder. Raises
    ValueError for a file that is named otherwise, or holds no episode.
    """
    files = sorted(path.glob("episodes/task*.npz"))
    if path.suffix == ".npz" and path.is_file():
        files = [path]

    jobs = []
    for file in files:
        numbers = re.fullmatch(r"task(\d+)_trial(\d+)", file.stem)
        if not numbers:
            raise ValueError(f"{file}: the name says which episode it is, it must be like task00_trial003.npz")
        _, actions = read_arrays(file, ("initial_state", "actions"))
        check_actions(actions, file)
        jobs.append({"task": int(numbers[1]), "trial": int(numbers[2]), "source": str(file)})
    return jobs


def read_arrays(path: str | Path, names: tuple[str, ...]) -> list[np.ndarray]:
    """
    Return arrays of an .npz file, in the order of their names. Nothing is unpickled. Raises FileNotFoundError, or
    ValueError that names the file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            num_bytes = sum(member.file_size for member in archive.infolist())
        if num_bytes > MAX_BYTES:
            raise ValueError(f"{num_bytes:,} bytes, an episode has at most {MAX_BYTES:,}")
        with np.load(path, allow_pickle=False) as arrays:
            return [arrays[name] for name in names]
    except Exception as error:  # of zipfile, zlib and NumPy
        raise ValueError(f"{path}: no recorded episode with {', '.join(names)} ({error}); record it again") from None


def check_actions(actions: np.ndarray, path: str | Path):
    """Raise ValueError that names the file if these are not finite numbers (T, 7)."""
    is_matrix = actions.ndim == 2 and actions.shape[1] == 7 and actions.dtype.kind in "fiu"
    if not is_matrix or not np.isfinite(actions).all():
        raise ValueError(f"{path}: actions are {actions.dtype} {actions.shape}, expected finite numbers (T, 7)")


def stored_trials(suite: str, wanted_tasks: list[int], trials: str) -> list[dict]:
    """
    Return the jobs that start from the stored initial states, in order of task and trial. trials: such as "0-4,7".
    Raises ValueError for a state that does not exist.
    """
    wanted_trials = parse_numbers(trials, "trials")
    jobs = []
    for task in wanted_tasks:
        num_states = len(initial_states(suite, task))
        if wanted_trials[-1] >= num_states:
            raise ValueError(f"--trials {trials}: task {task} has initial states 0 to {num_states - 1}")
        jobs += [{"task": task, "trial": trial} for trial in wanted_trials]
    return jobs


def parse_tasks(text: str, suite: str) -> list[int]:
    """Return the numbers of the tasks in a text such as "0-4,7"; "" is all of the suite. Raises ValueError."""
    num_tasks = len(tasks(suite))
    if not text:
        return list(range(num_tasks))
    wanted = parse_numbers(text, "tasks")
    if wanted[-1] >= num_tasks:
        raise ValueError(f"--tasks {text}: {suite} has tasks 0 to {num_tasks - 1}")
    return wanted


def parse_numbers(text: str, option: str) -> list[int]:
    """Return the numbers in a text, "0-4,7" -> [0, 1, 2, 3, 4, 7]. Raises ValueError that names the option."""
    numbers = set()
    try:
        for part in text.split(","):
            ends = part.split("-")
            numbers |= set(range(int(ends[0]), int(ends[-1]) + 1))
    except ValueError:
        numbers = set()
    if not numbers:
        raise ValueError(f"--{option} {text}: must look like 0-4,7")
    return sorted(numbers)


def unfinished(jobs: list[dict], rows: list[dict]) -> list[dict]:
    """Return the jobs that have no row yet, or one that says that they ended in an error."""
    finished = {(row["task"], row["trial"]) for row in rows if "error" not in row}
    return [job for job in jobs if (job["task"], job["trial"]) not in finished]
