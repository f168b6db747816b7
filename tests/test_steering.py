"""steering.py: directions and means of states against numpy; taps against models whose weights were changed instead;
where a tap acts; files."""
import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from test_gptq import FLAVOURS
from test_tuned_lens import small

import steering
from config import UserError
from lora import attach, base_fingerprint
from model import generate, load_arrays, no_tap, save_arrays
from tokenizer import byte_tokenizer

IDS, OTHER = [5, 17, 2, 33, 8, 1], [9, 40, 2]


def stream(model, ids: list[int], layer: int) -> np.ndarray:
    """The states (T, C) after a layer, by the layers alone."""
    x = model.embed(mx.array([ids]))
    for block in model.blocks[:layer + 1]:
        x = block(x, 0, None, no_tap, {})
    return np.array(x[0])


@pytest.mark.parametrize("layer", [-1, 0, 3])
def test_direction(layer):
    model = small()
    first, second = (stream(model, ids, layer) for ids in (IDS, OTHER))
    for over, skip, expected in (("last", 1, first[-1] - second[-1]),
                                 ("mean", 0, first.mean(0) - second.mean(0)),
                                 ("mean", 1, first[1:].mean(0) - second[1:].mean(0))):
        found = steering.direction_of(model, [IDS], [OTHER], layer, over, skip)
        np.testing.assert_allclose(np.array(found), expected, atol=1e-5)
    with pytest.raises(UserError, match="no token"):
        steering.direction_of(model, [IDS], [OTHER[:1]], layer, "mean", 1)


@pytest.mark.parametrize("settings", [{}, {"yoco": True}, {"sliding_window": 5}, {"value_residual": True}], ids=str)
@pytest.mark.parametrize("start, end", [(0, None), (4, None), (3, 5), (9, None)])
def test_positions(start, end, settings):
    """A tap acts at its positions of the text only: with a cache, token by token, as in one pass over the whole text,
    which sees all positions. The direction is added to the state after layer 1."""
    model, d = small(**settings), mx.array(np.random.default_rng(0).normal(size=64).astype(np.float32))

    def whole(site, layer, x):
        at = (mx.arange(x.shape[1]) >= start) & (mx.arange(x.shape[1]) < (end or 99))
        return x + 2 * at[:, None] * d if (site, layer) == ("resid", 2) else x

    text, tap = [*IDS, *range(40, 52)], steering.acting(1, lambda x: x + 2 * d, start, end)
    cache, found = model.make_cache(), []
    for part in [IDS, *([token] for token in text[len(IDS):])]:
        found.append(model(mx.array([part]), cache=cache, tap=tap, last=True)[0, -1])
    for expected, differs in ((whole, False), (no_tap, True)):
        logits = model(mx.array([text]), tap=expected)[0, len(IDS) - 1:]
        assert (mx.abs(mx.stack(found) - logits).max() > 1e-3) == differs


def test_read_again():
    """When the context is full and its second half is read again, positions still count from the beginning."""
    model, state = small(block_size=8), mx.array(np.random.default_rng(1).normal(size=64).astype(np.float32))
    seen = []

    def tap(site, layer, x):
        if (site, layer) == ("resid", 0):
            seen.append(np.array(acts("resid", 0, x) != x).any(-1)[0].tolist())
        return x

    acts = steering.pasting(state, -1, 6, 12)
    list(generate(model, IDS, 12, temperature=0, tap=tap))
    positions = [[*range(6)], [6], [7], [5, 6, 7, 8], [9], [10], [11], [12], [10, 11, 12, 13], [14], [15], [16]]
    assert seen == [[6 <= at < 12 for at in row] for row in positions]


# ---- states ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", FLAVOURS, ids=str)
def test_means_of_many(settings, monkeypatch):
    """Texts of different lengths, some of which are read together, as each alone; after all layers or after some."""
    monkeypatch.setattr(steering, "AT_A_TIME", 20)
    model, rng = small(**settings), np.random.default_rng(0)
    texts = [rng.integers(0, 64, n).tolist() for n in (3, 9, 5, 5, 1, 12, 4)]
    spans = [(0, 3), (2, 5), (4, 5), (1, 5), (0, 1), (11, 12), (0, 2)]
    found = steering.mean_states(model, texts, spans)
    for i, (ids, (first, last)) in enumerate(zip(texts, spans, strict=True)):
        for layer in (-1, 0, 1, 3):
            alone = np.array(steering.states_of(model, ids, layer), np.float64)[first:last].mean(0)
            np.testing.assert_allclose(found[layer + 1, i], alone, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(steering.mean_states(model, texts, spans, [2, -1]), found[[3, 0]], atol=1e-6)


def test_direction_of_sets():
    """A difference of means over texts: every text counts as much, however long it is."""
    model, texts = small(), [IDS, OTHER, [7, 8], [9], [3, 4, 5, 6]]
    states = [stream(model, ids, 1).astype(np.float64) for ids in texts]
    for over, each in (("last", [x[-1] for x in states]), ("mean", [x.mean(0) for x in states])):
        expected = np.mean(each[:2], 0) - np.mean(each[2:], 0)
        found = steering.direction_of(model, texts[:2], texts[2:], 1, over)
        np.testing.assert_allclose(np.array(found), expected, atol=1e-5)


# ---- taps ------------------------------------------------------------------------------------------------------------

D = mx.array(np.random.default_rng(5).normal(size=64).astype(np.float32))


@pytest.mark.parametrize("layer", [-1, 0, 2, 3])
def test_adding(layer):
    """It is the model with a bias after that layer; folded() makes that model, but for the embedding."""
    model, changed, idx = small(bias=True), small(bias=True), mx.array([IDS])
    if layer >= 0:
        changed.blocks[layer].mlp.down.bias = changed.blocks[layer].mlp.down.bias + 1.5 * D
    else:
        changed = small(tie=False, bias=True)
        model = small(tie=False, bias=True)
        changed.embed.weight = changed.embed.weight + 1.5 * D
    expected, plain = changed(idx), model(idx)
    np.testing.assert_allclose(np.array(model(idx, tap=steering.adding(D, layer, 1.5))), np.array(expected), atol=1e-4)
    assert mx.abs(expected - plain).max() > 0.1
    assert steering.folded(model, D, layer, 1.5) == (layer >= 0)
    np.testing.assert_allclose(np.array(model(idx)), np.array(expected if layer >= 0 else plain), atol=1e-4)


@pytest.mark.parametrize("settings", [*FLAVOURS, {"packed": True}, {"adapter": True}], ids=str)
def test_folded(settings):
    """In each variant, the folded model is the model with the tap, or folded() says that it left the model alone."""
    model = small(**{name: value for name, value in settings.items() if name not in ("packed", "adapter")})
    if "packed" in settings:
        nn.quantize(model, 32, 8)
    if "adapter" in settings:
        attach(model, rank=2)
    idx = mx.array([IDS])
    plain, expected = model(idx), model(idx, tap=steering.adding(D, 1, 0.7))
    done = steering.folded(model, D, 1, 0.7)
    assert mx.allclose(model(idx), expected if done else plain, atol=1e-4)
    assert mx.abs(expected - plain).max() > 0.01
    alone = {"n_expert", "mod", "norm_place", "residual_scale", "adapter"}
    assert done == (not alone & {*settings})


@pytest.mark.parametrize("parallel", [False, True])
def test_removing(parallel):
    """It is the model all of whose matrices that write to the stream are orthogonal to the direction (Arditi et al.
    2024, section 4.1). The text of a generation is that model's, too."""
    model, changed = (small(tie=False, parallel=parallel) for _ in range(2))
    for each in model, changed:  # else random weights hardly write to the stream
        for block in each.blocks:
            block.mlp.down.weight = mx.random.normal(block.mlp.down.weight.shape, key=mx.random.key(block.layer)) * 0.1
            block.attn.out.weight = mx.random.normal(block.attn.out.weight.shape, key=mx.random.key(9 - block.layer))
    unit = np.array(D, np.float64) / np.linalg.norm(np.array(D, np.float64))

    def orthogonal(weight, axis):
        w = np.array(weight, np.float64)
        w = w - np.outer(unit, unit @ w) if axis == 0 else w - np.outer(w @ unit, unit)
        return mx.array(w.astype(np.float32))

    changed.embed.weight = orthogonal(changed.embed.weight, 1)
    for block in changed.blocks:
        block.attn.out.weight, block.mlp.down.weight = (orthogonal(x, 0) for x in (block.attn.out.weight,
                                                                                   block.mlp.down.weight))
    idx, tap = mx.array([IDS, IDS[::-1]]), steering.removing(3 * D)
    expected = changed(idx)
    np.testing.assert_allclose(np.array(model(idx, tap=tap)), np.array(expected), atol=2e-4)
    assert mx.abs(expected - model(idx)).max() > 0.1
    texts = [list(generate(*each, 20, temperature=0)) for each in ((changed, IDS), (model, IDS))]
    assert list(generate(model, IDS, 20, temperature=0, tap=tap)) == texts[0] != texts[1]


@pytest.mark.parametrize("settings", FLAVOURS, ids=str)
def test_nothing_is_left(settings):
    model, tap, largest = small(**settings), steering.removing(D), []

    def look(site, layer, x):
        x = tap(site, layer, x)
        if site == "resid":
            largest.append(mx.abs(x @ D).max() / mx.abs(x).max())
        return x

    model(mx.array([IDS]), tap=look)
    assert len(largest) == 5 and max(each.item() for each in largest) < 1e-4


# ---- files -----------------------------------------------------------------------------------------------------------


def test_files(tmp_path):
    model, name = small(), str(tmp_path / "a:b.safetensors")
    base = base_fingerprint(model)
    steering.save_direction(name, D, 2, "probe", base, "probe.py", {"a": 1}, {"more": mx.ones(3)}, labels=["x"])
    found, layer = steering.load_direction(name, model, base)
    assert mx.array_equal(found, D) and layer == 2
    arrays, header = load_arrays(name)
    assert set(arrays) == {"direction", "more"} and header["labels"] == ["x"] and header["script"] == "probe.py"
    with pytest.raises(UserError, match="another checkpoint"):
        steering.load_direction(name, model, "other")
    for spoilt in ({"layer": 4}, {"layer": -2}, {"layer": True}, {"layer": None}):
        save_arrays(name, {"direction": D}, {**header, **spoilt})
        with pytest.raises(UserError, match="another checkpoint"):
            steering.load_direction(name, model, base)
    save_arrays(name, {"direction": D / 0}, header)
    with pytest.raises(UserError, match="not finite"):
        steering.load_direction(name, model, base)


def test_steered(tmp_path):
    """Strengths and several directions; a colon in a path; the order counts where one is removed."""
    idx, logits = mx.array([IDS]), []
    other = mx.array(np.random.default_rng(6).normal(size=64).astype(np.float32))
    base = base_fingerprint(small())
    files = [str(tmp_path / name) for name in ("a:1.safetensors", "b.safetensors")]
    for path, direction, layer in zip(files, (D, other), (1, 2), strict=True):
        steering.save_direction(path, direction, layer, "last", base, "steer.py", {})
    a, b = steering.adding(D, 1, -0.5), steering.adding(other, 2, 1.0)
    for given, taps, folds in (([f"{files[0]}:-0.5"], [a], True), ([f"{files[0]}:-0.5", files[1]], [a, b], True),
                               ([f"{files[0]}:-0.5", f"{files[1]}:remove"], [a, steering.removing(other)], False),
                               ([f"{files[0]}:remove", f"{files[0]}:-0.5"], [steering.removing(D), a], False),
                               ([f"{files[0]}:-0.5", f"{files[0]}:remove"], [a, steering.removing(D)], False)):
        model = small()
        tap = steering.steered(model, given, base)
        assert (tap is no_tap) == folds
        logits.append(np.array(model(idx, tap=tap)))
        np.testing.assert_allclose(logits[-1], np.array(small()(idx, tap=steering.together(taps))), atol=1e-4)
    assert all(np.abs(x - y).max() > 1e-3 for i, x in enumerate(logits) for y in logits[:i])


def test_texts(tmp_path):
    enc, model = byte_tokenizer(), small(vocab_size=320)
    for name, content in (("a.txt", "one\n\ntwo\r\n"), ("a.jsonl", '{"text": "one"}\n{"text": "two"}\n'),
                          ("a.csv", "text,label\none,1\ntwo,0\n")):
        (tmp_path / name).write_text(content)
        found = steering.read_texts(str(tmp_path / name), enc, model, "positives")
        assert found == [[256, *b"one"], [256, *b"two"]]
    for name, content, words in (("b.txt", "\n", "has no text"), ("b.txt", "one\n" + 40 * "x", "line 2: --positives"),
                                 ("b.jsonl", '{"text": 3}\n', "line 1: it has no text"),
                                 ("b.jsonl", '{"text"\n', "line 1: no JSON")):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=words):
            steering.read_texts(str(tmp_path / name), enc, model, "positives")
