"""
OpenVLA-OFT: the same model answers with a chunk of actions in one forward pass. https://arxiv.org/abs/2502.19645

    V images -> vision encoders -> projector ---.
    robot's state -> proprio_projector ---------+
                                                v
                 [<s>, image and state tokens (B, M, D), prompt ... 29871, n placeholders, </s>]
                                                |
                   Llama, in which every token sees every token (B, S, D)
                                                |
                   hidden states from 29871 to the last placeholder but one (B, n, D)
                                                |
                   action head -> actions (B, K, A)

What differs from OpenVLA:
- The answer is not generated token by token. The sequence has a placeholder for each number of the chunk, and all are
  filled at once: the hidden state one position before a placeholder becomes its number, as with tokens.
- Llama's attention is not causal, so that a placeholder sees the ones after it.
- A placeholder's embedding is zero; with the diffusion head it holds a noisy action, and a time token says how noisy.
- There may be several images, and a token for the robot's state.
- With FiLM, the instruction scales and shifts the features inside the vision encoders.

Parameters are named as in the released components. Follows vla-scripts/finetune.py, prismatic/models/action_heads.py,
projectors.py, film_vit_wrapper.py and prismatic/extern/hf/modeling_prismatic.py of github.com/moojink/openvla-oft.

Axes: B batch, V images, N patches of an image, T text tokens (placeholders included), M image and state tokens,
S = M + T sequence, D width of Llama, K actions of a chunk, A dimensions of an action, n = K * A placeholders,
P dimensions of the robot's state.
"""

import copy
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from checkpoint import COMPONENT_ENDING, OFT_RECORD, Checkpoint, component_files, open_checkpoint, open_pt
from files import atomic_write, read_json, write_json
from lora import default_alpha, load_adapter, lora_update
from model import OpenVLA, is_unused
from normalize import SCHEME, SCHEMES
from progress import no_progress
from tokenizer import BLANK, EOS, PAD, decode_action, pad_sequences

HEADS = ("l1", "diffusion", "discrete")


@dataclass
class OFTConfig:
    """What oft_config.json says. The official folders do not have that file."""

    action_chunk: int = 8  # K: 8 LIBERO, 25 ALOHA, 5 Bridge
    action_dim: int = 7  # A: 7; 14 ALOHA
    proprio_dim: int = 8  # P: 8 LIBERO, 14 ALOHA, 7 Bridge; 0: the model does not get the state
    num_images: int = 2  # V
    head: str = "l1"  # one of HEADS
    film: bool = False  # the instruction modulates both vision encoders
    diffusion_steps: int = 50
    scheme: str = SCHEME  # of actions and state: q01 and q99 become -1 and 1; "bounds" (ALOHA): min and max

    @property
    def num_placeholders(self) -> int:
        """n: one for each number of a chunk."""
        return self.action_chunk * self.action_dim

    @property
    def num_new_tokens(self) -> int:
        """How many tokens there are besides images and prompt: placeholders, </s>, and those of state and time."""
        num_state = 1 if self.proprio_dim else 0
        num_time = 1 if self.head == "diffusion" else 0
        return self.num_placeholders + 1 + num_state + num_time


# -----------------------------------------------------------------------------
# New parts of the network


class ResidualBlock(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x)


class MLPResNet(nn.Module):
    """The hidden states of one action's placeholders, side by side -> that action: (..., A * D) -> (..., A)."""

    def __init__(self, input_dim: int, dim: int, output_dim: int):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(input_dim)
        self.fc1 = nn.Linear(input_dim, dim)
        self.mlp_resnet_blocks = nn.ModuleList(ResidualBlock(dim) for _ in range(2))
        self.layer_norm2 = nn.LayerNorm(dim)
        self.fc2 = nn.Linear(dim, output_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x))


def build_head(cfg: OFTConfig, dim: int) -> nn.ModuleDict:
    """Build the action head, nested as in the official files. It is empty for "discrete": lm_head predicts tokens."""
    if cfg.head == "discrete":
        return nn.ModuleDict()
    mlp = MLPResNet(cfg.action_dim * dim, dim, cfg.action_dim)
    if cfg.head == "diffusion":
        return nn.ModuleDict({"noise_predictor": nn.ModuleDict({"mlp_resnet": mlp})})
    return nn.ModuleDict({"model": mlp})


class Projector(nn.Module):
    """The robot's state (B, P), or noisy actions (B, n, 1), -> Llama's embedding space (B, D) or (B, n, D)."""

    def __init__(self, input_dim: int, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(input_dim, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class FiLMBlock(nn.Module):
    """
    A block of a vision encoder whose features the instruction scales and shifts after attention (feature-wise linear
    modulation): x -> x * (1 + scale(instruction)) + shift(instruction). https://arxiv.org/abs/1709.07871
    """

    def __init__(self, block: nn.Module, vision_dim: int, dim: int):
        super().__init__()
        self.block = block
        self.scale = nn.Linear(dim, vision_dim)
        self.shift = nn.Linear(dim, vision_dim)

    def forward(self, x: Tensor, instruction: Tensor) -> Tensor:
        """Patch features (B, N, Dv) and the mean embedding of the instruction (B, D) -> (B, N, Dv)."""
        block = self.block
        x = x + block.ls1(block.attn(block.norm1(x)))
        scale = in_own_dtype(self.scale, instruction)[:, None]  # (B, 1, Dv): the same for all patches
        shift = in_own_dtype(self.shift, instruction)[:, None]
        x = x * (1 + scale) + shift
        x = x + block.ls2(block.mlp(block.norm2(x)))
        return x


def in_own_dtype(module: nn.Module, x: Tensor) -> Tensor:
    """
    Run a module in the dtype of its own weights, and return the result in the dtype of x. New parts train in float32
    beside a model in bfloat16.
    """
    own_dtype = next(module.parameters()).dtype
    return module(x.to(own_dtype)).to(x.dtype)


# -----------------------------------------------------------------------------
# Diffusion: DDIM, https://arxiv.org/abs/2010.02502, with the squared-cosine schedule of https://arxiv.org/abs/2102.09672
#
# x_0 is a chunk of actions, e is noise, a_t is the share of the signal's variance that is left after noising step t.


def alphas_cumprod(steps: int, device: str | torch.device = "cpu") -> Tensor:
    """
    Return a_t for t = 0 ... steps - 1, (steps,) float32:

        a_t = product of (1 - beta_i) over i = 0 ... t
        beta_i = min(1 - f((i + 1) / steps) / f(i / steps), 0.999)
        f(s) = cos((s + 0.008) / 1.008 * pi / 2)^2
    """

    def f(s: float) -> float:
        return math.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - f((i + 1) / steps) / f(i / steps), 0.999) for i in range(steps)]
    betas = torch.tensor(betas, dtype=torch.float32, device=device)
    return torch.cumprod(1 - betas, dim=0)


def add_noise(x: Tensor, noise: Tensor, t: Tensor, alphas: Tensor) -> Tensor:
    """
    Return actions (B, K, A) as they are after noising step t (B,):

        x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e
    """
    a = alphas[t][:, None, None]  # (B, 1, 1)
    return a.sqrt() * x + (1 - a).sqrt() * noise


def denoise(x: Tensor, noise: Tensor, t: int, stride: int, alphas: Tensor) -> Tensor:
    """
    Go back from step t to step t - stride, given the noise that was predicted in x. No new noise is added:

        x_0 = (x_t - sqrt(1 - a_t) e) / sqrt(a_t), clipped to [-1, 1]
        x_(t - stride) = sqrt(a_(t - stride)) x_0 + sqrt(1 - a_(t - stride)) e

    Before step 0 there is no noise: a is 1.
    """
    a = alphas[t]
    a_before = alphas[t - stride] if t >= stride else torch.ones_like(a)
    clean = (x - (1 - a).sqrt() * noise) / a.sqrt()
    clean = clean.clamp(-1, 1)
    return a_before.sqrt() * clean + (1 - a_before).sqrt() * noise


def time_embedding(t: Tensor, dim: int) -> Tensor:
    """
    Return sin(t w_i), then cos(t w_i), for i = 0 ... dim/2 - 1: steps (B,) -> (B, dim).

        w_i = 10000^(-i / (dim/2 - 1))
    """
    half = dim // 2
    i = torch.arange(half, device=t.device)
    frequencies = torch.exp(i * -math.log(10000) / (half - 1))
    angles = t[:, None] * frequencies  # (B, dim/2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


# -----------------------------------------------------------------------------
# The whole: images, state and instruction -> a chunk of actions


class OFT(nn.Module):
    """
    An OpenVLA with the new parts that make it answer with a chunk of actions. With FiLM, the blocks of its vision
    encoders are wrapped, in place; nothing else in the OpenVLA changes.
    """

    def __init__(self, vla: OpenVLA, cfg: OFTConfig):
        super().__init__()
        dim = vla.cfg.text.hidden_size
        self.vla = vla
        self.oft = cfg
        self.action_head = build_head(cfg, dim)
        self.proprio_projector = Projector(cfg.proprio_dim, dim) if cfg.proprio_dim else None
        self.noisy_action_projector = Projector(1, dim) if cfg.head == "diffusion" else None
        if cfg.film:
            for vit, vit_cfg in zip(vla.vision_backbone.encoders(), vla.cfg.vision, strict=True):
                vit.blocks = nn.ModuleList(FiLMBlock(block, vit_cfg.embed_dim, dim) for block in vit.blocks)

    def random_parts(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """
        Yield the name and the whole first values of each weight of the new parts, drawn as PyTorch draws those of a new
        nn.Linear: evenly between -1 / sqrt(inputs) and 1 / sqrt(inputs).
        """
        generator = torch.Generator().manual_seed(seed)
        for name, module in self.named_modules():
            is_new = not name.startswith("vla.") or is_film(f"{name}.weight")
            if is_new and isinstance(module, nn.Linear):
                bound = module.in_features**-0.5
                for part, weight in module.named_parameters():
                    yield f"{name}.{part}", torch.empty(weight.shape).uniform_(-bound, bound, generator=generator)
            if is_new and isinstance(module, nn.LayerNorm):
                yield f"{name}.weight", torch.ones(module.weight.shape)
                yield f"{name}.bias", torch.zeros(module.bias.shape)

    # Inputs

    def insert_placeholders(self, prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
        """
        Prompts that end in 29871 -> input_ids (B, T) int64 of [prompt, n placeholders, </s>], padded on the right, and
        the lengths (B,) of the prompts. The ids of placeholders are arbitrary: their embeddings are replaced.
        """
        placeholders = [BLANK] * self.oft.num_placeholders
        input_ids, _ = pad_sequences([prompt + placeholders + [EOS] for prompt in prompts], PAD)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        return input_ids, lengths

    def features(
        self, input_ids: Tensor, lengths: Tensor, pixel_values: Tensor, proprio: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        Return all that stays the same from one denoising step to the next:

        text: (B, T, D), the embeddings of input_ids, zero at the placeholders.
        is_placeholder: (B, T) bool.
        image_and_state_tokens: (B, M, D).

        input_ids, lengths: of `insert_placeholders`. pixel_values: (B, V * 3 or V * 6, H, W). proprio: (B, P).
        Raises ValueError if the number of images or the size of the state is not that of the checkpoint.
        """
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)  # (T,)
        starts = lengths[:, None]  # (B, 1): the first placeholder follows the prompt
        is_placeholder = (positions >= starts) & (positions < starts + self.oft.num_placeholders)

        text = self.vla.language_model.model.embed_tokens(input_ids)  # (B, T, D)
        text = text.masked_fill(is_placeholder[..., None], 0)

        condition = []
        if self.oft.film:
            is_text = ~is_placeholder & (input_ids != PAD)
            condition = [mean_embedding(text, is_text)]  # (B, D)
        image_and_state_tokens = self.image_tokens(pixel_values, condition)  # (B, V * N, D)
        if self.proprio_projector is not None:
            state_token = self.state_token(proprio, text.dtype)  # (B, 1, D)
            image_and_state_tokens = torch.cat([image_and_state_tokens, state_token], dim=1)
        return text, is_placeholder, image_and_state_tokens

    def image_tokens(self, pixel_values: Tensor, condition: list[Tensor]) -> Tensor:
        """pixel_values (B, V * 3 or V * 6, H, W) -> (B, V * N, D). condition: of FiLM, or nothing."""
        channels = 3 * len(self.vla.cfg.vision)  # each vision encoder has a normalisation of its own
        images = pixel_values.split(channels, dim=1)  # V of (B, 3 or 6, H, W)
        if len(images) != self.oft.num_images:
            raise ValueError(f"{len(images)} images, this checkpoint wants {self.oft.num_images}")
        patches = [self.vla.vision_backbone(image, *condition) for image in images]  # V of (B, N, D1 + D2)
        return self.vla.projector(torch.cat(patches, dim=1))

    def state_token(self, proprio: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The robot's state (B, P), normalised -> (B, 1, D)."""
        expected = self.oft.proprio_dim
        if proprio is None:
            raise ValueError(f"this checkpoint wants a state of {expected} numbers, got none")
        if proprio.shape[-1] != expected:
            raise ValueError(f"this checkpoint wants a state of {expected} numbers, got {proprio.shape[-1]} numbers")
        return in_own_dtype(self.proprio_projector, proprio.to(dtype))[:, None]

    # Llama, once, over everything

    def hidden_states(self, input_ids: Tensor, lengths: Tensor, text: Tensor, image_and_state_tokens: Tensor) -> Tensor:
        """
        Return the hidden states that predict the n placeholders and </s>, (B, n + 1, D). Those are one position to the
        left of what they predict: from 29871, the last token of the prompt, to the last placeholder.
        """
        x = torch.cat([text[:, :1], image_and_state_tokens, text[:, 1:]], dim=1)  # (B, S, D)

        # Every token sees every other one but padding, which is at the end.
        is_text = input_ids != PAD  # (B, T)
        is_image_or_state = torch.ones(image_and_state_tokens.shape[:2], dtype=torch.bool, device=x.device)
        visible = torch.cat([is_image_or_state, is_text], dim=1)  # (B, S)
        hidden = self.vla.language_model(x, mask=visible[:, None, None])  # (B, S, D)

        start = image_and_state_tokens.shape[1] + lengths - 1  # (B,): the position of 29871
        positions = start[:, None] + torch.arange(self.oft.num_placeholders + 1, device=x.device)  # (B, n + 1)
        index = positions[..., None].expand(-1, -1, hidden.shape[-1])  # (B, n + 1, D)
        return hidden.gather(1, index)

    def group_by_action(self, hidden: Tensor) -> Tensor:
        """Put the hidden states of an action's numbers side by side: (B, n + 1, D) -> (B, K, A * D)."""
        hidden = hidden[:, :-1]  # (B, n, D): without </s>
        return hidden.reshape(len(hidden), self.oft.action_chunk, -1)

    # Actions

    def act(
        self,
        input_ids: Tensor,
        lengths: Tensor,
        pixel_values: Tensor,
        proprio: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """
        Return normalised actions (B, K, A) float32; of the discrete head, logits (B, n + 1, vocabulary), the last ones
        of </s>.

        input_ids, lengths: of `insert_placeholders`. pixel_values: (B, V * 3 or V * 6, H, W).
        proprio: (B, P), normalised. noise: (B, K, A), what diffusion starts from; None: always the same.
        """
        text, is_placeholder, image_and_state_tokens = self.features(input_ids, lengths, pixel_values, proprio)
        if self.oft.head == "diffusion":
            if noise is None:
                noise = self.fixed_noise(len(input_ids), input_ids.device)
            return self.denoise_actions(input_ids, lengths, text, is_placeholder, image_and_state_tokens, noise)

        hidden = self.hidden_states(input_ids, lengths, text, image_and_state_tokens)  # (B, n + 1, D)
        if self.oft.head == "discrete":
            return self.vla.language_model.lm_head(hidden)
        return in_own_dtype(self.action_head.model, self.group_by_action(hidden)).float()

    def fixed_noise(self, batch_size: int, device: torch.device) -> Tensor:
        """Return the same noise (B, K, A) at each call, for each row: so an answer depends only on the input."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(1, self.oft.action_chunk, self.oft.action_dim, generator=generator)
        return noise.to(device).expand(batch_size, -1, -1)

    def denoise_actions(
        self,
        input_ids: Tensor,
        lengths: Tensor,
        text: Tensor,
        is_placeholder: Tensor,
        image_and_state_tokens: Tensor,
        noise: Tensor,
    ) -> Tensor:
        """Noise (B, K, A) -> actions (B, K, A) float32: one pass of Llama for each of the diffusion steps."""
        steps = self.oft.diffusion_steps
        alphas = alphas_cumprod(steps, input_ids.device)
        x = noise
        for step in reversed(range(steps)):
            t = torch.full((len(input_ids),), step, device=input_ids.device)  # (B,)
            predicted = self.predict_noise(input_ids, lengths, text, is_placeholder, image_and_state_tokens, x, t)
            x = denoise(x, predicted.float(), step, stride=1, alphas=alphas)
        return x

    def predict_noise(
        self,
        input_ids: Tensor,
        lengths: Tensor,
        text: Tensor,
        is_placeholder: Tensor,
        image_and_state_tokens: Tensor,
        noisy: Tensor,
        t: Tensor,
    ) -> Tensor:
        """
        Noisy actions (B, K, A) at diffusion steps t (B,) -> the noise in them (B, K, A). The other arguments are the
        inputs and outputs of `features`.
        """
        # Each number of the chunk becomes the embedding of its placeholder.
        numbers = noisy.flatten(1)[..., None].to(text.dtype)  # (B, n, 1)
        action_tokens = in_own_dtype(self.noisy_action_projector, numbers)  # (B, n, D)
        text = text.masked_scatter(is_placeholder[..., None], action_tokens)

        time_token = time_embedding(t, text.shape[-1]).to(text.dtype)[:, None]  # (B, 1, D)
        tokens = torch.cat([image_and_state_tokens, time_token], dim=1)  # (B, M + 1, D)
        hidden = self.hidden_states(input_ids, lengths, text, tokens)  # (B, n + 1, D)
        return in_own_dtype(self.action_head.noise_predictor.mlp_resnet, self.group_by_action(hidden))

    @torch.inference_mode()
    def predict(
        self,
        prompts: list[list[int]],
        pixel_values: Tensor,
        proprio: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """
        Prompts as ids, one for each row of pixel_values -> normalised actions (B, K, A) float64, on the CPU. The other
        arguments are those of `act`. Raises ValueError if the answer is not finite.
        """
        input_ids, lengths = self.insert_placeholders(prompts)
        device = pixel_values.device
        answer = self.act(input_ids.to(device), lengths.to(device), pixel_values, proprio, noise)
        if not torch.isfinite(answer).all():
            raise ValueError("the policy's answer is not finite: broken weights, or numbers beyond --dtype float16")
        if self.oft.head == "discrete":
            answer = self.decode_logits(answer)
        return answer.cpu().double()

    def decode_logits(self, logits: Tensor) -> Tensor:
        """Logits (B, n + 1, vocabulary) -> the most likely actions (B, K, A) float64, in [-1, 1]."""
        tokens = logits[:, :-1].argmax(-1)  # (B, n): without </s>
        return decode_action(tokens).view(len(tokens), self.oft.action_chunk, self.oft.action_dim)

    # What training asks of a model

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """
        Return the training loss of a batch of data.collate with `pixel_values` (B, V * 3 or V * 6, H, W), and the
        predicted actions (B, K, A), or None: diffusion predicts noise.
        """
        return self(batch["input_ids"], batch["labels"], batch["pixel_values"], batch.get("proprio"), batch["actions"])

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        pixel_values: Tensor,
        proprio: Tensor | None,
        actions: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """
        Return what `loss` does. input_ids and labels (B, T) are those of tokens, with an action token in each
        placeholder. These are ignored, except as labels of the discrete head. actions: (B, K, A), normalised.
        """
        lengths = (labels >= 0).int().argmax(dim=1)  # the first label follows the prompt
        if self.oft.head == "diffusion":
            return self.diffusion_loss(input_ids, lengths, pixel_values, proprio, actions), None

        answer = self.act(input_ids, lengths, pixel_values, proprio)
        if self.oft.head == "discrete":
            targets = labels[labels >= 0]  # (B * (n + 1),)
            loss = F.cross_entropy(answer.float().flatten(0, 1), targets)
            return loss, self.decode_logits(answer.detach())
        return F.l1_loss(answer, actions), answer.detach()

    def diffusion_loss(
        self, input_ids: Tensor, lengths: Tensor, pixel_values: Tensor, proprio: Tensor | None, actions: Tensor
    ) -> Tensor:
        """Return the mean of (e - e_predicted)^2, at a random diffusion step for each row."""
        noise = torch.randn_like(actions)
        t = torch.randint(self.oft.diffusion_steps, (len(input_ids),), device=input_ids.device)  # (B,)
        alphas = alphas_cumprod(self.oft.diffusion_steps, input_ids.device)
        noisy = add_noise(actions, noise, t, alphas)

        text, is_placeholder, image_and_state_tokens = self.features(input_ids, lengths, pixel_values, proprio)
        predicted = self.predict_noise(input_ids, lengths, text, is_placeholder, image_and_state_tokens, noisy, t)
        return F.mse_loss(predicted.float(), noise)


def mean_embedding(text: Tensor, is_text: Tensor) -> Tensor:
    """
    Return the mean embedding of the tokens where is_text (B, T) is True: (B, T, D) -> (B, D). (The official training
    batches count padding, too.)
    """
    weights = is_text[..., None].to(text.dtype)  # (B, T, 1)
    return (text * weights).sum(1) / weights.sum(1)


# -----------------------------------------------------------------------------
# Folders: a model in Hugging Face layout, and beside it the components as official .pt files


def needed_components(cfg: OFTConfig) -> dict[str, bool]:
    """Return for each component, NAME--STEP_checkpoint.pt, if such a policy has it."""
    return {
        "action_head": cfg.head != "discrete",
        "proprio_projector": cfg.proprio_dim > 0,
        "noisy_action_projector": cfg.head == "diffusion",
        "vision_backbone": cfg.film,
    }


def read_component(folder: Path, name: str) -> dict[str, Tensor] | None:
    """
    Return the tensors of NAME--STEP_checkpoint.pt, without the prefix of PyTorch's DDP, or None if there is no such
    file. Raises ValueError if there are several, or if it cannot be read.
    """
    files = component_files(folder, name)
    if len(files) > 1:
        raise ValueError(f"{folder}: several {name} files, {', '.join(file.name for file in files)}; keep one")
    if not files:
        return None
    tensors = open_pt(files[0], mmap=False)
    if not isinstance(tensors, dict) or not all(torch.is_tensor(tensor) for tensor in tensors.values()):
        raise ValueError(f"{files[0]}: no component of an OFT policy, it must hold tensors by name; copy it again")
    return {key.removeprefix("module."): tensor for key, tensor in tensors.items()}


# oft_config.json


def read_record(folder: Path) -> OFTConfig:
    """
    Read oft_config.json. Raises ValueError for an official folder without it, and says what would stand there. (An
    official discrete policy without state has nothing but its weights: without this file it is taken for a token
    model, which generates its actions one by one.)
    """
    file = folder / OFT_RECORD
    if not file.is_file():
        raise ValueError(
            f"{folder}: an official OFT folder does not say how long its chunks are (8 LIBERO, 25 ALOHA, 5 Bridge) nor "
            f"how many images it takes, and a discrete one looks like a token model. Write {file}; by its other files "
            f"that may be {json.dumps(asdict(guess_config(folder)))}"
        )

    record = read_json(file)
    try:
        cfg = OFTConfig(**record)
        check_record(cfg)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from None
    return cfg


def check_record(cfg: OFTConfig):
    """Raise ValueError for a config that no policy can have."""
    known = cfg.head in HEADS and cfg.scheme in SCHEMES
    least = {"action_chunk": 1, "action_dim": 1, "num_images": 1, "diffusion_steps": 1, "proprio_dim": 0}
    sizes = {name: getattr(cfg, name) for name in least}
    is_good = all(type(size) is int and least[name] <= size <= 10**4 for name, size in sizes.items())
    if not known or not is_good or type(cfg.film) is not bool:
        raise ValueError(f"{cfg}; head is one of {', '.join(HEADS)}, scheme one of {', '.join(SCHEMES)}")


def guess_config(folder: Path) -> OFTConfig:
    """
    Guess the config of an official folder from the tensors of its components. Chunk length and number of images leave
    no trace there: they are those of the released policies for a robot with as many numbers.
    """
    head = read_component(folder, "action_head")
    state_projector = read_component(folder, "proprio_projector")
    cfg = OFTConfig(film=read_component(folder, "vision_backbone") is not None)

    # What the tensors tell.
    if head is None:
        cfg.head = "discrete"
    elif "model.fc2.bias" in head:
        cfg.head = "l1"
    else:
        cfg.head = "diffusion"
    last_biases = [tensor for name, tensor in (head or {}).items() if name.endswith("fc2.bias")]
    if last_biases:
        cfg.action_dim = len(last_biases[0])
    cfg.proprio_dim = state_projector["fc1.weight"].shape[1] if state_projector else 0

    # What the robot tells.
    is_aloha = cfg.action_dim == 14
    is_bridge = cfg.proprio_dim == 7
    if is_aloha:
        cfg.action_chunk = 25
        cfg.num_images = 3
        cfg.scheme = "bounds"
    elif is_bridge:
        cfg.action_chunk = 5
        cfg.num_images = 1
    return cfg


# Load


def load_oft(
    checkpoint: str | Path | Checkpoint,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    cfg: OFTConfig | None = None,
    progress: Callable = no_progress,
) -> OFT:
    """
    Load a policy in eval mode from a folder, or from a run of finetune_oft.py with its base checkpoint.

    cfg: None: as oft_config.json says. progress: show_progress of progress.py, or no_progress.
    Raises ValueError, naming the file, if something is missing or does not fit.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint)
    folder = checkpoint.folder
    if cfg is None:
        cfg = read_record(folder)

    # The OpenVLA.
    vla = copy.deepcopy(checkpoint.skeleton)
    vla.load_weights(checkpoint.weight_map, dtype, device, progress)
    if checkpoint.adapter:
        load_adapter(vla, checkpoint.adapter, checkpoint.base)

    model = OFT(vla, cfg)
    load_components(model, folder)
    return model.to(device, dtype).eval()


def load_components(model: OFT, folder: Path):
    """Load the parts that OFT adds. Raises ValueError, naming the file, if one is missing or does not fit."""
    cfg = model.oft
    for name, is_needed in needed_components(cfg).items():
        tensors = read_component(folder, name)
        if is_needed and tensors is None:
            raise ValueError(f"{folder}: {name}--*{COMPONENT_ENDING} is missing: {cfg}")
        if not is_needed and tensors is not None:
            raise ValueError(f"{folder}: {name}--*{COMPONENT_ENDING} is not expected: {cfg}")
        if not is_needed:
            continue

        try:
            if name == "vision_backbone":
                load_vision_backbone(model.vla, tensors)
            else:
                getattr(model, name).load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"{folder}, {name}: {error}") from None


def check_components(checkpoint: Checkpoint):
    """Raise ValueError, as `load_oft` does, if oft_config.json or a component is missing or does not fit."""
    with torch.device("meta"):
        model = OFT(copy.deepcopy(checkpoint.skeleton), read_record(checkpoint.folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns that a model without memory keeps no weights
        load_components(model, checkpoint.folder)


def load_vision_backbone(vla: OpenVLA, tensors: dict[str, Tensor]):
    """
    Load vision encoders with FiLM: whole ones, as in an official folder, or only the FiLM layers of a LoRA run, which
    keeps no frozen weights. Raises RuntimeError if tensors are missing or have another shape.
    """
    tensors = {name.removeprefix("vision_backbone."): tensor for name, tensor in tensors.items()}
    tensors = fold_adapters(tensors)
    weights = {}
    for name, tensor in tensors.items():
        if not is_unused(f"vision_backbone.{name}", vla.cfg):
            weights[name] = tensor

    film_names = {name for name in vla.vision_backbone.state_dict() if is_film(name)}
    is_whole = weights.keys() != film_names
    vla.vision_backbone.load_state_dict(weights, strict=is_whole)


def fold_adapters(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by name, with the adapters among them added to the weights that they belong to, in float32."""
    folded = {}
    for name, tensor in tensors.items():
        if ".lora_" not in name:
            folded[name.replace(".base_layer.", ".")] = tensor

    for name, A in tensors.items():
        if name.endswith(".lora_A.default.weight"):
            module = name.removesuffix(".lora_A.default.weight")
            B = tensors[f"{module}.lora_B.default.weight"]
            rank = len(A)
            update = lora_update(A, B, default_alpha(rank) / rank)
            folded[f"{module}.weight"] = folded[f"{module}.weight"].float() + update
    return folded


def is_film(name: str) -> bool:
    """True for the name of a tensor that FiLM adds to a vision encoder."""
    return re.search(r"\.(scale|shift)\.(weight|bias)$", name) is not None


# Save


def save_oft(model: OFT, folder: str | Path, dtype: torch.dtype | None = None):
    """
    Write the folder that `load_oft` reads: the model in Hugging Face layout, the components, oft_config.json. dtype
    None: each parameter keeps its own.
    """
    state = {name: tensor.to(dtype or tensor.dtype) for name, tensor in model.state_dict().items()}
    save_components(model.oft, state, Path(folder))
    without_film(model.vla).save_pretrained(folder, dtype)


def save_components(cfg: OFTConfig, state: dict[str, Tensor], folder: Path):
    """
    Write the components and oft_config.json. state: weights of an OFT by name, of which those that no component has
    are left out.
    """
    for component, is_needed in needed_components(cfg).items():
        if not is_needed:
            continue
        if component == "vision_backbone":
            own_prefix = "vla.vision_backbone."
            official_prefix = "vision_backbone."
        else:
            own_prefix = f"{component}."
            official_prefix = "module."  # of PyTorch's DDP

        tensors = {}
        for name, tensor in state.items():
            if name.startswith(own_prefix):
                tensors[official_prefix + name.removeprefix(own_prefix)] = tensor.detach().cpu().contiguous()
        with atomic_write(folder / f"{component}--latest_{COMPONENT_ENDING}") as temporary:
            torch.save(tensors, temporary)
    write_json(folder / OFT_RECORD, asdict(cfg))


def without_film(vla: OpenVLA) -> OpenVLA:
    """Return an OpenVLA with the same weights, whose vision encoders have no FiLM: what the model's own files hold."""
    weights = {}
    for name, tensor in vla.state_dict().items():
        if not is_film(name):
            weights[name.replace(".block.", ".")] = tensor  # FiLMBlock holds the plain block as `block`

    with torch.device("meta"):
        plain = OpenVLA(vla.cfg)
    plain.load_state_dict(weights, assign=True)
    plain.unused = vla.unused
    return plain
