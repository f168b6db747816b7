"""Pack a checkpoint's matrices into integers of 2 to 8 bits, column by column, each mending the errors of those before.

    python gptq.py out/ckpt.safetensors --data=book.txt
    python gptq.py out/ckpt.safetensors --data=data/stdlib-bpe-4096 --bits="4, mlp=3, embed=8" --test=other.txt

GPTQ (Frantar et al. 2023) wants the outputs W x near, not the weights: the least tr(D H D^T), D what rounding changes
and H = mean x x^T over a text. It rounds one column of W after the other, and moves all columns that are still to come
by what makes up best for its error: err / U_jj times U_j, where U^T U = H^-1, U upper triangular (the paper's Cholesky
form). A group's scale and zero are found when its first column comes, from the least and the greatest number there.

The blocks are done in order, each reading what the packed ones before it give; a batch of activations at a time is in
memory. What no text reaches, as the embedding and experts, is rounded to the nearest. Departures: columns are taken as
they come (no act-order), and the matrices of a block are calibrated together. The file is as hqq.py's, the lines too:
an error of the weights above that of rounding to the nearest is in the nature of the method.
"""
import math

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
    perplexity,
    place_of,
    plan,
    round_to_nearest,
    save_packed,
    text_of,
)
from quantized import dense_weight
from score import windows

checkpoint = "out/ckpt.safetensors"  # a dense one
out = ""                  # the packed one; "": its name with -gptq-BITS
data = ""                 # what it calibrates on: a text file, or a folder that data.py made (its train split)
bits = "4"                # of all matrices, or more: "4, mlp=3, blocks.0=8, head=0"
group_size = 64           # numbers that share a scale and a zero: 32 | 64 | 128
damping = 0.01            # added to H's diagonal, times its mean
samples = 64              # windows of block_size tokens
batch_size = 8            # of them at a time
seed = 1337               # of which ones
scale_dtype = "float16"   # of scales and biases in the file: float16 | float32
test = ""                 # a text: perplexity before and after
max_tokens = 0            # of it; 0: all

settings = overrides(globals(), "checkpoint")

# ---- solver ----------------------------------------------------------------------------------------------------------

BLOCK = 128  # columns that are updated one by one, before all others are by a matmul


def quantize(W: mx.array, gram: mx.array, bits: int, group_size: int, damping: float = 0.01) -> tuple:
    """Integers q (out, in), scale and zero (out, in / group_size), float32, with W ~ (q - zero) scale, by GPTQ. gram:
    the mean of x x^T (in, in) over the inputs."""
    W, H = np.array(W.astype(mx.float32)), np.array(gram, np.float64)
    dead = np.diag(H) == 0  # inputs that are always 0
    H[dead, dead], W[:, dead] = 1, 0
    H[np.diag_indices_from(H)] += damping * np.diag(H).mean()
    try:
        U = np.linalg.cholesky(np.linalg.inv(H)).T.astype(np.float32)
    except np.linalg.LinAlgError:
        raise UserError("the text tells too little of some inputs: give a greater --damping, or more text") from None
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
        raise UserError("nothing to calibrate on: give --data=FILE")
    if samples < 1 or batch_size < 1 or not 0 < damping < math.inf:
        raise UserError("samples and batch_size must be 1 or more, damping over 0")
    model, meta, enc, out = open_dense(checkpoint, out, f"gptq-{bits}", scale_dtype)
    widths = plan(model, bits, group_size)
    rows = windows(text_of(data, enc, checkpoint, "train"), samples, model.config.block_size, seed)
    if test:
        tokens = text_of(test, enc, checkpoint, "val", max_tokens)
        before = perplexity(model, tokens, enc.bos)
    print(HEAD)
    bar = tqdm(total=len(widths), unit=" matrices", disable=None, dynamic_ncols=True)
    for place in dict.fromkeys(place_of(path) for path in widths):
        layers = {path: matrices(model)[path] for path in widths if place_of(path) == place}
        linear = {path: module for path, module in layers.items() if isinstance(module, nn.Linear)}
        reached = matrix_inputs(model, linear, rows, batch_size)
        for path, module in layers.items():
            W = dense_weight(module)
            found = quantize(W, reached[path][0], widths[path], group_size, damping) if path in reached else (
                round_to_nearest(W, widths[path], group_size))
            bar.write(pack_matrix(model, path, found, widths[path], scale_dtype) + "  rounded" * (path not in reached))
            bar.update()
    bar.close()
    if test:
        print(f"before: {before}\nafter:  {perplexity(model, tokens, enc.bos)}")
    save_packed(out, model, meta, settings, "gptq.py", method="gptq", bits=bits, group_size=group_size)
