"""Eight and four bits: the arithmetic, the folder, and what is refused."""

import json
import shutil

import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st

import convert_weights
from bench import common as bench
from checkpoint import open_checkpoint
from model import INDEX
from policy import load_policy
from speed import quantize


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantize") / "whole"
    bench.write_random_checkpoint(folder, "tiny")
    return folder


def restored(parts: dict, bits: int) -> torch.Tensor:
    """The weight that a kernel multiplies with, (out, in) float32."""
    if bits == 8:
        return parts["weight"].float() * parts["scale"].float()[:, None]
    codes = torch.stack([parts["weight"] >> 4, parts["weight"] & 15], dim=-1).flatten(1).float()
    scale, middle = parts["scale"].float().unbind(-1)  # (out, in / group)
    codes = codes.view(*scale.shape, -1)
    return ((codes - 8) * scale[..., None] + middle[..., None]).flatten(1)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([8, 4]), st.sampled_from([32, 64]), st.integers(0, 10**6), st.floats(1e-3, 1e3))
def test_nearest_code(bits, group, seed, size):
    """No other code of the same scale is nearer to the weight."""
    w = torch.randn(16, 128, generator=torch.Generator().manual_seed(seed)) * size
    parts = quantize.quantize(w, bits, group)
    scale = parts["scale"].float()
    if bits == 8:
        levels = torch.arange(-127, 128) * scale[:, None, None]  # (out, 1, 255)
    else:
        levels = (torch.arange(16) - 8) * scale[..., :1] + scale[..., 1:]  # (out, in / group, 16)
        levels = levels.repeat_interleave(group, dim=1)  # (out, in, 16)
    nearest = (levels - w[..., None]).abs().amin(-1)
    error = (restored(parts, bits) - w).abs()
    assert (error <= nearest + 1e-5 * w.abs().max()).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_is_the_restored_weight(bits, dtype):
    torch.manual_seed(0)
    linear, x = nn.Linear(128, 64, bias=False), torch.randn(1, 300, 128).to(dtype)
    parts = quantize.quantize(linear.weight.detach(), bits, 32)
    layer = {8: quantize.Int8Linear, 4: quantize.Int4Linear}[bits](linear, 32)
    layer.load_state_dict({k: v if k == "weight" else v.to(dtype) for k, v in parts.items()}, assign=True)
    if bits == 4:
        layer.pack()
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    for rows in (1, 7, 300):
        want = x[:, :rows].float() @ restored(parts, bits).T
        torch.testing.assert_close(layer(x[:, :rows]).float(), want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("bits", [8, 4])
def test_folder(whole, tmp_path, bits):
    before = {p.name: p.read_bytes() for p in whole.iterdir()}
    out = tmp_path / "small"
    with pytest.raises(SystemExit) as stop:
        convert_weights.main(["quantize", str(whole), str(out), "--bits", str(bits), "--group", "32"])
    assert stop.value.code == 0
    assert {p.name: p.read_bytes() for p in whole.iterdir()} == before
    open_checkpoint(out)
    policy = load_policy(out, torch.float32)
    layer = policy.model.get_submodule("language_model.model.layers.0.mlp.up_proj")
    assert isinstance(layer, {8: quantize.Int8Linear, 4: quantize.Int4Linear}[bits])
    assert layer.weight.element_size() == 1
    assert layer.weight.data_ptr() % 64 == 0  # the kernels crash on a mapped file's
    exact = load_policy(whole, torch.float32)
    ids = torch.tensor([exact.tokenizer.encode_prompt("put the spoon on the towel")])
    pixels = torch.randn(1, 6, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, got = exact.model(ids, pixels)[0], policy.model(ids, pixels)[0]
    error = ((got - want).norm() / want.norm()).item()
    assert 0 < error < {8: 0.001, 4: 0.01}[bits]


def test_odd_width():
    """PyTorch's 8-bit kernel crashes or errs on widths that are no multiple of 32; they go another way."""
    linear, x = nn.Linear(40, 24, bias=False), torch.randn(1, 7, 40).bfloat16()
    parts = quantize.quantize(linear.weight.detach(), 8, 32)
    layer = quantize.Int8Linear(linear, 32)
    layer.load_state_dict(parts, assign=True)
    torch.testing.assert_close(layer(x).float(), x.float() @ restored(parts, 8).T, atol=0.03, rtol=0.03)


def test_large_input_in_float16():
    """The sum stays in range although codes and input are large."""
    linear, x = nn.Linear(4096, 16, bias=False), torch.randn(40, 4096)
    nn.init.normal_(linear.weight, std=0.02)
    x[:, 0] = 2000
    parts = quantize.quantize(linear.weight.detach(), 8, 32)
    layer = quantize.Int8Linear(linear, 32)
    layer.load_state_dict({k: v if k == "weight" else v.half() for k, v in parts.items()}, assign=True)
    want = x @ restored(parts, 8).T
    torch.testing.assert_close(layer(x.half()).float(), want, atol=0.3, rtol=0.01)


def test_for_inference_only(whole, tmp_path):
    """What needs the weights themselves says so."""
    import train

    out = tmp_path / "small"
    convert_weights.quantize_folder(whole, out, 8, 32)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "adapter_config.json").write_text(json.dumps(dict(base_model_name_or_path=str(out))))
    shutil.copy(whole / "model-00001.safetensors", tmp_path / "run" / "adapter_model.safetensors")
    for use in (
        lambda: train.open_base(train.Config(base_checkpoint=str(out))),
        lambda: convert_weights.hf_to_prismatic(out, tmp_path / "x"),
        lambda: load_policy(tmp_path / "run"),
    ):
        with pytest.raises(ValueError, match="is quantized, for inference only"):
            use()
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization": {"bits": 3}}))
    with pytest.raises(ValueError, match="this code knows bits 4 and 8"):
        load_policy(out)


def test_refusals(whole, tmp_path):
    out = tmp_path / "small"

    def refuse(match, bits=8, group=32, source=whole, to=out):
        with pytest.raises(ValueError, match=match):
            convert_weights.quantize_folder(source, to, bits, group)
        assert not out.exists()

    refuse("bits must be 8 or 4", bits=3)
    refuse("does not divide", bits=4, group=256)
    refuse("exists", to=tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    (run / "adapter_config.json").write_text(json.dumps(dict(base_model_name_or_path=str(whole))))
    refuse("LoRA run", source=run)
    convert_weights.quantize_folder(whole, out, 8, 32)
    with pytest.raises(ValueError, match="quantized already"):
        convert_weights.quantize_folder(out, tmp_path / "again", 8, 32)


def test_cut_off(whole, tmp_path, monkeypatch):
    """Killed on the way: there is no folder that looks whole, and the next try starts anew."""

    def dies(path, content):
        if path.name == INDEX:
            raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(convert_weights, "write_json", dies)
        with pytest.raises(KeyboardInterrupt):
            convert_weights.quantize_folder(whole, tmp_path / "out", 8, 32)
    assert not (tmp_path / "out").exists()
    convert_weights.quantize_folder(whole, tmp_path / "out", 8, 32)
    open_checkpoint(tmp_path / "out")
