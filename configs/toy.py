"""
The whole job in a small world, in about five minutes on two CPU cores: demonstrations, training, closed-loop success.

    python train.py            (which is python train.py --config toy.py)
"""

from formats import oxe
from toy import world as world

oxe.DATASETS["toy"] = oxe.Dataset(primary="image", state=("state",))  # what toy.write_rlds writes

words = world.WORDS
toy_episodes = 4000
data_root_dir = "runs/toy/data"
data_mix = "toy"
run_dir = "runs/toy"
image_aug = False
_tower = dict(embed_dim=64, depth=2, num_heads=4, img_size=42, mlp_dim=256)
random_model = {
    "vision_configs": [_tower, dict(_tower, cls_token=False, reg_tokens=0, layer_scale=False)],
    "text_config": dict(
        vocab_size=32064, hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4
    ),
}
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
