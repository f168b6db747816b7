"""Fine-tune a checkpoint on instructions: all of its weights, or an adapter.

    python sft.py out/ckpt.safetensors --data=tasks.jsonl
    python sft.py out/ckpt.safetensors --data=tasks.jsonl --kind=dora --base_bits=4

Each line of the file is {"messages": [{"role", "content"}, ...]}, {"instruction", "input", "output"}, or {"prompt",
"response"}. Only the responses are learned, unless --learn_prompts=True. Several examples are packed into one row of
block_size tokens; each example attends to itself only, and its positions begin at 0. An example that is longer than a
row is cut; one of which no response would be left is skipped, and the number of these is printed.

    OUT_DIR/sft.safetensors      the step with the lowest validation loss: with --kind=full or --merge=True as a whole
                                 checkpoint, else as an adapter for the checkpoint that it was trained on
    OUT_DIR/loss.csv, loss.png   the curves
    OUT_DIR/run.json, source/    the settings of the run and its code

A log line shows: loss, the mean cross-entropy of the response tokens of this update in nats; lr, the learning rate (of
AdamW); norm, the norm of the gradient before clipping; tok/s, tokens per second without padding. After every
eval_interval updates a line shows val, the mean cross-entropy of the response tokens held out, and the peak memory.

Kinds: full, all weights; the adapters lora (Hu et al. 2021), rslora (Kalajdzievski 2023), dora (Liu et al. 2024).
--base_bits quantizes the base before an adapter is attached (QLoRA, Dettmers et al. 2023). --neftune adds noise to the
embeddings (Jain et al. 2023). --optimizer=muon (Jordan et al. 2024) updates matrices, also those of adapters, by Muon.
"""
import math
import os
import time
from functools import partial

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path
from tqdm import tqdm

import draw
import run_folder
from config import UserError, overrides
from conversations import check_template, encode, encode_prompt, end_of_answer, pack, read_conversations, shorten
from lora import KINDS, attach, base_fingerprint, quantize_base, save_adapter, save_merged, save_peft
from model import ON_CPU, PADDING, compute_dtype, generate, load_checkpoint, no_tap, save_checkpoint
from muon import Muon, by_muon
from tokenizer import Tokenizer

checkpoint = "out/ckpt.safetensors"  # from train.py, or an earlier sft.py
# data
data = ""               # jsonl
val_data = ""           # jsonl held out; "": val_share of data
val_share = 0.1         # of the examples
template = ""           # plain | alpaca | chatml | llama3; "": the checkpoint's own, else chatml
learn_prompts = False   # learn the user's turns too: magpie.py needs a model that can write them
packing = True          # put several examples into a row
out_dir = "out-sft"     # the folder of this run
seed = 1337             # of the split, the order and the adapter
# adapter
kind = "lora"           # full | lora | rslora | dora
rank = 8                # of the adapter
alpha = 16.0            # its scale is alpha / rank (rslora: / sqrt(rank))
targets = "attn, mlp"   # linear layers, regular expressions separated by commas: "attn.(q|v)$"
base_bits = 0           # quantize the base to 2 | 3 | 4 | 5 | 6 | 8 bits first; 0: do not
merge = False           # write a checkpoint with the adapter merged into its weights, instead of the adapter
peft = False            # write the adapter also to OUT_DIR/peft, a folder that Hugging Face's PEFT reads
# optimization
epochs = 3              # passes over the examples
batch_size = 4          # rows per update
optimizer = "adamw"     # adamw | muon: for the matrices of the blocks and of adapters, AdamW for the rest
learning_rate = 1e-3    # peak; full fine-tuning needs a tenth
muon_lr = 0.02          # peak, of the matrices under muon
warmup_share = 0.05     # of all updates, linear
min_lr = 0.1            # learning rate at the end of the cosine, as a share of the peak
weight_decay = 0.0      # of matrices, times the learning rate
grad_clip = 1.0         # largest norm of the gradient; 0: no clipping
neftune = 0.0           # noise in the embeddings, over sqrt(tokens * width); 5 is usual; 0: none
# run
eval_interval = 20      # updates between evaluations
log_interval = 5        # updates between log lines
dtype = "auto"          # float32 | bfloat16; auto: bfloat16 on a GPU, float32 on a CPU
compile = not ON_CPU    # mx.compile the step
samples = 2             # held-out prompts that are answered before and after
sample_tokens = 60      # tokens of an answer at most
overwrite = False       # replace the results of another run in OUT_DIR without asking
log = ""                # send the rows of loss.csv also to tensorboard | wandb

settings = overrides(globals(), "checkpoint", "data")

SCRIPT, source = os.path.basename(__file__), run_folder.read_source(__file__)
if not data:
    raise UserError("no examples: give --data=FILE.jsonl")
if kind not in ("full", *KINDS):
    raise UserError(f"kind={kind!r} is not one of full, {', '.join(KINDS)}")
if kind == "full" and base_bits:
    raise UserError(f"base_bits={base_bits} with kind=full: packed weights do not train; take kind=lora")
if optimizer not in ("adamw", "muon"):
    raise UserError(f"optimizer={optimizer!r} is not one of adamw, muon")
for name in ("epochs", "batch_size", "eval_interval", "log_interval"):
    if settings[name] < 1:
        raise UserError(f"{name}={settings[name]}: it must be 1 or more")
if not 0 < val_share < 1:
    raise UserError(f"val_share={val_share}: it must be between 0 and 1")
if dtype == "float16":
    raise UserError("dtype=float16 would need loss scaling: take bfloat16, which has float32's range")
run_folder.check_log(log)
run_folder.check(out_dir, SCRIPT, overwrite)

# ---- data ------------------------------------------------------------------------------------------------------------

conversations = read_conversations(data)
held_out = read_conversations(val_data) if val_data else []
model, meta = load_checkpoint(checkpoint)
if not meta.get("tokenizer"):
    raise UserError(f"{checkpoint} holds no tokenizer: it cannot read conversations")
enc = Tokenizer.from_dict(meta["tokenizer"])
template = check_template(template or meta.get("template") or "chatml")
block_size, rng = model.config.block_size, np.random.default_rng(seed)
if not held_out:
    order = rng.permutation(len(conversations))
    n_val = max(1, round(val_share * len(conversations)))
    if n_val == len(conversations):
        raise UserError(f"{data} has {n_val} example: give two or more, or --val_data")
    held_out = [conversations[i] for i in order[:n_val]]
    conversations = [conversations[i] for i in order[n_val:]]


def rows_of(conversations: list, what: str) -> dict[str, np.ndarray]:
    examples, cut, skipped = shorten([encode(enc, messages, template) for messages in conversations], block_size)
    if learn_prompts:
        examples = [(ids, [True] * len(ids)) for ids, _ in examples]
    if not examples:
        raise UserError(f"no {what} example has a response within {block_size} tokens: train a longer context")
    rows = pack(examples, block_size, packing)
    print(f"{what}: {len(examples)} examples, {sum(len(ids) for ids, _ in examples):,} tokens, "
          f"{int(rows['mask'].sum()):,} to learn, in {len(rows['idx'])} rows of {block_size}")
    if cut or skipped:
        print(f"    {cut} cut at {block_size} tokens; {skipped} SKIPPED, as no response was left")
    return rows


train_rows, val_rows = rows_of(conversations, "training"), rows_of(held_out, "held out")

# ---- model -----------------------------------------------------------------------------------------------------------

working_dtype = compute_dtype(dtype)
fingerprint = base_fingerprint(model)
bytes_before = sum(p.nbytes for _, p in tree_flatten(model.parameters()))
model.compute_dtype = working_dtype
if kind == "full":
    model.set_dtype(mx.float32)
else:
    model.set_dtype(working_dtype)
    quantize_base(model, base_bits)
    paths = attach(model, targets, rank, alpha, kind, seed)
trainable = sum(p.size for _, p in tree_flatten(model.trainable_parameters()))
total = sum(p.nbytes for _, p in tree_flatten(model.parameters()))
print(f"{trainable / 1e6:.2f}M parameters train{'' if kind == 'full' else f' in {len(paths)} layers'}; "
      f"the model takes {total / 1e6:.1f} MB, the checkpoint {bytes_before / 1e6:.1f}")

steps_an_epoch = math.ceil(len(train_rows["idx"]) / batch_size)
max_iters = epochs * steps_an_epoch
opt = rest = optim.Adam(learning_rate, betas=[0.9, 0.95], bias_correction=True)
if optimizer == "muon":
    muon = Muon(muon_lr, dtype=working_dtype)
    opt = optim.MultiOptimizer([muon, rest], [by_muon])
opt.init(model.trainable_parameters())


def learning_rate_at(step: int, peak: float) -> float:
    """The learning rate of an update: linear warmup to the peak, then a cosine."""
    warmup = max(1, round(warmup_share * max_iters))
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(1, max_iters - warmup)
    return peak * (min_lr + (1 - min_lr) * 0.5 * (1 + math.cos(math.pi * share)))


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
def step(batch):
    """One update. Returns its figures: the loss, and the gradient's norm before clipping."""
    loss, grads = nn.value_and_grad(model, loss_of)(batch, noise if neftune else no_tap)
    grads, length = optim.clip_grad_norm(grads, grad_clip or math.inf)

    def decay(path: str, p: mx.array) -> mx.array:
        rate = muon.learning_rate if optimizer == "muon" and by_muon(path, p) else rest.learning_rate
        return p * (1 - weight_decay * rate) if p.ndim > 1 else p

    model.update(tree_map_with_path(decay, model.trainable_parameters()))
    opt.update(model, grads)
    return {"loss": loss, "norm": length}


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

COLUMNS = ["step", "tokens", "seconds", "train_loss", "val_loss", "learning_rate", "grad_norm", "tok_per_s", "peak_gib"]
result = os.path.join(out_dir, "sft.safetensors")
rows = []


def save(step: int, val: float):
    header = {"script": SCRIPT, "settings": settings, "commit": commit, "step": step, "losses": {"val": val},
              "template": template}
    if kind == "full":
        save_checkpoint(result, model, {**header, "tokenizer": meta["tokenizer"]})
    elif merge:
        save_merged(result, model, {**header, "tokenizer": meta["tokenizer"]})
    else:
        save_adapter(result, model, {**header, "targets": targets, "base_bits": base_bits}, fingerprint)
        if peft:
            save_peft(os.path.join(out_dir, "peft"), model)


def record(**row):
    row["seconds"] = round(time.perf_counter() - began, 2)
    rows.append(row)
    run_folder.add_row(out_dir, COLUMNS, row)
    send(row)


def answers() -> list[str]:
    """The model's greedy answers to the first prompts held out."""
    model.eval()
    found = []
    for messages in held_out[:samples]:
        prompt, end = encode_prompt(enc, messages[:-1], template), end_of_answer(enc, template)
        ids = list(generate(model, prompt, sample_tokens, temperature=0, n_vocab=enc.n_vocab))
        found.append(enc.decode(ids[:ids.index(end)] if end in ids else ids))
    model.train()
    return found


# ---- loop ------------------------------------------------------------------------------------------------------------

run_folder.start(out_dir, SCRIPT, settings, source)
run_folder.write_rows(out_dir, COLUMNS, rows)
send, commit = run_folder.log_to(log, out_dir, settings), run_folder.git_commit()
if peft and kind != "full":
    save_peft(os.path.join(out_dir, "peft"), model)  # raises here, before training, if PEFT has no such adapter
before, best, pending = answers(), math.inf, None
model.train()
began = time.perf_counter()
bar = tqdm(total=max_iters, unit="step", disable=None, dynamic_ncols=True)


def finish(number: int, figures: dict[str, mx.array], rate: float):
    """Read the figures of a step and log them, while the device works on the next step."""
    global lap_time, lap_tokens
    loss, norm = figures["loss"].item(), figures["norm"].item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise UserError(f"step {number}: the loss is {loss}, the gradient's norm {norm}; {result} holds the best"
                        " step before, if there was one: try a smaller learning_rate")
    if number % log_interval == 0 or number == max_iters:
        speed = lap_tokens / lap_time if lap_time else 0.0
        lap_time, lap_tokens = 0.0, 0
        tqdm.write(f"step {number:6d} | loss {loss:6.4f} | lr {rate:.1e} | norm {norm:4.2f} | {speed:7,.0f} tok/s")
        record(step=number, tokens=tokens, train_loss=loss, learning_rate=rate, grad_norm=norm, tok_per_s=round(speed),
               peak_gib=round(mx.get_peak_memory() / 2**30, 3))


number, tokens, lap_time, lap_tokens = 0, 0, 0.0, 0  # tokens: trained on, without padding
while True:
    if number % eval_interval == 0 or number == max_iters:
        if pending:
            finish(*pending)
            pending = None
        val = evaluate()
        is_best = val < best
        tqdm.write(f"step {number:6d} | val  {val:6.4f} | {mx.get_peak_memory() / 2**30:4.2f} GiB"
                   f"{' | best' if is_best and number else ''}")
        record(step=number, tokens=tokens, val_loss=val)
        if is_best and number:
            best = val
            save(number, val)
        if number == max_iters:
            break
    epoch, i = divmod(number, steps_an_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(len(train_rows["idx"]))
    which = order[i * batch_size:(i + 1) * batch_size]
    lap_began, rate = time.perf_counter(), learning_rate_at(number, learning_rate)
    rest.learning_rate = rate
    if optimizer == "muon":
        muon.learning_rate = learning_rate_at(number, muon_lr)
    figures = step(batch_of(train_rows, which))
    mx.async_eval(figures, state)
    number += 1
    if pending:
        finish(*pending)
    pending = number, figures, rate
    lap_time += time.perf_counter() - lap_began
    in_step = int((train_rows["places"][which] < PADDING).sum())
    tokens, lap_tokens = tokens + in_step, lap_tokens + in_step
    bar.update(1)
bar.close()
draw.curves(os.path.join(out_dir, "loss.png"), rows, {"nats a response token": {
    "train_loss": "training", "val_loss": "held out"}}, f"{os.path.basename(data)}, {kind}")

# ---- look at it ------------------------------------------------------------------------------------------------------

for messages, old, new in zip(held_out, before, answers(), strict=False):
    print(f"\n> {messages[-2]['content'] if len(messages) > 1 else ''}\nbefore: {old}\nafter:  {new}")
print(f"\n{result}: the step with the lowest validation loss, {best:.4f}\ncurves: {out_dir}/loss.png")
