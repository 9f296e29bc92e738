"""
Every command of README.md runs, in its order, in a copy of the files where `openvla-7b`, `DIR` and so on are small
stand-ins of those names. Options that make a run short are put behind it; nothing else of it changes. A command that
is new in the README has to be entered here.
"""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import Future
from fnmatch import fnmatch
from threading import Thread

import numpy as np
import pytest
from bench.common import write_random_checkpoint
from common import ROOT, free_port, shared, simulator
from PIL import Image

from formats.write_rlds import write_rlds
from toy import world as toy

TEXT = (ROOT / "README.md").read_text()
CI = (ROOT / ".ci" / "run").read_text()
TOOLS = ("python", "python3", "pip", "torchrun", "curl", "git", "apt-get", "hf", "docker")

TRAIN = "--batch_size 2 --micro_batch_size 2 --num_workers 0 --max_steps 2"
TOY = f"{TRAIN} --toy_episodes 6 --toy_scenes 2"
LIBERO = "--tasks 0 --num_envs 1"
SHORT = {  # pattern of a command -> what makes it short
    "python train.py": f"--config toy.py {TOY}",
    "python train.py --config toy.py*": TOY,
    "python sample.py --checkpoint runs/toy/checkpoint*": "",
    "python play.py --checkpoint runs/toy/checkpoint": "--scenes 2",
    "python toy.py --gif a.gif": "",
    "python sample.py --checkpoint openvla-7b*": "",
    "python quantize.py*": "--group 32",
    "python bench.py infer --shape 100m*": "--shape tiny --actions 2 --inputs 2",
    "python train.py --config bridge.py --config small.py*": TRAIN,
    "python sample.py --checkpoint runs/bridge/checkpoint*": "",
    "torchrun --nproc-per-node 8 train.py*": f"{TRAIN} --micro_batch_size 1 --run_dir runs/two",
    "python finetune_lora.py --config libero_lora.py*": TRAIN,
    "python finetune_lora.py --merge*": "",
    "python finetune_lora.py": f"--config toy_lora.py {TOY}",
    "python finetune_oft.py --config libero_oft.py*": TRAIN,
    "python finetune_oft.py": f"--config toy_oft.py {TOY}",
    "python play.py --checkpoint runs/toy_oft*": "--scenes 2",
    "python eval_libero.py --checkpoint openvla-7b-finetuned*": f"{LIBERO} --trials 0 --max_steps 2",
    "python eval_libero.py --policy expert --trials 0-14*": f"{LIBERO} --trials 0 --max_steps 2",
    "python eval_libero.py --policy expert --tasks 0,2*": f"{LIBERO} --trials 10",
    "python eval_libero.py --regenerate*": LIBERO,
    "python train.py --config libero_small.py*": TRAIN,
    "python eval_libero.py --checkpoint runs/libero_small*": f"{LIBERO} --trials 0 --max_steps 2",
    "python convert_weights.py*": "",
    "python check.py*": "",
    "python serve.py*": "",
    "curl*": "",
    "python bench.py serve*": "--seconds 1 --clients 2",
    "python eval_bridge.py*": "--episodes 1 --max_steps 2",
    "python data.py*": "",
}
ELSEWHERE = {  # pattern of a command -> who runs it, or why nobody can
    "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt && python train.py": CI,
    "python -m pytest": CI,
    "pip install -r requirements-libero.txt && pip install --no-deps -r requirements-libero-nodeps.txt": CI,
    "pip install -r requirements-serve.txt": CI,
    "git clone*": "gets the released weights",
    "apt-get install*": "wants to be root",
    "docker compose*": "runs beside the robot",
    "pip install -e bridge_data_robot/widowx_envs*": "is the robot's client",
    "hf download*": "gets the simulator's assets",
    "pip install pyarrow av": "what it is for is tested in tests/test_lerobot.py",
    "python bench.py infer --shape 7b --vs official*": "wants the official code in an environment of its own",
}


def commands(text: str) -> list[str]:
    """What a reader may paste: indented lines, lines of an output that begin with $, and words in backticks."""
    found = []
    for part in re.split(r"(```.*?```)", text, flags=re.DOTALL):
        if part.startswith("```"):
            found += re.findall(r"^\$ (.*)", part, re.MULTILINE)
            continue
        found += re.findall(r"^    (.*)|`([^`]+)`", part, re.MULTILINE)
    found = ["".join(f) for f in found]
    found = [re.sub(r"\s+", " ", f.split("  #")[0]).strip() for f in found]
    return list(dict.fromkeys(f for f in found if f.split()[0] in TOOLS and " " in f))


def entry(command: str, table: dict) -> str | None:
    return next((pattern for pattern in table if fnmatch(command, pattern)), None)


COMMANDS = commands(TEXT)


def test_each_command_is_run_by_someone():
    lost = [c for c in COMMANDS if not entry(c, SHORT) and not entry(c, ELSEWHERE)]
    assert not lost, "enter them in SHORT, or in ELSEWHERE with the reason"
    idle = [k for table in (SHORT, ELSEWHERE) for k in table if k not in {entry(c, table) for c in COMMANDS}]
    assert not idle, "no such command in the README"
    for command, by in ELSEWHERE.items():
        for need in re.findall(r"-r \S+|-m pytest", command) if by is CI else ():
            assert need in CI


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A copy of the files, in which the names that the README uses are there."""
    root = tmp_path_factory.mktemp("readme")
    (place := root / "repository").mkdir()
    for path in [*ROOT.glob("*.py"), ROOT / "assets" / "toy.png"]:
        to = place / path.relative_to(ROOT)
        to.parent.mkdir(exist_ok=True)
        shutil.copy(path, to)
    shutil.copytree(ROOT / "configs", place / "configs")
    for name, key in (("openvla-7b", "bridge_orig"), ("openvla-7b-finetuned-libero-spatial", "libero_spatial")):
        write_random_checkpoint(place / name, "tiny")
        config = json.loads((place / name / "config.json").read_text())
        config["norm_stats"] = {key: config["norm_stats"].pop("random")}
        (place / name / "config.json").write_text(json.dumps(config))
    for name in ("kitchen.jpg", "frame.jpg", "a.png", "b.png"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(place / name)
    for data in (place / "DIR", root / "shared" / "data"):
        write_demonstrations(data, "bridge_orig", ("image_0", "image_1"), 7)
        write_demonstrations(data, "libero_spatial_no_noops", ("image", "wrist_image"), 8)
    (place / "widowx_envs").mkdir()
    (place / "widowx_envs" / "__init__.py").touch()
    (place / "widowx_envs" / "widowx_env_service.py").write_text(ROBOT)
    return place


def write_demonstrations(folder, name: str, cameras: tuple, state: int):
    """Episodes of the toy world under another dataset's name, with its keys."""
    episodes = []
    for e in toy.demonstrations(toy.TRAIN, 3, linger=8):
        more = {"state": np.resize(e["state"], (len(e["state"]), state)).astype(np.float32)}
        episodes.append({k: e[k] for k in ("action", "instruction")} | dict.fromkeys(cameras, e["image"]) | more)
    write_rlds(folder, dict(train=episodes, val=episodes), name)


ROBOT = """
import numpy as np, types
WidowXConfigs = types.SimpleNamespace(DefaultEnvParams={})
class WidowXClient:
    def __init__(self, host, port): pass
    init = reset = move = step_action = lambda *args, **options: 1
    def get_observation(self): return dict(full_image=np.zeros((480, 640, 3), np.uint8), state=np.zeros(7))
"""


def start(command: str, place, more: str = ""):
    words = shlex.split(command.replace("--nproc-per-node 8", "--nproc-per-node 2")) + shlex.split(more)
    tools = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    words = tools.get(words[0], words[:1]) + words[1:]
    options = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | dict(text=True, cwd=place)
    return subprocess.Popen(words, env={**os.environ, "OPENVLA_CACHE": str(place.parent / "cache")}, **options)


def run(command: str, place, more: str = "", typed: str = "") -> str:
    process = start(command, place, more)
    out, error = process.communicate(typed, timeout=300)
    fine = (0, 1) if " check.py " in command else (0,)  # 1: what it looks at is wrong, as two steps of training are
    assert process.returncode in fine and "Traceback" not in error, error[-3000:]
    return out


def with_assets(place):
    """The folder of the simulator's assets is there; skips the test if the simulator is not."""
    simulator()
    if not (place / "libero_assets").exists():
        (place / "libero_assets").symlink_to(shared("libero/assets"))


def serve(command: str, place):
    """The server at a port that is free, and the README's curl commands, which ask it."""
    if not shutil.which("curl"):
        pytest.skip("needs curl")
    port = str(free_port())
    server = start(command.replace("8000", port), place)
    try:
        while True:
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", int(port))) == 0:
                    break
            assert server.poll() is None, server.stderr.read()
            time.sleep(0.1)
        for question in filter(ASKS, COMMANDS):
            assert len(json.loads(run(question.replace("8000", port), place, "--silent"))["action"]) == 7
    finally:
        server.terminate()
        server.wait(20)


SIMULATED, ASKS = re.compile("libero_assets|libero_data").search, re.compile("^curl").match
RUN = [c for c in COMMANDS if entry(c, SHORT) and not ASKS(c)]


def check(command: str, place):
    if SIMULATED(command):
        with_assets(place)
    if "serve" in command:
        pytest.importorskip("uvicorn", reason="pip install -r requirements-serve.txt")
    if " serve.py" in command:
        serve(command, place)
    else:
        run(command, place, SHORT[entry(command, SHORT)], "put it there\n\ny\n")


@pytest.fixture(scope="module")
def results(place):
    """What becomes of each command. Each needs what those before it wrote; the simulator's run beside the others."""
    results = {command: Future() for command in RUN}

    def in_turn(some: list[str]):
        for command in some:
            try:
                results[command].set_result(check(command, place))
            except BaseException as end:  # a failed test, or a skipped one
                results[command].set_exception(end)

    for chain in ([c for c in RUN if SIMULATED(c)], [c for c in RUN if not SIMULATED(c)]):
        Thread(target=in_turn, args=(chain,), daemon=True).start()
    return results


@pytest.mark.parametrize("command", RUN)
def test_command(command, results):
    results[command].result()


def test_python_of_the_readme(place):
    """What stands under "From picture to action" runs in its order."""
    blocks = re.findall(r"```python\n(.*?)```", TEXT.split("## From episodes")[0], re.DOTALL)
    code = 'camera = ["a.png", "b.png"]\n' + "\n".join(blocks) + "\nassert action.shape == (1, 7)"
    done = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True)
    assert len(blocks) == 2 and done.returncode == 0, done.stderr
