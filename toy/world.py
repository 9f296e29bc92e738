"""
A small world to learn in: a table seen from above with three objects on it, and a gripper.

    python toy.py               demonstrations as an RLDS dataset, data/toy/1.0.0
    python toy.py --expert      how often the scripted expert reaches its goal
    python toy.py --gif a.gif   a film of the expert

Actions are those of Bridge V2: (dx, dy, dz, droll, dpitch, dyaw) in metres and radians, and a gripper that is 1 for
open and 0 for closed. Nothing turns here. x points right, y away, z up, all from the table's middle.

Disturbed demonstrations as in DART, https://arxiv.org/abs/1703.09327.
Axes: n scenes, K objects, T steps of an episode.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from formats.write_rlds import VERSION, write_rlds

SIZE, VIEW = 224, 0.3  # pixels and metres along an edge of the picture
STEP, GRID = np.array([0.075, 0.075, 0.1]), np.array([0.025, 0.025, 0.1])  # longest and shortest move, metres
HOME, HOVER, TOP = 0.04, 0.1, 0.14  # where the gripper starts, the height it travels at and the highest
REACH, NEAR, LOW, LIFTED = 0.05, 0.025, 0.03, 0.08  # grasps within, the expert's own, grasps below, is picked up above
MAX_STEPS, SHOVE, SHOVES = 20, 8, 0.15  # disturbances that are so much larger, and how often
TRAIN, VAL, TEST = 0, 1, 2  # seeds; no two have a scene in common

RGB = dict(red=(218, 44, 50), green=(42, 158, 70), blue=(38, 96, 214), yellow=(244, 206, 44), purple=(142, 66, 190))
RGB |= dict(orange=(242, 130, 28), pink=(244, 120, 176), cyan=(40, 190, 206), white=(246, 246, 246), black=(40, 40, 44))
SHAPES = ("cube", "ball", "star")
PHRASES = ("pick up the {}", "grab the {}", "lift the {}", "take the {}")
WORDS = tuple(dict.fromkeys([*" ".join(PHRASES).split(), *RGB, *SHAPES]))  # all that instructions are made of


@dataclass(frozen=True)
class World:
    """What differs from one robot to the next."""

    colors: tuple[str, ...] = ("red", "green", "blue")
    table: tuple[int, int, int] = (128, 128, 128)
    follows: bool = True  # the camera is above the gripper; else above the table's middle
    turns: int = 0  # quarter turns of the camera, anticlockwise
    open_value: float = 1.0  # of the gripper's action; one minus it closes
    noise: float = 0.012  # metres, spread of what demonstrations do around what they record
    tidy: float = 0.4  # share of the demonstrations in which each colour has its place: a first hold for words


CHANGED = World(("orange", "pink", "cyan"), table=(96, 122, 128), turns=1, open_value=0.0)


@dataclass
class Scene:
    names: list[str]  # K of "red cube"
    objects: np.ndarray  # (K, 3) metres
    gripper: np.ndarray  # (3,)
    phrase: str
    named: int  # the object in the instruction
    other: int  # the object in the swapped instruction
    is_open: bool = True
    held: int = -1

    def is_done(self, k: int) -> bool:
        """Whether object k is picked up, judged by where it is."""
        return self.held == k and bool(self.objects[k, 2] >= LIFTED)


def make_scene(seed: int, index: int, world: World, tidy: bool = False, turn: int = 0) -> Scene:
    """
    Scene number `index` of the endless list that `seed` stands for. tidy: colours stand in the world's order, left to
    right. turn 1 or 2: the same, but another object is named.
    """
    rng = np.random.default_rng([seed, index])
    gaps = np.zeros((3, 3))
    while gaps.min() < 0.12:  # metres between objects
        objects = np.pad(rng.uniform(-0.11, 0.11, (3, 2)), ((0, 0), (0, 1)))
        gaps = np.linalg.norm(objects[:, None] - objects, axis=-1) + np.eye(3)
    colors = rng.permutation(world.colors)[:3].tolist()
    if tidy:
        places = np.linspace(-0.09, 0.09, len(world.colors))[[world.colors.index(c) for c in colors]]
        objects[:, 0] = places + rng.uniform(-0.02, 0.02, 3)
    names = [f"{c} {s}" for c, s in zip(colors, rng.permutation(SHAPES), strict=True)]
    gripper, (named, other) = np.append(rng.uniform(-HOME, HOME, 2), HOVER), rng.permutation(3)[:2].tolist()
    named, other = (named + turn) % 3, (other + turn) % 3
    return Scene(names, objects, gripper, str(rng.choice(PHRASES)), named, other)


# -----------------------------------------------------------------------------
# Drawing


@lru_cache(maxsize=4096)
def sprite(kind: str, rgb: tuple, size: int) -> tuple[Image.Image, Image.Image]:
    """A thing `size` pixels wide in the middle of a picture twice as wide, RGBA, and its soft shadow."""
    big = 8 * size  # drawn four times as large: smooth edges
    pen = ImageDraw.Draw(img := Image.new("RGBA", (big, big)))

    def shade(gain: float) -> tuple:
        return tuple(int(min(255, c * gain)) for c in rgb)

    def box(*corners: float) -> list:
        return [(2 + v) * big / 4 for v in corners]  # -1 ... 1 is the thing

    if kind == "cube":
        for low, high, gain in ((-0.9, 0.9, 0.62), (-0.9, 0.66, 1.0), (-0.74, 0.5, 1.13)):
            pen.rounded_rectangle(box(low, low, high, high), big / 40, shade(gain))
    elif kind == "ball":
        for i in range(16):  # lit from the upper left
            r, d = 1 - i / 17, -0.32 * i / 16
            pen.ellipse(box(d - r, d - r, d + r, d + r), shade(0.68 + 0.55 * i / 15))
    elif kind == "star":
        angle = np.arange(10) * np.pi / 5
        corners = np.stack([np.sin(angle), -np.cos(angle)], axis=1) * np.tile([1.0, 0.5], 5)[:, None]  # (10, 2)
        for radius, gain in ((1.15, 0.7), (0.9, 1.08)):
            pen.polygon(box(*(radius * corners).ravel()), shade(gain))
    else:  # the gripper, "open" or "closed": two fingers, and the hand that they are on
        for x in (-0.62, 0.62) if kind == "open" else (-0.34, 0.34):
            pen.rounded_rectangle(box(x - 0.13, -0.85, x + 0.13, 0.5), big / 60, shade(1.0))
            pen.rounded_rectangle(box(x - 0.13, 0.2, x + 0.13, 0.5), big / 60, shade(3.5))
        pen.rounded_rectangle(box(-0.85, -1.15, 0.85, -0.7), big / 40, shade(1.35))
        pen.ellipse(box(-0.3, -1.22, 0.3, -0.62), shade(2.2))
    img = img.resize((2 * size, 2 * size), Image.Resampling.BOX)
    shadow = Image.new("RGBA", img.size)
    shadow.putalpha(img.getchannel("A").filter(ImageFilter.GaussianBlur(size / 14)).point(lambda a: int(0.4 * a)))
    return img, shadow


@lru_cache
def background(rgb: tuple) -> Image.Image:
    """A table of boards, twice as wide as the picture, as the camera may move."""
    grain = np.random.default_rng(0).normal(0, 1.5, 2 * SIZE) - 14 * (np.arange(2 * SIZE) % (SIZE // 4) == 0)
    table = np.clip(np.array(rgb) + grain[:, None, None], 0, 255).astype(np.uint8)
    return Image.fromarray(np.repeat(table, 2 * SIZE, axis=1))


def draw(scene: Scene, world: World) -> np.ndarray:
    """The camera's picture, (224, 224, 3) uint8. Higher things are larger and their shadow is farther away."""
    middle, scale = scene.gripper * world.follows, SIZE / VIEW  # metres, pixels per metre
    x, y = (int(round(SIZE / 2 + v * scale)) for v in (middle[0], -middle[1]))
    img = background(world.table).crop((x, y, x + SIZE, y + SIZE))
    things = []
    for k in sorted(range(len(scene.names)), key=lambda k: k == scene.held):  # what is held covers the rest
        color, shape = scene.names[k].split()
        things.append((shape, RGB[color], 0.1, scene.objects[k]))
    things.append(("open" if scene.is_open else "closed", (70, 74, 84), 0.05, scene.gripper))
    for kind, rgb, width, xyz in things:
        picture, shadow = sprite(kind, rgb, round(width * (1 + 4 * xyz[2]) * scale))
        x, y = (int(round(SIZE / 2 + v * scale)) - picture.width // 2 for v in (xyz - middle)[:2] * [1, -1])
        far = 1 + round(0.4 * xyz[2] * scale)
        img.paste(shadow, (x + far, y + far), shadow)
        img.paste(picture, (x, y), picture)
    return np.rot90(np.asarray(img), world.turns).copy()


# -----------------------------------------------------------------------------
# Moving, the expert, rollouts


def step(scene: Scene, action: np.ndarray, world: World):
    """Change the scene by one action (7,): the gripper moves, then it opens or closes."""
    high = np.array([0.18, 0.18, TOP])
    scene.gripper = np.clip(scene.gripper + np.clip(action[:3], -STEP, STEP), -high * [1, 1, 0], high)
    opens = bool((action[6] > 0.5) == (world.open_value > 0.5))
    if scene.is_open and not opens and scene.gripper[2] < LOW:
        away = np.linalg.norm(scene.objects[:, :2] - scene.gripper[:2], axis=1)
        scene.held = int(away.argmin()) if away.min() < REACH else -1
    if scene.held >= 0:
        scene.objects[scene.held] = scene.gripper * [1, 1, not opens]  # falls when let go
    scene.held, scene.is_open = -1 if opens else scene.held, opens


def expert(scene: Scene, k: int, world: World) -> np.ndarray:
    """The action (7,) float32 that leads to object k being picked up. Sees only the state, so it recovers."""
    holds, away = scene.held == k, np.append(scene.objects[k, :2], HOVER) - scene.gripper
    move = np.clip(np.rint(away / GRID) * GRID, -STEP, STEP)  # few different moves are sooner learned
    if not holds and np.hypot(*(away - move)[:2]) < NEAR:  # above it after this step: go down
        move[2] = np.clip(np.rint(-scene.gripper[2] / GRID[2]) * GRID[2], -STEP[2], STEP[2])
    closes = holds or (np.hypot(*away[:2]) < NEAR and scene.gripper[2] < GRID[2] / 2)
    return np.array([*move, 0, 0, 0, 1 - world.open_value if closes else world.open_value], np.float32)


@dataclass
class Result:
    """What n rollouts came to."""

    success: np.ndarray  # (n,) bool, the object of the original instruction was picked up
    other: np.ndarray  # (n,) bool, the object of the swapped instruction was
    steps: np.ndarray  # (n,) int64, actions taken
    episodes: list[dict] = field(default_factory=list)  # the recorded ones


def rollout(
    act,
    seed,
    n,
    world=World(),
    swap=False,
    record=0,
    first=0,
    noise=0.0,
    linger=0,
    **options,  # noqa: B008
) -> Result:
    """
    Act in scenes first ... first + n - 1 of `seed`, all at once; a scene that is done takes no further part, but for
    `linger` more steps.

    act(images (n, 224, 224, 3) uint8, instructions, n of str) -> actions (n, 7), or chunks (n, K, 7) that are carried
    out before it is asked again, in metres, radians and the world's gripper values; None: the expert. swap: the
    instruction names another object of the scene, and picking up that one ends it. record: the first so many come back
    as episodes, dicts of image (T + 1, 224, 224, 3) uint8, state and action (T, 7) float32, instruction. noise: metres,
    spread of what is done around what `act` says and what is recorded. options: of `make_scene`.
    """
    scenes = [make_scene(seed, first + i, world, **options) for i in range(n)]
    asked = [s.other if swap else s.named for s in scenes]
    texts = [s.phrase.format(s.names[k]) for s, k in zip(scenes, asked, strict=True)]
    rng, live = np.random.default_rng([seed, first, n]), list(range(n))
    result = Result(np.zeros(n, bool), np.zeros(n, bool), np.zeros(n, int))
    rows = [[] for _ in scenes]  # T of (image, state, action) per scene
    plans, over = [[] for _ in scenes], np.zeros(n, int)  # what each is still to do; steps since it was done
    for _ in range(MAX_STEPS):
        asking = [i for i in live if not plans[i]]
        images = {i: draw(scenes[i], world) for i in live if i < record or (act and i in asking)}
        if act and asking:
            answers = act(np.stack([images[i] for i in asking]), [texts[i] for i in asking])
        else:
            answers = [expert(scenes[i], asked[i], world) for i in asking]
        for i, answer in zip(asking, answers, strict=True):
            plans[i] = list(np.atleast_2d(answer))
        for i in live:
            scene, keep, image, action = scenes[i], i < record, images.get(i), plans[i].pop(0)
            state = np.array([*scene.gripper, 0, 0, 0, scene.is_open], np.float32)
            rows[i] += [(image, state, np.asarray(action, np.float32))] * keep
            shift = rng.normal(0, noise, 3) * ([SHOVE, SHOVE, 1] if rng.random() < SHOVES else 1)
            step(scene, action + np.pad(shift, (0, 4)), world)
            result.steps[i] += 1
            result.success[i], result.other[i] = scene.is_done(scene.named), scene.is_done(scene.other)
        for i in live:
            over[i] += bool((result.other if swap else result.success)[i])
        live = [i for i in live if over[i] <= linger]
        if not live:
            break
    for i in range(min(record, n)):
        image, state, action = zip(*rows[i], strict=True)
        image = np.stack([*image, draw(scenes[i], world)])
        result.episodes.append(dict(image=image, state=np.stack(state), action=np.stack(action), instruction=texts[i]))
    return result


def demonstrations(seed: int, n: int, world: World = World(), linger: int = 0) -> Iterator[dict]:  # noqa: B008
    """n successful episodes of the expert. It is disturbed, so that it shows how to recover. linger: see `rollout`."""
    index = made = 0
    while made < n:
        i, turn = divmod(index, 3)  # each scene once for each object: only the words tell the three apart
        options = dict(noise=world.noise, linger=linger, tidy=i % 100 < 100 * world.tidy, turn=turn)
        result = rollout(None, seed, 1, world, record=1, first=i, **options)
        if result.success[0]:
            yield result.episodes[0]
        index, made = index + 1, made + result.success[0]


def save_gif(path: str | Path, episodes: list[dict], size: int = 160):
    """The episodes side by side, their instructions above, each waiting at its end for the longest."""
    frames = []
    for t in range(max(len(e["image"]) for e in episodes) + 3):
        pen = ImageDraw.Draw(frame := Image.new("RGB", (size * len(episodes), size + 16), "white"))
        for i, e in enumerate(episodes):
            picture = Image.fromarray(e["image"][min(t, len(e["image"]) - 1)])
            frame.paste(picture.resize((size - 2, size), Image.Resampling.BOX), (i * size, 16))
            pen.text((i * size + 4, 2), e["instruction"], "black")
        frames.append(frame.quantize(64, dither=Image.Dither.NONE))
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=250, loop=0)


def is_written(folder: str, name: str) -> bool:
    """Whether the demonstrations are there, and not only a part that a killed run left."""
    return (Path(folder) / name / VERSION).is_dir()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("--folder", default="data", help="where the dataset goes, as FOLDER/toy/1.0.0")
    parser.add_argument("--episodes", type=int, default=2000)
    parser.add_argument("--changed", action="store_true", help="the changed world")
    parser.add_argument("--expert", action="store_true", help="try the expert in 200 unseen scenes instead")
    parser.add_argument("--gif", default="", help="write a film of the expert to this file instead")
    args = parser.parse_args()
    world = CHANGED if args.changed else World()
    if args.gif:
        save_gif(args.gif, rollout(None, TEST, 4, world, record=4).episodes)
    elif args.expert:
        r = rollout(None, TEST, 200, world)
        print(f"the expert succeeds in {r.success.mean():.1%} of 200 scenes, in {r.steps.mean():.1f} steps")
    else:
        splits = dict(train=demonstrations(TRAIN, args.episodes, world), val=demonstrations(VAL, 20, world))
        print(f"{args.episodes} demonstrations, and 20 for validation: {write_rlds(args.folder, splits)}")
