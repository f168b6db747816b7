"""Quantize a checkpoint's matrices to integers of 2 to 8 bits, each column correcting the errors of earlier columns.

    python gptq.py out/ckpt.safetensors --data=book.txt
    python gptq.py out/ckpt.safetensors --data=data/stdlib-bpe-4096 --bits="4, mlp=3, embed=8" --test=other.txt

GPTQ (Frantar et al. 2023) keeps the outputs W x close, rather than the weights W: it minimizes tr(D H D^T), where D is
the rounding error of W, and H = mean x x^T over the inputs x of a calibration text. It rounds one column j of W after
another, and adjusts all later columns to compensate for its error: by err / U_jj times U_j, where U^T U = H^-1 and U
is upper triangular (the paper's Cholesky form). The scale and zero of a group are set when its first column is
reached, from the least and the greatest weight of the group at that point.

Blocks are quantized in order, and the inputs of a block are computed with the quantized blocks before it. The token
embedding and experts are rounded to the nearest, and marked "rounded". Departures from the paper: columns are rounded
from left to right (no act-order), and all matrices of a block are calibrated in one pass. File and table are as
hqq.py's; the error of the weights is often above that of rounding to the nearest, since GPTQ minimizes the error of the
outputs.
"""
import math
import os

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from config import UserError, overrides
from packing import (
    HEAD,
    matrices,
    matrix_inputs,
    open_dense,
    pack_matrix,
    part_of,
    perplexity,
    plan,
    round_to_nearest,
    save_packed,
    text_of,
)
from quantized import dense_weight
from score import window_length, windows

checkpoint = "out/ckpt.safetensors"  # a checkpoint that is not quantized
out = ""                  # the quantized checkpoint; "": the name of the checkpoint with -gptq-BITS
data = ""                 # the calibration text: a text file, or a folder that data.py made (its train split)
bits = "4"                # 2 | 3 | 4 | 5 | 6 | 8 for all matrices, or by name: "4, mlp=3, blocks.0=8, head=0"
group_size = 64           # weights that share a scale and a zero: 32 | 64 | 128
damping = 0.01            # this share of the mean of H's diagonal is added to the diagonal
samples = 64              # windows of block_size tokens to calibrate on
block_size = 0            # tokens of a window; 0: the model's context, but 1,024 at most
batch_size = 8            # windows at a time
seed = 1337               # for the choice of windows
scale_dtype = "float16"   # of scales and biases in the file: float16 | float32
test = ""                 # for the perplexity before and after: a text file, or a folder (its val split)
max_tokens = 0            # tokens of that text; 0: all

settings = overrides(globals(), "checkpoint")

# ---- solver ----------------------------------------------------------------------------------------------------------

BLOCK = 128  # columns whose errors are applied one by one within the block, and by one matmul to all later columns


def quantize(W: mx.array, gram: mx.array, bits: int, group_size: int, damping: float = 0.01) -> tuple:
    """Quantize W (out, in) by GPTQ: integers q (out, in), scale and zero (out, in / group_size), float32, with
    W ~ (q - zero) scale. gram: H (in, in), the mean of x x^T over the inputs x."""
    W, H = np.array(W.astype(mx.float32)), np.array(gram, np.float64)
    dead = np.diag(H) == 0  # inputs that are always 0
    H[dead, dead], W[:, dead] = 1, 0
    H[np.diag_indices_from(H)] += damping * np.diag(H).mean()
    try:
        U = np.linalg.cholesky(np.linalg.inv(H)).T.astype(np.float32)
    except np.linalg.LinAlgError:
        raise UserError("H has no inverse on this text: give a greater --damping, or a longer text") from None
    q = np.empty(W.shape, np.uint8)
    scale, zero = (np.empty((len(W), W.shape[1] // group_size), np.float32) for _ in range(2))
    for start in range(0, W.shape[1], BLOCK):
        end = min(start + BLOCK, W.shape[1])
        errors = np.empty((len(W), end - start), np.float32)
        for j in range(start, end):
            group, first = divmod(j, group_size)
            if first == 0:
                _, s, z = round_to_nearest(mx.array(W[:, j:j + group_size]), bits, group_size)
                scale[:, group], zero[:, group] = np.array(s[:, 0]), np.array(z[:, 0])
            s, z = scale[:, group], zero[:, group]
            q[:, j] = np.clip(np.round(W[:, j] / s + z), 0, 2**bits - 1)
            errors[:, j - start] = (W[:, j] - (q[:, j] - z) * s) / U[j, j]
            W[:, j + 1:end] -= np.outer(errors[:, j - start], U[j, j + 1:end])
        W[:, end:] -= errors @ U[start:end, end:]
    return mx.array(q), mx.array(scale), mx.array(zero)


# ---- run -------------------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    if not data:
        raise UserError("there is no text to calibrate on: give --data=FILE")
    if samples < 1 or batch_size < 1 or not 0 < damping < math.inf:
        raise UserError("samples and batch_size must be 1 or more, and damping a finite number over 0")
    model, meta, enc, out = open_dense(checkpoint, out, f"gptq-{bits}", scale_dtype, data, test)
    widths = plan(model, bits, group_size)
    T = window_length(model.config, block_size)
    rows = windows(text_of(data, enc, checkpoint, "train"), samples, T, seed)
    if test:
        tokens = text_of(test, enc, checkpoint, "val", max_tokens)
        before = perplexity(model, tokens, enc.start, T)
    print(f"calibrated on {len(rows)} windows of {T:,} tokens\n{HEAD}")
    bar, streams = tqdm(total=len(widths), unit=" matrices", disable=None, dynamic_ncols=True), {}
    for part in dict.fromkeys(part_of(path) for path in widths):
        layers = {path: matrices(model)[path] for path in widths if part_of(path) == part}
        linear = {path: module for path, module in layers.items() if isinstance(module, nn.Linear)}
        inputs = matrix_inputs(model, linear, rows, batch_size, part, streams)
        for path, module in layers.items():
            W = dense_weight(module)
            found = quantize(W, inputs[path][0], widths[path], group_size, damping) if path in inputs else (
                round_to_nearest(W, widths[path], group_size))
            bar.write(pack_matrix(model, path, found, widths[path], scale_dtype) + "  rounded" * (path not in inputs))
            bar.update()
    bar.close()
    if test:
        print(f"before: {before}\nafter:  {perplexity(model, tokens, enc.start, T)}")
    save_packed(out, model, meta, settings, os.path.basename(__file__), method="gptq", bits=bits, group_size=group_size)
