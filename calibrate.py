"""What the matrices of a model read from a text, by which gptq.py and awq.py weigh their errors."""
import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from config import UserError
from model import GPT
from quantized import replace_module


def windows(tokens: np.ndarray, n: int, T: int, seed: int) -> mx.array:
    """n windows of T tokens each, drawn from a text without a window twice: (n, T)."""
    if seed < 0:
        raise UserError(f"seed={seed}: it must be 0 or more")
    if len(tokens) < T:
        raise UserError(f"the text has {len(tokens)} tokens, less than one window of {T}: give a longer one")
    starts = np.random.default_rng(seed).permutation(len(tokens) // T)[:n] * T
    return mx.array(np.stack([tokens[start:start + T] for start in starts]))


def place_of(path: str) -> str:
    """What is calibrated at a time: blocks.3, shared, embed, head."""
    return ".".join(path.split(".")[:2 if path.startswith("blocks.") else 1])


class Recorder(nn.Module):
    """A linear layer that sums up what it reads: x^T x (in, in), and |x| (in,)."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.gram, self.size, self.count = layer, mx.array(0.0), mx.array(0.0), 0

    def __call__(self, x: mx.array) -> mx.array:
        flat = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        self.gram, self.size = self.gram + flat.T @ flat, self.size + mx.abs(flat).sum(0)
        self.count += len(flat)
        return self.layer(x)


def inputs(model: GPT, layers: dict[str, nn.Module], rows: mx.array, batch_size: int) -> dict[str, tuple]:
    """For each of these linear layers, by path: the mean of x^T x (in, in) and of |x| (in,) over all tokens of rows
    (n, T). Only what leads to these layers is computed, and a batch at a time is in memory."""
    recorders = {path: Recorder(layer) for path, layer in layers.items()}
    for path, recorder in recorders.items():
        replace_module(model, path, recorder)
    try:
        for i in range(0, len(rows), batch_size):
            model(rows[i:i + batch_size])  # lazily: what no recorder needs is never computed
            mx.eval([(recorder.gram, recorder.size) for recorder in recorders.values()])
    finally:
        for path, recorder in recorders.items():
            replace_module(model, path, recorder.layer)
    for path, recorder in recorders.items():
        if not mx.isfinite(recorder.gram).all().item():
            raise UserError(f"{path} reads numbers of the text that are infinite or none: the checkpoint breaks down "
                            "on it, nor would a packed one work")
    return {path: (recorder.gram / recorder.count, recorder.size / recorder.count)
            for path, recorder in recorders.items()}
