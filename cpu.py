"""Sigmoid, erf, softmax, cross-entropy, attention and rotary positions for the CPU, where MLX's exp takes most of a
small model's step.

MLX's CPU kernels call exp one number at a time (12 ns each). Here exp is a polynomial made of adds and multiplies,
which run as vectors: three to five times faster, and within 3e-7 of the exact value. GPUs have fused kernels for all of
this; model.py calls this file on the CPU only. Deleting it costs speed and nothing else.
"""
import functools
import math
import sys

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np

LN2_POWERS = [math.log(2) ** k / math.factorial(k) for k in range(7)]  # Taylor coefficients of 2**f
ROUND = 1.5 * 2**23  # adding it to a small float32 leaves that number, rounded, in the low bits of the mantissa


@mx.compile
def exp_minus(x: mx.array, m: mx.array) -> mx.array:
    """exp(x - m) for x <= m, float32. Exactly 0 below exp(-88), so that a masked position weighs nothing."""
    y = mx.maximum((x - m) * math.log2(math.e), -127.0)  # exp(x - m) = 2**y = 2**n * 2**f, n whole, |f| <= 1/2
    shifted = y + ROUND
    f = y - (shifted - ROUND)
    power = LN2_POWERS[6]
    for coefficient in LN2_POWERS[5::-1]:
        power = power * f + coefficient
    # a float32 of exponent bits n + 127, above 23 bits of mantissa, is 2**n; the bits above n's fall off
    two_to_n = mx.left_shift(shifted.view(mx.int32) + 127, mx.array(23)).view(mx.float32)
    return power * two_to_n


@mx.compile
def sigmoid_of(x: mx.array) -> mx.array:
    z = exp_minus(-mx.abs(x.astype(mx.float32)), mx.array(0.0))
    return (mx.where(x < 0, z, 1.0) / (1.0 + z)).astype(x.dtype)


@mx.custom_function
def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + exp(-x))."""
    return sigmoid_of(x)


@sigmoid.vjp
def sigmoid_backward(x, cotangent, y):
    return cotangent * y * (1 - y)


@mx.compile
def erf_of(x: mx.array) -> mx.array:
    size = mx.abs(x.astype(mx.float32))
    t, polynomial = 1.0 / (1.0 + 0.3275911 * size), mx.array(0.0)
    for coefficient in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        polynomial = (polynomial + coefficient) * t
    y = 1.0 - polynomial * exp_minus(-size * size, mx.array(0.0))
    return mx.where(x < 0, -y, y).astype(x.dtype)


@mx.custom_function
def erf(x: mx.array) -> mx.array:
    """The error function, within 5e-7 (Abramowitz & Stegun 1964, 7.1.26)."""
    return erf_of(x)


@erf.vjp
def erf_backward(x, cotangent, y):
    slope = 2 / math.pi**0.5 * exp_minus(-mx.square(x.astype(mx.float32)), mx.array(0.0))
    return cotangent * slope.astype(x.dtype)


@mx.custom_function
def softmax(x: mx.array) -> mx.array:
    """Softmax over the last axis, float32."""
    e = exp_minus(x, x.max(-1, keepdims=True))
    return e * (1 / e.sum(-1, keepdims=True))


@softmax.vjp
def softmax_backward(x, cotangent, p):
    return p * (cotangent - (cotangent * p).sum(-1, keepdims=True))


@mx.custom_function
def loss_and_p(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    top = logits.max(-1, keepdims=True)
    e = exp_minus(logits, top)
    total = e.sum(-1, keepdims=True)
    loss = mx.log(total) + top - mx.take_along_axis(logits, targets[:, None], -1)
    return loss[:, 0], e * (1 / total)


@loss_and_p.vjp
def loss_and_p_backward(primals, cotangents, outputs):
    gradient = outputs[1] * cotangents[0][:, None]  # p - 1 at the target, p elsewhere
    targets = primals[1]
    return gradient.at[mx.arange(targets.size), targets].add(-cotangents[0]), mx.zeros_like(targets)


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """-log softmax(logits)[target]: (N, V), (N,) -> (N,), float32."""
    return loss_and_p(logits, targets)[0]


@functools.lru_cache(maxsize=8)
def cos_sin(inverse: bytes, position: int) -> tuple[mx.array, mx.array]:
    angle = np.float32(position) * (1 / np.frombuffer(inverse, np.float32))  # rounded as MLX's are
    return mx.array(np.cos(angle)), mx.array(np.sin(angle))


def rope(x: mx.array, inverse: mx.array, position: int) -> mx.array:
    """model.rope() for one position, in decoding: x (B, H, 1, D), float32. MLX's needs 24 operations, and computes
    cosines and sines anew in every layer."""
    cos, sin = cos_sin(np.asarray(inverse).tobytes(), position)
    a, b, *rest = mx.split(x, [inverse.size, 2 * inverse.size][:1 + (2 * inverse.size < x.shape[-1])], axis=-1)
    return mx.concatenate([a * cos - b * sin, a * sin + b * cos, *rest], axis=-1)


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask, sink: mx.array | None = None) -> mx.array:
    """What mx.fast.scaled_dot_product_attention computes: q (B, H, T, D), k and v (B, KV, S, D) -> (B, H, T, D of v).

    mask: "causal", None, or an array that broadcasts to (B, H, T, S): float is added, bool says what may be seen. sink:
    (H,), a logit of each head that joins the softmax and has no value; None: there is none. A causal pass over more
    than 64 positions goes in blocks of queries that skip the keys of the blocks to their right.
    """
    B, H, T, D = q.shape
    KV, S = k.shape[1:3]
    q = (q * scale).reshape(B, KV, -1, T, D)  # the query heads that share a key head stand together
    k, v = k[:, :, None].swapaxes(-1, -2), v[:, :, None]

    def weights(scores):
        if sink is None:
            return softmax(scores)
        column = mx.broadcast_to(sink.reshape(1, KV, -1, 1, 1), (*scores.shape[:-1], 1))
        return softmax(mx.concatenate([scores, column], axis=-1))[..., :-1]

    if mask is None:
        return (weights(q @ k) @ v).reshape(B, H, T, -1)
    if not isinstance(mask, str):
        mask = mx.where(mask, 0.0, -mx.inf) if mask.dtype == mx.bool_ else mask
        mask = mask.reshape(*(1,) * (4 - mask.ndim), *mask.shape)
        mask = mask[:, :, None] if mask.shape[1] == 1 else mask.reshape(mask.shape[0], KV, -1, *mask.shape[2:])
        return (weights(q @ k + mask) @ v).reshape(B, H, T, -1)
    size = max(64, T // 4)
    rows = []
    for start in range(0, T, size):
        end = min(start + size, T)
        seen = S - T + end  # keys up to the last query of the block
        hidden = mx.arange(seen) > mx.arange(S - T + start, seen)[:, None]
        scores = q[..., start:end, :] @ k[..., :seen] + mx.where(hidden, -mx.inf, 0.0)
        rows.append(weights(scores) @ v[..., :seen, :])
    return mx.concatenate(rows, axis=-2).reshape(B, H, T, -1)


if __name__ == "__main__":
    print("cpu.py has no command of its own: run train.py, which uses it", file=sys.stderr)
    sys.exit(2)
