"""FAST against the official class: ids, decoded chunks, fitted tokens; and generation that cannot derail."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from common import GOLDENS, shared
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import usual_mutations
from safetensors.numpy import load_file

from fast import FAST, MAX_CODES, ChunkDecoder, count_coefficients, dct_matrix, split_pattern
from tokenizer import EOS, VOCAB_SIZE

SETS = ["fast", "libero-8x7", "aloha-25x14"]  # the first one is in tests/goldens, the others are in ../shared


def smooth_chunks(n: int, H: int, D: int, seed: int = 0) -> np.ndarray:
    """Chunks (n, H, D) in [-1, 1] that change slowly, as a robot's actions do."""
    rng = np.random.default_rng(seed)
    t = np.linspace(0, 1, H)[:, None]
    level, slope, wave = rng.normal(size=(3, n, 1, D))
    return np.clip(0.4 * level + 0.5 * slope * t + 0.2 * wave * np.sin(4 * t), -1, 1)


def folder_of(name: str):
    return GOLDENS / "fast" if name == "fast" else shared(f"goldens/fast/{name}")


def rows(golden: dict, ids: str, lengths: str) -> list[list[int]]:
    return [row.tolist() for row in np.split(golden[ids], np.cumsum(golden[lengths])[:-1])]


@pytest.fixture(scope="module", params=SETS)
def reference(request):
    """A tokenizer that the official class fitted, and what that class answers."""
    folder = folder_of(request.param)
    return FAST.from_pretrained(folder), load_file(folder / "golden.safetensors")


@pytest.fixture(scope="module")
def fast():
    return FAST.from_pretrained(GOLDENS / "fast")


@pytest.fixture(scope="module")
def wide():
    """A tokenizer of many different coefficients: tokens of it begin and end in the middle of a character."""
    fitted = FAST.fit(smooth_chunks(200, 8, 7), scale=100, vocab_size=1024)
    assert any(count and count[0] for count in fitted.counts) and any(count and count[2] for count in fitted.counts)
    return fitted


# -----------------------------------------------------------------------------
# The official class


def test_ids_and_chunks_are_the_official_ones(reference):
    fast, golden = reference
    official_rows = rows(golden, "ids", "lengths")
    for chunk, official, decoded in zip(golden["chunks"], official_rows, golden["decoded"], strict=True):
        assert fast.encode(chunk) == official
        np.testing.assert_allclose(fast.decode(official), decoded, rtol=0, atol=1e-9)
    assert fast.num_clamped == 0


def test_large_chunks_are_clamped_and_never_zeros(reference):
    """Officially a coefficient below the range is clamped, but one above it disappears, and zeros come back."""
    fast, golden = reference
    official_zeros = (golden["big_decoded"] == 0).all((1, 2))
    assert official_zeros.any()
    for chunk, official, is_zero in zip(
        golden["big"], rows(golden, "big_ids", "big_lengths"), official_zeros, strict=True
    ):
        before = fast.num_clamped
        codes = np.around(dct_matrix(len(chunk)) @ chunk * fast.scale) - fast.min_token
        largest = len(fast.nearest) - 1
        ids = fast.encode(chunk)
        assert (ids != official) == is_zero == (codes > largest).any()
        assert fast.num_clamped - before == ((codes < 0) | (codes > largest)).sum()

        # What is kept is the nearest chunk there is.
        kept = dct_matrix(len(chunk)) @ fast.decode(ids) * fast.scale - fast.min_token
        np.testing.assert_allclose(kept, np.clip(codes, 0, largest), atol=1e-6)


@pytest.mark.parametrize("name", SETS[1:])
def test_the_same_chunks_give_the_tokenizer_that_the_official_class_fits(name, tmp_path):
    folder = shared(f"goldens/fast/{name}")
    about = json.loads((folder / "processor_config.json").read_text())
    fitted = FAST.fit(load_file(folder / "golden.safetensors")["fit"], about["scale"], about["vocab_size"])
    fitted.save_pretrained(tmp_path)
    for file in ("tokenizer.json", "processor_config.json"):
        assert json.loads((tmp_path / file).read_text()) == json.loads((folder / file).read_text()), file


def test_texts_are_split_into_words_as_by_the_tokenizers_library():
    """Also with letters, numbers and white space beyond ASCII, which wide ranges of coefficients have."""
    for case in json.loads((GOLDENS / "fast" / "words.json").read_text()):
        text = "".join(map(chr, case["codes"]))
        assert [len(word) for word in split_pattern().findall(text)] == case["lengths"], text


# -----------------------------------------------------------------------------
# There and back


@pytest.mark.parametrize("kind", ["fast", "wide"])
def test_round_trip_costs_the_rounding_and_no_more(kind, request):
    """Half a step for each coefficient; the transform keeps lengths, so together sqrt(n) times that at most."""
    fast = request.getfixturevalue(kind)
    for chunk in smooth_chunks(50, 8, 7, seed=1):
        error = fast.decode(fast.encode(chunk)) - chunk
        assert np.abs(dct_matrix(8) @ error).max() <= 0.5 / fast.scale + 1e-9
        assert np.sqrt((error**2).sum()) <= 0.5 / fast.scale * np.sqrt(chunk.size) + 1e-9
    assert fast.num_clamped == 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=56, max_size=56))
def test_no_chunk_in_range_is_clamped_by_a_tokenizer_that_was_fitted_here(numbers):
    fast = FAST.fit(smooth_chunks(1, 8, 7) / 9, scale=10, vocab_size=256)
    chunk = np.reshape(numbers, (8, 7))
    error = fast.decode(fast.encode(chunk)) - chunk
    assert fast.num_clamped == 0
    assert np.abs(dct_matrix(8) @ error).max() <= 0.05 + 1e-9


def test_every_token_counts_its_coefficients(wide):
    for chunk in smooth_chunks(30, 8, 7, seed=2):
        ids = wide.encode(chunk)
        assert sum(wide.num_coefficients(id) for id in ids) == 56
        assert len(ids) <= wide.max_tokens(8, 7)


def test_bytes_of_a_token():
    assert count_coefficients("aé".encode()) == (0, 2, 0)
    assert count_coefficients("é".encode()[1:] + b"a") == (1, 1, 0)
    assert count_coefficients(b"a" + "é".encode()[:1]) == (0, 2, 1)
    assert count_coefficients("é".encode()[1:]) == (1, 0, 0)
    assert count_coefficients("é".encode()[1:] + "é".encode()[:1]) == (1, 1, 1)
    for illegal in (b"", b"\x80\x80", b"\xc3a", b"\xff", b"\xc0", b"a\xe0", chr(MAX_CODES).encode()):
        assert count_coefficients(illegal) is None, illegal


def test_a_folder_of_ours_reads_back(wide, tmp_path):
    wide.save_pretrained(tmp_path)
    again = FAST.from_pretrained(tmp_path)
    for chunk in smooth_chunks(20, 8, 7, seed=3):
        assert again.encode(chunk) == wide.encode(chunk)
    assert (again.scale, again.min_token, again.time_horizon, again.action_dim) == (100, wide.min_token, 8, 7)


def test_coefficients_without_a_symbol_become_the_nearest(fast):
    """The official trainer knows only the bytes that it has seen, so there may be holes in the range."""
    symbols = [symbol if symbol != "5" else "hole" for symbol in fast.symbols]
    merges = [pair for pair in fast.merges if not any("5" in fast.symbols[id] for id in pair)]
    holed = FAST(symbols, merges, fast.scale, fast.min_token, 8, 7)
    code = ord("5")
    assert holed.nearest[code - 2 : code + 3].tolist() == [code - 2, code - 1, code - 1, code + 1, code + 2]

    codes = np.full((8, 7), code)
    chunk = dct_matrix(8).T @ ((codes + holed.min_token) / holed.scale)
    decoded = dct_matrix(8) @ holed.decode(holed.encode(chunk)) * holed.scale - holed.min_token
    np.testing.assert_allclose(decoded, codes - 1)
    assert holed.num_clamped == 56


def test_merges_cross_a_border_of_words_only_where_the_file_says_so(tmp_path):
    for splits_words, ids in ((True, [0, 1]), (False, [2])):
        fast = FAST(["a", "1", "a1"], [(0, 1)], scale=1, min_token=0, splits_words=splits_words)
        fast.save_pretrained(tmp_path)
        again = FAST.from_pretrained(tmp_path)
        chunk = np.array([[ord("a"), ord("1")]])  # one step: its coefficients are its numbers
        assert again.encode(chunk) == ids
        assert (again.decode(ids, 1, 2) == chunk).all()


# -----------------------------------------------------------------------------
# What is refused


def test_decode_refuses_what_is_no_chunk(fast, wide):
    ids = fast.encode(smooth_chunks(1, 8, 7)[0])
    one = next(i for i, count in enumerate(fast.counts) if count == (0, 1, 0))
    with pytest.raises(ValueError, match="hold 57 coefficients, a chunk of 8 x 7 actions has 56"):
        fast.decode(ids + [one])
    with pytest.raises(ValueError, match="hold 0 coefficients"):
        fast.decode([])
    with pytest.raises(ValueError, match="not all from 0 to 1023"):
        fast.decode([1024])
    opening = next(i for i, count in enumerate(wide.counts) if count and count[2])
    with pytest.raises(ValueError, match="break off in the middle"):
        wide.decode([opening])


def test_encode_refuses_other_shapes_and_numbers(fast):
    with pytest.raises(ValueError, match=r"shape \(8, 6\), but this tokenizer is for \(8, 7\)"):
        fast.encode(np.zeros((8, 6)))
    with pytest.raises(ValueError, match="not finite"):
        fast.encode(np.full((8, 7), np.nan))
    with pytest.raises(ValueError, match=r"chunks of 7 dimensions \(action_dim\), they have 14"):
        fast.for_shape(8, 14)


@pytest.mark.parametrize(
    "scale, vocab_size, message",
    [(0, 1024, "must be above 0"), (10**4, 1024, "lower it"), (10, 2049, "has 2048 ids"), (10, 60, "need more than")],
)
def test_fit_refuses_what_cannot_be(scale, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        FAST.fit(smooth_chunks(5, 8, 7), scale, vocab_size)


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("processor_config.json", None, "processor_config.json: no such file"),
        ("tokenizer.json", None, "tokenizer.json: no such file"),
        ("processor_config.json", {"scale": 0}, "scale 0"),
        ("processor_config.json", {"min_token": None}, "min_token None"),
        ("processor_config.json", {"action_dim": "7"}, "action_dim '7'"),
        ("tokenizer.json", {"model": {"type": "Unigram"}}, "must be BPE"),
        ("tokenizer.json", {"pre_tokenizer": {"type": "Whitespace"}}, "must be BPE"),
        ("tokenizer.json", {"model": {"vocab": {"a": 1}, "merges": []}}, "not 0, 1, 2"),
        ("tokenizer.json", {"model": {"vocab": {"a": 0}, "merges": [["a", "b"]]}}, "has no tokens"),
        ("tokenizer.json", {"model": {"vocab": {"一": 0}, "merges": []}}, "no token for any coefficient"),
        ("tokenizer.json", {"model": 3}, "not a byte-level BPE"),
    ],
)
def test_broken_folders_are_refused_with_the_name_of_the_file(file, change, message, tmp_path):
    folder = shutil.copytree(GOLDENS / "fast", tmp_path / "fast")
    if change is None:
        (folder / file).unlink()
    else:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, **change}))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        FAST.from_pretrained(folder)
    assert str(folder / file) in str(error.value)


@pytest.mark.parametrize("file", ["processor_config.json", "tokenizer.json", "small tokenizer.json"])
def test_a_broken_file_is_refused_or_does_no_harm(file, tmp_path):
    """Bytes cut, flipped and replaced, JSON values replaced by others: one error that names the file, or a chunk."""
    folder = shutil.copytree(GOLDENS / "fast", tmp_path / "fast")
    if file.startswith("small"):  # of which most mutations hit something that matters
        FAST(["a", "1", "a1"], [(0, 1)], 1, 0, 1, 2).save_pretrained(folder)
    path = folder / file.split()[-1]
    refused = 0
    for how, content in usual_mutations(path.name, path.read_bytes(), random.Random(0)).items():
        path.write_bytes(content)
        try:
            fast = FAST.from_pretrained(folder)
        except (ValueError, OSError) as error:
            assert str(path) in str(error), how
            refused += 1
            continue
        shape = (fast.time_horizon or 8, fast.action_dim or 7)
        if shape[0] * shape[1] < 10**4:
            assert np.isfinite(fast.decode(fast.encode(np.zeros(shape)), *shape)).all(), how
    assert refused > 5


def test_older_files_have_merges_as_texts(fast, tmp_path):
    folder = shutil.copytree(GOLDENS / "fast", tmp_path / "fast")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert FAST.from_pretrained(folder).merges == fast.merges


# -----------------------------------------------------------------------------
# Generation


def fake_logits(batch_size: int, fast: FAST, gain: float, end: float, generator: torch.Generator) -> torch.Tensor:
    """Random logits (B, 32000), in which only the columns are filled that a FAST policy looks at."""
    logits = torch.zeros(batch_size, VOCAB_SIZE)
    logits[:, VOCAB_SIZE - fast.vocab_size :] = gain * torch.randn(batch_size, fast.vocab_size, generator=generator)
    logits[:, EOS] = end
    return logits


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    batch_size=st.integers(1, 16),
    gain=st.sampled_from([0.0, 1.0, 30.0]),
    end=st.sampled_from([-50.0, 0.0, 50.0]),
    temperature=st.sampled_from([0.0, 0.5, 2.0]),
    is_wide=st.booleans(),
)
def test_whatever_the_logits_say_a_chunk_comes_out(fast, wide, seed, batch_size, gain, end, temperature, is_wide):
    fast = wide if is_wide else fast
    generator = torch.Generator().manual_seed(seed)
    decoder = ChunkDecoder(fast, batch_size, temperature=temperature, generator=generator)
    chosen = []
    while not decoder.is_done:
        chosen.append(decoder.choose(fake_logits(batch_size, fast, gain, end, generator)))
        assert len(chosen) <= fast.max_tokens(8, 7)

    chunks = decoder.chunks()  # `decode` raises for any other number of coefficients, or half a one
    assert chunks.shape == (batch_size, 8, 7)
    for row, chunk in zip(torch.stack(chosen, dim=1).tolist(), chunks, strict=True):
        end_of_row = row.index(EOS) if EOS in row else len(row)
        ids = [VOCAB_SIZE - 1 - id for id in row[:end_of_row]]
        assert row[end_of_row:] == [EOS] * (len(row) - end_of_row)
        assert sum(fast.num_coefficients(id) for id in ids) == 56
        assert (fast.decode(ids) == chunk).all()

    # Behind a whole chunk only the end token may follow.
    assert (decoder.choose(fake_logits(batch_size, fast, 30, -50, generator)) == EOS).all()


def test_logits_that_want_a_chunk_get_it(wide):
    """The mask takes nothing away from a model that does right."""
    chunk = smooth_chunks(1, 8, 7, seed=5)[0]
    ids = wide.encode(chunk)
    decoder = ChunkDecoder(wide, 1)
    for id in wide.to_llama(ids):
        logits = torch.zeros(1, VOCAB_SIZE)
        logits[0, id] = 9
        assert decoder.choose(logits).tolist() == [id]
    assert decoder.is_done
    assert (decoder.chunks()[0] == wide.decode(ids)).all()


def test_logits_that_are_not_finite_are_refused(fast):
    decoder = ChunkDecoder(fast, 2)
    while not decoder.is_done:
        decoder.choose(torch.full((2, VOCAB_SIZE), torch.nan))
    with pytest.raises(ValueError, match="not finite"):
        decoder.chunks()
