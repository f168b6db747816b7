"""Whether gpu_decode.cu and gpu_sample.cu compute what model.py does, on this machine's GPU, and how fast they are.

    MLX_ENABLE_TF32=0 python runs/gpu_decode_check.py

Models of many settings, formats and batch sizes read a prompt and then 40 positions, one at a time, with and without
gpu_decode.py: in float32 the logits must agree within 2e-4 of the largest one; in 16 bits they must be as near as
model.py's to what the weights give in float32, within 30%. Tokens drawn by gpu_sample.py must be those that MLX draws.
Then models of GPT-2's size (124M) write 200 tokens, with the prompt's time left out, and the medians of several rounds
are printed.
"""
import os
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]
import blas  # noqa: E402, F401  (before mlx)
import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import numpy as np  # noqa: E402
from decoding import build, one_by_one, tokens  # noqa: E402

import model as core  # noqa: E402
from config import UserError, overrides  # noqa: E402
from model import GPT, GPTConfig, generate  # noqa: E402

only = ""    # equal or speed; "": both
rounds = 3   # of the speeds

settings = overrides(globals())

SETTINGS = {
    "default": {},
    "GPT-2": dict(pos="learned", norm="layer", mlp="gelu", bias=True, qk_norm=False),
    "gelu_tanh": dict(mlp="gelu_tanh"),
    "Llama 3.1": dict(mlp="swiglu", n_kv_head=2, qk_norm=False, rope_factor=8.0, rope_original=16),
    "Qwen2": dict(mlp="swiglu", qkv_bias=True, qk_norm=False, head_dim=64),
    "StableLM": dict(norm="layer", norm_bias=True, rotary_dim=4, mlp="swiglu", qk_norm=False),
    "SmolLM3": dict(rope_pattern="RRN", mlp="swiglu", qk_norm=False),
    "Granite": dict(residual_scale=0.3, logit_scale=0.2, attn_scale=0.1, embed_scale=3.0, out_bias=True),
    "soft caps": dict(mlp="geglu", attn_softcap=3.0, softcap=5.0, n_kv_head=1, head_dim=96),
    "own head": dict(tie=False, head_bias=True, vocab_size=99),
}
GPT2 = dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50304, block_size=1024, pos="learned", norm="layer",
            mlp="gelu_tanh", bias=True, qk_norm=False)


def equal():
    bad = 0
    for n, (name, each) in enumerate(SETTINGS.items()):
        for dtype, bits, rows, prompt in ((mx.float32, 0, 1, 590), (mx.bfloat16, 0, 16, 90),
                                          (mx.float32, 4, 4, 3) if n % 2 else (mx.float16, 8, 5, 240)):
            model, idx = build(dict(n_embd=128, block_size=640) | each, bits, dtype), tokens(rows, prompt + 40)
            (a, used), (b, _) = (one_by_one(model, idx, prompt, core.gpu_decode, fast) for fast in (True, False))
            if dtype == mx.float32:
                error, bound = np.abs(a - b).max(), 2e-4 * np.abs(b).max()
            else:
                model.set_dtype(mx.float32)
                exact, _ = one_by_one(model, idx, prompt, core.gpu_decode, False)
                error, bound = np.abs(a - exact).max(), 1.3 * np.abs(b - exact).max()
            wrong = not error < bound or used < 38
            bad += wrong
            print(f"{name:13} {str(dtype)[9:]:9} {bits or '':1}  {rows:2} rows after {prompt:3}: error {error:.1e}, "
                  f"allowed {bound:.1e}, {used} of 40 positions{'   WRONG' if wrong else ''}", flush=True)
    for dtype, V, keys, top_k in ((mx.bfloat16, 50304, 1, 50), (mx.float32, 151936, 4, 200), (mx.float16, 3000, 4, 0)):
        logits = (3 * mx.random.normal((4, V))).astype(dtype)
        arguments = mx.random.split(mx.random.key(V), 4)[:keys].squeeze(), 0.8 if top_k else 0.0, top_k
        drawn = [core.sample_token(logits, *arguments).tolist()]
        kept, core.gpu_sample = core.gpu_sample, None
        drawn.append(core.sample_token(logits, *arguments).tolist())
        core.gpu_sample = kept
        bad += drawn[0] != drawn[1]
        print(f"draws of {V} {str(dtype)[9:]}, top_k {top_k}: {drawn[0]}, MLX {drawn[1]}")
    print("all agree" if not bad else f"{bad} are wrong")
    return bad


def speed():
    kept = core.gpu_decode, core.gpu_sample
    for bits in (0, 4):
        model = GPT(GPTConfig(**GPT2))
        model.set_dtype(mx.bfloat16)
        if bits:
            nn.quantize(model, group_size=64, bits=bits)
        model.eval()
        mx.eval(model.parameters())
        for rows in (1, 16):
            prompt = np.random.default_rng(0).integers(0, 50000, (rows, 64)).tolist()
            for temperature, top_k in ((0, 0), (0.8, 50)):
                times = {True: [], False: []}
                for _ in range(rounds + 1):
                    for fast in times:
                        core.gpu_decode, core.gpu_sample = kept if fast else (None, None)
                        written = generate(model, prompt, 201, temperature, top_k)
                        next(written)
                        began = time.perf_counter()
                        for _ in written:
                            pass
                        times[fast].append((time.perf_counter() - began) / 200)
                core.gpu_decode, core.gpu_sample = kept
                a, b = (np.median(times[fast][1:]) for fast in (True, False))
                print(f"{bits or 'bf16'} {rows:2} rows, temperature {temperature}: {rows / a:,.0f} tokens/s, plain "
                      f"{rows / b:,.0f}, ratio {b / a:.2f}", flush=True)


if __name__ == "__main__":
    if not mx.cuda.is_available():
        raise UserError("this machine has no GPU that MLX can use: install mlx[cuda13] on one that has")
    print(mx.device_info().get("device_name", ""))
    wrong = equal() if only != "speed" else 0
    if only != "equal":
        speed()
    sys.exit(bool(wrong))
