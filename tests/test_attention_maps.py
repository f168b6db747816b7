"""attention_maps.py: maps times values equal the heads' outputs in every variant; routing; the page."""
import base64
import json
import re
import zlib
from functools import partial
from html import escape

import blas  # noqa: F401  (before mlx)
import conftest
import mlx.core as mx
import numpy as np
import pytest
from test_gptq import FLAVOURS, checkpoint

import attention_maps
from lora import base_fingerprint
from model import GPT, GPTConfig, save_checkpoint
from tokenizer import byte_tokenizer

IDX = mx.array(np.random.default_rng(0).integers(0, 64, 30))


@pytest.mark.parametrize("settings", [
    *FLAVOURS, dict(sliding_window=5, sinks=2), dict(sliding_window=5, sinks=2, alibi=True), dict(n_kv_head=1),
    dict(yoco=True), dict(mod="topk"), dict(mod="soft"), dict(diff_attn=True, diff_attn_version=2, mod="topk"),
    dict(mod="topk", yoco=True), dict(sliding_window=4, block_size=300, long=True), dict(sink_logits=True),
    dict(sink_logits=True, diff_attn=True, diff_attn_version=2),
], ids=str)
def test_maps(settings):
    """A map times the values equals the head's output in model.py; with differential attention, before the norm."""
    settings = dict(settings)
    idx = mx.array(np.random.default_rng(0).integers(0, 64, 200)) if settings.pop("long", False) else IDX
    config = GPTConfig(**dict(block_size=32, vocab_size=64, n_layer=4, n_head=2, n_embd=64) | settings)
    model, n, T = GPT(config, seed=1).eval(), config.n_layer // 2, len(idx)
    for block in model.blocks:
        if "predictor" in block:  # so that some tokens are chosen
            block.predictor.weight = mx.random.normal((1, 64), key=mx.random.key(3))
            block.threshold = mx.array([0.0])
        if config.diff_attn and config.diff_attn_version == 1:
            block.attn.lambda_q1 = block.attn.lambda_k1 = mx.full((config.head_dim,), 0.1)
    states, maps = attention_maps.record(model, idx), attention_maps.attention_maps(model, idx)
    for layer, block in enumerate(model.blocks):
        named, heads = maps[layer], np.array(states["heads", layer])[0]
        v = np.array(states["v", n if config.yoco and layer >= n else layer])[0]
        order, count = np.arange(T), T
        if "predictor" in block:
            order, count = attention_maps.order_of(model, layer, states["resid", layer])
            order, count = np.array(order), count.item()
            assert 0 < count < T
            if not (config.yoco and layer >= n):
                v = v[:, np.argsort(order)]
        heads = heads[:, np.argsort(order)][:, np.sort(order[:count])]
        if config.diff_attn:
            weights, v = named["difference"], v if config.diff_attn_version == 2 else np.repeat(
                np.concatenate([v[0::2], v[1::2]], -1), 1, 0)
            sums = [np.nansum(named[name], -1)[:, np.sort(order[:count])] for name in ("first", "second")]
        else:
            weights = named["map"]
            sums = [np.nansum(weights, -1)[:, np.sort(order[:count])]]
        for each in sums:  # the rest of the weight is on the sink logit
            assert (each < 0.999).all() if config.sink_logits else np.allclose(each, 1, rtol=1e-5)
        assert np.isnan(weights).all(-1).sum() == len(weights) * (T - count)
        for row in range(T):
            assert not np.nan_to_num(weights[:, row, row + 1:]).any()  # the future
        read = np.nan_to_num(weights) @ np.repeat(v, len(weights) // len(v), 0)
        read = read[:, np.sort(order[:count])]
        if config.diff_attn and config.diff_attn_version == 1:
            read = np.array(block.attn.head_norm(mx.array(read))) * (1 - block.attn.lambda_0)
        np.testing.assert_allclose(read, heads, atol=2e-5)
    if config.sliding_window and not config.yoco:
        seen = [int((row > 0).sum()) for named in maps for each in named.values() for head in each for row in head]
        assert max(seen) <= config.sliding_window + config.sinks


def test_experts_and_depth():
    """The experts of a token, their weights, and the tokens that a block skips equal those computed here."""
    model = GPT(GPTConfig(block_size=32, vocab_size=64, n_layer=2, n_head=2, n_embd=64, n_expert=4, expert_top_k=2,
                          mod="topk"), seed=1).eval()
    block = model.blocks[1]
    block.predictor.weight, block.threshold = mx.random.normal((1, 64), key=mx.random.key(3)), mx.array([0.0])
    states = attention_maps.record(model, IDX)
    chosen = np.array((states["resid", 1][0] @ block.predictor.weight.T)[:, 0] > 0)
    r = np.array(block.depth_router(states["resid", 1]))[0, :, 0]
    depth = attention_maps.depth(model, states)
    assert depth[0] is None
    np.testing.assert_allclose(depth[1], np.where(chosen, r, 0), rtol=1e-5)
    found = attention_maps.experts(model, states)
    x = np.array(model.blocks[0].mlp_norm(states["resid", 0] + states["attn", 0]))[0]
    logits = x @ np.array(model.blocks[0].mlp.router.weight).T
    assert np.array_equal(np.sort(found[0][0]), np.sort(np.argsort(-logits, -1)[:, :2]))
    two = np.exp(np.take_along_axis(logits, found[0][0], -1))
    np.testing.assert_allclose(found[0][1], two / two.sum(-1, keepdims=True), rtol=1e-4)
    assert np.array_equal((found[1][0] < 0).all(-1), ~chosen)
    soft = GPT(GPTConfig(block_size=32, vocab_size=64, n_layer=2, n_head=2, n_embd=64, n_expert=4, expert_top_k=1,
                         expert_balance="bias", mod="soft"), seed=1).eval()
    soft.blocks[0].mlp.balance = mx.array([0.0, 0, 2, 0])  # all tokens choose expert 2, as p is below 1
    states = attention_maps.record(soft, IDX)
    r = np.array(soft.blocks[1].depth_router(states["resid", 1]), np.float64)[0, :, 0]
    np.testing.assert_allclose(attention_maps.depth(soft, states)[1], 1 / (1 + np.exp(-r)), rtol=1e-5)
    chosen, gates = attention_maps.experts(soft, states)[0]
    assert (chosen == 2).all()
    np.testing.assert_allclose(gates[:, 0], np.array(mx.softmax(states["router", 0][0], axis=-1))[:, 2], rtol=1e-5)


# ---- files -----------------------------------------------------------------------------------------------------------


run = partial(conftest.run, "attention_maps.py")


@pytest.mark.parametrize("settings", [dict(), dict(diff_attn=True), dict(n_expert=3, mod="soft")], ids=str)
def test_script(settings, tmp_path):
    """The table equals figures computed here; a picture is drawn; the page holds every map and loads nothing else."""
    path, model = checkpoint(tmp_path, **settings)
    done = run(path, "--prompt=a <b> c")
    ids = mx.array([256, *b"a <b> c"])
    maps = attention_maps.attention_maps(model.eval(), ids)
    name = "first" if settings.get("diff_attn") else "map"
    each = maps[1][name][0]
    line = re.search(rf"^ +1 +0 {name} " + 5 * r" +([\d.]+)%[* ]" + r" +([\d.]+) +([\d.]+)$", done.stdout, re.M)
    distance = sum(each[i, j] * (i - j) for i in range(8) for j in range(8)) / 8
    bits = -(each * np.log2(np.maximum(each, 1e-30))).sum() / 8
    shares = each[1:, 0].mean(), np.diag(each)[1:].mean(), np.diag(each, -1)[1:].mean(), each[6, 3], each[6, 2]
    expected = *(100 * np.array(shares)), distance, bits  # the only token that stands there twice is the blank
    np.testing.assert_allclose([float(part) for part in line.groups()], expected, atol=0.06)
    chance = np.mean(1 / np.arange(2, 9)), np.mean(1 / np.arange(3, 9))
    told = [100 * share for share in (chance[0], *chance, 1 / 7, 1 / 7)]
    line = re.search(r"^ +chance" + 5 * r" +([\d.]+)%", done.stdout, re.M)
    np.testing.assert_allclose([float(part) for part in line.groups()], told, atol=0.06)
    assert re.findall("^ +([01]) +0 ", done.stdout, re.M) == sorted(2 * "10" if name == "first" else "10", reverse=True)
    assert ("experts of each token" in done.stdout) == ("n_expert" in settings)
    assert all(len(line) <= 80 for line in done.stdout.splitlines()[:-1])
    assert (tmp_path / "ckpt-attention.png").read_bytes().startswith(b"\x89PNG")
    html = (tmp_path / "ckpt-attention.html").read_text()
    assert "http" not in html and "src=" not in html
    data = json.loads(re.search(r"id=data>(.*?)</script>", html, re.S)[1])
    assert len(data["tokens"]) == 8
    expected = [each for named in maps for each in named.values()]
    assert [told["name"].split(",")[0] for told in data["maps"]] == [
        f"layer {layer}" for layer, named in enumerate(maps) for _ in named]
    for told, each in zip(data["maps"], expected, strict=True):
        roots = [unpacked(head["weights"], told["signed"]) for head in told["heads"]]
        steps = 127 if told["signed"] else 255
        np.testing.assert_allclose(roots, np.sign(each) * np.sqrt(np.abs(each)), atol=0.501 / steps)
        assert (np.sign(roots) == np.sign(each)).all()
        assert told["signed"] == ("difference" in told["name"])


def unpacked(text: str, signed: bool) -> np.ndarray:
    """The roots of a map's weights (T, T), with their signs."""
    values = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8).astype(float)
    values = (values - 128) / 127 if signed else values / 255
    T = int(np.sqrt(2 * len(values)))
    whole = np.zeros((T, T))
    whole[np.tril_indices(T)] = values
    return whole


def test_packed():
    """A weight is off by less than a 250th of its root's range, and a tiny one is not 0."""
    rng = np.random.default_rng(0)
    weights = np.tril(rng.uniform(-1, 1, (40, 40)) ** 9).astype(np.float32)
    weights[7] = np.nan
    weights[9, 2], weights[9, 3] = 1e-12, 0
    for signed, each in (True, weights), (False, np.abs(weights)):
        roots = unpacked(attention_maps.packed(each, signed), signed)
        kept = np.nan_to_num(each)
        assert np.abs(roots ** 2 * np.sign(roots) - kept).max() < 1 / (127 if signed else 255)
        assert np.array_equal(np.sign(roots), np.sign(kept)) and roots[9, 2] > 0 == roots[9, 3]


def test_saved(tmp_path):
    """The file holds the maps and tokens, without the one that begins a text if --bos=False; the page tells what the
    maps were computed from."""
    path, model = checkpoint(tmp_path, n_layer=3)
    run(path, "--prompt=a b <b>", "--layers=1-2", f"--save={tmp_path / 'maps.npz'}", "--bos=False")
    maps = attention_maps.attention_maps(model.eval(), mx.array([*b"a b <b>"]))
    with np.load(tmp_path / "maps.npz") as saved:
        assert {*saved.files} == {"map.1", "map.2", "tokens", "texts", "about"}
        assert saved["tokens"].tolist() == [*b"a b <b>"] and "".join(saved["texts"]) == "a·b·<b>"
        about = json.loads(str(saved["about"]))
        for layer in (1, 2):
            np.testing.assert_allclose(saved[f"map.{layer}"], maps[layer]["map"], atol=1e-6)
    assert about["sha256"] == base_fingerprint(model) and about["prompt"] == "a b <b>"
    page = (tmp_path / "ckpt-attention.html").read_text()
    for value in about.values():
        assert f"<code>{escape(value)}</code>" in page
    (tmp_path / "mine.npz").write_text("mine")
    assert "mine.npz exists" in run(path, "--prompt=a", f"--save={tmp_path / 'mine.npz'}", status=2).stderr


def test_layers(tmp_path):
    """--layers shows only these, in the table and on the page, with the numbers that all layers give."""
    path, _ = checkpoint(tmp_path, n_layer=4)
    whole, part = run(path, "--prompt=a b a b"), run(path, "--prompt=a b a b", "--layers=0,2-3")
    rows = [[line for line in done.stdout.splitlines() if re.match(r" +\d +\d ", line)] for done in (whole, part)]
    assert rows[1] == [line for line in rows[0] if not re.match(" +1 ", line)] and len(rows[1]) == 6
    html = (tmp_path / "ckpt-attention.html").read_text()
    assert re.findall('"name": "(layer .)"', html) == ["layer 0", "layer 2", "layer 3"]
    for text in "4", "2-1", "x", "0-9", "-1", "0,":
        assert "write layers from 0 to 3" in run(path, "--prompt=a", f"--layers={text}", status=2).stderr


@pytest.mark.parametrize("settings", [dict(), dict(diff_attn=True, mod="topk")], ids=str)
def test_page(settings, chromium, tmp_path):
    """The page in a browser: the head that is shown, the sentence of its cursor, the habits beside chance, tinted
    tokens; it is used by keyboard."""
    path, model = checkpoint(tmp_path, **settings)
    for block in model.blocks:
        if "predictor" in block:
            block.predictor.weight, block.threshold = mx.random.normal((1, 64), key=mx.random.key(5)), mx.array([0.0])
    save_checkpoint(str(path), model, {"tokenizer": byte_tokenizer().to_dict()})
    prompt = "abcabcab cab"
    run(path, f"--prompt={prompt}")
    ids = [256, *prompt.encode()]
    maps = attention_maps.attention_maps(model.eval(), mx.array(ids))
    page, problems = chromium.new_page(), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda asked: asked.url.startswith(("file:", "data:", "blob:")) or problems.append(asked.url))
    page.goto((tmp_path / "ckpt-attention.html").as_uri())
    page.wait_for_function("document.getElementById('said').textContent")
    names = [f"layer {layer}" + f", {name}" * (name != "map") for layer, named in enumerate(maps) for name in named]
    assert page.locator(".line b").all_inner_texts() == names[::-1]
    page.locator(".line").last.locator("button").last.click()
    head = 0 if settings else 1  # a pair of heads has one map
    shown = "name => document.getElementById('which').textContent === name"
    page.wait_for_function(shown, arg=f"{names[0]}, head {head}")
    first = maps[0]["first" if settings else "map"][head]
    page.focus("#large")
    for key in ["ArrowUp"] * 13 + ["ArrowDown"] * 7 + ["Home", "ArrowRight"]:
        page.keyboard.press(key)
    percent = round(100 * float(first[7, 1]))
    words = f"Token 7, a, attends to token 1, a: {f'{percent}%' if percent else '<1%'}"
    assert page.inner_text("#said") == words and words in page.get_attribute("#large", "aria-label")
    tint = "all => all.map((span) => Number(span.style.getPropertyValue('--s')))"
    np.testing.assert_allclose(page.locator("#strip span").evaluate_all(tint), np.sqrt(first[7]), atol=0.003)
    assert page.locator("#farther").is_disabled()
    page.keyboard.press("+")
    assert page.locator("#farther").is_enabled() and page.inner_text("#said") == words
    rows = page.locator("#habits tr").all_inner_texts()[1:]
    found = attention_maps.habits(first, ids, np.tri(len(ids), dtype=bool))
    assert rows == [f"{name}\t{share:.0%}\t{chance:.0%}" for name, (share, chance, _) in found.items()]
    page.locator(".line button[tabindex='0']").focus()
    page.keyboard.press("ArrowUp")
    page.wait_for_function(shown, arg=f"{names[1]}, head {head}")
    if settings:
        page.locator(".line", has_text="layer 1, first").locator("button").first.click()
        page.wait_for_function("document.getElementById('which').textContent.startsWith('layer 1, first')")
        skipped = int(np.flatnonzero(np.isnan(maps[1]["first"][0]).all(-1))[-1])
        page.focus("#large")
        for key in ["ArrowDown"] * 13 + ["ArrowUp"] * (12 - skipped):
            page.keyboard.press(key)
        assert f"Token {skipped}, " in page.inner_text("#said") and "the layer skips it" in page.inner_text("#said")
    assert not problems
    page.close()


def test_docstring(tmp_path):
    checkpoint(tmp_path, n_layer=4)
    maps = conftest.docstring_use(attention_maps, tmp_path)["maps"]
    assert maps.shape == (2, 3, 3) and np.allclose(maps.sum(-1), 1)


def test_bad_input(tmp_path):
    path, model = checkpoint(tmp_path)
    assert "no prompt" in run(path, status=2).stderr
    assert "the prompt has 41 tokens" in run(path, "--prompt=" + "x" * 40, status=2).stderr
    assert "no checkpoint at" in run(tmp_path / "none", "--prompt=x", status=2).stderr
    model.embed.weight = model.embed.weight * float("nan")
    save_checkpoint(str(path), model, {"tokenizer": byte_tokenizer().to_dict()})
    assert "are not finite" in run(path, "--prompt=x", status=2).stderr
    assert [file.name for file in tmp_path.iterdir()] == ["ckpt.safetensors"]
