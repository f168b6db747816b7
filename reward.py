"""Train a reward model from preferences: a number for any answer, higher for the chosen one of a pair.

    python reward.py out-sft/sft.safetensors --data=pairs.jsonl
    python reward.py out-sft/sft.safetensors --data=pairs.jsonl --kind=full --learning_rate=1e-5 --center=0.01
    python reward.py --resume=True            # goes on after Ctrl-C, after a power cut, or with more --epochs

The pairs are those that dpo.py reads, in any layout that records.py lists. A row may have a number "margin", by which
the rewards of its answers should differ at least. The reward is a product of one learned vector with the state at the
last token of the answer, the one that ends it (reward_model.py). ppo.py and grpo.py take the file as --reward. A pair
that is longer than block_size tokens is left out.

    OUT_DIR/reward.safetensors   the step with the lowest loss held out: with --kind=full or --merge=True as a whole
                                 model, else as an adapter for the checkpoint that it was trained on; and the vector
    OUT_DIR/resume.safetensors   the last step, and the state of the optimizer
    OUT_DIR/loss.csv, loss.png   the curves
    OUT_DIR/calibration.png, calibration.csv   of the pairs held out, at the step that was saved: how often the model
                                 is right about a pair, by how sure it is
    OUT_DIR/run.json, source/    the settings of the run and its code

Ctrl-C saves the last step and stops. --resume=True continues from there bit for bit, with the settings of that run,
except those on the command line.

A log line shows: loss; acc, the share of pairs whose chosen answer has the larger reward (equal rewards count half);
margin, the mean reward of the chosen answers minus that of the rejected ones; lr; norm, of the gradient before
clipping. After every eval_interval updates a line (val) shows these of the pairs held out, and ECE, the calibration
error: p = sigmoid(difference of the rewards) is how probable the model finds it that an answer is the better one; in
ten bins of p from 0.5 to 1 the share of pairs on which it is right is compared with the mean p, and ECE is the mean
distance, weighted by the pairs in a bin (Guo et al. 2017). docs/rewards.md explains every column.

Loss: -log sigmoid(r_c - r_r - margin) + center (r_c + r_r)^2 (Bradley and Terry 1952; Ouyang et al. 2022; the last
term, which keeps rewards near 0: Eisenstein et al. 2023).
"""
import csv
import hashlib
import io
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
from mlx.utils import tree_flatten, tree_unflatten
from tqdm import tqdm

import draw
import rollouts
import run_folder
from config import UserError, check_output, overrides
from conversations import entries_to_keep, row_length, template_for_training, written
from lora import KINDS, base_fingerprint, load_adapted, save_adapter, save_merged
from model import ON_CPU, VERSION, gpu_train, load_arrays, save_arrays
from records import read_preferences, show, split, to_pairs, without
from reward_model import encode_answer, scores
from rows import read_rows
from tokenizer import Tokenizer

checkpoint = "out-sft/sft.safetensors"  # a checkpoint or an adapter; one of sft.py suits best
# data
data = ""               # .jsonl, .json, .csv or .parquet
val_data = ""           # a file of pairs held out; "": val_share of data
val_share = 0.1         # of the pairs
template = ""           # own | plain | alpaca | chatml | llama3; "": the checkpoint's, else chatml or llama3
block_size = 0          # tokens of an answer with its prompt; 0: the model's context, at most 1024
strict = False          # refuse a file with a bad row; False: skip the row
out_dir = "out-reward"  # the folder of this run
resume = False          # continue from OUT_DIR/resume.safetensors
seed = 1337             # of the split, the order and the adapter
# loss
center = 0.0            # weight of (r_c + r_r)^2, which keeps rewards near 0; 0.01 is usual
# adapter
adapter = ()            # adapters to merge into the checkpoint first, PATH or PATH:WEIGHT; can be given several times
kind = "lora"           # full | lora | rslora | dora
rank = 8                # of the adapter
alpha = 16.0            # its scale is alpha / rank (rslora: / sqrt(rank))
targets = "attn, mlp"   # linear layers, regular expressions separated by commas
base_bits = 0           # quantize the base to 2 | 3 | 4 | 5 | 6 | 8 bits first; 0: do not
merge = False           # write a whole model with the adapter merged into its weights, instead of the adapter
# optimization
epochs = 3              # passes over the pairs
batch_size = 16         # pairs in an update
learning_rate = 5e-4    # peak; full fine-tuning of a model of more than some millions of weights needs a hundredth
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

# ---- loss, and calibration -------------------------------------------------------------------------------------------


def bradley_terry(chosen, rejected, margin, center: float) -> mx.array:
    """-log sigmoid(r_c - r_r - margin) + center (r_c + r_r)^2, of each pair: all (B,)."""
    return mx.logaddexp(rejected + margin - chosen, 0) + center * mx.square(chosen + rejected)


def reliability(differences: np.ndarray, bins: int = 10) -> tuple[list[dict], float]:
    """(the bins that hold pairs, ECE) from r_c - r_r of each pair. A pair's confidence is p = sigmoid(|r_c - r_r|), and
    its answer is right where the chosen one has the larger reward (half where they are equal)."""
    p, right = 1 / (1 + np.exp(-np.abs(differences))), (np.sign(differences) + 1) / 2
    of, found = np.minimum(((p - 0.5) * 2 * bins).astype(int), bins - 1), []
    for i in sorted({*of.tolist()}):
        found.append({"from": 0.5 + i / (2 * bins), "to": 0.5 + (i + 1) / (2 * bins), "pairs": int((of == i).sum()),
                      "confidence": p[of == i].mean(), "accuracy": right[of == i].mean()})
    return found, sum(one["pairs"] * abs(one["confidence"] - one["accuracy"]) for one in found) / len(p)


# ---- resume: the settings of the run apply, except those on the command line -----------------------------------------

SCRIPT, source = os.path.basename(__file__), run_folder.read_source(__file__)
result, state_path = os.path.join(out_dir, "reward.safetensors"), os.path.join(out_dir, "resume.safetensors")
LASTING = ("checkpoint", "adapter", "data", "val_data", "val_share", "template", "block_size", "seed", "center", "kind",
           "rank", "alpha", "targets", "base_bits", "merge", "batch_size")
start_step, trained, before = 0, {}, {}  # trained, before: the arrays and the header of the last step
if resume:
    run_folder.check_maker(state_path, SCRIPT, out_dir)
    trained, before = load_arrays(state_path)
    settings.update(run_folder.old_settings(state_path, before, settings, LASTING))
    globals().update(settings)
    start_step = before["step"]

if not data:
    raise UserError("no pairs: give --data=FILE, a .jsonl, .json, .csv or .parquet")
if kind not in ("full", *KINDS):
    raise UserError(f"kind={kind!r} is not one of full, {', '.join(KINDS)}")
if kind == "full" and base_bits:
    raise UserError(f"base_bits={base_bits} with kind=full: packed weights do not train; take kind=lora")
rollouts.refuse_idle(*((name, "with --kind=full", kind != "full") for name in ("rank", "alpha", "targets", "merge")),
                     ("val_share", "with --val_data", not val_data))
if not 0 <= center < math.inf:
    raise UserError(f"center={center}: it must be 0 or more")
run_folder.check_settings(settings, resume)
run_folder.check(out_dir, SCRIPT, overwrite, resume, [checkpoint, *adapter, data, val_data], "resume.safetensors")

# ---- data ------------------------------------------------------------------------------------------------------------


def margins_of(path: str, pairs: list) -> np.ndarray:
    """The number "margin" of each pair's row, 0 where it has none: (pairs,)."""
    found = {}
    for where, row in read_rows(path):
        row = {str(name).lower(): x for name, x in row.items() if x is not None} if isinstance(row, dict) else {}
        if row.get("margin", "") == "":
            continue
        try:
            margin = float(row["margin"])
        except (TypeError, ValueError):
            margin = math.nan
        if not math.isfinite(margin):
            raise UserError(f"{where}: the margin is {str(row['margin'])[:30]!r}, not a finite number")
        try:
            found |= {repr(pair): margin for pair in to_pairs(row)[2]}
        except ValueError:  # read_preferences() has told that this row is skipped
            pass
    return np.array([found.get(repr(pair), 0) for pair in pairs], np.float32)


pairs = read_preferences(data, strict)
if val_data:
    held_out = read_preferences(val_data, strict)
    pairs = without(pairs, held_out)
else:
    pairs, held_out = split(pairs, val_share, seed)
model, meta = load_adapted(checkpoint, adapter)
for path in (result, state_path):
    check_output(path, *meta["files"])  # the base of an adapter is an input, too
if not meta.get("tokenizer"):
    raise UserError(f"{checkpoint} holds no tokenizer: it cannot read pairs")
enc = Tokenizer.from_dict(meta["tokenizer"])
form = template_for_training(meta, enc, template, before.get("started"))
template = getattr(form, "name", form)


def rows_of(pairs: list, path: str, what: str) -> dict[str, np.ndarray]:
    """"ids" (pairs, 2, T), padded to the longest row, "last" (pairs, 2), the place of its last token, and "margin"
    (pairs,). A pair that is longer than `longest` is left out, as an answer that is cut has another end."""
    numbers, rows = written(range(len(pairs)), lambda i: [
        encode_answer(enc, pairs[i][0], text, form) for text in pairs[i][1:]], form, strict)
    margins, found, left = margins_of(path, pairs), [], []
    for i, both in zip(numbers, rows, strict=True):
        if all(0 < len(ids) <= longest for ids, _ in both):
            found.append(both)
            left.append(margins[i])
    if not found:
        raise UserError(f"no {what} pair fits into {longest} tokens: " + (
            "train a longer context" if longest == model.config.block_size else "give a larger --block_size"))
    last = np.array([[len(ids) - 1 for ids, _ in both] for both in found])
    ids, skipped = np.zeros((len(found), 2, last.max() + 1), np.int32), len(rows) - len(found)
    for i, both in enumerate(found):
        for part, (row, _) in enumerate(both):
            ids[i, part, :len(row)] = row
    print(f"{what}: {len(found)} pairs, at most {last.max() + 1} tokens"
          f"{f'; {skipped} SKIPPED, over {longest} tokens' if skipped else ''}")
    if what == "training":
        for row, yes in found[0]:
            show(enc, row, yes)
    return {"ids": ids, "last": last.astype(np.int32), "margin": np.array(left, np.float32)}


longest = row_length(1024, model.config.block_size, block_size)
train_rows, val_rows = rows_of(pairs, data, "training"), rows_of(held_out, val_data or data, "held out")
rows_hash = hashlib.sha256(b"".join(array.tobytes() for rows in (train_rows, val_rows) for array in rows.values()))
rows_hash = rows_hash.hexdigest()
if resume and before["rows"] != rows_hash:
    raise UserError(f"{data} has changed since {state_path} was written: begin anew in another --out_dir")

# ---- model -----------------------------------------------------------------------------------------------------------

fingerprint = meta.get("fingerprint") or base_fingerprint(model)
if resume and before.get("base", fingerprint) != fingerprint:
    raise UserError(f"{checkpoint} has changed since {state_path} was written: put the old file back, or begin anew in "
                    "another --out_dir")
rollouts.adapted(model, settings, checkpoint)
both = nn.Module()  # what trains: the model, and the vector, from 0, so that all rewards are equal at first
both.model, both.reward = model, mx.zeros(model.config.n_embd)
print(f"{sum(p.size for _, p in tree_flatten(both.trainable_parameters())) / 1e6:.2f}M parameters train")
steps_an_epoch = math.ceil(len(train_rows["ids"]) / batch_size)
max_iters = epochs * steps_an_epoch
if resume and start_step >= max_iters:
    raise UserError(f"{state_path} is at step {start_step} of {max_iters} already: give more --epochs")
opt = optim.Adam(learning_rate, betas=[0.9, 0.95], bias_correction=True)
opt.init(both.trainable_parameters())
if resume:
    state = tree_unflatten(list(trained.items()))
    both.update(state["model"])
    opt.state = state["optimizer"]


def learning_rate_at(step: int) -> float:
    warmup = max(1, round(warmup_share * max_iters))
    if step < warmup:
        return learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(1, max_iters - warmup)
    return learning_rate * (min_lr + (1 - min_lr) * 0.5 * (1 + math.cos(math.pi * share)))


# ---- the step --------------------------------------------------------------------------------------------------------

state = [both.state, opt.state]
compiled = partial(mx.compile, inputs=state, outputs=state) if compile else lambda f: f


def rewards_of(batch) -> mx.array:
    """(2, B): of the chosen and of the rejected answers."""
    ids, last = (batch[name].swapaxes(0, 1).flatten(0, 1) for name in ("ids", "last"))
    return scores(model, both.reward, ids, last).reshape(2, -1)


@compiled
def step(batch):
    """An update. Returns the loss and the gradient's norm before clipping, and the rewards (2, B)."""

    def loss_of(batch):
        rewards = rewards_of(batch)
        return bradley_terry(*rewards, batch["margin"], center).mean(), rewards

    (value, rewards), grads = nn.value_and_grad(both, loss_of)(batch)
    if gpu_train and (norm := gpu_train.adamw(both, opt, grads, grad_clip or math.inf, 0.0)) is not None:
        return value, norm, rewards
    grads, norm = (gpu_train or optim).clip_grad_norm(grads, grad_clip or math.inf)
    opt.update(both, grads)
    return value, norm, rewards


rewards_now = compiled(rewards_of)


def batch_of(rows: dict, which) -> dict[str, mx.array]:
    return {name: mx.array(array[which]) for name, array in rows.items()}


def figures_of(rewards: np.ndarray) -> dict[str, float]:
    difference = rewards[0] - rewards[1]
    return {"accuracy": ((np.sign(difference) + 1) / 2).mean(), "margin": difference.mean(), "reward": rewards.mean(),
            "deviation": rewards.std()}


def evaluate() -> tuple[dict[str, float], np.ndarray]:
    """The figures of the pairs held out, and the differences of their rewards."""
    model.eval()
    parts = [np.array(rewards_now(batch_of(val_rows, slice(start, start + batch_size))))
             for start in range(0, len(val_rows["ids"]), batch_size)]
    model.train()
    rewards = np.concatenate(parts, 1).astype(np.float64)
    losses = bradley_terry(*mx.array(rewards.astype(np.float32)), mx.array(val_rows["margin"]), center)
    return {"val_loss": losses.mean().item(), "ece": reliability(rewards[0] - rewards[1])[1],
            **figures_of(rewards)}, rewards[0] - rewards[1]


# ---- save ------------------------------------------------------------------------------------------------------------

COLUMNS = ["step", "tokens", "seconds", "train_loss", "val_loss", "accuracy", "margin", "reward", "deviation", "ece",
           "learning_rate", "grad_norm", "tok_per_s", "peak_gib"]
losses = before.get("losses", {"untrained": None, "best": None, "best_step": 0})  # held out


def facts(step: int) -> dict:
    """What a file's header says of the run."""
    return {"script": SCRIPT, "settings": settings, "commit": commit, "started": started, "step": step,
            "template": template}


def save_best(step: int, found: dict[str, float], differences: np.ndarray):
    header = {**facts(step), "losses": {"val": found["val_loss"], **found}, "reward": {"center": center}}
    more = {"reward.weight": both.reward}
    if kind == "full" or merge:
        save_merged(result, model, {**entries_to_keep(meta, form), **header, "tokenizer": meta["tokenizer"]}, more)
    else:
        save_adapter(result, model, {**header, "targets": targets, "base_bits": base_bits}, fingerprint,
                     [checkpoint, *adapter], more)
    bins, _ = reliability(differences)
    table = io.StringIO()
    writer = csv.DictWriter(table, [*bins[0]], lineterminator="\n")
    writer.writeheader()
    writer.writerows(bins)
    draw.write_whole(os.path.join(out_dir, "calibration.csv"), table.getvalue().encode())


def save_state(step: int):
    """Write what a resumed run needs. It follows save_best(): if the process is killed between them, the resumed run
    comes to the best step again."""
    arrays = dict(tree_flatten({"model": both.trainable_parameters(), "optimizer": opt.state}))
    save_arrays(state_path, arrays, {**facts(step), "version": VERSION, "losses": losses, "tokens": tokens,
                                     "evaluated": evaluated, "rows": rows_hash, "base": fingerprint})


def draw_calibration():
    """calibration.png: the share of pairs on which the saved model is right, by how sure it is; dots grow with the
    pairs."""
    from matplotlib.figure import Figure

    path = os.path.join(out_dir, "calibration.csv")
    if not os.path.exists(path):
        return
    with open(path, newline="") as file:
        bins = [*csv.DictReader(file)]
    x, y, count = (np.array([float(one[name]) for one in bins]) for name in ("confidence", "accuracy", "pairs"))
    figure, blue = Figure(figsize=(5, 4.5), layout="constrained"), draw.COLOURS[0]
    axes = figure.subplots()
    axes.plot([50, 100], [50, 100], ":", color="gray", label="calibrated")
    axes.errorbar(100 * x, 100 * y, 100 * np.sqrt(y * (1 - y) / count), fmt="none", ecolor=blue, lw=1)
    axes.scatter(100 * x, 100 * y, 20 + 300 * count / count.sum(), color=blue, alpha=0.7, label="pairs held out")
    axes.set(xlabel="probability that the model gives its choice, %", ylabel="how often it is right, %",
             xlim=(48, 102), ylim=(-3, 103))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.suptitle(f"{count.sum():.0f} pairs held out, step {losses['best_step']}: calibration error "
                    f"{losses['ece']:.3f}")
    draw.write_figure(os.path.join(out_dir, "calibration.png"), figure, dpi=120)


def draw_curves():
    both = []  # rows with other names for their figures: train_accuracy, val_accuracy
    for row in rows:
        split = "val" if row.get("val_loss") else "train"
        both.append({**row, **{f"{split}_{name}": row[name] for name in ("accuracy", "margin") if name in row}})
    panels = {label: {f"{split}_{name}": which for split, which in (("train", "training"), ("val", "held out"))}
              for label, name in (("loss", "loss"), ("accuracy", "accuracy"), ("margin", "margin"))}
    draw.curves(os.path.join(out_dir, "loss.png"), both, panels | {"calibration error": {"ece": "held out"}},
                f"{os.path.basename(data)}, {kind}")


# ---- loop ------------------------------------------------------------------------------------------------------------

run_folder.start(out_dir, SCRIPT, settings, source, start_step, before.get("started", ""))
rows, record = run_folder.open_rows(out_dir, COLUMNS, settings, start_step)
commit, started = run_folder.git_commit(), run_folder.started(out_dir)
interrupts = run_folder.catch_stops()
model.train()
pending = None
bar = tqdm(total=max_iters, initial=start_step, unit="step", disable=None, dynamic_ncols=True)


def diverged(what: str):
    kept = f"{result} has step {losses['best_step']}" if losses["best_step"] else "no step was saved"
    raise UserError(f"{what}; {kept}: try a smaller learning_rate")


def finish(number: int, value: mx.array, norm: mx.array, rewards: mx.array, rate: float):
    """Read the figures of a step and log them, while the device works on the next step."""
    global lap_time, lap_tokens
    value, norm = value.item(), norm.item()
    if not (math.isfinite(value) and math.isfinite(norm)):
        diverged(f"step {number}: the loss is {value}, the gradient's norm {norm}")
    if number % log_interval == 0 or number in (1, max_iters):
        figures, speed = figures_of(np.array(rewards)), lap_tokens / lap_time if lap_time else 0.0
        lap_time, lap_tokens = 0.0, 0
        tqdm.write(f"step {number:6d} | loss {value:6.4f} | acc {figures['accuracy']:4.0%} | "
                   f"margin {figures['margin']:6.3f} | lr {rate:.1e} | norm {norm:4.2f}")
        record(step=number, tokens=tokens, train_loss=value, learning_rate=rate, grad_norm=norm,
               tok_per_s=round(speed), peak_gib=round(mx.get_peak_memory() / 2**30, 3), **figures)


def evaluate_and_best(number: int):
    found, differences = evaluate()
    value = found["val_loss"]
    if not math.isfinite(value):
        diverged(f"step {number}: the loss held out is {value}")
    if number == 0:
        losses["untrained"] = value
    is_best = number > 0 and (losses["best"] is None or value < losses["best"])
    tqdm.write(f"step {number:6d} | val  {value:6.4f} | acc {found['accuracy']:4.0%} | "
               f"margin {found['margin']:6.3f} | ECE {found['ece']:.3f}"
               + " | best" * (is_best and value < losses["untrained"]))
    record(step=number, tokens=tokens, **found)
    if is_best:
        losses.update(best=value, best_step=number, accuracy=float(found["accuracy"]), ece=float(found["ece"]))
        save_best(number, {name: float(x) for name, x in found.items()}, differences)


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
    which = np.random.default_rng([seed, epoch]).permutation(len(train_rows["ids"]))[i * batch_size:][:batch_size]
    lap_began, rate = time.perf_counter(), learning_rate_at(number)
    opt.learning_rate = rate
    new = step(batch_of(train_rows, which))
    mx.async_eval(new, state)
    number += 1
    if pending:
        finish(*pending)
    pending = number, *new, rate
    lap_time += time.perf_counter() - lap_began
    in_step = int((train_rows["last"][which] + 1).sum())
    tokens, lap_tokens = tokens + in_step, lap_tokens + in_step
    bar.update(1)
bar.close()
draw_curves()
draw_calibration()
if stopping:
    print(f"stopped at step {number} of {max_iters}, saved {state_path}\n"
          f"go on with: python {shlex.quote(sys.argv[0])} --out_dir={shlex.quote(out_dir)} --resume=True")
    sys.exit(130)
print(f"{result}: step {losses['best_step']}, loss held out {losses['best']:.4f}, {losses['untrained']:.4f} before "
      f"training; right about {losses['accuracy']:.1%} of {len(val_rows['ids'])} pairs, calibration error "
      f"{losses['ece']:.3f}\ncurves: {out_dir}/loss.png, {out_dir}/calibration.png")
if losses["best"] >= losses["untrained"]:
    print("NO STEP WAS BETTER than equal rewards for all: try a lower learning_rate, or more pairs")
print(f"next: python ppo.py {shlex.quote(checkpoint)} --reward={shlex.quote(result)}, with --task=NAME or --data=FILE")
