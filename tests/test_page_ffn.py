"""The variants of the page that lie in matrices and MLPs give model.py's numbers: LASER's factors, GPTQ's act-order,
mixtures of experts, Mixture of Depths."""
import zlib
from functools import partial

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import run
from mlx.utils import tree_flatten, tree_map_with_path
from test_gptq_reader import folder_of
from test_page_model import IDS, in_page, log_p, refused, save, small

import attention_maps
import patching
import tuned_lens
from model import GPT, PackedExperts, generate, load_checkpoint, save_checkpoint
from quantized import Factored, dense_weight, replace_module


def shaken(model: GPT) -> GPT:
    """The model with parameters of which none is near 0, and no two are equal."""
    def noise(path, p):
        return p + 0.1 * mx.random.normal(p.shape, key=mx.random.key(zlib.crc32(path.encode())))

    model.update(tree_map_with_path(noise, model.parameters()))
    return model


def factored() -> GPT:
    """Low-rank layers beside dense ones and beside one another, with a bias, and with weights of 8 bits."""
    model = small(mlp="swiglu", bias=True, tie=False)
    for path, rank in (("blocks.0.attn.v", 20), ("blocks.1.mlp.up", 32), ("blocks.2.mlp.down", 9), ("head", 24),
                       ("blocks.1.mlp.gate", 32)):
        replace_module(model, path, Factored(dict(model.named_modules())[path], rank))
    nn.quantize(shaken(model), 32, 8, class_predicate=lambda path, _: path.startswith("blocks.1.mlp.up."))
    return model


def ordered() -> GPT:
    """Packed matrices, of which most have their columns in another order; a layer's q, k and v in the same one."""
    model = shaken(small(mlp="swiglu", bias=True, tie=False))
    nn.quantize(model, 32, 4, class_predicate=lambda path, module: isinstance(module, nn.Linear))
    for path, module in model.named_modules():
        if isinstance(module, nn.QuantizedLinear) and not path.endswith("mlp.gate"):
            width = module.weight.shape[1] * 8
            module.order = mx.array(np.random.default_rng(len(path)).permutation(width).astype(np.int32))
    return model


def experts(bits: int = 0, order: bool = False, **settings) -> GPT:
    """A mixture of experts, whose router's biases differ; packed, with a column order for each expert."""
    model = shaken(small(n_expert=4, ffn_dim=64, **settings))
    for block in model.blocks:
        if "balance" in block.mlp:
            block.mlp.balance = mx.array([0.3, -0.2, 0.0, 0.1])
    if bits:
        nn.quantize(model, 32, bits, class_predicate=lambda path, module: path.split(".")[-1] in ("gate", "up", "down"))
    if order:
        for path, module in model.named_modules():
            if isinstance(module, PackedExperts):
                module.order = mx.array(np.argsort(np.random.default_rng(len(path)).random((4, 64))).astype(np.int32))
    return model


def depths(**settings) -> GPT:
    """Mixture of Depths with routers that tell tokens apart. Each layer of topk skips 5 of the first 9 IDS."""
    model = shaken(small(mod_capacity=0.4, **settings)).eval()

    def tap(site, layer, x):
        block = model.blocks[min(layer, 2)]
        if site == "resid" and layer < 3 and "depth_router" in block:
            block.depth_router.weight = 0.3 * mx.random.normal((1, 64), key=mx.random.key(layer))
        if site == "resid" and layer < 3 and "predictor" in block:
            block.predictor.weight = mx.random.normal((1, 64), key=mx.random.key(10 + layer))
            logits = np.sort(np.array(block.predictor(x)[0, :9, 0]))
            block.threshold = mx.array(logits[4:6]).mean(keepdims=True)
        return x

    model(mx.array([IDS]), tap=tap)
    return model


VARIANTS = {
    "factors": factored, "order": ordered,
    "experts": experts, "experts-bias": partial(experts, expert_balance="bias", expert_top_k=3, bias=True, mlp="gelu"),
    "experts-one": partial(experts, expert_top_k=1, n_shared_expert=2, mlp="swiglu", norm_place="both"),
    "experts-packed": partial(experts, bits=4, n_shared_expert=1, expert_balance="none", mlp="swiglu", parallel=True),
    "gpt-oss": partial(experts, bits=4, order=True, expert_top_k=2, expert_balance="none", mlp="swiglu_clip", bias=True,
                       router_bias=True, tie=False, n_kv_head=1, qk_norm=False, sliding_window=9, window_pattern="SL",
                       rope_scaling="yarn_untruncated", rope_factor=4.0, rope_original=64, rope_low_freq=1.0,
                       rope_high_freq=32.0, rope_theta=100.0),
    "mod": partial(depths, mod="topk", mlp="swiglu"),
    "mod-every": partial(depths, mod="topk", mod_every=1, alibi=True, sliding_window=5, n_kv_head=1, attn_softcap=3.0,
                         parallel=True),
    "mod-experts": partial(depths, mod="topk", mod_every=3, n_expert=3, ffn_dim=64, norm_place="after"),
    "mod-soft": partial(depths, mod="soft", mod_every=1, residual_scale=0.7),
}


@pytest.fixture(scope="module")
def checkpoint(server):
    """A function of a variant's name: a checkpoint, and its model in float32."""
    made = {}

    def of(name: str) -> tuple[str, GPT]:
        if name not in made:
            model = VARIANTS[name]().eval()
            made[name] = save(server, f"ffn-{name}.safetensors", model), model
            model.set_dtype(mx.float32)
        return made[name]

    return of


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_text(name, opened, checkpoint):
    check_text(opened, *checkpoint(name))


def check_text(opened, path: str, model: GPT):
    """Logits of a prompt, and the text that follows, with a cache, beyond the context."""
    logits, text = in_page(opened, path, """
        const text = [];
        for await (const { token } of model.generate(ids, { max_new_tokens: 30, temperature: 0 })) text.push(token);
        return [Array.from(await model.logits(ids)), text];""", IDS, parameters="ids")
    expected = np.array(model(mx.array([IDS]))[0])
    assert np.abs(np.array(logits).reshape(expected.shape) - expected).max() < 1e-5 * np.abs(expected).max()
    assert text == list(generate(model, IDS, 30, temperature=0, n_vocab=257))


@pytest.mark.parametrize("name", VARIANTS)
def test_inside(name, opened, checkpoint):
    check_inside(opened, *checkpoint(name))


def check_inside(opened, path: str, model: GPT):
    """The panels: the lens, attention maps, ablation (zero and mean) and patching of each site."""
    ids, other = IDS[:9], [*IDS[:4], 77, *IDS[5:9]]
    clean, corrupt = (np.array(patching.log_p(model(mx.array([each]))[0, -1]))[:257] for each in (ids, other))
    target = int(np.abs(clean - corrupt).argmax())  # effects are shares of this difference
    clean, corrupt = clean[target], corrupt[target]
    rows, maps, ablated, swapped = in_page(opened, path, """
        const { ablate, attention, lens, swap } = await import("/inside.js"), found = [[], []];
        const all = async (part, steps) => found[part].push((await last(steps)).values);
        for (const how of ["zero", "mean"]) await all(0, ablate(model, ids, target, how));
        for (const site of ["resid", "attn", "mlp"]) await all(1, swap(model, ids, other, target, site));
        return [await lens(model, ids), (await attention(model, ids)).map((map) => Array.from(map)), ...found];
        """, ids, other, target, parameters="ids, other, target")
    logits = np.array(tuned_lens.logit_lens(model, mx.array([ids]), {}))[:, 0, :, :257]
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    found = [[cell["p"] for cell in row] for row in rows]
    np.testing.assert_allclose(found, -np.sort(-p)[..., :5], rtol=1e-3, atol=1e-6)
    exact = attention_maps.attention_maps(model, mx.array(ids))
    exact = [np.nan_to_num(each.get("map", each.get("difference"))) for each in exact]
    for found, expected in zip(maps, exact, strict=True):
        np.testing.assert_allclose(np.array(found).reshape(expected.shape), expected, atol=1e-5)
    sites = [("attn", None), ("mlp", None), ("block", None), *(("head", head) for head in range(len(exact[0])))]
    for found, how in zip(ablated, ("zero", "mean"), strict=True):
        expected = [[log_p(patching.ablate(model, mx.array([ids]), site, layer, how, head)[0, -1], target) - clean
                     for site, head in sites] for layer in range(len(exact))]
        np.testing.assert_allclose(found, expected, atol=2e-4)
    for found, site in zip(swapped, ("resid", "attn", "mlp"), strict=True):
        logits = patching.swap(model, mx.array(ids), mx.array(other), site)
        effects = (np.array(patching.log_p(logits)[..., target]) - corrupt) / (clean - corrupt)
        np.testing.assert_allclose(found, effects, atol=2e-3)


@pytest.mark.parametrize("name", ["mod", "mod-every"])
def test_habits_of_heads_that_skip_tokens(name, opened, checkpoint):
    """As attention_maps.py counts them: among the tokens that the layer works on."""
    path, model = checkpoint(name)
    ids = [*IDS[:9]] * 3
    told = in_page(opened, path, """
        const { attention } = await import("/inside.js"), { habits, rowsOf } = await import("/habits.js");
        return (await attention(model, ids)).map((map, layer) =>
          Object.values(habits(map, ids.length, rowsOf(ids, model.windowOf(layer), map))));""", ids, parameters="ids")
    states = attention_maps.record(model, mx.array(ids))
    for layer, named in enumerate(attention_maps.attention_maps(model, mx.array(ids), states)):
        visible = attention_maps.visible_keys(model, states, layer)
        expected = [*attention_maps.habits(named["map"][0], ids, visible).values()]
        numbers = [[each["share"], each["chance"], each["rows"]] for each in told[layer]]
        np.testing.assert_allclose(np.array(numbers, np.float64), expected, atol=1e-4)


@pytest.mark.parametrize("script", ["laser.py", "gptq_reader.py"])
def test_files_of_our_scripts(script, opened, server, tmp_path):
    """A matrix that laser.py stores as two factors, and GPTQ's act-order as its reader stores it."""
    path = server.folder / f"{script}.safetensors"
    if script == "laser.py":
        save_checkpoint(str(tmp_path / "dense.safetensors"), shaken(small(bias=True)), {})
        run(script, tmp_path / "dense.safetensors", "--matrix=mlp.up", "--layer=1", "--rho=0.2", "--factored=True",
            f"--out={path}")
    else:
        run(script, folder_of(tmp_path, act_order=True)[0], path)
    model, _ = load_checkpoint(str(path))
    model.set_dtype(mx.float32)
    ids = [i % 64 for i in IDS]
    logits, n = in_page(opened, path.name, "return [Array.from(await model.logits(ids)), model.n_parameters];", ids,
                        parameters="ids")
    expected = np.array(model(mx.array([ids]))[0])
    assert np.abs(np.array(logits).reshape(expected.shape) - expected).max() < 1e-5 * np.abs(expected).max()
    if script == "laser.py":
        assert n == sum(p.size for _, p in tree_flatten(model.parameters()))


def test_training(opened, checkpoint):
    """The page trains on from unpacked matrices with their columns in place; it refuses other variants by their names.
    """
    train = """const { Trainer } = await import("/train.js"), text = "a text of one hundred letters ".repeat(9);
        const trainer = await Trainer.create(gpu, { model, text, batch_size: 1 }), found = {};
        for (const [name, { at, size }] of trainer.places) {
          if (!/up.weight$/.test(name)) continue;
          found[name] = Array.from(new Float32Array(await gpu.read(trainer.values, 4 * size, 4 * at)));
        }
        trainer.destroy();
        return found;"""
    path, model = checkpoint("order")
    found = in_page(opened, path, train)
    for layer in range(3):
        expected = np.array(dense_weight(model.blocks[layer].mlp.up)).reshape(-1)
        np.testing.assert_allclose(found[f"blocks.{layer}.mlp.up.weight"], expected, atol=1e-6)
    train = f"return (async () => {{ {train} }})().catch((error) => error.message);"
    for name, says in (("factors", "blocks.0.attn.v is stored as two factors"),
                       ("experts", "This model has n_expert, with which this page cannot train"),
                       ("mod-soft", "This model has mod, with which this page cannot train")):
        assert says in in_page(opened, checkpoint(name)[0], train)


def test_an_order_that_is_damaged(opened, server):
    model = ordered()
    model.blocks[1].mlp.up.order = mx.full((64,), 64, dtype=mx.int32)
    path = save(server, "bad-order.safetensors", model)
    assert "blocks.1.mlp.up.order names columns that are not there" in refused(opened, path)
