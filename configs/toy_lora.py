"""
The toy world's model learns a changed world with LoRA: other colours, a turned camera, a gripper that closes at 1.

    python finetune_lora.py --config toy_lora.py

Needs the model of quickstart.py. `python -m toy.transfer` makes the data, runs this and configs/toy_full.py, and
compares. Two minutes on two CPU cores.
"""

data_root_dir = "runs/toy_lora/data"
data_mix = "toy_changed"
run_dir = "runs/toy_lora"
base_checkpoint = "runs/toy/checkpoint"
image_aug = False
lora_rank = 16
batch_size = 24
micro_batch_size = 24
lr = 2e-3
weight_decay = 0.01
schedule = "cosine"
warmup_steps = 30
beta2 = 0.95
grad_clip = 1.0
max_steps = 1200
activation_checkpointing = False
log_every = 100
save_every = 1000
num_workers = 1
