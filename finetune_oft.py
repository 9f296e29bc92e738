"""
The OFT recipe: a trained OpenVLA becomes a policy that answers with a chunk of actions in one forward pass (oft.py).

    python finetune_oft.py                         # the toy world's model, on a CPU
    python finetune_oft.py --config libero_oft.py --base_checkpoint openvla-7b --data_root_dir DIR
    python finetune_lora.py --merge runs/libero_spatial_oft --out openvla-7b-oft-libero-spatial

The loop is that of train.py; the model gets LoRA adapters, the new parts train whole. sample.py and eval_libero.py take
the run folder as it is, or the merged one. OpenVLA-OFT, https://arxiv.org/abs/2502.19645;
vla-scripts/finetune.py of github.com/moojink/openvla-oft.
"""

import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

import finetune_lora
import train
from configurator import configure
from data import scheme_of
from formats import oxe
from metrics import count_actions
from oft import HEADS, OFT, OFTConfig, predict_chunk, save_components


@dataclass
class Config(finetune_lora.Config):
    action_chunk: int = 8  # actions per answer: 8 LIBERO, 25 ALOHA, 5 Bridge
    views: tuple[str, ...] = ("primary", "wrist")  # the cameras, in the order in which the model gets them
    use_proprio: bool = True  # the robot's state as one more token
    head: str = "l1"  # one of oft.HEADS: l1, diffusion, discrete
    film: bool = False  # the instruction modulates the ViTs
    # defaults other than finetune_lora.py's, as in the official recipe (whose weight decay is on norms and biases, too)
    hold_out: float = 0.0
    batch_size: int = 64
    micro_batch_size: int = 8
    max_steps: int = 150_000
    schedule: str = "step"
    decay_step: int = 100_000
    save_every: int = 10_000


def build(cfg: Config):
    """The base checkpoint with adapters, held by an OFT whose new parts train whole, in float32."""
    parts = train.open_data(cfg, "train", cfg.views, cfg.action_chunk)
    (oft, name), *others = [(oft_config(cfg, dataset), dataset.name) for dataset, _ in parts]
    for other, its in others:
        if other != oft:
            raise ValueError(f"one model cannot learn both: {name} needs {oft}, {its} needs {other}")
    model, tokenizer, processor = finetune_lora.build(cfg)
    if cfg.head != "discrete":
        model.language_model.lm_head.requires_grad_(False)  # nothing reads it: no gradient, no optimizer state
    return OFT(model, oft), tokenizer, processor


def oft_config(cfg: Config, dataset) -> OFTConfig:
    """What a model of this dataset's sizes is made of."""
    stats = dataset.statistics
    if cfg.use_proprio and not stats.get("proprio", {}).get("q01"):
        raise ValueError(f"{dataset.name} has no states of the robot; give --use_proprio False")
    state = len(stats["proprio"]["q01"]) if cfg.use_proprio else 0
    sizes = dict(action_dim=len(stats["action"]["q01"]), proprio_dim=state, num_images=len(cfg.views))
    return OFTConfig(cfg.action_chunk, **sizes, scheme=scheme_of(dataset), head=cfg.head, film=cfg.film)


def forward(model: OFT, batch: dict, processor, device: str, num_datasets: int):
    """
    One batch of data.collate -> its loss, and sums for the metrics. As officially, no chunk reaches beyond the end of
    its episode (the last K - 1 frames start none), so that there is no padding among the actions of the loss.
    """
    keys = ("images", "input_ids", "labels", "proprio", "actions")
    images, ids, labels, proprio, actions = (batch[k].to(device, non_blocking=True) for k in keys)
    dtype = model.vla.language_model.model.norm.weight.dtype
    pixel_values = torch.cat([processor.normalize(view) for view in images.unbind(1)], dim=1).to(dtype)
    loss, predicted = model(ids, labels, pixel_values, proprio, actions)
    predicted = torch.zeros_like(actions) if predicted is None else predicted  # diffusion predicts noise
    return loss, count_actions(predicted, actions, batch["dataset"].to(device), num_datasets)


def export(run: Path, model: OFT, tokenizer, processor, stats: dict, cfg: Config):
    """Adapter, components and all that the base checkpoint does not have, into the run folder."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(model, options=options)
    if train.main_process():
        names = {k: k.removeprefix("vla.").replace(".block.", ".") for k in state if ".lora_" in k}  # FiLM wraps blocks
        adapters = {name: state.pop(k) for k, name in names.items()}
        finetune_lora.write_run(run, model.vla, adapters, tokenizer, processor, stats, cfg)
        save_components(model.oft, state, run)
    train.barrier()


def read_states_as_oft(data_mix):
    """OFT reads the robot's state without a pad column between pose and gripper: 8 numbers in LIBERO, not 9."""
    for name in [name for name, _ in oxe.mixture(data_mix)] if isinstance(data_mix, str) else []:
        oxe.DATASETS[name] = replace(oxe.lookup(name), state=oxe.lookup(name).state_oft)


def check(cfg: Config):
    """Raise ValueError for what finetune_lora.py does not look at."""
    finetune_lora.check(cfg)
    if cfg.head not in HEADS:
        raise ValueError(f"--head {cfg.head!r}: must be one of {', '.join(HEADS)}")
    if cfg.action_chunk < 1:
        raise ValueError(f"--action_chunk {cfg.action_chunk}: must be 1 or more")


def toy_oft(cfg: Config):
    """The toy world's model as OFT: success, and how long an answer takes, beside the token model."""
    import sample
    from toy import play
    from toy import world as toy

    if not Path(cfg.base_checkpoint).is_dir():
        raise FileNotFoundError(f"{cfg.base_checkpoint}: no toy model there; `python train.py` trains it")
    if not toy.is_written(cfg.data_root_dir, cfg.data_mix):
        # no chunk crosses the end of an episode, so they have to be long enough; undisturbed, as nothing at a chunk's
        # start tells what will disturb its later steps
        calm, more = toy.World(noise=0.0), cfg.action_chunk - 1
        episodes = toy.demonstrations(toy.TRAIN, cfg.toy_episodes, calm, linger=more)
        toy.write_rlds(cfg.data_root_dir, dict(train=episodes), name=cfg.data_mix)
    train.train(cfg, build, export, forward, cfg.views, cfg.action_chunk)
    rows, answers = (
        {},
        {"tokens": (cfg.base_checkpoint, "toy", 1), "oft": (cfg.run_dir, cfg.data_mix, cfg.action_chunk)},
    )
    for name, (folder, key, steps) in answers.items():
        policy = sample.load(folder)
        ok = play.play(policy, cfg.toy_scenes, key, open_loop=steps).success
        play.report(f"{name}, {steps} actions per answer", ok)
        seconds = latency(policy, key)
        print(f"  {1e3 * seconds:.1f} ms an answer, {steps / seconds:.0f} actions/s")
        rows[name] = dict(success=float(ok.mean()), latency_s=seconds, actions_per_s=steps / seconds)
    with open(Path(cfg.run_dir) / "metrics.jsonl", "a") as f:
        f.write(json.dumps({"toy": rows}) + "\n")


def latency(policy, unnorm_key: str, times: int = 50) -> float:
    """Seconds from picture and words to actions, one at a time: the median."""
    from toy import world as toy

    scene, seconds = toy.make_scene(toy.TEST, 0, toy.World()), []
    picture = toy.draw(scene, toy.World())
    for _ in range(times):
        start = time.perf_counter()
        predict_chunk(policy, [[picture]], ["pick up the red cube"], None, unnorm_key)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def main(cfg: Config):
    with train.ended_well():
        check(cfg)
        read_states_as_oft(cfg.data_mix)
        if cfg.toy_episodes:
            toy_oft(cfg)
        else:
            train.train(cfg, build, export, forward, cfg.views, cfg.action_chunk)


if __name__ == "__main__":
    main(configure(Config, sys.argv[1:] or ["--config", "toy_oft.py"]))
