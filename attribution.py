"""Estimate what states and parts of a model matter for an answer: attribution patching, direct logit attribution.

    python attribution.py CKPT --clean="The capital of France is" --corrupt="The capital of Italy is" --target=" Paris"
    python attribution.py CKPT --site=heads --clean=... --corrupt=... --target=" Paris" --foil=" Rome" --check=0.1
    python attribution.py CKPT --mode=integrated --prompts=prompts.jsonl --positions=all
    python attribution.py CKPT --mode=direct --clean="The capital of France is" --target=" Paris" --foil=" Rome"

patching (Nanda 2023; Syed et al. 2023): patching.py replaces one state of the corrupted prompt's run after another by
that of the clean prompt's run, and needs a run for each. To first order in the change of the state, one backward pass
gives all of these effects at once:

    effect of a state s  =  (s_clean - s_corrupt) . d measure / d s,   the derivative at the corrupted prompt's run

The measure is the log-probability of the target, or, with --foil, the target's logit less the foil's. As in patching.py
an effect is divided by (clean - corrupt), so that 1 is the whole answer. --site chooses the state: resid, mid, attn or
mlp; of a single head heads (its output before the output projection), q, k, v; or hidden, single neurons, of which the
--top with the largest estimates are shown. --positions and --pairs are those of patching.py.

integrated (Sundararajan et al. 2017): the derivative is the mean over --steps points of the straight line from the
corrupted run's state to the clean run's. --line=states moves the states of one layer's site at the positions of the
table, and needs a pass for each layer; their effects then sum to the effect of patching them together, and the largest
error of these sums is printed. --line=embeddings moves the embeddings and takes the derivatives at every state (EAP-IG,
Hanna et al. 2024), in one pass a step.

--check=SHARE also patches this share of the cells one by one, and prints the correlation of both and the slope, the
real effect for each unit of the estimate. Where attention or an answer is saturated, a derivative tells little (Kramár
et al. 2024): report no effect that --check or patching.py has not confirmed.

direct: the residual stream that the head reads at the last position is a sum of the embedding and of what each head and
each MLP adds. With the scale of the last norm kept as it is, the target's logit less the foil's (or, without a foil,
less the mean logit) is a sum of one share for each of them. The sum is compared with the model's own logits, before a
cap (softcap). The scale of norms after attention (norm_place) is kept too. --frozen=False removes each part from the
sum instead, and computes the last norm again: these effects do not add up.

--prompts=FILE, rows with clean, corrupt, target and foil (see inside.py), gives means over prompts, with their standard
errors; of the effects, not of quotients: they are divided by the mean of (clean - corrupt). In Python:

    >>> from model import load_checkpoint; from attribution import attribute, direct; import mlx.core as mx
    >>> model, meta = load_checkpoint("out/ckpt.safetensors")
    >>> measure = lambda logits: logits[..., 7] - logits[..., 9]
    >>> found = attribute(model, mx.array([5, 17, 2]), mx.array([5, 18, 2]), measure, ["heads"])   # {...: (H, T)}
    >>> shares = direct(model, mx.array([5, 17, 2]), measure)                     # .heads (n_layer, H), .mlp, ...
"""
from collections.abc import Callable, Iterable
from typing import NamedTuple

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from config import UserError, check_output, given, overrides
from draw import pictures
from inside import (
    BY_HEAD,
    POSITIONS,
    SITES,
    Table,
    answers,
    by_row,
    check_saved,
    check_site,
    check_turned,
    check_wholes,
    checked_pairs,
    chosen_prompts,
    effects,
    mean_and_error,
    measured,
    opened,
    parsed_pairs,
    record,
    routed,
    rows_of,
    spots,
    told,
)
from model import GPT, sigmoid
from tokenizer import Tokenizer

checkpoint = "out/ckpt.safetensors"  # any checkpoint, quantized or not
mode = "patching"     # patching | integrated | direct
# prompts
clean = ""            # the clean prompt
corrupt = ""          # patching, integrated: the corrupted prompt
target = ""           # the token that should follow the clean prompt
foil = ""             # a token to compare the target with; "": none
prompts = ""          # a file of prompts with these four fields, one a row, in place of these four
bos = True            # begin each prompt with the token that begins every text, where the tokenizer has one
# patching, integrated
site = "resid"        # resid | mid | attn | mlp | hidden | heads | q | k | v
positions = "each"    # each | last | all (at once)
pairs = ""            # "clean position:corrupt position, ..."; "": equal positions of equally long prompts
top = 20              # hidden: neurons that are shown
check = 0.0           # share of the cells that are also patched one by one; 1: all
steps = 5             # integrated: points of the line
line = "states"       # integrated: what moves along the line: states | embeddings
batch_size = 64       # rows at a time, where cells are patched, and on the line of states
seed = 1337           # for the choice of cells that are patched
# direct
frozen = True         # the last norm's scale stays; False: it is computed again without the part
# results
picture = ""          # a PNG; "": the name of the checkpoint with -MODE.png; a page .html is written beside it
save = ""             # an .npz file for the table; "": none

settings = overrides(globals(), "checkpoint")

# ---- gradients -------------------------------------------------------------------------------------------------------

Measure = Callable[[mx.array], mx.array]  # logits (..., V) -> (...)


def gradients(model: GPT, idx: mx.array, measure: Measure, at: dict[tuple[str, int], mx.array],
              start: mx.array | None = None) -> dict[tuple[str, int], mx.array]:
    """The derivatives of measure(logits of the last position) of tokens (1, T) by the states at (site, layer), from one
    backward pass, in the shapes of the arrays `at`. start (1, T, C): in place of the embeddings."""

    def value(zeros):
        stream = None

        def tap(site, layer, x):
            nonlocal stream
            if (site, layer) == ("resid", 0) and start is not None:
                x = start
            if (site, layer) in at:
                x = x + by_row(model, layer, mx.stop_gradient(x if site == "resid" else stream), site,
                               zeros[places[site, layer]])
            if site == "resid":
                stream = x
            return x

        return measure(model.unembed(model.residual(idx, tap=tap)[0, -1]))

    places = {place: n for n, place in enumerate(at)}
    found = mx.grad(value)([mx.zeros_like(x) for x in at.values()])
    return dict(zip(at, found, strict=True))


def run_from(model: GPT, idx: mx.array, states: dict, site: str, layer: int, values: mx.array) -> mx.array:
    """Logits of the last position (n, V) of tokens (1, T), where the states of a site in a layer are values (n, ..., T,
    N). states: those of the tokens, by record(). The blocks before the layer are not computed."""
    n = len(values)

    def entering(at):
        return mx.broadcast_to(states["resid", at], (n, *states["resid", at].shape[1:]))

    def tap(name, at, x):
        if name == "resid" and at <= layer:  # lazy: what gives x is not computed
            x = entering(at)
        return by_row(model, layer, entering(layer), site, values) if (name, at) == (site, layer) else x

    return model.unembed(model.residual(mx.broadcast_to(idx, (n, idx.shape[1])), tap=tap)[:, -1])


def both_states(model: GPT, clean: mx.array, corrupt: mx.array, sites: Iterable[str],
                pairs: list[tuple[int, int]] | None) -> tuple[dict, dict]:
    """The states of the corrupted prompt, tokens (T,), by record(); and these with the clean prompt's states in place
    of their own at the second one of each pair of positions. pairs None: (i, i) for each."""
    pairs = checked_pairs(clean, corrupt, pairs)
    for site in sites:
        check_turned(model, site, pairs)
    froms, tos = zip(*pairs, strict=True)
    if len({*tos}) < len(tos):
        raise UserError("--pairs: two pairs have the same corrupt position, which can hold one state: leave one of "
                        "them out, or run patching.py")
    froms, tos = mx.array(froms), mx.array(tos)
    donor, own = record(model, clean[None], sites), record(model, corrupt[None], sites)
    theirs = {place: mx.array(x) for place, x in own.items()}
    for place, x in theirs.items():
        x[..., tos, :] = donor[place][..., froms, :]
    return own, theirs


def mean_on_line(model: GPT, idx: mx.array, own: dict, theirs: dict, site: str, layer: int, measure: Measure,
                 steps: int, batch_size: int = 64) -> mx.array:
    """The mean derivative by the states of a site in a layer, (1, ..., T, N), at the middles of `steps` parts of the
    line from own[site, layer] to theirs[site, layer]."""
    low, change, total = own[site, layer], theirs[site, layer] - own[site, layer], 0
    for start in range(0, steps, batch_size):
        shares = (mx.arange(start, min(start + batch_size, steps)) + 0.5) / steps
        values = low + shares.reshape(-1, *[1] * (low.ndim - 1)) * change
        found = mx.grad(lambda x: measure(run_from(model, idx, own, site, layer, x)).sum())(values)
        total = total + found.sum(0, keepdims=True)
        mx.eval(total)
    return total / steps


def by_unit(site: str, x: mx.array) -> mx.array:
    """The sums of what is one state: products (1, T, C) -> (1, T), (1, H, T, D) -> (H, T), (1, T, F) -> (F, T)."""
    return x[0].T if site == "hidden" else x.sum(-1) if x.ndim == 3 else x[0].sum(-1)


def attribute(model: GPT, clean: mx.array, corrupt: mx.array, measure: Measure, sites: Iterable[str] = ("resid",),
              steps: int = 0, line: str = "states", pairs: list[tuple[int, int]] | None = None, batch_size: int = 64,
              bar: tqdm | None = None) -> dict[tuple[str, int], mx.array]:
    """The estimated change of measure(logits) where one state of the corrupted prompt is replaced by that of the clean
    one, tokens (T,) each: {(site, layer): (units, T)}, a unit being a head, a neuron, or a layer's whole state. steps
    0: by the derivative at the corrupted prompt (attribution patching); else integrated over so many steps. pairs of
    positions in the clean and the corrupted prompt, None: equal ones; at others the estimate is 0."""
    for site in sites:
        check_site(model, site)
    idx, (own, theirs) = corrupt[None], both_states(model, clean, corrupt, sites, pairs)
    at = {place: x for place, x in own.items() if place[0] in sites and place[1] < model.config.n_layer}
    if steps and line == "states":
        found = {}
        for place in at:
            found[place] = mean_on_line(model, idx, own, theirs, *place, measure, steps, batch_size)
            if bar is not None:
                bar.update()
    else:
        low, found = own["resid", 0], {}
        ends = record(model, clean[None], []) if len(clean) == len(corrupt) else theirs  # all embeddings move
        for step in range(max(1, steps)):
            start = low + (step + 0.5) / steps * (ends["resid", 0] - low) if steps else None
            more = gradients(model, idx, measure, at, start)
            found = {place: found.get(place, 0) + x / max(1, steps) for place, x in more.items()}
            mx.eval(found)
            if bar is not None:
                bar.update()
    return {place: by_unit(place[0], (theirs[place] - own[place]) * x) for place, x in found.items()}


def patch_cells(model: GPT, clean: mx.array, corrupt: mx.array, measure: Measure, site: str, cells: np.ndarray,
                pairs: list[tuple[int, int]] | None = None, batch_size: int = 64, bar: tqdm | None = None
                ) -> np.ndarray:
    """The real change of measure(logits) for each of the cells (n, 3): a layer, a unit as in attribute(), a position in
    the corrupted prompt. -1: all units, or all positions of `pairs`, together."""
    idx, (own, theirs) = corrupt[None], both_states(model, clean, corrupt, [site], pairs)
    before, found = measure(model(idx)[0, -1]), np.zeros(len(cells))
    for layer in np.unique(cells[:, 0]).tolist():
        low, high, of_layer = own[site, layer], theirs[site, layer], np.flatnonzero(cells[:, 0] == layer)
        for start in range(0, len(of_layer), batch_size):
            rows = of_layer[start:start + batch_size]
            chosen = np.zeros((len(rows), *low.shape[1:]), bool)
            for one, (_, *cell) in zip(chosen, cells[rows].tolist(), strict=True):
                unit, position = (slice(None) if i < 0 else i for i in cell)
                one[(position, unit) if site == "hidden" else (unit, position) if site in BY_HEAD else position] = True
            values = mx.where(mx.array(chosen), high, low)
            found[rows] = np.array(measure(run_from(model, idx, own, site, layer, values)) - before)
            if bar is not None:
                bar.update(len(rows))
    return found


# ---- direct logit attribution ----------------------------------------------------------------------------------------


class Direct(NamedTuple):
    """Shares of an answer. total = embedding + positions + sum(layers) + last, if the last norm's scale is frozen."""
    embedding: np.ndarray  # ()
    positions: np.ndarray  # () the learned embedding of the position
    heads: np.ndarray      # (n_layer, H)
    bias: np.ndarray       # (n_layer,) of attention: of its output projection, and of a norm after it
    mlp: np.ndarray        # (n_layer,)
    layers: np.ndarray     # (n_layer,) heads, bias and mlp together
    last: np.ndarray       # () the biases of the last norm and of the head
    total: float           # the answer, from the model's own logits, before a cap


def raw_logits(model: GPT, x: mx.array) -> mx.array:
    """Logits (..., V) of x (..., C), the output of the last norm, before the cap of the variant softcap."""
    return (model.embed.as_linear(x) if model.config.tie else model.head(x)) * model.config.logit_scale


def frozen_norm(norm: nn.Module, x: mx.array) -> Callable[[mx.array], mx.array]:
    """A norm, less its bias, as a linear function: its scale is always that for x (C,)."""
    def centred(part):
        return part - part.mean(-1, keepdims=True) if isinstance(norm, nn.LayerNorm) else part

    factor = mx.rsqrt(mx.square(centred(x)).mean() + norm.eps) * norm.weight
    return lambda part: centred(part) * factor


def depth(model: GPT, layer: int, stream: mx.array) -> mx.array:
    """The factor of what a block adds to the last position of its input (1, T, C): 1, but in Mixture of Depths."""
    block = model.blocks[layer]
    if "depth_router" not in block:
        return mx.array(1.0)
    r = block.depth_router(stream[0, -1:])[0, 0]
    return sigmoid(r) if model.config.mod == "soft" else mx.where(routed(model, layer, stream)[0][0, -1], r, 0)


def parts_of(model: GPT, idx: mx.array) -> tuple[dict[str, mx.array], mx.array]:
    """What is added up in the residual stream of the last position of tokens (1, T), by the names of Direct: embedding
    and positions (C,), heads (n_layer, H, C), the rest (n_layer, C); and the stream (C,) that the last norm reads."""
    config, states, found = model.config, record(model, idx, ["heads", "mlp"]), []
    place = model.pos_embed(mx.array([idx.shape[1] - 1]))[0] if config.pos == "learned" else mx.zeros(config.n_embd)
    for layer, block in enumerate(model.blocks):
        z, mlp = states["heads", layer][0, :, -1], states["mlp", layer][0, -1]
        H, D = z.shape
        alone = mx.concatenate([(mx.eye(H)[:, :, None] * z).reshape(H, H * D), mx.zeros((1, H * D))])
        heads = block.attn.out(alone)  # of each head by itself, and of none: the bias
        heads, bias = heads[:-1] - heads[-1], heads[-1]
        if "attn_post_norm" in block:
            norm = block.attn_post_norm
            linear = frozen_norm(norm, heads.sum(0) + bias)
            heads, bias = linear(heads), linear(bias) + (norm.bias if "bias" in norm else 0)
        heads, bias = heads * config.residual_scale, bias * config.residual_scale
        factor = depth(model, layer, states["resid", layer])
        found.append([x * factor for x in (heads, bias, mlp, heads.sum(0) + bias + mlp)])
    parts = dict(zip(("heads", "bias", "mlp", "layers"), map(mx.stack, zip(*found, strict=True)), strict=True))
    return {"embedding": states["resid", 0][0, -1] - place, "positions": place, **parts}, \
        states["resid", config.n_layer][0, -1]


def direct(model: GPT, idx: mx.array, answer: Measure, frozen: bool = True) -> Direct:
    """The shares of answer(logits of the last position) of tokens (T,). answer: a linear function of logits (..., V).
    frozen False: the change of the answer where a part is taken from the stream, and the last norm computed again."""
    parts, stream = parts_of(model, idx[None])
    norm, zero = model.norm, mx.zeros(model.config.n_embd)

    def read(x):  # (C,), the output of the last norm; an affine function, so that its derivative is exact
        return answer(raw_logits(model, x).astype(mx.float32))

    direction, last = mx.grad(read)(zero), read(norm.bias if "bias" in norm else zero)
    if frozen:
        shares = {name: frozen_norm(norm, stream)(x) @ direction for name, x in parts.items()}
    else:
        shares = {name: (norm(stream) - norm(stream - x)) @ direction for name, x in parts.items()}
    return Direct(**{name: np.array(x) for name, x in shares.items()}, last=np.array(last),
                  total=float(read(norm(stream))))


# ---- show ------------------------------------------------------------------------------------------------------------


def agreement(estimate: np.ndarray, real: np.ndarray) -> str:
    """How well estimates (...) agree with real effects (...): their correlation, and the slope of the line through 0
    that leads from an estimate to the real effect."""
    estimate, real = estimate.ravel(), real.ravel()
    if estimate.std() < 1e-9 or real.std() < 1e-9:
        return "no correlation, as all are equal"
    slope = (estimate * real).sum() / np.square(estimate).sum()
    return f"correlation {np.corrcoef(estimate, real)[0, 1]:.3f}, slope {slope:.2f}"


def run_attribution(model: GPT, enc: Tokenizer, known: dict):
    """The modes patching and integrated."""
    found = chosen_prompts(enc, model, prompts, (clean, corrupt, target, foil), bos, True)
    of_pairs = parsed_pairs(pairs)
    if of_pairs:
        checked_pairs(*found[0][:2], of_pairs)
    of, (columns, at) = measured(enc, *found), spots(enc, found, positions, of_pairs)
    best, before = np.array([[float(prompt.measure(model(mx.array([ids]))[0, -1])) for ids in prompt[:2]]
                             for prompt in found]).T
    wholes, answer = best - before, answers(before, best, of)
    print(answer)
    check_wholes(wholes)
    known = known | told(enc, found, prompts) | {"answer": answer}

    def estimated(steps: int) -> tuple[np.ndarray, list[int]]:
        """The effects (n, layers, units, columns), and the layers."""
        every, passes = [], model.config.n_layer if steps and line == "states" else max(1, steps)
        with tqdm(total=len(found) * passes, unit=" passes", disable=None, dynamic_ncols=True, leave=False) as bar:
            for prompt, pairs_of in zip(found, at, strict=True):
                values = attribute(model, *map(mx.array, prompt[:2]), prompt.measure, [site], steps, line, pairs_of,
                                   batch_size, bar)
                x = mx.stack([*values.values()])
                every.append(np.array(x.sum(-1, keepdims=True) if pairs_of is None and positions == "all" else
                                      x[..., mx.array([j for _, j in pairs_of])]))
        return np.stack(every), [layer for _, layer in values]

    def patched(layer: list, unit: list, column: list) -> np.ndarray:
        """The real effects (n, cells). -1: all units, all columns."""
        real = []
        with tqdm(total=len(found) * len(layer), unit=" cells", disable=None, dynamic_ncols=True, leave=False) as bar:
            for prompt, pairs_of in zip(found, at, strict=True):
                position = [-1 if c < 0 or pairs_of is None else pairs_of[c][1] for c in column]
                cells = np.stack([layer, unit, position], axis=1)
                real.append(patch_cells(model, *map(mx.array, prompt[:2]), prompt.measure, site, cells, pairs_of,
                                        batch_size, bar))
        return np.stack(real)

    every, layers = estimated(steps if mode == "integrated" else 0)
    n_layer, n_unit = every.shape[1:3]
    if mode == "integrated" and line == "states":
        sums = every.sum((2, 3)) - patched(layers, [-1] * n_layer, [-1] * n_layer)
        print("the effects in a layer sum to that of patching these states together, within "
              f"{np.abs(sums.mean(0)).max():.4f}")
    layer, unit = np.indices((n_layer, n_unit)).reshape(2, -1)  # of the table's rows
    if site == "hidden":
        largest = np.argsort(-np.abs(every.mean(0)).max(-1).ravel(), kind="stable")[:top][::-1]
        layer, unit = layer[largest], unit[largest]
    values = every[:, layer, unit]  # (n, rows, columns)
    (mean, error), real = mean_and_error(values, wholes), np.full(values.shape[1:], np.nan)
    if check:
        cells = np.random.default_rng(seed).permutation(real.size)[:max(1, round(check * real.size))]
        row, column = np.unravel_index(np.sort(cells), real.shape)
        truth = patched(np.array(layers)[layer[row]], unit[row], column)
        real[row, column] = truth.mean(0) / wholes.mean()
        lines = [agreement(values[:, row, column], truth)]
        if mode == "integrated":
            plain = estimated(0)[0][:, layer, unit][:, row, column]
            lines.append(f"of attribution patching: {agreement(plain, truth)}")
        known = known | {"check": f"{len(cells):,} of {real.size:,} cells were patched one by one: {'; '.join(lines)}"}
        print(f"{len(cells):,} of {real.size:,} cells were patched one by one:", *lines, sep="\n")

    n_head = n_unit if site in BY_HEAD else 0
    rows, axis = rows_of(site, n_layer, n_head)
    if site == "hidden":
        rows, axis = [f"{layers[i]}.{j}" for i, j in zip(layer, unit, strict=True)], "layer.neuron"
    title = "attribution patching" if mode == "patching" else f"integrated gradients, {steps} steps"
    title = f"{title}, {SITES[site]}"
    if n_head and len(columns) == 1:  # heads side by side
        title, rows, axis, n_head = f"{title}, {columns[0]}", [f"layer {layer}" for layer in layers], "", 0
        columns = [f"head {head}" for head in range(n_unit)]
    shape = len(rows), len(columns)
    mean, error, real, each = (x.reshape(*x.shape[:-2], *shape) for x in (mean, error, real, values / wholes.mean()))
    more = effects(mean, error, each)
    more["more"]["patched"] = real
    more["hovers"] = [[text + f"\npatched: {value:+.4f}" * (not np.isnan(value)) for text, value in
                       zip(*two, strict=True)] for two in zip(more["hovers"], real, strict=True)]
    Table(mean, rows, columns, title, f"estimated (patched - corrupt) / (clean - corrupt) of {of}", axis,
          about=known, group=n_head, **more).finish(picture, save)


def run_direct(model: GPT, enc: Tokenizer, known: dict):
    """The mode direct."""
    found, shares = chosen_prompts(enc, model, prompts, (clean, "", target, foil), bos, False), []
    of = measured(enc, *found)
    if found[0].foil is None:
        of = f"logit of {of.removeprefix('log p(').removesuffix(')')} less the mean logit"
    for prompt in tqdm(found, unit=" prompts", disable=None, dynamic_ncols=True, leave=False):
        def answer(logits, prompt=prompt):
            return logits[..., prompt.target] - (logits[..., :enc.n_vocab].mean(-1) if prompt.foil is None else
                                                 logits[..., prompt.foil])

        shares.append(direct(model, mx.array(prompt.clean), answer, frozen))
    totals = np.array([each.total for each in shares])
    text = answers(totals, None, of) + ", before the cap" * bool(getattr(model.config, "softcap", 0))
    print(text)
    if frozen:
        sums = np.array([each.embedding + each.positions + each.layers.sum() + each.last for each in shares])
        error = np.abs(sums - totals)
        print(f"the shares sum to {sums.mean():.4f}, with an error of at most {error.max():.0e}")
        if (error > 1e-3 * np.array([1 + np.abs(each.layers).sum() for each in shares])).any():
            raise UserError("the shares do not sum to it: this model adds something that attribution.py does not know")

    def table(each: Direct) -> np.ndarray:
        below, above = ([[*[0] * (each.heads.shape[1] + 2), x] for x in ends] for ends in (each[:2], [each.last]))
        return np.array([*below, *np.column_stack([each.heads, each.bias, each.mlp, each.layers]), *above])

    values = np.stack([table(each) for each in shares])
    rows = ["embedding", "position", *(f"layer {layer}" for layer in range(model.config.n_layer)), "last biases"]
    columns = [*(f"head {head}" for head in range(values.shape[2] - 3)), "attention's bias", "MLP", "together"]
    i = [n for n, name in enumerate(rows) if name not in ("position", "last biases") or values[:, n].any()]
    j = [n for n, name in enumerate(columns) if name != "attention's bias" or values[:, :, n].any()]
    values, rows, columns = values[:, i][:, :, j], [rows[n] for n in i], [columns[n] for n in j]
    mean, error = mean_and_error(values)
    title, unit = ("direct logit attribution", f"share of {of}") if frozen else (
        "direct effects", f"what {of} loses without the part")
    Table(mean, rows, columns, title, unit, about=known | told(enc, found, prompts) | {"answer": text},
          **effects(mean, error, values)).finish(picture, save)


# ---- run -------------------------------------------------------------------------------------------------------------

GRID = "corrupt site positions pairs check"
USED = {"patching": GRID, "integrated": f"{GRID} steps line", "direct": "frozen"}  # settings that not every mode uses


def check_settings():
    if mode not in USED:
        raise UserError(f"mode={mode!r} is not one of {', '.join(USED)}")
    for name, choices in (("site", SITES), ("positions", POSITIONS), ("line", ("states", "embeddings"))):
        if settings[name] not in choices:
            raise UserError(f"{name}={settings[name]!r} is not one of {', '.join(choices)}")
    if min(top, steps, batch_size) < 1 or not 0 <= check <= 1 or seed < 0:
        raise UserError("top, steps and batch_size must be 1 or more, check from 0 to 1, and seed 0 or more")
    idle = given & {name for names in USED.values() for name in names.split()} - set(USED[mode].split())
    for name, needs in (("top", site == "hidden"), ("seed", check), ("batch_size", check or line == "states" and
                                                                     mode == "integrated")):
        if name in given and (mode == "direct" or not needs):
            idle.add(name)
    for name in settings:
        if name in idle:
            raise UserError(f"--{name} has no effect with mode={mode}, site={site} and check={check:g}: leave it out")
        if prompts and name in given and name in ("clean", "corrupt", "target", "foil", "pairs"):
            raise UserError(f"--prompts and --{name}: the file holds all of the prompts; leave one of the two out")
    if pairs and positions != "each":
        raise UserError("--pairs and --positions: leave one of the two out")


if __name__ == "__main__":
    check_settings()
    named = mode if site == "resid" or mode == "direct" else f"{mode}-{site}"
    picture, html = pictures(picture or f"{checkpoint.removesuffix('.safetensors')}-{named}.png")
    for path in (picture, html):
        check_output(path, checkpoint, prompts)
    check_saved(save, checkpoint, prompts)
    model, enc, known = opened(checkpoint)
    check_site(model, site)
    (run_direct if mode == "direct" else run_attribution)(model, enc, known)
