"""
Words and actions to token ids, and back. Every encode stands beside its decode.

    "put the spoon on the towel" -> prompt -> [1, 512, 29901, ..., 29901] -> + [29871]
    action (A,), metres and radians -> normalized to [-1, 1] -> 256 bins -> ids 31999 (-1) ... 31744 (+1)

A training sequence is: prompt ids, 29871, one id per action dimension, 2 (</s>). Ids are joined as ids, never as
text: the official code decodes the action to characters and tokenizes prompt and action in one go, which gives the
same ids because no pair of action characters merges, and 29871 is what is left of the blank between the two.

OpenVLA section 3.2, https://arxiv.org/abs/2406.09246; prismatic/vla/action_tokenizer.py and
prismatic/vla/datasets/rlds/utils/data_utils.py of github.com/openvla/openvla.

Axes: B batch, T text tokens, A dimensions of an action.
"""

import json
import re
from pathlib import Path

import numpy as np
import torch

BOS, EOS, PAD = 1, 2, 32000  # <s>, </s>, and the one token that OpenVLA adds to Llama's
BLANK = 29871  # the piece of a lone blank; stands between "Out:" and the action
VOCAB_SIZE = 32000  # Llama's own pieces; embeddings have 32064 rows, but actions count down from here
NUM_BINS = 256  # bin edges; there are 255 bins between them
IGNORE_INDEX = -100  # label of a position that is not trained on, as in torch.nn.functional.cross_entropy

EDGES = np.linspace(-1.0, 1.0, NUM_BINS)  # float64: float32 edges would put 127 of them into the wrong bin
CENTERS = (EDGES[:-1] + EDGES[1:]) / 2  # (255,)

PROMPT = "In: What action should the robot take to {instruction}?\nOut:"
PROMPT_VICUNA = (  # openvla-v01-7b
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    "USER: What action should the robot take to {instruction}? ASSISTANT:"
)


# -----------------------------------------------------------------------------
# Text


class Tokenizer:
    """
    Llama-2's sentencepiece model with the ids of Hugging Face's LlamaTokenizerFast, which OpenVLA was trained with.
    `path` is a tokenizer.model or a folder that holds one. Raises FileNotFoundError or ValueError if it is not one.
    """

    def __init__(self, path: str | Path, prompt: str = PROMPT):
        from sentencepiece import SentencePieceProcessor

        path = Path(path) / "tokenizer.model" if Path(path).is_dir() else Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; every checkpoint folder has its tokenizer.model")
        self.model_bytes, self.prompt = path.read_bytes(), prompt
        if self.model_bytes.startswith(b"version https://git-lfs"):
            raise ValueError(f"{path}: a Git LFS pointer, not the tokenizer; run `git lfs pull` in its folder")
        try:
            self.sp = SentencePieceProcessor(model_proto=self.model_bytes)
        except RuntimeError:
            raise ValueError(f"{path}: not a sentencepiece model; copy tokenizer.model from openvla-7b") from None
        if (found := (self.sp.vocab_size(), self.sp.piece_to_id("▁"))) != (VOCAB_SIZE, BLANK):
            raise ValueError(f"{path}: vocabulary size and blank id are {found}, Llama-2's are {VOCAB_SIZE, BLANK}")

    def files(self) -> dict[str, bytes]:
        """File name -> content of what Hugging Face's tokenizer wants to find in a checkpoint folder."""
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<PAD>"}
        special = {"0": "<unk>", "1": "<s>", "2": "</s>", "32000": "<PAD>"}
        flags = dict(lstrip=False, normalized=False, rstrip=False, single_word=False)
        config = dict(tokenizer_class="LlamaTokenizer", add_bos_token=True, add_eos_token=False, legacy=False)
        config |= dict(padding_side="right", model_max_length=2048, clean_up_tokenization_spaces=False, **names)
        config["added_tokens_decoder"] = {i: dict(content=t, special=True, **flags) for i, t in special.items()}
        contents = {"tokenizer_config.json": config, "added_tokens.json": {"<PAD>": PAD}}
        contents["special_tokens_map.json"] = {k: dict(content=t, **flags) for k, t in names.items()}
        return {k: json.dumps(v, indent=2).encode() for k, v in contents.items()} | {
            "tokenizer.model": self.model_bytes
        }

    def encode(self, text: str) -> list[int]:
        """Text to ids with <s> in front. Special tokens written out in the text become their ids."""
        special = {"<unk>": [0], "<s>": [BOS], "</s>": [EOS], "<PAD>": [PAD]}
        parts = re.split("(<unk>|<s>|</s>|<PAD>)", text)  # what follows a special token starts with a blank again
        return [BOS] + [i for part in parts if part for i in special.get(part) or self.sp.encode(part)]

    def decode(self, ids) -> str:
        """Ids to text, without special tokens; inverse of `encode` for text that has none."""
        return self.sp.decode([int(i) for i in ids if 2 < int(i) < VOCAB_SIZE])

    def encode_prompt(self, instruction: str) -> list[int]:
        """Instruction to the ids that stand before an action, the blank included."""
        instruction = instruction.lower().replace("<image>", "")  # the official prompt builder drops <image> too
        ids = self.encode(self.prompt.format(instruction=instruction))
        return ids if ids[-1] == BLANK else [*ids, BLANK]

    def encode_example(self, instruction: str, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        Instruction and normalized action (A,) or chunk (K, A), in [-1, 1] -> input_ids (T,) int64 and labels (T,)
        int64: IGNORE_INDEX but for the action's ids and </s>. OpenVLA section 3.3.
        """
        answer = [*encode_action(np.asarray(action).reshape(-1)).tolist(), EOS]
        prompt = self.encode_prompt(instruction)
        return np.array(prompt + answer), np.array([IGNORE_INDEX] * len(prompt) + answer)


def make_standin(path: str | Path, words: tuple = ()):
    """
    Write a tokenizer.model with Llama-2's layout (32,000 pieces, bytes at 3 ... 258, the blank at 29871) that knows
    only the prompt's words, `words`, letters and bytes: for toy worlds and tests, where Llama's own may not be given
    away. Any text is encoded without loss; models trained with it need it.
    """
    from sentencepiece import sentencepiece_model_pb2 as pb

    known = [f"▁{w}" for w in dict.fromkeys([*PROMPT.split("{")[0].split(), *words])] + ["Out:"]
    texts = dict.fromkeys([*known, *(chr(c) for c in range(33, 127))])
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *texts]
    pieces += [f"<unused{i}>" for i in range(len(pieces), VOCAB_SIZE)]
    pieces[BLANK] = "▁"
    model, Piece = pb.ModelProto(), pb.ModelProto.SentencePiece
    for i, piece in enumerate(pieces):
        kind = Piece.UNKNOWN if i == 0 else Piece.CONTROL if i < 3 else Piece.BYTE if i < 259 else Piece.NORMAL
        score = -1.0 if piece in known else -10.0  # a whole word beats its letters
        model.pieces.add(piece=piece, score=score, type=Piece.UNUSED if piece.startswith("<unused") else kind)
    model.trainer_spec.MergeFrom(pb.TrainerSpec(model_type=1, vocab_size=VOCAB_SIZE, byte_fallback=True, pad_id=-1))
    flags = dict(add_dummy_prefix=True, remove_extra_whitespaces=False, escape_whitespaces=True)
    model.normalizer_spec.MergeFrom(pb.NormalizerSpec(name="identity", **flags))
    Path(path).write_bytes(model.SerializeToString())


def prompt_for(config: dict) -> str:
    """The prompt that a model was trained with, told from its config.json: Vicuna's for openvla-v01-7b."""
    llm = f"{config.get('llm_backbone_id', '')} {config.get('hf_llm_id', '')}".lower()
    return PROMPT_VICUNA if "vicuna" in llm else PROMPT


def pad_sequences(sequences: list, value: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences of ids to (B, T) int64, padded on the right with `value`, and their lengths (B,) int64."""
    lengths = torch.tensor([len(s) for s in sequences])
    out = torch.full((len(sequences), int(lengths.max())), value, dtype=torch.long)
    for row, sequence in zip(out, sequences, strict=True):
        row[: len(sequence)] = torch.as_tensor(sequence)
    return out, lengths


# -----------------------------------------------------------------------------
# Actions


def encode_action(action):
    """Normalized action of any shape, array or tensor -> ids, int64. Values beyond [-1, 1] are clipped."""
    if isinstance(action, torch.Tensor):
        edges = torch.as_tensor(EDGES, device=action.device)
        return VOCAB_SIZE - torch.bucketize(action.double().clamp(-1, 1), edges, right=True)
    return VOCAB_SIZE - np.digitize(np.clip(np.asarray(action, np.float64), -1, 1), EDGES).astype(np.int64)


def decode_action(ids):
    """Ids -> centres of their bins, float64, in [-1, 1]. Other ids fall on the nearer end, as officially."""
    if isinstance(ids, torch.Tensor):
        return torch.as_tensor(CENTERS, device=ids.device)[(VOCAB_SIZE - ids - 1).clamp(0, NUM_BINS - 2)]
    return CENTERS[np.clip(VOCAB_SIZE - np.asarray(ids) - 1, 0, NUM_BINS - 2)]


def is_action_id(ids):
    """True where an id is one of the 256 that encode an action."""
    return (ids >= VOCAB_SIZE - NUM_BINS) & (ids < VOCAB_SIZE)


SCHEMES = {"bounds_q99": ("q01", "q99"), "bounds": ("min", "max")}  # which statistics become -1 and 1
SCHEME = "bounds_q99"  # of all but ALOHA


def normalize(x: np.ndarray, stats: dict, scheme: str = SCHEME) -> np.ndarray:
    """
    Robot units -> [-1, 1], clipped, where stats["mask"] is true (absent: everywhere); unchanged elsewhere; 0 in a
    dimension that never changes. Scheme "normal": (x - mean) / std instead, never clipped. x (..., A), float32.
    """
    x, mask = np.asarray(x, np.float32), action_mask(stats)
    if scheme == "normal":
        mean, std = np.asarray(stats["mean"], np.float32), np.asarray(stats["std"], np.float32)
        return np.where(mask, (x - mean) / (std + np.float32(1e-8)), x)
    low, high = (np.asarray(stats[k]) for k in SCHEMES[scheme])
    span = (high - low + 1e-8).astype(np.float32)  # in float64, unlike the rest: so the official arithmetic has it
    y = np.where(mask, np.clip(2 * (x - low.astype(np.float32)) / span - 1, -1, 1), x)
    if "min" not in stats or "max" not in stats:  # only the figures that are needed to act
        return y
    return np.where(np.asarray(stats["min"]) == np.asarray(stats["max"]), np.float32(0), y)


def unnormalize(y: np.ndarray, stats: dict, scheme: str = SCHEME) -> np.ndarray:
    """[-1, 1] -> robot units (..., A), float64; dimensions outside stats["mask"] (the gripper) stay as they are."""
    y, (low, high) = np.asarray(y, np.float64), (np.asarray(stats[k], np.float64) for k in SCHEMES[scheme])
    return np.where(action_mask(stats), 0.5 * (y + 1) * (high - low) + low, y)


def action_mask(stats: dict) -> np.ndarray:
    """Which dimensions are normalized (A,), bool."""
    return np.asarray(stats.get("mask", np.ones(len(stats["q01"]))), bool)
