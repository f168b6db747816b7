"""Read a model's prediction from each state of the residual stream: the logit lens, and the tuned lens.

    python tuned_lens.py out/ckpt.safetensors --data=data/stdlib-bpe-4096
    python tuned_lens.py out/ckpt.safetensors --apply=out/ckpt.lenses --prompt="def __init__(self, name):"

The states are the embedding, which layer 0 reads, and the stream after each layer. The logit lens (nostalgebraist 2020)
applies the model's last norm and unembedding to a state h, as if h were the output of the last layer. The tuned lens
(Belrose et al. 2023) first replaces h by h + A h + b, with one translator (A, b) for each state but the last, which the
model itself reads. A and b are 0 at the start. They are trained so that the lens predicts the model's final output: the
loss is KL(the model's distribution || the lens's distribution), mean over tokens and states. All translators are
trained together, from one forward pass of the model; the model's weights do not change. It works with every variant,
and with quantized weights.

For each state, it prints KL and the cross-entropy with the next token, in bits per byte of held-out text, for both
lenses. It writes the lenses to out/ckpt.lenses (safetensors; the header has a hash of the model's weights), and also to
out/ckpt.tgtl, little-endian: "TGTL", u32 version, n_layer, vocabulary, width, then the float32 arrays of each layer.
Version 2 holds A and b. Version 1 comes from --head=full: instead of a translator, each layer has a linear layer
W h + b to the vocabulary, trained on the next token; it learns the data rather than what the model predicts.

--apply shows a prompt as a table, a picture and a page, state by position: the most probable next token, coloured by
its probability or by the entropy; a cell of the page also shows the five most probable tokens. --between=True also
shows the states between attention and the MLP, which are read by the logit lens. --save writes the numbers. In Python:

    >>> from model import load_checkpoint; from tokenizer import Tokenizer; import mlx.core as mx
    >>> from tuned_lens import lens_table, logit_lens
    >>> model, meta = load_checkpoint("out/ckpt.safetensors")
    >>> logits = logit_lens(model, mx.array([[5, 17, 2]]))                                # (n_layer + 1, B, T, V)
    >>> table = lens_table(model, Tokenizer.from_dict(meta["tokenizer"]), [5, 17, 2])     # a notebook shows it

Departure from the paper: Adam instead of SGD with momentum.
"""
import math
import os
import shlex
import struct
import time

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from tqdm import tqdm

from config import UserError, check_output, check_replaced, given, overrides
from draw import check_finite, check_folder, labels, pictures, prompt_ids, state_name, write_figure, write_whole
from inside import Table, about, check_saved, numbered, record
from lora import base_fingerprint
from model import (
    GPT,
    LOSS_CHUNK,
    VERSION,
    compute_dtype,
    cross_entropy,
    load_arrays,
    load_checkpoint,
    save_arrays,
    softmax,
)
from quantized import dense_weight
from score import in_windows, read_splits, window_length
from tokenizer import Tokenizer

checkpoint = "out/ckpt.safetensors"  # any checkpoint, quantized or not
data = ""               # to train on: a folder that data.py made, or a text file (its last tenth is held out)
out = ""                # the lens file, which ends in .lenses; "": the name of the checkpoint with .lenses
head = "affine"         # affine, a translator | full, a linear layer to the vocabulary
max_iters = 160         # updates
batch_size = 4          # windows of block_size tokens in an update
block_size = 0          # tokens of a window; 0: the model's context, but 1,024 at most
learning_rate = 2e-3    # of Adam; it falls linearly to 0
eval_windows = 16       # held-out windows to measure on
seed = 1337             # for the order of windows
# apply
apply = ""              # a .lenses or .tgtl file: show a prompt through it; "none": through the logit lens
prompt = ""             # the prompt to show
between = False         # show the states between attention and the MLP, too
color = "probability"   # probability | entropy
save = ""               # write the table's tokens, probabilities and entropies to this .npz file; "": do not
picture = ""            # a PNG; "": the checkpoint's name with -lens.png, and a page .html; of training, -lenses.png
bos = True              # the prompt, or the text, begins with the token that begins a text, if the tokenizer has one

settings = overrides(globals(), "checkpoint")

# ---- lenses ----------------------------------------------------------------------------------------------------------


def residuals(model: GPT, idx: mx.array) -> mx.array:
    """The states of the residual stream (n_layer + 1, B, T, C), the embedding first, for tokens (B, T)."""
    found = []

    def tap(site, layer, x):
        if site == "resid":
            found.append(x)
        return x

    model.residual(idx, tap=tap)
    return mx.stack(found)


def read(model: GPT, lens: dict[str, mx.array], h: mx.array, layer: int) -> mx.array:
    """Logits (..., V) that a lens reads from the state h (..., C) that enters layer `layer`. lens: A (n_layer, C, C)
    and b (n_layer, C); or W (n_layer, V, C) and b (n_layer, V); or {} for the logit lens."""
    if not lens or layer == model.config.n_layer:
        return model.unembed(h)
    if "W" in lens:
        return h @ lens["W"][layer].T + lens["b"][layer]
    return model.unembed(h + h @ lens["A"][layer].T + lens["b"][layer])


def logit_lens(model: GPT, idx: mx.array, lens: dict[str, mx.array] | None = None) -> mx.array:
    """Logits (n_layer + 1, B, T, V) of tokens (B, T), read from each state; the last ones are the model's own.
    lens: from load_lens(); None: the logit lens."""
    return mx.stack([read(model, lens or {}, h, layer) for layer, h in enumerate(residuals(model, idx))])


def start(model: GPT, head: str = "affine") -> dict[str, mx.array]:
    """A lens before training. "affine" is the logit lens; "full" is the model's unembedding, for streams h of about
    the size of the norm's output."""
    L, C, V = model.config.n_layer, model.config.n_embd, model.config.vocab_size
    if head == "affine":
        return {"A": mx.zeros((L, C, C)), "b": mx.zeros((L, C))}
    W = dense_weight(model.embed if model.config.tie else model.head) * model.norm.weight * model.config.logit_scale
    return {"W": mx.repeat(W[None], L, axis=0), "b": mx.zeros((L, V))}


@mx.custom_function
def soft_cross_entropy(logits: mx.array, p: mx.array) -> tuple[mx.array, mx.array]:
    """-sum p log softmax(logits): (N, V), (N, V) -> (N,); and the softmax. KL is this less the entropy of p."""
    q = probabilities(logits)
    logsumexp = logits.max(-1) - mx.log(q.max(-1))
    return logsumexp - (p * logits).sum(-1), q


@soft_cross_entropy.vjp
def soft_cross_entropy_backward(primals, cotangents, outputs):
    return (outputs[1] - primals[1]) * cotangents[0][:, None], mx.zeros_like(primals[1])


def probabilities(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return softmax(logits)


def gradients(model: GPT, lens: dict[str, mx.array], h: mx.array, targets: mx.array) -> tuple[mx.array, dict]:
    """The loss of a lens, mean over layers, for streams h (n_layer + 1, N, C) and next tokens (N,), and its gradients.
    One layer is computed after another, and at most LOSS_CHUNK logits of it at a time, to save memory."""
    N, step, total, sums = len(targets), max(1, LOSS_CHUNK // model.config.vocab_size), 0, {}
    for start in range(0, N, step):
        loss, found = part_of_gradients(model, lens, h[:, start:start + step], targets[start:start + step])
        share = len(targets[start:start + step]) / N
        total = total + share * loss
        sums = {name: share * array + sums.get(name, 0) for name, array in found.items()}
        if N > step:
            mx.eval(total, sums)
    return total, sums


def part_of_gradients(model: GPT, lens: dict[str, mx.array], h: mx.array, targets: mx.array) -> tuple[mx.array, dict]:
    """gradients() of few enough tokens."""
    final, losses, found = model.unembed(h[-1]).astype(mx.float32), [], []
    p = probabilities(final)
    entropy = soft_cross_entropy(final, p)[0].mean()

    def loss(own, h):
        logits = read(model, {name: array[None] for name, array in own.items()}, h, 0).astype(mx.float32)
        if "W" in own:
            return cross_entropy(logits, targets).mean()
        return soft_cross_entropy(logits, p)[0].mean() - entropy

    for layer in range(len(h) - 1):
        value, gradient = mx.value_and_grad(loss)({name: array[layer] for name, array in lens.items()}, h[layer])
        losses.append(value)
        found.append(gradient)
    return mx.stack(losses).mean(), {name: mx.stack([gradient[name] for gradient in found]) / len(found)
                                     for name in lens}


def measure(model: GPT, lens: dict[str, mx.array], rows: mx.array) -> tuple[np.ndarray, np.ndarray]:
    """KL to the model's distribution, and cross-entropy with the next token, in nats, both (n_layer + 1,): means over
    the tokens of rows (n, T + 1)."""
    totals = []
    for row in rows:
        h, targets = residuals(model, row[None, :-1])[:, 0], row[1:]
        final = model.unembed(h[-1]).astype(mx.float32)
        p, log_p = probabilities(final), final - mx.logsumexp(final, axis=-1, keepdims=True)
        each = []
        for layer in range(len(h)):
            logits = read(model, lens, h[layer], layer).astype(mx.float32)
            log_q = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            each.append(mx.stack([(p * (log_p - log_q)).sum(-1).mean(), cross_entropy(logits, targets).mean()]))
        totals.append(mx.stack(each, axis=1))
        mx.eval(totals[-1])
    kl, ce = np.array(mx.stack(totals).mean(0))
    return kl, ce


# ---- files -----------------------------------------------------------------------------------------------------------


def save_lens(path: str, lens: dict[str, mx.array], model: GPT, header: dict):
    """Write the lens to `path`, and also to a TGTL file beside it."""
    config, full = model.config, "W" in lens
    save_arrays(path, lens, {"version": VERSION, "lens": "full" if full else "affine", **header})
    numbers = struct.pack("<4s4I", b"TGTL", 1 if full else 2, config.n_layer, config.vocab_size, config.n_embd)
    for layer in range(config.n_layer):
        for name in ("W" if full else "A", "b"):
            numbers += np.array(lens[name][layer], "<f4").tobytes()
    write_whole(tgtl_of(path), numbers)


def tgtl_of(path: str) -> str:
    return f"{path.removesuffix('.lenses')}.tgtl"


def load_lens(path: str, model: GPT, fingerprint: str = "") -> dict[str, mx.array]:
    """Read a .lenses or .tgtl file. UserError if it was made for another model: by its shapes, and for a .lenses file
    by the fingerprint of the model's weights."""
    L, C, V = model.config.n_layer, model.config.n_embd, model.config.vocab_size
    if path.endswith(".tgtl"):
        with open_or_tell(path) as file:
            raw = file.read()
        magic, version, layers, vocab, width = struct.unpack("<4s4I", raw[:20].ljust(20, b"\0"))
        rows = vocab if version == 1 else width
        if magic != b"TGTL" or version not in (1, 2) or len(raw) != 20 + 4 * layers * rows * (width + 1):
            raise UserError(f"{path} is not a whole TGTL file of version 1 or 2: make it again")
        numbers = np.frombuffer(raw, "<f4", offset=20).reshape(layers, rows * (width + 1))
        matrix, b = numbers[:, :-rows].reshape(layers, rows, width), numbers[:, -rows:]
        lens = {"W" if version == 1 else "A": mx.array(matrix), "b": mx.array(b)}
    else:
        open_or_tell(path).close()
        lens, header = load_arrays(path)
        if "lens" not in header:
            raise UserError(f"{path} is not a lens file: train one with --data=FILE")
        if fingerprint and header.get("base") != fingerprint:
            raise UserError(f"{path} was made for another checkpoint: train lenses for this one")
    wanted = {"W": (L, V, C), "b": (L, V)} if "W" in lens else {"A": (L, C, C), "b": (L, C)}
    if {name: array.shape for name, array in lens.items()} != wanted:
        raise UserError(f"{path} was made for another checkpoint, of other shapes: train lenses for this one")
    return lens


def open_or_tell(path: str):
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"cannot read the lens file {path}: {error.strerror}") from error


# ---- train -----------------------------------------------------------------------------------------------------------


def windows_of(tokens: np.ndarray, start: list[int], T: int) -> np.ndarray:
    """All whole windows of a text that follows `start`: (n, T + 1), T tokens and the token before them."""
    stream = np.concatenate([start, tokens]).astype(np.int32)
    n = (len(stream) - 1) // T
    if n < 1:
        raise UserError(f"{data} has less than {T} tokens to train on, or to hold out: give a longer text, or a "
                        "smaller --block_size")
    return np.stack([stream[i * T:(i + 1) * T + 1] for i in range(n)])


def texts(enc: Tokenizer, T: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows to train on, and held-out windows."""
    start = enc.start if bos else []
    return tuple(windows_of(part, start, T) for part in read_splits(data, enc))


def train(model: GPT, rows: np.ndarray) -> dict[str, mx.array]:
    """Train a lens for a model on windows (n, T + 1)."""
    rng, order = np.random.default_rng(seed), []
    optimizer = optim.Adam(optim.linear_schedule(learning_rate, 0, max_iters), bias_correction=True)
    lens, size = start(model, head), mx.ones((model.config.n_layer + 1, 1, 1))
    if head == "full":  # h is divided by its root mean square in training; afterwards W is, instead
        size[:-1] = mx.sqrt(mx.square(residuals(model, mx.array(rows[:4, :-1]))[:-1]).mean((1, 2, 3)))[:, None, None]
    bar = tqdm(range(max_iters), unit=" updates", disable=None, dynamic_ncols=True)
    for i in bar:
        while len(order) < batch_size:
            order += rng.permutation(len(rows)).tolist()
        batch, order = mx.array(rows[order[:batch_size]]), order[batch_size:]
        h = mx.stop_gradient(residuals(model, batch[:, :-1])).flatten(1, 2) / size
        loss, gradient = gradients(model, lens, h, batch[:, 1:].reshape(-1))
        lens = optimizer.apply_gradients(gradient, lens)
        mx.eval(loss, lens, optimizer.state)
        if not math.isfinite(loss.item()):
            raise UserError(f"the loss is {loss.item()} at update {i}: give "
                            + ("a smaller --learning_rate" if i else "another checkpoint, its outputs are not finite"))
        if i % 10 == 0:
            bar.set_postfix_str(f"loss {loss.item():.4f}")
    return {"W": lens["W"] / size[:-1], "b": lens["b"]} if head == "full" else lens


def report(model: GPT, lens: dict[str, mx.array], rows: np.ndarray, enc: Tokenizer):
    """Print KL and cross-entropy for each layer, in bits per byte of held-out windows (n, T + 1), and draw KL."""
    scale = rows[:, 1:].size / int(enc.token_bytes[rows[:, 1:].reshape(-1)].sum()) / math.log(2)
    plain, tuned = (np.stack(measure(model, each, mx.array(rows))) * scale for each in ({}, lens))
    print("bits per byte, held out:       KL to the model       cross-entropy\n"
          "residual stream              logit lens    tuned      logit lens    tuned")
    for layer in reversed(range(model.config.n_layer + 1)):
        name = state_name(layer) + ": the model" * (layer == model.config.n_layer)
        print(f"{name:25} {plain[0, layer]:13.4f} {tuned[0, layer]:8.4f} "
              f"{plain[1, layer]:15.4f} {tuned[1, layer]:8.4f}")
    draw_curves(plain[0], tuned[0])


def draw_curves(plain: np.ndarray, tuned: np.ndarray):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(plain[:-1], marker="o", label="logit lens")  # not the last one, the model itself, whose KL is 0
    axes.plot(tuned[:-1], marker="o", label="tuned lens")
    axes.set(xlabel="state of the residual stream", ylabel="KL to the model's distribution, bits per byte",
             yscale="log" if max(plain[:-1].max(), tuned[:-1].max()) > 0 else "linear")
    ticks = range(0, len(plain) - 1, 1 + len(plain) // 16)
    axes.set_xticks(ticks, map(state_name, ticks), rotation=90)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    write_figure(picture, figure)
    plt.close(figure)
    print(f"drawn: {picture}")


# ---- apply -----------------------------------------------------------------------------------------------------------


def lens_table(model: GPT, enc: Tokenizer, ids: list[int], lens: dict[str, mx.array] | None = None,
               color: str = "probability", between: bool = False, about: dict | None = None) -> Table:
    """The most probable next tokens of a prompt's tokens (T,), state by position. lens: from load_lens(); None: the
    logit lens. color: the table's numbers, "probability" of that token, or "entropy". between: with the states between
    attention and the MLP, as the logit lens reads them. Its further arrays, for saving: the tokens (T,), the five most
    probable ones (states, T, 5) with their probabilities, and the entropy (states, T)."""
    states = record(model, mx.array([ids]), ["resid", "mid"])
    if between and ("mid", 0) not in states:
        raise UserError("the model has no states between attention and the MLP, which both read what enters a layer: "
                        "leave out --between")
    rows, read_out = [], []
    for layer in range(model.config.n_layer + 1):
        rows.append(state_name(layer))
        read_out.append(read(model, lens or {}, states["resid", layer], layer))
        if between and layer < model.config.n_layer:
            rows.append(f"after layer {layer}'s attention" + ", logit lens" * bool(lens))
            read_out.append(model.unembed(states["mid", layer]))
    p = np.stack([np.array(mx.softmax(logits[0, :, :enc.n_vocab].astype(mx.float32), axis=-1)) for logits in read_out])
    check_finite(p)
    best = np.argsort(-p, axis=-1)[..., :5]
    found = np.take_along_axis(p, best, -1)
    entropy = -(p * np.log2(np.maximum(p, 1e-30))).sum(-1)
    hovers = [["\n".join([f"entropy {entropy[cell]:.2f} bits", *(
        f"{share:7.2%}  {text}" for share, text in zip(found[cell], labels(enc, best[cell].tolist()), strict=True))])
        for cell in ((i, j) for j in range(len(ids)))] for i in range(len(rows))]
    return Table(found[..., 0] if color == "probability" else entropy, rows, numbered(enc, ids),
                 "tuned lens" if lens else "logit lens", "the most probable next token, coloured by "
                 + ("its probability" if color == "probability" else "the distribution's entropy, bits"),
                 "residual stream", hovers, about or {}, words=[labels(enc, line) for line in best[..., 0].tolist()],
                 signed=False, more={"tokens": np.array(ids), "best": best, "probability": found, "entropy": entropy})


# ---- run -------------------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    if head not in ("affine", "full"):
        raise UserError(f"head={head!r} is not one of affine, full")
    if color not in ("probability", "entropy"):
        raise UserError(f"color={color!r} is not one of probability, entropy")
    if min(max_iters, batch_size, eval_windows) < 1 or not learning_rate > 0:
        raise UserError("max_iters, batch_size, eval_windows and learning_rate must be over 0")
    if seed < 0:
        raise UserError(f"seed={seed}: it must be 0 or more")
    if not data and not apply:
        raise UserError("give --data=FILE to train lenses, or --apply=LENSES and --prompt=TEXT to show a prompt")
    idle = given & ({"data", "out", "head", "max_iters", "batch_size", "block_size", "learning_rate", "eval_windows",
                     "seed"} if apply else {"prompt", "color", "between", "save"})
    if idle:
        names = ", ".join(f"--{name}" for name in sorted(idle))
        raise UserError(f"{names}: not used with --apply, which trains nothing" if apply else
                        f"{names}: not used in training, but with --apply=LENSES")
    stem = checkpoint.removesuffix(".safetensors")
    out = out or f"{stem}.lenses"
    if not out.endswith(".lenses"):
        raise UserError(f"out={out!r}: its name must end in .lenses; a .tgtl file is written beside it")
    picture, html = pictures(picture or (f"{stem}-lens.png" if apply else f"{out.removesuffix('.lenses')}-lenses.png"))
    for name in (picture, html) if apply else (out, tgtl_of(out), picture):
        check_output(name, checkpoint, data, apply)
        check_folder(name)
    check_saved(save, checkpoint, apply)
    if not apply:
        check_replaced(out, os.path.basename(__file__))
        if os.path.exists(tgtl_of(out)) and not os.path.exists(out):
            raise UserError(f"{tgtl_of(out)} exists without a .lenses file beside it: give another --out, or remove it")
    model, meta = load_checkpoint(checkpoint)
    if not meta.get("tokenizer"):
        raise UserError(f"{checkpoint} holds no tokenizer to encode a text with: give another checkpoint")
    enc = Tokenizer.from_dict(meta["tokenizer"])
    fingerprint = base_fingerprint(model)
    lens = load_lens(apply, model, fingerprint) if apply not in ("", "none") else {}
    ids = prompt_ids(enc, prompt, model, bos=bos) if apply else []
    known = about(checkpoint, model, prompt=prompt, lens=os.path.basename(apply))
    model.set_dtype(compute_dtype("auto"))
    if apply:
        table = lens_table(model, enc, ids, lens, color, between, known)
        table.show(picture)
        if save:
            table.save(save)
    else:
        T = window_length(model.config, block_size)
        train_rows, held_out = texts(enc, T)
        began = time.perf_counter()
        lens = train(model, train_rows)
        size = sum(p.size for _, p in tree_flatten(lens)) / 1e6
        print(f"{size:.2f}M parameters in lenses, {max_iters * batch_size * T:,} tokens{in_windows(model.config, T)}, "
              f"{time.perf_counter() - began:.0f} s, {mx.get_peak_memory() / 2**30:.2f} GiB")
        save_lens(out, lens, model, {"base": fingerprint, "script": os.path.basename(__file__), "settings": settings})
        report(model, lens, held_out[:eval_windows], enc)
        command = ["python", os.path.basename(__file__), checkpoint, f"--apply={out}", "--prompt=def main"]
        print(f"written: {out}, {tgtl_of(out)}\nnext: {shlex.join(command)}")
