"""Show what every head of every layer attends to, while a model reads a prompt.

    python attention_maps.py out/ckpt.safetensors --prompt="def __init__(self, name):"

A map holds the attention weights of a head, softmax(q k^T / sqrt(D) + mask), with a row for each query and a column for
each key, computed from the model's own queries and keys (Vaswani et al. 2017). For each head, it prints which share of
its weight goes to the start of the text, to the token itself, to the token before, to the token after an earlier copy
(induction) and to earlier copies, with the shares of even weights below (docs/inside.md has the formulas); the mean
distance; and the entropy in bits. It draws all maps, layer by head, and writes a page on which a map can be enlarged,
with the tokens and the weight under the pointer. For differential attention it shows both maps and their difference
A1 - lambda A2, before the norm. Windows, ALiBi, sinks and YOCO's shared keys are part of the maps. With experts, it
prints the experts of each token; with Mixture of Depths, the tokens that a block skipped. In Python:

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
from model import (
    DIFF_LAMBDAS,
    GPT,
    attention_weights,
    check_known,
    compute_dtype,
    crosses,
    load_checkpoint,
    rope_to_sinks,
    rotary,
    score_mask,
    windowed,
)
from tokenizer import Tokenizer

checkpoint = "out/ckpt.safetensors"  # any checkpoint, quantized or not
prompt = ""    # the text to read
layers = ""    # the layers to show, as in 0,3-5; "": all
picture = ""   # a PNG; "": the name of the checkpoint with -attention.png; a page .html is written beside it

settings = overrides(globals(), "checkpoint")

# ---- maps ------------------------------------------------------------------------------------------------------------

# Settings of the variants that attention_maps() was written for
KNOWN = ("alibi sliding_window window_pattern sinks diff_attn diff_attn_version n_expert expert_top_k n_shared_expert "
         "expert_balance mod mod_capacity mod_every yoco value_residual value_embeds softcap attn_softcap attn_scale "
         "rotary_dim rope_scaling rope_pattern window_theta parallel norm_place norm_bias out_bias head_bias "
         "qk_norm_width embed_scale residual_scale logit_scale sink_logits router_bias")


def record(model: GPT, idx: mx.array) -> dict[tuple[str, int], mx.array]:
    """The arrays that the model taps for tokens (T,), by (site, layer): see no_tap in model.py."""
    states = {}

    def tap(site, layer, x):
        states[site, layer] = x
        return x

    model.residual(idx[None], tap=tap)
    return states


def order_of(model: GPT, layer: int, x: mx.array) -> tuple[mx.array, mx.array]:
    """The order (T,) in which a routed block (mod=topk) holds the tokens of the stream x (1, T, C), the computed tokens
    first, and how many tokens it computes."""
    chosen, order = model.blocks[layer].taken(x)
    return order[0], chosen.sum()


def places(model: GPT, layer: int, x: mx.array) -> tuple[mx.array, int, int | mx.array, mx.array | None]:
    """The order (T,) in which a layer holds the tokens of the stream x (1, T, C), how many tokens it computes, and the
    arguments offset and keys of score_mask()."""
    T = x.shape[1]
    keys = mx.arange(T) if crosses(model.config, layer) else None
    if "predictor" not in model.blocks[layer]:
        return mx.arange(T), T, 0, keys
    order, n = order_of(model, layer, x)
    return order, n.item(), mx.where(mx.arange(T) < n, order, 2 * T)[None], keys


def attention_maps(model: GPT, idx: mx.array, states: dict | None = None,
                   layers: list[int] | None = None) -> list[dict[str, np.ndarray]]:
    """For each layer {"map": (H, T, T)}, queries by keys, for tokens (T,); with differential attention "first",
    "second" and "difference". Rows of tokens that a routed block skips are nan. states: from record(), if known.
    layers: None: all."""
    check_known(model.config, KNOWN, "attention_maps.py")
    config, T, found = model.config, len(idx), []
    states = states or record(model, idx)
    for layer in range(config.n_layer) if layers is None else layers:
        block, crossing, x = model.blocks[layer], crosses(config, layer), states["resid", layer]
        q, k = states["q", layer], states["k", config.n_layer // 2 if crossing else layer]
        order, n, offset, keys = places(model, layer, x)
        if windowed(config, layer) and config.sinks and rotary(config, layer):
            q, k = rope_to_sinks(config, q, k, block.attn._inverse, offset, keys)
        mask = score_mask(config, layer, T, offset, keys)
        sink = block.attn.sink.weight if config.sink_logits else None
        maps = {"map": attention_weights(config, q, k, mask, sink)[0]}
        if config.diff_attn:
            maps = differential(config, block.attn, block.normed("attn_norm", x)[:, order], maps["map"])
        rows = np.array(order)[:n]
        columns = np.arange(T) if crossing else rows
        found.append({})
        for name, each in maps.items():
            whole = np.full((len(each), T, T), np.nan if n < T else 0, np.float32)
            whole[:, rows[:, None], columns] = np.array(each)[:, :n, :T if crossing else n]
            found[-1][name] = whole
    return found


def visible_keys(model: GPT, states: dict, layer: int) -> np.ndarray:
    """Whether a layer's queries see its keys, (T, T); a token that the layer skips sees none."""
    x = states["resid", layer]
    (order, n, offset, keys), T = places(model, layer, x), x.shape[1]
    mask = score_mask(model.config, layer, T, offset, keys)
    seen = np.tri(T, dtype=bool)
    if isinstance(mask, mx.array):
        seen = np.array(mask if mask.dtype == mx.bool_ else mask > -mx.inf)[0, 0]
    rows = np.array(order)[:n]
    columns = rows if keys is None else np.arange(T)
    found = np.zeros((T, T), bool)
    found[rows[:, None], columns] = seen[:n, :len(columns)]
    return found


def differential(config, attn, x: mx.array, maps: mx.array) -> dict[str, mx.array]:
    """Split maps (2 pairs, T, T) into the first and the second of each pair, and add the difference A1 - lambda A2.
    x (1, T, C): the output of the norm before attention."""
    first, second = maps[0::2], maps[1::2]
    if config.diff_attn_version == 2:
        weight = mx.sigmoid(attn.lam(x))[0].T[..., None].astype(mx.float32)
    else:
        q1, k1, q2, k2 = (attn[name].astype(mx.float32) for name in DIFF_LAMBDAS)
        weight = mx.exp((q1 * k1).sum()) - mx.exp((q2 * k2).sum()) + attn.lambda_0
    return {"first": first, "second": second, "difference": first - weight * second}


# ---- what heads do ---------------------------------------------------------------------------------------------------

# docs/inside.md has the formulas; webgpu/habits.js computes the same numbers.
HABITS = {"start": "attends to the start of the text", "itself": "attends to the token itself",
          "previous": "attends to the previous token",
          "induction": "attends to the token after an earlier copy of the current one (induction)",
          "same token": "attends to earlier copies of the current token"}


def habits(weights: np.ndarray, ids: list[int], visible: np.ndarray) -> dict[str, tuple[float, float, int]]:
    """For each of HABITS the mean share of a head's weights (T, T) that it gets over the rows where it is possible, the
    share by chance, which is that of even weights on the visible keys of these rows, and the number of these rows.
    Without such rows, both shares are nan. ids (T,): the tokens; visible (T, T): see visible_keys()."""
    ids, T = np.asarray(ids), len(ids)
    same, earlier = ids[:, None] == ids, np.tri(T, k=-1, dtype=bool) & (np.arange(T) > 0)
    keys_of = {"start": np.tile(np.arange(T) == 0, (T, 1)), "itself": np.eye(T, dtype=bool),
               "previous": np.eye(T, k=-1, dtype=bool) & earlier,  # not key 0, the start
               "induction": np.roll(same, 1, axis=1) & earlier, "same token": same & earlier}
    n_visible, found = visible.sum(-1), {}
    for name, keys in keys_of.items():
        keys = keys & visible
        rows = keys.any(-1) & (n_visible > 1)  # a row with one key says nothing about the head
        if not rows.any():
            found[name] = float("nan"), float("nan"), 0
            continue
        share = np.where(keys, weights, 0)[rows].sum(-1, dtype=np.float64).mean()
        found[name] = float(share), float((keys.sum(-1)[rows] / n_visible[rows]).mean()), int(rows.sum())
    return found


def far(share: float, chance: float, rows: int) -> bool:
    """Whether a habit is far above chance."""
    return rows > 1 and share >= 2 * chance and share >= chance + 0.1


def stands_out(found: list[dict]) -> tuple[int, str] | None:
    """Of the habits of several heads, the head and the habit with the largest share above chance: (index, name). Most
    heads give weight to the start, so that counts only where no head has another habit. None: no head has one."""
    pairs = [(name != "start", share - chance, i, name) for i, each in enumerate(found)
             for name, (share, chance, rows) in each.items() if far(share, chance, rows)]
    return max(pairs)[2:] if pairs else None


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


def chosen_layers(text: str, n_layer: int) -> list[int]:
    """The layers of the setting: "0,3-5" is [0, 3, 4, 5], "" all. UserError if the model has not all of them."""
    found = set()
    for part in text.split(",") if text else [f"0-{n_layer - 1}"]:
        first, _, last = part.strip().partition("-")
        if not (first.isdecimal() and (last or first).isdecimal() and int(first) <= int(last or first) < n_layer):
            raise UserError(f"layers={text!r}: write layers from 0 to {n_layer - 1}, as in --layers=0,3-5")
        found |= {*range(int(first), int(last or first) + 1)}
    return sorted(found)


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
    model, meta = load_checkpoint(checkpoint)
    if not meta.get("tokenizer"):
        raise UserError(f"{checkpoint} holds no tokenizer to encode a prompt with: give another checkpoint")
    shown = chosen_layers(layers, model.config.n_layer)
    enc = Tokenizer.from_dict(meta["tokenizer"])
    ids = prompt_ids(enc, prompt, model)
    model.set_dtype(compute_dtype("auto"))
    states = record(model, mx.array(ids))
    check_finite(np.array(states["resid", model.config.n_layer].astype(mx.float32)))
    maps, tokens = attention_maps(model, mx.array(ids), states, shown), labels(enc, ids)
    found = habits_of(maps, shown, ids, [visible_keys(model, states, layer) for layer in shown])
    table(maps, shown, found)
    parts = routing(model, states, tokens)
    draw(picture, maps, shown, tokens)
    write_page(html, maps, shown, tokens, found, parts)
    size = os.path.getsize(html) / 1e6
    print(f"drawn: {picture}, {html}"
          + (f"\nThe page has {size:.0f} MB; --layers=0,3-5 shows only these layers" if size > 20 else ""))
