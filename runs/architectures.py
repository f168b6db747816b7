"""The table of runs/architectures.sh: python runs/architectures.py out-architectures

It reads each run's loss.csv and checkpoint, prints the table, and puts it into docs/variants.md, between two marks.
"""
import os
import re
import statistics
import sys

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, HERE)
import blas  # noqa: E402, F401  (before mlx)
import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from table import column, put_table  # noqa: E402

from config import UserError, overrides  # noqa: E402
from model import compute_dtype, load_checkpoint  # noqa: E402
from tokenizer import open_tokens, tokens_folder  # noqa: E402

out = "out-architectures"  # the runs
length = 4096              # tokens in the cache that is measured
page = ""                  # where the table goes; "": docs/variants.md

settings = overrides(globals(), "out")

# ---- lines of code: a variant's section in model.py, and the lines elsewhere that end in its tag ---------------------

with open(os.path.join(HERE, "model.py"), encoding="utf-8") as file:
    source = file.read()


def lines_of(flags: dict) -> int:
    lines = source.splitlines()
    variants = {match[1] for name in flags if (match := re.search(rf"^    {name}: .*  # (\w+)$", source, re.M))
                and f"\n# ---- variant {match[1]}:" in source}
    counted = set()
    for variant in variants:
        first, last = (next(i for i, line in enumerate(lines) if line.startswith(f"# ---- {rule} {variant}"))
                       for rule in ("variant", "end of"))
        counted |= {*range(first, last + 1)} | {i for i, line in enumerate(lines) if line.endswith(f"# {variant}")}
    return len(counted)


# ---- the runs --------------------------------------------------------------------------------------------------------


def of_run(folder: str) -> dict:
    path = os.path.join(folder, "loss.csv")
    return {"loss": column(path, "val_loss")[-1], "speed": statistics.median(column(path, "tok_per_s")),
            "memory": max(column(path, "peak_gib"))}


def cache_bytes(model, meta: dict) -> int:
    """After `length` tokens of the validation text; positions beyond the training length are as good as any here."""
    data, tokenizer, vocab_size = (meta["settings"][name] for name in ("data", "tokenizer", "vocab_size"))
    folders = data, os.path.join(HERE, data), os.path.join(HERE, tokens_folder(data, tokenizer, vocab_size))
    folder = next((folder for folder in folders if os.path.exists(os.path.join(folder, "val.bin"))), folders[-1])
    tokens = open_tokens(folder)[1]["val"][:length]
    cache = model.make_cache()
    for start in range(0, len(tokens), 1024):
        mx.eval(model(mx.array(tokens[start:start + 1024].astype(np.int32))[None], cache=cache, last=True))
    return cache.nbytes


with open(os.path.join(HERE, "runs", "architectures.sh"), encoding="utf-8") as file:
    names = [line.split()[1] for line in file if line.startswith("run ")]
own = {"out_dir", "seed", "resume", "overwrite", "log"}
table = ["| | settings | parameters (active) | validation loss (lowest to highest) | tok/s | peak GiB "
         f"| cache MB at {length} | lines |", "|---|---|---|---|---|---|---|---|"]
for name in names:
    folders = [os.path.join(out, f"{name}-{seed}") for seed in (1, 2, 3)]
    folders = [folder for folder in folders if os.path.exists(os.path.join(folder, "done"))]
    if not folders:
        print(f"no run of {name} yet", file=sys.stderr)
        continue
    runs = [of_run(folder) for folder in folders]
    model, meta = load_checkpoint(os.path.join(folders[0], "ckpt.safetensors"))
    if name == "baseline":
        baseline = meta["settings"]
    elif len(table) == 2:
        raise UserError(f"{out} has no run of the baseline: start runs/architectures.sh")
    flags = {key: value for key, value in meta["settings"].items()  # an older baseline has it off: False, 0 or ""
             if value != baseline.get(key, type(value)()) and key not in own}
    model.set_dtype(compute_dtype("auto"))
    sizes = [(p.size, p.size * (model.config.expert_top_k / model.config.n_expert if p.ndim == 3 else 1))
             for _, p in tree_flatten(model.parameters())]
    total, active = (sum(column) / 1e6 for column in zip(*sizes, strict=True))
    losses = [run["loss"] for run in runs]
    table.append(" | ".join([
        f"| {name}", " ".join(f"`--{key}={value}`" for key, value in flags.items()),
        f"{total:.1f}M" + (f" ({active:.1f}M)" if active < total else ""),
        f"{statistics.mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})",
        f"{statistics.median(run['speed'] for run in runs) / 1e3:,.0f} k", f"{max(run['memory'] for run in runs):.2f}",
        f"{cache_bytes(model, meta) / 1e6:.2f}", f"{lines_of(flags) or ''} |"]))
if len(table) == 2:
    raise UserError(f"no run in {out}: start runs/architectures.sh")
print("\n".join(table))

put_table(page or os.path.join(HERE, "docs", "variants.md"), "runs/architectures.sh", table)
