"""
OpenVLA, a vision-language-action model: all of it in this file.

Two ViTs (DINOv2 and SigLIP) read a picture as patches. A projector takes their joined features into the
embedding space of a Llama-2, between <s> and the instruction. Llama writes one token per action dimension.

    pixel_values (B, 6, 224, 224) -> ViTs (B, 256, 1024 + 1152) -> projector (B, 256, 4096) --.
    input_ids (B, T) -> embed_tokens (B, T, 4096) --> [<s>, patches, instruction] -> Llama -> logits

OpenVLA https://arxiv.org/abs/2406.09246, Prismatic https://arxiv.org/abs/2402.07865, Llama 2
https://arxiv.org/abs/2307.09288, DINOv2 https://arxiv.org/abs/2304.07193, SigLIP https://arxiv.org/abs/2303.15343.
Parameters are named as in the released checkpoints: weights load strictly, nothing is renamed.

Axes: B batch, N image patches, T text tokens, S = N + T sequence, L keys seen, D width, H attention
heads, K key/value heads, C channels of a head (D = H * C), V vocabulary.
"""

import json
import os
import re
from collections import OrderedDict
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"


@dataclass
class ViTConfig:
    """One vision tower; field names as in timm. The defaults are DINOv2 ViT-L/14 with registers."""

    embed_dim: int = 1024
    depth: int = 24  # as released; the last block is never run, see ViT
    num_heads: int = 16
    patch_size: int = 14
    img_size: int = 224
    mlp_dim: int = 4096
    cls_token: bool = True
    reg_tokens: int = 4  # https://arxiv.org/abs/2309.16588
    layer_scale: bool = True


TOWERS = {  # "timm_model_ids" in config.json -> the released towers: DINOv2 ViT-L/14, SigLIP SO400M/14
    "vit_large_patch14_reg4_dinov2.lvd142m": ViTConfig(),
    "vit_so400m_patch14_siglip_224": ViTConfig(1152, 27, 16, 14, 224, 4304, False, 0, False),
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


@dataclass
class OpenVLAConfig:
    vision: list[ViTConfig] = field(default_factory=lambda: list(TOWERS.values()))  # one or two
    text: LlamaConfig = field(default_factory=lambda: LlamaConfig(vocab_size=32064))  # 32000 + <PAD>, in steps of 64
    extra: dict = field(default_factory=dict)  # the rest of config.json, as it is

    @classmethod
    def from_dict(cls, hf: dict) -> "OpenVLAConfig":
        """From the content of a config.json. Raises ValueError for an architecture that is not in this file."""
        text, names = hf.get("text_config", {}), hf.get("timm_model_ids", [])
        if text.get("rope_scaling") or text.get("hidden_act", "silu") != "silu":
            raise ValueError(f"config.json: this Llama has no rope_scaling and only silu, text_config is {text}")
        if "vision_configs" in hf:  # our own key: towers that are not the released ones
            vision = [ViTConfig(**v) for v in hf["vision_configs"]]
        elif names and TOWERS.keys() >= set(names):
            vision = [replace(TOWERS[n], img_size=size) for n, size in zip(names, hf["image_sizes"], strict=True)]
        else:
            raise ValueError(f"config.json: timm_model_ids is {names}, this code knows {list(TOWERS)}")
        llama = LlamaConfig(**{f.name: text[f.name] for f in fields(LlamaConfig) if f.name in text})
        return cls(vision, llama, {k: v for k, v in hf.items() if k not in ("text_config", "vision_configs")})

    def to_dict(self) -> dict:
        """The content of a config.json that this code and the official classes read."""
        n, hf = len(self.vision), dict(model_type="openvla", architectures=["OpenVLAForActionPrediction"])
        hf |= dict(arch_specifier=f"no-align+{'fused-' * (n == 2)}gelu-mlp", use_fused_vision_backbone=n == 2)
        hf |= dict(vision_backbone_id=("siglip-vit-so400m", "dinosiglip-vit-so-224px")[n - 1], pad_token_id=32000)
        hf |= dict(n_action_bins=256, llm_backbone_id="llama2-7b-pure", image_sizes=[v.img_size for v in self.vision])
        text = dict(model_type="llama", pad_token_id=32000, **asdict(self.text))
        hf |= {"timm_model_ids": list(TOWERS)[-n:], **self.extra, "text_config": text}
        released = self.vision == OpenVLAConfig.from_dict(hf).vision
        return hf if released else hf | dict(vision_configs=[asdict(v) for v in self.vision])


# -----------------------------------------------------------------------------
# Vision: pixels -> patch features


class ViTAttention(nn.Module):
    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.num_heads = cfg.num_heads
        self.qkv = nn.Linear(cfg.embed_dim, 3 * cfg.embed_dim)
        self.proj = nn.Linear(cfg.embed_dim, cfg.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, N, C)
        x = F.scaled_dot_product_attention(q, k, v)  # every patch sees every patch
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class LayerScale(nn.Module):
    """Learned gain per channel on a residual branch, https://arxiv.org/abs/2103.17239"""

    def __init__(self, dim: int):
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale_factor


class ViTBlock(nn.Module):
    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.embed_dim, eps=1e-6)
        self.attn = ViTAttention(cfg)
        self.ls1 = LayerScale(cfg.embed_dim) if cfg.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(cfg.embed_dim, eps=1e-6)
        fc1, fc2 = nn.Linear(cfg.embed_dim, cfg.mlp_dim), nn.Linear(cfg.mlp_dim, cfg.embed_dim)
        self.mlp = nn.Sequential(OrderedDict(fc1=fc1, act=nn.GELU(), fc2=fc2))
        self.ls2 = LayerScale(cfg.embed_dim) if cfg.layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """Patch features of the second-to-last block. What the weights hold beyond it never runs: see `is_unused`."""

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.num_prefix_tokens = int(cfg.cls_token) + cfg.reg_tokens
        conv = nn.Conv2d(3, cfg.embed_dim, kernel_size=cfg.patch_size, stride=cfg.patch_size)
        self.patch_embed = nn.ModuleDict(dict(proj=conv))
        self.pos_embed = nn.Parameter(torch.zeros(1, (cfg.img_size // cfg.patch_size) ** 2, cfg.embed_dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.embed_dim)) if cfg.cls_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, cfg.reg_tokens, cfg.embed_dim)) if cfg.reg_tokens else None
        self.blocks = nn.ModuleList(ViTBlock(cfg) for _ in range(cfg.depth - 1))

    def forward(self, pixels: Tensor, *condition: Tensor) -> Tensor:
        x = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2)  # (B, D, 16, 16) -> (B, N, D)
        x = x + self.pos_embed  # before the prefix tokens, which have no position
        prefix = [t.expand(len(x), -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        x = torch.cat([*prefix, x], dim=1)  # (B, 5 + N, D) for DINOv2
        for block in self.blocks:
            x = block(x, *condition)  # the blocks here take none; oft.py's take the instruction
        return x[:, self.num_prefix_tokens :]


class VisionBackbone(nn.Module):
    """One or two ViTs that look at the same picture, each with its own normalisation of the pixels."""

    def __init__(self, cfgs: list[ViTConfig]):
        super().__init__()
        self.featurizer = ViT(cfgs[0])  # DINOv2 in openvla-7b, SigLIP in openvla-v01-7b
        self.fused_featurizer = ViT(cfgs[1]) if len(cfgs) == 2 else None  # SigLIP in openvla-7b

    def forward(self, pixel_values: Tensor, *condition: Tensor) -> Tensor:
        towers = [vit for vit in (self.featurizer, self.fused_featurizer) if vit is not None]
        pixels = pixel_values.split(3, dim=1)  # (B, 6, 224, 224) -> two of (B, 3, 224, 224)
        return torch.cat([vit(p, *condition) for vit, p in zip(towers, pixels, strict=True)], dim=-1)  # (B, N, D1 + D2)


def build_projector(vision_dims: list[int], dim: int) -> nn.Sequential:
    """MLP from the towers' joined width to the language model's: two layers for one tower, three for two."""
    D, hidden = sum(vision_dims), dim if len(vision_dims) == 1 else 4 * sum(vision_dims)
    mlp = OrderedDict(fc1=nn.Linear(D, hidden), act1=nn.GELU(), fc2=nn.Linear(hidden, dim))
    return nn.Sequential(mlp if len(vision_dims) == 1 else mlp | OrderedDict(act2=nn.GELU(), fc3=nn.Linear(dim, dim)))


# -----------------------------------------------------------------------------
# Language: embeddings -> hidden states


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()  # statistics in fp32 also when the weights are bf16
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rope_tables(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position * frequency for positions (S,) or (B, S)."""
    freqs = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angles = positions[..., None].float() * freqs  # (..., S, C/2)
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(-3)  # (1, S, C) or (B, 1, S, C)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel i against channel i + C/2: Hugging Face's pairing, not Meta's neighbours."""
    x1, x2 = x.chunk(2, dim=-1)  # x is (B, H, S, C)
    return x * cos + torch.cat([-x2, x1], dim=-1) * sin


class LlamaAttention(nn.Module):
    def __init__(self, cfg: LlamaConfig):
        super().__init__()
        self.num_heads, self.num_kv_heads = cfg.num_attention_heads, cfg.num_key_value_heads or cfg.num_attention_heads
        self.head_dim = cfg.hidden_size // cfg.num_attention_heads
        self.q_proj = nn.Linear(cfg.hidden_size, cfg.hidden_size, bias=False)
        self.k_proj = nn.Linear(cfg.hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(cfg.hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(cfg.hidden_size, cfg.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: tuple | None, start: int):
        B, S, D = x.shape
        q = self.q_proj(x).view(B, S, self.num_heads, self.head_dim).transpose(1, 2)  # (B, H, S, C)
        k = self.k_proj(x).view(B, S, self.num_kv_heads, self.head_dim).transpose(1, 2)  # (B, K, S, C)
        v = self.v_proj(x).view(B, S, self.num_kv_heads, self.head_dim).transpose(1, 2)  # (B, K, S, C)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if cache is not None:  # two buffers (B, K, room, C); these tokens take the places start ... start + S - 1
            for buffer, new in zip(cache, (k, v), strict=True):
                buffer[:, :, start : start + S] = new
            k, v = (buffer[:, :, : start + S] for buffer in cache)  # (B, K, L, C)
        if self.num_kv_heads != self.num_heads:  # grouped-query attention
            k, v = (t.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1) for t in (k, v))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and S > 1)
        return self.o_proj(x.transpose(1, 2).reshape(B, S, D))


class LlamaMLP(nn.Module):
    def __init__(self, cfg: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nn.Module):
    def __init__(self, cfg: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = LlamaAttention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = LlamaMLP(cfg)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: tuple | None, start: int):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, start)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    def __init__(self, cfg: LlamaConfig):
        super().__init__()
        self.cfg = cfg
        self.model = nn.ModuleDict(dict(embed_tokens=nn.Embedding(cfg.vocab_size, cfg.hidden_size)))
        self.model.layers = nn.ModuleList(LlamaBlock(cfg) for _ in range(cfg.num_hidden_layers))
        self.model.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.lm_head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)

    def forward(self, x: Tensor, mask=None, positions=None, cache=None, start: int = 0) -> Tensor:
        """
        Embeddings (B, S, D) -> hidden states after the final norm (B, S, D); `lm_head` is left to the caller.
        mask: bool (B or 1, 1, S, L), True where a query may look; None is causal (needs start 0 or S 1).
        positions: (S,) or (B, S), for the rotary embedding; None counts from `start`.
        cache: from `new_cache`, filled at places start ... start + S - 1.
        """
        assert mask is not None or start == 0 or x.shape[1] == 1, "several tokens after a cache need a mask"
        if positions is None:
            positions = torch.arange(start, start + x.shape[1], device=x.device)
        head_dim = self.cfg.hidden_size // self.cfg.num_attention_heads
        cos, sin = rope_tables(positions, head_dim, self.cfg.rope_theta, x.dtype)
        for i, layer in enumerate(self.model.layers):
            x = layer(x, cos, sin, mask, cache[i] if cache else None, start)
        return self.model.norm(x)

    def new_cache(self, batch: int, room: int) -> list[tuple[Tensor, Tensor]]:
        """Per layer a key and a value buffer (batch, K, room, C)."""
        attn, new = self.model.layers[0].self_attn, self.model.norm.weight.new_empty
        shape = (batch, attn.num_kv_heads, room, attn.head_dim)
        return [(new(shape), new(shape)) for _ in self.model.layers]


# -----------------------------------------------------------------------------
# OpenVLA: picture + instruction -> action tokens


class OpenVLA(nn.Module):
    def __init__(self, cfg: OpenVLAConfig):
        super().__init__()
        self.cfg = cfg
        self.vision_backbone = VisionBackbone(cfg.vision)
        self.projector = build_projector([v.embed_dim for v in cfg.vision], cfg.text.hidden_size)
        self.language_model = Llama(cfg.text)
        self.unused: dict[str, Tensor] = {}  # tensors of the checkpoint that never run, written again as they came

    def init_weights(self, seed: int = 0):
        """Random weights for training from scratch. Layers keep a signal's size; tables are looked up or added."""
        g = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            p.data.fill_(0.0 if name.endswith("bias") else 1.0)
            if p.dim() > 1:
                table = name.endswith(("pos_embed", "_token", "embed_tokens.weight"))
                nn.init.normal_(p, 0, 0.2 if table else p[0].numel() ** -0.5, g)
        return self

    def embed(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        """[<s>, image patches, rest of the text] as embeddings: (B, T), (B, 3 or 6, 224, 224) -> (B, S, D)."""
        patches = self.projector(self.vision_backbone(pixel_values))  # (B, N, D)
        text = self.language_model.model.embed_tokens(input_ids)  # (B, T, D)
        return torch.cat([text[:, :1], patches, text[:, 1:]], dim=1)

    def forward(self, input_ids: Tensor, pixel_values: Tensor, labels: Tensor | None = None):
        """
        Without labels: logits (B, S, V) and None. With labels (B, T) int64, negative where nothing is trained:
        the logits of the n trained positions only, in reading order, (n, V), and their mean loss. (Logits of all
        S positions would be most of a step's memory.) Padding is on the right, where causal attention never looks.
        """
        hidden = self.language_model(self.embed(input_ids, pixel_values))  # (B, S, D)
        if labels is None:
            return self.language_model.lm_head(hidden), None
        T = labels.shape[1]
        trained = labels[:, 1:] >= 0  # (B, T - 1); the token before predicts, so drop the first label
        logits = self.language_model.lm_head(hidden[:, -T:-1][trained])  # (n, V)
        return logits, F.cross_entropy(logits.float(), labels[:, 1:][trained])

    @torch.inference_mode()
    def generate(self, input_ids: Tensor, pixel_values: Tensor, max_new_tokens: int, lengths: Tensor | None = None):
        """
        Greedy decoding with a key/value cache. input_ids (B, T) padded on the right, lengths (B,) of real tokens
        (None: all T). Returns new tokens (B, n) int64 and the logits that chose them (B, n, V). Does not stop at
        </s>: an action has a fixed number of tokens. Raises ValueError if the context is too short.
        """
        x = self.embed(input_ids, pixel_values)  # (B, S, D)
        B, S = x.shape[:2]
        if S + max_new_tokens > (limit := self.cfg.text.max_position_embeddings):
            raise ValueError(f"prompt too long: {S} tokens with the image and {max_new_tokens} new, of {limit} at most")
        ends = torch.full((B,), S, device=x.device) if lengths is None else S - input_ids.shape[1] + lengths
        cache = self.language_model.new_cache(B, S + max_new_tokens)
        hidden = self.language_model(x, cache=cache)
        hidden = hidden[torch.arange(B, device=x.device), ends - 1, None]  # (B, 1, D), of the last real token
        keys = torch.arange(S + max_new_tokens, device=x.device)
        visible = (keys < ends[:, None]) | (keys >= S)  # (B, room): padding stays hidden, new tokens come at S
        tokens, logits = [], []  # n of (B, 1) and (B, 1, V)
        for i in range(max_new_tokens):
            logits.append(self.language_model.lm_head(hidden))
            tokens.append(logits[-1].argmax(-1))
            if i + 1 < max_new_tokens:
                x = self.language_model.model.embed_tokens(tokens[-1])  # (B, 1, D)
                mask = None if lengths is None else visible[:, None, None, : S + i + 1]
                hidden = self.language_model(x, mask, ends[:, None] + i, cache, start=S + i)
        return torch.cat(tokens, dim=1), torch.cat(logits, dim=1)

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.bfloat16, device="cpu", progress=iter, prepare=None) -> "OpenVLA":
        """
        Load a folder in Hugging Face layout; raises if a tensor is missing or has another shape. Weights stay mapped if
        dtype and device fit. progress: wraps their names. prepare: changes the empty model; weights are then copied.
        """
        folder = Path(folder)
        with torch.device("meta"):  # no memory until the weights arrive
            model = (prepare or nn.Identity())(cls(OpenVLAConfig.from_dict(read_config(folder))))
        state, where = {}, weight_map(folder)
        maps = {file: safe_open(folder / file, framework="pt") for file in set(where.values())}
        for name in progress(where):
            tensor = maps[where[name]].get_tensor(name)  # mapped: its bytes are read when they are used
            kind = dtype if tensor.is_floating_point() else None
            if is_unused(name, model.cfg):
                model.unused[name] = tensor
            elif state.setdefault(name, tensor.to(device, kind, copy=bool(prepare))) is not tensor:
                maps[where[name]] = safe_open(folder / where[name], framework="pt")  # lets the pages just copied go
        model.load_state_dict(state, strict=True, assign=True)
        return model.eval()

    def save_pretrained(self, folder, dtype: torch.dtype | None = None):
        """
        Write config.json and safetensors of at most 5 GB each, as `from_pretrained` and the official classes read
        them; files appear whole, the index last. dtype None keeps each parameter's; `unused` goes as it came.
        """
        tensors, shards, room = self.state_dict() | self.unused, [], 0
        for name, tensor in tensors.items():
            room -= (nbytes := tensor.numel() * (dtype or tensor.dtype).itemsize)
            if room < 0:
                shards, room = [*shards, []], SHARD_BYTES - nbytes
            shards[-1].append(name)
        files = {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards)}
        for file, names in files.items():
            part = {k: tensors[k].detach().to("cpu", None if k in self.unused else dtype).contiguous() for k in names}
            write_atomically(Path(folder) / file, lambda tmp, part=part: save_file(part, tmp, {"format": "pt"}))
        saved = {"torch_dtype": str(dtype or next(self.parameters()).dtype).removeprefix("torch.")}
        write_json(Path(folder) / "config.json", self.cfg.to_dict() | saved)
        write_json(Path(folder) / INDEX, {"metadata": {}, "weight_map": {k: f for f, ks in files.items() for k in ks}})


def is_unused(name: str, cfg: OpenVLAConfig) -> bool:
    """True for the released tensors that never run: last ViT block, final ViT norm, SigLIP's attention pool."""
    match = re.match(r"vision_backbone\.(fused_)?featurizer\.(?:(norm|attn_pool)|blocks\.(\d+))\.", name)
    return bool(match) and (match[2] is not None or int(match[3]) == cfg.vision[match[1] is not None].depth - 1)


def read_config(folder: Path) -> dict:
    """config.json, its norm_stats joined by a dataset_statistics.json (where fine-tuned models keep theirs)."""
    hf, extra = json.loads((folder / "config.json").read_text("utf-8")), folder / "dataset_statistics.json"
    more = json.loads(extra.read_text("utf-8")) if extra.is_file() else {}
    return hf | {"norm_stats": (hf.get("norm_stats") or {}) | more}


def weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> safetensors file in the folder, from the index or, without one, from model.safetensors."""
    if (folder / INDEX).is_file():
        return json.loads((folder / INDEX).read_text("utf-8"))["weight_map"]
    with safe_open(folder / "model.safetensors", framework="pt") as f:
        return dict.fromkeys(f.keys(), "model.safetensors")


def write_json(path: Path, content: dict):
    write_atomically(path, lambda tmp: tmp.write_text(json.dumps(content, indent=2), encoding="utf-8"))


def write_atomically(path: Path, write):
    """Call write(a path beside it), flush to disk, rename: `path` is the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write(tmp)
    with open(tmp, "rb+") as f:
        os.fsync(f.fileno())
    os.replace(tmp, path)
