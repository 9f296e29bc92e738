"""What a person sees of a dataset before training: the numbers are numpy's, faults are named, pictures are drawn."""

import io
import re
import subprocess
import sys

import numpy as np
import pytest
from common import ROOT, shared
from PIL import Image

from data import Samples
from diagnose import look as look_file
from diagnose.look import look
from formats.faults import spread, still_steps

N = 200
GRIPPER = (
    "the gripper is -1 ... 1, but should be 0 (closed) ... 1 (open): scale it with standardize=, or say gripper=False "
    "if the last dimension is none"
)


def make_samples(n=N, **changes) -> list[dict]:
    """Red pictures 40 x 30, actions (7,) that move all the time, a gripper that opens and closes, three texts."""
    rng = np.random.default_rng(0)
    actions = rng.normal(size=(n, 7)).astype(np.float32)
    actions[:, 6] = 1 - np.arange(n) // 10 % 2
    for column, values in changes.get("columns", {}).items():
        actions[:, column] = values
    actions[: changes.get("idle", 0), :6] = 0
    texts = changes.get("texts", ["pick up the cup", "open the drawer", "push"])
    red = np.full((30, 40, 3), (200, 0, 0), np.uint8)
    return [dict(image=red, action=a, instruction=texts[i % len(texts)]) for i, a in enumerate(actions)]


class Episodes(Samples):
    """Samples in episodes of the given lengths, which are known as those of RLDS and LeRobot are."""

    def __init__(self, lengths, samples):
        super().__init__(samples, "episodes")
        self.numbers = np.repeat(np.arange(len(lengths)), lengths)
        self.statistics["num_trajectories"], self.bad_records = len(lengths), ["file 3: cut off"]

    def all_actions(self) -> tuple[np.ndarray, np.ndarray]:
        return np.stack([s["action"] for s in self.samples]), self.numbers


def report(dataset, tmp_path, capsys) -> str:
    look(dataset, 1.5, tmp_path)
    for kind in ("frames", "actions"):
        with Image.open(tmp_path / f"{dataset.name}-{kind}.png") as picture:
            picture.load()
            assert min(picture.size) > 100
    return capsys.readouterr().out


@pytest.fixture
def no_histograms(monkeypatch):
    """They take most of the time; a few tests draw them."""
    monkeypatch.setattr(look_file, "draw_actions", lambda path, *rest: Image.new("L", (101, 101)).save(path))


def verdicts(text: str) -> list[str]:
    return re.findall(r"^  warning +(.*)", text, re.MULTILINE)


# ----------------------------------------------------------------------------- numbers


def test_a_good_dataset_has_no_warning(tmp_path, capsys):
    text = report(Samples(make_samples()), tmp_path, capsys)
    assert verdicts(text) == [] and "  no warning\n" in text
    assert "mine, weight 1.5" in text and "episodes      not known" in text and "frames        200 of 200" in text
    assert "image: 40 x 30" in text and "3 different among 200 frames; 0.0% of them have none" in text
    assert re.search(r"33\.5%  pick up the cup\n +33\.5%  open the drawer\n +33\.0%  push\n", text)


def test_numbers_are_numpys(tmp_path, capsys):
    samples = make_samples(idle=30, columns={3: np.repeat([0.0, 1.0], N // 2), 6: np.linspace(0, 1, N) ** 2})
    text = report(Samples(samples), tmp_path, capsys)
    x = np.stack([s["action"] for s in samples]).astype(np.float64)
    still = np.abs(x[:, :6]) <= 1e-4 * np.ptp(x[:, :6], axis=0)
    columns = (x.min(0), np.quantile(x, 0.01, axis=0), x.mean(0), np.quantile(x, 0.99, axis=0), x.max(0))
    rows = re.findall(r"^    (\d|gripper) +(.*) (\S+)$", text, re.MULTILINE)
    assert [name for name, _, _ in rows] == [*"012345", "gripper"]
    for i, (_, numbers, _) in enumerate(rows):
        np.testing.assert_allclose([float(v) for v in numbers.split()], [c[i] for c in columns], rtol=1e-3, atol=1e-12)
    # frames of unknown episodes do not say whether the gripper has moved
    assert [share for _, _, share in rows] == [f"{share:.1%}" for share in still.mean(axis=0)] + ["-"]
    assert f"idle          {still.all(axis=1).mean():.1%} of the steps" in text
    bars = re.findall(r"gripper from +([\d.]+) +([\d.]+)%( #+)?", text)
    want = np.histogram(x[:, 6], 10, (0, 1))[0] / N
    np.testing.assert_allclose([float(b[1]) for b in bars], 100 * want, atol=0.06)
    assert [len(b[2].strip()) for b in bars] == [round(40 * w) for w in want]


def test_still_steps():
    relative, absolute = [[0.0], [5e-5], [2e-4], [1.0], [0.0]], [[0.0], [0.0], [1.0], [1.0], [1.0]]
    actions, episodes = np.hstack([relative, absolute]), np.array([0, 0, 0, 1, 1])
    still = still_steps(actions, episodes, (False, True))
    assert still[:, 0].tolist() == [True, True, False, False, True]
    assert still[:, 1].tolist() == [True, True, False, True, True]  # the first step of each episode is taken so
    targets = still_steps(actions, episodes, (True, True))  # but does not count if there is nothing else to tell
    assert targets.tolist() == [[True, True], [False, False], [False, True]]
    assert not still_steps(actions, None, (True, True)).any()
    constant = np.column_stack([actions, np.full(5, 0.3)])
    assert still_steps(constant, episodes, (False, True, False))[:, 2].all()


def test_spread():
    assert spread(5, 8) == [0, 1, 2, 3, 4] and spread(1, 8) == [0] and spread(101, 3) == [0, 50, 100]


# ----------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    "changes, want",
    [
        (dict(columns={2: 0.3}), "action dimension 2 never moves, it is always 0.3"),
        (dict(columns={2: np.linspace(0, 1e-5, N)}), "action dimension 2 hardly moves (q99 - q01 = 9.8e-06)"),
        (dict(columns={6: np.tile([-1, 1], N // 2)}), GRIPPER),
        (dict(columns={6: 1}), "the gripper never moves, it is always 1"),
        (dict(idle=120), "60% of the steps are idle (nothing moves)"),
        (dict(texts=["push", "", "pull", "  "]), "50.0% of the frames have no instruction"),
    ],
)
def test_faults_are_named(tmp_path, capsys, no_histograms, changes, want):
    text = report(Samples(make_samples(**changes)), tmp_path, capsys)
    assert verdicts(text) == [want]
    assert f"{len({t for t in changes.get('texts', 'abc') if t.strip()})} different among" in text


def test_episodes_and_bad_records(tmp_path, capsys, no_histograms):
    text = report(Episodes([4, 96, 97, 3], make_samples()), tmp_path, capsys)
    assert "episodes      4, 3 to 97 frames long, mean 50.0" in text
    bad = "1 bad records are left out: file 3: cut off"
    assert verdicts(text) == ["2 of 4 episodes are shorter than 5 frames", bad]


def test_a_high_control_rate_and_a_turned_gripper(tmp_path, capsys, no_histograms):
    samples, bad = make_samples(), "1 bad records are left out: file 3: cut off"
    assert verdicts(report(Episodes([50] * 4, samples), tmp_path, capsys)) == [bad]
    for i, sample in enumerate(samples):
        sample["action"] = np.append(np.sin(np.arange(6) + i / 60), i % 50 > 30).astype(np.float32)
    places = Episodes([50] * 4, samples)
    places.absolute_mask = (True,) * 7  # positions are like those before
    assert not any("repeating" in line for line in verdicts(report(places, tmp_path, capsys)))
    assert verdicts(report(Episodes([50] * 4, samples), tmp_path, capsys)) == [
        "the gripper is open (1) in 0% of the episodes at their start",
        "repeating the last action is 2% as far off as the mean action",
        bad,
    ]


def test_a_broken_picture_is_named_and_grey(tmp_path, capsys, no_histograms):
    samples = make_samples(n=12)
    samples[5]["image"] = b"\xff\xd8 no picture"
    lines = verdicts(report(Samples(samples), tmp_path, capsys))
    assert len(lines) == 1 and lines[0].startswith("frame 5, image: a JPEG of 13 bytes that will not decode")
    colors = {color for _, color in Image.open(tmp_path / "mine-frames.png").getcolors(1 << 20)}
    assert {(200, 0, 0), (160, 160, 160)} <= colors


# ----------------------------------------------------------------------------- pictures


def test_sheet_shows_first_middle_and_last_and_decodes_no_more(tmp_path, capsys, monkeypatch, no_histograms):
    samples, shown = make_samples(), []
    for i, sample in enumerate(samples):
        sample["image"] = np.full((30, 40, 3), (i, 0, 250), np.uint8)
    monkeypatch.setattr(look_file, "to_rgb", lambda picture: shown.append(int(picture[0, 0, 0])) or picture)
    report(Episodes([100, 1, 50, 49], samples), tmp_path, capsys)
    assert shown == [0, 50, 99, 100, 101, 126, 150, 151, 175, 199]
    colors = {c for _, c in Image.open(tmp_path / "episodes-frames.png").convert("RGB").getcolors(1 << 20)}
    assert {(i, 0, 250) for i in shown} <= colors
    shown.clear()
    report(Samples(samples), tmp_path, capsys)
    assert shown == spread(N, 24) and len(shown) == 24  # without known episodes


def test_instruction_is_written_above(tmp_path, capsys, no_histograms):
    sheets = []
    for texts in ([" "], ["put the very long spoon " * 9]):
        report(Samples(make_samples(texts=texts)), tmp_path, capsys)
        sheets.append(np.asarray(Image.open(tmp_path / "mine-frames.png").convert("RGB")))
    pictures = (sheets[0] == (200, 0, 0)).all(axis=2)  # (H, W)
    assert np.array_equal(pictures, (sheets[1] == (200, 0, 0)).all(axis=2))
    assert (sheets[0] != sheets[1]).any(axis=2).sum() > 500
    above = pictures & ~np.roll(pictures, 1, axis=0)
    for sheet in sheets:  # a white line between the words and the picture, so no letter is cut
        assert (sheet[np.roll(above, -1, axis=0)] == 255).all()


# ----------------------------------------------------------------------------- all kinds of datasets


def test_lerobot(tmp_path, capsys, monkeypatch):
    for package in ("pyarrow", "av"):
        pytest.importorskip(package, reason="needs `pip install pyarrow av`")
    import test_lerobot

    from formats import lerobot

    folder, decoded = test_lerobot.make(tmp_path / "robot", "v3.0"), []
    read = lerobot.read_frame
    monkeypatch.setattr(lerobot, "read_frame", lambda *a: decoded.append(a) or read(*a))
    text = report(lerobot.LeRobot(folder), tmp_path, capsys)
    assert "robot, weight 1.5" in text and "episodes      4, 5 to 12 frames long, mean 8.2" in text
    assert "observation.images.front: 64 x 48" in text and "2 different among 33 frames" in text
    assert len(decoded) == 12 and verdicts(text) == []


def test_command_on_rlds(tmp_path):
    folder = shared("data/bridge_orig").parent
    words = ["-m", "diagnose.look", "--data_root_dir", str(folder), "--data_mix", "bridge", "--out", str(tmp_path)]
    run = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "episodes      25, 8 to 8 frames long" in run.stdout and "primary: 64 x 64" in run.stdout
    assert verdicts(run.stdout) == []
    for kind in ("frames", "actions"):
        Image.open(io.BytesIO((tmp_path / f"bridge_orig-{kind}.png").read_bytes())).load()


def test_an_empty_split(tmp_path, capsys):
    empty = Samples(make_samples(n=2))
    empty.frames = empty.frames[:0]
    look(empty, 1.0, tmp_path / "none")
    assert capsys.readouterr().out == "mine: no frames in this split\n\n" and not (tmp_path / "none").exists()
