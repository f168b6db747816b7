"""Measure the speed on this machine, beside PyTorch, mlx-lm and tokenizers where they are installed.

    python bench.py
    python bench.py --only=train --shapes=124M,124M-gpt2      # on a GPU

Our code and a peer are timed in turn, A B A B ..., each in a process of its own, after a warm-up. The table shows
medians over the rounds. `ratio` is the median (and range) over the rounds of the peer's time divided by our time: above
1 our code is faster. A training step is forward, backward, clipping and AdamW. GiB is the peak memory that MLX and
torch.cuda allocated. The peers (bench_peers.py) are a GPT-2 in PyTorch, as nanoGPT writes it, with the sizes of our
shape; mlx-lm's Llama, for the shapes that end in "-llama"; and the tokenizers package with our vocabulary. Where a line
names two methods ("A; B"), both are ours: B is in the peer's column.
"""
import contextlib
import datetime
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
from functools import partial

import blas  # before mlx
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map
from tqdm import tqdm

import readers
from config import UserError, overrides
from lora import attach, dense_shape, linear_layers, quantize_base
from model import GPT, ON_CPU, GPTConfig, attend, compute_dtype, generate, gpu_train, no_tap, save_checkpoint
from tokenizer import Tokenizer, byte_tokenizer, letters_of_bytes, train_bpe

only = "train,decode,tokenize,variants,adapters,packed,inside,convert,page"  # sections
shapes = ""            # 4x4x128 | 6x6x384 | 6x6x384-llama | 124M | 124M-gpt2 | 124M-llama, with commas; "": by device
rounds = 0             # timed rounds; 0: 7 on a CPU, 20 on a GPU
new_tokens = 64        # tokens to generate in a round of decoding
compile = True         # compile our training step (train.py's default on a CPU is False)
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
}
names = shapes.split(",") if shapes else list(SHAPES)[:3] if ON_CPU else list(SHAPES)[3:]
if unknown := set(names) - set(SHAPES):
    raise UserError(f"there is no shape {unknown.pop()}: choose among {', '.join(SHAPES)}")
SECTIONS = "train", "decode", "tokenize", "variants", "adapters", "packed", "inside", "convert", "page"
if unknown := set(only.split(",")) - set(SECTIONS):
    raise UserError(f"there is no section {unknown.pop()!r}: choose among {', '.join(SECTIONS)}")
rounds = rounds or (7 if ON_CPU else 20)
dtype = compute_dtype("auto")

# ---- our side: the work of a round -----------------------------------------------------------------------------------


def our_training(model: GPT, task: dict):
    """A function that takes task["steps"] training steps as train.py does, with AdamW."""
    model.compute_dtype = dtype
    opt = optim.Adam(1e-4, betas=[0.9, 0.95], bias_correction=True)
    opt.init(model.trainable_parameters())
    state = [model.state, opt.state]
    compiled = partial(mx.compile, inputs=state, outputs=state) if compile else lambda f: f

    @compiled
    def gradients(x, y):
        return nn.value_and_grad(model, model.loss)(x, y)

    @compiled
    def update(grads):
        if gpu_train and (length := gpu_train.adamw(model, opt, grads, 1.0, 0.1)) is not None:
            return length
        grads, length = optim.clip_grad_norm(grads, 1.0)
        decay = 1 - 0.1 * opt.learning_rate
        model.update(tree_map(lambda p: p * decay if p.ndim > 1 else p, model.trainable_parameters()))
        opt.update(model, grads)
        return length

    tokens = mx.random.randint(0, model.config.vocab_size, (task["batch"], model.config.block_size + 1))

    def steps():
        for _ in range(task["steps"]):
            value, grads = gradients(tokens[:, :-1], tokens[:, 1:])
            length = update(grads)
            del grads
            mx.async_eval(value, length, state)
        mx.eval(state)

    return steps


def our_decoding(model: GPT, task: dict):
    """A function that reads a prompt and generates task["new"] tokens."""
    model.eval()
    model.set_dtype(dtype)
    prompt = mx.random.randint(0, model.config.vocab_size, (task["batch"], task["prompt"])).tolist()
    return lambda: list(generate(model, prompt, task["new"], temperature=0))


def our_round(task: dict):
    model = GPT(GPTConfig(**{name: task[name] for name in task.keys() & vars(GPTConfig()).keys()}))
    return (our_training if task["kind"] == "train" else our_decoding)(model, task)


if task:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the process that has started this one says that it was stopped
    try:
        described = json.loads(task)
    except ValueError:
        described = None
    if not isinstance(described, dict) or not {"kind", "batch", "steps", "prompt", "new"} <= {*described}:
        raise UserError("--task is for processes that bench.py itself starts: leave it out")
    work = our_round(described)
    for _ in range(2):
        work()
        mx.reset_peak_memory()
    work()
    print(json.dumps({"peak": mx.get_peak_memory() / 2**30}), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        work()
        print(json.dumps({"seconds": time.perf_counter() - began, "peak": mx.get_peak_memory() / 2**30}), flush=True)
    sys.exit()

# ---- timing, and the table -------------------------------------------------------------------------------------------

WIDTHS = 15, 13, 21, 18, 13


def show(what: str, *cells: str):
    """Print a row of the table in two lines: what was measured, and the figures."""
    figures = "".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True))
    tqdm.write(f"{what}\n{figures}" if what else figures)


def row(what: str, unit: str, work: float, ours: list[float], peer: list[float], memory: str = ""):
    """Print the row of a measurement. ours, peer: the seconds of each round, in which `work` units were done."""
    speeds = [f"{work / statistics.median(seconds):,.1f}" if seconds else "missing" for seconds in (ours, peer)]
    ms = "/".join(f"{statistics.median(seconds) * 1e3:,.1f}" for seconds in (ours, peer) if seconds)
    ratios = sorted(b / a for a, b in zip(ours, peer, strict=False))
    ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})" if ratios else ""
    show(f"{what}: {unit}", *speeds, ratio, ms, memory)


def start(*command: str):
    """A process that is ready to do rounds, or None if its packages are not installed."""
    process = subprocess.Popen([sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    if process.stdout.readline():
        return process
    if process.wait() != 3:
        raise UserError(f"{command[0]} failed with exit status {process.returncode}: see its message above")
    return None


def race(what: str, kind: str, name: str, batch: int, peer: str, prompt: int = 0, new: int = 0):
    """Time our code and a peer in turn, in processes. kind: train | decode. prompt, new: tokens to read, to write."""
    L, H, C, T, B, V, architecture, steps = SHAPES[name]
    config = GPTConfig(n_layer=L, n_head=H, n_embd=C, block_size=T, vocab_size=V, **architecture)
    task = dict(vars(config), kind=kind, batch=batch, prompt=prompt, new=new, steps=steps, dtype=str(dtype)[9:])
    here = os.path.dirname(os.path.abspath(__file__))
    sides = [start(os.path.abspath(__file__), f"--task={json.dumps(task)}", f"--compile={compile}"),
             start(os.path.join(here, "bench_peers.py"), peer, json.dumps(task))]
    seconds, peaks = ([], []), ["", ""]
    for _ in tqdm(range(rounds), desc=what, leave=False, disable=None):
        for i, process in enumerate(sides):
            if process:
                time.sleep(0.1)  # the other side's threads still spin for a moment
                print(file=process.stdin, flush=True)
                answer = json.loads(process.stdout.readline())
                seconds[i].append(answer["seconds"])
                peaks[i] = f"{answer['peak']:.2f}" if answer["peak"] else ""
    for process in filter(None, sides):
        process.stdin.close()
        process.wait()
    work = steps * B * T if kind == "train" else batch * new if new > 1 else prompt
    row(f"{what}, {peer}", "tok/s", work, *seconds, "/".join(filter(None, peaks)))


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
    """Windowed attention, forward and backward, against causal attention over all keys."""
    from model import window_attention
    B, H, T = (1, 4, 4096) if ON_CPU else (16, 12, 4096)
    config = GPTConfig(n_head=H, n_embd=64 * H, sliding_window=128)
    q, k, v = (mx.random.normal((B, H, T, 64)).astype(dtype) for _ in range(3))

    def gradients(f):
        return mx.grad(lambda q, k, v: f(q, k, v).astype(mx.float32).square().sum(), (0, 1, 2))(q, k, v)

    alternate("window 128 of 4096, attention; all keys", "tok/s", B * T,
              lambda: gradients(lambda *x: window_attention(config, 0, *x, 0)),
              lambda: gradients(lambda *x: attend(config, *x, "causal")))


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

print(f"{mx.device_info().get('device_name')}, {os.cpu_count()} cores, mlx {mx.__version__}\n"
      f"{blas.loaded or 'no other BLAS'}, {str(dtype)[9:]}, {datetime.date.today()}")
show("", "ours", "peer", "ratio (range)", "ms ours/peer", "GiB")
for name in names:
    _, _, _, T, B, *_ = SHAPES[name]
    llama = name.endswith("-llama")
    if "train" in only and not llama:
        race(f"train {name}, {B} x {T}", "train", name, B, "torch")
    if "decode" in only:
        for batch in (1,) if llama else (1, 16):
            for peer in ("mlx_lm",) if llama else ("torch",) if ON_CPU else ("torch", "torch_graphs"):
                race(f"decode {name}, batch {batch}", "decode", name, batch, peer, T // 4, min(new_tokens, T // 2))
        race(f"prefill {name}, {T - 1} tokens", "decode", name, 1, "mlx_lm" if llama else "torch", T - 1, 1)
if "tokenize" in only:
    bench_tokenizing()
if "variants" in only:
    bench_window()  # window
    bench_moe()  # moe
    bench_mod()  # mod
    bench_yoco()  # yoco
if "adapters" in only:
    bench_adapters()
if "packed" in only:
    bench_packed()
if "inside" in only:
    bench_inside()
if "convert" in only:
    bench_convert()
if "page" in only:
    bench_page()
