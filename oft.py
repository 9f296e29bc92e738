"""
OpenVLA-OFT: the same model, a chunk of actions in one forward pass. https://arxiv.org/abs/2502.19645

    [<s>, patches of each picture, state, (time), prompt ... 29871, n placeholders, </s>] -> Llama, everything sees
    everything -> hidden states from 29871 on, (B, n, D) -> head -> actions (B, K, A)

Placeholders carry nothing (or, in diffusion, noisy actions); what they become comes out one place earlier, as with
tokens. Parameter names are those of the released components. Follows vla-scripts/finetune.py, prismatic/models/
action_heads.py, projectors.py, film_vit_wrapper.py and prismatic/extern/hf/modeling_prismatic.py of
github.com/moojink/openvla-oft.

Axes: B batch, T text tokens (placeholders included), S sequence, D width of Llama, V pictures, K actions of a chunk, A
dimensions of an action, P of the robot's state, n = K * A placeholders.
"""

import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import sample
from checkpoint import OFT_RECORD as RECORD
from checkpoint import base_of
from lora import load_adapter
from model import OpenVLA, is_unused, write_atomically, write_json
from tokenizer import BLANK, EOS, PAD, SCHEME, SCHEMES, decode_action, normalize, pad_sequences, unnormalize

HEADS = ("l1", "diffusion", "discrete")


@dataclass
class OFTConfig:
    """What oft_config.json says; the official folders do not have that file."""

    action_chunk: int = 8  # K: 8 LIBERO, 25 ALOHA, 5 Bridge
    action_dim: int = 7  # A: 7, of ALOHA 14
    proprio_dim: int = 8  # P: 8 LIBERO, 14 ALOHA, 7 Bridge; 0: the state is not looked at
    num_images: int = 2  # V
    head: str = "l1"  # one of HEADS
    film: bool = False  # the instruction modulates both ViTs
    diffusion_steps: int = 50
    scheme: str = SCHEME  # of actions and state: q01 and q99 become -1 and 1; "bounds" (ALOHA): min and max


# -----------------------------------------------------------------------------
# Heads


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
    """Empty for discrete actions, which lm_head predicts. Nested as in the official files."""
    if cfg.head == "discrete":
        return nn.ModuleDict()
    mlp = MLPResNet(cfg.action_dim * dim, dim, cfg.action_dim)
    return nn.ModuleDict(
        dict(model=mlp) if cfg.head == "l1" else dict(noise_predictor=nn.ModuleDict(dict(mlp_resnet=mlp)))
    )


class Projector(nn.Module):
    """State (B, P), or noisy actions (B, n, 1), into Llama's embedding space."""

    def __init__(self, input_dim: int, dim: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(input_dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def through(module: nn.Module, x: Tensor) -> Tensor:
    """module(x) in the dtype of its weights (new parts train in float32 beside a model in bfloat16), x's coming out."""
    return module(x.to(next(module.parameters()).dtype)).to(x.dtype)


class FiLMBlock(nn.Module):
    """A ViT block whose features the instruction scales and shifts after attention; https://arxiv.org/abs/1709.07871"""

    def __init__(self, block: nn.Module, vision_dim: int, dim: int):
        super().__init__()
        self.block = block
        self.scale, self.shift = nn.Linear(dim, vision_dim), nn.Linear(dim, vision_dim)

    def forward(self, x: Tensor, language: Tensor) -> Tensor:
        b = self.block  # x (B, N, Dv), language (B, D)
        x = x + b.ls1(b.attn(b.norm1(x)))
        x = x * (1 + through(self.scale, language)[:, None]) + through(self.shift, language)[:, None]
        return x + b.ls2(b.mlp(b.norm2(x)))


# -----------------------------------------------------------------------------
# Diffusion: DDIM, https://arxiv.org/abs/2010.02502, with the squared-cosine schedule of arXiv 2102.09672


def alphas_cumprod(steps: int, device="cpu") -> Tensor:
    """How much of the signal is left after each noising step, (steps,) float32."""

    def left(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - left((i + 1) / steps) / left(i / steps), 0.999) for i in range(steps)]
    return torch.cumprod(1 - torch.tensor(betas, dtype=torch.float32, device=device), dim=0)


def add_noise(x: Tensor, noise: Tensor, t: Tensor, alphas: Tensor) -> Tensor:
    """Actions (B, K, A) after noising step t (B,)."""
    a = alphas[t][:, None, None]
    return a.sqrt() * x + (1 - a).sqrt() * noise


def denoise(x: Tensor, noise: Tensor, t: int, stride: int, alphas: Tensor) -> Tensor:
    """One DDIM step without new noise, from t to t - stride; the clean actions it assumes are clipped to [-1, 1]."""
    a, before = alphas[t], alphas[t - stride] if t >= stride else alphas.new_ones(())
    clean = ((x - (1 - a).sqrt() * noise) / a.sqrt()).clamp(-1, 1)
    return before.sqrt() * clean + (1 - before).sqrt() * noise


def time_embedding(t: Tensor, dim: int) -> Tensor:
    """(B,) -> (B, dim): sines, then cosines."""
    half = dim // 2
    freqs = torch.exp(torch.arange(half, device=t.device) * -math.log(10000) / (half - 1))
    angles = t[:, None] * freqs
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


# -----------------------------------------------------------------------------
# The whole


class OFT(nn.Module):
    def __init__(self, vla: OpenVLA, cfg: OFTConfig):
        super().__init__()
        dim = vla.cfg.text.hidden_size
        self.vla, self.oft = vla, cfg
        self.action_head = build_head(cfg, dim)
        self.proprio_projector = Projector(cfg.proprio_dim, dim) if cfg.proprio_dim else None
        self.noisy_action_projector = Projector(1, dim) if cfg.head == "diffusion" else None
        if cfg.film:
            towers = (vla.vision_backbone.featurizer, vla.vision_backbone.fused_featurizer)
            for vit, c in zip(filter(None, towers), vla.cfg.vision, strict=True):
                vit.blocks = nn.ModuleList(FiLMBlock(block, c.embed_dim, dim) for block in vit.blocks)

    @property
    def num_placeholders(self) -> int:
        return self.oft.action_chunk * self.oft.action_dim

    def lay_out(self, prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Prompts that end in 29871 -> ids (B, T) with placeholders and </s>, padded on the right; prompt lengths."""
        rows = [[*prompt, *[BLANK] * self.num_placeholders, EOS] for prompt in prompts]
        return pad_sequences(rows, PAD)[0], torch.tensor([len(prompt) for prompt in prompts])

    def features(self, ids: Tensor, lengths: Tensor, pixel_values: Tensor, proprio: Tensor | None):
        """
        What does not change from one denoising step to the next: text embeddings (B, T, D) with empty placeholders,
        where these are (B, T) bool, picture and state tokens (B, ..., D). pixel_values (B, V * 6, H, W).
        """
        text, place = self.vla.language_model.model.embed_tokens(ids), torch.arange(ids.shape[1], device=ids.device)
        slots = (place >= lengths[:, None]) & (place < lengths[:, None] + self.num_placeholders)
        text = text.masked_fill(slots[..., None], 0)  # a new tensor
        condition = []
        if self.oft.film:  # the mean of all text; the official training batches count their padding, too
            words = (~slots & (ids != PAD))[..., None].to(text.dtype)
            condition = [(text * words).sum(1) / words.sum(1)]
        channels = 3 * len(self.vla.cfg.vision)
        pictures = [self.vla.vision_backbone(p, *condition) for p in pixel_values.split(channels, dim=1)]
        if len(pictures) != self.oft.num_images:
            raise ValueError(f"{len(pictures)} pictures, this checkpoint wants {self.oft.num_images}")
        seen = [self.vla.projector(torch.cat(pictures, dim=1))]  # (B, V * N, D)
        if self.proprio_projector is not None:
            if proprio is None or proprio.shape[-1] != self.oft.proprio_dim:
                found = "none" if proprio is None else f"{proprio.shape[-1]} numbers"
                raise ValueError(f"this checkpoint wants a state of {self.oft.proprio_dim} numbers, got {found}")
            seen.append(through(self.proprio_projector, proprio.to(text.dtype))[:, None])
        return text, slots, torch.cat(seen, dim=1)

    def hidden_states(self, ids: Tensor, lengths: Tensor, text: Tensor, seen: Tensor) -> Tensor:
        """Hidden states that predict the placeholders and </s>, (B, n + 1, D): from the one before the first."""
        x = torch.cat([text[:, :1], seen, text[:, 1:]], dim=1)  # (B, S, D)
        real = torch.cat([ids.new_ones(seen.shape[:2]), ids != PAD], dim=1).bool()  # (B, S); pads are at the end
        hidden = self.vla.language_model(x, real[:, None, None])  # every real place sees every real place
        first = seen.shape[1] + lengths - 1
        where = first[:, None] + torch.arange(self.num_placeholders + 1, device=ids.device)  # (B, n + 1)
        return hidden.gather(1, where[..., None].expand(-1, -1, hidden.shape[-1]))

    def predict_noise(self, ids, lengths, text, slots, seen, noisy: Tensor, t: Tensor) -> Tensor:
        """Noisy actions (B, K, A) at time t (B,) -> the noise in them."""
        tokens = through(self.noisy_action_projector, noisy.flatten(1)[..., None].to(text.dtype))  # (B, n, D)
        time = time_embedding(t, text.shape[-1]).to(text.dtype)[:, None]
        text = text.masked_scatter(slots[..., None], tokens)
        hidden = self.hidden_states(ids, lengths, text, torch.cat([seen, time], dim=1))
        return through(self.action_head.noise_predictor.mlp_resnet, self.side_by_side(hidden[:, :-1]))

    def side_by_side(self, hidden: Tensor) -> Tensor:
        return hidden.reshape(len(hidden), self.oft.action_chunk, -1)  # (B, n, D) -> (B, K, A * D)

    def act(self, ids: Tensor, lengths: Tensor, pixel_values: Tensor, proprio: Tensor | None = None, noise=None):
        """
        Normalised actions (B, K, A), in float32; of the discrete head, logits (B, n + 1, V), the last ones of </s>. ids
        and lengths as from `lay_out`, proprio (B, P) normalised. noise (B, K, A): what diffusion starts from; None:
        always the same, so that a policy's answer depends on what it sees alone.
        """
        text, slots, seen = self.features(ids, lengths, pixel_values, proprio)
        if self.oft.head != "diffusion":
            hidden = self.hidden_states(ids, lengths, text, seen)
            if self.oft.head == "discrete":
                return self.vla.language_model.lm_head(hidden)
            return through(self.action_head.model, self.side_by_side(hidden[:, :-1])).float()
        steps = self.oft.diffusion_steps
        alphas = alphas_cumprod(steps, ids.device)
        if noise is None:
            shape, always = (1, self.oft.action_chunk, self.oft.action_dim), torch.Generator().manual_seed(0)
            noise = torch.randn(shape, generator=always).to(ids.device).expand(len(ids), -1, -1)
        x = noise
        for t in reversed(range(steps)):
            at = torch.full((len(ids),), t, device=ids.device)
            x = denoise(x, self.predict_noise(ids, lengths, text, slots, seen, x, at).float(), t, 1, alphas)
        return x

    @torch.inference_mode()
    def predict(self, prompts: list[list[int]], pixel_values: Tensor, proprio: Tensor | None = None, noise=None):
        """Prompts as ids, one per row of pixel_values -> normalised actions (B, K, A) float64, on the CPU."""
        ids, lengths = (x.to(pixel_values.device) for x in self.lay_out(prompts))
        out = self.act(ids, lengths, pixel_values, proprio, noise)
        if not torch.isfinite(out).all():
            raise ValueError("the policy's answer is not finite: broken weights, or numbers beyond --dtype float16")
        if self.oft.head == "discrete":
            out = decode_action(out[:, :-1].argmax(-1)).view(len(ids), self.oft.action_chunk, -1)
        return out.cpu().double()

    def forward(self, ids: Tensor, labels: Tensor, pixel_values: Tensor, proprio: Tensor | None, actions: Tensor):
        """
        Batch of data.collate -> (mean loss, predicted (B, K, A) or None). The ids' actions are not looked at but for
        the discrete head's labels.
        """
        lengths = (labels >= 0).int().argmax(dim=1)  # the first label follows the prompt
        if self.oft.head == "diffusion":
            noise, steps = torch.randn_like(actions), self.oft.diffusion_steps
            t = torch.randint(steps, (len(ids),), device=ids.device)
            noisy = add_noise(actions, noise, t, alphas_cumprod(steps, ids.device))
            text, slots, seen = self.features(ids, lengths, pixel_values, proprio)
            predicted = self.predict_noise(ids, lengths, text, slots, seen, noisy, t)
            return F.mse_loss(predicted.float(), noise), None
        out = self.act(ids, lengths, pixel_values, proprio)
        if self.oft.head == "discrete":
            answers = labels[labels >= 0].view(len(ids), -1)  # (B, n + 1)
            predicted = decode_action(out[:, :-1].detach().argmax(-1)).view_as(actions)
            return F.cross_entropy(out.float().flatten(0, 1), answers.flatten()), predicted
        return F.l1_loss(out, actions), out.detach()


def predict_chunk(policy: sample.Policy, images, instructions, states=None, unnorm_key="", crop=None) -> np.ndarray:
    """
    images: B lists of V pictures each, as `sample.predict_action` takes them; instructions: B texts; states (B, P) in
    the robot's units. Returns (B, K, A) float64 in the robot's units; of a token model, K is 1. Raises ValueError.
    """
    if not isinstance(policy.model, OFT):
        return sample.predict_action(policy, [p for (p,) in images], instructions, unnorm_key, crop)[:, None]
    stats, model = sample.dataset_stats(policy.norm_stats, unnorm_key, policy.checkpoint), policy.model
    weight = model.vla.language_model.model.norm.weight
    views = [np.stack([sample.prepare(policy, p, crop) for p in view]) for view in zip(*images, strict=True)]
    views = [policy.processor.normalize(torch.from_numpy(view).to(weight.device)) for view in views]
    proprio = None
    if model.oft.proprio_dim and states is not None:
        if np.shape(states)[-1] != (wanted := len(stats["proprio"]["q01"])):
            raise ValueError(
                f"the state has {np.shape(states)[-1]} numbers, {policy.checkpoint} was trained on {wanted}"
            )
        proprio = torch.from_numpy(normalize(states, stats["proprio"], model.oft.scheme)).to(weight.device)
    prompts = [policy.tokenizer.encode_prompt(text) for text in instructions]
    actions = model.predict(prompts, torch.cat(views, dim=1).to(weight.dtype), proprio)
    return unnormalize(actions.numpy(), stats["action"], model.oft.scheme)


# -----------------------------------------------------------------------------
# Folders: a model in Hugging Face layout, and beside it the components as official .pt files

COMPONENTS = ("action_head", "proprio_projector", "noisy_action_projector", "vision_backbone")


def component(folder: Path, name: str) -> dict[str, Tensor] | None:
    """The tensors of NAME--STEP_checkpoint.pt, without DDP's prefix; None if there is no such file."""
    files = sorted(folder.glob(f"{name}--*checkpoint.pt"))
    if len(files) > 1:
        raise ValueError(f"{folder}: several {name} files, {', '.join(f.name for f in files)}; keep one")
    if not files:
        return None
    tensors = torch.load(files[0], map_location="cpu", weights_only=True)
    return {key.removeprefix("module."): tensor for key, tensor in tensors.items()}


def read_record(folder: Path) -> OFTConfig:
    """oft_config.json. Raises ValueError for an official folder without it, and says what would stand there."""
    if (folder / RECORD).is_file():
        try:
            cfg = OFTConfig(**json.loads((folder / RECORD).read_text("utf-8")))
            sizes = (cfg.action_chunk, cfg.action_dim, cfg.num_images, cfg.diffusion_steps)
            if cfg.head not in HEADS or cfg.scheme not in SCHEMES or min(sizes) < 1 or cfg.proprio_dim < 0:
                raise ValueError(f"{cfg}; head is one of {', '.join(HEADS)}, scheme one of {', '.join(SCHEMES)}")
            return cfg
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder / RECORD}: {error}") from None
    cfg, head, state = OFTConfig(), component(folder, "action_head"), component(folder, "proprio_projector")
    cfg.head = "discrete" if not head else "l1" if "model.fc2.bias" in head else "diffusion"
    cfg.action_dim = next((len(v) for k, v in (head or {}).items() if k.endswith("fc2.bias")), 7)
    cfg.proprio_dim = state["fc1.weight"].shape[1] if state else 0
    cfg.film = component(folder, "vision_backbone") is not None
    if cfg.action_dim == 14:
        cfg.action_chunk, cfg.num_images, cfg.scheme = 25, 3, "bounds"
    elif cfg.proprio_dim == 7:
        cfg.action_chunk, cfg.num_images = 5, 1
    raise ValueError(
        f"{folder}: an official OFT folder does not say how long its chunks are (8 LIBERO, 25 ALOHA, 5 Bridge) nor "
        f"how many pictures it looks at. Write them to {folder / RECORD}; by its other files that may be "
        f"{json.dumps(asdict(cfg))}"
    )


def load_oft(folder, dtype=torch.bfloat16, device="cpu", cfg: OFTConfig | None = None, progress=lambda names: names):
    """
    Folder, or LoRA run of finetune_oft.py -> OFT in eval mode. cfg None: as oft_config.json says. Raises ValueError
    naming the file if something does not fit.
    """
    folder = Path(folder)
    cfg, base = cfg or read_record(folder), base_of(folder)
    vla = OpenVLA.from_pretrained(base or folder, dtype, device, progress)
    model = OFT(load_adapter(vla, folder) if base else vla, cfg)
    for name in COMPONENTS:
        part = model.vla.vision_backbone if name == "vision_backbone" else getattr(model, name)
        wanted = cfg.film if name == "vision_backbone" else part is not None and any(True for _ in part.parameters())
        tensors = component(folder, name)
        if (tensors is not None) != wanted:
            raise ValueError(f"{folder}: {name}--*_checkpoint.pt is {'missing' if wanted else 'not expected'}: {cfg}")
        if not wanted:
            continue
        if name == "vision_backbone":
            tensors = merged({k.removeprefix("vision_backbone."): v for k, v in tensors.items()})
            tensors = {k: v for k, v in tensors.items() if not is_unused(f"vision_backbone.{k}", model.vla.cfg)}
        films = {k for k in part.state_dict() if re.search(r"\.(scale|shift)\.(weight|bias)$", k)}
        try:
            part.load_state_dict(tensors, strict=tensors.keys() != films)  # a LoRA run keeps no frozen weights
        except RuntimeError as error:
            raise ValueError(f"{folder}, {name}: {error}") from None
    return model.to(device, dtype).eval()


def merged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapters in a FiLM backbone (alpha at most 16) folded into the weights they belong to, in float32."""
    out = {key.replace(".base_layer.", "."): value for key, value in tensors.items() if ".lora_" not in key}
    for key, A in tensors.items():
        if key.endswith(".lora_A.default.weight"):
            name = key.removesuffix(".lora_A.default.weight")
            B, rank = tensors[f"{name}.lora_B.default.weight"], len(A)
            delta = (B.float().flatten(1) @ A.float().flatten(1)).view_as(out[f"{name}.weight"]) * (
                min(rank, 16) / rank
            )
            out[f"{name}.weight"] = out[f"{name}.weight"].float() + delta
    return out


def save_components(oft: OFTConfig, state: dict[str, Tensor], folder: Path):
    """Write oft_config.json and, of the weights of an OFT by name, those that are not the model's own."""
    for name in COMPONENTS:
        own = f"vla.{name}." if name == "vision_backbone" else f"{name}."
        prefix = "vision_backbone." if name == "vision_backbone" else "module."  # as officially
        tensors = {prefix + k.removeprefix(own): v for k, v in state.items() if k.startswith(own)}
        if tensors and (oft.film or name != "vision_backbone"):
            tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
            path = folder / f"{name}--latest_checkpoint.pt"
            write_atomically(path, lambda tmp, tensors=tensors: torch.save(tensors, tmp))
    write_json(folder / RECORD, asdict(oft))


def save_oft(model: OFT, folder: str | Path, dtype: torch.dtype | None = None):
    """Write the folder that `load_oft` reads: the model in Hugging Face layout, the components, oft_config.json."""
    state = {k: v.to(dtype or v.dtype) for k, v in model.state_dict().items()}
    save_components(model.oft, state, Path(folder))
    backbone = model.vla.vision_backbone
    towers = [vit for vit in (backbone.featurizer, backbone.fused_featurizer) if vit and model.oft.film]
    films = [vit.blocks for vit in towers]
    for vit in towers:  # the model's own files hold the plain towers
        vit.blocks = nn.ModuleList(film.block for film in vit.blocks)
    try:
        model.vla.save_pretrained(folder, dtype)
    finally:
        for vit, blocks in zip(towers, films, strict=True):
            vit.blocks = blocks
