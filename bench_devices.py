"""Several devices: what `mlx.launch -n N -- python bench.py --only=devices` measures.

First the sums and gathers alone: milliseconds, and the bus bandwidth, which is comparable between numbers of devices:
bytes times 2 (n - 1) / n for a sum that all receive, (n - 1) / n for a gather. Then training as train.py does it, with
AdamW and with Muon, in each mode of parallel.py: on one device alone, with as many sequences for each of them ("weak"),
and with as many for all of them together ("strong"); and by how much the loss after STEPS steps differs from that of
one device. docs/devices.md says what a simulation of these steps expects.
"""
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
from tqdm import tqdm

from config import UserError
from model import GPT, ON_CPU, GPTConfig

SIZES = (2**26, 2**23, 2**20) if ON_CPU else (2**30, 2**25, 2**20)  # bytes
SHAPE = dict(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=128) if ON_CPU else dict(
    n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50304)
BATCH, STEPS = 16, 10  # sequences of a whole batch; steps before losses are compared

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
        for kind in dict.fromkeys((mx.float32, dtype)):  # in one order: a set's may differ between processes
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


def measure(training: Callable, rounds: int, shape: dict, modes: list[str],
            optimizers: list[str]) -> Iterator[tuple[str, float, float, float, float, float]]:
    """What, tokens a second of all processes together, those over one process's, ms a step, the loss after STEPS less
    that of one process which computes the whole batch, and the peak GiB of a process. training: bench.py's. shape: of
    the model. modes: "data" or those of parallel.py."""
    world = mx.distributed.init()
    n, quiet = world.size(), True if world.rank() else None
    ways = [("alone", BATCH, None), ("alone", BATCH * n, None)]
    ways += [(f"{mode}, weak", BATCH * n, mode.replace("data", "")) for mode in modes]
    ways += [(f"{mode}, strong", BATCH, "") for mode in modes if mode == "data"]
    for optimizer in optimizers:
        alone, first = 0.0, {}
        for what, batch, mode in ways:
            mx.clear_cache()
            model, group = GPT(GPTConfig(**shape)), None if mode is None else world
            task = dict(batch=batch, steps=5, micro=min(batch, 4 * n))
            try:
                steps = training(model, task, muon=optimizer == "muon", group=group, mode=mode or "")
            except UserError as error:  # a shape that does not suit the mode
                print(f"{optimizer}, {what}: {error}", file=sys.stderr)
                continue
            for _ in range(STEPS // 5):
                steps()
            loss = steps.loss.item()
            first.setdefault(batch, loss)
            if what == "alone" and alone:  # only for its loss
                continue
            mx.reset_peak_memory()
            times = []
            for _ in tqdm(range(rounds), desc=f"{optimizer}, {what}", leave=False, disable=quiet):
                mx.eval(mx.distributed.all_sum(mx.array(1.0)))
                began = time.perf_counter()
                steps()
                times.append((time.perf_counter() - began) / 5)
            seconds, peak = statistics.median(times), mx.get_peak_memory() / 2**30
            speed = batch * shape["block_size"] / seconds
            alone = alone or speed
            yield f"{optimizer}, {what}", speed, speed / alone, seconds * 1e3, loss - first[batch], peak
            del steps, model


if __name__ == "__main__":
    print("bench_devices.py has no command of its own: run mlx.launch -n 2 -- python bench.py --only=devices",
          file=sys.stderr)
    sys.exit(2)
