"""
The official classes in `python -m bench gpu`: a process of the environment of --official_python, with transformers
4.40.1, timm 0.9.10 and peft 0.11.1. Like bench/official.py, beside which it lies, it imports nothing of this project
but bench/random_weights.py, which gives it the weights of our model without a file.

    PYTHON bench/gpu_official.py actions CODE CONFIG.json DEVICE INPUTS.npz
    PYTHON bench/gpu_official.py lora CODE CONFIG.json DEVICE BATCH_SIZE STEPS

CODE is a checkout of github.com/openvla/openvla, CONFIG.json the config of a checkpoint. `actions` answers as
bench/official.py does. `lora` trains as vla-scripts/finetune.py does, without its DDP wrapper, which one GPU does not
need, and prints the seconds of each step and the memory as one line of JSON.

Axes: B samples, T text tokens.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from official import answer, import_official  # Python looks in the folder of a script first
from random_weights import fill_random

# transformers reads these when it is imported: it needs PyTorch only, and no network.
os.environ.update({"HF_HUB_OFFLINE": "1", "USE_TF": "0", "USE_FLAX": "0"})

TEXT_TOKENS = 40  # of a sample, as in bench/train_step.py
TRAINED_TOKENS = 8
IGNORE_INDEX = -100
WARM_UP_STEPS = 2  # not counted
LORA_RANK = 32
LEARNING_RATE = 5e-4


def create(code: str, config_file: str, device: str):
    """Return the official model with random weights in bfloat16, which are made on the device."""
    content = json.loads(Path(config_file).read_text())
    model_class, config_class = import_official(code, content.get("vision_configs", []))
    config = config_class(**content)
    config._attn_implementation = "sdpa"
    with torch.device(device):
        model = model_class(config)

    # Parameters only: from_pretrained, too, leaves the tables of the rotary embedding in float32.
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return fill_random(model).eval()


def run_actions(code: str, config_file: str, device: str, inputs: str):
    """Answer the inputs that stdin names."""
    answer(create(code, config_file, device), "random", inputs, torch.bfloat16, device)


def run_lora(code: str, config_file: str, device: str, batch_size: str, steps: str):
    """Train adapters on random samples, and print what it took."""
    from peft import LoraConfig, get_peft_model

    lora_config = LoraConfig(
        r=LORA_RANK,
        lora_alpha=min(LORA_RANK, 16),
        lora_dropout=0.0,
        target_modules="all-linear",
        init_lora_weights="gaussian",
    )
    model = get_peft_model(create(code, config_file, device), lora_config).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
    batch = random_batch(int(batch_size), device)
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()

    seconds = []
    for _ in range(WARM_UP_STEPS + int(steps)):
        start = time.perf_counter()
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the GPU
        seconds.append(time.perf_counter() - start)
    result = {
        "seconds": seconds[WARM_UP_STEPS:],
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
        "trained": sum(parameter.numel() for parameter in trained),
        "adapter_dtype": str(trained[0].dtype),
    }
    print(json.dumps(result), flush=True)


def random_batch(batch_size: int, device: str) -> dict[str, torch.Tensor]:
    """Return input_ids, attention_mask and labels (B, T), and pixel_values (B, 6, 224, 224)."""
    input_ids = torch.randint(3, 30000, (batch_size, TEXT_TOKENS), device=device)
    labels = input_ids.clone()
    labels[:, :-TRAINED_TOKENS] = IGNORE_INDEX
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids, dtype=torch.bool),
        "labels": labels,
        "pixel_values": torch.randn(batch_size, 6, 224, 224, device=device).bfloat16(),
    }


if __name__ == "__main__":
    task, *arguments = sys.argv[1:]
    {"actions": run_actions, "lora": run_lora}[task](*arguments)
