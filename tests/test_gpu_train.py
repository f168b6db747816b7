"""gpu_train.cu, compiled for the processor by tests/cuda_on_cpu.h, against float64 and model.py; and where it must not
be used. On a GPU, python runs/gpu_train_check.py compares more, with the code that runs there."""
import math
import re
import shutil
import subprocess
import sys

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from conftest import ROOT
from cuda_kernels import compiles, on_cpu
from decoding import build, tokens
from mlx.utils import tree_flatten, tree_map

import gpu_kernels
import gpu_train
import model as core
import parallel
from lora import attach
from model import DOCUMENT, GPTConfig

GPT2 = dict(pos="learned", norm="layer", mlp="gelu", bias=True, qk_norm=False)
SETTINGS = {
    "default": {},
    "GPT-2": GPT2,
    "Llama": dict(mlp="swiglu", n_kv_head=2, qk_norm=False),
    "biases": dict(mlp="geglu", n_kv_head=1, bias=True),
}
SMALL = dict(n_layer=2, n_embd=264, head_dim=16, ffn_dim=72)


@pytest.fixture(autouse=True)
def as_if_on_a_gpu(monkeypatch):
    on_cpu(monkeypatch)
    gpu_train.kernel.cache_clear()
    monkeypatch.setattr(gpu_train, "usable", lambda x: x.dtype in gpu_train.TYPES)
    monkeypatch.setattr(gpu_train, "BLOCKS", 3)
    monkeypatch.setattr(core, "cpu_train", None)
    yield
    gpu_train.kernel.cache_clear()


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def check(found: mx.array, exact: np.ndarray, most: float = 2e-5):
    assert np.abs(np.array(found) - exact).max() < most * max(1e-3, np.abs(exact).max())


def slopes(f, x: np.ndarray, which=None) -> np.ndarray:
    """The gradient of f() by numbers of the float64 array x, all or some, which f reads: central differences."""
    flat, found = x.reshape(-1), []
    for i in range(x.size) if which is None else which:
        before = flat[i]
        flat[i] = before + 1e-5
        up = f()
        flat[i] = before - 1e-5
        found.append((up - f()) / 2e-5)
        flat[i] = before
    return np.array(found)


# ---- parts, in float64 ----------------------------------------------------------------------------------------------


def exact_norm(x: np.ndarray, p: dict, layer: bool) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True) if layer else x
    y = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
    return y * p["weight"] + p.get("bias", 0)


def exact_linear(x: np.ndarray, p: dict) -> np.ndarray:
    return x @ p["weight"].T + p.get("bias", 0)


def exact_block(config: GPTConfig, x: np.ndarray, p: dict, places: np.ndarray) -> np.ndarray:
    """Block of model.py: x (B, T, C), places (B, T)."""
    (B, T, _), D, layer = x.shape, config.head_dim, config.norm == "layer"
    normed = exact_norm(x, p["attn_norm"], layer)
    q, k, v = (exact_linear(normed, p["attn"][name]).reshape(B, T, -1, D).swapaxes(1, 2) for name in "qkv")
    if config.qk_norm:
        q, k = (exact_norm(y, p["attn"][f"{name}_norm"], False) for name, y in (("q", q), ("k", k)))
    if config.pos == "rope":
        angle = (places % DOCUMENT)[:, None, :, None] * config.rope_theta ** (-np.arange(0, D, 2) / D)
        q, k = (np.concatenate([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], -1)
                for a, b in ((y[..., :D // 2], y[..., D // 2:]) for y in (q, k)))
    k, v = (np.repeat(y, q.shape[1] // k.shape[1], axis=1) for y in (k, v))
    scores = q @ k.swapaxes(2, 3) / math.sqrt(D)
    rows, columns = places[:, None, :, None], places[:, None, None, :]
    seen = (rows >= columns) & (rows // DOCUMENT == columns // DOCUMENT)
    weights = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True)), 0)
    y = (weights / weights.sum(-1, keepdims=True) @ v).swapaxes(1, 2).reshape(B, T, -1)
    x = x + exact_linear(y, p["attn"]["out"])
    normed = exact_norm(x, p["mlp_norm"], layer)
    up = exact_linear(normed, p["mlp"]["up"])
    gate = exact_linear(normed, p["mlp"]["gate"]) if "gate" in p["mlp"] else up
    hidden = {"relu2": lambda x: np.maximum(x, 0)**2,
              "gelu": lambda x: x * (0.5 + 0.5 * np.vectorize(math.erf)(x / 2**.5)),
              "swiglu": lambda x: x / (1 + np.exp(-x)),
              "geglu": lambda x: x / (1 + np.exp(-(8 / math.pi)**.5 * (x + 0.044715 * x**3)))}[config.mlp](gate)
    return x + exact_linear(hidden * up if "gate" in p["mlp"] else hidden, p["mlp"]["down"])


@compiles
@pytest.mark.parametrize("kind, rows, width", [("RMSNorm", 5, 264), ("LayerNorm", 37, 768), ("LayerNorm", 3, 2056),
                                               ("RMSNorm", 1, 1000)])
def test_norm(kind, rows, width):
    """Odd numbers of rows, rows of one to eight warps."""
    module = getattr(core, kind)(width, eps=1e-5)
    p = {name: 1 + 0.3 * random(width, seed=i) for i, name in enumerate(module.parameters())}
    module.update(tree_map(lambda x: mx.array(x.astype(np.float32)), p))
    x, g = 0.5 + random(rows, width), random(rows, width, seed=1)

    def loss(x, parameters):
        module.update(parameters)
        return (gpu_train.norm(module, x) * mx.array(g.astype(np.float32))).sum()

    dx, dp = mx.grad(loss, (0, 1))(mx.array(x.astype(np.float32)), module.parameters())
    check(gpu_train.norm(module, mx.array(x.astype(np.float32))), exact_norm(x, p, kind == "LayerNorm"))
    some = np.random.default_rng(0).choice(x.size, 200, replace=False)
    check(dx.reshape(-1)[mx.array(some)], slopes(lambda: (exact_norm(x, p, kind == "LayerNorm") * g).sum(), x, some))
    for name in p:
        some = np.random.default_rng(0).choice(width, 100, replace=False)
        exact = slopes(lambda: (exact_norm(x, p, kind == "LayerNorm") * g).sum(), p[name], some)
        check(dp[name][mx.array(some)], exact)


@compiles
@pytest.mark.parametrize("name", SETTINGS)
def test_block(name):
    """The output and all gradients of a block, with positions of one document or of several."""
    gpt = build(SMALL | dict(n_layer=1) | SETTINGS[name]).train()
    block, config = gpt.blocks[0], gpt.config
    p = tree_map(lambda x: np.array(x).astype(np.float64), block.parameters())
    x, g = random(3, 7, 264), random(3, 7, 264, seed=1)
    documents = name == "biases"
    places = np.arange(7)[None] + np.zeros((3, 1), int)
    if documents:
        places = np.where(places < 3, places, places - 3 + DOCUMENT)
    offset = mx.array(places) if documents else 0

    def loss(x, parameters):
        block.update(parameters)
        return (gpu_train.block(block, x, offset, {}) * mx.array(g.astype(np.float32))).sum()

    y = gpu_train.block(block, mx.array(x.astype(np.float32)), offset, {})
    check(y, exact_block(config, x, p, places))
    dx, dp = mx.grad(loss, (0, 1))(mx.array(x.astype(np.float32)), block.parameters())
    rng, flat = np.random.default_rng(0), dict(tree_flatten(p))
    assert {name: d.shape for name, d in tree_flatten(dp)} == {name: array.shape for name, array in flat.items()}
    for found, array in ((dx, x), *((d, flat[name]) for name, d in tree_flatten(dp))):
        some = rng.choice(array.size, min(12, array.size), replace=False)
        exact = slopes(lambda: (exact_block(config, x, p, places) * g).sum(), array, some)
        assert np.abs(np.array(found.reshape(-1)[mx.array(some)]) - exact).max() < 1e-4 * max(1, np.abs(exact).max())


@compiles
@pytest.mark.parametrize("B, P, T, W", [(2, 3, 5, 32), (1, 2, 70, 64), (2, 1, 4, 256)])
def test_difference(B, P, T, W):
    """Differential attention's norm of pairs, and all gradients."""
    y, g = random(B, 2 * P, T, W), random(B, P, T, W)
    attn = core.DiffAttention(GPTConfig(n_head=2 * P, n_embd=P * W, diff_attn=True), 3).train()
    p = {name: 0.2 * random(W // 2, seed=i) for i, name in enumerate(core.DIFF_LAMBDAS)}
    p["weight"] = 1 + 0.3 * random(W)

    def exact():
        q1, k1, q2, k2, weight = p.values()
        x = y[:, 0::2] - (np.exp(q1 @ k1) - np.exp(q2 @ k2) + attn.lambda_0) * y[:, 1::2]
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight * (1 - attn.lambda_0)

    def loss(y, p):
        attn.update({name: x for name, x in p.items() if name != "weight"} | {"head_norm": {"weight": p["weight"]}})
        return (gpu_train.difference(attn, y) * mx.array(g.astype(np.float32))).sum()

    arrays = [mx.array(y.astype(np.float32)), {name: mx.array(x.astype(np.float32)) for name, x in p.items()}]
    dy, dp = mx.grad(loss, (0, 1))(*arrays)
    loss(*arrays)
    check(gpu_train.difference(attn, arrays[0]), exact())
    some = np.random.default_rng(0).choice(y.size, 200, replace=False)
    check(dy.reshape(-1)[mx.array(some)], slopes(lambda: (exact() * g).sum(), y, some))
    for name, x in p.items():
        check(dp[name], slopes(lambda: (exact() * g).sum(), x))


@compiles
def test_loss(monkeypatch):
    """The weighted cross-entropy, its gradients, and chunks of which the last is shorter."""
    gpt = build(dict(n_embd=64, vocab_size=1096)).train()
    x, targets = random(21, 64), np.random.default_rng(0).integers(0, 1096, 21)
    weights, head = np.arange(21) % 4 / 2.0, np.array(gpt.embed.weight).astype(np.float64)
    monkeypatch.setattr(gpu_train, "LOSS_CHUNK", 9 * 1096)
    loss_of = core.chunked_loss
    p = np.exp(x @ head.T - (x @ head.T).max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    g = (p - np.eye(1096)[targets]) * weights[:, None]

    def loss(weight, x):
        gpt.embed.weight = weight
        return 0.5 * loss_of(gpt, x, mx.array(targets), mx.array(weights.astype(np.float32)))

    value, (dweight, dx) = mx.value_and_grad(loss, (0, 1))(gpt.embed.weight, mx.array(x.astype(np.float32)))
    check(value, 0.5 * -(weights * np.log(p[np.arange(21), targets])).sum())
    check(dweight, 0.5 * g.T @ x)
    check(dx, 0.5 * g @ head)


@compiles
@pytest.mark.parametrize("n, dtype", [(1, mx.bfloat16), (2, mx.bfloat16), (3, mx.float32)], ids=str)
def test_arrays_in_rows(monkeypatch, n, dtype):
    """What processes send: the kernels' rows are those of MLX, and 18 arrays come back, of which 16 go in a kernel."""
    shapes = [(6, 5), (24,), (3,), (2, 3, 35)] + [(6,)] * 14
    if n == 2:
        shapes[2] = (2,)
    arrays = [mx.array(random(*shape, seed=i)).astype(mx.float32) for i, shape in enumerate(shapes)]
    rows = gpu_train.in_rows(arrays, dtype, n)
    assert gpu_train.in_rows([*arrays, mx.zeros(7 * n + 1)], dtype, n) is None or n == 1
    back = gpu_train.from_rows(rows, shapes, mx.float32)
    flat = np.concatenate([np.array(x).reshape(n, -1) for x in arrays], axis=1)
    assert rows.dtype == dtype and np.array_equal(np.array(rows.astype(mx.float32)),
                                                  np.array(mx.array(flat).astype(dtype).astype(mx.float32)))
    for x, found in zip(arrays, back, strict=True):
        assert mx.array_equal(x.astype(dtype).astype(mx.float32), found)
    monkeypatch.setattr(core, "gpu_train", None)
    assert mx.array_equal(parallel.in_rows(arrays, dtype, n), rows)
    assert all(map(mx.array_equal, parallel.from_rows(rows, shapes, mx.float32), back))


@compiles
def test_adamw(monkeypatch):
    """Three updates of arrays of odd sizes, in groups: clipped or not; matrices decay; the state is optim.Adam's."""
    monkeypatch.setattr(gpu_train, "READ", 12)
    monkeypatch.setattr(gpu_train, "PIECE", 100)
    gpt = build(dict(n_layer=1, n_head=1, n_embd=17, head_dim=16, ffn_dim=9, vocab_size=23, **GPT2))
    opt = optim.Adam(3e-2, betas=[0.9, 0.95], bias_correction=True)
    opt.init(gpt.trainable_parameters())
    p = {name: np.array(x).astype(np.float64) for name, x in tree_flatten(gpt.parameters())}
    m, v = ({name: np.zeros(x.shape) for name, x in p.items()} for _ in "mv")
    for step in range(1, 4):
        scale = 1.0 if step < 3 else 1e-3
        grads = tree_map(lambda x, s=step, k=scale: mx.array((k * random(*x.shape, seed=s)).astype(np.float32)),
                         gpt.trainable_parameters())
        length = gpu_train.adamw(gpt, opt, grads, 2.0, 0.1)
        norm = math.sqrt(sum((np.array(g).astype(np.float64)**2).sum() for _, g in tree_flatten(grads)))
        check(length, np.array(norm))
        check(gpu_train.clip_grad_norm(grads, 2.0)[1], np.array(norm))
        for name, g in tree_flatten(grads):
            g = np.array(g).astype(np.float64) * min(1, 2.0 / norm)
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.95 * v[name] + 0.05 * g * g
            decayed = p[name] * (1 - 0.1 * 3e-2) if g.ndim > 1 else p[name]
            root = np.sqrt(v[name] / (1 - 0.95**step)) + 1e-8
            p[name] = decayed - 3e-2 * m[name] / (1 - 0.9**step) / root
    assert opt.step.item() == 3
    state = dict(tree_flatten(opt.state))
    for name, x in tree_flatten(gpt.parameters()):
        check(x, p[name]), check(state[f"{name}.m"], m[name]), check(state[f"{name}.v"], v[name])
    clipped = dict(tree_flatten(gpu_train.clip_grad_norm(tree_map(lambda g: g * 1e3, grads), 2.0)[0]))
    assert math.isclose(math.sqrt(sum(float((x * x).sum()) for x in clipped.values())), 2.0, rel_tol=1e-5)


# ---- whole models, beside model.py ----------------------------------------------------------------------------------


def gradients(gpt, monkeypatch, plain: bool = False, places=None) -> tuple[float, dict]:
    """The loss and the gradients by name; plain: without gpu_train.py."""
    idx = tokens(3, 10)
    with monkeypatch.context() as patched:
        if plain:
            patched.setattr(core, "gpu_train", None)
        value, grads = nn.value_and_grad(gpt, gpt.loss)(idx[:, :-1], idx[:, 1:], places=places)
        return value.item(), {name: np.array(g.astype(mx.float32)) for name, g in tree_flatten(grads)}


def used(monkeypatch) -> list:
    """A list to which each block, norm and loss that gpu_train.py computes adds its name."""
    found = []

    def counted(name, f):
        def call(*arguments):
            y = f(*arguments)
            found.extend([name] * (y is not None))
            return y
        return call

    for name in ("block", "norm", "loss"):
        monkeypatch.setattr(gpu_train, name, counted(name, getattr(gpu_train, name)))
    return found


def same(a: dict, b: dict, most: float = 1e-4):
    """Gradients that agree within `most` of the largest of all."""
    assert list(a) == list(b)
    largest = max(np.abs(g).max() for g in b.values())
    assert all(a[name].shape == g.shape and np.abs(a[name] - g).max() < most * largest for name, g in b.items())


@compiles
@pytest.mark.parametrize("what", ["checkpoint_every", "frozen", "bfloat16 weights", "places", "another batch"])
def test_model(monkeypatch, what):
    gpt, found, places = build(SMALL).train(), used(monkeypatch), None
    if what == "checkpoint_every":
        gpt.checkpoint_every = 1
    if what == "frozen":
        gpt.embed.freeze(), gpt.blocks[0].freeze(), gpt.blocks[1].attn.k.freeze(), gpt.blocks[1].mlp.down.freeze()
    if what == "bfloat16 weights":
        gpt.set_dtype(mx.bfloat16)
        gpt.compute_dtype = mx.float32
    if what == "places":
        row = [0, 1, 2, 3, DOCUMENT, DOCUMENT + 1, DOCUMENT + 2, core.PADDING, core.PADDING]
        places = mx.array(np.tile(row, (3, 1)))
    value, ours = gradients(gpt, monkeypatch, places=places)
    assert {"block", "norm", "loss"} <= {*found}
    plain, theirs = gradients(gpt, monkeypatch, plain=True, places=places)
    assert math.isclose(value, plain, rel_tol=1e-5)
    same(ours, theirs, 1e-2 if what == "bfloat16 weights" else 1e-4)


@compiles
@pytest.mark.parametrize("settings", [
    dict(alibi=True), dict(sliding_window=3), dict(sliding_window=4, sinks=1), dict(sink_logits=True),
    dict(diff_attn=True), dict(mod="soft"), dict(mod="topk", mod_capacity=0.5), dict(n_expert=4, ffn_dim=32),
    dict(n_expert=4, n_shared_expert=1, bias=True, mlp="swiglu", norm="layer")], ids=str)
def test_variants(monkeypatch, settings):
    """Blocks of which model.py computes a part: attention from the queries, keys and values, experts, routing."""
    gpt, found = build(SMALL | dict(n_head=4) | settings).train(), used(monkeypatch)
    value, ours = gradients(gpt, monkeypatch)
    assert found.count("block") == 2
    plain, theirs = gradients(gpt, monkeypatch, plain=True)
    assert math.isclose(value, plain, rel_tol=1e-5)
    same(ours, theirs)


@compiles
@pytest.mark.parametrize("name, dtype", [("default", mx.bfloat16), ("GPT-2", mx.float16)], ids=str)
def test_16_bits(monkeypatch, name, dtype):
    """As near to the gradients in float32 as model.py's."""
    gpt = build(SMALL | SETTINGS[name]).train()
    _, exact = gradients(gpt, monkeypatch, plain=True)
    gpt.compute_dtype = dtype
    found = gradients(gpt, monkeypatch)[1], gradients(gpt, monkeypatch, plain=True)[1]
    ours, plain = (sum(np.square(g[name] - d).sum() for name, d in exact.items()) for g in found)
    assert ours < 1.5 * plain


@compiles
def test_adapters(monkeypatch):
    """LoRA: its layers are model.py's, and the norms and the loss are gpu_train.py's."""
    gpt, found = build(SMALL), used(monkeypatch)
    attach(gpt, "attn, mlp", rank=4, alpha=8)
    gpt.train()
    for name, p in tree_flatten(gpt.trainable_parameters()):
        assert name.endswith((".a", ".b"))
        p[:] = 0.1 * mx.array(random(*p.shape).astype(np.float32))
    value, ours = gradients(gpt, monkeypatch)
    assert "block" not in found and {"norm", "loss"} <= {*found}
    plain, theirs = gradients(gpt, monkeypatch, plain=True)
    assert math.isclose(value, plain, rel_tol=1e-5)
    same(ours, theirs)


# ---- where model.py must compute ------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [
    dict(diff_attn=True, diff_attn_version=2), dict(yoco=True), dict(value_residual=True), dict(value_embeds=True),
    dict(parallel=True),
    dict(norm_place="both"), dict(qk_norm_width=True), dict(mlp="swiglu_clip"), dict(head_dim=24),
    dict(residual_scale=0.5), dict(n_embd=60, n_head=2, qk_norm=False, pos="none")], ids=str)
def test_not_known(monkeypatch, settings):
    """Settings and sizes that the blocks' kernels do not know; norms are too narrow, and the loss has none here."""
    gpt, found = build(settings | dict(vocab_size=100)).train(), used(monkeypatch)
    ours, plain = gradients(gpt, monkeypatch), gradients(gpt, monkeypatch, plain=True)
    assert not found
    assert ours[0] == plain[0]


def test_not_in_training(monkeypatch):
    """Evaluation, a cache, a tap and dropout."""
    gpt, found, idx = build({}), used(monkeypatch), tokens(2, 9)
    gpt.loss(idx, idx)
    gpt(idx, cache=gpt.make_cache())
    gpt.train()
    gpt(idx, tap=lambda site, layer, x: x)
    gpt(idx, cache=gpt.make_cache())
    gpt.dropout = 0.1
    gpt(idx)
    assert not found


def test_optimizers_that_are_not_known():
    gpt = build({})
    grads = gpt.trainable_parameters()
    for opt in (optim.Lion(1e-3), optim.AdamW(1e-3), optim.Adam(1e-3), optim.Adam(1e-3, bias_correction=True),
                optim.Adam(lambda step: 1e-3, bias_correction=True)):
        assert gpu_train.adamw(gpt, opt, grads, 1.0, 0.1) is None
    gpt.set_dtype(mx.bfloat16)
    opt = optim.Adam(1e-3, bias_correction=True)
    assert gpu_train.adamw(gpt, opt, gpt.trainable_parameters(), 1.0, 0.1) is None


def test_without_a_gpu(monkeypatch, tmp_path):
    """Where there is no GPU, no NVRTC, or no gpu_train.cu."""
    monkeypatch.undo()
    assert not gpu_train.usable(mx.zeros(3)) or mx.cuda.is_available()

    def missing(source):
        raise OSError("no NVRTC")

    for changes in (dict(compiled=missing), dict(FOLDER=tmp_path)):
        with monkeypatch.context() as patched:
            for what, value in changes.items():
                patched.setattr(gpu_kernels, what, value)
            patched.setattr(mx.cuda, "is_available", lambda: True)
            gpu_train.kernel.cache_clear(), gpu_train.ready.cache_clear()
            assert not gpu_train.ready()
    gpu_train.ready.cache_clear()


# ---- deletion -------------------------------------------------------------------------------------------------------


def test_deletion(tmp_path):
    """The other files run without gpu_train.cu, and without gpu_train.py."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    (tmp_path / "book.txt").write_text("a text of few words. " * 400)
    for deleted in ("gpu_train.cu", "gpu_train.py"):
        (tmp_path / deleted).unlink(missing_ok=True)
        result = subprocess.run([sys.executable, "train.py", "--data=book.txt", "--tokenizer=byte", "--max_iters=2",
                                 "--n_layer=1", "--n_embd=32", "--block_size=16", "--sample_tokens=3",
                                 "--overwrite=True", "--eval_windows=2", "--optimizer=adamw"], cwd=tmp_path,
                                capture_output=True, text=True)
        assert result.returncode == 0 and "step      2 | val" in result.stdout, result.stderr
    users = [path.name for path in ROOT.glob("*.py") if re.search(r"^\s*import gpu_train\b", path.read_text(), re.M)]
    assert users == ["model.py"]
