"""LeRobot folders, v2.1 and v3.0: made here with pyarrow and PyAV, read back frame by frame."""

import hashlib
import json
import pickle
import shutil
import sys

import numpy as np
import pytest
from torch.utils.data import DataLoader

pytest.importorskip("pyarrow", reason="needs `pip install pyarrow av`")
av = pytest.importorskip("av", reason="needs `pip install pyarrow av`")
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from common import GOLDENS  # noqa: E402

from data import Mixture  # noqa: E402
from formats import lerobot  # noqa: E402
from formats.dataset import HOLD_OUT  # noqa: E402
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
    info |= dict(total_frames=sum(LENGTHS), splits={"train": "0:4"})
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
    starts = [i for i in range(sum(LENGTHS)) if i + 3 <= ends[i]]  # later ones have fewer than three actions left
    assert len(frames) == len(starts) == sum(LENGTHS) - 4 * 2
    for i, frame in zip(starts, frames, strict=True):
        picture = frame["pictures"][0]
        picture = decode(picture) if isinstance(picture, bytes) else picture
        assert picture.shape == (48, 64, 3) and picture.dtype == np.uint8 and number_of(picture) == i
        assert np.array_equal(frame["actions"], actions[i : i + 3])
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


def test_images_are_read_by_row_group(folders, monkeypatch):
    """A file has row groups of six frames."""
    lerobot.read_images.cache_clear()
    rows = []
    read = lerobot.read_parquet
    monkeypatch.setattr(lerobot, "read_parquet", lambda *a: rows.append(read(*a)) or rows[-1])
    frames = LeRobot(folders["v3.0", "image"])
    rows.clear()
    pictures = {i: decode(frames[i]["pictures"][0]) for i in (18, 17, 0, 25, 18)}
    assert {i: number_of(picture) for i, picture in pictures.items()} == {i: i for i in pictures}
    assert [len(table) for table in rows] == [1, 6, 6, 6, 1]  # file 0 has 19 frames: 6, 6, 6 and 1


# ----------------------------------------------------------------------------- as the official package reads them


GOLDEN_FOLDERS = {
    "v30_video": ("front", "wrist"),
    "v30_image": ("front",),
    "v30_depth_first": ("front",),
    "v21_video": ("front", "wrist"),
}


@pytest.mark.parametrize("name", GOLDEN_FOLDERS)
def test_as_the_official_package(name):
    expected = np.load(GOLDENS / "lerobot" / f"{name}.expected.npz")
    train = LeRobot(GOLDENS / "lerobot" / name, cameras=GOLDEN_FOLDERS[name])
    frames = [(part, i) for part in (train, train.select("val", 1, HOLD_OUT)) for i in range(len(part))]
    assert len(frames) == len(expected["action"]) and len(train.cameras) == len(GOLDEN_FOLDERS[name])
    for row, (part, i) in enumerate(frames):
        frame = part[i]
        assert np.array_equal(frame["actions"], expected["action"][row : row + 1])
        assert np.array_equal(frame["proprio"], expected["observation.state"][row])
        assert frame["instruction"] == part.instruction(i) == str(expected["task"][row])
        assert part.episodes[part.all_actions()[1][i]].index == expected["episode_index"][row]
        for camera, picture in zip(train.cameras, frame["pictures"], strict=True):
            picture = decode(picture) if isinstance(picture, bytes) else picture
            sha256 = hashlib.sha256(np.ascontiguousarray(picture).tobytes()).hexdigest()
            if sha256[:16] != expected[f"sha256:{camera}"][row]:  # another swscale rounds otherwise
                thumb = picture[4::8, 4::8].astype(int)
                assert np.abs(thumb - expected[f"thumb:{camera}"][row]).max() <= 3, (camera, row)
    for kind, key in (("action", "action"), ("proprio", "observation.state")):
        for what in ("mean", "std", "min", "max"):
            np.testing.assert_allclose(train.statistics[kind][what], expected[f"stats:{key}:{what}"], atol=1e-5)


# ----------------------------------------------------------------------------- what a robot is


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_several_cameras_in_any_order(folders, version):
    folder = folders[version, "video"]
    for cameras in (["front", "wrist"], ["wrist", FRONT], ("wrist",), "wrist"):
        frames = LeRobot(folder, cameras=cameras)
        names = [cameras] if isinstance(cameras, str) else cameras
        assert frames.cameras == tuple(FRONT if name in ("front", FRONT) else WRIST for name in names)
        for i in (0, 8, 32):
            wanted = {FRONT: 6 * i, WRIST: 255 - 6 * i}
            brightness = [to_rgb(picture).mean() for picture in frames[i]["pictures"]]
            np.testing.assert_allclose(brightness, [wanted[name] for name in frames.cameras], atol=2)
    for options, message in (
        (dict(cameras=["front", "top"]), f"info.json: no camera 'top', it has {FRONT}, {WRIST}; choose with camera="),
        (dict(cameras=[]), f"cameras= is empty, it has {FRONT}, {WRIST}"),
        (dict(camera="front", cameras=["wrist"]), "camera='front' and cameras=.*: give one of them"),
    ):
        with pytest.raises(ValueError, match=message):
            LeRobot(folder, **options)


def test_a_name_that_two_cameras_have(tmp_path):
    folder = make(tmp_path / "a", kind="image")
    features = json.loads((folder / "meta/info.json").read_text())["features"]
    change(folder, "features", {**features, "observation.side.front": features[FRONT]})
    with pytest.raises(ValueError, match="more than one camera 'front', it has"):
        LeRobot(folder, camera="front")
    assert LeRobot(folder, camera=FRONT).cameras == (FRONT,)


@pytest.mark.parametrize("place", ["info", "video_info"])
def test_a_depth_map_is_no_camera(tmp_path, place):
    folder = make(tmp_path / "a")
    features = json.loads((folder / "meta/info.json").read_text())["features"]
    key = "is_depth_map" if place == "info" else "video.is_depth_map"
    depth = {"observation.depth": {**features[FRONT], place: {key: True}}}
    change(folder, "features", {**depth, **features, FRONT: {**features[FRONT], place: {key: False}}})
    assert LeRobot(folder).cameras == (FRONT,)
    with pytest.raises(ValueError, match=f"'depth' is a depth map.*choose with cameras= from {FRONT}, {WRIST}"):
        LeRobot(folder, cameras=["front", "depth"])
    change(folder, "features", {**depth, "action": features["action"]})
    with pytest.raises(ValueError, match="no camera with colours, it has observation.depth"):
        LeRobot(folder)


def test_keys_by_name(tmp_path):
    """As openpi's converters write them; a state of two parts, one of which is a single number."""
    folder = make(tmp_path / "openpi", kind="image")
    names = {"action": "actions", "observation.state": "state", FRONT: "image"}
    features = json.loads((folder / "meta/info.json").read_text())["features"]
    features = {names[key]: value for key, value in features.items()} | {"hand": dict(dtype="float32", shape=[1])}
    change(folder, "features", features)
    hands = []
    for path in sorted(folder.glob("data/*/*.parquet")):
        table = pq.read_table(path)
        hand = np.arange(len(table), dtype=np.float64)
        hands.append(hand)
        table = table.rename_columns([names.get(name, name) for name in table.column_names])
        write_table(path, table.append_column("hand", pa.array(hand)))
    with pytest.raises(ValueError, match="no action 'action', it has actions, state, hand; choose with action="):
        LeRobot(folder)
    frames = LeRobot(folder, action="actions", state=["hand", "state"])
    states = np.column_stack([np.concatenate(hands), np.concatenate([numbers(e)[1] for e in range(4)])])
    assert frames.cameras == ("image",)
    assert np.array_equal(frames.table["action"], np.concatenate([numbers(e)[0] for e in range(4)]))
    assert np.array_equal(frames.table["state"], states.astype(np.float32))
    joined = LeRobot(folder, action=("actions", "hand"), gripper=False, absolute=True)
    assert joined.table["action"].shape == (33, 4) and joined.table["state"].shape == (33, 0)
    assert joined.absolute_mask == (True,) * 4 and joined.action_names == ("0", "1", "2", "3")
    assert frames.action_names == ("0", "1", "gripper") and "proprio" in frames.statistics
    assert "proprio" not in joined.statistics
    with pytest.raises(ValueError, match="no state 'joints', it has actions, state, hand; choose with state="):
        LeRobot(folder, action="actions", state="joints")


def test_chosen_episodes_and_validation(folders, tmp_path):
    folder = folders["v3.0", "video"]
    chosen = LeRobot(folder, episodes=[3, 1], hold_out=0)
    assert [episode.index for episode in chosen.episodes] == [1, 3] and len(chosen.select("val", 1, 0)) == 0
    assert [shown(chosen[i]) for i in range(len(chosen))] == [*range(7, 19), *range(24, 33)]
    assert chosen.statistics["num_transitions"] == 21
    np.testing.assert_allclose(
        chosen.statistics["action"]["max"], np.concatenate([numbers(1)[0], numbers(3)[0]]).max(0)
    )

    train = LeRobot(folder, hold_out=0.5)
    val = train.select("val", 1, 0.5)
    assert [shown(frame) for frame in train] == list(range(19)) and [shown(frame) for frame in val] == [*range(19, 33)]
    again = LeRobot(folder, split="val", hold_out=0.5)
    assert np.array_equal(val.frames, again.frames) and val.statistics == again.statistics == train.statistics
    assert [shown(frame) for frame in train] == list(range(19))  # it was not changed
    chunks = LeRobot(folder, action_chunk=9).select("train", 5, 0)  # training's options take the place of those here
    assert chunks.action_chunk == 5 and [len(frame["actions"]) for frame in chunks] == [5] * (33 - 4 * 4)

    named = make(tmp_path / "named", kind="image")  # test episodes are neither
    change(named, "splits", {"train": "1:3", "val": "0:1", "test": "3:4"})
    assert len(LeRobot(named, hold_out=0.5)) == 12 + 5  # nothing more is held out
    assert len(LeRobot(named)) == 12 + 5 and len(LeRobot(named, split="val", action_chunk=3)) == 5
    for options, message in (
        (dict(episodes=[1, 4]), "meta/episodes: no episode 4, which episodes= names; 4 are listed, 0 to 3"),
        (dict(episodes=[]), "episodes= is empty; 4 are listed, 0 to 3"),
        (dict(episodes=3), r"episodes=3: must be several numbers, such as \[3\] or range\(3\)"),
        (dict(hold_out=1.0), "no frame to train on: 4 episodes of up to 12 frames, hold_out 1, chunks of 1 actions"),
        (dict(hold_out=-1), "hold_out=-1: must be a share of the episodes, 0 to 1"),
        (dict(action_chunk=0), "action_chunk=0: must be 1 or more"),
        (dict(action_chunk=13), "of up to 12 frames, hold_out 0.05, chunks of 13 actions; choose a smaller"),
        (dict(split="test"), "split 'test': must be train or val"),
    ):
        with pytest.raises(ValueError, match=message):
            LeRobot(folder, **options)


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
    sent = pickle.loads(pickle.dumps(flipped))  # as to a worker process, although a lambda made it
    np.testing.assert_array_equal(sent[7]["actions"], flipped[7]["actions"])


def test_mixture_and_workers(folders, tmp_path):
    make_standin(tmp_path / "tokenizer.model", words=("cup",))
    frames = LeRobot(folders["v3.0", "video"], action_chunk=4)
    frames[3]  # an open video, which must not go to the workers
    mixture = Mixture([(frames, 1.0)], Tokenizer(tmp_path / "tokenizer.model"), image_size=32, action_chunk=4)
    sample = mixture.sample(0, 3)
    want = normalize(numbers(0)[0][3:7], frames.statistics["action"])
    assert sample["images"].shape == (1, 32, 32, 3) and number_of(sample["images"][0]) == 3
    np.testing.assert_allclose(sample["actions"], want)
    assert sample["proprio"].shape == (2,)
    for context in ("fork", "forkserver"):
        options = dict(batch_size=None, num_workers=2, multiprocessing_context=context)
        assert list(DataLoader(frames, collate_fn=shown, **options)) == frames.frames.tolist(), context


# ----------------------------------------------------------------------------- what can be wrong


def change(folder, key, value):
    path = folder / "meta/info.json"
    write_json(path, json.loads(path.read_text()) | {key: value})


def test_errors_of_a_folder(tmp_path, folders, monkeypatch):
    with pytest.raises(FileNotFoundError, match="not a LeRobot dataset"):
        LeRobot(tmp_path)
    with pytest.raises(ValueError, match=f"no camera 'top', it has {FRONT}, {WRIST}"):
        LeRobot(folders["v2.1", "video"], camera="top")
    folder = make(tmp_path / "a", kind="image")
    features = json.loads((folder / "meta/info.json").read_text())["features"]
    for key, value, message in (
        ("codebase_version", "v1.6", "codebase_version is v1.6, known are v2.0, v2.1, v3.0"),
        (
            "features",
            {k: v for k, v in features.items() if k != "action"},
            "no action 'action', it has obs.*choose with action=",
        ),
        ("features", {"action": features["action"]}, "no camera with colours, it has none"),
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
        (good.drop_columns("task_index"), "episode_000001.parquet: no column task_index; copy it again"),
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


def drop_lines(folder, version, keep):
    """Only the lines of some episodes stay in meta/."""
    if version == "v2.1":
        path = folder / "meta/episodes.jsonl"
        write_json(path, [r for r in map(json.loads, path.read_text().splitlines()) if keep(r)], lines=True)
    for path in sorted(folder.glob("meta/episodes/*/*.parquet")):
        write_table(path, pa.Table.from_pylist([r for r in pq.read_table(path).to_pylist() if keep(r)]))


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_episodes_taken_out_of_the_middle(tmp_path, version):
    folder = make(tmp_path / "a", version)
    drop_lines(folder, version, lambda row: row["episode_index"] != 1)
    left = [*range(7), *range(19, 33)]
    assert [shown(frame) for frame in all_frames(folder)] == left
    change(folder, "total_episodes", 3)  # somebody has corrected a part of info.json, or all of it
    assert [shown(frame) for frame in all_frames(folder)] == left
    change(folder, "total_frames", 21)
    change(folder, "splits", {"train": "0:3"})
    assert [shown(frame) for frame in all_frames(folder)] == left


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_info_and_list_of_episodes_disagree(tmp_path, version):
    folder = make(tmp_path / "a", version)
    for key, value, message in (
        ("total_episodes", 5, "meta/episodes.*: 4 episodes are listed, the last is number 3.* total_episodes 5; copy"),
        ("total_episodes", 3, "4 episodes are listed.*total_episodes 3; copy meta/ again, or correct total_episodes"),
        ("total_frames", 34, "the episodes have 33 frames, but meta/info.json says total_frames 34; copy meta/ again"),
        ("splits", {"train": "0:3"}, "info.json: episode 3 is in none of the splits .*correct it, for.*0:4"),
        ("splits", {"train": "0:3", "val": "3:3"}, "episode 3 is in none of the splits"),
        ("splits", {"train": "all"}, 'splits are .*expected {"train": "FIRST:END"}'),
        ("total_episodes", "4", "total_episodes is '4', expected a whole number"),
        ("data_path", None, "info.json: data_path None gives no file for episode 0"),
        ("video_path", "videos/{camera}.mp4", "video_path 'videos/{camera}.mp4' gives no file for episode 0"),
    ):
        before = json.loads((folder / "meta/info.json").read_text())[key]
        change(folder, key, value)
        with pytest.raises(ValueError, match=message):
            LeRobot(folder)
        change(folder, key, before)
    assert len(LeRobot(folder)) == 33
    drop_lines(folder, version, lambda row: row["episode_index"] != 3)
    with pytest.raises(ValueError, match="3 episodes are listed, the last is number 2, .*total_episodes 4; copy"):
        LeRobot(folder)


def test_doubled_and_missing_lists(tmp_path):
    folder = make(tmp_path / "a", "v2.1")
    path = folder / "meta/episodes.jsonl"
    lines = path.read_text()
    path.write_text(lines + lines.splitlines()[2])
    with pytest.raises(ValueError, match="episodes.jsonl: episode 2 is listed twice; remove one"):
        LeRobot(folder)
    path.write_text(lines)
    write_json(folder / "meta/tasks.jsonl", [dict(task_index=0, task=t) for t in TASKS], lines=True)
    with pytest.raises(ValueError, match="tasks.jsonl: task 0 is both 'pick up the cup' and 'open the drawer'"):
        LeRobot(folder)
    write_json(folder / "meta/tasks.jsonl", [dict(task_index=0, task=TASKS[0])], lines=True)
    with pytest.raises(ValueError, match=r"meta: no instruction for task_index \[1\]; copy meta/ again"):
        LeRobot(folder)

    folder = make(tmp_path / "b", "v3.0")
    episodes = folder / "meta/episodes/chunk-000"
    (episodes / "file-000.parquet").rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match="file-000.parquet: missing, but there is file-001.parquet; copy"):
        LeRobot(folder)
    (tmp_path / "away").rename(episodes / "file-000.parquet")
    episodes.rename(episodes.with_name("chunk-001"))
    with pytest.raises(FileNotFoundError, match="chunk-000: missing, but there is chunk-001; copy"):
        LeRobot(folder)


def edit_rows(folder, edit):
    """Change the rows of meta/episodes of v3."""
    for path in sorted(folder.glob("meta/episodes/*/*.parquet")):
        rows = pq.read_table(path).to_pylist()
        for row in rows:
            edit(row)
        write_table(path, pa.Table.from_pylist(rows))


def test_places_in_a_video(tmp_path):
    folder = make(tmp_path / "whole", "v3.0")
    start = f"videos/{FRONT}/from_timestamp"
    end = f"videos/{FRONT}/to_timestamp"
    for i, (edit, message) in enumerate(
        (
            (lambda row: row.pop(f"videos/{FRONT}/file_index"), "episode 0 has .*/file_index None.*not finished"),
            (lambda row: row.pop(start), "episode 0 has .*/from_timestamp None.*batch_encoding_size.*episodes="),
            (
                lambda row: row.update({start: row[start] if row["episode_index"] != 2 else None}),
                "episode 2 has .*None",
            ),
            (lambda row: row.update({start: float("nan")}), "episode 0 has .*/from_timestamp nan"),
            (
                lambda row: row.update({start: 0.0}),
                "episode 0 has 7 frames from 0.0000 s of .*000.mp4, but episode 1 beg",
            ),
            (lambda row: row.update({end: row[start] + 0.8}), "episode 1 ends at 1.8000 s of .*ends at 1.5000 s; copy"),
        )
    ):
        broken = shutil.copytree(folder, tmp_path / str(i))
        edit_rows(broken, edit)
        with pytest.raises(ValueError, match=message):
            LeRobot(broken)
        assert LeRobot(broken, camera="wrist")[8]["pictures"][0].shape == (48, 64, 3)  # nothing is wrong there
    edit_rows(folder, lambda row: row.update({end: row[start] + row["length"] / FPS}))
    assert [shown(frame) for frame in all_frames(folder)] == list(range(33))


def with_times(folder, version, times, frame_index=None):
    """times: (episode, steps (T,)) -> (T,) seconds."""
    for path in sorted(folder.glob("data/*/*.parquet")):
        table = pq.read_table(path)
        episodes = np.array(table["episode_index"])
        steps = np.concatenate([np.arange(LENGTHS[e]) for e in dict.fromkeys(episodes.tolist())])
        seconds = [times(e, t) for e, t in zip(episodes, steps, strict=True)]
        table = table.set_column(table.column_names.index("timestamp"), "timestamp", pa.array(seconds, pa.float32()))
        if frame_index is not None:
            table = table.append_column(
                "frame_index", pa.array([frame_index(e, t) for e, t in zip(episodes, steps, strict=True)])
            )
        write_table(path, table)
    return folder


STARTS = [0, 7, 19, 24]


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_timestamps_that_do_not_fit(tmp_path, version):
    for i, (times, message) in enumerate(
        (
            (
                lambda e, t: 0.0,
                "episode 0: the timestamp of step 6 is 0.0000 s, 6.0 frames from where 10 frames a second",
            ),
            (
                lambda e, t: t / FPS + 0.07 * (e == 2 and t == 3),
                "episode 2: the timestamp of step 3 is 0.3700 s, 0.7 fr",
            ),
            (
                lambda e, t: t / FPS * 1.1,
                "episode 0: the timestamp of step 6 is 0.6600 s, 0.6 frames from .* episodes=",
            ),
            (lambda e, t: (STARTS[e] + t) / FPS, "episode 1: .* 7.0 frames from .*write frame_index / fps"),
        )
    ):
        folder = with_times(make(tmp_path / str(i), version), version, times)
        with pytest.raises(ValueError, match=message):
            LeRobot(folder)
    assert len(LeRobot(folder, episodes=[0])) == 7  # the first episode of the last folder is right


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_timestamps_that_fit_well_enough(tmp_path, version):
    folder = with_times(make(tmp_path / "a", version), version, lambda e, t: t * 1.03 / FPS - 0.01 * (t % 2))
    assert [shown(frame) for frame in all_frames(folder)] == list(range(33))
    folder = with_times(make(tmp_path / "b", version, kind="image"), version, lambda e, t: 0.0)
    assert len(all_frames(folder)) == 33  # images in parquet are found without times


def test_cut_off_first_frames_keep_their_numbers(tmp_path):
    """Somebody has removed the first two frames of the numbers, but not of the video."""
    folder = with_times(make(tmp_path / "a"), "v2.1", lambda e, t: t / FPS, lambda e, t: t)
    for path in sorted(folder.glob("data/*/*.parquet")):
        write_table(path, pq.read_table(path).slice(2))
    write_json(
        folder / "meta/episodes.jsonl", [dict(episode_index=e, length=T - 2) for e, T in enumerate(LENGTHS)], True
    )
    change(folder, "total_frames", 33 - 8)
    assert [shown(frame) for frame in all_frames(folder)] == [
        STARTS[e] + t for e in range(4) for t in range(2, LENGTHS[e])
    ]


def test_a_file_is_read_once_whatever_the_order(folders, tmp_path, monkeypatch):
    """Episodes that lie in turn in one file and in the other, and rows of two episodes in turn."""
    folder = shutil.copytree(folders["v3.0", "image"], tmp_path / "a")
    edit_rows(folder, lambda row: row.update({"data/file_index": row["episode_index"] % 2}))
    for f in range(2):
        table = columns([f, f + 2], "image")
        order = np.argsort(np.arange(len(table)) % 7, kind="stable")
        write_table(folder / f"data/chunk-000/file-00{f}.parquet", table.take(order))
    read = []
    monkeypatch.setattr(lerobot, "read_columns", lambda *a, f=lerobot.read_columns: read.append(a[0].name) or f(*a))
    frames = LeRobot(folder, hold_out=0)
    assert read == ["file-000.parquet", "file-001.parquet"]
    for e in range(4):
        actions = frames.table["action"][frames.episode_of == e]
        assert sorted(map(tuple, actions)) == sorted(map(tuple, numbers(e)[0]))
    for i in (0, 7, 20, 32):  # each frame has its own image, wherever it lies
        step = int(round(frames.table["timestamp"][i] * FPS))
        assert number_of(decode(frames[i]["pictures"][0])) == STARTS[frames.episode_of[i]] + step


def test_columns_of_numbers():
    lists = [[1.0, 2.0], [3.0, 4.0]]
    for type_ in (pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.float32(), 2)):
        column = pa.chunked_array([pa.array(lists, type_), pa.array(lists[:1], type_)])
        assert np.array_equal(lerobot.as_array(column, np.float32), [*lists, lists[0]])
    assert np.array_equal(lerobot.as_array(pa.chunked_array([[2.0, 3.0]]), np.int64), [2, 3])
    assert lerobot.as_array(pa.chunked_array([], pa.list_(pa.float32())), np.float32).shape == (0, 0)
    for values, dtype, message in (
        ([[1.0, 2.0], [3.0]], np.float32, "rows of 1 to 2 numbers"),
        ([[1.0], None], np.float32, "1 rows are empty"),
        ([[1.0], [None]], np.float32, "1 numbers are missing"),
        ([1, None], np.int64, "1 numbers are missing"),
        ([1.5], np.int64, "expected whole numbers"),
        (["cup"], np.float32, "could not convert"),
        ([[[1.0]]], np.float32, "array"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            lerobot.as_array(pa.chunked_array([values]), dtype)
