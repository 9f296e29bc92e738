"""
Fine-tune a policy on what it does itself: it acts, and learns from which of its episodes succeed (RLOO), or from what
an expert would have done in its place (DAgger).

    python quickstart.py && python finetune_rl.py --config toy_rl.py --base_checkpoint runs/toy/cloned/checkpoint
    python finetune_rl.py --config toy_dagger.py --base_checkpoint runs/toy/cloned/checkpoint

    draw start states, act from each of them G times ------> episodes, and who succeeded
    r - mean r of the other G - 1 episodes from that start -> one advantage for all tokens of the episode
    clipped policy gradient, two epochs -------------------> new weights, and the next iteration begins

Success at the end is the only reward: 1 or 0, no value network, no KL term. Where all G episodes end alike there is
nothing to learn, so such a group is left out and another start state is drawn. Every iteration draws new ones.

--method dagger plays the same way, but asks the environment's expert for the right action in each state that the policy
comes into, and learns those beside demonstrations. --method clone is the control of both: the expert acts, too.

Where it acts is the `environment` of the config, any object as `Environment` below. The run folder is as train.py's.

RLOO https://arxiv.org/abs/2402.14740, for policies https://arxiv.org/abs/2505.17016 (RIPT-VLA) and
https://arxiv.org/abs/2509.09674 (SimpleVLA-RL); new draws and the two limits of the clipping
https://arxiv.org/abs/2503.14476; DAgger https://arxiv.org/abs/1011.0686.

Axes: B batch, T prompt tokens, S = N patches + text, A = 7 tokens of an action, D width, G rollouts from one start.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import finetune_lora
import train
from checkpoint import fingerprint, open_checkpoint
from configurator import configure, fail
from data import Mixture
from distributed import exit_cleanly, is_main_process, rank, start_processes, total, world_size
from metrics import Log, plot_curves, wilson
from model import OpenVLA
from normalize import SCHEME, normalize, unnormalize
from policy import Policy, action_stats, choose_key, dataset_stats, prepare_image
from resume import (
    Saver,
    archive_later_checkpoints,
    check_same_base,
    check_same_run,
    checkpoint_to_resume,
    describe_run,
    load_checkpoint,
    lock_run,
    printable,
    remove_leftovers,
    unlock_run,
)
from tokenizer import (
    FIRST_ACTION_ID,
    NUM_BINS,
    PAD,
    VOCAB_SIZE,
    decode_action,
    encode_action,
    is_action_id,
    pad_sequences,
)
from train import Trainee, build_optimizer, catch_signals, get_lr, restore_signals

STARTS_OF_ITERATION = 10**6  # numbers of start states that belong to one iteration; it uses the first of them
METHODS = ("rloo", "dagger", "clone")
CURVES = ("success", "loss", "entropy", "mixed", "length")

WHAT_TO_GIVE = (
    "give a config file with an environment, and a trained policy, for example\n"
    "    python finetune_rl.py --config toy_rl.py --base_checkpoint runs/toy/cloned/checkpoint\n"
    "`python quickstart.py` trains that policy"
)


@dataclass
class Config(finetune_lora.Config):
    # Acting
    method: str = "rloo"  # rloo (learns from success), dagger (from an expert's labels), clone (from the expert)
    environment: Any = None  # where the policy acts: an object, so a config file has to set it
    unnorm_key: str = ""  # whose statistics give the action its units; may be left out if the checkpoint has one
    starts: int = 40  # start states that are drawn at a time
    rollouts: int = 8  # episodes from each of them
    groups: int = 8  # of rloo: groups with both outcomes that an iteration needs; it draws until it has them,
    most_draws: int = 8  # but at most so often
    temperature: float = 1.0  # of the sampled actions; of rloo in acting and in learning

    # Learning
    epochs: int = 2  # times that an iteration goes through its episodes
    clip_low: float = 0.2  # of rloo: how far a token's probability may fall in one iteration
    clip_high: float = 0.28  # and how far it may rise
    demo_share: float = 0.5  # of dagger: share of each batch that is demonstrations, from --data_root_dir

    # Other defaults than finetune_lora.py's: a small model that trains whole. A step is an iteration.
    lora_rank: int = 0  # 0: all weights train; else adapters
    max_steps: int = 30
    lr: float = 1e-4
    batch_size: int = 256
    micro_batch_size: int = 64
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    save_every: int = 10
    export_every_save: bool = False
    activation_checkpointing: bool = False


# -----------------------------------------------------------------------------
# What it talks to


class Environment(Protocol):
    """Several episodes at the same time. An episode that has succeeded is over: it is neither observed nor moved."""

    max_steps: int  # of an episode
    most_at_once: int  # episodes
    instructions: list[str]
    success: np.ndarray  # (n,) bool

    def reset(self, seeds: Sequence[int]):
        """Start an episode for each number. The same number is the same start state, and none of an evaluation."""

    def observe(self, episodes: Sequence[int]) -> list[np.ndarray]:
        """Return what the camera sees in these episodes, (H, W, 3) uint8 each."""

    def step(self, episodes: Sequence[int], actions: np.ndarray):
        """Carry out one action in each of these episodes, (len(episodes), A) in the robot's units."""

    # Only for --method dagger and clone:
    def expert(self, episodes: Sequence[int]) -> np.ndarray:
        """Return the right action in each of these episodes, (len(episodes), A)."""


@dataclass
class Step:
    """What an episode teaches at one moment."""

    image: np.ndarray  # (side, side, 3) uint8, as the model takes it
    prompt: list[int]
    tokens: np.ndarray  # (A,) int64, what the policy did; or what the expert would have done
    logprobs: np.ndarray | None = None  # (A,) of these tokens when they were sampled
    entropy: float = 0.0  # of the distributions that they were sampled from, mean over A
    advantage: float = 0.0  # of the whole episode


@dataclass
class Episode:
    start: int  # number of its start state
    rollout: int  # which of those from that start
    steps: list[Step] = field(default_factory=list)
    success: bool = False


# -----------------------------------------------------------------------------
# Probabilities of action tokens


def action_logits(model: OpenVLA, hidden: Tensor) -> Tensor:
    """Hidden states (..., D) -> logits of the action ids alone (..., 256)."""
    head = model.language_model.lm_head
    if type(head) is nn.Linear:  # without an adapter: the other 32,000 need not be computed
        return F.linear(hidden, head.weight[FIRST_ACTION_ID:VOCAB_SIZE])
    return head(hidden)[..., FIRST_ACTION_ID:VOCAB_SIZE]


def token_logprobs(
    model: OpenVLA, prompts: list[list[int]], pixel_values: Tensor, tokens: Tensor, temperature: float
) -> Tensor:
    """
    Return the log-probability of each of the tokens (B, A), given image, prompt and the tokens before it: (B, A)
    float32. All of them in one pass, with gradients. A probability is a share among the action ids.
    """
    A = tokens.shape[1]
    sequences = [prompt + answer[:-1] for prompt, answer in zip(prompts, tokens.tolist(), strict=True)]
    input_ids, lengths = pad_sequences(sequences, PAD)  # (B, T), (B,)
    input_ids = input_ids.to(pixel_values.device)

    hidden = model.language_model(model.embed(input_ids, pixel_values))  # (B, S, D)
    padding = input_ids.shape[1] - lengths  # (B,)
    last = hidden.shape[1] - 1 - padding  # the place that predicts the last token; causal attention sees no padding
    places = last[:, None] - torch.arange(A - 1, -1, -1)  # (B, A)
    rows = torch.arange(len(tokens))[:, None]
    logits = action_logits(model, hidden[rows, places]).float() / temperature  # (B, A, 256)
    chosen = tokens.to(logits.device) - FIRST_ACTION_ID
    return logits.log_softmax(-1).gather(-1, chosen[..., None])[..., 0]


class Sampler:
    """
    Chooses action tokens at random, for `OpenVLA.generate_with`. Each row has random numbers of its own: what an
    episode does depends neither on those that are played beside it nor on the number of processes.
    """

    is_done = False  # an action has a fixed number of tokens

    def __init__(self, uniforms: Tensor, temperature: float):
        """uniforms: (B, A) in [0, 1), one for each token."""
        self.uniforms = uniforms
        self.temperature = temperature
        self.logprobs = []  # A of (B,)
        self.entropies = []  # A of (B,)

    def choose(self, logits: Tensor) -> Tensor:
        """Logits (B, V) of the next token -> token ids (B,)."""
        logits = logits[:, FIRST_ACTION_ID:VOCAB_SIZE].float() / self.temperature  # (B, 256)
        logprobs = logits.log_softmax(-1)
        probabilities = logprobs.exp()

        # The first action id up to which the probabilities add up to more than the random number.
        uniform = self.uniforms[:, len(self.logprobs), None].to(logits.device)
        below = (probabilities.cumsum(-1) <= uniform).sum(-1, keepdim=True)  # (B, 1)
        chosen = below.clamp(max=NUM_BINS - 1)

        self.logprobs.append(logprobs.gather(-1, chosen)[:, 0])
        self.entropies.append(-(probabilities * logprobs).sum(-1))
        return FIRST_ACTION_ID + chosen[:, 0]


# -----------------------------------------------------------------------------
# Act


def play(policy: Policy, episodes: list[Episode], cfg: Config):
    """Play all episodes to their ends, and fill in their steps and their success."""
    size = cfg.environment.most_at_once
    for first in range(0, len(episodes), size):
        play_together(policy, episodes[first : first + size], cfg)


def play_together(policy: Policy, episodes: list[Episode], cfg: Config):
    """Play episodes side by side, in steps. Those that have succeeded are left out of the rest."""
    environment = cfg.environment
    environment.reset([episode.start for episode in episodes])
    prompts = [policy.tokenizer.encode_prompt(text) for text in environment.instructions]

    # Random numbers of each episode's own, one for each token of each step.
    num_tokens = len(action_stats(policy.norm_stats, cfg.unnorm_key, policy.checkpoint)["q01"])
    uniforms = []
    for episode in episodes:
        rng = np.random.default_rng([cfg.seed, episode.start, episode.rollout])
        uniforms.append(rng.random((environment.max_steps, num_tokens), np.float32))

    for t in range(environment.max_steps):
        active = [i for i in range(len(episodes)) if not environment.success[i]]
        if not active:
            break
        images = [prepare_image(policy, image) for image in environment.observe(active)]
        numbers = torch.from_numpy(np.stack([uniforms[i][t] for i in active]))  # (n, A)
        steps, actions = answer(policy, active, images, [prompts[i] for i in active], numbers, cfg)
        environment.step(active, actions)
        for i, step in zip(active, steps, strict=True):
            episodes[i].steps.append(step)

    for episode, success in zip(episodes, environment.success, strict=True):
        episode.success = bool(success)


def answer(
    policy: Policy,
    active: list[int],
    images: list[np.ndarray],
    prompts: list[list[int]],
    uniforms: Tensor,
    cfg: Config,
) -> tuple[list[Step], np.ndarray]:
    """
    Return for each active episode the step to learn from, and the actions to carry out, (n, A) in the robot's units.
    With rloo these are the same: the policy's own. With dagger the policy acts, and the expert's action is learned.
    """
    entry = dataset_stats(policy.norm_stats, cfg.unnorm_key, policy.checkpoint)
    stats = entry["action"]
    scheme = entry.get("scheme", SCHEME)

    right_actions = None
    right_tokens = None
    if cfg.method != "rloo":
        right_actions = cfg.environment.expert(active)
        right_tokens = encode_action(normalize(right_actions, stats, scheme))  # (n, A)
    if cfg.method == "clone":
        columns = zip(images, prompts, right_tokens, strict=True)
        return [Step(image, prompt, tokens) for image, prompt, tokens in columns], right_actions

    steps = sample_steps(policy, images, prompts, uniforms, cfg.temperature)
    own_tokens = np.stack([step.tokens for step in steps])
    if cfg.method == "dagger":
        for step, tokens in zip(steps, right_tokens, strict=True):
            step.tokens = tokens
    return steps, unnormalize(decode_action(own_tokens), stats, scheme)


def sample_steps(
    policy: Policy, images: list[np.ndarray], prompts: list[list[int]], uniforms: Tensor, temperature: float
) -> list[Step]:
    """Let the policy choose the tokens of an action for each image and prompt. uniforms: (B, A), see `Sampler`."""
    sampler = Sampler(uniforms, temperature)
    pixel_values = to_pixels(policy, images)
    input_ids, lengths = pad_sequences(prompts, PAD)
    input_ids = input_ids.to(policy.device)
    lengths = lengths.to(policy.device)
    tokens = policy.model.generate_with(sampler, input_ids, pixel_values, uniforms.shape[1], lengths)

    tokens = tokens.cpu().numpy()
    logprobs = torch.stack(sampler.logprobs, dim=1).cpu().numpy()  # (B, A)
    entropies = torch.stack(sampler.entropies, dim=1).mean(1).cpu().numpy()  # (B,)
    columns = zip(images, prompts, tokens, logprobs, entropies, strict=True)
    return [Step(image, prompt, answer, old, float(entropy)) for image, prompt, answer, old, entropy in columns]


def to_pixels(policy: Policy, images: list[np.ndarray]) -> Tensor:
    """Prepared images -> pixel_values (B, 3 or 6, side, side)."""
    pixels = torch.from_numpy(np.stack(images)).to(policy.device)
    return policy.processor.normalize(pixels).to(policy.dtype)


# -----------------------------------------------------------------------------
# Who succeeded, and how that counts


def leave_one_out(success: Tensor) -> Tensor:
    """Rewards (starts, G) -> advantages: each reward less the mean of the G - 1 others from the same start."""
    G = success.shape[1]
    others = (success.sum(1, keepdim=True) - success) / (G - 1)
    return success - others


def has_both_outcomes(success: Tensor) -> Tensor:
    """Rewards (starts, G) -> (starts,) bool: whether some rollouts from that start succeed and some fail."""
    share = success.mean(1)
    return (share > 0) & (share < 1)


def clipped_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """
    Return the loss of each token, and whether the clipping stops its gradient, (B, A) each.

    logprobs, old_logprobs: (B, A) now and when it acted. advantages: (B,), the same for all tokens of an action.
    A token that has already become 1 + high times as likely gains nothing by becoming likelier still.
    """
    ratio = (logprobs - old_logprobs).exp()
    advantages = advantages[:, None]  # (B, 1)
    gain = ratio * advantages
    clipped_gain = ratio.clamp(1 - low, 1 + high) * advantages
    return -torch.minimum(gain, clipped_gain), clipped_gain < gain


@dataclass
class Collected:
    """The episodes of one iteration. Tables have a row for each start state, a column for each rollout from it."""

    steps: dict[tuple[int, int, int], Step]  # (start, rollout, t) -> step, of the episodes that this process has played
    order: list[tuple[int, int, int]]  # the keys of all processes' steps that are learned from
    success: Tensor  # (starts, G) float64
    lengths: Tensor  # (starts, G) float64, steps of the episodes
    entropies: list[float]  # of this process's steps

    @property
    def mixed(self) -> float:
        """Share of the start states from which some rollouts succeed and some fail."""
        return has_both_outcomes(self.success).double().mean().item()


def collect(policy: Policy, cfg: Config, iteration: int) -> Collected:
    """
    Play the episodes of an iteration. For rloo that is until enough groups have both outcomes, or until `most_draws`.
    All processes take part: start number s is played by process s modulo their number.
    """
    episodes = []  # of this process
    tables = []  # (2, starts, G) per draw: success and length, of all processes
    num_mixed = 0
    num_draws = cfg.most_draws if cfg.method == "rloo" else 1
    first = iteration * STARTS_OF_ITERATION
    for draw in range(num_draws):
        starts = range(first + draw * cfg.starts, first + (draw + 1) * cfg.starts)
        own = [start for start in starts if start % world_size() == rank()]
        played = [Episode(start, rollout) for start in own for rollout in range(cfg.rollouts)]
        play(policy, played, cfg)
        episodes += played

        table = torch.zeros(2, cfg.starts, cfg.rollouts, dtype=torch.float64)
        for episode in played:
            row = episode.start - starts[0]
            table[:, row, episode.rollout] = torch.tensor([episode.success, len(episode.steps)])
        tables.append(total(table.to(policy.device)).cpu())
        num_mixed += int(has_both_outcomes(tables[-1][0]).sum())
        if num_mixed >= cfg.groups:
            break

    success, lengths = torch.cat(tables, dim=1)
    return arrange(episodes, first, success, lengths, cfg.method)


def arrange(episodes: list[Episode], first: int, success: Tensor, lengths: Tensor, method: str) -> Collected:
    """Give each episode its advantage, and list the steps that are learned from. first: number of the first start."""
    advantages = torch.zeros_like(success)
    is_used = torch.ones(len(success), dtype=torch.bool)
    if method == "rloo":
        advantages = leave_one_out(success)
        is_used = has_both_outcomes(success)

    steps = {}
    entropies = []
    for episode in episodes:
        for t, step in enumerate(episode.steps):
            step.advantage = advantages[episode.start - first, episode.rollout].item()
            steps[episode.start, episode.rollout, t] = step
            entropies.append(step.entropy)

    order = []
    for row in is_used.nonzero()[:, 0].tolist():
        for rollout, length in enumerate(lengths[row].int().tolist()):
            order += [(first + row, rollout, t) for t in range(length)]
    return Collected(steps, order, success, lengths, entropies)


def nothing_is_left(collected: Collected, cfg: Config) -> bool:
    """
    True if there is nothing to learn from any more, because every rollout succeeds. Raises ValueError if there is
    nothing to learn from yet.
    """
    if collected.order:
        return False
    if collected.success.all():
        return True
    rate = collected.success.mean().item()
    raise ValueError(
        f"no group with both outcomes in {cfg.most_draws} draws of {cfg.starts} start states x {cfg.rollouts} rollouts "
        f"(success {rate:.1%}); start from a better policy or lower the difficulty, raise --rollouts, or let an expert "
        f"help: --method dagger"
    )


# -----------------------------------------------------------------------------
# Learn


def update(
    policy: Policy, optimizer: torch.optim.Optimizer, collected: Collected, demos: Mixture | None, cfg: Config, i: int
) -> dict:
    """Learn from the episodes of iteration i. Returns the mean loss and the share of the tokens that were clipped."""
    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    num_demos = round(cfg.batch_size * cfg.demo_share) if demos else 0
    num_own = cfg.batch_size - num_demos
    action_dim = len(action_stats(policy.norm_stats, cfg.unnorm_key, policy.checkpoint)["q01"])
    demo_position = i * STARTS_OF_ITERATION
    sums = torch.zeros(3, dtype=torch.float64, device=policy.device)  # loss, clipped tokens, tokens

    for epoch in range(cfg.epochs):
        # The same order in every process. Each takes the steps that it has played.
        rng = np.random.default_rng([cfg.seed, i, epoch])
        order = [collected.order[j] for j in rng.permutation(len(collected.order))]
        for batch in split_evenly(order, num_own):
            steps = [collected.steps[key] for key in batch if key in collected.steps]
            for position in range(demo_position, demo_position + num_demos):
                if position % world_size() == rank():
                    steps.append(demonstrated_step(demos[position]))
            demo_position += num_demos

            num_tokens = (len(batch) + num_demos) * action_dim  # of all processes
            for first in range(0, len(steps), cfg.micro_batch_size):
                losses, is_clipped = losses_of(policy, steps[first : first + cfg.micro_batch_size], cfg)
                (losses.sum() / num_tokens).backward()
                counts = [losses.sum().item(), is_clipped.sum().item(), losses.numel()]
                sums += torch.tensor(counts, dtype=torch.float64, device=policy.device)

            # Gradients of all processes add up, as their steps together are the batch.
            for parameter in trained:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                total(parameter.grad)
            if cfg.grad_clip:
                torch.nn.utils.clip_grad_norm_(trained, cfg.grad_clip)
            optimizer.step()
            optimizer.zero_grad()

    loss, num_clipped, num_tokens = total(sums).tolist()
    return {"loss": loss / num_tokens, "clipped": num_clipped / num_tokens}


def losses_of(policy: Policy, steps: list[Step], cfg: Config) -> tuple[Tensor, Tensor]:
    """Return the loss of each token of some steps, and whether the clipping stops its gradient, (B, A) each."""
    pixel_values = to_pixels(policy, [step.image for step in steps])
    tokens = torch.from_numpy(np.stack([step.tokens for step in steps]))
    prompts = [step.prompt for step in steps]
    if cfg.method != "rloo":  # imitation: cross-entropy, at whatever temperature it has acted
        logprobs = token_logprobs(policy.model, prompts, pixel_values, tokens, temperature=1.0)
        return -logprobs, torch.zeros_like(logprobs)

    logprobs = token_logprobs(policy.model, prompts, pixel_values, tokens, cfg.temperature)

    old_logprobs = torch.from_numpy(np.stack([step.logprobs for step in steps])).to(policy.device)
    advantages = torch.tensor([step.advantage for step in steps], dtype=torch.float32, device=policy.device)
    return clipped_loss(logprobs, old_logprobs, advantages, cfg.clip_low, cfg.clip_high)


def demonstrated_step(sample: dict) -> Step:
    """Return a training sample of data.py as a step: its prompt, and the tokens of its action."""
    input_ids = sample["input_ids"]
    is_action = is_action_id(sample["labels"])
    prompt = input_ids[: is_action.argmax()].tolist()
    return Step(sample["images"][0], prompt, input_ids[is_action])


def split_evenly(order: list, size: int) -> list[list]:
    """Split a list into batches of about `size`, none of which is a small rest."""
    num_batches = max(1, round(len(order) / size))
    ends = [len(order) * n // num_batches for n in range(num_batches + 1)]
    return [order[start:end] for start, end in zip(ends, ends[1:], strict=False)]


# -----------------------------------------------------------------------------
# The whole


def finetune(cfg: Config) -> dict:
    """
    Fine-tune as the config says, and return the metrics of the last iteration. Raises ValueError or OSError for bad
    input, and ValueError if the policy never succeeds.
    """
    _, _, device = start_processes()
    check(cfg)
    run = train.run_folder(cfg)
    train.check_writable(run)
    lock = lock_run(run)
    remove_leftovers(run)

    # The policy. It acts and learns in the same mode, without dropout: the ratio of a first update is 1.
    statistics = open_checkpoint(cfg.base_checkpoint).norm_stats
    key = choose_key(statistics, cfg.unnorm_key, cfg.base_checkpoint)
    resumed = checkpoint_to_resume(run, cfg.resume)
    if resumed:
        check_same_run(resumed, cfg, statistics)
    trainee = build(cfg)
    trainee.model.to_empty(device=device)
    trainee.fill(trainee, cfg)
    trainee.model.eval()
    policy = Policy(trainee.model, trainee.tokenizer, trainee.processor, statistics, cfg.base_checkpoint)
    demos = open_demonstrations(cfg, trainee, statistics[key])
    optimizer = build_optimizer(trainee.model, cfg, fused=True)

    # Continue a stopped run. All that is random follows from the seed and the number of the iteration.
    base = fingerprint(cfg.base_checkpoint) if cfg.lora_rank else ""
    iteration = 0
    if resumed:
        if base:
            check_same_base(resumed, cfg.base_checkpoint, base)
        iteration = load_checkpoint(resumed, trainee.model, optimizer)
    archive_later_checkpoints(run, iteration)
    is_done = iteration >= cfg.max_steps

    log = None
    if is_main_process():
        log = Log(run, cfg.max_steps, iteration, printable(cfg), cfg.wandb, cfg.tensorboard)
    metrics = {}
    signals_received = []
    handlers = catch_signals(signals_received)
    is_stopping = False

    with Saver(run, cfg.keep_checkpoints) as saver:
        while not is_done and not is_stopping:
            start = time.perf_counter()
            cpu_start = time.process_time()
            lr = get_lr(iteration, cfg)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # Act, then learn from it.
            collected = collect(policy, cfg, iteration)
            if nothing_is_left(collected, cfg):
                if log:
                    log.bar.write(
                        f"all {collected.success.numel()} rollouts succeed: nothing is left to learn from success"
                    )
                break
            learned = update(policy, optimizer, collected, demos, cfg, iteration)
            iteration += 1
            is_done = iteration == cfg.max_steps
            is_stopping = total(torch.tensor(len(signals_received), device=device)).item() > 0

            # Report.
            metrics = {
                "step": iteration,
                "lr": lr,
                **learned,
                **describe(collected, device),
                "seconds": time.perf_counter() - start,
                "cpu_seconds": time.process_time() - cpu_start,
            }
            if log:
                log.update_bar()
                log.write(metrics, format_line(metrics))

            # Save.
            if iteration % cfg.save_every == 0 or is_done or is_stopping:
                about = describe_run(cfg, statistics, base)
                saver.save(iteration, trainee.model, optimizer, about)
                if log:
                    plot_curves(run, CURVES)
                if cfg.export_every_save and not is_done:
                    trainee.export(run, trainee, statistics, cfg)

    restore_signals(handlers)
    if log:
        log.close()
    if not is_stopping or is_done:
        trainee.export(run, trainee, statistics, cfg)
    unlock_run(lock)
    if is_stopping:
        train.stop(iteration, signals_received[0] if signals_received else train.signal.SIGTERM)
    return metrics


def build(cfg: Config) -> Trainee:
    """Build the base checkpoint, whose own weights train in float32, or the adapters that it gets."""
    if cfg.lora_rank:
        model, tokenizer, processor, files = finetune_lora.build_adapted(cfg)
        fill = finetune_lora.fill_adapted
        export = finetune_lora.export_adapter
    else:
        model, tokenizer, processor, files = train.open_base(cfg)
        train.freeze(model.float(), cfg.train_parts)
        fill = train.fill_base
        export = train.export_model
    if tokenizer.fast:
        raise ValueError(
            f"{cfg.base_checkpoint} answers with FAST tokens; practice needs a policy that generates one action"
        )
    return Trainee(model, model, tokenizer, processor, files, fill, export, exports_whole_model=not cfg.lora_rank)


def open_demonstrations(cfg: Config, trainee: Trainee, expected: dict) -> Mixture | None:
    """
    Return the stream of demonstrations, if there are any to mix in. expected: the statistics that the policy acts by.
    Raises ValueError if the demonstrations have others, so that the same movement would be another token.
    """
    if cfg.method != "dagger" or not cfg.demo_share:
        return None
    data, _ = train.open_data(cfg)
    for dataset, _ in data:
        for name in ("q01", "q99"):
            if not np.allclose(dataset.statistics["action"][name], expected["action"][name]):
                raise ValueError(
                    f"--data_mix {dataset.name}: its actions have other statistics ({name}) than {cfg.base_checkpoint} "
                    f"was trained with; give the data of that training, or --demo_share 0"
                )
    return Mixture(
        data, trainee.tokenizer, trainee.processor.size, cfg.seed, max_tokens=train.room_for_text(trainee.vla, data)
    )


def describe(collected: Collected, device: str) -> dict:
    """Return what the log says of the episodes of an iteration, those that are not learned from among them."""
    successes = int(collected.success.sum())
    num_rollouts = collected.success.numel()
    low, high = wilson(successes, num_rollouts)
    entropies = torch.tensor([sum(collected.entropies), len(collected.entropies)], dtype=torch.float64, device=device)
    entropy_sum, count = total(entropies).tolist()
    return {
        "success": successes / num_rollouts,
        "success_low": low,
        "success_high": high,
        "rollouts": num_rollouts,
        "mixed": collected.mixed,
        "length": collected.lengths.mean().item(),
        "entropy": entropy_sum / count,
    }


def format_line(metrics: dict) -> str:
    """Return the line of the terminal."""
    parts = [
        f"iteration {metrics['step']:4d}",
        f"success {metrics['success']:6.1%} ({metrics['success_low']:.1%} to {metrics['success_high']:.1%})",
        f"{metrics['rollouts']} rollouts of {metrics['length']:.1f} steps",
        f"mixed {metrics['mixed']:4.0%}",
        f"entropy {metrics['entropy']:.3f}",
        f"loss {metrics['loss']:7.4f}",
        f"clipped {metrics['clipped']:5.1%}",
        f"lr {metrics['lr']:.1e}",
        f"{metrics['seconds']:.1f} s",
    ]
    return " | ".join(parts)


def check(cfg: Config):
    """Raise ValueError for options that cannot be right, before any long work."""
    if cfg.method not in METHODS:
        raise ValueError(f"--method {cfg.method!r} is none of {', '.join(METHODS)}")
    if cfg.environment is None:
        raise ValueError("no environment: a config file has to set one, as configs/toy_rl.py does")
    if cfg.method != "rloo" and not hasattr(cfg.environment, "expert"):
        raise ValueError(
            f"--method {cfg.method}: {type(cfg.environment).__name__} has no expert; --method rloo needs none"
        )
    if not cfg.base_checkpoint:
        raise ValueError(
            "--base_checkpoint FOLDER is missing: a policy has to succeed now and then before it can learn"
        )
    if cfg.lora_rank:
        finetune_lora.check(cfg)
    if cfg.lora_dropout or cfg.image_aug:
        raise ValueError("--lora_dropout and --image_aug must be off: the policy learns from what it saw when it acted")
    smallest = {
        "starts": 1,
        "rollouts": 2 if cfg.method == "rloo" else 1,
        "groups": 1,
        "most_draws": 1,
        "epochs": 1,
        "batch_size": 1,
        "micro_batch_size": 1,
        "max_steps": 1,
        "save_every": 1,
        "keep_checkpoints": 1,
        "lora_rank": 0,
        "lr": 0,
        "seed": 0,
    }
    train.check_at_least(cfg, smallest)
    if cfg.starts * cfg.most_draws > STARTS_OF_ITERATION:
        raise ValueError(
            f"--starts {cfg.starts} --most_draws {cfg.most_draws}: an iteration has {STARTS_OF_ITERATION:,} starts"
        )
    if not 0 <= cfg.demo_share < 1:
        raise ValueError(f"--demo_share {cfg.demo_share}: must be at least 0 and below 1")
    if not cfg.temperature > 0:
        raise ValueError(f"--temperature {cfg.temperature}: must be above 0")
    if not (0 <= cfg.clip_low < 1 and 0 <= cfg.clip_high):
        raise ValueError(f"--clip_low {cfg.clip_low} --clip_high {cfg.clip_high}: expected 0 to 1, and 0 or more")


def main(cfg: Config):
    with exit_cleanly():
        finetune(cfg)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        fail(WHAT_TO_GIVE)
    main(configure(Config))
