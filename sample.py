"""
One image and one instruction in, one robot action out.

    python sample.py --checkpoint openvla-7b --image kitchen.jpg --instruction "put the spoon on the towel" \\
        --unnorm_key bridge_orig

Several images with one instruction, or with as many instructions, are run as a batch. To an OFT policy they are the
images of its cameras, and it answers with a chunk of actions. So does a FAST policy, to each image. From Python, use
policy.py.

To follow an image on its way to an action, read checkpoint.py (what is in the folder), policy.py, image.py,
tokenizer.py, model.py and normalize.py.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from checkpoint import Checkpoint, open_checkpoint
from configurator import configure, fail
from image import to_rgb
from oft import read_record
from policy import (
    Policy,
    action_dimensions,
    check_action_dim,
    check_dimensions,
    check_length,
    choose_key,
    dataset_stats,
    load_policy,
    missing_preprocessing_note,
    pick_device,
    pick_dtype,
    pick_engine,
    predict_action,
    predict_chunk,
)
from progress import show_progress
from tokenizer import check_instruction

NO_CHECKPOINT = (
    "no checkpoint. The released weights are on Hugging Face: `pip install huggingface_hub`, then\n"
    "`--checkpoint openvla/openvla-7b`, which downloads them once (15 GB)."
)


@dataclass
class Config:
    checkpoint: str = ""  # folder in Hugging Face layout or LoRA run, or a name on the hub: owner/name[@revision]
    base_checkpoint: str = ""  # of a LoRA run: its base; "": as its adapter_config.json says
    image: tuple[str, ...] = ()  # image files, one or more
    instruction: tuple[str, ...] = ()  # one for all images, or one for each; put it in quotes
    state: tuple[float, ...] = ()  # the robot's state in its own units, for an OFT policy that takes it
    unnorm_key: str = ""  # whose statistics give the action its units; may be left out if the checkpoint has one
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = "auto"  # bfloat16, float32, float16; auto: bfloat16 on cuda, else as the weights are stored
    engine: str = "auto"  # generate in fewer passes (speed/engine.py): auto, on, off
    center_crop: bool | None = None  # show the middle 90 % only; None: as the checkpoint says that it was trained
    json: bool = False  # print one JSON line


def main(cfg: Config):
    if not cfg.checkpoint:
        fail(NO_CHECKPOINT)
    if not cfg.image or not cfg.instruction or len(cfg.instruction) not in (1, len(cfg.image)):
        fail("give --image and --instruction (in quotes): one instruction for all images, or one for each")
    start = time.perf_counter()
    try:
        # Everything that can be wrong is found before any weight is read.
        dtype = pick_dtype(cfg.dtype)
        device = pick_device(cfg.device)
        images = [to_rgb(path) for path in cfg.image]
        instructions = list(cfg.instruction)
        if len(instructions) == 1:
            instructions *= len(images)
        checkpoint = open_checkpoint(cfg.checkpoint, cfg.base_checkpoint)
        unnorm_key = choose_key(checkpoint.norm_stats, cfg.unnorm_key, cfg.checkpoint)
        check_inputs(checkpoint, instructions, unnorm_key, cfg)

        policy = load_policy(checkpoint, dtype, device, show_progress)
        policy.engine = pick_engine(policy, cfg.engine)
        loaded = time.perf_counter()
        note = missing_preprocessing_note(policy)
        if note and cfg.center_crop is None:
            print(f"warning: {note}", file=sys.stderr)
        actions = ask(policy, images, instructions, cfg)
    except (ValueError, OSError) as error:
        fail(error)

    seconds = {"load": round(loaded - start, 2), "act": round(time.perf_counter() - loaded, 2)}
    if cfg.json:
        answer = {
            "actions": actions.tolist(),
            "unnorm_key": unnorm_key,
            "device": device,
            "seconds": seconds,
        }
        print(json.dumps(answer))
        return
    if policy.is_oft:
        titles = [instructions[0]]
        actions = actions[None]  # (1, K, A)
    else:
        titles = [f"{Path(path).name}: {text}" for path, text in zip(cfg.image, instructions, strict=True)]
    if policy.gives_chunks:
        titles = [f"{title}, step {i + 1}" for title in titles for i in range(policy.action_chunk)]
        actions = actions.reshape(len(titles), -1)
    dimensions = action_dimensions(checkpoint.norm_stats[unnorm_key])
    print_actions(titles, actions, dimensions)
    print(f"loaded in {seconds['load']} s, acted in {seconds['act']} s on {device}")


def check_inputs(checkpoint: Checkpoint, instructions: list[str], unnorm_key: str, cfg: Config):
    """Raise ValueError if images, instructions, state or statistics are not what this checkpoint takes."""
    stats = dataset_stats(checkpoint.norm_stats, unnorm_key, cfg.checkpoint)
    oft = read_record(checkpoint.folder) if checkpoint.is_oft else None
    state_dim = oft.proprio_dim if oft else 0
    if len(cfg.state) != state_dim:
        raise ValueError(f"--state has {len(cfg.state)} numbers, {cfg.checkpoint} takes {state_dim}")
    if oft:
        if len(cfg.instruction) > 1:
            raise ValueError(
                f"--instruction: {len(cfg.instruction)} texts, but an OFT policy takes one for all its images"
            )
        if len(cfg.image) != oft.num_images:
            raise ValueError(
                f"--image: {len(cfg.image)} given, {cfg.checkpoint} takes {oft.num_images}, one per camera"
            )
        check_dimensions(oft, stats)
    if checkpoint.fast:
        check_action_dim(checkpoint.fast, stats)

    for text in instructions:
        check_instruction(text)
        prompt = checkpoint.tokenizer.encode_prompt(text)
        check_length(checkpoint.config, prompt, len(stats["action"]["q01"]), oft, checkpoint.fast)


def ask(policy: Policy, images: list, instructions: list[str], cfg: Config) -> np.ndarray:
    """Return the actions: one for each image (B, A); of a FAST policy a chunk (B, K, A); of an OFT one chunk (K, A)."""
    if policy.fast:
        views = [[image] for image in images]
        return predict_chunk(policy, views, instructions, None, cfg.unnorm_key, cfg.center_crop)
    if not policy.is_oft:
        return predict_action(policy, images, instructions, cfg.unnorm_key, cfg.center_crop)
    states = np.array([cfg.state]) if cfg.state else None
    chunks = predict_chunk(policy, [images], instructions[:1], states, cfg.unnorm_key, cfg.center_crop)
    return chunks[0]


def print_actions(titles: list[str], actions: np.ndarray, dimensions: list[tuple[str, str]]):
    """Print each action (A,) below its title, a line for each dimension: name, value, unit."""
    width = max(8, *(len(name) for name, _ in dimensions))
    for title, action in zip(titles, actions, strict=True):
        print(title)
        for (name, unit), value in zip(dimensions, action, strict=True):
            print(f"  {name:{width}s} {value:+.6f} {unit}")


if __name__ == "__main__":
    main(configure(Config))
