"""How fast is it here? One table, beside PyTorch, mlx-lm and tokenizers where they are installed.

    python bench.py
    python bench.py --only=train --shapes=124M,124M-gpt2      # on a GPU

Ours and the peer's are timed in turn, A B A B ..., each in a process of its own, after a warm-up. Figures are medians
over the rounds, and `ratio` is the median (and range) of the peer's time by ours in a round: above 1 we are faster.
A training step is forward, backward, clipping and AdamW. Peak memory is what MLX and torch.cuda allocated. The peers
stand in bench_peers.py: a nanoGPT-like GPT-2 in PyTorch, which trains and decodes the same shape with its own
architecture; mlx-lm's Llama, for the shapes that end in "-llama"; and the tokenizers package, on our vocabulary.
"""
import contextlib
import datetime
import glob
import io
import json
import os
import shutil
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
from model import GPT, ON_CPU, GPTConfig, attend, compute_dtype, generate, no_tap, save_checkpoint
from tokenizer import Tokenizer, byte_tokenizer, letters_of_bytes, train_bpe

only = "train,decode,tokenize,variants,adapters,packed,inside,convert,page"  # sections
shapes = ""            # of SHAPES below, separated by commas; none: those that suit the device
rounds = 0             # timed rounds; 0: 7 on a CPU, 20 on a GPU
new_tokens = 64        # written in each round of decoding
compile = True         # compile our training step (--compile=False is train.py's default on a CPU)
task = ""              # JSON; bench.py runs itself with it, to have our side in a process of its own

settings = overrides(globals())

GPT2 = dict(pos="learned", norm="layer", mlp="gelu", bias=True, qk_norm=False)
LLAMA = dict(mlp="swiglu", qk_norm=False)
SHAPES = {  # layers, heads, width, context, batch, vocabulary, our architecture, steps a round
    "4x4x128": (4, 4, 128, 64, 12, 128, {}, 10),
    "6x6x384": (6, 6, 384, 256, 12, 128, {}, 1),
    "6x6x384-llama": (6, 6, 384, 256, 12, 128, LLAMA, 1),
    "124M": (12, 12, 768, 1024, 16, 50304, {}, 5),
    "124M-gpt2": (12, 12, 768, 1024, 16, 50304, GPT2, 5),
    "124M-llama": (12, 12, 768, 1024, 16, 50304, LLAMA, 5),
}
names = shapes.split(",") if shapes else list(SHAPES)[:3] if ON_CPU else list(SHAPES)[3:]
if unknown := set(names) - set(SHAPES):
    raise UserError(f"no shape {unknown.pop()}: choose among {', '.join(SHAPES)}")
SECTIONS = "train", "decode", "tokenize", "variants", "adapters", "packed", "inside", "convert", "page"
if unknown := set(only.split(",")) - set(SECTIONS):
    raise UserError(f"no section {unknown.pop()!r}: choose among {', '.join(SECTIONS)}")
rounds = rounds or (7 if ON_CPU else 20)
dtype = compute_dtype("auto")

# ---- our side: what a round does -------------------------------------------------------------------------------------


def our_training(model: GPT, task: dict):
    """train.py's step, with AdamW."""
    opt = optim.Adam(1e-4, betas=[0.9, 0.95], bias_correction=True)
    opt.init(model.trainable_parameters())
    state = [model.state, opt.state]
    compiled = partial(mx.compile, inputs=state, outputs=state) if compile else lambda f: f

    def loss(parameters, x, y):
        model.update(tree_map(lambda p: p.astype(dtype), parameters))
        return model.loss(x, y)

    @compiled
    def gradients(x, y):
        parameters = model.trainable_parameters()
        value, grads = mx.value_and_grad(loss)(parameters, x, y)
        model.update(parameters)
        return value, grads

    @compiled
    def update(grads):
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
    model.eval()
    model.set_dtype(dtype)
    prompt = mx.random.randint(0, model.config.vocab_size, (task["batch"], task["prompt"])).tolist()
    return lambda: list(generate(model, prompt, task["new"], temperature=0))


def our_round(task: dict):
    model = GPT(GPTConfig(**{name: task[name] for name in task.keys() & vars(GPTConfig()).keys()}))
    return (our_training if task["kind"] == "train" else our_decoding)(model, task)


if task:
    work = our_round(json.loads(task))
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

# ---- the race --------------------------------------------------------------------------------------------------------

WIDTHS = 7, 13, 13, 22, 11, 11, 16


def show(what: str, *cells: str):
    tqdm.write(f"{what:44}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True)))


def row(what: str, unit: str, work: float, ours: list[float], peer: list[float], memory: str = ""):
    """Print a line: `work` units were done in each round, of so many seconds."""
    speeds = [f"{work / statistics.median(seconds):,.1f}" if seconds else "not there" for seconds in (ours, peer)]
    ms = [f"{statistics.median(seconds) * 1e3:,.1f}" if seconds else "" for seconds in (ours, peer)]
    ratios = sorted(b / a for a, b in zip(ours, peer, strict=False))
    ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})" if ratios else ""
    show(what, unit, *speeds, ratio, *ms, memory)


def start(*command: str):
    """A process that stands ready to do rounds, or None if its packages are not installed."""
    process = subprocess.Popen([sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    if process.stdout.readline():
        return process
    if process.wait() != 3:
        raise UserError(f"{command[0]} failed with exit status {process.returncode}: its message stands above")
    return None


def race(what: str, kind: str, name: str, batch: int, peer: str, prompt: int = 0, new: int = 0):
    L, H, C, T, B, V, architecture, steps = SHAPES[name]
    config = GPTConfig(n_layer=L, n_head=H, n_embd=C, block_size=T, vocab_size=V, **architecture)
    task = dict(vars(config), kind=kind, batch=batch, prompt=prompt, new=new, steps=steps, dtype=str(dtype)[9:])
    here = os.path.dirname(os.path.abspath(__file__))
    sides = [start(os.path.join(here, "bench.py"), f"--task={json.dumps(task)}", f"--compile={compile}"),
             start(os.path.join(here, "bench_peers.py"), peer, json.dumps(task))]
    seconds, peaks = ([], []), ["", ""]
    for _ in tqdm(range(rounds), desc=what, leave=False, disable=None):
        for i, process in enumerate(sides):
            if process:
                time.sleep(0.1)  # the threads of the other side spin for a moment after their work
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
    """The same vocabulary in the tokenizers package, or None if it is not installed."""
    try:
        import tokenizers
        from tokenizers import Regex, models, pre_tokenizers
    except ImportError:
        return None
    letters = letters_of_bytes()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ours.tokens}
    ranks, merges = {token: i for i, token in enumerate(ours.tokens)}, []
    for token in ours.tokens[256:]:  # tiktoken merges any two tokens that make it, whichever it was learned from
        for i in range(1, len(token)):
            if token[:i] in ranks and token[i:] in ranks:
                merges.append((spelled[token[:i]], spelled[token[i:]]))
    peer = tokenizers.Tokenizer(models.BPE({spelled[token]: i for token, i in ranks.items()}, merges))
    peer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(ours.pattern.replace("?+", "?").replace("++", "+")), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return peer


def bench_tokenizing():
    """Python's own sources, by a vocabulary of 4096 learned from them; one thread each."""
    text = ""
    for path in sorted(glob.glob(os.path.join(sysconfig.get_path("stdlib"), "*.py"))):
        with open(path, encoding="utf-8", errors="ignore") as file:
            text += file.read()
    text = text[:4_000_000]
    ours = train_bpe([text[i:i + 100_000] for i in range(0, len(text), 100_000)], 4096)
    peer = their_tokenizer(ours)
    if peer and peer.encode(text[:20_000]).ids != ours.encode(text[:20_000]).tolist():
        raise UserError("tokenizers gives other tokens than ours: nothing to compare")
    seconds = [], []
    for _ in tqdm(range(rounds), desc="tokenize", leave=False, disable=None):
        for side, kept in zip((ours, peer), seconds, strict=True):
            if side:
                began = time.perf_counter()
                side.encode(text)
                kept.append(time.perf_counter() - began)
    row("tokenize stdlib, one thread, tokenizers", "MB/s", len(text.encode()) / 1e6, *seconds)


# ---- variants, beside what they replace ------------------------------------------------------------------------------


def alternate(what: str, unit: str, work: float, ours, peer):
    """Time two functions in turn in this process; peer None: ours alone."""
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
    """Attention alone, forward and backward, against causal attention over all keys."""
    from model import window_attention
    B, H, T = (1, 4, 4096) if ON_CPU else (16, 12, 4096)
    config = GPTConfig(n_head=H, n_embd=64 * H, sliding_window=128)
    q, k, v = (mx.random.normal((B, H, T, 64)).astype(dtype) for _ in range(3))

    def gradients(f):
        return mx.grad(lambda q, k, v: f(q, k, v).astype(mx.float32).square().sum(), (0, 1, 2))(q, k, v)

    alternate("window 128 of 4096, attention; all keys", "tok/s", B * T,
              lambda: gradients(lambda *x: window_attention(config, 0, *x, 0)),
              lambda: gradients(lambda *x: attend(*x, "causal")))


def bench_moe():  # moe
    """A training step of 8 experts, 2 a token, of half the width, against a dense model of as many active weights."""
    shape = dict(n_layer=4, n_embd=256, n_head=4, block_size=256, vocab_size=4096) if ON_CPU else dict(
        n_layer=12, n_embd=768, n_head=12, block_size=1024, vocab_size=50304)
    batch = 8 if ON_CPU else 16
    half = 2 * shape["n_embd"]
    dense, sparse = (our_training(GPT(GPTConfig(**shape, **own)), dict(batch=batch, steps=1))
                     for own in (dict(ffn_dim=2 * half), dict(ffn_dim=half, n_expert=8)))
    alternate("8 experts, 2 a token; dense, as many active", "tok/s", batch * shape["block_size"], sparse, dense)


def bench_mod():  # mod
    """A training step where every other block works on an eighth of the tokens, against one of whole blocks."""
    shape = dict(n_layer=8, n_embd=256, n_head=4, vocab_size=4096) if ON_CPU else dict(
        n_layer=12, n_embd=768, n_head=12, vocab_size=50304)
    batch = 2 if ON_CPU else 16
    dense, routed = (our_training(GPT(GPTConfig(**shape, **own, block_size=1024)), dict(batch=batch, steps=1))
                     for own in (dict(), dict(mod="topk")))
    alternate("MoD, 1/8 every other block, T 1024; dense", "tok/s", batch * 1024, routed, dense)


def bench_yoco():  # yoco
    """12 layers and a window of 128: the time to read a prompt, and the bytes of the cache after 32768 tokens."""

    def read(model, T):
        cache = model.make_cache()
        return model(mx.zeros((1, T), dtype=mx.int32), cache=cache, last=True), cache

    T, models = 4096 if ON_CPU else 32768, []
    for own in (dict(yoco=True, sliding_window=128), dict()):
        models.append(GPT(GPTConfig(n_layer=12, n_embd=128, block_size=T, vocab_size=256, **own)).eval())
        models[-1].set_dtype(dtype)
    alternate(f"YOCO, 12 layers, prompt of {T}; all keys", "tok/s", T, *(lambda m=m: read(m, T)[0] for m in models))
    ours, peer = (read(model, 32768)[1].nbytes for model in models)  # not evaluated: the shapes are enough
    sizes = f"{ours / 1e6:.2f}", f"{peer / 1e6:.2f}", f"{peer / ours:.2f}"
    show("YOCO, 12 layers, cache of 32768; all keys", "MB", *sizes, "", "", "")


# ---- adapters --------------------------------------------------------------------------------------------------------


def bench_adapters():
    """A step's gradients with LoRA of rank 8 on all layers, against those of the frozen model with regard to what its
    first block reads and, on their own, the matmuls that the adapters add; against all weights' gradients; and with the
    model packed to 4 bits, against itself."""
    shape = dict(n_layer=4, n_embd=256, n_head=4, block_size=256, vocab_size=4096) if ON_CPU else dict(
        n_layer=12, n_embd=768, n_head=12, block_size=1024, vocab_size=50304)
    batch, rank, compiled = 8 if ON_CPU else 16, 8, mx.compile if compile else lambda f: f
    T = shape["block_size"]
    tokens = mx.random.randint(0, shape["vocab_size"], (batch, T + 1))

    def model_of(bits: int | None) -> GPT:
        """None: without an adapter."""
        model = GPT(GPTConfig(**shape))
        model.set_dtype(dtype)
        if bits is not None:
            quantize_base(model, bits)
            attach(model, rank=rank)
            model.set_dtype(dtype, lambda kind: mx.issubdtype(kind, mx.floating))
        mx.eval(model.parameters())
        return model

    def gradients(model: GPT):
        def loss(parameters):
            model.update(parameters)
            return model.loss(tokens[:, :-1], tokens[:, 1:])
        return compiled(lambda parameters: mx.grad(loss)(parameters)), model.trainable_parameters()

    whole, adapted, packed = (gradients(model_of(bits)) for bits in (None, 0, 4))
    frozen = model_of(None)

    def past_the_weights(change):
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

    base = compiled(mx.grad(past_the_weights))
    alone = compiled(lambda extra: [matmuls(*arrays) for arrays in extra])
    alternate("LoRA 8; the base, and the matmuls alone", "tok/s", batch * T, lambda: adapted[0](adapted[1]),
              lambda: (base(change), alone(extra)))
    alternate("LoRA 8; all weights", "tok/s", batch * T, lambda: adapted[0](adapted[1]), lambda: whole[0](whole[1]))
    alternate("LoRA 8 on 4 bits; on a dense base", "tok/s", batch * T, lambda: packed[0](packed[1]),
              lambda: adapted[0](adapted[1]))


# ---- packed weights --------------------------------------------------------------------------------------------------


def bench_packed():
    """Decoding at batch 1 with all matrices packed in groups of 64, against the model as it is; and the bytes of the
    weights in memory, by those of float16."""
    shape = dict(n_layer=8, n_embd=512, vocab_size=8192) if ON_CPU else dict(n_layer=24, n_embd=2048, vocab_size=50304)
    n = min(new_tokens, 256)

    def model_of(bits: int) -> GPT:
        model = GPT(GPTConfig(**shape, n_head=shape["n_embd"] // 64, block_size=512)).eval()
        model.set_dtype(dtype)
        if bits:
            nn.quantize(model, 64, bits)
        mx.eval(model.parameters())
        return model

    def size(model: GPT, dtype: mx.Dtype) -> float:  # floating-point numbers are of this dtype
        arrays = [array for _, array in tree_flatten(model.parameters())]
        return sum(p.nbytes if p.dtype == mx.uint32 else p.size * dtype.size for p in arrays) / 1e6

    dense = model_of(0)
    for bits in 8, 4:
        packed = model_of(bits)
        what = f"{sum(p.size for _, p in tree_flatten(dense.parameters())) / 1e6:.0f}M, {bits} bits"
        alternate(f"decode {what}; {str(dtype)[9:]}", "tok/s", n, lambda packed=packed: [*generate(packed, [1], n)],
                  lambda: [*generate(dense, [1], n)])
        sizes = size(packed, mx.float16), size(dense, mx.float16)
        show(f"memory {what}; float16", "MB", *(f"{x:,.2f}" for x in (*sizes, sizes[1] / sizes[0])), "", "", "")


# ---- looking inside --------------------------------------------------------------------------------------------------


def bench_inside():
    """A patching grid, every layer by 32 positions of the 124M shape, against passes of the same rows through the same
    blocks, with no patch."""
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
                x = block(x, 0, None, no_tap)
            mx.eval(model.unembed(x[:, -1]))

    alternate(f"patching 124M, {L} x {T} cells; passes alone", "cells/s", L * T, lambda: swap(model, donor, recipient),
              plain)


# ---- reading models --------------------------------------------------------------------------------------------------


def bench_convert():
    """A Hugging Face folder of a Llama of 134M parameters in bfloat16: into our checkpoint, and by mlx-lm into its."""
    try:
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
    """The page's kernels through Vulkan, beside the device's peak; the page's own benchmark in Chromium. By
    bench_page.py."""
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "bench_page.py")
    for part in "kernels", "chromium":
        process = subprocess.Popen([sys.executable, script, part], stdout=subprocess.PIPE, text=True)
        for line in map(json.loads, process.stdout):
            if isinstance(line, str):
                print(line)
                continue
            what, unit, figure, peak = line
            show(what, unit, f"{figure:,.2f}" if unit else "", f"{peak:,.1f}" if peak else "",
                 f"{figure / peak:.2f}" if peak else "", "", "", "")
        process.wait()


# ---- run -------------------------------------------------------------------------------------------------------------

print(f"{mx.device_info().get('device_name')}, {os.cpu_count()} cores, mlx {mx.__version__}, "
      f"{blas.loaded or 'no other BLAS'}, {str(dtype)[9:]}, {datetime.date.today()}")
show("", "unit", "ours", "peer", "ratio (range)", "ours ms", "peer ms", "GiB ours/peer")
for name in names:
    _, _, _, T, B, *_ = SHAPES[name]
    llama = name.endswith("-llama")
    if "train" in only and not llama:
        race(f"train {name}, {B} x {T}", "train", name, B, "torch")
    if "decode" in only:
        for batch in (1,) if llama else (1, 16):
            race(f"decode {name}, batch {batch}", "decode", name, batch, "mlx_lm" if llama else "torch", T // 4,
                 min(new_tokens, T // 2))
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
