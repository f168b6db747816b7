"""quantized.py against float64 numpy, and its memory."""
import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from test_cpu import near, numbers

import quantized


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
