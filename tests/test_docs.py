"""
Every command of README.md and of docs/ runs, page after page, in a copy of the files where `openvla-7b`, `DIR` and so
on are small stand-ins of those names. Options that make a run short are put behind it; nothing else of it changes.

A command that is new in a page has to be entered here, in SHORT or in ELSEWHERE. So has a page, in PAGES.
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
from common import ROOT, free_port, shared, simulator
from PIL import Image

from bench.common import write_random_checkpoint
from formats.write_rlds import write_rlds
from toy import world as toy

# In the order in which their commands run: each may need what those before it wrote.
PAGES = (
    "README.md",
    "docs/toy-world.md",
    "docs/leaderboard.md",
    "docs/training.md",
    "docs/openvla-7b.md",
    "docs/lora.md",
    "docs/oft.md",
    "docs/fast.md",
    "docs/your-data.md",
    "docs/libero.md",
    "docs/converting.md",
    "docs/troubleshooting.md",
    "docs/serving.md",
    "docs/widowx.md",
    "docs/formats.md",
    "docs/security.md",
    "docs/parity.md",
    "docs/differences.md",
    "docs/design.md",
    "docs/benchmarks.md",
    "docs/scale.md",
    "docs/log.md",
)
TEXTS = {page: (ROOT / page).read_text() for page in PAGES}
TOOLS = ("python", "python3", "pip", "torchrun", "curl", "git", "apt-get", "hf", "docker")

TRAIN = "--batch_size 2 --micro_batch_size 2 --num_workers 0 --max_steps 2"
TOY = "--episodes 6 --max_steps 2 --scenes 2"
LIBERO = "--tasks 0 --num_envs 1"
SHORT = {  # pattern of a command -> what makes it short
    "python quickstart.py": f"{TOY} --practice 1",
    "python -m toy.play --checkpoint runs/toy/checkpoint": "--scenes 2",
    "python -m toy.play --checkpoint runs/toy_longer*": "--scenes 2",
    "python -m toy.world --gif a.gif": "",
    "python -m bench start*": "--shape tiny --processes 2",
    "python -m toy.world --expert": "",
    "python sample.py --checkpoint runs/toy/checkpoint*": "",
    "python train.py --config toy.py --image_aug*": TRAIN,
    "python train.py --config bridge.py --config small.py*": TRAIN,
    "python sample.py --checkpoint runs/bridge/checkpoint*": "",
    "torchrun --nproc-per-node 8 train.py*": f"{TRAIN} --micro_batch_size 1 --run_dir runs/two",
    "python convert_weights.py quantize*": "--group 32",
    "python convert_weights.py [!p]*": "",
    "python convert_weights.py prismatic-to-hf*": "",
    "python sample.py --checkpoint openvla-7b*": "",
    "python -m bench infer --shape 100m *--plot*": "--shape tiny --actions 2 --inputs 2",
    "python finetune_lora.py --config libero_lora.py*": TRAIN,
    "python -m toy.transfer": TOY,
    "python finetune_oft.py --config libero_oft.py*": TRAIN,
    "python -m toy.chunks": TOY,
    "python -m toy.tokens*": TOY,
    "python -m toy.play --checkpoint runs/toy_oft*": "--scenes 2",
    "python -m diagnose.look*": "",
    "python eval_libero.py --checkpoint openvla-7b-finetuned*": f"{LIBERO} --trials 0 --max_steps 2",
    "python eval_libero.py --policy expert --trials 0-14*": f"{LIBERO} --trials 0 --max_steps 2",
    "python eval_libero.py --policy expert --tasks 0,2*": f"{LIBERO} --trials 10",
    "python -m libero_sim.regenerate*": LIBERO,
    "python train.py --config libero_small.py*": TRAIN,
    "python eval_libero.py --checkpoint runs/libero_small*": f"{LIBERO} --trials 0 --max_steps 2",
    "python -m diagnose.check policy*": "",
    "python -m diagnose.check language*": "",
    "python -m diagnose.check data*": "",
    "python -m diagnose.check attention*": "",
    "python -m robots.serve*": "",
    "curl*": "",
    "python -m bench serve*": "--seconds 1 --clients 2",
    "python -m robots.widowx*": "--episodes 1 --max_steps 2",
    "python tests/kill_runs.py*": "--kills 1 --kinds train --signals 0",
    "python tests/broken_corpus.py*": "--count 2 --kinds image",
    "torchrun --nproc-per-node 2 train.py --config toy.py": f"{TRAIN} --micro_batch_size 1 --run_dir runs/two_toy",
}

CI = (ROOT / ".ci" / "run").read_text()
INNER = "one of the commands that the script above it runs"
HUB = "wants the Hugging Face hub; tests/test_hub.py asks a stand-in"
BY_HAND = "takes long and is timed by hand; the tests of its room run it small"
ELSEWHERE = {  # pattern of a command -> who runs it, or why nobody can
    "python3 -m venv .venv": CI,
    "python -m pytest": CI,
    "pip install -r requirements*.txt": CI,
    "pip install --no-deps -r requirements-libero-nodeps.txt": CI,
    "pip install torch==* --index-url *": "gets PyTorch's CPU build from its own index",
    "python -m toy.world --folder runs/toy/data*": INNER,
    "python train.py --config toy.py --max_steps 3000*": INNER,
    "python -m toy.play --checkpoint runs/toy/checkpoint --out runs/toy --scenes 500": INNER,
    "python finetune_rl.py*": BY_HAND,
    "python -m toy.world --changed*": INNER,
    "python -m toy.play --changed*": INNER,
    "python finetune_lora.py --config toy_lora.py*": INNER,
    "python train.py --config toy_full.py*": INNER,
    "python -m toy.world --name toy_chunks*": INNER,
    "python finetune_oft.py --config toy_oft.py*": INNER,
    "python -m toy.play --controls False*": INNER,
    "python -m robots.harness*": "tests/test_harness.py asks it with the client of vla-eval",
    "pip install vla-eval": "what it is for is tested in tests/test_harness.py",
    "python -m toy.world --lerobot*": "tests/test_write_lerobot.py",
    "python -m toy.delays*": "tests/test_client.py runs its parts",
    "python -m bench drafts*": BY_HAND,
    "python -m bench enlarge*": BY_HAND,
    "python -m bench index": BY_HAND,
    "python -m formats.rlds_to_lerobot*": "tests/test_write_lerobot.py",
    "python -m bench data*": BY_HAND,
    "python -m bench infer --checkpoint*": BY_HAND,
    "python -m bench infer --shape 100m --dtype bfloat16*": BY_HAND,
    "python -m bench infer --shape tiny*": BY_HAND,
    "python -m bench load*": BY_HAND,
    "python -m bench gpu*": "wants a GPU; tests/test_bench_gpu.py runs it with --tiny",
    "python eval_libero.py*--policy noop*": BY_HAND,
    "python eval_libero.py*--checkpoint runs/toy/checkpoint*": BY_HAND,
    "python -m bench infer *--vs official*": "wants the official code in an environment of its own",
    "python -m diagnose.check": "wants one of its four words; each of them runs",
    "python *NAME*": "stands for any script",
    "python -m room.name": "stands for any script of a folder",
    "pip download --no-deps*": "gets the packages of the official code, for a machine without internet",
    "pip install --no-index*": "wants those packages",
    "python sample.py --checkpoint openvla/openvla-7b*": HUB,
    "python convert_weights.py push*": HUB,
    "pip install huggingface_hub": HUB,
    "git lfs install": "changes the settings of git",
    "git clone*": "gets the released weights",
    "apt-get install*": "wants to be root",
    "docker compose*": "runs beside the robot",
    "pip install -e bridge_data_robot/widowx_envs*": "is the robot's client",
    "python -m formats.write_rlds FOLDER": "wants array_record; tests/test_rlds.py runs it",
    "hf download*": "gets the simulator's assets",
    "hf auth login": "asks for a token",
    "pip install array_record": "what it is for is tested in tests/test_rlds.py",
    "pip install pyarrow av": "what it is for is tested in tests/test_lerobot.py",
}

PYTHON_ELSEWHERE = {  # words of a Python block of a page -> the test that runs it
    "oxe.Dataset(name=": "tests/test_data.py",
    "Samples(": "tests/test_own_data.py",
    "# client.py": "tests/test_serve.py",
    "# control.py": "tests/test_client.py",
    "# ros2_node.py": "needs ROS 2: untried, as the page says",
    "LeRobot(": "tests/test_own_data.py",
}


# -----------------------------------------------------------------------------
# What the pages say


def commands(text: str) -> list[str]:
    """Return what a reader may paste: indented lines, lines of an output that begin with $, and words in backticks."""
    lines = []
    for part in re.split(r"(```.*?```)", text, flags=re.DOTALL):
        if part.startswith("```"):
            lines += re.findall(r"^\$ (.*)", part, re.MULTILINE)
        else:
            lines += ["".join(groups) for groups in re.findall(r"^    (.*)|`([^`]+)`", part, re.MULTILINE)]

    found = []
    for line in lines:
        line = line.split("  #")[0]  # a comment behind a command
        for command in line.split(" && "):
            command = re.sub(r"\s+", " ", command).strip()
            if command.split(" ")[0] in TOOLS and " " in command:
                found.append(command)
    return found


def entry(command: str, table: dict) -> str | None:
    return next((pattern for pattern in table if fnmatch(command, pattern)), None)


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", TEXTS[page], re.DOTALL)


COMMANDS = list(dict.fromkeys(command for text in TEXTS.values() for command in commands(text)))


def test_each_page_is_entered():
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")}
    assert pages == set(PAGES) - {"README.md"}


def test_each_command_is_run_by_someone():
    lost = [c for c in COMMANDS if not entry(c, SHORT) and not entry(c, ELSEWHERE)]
    assert not lost, "enter them in SHORT, or in ELSEWHERE with the reason"
    twice = [c for c in COMMANDS if entry(c, SHORT) and entry(c, ELSEWHERE)]
    assert not twice, "in SHORT or in ELSEWHERE, not in both"
    idle = [k for table in (SHORT, ELSEWHERE) for k in table if k not in {entry(c, table) for c in COMMANDS}]
    assert not idle, "no such command in the pages"
    for command in COMMANDS:
        if ELSEWHERE.get(entry(command, ELSEWHERE)) is CI:
            for need in re.findall(r"-r \S+|-m pytest|-m venv \S+", command):
                assert need in CI, command


def test_each_python_block_is_run_by_someone():
    for page in PAGES:
        if page == "docs/openvla-7b.md":  # test_python_of_the_7b_page
            continue
        for block in python_blocks(page):
            assert any(words in block for words in PYTHON_ELSEWHERE), f"{page}: {block}"


def test_the_oldest_python_is_the_same_everywhere():
    floor = re.search(r'^requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert f"Python {floor} or newer" in TEXTS["README.md"]
    assert f'python: ["{floor}", ' in (ROOT / ".github" / "workflows" / "tests.yml").read_text()


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    """A file that a page links to is there, and so is the heading behind a #."""
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE)
            assert anchor in [heading_anchor(heading) for heading in headings], link


def heading_anchor(heading: str) -> str:
    """Return the name that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# -----------------------------------------------------------------------------
# The place where the commands run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A copy of the files, in which the names that the pages use are there."""
    root = tmp_path_factory.mktemp("docs")
    (place := root / "repository").mkdir()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), ROOT / "assets" / "toy.png"]:
        to = place / path.relative_to(ROOT)
        to.parent.mkdir(exist_ok=True)
        shutil.copy(path, to)
    (place / "tests" / "goldens").symlink_to(ROOT / "tests" / "goldens")
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
    """Write episodes of the toy world under another dataset's name, with its keys."""
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


# -----------------------------------------------------------------------------
# Run them


def start(command: str, place, more: str = ""):
    words = shlex.split(command.replace("--nproc-per-node 8", "--nproc-per-node 2")) + shlex.split(more)
    tools = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    words = tools.get(words[0], words[:1]) + words[1:]
    options = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | dict(text=True, cwd=place)
    return subprocess.Popen(words, env={**os.environ, "OPENVLA_CACHE": str(place.parent / "cache")}, **options)


def run(command: str, place, more: str = "", typed: str = "") -> str:
    process = start(command, place, more)
    out, error = process.communicate(typed, timeout=300)
    fine = [0]
    if " diagnose.check " in command:
        fine.append(1)  # what it looks at is wrong, as a policy of two steps of training is
    assert process.returncode in fine and "Traceback" not in error, error[-3000:]
    return out


def with_assets(place):
    """The folder of the simulator's assets is there; skips the test if the simulator is not."""
    simulator()
    if not (place / "libero_assets").exists():
        (place / "libero_assets").symlink_to(shared("libero/assets"))


def serve(command: str, place):
    """The server at a port that is free, and the pages' curl commands, which ask it."""
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


SIMULATED = re.compile("libero_assets|libero_data").search
TOY_RECIPES = re.compile("toy.transfer|toy.chunks|toy.tokens|runs/toy_oft").search
ASKS = re.compile("^curl").match
RUN = [c for c in COMMANDS if entry(c, SHORT) and not ASKS(c)]


def check(command: str, place):
    if SIMULATED(command):
        with_assets(place)
    if "serve" in command:
        pytest.importorskip("uvicorn", reason="pip install -r requirements-serve.txt")
    if " -m robots.serve" in command:
        serve(command, place)
    else:
        run(command, place, SHORT[entry(command, SHORT)], "put it there\n\ny\n")


@pytest.fixture(scope="module")
def results(place):
    """What becomes of each command. Each needs what those of its chain before it wrote; the chains run side by side."""
    results = {command: Future() for command in RUN}

    def in_turn(chain: list[str], after: str | None):
        if after:
            results[after].exception()  # waits for it
        for command in chain:
            try:
                results[command].set_result(check(command, place))
            except BaseException as end:  # a failed test, or a skipped one
                results[command].set_exception(end)

    simulated = [c for c in RUN if SIMULATED(c)]
    toy_recipes = [c for c in RUN if TOY_RECIPES(c)]
    others = [c for c in RUN if c not in simulated + toy_recipes]
    for chain, after in ((simulated, None), (others, None), (toy_recipes, "python quickstart.py")):
        Thread(target=in_turn, args=(chain, after), daemon=True).start()
    return results


@pytest.mark.parametrize("command", RUN)
def test_command(command, results):
    results[command].result()


def test_python_of_the_7b_page(place):
    """What stands under "From Python" and "Faster" runs in its order."""
    blocks = python_blocks("docs/openvla-7b.md")
    code = 'camera = ["a.png", "b.png"]\n' + "\n".join(blocks) + "\nassert action.shape == (1, 7)"
    done = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True)
    assert len(blocks) == 2 and done.returncode == 0, done.stderr
