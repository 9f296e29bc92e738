"""LoRA and NF4: PEFT's numbers and files, identity at the start, merged = unmerged, resumed = uninterrupted."""

import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import GOLDENS, ROOT, golden, pixels, shared
from safetensors.torch import load_file, save_file
from test_train import CONFIG

import finetune_lora
import lora
import policy
import train
from checkpoint import open_checkpoint
from configurator import configure
from model import OpenVLA, OpenVLAConfig, is_unused
from speed import nf4
from tokenizer import make_standin

INFO = json.loads((GOLDENS / "tiny-lora.golden.json").read_text())
WANT = load_file(GOLDENS / "tiny-lora.golden.safetensors")
BASE, BASE_INFO = golden("tiny-openvla")


def tiny(folders, dtype=torch.float32):
    return OpenVLA.from_pretrained(folders["tiny-openvla"], dtype)


def logits_at_prompt_end(model, i):
    ids = BASE[f"ex{i}/input_ids_with_29871"][None]
    with torch.no_grad():
        logits, _ = model(ids, pixels(BASE_INFO, BASE_INFO["examples"][i]))
    return logits[0, -1, BASE["logit_cols"]]


def checksum(tensors):
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def shake(model, seed=0):
    """Adapters that are no longer at identity."""
    generator = torch.Generator().manual_seed(seed)
    for layer in lora.lora_layers(model).values():
        layer.lora_B.weight.data.normal_(0, 0.05, generator=generator)


# ----------------------------------------------------------------------------- PEFT's numbers


@pytest.fixture(scope="module")
def adapted(folders):
    return lora.load_adapter(tiny(folders), GOLDENS / "tiny-lora")


@pytest.mark.parametrize("i", range(3))
def test_logits_tokens_and_merged_logits(adapted, folders, i):
    torch.testing.assert_close(
        logits_at_prompt_end(adapted, i), WANT[f"ex{i}/logits_prompt_last_cols"], atol=5e-4, rtol=0
    )
    ids, image = BASE[f"ex{i}/input_ids_with_29871"][None], pixels(BASE_INFO, BASE_INFO["examples"][i])
    assert adapted.generate(ids, image, 7)[0].tolist() == [INFO["predicted_token_ids"][i]]
    merged = lora.load_adapter(tiny(folders), GOLDENS / "tiny-lora")
    lora.merge_lora(merged)
    torch.testing.assert_close(
        logits_at_prompt_end(merged, i), WANT[f"ex{i}/merged_logits_prompt_last_cols"], atol=5e-4, rtol=0
    )


def test_modules_and_parameter_count(folders):
    model = tiny(folders)
    assert sorted(lora.adapted_modules(model)) == sorted(INFO["adapted_modules"])
    lora.add_lora(model, rank=INFO["r"])
    assert sum(w.numel() for w in lora.lora_state(model).values()) == INFO["trainable_params"]


def test_parameter_count_of_openvla_7b():
    """110,828,288 at rank 32: the official script's count for the released model."""
    names = json.loads(shared("facts/official_keys_openvla7b.json").read_text())["openvla-7b"]["parameters"]
    with torch.device("meta"):
        model = OpenVLA(OpenVLAConfig())
        model.unused = {k: torch.empty(v) for k, v in names.items() if is_unused(k, model.cfg)}
        lora.add_lora(model, rank=32)
    assert sum(w.numel() for w in lora.lora_state(model).values()) == 110_828_288


def test_merged_weights(folders, tmp_path):
    """Folder to folder, also of weights that never run, rounded once to bfloat16."""
    run = tmp_path / "run"
    shutil.copytree(GOLDENS / "tiny-lora", run)
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(folders["tiny-openvla"])})
    )
    (run / "dataset_statistics.json").write_text(json.dumps({"mine": {"action": {"q01": [0.0], "q99": [1.0]}}}))
    lora.merge(run, tmp_path / "merged")
    found = {k: v for f in (tmp_path / "merged").glob("*.safetensors") for k, v in load_file(f).items()}
    checked = [k for k in WANT if k.startswith("merged/")]
    assert len(checked) == 5
    for key in checked:
        exact = WANT[key]
        torch.testing.assert_close(found[key.removeprefix("merged/")], exact.bfloat16(), atol=0, rtol=2**-8)
    base = {k: v for f in folders["tiny-openvla"].glob("*.safetensors") for k, v in load_file(f).items()}
    assert found.keys() == base.keys()
    name = "language_model.model.embed_tokens.weight"
    assert torch.equal(found[name], base[name])
    assert set(open_checkpoint(tmp_path / "merged").norm_stats) == {"mine"}
    with pytest.raises(ValueError, match="exists"):
        lora.merge(run, tmp_path / "merged")


def test_six_training_steps(folders):
    model = lora.load_adapter(tiny(folders), GOLDENS / "tiny-lora")
    for layer in lora.lora_layers(model).values():
        layer.lora_A.requires_grad_(True), layer.lora_B.requires_grad_(True)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = train.build_optimizer(model, finetune_lora.Config(), fused=True)
    images = torch.cat([pixels(BASE_INFO, e) for e in BASE_INFO["examples"]])
    losses, want = [], INFO["training"]
    for step in range(want["steps"]):
        optimizer.param_groups[0]["lr"] = want["lr"]
        _, loss = model(BASE["train/input_ids"], images, BASE["train/labels"])
        losses.append(loss.item())
        loss.backward()
        if step == 0:
            for name, norm in want["grad_norms_step0"].items():
                name = name.replace(".default.", ".")
                if norm is not None and name not in model.unused:
                    layer, which = name.removesuffix(".weight").rsplit(".", 1)
                    got = getattr(model.get_submodule(layer), which).weight.grad.norm().item()
                    assert got == pytest.approx(norm, rel=1e-3), name
        optimizer.step()
        optimizer.zero_grad()
    assert losses == pytest.approx(want["loss_before_step"], abs=1e-4)
    for key in (k for k in WANT if k.startswith("trained/")):
        got = model.get_submodule(key.removeprefix("trained/")).weight
        torch.testing.assert_close(got.detach(), WANT[key], atol=1e-4, rtol=0)
    assert len(params) == 2 * len(lora.lora_layers(model))


# ----------------------------------------------------------------------------- properties


def test_identity_at_start(folders):
    model, plain = lora.add_lora(tiny(folders), rank=4), tiny(folders)
    for i in range(3):
        assert torch.equal(logits_at_prompt_end(model, i), logits_at_prompt_end(plain, i))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_merged_is_unmerged_and_back(folders, dtype, tolerance):
    """Layer by layer, relative to what comes out; then the base weights and the logits, bit for bit."""
    model = lora.add_lora(tiny(folders, dtype), rank=4)
    shake(model)
    layers = lora.lora_layers(model)
    before = {name: layer.base_layer.weight.clone() for name, layer in layers.items()}
    image, ids = pixels(BASE_INFO, BASE_INFO["examples"][0]).to(dtype), BASE["ex0/input_ids"][None]
    torch.manual_seed(0)
    with torch.no_grad():
        inputs = {}
        for name, layer in layers.items():
            is_convolution = layer.lora_A.weight.dim() == 4
            shape = (3, 28, 28) if is_convolution else (layer.lora_A.in_features,)
            inputs[name] = torch.randn(2, *shape).to(dtype)
        apart = {name: layer(inputs[name]) for name, layer in layers.items()}
        logits, _ = model(ids, image)
        lora.merge_lora(model)
        for name, layer in layers.items():
            together = layer(inputs[name])
            assert not torch.equal(together, apart[name])
            assert (together - apart[name]).float().norm() <= tolerance * apart[name].float().norm(), name
        with pytest.raises(ValueError, match="merged already"):
            lora.merge_lora(model)
        lora.unmerge_lora(model)
        assert torch.equal(model(ids, image)[0], logits)
    assert all(torch.equal(layer.base_layer.weight, before[n]) for n, layer in layers.items())


def test_dropout_only_in_training(folders):
    model = lora.add_lora(tiny(folders), rank=4, dropout=0.5)
    shake(model)
    assert torch.equal(logits_at_prompt_end(model, 0), logits_at_prompt_end(model, 0))
    model.train()
    assert not torch.equal(logits_at_prompt_end(model, 0), logits_at_prompt_end(model, 0))


def test_gradients_only_in_adapters(folders):
    model = lora.add_lora(tiny(folders), rank=4)
    shake(model)
    images = torch.cat([pixels(BASE_INFO, e) for e in BASE_INFO["examples"]])
    model(BASE["train/input_ids"], images, BASE["train/labels"])[1].backward()
    with_grad = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_grad == {name for name in lora.lora_state(model) if name not in model.unused}


@pytest.mark.parametrize(
    ("targets", "want"),
    [
        (("vision",), ("vision_backbone.",)),
        (("projector", "language"), ("projector.", "language_model.")),
    ],
)
def test_targets_by_part(folders, tmp_path, targets, want):
    model = lora.add_lora(tiny(folders), rank=2, targets=targets)
    names = {name.rsplit(".", 2)[0] for name in lora.lora_state(model)}
    assert names == {name for name in INFO["adapted_modules"] if name.startswith(want)}
    lora.save_adapter(model, tmp_path, "base")
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert {name for name in INFO["adapted_modules"] if re.fullmatch(pattern, name)} == names
    with pytest.raises(ValueError, match="lora_targets"):
        lora.add_lora(tiny(folders), targets=("head",))


def test_adapter_files_come_back(folders, tmp_path):
    model = lora.add_lora(tiny(folders), rank=4, alpha=8)
    shake(model)
    lora.save_adapter(model, tmp_path, folders["tiny-openvla"])
    again = lora.load_adapter(tiny(folders), tmp_path)
    assert checksum(lora.lora_state(again)) == checksum(lora.lora_state(model))
    assert torch.equal(logits_at_prompt_end(again, 1), logits_at_prompt_end(model, 1))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    theirs = json.loads((GOLDENS / "tiny-lora" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == sorted(theirs["target_modules"])
    assert config.keys() <= theirs.keys()
    with_base = {f"base_model.model.{n}" for n in INFO["adapter_file_keys_without_lora"]} | set(
        INFO["adapter_file_keys_without_lora"]
    )
    their_keys = set(load_file(GOLDENS / "tiny-lora" / "adapter_model.safetensors")) - with_base
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == their_keys


# What PEFT 0.21.2 writes besides the options that 0.11.1 knows, where nothing of it is used.
NEW_IN_PEFT_0_21 = {
    "peft_version": "0.21.2",
    "exclude_modules": None,
    "trainable_token_indices": None,
    "eva_config": None,
    "corda_config": None,
    "lora_ga_config": None,
    "velora_config": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "qalora_group_size": 16,
    "monteclora_config": None,
    "lora_bias": False,
    "target_parameters": None,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "ensure_weight_tying": False,
    "an_option_of_tomorrow": None,
}


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_files_of_a_newer_peft(folders, adapted, tmp_path):
    shutil.copytree(GOLDENS / "tiny-lora", tmp_path / "a")
    change_config(tmp_path / "a", **NEW_IN_PEFT_0_21)
    model = lora.load_adapter(tiny(folders), tmp_path / "a")
    assert torch.equal(logits_at_prompt_end(model, 0), logits_at_prompt_end(adapted, 0))


def test_rank_stabilised(folders, tmp_path):
    """alpha / sqrt(rank) in place of alpha / rank, in the model and in merged weights."""
    base = folders["tiny-openvla"]
    model = lora.add_lora(tiny(folders), rank=4, alpha=3)
    shake(model)
    lora.save_adapter(model, tmp_path / "a", base)
    change_config(tmp_path / "a", use_rslora=True)
    found = lora.load_adapter(tiny(folders), tmp_path / "a")
    assert {layer.scaling for layer in lora.lora_layers(found).values()} == {1.5}
    change_config(tmp_path / "a", use_rslora=False, lora_alpha=6)
    want = lora.load_adapter(tiny(folders), tmp_path / "a")
    assert torch.equal(logits_at_prompt_end(found, 0), logits_at_prompt_end(want, 0))

    lora.merge(tmp_path / "a", tmp_path / "six")
    change_config(tmp_path / "a", use_rslora=True, lora_alpha=3)
    lora.merge(tmp_path / "a", tmp_path / "three")
    for file in (tmp_path / "six").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "three" / file.name).read_bytes()


def test_layers_with_a_rank_and_an_alpha_of_their_own(folders, tmp_path):
    """As PEFT 0.21.2 applies them; it was compared once, equal to the bit."""
    model = lora.add_lora(tiny(folders), rank=4, alpha=8, targets=("language",))
    shake(model)
    lora.save_adapter(model, tmp_path / "a", folders["tiny-openvla"])
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if ".q_proj.lora_A." in name:
            tensors[name] = tensors[name][:2].contiguous()
        if ".q_proj.lora_B." in name:
            tensors[name] = tensors[name][:, :2].contiguous()
    save_file(tensors, path, {"format": "pt"})
    last = "layers.1.self_attn.v_proj"
    change_config(tmp_path / "a", rank_pattern={"q_proj": 2}, alpha_pattern={last: 3.0})

    layers = lora.lora_layers(lora.load_adapter(tiny(folders), tmp_path / "a"))
    scalings = {name.removeprefix("language_model.model."): layer.scaling for name, layer in layers.items()}
    assert scalings["layers.0.self_attn.q_proj"] == 8 / 2
    assert scalings[last] == 3 / 4 and scalings["layers.0.self_attn.v_proj"] == 8 / 4
    lora.merge(tmp_path / "a", tmp_path / "merged")
    name = f"language_model.model.{last}.weight"
    A, B = (tensors[f"base_model.model.{name.removesuffix('.weight')}.lora_{half}.weight"] for half in "AB")
    found = {k: v for f in (tmp_path / "merged").glob("*.safetensors") for k, v in load_file(f).items()}[name]
    base = tiny(folders, torch.bfloat16).state_dict()[name]
    assert torch.equal(found, (base.float() + B @ A * 0.75).bfloat16())


def test_what_is_no_plain_lora_is_refused(folders, tmp_path):
    def broken(message, config=None, tensors=None):
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        shutil.copytree(GOLDENS / "tiny-lora", tmp_path / "a")
        path = tmp_path / "a" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
        path = tmp_path / "a" / "adapter_model.safetensors"
        save_file(load_file(path) | (tensors or {}), path)
        with pytest.raises(ValueError, match=message):
            lora.load_adapter(tiny(folders), tmp_path / "a")

    q = "base_model.model.language_model.model.layers.0.self_attn.q_proj"
    broken("use_dora", dict(use_dora=True))
    broken("use_rslora is 1, it must be true or false", dict(use_rslora=1))
    broken("new_option is 3, which this code does not know", dict(new_option=3))
    broken(r"rank_pattern has the pattern '\(a\+\)\+\$'; only names of layers", dict(rank_pattern={"(a+)+$": 2}))
    broken("rank_pattern is {'q_proj': 0}, it must be", dict(rank_pattern={"q_proj": 0}))
    broken("alpha_pattern is 3, it must be", dict(alpha_pattern=3))
    broken("q_proj.weight needs a lora_A and a lora_B of rank 2|makes it", dict(rank_pattern={"q_proj": 2}))
    broken("missing|makes it", dict(r=8))
    broken("makes it", tensors={f"{q}.lora_A.weight": torch.zeros(4, 5)})
    broken("does not have", tensors={f"{q}x.lora_A.weight": torch.zeros(4, 16)})
    broken("no tensor of a LoRA adapter", tensors={f"{q}.magnitude": torch.zeros(4)})
    head = "base_model.model.language_model.lm_head.base_layer.weight"
    broken("another one", tensors={head: torch.zeros(32064, 16)})
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        lora.load_adapter(tiny(folders), tmp_path)


# ----------------------------------------------------------------------------- whole runs


@pytest.fixture
def setup(tmp_path):
    """A small base checkpoint, and the arguments of a LoRA run on it."""
    (tmp_path / "c.py").write_text(CONFIG)
    make_standin(tmp_path / "tokenizer.model")
    argv = ["--config", str(tmp_path / "c.py"), "--tokenizer", str(tmp_path / "tokenizer.model")]
    train.train(configure(train.Config, [*argv, "--run_dir", str(tmp_path / "base"), "--max_steps", "1"]))
    base = tmp_path / "base" / "checkpoint"
    (tmp_path / "lora.py").write_text(CONFIG.split("random_model")[0] + CONFIG.split("\n}\n")[-1])

    def options(name, *more):
        config = ["--config", str(tmp_path / "lora.py"), "--base_checkpoint", str(base), "--lora_rank", "4"]
        return [*config, "--run_dir", str(tmp_path / name), *more]

    return base, options


def losses_of(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def run_here(argv):
    return train.train(configure(finetune_lora.Config, argv), finetune_lora.build)


def test_run_sample_and_merge(setup, tmp_path):
    base, options = setup
    before = checksum({f.name: torch.frombuffer(bytearray(f.read_bytes()), dtype=torch.uint8) for f in base.iterdir()})
    metrics = run_here(options("run", "--max_steps", "50", "--save_every", "20"))
    assert metrics["loss"] < 8  # from 10.4
    after = checksum({f.name: torch.frombuffer(bytearray(f.read_bytes()), dtype=torch.uint8) for f in base.iterdir()})
    assert before == after
    run = tmp_path / "run"
    saved = sum(f.stat().st_size for f in (run / "checkpoints" / "step-000050").glob("*"))
    adapter = (run / "adapter_model.safetensors").stat().st_size
    assert saved < 4 * adapter < (base / "model-00001-of-00001.safetensors").stat().st_size
    picture = np.random.default_rng(0).integers(0, 255, (28, 28, 3), dtype=np.uint8)
    apart = policy.load_policy(run)
    lora.merge(run, tmp_path / "merged")
    whole = policy.load_policy(tmp_path / "merged")
    tokens = [policy.predict_tokens(p, [picture], ["do 1"], 7) for p in (apart, whole)]
    assert torch.equal(*tokens)
    assert apart.norm_stats.keys() == whole.norm_stats.keys()


def test_an_adapter_on_other_weights(setup, tmp_path):
    """The base was trained anew in its old place: said when the adapter is used, refused when its training goes on."""
    base, options = setup
    run_here(options("run", "--max_steps", "2"))
    file = base / "model-00001-of-00001.safetensors"
    tensors = load_file(file)
    save_file({k: v + 0.01 for k, v in tensors.items()}, file, {"format": "pt"})
    with pytest.warns(UserWarning, match="trained on other weights"):
        policy.load_policy(tmp_path / "run")
    with pytest.warns(UserWarning, match="trained on other weights"):
        lora.merge(tmp_path / "run", tmp_path / "merged")
    with pytest.raises(ValueError, match="its frozen parts are not the weights that"):
        run_here(options("run", "--max_steps", "4"))


def test_resumed_is_uninterrupted(setup, tmp_path):
    """SIGKILL after the first save, then the same command: adapter and optimizer bit for bit as without."""
    _, options = setup
    more = ["--max_steps", "8", "--save_every", "1", "--lora_dropout", "0.1"]
    run_here(options("whole", *more))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "finetune_lora.py"), *options("cut", *more)], stderr=subprocess.DEVNULL
    )
    while not list((tmp_path / "cut" / "checkpoints").glob("step-*")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run_here(options("cut", *more))
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert checksum(a) == checksum(b)
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "cut")


def test_one_save_per_interval(setup, tmp_path, monkeypatch):
    _, options = setup
    saves, save = [], train.Saver.save
    monkeypatch.setattr(train.Saver, "save", lambda self, step, *rest: (saves.append(step), save(self, step, *rest)))
    run_here(options("run", "--micro_batch_size", "1", "--save_every", "2"))  # 4 micro-batches a step
    assert saves == [2, 4, 6]


def test_two_processes_equal_one(setup, tmp_path):
    _, options = setup
    run_here(options("one"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    argv = [*torchrun, str(ROOT / "finetune_lora.py"), *options("two", "--micro_batch_size", "2")]
    subprocess.run(argv, check=True, capture_output=True, cwd=tmp_path)
    assert losses_of(tmp_path / "one") == pytest.approx(losses_of(tmp_path / "two"), abs=1e-5)


def test_errors_before_long_work(setup, tmp_path, capsys):
    base, options = setup
    for argv, message in (
        (["--data_root_dir", "x"], "base_checkpoint"),
        ([*options("a"), "--quantize_base", "int3"], "nf4"),
        ([*options("a"), "--lora_targets", "head"], "lora_targets"),
    ):
        with pytest.raises(SystemExit) as stop:
            finetune_lora.main(configure(finetune_lora.Config, argv))
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="no such checkpoint folder"):
        lora.merge(tmp_path / "nothing", tmp_path / "b")
    run_here(options("b", "--max_steps", "1"))
    shutil.move(base, tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="base checkpoint"):
        policy.load_policy(tmp_path / "b")


# ----------------------------------------------------------------------------- NF4


def test_levels_are_the_papers():
    """Quantiles of a normal distribution, eight below zero and nine from it on, scaled to [-1, 1] (bitsandbytes)."""
    normal, offset = torch.distributions.Normal(0.0, 1.0), 0.9677083
    above = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1].float())
    below = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1].float())
    levels = torch.cat([above, torch.zeros(1), below]).sort().values
    torch.testing.assert_close(levels / levels.max(), nf4.LEVELS, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(64, 64), (5, 13), (1, 1), (100, 300)])
def test_round_trip_takes_the_nearest_level(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    q = nf4.quantize(weight)
    back = nf4.dequantize(q, shape, torch.float32)
    rows, got = nf4.blocks(weight, 64), nf4.blocks(back, 64)
    sizes = nf4.restore_sizes(q["sizes"], q["scale"], q["offset"])[: len(rows), None]
    torch.testing.assert_close(sizes[:, 0], rows.abs().amax(1), rtol=0.02, atol=0.02)
    nearest = (rows[..., None] - sizes[..., None] * nf4.LEVELS).abs().amin(-1)
    torch.testing.assert_close((rows - got).abs().flatten()[: weight.numel()], nearest.flatten()[: weight.numel()])
    assert torch.equal(nf4.dequantize(nf4.quantize(back), shape, torch.float32).sign(), back.sign())


def test_quantized_layer_and_its_gradient():
    linear = torch.nn.Linear(96, 40)
    layer = nf4.NF4Linear(linear)
    x = torch.randn(3, 5, 96, requires_grad=True)
    want = F.linear(x, layer.restored(torch.float32), linear.bias)
    assert torch.equal(layer(x), want)
    assert (want - linear(x)).abs().max() < 0.2
    grads = [torch.autograd.grad(y.sin().sum(), x)[0] for y in (layer(x), want)]
    torch.testing.assert_close(*grads)


def bytes_per_weight(model: torch.nn.Module) -> float:
    """Of the quantised layers, everything counted but their biases."""
    layers = [m for m in model.modules() if isinstance(m, nf4.NF4Linear)]
    stored = sum(b.numel() * b.element_size() for m in layers for b in m.buffers())
    return stored / sum(m.in_features * m.out_features for m in layers)


def test_quantized_model_and_adapters_on_it(folders):
    plain, model = tiny(folders), nf4.quantize_linears(tiny(folders))
    assert bytes_per_weight(nf4.quantize_linears(torch.nn.Sequential(torch.nn.Linear(1024, 1024)))) <= 0.53
    a, b = logits_at_prompt_end(plain, 0), logits_at_prompt_end(model, 0)
    assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.9
    lora.add_lora(model, rank=4)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name in lora.lora_state(model) if name not in model.unused}
    assert len(trained) == 2 * len([m for m in INFO["adapted_modules"] if f"{m}.weight" not in model.unused])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    images = torch.cat([pixels(BASE_INFO, e) for e in BASE_INFO["examples"]])
    losses = []
    for _ in range(15):
        _, loss = model(BASE["train/input_ids"], images, BASE["train/labels"])
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 2


def test_quantized_run(setup, tmp_path):
    """QLoRA through the whole script; the adapter is for the base checkpoint as any other."""
    _, options = setup
    metrics = run_here(options("run", "--quantize_base", "nf4", "--max_steps", "30"))
    assert metrics["loss"] < 9.5  # from 10.4
    lora.merge(tmp_path / "run", tmp_path / "merged")
    assert policy.load_policy(tmp_path / "merged").norm_stats


def test_a_run_as_base_is_refused(setup, tmp_path):
    """Its adapter would get lost."""
    _, options = setup
    run_here(options("run", "--max_steps", "1"))
    again = [*options("next"), "--base_checkpoint", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="is a LoRA run; merge it first"):
        run_here(again)
    full = [option for option in again if option not in ("--lora_rank", "4")]
    with pytest.raises(ValueError, match="is a LoRA run; merge it first"):
        train.train(configure(train.Config, full))
