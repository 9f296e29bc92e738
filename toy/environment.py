"""
The toy world as finetune_rl.py plays in it: many scenes at once, in one process.

    environment = ToyEnvironment()
    environment.reset([0, 1, 2])                        # three scenes, by their numbers
    images = environment.observe([0, 1, 2])             # of each (SIZE, SIZE, 3) uint8
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
    detour: float = 0.0  # share of the episodes in which the hand is led astray first, as in demonstrations

    runs: list[world.Run] = field(default_factory=list, init=False, repr=False)
    rngs: list[np.random.Generator] = field(default_factory=list, init=False, repr=False)  # of the disturbances

    def reset(self, seeds: Sequence[int]):
        """Start an episode in each of the scenes with these numbers."""
        self.runs = []
        self.rngs = []
        for seed in seeds:
            scene = world.make_scene(world.PRACTICE, seed, self.setting)
            rng = np.random.default_rng([world.PRACTICE, seed, 1])
            run = world.Run(scene, scene.named, scene.instruction(scene.named), is_recorded=False)
            if self.detour:
                world.plan_detour(run, self.detour, rng)
            self.runs.append(run)
            self.rngs.append(rng)

    @property
    def instructions(self) -> list[str]:
        return [run.instruction for run in self.runs]

    @property
    def success(self) -> np.ndarray:
        """Return which episodes have reached their goal, (n,) bool."""
        return np.array([run.scene.is_done(run.goal) for run in self.runs], bool)

    def observe(self, episodes: Sequence[int]) -> list[np.ndarray]:
        """Return what the camera sees in these episodes, (SIZE, SIZE, 3) uint8 each."""
        return [world.draw(self.runs[i].scene, self.setting) for i in episodes]

    def step(self, episodes: Sequence[int], actions: np.ndarray):
        """Carry out one action in each of these episodes, (len(episodes), 7)."""
        for i, action in zip(episodes, actions, strict=True):
            run = self.runs[i]
            if run.steps < run.steps_astray:
                action = world.lead_astray(run, self.setting, self.rngs[i])
            noise = world.disturbance(self.noise, self.rngs[i])
            world.step(run.scene, action + noise, self.setting)
            run.steps += 1

    def expert(self, episodes: Sequence[int]) -> np.ndarray:
        """Return what the expert would do now in these episodes, (len(episodes), 7)."""
        actions = []
        for i in episodes:
            run = self.runs[i]
            actions.append(world.expert(run.scene, run.goal, self.setting))
        return np.stack(actions)
