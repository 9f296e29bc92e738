"""
Why does a policy with 95 % accuracy never succeed? The usual reasons, looked for one after the other.

    python check.py policy --checkpoint C --data_root_dir DIR --data_mix M      # statistics, prompt, pictures, gripper
    python check.py language --checkpoint C --data_root_dir DIR --data_mix M    # does it listen?
    python check.py attention --checkpoint C --data_root_dir DIR --data_mix M   # where does it look?
    python check.py data --data_root_dir DIR --data_mix M                       # what data.py's look says, as verdicts

Frames of the dataset go through sample.py's path, as a robot's pictures would. Each verdict says what was found, and a
FAIL why it matters and what to do; the exit code is 1 if anything fails. Pictures go to --out.

Axes: N frames, A action dimensions, n = A tokens, S sequence, H heads.
"""

import copy
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import sample
from configurator import configure, fail, read_config_file
from data import open_mixture, scheme_of, to_picture
from diagnose.look import look, spread
from image import center_crop, decode, to_rgb
from metrics import plot_actions
from tokenizer import (
    BLANK,
    PAD,
    PROMPT,
    PROMPT_VICUNA,
    action_mask,
    decode_action,
    encode_action,
    normalize,
    pad_sequences,
    unnormalize,
)

CLOSE = 0.02  # of a dimension's range: statistics that differ by less are the same


@dataclass
class Config:
    checkpoint: str = ""  # folder in Hugging Face layout, or a LoRA run
    data_root_dir: str = ""
    data_mix: Any = ""  # a dataset of oxe.py (of a mixture, the first one); "": that of --training_config
    training_config: str = ""  # config file of the training run, if it adds the dataset to oxe.py, or has its data_mix
    split: str = "train"  # or val
    unnorm_key: str = ""  # "": the dataset's name, or the checkpoint's only one
    episodes: int = 16  # to look at, from all over the dataset
    frames: int = 400  # of them together, at most
    center_crop: bool | None = None  # as the robot's side has it; None: as the checkpoint was trained
    what_if: int = 64  # frames that are looked at in other ways, too
    batch_size: int = 16
    device: str = "auto"
    dtype: str = "auto"  # bfloat16, float32, float16
    out: str = "check"  # folder for the pictures


class Verdicts:
    """Printed as they come; `failed` counts."""

    def __init__(self):
        self.failed = 0

    def __call__(self, fine: bool, what: str, found: str, why: str = "", remedy: str = ""):
        print(f"{'ok  ' if fine else 'FAIL'} {what}: {found}")
        if not fine:
            self.failed += 1
            print(f"     why it matters: {why}\n     what to do: {remedy}")


# -----------------------------------------------------------------------------
# Frames


def pick_frames(dataset, episodes: int, most: int) -> list[list[int]]:
    """Numbers of the frames of whole episodes, spread over the dataset; of unknown episodes, single frames."""
    if not hasattr(dataset, "open"):
        return [[i] for i in spread(len(dataset), most)]
    tables = dataset.open()
    which = np.asarray(tables["frames"][tables["usable"], 0])
    first = np.flatnonzero(np.diff(which, prepend=which[0] - 1))
    ends, out = np.append(first[1:], len(which)), []
    for e in spread(len(first), episodes):
        if sum(map(len, out)) + ends[e] - first[e] <= most or not out:
            out.append(list(range(first[e], min(ends[e], first[e] + most))))
    return out


def read(dataset, numbers: list[int]) -> dict:
    """Pictures (H, W, 3), instructions and true actions (N, A), in the dataset's units."""
    frames = [dataset[i] for i in numbers]
    raw = [f["pictures"][0] for f in frames]
    images = [decode(p) if isinstance(p, bytes) else to_rgb(p) for p in raw]
    actions = np.stack([f["actions"][0] for f in frames])
    return dict(raw=raw, images=images, texts=[f["instruction"] for f in frames], actions=actions)


def say(policy, images, texts, A: int, cfg: Config, crop=None, title="") -> np.ndarray:
    """Tokens (N, A) that the policy writes, by sample.py's path."""
    out, size = [], cfg.batch_size
    for i in tqdm(range(0, len(images), size), title, unit="batch", leave=False, disable=not title):
        out.append(sample.predict_tokens(policy, images[i : i + size], texts[i : i + size], A, crop))
    return torch.cat(out).numpy()


def say_in_training(policy, frames: dict, A: int, cfg: Config) -> np.ndarray:
    """The same by data.py's path: its picture, its prompt."""
    model, out = policy.model, []
    weight = model.language_model.model.norm.weight
    for i in range(0, len(frames["raw"]), cfg.batch_size):
        pictures = [to_picture(p, policy.processor.size) for p in frames["raw"][i : i + cfg.batch_size]]
        if sample.crops(policy):  # the middle of what random crops show
            pictures = [center_crop(p) for p in pictures]
        ids = [prompt_in_training(policy, t, A) for t in frames["texts"][i : i + cfg.batch_size]]
        ids, lengths = pad_sequences(ids, PAD)
        pixels = policy.processor.normalize(torch.from_numpy(np.stack(pictures)).to(weight.device)).to(weight.dtype)
        out.append(model.generate(ids.to(weight.device), pixels, A, lengths.to(weight.device))[0].cpu())
    return torch.cat(out).numpy()


def prompt_in_training(policy, text: str, A: int) -> list[int]:
    """What stands before the action in a training sample."""
    return policy.tokenizer.encode_example(text, np.zeros(A))[0][: -A - 1].tolist()


# -----------------------------------------------------------------------------
# The checks


def check_policy(policy, dataset, cfg: Config) -> int:
    """All that can be told from frames; returns how many checks failed."""
    verdict, scheme, data = Verdicts(), scheme_of(dataset), dataset.statistics["action"]
    key = cfg.unnorm_key or (dataset.name if dataset.name in policy.norm_stats else "")
    stats = sample.action_stats(policy.norm_stats, key, policy.checkpoint)
    low, high = (np.array(data[k]) for k in ("q01", "q99"))
    span = np.where(action_mask(data), np.maximum(high - low, 1e-6), np.inf)
    off = max(float((np.abs(np.array(stats[k]) - np.array(data[k])) / span).max()) for k in ("q01", "q99"))
    verdict(
        off < CLOSE, "statistics", f"q01 and q99 of {key or 'the only key'!r} are {off:.1%} of the range off",
        "the same tokens become other movements: too large, too small or into another direction",
        "choose the --unnorm_key of the data it was trained on, or put that run's dataset_statistics.json beside it",
    )  # fmt: skip
    episodes = pick_frames(dataset, cfg.episodes, cfg.frames)
    frames = read(dataset, [i for e in episodes for i in e])
    A, true = len(low), frames["actions"]
    y = normalize(true, data, scheme)

    ids = policy.tokenizer.encode_prompt(frames["texts"][0])
    verdict(
        ids[-1] == BLANK and ids == prompt_in_training(policy, frames["texts"][0], A),
        "prompt", f"{len(ids)} ids, the last one {ids[-1]}",
        f"training puts {BLANK}, a lone blank, between the prompt and the action; without it every token is another",
        "use Tokenizer.encode_prompt as it is",
    )  # fmt: skip

    trained_on = policy.processor.trained_on  # empty for checkpoints of the official code; then `pictures` has to tell
    crops = sample.crops(policy, cfg.center_crop)
    if trained_on:
        verdict(
            crops == sample.crops(policy),
            "centre crop", f"the robot's side shows {'the middle' if crops else 'the whole'} of each picture; "
            f"trained on {', '.join(trained_on)}",
            "all is larger or smaller, and elsewhere, than it was in training; some tasks forgive that, most do not",
            "leave --center_crop to the checkpoint's record",
        )  # fmt: skip
    tokens = say(policy, frames["images"], frames["texts"], A, cfg, cfg.center_crop, "inference")
    said, twin = decode_action(tokens), say_in_training(policy, frames, A, cfg)
    same = float((tokens == twin).mean())
    verdict(
        same > 0.95, "paths", f"{same:.1%} of the tokens are those of the training path on the same frames",
        "the robot's pictures or words go through other steps than the ones it was trained with",
        "compare preprocessor_config.json (size, trained_on) with the training run's",
    )  # fmt: skip

    if not action_mask(data)[-1] and len(set(true[:, -1] > 0.5)) == 2:
        right, is_open = (said[:, -1] > 0.5) == (true[:, -1] > 0.5), true[:, -1] > 0.5
        opened, closed = float(right[is_open].mean()), float(right[~is_open].mean())
        how = "it never opens" if opened < 0.2 else "it never closes"
        how = "the wrong way round" if opened + closed < 0.7 else how
        fine = opened + closed > 0.7 and min(opened, closed) > 0.2
        verdict(
            fine, "gripper", f"as in the data in {opened:.1%} of the open and {closed:.1%} of the closed frames"
            + ("" if fine else f": {how}"), "it cannot hold anything",
            "1 is open, 0 is closed: turn it in the dataset's standardise function, or on the robot; "
            "if it never moves, look at how often it does in the data (check.py data)",
        )  # fmt: skip

    few = spread(len(true), cfg.what_if)
    base = float(np.abs(said[few] - y[few]).mean())
    images, texts = [frames["images"][i] for i in few], [frames["texts"][i] for i in few]
    ways = {  # what it would be, the pictures, the crop
        "upside down": ([i[::-1] for i in images], crops),
        "turned by 180 degrees": ([i[::-1, ::-1] for i in images], crops),
        "mirrored": ([i[:, ::-1] for i in images], crops),
        "with red and blue exchanged (BGR)": ([i[..., ::-1] for i in images], crops),
        f"{'without' if crops else 'with'} the centre crop": (images, not crops),
    }
    errors = {}
    for name, (pictures, crop) in tqdm(ways.items(), "what if", leave=False):
        pictures = [np.ascontiguousarray(p) for p in pictures]
        errors[name] = float(np.abs(decode_action(say(policy, pictures, texts, A, cfg, crop)) - y[few]).mean())
    other = copy.copy(policy)
    other.tokenizer = copy.copy(policy.tokenizer)
    for template in {PROMPT, PROMPT_VICUNA} - {policy.tokenizer.prompt}:
        other.tokenizer.prompt = template
        error = float(np.abs(decode_action(say(other, images, texts, A, cfg, crops)) - y[few]).mean())
        verdict(
            error > 0.8 * base, "template", f"L1 {base:.3f} with its own, {error:.3f} with {template[:24]!r}...",
            "it was trained with other words around the instruction",
            "config.json's llm_backbone_id and hf_llm_id choose the template (tokenizer.prompt_for)",
        )  # fmt: skip
    best = min(errors, key=errors.get)
    better = errors[best] < 0.8 * base
    verdict(
        not better, "pictures",
        f"L1 {base:.3f} as they are, {errors[best]:.3f} {best}" + ("" if better else ", the best of five other ways"),
        f"the policy was trained on pictures that look as these do {best}",
        "prepare the pictures for the robot as they were for training; data.py's look shows the training pictures",
    )  # fmt: skip

    l1 = np.abs(said - y)  # (N, A)
    mean = np.abs(normalize(np.array(data["mean"])[None], data, scheme) - y).mean()
    first = np.array([i for e in episodes for i in [True] + [False] * (len(e) - 1)])
    before = np.where(first[:, None], y, np.roll(y, 1, axis=0))
    repeat = float(np.abs(before - y)[~first].mean()) if (~first).any() else np.inf
    verdict(
        l1.mean() < 0.9 * mean, "better than the mean", f"L1 {l1.mean():.3f}; always the mean action: {mean:.3f}",
        "it has learned nothing from the pictures", "train longer, or find which of the above is wrong",
    )  # fmt: skip
    right = (tokens == encode_action(y)).mean()
    print(f"     token accuracy {right:.1%}, L1 {l1.mean():.4f}; of repeating the last action {repeat:.4f}")
    acted = unnormalize(said, stats, scheme)
    for what, error in (("normalised", l1), ("in units", np.abs(acted - true))):
        print(f"     L1 per dimension, {what + ':':12s}" + " ".join(f"{v:.4f}" for v in error.mean(axis=0)))
    ends = np.cumsum([len(e) for e in episodes])
    parts = [(e, slice(end - len(e), end)) for e, end in zip(episodes, ends, strict=True)]
    parts.sort(key=lambda part: -l1[part[1]].mean())
    for e, rows in parts[:3]:
        print(f"     frames {e[0]} to {e[-1]}: L1 {l1[rows].mean():.4f}, {frames['texts'][rows.start]!r}")
    labels = [f"{n} ({u})" if u else n for n, u in sample.UNITS]
    labels = dict(enumerate(labels if A == len(labels) else [f"a{i}" for i in range(A)]))
    plot_actions(path := Path(cfg.out) / "policy.png", [(true[rows], acted[rows]) for _, rows in parts[:6]], labels)
    print(f"     {path}: what the data does and what the policy says, worst episodes first")
    return verdict.failed


def check_language(policy, dataset, cfg: Config) -> int:
    """What becomes of the actions when the instruction is another one of the dataset's, or none."""
    verdict = Verdicts()
    frames = read(dataset, [i for e in pick_frames(dataset, cfg.episodes, cfg.frames) for i in e])
    A, data = frames["actions"].shape[1], dataset.statistics["action"]
    y, texts = normalize(frames["actions"], data, scheme_of(dataset)), frames["texts"]
    known = sorted(set(texts))
    if len(known) < 2:
        print(f"ok   language: these frames have one instruction only, {known[0]!r}: nothing to tell apart")
        return 0
    rng = np.random.default_rng(0)
    swapped = [rng.choice([k for k in known if k != t]) for t in texts]
    said = {
        name: say(policy, frames["images"], words, A, cfg, cfg.center_crop, name)
        for name, words in dict(right=texts, swapped=swapped, blank=[" "] * len(texts)).items()
    }
    l1 = {name: float(np.abs(decode_action(tokens) - y).mean()) for name, tokens in said.items()}
    changed = {name: float((said[name] != said["right"]).any(axis=1).mean()) for name in ("swapped", "blank")}
    print("     L1 " + ", ".join(f"{v:.3f} {k}" for k, v in l1.items()))
    verdict(
        changed["swapped"] > 0.1 and l1["swapped"] > 1.02 * l1["right"], "language",
        f"another instruction changes {changed['swapped']:.0%} of the actions, none at all {changed['blank']:.0%}",
        "it goes by the picture alone and will do what it did most often in this scene",
        "train on scenes in which several instructions are possible; freeze less; look at how varied the words are",
    )  # fmt: skip
    return verdict.failed


@torch.inference_mode()
def check_attention(policy, dataset, cfg: Config) -> int:
    """attention.png: for some frames, how much each action token looks at each patch (mean of layers and heads)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    picked = [e[len(e) // 2] for e in pick_frames(dataset, 4, cfg.frames)]
    frames, llama = read(dataset, picked), policy.model.language_model
    A, weight = frames["actions"].shape[1], llama.model.norm.weight
    figure, axes = plt.subplots(len(picked), A + 1, figsize=(1.7 * (A + 1), 2.0 * len(picked)), squeeze=False)
    for row, image, text in zip(axes, frames["images"], frames["texts"], strict=True):
        shown = sample.prepare(policy, image, cfg.center_crop)
        pixels = policy.processor.normalize(torch.from_numpy(shown)[None].to(weight.device)).to(weight.dtype)
        tokens = sample.predict_tokens(policy, [image], [text], A, cfg.center_crop).to(weight.device)
        ids = torch.tensor([policy.tokenizer.encode_prompt(text)], device=weight.device)
        x = policy.model.embed(torch.cat([ids, tokens[:, :-1]], dim=1), pixels)  # (1, S, D)
        maps, attend = [], F.scaled_dot_product_attention

        def watch(q, k, v, **options):
            score = (q[:, :, -A:] @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5  # (1, H, A, S); n last queries
            later = torch.ones(A, k.shape[2], dtype=torch.bool, device=q.device).triu(k.shape[2] - A + 1)
            maps.append(score.masked_fill(later, -torch.inf).softmax(-1).mean(1)[0])  # noqa: B023
            return attend(q, k, v, **options)  # noqa: B023

        with patch.object(F, "scaled_dot_product_attention", watch):
            llama(x)
        side = math.isqrt(policy.model.vision_backbone.featurizer.pos_embed.shape[1])
        heat = torch.stack(maps).mean(0)[:, 1 : 1 + side**2].view(A, side, side).cpu()
        row[0].imshow(shown)
        row[0].set_title(text[:24], fontsize=6)
        for i, axis in enumerate(row[1:]):
            axis.imshow(shown)
            large = F.interpolate(heat[None, i : i + 1], shown.shape[:2], mode="bilinear")[0, 0]
            axis.imshow(large, cmap="inferno", alpha=0.55)
            axis.set_title(f"{i}: {heat[i].sum():.0%} on the picture", fontsize=6)
        for axis in row:
            axis.axis("off")
    figure.tight_layout()
    path = Path(cfg.out) / "attention.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"ok   attention: {path}, one column for each action dimension")
    return 0


CAUSES = {  # of look.py's warnings -> why it matters, what to do
    "frames": ("there is nothing to learn from", "choose another --split"),
    "spread": ("divided by q99 - q01, noise becomes the whole range; a dimension that never moves cannot be learned",
               "if the robot cannot move so, all is well; else find out why it was not recorded"),
    "gripper": ("a policy takes 1 for open and 0 for closed, and does not normalise it",
                "turn and scale it in the dataset's standardise function (oxe.py); fine if this robot starts so"),
    "idle": ("a policy that stood still once sees the same picture again, and stands still for ever",
             "leave steps out in which nothing moves, as LIBERO's no_noops sets do"),
    "episodes": ("they are probably broken off, and may end in the middle of a movement", "leave them out"),
    "control rate": ("a policy can copy what it did last, and each step is too small to tell from noise; "
                     "most of what openvla-7b learned from has 3 to 20 actions a second",
                     "take every n-th frame and add the movements up, or train chunks (finetune_oft.py)"),
    "words": ("what they show is learned as the answer to no words at all", "label them, or leave them out"),
    "records": ("they are skipped", "copy the files again: their checksums or their content are wrong"),
    "pictures": ("training stops there", "copy the files again, or leave these frames out"),
}  # fmt: skip


def check_data(cfg: Config) -> int:
    """data.py's table and pictures, and a verdict on each cause of its warnings."""
    verdict = Verdicts()
    for dataset, weight in open_mixture(cfg.data_root_dir, cfg.data_mix, cfg.split, skip_bad_records=True):
        for cause, wrong, line in look(dataset, weight, cfg.out):
            verdict(not wrong, f"{dataset.name}, {cause}", line, *CAUSES[cause])
    return verdict.failed


def main(command: str, cfg: Config) -> int:
    settings = read_config_file(cfg.training_config) if cfg.training_config else {}
    cfg.data_mix = cfg.data_mix or settings.get("data_mix", "")
    cfg.data_root_dir = cfg.data_root_dir or settings.get("data_root_dir", "")
    if not cfg.data_mix or (isinstance(cfg.data_mix, str) and not cfg.data_root_dir):
        fail("give --data_root_dir DIR and --data_mix NAME, or the --training_config that has them")
    try:
        dtype = sample.pick_dtype(cfg.dtype)
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        if command == "data":
            return check_data(cfg)
        if not cfg.checkpoint:
            fail("give --checkpoint FOLDER")
        dataset = open_mixture(cfg.data_root_dir, cfg.data_mix, cfg.split, skip_bad_records=True)[0][0]
        if not len(dataset):
            fail(f"{dataset.name} has no frames in its {cfg.split} split; choose the other --split")
        policy = sample.load(cfg.checkpoint, dtype, sample.pick_device(cfg.device))
        if not hasattr(policy.model, "generate"):
            fail(f"{cfg.checkpoint} is an OFT policy; check.py looks at token models")
        return COMMANDS[command](policy, dataset, cfg)
    except (ValueError, OSError) as error:
        fail(error)


COMMANDS = dict(policy=check_policy, language=check_language, attention=check_attention, data=check_data)

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in (*COMMANDS, "--help", "-h"):
        fail(f"usage: python check.py {{{'|'.join(COMMANDS)}}} [--option value ...]; --help lists the options")
    argv = sys.argv[1:] if sys.argv[1].startswith("-") else sys.argv[2:]
    sys.exit(1 if main(sys.argv[1], configure(Config, argv)) else 0)
