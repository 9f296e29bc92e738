"""
The vision towers stay frozen; projector and language model train: the paper's table 1. 8 x A100 or H100 80 GB.

    torchrun --nproc-per-node 8 train.py --config frozen_vision.py \\
        --data_root_dir DIR --data_mix NAME --base_checkpoint openvla-7b

The paper's success on its Franka tasks: 47.0 % (full fine-tuning 69.7 %, LoRA of rank 32 68.2 %).
"""

train_parts = "frozen_vision"
batch_size = 256
micro_batch_size = 32
lr = 2e-5
schedule = "constant"
weight_decay = 0.0
grad_clip = 1.0
image_aug = False
max_steps = 30_000
