"""Drawing tokens on an NVIDIA GPU: gpu_sample.cu, which MLX compiles.

MLX sorts all logits to find the top_k largest ones, which takes as long as half of the blocks of a small model.
gpu_sample.cu finds them without a sort, and draws with the random numbers that model.py's sample_token() takes, so that
both draw the same tokens. It knows temperature 0 and a top_k of up to THREADS, with min_p; for all else MLX draws.
Deleting this file and gpu_sample.cu costs speed and nothing else.
"""
import math
import sys
from functools import cache
from pathlib import Path

import mlx.core as mx

THREADS = 1024  # of a thread block, which has a row of logits
TYPES = {mx.bfloat16: "__nv_bfloat16", mx.float16: "__half", mx.float32: "float"}


def on_gpu() -> bool:
    return mx.default_device() == mx.gpu and mx.cuda.is_available()


@cache
def kernel(dtype: mx.Dtype, V: int):
    """The kernel for logits of a dtype and a size of the vocabulary; None where gpu_sample.cu is missing."""
    path = Path(__file__).parent / "gpu_sample.cu"
    if not path.exists():
        return None
    header = (f"#include <cuda_bf16.h>\n#include <cuda_fp16.h>\nusing T = {TYPES[dtype]};\n"
              f"constexpr int V = {V}, THREADS = {THREADS};\n{path.read_text(encoding='utf-8')}")
    return mx.fast.cuda_kernel(f"draw_{V}_{str(dtype)[9:]}", ["logits", "keys", "settings"], ["tokens"],
                               "draw(logits, keys, *(const Settings*)settings, tokens);", header)


@cache
def packed_settings(top_k: int, keys: int, temperature: float, min_p: float) -> mx.array:
    """`struct Settings` as four words."""
    whole = mx.array([top_k, keys], dtype=mx.uint32)
    floats = mx.array([temperature, math.log(min_p) if min_p > 0 else -math.inf], dtype=mx.float32)
    found = mx.concatenate([whole, floats.view(mx.uint32)])
    mx.eval(found)
    return found


def draw(logits: mx.array, keys: mx.array, temperature: float, top_k: int, min_p: float) -> mx.array | None:
    """A token for each row of logits (B, V) -> (B,). keys: (2,), from which mx.random.categorical() would draw all
    rows, or (B, 2), one for each row. None where MLX must draw."""
    B, V = logits.shape
    known = keys is not None and (temperature == 0 or 0 < top_k <= min(THREADS, V))
    if not known or logits.dtype not in TYPES or not on_gpu() or (run := kernel(logits.dtype, V)) is None:
        return None
    settings = packed_settings(0 if temperature == 0 else top_k, keys.size // 2, temperature, min_p)
    return run(inputs=[logits, keys, settings], grid=(B * THREADS, 1, 1), threadgroup=(THREADS, 1, 1),
               output_shapes=[(B,)], output_dtypes=[mx.uint32])[0]


if __name__ == "__main__":
    print("gpu_sample.py has no command of its own: run sample.py, which uses it", file=sys.stderr)
    sys.exit(2)
