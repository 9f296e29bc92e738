"""
Train an OpenVLA: one process on one device, or many under torchrun. The whole loop is in `train`, top to bottom.

    python train.py                                                        # the toy world, whole job, CPU, minutes
    python train.py --config bridge.py --data_root_dir DIR --base_checkpoint openvla-7b
    torchrun --nproc-per-node 8 train.py --config bridge.py --data_root_dir DIR --base_checkpoint openvla-7b

A run folder holds metrics.jsonl, checkpoints/step-NNNNNN (to resume: weights, optimizer, step, configuration) and
checkpoint/ (Hugging Face layout, for sample.py and the official code). The same command again resumes the run.

OpenVLA section 3.4, https://arxiv.org/abs/2406.09246; vla-scripts/train.py of github.com/openvla/openvla.
Sharding: FSDP2, https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html.
Axes: B batch, n trained positions, V ids.
"""

import json
import math
import os
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

from checkpoint import ADAPTER_WEIGHTS, check_folder, fingerprint, refuse_quantized, stored_dtype
from configurator import configure, fail
from data import Mixture, Positions, check_object, make_loader, open_mixture, scheme_of, warn_constant, warn_gripper
from formats.rlds import HOLD_OUT, NO_BAR
from image import CROPPED, WHOLE, ImageProcessor
from metrics import Log, Window, count, plot_curves, total
from model import INDEX, OpenVLA, OpenVLAConfig, write_atomically, write_json
from tokenizer import PAD, SCHEME, Tokenizer, make_standin, prompt_for


@dataclass
class Config:
    # data
    data_root_dir: str = ""  # folder with one RLDS folder per dataset
    data_mix: Any = "bridge"  # mixture or dataset of oxe.py, or a list of (name or dataset object, weight)
    image_aug: bool = True  # random 90 % crops and colours; the checkpoint then asks for centre crops
    num_workers: int = 2  # processes that read and decode
    hold_out: float = HOLD_OUT  # share of the episodes, of data without a validation split, that is not trained on
    skip_bad_records: bool = False  # leave broken records out of the index and count them, instead of stopping
    # model
    base_checkpoint: str = ""  # folder in Hugging Face layout to start from
    random_model: dict = field(default_factory=dict)  # or: the config.json of a model to start from random weights
    tokenizer: str = ""  # tokenizer.model; "": that of the base checkpoint, or a stand-in for a random model
    train_parts: str = "full"  # full, frozen_vision, last_layer (of the language model), sandwich (vision + last layer)
    words: tuple[str, ...] = ()  # that the stand-in tokenizer knows as a whole; it spells all others
    # optimization
    batch_size: int = 256  # samples per step, over all processes
    micro_batch_size: int = 32  # samples per process and forward pass; gradients are accumulated to batch_size
    max_steps: int = 100_000
    lr: float = 2e-5
    schedule: str = "constant"  # constant, cosine (to 0 at max_steps), step (times 0.1 from decay_step on)
    warmup_steps: int = 0  # linear, from 0
    decay_step: int = 100_000
    weight_decay: float = 0.0  # not on norms and biases
    beta2: float = 0.999
    grad_clip: float = 1.0  # norm of all gradients; 0: off
    bf16: bool = True  # compute in bfloat16, keep weights and sum gradients in float32; off on the CPU
    activation_checkpointing: bool = True  # recompute blocks in the backward pass: less memory, a third more compute
    seed: int = 7
    # run
    run_dir: str = ""  # "": runs/ and the name of the data mix
    resume: str = "auto"  # auto: the newest complete checkpoint of run_dir; never; or a step-NNNNNN folder
    log_every: int = 10
    save_every: int = 1000
    keep_checkpoints: int = 2  # older ones are deleted
    export_every_save: bool = False  # write checkpoint/ at each save, not only at the end
    val_every: int = 0  # steps between looks at the validation split; 0: never
    val_batches: int = 10
    wandb: str = ""  # W&B project to log to
    tensorboard: bool = False
    toy_episodes: int = 0  # > 0: first make the toy world's demonstrations, afterwards evaluate in it (toy.py)
    toy_scenes: int = 200  # unseen scenes of that evaluation


# What a resumed run may not change, of this script's options and those of finetune_*.py; and what it says if it does
SAME = {"data_mix", "hold_out", "image_aug", "random_model", "train_parts", "batch_size", "seed", "lora_rank"}
SAME |= {"lora_alpha", "lora_targets", "quantize_base", "action_chunk", "views", "use_proprio", "head", "film"}
TOLD = {"max_steps", "lr", "schedule", "warmup_steps", "decay_step", "weight_decay", "beta2", "grad_clip", "bf16"}
TOLD |= {"lora_dropout"}

# -----------------------------------------------------------------------------
# Pieces


def get_lr(step: int, cfg: Config) -> float:
    """Learning rate of a step (0, 1, ...), from its number alone."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    if cfg.schedule == "cosine":
        done = (step - cfg.warmup_steps) / max(cfg.max_steps - cfg.warmup_steps, 1)
        return cfg.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return cfg.lr * (0.1 if cfg.schedule == "step" and step >= cfg.decay_step else 1.0)


def freeze(model: OpenVLA, parts: str):
    """Set requires_grad for one of the paper's ways to train (table 1; prismatic/models/vlms/prismatic.py)."""
    language = model.language_model
    last = (language.model.embed_tokens, language.model.layers[-1], language.lm_head)
    trained = dict(
        full=(model,),
        frozen_vision=(model.projector, language),
        last_layer=last,
        sandwich=(model.vision_backbone, model.projector, *last),
    )
    model.requires_grad_(False)
    for module in trained[parts]:
        module.requires_grad_(True)


def blocks_of(model: torch.nn.Module) -> list:
    """The transformer blocks of both towers and of the language model."""
    model = core(model)
    towers = [vit for vit in (model.vision_backbone.featurizer, model.vision_backbone.fused_featurizer) if vit]
    return [block for vit in towers for block in vit.blocks] + list(model.language_model.model.layers)


def core(model: torch.nn.Module) -> OpenVLA:
    """The model itself, or the one that an OFT (oft.py) holds."""
    return getattr(model, "vla", model)


def shard(model: torch.nn.Module, device: str, bf16: bool):
    """FSDP2: spread weights, gradients and optimizer over all processes; hybrid when there are several nodes."""
    world, per_node = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    nodes = world // per_node
    shape, names = ((nodes, per_node), ("replicate", "shard")) if nodes > 1 else ((world,), ("shard",))
    mesh = init_device_mesh(device, shape, mesh_dim_names=names)
    dtype = torch.bfloat16 if bf16 else torch.float32
    options = dict(mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
    for block in blocks_of(model):
        fully_shard(block, **options)
    fully_shard(core(model).vision_backbone, **options)
    fully_shard(model, **options)


def build_optimizer(model: torch.nn.Module, cfg: Config, fused: bool) -> torch.optim.AdamW:
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        dict(params=[p for p in params if p.dim() > 1], weight_decay=cfg.weight_decay),
        dict(params=[p for p in params if p.dim() <= 1], weight_decay=0.0),
    ]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, cfg.beta2), fused=fused)


def forward(model, batch: dict, processor: ImageProcessor, device: str, num_datasets: int):
    """One batch of data.collate -> its loss, and sums for the metrics, (num_datasets, 3): see metrics.count."""
    images, ids, labels = (batch[k].to(device, non_blocking=True) for k in ("images", "input_ids", "labels"))
    pixel_values = processor.normalize(images[:, 0]).to(next(model.parameters()).dtype)
    logits, loss = model(ids, pixel_values, labels)
    trained = labels[:, 1:] >= 0
    which = batch["dataset"].to(device)[:, None].expand_as(trained)[trained]
    return loss, count(logits.detach(), labels[:, 1:][trained], which, num_datasets)


# -----------------------------------------------------------------------------
# Checkpoints: what is frozen is not in them, as the base checkpoint has it

TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


def save(run: Path, step: int, model, optimizer, cfg: Config, stats: dict, base: str = ""):
    """checkpoints/step-NNNNNN, written beside and renamed when whole; then the oldest beyond keep_checkpoints go."""
    final, work = run / "checkpoints" / f"step-{step:06d}", run / "checkpoints" / f".step-{step:06d}"
    if main_process():
        shutil.rmtree(work, ignore_errors=True)
    barrier()
    weights, moments = get_state_dict(model, optimizer, options=TRAINED)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=work)
    if main_process():
        write_json(work / "train.json", dict(step=step, config=printable(cfg), statistics=stats, base=base))
        shutil.rmtree(final, ignore_errors=True)
        work.rename(final)
        for old in complete_checkpoints(run)[: -cfg.keep_checkpoints]:
            shutil.rmtree(old)
    barrier()


def complete_checkpoints(run: Path) -> list[Path]:
    return sorted(path.parent for path in (run / "checkpoints").glob("step-*/train.json"))


def set_aside(run: Path, step: int):
    """Checkpoints of later steps are another run's, now that this one starts at `step`: they would be taken for it."""
    later = [folder for folder in complete_checkpoints(run) if int(folder.name[5:]) > step]
    if later and main_process():
        n = 1
        while (aside := run / f"checkpoints-before-{n}").exists():
            n += 1
        aside.mkdir()
        for folder in later:
            folder.rename(aside / folder.name)
        print(f"checkpoints beyond step {step} are now in {aside}")
    barrier()


def load(folder: Path, model, optimizer) -> int:
    """Read a step-NNNNNN folder, saved by any number of processes, in place. Returns the number of steps done."""
    weights, moments = get_state_dict(model, optimizer, options=TRAINED)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=TRAINED
    )
    return json.loads((folder / "train.json").read_text())["step"]


def check_same(folder: Path, before: dict, now: dict):
    """A run goes on as the one that it was: raise ValueError where that is not so, print what else has changed."""
    before = {"hold_out": HOLD_OUT} | before  # what it was before it could be set
    for key in now.keys() & before.keys():
        if " at 0x" in f"{before[key]}{now[key]}":  # objects, which have no lasting name
            continue
        if before[key] != now[key] and key in SAME:
            raise ValueError(f"{folder}: trained with {key} {before[key]!r}, now it is {now[key]!r}; give the same, "
                             f"or another --run_dir, or --resume never to start anew")  # fmt: skip
        if before[key] != now[key] and key in TOLD and main_process():
            print(f"from here on {key} is {now[key]!r}, it was {before[key]!r}")


def export(run: Path, model: OpenVLA, tokenizer: Tokenizer, processor: ImageProcessor, stats: dict, cfg: Config):
    """run/checkpoint: the model in Hugging Face layout, with all that sample.py and the official classes need."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, _ = get_state_dict(model, [], options=options)
    if main_process():
        with torch.device("meta"):
            whole = OpenVLA(model.cfg)
        whole.load_state_dict(weights, assign=True)
        whole.unused, whole.cfg.extra = model.unused, {**model.cfg.extra, "norm_stats": stats}
        write_preparation(run / "checkpoint", tokenizer, processor, stats)
        (run / "checkpoint" / INDEX).unlink(missing_ok=True)  # killed now, it is none rather than half an old one
        bf16 = cfg.bf16 and torch.cuda.is_available()
        whole.save_pretrained(run / "checkpoint", torch.bfloat16 if bf16 else torch.float32)
    barrier()


def write_preparation(folder: Path, tokenizer: Tokenizer, processor: ImageProcessor, stats: dict):
    """What a checkpoint folder has beside weights and config.json."""
    for name, content in tokenizer.files().items():
        write_atomically(folder / name, lambda tmp, content=content: tmp.write_bytes(content))
    tokens = dict(_from_model_config=True, bos_token_id=1, eos_token_id=2, pad_token_id=PAD)
    write_json(folder / "generation_config.json", tokens)
    write_json(folder / "preprocessor_config.json", processor.to_dict())
    write_json(folder / "dataset_statistics.json", stats)


def printable(cfg: Config) -> dict:
    return {k: v if isinstance(v, str | int | float | bool | dict) else str(v) for k, v in asdict(cfg).items()}


# -----------------------------------------------------------------------------
# Processes


def main_process() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def barrier():
    if dist.is_initialized():
        dist.barrier()


# -----------------------------------------------------------------------------
# Preparation


def check_config(cfg: Config, world: int, run: Path):
    """Everything that can be found wrong before long work. Raises ValueError or OSError."""
    choices = dict(
        train_parts=("full", "frozen_vision", "last_layer", "sandwich"), schedule=("constant", "cosine", "step")
    )
    for key, known in choices.items():
        if getattr(cfg, key) not in known:
            raise ValueError(f"--{key} {getattr(cfg, key)!r} is none of {', '.join(known)}")
    for key in ("batch_size", "micro_batch_size", "max_steps", "log_every", "save_every", "keep_checkpoints"):
        if getattr(cfg, key) < 1:
            raise ValueError(f"--{key} {getattr(cfg, key)}: must be 1 or more")
    if not 0 <= cfg.hold_out < 1:
        raise ValueError(f"--hold_out {cfg.hold_out}: must be a share, at least 0 and below 1")
    if cfg.batch_size % (cfg.micro_batch_size * world):
        raise ValueError(
            f"batch_size {cfg.batch_size} is no multiple of micro_batch_size {cfg.micro_batch_size} x {world} processes"
        )
    if not cfg.data_root_dir and isinstance(cfg.data_mix, str):
        raise ValueError("--data_root_dir DIR is missing, the folder with the data; README.md says where to get some, "
                         "`python train.py` alone makes its own and needs none")  # fmt: skip
    if bool(cfg.base_checkpoint) == bool(cfg.random_model):
        raise ValueError(
            "give --base_checkpoint FOLDER, or a config file with a random_model (--config small.py), not both"
        )
    if not main_process():
        return
    try:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        write_atomically(run / ".writable", lambda tmp: tmp.write_text(""))
        (run / ".writable").unlink()
    except OSError as error:
        raise OSError(f"--run_dir {run} cannot be written ({error}); choose another") from None


def build(cfg: Config) -> tuple[OpenVLA, Tokenizer, ImageProcessor]:
    """
    Model (on the CPU, float32, frozen where it shall not train), tokenizer and image processor: those of the base
    checkpoint, or new ones for random weights.
    """
    model, tokenizer, processor = start(cfg)
    freeze(model.float(), cfg.train_parts)
    return model, tokenizer, processor


def start(cfg: Config) -> tuple[OpenVLA, Tokenizer, ImageProcessor]:
    if cfg.base_checkpoint:
        config = check_folder(cfg.base_checkpoint)
        refuse_quantized(config, cfg.base_checkpoint)
        tokenizer = Tokenizer(cfg.tokenizer or cfg.base_checkpoint, prompt_for(config.extra))
        processor = ImageProcessor.from_pretrained(cfg.base_checkpoint)
        stored = stored_dtype(config, cfg.base_checkpoint)
        return OpenVLA.from_pretrained(cfg.base_checkpoint, stored), tokenizer, processor
    config = OpenVLAConfig.from_dict(cfg.random_model)
    if not cfg.tokenizer:
        cfg.tokenizer = str(Path(cfg.run_dir) / "tokenizer.model")
        make_standin(cfg.tokenizer, cfg.words)
    n = len(config.vision)
    processor = ImageProcessor(
        config.vision[0].img_size, means=ImageProcessor.means[-n:], stds=ImageProcessor.stds[-n:]
    )
    config.extra.setdefault("image_resize_strategy", processor.strategy)
    return OpenVLA(config).init_weights(cfg.seed), Tokenizer(cfg.tokenizer, prompt_for(config.extra)), processor


def check_disk(run: Path, trained: int, exported: int, keep: int):
    need, free = trained * 12 * (keep + 1) + exported * 4, shutil.disk_usage(run).free
    if free < need:
        raise OSError(
            f"{run}: {keep + 1} checkpoints and the export need {need / 1e9:.1f} GB, the disk has {free / 1e9:.1f}"
        )


# -----------------------------------------------------------------------------
# The loop


def train(cfg: Config, make=build, write=export, forward=forward, views=("primary",), action_chunk=1) -> dict:
    """
    Train as the config says. Returns the metrics of the last step. Raises ValueError or OSError for bad input.
    make, write, forward: what trains, what becomes of it, what a step computes; finetune_lora.py and finetune_oft.py
    have their own. views, action_chunk: the cameras and the length of the answer in a sample.
    """
    sharded = "RANK" in os.environ  # started by torchrun
    cuda = torch.cuda.is_available()
    if sharded and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if sharded else (0, 1)
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    cfg.run_dir = cfg.run_dir or f"runs/{cfg.data_mix if isinstance(cfg.data_mix, str) else 'mine'}"
    run = Path(cfg.run_dir)
    check_config(cfg, world, run)

    # data, model, optimizer
    show = lambda files, title: tqdm(files, title, unit="file", leave=False, disable=not main_process())  # noqa: E731
    if rank == 0:  # the index is made once; the others find it
        open_data(cfg, "train", views, action_chunk, show)
    barrier()
    parts = open_data(cfg, "train", views, action_chunk)
    if cfg.val_every and not any(len(d) for d, _ in open_data(cfg, "val", views, action_chunk)):
        raise ValueError(f"--val_every: no validation split, and --hold_out {cfg.hold_out:g} leaves no episode for one")
    stats = {d.name: d.statistics | scheme_entry(d) for d, _ in parts}
    newest = complete_checkpoints(run)[-1:] if cfg.resume == "auto" else [Path(cfg.resume)] * (cfg.resume != "never")
    if newest:
        before = json.loads((newest[0] / "train.json").read_text())
        if without_scheme(before["statistics"]) != without_scheme(stats):
            raise ValueError(
                f"{newest[0]}: trained with statistics of {sorted(before['statistics'])} that are not those of the "
                f"data now, {sorted(stats)}; give the same data, or --resume never to start anew"
            )
        check_same(newest[0], before["config"], printable(cfg))
    model, tokenizer, processor = make(cfg)
    n_all = sum(p.numel() for p in model.parameters())
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    check_disk(run, n_trained, n_all if write is export else n_trained, cfg.keep_checkpoints)
    processor.trained_on = CROPPED if cfg.image_aug else WHOLE
    if cfg.activation_checkpointing:
        for block in blocks_of(model):
            block.forward = lambda *args, run_block=block.forward: recompute(run_block, *args, use_reentrant=False)
    if sharded or cuda:
        if not dist.is_initialized():  # one GPU: the same path, so float32 weights and bfloat16 compute
            dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
        shard(model, "cuda" if cuda else "cpu", cfg.bf16 and cuda)
    model.train()
    optimizer = build_optimizer(model, cfg, fused=cuda or not sharded)
    step, base = 0, fingerprint(cfg.base_checkpoint) if n_trained < n_all and cfg.base_checkpoint else ""
    if newest:
        if n_trained < n_all and before["config"]["base_checkpoint"] != cfg.base_checkpoint:
            raise ValueError(f"{newest[0]}: its frozen parts are in {before['config']['base_checkpoint']}, not in "
                             f"{cfg.base_checkpoint}; give that --base_checkpoint")  # fmt: skip
        if before.get("base", base) != base:
            raise ValueError(f"{newest[0]}: its frozen parts are not the weights that {cfg.base_checkpoint} holds now")
        step = load(newest[0], model, optimizer)

    set_aside(run, step)
    mixture = Mixture(parts, tokenizer, processor.size, cfg.seed, cfg.image_aug, action_chunk)
    positions = Positions(cfg.batch_size, cfg.micro_batch_size, rank, world, step)
    batches = iter(make_loader(mixture, positions, cfg.num_workers, pin_memory=cuda))
    accumulate = cfg.batch_size // (cfg.micro_batch_size * world)
    log = Log(run, cfg.max_steps, step, printable(cfg), cfg.wandb, cfg.tensorboard) if main_process() else None
    stop = []
    handlers = {s: signal.signal(s, lambda number, _: stop.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    if main_process():
        print(f"{n_trained / 1e6:.1f} M of {n_all / 1e6:.1f} M parameters train, "
              f"{sum(map(len, mixture.datasets)):,} frames in {len(parts)} datasets, from step {step}")  # fmt: skip
        for name, action in ((name, s["action"]) for name, s in stats.items()):
            for line in warn_constant(action) + warn_gripper(action):
                print(f"warning: {name}: {line}")
    metrics, window, started = {}, Window(len(parts), device), step
    while step < cfg.max_steps and not stop:
        torch.manual_seed(cfg.seed + step * world + rank)  # for dropout; data has its own order
        for group in optimizer.param_groups:
            group["lr"] = get_lr(step, cfg)
        step_loss = torch.zeros((), device=device)
        for micro in range(accumulate):
            before = time.perf_counter()
            batch = next(batches)
            window.waited += time.perf_counter() - before
            if sharded:
                model.set_requires_gradient_sync(micro == accumulate - 1)
            loss, sums = forward(model, batch, processor, device, len(parts))
            (loss / accumulate).backward()
            step_loss += loss.detach() / accumulate
            window.add(batch, sums)
        window.losses.append(step_loss)
        if not torch.isfinite(total(step_loss.clone())):
            first = step * cfg.batch_size
            raise ValueError(
                f"the loss is not finite in step {step} (samples {first} to {first + cfg.batch_size - 1} of "
                f"the stream, seed {cfg.seed}); stopped, {run / 'checkpoints'} keeps the last good state"
            )
        if cfg.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if log:
            log.bar.update()
        if sharded:  # all processes stop together
            flag = total(torch.tensor(len(stop), device=device))
            stop = stop or [signal.SIGTERM] * int(flag)
        if step % cfg.log_every == 0 or step == cfg.max_steps:
            metrics = {"step": step, "lr": get_lr(step - 1, cfg), **window.close(core(model), list(stats))}
            window = Window(len(parts), device)
            if cfg.val_every and step % cfg.val_every < cfg.log_every:
                metrics |= validate(model, cfg, processor, tokenizer, device, forward, views, action_chunk)
            if log:
                log.write(metrics)
        if step % cfg.save_every == 0 or step == cfg.max_steps or stop:
            save(run, step, model, optimizer, cfg, stats, base)
            if log and metrics:
                plot_curves(run)
            if cfg.export_every_save or step == cfg.max_steps:
                write(run, model, tokenizer, processor, stats, cfg)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if log:
        log.close()
    if stop and main_process():
        print(f"stopped after step {step}; resume with: {' '.join([Path(sys.executable).name, *sys.argv])}")
        raise SystemExit(130 if stop[0] == signal.SIGINT else 143)
    if started >= cfg.max_steps:
        if not exported(run, newest[0]):  # killed before that
            write(run, model, tokenizer, processor, stats, cfg)
        if main_process():
            print(f"{run} is already trained to step {step}; raise --max_steps, or --resume never starts anew")
    return metrics


def without_scheme(stats: dict) -> dict:
    """As runs wrote it that are older than that entry."""
    return {name: {k: v for k, v in entry.items() if k != "scheme"} for name, entry in stats.items()}


def scheme_entry(dataset) -> dict:
    """Statistics do not tell which of them became -1 and 1; only where it is not q01 and q99 that is written down."""
    return {"scheme": scheme_of(dataset)} if scheme_of(dataset) != SCHEME else {}


def exported(run: Path, saved: Path) -> bool:
    """Whether what sample.py reads (model, or adapter) is there, and is newer than a checkpoint of the training."""
    files = [run / "checkpoint" / INDEX, run / ADAPTER_WEIGHTS]
    return any(f.is_file() and f.stat().st_mtime >= (saved / "train.json").stat().st_mtime for f in files)


def open_data(cfg: Config, split: str, views, action_chunk: int, progress=NO_BAR) -> list:
    """The datasets, as training wants them. Raises ValueError for a dataset object that gives something else."""
    skip = cfg.skip_bad_records
    parts = open_mixture(cfg.data_root_dir, cfg.data_mix, split, views, action_chunk, cfg.hold_out, skip, progress)
    for what, _ in [] if isinstance(cfg.data_mix, str) else cfg.data_mix:
        if not isinstance(what, str):
            check_object(what, split, len(views), action_chunk)
    return parts


@torch.no_grad()
def validate(model, cfg: Config, processor, tokenizer, device: str, forward, views, action_chunk) -> dict:
    """Loss and action metrics on the first frames of the validation split, the same ones each time."""
    parts = open_data(cfg, "val", views, action_chunk)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    positions = Positions(cfg.micro_batch_size * world, cfg.micro_batch_size, rank, world)
    window = Window(len(parts), device)
    model.eval()
    loader = make_loader(Mixture(parts, tokenizer, processor.size, cfg.seed, False, action_chunk), positions)
    for batch, _ in zip(loader, range(cfg.val_batches), strict=False):
        loss, sums = forward(model, batch, processor, device, len(parts))
        window.losses.append(loss)
        window.add(batch, sums)
    model.train()
    metrics = window.close(core(model), [d.name for d, _ in parts])
    return {f"val/{k}": v for k, v in metrics.items() if k.startswith(("loss", "action", "l1"))}


@contextmanager
def ended_well():
    """A training script's main stands in it: one clear message for what can be mended, and no process group left."""
    try:
        yield
    except (ValueError, OSError) as error:
        fail(error)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def main(cfg: Config):
    start = time.perf_counter()
    with ended_well():
        if not cfg.toy_episodes:
            train(cfg)
            return
        import sample
        from toy import play
        from toy import world as toy

        cfg.run_dir = cfg.run_dir or "runs/toy"
        if not toy.is_written(cfg.data_root_dir, "toy"):
            splits = dict(train=toy.demonstrations(toy.TRAIN, cfg.toy_episodes), val=toy.demonstrations(toy.VAL, 20))
            print(f"{cfg.toy_episodes} demonstrations in {toy.write_rlds(cfg.data_root_dir, splits)}")
        train(cfg)
        result = play.evaluate(sample.load(f"{cfg.run_dir}/checkpoint"), cfg.toy_scenes, Path(cfg.run_dir))
        with open(Path(cfg.run_dir) / "metrics.jsonl", "a") as f:
            f.write(json.dumps({**result, "wall_seconds": time.perf_counter() - start}) + "\n")


if __name__ == "__main__":
    main(configure(Config, sys.argv[1:] or ["--config", "toy.py"]))
