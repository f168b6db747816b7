"""The page as a user sees it, in headless Chromium: buttons, fields, files, messages, layout, accessibility."""
import base64
import json
import re
import shutil

import blas  # noqa: F401  (before mlx)
import browser
import mlx.core as mx
import pytest
from browser import js
from conftest import ROOT, run
from mlx.utils import tree_map

import tuned_lens
from conversations import OwnTemplate, chat_entry
from lora import base_fingerprint
from model import GPT, GPTConfig, load_checkpoint, save_arrays, save_checkpoint
from tokenizer import char_tokenizer

LAPTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
SECOND = 1000
LONG = 120 * SECOND  # for a busy machine
TINY = dict(block_size=80, vocab_size=97, n_layer=2, n_head=2, n_embd=32)
MESSAGES = ["write-wrong", "card-wrong", "look-wrong", "train-wrong", "speed-wrong"]


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder of small checkpoints, and of files that are not checkpoints."""
    folder = tmp_path_factory.mktemp("files")
    model = GPT(GPTConfig(**TINY), seed=1)
    printable = "".join(map(chr, range(32, 127))) + "\n"
    meta = {"tokenizer": char_tokenizer(printable).to_dict(), "script": "train.py", "step": 7}
    save_checkpoint(str(folder / "tiny.safetensors"), model, meta)
    whole = (folder / "tiny.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[:-500])
    chat = {"tokenizer": meta["tokenizer"] | {"bos": None}, "template": "own", "chat_template": "{{ messages }}",
            "ends": [*range(20), 95], "script": "gguf_reader.py"}
    save_checkpoint(str(folder / "chat.safetensors"), GPT(GPTConfig(**TINY | {"block_size": 5000}), seed=1), chat)
    template = "{{ '<s>' }}{% for message in messages %}{{ message.content | trim }}{% endfor %}?"
    asked = {**chat, "chat_template": template, **chat_entry(char_tokenizer(printable), OwnTemplate(template, {}))}
    save_checkpoint(str(folder / "asked.safetensors"), model, asked | {"ends": [*range(3)]})
    (folder / "picture.png").write_bytes((ROOT / "docs" / "loss.png").read_bytes()[:5000])
    (folder / "model.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(100))
    (folder / "short.txt").write_text("ten letter")
    (folder / "empty.txt").write_text("")
    save_arrays(str(folder / "adapter.safetensors"), {"a": mx.zeros((2, 2))}, {"version": 1, "adapter": {"rank": 2}})
    save_arrays(str(folder / "config.safetensors"), {"a": mx.zeros((2, 2))}, {"version": 1, "config": "x"})
    wide = TINY | {"n_head": 1, "n_embd": 260}
    save_checkpoint(str(folder / "wide.safetensors"), GPT(GPTConfig(**wide), seed=1), meta)
    broken = GPT(GPTConfig(**TINY), seed=1)
    broken.update(tree_map(lambda p: p * mx.nan, broken.parameters()))
    save_checkpoint(str(folder / "nan.safetensors"), broken, meta)
    lenses = tree_map(lambda p: p + 0.1, tuned_lens.start(model))
    tuned_lens.save_lens(str(folder / "tiny.lenses"), lenses, model, {"base": base_fingerprint(model)})
    return folder


def begin(page, files=None):
    """Open the playground, and wait for a token. With files, the tiny checkpoint replaces the page's own, and the
    device has no subgroups, so that the page does not try faster kernels, which takes seconds in software."""
    if files is not None:
        page.add_init_script("Object.defineProperty(GPUAdapter.prototype, 'features', { value: new Set() })")
        page.add_init_script("""localStorage["tinygpt.fields"] ??= '{"length": "30", "seed": "1"}'""")
        page.route("**/demo.safetensors", lambda route: route.fulfill(path=files / "tiny.safetensors"))
    page.goto(page.server.url)
    page.wait_for_selector("#sheet .t", state="attached", timeout=LONG)


def says(page, place: str, pattern: str):
    """Wait until the element with this id has a text that matches the pattern."""
    page.wait_for_function("([id, pattern]) => new RegExp(pattern).test(document.getElementById(id).textContent)",
                           arg=[place, pattern], timeout=LONG)


def wait_for_run(page, kept: bool, timeout: int = LONG):
    """Wait until a training run is stored, or none is. (wait_for_function treats a promise as true.)"""
    for _ in range(timeout // 200):
        if js(page, "async () => Boolean(await (await import('/page_store.js')).keptRun())") == kept:
            return
        page.wait_for_timeout(200)
    pytest.fail("no run is stored" if kept else "a run is still stored")


def slow_down(page):
    """Each update of a training run waits a tenth of a second: a run without an end leaves the processor to others."""
    js(page, """async () => {
        const { Trainer } = await import("/train.js"), { step } = Trainer.prototype;
        Trainer.prototype.step = async function (...given) {
            await new Promise((resolve) => setTimeout(resolve, 100));
            return step.apply(this, given);
        };
    }""")


def write(page, length: int) -> str:
    """Press the button, wait for this many tokens, and return the text."""
    says(page, "write", "Write")
    page.fill("#length", str(length))
    page.click("#write")
    page.wait_for_function("(n) => document.querySelectorAll('#sheet .t').length === n", arg=length, timeout=LONG)
    says(page, "write", "Write")
    assert page.inner_text("#write-wrong") == ""
    return page.inner_text("#sheet")


@pytest.fixture(scope="module")
def opened(chromium, server, files):
    """A page with the tiny checkpoint, shared by the tests that need no other page."""
    shutil.copy(files / "tiny.safetensors", server.folder / "served here.safetensors")
    with browser.page(chromium, server) as page:
        begin(page, files)
        page.click("#write")
        page.wait_for_selector("#lens .heat", timeout=LONG)
        says(page, "next-says", "emperature")  # the newest token's logits, computed by themselves, are there
        yield page


def panel(page, name: str):
    """Choose a panel by its tab, and wait for its figure."""
    page.click(f"#tab-{name}")
    page.wait_for_selector(f"#{name} .figure > *", timeout=LONG)
    page.wait_for_selector(f"#{name} progress", state="detached", timeout=LONG)


def fits(page):
    """Nothing is wider than the page, on a laptop or a phone, except for elements that scroll."""
    for size in (PHONE, LAPTOP):
        page.set_viewport_size(size)
        wide = js(page, """() => [...document.querySelectorAll("body *")].filter((node) => {
            const { width, right } = node.getBoundingClientRect();
            return width > 1 && right > innerWidth + 1 && !node.closest(".scroll, .tabs, .maps, pre");
        }).map((node) => node.outerHTML.slice(0, 80))""")
        assert wide == [], (size, wide)


# ---- opening ---------------------------------------------------------------------------------------------------------


def test_demo(page):
    """The page writes a text without being asked, and each panel shows a figure after one click, on a laptop and a
    phone."""
    page.set_viewport_size(LAPTOP)
    begin(page)
    first = js(page, "() => performance.now()")
    print(f"\nfirst text after {first / 1000:.1f} s")
    assert first < 30 * SECOND
    page.fill("#length", "24")
    assert page.inner_text("#card-name") == "demo.safetensors"
    assert re.search(r"million.*4 bits, groups of 64.*5, each with 3 heads.*nats", page.inner_text("#card"), re.S)
    page.wait_for_function("document.querySelectorAll('#next li').length >= 5", timeout=LONG)
    shares = [float(text.rstrip("%")) for text in page.locator("#next .share").all_inner_texts() if "<" not in text]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) < 101
    page.click("#write")  # stop
    for name, cells in ("lens", 6 * 13), ("attention", 5 * 3), ("ablation", 5 * 6), ("patching", 5 * 13):
        panel(page, name)
        assert page.locator(f"#{name} .heat td, #{name} .maps button").count() == cells
        assert re.search("name|stands out", page.inner_text(f"#{name} .result"))
        assert page.locator(f"#{name} .heat td").all_inner_texts().count("NaN") == 0
        fits(page)
    assert [page.inner_text(f"#{place}") for place in MESSAGES] == [""] * 5
    assert js(page, "async () => (await import('/page_common.js')).page.gpu.errors") == []


def test_looking_back(opened):
    """The candidates at an earlier token; another candidate is chosen, and the model goes on from it."""
    opened.fill("#prompt", "class Stack:\n")
    write(opened, 30)
    assert opened.inner_text("#sheet").startswith("class Stack:")
    opened.locator("#sheet .t").nth(9).click()
    assert opened.inner_text("#scrub-says") == "Token 10 of 30"
    opened.locator("#scrub").press("ArrowLeft")
    assert opened.inner_text("#scrub-says") == "Token 9 of 30"
    assert re.match("token 9: .* Best: .*%", opened.get_attribute("#scrub", "aria-valuetext"))
    other = opened.locator("#next li:not(.taken) button").first
    assert "take this one" in other.get_attribute("aria-label")
    other.click()
    opened.wait_for_function("document.querySelectorAll('#sheet .t').length === 30", timeout=LONG)
    says(opened, "write", "Write")
    assert opened.get_attribute("#sheet .t.forced", "data-i") == "8"
    texts = []
    for seed in (1, 2, 1):
        opened.fill("#seed", str(seed))
        texts.append(write(opened, 20))
    assert texts[0] == texts[2] != texts[1]


def test_kept(page, files):
    """Fields and colours are restored when the page is opened again."""
    begin(page, files)
    page.fill("#prompt", "import ")
    page.fill("#top_k", "7")
    page.click("#tab-patching")
    page.fill("#recipient", "mine")
    page.click("#theme")
    page.click("#tab-train")
    page.wait_for_function("document.querySelector('#text').value", timeout=LONG)  # the text to begin with
    page.fill("#text", "my own text")
    page.reload()
    page.wait_for_selector("#sheet .t", state="attached", timeout=LONG)
    page.click("#tab-train")
    assert [page.input_value(f"#{name}") for name in ("prompt", "top_k", "recipient")] == ["import ", "7", "mine"]
    page.wait_for_function("document.querySelector('#text').value === 'my own text'")
    assert page.get_attribute("html", "data-theme") == "dark" and page.inner_text("#sheet").startswith("import")


def test_typed_at_once(page, files):
    """What is typed before the text to begin with has come is kept, even if that text can no longer come."""
    held = []
    page.route("**/inside.js", lambda route: held.append(route) if route.request.resource_type == "fetch" else
               route.continue_())
    begin(page, files)
    page.click("#tab-train")
    page.fill("#text", "my own text")
    for route in held:
        route.abort()
    says(page, "train-wrong", "lost the connection")
    page.unroute("**/inside.js")
    page.problems.clear()  # the console tells of the lost file
    page.reload()
    page.wait_for_selector("#sheet .t", state="attached", timeout=LONG)
    page.click("#tab-train")
    page.wait_for_function("document.querySelector('#text').value === 'my own text'", timeout=LONG)


def test_stored_by_two_pages(page):
    """A page that has not heard yet what another one has stored, as a reload may begin in another process, keeps it."""
    found = js(page, """async () => {
        const { recall, remember } = await import("/page_store.js"), { getItem } = Storage.prototype;
        remember("text", "typed");
        Storage.prototype.getItem = () => null;
        remember("fields", { seed: "3" });
        Storage.prototype.getItem = getItem;
        return [recall("text"), recall("fields").seed, recall("nothing") === undefined];
    }""")
    assert found == ["typed", "3", True]


def test_a_model_of_conversations(page, files):
    """The card says that the page continues its prompt without a template, and reads a part of a long context, which
    ?context=N changes; a text is over at each of the model's ends; without a first token, an empty prompt is told."""
    begin(page, files)
    page.set_input_files("#open", files / "chat.safetensors")
    says(page, "card-name", "chat.safetensors")
    card = page.inner_text("#card")
    assert "2,048 of its 5,000 tokens" in card and "a form without Jinja: python sample.py applies it" in card
    page.wait_for_selector("#sheet .end", timeout=LONG)
    says(page, "write", "Write")
    page.fill("#prompt", "")
    page.click("#write")
    says(page, "write-wrong", "nothing to continue")
    page.goto(page.server.url + "?context=4000")
    page.wait_for_selector("#sheet .t", state="attached", timeout=LONG)
    page.set_input_files("#open", files / "chat.safetensors")
    says(page, "card", "4,000 of its 5,000 tokens")


def test_served(opened, files, server):
    """The server's checkpoints are listed by name; after the message that one is gone, the page still works."""
    opened.click("#served summary")
    opened.click("#served button:has-text('served here')")
    says(opened, "card-name", "served here.safetensors")
    (server.folder / "served here.safetensors").unlink()
    opened.click("#served button:has-text('served here')")
    says(opened, "card-wrong", "could not be fetched")
    opened.problems.clear()  # the expected 404
    opened.set_input_files("#open", files / "tiny.safetensors")
    says(opened, "card-name", "tiny.safetensors")
    write(opened, 5)


# ---- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, words", [
    ("picture.png", "neither a checkpoint"), ("config.safetensors", "make no model"), ("cut.safetensors", "cut short"),
    ("adapter.safetensors", "an adapter"),
    ("wide.safetensors", "heads of width 260"), ("nan.safetensors", "infinite numbers or NaN"),
    ("model.gguf", "gguf_reader.py")])
def test_wrong_file(name, words, opened, files):
    """A message says what is wrong; the model stays open and still writes."""
    before = opened.inner_text("#card-name")
    opened.set_input_files("#open", files / name)
    says(opened, "card-wrong", words)
    assert opened.inner_text("#card-name") == before
    write(opened, 5)


def test_wrong_fields(opened):
    """A prompt beyond the context, numbers out of range, no target, no pairs: a message, and no result is lost."""
    text = opened.inner_text("#sheet")
    for field, value, words in (("prompt", "x" * 100, "101 tokens, and this model's context is 80"),
                                ("temperature", "-1", "Temperature must be a number from 0 to 5"),
                                ("length", "", "Length must be a whole number")):
        before = opened.input_value(f"#{field}")
        opened.fill(f"#{field}", value)
        opened.click("#write")
        says(opened, "write-wrong", words)
        opened.fill(f"#{field}", before)
        assert opened.inner_text("#sheet") == text
    opened.fill("#look-prompt", "abcd")
    opened.click("#tab-ablation")
    opened.fill("#target", "")
    opened.click("#look")
    says(opened, "look-wrong", "no target")
    opened.fill("#target", "ef")
    opened.click("#look")
    says(opened, "ablation", "The target has 2 tokens; this is about the first")
    opened.click("#tab-patching")
    opened.fill("#recipient", "abc")
    opened.click("#look")
    says(opened, "look-wrong", "5 and 4 tokens: make them equally long")
    for pairs, words in ("1-2", "no pair of positions"), ("1:2, 9:1", "9:1 are not positions"):
        opened.fill("#pairs", pairs)
        opened.click("#look")
        says(opened, "look-wrong", words)
    opened.fill("#pairs", "1:1, 4:3")
    opened.click("#look")
    opened.wait_for_selector("#patching .heat", timeout=LONG)
    assert opened.locator("#patching td").count() == 4 and opened.inner_text("#look-wrong") == ""
    opened.fill("#pairs", "")
    answers = []
    for donor, recipient in ("abcd", "dbca"), ("dbca", "abcd"):  # after one of them the target is less probable
        opened.fill("#look-prompt", donor)
        opened.fill("#recipient", recipient)
        opened.evaluate("document.querySelector('#patching .result').textContent = ''")
        opened.click("#look")
        opened.wait_for_function("document.querySelector('#patching .result')?.textContent.includes('after the donor')")
        opened.wait_for_selector("#patching progress", state="detached", timeout=LONG)
        answers.append("no answer that could come back" in opened.inner_text("#patching .result"))
    assert sorted(answers) == [False, True]
    opened.fill("#look-prompt", "abcd")
    opened.click("#tab-lens")
    write(opened, 5)


def test_message_stays(opened):
    """What the page computes by itself, the logits of a token looked at, leaves the message of a wrong field."""
    write(opened, 5)
    before = opened.input_value("#temperature")
    opened.fill("#temperature", "-1")
    opened.click("#write")
    says(opened, "write-wrong", "Temperature must be")
    js(opened, """async () => {
        const { model } = (await import("/page_common.js")).page, { once } = model;
        model.once = async function (...all) {
            const found = await once.apply(this, all);
            window.computed = true;
            return found;
        };
        document.getElementById("scrub").value = 2;
        document.getElementById("scrub").dispatchEvent(new Event("input"));
    }""")
    opened.wait_for_function("window.computed", timeout=LONG)
    says(opened, "doing", "Ready")
    assert "Temperature must be" in opened.inner_text("#write-wrong")
    opened.fill("#temperature", before)
    js(opened, "async () => { delete (await import('/page_common.js')).page.model.once; }")
    write(opened, 5)


def test_chat(opened, files):
    """A model with a chat template gets the prompt as a message, or as a plain text where that is chosen; others have
    no choice."""
    prompt = """async () => {
        const { model } = (await import("/page_common.js")).page;
        return model.enc.decode(model.promptOf(" Hi "));
    }"""
    assert not opened.is_visible("#form") and opened.inner_text("#prompt-label") == "Prompt"
    opened.set_input_files("#open", files / "asked.safetensors")
    says(opened, "card-name", "asked.safetensors")
    assert "answers your prompt through its own chat template" in opened.inner_text("#card")
    assert opened.is_visible("#form") and opened.inner_text("#prompt-label") == "Message"
    assert js(opened, prompt) == "<s>Hi?"
    read = """async () => {
        const { GPT } = await import("/gpt.js"), { generate } = GPT.prototype;
        GPT.prototype.generate = function (ids, ...more) {
            window.read = this.enc.decode(ids);
            return generate.call(this, ids, ...more);
        };
    }"""
    js(opened, read)
    for form, text in (("chat", "<s>Hi?"), ("text", " Hi ")):
        opened.select_option("#form", form)
        assert opened.inner_text("#prompt-label") == {"chat": "Message", "text": "Prompt"}[form]
        opened.fill("#prompt", " Hi ")
        says(opened, "write", "Write")
        opened.click("#write")
        opened.wait_for_function("(text) => window.read === text", arg=text, timeout=LONG)
        assert opened.locator("#sheet .message").count() == (form == "chat")
    says(opened, "write", "Write")
    opened.select_option("#form", "chat")
    opened.fill("#prompt", " ")
    opened.click("#write")
    says(opened, "write-wrong", "type a message")
    opened.fill("#prompt", "class")
    fits(opened)
    opened.set_input_files("#open", files / "tiny.safetensors")
    says(opened, "card-name", "tiny.safetensors")
    assert not opened.is_visible("#form")


def test_stop(page, files):
    """A figure that takes long shows the time that is left and the layers that are done, and a button stops it; then
    the model that is opened next has its own figure."""
    begin(page, files)
    js(page, """async () => {
        const { GPT } = await import("/gpt.js"), { once } = GPT.prototype;
        GPT.prototype.once = async function (build) {
            await new Promise((resolve) => setTimeout(resolve, window.wait ?? 0));
            return once.call(this, build);
        };
        window.wait = 700;
    }""")
    page.fill("#look-prompt", "abcd")
    js(page, "() => { document.getElementById('recipient').value = 'abxd'; }")
    for name, parts, cells, last in (("ablation", "10 parts are switched off in turn", 2 * 5, "layer 1"),
                                     ("patching", "10 states", 2 * 5, "after layer 0")):
        page.click(f"#tab-{name}")
        says(page, name, f"{parts}.*: about \\d+ (s|min) left")
        page.wait_for_selector(f"#{name} td:not(:empty)", timeout=LONG)  # the last layer is done
        page.click(f"#{name} button:has-text('Stop')")
        says(page, name, f"Stopped: the rows below “{last}” are not computed")
        assert page.locator(f"#{name} tbody th").all_inner_texts()[0] == last
        texts = page.locator(f"#{name} td").all_inner_texts()
        assert len(texts) == cells and all(texts[:5]) and not any(texts[5:])  # the last layer is the first row
        assert page.locator(f"#{name} progress").count() == 0 and page.inner_text("#look-wrong") == ""
    page.click("#look")  # and another model is opened while it runs
    says(page, "patching", "left")
    js(page, "() => { window.wait = 0; }")
    page.set_input_files("#open", files / "chat.safetensors")
    says(page, "card-name", "chat.safetensors")
    assert page.inner_text("#look-wrong") == ""
    page.click("#tab-ablation")
    page.wait_for_function("document.querySelectorAll('#ablation td:not(:empty)').length === 10", timeout=LONG)
    assert "Stopped" not in page.inner_text("#ablation .result")


def test_names(opened):
    """States of the residual stream and parts of layers have one name each, and layer 0 stands at the bottom."""
    opened.fill("#look-prompt", "abcd")
    js(opened, "() => Object.assign(document.getElementById('recipient'), { value: 'abxd' })")
    js(opened, "() => Object.assign(document.getElementById('target'), { value: 'e' })")
    rows = {}
    for name in ("lens", "ablation", "patching"):
        opened.click(f"#tab-{name}")
        opened.click("#look")
        says(opened, name, "predicts|depends most|probability of")
        rows[name] = opened.locator(f"#{name} .heat tr th:first-child").all_inner_texts()
    opened.select_option("#site", "mlp")
    opened.wait_for_function("document.querySelector('#patching .heat tbody th')?.textContent.includes('MLP')")
    rows["mlp"] = opened.locator("#patching .heat tr th:first-child").all_inner_texts()
    opened.select_option("#site", "resid")
    assert rows == {
        "lens": ["residual stream", "after layer 1", "after layer 0", "embedding"],
        "ablation": ["without", "layer 1", "layer 0"],
        "patching": ["residual stream", "after layer 0", "embedding"],
        "mlp": ["output of", "layer 1's MLP", "layer 0's MLP"]}
    parts = opened.locator("#ablation .heat thead th").all_text_contents()
    assert parts == ["without", "attention", "MLP", "whole layer", "head 0", "head 1"]


def test_lenses(opened, files):
    """A dropped sidecar file opens the lens panel; the tuned lens differs from the logit lens."""
    opened.fill("#look-prompt", "abcd")
    js(opened, """(bytes) => {
        const dataTransfer = new DataTransfer();
        dataTransfer.items.add(new File([Uint8Array.from(atob(bytes), (byte) => byte.charCodeAt(0))], "tiny.lenses"));
        for (const name of ["dragover", "drop"]) {
            document.body.dispatchEvent(new DragEvent(name, { dataTransfer, bubbles: true }));
        }
    }""", base64.b64encode((files / "tiny.lenses").read_bytes()).decode())
    says(opened, "lens", "through tuned lenses")
    tuned = opened.locator("#lens td").evaluate_all("all => all.map((cell) => cell.ariaLabel)")
    opened.uncheck("#tuned")
    says(opened, "lens", "through the logit lens")
    plain = opened.locator("#lens td").evaluate_all("all => all.map((cell) => cell.ariaLabel)")
    assert len(tuned) == len(plain) == 3 * 5 and tuned != plain
    assert tuned[:5] == plain[:5]  # the model's own predictions


def test_no_webgpu(chromium, server):
    """Without WebGPU the page says so, and how to get it; buttons give this message too."""
    with browser.page(chromium, server) as page:
        page.add_init_script("Object.defineProperty(Navigator.prototype, 'gpu', { get: () => undefined })")
        page.goto(server.url)
        page.wait_for_selector("#notices [role=alert]:has-text('has no WebGPU')")
        page.click("#write")
        says(page, "write-wrong", "has no WebGPU")
        page.click("#tab-train")
        page.click("#start")
        says(page, "train-wrong", "has no WebGPU")


def test_lost_device(chromium, server, files):
    """After the device is lost, the page says so, opens it again, and writes with the model that was open."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    own = chromium.browser_type.launch(executable_path=path, args=browser.ARGUMENTS)
    try:
        with browser.page(own, server) as page:
            begin(page, files)
            page.fill("#prompt", "typed")
            own.new_browser_cdp_session().send("Browser.crashGpuProcess")
            page.wait_for_selector("#notices [role=alert]:has-text('lost')", timeout=LONG)
            page.click("#write")
            says(page, "write-wrong", "was lost")
            page.click("text=Reload the device")
            page.wait_for_selector(".notice", state="detached")
            page.wait_for_function("document.querySelector('#sheet').textContent.startsWith('typed')", timeout=LONG)
            page.wait_for_selector("#sheet .t", state="attached", timeout=LONG)
            assert page.inner_text("#card-name") == "demo.safetensors"
    finally:
        own.close()


def test_destroyed_device(page, files):
    """If the device is lost soon after the start of a training run, the page offers the stored run on the new device,
    and no message about the loss is left."""
    begin(page, files)
    slow_down(page)
    page.click("#tab-train")
    page.fill("#text", "the cat sat on the mat. a dog ran to the cat. " * 40)
    for name, value in dict(n_layer=1, n_head=1, n_embd=16, block_size=16, batch_size=1, max_iters=100000).items():
        page.fill(f"#{name}", str(value))
    page.click("#start")
    wait_for_run(page, True, 15 * SECOND)
    js(page, "async () => (await import('/page_common.js')).page.gpu.device.destroy()")
    page.wait_for_selector("#notices [role=alert]:has-text('lost')", timeout=LONG)
    says(page, "train-wrong", "was lost")
    page.click("text=Reload the device")
    page.wait_for_selector(".notice:has-text('A training run on your text was stored')", timeout=LONG)
    assert page.inner_text("#train-wrong") == ""
    page.click("text=Continue")
    says(page, "m-step", r"^\d[\d,]* of 100,000")
    page.click("#pause")
    says(page, "train-says", "Paused at update")


# ---- training --------------------------------------------------------------------------------------------------------


def test_training(page, files, tmp_path):
    """Training from scratch runs, pauses, resumes and lowers the loss; it goes on in the next tab; the scripts read the
    two files that it gives."""
    begin(page, files)
    page.click("#tab-train")
    page.click("#write")
    page.set_input_files("#open", files / "short.txt")
    says(page, "text-says", "short.txt, 10 characters")
    page.click("#start")
    says(page, "train-wrong", "The text has 10 tokens, and windows of 64 need at least")
    page.fill("#text", "typed")
    page.set_input_files("#open", files / "empty.txt")
    says(page, "train-wrong", "empty.txt is empty")
    assert page.input_value("#text") == "typed"
    page.set_input_files("#open", files / "short.txt")
    page.wait_for_function("document.querySelector('#text').value === 'ten letter'")
    page.click("#text-back")
    assert page.input_value("#text") == "typed" and page.inner_text("#text-says") == "5 characters"
    page.fill("#text", "the cat sat on the mat. a dog ran to the cat. " * 40)
    for name, value in dict(n_layer=1, n_head=2, n_embd=18, block_size=16, batch_size=2, max_iters=200,
                            sample_every=40, learning_rate=0.02).items():
        page.fill(f"#{name}", str(value))
    page.click("#start")
    says(page, "train-wrong", "width of 18 cannot be divided")
    page.fill("#n_embd", "16")
    page.press("#start", "Enter")
    says(page, "m-step", r"^([89]|\d\d+) of 200")
    assert js(page, "() => document.activeElement.id") == "pause"  # since the pressed button is hidden
    page.keyboard.press("Enter")
    says(page, "train-says", "Paused at update")
    assert js(page, "() => document.activeElement.id") == "resume"
    step = int(re.search(r"update (\d+)", page.inner_text("#train-says"))[1])
    assert 8 <= step < 200 and page.is_disabled("#n_embd")
    assert page.is_enabled("#resume") and not page.is_visible("#start")
    assert page.locator("#samples li").count() == step // 40

    page.reload()
    page.wait_for_selector(f".notice:has-text('update {step} of 200')", timeout=LONG)
    page.click("text=Continue")
    says(page, "train-says", "All updates are done at update 200. The run is stored")
    labels = page.locator("#samples b").all_inner_texts()
    assert [label.split(",")[0] for label in labels] == [f"update {step}" for step in (200, 160, 120, 80, 40)]
    label = page.get_attribute("#chart svg", "aria-label")
    means = r"as means of 11 updates: ([\d.]+) at update 6, ([\d.]+) at update 195"
    start, end = map(float, re.search(means, label).groups())
    assert end < start - 0.5

    with page.expect_event("download", lambda file: "optimizer" in file.suggested_filename) as second:
        with page.expect_download() as first:
            page.click("#download")
    for download in (first.value, second.value):
        download.save_as(tmp_path / download.suggested_filename)
    model, meta = load_checkpoint(str(tmp_path / "ckpt.safetensors"))
    assert meta["step"] == 200 and meta["tokenizer"]["kind"] == "char" and model.config.n_embd == 16
    assert "the" in run("sample.py", tmp_path / "ckpt.safetensors", "--prompt=the cat", "--max_new_tokens=20").stdout
    (tmp_path / "text.txt").write_text("the cat sat on the mat. a dog ran to the cat. " * 40)
    done = run("train.py", f"--out_dir={tmp_path}", "--resume=True", f"--data={tmp_path / 'text.txt'}",
               "--max_iters=202").stdout
    assert re.search(r"step +20[12] ", done), done

    page.click("#adopt")
    says(page, "card-name", "trained-200.safetensors")
    page.reload()
    page.wait_for_selector(".notice:has-text('a model of 1 layer and width 16, held-out loss')", timeout=LONG)
    page.click("text=Discard")
    wait_for_run(page, False)


def test_training_on(opened):
    """Training of the open checkpoint, with its sizes; a loss that is NaN ends the run with a message."""
    opened.click("#tab-train")
    opened.select_option("#begin", "model")
    rate_and_batch = lambda: [opened.input_value(f"#{name}") for name in ("learning_rate", "batch_size")]  # noqa: E731
    assert not opened.is_visible("#n_layer") and rate_and_batch() == ["0.0005", "2"]
    opened.select_option("#begin", "scratch")
    assert rate_and_batch() == ["0.005", "8"]
    opened.select_option("#begin", "model")
    opened.fill("#text", "abcdefgh" * 200)
    opened.fill("#max_iters", "3")
    opened.fill("#batch_size", "1")
    opened.click("#start")
    says(opened, "train-says", "All updates are done at update 3.*A new run replaces this one: download it first")
    js(opened, """async () => {
        const { Trainer } = await import("/train.js"), { step } = Trainer.prototype;
        Trainer.prototype.step = async function () {
            Trainer.prototype.step = step;
            return { ...await this.step(), loss: NaN };
        };
    }""")
    opened.click("#start")
    says(opened, "train-wrong", "At update 1 the loss is not a number: begin again with a smaller learning rate")
    assert opened.inner_text("#start") == "Start a new run" and opened.is_visible("#start")


# ---- for everyone ----------------------------------------------------------------------------------------------------


def test_accessible(opened):
    """In each panel every control has a name; arrow keys reach tabs and cells, which have labels that describe them."""
    roles = ("button|textbox|spinbutton|combobox|checkbox|slider|tab|tabpanel|grid|gridcell|radio|radiogroup|img|link|"
             "form|region")
    for name in ("flow", "lens", "attention", "ablation", "patching", "steer", "train", "speed"):
        opened.click(f"#tab-{name}")
        tree = opened.locator("body").aria_snapshot()
        unnamed = re.findall(rf"^\s*- (?:{roles})(?: \[.*\])?:?$", tree, re.M)
        assert not unnamed, (name, unnamed)
        for landmark in ("banner", "main", "contentinfo", "heading"):
            assert f"- {landmark}" in tree
    opened.click("#tab-lens")
    opened.fill("#look-prompt", "abc")
    opened.click("#look")
    opened.wait_for_function("document.querySelectorAll('#lens td').length === 12", timeout=LONG)
    opened.locator("#lens td").last.focus()
    opened.keyboard.press("ArrowUp")
    opened.keyboard.press("Home")
    assert re.match("after layer 0, position 0, begin of text: .*%",
                    js(opened, "() => document.activeElement.ariaLabel"))
    opened.focus("#tab-lens")
    opened.keyboard.press("ArrowRight")
    assert opened.is_visible("#attention") and not opened.is_visible("#lens")
    opened.wait_for_selector("#attention progress", state="detached", timeout=LONG)  # older maps are gone
    opened.locator("#attention .maps button[tabindex='0']").focus()
    opened.keyboard.press("ArrowDown")
    opened.keyboard.press("ArrowUp")
    assert js(opened, "() => document.activeElement.ariaChecked") == "true"
    opened.focus("#attention .large canvas")
    opened.keyboard.press("Home")
    assert re.search(r"Token 3, c, attends to token 0, begin of text: [\d.]+%",
                     opened.get_attribute("#attention .large canvas", "aria-label"))


def test_speed(opened):
    """The kernels, with a reason for each choice, and figures to copy."""
    opened.click("#tab-speed")
    says(opened, "doing", "Ready")
    rows = [row.split("\t") for row in opened.inner_text("#choices").split("\n")]
    assert len(rows) == 7 and all(len(row) == 3 and row[2] not in ("", "not tried yet") for row in rows), rows
    assert "software adapter" in opened.inner_text("#adapter")
    opened.context.grant_permissions(["clipboard-read", "clipboard-write"])
    js(opened, """async () => {
        const { Trainer } = await import("/train.js"), { create } = Trainer;
        Trainer.create = (gpu, settings) => {
            window.largest = Math.max(...settings.ids);
            return create.call(Trainer, gpu, settings);
        };
    }""")
    opened.click("#measure")
    opened.wait_for_selector("#copy:visible", timeout=LONG)
    opened.click("#copy")
    says(opened, "copy", "Copied")
    copied = js(opened, "() => navigator.clipboard.readText()")
    assert re.search(r"matmul 256 x 256 x 256: [\d.]+ GFLOP/s\nmodel: 0\.0\dM parameters, float32, 2 layers, width 32\n"
                     r"writing: \d+ tokens/s\nreading: \d+ tokens/s\nlearning: \d+ tokens/s$", copied), copied
    assert js(opened, "() => window.largest") < 97  # the model's tokens


def test_source():
    """The page has no address of another host, except for names of XML."""
    for path in sorted((ROOT / "webgpu").glob("*.*")):
        if path.suffix in (".html", ".css", ".js"):
            found = set(re.findall(r"https?://[^\s\"'`)]+", path.read_text()))
            assert found <= {"http://www.w3.org/2000/svg"}, (path.name, found)
    page = (ROOT / "webgpu" / "index.html").read_text()
    assert json.dumps(sorted(re.findall(r'(?:src|href)="([^"#]+)"', page))).count("http") == 1  # the icon's own SVG
