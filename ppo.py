"""Learn from rewards by PPO: a value head predicts the reward of an answer from each of its tokens, and tokens after
which more comes than was predicted become more probable.

    python ppo.py out-sft/sft.safetensors --task=sort
    python ppo.py out-sft/sft.safetensors --data=problems.jsonl --reward=FILE.py
    python ppo.py out-sft/sft.safetensors --task=sort --reward=out-reward/reward.safetensors --kl=0.05
    python ppo.py --resume=True            # goes on after Ctrl-C, after a power cut, or with more --max_iters

tasks.py makes the problems and checks the answers, or reads both from files; a reward may also come from a Python file,
or from a model of reward.py. With --task and --reward the checker still tells what is right, which the model does not
learn from: so it is seen when a reward is hacked. The model must be right now and then before it begins, as sft.py
makes it. A checkpoint that is an adapter is merged into its base first. No second model is in memory: the reference is
the model without its adapter, or, with --kind=full, a copy of the first weights, which is kept only if --kl is over 0.
The value head is one vector, which reads the same states as the vocabulary projection.

A step: `prompts` problems are drawn and answered once each; the log-probabilities and the values of all tokens are
computed, advantages and returns from them; then the weights are updated `passes` x `minibatches` times.

    OUT_DIR/ppo.safetensors      the step with the highest pass@1 held out (with --reward: the highest reward): with
                                 --kind=full or --merge=True as a whole checkpoint, else as an adapter for the
                                 checkpoint that it was trained on. The value head is not in it
    OUT_DIR/resume.safetensors   the last step, with the value head, and the state of the optimizer
    OUT_DIR/loss.csv, loss.png   the curves
    OUT_DIR/run.json, source/    the settings of the run and its code

Ctrl-C saves the last step and stops. --resume=True continues from there bit for bit, with the settings of that run,
except those on the command line.

A log line shows means over the answers of a step: reward, before the part for the KL divergence; right, the share of
right answers; KL, from the model before training, in nats an answer (with --kl); H, the entropy of a token in nats; V,
the share of the returns' variance that the values explain. After every eval_interval steps a line (val) shows, of
eval_problems problems held out, each answered pass_k times at the same temperature: pass@1, the share of right answers;
pass@K, the share of problems with a right one among K; reward, the mean; len, the tokens of an answer with its end
token. More is in loss.csv: docs/rewards.md explains every column.

Schulman et al. 2017 (1707.06347), with advantages of Schulman et al. 2015 (GAE, 1506.02438), for language as Ziegler et
al. 2019 (1909.08593) and Ouyang et al. 2022 (2203.02155). Departures: the value head shares all layers with the policy;
the reward of an answer stands at its end token, where TRL's PPOTrainer puts it one place later.
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
out_dir = "out-ppo"     # the folder of this run
resume = False          # continue from OUT_DIR/resume.safetensors
seed = 1337             # of the problems, the answers and the adapter
# rollouts
prompts = 128           # problems in a step, each answered once
max_new_tokens = 32     # tokens of an answer at most
temperature = 1.0       # at which answers are drawn, and by which the logits are divided in training
no_end = 0.0            # taken off the reward of an answer that does not end within max_new_tokens
rows = 256              # answers that are drawn at a time; more need more memory
# loss
clip = 0.2              # a ratio counts from 1 - clip up to 1 + clip
clip_value = 0.2        # a value counts as far as it is from the one before the updates; 0: any
value_weight = 0.1      # of the value's loss beside the policy's
gamma = 1.0             # a reward counts so much less with every token before it
lam = 0.95              # of GAE: 1: sums of later rewards; 0: the next value alone
whiten_rewards = False  # divide the rewards of tokens by their deviation
kl = 0.05               # weight of the divergence from the model before training, in the reward; 0: none
kl_target = 0.0         # nats an answer: the weight is changed until the divergence is this; 0: it stays
kl_horizon = 10000      # of kl_target: answers in which the weight adapts
passes = 4              # over the answers of a step
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

# ---- advantages and losses -------------------------------------------------------------------------------------------
#
# N answers of up to A tokens. All arrays are (N, A); mask is 1 for the tokens of the answer, its end token among them.
# A value is that of the state from which a token was drawn.


def token_rewards(score, old, ref, mask, kl: float) -> np.ndarray:
    """-kl (log pi - log ref) of each token, and the score (N,) of the answer at its last one."""
    rewards = -kl * (old - ref) * mask
    rewards[np.arange(len(mask)), mask.sum(1).astype(int) - 1] += score
    return rewards


def whiten(x, mask, shift: bool = True) -> np.ndarray:
    """x over its standard deviation over the tokens of the mask (with n - 1), without their mean if `shift`; 0 beyond
    the mask."""
    n = mask.sum()
    mean = (x * mask).sum() / n
    variance = (np.square(x - mean) * mask).sum() / max(n - 1, 1)
    return ((x - mean) / np.sqrt(variance + 1e-8) + (0 if shift else mean)) * mask


def advantages(rewards, values, mask, gamma: float, lam: float) -> np.ndarray:
    """GAE: A_t = d_t + gamma lam A_{t+1},  d_t = r_t + gamma V_{t+1} - V_t; after an answer's end A and V are 0."""
    found, later, next_value = np.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):
        later = (rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * later) * mask[:, t]
        found[:, t], next_value = later, values[:, t] * mask[:, t]
    return found


def policy_losses(pi, old, advantage, clip: float) -> tuple[mx.array, mx.array]:
    """max(-A rho, -A clip(rho, 1 - clip, 1 + clip)),  rho = exp(pi - old), and where the clipped one is taken."""
    ratio = mx.exp(pi - old)
    plain, clipped = -advantage * ratio, -advantage * mx.clip(ratio, 1 - clip, 1 + clip)
    return mx.maximum(plain, clipped), clipped > plain


def value_losses(values, old_values, returns, clip: float) -> mx.array:
    """1/2 max((V - R)^2, (V_old + clip(V - V_old, -clip, clip) - R)^2); clip 0: 1/2 (V - R)^2."""
    plain = mx.square(values - returns)
    if not clip:
        return 0.5 * plain
    return 0.5 * mx.maximum(plain, mx.square(old_values + mx.clip(values - old_values, -clip, clip) - returns))


def adapted_kl(kl: float, found: float, target: float, n: int, horizon: int) -> float:
    """The next weight of the divergence: kl (1 + e n / horizon),  e = found / target - 1 within +-0.2."""
    return kl * (1 + min(max(found / target - 1, -0.2), 0.2) * n / horizon)


# ---- resume: the settings of the run apply, except those on the command line -----------------------------------------

SCRIPT, source = os.path.basename(__file__), run_folder.read_source(__file__)
result, state_path = os.path.join(out_dir, "ppo.safetensors"), os.path.join(out_dir, "resume.safetensors")
LASTING = ("checkpoint", "adapter", "task", "difficulty", "data", "val_data", "val_share", "reward", "success",
           "partial_weight", "system", "template", "seed", "prompts", "max_new_tokens", "temperature", "no_end", "clip",
           "clip_value", "value_weight", "gamma", "lam", "whiten_rewards", "kl", "kl_target", "kl_horizon", "passes",
           "minibatches", "kind", "rank", "alpha", "targets", "base_bits", "merge", "eval_problems", "pass_k", "rows")
start_step, trained, before = 0, {}, {}  # trained, before: the arrays and the header of the last step
if resume:
    run_folder.check_maker(state_path, SCRIPT, out_dir)
    trained, before = load_arrays(state_path)
    settings.update(run_folder.old_settings(state_path, before, settings, LASTING))
    globals().update(settings)
    start_step = before["step"]

rollouts.check(settings)
rollouts.refuse_idle(("kl_target", "with --kl=0", kl), ("kl_horizon", "without --kl_target", kl_target))
if min(kl, kl_target, partial_weight, clip_value, value_weight) < 0 or kl_horizon < 1:
    raise UserError("kl, kl_target, partial_weight, clip_value and value_weight must be 0 or more, and kl_horizon 1 or "
                    "more")
if not 0 < clip < 1 or not 0 <= gamma <= 1 or not 0 <= lam <= 1:
    raise UserError(f"clip={clip}, gamma={gamma}, lam={lam}: clip must be between 0 and 1, gamma and lam from 0 to 1")
if minibatches > prompts:
    raise UserError(f"minibatches={minibatches}: there are only {prompts} answers in a step")
run_folder.check_settings(settings, resume)
inputs = [checkpoint, *adapter, data, val_data, reward]
run_folder.check(out_dir, SCRIPT, overwrite, resume, inputs, "resume.safetensors")

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
      + f"; a step has {prompts} problems with an answer of at most {max_new_tokens} tokens")

# ---- model -----------------------------------------------------------------------------------------------------------

fingerprint = meta.get("fingerprint") or base_fingerprint(model)
if resume and before.get("base", fingerprint) != fingerprint:
    raise UserError(f"{checkpoint} has changed since {state_path} was written: put the old file back, or begin anew in "
                    "another --out_dir")
rollouts.adapted(model, settings, checkpoint)
reference = tree_map(mx.array, model.parameters()) if kind == "full" and kl else None
both = nn.Module()  # what trains: the model, and the value head, from 0
both.model, both.value, both.value_bias = model, mx.zeros(model.config.n_embd), mx.zeros(())
print(f"{sum(p.size for _, p in tree_flatten(both.trainable_parameters())) / 1e6:.2f}M parameters train")
if resume and start_step >= max_iters:
    raise UserError(f"{state_path} is at step {start_step} of {max_iters} already: give more --max_iters")
opt = optim.Adam(learning_rate, betas=[0.9, 0.95], bias_correction=True)
opt.init(both.trainable_parameters())
untrained = writer.greedy(problems, samples)
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


def forward(ids, places, targets) -> tuple[mx.array, mx.array, mx.array]:
    """Log-probabilities, values and entropies of answers' tokens, all (N, A)."""
    hidden = states(model, ids, places)
    pi, entropy = log_probs(model, hidden, targets, temperature, enc.n_vocab)
    return pi, hidden.astype(mx.float32) @ both.value + both.value_bias, entropy


now = compiled(lambda *inputs: forward(*inputs)[:2])


def by_reference(batch: dict[str, np.ndarray]) -> np.ndarray:
    with as_reference(model, reference):
        return in_parts(batch, batch_size, lambda *inputs: forward(*inputs)[:1])[0]


@compiled
def gradients(batch):
    """The sums over the tokens of a micro-batch, by name, and the gradients of its share of the loss."""

    def weighted_loss(batch):
        mask = batch["mask"]
        pi, values, entropy = forward(batch["ids"], batch["places"], batch["targets"])
        # else a number beyond an answer's end could become infinite, and infinity times 0 is none
        policy, clipped = policy_losses(pi * mask, batch["old"], batch["advantages"], clip)
        value = value_losses(values * mask, batch["values"], batch["returns"], clip_value)
        figures = {"policy_loss": policy, "value_loss": value, "entropy": entropy, "clipped": clipped, "tokens": mask}
        return (batch["weights"] * (policy + value_weight * value)).sum(), {
            name: (x * mask).sum() for name, x in figures.items()}

    (value, figures), grads = nn.value_and_grad(both, weighted_loss)(batch)
    return figures | {"loss": value}, grads


@compiled
def update(grads):
    """Clip and apply. Returns the gradient's norm before clipping."""
    if gpu_train and (length := gpu_train.adamw(both, opt, grads, grad_clip or math.inf, 0.0)) is not None:
        return length
    grads, length = (gpu_train or optim).clip_grad_norm(grads, grad_clip or math.inf)
    opt.update(both, grads)
    return length


def learn(step: int, asked: list[list[int]], answers: list[list[int]], score: np.ndarray) -> dict[str, float]:
    """The updates of a step. Returns means over the tokens, and of the gradients' norms."""
    batch = arrays_of(asked, answers, max_new_tokens * compile, model.config.block_size)
    batch["old"], batch["values"] = in_parts(batch, batch_size, now)
    mask, ref = batch["mask"], by_reference(batch) if kl else batch["old"]
    rewards = token_rewards(score, batch["old"], ref, mask, kl_now)
    if whiten_rewards:
        rewards = whiten(rewards, mask, shift=False)
    gained = advantages(rewards, batch["values"], mask, gamma, lam)
    batch["returns"], batch["advantages"] = gained + batch["values"], whiten(gained, mask).astype(np.float32)
    real = mask > 0
    spread = batch["returns"][real].var()
    more = {"explained": 1 - gained[real].var() / spread if spread > 1e-12 else 0.0,
            "kl": float(((batch["old"] - ref) * mask).sum(1).mean())}
    totals, norms = None, []
    for number in range(passes):
        order = np.random.default_rng([seed, step, number]).permutation(prompts) if minibatches > 1 else np.arange(
            prompts)
        for which in np.array_split(order, minibatches):
            part = {name: array[which] for name, array in batch.items()}
            part["weights"] = part["mask"] / part["mask"].sum()  # the mean over the tokens of the update
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
    return mean | more | {"grad_norm": sum(norm.item() for norm in norms) / updates}


# ---- save ------------------------------------------------------------------------------------------------------------

COLUMNS = ["step", "rollouts", "tokens", "seconds", "reward", "right", "partial", "length", "truncated", "entropy",
           "kl", "kl_weight", "clipped", "explained", "policy_loss", "value_loss", "train_loss", "learning_rate",
           "grad_norm", "val_pass1", "val_passk", "val_partial", "val_reward", "val_length", "sampling_s", "learning_s",
           "peak_gib"]
MEASURE = "val_reward" if reward else "val_pass1"  # which step is the best one
losses = before.get("losses", {"untrained": None, "best": None, "best_step": 0})  # this measure, held out


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
    arrays = dict(tree_flatten({"model": both.trainable_parameters(), "optimizer": opt.state}))
    save_arrays(state_path, arrays, {**facts(step), "version": VERSION, "losses": losses, "tokens": tokens,
                                     "kl_weight": kl_now, "evaluated": evaluated, "rows": problems.hash,
                                     "base": fingerprint})


def draw_curves():
    """loss.png: rewards, what is right among the problems held out, the divergence, and how the answers change."""
    panels = {"reward": {"reward": "training", "val_reward": "held out"},
              "share": {"right": "right, training", "val_pass1": "pass@1 held out",
                        "val_passk": f"pass@{pass_k} held out", "explained": "explained by the values"},
              "nats": {"kl": "KL of an answer", "entropy": "entropy of a token"},
              "tokens": {"length": "length, training", "val_length": "length held out"}}
    draw.curves(os.path.join(out_dir, "loss.png"), rows_so_far, panels, f"{os.path.basename(problems.name)}, {kind}")


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
    value = float(found[MEASURE])
    if number == 0:
        losses["untrained"] = value
    is_best = number > 0 and (losses["best"] is None or value > losses["best"])
    tqdm.write(f"step {number:5d} | val pass@1 {found['val_pass1']:6.1%} | pass@{pass_k} {found['val_passk']:6.1%} | "
               f"reward {found['val_reward']:6.3f} | len {found['val_length']:4.1f}"
               + " | best" * (is_best and value > losses["untrained"]))
    record(step=number, tokens=tokens, rollouts=number * prompts, **found)
    if is_best:
        losses.update(best=value, best_step=number)
        save_best(number, {name: float(x) for name, x in found.items()})


number, tokens, kl_now = start_step, before.get("tokens", 0), before.get("kl_weight", kl)
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
    drawn = [problems.at(number * prompts + i) for i in range(prompts)]
    asked = [*map(writer.ids_of, drawn)]
    answers = writer.answered(asked, temperature, 0, number)
    scores = problems.scores(drawn, [*map(writer.text_of, answers)])
    cut = np.array([answer[-1] not in writer.ends for answer in answers])
    scores[:, 0] -= no_end * cut
    sampled = time.perf_counter()
    found = learn(number, asked, answers, scores[:, 0])
    learned = time.perf_counter()
    number += 1
    if not (math.isfinite(found["loss"]) and math.isfinite(found["grad_norm"])):
        diverged(f"step {number}: the loss is {found['loss']}, the gradient's norm {found['grad_norm']}")
    lengths = [*map(len, answers)]
    tokens += sum(lengths)
    means = dict(zip(("reward", "right", "partial"), scores.mean(0), strict=True))
    row = {**means, "length": np.mean(lengths), "truncated": cut.mean(), "kl_weight": kl_now, **found}
    if number % log_interval == 0 or number in (1, max_iters):
        tqdm.write(f"step {number:5d} | reward {row['reward']:6.3f} | right {row['right']:4.0%} | "
                   + (f"KL {row['kl']:6.3f} | " if kl else "")
                   + f"H {row['entropy']:5.3f} | V {row['explained']:5.2f}")
        row["train_loss"] = row.pop("loss")
        if not kl:
            del row["kl"]
        record(step=number, tokens=tokens, rollouts=number * prompts, learning_rate=rate,
               sampling_s=round(sampled - clock, 3), learning_s=round(learned - sampled, 3),
               peak_gib=round(mx.get_peak_memory() / 2**30, 3), **row)
    if kl_target:
        kl_now = adapted_kl(kl_now, found["kl"], kl_target, prompts, kl_horizon)
    bar.update(1)
bar.close()
draw_curves()
if stopping:
    print(f"stopped at step {number} of {max_iters}, saved {state_path}\n"
          f"go on with: python {shlex.quote(sys.argv[0])} --out_dir={shlex.quote(out_dir)} --resume=True")
    sys.exit(130)

# ---- look at it ------------------------------------------------------------------------------------------------------

for one, old, new in zip(problems.held_out, untrained, writer.greedy(problems, samples), strict=False):
    print(f"\n> {one.prompt}\nbefore: {old}\nafter:  {new}")
measured, form_of = ("reward", "{:.3f}") if reward else ("pass@1", "{:.1%}")
best, untrained = (form_of.format(losses[name]) for name in ("best", "untrained"))
print(f"\n{result}: step {losses['best_step']}, {measured} held out {best}, {untrained} before training, after "
      f"{number * prompts:,} rollouts\ncurves: {out_dir}/loss.png")
if losses["best"] <= losses["untrained"]:
    print("NO STEP WAS BETTER than the model before training: tune it first with sft.py if it is never right, else try "
          "another learning_rate, or easier problems")
print(f"next: python sample.py {shlex.quote(result)} --prompt={shlex.quote(problems.held_out[0].prompt)}")
if kind != "full" and not merge:
    print(f"this adapter needs {meta['files'][0]} as it is; to have both in one file: python merge.py "
          f"{shlex.quote(result)} ppo-merged.safetensors")
