"""
Why does a policy with 95 % accuracy never succeed? Look for the usual reasons, one after the other.

    python -m diagnose.check policy --checkpoint C --data_root_dir DIR --data_mix M       # images, prompt, gripper, ...
    python -m diagnose.check language --checkpoint C --data_root_dir DIR --data_mix M     # does it listen?
    python -m diagnose.check attention --checkpoint C --data_root_dir DIR --data_mix M    # where does it look?
    python -m diagnose.check data --data_root_dir DIR --data_mix M                        # diagnose/look.py as verdicts

Frames of the dataset go through sample.py's path, as a robot's images would. Each verdict says what was found, and a
FAIL also why it matters and what to do. The exit code is 1 if anything fails. Images go to --out.

Only token models can be checked. Of a FAST policy's chunk the first action counts. OFT policies are refused; `data`
works for the data of any policy.

Axes: N frames, A action dimensions (and as many tokens), S sequence, H heads.
"""

import copy
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from checkpoint import open_checkpoint
from configurator import configure, fail, read_config_file
from data import needs_folder, open_mixture, to_image
from diagnose.look import decode_picture, look
from formats.dataset import RobotDataset
from formats.faults import episode_starts, spread
from image import center_crop
from metrics import import_pyplot, plot_actions
from normalize import action_mask, normalize, unnormalize
from policy import (
    Policy,
    action_dimensions,
    action_stats,
    generate_chunks,
    load_policy,
    pick_device,
    pick_dtype,
    predict_normalized_chunk,
    predict_tokens,
    prepare_image,
    prepare_images,
    uses_center_crop,
)
from progress import no_progress, show_progress
from tokenizer import BLANK, PAD, PROMPT, PROMPT_VICUNA, decode_action, encode_action, pad_sequences


@dataclass
class Config:
    checkpoint: str = ""  # folder in Hugging Face layout, or a LoRA run
    data_root_dir: str = ""
    data_mix: Any = ""  # as train.py takes it (of a mixture, the first dataset is taken); "": that of --training_config
    training_config: str = ""  # config file of the training run, for its data_mix and data_root_dir
    split: str = "train"  # or val
    unnorm_key: str = ""  # "": the dataset's name, or the checkpoint's only one
    episodes: int = 16  # to look at, from all over the dataset
    frames: int = 400  # of them together, at most
    center_crop: bool | None = None  # as the robot's side has it; None: as the checkpoint was trained
    what_if: int = 64  # frames that are also shown in other ways: upside down, mirrored, ...
    batch_size: int = 16
    device: str = "auto"
    dtype: str = "auto"  # bfloat16, float32, float16
    out: str = "check"  # folder for the images


# -----------------------------------------------------------------------------
# Verdicts


@dataclass
class Verdict:
    """What a check has found out about one possible cause of failure."""

    cause: str
    passed: bool
    found: str
    why: str = ""  # why it matters, if it failed
    remedy: str = ""  # what to do then


def report(*verdicts: Verdict | None) -> int:
    """Print verdicts, and return how many have failed. None, of a check that cannot tell anything, is left out."""
    failed = 0
    for verdict in verdicts:
        if verdict is None:
            continue
        print(f"{'ok  ' if verdict.passed else 'FAIL'} {verdict.cause}: {verdict.found}")
        if not verdict.passed:
            failed += 1
            print(f"     why it matters: {verdict.why}")
            print(f"     what to do: {verdict.remedy}")
    return failed


# -----------------------------------------------------------------------------
# Frames of the dataset


@dataclass
class Frames:
    """Some frames of a dataset, and what the policy should answer to them."""

    numbers: list[int]  # N, in the dataset
    pictures: list  # N, as they are stored
    images: list[np.ndarray]  # N of (H, W, 3) uint8
    instructions: list[str]  # N
    actions: np.ndarray  # (N, A) in robot units
    targets: np.ndarray  # (N, A) the same, normalised

    @property
    def num_tokens(self) -> int:
        """The tokens of an action, as many as it has dimensions."""
        return self.actions.shape[1]

    def subset(self, rows: list[int]) -> "Frames":
        return Frames(
            numbers=[self.numbers[i] for i in rows],
            pictures=[self.pictures[i] for i in rows],
            images=[self.images[i] for i in rows],
            instructions=[self.instructions[i] for i in rows],
            actions=self.actions[rows],
            targets=self.targets[rows],
        )


def pick_frames(dataset: RobotDataset, episodes: int, most: int) -> list[list[int]]:
    """
    Return the numbers of the frames of whole episodes, spread over the dataset, together `most` at most. If the
    episodes are not known, each frame stands alone.
    """
    _, episode_of_frame = dataset.all_actions()
    if episode_of_frame is None:
        return [[i] for i in spread(len(dataset), most)]

    starts = np.flatnonzero(episode_starts(episode_of_frame, len(dataset)))
    ends = np.append(starts[1:], len(dataset))
    picked = []
    room = most
    for i in spread(len(starts), episodes):
        start = int(starts[i])
        length = int(ends[i]) - start
        if not picked:
            length = min(length, most)  # the first episode is cut if it is too long; others are left out
        if length <= room:
            picked.append(list(range(start, start + length)))
            room -= length
    return picked


def read_frames(dataset: RobotDataset, episodes: list[list[int]]) -> Frames:
    """Read the frames of some episodes, one episode after the other."""
    numbers = list(chain.from_iterable(episodes))
    frames = [dataset[number] for number in numbers]
    pictures = [frame["pictures"][0] for frame in frames]
    actions = np.stack([frame["actions"][0] for frame in frames])
    return Frames(
        numbers=numbers,
        pictures=pictures,
        images=[decode_picture(picture) for picture in pictures],
        instructions=[frame["instruction"] for frame in frames],
        actions=actions,
        targets=normalize(actions, dataset.statistics["action"], dataset.scheme),
    )


def rows_of_episodes(episodes: list[list[int]]) -> list[slice]:
    """Return the rows that each episode takes in `Frames`."""
    ends = np.cumsum([len(episode) for episode in episodes])
    return [slice(end - len(episode), end) for episode, end in zip(episodes, ends, strict=True)]


# -----------------------------------------------------------------------------
# The policy's answers


def predict(
    policy: Policy,
    frames: Frames,
    batch_size: int,
    crop: bool | None,
    title: str = "",
    progress: Callable = no_progress,
) -> np.ndarray:
    """
    Return the tokens (N, A) that the policy generates, by sample.py's path; of a FAST policy the bins of its chunk's
    first action. crop: as in `predict_tokens`.
    """
    tokens = []
    for start in progress(range(0, len(frames.images), batch_size), title, "batches"):
        images = frames.images[start : start + batch_size]
        instructions = frames.instructions[start : start + batch_size]
        if policy.fast:
            chunks = predict_normalized_chunk(policy, images, instructions, crop)  # (batch, K, A)
            tokens.append(torch.from_numpy(encode_action(chunks[:, 0])))
        else:
            tokens.append(predict_tokens(policy, images, instructions, frames.num_tokens, crop))
    return torch.cat(tokens).numpy()


def predict_as_in_training(policy: Policy, frames: Frames, batch_size: int) -> np.ndarray:
    """Return the tokens (N, A) that the policy generates by data.py's path, with its image and its prompt."""
    A = frames.num_tokens
    tokens = []
    for start in range(0, len(frames.pictures), batch_size):
        images = [to_image(picture, policy.processor.size) for picture in frames.pictures[start : start + batch_size]]
        if uses_center_crop(policy):
            images = [center_crop(image) for image in images]  # the middle of what random crops show
        pixels = torch.from_numpy(np.stack(images)).to(policy.device)
        pixel_values = policy.processor.normalize(pixels).to(policy.dtype)

        instructions = frames.instructions[start : start + batch_size]
        prompts = [prompt_as_in_training(policy, instruction, A) for instruction in instructions]
        input_ids, lengths = pad_sequences(prompts, PAD)
        input_ids = input_ids.to(policy.device)
        lengths = lengths.to(policy.device)
        if policy.fast:
            chunks = generate_chunks(policy, input_ids, pixel_values, lengths)
            tokens.append(torch.from_numpy(encode_action(chunks[:, 0])))
        else:
            generated, _ = policy.model.generate(input_ids, pixel_values, A, lengths)
            tokens.append(generated.cpu())
    return torch.cat(tokens).numpy()


def prompt_as_in_training(policy: Policy, instruction: str, A: int) -> list[int]:
    """Return the ids that stand before the action in a training sample."""
    actions = np.zeros((policy.action_chunk, A))
    num_tokens = len(policy.fast.encode(actions)) if policy.fast else A
    input_ids, _ = policy.tokenizer.encode_example(instruction, actions)
    return input_ids[: -num_tokens - 1].tolist()  # without the action and </s>


def l1_error(tokens: np.ndarray, targets: np.ndarray) -> float:
    """Return the mean |decoded - target|, in normalised units."""
    return float(np.abs(decode_action(tokens) - targets).mean())


# -----------------------------------------------------------------------------
# Checks of a policy, one function each


def check_statistics(stats: dict, data_stats: dict, key: str) -> Verdict:
    """Does the policy turn tokens into movements with the statistics of this data?"""
    if len(stats["q01"]) != len(data_stats["q01"]):
        raise ValueError(
            f"actions of {key or 'the only key'!r} have {len(stats['q01'])} dimensions in the checkpoint and "
            f"{len(data_stats['q01'])} in the data; choose the --unnorm_key or the --data_mix that belong together"
        )
    span = np.array(data_stats["q99"]) - np.array(data_stats["q01"])
    span = np.where(action_mask(data_stats), np.maximum(span, 1e-6), np.inf)  # only what is normalised counts
    off = 0.0
    for bound in ("q01", "q99"):
        difference = np.abs(np.array(stats[bound]) - np.array(data_stats[bound]))
        off = max(off, float((difference / span).max()))
    return Verdict(
        cause="statistics",
        passed=off < 0.02,
        found=f"q01 and q99 of {key or 'the only key'!r} are {off:.1%} of the range off",
        why="the same tokens become other movements: too large, too small or into another direction",
        remedy="choose the --unnorm_key of the data it was trained on, or put that run's dataset_statistics.json "
        "beside it",
    )


def check_prompt(policy: Policy, instruction: str, A: int) -> Verdict:
    """Does the same prompt stand before an action as in training?"""
    ids = policy.tokenizer.encode_prompt(instruction)
    return Verdict(
        cause="prompt",
        passed=ids[-1] == BLANK and ids == prompt_as_in_training(policy, instruction, A),
        found=f"{len(ids)} ids, the last one {ids[-1]}",
        why=f"training puts {BLANK}, a lone blank, between prompt and action; without it every token is another",
        remedy="use Tokenizer.encode_prompt as it is",
    )


def check_center_crop(policy: Policy, crop: bool | None) -> Verdict | None:
    """Is the policy shown as much of an image as in training? None if the checkpoint does not record that."""
    trained_on = policy.processor.trained_on
    if not trained_on:  # a checkpoint of the official code; then `check_images` has to tell
        return None
    crops = uses_center_crop(policy, crop)
    return Verdict(
        cause="centre crop",
        passed=crops == uses_center_crop(policy),
        found=f"the robot's side shows {'the middle' if crops else 'the whole'} of each image; "
        f"trained on {', '.join(trained_on)}",
        why="everything is larger or smaller, and elsewhere, than in training; some tasks forgive that, most do not",
        remedy="leave --center_crop to the checkpoint's record",
    )


def check_paths(tokens: np.ndarray, tokens_as_in_training: np.ndarray) -> Verdict:
    """Does the robot's path, from image to token, do the same as the path of training?"""
    same = float((tokens == tokens_as_in_training).mean())
    return Verdict(
        cause="paths",
        passed=same > 0.95,
        found=f"{same:.1%} of the tokens are those of the training path on the same frames",
        why="the robot's images or instructions go through other steps than the ones it was trained with",
        remedy="compare preprocessor_config.json (size, trained_on) with the training run's",
    )


def check_gripper(predicted: np.ndarray, actions: np.ndarray, data_stats: dict) -> Verdict | None:
    """Does it open and close as the data does? None without a gripper, or if it never moves in these frames."""
    is_open = actions[:, -1] > 0.5  # (N,)
    has_gripper = not action_mask(data_stats)[-1]
    if not has_gripper or is_open.all() or not is_open.any():
        return None

    right = (predicted[:, -1] > 0.5) == is_open
    right_when_open = float(right[is_open].mean())
    right_when_closed = float(right[~is_open].mean())
    found = f"as in the data in {right_when_open:.1%} of the open and {right_when_closed:.1%} of the closed frames"
    fault = ""
    if right_when_open + right_when_closed <= 0.7:
        fault = "the wrong way round"
    elif right_when_open <= 0.2:
        fault = "it never opens"
    elif right_when_closed <= 0.2:
        fault = "it never closes"
    return Verdict(
        cause="gripper",
        passed=not fault,
        found=f"{found}: {fault}" if fault else found,
        why="it cannot hold anything",
        remedy="1 is open, 0 is closed: turn it in the dataset's standardise function, or on the robot; if it never "
        "moves, look at how often it does in the data (python -m diagnose.check data)",
    )


def check_template(policy: Policy, frames: Frames, template: str, error: float, cfg: Config) -> Verdict:
    """Does it answer better with another model's words around the instruction? error: with its own."""
    tokenizer = copy.copy(policy.tokenizer)
    tokenizer.prompt = template
    crops = uses_center_crop(policy, cfg.center_crop)
    tokens = predict(replace(policy, tokenizer=tokenizer), frames, cfg.batch_size, crops)
    other_error = l1_error(tokens, frames.targets)
    return Verdict(
        cause="template",
        passed=other_error > 0.8 * error,
        found=f"L1 {error:.3f} with its own, {other_error:.3f} with {template[:24]!r}...",
        why="it was trained with other words around the instruction",
        remedy="config.json's llm_backbone_id and hf_llm_id choose the template (tokenizer.prompt_for)",
    )


def check_images(policy: Policy, frames: Frames, error: float, cfg: Config) -> Verdict:
    """Does it answer better if the images come in another way? error: as they are."""
    crops = uses_center_crop(policy, cfg.center_crop)
    other_crop = "without the centre crop" if crops else "with the centre crop"
    ways = {
        "upside down": [image[::-1] for image in frames.images],
        "turned by 180 degrees": [image[::-1, ::-1] for image in frames.images],
        "mirrored": [image[:, ::-1] for image in frames.images],
        "with red and blue exchanged (BGR)": [image[..., ::-1] for image in frames.images],
        other_crop: frames.images,
    }
    errors = {}
    for way, images in show_progress(ways.items(), "what if", "ways"):
        shown = replace(frames, images=[np.ascontiguousarray(image) for image in images])
        crop = not crops if way == other_crop else crops
        errors[way] = l1_error(predict(policy, shown, cfg.batch_size, crop), frames.targets)

    best = min(errors, key=errors.get)
    passed = errors[best] >= 0.8 * error
    found = f"L1 {error:.3f} as they are, {errors[best]:.3f} {best}"
    if passed:
        found += ", the best of five other ways"
    return Verdict(
        cause="images",
        passed=passed,
        found=found,
        why=f"the policy was trained on images that look as these do {best}",
        remedy="prepare the images for the robot as they were for training; "
        "python -m diagnose.look shows the training images",
    )


def check_against_mean(error: float, frames: Frames, dataset: RobotDataset) -> Verdict:
    """Does it answer better than a policy that always gives the mean action?"""
    data_stats = dataset.statistics["action"]
    mean = normalize(np.array(data_stats["mean"])[None], data_stats, dataset.scheme)  # (1, A)
    mean_error = np.abs(mean - frames.targets).mean()
    return Verdict(
        cause="better than the mean",
        passed=error < 0.9 * mean_error,
        found=f"L1 {error:.3f}; always the mean action: {mean_error:.3f}",
        why="it has learned nothing from the images",
        remedy="train longer, or find which of the above is wrong",
    )


# -----------------------------------------------------------------------------
# The command `policy`


def check_policy(policy: Policy, dataset: RobotDataset, cfg: Config) -> int:
    """Print all that frames can tell about a policy, and plot its actions. Returns how many checks failed."""
    data_stats = dataset.statistics["action"]
    key = cfg.unnorm_key
    if not key and dataset.name in policy.norm_stats:
        key = dataset.name
    stats = action_stats(policy.norm_stats, key, policy.checkpoint)

    # What can be told before the policy answers.
    failed = report(check_statistics(stats, data_stats, key))
    episodes = pick_frames(dataset, cfg.episodes, cfg.frames)
    frames = read_frames(dataset, episodes)
    failed += report(
        check_prompt(policy, frames.instructions[0], frames.num_tokens),
        check_center_crop(policy, cfg.center_crop),
    )

    # Its answers.
    tokens = predict(policy, frames, cfg.batch_size, cfg.center_crop, "inference", show_progress)
    tokens_as_in_training = predict_as_in_training(policy, frames, cfg.batch_size)
    predicted = decode_action(tokens)  # (N, A) normalised
    failed += report(
        check_paths(tokens, tokens_as_in_training),
        check_gripper(predicted, frames.actions, data_stats),
    )

    # What if the frames came in another way? Fewer of them will do to see that.
    few_rows = spread(len(frames.numbers), cfg.what_if)
    few = frames.subset(few_rows)
    error = l1_error(tokens[few_rows], few.targets)
    for template in (PROMPT, PROMPT_VICUNA):
        if template != policy.tokenizer.prompt:
            failed += report(check_template(policy, few, template, error, cfg))
    failed += report(check_images(policy, few, error, cfg))

    # How good is it?
    failed += report(check_against_mean(l1_error(tokens, frames.targets), frames, dataset))
    answers = unnormalize(predicted, stats, dataset.scheme)  # (N, A) in robot units
    rows = rows_of_episodes(episodes)
    print_errors(tokens, answers, frames, rows)
    dimensions = action_dimensions({**dataset.statistics, "action_names": list(dataset.action_names)})
    show_worst_episodes(Path(cfg.out) / "policy.png", predicted, answers, frames, rows, dimensions)
    return failed


def print_errors(tokens: np.ndarray, answers: np.ndarray, frames: Frames, episodes: list[slice]):
    """Print accuracy and errors, also by dimension."""
    accuracy = (tokens == encode_action(frames.targets)).mean()
    errors = np.abs(decode_action(tokens) - frames.targets)  # (N, A)
    # A policy that repeats the last action would be off by the change from frame to frame.
    changes = np.concatenate([np.abs(np.diff(frames.targets[rows], axis=0)) for rows in episodes])
    repetition = float(changes.mean()) if len(changes) else np.inf
    print(f"     token accuracy {accuracy:.1%}, L1 {errors.mean():.4f}; of repeating the last action {repetition:.4f}")

    by_dimension = {"normalised:": errors, "in units:": np.abs(answers - frames.actions)}
    for title, values in by_dimension.items():
        numbers = " ".join(f"{value:.4f}" for value in values.mean(axis=0))
        print(f"     L1 per dimension, {title:12s}{numbers}")


def show_worst_episodes(
    path: Path,
    predicted: np.ndarray,
    answers: np.ndarray,
    frames: Frames,
    episodes: list[slice],
    dimensions: list[tuple[str, str]],
):
    """Print the three episodes with the largest errors, and plot the first six."""
    errors = np.abs(predicted - frames.targets)  # (N, A)
    worst_first = sorted(episodes, key=lambda rows: -errors[rows].mean())
    for rows in worst_first[:3]:
        numbers = frames.numbers[rows]
        instruction = frames.instructions[rows.start]
        print(f"     frames {numbers[0]} to {numbers[-1]}: L1 {errors[rows].mean():.4f}, {instruction!r}")

    names = [f"{name} ({unit})" if unit else name for name, unit in dimensions]
    pairs = [(frames.actions[rows], answers[rows]) for rows in worst_first[:6]]
    plot_actions(path, pairs, dict(enumerate(names)))
    print(f"     {path}: what the data does and what the policy answers, worst episodes first")


# -----------------------------------------------------------------------------
# The command `language`


def check_language(policy: Policy, dataset: RobotDataset, cfg: Config) -> int:
    """
    Print what becomes of the actions when the instruction is another one of the dataset's, or none. Returns how many
    checks failed.
    """
    frames = read_frames(dataset, pick_frames(dataset, cfg.episodes, cfg.frames))
    known = sorted(set(frames.instructions))
    if len(known) < 2:
        found = f"these frames have one instruction only, {known[0]!r}: nothing to tell apart"
        return report(Verdict("language", True, found))

    rng = np.random.default_rng(0)
    swapped = []
    for instruction in frames.instructions:
        others = [other for other in known if other != instruction]
        swapped.append(str(rng.choice(others)))

    instructions = {"right": frames.instructions, "swapped": swapped, "blank": [" "] * len(swapped)}
    tokens = {}
    for name, texts in instructions.items():
        told = replace(frames, instructions=texts)
        tokens[name] = predict(policy, told, cfg.batch_size, cfg.center_crop, name, show_progress)

    errors = {name: l1_error(answer, frames.targets) for name, answer in tokens.items()}
    print("     L1 " + ", ".join(f"{error:.3f} {name}" for name, error in errors.items()))
    swap_changes = float((tokens["swapped"] != tokens["right"]).any(axis=1).mean())
    blank_changes = float((tokens["blank"] != tokens["right"]).any(axis=1).mean())
    verdict = Verdict(
        cause="language",
        passed=swap_changes > 0.1 and errors["swapped"] > 1.02 * errors["right"],
        found=f"another instruction changes {swap_changes:.0%} of the actions, none at all {blank_changes:.0%}",
        why="it goes by the image alone and will do what it did most often in this scene",
        remedy="train on scenes in which several instructions are possible; freeze less; look at how varied the "
        "instructions are",
    )
    return report(verdict)


# -----------------------------------------------------------------------------
# The command `attention`


def check_attention(policy: Policy, dataset: RobotDataset, cfg: Config) -> int:
    """
    Draw attention.png: for four frames, how much each token of the action attends to each patch of the image. Raises
    ValueError for a FAST policy, whose tokens are no dimensions of an action.
    """
    if policy.fast:
        raise ValueError(
            f"{policy.checkpoint} is a FAST policy: its tokens are no dimensions of an action, each for itself; the "
            f"commands `policy` and `language` can check it"
        )
    middles = [[episode[len(episode) // 2]] for episode in pick_frames(dataset, 4, cfg.frames)]
    frames = read_frames(dataset, middles)
    A = frames.num_tokens
    plt = import_pyplot()
    figure, axes = plt.subplots(len(middles), A + 1, figsize=(1.7 * (A + 1), 2.0 * len(middles)), squeeze=False)
    for row, image, instruction in zip(axes, frames.images, frames.instructions, strict=True):
        maps = attention_to_patches(policy, image, instruction, A, cfg.center_crop)  # (A, side, side)
        draw_attention(row, prepare_image(policy, image, cfg.center_crop), instruction, maps)
    figure.tight_layout()
    path = Path(cfg.out) / "attention.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return report(Verdict("attention", True, f"{path}, one column for each action dimension"))


@torch.inference_mode()
def attention_to_patches(
    policy: Policy, image: np.ndarray, instruction: str, A: int, crop: bool | None
) -> torch.Tensor:
    """
    Return how much each token of the action attends to each patch of the image, (A, side, side): the mean over the
    language model's layers and heads.
    """
    # The prompt with its answer, without the last token. So each of the last A positions predicts one of the tokens.
    tokens = predict_tokens(policy, [image], [instruction], A, crop)  # (1, A)
    prompt = torch.tensor([policy.tokenizer.encode_prompt(instruction)])
    input_ids = torch.cat([prompt, tokens[:, :-1]], dim=1).to(policy.device)
    embeddings = policy.vla.embed(input_ids, prepare_images(policy, [image], crop))  # (1, S, D)

    total = torch.zeros(A, embeddings.shape[1], device=policy.device)
    layers = policy.vla.language_model.attention_maps(embeddings)  # of (1, H, S, S)
    for weights in layers:
        total += weights[0, :, -A:].float().mean(dim=0)  # (A, S)
    mean = total / len(policy.vla.language_model.model.layers)

    num_patches = policy.vla.cfg.num_patches
    side = math.isqrt(num_patches)
    return mean[:, 1 : 1 + num_patches].view(A, side, side).cpu()  # the patches stand behind <s>


def draw_attention(axes, image: np.ndarray, instruction: str, maps: torch.Tensor):
    """Draw the image, and beside it once more for each token, under the patches that this token attends to."""
    axes[0].imshow(image)
    axes[0].set_title(instruction[:24], fontsize=6)
    for i, axis in enumerate(axes[1:]):
        heat = F.interpolate(maps[None, i : i + 1], image.shape[:2], mode="bilinear")[0, 0]  # (H, W)
        axis.imshow(image)
        axis.imshow(heat, cmap="inferno", alpha=0.55)
        axis.set_title(f"{i}: {maps[i].sum():.0%} on the image", fontsize=6)
    for axis in axes:
        axis.axis("off")


# -----------------------------------------------------------------------------
# The command `data`

# What look.py finds -> why it matters, what to do
ADVICE = {
    "frames": {
        "why": "there is nothing to learn from",
        "remedy": "choose another --split",
    },
    "spread": {
        "why": "divided by q99 - q01, noise becomes the whole range",
        "remedy": "if the robot cannot move so, set it to 0 in standardize=; else find out why it was not recorded",
    },
    "constant": {
        "why": "a dimension that never moves cannot be learned; it becomes 0",
        "remedy": "if the robot cannot move so, all is well; else find out why it was not recorded",
    },
    "gripper": {
        "why": "a policy takes 1 for open and 0 for closed, and does not normalise it",
        "remedy": "turn and scale it in the dataset's standardise function (formats/oxe.py); all is well if this robot "
        "starts with it closed",
    },
    "state": {
        "why": "a policy that gets it learns nothing from it",
        "remedy": "leave it out of `state`, or find out why it was not recorded",
    },
    "idle": {
        "why": "a policy that stood still once sees the same image again, and stands still for ever",
        "remedy": "leave steps out in which nothing moves, as LIBERO's no_noops sets do",
    },
    "episodes": {
        "why": "they are probably broken off, and may end in the middle of a movement",
        "remedy": "leave them out",
    },
    "control rate": {
        "why": "a policy can copy what it did last, and each step is too small to tell from noise; most of what "
        "openvla-7b learned from has 3 to 20 actions a second",
        "remedy": "take every n-th frame and add the movements up, or train chunks (finetune_oft.py)",
    },
    "instructions": {
        "why": "what these frames show is learned as the answer to no instruction at all",
        "remedy": "label them, or leave them out",
    },
    "records": {
        "why": "they are skipped",
        "remedy": "copy the files again: their checksums or their content are wrong",
    },
    "images": {
        "why": "training stops there",
        "remedy": "copy the files again, or leave these frames out",
    },
}


def check_data(mixture: list[tuple[RobotDataset, float]], out: str) -> int:
    """Print look.py's table and a verdict on each of its findings. Returns how many are wrong."""
    failed = 0
    for dataset, weight in mixture:
        for finding in look(dataset, weight, out):
            verdict = Verdict(
                cause=f"{dataset.name}, {finding.cause}",
                passed=not finding.is_wrong,
                found=finding.text,
                **ADVICE[finding.cause],
            )
            failed += report(verdict)
    return failed


# -----------------------------------------------------------------------------
# Command line

POLICY_COMMANDS = {"policy": check_policy, "language": check_language, "attention": check_attention}
COMMANDS = (*POLICY_COMMANDS, "data")


def main(command: str, cfg: Config) -> int:
    """Run a command, and return how many of its checks failed."""
    cfg = fill_from_training_config(cfg)
    if not cfg.data_mix or (needs_folder(cfg.data_mix) and not cfg.data_root_dir):
        fail("give --data_root_dir DIR and --data_mix NAME, or the --training_config that has them")
    if command != "data" and not cfg.checkpoint:
        fail("give --checkpoint FOLDER")

    try:
        dtype = pick_dtype(cfg.dtype)
        device = pick_device(cfg.device)
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        if command == "data":
            return check_data(open_data(cfg), cfg.out)

        checkpoint = open_checkpoint(cfg.checkpoint)
        if checkpoint.is_oft:
            fail(
                f"{cfg.checkpoint} is an OFT policy, which answers with chunks of actions; only token models can be "
                f"checked. Its data can: python -m diagnose.check data"
            )
        dataset, _ = open_data(cfg)[0]
        if not len(dataset):
            fail(f"{dataset.name} has no frames in its {cfg.split} split; choose the other --split")
        policy = load_policy(checkpoint, dtype, device, show_progress)
        return POLICY_COMMANDS[command](policy, dataset, cfg)
    except (ValueError, OSError) as error:
        fail(error)


def fill_from_training_config(cfg: Config) -> Config:
    """Take data_mix and data_root_dir from --training_config where the command line does not give them."""
    if not cfg.training_config:
        return cfg
    settings = read_config_file(cfg.training_config)
    return replace(
        cfg,
        data_mix=cfg.data_mix or settings.get("data_mix", ""),
        data_root_dir=cfg.data_root_dir or settings.get("data_root_dir", ""),
    )


def open_data(cfg: Config) -> list[tuple[RobotDataset, float]]:
    """Return [(dataset, weight)]. Broken records are left out; `check_data` counts them."""
    return open_mixture(cfg.data_root_dir, cfg.data_mix, cfg.split, skip_bad_records=True, progress=show_progress)


if __name__ == "__main__":
    command, *options = sys.argv[1:] or [""]
    if command in ("--help", "-h"):
        configure(Config, ["--help"])  # ends the program
    if command not in COMMANDS:
        fail(f"usage: python -m diagnose.check {{{'|'.join(COMMANDS)}}} [--option value ...]; --help lists the options")
    failed = main(command, configure(Config, options))
    sys.exit(1 if failed else 0)
