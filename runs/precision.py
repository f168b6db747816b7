"""Train a small model in every precision, with every choice of nvfp4 left out in turn, and with packed states of the
optimizer; then print the tables of docs/precision.md.

    python runs/precision.py --data=shakespeare --seeds=3

A run that is done is not done again. Each difference is that to the run of the same seed, which has the same first
weights and the same order of the data, in the baseline; +- is its standard error over the seeds.

The second table is of gradients, of the trained model in float32: the size of the error that rounding makes, as a share
of the exact gradient's size, in one batch (the mean of 64), and in the sum over these 64 batches. Errors with a mean of
0 shrink in the sum; those which rounding makes to one side do not.
"""
import math
import os
import statistics
import subprocess
import sys

from tqdm import tqdm

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

import blas  # noqa: E402, F401
import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import numpy as np  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

import precision  # noqa: E402
import run_folder  # noqa: E402
from config import overrides  # noqa: E402
from model import load_checkpoint  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

data = "shakespeare"    # as of train.py
out = "out-precision"   # the folder of the runs
seeds = 3               # runs of each row
max_iters = 1000        # updates of a run
only = ""               # the rows to run and to show, with commas; "": all
text = ""               # a text file, for the table of gradients

settings = overrides(globals())

SETTINGS = ["--tokenizer=byte", "--n_layer=4", "--n_head=2", "--n_embd=64", "--block_size=64", "--batch_size=4",
            "--eval_windows=256", "--sample_tokens=0", "--learning_rate=3e-3", "--warmup_iters=50",
            "--log_interval=100"]
ROWS = {  # name: settings, and the row that it is compared with
    "f32": ("", "f32"), "bf16": ("--dtype=bfloat16", "f32"), "fp8": ("--precision=fp8", "f32"),
    "mxfp8": ("--precision=mxfp8", "f32"), "nvfp4": ("--precision=nvfp4", "f32"),
    "nvfp4-sto": ("--precision=nvfp4 --precision_off=stochastic", "nvfp4"),
    "nvfp4-had": ("--precision=nvfp4 --precision_off=hadamard", "nvfp4"),
    "nvfp4-squ": ("--precision=nvfp4 --precision_off=square", "nvfp4"),
    "nvfp4-last": ("--precision=nvfp4 --precision_off=last", "nvfp4"),
    "a8": ("--optimizer_bits=8", "f32"), "a4": ("--optimizer_bits=4", "f32"), "m32": ("--optimizer=muon", "f32"),
    "m8": ("--optimizer=muon --optimizer_bits=8", "m32"), "m4": ("--optimizer=muon --optimizer_bits=4", "m32"),
    "lion": ("--optimizer=lion --learning_rate=3e-4", "lion"),
    "lion8": ("--optimizer=lion --learning_rate=3e-4 --optimizer_bits=8", "lion"),
    "lion4": ("--optimizer=lion --learning_rate=3e-4 --optimizer_bits=4", "lion"),
    "moe": ("--n_expert=4 --ffn_dim=128", "moe"),
    **{f"moe-{kind}": (f"--n_expert=4 --ffn_dim=128 --precision={kind}", "moe") for kind in ("fp8", "mxfp8", "nvfp4")}}
names = only.split(",") if only else [*ROWS]


def loss_of(name: str, seed: int) -> float | None:
    header = run_folder.header_of(os.path.join(out, f"{name}-{seed}", "ckpt.safetensors"))
    return header["losses"]["val"] if header.get("step") == max_iters else None


todo = [(name, seed) for seed in range(1, seeds + 1) for name in names if loss_of(name, seed) is None]
for name, seed in tqdm(todo, unit="run", disable=not todo):
    done = subprocess.run([sys.executable, os.path.join(HERE, "..", "train.py"), f"--data={data}", *SETTINGS,
                           "--optimizer=adamw", *ROWS[name][0].split(), f"--max_iters={max_iters}", f"--seed={seed}",
                           f"--eval_interval={max_iters}", f"--out_dir={out}/{name}-{seed}", "--overwrite=True"],
                          stdout=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(done.returncode)  # train.py has said why

print("| settings | loss of each seed | mean | beside |\n|---|---|---|---|")
for name in names:
    flags, other = ROWS[name]
    losses = [loss_of(name, seed) for seed in range(1, seeds + 1)]
    gaps = [loss - base for loss, seed in zip(losses, range(1, seeds + 1), strict=True)
            if (base := loss_of(other, seed)) is not None]
    beside = ""
    if other != name and len(gaps) > 1:
        error = statistics.stdev(gaps) / math.sqrt(len(gaps))
        beside = f"{other}: {statistics.mean(gaps):+.3f} +- {error:.3f}"
    print(f"| {name}: {f'`{flags}`' if flags else 'float32'} | {' '.join(f'{loss:.3f}' for loss in losses)} | "
          f"{statistics.mean(losses):.3f} | {beside} |")

# ---- gradients -------------------------------------------------------------------------------------------------------


def gradient(settings: str, x: mx.array) -> np.ndarray:
    """Of the matrices that are rounded, one after the other. settings: of train.py."""
    model, _ = load_checkpoint(os.path.join(out, "f32-1", "ckpt.safetensors"))
    given = dict(part.removeprefix("--").split("=") for part in settings.split())
    if "precision" in given:
        without = precision.parse(given["precision"], given.get("precision_off", ""))
        precision.convert(model, given["precision"], without | {"last"})
    model.train()
    _, found = nn.value_and_grad(model, model.loss)(x[:, :-1], x[:, 1:])
    return np.concatenate([np.array(g).ravel() for name, g in tree_flatten(found)
                           if name.startswith("blocks.") and g.ndim == 2]).astype(np.float64)


if text:
    _, meta = load_checkpoint(os.path.join(out, "f32-1", "ckpt.safetensors"))
    with open(text, encoding="utf-8") as file:
        ids = np.array(Tokenizer.from_dict(meta["tokenizer"]).encode(file.read(400_000)))
    starts = np.random.default_rng(0).integers(len(ids) - 65, size=(64, 4))
    batches = [mx.array(np.stack([ids[start:start + 65] for start in row])) for row in starts]
    exact = [gradient("", x) for x in batches]
    print("\n| settings | error in a batch | in the sum of 64 |\n|---|---|---|")
    for name in [name for name in names if "--precision=" in ROWS[name][0] and name != "nvfp4-last"]:
        mx.random.seed(0)
        errors = [gradient(ROWS[name][0], x) - g for x, g in zip(batches, exact, strict=True)]
        one = statistics.mean(np.linalg.norm(e) / np.linalg.norm(g) for e, g in zip(errors, exact, strict=True))
        print(f"| `{ROWS[name][0]}` | {one:.3f} | {np.linalg.norm(sum(errors)) / np.linalg.norm(sum(exact)):.3f} |")
