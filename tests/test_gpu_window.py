"""gpu_window.cu, compiled for the processor by tests/cuda_on_cpu.h, against attention in float64 and model.py; and
where it must not be used. On a GPU, python runs/gpu_window_check.py compares more, with the code that runs there."""
import ctypes
import re
import shutil
import subprocess
import sys

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import ROOT
from cuda_kernels import compiles, library_of
from mlx.utils import tree_flatten

import gpu_window
import matvec
import model as core
from model import GPT, GPTConfig


@pytest.fixture(autouse=True)
def as_if_on_a_gpu(monkeypatch):
    """gpu_window.py believes in a GPU, whose kernels g++ compiles. The fixture is the list of kernels that have run."""
    ran = []

    def cuda_kernel(name, inputs, outputs, source, header, ensure_row_contiguous, shared_memory):
        header, declared = header.rsplit("namespace mlx::core::cu", 1)
        kinds = re.search(rf"custom_kernel_{name}\((.*)\); }}", declared)[1].split(", ")
        arguments = [argument for each in inputs for argument in (  # as MLX finds out which it must give
            [each] + [f"{each}{end}" for end in ("_shape", "_strides") if f"{each}{end}" in source])] + outputs
        kinds = [kind.replace("const __grid_constant__ ", "const ") for kind in kinds]
        given = "".join(f"{kind} {each} = {'' if kind[-1] == '*' else '*'}({kind.rstrip('*')}*)arguments[{i}];\n"
                        for i, (kind, each) in enumerate(zip(kinds, arguments, strict=True)))
        code = "\n".join(['#include "cuda_on_cpu.h"', header.replace("#include <cuda_", "// <cuda_"),
                          "static void body(void* all) {", "void** arguments = (void**)all;", given, source,
                          f'}} extern "C" void run(int blocks, void** arguments) {{ launch(blocks, THREADS, '
                          f"{shared_memory}, body, arguments); }}"])
        library = library_of(code)

        def run(inputs_, grid, threadgroup, output_shapes, output_dtypes):
            made = [mx.full(shape, float("nan"), dtype) for shape, dtype in zip(output_shapes, output_dtypes,
                                                                                strict=True)]
            kept = dict(zip([*inputs, *outputs], [*inputs_, *made], strict=True))
            pointers = []
            for each in arguments:
                array = kept[each.split("_")[0]]
                numbers = array.shape if each.endswith("_shape") else [*np.cumprod((1, *array.shape[:0:-1]))[::-1]]
                if each.endswith("_strides") and each[0] in "vc":  # as if the positions came before the heads
                    B, H, T, D = array.shape
                    numbers = [T * H * D, D, H * D, 1]
                kind = ctypes.c_int if each.endswith("_shape") else ctypes.c_longlong
                pointers.append((kind * 8)(*map(int, numbers)) if "_" in each else each)
            for each in ("v", "change"):
                if each in kept:
                    kept[each] = mx.contiguous(kept[each].swapaxes(1, 2))
            mx.eval(list(kept.values()))
            addresses = [matvec.address(kept[each]) if isinstance(each, str) else ctypes.addressof(each)
                         for each in pointers]
            library.run(grid[0] // threadgroup[0], (ctypes.c_void_p * len(addresses))(*addresses))
            ran.append(name.split("_", 1)[1].rsplit("_", 1)[0])
            return made

        def kernel(inputs, **arguments):
            return run(inputs, **arguments)

        return kernel

    monkeypatch.setattr(mx.fast, "cuda_kernel", cuda_kernel)
    monkeypatch.setattr(gpu_window, "on_gpu", lambda: True)
    gpu_window.kernel.cache_clear(), gpu_window.windowed_attention.cache_clear()
    yield ran
    gpu_window.kernel.cache_clear(), gpu_window.windowed_attention.cache_clear()


def exact(q, k, v, dy, window: int, scale: float, sink=None):
    """The result and the gradients of windowed attention in float64, each by its formula, one head at a time."""
    (B, H, T, _), KV = q.shape, k.shape[1]
    y, dq, dk, dv = np.zeros(q.shape), np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    dsink = np.zeros(H)
    seen = np.tri(T, dtype=bool) & ~np.tri(T, k=-window, dtype=bool)
    for b in range(B):
        for h in range(H):
            g = h // (H // KV)
            weights = np.where(seen, np.exp(scale * q[b, h] @ k[b, g].T), 0)
            own = 0 if sink is None else np.exp(sink[h])
            total = weights.sum(1, keepdims=True) + own
            weights = weights / total
            y[b, h] = weights @ v[b, g]
            dweights = dy[b, h] @ v[b, g].T
            mean = (weights * dweights).sum(1, keepdims=True)
            ds = weights * (dweights - mean)
            dq[b, h] = scale * ds @ k[b, g]
            dk[b, g] += scale * ds.T @ q[b, h]
            dv[b, g] += weights.T @ dy[b, h]
            dsink[h] -= (own / total * mean).sum()
    return y, dq, dk, dv, dsink


CASES = {  # B, H, KV, T, D, window, sink
    "window 128": (1, 2, 2, 300, 64, 128, False),
    "less than a tile": (2, 1, 1, 200, 32, 20, False),
    "three heads share keys": (1, 3, 1, 150, 16, 70, False),
    "one key": (1, 1, 1, 130, 16, 1, False),
    "all keys": (1, 1, 1, 140, 16, 500, False),
    "sinks": (1, 2, 1, 140, 16, 33, True),
    "a width of 48": (1, 1, 1, 65, 48, 64, False),
}


@compiles
@pytest.mark.parametrize("name", CASES)
def test_float64(name, as_if_on_a_gpu):
    """Values and gradients, as near to those of float64 as 16 bits are."""
    B, H, KV, T, D, window, has_sink = CASES[name]
    rng = np.random.default_rng(0)
    arrays = [mx.array(rng.normal(size=(B, heads, T, D)) * 1.5, mx.bfloat16) for heads in (H, KV, KV, H)]
    sink = mx.array(rng.normal(size=H) + 2, mx.float32) if has_sink else None
    config = GPTConfig(n_head=H, n_kv_head=KV, head_dim=D, sliding_window=window, sink_logits=has_sink)

    def f(q, k, v, *sink):
        return core.window_attention(config, 0, q, k, v, 7, *sink)

    inputs = [*arrays[:3], sink] if has_sink else arrays[:3]
    (y,), gradients = mx.vjp(f, inputs, [arrays[3]])
    q, k, v, dy = (np.array(x.astype(mx.float32), np.float64) for x in arrays)
    expected = exact(q, k, v, dy, window, D ** -0.5, np.array(sink) if has_sink else None)
    for found, want in zip([y, *gradients], expected, strict=False):
        found = np.array(found.astype(mx.float32))
        assert found.shape == want.shape and np.isfinite(found).all()
        assert np.abs(found - want).max() < 0.01 * np.abs(want).max() + 1e-4
    assert sorted({*as_if_on_a_gpu}) == ["backward_keys", "backward_queries", "forward"]


def build(settings: dict, dtype: mx.Dtype = mx.bfloat16, layers: int = 1) -> GPT:
    model = GPT(GPTConfig(n_layer=layers, n_head=2, n_embd=32, block_size=160, vocab_size=64, sliding_window=30,
                          **settings), seed=3)
    model.compute_dtype = dtype
    return model


@compiles
@pytest.mark.parametrize("settings", [{}, dict(n_kv_head=1, sink_logits=True, window_pattern="SL"),
                                      dict(diff_attn=True, diff_attn_version=2)], ids=str)
def test_as_model(settings, as_if_on_a_gpu, monkeypatch):
    """The loss and the gradients of a model, and its logits from a cache, are those without gpu_window.py; blocks that
    are computed again in the backward pass have the same gradients."""
    model = build(settings, layers=2)
    idx = mx.array(np.random.default_rng(0).integers(0, 64, (1, 160)))

    def results():
        loss, grads = nn.value_and_grad(model, model.loss)(idx, idx)
        cache = model.make_cache()
        parts = [model(idx[:, a:b], cache=cache) for a, b in ((0, 150), (150, 151), (151, 160))]
        return [np.array(x.astype(mx.float32)) for x in (loss, *parts, *(g for _, g in tree_flatten(grads)))]

    found = results()
    assert {*as_if_on_a_gpu} == {"forward", "backward_queries", "backward_keys"}
    model.checkpoint_every = 1
    again = results()
    monkeypatch.setattr(core, "gpu_window", None)
    for a, b, c in zip(found, again, results(), strict=True):
        assert np.array_equal(a, b) and np.abs(a - c).max() < 0.05 * np.abs(c).max() + 1e-6


# ---- where model.py must compute ------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings, dtype", [
    (dict(sinks=1), mx.bfloat16), (dict(alibi=True), mx.bfloat16), (dict(attn_softcap=5.0), mx.bfloat16),
    (dict(diff_attn=True), mx.bfloat16), (dict(head_dim=24), mx.bfloat16), (dict(head_dim=144), mx.bfloat16),
    ({}, mx.float32)], ids=str)
def test_not_known(settings, dtype, as_if_on_a_gpu):
    mx.eval(build(settings, dtype)(mx.zeros((1, 160), mx.int32)))
    assert not as_if_on_a_gpu


def test_documents_in_a_row(as_if_on_a_gpu):
    places = mx.arange(160)[None] % 80 + mx.arange(160)[None] // 80 * core.DOCUMENT
    mx.eval(build({})(mx.zeros((1, 160), mx.int32), places=places))
    assert not as_if_on_a_gpu


def test_deletion(tmp_path):
    """The other files run without gpu_window.py and gpu_window.cu."""
    for name in ROOT.glob("*.py"):
        shutil.copy(name, tmp_path)
    (tmp_path / "gpu_window.py").unlink()
    code = ("from model import *; m = GPT(GPTConfig(n_layer=1, n_embd=32, vocab_size=64, sliding_window=30))\n"
            "print(m(mx.zeros((1, 160), mx.int32)).shape)")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout == "(1, 160, 64)\n", result.stderr
