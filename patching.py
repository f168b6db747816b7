"""Find the parts of a model that matter for an answer: activation patching, causal tracing, ablation.

    python patching.py CKPT --clean="The capital of France is" --corrupt="The capital of Italy is" --target=" Paris"
    python patching.py CKPT --site=heads --positions=last --prompts=ioi.jsonl --save=heads.npz
    python patching.py CKPT --mode=mean --site=heads --prompts=ioi.jsonl --data=book.txt
    python patching.py CKPT --mode=trace --clean="The capital of France is" --subject=France --target=" Paris"
    python patching.py CKPT --mode=ablate --data=book.txt

swap: the model reads the corrupted prompt (the recipient), but its state at one layer and position is replaced by the
state that it has there for the clean prompt (the donor). Each layer and position is a cell of a table; the effect of a
cell is (patched - corrupt) / (clean - corrupt): 0 if the patch changes nothing, 1 if it restores the clean answer. It
is measured in the log-probability of the target after the prompt, or, with --foil, in the target's logit less the
foil's. Prompts of different lengths need --pairs: "4:5, 6:7" puts the donor's state of position 4 at the recipient's
position 5.

The other modes have no corrupted prompt. They replace a state of the clean one, and the effect is the change of the
measure, in nats or logits. zero: by zeros. mean: by a mean over the tokens of --data; else over the prompts of
--prompts, at each position; else over the prompt's positions. resample: by the state of another prompt of --prompts,
which --seed draws (Chan et al. 2022).

--site chooses the state: resid, the residual stream that enters a layer; mid, the stream between attention and the MLP;
attn or mlp, the output of attention or of the MLP; hidden, all neurons of the MLP; heads, the output of one head before
the output projection; q, k, v, the queries, keys and values of one head (keys and values: of one key/value head), after
the rotation by their positions. For these four, a row of the table is a head, "layer.head". --positions=last patches
the last position alone, --positions=all patches all of them at once; a head is then a cell in the row of its layer.

--prompts: a file with the fields clean, corrupt, target and foil, one prompt a row (see inside.py). Cells are means
over the prompts, with the standard error and the count; the effect of swap is a ratio of means, the mean of (patched -
corrupt) over the mean of (clean - corrupt), so that a prompt with a small difference cannot dominate it. A line tells
in which prompts that difference is small or has the other sign. Prompts of equally many tokens have columns by
position; else columns count from the end of each prompt.

trace (Meng et al. 2022): noise is added to the embeddings of the subject's tokens, --noise times the standard deviation
of the embeddings. Then one clean state at a time is restored, or those of --window layers around it. The effect is the
increase in the target's probability, mean over --draws of the noise. A row of --prompts may have its own `subject`.

ablate: attention, the MLP or the whole block of each layer, and each head, is removed in turn, at all positions: its
output is set to zeros, to its mean, or to that of another prompt or window of the text (--how=resample), or it is
skipped. Means are over the same tokens as in mode mean. For the outputs of attention, an MLP or a head, skip and zero
are equal; for a block both mean that the stream goes around it. The effect is the change of the loss on a text, and of
the measure of the prompts.

It prints a table, and draws a picture and a page with more about each cell; --save writes the table as arrays: values,
standard_error, count, and each, the values of each prompt. Rows go up from layer 0. At site resid, the row of layer l
is the state that enters the layer: "embedding" for layer 0, else "after layer l-1". The state after the last layer has
no row: at the last position it is the answer itself, and elsewhere nothing reads it. The cells of a layer run in
batches, and earlier layers are not computed again. Some inputs of a layer do not come from its stream, and a patch
there does not change them: the shared keys and values in YOCO's second half, the values of layer 0 for value residuals,
and value embeddings. In Python:

    >>> from model import load_checkpoint; from patching import swap, ablate; import mlx.core as mx
    >>> model, meta = load_checkpoint("out/ckpt.safetensors")
    >>> logits = swap(model, mx.array([5, 17, 2]), mx.array([5, 18, 2]))   # (n_layer, T, V), of the last position
    >>> logits = swap(model, mx.array([5, 17, 2]), mx.array([5, 18, 2]), "heads")   # (n_layer, H, T, V)
    >>> logits = ablate(model, mx.array([[5, 17, 2]]), "mlp", 3, "zero")   # (B, T, V)
"""
import os
from collections.abc import Callable, Iterable

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
from tqdm import tqdm

from config import UserError, check_output, given, overrides
from draw import labels, pictures
from inside import (
    BY_HEAD,
    POSITIONS,
    SITES,
    Prompt,
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
    in_parts,
    last_logits,
    log_p,
    mean_and_error,
    mean_of,
    mean_states,
    measured,
    measures,
    on_prompts,
    opened,
    parsed_pairs,
    record,
    routed,
    rows_of,
    spots,
    told,
    with_changes,
)
from model import GPT, no_tap
from score import read_tokens, window_length, windows
from tokenizer import Tokenizer

checkpoint = "out/ckpt.safetensors"  # any checkpoint, quantized or not
mode = "swap"         # swap | resample | zero | mean | trace | ablate
# prompts
clean = ""            # the clean prompt
corrupt = ""          # swap: the corrupted prompt
target = ""           # the token that should follow the clean prompt
foil = ""             # a token to compare the target with; "": none
prompts = ""          # a file of prompts with these four fields, one a row, in place of these four
bos = True            # begin each prompt with the token that begins every text, where the tokenizer has one
# cells
site = "resid"        # resid | mid | attn | mlp | hidden | heads | q | k | v
positions = "each"    # each | last | all (at once)
pairs = ""            # swap: "donor position:recipient position, ..."; "": equal positions of equally long prompts
# trace
subject = ""          # the part of the clean prompt that gets the noise
noise = 3.0           # in standard deviations of the embeddings
draws = 10            # draws of the noise
window = 1            # layers that are restored together
# ablate
how = "zero"          # zero | mean | resample | skip
data = ""             # a text file, or a folder that data.py made (its val split): for the loss, and for means
samples = 16          # windows of block_size tokens of that text
block_size = 0        # tokens of a window; 0: the model's context, but 1,024 at most
# run
batch_size = 64       # rows at a time
seed = 1337           # for the noise, for other prompts, and for the choice of windows
picture = ""          # a PNG; "": the name of the checkpoint with -MODE.png; a page .html is written beside it
save = ""             # an .npz for the table; "": none

settings = overrides(globals(), "checkpoint")

# ---- patching --------------------------------------------------------------------------------------------------------


Cell = tuple[int | None, int | None, int | None]  # a head, or None; the positions from which and to which, or None: all


def patched(model: GPT, idx: mx.array, states: dict, site: str, layers: Iterable[int], cells: list[Cell],
            values: dict[int, mx.array], batch_size: int = 64, bar: tqdm | None = None,
            measure: Callable = lambda logits: logits) -> mx.array:
    """measure() of the last position's logits, (N, D, V), with N cells patched in turn: in these layers, the state at
    the position `to` is replaced by values[layer], (D or 1, [H,] T, C), at the position `from`. idx (D, T): D prompts
    to patch; states: theirs, by record(). Earlier blocks are not computed."""
    layers, (D, T) = sorted(layers), idx.shape
    step, found, stream = min(max(1, batch_size // D), len(cells)), [], None
    for start in range(0, len(cells), step):
        heads, froms, tos = zip(*cells[start:start + step], strict=True)
        n, whole = len(heads), tos[0] is None
        chosen = mx.ones((n, T), mx.bool_) if whole else mx.array(tos)[:, None] == mx.arange(T)

        def tap(name, layer, x, n=n, heads=heads, froms=froms, whole=whole, chosen=chosen):
            nonlocal stream
            if name == "resid" and layer <= layers[0]:  # lazy: the blocks before it are not computed
                x = mx.broadcast_to(states["resid", layer], (n, D, T, x.shape[-1])).flatten(0, 1)
            if name == site and layer in layers:
                by = values[layer].astype(x.dtype)[None]  # (1, D, ..., T, C), or below (N, D, ..., 1, C)
                by = by if whole else mx.moveaxis(by[..., mx.array(froms), :], -2, 0)[:, 0, ..., None, :]
                at = chosen[:, None, :, None]
                if x.ndim == 4:
                    at = at[:, None] & (mx.array(heads)[:, None] == mx.arange(x.shape[1]))[:, None, :, None, None]
                at, by = (mx.broadcast_to(y, (n, D, *y.shape[2:])).flatten(0, 1) for y in (at, by))
                x = mx.where(by_row(model, layer, stream, site, at), by_row(model, layer, stream, site, by), x)
            if name == "resid":
                stream = x
            return x

        logits = last_logits(model, mx.broadcast_to(idx, (n, D, T)).flatten(0, 1), tap)
        found.append(measure(logits.reshape(n, D, -1)))
        mx.eval(found[-1])
        if bar is not None:
            bar.update(n * D)
    return mx.concatenate(found)


def swap(model: GPT, donor: mx.array, recipient: mx.array, site: str = "resid",
         pairs: list[tuple[int, int]] | None = None, batch_size: int = 64) -> mx.array:
    """Logits of the recipient's last position, with the donor's state at each layer and position in turn:
    (n_layer, T, V) for tokens (T,) and (T,); or (n_layer, P, V) for P pairs of a donor's and a recipient's position. At
    the sites of heads, (n_layer, H, P, V)."""
    pairs = checked_pairs(donor, recipient, pairs)
    check_site(model, site)
    check_turned(model, site, pairs)
    return replaced(model, recipient, record(model, donor[None], [site]), site, [i for i, _ in pairs],
                    [j for _, j in pairs], batch_size)


def replaced(model: GPT, idx: mx.array, source: dict | str, site: str, froms: list[int] | None,
             positions: list[int] | None, batch_size: int = 64, bar: tqdm | None = None,
             measure: Callable = lambda logits: logits) -> mx.array:
    """measure() of the logits (n_layer, P, V) of tokens (T,), or (n_layer, P, D, V) of (D, T), with the state at each
    of P positions in turn replaced: by the states `source`, from record(), at the positions `froms`; or by "zero"; or
    by the "mean" over the prompt's positions. At the sites of heads, (n_layer, H, P, ...). Both positions None: at all
    of them at once, as if P = 1. Layers that have no such state are left out (k and v in YOCO's second half)."""
    single, idx = idx.ndim == 1, mx.atleast_2d(idx)
    states, found = record(model, idx, [site]), []
    places = [(None, None)] if positions is None else [*zip(froms, positions, strict=True)]
    layers, heads = parts_of(states, site)
    cells = [(head, i, j) for head in heads for i, j in places]
    with tqdm(total=len(layers) * len(cells) * len(idx), unit=" cells", disable=None if bar is None else True,
              dynamic_ncols=True) as own_bar:
        for layer in layers:
            own = states[site, layer]
            if source == "zero":
                value = mx.zeros_like(own)
            elif source == "mean":
                worked = routed(model, layer, states["resid", layer], site)[0]
                means = [mean_of(own[row:row + 1], worked[row:row + 1]) for row in range(len(own))]
                value = mx.broadcast_to(mx.stack(means)[..., None, :], own.shape)
            else:
                value = source[site, layer]
            found.append(patched(model, idx, states, site, [layer], cells, {layer: value}, batch_size, bar or own_bar,
                                 measure))
    found = mx.stack(found)[:, :, 0] if single else mx.stack(found)
    return found.reshape(len(layers), len(heads), len(places), *found.shape[2:]) if site in BY_HEAD else found


def parts_of(states: dict, site: str) -> tuple[list[int], Iterable[int | None]]:
    """The layers that have a state at a site, and the heads of each, or [None]."""
    layers = [layer for name, layer in states if name == site and (site != "resid" or ("resid", layer + 1) in states)]
    return layers, range(states[site, layers[0]].shape[1]) if site in BY_HEAD else [None]


def trace(model: GPT, idx: mx.array, subject: list[int], noise: mx.array, site: str = "resid", window: int = 1,
          batch_size: int = 64, positions: list[int] | None = (), bar: tqdm | None = None,
          measure: Callable = lambda logits: logits) -> tuple[mx.array, mx.array]:
    """Causal tracing of tokens (T,): noise (D, len(subject), C) is added to the embeddings of the subject's positions.
    Returns the logits of the last position with that noise (D, V); and those with the clean states of one position
    restored in `window` layers around one layer (n_layer, T, D, V), or at the sites of heads (n_layer, H, T, D, V).
    positions: those to restore, (): each; None: all at once."""
    if len(noise) > batch_size:
        parts = [trace(model, idx, subject, noise[i:i + batch_size], site, window, batch_size, positions, bar, measure)
                 for i in range(0, len(noise), batch_size)]
        return (mx.concatenate([low for low, _ in parts]),
                mx.concatenate([found for _, found in parts], axis=2 + (site in BY_HEAD)))
    D, T, n_layer = len(noise), len(idx), model.config.n_layer
    clean, rows = record(model, idx[None], [site]), mx.broadcast_to(idx, (D, T))
    states = record(model, rows, noisy=lambda x: x.at[:, mx.array(subject)].add(noise.astype(x.dtype)))
    layers, heads = parts_of(clean, site)
    places = [None] if positions is None else positions or range(T)
    cells, found = [(head, i, i) for head in heads for i in places], []
    with tqdm(total=len(layers) * len(cells) * D, unit=" rows", disable=None if bar is None else True,
              dynamic_ncols=True) as own_bar:
        for layer in layers:
            low = max(0, layer - (window - 1) // 2)
            values = {other: clean[site, other] for other in layers if low <= other <= layer + window // 2}
            found.append(patched(model, rows, states, site, values, cells, values, batch_size, bar or own_bar, measure))
    found = mx.stack(found)
    if site in BY_HEAD:
        found = found.reshape(len(found), len(heads), len(places), *found.shape[2:])
    return measure(model.unembed(states["resid", n_layer][:, -1])), found


# ---- what states are replaced by -------------------------------------------------------------------------------------


def others(n: int, seed: int) -> list[int]:
    """For each of n prompts another one, by chance."""
    rng = np.random.default_rng(seed)
    return [int((i + rng.integers(1, n)) % n) for i in range(n)]


# ---- ablation --------------------------------------------------------------------------------------------------------


HOWS = "zero", "mean", "resample", "skip"


def ablation(model: GPT, site: str, layers: int | Iterable[int], how: str = "zero", head: int | None = None,
             states: dict | None = None) -> Callable:
    """A tap that replaces the output of a site of these layers. site: "attn", "mlp", "block" or "head". how: "zero";
    "mean", over the tokens that the block computes; "resample"; or "skip". states: by which the output is replaced,
    with how="mean" in place of its own mean: of mean_states(), or of with_changes(record()) of other tokens."""
    layers, stream = {layers} if isinstance(layers, int) else set(layers), None
    if layers - set(range(model.config.n_layer)):
        raise UserError(f"layers {sorted(layers)}: the model has 0 to {model.config.n_layer - 1}")
    if site not in ("attn", "mlp", "block", "head"):
        raise UserError(f"site={site!r} is not one of attn, mlp, block, head")
    if how not in HOWS:
        raise UserError(f"how={how!r} is not one of {', '.join(HOWS)}")
    if how == "resample" and states is None:
        raise UserError("how=resample needs the states of other tokens")

    def instead(name, layer, x):  # (B, [H,] T, C)
        if how in ("zero", "skip"):
            return mx.zeros_like(x)
        if states is not None:
            by = mx.broadcast_to(states[name, layer].astype(x.dtype), x.shape)
            return by if name == "block" else by_row(model, layer, stream, name, by)
        worked = mx.ones(x.shape[:2]) if name == "block" else routed(model, layer, stream)[0]
        first = mx.arange(x.shape[-2]) < worked.sum(1, keepdims=True)  # the rows of the tokens that the block computes
        return mx.broadcast_to(mean_of(x, first)[..., None, :], x.shape)

    def tap(name, layer, x):
        nonlocal stream
        if name == "resid":
            if site == "block" and layer - 1 in layers:
                x = stream + instead("block", layer - 1, x - stream)
            stream = x
        elif layer in layers and name == site:
            x = instead(name, layer, x)
        elif layer in layers and site == "head" and name == "heads":
            H = x.shape[1]
            if head not in range(H):
                raise UserError(f"head={head}: the layer has 0 to {H - 1}")
            x = mx.where((mx.arange(H) == head)[:, None, None], instead(name, layer, x), x)
        return x

    return tap


def ablate(model: GPT, idx: mx.array, site: str, layer: int | Iterable[int], how: str = "zero",
           head: int | None = None, states: dict | None = None) -> mx.array:
    """Logits (B, T, V) of tokens (B, T) with a site of one or several layers ablated: see ablation()."""
    return model(idx, tap=ablation(model, site, layer, how, head, states))


def heads_of(model: GPT) -> int:
    """How many heads of a layer can be ablated; with differential attention, these are pairs."""
    found = []
    model(mx.array([[0]]), tap=lambda site, layer, x: found.append(x.shape[1]) or x if site == "heads" else x)
    return max(found)


# ---- show ------------------------------------------------------------------------------------------------------------


def positions_of(enc: Tokenizer, ids: list[int], part: str) -> list[int]:
    """The positions of the tokens that hold the last occurrence of a part of the prompt."""
    if not part:
        raise UserError("there is no subject: give --subject=TEXT, a part of the clean prompt")
    begin = len(enc.start) * (ids[:len(enc.start)] == enc.start)  # `start` is not text
    pieces = [enc.decode_bytes([i]) if n >= begin else b"" for n, i in enumerate(ids)]
    ends = np.cumsum([len(piece) for piece in pieces])
    low = b"".join(pieces).rfind(part.encode())
    if low < 0:
        raise UserError(f"subject={part!r} is not in the prompt: give a part of the prompt, spelled as there")
    high = low + len(part.encode())
    return [n for n, piece in enumerate(pieces) if ends[n] > low and ends[n] - len(piece) < high and piece]


def text_windows(model: GPT, enc: Tokenizer) -> mx.array:
    """Windows of the text, each with the token after it: (n, T + 1)."""
    T = window_length(model.config, block_size)
    if T != model.config.block_size:
        print(f"the loss is of windows of {T:,} tokens; the model's context is {model.config.block_size:,}")
    return windows(read_tokens(data, enc), samples, T + 1, seed)


def in_batches(text: mx.array) -> list[mx.array]:
    step = max(1, batch_size // 8)
    return [text[i:i + step] for i in range(0, len(text), step)]


def text_means(model: GPT, enc: Tokenizer, sites: list[str]) -> dict:
    batches = in_batches(text_windows(model, enc)[:, :-1])
    return mean_states(model, batches, sites, [None] * len(batches))


def equally_long(found: list[Prompt], what: str):
    if len({len(prompt.clean) for prompt in found}) > 1:
        raise UserError(f"{what} over whole prompts needs prompts of equally many tokens: give others"
                        + (", or the means of a text with --data=FILE" if what == "a mean" else ""))


def sources(model: GPT, enc: Tokenizer, found: list[Prompt], at: list, sites: list[str], how: str) -> list[dict]:
    """For each prompt the states that replace its own, of mean_states() or record(), with a row for each column at[n].
    how: "mean" (with --data or several prompts) or "resample"."""
    ids = [mx.array([prompt.clean]) for prompt in found]
    froms = [pairs and [i for i, _ in pairs] for pairs in at]
    if how == "mean" and data:
        return [text_means(model, enc, sites)] * len(found)
    if len(found) < 2:
        raise UserError(f"{'a mean over prompts' if how == 'mean' else 'resampling'} needs several: give "
                        "--prompts=FILE with more rows")
    if at[0] is None:
        equally_long(found, "a mean" if how == "mean" else "resampling")
        froms = [[*range(len(prompt.clean))] for prompt in found]
    if how == "mean":
        for site in sites:
            check_turned(model, site, [pair for rows in froms for pair in zip(rows, froms[0], strict=True)])
        return [mean_states(model, ids, sites, froms)] * len(found)
    drawn = others(len(found), seed)
    for site in sites:
        for rows, other in zip(froms, drawn, strict=True):
            check_turned(model, site, zip(froms[other], rows, strict=True))
    states = [with_changes(record(model, x, set(sites) - {"block"})) for x in ids]
    return [{key: x[..., mx.array(froms[other]), :] for key, x in states[other].items() if key[0] in sites}
            for other in drawn]


def together(states: list[dict | str | None]) -> dict | str | None:
    """The states of prompts as rows of one batch; those that all of them share remain one row."""
    if all(each is states[0] for each in states):
        return states[0]
    return {key: mx.concatenate([each[key] for each in states]) for key in states[0]}


def show(values: np.ndarray, columns: list[str], title: str, unit: str, known: dict, wholes: np.ndarray | None = None,
         hovers: list | None = None):
    """Print, draw and save the table of values (n, layers, columns) or (n, layers, heads, columns) of n prompts."""
    mean, error = mean_and_error(values, wholes)
    each = values if wholes is None else values / wholes.mean()
    layers, n_head = values.shape[1], values.shape[2] if values.ndim == 4 else 0
    rows, axis = rows_of(site, layers, n_head)
    if n_head and len(columns) == 1:  # heads side by side
        title, n_head = f"{title}, {columns[0]}", 0
        rows, axis, columns = [f"layer {layer}" for layer in range(layers)], "", [f"head {head}" for head in
                                                                                 range(values.shape[2])]
    shape = len(rows), len(columns)
    mean, error, each = mean.reshape(shape), error.reshape(shape), each.reshape(-1, *shape)
    more = effects(mean, error, each)
    if hovers is not None:
        more["hovers"] = [[f"{text}\n{more}" for text, more in zip(*line, strict=True)] for line in
                          zip(more["hovers"], np.reshape(hovers, shape).tolist(), strict=True)]
    Table(mean, rows, columns, title, unit, axis, about=known, group=n_head, **more).finish(picture, save)


def run_grid(model: GPT, enc: Tokenizer, known: dict):
    """The modes swap, resample, zero and mean."""
    found = chosen_prompts(enc, model, prompts, (clean, corrupt, target, foil), bos, mode == "swap")
    of, at = measured(enc, *found), parsed_pairs(pairs)
    if at:
        checked_pairs(found[0].clean, found[0].corrupt, at)
    columns, at = spots(enc, found, positions, at)
    check_turned(model, site, [pair for pairs_of in at for pair in pairs_of or ()])
    source, best = [mode] * len(found), None
    if mode == "resample" or mode == "mean" and (data or prompts):
        source = sources(model, enc, found, at, [site], mode)
    parts = in_parts([(len(prompt.clean), len(prompt.corrupt)) for prompt in found], batch_size)
    before = on_prompts(model, found, [prompt.corrupt or prompt.clean for prompt in found], parts)
    if mode == "swap":
        best = on_prompts(model, found, [prompt.clean for prompt in found], parts)
        check_wholes(best - before)
        title, unit = f"swap, {SITES[site]}", f"(patched - corrupt) / (clean - corrupt) of {of}"
    else:
        by = {"zero": "zeros", "resample": "those of another prompt", "mean": "the mean over the prompt's positions"
              if isinstance(source[0], str) else f"the mean of {os.path.basename(data or prompts)}"}[mode]
        title, unit = f"{SITES[site]} replaced by {by}", f"change of {of}" + ", nats" * (found[0].foil is None)
    line = answers(before, best, of)
    print(line)
    layers, heads = parts_of(record(model, mx.array([found[0].clean]), [site]), site)
    cells, values, tops = len(layers) * len(heads) * len(columns) * len(found), [None] * len(found), None
    with tqdm(total=cells, unit=" cells", disable=None, dynamic_ncols=True) as bar:
        for part in parts:
            some, pairs_of = [found[i] for i in part], at[part[0]]
            froms, tos = ([pair[side] for pair in pairs_of] if pairs_of else None for side in (0, 1))
            if mode == "swap":
                by = record(model, mx.array([prompt.clean for prompt in some]), [site])
            else:
                by = together([source[i] for i in part])
                if isinstance(by, dict) and froms is not None:  # its rows are those of the columns, or there is one
                    froms = [0] * len(tos) if mode == "mean" and data else [*range(len(tos))]

            def measure(logits, some=some):
                return mx.stack([measures(some, logits), logits[..., :enc.n_vocab].argmax(-1).astype(mx.float32)], -1)

            cell = np.array(replaced(model, mx.array([prompt.corrupt or prompt.clean for prompt in some]), by, site,
                                     froms, tos, batch_size, bar, measure))
            for n, i in enumerate(part):
                values[i] = cell[..., n, 0] - before[i]
            tops = cell[..., 0, 1]
    hovers = [f"most probable token: {labels(enc, [int(top)])[0]}" for top in tops.flat] if len(found) == 1 else None
    known |= told(enc, found, prompts) | {"answer": line}
    show(np.stack(values), columns, title, unit, known, None if best is None else best - before, hovers)


def run_trace(model: GPT, enc: Tokenizer, known: dict):
    found = chosen_prompts(enc, model, prompts, (clean, "", target, ""), bos, False)
    found = [prompt._replace(foil=None) for prompt in found]
    rng, values, lines = np.random.default_rng(seed), [], []
    columns, at = spots(enc, found, positions)
    of, highs, lows = f"p{measured(enc, *found).removeprefix('log p')}", [], []
    for prompt, pairs_of in zip(found, at, strict=True):
        where = positions_of(enc, prompt.clean, prompt.subject or subject)
        ids, wanted = mx.array(prompt.clean), prompt.target
        size = noise * model.config.embed_scale * np.array(model.embed(ids).astype(mx.float32)).std()
        drawn = rng.standard_normal((draws, len(where), model.config.n_embd)) * size
        low, p = trace(model, ids, where, mx.array(drawn.astype(np.float32)), site, window, batch_size,
                       pairs_of and [i for i, _ in pairs_of],
                       measure=lambda logits, wanted=wanted: mx.exp(log_p(logits)[..., wanted]))
        low, p = np.array(low), np.array(p)
        highs.append(float(mx.exp(log_p(model(ids[None])[0, -1])[wanted])))
        lows.append(low.mean())
        values.append(p.mean(-1) - low.mean())
        if len(found) == 1:
            print(f"subject at {', '.join(map(str, where))}; {of}: clean {highs[0]:.4f}, corrupted {low.mean():.4f}\n"
                  f"(corrupted: from {low.min():.4f} to {low.max():.4f} over {draws} draws)")
            lines = [f"p {each.mean():.4f}, from {each.min():.4f} to {each.max():.4f}"
                     for each in p.reshape(-1, draws)]
            columns = [f"{name}*" if n in where and positions == "each" else name for n, name in enumerate(columns)]
    line = answers(np.array(lows), np.array(highs), of).replace("corrupt ", "with noise ")
    if len(found) > 1:
        print(line)
    title = f"trace, {SITES[site]} restored" + (f", in windows of {window} layers" if window > 1 else "")
    title += " (*: has noise)" * any(name.endswith("*") for name in columns)
    known |= told(enc, found, prompts) | {"subject": repr(found[0].subject or subject), "answer": line}
    show(np.stack(values), columns, title, f"increase in {of}", known, hovers=lines or None)


def prompt_file(path: str) -> str:
    """The second picture or file of an ablation on a text and a prompt."""
    stem, ending = os.path.splitext(path)
    return f"{stem}-prompt{ending}"


def run_ablate(model: GPT, enc: Tokenizer, known: dict):
    config, wanted, sites_of = model.config, [], ["attn", "mlp", "block", "heads"]
    if not data and not clean and not prompts:
        raise UserError("there is nothing to measure on: give --data=FILE, or --clean and --target, or --prompts=FILE")
    sites = [("attn", None), ("mlp", None), ("block", None), *(("head", head) for head in range(heads_of(model)))]
    names = {"attn": "attention", "mlp": "MLP", "block": "whole layer"}
    columns = [names.get(site, f"head {head}") for site, head in sites]
    rows = [f"layer {layer}" for layer in range(config.n_layer)]

    def tap(cell, states=None):
        return no_tap if cell is None else ablation(model, *cell, states=states)

    if clean or prompts:
        found = chosen_prompts(enc, model, prompts, (clean, corrupt, target, foil), bos, False)
        states = [None] * len(found)
        if how == "resample" or how == "mean" and (data or prompts):
            states = sources(model, enc, found, [None] * len(found), sites_of, how)

        ids = [prompt.clean for prompt in found]
        parts = in_parts([*map(len, ids)], batch_size)

        def change_on_prompts(cell):
            return on_prompts(model, found, ids, parts, lambda part: tap(cell, together([states[i] for i in part])))

        unit = ", nats" * (found[0].foil is None)
        wanted.append((measured(enc, *found), unit, bool(data), change_on_prompts, told(enc, found, prompts)))
    if data:
        text, by = text_windows(model, enc), text_means(model, enc, sites_of) if how == "mean" else None
        if how == "resample" and len(text) < 2:
            raise UserError("resampling needs other windows of the text: give a longer one, or a smaller --block_size")

        def on_text(cell):
            total, following = 0, mx.concatenate([text[1:], text[:1]])
            for x, other in zip(in_batches(text), in_batches(following), strict=True):
                states = by
                if how == "resample" and cell is not None:
                    states = with_changes(record(model, other[:, :-1], ["attn", "mlp", "heads"]))
                total += float(model.loss(x[:, :-1], x[:, 1:], tap=tap(cell, states))) * len(x)
            return np.array([total / len(text)])

        wanted.append(("loss", ", nats", False, on_text, {"text": os.path.basename(data)}))
    cells = len(wanted) * len(sites) * config.n_layer
    with tqdm(total=cells, unit=" cells", disable=None, dynamic_ncols=True) as bar:
        for name, unit, second, measure, more in wanted:
            whole = measure(None)
            values = np.empty((len(whole), config.n_layer, len(sites)))
            for layer, column in np.ndindex(values.shape[1:]):
                site, head = sites[column]
                values[:, layer, column] = measure((site, layer, how, head)) - whole
                bar.update()
            bar.clear()
            mean, error = mean_and_error(values)
            table = Table(mean, rows, columns, f"{how} ablation ({name} {whole.mean():.4f} before)",
                          f"change of {name}{unit}", "without", about=known | more, **effects(mean, error, values))
            table.finish(*((path and prompt_file(path)) if second else path for path in (picture, save)))


# ---- run -------------------------------------------------------------------------------------------------------------

USED = {  # settings that not every mode uses
    "swap": "clean corrupt target foil prompts site positions pairs",
    "resample": "prompts site positions seed", "zero": "clean target foil prompts site positions",
    "mean": "clean target foil prompts site positions data samples block_size seed",
    "trace": "clean target prompts site positions subject noise draws window seed",
    "ablate": "clean target foil prompts how data samples block_size seed"}


def check_settings():
    if mode not in USED:
        raise UserError(f"mode={mode!r} is not one of {', '.join(USED)}")
    idle = given - set(USED[mode].split()) & {name for names in USED.values() for name in names.split()}
    for name in settings:
        if name in idle:
            able = [other for other, names in USED.items() if name in names.split()]
            raise UserError(f"mode={mode} does not use --{name}: leave it out, or give --mode={' or '.join(able)}")
    if prompts:
        for name in ("clean", "corrupt", "target", "foil", "pairs"):
            if name in given:
                raise UserError(f"--prompts and --{name}: the file holds all of the prompts; leave one of the two out")
    for name, allowed in (("site", SITES), ("positions", POSITIONS), ("how", HOWS)):
        if settings[name] not in allowed:
            raise UserError(f"{name}={settings[name]!r} is not one of {', '.join(allowed)}")
    if pairs and positions != "each":
        raise UserError("--pairs and --positions: leave one of the two out")
    if mode == "resample" and not prompts:
        raise UserError("mode=resample needs several prompts: give --prompts=FILE")
    for name in ("samples", "block_size"):
        if name in given and not data:
            raise UserError(f"--{name} is of the windows of a text: give --data=FILE too, or leave it out")
    if window > 1 and site in BY_HEAD:
        raise UserError("--window is of layers, in which heads have nothing in common: leave it out, or give "
                        "--site=attn")
    if min(batch_size, draws, window, samples) < 1 or not 0 <= noise <= 1e6:
        raise UserError("batch_size, draws, window and samples must be 1 or more, and noise from 0 to 1e6")
    if seed < 0:
        raise UserError(f"seed={seed}: it must be 0 or more")


# ---- run -------------------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    check_settings()
    named = mode if site == "resid" or mode == "ablate" else f"{mode}-{site}"
    picture, html = pictures(picture or f"{checkpoint.removesuffix('.safetensors')}-{named}.png")
    second = mode == "ablate" and (clean or prompts) and data
    for name in (picture, html, *(pictures(prompt_file(picture)) if second else ())):
        check_output(name, checkpoint, data, prompts)
    for name in (save, prompt_file(save) if second and save else ""):
        check_saved(name, checkpoint, data, prompts)
    model, enc, known = opened(checkpoint)
    check_site(model, site)
    (run_trace if mode == "trace" else run_ablate if mode == "ablate" else run_grid)(model, enc, known)
