"""The variants of model.py: each can be deleted and the rest stands; and what test_model.py's oracle leaves out."""
import re
import sys
import types

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT
from mlx.utils import tree_flatten

import model as core
from config import UserError
from model import GPT, GPTConfig, WindowCache, alibi_slopes, window_attention

SOURCE = (ROOT / "model.py").read_text()
VARIANTS = re.findall(r"^# ---- variant (\w+): ", SOURCE, re.M)

# ---- deletion --------------------------------------------------------------------------------------------------------


def without(source: str, *variants: str) -> str:
    """The source without these variants' sections and without the lines that end in their tags."""
    for variant in variants:
        lines = source.splitlines(keepends=True)
        first, = [i for i, line in enumerate(lines) if line.startswith(f"# ---- variant {variant}: ")]
        last, = [i for i, line in enumerate(lines) if line.startswith(f"# ---- end of {variant} ")]
        assert first < last and len(lines[first]) == len(lines[last]) == 121
        assert not [line for line in lines[first + 1:last] if line.startswith("# ---- ")], f"{variant} does not close"
        source = "".join(line for i, line in enumerate(lines)
                         if not first <= i <= last and not line.rstrip().endswith(f"# {variant}"))
    return source


def module(source: str) -> types.ModuleType:
    made = types.ModuleType("model_without")
    sys.modules[made.__name__] = made  # dataclasses look their module up
    exec(compile(source, "model_without.py", "exec"), made.__dict__)
    return made


def logits(made, **settings) -> np.ndarray:
    """Of a whole pass, and of the same tokens from a cache in chunks, and a gradient."""
    model = made.GPT(made.GPTConfig(block_size=64, vocab_size=61, n_layer=3, n_head=4, n_embd=32, **settings), seed=5)
    idx, cache = mx.array(np.random.default_rng(0).integers(0, 61, (2, 64))), model.make_cache()
    chunks = [model(idx[:, a:b], cache=cache) for a, b in ((0, 20), (20, 21), (21, 64))]
    gradient = mx.grad(lambda w: (model.blocks[1].attn.q.update({"weight": w}), model.loss(idx, idx))[1])
    return np.concatenate([np.array(x).ravel() for x in (
        model(idx), *chunks, gradient(model.blocks[1].attn.q.weight))])


def assert_gone(source: str, *variants: str):
    """No word of the variants is left, and the baseline's numbers are the same to the last bit."""
    left = [line for line in source.splitlines() for variant in variants
            if re.search(rf"(?<![a-z]){variant}(?![a-z])", line, re.I)]
    assert not left, f"these lines are left of it: {left}"
    made = module(source)
    for settings in ({}, dict(pos="learned", norm="layer", mlp="gelu", bias=True), dict(n_kv_head=2, mlp="swiglu")):
        assert np.array_equal(logits(made, **settings), logits(core, **settings))


@pytest.mark.parametrize("variants", [[variant] for variant in VARIANTS] + [VARIANTS], ids=" ".join)
def test_deletion(variants):
    assert len(VARIANTS) >= 2
    assert_gone(without(SOURCE, *variants), *variants)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tag_counts(variant):
    """A line that has lost its tag stays when the variant goes, and the deletion test is red."""
    lines, first, last = SOURCE.splitlines(), f"# ---- variant {variant}: ", f"# ---- end of {variant} "
    section = range(*(next(i for i, line in enumerate(lines) if line.startswith(rule)) for rule in (first, last)))
    tagged = [i for i, line in enumerate(lines) if line.endswith(f"# {variant}") and i not in section]
    assert len(tagged) >= 3
    for i in tagged:
        untagged = lines[i].removesuffix(f"# {variant}").rstrip()
        with pytest.raises((AssertionError, NameError, SyntaxError)):
            assert_gone(without("\n".join([*lines[:i], untagged, *lines[i + 1:]]), variant), variant)


# ---- alibi -----------------------------------------------------------------------------------------------------------


def test_alibi_slopes():
    """The published ones (Press et al. 2022 and their code)."""
    assert alibi_slopes(8) == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert alibi_slopes(16)[:3] == pytest.approx([2**-0.5, 2**-1, 2**-1.5])
    assert alibi_slopes(6) == [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]
    assert alibi_slopes(12) == pytest.approx([2**-i for i in range(1, 9)] + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])
    assert alibi_slopes(1) == [1 / 256]


def test_alibi_is_the_only_position():
    assert GPTConfig(alibi=True).pos == "none"
    with pytest.raises(UserError, match="alibi.*pos"):
        GPTConfig(alibi=True, pos="learned")


# ---- window ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T, W", [(129, 1), (200, 5), (256, 63), (300, 64), (301, 65), (400, 100), (513, 128)])
@pytest.mark.parametrize("alibi", [False, True])
def test_window_in_blocks(T, W, alibi):
    """float64, one query after the other; and the gradients are those of the whole mask."""
    config = GPTConfig(n_head=4, n_kv_head=2, n_embd=32, sliding_window=W, alibi=alibi)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, heads, T, 8)) for heads in (4, 2, 2))
    wanted = np.zeros(q.shape)
    for b, h, t in np.ndindex(2, 4, T):
        seen = np.arange(max(0, t - W + 1), t + 1)
        score = k[b, h // 2, seen] @ q[b, h, t] / 8**0.5 - alibi * 4.0**-(h + 1) * (t - seen)
        e = np.exp(score)
        wanted[b, h, t] = e @ v[b, h // 2, seen] / e.sum()
    q, k, v = (mx.array(x.astype(np.float32)) for x in (q, k, v))
    assert np.abs(np.array(window_attention(config, 0, q, k, v, 0)) - wanted).max() < 1e-5

    def whole(q, k, v):
        return core.attend(q, k, v, core.score_mask(config, 0, T, 0, None))

    a, b = (mx.grad(lambda q, k, v, f=f: (f(q, k, v) * q).sum(), (0, 1, 2))(q, k, v)
            for f in (lambda *x: window_attention(config, 0, *x, 0), whole))
    assert all(mx.abs(x - y).max() < 1e-4 for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("settings", [
    dict(sliding_window=20), dict(sliding_window=20, alibi=True), dict(sliding_window=70, window_pattern="SL"),
], ids=str)
def test_window_far_beyond(settings):
    """Cached, in chunks and by token, as the blocks of a whole pass, over ten windows."""
    model = GPT(GPTConfig(block_size=400, vocab_size=61, n_layer=2, n_head=4, n_embd=32, **settings), seed=1)
    idx = mx.array(np.random.default_rng(0).integers(0, 61, (2, 300)))
    whole = model(idx)
    cache, parts, start = model.make_cache(), [], 0
    for size in (150, 1, 33, 1, 1, *[1] * 80, 34):
        parts.append(model(idx[:, start:start + size], cache=cache))
        start += size
    assert mx.abs(mx.concatenate(parts, axis=1) - whole[:, :start]).max() < 1e-4 * mx.abs(whole).max()


@pytest.mark.parametrize("settings, endless", [
    (dict(), True), (dict(alibi=True), True), (dict(pos="learned"), False), (dict(window_pattern="SL"), False),
], ids=str)
def test_generate_beyond_the_context(settings, endless):
    """Where all layers have a window and positions are relative, the text goes on in the same cache: so as a whole pass
    over everything would, and not one over the last block_size tokens."""
    config = GPTConfig(block_size=32, vocab_size=61, n_layer=2, n_head=4, n_embd=32, sliding_window=9, **settings)
    model, ids = GPT(config, seed=2), [1, 2, 3]
    model.embed.weight = model.embed.weight * 40
    found = list(core.generate(model, ids, 150, temperature=0))
    if endless:
        for token in found:
            assert token == mx.argmax(model(mx.array([ids]))[0, -1]).item()
            ids.append(token)
    assert len(found) == 150


def test_window_cache_holds_the_window():
    cache, rng = WindowCache(7), np.random.default_rng(0)
    k, v = rng.standard_normal((2, 1, 3, 60, 4)).astype(np.float32)
    start = 0
    for size in (1, 2, 1, 1, 1, 1, 1, 1, 5, 20, 1, 1, 3, 7, 1, 8, 1, 1):
        new_k, new_v = (mx.array(x[:, :, start:start + size]) for x in (k, v))
        keys, values, positions = cache.update(new_k, new_v)
        start += size
        positions = np.array(positions)
        assert {*range(max(0, start - 7), start)} <= {*positions} <= {*range(start)}
        assert len(positions) == keys.shape[2] <= 7 + (size if size > 1 else 0)
        for found, all_of_them in ((keys, k), (values, v)):
            assert np.array_equal(np.array(found), all_of_them[:, :, positions])
        assert cache.nbytes == 2 * 3 * 7 * 4 * 4


@pytest.mark.parametrize("bad", [dict(sliding_window=-1), dict(window_pattern="SX"), dict(window_pattern="")], ids=str)
def test_bad_window(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        GPTConfig(**bad)


# ---- diff ------------------------------------------------------------------------------------------------------------


def count(model) -> int:
    return sum(p.size for _, p in tree_flatten(model.parameters()))


def small(**settings) -> GPT:
    return GPT(GPTConfig(block_size=64, vocab_size=61, n_layer=3, n_head=4, n_embd=32, **settings), seed=4)


def test_diff_parameters():
    """As many as the paper says: four lambda vectors and a norm of twice the head's width, a layer."""
    assert count(small(diff_attn=True)) == count(small()) + 3 * (4 * 8 + 2 * 8)
    assert count(small(diff_attn=True, diff_attn_version=2)) == count(small()) + 3 * (32 * 32 + 4 * 32)
    wide = GPT(GPTConfig(diff_attn=True, n_embd=1024, n_head=2))
    lambdas = [np.array(p) for name, p in tree_flatten(wide.parameters()) if "lambda_" in name]
    assert len(lambdas) == 16 and abs(np.std(lambdas) - 0.1) < 0.01


@pytest.mark.parametrize("version", [1, 2])
def test_diff_gradients_reach_all(version):
    model, idx = small(diff_attn=True, diff_attn_version=version), mx.array([[*range(60)]])
    gradients = dict(tree_flatten(mx.grad(lambda p: (model.update(p), model.loss(idx, idx))[1])(model.parameters())))
    assert [name for name, g in gradients.items() if not mx.abs(g).max() > 0] == []


def test_diff_without_the_second_map():
    """lambda = 0 is attention of one softmax, before the norm."""
    model, seen = small(diff_attn=True, norm="layer"), {}
    attention, idx = model.blocks[0].attn, mx.array([[*range(60)]])
    for name in ("lambda_q1", "lambda_q2", "lambda_k2"):
        attention[name] = mx.zeros((8,))
    attention["lambda_q2"], attention["lambda_k2"] = mx.eye(8)[0], mx.eye(8)[0] * float(np.log(1 + attention.lambda_0))

    def look(site, layer, x):
        seen.setdefault((site, layer), x)
        return x

    model(idx, tap=look)
    q, k, v, found = (np.array(seen[site, 0], np.float64)[0] for site in ("q", "k", "v", "heads"))
    for pair in range(2):
        score = np.where(np.tril(np.ones((60, 60))), q[2 * pair] @ k[2 * pair].T / 8**0.5, -np.inf)
        p = np.exp(score) / np.exp(score).sum(-1, keepdims=True)
        y = p @ np.concatenate([v[2 * pair], v[2 * pair + 1]], axis=-1)
        y = y / np.sqrt((y * y).mean(-1, keepdims=True) + 1e-5) * 0.8  # 1 - lambda_init of the first layer
        assert np.abs(found[pair] - y).max() < 1e-5


@pytest.mark.parametrize("bad", [dict(n_head=3, n_embd=48), dict(n_kv_head=1), dict(diff_attn_version=3)], ids=str)
def test_bad_diff(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        GPTConfig(diff_attn=True, **bad)
