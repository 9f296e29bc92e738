"""The environments of finetune_rl.py: start states, and LIBERO's protocol with threads in the place of simulators."""

import contextlib
import threading
from multiprocessing import Pipe

import numpy as np
import pytest

from libero_sim.environment import FIRST_TRIAL, LiberoEnvironment
from libero_sim.simulator import SUITES
from libero_sim.workers import Worker
from toy import world
from toy.environment import ToyEnvironment


def test_start_states_are_none_of_the_demonstrations_or_of_the_evaluation():
    environment = ToyEnvironment()
    environment.reset(range(300))
    practised = {run.scene.objects.tobytes() for run in environment.runs}
    assert len(practised) == 300
    for seed in (world.TRAIN, world.VAL, world.TEST):
        others = {world.make_scene(seed, i, world.STANDARD).objects.tobytes() for i in range(1000)}
        assert not practised & others


def test_the_same_number_is_the_same_scene():
    environment = ToyEnvironment(noise=0.01)
    environment.reset([7, 7, 8])
    action = np.tile([0.05, 0.05, 0, 0, 0, 0, 1.0], (3, 1))
    for _ in range(3):
        environment.step([0, 1, 2], action)
        first, second, other = environment.observe([0, 1, 2])
        assert (first == second).all() and (first != other).any()


def test_the_expert_of_the_toy_environment_succeeds():
    environment = ToyEnvironment()
    environment.reset(range(40))
    for _ in range(environment.max_steps):
        active = np.flatnonzero(~environment.success).tolist()
        if not active:
            break
        environment.step(active, environment.expert(active))
    assert environment.success.mean() >= 0.95
    assert environment.instructions[0].split()[-1] in world.SHAPES


def play_in_thread(conn):
    """A simulator that succeeds once the gripper is closed, and breaks in task 9."""
    with contextlib.suppress(EOFError):  # the end of the test
        serve_jobs(conn)


def serve_jobs(conn):
    for job in iter(conn.recv, None):
        if job["task"] == 9:
            conn.send({"error": "it broke"})
            continue
        success = False
        for step in range(job["max_steps"]):
            conn.send((np.full((2, 2, 3), 10 * job["trial"] + step), f"task {job['task']}"))
            success = conn.recv()[6] < 0.5
            if success:
                break
        conn.send({"success": success})


class Threads(LiberoEnvironment):
    def start_workers(self):
        if self.workers:
            return
        self.task_numbers = [int(number) for number in self.tasks.split(",")]
        for _ in range(self.num_envs):
            ours, theirs = Pipe()
            threading.Thread(target=play_in_thread, args=(theirs,), daemon=True).start()
            self.workers.append(Worker(None, ours))


def test_libero_plays_side_by_side():
    environment = Threads(num_envs=3, tasks="3,5", max_steps=2)
    wait = np.array([0, 0, 0, 0, 0, 0, 1.0])
    close = np.array([0, 0, 0, 0, 0, 0, 0.0])
    for _ in range(2):  # the same processes play the next episodes
        environment.reset([4, 5, 4])
        assert environment.instructions == ["task 3", "task 5", "task 3"]
        assert [image[0, 0, 0] - 10 * FIRST_TRIAL for image in environment.observe([0, 1, 2])] == [40, 50, 40]

        environment.step([0, 1, 2], np.stack([wait, close, wait]))
        assert environment.success.tolist() == [False, True, False]
        assert [image[0, 0, 0] - 10 * FIRST_TRIAL for image in environment.observe([0, 2])] == [41, 41]

        environment.step([0, 2], np.stack([close, wait]))
        assert environment.success.tolist() == [True, True, False]


def test_a_broken_simulator_is_an_error_and_no_failure_of_the_policy():
    environment = Threads(num_envs=1, tasks="9", max_steps=2)
    with pytest.raises(OSError, match=f"LIBERO task 9, start state {FIRST_TRIAL + 3}: it broke"):
        environment.reset([3])


def test_libero_has_the_official_limits():
    assert LiberoEnvironment("libero_goal").max_steps == SUITES["libero_goal"]
    with pytest.raises(ValueError, match="suite 'libero_goals': must be one of libero_spatial"):
        LiberoEnvironment("libero_goals")
    assert repr(LiberoEnvironment()) == repr(LiberoEnvironment())  # a resumed run compares it


def test_toy_detours_lead_the_hand_astray():
    """With `detour` the first steps do something else than the actions say; later ones do what they say."""
    straight = ToyEnvironment()
    astray = ToyEnvironment(detour=1.0)
    starts = list(range(20))
    for environment in (straight, astray):
        environment.reset(starts)
        for _ in range(environment.max_steps):
            left = [i for i in starts if not environment.success[i]]
            if left:
                environment.step(left, environment.expert(left))
    assert straight.success.all()

    def steps(environment):
        return sum(run.steps for run in environment.runs)

    assert steps(astray) > steps(straight) + 20
    again = ToyEnvironment(detour=1.0)
    again.reset(starts)
    assert [run.steps_astray for run in again.runs] == [run.steps_astray for run in astray.runs]
