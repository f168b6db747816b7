"""Quantize a checkpoint's matrices to integers of 2 to 8 bits by half-quadratic quantization, which needs no data.

    python hqq.py out/ckpt.safetensors
    python hqq.py out/ckpt.safetensors --bits="4, mlp=3, embed=8" --group_size=32 --data=book.txt

W ~ (q - zero) scale, with integers q, and with a scale and a zero for each group of weights in a row. Rounding to the
nearest takes scale and zero from the least and the greatest weight of a group. HQQ (Badri & Shaji 2023) chooses them so
that most weights come closer: it minimizes |W - e - (q - zero) scale|^2 + |e|^p / beta, p < 1, alternately over the
integers q, over the errors e, which are not 0 for outliers alone, and over zero and scale. Departures from the paper:
the paper fits only the zero (here: --scale_moves=False); and each group keeps the zero and scale of its least mean
squared error, not those of the last iteration.

It writes a checkpoint whose weights stay packed integers, in the file and in memory (quantized.py): sample.py and
eval.py run it, sft.py trains adapters on it. It prints a table with a line for each matrix: its bits, its mean absolute
error, that of rounding to the nearest, the ratio of both, and its megabytes before and after. In --bits, a name is a
regular expression; the last one that matches a matrix counts, and 0 leaves a matrix as it is. With --data, it prints
the perplexity before and after.
"""
import math
import os

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
from score import window_length

checkpoint = "out/ckpt.safetensors"  # a checkpoint that is not quantized
out = ""                  # the quantized checkpoint; "": the name of the checkpoint with -METHOD-BITS
bits = "4"                # 2 | 3 | 4 | 5 | 6 | 8 for all matrices, or by name: "4, mlp=3, blocks.0=8, head=0"
group_size = 64           # weights that share a scale and a zero: 32 | 64 | 128
method = "hqq"            # hqq | rtn, rounding to the nearest
iterations = 20           # at most
scale_moves = True        # fit the scale, too; False: only the zero, as in the paper
scale_dtype = "float16"   # of scales and biases in the file: float16 | float32
data = ""                 # for the perplexity: a text file, or a folder that data.py made (its val split)
max_tokens = 0            # tokens of that text; 0: all
block_size = 0            # tokens of a window of it; 0: the model's context, but 1,024 at most

settings = overrides(globals(), "checkpoint")
__version__ = "0"         # transformers takes a module called hqq for the hqq package, and asks for its version

# ---- solver ----------------------------------------------------------------------------------------------------------

P, BETA = 0.7, 10.0
GAIN = 3e-4  # stop when an iteration lowers the mean squared error of the matrix by a smaller share
SMALL = BETA ** (-1 / (2 - P))  # shrink(x) is 0 for |x| below this


def shrink(x: mx.array) -> mx.array:
    """sign(x) max(0, |x| - |x|^(p - 1) / beta): the e that minimizes the paper's objective."""
    return x * mx.maximum(1 - mx.maximum(mx.abs(x), SMALL) ** (P - 2) / BETA, 0)


def quantize(W: mx.array, bits: int, group_size: int, iterations: int = 20,
             scale_moves: bool = True) -> tuple[mx.array, mx.array, mx.array]:
    """Quantize W (..., out, in) by HQQ: integers q of the same shape, scale and zero (..., out, in / group_size),
    float32, with W ~ (q - zero) scale."""
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
        if len(far := np.flatnonzero(far)):  # in all other groups shrink() gives 0
            far = mx.array(far)
            e = shrink(off[far] * tried_scale[far])  # the target is W - e
            mean_target = mean_target.at[far].add(-e.mean(-1, keepdims=True))
            product = product.at[far].add(-(q[far] * e).mean(-1, keepdims=True))
        if scale_moves:  # least-squares fit of the target by q
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
    model, meta, enc, out = open_dense(checkpoint, out, f"{method}-{bits}", scale_dtype, data)
    widths, T = plan(model, bits, group_size), window_length(model.config, block_size)
    if data:
        tokens = text_of(data, enc, checkpoint, "val", max_tokens)
        before = perplexity(model, tokens, enc.start, T)
    print(HEAD)
    bar = tqdm(widths.items(), unit=" matrices", disable=None, dynamic_ncols=True)
    for path, width in bar:
        W = dense_weight(matrices(model)[path])
        found = quantize(W, width, group_size, iterations, scale_moves) if method == "hqq" else (
            round_to_nearest(W, width, group_size))
        bar.write(pack_matrix(model, path, found, width, scale_dtype))
    if data:
        print(f"before: {before}\nafter:  {perplexity(model, tokens, enc.start, T)}")
    save_packed(out, model, meta, settings, os.path.basename(__file__), method=method, bits=bits, group_size=group_size)
