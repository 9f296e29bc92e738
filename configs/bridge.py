"""
OpenVLA on BridgeData V2, as in the paper (prism-dinosiglip-224px+mx-bridge): 8 x H100 or A100 80 GB.

    torchrun --nproc-per-node 8 train.py --config bridge.py --data_root_dir DIR --base_checkpoint FOLDER

Expected: action-token accuracy above 0.95 at the end. Without those GPUs, with a small random model on any data:
    python train.py --config bridge.py --config small.py --data_root_dir DIR
"""

data_mix = "bridge"
batch_size = 256
micro_batch_size = 32
lr = 2e-5
schedule = "constant"
weight_decay = 0.0
grad_clip = 1.0
image_aug = False
max_steps = 30_000
