"""Quantized layers: weights that stay packed integers of 2 to 8 bits in memory, in MLX's affine format.

    w = scale * q + bias        q an integer; scale and bias of each group of 32, 64 or 128 numbers of a row

MLX's product with such weights unpacks them again for every few rows, which suits decoding. For many rows it is faster
to unpack them once and multiply as usual: 70 times on a CPU, 5 times on CUDA. Metal's kernels need no help.
"""
import re
from collections.abc import Callable
from functools import partial

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn

from config import UserError

BITS, GROUP_SIZES = (2, 3, 4, 5, 6, 8), (32, 64, 128)
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


# ---- keys and values -------------------------------------------------------------------------------------------------


class PackedRows:
    """Keys or values of a cache (B, KV, S, D), each token's packed as it comes, in groups of 32. Rows are written and
    read as those of an array: rows[..., start:end, :]."""

    def __init__(self, shape: tuple, dtype: mx.Dtype, bits: int):
        self.bits, self.parts = bits, mx.quantize(mx.zeros(shape, dtype), 32, bits)
        self.parts = [mx.contiguous(part) for part in self.parts]

    def __setitem__(self, rows, x: mx.array):
        for part, new in zip(self.parts, mx.quantize(x, 32, self.bits), strict=True):
            part[rows] = new

    def __getitem__(self, rows) -> mx.array:
        words, scales, biases = (part[rows] for part in self.parts)
        if words.size == 0:
            return mx.zeros((*words.shape[:3], self.shape[3]), scales.dtype)
        return mx.dequantize(words, scales, biases, 32, self.bits)

    @property
    def shape(self) -> tuple:
        return (*self.parts[0].shape[:3], self.parts[0].shape[3] * 32 // self.bits)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


def packed_rows(bits: int, head_dim: int) -> Callable:
    """What makes room (shape, dtype) in a cache."""
    if bits not in BITS:
        raise UserError(f"{bits} bits of keys and values is not one of {', '.join(map(str, BITS))}")
    if head_dim % 32:
        raise UserError(f"head_dim={head_dim} is no multiple of 32: its keys and values cannot be packed")
    return partial(PackedRows, bits=bits)


def joined(first: mx.array | PackedRows, second: mx.array | PackedRows) -> mx.array | PackedRows:
    """More room behind the rows of a cache."""
    if isinstance(first, mx.array):
        return mx.concatenate([first, second], axis=2)
    first.parts = [mx.concatenate(parts, axis=2) for parts in zip(first.parts, second.parts, strict=True)]
    return first


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


def natural(path: str) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]


def replace_module(model: nn.Module, path: str, module: nn.Module):
    *parents, name = path.split(".")
    for part in parents:
        model = model[int(part)] if isinstance(model, list) else model[part]
    model[name] = module


# ---- two thin matrices instead of one --------------------------------------------------------------------------------


class Factored(nn.Module):
    """A linear layer of the weight u v: u (out, k), v (k, in)."""

    def __init__(self, inputs: int, outputs: int, rank: int, bias: bool):
        super().__init__()
        self.v, self.u = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        return self.u(self.v(x))


def factor_like(model: nn.Module, arrays: dict[str, mx.array]):
    """Make those layers of a model factored that are so in `arrays` (by name)."""
    for path, module in model.named_modules():
        thin = arrays.get(f"{path}.v.scales", arrays.get(f"{path}.v.weight"))  # packed, or not
        if isinstance(module, nn.Linear) and f"{path}.u.weight" in arrays and thin is not None and thin.ndim == 2:
            outputs, inputs = module.weight.shape
            replace_module(model, path, Factored(inputs, outputs, len(thin), "bias" in module))
