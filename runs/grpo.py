"""Small models learn to sort and to add from rewards, by several losses; then the table and the picture of
docs/grpo.md, or of docs/rewards.md.

    python runs/grpo.py --seeds=3 --picture=docs/grpo.png
    python runs/grpo.py --seeds=3 --names=sort --losses=grpo,ppo,ppo-2 --picture=docs/ppo.png

For each task and seed a new model is tuned by sft.py on 2,000 problems with their answers, which leaves it right on a
tenth to two fifths of the problems held out; then grpo.py goes on with each loss from there, or ppo.py, with as many
answers and updates a step. ppo-2: with two passes over the answers of a step. The seed is that of the weights, of the
problems, and of everything drawn. A run that is done is not done again.
"""
import csv
import math
import os
import statistics
import subprocess
import sys

from tqdm import tqdm

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
from table import column  # noqa: E402

from config import overrides  # noqa: E402
from draw import COLOURS, write_figure  # noqa: E402

out = "out-grpo-runs"   # the folder of the runs
seeds = 3               # runs of each loss
losses = "grpo,dr_grpo,dapo"  # of grpo.py, or ppo, with commas; NAME-2: with 2 passes
names = "sort,addition_reversed"  # the tasks, with commas
n = 2000                # problems for sft.py
max_iters = 0           # steps of a run of grpo.py; 0: 140 for sort, 240 for sums
picture = "grpo.png"    # where the picture goes

settings = overrides(globals())

EPOCHS = {"sort": 2, "addition_reversed": 10}  # of sft.py at least, and further until the loss held out is this low:
LOW = {"sort": math.inf, "addition_reversed": 0.5}  # seeds leave the plateaus of a sum's loss at different times
STEPS = {"sort": 140, "addition_reversed": 240}
SIZE = ["--n_layer=2", "--n_embd=96", "--n_head=4", "--block_size=64", "--tokenizer=byte"]
UPDATES = ["--kind=full", "--learning_rate=5e-4", "--minibatches=4", "--max_new_tokens=8", "--eval_interval=20",
           "--log_interval=20", "--samples=0"]
GROUPS = ["--prompts=64", "--group=8"]  # of grpo.py: 512 answers
MORE = {"dapo": [*GROUPS, "--loss=dapo", "--dynamic=True", "--refills=4"],
        "ppo": ["--prompts=512", "--kl=0", "--value_weight=1"]}
environment = {**os.environ, "OPENBLAS_NUM_THREADS": os.environ.get("OPENBLAS_NUM_THREADS", "1")}


def run(folder: str, script: str, *arguments: str):
    """A script with its results in a folder, unless it is done."""
    done = os.path.join(folder, "done")
    if os.path.exists(done):
        return
    command = [sys.executable, os.path.join(HERE, "..", script), *arguments]
    command += [f"--out_dir={folder}"] + ["--overwrite=True"] * ("--resume=True" not in arguments)
    if subprocess.run(command, stdout=subprocess.DEVNULL, env=environment).returncode:
        sys.exit(2)  # the script has said why
    open(done, "w").close()


def rows_of(folder: str) -> list[dict]:
    """The evaluations of a run, as numbers."""
    with open(os.path.join(folder, "loss.csv"), newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)
                if row["val_pass1"]]


def folder_of(task: str, loss: str, seed: int) -> str:
    return os.path.join(out, f"{task}-{loss}-{seed}")


todo = [(task, seed) for seed in range(1, seeds + 1) for task in names.split(",")]
bar = tqdm(total=len(todo) * len(losses.split(",")), unit="run", disable=None)
for task, seed in todo:
    base, tuned = folder_of(task, "base", seed), folder_of(task, "sft", seed)
    examples = os.path.join(base, "problems.jsonl")
    run(base, "train.py", f"--data={os.path.join(HERE, '..', 'README.md')}", *SIZE, "--max_iters=1",
        "--sample_tokens=0", f"--seed={seed}")
    if not os.path.exists(examples):
        subprocess.run([sys.executable, os.path.join(HERE, "..", "tasks.py"), task, examples, f"--n={n}",
                        f"--seed={seed}"], check=True, stdout=subprocess.DEVNULL)
    epochs = EPOCHS[task]
    rate = ["--min_lr=1"] if LOW[task] < math.inf else []  # constant, where the end is not known before
    run(tuned, "sft.py", os.path.join(base, "ckpt.safetensors"), examples, "--kind=full", "--template=plain",
        "--learning_rate=3e-3", "--batch_size=16", f"--epochs={epochs}", "--samples=0", f"--seed={seed}",
        "--eval_interval=100", "--log_interval=100", *rate)
    while min(column(os.path.join(tuned, "loss.csv"), "val_loss")) > LOW[task] and epochs < 60:
        epochs += 2
        os.remove(os.path.join(tuned, "done"))
        run(tuned, "sft.py", "--resume=True", f"--epochs={epochs}")
    for loss in losses.split(","):
        name, _, passes = loss.partition("-")
        run(folder_of(task, loss, seed), "ppo.py" if name == "ppo" else "grpo.py",
            os.path.join(tuned, "sft.safetensors"), task, f"--max_iters={max_iters or STEPS[task]}", *UPDATES,
            *MORE.get(name, [*GROUPS, f"--loss={name}"]), f"--passes={passes or 1}", f"--seed={seed}")
        bar.update(1)
bar.close()

# ---- the table, and the picture --------------------------------------------------------------------------------------

print("| task | loss | pass@1 before | pass@1 after, each seed | mean | pass@8 before, after | rollouts | minutes |\n"
      "|---|---|---|---|---|---|---|---|")
from matplotlib.figure import Figure  # noqa: E402

figure = Figure(figsize=(5.5 * len(names.split(",")), 4), layout="constrained")
for axes, task in zip(figure.subplots(1, len(names.split(",")), squeeze=False)[0], names.split(","), strict=True):
    for loss, colour in zip(losses.split(","), COLOURS, strict=False):
        runs = [rows_of(folder_of(task, loss, seed)) for seed in range(1, seeds + 1)]
        for i, rows in enumerate(runs):
            axes.plot([row["rollouts"] / 1000 for row in rows], [100 * row["val_pass1"] for row in rows], "-",
                      color=colour, lw=1.2, label=None if i else loss)
        first, last = [rows[0] for rows in runs], [rows[-1] for rows in runs]
        each = " ".join(f"{row['val_pass1']:.1%}" for row in last)
        before = " ".join(f"{row['val_pass1']:.1%}" for row in first)
        k = [f"{statistics.mean(row['val_passk'] for row in some):.0%}" for some in (first, last)]
        print(f"| {task} | {loss} | {before} | {each} | {statistics.mean(row['val_pass1'] for row in last):.1%} | "
              f"{' '.join(k)} | {statistics.mean(row['rollouts'] for row in last):,.0f} | "
              f"{statistics.mean(row['seconds'] for row in last) / 60:.1f} |")
    axes.axhline(90, color="gray", lw=0.8, ls=":")
    axes.set(title=task, xlabel="thousands of rollouts", ylabel="pass@1 held out, %", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend()
write_figure(picture, figure)
