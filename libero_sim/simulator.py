"""
LIBERO (https://arxiv.org/abs/2306.03310) as OpenVLA is evaluated in it: tasks, initial states, pictures, gripper.

    setup(assets);  sim = Simulator("libero_spatial", task=0);  sim.start(trial=0);  done = sim.step(action)

Follows experiments/robot/libero/ of github.com/openvla/openvla. An action of the simulator is (dx, dy, dz) x 0.05 m,
(droll, dpitch, dyaw) x 0.5 rad, all in [-1, 1], and a gripper that is -1 for open and 1 for closed; 20 of them each
second.
A policy's action differs in the gripper alone: 1 is open and 0 closed, as in all of Open X-Embodiment.

The simulator is an optional install, imported where it is used: requirements-libero.txt.
Axes: H = W = 256 side of a picture, A = 7 dimensions of an action, S = 8 of the state.
"""

import contextlib
import importlib.util
import json
import os
import sys
import tempfile
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

SUITES = dict(libero_spatial=220, libero_object=280, libero_goal=300, libero_10=520, libero_90=400)  # step limits
SETTLE, NOOP = 10, np.array([0, 0, 0, 0, 0, 0, -1.0])  # the objects are still falling in the first steps
SIZE = 256
CAMERAS = dict(image="agentview", wrist_image="robot0_eye_in_hand")  # names in the RLDS sets -> in the simulator
# robosuite 1.4.0 is LIBERO's version; with 1.4.1, OpenVLA's, two episodes ended in the same states to the last bit
PINNED = {"mujoco": "3.3.2", "robosuite": "1.4.0", "bddl": "1.0.1", "hf-libero": "0.1.4"}
MISSING = """the LIBERO simulator is not installed ({}): pip install -r requirements-libero.txt, then
pip install --no-deps -r requirements-libero-nodeps.txt"""
NO_ASSETS = """{}: no folder with LIBERO's assets (scenes/, textures/, ...). They are on Hugging Face:
`hf download --repo-type dataset lerobot/libero-assets --local-dir libero_assets`, then `--assets libero_assets`"""

# What the third-person camera sees at the start (task 0, state 0): mean red, green and blue, MuJoCo 3.3.2
MEAN_COLOR = dict(libero_spatial=(127.5, 119.1, 110.3), libero_object=(142.5, 135.3, 128.3))
MEAN_COLOR |= dict(libero_goal=(126.2, 116.9, 107.4), libero_10=(77.4, 61.3, 52.0))


# -----------------------------------------------------------------------------
# What passes between policy and simulator


def to_simulator(action: np.ndarray) -> np.ndarray:
    """(A,) of a policy -> (A,) of the simulator: the gripper from [0, 1] to -1 or 1, and turned round."""
    return np.append(action[:-1], -np.sign(2 * action[-1] - 1))


def upright(raw: np.ndarray) -> np.ndarray:
    """The simulator's picture is upside down; the training sets turned theirs by 180 degrees, so left is right."""
    return np.ascontiguousarray(raw[::-1, ::-1])


def axis_angle(q: np.ndarray) -> np.ndarray:
    """Quaternion (x, y, z, w) -> rotation vector (3,) in radians, as robosuite's quat2axisangle (not shortened)."""
    w = float(np.clip(q[3], -1, 1))
    sine = np.sqrt(1 - w * w)
    return np.zeros(3) if sine < 1e-8 else q[:3] * 2 * np.arccos(w) / sine


# -----------------------------------------------------------------------------
# The simulator


def setup(assets: str | Path = ""):
    """
    Point LIBERO at its files before it is imported, so that it neither asks nor downloads. assets: folder, or "" for
    the one inside the package. Raises ValueError with the remedy if something is not there.
    """
    packages = ("libero", "robosuite", "bddl", "mujoco", "numba", "scipy")
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    if absent:
        raise ValueError(MISSING.format(", ".join(absent)))
    package = Path(importlib.util.find_spec("libero").origin).parent / "libero"
    assets = Path(assets or package / "assets").resolve()  # a relative path would be robosuite's
    if not (assets / "scenes").is_dir():
        raise ValueError(NO_ASSETS.format(assets))
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")
        os.environ["PYOPENGL_PLATFORM"] = os.environ["MUJOCO_GL"]
    folders = dict(benchmark_root=package, bddl_files=package / "bddl_files", init_states=package / "init_files")
    folders |= dict(datasets=package, assets=assets)
    config = config_folder() / "config.yaml"
    config.write_text("".join(f"{key}: {json.dumps(str(path))}\n" for key, path in folders.items()))
    os.environ["LIBERO_CONFIG_PATH"] = str(config.parent)
    import libero.libero

    libero.libero._assets_path_cache = str(assets)


@lru_cache(maxsize=1)
def config_folder() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="libero-config-")
    config_folder.keep = folder  # it goes when the process does
    return Path(folder.name)


@lru_cache
def tasks(suite: str) -> list:
    """The suite's tasks: .name, .language (the instruction), .bddl_file, ... Needs `setup`."""
    from libero.libero import benchmark

    with contextlib.redirect_stdout(None):  # it prints the task order
        return benchmark.get_benchmark_dict()[suite]().tasks


def task_file(suite: str, task: int, kind: str) -> Path:
    """kind "bddl_files" or "init_states": the file of that kind of a task."""
    from libero.libero import get_libero_path

    t = tasks(suite)[task]
    name = t.bddl_file if kind == "bddl_files" else t.init_states_file
    return Path(get_libero_path(kind)) / t.problem_folder / name


@lru_cache(maxsize=2)
def initial_states(path: Path) -> np.ndarray:
    """(50, 1 + nq + nv) float64: time, positions and speeds. A pickle, of which nothing but the array may be made."""
    import _codecs

    import torch

    rebuild = (np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct")
    with torch.serialization.safe_globals([_codecs.encode, np.ndarray, np.dtype, np.dtypes.Float64DType, rebuild]):
        return torch.load(path, weights_only=True)


class Simulator:
    """
    One task. cameras: which of CAMERAS to render at each step ("image", "wrist_image"; none is ten times faster).
    blind: there is nothing to render with at all. `obs` holds robosuite's observation after the last step.
    """

    def __init__(self, suite: str, task: int, cameras: tuple[str, ...] = ("image",), blind: bool = False):
        from libero.libero.envs.env_wrapper import ControlEnv

        self.suite, self.task, self.cameras, self.blind, self.resets = suite, task, cameras, blind, 0
        self.instruction = tasks(suite)[task].language
        self.states = initial_states(task_file(suite, task, "init_states"))
        self.env = ControlEnv(
            str(task_file(suite, task, "bddl_files")),
            use_camera_obs=bool(cameras),
            has_offscreen_renderer=not blind,
            camera_names=[CAMERAS[c] for c in cameras] or ["agentview"],
            camera_heights=SIZE,
            camera_widths=SIZE,
        )
        self.env.seed(0)

    def start(self, trial: int, state: np.ndarray | None = None):
        """
        Reset to initial state number `trial`, or to `state`, and let the objects settle.

        Stove, cabinet and wine rack are no part of the states: each reset draws places for them, some centimetres
        apart. The official evaluation resets one simulator once per trial. To see the same scene in trial k, whichever
        process runs it, a fresh one is reset k + 1 times.
        """
        if self.resets > trial:
            raise ValueError(f"trial {trial} after trial {self.resets - 1}: the trials of one simulator must ascend")
        while self.resets <= trial:
            self.skip_rendering(self.blind or self.resets < trial)
            self.reset()
            self.resets += 1
        self.obs = self.env.set_init_state(self.states[trial] if state is None else state)
        self.success = False
        for _ in range(SETTLE):
            self.step(NOOP)

    def reset(self):
        from robosuite.utils.errors import RandomizationError

        while True:
            try:
                return self.env.env.reset()  # ControlEnv.reset would try again for ever, whatever the error
            except RandomizationError:
                continue  # no free place was found; drawn anew

    def skip_rendering(self, skip: bool):
        env = self.env.env  # robosuite's own switches: a reset that nobody looks at takes a third of the time
        env.has_offscreen_renderer, env.use_camera_obs = not skip, bool(self.cameras) and not skip
        for camera in self.cameras:
            env.modify_observable(f"{CAMERAS[camera]}_image", "enabled", not skip)

    def step(self, action: np.ndarray) -> bool:
        """(A,) of the simulator -> whether the task is done. Raises ValueError unless it is seven finite numbers."""
        if np.shape(action) != (7,) or not np.isfinite(action).all():
            raise ValueError(f"an action must be 7 finite numbers, got {action!r}")
        self.obs, _, self.success, _ = self.env.step(np.asarray(action, np.float64))
        return self.success

    def picture(self, camera: str = "image") -> np.ndarray:
        """(H, W, 3) uint8, upright. Of a camera that is not rendered at each step: rendered now."""
        raw = self.obs.get(f"{CAMERAS[camera]}_image") if camera in self.cameras else None
        if raw is None:
            raw = self.env.sim.render(camera_name=CAMERAS[camera], width=SIZE, height=SIZE)
        return upright(raw)

    def state(self) -> np.ndarray:
        """(S,) float32: the hand's position (metres), rotation vector (radians) and the two fingers (metres)."""
        o = self.obs
        parts = o["robot0_eef_pos"], axis_angle(o["robot0_eef_quat"]), o["robot0_gripper_qpos"]
        return np.concatenate(parts).astype(np.float32)

    def full_state(self) -> np.ndarray:
        """(1 + nq + nv,) float64: time, positions and speeds of everything that moves."""
        return self.env.get_sim_state()

    def close(self):
        self.env.close()


# -----------------------------------------------------------------------------
# Is this the simulator that the published figures come from?


def versions() -> dict[str, str]:
    """What a result depends on. Does not import any of it but torch."""
    import torch

    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    names = [*PINNED, "numpy", "torch"]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {name: of(name) for name in names} | dict(gpu=gpu, renderer=os.environ.get("MUJOCO_GL", "default"))


def check_simulator(suite: str, see: bool) -> list[str]:
    """
    Warnings, each with cause and remedy: versions, the colour of one fixed picture (see: whether pictures matter), and
    whether a bowl dropped on the ramekin stays there.
    """
    installed, found = versions(), []
    for name, wanted in PINNED.items():
        if installed[name] != wanted and (name, installed[name]) != ("robosuite", "1.4.1"):
            found.append(f"{name} is {installed[name]}, figures here come from {wanted}: pip install {name}=={wanted}")
    if see and suite in MEAN_COLOR:
        sim = Simulator(suite, 0)
        sim.start(0)
        color, wanted = sim.picture().mean((0, 1)), np.array(MEAN_COLOR[suite])
        sim.close()
        if abs(color - wanted).max() > 5:
            found.append(
                f"{suite}, task 0, state 0: mean colour {color.round(1)} instead of {wanted}: the pictures are not "
                f"those of the training sets. MuJoCo 3.3.3 and newer draw darker floors (20 points less in "
                f"libero_object): pip install mujoco=={PINNED['mujoco']}"
            )
    gap, height = bowl_on_ramekin()
    if gap > 0.03 or not 0 < height < 0.06:
        found.append(
            f"libero_spatial, task 5: the bowl has not settled on the ramekin ({100 * gap:.1f} cm beside it, "
            f"{100 * height:.1f} cm above). MuJoCo 3.4 and newer push touching things apart (98 -> 12 % in that task): "
            f"pip install mujoco=={PINNED['mujoco']}"
        )
    return found


def bowl_on_ramekin() -> tuple[float, float]:
    """Where the bowl of "... the black bowl on the ramekin ..." is after settling: metres beside and above it."""
    task = next(i for i, t in enumerate(tasks("libero_spatial")) if "on_the_ramekin" in t.name)
    sim = Simulator("libero_spatial", task, cameras=(), blind=True)
    sim.start(0)
    bowl, ramekin = (sim.obs[f"{name}_pos"] for name in ("akita_black_bowl_1", "glazed_rim_porcelain_ramekin_1"))
    sim.close()
    return float(np.linalg.norm((bowl - ramekin)[:2])), float((bowl - ramekin)[2])
