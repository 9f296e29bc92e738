"""
Open X-Embodiment (OXE): which robot datasets exist, how each one is laid out, and how to unify them.

Every dataset stores robot data in its own way: other camera names, grippers that open at 0, at 1 or by relative
commands, rotations as quaternions, instructions as code points. This file is the lookup table that turns any of them
into one form. It reads no files; rlds.py reads the records. From top to bottom:

    arithmetic of grippers and rotations
    one standardise function for each raw layout
    DATASETS, the table of datasets, and MIXTURES, the table of mixtures with their sampling weights
    what other files call: lookup, mixture, standardize

    trajectory = {"observation": {"state": ..., "image_0": ...}, "action": ..., "language_instruction": ...}
    out = oxe.standardize("bridge_orig", trajectory)   # a new dict; out["action"] is (T - 2, 7)
    row = oxe.lookup("bridge_orig")                    # row.images["primary"] == "image_0", row.action_dim == 7

A trajectory is a nested dict of numpy arrays, each with leading axis T (steps). After standardising it has

    action                (T, action_dim); for EEF_POS: dx dy dz, droll dpitch dyaw, gripper (1 = open, 0 = closed).
                          Motion is meant in metres and radians per step, but is passed on as recorded: some datasets
                          hold velocities or unit-free commands. Normalisation (normalize.py) evens that out.
    language_instruction  (T,) bytes, empty where a step has no instruction.
    observation           everything that was there, plus the state columns named by the row.

Arrays that need no change are shared with the input, so treat the output as read-only. The input is never modified.

Your own dataset, in a config file (give `standardize=` a function if your actions need conversion):

    from formats import oxe

    row = oxe.Dataset(name="my_robot", cameras=("front_camera", "wrist_camera"), state=("joints",))
    data_mix = [(row, 1.0)]                            # reads DIR/my_robot/1.0.0, see --data_root_dir

Open X-Embodiment: https://arxiv.org/abs/2310.08864, OpenVLA: https://arxiv.org/abs/2406.09246, OpenVLA-OFT:
https://arxiv.org/abs/2502.19645. The figures and rules follow prismatic/vla/datasets/rlds/ (oxe/transforms.py,
oxe/configs.py, oxe/mixtures.py, oxe/materialize.py, oxe/utils/droid_utils.py, utils/data_utils.py) of both
github.com/openvla/openvla and github.com/moojink/openvla-oft; the tables descend from Octo.
"""

import difflib
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from formats.dataset import as_names, name_actions

Trajectory = dict[str, Any]


# -----------------------------------------------------------------------------
# Dicts and columns


def updated(trajectory: Trajectory, action=None, language=None, observation: dict | None = None) -> Trajectory:
    """A new trajectory with the action, the instruction and some observation keys replaced or added."""
    new = {**trajectory, "observation": {**trajectory["observation"], **(observation or {})}}
    if action is not None:
        new["action"] = action
    if language is not None:
        new["language_instruction"] = language
    return new


def cut(tree, steps: slice):
    """Slice every array of a nested dict along time."""
    return {key: cut(value, steps) for key, value in tree.items()} if isinstance(tree, dict) else tree[steps]


def cat(*columns: np.ndarray) -> np.ndarray:
    """Join (T,) and (T, n) arrays into one (T, sum) array."""
    return np.concatenate([column[:, None] if column.ndim == 1 else column for column in columns], axis=-1)


def zeros(array: np.ndarray, n: int) -> np.ndarray:
    """(T, n) zeros with the length and dtype of `array`."""
    return np.zeros((len(array), n), array.dtype)


def key_list(tree: dict, prefix: str = "") -> list[str]:
    """Return the paths of all arrays in a nested dict with their shapes, for error messages."""
    paths = []
    for key, value in tree.items():
        if isinstance(value, dict):
            paths.extend(key_list(value, f"{prefix}{key} > "))
        else:
            paths.append(f"{prefix}{key} {np.shape(value)}")
    return paths


# -----------------------------------------------------------------------------
# Grippers: everything becomes absolute, 1 = open, 0 = closed. Official: utils/data_utils.py


def binarize_gripper(gripper: np.ndarray) -> np.ndarray:
    """Round a continuous gripper command (T,) to 0 or 1, float32.

    Above 0.95 is open, below 0.05 is closed. Values between are the hand on its way, so they take the value it arrives
    at: that of the next decided step. A tail that never arrives is filled with its last raw value, as officially, so
    the result is not always binary.
    """
    binary = np.empty(len(gripper), np.float32)
    for i in reversed(range(len(gripper))):
        if gripper[i] > 0.95 or gripper[i] < 0.05:
            binary[i] = gripper[i] > 0.95
        else:
            binary[i] = binary[i + 1] if i + 1 < len(gripper) else gripper[i]
    return binary


def rel2abs_gripper(command: np.ndarray) -> np.ndarray:
    """Integrate relative commands (T,), +1 = close, -1 = open, 0 = stay, to an absolute gripper (T,), float32.

    Commands within 0.1 of zero count as "stay". The first command is taken to change something, so the gripper starts
    in the opposite state; without any command it is open throughout.
    """
    closes, opens = command > 0.1, command < -0.1
    commanded = np.flatnonzero(closes | opens)
    is_open = closes[commanded[0]] if len(commanded) else True
    absolute = np.empty(len(command), np.float32)
    for i in range(len(command)):
        if closes[i] or opens[i]:
            is_open = opens[i]
        absolute[i] = is_open
    return absolute


def invert_gripper(gripper: np.ndarray) -> np.ndarray:
    """Exchange "1 = closed" and "1 = open", any shape."""
    return 1 - gripper


def open_from_closing(gripper: np.ndarray) -> np.ndarray:
    """Commands in [-1 open, 1 closed] or [0, 1 closed] to 1 = open: -1 and 0 both mean open."""
    return invert_gripper(np.clip(gripper, 0, 1))


# -----------------------------------------------------------------------------
# Rotations. Euler angles are roll, pitch, yaw about the fixed x, y, z axes: R = Rz(yaw) Ry(pitch) Rx(roll)


def quaternion_to_euler(quaternion: np.ndarray) -> np.ndarray:
    """Unit quaternions (..., 4) as x, y, z, w to Euler angles (..., 3) in radians, same dtype.

    Pitch is in [-pi/2, pi/2]. Looking straight up or down (gimbal lock) yaw is set to 0 and roll takes all of the turn.
    Near there float32 rounding decides the angles, so the operations follow the official order (tensorflow_graphics
    euler.from_quaternion), with its shrinking by 2 machine epsilons that keeps arcsin inside [-1, 1]. A quaternion that
    is not of unit length can give NaN, as officially.
    """
    quaternion = np.asarray(quaternion)
    eps = 2 * np.finfo(quaternion.dtype).eps
    shrink = 1 - eps
    x, y, z, w = np.moveaxis(quaternion, -1, 0)
    tx, ty, tz = (2 * x) * shrink, (2 * y) * shrink, (2 * z) * shrink
    r00 = (1 - (ty * y + tz * z)) * shrink
    r10 = (ty * x + tz * w) * shrink
    r21 = (tz * y + tx * w) * shrink
    r22 = (1 - (tx * x + ty * y)) * shrink
    r20 = (tz * x - ty * w) * shrink
    r01 = (ty * x - tz * w) * shrink
    r02 = (tz * x + ty * w) * shrink

    # away from zero, whose direction arctan2 cannot tell
    r00, r22, r02 = (np.where(r >= 0, eps, -eps) + r for r in (r00, r22, r02))

    # cos(pitch) >= 0 as arcsin stays within [-pi/2, pi/2], so it needs no sign
    general = np.stack([np.arctan2(r21, r22), -np.arcsin(r20), np.arctan2(r10, r00)], -1)
    sign = np.where(r20 >= 0, 1, -1)
    locked = np.stack([np.arctan2(-sign * r01, -sign * r02), -sign * np.pi / 2, np.zeros_like(r20)], -1)
    is_locked = np.abs(np.abs(r20) - 1) < 1e-6
    return np.where(is_locked[..., None], locked, general).astype(quaternion.dtype)


def euler_to_matrix(euler: np.ndarray) -> np.ndarray:
    """Euler angles (..., 3) in radians to rotation matrices (..., 3, 3)."""
    cx, cy, cz = np.moveaxis(np.cos(euler), -1, 0)
    sx, sy, sz = np.moveaxis(np.sin(euler), -1, 0)
    rows = [
        [cz * cy, cz * sy * sx - sz * cx, cz * sy * cx + sz * sx],
        [sz * cy, sz * sy * sx + cz * cx, sz * sy * cx - cz * sx],
        [-sy, cy * sx, cy * cx],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


# -----------------------------------------------------------------------------
# Standardise functions: trajectory -> new trajectory, named after the (first) dataset that needs them.
# Official: oxe/transforms.py, one function per dataset; here equal ones are shared.
# `a` is the raw action and `o` the raw observation, where they are dicts. Docstrings give raw shapes where they matter:
# action[n] is an array (T, n), action[] is (T,).
# The index of a dataset is known by the source of its function and of all that it uses (rlds.fingerprint). So an edit
# here, even of a docstring, makes the indices of these datasets anew.


def identity(trajectory: Trajectory) -> Trajectory:
    """Already in the common form, or passed on untouched by the official code."""
    return updated(trajectory)


def relabel_bridge(trajectory: Trajectory) -> Trajectory:
    """Replace commanded motion by reached motion: the difference of consecutive states, a plain one also for angles.

    Takes action (T, 7) and observation state (T, 7): returns T - 1 steps (the last one has no successor). The gripper
    stays the recorded one.
    """
    state = trajectory["observation"]["state"]
    reached = state[1:, :6] - state[:-1, :6]
    return updated(cut(trajectory, slice(None, -1)), action=cat(reached, trajectory["action"][:-1, -1:]))


def drop_first_step(trajectory: Trajectory) -> Trajectory:
    """Bridge episodes begin with an all-zero action. Metadata keeps its first step, as officially."""
    return {k: v if k == "traj_metadata" else cut(v, slice(1, None)) for k, v in trajectory.items()}


def pose_and_gripper(state: np.ndarray, pose_key: str = "EEF_state") -> dict:
    """State columns: pose (T, 6) = first six, gripper (T, 1) = last one."""
    return {pose_key: state[:, :6], "gripper_state": state[:, -1:]}


def bridge(trajectory: Trajectory) -> Trajectory:
    """Bridge V2 from its own site: action[7], state[7]; T steps become T - 2 (first and last are dropped)."""
    trajectory = drop_first_step(trajectory)
    action = trajectory["action"]
    trajectory = relabel_bridge(updated(trajectory, action=cat(action[:, :6], binarize_gripper(action[:, -1]))))
    return updated(trajectory, observation=pose_and_gripper(trajectory["observation"]["state"]))


def bridge_oxe(trajectory: Trajectory) -> Trajectory:
    """Bridge V2 as shipped with Open X-Embodiment: action dict with open_gripper[] bool; T becomes T - 2."""
    trajectory = drop_first_step(trajectory)
    a, o = trajectory["action"], trajectory["observation"]
    action = cat(a["world_vector"], a["rotation_delta"], a["open_gripper"].astype(np.float32))
    trajectory = relabel_bridge(updated(trajectory, action, o["natural_language_instruction"]))
    return updated(trajectory, observation=pose_and_gripper(trajectory["observation"]["state"]))


def tdroid(trajectory: Trajectory) -> Trajectory:
    """T-DROID and PPGM: action[7], Cartesian pose and gripper position are already separate."""
    a, o = trajectory["action"], trajectory["observation"]
    state = {"EEF_state": o["cartesian_position"][:, :6], "gripper_state": o["gripper_position"][:, -1:]}
    return updated(trajectory, cat(a[:, :6], binarize_gripper(a[:, -1])), observation=state)


def rt1(trajectory: Trajectory) -> Trajectory:
    """RT-1, NYU door opening: gripper_closedness_action[1] is a relative command."""
    a, o = trajectory["action"], trajectory["observation"]
    gripper = rel2abs_gripper(a["gripper_closedness_action"][:, 0])
    return updated(trajectory, cat(a["world_vector"], a["rotation_delta"], gripper), o["natural_language_instruction"])


def kuka(trajectory: Trajectory) -> Trajectory:
    """QT-Opt Kuka: as RT-1, and two state entries are zlib-compressed float32 bytes, one string per step."""
    pose_key = "clip_function_input/base_pose_tool_reached"
    o = trajectory["observation"]
    state = {pose_key: inflate(o[pose_key], 7), "gripper_closed": inflate(o["gripper_closed"], 1)}
    return updated(rt1(trajectory), observation=state)


def inflate(strings: np.ndarray, columns: int) -> np.ndarray:
    """Compressed strings (T,) to float32 (T, columns)."""
    # decompressobj does not insist on the final checksum, whose zero bytes numpy strips from fixed-width strings
    data = b"".join(zlib.decompressobj().decompress(bytes(s)) for s in strings)
    return np.frombuffer(data, "<f4").reshape(-1, columns)


def taco_play(trajectory: Trajectory) -> Trajectory:
    """TACO play: relative world-frame action[7] among several; the gripper is -1 closed, 1 open."""
    o, action = trajectory["observation"], trajectory["action"]["rel_actions_world"]
    state = {"state_eef": o["robot_obs"][:, :6], "state_gripper": o["robot_obs"][:, 7:8]}
    action = cat(action[:, :6], np.clip(action[:, -1:], 0, 1))
    return updated(trajectory, action, o["natural_language_instruction"], state)


def jaco_play(trajectory: Trajectory) -> Trajectory:
    """Jaco play: translation only; relative gripper_closedness_action[1]."""
    a, o = trajectory["action"], trajectory["observation"]
    pose = o["end_effector_cartesian_pos"]
    gripper = rel2abs_gripper(a["gripper_closedness_action"][:, 0])
    action = cat(a["world_vector"], zeros(a["world_vector"], 3), gripper)
    state = {"state_eef": pose[:, :6], "state_gripper": pose[:, -1:]}
    return updated(trajectory, action, o["natural_language_instruction"], state)


def cable_routing(trajectory: Trajectory) -> Trajectory:
    """Berkeley cable routing: the gripper never opens, column of zeros."""
    a, o = trajectory["action"], trajectory["observation"]
    action = cat(a["world_vector"], a["rotation_delta"], zeros(a["world_vector"], 1))
    return updated(trajectory, action, o["natural_language_instruction"])


def roboturk(trajectory: Trajectory) -> Trajectory:
    """RoboTurk (gripper_closedness_action[1]) and VIOLA (the same as []): absolute, 1 = closed."""
    a, o = trajectory["action"], trajectory["observation"]
    gripper = open_from_closing(a["gripper_closedness_action"])
    return updated(trajectory, cat(a["world_vector"], a["rotation_delta"], gripper), o["natural_language_instruction"])


def autolab_ur5(trajectory: Trajectory) -> Trajectory:
    """Berkeley Autolab UR5: relative gripper_closedness_action[]; the depth image is stored as image_with_depth."""
    a, o = trajectory["action"], trajectory["observation"]
    action = cat(a["world_vector"], a["rotation_delta"], rel2abs_gripper(a["gripper_closedness_action"]))
    new = {"state": o["robot_state"][:, 6:14], "depth": o["image_with_depth"]}
    trajectory = updated(trajectory, action, o["natural_language_instruction"], new)
    del trajectory["observation"]["image_with_depth"]
    return trajectory


def toto(trajectory: Trajectory) -> Trajectory:
    """TOTO: open_gripper[] bool."""
    a, o = trajectory["action"], trajectory["observation"]
    action = cat(a["world_vector"], a["rotation_delta"], a["open_gripper"].astype(np.float32))
    return updated(trajectory, action, o["natural_language_instruction"])


def language_table(trajectory: Trajectory) -> Trajectory:
    """Language Table: action[2] in the plane, no gripper (always "open"), instruction as padded code points [L]."""
    action = trajectory["action"]
    action = cat(action, zeros(action, 4), zeros(action, 1) + 1)
    return updated(trajectory, action, codes_to_text(trajectory["observation"]["instruction"]))


def codes_to_text(codes: np.ndarray) -> np.ndarray:
    """Unicode code points (T, L), zero = end, to UTF-8 bytes (T,), dtype object. Invalid codes become U+FFFD."""
    text = np.empty(len(codes), object)
    for i, row in enumerate(np.asarray(codes).tolist()):
        row = row[: row.index(0)] if 0 in row else row
        text[i] = "".join(chr(code) if is_character(code) else "\ufffd" for code in row).encode("utf-8")
    return text


def is_character(code: int) -> bool:
    """False outside of Unicode, for surrogates and for the codes reserved as "never a character"."""
    reserved = 0xD800 <= code <= 0xDFFF or 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE
    return 0 < code <= 0x10FFFF and not reserved


def pusht(trajectory: Trajectory) -> Trajectory:
    """Columbia PushT: gripper_closedness_action[] passed on as it is."""
    a, o = trajectory["action"], trajectory["observation"]
    action = cat(a["world_vector"], a["rotation_delta"], a["gripper_closedness_action"])
    return updated(trajectory, action, o["natural_language_instruction"])


def translation_only(action: np.ndarray) -> np.ndarray:
    """action[n] -> [7]: first three columns, no rotation, last column as gripper."""
    return cat(action[:, :3], zeros(action, 3), action[:, -1:])


def kuka_multimodal(trajectory: Trajectory) -> Trajectory:
    """Stanford Kuka multimodal: action[4] without rotation; depth loses its channel axis."""
    depth = trajectory["observation"]["depth_image"][..., 0]
    return updated(trajectory, translation_only(trajectory["action"]), observation={"depth_image": depth})


def ucsd_pick_place(trajectory: Trajectory) -> Trajectory:
    """UCSD pick and place: action[4] without rotation; state pose and gripper."""
    return updated(split_state(trajectory), translation_only(trajectory["action"]))


def split_state(trajectory: Trajectory) -> Trajectory:
    """Tokyo LSMO, Stanford RoboCook: only the state needs taking apart."""
    return updated(trajectory, observation=pose_and_gripper(trajectory["observation"]["state"], "eef_state"))


def nyu_rot(trajectory: Trajectory) -> Trajectory:
    """NYU ROT: action[7 or more], state pose and gripper."""
    return updated(split_state(trajectory), trajectory["action"][..., :7])


def tokyo_pr2(trajectory: Trajectory) -> Trajectory:
    """Tokyo PR2, fridge and table top: the last action column marks the episode's end."""
    return drop_last_action(split_state(trajectory))


def drop_last_action(trajectory: Trajectory) -> Trajectory:
    """CMU Franka exploration, Imperial wrist camera: the last action column marks the episode's end."""
    return updated(trajectory, trajectory["action"][..., :-1])


def edan(trajectory: Trajectory) -> Trajectory:
    """DLR EDAN: 1 = closed."""
    action = trajectory["action"]
    return updated(trajectory, cat(action[:, :6], invert_gripper(action[:, -1:])))


def hydra(trajectory: Trajectory) -> Trajectory:
    """Stanford HYDRA: 1 = closed; state[27] holds position, quaternion, Euler angles, joints, gripper."""
    state = trajectory["observation"]["state"]
    state = {"eef_state": cat(state[:, :3], state[:, 7:10]), "gripper_state": state[:, -3:-2]}
    return updated(edan(trajectory), observation=state)


def austin(trajectory: Trajectory) -> Trajectory:
    """Austin Sailor, Austin Sirius: gripper -1 open, 1 closed."""
    action = trajectory["action"]
    return updated(trajectory, cat(action[:, :6], open_from_closing(action[:, -1:])))


def austin_buds(trajectory: Trajectory) -> Trajectory:
    """Austin BUDS, Austin MUTEX: as Sailor; the first eight of state[24] are joints and gripper."""
    return updated(austin(trajectory), observation={"state": trajectory["observation"]["state"][:, :8]})


def libero(trajectory: Trajectory) -> Trajectory:
    """LIBERO, no-op steps already removed: gripper -1 open, 1 closed; the gripper state is two finger positions."""
    state = trajectory["observation"]["state"]
    return updated(austin(trajectory), observation={"EEF_state": state[:, :6], "gripper_state": state[:, -2:]})


def nyu_franka(trajectory: Trajectory) -> Trajectory:
    """NYU Franka play: action[15] ends in motion[6], gripper (-1 closed, 1 open), episode end; depth has a channel."""
    a, o = trajectory["action"], trajectory["observation"]
    new = {key: o[key][..., 0].astype(np.float32) for key in ("depth", "depth_additional_view")}
    action = cat(a[:, -8:-2], np.clip(a[:, -2:-1], 0, 1))
    return updated(trajectory, action, observation={**new, "eef_state": o["state"][:, -6:]})


def maniskill(trajectory: Trajectory) -> Trajectory:
    """ManiSkill: only the gripper has to be cut from the state."""
    return updated(trajectory, observation={"gripper_state": trajectory["observation"]["state"][..., 7:8]})


def furniture_bench(trajectory: Trajectory) -> Trajectory:
    """FurnitureBench: action[8] = translation, quaternion, gripper (-1 open, 1 closed); state pose[7] and gripper."""
    action, state = trajectory["action"], trajectory["observation"]["state"]
    action = cat(action[:, :3], quaternion_to_euler(action[:, 3:7]), open_from_closing(action[:, -1:]))
    return updated(trajectory, action, observation={"state": cat(state[:, :7], state[:, -1:])})


def iamlab(trajectory: Trajectory) -> Trajectory:
    """CMU IAMLab pick-up and insert: action[8] = translation, quaternion, gripper; state joints[7] and gripper."""
    action, state = trajectory["action"], trajectory["observation"]["state"]
    action = cat(action[:, :3], quaternion_to_euler(action[:, 3:7]), action[:, 7:8])
    return updated(trajectory, action, observation={"joint_state": state[:, :7], "gripper_state": state[:, 7:8]})


def playing_with_food(trajectory: Trajectory) -> Trajectory:
    """CMU playing with food: translation[3], quaternion[4], ..., gripper last."""
    action = trajectory["action"]
    return updated(trajectory, cat(action[:, :3], quaternion_to_euler(action[:, 3:7]), action[:, -1:]))


def play_fusion(trajectory: Trajectory) -> Trajectory:
    """CMU play fusion: translation first, Euler angles and gripper last."""
    action = trajectory["action"]
    return updated(trajectory, cat(action[:, :3], action[:, -4:]))


def ucsd_kitchen(trajectory: Trajectory) -> Trajectory:
    """UCSD kitchen: action[8] with an end marker last; the first seven state columns are joints."""
    return updated(drop_last_action(trajectory), observation={"joint_state": trajectory["observation"]["state"][:, :7]})


def bc_z(trajectory: Trajectory) -> Trajectory:
    """BC-Z: actions are plans of ten future residuals; the first one is used. target_close[10] is 1 = closed, int."""
    a, o = trajectory["action"], trajectory["observation"]
    gripper = invert_gripper(a["future/target_close"][:, :1].astype(np.float32))
    action = cat(a["future/xyz_residual"][:, :3], a["future/axis_angle_residual"][:, :3], gripper)
    return updated(trajectory, action, o["natural_language_instruction"])


def xarm_bimanual(trajectory: Trajectory) -> Trajectory:
    """Tokyo xArm bimanual: action[14], only the right arm is kept."""
    return updated(trajectory, trajectory["action"][..., -7:])


def position_and_yaw(array: np.ndarray) -> np.ndarray:
    """[n] -> [6]: x y z and one angle, then two zeros. The angle lands in the roll column, as officially."""
    return cat(array[:, :4], zeros(array, 2))


def robo_net(trajectory: Trajectory, state_key: str = "state") -> Trajectory:
    """RoboNet: action[5], state[5] with one angle."""
    action, state = trajectory["action"], trajectory["observation"][state_key]
    state = {"eef_state": position_and_yaw(state), "gripper_state": state[:, -1:]}
    return updated(trajectory, cat(position_and_yaw(action), action[:, -1:]), observation=state)


def mask_vit(trajectory: Trajectory) -> Trajectory:
    """Stanford MaskViT: as RoboNet, the state is called end_effector_pose."""
    return robo_net(trajectory, state_key="end_effector_pose")


def kaist(trajectory: Trajectory) -> Trajectory:
    """KAIST non-prehensile: no gripper; the last seven of state[21] are the pose."""
    action = trajectory["action"]
    state = trajectory["observation"]["state"][:, -7:]
    return updated(trajectory, cat(action[:, :6], zeros(action, 1)), observation={"state": state})


def sara_grid_clamp(trajectory: Trajectory) -> Trajectory:
    """DLR SARA grid clamp: state pose is the first six columns."""
    return updated(trajectory, observation={"state": trajectory["observation"]["state"][:, :6]})


def asu_table_top(trajectory: Trajectory) -> Trajectory:
    """ASU table top: the pose is in ground_truth_states, outside of observation."""
    o = trajectory["observation"]
    state = {"eef_state": trajectory["ground_truth_states"]["EE"], "gripper_state": o["state"][:, -1:]}
    return updated(trajectory, observation=state)


def d3field(trajectory: Trajectory) -> Trajectory:
    """UIUC D3Field: action[3] translation; no rotation, no gripper."""
    action = trajectory["action"]
    return updated(trajectory, cat(action, zeros(action, action.shape[-1] + 1)))


def fanuc(trajectory: Trajectory) -> Trajectory:
    """Berkeley Fanuc: action[6]; no gripper command is stored, its state (1 = closed) stands in."""
    state = trajectory["observation"]["state"]
    state = {"joint_state": state[:, :6], "gripper_state": state[:, 6:7]}
    return updated(trajectory, cat(trajectory["action"], invert_gripper(state["gripper_state"])), observation=state)


def cmu_stretch(trajectory: Trajectory) -> Trajectory:
    """CMU Stretch: no orientation in the state; the last of action[8] marks the episode's end."""
    state = trajectory["observation"]["state"]
    state = {"eef_state": cat(state[:, :3], zeros(state, 3)), "gripper_state": state[:, -1:]}
    return updated(drop_last_action(trajectory), observation=state)


def gnm(trajectory: Trajectory) -> Trajectory:
    """Berkeley GNM (ground robots): action[2] = dx dy, padded with zeros to [7]; state = x y, 0 0 0, yaw."""
    action, o = trajectory["action"], trajectory["observation"]
    state = cat(o["position"], zeros(o["state"], 3), o["yaw"])
    return updated(trajectory, cat(action, zeros(action, 2 * action.shape[-1] + 1)), observation={"state": state})


def fmb(trajectory: Trajectory) -> Trajectory:
    """Functional manipulation benchmark: eef_pose and state_gripper_pose[] make up the state."""
    o = trajectory["observation"]
    return updated(trajectory, observation={"proprio": cat(o["eef_pose"], o["state_gripper_pose"])})


def dobbe(trajectory: Trajectory) -> Trajectory:
    """Dobb-E: the state only changes its name."""
    return updated(trajectory, observation={"proprio": trajectory["observation"]["state"]})


def roboset(trajectory: Trajectory) -> Trajectory:
    """RoboSet: action[8] joints[7] and gripper (-1 open, 1 closed)."""
    action = trajectory["action"]
    return updated(dobbe(trajectory), cat(action[:, :7], open_from_closing(action[:, -1:])))


def rh20t(trajectory: Trajectory) -> Trajectory:
    """RH20T: action dict of tcp_base[6] and gripper[]; the same for the state."""
    a, o = trajectory["action"], trajectory["observation"]
    action = cat(a["tcp_base"], a["gripper"].astype(np.float32))
    return updated(trajectory, action, observation={"proprio": cat(o["tcp_base"], o["gripper_width"])})


def droid(trajectory: Trajectory) -> Trajectory:
    """DROID: commanded velocity[6] in the robot's base frame, from `action_dict`; gripper_position[1] is 1 = closed."""
    a, o = trajectory["action_dict"], trajectory["observation"]
    action = cat(a["cartesian_velocity"][:, :6], invert_gripper(a["gripper_position"]))
    return updated(trajectory, action, observation={"proprio": cat(o["cartesian_position"], o["gripper_position"])})


def droid_wrist(trajectory: Trajectory) -> Trajectory:
    """DROID with the motion in the wrist's frame, (T, 10) for action_encoding="EEF_R6". Used by no official data set.

    Translation R^-1 v; rotation R^-1 dR R as its first two matrix rows (R6); R is the wrist's orientation. The gripper
    stays 1 = closed, as officially.
    """
    a, o = trajectory["action_dict"], trajectory["observation"]
    frame = euler_to_matrix(o["cartesian_position"][:, 3:6])  # (T, 3, 3), wrist to base
    inverse = np.swapaxes(frame, -1, -2)
    translation = (inverse @ a["cartesian_velocity"][:, :3, None])[..., 0]
    rotation = inverse @ (euler_to_matrix(a["cartesian_velocity"][:, 3:6]) @ frame)
    action = cat(translation, rotation[:, :2].reshape(len(frame), 6), a["gripper_position"])
    return updated(trajectory, action, observation={"proprio": cat(o["cartesian_position"], o["gripper_position"])})


# Quantiles of DROID's motion, fixed in the official droid_utils.py: not those of the data at hand.
DROID_Q01 = (
    -0.7776297926902771,
    -0.5803514122962952,
    -0.5795090794563293,
    -0.6464047729969025,
    -0.7041108310222626,
    -0.8895104378461838,
)
DROID_Q99 = (
    0.7597932070493698,
    0.5726242214441299,
    0.7351000607013702,
    0.6705610305070877,
    0.6464948207139969,
    0.8897542208433151,
)


def droid_moving_frames(trajectory: Trajectory) -> np.ndarray:
    """Mask (T,) of the frames in which the robot is told to move; DROID has long pauses.

    Takes NORMALISED actions, (T, 7) or chunks (T, K, 7): motion zero is then 2 (0 - q01) / (q99 - q01) - 1. A frame is
    dropped if all six motion values (of the whole chunk) are within 1e-5 of that. With other statistics than the fixed
    ones above the filter keeps nearly everything, as officially.
    """
    low, high = np.float32(DROID_Q01), np.float32(DROID_Q99)
    still = 2 * (0 - low) / (high - low + np.float32(1e-8)) - 1
    moves = np.abs(trajectory["action"][..., :6] - still) > 1e-5
    return moves.any(axis=tuple(range(1, moves.ndim)))


# -----------------------------------------------------------------------------
# The table of datasets

# Per action dimension: is it absolute (a set point) or relative (a change)? Only grippers are absolute for single arms.
# JOINT_POS is refused by the official loader (see mixture); its masks follow its definition: 7 joint changes, gripper.
ABSOLUTE_ACTION_MASK = {
    "EEF_POS": (False,) * 6 + (True,),  # translation 3, Euler angles 3, gripper
    "EEF_R6": (False,) * 9 + (True,),  # translation 3, two rows of the rotation matrix 6, gripper
    "JOINT_POS": (False,) * 7 + (True,),  # joints 7, gripper
    "JOINT_POS_BIMANUAL": (True,) * 14,  # two arms of joints 6, gripper; ALOHA, OpenVLA-OFT only
}
STATE_ENCODINGS = ("NONE", "POS_EULER", "POS_QUAT", "JOINT", "JOINT_BIMANUAL")


@dataclass(frozen=True)
class Dataset:
    """
    How one dataset is laid out after `standardize`. Official: oxe/configs.py and oxe/materialize.py.

    primary, secondary, wrist, left_wrist, right_wrist, and the depth fields: observation keys of these images; None:
        there is no such view (officially a black image).
    standardize: maps a raw trajectory to a new one.
    state_encoding: what the state means. POS_EULER is xyz (m), Euler angles (rad), pad, gripper; POS_QUAT is xyz,
        quaternion, gripper; JOINT is 7 joint angles (rad), gripper; JOINT_BIMANUAL is twice 6 + 1; NONE.
    state: the observation keys that are joined to the robot's state; None: a column of zeros as padding.
    action_encoding: what the action means, see ABSOLUTE_ACTION_MASK.
    swap_images: two observation keys whose images are exchanged at random, see `standardize` below.
    keep_frames: maps a standardised AND normalised trajectory to a mask (T,) of the frames to train on; None: all.

    For a row of your own, as it stands in `data_mix`, the words of LeRobot folders and Samples hold, too:

    name: of the dataset's folder, under which its statistics are stored. In DATASETS it is the key.
    cameras: the observation keys of the images, in the order in which the model gets them, instead of `primary` ...
    action: the keys of the actions, which are joined; "a/b" is key b of the dict a. (): "action".
    gripper: False if the last dimension of the action is no gripper; then it is normalised, too.
    absolute: True if actions are targets, such as joint angles, and not changes.
        With one of these two an action may have any number of dimensions, else it is as `action_encoding` says.
    episodes: the numbers of the training episodes to use, in the order of the files; None: all.
    train_split, val_split: what the splits for training and for validation are called in dataset_info.json.

    Raises ValueError for an unknown encoding and TypeError for a `state` that is a bare string.
    """

    primary: str | None = "image"
    standardize: Callable[[Trajectory], Trajectory] = identity
    state_encoding: str = "NONE"
    state: tuple[str | None, ...] = ()
    secondary: str | None = None
    wrist: str | None = None
    action_encoding: str = "EEF_POS"
    left_wrist: str | None = None
    right_wrist: str | None = None
    primary_depth: str | None = None
    secondary_depth: str | None = None
    wrist_depth: str | None = None
    swap_images: tuple[str, str] | None = None
    keep_frames: Callable[[Trajectory], np.ndarray] | None = None
    name: str = ""
    cameras: tuple[str, ...] = ()
    action: tuple[str, ...] = ()
    gripper: bool | None = None
    absolute: bool | None = None
    episodes: tuple[int, ...] | None = None
    train_split: str = "train"
    val_split: str = "val"

    def __post_init__(self):
        if isinstance(self.state, str):
            raise TypeError(f'state must be a tuple of keys, write state=("{self.state}",)')
        object.__setattr__(self, "state", tuple(self.state))  # a list is fine too
        object.__setattr__(self, "cameras", as_names(self.cameras))
        object.__setattr__(self, "action", as_names(self.action))
        if self.episodes is not None:
            object.__setattr__(self, "episodes", tuple(self.episodes))
        if self.action_encoding not in ABSOLUTE_ACTION_MASK:
            raise ValueError(f"action_encoding {self.action_encoding!r} is none of {list(ABSOLUTE_ACTION_MASK)}")
        if self.state_encoding not in STATE_ENCODINGS:
            raise ValueError(f"state_encoding {self.state_encoding!r} is none of {list(STATE_ENCODINGS)}")

    @property
    def images(self) -> dict[str, str | None]:
        """View name -> observation key, or None where the dataset has no such view."""
        if self.cameras:
            return {camera: camera for camera in self.cameras}
        return {view: getattr(self, view) for view in ("primary", "secondary", "wrist", "left_wrist", "right_wrist")}

    @property
    def depth(self) -> dict[str, str | None]:
        """View name -> observation key of the depth image, or None."""
        return {view: getattr(self, f"{view}_depth") for view in ("primary", "secondary", "wrist")}

    @property
    def state_oft(self) -> tuple[str | None, ...]:
        """
        `state` as OpenVLA-OFT reads it: without the pad column between pose and gripper (LIBERO: 8 columns, not 9).

        OFT also renamed eef_state to EEF_state in 11 rows whose transforms still write eef_state, so those fail there;
        here rows and transforms agree, on eef_state.
        """
        if self.state not in (POSE, POSE_LOWER):
            return self.state
        return tuple(key for key in self.state if key is not None)

    @property
    def has_own_action(self) -> bool:
        """True if `gripper` and `absolute` say what an action is, and not `action_encoding`."""
        return self.gripper is not None or self.absolute is not None

    @property
    def action_dim(self) -> int | None:
        """7, 10 (EEF_R6), 8 (JOINT_POS) or 14 (two arms); None: any number."""
        return None if self.has_own_action else len(self.absolute_action_mask)

    def action_masks(self, num_dims: int) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
        """Return which of an action's dimensions are absolute, and which are normalised."""
        if not self.has_own_action:
            return self.absolute_action_mask, self.action_normalization_mask
        gripper = self.gripper is not False
        absolute = bool(self.absolute)
        return (absolute,) * (num_dims - 1) + (absolute or gripper,), (True,) * (num_dims - 1) + (not gripper,)

    def action_names(self, num_dims: int) -> tuple[str, ...]:
        """Return the names of an action's dimensions, see formats/dataset.py."""
        if self.has_own_action:
            return name_actions(num_dims, self.gripper is not False, bool(self.absolute))
        is_end_effector = self.action_encoding == "EEF_POS"
        has_gripper = self.action_encoding != "JOINT_POS_BIMANUAL"
        return name_actions(num_dims, has_gripper, absolute=not is_end_effector)

    @property
    def scheme(self) -> str:
        """Which statistics become -1 and 1, see normalize.SCHEMES: minimum and maximum for two arms (ALOHA)."""
        return "bounds" if self.action_encoding == "JOINT_POS_BIMANUAL" else "bounds_q99"

    @property
    def absolute_action_mask(self) -> tuple[bool, ...]:
        """True: set point, repeated when padding past the end. False: change, padded with 0."""
        return ABSOLUTE_ACTION_MASK[self.action_encoding]

    @property
    def action_normalization_mask(self) -> tuple[bool, ...]:
        """True: normalise this dimension. A single arm's gripper is left in [0, 1]; two arms are normalised whole."""
        if self.action_encoding == "JOINT_POS_BIMANUAL":
            return (True,) * self.action_dim
        return tuple(not absolute for absolute in self.absolute_action_mask)


# fmt: off
NONE       = "NONE"
EULER      = "POS_EULER"
QUAT       = "POS_QUAT"
JOINT      = "JOINT"

PAD        = (None,)
POSE       = ("EEF_state", None, "gripper_state")
POSE_LOWER = ("eef_state", None, "gripper_state")
POSE_TACO  = ("state_eef", None, "state_gripper")

# Rows used under several names
BRIDGE = Dataset("image_0", bridge, EULER, POSE, secondary="image_1")
LIBERO = Dataset("image", libero, EULER, POSE, wrist="wrist_image")
TDROID = Dataset("static_image", tdroid, EULER, POSE, primary_depth="static_depth_image")
GNM    = Dataset(None, gnm, EULER, ("state",) + PAD * 2, wrist="image")
ALOHA  = Dataset("image", identity, "JOINT_BIMANUAL", ("state",), action_encoding="JOINT_POS_BIMANUAL",
                 left_wrist="left_wrist_image", right_wrist="right_wrist_image")
# PPGM has a transform but no layout in the official code and is not public: set the views with dataclasses.replace
PPGM   = Dataset(None, tdroid, EULER, POSE)
TOY    = Dataset("image", state=("state",))

DATASETS: dict[str, Dataset] = {
    # Dataset(primary, standardize, state_encoding, state, other views, depth, exceptions)
    "fractal20220817_data":        Dataset("image",          rt1,               QUAT,
                                           ("base_pose_tool_reached", "gripper_closed")),
    "kuka":                        Dataset("image",          kuka,              QUAT,
                                           ("clip_function_input/base_pose_tool_reached", "gripper_closed")),
    "bridge_oxe":                  Dataset("image",          bridge_oxe,        EULER, POSE, secondary="image_1"),
    "bridge_orig":                 BRIDGE,
    "bridge_dataset":              BRIDGE,
    "taco_play":                   Dataset("rgb_static",     taco_play,         EULER, POSE_TACO, wrist="rgb_gripper",
                                           primary_depth="depth_static", wrist_depth="depth_gripper"),
    "jaco_play":                   Dataset("image",          jaco_play,         EULER, POSE_TACO, wrist="image_wrist"),
    "berkeley_cable_routing":      Dataset("image",          cable_routing,     JOINT, ("robot_state", None),
                                           secondary="top_image", wrist="wrist45_image"),
    "roboturk":                    Dataset("front_rgb",      roboturk,          NONE,  PAD * 8),
    "viola":                       Dataset("agentview_rgb",  roboturk,          JOINT,
                                           ("joint_states", "gripper_states"), wrist="eye_in_hand_rgb"),
    "berkeley_autolab_ur5":        Dataset("image",          autolab_ur5,       QUAT,  ("state",), wrist="hand_image",
                                           primary_depth="depth"),
    "toto":                        Dataset("image",          toto,              JOINT, ("state", None)),
    "language_table":              Dataset("rgb",            language_table,    EULER,
                                           ("effector_translation",) + PAD * 6),
    "columbia_cairlab_pusht_real": Dataset("image",          pusht,             EULER, ("robot_state",) + PAD * 6,
                                           wrist="wrist_image"),
    "bc_z":                        Dataset("image",          bc_z,              EULER,
                                           ("present/xyz", "present/axis_angle", None, "present/sensed_close")),
    "robo_net":                    Dataset("image",          robo_net,          EULER, POSE_LOWER, secondary="image1"),
    "uiuc_d3field":                Dataset("image_1",        d3field,           NONE,  PAD * 8, secondary="image_2",
                                           primary_depth="depth_1", secondary_depth="depth_2"),
    "utaustin_mutex":              Dataset("image",          austin_buds,       JOINT, ("state",), wrist="wrist_image"),
    "berkeley_fanuc_manipulation": Dataset("image",          fanuc,             JOINT,
                                           ("joint_state", None, "gripper_state"), wrist="wrist_image"),
    "cmu_playing_with_food":       Dataset("image",          playing_with_food, EULER, ("state",) + PAD * 2,
                                           wrist="finger_vision_1"),
    "cmu_play_fusion":             Dataset("image",          play_fusion,       JOINT, ("state",)),
    "cmu_stretch":                 Dataset("image",          cmu_stretch,       EULER, POSE_LOWER),
    "berkeley_gnm_recon":          GNM,
    "berkeley_gnm_cory_hall":      GNM,
    "berkeley_gnm_sac_son":        GNM,
    "droid":                       Dataset("exterior_image_1_left", droid,             QUAT,  ("proprio",),
                                           secondary="exterior_image_2_left", wrist="wrist_image_left",
                                           swap_images=("exterior_image_1_left", "exterior_image_2_left"),
                                           keep_frames=droid_moving_frames),
    "fmb_dataset":                 Dataset("image_side_1",   fmb,               EULER, ("proprio",),
                                           secondary="image_side_2", wrist="image_wrist_1",
                                           primary_depth="image_side_1_depth", secondary_depth="image_side_2_depth",
                                           wrist_depth="image_wrist_1_depth"),
    "dobbe":                       Dataset("wrist_image",    dobbe,             EULER, ("proprio",)),
    "roboset":                     Dataset("image_left",     roboset,           JOINT, ("proprio",),
                                           secondary="image_right", wrist="image_wrist", action_encoding="JOINT_POS"),
    "rh20t":                       Dataset("image_front",    rh20t,             EULER, ("proprio",),
                                           secondary="image_side_right", wrist="image_wrist"),
    "tdroid_carrot_in_bowl":       TDROID,
    "tdroid_pour_corn_in_pot":     TDROID,
    "tdroid_flip_pot_upright":     TDROID,
    "tdroid_move_object_onto_plate": TDROID,
    "tdroid_knock_object_over":    TDROID,
    "tdroid_cover_object_with_towel": TDROID,
    "droid_wipe":                  Dataset("exterior_image_2_left", droid,             EULER, ("proprio",),
                                           wrist="wrist_image_left"),
    "libero_spatial_no_noops":     LIBERO,
    "libero_object_no_noops":      LIBERO,
    "libero_goal_no_noops":        LIBERO,
    "libero_10_no_noops":          LIBERO,
    "aloha1_fold_shorts_20_demos": ALOHA,
    "aloha1_fold_shirt_30_demos": ALOHA,
    "aloha1_scoop_X_into_bowl_45_demos": ALOHA,
    "aloha1_put_X_into_pot_300_demos": ALOHA,
    "ppgm":                        PPGM,
    "ppgm_static":                 PPGM,
    "ppgm_wrist":                  PPGM,
    "nyu_door_opening_surprising_effectiveness":
        Dataset(None,             rt1,               NONE,  PAD * 8, wrist="image"),
    "stanford_kuka_multimodal_dataset_converted_externally_to_rlds":
        Dataset("image",          kuka_multimodal,   QUAT,  ("ee_position", "ee_orientation", None),
                primary_depth="depth_image"),
    "nyu_rot_dataset_converted_externally_to_rlds":
        Dataset("image",          nyu_rot,           EULER, POSE_LOWER),
    "stanford_hydra_dataset_converted_externally_to_rlds":
        Dataset("image",          hydra,             EULER, POSE_LOWER, wrist="wrist_image"),
    "austin_buds_dataset_converted_externally_to_rlds":
        Dataset("image",          austin_buds,       JOINT, ("state",), wrist="wrist_image"),
    "nyu_franka_play_dataset_converted_externally_to_rlds":
        Dataset("image",          nyu_franka,        EULER, ("eef_state",) + PAD * 2, secondary="image_additional_view",
                primary_depth="depth", secondary_depth="depth_additional_view"),
    "maniskill_dataset_converted_externally_to_rlds":
        Dataset("image",          maniskill,         QUAT,  ("tcp_pose", "gripper_state"), wrist="wrist_image",
                primary_depth="depth", wrist_depth="wrist_depth"),
    "furniture_bench_dataset_converted_externally_to_rlds":
        Dataset("image",          furniture_bench,   QUAT,  ("state",), wrist="wrist_image"),
    "cmu_franka_exploration_dataset_converted_externally_to_rlds":
        Dataset("highres_image",  drop_last_action,  NONE,  PAD * 8),
    "ucsd_kitchen_dataset_converted_externally_to_rlds":
        Dataset("image",          ucsd_kitchen,      JOINT, ("joint_state", None)),
    "ucsd_pick_and_place_dataset_converted_externally_to_rlds":
        Dataset("image",          ucsd_pick_place,   EULER, POSE_LOWER),
    "austin_sailor_dataset_converted_externally_to_rlds":
        Dataset("image",          austin,            QUAT,  ("state",), wrist="wrist_image"),
    "austin_sirius_dataset_converted_externally_to_rlds":
        Dataset("image",          austin,            QUAT,  ("state",), wrist="wrist_image"),
    "utokyo_pr2_opening_fridge_converted_externally_to_rlds":
        Dataset("image",          tokyo_pr2,         EULER, POSE_LOWER),
    "utokyo_pr2_tabletop_manipulation_converted_externally_to_rlds":
        Dataset("image",          tokyo_pr2,         EULER, POSE_LOWER),
    "utokyo_xarm_pick_and_place_converted_externally_to_rlds":
        Dataset("image",          identity,          EULER, ("end_effector_pose",) + PAD * 2, secondary="image2",
                wrist="hand_image"),
    "utokyo_xarm_bimanual_converted_externally_to_rlds":
        Dataset("image",          xarm_bimanual,     EULER, ("pose_r",) + PAD * 2),
    "berkeley_mvp_converted_externally_to_rlds":
        Dataset(None,             identity,          QUAT,  ("pose", "gripper"), wrist="hand_image",
                action_encoding="JOINT_POS"),
    "berkeley_rpt_converted_externally_to_rlds":
        Dataset(None,             identity,          JOINT, ("joint_pos", "gripper"), wrist="hand_image",
                action_encoding="JOINT_POS"),
    "kaist_nonprehensile_converted_externally_to_rlds":
        Dataset("image",          kaist,             QUAT,  ("state", None)),
    "stanford_mask_vit_converted_externally_to_rlds":
        Dataset("image",          mask_vit,          EULER, POSE_LOWER),
    "tokyo_u_lsmo_converted_externally_to_rlds":
        Dataset("image",          split_state,       EULER, POSE_LOWER),
    "dlr_sara_pour_converted_externally_to_rlds":
        Dataset("image",          identity,          EULER, ("state",) + PAD * 2),
    "dlr_sara_grid_clamp_converted_externally_to_rlds":
        Dataset("image",          sara_grid_clamp,   EULER, ("state",) + PAD * 2),
    "dlr_edan_shared_control_converted_externally_to_rlds":
        Dataset("image",          edan,              EULER, ("state", None)),
    "asu_table_top_converted_externally_to_rlds":
        Dataset("image",          asu_table_top,     EULER, POSE_LOWER),
    "stanford_robocook_converted_externally_to_rlds":
        Dataset("image_1",        split_state,       EULER, POSE_LOWER, secondary="image_2", primary_depth="depth_1",
                secondary_depth="depth_2"),
    "imperialcollege_sawyer_wrist_cam":
        Dataset("image",          drop_last_action,  NONE,  PAD * 7 + ("state",), wrist="wrist_image"),
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds":
        Dataset("image",          iamlab,            JOINT, ("joint_state", "gripper_state"), wrist="wrist_image"),
    "libero_4_task_suites_no_noops":
        Dataset("image",          libero,            EULER, ("EEF_state", "gripper_state"), wrist="wrist_image"),
    # The demonstrations of the toy world (toy/): as trained first, in the changed world, and in chunks
    "toy":                         TOY,
    "toy_changed":                 TOY,
    "toy_chunks":                  TOY,
}
# fmt: on

# -----------------------------------------------------------------------------
# Mixtures: (dataset, weight). Frames are drawn with probability weight x number of steps, normalised. Official:
# oxe/mixtures.py, "as listed" there, with repeats and refused datasets; `mixture` below gives what is really used.

# fmt: off
MIXTURES: dict[str, list[tuple[str, float]]] = {
    "bridge":      [("bridge_orig", 1.0)],
    "bridge_rt_1": [("bridge_orig", 1.0), ("fractal20220817_data", 1.0)],
    "rtx": [
        ("fractal20220817_data", 0.54087122203), ("kuka", 0.8341046294), ("bridge_orig", 1.0), ("taco_play", 2.0),
        ("jaco_play", 2.0), ("berkeley_cable_routing", 3.0), ("roboturk", 1.0), ("viola", 2.0),
        ("berkeley_autolab_ur5", 1.0), ("toto", 1.0),
    ],
    "oxe_magic_soup": [
        ("fractal20220817_data", 0.54087122203), ("kuka", 0.8341046294), ("bridge_orig", 1.0), ("taco_play", 2.0),
        ("jaco_play", 1.0), ("berkeley_cable_routing", 1.0), ("roboturk", 2.0), ("viola", 2.0),
        ("berkeley_autolab_ur5", 2.0), ("toto", 1.0), ("language_table", 0.1),
        ("stanford_hydra_dataset_converted_externally_to_rlds", 2.0),
        ("austin_buds_dataset_converted_externally_to_rlds", 1.0),
        ("nyu_franka_play_dataset_converted_externally_to_rlds", 3.0),
        ("furniture_bench_dataset_converted_externally_to_rlds", 0.1),
        ("ucsd_kitchen_dataset_converted_externally_to_rlds", 2.0),
        ("austin_sailor_dataset_converted_externally_to_rlds", 1.0),
        ("austin_sirius_dataset_converted_externally_to_rlds", 1.0),
        ("dlr_edan_shared_control_converted_externally_to_rlds", 1.0),
        ("iamlab_cmu_pickup_insert_converted_externally_to_rlds", 1.0),
        ("utaustin_mutex", 1.0), ("berkeley_fanuc_manipulation", 2.0), ("cmu_stretch", 1.0),
    ],
}
MIXTURES["rtx_franka"] = MIXTURES["rtx"] + [
    ("taco_play", 1.0), ("berkeley_cable_routing", 1.0), ("viola", 1.0), ("toto", 1.0),
    ("stanford_hydra_dataset_converted_externally_to_rlds", 1.0),
    ("austin_buds_dataset_converted_externally_to_rlds", 3.0),
    ("nyu_franka_play_dataset_converted_externally_to_rlds", 3.0),
    ("maniskill_dataset_converted_externally_to_rlds", 0.1),
    ("furniture_bench_dataset_converted_externally_to_rlds", 0.1),
    ("cmu_franka_exploration_dataset_converted_externally_to_rlds", 5.0),
    ("austin_sailor_dataset_converted_externally_to_rlds", 1.0),
    ("austin_sirius_dataset_converted_externally_to_rlds", 1.0),
    ("berkeley_rpt_converted_externally_to_rlds", 1.0),
    ("kaist_nonprehensile_converted_externally_to_rlds", 3.0),
    ("stanford_robocook_converted_externally_to_rlds", 1.0),
    ("iamlab_cmu_pickup_insert_converted_externally_to_rlds", 1.0),
    ("utaustin_mutex", 1.0), ("cmu_play_fusion", 1.0),
]
# OpenVLA's pretraining data: first with DROID, then without DROID and Language Table and with all of RT-1.
MIXTURES["oxe_magic_soup_plus"] = MIXTURES["oxe_magic_soup"] + [
    ("bc_z", 0.2), ("fmb_dataset", 1.0), ("dobbe", 0.2), ("droid", 0.06),  # bc_z 0.1.0, later versions are broken
]
MIXTURES["oxe_magic_soup_plus_minus"] = [("fractal20220817_data", 1.0)] + [
    entry for entry in MIXTURES["oxe_magic_soup_plus"][1:] if entry[0] not in ("language_table", "droid")
]
MIXTURES["libero_4_task_suites_no_noops"] = [
    (f"libero_{suite}_no_noops", 1.0) for suite in ("spatial", "object", "goal", "10")
]
MIXTURES.update({name: [(name, 1.0)] for name in (
    "tdroid_carrot_in_bowl", "tdroid_pour_corn_in_pot", "tdroid_flip_pot_upright", "tdroid_move_object_onto_plate",
    "tdroid_knock_object_over", "tdroid_cover_object_with_towel", "droid_wipe",
    "libero_spatial_no_noops", "libero_object_no_noops", "libero_goal_no_noops", "libero_10_no_noops",
    "aloha1_fold_shorts_20_demos", "aloha1_fold_shirt_30_demos",
    "aloha1_scoop_X_into_bowl_45_demos", "aloha1_put_X_into_pot_300_demos",
)})
# fmt: on


# -----------------------------------------------------------------------------
# What other files call


def lookup(name: str) -> Dataset:
    """Return the row of a dataset. Raises KeyError with the nearest names if there is none."""
    if name not in DATASETS:
        raise KeyError(f"no dataset {name!r} in oxe.DATASETS; nearest: {nearest_names(name, [*DATASETS])}")
    return DATASETS[name]


def nearest_names(name: str, known: list[str]) -> str:
    """Return the known names that look like `name`, for error messages."""
    names = difflib.get_close_matches(name, known, n=5, cutoff=0.3)
    return ", ".join(dict.fromkeys(names)) or "none"


def mixture(name: str) -> list[tuple[str, float]]:
    """
    Return the (dataset, weight) pairs that training really uses for a mixture, or [(name, 1.0)] for a single dataset.

    As officially, the first of repeated names wins (rtx_franka lists four twice) and JOINT_POS datasets are left out
    (rtx_franka lists berkeley_rpt). A JOINT_POS dataset asked for by its own name is given; officially it is refused.
    Raises KeyError with the nearest names if there is neither such a mixture nor such a dataset.
    """
    if name in MIXTURES:
        weights = {}
        for dataset, weight in MIXTURES[name]:
            if dataset not in weights and lookup(dataset).action_encoding != "JOINT_POS":
                weights[dataset] = weight
        return list(weights.items())

    if name in DATASETS:
        return [(name, 1.0)]
    raise KeyError(f"no mixture or dataset {name!r}; nearest: {nearest_names(name, [*MIXTURES, *DATASETS])}")


def standardize(dataset: str | Dataset, trajectory: Trajectory, rng: np.random.Generator | None = None) -> Trajectory:
    """
    Convert one raw trajectory to the common form described at the top of this file.

    dataset: a name in DATASETS, or a row. trajectory: nested dict of arrays with leading axis T >= 1; the Bridge
    datasets come back with T - 2 steps. rng: the official DROID transform exchanges the two exterior cameras of half of
    the trajectories, chosen at random, as training sees only one; here that happens if you pass a generator.
    Raises KeyError for an unknown name, for a key the trajectory lacks, and for an array where a dict should be or the
    reverse; the message lists the keys present and their shapes.
    """
    row = lookup(dataset) if isinstance(dataset, str) else dataset
    try:
        if row.action:
            trajectory = updated(trajectory, action=join_action(trajectory, row.action))
        new = row.standardize(trajectory)
        if row.swap_images and rng is not None and rng.random() <= 0.5:
            one, two = row.swap_images
            images = new["observation"]
            new = updated(new, observation={one: images[two], two: images[one]})
    except KeyError as error:
        problem = f"has no key {error}"
        raise KeyError(layout_message(dataset, trajectory, problem)) from error
    except (IndexError, TypeError) as error:  # an array in place of a dict, or the reverse
        problem = f"has another layout ({error})"
        raise KeyError(layout_message(dataset, trajectory, problem)) from error
    return new


def join_action(trajectory: Trajectory, keys: tuple[str, ...]) -> np.ndarray:
    """Return the actions under some keys of a raw trajectory, side by side, (T, A)."""
    columns = []
    for key in keys:
        parts = [key] if key in trajectory else key.split("/")
        column = trajectory
        for part in parts:
            column = column[part]
        columns.append(column.reshape(len(column), -1))
    return cat(*columns)


def layout_message(dataset: str | Dataset, trajectory: Trajectory, problem: str) -> str:
    """Return the message for a trajectory that does not fit its row: what is wrong, and which keys are there."""
    if isinstance(dataset, str):
        name = dataset
    else:
        name = dataset.name or "this dataset"
    return f"{name}: the trajectory {problem}; keys present: {', '.join(key_list(trajectory))}"
