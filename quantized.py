"""Quantized layers: weights that stay packed integers of 2 to 8 bits in memory, in MLX's affine format.

    w = scale * q + bias        q an integer; scale and bias of each group of 32, 64 or 128 numbers of a row

MLX's product with such weights unpacks them again for every few rows, which suits decoding. For many rows it is faster
to unpack them once and multiply as usual: 70 times on a CPU, 5 times on CUDA. Metal's kernels need no help.
"""
import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn

row_by_row = nn.QuantizedLinear.__call__


def few_rows(x: mx.array) -> bool:
    """Whether MLX's own product is the faster one. On CUDA, MLX 0.32's is wrong for two or more rows of float32."""
    most = 4 if mx.default_device() == mx.cpu else 1 if x.dtype == mx.float32 else 512
    return mx.metal.is_available() or x.size <= most * x.shape[-1]


def quantized_linear(layer: nn.QuantizedLinear | nn.QuantizedEmbedding, x: mx.array) -> mx.array:
    """x (..., in) through a quantized layer -> (..., out). What is unpacked is unpacked again in the backward pass, so
    that no more than a few layers are dense at a time. A layer with an `order` holds its columns in that order."""
    if "order" in layer:
        x = x[..., layer.order]
    if few_rows(x):
        return row_by_row(layer, x)

    @mx.custom_function
    def product(x):
        return x @ unpacked(layer, x).T

    @product.vjp
    def product_backward(x, cotangent, _):
        return cotangent @ unpacked(layer, cotangent)

    return product(x) + layer.bias if "bias" in layer else product(x)


def unpacked(layer: nn.Module, x: mx.array) -> mx.array:
    """A packed layer's weight (..., out, in) in the dtype of x, not before x is there: else MLX would unpack all layers
    ahead."""
    packed = mx.depends([layer.weight], [x])[0]
    return mx.dequantize(packed, layer.scales, layer.biases, layer.group_size, layer.bits).astype(x.dtype)


nn.QuantizedLinear.__call__ = nn.QuantizedEmbedding.as_linear = quantized_linear


def dense_shape(linear: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer, packed or not."""
    outputs, inputs = linear.weight.shape
    return outputs, inputs * 32 // linear.bits if isinstance(linear, nn.QuantizedLinear) else inputs


def dense_weight(module: nn.Module) -> mx.array:
    """(..., out, in) of a linear layer, an embedding or experts, packed or not; float32."""
    weight = module.weight
    if "scales" in module:
        weight = mx.dequantize(weight, module.scales, module.biases, module.group_size, module.bits)
    if "order" in module:
        weight = mx.take_along_axis(weight, mx.argsort(module.order, axis=-1)[..., None, :], axis=-1)
    return weight.astype(mx.float32)


def pack_like(model: nn.Module, arrays: dict[str, mx.array]):
    """Make the layers of a model packed that are so in `arrays` (by name): those with scales. Bits and group size
    follow from the shapes."""

    def settings(path: str, module: nn.Module):
        scales = arrays.get(f"{path}.scales")
        if scales is None:
            return False
        inputs = module.weight.shape[-1]
        return {"group_size": inputs // scales.shape[-1], "bits": arrays[f"{path}.weight"].shape[-1] * 32 // inputs}

    nn.quantize(model, class_predicate=settings)
    for path, module in model.named_modules():
        if f"{path}.order" in arrays:
            module.order = arrays[f"{path}.order"]
            module.freeze()
