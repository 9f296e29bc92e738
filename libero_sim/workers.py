"""
Simulators in processes of their own, and one policy that answers all of them.

    main process, run_workers                        each simulator's process, simulate

    gives a job                                 -->  plays it, step by step
    answers all waiting questions in one batch  <--  asks: (images, instruction, state, last action)
    the answer, a chunk of actions              -->  carries it out, and asks again
    passes the row on, gives the next job       <--  sends the row of the episode, a dict

A simulator that crashes or hangs takes only its own process with it, and only its episode ends in an error.

Axes: K actions of a chunk, A = 7 dimensions of an action, P = 8 of the state.
"""

import contextlib
import multiprocessing
import signal
import textwrap
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from files import atomic_write, read_json, write_json
from libero_sim.expert import expert
from libero_sim.jobs import episode_file
from libero_sim.report import append_row
from libero_sim.simulator import (
    IMAGE_SIZE,
    NOOP,
    STEPS_PER_SECOND,
    Simulator,
    check_simulator,
    set_up_libero,
    to_simulator,
)
from progress import progress_line

SILENCE = 600  # seconds without a message from any simulator, after which they count as hung
PUSH_STEPS = 3  # of a perturbation
VIDEO_STRIDE = 4  # steps from one frame of a video to the next
CAPTION_HEIGHT = 40  # pixels


# -----------------------------------------------------------------------------
# In a simulator's process


def simulate(conn: Connection, play: Callable, suite: str, assets: str, cameras: tuple[str, ...], blind: bool):
    """
    Play the jobs that come through `conn`, until None comes, and send a row for each. An error becomes a row, too.

    play(sim, job, conn) -> the fields of the row, without "task" and "trial".
    suite, cameras, blind: as Simulator takes them. assets: as set_up_libero.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # at Ctrl-C the main process ends this one
    set_up_libero(assets)
    sim = None
    with contextlib.suppress(EOFError, ConnectionError):  # these mean that the main process is gone
        for job in iter(conn.recv, None):
            try:
                if sim and (sim.task != job["task"] or sim.resets > job["trial"]):
                    sim.close()
                    sim = None
                if sim is None:
                    sim = Simulator(suite, job["task"], cameras, blind)
                fields = play(sim, job, conn)
            except (EOFError, ConnectionError):
                raise
            except Exception:
                fields = {"error": traceback.format_exc()}
                sim = None  # its state is not to be trusted
            conn.send({"task": job["task"], "trial": job["trial"], **fields})
    if sim:
        sim.close()


def play_episode(sim: Simulator, job: dict, conn: Connection, cfg, out: Path) -> dict:
    """Play one episode by the protocol, write its actions and its video, and return its row. cfg: of eval_libero.py."""
    start = time.perf_counter()
    sim.start(job["trial"])
    seconds = {"start": time.perf_counter() - start, "policy": 0.0, "simulator": 0.0}

    policy = policy_actions(sim, job, conn, cfg)
    actions = []
    frames = []
    for step in range(cfg.max_steps):
        if cfg.video and step % VIDEO_STRIDE == 0:
            frames.append(sim.image())

        before = time.perf_counter()
        action = next(policy, None)
        after = time.perf_counter()
        if action is None:  # a recording ends
            break
        sim.step(action)
        seconds["policy"] += after - before
        seconds["simulator"] += time.perf_counter() - after
        actions.append(action)
        if sim.success:
            break

    with atomic_write(episode_file(out, job, ".npz")) as temporary, open(temporary, "wb") as file:
        np.savez(
            file,
            initial_state=sim.states[job["trial"]],
            actions=np.array(actions),
            final_state=sim.full_state(),
        )
    if cfg.video:
        frames.append(sim.image())
        outcome = "success" if sim.success else "failure"
        caption = [*textwrap.wrap(sim.instruction, 46)[:2], f"[{outcome}, {len(actions)} steps]"]
        save_video(episode_file(out, job, ".gif"), frames, "\n".join(caption))
    return {
        "instruction": sim.instruction,
        "success": bool(sim.success),
        "steps": len(actions),
        "seconds": {key: round(value, 3) for key, value in seconds.items()},
    }


def save_video(path: Path, frames: list[np.ndarray], caption: str):
    """Write frames (H, W, 3) uint8 as a GIF in real time, with the caption below them."""
    pages = []
    for frame in frames:
        page = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE + CAPTION_HEIGHT), "white")
        page.paste(Image.fromarray(frame))
        ImageDraw.Draw(page).multiline_text((3, IMAGE_SIZE), caption, "black", spacing=1)
        pages.append(page.quantize(128, dither=Image.Dither.NONE))
    frame_ms = 1000 * VIDEO_STRIDE // STEPS_PER_SECOND
    with atomic_write(path) as temporary:
        pages[0].save(temporary, "GIF", save_all=True, append_images=pages[1:], duration=frame_ms, loop=0)


# -----------------------------------------------------------------------------
# Where the actions come from


def policy_actions(sim: Simulator, job: dict, conn: Connection, cfg) -> Iterator[np.ndarray]:
    """
    Return the actions (A,) of the policy that `cfg.policy` names, as the simulator takes them. Each is to be carried
    out before the next is asked for. cfg: of eval_libero.py.
    """
    rng = np.random.default_rng([cfg.seed, job["task"], job["trial"]])
    if cfg.policy == "noop":
        return repeat(NOOP)
    if cfg.policy == "random":
        return random_actions(rng)
    if cfg.policy == "replay":
        return iter(np.load(job["source"])["actions"])
    if cfg.policy == "expert":
        return with_perturbations(expert(sim), rng, cfg.perturbations)
    return answered_actions(sim, conn)


def random_actions(rng: np.random.Generator) -> Iterator[np.ndarray]:
    while True:
        yield rng.uniform(-1, 1, 7)


def with_perturbations(actions: Iterator[np.ndarray], rng: np.random.Generator, share: float) -> Iterator[np.ndarray]:
    """Yield the actions, and now and then before one of them a push in some direction. The gripper stays as it was."""
    for action in actions:
        if rng.random() < share / PUSH_STEPS:
            direction = rng.uniform(-1, 1, 3)
            push = np.append(direction, [0, 0, 0, action[-1]])
            yield from repeat(push, PUSH_STEPS)
        yield action


def answered_actions(sim: Simulator, conn: Connection) -> Iterator[np.ndarray]:
    """Ask the policy of the main process, carry out all of its answer (K, A), and ask again."""
    action = np.zeros(len(NOOP))
    while True:
        images = [sim.image(camera) for camera in sim.cameras]
        conn.send((images, sim.instruction, sim.state(), action))
        for action in conn.recv():
            yield to_simulator(action)


# -----------------------------------------------------------------------------
# In the main process


@dataclass
class Worker:
    """A simulator's process, this end of the pipe to it, and what it plays."""

    process: SpawnProcess
    conn: Connection
    job: dict | None = None


class WorkerPool:
    """The workers that play something, and the jobs that nobody has yet."""

    def __init__(self, jobs: Iterable[dict], target: Callable, args: tuple):
        self.jobs = deque(jobs)
        self.target = target
        self.args = args
        self.busy: dict[Connection, Worker] = {}

    def start_worker(self):
        """Start a process with the next job, if there is one."""
        if not self.jobs:
            return
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=self.target, args=(theirs, *self.args), daemon=True)
        process.start()
        theirs.close()  # so that the pipe ends when the process does
        self.busy[ours] = Worker(process, ours)
        self.give_job(self.busy[ours])

    def give_job(self, worker: Worker):
        """Send a worker its next job. If there is none, send None: then it ends."""
        if not self.jobs:
            del self.busy[worker.conn]
            worker.conn.send(None)
            return
        worker.job = self.jobs.popleft()
        worker.conn.send(worker.job)

    def wait_for_messages(self) -> list[Worker]:
        """Return the workers that have sent something, or have died. If none does in a long time, all are killed."""
        ready = wait(list(self.busy), SILENCE)
        if not ready:
            for worker in self.busy.values():
                worker.process.kill()
        return [self.busy[conn] for conn in ready]

    def remove_dead(self, worker: Worker) -> dict:
        """Forget a worker that has died, and return the row of the job that it leaves unfinished."""
        worker.process.join()
        del self.busy[worker.conn]
        return {
            "task": worker.job["task"],
            "trial": worker.job["trial"],
            "error": f"the simulator's process died, exit code {worker.process.exitcode}",
        }

    def terminate(self):
        """End the processes that still play something."""
        for worker in self.busy.values():
            worker.process.terminate()


def run_workers(
    jobs: Iterable[dict], num_workers: int, target: Callable, args: tuple, act: Callable | None
) -> Iterator[dict]:
    """
    Let processes play the jobs, and yield the row of each as soon as it ends.

    target(conn, *args) runs in each process: it gets jobs from `conn`, and answers each with its row, a dict.
    act([question, ...]) -> answers: anything else that a process sends is a question, and all that are waiting are
    answered together. A process that dies is replaced, and the row of its job is an error.
    """
    pool = WorkerPool(jobs, target, args)
    try:
        for _ in range(num_workers):
            pool.start_worker()

        while pool.busy:
            questions = []
            asking = []
            for worker in pool.wait_for_messages():
                try:
                    message = worker.conn.recv()
                except (EOFError, ConnectionError):
                    yield pool.remove_dead(worker)
                    pool.start_worker()
                    continue
                if isinstance(message, dict):
                    yield message
                    pool.give_job(worker)
                else:
                    questions.append(message)
                    asking.append(worker)

            if questions:
                for worker, answer in zip(asking, act(questions), strict=True):
                    worker.conn.send(answer)
    finally:
        pool.terminate()


def play_jobs(jobs: list[dict], num_envs: int, args: tuple, act: Callable | None, out: Path):
    """
    Play the jobs in `num_envs` simulators, keep their rows in episodes.jsonl, and print how far it is. args: those of
    `simulate`, without `conn`. act: as for `run_workers`.
    """
    start = time.perf_counter()
    steps = 0
    for done, row in enumerate(run_workers(jobs, num_envs, simulate, args, act), start=1):
        append_row(out / "episodes.jsonl", row)
        steps += row.get("steps", 0)
        progress = progress_line("done", "episodes", done, len(jobs), time.perf_counter() - start)
        print(f"{row_line(row)}   {progress}", flush=True)
    seconds = time.perf_counter() - start
    print(f"{len(jobs)} episodes, {steps} steps in {seconds:.0f} s: {steps / seconds:.1f} steps/s in all")


def row_line(row: dict) -> str:
    """Return a line such as "task 0 trial  3 success   137 steps"."""
    episode = f"task {row['task']} trial {row['trial']:2d}"
    if "error" in row:
        return f"{episode} ERROR"
    outcome = "success" if row["success"] else "failure"
    return f"{episode} {outcome} {row['steps']:5d} steps"


# -----------------------------------------------------------------------------
# Is the simulator as it should be?


def look_at_simulator(out: Path, suite: str, assets: str, needs_images: bool):
    """
    Write the warnings of `check_simulator` to warnings.json. It runs in a process of its own, so that MuJoCo and OpenGL
    stay out of this one. Raises ValueError if the simulator does not run here.
    """
    try:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            warnings = pool.apply(set_up_and_check, (suite, assets, needs_images))
    except Exception as error:  # whatever MuJoCo or OpenGL miss
        raise ValueError(f"the simulator does not run here: {type(error).__name__}: {error}") from None
    write_json(out / "warnings.json", warnings)


def set_up_and_check(suite: str, assets: str, needs_images: bool) -> list[str]:
    set_up_libero(assets)
    return check_simulator(suite, needs_images)


def read_warnings(out: Path) -> list[str]:
    """Return what `look_at_simulator` has found; nothing if no episode has been played here."""
    path = out / "warnings.json"
    if not path.exists():
        return []
    warnings = read_json(path)
    if not isinstance(warnings, list) or not all(isinstance(text, str) for text in warnings):
        raise ValueError(f"{path}: expected a list of texts; remove the file, and the simulator is looked at again")
    return warnings
