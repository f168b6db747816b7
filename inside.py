"""What the scripts that look inside a model share: states at its sites, prompts with answers, and tables of results.

    states = record(model, mx.array([[5, 17, 2]]), ["resid", "heads"])   # {("heads", layer): (B, H, T, D), ...}
    prompts = read_prompts("ioi.jsonl", enc, model)                      # clean, corrupt, target, foil of each line
    table = Table(values, rows, columns, "swap, MLP", "change of log p, nats", about=about(path, model, prompts[0]))
    table.show("swap.png"); table.save("swap.npz"); np.array(table)

A prompt set is a .jsonl, .csv or other file that rows.py reads. Each row has the fields `clean` and `target`, and may
have `corrupt`, `foil` and `subject`: texts. A Table prints itself, draws a picture and a page, is saved as arrays, and
shows itself in a notebook.
"""
import contextlib
import html
import io
import json
import math
import os
import shlex
import sys
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from config import UserError, check_output
from draw import (
    check_finite,
    check_folder,
    for_notebook,
    grid,
    heat_map,
    labels,
    legend,
    page,
    pictures,
    prompt_ids,
    short,
    state_name,
    write_whole,
)
from lora import base_fingerprint
from model import GPT, Embedding, Linear, load_checkpoint, no_tap, rotary
from quantized import dense_weight, replace_module
from rows import read_rows
from tokenizer import Tokenizer

# ---- states ----------------------------------------------------------------------------------------------------------

SITES = {  # what a tap sees: see no_tap in model.py; T is the axis before the last one in each
    "resid": "residual stream", "attn": "attention", "mlp": "MLP",
    "mid": "residual stream within a layer", "heads": "heads", "q": "queries", "k": "keys", "v": "values",
    "hidden": "neurons"}


BY_HEAD = "heads", "q", "k", "v"  # (B, H, T, D); the others are (B, T, C)


def check_site(model: GPT, site: str, known: Iterable[str] = SITES):
    """UserError if this is no site, or the model has no state there."""
    if site not in known:
        raise UserError(f"site={site!r} is not one of {', '.join(known)}")
    if site == "mid" and model.config.parallel:
        raise UserError("site=mid: in this model attention and MLP read the same state, so there is none between them")
    if site == "hidden" and model.config.n_expert:
        raise UserError("site=hidden: the MLPs of this model are experts, whose neurons are not read: give site=mlp")


def routed(model: GPT, layer: int, stream: mx.array, site: str = "mlp") -> tuple[mx.array, mx.array]:
    """For the stream (B, T, C) that enters a block: whether the block computes each token, and the token's row in the
    arrays that the block taps at a site, both (B, T). With mod=topk, skipped tokens come after the others in these."""
    block, shape = model.blocks[layer], stream.shape[:2]
    shared = model.config.yoco and site in ("k", "v") and layer == model.config.n_layer // 2  # not made by the block
    if "predictor" not in block or site == "resid" or shared:
        return mx.ones(shape, mx.bool_), mx.broadcast_to(mx.arange(shape[1]), shape)
    chosen, order = block.taken(stream)
    return chosen, mx.argsort(order, axis=1)


def record(model: GPT, idx: mx.array, sites: Iterable[str] = ("resid", "attn", "mlp"),
           noisy: Callable | None = None) -> dict[tuple[str, int], mx.array]:
    """The states of tokens (B, T) at each (site, layer): (B, T, C), or for heads, q, k and v (B, H, T, D). Where a
    block skips a token, they are 0, or at site mid what enters the block. A layer that has no such site (k and v in
    YOCO's second half) is left out. noisy: a function that is applied to the embeddings."""
    wanted, found = {"resid", *sites}, {}

    def tap(at, layer, x):
        if (at, layer) == ("resid", 0) and noisy is not None:
            x = noisy(x)
        if at in wanted:
            found[at, layer] = x
        return x

    model.residual(idx, tap=tap)
    if model.config.mod == "topk":
        for (site, layer), x in found.items():
            if site == "resid":
                continue
            chosen, row = routed(model, layer, found["resid", layer], site)
            if x.ndim == 4:
                chosen, row = chosen[:, None], row[:, None]
            x = mx.take_along_axis(x, row[..., None], axis=-2)
            found[site, layer] = mx.where(chosen[..., None], x, found["resid", layer] if site == "mid" else 0)
    return found


def opened(checkpoint: str) -> tuple[GPT, Tokenizer, dict]:
    """A checkpoint's model, for scripts that compare many runs of it, its tokenizer, and about(). The model is in
    float32, on a GPU too, since effects are small differences of logits. UserError if there is no tokenizer."""
    model, meta = load_checkpoint(checkpoint)
    if not meta.get("tokenizer"):
        raise UserError(f"{checkpoint} holds no tokenizer to encode a prompt with: give another checkpoint")
    known = about(checkpoint, model)
    model.set_dtype(mx.float32)
    unpack(model)
    return model, Tokenizer.from_dict(meta["tokenizer"]), known


def unpack(model: GPT, most: int = 2**32):
    """Make the packed linear layers and embeddings of a model dense, in float32, for scripts that run it many times:
    each pass over many tokens would unpack them again. They stay packed if they would need more than `most` bytes."""
    packed = [(path, module) for path, module in model.named_modules()
              if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding))]
    if sum(4 * module.weight.size * 32 // module.bits for _, module in packed) > most:
        return
    for path, module in packed:
        dense = Linear(1, 1, bias=False) if isinstance(module, nn.QuantizedLinear) else Embedding(1, 1)
        dense.weight = dense_weight(module)
        if "bias" in module:
            dense.bias = module.bias
        replace_module(model, path, dense)
    model.eval()
    mx.eval(model.parameters())


def numpy_of(x: mx.array) -> np.ndarray:
    """A state as numpy's array. numpy has no bfloat16: such a state becomes float32."""
    return np.array(x.astype(mx.float32) if x.dtype == mx.bfloat16 else x)


def chosen_layers(text: str, n_layer: int) -> list[int]:
    """The layers of the setting: "0,3-5" is [0, 3, 4, 5], "" all. UserError if the model has not all of them."""
    found = set()
    for part in text.split(",") if text else [f"0-{n_layer - 1}"]:
        first, _, last = part.strip().partition("-")
        if not (first.isdecimal() and (last or first).isdecimal() and int(first) <= int(last or first) < n_layer):
            raise UserError(f"layers={text!r}: write layers from 0 to {n_layer - 1}, as in --layers=0,3-5")
        found |= {*range(int(first), int(last or first) + 1)}
    return sorted(found)


def by_row(model: GPT, layer: int, stream: mx.array, site: str, x: mx.array) -> mx.array:
    """What x (B, ..., T, C) has for each token, in the order of the rows that the block taps at a site."""
    if "predictor" not in model.blocks[layer] or site == "resid" or x.shape[-2] == 1:
        return x
    token = mx.argsort(routed(model, layer, stream, site)[1], axis=1)
    return mx.take_along_axis(x, token.reshape(len(x), *[1] * (x.ndim - 3), -1, 1), axis=-2)


def mean_of(x: mx.array, worked: mx.array) -> mx.array:
    """The mean (..., C) of states (B, ..., T, C) over the tokens where worked (B, T) is true."""
    worked = worked.astype(mx.float32).reshape(len(worked), *[1] * (x.ndim - 3), -1, 1)
    return ((x.astype(mx.float32) * worked).sum((0, -2)) / mx.maximum(worked.sum(), 1)).astype(x.dtype)


def mean_states(model: GPT, batches: Iterable[mx.array], sites: Iterable[str],
                at: Iterable[list[int] | None]) -> dict[tuple[str, int], mx.array]:
    """The mean states of tokens (B, T) of some batches, as record() gives them, with the axes (1, [H,] P, C). at: for
    each batch P positions, at which the means are taken; None: one mean over all positions, P = 1."""
    totals, counts = {}, {}
    for idx, positions in zip(batches, at, strict=True):
        states = with_changes(record(model, idx, set(sites) - {"block"}))
        for (site, layer), x in states.items():
            if site not in sites:
                continue
            worked = routed(model, layer, states["resid", layer], site)[0] if site != "block" else mx.ones(idx.shape)
            worked = worked.astype(mx.float32).reshape(len(idx), *[1] * (x.ndim - 3), -1, 1)
            x = x.astype(mx.float32) * worked
            if positions is None:
                x, worked = (y.sum(-2, keepdims=True) for y in (x, worked))
            else:
                x, worked = (y[..., mx.array(positions), :] for y in (x, worked))
            totals[site, layer] = totals.get((site, layer), 0) + x.sum(0, keepdims=True)
            counts[site, layer] = counts.get((site, layer), 0) + worked.sum(0, keepdims=True)
        mx.eval(totals, counts)
    return {key: total / mx.maximum(counts[key], 1) for key, total in totals.items()}


def with_changes(states: dict) -> dict:
    """States of record(), with what each block adds to the stream as the site "block"."""
    layers = [layer for site, layer in states if site == "resid" and layer]
    return states | {("block", n - 1): states["resid", n] - states["resid", n - 1] for n in layers}


# ---- answers ---------------------------------------------------------------------------------------------------------


def log_p(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


class Prompt(NamedTuple):
    """Tokens of a clean prompt, of a corrupted one (empty: there is none), the token that should follow the clean one,
    the token to compare it with (None: there is none), and a part of the clean prompt ("": none is named)."""
    clean: list[int]
    corrupt: list[int]
    target: int
    foil: int | None
    subject: str = ""

    def measure(self, logits: mx.array) -> mx.array:
        """Of logits (..., V): the target's less the foil's, or without a foil the target's log-probability, (...)."""
        if self.foil is None:
            return log_p(logits)[..., self.target]
        logits = logits.astype(mx.float32)
        return logits[..., self.target] - logits[..., self.foil]


def one_token(enc: Tokenizer, text: str, name: str) -> int:
    """The first token of the setting `name`. UserError if it is empty."""
    ids = enc.encode(text).tolist()
    if not ids:
        raise UserError(f"no {name}: give --{name}=TOKEN")
    if len(ids) > 1:
        print(f"{name} {text!r} is {len(ids)} tokens: the first, {enc.decode(ids[:1])!r}, is used")
    return ids[0]


def prompt_of(enc: Tokenizer, model: GPT, clean: str, corrupt: str, target: str, foil: str, bos: bool = True,
              subject: str = "", name: str = "clean") -> Prompt:
    """The prompts and answers of a script's settings, of which corrupt and foil may be "". bos: see prompt_ids(); name:
    the setting of the clean prompt.
    UserError if they do not fit the model, or target and foil begin with the same token."""
    ids = prompt_ids(enc, clean, model, name, bos)
    found = Prompt(ids, prompt_ids(enc, corrupt, model, "corrupt", bos) if corrupt else [],
                   one_token(enc, target, "target"), one_token(enc, foil, "foil") if foil else None, subject)
    if found.target == found.foil:
        raise UserError(f"target and foil begin with the same token, {enc.decode([found.target])!r}: give another foil")
    return found


def read_prompts(path: str, enc: Tokenizer, model: GPT, bos: bool = True) -> list[Prompt]:
    """The prompts of a file, one a row. UserError tells which row is wrong. bos: see prompt_ids()."""
    found = []
    for where, row in read_rows(path):
        if isinstance(row, ValueError):
            raise UserError(f"{where}: {row}")
        texts = [row.get(name) or "" for name in ("clean", "corrupt", "target", "foil", "subject")]
        if not all(isinstance(text, str) for text in texts) or not (texts[0] and texts[2]):
            raise UserError(f"{where}: it needs the texts clean and target, and may have corrupt, foil and subject")
        try:
            found.append(prompt_of(enc, model, *texts[:4], bos, texts[4]))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    if not found:
        raise UserError(f"{path} has no rows: write one a line, as in "
                        '{"clean": "...", "corrupt": "...", "target": "...", "foil": "..."}')
    return found


def measured(enc: Tokenizer, *prompts: Prompt) -> str:
    """What Prompt.measure() gives, in words. UserError if some prompts have a foil and others have not."""
    foils = {prompt.foil is None for prompt in prompts}
    if len(foils) > 1:
        raise UserError("some prompts have a foil and others have none: give all a foil, or none")
    names = {(prompt.target, prompt.foil) for prompt in prompts}
    target, foil = names.pop() if len(names) == 1 else (None, None)
    if target is None:
        return "log p(target)" if foils == {True} else "logit of target less that of foil"
    if foil is None:
        return f"log p({enc.decode([target])!r})"
    return f"logit of {enc.decode([target])!r} less that of {enc.decode([foil])!r}"


def told(enc: Tokenizer, prompts: list[Prompt], path: str = "") -> dict[str, str]:
    """Prompts and answers for about(): of a set, which is the file `path`, the first ones as an example."""
    def text(ids):
        return enc.decode(ids[len(enc.start) * (ids[:len(enc.start)] == enc.start):])

    first, n = prompts[0], len(prompts)
    found = {"prompts": f"{os.path.basename(path)}, {n}; the first one:"} if path else {}
    found["clean"] = repr(text(first.clean))
    if first.corrupt:
        found["corrupt"] = repr(text(first.corrupt))
    found["target"] = repr(text([first.target]))
    if first.foil is not None:
        found["foil"] = repr(text([first.foil]))
    return found


def chosen_prompts(enc: Tokenizer, model: GPT, path: str, texts: tuple[str, str, str, str], bos: bool,
                   with_corrupt: bool) -> list[Prompt]:
    """The prompts of a script's settings: those of the file `path`, or if that is "" the one of the texts clean,
    corrupt, target and foil. with_corrupt: each must have a corrupt one; else none keeps it."""
    found = read_prompts(path, enc, model, bos) if path else [prompt_of(enc, model, *texts, bos)]
    for number, prompt in enumerate(found, 1):
        if with_corrupt and not prompt.corrupt:
            raise UserError(f"{path}: prompt {number} has no corrupt one" if path else
                            "no prompt: give --corrupt=TEXT")
    return found if with_corrupt else [prompt._replace(corrupt=[]) for prompt in found]


def last_logits(model: GPT, idx: mx.array, tap: Callable) -> mx.array:
    """Logits (B, V) of the last position."""
    return model.unembed(model.residual(idx, tap=tap)[:, -1])


def in_parts(lengths: list, batch_size: int) -> list[list[int]]:
    """The numbers of prompts that run together: those of equal lengths, at most batch_size of them."""
    parts = [[i for i, other in enumerate(lengths) if other == length] for length in dict.fromkeys(lengths)]
    return [part[start:start + batch_size] for part in parts for start in range(0, len(part), batch_size)]


def measures(prompts: list[Prompt], logits: mx.array) -> mx.array:
    """Prompt.measure() of logits (..., D, V) of D prompts: (..., D)."""
    return mx.stack([prompt.measure(logits[..., n, :]) for n, prompt in enumerate(prompts)], -1)


def on_prompts(model: GPT, found: list[Prompt], ids: list[list[int]], parts: list[list[int]],
               tap: Callable = lambda part: no_tap) -> np.ndarray:
    """The measures (n,) after each of n prompts, which have the tokens ids. tap: for the prompts of a part."""
    values = np.empty(len(found))
    for part in parts:
        logits = last_logits(model, mx.array([ids[i] for i in part]), tap(part))
        values[part] = np.array(measures([found[i] for i in part], logits))
    return values


POSITIONS = "each", "last", "all"


def parsed_pairs(pairs: str) -> list[tuple[int, int]] | None:
    try:
        return [(int(i), int(j)) for i, _, j in (pair.partition(":") for pair in pairs.split(","))] if pairs else None
    except ValueError:
        raise UserError(f'pairs={pairs!r}: write pairs of positions, as in "4:5, 6:7"') from None


def checked_pairs(donor: mx.array, recipient: mx.array, pairs: list[tuple[int, int]] | None) -> list[tuple[int, int]]:
    """The pairs of positions, by default (i, i) for each. UserError if they do not fit the prompts."""
    if pairs is None:
        if len(donor) != len(recipient):
            raise UserError(f"the prompts have {len(donor)} and {len(recipient)} tokens: say which positions "
                            'correspond, as in --pairs="4:5, 6:7", or give --positions=last')
        return [(i, i) for i in range(len(recipient))]
    for i, j in pairs:
        if not (0 <= i < len(donor) and 0 <= j < len(recipient)):
            raise UserError(f"pair {i}:{j}: the prompts have positions 0 to {len(donor) - 1} and 0 to "
                            f"{len(recipient) - 1}")
    return pairs


def check_turned(model: GPT, site: str, pairs: Iterable[tuple[int, int]]):
    """UserError if queries or keys would go from one position to another: they are turned by the position that they
    had."""
    turned = site in ("q", "k") and any(rotary(model.config, layer) for layer in range(model.config.n_layer))
    if turned and any(i != j for i, j in pairs):
        raise UserError(f"site={site}: these states are turned by their position, and mean something else at another "
                        "one: give prompts of equally many tokens and equal positions, or another site")


def spots(enc: Tokenizer, prompts: list[Prompt], positions: str = "each",
          pairs: list[tuple[int, int]] | None = None) -> tuple[list[str], list[list[tuple[int, int]] | None]]:
    """The columns of a table by position, and for each prompt the positions (in the clean prompt, in the corrupt one)
    of each column. positions: "each", by default 0, 1, ..., and counted from the end where the prompts are not equally
    long; "last"; or "all" at once: one column, and None for each prompt. pairs: of the only prompt."""
    if positions not in POSITIONS:
        raise UserError(f"positions={positions!r} is not one of {', '.join(POSITIONS)}")
    both = [(prompt.clean, prompt.corrupt or prompt.clean) for prompt in prompts]
    lengths = sorted({len(ids) for two in both for ids in two})
    if positions == "all":
        for number, (clean, corrupt) in enumerate(both, 1):
            if len(clean) != len(corrupt):
                raise UserError(f"prompt {number} has {len(clean)} and {len(corrupt)} tokens, clean and corrupt: "
                                "positions=all needs equally many")
        return ["all positions"], [None] * len(both)
    if positions == "last":
        return ["last position"], [[(len(clean) - 1, len(corrupt) - 1)] for clean, corrupt in both]
    if pairs is None and len(lengths) > 1 and len(both) == 1:
        raise UserError(f"the prompts have {len(both[0][0])} and {len(both[0][1])} tokens: say which positions "
                        'correspond, as in --pairs="4:5, 6:7"')
    from_end = pairs is None and len(lengths) > 1
    if from_end:
        print(f"the prompts have {lengths[0]} to {lengths[-1]} tokens: columns count from the end")
    counts = range(-lengths[0], 0) if from_end else range(lengths[0])
    at = [pairs or [(i % len(clean), i % len(corrupt)) for i in counts] for clean, corrupt in both]
    columns = []
    for column, i in enumerate(pairs or counts):
        given, had = ({two[side][where[column][side]] for two, where in zip(both, at, strict=True)} for side in (0, 1))
        texts = labels(enc, [both[0][0][at[0][column][0]], both[0][1][at[0][column][1]]])
        if len(given) > 1 or len(had) > 1:
            texts = [f"{texts[0]}…"]  # and others
        columns.append(f"{f'{i[0]}:{i[1]}' if pairs else i} {'→'.join(dict.fromkeys(texts))}")
    return columns, at


def mean_and_error(changes: np.ndarray, wholes: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The mean of changes (n, ...) over n prompts, and its standard error, 0 for one prompt. wholes (n,): the mean is
    divided by theirs. The error of this ratio of means is that of the delta method: sd(change - ratio whole) /
    (sqrt(n) |mean whole|)."""
    n, mean, scale = len(changes), changes.mean(0), 1.0
    left = changes - mean
    if wholes is not None:
        scale = wholes.mean()
        left = changes - (mean / scale) * wholes.reshape(n, *[1] * (changes.ndim - 1))
    error = left.std(0, ddof=1) / math.sqrt(n) if n > 1 else np.zeros_like(mean)
    return mean / scale, error / abs(scale)


def check_wholes(wholes: np.ndarray):
    """Print how many of n prompts are weak: their whole difference (n,), clean less corrupt, is below 0 or small.
    UserError if there is none to speak of."""
    mean, n = wholes.mean(), len(wholes)
    if abs(mean) < 1e-4:
        raise UserError("the target is as probable after both prompts, so there is no effect: give other prompts")
    if mean < 0:
        print("the clean prompt has no answer that could come back, as the target is less\n"
              "likely after it: exchange --clean and --corrupt, or give another --target")
    if n == 1:
        return
    for found, what in ((wholes * mean < 0, "of the other sign than the mean's"),
                        ((wholes * mean >= 0) & (abs(wholes) < abs(mean) / 10), "less than a tenth of the mean")):
        if found.any():
            numbers = [str(i + 1) for i in np.flatnonzero(found)]
            shown = ", ".join(numbers[:8]) + ", ..." * (len(numbers) > 8)
            print(f"the difference of clean and corrupt is {what}\n"
                  f"in {len(numbers)} of {n} prompts, which are still part of the means: {shown}")


def answers(before: np.ndarray, best: np.ndarray | None, of: str) -> str:
    """The measure after the prompts, (n,), before a patch and, if there are two prompts, after the clean one."""
    def text(x):
        error = mean_and_error(x)[1]
        return f"{x.mean():.4f}" + (f" ± {error:.4f}" if len(x) > 1 else "")

    if best is None:
        return f"{of}: clean {text(before)}"
    return f"{of}: clean {text(best)}, corrupt {text(before)}"


def effects(values: np.ndarray, error: np.ndarray, each: np.ndarray) -> dict:
    """The fields `hovers` and `more` of a Table of n prompts: values and error (rows, columns), each (n, rows,
    columns)."""
    n = len(each)
    hovers = [[f"{value:+.4f}" + f" ± {width:.4f}, {n} prompts, from {low:+.4f} to {high:+.4f}" * (n > 1)
               for value, width, low, high in zip(*line, strict=True)]
              for line in zip(values, error, each.min(0), each.max(0), strict=True)]
    return {"hovers": hovers, "more": {"standard_error": error, "each": each, "count": np.array(n)}}

# ---- tables ----------------------------------------------------------------------------------------------------------

PRINTED = 40  # rows of a table that are printed; of a longer one, half as many with the largest values


def numbered(enc: Tokenizer, ids: list[int]) -> list[str]:
    """The labels of tokens, with their positions."""
    return [f"{i} {text}" for i, text in enumerate(labels(enc, ids))]


def rows_of(site: str, n_layer: int, n_head: int = 0) -> tuple[list[str], str]:
    """The names of the states at a site in each layer, and what they are. n_head: a name for each head."""
    if n_head:
        return [f"{layer}.{head}" for layer in range(n_layer) for head in range(n_head)], "layer.head"
    if site == "resid":
        return [state_name(layer) for layer in range(n_layer)], SITES[site]
    if site == "mid":
        return [f"after layer {layer}'s attention" for layer in range(n_layer)], "residual stream"
    return [f"layer {layer}'s {SITES[site]}" for layer in range(n_layer)], "output of"


def about(checkpoint: str, model: GPT, **more) -> dict:
    """What a result was computed from: the checkpoint's name and hash, the command, and more of it by name. Call it
    before set_dtype(), which changes the weights."""
    command = shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])
    return {"checkpoint": os.path.basename(checkpoint), "sha256": base_fingerprint(model), "command": command, **more}


@dataclass
class Table:
    """Numbers (rows, columns) with names: the result of a script that looks inside. Row 0 is drawn at the bottom.
    unit: what is measured. axis: what the rows are. hovers (rows, columns): more about each cell. about: from about().
    group: rows that belong together, such as the heads of a layer; 0: none do. more: further arrays to save. words
    (rows, columns): the texts of the cells, in place of the numbers. signed: numbers may be below 0."""
    values: np.ndarray
    rows: list[str]
    columns: list[str]
    title: str
    unit: str
    axis: str = ""
    hovers: list[list[str]] | None = None
    about: dict = field(default_factory=dict)
    group: int = 0
    more: dict[str, np.ndarray] = field(default_factory=dict)
    words: list[list[str]] | None = None
    signed: bool = True

    def __array__(self, dtype=None, copy=None):
        return np.array(self.values, dtype)

    def texts(self, digits: int) -> list[list[str]]:
        def signed(value: float) -> str:
            text = f"{value:{'+' * self.signed}.{digits}f}"
            return text if float(text) else "0"

        return self.words or [[signed(value) for value in line] for line in self.values]

    @property
    def digits(self) -> int:
        """After the point, so that the largest number has two digits that are not 0."""
        largest = np.abs(self.values).max()
        return min(5, max(2, 1 - math.floor(math.log10(largest)))) if largest else 2

    def print(self):
        margin = max(map(len, [self.axis, *self.rows]))
        width = max(self.digits + 5, min(11, max(map(len, self.columns))))
        if self.words:
            width = min(10, max(len(text) for line in [self.columns, *self.words] for text in line))
        print(f"{self.title}: {self.unit}" if len(self.title) + len(self.unit) < 79 else f"{self.title}:\n{self.unit}")
        step = max(1, (80 - margin) // (width + 1))  # columns that fit into 80 characters
        texts, shown = self.texts(self.digits + 1), range(len(self.rows))
        if len(self.rows) > PRINTED:
            shown = sorted(np.argsort(-np.abs(self.values).max(1), kind="stable")[:PRINTED // 2])
            print(f"the {len(shown)} of {len(self.rows)} rows with the largest values; the page has all")
        for first in range(0, len(self.columns), step):
            part = slice(first, first + step)
            print(f"{self.axis:{margin}}" + "".join(f" {short(name, width):>{width}}" for name in self.columns[part]))
            for row in shown[::-1]:
                cells = [f" {short(text, width):>{width}}" for text in texts[row][part]]
                print(f"{self.rows[row]:{margin}}" + "".join(cells))

    def grid(self) -> str:
        """The table as HTML."""
        hovers = self.hovers or [[""] * len(self.columns)] * len(self.rows)
        hovers = [[f"{row}, {column}\n{more}" for column, more in zip(self.columns, line, strict=True)]
                  for row, line in zip(self.rows, hovers, strict=True)]
        return grid(self.values[::-1], self.rows[::-1], self.columns, self.texts(self.digits)[::-1], hovers[::-1],
                    signed=self.signed, axis=self.axis, group=self.group)

    def legend(self) -> str:
        return legend(self.values, self.unit, signed=self.signed)

    def _repr_html_(self) -> str:
        return for_notebook(f"<p>{html.escape(self.title)}</p>", self.legend(), self.grid(), listed(self.about))

    def show(self, picture: str):
        """Print the table, and draw it as a picture and a page."""
        check_finite(self.values)
        self.print()
        picture, written = pictures(picture)
        heat_map(picture, self.values[::-1], self.rows[::-1], self.columns, self.title,
                 self.texts(self.digits)[::-1], self.unit, signed=self.signed, axis=self.axis, group=self.group,
                 notes=[f"{name}: {value}" for name, value in self.about.items() if name not in ("sha256", "command")])
        page(written, self.title, "Hover over a cell, or reach it with the Tab key, to see more.", self.legend(),
             self.grid(), listed(self.about))
        print(f"drawn: {picture}, {written}")

    def finish(self, picture: str, save: str = ""):
        """Tell how many prompts the numbers are means over, save them, if `save` is a path, and show them. `more` is
        from effects()."""
        check_finite(self.values)
        if self.more["count"] > 1:
            error = self.more["standard_error"].max()
            print(f"means over {self.more['count']} prompts, with standard errors of up to {error:.4f}")
        if save:
            self.save(save)
        self.show(picture)

    def save(self, path: str):
        """Write the table to an .npz file: values, rows, columns, `more`, and the rest as JSON in `about`."""
        more = {"title": self.title, "unit": self.unit, "axis": self.axis, **self.about}
        save_arrays(path, values=self.values, rows=np.array(self.rows), columns=np.array(self.columns),
                    **self.more, about=np.array(json.dumps(more)))


def listed(about: dict) -> str:
    """What a result was computed from, as HTML."""
    lines = [f"<dt>{html.escape(name)}<dd><code>{html.escape(str(value))}</code>" for name, value in about.items()]
    return f"<dl>{''.join(lines)}</dl>" if lines else ""


def check_saved(path: str, *inputs: str):
    """UserError if an .npz file cannot be written at this path, or would replace an input or what is no earlier result
    of the same script. "" is no path."""
    if not path:
        return
    if not path.endswith(".npz"):
        raise UserError(f"save={path!r}: let its name end in .npz")
    check_folder(path)
    check_output(path, *inputs)
    if os.path.exists(path):
        maker = ""
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, zipfile.BadZipFile), \
                np.load(path, allow_pickle=False) as held:
            maker = json.loads(str(held["about"]))["command"].split()[0]
        if maker != os.path.basename(sys.argv[0]):
            raise UserError(f"{path} exists, and was not written by {os.path.basename(sys.argv[0])}: give another name")
        print(f"{path} is an earlier result, which is replaced")


def save_arrays(path: str, **arrays):
    """Write arrays to an .npz file."""
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    write_whole(path, file.getvalue())
    print(f"written: {path}")


if __name__ == "__main__":
    print("inside.py has no command of its own: run patching.py, which uses it", file=sys.stderr)
    sys.exit(2)
