"""Pixels against the official processor (PIL) and the official evaluation and training code (TensorFlow)."""

import hashlib
import io
import json
import os

import numpy as np
import pytest
import torch
from common import GOLDENS, MODELS, golden, shared
from PIL import Image
from safetensors.numpy import load_file

import image as I


def sha(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


@pytest.mark.parametrize("strategy", ["resize-naive", "letterbox", "resize-crop"])
def test_three_resize_strategies_to_the_bit(strategy):
    info = json.loads((GOLDENS / "image_transform.json").read_text())
    tensors, want = load_file(GOLDENS / "image_transform.safetensors"), info["strategies"][strategy]
    norm = want["tvf_normalize_params"]
    processor = I.ImageProcessor(224, strategy, [p["mean"] for p in norm], [p["std"] for p in norm])
    for i, result in enumerate(want["results"]):
        image = I.to_rgb(GOLDENS / "images" / result["image"])
        assert sha(processor.resize(image)) == result["resized_u8_sha256"], result["image"]
        got = processor(image)[:, ::16, ::16].numpy()
        np.testing.assert_array_equal(got, tensors[f"{strategy}/img{i}/pixel_values_s16"])
    odd = I.to_rgb(GOLDENS / info["odd_image"]["image"])
    assert sha(processor.resize(odd)) == info["odd_image"]["results"][strategy]["resized_u8_sha256"]


@pytest.mark.parametrize("name", MODELS)
def test_pixel_values_of_the_released_settings(folders, name):
    tensors, info = golden(name)
    processor = I.ImageProcessor.from_pretrained(folders[name])
    for i, example in enumerate(info["examples"]):
        got = processor(GOLDENS / example["image"])
        assert torch.equal(got[:, ::16, ::16], tensors[f"ex{i}/pixel_values_s16"])
        torch.testing.assert_close(got.double().sum(1), tensors[f"ex{i}/pixel_values_col_sums"], atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_config_round_trip(folders, name, tmp_path):
    processor = I.ImageProcessor.from_pretrained(folders[name])
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor.to_dict()))
    assert I.ImageProcessor.from_pretrained(tmp_path) == processor
    official = json.loads((folders[name] / "preprocessor_config.json").read_text())
    ours = processor.to_dict()
    different = {k for k in official if ours[k] != official[k]}
    assert different <= {"means", "stds"}  # officially the exact constants, which nothing reads


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mean", [0.5, 0.5]),
        ("mean", "0.5"),
        ("mean", [[], 0.5, 0.5]),
        ("std", [0.5, 0, 0.5]),
        ("size", 0),
        ("size", "9"),
        ("input_sizes", []),
    ],
)
def test_a_processor_of_no_numbers_is_refused(folders, key, value, tmp_path):
    config = json.loads((folders["tiny-openvla"] / "preprocessor_config.json").read_text())
    if key == "size":
        config["input_sizes"][0][1] = value
    elif key in config:
        config[key] = value
    else:
        config["tvf_normalize_params"][1][key] = value
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{tmp_path}/preprocessor_config.json: "):
        I.ImageProcessor.from_pretrained(tmp_path)


def resize_in_order(image, size):
    """resize_lanczos3, summed up one input pixel after the other as TensorFlow does, which decides rounding ties."""
    weights = []
    for n in image.shape[:2]:
        weights.append(np.zeros((size, n), np.float32))
        for output, start, block in I.lanczos3_bands(n, size):
            weights[-1][output : output + len(block), start : start + block.shape[1]] = block
    x, rows, out = I.planar(image), 0, 0
    for k, column in enumerate(weights[0].T):
        rows = rows + column[:, None] * x[:, k, None]
    for k, column in enumerate(weights[1].T):
        out = out + column * rows[:, :, k, None]
    return I.to_uint8(np.rint(out))


@pytest.mark.parametrize("shape", [(64, 64), (101, 64), (300, 400), (28, 500)])
@pytest.mark.parametrize("kind", ["noise", "black and white"])
def test_exact_is_every_sum_in_order(shape, kind):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*shape, 3)).astype(np.uint8)
    if kind == "black and white":
        image = 255 * (image > 127).astype(np.uint8)
    np.testing.assert_array_equal(I.resize_lanczos3(image, 224, exact=True), resize_in_order(image, 224))


@pytest.mark.parametrize("result", json.loads((GOLDENS / "eval_preproc.json").read_text())["results"])
def test_official_images_to_the_bit(result):
    """0 of 150,528 values differ: the resize, the centre crop, and with JPEG."""
    image = I.to_rgb(GOLDENS / result["image"])
    small = I.resize_lanczos3(image, 224, exact=True)
    assert sha(small) == result["lanczos3_no_jpeg_sha256"]
    assert sha(I.center_crop(small)) == result["center_crop_of_lanczos3_no_jpeg_sha256"]
    through_jpeg = I.decode(I.encode_jpeg(image))
    exact = I.resize_lanczos3(through_jpeg, 224, exact=True)
    assert sha(exact) == result["resize_image_for_policy_sha256"]
    assert (I.resize_lanczos3(through_jpeg, 224) != exact).sum() <= 4


def test_lanczos3_and_centre_crop_as_in_tensorflow():
    tensors = load_file(GOLDENS / "eval_preproc.safetensors")
    for picture in ("bridge_64x64", "bridge_mosaic_192x256", "scene_640x480"):
        small = I.resize_lanczos3(I.to_rgb(GOLDENS / "images" / f"{picture}.png"), 224)
        for step, got in (("lanczos3_no_jpeg", small), ("center_crop_of_lanczos3_no_jpeg", I.center_crop(small))):
            key = next(k for k in tensors if picture in k and f"/{step}/s8" in k).removesuffix("s8")
            assert np.abs(got[::8, ::8].astype(int) - tensors[key + "s8"]).max() <= 1
            for axis, sums in ((0, "col_sums"), (1, "row_sums")):
                difference = np.abs(got.sum(axis, dtype=int) - tensors[key + sums]).sum()
                assert difference <= 150, (picture, step, difference)  # rounding ties, of 150,528 values


def test_decode_and_resize_fixtures():
    fixture = np.load(shared("facts/pipeline_fixtures/decode_resize.npz"))
    cases = {k.split("::")[0] for k in fixture}
    assert len(cases) == 6
    for case in cases:
        decoded = I.decode(fixture[f"{case}::bytes"].tobytes())
        want = fixture[f"{case}::decoded"]
        assert np.array_equal(decoded, np.broadcast_to(want, decoded.shape)), case  # bit-exact; grey is expanded
        difference = np.abs(I.resize_lanczos3(decoded, 224).astype(int) - fixture[f"{case}::resized224"])
        assert (difference[..., 0] > 0).sum() <= 3 and difference.max() <= 1, case


def test_augmentation_formulas():
    fixture = np.load(shared("facts/pipeline_fixtures/augment.npz"))
    x = I.planar(fixture["input"]) / np.float32(255)
    for k in range(8):
        top, left, *_ = (float(v) for v in fixture[f"{k}::params_box_y0x0y1x1"])
        cropped = I.crop(x, top, left)
        if f"{k}::after_crop" in fixture:
            assert np.abs(I.from_unit(cropped).astype(int) - fixture[f"{k}::after_crop"]).max() <= 1
        out = I.from_unit(I.jitter(cropped.clip(0, 1), *fixture[f"{k}::params_brightness_contrast_saturation_hue"]))
        difference = np.abs(out.astype(int) - fixture[f"{k}::output"])
        assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


def test_augment_stays_in_its_ranges():
    image = np.full((32, 32, 3), (200, 120, 40), np.uint8)
    before, rng = image.copy(), np.random.default_rng(0)
    outs = [I.augment(image, rng) for _ in range(30)]
    assert np.array_equal(image, before)
    assert len({sha(out) for out in outs}) == 30 and all(out.shape == image.shape for out in outs)
    assert np.array_equal(I.augment(image, np.random.default_rng(5)), I.augment(image, np.random.default_rng(5)))


def png(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


def test_what_a_person_expects_of_odd_pictures(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(I.to_rgb(grey), np.stack([grey] * 3, -1))
    assert np.array_equal(I.to_rgb(png(Image.fromarray(grey))), np.stack([grey] * 3, -1))
    for black in (grey.astype(np.uint16), Image.fromarray(grey.astype(np.float32) / 255)):
        with pytest.raises(ValueError, match="16 bits whose largest number|floating-point"):
            I.to_rgb(black)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert np.array_equal(I.to_rgb(png(deep)), np.stack([grey] * 3, -1))
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:2] = (10, 20, 30, 255)
    assert I.to_rgb(png(Image.fromarray(rgba)))[0, 0].tolist() == [10, 20, 30]
    assert I.to_rgb(rgba)[3, 3].tolist() == [255, 255, 255]  # what is transparent is white
    palette = Image.fromarray(np.stack([grey] * 3, -1)).quantize(16)
    assert np.array_equal(I.to_rgb(png(palette)), np.asarray(palette.convert("RGB")))
    cmyk = Image.new("CMYK", (3, 2), (0, 255, 255, 0))
    assert I.to_rgb(cmyk)[0, 0, 0] > 200 and I.to_rgb(cmyk).shape == (2, 3, 3)
    sideways, exif = Image.fromarray(np.dstack([grey[:8]] * 3)), Image.Exif()
    exif[274] = 6  # taken with the camera on its side
    sideways.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    assert I.to_rgb(tmp_path / "turned.jpg").shape == (16, 8, 3)


@pytest.mark.parametrize(
    "bad", [np.zeros((3, 8, 8), np.uint8), np.zeros((8, 8, 3), np.float32), np.zeros((0, 8, 3), np.uint8), None]
)
def test_what_is_no_picture(bad):
    with pytest.raises(ValueError, match="must be"):
        I.to_rgb(bad)


def test_jpegs_that_we_write():
    image = I.to_rgb(GOLDENS / "images" / "bridge_64x64.png")
    data = I.encode_jpeg(image)
    back = I.decode(data)
    assert back.shape == image.shape and back.dtype == np.uint8
    assert np.abs(back.astype(int) - image).mean() < 3


def test_unreadable_files(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(ValueError, match="a.png"):
        I.to_rgb(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match="b.png"):
        I.to_rgb(tmp_path / "b.png")
    whole = (tmp_path / "c.jpg").open("wb")
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(whole, "JPEG")
    whole.close()
    with pytest.raises(ValueError, match="will not decode"):
        I.decode((tmp_path / "c.jpg").read_bytes()[:200])
    with pytest.raises(ValueError, match="no image"):
        I.decode(b"GIF89a but not really")
    Image.fromarray(np.zeros((64, 64), np.float32)).save(tmp_path / "d.tiff")
    with pytest.raises(ValueError, match="d.tiff.*floating-point"):
        I.to_rgb(tmp_path / "d.tiff")
    for name, data in (("e.jpg", (tmp_path / "c.jpg").read_bytes()[:400]), ("f.png", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=name):
            I.to_rgb(tmp_path / name)


def test_no_program_is_started_for_an_image(tmp_path, monkeypatch):
    """PIL gives a PostScript file, whatever its name, to Ghostscript."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "a.png").write_bytes(program)
    with pytest.raises(ValueError, match="a.png: not a readable image; it must be one of PNG"):
        I.to_rgb(tmp_path / "a.png")
    with pytest.raises(ValueError, match="no image"):
        I.decode(program)
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF"])
def test_huge_images_are_refused_before_they_are_decoded(kind, tmp_path, monkeypatch):
    Image.new("L", (40, 30)).save(tmp_path / "a.png", kind)
    monkeypatch.setattr(I, "MAX_PIXELS", 1200)
    assert I.to_rgb(tmp_path / "a.png").shape == (30, 40, 3)
    monkeypatch.setattr(I, "MAX_PIXELS", 1199)
    monkeypatch.setattr(Image.Image, "convert", None)
    with pytest.raises(ValueError, match="a.png.*40 x 30 pixels"):
        I.to_rgb(tmp_path / "a.png")
    with pytest.raises(ValueError, match="40 x 30 pixels"):
        I.decode((tmp_path / "a.png").read_bytes())


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_exif_turns_an_image_as_a_path_and_as_bytes(kind, tmp_path):
    sideways, exif = Image.new("RGB", (24, 16)), Image.Exif()
    sideways.paste("white", (0, 0, 12, 16))
    exif[274] = 6  # taken with the camera on its side
    sideways.save(tmp_path / "a", kind, exif=exif)
    from_path, from_bytes = I.to_rgb(tmp_path / "a"), I.decode((tmp_path / "a").read_bytes())
    assert from_path.shape == from_bytes.shape == (24, 16, 3)
    assert from_path[:8].min() > 200 > 50 > from_path[16:].max()
    assert np.abs(from_path.astype(int) - from_bytes).max() < 8
