"""
The toy world's model learns a changed world: other colours, a turned camera, a gripper that works the other way round.
Two minutes on two CPU cores, and as long again for all weights, to compare. Needs `python train.py` first.

    python finetune_lora.py            (which is python finetune_lora.py --config toy_lora.py)
"""

from formats import oxe

oxe.DATASETS["toy_changed"] = oxe.Dataset(primary="image", state=("state",))

toy_episodes = 1000
data_root_dir = "runs/toy_lora/data"
data_mix = "toy_changed"
run_dir = "runs/toy_lora"
base_checkpoint = "runs/toy/checkpoint"
image_aug = False
lora_rank = 16
batch_size = 24
micro_batch_size = 24
lr = 2e-3
schedule = "cosine"
warmup_steps = 30
beta2 = 0.95
grad_clip = 1.0
max_steps = 1200
activation_checkpointing = False
log_every = 100
save_every = 1000
num_workers = 1
