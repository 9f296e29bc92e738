"""OFT against the official code: L1, discrete, FiLM and diffusion heads, training gradients; the mask; batches."""

import hashlib
import json
import re
import shutil
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import GOLDENS, golden, shared, with_tokenizer
from safetensors.torch import load_file, save_file

import image
import oft as O
import sample
from checkpoint import is_oft, open_checkpoint
from configurator import configure
from convert_weights import check
from formats import oxe
from image import ImageProcessor
from lora import merge
from model import OpenVLA
from normalize import normalize, unnormalize
from policy import Policy, load_policy, predict_chunk, prepare_image
from tokenizer import PAD, PROMPT, Tokenizer, pad_sequences

TENSORS, INFO = golden("oft")


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer(shared("data/llama2-tokenizer/tokenizer.model"), PROMPT)


def make(folders, tmp_path_factory, kind, num_images=2):
    """The tiny model with the components of one kind beside it."""
    folder = tmp_path_factory.mktemp("oft") / kind
    shutil.copytree(folders["tiny-openvla"], folder)
    for file in (GOLDENS / "tiny-oft" / kind).glob("*") if kind != "discrete" else []:
        shutil.copy(file, folder)
    cfg = O.OFTConfig(num_images=num_images, head="l1" if kind == "film" else kind, film=kind == "film")
    if kind == "discrete":
        cfg = replace(cfg, proprio_dim=0)
    return O.load_oft(folder, torch.float32, cfg=cfg), folder


@pytest.fixture(scope="session")
def policies(folders, tmp_path_factory):
    kinds = {name: make(folders, tmp_path_factory, name)[0] for name in ("l1", "film", "diffusion")}
    return kinds | {"discrete": make(folders, tmp_path_factory, "discrete", 1)[0]}


@pytest.fixture(scope="session")
def pixels(folders):
    """Names of pictures -> (1, 6 * V, 224, 224)."""
    processor = ImageProcessor.from_pretrained(folders["tiny-openvla"])
    return lambda *names: torch.cat([processor(GOLDENS / name) for name in names])[None]


PRIMARY, WRIST = INFO["images"]["primary"], INFO["images"]["wrist"]
STATE = TENSORS["proprio_normalized"].float()[None]


def stats(kind="action"):
    return json.loads((GOLDENS / "tiny-oft/l1/dataset_statistics.json").read_text())[INFO["unnorm_key"]][kind]


def test_proprio_as_officially():
    got = normalize(TENSORS["proprio_raw"].numpy(), stats("proprio"))
    np.testing.assert_allclose(got, STATE[0], atol=1e-6)


@pytest.mark.parametrize("kind", ["l1", "film", "diffusion"])
def test_actions(kind, policies, tokenizer, pixels):
    noise = TENSORS["diffusion/start_noise"][None] if kind == "diffusion" else None
    prompt = tokenizer.encode_prompt(INFO["instruction"])
    got = policies[kind].predict([prompt], pixels(PRIMARY, WRIST), STATE, noise)[0]
    np.testing.assert_allclose(unnormalize(got, stats()), TENSORS[f"{kind}/actions"], atol=1e-4)


def test_discrete_chunk(policies, tokenizer, pixels):
    prompt = tokenizer.encode_prompt(INFO["discrete"]["instruction"])
    ids, lengths = policies["discrete"].insert_placeholders([prompt])
    logits = policies["discrete"].act(ids, lengths, pixels(INFO["discrete"]["image"]))
    assert logits.argmax(-1)[0, :-1].tolist() == TENSORS["discrete/token_ids"].tolist()
    got = policies["discrete"].predict([prompt], pixels(INFO["discrete"]["image"]))[0]
    np.testing.assert_allclose(unnormalize(got, stats()), TENSORS["discrete/actions"], atol=1e-6)


def test_one_picture_without_state(policies, tokenizer, pixels):
    """The same head, fewer inputs: l1_single of the golden file."""
    full = policies["l1"]
    small = O.OFT(full.vla, replace(full.oft, proprio_dim=0, num_images=1)).eval()
    small.action_head.load_state_dict(full.action_head.state_dict())
    got = small.predict([tokenizer.encode_prompt(INFO["instruction"])], pixels(PRIMARY))[0]
    np.testing.assert_allclose(unnormalize(got, stats()), TENSORS["l1_single/actions"], atol=1e-4)


def test_raw_images_are_prepared_as_officially(folders, tmp_path_factory, tokenizer):
    """Through JPEG, Lanczos3 and the centre crop, wherever the policy acts; but for an image that has its size."""
    model, folder = make(folders, tmp_path_factory, "l1")
    (folder / O.OFT_RECORD).write_text(json.dumps(asdict(model.oft)))
    policy = load_policy(with_tokenizer(folder), torch.float32)
    raw = [image.to_rgb(GOLDENS / name) for name in (PRIMARY, WRIST)]
    small = [image.resize_lanczos3(image.decode(image.encode_jpeg(picture)), 224, exact=True) for picture in raw]
    cropped = torch.from_numpy(np.stack([image.center_crop(picture) for picture in small]))
    pixel_values = policy.processor.normalize(cropped).flatten(0, 1)[None]
    want = policy.model.predict([tokenizer.encode_prompt(INFO["instruction"])], pixel_values, STATE)[0]

    def act(views):
        state = TENSORS["proprio_raw"][None].numpy()
        return predict_chunk(policy, [views], [INFO["instruction"]], state, INFO["unnorm_key"])[0]

    for views in (raw, [GOLDENS / PRIMARY, GOLDENS / WRIST], small):
        np.testing.assert_allclose(act(views), unnormalize(want, stats()), atol=2e-4)
    without_jpeg = [image.resize_lanczos3(picture, 224) for picture in raw]
    assert np.abs(act(without_jpeg) - act(raw)).max() > 1e-2


# -----------------------------------------------------------------------------
# Official folders, from raw images to actions

RAW = json.loads((GOLDENS / "oft_raw_images.json").read_text())


def drawn(height, width, seed):
    """The image (H, W, 3) uint8 that the official code was shown."""
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (height + width)], axis=-1)
    squares = (x // 24 + y // 24 + seed) % 3 * 40
    grain = (x * 7919 + y * 104729 + x * y * 31 + seed) % 23
    return ((smooth + squares[..., None] + grain[..., None]) % 256).astype(np.uint8)


def raw_views(case):
    return [image.to_rgb(GOLDENS / view) if isinstance(view, str) else drawn(*view) for view in case["views"]]


def raw_cases(*models):
    return [
        pytest.param(case, id=f"{case['model']}-{case['name']}") for case in RAW["cases"] if case["model"] in models
    ]


def record(case):
    """What oft_config.json must say for a case."""
    kind = case["model"].removeprefix("lora_")
    return O.OFTConfig(
        proprio_dim=8 if case["state"] else 0,
        num_images=len(case["views"]),
        head="l1" if kind == "film" else kind,
        film=kind == "film",
    )


def resized_views(case):
    """The raw images through JPEG and resized; one of 224 x 224 pixels stays as it is."""
    resized = []
    for view in raw_views(case):
        if len(view) != 224:
            view = image.resize_lanczos3(image.decode(image.encode_jpeg(view)), 224, exact=True)
        resized.append(view)
    return resized


def act(policy, case, views):
    state = TENSORS["proprio_raw"][None].numpy() if case["state"] else None
    crop = None if case["center_crop"] else False
    return predict_chunk(policy, [views], [case["instruction"]], state, RAW["unnorm_key"], crop)[0]


def check_chunk(policy, case):
    """Compare a policy with get_vla_action, from raw images on."""
    chunk = act(policy, case, raw_views(case))
    np.testing.assert_allclose(chunk, case["actions"], atol=2e-4)
    return chunk


def official_components(folder, case):
    """Statistics and components beside a model, and the record that official folders do not have."""
    kind = case["model"].removeprefix("lora_")
    cfg = record(case)
    for file in (GOLDENS / "tiny-oft" / ("l1" if kind == "discrete" else kind)).iterdir():
        component = file.name.partition("--")[0]
        if O.needed_components(cfg).get(component, True):
            shutil.copy(file, folder)
    (folder / O.OFT_RECORD).write_text(json.dumps(asdict(cfg)))


def official_adapter(folder, film):
    """tiny-lora as the official OFT script saves it: FiLM has wrapped the vision encoders after PEFT."""
    shutil.copytree(GOLDENS / "tiny-lora", folder / "lora_adapter")
    file = folder / "lora_adapter/adapter_model.safetensors"
    tensors = {}
    for name, tensor in load_file(file).items():
        if film:
            name = name.replace("model.vision_backbone.", "model.vision_backbone.vision_backbone.")
            name = re.sub(r"(vision_backbone\..*\.blocks\.\d+)", r"\1.block", name)
        tensors[name] = tensor
    if film:
        names = "\n".join(sorted(tensors))
        assert hashlib.sha256(names.encode()).hexdigest() == RAW["film_adapter"]["sha256_of_sorted_names"]
    save_file(tensors, file, {"format": "pt"})

    # Where the base was in the cache of the machine that trained.
    config = json.loads((folder / "lora_adapter/adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/cache/hub/models--openvla--openvla-7b/snapshots/47a0ec7"
    (folder / "lora_adapter/adapter_config.json").write_text(json.dumps(config))


def official_run(root, models, folders, case):
    """A folder of the official script that was not merged, and beside it its base openvla-7b, in float32."""
    base = shutil.copytree(folders["tiny-openvla"], root / "openvla-7b", ignore=shutil.ignore_patterns("model*"))
    models["tiny-openvla"].save_pretrained(base, torch.float32)
    with_tokenizer(base)
    run = root / "run"
    run.mkdir()
    shutil.copy(base / "config.json", run)  # get_vla wants it there
    official_components(run, case)
    official_adapter(run, film=record(case).film)
    return run


@pytest.mark.parametrize("case", raw_cases("l1", "film", "discrete", "diffusion"))
def test_chunks_from_raw_images(case, folders, tmp_path, monkeypatch):
    """Equal to get_vla_action, for raw images of several sizes, with and without state, crop and further cameras."""
    folder = with_tokenizer(shutil.copytree(folders["tiny-openvla"], tmp_path / "m"))
    official_components(folder, case)
    policy = load_policy(folder, torch.float32)
    if case["model"] == "diffusion":
        noise = TENSORS["diffusion/start_noise"][None]
        monkeypatch.setattr(policy.model, "fixed_noise", lambda *_: noise)
    check_chunk(policy, case)


@pytest.mark.parametrize(
    "case", [case for case in RAW["cases"] if case["model"] == "l1"], ids=lambda case: case["name"]
)
def test_pixels_from_raw_images(case, folders):
    """Equal to prepare_images_for_vla to the bit."""
    processor = ImageProcessor.from_pretrained(folders["tiny-openvla"])
    processor.trained_on = (image.JPEG, *image.CROPPED)
    policy = Policy(None, None, processor, norm_stats={}, checkpoint="")

    def checksum(pixels):
        return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()

    assert [checksum(view) for view in resized_views(case)] == case["resized_sha256"]
    prepared = [prepare_image(policy, raw, case["center_crop"]) for raw in raw_views(case)]
    assert [checksum(pixels) for pixels in prepared] == case["prepared_sha256"]


@pytest.mark.parametrize("case", raw_cases("lora_l1", "lora_film"))
def test_official_folder_that_was_not_merged(case, folders, models, tmp_path, capsys):
    """lora_adapter/ on its base: the official chunks, the same from sample.py and when merged; check agrees."""
    run = official_run(tmp_path, models, folders, case)
    checkpoint = open_checkpoint(run)
    assert (checkpoint.base, checkpoint.adapter) == (tmp_path / "openvla-7b", run / "lora_adapter")
    assert list(checkpoint.norm_stats) == [RAW["unnorm_key"]]
    chunk = check_chunk(load_policy(run, torch.float32), case)

    merge(run, tmp_path / "merged")
    merged = act(load_policy(tmp_path / "merged", torch.float32), case, raw_views(case))
    np.testing.assert_allclose(merged, chunk, atol=1e-4)
    for folder in (run, tmp_path / "merged"):
        assert check(folder)
        assert "an OFT policy: OFTConfig(action_chunk=8" in capsys.readouterr().out

    words = ["--checkpoint", run, "--instruction", case["instruction"], "--json", "--dtype", "float32"]
    words += ["--state", *TENSORS["proprio_raw"].tolist(), "--image"]
    for i, view in enumerate(raw_views(case)):
        image.Image.fromarray(view).save(tmp_path / f"{i}.png")
        words.append(tmp_path / f"{i}.png")
    sample.main(configure(sample.Config, [str(word) for word in words]))
    said = json.loads(capsys.readouterr().out.splitlines()[-1])["actions"]
    np.testing.assert_allclose(said, chunk, atol=1e-6)


def test_parts_of_an_official_folder(folders, models, tmp_path, capsys):
    """What is missing is said, by check as by loading; merged weights come before lora_adapter/."""
    case = next(case for case in RAW["cases"] if case["model"] == "lora_film")
    run = official_run(tmp_path, models, folders, case)
    with pytest.raises(ValueError, match=f"lora_adapter: only the adapter of an OFT policy; give .*{run}"):
        open_checkpoint(run / "lora_adapter")

    def both_refuse(message):
        with pytest.raises(ValueError, match=f"(?s){message}"):
            load_policy(run)
        capsys.readouterr()
        assert not check(run)
        assert re.search(f"(?s)incomplete: .*{message}", capsys.readouterr().out)

    component = run / "vision_backbone--100_checkpoint.pt"
    component.rename(tmp_path / "aside.pt")
    both_refuse("vision_backbone.*is missing, but .*FiLM")
    (tmp_path / "aside.pt").rename(component)
    right = (run / O.OFT_RECORD).read_text()
    (run / O.OFT_RECORD).unlink()
    both_refuse("8 LIBERO, 25 ALOHA")
    (run / O.OFT_RECORD).write_text(json.dumps({**json.loads(right), "proprio_dim": 7}))
    both_refuse("proprio_projector: .*size mismatch")
    (run / O.OFT_RECORD).write_text(right)
    (tmp_path / "openvla-7b").rename(tmp_path / "elsewhere")
    with pytest.raises(
        FileNotFoundError, match="lora_adapter/adapter_config.json: its base checkpoint, openvla/openvla-7b@47"
    ):
        load_policy(run)

    for file in (tmp_path / "elsewhere").iterdir():
        shutil.copy(file, run)
    assert open_checkpoint(run).adapter is None


@pytest.mark.parametrize(
    "change",
    [
        {"action_chunk": 1e300},
        {"num_images": 2.0},
        {"proprio_dim": "8"},
        {"film": "no"},
        {"head": []},
        {"action_dim": 0},
    ],
)
def test_a_record_that_is_none_is_named(change, tmp_path):
    (tmp_path / O.OFT_RECORD).write_text(json.dumps(change))
    with pytest.raises(ValueError, match=f"{tmp_path / O.OFT_RECORD}: "):
        O.read_record(tmp_path)


def test_discrete_folder_without_record(folders, tmp_path, recwarn):
    """It looks like a token model; only the official script leaves a lora_adapter/ beside the weights."""
    case = next(case for case in RAW["cases"] if case["model"] == "discrete")
    folder = with_tokenizer(shutil.copytree(folders["tiny-openvla"], tmp_path / "m"))
    official_components(folder, case)
    official_adapter(folder, film=False)
    assert load_policy(folder).is_oft
    assert not recwarn
    (folder / O.OFT_RECORD).unlink()
    with pytest.warns(UserWarning, match="official OFT script .*no oft_config.json, so it is run as a token model"):
        assert not load_policy(folder).is_oft
    shutil.rmtree(folder / "lora_adapter")
    assert not load_policy(folder).is_oft
    assert not recwarn


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--instruction": ["a", "b"]}, "2 texts, but an OFT policy takes one"),
        ({"--image": [GOLDENS / PRIMARY]}, "--image: 1 given, .* takes 2"),
        ({"--state": [1.0]}, "--state has 1 numbers, .* takes 8"),
        ({"--instruction": ["go " * 1480]}, r"makes \d+ tokens with images and answer, the context has \d+"),
    ],
)
def test_wrong_inputs_are_found_before_the_weights(change, message, folders, tmp_path_factory, capsys, monkeypatch):
    """Also an instruction that only the placeholders of the chunk make too long."""
    model, folder = make(folders, tmp_path_factory, "l1")
    (folder / O.OFT_RECORD).write_text(json.dumps(asdict(model.oft)))
    with_tokenizer(folder)
    monkeypatch.setattr(OpenVLA, "load_weights", lambda *_, **__: pytest.fail("weights were read"))
    options = {
        "--checkpoint": [folder],
        "--image": [GOLDENS / PRIMARY, GOLDENS / WRIST],
        "--instruction": ["go"],
        "--state": [1.0] * 8,
        "--unnorm_key": [INFO["unnorm_key"]],
        **change,
    }
    words = []
    for key, values in options.items():
        words += [key, *map(str, values)]
    with pytest.raises(SystemExit) as end:
        sample.main(configure(sample.Config, words))
    assert end.value.code == 2 and re.search(message, capsys.readouterr().err)


def test_statistics_of_another_robot(folders, tmp_path_factory):
    model, folder = make(folders, tmp_path_factory, "l1")
    (folder / O.OFT_RECORD).write_text(json.dumps(asdict(model.oft)))
    policy = load_policy(with_tokenizer(folder), torch.float32)
    entry = policy.norm_stats[INFO["unnorm_key"]]
    two_arms = {key: [float(key == "q99")] * 14 for key in ("q01", "q99")}
    policy.norm_stats["aloha"] = {**entry, "action": two_arms}
    with pytest.raises(ValueError, match="14 numbers of an action and 8 of the state, the policy has 7 and 8"):
        predict_chunk(policy, [[PRIMARY, WRIST]], ["go"], np.ones((1, 8)), "aloha")


def test_tokens_of_an_answer(policies, tokenizer, pixels):
    """OFTConfig.num_new_tokens is what Llama gets besides images and prompt."""
    prompt = tokenizer.encode_prompt(INFO["instruction"])
    seen = []
    for kind, views in (("l1", (PRIMARY, WRIST)), ("diffusion", (PRIMARY, WRIST)), ("discrete", (PRIMARY,))):
        model = policies[kind]
        hook = model.vla.language_model.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
        model.predict([prompt], pixels(*views), STATE if model.oft.proprio_dim else None)
        hook.remove()
        images = model.oft.num_images * model.vla.cfg.num_patches
        assert set(seen) == {images + len(prompt) + model.oft.num_new_tokens}
        seen.clear()


def test_ddim():
    alphas = O.alphas_cumprod(50)
    np.testing.assert_allclose(alphas, TENSORS["ddim/alphas_cumprod"], atol=1e-6)
    noisy = O.add_noise(TENSORS["ddim/x0"], TENSORS["ddim/noise"], TENSORS["ddim/t"], alphas)
    np.testing.assert_allclose(noisy, TENSORS["ddim/add_noise"], atol=1e-6)
    for steps in (10, 50):
        x, trajectory = TENSORS["diffusion/start_noise"], []
        for t in TENSORS[f"ddim/sample{steps}_timesteps"].tolist():
            noise = x @ TENSORS["ddim/linear_W"].T + TENSORS["ddim/linear_b"]
            trajectory.append(x := O.denoise(x, noise, t, 50 // steps, alphas))
        np.testing.assert_allclose(torch.stack(trajectory), TENSORS[f"ddim/sample{steps}_trajectory"], atol=1e-5)
    embedding = O.time_embedding(TENSORS["diffusion/time_embedding_t"], 16)
    np.testing.assert_allclose(embedding, TENSORS["diffusion/time_embedding"], atol=1e-5)


def training_batch(tokenizer, pixels):
    """Ids and labels of the golden batch, pixel values, state and actions."""
    train = INFO["train"]
    pictures = torch.cat([pixels(*names) for names in train["images"]])
    ids, labels = TENSORS["train/input_ids"], TENSORS["train/labels"]
    for row, text, action in zip(ids, train["instructions"], TENSORS["train/actions"], strict=True):
        mine, _ = tokenizer.encode_example(text, action.numpy())  # the chunk's 56 ids and </s>, as data.py writes them
        assert row[: len(mine)].tolist() == mine.tolist()
    return ids, labels, pictures, TENSORS["train/proprio"], TENSORS["train/actions"]


def test_training_step(policies, tokenizer, pixels):
    model = policies["l1"]
    loss, predicted = model(*training_batch(tokenizer, pixels))
    assert abs(loss.item() - INFO["train"]["l1_loss"]) < 1e-5
    np.testing.assert_allclose(predicted, TENSORS["train/predicted_actions"], atol=1e-4)
    model.zero_grad()
    loss.backward()
    names = {name.removeprefix("vla."): p for name, p in model.named_parameters()}
    for name, norm in INFO["train"]["grad_norms"].items():
        assert names[name].grad.norm().item() == pytest.approx(norm, rel=1e-3), name
    for name in ("action_head.model.fc2.weight", "proprio_projector.fc1.weight"):
        np.testing.assert_allclose(names[name].grad, TENSORS[f"train/grad/{name}"], atol=1e-5)
    model.zero_grad()


def test_film_training_row_without_padding(policies, tokenizer, pixels):
    """The shorter row differs: the official mean counts its padding, so that a batch is not its rows."""
    _, predicted = policies["film"](*training_batch(tokenizer, pixels))
    difference = (predicted - TENSORS["film/train_predicted_actions"]).abs().amax((1, 2))
    assert difference[1] < 1e-4 < difference[0]


@pytest.mark.parametrize("kind", ["l1", "film", "diffusion", "discrete"])
def test_batch_is_its_rows_and_nothing_is_changed(kind, policies, tokenizer, pixels):
    model = policies[kind]
    prompts = [tokenizer.encode_prompt(text) for text in ("open the drawer", INFO["instruction"])]
    names = [(PRIMARY, WRIST), (WRIST, PRIMARY)] if kind != "discrete" else [(PRIMARY,), (WRIST,)]
    pictures = torch.cat([pixels(*pair) for pair in names])
    state = torch.cat([STATE, -STATE]) if kind != "discrete" else None
    noise = torch.randn(2, 8, 7, generator=torch.Generator().manual_seed(0)) if kind == "diffusion" else None
    given = [x for x in (pictures, state, noise) if x is not None]
    before = [x.clone() for x in given]
    both = model.predict(prompts, pictures, state, noise)
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))
    for i in range(2):
        row = [None if x is None else x[i : i + 1] for x in (pictures, state, noise)]
        np.testing.assert_allclose(model.predict(prompts[i : i + 1], *row)[0], both[i], atol=1e-4)


def test_every_placeholder_sees_every_other(policies, tokenizer, pixels):
    """With a causal mask the last placeholder's input could not change the first action."""
    model = policies["l1"]
    ids, lengths = model.insert_placeholders([tokenizer.encode_prompt(INFO["instruction"])])
    with torch.no_grad():
        text, is_placeholder, tokens = model.features(ids, lengths, pixels(PRIMARY, WRIST), STATE)
        last = text.clone()
        last[0, is_placeholder[0].nonzero()[-1]] += 1
        first, second = (model.hidden_states(ids, lengths, x, tokens)[0, 0] for x in (text, last))
    assert (first - second).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["l1", "film", "diffusion", "discrete"])
def test_saved_and_loaded(kind, policies, tokenizer, pixels, folders, tmp_path):
    model = policies[kind]
    O.save_oft(model, tmp_path)
    again = O.load_oft(tmp_path, torch.float32)  # chunk and pictures stand in the record
    assert asdict(again.oft) == asdict(model.oft) and is_oft(tmp_path)
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_what_a_folder_must_say(folders, tmp_path, policies):
    shutil.copytree(folders["tiny-openvla"], tmp_path / "a")
    for file in (GOLDENS / "tiny-oft/l1").glob("*"):
        shutil.copy(file, tmp_path / "a")
    with pytest.raises(ValueError, match='8 LIBERO, 25 ALOHA.*"proprio_dim": 8'):
        O.load_oft(tmp_path / "a")
    wrong = [
        (dict(chunk=8), "chunk"),
        (dict(scheme="q99"), "scheme one of bounds_q99, bounds"),
        (dict(head="l2"), "head is one of l1"),
        (dict(action_chunk=0), "action_chunk=0"),
    ]
    for change, what in wrong:
        (tmp_path / "a" / "oft_config.json").write_text(json.dumps(asdict(policies["l1"].oft) | change))
        with pytest.raises(ValueError, match=f"oft_config.json: .*{what}"):
            O.load_oft(tmp_path / "a")
    O.save_oft(policies["l1"], tmp_path / "b")
    (tmp_path / "b/proprio_projector--latest_checkpoint.pt").unlink()
    with pytest.raises(ValueError, match="proprio_projector.*missing"):
        O.load_oft(tmp_path / "b")
    for component in ("proprio_projector", "vision_backbone"):  # all that a discrete policy may have
        folder = tmp_path / component
        folder.mkdir()
        assert not is_oft(folder)
        (folder / f"{component}--150000_checkpoint.pt").touch()
        assert is_oft(folder)
    with pytest.raises(ValueError, match="state of 8 numbers, got none"):
        policies["l1"].predict([[1, 29871]], torch.zeros(1, 12, 224, 224))
    with pytest.raises(ValueError, match="1 images, this checkpoint wants 2"):
        policies["l1"].predict([[1, 29871]], torch.zeros(1, 6, 224, 224), STATE)


# -----------------------------------------------------------------------------
# Training


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny token model, and demonstrations long enough for chunks of three."""
    from toy import world as toy
    from train import Config, train

    root = tmp_path_factory.mktemp("world")
    toy.write_rlds(root, dict(train=toy.demonstrations(toy.TRAIN, 6, linger=2)), name="toy_chunks")
    dino = dict(embed_dim=16, depth=2, num_heads=2, img_size=28, mlp_dim=32)
    siglip = dict(dino, cls_token=False, reg_tokens=0, layer_scale=False)
    text = dict(vocab_size=32064, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    random_model = {"vision_configs": [dino, siglip], "text_config": text}
    options = dict(data_root_dir=str(root), data_mix="toy_chunks", image_aug=False, num_workers=0, batch_size=4)
    options |= dict(micro_batch_size=4, activation_checkpointing=False, max_steps=2)
    train(Config(**options, random_model=random_model, run_dir=str(root / "base")))
    return root, options | dict(base_checkpoint=str(root / "base/checkpoint"), lora_rank=2, action_chunk=3)


def build(cfg):
    """What finetune_oft.py builds for a config and its data."""
    import finetune_oft
    import train

    train_data, _ = train.open_data(cfg)
    return finetune_oft.build(cfg, [dataset for dataset, _ in train_data])


@pytest.mark.parametrize(
    ("head", "film", "state"),
    [
        ("l1", False, True),
        ("l1", True, False),
        ("diffusion", False, True),
        ("discrete", False, False),
    ],
)
def test_trained_merged_and_played(head, film, state, world, tmp_path, capsys):
    """finetune_oft.py -> run folder -> the same chunks from the run and from the merged folder -> closed loop."""
    import finetune_oft as F
    import policy as acting
    import train
    from toy import play
    from toy import world as toy

    root, options = world
    cfg = F.Config(
        **options, run_dir=str(tmp_path / "run"), views=("primary",), head=head, film=film, use_proprio=state
    )
    F.check(cfg)
    metrics = train.train(cfg, F.build)
    assert np.isfinite(metrics["loss"])
    policy = acting.load_policy(tmp_path / "run")
    assert policy.model.oft == O.OFTConfig(3, 7, 7 * state, 1, head, film)  # known from the folder alone
    merge(tmp_path / "run", tmp_path / "merged")
    with pytest.raises(ValueError, match="is an OFT policy, whose action head would get lost"):
        train.open_base(train.Config(base_checkpoint=str(tmp_path / "merged")))
    pictures, states = [[np.full((224, 224, 3), v, np.uint8)] for v in (40, 200)], np.ones((2, 7), np.float32)
    chunks = []
    for folder in ("run", "merged"):
        again = acting.load_policy(tmp_path / folder)
        chunks.append(acting.predict_chunk(again, pictures, ["go", "pick up the red cube"], states))
    assert chunks[0].shape == (2, 3, 7)
    np.testing.assert_allclose(*chunks, atol=1e-4)
    picture = tmp_path / "a.png"
    image.Image.fromarray(pictures[0][0]).save(picture)
    words = ["--checkpoint", tmp_path / "run", "--image", picture, "--instruction", "go", "--json"]
    words += ["--state", *[1.0] * 7] if state else []
    sample.main(configure(sample.Config, [str(word) for word in words]))
    said = np.array(json.loads(capsys.readouterr().out.splitlines()[-1])["actions"])
    np.testing.assert_allclose(said, chunks[0][0], atol=1e-4)  # diffusion, too: it starts from the same noise
    if not state:
        with pytest.raises(ValueError, match="use predict_chunk"):
            acting.predict_action(policy, [picture], "go")
        assert play.play(policy, 3, open_loop=3).steps.tolist() == [toy.MAX_STEPS] * 3


@pytest.mark.parametrize("head", ["l1", "diffusion"])
def test_resumed_is_uninterrupted(head, world, tmp_path):
    import finetune_oft as F
    import train
    from lora import read_adapter

    _, options = world
    for run, stops in (("whole", [4]), ("resumed", [2, 4])):
        for max_steps in stops:
            more = dict(run_dir=str(tmp_path / run), views=("primary",), head=head, max_steps=max_steps)
            cfg = F.Config(**(options | more), use_proprio=False)
            train.train(cfg, F.build)

    def trained_weights(run):
        _, adapters = read_adapter(tmp_path / run)
        return {**adapters, **O.read_component(tmp_path / run, "action_head")}

    whole = trained_weights("whole")
    resumed = trained_weights("resumed")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_film_and_heads_are_trained(world, tmp_path):
    """Each new part moves; of the base nothing does."""
    import finetune_oft as F

    _, options = world
    cfg = F.Config(**options, run_dir=str(tmp_path), views=("primary",), film=True, use_proprio=False)
    model = build(cfg).model
    trained = {
        name.split(".")[0 if "vla" not in name else 1] for name, p in model.named_parameters() if p.requires_grad
    }
    assert trained == {"action_head", "vision_backbone", "projector", "language_model"}
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad and "lm_head" not in name]
    assert frozen and not any(part in name for name in frozen for part in ("lora_", "scale.", "shift.", "action_head"))


def test_state_of_libero_has_eight_numbers(monkeypatch):
    import data

    rows = []

    def opened(root, name, row, **options):
        rows.append(row)
        return SimpleNamespace(name=name)

    monkeypatch.setattr(data, "RLDS", opened)
    data.open_mixture("", "libero_4_task_suites_no_noops", oft_state=True)
    assert {row.state for row in rows} == {("EEF_state", "gripper_state")}


def test_aloha_is_normalised_by_minimum_and_maximum(world):
    from data import Mixture, open_mixture
    from formats import oxe

    root, _ = world
    assert oxe.lookup("aloha1_fold_shirt_30_demos").scheme == "bounds"
    assert {row.scheme for name, row in oxe.DATASETS.items() if "aloha" not in name} == {"bounds_q99"}
    ((dataset, _),) = open_mixture(root, "toy_chunks", action_chunk=3)
    frame, stats = dataset[0], dataset.statistics["action"]
    assert dataset.scheme == "bounds_q99"
    for scheme in ("bounds_q99", "bounds"):
        dataset.scheme = scheme
        mixture = Mixture([(dataset, 1.0)], Tokenizer(root / "base/tokenizer.model", PROMPT), action_chunk=3)
        want = normalize(frame["actions"], stats, scheme)
        np.testing.assert_array_equal(mixture.sample(0, 0)["actions"], want)


def test_discrete_loss_is_that_of_the_language_model(world, tmp_path):
    """As officially: over all labels, </s> among them, with the logits before each."""
    import finetune_oft as F

    _, options = world
    cfg = F.Config(**options, run_dir=str(tmp_path), views=("primary",), head="discrete", use_proprio=False)
    trainee = build(cfg)
    trainee.model.to_empty(device="cpu")
    trainee.fill(trainee, cfg)
    model, tokenizer = trainee.model, trainee.tokenizer
    rows = [tokenizer.encode_example(text, np.full((3, 7), 0.5)) for text in ("go", "pick up the red cube")]
    (ids, _), (labels, _) = (pad_sequences([r[i] for r in rows], pad) for i, pad in ((0, PAD), (1, -100)))
    pictures, actions = torch.randn(2, 6, 28, 28), torch.full((2, 3, 7), 0.5)
    loss, predicted = model(ids, labels, pictures, None, actions)
    lengths = (labels >= 0).int().argmax(1)
    logits = model.act(ids, lengths, pictures)
    assert logits.shape[1] == 22 and (labels >= 0).sum(1).tolist() == [22, 22] and predicted.shape == (2, 3, 7)
    want = torch.stack([-logits[b].log_softmax(-1)[i, labels[b, lengths[b] + i]] for b in (0, 1) for i in range(22)])
    torch.testing.assert_close(loss, want.mean())


def test_several_datasets_make_one_model(world, tmp_path):
    import finetune_oft as F
    import train

    root, options = world
    row = oxe.Dataset(name="more_chunks", primary="image", state=("state",))
    shutil.copytree(root / "toy_chunks", root / "more_chunks")
    for path in (root / "more_chunks/1.0.0").iterdir():
        if path.is_file() and path.name.startswith("toy_chunks"):
            path.rename(path.with_name(path.name.replace("toy_chunks", "more_chunks")))
    mix = [("toy_chunks", 1.0), (row, 1.0)]
    cfg = F.Config(**(options | dict(data_mix=mix)), run_dir=str(tmp_path), views=("primary",), use_proprio=False)
    assert build(cfg).model.oft == O.OFTConfig(3, 7, 0, 1)
    datasets = [dataset for dataset, _ in train.open_data(cfg)[0]]
    for dataset in datasets:
        dataset.scheme = dataset.name
    with pytest.raises(ValueError, match="one model cannot learn both: toy_chunks needs"):
        F.build(cfg, datasets)


def test_objects_that_do_not_fit():
    """Single actions are no chunks: padded with nothing they would teach standing still."""
    from data import Samples, check_cameras
    from train import Config, open_split

    frame = {
        "image": np.zeros((8, 8, 3), np.uint8),
        "wrist": np.zeros((8, 8, 3), np.uint8),
        "action": np.ones(7),
        "instruction": "go",
    }
    mine = Samples([frame] * 3)
    with pytest.raises(ValueError, match="chunks of 8 actions, but single frames"):
        open_split(Config(data_mix=[(mine, 1.0)], action_chunk=8), "train")
    two_cameras = Samples([frame] * 3, name="other", cameras=("image", "wrist"))
    assert check_cameras([two_cameras]) == 2
    with pytest.raises(ValueError, match="different numbers of images"):
        check_cameras([mine, two_cameras])
    with pytest.raises(ValueError, match="2 images at a time.*but this model takes 1"):
        check_cameras([two_cameras], num_images=1)


def test_objects_that_give_chunks(world, tmp_path):
    import finetune_oft as F
    import train
    from data import Samples

    rows = [dict(image=np.zeros((8, 8, 3), np.uint8), action=np.full(7, 0.1 * i), instruction="go") for i in range(5)]
    options = world[1] | dict(data_mix=[(Samples([rows, rows]), 1.0)], max_steps=1)
    cfg = F.Config(**options, run_dir=str(tmp_path), views=("primary",), use_proprio=False)
    assert np.isfinite(train.train(cfg, F.build)["loss"])


def test_no_chunk_crosses_the_end(world):
    from data import Mixture, open_mixture
    from tokenizer import make_standin

    root, options = world
    ((dataset, _),) = open_mixture(root, "toy_chunks", action_chunk=3)
    make_standin(root / "tokenizer.model")
    mixture = Mixture([(dataset, 1.0)], Tokenizer(root / "tokenizer.model", PROMPT), action_chunk=3)
    ((single, _),) = open_mixture(root, "toy_chunks")
    assert len(single) - len(dataset) == 2 * len({single.where(i)[0] for i in range(len(single))})
    assert mixture[0]["actions"].shape == (3, 7) and (mixture[0]["labels"] >= 0).sum() == 22


def test_learning_rate_warms_up_and_decays():
    import train

    cfg = train.Config(lr=5e-4, warmup_steps=10, schedule="step", decay_step=100)
    rates = [train.get_lr(step, cfg) for step in (0, 4, 9, 50, 99, 100, 149)]
    np.testing.assert_allclose(rates, [5e-5, 2.5e-4, 5e-4, 5e-4, 5e-4, 5e-5, 5e-5])
