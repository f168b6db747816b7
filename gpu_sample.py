"""Drawing tokens on an NVIDIA GPU: gpu_sample.cu.

MLX sorts all logits to find the top_k largest ones, which takes as long as half of the blocks of a small model.
gpu_sample.cu finds them without a sort, and draws with the random numbers that model.py's sample_token() takes, so that
both draw the same tokens. It knows temperature 0 and a top_k of up to THREADS, with min_p; for all else MLX draws.
Deleting this file and gpu_sample.cu costs speed and nothing else.
"""
import math
import sys
from functools import cache

import mlx.core as mx

import gpu_kernels

THREADS = 1024  # of a thread block, which has a row of logits
TYPES = mx.bfloat16, mx.float16, mx.float32


def on_gpu() -> bool:
    return mx.default_device() == mx.gpu and mx.cuda.is_available()


@cache
def kernel(dtype: mx.Dtype, V: int) -> bytes | None:
    """The kernel for logits of a dtype and a size of the vocabulary; None where it cannot be compiled."""
    try:
        constants = gpu_kernels.definitions(T=dtype, V=V, THREADS=THREADS)
        return gpu_kernels.compiled(constants + gpu_kernels.source_of("gpu_sample.cu"))
    except OSError:
        return None


def draw(logits: mx.array, keys: mx.array, temperature: float, top_k: int, min_p: float) -> mx.array | None:
    """A token for each row of logits (B, V) -> (B,). keys: (2,), from which mx.random.categorical() would draw all
    rows, or (B, 2), one for each row. None where MLX must draw."""
    B, V = logits.shape
    known = keys is not None and (temperature == 0 or 0 < top_k <= min(THREADS, V))
    if not known or logits.dtype not in TYPES or not on_gpu() or (code := kernel(logits.dtype, V)) is None:
        return None
    least = math.log(min_p) if min_p > 0 else -math.inf
    scalars = 0 if temperature == 0 else top_k, keys.size // 2, float(temperature), least
    return gpu_kernels.run("draw", code, [logits, keys], [((B,), mx.uint32)], B, THREADS, scalars)[0]


if __name__ == "__main__":
    print("gpu_sample.py has no command of its own: run sample.py, which uses it", file=sys.stderr)
    sys.exit(2)
