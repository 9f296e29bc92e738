"""FAST in the model: trained, resumed, merged, quantized, asked, served and checked; one folder says what it is."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from common import GOLDENS, ROOT
from PIL import Image
from safetensors.torch import load_file

import convert_weights
import finetune_lora
import finetune_oft
import fit_fast
import lora
import policy as acting
import sample
import train
from checkpoint import open_checkpoint
from configurator import configure
from data import Samples, open_mixture
from diagnose import check
from fast import FAST, ChunkDecoder
from robots import serve
from tokenizer import EOS, IGNORE_INDEX
from toy import play
from toy import world as toy

K = 3  # steps of a chunk
IMAGES = [np.full((224, 224, 3), value, np.uint8) for value in (40, 120, 200)]
WORDS = ["go", "pick up the red cube", "lift the ball"]  # of different lengths


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Demonstrations, and the options of a run of a tiny model on them."""
    root = tmp_path_factory.mktemp("world")
    toy.write_rlds(root, {"train": toy.demonstrations(toy.TRAIN, 12, linger=3)}, name="toy_chunks")
    dinov2 = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 28, "mlp_dim": 32}
    siglip = {**dinov2, "cls_token": False, "reg_tokens": 0, "layer_scale": False}
    text = {
        "vocab_size": 32064,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    options = {
        "data_root_dir": str(root),
        "data_mix": "toy_chunks",
        "image_aug": False,
        "num_workers": 0,
        "batch_size": 4,
        "micro_batch_size": 4,
        "activation_checkpointing": False,
        "max_steps": 2,
        "lr": 1e-2,
        "log_every": 1,
        "action_chunk": K,
        "action_tokenizer": "fast",
        "fast_vocab_size": 300,
    }
    return root, options, {"vision_configs": [dinov2, siglip], "text_config": text}


@pytest.fixture(scope="module")
def base(world):
    """A FAST model, trained from nothing for two steps."""
    root, options, random_model = world
    train.train(train.Config(**options, random_model=random_model, run_dir=str(root / "base")))
    return root / "base" / "checkpoint"


@pytest.fixture(scope="module")
def policy(base):
    return acting.load_policy(base)


@pytest.fixture(scope="module")
def lora_run(world, base):
    root, options, _ = world
    train_lora(options, base, root / "lora")
    return root / "lora"


def train_lora(options: dict, base, run, **more):
    cfg = finetune_lora.Config(**{**options, "lora_rank": 4, **more}, base_checkpoint=str(base), run_dir=str(run))
    return train.train(cfg, finetune_lora.build)


def ask(policy, rows=(0, 1, 2)) -> np.ndarray:
    return acting.predict_chunk(policy, [[IMAGES[i]] for i in rows], [WORDS[i] for i in rows])


# -----------------------------------------------------------------------------
# Training


def test_the_run_prints_what_rounding_costs(world, base, tmp_path, capsys):
    _, options, _ = world
    train_lora(options, base, tmp_path / "run")
    said = capsys.readouterr().out
    assert f"FAST, toy_chunks: {K} x 7 numbers are " in said and f"(bins: {K * 7})" in said
    assert "rounding changes a number of -1 ... 1 by 0.0" in said and "dx 0.0" in said and " m, dy" in said
    assert "clamped" not in said


def test_labels_are_fast_ids_and_the_end(world, policy):
    root, options, _ = world
    tokenizer = policy.tokenizer
    (dataset, _), *_ = open_mixture(root, "toy_chunks", action_chunk=K)
    chunk = fit_fast.normalized_chunks(dataset, K, 0.05, most=1)[0]
    input_ids, labels = tokenizer.encode_example("go", chunk)
    prompt = tokenizer.encode_prompt("go")
    answer = [31999 - id for id in tokenizer.fast.encode(chunk)] + [EOS]
    assert input_ids.tolist() == prompt + answer
    assert labels.tolist() == [IGNORE_INDEX] * len(prompt) + answer


def test_the_log_has_accuracy_and_no_error(world, base):
    root, _, _ = world
    for line in (root / "base" / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        assert 0 <= metrics["action_accuracy"] <= 1 and "l1_loss" not in metrics
    assert (root / "base" / "curves.png").is_file()


def test_the_chunks_it_is_fitted_to_are_those_that_are_trained_on(world):
    root, _, _ = world
    (dataset, _), *_ = open_mixture(root, "toy_chunks", action_chunk=K)
    chunks = fit_fast.normalized_chunks(dataset, K, 0.05, most=10**6)
    assert len(chunks) == len(dataset)
    for i in (0, len(dataset) // 2, len(dataset) - 1):
        actions = acting.normalize(dataset[i]["actions"], dataset.statistics["action"], dataset.scheme)
        np.testing.assert_array_equal(chunks[i], actions)


def test_a_tokenizer_is_fitted_once(world, base, tmp_path, monkeypatch):
    """The same chunks again, in another run: from the cache. A damaged cache is fitted anew."""
    root, options, random_model = world
    monkeypatch.setenv("OPENVLA_CACHE", str(tmp_path / "cache"))
    cfg = train.Config(**options, random_model=random_model)
    datasets = [dataset for dataset, _ in open_mixture(root, "toy_chunks", action_chunk=K)]
    fitted = fit_fast.fit_to_data(cfg, datasets)
    (folder,) = (tmp_path / "cache").glob("fast-*")
    with monkeypatch.context() as patched:
        patched.setattr(FAST, "fit", None)
        assert fit_fast.fit_to_data(cfg, datasets).merges == fitted.merges
    (folder / "tokenizer.json").write_text("{")
    assert fit_fast.fit_to_data(cfg, datasets).merges == fitted.merges
    assert fit_fast.fit_to_data(replace(cfg, fast_scale=5.0), datasets).scale == 5


def test_resumed_is_uninterrupted(world, base, tmp_path, monkeypatch):
    """The second half has no fitting: the tokenizer of the run is there, whatever fitting would give."""
    _, options, _ = world
    train_lora(options, base, tmp_path / "whole", max_steps=4)
    train_lora(options, base, tmp_path / "half", max_steps=2)
    monkeypatch.setattr(fit_fast, "fit_to_data", None)
    train_lora(options, base, tmp_path / "half", max_steps=4)
    whole, half = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("whole", "half"))
    assert len(whole) > 20 and all(torch.equal(whole[name], half[name]) for name in whole)
    for file in ("fast/tokenizer.json", "fast/processor_config.json"):
        assert (tmp_path / "whole" / file).read_text() == (tmp_path / "half" / file).read_text()
    with pytest.raises(ValueError, match="trained with action_tokenizer 'fast', now it is 'bins'"):
        train_lora(options, base, tmp_path / "half", max_steps=6, action_tokenizer="bins", action_chunk=K)


def test_accumulation_changes_nothing(world, base, tmp_path):
    """Rows have different numbers of tokens, but each row counts the same, wherever a batch is cut."""
    _, options, _ = world
    train_lora(options, base, tmp_path / "once")
    train_lora(options, base, tmp_path / "four", micro_batch_size=1)
    logs = [[json.loads(line)["loss"] for line in open(tmp_path / run / "metrics.jsonl")] for run in ("once", "four")]
    assert logs[0] == pytest.approx(logs[1], abs=1e-5)


def test_two_processes_are_one(world, base, tmp_path):
    """Each has half of a batch, from a worker of its own; one of them fits, and all have the same tokens."""
    _, options, _ = world
    train_lora(options, base, tmp_path / "one")
    words = [f"--base_checkpoint={base}", f"--run_dir={tmp_path / 'two'}", "--lora_rank=4", "--micro_batch_size=2"]
    words += [f"--{key}={value}" for key, value in options.items() if key not in ("micro_batch_size", "num_workers")]
    words.append("--num_workers=1")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launch, "finetune_lora.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("numbers are") == 1  # one process says what rounding costs
    logs = [[json.loads(line)["loss"] for line in open(tmp_path / run / "metrics.jsonl")] for run in ("one", "two")]
    assert logs[0] == pytest.approx(logs[1], abs=1e-5)
    tokenizers = [(tmp_path / run / "fast" / "tokenizer.json").read_text() for run in ("one", "two")]
    assert tokenizers[0] == tokenizers[1]


def test_without_the_option_a_run_has_the_tokens_of_its_base(world, base, tmp_path):
    _, options, _ = world
    own = {key: value for key, value in options.items() if not key.startswith(("action_tokenizer", "fast_"))}
    train_lora(own, base, tmp_path / "run")
    assert open_checkpoint(tmp_path / "run").fast.merges == open_checkpoint(base).fast.merges


def test_bins_again(world, base, tmp_path):
    """A FAST base may learn bins, in a folder where a FAST run was, and merged it is a token model as any other."""
    _, options, _ = world
    train_lora(options, base, tmp_path / "run", max_steps=1)
    train_lora(options, base, tmp_path / "run", max_steps=1, action_tokenizer="bins", action_chunk=1, resume="never")
    lora.merge(tmp_path / "run", tmp_path / "merged")
    for folder in ("run", "merged"):
        policy = acting.load_policy(tmp_path / folder)
        assert policy.fast is None and not policy.gives_chunks
    assert "action_tokenizer" not in json.loads((tmp_path / "merged" / "config.json").read_text())


# -----------------------------------------------------------------------------
# Acting


def test_a_folder_alone_says_what_it_is(base, lora_run):
    for folder in (base, lora_run):
        policy = acting.load_policy(folder)
        assert policy.gives_chunks and policy.action_chunk == K and policy.num_images == 1 and not policy.is_oft
        chunks = ask(policy)
        assert chunks.shape == (3, K, 7)
        with pytest.raises(ValueError, match="a FAST policy, which answers with chunks: use predict_chunk"):
            acting.predict_action(policy, [IMAGES[0]], "go")


def test_no_action_is_beyond_those_of_training(policy):
    """An untrained model generates wild coefficients; the robot gets the ends of the range."""
    wild = 0
    for seed in range(5):
        decoder = ChunkDecoder(policy.fast, 4, temperature=5.0, generator=torch.Generator().manual_seed(seed))
        inputs = acting.prepare_inputs(policy, [IMAGES[0]] * 4, [WORDS[0]] * 4, None)
        policy.model.generate_with(decoder, *inputs[:2], policy.fast.max_tokens(K, 7), inputs[2])
        wild = max(wild, np.abs(decoder.chunks()).max())
    assert wild > 1.2
    assert np.abs(acting.predict_normalized_chunk(policy, IMAGES, WORDS)).max() <= 1


def test_merged_is_unmerged(lora_run, tmp_path):
    lora.merge(lora_run, tmp_path / "merged")
    answers = [ask(acting.load_policy(folder)) for folder in (lora_run, tmp_path / "merged")]
    np.testing.assert_array_equal(*answers)


def test_quantized_keeps_its_tokens(base, tmp_path):
    convert_weights.quantize_folder(base, tmp_path / "q", bits=8, group=32)
    assert ask(acting.load_policy(tmp_path / "q")).shape == (3, K, 7)


def test_a_batch_is_its_rows(policy):
    np.testing.assert_array_equal(ask(policy), np.concatenate([ask(policy, [i]) for i in range(3)]))


@torch.inference_mode()
def test_cache_or_no_cache(policy):
    """Each token once more from the whole sequence, without a key/value cache."""
    for i in range(3):
        input_ids, pixel_values, _ = acting.prepare_inputs(policy, [IMAGES[i]], [WORDS[i]], None)
        decoder = ChunkDecoder(policy.fast, 1)
        while not decoder.is_done:
            logits, _ = policy.model(input_ids, pixel_values)
            input_ids = torch.cat([input_ids, decoder.choose(logits[:, -1])[:, None]], dim=1)
        np.testing.assert_array_equal(
            np.clip(decoder.chunks(), -1, 1), acting.predict_normalized_chunk(policy, [IMAGES[i]], [WORDS[i]])
        )


def test_played_in_the_toy_world(policy):
    result = play.play(policy, 3, open_loop=K)
    assert result.steps.max() <= toy.MAX_STEPS


def test_sample_prints_each_step(base, policy, tmp_path, capsys):
    paths = []
    for i in range(2):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(IMAGES[i]).save(paths[-1])
    words = ["--checkpoint", str(base), "--image", *paths, "--instruction", *WORDS[:2]]
    sample.main(configure(sample.Config, words))
    said = capsys.readouterr().out
    assert "0.png: go, step 1" in said and f"1.png: {WORDS[1]}, step {K}" in said and said.count("gripper") == 2 * K
    sample.main(configure(sample.Config, [*words, "--json"]))
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    np.testing.assert_allclose(answer["actions"], ask(policy, [0, 1]))


def test_served(policy):
    cfg = serve.Config()
    payload = {"images": [IMAGES[0]], "instruction": "go", "unnorm_key": None, "state": None, "previous": None}
    request = serve.make_request(payload, policy, cfg)
    answers = serve.answer_batch(policy, [request, request], None)
    np.testing.assert_array_equal(answers, ask(policy, [0, 0]))
    assert len(serve.encode_answer(answers[0], "", serve.OFT_JSON)) == K


def test_checked(world, base, lora_run, tmp_path, capsys):
    root, _, _ = world
    words = ["--checkpoint", str(base), "--data_root_dir", str(root), "--data_mix", "toy_chunks"]
    words += ["--out", str(tmp_path), "--frames", "8", "--what_if", "4"]
    for command in ("policy", "language"):
        check.main(command, configure(check.Config, words))
    said = capsys.readouterr().out
    assert "ok   paths: 100.0%" in said and "ok   prompt" in said and "L1 per dimension" in said
    with pytest.raises(SystemExit):
        check.main("attention", configure(check.Config, words))
    assert "is a FAST policy" in capsys.readouterr().err

    for folder in (base, lora_run):
        convert_weights.check(folder)
        said = capsys.readouterr().out
        assert f"FAST tokens: chunks of {K} x 7 numbers, vocabulary of " in said
        assert "the official code would read as bins" in said


# -----------------------------------------------------------------------------
# What is refused


def test_a_copy_without_its_tokenizer_is_refused(base, lora_run, tmp_path):
    folder = shutil.copytree(base, tmp_path / "copy", ignore=shutil.ignore_patterns("fast"))
    with pytest.raises(ValueError, match="actions are fast tokens, and fast/ is missing"):
        acting.load_policy(folder)
    run = shutil.copytree(lora_run, tmp_path / "run", ignore=shutil.ignore_patterns("fast", "checkpoints"))
    with pytest.raises(ValueError, match="export is not complete"):
        acting.load_policy(run)


def test_a_half_tokenizer_is_refused(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "copy")
    (folder / "fast" / "processor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="fast/processor_config.json: no such file"):
        acting.load_policy(folder)


def test_a_folder_that_says_nothing_of_its_tokenizer_is_refused(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    for kind, message in (("bins", "actions are bins tokens, and fast/ is there"), ("beast", "it is bins or fast")):
        (folder / "config.json").write_text(json.dumps({**config, "action_tokenizer": kind}))
        with pytest.raises(ValueError, match=message):
            acting.load_policy(folder)


def test_statistics_of_another_size_are_refused(policy):
    stats = {"q01": [-1.0] * 6, "q99": [1.0] * 6}
    other = replace(policy, norm_stats={"other": {"action": stats}})
    with pytest.raises(ValueError, match="6 numbers of an action, the policy's chunks have 7"):
        ask(other)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"action_tokenizer": "bins"}, "--action_chunk 3: bins are the tokens of one action"),
        ({"action_chunk": 40}, "have at most .* steps, --action_chunk 40 needs as many"),
        ({"action_tokenizer": "no/such/folder"}, "no/such/folder/processor_config.json: no such file"),
        ({"action_tokenizer": str(GOLDENS / "fast")}, r"chunks of 8 steps \(time_horizon\), they have 3; fit another"),
        ({"fast_vocab_size": 4096}, "--fast_scale, --fast_vocab_size: vocabulary of 4096"),
        ({"fast_scale": 0.0}, "scale 0.0: must be above 0"),
    ],
)
def test_options_that_cannot_be(world, base, tmp_path, change, message):
    _, options, _ = world
    with pytest.raises((ValueError, OSError), match=message):
        train_lora({**options, **change}, base, tmp_path / "run")


def test_a_vocabulary_beyond_the_ids_of_the_language_model_is_refused(world, base, tmp_path):
    _, options, _ = world
    fast = open_checkpoint(base).fast
    for symbol in range(2049 - fast.vocab_size):
        fast.symbols.append(f"一{symbol}")  # of which no chunk is made
    fast.save_pretrained(tmp_path / "large")
    with pytest.raises(ValueError, match="it has 2049 tokens, the language model has 2048 ids to give away"):
        train_lora({**options, "action_tokenizer": str(tmp_path / "large")}, base, tmp_path / "run")


def test_oft_has_no_tokens(world, base, tmp_path):
    _, options, _ = world
    cfg = finetune_oft.Config(**options, base_checkpoint=str(base), run_dir=str(tmp_path), views=("primary",))
    with pytest.raises(ValueError, match="models that generate tokens"):
        finetune_oft.check(cfg)


def test_robots_of_different_sizes_are_refused(tmp_path):
    datasets = []
    for A in (6, 7):
        frames = [{"image": IMAGES[0], "action": np.arange(A) + i, "instruction": "go"} for i in range(4)]
        datasets.append(Samples([frames], name=f"robot{A}", gripper=False))
    with pytest.raises(ValueError, match="one size, the datasets have {'robot6': 6, 'robot7': 7}"):
        fit_fast.common_action_dim(datasets)
