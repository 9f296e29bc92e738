"""
The toy world's model learns to answer with eight actions as a few FAST tokens.

    python finetune_lora.py --config toy_fast.py

Needs the model of quickstart.py, and the demonstrations of `python -m toy.tokens`. That script runs this, the same with
bins, and configs/toy_oft.py, and compares.
"""

data_root_dir = "runs/toy_tokens/data"
data_mix = "toy_chunks"
run_dir = "runs/toy_tokens/fast"
base_checkpoint = "runs/toy/checkpoint"
action_tokenizer = "fast"
action_chunk = 8
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
max_steps = 3000
activation_checkpointing = False
log_every = 100
save_every = 1000
num_workers = 1
