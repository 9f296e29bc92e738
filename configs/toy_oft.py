"""
The toy world's model as OFT: eight actions in one forward pass.

    python finetune_oft.py --config toy_oft.py

Needs the model of quickstart.py. `python -m toy.chunks` makes the data, runs this and compares. Twenty minutes on two
CPU cores.
"""

data_root_dir = "runs/toy_oft/data"
data_mix = "toy_chunks"
run_dir = "runs/toy_oft"
base_checkpoint = "runs/toy/checkpoint"
views = ("primary",)
use_proprio = False
image_aug = False
lora_rank = 64
batch_size = 24
micro_batch_size = 24
lr = 1.5e-3
weight_decay = 0.0
hold_out = 0.05
schedule = "cosine"
warmup_steps = 60
beta2 = 0.95
grad_clip = 1.0
max_steps = 12000
activation_checkpointing = False
log_every = 100
save_every = 2000
num_workers = 1
