"""
OpenVLA, a vision-language-action model: all of it in this file.

Two vision encoders (ViTs: DINOv2 and SigLIP) turn an image into patch features. A projector takes their joined
features into the embedding space of a Llama-2, between <s> and the instruction. Llama generates one token per
dimension of the action.

    pixel_values (B, 6, 224, 224) -> ViTs (B, 256, 1024 + 1152) -> projector (B, 256, 4096) --.
    input_ids (B, T) -> embed_tokens (B, T, 4096) --> [<s>, patches, instruction] -> Llama -> logits

What differs from a textbook transformer:
- The vision encoders give the output of their second-to-last block.
- Llama uses RMSNorm, rotary position embeddings and a gated MLP, and no biases.
- Rotary embeddings pair channel i with channel i + C/2, as Hugging Face does.

OpenVLA https://arxiv.org/abs/2406.09246, Prismatic https://arxiv.org/abs/2402.07865, Llama 2
https://arxiv.org/abs/2307.09288, DINOv2 https://arxiv.org/abs/2304.07193, SigLIP https://arxiv.org/abs/2303.15343.
Parameters are named as in the released checkpoints: weights load strictly, nothing is renamed.

Axes: B batch, N image patches, T text tokens, S = N + T sequence, L keys, D width, H attention heads,
K key/value heads, C channels of a head (D = H * C), V vocabulary, n trained positions.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from files import atomic_write, read_json_object, write_json
from progress import no_progress

SHARD_BYTES = 5 * 10**9  # the most that one weight file holds
INDEX = "model.safetensors.index.json"
LM_HEAD = "language_model.lm_head.weight"
PAD_TOKEN_ID = 32000  # the one token that OpenVLA adds to Llama's 32,000
NUM_ACTION_BINS = 256  # NUM_BINS of tokenizer.py, which this file does not import: it needs no tokenizer


# -----------------------------------------------------------------------------
# Configuration: what config.json says


@dataclass
class ViTConfig:
    """One vision encoder; field names as in timm. The defaults are DINOv2 ViT-L/14 with registers."""

    embed_dim: int = 1024
    depth: int = 24  # as released; the last block never runs, see ViT
    num_heads: int = 16
    patch_size: int = 14  # pixels
    img_size: int = 224  # pixels
    mlp_dim: int = 4096
    cls_token: bool = True
    reg_tokens: int = 4  # https://arxiv.org/abs/2309.16588
    layer_scale: bool = True


# "timm_model_ids" in config.json -> the released vision encoders
VISION_ENCODERS = {
    "vit_large_patch14_reg4_dinov2.lvd142m": ViTConfig(),
    "vit_so400m_patch14_siglip_224": ViTConfig(
        embed_dim=1152,
        depth=27,
        num_heads=16,
        mlp_dim=4304,
        cls_token=False,
        reg_tokens=0,
        layer_scale=False,
    ),
}


@dataclass
class LlamaConfig:
    """Field names and defaults as in Hugging Face's LlamaConfig: a field absent from config.json takes them."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: as many as attention heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6  # Meta's Llama-2 has 1e-5, but the released config.json leaves it to this default
    rope_theta: float = 10000.0


# Size in config.json -> the least and the most that it may be. What is beyond is a mistake, and is not even built.
SIZE_LIMITS = {
    "embed_dim": (1, 10**5),
    "depth": (2, 500),
    "num_heads": (1, 1000),
    "patch_size": (1, 1000),
    "img_size": (1, 10**4),
    "mlp_dim": (1, 10**6),
    "reg_tokens": (0, 1000),
    "vocab_size": (PAD_TOKEN_ID, 10**6),  # actions are the last of Llama's own tokens
    "hidden_size": (1, 10**5),
    "intermediate_size": (1, 10**6),
    "num_hidden_layers": (1, 500),
    "num_attention_heads": (1, 1000),
    "num_key_value_heads": (1, 1000),
    "max_position_embeddings": (1, 10**7),
}


def check_sizes(config: ViTConfig | LlamaConfig):
    """Raise ValueError for a size that is no whole number, or is beyond SIZE_LIMITS."""
    for name, value in asdict(config).items():
        if name not in SIZE_LIMITS or value is None:
            continue
        least, most = SIZE_LIMITS[name]
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"{name} is {value!r}, it must be a whole number from {least:,} to {most:,}")


def read_text_config(text: dict) -> LlamaConfig:
    """Return what text_config says. Raises ValueError for a language model that is not in this file."""
    expected = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    for key, value in expected.items():
        if text.get(key) not in (None, value):
            raise ValueError(f"text_config.{key} is {text[key]!r}; this Llama has {value!r} only")
    known = {f.name: text[f.name] for f in fields(LlamaConfig) if f.name in text}
    config = LlamaConfig(**{**known, **read_rope_theta(text)})
    check_sizes(config)

    heads = config.num_attention_heads
    head_dim = config.hidden_size / heads
    if text.get("head_dim") not in (None, head_dim) or head_dim % 2 != 0:
        raise ValueError(f"text_config: hidden_size {config.hidden_size} does not make {heads} heads of an even width")
    if heads % (config.num_key_value_heads or heads) != 0:
        raise ValueError(f"text_config: {config.num_key_value_heads} key/value heads do not divide {heads} heads")
    for key in ("rms_norm_eps", "rope_theta"):
        value = getattr(config, key)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"text_config.{key} is {value!r}, it must be a number above 0")
    return config


def read_rope_theta(text: dict) -> dict:
    """
    Return {"rope_theta": ...} if text_config has it, at its own place or in rope_parameters, where transformers 5
    writes it. Raises ValueError if the rotary embedding is scaled, which is not in this file.
    """
    thetas = [text["rope_theta"]] if "rope_theta" in text else []
    for key in ("rope_scaling", "rope_parameters"):
        rope = text.get(key) or {}
        kind = rope.get("rope_type") or rope.get("type") or "default"
        is_per_layer = any(isinstance(value, dict) for value in rope.values())
        if kind != "default" or is_per_layer or rope.get("partial_rotary_factor", 1) != 1:
            raise ValueError(f"text_config.{key} is {rope}; this Llama has the plain rotary embedding only (default)")
        if "rope_theta" in rope:
            thetas.append(rope["rope_theta"])

    if len(set(thetas)) > 1:
        raise ValueError(f"text_config: rope_theta is {thetas[0]} and in rope_parameters {thetas[1]}; remove one")
    return {"rope_theta": thetas[0]} if thetas else {}


@dataclass
class OpenVLAConfig:
    """The whole config.json. The defaults are openvla-7b."""

    # one vision encoder or two
    vision: list[ViTConfig] = field(default_factory=lambda: list(VISION_ENCODERS.values()))
    # 32000 tokens and <PAD>, rounded up to a multiple of 64
    text: LlamaConfig = field(default_factory=lambda: LlamaConfig(vocab_size=32064))
    # the rest of config.json, as it is
    extra: dict = field(default_factory=dict)

    @property
    def num_patches(self) -> int:
        """Patches of one image, which are as many tokens for Llama."""
        side = self.vision[0].img_size // self.vision[0].patch_size
        return side * side

    @classmethod
    def from_dict(cls, hf: dict) -> "OpenVLAConfig":
        """Read the content of a config.json. Raises ValueError for an architecture that is not in this file."""
        text = read_text_config(hf.get("text_config", {}))
        num_bins = hf.get("n_action_bins", NUM_ACTION_BINS)
        if num_bins != NUM_ACTION_BINS:
            raise ValueError(
                f"config.json: n_action_bins is {num_bins!r}; this code turns tokens into actions by "
                f"{NUM_ACTION_BINS} bins only"
            )

        names = hf.get("timm_model_ids", [])
        if "vision_configs" in hf:  # our own key, for vision encoders that are not the released ones
            vision = [ViTConfig(**sizes) for sizes in hf["vision_configs"]]
        elif names and set(names) <= VISION_ENCODERS.keys():
            pairs = zip(names, hf["image_sizes"], strict=True)
            vision = [replace(VISION_ENCODERS[name], img_size=size) for name, size in pairs]
        else:
            raise ValueError(f"config.json: timm_model_ids is {names}, this code knows {list(VISION_ENCODERS)}")
        if len(vision) not in (1, 2):
            raise ValueError(f"config.json: {len(vision)} vision encoders; this model has one or two")
        for vit in vision:
            check_sizes(vit)
            if vit.embed_dim % vit.num_heads != 0:
                raise ValueError(f"config.json: {vit.num_heads} heads do not divide embed_dim {vit.embed_dim}")

        extra = {key: value for key, value in hf.items() if key not in ("text_config", "vision_configs", "dtype")}
        if hf.get("dtype"):  # as transformers 5 calls it
            extra.setdefault("torch_dtype", hf["dtype"])
        return cls(vision, text, extra)

    def to_dict(self) -> dict:
        """Return the content of a config.json that this code and the official classes read."""
        if len(self.vision) == 2:
            vision = {
                "arch_specifier": "no-align+fused-gelu-mlp",
                "use_fused_vision_backbone": True,
                "vision_backbone_id": "dinosiglip-vit-so-224px",
                "timm_model_ids": list(VISION_ENCODERS),
            }
        else:
            vision = {
                "arch_specifier": "no-align+gelu-mlp",
                "use_fused_vision_backbone": False,
                "vision_backbone_id": "siglip-vit-so400m",
                "timm_model_ids": list(VISION_ENCODERS)[1:],
            }
        hf = {
            "model_type": "openvla",
            "architectures": ["OpenVLAForActionPrediction"],
            **vision,
            "pad_token_id": PAD_TOKEN_ID,
            "n_action_bins": NUM_ACTION_BINS,
            "llm_backbone_id": "llama2-7b-pure",
            "image_sizes": [vit.img_size for vit in self.vision],
            **self.extra,
            "text_config": {"model_type": "llama", "pad_token_id": PAD_TOKEN_ID, **asdict(self.text)},
        }
        is_released = OpenVLAConfig.from_dict(hf).vision == self.vision
        if not is_released:
            hf["vision_configs"] = [asdict(vit) for vit in self.vision]
        return hf


# -----------------------------------------------------------------------------
# Attention


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """
    Return softmax(q k^T / sqrt(C)): how much each query attends to each key.
    q (B, H, S, C) and k (B, H, L, C) -> (B, H, S, L). mask: bool, True where a query may look.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, S, L)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """
    Return softmax(q k^T / sqrt(C)) v, (B, H, S, C). To be read: the layers below call PyTorch's fused
    F.scaled_dot_product_attention, which gives the same without ever holding the (S, L) weights in memory.
    """
    return attention_weights(q, k, mask, is_causal) @ v


# -----------------------------------------------------------------------------
# Vision: pixels -> patch features


class ViTAttention(nn.Module):
    """Multi-head attention in which every patch sees every patch."""

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.num_heads = cfg.num_heads
        self.qkv = nn.Linear(cfg.embed_dim, 3 * cfg.embed_dim)
        self.proj = nn.Linear(cfg.embed_dim, cfg.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, N, C)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, H, N, C)
        x = x.transpose(1, 2).reshape(B, N, D)
        return self.proj(x)


class LayerScale(nn.Module):
    """A learned gain per channel on a residual branch, https://arxiv.org/abs/2103.17239."""

    def __init__(self, dim: int):
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale_factor


class ViTBlock(nn.Module):
    """Attention and MLP, each on a normalised input and added to the residual stream."""

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.embed_dim, eps=1e-6)
        self.attn = ViTAttention(cfg)
        self.ls1 = LayerScale(cfg.embed_dim) if cfg.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(cfg.embed_dim, eps=1e-6)
        self.mlp = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(cfg.embed_dim, cfg.mlp_dim),
                act=nn.GELU(),
                fc2=nn.Linear(cfg.mlp_dim, cfg.embed_dim),
            )
        )
        self.ls2 = LayerScale(cfg.embed_dim) if cfg.layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        x = x + self.ls2(self.mlp(self.norm2(x)))
        return x


class ViT(nn.Module):
    """A vision encoder: the patch features of its second-to-last block. See `is_unused` for what lies beyond."""

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.recompute = False  # see OpenVLA.recompute_blocks
        self.num_prefix_tokens = int(cfg.cls_token) + cfg.reg_tokens
        conv = nn.Conv2d(3, cfg.embed_dim, kernel_size=cfg.patch_size, stride=cfg.patch_size)
        self.patch_embed = nn.ModuleDict({"proj": conv})
        num_patches = (cfg.img_size // cfg.patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.zeros(1, num_patches, cfg.embed_dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.embed_dim)) if cfg.cls_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, cfg.reg_tokens, cfg.embed_dim)) if cfg.reg_tokens else None
        self.blocks = nn.ModuleList(ViTBlock(cfg) for _ in range(cfg.depth - 1))

    def forward(self, pixels: Tensor, *condition: Tensor) -> Tensor:
        """Pixels (B, 3, 224, 224) -> patch features (B, N, D). condition: for the blocks of oft.py (FiLM)."""
        x = self.patch_embed.proj(pixels)  # (B, D, 16, 16)
        x = x.flatten(2).transpose(1, 2)  # (B, N, D)
        x = x + self.pos_embed  # before the prefix tokens, which have no position

        prefix = [token.expand(len(x), -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        x = torch.cat([*prefix, x], dim=1)  # (B, 5 + N, D) for DINOv2
        for block in self.blocks:
            x = run_block(block, self.recompute, x, *condition)
        return x[:, self.num_prefix_tokens :]


class VisionBackbone(nn.Module):
    """One or two vision encoders for the same image, each with its own normalisation of the pixels."""

    def __init__(self, cfgs: list[ViTConfig]):
        super().__init__()
        self.featurizer = ViT(cfgs[0])  # DINOv2 in openvla-7b, SigLIP in openvla-v01-7b
        self.fused_featurizer = ViT(cfgs[1]) if len(cfgs) == 2 else None  # SigLIP in openvla-7b

    def encoders(self) -> list[ViT]:
        """The one or two vision encoders."""
        return [vit for vit in (self.featurizer, self.fused_featurizer) if vit is not None]

    def forward(self, pixel_values: Tensor, *condition: Tensor) -> Tensor:
        """(B, 3 or 6, 224, 224) -> (B, N, D1 + D2), the features of both encoders side by side."""
        pixels = pixel_values.split(3, dim=1)  # (B, 6, 224, 224) -> two of (B, 3, 224, 224)
        features = [vit(p, *condition) for vit, p in zip(self.encoders(), pixels, strict=True)]
        return torch.cat(features, dim=-1)


def build_projector(vision_dims: list[int], dim: int) -> nn.Sequential:
    """Build the MLP from the encoders' joined width to Llama's: two layers for one encoder, three for two."""
    vision_dim = sum(vision_dims)
    if len(vision_dims) == 1:
        layers = OrderedDict(
            fc1=nn.Linear(vision_dim, dim),
            act1=nn.GELU(),
            fc2=nn.Linear(dim, dim),
        )
    else:
        layers = OrderedDict(
            fc1=nn.Linear(vision_dim, 4 * vision_dim),
            act1=nn.GELU(),
            fc2=nn.Linear(4 * vision_dim, dim),
            act2=nn.GELU(),
            fc3=nn.Linear(dim, dim),
        )
    return nn.Sequential(layers)


def run_block(block: nn.Module, recompute: bool, *inputs) -> Tensor:
    """Run a block. recompute: keep nothing inside it for the backward pass, which runs it again instead."""
    if recompute:
        return recompute_in_backward(block, *inputs, use_reentrant=False)
    return block(*inputs)


# -----------------------------------------------------------------------------
# Language: embeddings -> hidden states


class RMSNorm(nn.Module):
    """Divide by the root mean square over the channels; https://arxiv.org/abs/1910.07467."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()  # in float32 also when the weights are bfloat16
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rope_tables(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin of position * frequency, for positions (S,) or (B, S); https://arxiv.org/abs/2104.09864."""
    channels = torch.arange(0, head_dim, 2, device=positions.device).float()
    freqs = 1.0 / theta ** (channels / head_dim)  # (C/2,)
    angles = positions[..., None].float() * freqs  # (..., S, C/2)
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(-3)  # (1, S, C) or (B, 1, S, C)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, H, S, C): channel i against channel i + C/2. (Meta's own code pairs neighbours.)"""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-x2, x1], dim=-1) * sin


class LlamaAttention(nn.Module):
    """Multi-head attention with rotary positions and, in some models, fewer key/value heads than query heads."""

    def __init__(self, cfg: LlamaConfig):
        super().__init__()
        self.num_heads = cfg.num_attention_heads
        self.num_kv_heads = cfg.num_key_value_heads or cfg.num_attention_heads
        self.head_dim = cfg.hidden_size // cfg.num_attention_heads
        self.q_proj = nn.Linear(cfg.hidden_size, cfg.hidden_size, bias=False)
        self.k_proj = nn.Linear(cfg.hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(cfg.hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(cfg.hidden_size, cfg.hidden_size, bias=False)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states (B, S, D) -> queries (B, H, S, C), keys and values (B, K, S, C), positions rotated in."""
        B, S, _ = x.shape
        q = self.q_proj(x).view(B, S, self.num_heads, self.head_dim).transpose(1, 2)  # (B, H, S, C)
        k = self.k_proj(x).view(B, S, self.num_kv_heads, self.head_dim).transpose(1, 2)  # (B, K, S, C)
        v = self.v_proj(x).view(B, S, self.num_kv_heads, self.head_dim).transpose(1, 2)  # (B, K, S, C)
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v

    def share_heads(self, x: Tensor) -> Tensor:
        """Give every query head its key/value head: (B, K, L, C) -> (B, H, L, C); https://arxiv.org/abs/2305.13245."""
        if self.num_kv_heads == self.num_heads:
            return x
        return x.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        cache: tuple[Tensor, Tensor] | None,
        start: int,
    ) -> Tensor:
        """Hidden states (B, S, D) -> (B, S, D). For the other arguments see `Llama.forward`."""
        B, S, D = x.shape
        q, k, v = self.project(x, cos, sin)

        if cache is not None:
            # Two buffers (B, K, room, C). The new tokens take the places start ... start + S - 1.
            key_cache, value_cache = cache
            key_cache[:, :, start : start + S] = k
            value_cache[:, :, start : start + S] = v
            k = key_cache[:, :, : start + S]  # (B, K, L, C)
            v = value_cache[:, :, : start + S]

        k = self.share_heads(k)
        v = self.share_heads(v)
        is_causal = mask is None and S > 1
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)  # (B, H, S, C)
        x = x.transpose(1, 2).reshape(B, S, D)
        return self.o_proj(x)


class LlamaMLP(nn.Module):
    """A gated MLP, https://arxiv.org/abs/2002.05202."""

    def __init__(self, cfg: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.silu(self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(x))


class LlamaBlock(nn.Module):
    """Attention and MLP, each on a normalised input and added to the residual stream."""

    def __init__(self, cfg: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = LlamaAttention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = LlamaMLP(cfg)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        cache: tuple[Tensor, Tensor] | None,
        start: int,
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, start)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class TokenEmbedding(nn.Embedding):
    """A row for each token. <PAD> takes the last row where it has none (base models): nobody looks at padding."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids.clamp(max=self.num_embeddings - 1))


class Llama(nn.Module):
    """Llama-2, from embeddings to hidden states; `lm_head` turns these into logits."""

    def __init__(self, cfg: LlamaConfig):
        super().__init__()
        self.cfg = cfg
        self.recompute = False  # see OpenVLA.recompute_blocks
        self.model = nn.ModuleDict({"embed_tokens": TokenEmbedding(cfg.vocab_size, cfg.hidden_size)})
        self.model.layers = nn.ModuleList(LlamaBlock(cfg) for _ in range(cfg.num_hidden_layers))
        self.model.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.lm_head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: list[tuple[Tensor, Tensor]] | None = None,
        start: int = 0,
    ) -> Tensor:
        """
        Embeddings (B, S, D) -> hidden states after the final norm (B, S, D). `lm_head` is left to the caller.

        mask: bool (B or 1, 1, S, L), True where a query may look. None: causal (then start is 0 or S is 1).
        positions: (S,) or (B, S), for the rotary embedding. None: counted from `start`.
        cache: from `new_cache`; the tokens fill its places start ... start + S - 1.
        """
        S = x.shape[1]
        assert mask is not None or start == 0 or S == 1, "several tokens after a cache need a mask"
        if positions is None:
            positions = torch.arange(start, start + S, device=x.device)
        cos, sin = self.rope(positions, x.dtype)

        for i, layer in enumerate(self.model.layers):
            layer_cache = cache[i] if cache else None
            x = run_block(layer, self.recompute, x, cos, sin, mask, layer_cache, start)
        return self.model.norm(x)

    def rope(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the tables of the rotary embedding for some positions."""
        head_dim = self.cfg.hidden_size // self.cfg.num_attention_heads
        return rope_tables(positions, head_dim, self.cfg.rope_theta, dtype)

    def attention_maps(self, x: Tensor) -> Iterator[Tensor]:
        """Yield for each layer how much each token of x (B, S, D) attends to those before it, (B, H, S, S)."""
        cos, sin = self.rope(torch.arange(x.shape[1], device=x.device), x.dtype)
        for layer in self.model.layers:
            q, k, _ = layer.self_attn.project(layer.input_layernorm(x), cos, sin)
            yield attention_weights(q, layer.self_attn.share_heads(k), is_causal=True)
            x = layer(x, cos, sin, None, None, 0)

    def new_cache(self, batch: int, room: int) -> list[tuple[Tensor, Tensor]]:
        """Return per layer a key and a value buffer (batch, K, room, C), not initialised."""
        attn = self.model.layers[0].self_attn
        shape = (batch, attn.num_kv_heads, room, attn.head_dim)
        weight = self.model.norm.weight
        return [(weight.new_empty(shape), weight.new_empty(shape)) for _ in self.model.layers]


# -----------------------------------------------------------------------------
# OpenVLA: image + instruction -> action tokens


class OpenVLA(nn.Module):
    """The whole model: vision encoders, projector, Llama."""

    def __init__(self, cfg: OpenVLAConfig):
        super().__init__()
        self.cfg = cfg
        self.vision_backbone = VisionBackbone(cfg.vision)
        self.projector = build_projector([vit.embed_dim for vit in cfg.vision], cfg.text.hidden_size)
        self.language_model = Llama(cfg.text)
        # Tensors of the checkpoint that no forward pass reads. They are kept, and written again as they came.
        self.unused: dict[str, Tensor] = {}
        # How labels are averaged to a loss. False: each counts the same, as officially. True: each row does, however
        # many labels it has; so a batch of FAST rows, which have different numbers, may be divided in any way. (Also
        # as in pi0_fast.py of github.com/Physical-Intelligence/openpi.)
        self.rows_count_equally = False
        # The ids (M,), ascending, that all labels are made of, where the other rows of lm_head are 0 and stay so. Their
        # logits are then 0, and a training step need not compute them: for a small model that is most of its work.
        # None: any id may be a label. Each label counts the same; rows_count_equally is not looked at.
        self.answer_ids: Tensor | None = None

    def init_weights(self, seed: int = 0) -> "OpenVLA":
        """
        Draw random weights for training from scratch. A layer's weights are scaled by its number of inputs, so that a
        signal keeps its size; tables that are looked up or added (embeddings, positions) have a fixed spread.
        """
        for name, values in self.random_weights(seed):
            self.get_parameter(name).data.copy_(values)
        return self

    def random_weights(self, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the whole random values of each weight, in float32: one at a time is in memory."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            values = torch.empty(parameter.shape, device="cpu")
            if name.endswith("bias"):
                values.fill_(0.0)
            elif parameter.dim() == 1:  # norms and layer scales
                values.fill_(1.0)
            elif name.endswith(("pos_embed", "_token", "embed_tokens.weight")):
                nn.init.normal_(values, 0, 0.2, generator)
            else:
                fan_in = values[0].numel()
                nn.init.normal_(values, 0, fan_in**-0.5, generator)
            if name == LM_HEAD and self.answer_ids is not None:
                is_other = torch.ones(len(values), dtype=torch.bool)
                is_other[self.answer_ids] = False
                values[is_other] = 0.0
            yield name, values

    def embed(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        """ids (B, T) and pixels (B, 3 or 6, 224, 224) -> embeddings (B, S, D) of [<s>, image patches, other text]."""
        patches = self.projector(self.vision_backbone(pixel_values))  # (B, N, D)
        text = self.language_model.model.embed_tokens(input_ids)  # (B, T, D)
        return torch.cat([text[:, :1], patches, text[:, 1:]], dim=1)

    def forward(self, input_ids: Tensor, pixel_values: Tensor, labels: Tensor | None = None):
        """
        Without labels: return logits (B, S, V) and None.

        With labels (B, T) int64, negative where nothing is trained: return the logits of the trained positions only,
        in reading order, (n, V), and their mean loss. (Logits of all S positions would be most of a step's memory.)
        With `answer_ids` the logits are those of `answer_loss`. Padding is on the right, where causal attention never
        looks.
        """
        hidden = self.language_model(self.embed(input_ids, pixel_values))  # (B, S, D)
        if labels is None:
            return self.language_model.lm_head(hidden), None

        # The hidden state of a token predicts the next one. So the first label is dropped, and the last hidden state.
        T = labels.shape[1]
        targets = labels[:, 1:]  # (B, T - 1)
        hidden = hidden[:, -T:-1]  # (B, T - 1, D)
        trained = targets >= 0
        if self.answer_ids is not None:
            return self.answer_loss(hidden[trained], targets[trained])
        logits = self.language_model.lm_head(hidden[trained])  # (n, V)
        if not self.rows_count_equally:
            return logits, F.cross_entropy(logits.float(), targets[trained])
        losses = F.cross_entropy(logits.float(), targets[trained], reduction="none")  # (n,)
        num_labels = trained.sum(dim=1, keepdim=True).expand_as(trained)[trained]  # (n,): in the row of each
        return logits, (losses / num_labels).sum() / len(labels)

    def answer_loss(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """
        Return the logits (n, M) of `answer_ids`, and the mean cross-entropy over all V ids, of hidden states (n, D) and
        the ids (n,) that they should predict. The other V - M logits are 0: exp(0) each, so V - M together. Raises
        ValueError for a label that is none of `answer_ids`.
        """
        head = self.language_model.lm_head.weight  # (V, D)
        ids = self.answer_ids.to(hidden.device)
        is_known = torch.isin(targets, ids)
        if not is_known.all():
            raise ValueError(f"label {targets[~is_known][0].item()} is none of the {len(ids)} answer_ids")

        logits = F.linear(hidden, head[ids])  # (n, M)
        log_others = math.log(len(head) - len(ids))
        others = logits.new_full((len(logits), 1), log_others)
        all_logits = torch.cat([logits, others], dim=1).float()
        return logits, F.cross_entropy(all_logits, torch.searchsorted(ids, targets))

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """
        Return the training loss of a batch of data.collate with `pixel_values`, and the ids (n,) that the model
        predicts at the trained positions.
        """
        logits, loss = self(batch["input_ids"], batch["pixel_values"], batch["labels"])
        best, place = logits.detach().max(dim=-1)
        if self.answer_ids is None:
            return loss, place
        answers = self.answer_ids.to(place.device)[place]
        return loss, torch.where(best > 0, answers, PAD_TOKEN_ID)  # below 0 any of the other ids is more likely

    @torch.inference_mode()
    def generate(
        self, input_ids: Tensor, pixel_values: Tensor, max_new_tokens: int, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """
        Generate greedily, with a key/value cache. Returns the new tokens (B, n) int64 and the logits that chose them
        (B, n, V). It does not stop at </s>: an action has a fixed number of tokens.

        input_ids: (B, T), padded on the right. lengths: (B,) numbers of real tokens; None: all T.
        Raises ValueError if the context is too short.
        """
        decoder = GreedyDecoder()
        tokens = self.generate_with(decoder, input_ids, pixel_values, max_new_tokens, lengths)
        return tokens, torch.stack(decoder.logits, dim=1)

    @torch.inference_mode()
    def generate_with(
        self,
        decoder,
        input_ids: Tensor,
        pixel_values: Tensor,
        max_new_tokens: int,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """
        Generate the tokens that a decoder chooses, until it is done. Returns them, (B, n) int64.

        decoder: GreedyDecoder below, ChunkDecoder of fast.py, or Sampler of finetune_rl.py. The other arguments, and
        what it raises: as `generate`.
        """
        llama = self.language_model
        x = self.embed(input_ids, pixel_values)  # (B, S, D)
        B, S = x.shape[:2]
        room = S + max_new_tokens
        limit = self.cfg.text.max_position_embeddings
        if room > limit:
            raise ValueError(f"prompt too long: {S} tokens with the image and {max_new_tokens} new, of {limit} at most")

        # `ends` is the place behind the last real token of each row. New tokens come at S, behind the padding.
        if lengths is None:
            ends = torch.full((B,), S, device=x.device)
        else:
            ends = S - input_ids.shape[1] + lengths
        places = torch.arange(room, device=x.device)
        visible = (places < ends[:, None]) | (places >= S)  # (B, room): padding stays hidden

        # Image and prompt in one pass; its last real token predicts the first new one.
        cache = llama.new_cache(B, room)
        hidden = llama(x, cache=cache)
        hidden = hidden[torch.arange(B, device=x.device), ends - 1, None]  # (B, 1, D)

        tokens = []  # n of (B, 1)
        for i in range(max_new_tokens):
            logits = llama.lm_head(hidden)  # (B, 1, V)
            tokens.append(decoder.choose(logits[:, 0])[:, None])
            if decoder.is_done:
                break
            if i + 1 < max_new_tokens:
                x = llama.model.embed_tokens(tokens[-1])  # (B, 1, D)
                mask = None if lengths is None else visible[:, None, None, : S + i + 1]
                positions = ends[:, None] + i
                hidden = llama(x, mask, positions, cache, start=S + i)
        return torch.cat(tokens, dim=1)

    # What training asks of a model

    def transformer_blocks(self) -> list[nn.Module]:
        """Return the blocks of both vision encoders and of Llama."""
        blocks = []
        for vit in self.vision_backbone.encoders():
            blocks += vit.blocks
        blocks += self.language_model.model.layers
        return blocks

    def recompute_blocks(self):
        """Keep only the blocks' inputs for the backward pass, which runs each block again: less memory, more time."""
        for vit in self.vision_backbone.encoders():
            vit.recompute = True
        self.language_model.recompute = True

    # Files

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
        progress: Callable = no_progress,
    ) -> "OpenVLA":
        """Load a folder in Hugging Face layout, see `load_weights`. (`open_checkpoint` says more of a broken one.)"""
        folder = Path(folder)
        with torch.device("meta"):  # no memory until the weights arrive
            model = cls(OpenVLAConfig.from_dict(read_config(folder)))
        return model.load_weights(weight_map(folder), dtype, device, progress)

    def load_weights(
        self,
        files: dict[str, Path],
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        progress: Callable = no_progress,
        copy: bool = False,
    ) -> "OpenVLA":
        """
        Replace all weights by those of safetensors files. Raises RuntimeError if one is missing or has another shape.

        files: tensor name -> file. dtype: of the floating-point weights. progress: show_progress or no_progress.
        copy: without it, weights that need no conversion stay mapped to the file, and use no memory of their own.
        """
        opened = {file: safe_open(file, framework="pt") for file in set(files.values())}
        weights = {}
        for name in progress(files, "loading", "tensors"):
            file = files[name]
            tensor = opened[file].get_tensor(name)  # memory-mapped: the disk is read when the values are used
            if is_unused(name, self.cfg):
                self.unused[name] = tensor
                continue

            target_dtype = dtype if tensor.is_floating_point() else tensor.dtype  # quantized codes stay integers
            weights[name] = tensor.to(device, target_dtype, copy=copy)
            if weights[name] is not tensor:
                # That copy has pulled the file's pages into memory. Opening the file again lets the system drop
                # them, so that loading needs room for the model and one tensor, not for the model twice.
                opened[file] = safe_open(file, framework="pt")
        self.load_state_dict(weights, strict=True, assign=True)
        return self.eval()

    def read_unused(self, files: dict[str, Path]):
        """Keep the tensors that no forward pass reads, mapped to their files. files: as for `load_weights`."""
        for name, file in files.items():
            if is_unused(name, self.cfg):
                with safe_open(file, framework="pt") as opened:
                    self.unused[name] = opened.get_tensor(name)

    def save_pretrained(
        self,
        folder: str | Path,
        dtype: torch.dtype | None = None,
        gather: Callable[[Tensor], Tensor] = Tensor.detach,
        is_writer: bool = True,
    ):
        """
        Write config.json and safetensors of at most 5 GB each, which `from_pretrained` and the official classes read.
        Files appear whole, the index last. dtype None: each parameter keeps its own. `unused` is written as it came.

        gather: returns the whole of a weight that is sharded over many processes. All of them call this method, and one
        of them is the writer. It holds one file at a time.
        """
        folder = Path(folder)
        tensors = self.state_dict() | self.unused
        sizes = {name: tensor.numel() * (dtype or tensor.dtype).itemsize for name, tensor in tensors.items()}
        shards = split_into_shards(sizes, SHARD_BYTES)

        files = {}
        for i, names in enumerate(shards):
            file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            shard = {}  # converted one file at a time: a second copy of all weights may not fit into memory
            for name in names:
                files[name] = file
                whole = gather(tensors[name])
                if is_writer:
                    stored_dtype = None if name in self.unused else dtype
                    shard[name] = whole.detach().to("cpu", stored_dtype).contiguous()
            if is_writer:
                with atomic_write(folder / file) as temporary:
                    save_file(shard, temporary, {"format": "pt"})
        if not is_writer:
            return

        saved_dtype = dtype or next(self.parameters()).dtype
        config = {**self.cfg.to_dict(), "torch_dtype": str(saved_dtype).removeprefix("torch.")}
        write_json(folder / "config.json", config)
        write_json(folder / INDEX, {"metadata": {}, "weight_map": files})


class GreedyDecoder:
    """Chooses the most likely token at each step, and keeps the logits."""

    is_done = False  # an action has a fixed number of tokens

    def __init__(self):
        self.logits = []  # n of (B, V)

    def choose(self, logits: Tensor) -> Tensor:
        """Return the next tokens (B,) int64, given their logits (B, V)."""
        self.logits.append(logits)
        return logits.argmax(-1)


# -----------------------------------------------------------------------------
# A checkpoint's files


def split_into_shards(sizes: dict[str, int], most: int) -> list[list[str]]:
    """Distribute tensors, given by name and bytes, in their order to files of at most `most` bytes."""
    shards = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = most
        shards[-1].append(name)
        room -= size
    return shards


def is_unused(name: str, cfg: OpenVLAConfig) -> bool:
    """
    True for tensors of the released files that no forward pass reads. OpenVLA takes its patch features from the
    second-to-last ViT block, so the last block, the final norm and SigLIP's attention pool never run.
    """
    prefixes = ("vision_backbone.featurizer.", "vision_backbone.fused_featurizer.")
    for vit, prefix in zip(cfg.vision, prefixes, strict=False):
        if name.startswith(prefix):
            last_block = f"blocks.{vit.depth - 1}."
            return name.removeprefix(prefix).startswith((last_block, "norm.", "attn_pool."))
    return False


def read_config(folder: Path) -> dict:
    """Read config.json. Fine-tuned models have a dataset_statistics.json, which takes the place of its norm_stats."""
    hf = read_json_object(folder / "config.json")
    norm_stats = hf.get("norm_stats") or {}
    if not isinstance(norm_stats, dict):
        raise ValueError(f"norm_stats is {norm_stats!r:.60}, it must name datasets and their statistics")
    if (folder / "dataset_statistics.json").is_file():
        norm_stats = read_json_object(folder / "dataset_statistics.json")
    return {**hf, "norm_stats": norm_stats}


def weight_map(folder: Path) -> dict[str, Path]:
    """
    Return tensor name -> safetensors file, from the index or, without one, from model.safetensors. Raises ValueError
    if the index is none, names a file outside the folder, or does not say which of two sets of weights is meant.
    """
    index = folder / INDEX
    single = folder / "model.safetensors"
    if not index.is_file():
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single)

    files = read_json_object(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) and file for file in files.values()):
        raise ValueError(f"{index}: not an index of weight files, it has no weight_map of names; download it again")
    for file in set(files.values()):
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise ValueError(f"{index}: it points to {file}, outside the folder; download it again")
    if single.is_file() and single.name not in files.values():
        raise ValueError(
            f"{folder}: it holds two sets of weights, model.safetensors and those that {INDEX} names, and they may "
            f"differ (transformers reads model.safetensors); remove the one that is not meant"
        )
    return {name: folder / file for name, file in files.items()}
