"""
The published benchmark: a policy in the LIBERO simulator (https://arxiv.org/abs/2306.03310), by OpenVLA's protocol.

    python eval_libero.py --checkpoint openvla-7b-finetuned-libero-spatial --task_suite libero_spatial --num_envs 4
    python eval_libero.py --policy expert --task_suite libero_spatial --trials 0-4
    python eval_libero.py --regenerate libero_spatial/ --task_suite libero_spatial --out data

50 trials of each task, from stored initial states. The simulators run in processes of their own, and the policy answers
in batches whoever has asked. The run's folder holds protocol.json, episodes.jsonl (a line as soon as an episode ends:
the same command again goes on from there), episodes/ (actions as .npz, films as .gif), report.md and grid.png.

Follows experiments/robot/libero/run_libero_eval.py of github.com/openvla/openvla, but for one thing: what goes wrong
in an episode is an error there, neither success nor failure.

Axes: T steps of an episode, A = 7 dimensions of an action.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from checkpoint import base_of
from configurator import configure, fail
from formats.write_rlds import jpeg
from image import CROPPED, decode
from libero_sim import regenerate
from libero_sim.simulator import (
    CAMERAS,
    NOOP,
    SETTLE,
    SIZE,
    SUITES,
    Simulator,
    check_simulator,
    initial_states,
    setup,
    task_file,
    to_simulator,
    versions,
)
from libero_sim.simulator import tasks as tasks_of
from metrics import wilson
from model import write_atomically, write_json

# Success in per cent, 500 episodes: README of openvla (LoRA; mean of three seeds), Table I of arXiv 2502.19645
PUBLISHED = {"OpenVLA": dict(libero_spatial=84.7, libero_object=88.4, libero_goal=79.2, libero_10=53.7)}
PUBLISHED["OpenVLA-OFT"] = dict(libero_spatial=97.6, libero_object=98.4, libero_goal=97.9, libero_10=94.5)
SILENCE = 600  # seconds without a word of any simulator, after which they count as hung
SCRIPTED = ("noop", "random", "expert", "replay")


@dataclass
class Config:
    checkpoint: str = ""  # folder of a model, or of a LoRA run
    policy: str = "checkpoint"  # or, to check the simulator itself: noop, random, expert (libero_spatial), replay
    replay: str = ""  # for --policy replay: an episode's .npz, or a run's folder
    regenerate: str = ""  # folder with raw NAME_demo.hdf5 files, or a run's folder: make them an RLDS dataset in --out
    task_suite: str = "libero_spatial"  # libero_object, libero_goal, libero_10, libero_90
    tasks: str = ""  # such as 0-4,7; "": all of the suite
    trials: str = "0-49"  # numbers of the initial states
    num_envs: int = 1  # simulator processes; each takes 1.3 to 2.2 GB of memory
    out: str = ""  # "": runs/SUITE-POLICY
    assets: str = ""  # LIBERO's assets folder; "": inside the installed package
    unnorm_key: str = ""  # "": the suite's name, or that with _no_noops
    center_crop: bool | None = None  # show the middle 90 % only; None: as the checkpoint says, else yes
    device: str = "auto"
    dtype: str = "auto"  # bfloat16, float32; auto: bfloat16 on cuda, else as the weights are stored
    open_loop: int = 0  # actions of an OFT chunk that are carried out before the next question; 0: all
    film: bool = True  # a GIF of each episode
    shoves: float = 0.0  # share of the expert's steps that go astray, so that demonstrations show how to recover
    seed: int = 7  # of the random policy and the shoves; nothing else is drawn
    max_steps: int = 0  # 0: the official limit


# -----------------------------------------------------------------------------
# In a simulator's process


def simulate(conn: Connection, play: Callable, cfg: Config, cameras: tuple[str, ...], out: Path):
    """Play the jobs that come through `conn`, until None comes, and send a row for each. Errors become rows, too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends this one
    setup(cfg.assets)
    sim = None
    with contextlib.suppress(EOFError, ConnectionError):  # then nobody is there any more
        while (job := conn.recv()) is not None:
            try:
                if sim and (sim.task != job["task"] or sim.resets > job["trial"]):
                    sim.close()
                    sim = None
                sim = sim or Simulator(cfg.task_suite, job["task"], cameras, blind=not cameras and not cfg.film)
                row = play(sim, job, conn, cfg, out)
            except (EOFError, ConnectionError):
                raise
            except Exception:
                sim, row = None, dict(error=traceback.format_exc())  # its state is not to be trusted
            conn.send(dict(**where(job), **row))
    if sim:
        sim.close()


def play_demonstration(sim: Simulator, job: dict, conn: Connection, cfg: Config, out: Path) -> dict:
    return regenerate.replay(sim, job, staged(out, job))


def play_episode(sim: Simulator, job: dict, conn: Connection, cfg: Config, out: Path) -> dict:
    """One episode by the protocol. Writes its actions and film, returns its row."""
    start = time.perf_counter()
    sim.start(job["trial"])
    initial = sim.states[job["trial"]]
    seconds = dict(start=time.perf_counter() - start, policy=0.0, simulator=0.0)
    actions, frames = [], []
    act = actor(sim, job, conn, cfg)
    for t in range(cfg.max_steps):
        if cfg.film and t % 4 == 0:
            frames.append(sim.picture())
        before = time.perf_counter()
        action = act()
        after = time.perf_counter()
        if action is None:
            break  # the recording ends
        actions.append(action)
        sim.step(action)
        seconds["policy"] += after - before
        seconds["simulator"] += time.perf_counter() - after
        if sim.success:
            break
    record = dict(initial_state=initial, actions=np.array(actions), final_state=sim.full_state())
    write_atomically(regenerate.episode_file(out, job, ".npz"), lambda tmp: np.savez(open_binary(tmp), **record))
    if cfg.film:
        outcome = f"{'success' if sim.success else 'failure'}, {len(actions)} steps"
        frames.append(sim.picture())
        film = regenerate.episode_file(out, job, ".gif")
        write_atomically(film, lambda tmp: save_film(tmp, frames, sim.instruction, outcome))
    seconds = {key: round(value, 3) for key, value in seconds.items()}
    return dict(instruction=sim.instruction, success=bool(sim.success), steps=len(actions), seconds=seconds)


def actor(sim: Simulator, job: dict, conn: Connection, cfg: Config) -> Callable[[], np.ndarray | None]:
    """The policy as a function that returns the next action (A,) of the simulator; None: there is none any more."""
    if cfg.policy == "noop":
        return lambda: NOOP
    rng = np.random.default_rng([cfg.seed, job["task"], job["trial"]])
    if cfg.policy == "random":
        return lambda: rng.uniform(-1, 1, 7)
    if cfg.policy == "replay":
        actions = iter(np.load(job["source"])["actions"])
        return lambda: next(actions, None)
    if cfg.policy == "expert":
        from libero_sim.expert import expert

        return shoved(expert(sim), rng, cfg.shoves).__next__

    plan: list[np.ndarray] = []

    def ask() -> np.ndarray:
        if not plan:
            pictures = [decode(jpeg(sim.picture(camera))) for camera in sim.cameras]  # as the training pictures were
            conn.send((pictures, sim.instruction, sim.state()))
            plan.extend(to_simulator(action) for action in conn.recv())
        return plan.pop(0)

    return ask


def shoved(actions: Iterator[np.ndarray], rng: np.random.Generator, share: float) -> Iterator[np.ndarray]:
    """Now and then three steps in some direction before the next action; the gripper stays as it was."""
    for action in actions:
        if rng.random() < share / 3:
            push = np.append(rng.uniform(-1, 1, 3), [0, 0, 0, action[-1]])
            yield from [push] * 3
        yield action


def open_binary(path: Path):
    return open(path, "wb")  # given a name, np.savez would add .npz to it


def save_film(path: Path, frames: list[np.ndarray], instruction: str, outcome: str):
    """GIF in real time: five pictures a second, below them the instruction and what came of it."""
    text, pages = "\n".join([*textwrap.wrap(instruction, 46)[:2], f"[{outcome}]"]), []
    for frame in frames:
        page = Image.new("RGB", (SIZE, SIZE + 40), "white")
        page.paste(Image.fromarray(frame))
        ImageDraw.Draw(page).multiline_text((3, SIZE), text, "black", spacing=1)
        pages.append(page.quantize(128, dither=Image.Dither.NONE))
    pages[0].save(path, "GIF", save_all=True, append_images=pages[1:], duration=200, loop=0)


# -----------------------------------------------------------------------------
# The processes together


def run(jobs: Iterable[dict], num_envs: int, target: Callable, args: tuple, act: Callable | None, done: Callable):
    """
    Give the jobs to `num_envs` processes running target(conn, *args), and each one's row to `done`. What else comes is
    a question, answered together with all that are waiting: act([question, ...]) -> answers. A process that dies is
    replaced, its job gets an error.
    """
    context, jobs, busy = multiprocessing.get_context("spawn"), iter(jobs), {}

    def start():
        ours, theirs = context.Pipe()
        process = context.Process(target=target, args=(theirs, *args), daemon=True)
        process.start()
        theirs.close()
        give(ours, process)

    def give(conn, process):
        job = next(jobs, None)
        conn.send(job)
        if job is not None:
            busy[conn] = (process, job)

    processes = 0
    try:
        while processes < num_envs:
            start()
            processes += 1
            if len(busy) < processes:
                break  # fewer jobs than processes
        while busy:
            questions = []
            if not (ready := wait(list(busy), SILENCE)):
                for process, _ in busy.values():  # simulators hang now and then; their jobs become errors
                    process.kill()
            for conn in ready:
                process, job = busy[conn]
                try:
                    message = conn.recv()
                except (EOFError, ConnectionError):
                    process.join()
                    del busy[conn]
                    done(dict(**where(job), error=f"the simulator's process died, exit code {process.exitcode}"))
                    start()
                    continue
                if isinstance(message, dict):
                    del busy[conn]
                    done(message)
                    give(conn, process)
                else:
                    questions.append((conn, message))
            if questions:
                for (conn, _), answer in zip(questions, act([q for _, q in questions]), strict=True):
                    conn.send(answer)
    finally:
        for process, _ in busy.values():
            process.terminate()


def where(job: dict) -> dict:
    return dict(task=job["task"], trial=job["trial"])


def load_policy(cfg: Config):
    """Checkpoint -> (act, cameras, facts for the protocol). Raises ValueError or OSError before long work."""
    from oft import predict_chunk
    from sample import crops, load, pick_device, pick_dtype

    device, dtype = pick_device(cfg.device), pick_dtype(cfg.dtype)
    policy = load(cfg.checkpoint, dtype, device, lambda names: tqdm(names, "loading", unit=" tensors", leave=False))
    processor, keys = policy.processor, policy.norm_stats
    if not processor.trained_on:  # a checkpoint of the official code has no such record; this is what it was trained on
        processor.trained_on = CROPPED
        say(f"{cfg.checkpoint} has no record of its preprocessing: taking the official one, {processor.trained_on}")
    if cfg.center_crop is False and crops(policy):
        say("this policy was trained on random crops: without the centre crop it sees everything too small")
    key = cfg.unnorm_key or next((k for k in (cfg.task_suite, f"{cfg.task_suite}_no_noops") if k in keys), "")
    if key not in keys:
        wanted = cfg.unnorm_key or f"{cfg.task_suite} or {cfg.task_suite}_no_noops"
        fail(f"{cfg.checkpoint}: no action statistics for {wanted}; --unnorm_key must be one of {', '.join(keys)}")

    oft = getattr(policy.model, "oft", None)  # else it writes tokens: one picture, one action
    num_images = oft.num_images if oft else 1
    if num_images > len(CAMERAS):
        fail(f"{cfg.checkpoint} looks at {num_images} pictures, LIBERO has {len(CAMERAS)} cameras")

    def act(questions: list) -> np.ndarray:
        pictures, instructions, states = zip(*questions, strict=True)
        chunks = predict_chunk(policy, pictures, instructions, np.stack(states), key, cfg.center_crop)
        return chunks[:, : cfg.open_loop or None]

    crop = crops(policy, cfg.center_crop)
    files = [f for f in sorted(Path(cfg.checkpoint).iterdir()) if f.suffix in (".safetensors", ".pt")]
    weights = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    weights += [("base", str(base))] if (base := base_of(cfg.checkpoint)) else []
    dtype = str(next(policy.model.parameters()).dtype).removeprefix("torch.")
    facts = dict(unnorm_key=key, center_crop=crop, trained_on=processor.trained_on, dtype=dtype, weights=weights)
    facts |= dict(oft=asdict(oft), open_loop=cfg.open_loop) if oft else {}
    return act, tuple(CAMERAS)[:num_images], facts


def say(message: str):
    print(f"warning: {message}", file=sys.stderr)


# -----------------------------------------------------------------------------
# What a run has done so far


def read_rows(path: Path) -> list[dict]:
    """
    The rows of episodes.jsonl, the last one of each trial. A line that a kill cut off is removed from the file. Raises
    ValueError for any other damage.
    """
    if not path.is_file():
        return []
    data, rows = path.read_bytes(), {}
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        write_atomically(path, lambda tmp: tmp.write_bytes(whole))
    for i, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
            rows[row["task"], row["trial"]] = row
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {i}: not an episode: {line[:80]!r}; remove the line") from None
    return [rows[key] for key in sorted(rows)]


def append_row(path: Path, row: dict):
    with open(path, "a") as f:
        f.write(json.dumps(row) + "\n")
        f.flush()
        os.fsync(f.fileno())


def open_run(out: Path, protocol: dict):
    """Write protocol.json, or see that the one there is the same. Raises ValueError if it is not."""
    path, protocol = out / "protocol.json", json.loads(json.dumps(protocol))
    if path.is_file():
        old = json.loads(path.read_text())
        changed = [f"{k}: {old.get(k)!r} there, {v!r} now" for k, v in protocol.items() if old.get(k) != v]
        if changed:
            raise ValueError(f"{out} holds episodes of another run; choose another --out.\n" + "\n".join(changed))
    write_json(path, protocol)


# -----------------------------------------------------------------------------
# The report


def report(rows: list[dict], protocol: dict, warnings: Iterable[str] = ()) -> str:
    """Success per task and together, as Markdown. Episodes that ended in an error are counted apart."""
    suite, tried = protocol["task_suite"], [row for row in rows if "error" not in row]
    errors = [row for row in rows if "error" in row]
    lines = [f"# {suite}: {protocol['policy']} {protocol.get('checkpoint', '')}".rstrip(), ""]
    lines += [f"**Warning:** {text}\n" for text in warnings]
    if errors:
        lines += [f"**{len(errors)} of {len(rows)} episodes ended in an error and count as nothing:**", ""]
        lines += [f"- task {e['task']}, trial {e['trial']}: {e['error'].strip().splitlines()[-1]}" for e in errors[:10]]
        lines += ["", "The same command again repeats them.", ""]
    lines += ["| task | instruction | success | rate | 95 % interval | steps |"]
    lines += ["| ---: | --- | ---: | ---: | --- | ---: |"]
    for task in sorted({row["task"] for row in tried}):
        of_task = [row for row in tried if row["task"] == task]
        lines.append(rate_line(str(task), of_task[0]["instruction"], of_task))
    if tried:
        lines.append(rate_line("all", "", tried))
    lines += ["", "| published (500 episodes each) | " + " | ".join(SUITES) + " |", "| --- |" + " ---: |" * len(SUITES)]
    for name, figures in PUBLISHED.items():
        lines.append(f"| {name} | " + " | ".join(f"{figures[s]} %" if s in figures else "" for s in SUITES) + " |")
    spent = {key: sum(row["seconds"][key] for row in tried) for key in ("start", "policy", "simulator")}
    if sum(spent.values()):
        steps, total = sum(row["steps"] for row in tried), sum(spent.values())
        lines += ["", f"Where a process spends its time: {steps} steps in {total:.0f} s, of which " + ", ".join(
            f"{key} {value / total:.0%}" for key, value in spent.items()
        ) + "."]  # fmt: skip
    lines += ["", "Protocol: " + ", ".join(f"{k} {v}" for k, v in protocol.items() if k != "weights") + ".", ""]
    return "\n".join(lines)


def rate_line(task: str, instruction: str, rows: list[dict]) -> str:
    ok, n = sum(row["success"] for row in rows), len(rows)
    low, high = wilson(ok, n)
    steps = np.mean([row["steps"] for row in rows])
    rate = f"{ok / n:.1%} | {low:.1%} to {high:.1%}"
    return f"| {task} | {instruction} | {ok} of {n} | {rate} | {steps:.0f} |"


def save_grid(path: Path, out: Path, rows: list[dict], side: int = 96):
    """The last picture of each episode: a row for each task, framed in green (success) or red."""
    films = [(row, regenerate.episode_file(out, row, ".gif")) for row in rows]
    films = [(row, film) for row, film in films if "error" not in row and film.is_file()]
    if not films:
        return
    tasks, trials = (sorted({row[key] for row, _ in films}) for key in ("task", "trial"))
    grid = Image.new("RGB", (side * len(trials), side * len(tasks)), "white")
    for row, film in films:
        picture = Image.open(film)
        picture.seek(picture.n_frames - 1)
        tile = Image.new("RGB", (side - 2, side - 2), (30, 150, 60) if row["success"] else (200, 40, 40))
        tile.paste(picture.convert("RGB").crop((0, 0, SIZE, SIZE)).resize((side - 8, side - 8)), (3, 3))
        grid.paste(tile, (side * trials.index(row["trial"]) + 1, side * tasks.index(row["task"]) + 1))
    write_atomically(path, lambda tmp: grid.save(tmp, "PNG"))


# -----------------------------------------------------------------------------
# Command line


def numbers(text: str, option: str) -> list[int]:
    """ "0-4,7" -> [0, 1, 2, 3, 4, 7]. Raises ValueError."""
    try:
        parts = [part.split("-") for part in text.split(",")]
        found = [i for part in parts for i in range(int(part[0]), int(part[-1]) + 1)]
    except ValueError:
        found = []
    if not found:
        raise ValueError(f"--{option} {text}: must look like 0-4,7")
    return sorted(set(found))


def make_jobs(cfg: Config) -> list[dict]:
    """The episodes to play, in order of task and trial. Raises ValueError for one that does not exist."""
    n = len(tasks_of(cfg.task_suite))
    wanted = numbers(cfg.tasks, "tasks") if cfg.tasks else list(range(n))
    if wanted[-1] >= n:
        raise ValueError(f"--tasks {cfg.tasks}: {cfg.task_suite} has tasks 0 to {n - 1}")
    if cfg.regenerate:
        return regenerate.find_demonstrations(Path(cfg.regenerate), cfg.task_suite, wanted)
    if cfg.policy == "replay":
        if jobs := [job for job in regenerate.recorded(Path(cfg.replay)) if job["task"] in wanted]:
            return jobs
        raise ValueError(f"--replay {cfg.replay}: neither an episode's .npz nor a run with episodes/ of these tasks")
    trials = numbers(cfg.trials, "trials")
    for task in wanted:
        states = len(initial_states(task_file(cfg.task_suite, task, "init_states")))
        if trials[-1] >= states:
            raise ValueError(f"--trials {cfg.trials}: task {task} has initial states 0 to {states - 1}")
    return [dict(task=task, trial=trial) for task in wanted for trial in trials]


def staged(out: Path, job: dict) -> Path:
    """Where a replayed demonstration waits for the others."""
    return out / "episodes" / f"task{job['task']:02d}_demo{job['trial']:03d}.example"


def check_in_process(assets: str, suite: str, see: bool) -> list[str]:
    setup(assets)
    return check_simulator(suite, see)


def main(cfg: Config):
    if cfg.task_suite not in SUITES:
        fail(f"--task_suite {cfg.task_suite}: must be one of {', '.join(SUITES)}")
    if cfg.policy not in ("checkpoint", *SCRIPTED):
        fail(f"--policy {cfg.policy}: must be one of checkpoint, {', '.join(SCRIPTED)}")
    learned = cfg.policy == "checkpoint" and not cfg.regenerate
    if learned and not cfg.checkpoint:
        fail("give --checkpoint; or --policy noop, random, expert, replay to check the simulator")
    if cfg.num_envs < 1:
        fail(f"--num_envs {cfg.num_envs}: must be at least 1")
    cfg.max_steps = cfg.max_steps or SUITES[cfg.task_suite]
    name = Path(cfg.checkpoint).resolve().name if learned else cfg.policy
    folder = Path(cfg.out or f"runs/{cfg.task_suite}-{name}")
    out = folder / f".{cfg.task_suite}_no_noops" if cfg.regenerate else folder  # where the work is kept
    try:
        setup(cfg.assets)
        jobs = make_jobs(cfg)
        act, cameras, facts = load_policy(cfg) if learned else (None, tuple(CAMERAS) if cfg.regenerate else (), {})
        kept = ("task_suite", "policy", "checkpoint", "regenerate", "replay", "seed", "max_steps")
        kept += ("shoves",) if cfg.shoves else ()
        protocol = {key: value for key, value in asdict(cfg).items() if key in kept and value != ""}
        protocol |= dict(settle_steps=SETTLE, **facts, **versions())
        (out / "episodes").mkdir(parents=True, exist_ok=True)
        open_run(out, protocol)
        rows = read_rows(out / "episodes.jsonl")
    except (ValueError, OSError) as error:
        fail(error)
    finished = {(row["task"], row["trial"]) for row in rows if "error" not in row}
    left = [job for job in jobs if (job["task"], job["trial"]) not in finished]
    warnings = []
    if left:
        try:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                warnings = pool.apply(check_in_process, (cfg.assets, cfg.task_suite, bool(cameras) or cfg.film))
        except Exception as error:  # whatever MuJoCo or OpenGL miss
            fail(f"the simulator does not run here: {type(error).__name__}: {error}")
        write_json(out / "warnings.json", warnings)
    elif (out / "warnings.json").is_file():
        warnings = json.loads((out / "warnings.json").read_text())
    for text in warnings:
        say(text)
    start, bar = time.perf_counter(), tqdm(total=len(jobs), initial=len(jobs) - len(left), unit="episode", leave=False)
    steps = 0

    def done(row: dict):
        nonlocal steps
        steps += row.get("steps", 0)
        append_row(out / "episodes.jsonl", row)
        outcome = "ERROR" if "error" in row else "success" if row["success"] else "failure"
        bar.write(f"task {row['task']} trial {row['trial']:2d} {outcome:8s} {row.get('steps', '')}")
        bar.update()

    play = play_demonstration if cfg.regenerate else play_episode
    run(left, cfg.num_envs, simulate, (play, cfg, cameras, out), act, done)
    bar.close()
    rows = read_rows(out / "episodes.jsonl")
    if left:
        seconds = time.perf_counter() - start
        print(f"{len(left)} episodes, {steps} steps in {seconds:.0f} s: {steps / seconds:.1f} steps/s in all")
    if cfg.regenerate:
        finish_dataset(cfg, folder, out, rows)
    else:
        text = report(rows, protocol, warnings)
        write_atomically(out / "report.md", lambda tmp: tmp.write_text(text))
        save_grid(out / "grid.png", out, rows)
        print(text)
    if any("error" in row for row in rows):
        raise SystemExit(1)


def finish_dataset(cfg: Config, folder: Path, out: Path, rows: list[dict]):
    """Print what became of the demonstrations; if none ended in an error, write the dataset."""
    errors, kept = [row for row in rows if "error" in row], [row for row in rows if row.get("success")]
    for row in errors:
        say(f"task {row['task']}, demonstration {row['trial']}: {row['error']}")
    noops = sum(row.get("noops", 0) for row in rows)
    print(f"{len(rows)} demonstrations: {len(kept)} succeed when replayed, {noops} no-ops left out")
    if errors:
        say(f"{len(errors)} ended in an error, the dataset is not written; the same command again repeats them")
    elif kept:
        print(regenerate.assemble(folder, cfg.task_suite, [staged(out, row) for row in kept]))
    else:
        say("nothing to write")


if __name__ == "__main__":
    main(configure(Config))
