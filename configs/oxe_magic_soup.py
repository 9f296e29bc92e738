"""
openvla-v01-7b: SigLIP and Vicuna on the Open X-Embodiment "magic soup" mixture. 64 x A100 80 GB, 8 nodes.

    torchrun --nnodes 8 --nproc-per-node 8 --rdzv-endpoint HOST:29500 train.py --config oxe_magic_soup.py \\
        --data_root_dir DIR --base_checkpoint FOLDER

FOLDER is the base VLM siglip-224px+7b in Hugging Face layout. About two weeks, until the action-token accuracy has
passed 0.95.
"""

data_mix = "oxe_magic_soup"
batch_size = 2048
micro_batch_size = 32
lr = 2e-5
schedule = "constant"
weight_decay = 0.0
grad_clip = 1.0
image_aug = False
max_steps = 300_000
