"""What a head attends to: attention_maps.py and webgpu/habits.js against sums written out here, and against each other
on checkpoints; heads whose habit is known; the visible keys of every variant."""
import re

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
import pytest
from browser import js
from conftest import ROOT
from test_gptq import FLAVOURS
from test_page_model import flavour, in_page, small

import attention_maps
from attention_maps import HABITS, far, habits, stands_out, visible_keys
from model import load_checkpoint
from tokenizer import Tokenizer

LONG = 120_000  # ms, for a busy machine
RNG = np.random.default_rng(3)
TEXT = [50, *(2 * RNG.integers(0, 40, 11).tolist()), 41, 42, *RNG.integers(0, 12, 14).tolist()]  # two copies, and more
IN_PAGE = """async (maps, ids, window) => {
    const { far, habits, rowsOf, standsOut } = await import("/habits.js"), rows = rowsOf(ids, window);
    const heads = maps.map((map) => ({ habits: habits(map, ids.length, rows) })), most = standsOut(heads);
    const told = heads.map(({ habits }) => Object.entries(habits).map(([name, { share, chance, rows }]) =>
        [name, share, chance, rows, far(habits[name])]));
    return [told, most && [heads.indexOf(most.head), most.name]];
}"""


def written_out(weights, ids, window: int) -> dict:
    """The formulas of docs/inside.md, key by key."""
    shares, chances = {name: [] for name in HABITS}, {name: [] for name in HABITS}
    for i in range(len(ids)):
        visible = [k for k in range(i + 1) if not window or i - k < window]
        belong = {"start": lambda k: k == 0, "itself": lambda k, i=i: k == i,
                  "previous": lambda k, i=i: k == i - 1 and k >= 1,
                  "induction": lambda k, i=i: 1 <= k < i and ids[k - 1] == ids[i],
                  "same token": lambda k, i=i: 1 <= k < i and ids[k] == ids[i]}
        for name, belongs in belong.items():
            keys = [k for k in visible if belongs(k)]
            if keys and len(visible) > 1:
                shares[name].append(sum(weights[i][k] for k in keys))
                chances[name].append(len(keys) / len(visible))
    return {name: (np.mean(shares[name]), np.mean(chances[name]), len(shares[name])) if shares[name]
            else (np.nan, np.nan, 0) for name in HABITS}


def head(wanted, ids, window: int, share: float = 0.5) -> np.ndarray:
    """A map that gives this share to wanted(i, k), where a row has such keys, and the rest evenly to visible keys."""
    weights = np.zeros((len(ids), len(ids)), np.float32)
    for i in range(len(ids)):
        visible = [k for k in range(i + 1) if not window or i - k < window]
        keys = [k for k in visible if wanted(i, k)]
        weights[i, visible] = (1 - share * bool(keys)) / len(visible)
        for k in keys:
            weights[i, k] += share / len(keys)
    return weights


@pytest.mark.parametrize("window", [0, 7, 1])
@pytest.mark.parametrize("ids", [TEXT, TEXT[:5], TEXT[:1]], ids=len)
def test_formulas(ids, window, opened):
    """Random maps: both programs give the sums that are written out here."""
    maps = RNG.uniform(0, 1, (2, len(ids), len(ids))).astype(np.float32)
    visible = np.tri(len(ids), dtype=bool) & ~np.tri(len(ids), k=-(window or len(ids)), dtype=bool)
    told, _ = js(opened, IN_PAGE, maps.reshape(2, -1).tolist(), ids, window)
    for each, in_page_told in zip(maps, told, strict=True):
        expected = written_out(each, ids, window)
        found = habits(each, ids, visible)
        assert [*found] == [*expected] == [name for name, *_ in in_page_told]
        np.testing.assert_allclose([*found.values()], [*expected.values()], rtol=1e-6)
        numbers = [[np.nan if n is None else n for n in numbers[:3]] for _, *numbers in in_page_told]
        np.testing.assert_allclose(numbers, [*expected.values()], rtol=1e-6)


def test_known_heads(opened):
    """An artificial head has its habit far above chance in both programs, also with a fifth of its weight, and an even
    head has none. An induction head stands out before one that attends to the start."""
    made = {
        "even": head(lambda i, k: False, TEXT, 0), "start": head(lambda i, k: k == 0, TEXT, 0, 0.9),
        "itself": head(lambda i, k: k == i, TEXT, 0), "previous": head(lambda i, k: k == i - 1, TEXT, 0),
        "induction": head(lambda i, k: 0 < k < i and TEXT[k - 1] == TEXT[i], TEXT, 0, 0.2),
        "same token": head(lambda i, k: 0 < k < i and TEXT[k] == TEXT[i], TEXT, 0)}
    both = head(lambda i, k: 0 < k < i and TEXT[k - 1] == TEXT[i], TEXT, 0)
    both = both * 0.6 + head(lambda i, k: k == 0, TEXT, 0, 1) * 0.4
    visible, maps = np.tri(len(TEXT), dtype=bool), [*made.values(), both]
    found = [habits(each, TEXT, visible) for each in maps]
    told, most = js(opened, IN_PAGE, [each.reshape(-1).tolist() for each in maps], TEXT, 0)
    names = [[name for name, numbers in each.items() if far(*numbers)] for each in found]
    assert names == [[name for name, *_, is_far in each if is_far] for each in told]
    assert names == [[], ["start"], ["itself"], ["previous"], ["induction"], ["same token"], ["start", "induction"]]
    assert stands_out(found) == tuple(most) == (3, "previous")
    few = [0, 1, 6]  # no habit, the start, and induction with the start
    assert stands_out([found[i] for i in few]) == (2, "induction") and stands_out(found[:2]) == (1, "start")
    assert stands_out(found[:1]) is None
    for some in few, [0, 1], [0]:
        expected = stands_out([found[i] for i in some])
        _, most = js(opened, IN_PAGE, [maps[i].reshape(-1).tolist() for i in some], TEXT, 0)
        assert (tuple(most) if most else None) == expected


@pytest.mark.parametrize("name", ["default", "window"])
def test_page_and_script(name, opened, server):
    """The page and attention_maps.py on one checkpoint and prompt."""
    path, model = flavour(server, name)
    ids = TEXT[:38]
    told = in_page(opened, path, """
        const { attention } = await import("/inside.js"), { habits, rowsOf } = await import("/habits.js");
        const T = ids.length, size = T * T, maps = await attention(model, ids);
        return maps.map((map, layer) => [0, 1].map((h) => Object.values(
            habits(map.subarray(h * size, (h + 1) * size), T, rowsOf(ids, model.windowOf(layer))))));""",
        ids, parameters="ids")
    states = attention_maps.record(model, mx.array(ids))
    for layer, named in enumerate(attention_maps.attention_maps(model, mx.array(ids), states)):
        visible = visible_keys(model, states, layer)
        for h, weights in enumerate(named["map"]):
            expected = [*habits(weights, ids, visible).values()]
            numbers = [[each["share"], each["chance"], each["rows"]] for each in told[layer][h]]
            np.testing.assert_allclose(numbers, expected, atol=1e-4)


@pytest.mark.parametrize("settings", [*FLAVOURS, dict(sliding_window=5, sinks=2), dict(yoco=True), dict(mod="topk"),
                                      dict(mod="topk", yoco=True, n_layer=4)], ids=str)
def test_visible_keys(settings):
    """A key is visible where it gets weight."""
    model, idx = small(**settings), mx.array(RNG.integers(0, 64, 30))
    for block in model.blocks:
        if "predictor" in block:  # so that some tokens are chosen
            block.predictor.weight = mx.random.normal((1, model.config.n_embd), key=mx.random.key(3))
            block.threshold = mx.array([0.0])
    states, pairs = attention_maps.record(model, idx), []
    for layer, named in enumerate(attention_maps.attention_maps(model, idx, states)):
        weights = named["map" if "map" in named else "first"]
        visible = visible_keys(model, states, layer)
        assert all(np.array_equal(visible, np.nan_to_num(each) > 0) for each in weights)
        pairs.append(visible.sum())
    assert (min(pairs) < 30 * 31 / 2) == (settings.get("mod") == "topk" or bool(model.config.sliding_window))


def test_panel(page):
    """The page's panel: the sentence and the table of the chosen head have the numbers of attention_maps.py; plus and
    minus change how many tokens are drawn, and the cursor stays in sight; no weight above 0 is called 0%."""
    page.goto(page.server.url)
    page.wait_for_selector("#sheet .t", state="attached", timeout=LONG)
    page.click("#write")  # stop
    page.fill("#look-prompt", "def name(self, name):\n    self.name = name\n    self.name")
    page.click("#tab-attention")
    page.wait_for_selector("#attention .large canvas", timeout=LONG)
    said = page.inner_text("#attention .result")
    layer, h, habit, share, chance = re.match(
        r"Layer (\d), head (\d) stands out: it (.+) \((\d+)% of its weight; by chance ([\d.]+)%\)\.", said).groups()
    model, meta = load_checkpoint(str(ROOT / "webgpu" / "demo.safetensors"))
    enc = Tokenizer.from_dict(meta["tokenizer"])
    ids = [*enc.start, *enc.encode(page.input_value("#look-prompt")).tolist()]
    states = attention_maps.record(model, mx.array(ids))
    found = [habits(weights, ids, visible_keys(model, states, layer)) for layer, named in enumerate(
        attention_maps.attention_maps(model, mx.array(ids), states)) for weights in named["map"]]
    most, name = stands_out(found)
    assert (int(layer), int(h)) == divmod(most, 3) and habit == HABITS[name]
    assert f"{100 * found[most][name][0]:.0f}" == share
    assert float(chance) == pytest.approx(100 * found[most][name][1], abs=0.5)
    lines = page.locator("#attention .habits tr").all_inner_texts()[1:]
    assert [line.split("\t")[0] for line in lines] == [*HABITS]
    far_lines = page.locator("#attention .habits .far th").all_inner_texts()
    assert far_lines == [name for name, numbers in found[most].items() if far(*numbers)]
    short = page.locator("#attention .maps button").all_inner_texts()[(4 - most // 3) * 3 + most % 3]
    assert short == f"{most % 3}: " + ", ".join(far_lines)
    page.focus("#attention .large canvas")
    assert page.is_disabled("text=zoom out")
    for key in "++":
        page.keyboard.press(key)
    assert page.is_enabled("text=zoom out")
    for _ in range(len(ids)):
        page.keyboard.press("ArrowUp")
    assert "Token 0, begin of text, attends to token 0" in page.get_attribute("#attention .large canvas", "aria-label")
    for key in "---":
        page.keyboard.press(key)
    assert page.is_disabled("text=zoom out")
    percents = js(page, """async () => {
        const { percent } = await import("/page_common.js");
        return [0, 1e-9, 0.0001, 0.004, 0.05, 0.2, 1].map(percent);
    }""")
    assert percents == ["0%", "<0.01%", "0.01%", "0.4%", "5.0%", "20%", "100%"]


@pytest.mark.parametrize("T, part", [(4, None), (4, [2, 0, 2]), (300, None), (300, [200, 150, 8])])
def test_drawing(T, part, opened):
    """The opacity of a cell is the root of its weight; where several cells share a pixel, of the largest."""
    weights = np.tril(RNG.uniform(0, 1, (T, T)) ** 4).astype(np.float32)
    row, column, n = part or (0, 0, T)
    size, found = js(opened, """async (weights, T, part) => {
        const { drawMap } = await import("/page_draw.js"), canvas = document.createElement("canvas");
        canvas.style = "width: 150px; height: 100px; color: rgb(10 20 30)";
        document.body.replaceChildren(canvas);
        const side = drawMap(canvas, weights, T, { part }), n = part?.[2] ?? T, size = Math.round(side * n);
        const { data } = canvas.getContext("2d").getImageData(0, 0, size, size);
        return [size, Array.from({ length: size * size }, (_, i) => data[4 * i + 3])];
    }""", weights.reshape(-1).tolist(), T, part)
    assert size == (80 if part else 100)
    cells = weights[row:row + n, column:column + n]
    expected = np.zeros((size, size))
    for y, x in np.ndindex(size, size):
        (above, below), (first, last) = ((p * n // size, max(p * n // size + 1, (p + 1) * n // size)) for p in (y, x))
        expected[y, x] = cells[above:below, first:last].max()
    assert np.abs(np.array(found).reshape(size, size) - 255 * np.sqrt(expected)).max() <= 1
