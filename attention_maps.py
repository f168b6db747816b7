"""Show what every head of every layer attends to, while a model reads a prompt.

    python attention_maps.py out/ckpt.safetensors --prompt="def __init__(self, name):"

A map holds the attention weights of a head, softmax(q k^T / sqrt(D) + mask), with a row for each query and a column for
each key, computed from the model's own queries and keys (Vaswani et al. 2017). For each head, it prints which share of
its weight goes to the start of the text, to the token itself, to the token before, to the token after an earlier copy
(induction) and to earlier copies, with the shares of even weights below (docs/inside.md has the formulas); the mean
distance; and the entropy in bits. It draws all maps, layer by head, and writes a page on which a map can be enlarged,
with the tokens and the weight under the pointer. For differential attention it shows both maps and their difference
A1 - lambda A2, before the norm. Windows, ALiBi, sinks and YOCO's shared keys are part of the maps. With experts, it
prints the experts of each token; with Mixture of Depths, the tokens that a block skipped. --save writes the maps of the
shown layers, "map.3" (H, T, T) for layer 3, and the tokens. In Python:

    >>> from model import load_checkpoint; from attention_maps import attention_maps; import mlx.core as mx
    >>> model, meta = load_checkpoint("out/ckpt.safetensors")
    >>> maps = attention_maps(model, mx.array([5, 17, 2]))[3]["map"]    # layer 3: (H, T, T), queries by keys
"""
import base64
import json
import os
import zlib

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np

from config import UserError, check_output, overrides
from draw import check_finite, grid, labels, page, pictures, prompt_ids, short, write_figure
from habits import HABITS, attention_maps, far, habits, order_of, record, stands_out, visible_keys
from inside import about, check_saved, chosen_layers, listed, save_arrays
from model import GPT, compute_dtype, load_checkpoint
from tokenizer import Tokenizer

checkpoint = "out/ckpt.safetensors"  # any checkpoint, quantized or not
prompt = ""    # the text to read
layers = ""    # the layers to show, as in 0,3-5; "": all
bos = True     # the prompt begins with the token that begins a text, if the tokenizer has one
save = ""      # write the maps to this .npz file; "": do not
picture = ""   # a PNG; "": the name of the checkpoint with -attention.png; a page .html is written beside it

settings = overrides(globals(), "checkpoint")

# ---- routing ---------------------------------------------------------------------------------------------------------


def experts(model: GPT, states: dict) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """For each layer, the experts of each token, that of the largest weight first, and their weights: (T, k) both."""
    config, found = model.config, []
    for layer, block in enumerate(model.blocks):
        logits = np.array(states["router", layer].astype(mx.float32))[0]
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        by = p + np.array(block.mlp.balance) if "balance" in block.mlp else p
        chosen = np.argsort(-by, axis=-1, kind="stable")[:, :config.expert_top_k]
        gates = np.take_along_axis(p, chosen, -1)
        if config.expert_top_k > 1:
            gates = gates / gates.sum(-1, keepdims=True)
        if "predictor" in block:  # with mod=topk, the tokens are in another order
            order, n = order_of(model, layer, states["resid", layer])
            back = np.argsort(np.array(order))
            chosen, gates = np.where(np.arange(len(chosen)) < n.item(), chosen.T, -1).T[back], gates[back]
        found.append((chosen, gates))
    return found


def depth(model: GPT, states: dict) -> list[np.ndarray | None]:
    """For each layer, the weight of the block's output for each token (T,), 0 where the token is skipped; None for a
    block that is not routed."""
    found = []
    for layer in range(model.config.n_layer):
        r = states.get(("depth", layer))
        if r is None:
            found.append(None)
        elif model.config.mod == "soft":
            found.append(np.array(mx.sigmoid(r[0].astype(mx.float32))))
        else:
            order, n = order_of(model, layer, states["resid", layer])
            chosen = np.isin(np.arange(r.shape[1]), np.array(order)[:n.item()])
            found.append(np.where(chosen, np.array(r[0].astype(mx.float32)), 0))
    return found


# ---- show ------------------------------------------------------------------------------------------------------------


def habits_of(maps: list[dict[str, np.ndarray]], layers: list[int], ids: list[int], seen: list[np.ndarray]) -> dict:
    """habits() of each head, by (layer, map, head). seen: the visible keys in each of these layers."""
    return {(layer, name, head): habits(weights, ids, visible)
            for layer, named, visible in zip(layers, maps, seen, strict=True)
            for name, each in named.items() if name != "difference" for head, weights in enumerate(each)}


def percent(share: float) -> str:
    return "<1%" if 0 < share < 0.01 else f"{share:.0%}"


def table(maps: list[dict[str, np.ndarray]], layers: list[int], found: dict):
    """Print, for each head, the share of each habit, its mean distance and its entropy; for each layer, the shares by
    chance; and the head that stands out. found: from habits_of()."""
    widths = [max(7, len(name) + 1) for name in HABITS]

    def line(*start, cells, end=("", "")):
        print("{:>5} {:>4} {:6}".format(*start) + "".join(f"{cell:>{width}} " for cell, width in zip(
            cells, widths, strict=True)) + "{:>8} {:>5}".format(*end))

    line("layer", "head", "map", cells=[f"{name} " for name in HABITS], end=("distance", "bits"))
    chances = {}
    for layer, named in reversed([*zip(layers, maps, strict=True)]):
        for name, each in named.items():
            for head, weights in enumerate(each):
                seen = np.nan_to_num(weights[~np.isnan(weights).all(-1)])
                if name == "difference" or not len(seen):
                    continue
                whole = np.nan_to_num(weights)
                n, away = len(seen), np.abs(np.subtract.outer(np.arange(len(whole)), np.arange(len(whole))))
                entropy = -(seen * np.log2(np.maximum(seen, 1e-30))).sum() / n
                shares = found[layer, name, head].values()
                cells = [f"{share:.1%}" + " *"[far(share, chance, rows)] if rows else "- "
                         for share, chance, rows in shares]
                line(layer, head, name, cells=cells, end=(f"{(whole * away).sum() / n:.2f}", f"{entropy:.2f}"))
                chances[layer] = [f"{chance:.1%} " if rows else "- " for _, chance, rows in shares]
    same = len({*map(tuple, chances.values())}) == 1
    for layer in [*chances][-1:] if same else chances:
        line("" if same else layer, "", "chance", cells=chances[layer])
    print("*: far above chance")
    most = stands_out([*found.values()])
    if most:
        layer, name, head = [*found][most[0]]
        share, chance, _ = found[layer, name, head][most[1]]
        print(f"layer {layer}, head {head}{f', {name} map' * (name != 'map')} stands out: it {HABITS[most[1]]}\n"
              f"({percent(share)} of its weight; by chance {percent(chance)})")


def draw(path: str, maps: list[dict[str, np.ndarray]], layers: list[int], tokens: list[str]):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import PowerNorm

    rows = [(f"layer {layer}" if name == "map" else f"layer {layer}\n{name}", name, each)
            for layer, named in zip(layers, maps, strict=True) for name, each in named.items()][::-1]
    most, names = max(len(each) for _, _, each in rows), [*map(short, tokens)] if len(tokens) <= 32 else []
    size = max(1.3, 0.09 * len(names))
    figure, axes = plt.subplots(len(rows), most, figsize=(2 + size * most, 1.2 + size * len(rows)), squeeze=False,
                                layout="compressed")
    for line, (label, name, each) in zip(axes, rows, strict=True):
        for head, spot in enumerate(line):
            spot.set(xticks=[], yticks=[])
            if head >= len(each):
                spot.axis("off")
            elif name == "difference":
                top = np.nan_to_num(np.abs(each[head])).max() or 1  # with mod=topk a layer may skip all tokens
                spot.imshow(each[head], cmap="RdBu_r", vmin=-top, vmax=top, interpolation="nearest")
            else:
                image = spot.imshow(each[head], cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
        line[0].set_ylabel(label, fontsize=8)
        line[0].set_yticks(range(len(names)), names, fontsize=5, family="monospace", parse_math=False)
    for head, spot in enumerate(axes[0]):
        spot.set_title(f"head {head}", fontsize=8)
    for spot in axes[-1]:
        spot.set_xticks(range(len(names)), names, fontsize=5, family="monospace", rotation=90, parse_math=False)
    ticks = [0, 0.01, 0.1, 0.25, 0.5, 1]
    bar = figure.colorbar(image, ax=axes, ticks=ticks, shrink=min(1, 3 / len(rows)), aspect=12)
    bar.ax.set_yticklabels([f"{tick:.0%}" for tick in ticks], fontsize=7)
    bar.set_label("weight of a key (column) for a query (row)", fontsize=7)
    write_figure(path, figure, dpi=110)
    plt.close(figure)


def packed(weights: np.ndarray, signed: bool) -> str:
    """The lower triangle of a map (T, T), row by row, in base64 of deflated bytes. A byte is the root of the weight
    times 255, and 1 or more for a weight above 0; signed: 128 plus the root, with the weight's sign, times 127."""
    lower = np.nan_to_num(weights[np.tril_indices(len(weights))])
    steps = 127 if signed else 255
    size = np.where(lower == 0, 0, np.clip(np.round(steps * np.sqrt(np.abs(lower))), 1, steps))
    values = 128 + np.sign(lower) * size if signed else size
    return base64.b64encode(zlib.compress(values.astype(np.uint8).tobytes())).decode()


def write_page(path: str, maps: list[dict[str, np.ndarray]], layers: list[int], tokens: list[str], found: dict,
               parts: list[str]):
    """The page of attention_maps.html, with the maps in it. found: from habits_of()."""
    most = stands_out([*found.values()])
    chosen = [*found][most[0]] if most else None

    def told(place):  # for each habit the two shares, and whether it is far above chance
        return [[share, chance, far(share, chance, rows)] if rows else [None, None, False]
                for share, chance, rows in found[place].values()] if place in found else None

    data = {"tokens": tokens, "habits": [*HABITS.items()], "maps": [
        {"name": f"layer {layer}" + (f", {name}" if name != "map" else ""), "signed": name == "difference",
         "skipped": np.flatnonzero(np.isnan(each[0]).all(-1)).tolist(),
         "heads": [{"weights": packed(weights, name == "difference"), "habits": told((layer, name, head)),
                    "stands": (layer, name, head) == chosen} for head, weights in enumerate(each)]}
        for layer, named in zip(layers, maps, strict=True) for name, each in named.items()]}
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    with open(f"{os.path.splitext(os.path.abspath(__file__))[0]}.html", encoding="utf-8") as file:
        whole = file.read().replace("DATA", text, 1)
    page(path, "Attention", "A map for each head, layer 0 at the bottom: rows attend to columns. Choose a head to "
         "enlarge its map; below a map stands what the head does far more than by chance.", whole, *parts)


def routing(model: GPT, states: dict, tokens: list[str]) -> list[str]:
    """Print, and return as HTML, the experts of each token, and the weights that Mixture of Depths gives to tokens."""
    def show(title: str, texts: list[list[str]]):
        print(title)
        step = 71 // (width + 1)  # columns that fit into 80 characters
        for first in range(0, len(tokens), step):
            for row, line in zip(["", *rows], [tokens, *texts], strict=True):
                print(f"{row:9}" + "".join(f" {text[:width]:>{width}}" for text in line[first:first + step]))

    parts, config = [], model.config
    rows = [f"layer {layer}" for layer in reversed(range(config.n_layer))]
    width = max(7, min(12, max(map(len, tokens))))
    if config.n_expert:
        found = experts(model, states)[::-1]
        texts = [["skipped" if line[0] < 0 else "+".join(map(str, line)) for line in chosen] for chosen, _ in found]
        hovers = [[f"{token}: " + ", ".join(f"expert {e} {g:.0%}" for e, g in zip(*pair, strict=True))
                   for token, pair in zip(tokens, zip(*layer, strict=True), strict=True)] for layer in found]
        parts += ["<h2>Experts</h2>", grid([gates[:, 0] for _, gates in found], rows, tokens, texts, hovers)]
        show("experts of each token", texts)
    if config.mod != "none":
        found = [np.ones(len(tokens)) if each is None else each for each in depth(model, states)[::-1]]
        texts = [["skipped" if value == 0 else f"{value:.2f}" for value in line] for line in found]
        parts += ["<h2>Depth</h2>", grid(found, rows, tokens, texts, texts, signed=True)]
        show("weight of the block's output for each token", texts)
    return parts


# ---- run -------------------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    picture, html = pictures(picture or f"{checkpoint.removesuffix('.safetensors')}-attention.png")
    for name in (picture, html):
        check_output(name, checkpoint)
    check_saved(save, checkpoint)
    model, meta = load_checkpoint(checkpoint)
    if not meta.get("tokenizer"):
        raise UserError(f"{checkpoint} holds no tokenizer to encode a prompt with: give another checkpoint")
    shown = chosen_layers(layers, model.config.n_layer)
    enc = Tokenizer.from_dict(meta["tokenizer"])
    ids, known = prompt_ids(enc, prompt, model, bos=bos), about(checkpoint, model, prompt=prompt)
    model.set_dtype(compute_dtype("auto"))
    states = record(model, mx.array(ids))
    check_finite(np.array(states["resid", model.config.n_layer].astype(mx.float32)))
    maps, tokens = attention_maps(model, mx.array(ids), states, shown), labels(enc, ids)
    found = habits_of(maps, shown, ids, [visible_keys(model, states, layer) for layer in shown])
    table(maps, shown, found)
    parts = routing(model, states, tokens)
    draw(picture, maps, shown, tokens)
    write_page(html, maps, shown, tokens, found, [*parts, listed(known)])
    size = os.path.getsize(html) / 1e6
    print(f"drawn: {picture}, {html}"
          + (f"\nThe page has {size:.0f} MB; --layers=0,3-5 shows only these layers" if size > 20 else ""))
    if save:
        arrays = {f"{name}.{layer}": each for layer, named in zip(shown, maps, strict=True)
                  for name, each in named.items()}
        save_arrays(save, tokens=np.array(ids), texts=np.array(tokens), about=np.array(json.dumps(known)), **arrays)
