"""Pack a checkpoint's matrices into integers of 2 to 8 bits, with the inputs that matter most made large beforehand.

    python awq.py out/ckpt.safetensors --data=book.txt
    python awq.py out/ckpt.safetensors --data=data/stdlib-bpe-4096 --bits="4, mlp=3, embed=8" --test=other.txt

AWQ (Lin et al. 2024): W x = (W diag(s)) (x / s), and columns that s makes large are rounded with less error. s = a^r,
a the mean size of each input over a text, r of 0, 0.05, ..., 0.95 by the least error of the outputs, tr(D H D^T), D
what rounding changes and H = mean x x^T. 1 / s goes into what makes x, where that is exact:

    attn.q, k, v       the norm before them
    mlp.gate, up       the norm before them
    mlp.down           the rows of mlp.up: by 1 / s for swiglu, by 1 / sqrt(s) for relu2; not for gelu
    attn.out           the rows of attn.v, where every query head has its own value head

Then each group's range is cut to the share of 1, 0.95, ..., 0.5 at which its part of the outputs errs the least. The
blocks are done in order, each reading what the packed ones before it give. Elsewhere s = 1: in attn.out of grouped
heads, of differential attention and of YOCO's second half, and after the norm before experts. What no text reaches, as
the embedding and experts, is rounded to the nearest. The file is as hqq.py's, the lines too: an error of the weights
above that of rounding to the nearest is in the nature of the method.
"""
import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
from tqdm import tqdm

from config import UserError, overrides
from model import GPT
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
from quantized import Factored, dense_weight
from score import windows

checkpoint = "out/ckpt.safetensors"  # a dense one
out = ""                  # the packed one; "": its name with -awq-BITS
data = ""                 # what it calibrates on: a text file, or a folder that data.py made (its train split)
bits = "4"                # of all matrices, or more: "4, mlp=3, blocks.0=8, head=0"
group_size = 64           # numbers that share a scale and a zero: 32 | 64 | 128
samples = 64              # windows of block_size tokens
batch_size = 8            # of them at a time
seed = 1337               # of which ones
scale_dtype = "float16"   # of scales and biases in the file: float16 | float32
test = ""                 # a text: perplexity before and after
max_tokens = 0            # of it; 0: all

settings = overrides(globals(), "checkpoint")

# ---- scales ----------------------------------------------------------------------------------------------------------


def rounded(W: mx.array, bits: int, group_size: int) -> mx.array:
    q, scale, zero = round_to_nearest(W, bits, group_size)
    groups = (q.reshape(*scale.shape, group_size) - zero[..., None]) * scale[..., None]
    return groups.reshape(W.shape)


def best_scale(weights: list[mx.array], gram: mx.array, size: mx.array, bits: list[int], group_size: int) -> mx.array:
    """s (in,) for matrices (out, in) that read the same inputs: gram, the mean of x x^T, size, that of |x|."""
    errors, scales, size = [], [], mx.maximum(size, 1e-4 * size.max())
    for r in range(20):
        s = size ** (r / 20)
        s = s / mx.sqrt(s.max() * s.min())
        changes = [rounded(W * s, width, group_size) / s - W for W, width in zip(weights, bits, strict=True)]
        errors.append(sum(((D @ gram) * D).sum() for D in changes))
        scales.append(s)
        mx.eval(errors[-1], s)
    return scales[int(mx.argmin(mx.stack(errors)).item())]


def places(model: GPT, start: str) -> list[tuple[list[str], list[tuple[nn.Module, float]]]]:
    """In a block, or YOCO's shared keys and values: the matrices that read the same, by name, and the modules of which
    the rows, or a norm's weights, take s^-power."""
    config, modules = model.config, dict(model.named_modules())

    def reading(part: str, *names: str) -> list[str]:  # of two thin matrices the one that reads is v, u writes
        paths = [f"{part}.{name}" for name in names if f"{part}.{name}" in modules]
        return [f"{path}.v" if isinstance(modules[path], Factored) else path for path in paths]

    def writing(path: str) -> nn.Module:
        return modules[f"{path}.u"] if isinstance(modules[path], Factored) else modules[path]

    if start == "shared":
        return [(reading("shared", "k", "v"), [(modules["shared.norm"], 1)])]
    found = [(reading(f"{start}.attn", "q", "k", "v", "lam"), [(modules[f"{start}.attn_norm"], 1)])]
    own_values = f"{start}.attn.v" in modules and config.n_kv_head == config.n_head and not config.diff_attn
    if own_values:
        found.append((reading(f"{start}.attn", "out"), [(writing(f"{start}.attn.v"), 1)]))
    if not config.n_expert:
        found.append((reading(f"{start}.mlp", "gate", "up"), [(modules[f"{start}.mlp_norm"], 1)]))
        if config.mlp in ("swiglu", "relu2"):
            power = 1 if config.mlp == "swiglu" else 0.5
            found.append((reading(f"{start}.mlp", "down"), [(writing(f"{start}.mlp.up"), power)]))
    return found


def scale_inputs(model: GPT, paths: list[str], makers: list[tuple[nn.Module, float]], s: mx.array):
    """The same function, of inputs divided by s (in,)."""
    modules = dict(model.named_modules())
    for path in paths:
        modules[path].weight = modules[path].weight * s.astype(modules[path].weight.dtype)
    for maker, power in makers:
        factor = (s ** -power).astype(maker.weight.dtype)
        maker.weight = maker.weight * (factor if maker.weight.ndim == 1 else factor[:, None])
        if "bias" in maker:
            maker.bias = maker.bias * factor


# ---- ranges ----------------------------------------------------------------------------------------------------------


def quantize(W: mx.array, gram: mx.array, bits: int, group_size: int) -> tuple[mx.array, mx.array, mx.array]:
    """Integers q (out, in), scale and zero (out, in / group_size), with W ~ (q - zero) scale: from the least number of
    a group to the greatest, or a share of that, by the least error of the group's part of the outputs."""
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
        raise UserError("nothing to calibrate on: give --data=FILE")
    if samples < 1 or batch_size < 1:
        raise UserError("samples and batch_size must be 1 or more")
    model, meta, enc, out = open_dense(checkpoint, out, f"awq-{bits}", scale_dtype)
    widths = plan(model, bits, group_size)
    rows = windows(text_of(data, enc, checkpoint, "train"), samples, model.config.block_size, seed)
    if test:
        tokens = text_of(test, enc, checkpoint, "val", max_tokens)
        before = perplexity(model, tokens, enc.bos)
    print(HEAD)
    bar = tqdm(total=len(widths), unit=" matrices", disable=None, dynamic_ncols=True)
    for start in dict.fromkeys(place_of(path) for path in widths):
        layers = {path: matrices(model)[path] for path in widths if place_of(path) == start}
        linear = {path: module for path, module in layers.items() if isinstance(module, nn.Linear)}
        reached = matrix_inputs(model, linear, rows, batch_size)
        for paths, makers in places(model, start) if start.startswith(("blocks.", "shared")) else []:
            read = [path for path in paths if path in reached]
            if read:
                gram, size = reached[read[0]]
                s = best_scale([linear[path].weight.astype(mx.float32) for path in read], gram, size,
                               [widths[path] for path in read], group_size)
                scale_inputs(model, paths, makers, s)
                for path in read:
                    reached[path] = (gram / (s[:, None] * s), size / s)
        for path in layers:
            W = dense_weight(matrices(model)[path])
            found = quantize(W, reached[path][0], widths[path], group_size) if path in reached else (
                round_to_nearest(W, widths[path], group_size))
            bar.write(pack_matrix(model, path, found, widths[path], scale_dtype) + "  rounded" * (path not in reached))
            bar.update()
    bar.close()
    if test:
        print(f"before: {before}\nafter:  {perplexity(model, tokens, enc.bos)}")
    save_packed(out, model, meta, settings, "awq.py", method="awq", bits=bits, group_size=group_size)
