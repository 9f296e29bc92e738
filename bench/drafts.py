"""
`python -m bench drafts`: how good is which draft? Tokens settled in one pass, along trajectories.
`python -m bench agree`: how often do two checkpoints, such as one and its quantized copy, generate the same?
"""

from collections import Counter

import numpy as np
import torch
from torch import Tensor

from bench.common import Config, report
from bench.inputs import NUM_TOKENS, Input, answer_inputs, make_inputs, to_tokens
from normalize import normalize, unnormalize
from policy import action_stats, load_policy, pick_device
from speed.engine import Engine
from tokenizer import FIRST_ACTION_ID, VOCAB_SIZE, decode_action


def bench_drafts(cfg: Config):
    """Print the tokens that a pass settles, for each kind of draft. Without a draft it is 1."""
    policy = load_policy(cfg.checkpoint, getattr(torch, cfg.dtype), pick_device(cfg.device))
    unnorm_key = cfg.unnorm_key or next(iter(policy.norm_stats))
    stats = action_stats(policy.norm_stats, unnorm_key, cfg.checkpoint)
    inputs = make_inputs(cfg, policy, unnorm_key)
    answer_inputs(policy, inputs)

    no_motion = to_tokens(normalize(np.zeros(NUM_TOKENS), stats))
    mean_action = to_tokens(normalize(stats["mean"], stats))
    all_tokens = torch.cat([one.tokens for one in inputs])  # (inputs, NUM_TOKENS)
    most_frequent = all_tokens.mode(dim=0).values[None]

    engine = Engine(policy.model)
    passes = Counter()
    for one in inputs:
        last = one.previous.tokens if one.previous else no_motion
        drafts = {
            "last action": last,
            "last two, straight on": straight_on(one, last),
            "no motion": no_motion,
            "mean action": mean_action,
            "most frequent of each": most_frequent,
        }
        for name, draft in drafts.items():
            _, num_passes = engine.generate(one.input_ids, one.pixel_values, NUM_TOKENS, draft=draft)
            passes[name] += num_passes

    tokens_per_pass = {name: NUM_TOKENS * len(inputs) / num_passes for name, num_passes in passes.items()}
    report({"checkpoint": cfg.checkpoint, "actions": len(inputs), **tokens_per_pass})


def straight_on(one: Input, last: Tensor) -> Tensor:
    """Return the tokens that go on as the last two answers went; `last` where there are no two."""
    if one.previous is None or one.previous.previous is None:
        return last
    before_last = one.previous.previous.tokens
    return (2 * last - before_last).clamp(FIRST_ACTION_ID, VOCAB_SIZE - 1)


def bench_agree(cfg: Config):
    """Print how often --checkpoint generates the tokens of --against, and how far apart their actions are."""
    dtype = getattr(torch, cfg.dtype)
    device = pick_device(cfg.device)
    reference = load_policy(cfg.against, dtype, device)
    unnorm_key = cfg.unnorm_key or next(iter(reference.norm_stats))
    stats = action_stats(reference.norm_stats, unnorm_key, cfg.against)
    inputs = make_inputs(cfg, reference, unnorm_key)
    answer_inputs(reference, inputs)
    expected = torch.cat([one.tokens for one in inputs]).cpu().numpy()  # (inputs, NUM_TOKENS)
    del reference  # before the other is loaded: two may not fit

    policy = load_policy(cfg.checkpoint, dtype, device)
    answer_inputs(policy, inputs)
    tokens = torch.cat([one.tokens for one in inputs]).cpu().numpy()

    same = tokens == expected
    expected_actions = decode_action(expected)
    actions = decode_action(tokens)
    units = np.abs(unnormalize(expected_actions, stats) - unnormalize(actions, stats)).mean(axis=0)  # (A,)
    report(
        {
            "checkpoint": cfg.checkpoint,
            "against": cfg.against,
            "dtype": cfg.dtype,
            "actions": len(inputs),
            "same_tokens": float(same.mean()),
            "same_actions": float(same.all(axis=1).mean()),
            "l1_normalised": float(np.abs(expected_actions - actions).mean()),
            "l1_units": [round(distance, 6) for distance in units.tolist()],
        }
    )
