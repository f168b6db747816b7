"""Pack a checkpoint's matrices into integers of 2 to 8 bits, by half-quadratic quantization. No data is needed.

    python hqq.py out/ckpt.safetensors
    python hqq.py out/ckpt.safetensors --bits="4, mlp=3, embed=8" --group_size=32 --data=book.txt

W ~ (q - zero) scale, with integers q and, for each group of a row, a scale and a zero. Rounding to the nearest takes
both from the least and the greatest number of a group. HQQ (Badri & Shaji 2023) moves them so that most numbers come
closer: it minimizes |W - e - (q - zero) scale|^2 + |e|^p / beta, p < 1, by turns over the integers, over errors e,
which only the farthest numbers may have, and over zero and scale. Departures from the paper: there only the zero moves
(here: --scale_moves=False); and each group keeps the zero and scale that came closest to it, in the mean square, not
the last.

It writes a checkpoint whose weights stay packed, in the file and in memory: model.py runs it, sft.py tunes adapters on
it. Each line tells a matrix, its bits, its mean error and that of rounding to the nearest, and its megabytes before and
after. --bits names matrices by regular expressions; the last that fits rules, and 0 leaves a matrix as it is. With
--data, perplexity before and after.
"""
import math

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
from tqdm import tqdm

from config import UserError, overrides
from packing import (
    HEAD,
    matrices,
    open_dense,
    pack_matrix,
    perplexity,
    plan,
    round_to_nearest,
    save_packed,
    text_of,
)
from quantized import dense_weight

checkpoint = "out/ckpt.safetensors"  # a dense one
out = ""                  # the packed one; "": its name with -hqq-BITS
bits = "4"                # of all matrices, or more: "4, mlp=3, blocks.0=8, head=0"
group_size = 64           # numbers that share a scale and a zero: 32 | 64 | 128
method = "hqq"            # hqq | rtn, rounding to the nearest
iterations = 20           # at most
scale_moves = True        # False: only the zero does, as in the paper
scale_dtype = "float16"   # of scales and biases in the file: float16 | float32
data = ""                 # a text file, or a folder that data.py made: perplexity before and after
max_tokens = 0            # of it; 0: all

settings = overrides(globals(), "checkpoint")
__version__ = "0"         # transformers takes a module called hqq for the package, and asks for its version

# ---- solver ----------------------------------------------------------------------------------------------------------

P, BETA = 0.7, 10.0
GAIN = 3e-4  # an iteration that takes off a smaller share of the mean square of all errors is the last
SMALL = BETA ** (-1 / (2 - P))  # shrink() of what is smaller than this is 0


def shrink(x: mx.array) -> mx.array:
    """sign(x) max(0, |x| - |x|^(p - 1) / beta), the paper's minimum over e."""
    return x * mx.maximum(1 - mx.maximum(mx.abs(x), SMALL) ** (P - 2) / BETA, 0)


def quantize(W: mx.array, bits: int, group_size: int, iterations: int = 20,
             scale_moves: bool = True) -> tuple[mx.array, mx.array, mx.array]:
    """Integers q, of the shape of W (..., out, in), scale and zero (..., out, in / group_size), float32, with
    W ~ (q - zero) scale, by HQQ."""
    q, scale, zero = round_to_nearest(W, bits, group_size)
    groups, shape = W.astype(mx.float32).reshape(-1, group_size), scale.shape
    mean_w, total = groups.mean(-1, keepdims=True), math.inf
    scale, zero, least = scale.reshape(-1, 1), zero.reshape(-1, 1), mx.full((len(groups), 1), mx.inf)
    tried_scale, tried_zero = scale, zero
    for _ in range(iterations):
        x = groups * (1 / tried_scale) + tried_zero
        q = mx.clip(mx.round(x), 0, 2**bits - 1)
        off = x - q  # the error, in steps
        square = mx.square(off)
        mean = square.mean(-1, keepdims=True) * mx.square(tried_scale)
        better = mean < least
        scale, zero = mx.where(better, tried_scale, scale), mx.where(better, tried_zero, zero)
        least = mx.minimum(mean, least)
        now, far = least.sum(), square.max(-1) * mx.square(tried_scale[:, 0]) > SMALL**2
        mx.eval(now, far, scale, zero, least, q, off)
        last, total = total, now.item()
        if not total < (1 - GAIN * scale_moves) * last:
            break
        mean_q, mean_target, product = q.mean(-1, keepdims=True), mean_w, (q * groups).mean(-1, keepdims=True)
        if len(far := np.flatnonzero(far)):  # in the other groups shrink() is 0
            far = mx.array(far)
            e = shrink(off[far] * tried_scale[far])  # the target is W - e
            mean_target = mean_target.at[far].add(-e.mean(-1, keepdims=True))
            product = product.at[far].add(-(q[far] * e).mean(-1, keepdims=True))
        if scale_moves:  # least squares of the target by q
            variance = mx.square(q).mean(-1, keepdims=True) - mx.square(mean_q)
            slope = (product - mean_q * mean_target) / mx.maximum(variance, 1e-6)
            tried_scale = mx.where(slope > 0, slope, tried_scale)
        tried_zero = mean_q - mean_target / tried_scale
    q = mx.clip(mx.round(groups / scale + zero), 0, 2**bits - 1)
    return q.reshape(W.shape).astype(mx.uint8), scale.reshape(shape), zero.reshape(shape)


# ---- run -------------------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    if method not in ("hqq", "rtn"):
        raise UserError(f"method={method!r} is not one of hqq, rtn")
    if iterations < 1:
        raise UserError(f"iterations={iterations}: it must be 1 or more")
    model, meta, enc, out = open_dense(checkpoint, out, f"{method}-{bits}", scale_dtype)
    widths = plan(model, bits, group_size)
    if data:
        tokens = text_of(data, enc, checkpoint, "val", max_tokens)
        before = perplexity(model, tokens, enc.bos)
    print(HEAD)
    bar = tqdm(widths.items(), unit=" matrices", disable=None, dynamic_ncols=True)
    for path, width in bar:
        W = dense_weight(matrices(model)[path])
        found = quantize(W, width, group_size, iterations, scale_moves) if method == "hqq" else (
            round_to_nearest(W, width, group_size))
        bar.write(pack_matrix(model, path, found, width, scale_dtype))
    if data:
        print(f"before: {before}\nafter:  {perplexity(model, tokens, enc.bos)}")
    save_packed(out, model, meta, settings, "hqq.py", method=method, bits=bits, group_size=group_size)
