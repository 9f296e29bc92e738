"""
A loaded checkpoint that acts: images and instructions in, robot actions out.

    policy = load_policy("openvla-7b")
    actions = predict_action(policy, images, instructions, "bridge_orig")   # (B, A): one action for each image
    chunks = predict_chunk(policy, images, instructions, states)            # (B, K, A): of an OFT or a FAST policy

    image -> prepare_image -> (224, 224, 3) uint8 -> processor.normalize -> pixel_values --.
    instruction -> tokenizer.encode_prompt -> input_ids --> model.generate -> tokens -> decode_action -> unnormalize

Axes: B batch, V images of an OFT policy, K actions of a chunk, A dimensions of an action, P of the robot's state.
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from checkpoint import OFFICIAL_ADAPTER, OFT_RECORD, Checkpoint, check_export, open_checkpoint
from fast import FAST, ChunkDecoder
from image import JPEG, ImageProcessor, center_crop, decode, encode_jpeg, resize_lanczos3, to_rgb
from lora import load_adapter
from model import OpenVLA, OpenVLAConfig
from normalize import SCHEME, SCHEMES, UNITS, normalize, unnormalize
from oft import OFT, OFTConfig, load_oft
from progress import no_progress
from speed.engine import NOT_FINITE, Engine
from speed.quantize import load_quantized
from tokenizer import PAD, Tokenizer, decode_action, encode_action, is_action_id, pad_sequences


@dataclass
class Policy:
    """All that turns images and instructions into actions."""

    model: OpenVLA | OFT
    tokenizer: Tokenizer
    processor: ImageProcessor
    norm_stats: dict  # unnorm_key -> {"action": {"q01", "q99", "mask", ...}, "proprio": {...}}
    checkpoint: str  # the folder that it came from, for messages
    engine: Engine | None = None  # generates the same tokens in fewer passes

    @property
    def is_oft(self) -> bool:
        """True if it answers with chunks of actions in one pass, False if it generates tokens."""
        return isinstance(self.model, OFT)

    @property
    def fast(self) -> FAST | None:
        """How its tokens become a chunk of actions; None for an OFT, and for one whose tokens are a single action."""
        return self.tokenizer.fast

    @property
    def gives_chunks(self) -> bool:
        """True if its answer is a chunk of actions, also if that has only one."""
        return self.is_oft or self.fast is not None

    @property
    def vla(self) -> OpenVLA:
        """The OpenVLA itself, without what OFT adds to it."""
        return self.model.vla if self.is_oft else self.model

    @property
    def num_images(self) -> int:
        """How many images it takes for one answer."""
        return self.model.oft.num_images if self.is_oft else 1

    @property
    def action_chunk(self) -> int:
        """How many actions one answer has."""
        if self.fast:
            return self.fast.time_horizon
        return self.model.oft.action_chunk if self.is_oft else 1

    @property
    def state_dim(self) -> int:
        """How many numbers of the robot's state it takes; 0: none."""
        return self.model.oft.proprio_dim if self.is_oft else 0

    @property
    def device(self) -> torch.device:
        return self.vla.language_model.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.vla.language_model.model.norm.weight.dtype


# -----------------------------------------------------------------------------
# Load


def load_policy(
    checkpoint: str | Path | Checkpoint,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    progress: Callable = no_progress,
) -> Policy:
    """
    Load a checkpoint folder: a model, a LoRA run, an OFT policy or a quantized model. dtype None: as stored when on
    the CPU, else bfloat16. progress: show_progress of progress.py, or no_progress.
    Raises ValueError or FileNotFoundError that names the file and the remedy, before any weight is read.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint)
    tokenizer = checkpoint.tokenizer
    processor = checkpoint.processor
    if dtype is None:
        dtype = checkpoint.stored_dtype if device == "cpu" else torch.bfloat16

    warn_hidden_oft(checkpoint)
    if checkpoint.is_oft:
        model = load_oft(checkpoint, dtype, device, progress=progress)
    elif checkpoint.quantization:
        model = load_quantized(copy.deepcopy(checkpoint.skeleton), checkpoint.weight_map, dtype, device, progress)
    else:
        model = copy.deepcopy(checkpoint.skeleton)
        model.load_weights(checkpoint.weight_map, dtype, device, progress)
        if checkpoint.adapter:
            load_adapter(model, checkpoint.adapter, checkpoint.base)
    if checkpoint.adapter:
        check_export(checkpoint.adapter)  # again: a run may have exported anew while the files were read
    return Policy(model, tokenizer, processor, checkpoint.norm_stats, str(checkpoint.folder))


def warn_hidden_oft(checkpoint: Checkpoint):
    """
    Warn if what looks like a token model was trained by the official OFT script. A discrete head and no state leave
    none of the files that tell.
    """
    has_official_adapter = (checkpoint.folder / OFFICIAL_ADAPTER).is_dir()
    if has_official_adapter and not checkpoint.is_oft:
        warnings.warn(
            f"{checkpoint.folder} comes from the official OFT script ({OFFICIAL_ADAPTER}/) and has no {OFT_RECORD}, so "
            f"it is run as a token model, one action at a time. It answers with chunks once that file is there "
            f"(docs/oft.md)",
            stacklevel=3,
        )


def pick_engine(policy: Policy, name: str) -> Engine | None:
    """
    Return the engine for the value of --engine: on, off, or auto. It generates the same tokens, but for rounding.

    auto: on a CPU, where it was measured to be faster, if the model is one that it takes. On a GPU it records a pass
    for each size of a batch, which takes seconds and memory each time: for one robot that may pay, for a server hardly.
    Raises ValueError for other names, and for on where there is none.
    """
    if name not in ("auto", "on", "off"):
        raise ValueError(f"--engine {name}: must be auto, on or off")
    if name == "off" or (name == "auto" and policy.device.type != "cpu"):
        return None
    try:
        if policy.fast:
            raise ValueError("a FAST policy generates chunks, the engine single actions")
        return Engine(policy.model)
    except ValueError as error:  # adapters, or an OFT policy
        if name == "on":
            raise ValueError(f"--engine on: {error}") from None
        return None


def pick_device(name: str) -> str:
    """Return auto as cuda, mps or cpu, whichever is there first. Raises ValueError for what is not there."""
    kind, _, number = name.partition(":")
    available = {
        "auto": 1,
        "cpu": 1,
        "mps": int(torch.backends.mps.is_available()),
        "cuda": torch.cuda.device_count(),
    }
    if kind not in available or (number and not number.isdecimal()):
        raise ValueError(f"--device {name}: must be auto, cpu, cuda, cuda:0, ... or mps")
    if int(number or 0) >= available[kind]:
        raise ValueError(
            f"--device {name}: PyTorch {torch.__version__} sees {available[kind]} of that kind; --device cpu"
        )

    if name != "auto":
        return name
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def pick_dtype(name: str) -> torch.dtype | None:
    """Return the value of --dtype; None for auto, as `load_policy` takes it. Raises ValueError for other names."""
    known = {"auto": None, "bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
    if name not in known:
        raise ValueError(f"--dtype {name}: must be auto, bfloat16, float32 or float16")
    return known[name]


# -----------------------------------------------------------------------------
# Images


def uses_center_crop(policy: Policy, crop: bool | None = None) -> bool:
    """True if the policy is shown only the middle of an image. crop None: as it was trained."""
    if crop is None:
        return "center_crop" in policy.processor.trained_on
    return crop


def uses_jpeg(policy: Policy) -> bool:
    """True if the policy is shown what JPEG leaves of an image. The official OFT policies are, wherever they act."""
    return policy.is_oft or JPEG in policy.processor.trained_on


def prepare_image(policy: Policy, image, crop: bool | None = None) -> np.ndarray:
    """
    Anything `to_rgb` takes -> (size, size, 3) uint8, by the steps that this model's training images went through.
    An image of that size already counts as resized, and does not go through JPEG (prepare_images_for_vla in
    experiments/robot/openvla_utils.py of github.com/moojink/openvla-oft).
    """
    image = to_rgb(image)
    size = policy.processor.size
    is_resized = image.shape[:2] == (size, size)
    if uses_jpeg(policy) and not is_resized:
        image = decode(encode_jpeg(image))
    if "lanczos3" in policy.processor.trained_on:
        image = resize_lanczos3(image, size, exact=True)
    image = policy.processor.resize(image)
    if uses_center_crop(policy, crop):
        image = center_crop(image)
    return image


def prepare_images(policy: Policy, images: Sequence, crop: bool | None = None) -> torch.Tensor:
    """B images -> pixel_values (B, 3 or 6, size, size), on the policy's device and in its dtype."""
    prepared = np.stack([prepare_image(policy, image, crop) for image in images])  # (B, size, size, 3)
    pixels = torch.from_numpy(prepared).to(policy.device)
    return policy.processor.normalize(pixels).to(policy.dtype)


def missing_preprocessing_note(policy: Policy) -> str:
    """Return a warning if a fine-tuned checkpoint does not record its image preprocessing, else ""."""
    is_fine_tuned = (Path(policy.checkpoint) / "dataset_statistics.json").is_file()
    if policy.processor.trained_on or not is_fine_tuned:
        return ""
    return (
        f"{policy.checkpoint} does not record how its training images were prepared, so it sees whole images, as "
        f"openvla-7b does. Models that the official script fine-tuned (LIBERO) saw 90 % crops: --center_crop True"
    )


# -----------------------------------------------------------------------------
# Act


def predict_action(
    policy: Policy,
    images: Sequence,
    instructions: str | Sequence[str],
    unnorm_key: str = "",
    crop: bool | None = None,
    previous: np.ndarray | None = None,
) -> np.ndarray:
    """
    Return one action for each image, (B, A) float64, in the robot's units: metres, radians, gripper 1 open, 0 closed.

    images: B paths, PIL images or (H, W, 3) uint8 arrays.
    instructions: B texts, or one for all images.
    unnorm_key: whose statistics give the action its units; may be left out if the checkpoint has only one dataset.
    crop: show only the middle 90 % of each image; None: as the checkpoint was trained.
    previous: (B, A), the last answers for the same robots. They make `policy.engine` faster and decide nothing.
    Raises ValueError for bad input. Warns if the model generates a token that is no action.
    """
    if policy.gives_chunks:
        kind = "an OFT" if policy.is_oft else "a FAST"
        raise ValueError(f"{policy.checkpoint} is {kind} policy, which answers with chunks: use predict_chunk")
    if not isinstance(images, list | tuple) and np.ndim(images) != 4:
        raise ValueError("images must be a list of images; of a single one, [image]")
    if isinstance(instructions, str):
        instructions = [instructions] * len(images)
    entry = dataset_stats(policy.norm_stats, unnorm_key, policy.checkpoint)
    stats = entry["action"]
    scheme = entry.get("scheme", SCHEME)
    num_tokens = len(stats["q01"])

    draft = None
    if policy.engine:
        if previous is None:  # the first guess: nothing moves
            previous = np.zeros((len(images), num_tokens))
        draft = torch.from_numpy(encode_action(normalize(previous, stats, scheme)))

    tokens = predict_tokens(policy, images, list(instructions), num_tokens, crop, draft).numpy()
    if not is_action_id(tokens).all():
        warnings.warn(
            f"not an action: the model generated the ids {tokens.tolist()}; is it trained for robots?", stacklevel=2
        )
    return unnormalize(decode_action(tokens), stats, scheme)


def predict_tokens(
    policy: Policy,
    images: Sequence,
    instructions: list[str],
    num_tokens: int,
    crop: bool | None = None,
    draft: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the action ids (B, num_tokens) int64, on the CPU. draft: (B, num_tokens), a guess for the engine."""
    input_ids, pixel_values, lengths = prepare_inputs(policy, images, instructions, crop)
    if policy.engine:
        tokens, _ = policy.engine.generate(input_ids, pixel_values, num_tokens, lengths, draft)
        is_finite = (tokens != NOT_FINITE).all()
    else:
        tokens, logits = policy.model.generate(input_ids, pixel_values, num_tokens, lengths)
        is_finite = torch.isfinite(logits).all()
    if not is_finite:
        raise ValueError(
            f"{policy.checkpoint}: the answer is not finite; broken weights, or numbers beyond --dtype float16"
        )
    return tokens.cpu()


def prepare_inputs(
    policy: Policy, images: Sequence, instructions: list[str], crop: bool | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """
    Return the prompts' ids (B, T), padded on the right, pixel_values (B, 3 or 6, size, size), and the prompts' lengths
    (B,) or, if there is no padding, None: what `OpenVLA.generate` takes.
    """
    if len(images) != len(instructions) or len(images) == 0:
        raise ValueError(
            f"{len(images)} images and {len(instructions)} instructions: give the same number of both, at least one"
        )
    pixel_values = prepare_images(policy, images, crop)
    prompts = [policy.tokenizer.encode_prompt(text) for text in instructions]
    input_ids, lengths = pad_sequences(prompts, PAD)
    has_padding = bool((lengths != lengths[0]).any())
    return input_ids.to(policy.device), pixel_values, lengths.to(policy.device) if has_padding else None


def predict_normalized_chunk(
    policy: Policy, images: Sequence, instructions: list[str], crop: bool | None = None
) -> np.ndarray:
    """
    Return the chunks that a FAST policy generates, (B, K, A) float64 in [-1, 1]. Each of them is whole: see
    `ChunkDecoder`. Beyond [-1, 1], where rounding may lead, they are clipped, as the actions were in training.
    """
    if policy.engine:
        raise ValueError(f"{policy.checkpoint} is a FAST policy, the engine is for single actions: leave it out")
    return generate_chunks(policy, *prepare_inputs(policy, images, instructions, crop))


def generate_chunks(
    policy: Policy, input_ids: torch.Tensor, pixel_values: torch.Tensor, lengths: torch.Tensor | None
) -> np.ndarray:
    """Return what `predict_normalized_chunk` does, given the inputs of the model."""
    decoder = ChunkDecoder(policy.fast, len(input_ids), policy.device)
    max_tokens = policy.fast.max_tokens(policy.fast.time_horizon, policy.fast.action_dim)
    policy.model.generate_with(decoder, input_ids, pixel_values, max_tokens, lengths)
    try:
        return np.clip(decoder.chunks(), -1, 1)
    except ValueError as error:
        raise ValueError(f"{policy.checkpoint}: {error}") from None


def predict_chunk(
    policy: Policy,
    images: Sequence[Sequence],
    instructions: Sequence[str],
    states: np.ndarray | None = None,
    unnorm_key: str = "",
    crop: bool | None = None,
    previous: np.ndarray | None = None,
) -> np.ndarray:
    """
    Return a chunk of actions for each robot, (B, K, A) float64, in the robot's units. K is 1 for a token model.

    images: for each of B robots its V images, as `predict_action` takes them. instructions: B texts.
    states: (B, P), in the robot's units, if the policy takes them. unnorm_key, crop, previous: as for `predict_action`.
    Raises ValueError for bad input.
    """
    if policy.fast:
        single = [image for (image,) in images]
        entry = dataset_stats(policy.norm_stats, unnorm_key, policy.checkpoint)
        check_action_dim(policy.fast, entry)
        chunks = predict_normalized_chunk(policy, single, list(instructions), crop)
        return unnormalize(chunks, entry["action"], entry.get("scheme", SCHEME))
    if not policy.is_oft:
        single = [image for (image,) in images]
        return predict_action(policy, single, instructions, unnorm_key, crop, previous)[:, None]

    key = choose_key(policy.norm_stats, unnorm_key, policy.checkpoint)
    stats = policy.norm_stats[key]
    scheme = policy.model.oft.scheme
    where = f"{policy.checkpoint}: statistics of {key!r}"
    check_statistics(stats, "action", where, scheme)
    if policy.state_dim:
        check_statistics(stats, "proprio", where, scheme)
    check_dimensions(policy.model.oft, stats)

    views = [prepare_images(policy, view, crop) for view in zip(*images, strict=True)]
    pixel_values = torch.cat(views, dim=1)  # (B, V * 6, size, size)

    proprio = None
    if policy.state_dim and states is not None:
        found = np.shape(states)[-1]
        if found != policy.state_dim:
            raise ValueError(f"the state has {found} numbers, {policy.checkpoint} was trained on {policy.state_dim}")
        proprio = torch.from_numpy(normalize(states, stats["proprio"], scheme)).to(policy.device)

    prompts = [policy.tokenizer.encode_prompt(text) for text in instructions]
    actions = policy.model.predict(prompts, pixel_values, proprio)  # (B, K, A) in [-1, 1]
    return unnormalize(actions.numpy(), stats["action"], scheme)


# -----------------------------------------------------------------------------
# Statistics and limits


def dataset_stats(norm_stats: dict, unnorm_key: str, checkpoint: str) -> dict:
    """
    Return the statistics of one dataset, {"action": ..., "proprio": ...}. Raises ValueError as `choose_key`, or if the
    statistics cannot be used.
    """
    key = choose_key(norm_stats, unnorm_key, checkpoint)
    entry = norm_stats[key]
    check_statistics(entry, "action", f"{checkpoint}: statistics of {key!r}")
    return entry


def choose_key(norm_stats: dict, unnorm_key: str, checkpoint: str) -> str:
    """
    Return `unnorm_key`, or if it is empty the name of the only dataset. Raises ValueError if it is unknown, or empty
    although there are several.
    """
    keys = sorted(norm_stats)
    if not keys:
        raise ValueError(f"{checkpoint}: no action statistics; put the dataset_statistics.json beside the weights")
    if isinstance(norm_stats.get("action"), dict) and "q01" in norm_stats["action"]:
        raise ValueError(
            f"{checkpoint}: the statistics do not name their dataset; in dataset_statistics.json (or norm_stats of "
            f'config.json) put them one level deeper, {{"my_dataset": {{"action": ...}}}}'
        )
    if not unnorm_key and len(keys) == 1:
        return keys[0]
    if unnorm_key not in keys:
        what = f"unknown unnorm_key {unnorm_key!r}" if unnorm_key else "several datasets and no unnorm_key"
        raise ValueError(f"{checkpoint}: {what}; the checkpoint has: {', '.join(keys)}")
    return unnorm_key


def check_statistics(entry: dict, part: str, where: str, scheme: str = ""):
    """
    Raise ValueError unless the statistics of a dataset can turn numbers in [-1, 1] into the robot's units, and back.
    part: action or proprio. where: the start of the message, checkpoint and dataset. scheme: "": as `entry` says.
    """
    remedy = "fix dataset_statistics.json or config.json"
    if not isinstance(entry, dict):
        raise ValueError(f'{where}: {entry!r:.60} where {{"action": ...}} is expected; {remedy}')
    scheme = scheme or entry.get("scheme", SCHEME)
    if scheme not in list(SCHEMES):
        raise ValueError(f"{where}: scheme is {scheme!r}, known are {', '.join(SCHEMES)}; {remedy}")
    stats = entry.get(part)
    if not isinstance(stats, dict):
        raise ValueError(f"{where}: {part} is missing; {remedy}")

    # The ends of the range, which become -1 and +1: of this scheme, and of the usual one, which every dataset has.
    pairs = [SCHEMES[SCHEME]]
    if scheme != SCHEME:
        pairs.append(SCHEMES[scheme])
    for low_key, high_key in pairs:
        low = finite_numbers(stats.get(low_key))
        high = finite_numbers(stats.get(high_key))
        if low is None or high is None or len(low) != len(high):
            raise ValueError(
                f"{where}, {part}: {low_key} and {high_key} must be finite numbers, as many as dimensions; {remedy}"
            )
        exchanged = np.flatnonzero(low > high)
        if len(exchanged) > 0:
            i = exchanged[0]
            raise ValueError(
                f"{where}, {part}: {low_key} is above {high_key} in dimension {i} ({low[i]:.3g} and {high[i]:.3g}), "
                f"which would mirror the movement; {remedy}"
            )

    num_dims = len(stats["q01"])
    for key in ("min", "max"):
        if key in stats and np.shape(stats[key]) != (num_dims,):
            raise ValueError(f"{where}, {part}: {key} must be {num_dims} numbers, as q01; {remedy}")
    mask = stats.get("mask", [True] * num_dims)
    is_list = isinstance(mask, list | tuple | np.ndarray)
    if not is_list or len(mask) != num_dims or any(flag not in (True, False) for flag in mask):
        raise ValueError(
            f"{where}, {part}: mask is {mask!r:.60}, it must be {num_dims} times true (normalised) or false; {remedy}"
        )


def finite_numbers(values) -> np.ndarray | None:
    """Return a list of finite numbers as an array (A,), or None if it is something else."""
    try:
        numbers = np.asarray(values, np.float64)
    except (ValueError, TypeError):
        return None
    is_good = numbers.ndim == 1 and len(numbers) > 0 and np.isfinite(numbers).all()
    return numbers if is_good else None


def action_dimensions(entry: dict) -> list[tuple[str, str]]:
    """
    Return name and unit of each dimension of the actions of a dataset. entry: its statistics. Without a record, seven
    dimensions are those of the end effector, as in the released checkpoints.
    """
    num_dims = len(entry["action"]["q01"])
    names = [f"a{i}" for i in range(num_dims)]
    if num_dims == len(UNITS):
        names = list(UNITS)
    recorded = entry.get("action_names")
    if isinstance(recorded, list) and len(recorded) == num_dims:
        names = [str(name) for name in recorded]
    is_end_effector = names == list(UNITS)
    return [(name, UNITS[name] if is_end_effector else "") for name in names]


def action_stats(norm_stats: dict, unnorm_key: str, checkpoint: str) -> dict:
    """Return the action statistics of one dataset."""
    return dataset_stats(norm_stats, unnorm_key, checkpoint)["action"]


def check_dimensions(oft: OFTConfig, stats: dict):
    """Raise ValueError if an OFT policy has other dimensions than the dataset whose statistics are asked for."""
    num_action = len(stats["action"]["q01"])
    num_state = 0
    if oft.proprio_dim and "proprio" in stats:
        num_state = len(stats["proprio"]["q01"])
    if num_action != oft.action_dim or num_state != oft.proprio_dim:
        raise ValueError(
            f"this dataset has {num_action} numbers of an action and {num_state} of the state, the policy has "
            f"{oft.action_dim} and {oft.proprio_dim}; choose another unnorm_key"
        )


def check_action_dim(fast: FAST, stats: dict):
    """Raise ValueError if a FAST policy has another number of dimensions than the dataset that is asked for."""
    num_action = len(stats["action"]["q01"])
    if num_action != fast.action_dim:
        raise ValueError(
            f"this dataset has {num_action} numbers of an action, the policy's chunks have {fast.action_dim}; choose "
            f"another unnorm_key"
        )


def check_length(
    config: OpenVLAConfig, prompt_ids: list[int], action_dim: int, oft: OFTConfig | None, fast: FAST | None = None
):
    """
    Raise ValueError if images, prompt and answer do not fit into the model's context. oft: of an OFT policy. fast: of a
    FAST policy, for which the longest answer counts.
    """
    num_images = oft.num_images if oft else 1
    num_new_tokens = oft.num_new_tokens if oft else action_dim
    if fast:
        num_new_tokens = fast.max_tokens(fast.time_horizon, fast.action_dim)
    total = num_images * config.num_patches + len(prompt_ids) + num_new_tokens
    limit = config.text.max_position_embeddings
    if total > limit:
        raise ValueError(
            f"the instruction makes {total} tokens with images and answer, the context has {limit}; shorten it"
        )
