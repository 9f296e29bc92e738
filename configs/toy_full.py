"""
The same as configs/toy_lora.py with all weights instead of adapters, to compare: same data, steps and learning rate.

    python train.py --config toy_full.py
"""

data_root_dir = "runs/toy_lora/data"
data_mix = "toy_changed"
run_dir = "runs/toy_full"
base_checkpoint = "runs/toy/checkpoint"
image_aug = False
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
