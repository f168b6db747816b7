"""Save memory: quantized layers, low-rank layers, and a quantized key/value cache.

    w = scale * q + bias        quantized: an integer q of 2 to 8 bits for each weight w; a scale and a bias for each
                                group of 32, 64 or 128 weights of a row (MLX's affine format)
    W = u v                     low rank: u (out, k) and v (k, in)

"Packed" means that the integers q lie side by side, bit by bit, in words of 32 bits; to unpack is to compute w. MLX's
product with a packed weight unpacks it again for every few rows of the input, which suits decoding. For many rows it
is faster to unpack the weight once and to multiply as usual: 70 times on a CPU, 5 times on CUDA. On Metal, MLX's
product is used for any number of rows. On a Linux CPU, matvec.py has a faster product for few rows.
"""
import re
import sys
from collections.abc import Callable
from functools import partial

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn

from config import UserError

try:
    import matvec  # faster products on a CPU
except ImportError:
    matvec = None

BITS, GROUP_SIZES = (2, 3, 4, 5, 6, 8), (32, 64, 128)
LARGE = 2**18  # weights of a matrix; for a smaller one, to wait for its input costs more than it gains
mlx_quantized_linear = nn.QuantizedLinear.__call__

# ---- quantized layers ------------------------------------------------------------------------------------------------


def few_rows(x: mx.array) -> bool:
    """Whether x (..., in) has so few rows that MLX's product with a packed weight is the faster one. On CUDA, that
    product is wrong for two or more rows of float32, or of 64 numbers (MLX 0.32)."""
    most = 4 if mx.default_device() == mx.cpu else 1 if x.dtype == mx.float32 or x.shape[-1] < 128 else 512
    return mx.metal.is_available() or x.size <= most * x.shape[-1]


def quantized_linear(layer: nn.QuantizedLinear | nn.QuantizedEmbedding, x: mx.array) -> mx.array:
    """x (..., in) through a quantized layer -> (..., out). The backward pass unpacks the weight again, so that only a
    few layers are unpacked at a time. Where a layer has an `order` (in,), column j of its weight is for input order[j].
    """
    if "order" in layer:
        x = x[..., layer.order]
    if few_rows(x) and mx.default_device() != mx.cpu or layer.mode != "affine":  # other modes: of mlx-lm's models
        return mlx_quantized_linear(layer, x).astype(x.dtype)

    @mx.custom_function
    def product(x):
        y = cpu_product(layer, x)
        return x @ unpacked(layer, x).T if y is None else y

    @product.vjp
    def product_backward(x, cotangent, _):
        return cotangent @ unpacked(layer, cotangent)

    return product(x) + layer.bias.astype(x.dtype) if "bias" in layer else product(x)


def cpu_product(layer: nn.Module, x: mx.array) -> mx.array | None:
    """x (..., in) times the packed weight of a layer -> (..., out); None where it is faster to unpack the weight."""
    format = layer.weight, layer.scales, layer.biases, layer.group_size, layer.bits
    y = None
    if matvec and mx.default_device() == mx.cpu and x.size <= matvec.ROWS * x.shape[-1]:
        y = matvec.product(x, *format)
    if y is None and few_rows(x):
        y = mx.quantized_matmul(x, *format[:3], True, *format[3:]).astype(x.dtype)
    return y


def dense_product(layer: nn.Module, x: mx.array) -> mx.array | None:
    """A single row x (..., in) times the transpose of a large dense weight on a CPU, as in decoding, for which BLAS is
    several times slower: -> (..., out), without a bias. None for all else, and in training: the weight would get no
    gradient."""
    if not matvec or x.size != x.shape[-1] or layer.training or layer.weight.size < LARGE or (
            mx.default_device() != mx.cpu):
        return None

    @mx.custom_function
    def product(x):
        y = matvec.product(x, layer.weight)
        return x @ layer.weight.astype(x.dtype).T if y is None else y

    @product.vjp
    def product_backward(x, cotangent, _):
        return cotangent @ layer.weight.astype(cotangent.dtype)

    return product(x)


def unpacked(layer: nn.Module, x: mx.array) -> mx.array:
    """The weight (..., out, in) of a quantized layer, in the dtype of x. It is unpacked once x is known, not earlier:
    MLX would otherwise unpack all layers at the start."""
    packed = mx.depends([layer.weight], [x])[0]
    return mx.dequantize(packed, layer.scales, layer.biases, layer.group_size, layer.bits).astype(x.dtype)


nn.QuantizedLinear.__call__ = nn.QuantizedEmbedding.as_linear = quantized_linear


def dense_shape(linear: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer, quantized or not."""
    outputs, inputs = linear.weight.shape
    return outputs, inputs * 32 // linear.bits if isinstance(linear, nn.QuantizedLinear) else inputs


def dense_weight(module: nn.Module) -> mx.array:
    """The weight (..., out, in) of a linear layer, an embedding or experts, quantized or not, in float32."""
    weight = module.weight
    if "scales" in module:
        weight = mx.dequantize(weight, module.scales, module.biases, module.group_size, module.bits)
    if "order" in module:
        weight = mx.take_along_axis(weight, mx.argsort(module.order, axis=-1)[..., None, :], axis=-1)
    return weight.astype(mx.float32)


def pack_like(model: nn.Module, arrays: dict[str, mx.array]):
    """Quantize the layers of a model that have scales in a checkpoint's `arrays` (by name). Bits and group size follow
    from the shapes."""

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


# ---- modules by path -------------------------------------------------------------------------------------------------


def natural(path: str) -> list:
    """A key for sorting paths, by which blocks.2 comes before blocks.10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]


def replace_module(model: nn.Module, path: str, module: nn.Module):
    """Put a module into the model at a path such as blocks.0.attn.q."""
    *parents, name = path.split(".")
    for part in parents:
        model = model[int(part)] if isinstance(model, list) else model[part]
    model[name] = module


# ---- low-rank layers -------------------------------------------------------------------------------------------------


class Factored(nn.Module):
    """A linear layer of low rank, in place of the linear layer `layer` (out, in): the weight is the product of
    u (out, rank) and v (rank, in). Both have the class of `layer`, and u has a bias if `layer` has one."""

    def __init__(self, layer: nn.Linear, rank: int):
        super().__init__()
        outputs, inputs = layer.weight.shape
        self.v, self.u = type(layer)(inputs, rank, bias=False), type(layer)(rank, outputs, bias="bias" in layer)

    def __call__(self, x: mx.array) -> mx.array:
        return self.u(self.v(x))


def factor_like(model: nn.Module, arrays: dict[str, mx.array]):
    """Make the linear layers of a model low-rank that have u and v in a checkpoint's `arrays` (by name)."""
    for path, module in model.named_modules():
        v = arrays.get(f"{path}.v.scales", arrays.get(f"{path}.v.weight"))  # quantized, or not: rank rows in both
        if isinstance(module, nn.Linear) and f"{path}.u.weight" in arrays and v is not None and v.ndim == 2:
            replace_module(model, path, Factored(module, len(v)))


# ---- quantized key/value cache ---------------------------------------------------------------------------------------


class PackedRows:
    """The keys or the values of a cache (B, KV, S, D). They are quantized in groups of 32 as they are written, and
    unpacked as they are read, with the indices of an array: rows[..., start:end, :]."""

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
    """A function of (shape, dtype) that allocates keys or values of that shape, as mx.zeros does. UserError where
    `bits` or head_dim cannot be quantized."""
    if bits not in BITS:
        raise UserError(f"kv_bits={bits} is not one of {', '.join(map(str, BITS))}")
    if head_dim % 32:
        raise UserError(f"head_dim={head_dim} is not a multiple of 32: keys and values cannot be quantized")
    return partial(PackedRows, bits=bits)


def joined(first: mx.array | PackedRows, second: mx.array | PackedRows) -> mx.array | PackedRows:
    """The positions of two parts of a cache, one after the other: (B, KV, S1, D), (B, KV, S2, D) ->
    (B, KV, S1 + S2, D)."""
    if isinstance(first, mx.array):
        return mx.concatenate([first, second], axis=2)
    first.parts = [mx.concatenate(parts, axis=2) for parts in zip(first.parts, second.parts, strict=True)]
    return first


if __name__ == "__main__":
    print(f"{sys.argv[0]} has no command of its own: run hqq.py, which uses it", file=sys.stderr)
    sys.exit(2)
