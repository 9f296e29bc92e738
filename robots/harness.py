"""
Serve a policy to vla-eval, allenai's evaluation harness, which reaches LIBERO, CALVIN, SimplerEnv, RoboCasa and more
simulators with one protocol (https://github.com/allenai/vla-evaluation-harness, PyPI `vla-eval`).

    pip install vla-eval
    python -m robots.harness --checkpoint openvla-7b-finetuned-libero-spatial --unnorm_key libero_spatial
    vla-eval run --config libero.yaml          # in another terminal, perhaps on another machine

The package is the server (websocket and msgpack). This file says what a policy makes of an observation:

    {"images": {camera: (H, W, 3) uint8}, "states": (P,), "task_description"} -> predict_chunk -> (K, A) -> gripper
    -> {"actions": (K, A)}, of which the harness's server hands out one for each observation

Images are taken in the benchmark's order of its cameras, as many as the policy takes. The harness turns them upright.
Axes: H height, W width, K actions of a chunk, A dimensions of an action, P of the robot's state.
"""

from dataclasses import dataclass

import numpy as np

from checkpoint import open_checkpoint
from configurator import configure, fail
from eval_libero import prepare_as_trained
from image import to_rgb
from policy import Policy, choose_key, load_policy, pick_device, pick_dtype, pick_engine, predict_chunk
from progress import show_progress
from tokenizer import check_instruction


@dataclass
class Config:
    checkpoint: str = ""  # folder in Hugging Face layout, LoRA run, OFT folder, or a name on the hub (owner/name)
    base_checkpoint: str = ""  # of a LoRA run: its base; "": as its adapter_config.json says
    benchmark: str = "libero"  # whose convention the gripper follows: libero, robocasa, calvin, simpler, maniskill2
    unnorm_key: str = ""  # whose statistics give actions their units; may be left out if the checkpoint has one
    host: str = "127.0.0.1"
    port: int = 8000
    open_loop: int = 0  # of an OFT policy: actions of a chunk that are carried out before it is asked again; 0: all
    center_crop: bool | None = None  # show the middle 90 % only; None: as the checkpoint says
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = "auto"  # bfloat16, float32, float16
    engine: str = "auto"  # generate in fewer passes (speed/engine.py): auto, on, off


# What the simulators of vla-eval 0.8.0 take as the gripper, from ours (1 open, 0 closed): name -> (closed, open).
# RoboCasa's goes to robosuite as it is. SimplerEnv's and ManiSkill2's look whether it is above one half.
GRIPPERS = {
    "libero": (1.0, -1.0),
    "robocasa": (1.0, -1.0),
    "calvin": (-1.0, 1.0),
    "simpler": (0.0, 1.0),
    "maniskill2": (1.0, 0.0),
}

# What the harness asks LIBERO for, so that it is the official protocol: env.seed(0), and rotation vectors as robosuite
# computes them.
LIBERO_PARAMS = {"env_seed": 0, "quat_no_antipodal": True}


def convert_gripper(chunk: np.ndarray, benchmark: str) -> np.ndarray:
    """Return a chunk (K, A) with the gripper, 1 open to 0 closed, as a benchmark takes it."""
    closed, opened = GRIPPERS[benchmark]
    converted = chunk.copy()
    converted[:, -1] = np.where(chunk[:, -1] > 0.5, opened, closed)
    return converted


def answer(policy: Policy, observation: dict, cfg: Config, previous: np.ndarray | None) -> np.ndarray:
    """
    Return the policy's chunk (K, A) for an observation of the harness, in the robot's units, the gripper 1 open to 0
    closed. previous: the last action of this episode. Raises ValueError that says what is missing.
    """
    images = observation.get("images")
    found = list(images.values()) if isinstance(images, dict) else [images]
    if len(found) < policy.num_images or found[0] is None:
        names = sorted(images) if isinstance(images, dict) else type(images).__name__
        raise ValueError(f"the observation has the images {names}, {policy.checkpoint} takes {policy.num_images}")
    instruction = observation.get("task_description")
    check_instruction(instruction)

    states = None
    if policy.state_dim:
        state = np.asarray(observation.get("states", ()), np.float64)
        if state.shape != (policy.state_dim,):
            raise ValueError(f"the observation has states {state.shape}, the policy takes ({policy.state_dim},)")
        states = state[None]

    views = [to_rgb(image) for image in found[: policy.num_images]]
    previous = None if previous is None else previous[None]
    chunks = predict_chunk(policy, [views], [instruction], states, cfg.unnorm_key, cfg.center_crop, previous)
    if not np.isfinite(chunks).all():
        raise ValueError(f"the policy answered {chunks.tolist()}")
    return chunks[0, : cfg.open_loop or None]


def make_server(policy: Policy, cfg: Config):
    """Return the harness's server for a policy, an object that `vla_eval.model_servers.serve.serve` takes."""
    from vla_eval.model_servers.predict import PredictModelServer
    from vla_eval.specs import GRIPPER_RAW, IMAGE_RGB, LANGUAGE, POSITION_DELTA, RAW

    class Server(PredictModelServer):
        """Hands observations to the policy, one at a time, and remembers the last action of each episode."""

        def __init__(self):
            super().__init__(chunk_size=cfg.open_loop or policy.action_chunk)
            self.previous = {}  # session -> last action of its answer

        def predict(self, obs, ctx):
            chunk = answer(policy, obs, cfg, self.previous.get(ctx.session_id))
            self.previous[ctx.session_id] = chunk[-1]
            return {"actions": convert_gripper(chunk, cfg.benchmark)}

        async def on_episode_start(self, config, ctx):
            await super().on_episode_start(config, ctx)
            self.previous.pop(ctx.session_id, None)

        def get_observation_params(self):
            params = dict(LIBERO_PARAMS) if cfg.benchmark == "libero" else {}
            if policy.num_images > 1:
                params["send_wrist_image"] = True
            if policy.state_dim:
                params["send_state"] = True
            return params

        def get_action_spec(self):
            return {"position": POSITION_DELTA, "rotation": RAW, "gripper": GRIPPER_RAW}

        def get_observation_spec(self):
            return {"image": IMAGE_RGB, "language": LANGUAGE}

    return Server()


def import_harness():
    """Return the function that serves. Ends the program with a hint if the package is not installed."""
    try:
        from vla_eval.model_servers.serve import serve
    except ModuleNotFoundError as error:
        fail(f"{error}; pip install vla-eval")
    return serve


def main(cfg: Config):
    if not cfg.checkpoint:
        fail("give --checkpoint FOLDER")
    if cfg.benchmark not in GRIPPERS:
        fail(f"--benchmark {cfg.benchmark}: must be one of {', '.join(GRIPPERS)}")
    serve = import_harness()
    try:
        # Everything that can be wrong is found before any weight is read.
        dtype = pick_dtype(cfg.dtype)
        device = pick_device(cfg.device)
        checkpoint = open_checkpoint(cfg.checkpoint, cfg.base_checkpoint)
        choose_key(checkpoint.norm_stats, cfg.unnorm_key, cfg.checkpoint)
        policy = load_policy(checkpoint, dtype, device, show_progress)
        policy.engine = pick_engine(policy, cfg.engine)
        if not 0 <= cfg.open_loop <= policy.action_chunk:
            raise ValueError(
                f"--open_loop {cfg.open_loop}: {cfg.checkpoint} answers with {policy.action_chunk} actions"
            )
        if cfg.benchmark == "libero":
            prepare_as_trained(policy)
        print(f"{policy.checkpoint} at ws://{cfg.host}:{cfg.port} for {cfg.benchmark}", flush=True)
        serve(make_server(policy, cfg), cfg.host, cfg.port)
    except (ValueError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main(configure(Config))
