"""Folders that are broken, or are another kind of thing: each ends in one message, before any weight is read."""

import json
import shutil

import numpy as np
import pytest
import torch
from common import GOLDENS
from safetensors.torch import load_file, save_file

import convert_weights
import lora
from checkpoint import open_checkpoint, read_layout
from model import INDEX, LM_HEAD, OpenVLA, OpenVLAConfig
from policy import dataset_stats, load_policy, predict_action
from resume import check_same_base
from tokenizer import make_standin

EMBEDDINGS = "language_model.model.embed_tokens.weight"
SHARD = "model-00001-of-00003.safetensors"


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    make_standin(path)
    return path


@pytest.fixture
def folder(folders, tmp_path, tokenizer):
    """A whole checkpoint folder that a test may break."""
    to = shutil.copytree(folders["tiny-openvla"], tmp_path / "base")
    shutil.copy(tokenizer, to / "tokenizer.model")
    return to


def edit(path, remove=(), **changes):
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if key not in remove}))


def edit_text(folder, **changes):
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit(folder / "config.json", text_config={**text, **changes})


def all_tensors(folder) -> dict:
    tensors = {}
    for path in folder.glob("model-*.safetensors"):
        tensors.update(load_file(path))
    return tensors


def save_single(folder, tensors):
    """Write all weights into model.safetensors, as the only weights of the folder."""
    for path in [*folder.glob("model-*.safetensors"), folder / INDEX]:
        path.unlink(missing_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def refused(folder, message, error=ValueError, capsys=None):
    """Loading and `convert_weights.py check` must both refuse a folder, with the same reason."""
    with pytest.raises(error, match=message):
        load_policy(folder)
    if capsys:
        assert not convert_weights.check(folder)
        assert "incomplete" in capsys.readouterr().out


# -----------------------------------------------------------------------------
# config.json


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, "rope_parameters"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta"),
        ({"rope_theta": "10000"}, "rope_theta"),
        ({"attention_bias": True}, "attention_bias"),
        ({"model_type": "mistral"}, "model_type"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"hidden_size": 16.0}, "hidden_size is 16.0"),
        ({"vocab_size": 31999}, "vocab_size is 31999"),
        ({"num_attention_heads": 3}, "3 heads"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
    ],
)
def test_another_language_model(folder, capsys, changes, message):
    edit_text(folder, **changes)
    refused(folder, message, capsys=capsys)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_action_bins": 128}, "n_action_bins is 128"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config.*fp8"),
        ({"torch_dtype": "int4"}, "torch_dtype 'int4'"),
        ({"text_config": []}, "config.json"),
        ({"norm_stats": 3}, "config.json|statistics"),
    ],
)
def test_config_that_cannot_be_used(folder, changes, message):
    (folder / "dataset_statistics.json").unlink(missing_ok=True)
    edit(folder / "config.json", **changes)
    refused(folder, message, error=(ValueError, OSError))


def test_too_many_vision_encoders(folder):
    vision = json.loads((folder / "config.json").read_text())["vision_configs"]
    edit(folder / "config.json", vision_configs=[*vision, vision[0]])
    refused(folder, "3 vision encoders")
    edit(folder / "config.json", vision_configs=[{**vision[0], "depth": 10**8}, vision[1]])
    refused(folder, "depth is 100000000")


def test_rope_parameters_of_transformers_5(folder):
    edit_text(folder, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    assert open_checkpoint(folder).config.text.rope_theta == 500000.0


def test_plain_rope_scaling_is_none(folder):
    edit_text(folder, rope_scaling={"rope_type": "default"})
    assert open_checkpoint(folder).config.text.rope_theta == 10000.0


@pytest.mark.parametrize("name", ["float32", "torch.float32", None])
def test_dtype_as_transformers_5_calls_it(folder, name):
    """Without a name the files tell it."""
    save_single(folder, {key: tensor.float() for key, tensor in all_tensors(folder).items()})
    edit(folder / "config.json", remove=["torch_dtype"], dtype=name)
    assert load_policy(folder).dtype == torch.float32


def test_the_old_dtype_key_comes_first(folder):
    edit(folder / "config.json", torch_dtype="float32", dtype="float16")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.stored_dtype == torch.float32
    assert "dtype" not in checkpoint.config.to_dict()


@pytest.mark.filterwarnings("ignore:not an action")
def test_a_vocabulary_without_pad(folder):
    """Instructions of different length in one batch are padded with an id that has no row."""
    images = [np.zeros((64, 64, 3), np.uint8)] * 2
    words = ["go", "put the spoon on the large towel"]
    want = predict_action(load_policy(folder), images, words, "toy")
    tensors = {
        name: tensor[:32000].clone() if name in (LM_HEAD, EMBEDDINGS) else tensor
        for name, tensor in all_tensors(folder).items()
    }
    save_single(folder, tensors)
    edit_text(folder, vocab_size=32000)
    np.testing.assert_array_equal(predict_action(load_policy(folder), images, words, "toy"), want)


# -----------------------------------------------------------------------------
# Weight files


def test_a_newer_single_file_beside_shards(folder, capsys):
    save_file(all_tensors(folder), folder / "model.safetensors", {"format": "pt"})
    refused(folder, "two sets of weights", capsys=capsys)
    (folder / INDEX).unlink()
    load_policy(folder)


def test_an_index_may_name_the_single_file(folder):
    tensors = all_tensors(folder)
    save_single(folder, tensors)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model.safetensors")}))
    load_policy(folder)


@pytest.mark.parametrize("place", ["../secret.safetensors", "/etc/passwd", "a/../../b"])
def test_an_index_that_leaves_the_folder(folder, place):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][LM_HEAD] = place
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, "outside the folder")


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{", "[" * 10**5])
def test_an_index_that_is_none(folder, content):
    (folder / INDEX).write_text(content)
    refused(folder, INDEX)


def test_codes_are_no_weights(folder, capsys):
    """Quantized by another tool that does not even say so in config.json."""
    tensors = all_tensors(folder)
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    for dtype, word in ((torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8")):
        save_single(folder, {**tensors, name: (tensors[name] * 100).to(dtype)})
        refused(folder, f"{name} is {word}", capsys=capsys)


def test_tied_embeddings(folder, capsys):
    tensors = all_tensors(folder)
    del tensors[LM_HEAD]
    save_single(folder, tensors)
    refused(folder, "tie_word_embeddings", capsys=capsys)


def test_names_with_the_prefix_of_a_wrapper(folder):
    save_single(folder, {f"module.{name}": tensor for name, tensor in all_tensors(folder).items()})
    refused(folder, "a wrapper has put module. in front")


def test_a_tensor_in_two_files(folder):
    name = "projector.fc1.bias"
    files = json.loads((folder / INDEX).read_text())["weight_map"]
    other = next(file for file in sorted(set(files.values())) if file != files[name])
    save_file({**load_file(folder / other), name: all_tensors(folder)[name]}, folder / other, {"format": "pt"})
    refused(folder, f"{name} is in another weight file")


def header_of(content: dict, data: bytes = b"") -> bytes:
    text = json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text + data


BROKEN_FILES = {
    "empty": b"",
    "short": b"\x10",
    "header beyond the file": (10**15).to_bytes(8, "little") + b"{}",
    "a list": header_of([1]),
    "deep": (10**5).to_bytes(8, "little") + b"[" * 10**5,
    "another JSON": header_of({"a": {"b": 1}}),
    "unknown dtype": header_of({"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
    "shape that does not fit": header_of({"a": {"dtype": "F32", "shape": [7], "data_offsets": [0, 4]}}, b"1234"),
    "negative shape": header_of({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"),
    "a hole": header_of({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"12345678"),
    "text as shape": header_of({"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}}, b"1234"),
    "no pair": header_of({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, b"1234"),
}


@pytest.mark.parametrize("content", BROKEN_FILES.values(), ids=BROKEN_FILES.keys())
def test_broken_safetensors(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.safetensors"):
        read_layout(path)


def test_a_header_has_a_bound(tmp_path):
    """It is not read into memory first. (The file is sparse.)"""
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        file.write((200 * 10**6).to_bytes(8, "little"))
        file.truncate(300 * 10**6)
    with pytest.raises(ValueError, match="200,000,000 bytes"):
        read_layout(path)


# -----------------------------------------------------------------------------
# Folders that are something else


def test_a_name_of_the_hub():
    with pytest.raises(FileNotFoundError, match="openvla/openvla-7b: (not in the cache|no such folder here)"):
        open_checkpoint("openvla/openvla-7b")


def test_a_folder_that_is_not_there_is_no_name_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(FileNotFoundError, match="runs/x: no such checkpoint folder$"):
        open_checkpoint("runs/x")


def test_the_cache_of_the_hub(folder, tmp_path):
    hub = tmp_path / "models--openvla--openvla-7b"
    snapshot = hub / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (hub / "blobs").mkdir()
    for i, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, hub / "blobs" / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    load_policy(snapshot)
    refused(hub, "snapshots/abc", error=FileNotFoundError)

    shutil.copytree(snapshot, tmp_path / "copied", symlinks=True)
    refused(tmp_path / "copied", "copied without its blobs", error=FileNotFoundError)


def test_a_run_folder(folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    folder.rename(run / "checkpoint")
    refused(run, "its model is in .*run/checkpoint", error=FileNotFoundError)


def test_a_run_that_has_not_finished(tmp_path):
    step = tmp_path / "run" / "checkpoints" / "step-000002"
    step.mkdir(parents=True)
    (step / "train.json").write_text("{}")
    for place in (tmp_path / "run", step):
        refused(place, "a run that has not finished", error=FileNotFoundError)


def test_weights_and_tokenizers_in_other_forms(folder):
    (folder / "tokenizer.model").rename(folder / "tokenizer.json")
    refused(folder, "tokenizer.model: missing, copy it from openvla-7b", error=FileNotFoundError)
    save_single(folder, {})
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "safe_serialization=True", error=FileNotFoundError)


def test_a_preprocessor_of_another_model(folder, folders, capsys):
    path = folder / "preprocessor_config.json"
    edit(path, input_sizes=[[3, 336, 336]] * 2)
    refused(folder, "336 pixels", capsys=capsys)
    shutil.copy(folders["tiny-openvla-v01"] / path.name, path)
    refused(folder, r"1 image\(s\)", capsys=capsys)


# -----------------------------------------------------------------------------
# Statistics

GOOD = {"q01": [0.0, 1.0], "q99": [1.0, 1.0], "min": [-1.0, 0.0], "max": [2.0, 2.0], "mask": [True, False]}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mask": None}, "mask is None"),
        ({"mask": False}, "mask is False"),
        ({"mask": [True]}, "mask is .*2 times"),
        ({"mask": [True, "no"]}, "mask"),
        ({"mask": [True, [False]]}, "mask"),
        ({"q01": [2.0, 1.0]}, "q01 is above q99 in dimension 0"),
        ({"q99": None}, "q01 and q99 must be finite"),
        ({"q01": ["a", "b"]}, "q01 and q99 must be finite"),
        ({"q01": [], "q99": []}, "q01 and q99 must be finite"),
        ({"q01": [float("nan"), 0.0]}, "q01 and q99 must be finite"),
        ({"min": [0.0]}, "min must be 2 numbers"),
    ],
)
def test_statistics_that_cannot_be_used(changes, message):
    with pytest.raises(ValueError, match=f"folder: statistics of 'x', action: {message}"):
        dataset_stats({"x": {"action": {**GOOD, **changes}}}, "x", "folder")


@pytest.mark.parametrize(
    "norm_stats, message",
    [
        ({"action": GOOD}, "do not name their dataset"),
        ({"x": {}}, "action is missing"),
        ({"x": [1]}, r"\[1\] where"),
        ({"x": {"action": GOOD, "scheme": "other"}}, "scheme is 'other'"),
        ({"x": {"action": {**GOOD, "min": [9.0, 0.0]}, "scheme": "bounds"}}, "min is above max"),
    ],
)
def test_statistics_of_another_form(norm_stats, message):
    with pytest.raises(ValueError, match=message):
        dataset_stats(norm_stats, "", "folder")


def test_good_statistics():
    for action in (GOOD, {"q01": [0], "q99": [0]}, {**GOOD, "mask": [1, 0]}):
        dataset_stats({"x": {"action": action, "proprio": {"q01": [float("nan")]}}}, "", "folder")


def test_check_says_so_too(folder, capsys):
    stats = json.loads((folder / "config.json").read_text())["norm_stats"]
    stats["toy"]["action"]["mask"] = None
    (folder / "dataset_statistics.json").write_text(json.dumps(stats))
    assert not convert_weights.check(folder)
    assert "mask is None" in capsys.readouterr().out


# -----------------------------------------------------------------------------
# The base of a resumed run


def test_same_base_under_another_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def record(**about):
        known = {"step": 1, "config": {"base_checkpoint": "base"}, "statistics": {}}
        (tmp_path / "train.json").write_text(json.dumps({**known, **about}))

    record(base="f1")
    for place in ("base/", str(tmp_path / "base"), "moved"):
        check_same_base(tmp_path, place, "f1")
    with pytest.raises(ValueError, match="are not the weights that moved holds now"):
        check_same_base(tmp_path, "moved", "f2")

    record()  # an older run
    check_same_base(tmp_path, str(tmp_path / "base"), "f1")
    with pytest.raises(ValueError, match="are in base, not in moved"):
        check_same_base(tmp_path, "moved", "f1")


# -----------------------------------------------------------------------------
# Adapters


@pytest.fixture
def adapter(folder, tmp_path):
    """The golden adapter beside its base."""
    to = shutil.copytree(GOLDENS / "tiny-lora", tmp_path / "adapter")
    edit(to / "adapter_config.json", base_model_name_or_path="base")
    return to


def change_tensors(adapter, change):
    path = adapter / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def refused_everywhere(adapter, message, capsys, tmp_path, error=(ValueError, OSError)):
    """Loading, merging and `check` decide alike."""
    refused(adapter, message, error=error, capsys=capsys)
    with pytest.raises(error, match=message):
        lora.merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights is 'pissa_niter_16'"),
        ({"init_lora_weights": "OLoRA"}, "init_lora_weights is 'olora'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights"),
        ({"use_rslora": 1}, "use_rslora"),
        ({"rank_pattern": {"q_proj": 8}}, "of rank 8"),
        ({"lora_bias": True}, "lora_bias"),
        ({"r": 8, "lora_alpha": 8}, "of rank 8"),
        ({"r": None}, "adapter_config.json: r is None"),
        ({"r": 0}, "r is 0"),
        ({"lora_alpha": None}, "adapter_config.json: lora_alpha is None"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_dropout": "x"}, "lora_dropout"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path is 3"),
    ],
)
def test_adapter_config_that_cannot_be_used(adapter, tmp_path, capsys, changes, message):
    edit(adapter / "adapter_config.json", **changes)
    refused_everywhere(adapter, message, capsys, tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "3", "null"])
def test_adapter_config_that_is_none(adapter, tmp_path, capsys, content):
    (adapter / "adapter_config.json").write_text(content)
    refused_everywhere(adapter, "adapter_config.json", capsys, tmp_path)


def rename_layers(tensors):
    return {name.replace("language_model.model.layers", "language_model.layers"): t for name, t in tensors.items()}


def drop_one_half(tensors):
    return {name: t for name, t in tensors.items() if "layers.0.self_attn.q_proj.lora_B" not in name}


def nothing(tensors):
    return {}


def add_other_base(tensors):
    return {**tensors, f"base_model.model.{EMBEDDINGS}": torch.zeros(32064, 16)}


def add_resized_base(tensors):
    return {**tensors, f"base_model.model.{EMBEDDINGS}": torch.zeros(32065, 16)}


def add_unknown(tensors):
    return {**tensors, "base_model.model.value_head.weight": torch.zeros(4)}


@pytest.mark.parametrize(
    "change, message",
    [
        (rename_layers, "language_model.layers.*does not have"),
        (drop_one_half, "q_proj.weight needs a lora_A and a lora_B"),
        (nothing, "holds no adapter"),
        (add_other_base, "embed_tokens.weight differs"),
        (add_resized_base, r"\(32065, 16\), the base model makes it \(32064, 16\)"),
        (add_unknown, "value_head.weight is no tensor"),
    ],
)
def test_adapter_weights_that_do_not_fit(adapter, tmp_path, capsys, change, message):
    change_tensors(adapter, change)
    refused_everywhere(adapter, message, capsys, tmp_path)


def to_half(tensors):
    return {name: tensor.half() for name, tensor in tensors.items()}


def test_adapter_in_float16_and_with_the_embeddings_of_its_base(adapter, folder):
    load_policy(adapter)
    change_tensors(adapter, to_half)
    load_policy(adapter)
    embeddings = all_tensors(folder)[EMBEDDINGS]
    change_tensors(adapter, lambda tensors: {**tensors, f"base_model.model.{EMBEDDINGS}": embeddings})
    load_policy(adapter)


def test_another_head_in_float16(adapter, tmp_path, capsys):
    """What is more than rounding is another base."""
    change_tensors(adapter, to_half)
    head = "base_model.model.language_model.lm_head.base_layer.weight"
    change_tensors(adapter, lambda tensors: {**tensors, head: tensors[head] * 1.02})
    refused_everywhere(adapter, "differs from the base model's", capsys, tmp_path)


def test_adapter_on_an_adapter(adapter, tmp_path, capsys):
    shutil.copytree(adapter, tmp_path / "second")
    edit(tmp_path / "second" / "adapter_config.json", base_model_name_or_path="adapter")
    refused_everywhere(tmp_path / "second", "merge that first", capsys, tmp_path)


def test_adapter_of_an_older_peft(adapter, tmp_path, capsys):
    path = adapter / "adapter_model.safetensors"
    torch.save(load_file(path), adapter / "adapter_model.bin")
    path.unlink()
    refused_everywhere(adapter, "only adapter_model.bin", capsys, tmp_path)


def test_nothing_to_merge(folder, tmp_path):
    with pytest.raises(ValueError, match="nothing to merge"):
        lora.merge(folder, tmp_path / "merged")


def test_what_is_whole_is_not_refused(adapter, folder, capsys):
    """No false alarm: both load, and `check` says so."""
    for place in (folder, adapter):
        load_policy(place)
        assert convert_weights.check(place)
        assert "loads in this code: yes" in capsys.readouterr().out


def test_a_config_comes_back(folder):
    config = open_checkpoint(folder).config
    assert OpenVLAConfig.from_dict(config.to_dict()) == config
    assert OpenVLA.from_pretrained(folder).cfg.text == config.text
