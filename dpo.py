"""Learn from preferences: make the chosen one of two answers to a prompt more probable than the rejected one.

    python dpo.py out-sft/sft.safetensors --data=pairs.jsonl
    python dpo.py out/ckpt.safetensors --data=pairs.jsonl --loss=simpo --kind=full --learning_rate=1e-5

Each line of the file is {"prompt", "chosen", "rejected"}: texts, or the prompt as a list of messages. The reference is
the model before the first update. Its log-probabilities are computed once, so no second copy of the weights is needed.

    OUT_DIR/dpo.safetensors      the step with the lowest validation loss: with --kind=full or --merge=True as a whole
                                 checkpoint, else as an adapter for the checkpoint that it was trained on
    OUT_DIR/loss.csv, loss.png   the curves
    OUT_DIR/run.json, source/    the settings of the run and its code

A log line shows: loss; acc, the share of pairs whose chosen answer has the larger reward (equal rewards count half);
margin, the mean reward of the chosen answers minus that of the rejected ones; lr, the learning rate; norm, the norm of
the gradient before clipping. After every eval_interval updates a line shows the loss (val), acc and margin of the pairs
held out, and logp, the mean log-probabilities of their chosen and rejected answers in nats: both can fall while their
difference grows. Speed and memory are in loss.csv. The reward is beta times the log-probability of the answer minus the
reference's (dpo, ipo, kto), or beta times the mean log-probability of its tokens (simpo, orpo).

Losses: dpo (Rafailov et al. 2023; label_smoothing: Mitchell 2023), ipo (Azar et al. 2023), simpo (Meng et al. 2024),
orpo (Hong et al. 2024), kto (Ethayarajh et al. 2024).
"""
import math
import os
import time
from collections import Counter
from functools import partial

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from tqdm import tqdm

import draw
import run_folder
from config import UserError, overrides
from conversations import check_messages, check_template, encode, encode_prompt, read_jsonl, text_of
from lora import KINDS, attach, base_fingerprint, quantize_base, save_adapter, save_merged, save_peft
from model import GPT, ON_CPU, compute_dtype, cross_entropy, load_checkpoint, save_checkpoint
from tokenizer import Tokenizer

checkpoint = "out-sft/sft.safetensors"  # a checkpoint; one that sft.py has tuned suits best
# data
data = ""               # jsonl
val_data = ""           # jsonl held out; "": val_share of data
val_share = 0.1         # of the pairs
template = ""           # plain | alpaca | chatml | llama3; "": the checkpoint's own, else chatml
out_dir = "out-dpo"     # the folder of this run
seed = 1337             # of the split, the order and the adapter
# loss
loss = "dpo"            # dpo | ipo | simpo | orpo | kto
beta = 0.1              # scale of the reward (simpo: 2 is usual); orpo: weight of the odds
gamma = 1.0             # simpo: the target margin
label_smoothing = 0.0   # dpo: assumed share of pairs with chosen and rejected swapped
# adapter
kind = "lora"           # full | lora | rslora | dora
rank = 8                # of the adapter
alpha = 16.0            # its scale is alpha / rank (rslora: / sqrt(rank))
targets = "attn, mlp"   # linear layers, regular expressions separated by commas
base_bits = 0           # quantize the base to 2 | 3 | 4 | 5 | 6 | 8 bits first; 0: do not
merge = False           # write a checkpoint with the adapter merged into its weights, instead of the adapter
peft = False            # write the adapter also to OUT_DIR/peft, a folder that Hugging Face's PEFT reads
# optimization
epochs = 3              # passes over the pairs
batch_size = 8          # pairs per update
learning_rate = 2e-4    # peak; full fine-tuning needs a hundredth
warmup_share = 0.1      # of all updates, linear
min_lr = 0.1            # learning rate at the end of the cosine, as a share of the peak
grad_clip = 1.0         # largest norm of the gradient; 0: no clipping
# run
eval_interval = 20      # updates between evaluations
log_interval = 5        # updates between log lines
dtype = "auto"          # float32 | bfloat16; auto: bfloat16 on a GPU, float32 on a CPU
compile = not ON_CPU    # mx.compile the step
overwrite = False       # replace the results of another run in OUT_DIR without asking
log = ""                # send the rows of loss.csv also to tensorboard | wandb

settings = overrides(globals(), "checkpoint", "data")

SCRIPT, source = os.path.basename(__file__), run_folder.read_source(__file__)

# ---- losses: one number per pair, from the log-probabilities of its answers ------------------------------------------
#
# pi_c, pi_r: the model's log-probabilities of the chosen and of the rejected answer, summed over tokens; ref_c, ref_r:
# the reference's; n_c, n_r: the numbers of tokens.


def log_sigmoid(x: mx.array) -> mx.array:
    return -mx.logaddexp(-x, 0)


def dpo(pi_c, pi_r, ref_c, ref_r, beta: float, label_smoothing: float = 0.0) -> mx.array:
    """-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h),   h = (pi_c - pi_r) - (ref_c - ref_r)."""
    h = (pi_c - pi_r) - (ref_c - ref_r)
    return -(1 - label_smoothing) * log_sigmoid(beta * h) - label_smoothing * log_sigmoid(-beta * h)


def ipo(pi_c, pi_r, ref_c, ref_r, beta: float) -> mx.array:
    """(h - 1 / (2 beta))^2,   h as in dpo."""
    return mx.square((pi_c - pi_r) - (ref_c - ref_r) - 1 / (2 * beta))


def simpo(pi_c, pi_r, n_c, n_r, beta: float, gamma: float) -> mx.array:
    """-log sigmoid(beta pi_c / n_c - beta pi_r / n_r - gamma)."""
    return -log_sigmoid(beta * (pi_c / n_c - pi_r / n_r) - gamma)


def orpo(pi_c, pi_r, n_c, n_r, beta: float) -> mx.array:
    """-pi_c / n_c - beta log sigmoid(log odds_c - log odds_r),   odds = p / (1 - p),   p = exp(pi / n)."""
    mean_c, mean_r = (mx.minimum(pi / n, -1e-6) for pi, n in ((pi_c, n_c), (pi_r, n_r)))
    log_odds = mean_c - mean_r - (mx.log(-mx.expm1(mean_c)) - mx.log(-mx.expm1(mean_r)))
    return -mean_c - beta * log_sigmoid(log_odds)


def kto(pi_c, pi_r, ref_c, ref_r, pi_other, ref_other, beta: float) -> mx.array:
    """The mean of 1 - sigmoid(beta (pi_c - ref_c) - z) and 1 - sigmoid(z - beta (pi_r - ref_r)),   z = beta max(0, mean
    of pi - ref over answers to other prompts): an estimate of the KL divergence, which is not differentiated."""
    z = mx.stop_gradient(beta * mx.maximum((pi_other - ref_other).mean(), 0))
    return (mx.sigmoid(z - beta * (pi_c - ref_c)) + mx.sigmoid(beta * (pi_r - ref_r) - z)) / 2


def answer_log_probs(model: GPT, ids: mx.array, learned: mx.array) -> mx.array:
    """Log-probability of each row's answer, summed over its tokens: ids (N, T + 1), learned (N, T + 1) -> (N,). learned
    is 1 for the tokens of the answer and 0 for all others."""
    logits = model(ids[:, :-1])
    nats = cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1)).reshape(len(ids), -1)
    return -(nats * learned[:, 1:]).sum(1)


# ---- data ------------------------------------------------------------------------------------------------------------

if not data:
    raise UserError("no pairs: give --data=FILE.jsonl")
if loss not in ("dpo", "ipo", "simpo", "orpo", "kto"):
    raise UserError(f"loss={loss!r} is not one of dpo, ipo, simpo, orpo, kto")
if kind not in ("full", *KINDS):
    raise UserError(f"kind={kind!r} is not one of full, {', '.join(KINDS)}")
if kind == "full" and base_bits:
    raise UserError(f"base_bits={base_bits} with kind=full: packed weights do not train; take kind=lora")
for name in ("epochs", "batch_size", "eval_interval", "log_interval", "beta"):
    if settings[name] <= 0:
        raise UserError(f"{name}={settings[name]}: it must be more than 0")
if not 0 < val_share < 1 or not 0 <= label_smoothing < 0.5:
    raise UserError("val_share must be between 0 and 1, label_smoothing from 0 up to 0.5")
if dtype == "float16":
    raise UserError("dtype=float16 would need loss scaling: take bfloat16, which has float32's range")
run_folder.check_log(log)
run_folder.check(out_dir, SCRIPT, overwrite)


def to_pair(line) -> tuple[list[dict], str, str]:
    """The prompt's messages, the chosen and the rejected answer. ValueError says what is wrong."""
    if not isinstance(line, dict):
        raise ValueError("not an object of fields in { }")
    if isinstance(line.get("prompt"), list):
        prompt = check_messages(line["prompt"])
    else:
        prompt = [{"role": "user", "content": text_of(line, "prompt")}]
    answers = []
    for field in ("chosen", "rejected"):
        given = line.get(field)
        if isinstance(given, list):  # messages: the answer is the last of them
            given = {field: ([{"content": ""}, *check_messages(given)])[-1]["content"]}
        answers.append(text_of(given if isinstance(given, dict) else line, field))
        if not answers[-1].strip():
            raise ValueError(f"an empty {field} answer")
    if answers[0] == answers[1]:
        raise ValueError("chosen and rejected are the same")
    return prompt, *answers


pairs = read_jsonl(data, to_pair)
held_out = read_jsonl(val_data, to_pair) if val_data else []
model, meta = load_checkpoint(checkpoint)
if not meta.get("tokenizer"):
    raise UserError(f"{checkpoint} holds no tokenizer: it cannot read pairs")
enc = Tokenizer.from_dict(meta["tokenizer"])
template = check_template(template or meta.get("template") or "chatml")
block_size = model.config.block_size
if not held_out:
    order = np.random.default_rng(seed).permutation(len(pairs))
    n_val = max(1, round(val_share * len(pairs)))
    if n_val == len(pairs):
        raise UserError(f"{data} has {n_val} pair: give two or more, or --val_data")
    held_out, pairs = [pairs[i] for i in order[:n_val]], [pairs[i] for i in order[n_val:]]
N_PARTS = 3 if loss == "kto" else 2  # rows of a pair: chosen, rejected, and the answer to another prompt


def rows_of(pairs: list, what: str) -> dict[str, np.ndarray]:
    """"ids" and "learned" (pairs, N_PARTS, T + 1), padded to the longest row. A pair that is longer than the context
    is left out, as an answer that is cut would be judged by its beginning."""
    found = []
    for i, (prompt, chosen, rejected) in enumerate(pairs):
        answers = [chosen, rejected, pairs[(i + 1) % len(pairs)][1]][:N_PARTS]
        given = len(encode_prompt(enc, prompt, template))
        rows = [encode(enc, [*prompt, {"role": "assistant", "content": answer}], template)[0] for answer in answers]
        if max(map(len, rows)) <= block_size + 1:
            found.append((given, rows))
    if not found:
        raise UserError(f"no {what} pair fits into {block_size} tokens: train a longer context")
    T, skipped = max(len(ids) for _, rows in found for ids in rows), len(pairs) - len(found)
    ids, learned = np.zeros((len(found), N_PARTS, T), np.int32), np.zeros((len(found), N_PARTS, T), np.float32)
    for i, (given, rows) in enumerate(found):
        for part, row in enumerate(rows):
            ids[i, part, :len(row)], learned[i, part, given:len(row)] = row, 1
    print(f"{what}: {len(found)} pairs, at most {T - 1} tokens"
          f"{f'; {skipped} SKIPPED, over {block_size} tokens' if skipped else ''}")
    return {"ids": ids, "learned": learned}


train_rows, val_rows = rows_of(pairs, "training"), rows_of(held_out, "held out")

# ---- model -----------------------------------------------------------------------------------------------------------

working_dtype = compute_dtype(dtype)
fingerprint = base_fingerprint(model)
model.compute_dtype = working_dtype
if kind == "full":
    model.set_dtype(mx.float32)
else:
    model.set_dtype(working_dtype)
    quantize_base(model, base_bits)
    attach(model, targets, rank, alpha, kind, seed)
print(f"{sum(p.size for _, p in tree_flatten(model.trainable_parameters())) / 1e6:.2f}M parameters train")
max_iters = epochs * math.ceil(len(train_rows["ids"]) / batch_size)
opt = optim.Adam(learning_rate, betas=[0.9, 0.95], bias_correction=True)
opt.init(model.trainable_parameters())


def learning_rate_at(step: int) -> float:
    warmup = max(1, round(warmup_share * max_iters))
    if step < warmup:
        return learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(1, max_iters - warmup)
    return learning_rate * (min_lr + (1 - min_lr) * 0.5 * (1 + math.cos(math.pi * share)))


# ---- the step --------------------------------------------------------------------------------------------------------

state = [model.state, opt.state]
compiled = partial(mx.compile, inputs=state, outputs=state) if compile else lambda f: f


def side_by_side(x: mx.array) -> mx.array:
    """(B, N_PARTS, T) -> (N_PARTS B, T): all chosen answers, then all rejected ones."""
    return x.swapaxes(0, 1).flatten(0, 1)


def loss_and_figures(batch) -> tuple[mx.array, dict[str, mx.array]]:
    """The mean loss of a batch, and its figures by name, which are means over the pairs too."""
    B = batch["ids"].shape[0]
    ids, learned = side_by_side(batch["ids"]), side_by_side(batch["learned"])
    pi = answer_log_probs(model, ids, learned).reshape(N_PARTS, B)
    ref, n = batch["reference"].T, learned[:, 1:].sum(1).reshape(N_PARTS, B)
    if loss == "dpo":
        losses = dpo(pi[0], pi[1], ref[0], ref[1], beta, label_smoothing)
    elif loss == "ipo":
        losses = ipo(pi[0], pi[1], ref[0], ref[1], beta)
    elif loss == "simpo":
        losses = simpo(pi[0], pi[1], n[0], n[1], beta, gamma)
    elif loss == "orpo":
        losses = orpo(pi[0], pi[1], n[0], n[1], beta)
    else:
        losses = kto(pi[0], pi[1], ref[0], ref[1], pi[2], ref[2], beta)
    rewards = beta * (pi / n if loss in ("simpo", "orpo") else pi - ref)
    margin = rewards[0] - rewards[1]
    value = losses.mean()
    return value, {"loss": value, "accuracy": ((mx.sign(margin) + 1) / 2).mean(), "margin": margin.mean(),
                   "chosen": pi[0].mean(), "rejected": pi[1].mean()}


@compiled
def step(batch):
    """One update. Returns its figures, among them the norm of the gradient before clipping."""
    (_, figures), grads = nn.value_and_grad(model, loss_and_figures)(batch)
    grads, length = optim.clip_grad_norm(grads, grad_clip or math.inf)
    opt.update(model, grads)
    return {**figures, "norm": length}


validation_figures = compiled(lambda batch: loss_and_figures(batch)[1])


@compiled
def log_probs(ids, learned):
    return answer_log_probs(model, ids, learned)


def add_reference(rows: dict):
    """"reference" (pairs, N_PARTS): the log-probabilities before the first update."""
    parts = []
    for start in tqdm(range(0, len(rows["ids"]), batch_size), desc="reference", leave=False, disable=None):
        ids, learned = (side_by_side(mx.array(rows[name][start:start + batch_size])) for name in ("ids", "learned"))
        parts.append(np.array(log_probs(ids, learned)).reshape(N_PARTS, -1).T)
    rows["reference"] = np.concatenate(parts)


def batch_of(rows: dict, which) -> dict[str, mx.array]:
    return {name: mx.array(array[which]) for name, array in rows.items()}


def evaluate() -> dict[str, float]:
    """The mean figures of the pairs held out."""
    model.eval()
    totals, n = Counter(), len(val_rows["ids"])
    for start in range(0, n, batch_size):
        batch = batch_of(val_rows, slice(start, start + batch_size))
        totals.update({name: figure.item() * len(batch["ids"]) for name, figure in validation_figures(batch).items()})
    model.train()
    return {name: total / n for name, total in totals.items()}


# ---- save ------------------------------------------------------------------------------------------------------------

FIGURES = ["accuracy", "margin", "chosen", "rejected"]
COLUMNS = ["step", "tokens", "seconds", "train_loss", "val_loss", *FIGURES, "learning_rate", "grad_norm", "tok_per_s",
           "peak_gib"]
result = os.path.join(out_dir, "dpo.safetensors")
rows = []


def save(step: int, held_out: dict[str, float]):
    header = {"script": SCRIPT, "settings": settings, "commit": commit, "step": step, "template": template,
              "losses": {"val": held_out["loss"], **held_out}}
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


def draw_curves():
    """loss.png: loss, accuracy and log-probabilities, of the training pairs and of those held out."""
    both = []  # rows with other names for their figures: train_accuracy, val_accuracy
    for row in rows:
        split = "val" if "val_loss" in row else "train"
        both.append({**row, **{f"{split}_{name}": row[name] for name in FIGURES}})
    panels = {label: {f"{split}_{name}": f"{name}, {which}" for name in names
                      for split, which in (("train", "training"), ("val", "held out"))}
              for label, names in (("loss", ["loss"]), ("accuracy", ["accuracy"]), ("nats", ["chosen", "rejected"]))}
    draw.curves(os.path.join(out_dir, "loss.png"), both, panels, f"{os.path.basename(data)}, {loss}, {kind}")


# ---- loop ------------------------------------------------------------------------------------------------------------

run_folder.start(out_dir, SCRIPT, settings, source)
run_folder.write_rows(out_dir, COLUMNS, rows)
send, commit = run_folder.log_to(log, out_dir, settings), run_folder.git_commit()
if peft and kind != "full":
    save_peft(os.path.join(out_dir, "peft"), model)  # raises here, before training, if PEFT has no such adapter
model.eval()
add_reference(train_rows)
add_reference(val_rows)
model.train()
bar = tqdm(total=max_iters, unit="step", disable=None, dynamic_ncols=True)
best, pending, began = math.inf, None, time.perf_counter()


def finish(number: int, figures: dict[str, mx.array], rate: float):
    """Read the figures of a step and log them, while the device works on the next step."""
    global lap_time, lap_tokens
    figures = {name: figure.item() for name, figure in figures.items()}
    value, norm = figures["loss"], figures["norm"]
    if not (math.isfinite(value) and math.isfinite(norm)):
        raise UserError(f"step {number}: the loss is {value}, the gradient's norm {norm}; {result} holds the best"
                        " step before, if there was one: try a smaller learning_rate")
    if number % log_interval == 0 or number in (1, max_iters):
        speed = lap_tokens / lap_time if lap_time else 0.0
        lap_time, lap_tokens = 0.0, 0
        tqdm.write(f"step {number:6d} | loss {value:6.4f} | acc {figures['accuracy']:4.0%} | "
                   f"margin {figures['margin']:6.3f} | lr {rate:.1e} | norm {norm:4.2f}")
        record(step=number, tokens=tokens, train_loss=value, learning_rate=rate, grad_norm=norm,
               tok_per_s=round(speed), peak_gib=round(mx.get_peak_memory() / 2**30, 3),
               **{name: figures[name] for name in FIGURES})


lengths = train_rows["ids"].shape[-1] - train_rows["learned"][..., ::-1].argmax(-1)  # the answer ends a row
number, tokens, lap_time, lap_tokens = 0, 0, 0.0, 0  # tokens: of prompts and answers, without padding
while True:
    if number % eval_interval == 0 or number == max_iters:
        if pending:
            finish(*pending)
            pending = None
        figures = evaluate()
        is_best = number > 0 and figures["loss"] < best
        tqdm.write(f"step {number:6d} | val  {figures['loss']:6.4f} | acc {figures['accuracy']:4.0%} | "
                   f"margin {figures['margin']:6.3f} | logp {figures['chosen']:6.4g} {figures['rejected']:6.4g}"
                   f"{' | best' if is_best else ''}")
        record(step=number, tokens=tokens, val_loss=figures["loss"], **{name: figures[name] for name in FIGURES})
        if is_best:
            best = figures["loss"]
            save(number, figures)
        if number == max_iters:
            break
    epoch, i = divmod(number, max_iters // epochs)
    order = np.random.default_rng([seed, epoch]).permutation(len(train_rows["ids"]))
    which = order[i * batch_size:(i + 1) * batch_size]
    lap_began, rate = time.perf_counter(), learning_rate_at(number)
    opt.learning_rate = rate
    figures = step(batch_of(train_rows, which))
    mx.async_eval(figures, state)
    number += 1
    if pending:
        finish(*pending)
    pending = number, figures, rate
    lap_time += time.perf_counter() - lap_began
    in_step = int(lengths[which].sum())
    tokens, lap_tokens = tokens + in_step, lap_tokens + in_step
    bar.update(1)
bar.close()
draw_curves()
print(f"{result}: the step with the lowest validation loss, {best:.4f}\ncurves: {out_dir}/loss.png")
