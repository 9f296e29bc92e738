"""
Stage `checks` of `python -m bench gpu`: is the answer on a GPU the right one?

    the tests that want a GPU              tests/test_engine.py
    recorded passes = the same passes      a CUDA graph gives the tokens that its kernels give one by one
    engine, with and without drafts        gives the tokens of model.generate, for 1,000 random prompts
    layers in 8 bits, 4 bits and NF4       multiply as the float weight that they stand for
    a sharded, recomputed, compiled step   has the gradients and the weights of a plain one

On a CPU (--tiny) the engine runs the same passes, but nothing is recorded.

Axes: B prompts, T text tokens, n tokens of an action, V vocabulary, O outputs and I inputs of a layer.
"""

import subprocess
import sys

import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.tensor import DTensor

from bench.gpu_common import ROOT, Stage, prepare_model, random_model, run_stage
from bench.gpu_lines import FAILED, PASSED
from bench.inputs import NUM_TOKENS
from bench.train_step import random_batch
from speed.engine import PROMPT_MULTIPLE, Engine, Passes
from speed.nf4 import NF4Linear
from speed.quantize import Int4Linear, Int8Linear, quantize
from tokenizer import PAD, VOCAB_SIZE
from train import Config as TrainConfig
from train import build_optimizer

GPU_TESTS = "tests/test_engine.py::test_recording"

# Two ids may change places where their logits are nearly equal. How near, as a share of the logits' spread
LIMIT_GAP = {torch.float32: 1e-3, torch.bfloat16: 0.25}
LIMIT_LAYER = 0.01  # of the norm of the right answer; what is added up is rounded to bfloat16
LIMIT_GRADIENT = 1e-4  # of the norm of all gradients, in float32
LIMIT_UPDATE = 1e-2  # of the norm of the change of all weights: AdamW's first step divides a gradient by itself
PROMPT_LENGTHS = (5, 30)  # tokens
LARGE_BATCH = 20  # prompts
SMALL_BATCH = 2
LAYERS = ((4096, 4096), (11008, 4096), (4096, 11008))  # (O, I) of Llama-2 7B
TINY_LAYERS = ((64, 128), (128, 64))
ROWS = (1, 7, 300)  # a token, an action, a prompt


def check_all(stage: Stage):
    """Run all checks, the ones that other stages lean on first."""
    stage.run("tests that want a GPU", run_gpu_tests)
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        stage.run(f"recorded passes = the same passes, {name}", check_recorded, dtype)
        stage.run(f"engine = model.generate, {name}", check_engine, dtype)
    stage.run("layers in 8 bits", check_layers, "8 bits")
    stage.run("layers in 4 bits", check_layers, "4 bits")
    stage.run("layers in NF4", check_layers, "NF4")
    stage.run("a sharded step", check_step, "sharded")
    stage.run("a sharded, recomputed step", check_step, "sharded, recomputed")
    # Compiling takes longest. If all three agree with a plain step, each of them does.
    stage.run("a sharded, recomputed, compiled step", check_step, "sharded, recomputed, compiled")
    stage.run("a compiled step", check_step, "compiled")


def run_gpu_tests(stage: Stage):
    """Run the tests of tests/ that are skipped without a GPU."""
    name = "tests that want a GPU"
    if not stage.on_gpu:
        stage.skip(name, f"needs a GPU: {GPU_TESTS}")
        return
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", GPU_TESTS]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(run.stdout, run.stderr)
    summary = (run.stdout.strip() or run.stderr.strip() or "it printed nothing").splitlines()[-1]
    has_passed = run.returncode == 0 and " passed" in summary
    stage.write(name, run.returncode, "exit code", f"{GPU_TESTS}: {summary}", PASSED if has_passed else FAILED)


# -----------------------------------------------------------------------------
# The engine


def random_prompts(seed: int, batch: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids (B, T), padded; pixels (B, 6, 224, 224); and the prompts' lengths (B,)."""
    generator = torch.Generator().manual_seed(seed)
    low, high = PROMPT_LENGTHS
    lengths = torch.randint(low, high, (batch,), generator=generator)
    longest = int(lengths.max())
    ids = torch.randint(3, 31000, (batch, longest), generator=generator)
    ids[:, 0] = 1
    ids[torch.arange(longest) >= lengths[:, None]] = PAD
    pixels = torch.randn(batch, 6, 224, 224, generator=generator)
    return ids.to(device), pixels.to(device, dtype), lengths.to(device)


def make_drafts(tokens: Tensor, seed: int) -> dict[str, Tensor]:
    """Return five kinds of drafts for the right tokens (B, n)."""
    generator = torch.Generator().manual_seed(seed)
    wrong = (tokens + VOCAB_SIZE // 2) % VOCAB_SIZE
    is_right = torch.rand(tokens.shape, generator=generator) < 0.7
    return {
        "all right": tokens,
        "all wrong": wrong,
        "partly right": torch.where(is_right.to(tokens.device), tokens, wrong),
        "of another prompt": tokens.roll(1, 0),
        "shuffled": wrong.roll(3, 1),
    }


class Agreement:
    """How often tokens are those of model.generate and, where they are not, how near the two ids were."""

    def __init__(self):
        self.num_prompts = 0
        self.num_same = 0
        self.largest_gap = 0.0  # of two logits, as a share of the spread of all logits

    def add(self, tokens: Tensor, expected: Tensor, logits: Tensor):
        """Count prompts: tokens and expected (B, n), logits (B, n, V)."""
        for row in range(len(tokens)):
            self.num_prompts += 1
            different = (tokens[row] != expected[row]).nonzero().flatten().tolist()
            if not different:
                self.num_same += 1
                continue
            first = different[0]  # the tokens after it follow from it
            at_first = logits[row, first].float()  # (V,)
            gap = at_first[expected[row, first]] - at_first[tokens[row, first]]
            self.largest_gap = max(self.largest_gap, (gap / at_first.std()).item())

    def note(self) -> str:
        return f"{self.num_same} of {self.num_prompts} prompts have the same tokens; the value is of the others"


def check_engine(stage: Stage, dtype: torch.dtype):
    """Compare the engine, whose passes are recorded on a GPU, with model.generate."""
    model = random_model(stage.sizes.checked, dtype, stage.device)
    engine = Engine(model)
    undrafted = Agreement()
    drafted = Agreement()
    batch = min(LARGE_BATCH, stage.sizes.prompts // 5)
    for seed in range(stage.sizes.prompts // batch):
        ids, pixels, lengths = random_prompts(seed, batch, stage.device, dtype)
        expected, logits = model.generate(ids, pixels, NUM_TOKENS, lengths)
        drafts = list(make_drafts(expected, seed).values())
        draft = drafts[seed % len(drafts)]

        tokens, _ = engine.generate(ids, pixels, NUM_TOKENS, lengths)
        undrafted.add(tokens, expected, logits)
        tokens, _ = engine.generate(ids, pixels, NUM_TOKENS, lengths, draft)
        drafted.add(tokens, expected, logits)

    name = str(dtype).removeprefix("torch.")
    unit = "of the logits' spread"
    passes = "recorded passes" if engine.records else "passes, not recorded"
    for kind, agreement in (("one by one", undrafted), ("drafted", drafted)):
        what = f"engine, {kind} = model.generate, {name}"
        note = f"largest gap of two exchanged ids; {passes}; {agreement.note()}"
        stage.check(what, agreement.largest_gap, LIMIT_GAP[dtype], unit, note)


def check_recorded(stage: Stage, dtype: torch.dtype):
    """Compare each kind of recorded pass with the same pass, of the same shapes, started kernel by kernel."""
    name = f"recorded passes = the same passes, {str(dtype).removeprefix('torch.')}"
    if not stage.on_gpu:
        stage.skip(name, "needs a GPU: a recorded pass is a CUDA graph")
        return
    model = random_model(stage.sizes.checked, dtype, stage.device)
    num_tokens = 0
    num_different = 0
    passes = None
    for seed in range(5):
        ids, pixels, lengths = random_prompts(seed, SMALL_BATCH, stage.device, dtype)
        padded = torch.full((SMALL_BATCH, 2 * PROMPT_MULTIPLE), PAD, device=stage.device)
        padded[:, : ids.shape[1]] = ids
        ends = model.cfg.num_patches + lengths
        if passes is None:
            S = model.cfg.num_patches + padded.shape[1]
            passes = [Passes(model, SMALL_BATCH, S, NUM_TOKENS, False, records) for records in (True, False)]

        answers = [run_each_pass(one, padded, pixels, ends) for one in passes]
        recorded, eager = answers
        num_tokens += recorded.numel()
        num_different += (recorded != eager).sum().item()
    stage.check(name, num_different, 0, "tokens that differ", f"{num_tokens} tokens of three kinds of passes")


@torch.inference_mode()
def run_each_pass(passes: Passes, ids: Tensor, pixels: Tensor, ends: Tensor) -> Tensor:
    """Return the answers of all three kinds of passes, side by side."""
    greedy = passes.run(passes.generate_greedily, ids, pixels, ends)  # (B, n)
    draft = greedy.roll(1, 0)[:, :-1]  # (B, n - 1)
    prompt = passes.run(passes.read_prompt, ids, pixels, ends, draft)  # (B, n)
    again = passes.run(passes.check_draft, ends, draft)  # (B, n - 1)
    return torch.cat([greedy, prompt, again], dim=1)


# -----------------------------------------------------------------------------
# Layers in fewer bits


def check_layers(stage: Stage, kind: str):
    """Compare layers in bfloat16 with a product in float64 with the weight that their codes stand for."""
    largest = 0.0
    for outputs, inputs in LAYERS if stage.on_gpu else TINY_LAYERS:
        torch.manual_seed(outputs)
        linear = nn.Linear(inputs, outputs, bias=False, device=stage.device)
        layer, weight = quantized_layer(linear, kind, stage.sizes.group)
        for rows in ROWS:
            x = torch.randn(1, rows, inputs, device=stage.device).bfloat16()
            expected = x.double() @ weight.double().T
            largest = max(largest, relative_error(layer(x).double(), expected))
    note = f"largest error of {', '.join(str(rows) for rows in ROWS)} rows, over the norm of the right answer"
    stage.check(f"layers in {kind} = their float weight", largest, LIMIT_LAYER, "of the norm", note)


def quantized_layer(linear: nn.Linear, kind: str, group: int) -> tuple[nn.Module, Tensor]:
    """Return a layer in few bits, for activations in bfloat16, and the weight (O, I) that its codes stand for."""
    if kind == "NF4":
        layer = NF4Linear(linear)
        return layer, layer.restored(torch.bfloat16)

    bits = 8 if kind == "8 bits" else 4
    layer_class = Int8Linear if bits == 8 else Int4Linear
    parts = quantize(linear.weight.detach(), bits, group)
    layer = layer_class(linear, group)
    layer.load_state_dict(parts, assign=True)
    if bits == 4:
        layer.pack()
    return layer, restore(parts, bits)


def restore(parts: dict[str, Tensor], bits: int) -> Tensor:
    """Return the weight (O, I) float32 that the tensors of `quantize` stand for."""
    codes = parts["weight"]
    scale = parts["scale"].float()
    if bits == 8:
        return codes.float() * scale[:, None]

    pairs = torch.stack([codes >> 4, codes & 15], dim=-1)  # (O, I / 2, 2)
    groups = pairs.flatten(1).float().view(len(codes), scale.shape[1], -1)  # (O, G, group)
    restored = (groups - 8) * scale[..., :1] + scale[..., 1:]
    return restored.flatten(1)


def relative_error(x: Tensor, expected: Tensor) -> float:
    return ((x - expected).norm() / expected.norm()).item()


# -----------------------------------------------------------------------------
# A step of training


def check_step(stage: Stage, way: str):
    """Compare a step in float32 that is sharded, recomputed or compiled, as `way` says, with a plain one."""
    plain = step_result(stage, "plain")
    other = step_result(stage, way)

    gradient_error = joint_error(other["gradients"], plain["gradients"])
    update_error = joint_error(other["updates"], plain["updates"])
    loss_error = abs(other["loss"] / plain["loss"] - 1)
    note = f"difference over all gradients, over their norm; the loss differs by {loss_error:.1e} of itself"
    if "compiled" in way:
        note += f"; backend {stage.compiler}"
    stage.check(f"a {way} step = a plain one, gradients", gradient_error, LIMIT_GRADIENT, "of the norm", note)
    note = "the same of what AdamW has changed in the weights"
    stage.check(f"a {way} step = a plain one, weights", update_error, LIMIT_UPDATE, "of the norm", note)


def step_result(stage: Stage, way: str) -> dict:
    """Return the loss of one step of a random model in float32, its gradients and the changes of its weights."""
    model = random_model(stage.sizes.checked, torch.float32, stage.device)
    before = whole_tensors(dict(model.named_parameters()))
    torch.manual_seed(0)
    batch = random_batch(model, SMALL_BATCH, stage.device)
    prepare_model(
        stage,
        model,
        is_recomputed="recomputed" in way,
        is_compiled="compiled" in way,
        is_sharded="sharded" in way,
        bf16=False,
    )
    optimizer = build_optimizer(model, TrainConfig(lr=1e-4), fused=stage.on_gpu)

    _, loss = model(batch[0], batch[2], batch[1])
    loss.backward()
    gradients = whole_tensors({name: p.grad for name, p in model.named_parameters()})
    optimizer.step()
    after = whole_tensors(dict(model.named_parameters()))
    updates = {name: after[name] - before[name] for name in before}
    return {"loss": loss.item(), "gradients": gradients, "updates": updates}


def whole_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of tensors, of which sharded ones are put together."""
    copies = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        copies[name] = whole.detach().clone()
    return copies


def joint_error(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return |x - expected| / |expected| of all tensors together."""
    if tensors.keys() != expected.keys():
        raise ValueError(f"other weights than expected: {sorted(tensors.keys() ^ expected.keys())[:3]}")
    difference = sum((tensors[name] - expected[name]).norm() ** 2 for name in expected)
    size = sum(expected[name].norm() ** 2 for name in expected)
    return (difference / size).sqrt().item()


if __name__ == "__main__":
    run_stage({"checks": check_all})
