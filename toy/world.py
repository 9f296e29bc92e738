"""
A small world to learn in: a table seen from above with three objects on it, and a gripper.

    python -m toy.world               write demonstrations as an RLDS dataset, data/toy/1.0.0
    python -m toy.world --expert      how often the scripted expert reaches its goal
    python -m toy.world --gif a.gif   a video of the expert

Actions are those of Bridge V2: (dx, dy, dz, droll, dpitch, dyaw) in metres and radians, and a gripper that is 1 for
open and 0 for closed. Nothing rotates here. x points right, y away from you, z up. All count from the table's middle.

The expert is disturbed and led astray, so that the demonstrations show how to recover (DART,
https://arxiv.org/abs/1703.09327).

Axes: n scenes, K = 3 objects, T steps of an episode.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from configurator import fail
from formats.workers import serve_main_process
from formats.write_lerobot import write_lerobot
from formats.write_rlds import VERSION, write_rlds

# The camera
SIZE = 112  # pixels along an edge of the image
VIEW = 0.3  # metres of the table along an edge of the image
SCALE = SIZE / VIEW  # pixels per metre

# Where objects stand
OBJECT_WIDTH = 0.1  # metres
OBJECT_SPREAD = 0.11  # metres from the table's middle, in x and in y, at most
OBJECT_GAP = 0.12  # metres between the middles of two objects, at least

# What the gripper can do
GRIPPER_WIDTH = 0.05  # metres
GRIPPER_RGB = (70, 74, 84)
STEP = np.array([0.075, 0.075, 0.1])  # metres, the longest move in x, y and z
HIGHEST = np.array([0.18, 0.18, 0.14])  # metres, how far it can go
LOWEST = np.array([-0.18, -0.18, -0.0])  # -0.0: recorded states keep their bits
START_SPREAD = 0.04  # metres from the table's middle, in x and in y, at most
HOVER = 0.1  # metres, the height at which it starts and travels
GRASP_HEIGHT = 0.03  # metres, it grasps only below this
GRASP_RADIUS = 0.05  # metres, it grasps what is nearer than this
LIFTED = 0.08  # metres, an object is picked up from this height on

# How the expert moves
GRID = np.array([0.025, 0.025, 0.1])  # metres; moves are multiples of it: the fewer they are, the sooner learned
NEAR = 0.025  # metres, how exactly above an object it goes down and closes

# Episodes
FPS = 5  # steps per second, where data says how fast it is; the world has no clock
MAX_STEPS = 20  # after these an episode has failed
LARGE_SHARE = 0.15  # share of the disturbances that are large
LARGE_FACTOR = 8  # times as far as the others, in x and y
LONGEST_DETOUR = 6  # steps
RANDOM_SHARE = 0.5  # share of the detours that are random; on the others an expert wants another object
OPEN_SHARE = 0.7  # share of the steps of a random detour that open the gripper
EPISODES_AHEAD = 64  # that several processes make before the next ones begin

# Seeds; no two have a scene in common
TRAIN = 0
VAL = 1
TEST = 2
PRACTICE = 3  # where a policy learns by acting, see toy/environment.py

RGB = {
    "red": (218, 44, 50),
    "green": (42, 158, 70),
    "blue": (38, 96, 214),
    "yellow": (244, 206, 44),
    "purple": (142, 66, 190),
    "orange": (242, 130, 28),
    "pink": (244, 120, 176),
    "cyan": (40, 190, 206),
    "white": (246, 246, 246),
    "black": (40, 40, 44),
}
SHAPES = ("cube", "ball", "star")
PHRASES = ("pick up the {}", "grab the {}", "lift the {}", "take the {}")

# All that instructions are made of, each word once
WORDS = tuple(dict.fromkeys([*" ".join(PHRASES).split(), *RGB, *SHAPES]))


# -----------------------------------------------------------------------------
# Worlds and scenes


@dataclass(frozen=True)
class World:
    """What differs from one robot to the next."""

    colors: tuple[str, ...] = ("red", "green", "blue")
    table: tuple[int, int, int] = (128, 128, 128)  # its colour
    follows: bool = True  # the camera is above the gripper; else above the table's middle
    turns: int = 0  # quarter turns of the camera, anticlockwise
    open_value: float = 1.0  # of the gripper's action; one minus it closes
    noise: float = 0.012  # metres, spread of what demonstrations do around what they record
    detour: float = 0.25  # share of the demonstrations in which the hand is led astray first
    tidy: float = 0.4  # share of the demonstrations in which each colour has its place: a first hold for words


STANDARD = World()
CHANGED = World(colors=("orange", "pink", "cyan"), table=(96, 122, 128), turns=1, open_value=0.0)


@dataclass
class Scene:
    """The state of the world at one moment, and what may be asked for."""

    names: list[str]  # K of "red cube"
    objects: np.ndarray  # (K, 3) metres
    gripper: np.ndarray  # (3,) metres
    phrase: str  # one of PHRASES
    named: int  # the object in the instruction
    other: int  # the object in the swapped instruction
    is_open: bool = True
    held: int = -1  # the object in the gripper; -1: none

    def instruction(self, k: int) -> str:
        """Return the instruction that asks for object k."""
        return self.phrase.format(self.names[k])

    def is_done(self, k: int) -> bool:
        """True if object k is picked up, judged by where it is."""
        return self.held == k and bool(self.objects[k, 2] >= LIFTED)


def make_scene(seed: int, index: int, world: World, tidy: bool = False, turn: int = 0) -> Scene:
    """
    Return scene number `index` of the endless list that belongs to `seed`.

    tidy: colours stand in the world's order, from left to right. turn 1 or 2: the same scene, but another object is
    named.
    """
    rng = np.random.default_rng([seed, index])

    # Three objects, far enough from each other to be grasped alone.
    nearest = 0.0
    while nearest < OBJECT_GAP:
        places = rng.uniform(-OBJECT_SPREAD, OBJECT_SPREAD, (3, 2))
        objects = np.pad(places, ((0, 0), (0, 1)))  # (K, 3), on the table
        gaps = np.linalg.norm(objects[:, None] - objects, axis=-1)  # (K, K)
        nearest = (gaps + np.eye(3)).min()  # an object's gap to itself does not count

    colors = rng.permutation(world.colors)[:3].tolist()
    if tidy:
        columns = np.linspace(-0.09, 0.09, len(world.colors))  # metres
        own_columns = columns[[world.colors.index(color) for color in colors]]
        objects[:, 0] = own_columns + rng.uniform(-0.02, 0.02, 3)
    shapes = rng.permutation(SHAPES)
    names = [f"{color} {shape}" for color, shape in zip(colors, shapes, strict=True)]

    gripper = np.append(rng.uniform(-START_SPREAD, START_SPREAD, 2), HOVER)
    named, other = rng.permutation(3)[:2].tolist()
    phrase = str(rng.choice(PHRASES))
    return Scene(names, objects, gripper, phrase, named=(named + turn) % 3, other=(other + turn) % 3)


# -----------------------------------------------------------------------------
# Drawing


class Pen:
    """Draws one thing in shades of one colour. In its coordinates the thing reaches from -1 to 1, right and down."""

    def __init__(self, size: int, rgb: tuple[int, int, int]):
        # The image is twice as wide as the thing, and drawn four times as large: smooth edges.
        self.width = 8 * size
        self.rgb = rgb
        self.image = Image.new("RGBA", (self.width, self.width))
        self.canvas = ImageDraw.Draw(self.image)

    def shade(self, gain: float) -> tuple[int, ...]:
        """Return the colour, brighter or darker."""
        return tuple(int(min(255, channel * gain)) for channel in self.rgb)

    def pixels(self, *coordinates: float) -> list[float]:
        return [(2 + value) * self.width / 4 for value in coordinates]

    def rectangle(self, left: float, top: float, right: float, bottom: float, radius: float, gain: float):
        """radius: of the corners, in pixels."""
        self.canvas.rounded_rectangle(self.pixels(left, top, right, bottom), radius, self.shade(gain))

    def ellipse(self, left: float, top: float, right: float, bottom: float, gain: float):
        self.canvas.ellipse(self.pixels(left, top, right, bottom), self.shade(gain))

    def polygon(self, corners: np.ndarray, gain: float):
        """corners: (number of corners, 2)."""
        self.canvas.polygon(self.pixels(*corners.ravel()), self.shade(gain))


def draw_cube(pen: Pen):
    """A dark side, a face, and a lighter middle."""
    for low, high, gain in ((-0.9, 0.9, 0.62), (-0.9, 0.66, 1.0), (-0.74, 0.5, 1.13)):
        pen.rectangle(low, low, high, high, radius=pen.width / 40, gain=gain)


def draw_ball(pen: Pen):
    """Sixteen discs, smaller and brighter towards the upper left, where the light comes from."""
    for i in range(16):
        radius = 1 - i / 17
        middle = -0.32 * i / 16
        low = middle - radius
        high = middle + radius
        pen.ellipse(low, low, high, high, gain=0.68 + 0.55 * i / 15)


def draw_star(pen: Pen):
    """A dark star with five points, and a brighter one in it."""
    angles = np.arange(10) * np.pi / 5
    directions = np.stack([np.sin(angles), -np.cos(angles)], axis=1)  # (10, 2)
    radii = np.tile([1.0, 0.5], 5)  # points and notches in turn
    corners = directions * radii[:, None]
    for size, gain in ((1.15, 0.7), (0.9, 1.08)):
        pen.polygon(size * corners, gain)


def draw_gripper(pen: Pen, is_open: bool):
    """Two fingers with bright tips, and the hand that they are on."""
    gap = 0.62 if is_open else 0.34
    for x in (-gap, gap):
        pen.rectangle(x - 0.13, -0.85, x + 0.13, 0.5, radius=pen.width / 60, gain=1.0)
        pen.rectangle(x - 0.13, 0.2, x + 0.13, 0.5, radius=pen.width / 60, gain=3.5)
    pen.rectangle(-0.85, -1.15, 0.85, -0.7, radius=pen.width / 40, gain=1.35)
    pen.ellipse(-0.3, -1.22, 0.3, -0.62, gain=2.2)


@lru_cache(maxsize=4096)
def sprite(kind: str, rgb: tuple[int, int, int], size: int) -> tuple[Image.Image, Image.Image]:
    """
    Return a thing `size` pixels wide in the middle of an RGBA image twice as wide, and its soft shadow.
    kind: a shape, or "open" or "closed" for the gripper.
    """
    pen = Pen(size, rgb)
    if kind == "cube":
        draw_cube(pen)
    elif kind == "ball":
        draw_ball(pen)
    elif kind == "star":
        draw_star(pen)
    else:
        draw_gripper(pen, is_open=kind == "open")
    image = pen.image.resize((2 * size, 2 * size), Image.Resampling.BOX)

    outline = image.getchannel("A").filter(ImageFilter.GaussianBlur(size / 14))
    shadow = Image.new("RGBA", image.size)
    shadow.putalpha(outline.point(lambda alpha: int(0.4 * alpha)))
    return image, shadow


@lru_cache
def background(rgb: tuple[int, int, int]) -> Image.Image:
    """Return a table of boards, twice as wide as an image, as the camera may move."""
    rows = np.arange(2 * SIZE)
    brightness = np.random.default_rng(0).normal(0, 1.5, 2 * SIZE)
    brightness[rows % (SIZE // 4) == 0] -= 14  # the gaps between the boards
    column = np.array(rgb) + brightness[:, None, None]  # (2 SIZE, 1, 3)
    column = np.clip(column, 0, 255).astype(np.uint8)
    return Image.fromarray(np.repeat(column, 2 * SIZE, axis=1))


def to_pixel(place: np.ndarray) -> tuple[int, int]:
    """A place (2 or 3,), in metres from the middle of the image, to its pixel: column and row."""
    column = int(round(SIZE / 2 + place[0] * SCALE))
    row = int(round(SIZE / 2 - place[1] * SCALE))  # rows count downwards, y upwards
    return column, row


def paste(
    image: Image.Image, kind: str, rgb: tuple[int, int, int], width: float, place: np.ndarray, camera: np.ndarray
):
    """Draw a thing, `width` metres wide, into the image. If it is higher, it is larger and its shadow farther away."""
    height = place[2]
    picture, shadow = sprite(kind, rgb, round(width * (1 + 4 * height) * SCALE))
    column, row = to_pixel(place - camera)
    column -= picture.width // 2
    row -= picture.height // 2
    shift = 1 + round(0.4 * height * SCALE)
    image.paste(shadow, (column + shift, row + shift), shadow)
    image.paste(picture, (column, row), picture)


def draw(scene: Scene, world: World) -> np.ndarray:
    """Return the camera's image, (SIZE, SIZE, 3) uint8."""
    camera = scene.gripper if world.follows else np.zeros(3)
    left, top = to_pixel(camera)
    image = background(world.table).crop((left, top, left + SIZE, top + SIZE))

    # What is held covers the other objects, and the gripper covers all.
    order = [k for k in range(len(scene.names)) if k != scene.held]
    if scene.held >= 0:
        order.append(scene.held)
    for k in order:
        color, shape = scene.names[k].split()
        paste(image, shape, RGB[color], OBJECT_WIDTH, scene.objects[k], camera)
    gripper = "open" if scene.is_open else "closed"
    paste(image, gripper, GRIPPER_RGB, GRIPPER_WIDTH, scene.gripper, camera)
    return np.rot90(np.asarray(image), world.turns).copy()


# -----------------------------------------------------------------------------
# Moving, and the expert


def step(scene: Scene, action: np.ndarray, world: World):
    """Change the scene by one action (7,): the gripper moves, then it opens or closes."""
    move = np.clip(action[:3], -STEP, STEP)
    scene.gripper = np.clip(scene.gripper + move, LOWEST, HIGHEST)
    opens = bool((action[6] > 0.5) == (world.open_value > 0.5))

    # Grasp what is nearest.
    closes_now = scene.is_open and not opens
    if closes_now and scene.gripper[2] < GRASP_HEIGHT:
        distances = np.linalg.norm(scene.objects[:, :2] - scene.gripper[:2], axis=1)  # (K,)
        if distances.min() < GRASP_RADIUS:
            scene.held = int(distances.argmin())

    # What is held moves along, and falls when it is let go.
    if scene.held >= 0:
        scene.objects[scene.held] = scene.gripper
        if opens:
            scene.objects[scene.held, 2] = 0.0
            scene.held = -1
    scene.is_open = opens


def expert(scene: Scene, k: int, world: World) -> np.ndarray:
    """
    Return the action (7,) float32 that leads to object k being picked up. The expert goes by the state alone and has no
    plan, so it recovers from disturbances.
    """
    is_held = scene.held == k
    above = np.append(scene.objects[k, :2], HOVER)
    away = above - scene.gripper
    move = on_grid(away)

    # Once this move ends above the object, go down as well.
    if not is_held and horizontal_distance(away - move) < NEAR:
        move[2] = on_grid(-scene.gripper)[2]

    is_there = horizontal_distance(away) < NEAR and scene.gripper[2] < GRID[2] / 2
    if is_held or is_there:
        gripper = 1 - world.open_value
    else:
        gripper = world.open_value
    return np.array([*move, 0, 0, 0, gripper], np.float32)


def on_grid(away: np.ndarray) -> np.ndarray:
    """Return the nearest move that the expert makes, (3,) metres."""
    return np.clip(np.rint(away / GRID) * GRID, -STEP, STEP)


def horizontal_distance(away: np.ndarray) -> float:
    """Return the length of a vector (3,) without its height."""
    return np.hypot(away[0], away[1])


# -----------------------------------------------------------------------------
# Rollouts


@dataclass
class Run:
    """One scene of a rollout, and how far it has come."""

    scene: Scene
    goal: int  # the object that the instruction asks for
    instruction: str
    is_recorded: bool
    steps_astray: int = 0  # at the beginning, in which another hand than `act`'s is at work
    is_random: bool = False  # that hand moves at random; else it is an expert who wants another object
    plan: list[np.ndarray] = field(default_factory=list)  # actions (7,) that are still to be carried out
    steps: int = 0
    steps_done: int = 0  # those that ended with the goal picked up
    image: np.ndarray | None = None  # of the scene as it is, if the policy or the record wants it
    images: list[np.ndarray] = field(default_factory=list)  # the record: what was seen, ...
    states: list[np.ndarray] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)  # ... and what the policy answered

    def record(self, action: np.ndarray):
        """Write down the image, the state and the action of this step."""
        state = [*self.scene.gripper, 0, 0, 0, self.scene.is_open]
        self.images.append(self.image)
        self.states.append(np.array(state, np.float32))
        self.actions.append(np.asarray(action, np.float32))

    def episode(self, world: World) -> dict:
        """Return the record, with one more image that shows how it ended."""
        return {
            "image": np.stack([*self.images, draw(self.scene, world)]),
            "state": np.stack(self.states),
            "action": np.stack(self.actions),
            "instruction": self.instruction,
        }


@dataclass
class Result:
    """How n rollouts ended."""

    success: np.ndarray  # (n,) bool, the object of the original instruction was picked up
    other: np.ndarray  # (n,) bool, the object of the swapped instruction was
    steps: np.ndarray  # (n,) int64, actions taken
    episodes: list[dict]  # the recorded ones


def rollout(
    act: Callable[[np.ndarray, list[str]], np.ndarray] | None,
    seed: int,
    n: int,
    world: World = STANDARD,
    *,
    swap: bool = False,
    record: int = 0,
    first: int = 0,
    noise: float = 0.0,
    detour: float = 0.0,
    linger: int = 0,
    tidy: bool = False,
    turn: int = 0,
) -> Result:
    """
    Act in the scenes first ... first + n - 1 of `seed`, all at once, until they are done or MAX_STEPS have passed.

    act: takes images (n, SIZE, SIZE, 3) uint8 and n instructions. Returns actions (n, 7) in metres, radians and the
        world's gripper values; or chunks (n, K, 7), which are carried out before it is asked again. None: the expert.
    swap: the instruction names another object of the scene, and a scene is done when that one is picked up.
    record: the first so many come back as episodes, which are dicts of image (T + 1, SIZE, SIZE, 3) uint8, state and
        action (T, 7) float32, and instruction.
    noise: metres, spread of what is done around what `act` says. The record has what `act` says.
    detour: share of the scenes in which something else is done at first. The record has what `act` says.
    linger: steps that a scene goes on after it is done.
    tidy, turn: see `make_scene`.
    """
    runs = []
    for i in range(n):
        scene = make_scene(seed, first + i, world, tidy, turn)
        goal = scene.other if swap else scene.named
        runs.append(Run(scene, goal, scene.instruction(goal), is_recorded=i < record))
    rng = np.random.default_rng([seed, first, n])  # of the disturbances
    if detour:
        for run in runs:
            plan_detour(run, detour, rng)

    for _ in range(MAX_STEPS):
        active = [run for run in runs if run.steps_done <= linger]
        if not active:
            break
        draw_wanted_images(active, world, has_policy=act is not None)
        plan_actions(active, world, act)
        for run in active:
            action = run.plan.pop(0)
            if run.is_recorded:
                run.record(action)
            if run.steps < run.steps_astray:
                action = lead_astray(run, world, rng)
            step(run.scene, action + disturbance(noise, rng), world)
            run.steps += 1
            if run.scene.is_done(run.goal):
                run.steps_done += 1

    return Result(
        success=np.array([run.scene.is_done(run.scene.named) for run in runs], bool),
        other=np.array([run.scene.is_done(run.scene.other) for run in runs], bool),
        steps=np.array([run.steps for run in runs], int),
        episodes=[run.episode(world) for run in runs if run.is_recorded],
    )


def draw_wanted_images(active: list[Run], world: World, has_policy: bool):
    """Draw the scenes whose image is wanted: those that are recorded, and those that need an answer of the policy."""
    for run in active:
        needs_answer = has_policy and not run.plan
        run.image = draw(run.scene, world) if run.is_recorded or needs_answer else None


def plan_actions(active: list[Run], world: World, act: Callable | None):
    """Ask for the next actions of all scenes that have none left."""
    asking = [run for run in active if not run.plan]
    if not asking:
        return
    if act is None:
        answers = [expert(run.scene, run.goal, world) for run in asking]
    else:
        images = np.stack([run.image for run in asking])
        answers = act(images, [run.instruction for run in asking])
    for run, answer in zip(asking, answers, strict=True):
        run.plan = list(np.atleast_2d(answer))  # one action (7,) is a chunk (1, 7)


def disturbance(noise: float, rng: np.random.Generator) -> np.ndarray:
    """Return what is added to an action, (7,): a small shift of the move, now and then a large one."""
    shift = rng.normal(0, noise, 3)
    if rng.random() < LARGE_SHARE:
        shift[:2] *= LARGE_FACTOR
    return np.pad(shift, (0, 4))


def plan_detour(run: Run, share: float, rng: np.random.Generator):
    """Decide whether the hand is led astray, for how long, and by whom."""
    is_led = rng.random() < share
    run.is_random = rng.random() < RANDOM_SHARE
    steps = int(rng.integers(1, LONGEST_DETOUR + 1))
    if is_led:
        run.steps_astray = steps


def lead_astray(run: Run, world: World, rng: np.random.Generator) -> np.ndarray:
    """Return what is done on a detour, (7,)."""
    if not run.is_random:  # another expert, who wants the next object
        other = (run.goal + 1) % len(run.scene.names)
        return expert(run.scene, other, world)
    opens = rng.random() < OPEN_SHARE
    gripper = world.open_value if opens else 1 - world.open_value
    return np.array([*rng.uniform(-STEP, STEP), 0, 0, 0, gripper])


def demonstrations(seed: int, n: int, world: World = STANDARD, linger: int = 0, processes: int = 1) -> Iterator[dict]:
    """
    Yield n successful episodes of the expert, as `rollout` records them. The hand is disturbed and led astray, and the
    record has what the expert says to that: so the data shows how to recover. linger: steps that an episode goes on
    after success. The episodes are the same with any number of processes.
    """
    make = partial(demonstrate, seed, world, linger)
    episodes = map(make, count()) if processes == 1 else make_together(make, processes)
    made = 0
    for episode in episodes:
        if made == n:
            return
        if episode is not None:
            made += 1
            yield episode


def demonstrate(seed: int, world: World, linger: int, number: int) -> dict | None:
    """Return the expert's episode of that number, or None if it has not succeeded."""
    # Each scene comes three times, once for each object: only the instruction tells the three apart.
    index, turn = divmod(number, 3)
    tidy = index % 100 < 100 * world.tidy
    result = rollout(
        None,
        seed,
        1,
        world,
        record=1,
        first=index,
        noise=world.noise,
        detour=world.detour,
        linger=linger,
        tidy=tidy,
        turn=turn,
    )
    return result.episodes[0] if result.success[0] else None


def make_together(make: Callable[[int], dict | None], processes: int) -> Iterator[dict | None]:
    """Yield make(0), make(1), ... without an end, made by several processes."""
    with ProcessPoolExecutor(processes, initializer=serve_main_process) as pool:
        for start in count(0, EPISODES_AHEAD):
            yield from pool.map(make, range(start, start + EPISODES_AHEAD), chunksize=8)


# -----------------------------------------------------------------------------
# Videos and the command line


def save_gif(path: str | Path, episodes: list[dict], size: int = 160):
    """Write the episodes side by side, their instructions above. Each waits at its end for the longest."""
    longest = max(len(episode["image"]) for episode in episodes)
    frames = []
    for t in range(longest + 3):
        frame = Image.new("RGB", (size * len(episodes), size + 16), "white")
        pen = ImageDraw.Draw(frame)
        for i, episode in enumerate(episodes):
            last = len(episode["image"]) - 1
            image = Image.fromarray(episode["image"][min(t, last)])
            image = image.resize((size - 2, size), Image.Resampling.BOX)
            frame.paste(image, (i * size, 16))
            pen.text((i * size + 4, 2), episode["instruction"], "black")
        frames.append(frame.quantize(64, dither=Image.Dither.NONE))
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=250, loop=0)


def is_written(folder: str, name: str) -> bool:
    """True if the demonstrations are there, and not only a part that a killed run left."""
    return (Path(folder) / name / VERSION).is_dir()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="data", help="where the dataset goes, as FOLDER/NAME/1.0.0 (data)")
    parser.add_argument("--name", default="toy", help="of the dataset (toy)")
    parser.add_argument("--episodes", type=int, default=2000, help="demonstrations to train on (2000)")
    parser.add_argument("--validation", type=int, default=20, help="further ones, for validation (20)")
    parser.add_argument("--linger", type=int, default=0, help="steps that an episode goes on after success (0)")
    parser.add_argument("--noise", type=float, default=STANDARD.noise, help=f"metres of disturbance ({STANDARD.noise})")
    parser.add_argument(
        "--detour", type=float, default=STANDARD.detour, help=f"share led astray first ({STANDARD.detour})"
    )
    parser.add_argument("--changed", action="store_true", help="the changed world of toy/transfer.py")
    parser.add_argument("--expert", action="store_true", help="try the expert in 200 unseen scenes instead")
    parser.add_argument("--lerobot", default="", help="write the demonstrations to this folder, as LeRobot v3, instead")
    parser.add_argument("--gif", default="", help="write a video of the expert to this file instead")
    args = parser.parse_args()
    world = replace(CHANGED if args.changed else STANDARD, noise=args.noise, detour=args.detour)

    if args.gif:
        save_gif(args.gif, rollout(None, TEST, 4, world, record=4).episodes)
        return
    if args.expert:
        result = rollout(None, TEST, 200, world)
        print(f"the expert succeeds in {result.success.mean():.1%} of 200 scenes, in {result.steps.mean():.1f} steps")
        return

    if args.lerobot:
        episodes = demonstrations(TRAIN, args.episodes, world, args.linger)
        try:
            folder = write_lerobot(args.lerobot, episodes, fps=FPS, robot_type="toy")
        except (ImportError, ValueError, OSError) as error:
            fail(error)
        print(f"{args.episodes} demonstrations in {folder}")
        return

    if is_written(args.folder, args.name):
        print(f"{Path(args.folder) / args.name} is there already; remove it to make other demonstrations")
        return
    processes = os.cpu_count() or 1
    splits = {"train": demonstrations(TRAIN, args.episodes, world, args.linger, processes)}
    if args.validation:
        splits["val"] = demonstrations(VAL, args.validation, world, args.linger)
    folder = write_rlds(args.folder, splits, args.name)
    print(f"{args.episodes} demonstrations in {folder}")


if __name__ == "__main__":
    main()
