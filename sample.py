"""
One picture and one instruction in, one robot action out.

    python sample.py --checkpoint openvla-7b --image kitchen.jpg --instruction "put the spoon on the towel" \\
        --unnorm_key bridge_orig

Several pictures with one instruction, or as many instructions as pictures, are run as a batch; to an OFT policy they
are its cameras' pictures, and it answers with a chunk of actions. From Python: `policy = load(folder)`, then
`predict_action(policy, images, instructions, unnorm_key)` (OFT: `predict_chunk` of oft.py).

Axes: B batch, A dimensions of an action.
"""

import json
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import base_of, check_folder, home_of, is_oft, stored_dtype
from configurator import configure, fail
from image import CROPPED, ImageProcessor, center_crop, resize_lanczos3, to_rgb
from model import OpenVLA, OpenVLAConfig
from tokenizer import (
    PAD,
    SCHEME,
    Tokenizer,
    decode_action,
    encode_action,
    is_action_id,
    normalize,
    pad_sequences,
    prompt_for,
    unnormalize,
)

NO_CHECKPOINT = """no checkpoint. The released weights are on Hugging Face: `git lfs install`, then
`git clone https://huggingface.co/openvla/openvla-7b` (15 GB) and `--checkpoint openvla-7b`."""
UNITS = [("dx", "m"), ("dy", "m"), ("dz", "m"), ("droll", "rad"), ("dpitch", "rad"), ("dyaw", "rad"), ("gripper", "")]


@dataclass
class Config:
    checkpoint: str = ""  # folder in Hugging Face layout: openvla-7b, runs/.../checkpoint, ...; or a LoRA run
    image: tuple[str, ...] = ()  # picture files, one or more
    instruction: tuple[str, ...] = ()  # one for all pictures, or one for each; put it in quotes
    state: tuple[float, ...] = ()  # of an OFT policy that looks at it: the robot's state, in its own units
    unnorm_key: str = ""  # whose statistics give the action its units; may be left out if the checkpoint has one
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = "auto"  # bfloat16, float32, float16; auto: bfloat16 on cuda, else as the weights are stored
    center_crop: bool | None = None  # show the middle 90 % only; None: as the checkpoint says that it was trained
    json: bool = False  # print one JSON line


@dataclass
class Policy:
    """All that turns pictures and words into actions. norm_stats: unnorm_key -> {"action": {"q01", "q99", "mask"}}."""

    model: OpenVLA
    tokenizer: Tokenizer
    processor: ImageProcessor
    norm_stats: dict
    checkpoint: str
    engine: Any = None  # an Engine of engine.py: the same tokens in fewer passes


def load(checkpoint, dtype: torch.dtype | None = None, device: str = "cpu", progress=lambda names: names) -> Policy:
    """
    Folder -> Policy. dtype None: as stored on the CPU, else bfloat16. Raises ValueError or FileNotFoundError, with
    the file and the remedy, before any weight is read.
    """
    config, base = check_folder(checkpoint), base_of(checkpoint)
    tokenizer = Tokenizer(home_of(checkpoint, "tokenizer.model"), prompt_for(config.extra))
    processor = ImageProcessor.from_pretrained(home_of(checkpoint, "preprocessor_config.json"))
    if is_oft(checkpoint) and not processor.trained_on:  # released OFT folders have no record of it; this is theirs
        processor.trained_on = CROPPED
    stored = stored_dtype(config, checkpoint)
    dtype = dtype or (stored if device == "cpu" else torch.bfloat16)
    if is_oft(checkpoint):
        from oft import load_oft

        model = load_oft(checkpoint, dtype, device, progress=progress)
    elif config.extra.get("quantization"):
        from speed.quantize import load_quantized

        model = load_quantized(checkpoint, dtype, device, progress)
    else:
        model = OpenVLA.from_pretrained(base or checkpoint, dtype, device, progress)
        if base:
            from lora import load_adapter

            load_adapter(model, checkpoint)
    return Policy(model, tokenizer, processor, config.extra["norm_stats"], str(checkpoint))


def no_record(policy: Policy) -> str:
    """What to say of a fine-tuned model that does not say what its pictures went through."""
    if policy.processor.trained_on or not (Path(policy.checkpoint) / "dataset_statistics.json").is_file():
        return ""
    return (f"{policy.checkpoint} does not say how its pictures were prepared, so whole ones are shown, as to "
            f"openvla-7b. What the official script fine-tuned (LIBERO) had 90 % crops: --center_crop True")  # fmt: skip


def action_stats(norm_stats: dict, unnorm_key: str, checkpoint: str) -> dict:
    """Of `dataset_stats`, those of the actions."""
    return dataset_stats(norm_stats, unnorm_key, checkpoint)["action"]


def dataset_stats(norm_stats: dict, unnorm_key: str, checkpoint: str) -> dict:
    """The statistics of one dataset. Raises ValueError if it is unknown or left open, or cannot be used."""
    keys = sorted(norm_stats)
    if not keys:
        raise ValueError(f"{checkpoint}: no action statistics; put the dataset_statistics.json beside the weights")
    if not unnorm_key and len(keys) == 1:
        unnorm_key = keys[0]
    if unnorm_key not in keys:
        what = f"unknown unnorm_key {unnorm_key!r}" if unnorm_key else "several datasets and no unnorm_key"
        raise ValueError(f"{checkpoint}: {what}; the checkpoint has: {', '.join(keys)}")
    entry = norm_stats[unnorm_key]
    low, high = (np.asarray(entry.get("action", {}).get(q, np.nan), np.float64) for q in ("q01", "q99"))
    if low.shape != high.shape or low.ndim != 1 or not np.isfinite([low, high]).all():
        raise ValueError(f"{checkpoint}: statistics of {unnorm_key!r}, action: q01 and q99 must be finite numbers, "
                         f"as many as dimensions; mend dataset_statistics.json or config.json")  # fmt: skip
    return entry


def crops(policy: Policy, crop: bool | None = None) -> bool:
    """Whether the policy is shown the middle of a picture only. crop None: as it was trained."""
    return "center_crop" in policy.processor.trained_on if crop is None else crop


def prepare(policy: Policy, image, crop: bool | None = None) -> np.ndarray:
    """Anything `to_rgb` takes -> (size, size, 3) uint8, by the same steps as the pictures this model learned from."""
    image, done = to_rgb(image), policy.processor.trained_on
    if "lanczos3" in done:
        image = resize_lanczos3(image, policy.processor.size)
    image = policy.processor.resize(image)
    return center_crop(image) if crops(policy, crop) else image


def predict_tokens(policy: Policy, images, instructions: list[str], num_tokens: int, crop=None, draft=None):
    """Pictures and instructions (B each) -> action ids (B, num_tokens) int64, on the CPU. draft: the engine's."""
    if len(images) != len(instructions) or not len(images):
        raise ValueError(f"{len(images)} pictures and {len(instructions)} instructions: they must be as many, and some")
    weight = policy.model.language_model.model.norm.weight
    pixels = torch.from_numpy(np.stack([prepare(policy, image, crop) for image in images])).to(weight.device)
    input_ids, lengths = pad_sequences([policy.tokenizer.encode_prompt(text) for text in instructions], PAD)
    mixed = bool((lengths != lengths[0]).any())
    pixel_values = policy.processor.normalize(pixels).to(weight.dtype)
    inputs = input_ids.to(weight.device), pixel_values, num_tokens, lengths.to(weight.device) if mixed else None
    if policy.engine:
        return policy.engine.generate(*inputs, draft)[0].cpu()
    tokens, logits = policy.model.generate(*inputs)
    if not torch.isfinite(logits).all():
        raise ValueError(
            f"{policy.checkpoint}: the answer is not finite; broken weights, or numbers beyond --dtype float16"
        )
    return tokens.cpu()


def predict_action(policy: Policy, images, instructions, unnorm_key: str = "", crop=None, previous=None) -> np.ndarray:
    """
    images: B paths, PIL images or (H, W, 3) uint8 arrays; instructions: B texts, or one for all. Returns (B, A)
    float64 in the robot's units (metres, radians; gripper 1 open, 0 closed). crop: show only the middle 90 % (None: as
    the checkpoint says). previous (B, A): what was returned for these robots' last pictures; with policy.engine it
    saves time and decides nothing (engine.py). Warns when the model wrote a token that is no action. Raises ValueError
    for bad input.
    """
    if not hasattr(policy.model, "generate"):
        raise ValueError(
            f"{policy.checkpoint} is an OFT policy, which answers with chunks: use predict_chunk of oft.py"
        )
    if not isinstance(images, list | tuple) and np.ndim(images) != 4:
        raise ValueError("images must be a list of pictures; of a single one, [picture]")
    instructions = [instructions] * len(images) if isinstance(instructions, str) else list(instructions)
    entry, draft = dataset_stats(policy.norm_stats, unnorm_key, policy.checkpoint), None
    stats, scheme = entry["action"], entry.get("scheme", SCHEME)
    if policy.engine:  # without a last action: that nothing moves
        previous = np.zeros((len(images), len(stats["q01"]))) if previous is None else previous
        draft = torch.from_numpy(encode_action(normalize(previous, stats, scheme)))
    tokens = predict_tokens(policy, images, instructions, len(stats["q01"]), crop, draft).numpy()
    if not is_action_id(tokens).all():
        warnings.warn(f"not an action: the model wrote ids {tokens.tolist()}; is it trained for robots?", stacklevel=2)
    return unnormalize(decode_action(tokens), stats, scheme)


def check_length(config: OpenVLAConfig, prompt_ids: list[int], new: int, pictures: int = 1):
    """Raise ValueError if pictures, prompt and `new` tokens of an action do not fit into the model's context."""
    patches = (config.vision[0].img_size // config.vision[0].patch_size) ** 2
    total, limit = pictures * patches + len(prompt_ids) + new, config.text.max_position_embeddings
    if total > limit:
        raise ValueError(f"the instruction makes {total} tokens with picture and action, the context has {limit}")


def pick_device(name: str) -> str:
    """auto -> cuda, mps or cpu, whichever is there first. Raises ValueError for what is not here."""
    kind, _, number = name.partition(":")
    here = dict(auto=1, cpu=1, mps=int(torch.backends.mps.is_available()), cuda=torch.cuda.device_count())
    if kind not in here or (number and not number.isdecimal()):
        raise ValueError(f"--device {name}: must be auto, cpu, cuda, cuda:0, ... or mps")
    if int(number or 0) >= here[kind]:
        raise ValueError(f"--device {name}: PyTorch {torch.__version__} sees {here[kind]} of that kind; --device cpu")
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def pick_dtype(name: str) -> torch.dtype | None:
    """The value of --dtype; auto -> None, which is what `load` makes of it. Raises ValueError for others."""
    if name not in ("auto", "bfloat16", "float32", "float16"):
        raise ValueError(f"--dtype {name}: must be auto, bfloat16, float32 or float16")
    return None if name == "auto" else getattr(torch, name)


def main(cfg: Config):
    if not cfg.checkpoint:
        fail(NO_CHECKPOINT)
    if not cfg.image or not cfg.instruction or len(cfg.instruction) not in (1, len(cfg.image)):
        fail("give --image and --instruction (in quotes): one instruction for all pictures, or one for each")
    start = time.perf_counter()
    try:
        dtype, images = pick_dtype(cfg.dtype), [to_rgb(path) for path in cfg.image]
        texts = list(cfg.instruction) * (len(images) if len(cfg.instruction) == 1 else 1)
        config = check_folder(cfg.checkpoint)
        stats = action_stats(config.extra["norm_stats"], cfg.unnorm_key, cfg.checkpoint)
        tokenizer = Tokenizer(home_of(cfg.checkpoint, "tokenizer.model"), prompt_for(config.extra))
        for text in texts:
            check_length(config, tokenizer.encode_prompt(text), len(stats["q01"]))
        device = pick_device(cfg.device)
        policy = load(cfg.checkpoint, dtype, device, lambda names: tqdm(names, "loading", unit=" tensors", leave=False))
        loaded = time.perf_counter()
        if cfg.center_crop is None and (text := no_record(policy)):
            print(f"warning: {text}", file=sys.stderr)
        if is_oft(cfg.checkpoint):
            from oft import predict_chunk

            state = np.array([cfg.state]) if cfg.state else None
            actions = predict_chunk(policy, [images], texts[:1], state, cfg.unnorm_key, cfg.center_crop)[0]  # (K, A)
        else:
            actions = predict_action(policy, images, texts, cfg.unnorm_key, cfg.center_crop)
    except (ValueError, OSError) as error:
        fail(error)
    seconds = dict(load=round(loaded - start, 2), act=round(time.perf_counter() - loaded, 2))
    if cfg.json:
        print(json.dumps(dict(actions=actions.tolist(), unnorm_key=cfg.unnorm_key, device=device, seconds=seconds)))
        return
    names = UNITS if len(stats["q01"]) == len(UNITS) else [(f"a{i}", "") for i in range(len(stats["q01"]))]
    labels = [f"{Path(path).name}: {text}" for path, text in zip(cfg.image, texts, strict=True)]
    if is_oft(cfg.checkpoint):
        labels = [f"{texts[0]}, step {i + 1}" for i in range(len(actions))]
    for label, action in zip(labels, actions, strict=True):
        print(label)
        for (name, unit), value in zip(names, action, strict=True):
            print(f"  {name:8s} {value:+.6f} {unit}")
    print(f"loaded in {seconds['load']} s, acted in {seconds['act']} s on {device}")


if __name__ == "__main__":
    main(configure(Config))
