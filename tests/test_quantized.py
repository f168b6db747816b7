"""quantized.py against float64 numpy, and the memory that it takes."""
import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from test_cpu import near, numbers

import quantized
from config import UserError
from model import GPT, GPTConfig, KVCache, load_checkpoint, save_checkpoint


@pytest.mark.parametrize("shape", [(1, 128), (2, 2, 128), (5, 128), (3, 11, 128)])
@pytest.mark.parametrize(("bits", "group_size", "bias"), [(2, 32, False), (3, 64, True), (4, 64, True), (8, 128, True)])
def test_linear(bits, group_size, bias, shape):
    """Few rows and many give what MLX's kernel gives; the gradient is that of a dense matmul."""
    dense = nn.Linear(128, 40, bias=bias)
    layer, x, g = nn.QuantizedLinear.from_linear(dense, group_size, bits), numbers(*shape), numbers(*shape[:-1], 40)
    weight = np.array(mx.dequantize(layer.weight, layer.scales, layer.biases, group_size, bits), np.float64)
    expected = x @ weight.T + (np.array(dense.bias, np.float64) if bias else 0)
    y, (gradient,) = mx.vjp(lambda x: quantized.quantized_linear(layer, x), [mx.array(x)], [mx.array(g)])
    assert near(y[0], expected) and near(gradient, g @ weight)
    if mx.default_device() == mx.cpu:  # on CUDA, MLX's is wrong for several rows of float32
        assert near(y[0], quantized.mlx_quantized_linear(layer, mx.array(x)))


@pytest.mark.parametrize("inputs", [64, 96, 128, 256])
@pytest.mark.parametrize("rows", [1, 2, 9, 64, 600])
def test_linear_in_bfloat16(inputs, rows):
    """Any width and number of rows: MLX's product on CUDA is wrong for rows of 64 numbers."""
    layer = nn.QuantizedLinear.from_linear(nn.Linear(inputs, 40, bias=False), 32, 4)
    x = mx.array(numbers(rows, inputs)).astype(mx.bfloat16)
    weight = np.array(mx.dequantize(layer.weight, layer.scales, layer.biases, 32, 4), np.float64)
    expected = np.array(x.astype(mx.float32), np.float64) @ weight.T
    assert np.abs(np.array(layer(x).astype(mx.float32)) - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("rows", [1, 40])
def test_dtype_is_that_of_the_input(rows):
    """Scales and biases of another dtype do not change the dtype of the output, nor that of the gradient."""
    layer = nn.QuantizedLinear.from_linear(nn.Linear(128, 40), 64, 4)
    layer.set_dtype(mx.float16)
    x = mx.array(numbers(rows, 128)).astype(mx.bfloat16)
    y, (gradient,) = mx.vjp(lambda x: layer(x), [x], [mx.ones((rows, 40), mx.bfloat16)])
    assert y[0].dtype == gradient.dtype == mx.bfloat16


def test_embedding():
    layer, x = nn.QuantizedEmbedding.from_embedding(nn.Embedding(40, 128), 64, 4), numbers(3, 7, 128)
    weight = np.array(mx.dequantize(layer.weight, layer.scales, layer.biases, 64, 4), np.float64)
    assert near(quantized.quantized_linear(layer, mx.array(x)), x @ weight.T)


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="on CUDA, MLX frees memory later")
def test_layers_stay_packed():
    """Of 64 layers, a few are dense at a time, forward and backward."""
    layers = [nn.QuantizedLinear.from_linear(nn.Linear(256, 256, bias=False), 64, 4) for _ in range(64)]
    x = mx.array(numbers(8, 256))
    mx.eval(x, [layer.parameters() for layer in layers])

    def through_all(x):
        for layer in layers:
            x = quantized.quantized_linear(layer, x)
        return x.sum()

    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(mx.grad(through_all)(x))
    assert mx.get_peak_memory() - before < 64 * 256 * 256 * 4 / 3


@pytest.mark.parametrize("bits, group_size", [(2, 32), (3, 64), (4, 64), (8, 128)])
def test_checkpoint_stays_packed(bits, group_size, tmp_path):
    """Bits and group size follow from the file's shapes, layer by layer; loading makes nothing dense on the way."""
    path = str(tmp_path / "model.safetensors")
    model = GPT(GPTConfig(n_layer=4, n_embd=256, n_head=4, vocab_size=64, block_size=64, qk_norm=False))
    half = sum(p.size * 2 for name, p in tree_flatten(model.parameters()) if "mlp.up" not in name)
    nn.quantize(model, group_size, bits, class_predicate=lambda path, p: "up" not in path and isinstance(p, nn.Linear))
    nn.quantize(model, 64, 8, class_predicate=lambda path, module: isinstance(module, nn.Linear))
    model.set_dtype(mx.float16)
    idx = mx.arange(40)[None]
    logits = np.array(model(idx))
    save_checkpoint(path, model, {})
    sizes = {name: p.nbytes for name, p in tree_flatten(model.parameters())}
    own = sum(size for name, size in sizes.items() if "mlp.up" not in name)
    assert own < (bits / 16 + 2 / group_size + 0.02) * half  # for 4 bits in groups of 64: 0.30
    del model
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    found, _ = load_checkpoint(path)
    mx.eval(found.parameters())
    assert mx.get_peak_memory() - before < 1.2 * sum(sizes.values())  # a dense matrix would take four times as much
    assert np.array_equal(np.array(found(idx)), logits)
    assert (found.blocks[0].attn.q.bits, found.blocks[0].attn.q.group_size) == (bits, group_size)
    assert (found.blocks[0].mlp.up.bits, found.blocks[0].mlp.up.group_size) == (8, 64)


def test_columns_in_another_order():
    """A layer with `order` holds its columns in that order, and computes what a layer without it does."""
    rng, dense = np.random.default_rng(0), nn.Linear(128, 40, bias=False)
    order, x = mx.array(rng.permutation(128)), mx.array(numbers(7, 128))
    turned = nn.Linear(128, 40, bias=False)
    turned.weight = dense.weight[:, order]
    layer = nn.QuantizedLinear.from_linear(turned, 64, 8)
    weight = np.array(mx.dequantize(layer.weight, layer.scales, layer.biases, 64, 8), np.float64)
    back = np.empty_like(weight)
    back[:, np.array(order)] = weight
    layer.order = order
    wanted = np.array(x) @ back.T
    assert near(layer(x), wanted) and near(layer(x[:1]), wanted[:1])
    assert np.array_equal(np.array(quantized.dense_weight(layer)), back.astype(np.float32))


# ---- quantized key/value cache ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [
    dict(), dict(n_kv_head=1), dict(sliding_window=6), dict(sliding_window=5, sinks=2), dict(diff_attn=True),
    dict(yoco=True), dict(mod="topk"), dict(alibi=True),
], ids=str)
def test_packed_cache(settings, monkeypatch):
    """However the cache grows: at 8 bits the logits are near those without a cache, at 4 bits less so."""
    monkeypatch.setattr(KVCache, "STEP", 5)
    model = GPT(GPTConfig(block_size=64, vocab_size=64, n_layer=2, n_head=2, n_embd=64, **settings), seed=3).eval()
    idx = mx.array(np.random.default_rng(0).integers(0, 64, (2, 23)))
    plain, logits = model(idx), {}
    for bits in (0, 8, 4):
        cache = model.make_cache(bits)
        pieces = [idx[:, :3], *mx.split(idx[:, 3:], 20, axis=1)]
        logits[bits] = mx.concatenate([model(piece, cache=cache) for piece in pieces], axis=1)
    assert mx.abs(logits[0] - plain).max() < 1e-5 * mx.abs(plain).max() + 1e-6
    errors = [mx.abs(logits[bits] - plain).max() / mx.abs(plain).max() for bits in (8, 4)]
    assert 0 < errors[0] < 0.02 and errors[0] < errors[1] < 0.3


def test_packed_rows():
    """Rows that are written in pieces and in any order are read as MLX's rounding of what was written."""
    x = mx.random.normal((2, 3, 12, 64), key=mx.random.key(0))
    rows = quantized.packed_rows(4, 64)((2, 3, 8, 64), mx.float32)
    rows[..., :5, :] = x[..., :5, :]
    rows = quantized.joined(rows, quantized.packed_rows(4, 64)((2, 3, 4, 64), mx.float32))
    rows[..., mx.array([11, 7]), :] = x[..., 10:, :]
    expected = mx.dequantize(*mx.quantize(x, 32, 4), 32, 4)
    assert rows.shape == (2, 3, 12, 64) and mx.array_equal(rows[..., :5, :], expected[..., :5, :])
    assert mx.array_equal(rows[..., 11:, :], expected[..., 10:11, :])
    assert mx.array_equal(rows[..., 7:8, :], expected[..., 11:, :]) and mx.abs(rows[..., 8:11, :]).max() == 0
    assert rows.nbytes == 2 * 3 * 12 * (64 / 2 + 2 * 2 * 4)


@pytest.mark.parametrize("bits, head_dim, says", [(7, 64, "kv_bits=7"), (4, 48, "head_dim=48")])
def test_packed_rows_are_refused(bits, head_dim, says):
    with pytest.raises(UserError, match=says):
        GPT(GPTConfig(n_layer=1, n_head=1, n_embd=head_dim), None).make_cache(bits)
