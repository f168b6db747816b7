"""gpu_decode.cu, compiled for the processor by tests/cuda_on_cpu.h, against model.py; and where it must not be used.
On a GPU, python runs/gpu_decode_check.py compares more, with the code that runs there."""
import shutil
import subprocess
import sys

import blas  # noqa: F401  (before mlx)
import decoding
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import ROOT
from cuda_kernels import compiles, on_cpu
from decoding import one_by_one, tokens
from mlx.utils import tree_flatten

import gpu_decode
import gpu_kernels
import model as core
from batching import generate_many
from model import GPT

SETTINGS = {
    "default": {},
    "GPT-2": dict(pos="learned", norm="layer", mlp="gelu", bias=True, qk_norm=False),
    "gelu_tanh": dict(mlp="gelu_tanh", rotary_dim=8),
    "Llama 3.1": dict(mlp="swiglu", n_kv_head=1, qk_norm=False, rope_factor=8.0, rope_original=16),
    "SmolLM3": dict(rope_pattern="RN", mlp="swiglu", qkv_bias=True, qk_norm=False, head_dim=64),
    "Granite": dict(residual_scale=0.3, logit_scale=0.2, attn_scale=0.1, embed_scale=3.0, out_bias=True),
    "own head": dict(tie=False, head_bias=True, vocab_size=99),
    "soft caps": dict(mlp="geglu", attn_softcap=3.0, softcap=5.0, head_dim=96),
}


@pytest.fixture(autouse=True)
def as_if_on_a_gpu(monkeypatch):
    on_cpu(monkeypatch)
    monkeypatch.setattr(gpu_decode, "on_gpu", lambda: True)
    monkeypatch.setattr(core, "cpu_decode", None)


def build(settings: dict, bits: int = 0, dtype: mx.Dtype = mx.float32) -> GPT:
    return decoding.build(dict(n_layer=2, n_head=2, block_size=640) | settings, bits, dtype)


CASES = [(name, mx.float32, 0, 1, 20) for name in SETTINGS] + [
    ("default", mx.bfloat16, 0, 16, 5), ("GPT-2", mx.bfloat16, 0, 3, 300), ("Llama 3.1", mx.bfloat16, 4, 2, 40),
    ("Granite", mx.bfloat16, 8, 9, 30), ("default", mx.float32, 4, 4, 300), ("GPT-2", mx.float32, 4, 4, 3),
    ("own head", mx.bfloat16, 0, 2, 20)]


@compiles
@pytest.mark.parametrize("name, dtype, bits, rows, prompt", CASES, ids=str)
def test_as_model(name, dtype, bits, rows, prompt):
    """Architectures, formats, batches; few keys and more than the warps take at a time."""
    model = build(SETTINGS[name], bits, dtype)
    idx = tokens(rows, prompt + 4)
    plain, none = one_by_one(model, idx, prompt, gpu_decode, fast=False)
    found, used = one_by_one(model, idx, prompt, gpu_decode)
    assert used == 4 and none == 0
    if dtype == mx.float32:
        assert np.abs(found - plain).max() < 2e-5 * np.abs(plain).max()
    else:  # as near to what the weights give in float32
        model.set_dtype(mx.float32)
        exact, _ = one_by_one(model, idx, prompt, gpu_decode, fast=False)
        assert np.abs(found - exact).max() < 1.3 * np.abs(plain - exact).max() < 0.1 * np.abs(exact).max()


# ---- where model.py must compute ------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [
    dict(alibi=True), dict(sliding_window=8), dict(diff_attn=True), dict(n_expert=4, ffn_dim=32), dict(mod="topk"),
    dict(yoco=True), dict(value_residual=True), dict(value_embeds=True), dict(sink_logits=True), dict(parallel=True),
    dict(norm_place="both"), dict(qk_norm_width=True), dict(mlp="swiglu_clip"), dict(head_dim=24)], ids=str)
def test_not_known(settings):
    """Settings that it does not know, and logits that do not change."""
    model, idx = build(settings), tokens(1, 12)
    assert one_by_one(model, idx, 8, gpu_decode)[1] == 0


def test_blocks_that_differ():
    """Matrices of one kind in several formats, weights in another dtype, a layer of another class, training."""
    mixed = build({})
    nn.quantize(mixed.blocks[1], 32, 4)
    wide = build({}, dtype=mx.bfloat16)
    wide.blocks[0].mlp.up.weight = wide.blocks[0].mlp.up.weight.astype(mx.float32)
    other = build({})
    other.blocks[1].attn.q = type("Other", (core.Linear,), {})(64, 64, bias=False)
    training = build({}).train()
    for model in (mixed, wide, other, training):
        assert one_by_one(model, tokens(1, 12), 8, gpu_decode)[1] == 0
    assert one_by_one(build({}), tokens(5, 12), 8, gpu_decode)[1] == 0  # rows in float32


def test_without_the_kernels(monkeypatch, tmp_path):
    """Where gpu_decode.cu is missing, or the GPU or the driver is, model.py computes."""
    def no_driver():
        raise OSError("no libcuda")

    for change in ((gpu_kernels, "FOLDER", tmp_path), (gpu_kernels, "device", no_driver),
                   (gpu_decode, "on_gpu", lambda: False)):
        with monkeypatch.context() as patched:
            patched.setattr(*change)
            assert one_by_one(build({}), tokens(1, 12), 8, gpu_decode)[1] == 0


# ---- the cache ------------------------------------------------------------------------------------------------------


@compiles
def test_between_positions_of_the_model():
    """Positions that model.py computes between those of gpu_decode.py: with a tap, several at a time, and where the
    cache must grow; and another cache of the same model in turn."""
    model, idx = build({}), tokens(1, 300)
    expected = np.array(model(idx))
    cache, other, found = model.make_cache(), model.make_cache(), []
    steps = [(0, 200), *((i, i + 1) for i in range(200, 204)), (204, 210), *((i, i + 1) for i in range(210, 214)),
             (214, 251), *((i, i + 1) for i in range(251, 261))]
    for first, end in steps:
        tap = core.no_tap if first != 212 else lambda site, layer, x: x
        found.append(np.array(model(idx[:, first:end], cache=cache, tap=tap)))
        model(idx[:, first:end], cache=other)
    assert np.abs(np.concatenate(found, axis=1) - expected[:, :261]).max() < 2e-5 * np.abs(expected).max()
    for one, two in zip(cache.layers, other.layers, strict=True):
        assert one.length == two.length == 261
        assert np.abs(np.array(one.keys - two.keys)[:, :, :261]).max() < 1e-5


@compiles
def test_many_texts(monkeypatch):
    """Rows whose texts begin at different columns, and which are refilled: batching.py."""
    model, used, logits = build({}), [], gpu_decode.logits

    def counted(*arguments):
        used.append(logits(*arguments))
        return used[-1]

    prompts = [[5, 9, 2], [1], [7, 7, 30, 4, 4, 8, 1, 2, 3, 3], [6, 6], [9]]
    texts, lengths = [[] for _ in prompts], [4, 9, 2, 6, 3]
    expected = [[*core.generate(model, prompt, n, temperature=0)] for prompt, n in zip(prompts, lengths, strict=True)]
    monkeypatch.setattr(gpu_decode, "logits", counted)
    for number, token in generate_many(model, prompts, 9, batch_size=3, temperature=0,
                                       stops=lambda number, token: len(texts[number]) == lengths[number]):
        texts[number] += [] if token is None else [token]
    assert texts == expected and sum(y is not None for y in used) > 6


@compiles
def test_weights_are_what_they_were():
    """The weights become parts of one buffer for each block, and keep their names, numbers, shapes and dtypes; a second
    cache has no second buffer; a changed weight counts for the next cache."""
    model, idx = build({}, bits=4), tokens(1, 12)
    before = {name: np.array(p) for name, p in tree_flatten(model.parameters())}
    first, second = model.make_cache(), model.make_cache()
    model(idx[:, :8], cache=first), model(idx[:, 8:9], cache=first)
    after = dict(tree_flatten(model.parameters()))
    assert list(after) == list(before)
    assert all(np.array_equal(np.array(after[name]), p) and np.array(after[name]).dtype == p.dtype
               for name, p in before.items())
    model(idx[:, :8], cache=second), model(idx[:, 8:9], cache=second)
    one, two = (gpu_decode.PLANS[cache].weights for cache in (first, second))
    assert all(a is b for a, b in zip(one, two, strict=True))
    model.blocks[1].attn_norm.weight = model.blocks[1].attn_norm.weight * 2
    expected, _ = one_by_one(model, idx, 8, gpu_decode, fast=False)
    found, used = one_by_one(model, idx, 8, gpu_decode)
    assert used == 4 and np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()


def test_deletion(tmp_path):
    """The other files run without gpu_decode.cu, and without gpu_decode.py."""
    for name in ROOT.glob("*.py"):
        shutil.copy(name, tmp_path)
    for deleted in ("gpu_decode.cu", "gpu_decode.py"):
        (tmp_path / deleted).unlink(missing_ok=True)
        code = ("from model import *; m = GPT(GPTConfig(n_layer=2, n_embd=64, vocab_size=96)); m.eval()\n"
                "print(*generate(m, [1, 2, 3], 5, temperature=0))")
        result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert len(result.stdout.split()) == 5, result.stderr
