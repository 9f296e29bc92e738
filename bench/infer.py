"""
`python -m bench infer`: seconds from an image to an action, where they go, and beside the official classes.

    model.generate          one token after another, model.py alone
    one by one              the same with speed/engine.py
    drafted                 the engine, with the answer of the step before as draft (with --trajectories)
    drafted, all wrong      the engine, with the worst and with the best draft (without)
    drafted, all right
    official                OpenVLAForActionPrediction.predict_action, in a process of its own (with --vs official)

Every way to decode is timed on each input in turn, so that whatever else the machine does meets all of them alike.

Axes: T text tokens, S sequence, D width of Llama, V vocabulary.
"""

import json
import subprocess
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.common import Config, measure_copy, peak_gb, report, resident_mb, timed, write_random_checkpoint
from bench.inputs import NUM_TOKENS, Input, answer_inputs, make_inputs, to_tokens
from metrics import import_pyplot
from model import Llama
from normalize import normalize, unnormalize
from policy import Policy, action_stats, load_policy, pick_device, prepare_image
from speed.engine import Engine
from tokenizer import VOCAB_SIZE, decode_action

# Names of the ways to decode, in the order in which they are drawn
OFFICIAL = "official"
GENERATE = "model.generate"
ONE_BY_ONE = "one by one"
DRAFTED = "drafted"
ALL_WRONG = "drafted, all wrong"
ALL_RIGHT = "drafted, all right"
WAYS = (OFFICIAL, GENERATE, ONE_BY_ONE, DRAFTED, ALL_WRONG, ALL_RIGHT)

STAGE_INPUTS = 20  # on which the stages of an action are timed, twice


@dataclass
class Way:
    """What was measured of one way to decode."""

    seconds: list[float] = field(default_factory=list)  # of each action
    passes: int = 0  # through the language model; 0: not known
    num_same: int = 0  # actions with the tokens of model.generate
    largest_gap: float = 0.0  # of the logits of two tokens, where an action has another one

    def add(self, seconds: float, passes: int, tokens: Tensor, one: Input):
        """Count an action, and compare its tokens (1, NUM_TOKENS) with those of model.generate."""
        self.seconds.append(seconds)
        self.passes += passes
        different = (tokens != one.tokens)[0].nonzero().flatten().tolist()
        if not different:
            self.num_same += 1
            return
        first = different[0]  # the tokens after it follow from it
        logits = one.logits[0, first]  # (V,)
        gap = logits[one.tokens[0, first]].item() - logits[tokens[0, first]].item()
        self.largest_gap = max(self.largest_gap, gap)

    def summary(self) -> dict:
        low, median, high = (1e3 * np.quantile(self.seconds, (0.1, 0.5, 0.9))).tolist()
        num_actions = len(self.seconds)
        return {
            "ms": median,
            "ms_10": low,
            "ms_90": high,
            "actions_per_s": 1e3 / median,
            "same_action": self.num_same / num_actions,
            "largest_logit_gap": float(self.largest_gap),
            "tokens_per_pass": NUM_TOKENS * num_actions / self.passes if self.passes else 1.0,
        }


# -----------------------------------------------------------------------------
# The whole benchmark


def bench_infer(cfg: Config):
    """Time all ways to decode, print the table, append the JSON line to --log and draw --plot."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(cfg.checkpoint or Path(temporary) / "random")
        if not cfg.checkpoint:
            write_random_checkpoint(folder, cfg.shape)
        rows = infer(cfg, folder, Path(temporary))
    report(rows)

    if cfg.log:
        label = cfg.label or f"{rows['checkpoint']}, {cfg.dtype}"
        with open(cfg.log, "a") as file:
            file.write(json.dumps({**rows, "label": label}) + "\n")
    if cfg.plot:
        runs = [rows]
        if cfg.log:
            runs = [json.loads(line) for line in Path(cfg.log).read_text().splitlines()]
        plot(runs, cfg.plot)


def infer(cfg: Config, folder: Path, temporary: Path) -> dict:
    """Measure a checkpoint folder, print the table of its ways to decode, and return the rows of the report."""
    device = pick_device(cfg.device)
    policy = load_policy(folder, getattr(torch, cfg.dtype), device)
    unnorm_key = cfg.unnorm_key or next(iter(policy.norm_stats))
    stats = action_stats(policy.norm_stats, unnorm_key, str(folder))

    inputs = make_inputs(cfg, policy, unnorm_key)
    answer_inputs(policy, inputs)
    add_drafts(inputs, stats)
    decoder = Decoder(policy, stats)
    official = start_official(cfg, folder, inputs, device, temporary) if cfg.vs == "official" else None
    ways, growth_mb = time_ways(cfg, decoder, official, inputs)

    summaries = {name: way.summary() for name, way in ways.items()}
    if official:
        for summary in summaries.values():
            summary["official_over_this"] = summaries[OFFICIAL]["ms"] / summary["ms"]
    print_ways(summaries)
    return {
        "checkpoint": cfg.checkpoint or cfg.shape,
        "dtype": cfg.dtype,
        "device": device,
        "actions": cfg.actions,
        "parameters_m": sum(p.numel() for p in policy.model.parameters()) / 1e6,
        **time_stages(policy, inputs, stats),
        "memory_growth_mb": growth_mb,
        "peak_gb": peak_gb(device),
        "ways": summaries,
    }


def print_ways(summaries: dict[str, dict]):
    """Print a table with a line for each way to decode."""
    columns = next(iter(summaries.values()))
    print(f"{'':20s}" + "".join(f"{column:>19s}" for column in columns))
    for name, summary in summaries.items():
        print(f"{name:20s}" + "".join(f"{value:19.3f}" for value in summary.values()))


# -----------------------------------------------------------------------------
# Ways to decode


def add_drafts(inputs: list[Input], stats: dict):
    """Give each input the drafts that the engine is timed with."""
    no_motion = to_tokens(normalize(np.zeros(NUM_TOKENS), stats))  # before the first answer, as in policy.py
    for one in inputs:
        one.drafts = {
            DRAFTED: one.previous.tokens if one.previous else no_motion,
            ALL_WRONG: (one.tokens + VOCAB_SIZE // 2) % VOCAB_SIZE,
            ALL_RIGHT: one.tokens,
        }


class Decoder:
    """All that one action takes from the prepared image on: tokens, and the action in units."""

    def __init__(self, policy: Policy, stats: dict):
        self.model = policy.model
        self.engine = Engine(policy.model)
        self.stats = stats

    def act(self, name: str, one: Input) -> tuple[Tensor, int]:
        """Return the tokens (1, NUM_TOKENS), and the number of passes through the language model."""
        if name == GENERATE:
            tokens, _ = self.model.generate(one.input_ids, one.pixel_values, NUM_TOKENS)
            passes = NUM_TOKENS
        else:
            draft = one.drafts.get(name)  # None for one by one
            tokens, passes = self.engine.generate(one.input_ids, one.pixel_values, NUM_TOKENS, draft=draft)
        to_units(tokens, self.stats)
        return tokens, passes


def to_units(tokens: Tensor, stats: dict) -> np.ndarray:
    """Tokens (1, NUM_TOKENS) -> the action in metres and radians."""
    return unnormalize(decode_action(tokens.cpu().numpy()), stats)


def start_official(cfg: Config, folder: Path, inputs: list[Input], device: str, temporary: Path) -> "Official":
    """Start bench/official.py with a checkpoint folder, in the virtual environment of --official_python."""
    write_inputs(temporary / "inputs.npz", inputs)
    command = [cfg.official_python, str(Path(__file__).with_name("official.py"))]
    command += [str(Path(cfg.official).resolve()), str(folder.resolve()), str(temporary / "inputs.npz")]
    command += [cfg.dtype, device]
    return Official(command, temporary / "official.log")


def write_inputs(path: Path, inputs: list[Input]):
    """Write ids and pixels of all inputs to a .npz file."""
    arrays = {}
    for i, one in enumerate(inputs):
        arrays[f"ids{i}"] = one.input_ids[0].cpu().numpy()
        arrays[f"pixels{i}"] = one.pixel_values[0].float().cpu().numpy()
    np.savez(path, **arrays)


class Official:
    """A process of another virtual environment that runs the official model, see `answer` of bench/official.py."""

    def __init__(self, command: list[str], log: Path):
        self.log = open(log, "w+")
        # It ends when its stdin is closed, which is at the latest when this process ends.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        self.read()

    def act(self, i: int) -> tuple[float, Tensor]:
        """Return the seconds that input i took, and its tokens (1, NUM_TOKENS)."""
        print(i, file=self.process.stdin, flush=True)
        answer = self.read()
        return answer["seconds"], torch.tensor([answer["tokens"]])

    def read(self) -> dict:
        """Return the next line of JSON. Raises ValueError with the end of its log if it has stopped."""
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self.log.seek(0)
        raise ValueError(f"the official code stopped:\n{self.log.read()[-2000:]}")


def time_ways(
    cfg: Config, decoder: Decoder, official: Official | None, inputs: list[Input]
) -> tuple[dict[str, Way], float]:
    """Time cfg.actions actions in every way. Returns the ways, and by how many MB the memory grew meanwhile."""
    names = [GENERATE, ONE_BY_ONE]
    names += [DRAFTED] if cfg.trajectories else [ALL_WRONG, ALL_RIGHT]
    ways = {name: Way() for name in names}
    if official:
        ways[OFFICIAL] = Way()

    # Warm up.
    for name in names * 2:
        decoder.act(name, inputs[0])
    if official:
        official.act(0)

    for k in range(cfg.actions):
        i = k % len(inputs)
        one = inputs[i]
        for j in range(len(names)):
            name = names[(j + k) % len(names)]  # each is the first in turn
            seconds, (tokens, passes) = timed(decoder.act, name, one)
            ways[name].add(seconds, passes, tokens, one)
        if official:
            seconds, tokens = official.act(i)
            ways[OFFICIAL].add(seconds, 0, tokens.to(one.tokens.device), one)
        if k == cfg.actions // 10:
            before_mb = resident_mb()  # by now all that is made once has been made
    return ways, resident_mb() - before_mb


# -----------------------------------------------------------------------------
# Stages: where the time of one action goes


@torch.inference_mode()
def time_stages(policy: Policy, inputs: list[Input], stats: dict) -> dict:
    """Return the medians of what one action is made of, in ms, and how near decoding comes to the memory's speed."""
    model = policy.model
    llama = model.language_model
    seconds = defaultdict(list)

    def measure(stage: str, function, *arguments):
        spent, result = timed(function, *arguments)
        seconds[stage].append(spent)
        return result

    for one in inputs[:STAGE_INPUTS] * 2:
        measure("image", preprocess, policy, one.image)
        measure("vision encoders", model.vision_backbone, one.pixel_values)

        embedded = model.embed(one.input_ids, one.pixel_values)  # (1, S, D)
        S = embedded.shape[1]
        cache = llama.new_cache(1, S + NUM_TOKENS)
        measure("prompt", run_prompt, llama, embedded, cache)

        token = llama.model.embed_tokens(one.tokens[:, :1])  # (1, 1, D)
        measure("one token", run_token, llama, token, cache, S)
        measure("to units", to_units, one.tokens, stats)

    rows = {f"{stage}, ms": 1e3 * float(np.median(spent)) for stage, spent in seconds.items()}
    bytes_per_token = weight_bytes(llama)
    decode_speed = bytes_per_token / rows["one token, ms"] / 1e6
    copy_speed = measure_copy(policy.device)
    return {
        **rows,
        "decode, GB/s": decode_speed,
        "copy, GB/s": copy_speed,
        "decode, share of copy": decode_speed / copy_speed,
    }


def preprocess(policy: Policy, image: np.ndarray) -> Tensor:
    prepared = torch.from_numpy(prepare_image(policy, image)[None])  # (1, H, W, 3)
    return policy.processor.normalize(prepared)


def run_prompt(llama: Llama, embedded: Tensor, cache: list) -> Tensor:
    return llama(embedded, cache=cache)


def run_token(llama: Llama, token: Tensor, cache: list, start: int) -> Tensor:
    hidden = llama(token, cache=cache, start=start)
    return llama.lm_head(hidden).argmax(-1)


def weight_bytes(llama: Llama) -> int:
    """Return the bytes of the weights that each further token reads."""
    weights = [*llama.model.layers.parameters(), *llama.model.layers.buffers(), llama.lm_head.weight]
    return sum(weight.nbytes for weight in weights)


# -----------------------------------------------------------------------------
# Plot


def plot(runs: list[dict], path: str):
    """Draw bars of milliseconds per action, a group for each run, a colour for each way to decode."""
    plt = import_pyplot()
    measured = {name for run in runs for name in run["ways"]}
    names = [name for name in WAYS if name in measured]
    figure, axes = plt.subplots(1, len(runs), figsize=(2.6 * len(runs) + 1, 3.2), squeeze=False)
    bars = {}  # name -> one of its bars, for the legend
    for axis, run in zip(axes[0], runs, strict=True):
        names_here = [name for name in names if name in run["ways"]]
        for x, name in enumerate(names_here):
            ms = run["ways"][name]["ms"]
            bars[name] = axis.bar(x, ms, color=f"C{names.index(name)}")
            text = f"{ms:,.0f}" if ms >= 10 else f"{ms:.1f}"
            axis.text(x, ms, text, ha="center", va="bottom", fontsize=8)
        axis.margins(y=0.1)
        axis.set_title(run.get("label", ""), fontsize=9)
        axis.set_xticks([])
    axes[0][0].set_ylabel("ms per action (median)")
    figure.legend(bars.values(), bars.keys(), loc="lower center", ncols=len(bars), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path, dpi=110, bbox_inches="tight")  # the legend may be wider than the figure
