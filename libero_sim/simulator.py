"""
LIBERO (https://arxiv.org/abs/2306.03310) as OpenVLA is evaluated in it: tasks, initial states, images, gripper.

    set_up_libero(assets)
    sim = Simulator("libero_spatial", task=0)
    sim.start(trial=0)
    image = sim.image()               # (H, W, 3) uint8
    is_solved = sim.step(action)      # (A,)

An action of the simulator is (dx, dy, dz) x 0.05 m, (droll, dpitch, dyaw) x 0.5 rad, all in [-1, 1], and a gripper
that is -1 for open and 1 for closed. It takes 20 of them a second. A policy's action differs in the gripper alone:
there 1 is open and 0 closed, as in all of Open X-Embodiment.

Follows experiments/robot/libero/ of github.com/openvla/openvla. The simulator is an optional install
(requirements-libero.txt), so its packages are imported where they are used.

Axes: H = W = 256 side of an image, A = 7 dimensions of an action, P = 8 of the state, nq positions, nv speeds.
"""

import _codecs
import contextlib
import importlib.util
import json
import logging
import os
import sys
import tempfile
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

SUITES = {  # name -> the most steps of an episode
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
CAMERAS = {  # name in the RLDS sets -> name in the simulator
    "image": "agentview",
    "wrist_image": "robot0_eye_in_hand",
}
IMAGE_SIZE = 256  # pixels
STEPS_PER_SECOND = 20
SETTLE = 10  # steps at the start, in which the objects are still falling
NOOP = np.array([0, 0, 0, 0, 0, 0, -1.0])  # stand still, open

# robosuite 1.4.0 is LIBERO's version. With 1.4.1, OpenVLA's, two episodes ended in the same states to the last bit.
PINNED = {"mujoco": "3.3.2", "robosuite": "1.4.0", "bddl": "1.0.1", "hf-libero": "0.1.4"}
ALSO_FINE = {"robosuite": "1.4.1"}
MEAN_COLOR = {  # red, green and blue of the third-person image at the start (task 0, state 0), with MuJoCo 3.3.2
    "libero_spatial": (127.5, 119.1, 110.3),
    "libero_object": (142.5, 135.3, 128.3),
    "libero_goal": (126.2, 116.9, 107.4),
    "libero_10": (77.4, 61.3, 52.0),
}

NOT_INSTALLED = """the LIBERO simulator is not installed ({}): pip install -r requirements-libero.txt, then
pip install --no-deps -r requirements-libero-nodeps.txt"""
NO_ASSETS = """{}: no folder with LIBERO's assets (scenes/, textures/, ...). They are on Hugging Face:
`hf download --repo-type dataset lerobot/libero-assets --local-dir libero_assets`, then `--assets libero_assets`"""


# -----------------------------------------------------------------------------
# Between policy and simulator


def to_simulator(action: np.ndarray) -> np.ndarray:
    """Return a policy's action (A,) as the simulator's: the gripper, 1 open to 0 closed, becomes -1 or 1."""
    gripper = -np.sign(2 * action[-1] - 1)
    return np.append(action[:-1], gripper)


def upright(raw: np.ndarray) -> np.ndarray:
    """
    Turn the simulator's image (H, W, 3) by 180 degrees, as the training sets did. It comes upside down, so left and
    right are exchanged afterwards.
    """
    return np.ascontiguousarray(raw[::-1, ::-1])


def axis_angle(q: np.ndarray) -> np.ndarray:
    """Quaternion (x, y, z, w) -> rotation vector (3,) in radians, as robosuite's quat2axisangle (not shortened)."""
    w = float(np.clip(q[3], -1, 1))
    sine = np.sqrt(1 - w * w)
    if sine < 1e-8:
        return np.zeros(3)
    return q[:3] * 2 * np.arccos(w) / sine


# -----------------------------------------------------------------------------
# LIBERO's files


def set_up_libero(assets: str | Path = ""):
    """
    Point LIBERO at its files before it is imported, so that it neither asks nor downloads.

    assets: the folder with its scenes and textures; "" for the one inside the package.
    Raises ValueError that says how to get what is missing.
    """
    packages = ("libero", "robosuite", "bddl", "mujoco", "numba", "scipy")
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    if absent:
        raise ValueError(NOT_INSTALLED.format(", ".join(absent)))

    package = Path(importlib.util.find_spec("libero").origin).parent / "libero"
    assets = Path(assets or package / "assets").resolve()  # robosuite would look for a relative path in its own folder
    if not (assets / "scenes").is_dir():
        raise ValueError(NO_ASSETS.format(assets))

    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")
        os.environ["PYOPENGL_PLATFORM"] = os.environ["MUJOCO_GL"]

    # robosuite would warn three times in every process that nobody has written a "private macro file" for it.
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)

    folders = {
        "benchmark_root": package,
        "bddl_files": package / "bddl_files",
        "init_states": package / "init_files",
        "datasets": package,
        "assets": assets,
    }
    lines = [f"{key}: {json.dumps(str(path))}\n" for key, path in folders.items()]
    config = Path(config_folder().name) / "config.yaml"
    config.write_text("".join(lines))
    os.environ["LIBERO_CONFIG_PATH"] = str(config.parent)

    import libero.libero

    # LIBERO does not read the assets' folder from its config. It looks into this variable, or else downloads them.
    libero.libero._assets_path_cache = str(assets)


@lru_cache(maxsize=1)
def config_folder() -> tempfile.TemporaryDirectory:
    """Make the folder of this process for LIBERO's config.yaml. It is removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="libero-config-")


@lru_cache
def tasks(suite: str) -> list:
    """Return the tasks of a suite: .name, .language (the instruction), .bddl_file, ... Needs `set_up_libero`."""
    from libero.libero import benchmark

    with contextlib.redirect_stdout(None):  # it prints the order of the tasks
        return benchmark.get_benchmark_dict()[suite]().tasks


def bddl_file(suite: str, task: int) -> Path:
    """Return the file that describes the scene and the goal of a task."""
    from libero.libero import get_libero_path

    entry = tasks(suite)[task]
    return Path(get_libero_path("bddl_files")) / entry.problem_folder / entry.bddl_file


def initial_states(suite: str, task: int) -> np.ndarray:
    """Return the initial states of a task, (50, 1 + nq + nv) float64: time, positions and speeds."""
    from libero.libero import get_libero_path

    entry = tasks(suite)[task]
    return read_states(Path(get_libero_path("init_states")) / entry.problem_folder / entry.init_states_file)


@lru_cache(maxsize=2)
def read_states(path: Path) -> np.ndarray:
    """Read a file of initial states. It is a pickle, of which nothing but the array may be made."""
    rebuild = (np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct")
    allowed = [_codecs.encode, np.ndarray, np.dtype, np.dtypes.Float64DType, rebuild]
    with torch.serialization.safe_globals(allowed):
        return torch.load(path, weights_only=True)


# -----------------------------------------------------------------------------
# The simulator


class Simulator:
    """One task. `obs` holds robosuite's observation after the last step, `success` whether the task is solved."""

    def __init__(self, suite: str, task: int, cameras: tuple[str, ...] = ("image",), blind: bool = False):
        """
        cameras: which of CAMERAS to render at each step; without any, a step is ten times faster.
        blind: never render, so that no OpenGL is needed.
        """
        from libero.libero.envs.env_wrapper import ControlEnv

        self.suite = suite
        self.task = task
        self.cameras = cameras
        self.blind = blind
        self.resets = 0
        self.instruction = tasks(suite)[task].language
        self.states = initial_states(suite, task)
        self.env = ControlEnv(
            str(bddl_file(suite, task)),
            use_camera_obs=bool(cameras),
            has_offscreen_renderer=not blind,
            camera_names=[CAMERAS[camera] for camera in cameras] or ["agentview"],
            camera_heights=IMAGE_SIZE,
            camera_widths=IMAGE_SIZE,
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
            is_last = self.resets == trial
            self.use_renderer(is_last and not self.blind)  # nobody looks at the others
            self.reset()
            self.resets += 1

        if state is None:
            state = self.states[trial]
        self.obs = self.env.set_init_state(state)
        self.success = False
        for _ in range(SETTLE):
            self.step(NOOP)

    def reset(self):
        """Reset the scene. ControlEnv.reset would try again for ever, whatever the error is."""
        from robosuite.utils.errors import RandomizationError

        while True:
            try:
                return self.env.env.reset()
            except RandomizationError:
                continue  # it found no free place for an object, and draws again

    def use_renderer(self, use: bool):
        """Turn robosuite's renderer on or off. A reset without it takes a third of the time."""
        env = self.env.env
        env.has_offscreen_renderer = use
        env.use_camera_obs = use and bool(self.cameras)
        for camera in self.cameras:
            env.modify_observable(f"{CAMERAS[camera]}_image", "enabled", use)

    def step(self, action: np.ndarray) -> bool:
        """
        Carry out an action (A,) of the simulator, and return whether the task is solved. Raises ValueError unless it is
        seven finite numbers.
        """
        if np.shape(action) != (7,) or not np.isfinite(action).all():
            raise ValueError(f"an action must be 7 finite numbers, got {action!r}")
        self.obs, _, self.success, _ = self.env.step(np.asarray(action, np.float64))
        return self.success

    def image(self, camera: str = "image") -> np.ndarray:
        """Return a camera's image (H, W, 3) uint8, upright. It is rendered now, unless each step has rendered it."""
        name = CAMERAS[camera]
        raw = None
        if camera in self.cameras:
            raw = self.obs.get(f"{name}_image")
        if raw is None:
            raw = self.env.sim.render(camera_name=name, width=IMAGE_SIZE, height=IMAGE_SIZE)
        return upright(raw)

    def state(self) -> np.ndarray:
        """Return (P,) float32: the hand's position (metres), rotation vector (radians), the two fingers (metres)."""
        position = self.obs["robot0_eef_pos"]
        rotation = axis_angle(self.obs["robot0_eef_quat"])
        fingers = self.obs["robot0_gripper_qpos"]
        return np.concatenate([position, rotation, fingers]).astype(np.float32)

    def full_state(self) -> np.ndarray:
        """Return (1 + nq + nv,) float64: time, positions and speeds of everything that moves."""
        return self.env.get_sim_state()

    def close(self):
        self.env.close()


# -----------------------------------------------------------------------------
# Is this the simulator that the published figures come from?


def versions() -> dict[str, str]:
    """Return what a result depends on: the versions of packages, the GPU, the renderer."""
    found = {package: installed_version(package) for package in [*PINNED, "numpy", "torch"]}
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    found["renderer"] = os.environ.get("MUJOCO_GL", "default")
    return found


def installed_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def check_simulator(suite: str, needs_images: bool) -> list[str]:
    """
    Return warnings, each with cause and remedy. Three things are looked at: the versions; the colours of one fixed
    image, if images matter; and whether a bowl that is dropped on a ramekin stays there.
    """
    warnings = check_versions()
    if needs_images and suite in MEAN_COLOR:
        warnings += check_colors(suite)
    warnings += check_resting_bowl()
    return warnings


def check_versions() -> list[str]:
    warnings = []
    for package, wanted in PINNED.items():
        installed = installed_version(package)
        if installed not in (wanted, ALSO_FINE.get(package)):
            warnings.append(
                f"{package} is {installed}, figures here come from {wanted}: pip install {package}=={wanted}"
            )
    return warnings


def check_colors(suite: str) -> list[str]:
    sim = Simulator(suite, task=0)
    sim.start(trial=0)
    color = sim.image().mean((0, 1))  # (3,)
    sim.close()

    wanted = np.array(MEAN_COLOR[suite])
    if abs(color - wanted).max() <= 5:
        return []
    return [
        f"{suite}, task 0, state 0: mean colour {color.round(1)} instead of {wanted}: the images are not those of the "
        f"training sets. MuJoCo 3.3.3 and newer draw darker floors (20 points less in libero_object): "
        f"pip install mujoco=={PINNED['mujoco']}"
    ]


def check_resting_bowl() -> list[str]:
    gap, height = bowl_on_ramekin()
    if gap <= 0.03 and 0 < height < 0.06:
        return []
    return [
        f"libero_spatial, task 5: the bowl has not settled on the ramekin ({100 * gap:.1f} cm beside it, "
        f"{100 * height:.1f} cm above). MuJoCo 3.4 and newer push touching things apart (98 -> 12 % in that task): "
        f"pip install mujoco=={PINNED['mujoco']}"
    ]


def bowl_on_ramekin() -> tuple[float, float]:
    """Return where the bowl of "... the black bowl on the ramekin ..." comes to rest: metres beside it and above it."""
    names = [task.name for task in tasks("libero_spatial")]
    task = next(i for i, name in enumerate(names) if "on_the_ramekin" in name)
    sim = Simulator("libero_spatial", task, cameras=(), blind=True)
    sim.start(trial=0)
    offset = sim.obs["akita_black_bowl_1_pos"] - sim.obs["glazed_rim_porcelain_ramekin_1_pos"]
    sim.close()
    gap = float(np.linalg.norm(offset[:2]))
    height = float(offset[2])
    return gap, height
