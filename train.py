"""
Train an OpenVLA: one process on one device, or many under torchrun. The whole loop is in `train`, top to bottom.

    python train.py --config bridge.py --data_root_dir DIR --base_checkpoint openvla-7b
    torchrun --nproc-per-node 8 train.py --config bridge.py --data_root_dir DIR --base_checkpoint openvla-7b
    python train.py --config bridge.py --config small.py --data_root_dir DIR      # a small model, on a CPU

A run folder holds metrics.jsonl, checkpoints/step-NNNNNN (to resume: see resume.py) and checkpoint/ (Hugging Face
layout, for sample.py and the official code). The same command again resumes the run.

finetune_lora.py and finetune_oft.py run this loop with a model that they build.

OpenVLA section 3.4, https://arxiv.org/abs/2406.09246; vla-scripts/train.py of github.com/openvla/openvla.
"""

import math
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from checkpoint import Checkpoint, fingerprint, open_checkpoint
from configurator import configure, fail
from data import Mixture, Positions, check_cameras, make_loader, name_of_mixture, needs_folder, open_mixture
from distributed import (
    barrier,
    exit_cleanly,
    fill,
    gather,
    is_main_process,
    is_torchrun,
    rank,
    shard,
    start_processes,
    total,
    world_size,
)
from fast import FAST, record_action_tokens
from files import atomic_write, write_json
from fit_fast import choose_action_tokenizer, save_action_tokenizer
from formats.dataset import END_EFFECTOR, HOLD_OUT, RobotDataset
from formats.faults import WARN_AT_START, find_faults, read_numbers
from formats.workers import STOP_SIGNALS
from image import CROPPED, WHOLE, ImageProcessor
from metrics import Log, Window, count_errors, plot_curves
from model import INDEX, OpenVLA, OpenVLAConfig, is_unused
from normalize import SCHEME
from progress import no_progress, show_progress
from resume import (
    Saver,
    archive_later_checkpoints,
    check_disk,
    check_same_base,
    check_same_run,
    checkpoint_to_resume,
    describe_run,
    is_exported,
    load_checkpoint,
    lock_run,
    printable,
    read_train_record,
    remove_leftovers,
    unlock_run,
)
from speed.nf4 import NF4Linear
from tokenizer import EOS, FIRST_ACTION_ID, PAD, VOCAB_SIZE, Tokenizer, make_standin, prompt_for

WHAT_TO_GIVE = (
    "give a config file and what it needs, for example\n"
    "    python train.py --config bridge.py --data_root_dir DIR --base_checkpoint openvla-7b\n"
    "`python quickstart.py` needs nothing: it makes its own data and trains a small model in minutes"
)


@dataclass
class Config:
    # Data
    data_root_dir: str = ""  # folder with one RLDS folder per dataset, or hf:owner/name
    data_mix: Any = "bridge"  # mixture or dataset of formats/oxe.py; or your own, or a list: see data.parse_mixture
    views: tuple[str, ...] = ("primary",)  # cameras of datasets of formats/oxe.py; your own data names its own
    action_chunk: int = 1  # actions that the model learns to answer with
    oft_state: bool = False  # read the robot's state as OpenVLA-OFT does: without the pad column of LIBERO
    image_aug: bool = True  # random 90 % crops and colours; the checkpoint then asks for centre crops
    num_workers: int = 2  # processes that read and decode
    hold_out: float = HOLD_OUT  # share of the episodes that is not trained on, of data without a validation split
    make_data: str = ""  # command that makes the data if data_root_dir has none, for example that of configs/toy.py
    skip_bad_records: bool = False  # leave broken records out of the index and count them, instead of stopping

    # Model
    base_checkpoint: str = ""  # folder in Hugging Face layout to start from, or its name on the hub (owner/name)
    random_model: dict = field(default_factory=dict)  # or: the config.json of a model to start from random weights
    tokenizer: str = ""  # tokenizer.model; "": that of the base checkpoint, or a stand-in for a random model
    action_tokenizer: str = ""  # bins, fast (fitted to the data) or the folder of a FAST tokenizer; "": as the base has
    fast_scale: float = 10.0  # of a FAST that is fitted: the larger, the more exact, and the more tokens
    fast_vocab_size: int = 1024  # at most 2048
    train_parts: str = "full"  # full, frozen_vision, last_layer (of the language model), sandwich (vision + last layer)
    short_head: bool = False  # from random weights: only rows of lm_head that actions need train, others stay 0
    words: tuple[str, ...] = ()  # that the stand-in tokenizer knows as a whole; it spells all others

    # Optimization
    batch_size: int = 256  # samples per step, over all processes
    micro_batch_size: int = 32  # samples per process and forward pass; gradients are accumulated to batch_size
    max_steps: int = 100_000
    lr: float = 2e-5
    schedule: str = "constant"  # constant, cosine (to 0 at max_steps), step (times 0.1 from decay_step on)
    warmup_steps: int = 0  # linear; the first step has lr / warmup_steps
    decay_step: int = 100_000
    weight_decay: float = 0.0  # not on norms and biases
    beta2: float = 0.999
    grad_clip: float = 1.0  # largest norm of all gradients together; 0: off (LoRA's and OFT's default)
    bf16: bool = True  # compute in bfloat16, keep weights and sum gradients in float32; off on the CPU
    activation_checkpointing: bool = True  # recompute blocks in the backward pass: less memory, a third more compute
    compile: bool = False  # let torch.compile write one kernel of many operations, block by block; needs a C++ compiler
    seed: int = 7

    # Run
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


# -----------------------------------------------------------------------------
# What is trained


@dataclass
class Trainee:
    """
    What a recipe builds for the loop to train. Its model has no memory yet (it is on the device "meta"): the loop first
    decides which part of it each process holds.
    """

    model: torch.nn.Module  # an OpenVLA, or an OFT that holds one; it owns its loss
    vla: OpenVLA  # the OpenVLA in it
    tokenizer: Tokenizer
    processor: ImageProcessor
    files: dict[str, Path]  # where the weights of the base checkpoint are; {}: there is none, weights start random
    # fill(trainee, cfg) gives the model its first weights
    fill: Callable[["Trainee", Config], None]
    # export(run, trainee, statistics, cfg) writes what sample.py reads into the run folder
    export: Callable[[Path, "Trainee", dict, Config], None]
    exports_whole_model: bool = True  # False: only what trains


def build(cfg: Config, datasets: list[RobotDataset]) -> Trainee:
    """Build a model whose own weights train, in float32, frozen where `train_parts` says so."""
    check_cameras(datasets, num_images=1)
    model, tokenizer, processor, files = open_base(cfg)
    tokenizer.fast = choose_tokens(cfg, datasets, tokenizer)
    model.rows_count_equally = tokenizer.fast is not None
    freeze(model.float(), cfg.train_parts)
    return Trainee(model, model, tokenizer, processor, files, fill_base, export_model)


def open_base(cfg: Config) -> tuple[OpenVLA, Tokenizer, ImageProcessor, dict[str, Path]]:
    """
    Return the model without memory, tokenizer, image processor, and in which file each weight is: those of the base
    checkpoint, in the dtype it is stored in, or new ones for random weights (and no files).
    """
    if cfg.base_checkpoint:
        checkpoint = open_checkpoint(cfg.base_checkpoint)
        checkpoint.refuse_quantized()
        refuse_parts(checkpoint)
        if cfg.tokenizer:
            tokenizer = Tokenizer(cfg.tokenizer, prompt_for(checkpoint.config.extra))
            tokenizer.fast = checkpoint.fast
        else:
            tokenizer = checkpoint.tokenizer
        model = checkpoint.skeleton.to(checkpoint.stored_dtype)
        model.read_unused(checkpoint.weight_map)
        return model, tokenizer, checkpoint.processor, checkpoint.weight_map

    config = OpenVLAConfig.from_dict(cfg.random_model)
    n = len(config.vision)
    processor = ImageProcessor(
        size=config.vision[0].img_size, means=ImageProcessor.means[-n:], stds=ImageProcessor.stds[-n:]
    )
    config.extra.setdefault("image_resize_strategy", processor.strategy)
    path = cfg.tokenizer
    if not path:
        path = run_folder(cfg) / "tokenizer.model"
        if is_main_process():
            make_standin(path, cfg.words)
        barrier()
    tokenizer = Tokenizer(path, prompt_for(config.extra))
    with torch.device("meta"):
        model = OpenVLA(config)
    if cfg.short_head:
        model.answer_ids = torch.tensor([EOS, *range(FIRST_ACTION_ID, VOCAB_SIZE)])
    return model, tokenizer, processor, {}


def fill_base(trainee: Trainee, cfg: Config):
    """
    Give the model the weights of the base checkpoint, or random ones. Each process reads the rows that it holds, one
    weight at a time. Adapters and FiLM wrap modules; the wrapped ones are found by the names that they had before.
    """
    vla = trainee.vla
    if not trainee.files:
        for name, values in vla.random_weights(cfg.seed):
            fill(vla.get_parameter(name), values)
        return

    weights = {plain_name(name): weight for name, weight in vla.named_parameters()}
    layers_in_4_bits = {}
    for name, module in vla.named_modules():
        if isinstance(module, NF4Linear):
            layers_in_4_bits[f"{plain_name(name)}.weight"] = module

    opened = {file: safe_open(file, framework="pt") for file in set(trainee.files.values())}
    for name, file in trainee.files.items():
        if is_unused(name, vla.cfg):
            continue
        values = opened[file].get_slice(name)
        if name in layers_in_4_bits:
            layers_in_4_bits[name].fill(values[:])
            stays_mapped = False
        else:
            stays_mapped = fill(weights[name], values)
        if not stays_mapped:
            # Reading has pulled the file's pages into memory. Opening the file again lets the system drop them.
            opened[file] = safe_open(file, framework="pt")


def plain_name(name: str) -> str:
    """Return the name that a weight or module had before an adapter (`base_layer`) or FiLM (`block`) wrapped it."""
    wrappers = ("base_layer", "block")
    return ".".join(part for part in name.split(".") if part not in wrappers)


def refuse_parts(checkpoint: Checkpoint):
    """Raise ValueError for a folder that holds more than the model: its adapter or action head would get lost."""
    if checkpoint.adapter:
        raise ValueError(
            f"--base_checkpoint {checkpoint.folder} is a LoRA run; merge it first: python convert_weights.py "
            f"merge-lora {checkpoint.folder} OUT"
        )
    if checkpoint.is_oft:
        raise ValueError(
            f"--base_checkpoint {checkpoint.folder} is an OFT policy, whose action head would get lost; give the token "
            f"model that it was trained from"
        )


def freeze(model: OpenVLA, parts: str):
    """
    Set requires_grad for one of the paper's ways to train (table 1; prismatic/models/vlms/prismatic.py). The table
    below lists what trains; embeddings and head train together with the last layer.
    """
    llama = model.language_model
    last_layer = [llama.model.embed_tokens, llama.model.layers[-1], llama.lm_head]
    trained = {
        "full": [model],
        "frozen_vision": [model.projector, llama],
        "last_layer": last_layer,
        "sandwich": [model.vision_backbone, model.projector, *last_layer],
    }
    model.requires_grad_(False)
    for module in trained[parts]:
        module.requires_grad_(True)


def choose_tokens(cfg: Config, datasets: list[RobotDataset], of_base: Tokenizer) -> FAST | None:
    """Return the FAST tokenizer that actions become tokens with, or None: bins."""
    run = run_folder(cfg)
    return choose_action_tokenizer(cfg, run, datasets, of_base.fast, checkpoint_to_resume(run, cfg.resume))


# -----------------------------------------------------------------------------
# The parts of a step


def get_lr(step: int, cfg: Config) -> float:
    """Return the learning rate of a step (0, 1, ...), from its number alone."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    if cfg.schedule == "cosine":
        progress = (step - cfg.warmup_steps) / max(cfg.max_steps - cfg.warmup_steps, 1)
        return cfg.lr * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    if cfg.schedule == "step" and step >= cfg.decay_step:
        return cfg.lr * 0.1
    return cfg.lr


def build_optimizer(model: torch.nn.Module, cfg: Config, fused: bool) -> torch.optim.AdamW:
    """Build AdamW for what trains; norms and biases are not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": cfg.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, cfg.beta2), fused=fused)


def prepare_batch(batch: dict, trainee: Trainee, device: str) -> dict:
    """Return a batch of data.collate on the device, with `pixel_values` (B, 3 or 6 per camera, H, W)."""
    batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    dtype = trainee.vla.language_model.model.norm.weight.dtype
    views = [trainee.processor.normalize(images) for images in batch["images"].unbind(1)]
    return {**batch, "pixel_values": torch.cat(views, dim=1).to(dtype)}


def room_for_text(vla: OpenVLA, data: list[tuple[RobotDataset, float]]) -> int:
    """Return how many tokens of a sample are left for instruction and action: the context, less images and a state."""
    num_images = check_cameras([dataset for dataset, _ in data])
    images_and_state = num_images * vla.cfg.num_patches + 1
    return vla.cfg.text.max_position_embeddings - images_and_state


def check_finite(loss: torch.Tensor, step: int, cfg: Config):
    """Raise ValueError if the mean loss of all processes is not finite, and say which samples made it so."""
    if torch.isfinite(loss):
        return
    first = step * cfg.batch_size
    raise ValueError(
        f"the loss is not finite in step {step} (samples {first} to {first + cfg.batch_size - 1} of the stream, seed "
        f"{cfg.seed}); stopped, {run_folder(cfg) / 'checkpoints'} keeps the last good state"
    )


# -----------------------------------------------------------------------------
# The loop


def train(cfg: Config, build: Callable[[Config, list[RobotDataset]], Trainee] = build) -> dict:
    """
    Train as the config says, and return the metrics of the last step. Raises ValueError or OSError for bad input.

    build: makes what is trained; finetune_lora.py and finetune_oft.py have their own.
    """
    process, world, device = start_processes()
    has_cuda = device != "cpu"
    run = run_folder(cfg)
    check_config(cfg, world)
    check_writable(run)
    lock = lock_run(run)
    remove_leftovers(run)

    # Data.
    train_data, val_data = open_data(cfg)
    datasets = [dataset for dataset, _ in train_data]
    statistics = {dataset.name: statistics_entry(dataset) for dataset in datasets}
    resumed = checkpoint_to_resume(run, cfg.resume)
    if resumed:
        check_same_run(resumed, cfg, statistics)

    # Model and optimizer.
    trainee = build(cfg, datasets)
    trainee.processor.trained_on = CROPPED if cfg.image_aug else WHOLE
    model = trainee.model
    num_parameters = sum(p.numel() for p in model.parameters())
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    num_exported = num_parameters if trainee.exports_whole_model else num_trained
    check_disk(run, num_trained, num_exported, cfg.keep_checkpoints)
    if cfg.activation_checkpointing:
        trainee.vla.recompute_blocks()
    if cfg.compile:
        for block in trainee.vla.transformer_blocks():
            block.compile()
    has_many_processes = is_torchrun()
    if has_many_processes or has_cuda:  # one GPU takes the same path: float32 weights, bfloat16 compute
        units = [*trainee.vla.transformer_blocks(), trainee.vla.vision_backbone]
        shard(model, units, "cuda" if has_cuda else "cpu", cfg.bf16 and has_cuda)
    model.to_empty(device=device)
    trainee.fill(trainee, cfg)
    model.train()
    optimizer = build_optimizer(model, cfg, fused=has_cuda or not has_many_processes)

    # Continue a stopped run.
    has_frozen_base = num_trained < num_parameters and bool(cfg.base_checkpoint)
    base = fingerprint(cfg.base_checkpoint) if has_frozen_base else ""
    step = 0
    if resumed:
        if num_trained < num_parameters:
            check_same_base(resumed, cfg.base_checkpoint, base)
        step = load_checkpoint(resumed, model, optimizer)
    archive_later_checkpoints(run, step)
    started_at = step

    # The stream of batches is a function of the step, so it continues where it was.
    mixture = Mixture(
        train_data,
        trainee.tokenizer,
        image_size=trainee.processor.size,
        seed=cfg.seed,
        image_aug=cfg.image_aug,
        action_chunk=cfg.action_chunk,
        max_tokens=room_for_text(trainee.vla, train_data),
    )
    positions = Positions(cfg.batch_size, cfg.micro_batch_size, process, world, step)
    batches = iter(make_loader(mixture, positions, cfg.num_workers, pin_memory=has_cuda))
    accumulate = cfg.batch_size // (cfg.micro_batch_size * world)

    log = None
    if is_main_process():
        log = Log(run, cfg.max_steps, step, printable(cfg), cfg.wandb, cfg.tensorboard)
        print_start(datasets, num_trained, num_parameters, step)
    window = Window(len(datasets), device)
    if resumed:
        window.restore(read_train_record(resumed).get("window"))
    metrics = {}

    # From here on a signal does not end the process at once: there is something to save.
    signals_received = []
    handlers = catch_signals(signals_received)
    is_stopping = False

    with Saver(run, cfg.keep_checkpoints) as saver:
        while step < cfg.max_steps and not is_stopping:
            lr = get_lr(step, cfg)
            for group in optimizer.param_groups:
                group["lr"] = lr
            torch.manual_seed(cfg.seed + step * world + process)  # for dropout; the data has an order of its own

            # Forward and backward. Gradients add up over the micro-batches; processes exchange them after the last one.
            step_loss = torch.zeros((), device=device)
            for micro_step in range(accumulate):
                batch = window.timed_next(batches)
                batch = prepare_batch(batch, trainee, device)
                if has_many_processes:
                    model.set_requires_gradient_sync(micro_step == accumulate - 1)
                loss, predicted = model.loss(batch)
                (loss / accumulate).backward()
                step_loss += loss.detach() / accumulate
                window.add(batch, count_errors(predicted, batch, len(datasets), trainee.tokenizer.fast))
            step_loss = total(step_loss) / world
            check_finite(step_loss, step, cfg)
            window.losses.append(step_loss.item())

            # Update the weights.
            if cfg.grad_clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            is_last = step == cfg.max_steps

            # Ctrl-C or SIGTERM may have reached one process only, or one before another. They stop after the same step.
            num_signals = total(torch.tensor(len(signals_received), device=device))
            is_stopping = num_signals.item() > 0
            saver.check()

            # Report.
            if log:
                log.update_bar()
            if step % cfg.log_every == 0 or is_last:
                metrics = {"step": step, "lr": lr, **window.close(trainee.vla, list(statistics))}
                window = Window(len(datasets), device)
                if cfg.val_every and step % cfg.val_every < cfg.log_every:  # the first line after each val_every steps
                    with window.not_counted("val_s"):
                        metrics.update(validate(trainee, val_data, cfg, device))
                if log:
                    log.write(metrics)

            # Save.
            if step % cfg.save_every == 0 or is_last or is_stopping:
                about = {**describe_run(cfg, statistics, base), "window": window.state()}
                with window.not_counted("save_s"):
                    saver.save(step, model, optimizer, about)
                    if log and metrics:
                        plot_curves(run)
                    if is_last or is_stopping:
                        saver.wait()
                    if cfg.export_every_save or is_last:
                        trainee.export(run, trainee, statistics, cfg)

    restore_signals(handlers)
    if log:
        log.close()
    unlock_run(lock)
    if is_stopping:
        stop(step, signals_received[0] if signals_received else signal.SIGTERM)
    if started_at >= cfg.max_steps:
        # Only a resumed run starts at its last step. It may have been killed before its export.
        if not is_exported(run, resumed):
            trainee.export(run, trainee, statistics, cfg)
        if is_main_process():
            print(f"{run} is already trained to step {step}; raise --max_steps, or --resume never starts anew")
    return metrics


@torch.no_grad()
def validate(trainee: Trainee, val_data: list, cfg: Config, device: str) -> dict:
    """Return loss and action metrics on the first samples of the shuffled validation split, always the same ones."""
    positions = Positions(cfg.micro_batch_size * world_size(), cfg.micro_batch_size, rank(), world_size())
    mixture = Mixture(
        val_data,
        trainee.tokenizer,
        trainee.processor.size,
        cfg.seed,
        image_aug=False,
        action_chunk=cfg.action_chunk,
        max_tokens=room_for_text(trainee.vla, val_data),
    )
    window = Window(len(val_data), device)
    trainee.model.eval()
    for _, batch in zip(range(cfg.val_batches), make_loader(mixture, positions), strict=False):
        batch = prepare_batch(batch, trainee, device)
        loss, predicted = trainee.model.loss(batch)
        window.losses.append((total(loss) / world_size()).item())
        window.add(batch, count_errors(predicted, batch, len(val_data), trainee.tokenizer.fast))
    trainee.model.train()

    metrics = window.close(trainee.vla, [dataset.name for dataset, _ in val_data])
    wanted = ("loss", "action", "l1")
    return {f"val/{key}": value for key, value in metrics.items() if key.startswith(wanted)}


def catch_signals(received: list) -> dict:
    """
    From now on Ctrl-C, SIGTERM and SIGUSR1 (Slurm's warning before the time is up) only append themselves to
    `received`. Returns what `restore_signals` takes.
    """
    handlers = {}
    for number in STOP_SIGNALS:
        handlers[number] = signal.signal(number, lambda number, frame: received.append(number))
    return handlers


def restore_signals(handlers: dict):
    for number, handler in handlers.items():
        signal.signal(number, handler)


def stop(step: int, signal_number: int):
    """End a run that a signal has stopped, with the exit code that shells expect."""
    if is_main_process():
        print(f"stopped after step {step}; resume with: {resume_command()}", flush=True)
    barrier()  # as in exit_cleanly
    raise SystemExit(128 + signal_number)


def resume_command() -> str:
    """Return the command line that continues this run, so that it can be pasted into a shell."""
    launcher = [Path(sys.executable).name]
    if is_torchrun():
        launcher = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1")]
        nodes = os.environ.get("GROUP_WORLD_SIZE", "1")
        if nodes == "1":
            launcher.append("--standalone")
        else:
            launcher += ["--nnodes", nodes, "--rdzv-endpoint", f"{os.environ['MASTER_ADDR']}:29500"]
    return shlex.join([*launcher, *sys.argv])


def print_start(datasets: list[RobotDataset], num_trained: int, num_parameters: int, step: int):
    """Print what will be trained on what, and what looks wrong in the data."""
    num_frames = sum(len(dataset) for dataset in datasets)
    print(
        f"{num_trained / 1e6:.1f} M of {num_parameters / 1e6:.1f} M parameters train, {num_frames:,} frames in "
        f"{len(datasets)} datasets, from step {step}"
    )
    if torch.backends.mps.is_available():
        print("note: training does not use this Mac's GPU (mps), it runs on the CPU; sample.py and robots.serve use it")
    for dataset in datasets:
        for finding in find_faults(read_numbers(dataset, max_instructions=1000)):
            if finding.is_wrong and finding.cause in WARN_AT_START:
                print(f"warning: {dataset.name}: {finding.text}")


# -----------------------------------------------------------------------------
# Before the loop: options and data


def run_folder(cfg: Config) -> Path:
    """The folder of the run: run_dir, or runs/ and the name of the data mix."""
    if cfg.run_dir:
        return Path(cfg.run_dir)
    return Path("runs") / name_of_mixture(cfg.data_mix)


def check_config(cfg: Config, world: int):
    """Raise ValueError for options that cannot be right, before any long work."""
    choices = {
        "train_parts": ("full", "frozen_vision", "last_layer", "sandwich"),
        "schedule": ("constant", "cosine", "step"),
    }
    for key, known in choices.items():
        if getattr(cfg, key) not in known:
            raise ValueError(f"--{key} {getattr(cfg, key)!r} is none of {', '.join(known)}")
    smallest = {
        "batch_size": 1,
        "micro_batch_size": 1,
        "max_steps": 1,
        "log_every": 1,
        "save_every": 1,
        "keep_checkpoints": 1,
        "action_chunk": 1,
        "lr": 0,
        "warmup_steps": 0,
        "decay_step": 0,
        "weight_decay": 0,
        "grad_clip": 0,
        "num_workers": 0,
        "val_every": 0,
        "val_batches": 1 if cfg.val_every else 0,
        "seed": 0,
    }
    check_at_least(cfg, smallest)
    for key in ("hold_out", "beta2"):
        value = getattr(cfg, key)
        if not 0 <= value < 1:
            raise ValueError(f"--{key} {value}: must be at least 0 and below 1")

    if cfg.batch_size % (cfg.micro_batch_size * world):
        raise ValueError(
            f"batch_size {cfg.batch_size} is no multiple of micro_batch_size {cfg.micro_batch_size} x {world} processes"
        )
    if not cfg.data_root_dir and needs_folder(cfg.data_mix):
        raise ValueError(
            "--data_root_dir DIR is missing, the folder with the data; docs/your-data.md says where to get some, "
            "`python quickstart.py` makes its own and needs none"
        )
    if bool(cfg.base_checkpoint) == bool(cfg.random_model):
        raise ValueError(
            "give --base_checkpoint FOLDER, or a config file with a random_model (--config small.py), not both"
        )
    is_of_bins = cfg.action_tokenizer in ("", "bins")
    if cfg.short_head and (cfg.base_checkpoint or not is_of_bins):
        raise ValueError(
            "--short_head is for a model that starts from random weights and answers in bins; add --short_head False"
        )


def check_at_least(cfg: Config, smallest: dict[str, float]):
    """Raise ValueError for an option below its smallest value, or one that is infinite or NaN."""
    for key, limit in smallest.items():
        value = getattr(cfg, key)
        if not limit <= value < math.inf:
            raise ValueError(f"--{key} {value}: must be {limit} or more")


def check_writable(run: Path):
    """Make the run folder. Raises OSError if it cannot be written."""
    if not is_main_process():
        return
    try:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        with atomic_write(run / ".writable") as temporary:
            temporary.write_text("")
        (run / ".writable").unlink()
    except OSError as error:
        raise OSError(f"--run_dir {run} cannot be written ({error}); choose another") from None


def open_data(cfg: Config) -> tuple[list, list]:
    """
    Return [(dataset, weight)] for training and, if the config asks for validation, for validation. Data that is
    missing and the index of a dataset are made once, by the main process; the others wait for it.
    """
    if is_main_process():
        make_missing_data(cfg)
    else:
        barrier()
    progress = show_progress if is_main_process() else no_progress
    train_data = open_split(cfg, "train", progress)
    val_data = open_split(cfg, "val", progress) if cfg.val_every else []
    if is_main_process():
        barrier()

    if cfg.val_every and not any(len(dataset) for dataset, _ in val_data):
        raise ValueError(f"--val_every: no validation split, and --hold_out {cfg.hold_out:g} leaves no episode for one")
    return train_data, val_data


def make_missing_data(cfg: Config):
    """Run the command `make_data`, if there is one and the data is not there. Raises OSError if it fails."""
    if not cfg.make_data or not isinstance(cfg.data_mix, str):
        return
    is_there = (Path(cfg.data_root_dir) / cfg.data_mix).exists()
    if is_there:
        return

    command = cfg.make_data.replace("{data_root_dir}", shlex.quote(cfg.data_root_dir))
    print(f"$ {command}", flush=True)
    words = shlex.split(command)
    if words[0] == "python":
        words[0] = sys.executable
    search_path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    code = subprocess.run(words, env={**os.environ, "PYTHONPATH": search_path}).returncode
    if code != 0:
        raise OSError(
            f"--make_data: {command!r} ended with exit code {code}, so there is no data in {cfg.data_root_dir}; run it "
            f"yourself to see why"
        )


def open_split(cfg: Config, split: str, progress: Callable = no_progress) -> list[tuple[RobotDataset, float]]:
    """Return [(dataset, weight)] of one split."""
    return open_mixture(
        cfg.data_root_dir,
        cfg.data_mix,
        split=split,
        views=cfg.views,
        action_chunk=cfg.action_chunk,
        hold_out=cfg.hold_out,
        skip_bad_records=cfg.skip_bad_records,
        oft_state=cfg.oft_state,
        progress=progress,
    )


def statistics_entry(dataset: RobotDataset) -> dict:
    """
    Return the statistics of a dataset as its checkpoint keeps them. They tell neither which of them became -1 and +1,
    nor what the dimensions are, so both are written down where they are not q01 and q99, and the end effector's.
    """
    entry = dict(dataset.statistics)
    if dataset.scheme != SCHEME:
        entry["scheme"] = dataset.scheme
    if dataset.action_names != END_EFFECTOR:
        entry["action_names"] = list(dataset.action_names)
    return entry


# -----------------------------------------------------------------------------
# After the loop: what sample.py reads


def export_model(run: Path, trainee: Trainee, statistics: dict, cfg: Config):
    """Write run/checkpoint: the whole model in Hugging Face layout, with all that goes with it."""
    folder = run / "checkpoint"
    if is_main_process():
        write_preparation(folder, trainee.tokenizer, trainee.processor, statistics)
        (folder / INDEX).unlink(missing_ok=True)  # killed from here on, the folder is incomplete, not half an old one

    vla = trainee.vla
    vla.cfg.extra = {**record_action_tokens(vla.cfg.extra, trainee.tokenizer.fast), "norm_stats": statistics}
    is_bf16 = cfg.bf16 and torch.cuda.is_available()
    vla.save_pretrained(folder, torch.bfloat16 if is_bf16 else torch.float32, gather, is_main_process())
    barrier()


def write_preparation(folder: Path, tokenizer: Tokenizer, processor: ImageProcessor, statistics: dict):
    """Write what a checkpoint folder has besides weights and config.json."""
    for name, content in tokenizer.files().items():
        with atomic_write(folder / name) as temporary:
            temporary.write_bytes(content)
    save_action_tokenizer(tokenizer.fast, folder)
    token_ids = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD}
    write_json(folder / "generation_config.json", token_ids)
    write_json(folder / "preprocessor_config.json", processor.to_dict())
    write_json(folder / "dataset_statistics.json", statistics)


def main(cfg: Config):
    with exit_cleanly():
        train(cfg)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        fail(WHAT_TO_GIVE)
    main(configure(Config))
