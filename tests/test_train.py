"""The training loop: equal to the official numbers, to itself when interrupted, and to itself on more processes."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from common import ROOT, golden, pixels, shared
from safetensors.torch import load_file
from torch.distributed.checkpoint import state_dict_saver

import model
import policy as acting
import resume
import train
from checkpoint import open_checkpoint
from configurator import configure
from data import Samples
from formats import rlds
from model import LM_HEAD, OpenVLA
from tokenizer import PAD, make_standin
from toy import world as toy


def test_loss_accuracy_and_l1_as_in_the_official_loop(models):
    """The golden training batch through the counting of metrics.py: the official loss, action accuracy and L1."""
    from metrics import count_tokens

    model, (tensors, info) = models["tiny-openvla"], golden("tiny-openvla")
    pixel_values = torch.cat([pixels(info, e) for e in info["examples"]])
    labels = tensors["train/labels"]
    logits, loss = model(tensors["train/input_ids"], pixel_values, labels)
    assert loss.item() == pytest.approx(info["train"]["loss"], abs=1e-5)
    trained = labels[:, 1:] >= 0
    which = torch.arange(3)[:, None].expand_as(trained)[trained]
    counts = count_tokens(logits.argmax(-1), labels[:, 1:][trained], which, 3)
    n, right, error = counts.sum(0).tolist()
    assert n == 21 and counts[:, 0].tolist() == [7, 7, 7]
    assert right / n == pytest.approx(info["train"]["action_accuracy"], abs=1e-6)
    assert error / n == pytest.approx(info["train"]["action_l1_loss"], abs=1e-6)
    assert PAD in tensors["train/input_ids"]  # padding was there to be ignored


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (dict(lr=1.0), {0: 1.0, 99: 1.0}),
        (dict(lr=1.0, warmup_steps=4), {0: 0.25, 3: 1.0, 50: 1.0}),
        (dict(lr=1.0, schedule="cosine", max_steps=100), {0: 1.0, 50: 0.5, 100: 0.0, 25: 0.853553390593}),
        (dict(lr=1.0, schedule="cosine", warmup_steps=20, max_steps=120), {0: 0.05, 19: 1.0, 20: 1.0, 70: 0.5}),
        (dict(lr=5e-4, schedule="step", decay_step=100), {99: 5e-4, 100: 5e-5}),
        (dict(lr=5e-4, schedule="step", decay_step=100, warmup_steps=10), {0: 5e-5, 99: 5e-4, 100: 5e-5, 120: 5e-5}),
    ],
)
def test_learning_rate(options, steps):
    for step, lr in steps.items():
        assert train.get_lr(step, train.Config(**options)) == pytest.approx(lr, abs=1e-12)


@pytest.mark.parametrize("parts", ["full", "frozen_vision", "last_layer", "sandwich"])
def test_frozen_parts_do_not_move_and_trained_ones_do(folders, parts):
    tensors, info = golden("tiny-openvla")
    model = OpenVLA.from_pretrained(folders["tiny-openvla"], torch.float32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    train.freeze(model, parts)
    optimizer = train.build_optimizer(model, train.Config(lr=1e-2), fused=True)
    pixel_values = torch.cat([pixels(info, e) for e in info["examples"]])
    model(tensors["train/input_ids"], pixel_values, tensors["train/labels"])[1].backward()
    optimizer.step()
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    last = ("language_model.model.embed_tokens", "language_model.model.layers.2.", "language_model.lm_head")
    expected = {
        "full": lambda k: True,
        "frozen_vision": lambda k: not k.startswith("vision_backbone"),
        "last_layer": lambda k: k.startswith(last),
        "sandwich": lambda k: k.startswith((*last, "vision_backbone", "projector")),
    }[parts]
    assert moved == {k for k in before if expected(k)}


# ----------------------------------------------------------------------------- whole runs, on a toy of a model

CONFIG = """
import numpy as np

from data import Samples

_rng = np.random.default_rng(0)
_rows = [
    {
        "image": _rng.integers(0, 255, (28, 28, 3), dtype=np.uint8),
        "action": _rng.normal(size=7),
        "instruction": f"do {i % 3}",
    }
    for i in range(24)
]
data_mix = [(Samples(_rows), 1.0)]
random_model = {
    "vision_configs": [dict(embed_dim=16, depth=3, num_heads=2, img_size=28, mlp_dim=32)] * 2,
    "text_config": {
        "vocab_size": 32064,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
}
batch_size = 4
micro_batch_size = 4
lr = 3e-3
warmup_steps = 2
num_workers = 0
log_every = 1
max_steps = 6
"""


@pytest.fixture
def config(tmp_path):
    """Writes a config file and gives the arguments for a run in tmp_path / name."""
    (tmp_path / "c.py").write_text(CONFIG)
    tokenizer = tmp_path / "tokenizer.model"
    make_standin(tokenizer)

    def arguments(name, *options):
        return [
            "--config",
            str(tmp_path / "c.py"),
            "--tokenizer",
            str(tokenizer),
            "--run_dir",
            str(tmp_path / name),
            *options,
        ]

    return arguments


def run(argv, processes=1):
    """A training run in processes of its own."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*launch, str(ROOT / "train.py"), *argv]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process):
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return {k: v for p in (folder / "checkpoint").glob("*.safetensors") for k, v in load_file(p).items()}


def train_here(argv, **options):
    return train.train(configure(train.Config, argv), **options)


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return len(a) > 20 and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_killed_at_any_point_and_resumed_equals_uninterrupted(config, tmp_path):
    """SIGKILL somewhere after the first checkpoint, again and again: losses and weights are the same bits."""
    train_here(config("whole"))
    rng = random.Random()
    for _ in range(2):
        process = run(config("killed", "--save_every", "1"))
        steps = tmp_path / "killed" / "checkpoints"
        before = set(steps.glob("step-*"))
        while process.poll() is None and set(steps.glob("step-*")) <= before:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.2)
        process.kill()
        process.wait()
    finished(run(config("killed", "--save_every", "1")))
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")
    assert same_weights(tmp_path / "whole", tmp_path / "killed")
    assert len(list(steps.glob("step-*"))) == 2  # the last two are kept


def test_killed_while_saving_keeps_the_checkpoint_before(config, tmp_path, monkeypatch):
    train_here(config("whole"))
    real, calls = state_dict_saver.save, []

    def save(state, checkpoint_id, **options):
        calls.append(checkpoint_id)
        real(state, checkpoint_id=checkpoint_id, **options)
        if len(calls) == 3:
            next(checkpoint_id.glob("*.distcp")).write_bytes(b"half of a fi")
            raise KeyboardInterrupt

    monkeypatch.setattr(state_dict_saver, "save", save)
    with pytest.raises(KeyboardInterrupt):
        train_here(config("cut", "--save_every", "1"))
    assert [p.name for p in resume.complete_checkpoints(tmp_path / "cut")] == ["step-000001", "step-000002"]
    train_here(config("cut", "--save_every", "1"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut") and same_weights(tmp_path / "whole", tmp_path / "cut")


def test_accumulation_changes_nothing(config, tmp_path):
    train_here(config("once"))
    train_here(config("four", "--micro_batch_size", "1"))
    assert losses(tmp_path / "once") == pytest.approx(losses(tmp_path / "four"), abs=1e-5)


def test_two_processes_equal_one(config, tmp_path):
    """Sharded over two processes, with accumulation; then the second half of the run on one process alone."""
    train_here(config("one"))
    finished(run(config("two", "--micro_batch_size", "1"), processes=2))
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=1e-5)
    two = weights(tmp_path / "two")
    for k, v in weights(tmp_path / "one").items():
        if k.endswith("qkv.bias"):  # a bias of keys changes nothing, and Adam makes steps of its rounding
            v, two[k] = (x.view(3, -1)[[0, 2]] for x in (v, two[k]))
        torch.testing.assert_close(v, two[k], atol=1e-4, rtol=0)
    finished(run(config("half", "--micro_batch_size", "2", "--max_steps", "3"), processes=2))
    train_here(config("half"))
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "half"), abs=1e-5)


def test_sigterm_saves_and_says_how_to_resume(config, tmp_path):
    train_here(config("whole", "--max_steps", "200", "--log_every", "20"))
    process = run(config("stopped", "--max_steps", "200", "--log_every", "20"))
    while process.poll() is None and not (tmp_path / "stopped" / "metrics.jsonl").is_file():
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "resume with: python" in out and "--run_dir" in out
    train_here(config("stopped", "--max_steps", "200", "--log_every", "20"))
    assert same_weights(tmp_path / "whole", tmp_path / "stopped")


def test_activation_checkpointing_and_validation_change_nothing(config, tmp_path, monkeypatch):
    toy.write_rlds(tmp_path, dict(train=toy.demonstrations(toy.TRAIN, 10)))

    def run(name: str, *options: str) -> dict:
        cfg = configure(train.Config, config(name, *options))
        cfg.data_mix, cfg.data_root_dir = "toy", str(tmp_path)
        return train.train(cfg)

    run("plain", "--activation_checkpointing", "False", "--hold_out", "0.2")
    out = run("both", "--val_every", "2", "--val_batches", "2", "--hold_out", "0.2")
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "both"), abs=1e-6) and out["val/loss"] > 0
    with pytest.raises(ValueError, match="--hold_out 0 leaves no episode"):
        run("none", "--val_every", "2", "--hold_out", "0")
    out = train_here(config("object", "--val_every", "2", "--hold_out", "0.2"))
    assert out["val/loss"] > 0


def test_export_is_what_was_trained(config, tmp_path):
    """sample.py on the export: the tokens of the trained model itself, at greedy decoding."""
    train_here(config("run"))
    policy = acting.load_policy(tmp_path / "run" / "checkpoint")
    assert policy.processor.trained_on == ("lanczos3", "center_crop") and list(policy.norm_stats) == ["mine"]
    picture = np.full((28, 28, 3), 90, np.uint8)
    assert acting.predict_action(policy, [picture], ["do 1"]).shape == (1, 7)
    names = {p.name for p in (tmp_path / "run" / "checkpoint").iterdir()}
    official = {"config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.model"}
    assert official | {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"} <= names


def test_loss_that_is_not_finite_stops_the_run(config, tmp_path):
    calls = []

    def build(cfg, datasets):
        trainee = train.build(cfg, datasets)
        real = trainee.model.loss

        def loss(batch):
            value, predicted = real(batch)
            calls.append(1)
            return value * (torch.nan if len(calls) == 4 else 1), predicted

        trainee.model.loss = loss
        return trainee

    with pytest.raises(ValueError, match=r"not finite in step 3 \(samples 12 to 15 of the stream"):
        train_here(config("nan", "--save_every", "2"), build=build)
    assert [p.name for p in resume.complete_checkpoints(tmp_path / "nan")] == ["step-000002"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch_size", "6"], "batch_size 6 is no multiple of micro_batch_size 4 x 1 processes"),
        (["--data_mix", "bridge"], "--data_root_dir DIR is missing"),
        (["--data_mix", "bridge", "--data_root_dir", "nowhere"], "no RLDS dataset is in it"),
        (["--data_mix", "brdge", "--data_root_dir", "nowhere"], "nearest: bridge"),
        (["--train_parts", "half"], "--train_parts 'half' is none of full, frozen_vision"),
        (["--base_checkpoint", "x"], "not both"),
        (["--run_dir", "/proc/run"], "cannot be written"),
        (["--wandb", "project"], "pip install wandb"),
    ],
)
def test_errors_before_long_work(config, options, message, capsys):
    with pytest.raises(SystemExit) as end:
        train.main(configure(train.Config, [*config("run"), *options]))
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_eight_real_frames_are_learned_by_heart(config):
    """Labels, masks and shifts are right: accuracy 99 % and L1 below 0.01 on Bridge frames, as training counts them."""
    real = rlds.RLDS(shared("data"), "bridge_orig")
    rows = [real[i] for i in np.linspace(0, len(real) - 1, 8).astype(int)]
    rows = [dict(image=r["pictures"][0], action=r["actions"][0], instruction=r["instruction"]) for r in rows]
    cfg = configure(train.Config, config("run", "--batch_size", "8", "--micro_batch_size", "8", "--max_steps", "150"))
    cfg.data_mix, cfg.log_every = [(Samples(rows), 1.0)], 10
    cfg.random_model["text_config"] |= dict(hidden_size=64, intermediate_size=128)
    metrics = train.train(cfg)
    assert metrics["action_accuracy"] >= 0.99 and metrics["l1_loss"] < 0.01


def test_statistics_of_another_dataset(config, tmp_path):
    """A run is not resumed on data with other statistics: its actions would mean something else."""
    train_here(config("run", "--max_steps", "1"))
    (tmp_path / "c.py").write_text(CONFIG.replace("default_rng(0)", "default_rng(1)"))
    with pytest.raises(ValueError, match="not those of the data now"):
        train_here(config("run"))


def test_a_run_goes_on_as_what_it_was(config, tmp_path, capsys):
    train_here(config("run", "--max_steps", "2"))
    changes = [
        (("--batch_size", "8"), "batch_size 4, now it is 8"),
        (("--image_aug", "False"), "image_aug"),
        (("--seed", "8"), "seed"),
        (("--train_parts", "last_layer"), "train_parts"),
    ]
    for options, key in changes:
        with pytest.raises(ValueError, match=f"trained with {key}"):
            train_here(config("run", *options))
    train_here(config("run", "--lr", "1e-4", "--max_steps", "3"))
    assert "from here on lr is 0.0001, it was 0.003" in capsys.readouterr().out
    note = tmp_path / "run" / "checkpoints" / "step-000003" / "train.json"
    saved = json.loads(note.read_text())
    assert saved["config"].pop("hold_out") == 0.05  # as runs from before there was such an option
    note.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="trained with hold_out 0.05, now it is 0.1"):
        train_here(config("run", "--hold_out", "0.1"))


@pytest.mark.parametrize("max_steps", ["2", "1"])
def test_killed_before_the_export(config, tmp_path, capsys, max_steps):
    """The last step's checkpoint is there, what sample.py reads is not: the same command writes it."""
    train_here(config("run", "--max_steps", "2"))
    before = weights(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint")
    train_here(config("run", "--max_steps", max_steps))
    after = weights(tmp_path / "run")
    assert all(torch.equal(before[k], after[k]) for k in before)
    index = tmp_path / "run" / "checkpoint" / "model.safetensors.index.json"
    written = index.stat().st_mtime_ns
    train_here(config("run", "--max_steps", max_steps))  # whole: it is left alone
    assert index.stat().st_mtime_ns == written
    assert "already trained to step 2" in capsys.readouterr().out


def test_anew_beside_older_checkpoints(config, tmp_path, capsys):
    """They are kept, but not taken for this run's; nor do they push its own out."""
    train_here(config("run", "--max_steps", "4", "--save_every", "2"))
    train_here(config("run", "--max_steps", "3", "--save_every", "1", "--resume", "never"))
    found = sorted(str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").glob("check*/step-*"))
    shutil.rmtree(tmp_path / "run" / "checkpoints-before-1")
    train_here(config("run", "--max_steps", "2", "--resume", "never"))
    (tmp_path / "run" / "checkpoints-before-1").rename(tmp_path / "run" / "checkpoints-before-2")
    train_here(config("run", "--max_steps", "1", "--resume", "never"))  # the first free number
    steps = [f"checkpoints-before-1/step-00000{i}" for i in (2, 4)] + [f"checkpoints/step-00000{i}" for i in (2, 3)]
    assert found == sorted(steps) and "beyond step 0 are now in" in capsys.readouterr().out


def test_a_cut_line_in_the_log(config, tmp_path):
    train_here(config("run", "--max_steps", "2"))
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    train_here(config("run", "--max_steps", "4"))
    assert [m["step"] for m in map(json.loads, open(tmp_path / "run" / "metrics.jsonl"))] == [1, 2, 3, 4]


def test_killed_while_exporting_again(config, tmp_path, monkeypatch):
    """What is left is no checkpoint, rather than one of old and new weights."""
    train_here(config("run", "--max_steps", "2"))
    monkeypatch.setattr("model.SHARD_BYTES", 300_000)
    train_here(config("run", "--max_steps", "3"))

    def killed(path, content, real=model.write_json):
        raise KeyboardInterrupt if path.name == "config.json" else real(path, content)

    with monkeypatch.context() as patch, pytest.raises(BaseException):  # noqa: B017
        patch.setattr("model.write_json", killed)
        train_here(config("run", "--max_steps", "4"))
    with pytest.raises(FileNotFoundError, match="weight file missing"):
        open_checkpoint(tmp_path / "run" / "checkpoint")
    train_here(config("run", "--max_steps", "4"))
    open_checkpoint(tmp_path / "run" / "checkpoint")


def test_actions_scaled_by_minimum_and_maximum(config, tmp_path, monkeypatch):
    """ALOHA's way: what the model writes goes back to units by the same two numbers."""
    from tokenizer import decode_action

    cfg = configure(train.Config, config("run", "--max_steps", "1"))
    cfg.data_mix[0][0].scheme = "bounds"
    train.train(cfg)
    policy = acting.load_policy(tmp_path / "run" / "checkpoint")
    monkeypatch.setattr(acting, "predict_tokens", lambda *_: torch.tensor([[31872] * 7]))
    action = acting.predict_action(policy, [np.zeros((28, 28, 3), np.uint8)], "do 1")
    stats, y = policy.norm_stats["mine"]["action"], decode_action(np.array(31872))
    want = [0.5 * (y + 1) * (h - m) + m for m, h in zip(stats["min"], stats["max"], strict=True)]
    np.testing.assert_allclose(action[0, :6], want[:6])


@pytest.mark.parametrize("option", ["batch_size", "micro_batch_size", "log_every", "save_every", "keep_checkpoints"])
def test_numbers_of_at_least_one(config, option):
    with pytest.raises(ValueError, match=f"--{option} 0: must be 1 or more"):
        train_here(config("run", f"--{option}", "0"))


def test_nothing_to_draw(config):
    cfg = configure(train.Config, config("run"))
    cfg.data_mix = [(cfg.data_mix[0][0], 0.0)]
    with pytest.raises(ValueError, match=r"nothing to draw from \['mine'\]"):
        train.train(cfg)


def test_a_gripper_in_millimetres_is_warned_about(config, tmp_path, capsys):
    (tmp_path / "c.py").write_text(CONFIG.replace("size=7)", "size=7) * 100"))
    train_here(config("run", "--max_steps", "1"))
    assert re.search(r"warning: mine: the gripper is -\d+ ... \d+, but should be 0", capsys.readouterr().out)


def test_not_enough_disk(config, capsys, monkeypatch):
    monkeypatch.setattr(resume.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(SystemExit):
        train.main(configure(train.Config, config("run")))
    assert "the disk has 0.0" in capsys.readouterr().err


def test_a_base_checkpoint_keeps_its_constants(config, tmp_path):
    """To train as the official script does: docs/differences.md."""
    train_here(config("base", "--max_steps", "1"))
    base = tmp_path / "base" / "checkpoint"
    hf = json.loads((base / "config.json").read_text())
    hf["text_config"]["rms_norm_eps"] = 1e-5
    (base / "config.json").write_text(json.dumps(hf))
    processor = json.loads((base / "preprocessor_config.json").read_text())
    processor["tvf_normalize_params"][0]["mean"] = [0.485, 0.456, 0.406]
    (base / "preprocessor_config.json").write_text(json.dumps(processor))

    train_here(config("run", "--base_checkpoint", str(base), "--random_model", "{}", "--max_steps", "1"))
    trained = open_checkpoint(tmp_path / "run" / "checkpoint")
    assert trained.config.text.rms_norm_eps == 1e-5
    assert trained.skeleton.language_model.model.norm.eps == 1e-5
    assert trained.processor.means[0] == (0.485, 0.456, 0.406)


def test_base_checkpoint_of_another_architecture(config, folders, tmp_path, capsys):
    folder = shutil.copytree(folders["tiny-openvla"], tmp_path / "base")
    text = json.loads((folder / "config.json").read_text())
    text["text_config"]["num_hidden_layers"] = 4
    (folder / "config.json").write_text(json.dumps(text))
    argv = config("run", "--base_checkpoint", str(folder), "--random_model", "{}")
    with pytest.raises(SystemExit):
        train.main(configure(train.Config, argv))
    assert "tensors are in no weight file" in capsys.readouterr().err


# ----------------------------------------------------------------------------- rows of the head that actions need


def test_short_head_is_the_whole_one(config, tmp_path):
    """Where the other rows of lm_head are 0, loss, predictions and gradients are those of the whole vocabulary."""
    train_here(config("run", "--short_head", "True", "--max_steps", "3"))
    model = OpenVLA.from_pretrained(tmp_path / "run" / "checkpoint", torch.float32)
    answers = torch.tensor([2, *range(31744, 32000)])
    is_answer = torch.zeros(32064, dtype=torch.bool)
    is_answer[answers] = True
    head = model.language_model.lm_head.weight
    assert head[is_answer].any(dim=1).all() and not head[~is_answer].any()

    torch.manual_seed(0)
    input_ids = torch.randint(3, 400, (4, 12))
    labels = torch.full((4, 12), -100)
    labels[:, -5:] = answers[torch.randint(0, len(answers), (4, 5))]
    batch = {"input_ids": input_ids, "labels": labels, "pixel_values": torch.randn(4, 6, 28, 28)}
    for scale in (1, 0):  # without a logit above 0, an id that is no answer is as likely
        results = []
        for answer_ids in (None, answers):
            with torch.no_grad():
                head[is_answer] *= scale if answer_ids is None else 1
            model.answer_ids = answer_ids
            model.zero_grad()
            loss, predicted = model.loss(batch)
            loss.backward()
            results.append((loss, predicted, {name: p.grad.clone() for name, p in model.named_parameters()}))
        (loss, predicted, gradients), (short_loss, short_predicted, short_gradients) = results

        assert torch.allclose(loss, short_loss, atol=1e-6)
        assert torch.equal(is_answer[predicted], is_answer[short_predicted])
        assert torch.equal(predicted[is_answer[predicted]], short_predicted[is_answer[predicted]])
        for name, gradient in gradients.items():
            if name == LM_HEAD:
                assert not short_gradients[name][~is_answer].any()
                gradient = gradient * is_answer[:, None]
            assert torch.allclose(gradient, short_gradients[name], rtol=1e-3, atol=1e-5), name
    assert not is_answer[predicted].all()

    labels[0, -1] = 400
    with pytest.raises(ValueError, match="label 400 is none of the 257 answer_ids"):
        model.loss(batch)


def test_short_head_resumes_and_is_sharded(config, tmp_path):
    """It resumes bit for bit, and two processes make the weights of one."""
    options = ("--short_head", "True", "--save_every", "3")
    train_here(config("whole", *options))
    train_here(config("halves", *options, "--max_steps", "3"))
    train_here(config("halves", *options))
    assert same_weights(tmp_path / "whole", tmp_path / "halves")
    with pytest.raises(ValueError, match="trained with short_head True, now it is False"):
        train_here(config("halves", "--max_steps", "9"))

    finished(run(config("two", *options, "--micro_batch_size", "2"), processes=2))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "whole"), abs=1e-4)


def test_short_head_refuses_what_it_cannot(config, tmp_path):
    with pytest.raises(ValueError, match="--short_head is for a model that starts from random weights"):
        train_here(config("run", "--short_head", "True", "--action_tokenizer", "fast", "--action_chunk", "2"))
