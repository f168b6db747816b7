"""Distil: a small model, the student, learns what a large one, the teacher, holds probable for every token.

    python distill.py out/best.safetensors --data=book.txt                       # a new student, half as wide
    python distill.py out/best.safetensors --data=book.txt --student=small.safetensors --loss=reverse
    python distill.py out/best.safetensors --data=book.txt --loss=jsd --on_policy=0.5
    python distill.py out/best.safetensors --data=book.txt --store=book.logits --top_k=32
    python distill.py --logits=book.logits --data=book.txt   # learns from that file: no teacher is in memory
    python distill.py --resume=True         # goes on after Ctrl-C, after a power cut, or with more --max_iters

A student reads a text, and at each token its distribution q is drawn to the teacher's p: forward, KL(p || q); reverse,
KL(q || p); or jsd, the generalised divergence between them (GKD, Agarwal et al. 2023, 2306.13649). --on_policy is the
share of the steps with texts that the student has written itself. --plain mixes in the loss of train.py, the
cross-entropy of the text's own next token.

Both models have one tokenizer. Without --student a new one is made: the teacher's architecture with n_layer blocks and
width n_embd. The data is a text, or a folder of data.py, cut into rows of block_size tokens. A teacher may be packed.

--store writes a file with the top_k log-probabilities of the teacher at each token of the data, and that of all other
tokens together, and ends. What --logits learns from it is the divergence of the distributions over these top_k + 1
outcomes: never more than that over all tokens, and the same where top_k is the vocabulary.

    OUT_DIR/distill.safetensors  the student with the lowest validation loss, a checkpoint
    OUT_DIR/resume.safetensors   the last step, and the state of the optimizer
    OUT_DIR/loss.csv, loss.png   the curves
    OUT_DIR/run.json, source/    the settings of the run and its code

Ctrl-C saves the last step and stops. --resume=True continues from there bit for bit, with the settings of that run,
except those on the command line.

A log line shows: loss, what is minimised; div, the divergence in nats a token; nats, the cross-entropy (both without
the factors of the mix; nats is empty in a step of own texts); lr, norm and tok/s as in train.py. After every
eval_interval updates a line shows val, the cross-entropy held out, and kept, the mean over tokens held out of
sum_v min(p, q): the share of the student's drafts that the teacher would keep in speculative writing at temperature 1
(not with --logits).
"""
import functools
import hashlib
import json
import math
import os
import shlex
import sys
import time
from dataclasses import asdict
from functools import partial

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten
from tqdm import tqdm

import draw
import run_folder
from config import UserError, check_output, check_replaced, given, overrides
from lora import base_fingerprint, load_adapted, save_merged
from lora import merge as merge_adapters
from model import (
    GPT,
    LOSS_CHUNK,
    ON_CPU,
    VERSION,
    GPTConfig,
    compute_dtype,
    cross_entropy,
    generate,
    gpu_train,
    known_settings,
    load_arrays,
    rebalance,  # moe
    save_arrays,
)
from muon import Muon, by_muon
from score import read_splits
from tokenizer import Tokenizer

# models
teacher = "out/best.safetensors"  # a checkpoint or an adapter; not read with --logits
student = ""            # a checkpoint or an adapter with the teacher's tokenizer; "": a new one
n_layer = 0             # of a new student: blocks; 0: the teacher's
n_embd = 0              # of a new student: width; heads and MLP are as much narrower. 0: half of the teacher's
# data
data = ""               # a text, whose last tenth is held out, or a folder of data.py
block_size = 0          # tokens in a row; 0: the shorter context of both models, but 1024 at most
out_dir = "out-distill"  # the folder of this run
resume = False          # continue from OUT_DIR/resume.safetensors
seed = 1337             # of a new student, the order of the rows and the student's own texts
# loss
loss = "forward"        # forward | reverse | jsd
beta = 0.5              # of jsd: the teacher's share in the mixture; near 0 it acts as forward, near 1 as reverse
temperature = 1.0       # by which the logits of both are divided in the divergence
plain = 0.0             # weight of the cross-entropy; the divergence has 1 - plain, times temperature^2. 1: no teacher
on_policy = 0.0         # share of the steps with texts that the student writes at temperature 1
prompt_tokens = 0       # tokens of the data before an own text; 0: an eighth of block_size
# stored
store = ""              # the file to write the teacher's logits to
top_k = 32              # of store: log-probabilities that are kept of each token, beside that of the others
logits = ""             # a file of --store, for the same data; it has its own block_size and temperature
# optimization
max_iters = 500         # updates
batch_size = 8          # rows in an update
optimizer = "muon"      # muon | adamw
learning_rate = 1e-2    # peak; under muon that of embeddings and norms. A trained student needs a tenth
muon_lr = 0.05          # peak, of the matrices under muon
warmup_share = 0.05     # of all updates, linear
min_lr = 0.1            # learning rate at the end of the cosine, as a share of the peak
weight_decay = 0.1      # of matrices, times the learning rate
grad_clip = 1.0         # largest norm of the gradient; 0: no clipping
# run
eval_interval = 100     # updates between evaluations
eval_windows = 64       # rows held out that are read, at most
log_interval = 25       # updates between log lines
dtype = "auto"          # float32 | bfloat16; auto: bfloat16 on a GPU, float32 on a CPU
compile = not ON_CPU    # mx.compile the step
overwrite = False       # replace the results of another run in OUT_DIR without asking
log = ""                # send the rows of loss.csv also to tensorboard | wandb

settings = overrides(globals(), "teacher", "data")

# ---- losses ----------------------------------------------------------------------------------------------------------

LOSSES, NEVER = ("forward", "reverse", "jsd"), -30.0  # NEVER: log-probability of what the teacher never says


def divergence(log_p, log_q, beta: float) -> mx.array:
    """Of distributions (N, V), teacher p and student q, each (N,), in nats. With m = beta p + (1 - beta) q it is
    beta KL(p || m) + (1 - beta) KL(q || m); by convention KL(p || q) for beta = 0, and KL(q || p) for beta = 1."""
    p, q = mx.exp(log_p), mx.exp(log_q)
    if beta in (0, 1):
        return (q * (log_q - log_p) if beta else p * (log_p - log_q)).sum(-1)
    log_m = mx.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
    return (beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)).sum(-1)


def outcomes(z, ids=None, n_vocab: int = 0) -> mx.array:
    """Log-probabilities of logits z (N, V): of the tokens ids (N, k) and, last, of all others together, (N, k + 1).
    Without ids of all n_vocab tokens, and last of the padding of the vocabulary if there is any."""
    whole = mx.logsumexp(z, axis=-1, keepdims=True)
    if ids is None:
        own, rest = z[:, :n_vocab], z[:, n_vocab:]
        if not rest.shape[1]:
            return own - whole
    else:
        own, rest = mx.take_along_axis(z, ids, axis=-1), mx.put_along_axis(z, ids, mx.array(-1e4, z.dtype), axis=-1)
    return mx.concatenate([own, mx.logsumexp(rest, axis=-1, keepdims=True)], axis=-1) - whole


# ---- resume: the settings of the run apply, except those on the command line -----------------------------------------

SCRIPT, source = os.path.basename(__file__), run_folder.read_source(__file__)
result, state_path = os.path.join(out_dir, "distill.safetensors"), os.path.join(out_dir, "resume.safetensors")
LASTING = ("teacher", "student", "n_layer", "n_embd", "data", "block_size", "seed", "loss", "beta", "temperature",
           "plain", "on_policy", "prompt_tokens", "logits", "batch_size", "optimizer", "eval_windows")
start_step, trained, before = 0, {}, {}  # trained, before: the arrays and the header of the last step
if resume:
    run_folder.check_maker(state_path, SCRIPT, out_dir)
    trained, before = load_arrays(state_path)
    parts = ("settings", "step", "losses", "rows")
    settings.update(run_folder.old_settings(state_path, before, settings, LASTING, parts))
    globals().update(settings)
    start_step = before["step"]

if not data:
    raise UserError("no data: give --data=FILE, a text or a folder of data.py")
if loss not in LOSSES:
    raise UserError(f"loss={loss!r} is not one of {', '.join(LOSSES)}")
if optimizer not in ("adamw", "muon"):
    raise UserError(f"optimizer={optimizer!r} is not one of adamw, muon")
for name, where, used in (
        *((name, "with --logits", not logits) for name in ("teacher", "temperature", "block_size", "on_policy")),
        *((name, "with --student", not student) for name in ("n_layer", "n_embd")),
        *((name, "with --store", not store) for name in ("student", "logits", "loss", "plain", "on_policy", "resume")),
        *((name, "with --plain=1", plain < 1) for name in ("loss", "temperature", "on_policy", "logits")),
        ("beta", "without --loss=jsd", loss == "jsd"), ("top_k", "without --store", store),
        ("prompt_tokens", "without --on_policy", on_policy > 0), ("muon_lr", "without muon", optimizer == "muon")):
    if name in given and not used:
        raise UserError(f"{name} has no effect {where}: leave it out")
if not 0 < beta < 1:
    raise UserError(f"beta={beta}: it must be between 0 and 1; at its ends are --loss=forward and --loss=reverse")
if not temperature > 0:
    raise UserError(f"temperature={temperature}: it must be over 0")
if not 0 <= plain <= 1 or not 0 <= on_policy <= 1:
    raise UserError("plain and on_policy must be from 0 to 1")
if top_k < 1 or min(prompt_tokens, n_layer, n_embd) < 0:
    raise UserError("top_k must be 1 or more, and prompt_tokens, n_layer and n_embd 0 or more")
run_folder.check_settings(settings, resume)
if not store:
    run_folder.check(out_dir, SCRIPT, overwrite, resume, [teacher, student, data, logits], "resume.safetensors")

KEPT = {"top_k": int, "temperature": float, "block_size": int, "rows": str, "teacher_config": dict, "tokenizer": dict,
        "fingerprint": str}  # in the header of a file of --store

# ---- models ----------------------------------------------------------------------------------------------------------

working_dtype, share, large = compute_dtype(dtype), {"forward": 0, "reverse": 1, "jsd": beta}[loss], None
if logits:
    meta = {**run_folder.read_header(logits), "files": [logits]}
    if any(type(meta.get(name)) is not kind for name, kind in KEPT.items()):
        raise UserError(f"{logits} is no whole file of --store: write one with python distill.py TEACHER --data={data} "
                        "--store=FILE")
    k, temperature, block_size, teacher = meta["top_k"], meta["temperature"], meta["block_size"], logits
    teacher_config = GPTConfig(**known_settings(meta["teacher_config"], logits))
else:
    large, meta = load_adapted(teacher)
    teacher_config, meta["fingerprint"] = large.config, meta.get("fingerprint") or base_fingerprint(large)
    large.set_dtype(working_dtype)
if not meta.get("tokenizer"):
    raise UserError(f"{teacher} holds no tokenizer: give a checkpoint of train.py, or one that a reader imported")
if student:
    small, own_meta = load_adapted(student)
    if own_meta.get("tokenizer") != meta["tokenizer"]:
        raise UserError(f"{student} has another tokenizer than {teacher}: train both with one")
    own_meta["fingerprint"] = own_meta.get("fingerprint") or base_fingerprint(small)
    merge_adapters(small)
    if any("scales" in name for name, _ in tree_flatten(small.parameters())):
        raise UserError(f"{student} has packed weights, which do not train: give the file that it was made from")
else:
    width = n_embd or teacher_config.n_embd // 2
    of_teacher = asdict(teacher_config)
    kv, ffn = (max(1, round(of_teacher[name] * width / of_teacher["n_embd"])) for name in ("n_kv_head", "ffn_dim"))
    small = GPT(GPTConfig(**{**of_teacher, "n_embd": width, "n_layer": n_layer or of_teacher["n_layer"], "ffn_dim": ffn,
                             "n_kv_head": kv, "n_head": kv * (of_teacher["n_head"] // of_teacher["n_kv_head"])}),
                seed=seed)
    own_meta = {"tokenizer": meta["tokenizer"], "files": []}
origin = [meta["fingerprint"], own_meta.get("fingerprint", "")]
if resume and before["base"] != origin:
    raise UserError(f"{student if before['base'][0] == origin[0] else teacher} has changed since {state_path} was "
                    "written: put the old file back, or begin anew in another --out_dir")
for path in (result, state_path):
    check_output(path, *meta["files"], *own_meta["files"])  # the base of an adapter is an input, too
small.unfreeze()
small.set_dtype(mx.float32)
small.compute_dtype = working_dtype
enc = Tokenizer.from_dict(meta["tokenizer"])
V, rows_in_memory = enc.n_vocab, max(1, LOSS_CHUNK // small.config.vocab_size)  # whose logits are at a time

# ---- data: rows of a text, with the token after each -----------------------------------------------------------------

context = min(teacher_config.block_size, small.config.block_size)
if not 0 <= block_size <= context:
    raise UserError(f"block_size={block_size}: it must be up to {context}, the shorter context of both models, or 0")
T = block_size or min(context, 1024)
begin = prompt_tokens or max(1, T // 8)
if begin >= T:
    raise UserError(f"prompt_tokens={begin}: it must be less than block_size={T}")


def cut(tokens: np.ndarray) -> np.ndarray:
    """Tokens as rows (N, T + 1); the last token of a row is the first of the next one."""
    n = (len(tokens) - 1) // T
    if n < 1:
        raise UserError(f"{data} has a part of {len(tokens)} tokens, fewer than block_size={T} and one: give more text "
                        "or a smaller block_size")
    return np.concatenate([tokens[:n * T].reshape(n, T), tokens[T:n * T + 1:T, None]], axis=1)


train_rows, val_rows = map(cut, read_splits(data, enc))
rows_hash, N = hashlib.sha256(train_rows.tobytes() + val_rows.tobytes()).hexdigest(), len(train_rows)
if logits and meta["rows"] != rows_hash or resume and before["rows"] != rows_hash:
    raise UserError(f"{data} is not the text that {logits or state_path} is of: give that, or begin anew")
val_rows = val_rows[np.random.default_rng(0).permutation(len(val_rows))[:eval_windows]]


def states(model: GPT, idx) -> mx.array:
    """What the vocabulary projection reads: (B, T) token ids -> (B T, C)."""
    return model.norm(model.residual(idx)).flatten(0, 1)


def logits_of(model: GPT, x: mx.array) -> mx.array:
    return model.project(x).astype(mx.float32)


def by_teacher(x: mx.array) -> mx.array:
    """Log-probabilities of all tokens by the teacher's states (N, C), in the outcomes of the student's logits."""
    log_p = outcomes(logits_of(large, x)[:, :V] / temperature, None, V)
    return mx.pad(log_p, [(0, 0), (0, 1)], constant_values=NEVER) if small.config.vocab_size > V else log_p


# ---- stored: a file of the teacher's logits --------------------------------------------------------------------------
#
# A safetensors file with one array (N, T, 2, k + 1) of unsigned integers: token ids, of which the last is none, and the
# bits of log-probabilities. Numbers have 2 bytes, or 4 where the vocabulary is larger than 65,536. So rows are written
# in order, and read one at a time.

kind, real, called = ("<u2", "<f2", "U16") if V <= 2**16 else ("<u4", "<f4", "U32")


def write_logits():
    """Write the file --store: for each row the top_k log-probabilities at each token, and that of all other tokens."""
    k, left = min(top_k, V), 0.0
    check_output(store, data, *meta["files"])
    check_replaced(store, SCRIPT)
    size = N * T * 2 * (k + 1) * np.dtype(kind).itemsize
    values = k, temperature, T, rows_hash, asdict(teacher_config), meta["tokenizer"], meta["fingerprint"]
    about = {"script": SCRIPT, "version": VERSION, **dict(zip(KEPT, values, strict=True))}
    header = json.dumps({"__metadata__": {"tinygpt": json.dumps(about)}, "logits": {
        "dtype": called, "shape": [N, T, 2, k + 1], "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)
    with draw.whole_file(store) as file, tqdm(total=N, unit="row", disable=None, dynamic_ncols=True) as bar:
        file.write(len(header).to_bytes(8, "little") + header)
        for start in range(0, N, batch_size):
            x = states(large, mx.array(train_rows[start:start + batch_size, :-1]))
            for i in range(0, len(x), rows_in_memory):
                z = logits_of(large, x[i:i + rows_in_memory])[:, :V] / temperature
                ids = mx.argpartition(-z, k - 1, axis=-1)[:, :k]
                log_p, pair = np.maximum(np.array(outcomes(z, ids)), NEVER), np.zeros((len(z), 2, k + 1), kind)
                pair[:, 0, :k], pair[:, 1] = np.array(ids), log_p.astype(real).view(kind)
                file.write(pair.tobytes())
                left += float(np.exp(log_p[:, k], dtype=np.float64).sum())
            bar.update(min(batch_size, N - start))
    print(f"{store}: {size / 1e6:.1f} MB, {k} of {V:,} tokens at each place; the others have {left / (N * T):.2%} of "
          f"the probability\nnext: python {shlex.quote(sys.argv[0])} --logits={shlex.quote(store)} "
          f"--data={shlex.quote(data)}")


if store:
    write_logits()
    sys.exit()
if logits:
    logits_file, row_size = open(logits, "rb"), T * 2 * (k + 1) * np.dtype(kind).itemsize
    first_row = 8 + int.from_bytes(logits_file.read(8), "little")
    if os.path.getsize(logits) != first_row + N * row_size:
        raise UserError(f"{logits} has another number of rows than {data}: write it again with --store")


def stored_rows(which) -> dict[str, mx.array]:
    """Of some rows: the ids (B T, k), and log-probabilities (B T, k + 1) whose sum is 1 again, after rounding."""
    parts = [os.pread(logits_file.fileno(), row_size, first_row + int(i) * row_size) for i in which]
    pair = np.frombuffer(b"".join(parts), kind).reshape(-1, 2, k + 1)
    log_p = mx.array(pair[:, 1].copy().view(real).astype(np.float32))
    return {"ids": mx.array(pair[:, 0, :k].astype(np.int32)),
            "log_p": log_p - mx.logsumexp(log_p, axis=-1, keepdims=True)}


# ---- the step --------------------------------------------------------------------------------------------------------

parameters = sum(p.size for _, p in tree_flatten(small.parameters()))
print(f"{data}: {N:,} rows of {T} tokens, {len(val_rows)} held out; the student has {parameters / 1e6:.2f}M parameters")
if start_step >= max_iters:
    raise UserError(f"{state_path} is at step {start_step} of {max_iters} already: give more --max_iters")
opt = rest = optim.Adam(learning_rate, betas=[0.9, 0.95], bias_correction=True)
if optimizer == "muon":
    muon = Muon(muon_lr, dtype=working_dtype)
    opt = optim.MultiOptimizer([muon, rest], [by_muon])
opt.init(small.trainable_parameters())
if resume:
    state = tree_unflatten(list(trained.items()))
    small.update(state["model"])
    opt.state = state["optimizer"]
state = [small.state, opt.state]
compiled = partial(mx.compile, inputs=state, outputs=state) if compile else lambda f: f
head = small.embed if small.config.tie else small.head


def in_chunks(function, *arrays) -> list[mx.array]:
    """The sums of what function(*arrays) gives for parts of the rows, whose logits are not in memory together: those of
    a part are computed again in the backward pass."""
    if len(arrays[0]) <= rows_in_memory:
        return function(*arrays)
    part = nn.utils.checkpoint(head, function)
    parts = [part(*(a[i:i + rows_in_memory] for a in arrays)) for i in range(0, len(arrays[0]), rows_in_memory)]
    return [sum(each) for each in zip(*parts, strict=True)]


def losses_of(x, targets, weights, *p) -> list[mx.array]:
    """Weighted sums of the divergence and of the cross-entropy, for the student's states x (N, C); p: the teacher's
    states, or ids and log-probabilities of --logits."""
    z, far = logits_of(small, x), mx.array(0.0)
    if plain < 1:
        log_q = outcomes(z / temperature, p[0] if logits else None, V)
        far = (divergence(p[1] if logits else by_teacher(p[0]), log_q, share) * weights).sum()
    return [far, (cross_entropy(z, targets) * weights).sum()]


@compiled
def gradients(batch):
    """What is logged of a step, and the gradients of its loss. batch: "idx" and "targets" (B, T), "weights" (B T,),
    "plain", the weight of the cross-entropy, and with --logits "ids" and "log_p"."""
    p = [] if plain == 1 else [batch[name] for name in ("ids", "log_p")] if logits else [states(large, batch["idx"])]

    def mixed(batch):
        far, nats = in_chunks(losses_of, states(small, batch["idx"]), batch["targets"].flatten(), batch["weights"], *p)
        total = (1 - plain) * temperature**2 * far  # so that its gradient keeps its size (Hinton et al. 2015)
        return total + batch["plain"] * nats if plain else total, (far, nats)

    (total, (far, nats)), grads = nn.value_and_grad(small, mixed)(batch)
    return {"loss": total, "div": far, "nats": nats}, grads


@compiled
def update(grads):
    """Clip, decay, and apply. Returns the gradient's norm before clipping."""
    if gpu_train and (length := gpu_train.adamw(small, opt, grads, grad_clip or math.inf, weight_decay)) is not None:
        return length
    grads, length = (gpu_train or optim).clip_grad_norm(grads, grad_clip or math.inf)

    def decay(path: str, p: mx.array) -> mx.array:
        rate = muon.learning_rate if optimizer == "muon" and by_muon(path, p) else rest.learning_rate
        return p * (1 - weight_decay * rate) if p.ndim > 1 else p

    small.update(tree_map_with_path(decay, small.trainable_parameters()))
    opt.update(small, grads)
    return length


@functools.lru_cache(2)
def order(epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(N)


def is_own(step: int) -> bool:
    """Whether a step learns from the student's own texts."""
    return np.random.default_rng([seed, step, 1]).random() < on_policy


def batch_at(step: int) -> dict[str, mx.array]:
    """The rows of a step: of the data, or as they begin there and the student goes on."""
    which = np.array([order(i // N)[i % N] for i in range(step * batch_size, (step + 1) * batch_size)])
    rows, learned, key = train_rows[which], np.ones((batch_size, T), np.float32), (seed * 2**32 + step) % 2**63
    if is_own(step):
        small.eval()
        made = [*generate(small, rows[:, :begin].tolist(), T + 1 - begin, seed=key, n_vocab=V)]
        rows = np.concatenate([rows[:, :begin], np.array(made, np.int32).T], axis=1)
        small.train()
        learned[:, :begin - 1] = 0
    batch = {"idx": rows[:, :-1], "targets": rows[:, 1:], "weights": (learned / learned.sum()).flatten()}
    batch = {name: mx.array(array) for name, array in batch.items()}
    return batch | {"plain": mx.array(0.0 if is_own(step) else plain)} | (stored_rows(which) if logits else {})


def evaluate() -> dict[str, float]:
    """Means over the tokens held out: the cross-entropy of student and teacher, and sum_v min(p, q)."""
    small.eval()
    found, count = mx.zeros(3), val_rows[:, 1:].size
    for start in range(0, len(val_rows), batch_size):
        rows = mx.array(val_rows[start:start + batch_size])
        x, y, targets = states(small, rows[:, :-1]), large and states(large, rows[:, :-1]), rows[:, 1:].flatten()
        for i in range(0, len(x), rows_in_memory):
            part = slice(i, i + rows_in_memory)
            z = logits_of(small, x[part])
            sums = [cross_entropy(z, targets[part]).sum()]
            if large:
                log_p, q = outcomes(logits_of(large, y[part])[:, :V], None, V), mx.softmax(z, axis=-1)[:, :V]
                sums += [mx.minimum(mx.exp(log_p), q).sum(), -mx.take_along_axis(log_p, targets[part, None], -1).sum()]
            found = found + mx.stack(sums + [mx.array(0.0)] * (3 - len(sums)))
            mx.eval(found)
    small.train()
    return dict(zip(("val_loss", "val_kept", "teacher") if large else ["val_loss"], (found / count).tolist(),
                    strict=False))


# ---- save ------------------------------------------------------------------------------------------------------------

COLUMNS = ["step", "tokens", "seconds", "train_loss", "divergence", "nats", "val_loss", "val_kept", "learning_rate",
           "muon_lr", "grad_norm", "tok_per_s", "peak_gib"]
losses = before.get("losses", {"untrained": None, "best": None, "best_step": 0})  # held out


def save(path: str, step: int, arrays: dict | None = None, **more):
    """Write the student as a checkpoint, or arrays for a resumed run. That follows the checkpoint: if the process is
    killed between them, the resumed run comes to the best step again."""
    header = {"script": SCRIPT, "settings": settings, "commit": commit, "started": started, "step": step, **more}
    if arrays:
        save_arrays(path, arrays, {**header, "version": VERSION, "losses": losses})
    else:
        kept = {"tokenizer", "ends", "hf", "chat_template", "template", "chat"} & own_meta.keys()
        save_merged(path, small, {**{name: own_meta[name] for name in kept}, **header})


# ---- loop ------------------------------------------------------------------------------------------------------------

run_folder.start(out_dir, SCRIPT, settings, source, start_step, before.get("started", ""))
rows, record = run_folder.open_rows(out_dir, COLUMNS, settings, start_step)
commit, started = run_folder.git_commit(), run_folder.started(out_dir)
interrupts = run_folder.catch_stops()
small.train()
pending = None
bar = tqdm(total=max_iters, initial=start_step, unit="step", disable=None, dynamic_ncols=True)


def diverged(what: str):
    kept = f"{result} has step {losses['best_step']}" if losses["best_step"] else "no step was saved"
    raise UserError(f"{what}; {kept}: try a smaller learning_rate")


def learning_rate_at(step: int, peak: float) -> float:
    """Linear warmup to the peak, then a cosine."""
    warmup = max(1, round(warmup_share * max_iters))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (min_lr + (1 - min_lr) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, max_iters - warmup))))


def finish(number: int, figures: dict[str, mx.array], rates: dict[str, float]):
    """Read the figures of a step and log them, while the device works on the next step."""
    global lap_time, lap_steps
    found = {name: x.item() for name, x in figures.items()}
    if not (math.isfinite(found["loss"]) and math.isfinite(found["norm"])):
        diverged(f"step {number}: the loss is {found['loss']}, the gradient's norm {found['norm']}")
    if number % log_interval == 0 or number == max_iters:
        speed = batch_size * T * lap_steps / lap_time if lap_time else 0.0
        lap_time, lap_steps = 0.0, 0
        shown, nats = " ".join(f"{x:.1e}" for x in rates.values()), "" if is_own(number - 1) else found["nats"]
        tqdm.write(f"step {number:6d} | loss {found['loss']:6.4f} | div {found['div']:6.4f} | nats "
                   + (f"{nats:6.4f}" if nats else "   own")
                   + f" | lr {shown} | norm {found['norm']:4.2f} | {speed:7,.0f} tok/s")
        record(step=number, tokens=number * batch_size * T, train_loss=found["loss"], divergence=found["div"],
               nats=nats, grad_norm=found["norm"], tok_per_s=round(speed),
               peak_gib=round(mx.get_peak_memory() / 2**30, 3), **rates)


def evaluate_and_best(number: int):
    found = evaluate()
    val, of_teacher = found["val_loss"], found.pop("teacher", None)
    if not math.isfinite(val):
        diverged(f"step {number}: the loss held out is {val}")
    kept = f" | kept {found['val_kept']:6.1%}" if large else ""
    if number == 0:
        losses.update(untrained=val, teacher=of_teacher)
        kept += f" | the teacher's val {of_teacher:6.4f}" if large else ""
    is_best = number > 0 and (losses["best"] is None or val < losses["best"])
    tqdm.write(f"step {number:6d} | val  {val:6.4f}{kept} | {mx.get_peak_memory() / 2**30:4.2f} GiB"
               + " | best" * (is_best and val < losses["untrained"]))
    record(step=number, tokens=number * batch_size * T, **found)
    if is_best:
        losses.update(best=val, best_step=number)
        save(result, number, losses={"val": val})


number, lap_time, lap_steps = start_step, 0.0, 0
evaluated = before.get("evaluated")  # the last step that was
while True:
    stopping, due = interrupts() > 0, number % eval_interval == 0 or number == max_iters
    if stopping or due and number != evaluated:
        if pending:
            finish(*pending)
            pending = None
        if not stopping:
            evaluate_and_best(number)
            evaluated = number
        arrays = dict(tree_flatten({"model": small.parameters(), "optimizer": opt.state}))
        save(state_path, number, arrays, evaluated=evaluated, rows=rows_hash, base=origin)
        if stopping or number == max_iters:
            break
    lap_began, rates = time.perf_counter(), {"learning_rate": learning_rate_at(number, learning_rate)}
    rest.learning_rate = rates["learning_rate"]
    if optimizer == "muon":
        muon.learning_rate = rates["muon_lr"] = learning_rate_at(number, muon_lr)
    figures, grads = gradients(batch_at(number))
    figures["norm"] = update(grads)
    if small.config.n_expert:  # moe
        rebalance(small)  # moe
    mx.async_eval(figures, state)
    number += 1
    if pending:
        finish(*pending)
    pending = number, figures, rates
    lap_time, lap_steps = lap_time + time.perf_counter() - lap_began, lap_steps + 1
    bar.update(1)
bar.close()
draw.curves(os.path.join(out_dir, "loss.png"), rows, {
    "nats a token": {"divergence": f"divergence, {loss}", "nats": "cross-entropy", "val_loss": "held out"},
    "share of drafts": {"val_kept": "kept by the teacher, held out"}}, f"{data}, {parameters / 1e6:.2f}M parameters",
    {"the teacher, held out": losses["teacher"]} if losses.get("teacher") else None)
if stopping:
    print(f"stopped at step {number} of {max_iters}, saved {state_path}\n"
          f"go on with: python {shlex.quote(sys.argv[0])} --out_dir={shlex.quote(out_dir)} --resume=True")
    sys.exit(130)
print(f"{result}: step {losses['best_step']}, loss held out {losses['best']:.4f}, {losses['untrained']:.4f} before "
      f"training\ncurves: {out_dir}/loss.png")
if losses["best"] >= losses["untrained"]:
    print("NO STEP WAS BETTER than the student before training: try smaller learning rates")
print(f"next: python sample.py {shlex.quote(result)}" + (
    f"\nor as a draft: python sample.py {shlex.quote(teacher)} --draft={shlex.quote(result)}" if large else ""))
