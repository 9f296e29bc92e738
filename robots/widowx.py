"""
Evaluate a policy on a real WidowX, by OpenVLA's BridgeData V2 protocol: 5 actions a second, 60 steps an episode, and a
person who says whether it was a success.

    python -m robots.widowx --checkpoint openvla-7b --host localhost --port 5556

The robot's side is the service of github.com/rail-berkeley/bridge_data_robot. Its client must be installed here: `pip
install` in that repository's widowx_envs, and edgeml. Before each episode the program asks for the instruction, and
afterwards for the outcome. Ctrl-C ends an episode, not the program. --out holds episodes.jsonl and, for each episode, a
video and every step; the same command again goes on after the last whole episode.

    main -> evaluate -> for each episode: ask_instruction -> go_to_start -> play -> ask_outcome -> save

experiments/robot/bridge/run_bridgev2_eval.py and widowx_env.py of github.com/openvla/openvla.
Axes: H height, W width, K actions of a chunk, A action dimensions.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from checkpoint import open_checkpoint
from configurator import configure, fail
from files import atomic_write, read_json, write_json
from image import JPEG, WHOLE
from metrics import wilson
from policy import Policy, dataset_stats, load_policy, pick_device, pick_dtype, pick_engine, predict_chunk
from progress import show_progress


@dataclass
class Config:
    checkpoint: str = ""  # folder in Hugging Face layout, LoRA run, OFT folder (one camera), or a name on the hub
    base_checkpoint: str = ""  # of a LoRA run: its base; "": as its adapter_config.json says
    host: str = "localhost"
    port: int = 5556
    unnorm_key: str = "bridge_orig"
    episodes: int = 50
    max_steps: int = 60
    frequency: float = 5.0  # actions per second
    blocking: bool = False  # wait until each movement is done
    open_loop: int = 1  # actions of a chunk (OFT, FAST) that are carried out before the policy is asked again
    start: tuple[float, ...] = (0.3, -0.09, 0.26)  # where the gripper begins, metres
    camera: str = "/blue/image_raw"
    out: str = "runs/bridge_eval"
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = "auto"  # bfloat16, float32, float16
    engine: str = "auto"  # generate in fewer passes (speed/engine.py): auto, on, off


# Options that may change while an evaluation goes on; all others are its protocol
NOT_PROTOCOL = ("episodes", "host", "port", "out", "device", "base_checkpoint", "engine")

# The workspace: lowest and highest x, y, z in metres, yaw in radians, and a number that is not used
BOUNDS = [[0.1, -0.20, -0.01, -1.57, 0], [0.45, 0.25, 0.30, 1.57, 0]]

# At the start the gripper points 15 degrees away from straight down: as a matrix, and as a quaternion
START_ROTATION = [[0.267, 0, 0.963], [0, 1, 0], [-0.963, 0, 0.267]]
START_QUATERNION = [0, -0.259, 0, -0.966]

STATE_DIM = 7  # numbers of the robot's state
VIDEO_SIZE = (320, 240)  # pixels, width and height


# -----------------------------------------------------------------------------
# The robot


def import_client():
    """Return the module of the robot's client. Raises ModuleNotFoundError that says what to install."""
    try:
        from widowx_envs import widowx_env_service
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}: install widowx_envs of github.com/rail-berkeley/bridge_data_robot, and edgeml"
        ) from None
    return widowx_env_service


def check_status(status, action: str):
    """Raise ConnectionError if the client's answer to an action, which is a number, is not success."""
    status = int(status)
    if status == 1:
        return
    reasons = {0: "no connection", 2: "it could not be carried out", 3: "the robot is not initialized"}
    raise ConnectionError(f"{action}: {reasons.get(status, f'status {status}')}")


def connect(service, cfg: Config):
    """Return a WidowX client whose robot is ready. Raises ConnectionError."""
    settings = {
        **service.WidowXConfigs.DefaultEnvParams,
        "override_workspace_boundaries": BOUNDS,
        "return_full_image": True,
        "camera_topics": [{"name": cfg.camera}],
        "start_state": [*cfg.start, *START_QUATERNION],
    }
    robot = service.WidowXClient(host=cfg.host, port=cfg.port)
    check_status(robot.init(settings), f"setting up the robot at {cfg.host}:{cfg.port}")
    return robot


def observe(robot, patience: float = 30.0) -> tuple[np.ndarray, np.ndarray]:
    """
    Return the camera's image (H, W, 3) uint8 and the robot's state (7,). Raises ConnectionError if none comes within
    `patience` seconds.
    """
    end = time.monotonic() + patience
    observation = robot.get_observation()
    while observation is None:
        if time.monotonic() > end:
            raise ConnectionError(f"no observation from the robot for {patience:g} s; is its service up?")
        time.sleep(0.2)
        observation = robot.get_observation()
    return np.asarray(observation["full_image"]), np.asarray(observation["state"], np.float64)


def go_to_start(robot, cfg: Config):
    """Move the gripper to where every episode begins. Raises ConnectionError."""
    check_status(robot.reset(), "reset")
    pose = np.eye(4)
    pose[:3, :3] = START_ROTATION
    pose[:3, 3] = cfg.start
    status = robot.move(pose, duration=0.8, blocking=True)  # without blocking, the episode begins on the way
    check_status(status, "moving to the start")


# -----------------------------------------------------------------------------
# One episode


def ask_policy(
    policy: Policy,
    image: np.ndarray,
    instruction: str,
    state: np.ndarray,
    cfg: Config,
    previous: np.ndarray | None = None,
) -> np.ndarray:
    """Return the actions to carry out now, (K, A). previous: the last one. Raises ValueError if they are not finite."""
    states = state[None] if policy.state_dim else None
    previous = None if previous is None else previous[None]
    (chunk,) = predict_chunk(policy, [[image]], [instruction], states, cfg.unnorm_key, previous=previous)  # (K, A)
    if not np.isfinite(chunk).all():
        raise ValueError(f"the policy answered {chunk.tolist()}")
    return chunk[: cfg.open_loop]


def play(robot, policy: Policy, instruction: str, cfg: Config) -> tuple[list[dict], list[np.ndarray], str]:
    """Run one episode. Returns its steps, its images, and what ended it: "" (all steps), "stopped", or an error."""
    steps = []
    images = []
    plan = []  # actions that the policy has answered and the robot has not carried out
    action = None  # the last one
    due = time.monotonic()  # when the next action is to be sent
    try:
        while len(steps) < cfg.max_steps:
            time.sleep(max(0.0, due - time.monotonic()))
            now = time.monotonic()
            late = max(0.0, now - due)
            due = max(now, due) + 1 / cfg.frequency

            image, state = observe(robot)
            asked_at = time.monotonic()
            if not plan:
                plan = list(ask_policy(policy, image, instruction, state, cfg, action))
            action = plan.pop(0)
            policy_seconds = time.monotonic() - asked_at

            images.append(image)
            steps.append(
                {"action": action.tolist(), "state": state.tolist(), "policy_s": policy_seconds, "late_s": late}
            )
            check_status(robot.step_action(action, blocking=cfg.blocking), "action")
    except KeyboardInterrupt:
        return steps, images, "stopped"
    except Exception as error:  # an error is written down, and counts neither as a success nor as a failure
        return steps, images, f"{type(error).__name__}: {error}"
    return steps, images, ""


# -----------------------------------------------------------------------------
# The person


def ask(question: str, choices: tuple[str, ...] = ()) -> str:
    """Ask until the answer is one of the choices, or ask once without any."""
    while True:
        answer = input(question).strip()
        if not choices or answer in choices:
            return answer


def ask_instruction(number: int, previous: str) -> str:
    """Ask for the instruction of an episode; an empty answer means the previous one."""
    hint = f" [{previous}]" if previous else ""
    while True:
        instruction = ask(f"Episode {number}. Instruction{hint}: ") or previous
        if instruction:
            return instruction


def ask_outcome(has_begun: bool) -> str:
    """Ask for the outcome of an episode. One that failed before its first step can only be done again."""
    choices = ("y", "n", "r") if has_begun else ("r",)
    return ask("Success? y, n, or r to do it again: ", choices)


# -----------------------------------------------------------------------------
# All episodes


def evaluate(robot, policy: Policy, cfg: Config) -> list[dict]:
    """Run all episodes that have no outcome yet. Returns the rows of all, and prints the success rates."""
    out = Path(cfg.out)
    rows = read_rows(out / "episodes.jsonl")
    instruction = rows[-1]["instruction"] if rows else ""
    while len(rows) < cfg.episodes:
        number = len(rows) + 1
        instruction = ask_instruction(number, instruction)
        go_to_start(robot, cfg)
        ask("Press Enter to start, Ctrl-C to end it early ... ")

        steps, images, end = play(robot, policy, instruction, cfg)
        print(f"{len(steps)} steps, {end}" if end else f"{len(steps)} steps")
        error = "" if end == "stopped" else end
        outcome = ask_outcome(has_begun=bool(steps) or not error)
        if outcome == "r":
            continue

        late_steps = [step for step in steps if step["late_s"] > 0.5 / cfg.frequency]
        row = {
            "episode": number,
            "instruction": instruction,
            "success": outcome == "y",
            "steps": len(steps),
            "error": error,
            "late_steps": len(late_steps),
        }
        rows.append(row)
        save(out, rows, steps, images, cfg)
    report(rows)
    return rows


def read_rows(path: Path) -> list[dict]:
    """Return the episodes that an earlier call has finished."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def save(out: Path, rows: list[dict], steps: list[dict], images: list[np.ndarray], cfg: Config):
    """Write steps and video of the last episode first, and then episodes.jsonl, which says that it is finished."""
    number = len(rows)
    write_lines(out / f"episode-{number:03d}.jsonl", steps)
    if images:
        write_video(out / f"episode-{number:03d}.gif", images, cfg.frequency)
    write_lines(out / "episodes.jsonl", rows)


def write_lines(path: Path, entries: list[dict]):
    """Write a JSON line for each entry."""
    lines = [json.dumps(entry) + "\n" for entry in entries]
    with atomic_write(path) as temporary:
        temporary.write_text("".join(lines))


def write_video(path: Path, images: list[np.ndarray], frequency: float):
    """Write images (H, W, 3) uint8 as a GIF, at the speed of the robot."""
    frames = []
    for image in images:
        frame = Image.fromarray(image).resize(VIDEO_SIZE)
        frames.append(frame.quantize(128, dither=Image.Dither.NONE))
    with atomic_write(path) as temporary:
        frames[0].save(
            temporary, "GIF", save_all=True, append_images=frames[1:], duration=round(1000 / frequency), loop=0
        )


def report(rows: list[dict]):
    """Print the success rate of each instruction. Episodes with an error are counted apart."""
    for instruction in dict.fromkeys(row["instruction"] for row in rows):
        episodes = [row for row in rows if row["instruction"] == instruction]
        outcomes = [row["success"] for row in episodes if not row["error"]]
        num_errors = len(episodes) - len(outcomes)

        successes = sum(outcomes)
        low, high = wilson(successes, len(outcomes)) if outcomes else (0.0, 1.0)
        errors = f", {num_errors} with errors" if num_errors else ""
        print(f"{successes} of {len(outcomes)} (95 % interval {low:.0%} to {high:.0%}){errors}: {instruction}")


# -----------------------------------------------------------------------------
# The command


def check_protocol(path: Path, protocol: dict):
    """Raise ValueError if the folder holds episodes that were run by another protocol."""
    if not path.is_file():
        return
    earlier = read_json(path)
    if earlier != protocol:
        raise ValueError(f"{path.parent} holds episodes of another protocol, {earlier}; choose another --out")


def check_policy(policy: Policy):
    """Raise ValueError if the policy takes what this robot does not give."""
    if policy.num_images != 1 or policy.state_dim not in (0, STATE_DIM):
        raise ValueError(
            f"{policy.checkpoint} takes {policy.num_images} images and {policy.state_dim} numbers of the robot's "
            f"state; this robot gives 1 and {STATE_DIM}"
        )


def main(cfg: Config):
    if not cfg.checkpoint:
        fail("give --checkpoint FOLDER")
    if len(cfg.start) != 3:
        numbers = " ".join(str(number) for number in cfg.start)
        fail(f"--start {numbers}: must be three numbers, x y z in metres")
    protocol = {key: str(value) for key, value in asdict(cfg).items() if key not in NOT_PROTOCOL}
    protocol_file = Path(cfg.out) / "protocol.json"
    try:
        # Everything that can be wrong is found before any weight is read.
        dtype = pick_dtype(cfg.dtype)
        check_protocol(protocol_file, protocol)
        checkpoint = open_checkpoint(cfg.checkpoint, cfg.base_checkpoint)
        dataset_stats(checkpoint.norm_stats, cfg.unnorm_key, cfg.checkpoint)
        service = import_client()
        device = pick_device(cfg.device)

        policy = load_policy(checkpoint, dtype, device, show_progress)
        policy.engine = pick_engine(policy, cfg.engine)
        check_policy(policy)
        if not policy.processor.trained_on:
            # openvla-7b does not record it: its training images of Bridge were resized so, and shown whole.
            policy.processor.trained_on = WHOLE
        if JPEG not in policy.processor.trained_on:  # as Bridge's images were stored
            policy.processor.trained_on = (JPEG, *policy.processor.trained_on)
        robot = connect(service, cfg)
        write_json(protocol_file, protocol)
        evaluate(robot, policy, cfg)
    except (ModuleNotFoundError, ValueError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main(configure(Config))
