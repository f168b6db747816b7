"""cpu_decode.py against model.py, whose blocks are checked against float64 elsewhere; and where it must not be used."""
import shutil
import subprocess
import sys

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import ROOT
from decoding import build, one_by_one, tokens
from test_cpu import near
from test_matvec import needs_a_compiler

import cpu_decode
import matvec
import model as core
from model import GPT, KVCache, generate

pytestmark = needs_a_compiler

SETTINGS = {
    "default": {},
    "GPT-2": dict(pos="learned", norm="layer", mlp="gelu", bias=True, qk_norm=False),
    "gelu_tanh": dict(mlp="gelu_tanh"),
    "Llama 3.1": dict(mlp="swiglu", n_kv_head=2, qk_norm=False, rope_factor=8.0, rope_original=16),
    "Qwen2": dict(mlp="swiglu", qkv_bias=True, qk_norm=False, head_dim=8),
    "GPT-NeoX": dict(parallel=True, rotary_dim=8, norm="layer", bias=True, mlp="gelu", qk_norm=False, tie=False),
    "Phi-2": dict(parallel=True, rotary_dim=8, norm="layer", bias=True, head_bias=True, tie=False, qk_norm=False),
    "Gemma 2": dict(mlp="geglu", norm_place="both", attn_softcap=3.0, softcap=5.0, embed_scale=8.0, attn_scale=0.4,
                    sliding_window=9, window_pattern="SL", qk_norm=False),
    "Gemma 3": dict(mlp="geglu", norm_place="both", embed_scale=8.0, sliding_window=9, window_pattern="SSL",
                    window_theta=100.0, n_kv_head=1, head_dim=32, rope_factor=8.0, rope_scaling="linear"),
    "OLMo-2": dict(norm_place="after", qk_norm_width=True, mlp="swiglu", n_kv_head=2),
    "SmolLM3": dict(rope_pattern="RRN", mlp="swiglu", qk_norm=False),
    "StableLM": dict(norm="layer", norm_bias=True, rotary_dim=4, mlp="swiglu", qk_norm=False),
    "Granite": dict(residual_scale=0.3, logit_scale=0.2, attn_scale=0.1, embed_scale=3.0, out_bias=True),
    "yarn": dict(rope_scaling="yarn", rope_factor=4.0, rope_original=16, rope_low_freq=1.0, rope_high_freq=32.0),
    "no positions": dict(pos="none"),
    "large scores": dict(attn_scale=8.0),
}
NOT_KNOWN = {
    "alibi": dict(alibi=True), "sinks": dict(sliding_window=8, sinks=2), "diff": dict(diff_attn=True),
    "experts": dict(n_expert=4, ffn_dim=32), "mod": dict(mod="topk", mod_every=2), "yoco": dict(yoco=True, n_layer=4),
    "value residual": dict(value_residual=True), "value embeddings": dict(value_embeds=True),
    "sink logits": dict(sink_logits=True), "clipped SwiGLU": dict(mlp="swiglu_clip"),
    "widths": dict(n_embd=60, head_dim=12),
}


@pytest.fixture(autouse=True)
def on_cpu():
    with mx.stream(mx.cpu):
        yield


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name, rows, monkeypatch):
    """Every setting that it knows, in a cache that grows at positions 16, 32 and 48, which model.py does."""
    monkeypatch.setattr(KVCache, "STEP", 16)
    model, idx = build(SETTINGS[name]), tokens(rows, 60)
    found, used = one_by_one(model, idx, 5, cpu_decode)
    grows = 3 if model.config.window_pattern != "S" or not model.config.sliding_window else 0
    assert used == 55 - grows
    assert near(found, model(idx)[:, 5:], 2e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_packed(bits):
    model, idx = build(SETTINGS["Qwen2"] | dict(ffn_dim=96), bits), tokens(2, 40)
    found, used = one_by_one(model, idx, 1, cpu_decode)
    assert used == 39 and near(found, model(idx)[:, 1:], 2e-5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_weights_of_16_bits(dtype):
    model, idx = build(SETTINGS["Llama 3.1"], dtype=dtype), tokens(1, 30)
    model.compute_dtype = mx.float32
    found, used = one_by_one(model, idx, 3, cpu_decode)
    assert used == 27 and near(found, model(idx)[:, 3:], 2e-5)


@pytest.mark.parametrize("name", NOT_KNOWN)
def test_settings_that_it_does_not_know(name):
    model, idx = build(NOT_KNOWN[name]), tokens(1, 20)
    found, used = one_by_one(model, idx, 5, cpu_decode)
    assert used == 0 and np.isfinite(found).all()


def changed(change: str) -> GPT:
    model = build({})
    attn = model.blocks[1].attn
    if change == "training":
        model.train()
    if change == "bfloat16":
        model.set_dtype(mx.bfloat16)
    if change == "another class of layer":
        attn.q = type("Silent", (core.Linear,), {"__call__": lambda self, x: 0 * x})(64, 64)
    if change == "another class of attention":
        attn.__class__ = type("Silent", (core.Attention,), {"__call__": lambda self, x, *rest: 0 * x})
    if change == "columns in another order":
        nn.quantize(model, group_size=32, bits=4)
        attn.q.order = mx.arange(64)
    if change == "mxfp4":
        nn.quantize(model, group_size=32, bits=4, mode="mxfp4", class_predicate=lambda _, m: m is attn.q)
    return model


@pytest.mark.parametrize("change", ["training", "bfloat16", "another class of layer", "another class of attention",
                                    "columns in another order", "mxfp4"])
def test_models_that_it_does_not_know(change):
    assert one_by_one(changed(change), tokens(1, 12), 5, cpu_decode)[1] == 0


def test_where_it_is_not_used(monkeypatch):
    """A tap, a packed cache, a large batch, several tokens at a time."""
    monkeypatch.setattr(cpu_decode, "Plan", None)  # a call would fail
    model, idx = build({"head_dim": 32}), tokens(2, 12)
    for cache, tap, batch in ((model.make_cache(), lambda site, layer, x: x, idx),
                              (model.make_cache(8), core.no_tap, idx),
                              (model.make_cache(), core.no_tap, tokens(cpu_decode.ROWS + 1, 12))):
        model(batch[:, :5], cache=cache)
        mx.eval(model(batch[:, 5:6], cache=cache, tap=tap))
    cache = model.make_cache()
    model(idx[:, :5], cache=cache), mx.eval(model(idx[:, 5:7], cache=cache))


def test_other_ways_between():
    """Positions that model.py computes between those of cpu_decode.py: with a tap, and several at a time."""
    model, idx, cache, logits = build(SETTINGS["Gemma 3"]), tokens(1, 30), None, []
    cache = model.make_cache()
    for start, end, tap in ((0, 4, core.no_tap), (4, 5, core.no_tap), (5, 6, lambda site, layer, x: x),
                            (6, 7, core.no_tap), (7, 20, core.no_tap),
                            *((i, i + 1, core.no_tap) for i in range(20, 30))):
        logits.append(model(idx[:, start:end], cache=cache, tap=tap))
    assert near(mx.concatenate(logits, axis=1), model(idx), 2e-5)


def test_long_contexts_and_threads(monkeypatch):
    """Many keys, by several threads; cosines of large positions."""
    model = build(SETTINGS["Qwen2"] | dict(block_size=2048, n_layer=2))
    idx = tokens(1, 1500)
    monkeypatch.setattr(matvec, "threads", lambda: 4)
    found, used = one_by_one(model, idx, 1480, cpu_decode)
    assert used == 20 and near(found, model(idx)[:, 1480:], 2e-5)


def test_generate(monkeypatch):
    """The same tokens as without it, also where the context is full and is read again."""
    model = build({"block_size": 24})
    found = [*generate(model, [1, 2, 3], 60, temperature=0)]
    monkeypatch.setattr(core, "cpu_decode", None)
    assert found == [*generate(model, [1, 2, 3], 60, temperature=0)]


def test_a_gradient_is_refused():
    """It computes no gradient, and says so: a gradient of 0 would be wrong."""
    model, idx, cache = build({}), tokens(1, 6), None
    cache = model.make_cache()
    mx.eval(model(idx[:, :5], cache=cache))
    with pytest.raises(NotImplementedError, match="no gradient"):
        mx.grad(lambda weight: (model.embed.update({"weight": weight}), model(idx[:, 5:], cache=cache).sum())[1])(
            model.embed.weight)


def test_no_memory(monkeypatch):
    """Where the C code fails once, model.py computes that position."""
    library, calls = matvec.library(), []

    class Failing:
        product = library.product

        def decode(*given):
            calls.append(1)
            return len(calls) == 3 or library.decode(*given)

    model, idx = build({}), tokens(1, 20)
    monkeypatch.setattr(matvec, "library", lambda: Failing)
    found, used = one_by_one(model, idx, 5, cpu_decode)
    assert used == 14 and near(found, model(idx)[:, 5:], 2e-5)


WITHOUT = """
import sys
import blas
import mlx.core as mx
from model import GPT, GPTConfig, generate
model = GPT(GPTConfig(n_layer=2, vocab_size=96, block_size=64))
model.eval()
print(*generate(model, [1, 2, 3], 40, temperature=0), "cpu_decode" in sys.modules, "matvec" in sys.modules)
"""


def test_deleting_it_costs_speed_and_nothing_else(tmp_path):
    """The other files run without cpu_decode.c, without cpu_decode.py, without matvec.c, and without matvec.py too."""
    for path in (*ROOT.glob("*.py"), *ROOT.glob("*.c")):
        shutil.copy(path, tmp_path)
    printed = []
    for deleted in ("", "cpu_decode.c", "cpu_decode.py", "matvec.c", "matvec.py"):
        if deleted:
            (tmp_path / deleted).unlink()
        done = subprocess.run([sys.executable, "-c", WITHOUT], cwd=tmp_path, capture_output=True, text=True, check=True)
        printed.append(done.stdout.split())
    there = [line[-2:] for line in printed]
    assert there == [["True", "True"]] * 2 + [["False", "True"]] * 2 + [["False", "False"]]
    assert len(printed[0]) == 42 and all(line[:-2] == printed[0][:-2] for line in printed)
