"""Replace weight matrices by approximations of low rank, which can make a model better, and smaller.

    python laser.py out/ckpt.safetensors --matrix=mlp.up --layer=3 --rho=0.1 --data=book.txt
    python laser.py out/ckpt.safetensors --search=True --data=book.txt --factored=True

LASER (Sharma, Ash & Misra 2023): W (m, n) is replaced by the sum of its k = max(1, int(rho min(m, n))) components with
the largest singular values. The other components are dropped: they sometimes hold noise. By the theorem of Eckart and
Young, no matrix of rank k is nearer to W.

--search=True tries one edit at a time, every matrix of every block at every rho, and measures the loss on windows of
the text. Then it applies the best edit of each matrix, the most useful edit first, and keeps those that lower the loss
further. It measures the result on held-out windows, which the search did not use: their loss, and their accuracy (the
share of tokens that the model held the most probable one), which can change in opposite directions. It prints the best
edit of each matrix, and draws a picture of them, layer by matrix, coloured by the change in loss.

--factored=True stores an edited matrix as two factors, u (m, k) and v (k, n), where these are smaller than the matrix;
model.py multiplies by one after the other. Each expert's matrix is edited on its own, and is never stored as factors.
The edits are written to the checkpoint's header, under "laser".
"""
import math
import os

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from tqdm import tqdm

from config import UserError, check_output, given, nearest, overrides
from draw import pictures, write_figure
from model import GPT, load_checkpoint, save_checkpoint
from packing import check_finite, matrices, output_path, text_of
from quantized import Factored, replace_module
from score import in_windows, rated, window_length, windows
from tokenizer import Tokenizer

checkpoint = "out/ckpt.safetensors"  # a checkpoint that is not quantized
out = ""                 # the edited checkpoint; "": the name of the checkpoint with -laser
matrix = ""              # for one edit: mlp.up, mlp.down, attn.q, ...
layer = 0                # for one edit: its block, counted from 0
rho = 0.1                # for one edit: the rank, as a share of the full rank, over 0, at most 1
search = False           # try all matrices, layers and rhos instead
rhos = "0.9, 0.8, 0.6, 0.4, 0.2, 0.1, 0.05, 0.01"  # the values of rho that the search tries
data = ""                # a text file, or a folder that data.py made (its val split); needed for the search alone
samples = 32             # windows of block_size tokens for the search, and the number of held-out windows
block_size = 0           # tokens of a window; 0: the model's context, but 1,024 at most
batch_size = 8           # windows at a time
seed = 1337              # for the choice of windows
factored = False         # store an edited matrix as two factors where these are smaller
picture = ""             # a PNG of the search; "": the name of the edited checkpoint with .png

settings = overrides(globals(), "checkpoint")

# ---- edits -----------------------------------------------------------------------------------------------------------


def rank_of(shape: tuple, rho: float) -> int:
    return max(1, int(min(shape[-2:]) * rho))


def svd(W: mx.array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The singular value decomposition, float32: W (..., m, n) -> (..., m, r), (..., r), (..., r, n), r = min(m, n)."""
    with np.errstate(all="ignore"):
        parts = np.linalg.svd(np.array(W.astype(mx.float32)), full_matrices=False)
    if not np.isfinite(parts[1]).all():
        raise UserError("a matrix holds numbers that are too large to be decomposed: give another checkpoint")
    return parts


def low_rank(parts: tuple, k: int) -> tuple[mx.array, mx.array]:
    """The k largest components of a matrix W from its svd(): u (..., m, k) and v (..., k, n), with W ~ u v."""
    U, s, V = parts
    root = np.sqrt(s[..., :k])
    return mx.array(U[..., :k] * root[..., None, :]), mx.array(root[..., None] * V[..., :k, :])


# ---- search ----------------------------------------------------------------------------------------------------------


def measure(model: GPT, rows: mx.array, streams: list | None = None, layer: int = 0) -> tuple[float, float]:
    """The mean loss, in nats, and the accuracy over rows (n, T + 1). With `streams` from streams_before(), only the
    blocks from `layer` on are computed."""
    nats, hits = [], []
    for i, start in enumerate(range(0, len(rows), batch_size)):
        x, y = rows[start:start + batch_size, :-1], rows[start:start + batch_size, 1:]
        x = model.residual(  # lazy: blocks before a given stream are not computed
            x, tap=lambda site, at, x, i=i: streams[i] if streams and (site, at) == ("resid", layer) else x)
        losses, right = rated(model, x, y)
        nats.append(losses.sum())
        hits.append(right.sum())
    tokens = rows[:, 1:].size
    return sum(n.item() for n in nats) / tokens, sum(n.item() for n in hits) / tokens


def streams_before(model: GPT, rows: mx.array, layer: int) -> list[mx.array]:
    """The residual stream (batch, T, C) before block `layer`, for each batch of rows (n, T + 1)."""
    found = []

    def tap(site, at, x):
        if (site, at) == ("resid", layer):
            found.append(x)
        return x

    for start in range(0, len(rows), batch_size):
        model.residual(rows[start:start + batch_size, :-1], tap=tap)
        mx.eval(found[-1])
    return found


def grid(model: GPT, rows: mx.array, layers: dict[str, nn.Module], rhos: list[float], bar: tqdm) -> dict[tuple, tuple]:
    """(loss, accuracy) of each edit (path, rho), applied alone. The model is unchanged afterwards."""
    found, at = {}, None
    for path, module in layers.items():
        layer = int(path.split(".")[1])
        if layer != at:
            streams, at = streams_before(model, rows, layer), layer
        weight, parts = module.weight, svd(module.weight)
        for rho in rhos:
            u, v = low_rank(parts, rank_of(weight.shape, rho))
            module.weight = (u @ v).astype(weight.dtype)
            found[path, rho] = measure(model, rows, streams, layer)
            bar.update()
        module.weight = weight
    return found


def best_of_each(found: dict[tuple, tuple]) -> list[tuple[str, float]]:
    """For each path, the edit (path, rho) of the least loss."""
    return [min((cell for cell in found if cell[0] == path), key=lambda cell: found[cell][0])
            for path in dict.fromkeys(path for path, _ in found)]


def compose(model: GPT, rows: mx.array, layers: dict[str, nn.Module], found: dict[tuple, tuple],
            best: float) -> list[tuple[str, float]]:
    """Apply the best edit of each matrix, the most useful edit first, and keep it in the model if the loss falls below
    `best`, the lowest loss so far. Returns the edits (path, rho) that were kept."""
    kept, dense = [], best
    for path, rho in sorted(best_of_each(found), key=lambda cell: found[cell]):
        if found[path, rho][0] >= dense:
            break
        weight = layers[path].weight
        u, v = low_rank(svd(weight), rank_of(weight.shape, rho))
        layers[path].weight = (u @ v).astype(weight.dtype)
        loss, _ = measure(model, rows)
        if loss < best:
            best = loss
            kept.append((path, rho))
        else:
            layers[path].weight = weight
    return kept


# ---- show ------------------------------------------------------------------------------------------------------------


def table(found: dict[tuple, tuple], dense: tuple):
    print(f"{'matrix':24} {'rho':>5} {'loss':>9} {'accuracy':>9}   change by the best edit")
    for path, rho in best_of_each(found):
        loss, accuracy = found[path, rho]
        print(f"{path:24} {rho:5} {loss - dense[0]:+9.4f} {accuracy - dense[1]:+9.2%}")


def draw(path: str, found: dict[tuple, tuple], dense: float):
    """Draw the change in loss by the best edit of each matrix, and that edit's rho: layer by matrix."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = {(int(at.split(".")[1]), at.split(".", 2)[2]): (found[at, rho][0] - dense, rho)
             for at, rho in best_of_each(found)}
    layers, names = sorted({at for at, _ in cells}), list(dict.fromkeys(name for _, name in cells))
    change = np.full((len(layers), len(names)), np.nan)
    for (at, name), (value, _) in cells.items():
        change[layers.index(at), names.index(name)] = value
    most = max(np.nanmax(np.abs(change)), 1e-6)
    figure, axes = plt.subplots(figsize=(1.5 + len(names), 1.5 + 0.45 * len(layers)), layout="constrained")
    image = axes.imshow(change, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    for (at, name), (value, rho) in cells.items():
        axes.text(names.index(name), layers.index(at), f"{value:+.4f}\nrho {rho:g}", ha="center", va="center",
                  fontsize=7, color="white" if abs(value) > 0.6 * most else "black")
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(layers)), layers)
    axes.set(ylabel="layer", title="change in loss by the best edit of each matrix, nats")
    figure.colorbar(image)
    write_figure(path, figure)
    plt.close(figure)
    print(f"drawn: {path}")


def print_change(name: str, before: tuple, after: tuple, end: str = ""):
    print(f"{name}: loss {before[0]:.4f} -> {after[0]:.4f}, accuracy {before[1]:.2%} -> {after[1]:.2%}{end}")


# ---- run -------------------------------------------------------------------------------------------------------------


def tried_rhos() -> list[float]:
    try:
        found = [float(part) for part in rhos.split(",")] if search else [rho]
    except ValueError:
        raise UserError(f"rhos={rhos!r} is not a list of numbers separated by commas") from None
    for number in found:
        if not 0 < number <= 1:
            raise UserError(f"rho={number:g}: it must be over 0, and at most 1")
    return found


def one_matrix(layers: dict[str, nn.Module]) -> str:
    """The path of the setting `matrix` in block `layer`."""
    names = list(dict.fromkeys(path.split(".", 2)[2] for path in layers))
    if not matrix:
        raise UserError(f"nothing to edit: give --search=True, or --matrix, one of {', '.join(names)}, and --layer")
    if matrix not in names:
        raise UserError(f"matrix={matrix!r} is in no block: {nearest(matrix, names)}")
    if not 0 <= layer < model.config.n_layer:
        raise UserError(f"layer={layer} is not one of 0 to {model.config.n_layer - 1}")
    if f"blocks.{layer}.{matrix}.u" in layers:
        raise UserError(f"blocks.{layer}.{matrix} is stored as two factors: start from the checkpoint before that edit")
    if f"blocks.{layer}.{matrix}" not in layers:
        raise UserError(f"block {layer} has no {matrix}: name another --layer")
    return f"blocks.{layer}.{matrix}"


if __name__ == "__main__":
    tried = tried_rhos()
    if samples < 1 or batch_size < 1:
        raise UserError("samples and batch_size must be 1 or more")
    if search and not data:
        raise UserError("--search needs a text: give --data=FILE")
    idle = given & ({"matrix", "layer", "rho"} if search else {"rhos", "picture"})
    if idle and search:
        raise UserError(f"--search=True tries every {min(idle)}: leave out --{min(idle)}, or --search")
    if idle:
        raise UserError(f"--{min(idle)} is for a search: give --search=True too, or leave it out")
    model, meta = load_checkpoint(checkpoint)
    out = output_path(checkpoint, out, "laser", data)
    picture, _ = pictures(picture or f"{out.removesuffix('.safetensors')}.png")
    check_output(picture, checkpoint, data)
    check_finite(checkpoint, dict(tree_flatten(model.parameters())))
    layers = {path: module for path, module in matrices(model).items() if path.startswith("blocks.")}
    for path, module in layers.items():
        if "scales" in module:
            raise UserError(f"{path} is quantized to {module.bits} bits: start from the checkpoint before that")
    path = None if search else one_matrix(layers)
    if data:
        enc = Tokenizer.from_dict(meta["tokenizer"]) if meta.get("tokenizer") else None
        T = window_length(model.config, block_size)
        rows = windows(text_of(data, enc, checkpoint, "val"), 2 * samples, T + 1, seed)
        if len(rows) < 2:
            raise UserError(f"{data} has less than two windows of {T} tokens: give a longer text, or a smaller "
                            "--block_size")
        batch_size = min(batch_size, len(rows))
        search_rows, held_out = rows[:len(rows) // 2], rows[len(rows) // 2:]
        before = measure(model, search_rows), measure(model, held_out)
        if not math.isfinite(before[0][0] + before[1][0]):
            raise UserError(f"the model's loss on {data} is infinite or NaN: give another checkpoint")
    size = sum(p.nbytes for _, p in tree_flatten(model.parameters()))
    dense = {path: module.weight for path, module in layers.items()}
    if search:
        with tqdm(total=len(layers) * len(tried), unit=" edits", disable=None, dynamic_ncols=True) as bar:
            found = grid(model, search_rows, layers, tried, bar)
        table(found, before[0])
        kept = compose(model, search_rows, layers, found, before[0][0])
    else:
        u, v = low_rank(svd(layers[path].weight), rank_of(dense[path].shape, rho))
        layers[path].weight, kept = (u @ v).astype(dense[path].dtype), [(path, rho)]
    print(f"{'edit':24} {'rho':>5} {'rank':>5} {'error':>6} {'MB':>9} {'factors':>9}")
    edits = []
    for path, rho in kept:
        W, k = dense[path].astype(mx.float32), rank_of(dense[path].shape, rho)
        error = (mx.linalg.norm(W - layers[path].weight) / mx.linalg.norm(W)).item()
        m, n = W.shape[-2:]
        factors = k * (m + n) / (m * n) * dense[path].nbytes  # in bytes
        print(f"{path:24} {rho:5g} {k:5} {error:6.3f} {dense[path].nbytes / 1e6:9.3f} {factors / 1e6:9.3f}")
        is_factor = f"{path.rpartition('.')[0]}.u" in dense  # of an earlier edit: it is not split again
        if factored and isinstance(layers[path], nn.Linear) and factors < dense[path].nbytes and not is_factor:
            u, v = low_rank(svd(W), k)
            new = Factored(layers[path], k)
            new.u.weight, new.v.weight = u.astype(dense[path].dtype), v.astype(dense[path].dtype)
            if "bias" in layers[path]:
                new.u.bias = layers[path].bias
            replace_module(model, path, new)
        edits.append({"matrix": path, "rho": rho, "rank": k})
    if not kept:
        print("no edit lowers the loss: the model is unchanged")
    if data:
        print_change("windows of the search" if search else "windows", before[0], measure(model, search_rows))
        print_change("held-out windows", before[1], measure(model, held_out), in_windows(model.config, T))
    edits = meta.get("laser", []) + edits
    save_checkpoint(out, model, {**meta, "script": os.path.basename(__file__), "settings": settings, "laser": edits})
    after = sum(p.nbytes for _, p in tree_flatten(model.parameters()))
    print(f"{out}: {os.path.getsize(out) / 1e6:.2f} MB, weights {size / 1e6:.2f} -> {after / 1e6:.2f} MB")
    if search:
        draw(picture, found, before[0][0])
