"""gpu_experts.cu, compiled for the processor by tests/cuda_on_cpu.h, against float64 and model.py; and where it must
not be used. On a GPU, python runs/gpu_experts_check.py compares more, with the code that runs there."""
import shutil
import subprocess
import sys

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import ROOT
from cuda_kernels import compiles, on_cpu
from mlx.utils import tree_flatten

import gpu_experts
import gpu_kernels
import model as core
from model import GPT, GPTConfig


@pytest.fixture(autouse=True)
def as_if_on_a_gpu(monkeypatch):
    on_cpu(monkeypatch)
    monkeypatch.setattr(gpu_experts, "on_gpu", lambda: True)
    caches = gpu_experts.kernel, gpu_experts.functions, gpu_experts.is_right, gpu_experts.usable
    for each in caches:
        each.cache_clear()
    yield
    for each in caches:
        each.cache_clear()


# ---- float64, written out: y_t = sum over its experts of gate * down(activation(up x)) -------------------------------


def of_mlp(name, h):
    """The activation and its slopes: h (n, F) -> value (n, HID), slopes (n, F)."""
    def gelu(x):
        erf = np.vectorize(__import__("math").erf)(x / 2**0.5)
        return x * (1 + erf) / 2, (1 + erf) / 2 + x * np.exp(-x * x / 2) / (2 * np.pi)**0.5

    def gelu_tanh(x):
        u = (2 / np.pi)**0.5 * (x + 0.044715 * x**3)
        t = np.tanh(u)
        return x * (1 + t) / 2, (1 + t) / 2 + x * (1 - t * t) / 2 * (2 / np.pi)**0.5 * (1 + 3 * 0.044715 * x**2)

    def silu(x):
        s = 1 / (1 + np.exp(-x))
        return x * s, s * (1 + x * (1 - s))

    f = {"relu2": lambda x: (np.maximum(x, 0)**2, 2 * np.maximum(x, 0)), "gelu": gelu, "gelu_tanh": gelu_tanh,
         "swiglu": silu, "geglu": gelu_tanh}[name]
    if name not in gpu_experts.GATED:
        return f(h)
    gate, x = h[:, ::2], h[:, 1::2]
    value, slope = f(gate)
    return value * x, np.stack([x * slope, value], axis=2).reshape(h.shape)


def exact(name, x, gates, up, down, chosen, dy):
    """y and the gradients of sum(dy * y) by x, gates, up and down, in float64."""
    y, dx, dgates, dup, ddown = (np.zeros(a.shape) for a in (x, x, gates, up, down))
    for e in range(len(up)):
        token, k = np.nonzero(chosen == e)
        value, slope = of_mlp(name, x[token] @ up[e].T)
        gate = gates[token, k][:, None]
        np.add.at(y, token, gate * (value @ down[e].T))
        dvalue = dy[token] @ down[e]
        dgates[token, k] = (dvalue * value).sum(1)
        ddown[e] = (gate * dy[token]).T @ value
        dh = slope * np.repeat(gate * dvalue, slope.shape[1] // value.shape[1], axis=1)
        dup[e] = dh.T @ x[token]
        np.add.at(dx, token, dh @ up[e])
    return y, dx, dgates, dup, ddown


CASES = [("relu2", 5, 2, 150, 64, 320, 8), ("gelu", 2, 1, 40, 64, 64, 8), ("gelu_tanh", 4, 3, 50, 128, 64, 8),
         ("swiglu", 3, 2, 60, 128, 64, 8), ("relu2", 5, 2, 150, 192, 320, 9), ("swiglu", 3, 2, 60, 128, 192, 9)]


@compiles
@pytest.mark.parametrize("mlp, E, K, N, C, HID, generation", CASES, ids=str)
def test_against_float64(mlp, E, K, N, C, HID, generation, monkeypatch):
    """Values and gradients; experts with few rows, with many, and with none; tiles of both sizes; by warps, and by the
    larger instructions of generation 9 (Hopper)."""
    room = 101_376 if mlp.startswith("gelu") else 232_448
    if mlp == "swiglu":
        monkeypatch.setenv("COPIES_AT_ONCE", "1")
    monkeypatch.setattr(gpu_kernels, "device", lambda: (3, room, generation))
    rng = np.random.default_rng(0)
    F = 2 * HID if mlp in gpu_experts.GATED else HID
    x, gates, up, down, dy = (mx.array(rng.standard_normal(shape) * scale).astype(mx.bfloat16) for shape, scale in (
        ((N, C), 1), ((N, K), 0.5), ((E, F, C), C**-0.5), ((E, C, HID), HID**-0.5), ((N, C), 1)))
    up, down = up.astype(mx.float32), down.astype(mx.float32)  # as parameters are; exact in bfloat16
    weights = np.array([1.0] * (E - 1) + [0]) if E > 2 and K < E else np.ones(E)  # the last expert has no rows
    weights[0] += 3
    chosen = np.stack([rng.choice(E, K, replace=False, p=weights / weights.sum()) for _ in range(N)])
    sort, mixture = gpu_experts.functions(mx.bfloat16, mlp, E, K, C, HID)
    pair, row, begin = sort(mx.array(chosen))
    assert np.array_equal(np.array(pair), np.argsort(chosen.reshape(-1), kind="stable"))
    assert np.array_equal(np.array(pair)[np.array(row)], np.arange(N * K))
    assert np.array_equal(np.array(begin), [(chosen < e).sum() for e in range(E + 1)])
    y = mixture(x, gates, up, down, pair, row, begin)[0]
    gradients = mx.grad(lambda *a: (mixture(*a, pair, row, begin)[0].astype(mx.float32) * dy).sum(),
                        (0, 1, 2, 3))(x, gates, up, down)
    wide = [np.array(a.astype(mx.float32)).astype(np.float64) for a in (x, gates, up, down)]
    expected = exact(mlp, *wide, chosen, np.array(dy.astype(mx.float32)).astype(np.float64))
    for found, right in zip((y, *gradients), expected, strict=True):
        found = np.array(found.astype(mx.float32))
        assert np.isfinite(found).all() and np.abs(found - right).max() < 0.015 * np.abs(right).max()
        assert np.linalg.norm(found - right) < 0.006 * np.linalg.norm(right)


@compiles
def test_without_the_larger_instructions(monkeypatch, tmp_path):
    """Where gpu_experts_hopper.cu is missing, such a GPU computes as others do."""
    for name in ("gpu_kernels.cuh", "gpu_experts.cu"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.setattr(gpu_kernels, "device", lambda: (3, 232_448, 9))
    assert gpu_experts.on_hopper()
    monkeypatch.setattr(gpu_kernels, "FOLDER", tmp_path)
    monkeypatch.setattr(gpu_experts, "TRIED", 40)
    assert not gpu_experts.on_hopper() and gpu_experts.is_right(mx.bfloat16, "relu2", 4, 2, 64, 64)


@compiles
@pytest.mark.parametrize("E, K, balance", [(8, 2, "loss"), (5, 1, "bias"), (32, 4, "none")], ids=str)
def test_router(E, K, balance, monkeypatch):
    """The choice, the gates and the counts; and the gradient of the logits, which has that of both losses."""
    monkeypatch.setattr(gpu_experts, "is_right", lambda *_: True)
    rng, N = np.random.default_rng(1), 300
    moe = core.MoE(GPTConfig(n_embd=64, n_expert=E, expert_top_k=K, expert_balance=balance, ffn_dim=64), 0).train()
    bias = rng.normal(0, 0.2, E) if balance == "bias" else np.zeros(E)
    if balance == "bias":
        moe.balance = mx.array(bias.astype(np.float32))
    logits = mx.array(2 * rng.standard_normal((N, E))).astype(mx.bfloat16)
    dgates = rng.standard_normal((N, K)).astype(np.float32)
    gates, chosen, count = gpu_experts.routed(moe, logits)
    chosen = np.array(chosen)
    x = np.array(logits.astype(mx.float32)).astype(np.float64)

    def softmax(x):
        p = np.exp(x - x.max(1, keepdims=True))
        return p / p.sum(1, keepdims=True)

    def gates_of(x):
        found = np.take_along_axis(softmax(x), chosen, 1)
        return found / found.sum(1, keepdims=True) if K > 1 else found

    assert all(len({*row}) == K for row in chosen)
    scores = softmax(x) + bias  # of the experts that are not chosen, none is larger; some are equal
    assert np.abs(np.sort(np.take_along_axis(scores, chosen, 1)) - np.sort(scores)[:, -K:]).max() < 1e-6
    assert np.array_equal(np.array(count), np.bincount(chosen.reshape(-1), minlength=E))
    assert np.abs(np.array(gates.astype(mx.float32)) - gates_of(x)).max() < 0.004
    share = np.bincount(chosen.reshape(-1), minlength=E) / chosen.size

    def loss(x):
        p, sums = softmax(x), np.log(np.exp(x).sum(1))
        switch = core.SWITCH_LOSS * E * (share * p.mean(0)).sum() if balance == "loss" else 0
        return (gates_of(x) * dgates).sum() + core.Z_LOSS * (sums**2).mean() + switch

    found = np.array(mx.grad(lambda x: (gpu_experts.routed(moe, x)[0].astype(mx.float32) * mx.array(dgates)).sum())(
        logits).astype(mx.float32))
    for token, e in zip(rng.integers(0, N, 40), rng.integers(0, E, 40), strict=True):
        step = np.zeros_like(x)
        step[token, e] = 1e-5
        slope = (loss(x + step) - loss(x - step)) / 2e-5
        assert abs(found[token, e] - slope) < 0.01 * max(abs(slope), 0.3)
    zero = mx.grad(lambda x: 0 * gpu_experts.routed(moe, x)[0].astype(mx.float32).sum())(logits)
    zero, dgates = np.array(zero.astype(mx.float32)), 0 * dgates  # the losses alone, whose gradients are small
    for token, e in zip(rng.integers(0, N, 20), rng.integers(0, E, 20), strict=True):
        step = np.zeros_like(x)
        step[token, e] = 1e-3
        slope = (loss(x + step) - loss(x - step)) / 2e-3
        assert abs(zero[token, e] - slope) < 0.01 * np.abs(zero).max()


# ---- in a model ------------------------------------------------------------------------------------------------------

SMALL = dict(n_layer=1, n_embd=64, n_head=1, vocab_size=96, block_size=48, ffn_dim=64, n_expert=4)


def loss_and_gradients(settings, fast, monkeypatch, dtype=mx.bfloat16, every=0):
    """Of a model in training, for two rows; and how often gpu_experts.py computed its experts."""
    monkeypatch.setattr(core, "gpu_experts", gpu_experts if fast else None)
    model, used, mixture = GPT(GPTConfig(**SMALL | settings)), [], gpu_experts.mixture
    monkeypatch.setattr(gpu_experts, "mixture", lambda *a: used.append(mixture(*a)) or used[-1])
    model.train()
    model.compute_dtype, model.checkpoint_every = dtype, every
    idx = mx.random.randint(0, 96, (2, 49), key=mx.random.key(3))
    value, gradients = nn.value_and_grad(model, model.loss)(idx[:, :-1], idx[:, 1:])
    mx.eval(value, gradients)
    monkeypatch.setattr(gpu_experts, "mixture", mixture)
    return value.item(), dict(tree_flatten(gradients)), sum(y is not None for y in used)


@compiles
@pytest.mark.parametrize("settings", [dict(), dict(mlp="geglu", n_shared_expert=1, mod="topk", mod_every=1,
                                                   mod_capacity=0.9)], ids=str)
def test_as_model(settings, monkeypatch):
    """The loss and all gradients are as near to float32's as those of the plain form; also with checkpoint_every."""
    monkeypatch.setattr(gpu_experts, "is_right", lambda *a: True)
    exact, right, none = loss_and_gradients(settings, False, monkeypatch, mx.float32)
    _, plain, _ = loss_and_gradients(settings, False, monkeypatch)
    assert none == 0
    for every, times in ((0, 1), (1, 2)):
        value, found, used = loss_and_gradients(settings, True, monkeypatch, every=every)
        assert used == times and abs(value - exact) < 2e-3
        for name, gradient in right.items():
            error, other = (mx.linalg.norm(each[name] - gradient).item() for each in (found, plain))
            assert error < 1.3 * other + 1e-6, name


@compiles
def test_trial(monkeypatch):
    """A GPU that computes wrong numbers, or nothing, is found out, and model.py computes; a right one passes."""
    monkeypatch.setattr(gpu_experts, "TRIED", 40)
    kind = mx.bfloat16, "relu2", 4, 2, 64, 64
    gpu_experts.is_right.cache_clear()
    assert gpu_experts.is_right(*kind)
    run = gpu_experts.kernel

    def breaks(wrong):
        def kernel(name, *kind):
            def more(given, grid, shapes, dtypes):
                made = run(name, *kind)(given, grid, shapes, dtypes)
                return [made[0], made[1] * 1.1] if name == wrong else made
            return more
        return kernel

    def impossible(*_):
        raise RuntimeError("no such instruction")

    for kernel in (breaks("up"), breaks("weights"), impossible):
        monkeypatch.setattr(gpu_experts, "kernel", kernel)
        gpu_experts.is_right.cache_clear()
        assert not gpu_experts.is_right(*kind)
    assert loss_and_gradients({}, True, monkeypatch)[2] == 0


@pytest.mark.parametrize("settings, dtype", [
    (dict(bias=True), mx.bfloat16), (dict(mlp="swiglu_clip"), mx.bfloat16), (dict(ffn_dim=96), mx.bfloat16),
    (dict(n_expert=33), mx.bfloat16), ({}, mx.float32)], ids=str)
def test_not_known(settings, dtype, monkeypatch):
    monkeypatch.setattr(gpu_experts, "functions", None)
    assert loss_and_gradients(settings, True, monkeypatch, dtype)[2] == 0


def test_without_the_kernels(monkeypatch, tmp_path):
    """Where there is no GPU, an old one, no driver, or no gpu_experts.cu; and for packed experts, model.py computes."""
    monkeypatch.setattr(gpu_experts, "functions", None)
    def none():
        raise OSError("no driver")

    for change in ((gpu_experts, "on_gpu", lambda: False), (gpu_kernels, "device", lambda: (80, 101_376, 7)),
                   (gpu_kernels, "device", lambda: (80, 65_536, 8)), (gpu_kernels, "device", none),
                   (gpu_kernels, "FOLDER", tmp_path)):
        with monkeypatch.context() as patched:
            patched.setattr(*change)
            gpu_experts.usable.cache_clear()
            assert loss_and_gradients({}, True, monkeypatch)[2] == 0
    gpu_experts.usable.cache_clear()
    model = GPT(GPTConfig(**SMALL))
    nn.quantize(model, 32, 4)
    x, chosen = mx.zeros((48, 64), mx.bfloat16), mx.zeros((48, 2), mx.uint32)
    assert gpu_experts.mixture(model.blocks[0].mlp, x, mx.ones((48, 2), mx.bfloat16), chosen) is None


def test_deletion(tmp_path):
    """The other files run without gpu_experts.cu, and without gpu_experts.py."""
    for name in ROOT.glob("*.py"):
        shutil.copy(name, tmp_path)
    for deleted in ("gpu_experts.cu", "gpu_experts.py"):
        (tmp_path / deleted).unlink(missing_ok=True)
        code = ("from model import *; m = GPT(GPTConfig(n_layer=1, n_embd=64, vocab_size=96, n_expert=4))\n"
                "print(m.loss(mx.zeros((2, 40), mx.int32), mx.zeros((2, 40), mx.int32)).item())")
        result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert 4 < float(result.stdout) < 6, result.stderr
