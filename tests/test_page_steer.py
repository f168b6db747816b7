"""The Steer panel: webgpu/steer.js changes a model while it writes, as steer.py and patching.py do; and the panel as a
user sees it."""
import re

import blas  # noqa: F401  (before mlx)
import browser
import mlx.core as mx
import numpy as np
import pytest
from browser import js
from conftest import ROOT, run
from test_page import LONG, begin, files, fits, says, write  # noqa: F401
from test_page_model import flavour, in_page

import patching
import steer
import steering
from model import generate, load_checkpoint, no_tap, save_checkpoint
from tokenizer import Tokenizer

IDS, OTHER, AT = [*range(7, 37)], [*range(90, 105)], 3  # a prompt, another one, and a position in it


def together(*taps):
    """A tap that calls all of these."""
    def tap(site, layer, x):
        for each in taps:
            x = each(site, layer, x)
        return x
    return tap


# For each change: its lists in the page, and its tap, made of the `state` and the `direction`.
CHANGES = [
    ("[off(model, 1, 'head 1'), off(model, 0, 'mlp')]", lambda model, state, direction: together(
        patching.ablation(model, "head", 1, head=1), patching.ablation(model, "mlp", 0))),
    ("[off(model, 0, 'attn'), off(model, 2, 'block')]", lambda model, state, direction: together(
        patching.ablation(model, "attn", 0), patching.ablation(model, "block", 2))),
    ("[paste(state, { after: 1, first: 5, last: 6 })]", lambda model, state, direction:
        steering.pasting(state, 1, 5, 6)),
    ("[paste(state, { after: 1, first: ids.length })]", lambda model, state, direction:
        steering.pasting(state, 1, len(IDS))),
    ("[add(direction, { after: -1, strength: -0.7, first: ids.length - 1 })]", lambda model, state, direction:
        steering.steering(direction, -1, -0.7, len(IDS) - 1)),
    ("[add(direction, { after: 0, strength: 0.7 }), off(model, 1, 'head 0'), paste(state, { after: 2, first: 20, "
     "last: 29 })]", lambda model, state, direction: together(
        steering.steering(direction, 0, 0.7), patching.ablation(model, "head", 1, head=0),
        steering.pasting(state, 2, 20, 29))),
    ("[add(direction, { after: 1, strength: 0 })]", lambda model, state, direction: no_tap),
]


@pytest.mark.parametrize("name", ["default", "gpt2", "gemma"])
def test_changed_text(name, opened, server):
    """Each kind of change, and several together: greedy text beyond the context, where its second half is read again,
    and the divergence of each token, are those of model.py with a tap; strength 0 changes nothing."""
    path, model = flavour(server, name)
    found = in_page(opened, path, """
        const { Writer } = await import("/gpt.js");
        const { add, Changes, directionOf, off, paste, stateOf } = await import("/steer.js");
        const state = await stateOf(model, other, 1, AT);
        const direction = await directionOf(model, ids, other, 0, { mean: true, skip: 1 }), texts = [];
        for (const list of [LISTS]) {
            const writer = new Writer(model, new Changes(model, list)), text = [];
            const options = { max_new_tokens: 14, temperature: 0, probabilities: true, writer };
            for await (const { token, divergence, unchanged } of model.generate(ids, options)) {
                text.push([token, divergence, unchanged[0][0]]);
            }
            writer.destroy();
            texts.push(text);
        }
        return texts;""".replace("LISTS", ", ".join(lists for lists, _ in CHANGES)).replace("AT", str(AT)),
        IDS, OTHER, parameters="ids, other")
    state = steering.states_of(model, OTHER, 1)[AT]
    direction = steering.direction_of(model, [IDS], [OTHER], 0, "mean", 1)
    n = model.config.block_size - len(IDS) + 1  # tokens before the context is full
    for text, (lists, tap) in zip(found, CHANGES, strict=True):
        tokens, divergences, unchanged = zip(*text, strict=True)
        expected = list(generate(model, IDS, 14, temperature=0, n_vocab=257, tap=tap(model, state, direction)))
        assert list(tokens) == expected, lists
        kl = steer.divergence(model, [*IDS, *tokens[:n]], n, tap(model, state, direction), 257)
        np.testing.assert_allclose(divergences[:n], np.array(kl), rtol=1e-3, atol=1e-5)
        best = mx.argmax(model(mx.array([[*IDS, *tokens[:n - 1]]]))[0, -n:, :257], axis=-1)
        assert list(unchanged[:n]) == best.tolist()
    texts = [[token for token, *_ in text] for text in found]
    assert max(kl for _, kl, _ in found[-1]) < 1e-5 and sum(text != texts[-1] for text in texts) >= 5


# ---- the panel -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def panel(chromium, server, files):  # noqa: F811
    """The panel with the tiny checkpoint, which writes what is most probable."""
    with browser.page(chromium, server) as page:
        begin(page, files)
        page.fill("#temperature", "0")
        page.click("#tab-steer")
        page.wait_for_selector("#steer-examples button", timeout=LONG)
        says(page, "write", "Write")
        yield page


def texts(page, length: int) -> list[str]:
    """Press the button, and wait for both texts, of so many tokens."""
    page.fill("#length", str(length))
    page.evaluate("document.querySelector('#steer .result').textContent = ''")
    page.click("#steer-write")
    page.wait_for_function("document.querySelector('#steer .result').textContent.includes('KL divergence')",
                           timeout=LONG)
    assert page.inner_text("#steer-wrong") == "" and page.inner_text("#steer-write") == "Write both texts"
    return [js(page, f"() => document.getElementById('steer-{side}').textContent") for side in ("plain", "changed")]


def clear(page):
    for _ in range(page.locator("#steer-list button").count()):
        page.locator("#steer-list button").first.click()


def test_panel(panel, files, tmp_path):  # noqa: F811
    """Each kind of change by its fields, one after another and together, writes what MLX writes; messages; a direction
    of steer.py, which another checkpoint's is not."""
    model, meta = load_checkpoint(str(files / "tiny.safetensors"))
    enc = Tokenizer.from_dict(meta["tokenizer"])
    ids, other = ([*enc.start, *enc.encode(text).tolist()] for text in ("def f(x):", "the cat"))

    def expected(*taps) -> str:
        return "def f(x):" + enc.decode(generate(model, ids, 20, temperature=0, n_vocab=enc.n_vocab,
                                                 tap=together(*taps)))

    panel.fill("#steer-prompt", "")
    panel.click("#steer-write")
    says(panel, "steer-wrong", "The prompt is empty")
    panel.fill("#steer-prompt", "def f(x):")
    panel.select_option("#steer-layer", "1")
    panel.select_option("#steer-part", "head 1")
    plain, changed = texts(panel, 20)
    head = lambda: patching.ablation(model, "head", 1, head=1)  # noqa: E731
    assert plain == expected() and changed == expected(head())
    assert panel.inner_text("#steer-list span") == "Off: layer 1, head 1"

    panel.select_option("#steer-kind", "paste")
    panel.fill("#steer-donor", "the cat")
    assert re.search(r"Positions there: 0 .* 7 t\s*\n?Positions here", panel.inner_text("#steer-places"))
    panel.select_option("#steer-after", "0")
    for name, wrong, right, words in (("from", "9", "4", "positions 0 to 7"), ("into", "10", "", "positions 0 to 9")):
        panel.fill(f"#steer-{name}", wrong)
        panel.click("#steer-add")
        says(panel, "steer-wrong", words)
        panel.fill(f"#steer-{name}", right)
    panel.click("#steer-add")
    panel.wait_for_function("document.querySelectorAll('#steer-list li').length === 2", timeout=LONG)
    state = steering.states_of(model, other, 0)[4]
    assert texts(panel, 20)[1] == expected(head(), steering.pasting(state, 0, len(ids)))
    clear(panel)
    assert panel.inner_text("#steer-list") == "none yet: the change that is described below acts alone"

    panel.select_option("#steer-kind", "add")
    panel.click("#steer-add")
    says(panel, "steer-wrong", "The first prompt of the direction is empty")
    panel.fill("#steer-positive", "the cat")
    panel.fill("#steer-negative", "dog")
    panel.select_option("#steer-over", "mean")
    panel.select_option("#steer-since", "last")
    panel.click("#steer-add")
    panel.focus("#steer-list input")
    panel.keyboard.press("End")
    assert panel.inner_text("#steer-list output") == "5.00"
    out = tmp_path / "direction.safetensors"
    steered = run("steer.py", files / "tiny.safetensors", "--prompt=def f(x):", "--positive=the cat", "--negative=dog",
                  "--layer=0", "--over=mean", "--start=-1", "--strength=5", "--temperature=0", "--max_new_tokens=20",
                  f"--out={out}").stdout
    text = re.search(r"---- the changed model\n(.*)\n----", steered, re.S)[1]
    plain, changed = texts(panel, 20)
    assert changed == text != plain
    kl = re.search(r"of ([\d.]+) nats on average, and most at token (\d+)", panel.inner_text("#steer .result"))
    told = re.search(r"mean ([\d.]+) nats, largest [\d.]+ at token (\d+)", steered)
    assert abs(float(kl[1]) - float(told[1])) < 0.01 and kl[2] == told[2]
    clear(panel)
    panel.set_input_files("#open", out)  # as a file that is dropped
    says(panel, "steer-list", "Added to the state after layer 0 .*: the direction in direction.safetensors")
    panel.focus("#steer-list input")
    panel.keyboard.press("End")
    assert texts(panel, 20)[1] == text
    other_model = tmp_path / "other.safetensors"
    model.norm.weight = model.norm.weight + 1
    save_checkpoint(str(other_model), model, meta)
    run("steer.py", other_model, "--prompt=a", "--positive=b", "--negative=c", "--layer=1", f"--out={out}")
    panel.set_input_files("#steer-open", out)
    says(panel, "steer-wrong", "direction.safetensors was made for another checkpoint")
    assert panel.locator("#steer-list li").count() == 1
    panel.set_input_files("#open", other_model)  # the list keeps its change, which says what is wrong
    says(panel, "card-name", "other.safetensors")
    assert not panel.is_visible("#steer-texts")
    panel.click("#steer-write")
    says(panel, "steer-wrong", "direction.safetensors was made for another checkpoint: remove this change")
    clear(panel)
    panel.set_input_files("#open", files / "tiny.safetensors")
    says(panel, "card-name", "tiny.safetensors")


def test_while_it_writes(panel):
    """A strength that is changed, and a change that is removed, act on the tokens that are written from then on; the
    page's own text can be written meanwhile; Stop; the token that is looked at."""
    panel.fill("#steer-prompt", "def f(x):")
    own = write(panel, 12)
    panel.fill("#length", "5000")
    panel.select_option("#steer-kind", "add")
    panel.fill("#steer-positive", "the cat")
    panel.fill("#steer-negative", "dog")
    panel.select_option("#steer-after", "0")
    panel.select_option("#steer-over", "last")
    panel.select_option("#steer-since", "all")
    panel.click("#steer-add")
    panel.wait_for_selector("#steer-list input", timeout=LONG)
    panel.focus("#steer-list input")
    for _ in range(20):
        panel.keyboard.press("ArrowLeft")
    assert panel.inner_text("#steer-list output") == "0.00"
    panel.press("#steer-prompt", "Control+Enter")
    wait = "(n) => document.querySelectorAll('#steer-changed .t').length >= n"
    panel.wait_for_function(wait, arg=8, timeout=LONG)
    kl = "() => parseFloat(document.querySelector('#steer-says').textContent.match(/divergence ([\\d.]+)/)[1])"
    assert js(panel, kl) == 0
    panel.focus("#steer-list input")
    panel.keyboard.press("End")
    panel.wait_for_function(f"({kl})() > 0.005", timeout=LONG)
    assert write(panel, 12) == own
    panel.locator("#steer-list button").click()
    panel.wait_for_function(f"({kl})() < 0.005", timeout=LONG)
    assert panel.inner_text("#steer-write") == "Stop"
    panel.click("#steer-write")
    says(panel, "steer", "Stopped. .*Seed")
    said = panel.inner_text("#steer .result")
    n, first = panel.locator("#steer-changed .t").count(), int(re.search(r"Token (\d+) is the first", said)[1])
    assert first > 8 and panel.inner_text("#steer-write") == "Write both texts"
    assert panel.locator("#steer-changed .differs").first.get_attribute("data-i") == str(first - 1)
    assert panel.inner_text("#steer-says").startswith(f"Token {first} of {n}, KL divergence")
    panel.focus("#steer-scrub")
    panel.keyboard.press("ArrowRight")
    assert re.match(rf"Token {first + 1} of {n}, KL divergence [\d.]+ nats: .", panel.get_attribute(
        "#steer-scrub", "aria-valuetext"))
    assert panel.locator("#steer-next li.taken").count() == 1 <= panel.locator("#steer-next-plain li").count()
    fits(panel)


def test_examples(page):
    """With the page's own model: a head that copies is switched off, a pasted state brings its name, and a direction
    brings its subject."""
    (page.server.folder / "demo.safetensors").write_bytes((ROOT / "webgpu" / "demo.safetensors").read_bytes())
    begin(page)
    page.fill("#temperature", "0")
    page.click("#write")
    page.click("#tab-steer")
    found = []
    for i, length in enumerate([2, 2, 16]):
        page.fill("#length", str(length))
        page.locator("#steer-examples button").nth(i).click()
        says(page, "steer", f"^(?=[^]*{['Off', 'Pasted', 'Added'][i]})[^]*nats on average")
        found.append([page.inner_text(f"#steer-{side}") for side in ("plain", "changed")])
    assert [re.search(r"= (\w+)", text)[1] for text in (*found[0], *found[1])] == ["name", "None", "value", "name"]
    assert [bool(re.search("socket|server|client|address", text)) for text in found[2]] == [False, True], found[2]
    assert js(page, "async () => (await import('/page_common.js')).page.gpu.errors") == []
