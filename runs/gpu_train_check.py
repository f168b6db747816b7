"""Whether gpu_train.py computes what model.py computes, on this machine's GPU, and how fast it is.

    MLX_ENABLE_TF32=0 python runs/gpu_train_check.py
    python runs/gpu_train_check.py --only=curves --text=book.txt

equal: losses and gradients of models of many settings, with and without gpu_train.py, each against those of float32.
parts: the time of each part, forward and backward, for 16,384 tokens of GPT-2's width, and the time in which the GPU
copies as many bytes as it must read and write. steps: whole steps of GPT-2's shape and of the default, and their peak
memory; MLX_MAX_MB_PER_BUFFER changes both. curves: the loss over 300 updates on a text, its mean over each 30.
"""
import os
import sys
import time
from functools import partial

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]
import blas  # noqa: E402, F401  (before mlx)
import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
import numpy as np  # noqa: E402
from mlx.utils import tree_flatten, tree_map  # noqa: E402

import model as core  # noqa: E402
from config import UserError, overrides  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

only = "equal,parts,steps"  # also curves
text = ""                   # a text file, for curves

settings = overrides(globals())

GPT2 = dict(pos="learned", norm="layer", mlp="gelu", bias=True, qk_norm=False)
SETTINGS = {
    "default": {},
    "GPT-2": GPT2,
    "Llama": dict(mlp="swiglu", n_kv_head=4, qk_norm=False),
    "biases": dict(mlp="geglu", n_kv_head=2, bias=True, head_dim=128),
    "wide": dict(n_embd=2304, n_head=18, mlp="gelu_tanh", norm="layer"),
    "diff": dict(diff_attn=True),
    "window": dict(sliding_window=64),
    "depths": dict(mod="soft"),
    "not known": dict(parallel=True),
}
SHAPE = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50304)
kernels = core.gpu_train


def gradients_of(model: GPT, idx: mx.array, fast: bool) -> tuple[float, dict]:
    core.gpu_train = kernels if fast else None
    value, grads = nn.value_and_grad(model, model.loss)(idx[:, :-1], idx[:, 1:])
    mx.eval(value, grads)
    core.gpu_train = kernels
    return value.item(), dict(tree_flatten(grads))


def equal() -> int:
    bad = 0
    for name, each in SETTINGS.items():
        shape = dict(n_layer=2, n_head=8, n_embd=768, head_dim=64, vocab_size=4096, block_size=256) | each
        model = GPT(GPTConfig(**shape)).train()
        idx = mx.array(np.random.default_rng(0).integers(0, 4096, (3, 257)))
        model.compute_dtype = mx.float32
        _, exact = gradients_of(model, idx, False)
        for dtype in (mx.float32, mx.bfloat16, mx.float16):
            model.compute_dtype = dtype
            (loss, ours), (other, plain) = (gradients_of(model, idx, fast) for fast in (True, False))
            size = sum(float(g.square().sum()) for g in exact.values())
            a, b = ((sum(float((found[key] - g).square().sum()) for key, g in exact.items()) / size) ** 0.5
                    for found in (ours, plain))
            wrong = not a < 1.3 * b + 1e-4
            bad += wrong
            print(f"{name:10} {str(dtype)[9:]:9} loss {loss:.5f}, plain {other:.5f}; error of the gradients {a:.1e}, "
                  f"plain {b:.1e}{'   WRONG' if wrong else ''}", flush=True)
    print("all agree" if not bad else f"{bad} are wrong")
    return bad


def seconds(work, repeats: int = 20) -> float:
    """The shortest of five times of a function that returns arrays, each called so often."""
    mx.eval(work())
    times = []
    for _ in range(5):
        began = time.perf_counter()
        mx.eval([work() for _ in range(repeats)])
        times.append((time.perf_counter() - began) / repeats)
    return min(times)


def parts():
    """Microseconds of our kernels, of the plain form, both in mx.compile, and of a copy of as many bytes."""
    N, C, H, D, F, V, dtype = 16384, 768, 12, 64, 3072, 50304, mx.bfloat16
    large = mx.zeros(2**28, dtype)
    per_byte = seconds(lambda: large + 1, 4) / (2 * large.nbytes)

    def random(*shape: int) -> mx.array:
        x = mx.random.normal(shape).astype(dtype)
        mx.eval(x)
        return x

    def compare(what: str, gigabytes: float, f, *arrays: mx.array, repeats: int = 20):
        found = []
        for fast in (True, False):
            core.gpu_train = kernels if fast else None
            step = mx.compile(partial(f, fast))
            found.append(seconds(lambda step=step: step(*arrays), repeats) * 1e6)
        core.gpu_train = kernels
        alone = f", a copy {gigabytes * 1e9 * per_byte * 1e6:.0f}" if gigabytes else ""
        print(f"{what:26}{found[0]:9.0f} us, plain {found[1]:.0f}{alone}", flush=True)

    x, g, u = random(N, C), random(N, C), N * C * 2e-9  # u: gigabytes of one array of the residual stream
    for kind in core.RMSNorm, core.LayerNorm:
        module = kind(C)

        def norm(fast, x, g, module=module):
            return mx.vjp(module, [x], [g])

        compare(kind.__name__, 5 * u, norm, x, g)
    for name in core.gpu_train.ACTIVATIONS[:3]:
        sizes, act = dict(F=F, ACTIVATION=kernels.ACTIVATIONS.index(name)), core.ACTIVATIONS[name]

        def activation(fast, pre, g, sizes=sizes, act=act):
            if not fast:
                return mx.vjp(act, [pre], [g])
            like, none = (pre.shape, dtype), ((1,), mx.float32)
            return (kernels.run("mlp_forward", dtype, sizes, [pre], [like], [N], N * F // 2048, part="mlp"),
                    kernels.run("mlp_backward", dtype, sizes | dict(BIASED=0), [pre, g], [like, like, none],
                                [N], 2112, part="mlp"))

        compare(name, 24 * u, activation, random(N, F), random(N, F))
    attn = core.GPT(GPTConfig(**(SHAPE | dict(n_layer=1)))).blocks[0].attn
    sizes = dict(H=H, KV=H, D=D, QK_NORM=1, TURNS=1, BIASED=0, EPS=1e-5)

    def heads(fast, products, dq, dk, dv):
        weights = [attn.q_norm.weight, attn.k_norm.weight, attn._inverse]
        if fast:
            rest = [*weights, mx.zeros(1, mx.int32)]
            return (kernels.run("qkv_forward", dtype, sizes, [products, *rest], [(dq.shape, dtype)] * 2, [N, 1024, 0],
                                N // 8, part="qkv"),
                    kernels.run("qkv_backward", dtype, sizes, [products, dq, dk, dv, *rest],
                                [(products.shape, dtype), ((264, 2 * D), mx.float32)], [N, 1024, 0], 264, part="qkv"))

        def turned(products):
            q, k, v = (y.reshape(16, 1024, H, D).swapaxes(1, 2) for y in mx.split(products, 3, axis=1))
            return [core.rope(attn.q_norm(q), attn._inverse, 0), core.rope(attn.k_norm(k), attn._inverse, 0), v]

        return mx.vjp(turned, [products], [y.reshape(16, 1024, H, D).swapaxes(1, 2) for y in (dq, dk, dv)])

    compare("QK-norm, positions", 14 * u, heads, random(N, 3 * C), *(random(N, C) for _ in range(3)))
    targets, rows = mx.random.randint(0, V, (4096,)), mx.ones(4096)

    def loss(fast, logits):
        if fast:
            return kernels.run("cross_entropy", dtype, dict(V=V), [logits, targets, rows],
                               [((4096,), mx.float32), (logits.shape, dtype)], [], 4096, 512)
        return mx.vjp(lambda y: mx.fast.cross_entropy(y, targets), [logits], [rows])

    compare("cross-entropy, 4,096 rows", 4 * 4096 * V * 1e-9, loss, random(4096, V), repeats=5)
    for name, each in (("GPT-2", GPT2), ("default", {})):
        model = GPT(GPTConfig(**(SHAPE | dict(n_layer=1) | each))).train()
        block, inputs = model.blocks[0], random(16, 1024, C)

        def whole(fast, x, block=block):
            return nn.value_and_grad(block, lambda x: block(x, 0, None, core.no_tap, {}).sum())(x)

        compare(f"a block, {name}", 0, whole, inputs)


def training(each: dict):
    """A function that takes so many steps of the 124M shape, as bench.py does."""
    model = GPT(GPTConfig(**(SHAPE | each))).train()
    model.compute_dtype = mx.bfloat16
    step = step_of(model, 1e-4)
    tokens = mx.random.randint(0, 50304, (16, 1025))

    def steps(n: int):
        for _ in range(n):
            step(tokens)
        mx.synchronize()

    return steps


def step_of(model: GPT, rate: float):
    """A training step by AdamW: tokens (B, T + 1) -> loss."""
    opt = optim.Adam(rate, betas=[0.9, 0.95], bias_correction=True)
    opt.init(model.trainable_parameters())
    state = [model.state, opt.state]
    compiled = partial(mx.compile, inputs=state, outputs=state)

    @compiled
    def gradients(idx):
        return nn.value_and_grad(model, model.loss)(idx[:, :-1], idx[:, 1:])

    @compiled
    def update(grads):
        if core.gpu_train and (length := core.gpu_train.adamw(model, opt, grads, 1.0, 0.1)) is not None:
            return length
        grads, length = optim.clip_grad_norm(grads, 1.0)
        decay = 1 - 0.1 * opt.learning_rate
        model.update(tree_map(lambda p: p * decay if p.ndim > 1 else p, model.trainable_parameters()))
        opt.update(model, grads)
        return length

    def step(idx: mx.array) -> mx.array:
        loss, grads = gradients(idx)
        length = update(grads)
        del grads
        mx.async_eval(loss, length, state)
        return loss

    return step


def steps():
    for name, each in (("GPT-2", GPT2), ("default", {})):
        for fast in (True, False):
            core.gpu_train = kernels if fast else None
            run = training(each)
            run(4)
            mx.reset_peak_memory()
            times = []
            for n in (2, 5, 10, 20):
                began = time.perf_counter()
                run(n)
                times.append(f"{(time.perf_counter() - began) / n * 1e3:.1f}")
            print(f"{name:8} {'kernels' if fast else 'plain':8} ms a step in rounds of 2, 5, 10, 20: "
                  f"{', '.join(times)}; peak {mx.get_peak_memory() / 2**30:.2f} GiB", flush=True)
            del run
            mx.clear_cache()
    core.gpu_train = kernels


def curves():
    with open(text, "rb") as file:
        data = np.frombuffer(file.read(), np.uint8).astype(np.int32)
    for name, each in (("GPT-2", GPT2), ("default", {})):
        for seed in range(2):
            for fast in (True, False):
                core.gpu_train = kernels if fast else None
                shape = dict(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=256)
                model = GPT(GPTConfig(**shape, **each), seed).train()
                model.compute_dtype = mx.bfloat16
                step, losses = step_of(model, 6e-4), []
                for i in range(300):
                    starts = np.random.default_rng([seed, i]).integers(len(data) - 257, size=32)
                    losses.append(step(mx.array(np.stack([data[j:j + 257] for j in starts]))))
                means = np.array([loss.item() for loss in losses]).reshape(10, 30).mean(1)
                print(f"{name:8} seed {seed} {'kernels' if fast else 'plain':8}", *(f"{mean:.4f}" for mean in means),
                      flush=True)
    core.gpu_train = kernels


if __name__ == "__main__":
    if not mx.cuda.is_available():
        raise UserError("this machine has no GPU that MLX can use: install mlx[cuda13] on one that has")
    print(mx.device_info().get("device_name", ""))
    wrong = equal() if "equal" in only else 0
    for part in parts, steps, curves:
        if part.__name__ in only.split(","):
            part()
    sys.exit(bool(wrong))
