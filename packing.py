"""Functions that hqq.py, gptq.py and awq.py share: packing integers in MLX's layout, choosing the bits of each matrix,
recording the inputs of layers for calibration, files, and the printed table. quantized.py explains the terms."""
import math
import os
import re
import shlex
import sys

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from config import UserError, check_output, check_replaced, nearest
from draw import check_folder
from model import GPT, load_checkpoint, save_checkpoint
from quantized import BITS, GROUP_SIZES, dense_weight, natural, replace_module
from score import in_windows, read_tokens, score
from tokenizer import Tokenizer

# ---- integers --------------------------------------------------------------------------------------------------------


def pack(q: mx.array, bits: int) -> mx.array:
    """Integers (..., in) of `bits` bits -> words of uint32 (..., in * bits / 32). The integers stand one after another
    without gaps, each with its lowest bit first."""
    q = q.astype(mx.uint32).reshape(*q.shape[:-1], -1, 32)  # 32 integers fill `bits` words
    words = [mx.zeros(q.shape[:-1], dtype=mx.uint32)] * bits
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        words[word] = words[word] | q[..., i] << shift
        if shift + bits > 32:
            words[word + 1] = words[word + 1] | q[..., i] >> (32 - shift)
    return mx.stack(words, axis=-1).flatten(-2)


def round_to_nearest(weight: mx.array, bits: int, group_size: int) -> tuple[mx.array, mx.array, mx.array]:
    """Quantize a weight (..., out, in) to integers q of the same shape, with weight ~ (q - zero) scale; scale and zero
    (..., out, in / group_size) are float32. The steps are equal, from the least number of a group to the greatest; zero
    need not be an integer."""
    groups = weight.astype(mx.float32).reshape(*weight.shape[:-1], -1, group_size)
    least, greatest = groups.min(-1), groups.max(-1)
    scale = mx.where(greatest - least > 1e-30, (greatest - least) / (2**bits - 1), 1)  # 1: a constant group is exact
    zero = -least / scale
    q = mx.clip(mx.round(groups / scale[..., None] + zero[..., None]), 0, 2**bits - 1)
    return q.reshape(weight.shape).astype(mx.uint8), scale, zero


def packed_module(module: nn.Module, q: mx.array, scale: mx.array, zero: mx.array, bits: int,
                  dtype: mx.Dtype = mx.float16) -> nn.Module:
    """The quantized form of a linear layer, an embedding or experts, with the weight (q - zero) scale: integers q
    (..., out, in), scale and zero (..., out, in / group_size), stored as `dtype`. A bias is kept as it is."""
    packed = module.to_quantized(group_size=q.shape[-1] // scale.shape[-1], bits=bits)  # lazy: MLX's own integers are
    packed.weight, packed.scales = pack(q, bits), scale.astype(dtype)                   # replaced before computed
    packed.biases = (-scale * zero).astype(dtype)
    return packed


# ---- which matrices, and how many bits -------------------------------------------------------------------------------


def matrices(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose matrix can be quantized, by path: linear layers, experts, embeddings of tokens. Left out are
    routers and their predictors, the lambdas of differential attention, gates of value embeddings, and positions."""
    found = {path: module for path, module in model.named_modules() if hasattr(module, "to_quantized")
             or isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)) or "scales" in module}
    return {path: found[path] for path in sorted(found, key=natural)
            if not re.search(r"(router|predictor|lam|value_gate|pos_embed)$", path)}


def plan(model: nn.Module, bits: str, group_size: int) -> dict[str, int]:
    """The bits of each matrix that is to be quantized, by path. bits: "4", or "4, mlp=3, head=0": a name is a regular
    expression, the last one that matches a path counts, and 0 leaves a matrix as it is. UserError names a matrix that
    cannot be quantized in groups of group_size."""
    layers = matrices(model)
    if group_size not in GROUP_SIZES:
        raise UserError(f"group_size={group_size} is not one of {', '.join(map(str, GROUP_SIZES))}")
    for path, module in layers.items():
        if "scales" in module:
            raise UserError(f"{path} is quantized already, to {module.bits} bits: give the checkpoint before that")
    found = dict.fromkeys(layers, 0)
    for rule in bits.split(","):
        name, _, number = rule.strip().rpartition("=")
        if number not in ("0", *map(str, BITS)):
            raise UserError(f"bits={bits!r}: {number!r} is not one of 0, {', '.join(map(str, BITS))}")
        try:
            matching = [path for path in layers if re.search(name, path)]
        except re.error as error:
            raise UserError(f"bits={bits!r}: {name!r} is not a regular expression ({error})") from error
        if not matching:
            names = sorted({re.sub(r"^blocks\.\d+\.", "", path) for path in layers})
            raise UserError(f"bits={bits!r}: {name!r} matches no matrix: {nearest(name, names)}")
        found.update(dict.fromkeys(matching, int(number)))
    found = {path: number for path, number in found.items() if number}
    sizes = {path: layers[path].weight.shape[-1] for path in found}
    odd = [path for path in found if sizes[path] % group_size]
    if odd:
        fits = max((size for size in GROUP_SIZES if not any(n % size for n in sizes.values())), default=0)
        rules = dict.fromkeys(f"{re.sub(r'^blocks[.][0-9]+[.]', '', path)}=0" for path in odd)
        rest = shlex.quote(", ".join([bits, *rules]))
        advice = f"give --group_size={fits}" if fits else f"leave it out by --bits={rest}"
        raise UserError(f"{odd[0]} has {sizes[odd[0]]} inputs, not a multiple of group_size={group_size}: {advice}")
    if not found:
        raise UserError(f"bits={bits!r} quantizes nothing: give some matrix more than 0 bits")
    return found


# ---- calibration: the inputs of layers over a text -------------------------------------------------------------------


def part_of(path: str) -> str:
    """The part of the model that a matrix belongs to: blocks.3, shared, embed, head. Parts are calibrated in turn."""
    return ".".join(path.split(".")[:2 if path.startswith("blocks.") else 1])


class InputRecorder(nn.Module):
    """A linear layer that also sums x^T x (in, in) and |x| (in,) over its inputs x (count, in)."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.gram, self.absolute, self.count = layer, mx.array(0.0), mx.array(0.0), 0

    def __call__(self, x: mx.array) -> mx.array:
        flat = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        self.gram, self.absolute = self.gram + flat.T @ flat, self.absolute + mx.abs(flat).sum(0)
        self.count += len(flat)
        return self.layer(x)


def matrix_inputs(model: GPT, layers: dict[str, nn.Module], rows: mx.array, batch_size: int, part: str = "",
                  streams: dict[int, list[mx.array]] | None = None) -> dict[str, tuple]:
    """For each of the linear layers, by path: the means of x^T x (in, in) and of |x| (in,) of its inputs x over all
    tokens of rows (n, T). Later layers are not computed, and the activations of one batch are in memory at a time.
    streams: the residual streams (batch, T, C) before one block, for each batch, from the call for an earlier block, so
    that no block is computed again before it. If `part` is a block, they are replaced by those before this block."""
    streams, new = {} if streams is None else streams, []
    known, block = max(streams, default=-1), int(part[7:]) if part.startswith("blocks.") else -1

    def tap(site, at, x):
        if site == "resid" and block >= 0:
            x = streams[known][len(new)] if at == known else x
            if at == block:
                new.append(x)
        return x

    recorders, step = {path: InputRecorder(layer) for path, layer in layers.items()}, min(batch_size, len(rows))
    for path, recorder in recorders.items():
        replace_module(model, path, recorder)
    try:
        for i in range(0, len(rows), step):
            model(rows[i:i + step], tap=tap)  # lazy: only what the recorders need is computed
            mx.eval([(recorder.gram, recorder.absolute) for recorder in recorders.values()], new[-1:])
    finally:
        for path, recorder in recorders.items():
            replace_module(model, path, recorder.layer)
    if new:
        streams.clear()
        streams[block] = new
    for path, recorder in recorders.items():
        if not mx.isfinite(recorder.gram).all().item():
            raise UserError(f"{path} has infinite or NaN inputs on this text: give another checkpoint or text")
    return {path: (recorder.gram / recorder.count, recorder.absolute / recorder.count)
            for path, recorder in recorders.items()}


# ---- files -----------------------------------------------------------------------------------------------------------


def output_path(checkpoint: str, out: str, label: str, *texts: str) -> str:
    """The path of the file to write: `out`, or else the checkpoint's with the label. UserError if it cannot be written,
    if it is the checkpoint or one of the texts, or if it is another script's result."""
    out = out or f"{checkpoint.removesuffix('.safetensors')}-{label}.safetensors"
    check_output(out, checkpoint, *texts)
    check_folder(out)
    check_replaced(out, os.path.basename(sys.argv[0]))
    return out


def check_finite(path: str, arrays: dict[str, mx.array]):
    """UserError, which names the file and the first of its arrays that holds infinite or NaN numbers."""
    for name, array in arrays.items():
        if not mx.isfinite(array.sum()).item() and not mx.isfinite(array).all().item():  # the sum alone may overflow
            raise UserError(f"{path} has infinite or NaN numbers in {name}: give another checkpoint")


def open_dense(checkpoint: str, out: str, label: str, scale_dtype: str,
               *texts: str) -> tuple[GPT, dict, Tokenizer | None, str]:
    """The model to quantize, its header, its tokenizer, and the path of the file to write."""
    if scale_dtype not in ("float16", "float32"):
        raise UserError(f"scale_dtype={scale_dtype!r} is not one of float16, float32")
    model, meta = load_checkpoint(checkpoint)
    out = output_path(checkpoint, out, re.sub(r"[^.0-9a-z_=]+", "-", label), *texts)
    check_finite(checkpoint, dict(tree_flatten(model.parameters())))
    enc = Tokenizer.from_dict(meta["tokenizer"]) if meta.get("tokenizer") else None
    return model, meta, enc, out


def text_of(path: str, enc: Tokenizer | None, checkpoint: str, split: str, max_tokens: int = 0) -> np.ndarray:
    """The tokens (N,) of a text, as read_tokens gives them. UserError if the checkpoint has no tokenizer."""
    if enc is None:
        raise UserError(f"{checkpoint} holds no tokenizer to encode a text with: give another checkpoint")
    if max_tokens < 0:
        raise UserError(f"max_tokens={max_tokens}: it must be 0, for the whole text, or more")
    return read_tokens(path, enc, split, max_tokens)


def save_packed(out: str, model: GPT, meta: dict, settings: dict, script: str, **quantization):
    """Write the checkpoint. quantization: method, bits and group_size, for the header."""
    save_checkpoint(out, model, {**meta, "script": script, "settings": settings, "quantization": quantization})
    print(f"{out}: {os.path.getsize(out) / 1e6:.2f} MB, weights {megabytes(model):.2f} MB")


# ---- table -----------------------------------------------------------------------------------------------------------


def perplexity(model: GPT, tokens: np.ndarray, start: list[int], T: int) -> str:
    """The figures of tokens (N,), which follow `start`, in windows of T tokens."""
    nats, accuracy = score(model, tokens, start, T)
    return f"perplexity {math.exp(min(nats, 700)):.3f}, accuracy {accuracy:.2%}{in_windows(model.config, T)}"


def megabytes(module: nn.Module) -> float:
    return sum(array.nbytes for _, array in tree_flatten(module.parameters())) / 1e6


HEAD = f"{'matrix':24} {'bits':>4} {'error':>8} {'nearest':>8} {'ratio':>6} {'MB':>7} {'new MB':>7}"


def pack_matrix(model: GPT, path: str, found: tuple, bits: int, scale_dtype: str) -> str:
    """Quantize a matrix of the model with the (q, scale, zero) `found` for it. Returns a line of the table under HEAD:
    mean absolute error, error of rounding to the nearest, ratio of both, and megabytes before and after."""
    module = matrices(model)[path]
    W, group_size = dense_weight(module), found[0].shape[-1] // found[1].shape[-1]
    packed, rounded = (packed_module(module, *integers, bits, getattr(mx, scale_dtype))
                       for integers in (found, round_to_nearest(W, bits, group_size)))
    error, by_rounding = (mx.abs(dense_weight(layer) - W).mean().item() for layer in (packed, rounded))
    if not math.isfinite(error):
        raise UserError(f"{path} has scales beyond the range of {scale_dtype}: give --scale_dtype=float32")
    replace_module(model, path, packed)
    return (f"{path:24} {bits:4} {error:8.2e} {by_rounding:8.2e} {error / max(by_rounding, 1e-30):6.3f} "
            f"{megabytes(module):7.3f} {megabytes(packed):7.3f}")


if __name__ == "__main__":
    print(f"{sys.argv[0]} has no command of its own: run hqq.py, which uses it", file=sys.stderr)
    sys.exit(2)
