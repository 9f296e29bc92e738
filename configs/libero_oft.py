"""
OpenVLA-OFT on LIBERO: two cameras, the state, chunks of eight actions by L1 regression.

    python finetune_oft.py --config libero_oft.py --base_checkpoint openvla-7b --data_root_dir DIR

The paper trained on eight A100 with 8 samples each (62 GB of memory), for 150,005 steps. The learning rate is 5e-4, and
a tenth of it after 100,000 steps. (The official loop forgets the decay when it warms up; here both happen.)

Expected: L1 about 0.006; success 97.6 % (Spatial), 98.4 % (Object), 97.9 % (Goal, best after 50,000 steps), 94.5 %
(Long), by https://arxiv.org/abs/2502.19645.
"""

data_mix = "libero_spatial_no_noops"
run_dir = "runs/libero_spatial_oft"
batch_size = 64
micro_batch_size = 8
max_steps = 150_005
lr = 5e-4
image_aug = True
