"""The table of runs/compress.sh, and its picture: python runs/compress.py out-compress test.txt

For each checkpoint: bits a weight and bytes of its tensors, in the file as in memory (a dense one counts as float16);
perplexity and accuracy on the text; tokens a second of decoding at batch 1 here, all models in turn, the median of
several rounds; and the seconds that its script took. It prints the table, puts it into docs/compression.md, between two
marks, and draws compression.png.
"""
import glob
import math
import os
import statistics
import sys
import time

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, HERE)
import blas  # noqa: E402, F401  (before mlx)
import matplotlib  # noqa: E402
import mlx.core as mx  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from table import put_table, read_number  # noqa: E402
from tqdm import tqdm  # noqa: E402

from config import UserError, check_output, overrides  # noqa: E402
from draw import pictures, write_figure  # noqa: E402
from model import compute_dtype, generate, load_checkpoint  # noqa: E402
from score import read_tokens, score  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

out = "out-compress"  # what runs/compress.sh made
data = ""             # the text
max_tokens = 0        # of it; 0: all
rounds = 5            # of decoding
new_tokens = 128      # in each of them
picture = "out-compress/compression.png"
page = ""             # where the table goes; "": docs/compression.md

settings = overrides(globals(), "out", "data")

if min(rounds, new_tokens) < 1 or max_tokens < 0:
    raise UserError("rounds and new_tokens must be 1 or more, max_tokens 0 or more")
paths = [os.path.join(out, "base", "best.safetensors"), *sorted(glob.glob(os.path.join(out, "*.safetensors")))]
if not data or not os.path.exists(paths[0]) or len(paths) == 1:
    raise UserError("nothing to compare: bash runs/compress.sh TRAIN TEST makes the checkpoints, and calls this")
for name in pictures(picture):
    check_output(name, data)

# ---- measure ---------------------------------------------------------------------------------------------------------

dtype, models, found = compute_dtype("auto"), {}, {}
for path in paths:
    name = "dense" if path == paths[0] else os.path.splitext(os.path.basename(path))[0]
    model, meta = load_checkpoint(path)
    arrays = [array for _, array in tree_flatten(model.parameters())]
    size = sum(p.nbytes if p.dtype in (mx.uint32, mx.int32) else 2 * p.size for p in arrays)
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    models[name], found[name] = model, {"size": size}
    seconds = path.replace(".safetensors", ".seconds")
    if os.path.exists(seconds):
        found[name]["seconds"] = read_number(seconds)
enc = Tokenizer.from_dict(meta["tokenizer"])
tokens = read_tokens(data, enc, max_tokens=max_tokens)
weights = sum(p.size for _, p in tree_flatten(models["dense"].parameters()))
rows = [(name, 0) for name in models] + [("dense", 8), ("dense", 4)]
for name, kv_bits in tqdm(rows, desc="perplexity", disable=None):
    result = found[name] if not kv_bits else found.setdefault(f"dense, --kv_bits={kv_bits}", dict(found["dense"]))
    nats, result["accuracy"] = score(models[name], tokens, enc.start, kv_bits=kv_bits)
    result["perplexity"] = math.exp(nats)
prompt, speeds = [*enc.start, *tokens[:32].tolist()], {label: [] for label in found}
for i in tqdm(range(rounds + 1), desc="decoding", disable=None):
    for label in found:
        name, _, kv_bits = label.partition(", --kv_bits=")
        cache, began = models[name].make_cache(int(kv_bits or 0)), None
        for _ in generate(models[name], prompt, new_tokens, temperature=0, cache=cache):
            began = began or time.perf_counter()
        if i:
            speeds[label].append((new_tokens - 1) / (time.perf_counter() - began))
        found[label]["cache"] = cache.nbytes

# ---- show ------------------------------------------------------------------------------------------------------------

METHODS = ["dense", "rtn", "hqq-zero", "hqq", "awq", "gptq", "laser"]


def order(label: str) -> tuple:
    method, _, bits = label.partition(", ")[0].rpartition("-")
    method = method if bits.isdigit() else label.partition(", ")[0]
    return -int(bits) if bits.isdigit() else -99, METHODS.index(method) if method in METHODS else 99, label


lines = ["| | bits a weight | MB | perplexity | accuracy | decode, tok/s | cache, MB | seconds |",
         "|---|---|---|---|---|---|---|---|"]
for label in sorted(found, key=order):
    row = found[label]
    speed = statistics.median(speeds[label])
    seconds = f"{row['seconds']:.1f}" if "seconds" in row else ""
    lines.append(f"| {label} | {8 * row['size'] / weights:.2f} | {row['size'] / 1e6:.2f} | {row['perplexity']:.2f} "
                 f"| {row['accuracy']:.2%} | {speed:.0f} | {row['cache'] / 1e6:.2f} | {seconds} |")
print(f"{os.path.basename(data)}, {len(tokens):,} tokens; {weights / 1e6:.2f}M parameters; "
      f"{mx.device_info().get('device_name')}, {str(dtype)[9:]}\n" + "\n".join(lines))

put_table(page or os.path.join(HERE, "docs", "compression.md"), "runs/compress.sh", lines)

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
dense = found["dense"]["perplexity"]
points = {label: (8 * row["size"] / weights, 100 * (row["perplexity"] / dense - 1)) for label, row in found.items()}
for method in METHODS[1:]:
    line = sorted(points[label] for label in found
                  if label == method or label.startswith(f"{method}-") and label.removeprefix(f"{method}-").isdigit())
    if line:
        axes.plot(*zip(*line, strict=True), marker="o", label=method)
axes.axhline(0, color="gray", linestyle="--", label="dense, 16 bits")
axes.set(xlabel="bits a weight, scales included", ylabel="perplexity, and how much worse than dense", xscale="log")
axes.set_yscale("symlog", linthresh=1)  # as a logarithm from 1% on
axes.set_xticks([2, 3, 4, 5, 6, 8, 12, 16], [2, 3, 4, 5, 6, 8, 12, 16])
ticks = [0, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500]
axes.set_yticks(ticks, [f"{dense * (1 + tick / 100):.1f}  +{tick}%" for tick in ticks])
axes.set(xlim=(min(points.values())[0] / 1.1, 17), ylim=(-0.2, max(1, 1.3 * max(y for _, y in points.values()))))
axes.minorticks_off()
axes.grid(alpha=0.3)
axes.legend(frameon=False)
write_figure(picture, figure)
print(f"drawn: {picture}")
