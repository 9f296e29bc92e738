"""
Instructions and actions to token ids, and back. Every encode stands beside its decode.

    "put the spoon on the towel" -> prompt -> [1, 512, 29901, ..., 29901] -> + [29871]
    action (A,), metres and radians -> normalized to [-1, 1] -> 256 bins -> ids 31999 (-1) ... 31744 (+1)

A training sequence is: prompt ids, 29871, one id per action dimension, 2 (</s>). Ids are joined as ids, never as
text: the official code decodes the action to characters and tokenizes prompt and action in one go, which gives the
same ids because no pair of action characters merges, and 29871 is what is left of the blank between the two.

OpenVLA section 3.2, https://arxiv.org/abs/2406.09246; prismatic/vla/action_tokenizer.py and
prismatic/vla/datasets/rlds/utils/data_utils.py of github.com/openvla/openvla. Metres and radians become [-1, 1] in
normalize.py.

Axes: B batch, T text tokens, A dimensions of an action, K actions of a chunk.
"""

import json
import re
from pathlib import Path

import numpy as np
import torch

from formats.protobuf import fixed32, integer, message

UNK = 0  # <unk>
BOS = 1  # <s>
EOS = 2  # </s>
PAD = 32000  # <PAD>, the one token that OpenVLA adds to Llama's; the same number as PAD_TOKEN_ID of model.py
SPECIAL_TOKENS = {"<unk>": UNK, "<s>": BOS, "</s>": EOS, "<PAD>": PAD}
BLANK = 29871  # the piece of a lone blank; stands between "Out:" and the action
VOCAB_SIZE = 32000  # Llama's own pieces; embeddings have 32064 rows, but actions count down from here
NUM_BINS = 256  # bin edges; there are 255 bins between them
FIRST_ACTION_ID = VOCAB_SIZE - NUM_BINS  # action ids are this one and those above it
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
    """Llama-2's sentencepiece model, with the ids of Hugging Face's LlamaTokenizerFast, as OpenVLA was trained."""

    def __init__(self, path: str | Path, prompt: str = PROMPT):
        """
        Read a tokenizer.model, or that of a folder. prompt: has {instruction} in it, see `prompt_for`.
        Raises FileNotFoundError, or ValueError if it is not Llama-2's or one laid out like it.

        `fast`: the FAST of fast.py by which chunks of actions become tokens; None: each number falls into a bin.
        """
        from sentencepiece import SentencePieceProcessor

        path = Path(path)
        if path.is_dir():
            path = path / "tokenizer.model"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; every checkpoint folder has its tokenizer.model")

        self.prompt = prompt
        self.fast = None
        self.model_bytes = path.read_bytes()
        if self.model_bytes.startswith(b"version https://git-lfs"):
            raise ValueError(f"{path}: a Git LFS pointer, not the tokenizer; run `git lfs pull` in its folder")
        try:
            self.sp = SentencePieceProcessor(model_proto=self.model_bytes)
        except RuntimeError:
            raise ValueError(f"{path}: not a sentencepiece model; copy tokenizer.model from openvla-7b") from None

        layout = (self.sp.vocab_size(), self.sp.piece_to_id("▁"))
        if layout != (VOCAB_SIZE, BLANK):
            raise ValueError(f"{path}: vocabulary size and blank id are {layout}, Llama-2's are {VOCAB_SIZE, BLANK}")

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, <s> first. Special tokens that are spelled in the text become their ids."""
        ids = [BOS]
        for part in re.split("(<unk>|<s>|</s>|<PAD>)", text):
            if part in SPECIAL_TOKENS:
                ids.append(SPECIAL_TOKENS[part])
            else:
                ids.extend(self.sp.encode(part))  # which puts a blank in front, also after a special token
        return ids

    def decode(self, ids) -> str:
        """Return the text of ids, without special tokens; inverse of `encode` for text that has none."""
        pieces = [int(i) for i in ids if EOS < int(i) < VOCAB_SIZE]
        return self.sp.decode(pieces)

    def encode_prompt(self, instruction: str) -> list[int]:
        """Return the ids that stand before an action: the prompt with its instruction, and the blank."""
        instruction = instruction.lower().replace("<image>", "")  # the official prompt builder drops <image> too
        ids = self.encode(self.prompt.format(instruction=instruction))
        if ids[-1] != BLANK:
            ids.append(BLANK)
        return ids

    def encode_example(self, instruction: str, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        Return input_ids (T,) int64 and labels (T,) int64 of an instruction and a normalized action (A,) or chunk
        (K, A) in [-1, 1]. Labels are IGNORE_INDEX but for the action's ids and </s>. OpenVLA section 3.3.
        """
        prompt = self.encode_prompt(instruction)
        if self.fast:
            answer = self.fast.to_llama(self.fast.encode(action))
        else:
            answer = encode_action(np.asarray(action).reshape(-1)).tolist()
        answer.append(EOS)
        input_ids = prompt + answer
        labels = [IGNORE_INDEX] * len(prompt) + answer
        return np.array(input_ids), np.array(labels)

    def files(self) -> dict[str, bytes]:
        """Return the files that Hugging Face's tokenizer expects in a checkpoint folder: name -> content."""
        flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        tokenizer_config = {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": True,
            "add_eos_token": False,
            "legacy": False,
            "padding_side": "right",
            "model_max_length": 2048,
            "clean_up_tokenization_spaces": False,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<PAD>",
            "added_tokens_decoder": {
                "0": {"content": "<unk>", "special": True, **flags},
                "1": {"content": "<s>", "special": True, **flags},
                "2": {"content": "</s>", "special": True, **flags},
                "32000": {"content": "<PAD>", "special": True, **flags},
            },
        }
        special_tokens_map = {
            "bos_token": {"content": "<s>", **flags},
            "eos_token": {"content": "</s>", **flags},
            "unk_token": {"content": "<unk>", **flags},
            "pad_token": {"content": "<PAD>", **flags},
        }
        return {
            "tokenizer_config.json": to_json(tokenizer_config),
            "added_tokens.json": to_json({"<PAD>": PAD}),
            "special_tokens_map.json": to_json(special_tokens_map),
            "tokenizer.model": self.model_bytes,
        }


def check_instruction(instruction: str):
    """
    Raise ValueError if a robot cannot be told to do this: no text, a blank one, or half a character in it. For those
    who ask a policy; datasets may have frames without an instruction.
    """
    if not isinstance(instruction, str):
        raise ValueError(f"the instruction must be a text, got {instruction!r:.80}")
    if not instruction.replace("<image>", "").strip():
        raise ValueError(
            f"the instruction {instruction!r:.80} is blank; say what to do, as in 'put the spoon on the towel'"
        )
    if re.search("[\ud800-\udfff]", instruction):
        raise ValueError(f"the instruction {instruction!r:.80} has half a character in it (a lone surrogate)")


def to_json(content: dict) -> bytes:
    """Return the content of a JSON file."""
    return json.dumps(content, indent=2).encode()


def prompt_for(config: dict) -> str:
    """Return the prompt that a model was trained with, by its config.json: Vicuna's for openvla-v01-7b."""
    llm = f"{config.get('llm_backbone_id', '')} {config.get('hf_llm_id', '')}".lower()
    return PROMPT_VICUNA if "vicuna" in llm else PROMPT


def pad_sequences(sequences: list, value: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sequences of ids as (B, T) int64, padded on the right with `value`, and their lengths (B,) int64."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    longest = int(lengths.max())
    padded = torch.full((len(sequences), longest), value, dtype=torch.long)
    for row, sequence in zip(padded, sequences, strict=True):
        row[: len(sequence)] = torch.as_tensor(sequence)
    return padded, lengths


# -----------------------------------------------------------------------------
# A stand-in for Llama's tokenizer

# The kinds of pieces, by their numbers in sentencepiece_model.proto of github.com/google/sentencepiece
NORMAL = 1
UNKNOWN = 2
CONTROL = 3
UNUSED = 5
BYTE = 6


def make_standin(path: str | Path, words: tuple = ()):
    """
    Write a tokenizer.model with Llama-2's layout: 32,000 pieces, bytes at 3 ... 258, the blank at 29871. It knows only
    the prompt's words, `words`, letters and bytes. Any text is encoded without loss.

    It is for toy worlds and tests, where Llama's own may not be given away. Models trained with it need it.
    """
    prompt_words = PROMPT.split("{")[0].split()
    whole_words = [f"▁{word}" for word in (*prompt_words, *words)]  # ▁ is the blank in front of a word
    whole_words.append("Out:")  # follows a newline, not a blank
    letters = [chr(code) for code in range(33, 127)]
    texts = list(dict.fromkeys(whole_words + letters))  # each of them once, in this order

    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["<unk>", "<s>", "</s>", *byte_pieces, *texts]
    pieces += [f"<unused{i}>" for i in range(len(pieces), VOCAB_SIZE)]
    pieces[BLANK] = "▁"

    # Fields have numbers, too, in sentencepiece_model.proto.
    model = bytearray()
    for i, piece in enumerate(pieces):
        score = -1.0 if piece in whole_words else -10.0  # a whole word beats its letters
        model += message(1, message(1, piece.encode()) + fixed32(2, score) + integer(3, piece_type(i, piece)))
    trainer_spec = [
        integer(3, 1),  # model_type: UNIGRAM
        integer(4, VOCAB_SIZE),
        integer(35, True),  # byte_fallback
        integer(43, -1),  # pad_id: none, OpenVLA adds <PAD> behind the vocabulary
    ]
    normalizer_spec = [
        message(1, b"identity"),  # name
        integer(3, True),  # add_dummy_prefix
        integer(4, False),  # remove_extra_whitespaces
        integer(5, True),  # escape_whitespaces
    ]
    model += message(2, b"".join(trainer_spec)) + message(3, b"".join(normalizer_spec))
    Path(path).write_bytes(model)


def piece_type(i: int, piece: str) -> int:
    """Return the kind of piece number i in Llama-2's layout."""
    if i == UNK:
        return UNKNOWN
    if i <= EOS:
        return CONTROL  # <s> and </s>
    if i <= EOS + 256:
        return BYTE
    if piece.startswith("<unused"):
        return UNUSED
    return NORMAL


# -----------------------------------------------------------------------------
# Actions


def encode_action(action):
    """Return the ids, int64, of a normalized action of any shape, array or tensor. Beyond [-1, 1] it is clipped."""
    if isinstance(action, torch.Tensor):
        edges = torch.as_tensor(EDGES, device=action.device)
        bins = torch.bucketize(action.double().clamp(-1, 1), edges, right=True)  # 1 ... 256
        return VOCAB_SIZE - bins
    action = np.clip(np.asarray(action, np.float64), -1, 1)
    bins = np.digitize(action, EDGES).astype(np.int64)  # 1 ... 256
    return VOCAB_SIZE - bins


def decode_action(ids):
    """Return the centers of the bins of ids, float64, in [-1, 1]. As officially, other ids go to the nearer end."""
    if isinstance(ids, torch.Tensor):
        centers = torch.as_tensor(CENTERS, device=ids.device)
        return centers[(VOCAB_SIZE - ids - 1).clamp(0, NUM_BINS - 2)]
    bins = VOCAB_SIZE - np.asarray(ids) - 1
    return CENTERS[np.clip(bins, 0, NUM_BINS - 2)]


def is_action_id(ids):
    """Return True where an id is one of the 256 that encode an action."""
    return (ids >= FIRST_ACTION_ID) & (ids < VOCAB_SIZE)
