"""
A policy on a real WidowX, by OpenVLA's BridgeData V2 protocol: 5 actions a second, 60 steps, a person says what it did.

    python eval_bridge.py --checkpoint openvla-7b --host localhost --port 5556

The robot's side is the service of github.com/rail-berkeley/bridge_data_robot; its client must be installed here (`pip
install` in that repository's widowx_envs, and edgeml). Before each episode it asks for the instruction, afterwards for
the outcome; Ctrl-C ends an episode, not the program. --out holds episodes.jsonl, and for each episode a film and every
step; the same command again goes on after the last whole episode.

experiments/robot/bridge/run_bridgev2_eval.py and widowx_env.py of github.com/openvla/openvla.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from checkpoint import check_folder
from configurator import configure, fail
from formats.write_rlds import jpeg
from image import WHOLE, decode
from metrics import wilson
from model import write_atomically, write_json
from oft import predict_chunk
from sample import Policy, dataset_stats, load, pick_device, pick_dtype


@dataclass
class Config:
    checkpoint: str = ""  # folder in Hugging Face layout, LoRA run or OFT folder (one camera)
    host: str = "localhost"
    port: int = 5556
    unnorm_key: str = "bridge_orig"
    episodes: int = 50
    max_steps: int = 60
    frequency: float = 5.0  # actions per second
    blocking: bool = False  # wait until each movement is done
    open_loop: int = 1  # of an OFT policy: actions of a chunk before the next look
    start: tuple[float, ...] = (0.3, -0.09, 0.26)  # where the gripper begins, metres
    camera: str = "/blue/image_raw"
    out: str = "runs/bridge_eval"
    device: str = "auto"
    dtype: str = "auto"  # bfloat16, float32, float16


BOUNDS = [[0.1, -0.20, -0.01, -1.57, 0], [0.45, 0.25, 0.30, 1.57, 0]]  # of the workspace: x, y, z, yaw, -
TURNED = [[0.267, 0, 0.963], [0, 1, 0], [-0.963, 0, 0.267]]  # the gripper points 15 degrees away from straight down
QUATERNION = [0, -0.259, 0, -0.966]  # the same


def done(status, what: str):
    """The client's answers are numbers. Raises ConnectionError for any but success."""
    if int(status) != 1:
        reason = {0: "no connection", 2: "it could not be carried out", 3: "the robot is not initialized"}
        raise ConnectionError(f"{what}: {reason.get(int(status), f'status {status}')}")


def client():
    """The module of the robot's client. Raises ModuleNotFoundError that says what to install."""
    try:
        from widowx_envs import widowx_env_service
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}: install widowx_envs of github.com/rail-berkeley/bridge_data_robot, and edgeml"
        ) from None
    return widowx_env_service


def connect(service, cfg: Config):
    """A WidowX client whose robot is ready."""
    settings = {
        **service.WidowXConfigs.DefaultEnvParams,
        "override_workspace_boundaries": BOUNDS,
        "return_full_image": True,
    }
    settings |= dict(camera_topics=[{"name": cfg.camera}], start_state=[*cfg.start, *QUATERNION])
    robot = service.WidowXClient(host=cfg.host, port=cfg.port)
    done(robot.init(settings), f"setting up the robot at {cfg.host}:{cfg.port}")
    return robot


def observe(robot, patience: float = 30.0) -> tuple[np.ndarray, np.ndarray]:
    """The camera's picture (H, W, 3) uint8 and the robot's state. Raises ConnectionError if none comes."""
    end = time.monotonic() + patience
    while (found := robot.get_observation()) is None:
        if time.monotonic() > end:
            raise ConnectionError(f"no observation from the robot for {patience:g} s; is its service up?")
        time.sleep(0.2)
    return np.asarray(found["full_image"]), np.asarray(found["state"], np.float64)


def go_to_start(robot, cfg: Config):
    done(robot.reset(), "reset")
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = TURNED, cfg.start
    done(robot.move(pose, duration=0.8, blocking=True), "moving to the start")  # blocking, or the start is wrong


def ask_policy(policy: Policy, picture: np.ndarray, instruction: str, state: np.ndarray, cfg: Config) -> np.ndarray:
    """Actions (K, A) for a picture, by way of JPEG as in training. Raises ValueError if they are not finite."""
    oft = getattr(policy.model, "oft", None)
    states = state[None] if oft and oft.proprio_dim else None
    chunk = predict_chunk(policy, [[decode(jpeg(picture))]], [instruction], states, cfg.unnorm_key)[0]
    if not np.isfinite(chunk).all():
        raise ValueError(f"the policy answered {chunk.tolist()}")
    return chunk[: cfg.open_loop]


def play(robot, policy: Policy, instruction: str, cfg: Config) -> tuple[list[dict], list[np.ndarray], str]:
    """One episode -> its steps, its pictures, and what ended it: "" (all steps), "stopped", or an error."""
    steps, pictures, plan, due = [], [], [], time.monotonic()
    try:
        while len(steps) < cfg.max_steps:
            time.sleep(max(0.0, due - time.monotonic()))
            late, due = max(0.0, time.monotonic() - due), max(due, time.monotonic()) + 1 / cfg.frequency
            picture, state = observe(robot)
            begin = time.monotonic()
            plan = plan or list(ask_policy(policy, picture, instruction, state, cfg))
            action = plan.pop(0)
            seconds = time.monotonic() - begin
            pictures.append(picture)
            steps.append(dict(action=action.tolist(), state=state.tolist(), policy_s=seconds, late_s=late))
            done(robot.step_action(action, blocking=cfg.blocking), "action")
    except KeyboardInterrupt:
        return steps, pictures, "stopped"
    except Exception as error:  # an error is written down, and neither a success nor a failure
        return steps, pictures, f"{type(error).__name__}: {error}"
    return steps, pictures, ""


def save(out: Path, rows: list[dict], steps: list[dict], pictures: list[np.ndarray], cfg: Config):
    """Film and steps of the last of the rows first, then episodes.jsonl with all of them."""
    number = len(rows)
    text = "".join(json.dumps(step) + "\n" for step in steps)
    write_atomically(out / f"episode-{number:03d}.jsonl", lambda tmp: tmp.write_text(text))
    if pictures:
        pages = [Image.fromarray(p).resize((320, 240)).quantize(128, dither=Image.Dither.NONE) for p in pictures]
        options = dict(save_all=True, append_images=pages[1:], duration=round(1000 / cfg.frequency), loop=0)
        write_atomically(out / f"episode-{number:03d}.gif", lambda tmp: pages[0].save(tmp, "GIF", **options))
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomically(out / "episodes.jsonl", lambda tmp: tmp.write_text(lines))


def ask(question: str, choices: str = "") -> str:
    while True:
        answer = input(question).strip()
        if not choices or answer in choices.split("/"):
            return answer


def report(rows: list[dict]):
    for instruction in dict.fromkeys(row["instruction"] for row in rows):
        some = [row["success"] for row in rows if row["instruction"] == instruction and not row["error"]]
        errors = sum(bool(row["error"]) for row in rows if row["instruction"] == instruction)
        low, high = wilson(sum(some), len(some)) if some else (0.0, 1.0)
        tail = f", {errors} with errors" if errors else ""
        print(f"{sum(some)} of {len(some)} (95 % interval {low:.0%} to {high:.0%}){tail}: {instruction}")


def evaluate(robot, policy: Policy, cfg: Config) -> list[dict]:
    """All episodes that are not done yet; returns the rows of all."""
    out = Path(cfg.out)
    done = out / "episodes.jsonl"
    rows = [json.loads(line) for line in done.read_text().splitlines()] if done.is_file() else []
    instruction = rows[-1]["instruction"] if rows else ""
    while len(rows) < cfg.episodes:
        number = len(rows) + 1
        question = f"Episode {number}. Instruction" + (f" [{instruction}]: " if instruction else ": ")
        while not (text := ask(question) or instruction):
            pass
        instruction = text
        go_to_start(robot, cfg)
        ask("Press Enter to start, Ctrl-C to end it early ... ")
        steps, pictures, end = play(robot, policy, instruction, cfg)
        error = "" if end in ("", "stopped") else end
        print(f"{len(steps)} steps" + (f", {end}" if end else ""))
        answer = ask("Success? y, n, or r to do it again: ", "r" if error and not steps else "y/n/r")
        if answer == "r":
            continue
        late = sum(step["late_s"] > 0.5 / cfg.frequency for step in steps)
        row = dict(episode=number, instruction=instruction, success=answer == "y", steps=len(steps))
        rows.append(row | dict(error=error, late_steps=late))
        save(out, rows, steps, pictures, cfg)
    report(rows)
    return rows


def main(cfg: Config):
    if not cfg.checkpoint:
        fail("give --checkpoint FOLDER")
    if len(cfg.start) != 3:
        fail(f"--start {' '.join(map(str, cfg.start))}: must be three numbers, x y z in metres")
    try:
        dtype, out = pick_dtype(cfg.dtype), Path(cfg.out)
        free = ("episodes", "host", "port", "out", "device")
        protocol = {k: str(v) for k, v in asdict(cfg).items() if k not in free}
        before = json.loads((out / "protocol.json").read_text()) if (out / "protocol.json").is_file() else protocol
        if before != protocol:
            fail(f"{out} holds episodes of another protocol, {before}; choose another --out")
        dataset_stats(check_folder(cfg.checkpoint).extra["norm_stats"], cfg.unnorm_key, cfg.checkpoint)
        service, device = client(), pick_device(cfg.device)
        policy = load(cfg.checkpoint, dtype, device, lambda names: tqdm(names, "loading", unit=" tensors", leave=False))
        if (oft := getattr(policy.model, "oft", None)) and (oft.num_images != 1 or oft.proprio_dim not in (0, 7)):
            fail(f"{cfg.checkpoint} looks at {oft.num_images} pictures and {oft.proprio_dim} numbers; here are 1 and 7")
        if not policy.processor.trained_on:  # openvla-7b has no such record; Bridge was resized so, and not cropped
            policy.processor.trained_on = WHOLE
        robot = connect(service, cfg)
        write_json(out / "protocol.json", protocol)
        evaluate(robot, policy, cfg)
    except (ModuleNotFoundError, ValueError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main(configure(Config))
