"""The variants of model.py: each can be deleted and the rest stands; and what test_model.py's oracle leaves out."""
import re
import shutil
import subprocess
import sys
import traceback
import types
from dataclasses import dataclass
from functools import cache
from unittest import mock

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import ROOT
from mlx.utils import tree_flatten
from test_model import FLAVOURS

import attention_maps
import awq
import model as core
from config import UserError
from model import GPT, GPTConfig, WindowCache, alibi_slopes, window_attention
from quantized import dense_weight

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


@cache
def words(variant: str) -> set[str]:
    """What the variant alone brings: its name, its settings, and what its section defines."""
    kept = without(SOURCE, variant)
    lines = {*kept.splitlines(keepends=True)}
    own = "".join(line for line in SOURCE.splitlines(keepends=True) if line not in lines)
    defined = re.findall(r"^(?:def|class|@mx.custom_function\ndef) (\w+)|^([A-Z_]+)\b.* = |"
                         r"\w+\.(\w+) = |carry\[\"(\w+)\"\] = ", own, re.M)
    settings = re.findall(rf"^    (\w+): .*# {variant}$", own, re.M)
    found = {word for group in defined for word in group if word} | {*settings}
    return {variant} | {word for word in found if not re.search(rf"\b{word}\b", kept)}


def module(source: str) -> types.ModuleType:
    made = types.ModuleType("model_without")
    sys.modules[made.__name__] = made  # dataclasses look their module up
    exec(compile(source, "model_without.py", "exec"), made.__dict__)
    return made


def logits(made, **settings) -> np.ndarray:
    """Of a whole pass, and of the same tokens from a cache in chunks, and a gradient; by MLX alone."""
    with mock.patch.object(made, "cpu_train", None):
        return logits_by_mlx(made, **settings)


def logits_by_mlx(made, **settings) -> np.ndarray:
    model = made.GPT(made.GPTConfig(block_size=64, vocab_size=61, n_layer=3, n_head=4, n_embd=32, **settings), seed=5)
    idx, cache = mx.array(np.random.default_rng(0).integers(0, 61, (2, 64))), model.make_cache()
    chunks = [model(idx[:, a:b], cache=cache) for a, b in ((0, 20), (20, 21), (21, 64))]
    gradient = mx.grad(lambda w: (model.blocks[1].attn.q.update({"weight": w}), model.loss(idx, idx))[1])
    return np.concatenate([np.array(x).ravel() for x in (
        model(idx), *chunks, gradient(model.blocks[1].attn.q.weight))])


def where(line: str) -> str:
    """The number and the text of a line in model.py; it may lack its tag."""
    found = next(i for i, of in enumerate(SOURCE.splitlines(), 1) if of == line or of.startswith(f"{line}  #"))
    return f"model.py, line {found}: {line.strip()}"


def assert_gone(source: str, *variants: str):
    """No word of the variants is left, and the baseline's numbers are the same to the last bit."""
    for variant in variants:
        brought = words(variant)
        for line in source.splitlines():
            word = re.search(rf"(?<![a-z]){variant}(?![a-z])", line, re.I)
            if found := ({word[0]} if word else set()) | brought & {*re.findall(r"\w+", line)}:
                raise AssertionError(f"{where(line)}\n{min(found)} belongs to the variant {variant}, but this line "
                                     f"stays when the variant is deleted: end it with the tag '# {variant}', or, in "
                                     "a comment, use other words")
    try:
        made = module(source)
        for settings in ({}, dict(pos="learned", norm="layer", mlp="gelu", bias=True), dict(n_kv_head=2, mlp="swiglu")):
            assert np.array_equal(logits(made, **settings), logits(core, **settings)), (
                f"without {' and '.join(variants)} the baseline's numbers are others, with {settings}: a tagged line "
                "changes what runs when the variant is off")
    except (NameError, AttributeError, TypeError, SyntaxError) as error:
        frames = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                  if frame.filename == "model_without.py"]
        number = error.lineno if isinstance(error, SyntaxError) else frames[-1]
        raise AssertionError(f"{where(source.splitlines()[number - 1])}\nthis line fails without "
                             f"{' and '.join(variants)} ({error}): it, or one that it needs, has a tag too few or too "
                             f"many ('# {variants[0]}')") from error


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
        try:
            assert_gone(without("\n".join([*lines[:i], untagged, *lines[i + 1:]]), variant), variant)
        except AssertionError as error:
            assert "model.py, line" in str(error)
        else:
            pytest.fail(f"model.py, line {i + 1}: {untagged.strip()}\nnobody would notice if this line lost its tag: "
                        f"let it hold a word of the variant {variant}, such as a function of the variant's section")


FIELDS = dict(re.findall(r"^    (\w+): \w+ = .* # .*  # (\w+)$", SOURCE, re.M))  # of GPTConfig: their variants


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_is_tested(field):
    """A setting of a variant stands in the matrix of pairs, in the float64 oracle, in train.py, and in the docs."""
    assert FIELDS[field] in VARIANTS, f"{field} has the tag # {FIELDS[field]}, of which there is no section"
    for name, lines in {"IDEAS in test_variants.py": IDEAS, "FLAVOURS in test_model.py": FLAVOURS}.items():
        assert any(field in settings for settings in lines.values()), f"{field} is in no line of {name}"
    assert re.search(rf"^{field} = ", (ROOT / "train.py").read_text(), re.M), f"{field} is no setting of train.py"
    assert f"--{field}=" in (ROOT / "docs" / "variants.md").read_text(), f"--{field}= is not in docs/variants.md"


def test_tags_are_words_of_their_own():
    """Each tag that stands at the end of a line is that of a section, and no line has two."""
    for number, line in enumerate(SOURCE.splitlines(), 1):
        if found := re.search(r"\S  # (\w+)$", line):
            two = re.search(rf"  # ({'|'.join(VARIANTS)})$", line[:found.start() + 1])
            assert not two, f"model.py, line {number} has two tags: {line}"


DOCS = (ROOT / "docs" / "variants.md").read_text()


def test_code_outside_refuses_what_it_does_not_know():
    """awq.py and habits.py repeat formulas of model.py: a new variant's setting, when it is on, is refused."""

    @dataclass
    class Newer(GPTConfig):
        new_idea: bool = False

    model = GPT(Newer(block_size=64, vocab_size=61, n_layer=2, n_embd=32), seed=1).eval()
    calls = (lambda: awq.shared_inputs(model, "blocks.0"), lambda: attention_maps.attention_maps(model, mx.arange(9)))
    for call in calls:
        assert call()
    model.config.new_idea = True
    for call in calls:
        with pytest.raises(UserError, match="new_idea=True"):
            call()


def test_a_padding_token_attends_to_something():
    """Else its softmax would be not a number, and 0 times it, too."""
    config = GPTConfig(sliding_window=5)
    at = mx.array([[0, 1, 7, core.PADDING, core.PADDING]])
    mask = np.array(core.score_mask(config, 0, 5, at, mx.arange(8)))
    assert np.isfinite(mask).any(-1).all() and np.isinf(mask[0, 0, 2, :3]).all()


def test_worked_example_is_the_code():
    """docs/variants.md lists every line of the value residual: its tagged lines and its section in model.py, and lines
    that stand in the other files."""
    example = DOCS.partition("## The worked example")[2].partition("## How to delete")[0]
    tagged, section, *others = re.findall(r"```(?:python|sh)\n(.*?)```", example, re.S)
    assert section in SOURCE and section.startswith("# ---- variant resformer: ")
    outside = without(SOURCE, *[variant for variant in VARIANTS if variant != "resformer"])  # of their sections
    expected = [line for line in outside.splitlines() if line.endswith("  # resformer")]
    assert [line for line in expected if line not in tagged.splitlines()] == [], "add these lines to docs/variants.md"
    assert [line for line in tagged.splitlines() if line not in SOURCE.splitlines()] == [], "docs/variants.md is old"
    files = ("train.py", "runs/architectures.sh", "tests/test_model.py", "tests/test_variants.py")
    for path, block in zip(files, others, strict=True):
        assert {*block.splitlines()} <= {*(ROOT / path).read_text().splitlines()}, path


def test_deletion_by_the_command_of_the_docs(tmp_path):
    command = re.search(r"^sed .*\\\n.*$", DOCS, re.M)[0]
    names = ("model.py", "train.py", "distill.py", "diffusion.py", "sample.py", "bench.py", "bench_growth.py")
    assert all(name in command for name in names)
    for variant in VARIANTS:
        for name in names:
            shutil.copy(ROOT / name, tmp_path)
        subprocess.run(command.replace("resformer", variant), shell=True, check=True, cwd=tmp_path)
        assert (tmp_path / "model.py").read_text() == without(SOURCE, variant)
        for name in names:
            compile((tmp_path / name).read_text(), name, "exec")
        assert not re.search(rf"# {variant}$", (tmp_path / "train.py").read_text(), re.M)


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
        return core.attend(config, q, k, v, core.score_mask(config, 0, T, 0, None))

    a, b = (mx.grad(lambda q, k, v, f=f: (f(q, k, v) * q).sum(), (0, 1, 2))(q, k, v)
            for f in (lambda *x: window_attention(config, 0, *x, 0), whole))
    assert all(mx.abs(x - y).max() < 1e-4 for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("settings", [
    dict(sliding_window=20), dict(sliding_window=20, alibi=True), dict(sliding_window=70, window_pattern="SL"),
    dict(sliding_window=20, sinks=4), dict(sliding_window=70, sinks=9, alibi=True),
    dict(sliding_window=9, sinks=1, diff_attn=True), dict(sliding_window=20, sinks=30, pos="learned"),
    dict(sliding_window=20, mod="topk", alibi=True), dict(sliding_window=20, mod="topk", mod_every=1),
    dict(sliding_window=30, yoco=True, mod="topk", mod_every=1),
    dict(sliding_window=20, attn_softcap=1.0, attn_scale=0.5, window_theta=30.0, window_pattern="SL", n_kv_head=2),
    dict(sliding_window=20, attn_softcap=1.0, sinks=4, rotary_dim=4, rope_pattern="RN", norm_place="after"),
], ids=str)
def test_window_far_beyond(settings):
    """Cached, in chunks and by token, as the blocks of a whole pass, over ten windows."""
    model = GPT(GPTConfig(block_size=400, vocab_size=61, n_layer=2, n_head=4, n_embd=32, **settings), seed=1).eval()
    for block in model.blocks:
        if "predictor" in block:  # so that it chooses about half
            block.predictor.weight = mx.random.normal((1, 32), key=mx.random.key(0)) * 9
            block.threshold = mx.zeros((1,))
    idx = mx.array(np.random.default_rng(0).integers(0, 61, (2, 300)))
    whole = model(idx)
    for chunks in ((150, 1, 33, 1, 1, *[1] * 80, 34), (*[1] * 60, 100, *[1] * 40, 100)):
        cache, parts, start = model.make_cache(), [], 0
        for size in chunks:
            parts.append(model(idx[:, start:start + size], cache=cache))
            start += size
        assert start == 300 and mx.abs(mx.concatenate(parts, axis=1) - whole).max() < 1e-4 * mx.abs(whole).max()


@pytest.mark.parametrize("settings, endless", [
    (dict(), True), (dict(alibi=True), True), (dict(pos="learned"), False), (dict(window_pattern="SL"), False),
    (dict(sinks=4), True), (dict(sinks=2, alibi=True), True), (dict(yoco=True), False),
], ids=str)
def test_generate_beyond_the_context(settings, endless):
    """Where all layers have a window and positions are relative, the text goes on in the same cache: so as a whole pass
    over everything would, and not one over the last block_size tokens."""
    config = GPTConfig(block_size=32, vocab_size=61, n_layer=2, n_head=4, n_embd=32, sliding_window=9, **settings)
    model, ids = GPT(config, seed=2), [1, 2, 3]
    model.embed.weight = model.embed.weight * 40
    cache = model.make_cache()
    found = list(core.generate(model, ids, 150, temperature=0, cache=cache))
    if endless:  # the sinks and the window, of two layers, keys and values, in float32
        assert cache.nbytes == (9 + settings.get("sinks", 0)) * 2 * 2 * 32 * 4
        for token in found:
            assert token == mx.argmax(model(mx.array([ids]))[0, -1]).item()
            ids.append(token)
    assert len(found) == 150


@pytest.mark.parametrize("sinks", [0, 1, 4, 30])
def test_window_cache_holds_the_window(sinks):
    cache, rng = WindowCache(7, sinks), np.random.default_rng(0)
    k, v = rng.standard_normal((2, 1, 3, 60, 4)).astype(np.float32)
    start = 0
    for size in (1, 2, 1, 1, 1, 1, 1, 1, 5, 20, 1, 1, 3, 7, 1, 8, 1, 1):
        new_k, new_v = (mx.array(x[:, :, start:start + size]) for x in (k, v))
        keys, values, positions = cache.update(new_k, new_v)
        start += size
        positions = np.array(positions)
        wanted = {*range(max(0, start - 7), start)} | {*range(min(start, sinks))}
        assert wanted <= {*positions} <= {*range(start)} and len({*positions}) == len(positions) == keys.shape[2]
        assert len(positions) <= 7 + sinks + (size if size > 1 else 0)
        for found, all_of_them in ((keys, k), (values, v)):
            assert np.array_equal(np.array(found), all_of_them[:, :, positions])
        assert cache.nbytes == 2 * 3 * (7 + sinks) * 4 * 4


@pytest.mark.parametrize("bad", [
    dict(sliding_window=-1), dict(window_pattern="SX"), dict(window_pattern=""), dict(sinks=4),
    dict(sinks=-1, sliding_window=8)], ids=str)
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


def test_rows_of_diff_2_sum_to_one_less_lambda():
    """Where all values are 1, each head reads 1 - sigmoid(lambda)."""
    model, seen = small(diff_attn=True, diff_attn_version=2), {}

    def look(site, layer, x):
        return seen.setdefault((site, layer), mx.ones(x.shape) if site == "v" else x)

    model(mx.array([[*range(60)]]), tap=look)
    x = np.array(model.blocks[0].attn_norm(seen["resid", 0])[0], np.float64)
    lam = 1 / (1 + np.exp(-x @ np.array(model.blocks[0].attn.lam.weight, np.float64).T))
    assert np.abs(np.array(seen["heads", 0][0]) - (1 - lam).T[:, :, None]).max() < 1e-5


@pytest.mark.parametrize("bad", [dict(n_head=3, n_embd=48), dict(n_kv_head=1), dict(diff_attn_version=3)], ids=str)
def test_bad_diff(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        GPTConfig(diff_attn=True, **bad)


# ---- moe -------------------------------------------------------------------------------------------------------------


def experts(E=5, k=2, **settings) -> GPT:
    """With routers far from even, so that experts differ in load and one may have none."""
    model = small(n_expert=E, expert_top_k=k, **settings)
    for block in model.blocks:
        block.mlp.router.weight = block.mlp.router.weight * 5
    return model


def loop_over_experts(moe, x: mx.array) -> mx.array:
    """Each token by each of its experts, one matrix at a time, by nothing that MoE uses; differentiable."""
    k = moe.config.expert_top_k
    logits = x @ moe.router.weight.T
    p = mx.softmax(logits, axis=-1)
    score = p + (moe.balance if "balance" in moe else 0)
    gates = mx.where(score >= mx.sort(score, axis=-1)[:, -k, None], p, 0)
    gates = gates / gates.sum(-1, keepdims=True) if k > 1 else gates
    y = mx.zeros(x.shape)
    for e in range(moe.config.n_expert):
        def linear(name, x, e=e):
            y = x @ moe[name].weight[e].T
            return y + moe[name].bias[e] if "bias" in moe[name] else y

        hidden = mx.square(mx.maximum(linear("up", x), 0))
        if "gate" in moe:
            hidden = linear("gate", x) * mx.sigmoid(linear("gate", x)) * linear("up", x)
        y = y + gates[:, e, None] * linear("down", hidden)
    return y


@pytest.mark.parametrize("n", [1, 20, 31, 32, 200, 999], ids="{} tokens".format)
@pytest.mark.parametrize("settings", [
    dict(bias=True), dict(k=1), dict(E=3, k=3, mlp="swiglu", bias=True), dict(E=70, k=4, expert_balance="bias"),
], ids=str)
def test_moe_is_a_loop_over_experts(n, settings):
    """Forward and backward; sorted, from 32 tokens of two experts on, and unsorted."""
    moe = experts(**settings, ffn_dim=24).blocks[0].mlp.eval()
    for name in {"gate", "up", "down"} & moe.keys():
        if "bias" in moe[name]:
            moe[name].bias = mx.random.normal(moe[name].bias.shape, key=mx.random.key(2))
    if "balance" in moe:
        moe.balance = mx.random.normal(moe.balance.shape, key=mx.random.key(3)) * 0.3
    x = mx.random.normal((n, 32), key=mx.random.key(n))

    def both(f):
        return mx.value_and_grad(lambda p, x: (moe.update(p), (f(x) * mx.sin(x)).sum())[1], (0, 1))(
            moe.trainable_parameters(), x)

    a, b = both(lambda x: moe(x[None], core.no_tap)[0]), both(lambda x: loop_over_experts(moe, x))
    for (name, found), (_, wanted) in zip(tree_flatten(a), tree_flatten(b), strict=True):
        assert mx.abs(found - wanted).max() <= 1e-4 * mx.abs(wanted).max() + 1e-6, name


@pytest.mark.parametrize("n", [3, 200], ids="{} tokens".format)
@pytest.mark.parametrize("bits, order", [(2, False), (4, True), (8, False)])
def test_packed_experts(n, bits, order):
    """They do, forward and backward, what the experts do that they stand for; the columns may stand in an order."""
    moe = small(n_expert=5, ffn_dim=64, bias=True).blocks[0].mlp.eval()
    packed, rng = core.MoE(moe.config, 0).eval(), np.random.default_rng(0)
    packed.update(moe.parameters())
    for name in ("up", "down"):
        moe[name].bias = mx.random.normal(moe[name].bias.shape, key=mx.random.key(2))
        packed[name] = moe[name].to_quantized(group_size=32, bits=bits)
        weight = mx.dequantize(packed[name].weight, packed[name].scales, packed[name].biases, 32, bits)
        if order:
            columns = np.stack([rng.permutation(weight.shape[2]) for _ in range(5)])
            packed[name].order = mx.array(columns)
            packed[name].freeze()
            weight = mx.stack([w[:, mx.array(np.argsort(column))] for w, column in zip(weight, columns, strict=True)])
        assert mx.array_equal(dense_weight(packed[name]), weight)
        moe[name].weight = weight
    x = mx.random.normal((n, 32), key=mx.random.key(n))
    a, b = (mx.value_and_grad(lambda x, f=f: (f(x) * mx.sin(x)).sum())(x)
            for f in (lambda x: packed(x[None], core.no_tap)[0], lambda x: loop_over_experts(moe, x)))
    for found, wanted in zip(a, b, strict=True):
        assert mx.abs(found - wanted).max() <= 1e-4 * mx.abs(wanted).max()
    assert not tree_flatten(packed.up.trainable_parameters())


def test_moe_of_one_expert_is_the_mlp():
    model, moe = small(), experts(E=1, k=1)
    for ours, its in zip(model.blocks, moe.blocks, strict=True):
        for name in ("up", "down"):
            its.mlp[name].weight = ours.mlp[name].weight[None]
    moe.update({name: p for name, p in model.parameters().items() if name != "blocks"})
    for ours, its in zip(model.blocks, moe.blocks, strict=True):
        its.attn.update(ours.attn.parameters())
    idx = mx.array([[*range(60)]])
    assert mx.abs(moe(idx) - model(idx)).max() < 1e-5


def test_an_unused_expert_has_no_gradient():
    moe = experts(E=6, k=2).blocks[0].mlp
    x, noise = (mx.random.normal((1, n, 32), key=mx.random.key(n)) for n in (1, 100))
    x = x + 0.1 * noise  # all alike, so that most experts have nothing to do
    used = {*np.argsort(-np.array(x[0] @ moe.router.weight.T))[:, :2].ravel()}
    gradients = dict(tree_flatten(mx.grad(lambda p: (moe.update(p), moe(x, core.no_tap).sum())[1])(
        moe.trainable_parameters())))
    for name in ("up.weight", "down.weight"):
        reached = (gradients[name] != 0).any((1, 2))
        assert reached.tolist() == [e in used for e in range(6)] and False in reached.tolist()


def numpy_balance(logits: np.ndarray, k: int, switch: float, z_weight: float) -> float:
    """Equations of Fedus et al. 2022 (f over all k assignments) and Zoph et al. 2022, float64."""
    E = logits.shape[1]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    f = np.bincount(np.argsort(-logits)[:, :k].ravel(), minlength=E) / (k * len(logits))
    z = np.log(np.exp(logits).sum(-1))
    return switch * E * (f * p.mean(0)).sum() + z_weight * (z * z).mean()


@pytest.mark.parametrize("balance, switch, z", [
    ("loss", 0.01, 0.0), ("loss", 0.01, 0.001), ("none", 0.0, 0.001), ("bias", 0.0, 0.001)])
def test_moe_balance_loss(balance, switch, z, monkeypatch):
    """It changes no output, and its gradient, beside the model's own, is that of the papers' formulas."""
    monkeypatch.setattr(core, "Z_LOSS", z)
    moe = experts(expert_balance=balance).blocks[0].mlp
    x = mx.random.normal((1, 90, 32), key=mx.random.key(7))
    weight = np.array(moe.router.weight, np.float64)

    def nothing(w):  # a loss of 0, so that what it finds is the balance's gradient alone
        moe.router.update({"weight": w})
        return (moe(x, core.no_tap) * 0).sum()

    found = np.array(mx.grad(nothing)(mx.array(weight.astype(np.float32))))
    wanted, h = np.zeros(weight.shape), 1e-6
    for i in np.ndindex(weight.shape):
        up, down = weight.copy(), weight.copy()
        up[i], down[i] = up[i] + h, down[i] - h
        values = [numpy_balance(np.array(x[0], np.float64) @ w.T, 2, switch, z) for w in (up, down)]
        wanted[i] = (values[0] - values[1]) / (2 * h)
    assert np.abs(found - wanted).max() < 1e-3 * np.abs(wanted).max()
    assert mx.array_equal(moe.train()(x, core.no_tap), moe.eval()(x, core.no_tap))


def test_a_balanced_router_has_a_switch_loss_of_one():
    p = np.full((1000, 8), 1 / 8) + 1e-9 * np.random.default_rng(0).standard_normal((1000, 8))
    assert abs(numpy_balance(np.log(p), 2, 1.0, 0.0) - 1) < 1e-3


def test_loss_free_balance(monkeypatch):
    """The bias chooses and weighs nothing, no gradient reaches it, and it evens the load out."""
    model, idx = experts(E=4, k=1, expert_balance="bias"), mx.array(np.random.default_rng(0).integers(0, 61, (4, 64)))
    assert "blocks.0.mlp.balance" not in dict(tree_flatten(model.trainable_parameters()))
    assert "blocks.0.mlp.balance" in dict(tree_flatten(model.parameters()))
    model.train()
    monkeypatch.setattr(core, "BIAS_STEP", 0.0)
    single = []
    for part in (idx[:1], idx[1:]):
        model(part)
        single.append(core.rebalance(model) * part.size)
    monkeypatch.setattr(core, "BIAS_STEP", 0.001)
    model(idx[:1])
    model(idx[1:])  # two micro-steps of one update
    loads = core.rebalance(model)
    assert np.allclose(loads, (single[0] + single[1]) / idx.size)
    moe = model.blocks[0].mlp
    assert loads.shape == (3, 4) and np.allclose(loads.mean(1), 1) and loads.max() > 1.3
    assert np.allclose(moe.balance, 0.001 * np.sign(1 - np.array(loads[0])))
    monkeypatch.setattr(core, "BIAS_STEP", 0.005)
    for _ in range(100):
        model(idx)
        after = core.rebalance(model)
        mx.eval(model.state)
    assert (mx.abs(after - 1).max(1) < 0.4 * mx.abs(loads - 1).max(1)).all()
    model.eval()
    model(idx)
    assert mx.array_equal(core.rebalance(model), mx.zeros((3, 4)))  # only training counts


def test_moe_with_checkpointing_and_compile():
    """The counts and the loss's gradient survive mx.compile and recomputation."""
    idx = mx.array(np.random.default_rng(0).integers(0, 61, (2, 64)))
    found = []
    for every, wrap in ((0, False), (1, False), (0, True)):
        model = GPT(GPTConfig(vocab_size=61, n_layer=1, n_embd=32, n_expert=4), seed=1)
        model.checkpoint_every = every

        def gradients(x, model=model):
            parameters = model.trainable_parameters()
            grads = mx.grad(lambda p: (model.update(p), model.loss(x, x))[1])(parameters)
            model.update(parameters)
            return grads

        f = mx.compile(gradients, inputs=model.state, outputs=model.state) if wrap else gradients
        found.append((dict(tree_flatten(f(idx))), core.rebalance(model)))
    for grads, loads in found[1:]:
        assert np.allclose(loads, found[0][1])
        for name, g in grads.items():
            assert mx.abs(g - found[0][0][name]).max() <= 1e-5 * mx.abs(g).max() + 1e-8, name


@pytest.mark.parametrize("bad", [
    dict(n_expert=-1), dict(n_expert=2, expert_top_k=3), dict(n_expert=2, expert_top_k=0), dict(n_shared_expert=1),
    dict(n_expert=4, expert_balance="even")], ids=str)
def test_bad_moe(bad):
    with pytest.raises(UserError, match=[*bad][-1]):
        GPTConfig(**bad)


# ---- mod -------------------------------------------------------------------------------------------------------------


def test_mod_at_full_capacity_is_the_dense_block():
    """All tokens, r = 1."""
    dense, routed = small(), small(mod="topk", mod_capacity=1.0, mod_every=1)
    mx.random.seed(0)
    x = mx.random.normal((2, 50, 32))
    for block, its in zip(dense.blocks, routed.blocks, strict=True):
        one = lambda site, layer, y: mx.ones(y.shape) if site == "depth" else y  # noqa: E731
        assert mx.abs(its(x, 0, None, one, {}) - block(x, 0, None, core.no_tap, {})).max() < 1e-5


@pytest.mark.parametrize("settings", [dict(), dict(alibi=True), dict(sliding_window=6), dict(pos="learned")], ids=str)
def test_mod_top_k_in_numpy(settings):
    """Training: the k tokens of the largest r, in order, alone, at their positions; the others bit for bit."""
    model = small(mod="topk", mod_capacity=0.2, mod_every=1, **settings)
    block, dense = model.blocks[1], small(**settings).blocks[1]
    dense.update({name: p for name, p in block.parameters().items() if name in dense})
    x = mx.random.normal((3, 40, 32), key=mx.random.key(1))
    found, r = np.array(block(x, 0, None, core.no_tap, {})), np.array(x) @ np.array(block.depth_router.weight[0])
    for row in range(3):
        chosen = np.sort(np.argsort(-r[row])[:8])
        others = np.setdiff1d(np.arange(40), chosen)
        assert np.array_equal(found[row, others], np.array(x)[row, others])
        selected = x[row:row + 1, mx.array(chosen)]
        y = dense(selected, mx.array(chosen[None]), None, core.no_tap, {}) - selected
        wanted = np.array(selected[0]) + r[row, chosen, None] * np.array(y[0])
        assert np.abs(found[row, chosen] - wanted).max() < 1e-5


def test_mod_predictor():
    """It learns who is among the top k, and neither its loss nor its gradient touches the model's."""
    model, idx = small(mod="topk", mod_capacity=0.25, mod_every=2), mx.array([[*range(60)]])

    def gradients(model):
        return dict(tree_flatten(mx.grad(lambda p: (model.update(p), model.loss(idx, idx))[1])(model.parameters())))

    before, loss = gradients(model), model.loss(idx, idx)
    block = model.blocks[1]
    block.predictor.weight, block.threshold = mx.ones((1, 32)), mx.array([0.3])
    after = gradients(model)
    assert mx.array_equal(loss, model.loss(idx, idx))
    assert {name for name in after if not mx.array_equal(after[name], before[name])} == {
        "blocks.1.predictor.weight", "blocks.1.threshold"}
    x = model.embed(idx)
    r, chosen = (x @ block.depth_router.weight.T)[0, :, 0], np.zeros(60)
    chosen[np.argsort(-np.array(r))[:15]] = 1
    x = np.array(x[0], np.float64)
    seen = {}
    model(idx, tap=lambda site, layer, y: seen.setdefault((site, layer), y))
    x = np.array(seen["resid", 1][0], np.float64)
    chosen = np.zeros(60)
    chosen[np.argsort(-(x @ np.array(block.depth_router.weight[0])))[:15]] = 1
    likely = 1 / (1 + np.exp(-(x.sum(-1) - 0.3)))
    wanted = 0.01 * ((likely - chosen)[:, None] * x).mean(0)  # the gradient of the mean binary cross-entropy
    assert np.abs(np.array(after["blocks.1.predictor.weight"][0]) - wanted).max() < 1e-5 * np.abs(wanted).max() + 1e-8


def test_mod_cache_grows_with_chosen_tokens_alone():
    model = small(mod="topk", mod_every=2).eval()
    block, idx = model.blocks[1], mx.array(np.random.default_rng(0).integers(0, 61, (3, 64)))
    block.predictor.weight = mx.random.normal((1, 32), key=mx.random.key(0)) * 9
    cache, seen = model.make_cache(), {}
    model(idx, tap=lambda site, layer, y: seen.setdefault((site, layer), y))
    for t in range(64):
        model(idx[:, t:t + 1], cache=cache)
    likely = (seen["resid", 1] @ block.predictor.weight.T)[..., 0] - block.threshold > 0
    counts = likely.sum(1).tolist()
    assert {row: cache.layers[1].rows[row].cache.length for row in cache.layers[1].rows} == {
        row: n for row, n in enumerate(counts) if n}
    assert 0 < sum(counts) < 150


@pytest.mark.parametrize("bad", [
    dict(mod="hard"), dict(mod="topk", mod_capacity=0.0), dict(mod="topk", mod_capacity=1.5),
    dict(mod="soft", mod_every=5), dict(mod="topk", mod_every=0)], ids=str)
def test_bad_mod(bad):
    with pytest.raises(UserError, match=[*bad][-1]):
        GPTConfig(**bad)


# ---- yoco ------------------------------------------------------------------------------------------------------------


def test_yoco_cache():
    """(L/2) windows and one global cache, not L of them; only the first have keys and values of their own."""
    model = GPT(GPTConfig(block_size=512, vocab_size=61, n_layer=6, n_head=2, n_embd=32, yoco=True, sliding_window=64))
    cache = model.make_cache()
    mx.eval(model(mx.zeros((1, 512), mx.int32), cache=cache))
    assert cache.nbytes == (3 * 64 + 512) * 2 * 32 * 4
    own = {name.split(".")[1] for name, _ in tree_flatten(model.parameters()) if ".attn.k." in name}
    assert own == {"0", "1", "2"}


@pytest.mark.parametrize("settings", [dict(), dict(diff_attn=True), dict(alibi=True), dict(n_expert=3)], ids=str)
def test_yoco_prompt_stops_early(settings):
    """Only the last token passes the second half, and the next token's logits are the same."""
    model, idx = small(yoco=True, sliding_window=9, **settings), mx.array([[*range(60)], [*range(60, 0, -1)]])
    seen, cache = {}, model.make_cache()
    last = model(idx[:, :50], cache=cache, last=True, tap=lambda site, layer, x: seen.setdefault((site, layer), x))
    whole = model(idx)
    assert last.shape == (2, 1, 61) and mx.abs(last - whole[:, 49:50]).max() < 1e-4
    assert seen["resid", 0].shape[1] == seen["resid", 1].shape[1] == seen["k", 1].shape[2] == 50
    assert all(seen[site, layer].shape[1] == 1 for layer in (1, 2) for site in ("attn", "mlp"))
    assert seen["q", 1].shape[2] == seen["resid", 2].shape[1] == seen["resid", 3].shape[1] == 1
    assert mx.abs(model(idx[:, 50:], cache=cache) - whole[:, 50:]).max() < 1e-4


def test_yoco_needs_two_halves():
    with pytest.raises(UserError, match="n_layer"):
        GPTConfig(yoco=True, n_layer=1)
    assert GPTConfig(yoco=True, block_size=256).sliding_window == 64


# ---- all pairs -------------------------------------------------------------------------------------------------------

IDEAS = {
    "window": dict(sliding_window=11), "sinks": dict(sliding_window=11, sinks=3),
    "pattern": dict(sliding_window=11, window_pattern="SL"), "alibi": dict(alibi=True),
    "learned": dict(pos="learned"), "no positions": dict(pos="none"), "grouped": dict(n_kv_head=2),
    "no qk_norm": dict(qk_norm=False), "diff": dict(diff_attn=True),
    "diff 2": dict(diff_attn=True, diff_attn_version=2), "moe": dict(n_expert=4, ffn_dim=24),
    "moe, bias": dict(n_expert=4, ffn_dim=24, expert_balance="bias", n_shared_expert=1, expert_top_k=1,
                      router_bias=True),
    "mod": dict(mod="topk", mod_capacity=0.4), "mod soft": dict(mod="soft", mod_every=1),
    "yoco": dict(yoco=True, sliding_window=11),
    "value residual": dict(value_residual=True), "value embeddings": dict(value_embeds=True),
    "softcap": dict(softcap=4.0), "attention softcap": dict(attn_softcap=0.5),
    "window theta": dict(sliding_window=11, window_theta=30.0),
    "rotary": dict(rotary_dim=4, rope_pattern="RN", rope_scaling="linear", rope_factor=2.0),
    "parallel": dict(parallel=True, norm_place="both", residual_scale=0.5),
    "norms after": dict(norm_place="after", qk_norm_width=True),
    "scales": dict(embed_scale=30.0, attn_scale=1.0, logit_scale=0.5),
    "biases": dict(norm="layer", norm_bias=True, out_bias=True, tie=False, head_bias=True, mlp="geglu"),
    "sink logits": dict(sink_logits=True, mlp="swiglu_clip"),
}
NO_ROTARY = {"alibi": "none", "learned": "learned", "no positions": "none"}  # ideas, and the `pos` that they have
REFUSED = {("sinks", "mod"): "sinks.*mod=topk", ("alibi", "learned"): "alibi=True.*pos=learned",
           ("yoco", "rotary"): "yoco=True.*rope_pattern='RN'",
           ("no qk_norm", "norms after"): "qk_norm_width=True.*qk_norm=True",
           ("diff", "norms after"): "diff_attn=True.*qk_norm_width=True",
           ("diff 2", "norms after"): "diff_attn=True.*qk_norm_width=True",
           **{(idea, "rotary"): f"rotary_dim=4.*pos={pos}" for idea, pos in NO_ROTARY.items()},
           **{(idea, "window theta"): f"window_theta=30.0.*pos={pos}" for idea, pos in NO_ROTARY.items()}}


def combine(*names) -> dict:
    return {name: value for idea in names for name, value in IDEAS[idea].items()}


PAIRS = [(a, b) for i, a in enumerate(IDEAS) for b in [*IDEAS][i + 1:]
         if all(IDEAS[a].get(name, value) == value for name, value in IDEAS[b].items())]  # not two of one setting
ALL = [*PAIRS, ("alibi", "diff", "moe", "mod", "yoco"), ("sinks", "diff 2", "moe, bias", "mod soft", "grouped"),
       ("alibi", "pattern", "diff", "mod", "moe, bias", "no qk_norm"),
       ("value residual", "value embeddings", "softcap", "mod", "yoco"),
       ("grouped", "mod", "attention softcap", "window theta", "rotary", "parallel", "scales"),
       ("sinks", "diff", "attention softcap", "rotary", "parallel", "scales", "biases"),
       ("moe", "yoco", "attention softcap", "window theta", "norms after", "biases"),
       ("value residual", "value embeddings", "softcap", "moe", "diff", "pattern", "grouped")]


@pytest.mark.parametrize("idea", IDEAS)
def test_idea_recomputed(idea):
    """Activation checkpointing changes neither the loss nor a gradient."""
    model = GPT(GPTConfig(block_size=96, vocab_size=61, n_layer=4, n_head=4, n_embd=32, **IDEAS[idea]), seed=3)
    idx, found = mx.array(np.random.default_rng(0).integers(0, 61, (2, 80))), []
    for model.checkpoint_every in (0, 1):
        loss, gradients = nn.value_and_grad(model, model.loss)(idx, idx)
        found.append((loss, dict(tree_flatten(gradients))))
    assert mx.abs(found[0][0] - found[1][0]) < 1e-6
    for name, gradient in found[0][1].items():
        assert mx.abs(found[1][1][name] - gradient).max() <= 1e-5 * mx.abs(gradient).max() + 1e-9, name


@pytest.mark.parametrize("names", ALL, ids=" + ".join)
def test_pair(names, tmp_path):
    """It is refused in one line that names both; or cached equals uncached by token and in chunks, to seven windows and
    in a batch, the future moves nothing, gradients reach every parameter, and the checkpoint keeps it."""
    settings = dict(block_size=96, vocab_size=61, n_layer=4, n_head=4, n_embd=32, **combine(*names))
    if names in REFUSED:
        with pytest.raises(UserError, match=REFUSED[names]) as error:
            GPTConfig(**settings)
        assert "\n" not in str(error.value)
        return
    model = GPT(GPTConfig(**settings), seed=3)
    for block in model.blocks[1::2]:
        if "predictor" in block:  # so that it chooses about half
            block.predictor.weight = mx.random.normal((1, 32), key=mx.random.key(0)) * 9
            block.threshold = mx.zeros((1,))
    idx = mx.array(np.random.default_rng(0).integers(0, 61, (2, 80)))

    def loss(p):
        model.update(p)
        return model.loss(idx, idx)

    parameters = model.trainable_parameters()
    gradients = dict(tree_flatten(mx.grad(loss)(parameters)))
    model.update(parameters)
    assert [name for name, g in gradients.items() if not 0 < mx.abs(g).max() < mx.inf] == []

    model.eval()
    whole = model(idx)
    for idea in names:  # without it the logits are others: it does something beside the other ideas
        rest = {**dict(block_size=96, vocab_size=61, n_layer=4, n_head=4, n_embd=32),
                **combine(*[name for name in names if name != idea])}
        if (config := GPTConfig(**rest)) != model.config:  # where another idea does not contain it
            others = GPT(config, seed=3).eval()(idx)
            assert mx.abs(others - whole).max() > 1e-3 * mx.abs(whole).max(), f"{idea} changes nothing in {names}"
    for chunks in ((*[1] * 20, 60), (33, 1, 1, 20, 25)):
        cache, logits, start = model.make_cache(), [], 0
        for size in chunks:
            logits.append(model(idx[:, start:start + size], cache=cache))
            start += size
        assert mx.abs(mx.concatenate(logits, axis=1) - whole).max() < 1e-4 * mx.abs(whole).max()
    changed = mx.concatenate([idx[:, :40], (idx[:, 40:] + 7) % 61], axis=1)
    after = model(changed)
    assert mx.abs(after[:, :40] - whole[:, :40]).max() < 1e-5 * mx.abs(whole).max()
    assert (mx.abs(after[:, 40:] - whole[:, 40:]).max(-1) > 1e-3).all()

    # documents of 13, 30, 1 and 36 tokens in one row, as if each were alone
    ends = np.cumsum([0, 13, 30, 1, 36])
    packed = np.concatenate([n * core.DOCUMENT + np.arange(size) for n, size in enumerate(np.diff(ends))])
    if model.config.sinks:
        with pytest.raises(UserError, match="sinks.*packing"):
            model(idx, places=mx.array(packed[None]))
    else:
        alone = [model(idx[:, a:b]) for a, b in zip(ends, ends[1:], strict=False)]
        found = model(idx, places=mx.array(np.stack([packed, packed])))
        assert mx.abs(found - mx.concatenate(alone, axis=1)).max() < 1e-4 * mx.abs(whole).max()

    core.save_checkpoint(str(tmp_path / "c.safetensors"), model, {})
    loaded, _ = core.load_checkpoint(str(tmp_path / "c.safetensors"))
    assert loaded.config == model.config and mx.array_equal(loaded(idx), whole)
