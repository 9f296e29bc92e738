"""
What `bench.py infer` does: seconds from a picture to an action, where they go, and beside the official classes.

Every way to decode is timed on each input in turn, so that whatever else the machine does meets all of them alike. The
inputs are pictures of random noise or, with --trajectories, a policy's own way through the toy world or a dataset's
episodes, where the draft is what it said to the picture before.
"""

import json
import subprocess
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

import sample
from bench.common import Config, memory_mb, report
from metrics import peak_memory_gb
from speed.engine import Engine
from tokenizer import NUM_BINS, VOCAB_SIZE, decode_action, encode_action, normalize, unnormalize

N = 7  # tokens of an action


def trajectories(cfg: Config, policy: sample.Policy) -> list[tuple[list, str]]:
    """[(pictures of one episode, instruction)]"""
    if cfg.trajectories == "toy":
        from toy import world as toy

        def act(images, texts):
            return sample.predict_action(policy, list(images), texts, cfg.unnorm_key)

        episodes = toy.rollout(act, toy.TEST, cfg.inputs // 6 + 1, record=cfg.inputs // 6 + 1).episodes
        return [(list(e["image"][: len(e["action"])]), e["instruction"]) for e in episodes]
    if cfg.trajectories == "data":
        from data import open_mixture
        from image import decode

        ((dataset, _),) = open_mixture(cfg.data_root_dir, cfg.data_mix, skip_bad_records=True)
        episodes: dict = {}
        for i in range(min(cfg.inputs, len(dataset))):
            frame = dataset[i]
            pictures, _ = episodes.setdefault(dataset.where(i)[0], ([], frame["instruction"]))
            pictures.append(decode(frame["pictures"][0]))
        return list(episodes.values())
    rng = np.random.default_rng(0)
    return [([rng.integers(0, 256, (480, 640, 3), np.uint8)], "pick up the red cube") for _ in range(cfg.inputs)]


def make_inputs(cfg: Config, policy: sample.Policy) -> list[dict]:
    """ids (1, T), pixels (1, C, H, W), `before`: number of the input one step earlier, None for an episode's first."""
    weight, inputs = policy.model.language_model.model.norm.weight, []
    for pictures, text in trajectories(cfg, policy):
        ids = torch.tensor([policy.tokenizer.encode_prompt(text)], device=weight.device)
        for i, picture in enumerate(pictures):
            pixels = torch.from_numpy(sample.prepare(policy, picture)[None])
            pixels = policy.processor.normalize(pixels.to(weight.device)).to(weight.dtype)
            inputs.append(dict(ids=ids, pixels=pixels, picture=picture, before=len(inputs) - 1 if i else None))
    return inputs[: cfg.inputs]


def still_tokens(stats: dict) -> torch.Tensor:
    """No motion, the draft of an episode's first picture (1, N), as in `sample.predict_action`."""
    return torch.from_numpy(encode_action(normalize(np.zeros((1, N)), stats)))


class Official:
    """bench_official.py, in the virtual environment that --official_python belongs to."""

    def __init__(self, cfg: Config, folder: Path, inputs: list[dict], device: str, tmp: Path):
        arrays = {f"ids{i}": x["ids"][0].cpu().numpy() for i, x in enumerate(inputs)}
        arrays |= {f"pixels{i}": x["pixels"][0].float().cpu().numpy() for i, x in enumerate(inputs)}
        np.savez(tmp / "inputs.npz", **arrays)
        script = Path(__file__).with_name("bench_official.py")
        argv = [cfg.official_python, script, Path(cfg.official).resolve(), folder.resolve(), tmp / "inputs.npz"]
        self.log = open(tmp / "official.log", "w+")
        argv, pipe = [*map(str, argv), cfg.dtype, device], subprocess.PIPE
        self.process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=self.log, text=True)
        self.read()

    def read(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self.log.seek(0)
        raise ValueError(f"the official code stopped:\n{self.log.read()[-2000:]}")

    def __call__(self, i: int) -> dict:
        print(i, file=self.process.stdin, flush=True)
        return self.read()


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(fn, *args):
    synchronize()
    start = time.perf_counter()
    out = fn(*args)
    synchronize()
    return time.perf_counter() - start, out


def infer(cfg: Config, folder: Path, tmp: Path):
    """Time all ways to decode, print the table, append the JSON line to --log and draw --plot."""
    device = sample.pick_device(cfg.device)
    policy = sample.load(folder, getattr(torch, cfg.dtype), device)
    cfg.unnorm_key = cfg.unnorm_key or next(iter(policy.norm_stats))
    stats = sample.action_stats(policy.norm_stats, cfg.unnorm_key, str(folder))
    model, engine, inputs = policy.model, Engine(policy.model), make_inputs(cfg, policy)
    official = Official(cfg, folder, inputs, device, tmp) if cfg.vs == "official" else None

    for x in inputs:
        x["tokens"], x["logits"] = model.generate(x["ids"], x["pixels"], N)  # (1, N), (1, N, V)
        last = still_tokens(stats) if x["before"] is None else inputs[x["before"]]["tokens"]
        x["drafts"] = {"drafted": last, "drafted, all right": x["tokens"]}
        x["drafts"]["drafted, all wrong"] = (x["tokens"] + VOCAB_SIZE // 2) % VOCAB_SIZE
    names = ["model.generate", "one by one"]
    names += ["drafted"] if cfg.trajectories else ["drafted, all wrong", "drafted, all right"]

    def act(name: str, x: dict):
        if name == "model.generate":
            tokens, passes = model.generate(x["ids"], x["pixels"], N)[0], N
        else:
            tokens, passes = engine.generate(x["ids"], x["pixels"], N, draft=x["drafts"].get(name))
        unnormalize(decode_action(tokens.cpu().numpy()), stats)
        return tokens, passes

    for name in names * 2:  # warm-up
        act(name, inputs[0])
    seconds, passes, same, gaps = {name: [] for name in names}, Counter(), Counter(), Counter()

    def compare(name: str, tokens: torch.Tensor, x: dict):
        """Whether the action is model.generate's; if not, how far apart the logits of the two tokens were."""
        differs = (tokens != x["tokens"])[0].nonzero().flatten().tolist()
        same[name] += not differs
        if differs:
            j = differs[0]  # what comes after it follows from it
            mine, other = (x["logits"][0, j, t[0, j]].item() for t in (x["tokens"], tokens))
            gaps[name] = max(gaps[name], mine - other)

    if official:
        official(0)
        seconds["official"] = []
    for k in range(cfg.actions):
        x = inputs[i := k % len(inputs)]
        for j in range(len(names)):
            name = names[(j + k) % len(names)]
            spent, (tokens, n) = timed(act, name, x)
            seconds[name].append(spent)
            passes[name] += n
            compare(name, tokens, x)
        if official:
            answer = official(i)
            seconds["official"].append(answer["seconds"])
            compare("official", torch.tensor([answer["tokens"]], device=x["tokens"].device), x)
        if k == cfg.actions // 10:
            before = memory_mb()
    growth = memory_mb() - before
    ways = {}
    for name, s in seconds.items():
        low, middle, high = (1e3 * np.quantile(s, (0.1, 0.5, 0.9))).tolist()
        ways[name] = dict(ms=middle, ms_10=low, ms_90=high, actions_per_s=1e3 / middle, same_action=same[name] / len(s))
        ways[name]["largest_logit_gap"] = float(gaps[name])
        ways[name]["tokens_per_pass"] = N * len(s) / passes[name] if passes[name] else 1.0
        if official:
            ways[name]["official_over_this"] = 1e3 * float(np.median(seconds["official"])) / middle
    print(f"{'':20s}" + "".join(f"{key:>19s}" for key in ways[names[0]]))
    for name, row in ways.items():
        print(f"{name:20s}" + "".join(f"{value:19.3f}" for value in row.values()))
    rows = dict(checkpoint=cfg.checkpoint or cfg.shape, dtype=cfg.dtype, device=device, actions=cfg.actions)
    rows["parameters_m"] = sum(p.numel() for p in model.parameters()) / 1e6
    rows |= stages(policy, inputs, stats)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else peak_memory_gb()
    rows |= dict(memory_growth_mb=growth, peak_gb=peak, ways=ways)
    report(rows)
    if cfg.log:
        with open(cfg.log, "a") as f:
            f.write(json.dumps(dict(rows, label=cfg.label or f"{rows['checkpoint']}, {cfg.dtype}")) + "\n")
    if cfg.plot:
        plot([json.loads(line) for line in Path(cfg.log).read_text().splitlines()] if cfg.log else [rows], cfg.plot)


@torch.inference_mode()
def stages(policy: sample.Policy, inputs: list[dict], stats: dict) -> dict:
    """Medians of what one action is made of, in ms, and how near decoding comes to the memory's speed."""
    model, llama, spent = policy.model, policy.model.language_model, {}
    for x in inputs[:20] * 2:

        def take(name: str, fn, *args):
            seconds, out = timed(fn, *args)
            spent.setdefault(name, []).append(seconds)
            return out

        def look(picture):
            return policy.processor.normalize(torch.from_numpy(sample.prepare(policy, picture)[None]))

        take("picture", look, x["picture"])
        take("towers", model.vision_backbone, x["pixels"])
        embedded = model.embed(x["ids"], x["pixels"])  # (1, S, D)
        cache, S = llama.new_cache(1, embedded.shape[1] + N), embedded.shape[1]

        def decode(embedded, cache=cache, S=S):
            return llama.lm_head(llama(embedded, cache=cache, start=S)).argmax(-1)

        take("prompt", lambda x, cache: llama(x, cache=cache), embedded, cache)
        take("one token", decode, llama.model.embed_tokens(x["tokens"][:, :1]))
        take("to units", lambda tokens: unnormalize(decode_action(tokens.cpu().numpy()), stats), x["tokens"])
    rows = {f"{name}, ms": 1e3 * float(np.median(s)) for name, s in spent.items()}
    weights = *llama.model.layers.parameters(), *llama.model.layers.buffers(), llama.lm_head.weight
    read = sum(w.nbytes for w in weights)
    block = torch.zeros(2**28, dtype=torch.uint8, device=weights[0].device)
    other = torch.zeros_like(block)
    copy = min(timed(other.copy_, block)[0] for _ in range(9))
    rows["decode, GB/s"] = read / rows["one token, ms"] / 1e6
    rows["copy, GB/s"] = 2 * block.nbytes / copy / 1e9
    return rows | {"decode, share of copy": rows["decode, GB/s"] / rows["copy, GB/s"]}


def drafts(cfg: Config):
    """Tokens settled in one pass, for each kind of draft, along trajectories; no draft: 1."""
    policy = sample.load(cfg.checkpoint, getattr(torch, cfg.dtype), sample.pick_device(cfg.device))
    cfg.unnorm_key = cfg.unnorm_key or next(iter(policy.norm_stats))
    stats = sample.action_stats(policy.norm_stats, cfg.unnorm_key, cfg.checkpoint)
    engine, inputs, passes = Engine(policy.model), make_inputs(cfg, policy), Counter()
    for x in inputs:
        x["tokens"] = policy.model.generate(x["ids"], x["pixels"], N)[0]
    usual = torch.cat([x["tokens"] for x in inputs]).mode(dim=0).values[None]
    still, mean = still_tokens(stats), torch.from_numpy(encode_action(normalize(np.array([stats["mean"]]), stats)))
    for x in inputs:
        last = still if x["before"] is None else inputs[x["before"]]["tokens"]
        before = None if x["before"] is None else inputs[x["before"]]["before"]
        straight = (
            last
            if before is None
            else (2 * last - inputs[before]["tokens"]).clamp(VOCAB_SIZE - NUM_BINS, VOCAB_SIZE - 1)
        )
        kinds = {"last action": last, "last two, straight on": straight, "no motion": still, "mean action": mean}
        for name, draft in (kinds | {"most frequent of each": usual}).items():
            tokens, n = engine.generate(x["ids"], x["pixels"], N, draft=draft)
            passes[name] += n
    report({"checkpoint": cfg.checkpoint, "actions": len(inputs)} | {k: N * len(inputs) / n for k, n in passes.items()})


def agree(cfg: Config):
    """How often --checkpoint writes the tokens of --against, and how far apart their actions are."""
    said = []
    for folder in (cfg.against, cfg.checkpoint):
        policy = sample.load(folder, getattr(torch, cfg.dtype), sample.pick_device(cfg.device))
        if not said:
            cfg.unnorm_key = cfg.unnorm_key or next(iter(policy.norm_stats))
            stats = sample.action_stats(policy.norm_stats, cfg.unnorm_key, folder)
            inputs = make_inputs(cfg, policy)
        said.append(torch.cat([policy.model.generate(x["ids"], x["pixels"], N)[0] for x in inputs]).cpu().numpy())
    y = [decode_action(tokens) for tokens in said]
    units = np.abs(unnormalize(y[0], stats) - unnormalize(y[1], stats)).mean(axis=0)
    rows = dict(checkpoint=cfg.checkpoint, against=cfg.against, dtype=cfg.dtype, actions=len(inputs))
    rows |= dict(same_tokens=float((said[0] == said[1]).mean()), same_actions=float((said[0] == said[1]).all(1).mean()))
    report(rows | dict(l1_normalised=float(np.abs(y[0] - y[1]).mean()), l1_units=[round(u, 6) for u in units.tolist()]))


def plot(runs: list[dict], path: str):
    """Bars of milliseconds per action, a group for each run, a colour for each way to decode."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = ["official", "model.generate", "one by one", "drafted", "drafted, all wrong", "drafted, all right"]
    names = [n for n in names if any(n in run["ways"] for run in runs)]
    figure, axes = plt.subplots(1, len(runs), figsize=(2.6 * len(runs) + 1, 3.2), squeeze=False)
    for axis, run in zip(axes[0], runs, strict=True):
        for k, name in enumerate(name for name in names if name in run["ways"]):
            ms = run["ways"][name]["ms"]
            axis.bar(k, ms, color=f"C{names.index(name)}", label=name)
            axis.text(k, ms, f"{ms:,.0f}" if ms >= 10 else f"{ms:.1f}", ha="center", va="bottom", fontsize=8)
        axis.margins(y=0.1)
        axis.set_title(run.get("label", ""), fontsize=9)
        axis.set_xticks([])
    axes[0][0].set_ylabel("ms per action (median)")
    handles = {h: t for axis in axes[0] for h, t in zip(*axis.get_legend_handles_labels(), strict=True)}
    unique = {t: h for h, t in handles.items()}
    figure.legend(unique.values(), unique.keys(), loc="lower center", ncols=len(unique), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path, dpi=110)
