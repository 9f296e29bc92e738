"""
RLOO in LIBERO: a policy that succeeds now and then practises in eight simulators. Adapters train.

    python finetune_rl.py --config libero_rl.py --base_checkpoint openvla-7b-finetuned-libero-spatial

For one GPU with 80 GB. Nobody has run it to its end yet: docs/log.md has a smoke test of two updates.
"""

from libero_sim.environment import LiberoEnvironment

environment = LiberoEnvironment("libero_spatial", num_envs=8)
run_dir = "runs/libero_rl"
image_aug = False
method = "rloo"
unnorm_key = "libero_spatial"
starts = 8
rollouts = 8
groups = 4
lora_rank = 32
lr = 2e-5
batch_size = 128
micro_batch_size = 4
activation_checkpointing = True
