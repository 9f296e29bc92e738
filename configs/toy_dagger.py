"""
DAgger in the toy world: the policy of quickstart.py practises, and an expert says what would have been right.

    python finetune_rl.py --config toy_dagger.py --base_checkpoint runs/toy/cloned/checkpoint

A minute on two CPU cores. quickstart.py runs it from runs/toy/cloned/checkpoint.
"""

from toy.environment import ToyEnvironment

environment = ToyEnvironment()
data_root_dir = "runs/toy/data"
data_mix = "toy"
run_dir = "runs/toy_dagger"
image_aug = False
method = "dagger"
temperature = 0.1  # near the likeliest action, which is how the policy acts later: it meets its own dead ends
starts = 160
rollouts = 1
epochs = 1
batch_size = 96
micro_batch_size = 96
max_steps = 16
lr = 5e-4
schedule = "cosine"
beta2 = 0.95
