"""
Time the official classes: a process in their own virtual environment (transformers 4.40.1, timm 0.9.10), which
`python -m bench infer --vs official` starts. So this file imports nothing of this project.

    PYTHON bench/official.py CODE CHECKPOINT INPUTS.npz DTYPE DEVICE

CODE is a checkout of github.com/openvla/openvla. The process says {"ready": true}; after that it answers each line of
stdin, the number of an input, with one line of JSON: the seconds of OpenVLAForActionPrediction.predict_action, and its
tokens.
"""

import importlib.machinery
import json
import sys
import time
import types
from pathlib import Path

import numpy as np
import torch

NUM_TOKENS = 7  # of an action


# -----------------------------------------------------------------------------
# A stand-in for torchvision. timm imports it to read images, which nobody does here; so an empty one will do where
# none is installed that fits this PyTorch.


class Anything(type):
    """A class whose attributes are classes like it."""

    def __getattr__(cls, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})


def attribute(name: str):
    """Return any attribute of a module of the stand-in."""
    return Anything.__getattr__(Anything, name)


class Standin:
    """Python asks it for each module that is imported; it makes those of torchvision."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__path__ = []
        module.__getattr__ = attribute
        return module

    def exec_module(self, module):
        pass


def use_standin_if_needed():
    """Import torchvision, or put the stand-in into its place."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        sys.modules.pop("torchvision", None)
        sys.meta_path.insert(0, Standin())


# -----------------------------------------------------------------------------
# The official model


def load(code: str, checkpoint: str, dtype: torch.dtype, device: str):
    """Return the official model, which keeps what it generated last in `generated`, and an unnorm_key of it."""
    sizes = json.loads(Path(checkpoint, "config.json").read_text()).get("vision_configs", [])
    model_class, config_class = import_official(code, sizes)
    config = config_class.from_pretrained(checkpoint)
    model = model_class.from_pretrained(
        checkpoint, config=config, torch_dtype=dtype, attn_implementation="sdpa", low_cpu_mem_usage=not sizes
    )
    unnorm_key = next(iter(config.norm_stats))
    return model.to(device).eval(), unnorm_key


def import_official(code: str, sizes: list[dict]):
    """
    Return the classes of the official model and of its config. sizes: of vision encoders that are not the released
    ones, as config.json gives them.
    """
    use_standin_if_needed()
    sys.path.insert(0, str(Path(code, "prismatic", "extern")))  # so that the rest of `prismatic` is not imported
    from hf import modeling_prismatic
    from hf.configuration_prismatic import OpenVLAConfig

    class RecordingModel(modeling_prismatic.OpenVLAForActionPrediction):
        """predict_action returns the action only; the comparison needs its tokens, too."""

        def generate(self, *args, **kwargs):
            self.generated = super().generate(*args, **kwargs)
            return self.generated

    if sizes:
        modeling_prismatic.timm = TimmOfOtherSizes(modeling_prismatic.timm, sizes)
    return RecordingModel, OpenVLAConfig


class TimmOfOtherSizes:
    """
    timm, but its vision encoders have the sizes that config.json gives. The official code knows the released sizes
    only, and offers no other way in.
    """

    def __init__(self, timm, sizes: list[dict]):
        self.timm = timm
        self.sizes = sizes
        self.num_created = 0

    def __getattr__(self, name: str):
        return getattr(self.timm, name)

    def create_model(self, name: str, **options):
        sizes = self.sizes[self.num_created % len(self.sizes)]
        self.num_created += 1
        for key in ("img_size", "embed_dim", "depth", "num_heads"):
            options[key] = sizes[key]
        options["mlp_ratio"] = sizes["mlp_dim"] / sizes["embed_dim"]
        return self.timm.create_model(name, **options)


def main(code: str, checkpoint: str, inputs: str, dtype: str, device: str):
    torch_dtype = getattr(torch, dtype)
    model, unnorm_key = load(code, checkpoint, torch_dtype, device)
    answer(model, unnorm_key, inputs, torch_dtype, device)


def answer(model, unnorm_key: str, inputs: str, dtype: torch.dtype, device: str):
    """Say that the model is ready, and answer each line of stdin until it is closed."""
    arrays = np.load(inputs)
    print(json.dumps({"ready": True}), flush=True)

    for line in sys.stdin:
        number = int(line)
        input_ids = torch.from_numpy(arrays[f"ids{number}"])[None].to(device)
        pixel_values = torch.from_numpy(arrays[f"pixels{number}"])[None].to(device, dtype)

        start = time.perf_counter()
        model.predict_action(input_ids, unnorm_key, pixel_values=pixel_values, do_sample=False)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start

        tokens = model.generated[0, -NUM_TOKENS:].tolist()
        print(json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
