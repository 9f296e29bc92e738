"""
The hub: names, what is downloaded and what is not, broken connections, no network, revisions, adapters, uploads.

hub_server.py stands in for huggingface.co; nothing here leaves the machine.
"""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from common import GOLDENS, ROOT
from hub_server import HubServer

import convert_weights
import hub
import lora
from checkpoint import complete_export, fingerprint, open_checkpoint
from data import open_mixture
from formats.lerobot import LeRobot
from model import OpenVLA
from policy import load_policy, predict_action
from tokenizer import make_standin
from toy import world as toy

huggingface_hub = pytest.importorskip("huggingface_hub", reason="pip install huggingface_hub")

NAME = "openvla/openvla-7b"
CODE = "raise SystemExit('code of a repository was run')"


@pytest.fixture(scope="module")
def source(folders, tmp_path_factory):
    """A checkpoint folder as it lies in a repository, with much that nobody reads."""
    folder = shutil.copytree(folders["tiny-openvla"], tmp_path_factory.mktemp("source") / "m")
    make_standin(folder / "tokenizer.model")
    return folder


@pytest.fixture
def server(source, tmp_path, monkeypatch):
    """The stand-in, with one model. What this process downloads goes to an empty cache."""
    from huggingface_hub import constants

    main = tmp_path / "hub" / "models" / NAME / "main"
    shutil.copytree(source, main)
    for name in ("modeling_prismatic.py", "handler.py", "code/evil.py"):
        (main / name).parent.mkdir(exist_ok=True)
        (main / name).write_text(CODE)
    for name in ("pytorch_model.bin", "consolidated.safetensors", "model.onnx", "original/model.safetensors", ".env"):
        (main / name).parent.mkdir(exist_ok=True)
        (main / name).write_bytes(b"0" * 1000)

    with HubServer(tmp_path / "hub") as running:
        use_endpoint(monkeypatch, running.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.chdir(tmp_path)
        yield running


def use_endpoint(monkeypatch, url: str):
    """What HF_ENDPOINT does when it is set before the package is imported."""
    from huggingface_hub import constants

    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + template)
    monkeypatch.setattr(constants, "ENDPOINT", url)


def without_network(monkeypatch):
    use_endpoint(monkeypatch, "http://127.0.0.1:9")  # where nobody listens


def contents(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -----------------------------------------------------------------------------
# Download


def test_only_what_is_read_is_downloaded(server, source):
    checkpoint = open_checkpoint(NAME)
    found = contents(checkpoint.folder)
    assert found == contents(source)
    assert not any(name.endswith((".py", ".bin", ".onnx", ".env")) for name in found)
    assert all(path.is_symlink() for path in checkpoint.folder.iterdir())  # into the cache's blobs
    asked = {path for _, path in server.requests if "/resolve/" in path}
    assert not any(path.endswith(".py") for path in asked)
    assert fingerprint(NAME) == fingerprint(source)


@pytest.mark.filterwarnings("ignore:not an action")
def test_the_same_actions_as_of_the_folder(server, source):
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    want = predict_action(load_policy(source), [image], "go", "toy")
    found = predict_action(load_policy(NAME), [image], "go", "toy")
    np.testing.assert_array_equal(found, want)


def test_a_broken_connection_goes_on_where_it_ended(server, source, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    file = "model-00003-of-00003.safetensors"
    server.cut = {file}
    folder = hub.find_model(NAME)
    assert contents(folder) == contents(source)
    gets = [path for method, path in server.requests if method == "GET" and path.endswith(file)]
    assert len(gets) == 2
    half = (source / file).stat().st_size // 2
    assert len(server.ranges) == 1 and half - 4096 <= server.ranges[0] <= half


def test_without_a_network_the_cache_serves(server, source, monkeypatch):
    from huggingface_hub import constants

    online = open_checkpoint(NAME).folder
    without_network(monkeypatch)
    assert open_checkpoint(NAME).folder == online
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert open_checkpoint(NAME).folder == online
    with pytest.raises(FileNotFoundError, match="me/other: not in the cache .* cannot be reached; connect and"):
        open_checkpoint("me/other")


def test_revisions(server, source):
    """A branch or a tag, and a commit; each is a folder of its own."""
    repository = server.root / "models" / NAME
    shutil.copytree(repository / "main", repository / "v0.1")
    statistics = {"other": json.loads((source / "dataset_statistics.json").read_text())["toy"]}
    (repository / "v0.1" / "dataset_statistics.json").write_text(json.dumps(statistics))

    old = open_checkpoint(f"{NAME}@v0.1")
    assert list(old.norm_stats) == ["other"]
    assert "toy" in open_checkpoint(NAME).norm_stats
    commit = old.folder.name
    assert open_checkpoint(f"{NAME}@{commit}").folder == old.folder


ERRORS = {
    "gated": "openvla/openvla-7b: gated; accept its terms at http.*openvla/openvla-7b, then `hf auth login`",
    "missing": "me/none: no such folder here, and no such model repository at http.*; check the name",
    "revision": "openvla/openvla-7b@v9: the repository has no revision v9; http.*tree/main lists its branches",
    "disk": r"openvla/openvla-7b: 0\.0 GB to download, the disk of .*cache has 0\.0 GB free; make room, or set HF_HOME",
    "down": "openvla/openvla-7b: http.* answered with status 503; try again later",
    "package": "openvla/openvla-7b: no such folder here, and .* a package is missing: pip install huggingface_hub",
    "no checkpoint": "me/empty: no checkpoint, it has neither config.json nor adapter_config.json; it has evil.py",
}


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_are_one_line_with_the_remedy(server, monkeypatch, kind):
    name = {"missing": "me/none", "revision": f"{NAME}@v9", "no checkpoint": "me/empty"}.get(kind, NAME)
    server.down = kind == "down"
    if kind == "gated":
        server.gated = {NAME}
    if kind == "disk":
        full = shutil.disk_usage("/")._replace(free=10)
        monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: full)
    if kind == "package":
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    if kind == "no checkpoint":
        (server.root / "models" / "me" / "empty" / "main").mkdir(parents=True)
        (server.root / "models" / "me" / "empty" / "main" / "evil.py").write_text(CODE)
    with pytest.raises((OSError, ValueError), match=ERRORS[kind]) as error:
        open_checkpoint(name)
    assert "\n" not in str(error.value)


def test_a_folder_of_that_name_wins(server, source, tmp_path):
    shutil.copytree(source, tmp_path / NAME)
    assert open_checkpoint(NAME).folder == type(source)(NAME)
    assert server.requests == []


def test_a_mistyped_path_is_never_asked_for(server, tmp_path):
    (tmp_path / "models").mkdir()
    for name in ("models/mine", "runs/toy_lora", "a/b/c", "/nowhere/x", "../x", "x"):
        with pytest.raises(FileNotFoundError, match="no such checkpoint folder"):
            open_checkpoint(name)
    assert server.requests == []
    (tmp_path / "openvla").mkdir()  # say, a clone of the official code
    with pytest.raises(
        FileNotFoundError, match="if it is a name on huggingface.co, and no folder: hf:openvla/openvla-7b"
    ):
        open_checkpoint(NAME)
    open_checkpoint(f"hf:{NAME}")


MALICIOUS = ["../config.json", "/etc/config.json", "a/../config.json", "..", "x.py", "config.json/x.py", "a\\b.json"]
MALICIOUS += [
    "lora_adapter/../../x.json",
    ".ssh/config.json",
    "model.safetensors/../../x",
    "tokenizer.model.py",
    "ü.json",
]


def test_no_name_of_a_repository_leads_out_of_the_folder():
    files = dict.fromkeys(["config.json", "model.safetensors", *MALICIOUS], 1)
    chosen = hub.choose_model_files(files, "me/mine", lambda: None)
    assert chosen == ["config.json", "model.safetensors"]
    data = dict.fromkeys(
        [f"{prefix}{name}" for prefix in ("", "toy/") for name in MALICIOUS] + ["toy/1.0.0/info.json"], 1
    )
    repository = hub.Repository("me/data", None, hub.DATASET)
    chosen = hub.choose_data_files(data, ["toy"], repository)
    assert chosen == ["toy/1.0.0/info.json"]


def test_an_index_that_names_files_outside(tmp_path):
    index = tmp_path / "index.json"
    names = {"a": "../x.safetensors", "b": "model-1.safetensors", "c": 3, "d": "x.py", "e": "/x.safetensors"}
    index.write_text(json.dumps({"weight_map": names}))
    assert hub.named_weights(index) == {"model-1.safetensors"}


def test_command_line(server, source, tmp_path):
    """sample.py with a name, as a user calls it; and again without a network."""
    Image = pytest.importorskip("PIL.Image")
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    command = [sys.executable, str(ROOT / "sample.py"), "--checkpoint", NAME, "--unnorm_key", "toy", "--json"]
    command += ["--image", "a.png", "--instruction", "go"]
    env = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    env.pop("HF_HUB_OFFLINE")
    env.pop("HF_HUB_CACHE")
    answers = []
    for more in ({}, {"HF_HUB_OFFLINE": "1"}):
        done = subprocess.run(command, cwd=tmp_path, env={**env, **more}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        answers.append(json.loads(done.stdout)["actions"])
    assert answers[0] == answers[1] and len(answers[0][0]) == 7
    assert "downloading" not in done.stderr


# -----------------------------------------------------------------------------
# Adapters


def make_adapter(run, source, base, has_record=False):
    """Train nothing, write an adapter of `base` with all that a run writes besides."""
    model = lora.add_lora(OpenVLA.from_pretrained(source, torch.float32), rank=2)
    for layer in lora.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.05, generator=torch.Generator().manual_seed(0))
    lora.save_adapter(model, run, base, has_record=has_record)
    for name in ("tokenizer.model", "preprocessor_config.json", "dataset_statistics.json"):
        shutil.copy(source / name, run)
    return run


def test_an_adapter_finds_its_base_elsewhere(server, source, tmp_path, monkeypatch):
    commit = hub.find_model(NAME).name
    run = make_adapter(tmp_path / "run", source, f"{NAME}@{commit}")
    config = json.loads((run / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (NAME, commit)  # as PEFT has them

    elsewhere = tmp_path / "elsewhere"
    shutil.move(run, elsewhere / "run")
    monkeypatch.chdir(elsewhere)
    checkpoint = open_checkpoint("run")
    assert checkpoint.base.name == commit
    load_policy(checkpoint)
    lora.merge("run", "merged")
    assert open_checkpoint("merged").norm_stats == checkpoint.norm_stats


def test_a_base_that_was_in_an_official_cache(server, source, tmp_path):
    commit = hub.find_model(NAME).name
    run = make_adapter(tmp_path / "run", source, f"/cache/models--openvla--openvla-7b/snapshots/{commit}")
    assert open_checkpoint(run).base.name == commit


def test_a_base_that_is_given(server, source, tmp_path):
    run = make_adapter(tmp_path / "run", source, "models/mine")
    with pytest.raises(FileNotFoundError, match="or give --base_checkpoint FOLDER"):
        open_checkpoint(run)
    assert open_checkpoint(run, source).base == source
    assert open_checkpoint(run, NAME).base == hub.find_model(NAME)
    with pytest.raises(ValueError, match="no LoRA run and has no base; leave out --base_checkpoint"):
        open_checkpoint(source, NAME)
    with pytest.raises(FileNotFoundError, match="--base_checkpoint nowhere: no such folder"):
        open_checkpoint(run, "nowhere")


def test_check_does_not_download_a_base(server, source, tmp_path, capsys):
    run = make_adapter(tmp_path / "run", source, NAME)
    assert convert_weights.check(run)
    assert "with its base checkpoint hf:openvla/openvla-7b, which is downloaded then" in capsys.readouterr().out
    assert not (tmp_path / "cache").exists()
    open_checkpoint(run)
    assert convert_weights.check(run)
    assert "loads in this code: yes, with" in capsys.readouterr().out


# -----------------------------------------------------------------------------
# Upload


def test_push_and_pull_are_equal(server, source, tmp_path):
    address = convert_weights.push(source, "me/mine")
    assert address.startswith(f"{server.url}/me/mine/commit/")
    pulled = contents(open_checkpoint("me/mine").folder)
    assert pulled == contents(source)

    card = (server.root / "models" / "me" / "mine" / "main" / "README.md").read_text()
    assert "| `toy` | 7 | 1234 | 56 |" in card
    assert "python sample.py --checkpoint me/mine " in card
    assert "base_model" not in card


def test_weights_of_before_are_removed(server, source):
    """Two sets of weights in a repository would contradict each other."""
    main = server.root / "models" / "me" / "mine" / "main"
    main.mkdir(parents=True)
    for name in ("model.safetensors", "model-00004-of-00004.safetensors", "notes.txt"):
        (main / name).write_bytes(b"old")
    convert_weights.push(source, "me/mine")
    assert set(contents(main)) == {*contents(source), "notes.txt", "README.md"}
    open_checkpoint("me/mine")


def test_push_an_adapter(server, source, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with complete_export(run):
        make_adapter(run, source, source, has_record=True)
    (run / "metrics.jsonl").write_text('{"step": 10, "loss": 0.25}\n')
    with pytest.raises(ValueError, match="its base is .*m, which other machines do not have; give its name on the hub"):
        convert_weights.push(run, "me/adapter")

    convert_weights.push(run, "me/adapter", base_checkpoint=NAME)
    checkpoint = open_checkpoint("me/adapter")
    assert checkpoint.base == hub.find_model(NAME)
    policy = load_policy(checkpoint)
    want = lora.lora_state(load_policy(open_checkpoint(run)).model)
    for name, tensor in lora.lora_state(policy.model).items():
        assert torch.equal(tensor, want[name]), name
    assert json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"] == str(source)

    card = (server.root / "models" / "me" / "adapter" / "main" / "README.md").read_text()
    assert f"base_model: {NAME}" in card and "loss, at the end: 0.25" in card
    assert "PeftModel.from_pretrained" in card


def test_what_is_not_whole_is_not_pushed(server, source, tmp_path):
    broken = shutil.copytree(source, tmp_path / "broken")
    (broken / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00003.safetensors"):
        convert_weights.push(broken, "me/broken")
    with pytest.raises(ValueError, match="expected owner/name"):
        convert_weights.push(source, "mine")
    assert not any(method == "POST" for method, _ in server.requests)


# -----------------------------------------------------------------------------
# Data


def test_rlds_of_the_hub(server, tmp_path):
    local = tmp_path / "data"
    for name in ("toy", "toy_changed"):
        toy.write_rlds(local, {"train": toy.demonstrations(toy.TRAIN, 3)}, name)
    main = server.root / "datasets" / "me" / "data" / "main"
    shutil.copytree(local, main)
    (main / "toy" / "1.0.0" / "toy.py").write_text(CODE)

    ((want, _),) = open_mixture(local, "toy", hold_out=0.0)
    ((found, _),) = open_mixture("hf:me/data", "toy", hold_out=0.0)
    assert len(found) == len(want) and found.statistics == want.statistics
    for i in (0, len(want) - 1):
        np.testing.assert_array_equal(found[i]["actions"], want[i]["actions"])
        assert found[i]["pictures"] == want[i]["pictures"]
    folder = hub.find_data("hf:me/data", ["toy"])
    assert {path.split("/")[0] for path in contents(folder)} == {"toy"}
    assert not list(folder.rglob("*.py"))
    with pytest.raises(ValueError, match="me/data: no dataset bridge_orig in it; its folders are toy, toy_changed"):
        open_mixture("hf:me/data", "bridge")


@pytest.mark.parametrize("kind", ["v30_image", "v30_video"])
def test_lerobot_of_the_hub(server, kind):
    pytest.importorskip("pyarrow", reason="pip install pyarrow av")
    pytest.importorskip("av", reason="pip install pyarrow av")
    local = GOLDENS / "lerobot" / kind
    shutil.copytree(local, server.root / "datasets" / "me" / "robot" / "main")
    want = LeRobot(local, gripper=False)
    found = LeRobot("hf:me/robot", gripper=False)
    assert found.name == "robot" and len(found) == len(want)
    frame, expected = found[3], want[3]
    np.testing.assert_array_equal(frame["actions"], expected["actions"])
    for image, other in zip(frame["pictures"], expected["pictures"], strict=True):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(other))
