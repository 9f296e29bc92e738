"""convert_weights.py: every tensor comes through bit by bit, and bad input is named."""

import hashlib
import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from common import GOLDENS, MODELS, golden, pixels, shared, vision_configs
from safetensors.torch import load_file, save_file

import convert_weights as cw
import lora
from formats import prismatic_run
from image import ImageProcessor
from model import INDEX, VISION_ENCODERS, OpenVLA, OpenVLAConfig, is_unused
from tokenizer import make_standin

PT = Path("checkpoints/latest-checkpoint.pt")


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def reference(name: str) -> Path:
    """A golden of the training format: in tests/goldens, OPENVLA_TEST_DATA/goldens or ../shared/goldens."""
    return GOLDENS / name if (GOLDENS / name).exists() else shared(f"goldens/{name}")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> str:
    """A stand-in with Llama's layout: it is only copied."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    make_standin(path)
    return str(path)


@pytest.fixture
def sizes(tmp_path) -> str:
    """A file for --config: what the weights of tiny-openvla do not tell."""
    path, folder = tmp_path / "sizes.json", GOLDENS / "tiny-openvla"
    vision, text = vision_configs(read(folder / "tiny_arch.json")), read(folder / "config.json")["text_config"]
    heads = {"vision_configs": [{"num_heads": v["num_heads"]} for v in vision]}
    path.write_text(json.dumps(heads | {"text_config": {"num_attention_heads": text["num_attention_heads"]}}))
    return str(path)


@pytest.fixture
def run(tmp_path) -> Path:
    """The golden training run, as a folder that a test may change."""
    shutil.copytree(reference("tiny-prismatic"), tmp_path / "run", copy_function=shutil.copyfile)
    for folder in (tmp_path / "run", tmp_path / "run/checkpoints"):
        folder.chmod(0o755)
    return tmp_path / "run"


@pytest.fixture
def folder(folders, tmp_path) -> Path:
    """tiny-openvla in Hugging Face layout, as a folder that a test may change."""
    return Path(shutil.copytree(folders["tiny-openvla"], tmp_path / "folder"))


def tensors_of(folder: Path) -> dict:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def assert_same(a: dict, b: dict):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def keys_of(path: Path) -> dict:
    """As in *.keys.json: every key with shape, dtype and a sha256 of its bytes."""
    model = torch.load(path, weights_only=True)["model"]
    out = {part: {} for part in model}
    for part, tensors in model.items():
        for key, t in tensors.items():
            digest = hashlib.sha256(t.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
            dtype = str(t.dtype).removeprefix("torch.")
            out[part][key] = {"shape": list(t.shape), "dtype": dtype, "bytes_sha256": digest}
    return out


def command(capsys, *args) -> tuple[int, str]:
    """The command line -> its exit code and all that it printed."""
    with pytest.raises(SystemExit) as stop:
        cw.main([str(arg) for arg in args])
    return stop.value.code, "".join(capsys.readouterr())


# -----------------------------------------------------------------------------
# There and back


def test_prismatic_to_hf_equals_the_official_conversion(run, tmp_path, tokenizer, sizes):
    cw.prismatic_to_hf(run, tmp_path / "hf", tokenizer, sizes)
    ours, official = tensors_of(tmp_path / "hf"), tensors_of(GOLDENS / "tiny-openvla")
    assert len(official) == 153
    assert_same(ours, official)
    for name in ("config.json", "preprocessor_config.json", "generation_config.json", "dataset_statistics.json"):
        new, old = read(tmp_path / "hf" / name), read(GOLDENS / "tiny-openvla" / name)
        for key, value in old.items():
            assert new[key] == value or (key == "text_config" and new[key].items() >= value.items()), (name, key)
    index, old = read(tmp_path / "hf" / INDEX), read(GOLDENS / "tiny-openvla" / INDEX)
    assert index["weight_map"].keys() == old["weight_map"].keys() and index["metadata"] == old["metadata"]
    names = {"tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
    assert names <= {path.name for path in (tmp_path / "hf").iterdir()}
    assert not list((tmp_path / "hf").glob("*.tmp")) + list((tmp_path / "hf").glob(".*"))


@pytest.mark.parametrize("name", MODELS)
def test_hf_to_prismatic_has_the_official_keys_and_bytes(folders, tmp_path, tokenizer, name):
    cw.hf_to_prismatic(folders[name], tmp_path / "run")
    want = read(reference(f"{name.replace('openvla', 'prismatic')}.keys.json"))
    assert keys_of(tmp_path / "run" / PT) == {
        part: want[part] for part in ("vision_backbone", "projector", "llm_backbone")
    }
    base = "siglip-224px+7b" if name.endswith("v01") else "prism-dinosiglip-224px+7b"
    assert read(tmp_path / "run/config.json")["vla"]["base_vlm"] == base

    cw.prismatic_to_hf(tmp_path / "run" / PT, tmp_path / "hf", tokenizer)  # back: sizes are in the run's config.json
    assert_same(tensors_of(tmp_path / "hf"), tensors_of(folders[name]))
    old, new = (OpenVLAConfig.from_dict(read(f / "config.json")) for f in (folders[name], tmp_path / "hf"))
    assert (new.vision, new.text) == (old.vision, old.text)
    keys = (
        "image_resize_strategy",
        "llm_backbone_id",
        "hf_llm_id",
        "vision_backbone_id",
        "norm_stats",
        "timm_model_ids",
    )
    for key in keys:
        assert new.to_dict()[key] == old.to_dict()[key]
    processors = [read(f / "preprocessor_config.json") for f in (GOLDENS / name, tmp_path / "hf")]
    assert processors[1].items() >= processors[0].items()


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_keeps_tokens(folders, tmp_path, tokenizer, name):
    cw.hf_to_prismatic(folders[name], tmp_path / "run")
    cw.prismatic_to_hf(tmp_path / "run", tmp_path / "hf", tokenizer)
    model = OpenVLA.from_pretrained(tmp_path / "hf", torch.float32)
    t, info = golden(name)
    tokens, _ = model.generate(t["ex0/input_ids_with_29871"][None], pixels(info, info["examples"][0]), 7)
    assert tokens[0].tolist() == t["ex0/predicted_token_ids"].tolist()


def test_several_shards_and_other_dtypes(run, tmp_path, tokenizer, sizes, monkeypatch):
    monkeypatch.setattr(cw, "SHARD_BYTES", 10**6)
    cw.prismatic_to_hf(run, tmp_path / "hf", tokenizer, sizes, dtype="float32")
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert [len(load_file(f)) for f in files] and len(files) > 2
    assert {t.dtype for t in tensors_of(tmp_path / "hf").values()} == {torch.float32}
    assert_same({k: t.bfloat16() for k, t in tensors_of(tmp_path / "hf").items()}, tensors_of(GOLDENS / "tiny-openvla"))
    for f in files:  # as the format wants: header in steps of 8 bytes
        assert int.from_bytes(f.read_bytes()[:8], "little") % 8 == 0


def test_files_are_mapped_anew_so_that_memory_stays_bounded(monkeypatch):
    opened = []

    def reopen():
        opened.append(1)
        return {str(i): torch.empty(4 * 10**8, dtype=torch.uint8, device="meta") for i in range(6)}

    assert len(list(cw.stream(reopen, [str(i) for i in range(6)]))) == 6
    assert len(opened) == 3  # at first, after 1.2 GB and after 2.4 GB


def test_a_model_without_the_unused_tensors_keeps_its_depth(folder, tmp_path, tokenizer, capsys):
    """One that was trained from random weights never had them: its towers must not lose a block on the way."""
    model = OpenVLA.from_pretrained(folder)
    lost, model.unused = len(model.unused), {}
    shutil.rmtree(folder)
    model.save_pretrained(folder)
    cw.hf_to_prismatic(folder, tmp_path / "run")
    assert f"{lost} tensors are missing" in capsys.readouterr().out
    cw.prismatic_to_hf(tmp_path / "run", tmp_path / "hf", tokenizer)
    assert OpenVLA.from_pretrained(tmp_path / "hf").cfg.vision == model.cfg.vision
    assert_same(tensors_of(tmp_path / "hf"), dict(model.state_dict()))


@pytest.mark.parametrize(
    "model, base", list(zip(("openvla-7b", "openvla-v01-7b"), prismatic_run.BASE_VLMS, strict=True))
)
def test_released_models_need_no_sizes_and_every_name_comes_back(model, base):
    names = read(shared("facts/official_keys_openvla7b.json"))[model]["parameters"]
    fused = model == "openvla-7b"
    assert {prismatic_run.to_hf(prismatic_run.to_prismatic(name, fused)) for name in names} == set(names)
    tensors = {name: torch.empty(shape, device="meta") for name, shape in names.items()}
    cfg = prismatic_run.infer_config(Path("x.pt"), tensors, {"vla": {"base_vlm": base}})
    assert cfg.vision == list(VISION_ENCODERS.values())[-1 - fused :] and "vision_configs" not in cfg.to_dict()
    assert replace(cfg.text, num_key_value_heads=None) == OpenVLAConfig().text and cfg.text.num_key_value_heads == 32
    assert prismatic_run.official_limits(tensors, cfg) == []
    used = {name: t for name, t in tensors.items() if not is_unused(name, cfg)}
    assert prismatic_run.official_limits(used, cfg) == [
        f"{43 if fused else 27} tensors are missing that never run but that it wants"
    ]
    assert prismatic_run.infer_config(Path("x.pt"), used, {"model": {"model_id": base}}).vision == cfg.vision


# -----------------------------------------------------------------------------
# Base VLMs: no actions, frozen towers, Llama's own vocabulary


@pytest.fixture
def vlm(run):
    """The golden run made into a base VLM: towers in timm's files, 32000 rows of vocabulary."""
    model = torch.load(run / PT, weights_only=True)["model"]
    towers = model.pop("vision_backbone")
    dino, siglip = ({k.split(".", 1)[1]: t for k, t in towers.items() if k.startswith(p)} for p in ("dino", "siglip"))
    save_file({k: t.clone() for k, t in dino.items()}, run / "dino.safetensors")
    text_tower = {"text.weight": torch.zeros(3)}
    torch.save({f"visual.trunk.{k}": t for k, t in siglip.items()} | text_tower, run / "open_clip_pytorch_model.bin")
    for key in ("llm.model.embed_tokens.weight", "llm.lm_head.weight"):
        model["llm_backbone"][key] = model["llm_backbone"][key][:32000].clone()
    torch.save({"model": model}, run / PT)
    (run / "config.json").write_text(json.dumps({"model": {"model_id": "prism-dinosiglip-224px+7b"}}))
    (run / "dataset_statistics.json").unlink()
    return run


def test_base_vlm(vlm, tmp_path, tokenizer, sizes):
    with pytest.raises(ValueError, match="--vision"):
        cw.prismatic_to_hf(vlm, tmp_path / "hf", tokenizer, sizes)
    files = [str(vlm / "dino.safetensors"), str(vlm / "open_clip_pytorch_model.bin")]
    cw.prismatic_to_hf(vlm, tmp_path / "hf", tokenizer, sizes, files)
    ours, want = tensors_of(tmp_path / "hf"), tensors_of(GOLDENS / "tiny-openvla")
    for key in prismatic_run.VOCABULARY:
        assert ours[key].shape == (32064, 16) and torch.equal(ours[key][:32000], want[key][:32000])
        assert 0.015 < ours[key][32000:].float().std() < 0.025
        ours[key] = want[key]
    assert_same(ours, want)
    cfg = read(tmp_path / "hf/config.json")
    assert cfg["norm_stats"] == {} and not (tmp_path / "hf/dataset_statistics.json").exists()
    OpenVLA.from_pretrained(tmp_path / "hf")
    cw.hf_to_prismatic(tmp_path / "hf", tmp_path / "back")
    back = read(tmp_path / "back/config.json")
    assert back["model"]["vision_backbone_id"] == "dinosiglip-vit-so-224px"
    assert back["model"]["arch_specifier"] == "no-align+fused-gelu-mlp"


def test_positions_of_518_pixels_are_resampled(tmp_path):
    ramp = torch.arange(37.0).repeat(37, 1)  # linear in x: so it is after resampling, at the new pixel centres
    tower = {"pos_embed": ramp.reshape(1, 37 * 37, 1), "patch_embed.proj.weight": torch.zeros(1, 3, 14, 14)}
    save_file(tower, tmp_path / "dino.safetensors")
    pos = prismatic_run.open_timm(str(tmp_path / "dino.safetensors"))["pos_embed"]
    assert pos.shape == (1, 256, 1)
    want = (torch.arange(16) + 0.5) * 37 / 16 - 0.5
    torch.testing.assert_close(pos.view(16, 16)[5, 3:13], want[3:13], atol=5e-3, rtol=0)


# -----------------------------------------------------------------------------
# Bad input


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("kind", ["torch.save", "bare pickle"])
def test_a_pickle_that_would_run_code_is_refused(run, tmp_path, tokenizer, capsys, kind):
    trap, marker = {"model": {"projector": {}, "llm_backbone": {"a": Evil(tmp_path / "ran")}}}, tmp_path / "ran"
    if kind == "torch.save":
        torch.save(trap, run / PT)
    else:
        (run / PT).write_bytes(pickle.dumps(trap))
    for args in (["check", run], ["prismatic-to-hf", run, tmp_path / "hf", "--tokenizer", tokenizer]):
        code, text = command(capsys, *args)
        want = "refused, its pickle asks for posix.system" if kind == "torch.save" else "no zip file of torch.save"
        assert code == 2 and want in text
    assert not marker.exists() and not (tmp_path / "hf").exists()
    pickle.loads(pickle.dumps(Evil(marker)))  # the trap does work
    assert marker.exists()


def test_clear_errors_and_nothing_written(run, tmp_path, tokenizer, sizes, monkeypatch):
    out = tmp_path / "hf"

    def fails(match, *args, error=ValueError, **options):
        with pytest.raises(error, match=match):
            cw.prismatic_to_hf(run, out, *args, **options)
        assert not out.exists()

    fails("--tokenizer FILE is missing")
    fails("weights do not tell num_heads; give --config", tokenizer)
    (tmp_path / "half.json").write_text(json.dumps({"vision_configs": read(Path(sizes))["vision_configs"]}))
    fails("Llama is not of the released size.*num_attention_heads", tokenizer, str(tmp_path / "half.json"))
    for heads, message in ((1e300, "num_heads is 1e.300"), (7, "7 heads do not divide")):
        wrong = read(Path(sizes))
        wrong["vision_configs"][0]["num_heads"] = heads
        (tmp_path / "wrong.json").write_text(json.dumps(wrong))
        fails(message, tokenizer, str(tmp_path / "wrong.json"))
    (out.parent / "full").mkdir()
    (out.parent / "full/file").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        cw.prismatic_to_hf(run, out.parent / "full", tokenizer, sizes)
    with monkeypatch.context() as m:
        m.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 10**6))
        fails("will be written, the disk has 0.0 GB", tokenizer, sizes, error=OSError)
    (run / "dataset_statistics.json").rename(run / "gone.json")
    fails("dataset_statistics.json: missing", tokenizer, sizes, error=FileNotFoundError)
    statistics = read(run / "gone.json")
    next(iter(statistics.values()))["action"]["q01"][0] = "low"
    (run / "dataset_statistics.json").write_text(json.dumps(statistics))
    fails("dataset_statistics.json: .*q01 and q99 must be finite numbers", tokenizer, sizes)
    (run / "gone.json").rename(run / "dataset_statistics.json")
    config = read(run / "config.json")
    (run / "config.json").write_text(json.dumps(config | {"vla": {"base_vlm": "clip+7b"}}))
    fails(r"names the base VLM 'clip\+7b', known are", tokenizer, sizes)
    (run / "config.json").write_text(json.dumps(config))
    model = torch.load(run / PT, weights_only=True)["model"]
    model["projector"]["projector.0.bias"] = torch.zeros(5)
    torch.save({"model": model}, run / PT)
    fails("size mismatch for projector.fc1.bias", tokenizer, sizes)
    del model["projector"]["projector.0.bias"]
    torch.save({"model": model}, run / PT)
    fails("Missing key.*projector.fc1.bias", tokenizer, sizes)
    torch.save({"optimizer": {}}, run / PT)
    fails("needs model/projector and model/llm_backbone", tokenizer, sizes)
    data = (run / PT).read_bytes()
    (run / PT).write_bytes(data[: len(data) // 2])
    fails("cut off, or no zip", tokenizer, sizes)
    (run / PT).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    fails("Git LFS pointer", tokenizer, sizes)
    (run / PT).unlink()
    fails("no training run", tokenizer, sizes, error=FileNotFoundError)


def test_the_newest_step_is_taken(run, tmp_path, tokenizer, sizes):
    good, older = (
        run / "checkpoints/step-010000-epoch-01-loss=0.5.pt",
        run / "checkpoints/step-002500-epoch-00-loss=0.9.pt",
    )
    (run / PT).rename(good)
    older.write_bytes(b"")
    cw.prismatic_to_hf(run, tmp_path / "hf", tokenizer, sizes)
    assert len(tensors_of(tmp_path / "hf")) == 153


# -----------------------------------------------------------------------------
# check


def report(path, capsys) -> tuple[bool, str]:
    good = cw.check(path)
    return good, capsys.readouterr().out


def test_check_a_whole_folder(folder, tokenizer, capsys):
    shutil.copy(tokenizer, folder / "tokenizer.model")
    good, text = report(folder, capsys)
    assert (
        good
        and "Hugging Face layout" in text
        and "153 tensors in bfloat16" in text
        and "loads in this code: yes" in text
    )
    assert "bridge_orig (WidowX): -0.0163 to 0.0161" in text and "toy (robot unknown)" in text
    assert "official code: no, tokenizer_config.json is missing" in text and "not of the released size" in text


def test_check_broken_folders(folder, capsys):
    shard = folder / "model-00002-of-00003.safetensors"
    data = shard.read_bytes()
    shard.unlink()
    good, text = report(folder, capsys)
    assert not good and "Hugging Face layout" in text and f"incomplete: {shard}: weight file missing" in text
    shard.write_text("version https://git-lfs.github.com/spec/v1\n")
    good, text = report(folder, capsys)
    assert not good and "incomplete" in text and "Git LFS pointer" in text
    shard.write_bytes(data)
    path = folder / "model-00001-of-00003.safetensors"
    save_file(load_file(path) | {"projector.fc1.bias": torch.zeros(7).bfloat16()}, path)
    good, text = report(folder, capsys)
    assert not good and "projector.fc1.bias has shape (7,), config.json makes it (224,)" in text


def test_check_a_training_run(run, sizes, capsys):
    good, text = report(run, capsys)
    assert good and "a training run (Prismatic)" in text and "vision-language-action" in text and "--config" in text
    config = read(run / "config.json") | read(Path(sizes))
    (run / "config.json").write_text(json.dumps(config))
    good, text = report(run, capsys)
    assert good and "complete: every tensor" in text and "after `prismatic-to-hf`" in text
    model = torch.load(run / PT, weights_only=True)["model"]
    del model["llm_backbone"]["llm.model.norm.weight"]
    torch.save({"model": model}, run / PT)
    good, text = report(run, capsys)
    assert not good and "incomplete" in text and "language_model.model.norm.weight" in text


def test_check_a_lora_adapter(tmp_path, capsys):
    pair = {f"base_model.model.x.lora_{half}.weight": torch.zeros(s) for half, s in (("A", (4, 8)), ("B", (6, 4)))}
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"r": 4, "lora_alpha": 8, "base_model_name_or_path": "openvla-7b"})
    )
    save_file(pair, tmp_path / "adapter_model.safetensors")
    good, text = report(tmp_path, capsys)
    assert good and "a LoRA adapter" in text and "rank 4, alpha 8, on openvla-7b" in text and "1 layers" in text
    pair.pop("base_model.model.x.lora_B.weight")
    save_file(pair, tmp_path / "adapter_model.safetensors")
    good, text = report(tmp_path, capsys)
    assert not good and "base_model.model.x.weight needs a lora_A and a lora_B" in text
    (tmp_path / "adapter_model.safetensors").unlink()
    assert not report(tmp_path, capsys)[0]


def test_check_other_folders_and_the_command_line(folder, tmp_path, capsys):
    (tmp_path / "notes.txt").touch()
    code, text = command(capsys, "check", tmp_path)
    assert code == 2 and "no checkpoint" in text and str(folder) in text
    code, text = command(capsys, "check", tmp_path / "nowhere")
    assert (code, text) == (2, f"error: {tmp_path / 'nowhere'}: no such folder\n")
    assert command(capsys, "hf-to-prismatic", folder, tmp_path / "run")[0] == 0
    assert command(capsys, "check", tmp_path / "run")[0] == 0
    assert command(capsys, "check", folder)[0] == 2  # it has no tokenizer.model


def test_preprocessing_comes_back(folder, tmp_path, tokenizer):
    """What the training pictures went through is no part of the official format; it is kept all the same."""
    config = read(folder / "preprocessor_config.json")
    (folder / "preprocessor_config.json").write_text(json.dumps(config | {"trained_on": ["lanczos3", "center_crop"]}))
    cw.hf_to_prismatic(folder, tmp_path / "run")
    cw.prismatic_to_hf(tmp_path / "run", tmp_path / "hf", tokenizer)
    assert ImageProcessor.from_pretrained(tmp_path / "hf").trained_on == ("lanczos3", "center_crop")


def test_merge_lora(folder, tmp_path, capsys):
    model = lora.add_lora(OpenVLA.from_pretrained(folder), rank=2)
    for layer in lora.lora_layers(model).values():
        layer.lora_B.weight.data.normal_(0, 0.1)
    lora.save_adapter(model, tmp_path / "run", folder)
    (tmp_path / "run" / "dataset_statistics.json").write_text("{}")
    assert command(capsys, "merge-lora", tmp_path / "run", tmp_path / "out")[0] == 0
    lora.merge_lora(model)
    want = {k.replace(".base_layer", ""): v for k, v in (model.state_dict() | model.unused).items()}
    for name, tensor in OpenVLA.from_pretrained(tmp_path / "out").state_dict().items():
        assert torch.equal(tensor, want[name]), name
    assert command(capsys, "merge-lora", tmp_path / "run", tmp_path / "out")[0] == 2  # it is there already
