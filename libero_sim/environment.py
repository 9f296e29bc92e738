"""
LIBERO as finetune_rl.py plays in it: several simulators, each in a process of its own (libero_sim/workers.py).

    environment = LiberoEnvironment("libero_spatial", num_envs=2)
    environment.reset([0, 1])                       # two episodes, by the numbers of their start states
    images = environment.observe([0, 1])            # of each (256, 256, 3) uint8
    environment.step([0, 1], actions)               # (2, 7), as a policy gives them
    environment.success                             # (2,) bool

Start states are drawn by LIBERO's own placement of the objects, from a seed. They are not the fifty stored states of
each task, which a policy is evaluated in. There is no expert here: success is all that it tells.
"""

import atexit
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from libero_sim.jobs import parse_tasks
from libero_sim.simulator import NOOP, SETTLE, SUITES, Simulator, set_up_libero, to_simulator
from libero_sim.workers import SILENCE, Worker, simulate

FIRST_TRIAL = 1000  # number of the first drawn start state; stored ones have smaller numbers


@dataclass
class LiberoEnvironment:
    suite: str = "libero_spatial"
    tasks: str = ""  # such as 0-4,7; "": all of the suite
    num_envs: int = 1  # simulator processes; each takes 1.3 to 2.2 GB of memory
    assets: str = ""  # LIBERO's assets folder; "": inside the installed package
    max_steps: int = 0  # of an episode; 0: the official limit

    instructions: list[str] = field(default_factory=list, init=False, repr=False)
    success: np.ndarray = field(default_factory=lambda: np.zeros(0, bool), init=False, repr=False)  # (n,)
    workers: list[Worker] = field(default_factory=list, init=False, repr=False)
    images: list[np.ndarray] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self):
        """Raises ValueError for an unknown suite."""
        if self.suite not in SUITES:
            raise ValueError(f"suite {self.suite!r}: must be one of {', '.join(SUITES)}")
        self.max_steps = self.max_steps or SUITES[self.suite]

    @property
    def most_at_once(self) -> int:
        return self.num_envs

    def reset(self, seeds: Sequence[int]):
        """
        Start an episode for each number. Numbers go through the tasks in turn. Raises ValueError if the simulator is
        not installed, or if there is no such task.
        """
        self.start_workers()
        for worker, seed in zip(self.workers, seeds, strict=False):
            task = self.task_numbers[seed % len(self.task_numbers)]
            worker.job = {"task": task, "trial": FIRST_TRIAL + seed, "max_steps": self.max_steps}
            worker.conn.send(worker.job)

        n = len(seeds)
        self.success = np.zeros(n, bool)
        self.instructions = [""] * n
        self.images = [np.zeros(0)] * n
        for i in range(n):
            self.receive(i)

    def observe(self, episodes: Sequence[int]) -> list[np.ndarray]:
        """Return what the camera sees in these episodes, (256, 256, 3) uint8 each, upright."""
        return [self.images[i] for i in episodes]

    def step(self, episodes: Sequence[int], actions: np.ndarray):
        """Carry out one action in each of these episodes, (len(episodes), 7). The simulators do it at the same time."""
        for i, action in zip(episodes, actions, strict=True):
            self.workers[i].conn.send(action)
        for i in episodes:
            self.receive(i)

    # The processes

    def start_workers(self):
        """Start the processes, unless they run. They end with this one."""
        if self.workers:
            return
        set_up_libero(self.assets)
        self.task_numbers = parse_tasks(self.tasks, self.suite)
        context = multiprocessing.get_context("spawn")
        for _ in range(self.num_envs):
            ours, theirs = context.Pipe()
            args = (theirs, play_for_training, self.suite, self.assets, ("image",), False)
            process = context.Process(target=simulate, args=args, daemon=True)
            process.start()
            theirs.close()  # so that the pipe ends when the process does
            self.workers.append(Worker(process, ours))
        atexit.register(self.close)

    def receive(self, i: int):
        """Wait for what episode i sends: what it sees now, or how it has ended. Raises OSError if it broke."""
        worker = self.workers[i]
        place = f"LIBERO task {worker.job['task']}, start state {worker.job['trial']}"
        if not worker.conn.poll(SILENCE):
            raise OSError(f"{place}: the simulator has said nothing for {SILENCE} s; fewer --num_envs may help")
        try:
            message = worker.conn.recv()
        except (EOFError, ConnectionError):
            worker.process.join()
            raise OSError(f"{place}: the simulator's process died, exit code {worker.process.exitcode}") from None
        if not isinstance(message, dict):
            self.images[i], self.instructions[i] = message
            return
        if "error" in message:
            raise OSError(f"{place}: {message['error']}")
        self.success[i] = message["success"]

    def close(self):
        """End the processes."""
        for worker in self.workers:
            worker.process.terminate()
        self.workers = []


def play_for_training(sim: Simulator, job: dict, conn) -> dict:
    """
    Play one episode from a start state that the simulator draws: send what it sees and its instruction, receive an
    action, until it succeeds or `max_steps` have passed. Returns the row of the episode. Runs in a simulator's process.
    """
    start_anew(sim, seed=job["trial"])
    for _ in range(job["max_steps"]):
        conn.send((sim.image(), sim.instruction))
        sim.step(to_simulator(conn.recv()))
        if sim.success:
            break
    return {"success": bool(sim.success)}


def start_anew(sim: Simulator, seed: int):
    """Place the objects as LIBERO does, from a seed, and let them settle."""
    sim.env.seed(seed)
    sim.use_renderer(not sim.blind)
    sim.reset()
    sim.obs = sim.env.set_init_state(sim.full_state())
    sim.success = False
    for _ in range(SETTLE):
        sim.step(NOOP)
