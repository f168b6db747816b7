"""Train a GPT on your own text.

    python train.py                          # on Python's own source text: 2 minutes on two CPU cores
    ...
    step    450 | loss 4.2759 | lr 1.0e-03 5.0e-03 | norm 0.63 |   5,213 tok/s
    step    450 | val  4.2930 | ppl   73.2 | bpb 1.6326 | 0.35 GiB | best

    python train.py --data=book.txt --n_layer=6 --n_head=6 --n_embd=384 --max_iters=2000
    python train.py --init=base.safetensors --data=book.txt --learning_rate=1e-3 --muon_lr=5e-3
    mlx.launch -n 2 -- python train.py       # several devices: they share batch_size

    OUT_DIR/ckpt.safetensors     the model after the last step, and beside it the state of the optimizer
    OUT_DIR/best.safetensors     the model with the lowest validation loss
    OUT_DIR/loss.csv, loss.png   the curves; with experts also experts.csv and experts.png
    OUT_DIR/run.json, source/    the settings of the run and its code

Ctrl-C saves the checkpoint and stops. --resume=True continues from OUT_DIR/ckpt.safetensors with the settings that it
was trained with, except those on the command line. A new run asks before it replaces results in OUT_DIR. --init begins
a new run with the weights of any checkpoint, also an imported one: it needs smaller learning rates than random weights.

After every log_interval updates a line shows: loss, the mean cross-entropy of this update in nats per token; lr, the
learning rate, and under Muon also that of the matrices; norm, the norm of the gradient before clipping; tok/s, the
training tokens per second since the last such line; with experts also load, the number of tokens that the busiest
expert of any layer took, divided by the mean of its layer (1: all experts took the same). With mod=topk the training
loss uses later tokens, as in the paper; val does not.

After every eval_interval updates a line shows: val, the mean cross-entropy on fixed windows of the validation split;
ppl, the perplexity exp(val); bpb, bits per byte of text, which can be compared between tokenizers; the peak memory; and
mfu, the share of the device's peak FLOPS that training uses (Chowdhery et al. 2022), for devices whose peak is known.
"""
import contextlib
import hashlib
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter  # moe
from dataclasses import asdict, fields
from functools import partial

import blas  # before mlx
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_map_with_path, tree_unflatten
from tqdm import tqdm

import draw
import run_folder
from config import UserError, given, overrides
from model import (
    GPT,
    ON_CPU,
    VERSION,
    GPTConfig,
    compute_dtype,
    generate,
    gpu_train,
    load_arrays,
    load_checkpoint,
    rebalance,  # moe
    save_arrays,
    save_checkpoint,
)
from muon import Muon, by_muon
from tokenizer import Tokenizer, open_tokens, tokens_folder

try:
    from cpu_train import Adam, clip_grad_norm  # faster on a CPU
except ImportError:
    from mlx.optimizers import Adam, clip_grad_norm
try:
    import precision as low  # products of 8 or 4 bits
except ImportError:
    low = None
try:
    import packed_states  # optimizers' states of 8 or 4 bits
except ImportError:
    packed_states = None
try:
    import parallel as shared  # what several devices share out
except ImportError:
    shared = None
try:
    import processes  # which end together
except ImportError:
    processes = None

# data
data = "stdlib"         # a folder of data.py, or any source it takes: a text file or folder, shakespeare, hf:NAME
tokenizer = "bpe"       # for a source that data.py has not read yet: bpe | byte | char | a tiktoken name such as gpt2
vocab_size = 4096       # for bpe
out_dir = "out"         # the folder of this run: checkpoints and curves
resume = False          # continue from OUT_DIR/ckpt.safetensors
init = ""               # begin with the weights, architecture and tokenizer of a checkpoint; "": random weights
seed = 1337             # of the weights and of the order of the data
# model
block_size = 256        # context length, tokens
n_layer = 4             # blocks
n_head = 2              # query heads
n_kv_head = 0           # key/value heads; 0: n_head
n_embd = 128            # width
head_dim = 0            # width of a head; 0: n_embd / n_head
ffn_dim = 0             # hidden width of the MLP; 0: 4 n_embd (gated: 8/3)
pos = "rope"            # rope | learned | none
rope_theta = 10000.0    # base of the rotary wavelengths
norm = "rms"            # rms | layer
norm_eps = 1e-5         # added to the variance in the norms
mlp = "relu2"           # relu2 | gelu | gelu_tanh | swiglu | geglu | swiglu_clip
bias = False            # biases in linear layers and LayerNorm
qkv_bias = False        # biases in q, k, v alone
qk_norm = True          # RMSNorm of every query and key
tie = True              # unembedding = embedding transposed
alibi = False           # scores fall linearly with the distance; no other position signal  # alibi
sliding_window = 0      # keys that a query sees, itself included; 0: all  # window
window_pattern = "S"    # one letter a layer, repeated: S short (the window), L long (all keys)  # window
sinks = 0               # first tokens that windowed queries see too  # window
window_theta = 0.0      # rope_theta of windowed layers; 0: that of all layers  # window
diff_attn = False       # differential attention  # diff
diff_attn_version = 1   # 1 (2024): pairs of the n_head heads; 2 (2026): n_head pairs  # diff
n_expert = 0            # experts, MLPs of width ffn_dim, of which a token uses some; 0: one MLP  # moe
expert_top_k = 2        # experts that a token uses  # moe
n_shared_expert = 0     # further experts, which every token uses  # moe
expert_balance = "loss"  # loss (Switch) | bias (loss-free) | none: spreads tokens evenly  # moe
router_bias = False     # a bias in the router of experts  # moe
mod = "none"            # none | topk | soft: which tokens a routed block works on  # mod
mod_capacity = 0.125    # topk: share of the tokens that a routed block works on  # mod
mod_every = 2           # the last of every mod_every blocks is routed  # mod
yoco = False            # the second half of the blocks shares one set of keys and values  # yoco
value_residual = False  # every layer's values are mixed with those of layer 0  # resformer
value_embeds = False    # every other layer adds an embedding of the token to its values  # valembed
softcap = 0.0           # logits are bounded to +-softcap by a tanh; 0: they are not  # softcap
attn_softcap = 0.0      # attention's scores are bounded to +-attn_softcap; 0: they are not  # softcap
# optimization
max_iters = 450         # updates
batch_size = 8          # sequences per micro-step, on all devices together
grad_accum = 1          # micro-steps per update
optimizer = "muon"      # muon | adamw | lion
learning_rate = 1e-2    # peak; under muon that of embeddings and norms. Larger models need less, lion a tenth
muon_lr = 0.05          # peak, of the matrices under muon
beta1 = 0.9             # decay of the gradient's mean
beta2 = 0.95            # decay of the gradient's square
weight_decay = 0.1      # of matrices, times the learning rate
dropout = 0.0           # share of the numbers that become 0 in training, at GPT-2's places; for small data  # dropout
grad_clip = 1.0         # largest norm of the gradient; 0: no clipping
schedule = "cosine"     # cosine | wsd (warmup, stable, linear decay over the last fifth)
warmup_iters = 20       # updates of linear warmup
decay_iters = 0         # where the schedule ends; 0: max_iters
min_lr = 0.1            # learning rate at the end, as a share of the peak
# run
eval_interval = 100     # updates between evaluations; each one also saves
eval_windows = 64       # windows of block_size tokens per evaluation, the same ones in every run
log_interval = 25       # updates between log lines
dtype = "auto"          # of the computation: float32 | bfloat16; auto: bfloat16 on a GPU, float32 on a CPU
precision = ""          # fp8 | mxfp8 | nvfp4: the blocks multiply such numbers, simulated; "": those of dtype
precision_off = ""      # choices of nvfp4 to leave out, with commas: stochastic, hadamard, square, last
parallel = ""           # zero1 | fsdp | tensor | pipeline: what several devices share out, see parallel.py
slices = 0              # devices that share each matrix under tensor, the others take other rows; 0: all share
timeout = 60.0          # with several processes: seconds without a sign of life from one, after which all end
optimizer_bits = 32     # 8 | 4: keep the optimizer's states as integers of so many bits
checkpoint_every = 0    # recompute every k-th block in the backward pass to save memory; 0: none, 1: every block
compile = not ON_CPU    # mx.compile the step; on a CPU cpu_train.py is faster, which cannot be compiled
sample_tokens = 200     # tokens of the sample that is printed at the end
overwrite = False       # replace the results of another run in OUT_DIR without asking
log = ""                # send the rows of loss.csv also to tensorboard | wandb

settings = overrides(globals())

SCRIPT, source = os.path.basename(__file__), run_folder.read_source(__file__)
HERE = os.path.dirname(os.path.abspath(run_folder.__file__))  # where the other scripts are
OTHERS = {"vocab_size", "parallel"}  # have names of GPTConfig's fields, but mean something else
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "RTX 4090": 165e12}  # dense bfloat16
ckpt_path, best_path = os.path.join(out_dir, "ckpt.safetensors"), os.path.join(out_dir, "best.safetensors")
world = mx.distributed.init()
rank, n_ranks = world.rank(), world.size()


def say(*words):
    if rank == 0:
        tqdm.write(" ".join(map(str, words)))
        sys.stdout.flush()


def in_all_processes(function, *arguments):
    """Call a function in every process, and return its result. If it ends the script in one of them, all end, and the
    first such process tells why."""
    result, error = None, None
    try:
        result = function(*arguments)
    except (UserError, SystemExit) as reason:
        error = reason
    first = mx.distributed.all_min(mx.array(rank if error else n_ranks)).item()
    if first < n_ranks:
        end_with(error if rank == first else None, first)
    return result


def in_first_process(function, *arguments):
    """The same in the first process alone, while the others wait."""
    in_all_processes(function if rank == 0 else lambda *_: None, *arguments)


def end_with(error: Exception | None, first: int = 0):
    """End all processes with the error that the first one has. The others end a second later, since mlx.launch kills
    all as soon as one has ended."""
    if watching:
        watching.set()
    time.sleep(rank != first)
    raise error or SystemExit(2)


def check_same(what: dict):
    """All processes end where a value of `what` differs between them."""
    codes = [int(hashlib.sha256(repr(value).encode()).hexdigest()[:7], 16) for value in what.values()]
    low, high = (f(mx.array(codes)).tolist() for f in (mx.distributed.all_min, mx.distributed.all_max))
    if different := [name for name, a, b in zip(what, low, high, strict=True) if a != b]:
        end_with(None if rank else UserError(f"{different[0]} differs between the processes: give all of them the same "
                                             "settings and files"))


# ---- resume: the checkpoint's settings apply, except those on the command line; init: its architecture alone ---------

start_step, meta, model, origin = 0, {}, None, ckpt_path if resume else init
if resume and "init" in given:
    raise UserError("--init begins a new run and --resume=True goes on: give one of them")
if resume:
    run_folder.check_maker(ckpt_path, SCRIPT, out_dir)
if origin:
    model, meta = load_checkpoint(origin)
    before = asdict(model.config)
    asked = {name: settings[name] for name in given & before.keys() - OTHERS}
    for name, value in asdict(GPTConfig(**{**before, **asked})).items():
        if value != before[name] and (resume or name != "block_size"):
            raise UserError(f"{name} is {value}, but {before[name]} in {origin}: leave it out or train anew")
if resume:
    parts = ["settings", "step", "losses", "tokenizer", *{"tokens"} & meta.keys()]
    if isinstance(meta.get("settings"), dict) and meta["settings"].get("parallel") is False:
        del meta["settings"]["parallel"]  # GPTConfig's field, which the page lists among the settings
    settings.update(run_folder.old_settings(ckpt_path, meta, settings, ["optimizer", "optimizer_bits"], parts))
    start_step, end = meta["step"], settings["max_iters"]
    if start_step >= end:
        raise UserError(f"{ckpt_path} is at step {start_step} of {end} already: give a larger --max_iters")
elif init:
    if given & {"tokenizer", "vocab_size"}:
        raise UserError("--init also takes the checkpoint's tokenizer: leave out --tokenizer and --vocab_size")
    if not meta.get("tokenizer") or Tokenizer.from_dict(meta["tokenizer"]).n_vocab > before["vocab_size"]:
        raise UserError(f"{init} holds no tokenizer, or one of more tokens than it embeds: take another checkpoint")
    # A long context takes much memory, and few documents fill it: over 1,024 tokens it is trained only if asked for.
    T = settings["block_size"] if "block_size" in given else min(before["block_size"], 1024)
    if before["pos"] == "learned":
        if T > before["block_size"]:
            raise UserError(f"block_size={T}, but {init} has learned {before['block_size']} positions: take no more")
        model.pos_embed.weight = model.pos_embed.weight[:T]
    weights = dict(tree_flatten(model.parameters()))
    model = GPT(GPTConfig(**{**before, "block_size": T}), seed=None)
    if {name: p.shape for name, p in tree_flatten(model.parameters())} != {n: p.shape for n, p in weights.items()}:
        raise UserError(f"{init} has quantized or low-rank layers, which do not train: give the file it was made from")
    model.load_weights(list(weights.items()))
    model.set_dtype(mx.float32)
    settings.update({name: value for name, value in before.items() if name in settings.keys() - OTHERS},
                    block_size=T, tokenizer=init)
    meta = {"tokenizer": meta["tokenizer"]}
globals().update(settings)
if "timeout" in given and (n_ranks == 1 or not processes):
    raise UserError("timeout is for several processes, and needs processes.py: leave it out")
watching = processes.watch(world, timeout) if processes and n_ranks > 1 else None

run_folder.check_settings(settings, resume)
if not out_dir:
    raise UserError("out_dir is empty: name a folder, or . for this one")
if schedule not in ("cosine", "wsd"):
    raise UserError(f"schedule={schedule!r} is not one of cosine, wsd")
working_dtype = compute_dtype(dtype)
check_same({name: value for name, value in settings.items() if name not in ("data", "init", "out_dir")})
in_first_process(run_folder.check, out_dir, SCRIPT, overwrite, resume, [data] if resume else [data, init])

# ---- data: random windows of a flat file of tokens -------------------------------------------------------------------


def prepared(source: str) -> str:
    """The folder with source's tokens; data.py makes it first where it is missing or out of date."""
    if os.path.exists(os.path.join(source, "meta.json")):
        return source
    name = origin if init else tokenizer
    folder = tokens_folder(source, name, vocab_size)
    command = [sys.executable, os.path.join(HERE, "data.py"), f"--source={source}", f"--out={folder}",
               f"--tokenizer={name}", f"--vocab_size={vocab_size}"]

    def run_data():
        status = subprocess.run(command, start_new_session=True).returncode  # so that Ctrl-C is told once, by train.py
        if status:
            sys.exit(status)  # data.py has said why

    in_first_process(run_data)
    found = os.path.exists(os.path.join(folder, "meta.json"))  # not on another machine, if its disk is its own
    in_all_processes(lambda: found or run_data())
    return folder


folder = prepared(data)
data_meta, tokens = in_all_processes(open_tokens, folder, (rank, n_ranks))
enc = Tokenizer.from_dict(data_meta["tokenizer"])
if origin and meta["tokenizer"] != data_meta["tokenizer"]:
    raise UserError(f"{folder} has another tokenizer than {origin}: give the data that it was trained on, or other "
                    f"tokens of python data.py --tokenizer={shlex.quote(origin)}")
if model:
    block_size = model.config.block_size
check_same({f"data, its {split} tokens,": [len(part), *part[:1000].tolist(), *part[-1000:].tolist()]
            for split, part in tokens.items()})
if len(tokens["train"]) <= block_size:
    raise UserError(f"{data} has {len(tokens['train'])} training tokens, fewer than block_size={block_size} and one: "
                    "give more text or a smaller block_size")
if len(tokens["val"]) < 2:
    raise UserError(f"{data} has {len(tokens['val'])} validation tokens: give more text")
# Windows are read, not taken from the map of the file: at each of its pages, a map reads ahead up to several megabytes,
# which take time and count as memory of the process.
token_files = {split: open(part.filename, "rb") for split, part in tokens.items()}


def windows(split: str, n: int, T: int, key: list[int], own=slice(None)) -> tuple[mx.array, mx.array]:
    """n random windows of a split: tokens (n, T), and the token after each of them (n, T). The key alone determines the
    windows. So the order of the data needs no saved state, and every process can draw the batch of all processes; it
    reads only its own windows of them."""
    starts = np.random.default_rng(key).integers(len(tokens[split]) - T, size=n)[own]
    size, dtype, file = tokens[split].itemsize, tokens[split].dtype, token_files[split].fileno()
    rows = [np.frombuffer(os.pread(file, (T + 1) * size, int(i) * size), dtype) for i in starts]
    rows = np.stack(rows).astype(np.int32)
    return mx.array(rows[:, :-1]), mx.array(rows[:, 1:])


# ---- model, optimizer ------------------------------------------------------------------------------------------------

if not model:
    names = {field.name for field in fields(GPTConfig)} & settings.keys() - OTHERS
    architecture = {name: settings[name] for name in names}
    architecture["vocab_size"] = -(-enc.n_vocab // 64) * 64  # a round number suits the matrix units
    model = GPT(GPTConfig(**architecture), seed=seed)
model.checkpoint_every, model.compute_dtype = checkpoint_every, working_dtype
model.dropout = dropout  # dropout
if precision or precision_off:
    if not low:
        raise UserError(f"precision={precision!r} needs precision.py, which is missing: leave it out")
    low.convert(model, precision, low.parse(precision, precision_off))
config = model.config
n_parameters = sum(p.size for _, p in tree_flatten(model.parameters()))
n_active = n_parameters  # weights that compute with a token
n_active -= sum(p.size for _, p in tree_flatten(model.parameters()) if p.ndim == 3) * (  # moe
    1 - config.expert_top_k / max(1, config.n_expert))  # moe
n_matmul = n_active - (config.block_size * config.n_embd if config.pos == "learned" else 0)  # weights that multiply
n_matmul -= 0 if config.tie else config.vocab_size * config.n_embd
n_matmul -= sum(p.size for path, p in tree_flatten(model.parameters()) if "value_embed" in path)  # valembed
flops_per_token = 6 * n_matmul + 12 * config.n_layer * config.n_head * config.head_dim * config.block_size
if config.mod == "topk":  # mod
    routed = config.n_layer // config.mod_every / config.n_layer  # of the blocks  # mod
    in_blocks = flops_per_token - 6 * config.vocab_size * config.n_embd  # mod
    flops_per_token -= in_blocks * routed * (1 - config.mod_capacity)  # mod

# No optimizer here has a weight decay of its own: update() decays the matrices, which makes AdamW of Adam.
if optimizer not in ("adamw", "muon", "lion"):
    raise UserError(f"optimizer={optimizer!r} is not one of adamw, muon, lion")
if optimizer_bits not in (32, 8, 4) or optimizer_bits < 32 and not packed_states:
    raise UserError(f"optimizer_bits={optimizer_bits}: it must be 32, or with packed_states.py at hand 8 or 4")
if parallel and not shared:
    raise UserError(f"parallel={parallel!r} needs parallel.py, which is missing: leave it out")
if parallel and (optimizer_bits < 32 or precision):
    raise UserError(f"parallel={parallel} shares out float32: leave out --precision and --optimizer_bits")
if optimizer == "lion":  # Chen et al. 2023
    make = optim.Lion if optimizer_bits == 32 else partial(packed_states.PackedLion, bits=optimizer_bits)
    opt = rest = make(learning_rate, betas=[beta1, beta2], weight_decay=0.0)
else:                    # Kingma & Ba 2015
    make = Adam if optimizer_bits == 32 else partial(packed_states.PackedAdam, bits=optimizer_bits)
    opt = rest = make(learning_rate, betas=[beta1, beta2], bias_correction=True)
if optimizer == "muon":  # for the matrices of the blocks, and Adam for the rest
    make = Muon if optimizer_bits == 32 else partial(packed_states.PackedMuon, bits=optimizer_bits)
    muon = make(muon_lr, dtype=working_dtype, group=world)
    opt = optim.MultiOptimizer([muon, rest], [by_muon])
opt.init(model.trainable_parameters())
if resume:
    path = os.path.join(out_dir, f"ckpt.optimizer-{start_step}.safetensors")
    arrays, wanted = {}, {name: array.shape for name, array in tree_flatten(opt.state)}
    with contextlib.suppress(UserError):
        arrays, _ = load_arrays(path)
    if {name: array.shape for name, array in arrays.items()} != wanted:
        raise UserError(f"{path} is missing or spoilt: begin a new run from the weights, with --init="
                        f"{shlex.quote(ckpt_path)} --out_dir={shlex.quote(run_folder.free_name(out_dir))}")
    opt.state = tree_unflatten(list(arrays.items()))
part, parts = rank, n_ranks  # of the rows of a batch: this process's, and their number
if shared and (parallel or n_ranks > 1):
    shares = shared.share(parallel, model, opt, world, slices, working_dtype)
    part, parts = shares.others.rank(), shares.others.size()
elif slices:
    raise UserError(f"slices={slices} needs --parallel=tensor: leave it out")
if batch_size % parts:
    raise UserError(f"batch_size={batch_size} is not divisible by the {parts} processes that share it out: change it")


def schedule_at(step: int, settings: dict = settings) -> float:
    """Learning rate of an update, as a share of the peak."""
    warmup, end, least = settings["warmup_iters"], settings["decay_iters"] or settings["max_iters"], settings["min_lr"]
    if step < warmup:
        return (step + 1) / warmup
    if step >= end:
        return least
    if settings["schedule"] == "wsd":
        return max(least, min(1.0, (end - step) / (0.2 * end)))
    return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, end - warmup)))


peaks = ["learning_rate", "muon_lr"] if optimizer == "muon" else ["learning_rate"]
old = {**settings, **meta.get("settings", {})}  # those of the run so far, if it goes on
old["decay_iters"] = old["decay_iters"] or old["max_iters"]
ways = [(name, *(of[name] * schedule_at(start_step, of) for of in (old, settings))) for name in peaks]
jumps = [f"{name} from {a:.1e} to {b:.1e}" for name, a, b in ways if not math.isclose(a, b, rel_tol=0.01)]
keep = " ".join(f"--{name}={old[name]}" for name in (*peaks, "schedule", "warmup_iters", "decay_iters", "min_lr")
                if old[name] != settings[name])
if jumps:
    say(f"step {start_step}: the rate jumps, {', '.join(jumps)}; {keep} would keep it")

# ---- the step --------------------------------------------------------------------------------------------------------

state = [model.state, opt.state]
draws = bool(precision)  # whether a step draws random numbers
draws = draws or dropout > 0  # dropout
if draws:
    state.append(mx.random.state)
compiled = partial(mx.compile, inputs=state, outputs=state) if compile else lambda f: f


@compiled
def gradients(x, y):
    """Loss and float32 gradients of one micro-step: model.py's layers cast the parameters as they multiply."""
    return nn.value_and_grad(model, model.loss)(x, y)


@compiled
def update(grads):
    """Clip, decay, and apply. Returns the gradient's norm before clipping."""
    most, changed, length = grad_clip or math.inf, model, None
    if parallel:  # the process updates parts of the arrays
        changed, grads = shared.updated_parts(shares, grads)
        length = shared.norm(shares, grads)
    done = gpu_train.adamw(changed, opt, grads, most, weight_decay, length) if gpu_train else None
    if done is None:
        if parallel:
            grads, done = tree_map(lambda g: g * mx.minimum(most / (length + 1e-6), 1), grads), length
        else:
            grads, done = (clip_grad_norm if ON_CPU else (gpu_train or optim).clip_grad_norm)(grads, most)

        def decay(path: str, p: mx.array) -> mx.array:
            rate = muon.learning_rate if optimizer == "muon" and by_muon(path, p) else rest.learning_rate
            return p * (1 - weight_decay * rate) if p.ndim > 1 else p

        changed.update(tree_map_with_path(decay, changed.trainable_parameters()))
        opt.update(changed, grads)
    if parallel:
        shared.join_updated(shares, changed)
    return done


validation_loss = compiled(lambda x, y: model.loss(x, y))
if parallel == "pipeline":  # it computes stage by stage
    def validation_loss(x, y):
        return shared.run_stage(shares, x, y, 1, False)[0]


def evaluate() -> tuple[float, float]:
    """Nats per token and bits per byte, on the same windows of the validation split each time."""
    T = min(block_size, len(tokens["val"]) - 1)
    x, y = windows("val", eval_windows, T, [0])
    total, own = mx.array(0.0), batch_size // parts
    model.eval()
    for start in range(0, eval_windows, batch_size):
        rows = slice(start + part * own, start + (part + 1) * own)
        n = len(x[rows])  # may be 0 at the end, but all processes call the loss equally often
        total = total + validation_loss(x[rows] if n else x[:1], y[rows] if n else y[:1]) * n
        mx.eval(total)
    model.train()
    nats = mx.distributed.all_sum(total).item() / eval_windows / (n_ranks // parts)
    n_bytes = int(enc.token_bytes[np.array(y)].sum())
    return nats, nats * eval_windows * T / max(n_bytes, 1) / math.log(2)


# ---- what is kept ----------------------------------------------------------------------------------------------------

COLUMNS = ["step", "tokens", "seconds", "train_loss", "val_loss", "val_bpb", "learning_rate", "muon_lr", "grad_norm",
           "tok_per_s", "peak_gib"]
losses = {**dict.fromkeys(["train", "val", "bits_per_byte", "initial_val", "best_val"]), **meta.get("losses", {})}
if run_folder.header_of(best_path).get("losses", {}).get("val") != losses["best_val"]:  # it is lost, or newer
    losses["best_val"] = None
tokens_per_step = batch_size * grad_accum * block_size
tokens_before = meta.get("tokens", start_step * old["batch_size"] * old["grad_accum"] * old["block_size"])
saved = resume  # whether this run has a checkpoint
in_first_process(run_folder.start, out_dir, SCRIPT, settings, source, start_step,
                 meta.get("started", "") if resume else "")
if rank == 0:
    rows, add_row = run_folder.open_rows(out_dir, COLUMNS, settings, start_step)
commit, started = run_folder.git_commit(), run_folder.started(out_dir)
drawn, stopping = time.perf_counter(), False


def record(step: int, **figures):
    if rank == 0:
        add_row(step=step, tokens=tokens_before + (step - start_step) * tokens_per_step, **figures)


def save(step: int, is_best: bool = False):
    """Write the optimizer's state to a file named after the step, then best.safetensors if this step is the best one,
    then the checkpoint, and delete the optimizer's older files last. So at every moment, also if the process is killed,
    the checkpoint on disk is whole and the optimizer's state of its step is there. Curves are drawn every ten seconds
    and at the end."""
    global saved, drawn
    states, whole = dict(tree_flatten(opt.state)), model
    if parallel:
        states, whole = shared.whole_state(shares, opt.state), shared.whole_model(shares)
        mx.eval(states, whole.parameters())
    if rank == 0:
        header = {"script": SCRIPT, "settings": settings, "commit": commit, "started": started, "step": step,
                  "tokens": tokens_before + (step - start_step) * tokens_per_step, "losses": losses,
                  "tokenizer": data_meta["tokenizer"]}
        own = f"ckpt.optimizer-{step}.safetensors"
        save_arrays(os.path.join(out_dir, own), states, {"version": VERSION, "step": step})
        if is_best:
            save_checkpoint(best_path, whole, header)
        elif not saved and os.path.exists(best_path):  # of another run
            os.remove(best_path)
        save_checkpoint(ckpt_path, whole, header)
        for name in os.listdir(out_dir):
            if re.fullmatch(r"ckpt\.optimizer-\d+\.safetensors", name) and name != own:
                os.remove(os.path.join(out_dir, name))
        if step == max_iters or stopping or time.perf_counter() - drawn > 10:
            drawn = time.perf_counter()
            draw.curves(os.path.join(out_dir, "loss.png"), rows, {"nats a token": {
                "train_loss": "training", "val_loss": "validation"}}, f"{data}, {n_parameters / 1e6:.1f}M parameters",
                {f"guessing, ln {enc.n_vocab}": math.log(enc.n_vocab)})
            if load_rows:  # moe
                draw_load()  # moe
    saved = True
    mx.eval(mx.distributed.all_sum(mx.array(1.0)))  # wait for all: mlx.launch kills the others when one has ended


# ---- variant moe: the tokens that each expert took, divided by the mean of its layer: experts.csv, experts.png -------

load_columns, load_rows, loads = ["step", "layer", *(f"expert{e}" for e in range(config.n_expert))], [], []
if config.n_expert and rank == 0:
    if resume:
        load_rows = run_folder.read_rows(out_dir, start_step, load_columns, "experts.csv")
        layers = Counter(row["step"] for row in load_rows if len(row) == len(load_columns) and all(row.values()))
        load_rows = [row for row in load_rows if layers[row["step"]] == config.n_layer]
    run_folder.write_rows(out_dir, load_columns, load_rows, "experts.csv")


def record_load(step: int) -> str:
    """Add the mean load of each expert since the last log line to experts.csv; return the largest one for the log."""
    load = np.mean(loads, axis=0)  # loads: of each step since then
    loads.clear()
    for layer, of_layer in enumerate(load if rank == 0 else []):
        load_rows.append(dict(zip(load_columns, [step, layer, *np.round(of_layer, 4)], strict=True)))
        run_folder.add_row(out_dir, load_columns, load_rows[-1], "experts.csv")
    return f" | load {load.max():4.2f}"


def draw_load():
    load = np.array([[float(row[name]) for name in load_columns] for row in load_rows])
    load = load.reshape(-1, config.n_layer, len(load_columns))
    draw.expert_load(os.path.join(out_dir, "experts.png"), load[:, 0, 0], load[..., 2:],
                     f"{config.n_expert} experts, {config.expert_top_k} a token: load of each over the mean")


# ---- end of moe ------------------------------------------------------------------------------------------------------

# ---- loop ------------------------------------------------------------------------------------------------------------

stops = run_folder.catch_stops()
info = mx.device_info()
peak_flops = next((peak for name, peak in PEAK_FLOPS.items() if name in str(info.get("device_name"))), 0)
peak_flops = peak_flops if working_dtype == mx.bfloat16 else 0
active = f" ({n_active / 1e6:.2f}M active)" if n_active < n_parameters else ""
say(f"{n_parameters / 1e6:.2f}M parameters{active}, {len(tokens['train']) / 1e6:.2f}M training tokens, "
    f"{tokens_per_step:,} tokens an update\n"
    f"{info.get('device_name')}, {str(working_dtype).split('.')[-1]}{', ' + blas.loaded if blas.loaded else ''}"
    f"{f', {n_ranks} processes' if n_ranks > 1 else ''}")
if init and not resume and block_size != before["block_size"]:
    say(f"the context is {block_size:,} tokens; that of {init} is {before['block_size']:,}, see --block_size")

model.train()
step, pending = start_step, None
lap_time, lap_steps, speed = 0.0, 0, 0.0  # speed: tokens a second, up to the last log line
bar = tqdm(total=max_iters, initial=start_step, unit="step", disable=rank > 0 or None, dynamic_ncols=True)


def diverged(what: str):
    kept = ckpt_path if saved else "not there yet"
    raise UserError(f"{what}; the last good checkpoint is {kept}: try a smaller learning_rate or more warmup_iters")


def finish(pending) -> bool:
    """Read the figures of a step and log them. This is done while the device works on the next step, so that it need
    not wait. Returns whether a process had been asked to stop."""
    global lap_time, lap_steps, speed
    number, figures, rates = pending
    figures = {name: figure.tolist() for name, figure in figures.items()}
    loss, norm = figures["loss"], figures["norm"]
    if not (math.isfinite(loss) and math.isfinite(norm)):
        diverged(f"step {number}: the loss is {loss}, the gradient's norm {norm}")
    losses["train"] = loss
    if config.n_expert:  # moe
        loads.append(figures["load"])  # moe
    if number % log_interval == 0 or number == max_iters:
        speed, lap_time, lap_steps = tokens_per_step * lap_steps / lap_time if lap_time else 0.0, 0.0, 0
        lr, more = " ".join(f"{rate:.1e}" for rate in rates.values()), ""
        if config.n_expert:  # moe
            lr = " ".join(f"{rate:.0e}".replace("e-0", "e-") for rate in rates.values())  # moe
            more = record_load(number)  # moe
        say(f"step {number:6d} | loss {loss:6.4f} | lr {lr} | norm {norm:4.2f} | {speed:7,.0f} tok/s{more}")
        record(number, train_loss=loss, **rates, grad_norm=norm, tok_per_s=round(speed),
               peak_gib=round(mx.get_peak_memory() / 2**30, 3))
    return figures["stops"] > 0


def evaluate_and_save(step: int):
    nats, bpb = evaluate()
    if not math.isfinite(nats) and init and step == 0:
        raise UserError(f"{init} has a validation loss of {nats}: its weights are damaged; take another checkpoint")
    if not math.isfinite(nats):
        diverged(f"step {step}: the validation loss is {nats}")
    is_best = step > 0 and (losses["best_val"] is None or nats < losses["best_val"])
    losses.update(val=nats, bits_per_byte=bpb, initial_val=losses["initial_val"] if step else nats,
                  best_val=nats if is_best else losses["best_val"])
    lowest = is_best and (losses["initial_val"] is None or nats < losses["initial_val"])
    mfu = f" | mfu {flops_per_token * speed / peak_flops / n_ranks:.1%}" if peak_flops and speed else ""
    say(f"step {step:6d} | val  {nats:6.4f} | ppl {math.exp(min(nats, 99)):6.1f} | bpb {bpb:.4f}"
        f" | {mx.get_peak_memory() / 2**30:4.2f} GiB{mfu}{' | best' if lowest else ''}")
    record(step, val_loss=nats, val_bpb=bpb)
    if step > start_step:
        save(step, is_best)


# Each pass of the loop first evaluates and saves, if it is time. Then it queues one update on the device: learning
# rates, data, micro-steps, update. While the device works on it, finish() reads the figures of the update before.
while True:
    if step == max_iters or stopping or (step % eval_interval == 0 and (step > start_step or not resume)):
        if pending:
            stopping = finish(pending) or stopping
            pending = None
        if stopping and step < max_iters:
            save(step)
            break
        evaluate_and_save(step)
        if step == max_iters:
            break
        if step == start_step and stops() and n_ranks == 1:
            raise KeyboardInterrupt  # there is nothing to save yet

    lap_began = time.perf_counter()
    rates = {name: settings[name] * schedule_at(step) for name in peaks}
    rest.learning_rate = rates["learning_rate"]
    if optimizer == "muon":
        muon.learning_rate = rates["muon_lr"]
    if draws:  # a resumed run draws the numbers that an uninterrupted one would have drawn
        mx.random.seed(((seed * 2**32 + step) * n_ranks + rank) % 2**64)
    loss, grads, own = 0.0, None, batch_size // parts
    mine = np.arange(grad_accum * batch_size).reshape(grad_accum, parts, own)[:, part].reshape(-1)
    x, y = windows("train", grad_accum * batch_size, block_size, [seed, step], mine)
    if parallel == "pipeline":
        loss, grads = shared.run_stage(shares, x, y, grad_accum, True)
    for micro in range(grad_accum if parallel != "pipeline" else 0):
        share = slice(micro * own, (micro + 1) * own)
        now, new = gradients(x[share], y[share])
        loss, grads = loss + now / grad_accum, new if grads is None else tree_map(mx.add, grads, new)
        if micro + 1 < grad_accum:
            mx.async_eval(loss, grads)  # so that the activations of one micro-step at a time are in memory
    if grad_accum > 1 and parallel != "pipeline":
        grads = tree_map(lambda g: g / grad_accum, grads)
    figures = {"loss": loss, "stops": mx.array(float(stops()))}  # what finish() reads and logs
    if shared and (parallel or n_ranks > 1):
        grads = shared.average(shares, grads)
        if parallel:
            mx.async_eval(grads)  # so that all processes come to their sums in one order, though they have other parts
    elif n_ranks > 1:
        grads = nn.average_gradients(tree_map(lambda g: g.astype(working_dtype), grads))
        grads = tree_map(lambda g, p: g.astype(p.dtype), grads, model.trainable_parameters())
    if n_ranks > 1:  # means over the processes
        means = mx.distributed.all_sum(mx.stack([*figures.values()])) / n_ranks
        figures = dict(zip(figures, means, strict=True))
    figures["norm"] = update(grads)
    if config.n_expert:  # moe
        figures["load"] = rebalance(model)  # moe
    mx.async_eval(figures, state)
    step += 1
    if pending:
        stopping = finish(pending)
    pending = (step, figures, rates)
    lap_time, lap_steps = lap_time + time.perf_counter() - lap_began, lap_steps + 1
    bar.update(1)
bar.close()
if watching:
    watching.set()
if parallel:
    model = shared.whole_model(shares)
    mx.eval(model.parameters())

# ---- look at it ------------------------------------------------------------------------------------------------------

signal.signal(signal.SIGINT, signal.default_int_handler)
if step < max_iters:
    command = f"python {shlex.quote(sys.argv[0])} --out_dir={shlex.quote(out_dir)} --resume=True"
    say(f"stopped at step {step}, saved {ckpt_path}\ngo on with: {command}")
    sys.exit(130)
if rank == 0:
    model.eval()
    model.set_dtype(working_dtype)
    sys.stdout.reconfigure(errors="replace")  # a character that the terminal cannot show becomes "?"
    window = windows("val", 1, min(block_size, len(tokens["val"]) - 1), [0])[0].tolist()[0]  # of the evaluation
    prompt = window[:max(1, min(64, block_size // 2))]
    ids = list(generate(model, prompt, sample_tokens, temperature=0.8, top_k=50, seed=seed, n_vocab=enc.n_vocab))
    say("\na piece of the validation text, and after the bar the model's continuation:\n\n"
        f"{enc.decode(prompt)}▌{enc.decode(ids[:ids.index(enc.eot)] if enc.eot in ids else ids)}\n")
    text = enc.decode(window)
    lines = [line.strip() for line in text.splitlines()[1:-1]]  # the first and the last one may be cut
    lines.append(max(text.splitlines(), key=len, default="").partition(" ")[2].strip())  # for a text of long lines
    text = next((line for line in lines if len(line) > 3 and line.isprintable()), "")[:24].rstrip()
    best = run_folder.header_of(best_path)
    if best.get("step") != step:
        say(f"{ckpt_path}: last step {step}, validation loss {losses['val']:.4f}")
    if best:
        say(f"{best_path}: best step {best['step']}, validation loss {best['losses']['val']:.4f}, "
            f"{best['losses']['bits_per_byte']:.4f} bits a byte")
    if (losses["initial_val"] or math.inf) <= losses["best_val"]:
        say(f"NO STEP WAS BETTER than the model before training, validation loss {losses['initial_val']:.4f}: "
            "try smaller learning rates")
    script = os.path.relpath(os.path.join(HERE, "sample.py"))
    command = f"python {shlex.quote(script)} {shlex.quote(best_path if best else ckpt_path)}"
    if text:
        command += f" --prompt={shlex.quote(text)}"
    say(f"curves: {out_dir}/loss.png\nnext: {command}")
