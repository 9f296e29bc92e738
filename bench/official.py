"""
The official classes, timed by bench.py: a process in their own virtual environment (transformers 4.40.1, timm 0.9.10).

    PYTHON bench_official.py CODE CHECKPOINT INPUTS.npz DTYPE DEVICE

CODE: a checkout of github.com/openvla/openvla. It answers each line of stdin, the number of an input, with one line of
JSON: the seconds of OpenVLAForActionPrediction.predict_action, and its tokens.
"""

import importlib.machinery
import json
import sys
import time
import types
from pathlib import Path

import numpy as np
import torch


class Anything(type):
    """A class whose attributes are classes like it."""

    def __getattr__(cls, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})


class Standin:
    """timm imports torchvision, for pictures that are not read here; without it, an empty one does."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__path__, module.__getattr__ = [], lambda name: Anything.__getattr__(Anything, name)
        return module

    def exec_module(self, module):
        pass


def main(code: str, checkpoint: str, inputs: str, dtype: str, device: str):
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        sys.modules.pop("torchvision", None)
        sys.meta_path.insert(0, Standin())
    sys.path.insert(0, str(Path(code, "prismatic", "extern")))  # so that the rest of `prismatic` is not imported
    from hf import modeling_prismatic
    from hf.configuration_prismatic import OpenVLAConfig

    sizes = json.loads(Path(checkpoint, "config.json").read_text()).get("vision_configs", [])
    create, made = modeling_prismatic.timm.create_model, []

    def create_of_our_size(name, **options):
        if sizes:
            v = sizes[len(made) % len(sizes)]
            made.append(name)
            options |= {k: v[k] for k in ("img_size", "embed_dim", "depth", "num_heads")}
            options["mlp_ratio"] = v["mlp_dim"] / v["embed_dim"]
        return create(name, **options)

    modeling_prismatic.timm.create_model = create_of_our_size
    config = OpenVLAConfig.from_pretrained(checkpoint)
    options = dict(torch_dtype=getattr(torch, dtype), attn_implementation="sdpa", low_cpu_mem_usage=not sizes)
    model = (
        modeling_prismatic.OpenVLAForActionPrediction.from_pretrained(checkpoint, config=config, **options)
        .to(device)
        .eval()
    )
    stored = np.load(inputs)
    key = next(iter(config.norm_stats))
    written = []
    generate = model.generate
    model.generate = lambda *args, **kwargs: written.append(generate(*args, **kwargs)) or written[-1]
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        i = int(line)
        ids = torch.from_numpy(stored[f"ids{i}"])[None].to(device)
        pixel_values = torch.from_numpy(stored[f"pixels{i}"])[None].to(device, getattr(torch, dtype))
        start = time.perf_counter()
        model.predict_action(ids, key, pixel_values=pixel_values, do_sample=False)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        print(json.dumps(dict(seconds=seconds, tokens=written.pop()[0, -7:].tolist())), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
