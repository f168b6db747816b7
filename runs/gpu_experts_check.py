"""Whether gpu_experts.cu computes what model.py computes, on this machine's GPU, and how fast training is with it.

    python runs/gpu_experts_check.py

First the experts of one layer, with MLPs of several kinds and in both formats of 16 bits, against matmuls in float32:
values and gradients may be no further from them than 1.3 times the plain form's. Then training steps of GPT-2's size
(124M, 16 x 1024 tokens): dense; 8 experts of half the width, 2 for each token, with and without gpu_experts.py; Mixture
of Depths. They take turns, and the medians are printed. With MLX_ENABLE_TF32=0 the plain form would run without tensor
cores: leave it unset.
"""
import os
import statistics
import sys
import time
from functools import partial

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT]
import blas  # noqa: E402, F401  (before mlx)
import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
from mlx.utils import tree_map  # noqa: E402

import model as core  # noqa: E402
from config import UserError, overrides  # noqa: E402
from model import GPT, GPTConfig, MoE  # noqa: E402

only = ""      # equal or speed; "": both
rounds = 10    # of the speeds
models = "dense,experts,plain,depths"  # of the speeds

settings = overrides(globals())

CASES = [  # MLP, dtype, experts, of a token, width, hidden width, tokens
    ("relu2", mx.bfloat16, 8, 2, 768, 1536, 2048), ("relu2", mx.float16, 8, 2, 256, 512, 999),
    ("gelu", mx.bfloat16, 4, 1, 128, 320, 300), ("gelu_tanh", mx.float16, 32, 4, 192, 128, 500),
    ("swiglu", mx.bfloat16, 8, 3, 256, 704, 700), ("geglu", mx.float16, 3, 2, 384, 192, 65)]
SHAPE = dict(n_layer=12, n_embd=768, n_head=12, block_size=1024, vocab_size=50304)
MODELS = {"dense": {}, "experts": dict(ffn_dim=1536, n_expert=8), "plain": dict(ffn_dim=1536, n_expert=8),
          "depths": dict(mod="topk")}


def values_and_gradients(f, x: mx.array, gates: mx.array, weights: dict, dtype: mx.Dtype) -> list:
    """y = f(x, gates, weights), and the gradients of the sum of y times random numbers, computed in a dtype."""
    factors = mx.random.normal(x.shape, key=mx.random.key(1))

    def value(x, gates, weights):
        y = f(x.astype(dtype), gates.astype(dtype), weights).astype(mx.float32)
        return (y * factors).sum(), y

    (_, y), (dx, dgates, dweights) = mx.value_and_grad(value, (0, 1, 2))(x, gates, weights)
    found = [y, dx, dgates, *(dweights[name] for name in sorted(dweights))]
    mx.eval(found)
    return found


def equal() -> int:
    bad = 0
    for mlp, dtype, E, K, C, F, N in CASES:
        moe = MoE(GPTConfig(mlp=mlp, n_expert=E, expert_top_k=K, n_embd=C, ffn_dim=F), 0)

        def rounded(*shape, scale=1.0, dtype=dtype):
            return mx.random.normal(shape, scale=scale).astype(dtype).astype(mx.float32)

        weights = {name: rounded(*moe[name].weight.shape, scale=moe[name].weight.shape[2]**-0.5)
                   for name in ("gate", "up", "down") if name in moe}
        x, gates = rounded(N, C), rounded(N, K)
        chosen = mx.argsort(mx.random.uniform(shape=(N, E)), axis=1)[:, :K]

        def in_module(f, x, gates, weights, moe=moe, chosen=chosen):
            moe.update({name: {"weight": weight} for name, weight in weights.items()})
            return f(x, gates, chosen)

        def by_matmuls(x, gates, weights, mlp=mlp, chosen=chosen):
            up = weights["up"]
            if "gate" in weights:
                up = mx.stack([weights["gate"], up], axis=2).reshape(len(up), -1, x.shape[1])
            return core.gpu_experts.by_matmuls(mlp, x, gates, up, weights["down"], chosen)

        exact = values_and_gradients(by_matmuls, x, gates, weights, mx.float32)
        both = [values_and_gradients(partial(in_module, f), x, gates, weights, dtype)
                for f in (partial(core.gpu_experts.mixture, moe), moe.weighed)]
        errors = [[(mx.linalg.norm((a - b).reshape(-1)) / mx.linalg.norm(b.reshape(-1))).item()
                   for a, b in zip(found, exact, strict=True)] for found in both]
        wrong = not all(a < 1.3 * b + 1e-3 < 0.1 for a, b in zip(*errors, strict=True))
        bad += wrong
        print(f"{mlp:9} {str(dtype)[9:]:8} {K} of {E:2}, {C} -> {F}, {N:4} tokens: errors, and the plain form's: "
              + ", ".join(f"{a:.4f} {b:.4f}" for a, b in zip(*errors, strict=True)) + ("   WRONG" if wrong else ""),
              flush=True)
    print("all agree" if not bad else f"{bad} are wrong")
    return bad


def training(name: str):
    """A function that takes a step of bench.py's kind."""
    model = GPT(GPTConfig(**SHAPE, **MODELS[name]))
    model.compute_dtype = mx.bfloat16
    opt = optim.Adam(1e-4, betas=[0.9, 0.95], bias_correction=True)
    opt.init(model.trainable_parameters())
    state = [model.state, opt.state]
    tokens = mx.random.randint(0, model.config.vocab_size, (16, model.config.block_size + 1))

    @partial(mx.compile, inputs=state, outputs=state)
    def gradients(x, y):
        return nn.value_and_grad(model, model.loss)(x, y)

    @partial(mx.compile, inputs=state, outputs=state)
    def update(grads):
        if core.gpu_train and (length := core.gpu_train.adamw(model, opt, grads, 1.0, 0.1)) is not None:
            return length
        grads, length = optim.clip_grad_norm(grads, 1.0)
        decay = 1 - 0.1 * opt.learning_rate
        model.update(tree_map(lambda p: p * decay if p.ndim > 1 else p, model.trainable_parameters()))
        opt.update(model, grads)
        return length

    def step():
        kept, core.gpu_experts = core.gpu_experts, core.gpu_experts if name != "plain" else None
        value, grads = gradients(tokens[:, :-1], tokens[:, 1:])
        length = update(grads)
        del grads
        mx.eval(value, length, state)
        core.gpu_experts = kept

    return step


def speed():
    steps, times = {name: training(name) for name in models.split(",")}, {}
    for i in range(rounds + 3):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if i > 2:
                times.setdefault(name, []).append(time.perf_counter() - began)
    first = next(iter(steps))
    for name, seconds in times.items():
        ratio = statistics.median(a / b for a, b in zip(times[first], seconds, strict=True))
        print(f"{name:8} {1e3 * statistics.median(seconds):6.1f} ms ({1e3 * min(seconds):.1f} to "
              f"{1e3 * max(seconds):.1f}), {16 * 1024 / statistics.median(seconds):,.0f} tokens/s, {first} takes "
              f"{ratio:.2f} of its time", flush=True)


if __name__ == "__main__":
    if not mx.cuda.is_available():
        raise UserError("this machine has no GPU that MLX can use: install mlx[cuda13] on one that has")
    print(mx.device_info().get("device_name", ""))
    wrong = equal() if only != "speed" else 0
    if only != "equal":
        speed()
    sys.exit(bool(wrong))
