"""
The toy world as finetune_rl.py plays in it: many scenes at once, in one process.

    environment = ToyEnvironment()
    environment.reset([0, 1, 2])                        # three scenes, by their numbers
    images = environment.observe([0, 1, 2])             # of each (224, 224, 3) uint8
    environment.step([0, 1, 2], actions)                # (3, 7), in metres and radians
    environment.success                                 # (3,) bool

No scene of it is one of the demonstrations', or of those that a policy is evaluated in.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from toy import world


@dataclass
class ToyEnvironment:
    setting: world.World = world.STANDARD
    max_steps: int = world.MAX_STEPS  # of an episode
    most_at_once: int = 512  # episodes
    noise: float = 0.0  # metres, spread of what is done around each action, as in demonstrations

    scenes: list[world.Scene] = field(default_factory=list, init=False, repr=False)
    rngs: list[np.random.Generator] = field(default_factory=list, init=False, repr=False)  # of the disturbances

    def reset(self, seeds: Sequence[int]):
        """Start an episode in each of the scenes with these numbers."""
        self.scenes = [world.make_scene(world.PRACTICE, seed, self.setting) for seed in seeds]
        self.rngs = [np.random.default_rng([world.PRACTICE, seed, 1]) for seed in seeds]

    @property
    def instructions(self) -> list[str]:
        return [scene.instruction(scene.named) for scene in self.scenes]

    @property
    def success(self) -> np.ndarray:
        """Return which episodes have reached their goal, (n,) bool."""
        return np.array([scene.is_done(scene.named) for scene in self.scenes], bool)

    def observe(self, episodes: Sequence[int]) -> list[np.ndarray]:
        """Return what the camera sees in these episodes, (224, 224, 3) uint8 each."""
        return [world.draw(self.scenes[i], self.setting) for i in episodes]

    def step(self, episodes: Sequence[int], actions: np.ndarray):
        """Carry out one action in each of these episodes, (len(episodes), 7)."""
        for i, action in zip(episodes, actions, strict=True):
            noise = world.disturbance(self.noise, self.rngs[i])
            world.step(self.scenes[i], action + noise, self.setting)

    def expert(self, episodes: Sequence[int]) -> np.ndarray:
        """Return what the expert would do now in these episodes, (len(episodes), 7)."""
        actions = []
        for i in episodes:
            scene = self.scenes[i]
            actions.append(world.expert(scene, scene.named, self.setting))
        return np.stack(actions)
