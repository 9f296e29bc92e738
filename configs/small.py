"""
A small random model and short steps, to put after another config: the same job on a laptop's CPU, in minutes.

    python train.py --config bridge.py --config small.py --data_root_dir DIR
"""

_tower = dict(embed_dim=96, depth=4, num_heads=3, img_size=112, mlp_dim=192)
random_model = {
    "vision_configs": [_tower, dict(_tower, cls_token=False, reg_tokens=0, layer_scale=False)],
    "text_config": dict(
        vocab_size=32064, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4
    ),
}
batch_size = 16
micro_batch_size = 16
lr = 1e-3
schedule = "cosine"
warmup_steps = 20
max_steps = 700
image_aug = False
activation_checkpointing = False
