"""
The toy world: a small OpenVLA from random weights, in about three minutes on two CPU cores.

    python train.py --config toy.py

The first run makes the demonstrations. quickstart.py does all of it, and lets the policy act.
"""

from toy import world

words = world.WORDS  # a token each
data_root_dir = "runs/toy/data"
data_mix = "toy"
make_data = "python -m toy.world --folder {data_root_dir} --episodes 12000"
run_dir = "runs/toy"
image_aug = False
_dinov2 = {"embed_dim": 64, "depth": 2, "num_heads": 4, "img_size": 42, "mlp_dim": 256}
_siglip = {**_dinov2, "cls_token": False, "reg_tokens": 0, "layer_scale": False}
random_model = {
    "vision_configs": [_dinov2, _siglip],
    "text_config": {
        "vocab_size": 32064,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
}
short_head = True  # the rest of it was two thirds of a step
batch_size = 24
micro_batch_size = 24
lr = 6e-4
schedule = "step"
decay_step = 2600
warmup_steps = 60
beta2 = 0.95
max_steps = 3000
activation_checkpointing = False
log_every = 100
save_every = 1000
num_workers = 1
