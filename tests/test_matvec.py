"""matvec.py and matvec.c against float64 numpy, with integers that numpy packs; and where they cannot be used."""
import os
import shutil
import subprocess
import sys

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import ROOT
from test_cpu import near, numbers

import matvec
import quantized
from model import GPT, GPTConfig, no_tap

# By what the machine has, not by matvec.library(): where the C code does not compile, or is wrong, these tests fail.
pytestmark = needs_a_compiler = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not any(map(shutil.which, ("gcc", "clang", "cc"))),
    reason="no C compiler, or not Linux")
DTYPES = [mx.float32, mx.float16, mx.bfloat16]


@pytest.fixture(autouse=True)
def on_cpu():
    with mx.stream(mx.cpu):
        yield


def packed(bits: int, group_size: int, dtype: mx.Dtype, outputs: int, inputs: int) -> tuple[list, np.ndarray]:
    """Words, scales and biases of a weight, and the weight in float64."""
    rng = np.random.default_rng(bits)
    q = rng.integers(0, 2**bits, (outputs, inputs))
    words = np.packbits((q[..., None] >> np.arange(bits) & 1).reshape(outputs, -1).astype(np.uint8), axis=1,
                        bitorder="little").view(np.uint32)
    scales, biases = (mx.array(numbers(outputs, inputs // group_size, seed=seed)).astype(dtype) for seed in (1, 2))
    s, b = (np.repeat(np.array(part.astype(mx.float32), np.float64), group_size, axis=1) for part in (scales, biases))
    return [mx.array(words), scales, biases], s * q + b


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", quantized.BITS)
def test_packed_product(bits, group_size, dtype):
    """Rows one by one and in fours; outputs that fill no whole number of pieces."""
    parts, weight = packed(bits, group_size, dtype, 301, 256)
    for rows in (1, 4, 7):
        x = numbers(1, rows, 256)
        assert near(matvec.product(mx.array(x), *parts, group_size, bits), x @ weight.T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_product(dtype):
    """Also with numbers below the normal ones of float16."""
    weight, x = mx.array(numbers(301, 96) * np.geomspace(1e-7, 1e3, 96, dtype=np.float32)).astype(dtype), numbers(5, 96)
    exact = np.array(weight.astype(mx.float32), np.float64)
    assert near(matvec.product(mx.array(x), weight), x @ exact.T)
    column = mx.array(np.eye(96, dtype=np.float32)[:1])  # its numbers are 1e-7: those of the others would hide an error
    assert np.array_equal(np.array(matvec.product(column, weight)), exact[:, :1].T)


def test_threads_share_a_product(monkeypatch):
    """Many threads, many calls, all outputs: also where a thread sleeps between two calls."""
    parts, weight = packed(4, 64, mx.float16, 3000, 512)
    monkeypatch.setattr(matvec, "threads", lambda: 4)
    for call in range(300):
        x = numbers(1, 512, seed=call)
        assert near(matvec.product(mx.array(x), *parts, 64, 4), x @ weight.T)
        if call % 100 == 0:
            mx.eval(mx.ones((1000, 1000)) @ mx.ones((1000, 1000)))


def test_gradient_and_tracing():
    """A layer's gradient is that of a dense matmul. In a compiled function MLX's own product is used."""
    layer = nn.QuantizedLinear.from_linear(nn.Linear(128, 40), 32, 5)
    weight = np.array(mx.dequantize(layer.weight, layer.scales, layer.biases, 32, 5), np.float64)
    x, bias = numbers(3, 128), np.array(layer.bias, np.float64)
    gradient = mx.grad(lambda x: mx.square(layer(x)).sum())(mx.array(x))
    assert near(gradient, 2 * (x @ weight.T + bias) @ weight)
    assert near(mx.compile(layer)(mx.array(x)), x @ weight.T + bias)


def test_what_is_refused():
    """None, not a wrong product: x in another dtype, numbers that are not contiguous."""
    parts, _ = packed(4, 32, mx.float32, 40, 64)
    x = mx.array(numbers(64, 3))
    assert matvec.product(x.T.astype(mx.bfloat16), *parts, 32, 4) is None
    assert matvec.product(x.T, *parts, 32, 4) is None
    assert matvec.product(mx.ones((1, 60)), mx.ones((40, 60))) is None
    assert matvec.product(mx.ones((1, 64)), mx.ones((40, 64), mx.int32)) is None


def test_the_product_is_used(monkeypatch):
    """A layer calls it for a few rows, and not for many."""
    layer, calls = nn.QuantizedLinear.from_linear(nn.Linear(64, 40), 32, 4), []
    monkeypatch.setattr(matvec, "product", lambda x, *parts: calls.append(x.shape) or mx.zeros((*x.shape[:-1], 40)))
    layer(mx.ones((1, matvec.ROWS, 64))), layer(mx.ones((1, matvec.ROWS + 1, 64)))
    assert calls == [(1, matvec.ROWS, 64)]


@pytest.mark.parametrize("tie", [True, False])
def test_a_dense_model(tie, monkeypatch):
    """A single position of a large model goes through it, and gives what many positions give; its gradient is the same.
    In training it is not used: weights would get no gradient."""
    model = GPT(GPTConfig(n_layer=1, n_embd=128, n_head=2, vocab_size=2304, ffn_dim=2304, block_size=8, tie=tie))
    idx, calls, product = mx.array([[5, 9, 700]]), [], matvec.product
    monkeypatch.setattr(matvec, "product", lambda *parts: calls.append(1) or product(*parts))

    def loss(x):
        return mx.square(model.unembed(model.blocks[0](x, 0, None, no_tap, {}))).sum()

    x = mx.array(numbers(1, 1, 128))
    wanted, gradient = mx.value_and_grad(loss)(x)
    assert model.training and not calls
    model.eval()
    found, again = mx.value_and_grad(loss)(x)
    assert len(calls) == 3 and near(found, wanted) and near(again, gradient, 2e-5)  # mlp.up, mlp.down, unembedding
    cache = model.make_cache()
    each = mx.concatenate([model(idx[:, i:i + 1], cache=cache) for i in range(3)], axis=1)
    assert near(each, model(idx), 1e-5)


SMALL = """
import blas, mlx.core as mx, mlx.nn as nn, matvec, quantized
layer = nn.QuantizedLinear.from_linear(nn.Linear(64, 40), 32, 4)
x = mx.random.normal((1, 64))
w = mx.dequantize(layer.weight, layer.scales, layer.biases, 32, 4)
print(matvec.library() is not None, mx.abs(layer(x) - x @ w.T - layer.bias).max().item() < 1e-4)
"""


def other_process(**environment) -> str:
    own = os.environ | {"PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, "-c", SMALL], env=own, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("compiler", [
    "", "exit 1", "printf x > $9", "exec GCC -shared -x c /dev/null -o $9",
    "sed s/0x1p112f/0x1p111f/ $7 > $9.c; exec GCC $1 $2 $3 $4 $5 $6 $9.c -o $9", "exec GCC $@"])
def test_compilers(compiler, tmp_path):
    """No compiler; one that fails; whose result is no library, or an empty one, or computes something else: then MLX's
    product is used. The last one is right."""
    if compiler:
        (tmp_path / "gcc").write_text(f"#!/bin/sh\n{compiler.replace('GCC', shutil.which('gcc') or 'cc')}\n")
        (tmp_path / "gcc").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}" if compiler else str(tmp_path)
    used = compiler == "exec GCC $@"
    assert other_process(XDG_CACHE_HOME=str(tmp_path), PATH=path, TINYGPT_BLAS="off") == f"{used} True"


def test_the_compiled_file_is_kept(tmp_path):
    """One file a source and processor. It is made elsewhere where the cache's folder cannot be made."""
    own = dict(XDG_CACHE_HOME=str(tmp_path), TINYGPT_BLAS="off")
    assert other_process(**own) == "True True"
    (kept,) = (tmp_path / "tinygpt").glob("*")
    time = kept.stat().st_mtime_ns
    assert other_process(**own) == "True True" and kept.stat().st_mtime_ns == time
    assert other_process(**own | {"XDG_CACHE_HOME": str(kept)}) == "True True"
