"""
openvla-7b, the released model: DINOv2 + SigLIP and Llama-2 on the "magic soup plus" mixture. 64 x A100 80 GB, 14 days.

    torchrun --nnodes 8 --nproc-per-node 8 --rdzv-endpoint HOST:29500 train.py --config oxe_magic_soup_plus.py \\
        --data_root_dir DIR --base_checkpoint FOLDER

FOLDER is the base VLM prism-dinosiglip-224px+7b in Hugging Face layout. Released after step 295,000, with an
action-token accuracy above 0.95. DROID was in the mixture for about the first 70 % of the run, and was left out of the
rest: a second run, from what the first one wrote, with `--base_checkpoint runs/oxe_magic_soup_plus/checkpoint
--run_dir runs/oxe_magic_soup_plus_minus --data_mix oxe_magic_soup_plus_minus --max_steps 90_000`.
"""

data_mix = "oxe_magic_soup_plus"
batch_size = 2048
micro_batch_size = 32
lr = 2e-5
schedule = "constant"
weight_decay = 0.0
grad_clip = 1.0
image_aug = False
max_steps = 205_000
