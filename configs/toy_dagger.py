"""
DAgger in the toy world: the policy of quickstart.py practises, and an expert says what would have been right.

    python finetune_rl.py --config toy_dagger.py --base_checkpoint runs/toy/checkpoint

Takes about two minutes on two CPU cores.
"""

from toy.environment import ToyEnvironment

environment = ToyEnvironment()
data_root_dir = "runs/toy/data"
data_mix = "toy"
run_dir = "runs/toy_dagger"
image_aug = False
method = "dagger"
starts = 160
rollouts = 1
epochs = 1
batch_size = 96
micro_batch_size = 96
max_steps = 20
lr = 3e-4
schedule = "cosine"
beta2 = 0.95
