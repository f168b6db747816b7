"""Find which parts of a model act on an answer through given others: path patching (Wang et al. 2022).

    python paths.py CKPT --prompts=ioi.jsonl                                # which parts act on the logits directly
    python paths.py CKPT --prompts=ioi.jsonl --receiver=9.1.q,9.2.q         # and which through these heads' queries
    python paths.py CKPT --clean="A B C A" --corrupt="D B C A" --target=" B" --receiver=1.0.k --positions=each

Activation patching tells that a head matters, but not through which later parts. Path patching tells that: from a
sender, a head or an MLP, to receivers, the queries (q), keys (k) or values (v) of given heads, "layer.head.q", or the
final residual stream ("logits"). Keys and values have the number of their key/value head. Two passes give a cell:

1. The model reads the clean prompt, but the sender's output is that of the corrupted prompt, and all other heads are
   held at their outputs for the clean one. The receivers' inputs change only by paths that meet no other head. MLPs on
   the way are computed again, as in the paper, and are part of the path; --mlps=frozen holds them too, so that only
   the direct path is left.
2. The model reads the clean prompt, with the receivers' queries, keys or values as they were in the first pass. All
   that follows them is computed. For the final residual stream, the first pass gives the answer.

The effect is (patched - clean) / (corrupt - clean): 0 if the path carries nothing of the difference of the two
prompts, 1 if it carries all of it. The paper's figures show the change of the logit difference itself. --base=corrupt
exchanges the prompts: the corrupted one is read, and senders have their outputs for the clean one. A sender in the
receivers' layer, or later, cannot act on them, and has no row. The prompts, what is measured, --prompts, --positions
(of the sender: all at once, the last one, or each) and the table are those of patching.py; both prompts need equally
many tokens. In Python:

    >>> from model import load_checkpoint; from paths import paths; import mlx.core as mx
    >>> model, meta = load_checkpoint("out/ckpt.safetensors")
    >>> clean, corrupt = mx.array([[5, 17, 2]]), mx.array([[5, 18, 2]])
    >>> logits = paths(model, clean, corrupt, [(2, 1, "q")])   # (2, H + 1, 1, 1, V): heads and MLPs of layers 0 and 1
"""
from collections.abc import Callable

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
from tqdm import tqdm

from config import UserError, check_output, given, overrides
from draw import pictures
from inside import (
    POSITIONS,
    Table,
    answers,
    check_saved,
    check_wholes,
    chosen_prompts,
    effects,
    in_parts,
    mean_and_error,
    measured,
    measures,
    on_prompts,
    opened,
    record,
    spots,
    told,
)
from model import GPT
from tokenizer import Tokenizer

checkpoint = "out/ckpt.safetensors"  # any checkpoint, quantized or not
receiver = "logits"   # "layer.head.q, ..." of q, k, v; or logits: the final residual stream
base = "clean"        # clean | corrupt: the prompt that is read, while a sender has its output for the other one
mlps = "recomputed"   # recomputed | frozen: MLPs between sender and receiver
# prompts
clean = ""            # the clean prompt
corrupt = ""          # the corrupted prompt, of equally many tokens
target = ""           # the token that should follow the clean prompt
foil = ""             # a token to compare the target with; "": none
prompts = ""          # a file of prompts with these four fields, one a row, in place of these four
bos = True            # begin each prompt with the token that begins every text, where the tokenizer has one
positions = "all"     # of the sender: each | last | all (at once)
# run
batch_size = 64       # rows at a time
picture = ""          # a PNG; "": the name of the checkpoint with -paths.png; a page .html is written beside it
save = ""             # an .npz for the table; "": none

settings = overrides(globals(), "checkpoint")

# ---- paths -----------------------------------------------------------------------------------------------------------

Receiver = tuple[int, int, str]  # layer, head, and "q", "k" or "v"


def paths(model: GPT, idx: mx.array, other: mx.array, receivers: list[Receiver], positions: list[int] | None = None,
          mlps: str = "recomputed", batch_size: int = 64, bar: tqdm | None = None,
          measure: Callable = lambda logits: logits) -> mx.array:
    """measure() of the logits (L, H + 1, P, D, V) of the last position of D prompts idx (D, T), with what the receivers
    get from each sender changed to what it is for the prompts `other` (D, T). No receivers: the final residual stream.
    Senders: the H heads and then the MLP of the L layers before the last receiver, at each of P positions, or with None
    at all of them, P = 1."""
    if model.config.mod == "topk":
        raise UserError("this model chooses the tokens of a layer by its input (mod=topk): a path is not defined there")
    check_receivers(model, receivers)
    own, theirs = (record(model, x, ["heads", "mlp"]) for x in (idx, other))
    mx.eval(own, theirs)
    D, H = len(idx), own["heads", 0].shape[1]
    first = min((layer for layer, _, _ in receivers), default=model.config.n_layer)
    last = max((layer for layer, _, _ in receivers), default=model.config.n_layer)
    places = [None] if positions is None else positions
    senders, found = [(part, place) for part in range(H + 1) for place in places], []  # part H is the MLP
    for layer in range(last):
        for start in range(0, len(senders), max(1, batch_size // D)):
            some = senders[start:start + max(1, batch_size // D)]
            logits = one_layer(model, idx, own, theirs, receivers, mlps, layer, first, some)
            found.append(measure(logits.reshape(len(some), D, -1)))
            mx.eval(found[-1])
            if bar is not None:
                bar.update(len(some) * D)
    found = mx.concatenate(found)
    return found.reshape(last, H + 1, len(places), *found.shape[1:])


def one_layer(model: GPT, idx: mx.array, own: dict, theirs: dict, receivers: list[Receiver], mlps: str, layer: int,
              first: int, senders: list) -> mx.array:
    """The logits (N D, V) for N senders (part, position) of a layer. first: the layer of the first receiver."""
    (D, T), n, H, got = idx.shape, len(senders), own["heads", 0].shape[1], {}
    parts = mx.array([part for part, _ in senders])
    sent = mx.stack([mx.ones(T, mx.bool_) if place is None else mx.arange(T) == place for _, place in senders])
    wanted = {(site, at) for at, _, site in receivers}

    def rows(x):  # (D, ...) -> (N D, ...)
        return mx.broadcast_to(x, (n, *x.shape)).flatten(0, 1)

    def changed(name, x):  # a sender's output becomes that for the other prompt
        if name == "heads":  # (N, D, H, T, 1)
            at = (parts[:, None] == mx.arange(H))[:, None, :, None, None] & sent[:, None, None, :, None]
        else:
            at = (parts == H)[:, None, None, None] & sent[:, None, :, None]
        by = theirs[name, layer]
        return mx.where(mx.broadcast_to(at, (n, D, *at.shape[2:])).flatten(0, 1), rows(by), x)

    def frozen(name, at, x):
        if name == "resid" and at <= layer:  # lazy: what comes before it is not computed
            x = rows(own[name, at])
        if name == "heads" or name == "mlp" and mlps == "frozen":
            x = rows(own[name, at])
        if at == layer and name in ("heads", "mlp"):
            x = changed(name, x)
        if (name, at) in wanted:
            got[name, at] = x
        return x

    def put(name, at, x):
        if name == "resid" and at <= first:
            x = rows(own[name, at])
        if (name, at) in wanted:
            heads = [head for one, head, site in receivers if (site, one) == (name, at)]
            here = mx.any(mx.arange(x.shape[1])[:, None] == mx.array(heads), axis=1)
            x = mx.where(here[:, None, None], got[name, at], x)
        return x

    idx = rows(idx)
    stream = model.residual(idx, tap=frozen)
    if receivers:
        stream = model.residual(idx, tap=put)
    return model.unembed(stream[:, -1])


def check_receivers(model: GPT, receivers: list[Receiver]):
    counts = {}
    model(mx.array([[0]]), tap=lambda site, layer, x: counts.setdefault((site, layer), x.shape) and x)
    for layer, head, site in receivers:
        name = f"receiver {layer}.{head}.{site}"
        if not 1 <= layer < model.config.n_layer:
            raise UserError(f"{name}: give a layer from 1 to {model.config.n_layer - 1}; before layer 0 there is no "
                            "head and no MLP")
        if (site, layer) not in counts:
            raise UserError(f"{name}: this layer has no keys and values of its own")
        if not 0 <= head < counts[site, layer][1]:
            kind = {"q": "query heads", "k": "key heads", "v": "value heads"}[site]
            raise UserError(f"{name}: the layer has the {kind} 0 to {counts[site, layer][1] - 1}")


def parsed_receivers(text: str) -> list[Receiver]:
    found = []
    for part in [] if text == "logits" else text.split(","):
        layer, _, rest = part.strip().partition(".")
        head, _, site = rest.partition(".")
        if not (layer.isdecimal() and head.isdecimal() and site in ("q", "k", "v")):
            raise UserError(f"receiver={text!r}: write layer.head.q, with q, k or v, as in --receiver=5.1.q,5.2.k, or "
                            "--receiver=logits")
        found.append((int(layer), int(head), site))
    return found


# ---- run -------------------------------------------------------------------------------------------------------------


def run(model: GPT, enc: Tokenizer, receivers: list[Receiver], known: dict):
    found = chosen_prompts(enc, model, prompts, (clean, corrupt, target, foil), bos, True)
    of = measured(enc, *found)
    for number, prompt in enumerate(found, 1):
        if len(prompt.clean) != len(prompt.corrupt):
            raise UserError(f"prompt {number} has {len(prompt.clean)} and {len(prompt.corrupt)} tokens, clean and "
                            "corrupt: paths are between runs of equally many")
    columns, at = spots(enc, found, positions)
    parts = in_parts([len(prompt.clean) for prompt in found], batch_size)
    high, low = (on_prompts(model, found, [getattr(prompt, name) for prompt in found], parts)
                 for name in ("clean", "corrupt"))
    check_wholes(high - low)
    start, wholes = (high, low - high) if base == "clean" else (low, high - low)
    line = answers(low, high, of)
    print(line)
    values, heads = [None] * len(found), record(model, mx.array([found[0].clean]), ["heads"])["heads", 0].shape[1]
    layers = max((layer for layer, _, _ in receivers), default=model.config.n_layer)
    with tqdm(total=layers * (heads + 1) * len(columns) * len(found), unit=" cells", disable=None,
              dynamic_ncols=True) as bar:
        for part in parts:
            some = [found[i] for i in part]
            both = [mx.array([getattr(prompt, name) for prompt in some]) for name in ("clean", "corrupt")]
            here, there = both if base == "clean" else both[::-1]
            cells = paths(model, here, there, receivers, at[part[0]] and [i for i, _ in at[part[0]]], mlps, batch_size,
                          bar, lambda logits, some=some: measures(some, logits))
            for n, i in enumerate(part):
                values[i] = np.array(cells[..., n]) - start[i]
    values = np.stack(values)  # (n, layers, heads + 1, columns)
    mean, error = mean_and_error(values, wholes)
    names = [*(f"head {head}" for head in range(heads)), "MLP"]
    title = f"paths to {receiver}" + ("" if positions == "each" else f", {columns[0]} of the sender")
    if positions == "each":
        rows, axis, group = [f"{layer}.{name.removeprefix('head ')}" for layer in range(layers) for name in names], \
            "layer.head", heads + 1
    else:
        rows, axis, group, columns = [f"layer {layer}" for layer in range(layers)], "", 0, names
    shape, away = (len(rows), len(columns)), "corrupt" if base == "clean" else "clean"
    mean, error = mean.reshape(shape), error.reshape(shape)
    table = Table(mean, rows, columns, title, f"(patched - {base}) / ({away} - {base}) of {of}", axis,
                  about=known | told(enc, found, prompts) | {"answer": line, "MLPs": mlps}, group=group,
                  **effects(mean, error, (values / wholes.mean()).reshape(-1, *shape)))
    table.finish(picture, save)


if __name__ == "__main__":
    for name, allowed in (("base", ("clean", "corrupt")), ("mlps", ("recomputed", "frozen")), ("positions", POSITIONS)):
        if settings[name] not in allowed:
            raise UserError(f"{name}={settings[name]!r} is not one of {', '.join(allowed)}")
    if batch_size < 1:
        raise UserError("batch_size must be 1 or more")
    for name in ("clean", "corrupt", "target", "foil"):
        if prompts and name in given:
            raise UserError(f"--prompts and --{name}: the file holds all of the prompts; leave one of the two out")
    receivers = parsed_receivers(receiver)
    picture, html = pictures(picture or f"{checkpoint.removesuffix('.safetensors')}-paths.png")
    for name in (picture, html):
        check_output(name, checkpoint, prompts)
    check_saved(save, checkpoint, prompts)
    model, enc, known = opened(checkpoint)
    check_receivers(model, receivers)
    run(model, enc, receivers, known)
