"""
Vision, projector and the language model's embeddings, last layer and head train: the paper's table 1. 8 x 80 GB.

    torchrun --nproc-per-node 8 train.py --config sandwich.py \\
        --data_root_dir DIR --data_mix NAME --base_checkpoint openvla-7b
"""

train_parts = "sandwich"
batch_size = 256
micro_batch_size = 32
lr = 2e-5
schedule = "constant"
weight_decay = 0.0
grad_clip = 1.0
image_aug = False
max_steps = 30_000
