"""Quantize a checkpoint's matrices to integers of 2 to 8 bits, after scaling up the columns of large inputs.

    python awq.py out/ckpt.safetensors --data=book.txt
    python awq.py out/ckpt.safetensors --data=data/stdlib-bpe-4096 --bits="4, mlp=3, embed=8" --test=other.txt

AWQ (Lin et al. 2024): W x = (W diag(s)) (x / s), and the columns that s scales up are rounded with less relative error.
s = a^r, where a is the mean of |x| for each input over a calibration text, and r is the one of 0, 0.05, ..., 0.95 that
gives the least error of the outputs, tr(D H D^T); D is the rounding error of W, and H = mean x x^T. The division of x
by s is folded into the weights that produce x, where that is exact:

    matrices that read x      weights that produce x
    attn.q, k, v              the norm before them, if there is one
    mlp.gate, up              the norm before them, if there is one
    mlp.down                  rows of mlp.up: times 1 / s for swiglu and geglu, times 1 / sqrt(s) for relu2
    attn.out                  rows of attn.v, where every query head has its own value head

All other matrices have s = 1: attn.out with grouped heads, differential attention, value residuals or value embeddings,
or in YOCO's second half; and the matrices of experts. Then the range of each group is clipped to the one of the shares
1, 0.95, ..., 0.5 of it that gives the least error of the outputs.

Blocks are quantized in order, and the inputs of a block are computed with the quantized blocks before it. The token
embedding and experts are rounded to the nearest, and marked "rounded". File and table are as hqq.py's; the error of the
weights can be above that of rounding to the nearest, since AWQ minimizes the error of the outputs.
"""
import os

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
from tqdm import tqdm

from config import UserError, overrides
from model import GPT, check_known
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
from quantized import Factored, dense_weight
from score import window_length, windows

checkpoint = "out/ckpt.safetensors"  # a checkpoint that is not quantized
out = ""                  # the quantized checkpoint; "": the name of the checkpoint with -awq-BITS
data = ""                 # the calibration text: a text file, or a folder that data.py made (its train split)
bits = "4"                # 2 | 3 | 4 | 5 | 6 | 8 for all matrices, or by name: "4, mlp=3, blocks.0=8, head=0"
group_size = 64           # weights that share a scale and a zero: 32 | 64 | 128
samples = 64              # windows of block_size tokens to calibrate on
block_size = 0            # tokens of a window; 0: the model's context, but 1,024 at most
batch_size = 8            # windows at a time
seed = 1337               # for the choice of windows
scale_dtype = "float16"   # of scales and biases in the file: float16 | float32
test = ""                 # for the perplexity before and after: a text file, or a folder (its val split)
max_tokens = 0            # tokens of that text; 0: all

settings = overrides(globals(), "checkpoint")

# ---- scales ----------------------------------------------------------------------------------------------------------

# Settings of the variants that shared_inputs() was written for
KNOWN = ("alibi sliding_window window_pattern sinks diff_attn diff_attn_version n_expert expert_top_k n_shared_expert "
         "expert_balance mod mod_capacity mod_every yoco value_residual value_embeds softcap attn_softcap attn_scale "
         "rotary_dim rope_scaling rope_pattern window_theta parallel norm_place norm_bias out_bias head_bias "
         "qk_norm_width embed_scale residual_scale logit_scale sink_logits router_bias")


def rounded(W: mx.array, bits: int, group_size: int) -> mx.array:
    """W (out, in) after rounding to the nearest and back."""
    q, scale, zero = round_to_nearest(W, bits, group_size)
    groups = (q.reshape(*scale.shape, group_size) - zero[..., None]) * scale[..., None]
    return groups.reshape(W.shape)


def best_scale(weights: list[mx.array], gram: mx.array, a: mx.array, bits: list[int], group_size: int) -> mx.array:
    """s (in,) for weights (out, in) that multiply one input x: gram is the mean of x x^T (in, in), a is the
    mean of |x| (in,)."""
    errors, scales, a = [], [], mx.maximum(a, 1e-4 * a.max())
    for r in range(20):
        s = a ** (r / 20)
        s = s / mx.sqrt(s.max() * s.min())
        changes = [rounded(W * s, width, group_size) / s - W for W, width in zip(weights, bits, strict=True)]
        errors.append(sum(((D @ gram) * D).sum() for D in changes))
        scales.append(s)
        mx.eval(errors[-1], s)
    return scales[int(mx.argmin(mx.stack(errors)).item())]


def shared_inputs(model: GPT, part: str) -> list[tuple[list[str], list[tuple[nn.Module, float]]]]:
    """For a block, or for "shared" (YOCO's keys and values): (paths, producers) of each input that can be scaled.
    paths: the matrices that multiply the input. producers: (module, power); rows, or norm weights, take s^-power."""
    check_known(model.config, KNOWN, "awq.py")
    config, modules = model.config, dict(model.named_modules())

    def reading(start: str, *names: str) -> list[str]:  # of a low-rank layer u v, the factor v multiplies the input
        paths = [f"{start}.{name}" for name in names if f"{start}.{name}" in modules]
        return [f"{path}.v" if isinstance(modules[path], Factored) else path for path in paths]

    def producing(path: str) -> nn.Module:
        return modules[f"{path}.u"] if isinstance(modules[path], Factored) else modules[path]

    if part == "shared":
        return [(reading("shared", "k", "v"), [(modules["shared.norm"], 1)])]
    found = []
    if f"{part}.attn_norm" in modules:
        found.append((reading(f"{part}.attn", "q", "k", "v", "lam", "value_gate"), [(modules[f"{part}.attn_norm"], 1)]))
    other_values = config.diff_attn or config.value_residual or f"{part}.attn.value_embed" in modules
    if f"{part}.attn.v" in modules and config.n_kv_head == config.n_head and not other_values:
        found.append((reading(f"{part}.attn", "out"), [(producing(f"{part}.attn.v"), 1)]))
    if not config.n_expert:
        if f"{part}.mlp_norm" in modules:
            found.append((reading(f"{part}.mlp", "gate", "up"), [(modules[f"{part}.mlp_norm"], 1)]))
        if config.mlp in ("swiglu", "geglu", "relu2"):  # not gelu and swiglu_clip, which do not scale with their input
            power = 0.5 if config.mlp == "relu2" else 1
            found.append((reading(f"{part}.mlp", "down"), [(producing(f"{part}.mlp.up"), power)]))
    return found


def scale_inputs(model: GPT, paths: list[str], producers: list[tuple[nn.Module, float]], s: mx.array):
    """Divide an input from shared_inputs() by s (in,), and multiply the columns of the matrices that read it by s: the
    model's outputs do not change."""
    modules = dict(model.named_modules())
    for path in paths:
        weight = modules[path].weight
        modules[path].weight = weight * s[:weight.shape[1]].astype(weight.dtype)  # value_gate reads the first ones
    for producer, power in producers:
        factor = (s ** -power).astype(producer.weight.dtype)
        producer.weight = producer.weight * (factor if producer.weight.ndim == 1 else factor[:, None])
        if "bias" in producer:
            producer.bias = producer.bias * factor


# ---- ranges ----------------------------------------------------------------------------------------------------------


def quantize(W: mx.array, gram: mx.array, bits: int, group_size: int) -> tuple[mx.array, mx.array, mx.array]:
    """Quantize W (out, in) to integers q (out, in), scale and zero (out, in / group_size), with W ~ (q - zero) scale.
    The range of each group is clipped to the share of it that gives the least error of the outputs. gram: the mean of
    x x^T (in, in)."""
    groups = W.reshape(len(W), -1, group_size)
    n = groups.shape[1]
    blocks = gram.reshape(n, group_size, n, group_size)[mx.arange(n), :, mx.arange(n)]  # (n, group, group)
    least, best = mx.full(groups.shape[:2], mx.inf), None
    for share in range(20, 9, -1):
        cut = mx.clip(groups, groups.min(-1, keepdims=True) * share / 20, groups.max(-1, keepdims=True) * share / 20)
        q, scale, zero = round_to_nearest(cut.reshape(W.shape), bits, group_size)
        D = (q.reshape(groups.shape) - zero[..., None]) * scale[..., None] - groups
        error = (mx.einsum("ogi,gij->ogj", D, blocks) * D).sum(-1)
        better = error < least
        least = mx.minimum(error, least)
        found = q.reshape(groups.shape), scale, zero
        best = found if best is None else tuple(
            mx.where(better[..., None] if new.ndim == 3 else better, new, old)
            for new, old in zip(found, best, strict=True))
        mx.eval(least, *best)
    return best[0].reshape(W.shape), best[1], best[2]


# ---- run -------------------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    if not data:
        raise UserError("there is no text to calibrate on: give --data=FILE")
    if samples < 1 or batch_size < 1:
        raise UserError("samples and batch_size must be 1 or more")
    model, meta, enc, out = open_dense(checkpoint, out, f"awq-{bits}", scale_dtype, data, test)
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
        for paths, producers in shared_inputs(model, part) if part.startswith(("blocks.", "shared")) else []:
            known = [path for path in paths if path in inputs]
            if known:
                gram, a = inputs[known[0]]
                s = best_scale([linear[path].weight.astype(mx.float32) for path in known], gram, a,
                               [widths[path] for path in known], group_size)
                scale_inputs(model, paths, producers, s)
                for path in known:
                    inputs[path] = (gram / (s[:, None] * s), a / s)
        for path in layers:
            W = dense_weight(matrices(model)[path])
            found = quantize(W, inputs[path][0], widths[path], group_size) if path in inputs else (
                round_to_nearest(W, widths[path], group_size))
            bar.write(pack_matrix(model, path, found, widths[path], scale_dtype) + "  rounded" * (path not in inputs))
            bar.update()
    bar.close()
    if test:
        print(f"before: {before}\nafter:  {perplexity(model, tokens, enc.start, T)}")
    save_packed(out, model, meta, settings, os.path.basename(__file__), method="awq", bits=bits, group_size=group_size)
