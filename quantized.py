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

    def weight(after: mx.array) -> mx.array:
        packed = mx.depends([layer.weight], [after])[0]  # else all layers would be unpacked ahead
        return mx.dequantize(packed, layer.scales, layer.get("biases"), layer.group_size, layer.bits,
                             layer.mode).astype(x.dtype)

    @mx.custom_function
    def product(x):
        return x @ weight(x).T

    @product.vjp
    def product_backward(x, cotangent, _):
        return cotangent @ weight(cotangent)

    return product(x) + layer.bias if "bias" in layer else product(x)


nn.QuantizedLinear.__call__ = nn.QuantizedEmbedding.as_linear = quantized_linear


def dense_shape(linear: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer, packed or not."""
    outputs, inputs = linear.weight.shape
    return outputs, inputs * 32 // linear.bits if isinstance(linear, nn.QuantizedLinear) else inputs


def dense_weight(linear: nn.Module) -> mx.array:
    """(out, in) of a linear layer, packed or not; float32."""
    weight = linear.weight
    if isinstance(linear, nn.QuantizedLinear):
        weight = mx.dequantize(weight, linear.scales, linear.biases, linear.group_size, linear.bits)
        if "order" in linear:
            weight = weight[:, mx.argsort(linear.order)]
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
