"""
Broken files, given to the scripts as a user gives them: each ends in one message and exit code 2, or is still right.

    python tests/broken_corpus.py                                # 300 cases, fifteen minutes on two CPU cores
    python tests/broken_corpus.py --count 20 --kinds rlds image  # some
    python tests/broken_corpus.py --assets LIBERO_ASSETS         # LIBERO's episodes, too

A small folder of every kind is made by the scripts themselves -> one file of a copy is broken -> a script reads it.
A script may take 60 seconds and 2 GB. It fails with one line "error: ..." that names the file or its folder and exit
code 2; or it succeeds because the same comes out as of the valid file, or because no one can tell (see KINDS).

tests/test_broken_files.py tries more mutations, in less time, on the functions that read.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import GOLDENS, ROOT
from mutations import special_mutations, usual_mutations
from test_broken_files import make_checkpoint, make_rlds

import convert_weights
import eval_libero
from libero_sim.simulator import SUITES, set_up_libero

SECONDS = 60
SECONDS_OF_SIMULATOR = 240  # which starts in half a minute, and plays a step or two
GB = 1 << 30
MOST_MEMORY = 2 * GB
MODEL = """
_vit = dict(embed_dim=16, depth=3, num_heads=2, img_size=28, mlp_dim=32)
_text = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
random_model = {"vision_configs": [_vit], "text_config": dict(_text, vocab_size=32064)}
"""
OPTIONS = """
data_root_dir = "data"
data_mix = "toy"
image_aug = False
batch_size = 2
micro_batch_size = 2
num_workers = 0
log_every = 1
save_every = 1
"""
LEROBOT = """
from formats.lerobot import LeRobot
data_mix = [(LeRobot("lerobot"), 1.0)]
"""

TRAIN = "train.py --config options.py --config tiny.py"
LORA = "finetune_lora.py --config options.py --base_checkpoint run/checkpoint --lora_rank 2"
OFT = f"finetune_oft.py{LORA[16:]} --views primary --action_chunk 2"
SAMPLE = "sample.py --json --instruction take --device cpu --image"
TWO = "a.png a.jpg --state 0 0 0 0 0 0 0 0 --checkpoint"
CONVERT = "convert_weights.py"
LIBERO = "--task_suite libero_spatial --tasks 0 --assets {assets}"
EVAL = f"eval_libero.py --policy noop --trials 0 --out eval {LIBERO}"
REPLAY = f"eval_libero.py --policy replay --replay eval --max_steps 2 --out new {LIBERO}"
REGENERATE = f"-m libero_sim.regenerate --source raw --out new {LIBERO}"


@dataclass
class Kind:
    """Files that scripts read."""

    files: str  # patterns below the folder
    commands: list[str]  # one of them is tried; each succeeds with the valid files
    changed: str = ""  # why it may succeed with another output: nothing in the file tells


NUMBERS = "a weight, or a value that a person could have meant"
KINDS = {
    "checkpoint": Kind(
        "model/*.json model/*1-of*.safetensors",
        [
            f"{SAMPLE} a.png --unnorm_key bridge_orig --checkpoint model",
            f"{CONVERT} check model",
            f"{CONVERT} hf-to-prismatic model new",
            f"{CONVERT} quantize model new --bits 8",
            f"{LORA.replace('run/checkpoint', 'model')} --max_steps 1 --run_dir new",
        ],
        NUMBERS,
    ),
    "tokenizer": Kind(
        "model/tokenizer.model", [f"{SAMPLE} a.png --unnorm_key bridge_orig --checkpoint model"], NUMBERS
    ),
    "adapter": Kind(
        "adapter/*",
        [
            f"{SAMPLE} a.png --unnorm_key bridge_orig --checkpoint adapter",
            f"{CONVERT} check adapter",
            f"{CONVERT} merge-lora adapter new",
        ],
        NUMBERS,
    ),
    "lora run": Kind(
        "lora/*.json lora/*.model lora/*.safetensors",
        [f"{SAMPLE} a.png --checkpoint lora", f"{CONVERT} merge-lora lora new"],
        NUMBERS,
    ),
    "training run": Kind(
        "prismatic/*.json prismatic/checkpoints/*",
        [f"{CONVERT} check prismatic", f"{CONVERT} prismatic-to-hf prismatic new --tokenizer model"],
        NUMBERS,
    ),
    "oft": Kind("official/*--* official/oft_config.json official/dataset*", [f"{SAMPLE} {TWO} official"], NUMBERS),
    "oft run": Kind(
        "oft/*.json oft/*.model oft/*.safetensors oft/*.pt",
        [f"{SAMPLE} a.png --state 0 0 --checkpoint oft", f"{CONVERT} merge-lora oft new"],
        NUMBERS,
    ),
    "resumed run": Kind(
        "run/checkpoints/step-000002/* run/metrics.jsonl",
        [f"{TRAIN} --max_steps 3 --run_dir run"],
        NUMBERS,
    ),
    "resumed lora": Kind(
        "lora/checkpoints/step-000002/* lora/*.json* lora/*.safetensors",
        [f"{LORA} --max_steps 3 --run_dir lora", f"{LORA} --max_steps 2 --run_dir lora"],
        NUMBERS,
    ),
    "resumed oft": Kind(
        "oft/checkpoints/step-000002/* oft/*.json* oft/*.safetensors oft/*.pt",
        [f"{OFT} --max_steps 3 --run_dir oft", f"{OFT} --max_steps 2 --run_dir oft"],
        NUMBERS,
    ),
    "rlds": Kind(
        "data/toy/1.0.0/*",
        [
            f"{TRAIN} --max_steps 1 --run_dir new",
            f"{TRAIN} --max_steps 1 --run_dir new --num_workers 1",
            "-m diagnose.look --data_root_dir data --data_mix toy --out new",
        ],
    ),
    "rlds index": Kind(
        "indexed/toy/1.0.0/.index/*/*", [f"{TRAIN} --data_root_dir indexed --max_steps 1 --run_dir new"]
    ),
    "lerobot": Kind(
        "lerobot/*/* lerobot/*/*/* lerobot/*/*/*/*",
        [f"{TRAIN} --config robot.py --max_steps 1 --run_dir new --num_workers {n}" for n in (0, 1)],
        "parquet without page checksums, mp4, JSON",
    ),
    "image": Kind("a.*", [f"{SAMPLE} FILE --unnorm_key bridge_orig --checkpoint model"], "JPEG has no checksum"),
    "episodes": Kind("eval/*.json* eval/episodes/*.gif", [EVAL], "a row that a person could have written"),
    "npz": Kind("eval/episodes/*.npz", [REPLAY]),
    "hdf5": Kind("raw/*.hdf5", [REGENERATE], "its numbers have no checksum"),
}


# -----------------------------------------------------------------------------
# Valid files


def make_files(root: Path, assets: str):
    """Fill a folder with valid files of all kinds, most of them written by the scripts."""
    make_checkpoint(root).rename(root / "whole")
    (root / "whole" / "model").rename(root / "model")
    pixels = np.random.default_rng(0).integers(0, 255, (28, 28, 3), np.uint8)
    for name in ("a.png", "a.jpg", "a.webp", "a.gif", "a.bmp"):
        Image.fromarray(pixels).save(root / name)
    (root / "options.py").write_text(OPTIONS)
    (root / "tiny.py").write_text(MODEL)
    (root / "robot.py").write_text(LEROBOT)

    shutil.copytree(GOLDENS / "tiny-lora", root / "adapter")
    config = json.loads((root / "adapter" / "adapter_config.json").read_text())
    (root / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "model"}))
    shutil.copytree(root / "model", root / "official")
    shutil.copytree(GOLDENS / "tiny-oft" / "l1", root / "official", dirs_exist_ok=True)
    record = {"action_chunk": 8, "num_images": 2, "proprio_dim": 8, "head": "l1"}
    (root / "official" / "oft_config.json").write_text(json.dumps(record))
    convert_weights.hf_to_prismatic(root / "model", root / "prismatic")

    make_rlds(root / "data", "toy")
    for command in (TRAIN + " --run_dir run", LORA + " --run_dir lora", OFT + " --run_dir oft"):
        run_valid(f"{command} --max_steps 2", root)
    shutil.copytree(root / "data", root / "indexed")
    shutil.rmtree(root / "data" / "toy" / "1.0.0" / ".index")
    if find_spec("pyarrow") and find_spec("av"):  # without them LeRobot folders are left out
        import test_lerobot

        test_lerobot.make(root / "lerobot", "v2.1")
    if assets:
        make_recordings(root, assets)


def make_recordings(root: Path, assets: str):
    """Write a finished run of eval_libero.py, and a raw demonstration."""
    import h5py  # of requirements-libero.txt

    rng = np.random.default_rng(0)
    (root / "eval" / "episodes").mkdir(parents=True)
    episode = root / "eval" / "episodes" / "task00_trial000"
    np.savez(episode.with_suffix(".npz"), initial_state=np.zeros(92), actions=rng.uniform(-1, 1, (5, 7)))
    frames = [Image.new("RGB", (256, 296), shade) for shade in ("red", "blue")]
    frames[0].save(episode.with_suffix(".gif"), save_all=True, append_images=frames[1:])
    seconds = {"start": 1.0, "policy": 1.0, "simulator": 1.0}
    row = {"task": 0, "trial": 0, "instruction": "take", "success": True, "steps": 5, "seconds": seconds}
    (root / "eval" / "episodes.jsonl").write_text(json.dumps(row) + "\n")
    set_up_libero(assets)
    cfg = eval_libero.Config(policy="noop", max_steps=SUITES["libero_spatial"])
    (root / "eval" / "protocol.json").write_text(json.dumps(eval_libero.describe_run(cfg, {})))
    (root / "eval" / "warnings.json").write_text('["an old simulator"]')

    (root / "raw").mkdir()
    name = "pick_up_the_black_bowl_between_the_plate_and_the_ramekin_and_place_it_on_the_plate_demo.hdf5"
    with h5py.File(root / "raw" / name, "w") as file:
        file["data/demo_0/states"] = np.zeros((4, 92))
        file["data/demo_0/actions"] = rng.uniform(-1, 1, (4, 7))


def run_valid(command: str, folder: Path):
    """Run a command that succeeds."""
    ending, output, _ = run(command, folder)
    assert ending == 0, f"{command}: {output[-2000:]}"


# -----------------------------------------------------------------------------
# Break one file


def break_file(path: Path, rng: random.Random) -> str:
    """Break a file in place. Returns what was done."""
    status = path.stat()
    content = path.read_bytes()
    places = ["a folder", "missing", "a pipe", "a device", "a link to nowhere"]
    special = special_mutations(path.name, content, rng)
    usual = usual_mutations(path.name, content, rng)
    usual["cut"] = content[: rng.randrange(len(content))]
    how = rng.choices([places, list(special), list(usual)], [1, 2 if special else 0, 3])[0]
    name = rng.choice(how)

    path.unlink()
    if name == "a folder":
        path.mkdir()
    elif name == "a pipe":
        os.mkfifo(path)
    elif name == "a device":
        path.symlink_to("/dev/zero")
    elif name == "a link to nowhere":
        path.symlink_to("nowhere")
    elif name != "missing":
        path.write_bytes({**special, **usual}[name])
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    return name


# -----------------------------------------------------------------------------
# Run a script on it


@dataclass
class Case:
    kind: str
    file: str
    change: str = ""
    command: str = ""
    verdict: str = ""  # refused, same, changed; or what is wrong
    output: str = ""
    gigabytes: float = 0.0


def run(command: str, folder: Path) -> tuple[int | None, str, float]:
    """Run a script in a folder. Returns exit code (None: took too long), output and its peak memory in bytes."""
    words = command.split()
    if words[0].endswith(".py"):
        words[0] = str(ROOT / words[0])
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OPENVLA_CACHE": "cache",
        "PYTHONPATH": str(ROOT),
    }
    limit = SECONDS_OF_SIMULATOR if "--assets" in words else SECONDS
    memory = 0
    with open(folder / "stdout", "wb") as output:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        end = time.monotonic() + limit
        while process.poll() is None and time.monotonic() < end:
            memory = max(memory, peak_memory(process.pid))
            time.sleep(0.05)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.returncode = None
    return process.returncode, (folder / "stdout").read_text(errors="replace"), memory


def peak_memory(pid: int) -> int:
    """Return the largest resident size of a process so far in bytes; 0 if it has ended. (Linux.)"""
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        return int(found[1]) * 1024 if found else 0
    return 0


def results(folder: Path) -> dict[str, str]:
    """Return what scripts have written: the steps and losses of runs, and a checksum of each other file, by name."""
    written = {}
    for path in (path for part in ("new", "run", "lora", "oft", "eval") for path in (folder / part).rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or path.is_symlink() or "checkpoints" in path.parts:  # these hold times
            continue
        if path.name == "metrics.jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            written[name] = str([(row.get("step"), row.get("loss")) for row in rows])
        elif path.suffix == ".safetensors":
            content = path.read_bytes()
            header = int.from_bytes(content[:8], "little")  # bytes; the order in it changes from run to run
            written[name] = str(zlib.crc32(content[8 + header :]))
        elif path.suffix in (".pt", ".json", ".png", ".model") and path.name != "export.json":
            written[name] = str(zlib.crc32(path.read_bytes()))
    written["answer"] = str(re.findall(r'"actions": .*?\]\]', (folder / "stdout").read_text()))
    return written


def try_case(case: Case, whole: Path, expected: dict[str, dict], seed: str) -> Case:
    """Break the file in a copy of all files, run the command there, and judge how that went."""
    with tempfile.TemporaryDirectory(dir=whole.parent) as root:
        folder = Path(root) / "files"
        shutil.copytree(whole, folder, symlinks=True)
        case.change = break_file(folder / case.file, random.Random(seed))
        code, case.output, memory = run(case.command, folder)
        case.gigabytes = memory / GB
        if (folder / "code_was_run").exists():
            case.verdict = "code from the file was run"
        elif code is None:
            case.verdict = "takes too long"
        elif memory > MOST_MEMORY:
            case.verdict = f"takes {case.gigabytes:.1f} GB"
        elif "Traceback" in case.output:
            case.verdict = "traceback"
        elif code == 0:
            found = results(folder)
            is_same = {**found, case.file: ""} == {**expected[case.command], case.file: ""}
            case.verdict = "same" if is_same else "changed" if KINDS[case.kind].changed else "accepted, and changed"
        elif code == 2:
            case.verdict = judge_message(case)
        else:
            case.verdict = f"exit code {code}"
    return case


def judge_message(case: Case) -> str:
    """Return "refused" if a script said once, in few words, which file is wrong."""
    marks = r"^error: |^  incomplete: "  # the second of `convert_weights.py check`, in its report
    messages = re.split(marks, case.output, flags=re.MULTILINE)[1:]
    if len(messages) != 1:
        return f"{len(messages)} messages"
    if len(messages[0]) > 2000:
        return f"a message of {len(messages[0])} characters"
    path = Path(case.file)
    names = [path.name, *(str(parent) for parent in path.parents if str(parent) != ".")]
    return "refused" if any(name in messages[0] for name in names) else "the message does not name the file"


# -----------------------------------------------------------------------------
# Command line


def choose_cases(whole: Path, args: argparse.Namespace, rng: random.Random) -> list[Case]:
    """Return as many cases as are wanted, as many of each kind, with each file and each command of it in turn."""
    kinds = []
    for kind in args.kinds:
        paths = [path for pattern in KINDS[kind].files.split() for path in whole.glob(pattern)]
        names = sorted({str(path.relative_to(whole)) for path in paths if is_read(path)})
        is_simulated = "{assets}" in KINDS[kind].commands[0]
        if names and (args.assets or not is_simulated):
            kinds.append((kind, rng.sample(names, len(names))))

    cases = []
    for i in range(args.count):
        kind, names = kinds[i % len(kinds)]
        turn = i // len(kinds)
        file = names[turn % len(names)]
        commands = KINDS[kind].commands
        command = commands[(turn // len(names) + turn) % len(commands)].format(assets=args.assets)
        cases.append(Case(kind, file, command=command.replace("FILE", file)))
    return cases


def is_read(path: Path) -> bool:
    """True if a file has content, and is none of those that are there for the official code."""
    unread = ("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json", "generation_config.json")
    return path.is_file() and path.stat().st_size > 0 and path.name not in (*unread, "tiny_arch.json")


def try_valid(command: str, whole: Path) -> dict[str, str]:
    """Run a command in a copy of all files, none of which is broken. Returns its results."""
    with tempfile.TemporaryDirectory(dir=whole.parent) as root:
        folder = shutil.copytree(whole, Path(root) / "files")
        run_valid(command, folder)
        return results(folder)


def print_table(cases: list[Case]):
    endings = ("refused", "same", "changed")
    print("| kind | cases | refused | the same came out | no one can tell | failures | GB at most |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for kind in [*dict.fromkeys(case.kind for case in cases), "all"]:
        those = [case for case in cases if kind in (case.kind, "all")]
        counts = Counter(case.verdict if case.verdict in endings else "failure" for case in those)
        numbers = [len(those), *(counts[ending] for ending in (*endings, "failure"))]
        most = max(case.gigabytes for case in those)
        print(f"| {kind} | {' | '.join(map(str, numbers))} | {most:.1f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300, help="cases in all; default 300")
    parser.add_argument("--seed", default="0", help="another seed, other cases")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS), metavar="KIND")
    parser.add_argument(
        "--assets", default="", help="LIBERO's assets folder; without it the last three kinds are left out"
    )
    parser.add_argument("--jobs", type=int, default=2, help="scripts at a time; default 2")
    parser.add_argument("--log", default="", help="a file for all cases and outputs")
    args = parser.parse_args()

    good = ("refused", "same", "changed")
    with tempfile.TemporaryDirectory() as root, ThreadPoolExecutor(args.jobs) as pool:
        whole = Path(root) / "whole"
        whole.mkdir()
        make_files(whole, args.assets)
        cases = choose_cases(whole, args, random.Random(args.seed))
        commands = sorted({case.command for case in cases})
        expected = dict(zip(commands, pool.map(lambda command: try_valid(command, whole), commands), strict=True))

        numbers = range(len(cases))
        for case in pool.map(lambda i: try_case(cases[i], whole, expected, f"{args.seed} {i}"), numbers):
            line = f"{case.kind}: {case.file}: {case.change}: {case.verdict}"
            if case.verdict not in good:
                print(f"{line}\n    {case.command}\n    {case.output.strip()[-300:]}", flush=True)
            if args.log:
                with open(args.log, "a") as log:
                    log.write(f"{line}\n    {case.command}\n{case.output[-3000:]}\n")
    print_table(cases)
    raise SystemExit(any(case.verdict not in good for case in cases))


if __name__ == "__main__":
    main()
