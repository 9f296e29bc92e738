"""LeRobot datasets that are written here: read back equal, described as the package's own, refused if wrong."""

import json
import subprocess
import sys

import numpy as np
import pytest
from common import GOLDENS, ROOT

from formats import rlds_to_lerobot
from formats import write_lerobot as W
from formats.lerobot import LeRobot
from formats.write_rlds import write_rlds
from image import decode, encode_jpeg
from toy import world as toy

parquet = pytest.importorskip("pyarrow.parquet", reason="pip install pyarrow av")


def episodes(n: int = 3) -> list[dict]:
    rng = np.random.default_rng(0)
    result = []
    for i in range(n):
        T = 5 + i
        action = rng.uniform(-1, 1, (T, 7)).astype(np.float32)
        action[:, 6] = rng.integers(0, 2, T)
        result.append(
            {
                "action": action,
                "instruction": ["lift it", "öffne die Schublade"][i % 2],
                "front": rng.integers(0, 256, (T + 1, 48, 64, 3), np.uint8),
                "wrist": [encode_jpeg(image) for image in rng.integers(0, 256, (T, 32, 32, 3), np.uint8)],
                "state": rng.normal(size=(T, 8)).astype(np.float32),
            }
        )
    return result


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return W.write_lerobot(tmp_path_factory.mktemp("lerobot") / "mine", episodes(), fps=10)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The same episodes, written as RLDS first."""
    folder = tmp_path_factory.mktemp("converted")
    rlds = write_rlds(folder, {"train": episodes()}, name="mine")
    command = [sys.executable, "-m", "formats.rlds_to_lerobot", "--source", rlds, "--out", folder / "lerobot" / "mine"]
    subprocess.run([*command, "--fps", "10"], cwd=ROOT, check=True)
    return folder / "lerobot" / "mine"


@pytest.mark.parametrize("made_by", ["written", "converted"])
def test_read_back(request, made_by):
    folder = request.getfixturevalue(made_by)
    data = LeRobot(folder, cameras=("front", "wrist"), hold_out=0.0)
    source = episodes()
    assert len(data) == sum(len(episode["action"]) for episode in source)
    number = 0
    for episode in source:
        for t in range(len(episode["action"])):
            frame = data[number]
            np.testing.assert_array_equal(frame["actions"][0], episode["action"][t])
            np.testing.assert_array_equal(frame["proprio"], episode["state"][t])
            assert frame["instruction"] == episode["instruction"]
            front, wrist = frame["pictures"]
            np.testing.assert_array_equal(decode(front), decode(encode_jpeg(episode["front"][t])))
            assert wrist == episode["wrist"][t]
            number += 1
    assert data.fps == 10 and data.name == "mine"


def test_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(W, "EPISODES_PER_FILE", 2)
    folder = W.write_lerobot(tmp_path / "mine", episodes(5), fps=10)
    assert len(list(folder.glob("data/*/*.parquet"))) == 3
    data = LeRobot(folder, cameras="front", hold_out=0.0)
    last = episodes(5)[-1]
    np.testing.assert_array_equal(data[len(data) - 1]["actions"][0], last["action"][-1])


def test_the_files_are_those_of_the_package(written):
    """Names, columns, keys and dtypes as in a dataset that lerobot itself has written."""
    golden = GOLDENS / "lerobot" / "v30_image"
    found = json.loads((written / "meta" / "info.json").read_text())
    want = json.loads((golden / "meta" / "info.json").read_text())
    assert found.keys() == want.keys()
    assert found["features"].keys() - {"observation.images.wrist"} == want["features"].keys()
    for name, feature in want["features"].items():
        assert found["features"][name]["dtype"] == feature["dtype"]
    assert [path.relative_to(golden) for path in sorted(golden.rglob("*.parquet"))] == [
        path.relative_to(written) for path in sorted(written.rglob("*.parquet"))
    ]
    for name in ("data/chunk-000/file-000.parquet", "meta/tasks.parquet", "meta/episodes/chunk-000/file-000.parquet"):
        columns = parquet.read_schema(written / name)
        for field in parquet.read_schema(golden / name):
            assert field.name in columns.names, field.name
            assert columns.field(field.name).type == field.type or "list" in str(field.type), field
        assert (columns.metadata or {}).keys() >= (parquet.read_schema(golden / name).metadata or {}).keys()
    about = json.loads(parquet.read_schema(written / "meta/tasks.parquet").metadata[b"pandas"])
    assert [column["name"] for column in about["columns"]] == ["task_index", "task"]  # else pandas cannot read it
    rows = parquet.read_table(written / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [(row["dataset_from_index"], row["dataset_to_index"]) for row in rows] == [(0, 5), (5, 11), (11, 18)]
    stats = json.loads((written / "meta" / "stats.json").read_text())
    wanted = json.loads((golden / "meta" / "stats.json").read_text())
    for name, entry in wanted.items():
        assert stats[name].keys() == entry.keys()
        assert np.shape(stats[name]["count"]) == np.shape(entry["count"])
        assert np.ndim(stats[name]["mean"]) == np.ndim(entry["mean"])


def test_statistics_are_those_of_the_numbers(written):
    stats = json.loads((written / "meta" / "stats.json").read_text())["action"]
    action = np.concatenate([episode["action"] for episode in episodes()]).astype(np.float64)
    np.testing.assert_allclose(stats["mean"], action.mean(0))
    np.testing.assert_allclose(stats["std"], action.std(0))
    np.testing.assert_allclose(stats["min"], action.min(0))
    assert stats["count"] == [len(action)]


def test_what_does_not_fit_is_refused(tmp_path, written):
    first, second, _ = episodes()
    second["state"] = second["state"][:, :3]
    with pytest.raises(ValueError, match=r"episode 1: state: expected \(8,\) at each step"):
        W.write_lerobot(tmp_path / "a", [first, second], fps=10)
    with pytest.raises(ValueError, match="there are no episodes to write"):
        W.write_lerobot(tmp_path / "a", [], fps=10)
    assert not (tmp_path / "a").exists()
    with pytest.raises(FileExistsError, match="exists; choose another folder"):
        W.write_lerobot(written, [first], fps=10)


def test_toy_world(tmp_path):
    command = [sys.executable, "-m", "toy.world", "--episodes", "3", "--lerobot", str(tmp_path / "toy")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    data = LeRobot(tmp_path / "toy", hold_out=0.0)
    want = np.concatenate([episode["action"] for episode in toy.demonstrations(toy.TRAIN, 3)])
    found, _ = data.all_actions()
    np.testing.assert_array_equal(found, want)


def test_conversion_from_rlds_refuses_what_it_cannot(tmp_path, capsys):
    rlds = write_rlds(tmp_path, {"train": episodes()}, name="mine")

    def message(**options):
        with pytest.raises(SystemExit):
            rlds_to_lerobot.main(
                rlds_to_lerobot.Config(**{"source": str(rlds), "out": str(tmp_path / "out"), **options})
            )
        return capsys.readouterr().err

    assert "--fps 0: give the steps per second" in message()
    assert "no split 'test', it has train" in message(fps=10, split="test")
    assert "give --source" in message(fps=10, out="")
    assert "dataset_info.json" in message(fps=10, source=str(tmp_path))
    shard = next(rlds.glob("*.tfrecord*"))
    shard.write_bytes(shard.read_bytes()[:-100])
    assert "mine-train" in message(fps=10)
    assert not (tmp_path / "out").exists()
