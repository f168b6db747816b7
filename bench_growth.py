"""How cost grows with a model's sizes, beside what its shapes tell: what `python bench.py --only=growth` measures.

Five panels: a training step over the context T (the number of tokens in a step stays), over layers, over the
vocabulary and over experts (of which a token uses two): ms and peak memory; and writing: ms for a token at the end of a
context, whose keys and values are zeros, and bytes of the cache.

The expected figures are counted from the shapes, and scaled so that the first point of each curve is the measured one:
a curve that leaves its line grows otherwise than the count. The time of writing is scaled by its last point, since a
token costs more than its bytes where they are few, and the bytes of the cache are not scaled.

    a training step  operations, N (6 W + 12 L C K), for N tokens, W weights that a token meets in matmuls, L layers of
                     width C, and K keys that a query sees on average
    peak memory      16 bytes a weight (weight, gradient and two moments in float32); 8 C + 2 F numbers a token and
                     layer (inputs of norms and matmuls; F: hidden width of the MLPs that it uses); on a CPU the
                     probabilities, H K numbers a token and layer; logits and their gradient, a chunk at a time
    a token written  bytes that are read: the weights, and the keys and values that are seen in each layer
    the cache        bytes of the keys and values that are kept: all; a window; YOCO, windows in half of the layers and
                     one set for the others; MoD, an eighth of them in every other layer
"""
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
from mlx.utils import tree_flatten
from tqdm import tqdm

from model import GPT, LOSS_CHUNK, ON_CPU, Cache, GPTConfig

PANELS = ["T", "layers", "vocabulary", "writing"]
PANELS.insert(3, "experts")  # moe
if ON_CPU:
    BASE, TOKENS, WINDOW = dict(n_layer=2, n_head=2, n_embd=128, block_size=256, vocab_size=512), 2048, 128
    LAYERS, VOCABULARY, CONTEXTS = (1, 2, 4, 8, 16), (512, 2048, 8192, 32768), (512, 2048, 8192, 32768)
else:
    BASE, TOKENS, WINDOW = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50304), 16384, 256
    LAYERS, VOCABULARY, CONTEXTS = (3, 6, 12, 24), (4096, 16384, 65536, 131072), (512, 2048, 8192, 32768)
T, LONGEST, EXPERTS = (256, 512, 1024, 2048, 4096, 8192), 8192, (2, 4, 8, 16, 32)
CURVES = {"all keys": {}}  # the variants of the panels T and writing
windowed = {}
windowed = dict(sliding_window=WINDOW)  # window
CURVES[f"window of {WINDOW}"] = windowed  # window
CURVES[f"YOCO, window of {WINDOW}"] = dict(yoco=True, **windowed)  # yoco
CURVES["MoD, 1/8 in every other layer"] = dict(mod="topk")  # mod
STEPS, WARM = 8, 2  # tokens in a round of writing; rounds before those that are timed

# ---- what the shapes tell --------------------------------------------------------------------------------------------


def keys_seen(config: GPTConfig) -> float:
    """How many keys a query sees on average, itself included."""
    n = window = config.block_size
    window = min(config.sliding_window or n, n)  # window
    return (window * (window + 1) / 2 + (n - window) * window) / n


def step_cost(config: GPTConfig, tokens: int, size: int) -> tuple[float, float]:
    """The operations and the bytes of a training step with numbers of `size` bytes: see above."""
    L, C, F, K = config.n_layer, config.n_embd, config.ffn_dim, keys_seen(config)
    used, router = 1, 0
    if config.n_expert:  # moe
        used, router = config.expert_top_k, config.n_expert * C  # moe
    met = L * (4 * C * C + used * 2 * C * F + router) + config.vocab_size * C
    weights = sum(p.size for _, p in tree_flatten(GPT(config, None).parameters()))
    kept = 8 * C + 2 * used * F + (config.n_head * K if ON_CPU else 0)
    logits = 2 * 4 * min(tokens * config.vocab_size, LOSS_CHUNK)
    return tokens * (6 * met + 12 * L * C * K), 16 * weights + tokens * L * kept * size + logits


def cache_cost(config: GPTConfig, context: int, size: int) -> tuple[float, float]:
    """The bytes of keys and values that a token reads at the end of a context, and those that are kept."""
    one = 2 * config.n_kv_head * config.head_dim * size  # of a position in a layer
    L, window = config.n_layer, context
    window = min(config.sliding_window or context, context)  # window
    if config.yoco:  # yoco
        return one * (L // 2 * window + (L - L // 2) * context), one * (L // 2 * window + context)  # yoco
    if config.mod != "none":  # mod
        routed = L // config.mod_every  # mod
        kept = one * (L - routed + routed * config.mod_capacity) * context  # mod
        return one * (L - routed) * context + one * routed * config.mod_capacity**2 * context, kept  # mod
    return one * L * window, one * L * window


# ---- measuring -------------------------------------------------------------------------------------------------------


def release():
    gc.collect()
    mx.clear_cache()


def step_figures(config: GPTConfig, tokens: int, training: Callable, rounds: int) -> tuple[float, float]:
    """The seconds of a training step and its peak memory in bytes."""
    release()
    step, times = training(GPT(config), dict(batch=tokens // config.block_size, steps=1)), []
    for i in range(WARM + rounds):
        if i == WARM:
            mx.reset_peak_memory()
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return statistics.median(times[WARM:]), mx.get_peak_memory()


def filled(model: GPT, length: int) -> Cache:
    """A cache of `length` positions, whose keys and values are zeros."""
    cache, config = model.make_cache(), model.config
    for number, layer in enumerate(cache.layers):
        if config.yoco and config.n_layer // 2 <= number < config.n_layer:  # yoco
            continue  # it shares the last one  # yoco
        n = length
        if hasattr(layer, "row"):  # mod
            places = mx.arange(0, length, round(1 / config.mod_capacity))  # mod
            layer, n = layer.row(0, places), places.size  # mod
        zeros = mx.zeros((1, config.n_kv_head, n, config.head_dim), model.norm.weight.dtype)
        layer.update(zeros, zeros)
    cache.offset = length
    mx.eval([[layer.keys, layer.values] for layer in cache.layers if getattr(layer, "keys", None) is not None])
    return cache


def choose(model: GPT, number: int):  # mod
    """Let routed blocks work on every eighth token, since no training has taught them which."""  # mod
    for block in model.blocks:  # mod
        if "threshold" in block:  # mod
            block.threshold = mx.array([1.0 if number % round(1 / model.config.mod_capacity) else -1.0])  # mod


def writing_figures(model: GPT, context: int, rounds: int) -> tuple[float, float]:
    """The seconds of a token, of those up to the end of a context, and the bytes of the cache."""
    release()
    cache, times = filled(model, context - STEPS * (WARM + rounds)), []
    token = mx.array([[1]])
    for _ in range(WARM + rounds):
        began = time.perf_counter()
        for number in range(STEPS):
            choose(model, number)  # mod
            token = mx.argmax(model(token, cache=cache, last=True)[:, -1], axis=-1, keepdims=True)
            mx.async_eval(token)
        mx.eval(token)
        times.append((time.perf_counter() - began) / STEPS)
    return statistics.median(times[WARM:]), cache.nbytes


def curve(name: str, xs: list, measured: list[float], expected: list[float], point: int | None) -> dict:
    """point: the one at which the expected figures are made equal to the measured ones; None: nowhere."""
    scale = 1 if point is None else measured[point] / expected[point]
    return dict(name=name, x=[*xs], measured=measured, expected=[scale * value for value in expected])


def pair(what: str, x: str, second: str, unit: float, curves: list[tuple]) -> list[dict]:
    """The two panels of what was measured in common. curves: name, xs, and for each x the two figures and the two
    costs. second: the label of the second figure, in `unit` bytes."""
    found = []
    first = "ms a token" if what == "writing" else "ms a step"
    for i, (label, factor) in enumerate(((first, 1e3), (second, 1 / unit))):
        found.append(dict(name=what, x=x, y=label, curves=[
            curve(name, xs, [factor * each[i] for each in figures], [factor * each[i] for each in costs],
                  {"ms a token": -1, "MB of the cache": None}.get(label, 0))
            for name, xs, figures, costs in curves]))
    return found


def measure(names: list[str], training: Callable, dtype: mx.Dtype, rounds: int) -> Iterator[list[dict]]:
    """The panels, two for each name in PANELS. training(model, task): a function that takes a training step."""
    rounds = min(rounds, 3 if ON_CPU else 5)

    def training_curve(label: str, xs: tuple, settings: Callable, tokens: int) -> tuple:
        configs = [GPTConfig(**BASE | settings(x)) for x in xs]
        figures = [step_figures(config, tokens, training, rounds)
                   for config in tqdm(configs, desc=f"growth {label}", leave=False, disable=None)]
        return label, xs, figures, [step_cost(config, tokens, dtype.size) for config in configs]

    def writing_curve(label: str, own: dict) -> tuple:
        deep = dict(n_layer=max(8, BASE["n_layer"]), block_size=max(CONTEXTS))  # so that YOCO has many layers to share
        model = GPT(GPTConfig(**BASE | own | deep)).eval()
        model.set_dtype(dtype)
        mx.eval(model.parameters())
        weights = sum(p.nbytes for _, p in tree_flatten(model.parameters()))
        writing_figures(model, CONTEXTS[0], rounds)  # what is compiled once
        figures = [writing_figures(model, n, rounds)
                   for n in tqdm(CONTEXTS, desc=f"growth {label}", leave=False, disable=None)]
        costs = [cache_cost(model.config, n, dtype.size) for n in CONTEXTS]
        return label, CONTEXTS, figures, [(weights + read, kept) for read, kept in costs]

    each = {"layers": ("layers", LAYERS, lambda x: dict(n_layer=x)),
            "vocabulary": ("tokens of the vocabulary", VOCABULARY, lambda x: dict(vocab_size=x))}
    each["experts"] = "experts", EXPERTS, lambda x: dict(n_expert=x, ffn_dim=2 * BASE["n_embd"])  # moe
    for name in names:
        if name == "T":
            curves = [training_curve(label, T, lambda x, own=own: dict(own, block_size=x), max(TOKENS, LONGEST))
                      for label, own in CURVES.items() if not {"yoco", "mod"} & own.keys()]
            yield pair("training: context", "tokens", "GiB", 2**30, curves)
        elif name == "writing":
            yield pair("writing", "tokens before it", "MB of the cache", 1e6,
                       [writing_curve(label, own) for label, own in CURVES.items()])
        else:
            x, xs, settings = each[name]
            yield pair(f"training: {name}", x, "GiB", 2**30, [training_curve("all keys", xs, settings, TOKENS)])


if __name__ == "__main__":
    print("bench_growth.py has no command of its own: run bench.py --only=growth, which uses it", file=sys.stderr)
    sys.exit(2)
