"""
Stages `actions`, `chunks` and `quantized` of `python -m bench gpu`: how fast a policy answers.

    actions     a token model in bfloat16: model.generate, the engine, drafts all wrong and all right; and beside the
                official classes, if they are given
    chunks      OFT with two images, the robot's state and the L1 head: eager, recorded, compiled and recorded
    quantized   the token model in 8 and 4 bits: the same ways, and memory

Decoding reads all weights of the language model once in each pass. "Read" is the bytes of all passes and of the vision
encoders, over the time of the action, as a share of the speed at which the card copies.

Axes: B robots, S sequence, n tokens of an action, V images, A dimensions of an action, K actions of a chunk.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bench.common import Config, measure_copy, peak_gb, timed
from bench.gpu_common import (
    Stage,
    compile_blocks,
    free_memory,
    official_command,
    random_model,
    random_policy,
    run_stage,
    used_gb,
)
from bench.infer import (
    ALL_RIGHT,
    GENERATE,
    OFFICIAL,
    ONE_BY_ONE,
    Decoder,
    Official,
    Way,
    add_drafts,
    time_ways,
    weight_bytes,
    write_inputs,
)
from bench.inputs import NUM_TOKENS, Input, answer_inputs, make_inputs
from bench.random_weights import fill_random
from model import OpenVLA
from oft import OFT, OFTConfig
from policy import Policy
from speed.engine import Passes, record
from speed.quantize import Int4Linear, Int8Linear, layers_to_quantize, quantize

LIMIT_CHUNK = 0.1  # of the largest number of a chunk: compiled blocks round to bfloat16 at other places


# -----------------------------------------------------------------------------
# Stage `actions`


def run_actions(stage: Stage):
    """Measure the token model in bfloat16."""
    model = random_model(stage.sizes.policy, torch.bfloat16, stage.device)
    policy = random_policy(model)
    inputs = new_inputs(stage, policy)
    stage.run("actions", measure_ways, policy, inputs, "")
    stage.run("parts of an action", measure_parts, policy, inputs)
    stage.run("official", measure_official, policy, inputs)


def new_inputs(stage: Stage, policy: Policy) -> list[Input]:
    """Return random images with an instruction, what model.generate answers to them, and drafts."""
    cfg = Config(inputs=min(stage.sizes.actions, 10))
    inputs = make_inputs(cfg, policy, "random")
    answer_inputs(policy, inputs)
    add_drafts(inputs, policy.norm_stats["random"]["action"])
    return inputs


def measure_ways(stage: Stage, policy: Policy, inputs: list[Input], prefix: str):
    """Write how many actions per second each way to decode gives, and the memory."""
    free_memory()
    ways = time_all(stage, policy, inputs, official=None)
    peak = peak_gb(stage.device)
    copy_speed = measure_copy(policy.device)
    for name, way in ways.items():
        write_way(stage, prefix + name, way, policy.model, copy_speed)
    stage.write(f"{prefix}memory", peak, "GB", "of tensors, at the peak of all these ways together")


def time_all(stage: Stage, policy: Policy, inputs: list[Input], official: Official | None) -> dict[str, Way]:
    """Time each way to decode, in turn."""
    cfg = Config(actions=stage.sizes.actions)
    decoder = Decoder(policy, policy.norm_stats["random"]["action"])
    ways, _ = time_ways(cfg, decoder, official, inputs)
    return ways


def write_way(stage: Stage, name: str, way: Way, model: OpenVLA, copy_speed: float):
    """Write the speed of a way to decode, and how near it comes to the memory's speed."""
    summary = way.summary()
    num_actions = len(way.seconds)
    note = (
        f"median of {num_actions}: {summary['ms']:.1f} ms, 10 % to 90 %: {summary['ms_10']:.1f} to "
        f"{summary['ms_90']:.1f} ms; {way.num_same} have the tokens of model.generate (largest gap of two exchanged "
        f"ids: {way.largest_gap:.3f})"
    )
    stage.write(name, summary["actions_per_s"], "actions/s", note)

    vision = sum(weight.nbytes for weight in [*model.vision_backbone.parameters(), *model.projector.parameters()])
    passes = NUM_TOKENS / summary["tokens_per_pass"]
    num_bytes = vision + passes * weight_bytes(model.language_model)
    speed = num_bytes / (summary["ms"] / 1e3) / 1e9
    note = f"{num_bytes / 1e9:.1f} GB in {passes:.1f} passes: {speed:,.0f} of {copy_speed:,.0f} GB/s"
    stage.write(f"{name}: bytes read", speed / copy_speed, "of the copy speed", note)


@torch.inference_mode()
def measure_parts(stage: Stage, policy: Policy, inputs: list[Input]):
    """Write what one action is made of: passes that are recorded on a GPU, and how fast the memory is."""
    stage.write("copy speed", measure_copy(policy.device), "GB/s", "bytes read and bytes written")
    model = policy.model
    one = inputs[0]
    S = model.cfg.num_patches + one.input_ids.shape[1]
    passes = Passes(model, 1, S, NUM_TOKENS, actions_only=False, records=stage.on_gpu)
    ends = torch.full((1,), S, device=policy.device)
    draft = one.tokens[:, :-1]

    embed = model.embed
    if stage.on_gpu:
        embed = record(model.embed, (one.input_ids, one.pixel_values))
    no_draft = draft[:, :0]
    write_part(stage, "vision encoders and projector", embed, one.input_ids, one.pixel_values)
    inputs_of_prompt = (one.input_ids, one.pixel_values, ends, no_draft)
    write_part(stage, "image and prompt", passes.run, passes.read_prompt, *inputs_of_prompt)
    write_part(stage, "one further token", passes.run, passes.check_draft, ends, draft[:, :1])


def write_part(stage: Stage, name: str, function, *arguments):
    """Write the median time of a call."""
    function(*arguments)  # records it
    seconds = [timed(function, *arguments)[0] for _ in range(stage.sizes.actions)]
    recorded = "recorded" if stage.on_gpu else "not recorded"
    stage.write(f"part: {name}", 1e3 * float(np.median(seconds)), "ms", f"median of {len(seconds)}, {recorded}")


def measure_official(stage: Stage, policy: Policy, inputs: list[Input]):
    """Write the speed of the official classes with the same weights, and of our ways in the same run."""
    if not stage.official:
        stage.skip("official", "give --official and --official_python: docs/benchmarks.md says what they need")
        return
    with tempfile.TemporaryDirectory() as temporary:
        inputs_file = Path(temporary) / "inputs.npz"
        write_inputs(inputs_file, inputs)
        command = official_command(stage, "actions", Path(temporary), str(inputs_file))
        official = Official(command, Path(temporary) / "official.log")
        ways = time_all(stage, policy, inputs, official)

    way = ways[OFFICIAL]
    official_ms = way.summary()["ms"]
    note = (
        f"predict_action, sdpa, the same weights, median of {len(way.seconds)}: {official_ms:.1f} ms; {way.num_same} "
        f"have the tokens of model.generate (largest gap of two exchanged ids: {way.largest_gap:.3f})"
    )
    stage.write("official", way.summary()["actions_per_s"], "actions/s", note)
    for name in (GENERATE, ONE_BY_ONE, ALL_RIGHT):
        ms = ways[name].summary()["ms"]
        stage.write(f"{name}, beside the official code", official_ms / ms, "times as fast", f"{ms:.1f} ms")


# -----------------------------------------------------------------------------
# Stage `chunks`


def run_chunks(stage: Stage):
    """Measure an OFT policy as for LIBERO: chunks of eight actions, two images, a state, the L1 head."""
    vla = random_model(stage.sizes.policy, torch.bfloat16, stage.device)
    with torch.device(stage.device):
        model = OFT(vla, OFTConfig())
    for part in (model.action_head, model.proprio_projector):
        fill_random(part.to(torch.bfloat16))
    model.eval()
    stage.run("chunks", measure_chunks, model)


@torch.inference_mode()
def measure_chunks(stage: Stage, model: OFT):
    """Write the time of a chunk, and check that recorded and compiled ones are the eager one."""
    free_memory()
    prompt = random_policy(model.vla).tokenizer.encode_prompt("pick up the red cube")
    input_ids, lengths = model.insert_placeholders([prompt])
    torch.manual_seed(0)
    size = model.vla.cfg.vision[0].img_size
    channels = model.oft.num_images * 3 * len(model.vla.cfg.vision)
    pixels = torch.randn(1, channels, size, size, device=stage.device).bfloat16()
    state = torch.rand(1, model.oft.proprio_dim, device=stage.device).bfloat16()
    inputs = (input_ids.to(stage.device), lengths.to(stage.device), pixels, state)
    shape = f"{model.oft.action_chunk} actions, {model.oft.num_images} images, {model.oft.proprio_dim} numbers of state"

    expected = model.act(*inputs)
    write_chunk(stage, "a chunk, eager", model.act, inputs, shape)
    stage.write("memory", peak_gb(stage.device), "GB", "of tensors, at the peak")
    if not stage.on_gpu:
        stage.skip("a chunk, recorded", "needs a GPU: a recorded pass is a CUDA graph")
    else:
        recorded = record(model.act, inputs)
        write_chunk(stage, "a chunk, recorded", recorded, inputs, shape)
        check_chunk(stage, "a chunk, recorded = eager", recorded(*inputs), expected)

    compile_blocks(model.vla, stage.compiler)
    compiled = record(model.act, inputs) if stage.on_gpu else model.act
    note = f"{shape}; backend {stage.compiler}"
    if not stage.on_gpu:
        note += "; not recorded"
    write_chunk(stage, "a chunk, compiled and recorded", compiled, inputs, note)
    check_chunk(stage, "a chunk, compiled = eager", compiled(*inputs), expected)


def write_chunk(stage: Stage, name: str, act, inputs: tuple, shape: str):
    """Write the median time from pixels to normalised actions on the CPU."""
    act(*inputs)
    seconds = [timed(to_host, act, inputs)[0] for _ in range(stage.sizes.actions)]
    stage.write(name, 1e3 * float(np.median(seconds)), "ms", f"median of {len(seconds)}; {shape}")


def to_host(act, inputs: tuple) -> Tensor:
    return act(*inputs).cpu()


def check_chunk(stage: Stage, name: str, actions: Tensor, expected: Tensor):
    """Check that two chunks (1, K, A) are the same up to rounding."""
    largest = (actions - expected).abs().max().item()
    size = expected.abs().max().item()
    stage.check(name, largest / size, LIMIT_CHUNK, "of the largest", "largest difference of a normalised action")


# -----------------------------------------------------------------------------
# Stage `quantized`


def run_quantized(stage: Stage):
    """Measure the token model in 4 and in 8 bits."""
    for bits in (4, 8):
        stage.run(f"{bits} bits", measure_bits, bits)


def measure_bits(stage: Stage, bits: int):
    """Write speed and memory of a model whose language model has fewer bits."""
    model = random_model(stage.sizes.policy, torch.bfloat16, stage.device)
    quantize_model(model, bits, stage.sizes.group)
    free_memory()
    policy = random_policy(model)
    inputs = new_inputs(stage, policy)
    weights = [*model.parameters(), *model.buffers()]
    stage.write(f"{bits} bits, weights", sum(weight.nbytes for weight in weights) / 1e9, "GB", group_note(stage, bits))
    if stage.on_gpu:
        stage.write(f"{bits} bits, memory at rest", used_gb(stage.device), "GB", "of tensors, before the first action")
    measure_ways(stage, policy, inputs, f"{bits} bits, ")


def group_note(stage: Stage, bits: int) -> str:
    return f"groups of {stage.sizes.group}" if bits == 4 else "a scale for each output"


def quantize_model(model: OpenVLA, bits: int, group: int):
    """Replace the layers of the language model, one after the other, by their quantized form, in place."""
    for name in layers_to_quantize(model):
        parent, _, child = name.rpartition(".")
        quantized = quantized_layer(model.get_submodule(name), bits, group)
        setattr(model.get_submodule(parent), child, quantized)


def quantized_layer(linear: nn.Linear, bits: int, group: int) -> nn.Module:
    """Return a layer with the weight of `linear` in fewer bits."""
    layer_class = Int8Linear if bits == 8 else Int4Linear
    layer = layer_class(linear, group)
    layer.load_state_dict(quantize(linear.weight.detach(), bits, group), assign=True)
    if bits == 4:
        layer.pack()
    return layer


if __name__ == "__main__":
    run_stage({"actions": run_actions, "chunks": run_chunks, "quantized": run_quantized})
