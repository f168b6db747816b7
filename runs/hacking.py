"""A reward that is hacked: ppo.py against a reward model, with and without the KL divergence in the reward; then the
table and the picture of docs/rewards.md.

    python runs/grpo.py --seeds=1 --names=sort --losses=grpo       # makes the model to begin with, in out-grpo-runs
    python runs/hacking.py --picture=docs/reward_hacking.png

The model that sorts now and then answers each of 2,000 problems eight times. Of each problem that it has answered right
and wrong, one pair becomes a preference, so that the preferences have no mistake in them; reward.py learns a reward
model from them. ppo.py then learns from that model alone, with each weight of the divergence, while the checker counts
what is right. A run that is done is not done again.
"""
import csv
import json
import os
import subprocess
import sys

from tqdm import tqdm

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
import blas  # noqa: F401, E402  (before mlx)

import rollouts  # noqa: E402
import tasks  # noqa: E402
from config import overrides  # noqa: E402
from conversations import template_for_training  # noqa: E402
from draw import COLOURS, write_figure, write_whole  # noqa: E402
from lora import load_adapted  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

checkpoint = "out-grpo-runs/sort-sft-1/sft.safetensors"  # a model that sorts now and then
out = "out-hacking"     # the folder of the runs
n = 2000                # problems for preferences
kls = "0,0.1,0.3,1"    # weights of the divergence, with commas
max_iters = 60          # steps of ppo.py
prompts = 256           # answers in a step
picture = "reward_hacking.png"  # where the picture goes

settings = overrides(globals(), "checkpoint")

environment = {**os.environ, "OPENBLAS_NUM_THREADS": os.environ.get("OPENBLAS_NUM_THREADS", "1")}
pairs = os.path.join(out, "pairs.jsonl")
judge = os.path.join(out, "reward", "reward.safetensors")


def answers_of(path: str, asked: list[tasks.Problem], draws: int) -> list[list[str]]:
    """Eight answers of a model to each problem."""
    model, meta = load_adapted(path)
    enc, drawing = Tokenizer.from_dict(meta["tokenizer"]), {"system": "", "seed": 1, "rows": 256, "max_new_tokens": 8}
    writer = rollouts.Writer(model, enc, meta, template_for_training(meta, enc), drawing)
    answers = writer.answered([ids for ids in map(writer.ids_of, asked) for _ in range(8)], 1.0, draws)
    return [[*map(writer.text_of, answers[i:i + 8])] for i in range(0, len(answers), 8)]


def preferences() -> list[dict]:
    """Of each problem whose eight answers are not all right or all wrong: the first right and the first wrong one."""
    asked, found = tasks.problems("sort", tasks.difficulties("sort"), 1001, n), []  # another seed than ppo.py's
    for one, texts in zip(asked, answers_of(checkpoint, asked, 0), strict=True):
        right, wrong = ([text for text in texts if text.strip() and tasks.check(one, text)[0] == yes] for yes in (1, 0))
        if right and wrong:
            found.append({"prompt": one.prompt, "chosen": right[0], "rejected": wrong[0]})
    return found


def properties(path: str) -> str:
    """The shares of a model's answers, to problems held out, that have six digits in order, and the prompt's digits."""
    asked = tasks.problems("sort", tasks.difficulties("sort"), 1337, 128, held_out=True)
    both = [(len(text) == 6 and text.isdigit() and sorted(text) == [*text], sorted(text) == sorted(one.answer))
            for one, texts in zip(asked, answers_of(path, asked, 1), strict=True) for text in texts]
    return " | ".join(f"{sum(some) / len(both):.1%}" for some in zip(*both, strict=True))


def run(folder: str, script: str, *arguments: str):
    """A script with its results in a folder, unless it is done."""
    done = os.path.join(folder, "done")
    if os.path.exists(done):
        return
    command = [sys.executable, os.path.join(HERE, "..", script), *arguments, f"--out_dir={folder}", "--overwrite=True"]
    with open(f"{folder}.log", "w") as file:
        if subprocess.run(command, stdout=file, env=environment).returncode:
            sys.exit(2)  # the script has said why
    open(done, "w").close()


def rows_of(folder: str, column: str) -> list[dict]:
    """The rows of a run that have a value in this column, as numbers."""
    with open(os.path.join(folder, "loss.csv"), newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)
                if row[column]]


os.makedirs(out, exist_ok=True)
bar = tqdm(total=2 + len(kls.split(",")), unit="run", disable=None)
if not os.path.exists(pairs):
    write_whole(pairs, "".join(json.dumps(row) + "\n" for row in preferences()).encode())
bar.update(1)
run(os.path.dirname(judge), "reward.py", checkpoint, pairs, "--kind=full", "--learning_rate=1e-3", "--epochs=4",
    "--batch_size=32")
bar.update(1)
for kl in kls.split(","):
    run(os.path.join(out, f"kl-{kl}"), "ppo.py", checkpoint, "sort", f"--reward={judge}", f"--kl={kl}", "--kind=full",
        "--learning_rate=5e-4", f"--prompts={prompts}", "--minibatches=4", "--passes=1",
        "--max_new_tokens=8", "--eval_interval=10", "--log_interval=10", f"--max_iters={max_iters}")
    bar.update(1)
bar.close()

# ---- the table, and the picture --------------------------------------------------------------------------------------

held_out = rows_of(os.path.dirname(judge), "val_loss")
best = min(held_out[1:], key=lambda row: row["val_loss"])
with open(pairs) as file:
    print(f"{sum(1 for _ in file):,} pairs; held out the reward model is right about {best['accuracy']:.1%}, with a "
          f"calibration error of {best['ece']:.3f}\n\n"
          "| `--kl` | reward before, after | right before | highest | after | KL after, nats an answer | "
          "saved step: digits in order | the prompt's digits |\n|---|---|---|---|---|---|---|---|")
from matplotlib.figure import Figure  # noqa: E402

figure = Figure(figsize=(11, 4), layout="constrained")
both = figure.subplots(1, 2)
for kl, colour in zip(kls.split(","), COLOURS, strict=False):
    folder = os.path.join(out, f"kl-{kl}")
    rows, steps = rows_of(folder, "val_pass1"), rows_of(folder, "reward")
    for axes, name, scale in zip(both, ("val_reward", "val_pass1"), (1, 100), strict=True):
        axes.plot([row["rollouts"] / 1000 for row in rows], [scale * row[name] for row in rows], "o-", ms=3,
                  color=colour, label=f"--kl={kl}")
    first, last = rows[0], rows[-1]
    print(f"| {kl} | {first['val_reward']:.2f} {last['val_reward']:.2f} | {first['val_pass1']:.1%} | "
          f"{max(row['val_pass1'] for row in rows):.1%} | {last['val_pass1']:.1%} | "
          + (f"{steps[-1]['kl']:.2f} | " if "kl" in steps[-1] else "not measured | ")
          + properties(os.path.join(folder, "ppo.safetensors")) + " |")
print(f"before: {properties(checkpoint)}")
for axes, title, label in zip(both, ("what PPO learns from", "what it should learn"),
                              ("reward model's mean reward, held out", "right answers, held out, %"), strict=True):
    axes.set(title=title, xlabel="thousands of rollouts", ylabel=label)
    axes.grid(alpha=0.3)
both[1].set_ylim(0, 100)
both[0].legend()
write_figure(picture, figure)
