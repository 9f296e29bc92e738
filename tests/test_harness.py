"""The server for vla-eval, asked by that package's own client: handshake, observation, chunk, reset, errors."""

import re
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from common import ROOT, free_port, shared, simulator

from configurator import configure
from libero_sim.simulator import to_simulator
from model import OpenVLA
from oft import OFT, OFTConfig, save_oft
from policy import load_policy, pick_engine, predict_action, predict_chunk
from robots import harness
from tokenizer import make_standin

ACTION = np.array([0.1, -0.2, 0.3, 0.0, 0.1, -0.1, 0.9])


@pytest.fixture(scope="module")
def folder(folders, tmp_path_factory):
    folder = shutil.copytree(folders["tiny-openvla"], tmp_path_factory.mktemp("harness") / "m")
    make_standin(folder / "tokenizer.model")
    return folder


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (256, 256, 3), np.uint8)


def observation(seed: int, text: str = "lift it", **more) -> dict:
    return {"images": {"agentview": picture(seed)}, "task_description": text, **more}


# -----------------------------------------------------------------------------
# Without the package


@pytest.mark.parametrize("gripper", [0.0, 0.3, 0.7, 1.0])
def test_gripper_as_our_own_evaluation_has_it(gripper):
    chunk = np.stack([np.append(ACTION[:-1], gripper)] * 2)
    before = chunk.copy()
    found = harness.convert_gripper(chunk, "libero")
    np.testing.assert_array_equal(found, [to_simulator(action) for action in chunk])
    np.testing.assert_array_equal(chunk, before)


def test_grippers_of_the_other_benchmarks():
    """As their step functions read it: above 0 for CALVIN, above or below one half for the others."""
    opened, closed = (np.append(ACTION[:-1], gripper)[None] for gripper in (1.0, 0.0))
    assert harness.convert_gripper(opened, "calvin")[0, -1] > 0 > harness.convert_gripper(closed, "calvin")[0, -1]
    assert harness.convert_gripper(opened, "simpler")[0, -1] > 0.5 > harness.convert_gripper(closed, "simpler")[0, -1]
    found = [harness.convert_gripper(chunk, "maniskill2")[0, -1] for chunk in (opened, closed)]
    assert found[0] < 0.5 < found[1]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"images": {}}, r"the observation has the images \[\], .* takes 1"),
        ({"images": None}, "has the images NoneType"),
        ({"task_description": ""}, "instruction"),
        ({"images": {"agentview": np.zeros((4, 4, 3))}}, "uint8"),
    ],
)
def test_observations_that_are_none(folder, change, message):
    policy = load_policy(folder, torch.float32)
    with pytest.raises((ValueError, TypeError), match=message):
        harness.answer(policy, {**observation(0), **change}, harness.Config(unnorm_key="toy"), None)


def test_command_line(folder, capsys, monkeypatch):
    monkeypatch.setattr(harness, "import_harness", lambda: None)
    for argv, reason in (
        ([], "give --checkpoint"),
        (["--checkpoint", str(folder), "--benchmark", "chess"], "must be one of libero, robocasa, calvin"),
        (["--checkpoint", str(folder)], "several datasets and no unnorm_key"),
        (["--checkpoint", str(folder), "--unnorm_key", "toy", "--open_loop", "4"], "answers with 1 actions"),
    ):
        with pytest.raises(SystemExit) as end:
            harness.main(configure(harness.Config, argv))
        assert end.value.code == 2 and reason in capsys.readouterr().err


# -----------------------------------------------------------------------------
# With the package's own client


@pytest.fixture
def client_of_harness():
    """run(policy, cfg, talk): starts a server, and lets `talk(connection)` ask it."""
    pytest.importorskip("vla_eval", reason="pip install -r requirements-ecosystem.txt")
    import anyio
    from vla_eval.connection import Connection
    from vla_eval.model_servers.serve import serve_async

    def run(policy, cfg, talk):
        port = free_port()
        results = []

        async def both():
            async with anyio.create_task_group() as group:
                await group.start(serve_async, harness.make_server(policy, cfg), "127.0.0.1", port)
                async with Connection(f"ws://127.0.0.1:{port}") as connection:
                    results.append(await talk(connection))
                group.cancel_scope.cancel()

        thread = threading.Thread(target=anyio.run, args=(both,))
        thread.start()
        thread.join(120)
        assert not thread.is_alive() and results
        return results[0]

    return run


@pytest.mark.filterwarnings("ignore:not an action")
def test_an_episode(client_of_harness, folder):
    policy = load_policy(folder, torch.float32)
    policy.engine = pick_engine(policy, "auto")
    seeds = (0, 1, 2, 0)
    want = [predict_action(policy, [picture(seed)], ["lift it"], "toy")[0] for seed in seeds]

    async def talk(connection):
        info = connection.server_info
        await connection.start_episode({"task": {"name": "lift it"}})
        actions = [(await connection.act(observation(seed)))["actions"] for seed in seeds]
        with pytest.raises(RuntimeError, match=r"the observation has the images \[\]"):
            await connection.act({"images": {}, "task_description": "lift it"})
        actions.append((await connection.act(observation(0)))["actions"])  # it goes on after an error
        await connection.end_episode({"metrics": {}})
        return info, actions

    info, actions = client_of_harness(policy, harness.Config(unnorm_key="toy"), talk)
    assert info["observation_params"] == {"env_seed": 0, "quat_no_antipodal": True}
    for action, expected in zip(actions, [*want, want[0]], strict=True):
        np.testing.assert_allclose(action, to_simulator(expected), atol=1e-6)


def test_chunks_and_a_reset(client_of_harness, folder, tmp_path):
    """Each observation gets the next action of the chunk; a new episode begins with a new chunk."""
    oft = shutil.copytree(folder, tmp_path / "oft")
    save_oft(
        OFT(OpenVLA.from_pretrained(oft, torch.float32), OFTConfig(action_chunk=3, proprio_dim=7)), oft, torch.float32
    )
    policy = load_policy(oft, torch.float32)
    cfg = harness.Config(open_loop=2, unnorm_key="toy")

    def seen(seed):
        images = {"agentview": picture(seed), "wrist": picture(seed + 50)}
        return {"images": images, "task_description": "lift it", "states": np.full(7, 0.1)}

    def chunk(seed):
        images = list(seen(seed)["images"].values())
        return predict_chunk(policy, [images], ["lift it"], np.full((1, 7), 0.1), "toy")[0]

    async def talk(connection):
        await connection.start_episode({"task": {}})
        first = [(await connection.act(seen(seed)))["actions"] for seed in (0, 1, 2)]
        await connection.start_episode({"task": {}})
        return connection.server_info, [*first, (await connection.act(seen(3)))["actions"]]

    info, actions = client_of_harness(policy, cfg, talk)
    assert info["observation_params"]["send_state"] and info["observation_params"]["send_wrist_image"]
    want = [chunk(0)[0], chunk(0)[1], chunk(2)[0], chunk(3)[0]]
    for action, expected in zip(actions, want, strict=True):
        np.testing.assert_allclose(action, to_simulator(expected), atol=1e-6)


# -----------------------------------------------------------------------------
# An episode of LIBERO, by our own evaluation and by the harness

BOTH_WAYS = """
import sys
import anyio, numpy as np, torch
from functools import partial
from eval_libero import Config, answer, prepare_as_trained
from libero_sim.simulator import Simulator, set_up_libero, to_simulator
from policy import load_policy
from robots import harness

STEPS = 8
set_up_libero(sys.argv[2])
policy = load_policy(sys.argv[1], torch.float32)
prepare_as_trained(policy)


def ours():
    sim = Simulator("libero_spatial", 0, ("image",), False)
    sim.start(0)
    action = np.zeros(7)
    for _ in range(STEPS):
        (chunk,) = answer(policy, "toy", Config(), [([sim.image()], sim.instruction, sim.state(), action)])
        action = chunk[0]
        sim.step(to_simulator(action))
    return sim.full_state()


async def theirs():
    from vla_eval.benchmarks.libero.benchmark import LIBEROBenchmark
    from vla_eval.connection import Connection
    from vla_eval.model_servers.serve import serve_async
    from vla_eval.runners.sync_runner import SyncEpisodeRunner

    server = harness.make_server(policy, harness.Config(unnorm_key="toy"))
    benchmark = LIBEROBenchmark("libero_spatial", **server.get_observation_params())
    async with anyio.create_task_group() as group:
        port = await group.start(partial(serve_async, server, "127.0.0.1", 0))
        async with Connection(f"ws://127.0.0.1:{port}", timeout=300) as connection:
            task = {**benchmark.get_tasks()[0], "episode_idx": 0}
            await SyncEpisodeRunner().run_episode(benchmark, task, connection, max_steps=STEPS)
        group.cancel_scope.cancel()
    return benchmark._env.get_sim_state()


first, second = ours(), anyio.run(theirs)
print("DIFFERENCE", np.abs(first - second).max(), "MOVED", np.abs(first[1:8]).max())
"""


def test_libero_ends_in_the_same_state(folder):
    pytest.importorskip("vla_eval", reason="pip install -r requirements-ecosystem.txt")
    simulator()
    assets = shared("libero/assets")
    command = [sys.executable, "-W", "ignore", "-c", BOTH_WAYS, str(folder), str(assets)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    difference, moved = (float(number) for number in re.search("DIFFERENCE (.*) MOVED (.*)", done.stdout).groups())
    assert difference < 1e-6 < moved, done.stdout  # the harness hands out actions in float32, ours are float64
