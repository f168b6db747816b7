"""Masked diffusion: a model that fills in masked tokens, in any order, trained on texts of which it sees a part.

    python diffusion.py --data=book.txt                         # out-diffusion/, bytes as tokens
    python diffusion.py --data=data/stdlib-bpe-4096 --n_layer=6 --n_embd=384 --n_head=6
    python diffusion.py --data=book.txt --init=out/best.safetensors    # begin with a model of train.py
    python diffusion.py --resume=True       # goes on after Ctrl-C, after a power cut, or with more --max_iters

    python diffusion.py out-diffusion/diffusion.safetensors --prompt="Once upon"         # 100 tokens more
    python diffusion.py out-diffusion/diffusion.safetensors --prompt="He {20} the sea."  # 20 tokens between

The model is model.py with bidirectional=True: no causal mask, and no sign of the time. In training each row gets a time
t between 0 and 1, each of its tokens is replaced by [MASK] with probability t, and the loss is

    1 / (t L) times the sum over the masked tokens of -log p(token | the row with its masks)

(LLaDA, Nie et al. 2025, 2502.09992; MDLM, Sahoo et al. 2024, 2406.07524). The mean over t and over the masks is an
upper bound of the text's own -log p, in nats a token. The times of a batch are spread evenly over 0 to 1, and are at
least 0.001. Departure: the logits of [MASK] and of the vocabulary's padding are not held at -inf in training, but they
are in writing.

Held out, the bound is measured with less noise: of a row of L tokens exactly k are masked, k = 1 ... L equally often,
and the loss is the mean over the k masked tokens; `samples` masks are drawn for each row. `+-` is the standard error
over these. bits/byte is an UPPER BOUND; that of eval.py for a model of train.py is exact.

Writing begins with all new tokens masked, and takes `steps` steps:
    order=random      a token is shown with probability 1 / (steps left), as the diffusion runs backward (ancestral)
    order=confidence  in each step the tokens whose draw the model holds most probable are shown, equally many a step
    --threshold=0.9   instead of a number of steps: all tokens that are at least so probable, and always one
    --block=32        from left to right in blocks, each of which takes its share of the steps (LLaDA)
On a terminal the text is shown as it fills in; --watch=True prints it after every step; --page=fill.html writes a page
on which it fills in again, each token coloured by its step.

    OUT_DIR/diffusion.safetensors  the step with the lowest bound held out, a checkpoint
    OUT_DIR/resume.safetensors     the last step, and the state of the optimizer
    OUT_DIR/loss.csv, loss.png     the curves
    OUT_DIR/run.json, source/      the settings of the run and its code

Ctrl-C saves the last step and stops. --resume=True continues from there bit for bit, with the settings of that run,
except those on the command line.

A log line shows: loss of the step's rows, as above; lr, norm and tok/s as in train.py. After every eval_interval
updates a line shows the bound held out, its standard error, and bits/byte.
"""
import hashlib
import html
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, partial

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten
from tqdm import tqdm

import draw
import run_folder
from config import UserError, check_output, given, overrides
from lora import base_fingerprint, save_merged
from model import (
    GPT,
    ON_CPU,
    VERSION,
    GPTConfig,
    chunked_loss,
    compute_dtype,
    cross_entropy,
    gpu_train,
    load_arrays,
    load_checkpoint,
    rebalance,  # moe
    save_arrays,
)
from muon import Muon, by_muon
from score import read_splits
from tokenizer import Tokenizer, byte_tokenizer, open_tokens

checkpoint = ""         # a model of this script, which writes; "": train one
# writing
prompt = ""             # the text to go on with; {20} in it stands for 20 tokens to fill in
tokens = 100            # new tokens after a prompt without {}
steps = 50              # in which all tokens are shown; 0: one token a step
order = "confidence"    # confidence | random
threshold = 0.0         # show what is at least so probable, in place of a number of steps; 0: do not
block = 0               # tokens of a block; 0: all at once
temperature = 1.0       # of the draws; 0: the most probable token
watch = False           # print the text after every step
page = ""               # an HTML page on which the text fills in; "": none
# data
data = ""               # a text, whose last tenth is held out, or a folder of data.py
init = ""               # a checkpoint to begin with, of train.py or of this script; "": random weights
out_dir = "out-diffusion"  # the folder of this run
resume = False          # continue from OUT_DIR/resume.safetensors
seed = 1337             # of the weights, the order of the rows, the masks and the draws
# model
block_size = 256        # tokens of a row; with --init at most the checkpoint's context
n_layer = 4             # blocks
n_head = 2              # heads
n_embd = 128            # width
mlp = "relu2"           # relu2 | gelu | gelu_tanh | swiglu | geglu | swiglu_clip
# optimization
max_iters = 2000        # updates
batch_size = 16         # rows in an update
optimizer = "muon"      # muon | adamw
learning_rate = 1e-2    # peak; under muon that of embeddings and norms
muon_lr = 0.05          # peak, of the matrices under muon
warmup_share = 0.05     # of all updates, linear
min_lr = 0.1            # learning rate at the end of the cosine, as a share of the peak
weight_decay = 0.1      # of matrices, times the learning rate
grad_clip = 1.0         # largest norm of the gradient; 0: no clipping
# run
eval_interval = 200     # updates between evaluations
eval_rows = 32          # rows held out that are read, at most
samples = 8             # masks of each of them
log_interval = 25       # updates between log lines
dtype = "auto"          # float32 | bfloat16; auto: bfloat16 on a GPU, float32 on a CPU
compile = not ON_CPU    # mx.compile the step
overwrite = False       # replace the results of another run in OUT_DIR without asking
log = ""                # send the rows of loss.csv also to tensorboard | wandb

settings = overrides(globals(), "checkpoint")

EPS = 1e-3  # the least probability of a mask
GAP = r"\{(\d+)\}"  # in a prompt: so many tokens to fill in

# ---- masks and losses ------------------------------------------------------------------------------------------------


def corrupted(rows: np.ndarray, mask: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Rows (B, L) with some of their tokens replaced by the id `mask`, and the weights (B, L) of the loss: 1 / (p B L)
    where a token is masked, which happens with probability p, else 0. Row i has the time (u + i / B) mod 1."""
    B, L = rows.shape
    t = (rng.random() + np.arange(B)[:, None] / B) % 1
    p = (1 - EPS) * t + EPS
    masked = rng.random(rows.shape) < p
    return np.where(masked, mask, rows), (masked / p / (B * L)).astype(np.float32)


def bound(nats_of: Callable, rows: np.ndarray, mask: int, samples: int, batch_size: int,
          rng: np.random.Generator) -> tuple[float, float]:
    """An upper bound of -log p of rows (N, L), in nats a token, and its standard error. nats_of(ids, rows): (B, L), for
    rows with masks the -log p of every token of the whole rows. The number k of masked tokens takes the values 1 ... L
    equally often."""
    N, L = rows.shape
    n = N * samples
    k = np.minimum(1 + np.floor((rng.permutation(n) + rng.random()) / n * L), L)
    rows, found = np.repeat(rows, samples, axis=0), np.zeros(n)
    for start in range(0, n, batch_size):
        part = slice(start, start + batch_size)
        masked = rng.random(rows[part].shape).argsort(1).argsort(1) < k[part, None]
        nats = nats_of(np.where(masked, mask, rows[part]), rows[part])
        found[part] = (nats * masked).sum(1) / k[part]
    return float(found.mean()), float(found.std(ddof=1)) / n**0.5 if n > 1 else math.inf


def fill(probs_of: Callable, ids: np.ndarray, mask: int, steps: int, order: str, rng: np.random.Generator,
         threshold: float = 0.0, block: int = 0) -> Iterator[np.ndarray]:
    """Replace the masks in token ids (L,), and yield the ids after each step. probs_of(ids): (L, V), the probabilities
    of tokens at all places. order, threshold, block: see this file's docstring."""
    ids, hidden = ids.copy(), np.flatnonzero(ids == mask)
    parts = np.split(hidden, range(block, len(hidden), block)) if block else [hidden]
    for part in parts:
        own = len(part) if not steps else max(1, round(steps * len(part) / len(hidden)))
        at = 0
        while len(part):
            probs = probs_of(ids)[part]
            cumulative = probs.cumsum(1, dtype=np.float64)
            drawn = (cumulative < rng.random((len(part), 1)) * cumulative[:, -1:]).sum(1)
            sure = probs[np.arange(len(part)), drawn]
            if threshold:
                shown = sure >= threshold
                shown[sure.argmax()] = True
            elif order == "random":
                shown = rng.random(len(part)) < 1 / max(own - at, 1)
            else:
                n = math.ceil(len(part) / max(own - at, 1))
                shown = np.zeros(len(part), bool)
                shown[np.argsort(-sure, kind="stable")[:n]] = True
            ids[part[shown]] = drawn[shown]
            part, at = part[~shown], at + 1
            yield ids.copy()


def masked_ids(enc: Tokenizer, text: str, tokens: int, mask: int) -> np.ndarray:
    """The ids of a prompt, with `mask` for each token to fill in: {n} in the text, or `tokens` after it."""
    found = [*enc.start]
    for i, piece in enumerate(re.split(GAP, text) if re.search(GAP, text) else (text, tokens)):
        found += [mask] * int(piece) if i % 2 else enc.encode(piece).tolist()
    return np.array(found, np.int32)


def shown(enc: Tokenizer, ids: np.ndarray, mask: int) -> str:
    """A text whose masked tokens are dots."""
    parts, start = [], len(enc.start)
    for token in ids[start:]:
        parts.append("·".encode() if token == mask else enc.decode_bytes([int(token)]))
    return b"".join(parts).decode(errors="replace")


# ---- write -----------------------------------------------------------------------------------------------------------

TRAINS = ("data", "init", "out_dir", "resume", "block_size", "n_layer", "n_head", "n_embd", "mlp", "max_iters",
          "batch_size", "optimizer", "learning_rate", "muon_lr", "warmup_share", "min_lr", "weight_decay", "grad_clip",
          "eval_interval", "eval_rows", "samples", "log_interval", "overwrite", "log")
WRITES = ("prompt", "tokens", "steps", "order", "threshold", "block", "temperature", "watch", "page")
for name in WRITES if not checkpoint else TRAINS:
    if name in given:
        raise UserError(f"{name} has no effect " + ("when a model writes: leave it out" if checkpoint else
                                                    "in training: give a checkpoint to write with"))
if order not in ("confidence", "random"):
    raise UserError(f"order={order!r} is not one of confidence, random")
if min(tokens, steps, block, temperature) < 0 or not 0 <= threshold <= 1:
    raise UserError("tokens, steps, block and temperature must be 0 or more, and threshold from 0 to 1")
for name in ("steps", "order"):
    if name in given and threshold:
        raise UserError(f"{name} has no effect with --threshold: leave one of them out")
if "tokens" in given and re.search(GAP, prompt):
    raise UserError("tokens has no effect where the prompt has gaps such as {20}: leave it out")


def opened(path: str) -> tuple[GPT, Tokenizer, dict]:
    model, meta = load_checkpoint(path)
    if not meta.get("tokenizer"):
        raise UserError(f"{path} holds no tokenizer: give a checkpoint of train.py or diffusion.py")
    return model, Tokenizer.from_dict(meta["tokenizer"]), meta


FILLS = """<p><input type=range id=at min=0 max=LAST value=LAST style="width: 60%"> <button id=play>play</button> step
<output id=n>LAST</output> of LAST</p><script>
const at = document.getElementById("at"), tokens = document.querySelectorAll("pre span");
function show() {
  document.getElementById("n").value = at.value;
  for (const token of tokens) token.classList.toggle("masked", +token.dataset.step > +at.value);
}
at.oninput = show;
document.getElementById("play").onclick = () => {
  at.value = 0;
  const timer = setInterval(() => { show(); if (at.value === at.max) clearInterval(timer); else at.value++; }, 150);
};
</script><style>pre { white-space: pre-wrap } .masked { background: #ddd !important; color: transparent }</style>"""


def check_page(path: str):
    draw.check_folder(path)
    if not path.endswith(".html"):
        raise UserError(f"page={path!r}: let its name end in .html")
    if os.path.exists(path):
        with open(path, "rb") as file:
            if draw.PAGE.encode() not in file.read(1000):
                raise UserError(f"{path} exists, and is no page of ours: give another name")


def write_page(path: str, enc: Tokenizer, ids: np.ndarray, steps: np.ndarray):
    """The text of token ids (L,), each coloured by the step in which it was shown (0: given)."""
    last, start = int(steps.max()), len(enc.start)
    spans = []
    for token, step in zip(ids[start:], steps[start:].tolist(), strict=True):
        colour = draw.colour_of(step / last, False) if step else "none"
        text = html.escape(enc.decode([int(token)]))
        spans.append(f"<span data-step={step} style='background:{colour}'>{text}</span>")
    draw.page(path, f"{checkpoint}, {last} steps",
              "The darker a token, the later it was shown. Tokens without a colour were given.",
              FILLS.replace("LAST", str(last)), f"<pre>{''.join(spans)}</pre>")


def write():
    model, enc, _ = opened(checkpoint)
    if not model.config.bidirectional:
        raise UserError(f"{checkpoint} reads in one direction: write with sample.py, or train it with --init")
    if page:
        check_page(page)
    model.set_dtype(compute_dtype(dtype))
    model.eval()
    mask, V = enc.n_vocab, enc.n_vocab
    ids = masked_ids(enc, prompt, tokens, mask)
    if len(ids) > model.config.block_size or not (ids == mask).any():
        raise UserError(f"the text has {len(ids)} tokens, {(ids == mask).sum()} of them to fill in: the model reads "
                        f"{model.config.block_size}, and at least one must be new")

    @mx.compile
    def probabilities(ids):
        logits = model.unembed(model.residual(ids))[0, :, :V].astype(mx.float32)
        if temperature == 0:
            return (mx.arange(V) == mx.argmax(logits, axis=-1, keepdims=True)).astype(mx.float32)
        return mx.softmax(logits / temperature, axis=-1)

    began, n, live = time.perf_counter(), 0, sys.stdout.isatty() and not watch
    lines, when = 0, np.zeros(len(ids), int)
    for now in fill(lambda x: np.array(probabilities(mx.array(x)[None])), ids, mask, steps, order,
                    np.random.default_rng(seed), threshold, block):
        n += 1
        when[(ids == mask) & (now != mask) & (when == 0)] = n
        if watch:
            print(f"--- {n}\n{shown(enc, now, mask)}")
        elif live:
            text, width = draw.printable(shown(enc, now, mask).replace("\n", "\u2424")), os.get_terminal_size().columns
            print(("\033[F" * lines + "\033[J" if lines else "") + text, flush=True)
            lines = -(-len(text) // max(width, 1))
    if live:
        print("\033[F" * lines + "\033[J", end="")
    if not watch:
        print(shown(enc, now, mask))
    seconds = time.perf_counter() - began
    print(f"[{n} steps, {n / seconds:.1f} a second]")
    if page:
        write_page(page, enc, now, when)


if checkpoint:
    write()
    sys.exit()

# ---- resume: the settings of the run apply, except those on the command line -----------------------------------------

SCRIPT, source = os.path.basename(__file__), run_folder.read_source(__file__)
result, state_path = os.path.join(out_dir, "diffusion.safetensors"), os.path.join(out_dir, "resume.safetensors")
LASTING = ("data", "init", "seed", "block_size", "n_layer", "n_head", "n_embd", "mlp", "batch_size", "optimizer",
           "eval_rows", "samples")
start_step, trained, before = 0, {}, {}  # trained, before: the arrays and the header of the last step
if resume:
    run_folder.check_maker(state_path, SCRIPT, out_dir)
    trained, before = load_arrays(state_path)
    settings.update(run_folder.old_settings(state_path, before, settings, LASTING,
                                            ("settings", "step", "losses", "rows")))
    globals().update(settings)
    start_step = before["step"]
if not data:
    raise UserError("no data: give --data=FILE, a text or a folder of data.py")
if optimizer not in ("adamw", "muon"):
    raise UserError(f"optimizer={optimizer!r} is not one of adamw, muon")
for name, where, used in (("muon_lr", "without muon", optimizer == "muon"),
                          *((name, "with --init", not init) for name in ("n_layer", "n_head", "n_embd", "mlp"))):
    if name in given and not used:
        raise UserError(f"{name} has no effect {where}: leave it out")
for name in ("batch_size", "eval_rows", "samples"):
    if settings[name] < 1:
        raise UserError(f"{name}={settings[name]}: it must be 1 or more")
run_folder.check_settings(settings, resume)
run_folder.check(out_dir, SCRIPT, overwrite, resume, [data, init], "resume.safetensors")

# ---- model -----------------------------------------------------------------------------------------------------------

fingerprint = ""
if init:
    model, enc, meta = opened(init)
    check_output(result, init)
    check_output(state_path, init)
    if any("scales" in name for name, _ in tree_flatten(model.parameters())):
        raise UserError(f"{init} has packed weights, which do not train: give the file that it was made from")
    if not resume and "block_size" not in given:
        block_size = min(block_size, model.config.block_size)
    if not 1 <= block_size <= model.config.block_size:
        raise UserError(f"block_size={block_size}: it must be from 1 to {model.config.block_size}, as {init} has it")
    if enc.n_vocab == model.config.vocab_size:
        raise UserError(f"{init} has no row of its embedding left for [MASK]: train a model with a larger vocab_size")
    fingerprint, weights = base_fingerprint(model), model.parameters()
    model = GPT(replace(model.config, bidirectional=True), seed=None)
    model.update(weights)
else:
    enc = Tokenizer.from_dict(open_tokens(data)[0]["tokenizer"]) if os.path.isdir(data) else byte_tokenizer()
    model = GPT(GPTConfig(block_size=block_size, vocab_size=enc.n_vocab // 64 * 64 + 64, n_layer=n_layer, n_head=n_head,
                          n_embd=n_embd, mlp=mlp, bidirectional=True), seed=seed)
settings["block_size"] = block_size
if resume and before["base"] != fingerprint:
    raise UserError(f"{init} has changed since {state_path} was written: put the old file back, or begin anew in "
                    "another --out_dir")
model.unfreeze()
model.set_dtype(mx.float32)
working_dtype, MASK = compute_dtype(dtype), enc.n_vocab
model.compute_dtype = working_dtype

# ---- data: rows of a text --------------------------------------------------------------------------------------------


def cut(ids: np.ndarray) -> np.ndarray:
    """Tokens as rows (N, L)."""
    n = len(ids) // block_size
    if n < 1:
        raise UserError(f"{data} has a part of {len(ids)} tokens, fewer than block_size={block_size}: give more text, "
                        "or a smaller block_size")
    return ids[:n * block_size].reshape(n, block_size)


train_rows, val_rows = map(cut, read_splits(data, enc))
rows_hash, N = hashlib.sha256(train_rows.tobytes() + val_rows.tobytes()).hexdigest(), len(train_rows)
if resume and before["rows"] != rows_hash:
    raise UserError(f"{data} is not the text that {state_path} is of: give that, or begin anew")
val_rows = val_rows[np.random.default_rng(0).permutation(len(val_rows))[:eval_rows]]
bytes_a_token = enc.token_bytes[val_rows].sum() / val_rows.size

# ---- the step --------------------------------------------------------------------------------------------------------

parameters = sum(p.size for _, p in tree_flatten(model.parameters()))
print(f"{data}: {N:,} rows of {block_size} tokens, {len(val_rows)} held out; {parameters / 1e6:.2f}M parameters")
if start_step >= max_iters:
    raise UserError(f"{state_path} is at step {start_step} of {max_iters} already: give more --max_iters")
opt = rest = optim.Adam(learning_rate, betas=[0.9, 0.95], bias_correction=True)
if optimizer == "muon":
    muon = Muon(muon_lr, dtype=working_dtype)
    opt = optim.MultiOptimizer([muon, rest], [by_muon])
opt.init(model.trainable_parameters())
if resume:
    state = tree_unflatten(list(trained.items()))
    model.update(state["model"])
    opt.state = state["optimizer"]
state = [model.state, opt.state]
compiled = partial(mx.compile, inputs=state, outputs=state) if compile else lambda f: f


@compiled
def gradients(ids, rows, weights):
    """The loss of rows (B, L) of which ids (B, L) are seen, and its gradients."""

    def loss(ids, rows, weights):
        hidden = model.norm(model.residual(ids))
        return chunked_loss(model, hidden.flatten(0, 1), rows.flatten(), weights.flatten())

    return nn.value_and_grad(model, loss)(ids, rows, weights)


@compiled
def update(grads):
    """Clip, decay, and apply. Returns the gradient's norm before clipping."""
    if gpu_train and (length := gpu_train.adamw(model, opt, grads, grad_clip or math.inf, weight_decay)) is not None:
        return length
    grads, length = (gpu_train or optim).clip_grad_norm(grads, grad_clip or math.inf)

    def decay(path: str, p: mx.array) -> mx.array:
        rate = muon.learning_rate if optimizer == "muon" and by_muon(path, p) else rest.learning_rate
        return p * (1 - weight_decay * rate) if p.ndim > 1 else p

    model.update(tree_map_with_path(decay, model.trainable_parameters()))
    opt.update(model, grads)
    return length


@lru_cache(2)
def order_of(epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(N)


def batch_at(step: int) -> list[mx.array]:
    """The rows of a step with their masks, the rows, and the weights of the loss."""
    which = [order_of(i // N)[i % N] for i in range(step * batch_size, (step + 1) * batch_size)]
    rows = train_rows[np.array(which)]
    ids, weights = corrupted(rows, MASK, np.random.default_rng([seed, step, 1]))
    return [mx.array(x) for x in (ids.astype(np.int32), rows, weights)]


def evaluate() -> tuple[float, float]:
    """The bound held out, in nats a token, and its standard error, always with the same masks."""

    def nats_of(ids, rows):
        logits = model.unembed(model.residual(mx.array(ids.astype(np.int32))))[..., :enc.n_vocab].astype(mx.float32)
        return np.array(cross_entropy(logits.flatten(0, 1), mx.array(rows).flatten())).reshape(rows.shape)

    model.eval()
    found = bound(nats_of, val_rows, MASK, samples, batch_size, np.random.default_rng(0))
    model.train()
    return found


# ---- save ------------------------------------------------------------------------------------------------------------

COLUMNS = ["step", "tokens", "seconds", "train_loss", "val_loss", "val_error", "bits_per_byte", "learning_rate",
           "muon_lr", "grad_norm", "tok_per_s", "peak_gib"]
losses = before.get("losses", {"untrained": None, "best": None, "best_step": 0})  # the bound held out


def save(path: str, step: int, arrays: dict | None = None, **more):
    """Write the model as a checkpoint, or arrays for a resumed run. That follows the checkpoint: if the process is
    killed between them, the resumed run comes to the best step again."""
    header = {"script": SCRIPT, "settings": settings, "commit": commit, "started": started, "step": step, **more}
    if arrays:
        save_arrays(path, arrays, {**header, "version": VERSION, "losses": losses})
    else:
        save_merged(path, model, {**header, "tokenizer": enc.to_dict()})


# ---- loop ------------------------------------------------------------------------------------------------------------

run_folder.start(out_dir, SCRIPT, settings, source, start_step, before.get("started", ""))
rows_so_far, record = run_folder.open_rows(out_dir, COLUMNS, settings, start_step)
commit, started = run_folder.git_commit(), run_folder.started(out_dir)
interrupts = run_folder.catch_stops()
model.train()
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
        speed = batch_size * block_size * lap_steps / lap_time if lap_time else 0.0
        lap_time, lap_steps = 0.0, 0
        shown = " ".join(f"{x:.1e}" for x in rates.values())
        tqdm.write(f"step {number:6d} | loss {found['loss']:6.4f} | lr {shown} | norm {found['norm']:4.2f} | "
                   f"{speed:7,.0f} tok/s")
        record(step=number, tokens=number * batch_size * block_size, train_loss=found["loss"],
               grad_norm=found["norm"], tok_per_s=round(speed), peak_gib=round(mx.get_peak_memory() / 2**30, 3),
               **rates)


def evaluate_and_best(number: int):
    val, error = evaluate()
    if not math.isfinite(val):
        diverged(f"step {number}: the bound held out is {val}")
    if number == 0:
        losses["untrained"] = val
    is_best = number > 0 and (losses["best"] is None or val < losses["best"])
    bits = val / bytes_a_token / math.log(2)
    tqdm.write(f"step {number:6d} | val  {val:6.4f} +- {error:.4f} | {bits:6.4f} bits/byte at most | "
               f"{mx.get_peak_memory() / 2**30:4.2f} GiB" + " | best" * (is_best and val < losses["untrained"]))
    record(step=number, tokens=number * batch_size * block_size, val_loss=val, val_error=error, bits_per_byte=bits)
    if is_best:
        losses.update(best=val, best_step=number)
        save(result, number, losses={"val": val, "error": error})


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
        arrays = dict(tree_flatten({"model": model.parameters(), "optimizer": opt.state}))
        save(state_path, number, arrays, evaluated=evaluated, rows=rows_hash, base=fingerprint)
        if stopping or number == max_iters:
            break
    lap_began, rates = time.perf_counter(), {"learning_rate": learning_rate_at(number, learning_rate)}
    rest.learning_rate = rates["learning_rate"]
    if optimizer == "muon":
        muon.learning_rate = rates["muon_lr"] = learning_rate_at(number, muon_lr)
    loss, grads = gradients(*batch_at(number))
    figures = {"loss": loss, "norm": update(grads)}
    if model.config.n_expert:  # moe
        rebalance(model)  # moe
    mx.async_eval(figures, state)
    number += 1
    if pending:
        finish(*pending)
    pending = number, figures, rates
    lap_time, lap_steps = lap_time + time.perf_counter() - lap_began, lap_steps + 1
    bar.update(1)
bar.close()
draw.curves(os.path.join(out_dir, "loss.png"), rows_so_far,
            {"nats a token, an upper bound": {"train_loss": "training", "val_loss": "held out"}},
            f"{data}, {parameters / 1e6:.2f}M parameters")
if stopping:
    print(f"stopped at step {number} of {max_iters}, saved {state_path}\n"
          f"go on with: python {shlex.quote(sys.argv[0])} --out_dir={shlex.quote(out_dir)} --resume=True")
    sys.exit(130)
print(f"{result}: step {losses['best_step']}, bound held out {losses['best']:.4f}, {losses['untrained']:.4f} before "
      f"training\ncurves: {out_dir}/loss.png")
if losses["best"] >= losses["untrained"]:
    print("NO STEP WAS BETTER than the model before training: try smaller learning rates")
print(f"next: python {shlex.quote(sys.argv[0])} {shlex.quote(result)} --prompt=\"Once upon a time\"")
