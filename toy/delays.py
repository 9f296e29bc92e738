"""
What late answers cost: success in the toy world against the delay between a question and its chunk of actions.

    python -m toy.delays                                  # the expert's chunks, in seconds
    python -m toy.delays --checkpoint runs/toy_oft        # an OFT policy's

The clock is simulated: an answer arrives so many steps of the robot after its question, however fast this machine is.
Three ways to live with that, by robots/client.py's buffer:

    waiting    the robot stands still until the answer is there, carries out `open_loop` actions, and asks again
    naive      it asks ahead, and begins an answer at its first action when it arrives
    overlap    it asks ahead, and begins an answer at the action that is due when it arrives

An episode has as many steps as in toy.play, and the steps in which the robot stands still count.
Axes: n scenes, K actions of a chunk, A = 7 action dimensions.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from configurator import configure, fail
from policy import load_policy, predict_chunk
from robots.client import ChunkBuffer
from toy import world

WAYS = ("waiting", "naive", "overlap")


@dataclass
class Config:
    checkpoint: str = ""  # of an OFT policy; "": the expert's chunks, which need no training
    unnorm_key: str = ""  # whose statistics give the action its units; may be left out if the checkpoint has one
    delays: tuple[int, ...] = (0, 1, 2, 3, 4, 6, 8)  # steps from a question to its answer
    chunk: int = 8  # actions of the expert's chunk
    open_loop: int = 4  # steps from one question to the next
    noise: float = 0.01  # metres, spread of what is done around what was asked for
    scenes: int = 200  # unseen ones


class Robot:
    """One scene, and the answers on their way to it."""

    def __init__(self, number: int, way: str):
        self.scene = world.make_scene(world.TEST, number, world.STANDARD)
        self.goal = self.scene.named
        self.way = way
        self.buffer = ChunkBuffer(skip_late=way == "overlap")
        self.done = 0  # actions that it has carried out: what counts in the buffer, as in client.Plan
        self.asked_at: int | None = None  # how many it was at the question that has no answer yet
        self.answer: np.ndarray | None = None  # what it will be, (K, A), ...
        self.arrives = 0  # ... and the step at which it arrives
        self.next_question = 0  # how many it is when it asks again

    def wants_to_ask(self) -> bool:
        """True if it asks now: waiting only when nothing is left to do."""
        if self.asked_at is not None:
            return False
        if self.way == "waiting":
            return not self.buffer.actions
        return self.done >= self.next_question

    def ask(self, answer: np.ndarray, arrives: int):
        self.asked_at = self.done
        self.answer = answer
        self.arrives = arrives

    def receive(self, step: int, open_loop: int):
        """Take the answer, if it is there by now."""
        if self.asked_at is None or step < self.arrives:
            return
        chunk = self.answer[:open_loop] if self.way == "waiting" else self.answer
        self.buffer.add(chunk, self.asked_at, self.done)
        self.next_question = self.asked_at + open_loop
        self.asked_at = None

    def act(self, noise: np.ndarray):
        """Carry out the action that is due; without one, stand still."""
        action = self.buffer.take(self.done)
        if action is not None:
            world.step(self.scene, action + noise, world.STANDARD)
            self.done += 1


def expert_chunk(robot: Robot, length: int) -> np.ndarray:
    """Return what the expert would do from here on, (K, A), if nothing disturbed it."""
    scene = copy.deepcopy(robot.scene)
    actions = []
    for _ in range(length):
        actions.append(world.expert(scene, robot.goal, world.STANDARD))
        world.step(scene, actions[-1], world.STANDARD)
    return np.stack(actions)


def success_rate(way: str, delay: int, answer: Callable[[list[Robot]], np.ndarray], cfg: Config) -> float:
    """Return the share of scenes in which the named object was picked up. answer: n robots -> chunks (n, K, A)."""
    robots = [Robot(number, way) for number in range(cfg.scenes)]
    rng = np.random.default_rng([world.TEST, cfg.scenes])
    for step in range(world.MAX_STEPS):
        active = [robot for robot in robots if not robot.scene.is_done(robot.goal)]
        asking = [robot for robot in active if robot.wants_to_ask()]
        if asking:
            for robot, chunk in zip(asking, answer(asking), strict=True):
                robot.ask(chunk, arrives=step + delay)
        for robot in active:
            robot.receive(step, cfg.open_loop)
            robot.act(world.disturbance(cfg.noise, rng))
    return float(np.mean([robot.scene.is_done(robot.goal) for robot in robots]))


def make_answer(cfg: Config) -> Callable[[list[Robot]], np.ndarray]:
    """Return the function that answers robots: the expert, or a policy. Raises ValueError or OSError."""
    if not cfg.checkpoint:
        return lambda robots: np.stack([expert_chunk(robot, cfg.chunk) for robot in robots])
    policy = load_policy(cfg.checkpoint)

    def answer(robots: list[Robot]) -> np.ndarray:
        images = [[world.draw(robot.scene, world.STANDARD)] for robot in robots]
        instructions = [robot.scene.instruction(robot.goal) for robot in robots]
        return predict_chunk(policy, images, instructions, unnorm_key=cfg.unnorm_key)

    return answer


def main(cfg: Config):
    if cfg.scenes < 1 or cfg.open_loop < 1 or cfg.chunk < cfg.open_loop or min(cfg.delays, default=0) < 0:
        fail("--scenes and --open_loop must be 1 or more, --chunk at least --open_loop, and --delays 0 or more")
    try:
        answer = make_answer(cfg)
    except (ValueError, OSError) as error:
        fail(error)
    print("delay, steps " + "".join(f"{way:>10s}" for way in WAYS))
    for delay in cfg.delays:
        rates = [success_rate(way, delay, answer, cfg) for way in WAYS]
        print(f"{delay:12d} " + "".join(f"{rate:10.1%}" for rate in rates), flush=True)


if __name__ == "__main__":
    main(configure(Config))
