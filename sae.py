"""Find the features of a model: train sparse autoencoders and transcoders, look at their features, and steer by one.

    python sae.py webgpu/demo.safetensors --data=data/stdlib-bpe-4096 --site=mlp_in --layer=all --tokens=400000 \\
        --learning_rate=1e-2 --eval_tokens=8192 --out=demo.sae
    held-out text      L0  explained   loss: recovered   clean     sae    zero    dead  density  outliers
    ...
    mlp_in 2         28.5     0.9520            0.9645  2.6719  2.6755  2.7739   23.0%   1.262%         0

    python sae.py webgpu/demo.safetensors --data=data/stdlib-bpe-4096 --show=demo-2.sae
    feature    823 | active   1.654% | most at 'key(self,' '_header(self,' 'write(self,'
    ...
    python sae.py webgpu/demo.safetensors --show=demo-2.sae --feature=823 --strength=2 --direction=823.safetensors
    python steer.py webgpu/demo.safetensors --direction=823.safetensors --prompt="class"

An autoencoder approximates the states x of one site of one layer by a sum of few directions out of many. Each direction
is a feature, which often has a meaning that single numbers of a state lack (Bricken et al. 2023). A transcoder
(--site=mlp_in) approximates in this way what an MLP writes, from what it reads (Dunefsky et al. 2024), and replaces it
in circuit.py. sparse.py has the formulas, the sites and the file format. With normalised x and y (y = x in an
autoencoder), of mean 0 and mean squared length 1:

    p = W x + b,  z = f(p),  y' = z D + c,  loss = |y - y'|^2 + auxiliary loss;  the rows of D have length 1

    topk       f keeps the k largest p of each token (Gao et al. 2024)
    batchtopk  f keeps the k n largest p of a batch of n tokens (Bussmann et al. 2024). In the file, one threshold takes
               their place: the running mean of the smallest p that was kept
    jumprelu   f keeps p over a threshold t of each feature (Rajamanoharan et al. 2024). With the rectangle kernel K and
               the bandwidth e, t learns from  d z / d t = -t / e K((p - t) / e),  and from the loss
               sparsity (L0 / k - 1)^2, where L0 is the number of active features of a token, and
               d L0 / d t = -1 / e K((p - t) / e)

A feature that was not active in the last `dead_after` tokens is dead. While a layer has dead features,
the auxiliary loss (AuxK, Gao et al. 2024) lets the features that were silent longest, about half as many as a state has
numbers, approximate what is left, e = y - y':  1/32 |e - e'|^2 / |e|^2.

Texts are read in windows, through the model, once for all layers. The first token of each window is left out, since
its states are unlike all others. So are outliers: those that differ from the mean by 10 times the usual length, which
some models have at a few further tokens (Sun et al. 2024). A log line has, for each layer, the explained variance of
the last update. After training, held-out text gives, for each layer:

    L0         mean number of active features of a token
    explained  1 - sum |y - y'|^2 / sum |y - mean y|^2, over all tokens that are no outliers
    recovered  (CE_zero - CE_sae) / (CE_zero - CE_clean): the share of the model's loss that is recovered; CE is the
               cross-entropy with y' in place of y (CE_sae), with 0 (CE_zero), and of the unchanged model (CE_clean)
    dead       share of features that were never active
    density    share of tokens at which a feature is active, the median over the features that are not dead

--show writes a page: for each feature, how often it is active, the texts in which it is most active, the tokens that it
raises and lowers, and the model's prediction with the feature removed or made stronger.

Departures from the papers: the bias that Gao et al. subtract from x is part of b; the features that approximate e are
the same for a whole batch, which costs little, and may include some that are not dead; the thresholds begin where k
features of a token are active."""
import html
import math
import os
import shlex
import time
from collections.abc import Iterator
from functools import partial

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from tqdm import tqdm

from config import UserError, check_output, check_replaced, given, overrides
from draw import check_finite, check_folder, curves, page, pictures
from inside import about, last_logits, listed
from lora import base_fingerprint
from model import GPT, compute_dtype, load_checkpoint
from score import rated, read_splits, window_length, windows
from sparse import (
    SITES,
    Dictionary,
    active,
    check_site,
    decode,
    encode,
    kth_largest,
    load,
    replacing,
    save,
    states,
    watching,
)
from steering import save_direction
from tokenizer import Tokenizer

checkpoint = "out/ckpt.safetensors"  # any checkpoint, quantized or not
data = ""                 # a folder that data.py made, or a text file (its last tenth is held out)
out = ""                  # the file, NAME.sae; of several layers NAME-LAYER.sae; "": the name of the checkpoint
# dictionary
site = "resid"            # resid | attn | mlp | heads | hidden: an autoencoder; mlp_in: a transcoder of the MLP
layer = "1"               # 2; several: 0,2; all. The residual stream is that which enters the layer
kind = "topk"             # topk | batchtopk | jumprelu
features = 0              # features of a layer; 0: 8 for each number of the states that it reads
k = 32                    # active features of a token
skip = False              # a transcoder also learns a linear map from what it reads to what it writes
# training
tokens = 1_000_000        # tokens to train on
batch_size = 1024         # tokens of an update
learning_rate = 3e-3      # of Adam, the peak: it warms up over 5 % of the updates, and falls to 0 over the last fifth
dead_after = 50_000       # tokens
sparsity = 0.1            # weight of the loss of L0 (jumprelu)
bandwidth = 0.01          # e (jumprelu)
block_size = 0            # tokens of a window; 0: the model's context, but 1,024 at most
eval_tokens = 32_768      # held-out tokens to measure on, and to find texts in
seed = 1337               # of the weights and the order of texts
picture = ""              # a PNG; "": the name of the .sae file, with -curves.png, or with .png and .html for --show
# look
show = ""                 # a .sae file: write a page of its features
feature = ""              # features to show, as 17,40; "": those that write most, of those at 2% of the tokens or less
top = 16                  # how many features to show without --feature
# steer
direction = ""            # write the direction of one --feature of --show to this file, for steer.py and the page
strength = 1.0            # activation of the feature that the direction has

settings = overrides(globals(), "checkpoint")

TRAIN = ("out", "site", "layer", "kind", "features", "k", "skip", "tokens", "batch_size", "learning_rate", "dead_after",
         "sparsity", "bandwidth")
STRENGTHS = 0, 0.5, 1, 2, 4  # of the slider
AROUND = 16  # tokens before and after the one where a feature is most active
BUFFER = 2**29  # bytes of states to shuffle
OUTLIER = 10  # a state that differs from the mean by so many times the usual length is not trained on

# ---- losses ----------------------------------------------------------------------------------------------------------


@mx.custom_function
def jump(p: mx.array, threshold: mx.array, bandwidth: mx.array) -> mx.array:
    """p where it is over its threshold, else 0: (N, F), (F,), () -> (N, F)."""
    return mx.where(p > threshold, p, 0)


@jump.vjp
def jump_backward(primals, cotangent, _):
    p, t, e = primals
    near = mx.abs(p - t) < e / 2
    return mx.where(p > t, cotangent, 0), -(t / e) * mx.where(near, cotangent, 0).sum(0), mx.zeros_like(e)


@mx.custom_function
def counted(p: mx.array, threshold: mx.array, bandwidth: mx.array) -> mx.array:
    """L0: how many p are over their thresholds, the mean over tokens: (N, F), (F,), () -> ()."""
    return (p > threshold).sum() / len(p)


@counted.vjp
def counted_backward(primals, cotangent, _):
    p, t, e = primals
    near = mx.abs(p - t) < e / 2
    return mx.zeros_like(p), -(cotangent / e) * near.sum(0) / len(p), mx.zeros_like(e)


def dictionary_loss(own: dict, x: mx.array, y: mx.array, dead: mx.array | None = None) -> tuple[mx.array, ...]:
    """The loss of the module's docstring, for normalised states x (N, C_in) and y (N, C_out): loss, |y - y'|^2, z
    (N, F), and the threshold of this batch. dead: the indices (A,) of features that take part in the auxiliary loss."""
    p, more, bound = mx.addmm(own["encoder_bias"], x, own["encoder"].T), 0, mx.array(0.0)
    if kind == "jumprelu":
        t, e = mx.exp(own["log_threshold"]), mx.array(bandwidth)
        z = jump(p, t, e)
        more = sparsity * mx.square(counted(p, t, e) / k - 1)
    elif kind == "batchtopk":
        p = mx.maximum(p, 0)
        bound = mx.stop_gradient(kth_largest(p.reshape(1, -1), k * len(p)))[0, 0]
        z = mx.where(p >= bound, p, 0)
    else:
        z = active(kind, p, k, None)
    left = y - mx.addmm(own["decoder_bias"], z, own["decoder"])
    if "skip" in own:
        left = left - x @ own["skip"].T
    error = mx.square(left).sum() / len(x)
    if dead is not None:
        rest = mx.stop_gradient(left)
        spare = mx.maximum(x @ own["encoder"][dead].T + own["encoder_bias"][dead], 0) @ own["decoder"][dead]
        more = more + mx.square(rest - spare).sum() / mx.square(rest).sum() / 32
    return error + more, error, z, bound


def start(width_in: int, width_out: int, F: int, key: mx.array) -> dict[str, mx.array]:
    """The parameters before training: the encoder is the decoder, where an autoencoder has both."""
    own, key = {}, mx.random.split(key)
    own["decoder"] = unit_rows(mx.random.normal((F, width_out), key=key[0]))
    own["encoder"] = mx.array(own["decoder"])
    own |= {"encoder_bias": mx.zeros(F), "decoder_bias": mx.zeros(width_out)}
    if site == "mlp_in":
        # a third of the length, because what it writes is noise at the start
        own["encoder"] = 0.3 * unit_rows(mx.random.normal((F, width_in), key=key[1]))
    if kind == "jumprelu":
        own["log_threshold"] = mx.zeros(F)
    if skip:
        own["skip"] = mx.zeros((width_out, width_in))
    return own


def unit_rows(x: mx.array) -> mx.array:
    return x / mx.linalg.norm(x, axis=-1, keepdims=True)


# ---- states ----------------------------------------------------------------------------------------------------------


def texts(enc: Tokenizer, T: int) -> tuple[mx.array, mx.array]:
    """Windows (n, T) to train on, in random order, and held-out windows."""
    parts = read_splits(data, enc)
    return tuple(windows(np.concatenate([enc.start, part]).astype(np.int32), most, T, seed)
                 for part, most in zip(parts, (len(parts[0]) // T + 1, -(-eval_tokens // T)), strict=True))


def streamed(model: GPT, rows: mx.array, places: list[tuple[str, int]], batch: int, rng) -> Iterator[dict]:
    """Batches of states at places, {place: (batch, C)}, without end. They are drawn from a buffer of shuffled states of
    many windows."""
    per_pass = max(1, 4096 // rows.shape[1])
    buffer, size, position = [], 0, 0
    while True:
        idx = rows[mx.arange(position, position + per_pass) % len(rows)]
        position += per_pass
        found = states(model, idx, places)
        found = {place: found[place][:, 1:].flatten(0, 1).astype(mx.float32) for place in places}
        mx.eval(found)
        buffer.append(found)
        size += len(found[places[0]])
        width = sum(4 * x.shape[1] for x in found.values())
        if size >= max(2 * batch, min(BUFFER // width, 2**16)):
            whole = {place: mx.concatenate([part[place] for part in buffer]) for place in places}
            order = mx.array(rng.permutation(size))
            for i in range(0, size - batch + 1, batch):
                yield {place: x[order[i:i + batch]] for place, x in whole.items()}
            buffer, size = [], 0


def normaliser(x: mx.array) -> tuple[mx.array, mx.array]:
    """The mean (C,) of states (N, C), and the root of the mean squared length () of what differs from it. States of
    OUTLIER times the median length are left out."""
    lengths = mx.square(x - x.mean(0)).sum(-1, keepdims=True)
    kept = lengths <= OUTLIER**2 * mx.sort(lengths, axis=0)[len(x) // 2]
    mean = mx.where(kept, x, 0).sum(0) / kept.sum()
    return mean, mx.sqrt(mx.where(kept, mx.square(x - mean), 0).sum() / kept.sum())


# ---- train -----------------------------------------------------------------------------------------------------------


def share_of_peak(step: mx.array, steps: int) -> mx.array:
    """The learning rate of an update, as a share of the peak."""
    return mx.minimum(1, mx.minimum((step + 1) / max(1, steps // 20), (steps - step) / max(1, steps // 5)))


def normalised(x: mx.array, scale: tuple[mx.array, mx.array]) -> mx.array:
    """States (N, C) of mean 0 and mean squared length 1; those that are far longer count as 0, the mean."""
    x = (x - scale[0]) / scale[1]
    return mx.where(mx.square(x).sum(-1, keepdims=True) <= OUTLIER**2, x, 0)


def folded(own: dict, read: tuple, write: tuple, scales: dict, bound: mx.array) -> Dictionary:
    """The dictionary that does to states what these parameters do to normalised ones."""
    (mean_in, size_in), (mean_out, size_out) = scales[read], scales[write]
    encoder = own["encoder"] * (size_out / size_in)
    encoder_bias = own["encoder_bias"] * size_out - encoder @ mean_in
    decoder_bias, skip = own["decoder_bias"] * size_out + mean_out, None
    if "skip" in own:
        skip = own["skip"] * (size_out / size_in)
        decoder_bias = decoder_bias - skip @ mean_in
    threshold = {"jumprelu": lambda: mx.exp(own["log_threshold"]) * size_out, "batchtopk": lambda: bound * size_out}
    return Dictionary(kind, k, read, write, encoder, encoder_bias, own["decoder"], decoder_bias,
                      threshold[kind]() if kind in threshold else None, skip)


def train(model: GPT, rows: mx.array, reads: list, writes: list) -> tuple[list[Dictionary], list[dict]]:
    """Train a dictionary for each place of `reads` and `writes` on windows (n, T). Returns them, and the rows of the
    curves."""
    places, steps = list(dict.fromkeys([*reads, *writes])), max(1, tokens // batch_size)
    stream, began = streamed(model, rows, places, batch_size, np.random.default_rng(seed)), time.perf_counter()
    batch, clock = next(stream), began
    scales, width = {place: normaliser(x) for place, x in batch.items()}, batch[reads[0]].shape[1]
    mx.eval(scales)
    F, spare = features or 8 * width, 2 ** round(math.log2(max(2, width // 2)))  # of features, and of AuxK
    if k > F:
        raise UserError(f"k={k} is more than the {F} features: give more --features, or a smaller --k")
    own = {str(i): start(batch[read].shape[1], batch[write].shape[1], F, mx.random.key(seed + i))
           for i, (read, write) in enumerate(zip(reads, writes, strict=True))}
    if kind == "jumprelu":
        for each, read in zip(own.values(), reads, strict=True):
            p = normalised(batch[read], scales[read]) @ each["encoder"].T
            bound = kth_largest(p.reshape(1, -1), k * len(p))[0]
            each["log_threshold"] = mx.broadcast_to(mx.log(mx.maximum(bound, 1e-3)), (F,))
    optimizer = optim.Adam(lambda step: learning_rate * share_of_peak(step, steps), bias_correction=True)
    optimizer.init(own)
    run = {"own": own, "silent": mx.zeros((len(reads), F), mx.int32),  # tokens since a feature was active
           "bounds": mx.zeros(len(reads))}

    def losses(own, xs, ys, dead):
        found = [dictionary_loss(each, x, y, dead=d) for each, x, y, d in zip(own.values(), xs, ys, dead, strict=True)]
        return sum(each[0] for each in found), [each[1:] for each in found]

    @partial(mx.compile, inputs=[run, optimizer.state], outputs=[run, optimizer.state])
    def update(batch, rescue):
        xs, ys = ([normalised(batch[place], scales[place]) for place in side] for side in (reads, writes))
        own, silent = run["own"], run["silent"]
        dead = list(mx.argpartition(-silent, min(spare, F) - 1)[:, :spare]) if rescue else [None] * len(xs)
        (_, found), gradients = mx.value_and_grad(losses)(own, xs, ys, dead)
        for each, gradient in zip(own.values(), gradients.values(), strict=True):  # only what turns a row
            along = (gradient["decoder"] * each["decoder"]).sum(1, keepdims=True)
            gradient["decoder"] = gradient["decoder"] - along * each["decoder"]
        own = optimizer.apply_gradients(gradients, own)
        run["own"] = {i: each | {"decoder": unit_rows(each["decoder"])} for i, each in own.items()}
        errors, fired, bounds = ([each[j] for each in found] for j in range(3))
        bounds, old = mx.stack(bounds), run["bounds"]
        run["bounds"] = mx.where(old == 0, bounds, 0.99 * old + 0.01 * bounds)
        counts = mx.stack([(z > 0).sum(0) for z in fired])  # of tokens, for each feature
        run["silent"] = mx.where(counts > 0, 0, silent + len(xs[0]))
        return mx.stack(errors), counts.sum(1) / len(xs[0]), (run["silent"] > dead_after).mean(1)

    curve, shares, seconds, dead = [], [], {"states": 0.0, "updates": 0.0}, mx.zeros(len(reads))
    bar = tqdm(total=steps * batch_size, unit="tok", unit_scale=True, disable=None, dynamic_ncols=True)
    for step in range(steps):
        batch = next(stream)
        mx.eval(batch)
        now = time.perf_counter()
        seconds["states"], clock = seconds["states"] + now - clock, now
        errors, L0, dead = update(batch, bool(dead.max().item() > 0))
        mx.eval(errors, L0, dead, run, optimizer.state)
        now = time.perf_counter()
        took, clock = now - clock, now
        seconds["updates"] += took
        bar.update(batch_size)
        if step % max(1, steps // 20) == 0 or step == steps - 1:
            explained = 1 - np.array(errors)
            if not np.isfinite(explained).all():
                raise UserError(f"the loss is not finite at update {step}: give a smaller --learning_rate")
            tqdm.write(f"step {step:6d} | explained " + " ".join(f"{e:6.3f}" for e in explained)
                       + f" | L0 {L0.mean().item():6.1f} | dead {dead.mean().item():6.1%} | "
                       f"{(step + 1) * batch_size / (now - began):7,.0f} tok/s")
            curve.append({"step": step} | {f"{name} {i}": value for name, values in (
                ("explained", explained), ("L0", np.array(L0)), ("dead", np.array(dead)))
                for i, value in enumerate(values)})
            shares.append(len(reads) * matmul_seconds(batch[reads[0]], batch[writes[0]], F) / took)
            clock = time.perf_counter()
    bar.close()
    print(f"{steps * batch_size:,} tokens, {seconds['states']:.0f} s for the states and {seconds['updates']:.0f} s for "
          f"updates, whose matrix products alone take {np.median(shares):.2f} of this time; "
          f"{mx.get_peak_memory() / 2**30:.2f} GiB")
    return [folded(own, read, write, scales, bound) for own, read, write, bound in
            zip(run["own"].values(), reads, writes, run["bounds"], strict=True)], curve


def matmul_seconds(x: mx.array, y: mx.array, F: int) -> float:
    """The time of the five matrix products of one update, for states x (N, C_in) and y (N, C_out), without the rest."""
    z, encoder, decoder = mx.ones((len(x), F)), mx.ones((F, x.shape[1])), mx.ones((F, y.shape[1]))
    mx.eval(x, y, z, encoder, decoder)
    began = time.perf_counter()
    mx.eval(x @ encoder.T, z @ decoder, y @ decoder.T, z.T @ y, z.T @ x)
    return time.perf_counter() - began


# ---- measure ---------------------------------------------------------------------------------------------------------


def measure(model: GPT, dictionaries: list[Dictionary], rows: mx.array) -> list[dict]:
    """The metrics of the module's docstring, of held-out windows (n, T), for each dictionary by itself."""
    sums = [dict.fromkeys(("left", "squares", "sum", "kept", "active", "sae", "zero"), 0) for _ in dictionaries]
    clean, count, scored, scales = 0.0, 0, 0, {}
    per_pass = max(1, 4096 // rows.shape[1])
    for i in tqdm(range(0, len(rows), per_pass), unit=" passes", leave=False, disable=None, dynamic_ncols=True):
        idx = rows[i:i + per_pass]
        found = states(model, idx, {place for d in dictionaries for place in (d.reads, d.writes)})
        scales = scales or {d.writes: normaliser(found[d.writes][:, 1:].flatten(0, 1).astype(mx.float32))
                            for d in dictionaries}
        clean += loss_of(model, idx)
        count, scored = count + idx[:, 1:].size, scored + idx[:, 2:].size
        for d, total in zip(dictionaries, sums, strict=True):
            x, y = (found[place][:, 1:].flatten(0, 1).astype(mx.float32) for place in (d.reads, d.writes))
            z, (mean, size) = encode(d, x), scales[d.writes]
            kept = mx.square(y - mean).sum(-1, keepdims=True) <= (OUTLIER * size)**2
            left, y = mx.where(kept, y - decode(d, z, x), 0), mx.where(kept, y - mean, 0)
            more = {"left": mx.square(left).sum(), "squares": mx.square(y).sum(), "sum": y.sum(0), "kept": kept.sum(),
                    "active": (z > 0).sum(0)}
            for name, value in more.items():
                total[name] = total[name] + np.array(value, np.float64)
            total["sae"] += loss_of(model, idx, replacing(model, [d]))
            total["zero"] += loss_of(model, idx, replacing(model, [d], zero=True))
    told = []
    for total in sums:
        density, kept = total["active"] / count, total["kept"]
        variance = total["squares"] - np.square(total["sum"]).sum() / kept
        gained = (total["zero"] - total["sae"]) / (total["zero"] - clean) if total["zero"] != clean else math.nan
        told.append({"L0": density.sum(), "explained": 1 - total["left"] / variance, "recovered": gained,
                     "clean": clean / scored, "sae": total["sae"] / scored, "zero": total["zero"] / scored,
                     "dead": (density == 0).mean(), "outliers": int(count - kept),
                     "density": np.median(density[density > 0]) if density.any() else 0})
    return told


def loss_of(model: GPT, idx: mx.array, tap=None) -> float:
    """The sum of the model's loss of tokens (B, T), without the first two of each row, since the first one's states are
    not replaced."""
    x = model.residual(idx[:, :-1], **({} if tap is None else {"tap": tap}))
    return float(np.array(rated(model, x[:, 1:], idx[:, 2:])[0]).sum(dtype=np.float64))


def report(told: list[dict], places: list[tuple[str, int]]):
    print("held-out text      L0  explained   loss: recovered   clean     sae    zero    dead  density  outliers")
    for each, (name, at) in zip(told, places, strict=True):
        print(f"{f'{name} {at}':12} {each['L0']:8.1f} {each['explained']:10.4f} {each['recovered']:17.4f} "
              f"{each['clean']:7.4f} {each['sae']:7.4f} {each['zero']:7.4f} {each['dead']:7.1%} {each['density']:8.3%}"
              f" {each['outliers']:9}")


# ---- features --------------------------------------------------------------------------------------------------------


def activations(model: GPT, d: Dictionary, rows: mx.array, wanted: list[int] | None = None) -> Iterator[np.ndarray]:
    """The features of windows (n, T), some windows at a time: (b, T, F), or of the wanted features alone. Those of the
    first token are 0."""
    per_pass = max(1, 4096 // rows.shape[1])
    columns = None if wanted is None else mx.array(wanted)
    for i in tqdm(range(0, len(rows), per_pass), unit=" passes", leave=False, disable=None, dynamic_ncols=True):
        z = encode(d, states(model, rows[i:i + per_pass], [d.reads])[d.reads])
        z = z * (mx.arange(z.shape[1]) > 0)[:, None]
        yield np.array(z if columns is None else z[..., columns])


def writing_most(model: GPT, d: Dictionary, rows: mx.array) -> tuple[np.ndarray, np.ndarray]:
    """The density of each feature, (F,), and the features in the order of what they write: of the sum of |z d|^2. Those
    that are active at more than a fiftieth of the tokens come last."""
    active, energy, n = 0, 0, rows[:, 1:].size
    for z in activations(model, d, rows):
        active, energy = active + (z > 0).sum((0, 1)), energy + np.square(z).sum((0, 1), dtype=np.float64)
    density, lengths = active / n, np.square(np.array(d.decoder)).sum(1)
    return density, np.argsort(-energy * lengths * np.where(density > 0.02, 1e-9, 1))


def best_places(z: np.ndarray, n: int) -> list[tuple[int, int]]:
    """The windows and positions of the n largest activations z (windows, T) that are over 0, each in another part of
    the text."""
    found, T = [], z.shape[1]
    for flat in np.argsort(-z, axis=None)[:200 * n]:
        row, at = divmod(int(flat), T)
        if z[row, at] <= 0 or len(found) == n:
            break
        if all(row != other or abs(at - there) > AROUND for other, there in found):
            found.append((row, at))
    return found


def raised(model: GPT, d: Dictionary, number: int, n_vocab: int) -> np.ndarray | None:
    """What a feature of activation 1 adds to the logits (V,), if nothing but the last norm's weights follows; None
    where the site is no part of the residual stream."""
    if d.writes[0] in ("heads", "hidden"):
        return None
    row = d.decoder[number] - (d.decoder[number].mean() if model.config.norm == "layer" else 0)
    logits = model.project(mx.stack([row * model.norm.weight.astype(mx.float32), mx.zeros_like(row)]))
    return np.array((logits[0] - logits[1]).astype(mx.float32))[:n_vocab]


def turned(model: GPT, d: Dictionary, number: int, ids: mx.array, n_vocab: int) -> np.ndarray:
    """The probabilities (n, V) of the token after ids (T,), with the feature's activation times each of STRENGTHS."""
    read, factor = {}, mx.array(STRENGTHS)[:, None] - 1

    def found(place, x):
        read[place] = x
        if place != d.writes:
            return x
        z = encode(d, read[d.reads])[..., number] * (mx.arange(x.shape[1]) > 0)
        return x + (factor * z)[..., None] * d.decoder[number]

    idx = mx.broadcast_to(ids, (len(STRENGTHS), len(ids)))
    logits = last_logits(model, idx, watching(model, [d.reads, d.writes], found))[:, :n_vocab]
    return np.array(mx.softmax(logits.astype(mx.float32), axis=-1))


# ---- page ------------------------------------------------------------------------------------------------------------

LOOK = """<style>
section { border-top: 1px solid var(--line); padding: .5em 0 1em; }
h2 { font-size: 1.1em; margin: .6em 0 .2em; }
.text { font: 13px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: .2em 0;
        padding-left: 4em; text-indent: -4em; }
.text b { font-weight: normal; display: inline-block; width: 4em; text-indent: 0; opacity: .7; }
.text span { border-radius: 2px; }
.text i { font-style: normal; outline: 1px solid; border-radius: 2px; }
code { background: #8882; border-radius: 3px; padding: 0 .25em; white-space: pre; }
[data-at] { font-family: ui-monospace, monospace; white-space: pre; }
.sides { display: flex; flex-wrap: wrap; gap: 0 2.5em; }
.sides > div { flex: 1 1 24em; min-width: 0; }
svg { display: block; }
input[type=range] { width: 14em; vertical-align: middle; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1em; font-size: 12px; }
dd { margin: 0; overflow-wrap: anywhere; }
dd code { white-space: pre-wrap; }
</style>"""
SCRIPT = """<script>
for (const slider of document.querySelectorAll("input[type=range]")) {
    const panels = slider.closest("section").querySelectorAll("[data-at]");
    const show = () => {
        for (const panel of panels) panel.hidden = panel.dataset.at !== slider.value;
        slider.setAttribute("aria-valuetext", panels[slider.value].dataset.name);
    };
    slider.oninput = show;
    show();
}
</script>"""


def shown(enc: Tokenizer, token: int) -> str:
    """A token as HTML, with a mark where a line ends."""
    text = enc.decode_bytes([token]).decode(errors="backslashreplace")
    return html.escape("".join("↵" if letter == "\n" else letter if letter.isprintable() else repr(letter)[1:-1]
                               for letter in text))


def bars(values: np.ndarray, name: str, low: str, high: str) -> str:
    """A histogram as SVG."""
    width, height, n = 220, 44, len(values)
    columns = "".join(
        f'<rect x="{i * width / n:.1f}" y="{height - 1 - v:.1f}" width="{width / n - 1:.1f}" height="{v + 1:.1f}" />'
        for i, v in enumerate(values / max(1, values.max()) * (height - 2)))
    return (f'<figure style="margin:.4em 0"><svg role=img aria-label="{html.escape(name)}" width={width} '
            f'height={height} fill="#d55e00">{columns}</svg><figcaption style="font-size:12px">{html.escape(name)}: '
            f"{html.escape(low)} to {html.escape(high)}</figcaption></figure>")


def tinted(enc: Tokenizer, ids: np.ndarray, z: np.ndarray, at: int, top: float) -> str:
    """A part of a text as HTML, tinted by activations, with a frame about the token at `at`."""
    spans = []
    for i, (token, value) in enumerate(zip(ids.tolist(), z.tolist(), strict=True)):
        tint = f' style="background:rgb(235 90 60/{0.75 * value / top:.2f})" title="{value:.2f}"' if value > 0 else ""
        inside = shown(enc, token)
        spans.append(f"<span{tint}>{f'<i>{inside}</i>' if i == at else inside}</span>")
    return f"<p class=text><b>{z[at]:.2f}</b>{''.join(spans)}</p>"


def section(model: GPT, enc: Tokenizer, d: Dictionary, number: int, rows: np.ndarray, z: np.ndarray) -> str:
    """What the page tells of one feature: rows (n, T) of tokens, z (n, T)."""
    on = z[z > 0]
    parts = [f"<section id=f{number}><h2>Feature {number}</h2>"]
    if not len(on):
        return f"{parts[0]}<p>It is not active in this text.</p></section>"
    effect = raised(model, d, number, enc.n_vocab)
    parts.append(f"<div class=sides><div><p>Active at {len(on) / rows[:, 1:].size:.3%} of the tokens; its largest "
                 f"activation is {on.max():.2f}.</p>")
    if effect is not None:
        order = np.argsort(effect)
        for name, chosen in ("raises", order[::-1][:8]), ("lowers", order[:8]):
            parts.append(f"<p>It {name} " + " ".join(f"<code>{shown(enc, int(i))}</code>" for i in chosen) + "</p>")
    parts.append(bars(np.histogram(on, 40, (0, on.max()))[0], "activations over 0", "0", f"{on.max():.2f}"))
    places = best_places(z, 8)
    row, at = places[0]
    p = turned(model, d, number, mx.array(rows[row, :at + 1]), enc.n_vocab)
    parts.append(f"</div><div><p><label>The token after the framed one of the first text, with this activation: "
                 f"<input type=range min=0 max={len(STRENGTHS) - 1} value={STRENGTHS.index(1)}></label></p>")
    for i, factor in enumerate(STRENGTHS):
        name = "as it is" if factor == 1 else "removed" if factor == 0 else f"times {factor:g}"
        best = "<br>".join(f"{p[i, t]:7.2%} <code>{shown(enc, int(t))}</code>" for t in np.argsort(-p[i])[:6])
        parts.append(f'<p data-at={i} data-name="{name}"{"" if factor == 1 else " hidden"}>{name}:<br>{best}</p>')
    parts.append("</div></div>")
    for row, at in places:
        a, b = max(0, at - AROUND), min(rows.shape[1], at + AROUND + 1)
        parts.append(tinted(enc, rows[row, a:b], z[row, a:b], at - a, on.max()))
    return "".join([*parts, "</section>"])


def show_features(model: GPT, enc: Tokenizer, d: Dictionary, rows: mx.array, numbers: list[int], facts: dict):
    """Write the page, and print what it tells in short."""
    density, order = writing_most(model, d, rows)
    numbers = numbers or order[:top].tolist()
    z = np.concatenate(list(activations(model, d, rows, numbers)))
    ids, alive = np.array(rows), density[density > 0]
    check_finite(z)
    name = f"{d.kind} {'transcoder' if d.reads != d.writes else 'autoencoder'}, {d.writes[0]} {d.writes[1]}"
    print(f"{name}: {len(density):,} features, L0 {density.sum():.1f}, dead {(density == 0).mean():.1%}")
    sections = []
    for i, number in enumerate(numbers):
        sections.append(section(model, enc, d, number, ids, z[..., i]))
        found = best_places(z[..., i], 3)
        print(f"feature {number:6d} | active {density[number]:8.3%} | most at " + " ".join(
            repr(enc.decode(ids[row, max(0, at - 2):at + 1].tolist())) for row, at in found))
    histogram = bars(np.histogram(np.log10(alive), 40, (-5, 0))[0],
                     "log10 of the density of the features that are not dead", "-5", "0") if len(alive) else ""
    links = " ".join(f'<a href="#f{number}">{number}</a>' for number in numbers)
    page(picture, f"Features: {name}", f"{len(density):,} features, of which {density.sum():.1f} are active at a token "
         f"on average, and {(density == 0).mean():.1%} at none of {ids[:, 1:].size:,} tokens. Texts are tinted by the "
         "activation of the feature; the token with the largest one has a frame, and its activation stands before the "
         "text.", LOOK, histogram, f"<p>Features: {links}</p>", *sections, listed(facts), SCRIPT)
    print(f"written: {picture}")


def write_direction(path: str, d: Dictionary, number: int, fingerprint: str):
    """Write a feature's direction, times the strength, for steer.py, which adds it to the stream after a layer."""
    if d.writes[0] not in ("resid", "mlp"):
        raise UserError(f"--direction: features of the site {d.writes[0]} are no directions of the residual stream "
                        "after a layer; those of resid, mlp and mlp_in are")
    at = d.writes[1] - (d.writes[0] == "resid")
    save_direction(path, d.decoder[number] * strength, at, f"feature {number}", fingerprint, os.path.basename(__file__),
                   settings)
    print("next: " + shlex.join(["python", "steer.py", checkpoint, f"--direction={path}",
                                                   "--prompt=TEXT"]))


# ---- run -------------------------------------------------------------------------------------------------------------


def layers_of(model: GPT) -> list[int]:
    """The layers of the setting."""
    if layer == "all":
        return list(range(model.config.n_layer))
    try:
        return list(dict.fromkeys(int(number) for number in layer.split(",")))
    except ValueError:
        raise UserError(f"layer={layer!r}: give a number, several as in 0,2, or all") from None


def check_settings():
    if kind not in ("topk", "batchtopk", "jumprelu"):
        raise UserError(f"kind={kind!r} is not one of topk, batchtopk, jumprelu")
    if site not in (*SITES, "mlp_in"):
        raise UserError(f"site={site!r} is not one of {', '.join(SITES)}, mlp_in")
    if min(k, tokens, batch_size, eval_tokens, dead_after, top) < 1 or features < 0 or seed < 0:
        raise UserError("k, tokens, batch_size, eval_tokens, dead_after and top must be 1 or more, features and seed 0 "
                        "or more")
    if 0 < block_size < 3:
        raise UserError("block_size must be 0, or 3 or more: the first token of a window is left out")
    if min(learning_rate, bandwidth) <= 0 or sparsity < 0:
        raise UserError("learning_rate and bandwidth must be over 0, sparsity 0 or more")
    if skip and site != "mlp_in":
        raise UserError("--skip: only a transcoder (--site=mlp_in) has a skip connection")
    unused, mode = ("feature", "top", "direction", "strength"), "in training: give --show=FILE.sae"
    if show:
        unused, mode = (*TRAIN, "strength"), "with --show"
        if direction:
            unused, mode = (*TRAIN, "block_size", "eval_tokens", "picture", "top", "seed"), "with --direction"
    for name in unused:
        if name in given:
            raise UserError(f"--{name} is not used {mode}")
    if kind != "jumprelu" and given & {"sparsity", "bandwidth"}:
        raise UserError("--sparsity and --bandwidth are used by --kind=jumprelu alone")
    if not data and not direction:
        raise UserError("give --data=FILE: a text to read, or a folder that data.py made")


if __name__ == "__main__":
    check_settings()
    stem = checkpoint.removesuffix(".safetensors")
    out = out or f"{stem}.sae"
    if not (show or out).endswith(".sae"):
        raise UserError(f"{show or out!r}: the name must end in .sae")
    if show and not direction:
        picture = picture or f"{show.removesuffix('.sae')}.html"
        picture = pictures(f"{os.path.splitext(picture)[0]}.png")[1]
    elif not show:
        picture = pictures(picture or f"{out.removesuffix('.sae')}-curves.png")[0]
    for name in (direction,) if direction else (picture,):
        check_output(name, checkpoint, data, show)
        check_folder(name)
    if direction:
        check_replaced(direction, os.path.basename(__file__))
    model, meta = load_checkpoint(checkpoint)
    if not meta.get("tokenizer") and not direction:
        raise UserError(f"{checkpoint} holds no tokenizer to encode a text with: give another checkpoint")
    fingerprint = base_fingerprint(model)
    facts = about(checkpoint, model)
    enc = Tokenizer.from_dict(meta["tokenizer"]) if meta.get("tokenizer") else None
    if show:
        d = load(show, model, fingerprint)
        try:
            numbers = [int(number) for number in feature.split(",") if number]
        except ValueError:
            raise UserError(f"feature={feature!r}: give a number, or several as in 17,40") from None
        if not all(0 <= number < len(d.encoder) for number in numbers):
            raise UserError(f"feature={feature}: {show} has the features 0 to {len(d.encoder) - 1}")
        if direction:
            if len(numbers) != 1:
                raise UserError("--direction needs one --feature=NUMBER")
            write_direction(direction, d, numbers[0], fingerprint)
        else:
            model.set_dtype(compute_dtype("auto"))
            rows = texts(enc, window_length(model.config, block_size))[1]
            show_features(model, enc, d, rows, numbers, facts)
    else:
        reads = [(site, at) for at in layers_of(model)]
        writes = [("mlp" if site == "mlp_in" else site, at) for site, at in reads]
        files = [f"{out.removesuffix('.sae')}-{at}.sae" for _, at in reads] if len(reads) > 1 else [out]
        for place, name in zip(reads, files, strict=True):
            check_site(model, place)
            check_output(name, checkpoint, data)
            check_folder(name)
            check_replaced(name, os.path.basename(__file__))
        model.set_dtype(compute_dtype("auto"))
        rows, held_out = texts(enc, window_length(model.config, block_size))
        found, curve = train(model, rows, reads, writes)
        told = measure(model, found, held_out)
        for d, name, each in zip(found, files, told, strict=True):
            save(name, d, fingerprint, script=os.path.basename(__file__), settings=settings, measured=each)
        report(told, reads)
        names = [f"{at}" for _, at in reads]
        curves(picture, curve, {label: {f"{column} {i}": f"{site} {at}" for i, at in enumerate(names)} for label, column
                                in (("explained variance", "explained"), ("L0", "L0"), ("dead share", "dead"))},
               f"{os.path.basename(out)}: {kind}, k={k}")
        print(f"written: {', '.join([*files, picture])}\nnext: " + shlex.join(
            ["python", os.path.basename(__file__), checkpoint, f"--data={data}", f"--show={files[0]}"]))
