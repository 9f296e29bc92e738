"""
The control of toy_dagger.py and toy_rl.py: the policy of quickstart.py clones fresh demonstrations, for as long.

    python finetune_rl.py --config toy_clone.py --base_checkpoint runs/toy/cloned/checkpoint

The expert acts in new scenes, disturbed as in the demonstrations. 91 seconds of one CPU core.
"""

from toy import world
from toy.environment import ToyEnvironment

environment = ToyEnvironment(noise=world.STANDARD.noise, detour=world.STANDARD.detour)
run_dir = "runs/toy_clone"
image_aug = False
method = "clone"
starts = 390
rollouts = 1
epochs = 1
batch_size = 96
micro_batch_size = 96
max_steps = 15
lr = 3e-4
schedule = "cosine"
beta2 = 0.95
