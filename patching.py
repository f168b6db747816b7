"""Find the parts of a model that matter for an answer: activation patching, causal tracing, ablation.

    python patching.py CKPT --clean="The capital of France is" --corrupt="The capital of Italy is" --target=" Paris"
    python patching.py CKPT --mode=zero --clean="The capital of France is" --target=" Paris"
    python patching.py CKPT --mode=trace --clean="The capital of France is" --subject=France --target=" Paris"
    python patching.py CKPT --mode=ablate --data=book.txt

swap: the model reads the corrupted prompt (the recipient), but its state at one layer and position is replaced by the
state that it has there for the clean prompt (the donor). Each layer and position is a cell of a table; the effect of a
cell is (patched - corrupt) / (clean - corrupt): 0 if the patch changes nothing, 1 if it restores the clean answer. It
is measured in the log-probability of the target after the prompt, or, with --foil, in the target's logit less the
foil's. Prompts of different lengths need --pairs: "4:5, 6:7" puts the donor's state of position 4 at the recipient's
position 5. --site chooses the state: resid, the residual stream that enters a block; attn or mlp, the output of
attention or of the MLP. --mode=zero and --mode=mean replace a state by zeros, or by its mean over the prompt's
positions, and measure the change of the target's log-probability in nats.

trace (Meng et al. 2022): noise is added to the embeddings of the subject's tokens, --noise times the standard deviation
of the embeddings. Then one clean state at a time is restored, or those of --window layers around it. The effect is the
increase in the target's probability, mean over --draws of the noise.

ablate: attention, the MLP or the whole block of each layer, and each head, is removed in turn: its output is set to
zeros, or to its mean over the tokens, or it is skipped. For the outputs of attention, an MLP or a head, skip and zero
are equal; for a block both mean that the stream goes around it. The effect is the change of the loss on a text, and of
the target's log-probability on a prompt, in nats.

It prints a table, and draws a picture and a page with more about each cell. Rows go up from layer 0. At site resid, the
row of layer l is the state that enters the layer: "embedding" for layer 0, else "after layer l-1". The state after the
last layer has no row: at the last position it is the answer itself, and elsewhere nothing reads it. The cells of a
layer run in batches, and earlier layers are not computed again. A patch does not change what a layer takes from before
it: the shared keys and values in YOCO's second half, the values of layer 0 for value residuals, and value embeddings.
In Python:

    >>> from model import load_checkpoint; from patching import swap, ablate; import mlx.core as mx
    >>> model, meta = load_checkpoint("out/ckpt.safetensors")
    >>> logits = swap(model, mx.array([5, 17, 2]), mx.array([5, 18, 2]))   # (n_layer, T, V), of the last position
    >>> logits = ablate(model, mx.array([[5, 17, 2]]), "mlp", 3, "zero")   # (B, T, V)
"""
import os
from collections.abc import Callable, Iterable

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
from tqdm import tqdm

from config import UserError, check_output, overrides
from draw import labels, pictures, prompt_ids
from inside import SITES as NAMES
from inside import Table, about, log_p, measured, numbered, one_token, prompt_of, record, routed, rows_of
from model import GPT, compute_dtype, load_checkpoint, no_tap
from score import read_tokens, window_length, windows
from tokenizer import Tokenizer

checkpoint = "out/ckpt.safetensors"  # any checkpoint, quantized or not
mode = "swap"         # swap | zero | mean | trace | ablate
clean = ""            # the clean prompt
corrupt = ""          # swap: the corrupted prompt
target = ""           # the token that should follow the clean prompt
foil = ""             # swap, zero, mean: a token to compare the target with; "": none
pairs = ""            # swap: "donor position:recipient position, ..."; "": equal positions of equally long prompts
site = "resid"        # resid | attn | mlp
# trace
subject = ""          # the part of the clean prompt that gets the noise
noise = 3.0           # in standard deviations of the embeddings
draws = 10            # draws of the noise
window = 1            # layers that are restored together
# ablate
how = "zero"          # zero | mean | skip
data = ""             # a text file, or a folder that data.py made (its val split)
samples = 16          # windows of block_size tokens of that text
block_size = 0        # tokens of a window; 0: the model's context, but 1,024 at most
# run
batch_size = 64       # rows at a time
seed = 1337           # for the noise, and for the choice of windows
picture = ""          # a PNG; "": the name of the checkpoint with -MODE.png; a page .html is written beside it

settings = overrides(globals(), "checkpoint")

# ---- patching --------------------------------------------------------------------------------------------------------

SITES = "resid", "attn", "mlp"

def last_logits(model: GPT, idx: mx.array, tap: Callable) -> mx.array:
    """Logits (B, V) of the last position."""
    return model.unembed(model.residual(idx, tap=tap)[:, -1])


def patched(model: GPT, idx: mx.array, states: dict, site: str, layers: Iterable[int], positions: list[int],
            values: dict[int, mx.array], batch_size: int = 64, bar: tqdm | None = None) -> mx.array:
    """Logits of the last position (P, D, V), with the states at one of P positions replaced by values[layer] (P, C) in
    these layers. idx (D, T): D prompts to patch; states: their states, by record(). Earlier blocks are not computed."""
    layers, (D, T) = sorted(layers), idx.shape
    step, logits, stream = min(max(1, batch_size // D), len(positions)), [], None
    for start in range(0, len(positions), step):
        here = mx.array(positions[start:start + step])
        n = len(here)
        rows, at = mx.arange(n * D), mx.repeat(here, D)

        def tap(name, layer, x, n=n, rows=rows, at=at, start=start):
            nonlocal stream
            if name == "resid" and layer <= layers[0]:  # lazy: the blocks before it are not computed
                x = mx.broadcast_to(states["resid", layer], (n, D, T, x.shape[-1])).flatten(0, 1)
            if name == site and layer in layers:
                x, row = mx.array(x), at
                if site != "resid":
                    row = routed(model, layer, stream)[1][rows, at]
                x[rows, row] = mx.repeat(values[layer][start:start + n], D, axis=0).astype(x.dtype)
            if name == "resid":
                stream = x
            return x

        logits.append(last_logits(model, mx.broadcast_to(idx, (n, D, T)).flatten(0, 1), tap).reshape(n, D, -1))
        mx.eval(logits[-1])
        if bar is not None:
            bar.update(n * D)
    return mx.concatenate(logits)


def checked_pairs(donor: mx.array, recipient: mx.array, pairs: list[tuple[int, int]] | None) -> list[tuple[int, int]]:
    """The pairs of positions, by default (i, i) for each. UserError if they do not fit the prompts."""
    if pairs is None:
        if len(donor) != len(recipient):
            raise UserError(f"the prompts have {len(donor)} and {len(recipient)} tokens: say which positions "
                            'correspond, as in --pairs="4:5, 6:7"')
        return [(i, i) for i in range(len(recipient))]
    for i, j in pairs:
        if not (0 <= i < len(donor) and 0 <= j < len(recipient)):
            raise UserError(f"pair {i}:{j}: the prompts have positions 0 to {len(donor) - 1} and 0 to "
                            f"{len(recipient) - 1}")
    return pairs


def swap(model: GPT, donor: mx.array, recipient: mx.array, site: str = "resid",
         pairs: list[tuple[int, int]] | None = None, batch_size: int = 64) -> mx.array:
    """Logits of the recipient's last position, with the donor's state at each layer and position in turn:
    (n_layer, T, V) for tokens (T,) and (T,); or (n_layer, P, V) for P pairs of a donor's and a recipient's position."""
    pairs = checked_pairs(donor, recipient, pairs)
    return replaced(model, recipient, record(model, donor[None]), site, [i for i, _ in pairs], [j for _, j in pairs],
                    batch_size)


def replaced(model: GPT, idx: mx.array, source: dict | str, site: str, froms: list[int], positions: list[int],
             batch_size: int = 64) -> mx.array:
    """Logits (n_layer, P, V) of tokens (T,), with the state at each of P positions in turn replaced: by the states
    `source`, from record(), at the positions `froms`; or by "zero"; or by the "mean" over the prompt's positions."""
    states, found = record(model, idx[None]), []
    with tqdm(total=model.config.n_layer * len(positions), unit=" cells", disable=None, dynamic_ncols=True) as bar:
        for layer in range(model.config.n_layer):
            own = states[site, layer][0]
            worked = routed(model, layer, states["resid", layer])[0][0] if site != "resid" else mx.ones(len(idx))
            value = (mx.zeros_like(own) if source == "zero" else mx.broadcast_to(mean_of(own, worked), own.shape)
                     if source == "mean" else source[site, layer][0])[mx.array(froms)]
            found.append(patched(model, idx[None], states, site, [layer], positions, {layer: value}, batch_size, bar))
    return mx.stack(found)[:, :, 0]


def mean_of(x: mx.array, worked: mx.array) -> mx.array:
    """The mean (C,) of states (..., C) over the tokens where worked (...) is true."""
    worked = worked.astype(mx.float32)
    total = (x.astype(mx.float32) * worked[..., None]).sum([*range(x.ndim - 1)])
    return (total / mx.maximum(worked.sum(), 1)).astype(x.dtype)


def trace(model: GPT, idx: mx.array, subject: list[int], noise: mx.array, site: str = "resid", window: int = 1,
          batch_size: int = 64) -> tuple[mx.array, mx.array]:
    """Causal tracing of tokens (T,): noise (D, len(subject), C) is added to the embeddings of the subject's positions.
    Returns the logits of the last position with that noise (D, V); and those with the clean states of one position
    restored in `window` layers around one layer (n_layer, T, D, V)."""
    if len(noise) > batch_size:
        parts = [trace(model, idx, subject, noise[i:i + batch_size], site, window, batch_size)
                 for i in range(0, len(noise), batch_size)]
        return mx.concatenate([low for low, _ in parts]), mx.concatenate([found for _, found in parts], axis=2)
    D, T, n_layer = len(noise), len(idx), model.config.n_layer
    clean, rows = record(model, idx[None]), mx.broadcast_to(idx, (D, T))
    states = record(model, rows, noisy=lambda x: x.at[:, mx.array(subject)].add(noise.astype(x.dtype)))
    found = []
    with tqdm(total=n_layer * T * D, unit=" rows", disable=None, dynamic_ncols=True) as bar:
        for layer in range(n_layer):
            low = max(0, layer - (window - 1) // 2)
            layers = range(low, min(n_layer, layer + window // 2 + 1))
            values = {other: clean[site, other][0] for other in layers}
            found.append(patched(model, rows, states, site, layers, [*range(T)], values, batch_size, bar))
    corrupted = model.unembed(states["resid", n_layer][:, -1])
    return corrupted, mx.stack(found)


# ---- ablation --------------------------------------------------------------------------------------------------------


HOWS = "zero", "mean", "skip"


def ablation(model: GPT, site: str, layers: int | Iterable[int], how: str = "zero",
             head: int | None = None) -> Callable:
    """A tap that replaces the output of a site of these layers. site: "attn", "mlp", "block" or "head". how: "zero",
    "mean" over the tokens that the block computes, or "skip"."""
    layers, stream = {layers} if isinstance(layers, int) else set(layers), None
    if layers - set(range(model.config.n_layer)):
        raise UserError(f"layers {sorted(layers)}: the model has 0 to {model.config.n_layer - 1}")
    if site not in ("attn", "mlp", "block", "head"):
        raise UserError(f"site={site!r} is not one of attn, mlp, block, head")
    if how not in HOWS:
        raise UserError(f"how={how!r} is not one of {', '.join(HOWS)}")

    def mean(layer, x):  # (B, T, C)
        worked = routed(model, layer, stream)[0]
        return mean_of(x, mx.arange(x.shape[1]) < worked.sum(1, keepdims=True))  # these rows come first

    def tap(name, layer, x):
        nonlocal stream
        if name == "resid":
            if site == "block" and layer - 1 in layers:
                x = stream + (x - stream).mean((0, 1)) if how == "mean" else stream
            stream = x
        elif layer in layers and name == site:
            x = mx.broadcast_to(mean(layer, x), x.shape) if how == "mean" else mx.zeros_like(x)
        elif layer in layers and site == "head" and name == "heads":
            B, H, T, D = x.shape
            if head not in range(H):
                raise UserError(f"head={head}: the layer has 0 to {H - 1}")
            by = mx.zeros_like(x)
            if how == "mean":
                by = mean(layer, x.swapaxes(1, 2).reshape(B, T, H * D)).reshape(H, 1, D)
            x = mx.where((mx.arange(x.shape[1]) == head)[:, None, None], by, x)
        return x

    return tap


def ablate(model: GPT, idx: mx.array, site: str, layer: int | Iterable[int], how: str = "zero",
           head: int | None = None) -> mx.array:
    """Logits (B, T, V) of tokens (B, T) with a site of one or several layers ablated: see ablation()."""
    return model(idx, tap=ablation(model, site, layer, how, head))


def heads_of(model: GPT) -> int:
    """How many heads of a layer can be ablated; with differential attention, these are pairs."""
    found = []
    model(mx.array([[0]]), tap=lambda site, layer, x: found.append(x.shape[1]) or x if site == "heads" else x)
    return max(found)


# ---- show ------------------------------------------------------------------------------------------------------------


def places(enc: Tokenizer, donor: list[int], recipient: list[int], pairs: list[tuple[int, int]] | None) -> list[str]:
    """The labels of pairs of positions: the position, or both as i:j, and the token, or both where they differ."""
    names = []
    for i, j in pairs or [(i, i) for i in range(len(recipient))]:
        given, had = labels(enc, [donor[i], recipient[j]])
        names.append(f"{f'{i}:{j}' if pairs else i} {given if given == had else f'{given}→{had}'}")
    return names


def parsed_pairs(pairs: str) -> list[tuple[int, int]] | None:
    try:
        return [(int(i), int(j)) for i, _, j in (pair.partition(":") for pair in pairs.split(","))] if pairs else None
    except ValueError:
        raise UserError(f'pairs={pairs!r}: write pairs of positions, as in "4:5, 6:7"') from None


def positions_of(enc: Tokenizer, ids: list[int], part: str) -> list[int]:
    """The positions of the tokens that hold the last occurrence of a part of the prompt."""
    if not part:
        raise UserError("there is no subject: give --subject=TEXT, a part of the clean prompt")
    pieces = [enc.decode_bytes([i]) if n >= len(enc.start) else b"" for n, i in enumerate(ids)]  # `start` is not text
    ends = np.cumsum([len(piece) for piece in pieces])
    low = b"".join(pieces).rfind(part.encode())
    if low < 0:
        raise UserError(f"subject={part!r} is not in the prompt: give a part of the prompt, spelled as there")
    high = low + len(part.encode())
    return [n for n, piece in enumerate(pieces) if ends[n] > low and ends[n] - len(piece) < high and piece]


def run_grid(model: GPT, enc: Tokenizer, known: dict):
    """The modes swap, zero and mean."""
    prompt = prompt_of(enc, model, clean, corrupt if mode == "swap" else "", target, foil)
    if mode == "swap" and not prompt.corrupt:
        raise UserError("no prompt: give --corrupt=TEXT")
    ids, of = prompt.clean, measured(enc, prompt)

    def measure(logits):
        return np.array(prompt.measure(logits))

    donor, other = mx.array(ids), prompt.corrupt or ids
    before = measure(model(mx.array([other]))[0, -1])
    if mode == "swap":
        at = parsed_pairs(pairs)
        best = measure(model(donor[None])[0, -1])
        if abs(best - before) < 1e-4:
            raise UserError("the target is as probable after both prompts, so there is no effect: give other prompts")
        logits = swap(model, donor, mx.array(other), site, at, batch_size)
        values = (measure(logits) - before) / (best - before)
        columns = places(enc, ids, other, at)
        title, unit = f"swap, {NAMES[site]}", f"(patched - corrupt) / (clean - corrupt) of {of}"
        print(f"{of}: clean {best:.4f}, corrupt {before:.4f}")
        if best < before:
            print("the clean prompt has no answer that could come back, as the target is less\n"
                  "likely after it: exchange --clean and --corrupt, or give another --target")
    else:
        logits = replaced(model, donor, mode, site, [*range(len(ids))], [*range(len(ids))], batch_size)
        values, columns = measure(logits) - before, numbered(enc, ids)
        title, unit = f"{NAMES[site]} replaced by {mode}", f"change of {of}" + (", nats" if prompt.foil is None else "")
        print(f"{of}: clean {before:.4f}")
    tops = np.array(mx.argmax(logits[..., :enc.n_vocab], axis=-1))
    hovers = [[f"{value:+.4f}\nmost probable token: {labels(enc, [int(top)])[0]}"
               for value, top in zip(*line, strict=True)] for line in zip(values, tops, strict=True)]
    rows, axis = rows_of(site, len(values))
    Table(values, rows, columns, title, unit, axis, hovers, known | {"clean": clean, "corrupt": corrupt}).show(picture)


def run_trace(model: GPT, enc: Tokenizer, known: dict):
    ids, wanted = prompt_ids(enc, clean, model, "clean"), one_token(enc, target, "target")
    at, of = positions_of(enc, ids, subject), f"p({enc.decode([wanted])!r})"
    size = noise * model.config.embed_scale * np.array(model.embed(mx.array(ids)).astype(mx.float32)).std()
    drawn = np.random.default_rng(seed).standard_normal((draws, len(at), model.config.n_embd)) * size
    corrupted, restored = trace(model, mx.array(ids), at, mx.array(drawn.astype(np.float32)), site, window, batch_size)
    clean_p = float(mx.exp(log_p(model(mx.array([ids]))[0, -1])[wanted]))
    low = np.exp(np.array(log_p(corrupted)[:, wanted]))
    p = np.exp(np.array(log_p(restored)[..., wanted]))
    print(f"subject at {', '.join(map(str, at))}; {of}: clean {clean_p:.4f}, corrupted {low.mean():.4f}\n"
          f"(corrupted: from {low.min():.4f} to {low.max():.4f} over {draws} draws)")
    values, columns = p.mean(-1) - low.mean(), numbered(enc, ids)
    columns = [f"{name}*" if n in at else name for n, name in enumerate(columns)]
    hovers = [[f"p {each.mean():.4f}, from {each.min():.4f} to {each.max():.4f}" for each in line] for line in p]
    title = f"trace, {NAMES[site]} restored" + (f", in windows of {window} layers" if window > 1 else "")
    rows, axis = rows_of(site, len(values))
    Table(values, rows, columns, f"{title} (*: has noise)", f"increase in {of}", axis, hovers,
          known | {"clean": clean}).show(picture)


def prompt_picture(path: str) -> str:
    """The second picture of an ablation on a text and a prompt."""
    return f"{os.path.splitext(path)[0]}-prompt.png"


def run_ablate(model: GPT, enc: Tokenizer, known: dict):
    config = model.config
    if not data and not clean:
        raise UserError("there is nothing to measure on: give --data=FILE, or --clean and --target")
    sites = [("attn", None), ("mlp", None), ("block", None), *(("head", head) for head in range(heads_of(model)))]
    names = {"attn": "attention", "mlp": "MLP", "block": "whole layer"}
    columns = [names.get(site, f"head {head}") for site, head in sites]
    rows = [f"layer {layer}" for layer in range(config.n_layer)]
    measures = []
    if clean:
        ids, wanted = mx.array([prompt_ids(enc, clean, model, "clean")]), one_token(enc, target, "target")
        name = f"log p({enc.decode([wanted])!r})"
        path = prompt_picture(picture) if data else picture
        measures.append((name, path, lambda tap: float(log_p(last_logits(model, ids, tap)[0])[wanted])))
    if data:
        T = window_length(config, block_size)
        text = windows(read_tokens(data, enc), samples, T + 1, seed)
        if T != config.block_size:
            print(f"the loss is of windows of {T:,} tokens; the model's context is {config.block_size:,}")
        step = min(max(1, batch_size // 8), len(text))
        batches = [text[i:i + step] for i in range(0, len(text), step)]

        def loss(tap):
            return float(sum(model.loss(x[:, :-1], x[:, 1:], tap=tap) * len(x) for x in batches)) / len(text)

        measures.append(("loss", picture, loss))
    cells = len(measures) * len(sites) * config.n_layer
    with tqdm(total=cells, unit=" cells", disable=None, dynamic_ncols=True) as bar:
        for name, path, measure in measures:
            whole, values = measure(no_tap), np.empty((config.n_layer, len(sites)))
            for cell in np.ndindex(values.shape):
                site, head = sites[cell[1]]
                values[cell] = measure(ablation(model, site, cell[0], how, head)) - whole
                bar.update()
            bar.clear()
            Table(values, rows, columns, f"{how} ablation ({name} {whole:.4f} without it)", f"change of {name}, nats",
                  "without", [[f"{value + whole:.4f}" for value in line] for line in values], known).show(path)


# ---- run -------------------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    if mode not in ("swap", "zero", "mean", "trace", "ablate"):
        raise UserError(f"mode={mode!r} is not one of swap, zero, mean, trace, ablate")
    if site not in SITES:
        raise UserError(f"site={site!r} is not one of {', '.join(SITES)}")
    if min(batch_size, draws, window, samples) < 1 or not 0 <= noise <= 1e6:
        raise UserError("batch_size, draws, window and samples must be 1 or more, and noise from 0 to 1e6")
    if seed < 0:
        raise UserError(f"seed={seed}: it must be 0 or more")
    if how not in HOWS:
        raise UserError(f"how={how!r} is not one of {', '.join(HOWS)}")
    picture, html = pictures(picture or f"{checkpoint.removesuffix('.safetensors')}-{mode}.png")
    more = pictures(prompt_picture(picture)) if mode == "ablate" and clean and data else ()
    for name in (picture, html, *more):
        check_output(name, checkpoint, data)
    model, meta = load_checkpoint(checkpoint)
    if not meta.get("tokenizer"):
        raise UserError(f"{checkpoint} holds no tokenizer to encode a prompt with: give another checkpoint")
    enc = Tokenizer.from_dict(meta["tokenizer"])
    known = about(checkpoint, model)
    model.set_dtype(compute_dtype("auto"))
    (run_trace if mode == "trace" else run_ablate if mode == "ablate" else run_grid)(model, enc, known)
