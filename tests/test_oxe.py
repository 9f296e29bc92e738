"""oxe.py: every row on a synthetic raw trajectory, the tables against the official ones, the rules by hand."""

import copy
import dataclasses
import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats import oxe

# What each standardise function reads: "path:kind", kinds explained in `column`.
DELTA = "action.world_vector:3 action.rotation_delta:3 observation.natural_language_instruction:s "
RAW = {
    oxe.identity: "",  # action is added per row, its width being the row's action_dim
    oxe.bridge: "action:7 observation.state:7",
    oxe.bridge_oxe: DELTA + "action.open_gripper:b observation.state:7",
    oxe.tdroid: "action:7 observation.cartesian_position:6 observation.gripper_position:1",
    oxe.rt1: DELTA + "action.gripper_closedness_action:1",
    oxe.kuka: DELTA + "action.gripper_closedness_action:1 observation.gripper_closed:z1 "
    "observation.clip_function_input/base_pose_tool_reached:z7",
    oxe.taco_play: "action.rel_actions_world:7 observation.robot_obs:15 observation.natural_language_instruction:s",
    oxe.jaco_play: "action.world_vector:3 action.gripper_closedness_action:1 "
    "observation.end_effector_cartesian_pos:7 observation.natural_language_instruction:s",
    oxe.cable_routing: DELTA,
    oxe.roboturk: DELTA + "action.gripper_closedness_action:1",
    oxe.autolab_ur5: DELTA + "action.gripper_closedness_action:- observation.robot_state:15 "
    "observation.image_with_depth:4x4x1",
    oxe.toto: DELTA + "action.open_gripper:b",
    oxe.language_table: "action:2 observation.instruction:u12",
    oxe.pusht: DELTA + "action.gripper_closedness_action:-",
    oxe.kuka_multimodal: "action:4 observation.depth_image:4x4x1",
    oxe.nyu_rot: "action:7 observation.state:7",
    oxe.hydra: "action:7 observation.state:27",
    oxe.austin_buds: "action:7 observation.state:24",
    oxe.nyu_franka: "action:15 observation.state:13 observation.depth:4x4x1 observation.depth_additional_view:4x4x1",
    oxe.maniskill: "action:7 observation.state:18",
    oxe.furniture_bench: "action:q8 observation.state:35",
    oxe.drop_last_action: "action:8",
    oxe.ucsd_kitchen: "action:8 observation.state:21",
    oxe.ucsd_pick_place: "action:4 observation.state:7",
    oxe.austin: "action:7",
    oxe.bc_z: "action.future/xyz_residual:30 action.future/axis_angle_residual:30 action.future/target_close:i10 "
    "observation.natural_language_instruction:s",
    oxe.tokyo_pr2: "action:8 observation.state:7",
    oxe.xarm_bimanual: "action:14",
    oxe.robo_net: "action:5 observation.state:5",
    oxe.kaist: "action:20 observation.state:21",
    oxe.mask_vit: "action:5 observation.end_effector_pose:5",
    oxe.split_state: "action:7 observation.state:13",
    oxe.sara_grid_clamp: "action:7 observation.state:12",
    oxe.edan: "action:7",
    oxe.asu_table_top: "action:7 observation.state:7 ground_truth_states.EE:6",
    oxe.iamlab: "action:q8 observation.state:20",
    oxe.d3field: "action:3",
    oxe.fanuc: "action:6 observation.state:13",
    oxe.playing_with_food: "action:q8",
    oxe.play_fusion: "action:9",
    oxe.cmu_stretch: "action:8 observation.state:4",
    oxe.gnm: "action:2 observation.state:3 observation.position:2 observation.yaw:1",
    oxe.fmb: "action:7 observation.eef_pose:6 observation.state_gripper_pose:-",
    oxe.dobbe: "action:7 observation.state:7",
    oxe.roboset: "action:8 observation.state:8",
    oxe.rh20t: "action.tcp_base:6 action.gripper:b observation.tcp_base:6 observation.gripper_width:-",
    oxe.droid: "action_dict.cartesian_velocity:6 action_dict.gripper_position:1 "
    "observation.cartesian_position:6 observation.gripper_position:1",
    oxe.libero: "action:7 observation.state:8",
}
NOT_OFFICIAL = {"toy", "toy_changed", "toy_chunks"}  # rows of ours; a new one is entered here
# State columns that are read straight from the record; a new row with a state is entered here
RAW_STATE = {
    "fractal20220817_data": "base_pose_tool_reached:7 gripper_closed:1",
    "berkeley_cable_routing": "robot_state:7",
    "viola": "joint_states:7 gripper_states:1",
    "toto": "state:7",
    "language_table": "effector_translation:2",
    "columbia_cairlab_pusht_real": "robot_state:2",
    "stanford_kuka_multimodal_dataset_converted_externally_to_rlds": "ee_position:3 ee_orientation:4",
    "maniskill_dataset_converted_externally_to_rlds": "tcp_pose:7",
    "austin_sailor_dataset_converted_externally_to_rlds": "state:8",
    "austin_sirius_dataset_converted_externally_to_rlds": "state:8",
    "bc_z": "present/xyz:3 present/axis_angle:3 present/sensed_close:1",
    "utokyo_xarm_pick_and_place_converted_externally_to_rlds": "end_effector_pose:6",
    "utokyo_xarm_bimanual_converted_externally_to_rlds": "pose_r:6",
    "berkeley_mvp_converted_externally_to_rlds": "pose:7 gripper:b",
    "berkeley_rpt_converted_externally_to_rlds": "joint_pos:7 gripper:b",
    "dlr_sara_pour_converted_externally_to_rlds": "state:6",
    "dlr_edan_shared_control_converted_externally_to_rlds": "state:7",
    "imperialcollege_sawyer_wrist_cam": "state:1",
    "cmu_playing_with_food": "state:6",
    "cmu_play_fusion": "state:8",
    **{name: "state:14" for name in oxe.DATASETS if name.startswith("aloha")},
    **{name: "state:7" for name in NOT_OFFICIAL},
}
# Columns of the joined state where they are not 8
PROPRIO_WIDTH = {
    **dict.fromkeys(["droid", "droid_wipe", "fmb_dataset", "dobbe", "rh20t"], 7),
    **{f"libero_{suite}_no_noops": 9 for suite in ("spatial", "object", "goal", "10")},
    **{name: 14 for name in oxe.DATASETS if name.startswith("aloha")},
    **dict.fromkeys(NOT_OFFICIAL, 7),
}
GRIPPER_VALUES = np.float32([-1, -0.5, -0.1, -0.05, 0, 0.03, 0.05, 0.1, 0.37, 0.6, 0.95, 0.96, 1, 1.2])


def column(kind: str, steps: int, rng: np.random.Generator) -> np.ndarray:
    """Random data: "7" float32 (T, 7) with gripper-like values last, "-" (T,), "4x4x1" (T, 4, 4, 1), b bool (T,),
    s bytes (T,), i10 int (T, 10), u12 code points (T, 12), z7 compressed (T,), q8 with a quaternion in 3:7."""
    if kind == "-":
        return rng.choice(GRIPPER_VALUES, steps)
    if kind == "b":
        return rng.random(steps) < 0.5
    if kind == "s":
        return np.array([b"pick up the \xc3\xa9clair", b""], object)[rng.integers(0, 2, steps)]
    if "x" in kind:
        return rng.integers(0, 1000, (steps, *map(int, kind.split("x")))).astype(np.float32)
    n = int(kind.strip("iuzq"))
    if kind[0] == "i":
        return rng.integers(0, 2, (steps, n))
    if kind[0] == "u":
        text = rng.choice([97, 32, 233, 0x4E2D, 0x1F600], (steps, n)).astype(np.int32)
        text[np.arange(n) >= rng.integers(0, n, (steps, 1))] = 0
        return text
    data = rng.normal(size=(steps, n)).astype(np.float32)
    if kind[0] == "z":
        return np.array([zlib.compress(row.tobytes()) for row in data], object)
    if kind[0] == "q":
        data[:, 3:7] /= np.linalg.norm(data[:, 3:7], axis=1, keepdims=True)
    data[:, -1] = rng.choice(GRIPPER_VALUES, steps)
    return data


def raw_trajectory(name: str, steps: int, rng: np.random.Generator) -> dict:
    """A trajectory with the keys the row's standardise function reads, its images and its recorded state columns."""
    row = oxe.DATASETS[name]
    images = {key: column("s", steps, rng) for key in [*row.images.values(), *row.depth.values()] if key}
    trajectory = {"observation": images, "language_instruction": column("s", steps, rng)}
    trajectory["traj_metadata"] = {"episode_metadata": {"file_path": column("s", steps, rng)}}
    trajectory["is_first"] = np.arange(steps) == 0
    spec = RAW[row.standardize].split() + [f"observation.{item}" for item in RAW_STATE.get(name, "").split()]
    if row.standardize is oxe.identity:
        spec.append(f"action:{row.action_dim}")
    for item in spec:
        path, kind = item.rsplit(":", 1)
        *parents, key = path.split(".")
        place = trajectory
        for parent in parents:
            place = place.setdefault(parent, {})
        place[key] = column(kind, steps, rng)
    if row.standardize is oxe.autolab_ur5:
        del trajectory["observation"]["depth"]  # made by the transform
    if name == "viola":
        trajectory["action"]["gripper_closedness_action"] = column("-", steps, rng)
    return trajectory


def assert_equal(a, b):
    """Same nesting, same arrays."""
    if isinstance(a, dict):
        assert isinstance(b, dict) and list(a) == list(b)
        for key in a:
            assert_equal(a[key], b[key])
    else:
        np.testing.assert_array_equal(a, b)


def freeze(tree):
    """Make every array read-only, so that writing into one raises."""
    for value in tree.values():
        freeze(value) if isinstance(value, dict) else value.setflags(write=False)


@pytest.mark.parametrize("name", oxe.DATASETS)
def test_row(name):
    row, steps = oxe.DATASETS[name], 6
    trajectory = raw_trajectory(name, steps, np.random.default_rng(0))
    before = copy.deepcopy(trajectory)
    freeze(trajectory)
    out = oxe.standardize(name, trajectory)
    assert_equal(trajectory, before)

    steps -= 2 if name.startswith("bridge") else 0
    assert out["action"].shape == (steps, row.action_dim) and out["action"].dtype == np.float32
    assert np.isfinite(out["action"]).all()
    assert out["language_instruction"].shape == (steps,)
    assert all(isinstance(text, bytes) for text in out["language_instruction"])
    for key in filter(None, [*row.images.values(), *row.depth.values(), *row.state]):
        assert len(out["observation"][key]) == steps
    for key in filter(None, row.state):
        assert np.isfinite(np.asarray(out["observation"][key], np.float32)).all()
    widths = [1 if key is None else np.atleast_2d(out["observation"][key].T).T.shape[1] for key in row.state]
    assert sum(widths) == PROPRIO_WIDTH.get(name, 8)
    if row.state_encoding == "POS_EULER" and row.state[:1] in (("EEF_state",), ("eef_state",)):
        assert out["observation"][row.state[0]].shape == (steps, 6)
    assert len(row.absolute_action_mask) == len(row.action_normalization_mask) == row.action_dim
    assert set(row.state_oft) <= set(row.state)


def test_shortest_episodes():
    for name in oxe.DATASETS:
        steps = 3 if name.startswith("bridge") else 1
        assert len(oxe.standardize(name, raw_trajectory(name, steps, np.random.default_rng(1)))["action"]) == 1


def test_counts_and_weights():
    assert len(oxe.DATASETS) == 78 + len(NOT_OFFICIAL) and len(oxe.MIXTURES) == 23
    lengths = {"bridge": 1, "bridge_rt_1": 2, "rtx": 10, "rtx_franka": 28, "oxe_magic_soup": 23}
    lengths |= {"oxe_magic_soup_plus": 27, "oxe_magic_soup_plus_minus": 25, "libero_4_task_suites_no_noops": 4}
    assert {name: len(oxe.MIXTURES[name]) for name in lengths} == lengths
    assert all(oxe.MIXTURES[name] == [(name, 1.0)] for name in oxe.MIXTURES if name not in lengths)
    soup, plus = dict(oxe.MIXTURES["oxe_magic_soup"]), dict(oxe.MIXTURES["oxe_magic_soup_plus"])
    minus = dict(oxe.MIXTURES["oxe_magic_soup_plus_minus"])
    assert soup["kuka"] == 0.8341046294 and soup["fractal20220817_data"] == 0.54087122203 and "droid" not in soup
    assert plus["droid"] == 0.06 and plus["language_table"] == 0.1 and plus["bc_z"] == 0.2
    assert minus["fractal20220817_data"] == 1.0 and not {"droid", "language_table"} & set(minus)
    assert sum(minus.values()) == pytest.approx(31.3341046294)
    for entries in oxe.MIXTURES.values():
        assert all(name in oxe.DATASETS for name, _ in entries)


def test_official_tables():
    root = Path(__file__).resolve().parent.parent
    places = [root / "shared/facts", root.parent / "shared/facts"]
    if "OPENVLA_TEST_DATA" in os.environ:
        places = [Path(os.environ["OPENVLA_TEST_DATA"]), Path(os.environ["OPENVLA_TEST_DATA"]) / "facts", *places]
    files = [place / "oxe_tables.json" for place in places if (place / "oxe_tables.json").exists()]
    if not files:
        pytest.skip("no oxe_tables.json in $OPENVLA_TEST_DATA or shared/facts")
    tables = json.loads(files[0].read_text())
    differences = tables["differences_openvla_oft"]
    rows = tables["datasets"] | differences["datasets_added"]
    assert set(oxe.DATASETS) == set(rows) | set(tables["transforms_without_config"]) | NOT_OFFICIAL
    for name, official in rows.items():
        row = oxe.DATASETS[name]
        images = {view: key for view, key in row.images.items() if key}
        assert images == {view: key for view, key in official["image_obs_keys"].items() if key}, name
        assert row.depth == official["depth_obs_keys"], name
        assert row.state == tuple(official["state_obs_keys"]), name
        assert row.state_encoding == official["state_encoding"], name
        assert row.action_encoding == official["action_encoding"], name
        assert row.action_dim == official.get("action_dim_after_transform", row.action_dim), name
        assert (row.keep_frames is not None) == ("aux_kwargs" in official), name
        if official["loadable"]:
            assert list(row.absolute_action_mask) == official["absolute_action_mask"], name
            assert list(row.action_normalization_mask) == official["action_normalization_mask"], name
    for name, change in differences["datasets_changed"].items():
        oft = change["state_obs_keys"]["openvla_oft"]
        assert [key.replace("eef_", "EEF_") for key in oxe.DATASETS[name].state_oft] == oft, name
    for name, row in oxe.DATASETS.items():
        assert name in differences["datasets_changed"] or row.state_oft == row.state or name.startswith("ppgm")
    for name, official in tables["mixtures"].items():
        assert oxe.MIXTURES[name] == [tuple(entry) for entry in official["listed"]], name
        assert oxe.mixture(name) == [tuple(entry) for entry in official["effective"]], name
    for name, entries in differences["mixtures_added"].items():
        assert oxe.MIXTURES[name] == [tuple(entry) for entry in entries], name


def test_mixture():
    effective = oxe.mixture("rtx_franka")
    assert len(effective) == 23 and dict(effective)["berkeley_cable_routing"] == 3.0 and dict(effective)["viola"] == 2.0
    assert "berkeley_rpt_converted_externally_to_rlds" not in dict(effective)
    assert oxe.mixture("toto") == [("toto", 1.0)]
    with pytest.raises(KeyError, match="oxe_magic_soup_plus"):
        oxe.mixture("magic_soup_plus")


def test_errors_say_what_is_there():
    with pytest.raises(KeyError, match="libero_spatial_no_noops"):
        oxe.lookup("libero_spatial")
    with pytest.raises(KeyError, match="nearest"):
        oxe.standardize("fractal", {})
    trajectory = raw_trajectory("toto", 4, np.random.default_rng(0))
    array = {**trajectory, "action": np.zeros((4, 7), np.float32)}
    del trajectory["action"]["world_vector"]
    with pytest.raises(KeyError, match=r"toto.*no key 'world_vector'.*action > rotation_delta \(4, 3\)"):
        oxe.standardize("toto", trajectory)
    with pytest.raises(KeyError, match=r"toto.*another layout.*action \(4, 7\)"):
        oxe.standardize("toto", array)
    with pytest.raises(KeyError, match="another layout|no key"):
        oxe.standardize("libero_10_no_noops", raw_trajectory("toto", 4, np.random.default_rng(0)))
    with pytest.raises(TypeError, match="tuple"):
        oxe.Dataset(state="joints")
    with pytest.raises(ValueError, match="EEF_POS"):
        oxe.Dataset(action_encoding="EEF")
    with pytest.raises(ValueError, match="POS_EULER"):
        oxe.Dataset(state_encoding="EULER")
    with pytest.raises(dataclasses.FrozenInstanceError):
        oxe.DATASETS["toto"].primary = "other"


def test_own_row():
    row = oxe.Dataset(wrist="wrist_image", state=["joints"], state_encoding="JOINT")
    assert row.images == {"primary": "image", "wrist": "wrist_image"} | dict.fromkeys(
        ["secondary", "left_wrist", "right_wrist"]
    )
    assert row.action_dim == 7 and row.state == ("joints",) and not any(row.depth.values()) and row.keep_frames is None
    trajectory = {"observation": {"image": np.zeros(3)}, "action": np.ones((3, 7))}
    out = oxe.standardize(row, trajectory)
    assert_equal(out, trajectory)
    assert out is not trajectory and out["observation"] is not trajectory["observation"]


def test_masks():
    masks = {encoding: oxe.Dataset(action_encoding=encoding) for encoding in oxe.ABSOLUTE_ACTION_MASK}
    assert masks["EEF_POS"].absolute_action_mask == (False,) * 6 + (True,)
    assert masks["EEF_POS"].action_normalization_mask == (True,) * 6 + (False,)
    assert masks["EEF_R6"].absolute_action_mask == (False,) * 9 + (True,)
    assert masks["EEF_R6"].action_normalization_mask == (True,) * 9 + (False,)
    assert masks["JOINT_POS_BIMANUAL"].absolute_action_mask == (True,) * 14
    assert masks["JOINT_POS_BIMANUAL"].action_normalization_mask == (True,) * 14
    assert oxe.DATASETS["libero_10_no_noops"].state_oft == ("EEF_state", "gripper_state")
    assert oxe.DATASETS["taco_play"].state_oft == ("state_eef", None, "state_gripper")


@pytest.mark.parametrize(
    ("gripper", "expected"),
    [
        ([1, 0.5, 0.2, 0, 0.5, 1], [1, 0, 0, 0, 1, 1]),  # between: the value it is on its way to
        ([0.96, 0.95, 0.05, 0.04], [1, 0, 0, 0]),  # the thresholds themselves are undecided
        ([0.95, 0.05, 1], [1, 1, 1]),
        ([1, 0.5, 0.37], [1, 0.37, 0.37]),  # an undecided tail takes its last raw value
        ([0.6], [0.6]),
    ],
)
def test_binarize_gripper(gripper, expected):
    result = oxe.binarize_gripper(np.float32(gripper))
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, np.float32(expected))


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ([0, 0, 1, 0, -1, 0], [1, 1, 0, 0, 1, 1]),  # first command closes, so it was open
        ([0, -1, 0, 1], [0, 1, 1, 0]),  # first command opens, so it was closed
        ([0, 0.1, -0.1], [1, 1, 1]),  # no command: open
        ([1], [0]),
        ([-0.2, 0.2, 0.2], [1, 0, 0]),
    ],
)
def test_rel2abs_gripper(command, expected):
    result = oxe.rel2abs_gripper(np.float32(command))
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, np.float32(expected))


def test_invert_gripper():
    np.testing.assert_array_equal(oxe.invert_gripper(np.float32([0, 0.25, 1])), [1, 0.75, 0])
    np.testing.assert_array_equal(oxe.open_from_closing(np.float32([-1, 0, 0.25, 1, 2])), [1, 1, 0.75, 0, 0])
    commands = np.zeros((3, 7), np.float32)
    commands[:, 6] = [-1, 0.5, 1]
    trajectory = {"observation": {"state": np.zeros((3, 8))}, "action": commands}
    np.testing.assert_array_equal(oxe.libero(trajectory)["action"][:, 6], [1, 0.5, 0])


@settings(max_examples=60, deadline=None, database=None)
@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=20))
def test_gripper_properties(values):
    values = np.float32(values)
    absolute = oxe.rel2abs_gripper(values)
    assert set(absolute.tolist()) <= {0.0, 1.0}
    assert (absolute[values > 0.1] == 0).all() and (absolute[values < -0.1] == 1).all()
    kept = np.abs(values[1:]) <= 0.1  # no command: nothing changes, except that the first command decides the start
    first = np.flatnonzero(np.abs(values) > 0.1)
    assert (absolute[1:][kept] == absolute[:-1][kept]).all()
    if len(first) and first[0] > 0:
        assert absolute[0] == 1 - absolute[first[0]]
    binary = oxe.binarize_gripper(values)
    decided = (values > 0.95) | (values < 0.05)
    assert (binary[decided] == (values[decided] > 0.95)).all()
    assert ((binary[:-1] == binary[1:]) | decided[:-1]).all()
    assert binary[-1] == (values[-1] > 0.95 if decided[-1] else values[-1])


def test_bridge_relabel():
    state = np.arange(5, dtype=np.float32)[:, None] ** 2 * np.float32([1, 2, 3, 0, 0, 1, 7])  # (5, 7)
    action = np.zeros((5, 7), np.float32)
    action[:, 6] = [0, 1, 0.5, 0, 1]
    steps = np.arange(5)
    trajectory = {
        "observation": {"state": state, "image_0": steps},
        "action": action,
        "language_instruction": np.array([b"a", b"b", b"c", b"d", b"e"], object),
        "traj_metadata": {"file": steps},
    }
    out = oxe.standardize("bridge_orig", trajectory)
    # raw steps 1, 2, 3 remain; t^2 moves by 3, 5, 7; the gripper at step 2 is on its way to closed
    expected = np.float32([[3, 6, 9, 0, 0, 3, 1], [5, 10, 15, 0, 0, 5, 0], [7, 14, 21, 0, 0, 7, 0]])
    np.testing.assert_array_equal(out["action"], expected)
    np.testing.assert_array_equal(out["observation"]["image_0"], [1, 2, 3])
    np.testing.assert_array_equal(out["observation"]["EEF_state"], state[1:4, :6])
    np.testing.assert_array_equal(out["observation"]["gripper_state"], state[1:4, 6:])
    assert out["language_instruction"].tolist() == [b"b", b"c", b"d"]
    assert out["traj_metadata"]["file"].tolist() == [0, 1, 2, 3]  # keeps its first step, as officially


def quaternion_matrix(q):
    """Rotation matrix of one x, y, z, w quaternion from the vector formula, independent of oxe.py."""
    v, w = q[:3], q[3]
    cross = np.array([[0, -v[2], v[1]], [v[2], 0, -v[0]], [-v[1], v[0], 0]])
    return np.eye(3) * (w * w - v @ v) + 2 * np.outer(v, v) + 2 * w * cross


def axis_matrix(axis, angle):
    """Rotation about one coordinate axis."""
    q = np.zeros(4)
    q[axis], q[3] = np.sin(angle / 2), np.cos(angle / 2)
    return quaternion_matrix(q)


def compose(roll, pitch, yaw):
    return axis_matrix(2, yaw) @ axis_matrix(1, pitch) @ axis_matrix(0, roll)


@settings(max_examples=60, deadline=None, database=None)
@given(st.lists(st.floats(-1, 1), min_size=4, max_size=4).filter(lambda q: np.linalg.norm(q) > 0.1))
def test_quaternion_recomposes(q):
    q = np.array(q) / np.linalg.norm(q)
    euler = oxe.quaternion_to_euler(q[None])[0]
    assert np.abs(euler[1]) <= np.pi / 2
    np.testing.assert_allclose(compose(*euler), quaternion_matrix(q), atol=3e-3 if abs(euler[1]) > 1.56 else 1e-6)


@pytest.mark.parametrize("pitch", [np.pi / 2, -np.pi / 2])
def test_quaternion_gimbal_lock(pitch):
    # rotation by pitch about y, then by 0.7 about z: only the sum of roll and yaw is defined, yaw is set to 0
    half = [np.sin(pitch / 2), np.cos(pitch / 2)]
    c, s = np.cos(0.35), np.sin(0.35)
    q = np.float32([[-s * half[0], c * half[0], s * half[1], c * half[1]]])
    np.testing.assert_allclose(quaternion_matrix(q[0].astype(float)), compose(0, pitch, 0.7), atol=1e-6)
    roll, got, yaw = oxe.quaternion_to_euler(q)[0]
    assert yaw == 0 and got == np.float32(pitch)
    np.testing.assert_allclose(compose(roll, got, yaw), compose(0, pitch, 0.7), atol=2e-6)


def test_quaternion_by_hand():
    h = np.sqrt(0.5)
    q = np.float32([[0, 0, 0, 1], [h, 0, 0, h], [0, 0, h, h], [0, 0, 0, -1], [0, np.sin(0.2), 0, np.cos(0.2)]])
    expected = [[0, 0, 0], [np.pi / 2, 0, 0], [0, 0, np.pi / 2], [0, 0, 0], [0, 0.4, 0]]
    result = oxe.quaternion_to_euler(q)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, atol=1e-6)
    action = np.concatenate([np.ones((5, 3)), q, np.full((5, 1), 0.25)], 1)
    out = oxe.iamlab({"observation": {"state": np.zeros((5, 8))}, "action": action})["action"]
    np.testing.assert_allclose(out, np.concatenate([np.ones((5, 3)), expected, np.full((5, 1), 0.25)], 1), atol=1e-6)


def test_euler_to_matrix():
    euler = np.random.default_rng(0).uniform(-3, 3, (20, 3))
    np.testing.assert_allclose(oxe.euler_to_matrix(euler), [compose(*e) for e in euler], atol=1e-12)


def test_droid_wrist_r6():
    # wrist turned by 90 degrees about z: base x is the wrist's -y; a turn about base x becomes one about the wrist's -y
    pose = np.array([[0, 0, 0, 0, 0, np.pi / 2]])
    velocity = np.array([[1, 0, 0, 0.3, 0, 0]])
    trajectory = {
        "observation": {"cartesian_position": pose, "gripper_position": np.array([[0.2]])},
        "action_dict": {"cartesian_velocity": velocity, "gripper_position": np.array([[0.9]])},
    }
    action = oxe.droid_wrist(trajectory)["action"][0]
    assert len(action) == oxe.Dataset(action_encoding="EEF_R6").action_dim
    turn = axis_matrix(1, -0.3)
    np.testing.assert_allclose(action, [0, -1, 0, *turn[0], *turn[1], 0.9], atol=1e-12)
    base = oxe.standardize("droid_wipe", trajectory)
    np.testing.assert_allclose(base["action"], [[1, 0, 0, 0.3, 0, 0, 0.1]], atol=1e-12)
    np.testing.assert_allclose(base["observation"]["proprio"], [[0, 0, 0, 0, 0, np.pi / 2, 0.2]])


def test_droid_camera_swap():
    trajectory = raw_trajectory("droid", 3, np.random.default_rng(0))
    one, two = oxe.DATASETS["droid"].swap_images
    trajectory["observation"][one], trajectory["observation"][two] = np.full(3, 1), np.full(3, 2)
    assert oxe.standardize("droid", trajectory)["observation"][one].tolist() == [1, 1, 1]
    rng, swapped = np.random.default_rng(0), 0
    for _ in range(400):
        o = oxe.standardize("droid", trajectory, rng)["observation"]
        assert o[one][0] + o[two][0] == 3
        swapped += o[one][0] == 2
    assert 150 < swapped < 250
    assert trajectory["observation"][one].tolist() == [1, 1, 1]


def test_droid_moving_frames():
    low, high = np.array(oxe.DROID_Q01), np.array(oxe.DROID_Q99)
    raw = np.zeros((4, 7))
    raw[1, 2], raw[2, 6], raw[3, 5] = 0.01, 1.0, 1e-6  # a motion, a gripper command only, a motion too small to count
    normalised = raw.copy()
    normalised[:, :6] = 2 * (raw[:, :6] - low) / (high - low + 1e-8) - 1
    actions = normalised.astype(np.float32)
    assert oxe.droid_moving_frames({"action": actions}).tolist() == [False, True, False, False]
    assert oxe.droid_moving_frames({"action": actions.reshape(2, 2, 7)}).tolist() == [True, False]


def test_language_table_text():
    codes = np.zeros((4, 8), np.int32)
    codes[0, :4] = [ord(c) for c in "push"]
    codes[1, :7] = [0xE9, 0, ord("x"), 0, 0, 0, 1]
    codes[3] = [0xD800, 0x110000, -1, 0xFFFE, 0x1F600, 97, 97, 97]
    assert oxe.codes_to_text(codes).tolist() == [b"push", b"\xc3\xa9", b"", ("\ufffd" * 4 + "\U0001f600aaa").encode()]
    trajectory = {"observation": {"instruction": codes}, "action": np.float32([[1, 2]] * 4)}
    assert oxe.standardize("language_table", trajectory)["action"][0].tolist() == [1, 2, 0, 0, 0, 0, 1]


def test_kuka_strings():
    # numpy's fixed-width strings lose trailing zero bytes, which a zlib stream may end in
    rows = np.random.default_rng(0).normal(size=(1500, 7)).astype(np.float32)
    strings = [zlib.compress(row.tobytes()) for row in rows]
    assert any(s.endswith(b"\0") for s in strings)
    for array in (np.array(strings, object), np.array(strings)):
        np.testing.assert_array_equal(oxe.inflate(array, 7), rows)
