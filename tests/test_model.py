"""The model against the official code: goldens/README.md says how its numbers were made."""

import json

import pytest
import torch
from common import MODELS, golden, pixels, shared

from model import (
    VISION_ENCODERS,
    LlamaConfig,
    OpenVLA,
    OpenVLAConfig,
    ViTConfig,
    attention,
    attention_weights,
    is_unused,
    rope_tables,
    split_into_shards,
)


def examples(name):
    tensors, info = golden(name)
    for i, example in enumerate(info["examples"]):
        t = {k.removeprefix(f"ex{i}/"): v for k, v in tensors.items() if k.startswith(f"ex{i}/")}
        yield t, pixels(info, example), tensors["logit_cols"]


@pytest.mark.parametrize("name", MODELS)
def test_every_stage_equals_the_official_one(models, name):
    model = models[name]
    for t, pixel_values, cols in examples(name):
        towers = [model.vision_backbone.featurizer, model.vision_backbone.fused_featurizer]
        features = []
        for vit, x, key in zip(towers, pixel_values.split(3, dim=1), ("featurizer", "fused_featurizer"), strict=False):
            features.append(vit(x)[0])
            if f"{key}_out" in t:
                torch.testing.assert_close(features[-1], t[f"{key}_out"], atol=1e-4, rtol=0)
            else:
                torch.testing.assert_close(features[-1][::8], t[f"{key}_out_s8"], atol=1e-4, rtol=0)
        fused = model.vision_backbone(pixel_values)
        assert torch.equal(fused[0], torch.cat(features, dim=-1))
        if "projector_out" in t:
            torch.testing.assert_close(model.projector(fused)[0], t["projector_out"], atol=1e-4, rtol=0)
        ids = t["teacher_forced_input_ids"][None]
        logits, loss = model(ids, pixel_values)
        assert loss is None and logits.shape == (1, 256 + ids.shape[1], 32064)
        rows = logits[0, -8:]
        torch.testing.assert_close(rows[:, cols], t["logits_teacher_forced_cols"], atol=2e-4, rtol=0)
        torch.testing.assert_close(rows.logsumexp(-1), t["logits_teacher_forced_logsumexp"], atol=2e-4, rtol=0)
        if "logits_prompt_last_full" in t:
            prompt, _ = model(t["input_ids_with_29871"][None], pixel_values)
            torch.testing.assert_close(prompt[0, -1], t["logits_prompt_last_full"], atol=2e-4, rtol=0)


def test_hidden_states_layer_by_layer(models):
    model, (t, pixel_values, _) = models["tiny-openvla"], next(examples("tiny-openvla"))
    seen = []
    layers = model.language_model.model.layers
    hooks = [layer.register_forward_hook(lambda _, x, y: seen.extend([x[0], y])) for layer in layers]
    hidden = model.language_model(model.embed(t["input_ids_with_29871"][None], pixel_values))
    for hook in hooks:
        hook.remove()
    states = torch.cat([seen[0], seen[1], seen[3], hidden])  # before layer 0, after 0 and 1, after the final norm
    torch.testing.assert_close(states, t["hidden_states"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_and_cache(models, name):
    for t, pixel_values, cols in examples(name):
        tokens, logits = models[name].generate(t["input_ids_with_29871"][None], pixel_values, 7)
        assert tokens[0].tolist() == t["predicted_token_ids"].tolist()
        torch.testing.assert_close(logits[0][:, cols], t["logits_kv_cache_cols"][:7], atol=2e-4, rtol=0)
        full, _ = models[name](t["teacher_forced_input_ids"][None], pixel_values)
        torch.testing.assert_close(logits[0], full[0, -8:-1], atol=1e-4, rtol=0)  # cache = no cache


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_all_gradients(folders, name):
    tensors, info = golden(name)
    model = OpenVLA.from_pretrained(folders[name], torch.float32).train()
    pixel_values = torch.cat([pixels(info, example) for example in info["examples"]])
    logits, loss = model(tensors["train/input_ids"], pixel_values, tensors["train/labels"])
    loss.backward()
    train = info["train"]
    assert abs(loss.item() - train["loss"]) < 1e-5
    rows = tensors["train/logits_at_label_positions_cols"].flatten(0, 1)
    torch.testing.assert_close(logits[:, tensors["logit_cols"]], rows, atol=2e-4, rtol=0)
    params = dict(model.named_parameters())
    for key, norm in train["grad_norms"].items():
        if norm is None:
            assert is_unused(key, model.cfg) and key not in params
        else:
            assert params[key].grad.norm().item() == pytest.approx(norm, rel=1e-3), key
    for key in (k for k in tensors if k.startswith("grad/")):
        name, every = key.removeprefix("grad/"), 8 if key.endswith("_s8") else 1
        grad = params[name.removesuffix("_s8")].grad
        grad = grad[:, ::8] if every == 8 else grad
        torch.testing.assert_close(grad, tensors[key], atol=5e-4, rtol=0)


@pytest.mark.parametrize(("name", "fused"), [("openvla-7b", True), ("openvla-v01-7b", False)])
def test_names_and_shapes_of_the_released_models(name, fused):
    official = json.loads(shared("facts/official_keys_openvla7b.json").read_text())[name]
    keys = {k: tuple(shape) for k, shape in official["parameters"].items()}
    towers = list(VISION_ENCODERS.values()) if fused else list(VISION_ENCODERS.values())[1:]
    with torch.device("meta"):
        model = OpenVLA(OpenVLAConfig(towers))
    ours = {k: tuple(p.shape) for k, p in model.state_dict().items()}
    unused = {k for k in keys if is_unused(k, model.cfg)}
    assert ours == {k: v for k, v in keys.items() if k not in unused}
    assert len(keys) == official["num_tensors"]
    kinds = {k.split("featurizer.")[1].split(".")[0] for k in unused}
    assert kinds == {"blocks", "norm", "attn_pool"}


def test_batch_equals_singles(models):
    """Four prompts of different length in one batch give what each gives alone."""
    model, (tensors, info) = models["tiny-openvla"], golden("tiny-openvla")
    prompts = [tensors[f"ex{i}/input_ids_with_29871"] for i in (0, 1, 2)] + [tensors["ex2/input_ids_with_29871"][:9]]
    images = torch.cat([pixels(info, info["examples"][i]) for i in (0, 1, 2, 0)])
    lengths = torch.tensor([len(p) for p in prompts])
    batch = torch.full((4, int(lengths.max())), 32000)
    for row, prompt in zip(batch, prompts, strict=True):
        row[: len(prompt)] = prompt
    tokens, logits = model.generate(batch, images, 7, lengths)
    for i, prompt in enumerate(prompts):
        alone, alone_logits = model.generate(prompt[None], images[i : i + 1], 7)
        assert tokens[i].tolist() == alone[0].tolist()
        torch.testing.assert_close(logits[i], alone_logits[0], atol=1e-4, rtol=0)
    short = int(lengths[3])
    padded, _ = model(batch[3:], images[3:])
    single, _ = model(prompts[3][None], images[3:])
    torch.testing.assert_close(padded[:, : 256 + short], single, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16(folders, models, name):
    """Tokens equal those in float32 (as officially), logits within the precision of bfloat16."""
    model = OpenVLA.from_pretrained(folders[name], torch.bfloat16)
    for t, pixel_values, _ in examples(name):
        tokens, logits = model.generate(t["input_ids_with_29871"][None], pixel_values.bfloat16(), 7)
        assert tokens[0].tolist() == t["predicted_token_ids"].tolist()
        exact = models[name].generate(t["input_ids_with_29871"][None], pixel_values, 7)[1]
        assert (logits.float() - exact).norm() < 0.05 * exact.norm()  # v01 is 8 channels wide: 0.034


def test_mask_is_obeyed(models):
    """An explicit mask replaces the causal one: all-true lets the future in, a triangle changes nothing."""
    model = models["tiny-openvla"].language_model
    x = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(0))
    causal = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    torch.testing.assert_close(model(x, mask=causal), model(x), atol=1e-5, rtol=0)
    assert (model(x, mask=torch.ones_like(causal))[:, 0] - model(x)[:, 0]).abs().max() > 1e-2


def test_grouped_query_attention():
    """Two key heads for four query heads equal four key heads of which each pair is the same."""
    torch.manual_seed(0)
    small = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    vision = [ViTConfig(16, 2, 2, 14, 28, 32)]
    grouped = OpenVLA(OpenVLAConfig(vision, LlamaConfig(**small, num_key_value_heads=2))).init_weights()
    full = OpenVLA(OpenVLAConfig(vision, LlamaConfig(**small)))
    state = grouped.state_dict()
    for key in state:
        if "k_proj" in key or "v_proj" in key:
            state[key] = state[key].view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32)
    full.load_state_dict(state)
    ids, image = torch.randint(3, 60, (1, 5)), torch.randn(1, 3, 28, 28)
    torch.testing.assert_close(grouped(ids, image)[0], full(ids, image)[0], atol=1e-5, rtol=0)
    assert torch.equal(grouped.generate(ids, image, 3)[0], full.generate(ids, image, 3)[0])


def test_rope_tables_broadcast():
    positions = torch.tensor([[0, 3, 5]])
    cos, sin = rope_tables(positions, 8, 10000.0, torch.float32)
    assert cos.shape == sin.shape == (1, 1, 3, 8)
    assert torch.equal(cos[0, 0], rope_tables(positions[0], 8, 10000.0, torch.float32)[0][0])


def test_prompt_longer_than_the_context(models):
    with pytest.raises(ValueError, match="of 2048 at most"):
        models["tiny-openvla"].generate(torch.ones(1, 1800, dtype=torch.long), torch.zeros(1, 6, 224, 224), 7)


@pytest.mark.parametrize("kind", ["all", "causal", "mask"])
def test_attention_written_out_is_the_fused_call(kind):
    """softmax(q k^T / sqrt(C)) v, as it is to be read, and as the layers compute it."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 8, generator=generator) for _ in range(3))
    mask = torch.rand(2, 1, 5, 5, generator=generator) > 0.3
    mask |= torch.eye(5, dtype=torch.bool)  # each query sees something
    options = {"all": {}, "causal": {"is_causal": True}, "mask": {"mask": mask}}[kind]
    fused = {"attn_mask": options.get("mask"), "is_causal": options.get("is_causal", False)}
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, **fused)
    torch.testing.assert_close(attention(q, k, v, **options), want, atol=1e-6, rtol=1e-5)
    rows = attention_weights(q, k, **options).sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows))


def test_attention_maps_are_those_of_the_forward_pass(models):
    """The values, mixed with a layer's map, are what the layer itself computes."""
    llama = models["tiny-openvla"].language_model
    x = torch.randn(2, 7, llama.cfg.hidden_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        maps = list(llama.attention_maps(x))
        assert len(maps) == llama.cfg.num_hidden_layers and maps[0].shape[-2:] == (7, 7)
        layer = llama.model.layers[0]
        h = layer.input_layernorm(x)
        cos, sin = llama.rope(torch.arange(7), x.dtype)
        v = layer.self_attn.share_heads(layer.self_attn.project(h, cos, sin)[2])
        mine = layer.self_attn.o_proj((maps[0] @ v).transpose(1, 2).reshape(x.shape))
        torch.testing.assert_close(mine, layer.self_attn(h, cos, sin, None, None, 0), atol=1e-5, rtol=1e-4)


def test_shards_hold_what_fits():
    sizes = {"a": 3, "b": 3, "c": 5, "d": 1, "e": 9}
    assert split_into_shards(sizes, 6) == [["a", "b"], ["c", "d"], ["e"]]  # one that is too large stands alone
    assert split_into_shards({}, 6) == []
