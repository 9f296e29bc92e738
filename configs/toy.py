"""
The whole job in a small world, in about five minutes on two CPU cores: demonstrations, training, closed-loop success.

    python train.py            (which is python train.py --config toy.py)
"""

import oxe
import toy as world

oxe.DATASETS["toy"] = oxe.Dataset(primary="image", state=("state",))  # what toy.write_rlds writes

words = world.WORDS
toy_episodes = 4000
data_root_dir = "runs/toy/data"
data_mix = "toy"
run_dir = "runs/toy"
image_aug = False
random_model = {
    "vision_configs": [
        dict(embed_dim=96, depth=3, num_heads=4, img_size=56, mlp_dim=384),
        dict(
            embed_dim=96,
            depth=3,
            num_heads=4,
            img_size=56,
            mlp_dim=384,
            cls_token=False,
            reg_tokens=0,
            layer_scale=False,
        ),
    ],
    "text_config": dict(
        vocab_size=32064, hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4
    ),
}
batch_size = 32
micro_batch_size = 32
lr = 1e-3
schedule = "cosine"
warmup_steps = 60
beta2 = 0.95
weight_decay = 0.01
max_steps = 2500
activation_checkpointing = False
log_every = 50
save_every = 500
num_workers = 1
