"""Several devices: what `mlx.launch -n N -- python bench.py --only=devices` measures.

First the sums and gathers alone: milliseconds, and the bus bandwidth, which is comparable between numbers of devices:
bytes times 2 (n - 1) / n for a sum that all receive, (n - 1) / n for a gather. Then training as train.py does it, with
AdamW and with Muon: on one device alone, with the whole batch on each ("weak") and with a share of it ("strong"); and
by how much the loss after STEPS steps differs from that of one device. docs/devices.md says what a simulation of these
steps expects.
"""
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map
from tqdm import tqdm

from model import GPT, ON_CPU, GPTConfig, gpu_train
from muon import Muon, by_muon

SIZES = (2**26, 2**23, 2**20) if ON_CPU else (2**30, 2**25, 2**20)  # bytes
SHAPE = dict(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=128) if ON_CPU else dict(
    n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50304)
BATCH, STEPS = (16, 10) if ON_CPU else (16, 20)  # sequences of a whole batch; steps before losses are compared

# ---- sums and gathers ------------------------------------------------------------------------------------------------


def seconds_of(work: Callable, rounds: int) -> float:
    """The median of the rounds after two that warm up, each begun by all processes together."""
    times = []
    for i in range(rounds + 2):
        mx.eval(mx.distributed.all_sum(mx.array(1.0)))
        began = time.perf_counter()
        mx.eval(work())
        times += [time.perf_counter() - began] * (i > 1)
    return statistics.median(times)


def collectives(dtype: mx.Dtype, rounds: int) -> Iterator[tuple[str, float, float]]:
    """What, its seconds, and the bytes a second on the bus. What the backend does not have is left out."""
    n, share = mx.distributed.init().size(), 1 - 1 / mx.distributed.init().size()
    for size in SIZES:
        for kind in {mx.float32, dtype}:
            x = mx.ones(size // kind.size, kind)
            mx.eval(x)
            for name, f, given, sent in (
                    ("all_sum", mx.distributed.all_sum, x, 2 * share * size),
                    ("all_gather", mx.distributed.all_gather, x[:x.size // n], share * size),
                    ("sum_scatter", mx.distributed.sum_scatter, x[:x.size // n * n], share * size)):
                try:
                    seconds = seconds_of(lambda f=f, given=given: f(given), rounds)
                except (RuntimeError, ValueError):
                    continue
                yield f"{name} of {size / 2**20:,.0f} MiB, {str(kind)[9:]}", seconds, sent / seconds


# ---- training --------------------------------------------------------------------------------------------------------


def training(batch: int, optimizer: str, dtype: mx.Dtype, averaged: bool) -> Callable:
    """A function that takes a number of steps and returns their last loss; each process has its share of `batch`
    sequences if averaged, else all of them and nothing from others."""
    world, model = mx.distributed.init(), GPT(GPTConfig(**SHAPE))
    model.train()
    model.compute_dtype = dtype
    opt = rest = optim.Adam(1e-3, betas=[0.9, 0.95], bias_correction=True)
    if optimizer == "muon":
        opt = optim.MultiOptimizer([Muon(0.02, dtype=dtype, group=world if averaged else None), rest], [by_muon])
    opt.init(model.trainable_parameters())
    state = [model.state, opt.state]
    compiled = (lambda f: f) if ON_CPU else lambda f: mx.compile(f, inputs=state, outputs=state)
    tokens = mx.random.randint(0, SHAPE["vocab_size"], (batch, SHAPE["block_size"] + 1), key=mx.random.key(0))
    if averaged:
        tokens = tokens[world.rank()::world.size()]

    @compiled
    def gradients(idx):
        return nn.value_and_grad(model, model.loss)(idx[:, :-1], idx[:, 1:])

    @compiled
    def update(grads):
        if gpu_train and (length := gpu_train.adamw(model, opt, grads, 1.0, 0.1)) is not None:
            return length
        grads, length = (gpu_train or optim).clip_grad_norm(grads, 1.0)
        decay = 1 - 0.1 * rest.learning_rate
        model.update(tree_map(lambda p: p * decay if p.ndim > 1 else p, model.trainable_parameters()))
        opt.update(model, grads)
        return length

    def steps(n: int) -> float:
        for _ in range(n):
            loss, grads = gradients(tokens)
            if averaged:
                grads = nn.average_gradients(tree_map(lambda g: g.astype(dtype), grads))
                grads = tree_map(lambda g: g.astype(mx.float32), grads)
                loss = mx.distributed.all_sum(loss) / world.size()
            length = update(grads)
            del grads
            mx.async_eval(loss, length, state)
        mx.eval(loss, state)
        return loss.item()

    return steps


def measure(dtype: mx.Dtype, rounds: int) -> Iterator[tuple[str, float, float, float, float, float]]:
    """What, tokens a second of all processes together, those over one process's, ms a step, the loss after STEPS less
    that of one process which computes the whole batch, and the peak GiB of a process."""
    world = mx.distributed.init()
    n, quiet = world.size(), True if world.rank() else None
    for optimizer in ("adamw", "muon"):
        alone, first = 0.0, {}
        for what, batch, averaged in (("alone", BATCH, False), ("alone", BATCH * n, False), ("weak", BATCH * n, True),
                                      ("strong", BATCH, True)):
            mx.clear_cache()
            steps = training(batch, optimizer, dtype, averaged)
            loss = steps(STEPS)
            first.setdefault(batch, loss)
            if what == "alone" and alone:  # only for its loss
                continue
            mx.reset_peak_memory()
            times = []
            for _ in tqdm(range(rounds), desc=f"{optimizer}, {what}", leave=False, disable=quiet):
                mx.eval(mx.distributed.all_sum(mx.array(1.0)))
                began = time.perf_counter()
                steps(5)
                times.append((time.perf_counter() - began) / 5)
            seconds, peak = statistics.median(times), mx.get_peak_memory() / 2**30
            speed = batch * SHAPE["block_size"] / seconds
            alone = alone or speed
            yield f"{optimizer}, {what}", speed, speed / alone, seconds * 1e3, loss - first[batch], peak
            del steps


if __name__ == "__main__":
    print("bench_devices.py has no command of its own: run mlx.launch -n 2 -- python bench.py --only=devices",
          file=sys.stderr)
    sys.exit(2)
