"""
FAST: a chunk of actions as a short row of tokens, and back. https://arxiv.org/abs/2501.09747

    chunk (H, D) in [-1, 1] -> DCT over time -> times scale, rounded: integers (H, D) -> one character each -> UTF-8
    -> byte-pair encoding -> ids        8 x 7 numbers become about 22 ids, where bins need 56

A robot moves smoothly, so most coefficients of the discrete cosine transform are 0. Byte-pair encoding gives a token of
its own to what is frequent, such as a row of zeros. An id may stand for any number of coefficients, and most rows of
ids are no chunk: they hold too many coefficients, or too few. `ChunkDecoder` lets a model generate no such row.

    fast = FAST.fit(chunks, scale=10, vocab_size=1024)          chunks (n, H, D)
    fast = FAST.from_pretrained("physical-intelligence/fast")   a folder of the official class; no code of it is run
    ids = fast.encode(chunk)
    chunk = fast.decode(ids)                                    (H, D) float64

In the language model a FAST id takes the place of a rare word, as the 256 bins of tokenizer.py do: id 0 is 31999, id 1
is 31998, and so on.

The folders, and all ids, are those of the official class: processing_action_tokenizer.py of
huggingface.co/physical-intelligence/fast, and github.com/huggingface/tokenizers below it.

Axes: n chunks, H steps of a chunk, D dimensions of an action, B batch, V vocabulary of FAST.
"""

import heapq
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from files import atomic_write, read_json_object, write_json
from progress import no_progress
from tokenizer import EOS, VOCAB_SIZE

FAST_FOLDER = "fast"  # in a checkpoint folder or a run folder: the tokenizer that it was trained with
ACTION_TOKENIZER = "action_tokenizer"  # in config.json: "fast" if the folder fast/ has to be there; without it "bins"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
PROCESSOR = "processor_config.json"  # written last: a folder that has it is whole

MAX_VOCAB = 2048  # ids of the language model that become FAST ids; those below spell the letters of instructions
MAX_CODES = 2048  # different coefficients; their characters have one byte or two
NEVER = 1 << 60  # the rank of a pair of symbols that is not merged

Pair = tuple[int, int]


# -----------------------------------------------------------------------------
# The cosine transform


@lru_cache
def dct_matrix(H: int) -> np.ndarray:
    """
    Return the orthonormal DCT-II as a matrix (H, H): coefficients = matrix @ chunk, chunk = matrix.T @ coefficients.

        matrix[k, t] = sqrt(2 / H) cos(pi k (2 t + 1) / (2 H)), with sqrt(1 / H) for k = 0

    https://en.wikipedia.org/wiki/Discrete_cosine_transform#DCT-II
    """
    t = np.arange(H)
    k = t[:, None]
    matrix = np.sqrt(2 / H) * np.cos(np.pi * k * (2 * t + 1) / (2 * H))
    matrix[0] = np.sqrt(1 / H)
    return matrix


# -----------------------------------------------------------------------------
# Characters and bytes, as GPT-2 and the tokenizers library have them


def byte_symbols() -> list[str]:
    """
    Return the character that stands for each of the 256 bytes in tokenizer.json: the byte's own where that can be
    printed, else one from 256 on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    symbols = []
    num_others = 0
    for byte in range(256):
        if byte in printable:
            symbols.append(chr(byte))
        else:
            symbols.append(chr(256 + num_others))
            num_others += 1
    return symbols


BYTE_SYMBOLS = byte_symbols()
SYMBOL_BYTES = {symbol: byte for byte, symbol in enumerate(BYTE_SYMBOLS)}


@lru_cache
def split_pattern() -> re.Pattern:
    r"""
    Return GPT-2's regular expression that splits a text into words, numbers and the rest. Merges never cross a border.
    It is written with \p{L}, \p{N} and the white space of Unicode, which Python's `re` does not know: they are spelled
    out here, for the characters that a coefficient can be.
    """
    characters = [chr(code) for code in range(MAX_CODES)]
    letters = re.escape("".join(c for c in characters if unicodedata.category(c).startswith("L")))
    numbers = re.escape("".join(c for c in characters if unicodedata.category(c).startswith("N")))
    space = "\t\n\v\f\r \x85\xa0"
    parts = (
        "'(?:s|t|re|ve|m|ll|d)",
        f" ?[{letters}]+",
        f" ?[{numbers}]+",
        f" ?[^{space}{letters}{numbers}]+",
        f"[{space}]+(?![^{space}])",
        f"[{space}]+",
    )
    return re.compile("|".join(parts))


def symbol_to_bytes(symbol: str) -> bytes:
    """Return what a token of tokenizer.json stands for. Characters that stand for no byte are themselves in UTF-8."""
    if all(character in SYMBOL_BYTES for character in symbol):
        return bytes(SYMBOL_BYTES[character] for character in symbol)
    return symbol.encode()


def count_coefficients(piece: bytes) -> tuple[int, int, int] | None:
    """
    Return for the bytes of a token: 1 if they begin in the middle of a coefficient, else 0; how many coefficients
    begin in them; 1 if they end in the middle of one, else 0. None: no chunk can have such a token.
    """
    head = 1 if b"\x80" <= piece[:1] <= b"\xbf" else 0  # the second byte of a character
    rest = piece[head:]
    tail = 1 if b"\xc2" <= rest[-1:] <= b"\xdf" else 0  # the first one of two
    try:
        whole = rest[: len(rest) - tail].decode()
    except UnicodeDecodeError:
        return None
    if piece == b"" or any(ord(character) >= MAX_CODES for character in whole):
        return None
    return head, len(whole) + tail, tail


# -----------------------------------------------------------------------------
# The tokenizer


class FAST:
    """
    A fitted tokenizer.

    symbols: V tokens as they stand in tokenizer.json, by id.
    merges: pairs of ids in the order in which they were learned; two neighbours in a row of ids become one.
    scale: what a coefficient is multiplied by before it is rounded; the larger, the more exact, and the more ids.
    min_token: the smallest rounded coefficient, which becomes character 0.
    time_horizon, action_dim: H and D of its chunks; None: any.
    splits_words: as split_pattern says.
    Raises ValueError for tokens from which no chunk can be made.
    """

    def __init__(
        self,
        symbols: list[str],
        merges: list[Pair],
        scale: float,
        min_token: int,
        time_horizon: int | None = None,
        action_dim: int | None = None,
        splits_words: bool = True,
    ):
        self.symbols = symbols
        self.merges = merges
        self.scale = scale
        self.min_token = min_token
        self.time_horizon = time_horizon
        self.action_dim = action_dim
        self.splits_words = splits_words
        self.num_clamped = 0  # coefficients that `encode` had no symbol for, so far

        self.pieces = [symbol_to_bytes(symbol) for symbol in symbols]
        self.counts = [count_coefficients(piece) for piece in self.pieces]
        ids = {symbol: i for i, symbol in enumerate(symbols)}
        self.byte_ids = {byte: ids[symbol] for byte, symbol in enumerate(BYTE_SYMBOLS) if symbol in ids}
        self.ranks = {}  # pair of ids -> its place among the merges, and what it becomes
        for rank, (first, second) in enumerate(merges):
            self.ranks[first, second] = (rank, ids[symbols[first] + symbols[second]])
        self.nearest = self.nearest_codes()
        self.check_tokens()

    def nearest_codes(self) -> np.ndarray:
        """Return for each code the nearest one that the tokens can spell, up to the largest, (codes,) int64."""
        spelled = []
        for code in range(MAX_CODES):
            if all(byte in self.byte_ids for byte in chr(code).encode()):
                spelled.append(code)
        if not spelled:
            raise ValueError("no token for any coefficient; its vocabulary is not one of FAST")
        spelled = np.array(spelled)
        codes = np.arange(spelled[-1] + 1)
        return spelled[np.abs(codes[:, None] - spelled).argmin(axis=1)]

    def check_tokens(self):
        """Raise ValueError if a model could be led into the middle of a coefficient that no token completes."""
        counts = [count for count in self.counts if count is not None]
        can_open = any(tail == 1 for _, _, tail in counts)
        can_close = (1, 0, 0) in counts
        if can_open and not can_close:
            raise ValueError("tokens end in the middle of a coefficient, and none completes it")

    @property
    def vocab_size(self) -> int:
        """V, the number of ids."""
        return len(self.symbols)

    def num_coefficients(self, id: int) -> int:
        """Return how many coefficients begin in a token; 0 also for one that no chunk has."""
        count = self.counts[id]
        return 0 if count is None else count[1]

    def max_tokens(self, time_horizon: int, action_dim: int) -> int:
        """Return the most ids that a chunk can take: one for each byte."""
        has_two_bytes = any(count is not None and count[2] for count in self.counts)
        return time_horizon * action_dim * (2 if has_two_bytes else 1)

    def facts(self) -> dict:
        """Return what processor_config.json says about it."""
        return {
            "action_dim": self.action_dim,
            "min_token": self.min_token,
            "scale": self.scale,
            "time_horizon": self.time_horizon,
            "vocab_size": self.vocab_size,
        }

    # There

    def encode(self, chunk: np.ndarray) -> list[int]:
        """
        Return the ids of a chunk (H, D). A coefficient that the tokens cannot spell becomes the nearest one that they
        can, and is counted in `num_clamped`. Raises ValueError for another shape, or numbers that are not finite.
        """
        codes, clamped = self.quantize(chunk)
        self.num_clamped += clamped
        text = "".join(map(chr, codes.ravel().tolist()))
        words = split_pattern().findall(text) if self.splits_words else [text]

        ids = []
        for word in words:
            ids += self.merge([self.byte_ids[byte] for byte in word.encode()])
        return ids

    def quantize(self, chunk: np.ndarray) -> tuple[np.ndarray, int]:
        """Return the codes of a chunk, (H, D) int64, from 0 on, and how many of them were clamped."""
        chunk = np.asarray(chunk, np.float64)
        expected = (self.time_horizon, self.action_dim)
        fits = chunk.ndim == 2 and all(n in (None, found) for n, found in zip(expected, chunk.shape, strict=True))
        if not fits:
            raise ValueError(
                f"a chunk of shape {chunk.shape}, but this tokenizer is for {expected}, steps x dimensions"
            )
        if not np.isfinite(chunk).all():
            raise ValueError("the chunk has numbers that are not finite; look for them in the data")

        coefficients = dct_matrix(len(chunk)) @ chunk
        codes = np.around(coefficients * self.scale) - self.min_token
        inside = np.clip(codes, 0, len(self.nearest) - 1).astype(np.int64)
        spelled = self.nearest[inside]
        return spelled, int((spelled != codes).sum())

    def merge(self, ids: list[int]) -> list[int]:
        """Join neighbours until no pair is known: always the pair that was learned first, from left to right."""
        ids = list(ids)
        ranks = [self.rank(pair) for pair in pairwise(ids)]
        while ranks:
            best = min(ranks)
            if best == NEVER:
                break
            i = ranks.index(best)
            _, joined = self.ranks[ids[i], ids[i + 1]]
            ids[i : i + 2] = [joined]
            del ranks[i]
            if i > 0:
                ranks[i - 1] = self.rank((ids[i - 1], joined))
            if i < len(ranks):
                ranks[i] = self.rank((joined, ids[i + 1]))
        return ids

    def rank(self, pair: Pair) -> int:
        return self.ranks[pair][0] if pair in self.ranks else NEVER

    # And back

    def decode(self, ids: Iterable[int], time_horizon: int | None = None, action_dim: int | None = None) -> np.ndarray:
        """
        Return the chunk (H, D) float64. time_horizon, action_dim: None: those of this tokenizer.
        Raises ValueError if the ids hold more or fewer coefficients, or are none: nothing is padded, cut or zeroed.
        """
        H = time_horizon or self.time_horizon
        D = action_dim or self.action_dim
        if not H or not D:
            raise ValueError("this tokenizer is for chunks of any shape: give time_horizon and action_dim")
        ids = [int(id) for id in ids]
        if not all(0 <= id < self.vocab_size for id in ids):
            raise ValueError(f"ids {ids} are not all from 0 to {self.vocab_size - 1}")

        data = b"".join(self.pieces[id] for id in ids)
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{len(ids)} ids break off in the middle of a coefficient, at byte {error.start}"
            ) from None
        if len(text) != H * D:
            raise ValueError(
                f"{len(ids)} ids hold {len(text)} coefficients, a chunk of {H} x {D} actions has {H * D}; generate "
                f"with ChunkDecoder, which cannot end in another number"
            )
        codes = np.array([ord(character) for character in text]).reshape(H, D)
        return dct_matrix(H).T @ ((codes + self.min_token) / self.scale)

    # In the language model

    def to_llama(self, ids: list[int]) -> list[int]:
        """Return the ids of the language model's vocabulary, counted down from its last one."""
        return [VOCAB_SIZE - 1 - id for id in ids]

    def for_shape(self, time_horizon: int, action_dim: int) -> "FAST":
        """Return this tokenizer for chunks of one shape. Raises ValueError if it is for another one."""
        for name, own, wanted in (
            ("steps (time_horizon)", self.time_horizon, time_horizon),
            ("dimensions (action_dim)", self.action_dim, action_dim),
        ):
            if own not in (None, wanted):
                raise ValueError(f"this tokenizer is for chunks of {own} {name}, they have {wanted}; fit another one")
        return FAST(self.symbols, self.merges, self.scale, self.min_token, time_horizon, action_dim, self.splits_words)

    # Fit

    @classmethod
    def fit(
        cls, chunks: np.ndarray, scale: float = 10, vocab_size: int = 1024, progress: Callable = no_progress
    ) -> "FAST":
        """
        Fit a tokenizer to chunks (n, H, D), with the tokens that the official class would have. No chunk in [-1, 1]
        will be clamped, whether it was seen here or not. progress: show_progress of progress.py, or no_progress.
        Raises ValueError for a scale or a vocabulary that cannot be.
        """
        chunks = np.asarray(chunks)
        if chunks.ndim != 3 or 0 in chunks.shape or not np.isfinite(chunks).all():
            raise ValueError(f"chunks are {chunks.shape}, expected finite numbers (n, H, D), at least one chunk")
        if not 0 < scale < np.inf:
            raise ValueError(f"scale {scale}: must be above 0; 10 is usual")
        _, H, D = chunks.shape
        coefficients = np.around(dct_matrix(H) @ chunks * scale)  # (n, H, D)
        bound = np.floor(np.sqrt(H) * scale + 0.5)  # of what is in [-1, 1]
        min_token = int(min(coefficients.min(), -bound))
        num_codes = int(max(coefficients.max(), bound)) - min_token + 1
        if num_codes > MAX_CODES:
            raise ValueError(f"scale {scale:g} makes {num_codes} different coefficients, {MAX_CODES} at most: lower it")

        # The first tokens: the characters themselves, as in the official class, and the symbols of their bytes.
        texts = ["".join(map(chr, codes)) for codes in (coefficients - min_token).astype(int).reshape(len(chunks), -1)]
        characters = [chr(code) for code in range(num_codes)]
        alphabet = {*characters, *(BYTE_SYMBOLS[byte] for byte in "".join(characters).encode())}
        symbols = sorted(alphabet)
        if not len(symbols) < vocab_size <= MAX_VOCAB:
            raise ValueError(
                f"vocabulary of {vocab_size}: scale {scale:g} and {H} steps need more than {len(symbols)}, and the "
                f"language model has {MAX_VOCAB} ids to give away"
            )

        ids = {symbol: i for i, symbol in enumerate(symbols)}
        words = Counter()
        for text in texts:
            words.update(split_pattern().findall(text))
        rows = [[ids[BYTE_SYMBOLS[byte]] for byte in word.encode()] for word in words]
        merges = learn_merges(symbols, rows, list(words.values()), vocab_size, progress)
        return cls(symbols, merges, scale, min_token, H, D)

    # Folders

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "FAST":
        """
        Read a folder of this class or of the official one. Raises FileNotFoundError or ValueError that names the file.
        """
        folder = Path(folder)
        for name in (PROCESSOR, TOKENIZER):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder / name}: no such file; a FAST tokenizer is a folder with {TOKENIZER} and {PROCESSOR}"
                )
        about = read_json_object(folder / PROCESSOR)
        scale = about.get("scale")
        min_token = about.get("min_token")
        horizon = about.get("time_horizon")
        action_dim = about.get("action_dim")
        is_scale = type(scale) in (int, float) and 0 < scale < 10**6
        is_shape = all(n is None or (type(n) is int and 0 < n < 10**4) for n in (horizon, action_dim))
        if not is_scale or type(min_token) is not int or abs(min_token) > 10**6 or not is_shape:
            raise ValueError(
                f"{folder / PROCESSOR}: scale {scale!r:.40}, min_token {min_token!r:.40}, time_horizon "
                f"{horizon!r:.40}, action_dim {action_dim!r:.40}; expected a number above 0, a whole number, and two "
                f"sizes or null"
            )
        try:
            symbols, merges, splits_words = parse_tokenizer(read_json_object(folder / TOKENIZER))
            return cls(symbols, merges, scale, min_token, horizon, action_dim, splits_words)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{folder / TOKENIZER}: not a byte-level BPE tokenizer of FAST ({error}); copy it again"
            ) from None

    def save_pretrained(self, folder: str | Path):
        """Write the files that `from_pretrained` and the official class read."""
        folder = Path(folder)
        with atomic_write(folder / TOKENIZER) as temporary:
            text = json.dumps(tokenizer_content(self.symbols, self.merges, self.splits_words), ensure_ascii=False)
            temporary.write_text(text, encoding="utf-8")
        tokenizer_config = {
            "clean_up_tokenization_spaces": False,
            "processor_class": "UniversalActionProcessor",
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        write_json(folder / TOKENIZER_CONFIG, tokenizer_config)
        write_json(folder / PROCESSOR, {**self.facts(), "processor_class": "UniversalActionProcessor"})


def remove_pretrained(folder: str | Path):
    """Remove the files that `save_pretrained` writes, and the folder if nothing else is in it."""
    folder = Path(folder)
    for name in (PROCESSOR, TOKENIZER, TOKENIZER_CONFIG):
        (folder / name).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def record_action_tokens(hf: dict, fast: FAST | None) -> dict:
    """Return the content of config.json with what it says about action tokens. fast: None: bins; it says nothing."""
    others = {key: value for key, value in hf.items() if key != ACTION_TOKENIZER}
    return {**others, ACTION_TOKENIZER: "fast"} if fast else others


def parse_tokenizer(content: dict) -> tuple[list[str], list[Pair], bool]:
    """Return symbols, merges and whether words are split, of a tokenizer.json. Raises ValueError for another kind."""
    model = content["model"]
    splitter = content.get("pre_tokenizer") or {}
    is_plain = (
        model.get("type", "BPE") == "BPE"
        and splitter.get("type") == "ByteLevel"
        and not splitter.get("add_prefix_space")
        and not content.get("normalizer")
        and not content.get("added_tokens")
        and not any(model.get(key) for key in ("dropout", "unk_token", "continuing_subword_prefix", "ignore_merges"))
    )
    if not is_plain:
        raise ValueError("its model must be BPE, behind a plain ByteLevel pre_tokenizer, without added tokens")

    ids = model["vocab"]
    symbols = sorted(ids, key=ids.get)
    if [ids[symbol] for symbol in symbols] != list(range(len(symbols))) or "" in ids:
        raise ValueError("the ids of its vocabulary are not 0, 1, 2, ...")
    merges = []
    for merge in model["merges"]:
        first, second = merge.split(" ") if isinstance(merge, str) else merge  # older files have "a b"
        if not {first, second, first + second} <= ids.keys():
            raise ValueError(f"the merge {merge!r:.60} has no tokens")
        merges.append((ids[first], ids[second]))
    return symbols, merges, splitter.get("use_regex", True)


def tokenizer_content(symbols: list[str], merges: list[Pair], splits_words: bool) -> dict:
    """Return the content of tokenizer.json."""
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "add_prefix_space": False, "use_regex": splits_words},
        "post_processor": {**byte_level, "add_prefix_space": True, "trim_offsets": False},
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {symbol: i for i, symbol in enumerate(symbols)},
            "merges": [[symbols[first], symbols[second]] for first, second in merges],
        },
    }


# -----------------------------------------------------------------------------
# Byte-pair encoding, the learning of it


def learn_merges(
    symbols: list[str], rows: list[list[int]], counts: list[int], vocab_size: int, progress: Callable = no_progress
) -> list[Pair]:
    """
    Return the merges that make `vocab_size` tokens of those that there are: each time the most frequent pair of
    neighbours becomes one token, of equally frequent ones that with the smaller ids. A pair that is there only once is
    not merged. Each new token is appended to `symbols`.

    rows: words as ids, each different from the others. counts: how often each word is there. Both follow the
    trainer of github.com/huggingface/tokenizers, so that the same chunks give the same tokens.
    """
    rows = [list(row) for row in rows]
    frequency = Counter()  # pair -> how often it is there
    places = defaultdict(set)  # pair -> rows that have it, or had it
    for number, row in enumerate(rows):
        for pair in pairwise(row):
            frequency[pair] += counts[number]
            places[pair].add(number)

    queue = [(-count, pair) for pair, count in frequency.items()]
    heapq.heapify(queue)
    ids = {symbol: i for i, symbol in enumerate(symbols)}
    merges = []
    for _ in progress(range(vocab_size - len(symbols)), "fitting FAST", "tokens"):
        best = pop_most_frequent(queue, frequency)
        if best is None:
            break
        first, second = best
        symbol = symbols[first] + symbols[second]
        joined = ids.setdefault(symbol, len(symbols))
        if joined == len(symbols):
            symbols.append(symbol)
        merges.append(best)

        changed = set()
        for number in places.pop(best):
            for pair, change in merge_in_row(rows[number], best, joined):
                frequency[pair] += change * counts[number]
                if change > 0:
                    places[pair].add(number)
                    changed.add(pair)
        for pair in changed:
            heapq.heappush(queue, (-frequency[pair], pair))
    return merges


def pop_most_frequent(queue: list[tuple[int, Pair]], frequency: Counter) -> Pair | None:
    """Take the most frequent pair from a heap, in which counts may be out of date. None: no pair is there twice."""
    while queue:
        count, pair = heapq.heappop(queue)
        if -count != frequency[pair]:
            heapq.heappush(queue, (-frequency[pair], pair))
        elif frequency[pair] < 2:
            return None
        else:
            return pair
    return None


def merge_in_row(row: list[int], pair: Pair, joined: int) -> list[tuple[Pair, int]]:
    """Join a pair wherever it is in a row of ids, in place. Returns the neighbours that came (+1) and went (-1)."""
    first, second = pair
    changes = []
    i = 0
    while i + 1 < len(row):
        if row[i] == first and row[i + 1] == second:
            row[i : i + 2] = [joined]
            if i > 0:
                changes += [((row[i - 1], first), -1), ((row[i - 1], joined), 1)]
            if i + 1 < len(row):
                changes += [((second, row[i + 1]), -1), ((joined, row[i + 1]), 1)]
        i += 1
    return changes


# -----------------------------------------------------------------------------
# Generation


class ChunkDecoder:
    """
    Chooses the next token for each of B rows, step by step, so that each row becomes a chunk: exactly H x D
    coefficients, and the end token behind them. `OpenVLA.generate_with` asks it.

    A row is in the middle of a chunk, for which two numbers are known: how many coefficients have not begun yet, and
    whether the last one still lacks its second byte. A token may follow if it fits both. The end token may follow when
    nothing is missing. So there is always a token that may follow: those of single bytes.

    temperature: 0: the most likely token; above: draw from their probabilities, divided by it. generator: of the draws.
    """

    def __init__(
        self,
        fast: FAST,
        batch_size: int,
        device: torch.device | str = "cpu",
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ):
        self.fast = fast
        self.temperature = temperature
        self.generator = generator
        self.is_finite = True  # False once a logit was not: then the rows mean nothing

        # What each token does, by FAST id, (V,) each; one more for the end token, which does nothing.
        counts = [count or (0, 0, 0) for count in fast.counts] + [(0, 0, 0)]
        self.heads, self.begins, self.tails = torch.tensor(counts, device=device).unbind(1)
        self.is_usable = torch.tensor([count is not None for count in fast.counts] + [False], device=device)
        self.end = fast.vocab_size

        self.missing = torch.full((batch_size,), fast.time_horizon * fast.action_dim, device=device)
        self.is_open = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.steps = []  # of (B,) FAST ids, or `end`

    @property
    def is_done(self) -> bool:
        """True when nothing is missing in any row: only end tokens could follow."""
        return not bool((self.missing + self.is_open).any())

    def choose(self, logits: Tensor) -> Tensor:
        """Return the next ids of the language model (B,) int64, given its logits (B, vocabulary)."""
        by_fast_id = logits[:, VOCAB_SIZE - self.end : VOCAB_SIZE].flip(1)  # (B, V)
        scores = torch.cat([by_fast_id, logits[:, EOS, None]], dim=1).float()  # (B, V + 1)
        self.is_finite = self.is_finite and bool(torch.isfinite(scores).all())

        scores = scores.masked_fill(~self.allowed(), -torch.inf)
        if self.temperature:
            probabilities = torch.softmax(scores / self.temperature, dim=1)
            chosen = torch.multinomial(probabilities, 1, generator=self.generator)[:, 0]
        else:
            chosen = scores.argmax(dim=1)

        self.missing = self.missing - self.begins[chosen]
        self.is_open = self.tails[chosen]
        self.steps.append(chosen)
        return torch.where(chosen == self.end, EOS, VOCAB_SIZE - 1 - chosen)

    def allowed(self) -> Tensor:
        """Return which tokens may follow in each row, (B, V + 1) bool; the last one is the end token."""
        begins_right = self.heads == self.is_open[:, None]
        has_room = self.begins <= self.missing[:, None]
        allowed = self.is_usable & begins_right & has_room
        allowed[:, self.end] = (self.missing + self.is_open) == 0
        return allowed

    def chunks(self) -> np.ndarray:
        """Return the chunks (B, H, D) float64, when all is done. Raises ValueError if a logit was not finite."""
        if not self.is_finite:
            raise ValueError("the answer is not finite; broken weights, or numbers beyond --dtype float16")
        rows = torch.stack(self.steps, dim=1).tolist()  # B rows of FAST ids
        return np.stack([self.fast.decode(id for id in row if id != self.end) for row in rows])
