"""From a checkpoint folder, a picture and words to an action; and every way in which the folder can be broken."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from common import GOLDENS, MODELS, ROOT, golden, with_tokenizer
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import model as model_module
import policy as P
import sample
from configurator import configure
from model import INDEX, OpenVLA, is_unused

PICTURE = str(GOLDENS / "images" / "bridge_64x64.png")


@pytest.fixture
def folder(folders, tmp_path):
    return with_tokenizer(shutil.copytree(folders["tiny-openvla"], tmp_path / "openvla"))


@pytest.mark.parametrize("name", MODELS)
def test_official_actions(folders, name, tmp_path):
    """Pictures and instructions in one batch of mixed lengths: the official tokens and actions of each."""
    policy = P.load_policy(with_tokenizer(shutil.copytree(folders[name], tmp_path / name)), torch.float32)
    tensors, info = golden(name)
    pictures = [GOLDENS / e["image"] for e in info["examples"]]
    words = [e["instruction"] for e in info["examples"]]
    for key in info["unnorm_keys"]:
        actions = P.predict_action(policy, pictures, words, key)
        assert actions.dtype == np.float64 and actions.shape == (3, 7)
        for i in range(3):
            np.testing.assert_allclose(actions[i], tensors[f"ex{i}/actions/{key}"].numpy(), atol=1e-6)
    tokens = P.predict_tokens(policy, pictures, words, 7)
    assert tokens.tolist() == [tensors[f"ex{i}/predicted_token_ids"].tolist() for i in range(3)]
    if "cross_checks" in info:
        swapped = P.predict_action(policy, pictures[:2], words[1::-1], "bridge_orig")
        for i, key in enumerate(("image0_instruction1", "image1_instruction0")):
            np.testing.assert_allclose(swapped[i], info["cross_checks"][key]["actions"], atol=1e-6)


def test_command_line(folder, capsys):
    argv = ["--checkpoint", str(folder), "--image", PICTURE, PICTURE, "--instruction", "put carrot on plate"]
    sample.main(configure(sample.Config, [*argv, "--unnorm_key", "toy", "--dtype", "float32", "--json"]))
    out = json.loads(capsys.readouterr().out)
    want = golden("tiny-openvla")[0]["ex0/actions/toy"].tolist()
    np.testing.assert_allclose(out["actions"], [want, want], atol=1e-6)
    sample.main(configure(sample.Config, [*argv, "--unnorm_key", "toy"]))
    out = capsys.readouterr().out
    assert out.count("put carrot on plate") == 2 and "droll" in out and " rad" in out and " m\n" in out


def test_a_picture_is_no_list_of_pictures(folder):
    policy = P.load_policy(folder)
    for picture in (np.zeros((64, 64, 3), np.uint8), PICTURE, Image.open(PICTURE)):
        with pytest.raises(ValueError, match=r"of a single one, \[image\]"):
            P.predict_action(policy, picture, "go", "toy")


def test_broken_numbers_are_no_action(folder):
    policy, picture = P.load_policy(folder, torch.float32), [np.zeros((64, 64, 3), np.uint8)]
    for wrong in (dict(q01=None), dict(q99=[float("nan")] * 7), dict(q99=[1.0])):
        policy.norm_stats["toy"] = {"action": {**policy.norm_stats["bridge_orig"]["action"], **wrong}}
        with pytest.raises(ValueError, match="'toy', action: q01 and q99 must be finite"):
            P.predict_action(policy, picture, "go", "toy")
    with torch.no_grad():
        policy.model.language_model.model.norm.weight[3] = float("nan")
    with pytest.raises(ValueError, match="the answer is not finite"):
        P.predict_action(policy, picture, "go", "bridge_orig")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "must be auto, cpu"),
        ("cuda:9", "sees 0 of that kind"),
        ("cuda", "sees 0"),
        ("mps", "sees 0"),
        ("cpu:x", "must be"),
    ],
)
def test_devices_that_are_not_here(name, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        P.pick_device(name)


def test_fine_tuned_without_a_record(folder, capsys):
    """The official script fine-tunes on crops and does not write that down: worth a word, once."""
    argv = ["--checkpoint", str(folder), "--image", PICTURE, "--instruction", "go", "--unnorm_key", "toy"]
    (folder / "dataset_statistics.json").unlink(missing_ok=True)
    sample.main(configure(sample.Config, argv))
    assert "crop" not in capsys.readouterr().err
    stats = json.loads((folder / "config.json").read_text())["norm_stats"]
    (folder / "dataset_statistics.json").write_text(json.dumps(stats))
    sample.main(configure(sample.Config, argv))
    assert "does not record how its training images were prepared" in capsys.readouterr().err
    sample.main(configure(sample.Config, [*argv, "--center_crop", "True"]))
    assert "crop" not in capsys.readouterr().err


def shard_of(folder, name):
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def missing_shard(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()
    return "model-00002-of-00003.safetensors"


def truncated_shard(folder):
    path = folder / "model-00001-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return "297,340 bytes where 297,440 are expected"


def wrong_shape(folder):
    name = "projector.fc2.weight"
    rewrite(shard_of(folder, name), lambda t: t.update({name: t[name][:, :100].clone()}))
    return r"projector.fc2.weight has shape \(16, 100\), config.json makes it \(16, 224\)"


def unexpected_tensor(folder):
    rewrite(folder / "model-00003-of-00003.safetensors", lambda t: t.update({"extra.weight": torch.zeros(3)}))
    return "unexpected tensor extra.weight"


def missing_tensor(folder):
    name = "projector.fc2.weight"
    rewrite(shard_of(folder, name), lambda t: t.pop(name))
    return "1 tensors are in no weight file, the first is projector.fc2.weight"


def lfs_pointer(folder):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 6948961960\n"
    (folder / "model-00001-of-00003.safetensors").write_text(pointer)
    return "git lfs pull"


def no_config(folder):
    (folder / "config.json").unlink()
    return "no config.json"


def broken_config(folder):
    (folder / "config.json").write_text("{")
    return "config.json"


def unknown_tower(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["vision_configs"]
    (folder / "config.json").write_text(json.dumps(config | {"timm_model_ids": ["vit_large_patch14_clip_336"]}))
    return "vit_large_patch14_clip_336"


def no_processor(folder):
    (folder / "preprocessor_config.json").unlink()
    return "preprocessor_config.json"


@pytest.mark.parametrize(
    "damage",
    [
        missing_shard,
        truncated_shard,
        wrong_shape,
        unexpected_tensor,
        missing_tensor,
        lfs_pointer,
        no_config,
        broken_config,
        unknown_tower,
        no_processor,
    ],
)
def test_broken_folder(folder, damage, capsys, monkeypatch):
    """One line, exit code 2, and not one weight read."""
    message = damage(folder)
    monkeypatch.setattr(OpenVLA, "load_weights", lambda *_, **__: pytest.fail("weights were read"))
    argv = ["--checkpoint", str(folder), "--image", PICTURE, "--instruction", "x", "--unnorm_key", "toy"]
    with pytest.raises(SystemExit) as end:
        sample.main(configure(sample.Config, argv))
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert re.search(message, error), error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--checkpoint", "nowhere"], "nowhere: no such checkpoint folder"),
        (["--unnorm_key", "brige"], "unknown unnorm_key 'brige'; the checkpoint has: bridge_orig, toy"),
        (["--unnorm_key", ""], "several datasets and no unnorm_key; the checkpoint has: bridge_orig, toy"),
        (["--image", __file__], "not a readable image"),
        (["--image", "none.png"], "none.png: no such image"),
        (["--instruction", "go " * 2000], "the context has 2048"),
        (["--instruction", "a", "b"], "one instruction for all images, or one for each"),
        (["--dtype", "int8"], "--dtype int8"),
        (["--checkpoint", ""], "downloads them once"),
    ],
)
def test_bad_arguments(folder, change, message, capsys, monkeypatch):
    monkeypatch.setattr(OpenVLA, "load_weights", lambda *_, **__: pytest.fail("weights were read"))
    options = {"--checkpoint": [str(folder)], "--image": [PICTURE], "--instruction": ["x"], "--unnorm_key": ["toy"]}
    options[change[0]] = change[1:]
    with pytest.raises(SystemExit) as end:
        sample.main(configure(sample.Config, [word for key, values in options.items() for word in (key, *values)]))
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_exit_code_of_the_process():
    run = subprocess.run(
        [sys.executable, ROOT / "sample.py", "--checkpoint", "none", "--image", PICTURE, "--instruction", "x"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2 and run.stderr == "error: none: no such checkpoint folder\n"


def test_the_only_statistics_are_the_default(folder):
    (folder / "dataset_statistics.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["norm_stats"].pop("toy")
    (folder / "config.json").write_text(json.dumps(config))
    policy = P.load_policy(folder, torch.float32)
    action = P.predict_action(policy, [PICTURE], "put carrot on plate")
    np.testing.assert_allclose(action[0], golden("tiny-openvla")[0]["ex0/actions/bridge_orig"].numpy(), atol=1e-6)


def test_dataset_statistics_take_the_place_of_norm_stats(folder):
    """As officially: a fine-tuned folder knows the datasets it was fine-tuned on, and no others."""
    mine = {"mine": {"action": {"q01": [0.0] * 7, "q99": [1.0] * 7}}}
    (folder / "dataset_statistics.json").write_text(json.dumps(mine))
    policy = P.load_policy(folder, torch.float32)
    assert set(policy.norm_stats) == {"mine"}
    action = P.predict_action(policy, [PICTURE], ["put carrot on plate"])[0]
    normalised = golden("tiny-openvla")[0]["ex0/normalized_actions"].numpy()
    np.testing.assert_allclose(action, (normalised + 1) / 2, atol=1e-9)  # no mask: every dimension is scaled


def test_no_action_is_warned_about(folder):
    name = "language_model.lm_head.weight"
    rewrite(shard_of(folder, name), lambda t: t.update({name: torch.zeros_like(t[name])}))
    policy = P.load_policy(folder, torch.float32)
    with pytest.warns(UserWarning, match="not an action"):
        P.predict_action(policy, [PICTURE], "x", "toy")


def test_centre_crop_follows_the_checkpoint(folder):
    policy = P.load_policy(folder, torch.float32)
    plain, crop = P.prepare_image(policy, PICTURE), P.prepare_image(policy, PICTURE, crop=True)
    assert not np.array_equal(plain, crop)
    policy.processor.trained_on = ("center_crop",)
    assert np.array_equal(P.prepare_image(policy, PICTURE), crop)
    assert np.array_equal(P.prepare_image(policy, PICTURE, crop=False), plain)


@pytest.mark.parametrize("shard_bytes", [10**9, 300_000])
def test_save_and_load_again(folders, tmp_path, shard_bytes, monkeypatch):
    """Every tensor comes back with its bits, those that never run too; whole or in shards."""
    monkeypatch.setattr(model_module, "SHARD_BYTES", shard_bytes)
    OpenVLA.from_pretrained(folders["tiny-openvla"]).save_pretrained(tmp_path)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 3) == (shard_bytes < 10**9)
    before, after = (
        {k: v for p in sorted(f.glob("*.safetensors")) for k, v in load_file(p).items()}
        for f in (folders["tiny-openvla"], tmp_path)
    )
    assert before.keys() == after.keys() and any(is_unused(k, OpenVLA.from_pretrained(tmp_path).cfg) for k in after)
    assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)
    with safe_open(next(tmp_path.glob("*.safetensors")), "pt") as f:
        assert f.metadata() == {"format": "pt"}  # transformers wants it


def test_interrupted_save_leaves_the_old_checkpoint(folders, tmp_path, monkeypatch):
    model = OpenVLA.from_pretrained(folders["tiny-openvla"])
    model.save_pretrained(tmp_path)
    old = load_file(next(tmp_path.glob("*.safetensors")))

    def half(tensors, path, metadata):
        path.write_bytes(b"half of a fi")
        raise KeyboardInterrupt

    monkeypatch.setattr(model_module, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path)
    new = load_file(next(tmp_path.glob("*.safetensors")))
    assert all(torch.equal(old[k], new[k]) for k in old)


def test_weights_stay_mapped_and_conversions_do_not(folders):
    """A load without conversion shares the file's pages; a conversion has its own memory. Both are equal."""
    model = OpenVLA.from_pretrained(folders["tiny-openvla"])
    exact = OpenVLA.from_pretrained(folders["tiny-openvla"], torch.float32)
    for (k, a), b in zip(model.state_dict().items(), exact.state_dict().values(), strict=True):
        assert a.dtype == torch.bfloat16 and torch.equal(a.float(), b), k
