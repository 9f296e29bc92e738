"""
The same greedy tokens in fewer passes through the model and, on a GPU, without Python between its kernels.

Decoding one token after another reads all weights once a token. Here a draft (the robot's last action: robots move
smoothly) stands in all places from the start, and one pass tells what greedy decoding would write in each place if
what stands before it is right. All up to and including the first difference is settled; the rest of that answer is
the next draft. A draft cannot change the result, only save passes; the worst one takes as many as none.

    draft    d0 d1 d2 d3 d4 d5 d6        pass: [<s>, patches, prompt ... 29871, d0 ... d5] -> answers a0 ... a6
    answer   a0 a1 a2 a3 a4 a5 a6        d0 = a0, d1 = a1, d2 != a2: a0, a1, a2 are settled, a3 ... a6 drafted next

Only rounding differs, as it does between batch sizes: where two logits are nearer than that, either may win.

Speculative decoding https://arxiv.org/abs/2211.17192, Jacobi decoding https://arxiv.org/abs/2305.10427, CUDA graphs
https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.

Axes: B batch, T text tokens, S = patches + T, n tokens of an action, w tokens of a draft in one pass, L keys, D width.
"""

import copy
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import OpenVLA
from tokenizer import NUM_BINS, PAD, VOCAB_SIZE

BUCKET = 16  # recorded passes have fixed shapes: prompts are padded to a multiple of this
LARGE = 2**17  # weights of a layer from which on oneDNN is the faster one


class Engine:
    """
    Decodes as `OpenVLA.generate` does, over the same weights; the model itself stays as it is. On CUDA each kind of
    pass is recorded when its shape comes for the first time, which takes seconds, and kept with its cache: call
    `generate` once with a robot's instruction, and a draft if it will have drafts, before it moves. compile: have
    torch.compile fuse what lies between the products. actions_only: choose among the 256 action ids alone. Off by
    default, as it changes the answer of a model that would write another id: the best action id is written then, and
    the warning of `sample.predict_action` never comes. Raises ValueError for a model with adapters, or an OFT.
    """

    def __init__(self, model: OpenVLA, actions_only: bool = False, compile: bool = False):
        if not isinstance(model, OpenVLA):
            raise ValueError(f"{type(model).__name__} is no token model; an OFT policy answers in one pass as it is")
        if any(hasattr(module, "lora_A") for module in model.modules()):
            raise ValueError("the model has adapters; merge them first: finetune_lora.py --merge RUN --out FOLDER")
        weights = (*model.parameters(), *model.buffers(), *model.unused.values())
        self.model = copy.deepcopy(model, {id(w): w for w in weights})  # modules of its own, the same weights
        self.actions_only, head = actions_only, model.language_model.lm_head.weight
        self.records, self.recorded, self.caches = head.is_cuda, {}, {}  # on CUDA: passes and caches by shape
        if head.device.type == "cpu" and head.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            for layer in self.model.modules():
                if isinstance(layer, nn.Linear) and layer.weight.numel() >= LARGE:
                    layer.forward = partial(multiply, layer)
        if compile:
            towers = (self.model.vision_backbone.featurizer, self.model.vision_backbone.fused_featurizer)
            blocks = [block for vit in filter(None, towers) for block in vit.blocks]
            for block in [*blocks, *self.model.language_model.model.layers]:
                block.compile()  # one block's code serves all of its kind

    @torch.inference_mode()
    def generate(self, input_ids: Tensor, pixel_values: Tensor, n: int, lengths: Tensor | None = None, draft=None):
        """
        input_ids (B, T) padded on the right, lengths (B,) of real tokens (None: all T), draft (B, n) ids or None.
        Returns tokens (B, n) int64 and the number of passes through the language model. Raises ValueError if the
        context is too short or the draft has another shape.
        """
        B, n_patches = len(input_ids), self.model.vision_backbone.featurizer.pos_embed.shape[1]
        limit = self.model.cfg.text.max_position_embeddings
        if draft is not None and draft.shape != (B, n):
            raise ValueError(f"the draft is {tuple(draft.shape)}, wanted {(B, n)}: an action's tokens for each row")
        if (total := n_patches + input_ids.shape[1]) + n > limit:
            raise ValueError(f"prompt too long: {total} tokens with the image and {n} new, of {limit} at most")
        if self.records:
            lengths = input_ids.new_full((B,), input_ids.shape[1]) if lengths is None else lengths
            input_ids = F.pad(input_ids, (0, -input_ids.shape[1] % BUCKET), value=PAD)
        S = n_patches + input_ids.shape[1]
        ends = None if lengths is None else n_patches + lengths
        cache = self.caches.get((B, S, n)) or self.model.language_model.new_cache(B, S + n)
        if self.records:
            self.caches[B, S, n] = cache
        if draft is None:
            return self.run(("greedy", B, S, n), partial(self.greedy, cache, S, n), input_ids, pixel_values, ends), n
        draft = draft.to(input_ids.device).clamp(0, self.model.cfg.text.vocab_size - 1)  # what is no id is no guess
        first, new = partial(self.first, cache, S), self.records and ("first", B, S, n) not in self.recorded
        said, passes = self.run(("first", B, S, n), first, input_ids, pixel_values, ends, draft[:, :-1]), 1
        if new:  # record the other kind at once, not when the robot moves
            self.run(("again", B, S, n), partial(self.again, cache, S, 0), ends, draft[:, :-1])
        while (settled := agreed(draft, said)) < n:
            draft, passes = said, passes + 1
            start = 0 if self.records else settled - 1  # one recorded pass does for all
            said = self.run(("again", B, S, n), partial(self.again, cache, S, start), ends, draft[:, start:-1])
            said = torch.cat([draft[:, : start + 1], said], dim=1)
        return said, passes

    def run(self, kind: tuple, fn, *inputs) -> Tensor:
        if not self.records:
            return fn(*inputs)
        with torch.cuda.device_of(inputs[-1]):
            if kind not in self.recorded:
                self.recorded[kind] = record(fn, inputs)
            return self.recorded[kind](*inputs)

    # Passes. `cache` has room for S + n tokens; the action's stand from place S on, whatever the prompt's length

    def first(self, cache, S: int, input_ids: Tensor, pixel_values: Tensor, ends: Tensor | None, draft: Tensor):
        """Picture, prompt and the first w tokens of a draft, (B, w) -> the answers 0 ... w, (B, w + 1)."""
        llama, w = self.model.language_model, draft.shape[1]
        x = torch.cat([self.model.embed(input_ids, pixel_values), llama.model.embed_tokens(draft)], dim=1)
        if ends is None:
            hidden = llama(x, cache=cache)[:, S - 1 :]
        else:
            mask, positions = layout(S, 0, S + w, ends)
            hidden = llama(x, mask, positions, cache)  # (B, S + w, D)
            last = hidden[torch.arange(len(x), device=x.device), ends - 1, None]  # (B, 1, D), of the prompt
            hidden = torch.cat([last, hidden[:, S:]], dim=1)
        return self.choose(hidden)

    def again(self, cache, S: int, start: int, ends: Tensor | None, draft: Tensor) -> Tensor:
        """The tokens start, start + 1, ... of a draft, (B, w) -> the answers that follow each of them, (B, w)."""
        llama, w = self.model.language_model, draft.shape[1]
        mask, positions = layout(S, S + start, w, draft.new_full((1,), S) if ends is None else ends)
        mask = None if ends is None and w == 1 else mask
        return self.choose(llama(llama.model.embed_tokens(draft), mask, positions, cache, S + start))

    def greedy(self, cache, S: int, n: int, input_ids: Tensor, pixel_values: Tensor, ends: Tensor | None) -> Tensor:
        """One token after another, (B, n). Nothing on the way waits for the GPU."""
        tokens = [self.first(cache, S, input_ids, pixel_values, ends, input_ids[:, :0])]
        for i in range(n - 1):
            tokens.append(self.again(cache, S, i, ends, tokens[-1]))
        return torch.cat(tokens, dim=1)

    def choose(self, hidden: Tensor) -> Tensor:
        head, low = self.model.language_model.lm_head, VOCAB_SIZE - NUM_BINS
        if self.actions_only:
            return F.linear(hidden, head.weight[low:VOCAB_SIZE]).argmax(-1) + low
        return head(hidden).argmax(-1)


def layout(S: int, start: int, w: int, ends: Tensor) -> tuple[Tensor, Tensor]:
    """
    For queries at places start ... start + w - 1: the keys that each sees, (B, 1, w, L), no later ones and not the
    padding between the prompt's end (B,) and S; and their positions (B, w), which do not count that padding.
    """
    keys = torch.arange(start + w, device=ends.device)
    real = (keys < ends[:, None]) | (keys >= S)  # (B, L)
    mask = real[:, None] & (keys <= keys[start:, None])  # (B, w, L)
    positions = torch.where(keys < S, keys, ends[:, None] + keys - S)[:, start:]
    return mask[:, None], positions


def multiply(layer: nn.Linear, x: Tensor) -> Tensor:
    """nn.Linear in float32 by oneDNN; PyTorch itself takes MKL, which is half as fast on an AMD CPU."""
    return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "none", [], "")


def agreed(draft: Tensor, said: Tensor) -> int:
    """How many tokens are settled in every row (of (B, n)): those drafted rightly from the start, and one more."""
    right = (draft == said)[:, :-1].int().cumprod(dim=1).sum(dim=1)  # (B,)
    return int(right.min()) + 1


def record(fn, inputs: tuple):
    """A CUDA graph of fn(*inputs), as a function of inputs of the same shapes."""
    fixed, stream = [x.clone() for x in inputs], torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, chooses kernels, takes the memory they want
            fn(*fixed)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph(), stream=stream):
        out = fn(*fixed)

    def replay(*inputs: Tensor) -> Tensor:
        for place, x in zip(fixed, inputs, strict=True):
            place.copy_(x)
        graph.replay()
        return out.clone()

    return replay
