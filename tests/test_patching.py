"""patching.py: properties of patches and ablations in every variant; each cell against a pass of its own; a model with
a known circuit; bad input."""
import json
import re
from functools import partial

import blas  # noqa: F401  (before mlx)
import conftest
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import ROOT
from test_gptq import FLAVOURS, checkpoint

import patching
from config import UserError
from inside import unpack
from model import GPT, GPTConfig, save_checkpoint
from patching import ablate, swap
from tokenizer import byte_tokenizer

RNG = np.random.default_rng(0)
DONOR, RECIPIENT = (mx.array(RNG.integers(0, 64, 12)) for _ in range(2))


def small(n_layer=3, **settings):
    sizes = dict(block_size=32, vocab_size=64, n_head=2, n_embd=64, n_layer=n_layer)
    model = GPT(GPTConfig(**sizes | settings), seed=1).eval()
    for block in model.blocks:
        if "predictor" in block:  # by default no token is chosen
            block.predictor.weight, block.threshold = mx.random.normal((1, 64), key=mx.random.key(2)), mx.array([0.0])
    return model


def in_place(model, layer, stream, x, site="mlp"):
    """The row of each position in an array x (T, C) that a block taps, and x by position. With mod=topk, the rows of
    chosen tokens come first; the others count as 0, and at site mid they are the stream."""
    block = model.blocks[layer]
    if "predictor" not in block or model.config.yoco and site in ("k", "v") and layer == model.config.n_layer // 2:
        return np.arange(x.shape[-2]), x
    chosen = np.array((stream @ block.predictor.weight.T)[:, 0] > block.threshold)
    row = np.empty(len(x), int)
    row[np.concatenate([np.flatnonzero(chosen), np.flatnonzero(~chosen)])] = np.arange(len(x))
    return row, mx.where(mx.array(chosen)[:, None], x[mx.array(row)], stream if site == "mid" else 0)


def one_cell(model, donor, recipient, site, layers, i, j, head=None):
    """The recipient's last logits with the donor's state in one cell, by a forward pass for this cell alone. i, j: a
    position, or a slice."""
    states, own = {}, {}

    def record(name, layer, x):
        states[name, layer] = x
        return x

    def put(name, layer, x):
        own[name] = x[0]
        if name == site and layer in layers:
            mine, theirs = (y if head is None else y[head] for y in (x[0], states[name, layer][0]))
            row = np.arange(len(mine))
            if site != "resid":
                row = in_place(model, layer, own["resid"], mine, site)[0]
                theirs = in_place(model, layer, states["resid", layer][0], theirs, site)[1]
            x = np.array(x)
            (x[0] if head is None else x[0, head])[row[j]] = np.array(theirs)[i]
            x = mx.array(x)
        return x

    model(donor[None], tap=record)
    return model(recipient[None], tap=put)[0, -1]


# ---- patching --------------------------------------------------------------------------------------------------------


def refused(site, settings):
    return site == "hidden" and "n_expert" in settings or site == "mid" and "parallel" in settings


def heads_at(model, site):
    seen = {}
    model(DONOR[None], tap=lambda name, layer, x: seen.setdefault(name, x))
    return seen[site].shape[1]


@pytest.mark.parametrize("settings", [*FLAVOURS, dict(mod="topk", mod_every=1), dict(parallel=True),
                                      dict(mod="topk", mod_every=1, yoco=True), dict(n_kv_head=1)], ids=str)
def test_swap(settings):
    """A donor that is the recipient changes nothing; each cell equals a pass of its own; with all positions patched at
    once, the logits are the donor's."""
    model = small(4, **settings)
    own, theirs = model(RECIPIENT[None])[0], model(DONOR[None])[0]
    tolerance = 1e-4 * mx.abs(own).max()
    for site in patching.SITES:
        if refused(site, settings):
            with pytest.raises(UserError, match=f"site={site}"):
                swap(model, DONOR, RECIPIENT, site)
            continue
        n, few = 3 if settings.get("yoco") and site in ("k", "v") else 4, [(0, 0), (5, 5), (11, 11)]
        heads = range(heads_at(model, site)) if site in patching.BY_HEAD else [None]
        same = swap(model, RECIPIENT, RECIPIENT, site, few[:2])
        assert same.shape == (n, len(heads), 2, 64) if heads != [None] else (4, 2, 64)
        assert mx.abs(same - own[-1]).max() < tolerance
        if site == "resid":
            every = swap(model, DONOR, RECIPIENT)
            assert mx.allclose(every[:, 5], swap(model, DONOR, RECIPIENT, pairs=few)[:, 1], atol=1e-5)
        found = swap(model, DONOR, RECIPIENT, site, few, 4).reshape(n, len(heads), 3, 64)
        for layer, head, i in ((0, heads[0], 2), (1, heads[-1], 0), (n - 1, heads[-1], 1)):
            alone = one_cell(model, DONOR, RECIPIENT, site, [layer], few[i][0], few[i][0], head)
            assert mx.abs(found[layer, head or 0, i] - alone).max() < tolerance
        whole = patching.replaced(model, RECIPIENT, patching.record(model, DONOR[None], [site]), site, None, None)
        alone = one_cell(model, DONOR, RECIPIENT, site, [1], slice(None), slice(None), heads[-1])
        assert mx.abs(whole.reshape(n, len(heads), 64)[1, -1] - alone).max() < tolerance
    # some keys and values stay the recipient's: in YOCO's second half, value residuals after layer 0, value embeddings
    layers = 3 if settings.get("yoco") else 1 if settings.get("value_residual") else 0 if settings.get(
        "value_embeds") else 4
    for layer in range(layers):
        states = {}
        model(DONOR[None], tap=lambda name, at, x, states=states: states.setdefault((name, at), x))
        whole = model(RECIPIENT[None], tap=lambda name, at, x, layer=layer, states=states: (
            states[name, at] if (name, at) == ("resid", layer) else x))[0]
        assert mx.abs(whole - theirs).max() < tolerance


@pytest.mark.parametrize("settings", FLAVOURS, ids=str)
def test_the_past_stays(settings):
    """A patch at position p changes the output at p, and no output before p."""
    model = small(4, **settings)
    donor, own = patching.record(model, DONOR[None]), model(RECIPIENT[None])[0]
    for p in (0, 4, 11):
        def tap(name, layer, x, p=p):
            if (name, layer) == ("resid", 1):
                x = mx.array(x)
                x[0, p] = donor["resid", 1][0, p]
            return x

        found = model(RECIPIENT[None], tap=tap)[0]
        assert mx.allclose(found[:p], own[:p], atol=1e-5) and not mx.allclose(found[p], own[p], atol=1e-3)


@pytest.mark.parametrize("settings", FLAVOURS, ids=str)
def test_with_a_cache(settings):
    """A patch gives equal logits in a pass that reads the prompt in pieces, with a cache."""
    model = small(4, **settings)
    donor = patching.record(model, DONOR[None])
    found = swap(model, DONOR, RECIPIENT)
    for layer, p in ((0, 5), (1, 5), (2, 3)):
        cache = model.make_cache()
        for begin, end in ((0, 3), (3, 5), (5, 6), (6, 12)):
            def tap(name, at, x, layer=layer, p=p, begin=begin, end=end):
                if (name, at) == ("resid", layer) and begin <= p < end:
                    x = mx.array(x)
                    x[0, p - begin] = donor["resid", layer][0, p]
                return x

            last = model(RECIPIENT[None, begin:end], cache=cache, tap=tap)[0, -1]
        assert mx.allclose(found[layer, p], last, atol=1e-3), (layer, p)


def test_pairs():
    """Pairs of positions, for prompts of different lengths."""
    model, donor = small(), DONOR[:7]
    with pytest.raises(UserError, match="prompts have 7 and 12 tokens"):
        swap(model, donor, RECIPIENT)
    found = swap(model, donor, RECIPIENT, "attn", [(6, 11), (2, 9)])
    assert found.shape == (3, 2, 64)
    for n, (i, j) in enumerate([(6, 11), (2, 9)]):
        assert mx.allclose(found[2, n], one_cell(model, donor, RECIPIENT, "attn", [2], i, j), atol=1e-4)
    for bad in ((7, 0), (0, 12), (-1, 0)):
        with pytest.raises(UserError, match="have positions 0 to 6 and 0 to 11"):
            swap(model, donor, RECIPIENT, "resid", [bad])


@pytest.mark.parametrize("site", patching.SITES)
@pytest.mark.parametrize("source", ["zero", "mean"])
@pytest.mark.parametrize("settings", [dict(), dict(mod="topk", mod_every=1)], ids=str)
def test_zero_and_mean(settings, site, source):
    """A state is replaced by zeros, or by the mean over the tokens that the block computes."""
    model, stream = small(**settings), []
    model(RECIPIENT[None], tap=lambda name, layer, x: stream.append(x[0]) or x if name == "resid" else x)
    found = patching.replaced(model, RECIPIENT, source, site, [*range(12)], [*range(12)])
    head = 1 if site in patching.BY_HEAD else None
    for layer in range(3):
        for p in (0, 7, 11):
            def tap(name, at, x, layer=layer, p=p):
                if (name, at) == (site, layer):
                    mine, rows, n = x[0] if head is None else x[0, head], np.arange(12), 12
                    if site != "resid":
                        rows, placed = in_place(model, layer, stream[layer], mine)
                        n = sum(bool(each.any()) for each in placed)
                    by = mine[:n].mean(0) if source == "mean" else mx.zeros_like(mine[0])
                    x = np.array(x)
                    (x[0] if head is None else x[0, head])[rows[p]] = np.array(by)
                    x = mx.array(x)
                return x

            cell = found[layer, p] if head is None else found[layer, head, p]
            assert mx.allclose(cell, model(RECIPIENT[None], tap=tap)[0, -1], atol=1e-4)


@pytest.mark.parametrize("site, window", [("resid", 1), ("mlp", 1), ("attn", 2), ("mlp", 3)])
@pytest.mark.parametrize("settings", [dict(), dict(yoco=True, pos="learned"), dict(n_expert=3)], ids=str)
def test_trace(site, window, settings):
    """Each cell equals a pass of its own; noise of 0 changes nothing."""
    model, subject = small(4, **settings), [2, 3]
    noise = mx.array(RNG.standard_normal((3, 2, 64)).astype(np.float32))
    corrupted, found = patching.trace(model, RECIPIENT, subject, noise, site, window, batch_size=8)
    assert found.shape == (4, 12, 3, 64)
    clean = patching.record(model, RECIPIENT[None])

    def noisy(draw, put=lambda name, layer, x: x):
        def tap(name, layer, x):
            if (name, layer) == ("resid", 0):
                x = x.at[:, mx.array(subject)].add(noise[draw])
            return put(name, layer, x)
        return model(RECIPIENT[None], tap=tap)[0, -1]

    for draw in range(3):
        assert mx.allclose(corrupted[draw], noisy(draw), atol=1e-4)
        for layer, p in ((0, 2), (1, 3), (3, 11), (2, 5)):
            low = layer - (window - 1) // 2

            def put(name, at, x, low=low, p=p):
                if name == site and low <= at < low + window:
                    x = mx.array(x)
                    x[0, p] = clean[name, at][0, p]
                return x

            assert mx.allclose(found[layer, p, draw], noisy(draw, put), atol=1e-4), (layer, p)
    low, two = patching.trace(model, RECIPIENT, subject, noise, site, window, batch_size=2)  # fewer rows than draws
    assert mx.allclose(low, corrupted, atol=1e-4) and mx.allclose(two, found, atol=1e-4)
    still, same = patching.trace(model, RECIPIENT, subject, mx.zeros((1, 2, 64)), site, window)
    assert mx.abs(same - model(RECIPIENT[None])[0, -1]).max() < 1e-3 and mx.abs(still - same[0, 0]).max() < 1e-3


def copying():
    """A model that only copies, in block 1's attention, the token at position 2 to the last position."""
    config = GPTConfig(block_size=8, vocab_size=16, n_layer=3, n_head=1, n_embd=64, pos="learned", qk_norm=False,
                       norm="rms", tie=False)
    model = GPT(config, seed=1).eval()
    for block in model.blocks:
        block.attn.out.weight, block.mlp.down.weight = mx.zeros((64, 64)), mx.zeros((64, 256))
    embed, place, head = np.zeros((16, 64)), np.zeros((8, 64)), np.zeros((16, 64))
    embed[np.arange(16), np.arange(16)] = 1          # dimensions 0 ... 15: the token
    place[np.arange(8), 16 + np.arange(8)] = 3       # 16 ... 23: the position
    head[np.arange(16), 32 + np.arange(16)] = 1      # 32 ... 47: the answer
    q, k, v, out = (np.zeros((64, 64)) for _ in range(4))
    q[0, 16 + 5] = k[0, 16 + 2] = 10                 # position 5 attends to position 2
    v[np.arange(16), np.arange(16)] = out[32 + np.arange(16), np.arange(16)] = 1
    model.embed.weight, model.pos_embed.weight, model.head.weight = (mx.array(x.astype(np.float32))
                                                                     for x in (embed, place, head))
    for name, x in dict(q=q, k=k, v=v, out=out).items():
        model.blocks[1].attn[name].weight = mx.array(x.astype(np.float32))
    return model


def induction():
    """A model with an induction circuit: head 0.0 writes each token's previous one, and head 1.0 looks for the token
    whose previous one is the last token, and copies it to the answer. Other parts write what nothing reads."""
    config = GPTConfig(block_size=8, vocab_size=16, n_layer=3, n_head=2, n_embd=96, pos="learned", qk_norm=False,
                       norm="rms", tie=False, ffn_dim=16)
    model, rng, token = GPT(config, seed=1).eval(), np.random.default_rng(0), np.arange(16)
    embed, place, head = np.zeros((16, 96)), np.zeros((8, 96)), np.zeros((16, 96))
    embed[token, token] = 1                       # dimensions 0 ... 15: the token; 16 ... 31: the one before it
    place[np.arange(8), 32 + np.arange(8)] = 1    # 32 ... 39: the position
    head[token, 48 + token] = 1                   # 48 ... 63: the answer; from 64 on: what nothing reads
    model.embed.weight, model.pos_embed.weight, model.head.weight = (mx.array(x.astype(np.float32))
                                                                     for x in (embed, place, head))
    for layer, block in enumerate(model.blocks):
        q, k, v, out = (rng.standard_normal((96, 96)) * 0.1 for _ in range(4))
        out[:64] = 0
        if layer < 2:
            for x in (q, k, v):
                x[:48] = 0
            out[:, :48] = 0
        if layer == 0:
            q[np.arange(8), 32 + np.arange(8)] = k[np.arange(1, 8), 32 + np.arange(7)] = 5
            v[token, token] = out[16 + token, token] = 1
        if layer == 1:
            q[token, token] = k[token, 16 + token] = 5
            v[token, token] = out[48 + token, token] = 1
        down = rng.standard_normal((96, 16)) * 0.1
        down[:64] = 0
        for module, x in ((block.attn.q, q), (block.attn.k, k), (block.attn.v, v), (block.attn.out, out),
                          (block.mlp.down, down)):
            module.weight = mx.array(x.astype(np.float32))
    return model


CIRCUIT = [0, 1, 2, 3, 4, 1], [0, 5, 2, 3, 4, 1]  # after the second 1, 2 should follow; without the first one, nothing


@pytest.mark.parametrize("site, where", [("heads", {(0, 0, 2), (1, 0, 5)}), ("k", {(1, 0, 2)}), ("q", set()),
                                         ("v", {(0, 0, 2)})])
def test_the_induction_circuit_is_found(site, where):
    """Head 0.0's output and value at the token after the first 1, and there head 1.0's key, and its output at the last
    position: each brings back the answer, and no other head does. (The value is of the token before, at position 1.)"""
    model, (donor, recipient) = induction(), map(mx.array, CIRCUIT)
    clean, corrupt = model(donor[None])[0, -1], model(recipient[None])[0, -1]
    assert clean.argmax() == 2 and clean[2] > corrupt[2] + 0.3
    found = swap(model, donor, recipient, site)[..., 2]
    expected = np.zeros((3, 2, 6))
    for layer, head, position in where:
        expected[layer, head, position - (site == "v")] = 1
    np.testing.assert_allclose((found - corrupt[2]) / (clean[2] - corrupt[2]), expected, atol=0.1)


def test_a_known_circuit_is_found():
    """Before block 1 the state at position 2 decides the answer, after it the state at the last position."""
    model, donor, recipient = copying(), mx.array([1, 2, 3, 4, 5, 6]), mx.array([1, 2, 9, 4, 5, 6])
    clean, corrupt = model(donor[None])[0, -1], model(recipient[None])[0, -1]
    assert clean.argmax() == 3 and corrupt.argmax() == 9

    def effect(site):
        found = swap(model, donor, recipient, site)[..., 3]
        return np.array((found - corrupt[3]) / (clean[3] - corrupt[3])).round(3)

    expected = np.zeros((3, 6))
    expected[:2, 2] = expected[2, 5] = 1
    np.testing.assert_allclose(effect("resid"), expected, atol=0.02)
    expected = np.zeros((3, 6))
    expected[1, 5] = 1
    np.testing.assert_allclose(effect("attn"), expected, atol=0.02)
    np.testing.assert_allclose(effect("mlp"), 0, atol=0.02)
    for layer in range(3):
        gone = ablate(model, donor[None], "attn", layer)[0, -1]
        assert (gone.argmax() == 3) == (layer != 1)


# ---- ablation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", FLAVOURS, ids=str)
def test_ablation(settings):
    """With all blocks skipped, the logits are those of the embeddings; with one skipped, those of a model without it;
    zeroing a block is skipping it."""
    model, idx = small(4, **settings), mx.stack([DONOR, RECIPIENT])
    start = {}
    model(idx, tap=lambda name, layer, x: start.setdefault((name, layer), x))
    assert mx.allclose(ablate(model, idx, "block", range(4), "skip"), model.unembed(start["resid", 0]), atol=1e-5)
    both = ablate(model, idx, "block", 2, "skip")
    assert mx.array_equal(both, ablate(model, idx, "block", 2, "zero"))
    blocks, skipped = model.blocks, type(model.blocks[2]).__call__

    class Nothing(type(blocks[2])):
        def __call__(self, x, *_, **__):
            return x

    blocks[2].__class__ = Nothing
    without = model(idx)
    blocks[2].__class__ = next(c for c in Nothing.__mro__[1:] if c.__call__ is skipped)
    assert mx.allclose(both, without, atol=1e-5) and not mx.allclose(without, model(idx), atol=1e-3)
    nothing = (mx.zeros_like(blocks[2].attn.out.weight), mx.zeros_like(blocks[2].attn.out.get("bias", mx.zeros(1))))
    kept = blocks[2].attn.out.weight, blocks[2].attn.out.get("bias")
    blocks[2].attn.out.weight = nothing[0]
    if kept[1] is not None:
        blocks[2].attn.out.bias = nothing[1]
    without = model(idx)
    blocks[2].attn.out.weight = kept[0]
    if kept[1] is not None:
        blocks[2].attn.out.bias = kept[1]
    assert mx.allclose(ablate(model, idx, "attn", 2), without, atol=1e-5)


def test_means_of_chosen_tokens():
    """With mod=topk, the mean is over the tokens that the block computes."""
    model, idx = small(mod="topk", mod_every=1), mx.stack([DONOR, RECIPIENT])
    states = {}
    model(idx, tap=lambda name, layer, x: states.setdefault((name, layer), x))
    chosen = np.array(states["resid", 1] @ model.blocks[1].predictor.weight.T)[..., 0] > 0
    counts = chosen.sum(1)
    assert 0 < min(counts) and max(counts) < 12 and counts[0] != counts[1]
    for site, name in (("attn", "attn"), ("mlp", "mlp"), ("head", "heads")):
        x = states[name, 1] if site == "head" else states[name, 1][:, None]  # (B, H, T, C), the chosen ones first
        mean = mx.concatenate([each[:, :n] for each, n in zip(x, counts.tolist(), strict=True)], 1).mean(1)

        def by_hand(at, layer, x, name=name, mean=mean):
            if (at, layer) != (name, 1):
                return x
            by = mx.broadcast_to(mean[-1], (2, 12, mean.shape[1]))
            return mx.stack([x[:, 0], by], axis=1) if name == "heads" else by

        found = ablate(model, idx, site, 1, "mean", head=1)
        assert mx.allclose(found, model(idx, tap=by_hand), atol=1e-5) and not mx.allclose(found, model(idx), atol=1e-4)


def test_heads_and_means():
    model, idx = small(), mx.stack([DONOR, RECIPIENT])
    out = model.blocks[1].attn.out
    weight, out.weight = out.weight, mx.where(mx.arange(64) // 32 == 1, 0, out.weight)  # columns of head 1
    without = model(idx)
    out.weight = weight
    assert mx.allclose(ablate(model, idx, "head", 1, "zero", head=1), without, atol=1e-5)
    states = {}
    model(idx, tap=lambda name, layer, x: states.setdefault((name, layer), x))
    mean = {site: states[site, 1].mean((0, 1)) for site in ("attn", "mlp")}
    heads = states["heads", 1].mean((0, 2))
    change = (states["resid", 2] - states["resid", 1]).mean((0, 1))

    def by_hand(site):
        def tap(name, layer, x):
            if layer == 1 and name == site:
                return mx.broadcast_to(mean[site], x.shape)
            if (name, layer, site) == ("heads", 1, "head"):
                return mx.stack([x[:, 0], mx.broadcast_to(heads[1], x[:, 1].shape)], axis=1)
            return states["resid", 1] + change if (name, layer, site) == ("resid", 2, "block") else x
        return model(idx, tap=tap)

    for site in ("attn", "mlp", "head", "block"):
        found = ablate(model, idx, site, 1, "mean", head=1)
        assert mx.allclose(found, by_hand(site), atol=1e-5) and not mx.allclose(found, model(idx), atol=1e-4)
    for bad in (dict(site="head", layer=3, head=0), dict(site="mlp", layer=[0, -1])):
        with pytest.raises(UserError, match="the model has 0 to 2"):
            ablate(model, idx, **bad)
    for head in (2, -1, None):
        with pytest.raises(UserError, match="the layer has 0 to 1"):
            ablate(model, idx, "head", 1, head=head)
    for bad in (dict(site="neuron"), dict(site="mlp", how="noise")):
        with pytest.raises(UserError, match="is not one of"):
            ablate(model, idx, layer=1, **bad)


# ---- files -----------------------------------------------------------------------------------------------------------


def row(output: str, name: str) -> np.ndarray:
    """The numbers of a table's row, whose columns come in several tables one below the other."""
    parts = [line.removeprefix(name).split() for line in output.splitlines() if line.startswith(f"{name} ")]
    return np.array(sum(parts, []), float)


run = partial(conftest.run, "patching.py")


CLEAN, CORRUPT, TARGET = "--clean=the cat sat", "--corrupt=the dog sat", "--target= "


@pytest.mark.parametrize("arguments", [
    [CLEAN, CORRUPT, TARGET], [CLEAN, CORRUPT, TARGET, "--foil=x", "--site=mlp"],
    [CLEAN, "--corrupt=a dog sat", TARGET, "--pairs=5:3, 6:4"], ["--mode=zero", CLEAN, TARGET],
    ["--mode=mean", "--site=attn", CLEAN, TARGET, "--foil=x"],
    ["--mode=trace", CLEAN, "--subject=cat", TARGET, "--window=2", "--draws=3"],
    ["--mode=ablate", CLEAN, TARGET, "--how=mean"], ["--mode=ablate", "--data={readme}", "--samples=2", CLEAN, TARGET],
], ids=str)
def test_scripts(arguments, tmp_path):
    """Each mode prints a table that fits 80 columns, and draws a picture and a page."""
    path, model = checkpoint(tmp_path)
    done = run(path, *(argument.format(readme=ROOT / "README.md") for argument in arguments))
    mode = next((argument[7:] for argument in arguments if argument.startswith("--mode")), "swap")
    site = next((argument[7:] for argument in arguments if argument.startswith("--site")), "resid")
    names = {"resid": ["after layer 0", "embedding"], "attn": ["layer 1's attention", "layer 0's attention"],
             "mlp": ["layer 1's MLP", "layer 0's MLP"]}[site] if mode != "ablate" else ["layer 1", "layer 0"]
    columns = 2 if "--pairs=5:3, 6:4" in arguments else 12 if mode != "ablate" else 5
    columns *= 2 if "--data={readme}" in arguments else 1
    assert [len(row(done.stdout, name)) for name in names] == [columns] * 2
    assert re.findall(f"^{names[0]} |^{names[1]} ", done.stdout, re.M)[:2] == [f"{name} " for name in names]
    assert all(len(line) <= 80 for line in done.stdout.splitlines() if not line.startswith("drawn"))
    name = f"ckpt-{mode}" if site == "resid" else f"ckpt-{mode}-{site}"
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "http" not in (tmp_path / f"{name}.html").read_text()
    if "--pairs=5:3, 6:4" in arguments:  # the donor's positions first, and its tokens
        assert done.stdout.splitlines()[-4].split() == ["residual", "stream", "5:3", "c→d", "6:4", "a→o"]
    if mode == "trace":
        assert "subject at 5, 6, 7;" in done.stdout


def test_figures(tmp_path):
    """Effects and changes of the loss in the tables equal those computed here from the logits."""
    path, model = checkpoint(tmp_path)
    model.eval()

    def ids(text):
        return mx.array([256, *text.encode()])

    def log_p(logits):
        return float((logits - mx.logsumexp(logits))[32])

    done = run(path, CLEAN, CORRUPT, TARGET)
    assert re.findall("^(embedding|after layer .) ", done.stdout, re.M)[:2] == ["after layer 0", "embedding"]
    line = row(done.stdout, "after layer 0")
    found = swap(model, ids("the cat sat"), ids("the dog sat"))[1]
    clean, corrupt = (log_p(model(ids(f"the {animal} sat")[None])[0, -1]) for animal in ("cat", "dog"))
    expected = [(log_p(each) - corrupt) / (clean - corrupt) for each in found]
    np.testing.assert_allclose(line, expected, atol=2e-3)
    assert f"clean {clean:.4f}, corrupt {corrupt:.4f}" in done.stdout
    exchanged = run(path, "--clean=the dog sat", "--corrupt=the cat sat", TARGET, f"--picture={tmp_path}/exchanged.png")
    said = ["no answer that could come back" in each.stdout for each in (done, exchanged)]
    assert said == [clean < corrupt, corrupt < clean]
    idx = ids("the cat sat")[None]
    done = run(path, "--mode=mean", CLEAN, TARGET, "--foil=x")
    line = row(done.stdout, "after layer 0")
    found = patching.replaced(model, idx[0], "mean", "resid", [*range(12)], [*range(12)])[1]
    np.testing.assert_allclose(line, (found - model(idx)[0, -1])[:, 32] -
                               (found - model(idx)[0, -1])[:, ord("x")], atol=2e-3)
    done = run(path, "--mode=trace", CLEAN, TARGET, "--subject=cat", "--draws=3", "--noise=2", "--window=2")
    line = row(done.stdout, "after layer 0")
    noise = np.random.default_rng(1337).standard_normal((3, 3, 64)) * 2 * np.array(model.embed(idx)).std()
    low, found = patching.trace(model, idx[0], [5, 6, 7], mx.array(noise.astype(np.float32)), "resid", 2)
    expected = [np.mean([np.exp(log_p(each)) for each in cell]) - np.mean([np.exp(log_p(each)) for each in low])
                for cell in found[1]]
    np.testing.assert_allclose(line, expected, rtol=0.02, atol=2e-6)
    done = run(path, "--mode=ablate", CLEAN, TARGET)
    line = row(done.stdout, "layer 1")
    expected = [log_p(ablate(model, idx, site, 1, head=head)[0, -1]) - clean for site, head in
                (("attn", None), ("mlp", None), ("block", None), ("head", 0), ("head", 1))]
    np.testing.assert_allclose(line, expected, atol=1e-3)
    text, whole = (ROOT / "ruff.toml").read_bytes() * 9, []
    (tmp_path / "text.txt").write_bytes(text)
    done = run(path, "--mode=ablate", f"--data={tmp_path / 'text.txt'}", "--samples=3", "--batch_size=16")
    rows = patching.windows(np.frombuffer(text, np.uint8), 3, 33, 1337).astype(mx.int32)
    for tap in (lambda name, layer, x: x, patching.ablation(model, "mlp", 0)):
        whole.append(model.loss(rows[:, :-1], rows[:, 1:], tap=tap).item())
    assert f"loss {whole[0]:.4f} before" in done.stdout
    assert row(done.stdout, "layer 0")[1] == pytest.approx(whole[1] - whole[0], abs=1e-3)


@pytest.mark.parametrize("arguments, says", [
    ([], "give --clean"), ([CLEAN, TARGET], "give --corrupt"), ([CLEAN, CORRUPT], "give --target"),
    ([CLEAN, "--corrupt=a dog", TARGET], "say which positions correspond"),
    ([CLEAN, CORRUPT, TARGET, "--pairs=5:99"], "pair 5:99: the prompts have positions 0 to 11"),
    ([CLEAN, CORRUPT, TARGET, "--pairs=5"], "write pairs of positions"),
    ([CLEAN, "--corrupt=" + "x" * 40, TARGET], "--corrupt: the prompt has 41 tokens"),
    ([CLEAN, "--mode=patch"], "mode='patch'"), ([CLEAN, CORRUPT, TARGET, "--foil= "], "the same token"),
    ([CLEAN, CORRUPT, TARGET, "--site=head"], "site='head'"), ([CLEAN, "--corrupt=the cat sat", TARGET], "no effect"),
    (["--mode=trace", CLEAN, TARGET, "--subject=dog"], "is not in the prompt"),
    (["--mode=trace", CLEAN, TARGET], "give --subject"), (["--mode=trace", "--noise=-1"], "noise from 0 to 1e6"),
    (["--mode=trace", "--noise=1e300"], "noise from 0 to 1e6"), (["--mode=trace", "--seed=-1"], "seed=-1"),
    (["--mode=ablate"], "there is nothing to measure on"), ([CLEAN, "--picture=none/x.png"], "there is no folder none"),
    (["--mode=ablate", CLEAN, TARGET, "--how=noise"], "how='noise'"), ([CLEAN, "--batch_size=0"], "batch_size"),
])
def test_bad_input(arguments, says, tmp_path):
    path, _ = checkpoint(tmp_path)
    assert says in run(path, *arguments, status=2).stderr
    assert [file.name for file in tmp_path.iterdir()] == ["ckpt.safetensors"]


def test_the_second_picture_replaces_nothing(tmp_path):
    """With a text and a prompt, --mode=ablate draws two pictures and two pages."""
    path, _ = checkpoint(tmp_path)
    for name in ("ckpt-ablate-prompt.png", "ckpt-ablate-prompt.html", "ckpt-ablate.html"):
        (tmp_path / name).write_text("mine")
        done = run(path, "--mode=ablate", CLEAN, TARGET, f"--data={ROOT / 'README.md'}", status=2)
        assert f"{name} exists, and was not drawn here" in done.stderr
        assert (tmp_path / name).read_text() == "mine" and len([*tmp_path.iterdir()]) == 2
        (tmp_path / name).unlink()


def test_docstring(tmp_path):
    checkpoint(tmp_path, n_layer=4)
    logits = conftest.docstring_use(patching, tmp_path)["logits"]
    assert logits.shape == (1, 3, 320)


@pytest.mark.parametrize("arguments", [[CLEAN, CORRUPT, TARGET], ["--mode=ablate", CLEAN, TARGET]], ids=str)
def test_weights_that_are_not_finite(arguments, tmp_path):
    path, model = checkpoint(tmp_path)
    model.blocks[1].mlp.up.weight = model.blocks[1].mlp.up.weight * float("nan")
    save_checkpoint(str(path), model, {"tokenizer": byte_tokenizer().to_dict()})
    assert "are not finite" in run(path, *arguments, status=2).stderr
    assert [file.name for file in tmp_path.iterdir()] == ["ckpt.safetensors"]


def test_the_subject():
    """The tokens of the last occurrence; the token that precedes a text is not part of it."""
    enc, text = byte_tokenizer(), "a cat, a cät"
    ids = [enc.bos, *enc.encode(text).tolist()]
    for part, at in (("cat", [3, 4, 5]), ("a ", [8, 9]), ("ä", [11, 12]), ("a cat", [1, 2, 3, 4, 5])):
        assert patching.positions_of(enc, ids, part) == at
    with pytest.raises(UserError, match="is not in the prompt"):
        patching.positions_of(enc, ids, "endoftext")


def test_a_longer_target(tmp_path):
    path, _ = checkpoint(tmp_path)
    assert "target 'mat' is 3 tokens: the first, 'm', is used" in run(path, CLEAN, CORRUPT, "--target=mat").stdout


# ---- prompt sets -----------------------------------------------------------------------------------------------------

SET = [("the cat sat", "the dog sat", " ", "x"), ("the dog ran", "the cow ran", "a", "b"),
       ("the pig was", "the owl was", "c", "d"), ("the cat sat", "the dog sat", "x", " ")]


def write_set(folder, rows):
    names = "clean", "corrupt", "target", "foil", "subject"
    (folder / "set.jsonl").write_text("".join(json.dumps(dict(zip(names, each, strict=False))) + "\n" for each in rows))
    return f"--prompts={folder / 'set.jsonl'}"


def ids_of(text, bos=True):
    return mx.array([*[256] * bos, *text.encode()])


def difference(logits, target, foil):
    return np.array(logits[..., ord(target)] - logits[..., ord(foil)], np.float64)


def test_a_set_of_prompts(tmp_path):
    """Each cell is a ratio of means, with the standard error of the delta method; weak prompts are told."""
    path, model = checkpoint(tmp_path)
    model.eval()
    saved = tmp_path / "a.npz"
    done = run(path, write_set(tmp_path, SET), "--site=heads", f"--save={saved}", "--bos=False")
    changes, wholes = [], []
    for clean, corrupt, target, foil in SET:
        donor, recipient = ids_of(clean, False), ids_of(corrupt, False)
        low, high = (difference(model(ids[None])[0, -1], target, foil) for ids in (recipient, donor))
        changes.append(difference(swap(model, donor, recipient, "heads"), target, foil) - low)
        wholes.append(high - low)
    changes, wholes, table = np.array(changes), np.array(wholes), np.load(saved)
    ratio = changes.mean(0) / wholes.mean()
    np.testing.assert_allclose(table["values"], ratio.reshape(4, 11), atol=2e-3 * abs(ratio).max())
    left = changes - ratio * wholes[:, None, None, None]
    error = np.sqrt((left ** 2).sum(0) / 3 / 4) / abs(wholes.mean())
    np.testing.assert_allclose(table["standard_error"], error.reshape(4, 11), atol=2e-3 * error.max())
    assert table["rows"].tolist() == ["0.0", "0.1", "1.0", "1.1"] and table["count"] == 4
    assert table["each"].shape == (4, 4, 11) and table["columns"][1] == "1 h" and table["columns"][4] == "4 c…"
    weak = [str(i + 1) for i in range(4) if wholes[i] * wholes.mean() < 0]
    assert weak and f"in {len(weak)} of 4 prompts, which are still part of the means: {', '.join(weak)}" in done.stdout
    page = (tmp_path / "ckpt-swap-heads.html").read_text()
    for part in ("set.jsonl, 4", "the cat sat", "the dog sat", "<dt>target", "<dt>foil", "class=line", "corrupt "):
        assert part in page
    (tmp_path / "b.npz").write_bytes(b"mine")
    done = run(path, CLEAN, CORRUPT, TARGET, f"--save={tmp_path / 'b.npz'}", status=2)
    assert "was not written by patching.py" in done.stderr
    assert "an earlier result" in run(path, CLEAN, CORRUPT, TARGET, f"--save={saved}", "--positions=last").stdout
    assert np.load(saved)["columns"].tolist() == ["last position"]


def test_positions_and_lengths(tmp_path):
    """Columns of prompts that are not equally long count from the end; heads at one column stand side by side."""
    path, model = checkpoint(tmp_path)
    model.eval()
    rows = [SET[0], ("a cat", "a dog", " ", "x")]
    saved = tmp_path / "a.npz"
    done = run(path, write_set(tmp_path, rows), "--site=mlp", f"--save={saved}")
    assert "the prompts have 6 to 12 tokens: columns count from the end" in done.stdout
    table, changes, wholes = np.load(saved), [], []
    for clean, corrupt, target, foil in rows:
        donor, recipient = ids_of(clean), ids_of(corrupt)
        low, high = (difference(model(ids[None])[0, -1], target, foil) for ids in (recipient, donor))
        changes.append(difference(swap(model, donor, recipient, "mlp"), target, foil)[:, -6:] - low)
        wholes.append(high - low)
    expected = np.mean(changes, 0) / np.mean(wholes)
    np.testing.assert_allclose(table["values"], expected, atol=2e-3 * abs(expected).max())
    assert table["columns"][-1].startswith("-1 ")
    run(path, write_set(tmp_path, rows), "--mode=zero", "--site=heads", "--positions=all", f"--save={saved}")
    table, changes = np.load(saved), []
    for clean, _, target, foil in rows:
        whole = difference(model(ids_of(clean)[None])[0, -1], target, foil)
        changes.append([[difference(ablate(model, ids_of(clean)[None], "head", layer, head=head)[0, -1], target, foil)
                         - whole for head in range(2)] for layer in range(2)])
    np.testing.assert_allclose(table["values"], np.mean(changes, 0), atol=1e-4)
    assert table["columns"].tolist() == ["head 0", "head 1"] and table["rows"].tolist() == ["layer 0", "layer 1"]


@pytest.mark.parametrize("mode", ["mean", "resample", "data"])
def test_means_and_resampling(mode, tmp_path):
    """States are replaced by their mean over the prompts at each position, over a text, or by another prompt's; and
    whole heads too, with --mode=ablate."""
    path, model = checkpoint(tmp_path)
    model.eval()
    rows, saved, text = SET[:3], tmp_path / "a.npz", (ROOT / "ruff.toml").read_bytes() * 5
    (tmp_path / "text.txt").write_bytes(text)
    how = "resample" if mode == "resample" else "mean"
    more = [f"--data={tmp_path / 'text.txt'}", "--samples=3"] if mode == "data" else []
    prompts = write_set(tmp_path, rows)
    run(path, prompts, f"--mode={how}", "--site=heads", f"--save={saved}", *more)
    by_hand, grid = [], np.load(saved)["each"]
    states = [patching.record(model, ids_of(row[0])[None], ["heads"]) for row in rows]
    windows = patching.windows(np.frombuffer(text, np.uint8).astype(np.int32), 3, 33, 1337)[:, :-1]
    of_text = patching.record(model, windows, ["heads"])
    source = {"mean": lambda n, layer: sum(each["heads", layer] for each in states) / 3,
              "resample": lambda n, layer: states[patching.others(3, 1337)[n]]["heads", layer],
              "data": lambda n, layer: of_text["heads", layer].mean((0, 2))[None, :, None]}[mode]
    for n, (clean, _, target, foil) in enumerate(rows):
        whole = difference(model(ids_of(clean)[None])[0, -1], target, foil)
        for layer, head, at in ((0, 1, 11), (1, 0, 11), (0, 0, 6), (1, 1, slice(None))):
            def tap(site, one, x, n=n, layer=layer, head=head, at=at):
                if (site, one) == ("heads", layer):
                    by = mx.broadcast_to(source(n, layer), x.shape)
                    x = mx.array(x)
                    x[0, head, at] = by[0, head, at]
                return x

            change = difference(model(ids_of(clean)[None], tap=tap)[0, -1], target, foil) - whole
            if at == slice(None):
                by_hand.append(change)
            else:
                assert grid[n, 2 * layer + head, at] == pytest.approx(change, abs=1e-4)
    assert all(other != n for seed in range(20) for n, other in enumerate(patching.others(3, seed)))
    run(path, prompts, "--mode=ablate", f"--how={how}", f"--save={saved}", *more)
    table = np.load(saved if mode != "data" else tmp_path / "a-prompt.npz")
    np.testing.assert_allclose(table["each"][:, 1, 4], by_hand, atol=1e-4)
    if mode == "data":  # the loss, with means over the same text
        tap = patching.ablation(model, "head", 1, "mean", 1, {key: x.mean((0, 2))[None, :, None] for key, x in
                                                              of_text.items() if key[0] == "heads"})
        text = patching.windows(np.frombuffer(text, np.uint8).astype(np.int32), 3, 33, 1337)
        change = model.loss(text[:, :-1], text[:, 1:], tap=tap) - model.loss(text[:, :-1], text[:, 1:])
        assert np.load(saved)["values"][1, 4] == pytest.approx(float(change), abs=1e-4)


def test_trace_of_a_set(tmp_path):
    """Each row has its own subject, and noise of its own from the same seed."""
    path, model = checkpoint(tmp_path)
    model.eval()
    rows = [(*SET[0], "cat"), ("a dog", "", "a", "", "dog")]
    run(path, write_set(tmp_path, rows), "--mode=trace", "--site=v", "--positions=last", "--draws=2",
        f"--save={tmp_path / 'a.npz'}")
    rng, table = np.random.default_rng(1337), np.load(tmp_path / "a.npz")
    for n, (text, target, at) in enumerate((("the cat sat", " ", [5, 6, 7]), ("a dog", "a", [3, 4, 5]))):
        ids = ids_of(text)
        noise = (rng.standard_normal((2, 3, 64)) * 3 * np.array(model.embed(ids)).std()).astype(np.float32)
        low, found = patching.trace(model, ids, at, mx.array(noise), "v")
        low, found = (np.array(mx.softmax(x, axis=-1)[..., ord(target)]) for x in (low, found))
        np.testing.assert_allclose(table["each"][n], found[:, :, -1].mean(-1) - low.mean(), atol=1e-6)


@pytest.mark.parametrize("arguments, says", [
    ([CLEAN, CORRUPT, TARGET, "--subject=cat"], "mode=swap does not use --subject: leave it out, or give --mode=trace"),
    (["--mode=zero", CLEAN, CORRUPT], "does not use --corrupt"),
    (["--mode=ablate", "--site=mlp"], "does not use --site"),
    (["--mode=trace", "--foil=x"], "does not use --foil"), ([CLEAN, "--prompts=a.jsonl"], "leave one of the two out"),
    (["--mode=mean", CLEAN, TARGET, "--samples=3"], "give --data=FILE"), (["--mode=resample"], "give --prompts=FILE"),
    (["--mode=trace", CLEAN, TARGET, "--window=2", "--site=q"], "heads have nothing in common"),
    ([CLEAN, CORRUPT, TARGET, "--positions=first"], "positions='first'"),
    ([CLEAN, CORRUPT, TARGET, "--save=none/a.npz"], "there is no folder none"),
])
def test_settings_that_do_not_fit(arguments, says, tmp_path):
    path, _ = checkpoint(tmp_path)
    assert says in run(path, *arguments, status=2).stderr
    assert [file.name for file in tmp_path.iterdir()] == ["ckpt.safetensors"]


@pytest.mark.parametrize("rows, arguments, says", [
    ([("the cat", "", "a", "")], [], "prompt 1 has no corrupt one"),
    ([SET[0], (*SET[1][:3], "")], [], "some prompts have a foil"),
    ([SET[0]], ["--mode=mean"], "needs several"),
    ([("a", "b", "", "")], [], "line 1: it needs the texts clean and target"),
    ([SET[0], ("a", "b", "c", "d")], ["--mode=resample", "--positions=all"], "needs prompts of equally many tokens"),
    ([SET[0], ("a cat", "b", "c", "d")], ["--positions=all"], "prompt 2 has 6 and 2 tokens"),
])
def test_bad_sets(rows, arguments, says, tmp_path):
    path, _ = checkpoint(tmp_path)
    assert says in run(path, write_set(tmp_path, rows), *arguments, status=2).stderr


def test_turned_states(tmp_path):
    """Queries and keys, which are turned by their positions, do not go to another one; without such turns they do."""
    a, b = mx.array([5, 9, 2, 7]), mx.array([5, 8, 2])
    for settings, refused in (dict(), True), (dict(pos="learned"), False):
        model = GPT(GPTConfig(**dict(block_size=32, vocab_size=320, n_layer=2, n_head=2, n_embd=32) | settings), seed=1)
        for site in "q", "k", "v":
            if refused and site != "v":
                with pytest.raises(UserError, match="turned by their position"):
                    swap(model, a, b, site, [(3, 2)])
            else:
                swap(model, a, b, site, [(3, 2)])
            swap(model, a, b, site, [(2, 2)])
    path, _ = checkpoint(tmp_path)
    rows = [{"clean": "abc", "corrupt": "abd", "target": "x"}, {"clean": "abcd", "corrupt": "abxd", "target": "y"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = partial(conftest.run, "patching.py", path, f"--prompts={tmp_path / 'rows.jsonl'}", "--site=k")
    run()  # columns count from the end, at equal positions of both prompts
    for mode in "resample", "mean":
        assert "turned by their position" in run(f"--mode={mode}", status=2).stderr


@pytest.mark.parametrize("settings", [dict(), dict(tie=False, bias=True, norm="layer"), dict(n_expert=3)], ids=str)
def test_unpacked(settings):
    """A packed model and its dense form have the same logits; one that would need too much memory stays packed."""
    model = GPT(GPTConfig(**dict(block_size=32, vocab_size=320, n_layer=2, n_head=2, n_embd=64) | settings), seed=1)
    nn.quantize(model, group_size=32, bits=4, class_predicate=lambda path, layer: type(layer).__name__ in (
        "Linear", "Embedding"))
    model.eval()
    idx, packed = mx.array([[5, 9, 2, 7]]), [type(each) for _, each in model.named_modules()]
    before = model(idx)
    unpack(model, most=1000)
    assert [type(each) for _, each in model.named_modules()] == packed
    unpack(model)
    assert not any(isinstance(each, (nn.QuantizedLinear, nn.QuantizedEmbedding)) for _, each in model.named_modules())
    np.testing.assert_allclose(np.array(model(idx)), np.array(before), atol=1e-5)
