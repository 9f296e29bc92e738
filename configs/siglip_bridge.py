"""
The paper's ablation on BridgeData V2 with a single SigLIP tower (siglip-224px+mx-bridge): 8 x A100 or H100 80 GB.

    torchrun --nproc-per-node 8 train.py --config siglip_bridge.py --data_root_dir DIR --base_checkpoint FOLDER

FOLDER is the base VLM siglip-224px+7b in Hugging Face layout. Hours depend on the GPUs; the paper gives none for this
run. Expected: action-token accuracy above 0.95 at the end.
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
