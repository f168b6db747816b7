"""quantized.py against float64 numpy, and its memory."""
import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from test_cpu import near, numbers

import quantized
from model import GPT, GPTConfig, load_checkpoint, save_checkpoint


@pytest.mark.parametrize("shape", [(1, 128), (2, 2, 128), (5, 128), (3, 11, 128)])
@pytest.mark.parametrize(("bits", "group_size", "bias"), [(2, 32, False), (3, 64, True), (4, 64, True), (8, 128, True)])
def test_linear(bits, group_size, bias, shape):
    """As MLX's kernel, for few rows and many, and its gradient that of a dense matmul."""
    dense = nn.Linear(128, 40, bias=bias)
    layer, x, g = nn.QuantizedLinear.from_linear(dense, group_size, bits), numbers(*shape), numbers(*shape[:-1], 40)
    weight = np.array(mx.dequantize(layer.weight, layer.scales, layer.biases, group_size, bits), np.float64)
    expected = x @ weight.T + (np.array(dense.bias, np.float64) if bias else 0)
    y, (gradient,) = mx.vjp(lambda x: quantized.quantized_linear(layer, x), [mx.array(x)], [mx.array(g)])
    assert near(y[0], expected) and near(gradient, g @ weight)
    if mx.default_device() == mx.cpu:  # on CUDA, MLX's is wrong for several rows of float32
        assert near(y[0], quantized.row_by_row(layer, mx.array(x)))


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
    model = GPT(GPTConfig(n_layer=8, n_embd=512, n_head=8, vocab_size=64, block_size=64, qk_norm=False))
    half = sum(p.size * 2 for name, p in tree_flatten(model.parameters()) if "mlp.up" not in name)
    nn.quantize(model, group_size, bits, class_predicate=lambda path, p: "up" not in path and type(p) is nn.Linear)
    nn.quantize(model, 64, 8, class_predicate=lambda path, module: type(module) is nn.Linear)
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
    assert mx.get_peak_memory() - before < 1.05 * sum(sizes.values())
    assert np.array_equal(np.array(found(idx)), logits)
    assert (found.blocks[0].attn.q.bits, found.blocks[0].attn.q.group_size) == (bits, group_size)
    assert (found.blocks[0].mlp.up.bits, found.blocks[0].mlp.up.group_size) == (8, 64)


def test_columns_in_another_order():
    """`order`: the layer holds its columns so; what it computes is the same."""
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
