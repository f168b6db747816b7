"""Dictionaries of features: sparse autoencoders and transcoders, as files and as functions.

    d = load("demo-2.sae", model, base_fingerprint(model))      # reads: ("mlp_in", 2), writes: ("mlp", 2)
    x = states(model, mx.array([[5, 17, 2]]), [d.reads])[d.reads]              # (B, T, C_in)
    z = encode(d, x)                                            # (B, T, F), 0 where a feature is not active
    y = decode(d, z, x)                                         # (B, T, C_out)
    logits = model(idx, tap=replacing(model, [d]))              # the model, with y in place of what it writes

A dictionary reads one site of one layer, and writes an approximation of another one, or of the same one:

    z = f(W x + b),  y = z D + c  (+ S x)      W: encoder (F, C_in), D: decoder (F, C_out), S: skip (C_out, C_in)

An autoencoder reads and writes the same site, one of `resid` (the stream that enters a layer, or n_layer: the last
one), `attn`, `mlp`, `heads` (all heads of a token, one after another) and `hidden`: see no_tap in model.py. A
transcoder (Dunefsky et al. 2024) reads `mlp_in`, what the MLP reads, after its norm, and writes `mlp`; the skip
connection is that of Paulo et al. (2025). f depends on the kind:

    relu       z = max(0, p)                              p = W x + b
    topk       z = max(0, p) where p is among the k largest of its token, else 0       (Gao et al. 2024)
    jumprelu   z = p where p > threshold, else 0; a threshold for each feature         (Rajamanoharan et al. 2024)
    batchtopk  as jumprelu, with one threshold for all features                        (Bussmann et al. 2024)

A file (.sae) is a safetensors file of the arrays `encoder`, `encoder_bias`, `decoder`, `decoder_bias`, and where they
exist `threshold` and `skip`. Its header holds the kind (`sae`), `k`, `reads`, `writes`, and `base`, the fingerprint of
the model's weights.
"""
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import blas  # noqa: F401  (before mlx)
import mlx.core as mx

from config import UserError
from model import GPT, VERSION, load_arrays, save_arrays

KINDS = "topk", "batchtopk", "jumprelu", "relu"
SITES = "resid", "attn", "mlp", "heads", "hidden"  # of autoencoders


class Dictionary(NamedTuple):
    kind: str                  # topk | batchtopk | jumprelu | relu
    k: int                     # active features of a token: as many (topk), on average, or as aimed at; 0: not known
    reads: tuple[str, int]     # site and layer
    writes: tuple[str, int]
    encoder: mx.array          # (F, C_in)
    encoder_bias: mx.array     # (F,)
    decoder: mx.array          # (F, C_out)
    decoder_bias: mx.array     # (C_out,)
    threshold: mx.array | None = None  # (F,) for jumprelu, () for batchtopk
    skip: mx.array | None = None       # (C_out, C_in)


# ---- functions -------------------------------------------------------------------------------------------------------


def kth_largest(x: mx.array, k: int) -> mx.array:
    """The k-th largest number of each row of x (N, F): (N, 1).

    The k largest numbers lie in the k groups whose maxima are largest, since each other group's numbers are at most the
    k maxima. So a partial sort of the maxima, and one of these k groups, do: on a CPU this takes a third of the time of
    mx.topk of a whole row."""
    N, F = x.shape
    size = 2 ** round(math.log2(F / k) / 2)  # of a group: F / size maxima and k size numbers are sorted
    if size > 1 and F % size == 0:
        groups = x.reshape(N, size, F // size)  # a group's numbers are far apart: maxima over rows are faster
        best = mx.argpartition(-groups.max(1), k - 1, axis=-1)[:, None, :k]
        x = mx.take_along_axis(groups, best, axis=-1).reshape(N, size * k)
    return mx.topk(x, k, axis=-1).min(-1, keepdims=True)


def active(kind: str, p: mx.array, k: int, threshold: mx.array | None) -> mx.array:
    """f of the module's docstring: (..., F) -> (..., F)."""
    if kind == "topk":
        bound = mx.stop_gradient(kth_largest(p.reshape(-1, p.shape[-1]), k)).reshape(*p.shape[:-1], 1)
        return mx.where((p >= bound) & (p > 0), p, 0)  # without max(0, p), which would be one more pass over p
    p = mx.maximum(p, 0)
    return p if kind == "relu" else mx.where(p > threshold, p, 0)


def encode(d: Dictionary, x: mx.array) -> mx.array:
    """The features (..., F) of states x (..., C_in) at the site that d reads."""
    p = mx.addmm(d.encoder_bias, x.astype(mx.float32), d.encoder.T)
    return active(d.kind, p, d.k, d.threshold)


def decode(d: Dictionary, z: mx.array, x: mx.array | None = None) -> mx.array:
    """What features (..., F) write: (..., C_out). x: the states that d read, where it has a skip connection."""
    y = z @ d.decoder + d.decoder_bias
    return y if d.skip is None else y + x.astype(mx.float32) @ d.skip.T


# ---- the model -------------------------------------------------------------------------------------------------------


def check_site(model: GPT, place: tuple[str, int]):
    """UserError if a dictionary cannot read or write this site of this layer."""
    (site, layer), config = place, model.config
    if site not in (*SITES, "mlp_in"):
        raise UserError(f"site={site!r} is not one of {', '.join(SITES)}")
    last = config.n_layer - (site != "resid")
    if not 0 <= layer <= last:
        raise UserError(f"layer={layer}: at the site {site}, the model has layers 0 to {last}")
    if site == "hidden" and config.n_expert:
        raise UserError("site=hidden: with experts, the neurons of a token are those of other experts than the next's")
    if config.mod == "topk" and site != "resid":
        raise UserError(f"site={site}: with mod=topk, routed blocks skip tokens; the site resid has all of them")


def flat(site: str, x: mx.array) -> mx.array:
    """The states of a tap as (B, T, C): heads (B, H, T, D) as (B, T, H D)."""
    return x.swapaxes(1, 2).flatten(2) if site == "heads" else x


def watching(model: GPT, wanted: Iterable[tuple[str, int]], found: Callable) -> Callable:
    """A tap that calls found(place, x) with the states x (B, T, C) of each wanted place, a (site, layer), and goes on
    with what it returns. What is returned for "mlp_in" is not used."""
    wanted, entered = set(wanted), {}

    def tap(site, layer, x):
        y = x
        if (site, layer) in wanted:
            y = found((site, layer), flat(site, x)).astype(x.dtype)
            if site == "heads":
                y = y.reshape(x.shape[0], x.shape[2], x.shape[1], -1).swapaxes(1, 2)
        if site == "resid":
            entered[layer] = y
        if site == "attn" and ("mlp_in", layer) in wanted:
            stream = entered[layer] if model.config.parallel else entered[layer] + y
            found(("mlp_in", layer), model.blocks[layer].normed("mlp_norm", stream))
        return y

    return tap


def states(model: GPT, idx: mx.array, wanted: Iterable[tuple[str, int]]) -> dict[tuple[str, int], mx.array]:
    """The states (B, T, C) of tokens (B, T) at each wanted place, from one forward pass."""
    seen = {}

    def found(place, x):
        seen[place] = x
        return x

    model.residual(idx, tap=watching(model, wanted, found))
    return seen


def replacing(model: GPT, dictionaries: Sequence[Dictionary], zero: bool = False, start: int = 1) -> Callable:
    """A tap that puts the outputs of dictionaries, or zeros, in place of what the model writes, from position `start`
    on: dictionaries are trained without the first token. Each reads the states that the earlier ones left."""
    of, read = {d.writes: d for d in dictionaries}, {}

    def found(place, x):
        read[place] = x
        if place not in of:
            return x
        d = of[place]
        y = mx.zeros_like(x) if zero else decode(d, encode(d, read[d.reads]), read[d.reads])
        return mx.where(mx.arange(x.shape[1])[:, None] < start, x, y)

    return watching(model, {place for d in dictionaries for place in (d.reads, d.writes)}, found)


# ---- files -----------------------------------------------------------------------------------------------------------


def save(path: str, d: Dictionary, fingerprint: str, **header):
    """Write a dictionary for the model of this fingerprint, from lora.base_fingerprint()."""
    names = "encoder", "encoder_bias", "decoder", "decoder_bias", "threshold", "skip"
    arrays = {name: getattr(d, name).astype(mx.float32) for name in names if getattr(d, name) is not None}
    save_arrays(path, arrays, {"version": VERSION, "sae": d.kind, "k": d.k, "reads": d.reads, "writes": d.writes,
                               "base": fingerprint, **header})


def load(path: str, model: GPT, fingerprint: str = "") -> Dictionary:
    """Read a dictionary. UserError if the file is none, or was made for another checkpoint."""
    if not os.path.exists(path):
        raise UserError(f"no dictionary at {path}: train one with `python sae.py`, or check the name")
    arrays, header = load_arrays(path)
    kind = header.get("sae")
    if kind not in KINDS:
        raise UserError(f"{path} is no dictionary of features that this code knows: train one with `python sae.py`")
    if fingerprint and header.get("base") != fingerprint:
        raise UserError(f"{path} was made for another checkpoint: train a dictionary for this one")
    try:
        d = Dictionary(kind, int(header["k"]), tuple(header["reads"]), tuple(header["writes"]), **arrays)
        (F, C_in), C_out = d.encoder.shape, d.decoder.shape[1]
        shapes = {"encoder": (F, C_in), "encoder_bias": (F,), "decoder": (F, C_out), "decoder_bias": (C_out,),
                  "skip": (C_out, C_in), "threshold": (F,) if kind == "jumprelu" else ()}
        if any(array.shape != shapes[name] for name, array in arrays.items()) or (
                d.threshold is None and kind in ("jumprelu", "batchtopk")) or kind == "topk" and not 1 <= d.k <= F:
            raise ValueError("shapes")
        for place in (d.reads, d.writes):
            check_site(model, place)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise UserError(f"{path} was made for another checkpoint: {error}") from None
        raise UserError(f"{path} lacks a part of a dictionary, or has others: train it again") from error
    return d


if __name__ == "__main__":
    print("sparse.py has no command of its own: run sae.py, which uses it", file=sys.stderr)
    sys.exit(2)
