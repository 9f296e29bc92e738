"""The evaluation in LIBERO: what needs no simulator, and with one (requirements-libero.txt) a few short episodes."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from common import GOLDENS, ROOT, shared, simulator
from safetensors.numpy import load_file

import eval_libero as E
import image
from configurator import configure
from formats import oxe, rlds
from image import encode_jpeg
from libero_sim import jobs, regenerate, report, workers
from libero_sim import simulator as S
from metrics import wilson

PROTOCOL = dict(task_suite="libero_spatial", policy="noop")


def row(task, trial, success=False, **more):
    spent = dict(start=1.0, policy=0.5, simulator=2.0)
    return dict(task=task, trial=trial, instruction=f"task {task}", success=success, steps=9, seconds=spent) | more


# -----------------------------------------------------------------------------
# Pictures and grippers


def test_gripper_there_and_back():
    """A simulator's command -> what the data pipeline makes of it -> what the policy's answer becomes again."""
    commands = np.array([[0.1] * 6 + [-1.0], [0.2] * 6 + [1.0]], np.float32)
    observation = dict(state=np.zeros((2, 8), np.float32))
    learned = oxe.libero(dict(action=commands, observation=observation))["action"]
    assert learned[:, 6].tolist() == [1, 0]  # open, closed
    for command, action in zip(commands, learned, strict=True):
        np.testing.assert_array_equal(S.to_simulator(action), command)


@pytest.mark.parametrize("said, want", [(0.996, -1), (0.51, -1), (0.49, 1), (-0.004, 1), (0.0, 1)])
def test_gripper_is_binary(said, want):
    action = np.array([0.3, -2.0, 0, 0, 0, 0, said])
    got = S.to_simulator(action)
    assert got[6] == want and (got[:6] == action[:6]).all() and action[6] == said


def test_picture_is_turned_by_180_degrees():
    raw = np.zeros((256, 256, 3), np.uint8)
    raw[10, 20] = (1, 2, 3)
    turned = S.upright(raw)
    assert turned[245, 235].tolist() == [1, 2, 3] and turned.sum() == 6 and raw[10, 20].tolist() == [1, 2, 3]


def test_picture_for_the_policy_as_in_tensorflow():
    """JPEG round trip, then Lanczos3, against the official evaluation's resize_image."""
    tensors = load_file(GOLDENS / "eval_preproc.safetensors")
    for picture in ("bridge_64x64", "bridge_mosaic_192x256", "scene_640x480"):
        rgb = image.to_rgb(GOLDENS / "images" / f"{picture}.png")
        got = image.resize_lanczos3(image.decode(encode_jpeg(rgb)), 224)
        key = next(k for k in tensors if picture in k and "/resize_image_for_policy/s8" in k).removesuffix("s8")
        assert np.abs(got[::8, ::8].astype(int) - tensors[key + "s8"]).max() <= 1
        for axis, sums in ((0, "col_sums"), (1, "row_sums")):
            assert np.abs(got.sum(axis, dtype=int) - tensors[key + sums]).sum() <= 150


@pytest.mark.parametrize("degrees", [0, 10, 90, 180, 350])
def test_axis_angle(degrees):
    half, axis = np.deg2rad(degrees) / 2, np.array([0.6, 0, 0.8])
    got = S.axis_angle(np.append(axis * np.sin(half), np.cos(half)))
    np.testing.assert_allclose(got, axis * np.deg2rad(degrees), atol=1e-7)


# -----------------------------------------------------------------------------
# Demonstrations


def test_noops():
    move, still, closed = [0.5] + [0] * 5 + [-1], [0] * 6 + [-1], [0] * 6 + [1]
    tiny = [9e-5] + [0] * 5 + [1]
    kept = regenerate.without_noops(np.array([still, move, still, closed, closed, tiny, move], float))
    assert kept.tolist() == [move, closed, move]


def test_raw_demonstrations(tmp_path, monkeypatch):
    h5py = pytest.importorskip("h5py", reason="needs the optional h5py")
    task = type("Task", (), dict(name="open_it"))
    monkeypatch.setattr(regenerate, "tasks", lambda suite: [task])
    with pytest.raises(ValueError, match="open_it_demo.hdf5: missing"):
        regenerate.find_demonstrations(tmp_path, "libero_goal", [0])
    with h5py.File(tmp_path / "open_it_demo.hdf5", "w") as file:
        for i in range(2):
            file[f"data/demo_{i}/states"] = np.full((4, 9), i, float)
            file[f"data/demo_{i}/actions"] = np.full((4, 7), i, np.float32)
    jobs = regenerate.find_demonstrations(tmp_path, "libero_goal", [0])
    state, actions = regenerate.read_demonstration(jobs[1])
    assert [job["trial"] for job in jobs] == [0, 1] and (state == 1).all() and actions.shape == (4, 7)

    with h5py.File(tmp_path / "open_it_demo.hdf5", "a") as file:
        del file["data/demo_1/actions"]
    with pytest.raises(ValueError, match="open_it_demo.hdf5: no demonstrations"):
        regenerate.find_demonstrations(tmp_path, "libero_goal", [0])


class FakeSimulator:
    """Counts the steps; done after the third."""

    def start(self, trial, state=None):
        self.n, self.success, self.instruction, self.task = 0, False, "open it", 0
        self.obs = dict(robot0_joint_pos=np.zeros(7))

    def image(self, camera="image"):
        return np.full((256, 256, 3), 10 * self.n + (camera == "image"), np.uint8)

    def state(self):
        return np.full(8, self.n, np.float32)

    def step(self, action):
        self.n, self.success = self.n + 1, self.n + 1 >= 3


def test_replayed_demonstrations_become_a_dataset(tmp_path):
    """Replay -> staged episodes -> RLDS -> the frames that training reads."""
    (source := tmp_path / "episodes").mkdir()
    staged = []
    for trial, n in enumerate((4, 2, 5)):  # the second is too short to succeed
        actions = np.full((n, 7), 0.25 * (trial + 1))
        np.savez(source / f"task00_trial{trial:03d}.npz", initial_state=np.zeros(9), actions=actions)
    for job in regenerate.find_demonstrations(tmp_path, "libero_spatial", [0]):
        result = regenerate.replay(FakeSimulator(), job, path := tmp_path / f"{job['trial']}.example")
        assert result["success"] == path.exists() == (job["trial"] != 1)
        staged += [path] * result["success"]
    regenerate.assemble(tmp_path / "data", "libero_spatial", staged)
    data = rlds.RLDS(tmp_path / "data", "libero_spatial_no_noops", views=("primary", "wrist"))
    assert len(data) == 9 and data[0]["instruction"] == "open it"
    frame = data[6]  # the third of the second demonstration
    assert [image.decode(p).mean().round() for p in frame["pictures"]] == [21, 20]
    assert frame["actions"][0, 0] == 0.75 and frame["proprio"][:3].tolist() == [2, 2, 2]


# -----------------------------------------------------------------------------
# Keeping and reporting results


def test_rows_survive_a_kill(tmp_path):
    path = tmp_path / "episodes.jsonl"
    report.append_row(path, row(0, 1, True))
    report.append_row(path, row(0, 0, error="boom"))
    with open(path, "a") as file:
        file.write('{"task": 0, "tri')  # killed while writing
    assert [r["trial"] for r in report.read_rows(path)] == [0, 1]
    report.append_row(path, row(0, 0, True))  # tried again
    rows = report.read_rows(path)
    assert [r["trial"] for r in rows] == [0, 1] and all("error" not in r for r in rows)
    path.write_text("{}\n")
    with pytest.raises(ValueError, match="episodes.jsonl, line 1"):
        report.read_rows(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "0"},
        {"trial": -1},
        {"success": 2},
        {"steps": None},
        {"instruction": ["take"]},
        {"seconds": {"start": 1.0, "policy": "1", "simulator": 1.0}},
        {"seconds": {"start": 1.0, "simulator": 1.0}},
        {"noops": 0.5},
        {"error": None},
    ],
)
def test_a_row_that_is_none_is_named(changes, tmp_path):
    """All that the report and the grid read is looked at before the first episode."""
    path = tmp_path / "episodes.jsonl"
    report.append_row(path, row(0, 0, True))
    report.append_row(path, {**row(0, 1, True), **changes})
    with pytest.raises(ValueError, match="episodes.jsonl, line 2: not an episode"):
        report.read_rows(path)


def test_broken_files_of_a_run(tmp_path):
    (tmp_path / "episodes.jsonl").write_text("[" * 100_000 + "\n")
    with pytest.raises(ValueError, match="episodes.jsonl, line 1: .*nested too deep"):
        report.read_rows(tmp_path / "episodes.jsonl")
    with pytest.raises(ValueError, match="protocol.json: missing"):
        report.open_run(tmp_path, PROTOCOL)
    (tmp_path / "protocol.json").write_text("[]")
    with pytest.raises(ValueError, match="protocol.json: expected a JSON object"):
        report.open_run(tmp_path, PROTOCOL)
    (tmp_path / "warnings.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="warnings.json: expected a list of texts"):
        workers.read_warnings(tmp_path)
    (tmp_path / "episodes").mkdir()
    (tmp_path / "episodes" / "task00_trial000.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="task00_trial000.npz: no recorded episode"):
        jobs.recorded_episodes(tmp_path)


def test_a_broken_video_is_left_out_of_the_grid(tmp_path, capsys):
    (tmp_path / "episodes").mkdir()
    (tmp_path / "episodes" / "task00_trial000.gif").write_bytes(b"GIF89a")
    report.save_grid(tmp_path / "grid.png", tmp_path, [row(0, 0, True)])
    assert "task00_trial000.gif cannot be read" in capsys.readouterr().err
    assert (tmp_path / "grid.png").is_file()


def test_a_folder_holds_one_run(tmp_path):
    report.open_run(tmp_path, dict(PROTOCOL, trained_on=("lanczos3",)))
    report.open_run(tmp_path, dict(PROTOCOL, trained_on=("lanczos3",)))
    with pytest.raises(ValueError, match="policy: 'noop' there, 'random' now"):
        report.open_run(tmp_path, dict(PROTOCOL, policy="random"))


def test_report_of_known_episodes():
    rows = [row(0, i, i < 40) for i in range(50)] + [row(1, i, False) for i in range(49)]
    rows += [row(1, 49, error="Traceback ...\nMemoryError: no room")]
    text = report.report(rows, PROTOCOL, ["the floor is dark"])
    low, high = wilson(40, 50)
    assert (round(low, 3), round(high, 3)) == (0.670, 0.888)
    assert f"| 0 | task 0 | 40 of 50 | 80.0% | {low:.1%} to {high:.1%} | 9 |" in text
    assert "| 1 | task 1 | 0 of 49 | 0.0% | 0.0% to 7.3% |" in text
    assert "| all |  | 40 of 99 |" in text and "84.7 %" in text and "97.6 %" in text
    assert "1 of 100 episodes ended in an error" in text and "MemoryError: no room" in text
    assert "the floor is dark" in text and "policy noop" in text


def test_wilson_against_known_values():
    """Table I of Newcombe (1998), https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E"""
    for (ok, n), want in {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0, 0.1611)}.items():
        np.testing.assert_allclose(wilson(ok, n), want, atol=1e-4)


@pytest.mark.parametrize("text, want", [("0-2,5", [0, 1, 2, 5]), ("7", [7]), ("3,3-4", [3, 4])])
def test_numbers(text, want):
    assert jobs.parse_numbers(text, "tasks") == want


@pytest.mark.parametrize("text", ["", "a", "4-2", "1-", "-1"])
def test_no_numbers(text):
    with pytest.raises(ValueError, match="--tasks"):
        jobs.parse_numbers(text, "tasks")


# -----------------------------------------------------------------------------
# Processes (without a simulator in them)


def pretend(conn, folder, slow):
    """Stands in for `simulate`: asks twice for each job, marks the job as played, dies or errs where told."""
    while (job := conn.recv()) is not None:
        if job["trial"] == 3 and not (folder / "died").exists():
            (folder / "died").touch()
            os._exit(9)
        said = []
        for k in range(2):
            conn.send((job["trial"], k))
            said.append(conn.recv())
            time.sleep(slow)
        with open(folder / "played", "a") as file:
            file.write(f"{job['task']} {job['trial']}\n")
        conn.send(row(job["task"], job["trial"], said == [10 * job["trial"], 10 * job["trial"] + 1]))


@pytest.mark.parametrize("num_envs", [1, 3, 20])
def test_each_process_gets_its_own_answers(tmp_path, num_envs):
    jobs, rows, sizes = [dict(task=0, trial=i) for i in range(8)], [], []

    def act(questions):
        sizes.append(len(questions))
        return [10 * trial + k for trial, k in questions]

    rows += workers.run_workers(jobs, num_envs, pretend, (tmp_path, 0), act)
    assert sorted(r["trial"] for r in rows) == list(range(8)) and sum(sizes) == 14
    (error,) = [r for r in rows if "error" in r]
    assert error["trial"] == 3 and "exit code 9" in error["error"]  # neither success nor failure
    assert all(r["success"] for r in rows if "error" not in r)


def hang(conn, folder):
    """Stands in for `simulate`: the first job of trial 1 never ends."""
    while (job := conn.recv()) is not None:
        if job["trial"] == 1 and not (folder / "hung").exists():
            (folder / "hung").touch()
            time.sleep(600)
        conn.send(row(job["task"], job["trial"], True))


def test_a_hung_simulator_becomes_an_error(tmp_path, monkeypatch):
    wait, rows = workers.wait, []

    def hurried(conns, timeout):
        """Gives up when only the hung one is left."""
        assert timeout == workers.SILENCE
        while not (ready := wait(conns, 0.2)) and not (len(conns) == 1 and (tmp_path / "hung").exists()):
            pass
        return ready

    monkeypatch.setattr(workers, "wait", hurried)
    rows += workers.run_workers([dict(task=0, trial=i) for i in range(4)], 2, hang, (tmp_path,), None)
    assert sorted(r["trial"] for r in rows) == list(range(4))
    assert [r["trial"] for r in rows if "error" in r] == [1]


KILLED = """
import sys, json; sys.path[:0] = {paths}
from libero_sim import report, workers; import test_eval_libero as T
from pathlib import Path
folder = Path({folder!r})
if __name__ == "__main__":
    (folder / "died").touch()
    finished = {{(r["task"], r["trial"]) for r in report.read_rows(folder / "episodes.jsonl")}}
    jobs = [dict(task=0, trial=i) for i in range(12)]
    left = [j for j in jobs if (j["task"], j["trial"]) not in finished]
    def act(questions): return [10 * trial + k for trial, k in questions]
    for row in workers.run_workers(left, 2, T.pretend, (folder, 0.03), act):
        report.append_row(folder / "episodes.jsonl", row)
"""


def test_resume_after_a_kill(tmp_path):
    """No episode is lost and none is counted twice."""
    script, rows = tmp_path / "killed.py", tmp_path / "episodes.jsonl"
    script.write_text(KILLED.format(paths=[str(ROOT), str(ROOT / "tests")], folder=str(tmp_path)))
    process = subprocess.Popen([sys.executable, str(script)], cwd=tmp_path)
    while not rows.exists() or len(rows.read_text().splitlines()) < 4:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(report.read_rows(rows))
    assert 4 <= before < 12
    subprocess.run([sys.executable, str(script)], cwd=tmp_path, check=True, timeout=120)
    kept = report.read_rows(rows)
    assert [r["trial"] for r in kept] == list(range(12)) and all(r["success"] for r in kept)
    assert len(rows.read_text().splitlines()) == 12


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "give --checkpoint"),
        (["--policy", "expret"], "must be one of checkpoint, noop"),
        (["--policy", "noop", "--task_suite", "libero"], "must be one of libero_spatial"),
        (["--policy", "noop", "--num_envs", "0"], "at least 1"),
    ],
)
def test_bad_options(options, message, capsys):
    with pytest.raises(SystemExit) as end:
        E.main(configure(E.Config, options))
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "give --source"),
        (["--source", "x", "--task_suite", "libero"], "must be one of libero_spatial"),
        (["--source", "x", "--num_envs", "0"], "at least 1"),
    ],
)
def test_bad_options_of_regenerate(options, message, capsys):
    with pytest.raises(SystemExit) as end:
        regenerate.main(configure(regenerate.Config, options))
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_absent_simulator_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="requirements-libero.txt"):
        S.set_up_libero()


def test_a_chunk_is_carried_out_before_the_next_question():
    """The policy gets upright JPEG pictures, words and state; what it says comes back as the simulator's actions."""

    class Conn:
        asked = []

        def send(self, question):
            self.asked.append(question)

        def recv(self):
            return np.full((3, 7), len(self.asked) / 10)

    sim = FakeSimulator()
    sim.start(0)
    sim.cameras = ("image", "wrist_image")
    answers = workers.policy_actions(sim, dict(task=0, trial=0), Conn(), E.Config())
    actions = [next(answers) for _ in range(5)]
    assert [a[0] for a in actions] == [0.1] * 3 + [0.2] * 2 and {a[6] for a in actions} == {1.0}
    pictures, words, state, previous = Conn.asked[0]
    assert (previous == 0).all() and (Conn.asked[1][3] == 0.1).all()  # the last action, as the policy answered it
    assert len(Conn.asked) == 2 and words == "open it" and state.shape == (8,)
    assert [p.mean().round() for p in pictures] == [1, 0]


# -----------------------------------------------------------------------------
# With the simulator


def evaluate(out, *options):
    simulator()
    words = ["--out", out, "--assets", shared("libero/assets"), "--video", False, "--num_envs", 2, *options]
    command = [sys.executable, "eval_libero.py", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (out / "episodes.jsonl").read_text().splitlines()], done.stderr


def test_expert_and_its_replay_in_the_simulator(tmp_path):
    """Recorded actions from the same initial state end in the same state, whichever process plays them."""
    played, said = evaluate(tmp_path / "expert", "--policy", "expert", "--tasks", 0, "--trials", "0,2")
    assert [r["success"] for r in played] == [True, True] and "warning" not in said and "robosuite" not in said
    again, _ = evaluate(tmp_path / "replay", "--policy", "replay", "--replay", tmp_path / "expert", "--num_envs", 1)
    assert [r["success"] for r in again] == [True, True]
    for r in again:
        name = f"episodes/task00_trial{r['trial']:03d}.npz"
        first, second = (np.load(tmp_path / run / name) for run in ("expert", "replay"))
        np.testing.assert_allclose(first["final_state"], second["final_state"], rtol=0, atol=1e-6)
