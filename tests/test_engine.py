"""Drafts, recorded passes, compiled blocks and batches: the tokens of greedy decoding, whatever the draft."""

import copy
import shutil

import numpy as np
import pytest
import torch
import torch.nn as nn
from common import with_tokenizer

from lora import add_lora
from model import OpenVLA
from policy import load_policy, pick_engine, predict_action, predict_chunk
from speed import engine as engine_module
from speed import engine as engines
from speed.engine import Engine, OneDNNLinear
from tokenizer import NUM_BINS, VOCAB_SIZE, is_action_id, make_standin

N = 7


@pytest.fixture(scope="module")
def model(folders):
    return OpenVLA.from_pretrained(folders["tiny-openvla"], torch.float32)


def random_inputs(seed: int, B: int):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 30, (B,), generator=g)
    ids = torch.randint(3, 31000, (B, int(lengths.max())), generator=g)
    ids[:, 0] = 1
    return ids, torch.randn(B, 6, 224, 224, generator=g), lengths


def drafts_for(tokens: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    wrong = (tokens + VOCAB_SIZE // 2) % VOCAB_SIZE
    partly = torch.where(torch.rand(tokens.shape, generator=g) < 0.7, tokens, wrong)
    return dict(right=tokens, wrong=wrong, partly=partly, of_another=tokens.roll(1, 0), random=wrong.roll(3, 1))


@pytest.mark.parametrize("is_intel", [False, True])
def test_greedy_whatever_the_draft(model, monkeypatch, is_intel):
    """1,000 random prompts and pictures, in batches of mixed lengths; half of them as an Intel CPU multiplies."""
    monkeypatch.setattr(engines, "is_intel_cpu", lambda: is_intel)
    engine = Engine(model)
    for seed in range(is_intel, 50, 2):
        ids, pixels, lengths = random_inputs(seed, 20)
        want = model.generate(ids, pixels, N, lengths)[0]
        name, draft = list(drafts_for(want, seed).items())[seed % 5]
        for given in (None, draft):
            before = None if given is None else given.clone()
            tokens, passes = engine.generate(ids, pixels, N, lengths, given)
            assert torch.equal(tokens, want), (seed, name)
            assert given is None or torch.equal(given, before)
            assert passes == 1 if given is not None and name == "right" else passes <= N


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs PyTorch with oneDNN")
def test_the_model_stays_as_it_is(model, monkeypatch):
    """The engine has modules of its own, over the same weights. MKL is as fast as can be on the CPUs of its maker."""
    head = model.language_model.lm_head
    monkeypatch.setattr(engines, "is_intel_cpu", lambda: True)
    assert type(Engine(model).model.language_model.lm_head) is nn.Linear
    monkeypatch.setattr(engines, "is_intel_cpu", lambda: False)
    faster_head = Engine(model).model.language_model.lm_head
    assert type(faster_head) is OneDNNLinear and type(head) is nn.Linear
    assert faster_head.weight is head.weight


def test_batch_is_its_rows(model):
    engine = Engine(model)
    ids, pixels, lengths = random_inputs(99, 6)
    want = model.generate(ids, pixels, N, lengths)[0]
    for draft in (None, *drafts_for(want, 1).values()):
        for i, T in enumerate(lengths.tolist()):
            row = None if draft is None else draft[i : i + 1]
            tokens, _ = engine.generate(ids[i : i + 1, :T], pixels[i : i + 1], N, None, row)
            assert torch.equal(tokens[0], want[i])


def test_recorded_passes(model, monkeypatch):
    """What a GPU would record: padded prompts, one cache and one shape of pass for all; here without the recording."""
    made = []
    monkeypatch.setattr(engine_module, "record", lambda fn, inputs: made.append(fn) or fn)
    engine = Engine(model)
    engine.records = True
    for seed in range(4):
        ids, pixels, lengths = random_inputs(seed, 2)
        ids, lengths = ids[:, :12], lengths.clamp_max(12)
        want = model.generate(ids, pixels, N, lengths)[0]
        for draft in (None, *drafts_for(want, seed).values()):
            assert torch.equal(engine.generate(ids, pixels, N, lengths, draft)[0], want)
    assert len(made) == 3 and len(engine.recorded) == 1  # one of each kind; all prompts were padded to one length


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile wants g++ on a CPU")
def test_compiled(model):
    engine = Engine(model, compile=True)
    ids, pixels, lengths = random_inputs(0, 2)
    for seed in range(2):
        pixels = pixels.roll(1, 0)
        want = model.generate(ids, pixels, N, lengths)[0]
        draft = drafts_for(want, seed)["partly"]
        assert torch.equal(engine.generate(ids, pixels, N, lengths, draft)[0], want)
    torch.compiler.reset()


def test_actions_only(model):
    """The best of the 256 action ids, where greedy decoding writes others."""
    model = copy.deepcopy(model)
    model.language_model.lm_head.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    ids, pixels, _ = random_inputs(5, 3)
    want, logits = model.generate(ids, pixels, N)
    assert not is_action_id(want).all()
    for draft in (None, want, torch.full_like(want, 31900)):
        tokens, _ = Engine(model, actions_only=True).generate(ids, pixels, N, None, draft)
        assert is_action_id(tokens).all()
        best = logits[:, 0, VOCAB_SIZE - NUM_BINS : VOCAB_SIZE].argmax(-1) + VOCAB_SIZE - NUM_BINS
        assert torch.equal(tokens[:, 0], best)


def test_refusals(model):
    ids, pixels, _ = random_inputs(5, 2)
    with pytest.raises(ValueError, match=r"draft is \(2, 6\), wanted \(2, 7\)"):
        Engine(model).generate(ids, pixels, N, None, torch.zeros(2, 6, dtype=torch.long))
    with pytest.raises(ValueError, match="prompt too long"):
        Engine(model).generate(ids.repeat(1, 200), pixels, N)
    engine = Engine(model)  # recorded passes pad the prompt; that does not count
    engine.records, limit = True, model.cfg.text.max_position_embeddings
    with pytest.MonkeyPatch.context() as m:
        m.setattr(engine_module, "record", lambda fn, inputs: fn)
        m.setattr(engine.model.cfg.text, "max_position_embeddings", 256 + ids.shape[1] + N)
        assert torch.equal(engine.generate(ids, pixels, N)[0], Engine(model).generate(ids, pixels, N)[0])
    assert model.cfg.text.max_position_embeddings == limit
    draft = torch.full((2, N), 10**6)  # no id at all: a draft cannot do harm
    assert torch.equal(Engine(model).generate(ids, pixels, N, None, draft)[0], model.generate(ids, pixels, N)[0])


def test_policy_with_previous_actions(folders, tmp_path):
    """predict_action with an engine: the same actions, and its last ones are a draft that fits when nothing changes."""
    policy = load_policy(with_tokenizer(shutil.copytree(folders["tiny-openvla"], tmp_path / "m")), torch.float32)
    pictures = [np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8) for i in range(2)]
    words = ["put the spoon on the towel", "lift it"]
    policy.engine, passes = Engine(policy.model, actions_only=True), []
    generate = policy.engine.generate

    def counted(*args):
        tokens, n = generate(*args)
        passes.append(n)
        return tokens, n

    for key in ("bridge_orig", "toy"):
        policy.engine.generate = lambda *args: generate(*args[:-1])  # without the draft: one by one
        want = predict_action(policy, pictures, words, key)
        policy.engine.generate = counted
        for previous in (None, want[::-1], want):
            got = predict_action(policy, pictures, words, key, previous=previous)
            np.testing.assert_array_equal(got, want)
        assert passes[-1] == 1 < passes[-2]


def test_statistics_of_the_two_figures_that_are_needed(folders, tmp_path):
    policy = load_policy(with_tokenizer(shutil.copytree(folders["tiny-openvla"], tmp_path / "m")), torch.float32)
    policy.norm_stats = {"mine": {"action": dict(q01=[-1.0] * 7, q99=[1.0] * 7)}}
    policy.engine = Engine(policy.model, actions_only=True)
    assert predict_action(policy, [np.zeros((8, 8, 3), np.uint8)], ["go"]).shape == (1, 7)


def test_an_answer_that_is_not_finite_is_an_error(folders, tmp_path):
    """Never an action, with and without the engine."""
    policy = load_policy(with_standin(folders, tmp_path / "m"), torch.float32)
    policy.model.language_model.model.norm.weight.data[3] = float("nan")
    for engine in (None, Engine(policy.model), Engine(policy.model, actions_only=True)):
        policy.engine = engine
        with pytest.raises(ValueError, match="the answer is not finite"):
            predict_action(policy, [np.zeros((8, 8, 3), np.uint8)], ["go"], "toy")


def with_standin(folders, to):
    """A golden model with a tokenizer that needs no file of others."""
    folder = shutil.copytree(folders["tiny-openvla"], to)
    make_standin(folder / "tokenizer.model")
    return folder


def test_the_option(folders, tmp_path):
    """auto takes the engine on a CPU, and does without where there is none."""
    policy = load_policy(with_standin(folders, tmp_path / "m"), torch.float32)
    assert isinstance(pick_engine(policy, "auto"), Engine)
    assert isinstance(pick_engine(policy, "on"), Engine)
    assert pick_engine(policy, "off") is None
    with pytest.raises(ValueError, match="--engine fast: must be auto, on or off"):
        pick_engine(policy, "fast")
    add_lora(policy.model, 2)
    assert pick_engine(policy, "auto") is None
    with pytest.raises(ValueError, match="--engine on: the model has adapters; merge them first"):
        pick_engine(policy, "on")


@pytest.mark.filterwarnings("ignore:not an action")
def test_chunks_with_previous_actions(folders, tmp_path):
    policy = load_policy(with_standin(folders, tmp_path / "m"), torch.float32)
    images = [[np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8)] for i in range(3)]
    want = predict_chunk(policy, images, ["go", "lift it", "go"], unnorm_key="toy")
    policy.engine = pick_engine(policy, "auto")
    generate = policy.engine.generate
    drafts = []
    policy.engine.generate = lambda *inputs: drafts.append(inputs[-1]) or generate(*inputs)
    for previous in (None, want[:, 0], np.full((3, 7), 0.3)):
        found = predict_chunk(policy, images, ["go", "lift it", "go"], unnorm_key="toy", previous=previous)
        np.testing.assert_array_equal(found, want)
    assert not torch.equal(drafts[0], drafts[1]) and not torch.equal(drafts[0], drafts[2])  # the last action


def test_adapters_and_oft_are_refused(folders):
    from oft import OFT, OFTConfig

    model = OpenVLA.from_pretrained(folders["tiny-openvla"], torch.float32)
    with pytest.raises(ValueError, match="OFT is no token model"):
        Engine(OFT(model, OFTConfig(num_images=1)))
    with pytest.raises(ValueError, match="merge them first"):
        Engine(add_lora(model, 2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_recording(model):
    model = copy.deepcopy(model).cuda()
    engine = Engine(model)
    for seed in range(3):
        ids, pixels, lengths = (x.cuda() for x in random_inputs(seed, 2))
        ids, lengths = ids[:, :12], lengths.clamp_max(12)
        want = model.generate(ids, pixels, N, lengths)[0]
        for draft in (None, *drafts_for(want.cpu(), seed).values()):
            assert torch.equal(engine.generate(ids, pixels, N, lengths, draft)[0], want)
