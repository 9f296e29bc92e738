"""
A small policy from scratch on two tasks of libero_spatial, for the simulator: the expert's demonstrations,
replayed and written as RLDS (README, "LIBERO"), about twenty minutes on two CPU cores.

    python train.py --config libero_small.py --data_root_dir runs/libero_data
"""

data_mix = "libero_spatial_no_noops"
run_dir = "runs/libero_small"
words = tuple("pick up the black bowl between plate and ramekin from table center place it on".split())
image_aug = False
_tower = dict(embed_dim=64, depth=2, num_heads=4, img_size=112, mlp_dim=256)
random_model = {
    "vision_configs": [_tower, dict(_tower, cls_token=False, reg_tokens=0, layer_scale=False)],
    "text_config": dict(
        vocab_size=32064, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4
    ),
}
batch_size = 24
micro_batch_size = 24
lr = 6e-4
schedule = "step"
decay_step = 4500
warmup_steps = 60
beta2 = 0.95
max_steps = 5000
activation_checkpointing = False
log_every = 100
save_every = 1000
num_workers = 1
