"""
RLOO in the toy world: the policy of quickstart.py practises, and learns from its own success alone.

    python finetune_rl.py --config toy_rl.py --base_checkpoint runs/toy/cloned/checkpoint

148 seconds of one CPU core.
"""

from toy.environment import ToyEnvironment

environment = ToyEnvironment()
run_dir = "runs/toy_rl"
image_aug = False
method = "rloo"
starts = 40
rollouts = 8
max_steps = 14
schedule = "cosine"
lr = 1e-4
beta2 = 0.95
