"""Whether gpu_window.cu computes windowed attention as model.py does, on this machine's GPU, and how fast it is.

    MLX_ENABLE_TF32=0 python runs/gpu_window_check.py                   # 40 seconds, of which compiling takes 30
    MLX_ENABLE_TF32=0 python runs/gpu_window_check.py --peer=flex       # beside PyTorch's flex_attention

Results and gradients in 16 bits are compared with those of model.py's blocks in float32: the largest error, as a share
of the largest number, must be below 1%, and a second run, in mx.compile, must give the same bits. Then attention,
forward and backward, is timed in turn with model.py's blocks, with causal attention over all keys (cuDNN), and with
PyTorch's: with a mask (sdpa) or compiled for the mask (flex). A round computes four in a row, as layers follow each
other. Last, one layer of differential attention is timed beside one of plain attention.
"""
import os
import statistics
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import blas  # noqa: E402, F401  (before mlx)
import mlx.core as mx  # noqa: E402
from mlx.utils import tree_flatten, tree_unflatten  # noqa: E402

import model as core  # noqa: E402
from config import UserError, overrides  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

only = ""      # equal, speed or diff, with commas; "": all
peer = "none"  # none | sdpa | flex: PyTorch's attention
rounds = 12    # timed rounds

settings = overrides(globals())

CASES = [  # B, H, KV, T, D, window, sink, dtype
    (2, 4, 4, 1000, 64, 128, False, mx.bfloat16),
    (1, 4, 2, 700, 128, 300, True, mx.float16),
    (2, 6, 2, 513, 32, 20, True, mx.bfloat16),
    (1, 2, 2, 333, 96, 64, False, mx.bfloat16),
]
gpu_window = core.gpu_window


def attention(config: GPTConfig, fast: bool):
    """window_attention(), with or without gpu_window.py, of q, k, v and perhaps a sink."""
    def f(q, k, v, *sink):
        core.gpu_window = gpu_window if fast else None
        y = core.window_attention(config, 0, q, k, v, 0, *sink)
        core.gpu_window = gpu_window
        return y
    return f


def equal() -> int:
    wrong = 0
    for B, H, KV, T, D, window, has_sink, dtype in CASES:
        config = GPTConfig(n_head=H, n_kv_head=KV, head_dim=D, sliding_window=window, sink_logits=has_sink)
        arrays = [mx.random.normal((B, T, heads, D)).astype(dtype).swapaxes(1, 2) for heads in (H, KV, KV, H)]
        sink = [mx.random.normal((H,)) + 1] if has_sink else []
        found = []
        for fast, wrap in ((True, lambda f: f), (True, mx.compile), (False, lambda f: f)):
            results = wrap(lambda dy, *x, fast=fast, config=config: mx.vjp(attention(config, fast), x, [dy]))
            q, k, v, dy = (x if fast else x.astype(mx.float32) for x in arrays)
            (y,), gradients = results(dy, q, k, v, *sink)
            mx.eval(y, gradients)
            found.append([y, *gradients])
        errors = [(mx.abs(a - b).max() / mx.abs(b).max()).item() for a, b in zip(found[0], found[2], strict=True)]
        again = all(mx.array_equal(a, b).item() for a, b in zip(found[0][:4], found[1][:4], strict=True))
        bad = not max(errors) < 0.01 or not again
        wrong += bad
        print(f"B {B}, {H} heads, {KV} of keys, {T} positions, width {D}, window {window}{', sinks' * has_sink}, "
              f"{str(dtype)[9:]}: errors {' '.join(f'{e:.1e}' for e in errors)}{'' if again else ', OTHER BITS'}"
              f"{'   WRONG' if bad else ''}", flush=True)
    print("all agree" if not wrong else f"{wrong} are wrong")
    return wrong


def medians(work: dict) -> dict:
    """Seconds of each function that takes a number of times, in turn."""
    times = {name: [] for name in work}
    for i in range(rounds + 2):
        for name, f in work.items():
            began = time.perf_counter()
            f(4)
            times[name] += [(time.perf_counter() - began) / 4] * (i > 1)
    return {name: statistics.median(each) for name, each in times.items()}


def table(what: str, seconds: dict):
    ours = next(iter(seconds.values()))
    cells = [f"{name} {t * 1e3:.2f} ({t / ours:.2f})" for name, t in seconds.items()]
    print(f"{what}, ms: {', '.join(cells)}", flush=True)


def peers(B: int, H: int, T: int, D: int, window: int):
    """PyTorch's attention in a window, forward and backward, or None if it is not installed."""
    try:
        import torch
    except ImportError:
        print("PyTorch is not installed")
        return None
    q, k, v, dy = (torch.randn(B, H, T, D, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    arrays = [x.requires_grad_() for x in (q, k, v)]
    if peer == "flex":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        mask = create_block_mask(lambda b, h, i, j: (i >= j) & (i - j < window), None, None, T, T, device="cuda")
        compiled = torch.compile(flex_attention)
        attend = lambda: compiled(*arrays, block_mask=mask)  # noqa: E731
    else:
        i, j = torch.arange(T, device="cuda")[:, None], torch.arange(T, device="cuda")
        mask = (i >= j) & (i - j < window)
        attend = lambda: torch.nn.functional.scaled_dot_product_attention(*arrays, attn_mask=mask)  # noqa: E731

    def run(times):
        for _ in range(times):
            torch.autograd.grad(attend(), arrays, dy)
        torch.cuda.synchronize()
    return run


def speed(B: int = 16, H: int = 12, T: int = 4096, D: int = 64):
    for window in (128, 1024):
        config = GPTConfig(n_head=H, head_dim=D, sliding_window=window)
        q, k, v, dy = (mx.random.normal((B, H, T, D)).astype(mx.bfloat16) for _ in range(4))
        mx.eval(q, k, v, dy)

        def times(f, *arrays):
            q, k, v, dy = arrays
            return lambda n: mx.eval([mx.vjp(f, [q, k, v], [dy])[1] for _ in range(n)])

        work = {"kernel": times(attention(config, True), q, k, v, dy),
                "model.py": times(attention(config, False), q, k, v, dy),
                "all keys": times(lambda *x, config=config: core.attend(config, *x, "causal"), q, k, v, dy)}
        if peer != "none" and (theirs := peers(B, H, T, D, window)):
            work[f"PyTorch's {peer}"] = theirs
        table(f"window {window} of {T}, {B} x {H} heads of {D}", medians(work))


def layer(B: int = 16, T: int = 1024, **own):
    """A function that computes a layer of attention and its gradients a number of times."""
    attn = GPT(GPTConfig(n_layer=1, n_embd=768, n_head=12, block_size=T, vocab_size=64, **own)).blocks[0].attn
    attn.set_dtype(mx.bfloat16)
    names, values = zip(*tree_flatten(attn.trainable_parameters()), strict=True)
    x, dy = (mx.random.normal((B, T, 768)).astype(mx.bfloat16) for _ in range(2))
    mx.eval(x, dy, values)

    def f(x, *values):
        attn.update(tree_unflatten(list(zip(names, values, strict=True))))
        return attn(x, 0, None, core.no_tap, {})

    gradients = mx.compile(lambda x, dy, *values: mx.vjp(f, [x, *values], [dy])[1])
    return lambda n: mx.eval([gradients(x, dy, *values) for _ in range(n)])


if __name__ == "__main__":
    if not mx.cuda.is_available():
        raise UserError("this machine has no GPU that MLX can use: install mlx[cuda13] on one that has")
    parts = only.split(",") if only else ["equal", "speed", "diff"]
    print(mx.device_info().get("device_name", ""))
    bad = equal() if "equal" in parts else 0
    if "speed" in parts:
        speed()
    if "diff" in parts:
        table("attention of 16 x 1024, 12 heads, with its projections", medians(
            {"plain": layer(), "differential": layer(diff_attn=True),
             "version 2": layer(diff_attn=True, diff_attn_version=2)}))
    sys.exit(bool(bad))
