"""
A small policy from random weights for two tasks of libero_spatial: about twenty minutes on two CPU cores.

    python train.py --config libero_small.py --data_root_dir runs/libero_data

Needs the expert's demonstrations, replayed and written as RLDS: docs/libero.md has the commands. Expected: one success
in 20 episodes. The chain from demonstrations to a success rate is the point, not the policy.
"""

data_mix = "libero_spatial_no_noops"
run_dir = "runs/libero_small"
words = tuple("pick up the black bowl between plate and ramekin from table center place it on".split())  # a token each
image_aug = False
_dinov2 = {"embed_dim": 64, "depth": 2, "num_heads": 4, "img_size": 112, "mlp_dim": 256}
_siglip = {**_dinov2, "cls_token": False, "reg_tokens": 0, "layer_scale": False}
random_model = {
    "vision_configs": [_dinov2, _siglip],
    "text_config": {
        "vocab_size": 32064,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    },
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
