"""What makes the page easy to show: links to a state of it, the tour, examples, pictures, and a recording for browsers
without WebGPU."""
import json

import blas  # noqa: F401  (before mlx)
import browser
import mlx.core as mx
import numpy as np
import pytest
from browser import js
from conftest import ROOT
from test_page import LAPTOP, LONG, PHONE, begin, files, fits, says  # noqa: F401

import attention_maps
import patching
from draw import prompt_ids
from model import GPT, load_checkpoint
from runs import record_page
from tokenizer import Tokenizer
from tuned_lens import logit_lens


@pytest.fixture(scope="module")
def playground(chromium, server, files):  # noqa: F811
    """The playground with the tiny checkpoint, opened through a link."""
    with browser.page(chromium, server) as page:
        kept = '{"length": "30", "how": "mean", "target": "old"}'
        page.add_init_script(f"localStorage['tinygpt.fields'] ??= '{kept}'")
        page.route("**/demo.safetensors", lambda route: route.fulfill(path=files / "tiny.safetensors"))
        page.goto(page.server.url + "#panel=patching&prompt=ab%0Ac+%2B&seed=7"
                  "&look-prompt=a=b:&recipient=a%3Dc:&target=x")
        page.wait_for_selector("#sheet .t", state="attached", timeout=LONG)
        yield page


def values(page, *ids: str) -> list[str]:
    return [page.input_value(f"#{name}") for name in ids]


# ---- links -----------------------------------------------------------------------------------------------------------


def test_link_opened(playground):
    """A link restores the text and the panel with its figure; what it does not name has its default in the text and in
    that panel, and what was typed elsewhere stays."""
    page = playground
    page.wait_for_selector("#patching .heat", timeout=LONG)
    says(page, "patching", "x has a probability of")
    assert page.inner_text("#sheet").startswith("ab\nc +")
    assert values(page, "prompt", "seed", "look-prompt", "recipient", "target", "site") == [
        "ab\nc +", "7", "a=b:", "a=c:", "x", "resid"]
    assert values(page, "length", "how") == ["200", "mean"]
    columns = page.locator("#patching .heat thead th").all_inner_texts()
    assert [text.split()[-1] for text in columns[-4:]] == ["a", "=", "b→c", ":"]


def test_link_copied(playground):
    """The copied link carries what differs from the defaults and can be read; opening it on another page gives the same
    state, and editing a field afterwards takes it out of the address."""
    page = playground
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    for name, value in dict(prompt="def f(x):\n    return 'a&#%'", seed="3", temperature="0.5").items():
        page.fill(f"#{name}", value)
    page.click("#tab-ablation")
    page.fill("#look-prompt", "ab c")
    page.fill("#target", " d+")
    page.select_option("#how", "skip")
    page.uncheck("#mark")
    page.click("#copy-link")
    says(page, "link-says", "Copied")
    link = js(page, "() => navigator.clipboard.readText()")
    assert link == js(page, "() => location.href")
    assert link.removeprefix(page.server.url) == (
        "/#panel=ablation&prompt=def+f(x):%0A++++return+'a%26%23%25'&mark=off&temperature=0.5&seed=3"
        "&look-prompt=ab+c&target=+d%2B&how=skip")
    before = values(page, "prompt", "seed", "temperature", "look-prompt", "target", "how")
    page.fill("#prompt", "other")
    assert js(page, "() => location.hash") == ""
    page.click("#tab-lens")
    page.check("#mark")
    page.evaluate("(link) => { location.href = link; }", link)
    says(page, "sheet", "^def f")
    assert page.is_visible("#ablation") and page.locator("#sheet.marked").count() == 0
    assert values(page, "prompt", "seed", "temperature", "look-prompt", "target", "how") == before


def test_models(page):
    """Each of the page's models is fetched when it is chosen; a link names the one that is open, and opens it."""
    fetched = []
    page.on("request", lambda request: fetched.append(request.url.split("/")[-1]))
    page.goto(page.server.url)
    page.wait_for_selector("#sheet .t", state="attached", timeout=LONG)
    assert "english.safetensors" not in fetched
    page.click("#models [data-model=english]")
    says(page, "card-name", "english.safetensors")
    says(page, "sheet", "^Once upon a time.")
    assert page.get_attribute("#models [data-model=english]", "aria-pressed") == "true"
    page.click("#copy-link")
    link = js(page, "() => location.hash")
    assert link == ("#panel=lens&model=english&prompt=Once+upon+a+time&length=20"
                    "&look-prompt=She+opened+the+door+and+went+into+the")
    page.click("#models [data-model=python]")
    says(page, "card-name", "demo.safetensors")
    says(page, "sheet", "^class")
    page.evaluate("(link) => { location.hash = link; }", link)
    says(page, "card-name", "english.safetensors")
    says(page, "lens", "predicts ·room")
    page.evaluate("() => { location.hash = 'panel=lens&look-prompt=if+x+is+not'; }")  # of the first model
    says(page, "card-name", "demo.safetensors")
    says(page, "lens", "predicts ·None")


@pytest.mark.parametrize("hash, words", [
    ("panel=nowhere&prompt=x", "no panel “nowhere”"), ("prompt=x&nothing=1", "no field “nothing”"),
    ("prompt=x&temperature=-1", "“temperature” cannot be “-1”"), ("prompt=x&how=never", "“how” cannot be “never”"),
    ("prompt=x&top_k=", "“top_k” cannot be “”"), ("prompt=x&seed=ten", "“seed” cannot be “ten”"),
    ("prompt=x&mark=1", "“mark” cannot be “1”"),
    ("prompt=x&head=1", "“head” cannot be “1”"), ("prompt=x&model=no", "no model “no”"),
    ("prompt=%E9", "not encoded as addresses are"), ("panel=lens&prompt", "“prompt” is no setting")])
def test_link_refused(hash, words, playground):
    """A link with something wrong changes nothing, and a notice says what is wrong."""
    page = playground
    state = """() => [...document.querySelectorAll("[data-keep], [role=tab]")]
        .map((each) => each.value + each.checked + each.ariaSelected)"""
    before = js(page, state)
    page.evaluate("(hash) => { location.hash = hash; }", hash)
    page.wait_for_selector(f"#notices [role=alert]:has-text('{words}')")
    assert js(page, state) == before
    page.click(".notice button")


def test_go_to(playground):
    """goTo sets fields of any panel and says what it cannot do, before it changes anything."""
    page = playground
    told = js(page, """async () => {
        const { goTo } = await import("/page_link.js");
        goTo({ panel: "train", fields: { n_layer: "3" }, look: false });
        try {
            goTo({ panel: "lens", fields: { n_layer: "4", n_head: "0" } });
        } catch (error) {
            return error.message;
        }
    }""")
    assert told == "The field “n_head” cannot be “0”."
    assert page.is_visible("#train") and values(page, "n_layer", "n_head") == ["3", "2"]


# ---- the tour --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo():
    """The page's first model, in float32, and its tokenizer."""
    model, meta = load_checkpoint(str(ROOT / "webgpu" / "demo.safetensors"))
    model.set_dtype(mx.float32)
    return model, Tokenizer.from_dict(meta["tokenizer"])


@pytest.fixture(scope="module")
def opened(chromium, server):
    """The playground with its own model."""
    with browser.page(chromium, server, first_text=20, viewport=LAPTOP) as page:
        page.goto(page.server.url)
        page.wait_for_selector("#sheet .t", state="attached", timeout=LONG)
        yield page


def percent(p: float) -> str:
    """As the page writes it."""
    return f"{100 * p:.{0 if p >= 0.0995 else 1 if p >= 0.00095 else 2}f}%"


def read(model: GPT, ids: list[int], tap=None) -> np.ndarray:
    """Probabilities (V,) of the token after these."""
    logits = patching.last_logits(model, mx.array([ids]), tap) if tap else model(mx.array([ids]))[:, -1]
    return np.array(mx.softmax(logits[0]))


def test_claims(demo, opened):
    """Each figure of the tour is what the Python scripts compute."""
    model, enc = demo
    steps = js(opened, "async () => (await import('/page_tour.js')).STEPS")
    fields = js(opened, """async () => (await import('/page_tour.js')).STEPS.map(
        ({ link }) => Object.fromEntries(new URLSearchParams(link)))""")
    said = [step["look"] + " " + step["why"] for step in steps]
    text = fields[1]["look-prompt"]
    assert [each.get("look-prompt", each.get("prompt")) for each in fields] == [text] * 6
    ids, target = prompt_ids(enc, text, model), enc.encode(" code").tolist()
    assert len(target) == 1 and fields[4]["target"] == fields[5]["target"] == " code"
    p, tokens = read(model, ids), [enc.decode([token]) for token in ids]
    whole = percent(p[target[0]])
    assert p.argmax() == target[0] and f"`·code` has {whole}" in said[0] and np.sort(p)[-2] < 0.01
    assert f"its {model.config.vocab_size:,} tokens" in said[0] and model.config.n_layer == 5

    states = np.array(mx.softmax(logit_lens(model, mx.array([ids])).reshape(6, len(ids), -1)[:, -1], axis=-1))
    best = [enc.decode([int(token)]) for token in states.argmax(-1)]
    assert best[3:] == [" '", " code", " code"] and " code" not in best[:3]  # after layers 2, 3, 4
    assert f"layer 2 it would say `·'`, with {percent(states[3].max())}" in said[1]
    assert f"says `·code`, with {percent(states[4].max())}, and at the end with {whole}" in said[1]

    kept = attention_maps.record(model, mx.array(ids))
    maps = [layer["map"] for layer in attention_maps.attention_maps(model, mx.array(ids), kept)]
    habits = [[attention_maps.habits(head, ids, attention_maps.visible_keys(model, kept, layer)) for head in each]
              for layer, each in enumerate(maps)]
    share, chance, _ = habits[2][0]["previous"]
    assert f"{percent(share)} of its weight is on the previous token, where even weights would give " in said[2]
    assert f" {percent(chance)}." in said[2]
    assert fields[2]["head"] == "2.0" and tokens[-2:] == [" line", ","] and maps[2][0][-1].argmax() == len(ids) - 2
    copied = maps[3][0][-1].argmax()
    assert fields[3]["head"] == "3.0" and tokens[copied - 2:copied + 1] == [" line", ",", " code"]
    assert f"{percent(maps[3][0][-1, copied])} of its weight is on `·code`" in said[3]
    assert attention_maps.far(*habits[3][0]["induction"])

    without = {(layer, head): read(model, ids, patching.ablation(model, "head", layer, head=head))[target[0]]
               for layer in range(5) for head in range(3)}
    assert f"from {whole} to {percent(without[2, 0])}; without layer 3's head 0, to {percent(without[3, 0])}" in said[4]
    assert min(without, key=without.get) == (2, 0) and "Ten of the 15 heads" in said[4]
    assert sum(q > 0.85 for q in without.values()) == 10
    parts = {(site, layer): read(model, ids, patching.ablation(model, site, layer))[target[0]]
             for site in ("attn", "mlp") for layer in range(5)}
    assert min(parts, key=parts.get) == ("mlp", 0)

    other = prompt_ids(enc, fields[5]["recipient"], model)
    corrupt, logits = read(model, other)[target[0]], patching.swap(model, mx.array(ids), mx.array(other))
    found = np.array(mx.softmax(logits, axis=-1))[..., target[0]]
    effect = np.log(found / corrupt) / np.log(p[target[0]] / corrupt)
    assert [i for i in range(len(ids)) if ids[i] != other[i]] == [copied] and (effect[:4, copied] > 0.995).all()
    assert f"`·code` has a probability of {percent(corrupt)}" in said[5] and np.abs(effect[:4, -1]).max() < 0.05
    assert f"({effect[4, -1]:.2f}): `·code` then has {percent(found[4, -1])}" in said[5]


def test_tour(opened):
    """Each step opens the page in its state, by buttons or keys; closing the tour brings back what was typed, and it
    goes on where it was left."""
    page = opened
    page.fill("#prompt", "import ")
    page.fill("#look-prompt", "mine")
    page.press("#tour", "Enter")
    says(page, "sheet", "line, code$")
    bars = page.locator("#next .share:not(.drawn)").all_inner_texts()
    assert page.inner_text(".tour").startswith("Step 1 of 6") and bars[0] == "93%" and float(bars[1].rstrip("%")) < 1
    page.keyboard.press("ArrowRight")  # the focus is in the card
    says(page, "lens", "predicts ·code.* from the state after layer 3 on")
    page.click(".tour .main")
    says(page, "attention", "Layer 2, head 0")
    assert page.inner_text("#attention .large h3") == "Layer 2, head 0"
    page.click(".tour .main")
    page.wait_for_function("document.querySelector('#attention .large h3').textContent === 'Layer 3, head 0'")
    page.click(".tour .main")
    says(page, "ablation", "has a probability of 93% after this prompt. It depends most on layer 0's MLP")
    cell = page.get_attribute("#ablation td[data-r='2'][data-c='3']", "aria-label")
    assert cell == "without layer 2, head 0: −2.26 nats, 9.6%"
    page.click(".tour .main")
    says(page, "patching", "93% after the donor and 0.02% after the recipient.*after layer 3 at , .0.82")
    fits(page)
    page.set_viewport_size(PHONE)
    assert page.is_visible(".tour button.main")
    assert page.locator(".tour").bounding_box()["height"] < PHONE["height"] / 2
    page.set_viewport_size(LAPTOP)
    page.keyboard.press("Escape")
    assert page.locator(".tour").count() == 0 and js(page, "() => document.activeElement.id") == "tour"
    assert values(page, "prompt", "length", "temperature", "look-prompt") == ["import ", "20", "0.8", "mine"]
    assert page.inner_text("#tour") == "Go on with the tour, at step 6"
    page.click("#tour")
    page.wait_for_selector(".tour:has-text('Step 6 of 6')")
    page.reload()  # during the tour
    page.wait_for_selector("#sheet .t", state="attached", timeout=LONG)
    page.click("#tour")
    page.click(".tour >> text=End the tour")
    assert values(page, "prompt", "length", "look-prompt") == ["import ", "20", "mine"]
    assert page.inner_text("#tour") == "Take the tour again"


def test_words(opened):
    """A word of the page leads to its explanation."""
    assert not opened.is_visible("#word-token")
    opened.click("#next-of a")
    assert opened.is_visible("#word-token")
    links = js(opened, """() => [...document.querySelectorAll("a[href^='#word-']")]
        .map(({ hash }) => Boolean(document.querySelector(hash)))""")
    assert len(links) == 4 and all(links)


# ---- without WebGPU --------------------------------------------------------------------------------------------------


def test_recording(chromium, server):
    """Without WebGPU the page shows a recorded text, with the candidates at each token, and a lens, and says so."""
    with browser.page(chromium, server) as page:
        page.add_init_script("Object.defineProperty(Navigator.prototype, 'gpu', { get: () => undefined })")
        page.goto(server.url)
        page.wait_for_selector("#notices :has-text('is a recording')")
        assert "has no WebGPU" in page.inner_text("#notices") and not page.is_visible("#tour")
        kept = json.loads((ROOT / "webgpu" / "recording.json").read_text())
        assert page.inner_text("#sheet").startswith("class")
        assert page.locator("#sheet .t").count() == len(kept["written"])
        page.locator("#sheet .t").nth(9).click()
        said = page.locator("#next li .share").all_inner_texts()
        assert said[:5] == [percent(p) for p in kept["p"][9]]
        assert page.locator("#lens td").count() == 6 * len(kept["lens"]["ids"])
        says(page, "lens", "The model predicts ·name .90%.* only after the last layer")
        page.locator("#next li:not(.taken) button").first.click()
        says(page, "write-wrong", "has no WebGPU")
        assert page.locator("#sheet .t").count() == len(kept["written"])


def test_recorded(demo):
    """The recording is what the model computes, and small."""
    model, enc = demo
    path = ROOT / "webgpu" / "recording.json"
    kept = json.loads(path.read_text())
    assert path.stat().st_size < 60_000 and kept["model"] == "demo.safetensors"
    ids = [*kept["prompt"], *kept["written"]]
    p = np.array(mx.softmax(model(mx.array([ids]))[0, len(kept["prompt"]) - 1:-1], axis=-1))
    assert np.abs(np.take_along_axis(p, np.array(kept["top"]), -1) - np.array(kept["p"])).max() < 1e-4
    assert np.abs(np.sort(p)[:, :-6:-1] - np.array(kept["p"])).max() < 1e-4
    assert all(enc.decode([int(token)]) == text for token, text in kept["tokens"].items())
    again = record_page.record(model, enc, kept["model"])
    assert again["lens"]["ids"] == kept["lens"]["ids"]
    for row, other in zip(again["lens"]["rows"], kept["lens"]["rows"], strict=True):
        assert np.abs(np.array([each["p"] for each in row]) - np.array([each["p"] for each in other])).max() < 1e-4


# ---- examples --------------------------------------------------------------------------------------------------------


def test_examples(opened, files):  # noqa: F811
    """A click on an example computes it; each model has its own, and one that cannot read them has none."""
    page = opened
    page.click("#tab-lens")
    says(page, "examples", "Examples:")  # they come after the first words
    page.click("#models [data-model=english]")
    says(page, "card-name", "english.safetensors")
    page.click("#tab-attention")
    page.click("#examples >> text=a head that copies")
    page.wait_for_function("document.querySelector('#attention .large h3')?.textContent === 'Layer 4, head 2'")
    page.click("#tab-patching")
    page.click("#examples >> text=queen and king")
    says(page, "patching", "·her has a probability of 69% after the donor and 4.0% after the recipient")
    page.set_input_files("#open", files / "tiny.safetensors")
    says(page, "card-name", "tiny.safetensors")
    assert not page.is_visible("#examples")
    page.click("#models [data-model=python]")
    says(page, "card-name", "demo.safetensors")
    assert page.locator("#examples button").count() == 2
    page.click("#tab-train")
    assert not page.is_visible("#examples")


def test_what_examples_show(opened, demo):
    """A target is one token, the most probable one after its prompt; a donor and its recipient have equal lengths and
    different most probable tokens; a head that is named has a habit far above chance."""
    examples = js(opened, "async () => (await import('/page_examples.js')).EXAMPLES")
    assert list(examples) == ["python", "english"]
    for name, panels in examples.items():
        model, meta = load_checkpoint(str(ROOT / "webgpu" / {"python": "demo"}.get(name, name)) + ".safetensors")
        enc = Tokenizer.from_dict(meta["tokenizer"])
        assert {len(each) > 1 for each in panels.values()} == {True} and len(panels) == 5
        for fields in (each for panel in panels.values() for each in panel.values()):
            ids = prompt_ids(enc, fields["look-prompt"], model)
            if "target" in fields:
                assert enc.encode(fields["target"]).tolist() == [read(model, ids).argmax()], fields
            if "recipient" in fields:
                other = prompt_ids(enc, fields["recipient"], model)
                assert len(other) == len(ids) and read(model, other).argmax() != read(model, ids).argmax(), fields
            if "head" in fields:
                layer, head = map(int, fields["head"].split("."))
                kept = attention_maps.record(model, mx.array(ids))
                weights = attention_maps.attention_maps(model, mx.array(ids), kept, [layer])[0]["map"][head]
                found = attention_maps.habits(weights, ids, attention_maps.visible_keys(model, kept, layer))
                assert attention_maps.far(*found["previous"]) or attention_maps.far(*found["induction"]), fields


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_picture(opened):
    """A picture of a heat map has the colour of each cell at its place, its text and a caption, in full width on a
    phone too; the buttons save PNG files, and say when there is nothing to save."""
    page = opened
    page.click("#tab-patching")
    page.click("#examples button")
    page.wait_for_selector("#patching .heat", timeout=LONG)
    page.wait_for_selector("#patching progress", state="detached", timeout=LONG)
    page.set_viewport_size(PHONE)
    wrong = js(page, """async () => {
        const { draw } = await import("/page_picture.js"), figure = document.querySelector("#patching .figure");
        const scroll = figure.querySelector(".scroll"), left = 40;
        scroll.scrollLeft = left;
        const texts = [], { fillText } = CanvasRenderingContext2D.prototype;
        CanvasRenderingContext2D.prototype.fillText = function (text, ...more) {
            texts.push(text);
            return fillText.call(this, text, ...more);
        };
        const canvas = draw(figure, [{ text: "A caption", font: "20px serif" }]), pen = canvas.getContext("2d");
        CanvasRenderingContext2D.prototype.fillText = fillText;
        if (scroll.scrollLeft !== left) return ["it was not scrolled back", scroll.scrollLeft];
        scroll.scrollLeft = 0;
        const box = figure.getBoundingClientRect(), top = 24 + 24 + 12;
        const probe = document.createElement("canvas").getContext("2d");
        const at = (from, x, y) => [...from.getImageData(x, y, 1, 1).data];
        const cells = [...figure.querySelectorAll("td")], wrong = cells.filter((cell) => {
            const rect = cell.getBoundingClientRect();
            probe.fillStyle = getComputedStyle(document.body).backgroundColor;
            probe.fillRect(0, 0, 1, 1);
            probe.fillStyle = getComputedStyle(cell).backgroundColor;
            probe.fillRect(0, 0, 1, 1);
            const is = at(pen, 2 * (24 + rect.left - box.left + 5), 2 * (top + rect.top - box.top + 4));
            const should = at(probe, 0, 0);
            return is.some((value, i) => Math.abs(value - should[i]) > 2) || !texts.includes(cell.textContent);
        });
        scroll.scrollLeft = left;
        const colours = new Set(cells.map((cell) => getComputedStyle(cell).backgroundColor));
        return [wrong.length, cells.length > 20, colours.size > 2, texts.includes("A caption")];
    }""")
    assert wrong == [0, True, True, True]
    page.set_viewport_size(LAPTOP)
    for button, name in ("save-picture", "patching"), ("save-next", "next"):
        with page.expect_download() as saved:
            page.click(f"#{button}")
        assert saved.value.suggested_filename == f"tinygpt-{name}.png"
        head = saved.value.path().read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(head[16:20], "big") >= 2 * 560
    page.click("#tab-steer")
    page.click("#save-picture")
    says(page, "save-picture-wrong", "no figure to save yet")
    page.click("#tab-lens")
    assert not page.is_visible("#save-picture-wrong")


# ---- what the first visit costs --------------------------------------------------------------------------------------


def test_first_load(page):
    """Before the first word, less than 2.5 MB is fetched, and nothing that is needed later: no tour, no examples."""
    sizes = {}
    page.on("response", lambda answer: sizes.update({answer.url.split("/")[-1]: int(answer.headers["content-length"])}))
    page.goto(page.server.url)
    page.wait_for_selector("#sheet .t", state="attached", timeout=LONG)
    early = dict(sizes)
    assert early["demo.safetensors"] > 1_000_000 and sum(early.values()) < 2_500_000
    late = {"page_tour.js", "page_picture.js", "page_recording.js", "recording.json", "english.safetensors", "bench.js"}
    assert not late & set(early)
    print(f"\n{len(early)} files, {sum(early.values()):,} bytes")
    says(page, "examples", "Examples:")
