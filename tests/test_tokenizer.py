"""Prompts, ids, bins and normalisation against the official tokenizer, action tokenizer and data pipeline."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from common import GOLDENS, ROOT, shared
from hypothesis import given
from hypothesis import strategies as st

import tokenizer as T
from formats import protobuf
from model import PAD_TOKEN_ID
from normalize import normalize, unnormalize


@pytest.fixture(scope="module")
def llama():
    path = shared("data/llama2-tokenizer/tokenizer.model")
    return {"pure": T.Tokenizer(path), "vicuna": T.Tokenizer(path.parent, T.PROMPT_VICUNA)}


def test_all_prompt_cases(llama):
    cases = json.loads((GOLDENS / "prompts.json").read_text())["examples"]
    assert len(cases) == 44
    for case in cases:
        for kind, tokenizer in llama.items():
            want = case[kind]
            assert tokenizer.encode(want["prompt"]) == want["input_ids"], case["instruction"]
            assert tokenizer.encode_prompt(case["instruction"]) == want["input_ids_predict_action"]
            ids, labels = tokenizer.encode_example(case["instruction"], case["action"])
            first = want["train_first_label_index"]
            assert ids.tolist() == want["train_input_ids"]
            assert labels.tolist() == [-100] * first + want["train_labels_tail"]


def test_collated_batch(llama):
    prompts = json.loads((GOLDENS / "prompts.json").read_text())
    examples = [prompts["examples"][i] for i in prompts["collated"]["indices"]]
    pairs = [llama["pure"].encode_example(e["instruction"], e["action"]) for e in examples]
    ids, lengths = T.pad_sequences([p[0] for p in pairs], T.PAD)
    labels, _ = T.pad_sequences([p[1] for p in pairs], T.IGNORE_INDEX)
    assert ids.tolist() == prompts["collated"]["input_ids"] and labels.tolist() == prompts["collated"]["labels"]
    assert lengths.tolist() == [sum(row) for row in prompts["collated"]["attention_mask"]]


@given(st.text(alphabet=st.characters(blacklist_categories=["Cs"], blacklist_characters="\0▁"), max_size=40))
def test_text_round_trip(text):
    tokenizer = T.Tokenizer(shared("data/llama2-tokenizer/tokenizer.model"))
    if not any(special in text for special in ("<unk>", "<s>", "</s>", "<PAD>")):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_all_action_token_cases():
    cases = json.loads((GOLDENS / "action_tokenizer.json").read_text())
    for case in cases["values"]:
        value = getattr(np, case["dtype"])(case["value"])
        assert T.encode_action(value) == case["token_id"] == T.encode_action(torch.tensor(value))
        assert T.decode_action(np.int64(case["token_id"])) == pytest.approx(case["decoded"], abs=1e-15)
    for case in cases["bin_edges"]:
        edge = case["edge"]
        near_edge = {
            "minus": np.nextafter(edge, -2),
            "exact": np.float64(edge),
            "plus": np.nextafter(edge, 2),
            "minus_1e-6": edge - 1e-6,
            "plus_1e-6": edge + 1e-6,
            "float32_exact": np.float32(edge),
        }
        for key, value in near_edge.items():
            dtype = torch.float32 if key == "float32_exact" else torch.float64
            assert T.encode_action(value) == case[key], (key, edge)
            assert T.encode_action(torch.tensor(value, dtype=dtype)) == case[key], (key, edge)
    ids = np.arange(cases["decode_ids"]["first"], cases["decode_ids"]["last"] + 1)
    for values in (T.decode_action(ids), T.decode_action(torch.from_numpy(ids)).numpy()):
        np.testing.assert_allclose(values, cases["decode_ids"]["decoded"], atol=1e-15)
    for token, value in cases["decode_special"]:
        assert T.decode_action(np.int64(token)) == pytest.approx(value, abs=1e-15)
    np.testing.assert_allclose(T.CENTERS, cases["bin_centers"], atol=1e-15)


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=14))
def test_action_round_trip(values):
    ids = T.encode_action(np.array(values))
    back = T.decode_action(ids)
    assert T.is_action_id(ids).all()
    assert np.abs(back - np.clip(values, -1, 1)).max() <= 1 / 255 + 1e-12
    assert (np.abs(T.encode_action(back) - ids) <= 1).all()  # 256 ids share 255 centres
    assert torch.equal(T.encode_action(torch.tensor(values, dtype=torch.float64)), torch.from_numpy(ids))


def test_normalisation_fixtures():
    fixture = np.load(shared("facts/pipeline_fixtures/normalization.npz"))
    for kind in ("action", "proprio"):
        keys = ("mean", "std", "max", "min", "q01", "q99", "mask")
        stats = {k: fixture[f"{kind}::{k}"] for k in keys if f"{kind}::{k}" in fixture}
        for scheme in ("normal", "bounds", "bounds_q99"):
            out = normalize(fixture["x"], stats, scheme)
            assert np.array_equal(out, fixture[f"out_{kind}_{scheme}"]), (kind, scheme)


@given(st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=3))
def test_unnormalise_inverts_normalise(y):
    stats = dict(q01=[-2.0, 0.1, 0.0], q99=[3.0, 0.2, 1.0], min=[-3, 0, 0], max=[4, 1, 1], mask=[True, True, False])
    x = unnormalize(np.array(y), stats)
    assert x.dtype == np.float64 and x[2] == y[2]
    np.testing.assert_allclose(normalize(x, stats), y, atol=2e-6)


def test_inputs_are_not_changed():
    x, stats = np.array([[5.0, 0.5]], np.float32), dict(q01=[0.0, 0.0], q99=[1.0, 1.0], min=[0, 0], max=[9, 1])
    before = x.copy()
    normalize(x, stats), unnormalize(x, stats), T.encode_action(x)
    assert np.array_equal(x, before)


def test_one_padding_token():
    assert T.PAD == PAD_TOKEN_ID == 32000  # two files that import nothing of each other


def test_prompt_is_chosen_by_the_config():
    assert T.prompt_for({"llm_backbone_id": "vicuna-v15-7b"}) == T.PROMPT_VICUNA
    assert T.prompt_for({"hf_llm_id": "meta-llama/Llama-2-7b-hf"}) == T.PROMPT
    assert T.prompt_for({}) == T.PROMPT


def test_not_a_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.model"):
        T.Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        T.Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        T.Tokenizer(tmp_path)


def test_standin_has_llamas_layout(tmp_path):
    """The stand-in tokenizer: one token per word, nothing lost on any other text, special places as in Llama's."""
    T.make_standin(tmp_path / "tokenizer.model", ("pick", "up", "cube"))
    tokenizer = T.Tokenizer(tmp_path)
    ids = tokenizer.encode_prompt("Pick up the cube")
    assert len(ids) == 1 + 8 + 4 + 3 + 1 and ids[0] == T.BOS and ids[-1] == T.BLANK  # words, "?", newline, "Out:"
    assert T.Tokenizer(tmp_path).encode("\n")[-1] == 13
    for text in ("pick up", "Zebra  über\n\tñ 漢字 🙂", " a", "x" * 50):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert not any(T.is_action_id(i) for i in tokenizer.encode(text))


def test_standin_needs_no_protobuf(tmp_path):
    """Its bytes are those that sentencepiece's own protobuf class wrote, which not every version of protobuf loads."""
    path = tmp_path / "tokenizer.model"
    code = f"""
import sys
sys.modules["google.protobuf"] = None  # cannot be imported

from tokenizer import Tokenizer, make_standin

make_standin({str(path)!r}, ("pick", "up", "cube"))
print(Tokenizer({str(path)!r}).sp.encode("pick up cube", out_type=str))
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "['▁pick', '▁up', '▁cube']", run.stderr
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert sha256 == "3cc2af0b47d71db68a6c578978b85e390f141030a0b3fe06d02715550fc24318"


@pytest.mark.parametrize(
    ("field", "content"),
    [
        (protobuf.integer(1, 0), "08 00"),
        (protobuf.integer(1, 127), "08 7f"),
        (protobuf.integer(1, 128), "08 80 01"),
        (protobuf.integer(16, True), "80 01 01"),
        (protobuf.integer(1, -1), "08 ff ff ff ff ff ff ff ff ff 01"),
        (protobuf.message(2, b"testing"), "12 07 74 65 73 74 69 6e 67"),
        (protobuf.message(2, b""), "12 00"),
        (protobuf.fixed32(2, 1.0), "15 00 00 80 3f"),
    ],
)
def test_fields_of_protocol_buffers(field, content):
    """As https://protobuf.dev/programming-guides/encoding says."""
    assert field == bytes.fromhex(content)


@pytest.mark.parametrize(
    ("instruction", "reason"),
    [("", "is blank"), (" \n\t", "is blank"), ("\ud800", "surrogate"), ("lift \udfff it", "surrogate"), (7, "a text")],
)
def test_instructions_that_tell_nothing(instruction, reason):
    with pytest.raises(ValueError, match=reason):
        T.check_instruction(instruction)


def test_other_instructions_pass(tmp_path):
    """Letters beyond the basic plane are no surrogates; a dataset's frame may have no instruction."""
    for text in ("lift it", "x", "\U0001f600", "抓住它"):
        T.check_instruction(text)
    T.make_standin(tmp_path / "tokenizer.model")
    T.Tokenizer(tmp_path).encode_example("", np.zeros(7))
