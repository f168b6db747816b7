"""patching.py: properties of patches and ablations in every variant; each cell against a pass of its own; a model with
a known circuit; bad input."""
import re
from functools import partial

import blas  # noqa: F401  (before mlx)
import conftest
import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT
from test_gptq import FLAVOURS, checkpoint

import patching
from config import UserError
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


def in_place(model, layer, stream, x):
    """The row of each position in an array x (T, C) that a block taps, and x by position. With mod=topk, the rows of
    chosen tokens come first, and the others count as 0."""
    block = model.blocks[layer]
    if "predictor" not in block:
        return np.arange(len(x)), x
    chosen = np.array((stream @ block.predictor.weight.T)[:, 0] > block.threshold)
    row = np.empty(len(x), int)
    row[np.concatenate([np.flatnonzero(chosen), np.flatnonzero(~chosen)])] = np.arange(len(x))
    return row, mx.where(mx.array(chosen)[:, None], x[mx.array(row)], 0)


def one_cell(model, donor, recipient, site, layers, i, j):
    """The recipient's last logits with the donor's state in one cell, by a forward pass for this cell alone."""
    states, own = {}, {}

    def record(name, layer, x):
        states[name, layer] = x
        return x

    def put(name, layer, x):
        own[name] = x[0]
        if name == site and layer in layers:
            value, row = states[name, layer][0, i], j
            if site != "resid":
                value = in_place(model, layer, states["resid", layer][0], states[name, layer][0])[1][i]
                row = in_place(model, layer, own["resid"], x[0])[0][j]
            x = mx.array(x)
            x[0, row] = value
        return x

    model(donor[None], tap=record)
    return model(recipient[None], tap=put)[0, -1]


# ---- patching --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [*FLAVOURS, dict(mod="topk", mod_every=1)], ids=str)
def test_swap(settings):
    """A donor that is the recipient changes nothing; each cell equals a pass of its own; with all positions patched at
    once, the logits are the donor's."""
    model = small(4, **settings)
    own, theirs = model(RECIPIENT[None])[0], model(DONOR[None])[0]
    tolerance = 1e-4 * mx.abs(own).max()
    for site in patching.SITES:
        same = swap(model, RECIPIENT, RECIPIENT, site)
        assert same.shape == (4, 12, 64) and mx.abs(same - own[-1]).max() < tolerance
        found = swap(model, DONOR, RECIPIENT, site, batch_size=5)
        for layer in range(4):
            for i in (0, 5, 11):
                alone = one_cell(model, DONOR, RECIPIENT, site, [layer], i, i)
                assert mx.abs(found[layer, i] - alone).max() < tolerance
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
    for layer in range(3):
        for p in (0, 7, 11):
            def tap(name, at, x, layer=layer, p=p):
                if (name, at) == (site, layer):
                    rows, n = np.arange(12), 12
                    if site != "resid":
                        rows, placed = in_place(model, layer, stream[layer], x[0])
                        n = sum(bool(each.any()) for each in placed)
                    by = x[0, :n].mean(0) if source == "mean" else mx.zeros_like(x[0, 0])
                    x = mx.array(x)
                    x[0, rows[p]] = by
                return x

            assert mx.allclose(found[layer, p], model(RECIPIENT[None], tap=tap)[0, -1], atol=1e-4)


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
    assert (tmp_path / f"ckpt-{mode}.png").read_bytes().startswith(b"\x89PNG")
    assert "http" not in (tmp_path / f"ckpt-{mode}.html").read_text()
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
    assert f"loss {whole[0]:.4f} without it" in done.stdout
    assert row(done.stdout, "layer 0")[1] == pytest.approx(whole[1] - whole[0], abs=1e-3)


@pytest.mark.parametrize("arguments, says", [
    ([], "give --clean"), ([CLEAN, TARGET], "give --corrupt"), ([CLEAN, CORRUPT], "give --target"),
    ([CLEAN, "--corrupt=a dog", TARGET], "say which positions correspond"),
    ([CLEAN, CORRUPT, TARGET, "--pairs=5:99"], "pair 5:99: the prompts have positions 0 to 11"),
    ([CLEAN, CORRUPT, TARGET, "--pairs=5"], "write pairs of positions"),
    ([CLEAN, "--corrupt=" + "x" * 40, TARGET], "--corrupt: the prompt has 41 tokens"),
    ([CLEAN, "--mode=patch"], "mode='patch'"), ([CLEAN, CORRUPT, TARGET, "--foil= "], "the same token"),
    ([CLEAN, CORRUPT, TARGET, "--site=heads"], "site='heads'"), ([CLEAN, "--corrupt=the cat sat", TARGET], "no effect"),
    (["--mode=trace", CLEAN, TARGET, "--subject=dog"], "is not in the prompt"),
    (["--mode=trace", CLEAN, TARGET], "give --subject"), (["--mode=trace", "--noise=-1"], "noise from 0 to 1e6"),
    (["--mode=trace", "--noise=1e300"], "noise from 0 to 1e6"), ([CLEAN, CORRUPT, TARGET, "--seed=-1"], "seed=-1"),
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
