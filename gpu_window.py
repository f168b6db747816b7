"""Attention in a sliding window on an NVIDIA GPU, forward and backward: gpu_window.cu, which MLX compiles.

MLX's fused attention has no windows. model.py computes them by blocks, with copies of keys and values and a mask, which
takes as long as the arithmetic that it saves. gpu_window.cu reads keys and values once for a tile of queries, and keeps
no scores (FlashAttention-2, Dao 2023). It knows windows of any width in bfloat16 and float16, grouped key/value heads
and a sink's logit for each head; for sinks, ALiBi, soft caps and several documents in a row model.py computes.
Deleting this file and gpu_window.cu costs speed and nothing else.
"""
import hashlib
import math
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import mlx.core as mx

UNKNOWN = "sinks", "alibi", "attn_softcap"  # settings that change scores in other ways
THREADS = 128  # of a thread block, as in gpu_window.cu
TILE = 64      # queries or keys of a thread block
TYPES = {mx.bfloat16: "__nv_bfloat16", mx.float16: "__half"}
INPUTS = {  # of each kernel, with S where it needs the shape and T where it needs the strides; and its outputs
    "forward": ("q:ST k:ST v:T sinks", "y logs"),  # without sinks where there are none
    "backward_queries": ("q:ST k:ST v:T y logs change:T", "dq deltas"),
    "backward_keys": ("q:ST k:ST v:T logs deltas change:T", "dk dv"),
}
FLOATS = "sinks", "logs", "deltas"


@cache
def ampere() -> bool:
    """Whether there is an NVIDIA GPU with asynchronous copies and tensor cores for bfloat16."""
    return mx.cuda.is_available() and mx.device_info(mx.gpu).get("compute_capability_major", 0) >= 8


def on_gpu() -> bool:
    return mx.default_device() == mx.gpu and ampere()


@cache
def kernel(name: str, dtype: mx.Dtype, D: int, window: int, scale: float, has_sink: bool) -> Callable:
    """One of the kernels of gpu_window.cu, for arrays of a dtype with heads of D numbers."""
    inputs, outputs = ([each.partition(":") for each in names.split()] for names in INPUTS[name])
    numbers = dict(D=D, WINDOW=window, THREADS=THREADS, HALF=int(dtype == mx.float16))
    header = "".join([
        "#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n",
        f"using T = {TYPES[dtype]};\n",
        *(f"constexpr int {key} = {value};\n" for key, value in numbers.items()),
        f"constexpr float SCALE = {scale!r}f;\n",
        (Path(__file__).parent / "gpu_window.cu").read_text(encoding="utf-8")])
    inputs = [each for each in inputs if has_sink or each[0] != "sinks"]
    arguments, kinds = [], []
    for each, _, extra in inputs:
        arguments += [each] + [f"{each}_shape"] * ("S" in extra) + [f"{each}_strides"] * ("T" in extra)
        kinds += [f"const {'float' if each in FLOATS else 'T'}*"]
        kinds += ["const __grid_constant__ Shape"] * ("S" in extra)
        kinds += ["const __grid_constant__ Strides"] * ("T" in extra)
    if name == "forward" and not has_sink:
        arguments.append("nullptr")
    arguments += [each for each, *_ in outputs]
    kinds += [f"{'float' if each in FLOATS else 'T'}*" for each, *_ in outputs]
    source = f"{name}({', '.join(arguments)});"
    full = f"window_{name}_{hashlib.sha256((header + source).encode()).hexdigest()[:16]}"
    # The declaration bounds the registers of the kernel, which MLX defines without bounds.
    blocks = 2 if D > 64 else 3 if name == "backward_keys" else 4  # at a time on a multiprocessor
    header += (f"namespace mlx::core::cu {{ __global__ void __launch_bounds__(THREADS, {blocks}) custom_kernel_{full}("
               f"{', '.join(kinds)}); }}\n")
    made = mx.fast.cuda_kernel(full, [each for each, *_ in inputs], [each for each, *_ in outputs], source, header,
                               ensure_row_contiguous=False, shared_memory=4 * TILE * (D + 8) * 2)

    def run(inputs: list[mx.array], heads: int, shapes: list[tuple], dtypes: list[mx.Dtype]) -> list[mx.array]:
        q = inputs[0]
        blocks = q.shape[0] * heads * -(-q.shape[2] // TILE)
        return made(inputs=inputs, grid=(blocks * THREADS, 1, 1), threadgroup=(THREADS, 1, 1), output_shapes=shapes,
                    output_dtypes=dtypes)

    return run


@cache
def windowed_attention(window: int, scale: float, has_sink: bool) -> Callable:
    """A function of q (B, H, T, D), k and v (B, KV, T, D) and perhaps sinks (H,), with the result (B, T, H, D), and
    base-2 logarithms of each query's sum of exponentials (B, H, T), which have no gradient."""

    def kernel_of(name, q):
        return kernel(name, q.dtype, q.shape[3], window, scale, has_sink)

    @mx.custom_function
    def forward(q, *others):
        B, H, T, D = q.shape
        return kernel_of("forward", q)([q, *others], H, [(B, T, H, D), (B, H, T)], [q.dtype, mx.float32])

    @forward.vjp
    def backward(primals, cotangents, outputs):
        (q, k, v, *sinks), (y, logs), dy = primals, outputs, cotangents[0].swapaxes(1, 2)
        (B, H, T, D), KV = q.shape, k.shape[1]
        dq, deltas = kernel_of("backward_queries", q)([q, k, v, y, logs, dy], H, [(B, T, H, D), (B, H, T)],
                                                      [q.dtype, mx.float32])
        dk, dv = kernel_of("backward_keys", q)([q, k, v, logs, deltas, dy], KV, [(B, T, KV, D)] * 2, [q.dtype] * 2)
        # A sink's weight has no value, so that the gradient of its logit is that weight times -delta.
        dsinks = [-(mx.exp(sink[:, None] - math.log(2) * logs) * deltas).sum((0, 2)) for sink in sinks]
        return *(x.swapaxes(1, 2) for x in (dq, dk, dv)), *dsinks

    return forward


def attention(config, q: mx.array, k: mx.array, v: mx.array, offset: int | mx.array,
              sink: mx.array | None) -> mx.array | None:
    """window_attention() of model.py, or None where model.py must compute it. The keys are those of the T queries."""
    D = q.shape[3]
    if not (on_gpu() and isinstance(offset, int) and D % 16 == 0 and D <= 128
            and q.dtype == k.dtype == v.dtype and q.dtype in TYPES and v.shape == k.shape):
        return None
    if any(getattr(config, name, False) for name in UNKNOWN):
        return None
    sinks = [] if sink is None else [sink.astype(mx.float32)]
    scale = config.attn_scale or config.head_dim ** -0.5
    y, _ = windowed_attention(config.sliding_window, scale, sink is not None)(q, k, v, *sinks)
    return y.swapaxes(1, 2)


if __name__ == "__main__":
    print("gpu_window.py has no command of its own: run train.py, which uses it", file=sys.stderr)
    sys.exit(2)
