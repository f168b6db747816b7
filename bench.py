"""Measure the speed on this machine, beside PyTorch, mlx-lm and tokenizers where they are installed.

    python bench.py
    python bench.py --only=train --shapes=124M,124M-gpt2      # on a GPU
    python bench.py --only=decode,many --shapes=124M-gpt2,124M-llama --rounds=3 --new_tokens=128
    python bench.py --only=growth --out=growth.png
    mlx.launch -n 2 -- python bench.py --only=devices

Our code and its peers are timed in turn, A B C A B C ..., each in a process of its own, after a warm-up. The table
shows medians over the rounds. `ratio` is the median (and range) over the rounds of the peer's time divided by our time:
above 1 our code is faster. A training step is forward, backward, clipping and AdamW. GiB is the peak memory that MLX
and torch.cuda allocated. The peers (bench_peers.py) are GPT-2 and, for shapes that end in "-llama", Llama, with the
sizes of our shape, in PyTorch and in mlx-lm; and the tokenizers package with our vocabulary. Where a line names two
methods ("A; B"), both are ours: B is in the peer's column.

decode and many print a line for each side. "torch" is eager, "torch_graphs" compiled and replayed as a CUDA graph; the
sides with 4 bits pack all matrices. The time of decode begins after the first token, so that it holds no prompt; that
of prefill is the prompt's, and that of many (texts of different lengths, in batches whose rows are refilled) holds all.
`share` is the bytes of the weights and of the keys and values that a step must read, divided by its time and by the
bandwidth of a large copy on this device (read and written bytes), which the first line of the section tells. A cache of
the processor can make it more than 1.

many, growth and devices are not among the default sections. bench_devices.py and bench_growth.py say what the last two
measure. Growth is drawn to --out, with the figures beside it as .json, which --again=FILE.json draws without measuring.
"""
import contextlib
import datetime
import functools
import glob
import io
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import blas  # before mlx
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map
from tqdm import tqdm

import bench_devices
import bench_growth
import readers
from batching import generate_many
from bench_peers import serve, time_of_writing
from config import UserError, overrides
from draw import check_folder, write_whole
from draw import growth as draw_growth
from lora import attach, dense_shape, linear_layers, quantize_base
from model import GPT, ON_CPU, GPTConfig, attend, compute_dtype, generate, gpu_train, no_tap, save_checkpoint
from muon import Muon, by_muon
from tokenizer import Tokenizer, byte_tokenizer, letters_of_bytes, train_bpe

try:
    import parallel
except ImportError:
    parallel = None
try:
    from cpu_train import Adam, clip_grad_norm  # faster on a CPU
except ImportError:
    from mlx.optimizers import Adam, clip_grad_norm

only = "train,decode,tokenize,variants,adapters,packed,inside,convert,page"  # sections; others: many, growth, devices
shapes = ""            # 4x4x128 | 6x6x384 | 6x6x384-llama | 124M | 124M-gpt2 | 124M-llama, with commas; "": by device
rounds = 0             # timed rounds; 0: 7 on a CPU, 20 on a GPU
new_tokens = 64        # tokens to generate in a round of decoding
batches = ""           # texts at a time, with commas; "": 1,16 in decode, 1,4,16,64 in many
draws = ""             # of decode: greedy | sampled (temperature 0.8, top_k 50); "": greedy, and on a GPU both
sides = ""             # ours | ours_4bit | torch | torch_graphs | mlx_lm | mlx_lm_4bit; "": all that suit the device
modes = ""             # of devices: data | zero1 | fsdp | tensor | pipeline, with commas; "": all
optimizers = "adamw,muon"  # of devices
panels = ""            # of growth: T | layers | vocabulary | experts | writing, with commas; "": all
out = ""               # growth's picture, a .png; its figures are written beside it, as .json
again = ""             # the .json of an earlier growth, to draw or print again
compile = not ON_CPU   # compile our training step, as train.py does
task = ""              # internal: JSON of the task that a process of bench.py's own is to time

settings = overrides(globals())

GPT2 = dict(pos="learned", norm="layer", mlp="gelu", bias=True, qk_norm=False)
LLAMA = dict(mlp="swiglu", qk_norm=False)
SHAPES = {  # layers, heads, width, context, batch, vocabulary, our architecture, steps in a round
    "4x4x128": (4, 4, 128, 64, 12, 128, {}, 10),
    "6x6x384": (6, 6, 384, 256, 12, 128, {}, 1),
    "6x6x384-llama": (6, 6, 384, 256, 12, 128, LLAMA, 1),
    "124M": (12, 12, 768, 1024, 16, 50304, {}, 5),
    "124M-gpt2": (12, 12, 768, 1024, 16, 50304, GPT2, 5),
    "124M-llama": (12, 12, 768, 1024, 16, 50304, LLAMA, 5),
    "1.3B": (24, 16, 2048, 1024, 16, 50304, {}, 1),
}
names = shapes.split(",") if shapes else list(SHAPES)[:3] if ON_CPU else list(SHAPES)[3:6]
if unknown := set(names) - set(SHAPES):
    raise UserError(f"there is no shape {unknown.pop()}: choose among {', '.join(SHAPES)}")
SIDES = ["ours", "ours_4bit", "torch", *["torch_graphs"] * (not ON_CPU), "mlx_lm", "mlx_lm_4bit"]
DRAWS = {"greedy": dict(temperature=0, top_k=0), "sampled": dict(temperature=0.8, top_k=50)}


def chosen(what: str, text: str, known, default="") -> list[str]:
    """The names in a setting with commas."""
    names = (text or default).split(",")
    if unknown := set(names) - set(known):
        raise UserError(f"there is no {what} {unknown.pop()!r}: choose among {', '.join(known)}")
    return names


sections = chosen("section", only, ("train", "decode", "many", "tokenize", "variants", "adapters", "packed", "inside",
                                    "convert", "page", "growth", "devices"))
kinds_of_draw = chosen("draw", draws, DRAWS, "greedy" if ON_CPU else "greedy,sampled")
competitors = chosen("side", sides, SIDES, ",".join(SIDES))
if "ours" not in competitors:
    raise UserError(f"sides={sides}: the others are compared with ours, so name it too")
parts = chosen("panel", panels, bench_growth.PANELS, ",".join(bench_growth.PANELS))
ways = chosen("mode", modes, ("data", "zero1", "fsdp", "tensor", "pipeline"), "data,zero1,fsdp,tensor,pipeline")
kinds = chosen("optimizer", optimizers, ("adamw", "muon"))
if "devices" in sections and not parallel:
    raise UserError("only=devices needs parallel.py, which is missing")
if not all(size.isdecimal() and int(size) for size in batches.split(",") if batches):
    raise UserError(f"batches={batches}: give whole numbers with commas")
if out:
    if not out.endswith(".png"):
        raise UserError(f"out={out!r}: it is a PNG, so let its name end in .png")
    check_folder(out)
sizes = [int(size) for size in batches.split(",") if size]
rounds = rounds or (7 if ON_CPU else 20)
dtype = compute_dtype("auto")
format_name = str(dtype)[9:]

# ---- our side: the work of a round -----------------------------------------------------------------------------------


def our_training(model: GPT, task: dict, compile: bool = compile, muon: bool = False, group=None, mode: str = ""):
    """A function that takes task["steps"] training steps as train.py does, with AdamW or Muon; its attribute `loss` is
    then their last loss. The processes of a group share out the work as this mode of parallel.py says, in a pipeline as
    task["micro"] micro-batches."""
    model.compute_dtype = dtype
    opt = rest = Adam(1e-4, betas=[0.9, 0.95], bias_correction=True)
    if muon:
        opt = optim.MultiOptimizer([Muon(0.02, dtype=dtype, group=group), rest], [by_muon])
    opt.init(model.trainable_parameters())
    shares = parallel.share(mode, model, opt, group, dtype=dtype) if group else None
    state = [model.state, opt.state]
    compiled = partial(mx.compile, inputs=state, outputs=state) if compile else lambda f: f

    @compiled
    def gradients(x, y):
        return nn.value_and_grad(model, model.loss)(x, y)

    @compiled
    def update(grads):
        changed, length = model, None
        if mode:
            changed, grads = parallel.updated_parts(shares, grads)
            length = parallel.norm(shares, grads)
        done = gpu_train.adamw(changed, opt, grads, 1.0, 0.1, length) if gpu_train else None
        if done is None:
            grads, done = clip_grad_norm(grads, 1.0) if not mode else (
                tree_map(lambda g: g * mx.minimum(1 / (length + 1e-6), 1), grads), length)
            decay = 1 - 0.1 * rest.learning_rate
            changed.update(tree_map(lambda p: p * decay if p.ndim > 1 else p, changed.trainable_parameters()))
            opt.update(changed, grads)
        if mode:
            parallel.join_updated(shares, changed)
        return done

    shape = task["batch"], model.config.block_size + 1
    tokens = mx.random.randint(0, model.config.vocab_size, shape, key=mx.random.key(0))  # those of all processes
    if group:
        tokens = tokens[shares.others.rank()::shares.others.size()]

    def steps():
        for _ in range(task["steps"]):
            x, y = tokens[:, :-1], tokens[:, 1:]
            if mode == "pipeline":
                value, grads = parallel.run_stage(shares, x, y, task["micro"], True)
            else:
                value, grads = gradients(x, y)
            if group:
                grads = parallel.average(shares, grads)
                if mode:  # as in train.py: the processes have other parts, and must come to their sums in one order
                    mx.async_eval(grads)
                value = mx.distributed.all_sum(value, group=group) / group.size()
            length = update(grads)
            del grads
            mx.async_eval(value, length, state)
        mx.eval(state)
        steps.loss = value

    return steps


def our_writing(model: GPT, task: dict):
    """A function that reads prompts and writes task["new"] tokens, the first of them before the time begins."""
    prompt = mx.random.randint(0, model.config.vocab_size, (task["batch"], task["prompt"])).tolist()

    return lambda: time_of_writing(task, generate(model, prompt, task["new"], task["temperature"], task["top_k"]))


def our_many(model: GPT, task: dict):
    """A function that continues task["prompts"] by task["lengths"] tokens, task["batch"] texts at a time."""

    def write():
        counts = [0] * len(task["prompts"])

        def ended(number, token):
            counts[number] += 1
            return counts[number] == task["lengths"][number]

        most = max(task["lengths"]) + 1  # so that all texts are ended by `ended`
        for _ in generate_many(model, task["prompts"], most, task["batch"], stops=ended, temperature=0):
            pass
        assert counts == task["lengths"]

    return write


def our_works(task: dict) -> list:
    """The functions that do task["tasks"], all with one model."""
    model = GPT(GPTConfig(**{name: task[name] for name in task.keys() & vars(GPTConfig()).keys()}))
    if task["tasks"][0]["kind"] == "train":
        return [our_training(model, each) for each in task["tasks"]]
    model.eval()
    model.set_dtype(dtype)
    if task["bits"]:
        nn.quantize(model, 64, task["bits"])
    return [(our_many if each["kind"] == "many" else our_writing)(model, each) for each in task["tasks"]]


if task:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the process that has started this one says that it was stopped
    try:
        described = json.loads(task)
    except ValueError:
        described = None
    if not isinstance(described, dict) or not {"bits", "tasks"} <= {*described}:
        raise UserError("--task is for processes that bench.py itself starts: leave it out")
    serve(described, our_works(described), lambda: mx.get_peak_memory() / 2**30)
    sys.exit()

# ---- timing, and the table -------------------------------------------------------------------------------------------

WIDTHS = 15, 13, 21, 18, 13


def show(what: str, *cells: str):
    """Print a row of the table in two lines: what was measured, and the figures."""
    figures = "".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True))
    tqdm.write(f"{what}\n{figures}" if what else figures)


def ratio_of(ours: list[float], peer: list[float]) -> str:
    ratios = sorted(b / a for a, b in zip(ours, peer, strict=False))
    if not ratios:
        return ""
    shown = [f"{x:.2f}" if x < 10 else f"{x:.0f}" for x in (statistics.median(ratios), ratios[0], ratios[-1])]
    return "{} ({}-{})".format(*shown)


def row(what: str, unit: str, work: float, ours: list[float], peer: list[float], memory: str = ""):
    """Print the row of a measurement. ours, peer: the seconds of each round, in which `work` units were done."""
    speeds = [work / statistics.median(seconds) if seconds else 0 for seconds in (ours, peer)]
    speeds = [f"{speed:,.{1 if speed > 1 else 3}f}" if speed else "missing" for speed in speeds]
    ms = "/".join(f"{statistics.median(seconds) * 1e3:,.1f}" for seconds in (ours, peer) if seconds)
    show(f"{what}: {unit}", *speeds, ratio_of(ours, peer), ms, memory)


class Field:
    """Processes that do the same tasks with the model of a shape, one for each side. A side whose packages are missing
    has none. On a GPU all start at once; on a CPU they would hinder each other."""

    def __init__(self, name: str, sides: list[str], tasks: list[dict]):
        L, H, C, T, _, V, architecture, _ = SHAPES[name]
        self.config = GPTConfig(n_layer=L, n_head=H, n_embd=C, block_size=T, vocab_size=V, **architecture)
        self.name, self.tasks, here = name, tasks, os.path.dirname(os.path.abspath(__file__))
        self.processes = {}
        for side in sides:
            peer, _, packed = side.partition("_4bit")
            described = json.dumps(dict(vars(self.config), tasks=tasks, dtype=str(dtype)[9:], bits=4 * bool(packed)))
            command = ([os.path.abspath(__file__), f"--task={described}", f"--compile={compile}"] if peer == "ours" else
                       [os.path.join(here, "bench_peers.py"), peer, described])
            self.processes[side] = subprocess.Popen([sys.executable, *command], stdin=subprocess.PIPE,
                                                    stdout=subprocess.PIPE, text=True)
            if ON_CPU:
                self.wait(side)

    def wait(self, side: str):
        """Until it is ready."""
        process = self.processes[side]
        if not process.stdout.readline():
            if process.wait() != 3:
                raise UserError(f"{side} failed with exit status {process.returncode}: see its message above")
            self.processes[side] = None

    def race(self, what: str, number: int, rounds: int) -> dict[str, tuple[list[float], float]]:
        """The seconds of every round of a task, and the peak memory in GiB, of each side: they take turns."""
        found = {side: ([], 0) for side in self.processes}
        for _ in tqdm(range(rounds), desc=what, leave=False, disable=None):
            for side, process in self.processes.items():
                if process:
                    time.sleep(0.1 if ON_CPU else 0)  # the other side's threads still spin for a moment
                    print(number, file=process.stdin, flush=True)
                    answer = json.loads(process.stdout.readline())
                    found[side] = [*found[side][0], answer["seconds"]], answer["peak"]
        return found

    def close(self):
        for process in filter(None, self.processes.values()):
            process.stdin.close()
            process.wait()


@contextlib.contextmanager
def fields(of_names: list[tuple[str, list[str], list[dict]]]):
    """The fields of some shapes, ready."""
    found = []
    try:
        for each in of_names:
            found.append(Field(*each))
        for field in found if not ON_CPU else ():
            for side in field.processes:
                field.wait(side)
        yield found
    finally:
        for field in found:
            field.close()


def bench_training(name: str):
    """A training step, in turn with PyTorch's."""
    _, _, _, T, B, _, _, steps = SHAPES[name]
    with fields([(name, ["ours", "torch"], [dict(kind="train", batch=B, steps=steps)])]) as (field,):
        what = f"train {name}, {B} x {T}"
        (ours, a), (peer, b) = field.race(what, 0, rounds).values()
        row(f"{what}, torch", "tok/s", steps * B * T, ours, peer, "/".join(f"{peak:.2f}" for peak in (a, b) if peak))


# ---- writing ---------------------------------------------------------------------------------------------------------

TABLE = 16, 12, 20, 12, 10, 9


def lines(cells: list[tuple]):
    for line in cells:
        tqdm.write("  " + line[0].ljust(TABLE[0] - 2) + "".join(f"{cell:>{w}}" for cell, w in zip(line[1:], TABLE[1:],
                                                                                                  strict=True)))


def table(what: str, found: dict, first: str, peers: list[str], work: float, steps: int = 0, read=None):
    """Print a line for each side: its speed, its time over that of `first`, ms a step, the share of the bandwidth.
    work: tokens in a round. steps: how often the model is run for them. read(side): the bytes that a run must read."""
    tqdm.write(f"{what}: tok/s")
    cells = []
    for side in [first, *peers]:
        if side not in found:
            continue
        seconds, peak = found[side]
        if not seconds:
            cells.append((side, "missing", "", "", "", ""))
            continue
        median = statistics.median(seconds)
        cells.append((side, f"{work / median:,.1f}", ratio_of(found[first][0], seconds) if side != first else "",
                      f"{median / steps * 1e3:,.2f}" if steps else "",
                      f"{read(side) * steps / median / bandwidth():.3f}" if read else "",
                      f"{peak:.2f}" if peak else ""))
    lines(cells)


@functools.cache
def bandwidth() -> float:
    """Bytes a second, read and written, of a copy that is larger than the caches of the processor: the best of some."""
    size, best = 2**28 if ON_CPU else 2**31, 0.0
    if ON_CPU:  # MLX would copy with one core
        source, target = np.ones(size // 4, np.float32), np.zeros(size // 4, np.float32)
        n = os.cpu_count()
        parts = [*zip(np.array_split(source, n), np.array_split(target, n), strict=True)]
        with ThreadPoolExecutor(n) as pool:
            for _ in range(10):
                began = time.perf_counter()
                [*pool.map(lambda part: np.copyto(part[1], part[0]), parts)]
                best = max(best, 2 * size / (time.perf_counter() - began))
        return best
    source = mx.zeros(size // 4, mx.uint32)
    mx.eval(source)
    for _ in range(10):
        began = time.perf_counter()
        mx.eval(source + 1)
        best = max(best, 2 * size / (time.perf_counter() - began))
    del source
    mx.clear_cache()
    return best


def bytes_of_step(config: GPTConfig, bits: int, batch: int, length: int) -> int:
    """What must be read for a token of each text: all matrices, the embedding too if it is the head; and the keys and
    values of `length` positions."""
    model = GPT(config, None)
    model.set_dtype(dtype)
    if bits:
        nn.quantize(model, 64, bits)
    weights = sum(p.nbytes for name, p in tree_flatten(model.parameters())  # not computed: the shapes are enough
                  if not name.startswith("pos_embed") and (config.tie or not name.startswith("embed")))
    return weights + batch * length * 2 * config.n_layer * config.n_kv_head * config.head_dim * dtype.size


def bench_writing(group: list[str]):
    """A prompt of a quarter of the context is continued, greedily or with draws, by one text or several at a time; then
    reading a prompt."""
    tasks, what = {}, {}
    for name in group:
        T = SHAPES[name][3]
        new = min(new_tokens, T // 2)
        tasks[name] = [dict(kind="write", batch=batch, prompt=T // 4, new=new + 1, **DRAWS[draw])
                       for batch in sizes or (1, 16) for draw in kinds_of_draw]
        what[name] = [f"batch {batch}, {draw}" for batch in sizes or (1, 16) for draw in kinds_of_draw]
        tasks[name].append(dict(kind="read", batch=1, prompt=T - 1, new=1, **DRAWS["greedy"]))
    with fields([(name, competitors, tasks[name]) for name in group]) as found:
        for field in found:
            for number, (each, words) in enumerate(zip(field.tasks, [*what[field.name], ""], strict=True)):
                title = f"decode {field.name}, {words}" if words else f"prefill {field.name}, {each['prompt']} tokens"
                times, batch, steps = field.race(title, number, rounds), each["batch"], each["new"] - 1
                if not words:
                    table(f"{title}, {format_name}", times, "ours", ["torch", "mlx_lm"], each["prompt"], 1)
                    continue

                def read(side, config=field.config, batch=batch, length=each["prompt"] + steps // 2):
                    return bytes_of_step(config, 4 * side.endswith("_4bit"), batch, length)

                table(f"{title}, {format_name}", times, "ours", SIDES[2:-1], batch * steps, steps, read)
                if "ours_4bit" in times:
                    peers = ["mlx_lm_4bit", "torch_graphs"]
                    table(f"{title}, 4 bits", times, "ours_4bit", peers, batch * steps, steps, read)


def bench_many(name: str):
    """Texts of different lengths, after prompts of different lengths, some at a time: a text that ends makes room for
    the next. Only the tokens that are written count."""
    T, V, rng = SHAPES[name][3], SHAPES[name][5], np.random.default_rng(0)
    n = 96 if ON_CPU else 192
    prompts = [rng.integers(0, V, length).tolist() for length in rng.integers(T // 32, T // 4, n, endpoint=True)]
    lengths = rng.integers(T // 32, T // (8 if ON_CPU else 4), n, endpoint=True).tolist()
    tasks = [dict(kind="many", batch=batch, prompts=prompts, lengths=lengths) for batch in sizes or (1, 4, 16, 64)]
    wanted = [side for side in competitors if not side.startswith("torch")]
    with fields([(name, wanted, tasks)]) as (field,):
        for number, each in enumerate(tasks):
            title = f"many {name}, {n} texts, {each['batch']} at a time"
            times = field.race(title, number, min(rounds, 3))
            table(f"{title}, {format_name}", times, "ours", ["mlx_lm"], sum(lengths))
            if "ours_4bit" in times:
                table(f"{title}, 4 bits", times, "ours_4bit", ["mlx_lm_4bit"], sum(lengths))


# ---- tokenizing ------------------------------------------------------------------------------------------------------


def their_tokenizer(ours: Tokenizer):
    """A tokenizer of the tokenizers package with our vocabulary, or None if the package is not installed."""
    try:
        import tokenizers
        from tokenizers import Regex, models, pre_tokenizers
    except ImportError:
        return None
    letters = letters_of_bytes()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ours.tokens}
    ranks, merges = {token: i for i, token in enumerate(ours.tokens)}, []
    for token in ours.tokens[256:]:  # tiktoken merges any two tokens that make a token
        for i in range(1, len(token)):
            if token[:i] in ranks and token[i:] in ranks:
                merges.append((spelled[token[:i]], spelled[token[i:]]))
    peer = tokenizers.Tokenizer(models.BPE({spelled[token]: i for token, i in ranks.items()}, merges))
    peer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(ours.pattern.replace("?+", "?").replace("++", "+")), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return peer


def bench_tokenizing():
    """Encode the source text of Python's standard library with 4096 tokens trained on it, on one thread."""
    text = ""
    for path in sorted(glob.glob(os.path.join(sysconfig.get_path("stdlib"), "*.py"))):
        with open(path, encoding="utf-8", errors="ignore") as file:
            text += file.read()
    text = text[:4_000_000]
    ours = train_bpe([text[i:i + 100_000] for i in range(0, len(text), 100_000)], 4096)
    peer = their_tokenizer(ours)
    if peer and peer.encode(text[:20_000]).ids != ours.encode(text[:20_000]).tolist():
        raise UserError("the tokenizers package gives other tokens than ours, so that speeds cannot be compared")
    seconds = [], []
    for _ in tqdm(range(rounds), desc="tokenize", leave=False, disable=None):
        for side, kept in zip((ours, peer), seconds, strict=True):
            if side:
                began = time.perf_counter()
                side.encode(text)
                kept.append(time.perf_counter() - began)
    row("tokenize stdlib, one thread, tokenizers", "MB/s", len(text.encode()) / 1e6, *seconds)


# ---- variants, beside the baseline -----------------------------------------------------------------------------------


def alternate(what: str, unit: str, work: float, ours, peer):
    """Time two functions in turn in this process. peer None: time ours alone."""
    seconds = [], []
    for i in tqdm(range(rounds + 1), desc=what, leave=False, disable=None):
        for f, kept in zip((ours, peer), seconds, strict=True):
            if f is None:
                continue
            began = time.perf_counter()
            done = f()
            mx.eval([] if done is None else done)
            if i:
                kept.append(time.perf_counter() - began)
    row(what, unit, work, *seconds)


def bench_window():  # window
    """Windowed attention, forward and backward, against causal attention over all keys. On a GPU four in a row, as the
    layers of a model follow each other: to start one takes a fifth of its time."""
    from model import window_attention
    B, H, T = (1, 4, 4096) if ON_CPU else (16, 12, 4096)
    times = 1 if ON_CPU else 4
    config = GPTConfig(n_head=H, n_embd=64 * H, sliding_window=128)
    q, k, v, dy = (mx.random.normal((B, H, T, 64)).astype(dtype) for _ in range(4))
    mx.eval(q, k, v, dy)

    def gradients(f):
        return [mx.vjp(f, [q, k, v], [dy])[1] for _ in range(times)]

    alternate("window 128 of 4096, attention; all keys", "tok/s", times * B * T,
              lambda: gradients(lambda *x: window_attention(config, 0, *x, 0)),
              lambda: gradients(lambda *x: attend(config, *x, "causal")))


def bench_diff():  # diff
    """A training step with differential attention, against a dense model."""
    shape = dict(n_layer=4, n_embd=256, n_head=4, block_size=256, vocab_size=4096) if ON_CPU else dict(
        n_layer=12, n_embd=768, n_head=12, block_size=1024, vocab_size=50304)
    batch = 8 if ON_CPU else 16
    dense, paired = (our_training(GPT(GPTConfig(**shape, **own)), dict(batch=batch, steps=1))
                     for own in (dict(), dict(diff_attn=True)))
    alternate("differential attention; dense model", "tok/s", batch * shape["block_size"], paired, dense)


def bench_moe():  # moe
    """A training step with 8 experts of half the width, 2 for each token, against a dense model with an equal number of
    active weights."""
    shape = dict(n_layer=4, n_embd=256, n_head=4, block_size=256, vocab_size=4096) if ON_CPU else dict(
        n_layer=12, n_embd=768, n_head=12, block_size=1024, vocab_size=50304)
    batch = 8 if ON_CPU else 16
    half = 2 * shape["n_embd"]
    dense, sparse = (our_training(GPT(GPTConfig(**shape, **own)), dict(batch=batch, steps=1))
                     for own in (dict(ffn_dim=2 * half), dict(ffn_dim=half, n_expert=8)))
    alternate("8 experts, 2 for each token; dense model of equal active weights", "tok/s",
              batch * shape["block_size"], sparse, dense)


def bench_mod():  # mod
    """A training step in which every other block computes an eighth of the tokens, against a dense model."""
    shape = dict(n_layer=8, n_embd=256, n_head=4, vocab_size=4096) if ON_CPU else dict(
        n_layer=12, n_embd=768, n_head=12, vocab_size=50304)
    batch = 2 if ON_CPU else 16
    dense, routed = (our_training(GPT(GPTConfig(**shape, **own, block_size=1024)), dict(batch=batch, steps=1))
                     for own in (dict(), dict(mod="topk")))
    alternate("MoD, 1/8 of the tokens in every other block; dense model", "tok/s", batch * 1024, routed, dense)


def bench_yoco():  # yoco
    """12 layers with a window of 128: the time to read a prompt, and the bytes of the cache after 32768 tokens."""

    def read(model, T):
        cache = model.make_cache()
        return model(mx.zeros((1, T), dtype=mx.int32), cache=cache, last=True), cache

    T, models = 4096 if ON_CPU else 32768, []
    for own in (dict(yoco=True, sliding_window=128), dict()):
        models.append(GPT(GPTConfig(n_layer=12, n_embd=128, block_size=T, vocab_size=256, **own)).eval())
        models[-1].set_dtype(dtype)
    alternate(f"YOCO, 12 layers, prompt of {T}; baseline", "tok/s", T, *(lambda m=m: read(m, T)[0] for m in models))
    ours, peer = (read(model, 32768)[1].nbytes for model in models)  # not evaluated: the shapes are enough
    sizes = f"{ours / 1e6:.2f}", f"{peer / 1e6:.2f}", f"{peer / ours:.2f}"
    show("YOCO, 12 layers, cache of 32768; baseline: MB", *sizes, "", "")


# ---- adapters --------------------------------------------------------------------------------------------------------


def bench_adapters():
    """The gradients of a step with LoRA of rank 8 on all layers. They are timed against the gradient of the embeddings
    in the frozen model and the adapters' matmuls alone; against the gradients of all weights; and, with the base
    quantized to 4 bits, against a dense base."""
    shape = dict(n_layer=4, n_embd=256, n_head=4, block_size=256, vocab_size=4096) if ON_CPU else dict(
        n_layer=12, n_embd=768, n_head=12, block_size=1024, vocab_size=50304)
    batch, rank, compiled = 8 if ON_CPU else 16, 8, mx.compile if compile else lambda f: f
    T = shape["block_size"]
    tokens = mx.random.randint(0, shape["vocab_size"], (batch, T + 1))

    def model_of(bits: int | None) -> GPT:  # bits of the base, 0: dense; None: dense, without an adapter
        model = GPT(GPTConfig(**shape))
        model.set_dtype(dtype)
        if bits is not None:
            quantize_base(model, bits)
            attach(model, rank=rank)
        mx.eval(model.parameters())
        return model

    def gradients(model: GPT):
        def loss(parameters):
            model.update(parameters)
            return model.loss(tokens[:, :-1], tokens[:, 1:])
        return compiled(lambda parameters: mx.grad(loss)(parameters)), model.trainable_parameters()

    whole, adapted, packed = (gradients(model_of(bits)) for bits in (None, 0, 4))
    frozen = model_of(None)

    def loss_of_embeddings(change):
        def add(site, layer, x):
            return x + change if (site, layer) == ("resid", 0) else x
        return frozen.loss(tokens[:, :-1], tokens[:, 1:], tap=add)

    sizes = [dense_shape(linear) for linear in linear_layers(frozen).values()]
    extra = [tuple(mx.random.normal(size).astype(dtype) for size in
                   ((batch * T, inputs), (batch * T, outputs), (rank, inputs), (outputs, rank)))
             for outputs, inputs in sizes]
    change = mx.zeros((batch, T, shape["n_embd"]), dtype=dtype)
    mx.eval(extra, change)

    def matmuls(x, g, a, b):  # forward, then backward
        down, back = x @ a.T, g @ b
        return down @ b.T, back @ a, back.T @ x, g.T @ down

    base = compiled(mx.grad(loss_of_embeddings))
    alone = compiled(lambda extra: [matmuls(*arrays) for arrays in extra])
    alternate("LoRA 8; frozen base, and the adapters' matmuls alone", "tok/s", batch * T,
              lambda: adapted[0](adapted[1]), lambda: (base(change), alone(extra)))
    alternate("LoRA 8; all weights", "tok/s", batch * T, lambda: adapted[0](adapted[1]), lambda: whole[0](whole[1]))
    alternate("LoRA 8 on a base of 4 bits; on a dense base", "tok/s", batch * T, lambda: packed[0](packed[1]),
              lambda: adapted[0](adapted[1]))


# ---- quantized weights -----------------------------------------------------------------------------------------------


def bench_packed():
    """Decoding at batch 1 with all matrices quantized in groups of 64, against the dense model; and the bytes of the
    weights in memory, against those of float16."""
    shape = dict(n_layer=8, n_embd=512, vocab_size=8192) if ON_CPU else dict(n_layer=24, n_embd=2048, vocab_size=50304)
    n = min(new_tokens, 256)

    def model_of(bits: int) -> GPT:
        model = GPT(GPTConfig(**shape, n_head=shape["n_embd"] // 64, block_size=512)).eval()
        model.set_dtype(dtype)
        if bits:
            nn.quantize(model, 64, bits)
        mx.eval(model.parameters())
        return model

    def size(model: GPT, dtype: mx.Dtype) -> float:  # MB, if floating-point numbers have this dtype
        arrays = [array for _, array in tree_flatten(model.parameters())]
        return sum(p.nbytes if p.dtype == mx.uint32 else p.size * dtype.size for p in arrays) / 1e6

    dense = model_of(0)
    for bits in 8, 4:
        packed = model_of(bits)
        what = f"{sum(p.size for _, p in tree_flatten(dense.parameters())) / 1e6:.0f}M, {bits} bits"
        alternate(f"decode {what}; {str(dtype)[9:]}", "tok/s", n, lambda packed=packed: [*generate(packed, [1], n)],
                  lambda: [*generate(dense, [1], n)])
        sizes = size(packed, mx.float16), size(dense, mx.float16)
        show(f"memory {what}; float16: MB", *(f"{x:,.2f}" for x in (*sizes, sizes[1] / sizes[0])), "", "")


# ---- looking inside --------------------------------------------------------------------------------------------------


def bench_inside():
    """Patching each layer and each of 32 positions in the 124M shape, against forward passes of as many rows through
    the blocks without patches."""
    from patching import swap
    L, H, C, _, _, V, *_ = SHAPES["124M"]
    T = min(new_tokens, 32)
    model = GPT(GPTConfig(n_layer=L, n_head=H, n_embd=C, block_size=T, vocab_size=V), None).eval()
    model.set_dtype(dtype)
    donor, recipient = mx.random.randint(0, V, (2, T))
    rows = mx.random.normal((T, T, C)).astype(dtype)
    mx.eval(model.parameters(), donor, recipient, rows)

    def plain():
        for layer in range(L):
            x = rows
            for block in model.blocks[layer:]:
                x = block(x, 0, None, no_tap, {})
            mx.eval(model.unembed(x[:, -1]))

    alternate(f"patching 124M, {L} x {T} cells; passes alone", "cells/s", L * T, lambda: swap(model, donor, recipient),
              plain)


# ---- reading models --------------------------------------------------------------------------------------------------


def bench_convert():
    """Convert a Hugging Face folder, a Llama of 134M parameters in bfloat16: ours and mlx-lm each to its own format."""
    try:
        sys.modules["hqq"] = None  # transformers would take our hqq.py for the package of that name
        from mlx_lm import convert
    except ImportError:
        convert = None
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: os.path.join(folder, name) for name in ("a.safetensors", "hf", "b.safetensors", "mlx")}
        model = GPT(GPTConfig(n_layer=8, n_head=16, n_embd=1024, vocab_size=16384, mlp="swiglu", qk_norm=False), None)
        model.set_dtype(mx.bfloat16)
        save_checkpoint(paths["a.safetensors"], model, {"tokenizer": byte_tokenizer().to_dict()})
        here = os.path.dirname(os.path.abspath(__file__))
        subprocess.run([sys.executable, os.path.join(here, "hf_reader.py"), paths["a.safetensors"],
                        f"--export={paths['hf']}"], check=True, capture_output=True)

        def ours():
            source = readers.open_folder(paths["hf"])
            config = readers.model_config(source.raw, "")
            with contextlib.redirect_stdout(io.StringIO()):
                readers.write_checkpoint(paths["b.safetensors"], config, readers.read_model(config, source),
                                     *readers.tokenizer_of(source))

        def theirs():
            shutil.rmtree(paths["mlx"], ignore_errors=True)
            with contextlib.redirect_stdout(io.StringIO()):
                convert(paths["hf"], paths["mlx"])

        size = os.path.getsize(paths["a.safetensors"]) / 1e9
        alternate("convert a Llama of bfloat16, mlx_lm", "GB/s", size, ours, theirs if convert else None)


# ---- growth ----------------------------------------------------------------------------------------------------------


def bench_growing():
    """How cost grows with sizes: see bench_growth.py. Its steps are compiled on a GPU only, since the compiler would
    take longer than all steps."""
    if again:
        with open(again, encoding="utf-8") as file:
            figures = json.load(file)
    else:
        title = f"{mx.device_info().get('device_name')}, {format_name}, {datetime.date.today()}"
        figures = dict(title=f"{title}: measured (dots), and expected from the shapes (wide lines)", panels=[])
    training = partial(our_training, compile=compile and not ON_CPU)
    for both in ([figures["panels"]] if again else bench_growth.measure(parts, training, dtype, rounds)):
        for panel in both:
            tqdm.write(f"{panel['name']}: {panel['y']}, measured and expected, by {panel['x']}")
            for curve in panel["curves"]:
                tqdm.write(f"  {curve['name']}")
                for x, *values in zip(curve["x"], curve["measured"], curve["expected"], strict=True):
                    tqdm.write(f"{x:>15,}{values[0]:>13,.2f}{values[1]:>13,.2f}")
        if not again:
            figures["panels"] += both
            if out:  # after each, in case that the next one does not fit into memory
                write_whole(f"{os.path.splitext(out)[0]}.json", json.dumps(figures, indent=1).encode())
    if out:
        try:
            draw_growth(out, figures["panels"], figures["title"])
        except ImportError:
            print("there is no matplotlib to draw with: run bench.py --only=growth --again=FILE.json --out=FILE.png "
                  "where it is installed", file=sys.stderr)


# ---- several devices -------------------------------------------------------------------------------------------------


def bench_several():
    """The processes of mlx.launch, of which the first one prints: see bench_devices.py."""
    n = mx.distributed.init().size()
    tqdm.write(f"{n} processes" if n > 1 else "1 process: start several with mlx.launch -n 2 -- python bench.py ...")
    tqdm.write(f"{'':32}{'ms':>12}{'GB/s':>12}")
    for what, seconds, speed in bench_devices.collectives(dtype, rounds):
        tqdm.write(f"{what:32}{seconds * 1e3:12,.2f}{speed / 1e9:12,.2f}")
    tqdm.write(f"{'':32}{'ms a step':>12}{'tok/s':>12}{'times one':>11}{'loss':>8}{'GiB':>5}")
    shape = dict(zip(("n_layer", "n_head", "n_embd", "block_size"), SHAPES[names[0]], strict=False),
                 vocab_size=SHAPES[names[0]][5], **SHAPES[names[0]][6]) if shapes else bench_devices.SHAPE
    for what, speed, times, ms, change, peak in bench_devices.measure(our_training, rounds, shape, ways, kinds):
        tqdm.write(f"{what:32}{ms:12,.2f}{speed:12,.0f}{times:11.2f}{change:8.0e}{peak:5.1f}")


# ---- the page --------------------------------------------------------------------------------------------------------


def bench_page():
    """The page's kernels through Vulkan, beside the device's peak; then the page's benchmark in Chromium. Both by
    bench_page.py."""
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "bench_page.py")
    for part in "kernels", "chromium":
        process = subprocess.Popen([sys.executable, script, part], stdout=subprocess.PIPE, text=True)
        for line in map(json.loads, process.stdout):
            if isinstance(line, str):
                print(line)
                continue
            what, unit, figure, peak = line
            show(f"{what}: {unit}" if unit else what, f"{figure:,.2f}" if unit else "", f"{peak:,.1f}" if peak else "",
                 f"{figure / peak:.2f}" if peak else "", "", "")
        process.wait()


# ---- run -------------------------------------------------------------------------------------------------------------

if mx.distributed.init().rank():
    sys.stdout = io.StringIO()  # the first process prints
print(f"{mx.device_info().get('device_name')}, {os.cpu_count()} cores, mlx {mx.__version__}\n"
      f"{blas.loaded or 'no other BLAS'}, {str(dtype)[9:]}, {datetime.date.today()}")
show("", "ours", "peer", "ratio (range)", "ms ours/peer", "GiB")
if "train" in sections:
    for name in names:
        if not name.endswith("-llama"):
            bench_training(name)
if {"decode", "many"} & {*sections}:
    tqdm.write(f"a copy: {bandwidth() / 1e9:,.1f} GB/s")
    lines([("", "tok/s", "ratio (range)", "ms a step", "share", "GiB")])
if "decode" in sections:
    for group in [[name] for name in names] if ON_CPU else [names]:  # a GPU has room for all at once
        bench_writing(group)
if "many" in sections:
    for name in names:
        if shapes or name.endswith("-llama"):
            bench_many(name)
if "tokenize" in sections:
    bench_tokenizing()
if "variants" in sections:
    bench_window()  # window
    bench_diff()  # diff
    bench_moe()  # moe
    bench_mod()  # mod
    bench_yoco()  # yoco
if "adapters" in sections:
    bench_adapters()
if "packed" in sections:
    bench_packed()
if "inside" in sections:
    bench_inside()
if "convert" in sections:
    bench_convert()
if "page" in sections:
    bench_page()
if "growth" in sections:
    bench_growing()
if "devices" in sections:
    bench_several()
