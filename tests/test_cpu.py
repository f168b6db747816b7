"""cpu.py against float64 numpy, against MLX's own kernels, and its gradients against MLX's autodiff of the formulas."""
import math
import re
import shutil
import subprocess
import sys

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT

import cpu


@pytest.fixture(autouse=True)
def on_cpu():
    with mx.stream(mx.cpu):
        yield


def numbers(*shape, seed=0, scale=1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def near(a, b, tolerance=3e-6) -> bool:
    """Equal but for a part of the largest number."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return a.shape == b.shape and bool(np.abs(a - b).max() <= tolerance * np.abs(b).max())


# ---- exp, softmax, cross-entropy -------------------------------------------------------------------------------------


def test_exp_minus():
    x = np.concatenate([-np.linspace(0, 200, 200001), -np.geomspace(1e-9, 80, 10001)]).astype(np.float32)
    found, exact = np.array(cpu.exp_minus(mx.array(x), mx.array(0.0)), np.float64), np.exp(x.astype(np.float64))
    assert np.abs(found - exact).max() < 3e-7
    shallow, normal = x > -2, x > -87.3  # below exp(-87.34) float32 has no normal numbers
    assert np.abs(found / exact - 1)[shallow].max() < 3e-7
    assert np.abs(found / exact - 1)[normal].max() < 5e-6  # x * log2(e), near 126, is rounded to 4e-6
    assert (found[x < -88] == 0).all()


@pytest.mark.parametrize("m", [-300.0, 0.0, 2.5, 1e4])
def test_exp_minus_of_a_maximum(m):
    x = mx.array([m, m - 1, m - 20, m - 1000, -1e30, -math.inf], mx.float32)
    found = np.array(cpu.exp_minus(x, mx.array(m)))
    assert found[0] == 1
    assert np.abs(found - np.array([1, math.exp(-1), math.exp(-20), 0, 0, 0])).max() < 3e-7 and not found[3:].any()


def test_exp_minus_keeps_nan():
    assert np.isnan(np.array(cpu.exp_minus(mx.array([math.nan, 0.0]), mx.array(0.0)))).tolist() == [True, False]


POINTS = np.concatenate([np.linspace(-12, 12, 20001), [-math.inf, -1e4, -200, -0.0, 200, 1e4, math.inf]])


@pytest.mark.parametrize("name, exact, slope", [
    ("erf", math.erf, lambda x: 2 / math.pi**0.5 * math.exp(-min(x * x, 700))),
    ("sigmoid", lambda x: 1 / (1 + math.exp(-max(x, -700))), lambda x: 1 / (2 + 2 * math.cosh(min(abs(x), 700)))),
])
def test_sigmoid_and_erf(name, exact, slope):
    f = getattr(cpu, name)
    x = POINTS.astype(np.float32)
    assert np.abs(np.array(f(mx.array(x))) - [exact(float(v)) for v in x]).max() < 5e-7
    gradient = np.array(mx.grad(lambda x: (3 * f(x)).sum())(mx.array(x)))
    assert np.abs(gradient - [3 * slope(float(v)) for v in x]).max() < 2e-6
    half = f(mx.array(x).astype(mx.bfloat16))
    assert half.dtype == mx.bfloat16
    finer = [exact(float(v)) for v in np.array(mx.array(x).astype(mx.bfloat16).astype(mx.float32))]
    assert np.abs(np.array(half.astype(mx.float32)) - finer).max() < 2**-8
    assert np.isnan(np.array(f(mx.array([math.nan]))))


def exact_softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def plain_softmax(x):
    return mx.softmax(x, axis=-1)


@pytest.mark.parametrize("scale", [0.1, 3, 60])
@pytest.mark.parametrize("shift", [-500, 0, 500])
def test_softmax(scale, shift):
    x = mx.array(numbers(3, 5, 97, scale=scale) + shift)
    found = np.array(cpu.softmax(x))
    assert near(found, exact_softmax(np.array(x, np.float64))) and near(found, mx.softmax(x, axis=-1))
    assert np.abs(found.sum(-1) - 1).max() < 1e-6
    weights = mx.array(numbers(3, 5, 97, seed=1))
    ours, theirs = (mx.grad(lambda x, f=f: (f(x) * weights).sum())(x) for f in (cpu.softmax, plain_softmax))
    assert near(ours, theirs, 1e-5)


def test_softmax_of_masked():
    x = numbers(4, 9)
    x[:, 5:] = -np.inf
    found = np.array(cpu.softmax(mx.array(x)))
    assert not found[:, 5:].any() and near(found[:, :5], exact_softmax(x[:, :5].astype(np.float64)))
    weights = mx.array(numbers(4, 9, seed=1))
    gradient = np.array(mx.grad(lambda x: (cpu.softmax(x) * weights).sum())(mx.array(x)))
    assert np.isfinite(gradient).all() and not gradient[:, 5:].any() and gradient[:, :5].all()


@pytest.mark.parametrize("scale", [0.1, 3, 60])
@pytest.mark.parametrize("shift", [-500, 0, 500])
def test_cross_entropy(scale, shift):
    logits, targets = mx.array(numbers(40, 131, scale=scale) + shift), mx.array(np.arange(40) * 7 % 131)
    exact = -np.log(exact_softmax(np.array(logits, np.float64)))[np.arange(40), np.array(targets)]
    found = np.array(cpu.cross_entropy(logits, targets))
    assert found.shape == (40,) and np.abs(found - exact).max() < 1e-6 * (abs(shift) + 10 * scale + 5)
    weights = mx.array(numbers(40, seed=1))

    def plain(logits):
        losses = mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return (losses * weights).sum()

    gradient = mx.grad(lambda logits: (cpu.cross_entropy(logits, targets) * weights).sum())(logits)
    assert near(gradient, mx.grad(plain)(logits), 1e-5)


def test_cross_entropy_of_a_sure_model():
    logits = mx.array([[0.0, 1000.0, -1000.0], [0.0, 1000.0, -1000.0]])
    assert np.array(cpu.cross_entropy(logits, mx.array([1, 2]))).tolist() == [0, 2000]


# ---- attention -------------------------------------------------------------------------------------------------------


def exact_attention(q, k, v, scale, mask=None):
    """One head at a time, one query at a time. mask (B, H, T, S), added."""
    (B, H, T, _), group = q.shape, q.shape[1] // k.shape[1]
    y = np.zeros((B, H, T, v.shape[-1]))
    for b, h, t in np.ndindex(B, H, T):
        scores = k[b, h // group].astype(np.float64) @ q[b, h, t] * scale
        y[b, h, t] = exact_softmax(scores + (0 if mask is None else mask[b, h, t])) @ v[b, h // group]
    return y


def causal(T, S):
    """(T, S): the last query sees all S keys, each before it one less."""
    return np.array([[0 if s <= S - T + t else -np.inf for s in range(S)] for t in range(T)])


def check(q, k, v, mask, oracle_mask):
    scale = 0.3
    args = [mx.array(x) for x in (q, k, v)]
    found = cpu.attention(*args, scale, mask)
    broadcast = None if oracle_mask is None else np.broadcast_to(oracle_mask, (*q.shape[:3], k.shape[2]))
    assert near(found, exact_attention(q, k, v, scale, broadcast))
    assert near(found, mx.fast.scaled_dot_product_attention(*args, scale=scale, mask=mask), 1e-5)
    weights, group = mx.array(numbers(*found.shape, seed=9)), q.shape[1] // k.shape[1]

    def plain(q, k, v):
        k, v = mx.repeat(k, group, axis=1), mx.repeat(v, group, axis=1)
        scores = q @ k.swapaxes(-1, -2) * scale
        if broadcast is not None:
            scores = scores + mx.array(broadcast.astype(np.float32))
        return (mx.softmax(scores, axis=-1) @ v * weights).sum()

    gradients = mx.grad(lambda q, k, v: (cpu.attention(q, k, v, scale, mask) * weights).sum(), (0, 1, 2))(*args)
    for ours, theirs in zip(gradients, mx.grad(plain, (0, 1, 2))(*args), strict=True):
        assert near(ours, theirs, 2e-5)


def inputs(T, S, H=4, KV=2, B=2, D=8, value_dim=8):
    return numbers(B, H, T, D, scale=2), numbers(B, KV, S, D, seed=1), numbers(B, KV, S, value_dim, seed=2)


@pytest.mark.parametrize("T, S", [
    (1, 1), (2, 2), (63, 63), (64, 64), (65, 65), (90, 90), (128, 128), (150, 150), (301, 301),  # blocks of 64, then 75
    (1, 9), (5, 40), (70, 75), (64, 200), (130, 333)])  # with keys from a cache
def test_causal(T, S):
    check(*inputs(T, S), "causal", causal(T, S))


@pytest.mark.parametrize("H, KV", [(1, 1), (4, 4), (4, 1), (6, 3), (6, 2)])
@pytest.mark.parametrize("kind", ["causal", None, "added"])
def test_heads(H, KV, kind):
    mask = {"causal": causal(70, 80), None: None, "added": numbers(2, H, 70, 80, seed=4)}[kind]
    check(*inputs(70, 80, H, KV), mx.array(mask) if kind == "added" else kind, mask)


def test_values_of_another_width():
    for mask, oracle_mask in ((None, None), ("causal", causal(70, 75)), (mx.zeros((70, 75)), np.zeros((70, 75)))):
        q, k, v = inputs(70, 75, value_dim=5)
        assert near(cpu.attention(*map(mx.array, (q, k, v)), 0.3, mask), exact_attention(
            q, k, v, 0.3, None if oracle_mask is None else np.broadcast_to(oracle_mask, (2, 4, 70, 75))))


@pytest.mark.parametrize("shape", [
    (20, 33), (1, 33), (4, 20, 33), (1, 20, 33), (1, 1, 20, 33), (2, 1, 20, 33), (1, 4, 20, 33), (2, 4, 20, 33),
    (2, 1, 1, 33), (2, 4, 20, 1), (33,)], ids=str)
def test_masks(shape):
    added = numbers(*shape, seed=5, scale=3)
    check(*inputs(20, 33), mx.array(added), added)
    seen = np.random.default_rng(6).random(shape) < 0.7
    seen[..., 0] = True  # a query that sees nothing has no softmax
    check(*inputs(20, 33), mx.array(seen), np.where(seen, 0, -np.inf))


def test_masked_keys_weigh_nothing():
    q, k, v = inputs(70, 90)
    before = np.array(cpu.attention(*map(mx.array, (q, k, v)), 0.3, "causal"))
    k[:, :, 50:], v[:, :, 50:] = 1e4, 1e30
    after = np.array(cpu.attention(*map(mx.array, (q, k, v)), 0.3, "causal"))
    assert np.array_equal(before[:, :, :30], after[:, :, :30]) and (before[:, :, 30:] != after[:, :, 30:]).all()


# ---- deletion --------------------------------------------------------------------------------------------------------

WITHOUT = """
import blas, mlx.core as mx, mlx.nn as nn, numpy as np, sys
import model, tuned_lens
assert (model.cpu is None) == (sys.argv[1] == "without"), model.cpu
found = []
for settings in ({}, dict(mlp="gelu", alibi=True, softcap=5.0), dict(mlp="swiglu", sliding_window=9)):
    gpt = model.GPT(model.GPTConfig(block_size=64, vocab_size=61, n_layer=2, n_embd=32, **settings), seed=1)
    idx = mx.array(np.random.default_rng(0).integers(0, 61, (2, 64)))
    loss, gradients = nn.value_and_grad(gpt, gpt.loss)(idx, idx)
    found += [gpt(idx), loss, gradients["embed"]["weight"], tuned_lens.probabilities(gpt(idx))]
np.savez(sys.argv[2], *map(np.array, found))
"""


def test_deleting_it_costs_speed_and_nothing_else(tmp_path):
    """The other files run without cpu.py, and compute the same numbers but for rounding."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for which in ("with", "without"):
        if which == "without":
            (tmp_path / "cpu.py").unlink()
        subprocess.run([sys.executable, "-c", WITHOUT, which, tmp_path / which], cwd=tmp_path, check=True)
    with np.load(tmp_path / "with.npz") as ours, np.load(tmp_path / "without.npz") as mlx:
        assert len(ours.files) == 12
        for name in ours.files:
            assert near(ours[name], mlx[name], 1e-5)
    users = [path.name for path in ROOT.glob("*.py") if re.search(r"^\s*(import|from) cpu\b", path.read_text(), re.M)]
    assert users == ["model.py"]


@pytest.mark.parametrize("turned", [64, 16])
@pytest.mark.parametrize("position", [0, 7, 100_000])
def test_rope_of_one_position(turned, position):
    """All or some of a head's numbers turn, by angles in float32 as MLX's own."""
    x, inverse = numbers(2, 3, 1, 64), (10000.0 ** (np.arange(0, turned, 2) / turned)).astype(np.float32)
    angle = (np.float32(position) * (1 / inverse)).astype(np.float64)
    a, b, rest = np.split(x.astype(np.float64), [turned // 2, turned], axis=-1)
    exact = np.concatenate([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle), rest], -1)
    found = cpu.rope(mx.array(x), mx.array(inverse), position)
    assert near(found, exact)
    assert near(found, mx.fast.rope(mx.array(x), turned, traditional=False, base=None, scale=1.0, offset=position,
                                    freqs=mx.array(inverse)))
