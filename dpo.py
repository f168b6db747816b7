"""Learn from preferences: make the chosen one of two answers to a prompt more probable than the rejected one.

    python dpo.py out-sft/sft.safetensors --data=pairs.jsonl
    python dpo.py out/ckpt.safetensors --data=pairs.jsonl --loss=simpo --kind=full --learning_rate=1e-5
    python dpo.py --resume=True            # goes on after Ctrl-C, after a power cut, or with more --epochs

The pairs may have any layout that records.py lists: prompt, chosen and rejected as texts or as messages, HH's strings,
UltraFeedback's, Orca's, ... --loss=kto also takes single answers with a label. One of them is printed as the model sees
it. A row may have a "probability", from 0 to 1, that its chosen answer is the better one, as constitution.py writes it:
then the loss is the expected one, of both orders of the pair. The reference is the model before the first update. Its
log-probabilities are computed once, so no second copy of the weights is needed. A checkpoint that is an adapter is
merged into its base first. A pair that is longer than block_size tokens is left out.

    OUT_DIR/dpo.safetensors      the step with the lowest validation loss: with --kind=full or --merge=True as a whole
                                 checkpoint, else as an adapter for the checkpoint that it was trained on
    OUT_DIR/resume.safetensors   the last step, and the state of the optimizer
    OUT_DIR/loss.csv, loss.png   the curves
    OUT_DIR/run.json, source/    the settings of the run and its code

Ctrl-C saves the last step and stops. --resume=True continues from there bit for bit, with the settings of that run,
except those on the command line.

A log line shows: loss; acc, the share of pairs whose chosen answer has the larger reward (equal rewards count half);
margin, the mean reward of the chosen answers minus that of the rejected ones; lr, the learning rate; norm, the norm of
the gradient before clipping. After every eval_interval updates a line shows the loss (val), acc and margin of the pairs
held out, and logp, the mean log-probabilities of their chosen and rejected answers in nats: both can fall while their
difference grows. Speed and memory are in loss.csv. The reward is beta times the log-probability of the answer minus the
reference's (dpo, robust, kto), or beta times the mean of this over the tokens (dpo_norm, ipo), or beta times the mean
log-probability of a token (simpo, orpo). acc takes the answer with a probability over 1/2 as the chosen one. kto has no
pairs: there acc is the share of answers whose reward is on the right side of z (see kto() below), and chosen and
rejected are the desirable and the undesirable answers.

Losses: dpo (Rafailov et al. 2023; with label_smoothing Mitchell's cDPO), dpo_norm (by the token: Lambert et al. 2024),
robust (Chowdhury et al. 2024), ipo (Azar et al. 2023, by the token as its authors computed it), kto (Ethayarajh et al.
2024), and without a reference simpo (Meng et al. 2024) and orpo (Hong et al. 2024).
"""
import hashlib
import math
import os
import shlex
import sys
import time
from functools import partial
from typing import NamedTuple

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from tqdm import tqdm

import draw
import run_folder
from config import UserError, check_output, given, overrides
from conversations import encode, entries_to_keep, row_length, template_for_training, written
from lora import KINDS, attach, base_fingerprint, load_adapted, quantize_base, save_adapter, save_merged, save_peft
from lora import merge as merge_adapters
from model import GPT, LOSS_CHUNK, ON_CPU, VERSION, compute_dtype, cross_entropy, gpu_train, load_arrays, save_arrays
from records import read_labelled, read_preferences, show, split, without
from tokenizer import Tokenizer

try:
    import precision as low  # products of 8 or 4 bits
except ImportError:
    low = None
try:
    import packed_states  # optimizers' states of 8 or 4 bits
except ImportError:
    packed_states = None

checkpoint = "out-sft/sft.safetensors"  # a checkpoint or an adapter; one of sft.py suits best
# data
data = ""               # .jsonl, .json, .csv or .parquet
val_data = ""           # a file of pairs held out; "": val_share of data
val_share = 0.1         # of the pairs
template = ""           # own | plain | alpaca | chatml | llama3; "": the checkpoint's, else chatml or llama3
block_size = 0          # tokens of an answer with its prompt; 0: the model's context, at most 1024
strict = False          # refuse a file with a bad row; False: skip the row
out_dir = "out-dpo"     # the folder of this run
resume = False          # continue from OUT_DIR/resume.safetensors
seed = 1337             # of the split, the order, the adapter and dropout
# loss
loss = "dpo"            # dpo | dpo_norm | robust | ipo | simpo | orpo | kto
beta = 0.1              # scale of the reward (dpo_norm: 5, simpo: 2 is usual); orpo: weight of the odds
gamma = 1.0             # simpo: the target margin
label_smoothing = 0.0   # dpo, dpo_norm, robust: assumed share of pairs with chosen and rejected swapped
desirable_weight = 1.0    # kto: of the losses of desirable answers
undesirable_weight = 1.0  # kto: of the losses of undesirable answers
# adapter
adapter = ()            # adapters to merge into the checkpoint first, PATH or PATH:WEIGHT; can be given several times
kind = "lora"           # full | lora | rslora | dora
rank = 8                # of the adapter
alpha = 16.0            # its scale is alpha / rank (rslora: / sqrt(rank))
targets = "attn, mlp"   # linear layers, regular expressions separated by commas
base_bits = 0           # quantize the base to 2 | 3 | 4 | 5 | 6 | 8 bits first; 0: do not
merge = False           # write a checkpoint with the adapter merged into its weights, instead of the adapter
peft = False            # write the adapter also to OUT_DIR/peft, a folder that Hugging Face's PEFT reads
# optimization
epochs = 3              # passes over the pairs
batch_size = 8          # pairs (kto: answers) per micro-step
grad_accum = 1          # micro-steps per update
learning_rate = 2e-4    # peak; full fine-tuning needs a hundredth
warmup_share = 0.1      # of all updates, linear
min_lr = 0.1            # learning rate at the end of the cosine, as a share of the peak
grad_clip = 1.0         # largest norm of the gradient; 0: no clipping
dropout = 0.0           # share of the numbers dropped in training, at GPT-2's places
# run
eval_interval = 20      # updates between evaluations
log_interval = 5        # updates between log lines
dtype = "auto"          # float32 | bfloat16; auto: bfloat16 on a GPU, float32 on a CPU
precision = ""          # fp8 | mxfp8 | nvfp4: the blocks multiply such numbers, simulated; "": those of dtype
precision_off = ""      # choices of nvfp4 to leave out, with commas: stochastic, hadamard, square, last
optimizer_bits = 32     # 8 | 4: keep the optimizer's states as integers of so many bits
compile = not ON_CPU    # mx.compile the step
overwrite = False       # replace the results of another run in OUT_DIR without asking
log = ""                # send the rows of loss.csv also to tensorboard | wandb

settings = overrides(globals(), "checkpoint", "data")

# ---- losses: one number per pair, or per answer, from log-probabilities ----------------------------------------------


class Answers(NamedTuple):
    """Of N answers, each (N,): log-probabilities by the model and by the reference, summed over tokens, and the numbers
    of tokens."""
    pi: mx.array
    ref: mx.array
    n: mx.array


def log_sigmoid(x: mx.array) -> mx.array:
    return -mx.logaddexp(-x, 0)


def dpo(c: Answers, r: Answers, beta: float) -> mx.array:
    """-log sigmoid(beta h),   h = log pi_c / ref_c - log pi_r / ref_r."""
    return -log_sigmoid(beta * ((c.pi - c.ref) - (r.pi - r.ref)))


def dpo_norm(c: Answers, r: Answers, beta: float) -> mx.array:
    """-log sigmoid(beta g),   g = log(pi_c / ref_c) / n_c - log(pi_r / ref_r) / n_r."""
    return -log_sigmoid(beta * ((c.pi - c.ref) / c.n - (r.pi - r.ref) / r.n))


def robust(c: Answers, r: Answers, beta: float, flipped: float) -> mx.array:
    """((1 - e) dpo(c, r) - e dpo(r, c)) / (1 - 2 e): where a share e of the pairs is swapped, its
    expectation is dpo's on the pairs as they should be."""
    return ((1 - flipped) * dpo(c, r, beta) - flipped * dpo(r, c, beta)) / (1 - 2 * flipped)


def ipo(c: Answers, r: Answers, beta: float) -> mx.array:
    """(g - 1 / (2 beta))^2,   g as in dpo_norm."""
    return mx.square((c.pi - c.ref) / c.n - (r.pi - r.ref) / r.n - 1 / (2 * beta))


def simpo(c: Answers, r: Answers, beta: float, gamma: float) -> mx.array:
    """-log sigmoid(beta pi_c / n_c - beta pi_r / n_r - gamma)."""
    return -log_sigmoid(beta * (c.pi / c.n - r.pi / r.n) - gamma)


def orpo(c: Answers, r: Answers, beta: float) -> mx.array:
    """-pi_c / n_c - beta log sigmoid(log odds_c - log odds_r),   odds = p / (1 - p),   p = exp(pi / n)."""
    mean_c, mean_r = (mx.minimum(a.pi / a.n, -1e-6) for a in (c, r))
    log_odds = mean_c - mean_r - (mx.log(-mx.expm1(mean_c)) - mx.log(-mx.expm1(mean_r)))
    return -mean_c - beta * log_sigmoid(log_odds)


def expected(pair_loss, c: Answers, r: Answers, p: mx.array) -> mx.array:
    """The loss of pairs whose c is the better answer with probability p (N,). For dpo this is the cross-entropy with a
    soft label; with p = 1 - e for all, it is cDPO."""
    return p * pair_loss(c, r) + (1 - p) * pair_loss(r, c)


def kto_z(pi_other, ref_other, beta: float) -> mx.array:
    """z = beta max(0, mean of pi - ref over answers to other prompts): an estimate of the KL divergence, which is not
    differentiated."""
    return mx.stop_gradient(beta * mx.maximum((pi_other - ref_other).mean(), 0))


def kto(pi, ref, label, z, beta: float, desirable_weight: float, undesirable_weight: float) -> mx.array:
    """w_d (1 - sigmoid(beta (pi - ref) - z)) for an answer whose label is 1, w_u (1 - sigmoid(z - beta (pi - ref)))
    for one whose label is 0; between both for a probability."""
    distance = beta * (pi - ref) - z
    return label * desirable_weight * mx.sigmoid(-distance) + (1 - label) * undesirable_weight * mx.sigmoid(distance)


def answer_log_probs(model: GPT, ids: mx.array, learned: mx.array) -> mx.array:
    """Log-probability of each row's answer, summed over its tokens: ids (N, T + 1), learned (N, T + 1) -> (N,). learned
    is 1 for the tokens of the answer and 0 for all others. At most LOSS_CHUNK logits are in memory at a time; they are
    computed again for the gradient."""
    hidden, targets = model.norm(model.residual(ids[:, :-1])).flatten(0, 1), ids[:, 1:].flatten()
    head, rows = model.embed if model.config.tie else model.head, max(1, LOSS_CHUNK // model.config.vocab_size)
    starts = range(0, len(targets), rows)

    def nats_of(parameters, x, start):
        head.update(parameters)  # MLX differentiates by the arguments of a function, not by variables that it captures
        return cross_entropy(model.project(x), targets[start:start + rows])

    def after(before: list, x):
        """x, which is computed once the last array of a list is there: else all logits would be in memory together."""
        return mx.depends([x], [before[-1]])[0] if before else x

    @mx.custom_function
    def all_nats(parameters, x):
        found = []
        for start in starts:
            found.append(nats_of(parameters, after(found, x[start:start + rows]), start))
        return mx.concatenate(found)

    @all_nats.vjp
    def backward(primals, cotangent, _):
        (parameters, x), found = primals, []
        gradient = tree_map(lambda p: mx.zeros(p.shape), parameters)
        for start in starts:
            dp, dx = mx.grad(lambda p, x, start=start: (nats_of(p, x, start) * cotangent[start:start + rows]).sum(),
                             (0, 1))(parameters, after(found, x[start:start + rows]))
            gradient = tree_map(lambda total, g: total + g.astype(mx.float32), gradient, dp)
            found.append(dx)
        return tree_map(lambda g, p: g.astype(p.dtype), gradient, parameters), mx.concatenate(found)

    parameters = head.trainable_parameters()
    nats = all_nats(parameters, hidden)
    head.update(parameters)  # instead of the traced arrays that nats_of() left there
    return -(nats.reshape(len(ids), -1) * learned[:, 1:]).sum(1)


# ---- resume: the settings of the run apply, except those on the command line -----------------------------------------

SCRIPT, source = os.path.basename(__file__), run_folder.read_source(__file__)
result, state_path = os.path.join(out_dir, "dpo.safetensors"), os.path.join(out_dir, "resume.safetensors")
LASTING = ("checkpoint", "adapter", "data", "val_data", "val_share", "template", "block_size", "seed", "loss", "beta",
           "gamma", "label_smoothing", "desirable_weight", "undesirable_weight", "kind", "rank", "alpha", "targets",
           "base_bits", "merge", "batch_size", "grad_accum", "optimizer_bits")
start_step, trained, before = 0, {}, {}  # trained, before: the arrays and the header of the last step
if resume:
    run_folder.check_maker(state_path, SCRIPT, out_dir)
    trained, before = load_arrays(state_path)
    settings.update(run_folder.old_settings(state_path, before, settings, LASTING))
    globals().update(settings)
    start_step = before["step"]

if not data:
    raise UserError("no pairs: give --data=FILE, a .jsonl, .json, .csv or .parquet")
OWN_SETTINGS = {"dpo": ["label_smoothing"], "dpo_norm": ["label_smoothing"], "robust": ["label_smoothing"], "ipo": [],
                "simpo": ["gamma"], "orpo": [], "kto": ["desirable_weight", "undesirable_weight"]}  # beside beta
if loss not in OWN_SETTINGS:
    raise UserError(f"loss={loss!r} is not one of {', '.join(OWN_SETTINGS)}")
for name in ("label_smoothing", "gamma", "desirable_weight", "undesirable_weight"):
    if name in given and name not in OWN_SETTINGS[loss]:
        users = ", ".join(other for other, names in OWN_SETTINGS.items() if name in names)
        raise UserError(f"--loss={loss} has no {name}: leave it out, or take another loss ({users})")
if loss == "robust" and not label_smoothing:
    raise UserError("--loss=robust needs the assumed share of swapped pairs: give --label_smoothing=0.1, for example")
if kind not in ("full", *KINDS):
    raise UserError(f"kind={kind!r} is not one of full, {', '.join(KINDS)}")
if kind == "full" and base_bits:
    raise UserError(f"base_bits={base_bits} with kind=full: packed weights do not train; take kind=lora")
if not beta > 0:
    raise UserError(f"beta={beta}: it must be more than 0")
if min(desirable_weight, undesirable_weight) < 0 or not 0 <= label_smoothing < 0.5:
    raise UserError("desirable_weight and undesirable_weight must be 0 or more, label_smoothing from 0 up to 0.5")
if optimizer_bits not in (32, 8, 4) or optimizer_bits < 32 and not packed_states:
    raise UserError(f"optimizer_bits={optimizer_bits}: it must be 32, or with packed_states.py at hand 8 or 4")
run_folder.check_settings(settings, resume)
run_folder.check(out_dir, SCRIPT, overwrite, resume, [checkpoint, *adapter, data, val_data], "resume.safetensors")

# ---- data: pairs (prompt, chosen, rejected, probability); for kto answers (prompt, answer, label) --------------------

read = read_labelled if loss == "kto" else partial(read_preferences, soft=True)
pairs = read(data, strict)
if val_data:
    held_out = read(val_data, strict)
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


def encode_answer(prompt: list[dict], answer: str) -> tuple[list[int], list[bool]]:
    """The tokens of a conversation up to the end of its last answer, and for each whether it is of that answer."""
    earlier = [message | {"weight": 0} for message in prompt]
    ids, learned = encode(enc, [*earlier, {"role": "assistant", "content": answer}], form)
    end = len(ids) - learned[::-1].index(True) if any(learned) else 0
    return ids[:end], learned[:end]


def answer_to_another(pairs: list, i: int) -> str:
    """For kto: the answer of the next example that has another prompt."""
    following = (pairs[(i + k) % len(pairs)] for k in range(1, len(pairs)))
    return next((answer for prompt, answer, _ in following if prompt != pairs[i][0]), pairs[i][1])


def both_rows(pairs: list, i: int) -> list[tuple[list[int], list[bool]]]:
    """Of the chosen and the rejected answer; for kto, of an answer and one to another prompt."""
    prompt, answer, other = pairs[i][:3]
    return [encode_answer(prompt, text) for text in (answer, answer_to_another(pairs, i) if loss == "kto" else other)]


def rows_of(pairs: list, what: str) -> tuple[list, dict[str, np.ndarray]]:
    """The pairs that are learned, and "ids" and "learned" (pairs, 2, T + 1), padded to the longest row; and "label"
    (pairs,), the probability that the first answer is the better one, or for kto a desirable one. A pair that is longer
    than `longest` is left out, as an answer that is cut would be judged by its beginning."""
    numbers, rows = written(range(len(pairs)), lambda i: both_rows(pairs, i), form, strict)
    found, left = [], []
    for i, both in zip(numbers, rows, strict=True):
        if loss == "kto":  # for an estimate, the beginning of an answer is enough
            both[1] = tuple(part[:longest + 1] for part in both[1])
        if all(0 < len(ids) <= longest + 1 for ids, _ in both):
            found.append(both)
            left.append(pairs[i])
    if not found:
        raise UserError(f"no {what} pair fits into {longest} tokens: " + (
            "train a longer context" if longest == model.config.block_size else "give a larger --block_size"))
    T = max(len(row) for both in found for row, _ in both)
    skipped = sum(max(len(ids) for ids, _ in both) > longest + 1 for both in rows)
    ids, learned = np.zeros((len(found), 2, T), np.int32), np.zeros((len(found), 2, T), np.float32)
    for i, both in enumerate(found):
        for part, (row, yes) in enumerate(both):
            ids[i, part, :len(row)], learned[i, part, :len(row)] = row, yes
    labels = np.array([pair[-1] for pair in left], np.float32)
    counted = (f"answers, {(labels > 0.5).sum()} desirable" if loss == "kto" else
               f"pairs, of mean probability {labels.mean():.3f}" if labels.min() < 1 else "pairs")
    print(f"{what}: {len(found)} {counted}, at most {T - 1} tokens"
          f"{f'; {skipped} SKIPPED, over {longest} tokens' if skipped else ''}")
    if what == "training":
        for row, yes in found[0][:1 if loss == "kto" else 2]:
            show(enc, row, yes)
    return left, {"ids": ids, "learned": learned, "label": labels}


longest = row_length(1024, model.config.block_size, block_size)
pairs, train_rows = rows_of(pairs, "training")
held_out, val_rows = rows_of(held_out, "held out")
rows_hash = hashlib.sha256(b"".join(array.tobytes() for rows in (train_rows, val_rows) for array in rows.values()))
rows_hash = rows_hash.hexdigest()
if resume and before["rows"] != rows_hash:
    raise UserError(f"{data} has changed since {state_path} was written: begin anew in another --out_dir")

# ---- model -----------------------------------------------------------------------------------------------------------

working_dtype = compute_dtype(dtype)
fingerprint = meta.get("fingerprint") or base_fingerprint(model)
if resume and before.get("base", fingerprint) != fingerprint:
    raise UserError(f"{checkpoint} has changed since {state_path} was written: put the old file back, or begin anew in "
                    "another --out_dir")
merge_adapters(model)
model.compute_dtype, model.dropout = working_dtype, dropout
if kind == "full":
    if any("scales" in path for path, _ in tree_flatten(model.parameters())):
        raise UserError(f"{checkpoint} has packed weights, which do not train: take --kind=lora")
    model.unfreeze()
    model.set_dtype(mx.float32)
else:
    model.set_dtype(working_dtype)
    quantize_base(model, base_bits)
    attach(model, targets, rank, alpha, kind, seed)
if precision or precision_off:  # while it trains: the reference is computed without rounding, as every evaluation is
    if not low:
        raise UserError(f"precision={precision!r} needs precision.py, which is missing: leave it out")
    low.convert(model, precision, low.parse(precision, precision_off))
print(f"{sum(p.size for _, p in tree_flatten(model.trainable_parameters())) / 1e6:.2f}M parameters train")
steps_an_epoch = math.ceil(len(train_rows["ids"]) / (batch_size * grad_accum))
max_iters = epochs * steps_an_epoch
if resume and start_step >= max_iters:
    raise UserError(f"{state_path} is at step {start_step} of {max_iters} already: give more --epochs")
make = optim.Adam if optimizer_bits == 32 else partial(packed_states.PackedAdam, bits=optimizer_bits)
opt = make(learning_rate, betas=[0.9, 0.95], bias_correction=True)
opt.init(model.trainable_parameters())


def learning_rate_at(step: int) -> float:
    warmup = max(1, round(warmup_share * max_iters))
    if step < warmup:
        return learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(1, max_iters - warmup)
    return learning_rate * (min_lr + (1 - min_lr) * 0.5 * (1 + math.cos(math.pi * share)))


def batch_of(rows: dict, which) -> dict[str, mx.array]:
    return {name: mx.array(array[which]) for name, array in rows.items()}


def side_by_side(x: mx.array) -> mx.array:
    """(B, 2, T) -> (2 B, T): all first answers, then all second ones."""
    return x.swapaxes(0, 1).flatten(0, 1)


# ---- the reference: the log-probabilities before the first update ----------------------------------------------------

log_probs = partial(answer_log_probs, model)
if compile:
    log_probs = mx.compile(log_probs, inputs=model.state)


def add_reference(rows: dict):
    """"reference" (pairs, 2), which simpo and orpo do without."""
    rows["reference"] = np.zeros(rows["ids"].shape[:2], np.float32)
    if loss in ("simpo", "orpo"):
        return
    for start in tqdm(range(0, len(rows["ids"]), batch_size), desc="reference", leave=False, disable=None):
        part = slice(start, start + batch_size)
        ids, learned = (side_by_side(mx.array(rows[name][part])) for name in ("ids", "learned"))
        rows["reference"][part] = np.array(log_probs(ids, learned)).reshape(2, -1).T


model.eval()
add_reference(train_rows)
add_reference(val_rows)
if resume:
    state = tree_unflatten(list(trained.items()))
    model.update(state["model"])
    opt.state = state["optimizer"]

# ---- the step --------------------------------------------------------------------------------------------------------

state = [model.state, opt.state, mx.random.state]
compiled = partial(mx.compile, inputs=state, outputs=state) if compile else lambda f: f


PAIR_LOSSES = {"dpo": partial(dpo, beta=beta), "dpo_norm": partial(dpo_norm, beta=beta),
               "robust": partial(robust, beta=beta, flipped=label_smoothing), "ipo": partial(ipo, beta=beta),
               "simpo": partial(simpo, beta=beta, gamma=gamma), "orpo": partial(orpo, beta=beta)}


def loss_and_figures(batch) -> tuple[mx.array, dict[str, mx.array]]:
    """The mean loss of a batch, and its figures by name: each a sum, and the number of what was summed."""
    ids, learned, label = side_by_side(batch["ids"]), side_by_side(batch["learned"]), batch["label"]
    pi = answer_log_probs(model, ids, learned).reshape(2, -1)
    ref, n = batch["reference"].T, learned[:, 1:].sum(1).reshape(2, -1)
    rewards = beta * (pi - ref) / (1 if loss in ("dpo", "robust", "kto") else n)  # ref is 0 for simpo and orpo
    if loss == "kto":
        z = kto_z(pi[1], ref[1], beta)
        losses = kto(pi[0], ref[0], label, z, beta, desirable_weight, undesirable_weight)
        above, chosen, rejected, second = rewards[0] - z, label, 1 - label, 0  # second: row of pi
    else:
        p = label if loss == "robust" else (1 - label_smoothing) * label + label_smoothing * (1 - label)
        losses = expected(PAIR_LOSSES[loss], Answers(pi[0], ref[0], n[0]), Answers(pi[1], ref[1], n[1]), p)
        above, chosen, rejected, second = rewards[0] - rewards[1], mx.ones(label.shape), mx.ones(label.shape), 1
    right = (mx.sign(label - 0.5) * mx.sign(above) + 1) / 2
    figures = {"loss": (losses, mx.ones(losses.shape)), "accuracy": (right, mx.ones(losses.shape)),
               "reward_chosen": (rewards[0], chosen), "reward_rejected": (rewards[second], rejected),
               "chosen": (pi[0], chosen), "rejected": (pi[second], rejected)}
    return losses.mean(), {name: mx.stack([(x * w).sum(), w.sum()]) for name, (x, w) in figures.items()}


def means(figures: dict[str, mx.array]) -> dict[str, float]:
    """The figures as means, and "margin"; not a number where nothing was summed."""
    found = {name: total / count if count else math.nan
             for name, (total, count) in ((name, figure.tolist()) for name, figure in figures.items())}
    found["margin"] = found.pop("reward_chosen") - found.pop("reward_rejected")
    return found


@compiled
def gradients(batch, share):
    """The figures and gradients of one micro-step, the gradients times its share of the update's pairs."""

    def shared_loss(batch):
        value, figures = loss_and_figures(batch)
        return share * value, figures

    (_, figures), grads = nn.value_and_grad(model, shared_loss)(batch)
    return figures, grads


@compiled
def update(grads):
    """Clip and apply. Returns the gradient's norm before clipping."""
    if gpu_train and (length := gpu_train.adamw(model, opt, grads, grad_clip or math.inf, 0.0)) is not None:
        return length
    grads, length = (gpu_train or optim).clip_grad_norm(grads, grad_clip or math.inf)
    opt.update(model, grads)
    return length


validation_figures = compiled(lambda batch: loss_and_figures(batch)[1])


def evaluate() -> dict[str, float]:
    """The mean figures of the pairs held out."""
    model.eval()
    totals = None
    for start in range(0, len(val_rows["ids"]), batch_size):
        figures = validation_figures(batch_of(val_rows, slice(start, start + batch_size)))
        totals = figures if totals is None else tree_map(mx.add, totals, figures)
        mx.eval(totals)
    model.train()
    return means(totals)


# ---- save ------------------------------------------------------------------------------------------------------------

FIGURES = ["accuracy", "margin", "chosen", "rejected"]
COLUMNS = ["step", "tokens", "seconds", "train_loss", "val_loss", *FIGURES, "learning_rate", "grad_norm", "tok_per_s",
           "peak_gib"]
losses = before.get("losses", {"untrained": None, "best": None, "best_step": 0})  # held out


def facts(step: int) -> dict:
    """What a file's header says of the run."""
    return {"script": SCRIPT, "settings": settings, "commit": commit, "started": started, "step": step,
            "template": template}


def finite(figures: dict[str, float]) -> dict[str, float]:
    """The figures for loss.csv, without those that are no number: kto's of a batch without undesirable answers."""
    return {name: figures[name] for name in FIGURES if math.isfinite(figures[name])}


def save_best(step: int, held_out: dict[str, float]):
    header = {**facts(step), "losses": {"val": held_out["loss"], **held_out}}
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


def draw_curves():
    """loss.png: loss, accuracy and log-probabilities, of the training pairs and of those held out."""
    both = []  # rows with other names for their figures: train_accuracy, val_accuracy
    for row in rows:
        split = "val" if row.get("val_loss") else "train"
        both.append({**row, **{f"{split}_{name}": row[name] for name in FIGURES if name in row}})
    panels = {label: {f"{split}_{name}": f"{name}, {which}" for name in names
                      for split, which in (("train", "training"), ("val", "held out"))}
              for label, names in (("loss", ["loss"]), ("accuracy", ["accuracy"]), ("nats", ["chosen", "rejected"]))}
    draw.curves(os.path.join(out_dir, "loss.png"), both, panels, f"{os.path.basename(data)}, {loss}, {kind}")


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


def finish(number: int, figures: dict[str, mx.array], norm: mx.array, rate: float):
    """Read the figures of a step and log them, while the device works on the next step."""
    global lap_time, lap_tokens
    figures, norm = means(figures), norm.item()
    value = figures["loss"]
    if not (math.isfinite(value) and math.isfinite(norm)):
        diverged(f"step {number}: the loss is {value}, the gradient's norm {norm}")
    if number % log_interval == 0 or number in (1, max_iters):
        speed = lap_tokens / lap_time if lap_time else 0.0
        lap_time, lap_tokens = 0.0, 0
        tqdm.write(f"step {number:6d} | loss {value:6.4f} | acc {figures['accuracy']:4.0%} | "
                   f"margin {figures['margin']:6.3f} | lr {rate:.1e} | norm {norm:4.2f}")
        record(step=number, tokens=tokens, train_loss=value, learning_rate=rate, grad_norm=norm,
               tok_per_s=round(speed), peak_gib=round(mx.get_peak_memory() / 2**30, 3),
               **finite(figures))


def evaluate_and_best(number: int):
    figures = evaluate()
    value = figures["loss"]
    if not math.isfinite(value):
        diverged(f"step {number}: the loss held out is {value}")
    if number == 0:
        losses["untrained"] = value
    is_best = number > 0 and (losses["best"] is None or value < losses["best"])
    mark = " | best" if is_best and value < losses["untrained"] else ""
    tqdm.write(f"step {number:6d} | val {value:7.4f} | acc {figures['accuracy']:4.0%} | "
               f"margin {figures['margin']:6.3f} | logp {figures['chosen']:6.4g} {figures['rejected']:6.4g}{mark}")
    record(step=number, tokens=tokens, val_loss=value, **finite(figures))
    if is_best:
        losses.update(best=value, best_step=number)
        save_best(number, figures)


lengths = train_rows["ids"].shape[-1] - train_rows["learned"][..., ::-1].argmax(-1)  # the answer ends a row
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
    order = np.random.default_rng([seed, epoch]).permutation(len(train_rows["ids"]))
    which = order[i * batch_size * grad_accum:(i + 1) * batch_size * grad_accum]
    lap_began, rate = time.perf_counter(), learning_rate_at(number)
    opt.learning_rate = rate
    mx.random.seed((seed * 2**32 + number) % 2**64)  # of dropout: a resumed run draws equal numbers
    figures = grads = None
    for start in range(0, len(which), batch_size):
        micro = which[start:start + batch_size]
        new = gradients(batch_of(train_rows, micro), mx.array(len(micro) / len(which)))
        figures, grads = new if grads is None else tree_map(mx.add, (figures, grads), new)
        if start + batch_size < len(which):
            mx.async_eval(figures, grads)  # so that the activations of one micro-step at a time are in memory
    norm = update(grads)
    mx.async_eval(figures, norm, state)
    number += 1
    if pending:
        finish(*pending)
    pending = number, figures, norm, rate
    lap_time += time.perf_counter() - lap_began
    in_step = int(lengths[which].sum())
    tokens, lap_tokens = tokens + in_step, lap_tokens + in_step
    bar.update(1)
bar.close()
draw_curves()
if stopping:
    print(f"stopped at step {number} of {max_iters}, saved {state_path}\n"
          f"go on with: python {shlex.quote(sys.argv[0])} --out_dir={shlex.quote(out_dir)} --resume=True")
    sys.exit(130)
print(f"{result}: step {losses['best_step']}, loss held out {losses['best']:.4f}, "
      f"{losses['untrained']:.4f} before training\ncurves: {out_dir}/loss.png")
if losses["best"] >= losses["untrained"]:
    print("NO STEP WAS BETTER than the model before training: try a lower learning_rate, or more pairs")
prompt = held_out[0][0][-1]["content"].partition("\n")[0][:60]
print(f"next: python sample.py {shlex.quote(result)} --prompt={shlex.quote(prompt)}")
if kind != "full" and not merge:
    print(f"this adapter needs {meta['files'][0]} as it is; to have both in one file: python merge.py "
          f"{shlex.quote(result)} dpo-merged.safetensors")
