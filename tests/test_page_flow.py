"""webgpu/flow.js: the forward pass as a sum of parts, with numpy's numbers; and the panel that draws it."""
import re

import blas  # noqa: F401  (before mlx)
import browser
import mlx.core as mx
import numpy as np
import pytest
import test_page_ffn as variants
from browser import js
from test_page import LAPTOP, LONG, begin, files, fits, panel, says, write  # noqa: F401
from test_page_model import IDS, flavour, in_page, save

import attention_maps
import model as model_file
from model import load_checkpoint
from quantized import Factored, dense_weight
from tokenizer import Tokenizer

SHOWN = IDS[:11]


@pytest.fixture(scope="module")
def playground(chromium, server, files):  # noqa: F811
    """The playground with the tiny checkpoint, and two prompts of equal lengths."""
    with browser.page(chromium, server) as page:
        begin(page, files)
        page.fill("#look-prompt", "abcd")
        js(page, "() => { document.getElementById('recipient').value = 'abxd'; }")
        yield page


def dense(module) -> np.ndarray:
    """The matrix of a Linear or an Embedding, packed or not, or of LASER's factors, in float64."""
    if isinstance(module, Factored):
        return dense(module.u) @ dense(module.v)
    return np.array(dense_weight(module), np.float64)


def share_of(norm, whole: np.ndarray, x: np.ndarray, config) -> np.ndarray:
    """What an addend x of whole (T, C) gives to norm(whole) if the norm's factor is that of whole."""
    center = (lambda a: a - a.mean(-1, keepdims=True)) if config.norm == "layer" else (lambda a: a)
    factor = 1 / np.sqrt((center(whole) ** 2).mean(-1, keepdims=True) + config.norm_eps)
    return center(x) * factor * np.array(norm.weight, np.float64)


def parts_of(model, ids: list[int]) -> tuple[list, dict]:
    """The stream's states (T, C), in float64; and by part what it adds: embedding, (layer, "mlp"), (layer, head)."""
    config, kept = model.config, {}

    def tap(site, layer, x):
        kept[site, layer] = np.array(x.astype(mx.float32), np.float64)[0]
        return x

    model(mx.array([ids]), tap=tap)
    found = {"embedding": kept["resid", 0]}
    for layer, block in enumerate(model.blocks):
        found[layer, "mlp"], heads = kept["mlp", layer], kept["heads", layer]  # heads: (H, T, D)
        alone = [y @ w.T for y, w in zip(heads, np.split(dense(block.attn.out), len(heads), axis=1), strict=True)]
        if config.norm_place != "before":
            whole = sum(alone) + (np.array(block.attn.out.bias, np.float64) if "bias" in block.attn.out else 0)
            alone = [share_of(block.attn_post_norm, whole, y, config) for y in alone]
        found |= {(layer, head): y * config.residual_scale for head, y in enumerate(alone)}
    return [kept["resid", i] for i in range(config.n_layer + 1)], found


FLAVOURS = ["default", "gpt2", "phi", "gemma", "after-parallel", "granite", "4-bit", "factors", "order", "experts-one",
            "gpt-oss"]


@pytest.mark.parametrize("name", FLAVOURS)
def test_flow(name, opened, server):
    """The norms and direct contributions of all parts are numpy's, and sum to MLX's logit, with the biases that numpy
    has; the attention is attention_maps.py's."""
    if name in variants.VARIANTS:
        model = variants.VARIANTS[name]().eval()
        path = save(server, f"flow-{name}.safetensors", model)
        model.set_dtype(mx.float32)
    else:
        path, model = flavour(server, name)
    config = model.config
    found = in_page(opened, path, """
        const { flow } = await import("/flow.js"), found = await flow(model, ids);
        const plain = (_, value) => ArrayBuffer.isView(value) ? [...value] : value;
        return JSON.parse(JSON.stringify(found, plain));""", SHOWN, parameters="ids")
    states, parts = parts_of(model, SHOWN)
    logits = np.array(model(mx.array([SHOWN]))[0], np.float64)
    best = logits[:, :257].argmax(-1)
    assert [row["ids"][0] for row in found["rows"][-1]] == best.tolist()
    directions = dense(model.embed if config.tie else model.head)[best] * config.logit_scale
    np.testing.assert_allclose(found["norms"], [np.linalg.norm(x, axis=-1) for x in states], rtol=1e-4)
    given = {"embedding": found["embedding"]}
    for layer in range(config.n_layer):
        given |= {(layer, "mlp"): found["mlp"][layer]} | {(layer, h): x for h, x in enumerate(found["heads"][layer])}
    assert given.keys() == parts.keys()
    total = found["rest"]
    for part, x in parts.items():
        expected = (share_of(model.norm, states[-1], x, config) * directions).sum(-1)
        np.testing.assert_allclose(given[part]["share"], expected, atol=1e-4, rtol=1e-4, err_msg=str(part))
        np.testing.assert_allclose(given[part]["norm"], np.linalg.norm(x, axis=-1), rtol=1e-4, err_msg=str(part))
        total = total + expected
    np.testing.assert_allclose(found["logit"], logits[np.arange(len(SHOWN)), best], atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(total, found["logit"], atol=2e-4, rtol=1e-4)
    if not (config.bias or config.norm_bias or config.head_bias or config.out_bias):
        np.testing.assert_allclose(found["rest"], 0, atol=2e-4)
    for maps, expected in zip(found["maps"], attention_maps.attention_maps(model, mx.array(SHOWN)), strict=True):
        np.testing.assert_allclose(np.reshape(maps, expected["map"].shape), expected["map"], atol=1e-5)


def test_refused(opened, server):
    """An architecture whose layers are no such sum is refused by the name of its setting."""
    path, _ = flavour(server, "default")
    says = in_page(opened, path, """
        const { flow } = await import("/flow.js");
        model.config.mod = "topk";
        return flow(model, [1, 2]).catch((error) => error.message);""")
    assert says.startswith("This panel cannot show a model with mod")


# ---- the panel -------------------------------------------------------------------------------------------------------


def test_panel(page, files):  # noqa: F811
    """The picture of a prompt's last token, and of another one after a click or an arrow key; each part has a sentence,
    and leads to its cell in another panel."""
    page.set_viewport_size(LAPTOP)
    page.add_init_script("""new MutationObserver((_, observer) => {
        if (!document.querySelector("#sheet .t")) return;
        window.firstWord = performance.now();
        observer.disconnect();
    }).observe(document, { childList: true, subtree: true });""")
    begin(page, files)
    assert page.evaluate("""performance.getEntriesByType("resource").every(({ name, startTime }) =>
        !name.includes("page_flow") || startTime > firstWord)""")
    page.fill("#look-prompt", "abcd")
    panel(page, "flow")
    cell = lambda r, c: page.locator(f'#flow [data-r="{r}"][data-c="{c}"]')  # noqa: E731
    assert page.locator("#flow .part").count() == 2 * 3 and page.locator("#flow .word").count() == 5
    assert page.locator("#flow .read").count() == 3 and page.locator("#flow .bars li").count() == 5
    model, meta = load_checkpoint(str(files / "tiny.safetensors"))
    enc = Tokenizer.from_dict(meta["tokenizer"])
    maps = attention_maps.attention_maps(model, mx.array([enc.bos, *enc.encode("abcd").tolist()]))

    def check_lines(at: int):
        """A line for each of a head's four largest weights, if it is over 5%."""
        found = js(page, """() => [...document.querySelectorAll("#flow .attends")].map(({ style, dataset }) =>
            [...dataset.of.split(" ").map(Number), Number(dataset.from), Number(style.getPropertyValue("--s"))])""")
        expected = [(layer + 2, h, t, row[at, t]) for layer, of in enumerate(maps) for h, row in enumerate(of["map"])
                    for t in np.argsort(-row[at])[:4] if row[at, t] >= 0.05]
        np.testing.assert_allclose(found, expected, atol=1e-5)

    result = page.inner_text("#flow .result")
    logit, *addends = (float(text.replace("−", "-")) for text in re.findall(
        r"logit, ([−\d.]+\d), is a sum: embedding ([−+\d.]+), all heads ([−+\d.]+), all MLPs ([−+\d.]+\d)", result)[0])
    assert result.startswith("After d the model predicts") and sum(addends) == pytest.approx(logit, abs=0.03)
    assert "page" not in page.inner_text("#look-wrong")

    cell(3, 1).click()
    assert re.match(r"Layer 1, head 1: (raises|lowers) the logit of “.” directly by \d\.\d\d; adds a vector of norm "
                    r"[\d.]+ .*; reads token \d, “.*”, with \d", page.inner_text(".flow-said"))
    for button in page.locator("#flow button").all():
        assert button.get_attribute("aria-label") or button.inner_text()
    assert page.locator("#flow .attends.lit").count() == page.locator('#flow .attends[data-of="3 1"]').count() > 0
    check_lines(4)

    page.keyboard.press("ArrowRight")  # the MLP, then the state, then a layer down, to the tokens
    assert page.inner_text(".flow-said").startswith("Layer 1's MLP:")
    page.keyboard.press("End")
    assert page.inner_text(".flow-said").startswith("After layer 1: the lens reads")
    for _ in range(2):
        page.keyboard.press("ArrowDown")
    assert page.inner_text(".flow-said").startswith("Embedding: the lens reads")
    page.keyboard.press("ArrowDown")  # to the token of which the picture is
    assert page.inner_text(".flow-said").startswith("Token 4, “d”: the picture shows what is computed after it")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#flow .result").startswith("After b the model predicts")
    assert js(page, "() => document.activeElement.dataset.c") == "2"
    assert page.locator("#flow .word.later").count() == 2
    check_lines(2)
    fits(page)
    assert js(page, "() => document.activeElement.dataset.c") == "2"  # also after the picture was drawn again


@pytest.mark.parametrize("r, c, way, name, at", [
    (3, 0, "Attention", "attention", (1, 0)), (3, 0, "Ablation", "ablation", (1, 3)),
    (2, 2, "Ablation", "ablation", (0, 1)), (3, 3, "Lens", "lens", (2, 4)), (0, 4, "Patching", "patching", (0, 4))])
def test_ways(r, c, way, name, at, playground):
    """Each part leads to its cell of another panel; the predicted token is then the target."""
    page = playground
    panel(page, "flow")
    page.locator(f'#flow [data-r="{r}"][data-c="{c}"]').click()
    page.click(f".flow-said button:has-text('{way}')")
    found = f'#{name} .figure [data-r="{at[0]}"][data-c="{at[1]}"]'
    page.wait_for_selector(f"{found}:focus", timeout=LONG)
    if name == "attention":
        assert page.get_attribute(found, "aria-checked") == "true"
        assert page.inner_text("#attention h3") == "Layer 1, head 0"
    if name in ("ablation", "patching"):
        assert page.input_value("#target") == page.inner_text("#flow .result code >> nth=1", timeout=LONG)


# ---- drawing under settings of sampling ------------------------------------------------------------------------------

SETTINGS = [(1.0, 0, 1.0, 0.0), (0.7, 0, 1.0, 0.0), (1.5, 5, 1.0, 0.0), (1.0, 1, 1.0, 0.0), (1.0, 0, 0.8, 0.0),
            (2.0, 0, 0.5, 0.0), (1.0, 0, 0.0, 0.0), (1.0, 0, 1.0, 0.1), (0.5, 0, 1.0, 0.1), (1.2, 9, 0.9, 0.2),
            (0.8, 200, 0.97, 0.001), (1.0, 999, 1.0, 1.0), (3.0, 7, 0.6, 0.5), (0.0, 5, 0.5, 0.1)]


def drawn(monkeypatch, logits, temperature, top_k, top_p, min_p) -> tuple[np.ndarray, list[int]]:
    """The probability with which sample_token() draws each token, in float64; and how many it keeps."""
    if temperature == 0:
        best = model_file.sample_token(mx.array(logits[None]), None, 0.0)
        return np.eye(len(logits))[best.item()], 1
    monkeypatch.setattr(mx.random, "categorical", lambda logits, key: logits)
    left = np.array(model_file.sample_token(mx.array(logits[None]), None, temperature, top_k, top_p, min_p))[0]
    p = np.exp(left.astype(np.float64) - left.max())
    return p / p.sum(), int((p > 0).sum())


def test_chances(opened, server, monkeypatch):
    """The probability of each token under settings is that with which sample_token() draws it; the logits after a
    prompt are the model's."""
    path, model = flavour(server, "softcap")
    logits, found = in_page(opened, path, """
        const { chances, logitsAfter } = await import("/sampling.js");
        const logits = await logitsAfter(model, ids), all = Array.from(logits, (_, id) => id);
        return [[...logits], settings.map(([temperature, top_k, top_p, min_p]) => {
            const { p, drawn, cutBy, kept } = chances(logits, { temperature, top_k, top_p, min_p });
            return { p: all.map(p), drawn: all.map(drawn), cut: all.map(cutBy), kept };
        })];""", SHOWN, SETTINGS, parameters="ids, settings")
    expected = np.array(model(mx.array([SHOWN]))[0, -1, :257])
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    logits = np.array(logits, np.float32)
    for settings, each in zip(SETTINGS, found, strict=True):
        p, n = drawn(monkeypatch, logits, *settings)
        np.testing.assert_allclose(each["drawn"], p, atol=1e-6, err_msg=str(settings))
        np.testing.assert_allclose(each["p"], np.array(mx.softmax(mx.array(logits))), atol=1e-6)
        assert [cut == "" for cut in each["cut"]] == [share > 0 for share in each["drawn"]] == (p > 0).tolist()
        assert not each["kept"] or list(each["kept"].values())[-1] == n == each["cut"].count("")
        if each["kept"].get("top_k"):
            assert each["kept"]["top_k"] == settings[1] == len(p) - each["cut"].count("top_k")


def test_marks_on_bars(playground, files, monkeypatch):  # noqa: F811
    """Beside the model's probability, each bar shows the one under the present settings, also after a context was cut
    and for an earlier token; a token that is cut off says by which filter. A setting out of range leaves no mark."""
    page = playground
    model, meta = load_checkpoint(str(files / "tiny.safetensors"))
    enc = Tokenizer.from_dict(meta["tokenizer"])
    for name, value in dict(temperature=0.9, top_k=60, seed=6, prompt="abcde").items():
        page.fill(f"#{name}", str(value))
    write(page, 100)  # the context is 80
    written = js(page, "() => [...document.querySelectorAll('#sheet .t')].map(({ textContent }) => textContent)")
    ids = [enc.bos, *enc.encode("abcde").tolist()]
    ids += [enc.encode(text).tolist()[0] if text else enc.bos for text in written]

    def check(start: int, at: int, settings: tuple, words: str):
        """The token ids[at], which was drawn after ids[start:at]."""
        context = ids[start:at]
        says(page, "next-says", words)
        logits = np.array(model(mx.array([context]))[0, -1, :enc.n_vocab])
        p, whole = drawn(monkeypatch, logits, *settings)[0], np.array(mx.softmax(mx.array(logits)))
        marks = js(page, """() => [...document.querySelectorAll("#next li")].map((row) =>
            [...row.querySelectorAll("i")].map((bar) => Number(bar.style.getPropertyValue("--p"))))""")
        labels = page.locator("#next button").evaluate_all("all => all.map((row) => row.ariaLabel)")
        best = np.argsort(-logits)[:5]
        np.testing.assert_allclose(marks[:5], np.stack([whole[best], p[best]], axis=1), atol=1e-4)
        assert ["cut off by" in label for label in labels[:5]] == (p[best] == 0).tolist()
        assert len(labels) == 5 or marks[5] == pytest.approx([whole[ids[at]], p[ids[at]]], abs=1e-4)
        return labels

    # When the context of 80 was full, with 81 tokens, its last 40 were read again: the last token was drawn after 64.
    check(105 - 64, 105, (0.9, 60, 1.0, 0.0), r"^At temperature 0.9, top-k 60 keeps 60 tokens\.$")
    page.locator("#sheet .t").nth(20).click()
    page.wait_for_function("document.querySelector('#next-says').textContent === ''")
    check(0, 26, (0.9, 60, 1.0, 0.0), "top-k 60 keeps 60 tokens")
    page.fill("#top_p", "0.05")
    labels = check(0, 26, (0.9, 60, 0.05, 0.0), r"top-k 60 keeps 60 tokens, then top-p 0.05 keeps [1-4] of these\.$")
    assert "cut off by top-p" in labels[4] and page.locator("#next .cut").count() >= 1
    page.fill("#temperature", "0")
    labels = check(0, 26, (0.0, 60, 0.05, 0.0), "^Temperature 0 always takes the most probable token")
    assert "drawn with 100%" in labels[0] and "cut off by temperature 0" in labels[1]
    page.fill("#temperature", "-1")
    says(page, "next-says", "^$")
    assert page.locator("#next .drawn").count() == 0 and page.inner_text("#write-wrong") == ""
    page.fill("#temperature", "0.8")
    page.fill("#top_p", "1")
    page.fill("#top_k", "0")
    check(0, 26, (0.8, 0, 1.0, 0.0), "^At temperature 0.8, all tokens can be drawn")
    fits(page)
