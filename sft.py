"""Fine-tune a checkpoint on instructions: all of its weights, or an adapter.

    python sft.py out/ckpt.safetensors --data=tasks.jsonl
    python sft.py out/ckpt.safetensors --data=tasks.jsonl --kind=dora --base_bits=4
    python sft.py --resume=True            # goes on after Ctrl-C, after a power cut, or with more --epochs

The examples may have any layout that records.py lists: Alpaca's, messages, ShareGPT's, Dolly's, ... One of them is
printed as the model sees it. Only the responses are learned, unless --learn_prompts=True. Several examples are packed
into one row of block_size tokens; each example attends to itself only, and its positions begin at 0. An example that is
longer than a row is cut; if no response would be left, it is skipped. The numbers of both are printed. With the chat
template that came with a model of another project, a response is learned where the template writes it as the model is
asked for it: some templates change earlier turns when a conversation goes on.

    OUT_DIR/sft.safetensors      the step with the lowest validation loss: with --kind=full or --merge=True as a whole
                                 checkpoint, else as an adapter for the checkpoint that it was trained on
    OUT_DIR/resume.safetensors   the last step, and the state of the optimizer
    OUT_DIR/loss.csv, loss.png   the curves
    OUT_DIR/run.json, source/    the settings of the run and its code

Ctrl-C saves the last step and stops. --resume=True continues from there bit for bit, with the settings of that run,
except those on the command line.

A log line shows: loss, the mean cross-entropy of the response tokens of this update in nats; lr, the learning rate
(under muon: of Adam, then of Muon); norm, the norm of the gradient before clipping; tok/s, tokens per second without
padding. After every eval_interval updates a line shows val, the mean cross-entropy of the response tokens held out, and
the peak memory.

Kinds: full, all weights; the adapters lora (Hu et al. 2021), rslora (Kalajdzievski 2023), dora (Liu et al. 2024).
--base_bits quantizes the base before an adapter is attached (QLoRA, Dettmers et al. 2023). --neftune adds noise to the
embeddings (Jain et al. 2023). --optimizer=muon (Jordan et al. 2024) updates matrices, also those of adapters, by Muon.
"""
import hashlib
import itertools
import math
import os
import shlex
import sys
import time
from functools import partial

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_map_with_path, tree_unflatten
from tqdm import tqdm

import draw
import run_folder
from config import UserError, check_output, overrides
from conversations import (
    encode,
    encode_prompt,
    ends_of_text,
    entries_to_keep,
    pack,
    row_length,
    shorten,
    template_for_training,
    written,
)
from lora import KINDS, attach, base_fingerprint, load_adapted, quantize_base, save_adapter, save_merged, save_peft
from lora import merge as merge_adapters
from model import ON_CPU, PADDING, VERSION, compute_dtype, generate, gpu_train, load_arrays, no_tap, save_arrays
from muon import Muon, by_muon
from records import read_conversations, show, split, without
from tokenizer import Tokenizer

try:
    import precision as low  # products of 8 or 4 bits
except ImportError:
    low = None
try:
    import packed_states  # optimizers' states of 8 or 4 bits
except ImportError:
    packed_states = None

checkpoint = "out/ckpt.safetensors"  # from train.py, or a checkpoint or adapter of an earlier sft.py or dpo.py
# data
data = ""               # .jsonl, .json, .csv or .parquet
val_data = ""           # a file of examples held out; "": val_share of data
val_share = 0.1         # of the examples
template = ""           # own | plain | alpaca | chatml | llama3; "": the checkpoint's, else chatml or llama3
learn_prompts = False   # learn the user's turns too: magpie.py needs a model that can write them
block_size = 0          # tokens in a row; 0: the model's context or, if over 1024, what the data needs up to 1024
packing = True          # put several examples into a row
strict = False          # refuse a file with a bad row; False: skip the row
out_dir = "out-sft"     # the folder of this run
resume = False          # continue from OUT_DIR/resume.safetensors
seed = 1337             # of the split, the order, the adapter, noise and dropout
# adapter
adapter = ()            # adapters to merge into the checkpoint first, PATH or PATH:WEIGHT; can be given several times
kind = "lora"           # full | lora | rslora | dora
rank = 8                # of the adapter
alpha = 16.0            # its scale is alpha / rank (rslora: / sqrt(rank))
targets = "attn, mlp"   # linear layers, regular expressions separated by commas: "attn.(q|v)$"
base_bits = 0           # quantize the base to 2 | 3 | 4 | 5 | 6 | 8 bits first; 0: do not
merge = False           # write a checkpoint with the adapter merged into its weights, instead of the adapter
peft = False            # write the adapter also to OUT_DIR/peft, a folder that Hugging Face's PEFT reads
# optimization
epochs = 3              # passes over the examples
batch_size = 4          # rows per micro-step
grad_accum = 1          # micro-steps per update
optimizer = "adamw"     # adamw | muon: for the matrices of the blocks and of adapters, AdamW for the rest
learning_rate = 1e-3    # peak; full fine-tuning needs a tenth
muon_lr = 0.02          # peak, of the matrices under muon
warmup_share = 0.05     # of all updates, linear
min_lr = 0.1            # learning rate at the end of the cosine, as a share of the peak
weight_decay = 0.0      # of matrices, times the learning rate
grad_clip = 1.0         # largest norm of the gradient; 0: no clipping
dropout = 0.0           # share of the numbers dropped in training, at GPT-2's places
neftune = 0.0           # noise in the embeddings, over sqrt(tokens * width); 5 is usual; 0: none
# run
eval_interval = 20      # updates between evaluations
log_interval = 5        # updates between log lines
dtype = "auto"          # float32 | bfloat16; auto: bfloat16 on a GPU, float32 on a CPU
precision = ""          # fp8 | mxfp8 | nvfp4: the blocks multiply such numbers, simulated; "": those of dtype
precision_off = ""      # choices of nvfp4 to leave out, with commas: stochastic, hadamard, square, last
optimizer_bits = 32     # 8 | 4: keep the optimizer's states as integers of so many bits
compile = not ON_CPU    # mx.compile the step
samples = 2             # held-out prompts that are answered before and after
sample_tokens = 60      # tokens of an answer at most
overwrite = False       # replace the results of another run in OUT_DIR without asking
log = ""                # send the rows of loss.csv also to tensorboard | wandb

settings = overrides(globals(), "checkpoint", "data")

SCRIPT, source = os.path.basename(__file__), run_folder.read_source(__file__)
result, state_path = os.path.join(out_dir, "sft.safetensors"), os.path.join(out_dir, "resume.safetensors")
LASTING = ("checkpoint", "adapter", "data", "val_data", "val_share", "template", "learn_prompts", "block_size",
           "packing", "seed", "kind", "rank", "alpha", "targets", "base_bits", "merge", "batch_size", "grad_accum",
           "optimizer", "optimizer_bits")

# ---- resume: the settings of the run apply, except those on the command line -----------------------------------------

start_step, trained, before = 0, {}, {}  # trained, before: the arrays and the header of the last step
if resume:
    run_folder.check_maker(state_path, SCRIPT, out_dir)
    trained, before = load_arrays(state_path)
    settings.update(run_folder.old_settings(state_path, before, settings, LASTING))
    globals().update(settings)
    start_step = before["step"]

if not data:
    raise UserError("no examples: give --data=FILE, a .jsonl, .json, .csv or .parquet")
if kind not in ("full", *KINDS):
    raise UserError(f"kind={kind!r} is not one of full, {', '.join(KINDS)}")
if kind == "full" and base_bits:
    raise UserError(f"base_bits={base_bits} with kind=full: packed weights do not train; take kind=lora")
if optimizer not in ("adamw", "muon"):
    raise UserError(f"optimizer={optimizer!r} is not one of adamw, muon")
if optimizer_bits not in (32, 8, 4) or optimizer_bits < 32 and not packed_states:
    raise UserError(f"optimizer_bits={optimizer_bits}: it must be 32, or with packed_states.py at hand 8 or 4")
run_folder.check_settings(settings, resume)
run_folder.check(out_dir, SCRIPT, overwrite, resume, [checkpoint, *adapter, data, val_data], "resume.safetensors")

# ---- data ------------------------------------------------------------------------------------------------------------

conversations = read_conversations(data, strict)
if val_data:
    held_out = read_conversations(val_data, strict)
    conversations = without(conversations, held_out)
else:
    conversations, held_out = split(conversations, val_share, seed)
model, meta = load_adapted(checkpoint, adapter)
for path in (result, state_path):
    check_output(path, *meta["files"])  # the base of an adapter is an input, too
if not meta.get("tokenizer"):
    raise UserError(f"{checkpoint} holds no tokenizer: it cannot read conversations")
enc = Tokenizer.from_dict(meta["tokenizer"])
form = template_for_training(meta, enc, template, before.get("started"))
template = getattr(form, "name", form)
conversations, training = written(conversations, lambda one: encode(enc, one, form, learn_prompts), form, strict)
held_out, testing = written(held_out, lambda one: encode(enc, one, form, learn_prompts), form, strict)
length = row_length(max(len(ids) - 1 for ids, _ in training + testing), model.config.block_size, block_size)


def rows_of(examples: list, what: str) -> dict[str, np.ndarray]:
    examples, cut, skipped = shorten(examples, length)
    if not examples:
        raise UserError(f"no {what} example has a response within {length} tokens: " + (
            "train a longer context" if length == model.config.block_size else "give a larger --block_size"))
    rows = pack(examples, length, packing)
    print(f"{what}: {len(examples)} examples, {sum(len(ids) for ids, _ in examples):,} tokens, "
          f"{int(rows['mask'].sum()):,} to learn; rows of {length} tokens: {len(rows['idx'])}")
    if cut or skipped:
        print(f"    {cut} cut at {length} tokens; {skipped} SKIPPED, as no response was left")
    if what == "training":
        show(enc, *examples[0])
    return rows


train_rows, val_rows = rows_of(training, "training"), rows_of(testing, "held out")
rows_hash = hashlib.sha256(b"".join(array.tobytes() for rows in (train_rows, val_rows) for array in rows.values()))
rows_hash = rows_hash.hexdigest()
if resume and before["rows"] != rows_hash:
    raise UserError(f"{data} has changed since {state_path} was written: begin anew in another --out_dir")

# ---- model -----------------------------------------------------------------------------------------------------------

working_dtype = compute_dtype(dtype)
fingerprint = meta.get("fingerprint") or base_fingerprint(model)
if resume and kind != "full" and before.get("base", fingerprint) != fingerprint:
    raise UserError(f"{checkpoint} has changed since {state_path} was written: put the old file back, or begin anew in "
                    "another --out_dir")
merge_adapters(model)
bytes_before = sum(p.nbytes for _, p in tree_flatten(model.parameters()))
model.compute_dtype, model.dropout = working_dtype, dropout
if kind == "full":
    if any("scales" in path for path, _ in tree_flatten(model.parameters())):
        raise UserError(f"{checkpoint} has packed weights, which do not train: take --kind=lora")
    model.unfreeze()
    model.set_dtype(mx.float32)
else:
    model.set_dtype(working_dtype)
    quantize_base(model, base_bits)
    paths = attach(model, targets, rank, alpha, kind, seed)
if precision or precision_off:
    if not low:
        raise UserError(f"precision={precision!r} needs precision.py, which is missing: leave it out")
    low.convert(model, precision, low.parse(precision, precision_off))
trainable = sum(p.size for _, p in tree_flatten(model.trainable_parameters()))
total = sum(p.nbytes for _, p in tree_flatten(model.parameters()))
print(f"{trainable / 1e6:.2f}M parameters train{'' if kind == 'full' else f' in {len(paths)} layers'}; "
      f"the model takes {total / 1e6:.1f} MB, the checkpoint {bytes_before / 1e6:.1f}")

steps_an_epoch = math.ceil(len(train_rows["idx"]) / (batch_size * grad_accum))
max_iters = epochs * steps_an_epoch
if resume and start_step >= max_iters:
    raise UserError(f"{state_path} is at step {start_step} of {max_iters} already: give more --epochs")
make = optim.Adam if optimizer_bits == 32 else partial(packed_states.PackedAdam, bits=optimizer_bits)
opt = rest = make(learning_rate, betas=[0.9, 0.95], bias_correction=True)
if optimizer == "muon":
    make = Muon if optimizer_bits == 32 else partial(packed_states.PackedMuon, bits=optimizer_bits)
    muon = make(muon_lr, dtype=working_dtype)
    opt = optim.MultiOptimizer([muon, rest], [by_muon])
opt.init(model.trainable_parameters())


def learning_rate_at(step: int, peak: float) -> float:
    """The learning rate of an update: linear warmup to the peak, then a cosine."""
    warmup = max(1, round(warmup_share * max_iters))
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(1, max_iters - warmup)
    return peak * (min_lr + (1 - min_lr) * 0.5 * (1 + math.cos(math.pi * share)))


asked = [messages for messages in held_out if template != "own" or len(messages) > 1][:samples]


def answers() -> list[str]:
    """The model's greedy answers to the first prompts held out."""
    model.eval()
    found, ends = [], ends_of_text(enc, meta, form)
    for messages in asked:
        prompt = encode_prompt(enc, messages[:-1], form)
        ids = generate(model, prompt, sample_tokens, temperature=0, n_vocab=enc.n_vocab)
        found.append(enc.decode(itertools.takewhile(lambda token: token not in ends, ids)))
    model.train()
    return found


untrained = answers()
if resume:
    state = tree_unflatten(list(trained.items()))
    model.update(state["model"])
    opt.state = state["optimizer"]

# ---- the step --------------------------------------------------------------------------------------------------------

state = [model.state, opt.state, mx.random.state]
compiled = partial(mx.compile, inputs=state, outputs=state) if compile else lambda f: f


def noise(site: str, layer: int, x: mx.array) -> mx.array:
    """A tap for NEFTune: adds uniform noise from +-neftune / sqrt(T C) to the embeddings (B, T, C)."""
    if (site, layer) != ("resid", 0):
        return x
    size = neftune / math.sqrt(x.shape[1] * x.shape[2])
    return x + mx.random.uniform(-size, size, x.shape).astype(x.dtype)


def loss_of(batch, tap=no_tap):
    return model.loss(batch["idx"], batch["targets"], batch["mask"], tap, batch["places"] if packing else None)


@compiled
def gradients(batch, share):
    """Loss and gradients of one micro-step, times its share of the update's response tokens."""
    return nn.value_and_grad(model, lambda batch: share * loss_of(batch, noise if neftune else no_tap))(batch)


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


validation_loss = compiled(lambda batch: loss_of(batch))


def batch_of(rows: dict, which) -> dict[str, mx.array]:
    return {name: mx.array(array[which]) for name, array in rows.items()}


def evaluate() -> float:
    """Mean cross-entropy of the response tokens held out, in nats."""
    model.eval()
    nats, count = 0.0, val_rows["mask"].sum()
    for start in range(0, len(val_rows["idx"]), batch_size):
        part = slice(start, start + batch_size)
        nats += validation_loss(batch_of(val_rows, part)).item() * val_rows["mask"][part].sum()
    model.train()
    return float(nats / count)


# ---- save ------------------------------------------------------------------------------------------------------------

COLUMNS = ["step", "tokens", "seconds", "train_loss", "val_loss", "learning_rate", "muon_lr", "grad_norm", "tok_per_s",
           "peak_gib"]
losses = before.get("losses", {"untrained": None, "best": None, "best_step": 0})  # held out, nats a response token


def facts(step: int) -> dict:
    """What a file's header says of the run."""
    return {"script": SCRIPT, "settings": settings, "commit": commit, "started": started, "step": step,
            "template": template}


def save_best(step: int, val: float):
    header = {**facts(step), "losses": {"val": val}}
    if kind == "full" or merge:
        save_merged(result, model, {**entries_to_keep(meta, form), **header, "tokenizer": meta["tokenizer"]})
    else:
        save_adapter(result, model, {**header, "targets": targets, "base_bits": base_bits}, fingerprint,
                     [checkpoint, *adapter])
        if peft:
            save_peft(os.path.join(out_dir, "peft"), model, meta)


def save_state(step: int):
    """Write what a resumed run needs. It follows save_best(): if the process is killed between them, the resumed run
    comes to the best step again."""
    arrays = dict(tree_flatten({"model": model.trainable_parameters(), "optimizer": opt.state}))
    save_arrays(state_path, arrays, {**facts(step), "version": VERSION, "losses": losses, "tokens": tokens,
                                     "evaluated": evaluated, "rows": rows_hash, "base": fingerprint})


# ---- loop ------------------------------------------------------------------------------------------------------------

run_folder.start(out_dir, SCRIPT, settings, source, start_step, before.get("started", ""))
rows, record = run_folder.open_rows(out_dir, COLUMNS, settings, start_step)
commit, started = run_folder.git_commit(), run_folder.started(out_dir)
if peft and kind != "full" and not resume:
    save_peft(os.path.join(out_dir, "peft"), model, meta)  # raises here, before training, if PEFT has no such adapter
interrupts = run_folder.catch_stops()
model.train()
pending = None
bar = tqdm(total=max_iters, initial=start_step, unit="step", disable=None, dynamic_ncols=True)


def diverged(what: str):
    kept = f"{result} has step {losses['best_step']}" if losses["best_step"] else "no step was saved"
    raise UserError(f"{what}; {kept}: try a smaller learning_rate")


def finish(number: int, figures: dict[str, mx.array], rates: dict[str, float]):
    """Read the figures of a step and log them, while the device works on the next step."""
    global lap_time, lap_tokens
    loss, norm = figures["loss"].item(), figures["norm"].item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        diverged(f"step {number}: the loss is {loss}, the gradient's norm {norm}")
    if number % log_interval == 0 or number == max_iters:
        speed = lap_tokens / lap_time if lap_time else 0.0
        lap_time, lap_tokens = 0.0, 0
        shown = " ".join(f"{rate:.1e}" for rate in rates.values())
        tqdm.write(f"step {number:6d} | loss {loss:6.4f} | lr {shown} | norm {norm:4.2f} | {speed:7,.0f} tok/s")
        record(step=number, tokens=tokens, train_loss=loss, grad_norm=norm, tok_per_s=round(speed),
               peak_gib=round(mx.get_peak_memory() / 2**30, 3), **rates)


def evaluate_and_best(number: int):
    val = evaluate()
    if not math.isfinite(val):
        diverged(f"step {number}: the loss held out is {val}")
    if number == 0:
        losses["untrained"] = val
    is_best = number > 0 and (losses["best"] is None or val < losses["best"])
    mark = " | best" if is_best and val < losses["untrained"] else ""
    tqdm.write(f"step {number:6d} | val  {val:6.4f} | {mx.get_peak_memory() / 2**30:4.2f} GiB{mark}")
    record(step=number, tokens=tokens, val_loss=val)
    if is_best:
        losses.update(best=val, best_step=number)
        save_best(number, val)


number, tokens, lap_time, lap_tokens = start_step, before.get("tokens", 0), 0.0, 0  # tokens: without padding
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
        save_state(number)
        if stopping or number == max_iters:
            break
    epoch, i = divmod(number, steps_an_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(len(train_rows["idx"]))
    which = order[i * batch_size * grad_accum:(i + 1) * batch_size * grad_accum]
    lap_began, rates = time.perf_counter(), {"learning_rate": learning_rate_at(number, learning_rate)}
    rest.learning_rate = rates["learning_rate"]
    if optimizer == "muon":
        muon.learning_rate = rates["muon_lr"] = learning_rate_at(number, muon_lr)
    mx.random.seed((seed * 2**32 + number) % 2**64)  # of noise and dropout: a resumed run draws equal numbers
    loss, grads, learned = 0.0, None, train_rows["mask"][which].sum()
    for start in range(0, len(which), batch_size):
        micro = which[start:start + batch_size]
        part, new = gradients(batch_of(train_rows, micro), mx.array(train_rows["mask"][micro].sum() / learned))
        loss, grads = loss + part, new if grads is None else tree_map(mx.add, grads, new)
        if start + batch_size < len(which):
            mx.async_eval(loss, grads)  # so that the activations of one micro-step at a time are in memory
    figures = {"loss": loss, "norm": update(grads)}
    mx.async_eval(figures, state)
    number += 1
    if pending:
        finish(*pending)
    pending = number, figures, rates
    lap_time += time.perf_counter() - lap_began
    in_step = int((train_rows["places"][which] < PADDING).sum())
    tokens, lap_tokens = tokens + in_step, lap_tokens + in_step
    bar.update(1)
bar.close()
draw.curves(os.path.join(out_dir, "loss.png"), rows, {"nats a response token": {
    "train_loss": "training", "val_loss": "held out"}}, f"{os.path.basename(data)}, {kind}")
if stopping:
    print(f"stopped at step {number} of {max_iters}, saved {state_path}\n"
          f"go on with: python {shlex.quote(sys.argv[0])} --out_dir={shlex.quote(out_dir)} --resume=True")
    sys.exit(130)

# ---- look at it ------------------------------------------------------------------------------------------------------

for messages, old, new in zip(asked, untrained, answers(), strict=True):
    print(f"\n> {messages[-2]['content'] if len(messages) > 1 else ''}\nbefore: {old}\nafter:  {new}")
print(f"\n{result}: step {losses['best_step']}, loss held out {losses['best']:.4f}, "
      f"{losses['untrained']:.4f} before training\ncurves: {out_dir}/loss.png")
if losses["best"] >= losses["untrained"]:
    print("NO STEP WAS BETTER than the model before training: try a lower learning_rate, or more examples")
prompt = held_out[0][-2:][0]["content"].partition("\n")[0][:60]
print(f"next: python sample.py {shlex.quote(result)} --prompt={shlex.quote(prompt)}")
if kind != "full" and not merge:
    print(f"this adapter needs {meta['files'][0]} as it is; to have both in one file: python merge.py "
          f"{shlex.quote(result)} sft-merged.safetensors")
