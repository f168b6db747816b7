"""Learn from rewards: a model answers each problem several times, and good answers become more probable than bad ones.

    python grpo.py out-sft/sft.safetensors --task=sort
    python grpo.py out-sft/sft.safetensors --task=addition_reversed --loss=dapo --dynamic=True --kind=full
    python grpo.py out-sft/sft.safetensors --data=problems.jsonl --reward=FILE.py
    python grpo.py --resume=True            # goes on after Ctrl-C, after a power cut, or with more --max_iters

tasks.py makes the problems and checks the answers, or reads both from files. The model must be right now and then
before it begins, as sft.py makes it: from answers that are all wrong, nothing is learned. A checkpoint that is an
adapter is merged into its base first. No second model is in memory: the reference is the model without its adapter, or,
with --kind=full, a copy of the first weights, which is kept only if --kl is over 0.

A step: `prompts` problems are drawn and answered `group` times each (a rollout is one answer); each answer gets a
reward and an advantage; then the weights are updated `passes` x `minibatches` times with these answers. From the second
update on the policy is no longer the one that answered: the ratio of both stands in the loss, and is clipped. Their
log-probabilities are both of the training pass, as those of the sampler differ in the last digits.

    OUT_DIR/grpo.safetensors     the step with the highest pass@1 held out: with --kind=full or --merge=True as a whole
                                 checkpoint, else as an adapter for the checkpoint that it was trained on
    OUT_DIR/resume.safetensors   the last step, and the state of the optimizer
    OUT_DIR/loss.csv, loss.png   the curves
    OUT_DIR/run.json, source/    the settings of the run and its code

Ctrl-C saves the last step and stops. --resume=True continues from there bit for bit, with the settings of that run,
except those on the command line.

A log line shows means over the answers of a step: reward; right, the share of right answers; signal, the share of
problems whose answers got different rewards (others teach nothing); len, the tokens of an answer with its end token; H,
the entropy of a token in nats. After every eval_interval steps a line (val) shows, of eval_problems problems held out,
each answered pass_k times at the same temperature: pass@1, the share of right answers; pass@K, the share of problems
with a right one among K; part, the mean partial score; len. More is in loss.csv: docs/grpo.md explains every column.

Losses: grpo (Shao et al. 2024, 2402.03300), dr_grpo (Liu et al. 2025, 2503.20783), dapo (Yu et al. 2025, 2503.14476),
gspo (Zheng et al. 2025, 2507.18071), rloo (Ahmadian et al. 2024, 2402.14740), reinforce (Williams 1992). Departures:
clipping, --dynamic and --overlong go with every loss for which they are given; dapo takes the paper's clip_high by
itself, but --dynamic and --overlong only if they are asked for. What --dynamic cannot fill within `refills` batches is
filled with problems without a signal.
"""
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
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from tqdm import tqdm

import draw
import rollouts
import run_folder
import tasks
from config import UserError, check_output, overrides
from conversations import entries_to_keep, template_for_training
from lora import base_fingerprint, load_adapted, save_adapter, save_merged, save_peft
from model import ON_CPU, VERSION, gpu_train, load_arrays, save_arrays
from rollouts import arrays_of, as_reference, in_parts, log_probs, states
from tokenizer import Tokenizer

checkpoint = "out-sft/sft.safetensors"  # a checkpoint or an adapter; one of sft.py suits best
# problems
task = ""               # copy | reverse | sort | count | addition | addition_reversed | formatted | countdown
difficulty = ""         # of the task's problems, a number or a range such as 3-6; "": the task's own
data = ""               # instead of a task: a file of problems, see tasks.py
val_data = ""           # of data: a file of problems held out; "": val_share of data
val_share = 0.1         # of data: the share of problems held out
reward = ""             # a Python file with reward(prompt, answer) -> float, which is run, or a file of reward.py
success = 1.0           # of that reward, with --data: from which on an answer counts as right
partial_weight = 0.0    # weight of the partial score in the reward, beside right, which has 1
system = ""             # the system message of every problem
template = ""           # own | plain | alpaca | chatml | llama3; "": the checkpoint's, else chatml or llama3
out_dir = "out-grpo"    # the folder of this run
resume = False          # continue from OUT_DIR/resume.safetensors
seed = 1337             # of the problems, the answers and the adapter
# rollouts
prompts = 16            # problems in a step
group = 8               # answers to each
max_new_tokens = 32     # tokens of an answer at most
temperature = 1.0       # at which answers are drawn, and by which the logits are divided in training
dynamic = False         # draw problems until there are so many whose answers got different rewards (DAPO)
refills = 8             # of dynamic: batches of problems in a step at most
overlong = 0            # DAPO's penalty: over the last so many of max_new_tokens it grows from 0 to 1; 0: none
rows = 256              # answers that are drawn at a time; more need more memory
# loss
loss = "grpo"           # grpo | dr_grpo | dapo | gspo | rloo | reinforce
clip_low = 0.0          # a ratio counts from 1 - clip_low; 0: the paper's, 0.2, of gspo 3e-4
clip_high = 0.0         # up to 1 + clip_high; 0: the paper's, 0.2, of dapo 0.28, of gspo 4e-4
kl = 0.0                # weight of the divergence from the model before training; 0: none
passes = 1              # over the answers of a step
minibatches = 1         # updates in a pass, each with its share of the answers
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
max_iters = 200         # steps
batch_size = 128        # answers per micro-step
learning_rate = 5e-4    # peak; full fine-tuning of a model of more than some millions of weights needs a hundredth
warmup_share = 0.05     # of all steps, linear
min_lr = 0.1            # learning rate at the end of the cosine, as a share of the peak
grad_clip = 1.0         # largest norm of the gradient; 0: no clipping
# run
eval_interval = 20      # steps between evaluations
eval_problems = 128     # problems held out, at most
pass_k = 8              # answers to each of them
log_interval = 5        # steps between log lines
dtype = "auto"          # float32 | bfloat16; auto: bfloat16 on a GPU, float32 on a CPU
compile = not ON_CPU    # mx.compile the step
samples = 3             # problems held out that are answered before and after, by the most probable tokens
overwrite = False       # replace the results of another run in OUT_DIR without asking
log = ""                # send the rows of loss.csv also to tensorboard | wandb

settings = overrides(globals(), "checkpoint", "task")

# ---- losses ----------------------------------------------------------------------------------------------------------
#
# N answers of up to A tokens, G to a problem. pi, old, ref (N, A): log-probabilities of the tokens by the model, by the
# model that answered, and by the reference. mask (N, A): 1 for the tokens of the answer, its end token among them.

LOSSES = {"grpo": (0.2, 0.2), "dr_grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4), "rloo": (0.2, 0.2),
          "reinforce": (0.0, 0.0)}  # with the papers' clip_low and clip_high


def advantages(loss: str, rewards: np.ndarray) -> np.ndarray:
    """Of rewards (P, G): r - mean(r) of a problem's answers for dr_grpo, and over their standard deviation (with G - 1)
    + 1e-4 for grpo, dapo and gspo; r - the mean of the problem's other answers for rloo; r - the mean of all for
    reinforce."""
    if loss == "reinforce":
        return rewards - rewards.mean()
    centred = rewards - rewards.mean(1, keepdims=True)
    if loss == "rloo":
        return centred * rewards.shape[1] / (rewards.shape[1] - 1)
    return centred if loss == "dr_grpo" else centred / (rewards.std(1, ddof=1, keepdims=True) + 1e-4)


def token_losses(loss: str, pi, old, advantage, mask, clip_low: float, clip_high: float) -> tuple[mx.array, mx.array]:
    """-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), and where the clipped one is taken; A: advantage (N,).
    rho = exp(pi - old) of a token; for gspo exp of the mean of pi - old over the answer, for rloo of the sum: there
    (N, 1), for all tokens. reinforce: -A pi, without a ratio."""
    if loss == "reinforce":
        return -advantage[:, None] * pi, mx.zeros(pi.shape)
    log_ratio = pi - old
    if loss in ("gspo", "rloo"):
        log_ratio = (log_ratio * mask).sum(1, keepdims=True)
    if loss == "gspo":
        log_ratio = log_ratio / mx.maximum(mask.sum(1, keepdims=True), 1)
    ratio, advantage = mx.exp(log_ratio), advantage[:, None]
    plain, clipped = ratio * advantage, mx.clip(ratio, 1 - clip_low, 1 + clip_high) * advantage
    return -mx.minimum(plain, clipped), (clipped < plain) * mx.ones(pi.shape)


def weights(loss: str, mask: np.ndarray, max_length: int) -> np.ndarray:
    """By which the losses of the tokens (N, A) of an update are summed. grpo, gspo, rloo: the mean over answers of the
    mean over their tokens; dapo: the mean over all tokens; dr_grpo: over N max_length; reinforce: the sum over an
    answer's tokens, and the mean over answers."""
    over = {"dapo": mask.sum(), "dr_grpo": len(mask) * max_length, "reinforce": len(mask)}
    return mask / np.maximum(over.get(loss, len(mask) * mask.sum(1, keepdims=True)), 1)


def divergence(pi, ref) -> mx.array:
    """exp(d) - d - 1,   d = ref - pi: of each token an estimate of KL(pi || ref) without a negative value (k3)."""
    return mx.exp(ref - pi) - (ref - pi) - 1


def overlong_penalty(length: int, max_length: int, cache: int) -> float:
    """0 up to max_length - cache tokens, then (max_length - cache - length) / cache, which is -1 at max_length."""
    return min(0, max_length - cache - length) / cache if cache else 0.0


# ---- resume: the settings of the run apply, except those on the command line -----------------------------------------

SCRIPT, source = os.path.basename(__file__), run_folder.read_source(__file__)
result, state_path = os.path.join(out_dir, "grpo.safetensors"), os.path.join(out_dir, "resume.safetensors")
LASTING = ("checkpoint", "adapter", "task", "difficulty", "data", "val_data", "val_share", "reward", "success",
           "partial_weight", "system", "template", "seed", "prompts", "group", "max_new_tokens", "temperature",
           "dynamic", "refills", "overlong", "loss", "clip_low", "clip_high", "kl", "passes", "minibatches", "kind",
           "rank", "alpha", "targets", "base_bits", "merge", "eval_problems", "pass_k", "rows")
start_step, trained, before = 0, {}, {}  # trained, before: the arrays and the header of the last step
if resume:
    run_folder.check_maker(state_path, SCRIPT, out_dir)
    trained, before = load_arrays(state_path)
    settings.update(run_folder.old_settings(state_path, before, settings, LASTING))
    globals().update(settings)
    start_step = before["step"]

if loss not in LOSSES:
    raise UserError(f"loss={loss!r} is not one of {', '.join(LOSSES)}")
rollouts.check(settings)
rollouts.refuse_idle(("refills", "without --dynamic=True", dynamic),
                     ("clip_low", "with --loss=reinforce", loss != "reinforce"),
                     ("clip_high", "with --loss=reinforce", loss != "reinforce"))
if refills < 1:
    raise UserError(f"refills={refills}: it must be 1 or more")
if group < 2:
    raise UserError(f"group={group}: it must be 2 or more, as answers to one problem are compared")
if not 0 <= overlong <= max_new_tokens:
    raise UserError(f"overlong={overlong}: it must be from 0 to max_new_tokens={max_new_tokens}")
if min(kl, clip_low, clip_high, partial_weight) < 0 or clip_low >= 1:
    raise UserError("kl, clip_low, clip_high and partial_weight must be 0 or more, and clip_low less than 1")
if minibatches > prompts * group:
    raise UserError(f"minibatches={minibatches}: there are only {prompts * group} answers in a step")
if loss == "reinforce" and passes * minibatches > 1:
    raise UserError("loss=reinforce has no ratio to an older policy: take passes=1 and minibatches=1, or another loss")
run_folder.check_settings(settings, resume)
inputs = [checkpoint, *adapter, data, val_data, reward]
run_folder.check(out_dir, SCRIPT, overwrite, resume, inputs, "resume.safetensors")
low, high = clip_low or LOSSES[loss][0], clip_high or LOSSES[loss][1]

# ---- problems --------------------------------------------------------------------------------------------------------

problems = rollouts.read(settings)
model, meta = load_adapted(checkpoint, adapter)
for path in (result, state_path):
    check_output(path, *meta["files"])  # the base of an adapter is an input, too
if not meta.get("tokenizer"):
    raise UserError(f"{checkpoint} holds no tokenizer: it cannot read problems")
enc = Tokenizer.from_dict(meta["tokenizer"])
form = template_for_training(meta, enc, template, before.get("started"))
template, writer = getattr(form, "name", form), rollouts.Writer(model, enc, meta, form, settings)
for one in problems.held_out:
    writer.ids_of(one)  # raises here, before training, if one is too long
if resume and before["rows"] != problems.hash:
    changed = " or ".join(filter(None, (data or "tasks.py", reward)))
    raise UserError(f"{changed} has changed since {state_path} was written: begin anew in another --out_dir")
print(f"{problems.name}: {len(problems.held_out)} problems held out"
      + (f", {len(problems.known):,} for training" if data else "")
      + f"; a step has {prompts} problems with {group} answers of at most {max_new_tokens} tokens")

# ---- model -----------------------------------------------------------------------------------------------------------

fingerprint = meta.get("fingerprint") or base_fingerprint(model)
if resume and before.get("base", fingerprint) != fingerprint:
    raise UserError(f"{checkpoint} has changed since {state_path} was written: put the old file back, or begin anew in "
                    "another --out_dir")
rollouts.adapted(model, settings, checkpoint)
reference = tree_map(mx.array, model.parameters()) if kind == "full" and kl else None
print(f"{sum(p.size for _, p in tree_flatten(model.trainable_parameters())) / 1e6:.2f}M parameters train")
if resume and start_step >= max_iters:
    raise UserError(f"{state_path} is at step {start_step} of {max_iters} already: give more --max_iters")
opt = optim.Adam(learning_rate, betas=[0.9, 0.95], bias_correction=True)
opt.init(model.trainable_parameters())


def learning_rate_at(step: int) -> float:
    warmup = max(1, round(warmup_share * max_iters))
    if step < warmup:
        return learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(1, max_iters - warmup)
    return learning_rate * (min_lr + (1 - min_lr) * 0.5 * (1 + math.cos(math.pi * share)))


# ---- answers ---------------------------------------------------------------------------------------------------------


def drawn_at(step: int) -> dict:
    """The problems of a step and their answers, as a dict of "asked" and "answers" (lists of tokens, N), and (P, G)
    "rewards", "right" and "partial"; with what the step cost: "drawn" answers, and "signal", the share of problems that
    teach something, both before --dynamic chooses."""
    kept, spare, drawn, signals = [], [], 0, 0
    for attempt in range(refills if dynamic else 1):
        first = (step * (refills if dynamic else 1) + attempt) * prompts
        batch = [problems.at(first + i) for i in range(prompts) for _ in range(group)]
        asked = [*map(writer.ids_of, batch)]
        answers = writer.answered(asked, temperature, 0, step, attempt)
        scores = problems.scores(batch, [*map(writer.text_of, answers)])
        for start in range(0, len(batch), group):
            part = slice(start, start + group)
            found = scores[part]
            found[:, 0] += [overlong_penalty(len(answer), max_new_tokens, overlong) for answer in answers[part]]
            teaches = found[:, 0].max() > found[:, 0].min()
            signals += teaches
            (kept if teaches or not dynamic else spare).append((asked[part], answers[part], found))
        drawn += len(asked)
        if len(kept) >= prompts:
            break
    chosen = (kept + spare)[:prompts]
    figures = np.stack([found for _, _, found in chosen])
    return {"asked": [ids for some, _, _ in chosen for ids in some],
            "answers": [answer for _, some, _ in chosen for answer in some],
            "rewards": figures[..., 0], "right": figures[..., 1], "partial": figures[..., 2],
            "drawn": drawn, "signal": signals * group / drawn}


untrained = writer.greedy(problems, samples)
if resume:
    state = tree_unflatten(list(trained.items()))
    model.update(state["model"])
    opt.state = state["optimizer"]

# ---- the step --------------------------------------------------------------------------------------------------------

state = [model.state, opt.state]
compiled = partial(mx.compile, inputs=state, outputs=state) if compile else lambda f: f


def by_model(ids, places, targets) -> list[mx.array]:
    return [log_probs(model, states(model, ids, places), targets, temperature, enc.n_vocab)[0]]


by_model_now = compiled(by_model)


def by_reference(batch: dict[str, np.ndarray]) -> np.ndarray:
    with as_reference(model, reference):
        return in_parts(batch, batch_size, by_model)[0]


@compiled
def gradients(batch):
    """The sums over the tokens of a micro-batch, by name, and the gradients of their weighted loss."""

    def weighted_loss(batch):
        pi, entropy = log_probs(model, states(model, batch["ids"], batch["places"]), batch["targets"], temperature,
                                enc.n_vocab)
        mask = batch["mask"]
        pi = pi * mask  # else a number beyond an answer's end could become infinite, and infinity times 0 is none
        old = batch.get("old", mx.stop_gradient(pi))
        per_token, clipped = token_losses(loss, pi, old, batch["advantages"], mask, low, high)
        figures = {"entropy": entropy, "clipped": clipped, "tokens": mask}
        if "ref" in batch:
            figures["kl"] = divergence(pi, batch["ref"])
            if loss not in ("rloo", "reinforce"):  # there it is in the reward
                per_token = per_token + kl * figures["kl"]
        return (batch["weights"] * per_token).sum(), {name: (x * mask).sum() for name, x in figures.items()}

    (value, figures), grads = nn.value_and_grad(model, weighted_loss)(batch)
    return figures | {"loss": value}, grads


@compiled
def update(grads):
    """Clip and apply. Returns the gradient's norm before clipping."""
    if gpu_train and (length := gpu_train.adamw(model, opt, grads, grad_clip or math.inf, 0.0)) is not None:
        return length
    grads, length = (gpu_train or optim).clip_grad_norm(grads, grad_clip or math.inf)
    opt.update(model, grads)
    return length


def learn(step: int, made: dict) -> dict[str, float]:
    """The updates of a step, from its rollouts. Returns means over their tokens, and of the gradients' norms."""
    batch = arrays_of(made["asked"], made["answers"], max_new_tokens * compile, model.config.block_size)
    if passes * minibatches > 1 or kl and loss in ("rloo", "reinforce"):
        old = in_parts(batch, batch_size, by_model_now)[0]
        if passes * minibatches > 1:
            batch["old"] = old
    rewards = made["rewards"]
    if kl:
        batch["ref"] = by_reference(batch)
        if loss in ("rloo", "reinforce"):  # -kl (log pi - log ref) of the answer, as a part of its reward
            rewards = rewards - kl * (old - batch["ref"]).sum(1).reshape(-1, group)
    batch["advantages"] = advantages(loss, rewards).flatten().astype(np.float32)
    N, totals, norms = len(batch["ids"]), None, []
    for number in range(passes):
        order = np.random.default_rng([seed, step, number]).permutation(N) if minibatches > 1 else np.arange(N)
        for which in np.array_split(order, minibatches):
            part = {name: array[which] for name, array in batch.items()}
            part["weights"] = weights(loss, part["mask"], max_new_tokens).astype(np.float32)
            figures = grads = None
            for start in range(0, len(which), batch_size):
                micro = {name: mx.array(array[start:start + batch_size]) for name, array in part.items()}
                new = gradients(micro)
                figures, grads = new if grads is None else tree_map(mx.add, (figures, grads), new)
                if start + batch_size < len(which):
                    mx.async_eval(figures, grads)  # so that one micro-step's activations at a time are in memory
            norms.append(update(grads))
            totals = figures if totals is None else tree_map(mx.add, totals, figures)
            mx.async_eval(totals, norms, state)
    totals = {name: total.item() for name, total in totals.items()}
    count, updates = totals.pop("tokens"), passes * minibatches
    mean = {name: total / (updates if name == "loss" else count) for name, total in totals.items()}
    return mean | {"grad_norm": sum(norm.item() for norm in norms) / updates}


# ---- save ------------------------------------------------------------------------------------------------------------

COLUMNS = ["step", "rollouts", "tokens", "seconds", "reward", "right", "partial", "signal", "length", "truncated",
           "entropy", "kl", "clipped", "train_loss", "learning_rate", "grad_norm", "val_pass1", "val_passk",
           "val_partial", "val_reward", "val_length", "sampling_s", "learning_s", "peak_gib"]
losses = before.get("losses", {"untrained": None, "best": None, "best_step": 0})  # pass@1 held out


def facts(step: int) -> dict:
    """What a file's header says of the run."""
    return {"script": SCRIPT, "settings": settings, "commit": commit, "started": started, "step": step,
            "template": template}


def save_best(step: int, found: dict[str, float]):
    header = {**facts(step), "losses": found}
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
                                     "drawn": drawn, "evaluated": evaluated, "rows": problems.hash,
                                     "base": fingerprint})


def draw_curves():
    """loss.png: rewards, what is right among the problems held out, and how the answers change."""
    panels = {"share": {"right": "right, training", "val_pass1": "pass@1 held out",
                        "val_passk": f"pass@{pass_k} held out"},
              "share of problems": {"signal": "with a signal"}, "nats": {"entropy": "entropy of a token"},
              "tokens": {"length": "length, training", "val_length": "length held out"}}
    title = f"{os.path.basename(problems.name)}, {loss}, {kind}"
    draw.curves(os.path.join(out_dir, "loss.png"), rows_so_far, panels, title)


# ---- loop ------------------------------------------------------------------------------------------------------------

run_folder.start(out_dir, SCRIPT, settings, source, start_step, before.get("started", ""))
rows_so_far, record = run_folder.open_rows(out_dir, COLUMNS, settings, start_step)
commit, started = run_folder.git_commit(), run_folder.started(out_dir)
if peft and kind != "full" and not resume:
    save_peft(os.path.join(out_dir, "peft"), model, meta)  # raises here, before training, if PEFT has no such adapter
interrupts = run_folder.catch_stops()
model.train()
bar = tqdm(total=max_iters, initial=start_step, unit="step", disable=None, dynamic_ncols=True)


def diverged(what: str):
    kept = f"{result} has step {losses['best_step']}" if losses["best_step"] else "no step was saved"
    raise UserError(f"{what}; {kept}: try a smaller learning_rate")


def evaluate_and_best(number: int):
    found = writer.evaluate(problems, pass_k, temperature)
    value = float(found["val_pass1"])
    if number == 0:
        losses["untrained"] = value
    is_best = number > 0 and (losses["best"] is None or value > losses["best"])
    tqdm.write(f"step {number:5d} | val | pass@1 {value:6.1%} | pass@{pass_k} {found['val_passk']:6.1%} | "
               f"part {found['val_partial']:5.3f} | len {found['val_length']:5.1f}"
               + " | best" * (is_best and value > losses["untrained"]))
    record(step=number, tokens=tokens, rollouts=drawn, **found)
    if is_best:
        losses.update(best=value, best_step=number)
        save_best(number, {name: float(x) for name, x in found.items()})


number, tokens, drawn = start_step, before.get("tokens", 0), before.get("drawn", 0)  # tokens: of answers that taught
evaluated = before.get("evaluated")  # the last step that was
while True:
    stopping, due = interrupts() > 0, number % eval_interval == 0 or number == max_iters
    if stopping or due and number != evaluated:
        if not stopping:
            evaluate_and_best(number)
            evaluated = number
        save_state(number)
        if stopping or number == max_iters:
            break
    clock = time.perf_counter()
    opt.learning_rate = rate = learning_rate_at(number)
    made = drawn_at(number)
    sampled = time.perf_counter()
    found = learn(number, made)
    learned = time.perf_counter()
    number += 1
    if not (math.isfinite(found["loss"]) and math.isfinite(found["grad_norm"])):
        diverged(f"step {number}: the loss is {found['loss']}, the gradient's norm {found['grad_norm']}")
    lengths = [*map(len, made["answers"])]
    tokens, drawn = tokens + sum(lengths), drawn + made["drawn"]
    cut = np.mean([answer[-1] not in writer.ends for answer in made["answers"]])
    row = {"reward": made["rewards"].mean(), "right": made["right"].mean(), "partial": made["partial"].mean(),
           "signal": made["signal"], "length": np.mean(lengths), "truncated": cut, **found}
    if number % log_interval == 0 or number in (1, max_iters):
        tqdm.write(f"step {number:5d} | reward {row['reward']:6.3f} | right {row['right']:4.0%} | "
                   f"signal {row['signal']:4.0%} | len {row['length']:5.1f} | H {row['entropy']:5.3f}")
        row["train_loss"] = row.pop("loss")
        record(step=number, tokens=tokens, rollouts=drawn, learning_rate=rate, sampling_s=round(sampled - clock, 3),
               learning_s=round(learned - sampled, 3), peak_gib=round(mx.get_peak_memory() / 2**30, 3), **row)
    bar.update(1)
bar.close()
draw_curves()
if stopping:
    print(f"stopped at step {number} of {max_iters}, saved {state_path}\n"
          f"go on with: python {shlex.quote(sys.argv[0])} --out_dir={shlex.quote(out_dir)} --resume=True")
    sys.exit(130)

# ---- look at it ------------------------------------------------------------------------------------------------------

for one, old, new in zip(problems.held_out, untrained, writer.greedy(problems, samples), strict=False):
    right = " (right)" if not reward and tasks.check(one, new)[0] == 1 else ""
    print(f"\n> {one.prompt}\nbefore: {old}\nafter:  {new}{right}")
print(f"\n{result}: step {losses['best_step']}, pass@1 held out {losses['best']:.1%}, {losses['untrained']:.1%} before "
      f"training, after {drawn:,} rollouts\ncurves: {out_dir}/loss.png")
if losses["best"] <= losses["untrained"]:
    print("NO STEP WAS BETTER than the model before training: tune it first with sft.py if it is never right, else try "
          "another learning_rate, or easier problems")
print(f"next: python sample.py {shlex.quote(result)} --prompt={shlex.quote(problems.held_out[0].prompt)}")
if kind != "full" and not merge:
    print(f"this adapter needs {meta['files'][0]} as it is; to have both in one file: python merge.py "
          f"{shlex.quote(result)} grpo-merged.safetensors")
