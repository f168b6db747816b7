"""Directions in a model's residual stream: how they are found, their files, and the taps that steer by them.

    direction = direction_of(model, [[5, 17, 2]], [[5, 18, 2]], layer=1)      # (C,): a difference of means
    tap = adding(direction, layer=1, strength=2.0)                            # or removing(direction)
    logits, text = model(idx, tap=tap), generate(model, [5, 9], 20, tap=tap)
    tap = steered(model, ["sockets.safetensors:0.75", "rude.safetensors:remove"], base_fingerprint(model))

A direction is added to the states after a layer (activation addition, Turner et al. 2023), or its part is taken out of
everything that attention and the MLPs read (directional ablation, Arditi et al. 2024). The difference of the means of
two sets of prompts is that of Rimsky et al. (2024), contrastive activation addition.

The file of a direction is one of model.save_arrays(), a safetensors file. It has the array `direction` (C,), float32;
other arrays may stand beside it. Its header has, as JSON under `tinygpt`:

    version             of checkpoints: VERSION in model.py
    direction           how the direction was found, in a word: last, mean, probe, feature
    layer               it belongs to the state after this layer; -1: the embedding
    base                base_fingerprint() in lora.py, of the checkpoint
    script, settings    what made it

steer.py, probe.py and others write such files with save_direction(); steer.py, sample.py and the page read them.
"""
import sys
from collections.abc import Callable, Iterable, Sequence

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from config import UserError
from draw import prompt_ids
from inside import record
from lora import path_and_weight
from model import GPT, VERSION, load_arrays, no_tap, save_arrays
from rows import ENDINGS, open_text, read_rows
from tokenizer import Tokenizer

# ---- states ----------------------------------------------------------------------------------------------------------

AT_A_TIME = 2048  # tokens that are read at a time


def states_of(model: GPT, ids: list[int], layer: int) -> mx.array:
    """The states (T, C) of tokens ids (T,) after a layer; -1: the embedding."""
    return record(model, mx.array([ids]), ("resid",))["resid", layer + 1][0].astype(mx.float32)


def mean_states(model: GPT, texts: Sequence[list[int]], spans: Sequence[tuple[int, int]],
                layers: Iterable[int] | None = None) -> np.ndarray:
    """For each text, the mean of its states from the first position of its span up to the one before the last: (layers,
    N, C), float32. layers: after which the states are taken, -1 being the embedding; None: after all. Short texts are
    read together with longer ones, as no token sees those that come after it."""
    layers = range(-1, model.config.n_layer) if layers is None else [*layers]
    found = np.empty((len(layers), len(texts), model.config.n_embd), np.float32)
    waiting = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    with tqdm(total=len(texts), unit=" texts", leave=False, disable=None, dynamic_ncols=True) as bar:
        while waiting:
            part = waiting[-max(1, AT_A_TIME // len(texts[waiting[-1]])):]
            del waiting[-len(part):]
            idx = np.zeros((len(part), len(texts[part[-1]])), np.int32)
            weights = np.zeros(idx.shape, np.float32)
            for row, i in enumerate(part):
                first, last = spans[i]
                idx[row, :len(texts[i])], weights[row, first:last] = texts[i], 1 / (last - first)
            states, weights = record(model, mx.array(idx), ("resid",)), mx.array(weights)[:, None]
            x = mx.concatenate([weights @ states["resid", layer + 1].astype(mx.float32) for layer in layers], axis=1)
            found[:, part] = np.array(x.swapaxes(0, 1))
            bar.update(len(part))
    return found


def spans_of(texts: Sequence[list[int]], over: str, skip: int) -> list[tuple[int, int]]:
    """The span of positions in each text: of its last token, or, over="mean", of all but the first `skip`, those that
    begin every text. UserError for a text that has no other tokens."""
    if min(map(len, texts)) <= skip:
        raise UserError("a prompt of the direction has no token: give a longer one")
    return [(len(ids) - 1 if over == "last" else skip, len(ids)) for ids in texts]


def direction_of(model: GPT, positive: Sequence[list[int]], negative: Sequence[list[int]], layer: int,
                 over: str = "last", skip: int = 0) -> mx.array:
    """The mean of the positive texts' states after a layer less that of the negative ones': (C,). Of each text, it is
    the state of its last token; or the mean over its tokens without the first `skip`. A text is a list of tokens."""
    means = [mean_states(model, texts, spans_of(texts, over, skip), [layer])[0].mean(0, dtype=np.float64)
             for texts in (positive, negative)]
    return mx.array((means[0] - means[1]).astype(np.float32))


def read_texts(path: str, enc: Tokenizer, model: GPT, name: str, bos: bool = True) -> list[list[int]]:
    """The tokens of the texts in a file: its lines, or the field `text` of its rows (.jsonl, .json, .csv and others).
    name: of the setting, for an error message; bos: see prompt_ids(). UserError tells which text is wrong."""
    if path.lower().endswith(ENDINGS):
        texts = [(where, row if isinstance(row, ValueError) else row.get("text")) for where, row in read_rows(path)]
    else:
        with open_text(path) as file:
            try:
                lines = [*file]
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not text: give a file with a prompt on each line") from error
        texts = [(f"{path}, line {n}", line.rstrip("\r\n")) for n, line in enumerate(lines, 1) if line.strip()]
    found = []
    for where, text in texts:
        if not isinstance(text, str) or not text:
            raise UserError(f"{where}: {text if isinstance(text, ValueError) else 'it has no text named text'}")
        try:
            found.append(prompt_ids(enc, text, model, name, bos))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    if not found:
        raise UserError(f"{path} has no text: write a prompt on each line")
    return found


# ---- taps ------------------------------------------------------------------------------------------------------------


def adding(direction: mx.array, layer: int, strength: float) -> Callable:
    """A tap for any call of the model: direction (C,) times the strength is added to all states after a layer."""
    change = strength * direction

    def tap(site, at, x):
        return (x + change).astype(x.dtype) if (site, at) == ("resid", layer + 1) else x

    return tap


def folded(model: GPT, direction: mx.array, layer: int, strength: float) -> bool:
    """Add direction (C,) times the strength to the bias of the last matrix of a layer. This does what adding() does,
    without a tap, which the fastest code for writing never calls. False, and no change, where the model does more with
    the output of that matrix than to add it to the stream."""
    if layer < 0 or model.config.residual_scale != 1 or "mlp_post_norm" in model.blocks[layer]:
        return False
    if model.config.n_expert or model.config.mod != "none":
        return False
    down = model.blocks[layer].mlp.down
    if not isinstance(down, nn.Linear | nn.QuantizedLinear):  # an adapter, or factors
        return False
    down.bias = strength * direction + (down.bias if "bias" in down else 0)
    return True


def removing(direction: mx.array) -> Callable:
    """A tap for any call of the model: the part along direction (C,) is taken out of the residual stream at all
    positions, x - d (d x) for the unit vector d, before each block, before each MLP, and before the head."""
    unit = direction / mx.maximum(mx.linalg.norm(direction), 1e-30)

    def tap(site, at, x):
        if site not in ("resid", "attn"):  # an MLP reads their sum, and the next state includes what it adds
            return x
        return (x - (x.astype(mx.float32) @ unit)[..., None] * unit).astype(x.dtype)

    return tap


def together(taps: Sequence[Callable]) -> Callable:
    """A tap that calls these in turn."""
    def tap(site, at, x):
        for each in taps:
            x = each(site, at, x)
        return x

    return tap


def acting(layer: int, change: Callable, start: int = 0, end: int | None = None) -> Callable:
    """A tap for one generate() of texts of equal length: the states (B, n, C) after a layer become change(states) at
    the positions from `start` up to `end` - 1, which count from the beginning of the text. It counts the tokens that
    were read, since a tap does not see their positions: each call after the first one reads one token more, and a call
    that reads the second half of a full context again reads the last ones."""
    read = 0

    def tap(site, at, x):
        nonlocal read
        if (site, at) == ("resid", 0):
            read = read + 1 if read else x.shape[1]
        if (site, at) == ("resid", layer + 1):
            position = mx.arange(read - x.shape[1], read)[:, None]
            inside = position >= start if end is None else (position >= start) & (position < end)
            x = mx.where(inside, change(x).astype(x.dtype), x)
        return x

    return tap


def steering(direction: mx.array, layer: int, strength: float, start: int = 0) -> Callable:
    """A tap for one generate(): direction (C,) times the strength is added to the states after a layer, from a position
    of the text on."""
    return acting(layer, lambda x: x + strength * direction, start)


def pasting(state: mx.array, layer: int, start: int, end: int | None = None) -> Callable:
    """A tap for one generate(): the states after a layer at these positions of the text become `state` (C,)."""
    return acting(layer, lambda x: mx.broadcast_to(state, x.shape), start, end)


# ---- files -----------------------------------------------------------------------------------------------------------


def save_direction(path: str, direction: mx.array, layer: int, how: str, base: str, script: str, settings: dict,
                   arrays: dict | None = None, **more):
    """Write a direction (C,) to a file, as above. how: how it was found. arrays, more: what else to keep."""
    header = {"version": VERSION, "direction": how, "layer": layer, "base": base, "script": script,
              "settings": settings}
    save_arrays(path, {**(arrays or {}), "direction": direction.astype(mx.float32)}, {**more, **header})
    print(f"written: {path}")


def load_direction(path: str, model: GPT, fingerprint: str) -> tuple[mx.array, int]:
    """A direction (C,) and its layer, from a file. UserError if it was made for another checkpoint."""
    arrays, header = load_arrays(path)
    if "direction" not in header or "direction" not in arrays:
        raise UserError(f"{path} holds no direction: steer.py --out=FILE writes one")
    found, layer = arrays["direction"], header.get("layer")
    fits = type(layer) is int and -1 <= layer < model.config.n_layer and found.shape == (model.config.n_embd,)
    if header.get("base") != fingerprint or not fits:
        raise UserError(f"{path} was made for another checkpoint: make a direction of this one")
    found = found.astype(mx.float32)
    if not mx.isfinite(found).all():
        raise UserError(f"{path} holds numbers that are not finite: make it again")
    return found, layer


def steered(model: GPT, given: Sequence[str], fingerprint: str) -> Callable:
    """Steer a model by directions that are given as FILE, FILE:STRENGTH or FILE:remove; a strength is 1 unless told.
    Returns a tap for any call of the model. It is no_tap where all could be folded into the model."""
    taps = []
    fold = not any(text.endswith(":remove") for text in given)  # else the order of the changes counts
    for text in given:
        if text.endswith(":remove"):
            taps.append(removing(load_direction(text.removesuffix(":remove"), model, fingerprint)[0]))
            continue
        path, strength = path_and_weight(text)
        change = *load_direction(path, model, fingerprint), strength
        if not (fold and folded(model, *change)):
            taps.append(adding(*change))
    return together(taps) if taps else no_tap


if __name__ == "__main__":
    print("steering.py has no command of its own: run steer.py, which uses it", file=sys.stderr)
    sys.exit(2)
