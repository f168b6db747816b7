"""Training in fp8, mxfp8 and nvfp4: with train.py --precision=nvfp4 the linear layers of the blocks multiply numbers of
8 or 4 bits, forward and backward (Micikevicius et al. 2022, 2209.05433; Mishra et al. 2025, 2506.08027; NVIDIA 2025,
2509.25149).

    product = rounded_product("mxfp8")
    y = product(x, weight)                       # x (M, in), weight (out, in) -> (M, out)
    convert(model, "nvfp4", without={"hadamard"})  # every linear layer of the blocks, of a GPT, and all experts

A linear layer computes three products, and each rounds both of its inputs first:

    y = Q(x) Q(W)^T          dx = Q(dy) Q(W)          dW = Q(dy)^T Q(x)

The numbers that are multiplied are those of the format, but they are kept in the dtype of the computation, which holds
all of them exactly, and are multiplied by its ordinary product: this is a simulation. It shows what a format does to a
loss; it saves neither time nor memory. Rounding has no useful gradient, so that it counts as the identity in the
backward pass (straight-through): dx and dW above are the gradients.

Float32 parameters, the optimizer and checkpoints stay as they are. So do embedding, head, norms, attention's scores,
and the small matrices that choose a path or compute a gate. Evaluation, and whatever reads the checkpoint, computes
without rounding. Deleting this file costs --precision and nothing else.
"""
import re
import sys
from collections.abc import Callable
from functools import partial

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn

from config import UserError
from model import GPT, Linear
from quantized import replace_module

try:
    from model import ROWS, Experts, gather_mm
except ImportError:  # without that variant
    Experts = None

FORMATS = "fp8", "mxfp8", "nvfp4"
CHOICES = "stochastic", "hadamard", "square", "last"  # of nvfp4, which --precision_off leaves out
# mantissa bits, the lowest exponent, the largest number
E4M3, E5M2, E2M1 = (3, -6, 448.0), (2, -14, 57344.0), (1, 0, 6.0)

# ---- numbers of few bits ---------------------------------------------------------------------------------------------


def rounded(x: mx.array, kind: tuple[int, int, float], noise: mx.array | None = None) -> mx.array:
    """The nearest numbers of a format, of two equally near ones the even one; beyond the largest number, that one:
    float32 -> float32. With noise, uniform in [0, 1), the number below or above x, so that the mean is x (stochastic
    rounding).

    Between 2^e and 2^(e+1), numbers with m mantissa bits are multiples of 2^(e-m). Below the lowest exponent, where
    the subnormal numbers are, the distance stays the same."""
    bits, lowest, largest = kind
    x = mx.clip(x.astype(mx.float32), -largest, largest)
    power = (x.view(mx.uint32) & 0x7F800000).view(mx.float32)  # 2^e: the exponent's bits of x alone
    step = mx.maximum(power, 2.0 ** lowest) * 2.0 ** -bits
    return (mx.round(x / step) if noise is None else mx.floor(x / step + noise)) * step


def next_power(x: mx.array) -> mx.array:
    """2^ceil(log2 x) for x > 0, from 2^-126 up: a scale of the format E8M0."""
    return mx.maximum(((x.view(mx.uint32) + 0x7FFFFF) & 0x7F800000).view(mx.float32), 2.0 ** -126)


def blocks(x: mx.array, axis: int, size: int) -> mx.array:
    """A matrix as blocks of `size` numbers along an axis, the last one filled with 0: (..., n, size, ...)."""
    rest = -x.shape[axis] % size
    if rest:
        x = mx.pad(x, [(0, rest if i == axis else 0) for i in range(x.ndim)])
    return x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1:])


def joined(x: mx.array, axis: int, shape: tuple[int, int]) -> mx.array:
    """The matrix of this shape, of its blocks."""
    return x.flatten(axis, axis + 1)[:shape[0], :shape[1]]


# ---- a matrix of a product: values that the format holds, and a float32 factor of all of them ------------------------
#
# axis: the axis that the product sums over. Where a format has blocks they lie along it, so that every block's scale
# can be taken out of its part of the sum. A matrix that is summed over one axis in one product and over the other one
# in another is rounded twice, apart.


def to_fp8(x: mx.array, axis: int, gradient: bool = False) -> tuple[mx.array, mx.array]:
    """Activations and weights in E4M3, gradients in E5M2, which has a wider range; one scale a matrix."""
    kind = E5M2 if gradient else E4M3
    scale = kind[2] / mx.maximum(mx.abs(x).max().astype(mx.float32), 1e-30)
    return rounded(x * scale, kind), 1 / scale


def to_mxfp8(x: mx.array, axis: int) -> tuple[mx.array, mx.array]:
    """E4M3, with a power of two for every 32 numbers: the smallest one with which none of them is beyond 448."""
    parts = blocks(x.astype(mx.float32), axis, 32)
    scale = next_power(mx.abs(parts).max(axis + 1, keepdims=True) / 448)
    return joined(rounded(parts / scale, E4M3) * scale, axis, x.shape), mx.array(1.0)


def to_nvfp4(x: mx.array, axis: int, stochastic: bool = False, square: bool = False) -> tuple[mx.array, mx.array]:
    """E2M1, with a scale in E4M3 for every 16 numbers, or for every 16 x 16 of them (square), and a float32 factor by
    which the largest scale becomes 448."""
    parts = blocks(x.astype(mx.float32), axis, 16)
    largest = mx.abs(parts).max(axis + 1, keepdims=True)
    if square:  # over 16 neighbours along the other axis too
        shape, other = largest.shape, 2 if axis == 0 else 0
        largest = mx.repeat(blocks(largest, other, 16).max(other + 1), 16, axis=other)[:shape[0], :, :shape[2]]
    factor = mx.maximum(mx.abs(x).max().astype(mx.float32), 1e-30) / (6 * 448)
    scale = rounded(largest / 6 / factor, E4M3)
    noise = mx.random.uniform(shape=parts.shape) if stochastic else None
    values = rounded(parts / (mx.where(scale > 0, scale, 1) * factor), E2M1, noise)
    return joined(values * scale, axis, x.shape), factor


def signed_hadamard(seed: int = 0) -> mx.array:
    """A 16 x 16 Hadamard matrix over 4 with random signs of its columns: an orthogonal matrix. The signs are the same
    for all layers and steps, as in the paper."""
    signs = mx.where(mx.random.bernoulli(shape=(16,), key=mx.random.key(seed)), 1.0, -1.0)
    return mx.hadamard_transform(mx.eye(16), scale=0.25) * signs


def turned(x: mx.array, matrix: mx.array) -> mx.array:
    """Every 16 rows of x times the matrix: (M, n) -> (M up to a multiple of 16, n). If both inputs of a product that
    sums over these rows are turned so, it stays the same, while a number that stands out is spread over 16."""
    return (matrix @ blocks(x.astype(mx.float32), 0, 16)).flatten(0, 1)


# ---- the product -----------------------------------------------------------------------------------------------------


def multiply(a: tuple[mx.array, mx.array], b: tuple[mx.array, mx.array], dtype: mx.Dtype) -> mx.array:
    """The product of two matrices that are each values and a factor. The values are exact in bfloat16 too."""
    return (a[0].astype(dtype) @ b[0].astype(dtype) * (a[1] * b[1])).astype(dtype)


def in_hardware() -> bool:
    """Whether MLX multiplies mxfp8 and nvfp4 by the matrix units: NVIDIA GPUs of compute capability 10 (Blackwell)."""
    return mx.cuda.is_available() and mx.device_info(mx.gpu).get("compute_capability_major", 0) >= 10


def roundings(precision: str, without: frozenset[str]) -> tuple[Callable, Callable, Callable, Callable]:
    """How inputs, weights and gradients are rounded, functions of a matrix and of the axis that a product sums over;
    and how both inputs of dW are turned before. without: choices of nvfp4 that are left out:

    stochastic    gradients are rounded up or down at random, so that their mean stays; all else to the nearest number
    hadamard      both inputs of dW are turned by a random Hadamard matrix along their tokens
    square        weights have a scale for 16 x 16 numbers, so that forward and backward pass have the same weights
    """
    def weight_of(w, axis):
        return to_nvfp4(w, axis, square="square" not in without) if precision == "nvfp4" else input_of(w, axis)

    def input_of(x, axis):
        return {"fp8": to_fp8, "mxfp8": to_mxfp8, "nvfp4": to_nvfp4}[precision](x, axis)

    def gradient_of(dy, axis):
        if precision == "nvfp4":
            return to_nvfp4(dy, axis, stochastic="stochastic" not in without)
        return to_fp8(dy, axis, gradient=True) if precision == "fp8" else to_mxfp8(dy, axis)

    if precision == "nvfp4" and "hadamard" not in without:
        return input_of, weight_of, gradient_of, partial(turned, matrix=signed_hadamard())
    return input_of, weight_of, gradient_of, lambda x: x


def rounded_product(precision: str, without: frozenset[str] = frozenset()) -> Callable:
    """A function of x (M, in) and weight (out, in) -> x weight^T (M, out), whose three products, see above, are of
    rounded numbers. without: see roundings()."""
    input_of, weight_of, gradient_of, turn = roundings(precision, without)
    fast = in_hardware() and (precision == "mxfp8" or precision == "nvfp4" and "square" in without)

    def transposed(parts):
        return parts[0].T, parts[1]

    @mx.custom_function
    def product(x, weight):
        if fast and not x.shape[-1] % 32:  # never run so far: no such GPU was at hand
            scales = [mx.abs(a).max().astype(mx.float32) if precision == "nvfp4" else None for a in (x, weight)]
            return mx.qqmm(x, weight.astype(x.dtype), mode=precision, global_scale_x=scales[0],
                           global_scale_w=scales[1])
        return multiply(input_of(x, 1), transposed(weight_of(weight, 1)), x.dtype)

    @product.vjp
    def backward(primals, dy, _):
        x, weight = primals
        dx = multiply(gradient_of(dy, 1), weight_of(weight, 0), x.dtype)
        dweight = multiply(transposed(gradient_of(turn(dy), 0)), input_of(turn(x), 0), x.dtype)
        return dx, dweight.astype(weight.dtype)

    return product


def rounded_experts(precision: str, without: frozenset[str] = frozenset()) -> Callable:
    """The same for experts, as model.blocks_by_experts(): rows (n, in) in blocks of ROWS, weight (E, out, in), and the
    expert of each block -> (n, out). Every expert's weight is a matrix of its own, and no block of numbers with a
    scale holds rows of two experts; one factor is that of all rows."""
    input_of, weight_of, gradient_of, turn = roundings(precision, without)

    def of_each(weight, axis):
        values, factors = zip(*[weight_of(w, axis) for w in weight], strict=True)
        return mx.stack(values), mx.stack(factors)

    def by_experts(x, weight, expert, dtype):
        y = gather_mm(x[0].astype(dtype).reshape(-1, ROWS, x[0].shape[1]), weight[0].astype(dtype), expert, True)
        return (y * (x[1] * weight[1][expert])[:, None, None]).astype(dtype).flatten(0, 1)

    @mx.custom_function
    def product(x, weight, expert, ends):
        values, factors = of_each(weight, 1)
        return by_experts(input_of(x, 1), (values.swapaxes(1, 2), factors), expert, x.dtype)

    @product.vjp
    def backward(primals, dy, _):
        x, weight, expert, ends = primals
        full = mx.arange(len(x)) < ends[mx.repeat(expert, ROWS), 1]  # the other rows of a block belong to no token
        x, dy = mx.where(full[:, None], x, 0), mx.where(full[:, None], dy, 0)
        dx = by_experts(gradient_of(dy, 1), of_each(weight, 0), expert, x.dtype)
        (a, f), (b, g) = gradient_of(turn(dy), 0), input_of(turn(x), 0)
        ends = mx.stack([ends[:, 0], (ends[:, 1] + (ROWS - 1)) // ROWS * ROWS], axis=1)  # turned rows fill their block
        dweight = mx.segmented_mm(a.astype(x.dtype).T, b.astype(x.dtype), ends) * (f * g)
        return dx, dweight.astype(weight.dtype), mx.zeros_like(expert), mx.zeros_like(primals[3])

    return product


class RoundedLinear(Linear):
    """A linear layer of a model that is in training, by a rounded product. As its class is not Linear, the kernels that
    compute whole blocks leave it to model.py."""

    def __init__(self, linear: Linear, product: Callable):
        nn.Module.__init__(self)
        for name, parameter in linear.items():
            self[name] = parameter
        self._no_grad = {*linear._no_grad}  # the base of an adapter stays frozen
        self._product = product  # "_": not a parameter

    def __call__(self, x: mx.array) -> mx.array:
        if not self.training:
            return super().__call__(x)
        y = self._product(x.reshape(-1, x.shape[-1]), self.weight).reshape(*x.shape[:-1], -1)
        return y + self.bias.astype(x.dtype) if "bias" in self else y


class RoundedExperts(Experts or nn.Module):
    """Experts of a model that is in training, by rounded products."""

    def __init__(self, experts: Experts, product: Callable, of_one: Callable):
        nn.Module.__init__(self)
        for name, parameter in experts.items():
            self[name] = parameter
        self._product, self._of_one = product, of_one

    def __call__(self, x: mx.array, expert: mx.array, ends: mx.array | None) -> mx.array:
        if not self.training:
            return super().__call__(x, expert, ends)
        if ends is None:  # a few rows, in no order
            rows = (mx.where((expert == i)[:, None], x, 0) for i in range(len(self.weight)))
            y = sum(self._of_one(part, weight) for part, weight in zip(rows, self.weight, strict=True))
        else:
            y, expert = self._product(x, self.weight, expert, ends), mx.repeat(expert, ROWS)
        return y + self.bias[expert].astype(x.dtype) if "bias" in self else y  # empty rows are not read


def parse(precision: str, off: str) -> frozenset[str]:
    """The choices of nvfp4 in --precision_off. UserError for a name that is none, or a setting without effect."""
    if precision not in FORMATS:
        raise UserError(f"precision={precision!r} is not one of {', '.join(FORMATS)}")
    without = frozenset(filter(None, off.split(",")))
    if unknown := without - {*CHOICES}:
        raise UserError(f"precision_off={off!r}: {min(unknown)!r} is not one of {', '.join(CHOICES)}")
    if without and precision != "nvfp4":
        raise UserError(f"precision_off={off!r} leaves out choices of nvfp4: {precision} has none, so leave it out")
    return without


def convert(model: GPT, precision: str, without: frozenset[str] = frozenset()):
    """Replace the linear layers and the experts of a model's blocks. Under nvfp4 the last sixth of the blocks, at least
    one, keeps its own, unless without has "last". A frozen layer under an adapter is rounded as others are; the
    adapter's own products are not."""
    config = model.config
    kept = max(1, round(config.n_layer / 6)) if precision == "nvfp4" and "last" not in without else 0
    if kept == config.n_layer:
        raise UserError(f"precision={precision} keeps the last block as it is, and there is no other: give a larger "
                        "n_layer, or --precision_off=last")
    product, of_experts = (make(precision, without) for make in (rounded_product, rounded_experts))
    last, modules = range(config.n_layer - kept, config.n_layer), model.named_modules()
    if any(getattr(module, "kind", "") == "dora" for _, module in modules):  # it computes norms of weights by products
        raise UserError(f"precision={precision} would round the norms of kind=dora, too: take kind=lora")
    if any("scales" in module for path, module in modules if path.startswith("blocks.")):
        raise UserError(f"precision={precision} rounds float weights, and the model has packed ones: "
                        "leave it out")
    for path, module in modules:
        if not path.startswith("blocks.") or int(path.split(".")[1]) in last:
            continue
        if type(module) is Experts:
            replace_module(model, path, RoundedExperts(module, of_experts, product))
        elif type(module) is Linear and not re.search(r"router|predictor|value_gate|lam$", path):
            replace_module(model, path, RoundedLinear(module, product))  # the others choose a path, or compute a gate


if __name__ == "__main__":
    print("precision.py has no command of its own: run train.py, which uses it", file=sys.stderr)
    sys.exit(2)
