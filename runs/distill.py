"""A student of a quarter of the teacher's size learns by several losses, and alone; then it drafts for the teacher. The
table and the picture of docs/distill.md.

    python runs/distill.py --data=shakespeare --seeds=3 --picture=docs/distill.png

All students of a seed begin with equal weights and read the same rows in the same order. A run that is done is not done
again, and one that was stopped goes on.
"""
import csv
import json
import math
import os
import re
import statistics
import subprocess
import sys

from tqdm import tqdm

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
from config import UserError, overrides  # noqa: E402
from draw import COLOURS, write_figure  # noqa: E402
from run_folder import read_header  # noqa: E402

out = "out-distill-runs"  # the folder of the runs
data = "shakespeare"    # a source of data.py, or its folder
seeds = 3               # students of each row
names = "alone,forward,reverse,jsd,on-policy,stored"  # rows, with commas
teacher_iters = 600     # updates of the teacher
max_iters = 200         # updates of a student
texts = 6               # that the teacher writes with each student's drafts
picture = "distill.png"  # where the picture goes

settings = overrides(globals())

ROWS = {"alone": ["--plain=1"], "forward": [], "reverse": ["--loss=reverse"], "jsd": ["--loss=jsd"],
        "on-policy": ["--loss=jsd", "--on_policy=0.5"], "stored": [f"--logits={os.path.join(out, 'top32.logits')}"]}
if min(seeds, teacher_iters, max_iters, texts) < 1 or not {*names.split(",")} <= ROWS.keys():
    raise UserError(f"seeds, teacher_iters, max_iters and texts must be 1 or more, and names some of {', '.join(ROWS)}")
environment = {**os.environ, "OPENBLAS_NUM_THREADS": os.environ.get("OPENBLAS_NUM_THREADS", "1")}
teacher, tokens = os.path.join(out, "teacher", "ckpt.safetensors"), os.path.join(out, "data")


def script(name: str, *arguments: str) -> str:
    """Run a script of this collection; returns what it wrote to standard error."""
    done = subprocess.run([sys.executable, os.path.join(HERE, "..", name), *arguments], env=environment, text=True,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if done.returncode:
        raise UserError((done.stderr.splitlines() or [f"{name} ended with status {done.returncode}"])[-1])
    return done.stderr


def run(folder: str, name: str, *arguments: str):
    """A run with its results in a folder, unless it is done; it goes on where it was stopped."""
    done = os.path.join(folder, "done")
    if os.path.exists(done):
        return
    state = {"train.py": "ckpt.safetensors", "distill.py": "resume.safetensors"}[name]
    if os.path.exists(os.path.join(folder, state)):
        arguments = ["--resume=True"]
    script(name, *arguments, f"--out_dir={folder}")
    open(done, "w").close()


def column(folder: str, name: str) -> list[tuple[float, float]]:
    """(tokens, value) of a run's evaluations."""
    with open(os.path.join(folder, "loss.csv"), newline="") as file:
        return [(float(row["tokens"]), float(row[name])) for row in csv.DictReader(file) if row[name]]


def drafted(name: str, draft: bool = True) -> tuple[float, float]:
    """The share of a student's drafts that the teacher keeps, and tokens a second; of the teacher alone (0, these)."""
    path = os.path.join(out, name, f"drafts-{texts}.json")
    if not os.path.exists(path):
        more = [f"--draft={os.path.join(out, name, 'distill.safetensors')}"] if draft else []
        told = script("sample.py", teacher, "--prompt=KING HENRY:\n", "--temperature=1", "--top_k=0",
                      f"--num_samples={texts}", "--max_new_tokens=100", *more)
        kept = [int(share) / 100 for share in re.findall(r"(\d+)% of drafts kept", told)]
        speeds = map(float, re.findall(r"([\d.]+) tok/s", told))
        with open(path, "w") as file:
            json.dump([statistics.mean(kept or [0]), statistics.median(speeds)], file)
    with open(path) as file:
        return tuple(json.load(file))


if not os.path.exists(tokens):
    script("data.py", f"--source={data}", "--tokenizer=bpe", "--vocab_size=512", f"--out={tokens}")
run(os.path.join(out, "teacher"), "train.py", f"--data={tokens}", "--n_layer=4", "--n_embd=160", "--n_head=4",
    "--block_size=128", "--batch_size=16", f"--max_iters={teacher_iters}", "--sample_tokens=0")
if not os.path.exists(os.path.join(out, "top32.logits")):
    script("distill.py", teacher, tokens, f"--store={os.path.join(out, 'top32.logits')}", "--top_k=32")
wanted, runs = names.split(","), [(name, seed) for seed in range(1, seeds + 1) for name in names.split(",")]
for name, seed in tqdm(runs, unit="run", disable=None):
    first = [teacher] if name != "stored" else []
    run(os.path.join(out, f"{name}-{seed}"), "distill.py", *first, f"--data={tokens}",
        f"--max_iters={max_iters}", "--eval_interval=50", "--eval_windows=48", f"--seed={seed}", *ROWS[name])

# ---- the table, and the picture --------------------------------------------------------------------------------------

print("| row | loss held out, each seed | mean | kept | drafts kept | tok/s with drafts | minutes |\n"
      "|---|---|---|---|---|---|---|")
kept_by_name = {}
for name in wanted:
    folders = [os.path.join(out, f"{name}-{seed}") for seed in range(1, seeds + 1)]
    losses = [column(folder, "val_loss")[-1][1] for folder in folders]
    overlap = [column(folder, "val_kept")[-1][1] for folder in folders if column(folder, "val_kept")]
    drafts = [drafted(os.path.basename(folder)) for folder in folders]
    kept_by_name[name] = [share for share, _ in drafts]
    minutes = statistics.mean(column(folder, "seconds")[-1][1] for folder in folders) / 60
    print(f"| {name} | {' '.join(f'{loss:.3f}' for loss in losses)} | {statistics.mean(losses):.3f} | "
          f"{f'{statistics.mean(overlap):.1%}' if overlap else ''} | {statistics.mean(kept_by_name[name]):.1%} | "
          f"{statistics.median(speed for _, speed in drafts):.0f} | {minutes:.1f} |", flush=True)
headers = [read_header(os.path.join(out, f"{name}-1", "resume.safetensors")) for name in wanted]
of_teacher = next((header["losses"]["teacher"] for header in headers if header["losses"]["teacher"]), math.nan)
print(f"| the teacher | | {of_teacher:.3f} | | | {drafted('teacher', False)[1]:.0f} | |")

from matplotlib.figure import Figure  # noqa: E402

figure = Figure(figsize=(11, 4), layout="constrained")
left, right = figure.subplots(1, 2)
for i, (name, colour) in enumerate(zip(wanted, (*COLOURS, "#56b4e9"), strict=False)):
    for seed in range(1, seeds + 1):
        points = column(os.path.join(out, f"{name}-{seed}"), "val_loss")[1:]
        left.plot([tokens / 1000 for tokens, _ in points], [loss for _, loss in points], color=colour, lw=1.2,
                  label=name if seed == 1 else None)
    right.bar(i, 100 * statistics.mean(kept_by_name[name]), color=colour)
    right.plot([i] * seeds, [100 * share for share in kept_by_name[name]], "k.", ms=5)
left.set(xlabel="thousands of tokens", ylabel="cross-entropy held out, nats a token")
right.set(xticks=range(len(wanted)), xticklabels=wanted, ylabel="drafts that the teacher keeps, %")
left.axhline(of_teacher, color="gray", lw=0.8, ls=":", label="the teacher")
left.legend(ncols=2)
for axes in (left, right):
    axes.set_axisbelow(True)
    axes.grid(alpha=0.3)
write_figure(picture, figure)
