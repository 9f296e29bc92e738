"""
The model card of a checkpoint: the README.md that its page on the Hugging Face hub shows.

    card = write_card(checkpoint, name="me/my-policy", base="openvla/openvla-7b", facts=[...])

It says what the policy answers, which statistics it has, how it was trained and how to load it. All of it is read from
the folder; what the folder does not say is left out.
"""

import json
import math
from pathlib import Path

from checkpoint import Checkpoint
from files import read_json_object, read_text
from hub import parse_hub_name

SETTINGS = ("data_mix", "batch_size", "lr", "schedule", "image_aug", "action_chunk", "lora_rank", "head", "seed")
METRICS = ("step", "loss", "action_accuracy", "l1_loss", "val/loss", "val/action_accuracy", "val/l1_loss")
THIS_CODE = "OpenVLA from scratch"


def write_card(checkpoint: Checkpoint, name: str, base: str, facts: list[str]) -> str:
    """
    Return the text of README.md. name: owner/name of the repository. base: the hub's name of the checkpoint that it was
    trained from, or "". facts: lines about the folder, as `convert_weights.py check` prints them.
    """
    sections = [
        front_matter(base),
        f"# {name.split('/')[-1]}\n\n{summary(checkpoint, base)}",
        "## What is in it\n\n" + "\n".join(f"- {fact}" for fact in facts),
        "## Statistics\n\n" + statistics_table(checkpoint.norm_stats),
        training_section(checkpoint.folder),
        loading_section(checkpoint, name, base),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def front_matter(base: str) -> str:
    """Return the lines that the hub reads: what kind of model this is, and what it was trained from."""
    lines = ["---", "pipeline_tag: robotics", "tags:", "- robotics", "- vision-language-action", "- openvla"]
    if base:
        lines.append(f"base_model: {parse_hub_name(base).name}")
    return "\n".join([*lines, "---"])


def summary(checkpoint: Checkpoint, base: str) -> str:
    """Return a sentence on what the policy is."""
    kind = "An OpenVLA policy"
    if checkpoint.is_oft:
        kind = "An OpenVLA-OFT policy, which answers with chunks of actions"
    if checkpoint.adapter:
        kind += f", as LoRA adapters{f' for {base}' if base else ''}"
    return f"{kind}: images and an instruction in, robot actions out."


def statistics_table(norm_stats: dict) -> str:
    """Return a table of the datasets whose statistics give actions their units."""
    rows = ["| unnorm_key | action dimensions | transitions | trajectories |", "|---|---|---|---|"]
    for key, entry in norm_stats.items():
        numbers = [entry.get(name, "unknown") for name in ("num_transitions", "num_trajectories")]
        rows.append(f"| `{key}` | {len(entry['action']['q01'])} | {numbers[0]} | {numbers[1]} |")
    return "\n".join(rows)


def training_section(folder: Path) -> str:
    """Return the settings and the last metrics of the run that wrote a folder, or "" without a record of it."""
    lines = []
    settings = read_settings(folder)
    for key in SETTINGS:
        if settings.get(key) not in (None, "") and len(str(settings[key])) < 100:
            lines.append(f"- {key}: `{settings[key]}`")
    metrics = read_last_metrics(folder)
    for key in METRICS:
        if key in metrics:
            lines.append(f"- {key}, at the end: {metrics[key]:.4g}")
    return "## Training\n\n" + "\n".join(lines) if lines else ""


def read_settings(folder: Path) -> dict:
    """Return the options of the run that wrote a folder: those of its last step, or {}. Raises ValueError."""
    records = sorted(
        [*folder.glob("checkpoints/step-*/train.json"), *folder.parent.glob("checkpoints/step-*/train.json")]
    )
    if not records:
        return {}
    settings = read_json_object(records[-1]).get("config")
    return settings if isinstance(settings, dict) else {}


def read_last_metrics(folder: Path) -> dict[str, float]:
    """Return the numbers of the last line of the run's metrics.jsonl, or {}."""
    for path in (folder / "metrics.jsonl", folder.parent / "metrics.jsonl"):
        if path.is_file():
            lines = read_text(path).splitlines()
            return numbers_of(lines[-1]) if lines else {}
    return {}


def numbers_of(line: str) -> dict[str, float]:
    """Return the numbers of a line of metrics.jsonl; {} for a line that a kill has cut off."""
    try:
        metrics = json.loads(line)
    except ValueError:
        return {}
    if not isinstance(metrics, dict):
        return {}
    return {key: value for key, value in metrics.items() if isinstance(value, int | float) and math.isfinite(value)}


def loading_section(checkpoint: Checkpoint, name: str, base: str) -> str:
    """Return how to load the folder with this code and, where they read it, with the official classes."""
    key = next(iter(checkpoint.norm_stats), "")
    script = f"""## How to load it

With {THIS_CODE}:

    pip install huggingface_hub
    python sample.py --checkpoint {name} --image camera.jpg --instruction "pick up the cup" --unnorm_key {key}
"""
    # The official OpenVLA knows neither the parts that OFT adds nor FAST's tokens: it would answer something else.
    answers_in_bins = not checkpoint.is_oft and not checkpoint.fast
    if checkpoint.adapter and base and answers_in_bins:
        repository = parse_hub_name(base)
        lines = (
            "",
            "With the official classes and PEFT, in an environment of github.com/openvla/openvla:",
            "",
            "```python",
            "from peft import PeftModel",
            "from transformers import AutoModelForVision2Seq",
            "",
            f'model = AutoModelForVision2Seq.from_pretrained("{repository.name}", trust_remote_code=True)',
            f'model = PeftModel.from_pretrained(model, "{name}")',
            "```",
        )
        script += "\n".join(lines)
    elif not checkpoint.adapter and not checkpoint.quantization and answers_in_bins:
        lines = (
            "",
            "With the official classes, in an environment of github.com/openvla/openvla (this repository has no code):",
            "",
            "```python",
            "from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig",
            "from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction",
            "from transformers import AutoConfig, AutoModelForVision2Seq",
            "",
            'AutoConfig.register("openvla", OpenVLAConfig)',
            "AutoModelForVision2Seq.register(OpenVLAConfig, OpenVLAForActionPrediction)",
            f'model = AutoModelForVision2Seq.from_pretrained("{name}")',
            "```",
        )
        script += "\n".join(lines)
    return script.strip()
