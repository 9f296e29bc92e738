"""LeRobot folders, v2.1 and v3.0: made here with pyarrow and PyAV, read back frame by frame."""

import json
import pickle
import sys

import numpy as np
import pytest
from torch.utils.data import DataLoader

pytest.importorskip("pyarrow", reason="needs `pip install pyarrow av`")
av = pytest.importorskip("av", reason="needs `pip install pyarrow av`")
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

from data import Mixture  # noqa: E402
from formats import lerobot  # noqa: E402
from formats.lerobot import LeRobot  # noqa: E402
from image import decode, to_rgb  # noqa: E402
from normalize import normalize  # noqa: E402
from tokenizer import Tokenizer, make_standin  # noqa: E402

FPS, LENGTHS, TASKS = 10, [7, 12, 5, 9], ["pick up the cup", "open the drawer"]
FRONT, WRIST = "observation.images.front", "observation.images.wrist"


def numbers(episode: int) -> tuple[np.ndarray, np.ndarray]:
    """action (T, 3), gripper last, and state (T, 2) of an episode."""
    rng = np.random.default_rng(episode)
    T = LENGTHS[episode]
    action = np.column_stack([rng.normal(size=(T, 2)), rng.integers(0, 2, T)]).astype(np.float32)
    return action, rng.normal(size=(T, 2)).astype(np.float32)


def number_of(picture) -> int:
    """Which frame a picture shows: brightness 6 n in front, 255 - 6 n at the wrist."""
    return round(float(to_rgb(picture).mean()) / 6)


def shown(sample: dict) -> int:
    return number_of(sample["pictures"][0])


def shade(frame: int) -> np.ndarray:
    return np.full((48, 64, 3), 6 * frame, np.uint8)


def write_video(path, pictures, fps=FPS, codec="libx264", gop=4):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=fps, options={"g": str(gop), "crf": "10", "bf": "2"})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        out.mux(stream.encode())


def columns(episodes, kind="video") -> pa.Table:
    """The rows of a data file; frames are numbered through all episodes, 33 of them."""
    out = {k: [] for k in ("action", "observation.state", "timestamp", "episode_index", "task_index", FRONT)}
    for e in episodes:
        action, state = numbers(e)
        out["action"] += list(action)
        out["observation.state"] += list(state)
        for t in range(LENGTHS[e]):
            out["timestamp"].append(np.float32(t / FPS))
            out["episode_index"].append(e)
            out["task_index"].append(e % 2)
            frame = sum(LENGTHS[:e]) + t
            file = pa.BufferOutputStream()
            if kind == "image":
                from PIL import Image

                Image.fromarray(shade(frame)).save(file, format="png")
            out[FRONT].append({"bytes": file.getvalue().to_pybytes(), "path": f"frame_{t:06d}.png"})
    if kind != "image":
        del out[FRONT]
    floats = pa.list_(pa.float32())
    types = {"action": floats, "observation.state": floats, "timestamp": pa.float32()}
    return pa.table({k: pa.array(v, types.get(k)) for k, v in out.items()})


def write_json(path, value, lines=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(v) + "\n" for v in value) if lines else json.dumps(value))


def write_table(path, table):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=6)


def make(folder, version="v2.1", kind="video"):
    """Four episodes, two tasks, one or two cameras. In v3 two episodes share a data file, three a video file."""
    features = {k: dict(dtype="float32", shape=[n]) for k, n in (("action", 3), ("observation.state", 2))}
    features[FRONT] = dict(dtype=kind, shape=[48, 64, 3])
    cameras = [FRONT, WRIST] if kind == "video" else []
    features |= {WRIST: dict(dtype="video", shape=[48, 64, 3])} if cameras else {}
    info = dict(codebase_version=version, fps=FPS, features=features, chunks_size=3, total_episodes=4)
    shades = [[shade(sum(LENGTHS[:e]) + t) for t in range(T)] for e, T in enumerate(LENGTHS)]
    views = {FRONT: shades, WRIST: [[255 - s for s in episode] for episode in shades]}
    lengths = [dict(episode_index=e, length=T, tasks=[TASKS[e % 2]]) for e, T in enumerate(LENGTHS)]
    if version == "v2.1":
        name = "chunk-{episode_chunk:03d}/"
        info["data_path"] = "data/" + name + "episode_{episode_index:06d}.parquet"
        info["video_path"] = "videos/" + name + "{video_key}/episode_{episode_index:06d}.mp4"
        write_json(folder / "meta/episodes.jsonl", lengths, lines=True)
        write_json(folder / "meta/tasks.jsonl", [dict(task_index=i, task=t) for i, t in enumerate(TASKS)], lines=True)
        for e in range(4):
            names = dict(episode_chunk=e // 3, episode_index=e)
            write_table(folder / info["data_path"].format(**names), columns([e], kind))
            for camera in cameras:
                write_video(folder / info["video_path"].format(video_key=camera, **names), views[camera][e])
    else:
        info["data_path"] = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
        info["video_path"] = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
        for e, row in enumerate(lengths):
            row |= {"data/chunk_index": 0, "data/file_index": e // 2, "stats/action/min": [0.0]}
            for camera in cameras:
                row[f"videos/{camera}/chunk_index"], row[f"videos/{camera}/file_index"] = 0, e // 3
                row[f"videos/{camera}/from_timestamp"] = sum(LENGTHS[3 * (e // 3) : e]) / FPS
        write_table(folder / "meta/episodes/chunk-000/file-000.parquet", pa.Table.from_pylist(lengths[:2]))
        write_table(folder / "meta/episodes/chunk-000/file-001.parquet", pa.Table.from_pylist(lengths[2:]))
        tasks = pa.table({"task_index": [0, 1], "__index_level_0__": TASKS})
        write_table(folder / "meta/tasks.parquet", tasks)
        for f in range(2):
            write_table(folder / f"data/chunk-000/file-00{f}.parquet", columns([2 * f, 2 * f + 1], kind))
            for camera in cameras:
                pictures = sum(views[camera][3 * f : 3 * f + 3], [])
                write_video(folder / f"videos/{camera}/chunk-000/file-00{f}.mp4", pictures)
    write_json(folder / "meta/info.json", info)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(version, kind) -> folder. Tests that change one make their own."""
    root = tmp_path_factory.mktemp("lerobot")
    kinds = [(version, kind) for version in ("v2.1", "v3.0") for kind in ("video", "image")]
    return {key: make(root / "-".join(key), *key) for key in kinds}


def all_frames(folder, **options):
    """Both splits, frame after frame."""
    return [d[i] for d in (LeRobot(folder, split=s, **options) for s in ("train", "val")) for i in range(len(d))]


# ----------------------------------------------------------------------------- frames


@pytest.mark.parametrize("key", [("v2.1", "video"), ("v3.0", "video"), ("v2.1", "image"), ("v3.0", "image")])
def test_every_frame(folders, key):
    frames = all_frames(folders[key], action_chunk=3)
    actions, states = (np.concatenate(x) for x in zip(*(numbers(e) for e in range(4)), strict=True))
    ends = np.repeat(np.cumsum(LENGTHS), LENGTHS)
    assert len(frames) == sum(LENGTHS)
    for i, frame in enumerate(frames):
        picture = frame["pictures"][0]
        picture = decode(picture) if isinstance(picture, bytes) else picture
        assert picture.shape == (48, 64, 3) and picture.dtype == np.uint8 and number_of(picture) == i
        assert np.array_equal(frame["actions"], actions[i : min(i + 3, ends[i])])  # stops where the episode does
        assert frame["actions"].dtype == frame["proprio"].dtype == np.float32
        assert np.array_equal(frame["proprio"], states[i])
        assert frame["instruction"] == TASKS[np.searchsorted(np.cumsum(LENGTHS), i, "right") % 2]


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_any_order_gives_the_same_frames(folders, version):
    frames = LeRobot(folders[version, "video"])
    order = np.random.default_rng(0).integers(0, len(frames), 80).tolist() + [len(frames) - 1, 0, len(frames) - 1]
    assert [number_of(frames[i]["pictures"][0]) for i in order] == order
    first = {i: frames[i]["pictures"][0] for i in reversed(range(len(frames)))}
    assert all(np.array_equal(first[i], frames[i]["pictures"][0]) for i in order)


def test_second_camera_by_name(folders):
    for version in ("v2.1", "v3.0"):
        frames = all_frames(folders[version, "video"], camera=WRIST)
        assert [round((255 - to_rgb(f["pictures"][0]).mean()) / 6) for f in frames] == list(range(sum(LENGTHS)))


def test_av1_and_long_distance_between_key_frames(tmp_path):
    for codec in ("libsvtav1", "libx264"):
        if codec in av.codecs_available:
            write_video(tmp_path / f"{codec}.mp4", [shade(i) for i in range(40)], codec=codec, gop=30)
            for i in (39, 0, 31, 29, 30, 7):
                assert number_of(lerobot.read_frame(tmp_path / f"{codec}.mp4", i / FPS, FPS)) == i


def test_nearest_frame_within_half_a_frame(tmp_path):
    path = tmp_path / "fast.mp4"
    write_video(path, [shade(i) for i in range(40)], fps=40)  # four times as many as the data has
    for seconds, i in ((0.1, 4), (0.1 + 0.01, 4), (0.1 + 0.015, 5), (0.1 - 0.01, 4)):
        assert number_of(lerobot.read_frame(path, seconds, FPS)) == i
    with pytest.raises(ValueError, match=r"fast.mp4: no frame at 1.2000 s, the nearest is at 0.975"):
        lerobot.read_frame(path, 1.2, FPS)


def test_each_process_opens_its_own_videos(folders, monkeypatch):
    frames = LeRobot(folders["v2.1", "video"])
    frames[0]
    frames[1]
    opened = lerobot.open_video.cache_info().misses
    monkeypatch.setattr(lerobot.os, "getpid", lambda: -1)
    assert shown(frames[1]) == 1 and lerobot.open_video.cache_info().misses == opened + 1


def test_pictures_as_files(tmp_path):
    folder = make(tmp_path / "files", kind="image")
    path = folder / "data/chunk-000/episode_000000.parquet"
    table = pq.read_table(path)
    cells = [{"bytes": None, "path": f"images/{t}.png"} for t in range(LENGTHS[0])]
    write_table(path, table.set_column(table.column_names.index(FRONT), FRONT, pa.array(cells)))
    assert LeRobot(folder)[3]["pictures"] == [folder / "images/3.png"]


def test_ends_at_its_end(folders):
    frames = LeRobot(folders["v3.0", "video"])
    assert [shown(f) for f in frames] == list(range(33)) and shown(frames[-1]) == 32  # stops by IndexError


def test_five_percent_are_val(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "LENGTHS", [2] * 20)
    folder = tmp_path / "twenty"
    features = {"action": dict(dtype="float32"), FRONT: dict(dtype="image")}
    info = dict(codebase_version="v2.1", fps=10, features=features, chunks_size=1000)
    write_json(folder / "meta/info.json", {**info, "data_path": "data/{episode_index}.parquet"})
    write_json(folder / "meta/episodes.jsonl", [dict(episode_index=e, length=2) for e in range(20)], lines=True)
    write_json(folder / "meta/tasks.jsonl", [dict(task_index=i, task=str(i)) for i in range(2)], lines=True)
    for e in range(20):
        write_table(folder / f"data/{e}.parquet", columns([e]).drop_columns("observation.state"))
    train, val = LeRobot(folder), LeRobot(folder, split="val")
    assert (len(train), len(val)) == (38, 2) and val.instruction(0) == "1"
    assert train.statistics == val.statistics and val.table["state"].shape == (40, 0)
    assert np.array_equal(val.all_actions()[1], [19, 19])
    with pytest.raises(IndexError):
        train.instruction(38)  # a frame of the other split
    with pytest.raises(IndexError):
        train[38]


# ----------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_statistics(folders, version):
    stats = LeRobot(folders[version, "video"]).statistics
    for kind, x in (("action", [numbers(e)[0] for e in range(4)]), ("proprio", [numbers(e)[1] for e in range(4)])):
        x = np.concatenate(x).astype(np.float64)
        expected = {
            "mean": x.mean(0),
            "std": x.std(0),
            "min": x.min(0),
            "max": x.max(0),
            "q01": np.quantile(x, 0.01, axis=0),
            "q99": np.quantile(x, 0.99, axis=0),
        }
        for key, want in expected.items():
            np.testing.assert_allclose(stats[kind][key], want, atol=1e-12)
    assert stats["action"]["mask"] == [True, True, False]
    assert (stats["num_transitions"], stats["num_trajectories"]) == (33, 4)
    assert json.loads(json.dumps(stats)) == stats  # goes into dataset_statistics.json


def test_standardize_gripper_and_absolute(folders):
    folder = folders["v3.0", "video"]
    flipped = LeRobot(folder, standardize=lambda a: np.column_stack([np.cumsum(a[:, :1], 0), 1 - a[:, 2]]))
    want = np.cumsum(numbers(1)[0][:, 0], dtype=np.float32)  # starts anew with each episode
    np.testing.assert_allclose([flipped[7 + t]["actions"][0, 0] for t in range(12)], want, rtol=1e-6)
    assert flipped.absolute_mask == (False, True) and flipped.statistics["action"]["mask"] == [True, False]
    joints = LeRobot(folder, gripper=False, absolute=True)
    assert joints.absolute_mask == (True,) * 3 and joints.statistics["action"]["mask"] == [True] * 3
    pickle.loads(pickle.dumps(flipped))  # although a lambda made it


def test_mixture_and_workers(folders, tmp_path):
    make_standin(tmp_path / "tokenizer.model", words=("cup",))
    frames = LeRobot(folders["v3.0", "video"], action_chunk=4)
    frames[5]  # an open video, which must not go to the workers
    mixture = Mixture([(frames, 1.0)], Tokenizer(tmp_path / "tokenizer.model"), image_size=32, action_chunk=4)
    sample = mixture.sample(0, 5)
    want = normalize(numbers(0)[0][5:7], frames.statistics["action"])
    assert sample["images"].shape == (1, 32, 32, 3) and number_of(sample["images"][0]) == 5
    np.testing.assert_allclose(sample["actions"], [*want, [0, 0, want[-1, 2]], [0, 0, want[-1, 2]]])
    assert sample["proprio"].shape == (2,)
    for context in ("fork", "forkserver"):
        options = dict(batch_size=None, num_workers=2, multiprocessing_context=context)
        assert list(DataLoader(frames, collate_fn=shown, **options)) == list(range(33)), context


# ----------------------------------------------------------------------------- what can be wrong


def change(folder, key, value):
    path = folder / "meta/info.json"
    write_json(path, json.loads(path.read_text()) | {key: value})


def test_errors_of_a_folder(tmp_path, folders, monkeypatch):
    with pytest.raises(FileNotFoundError, match="not a LeRobot dataset"):
        LeRobot(tmp_path)
    with pytest.raises(ValueError, match=f"no camera top, it has {FRONT}, {WRIST}"):
        LeRobot(folders["v2.1", "video"], camera="top")
    folder = make(tmp_path / "a", kind="image")
    features = json.loads((folder / "meta/info.json").read_text())["features"]
    for key, value, message in (
        ("codebase_version", "v1.6", "codebase_version is v1.6, known are v2.0, v2.1, v3.0"),
        ("features", {k: v for k, v in features.items() if k != "action"}, "no feature 'action', it has obs"),
        ("features", {"action": features["action"]}, "no camera , it has none"),
    ):
        change(folder, key, value)
        with pytest.raises(ValueError, match=message):
            LeRobot(folder)
        change(folder, "codebase_version", "v2.1")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match="pip install pyarrow av"):
        lerobot.import_package("av")


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_missing_files(tmp_path, version):
    folder = make(tmp_path / "b", version)
    for pattern in ("data/*/*.parquet", f"videos/**/*{FRONT}*/**/*.mp4", "meta/tasks.*", "meta/episodes*"):
        path = max(folder.glob(pattern))
        path.rename(tmp_path / "away")
        with pytest.raises(FileNotFoundError, match=path.name):
            LeRobot(folder)
        (tmp_path / "away").rename(path)
    assert len(LeRobot(folder)) == 33


def test_broken_numbers_and_videos(tmp_path):
    folder = make(tmp_path / "c")
    path = folder / "data/chunk-000/episode_000001.parquet"
    good = pq.read_table(path)
    actions = numbers(1)[0]

    def with_actions(actions):
        return good.set_column(good.column_names.index("action"), "action", pa.array(list(actions)))

    nan, wide = actions.copy(), actions.copy()
    nan[4, 1], wide[:, 2] = np.nan, 100 * actions[:, 2]
    for table, message in (
        (with_actions(nan), "episode_000001.parquet: episode 1: action or state is not finite at step 4"),
        (with_actions(wide), "the last action dimension is 0 ... 100, no gripper in .* gripper=False"),
        (good.slice(0, 10), "episode_000001.parquet: episode 1 has 10 actions, not 12"),
        (good.drop_columns("task_index"), "episode_000001.parquet: no column task_index"),
    ):
        write_table(path, table)
        with pytest.raises(ValueError, match=message):
            LeRobot(folder)
    write_table(path, good)
    with pytest.raises(ValueError, match="episode 0 has 6 actions, not 7"):
        LeRobot(folder, standardize=lambda a: a[1:])
    video = folder / f"videos/chunk-000/{FRONT}/episode_000000.mp4"
    video.write_bytes(b"no video" * 100)
    with pytest.raises(ValueError, match="episode_000000.mp4: at 0.0000 s"):
        LeRobot(folder)[0]
    write_video(folder / f"videos/chunk-000/{FRONT}/episode_000001.mp4", [shade(7)] * 5)
    with pytest.raises(ValueError, match="episode_000001.mp4: no frame at 1.1000 s, the nearest is at 0.4"):
        LeRobot(folder)[18]
