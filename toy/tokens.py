"""
Three ways to answer, learned from the same demonstrations in the same number of steps: bins, FAST tokens, OFT.

    python quickstart.py && python -m toy.tokens

The model of quickstart.py learns to answer with one action as seven tokens (bins), with eight actions as a few tokens
(FAST, fast.py), and with eight actions in one pass (OFT, oft.py). Prints a table of success and speed, and how often
FAST would have derailed if nothing held it. Draws one chunk to runs/toy_tokens/chunk.png.

Axes: n questions, K actions of a chunk, A dimensions of an action.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from configurator import configure, fail
from fast import FAST, ChunkDecoder
from files import atomic_write, write_json
from fit_fast import normalized_chunks
from formats.rlds import RLDS
from metrics import import_pyplot, wilson
from model import GreedyDecoder
from policy import Policy, load_policy, prepare_inputs
from quickstart import run
from tokenizer import EOS, VOCAB_SIZE
from toy import world
from toy.chunks import latency
from toy.play import play

OUT = Path("runs/toy_tokens")

# The ways: their titles, and what trains them
TITLES = {"bins": "bins: one action", "fast": "FAST: eight actions", "oft": "OFT: eight actions"}
COMMANDS = {
    "bins": "python finetune_lora.py --config toy_fast.py --action_tokenizer bins --action_chunk 1",
    "fast": "python finetune_lora.py --config toy_fast.py",
    "oft": "python finetune_oft.py --config toy_oft.py",
}
LOOK_AGAIN = 4  # actions of a chunk after which it is also asked again


@dataclass
class Config:
    episodes: int = 8000  # demonstrations
    max_steps: int = 3000  # training steps of each way
    scenes: int = 200  # unseen scenes of each evaluation
    times: int = 50  # answers whose time is taken


def main(cfg: Config):
    if not Path("runs/toy/checkpoint").is_dir():
        fail("runs/toy/checkpoint: no toy model there; `python quickstart.py` trains it")

    # 1. Demonstrations without disturbances, that go on after success: no chunk crosses the end of an episode.
    demonstrations = f"--name toy_chunks --folder {OUT}/data --episodes {cfg.episodes}"
    run(f"python -m toy.world {demonstrations} --noise 0 --detour 0 --linger 7 --validation 0")

    # 2. Training.
    for name, command in COMMANDS.items():
        run(f"{command} --data_root_dir {OUT}/data --run_dir {OUT}/{name} --max_steps {cfg.max_steps}")

    # 3. Success and speed.
    rows = []
    for name in COMMANDS:
        rows += measure(name, cfg)
    print()
    print(f"{'':20s} {'carried out':>11s}  {'success (95 % interval)':26s} {'tokens':>6s} {'ms':>6s} {'actions/s':>9s}")
    for row in rows:
        print(format_row(row))
    write_json(OUT / "table.json", rows)

    # 4. What holds it, and what a chunk looks like.
    policy = load_policy(OUT / "fast")
    print()
    print_derailed(policy, cfg.scenes)
    chunks = normalized_chunks(RLDS(OUT / "data", "toy_chunks", action_chunk=8), 8, 0.0, most=2000)
    draw_chunk(OUT / "chunk.png", policy.fast, most_tokens(policy.fast, chunks))
    print(f"{OUT / 'chunk.png'}: actions, coefficients and tokens of one chunk")


# -----------------------------------------------------------------------------
# The table


def measure(name: str, cfg: Config) -> list[dict]:
    """Return the rows of one way: of a chunk all actions carried out, and some of them."""
    policy = load_policy(OUT / name)
    seconds = latency(policy, cfg.times)
    rows = []
    for carried_out in sorted({policy.action_chunk, min(policy.action_chunk, LOOK_AGAIN)}, reverse=True):
        success = play(policy, cfg.scenes, open_loop=carried_out).success
        low, high = wilson(int(success.sum()), len(success))
        row = {
            "way": TITLES[name],
            "carried_out": carried_out,
            "success": float(success.mean()),
            "low": low,
            "high": high,
            "tokens": tokens_of_an_answer(policy, cfg.scenes),
            "ms": 1e3 * seconds,
            "actions_per_s": carried_out / seconds,
        }
        rows.append(row)
    return rows


def format_row(row: dict) -> str:
    """Return a row as text."""
    success = f"{row['success']:6.1%} ({row['low']:.1%} to {row['high']:.1%})"
    return (
        f"{row['way']:20s} {row['carried_out']:11d}  {success:26s} {row['tokens']:6.1f} {row['ms']:6.1f} "
        f"{row['actions_per_s']:9.0f}"
    )


def tokens_of_an_answer(policy: Policy, scenes: int) -> float:
    """Return how many tokens are generated for one answer, on average; 0 for OFT, which generates none."""
    if policy.is_oft:
        return 0
    if not policy.fast:
        return len(world.expert(world.make_scene(world.TEST, 0, world.STANDARD), 0, world.STANDARD))
    images, instructions = questions(scenes)
    lengths = []
    for image, instruction in zip(images, instructions, strict=True):
        decoder = ChunkDecoder(policy.fast, 1)
        generate(policy, decoder, [image], [instruction])
        lengths.append(len(decoder.steps))
    return float(np.mean(lengths))


def questions(n: int) -> tuple[list[np.ndarray], list[str]]:
    """Return the first images of n unseen scenes, and their instructions."""
    scenes = [world.make_scene(world.TEST, i, world.STANDARD) for i in range(n)]
    images = [world.draw(scene, world.STANDARD) for scene in scenes]
    return images, [scene.instruction(scene.named) for scene in scenes]


def generate(policy: Policy, decoder, images: list[np.ndarray], instructions: list[str]) -> Tensor:
    """Return the tokens (n, w) that the policy generates with a decoder."""
    input_ids, pixel_values, lengths = prepare_inputs(policy, images, instructions, crop=None)
    K, A = policy.fast.time_horizon, policy.fast.action_dim
    return policy.model.generate_with(decoder, input_ids, pixel_values, policy.fast.max_tokens(K, A), lengths)


# -----------------------------------------------------------------------------
# Without a hold


class FreeDecoder(GreedyDecoder):
    """Chooses any token of the vocabulary, as FAST is decoded elsewhere. temperature: as of ChunkDecoder."""

    def __init__(self, temperature: float):
        super().__init__()
        self.temperature = temperature
        self.generator = torch.Generator().manual_seed(0)

    def choose(self, logits: Tensor) -> Tensor:
        if not self.temperature:
            return logits.argmax(-1)
        probabilities = torch.softmax(logits.float() / self.temperature, dim=-1)
        return torch.multinomial(probabilities, 1, generator=self.generator)[:, 0]


def print_derailed(policy: Policy, scenes: int):
    """Print how many answers would be no chunk if every token were allowed, at different temperatures."""
    images, instructions = questions(scenes)
    for temperature in (0.0, 1.0, 1.5):
        rows = generate(policy, FreeDecoder(temperature), images, instructions).tolist()
        derailed = sum(not is_chunk(policy.fast, row) for row in rows)
        print(f"free generation, temperature {temperature:g}: {derailed} of {len(rows)} answers are no chunk")


def is_chunk(fast: FAST, row: list[int]) -> bool:
    """True if the ids of the language model before the end token are a chunk."""
    if EOS not in row:
        return False
    ids = [VOCAB_SIZE - 1 - id for id in row[: row.index(EOS)]]
    try:
        fast.decode(ids)
    except ValueError:
        return False
    return True


# -----------------------------------------------------------------------------
# One chunk


def most_tokens(fast: FAST, chunks: np.ndarray) -> np.ndarray:
    """Return the chunk (K, A) that has the most to show."""
    lengths = [len(fast.encode(chunk)) for chunk in chunks]
    return chunks[int(np.argmax(lengths))]


def draw_chunk(path: Path, fast: FAST, chunk: np.ndarray):
    """Draw a chunk (K, A) in [-1, 1]: its actions and what comes back, its coefficients, and the token of each."""
    plt = import_pyplot()
    K, A = chunk.shape
    ids = fast.encode(chunk)
    codes, _ = fast.quantize(chunk)
    coefficients = codes + fast.min_token  # (K, A)
    begins = [fast.num_coefficients(id) for id in ids]
    token_of = np.repeat(np.arange(len(ids)), begins).reshape(K, A)

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6))
    decoded = fast.decode(ids)
    for i, name in {0: "dx", 1: "dy", 2: "dz", 6: "gripper"}.items():
        (line,) = left.plot(chunk[:, i], label=name)
        left.plot(decoded[:, i], "--", color=line.get_color())
    left.set(title=f"{K} x {A} numbers (dashed: what comes back)", xlabel="step")
    left.legend(fontsize=7)

    most = max(np.abs(coefficients).max(), 1)
    middle.imshow(coefficients, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
    right.imshow(token_of % 10, cmap="tab10", vmin=0, vmax=9, aspect="auto")
    for axis in (middle, right):
        for (row, column), number in np.ndenumerate(coefficients):
            is_dark = axis is middle and abs(number) > most / 2
            axis.text(column, row, number, ha="center", va="center", color="white" if is_dark else "black", fontsize=7)
        axis.set(xlabel="dimension", ylabel="frequency", xticks=range(A), yticks=range(K))
    middle.set_title("cosine transform, rounded")
    right.set_title(f"{len(ids)} tokens, one colour each, row by row")
    figure.tight_layout()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=80, format="png")
    plt.close(figure)


if __name__ == "__main__":
    main(configure(Config))
