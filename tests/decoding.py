"""For tests of cpu_decode.py and gpu_decode.py: a small model of random weights, which reads one position at a time."""
from unittest import mock

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from model import GPT, GPTConfig


def build(settings: dict, bits: int = 0, dtype: mx.Dtype = mx.float32) -> GPT:
    """A small model of random weights, norms and biases included."""
    model = GPT(GPTConfig(**dict(n_layer=3, n_head=4, n_embd=64, vocab_size=96, block_size=64) | settings))
    rng = np.random.default_rng(0)
    model.update(tree_map(lambda p: p + mx.array(rng.normal(0, 0.1, p.shape).astype(np.float32)), model.parameters()))
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    model.set_dtype(dtype)
    model.eval()
    return model


def tokens(rows: int, length: int) -> mx.array:
    return mx.array(np.random.default_rng(rows).integers(0, 96, (rows, length)))


def one_by_one(model: GPT, idx: mx.array, prompt: int, decoder, fast: bool = True) -> tuple[np.ndarray, int]:
    """Logits of the positions after a prompt, read one at a time, and how many of them `decoder` computed, which is
    cpu_decode or gpu_decode; without `fast`, it computes none."""
    used, name = [], "logits" if hasattr(decoder, "logits") else "after_blocks"
    compute = getattr(decoder, name)

    def counted(*arguments):
        used.append(compute(*arguments) if fast else None)
        return used[-1]

    with mock.patch.object(decoder, name, counted):
        cache, logits = model.make_cache(), []
        model(idx[:, :prompt], cache=cache)
        for i in range(prompt, idx.shape[1]):
            logits.append(model(idx[:, i:i + 1], cache=cache))
    assert cache.offset == idx.shape[1] and getattr(cache.layers[0], "length", cache.offset) == cache.offset
    return np.array(mx.concatenate(logits, axis=1).astype(mx.float32)), sum(y is not None for y in used)
