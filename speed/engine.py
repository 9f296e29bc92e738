"""
The same greedy tokens in fewer passes through the model and, on a GPU, without Python between its kernels.

    engine = Engine(policy.model)
    tokens, passes = engine.generate(input_ids, pixel_values, 7, draft=tokens_of_the_last_action)

Decoding one token after another reads all weights once for each token. Here a draft fills the places of all tokens
from the start, for example with the robot's last action, because robots move smoothly. One pass then tells for each
place which token greedy decoding would generate there, if the tokens before it are right. All answers up to and
including the first difference are settled. The rest of the answers is the next draft. A draft cannot change the
result, it only saves passes; the worst draft takes as many passes as no draft.

    draft    d0 d1 d2 d3 d4 d5 d6        pass: [<s>, patches, prompt ... 29871, d0 ... d5] -> answers a0 ... a6
    answer   a0 a1 a2 a3 a4 a5 a6        d0 = a0, d1 = a1, d2 != a2: a0, a1, a2 are settled, a3 ... a6 drafted next

Only rounding differs, as it does between batch sizes: if two logits are closer than that, either token may win.

Speculative decoding https://arxiv.org/abs/2211.17192, Jacobi decoding https://arxiv.org/abs/2305.10427, CUDA graphs
https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.

Axes: B batch, T text tokens, S = patches + T, n tokens of an action, w tokens in one pass, L keys, D width.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import OpenVLA
from tokenizer import FIRST_ACTION_ID, PAD, VOCAB_SIZE

PROMPT_MULTIPLE = 16  # recorded passes have fixed shapes: prompts are padded to a multiple of this
MIN_WEIGHTS_ONEDNN = 2**17  # from so many weights in a layer on, oneDNN is the faster one
NOT_FINITE = 0  # in place of a token whose logits are not finite: the id of <unk>, which no model learns to generate


class Engine:
    """
    Generates the tokens of `OpenVLA.generate`, over the same weights; the model itself stays as it is.

    On CUDA each kind of pass is recorded when its shape comes for the first time, which takes seconds. So call
    `generate` once with a robot's instruction before it moves, and with a draft if it will have drafts.

    actions_only: choose among the 256 action ids alone. This changes the answer of a model that would generate another
    id: you get the best action id then, and never the warning of `policy.predict_action`.
    compile: let torch.compile fuse what lies between the matrix products.
    Raises ValueError for a model with adapters, or an OFT policy.
    """

    def __init__(self, model: OpenVLA, actions_only: bool = False, compile: bool = False):
        if not isinstance(model, OpenVLA):
            raise ValueError(f"{type(model).__name__} is no token model; an OFT policy answers in one pass as it is")
        if any(hasattr(module, "lora_A") for module in model.modules()):
            raise ValueError("the model has adapters; merge them first: convert_weights.py merge-lora RUN OUT")
        self.model = copy_modules(model)
        self.actions_only = actions_only

        weight = model.language_model.lm_head.weight
        is_float32_on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
        if is_float32_on_cpu and torch.backends.mkldnn.is_available() and not is_intel_cpu():
            use_onednn(self.model)
        if compile:
            for block in self.model.transformer_blocks():
                block.compile()  # one block's code serves all of its kind

        self.records = weight.is_cuda
        self.recorded: dict[tuple[int, int, int], Passes] = {}  # (B, S, n) -> passes, kept for their recordings

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        n: int,
        lengths: Tensor | None = None,
        draft: Tensor | None = None,
    ) -> tuple[Tensor, int]:
        """
        Return n tokens for each prompt, (B, n) int64, and the number of passes through the language model.

        input_ids: (B, T), padded on the right. lengths: (B,) numbers of real tokens; None: all T.
        draft: (B, n), a guess of the tokens; None: generate one after another.
        Raises ValueError if the context is too short or the draft has another shape.
        """
        B = len(input_ids)
        self.check(input_ids, n, draft)

        if self.records:
            if lengths is None:
                lengths = input_ids.new_full((B,), input_ids.shape[1])
            padding = -input_ids.shape[1] % PROMPT_MULTIPLE
            input_ids = F.pad(input_ids, (0, padding), value=PAD)

        num_patches = self.model.cfg.num_patches
        S = num_patches + input_ids.shape[1]
        ends = None if lengths is None else num_patches + lengths
        passes = self.passes_for(B, S, n)

        if draft is None:
            tokens = passes.run(passes.generate_greedily, input_ids, pixel_values, ends)
            return tokens, n
        last_id = self.model.cfg.text.vocab_size - 1
        draft = draft.to(input_ids.device).clamp(0, last_id)  # a number that is no id would be a wrong guess anyway
        return passes.correct_draft(draft, input_ids, pixel_values, ends)

    def check(self, input_ids: Tensor, n: int, draft: Tensor | None):
        """Raise ValueError if the context is too short or the draft has another shape."""
        B, T = input_ids.shape
        if draft is not None and draft.shape != (B, n):
            raise ValueError(f"the draft is {tuple(draft.shape)}, wanted {(B, n)}: an action's tokens for each row")
        total = self.model.cfg.num_patches + T
        limit = self.model.cfg.text.max_position_embeddings
        if total + n > limit:
            raise ValueError(f"prompt too long: {total} tokens with the image and {n} new, of {limit} at most")

    def passes_for(self, B: int, S: int, n: int) -> "Passes":
        """Return the passes for inputs of one shape: new ones or, with recordings, those of the last time."""
        if not self.records:
            return Passes(self.model, B, S, n, self.actions_only, records=False)
        if (B, S, n) not in self.recorded:
            self.recorded[B, S, n] = Passes(self.model, B, S, n, self.actions_only, records=True)
        return self.recorded[B, S, n]


# -----------------------------------------------------------------------------
# Passes through the model


class Passes:
    """
    The passes for B prompts that take S places with the image, and n tokens each. They share a key/value cache with
    room for S + n tokens. The action's tokens stand from place S on, whatever the prompt's real length.

    ends: (B,) the place behind the last real token of each prompt; None: S, there is no padding.
    """

    def __init__(self, model: OpenVLA, B: int, S: int, n: int, actions_only: bool, records: bool):
        self.model = model
        self.S = S
        self.n = n
        self.actions_only = actions_only
        self.records = records
        self.recordings: dict[str, Callable] = {}  # name of a pass -> its CUDA graph
        self.cache = model.language_model.new_cache(B, S + n)

    def run(self, run_pass: Callable, *inputs: Tensor | None) -> Tensor:
        """Call one of the methods below or, on CUDA, its recording, which is made the first time."""
        if not self.records:
            return run_pass(*inputs)
        name = run_pass.__name__
        with torch.cuda.device_of(inputs[0]):
            if name not in self.recordings:
                self.recordings[name] = record(run_pass, inputs)
            return self.recordings[name](*inputs)

    def correct_draft(
        self, draft: Tensor, input_ids: Tensor, pixel_values: Tensor, ends: Tensor | None
    ) -> tuple[Tensor, int]:
        """Turn a draft (B, n) into the tokens of greedy decoding, (B, n). Returns them and the number of passes."""
        is_first_time = self.records and "read_prompt" not in self.recordings
        answers = self.run(self.read_prompt, input_ids, pixel_values, ends, draft[:, :-1])  # (B, n)
        num_passes = 1
        if is_first_time:
            # Record the other kind of pass at once, not when the robot moves.
            self.run(self.check_draft, ends, draft[:, :-1])

        settled = count_settled(draft, answers)
        while settled < self.n:
            draft = answers
            if self.records:
                start = 0  # one recorded pass, over all tokens, serves for any number of settled ones
                new_answers = self.run(self.check_draft, ends, draft[:, :-1])
            else:
                start = settled - 1
                new_answers = self.answer(start, ends, draft[:, start:-1])
            answers = torch.cat([draft[:, : start + 1], new_answers], dim=1)
            num_passes += 1
            settled = count_settled(draft, answers)
        return answers, num_passes

    def generate_greedily(self, input_ids: Tensor, pixel_values: Tensor, ends: Tensor | None) -> Tensor:
        """Return the tokens (B, n), generated one after another. Nothing on the way waits for the GPU."""
        no_draft = input_ids[:, :0]
        tokens = [self.read_prompt(input_ids, pixel_values, ends, no_draft)]  # n of (B, 1)
        for i in range(self.n - 1):
            tokens.append(self.answer(i, ends, tokens[-1]))
        return torch.cat(tokens, dim=1)

    def read_prompt(self, input_ids: Tensor, pixel_values: Tensor, ends: Tensor | None, draft: Tensor) -> Tensor:
        """Read image, prompt and w tokens of a draft (B, w). Returns the answers 0 ... w, (B, w + 1)."""
        llama = self.model.language_model
        prompt = self.model.embed(input_ids, pixel_values)  # (B, S, D)
        x = torch.cat([prompt, llama.model.embed_tokens(draft)], dim=1)  # (B, S + w, D)
        if ends is None:
            hidden = llama(x, cache=self.cache)
            return self.choose(hidden[:, self.S - 1 :])

        mask, positions = mask_and_positions(self.S, 0, x.shape[1], ends)
        hidden = llama(x, mask, positions, self.cache)  # (B, S + w, D)
        rows = torch.arange(len(x), device=x.device)
        end_of_prompt = hidden[rows, ends - 1, None]  # (B, 1, D)
        return self.choose(torch.cat([end_of_prompt, hidden[:, self.S :]], dim=1))

    def check_draft(self, ends: Tensor | None, draft: Tensor) -> Tensor:
        """Read the tokens 0, 1, ... of a draft again. The same as `answer`, with a fixed start: it can be recorded."""
        return self.answer(0, ends, draft)

    def answer(self, start: int, ends: Tensor | None, tokens: Tensor) -> Tensor:
        """Read the tokens start, start + 1, ... of an action, (B, w). Returns the answer behind each, (B, w)."""
        llama = self.model.language_model
        w = tokens.shape[1]
        is_padded = ends is not None
        if ends is None:
            ends = tokens.new_full((1,), self.S)
        mask, positions = mask_and_positions(self.S, self.S + start, w, ends)
        if not is_padded and w == 1:
            mask = None  # one token after all others sees everything
        hidden = llama(llama.model.embed_tokens(tokens), mask, positions, self.cache, self.S + start)  # (B, w, D)
        return self.choose(hidden)

    def choose(self, hidden: Tensor) -> Tensor:
        """Return the ids with the largest logits, or NOT_FINITE: hidden states (B, w, D) -> (B, w)."""
        head = self.model.language_model.lm_head
        if self.actions_only:
            action_rows = head.weight[FIRST_ACTION_ID:VOCAB_SIZE]
            logits = F.linear(hidden, action_rows)  # (B, w, 256)
            ids = logits.argmax(-1) + FIRST_ACTION_ID
        else:
            logits = head(hidden)  # (B, w, V)
            ids = logits.argmax(-1)
        is_finite = torch.isfinite(logits).all(-1)  # (B, w); nothing here waits for the GPU
        return torch.where(is_finite, ids, NOT_FINITE)


def mask_and_positions(S: int, start: int, w: int, ends: Tensor) -> tuple[Tensor, Tensor]:
    """
    Return for the queries at places start ... start + w - 1 which keys each of them sees, bool (B, 1, w, L), and
    their positions (B, w). A query sees no later key, and not the padding between the prompt's end (B,) and S, which
    the positions do not count either.
    """
    places = torch.arange(start + w, device=ends.device)  # (L,)
    is_real = (places < ends[:, None]) | (places >= S)  # (B, L)
    is_earlier = places <= places[start:, None]  # (w, L)
    mask = is_real[:, None] & is_earlier  # (B, w, L)

    padding = S - ends[:, None]  # (B, 1)
    positions = torch.where(places < S, places, places - padding)  # (B, L)
    return mask[:, None], positions[:, start:]


def count_settled(draft: Tensor, answers: Tensor) -> int:
    """Return how many tokens are settled in every row of (B, n): those drafted right from the start, and one more."""
    is_right = (draft == answers)[:, :-1].int()  # (B, n - 1)
    right_from_start = is_right.cumprod(dim=1).sum(dim=1)  # (B,)
    return int(right_from_start.min()) + 1


def record(run_pass: Callable, inputs: tuple[Tensor, ...]) -> Callable:
    """Record run_pass(*inputs) as a CUDA graph. Returns it as a function of inputs of the same shapes."""
    fixed_inputs = [x.clone() for x in inputs]  # a graph reads always the same memory

    # Run it first, on a stream of its own: this compiles, chooses kernels and takes the memory that they need.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run_pass(*fixed_inputs)
    torch.cuda.current_stream().wait_stream(stream)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        output = run_pass(*fixed_inputs)

    def replay(*inputs: Tensor) -> Tensor:
        for fixed, x in zip(fixed_inputs, inputs, strict=True):
            fixed.copy_(x)
        graph.replay()
        return output.clone()

    return replay


# -----------------------------------------------------------------------------
# The engine's own modules, over the model's weights


def copy_modules(model: OpenVLA) -> OpenVLA:
    """Return a model with modules of its own and the same weights, which take no more memory."""
    weights = [*model.parameters(), *model.buffers(), *model.unused.values()]
    already_copied = {id(weight): weight for weight in weights}
    return copy.deepcopy(model, already_copied)


class OneDNNLinear(nn.Module):
    """
    A linear layer in float32, multiplied by oneDNN, over the same weights as `linear`. PyTorch itself uses MKL, which
    is half as fast on an AMD CPU (and a tenth faster on an Intel one).
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def is_intel_cpu() -> bool:
    """True on Linux with a CPU of Intel, the maker of MKL."""
    path = Path("/proc/cpuinfo")
    return path.exists() and "GenuineIntel" in path.read_text()


def use_onednn(model: OpenVLA):
    """Replace the large linear layers of a model, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child.weight.numel() >= MIN_WEIGHTS_ONEDNN:
                setattr(parent, name, OneDNNLinear(child))
