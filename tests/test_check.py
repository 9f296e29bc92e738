"""Each planted fault gets its verdict, and a policy without fault passes. The policy here reads the answer off pictures
that spell it, but only if they and the prompt come as they were in its training."""

import copy
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from common import ROOT, make_folder, with_tokenizer
from PIL import Image

from configurator import configure
from data import Samples
from diagnose import check
from formats.write_rlds import write_rlds
from normalize import unnormalize
from policy import load_policy
from tokenizer import BLANK, PROMPT_VICUNA, decode_action, encode_action
from toy import world as toy

A, SIDE, FRAME = 7, 224, 4
WORDS = ["pick up the can", "open the drawer"]
STATS = dict(q01=[-0.05] * 6 + [0.0], q99=[0.05] * 6 + [1.0], mask=[True] * 6 + [False])


def spell(tokens: np.ndarray, word: int) -> np.ndarray:
    """A picture with a white frame, a red corner at the upper left and one grey bar for each token."""
    picture = np.full((SIDE, SIDE, 3), 90, np.uint8)
    picture[60:180, 21:203] = np.repeat((31999 - tokens).astype(np.uint8), 26)[None, :, None]
    picture[:50, :50] = (250, 10, 10)
    picture[-50:, :50] = (10, 250, 10 + 100 * word)
    for edge in (np.s_[:FRAME], np.s_[-FRAME:], np.s_[:, :FRAME], np.s_[:, -FRAME:]):
        picture[edge] = 255
    return picture


def samples(n: int = 40) -> list[dict]:
    rng, out = np.random.default_rng(0), []
    for i in range(n):
        y = np.append(rng.uniform(-1, 1, 6), i % 3 == 0)
        tokens = encode_action(y)
        action = unnormalize(decode_action(tokens), STATS)
        action[6] = y[6]
        out.append(dict(image=spell(tokens, i % 2), action=action, instruction=WORDS[i % 2]))
    return out


class Reader:
    """Stands in for OpenVLA.generate."""

    def __init__(self, model, processor, listens=True):
        self.cfg, self.language_model, self.processor, self.listens = (
            model.cfg,
            model.language_model,
            processor,
            listens,
        )

    def generate(self, input_ids, pixel_values, n, lengths=None):
        lengths = torch.full((len(input_ids),), input_ids.shape[1]) if lengths is None else lengths
        mean, std = (torch.tensor(v[0]).view(3, 1, 1) for v in (self.processor.means, self.processor.stds))
        pictures = ((pixel_values[:, :3] * std + mean) * 255).round().permute(0, 2, 3, 1).numpy()
        return torch.stack([self.answer(*row) for row in zip(input_ids, lengths, pictures, strict=True)]), torch.zeros(
            1
        )

    def answer(self, ids, length, picture) -> torch.Tensor:
        ids = ids[:length].tolist()
        corner, edge = picture[20, 20], picture[FRAME - 2, 112].min() > 200
        word = int(picture[-20, 20, 2] > 60)
        prompt = self.prompts[word][:-1]
        heard = not self.listens or ids[: len(prompt)] == prompt
        if corner[0] < 200 or corner[2] > 60 or not edge or ids[-1] != BLANK or not heard:
            return torch.from_numpy(31872 + (picture[100, ::32, 0].astype(np.int64) * 37 % 127) - 63)
        bars = picture[120, 34 : 34 + 26 * 7 : 26, 0]
        return torch.from_numpy(31999 - bars.astype(np.int64))


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory):
    return load_policy(with_tokenizer(shutil.copytree(folders["tiny-openvla"], tmp_path_factory.mktemp("c") / "m")))


@pytest.fixture
def policy(whole):
    policy = copy.copy(whole)
    policy.model = Reader(whole.model, whole.processor)
    policy.model.prompts = [whole.tokenizer.encode_prompt(w) for w in WORDS]
    return policy


def dataset_of(some: list[dict], policy) -> Samples:
    dataset = Samples(some)
    dataset.statistics["action"] |= STATS
    policy.norm_stats = {"mine": {"action": copy.deepcopy(dataset.statistics["action"])}}
    return dataset


def run(policy, dataset, capsys, tmp_path, command=check.check_policy) -> tuple[int, str]:
    failed = command(policy, dataset, check.Config(out=str(tmp_path)))
    return failed, capsys.readouterr().out


def test_no_fault(policy, capsys, tmp_path):
    failed, text = run(policy, dataset_of(samples(), policy), capsys, tmp_path)
    assert failed == 0 and "FAIL" not in text and "token accuracy 100.0%" in text, text
    assert (tmp_path / "policy.png").is_file()


def enlarge(picture: np.ndarray) -> np.ndarray:
    """The centre crop of this is the picture."""
    side = round(SIDE / 0.9**0.5)
    margin = (side - SIDE) // 2
    large = np.full((side, side, 3), 90, np.uint8)
    large[margin : margin + SIDE, margin : margin + SIDE] = picture
    return np.asarray(Image.fromarray(large).resize((SIDE, SIDE), Image.Resampling.NEAREST))


@pytest.mark.parametrize(
    "change, verdict",
    [
        (lambda p: p[::-1].copy(), "images: .* upside down"),
        (lambda p: p[::-1, ::-1].copy(), "images: .* turned by 180 degrees"),
        (lambda p: p[:, ::-1].copy(), "images: .* mirrored"),
        (lambda p: p[..., ::-1].copy(), "images: .* with red and blue exchanged"),
        (enlarge, "images: .* with the centre crop"),
    ],
)
def test_pictures(policy, capsys, tmp_path, change, verdict):
    dataset = dataset_of([{**s, "image": change(s["image"])} for s in samples()], policy)
    failed, text = run(policy, dataset, capsys, tmp_path)
    assert failed and re.search(f"FAIL {verdict}", text), text


def test_crop_forgotten(policy, capsys, tmp_path):
    """Trained on crops, as its record says, and shown whole pictures."""
    policy.processor = copy.copy(policy.processor)
    policy.processor.trained_on = ("center_crop",)
    dataset = dataset_of([{**s, "image": enlarge(s["image"])} for s in samples()], policy)
    assert check.check_policy(policy, dataset, check.Config(out=str(tmp_path))) == 0
    capsys.readouterr()
    assert check.check_policy(policy, dataset, check.Config(out=str(tmp_path), center_crop=False)) > 0
    text = capsys.readouterr().out
    assert "FAIL centre crop: the robot's side shows the whole" in text and "FAIL paths" in text, text
    assert re.search("FAIL images: .* with the centre crop", text), text


def test_statistics(policy, capsys, tmp_path):
    dataset = dataset_of(samples(), policy)
    policy.norm_stats["mine"]["action"]["q99"] = [0.08] * 6 + [1.0]
    failed, text = run(policy, dataset, capsys, tmp_path)
    assert failed == 1 and "FAIL statistics" in text and "30.0%" in text, text


@pytest.mark.parametrize(
    "change, how", [(lambda g: 1 - g, "wrong way round"), (None, "never closes"), (lambda g: 0 * g, None)]
)
def test_gripper(policy, capsys, tmp_path, monkeypatch, change, how):
    some = samples()
    if change:
        some = [{**s, "action": np.append(s["action"][:6], change(s["action"][6]))} for s in some]
    else:
        right = policy.model.answer
        always = lambda *args: torch.cat([right(*args)[:6], torch.tensor([31744])])  # noqa: E731
        monkeypatch.setattr(policy.model, "answer", always)
    failed, text = run(policy, dataset_of(some, policy), capsys, tmp_path)
    found = re.search("FAIL gripper: .*", text)
    assert (found and how in found[0]) if how else not found, text


def test_template(policy, capsys, tmp_path):
    """The words around the instruction are another model's."""
    dataset = dataset_of(samples(), policy)
    policy.tokenizer = copy.copy(policy.tokenizer)
    policy.tokenizer.prompt = PROMPT_VICUNA
    failed, text = run(policy, dataset, capsys, tmp_path)
    assert failed and "FAIL template" in text, text


def test_prompt(policy, capsys, tmp_path, monkeypatch):
    right = policy.tokenizer.encode_prompt
    monkeypatch.setattr(policy.tokenizer, "encode_example", lambda t, y: (np.array([*right(t), *[0] * (A + 1)]), None))
    monkeypatch.setattr(policy.tokenizer, "encode_prompt", lambda text: right(text)[:-1])
    failed, text = run(policy, dataset_of(samples(), policy), capsys, tmp_path)
    assert failed and "FAIL prompt" in text and "FAIL paths" in text, text


@pytest.mark.parametrize("listens", [True, False])
def test_language(policy, capsys, tmp_path, listens):
    policy.model.listens = listens
    failed, text = run(policy, dataset_of(samples(), policy), capsys, tmp_path, check.check_language)
    assert failed == (not listens) and ("FAIL language" in text) == (not listens), text


def test_command_line(folders, tmp_path, capsys):
    """From RLDS episodes: an untrained policy fails, with pictures; data and attention run."""
    folder = with_tokenizer(make_folder("tiny-openvla", tmp_path / "m"))
    write_rlds(tmp_path / "data", dict(train=toy.demonstrations(toy.TRAIN, 3)))
    (tmp_path / "mine.py").write_text(
        "from formats import oxe\ndata_mix = [(oxe.Dataset(name='toy', primary='image', state=('state',)), 1.0)]\n"
    )
    common = ["--data_root_dir", tmp_path / "data", "--training_config", tmp_path / "mine.py"]

    def call(*argv):
        command = [sys.executable, "-m", "diagnose.check", *map(str, [*argv, "--out", tmp_path / "out"])]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    done = call("policy", "--checkpoint", folder, *common)
    assert done.returncode == 1 and "FAIL statistics" in done.stdout and "what to do" in done.stdout, done.stderr
    assert call("attention", "--checkpoint", folder, *common).returncode == 0
    done = call("data", *common)  # nothing turns in this world, which is worth a word
    assert done.returncode == 1 and "FAIL toy, constant: action dimension 3 never moves" in done.stdout, done.stderr
    (tmp_path / "own.py").write_text(
        "import numpy as np\nfrom data import Samples\nrng = np.random.default_rng(0)\n"
        "rows = [dict(image=np.zeros((9, 9, 3), np.uint8), action=rng.random(7), instruction='go')] * 30\n"
        "data_mix = [(Samples(rows, 'own'), 1.0)]\n"
    )
    done = call("data", "--training_config", tmp_path / "own.py")  # of one's own, as in the README
    assert done.returncode == 1 and "FAIL own, constant: action dimension 0 never moves" in done.stdout, done.stderr
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"policy.png", "attention.png", "toy-frames.png", "toy-actions.png"} <= names
    done = call("fly")
    assert done.returncode == 2 and "usage" in done.stderr
    for argv, reason in (([], "--data_root_dir"), (common, "--checkpoint")):
        with pytest.raises(SystemExit) as end:
            check.main("policy", configure(check.Config, [*map(str, argv), "--out", str(tmp_path / "out")]))
        assert end.value.code == 2 and reason in capsys.readouterr().err


def test_oft_policies_are_refused(folders, tmp_path, capsys):
    folder = with_tokenizer(make_folder("tiny-openvla", tmp_path / "m"))
    (folder / "action_head--1_checkpoint.pt").write_bytes(b"")
    argv = ["--checkpoint", str(folder), "--data_root_dir", "x", "--data_mix", "toy", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as end:
        check.main("policy", configure(check.Config, argv))
    assert end.value.code == 2 and "OFT policy" in capsys.readouterr().err


def test_statistics_of_another_size(policy, tmp_path):
    dataset = dataset_of(samples(), policy)
    policy.norm_stats["mine"]["action"] = {key: [0.0] * 14 for key in ("q01", "q99")}
    with pytest.raises(ValueError, match="have 14 dimensions in the checkpoint and 7 in the data"):
        check.check_policy(policy, dataset, check.Config(out=str(tmp_path)))
