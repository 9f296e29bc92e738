"""
Your own data as a dataset: any sequence of frames, or of episodes, which are sequences of frames.

    frame = {"front": image, "wrist": image, "action": (A,), "joints": (P,), "instruction": "fold the cloth"}
    Samples([[frame, frame, ...], [frame, ...]], name="my_robot", cameras=("front", "wrist"), state="joints")

    samples -> read_episode: actions, states and instructions, checked once and kept in memory
            -> frame i: its images are read when they are asked for

Axes: n frames of all episodes, T frames of an episode, A action dimensions, K actions of a chunk, P state dimensions.
"""

from collections.abc import Callable, Iterable, Sequence
from copy import copy

import numpy as np
from torch.utils.data import Dataset

from formats.dataset import as_names, name_actions, split_episodes
from normalize import SCHEME, compute_statistics

STATE = "state"
INSTRUCTION = "instruction"


class Samples(Dataset):
    """
    Your own data. See formats/dataset.py for what a dataset is. All frames are there, each with one action, until
    training asks for a split and for chunks with `select`.

    samples: a sequence, or an iterable (which is read once, into a list), of frames or of episodes. An episode is a
        sequence of frames. A frame is a dict of the image of each camera, (H, W, 3) uint8, a path or encoded bytes, of
        the action (A,), the state (P,) if the policy gets one, and `instruction`, a str.
    name: under which the statistics are stored, and found again with --unnorm_key.
    cameras: the keys of the images, in the order in which the model gets them.
    action, state: the keys of the numbers; several are joined. state None: "state" if frames have it; (): no state.
    gripper: False if the last dimension of the action is no gripper (1 open, 0 closed); then it is normalised, too.
    absolute: True if actions are targets, such as joint angles, and not changes.
    standardize: a function (T, A) -> (T, A') that turns the actions of an episode into your units.
    episodes: the numbers of the episodes to use; None: all.
    Raises ValueError that names the first frame that does not fit.
    """

    scheme = SCHEME

    def __init__(
        self,
        samples: Iterable,
        name: str = "mine",
        cameras: str | Sequence[str] = ("image",),
        action: str | Sequence[str] = "action",
        state: str | Sequence[str] | None = None,
        gripper: bool = True,
        absolute: bool = False,
        standardize: Callable[[np.ndarray], np.ndarray] | None = None,
        episodes: Iterable[int] | None = None,
    ):
        is_sequence = hasattr(samples, "__getitem__") and hasattr(samples, "__len__")
        self.samples = samples if is_sequence else list(samples)
        self.name = name
        self.cameras = as_names(cameras)
        self.bad_records = []
        self.user_code = (type(self.samples),)

        # Read all but the images.
        self.has_episodes = len(self.samples) > 0 and not isinstance(self.samples[0], dict)
        first = self.first_frame()
        if state is None:
            state = (STATE,) if STATE in first else ()
        self.action_keys = as_names(action)
        self.state_keys = as_names(state)
        self.shapes = {key: np.shape(first.get(key)) for key in (*self.action_keys, *self.state_keys)}
        self.episode_numbers = self.choose_episodes(episodes)
        parts = [self.read_episode(number, standardize) for number in self.episode_numbers]
        self.actions = np.concatenate([actions for actions, _, _ in parts])  # (n, A)
        self.states = np.concatenate([states for _, states, _ in parts])  # (n, P)
        self.instructions = [instruction for _, _, instructions in parts for instruction in instructions]

        # Frames of all episodes stand one behind the other.
        lengths = np.array([len(actions) for actions, _, _ in parts])
        self.ends = np.cumsum(lengths)  # (episodes,)
        self.episode_of = np.repeat(np.arange(len(lengths)), lengths)  # (n,)

        # What the numbers mean.
        A = self.actions.shape[1]
        self.action_names = name_actions(A, gripper, absolute)
        self.absolute_mask = (absolute,) * (A - 1) + (absolute or gripper,)
        mask = [True] * (A - 1) + [not gripper]
        self.statistics = {
            "action": {**compute_statistics([self.actions]), "mask": mask},
            "num_transitions": len(self.actions),
            "num_trajectories": len(self.episode_numbers) if self.has_episodes else 0,
        }
        if self.states.shape[1] > 0:
            self.statistics["proprio"] = compute_statistics([self.states])

        self.action_chunk = 1
        self.frames = np.arange(len(self.actions))

    # Read all but the images

    def first_frame(self) -> dict:
        """Return the first frame. Raises ValueError if the samples are neither frames nor episodes."""
        if len(self.samples) == 0:
            raise ValueError(f"{self.name}: no samples")
        first = self.samples[0]
        if not self.has_episodes:
            return first
        is_episode = hasattr(first, "__getitem__") and hasattr(first, "__len__") and len(first) > 0
        if not is_episode or not isinstance(first[0], dict):
            raise ValueError(
                f"{self.name}: sample 0 is {first!r:.60}; give dicts (frames), or lists of dicts (episodes)"
            )
        return first[0]

    def choose_episodes(self, episodes: Iterable[int] | None) -> list[int]:
        """Return the places in `samples` that are used."""
        if episodes is None:
            return list(range(len(self.samples)))
        numbers = list(episodes)
        if not self.has_episodes:
            raise ValueError(f"{self.name}: episodes= needs episodes, but the samples are frames; give lists of frames")
        is_known = all(number in range(len(self.samples)) for number in numbers)
        if not is_known or len(set(numbers)) != len(numbers) or not numbers:
            raise ValueError(
                f"{self.name}: episodes={numbers[:9]}: name some of 0 to {len(self.samples) - 1}, each once"
            )
        return numbers

    def read_episode(self, number: int, standardize: Callable | None) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Check the frames of an episode. Return its actions (T, A), states (T, P) and T instructions."""
        frames = self.samples[number] if self.has_episodes else [self.samples[number]]
        if len(frames) == 0:
            raise ValueError(f"{self.name}: episode {number} has no frames; leave it out")
        actions = []
        states = []
        instructions = []
        for step in range(len(frames)):
            frame = frames[step]
            self.check_frame(frame, number, step)
            actions.append(join_numbers(frame, self.action_keys))
            states.append(join_numbers(frame, self.state_keys))
            instructions.append(frame[INSTRUCTION])

        actions = np.stack(actions)
        if standardize is not None:
            actions = np.asarray(standardize(actions), np.float32)
            if actions.ndim != 2 or len(actions) != len(frames) or not np.isfinite(actions).all():
                raise ValueError(
                    f"{self.name}: standardize made {actions.shape} of episode {number}, expected finite numbers "
                    f"({len(frames)}, A)"
                )
        return actions, np.stack(states), instructions

    def check_frame(self, frame: dict, number: int, step: int):
        """Raise ValueError if a frame lacks something, or has numbers of another shape than the first one."""
        where = f"{self.name}: episode {number}, frame {step}" if self.has_episodes else f"{self.name}: sample {number}"
        if not isinstance(frame, dict):
            raise ValueError(f"{where} is {frame!r:.60}, expected a dict")
        missing = {*self.cameras, *self.shapes, INSTRUCTION} - frame.keys()
        if missing:
            raise ValueError(
                f"{where} has no {sorted(missing)}, its keys are {sorted(frame)}; name yours with cameras=, action=, "
                f"state="
            )
        if not isinstance(frame[INSTRUCTION], str):
            raise ValueError(f"{where} has instruction {frame[INSTRUCTION]!r:.60}, which is no str")
        for key, shape in self.shapes.items():
            numbers = np.asarray(frame[key], np.float32)
            if numbers.shape != shape or numbers.ndim > 1 or not np.isfinite(numbers).all():
                raise ValueError(f"{where} has {key} {numbers}, expected finite {shape}")

    # Which frames may start a sample

    def find_frames(self, split: str, action_chunk: int, hold_out: float) -> np.ndarray:
        """Return the frames of a split that may start a chunk, (frames,)."""
        if action_chunk > 1 and not self.has_episodes:
            raise ValueError(
                f"{self.name}: chunks of {action_chunk} actions, but single frames do not say what comes next; give "
                f"Samples a list of episodes, each a list of frames"
            )
        steps_left = self.ends[self.episode_of] - np.arange(len(self.episode_of))
        episodes = split_episodes(len(self.ends), split, hold_out)
        frames = np.flatnonzero((steps_left >= action_chunk) & np.isin(self.episode_of, episodes))
        if len(frames) == 0 and split == "train":
            longest = np.diff(self.ends, prepend=0).max()
            raise ValueError(
                f"{self.name}: no frame to train on: {len(self.ends)} episodes of up to {longest} frames, hold_out "
                f"{hold_out:g}, chunks of {action_chunk} actions"
            )
        return frames

    def select(self, split: str, action_chunk: int, hold_out: float) -> "Samples":
        """Return the same data as another split, with chunks of another length, without reading it again."""
        other = copy(self)
        other.action_chunk = action_chunk
        other.frames = self.find_frames(split, action_chunk, hold_out)
        return other

    # One frame

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, i: int) -> dict:
        frame = self.frames[i]
        episode = self.episode_of[frame]
        first = self.ends[episode - 1] if episode > 0 else 0
        sample = self.samples[self.episode_numbers[episode]]
        images = sample[int(frame - first)] if self.has_episodes else sample

        end = min(frame + self.action_chunk, self.ends[episode])
        return {
            "pictures": [images[camera] for camera in self.cameras],
            "actions": self.actions[frame:end].copy(),  # (up to K, A)
            "instruction": self.instructions[frame],
            "proprio": self.states[frame].copy(),
        }

    def instruction(self, i: int) -> str:
        return self.instructions[self.frames[i]]

    def all_actions(self) -> tuple[np.ndarray, np.ndarray | None]:
        episodes = self.episode_of[self.frames] if self.has_episodes else None
        return self.actions[self.frames], episodes


def join_numbers(frame: dict, keys: tuple[str, ...]) -> np.ndarray:
    """Return the numbers of a frame under these keys, one behind the other, float32."""
    parts = [np.zeros(0, np.float32)]
    parts += [np.asarray(frame[key], np.float32).reshape(-1) for key in keys]
    return np.concatenate(parts)
