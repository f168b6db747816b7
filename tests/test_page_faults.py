"""The page when something goes wrong: a lost connection, work that is stopped or outdated, likely mistakes."""
import contextlib
import re
import shutil

import blas  # noqa: F401  (before mlx)
import browser
import numpy as np
import pytest
import test_page
from browser import js
from test_page import LONG, MESSAGES, SECOND, begin, panel, says, slow_down, write

import tuned_lens
from lora import base_fingerprint
from model import GPT, GPTConfig

files, opened = test_page.files, test_page.opened  # fixtures


# ---- a lost connection -----------------------------------------------------------------------------------------------


def test_lost_connection(page, files):
    """A file that cannot be fetched is told as a lost connection, and what was typed is kept; the next try works once
    the server answers again."""
    needed = "stylesheet", "script", "document"
    page.route(re.compile(r"\.(wgsl|js|json|safetensors)$"),
               lambda route: route.continue_() if route.request.resource_type in needed else route.abort())
    page.goto(page.server.url)
    for name in ("the list of its checkpoints", "demo.safetensors"):
        page.wait_for_selector(f".notice:has-text('lost the connection to its server ({name}')", timeout=LONG)
    page.fill("#prompt", "ab")
    page.set_input_files("#open", files / "tiny.safetensors")
    says(page, "write-wrong", r"lost the connection to its server \(kernels/")
    page.click("#tab-speed")
    page.click("#measure")
    says(page, "speed-wrong", r"lost the connection to its server \(bench.js .*start python playground.py again")
    page.click("#tab-train")
    says(page, "train-wrong", r"lost the connection to its server \(\w+.js")
    page.click("#tab-speed")
    page.fill("#length", "7")
    page.unroute_all(behavior="wait")
    page.wait_for_timeout(SECOND / 2)  # until the console has told of the last one
    page.problems.clear()  # the expected failures
    assert page.input_value("#prompt") == "ab" and page.input_value("#text") == ""
    write(page, 7)
    page.click("#measure")
    page.wait_for_selector("#copy:visible", timeout=LONG)
    panel(page, "lens")
    page.click("#tab-train")
    page.wait_for_function("document.getElementById('text').value.startsWith('// The GPT of model.py')", timeout=LONG)
    assert [page.inner_text(f"#{place}") for place in MESSAGES] == [""] * 5
    (page.server.folder / "late.safetensors").write_bytes((files / "tiny.safetensors").read_bytes())
    page.click(".notice:has-text('the list') button")
    page.click("#served summary")
    page.wait_for_selector("#served button:has-text('late')")
    page.click(".notice:has-text('demo') button")
    says(page, "card-name", "demo.safetensors")
    page.wait_for_selector(".notice", state="detached")
    (page.server.folder / "late.safetensors").unlink()


def fetched_ahead(page):
    """Wait until the page has fetched what it may need later."""
    says(page, "doing", "Ready")
    folder = test_page.ROOT / "webgpu"
    files = [path.relative_to(folder).as_posix() for path in (*folder.glob("*.js"), *folder.glob("kernels/*.wgsl"))
             if path.name != "service_worker.js"]
    own = re.findall(r'"(.+?)"', re.search(r"OWN_CODE = \[(.*)\]", (folder / "page_train.js").read_text())[1])
    there = """([files, own]) => files.every((name) =>  // its own code is fetched as a text, too
        performance.getEntriesByName(`${location.origin}/${name}`).some(({ responseEnd, initiatorType }) =>
            responseEnd && (!own.includes(name) || initiatorType === "fetch")))"""
    page.wait_for_function(there, arg=[files, own], timeout=LONG)
    copies = """async () => (await Promise.all((await caches.keys()).map(async (name) =>
        (await (await caches.open(name)).keys()).length))).join()"""
    while js(page, copies) in ("", "0"):  # the copies for the service worker are fetched last, all or none
        page.wait_for_timeout(200)


def test_without_its_server(chromium, files, tmp_path):
    """Once its kernels are chosen, the page needs no server: each panel works, and another device too."""
    with contextlib.ExitStack() as until:
        server = until.enter_context(browser.serve(tmp_path))
        with browser.page(chromium, server) as page:
            begin(page, files)
            fetched_ahead(page)
            until.close()  # the server ends
            page.fill("#look-prompt", "abcd")
            for name in ("flow", "lens", "attention", "ablation", "patching"):
                js(page, "() => { document.getElementById('recipient').value = 'abxd'; }")
                panel(page, name)
            page.click("#tab-speed")
            page.click("#measure")
            page.wait_for_selector("#copy:visible", timeout=LONG)
            page.click("#tab-train")
            page.wait_for_function("document.getElementById('text').value.startsWith('// The GPT of model.py')")
            for name, value in dict(n_layer=1, n_head=1, n_embd=16, block_size=16, batch_size=1, max_iters=3).items():
                page.fill(f"#{name}", str(value))
            page.click("#start")
            says(page, "train-says", "All updates are done at update 3")
            js(page, "async () => (await import('/page_common.js')).page.gpu.device.destroy()")
            page.click("text=Reload the device", timeout=LONG)
            page.wait_for_selector(".notice:has-text('Reload')", state="detached")
            write(page, 5)
            assert [page.inner_text(f"#{place}") for place in MESSAGES] == [""] * 5


def test_later_modules():
    """Each module that is imported later is in the list of those that are fetched ahead."""
    sources = {path.name: path.read_text() for path in (test_page.ROOT / "webgpu").glob("*.js")}
    later = set(re.findall(r'"([^"]+)"', re.search(r"const LATER = \[([^\]]*)\]", sources["page.js"])[1]))
    asked = {name for text in sources.values() for name in re.findall(r'imported\("([^"]+)"\)', text)} - {"x.js"}
    assert asked <= later <= set(sources), (asked, later)
    raw = {name for name, text in sources.items() if re.search(r"\bimport\(", text)}
    assert raw <= {"fetching.js"}, raw


# ---- outdated work, and Stop -----------------------------------------------------------------------------------------

HELD = """async () => {  // each run waits until window.held is false, and notes what the page says meanwhile
    const { GPT } = await import("/gpt.js"), { once } = GPT.prototype;
    Object.assign(window, { runs: 0, said: new Set() });
    GPT.prototype.once = async function (...given) {
        window.runs += 1;
        do {
            window.said.add(document.getElementById("doing").textContent);
            await new Promise((resolve) => setTimeout(resolve, 20));
        } while (window.held);
        return once.apply(this, given);
    };
}"""


def test_outdated_looks(page, files):
    """Of five looks in a row only the first, which has begun, and the last one run; the page is never "Ready" while one
    is running."""
    begin(page, files)
    says(page, "doing", "Ready")
    js(page, HELD)
    for name in "lens", "attention":
        page.click(f"#tab-{name}")
        says(page, "doing", "Ready")
        js(page, "() => { window.runs = 0; window.held = true; }")
        for end in range(5):
            page.fill("#look-prompt", "abc"[:1 + end % 3] * (1 + end))
            page.click("#look")
        js(page, "() => { window.held = false; }")
        says(page, "doing", "Ready")
        said, runs = js(page, "() => [[...window.said], window.runs]")
        assert runs == 2 and not {"Ready", "Working"} & set(said), (runs, said)
        if name == "lens":
            assert page.locator("#lens td").count() == 3 * 11  # of the last prompt, "ababababab"
        assert page.locator(f"#{name} progress").count() == 0


def test_ready_only_when_idle(opened):
    """Work in the queue that has no words of its own is told, too; of two activities with one name, both count."""
    says(opened, "next-says", "emperature")  # the newest token's logits, computed by themselves, are there
    says(opened, "doing", "Ready")
    found = js(opened, """async () => {
        const { queue, during } = await import("/page_common.js");
        const says = () => document.getElementById("doing").textContent;
        const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms)), found = [];
        const work = queue(() => wait(200));
        found.push(says());
        await work;
        found.push(says());
        const first = during("look", "Looking", () => wait(100)), second = during("look", "Looking", () => wait(300));
        await first;
        found.push(says());
        await second;
        found.push(says());
        return found;
    }""")
    assert found == ["Working", "Ready", "Looking", "Ready"]


def test_stop_of_one_run(opened):
    """The lens and the attention maps, whose figure is one run of the model, can be stopped in the middle of it: the
    rest is not submitted. The next look works."""
    says(opened, "doing", "Ready")
    js(opened, """() => {
        const { onSubmittedWorkDone, submit } = GPUQueue.prototype;
        window.submitted = 0;
        GPUQueue.prototype.submit = function (...given) { window.submitted += 1; return submit.apply(this, given); };
        GPUQueue.prototype.onSubmittedWorkDone = async function () {
            await onSubmittedWorkDone.call(this);
            await new Promise((resolve) => setTimeout(resolve, window.wait));
        };
    }""")
    for name in "lens", "attention":
        opened.click(f"#tab-{name}")
        submitted = []
        for stop, text in (False, "ab"), (True, "abc"):
            js(opened, "(wait) => { window.submitted = 0; window.wait = wait; }", 1500 if stop else 0)
            opened.fill("#look-prompt", text)
            opened.click("#look")
            if stop:
                opened.click(f"#{name} button:has-text('Stop')")
                says(opened, name, "Stopped: press Look to compute it")
                assert js(opened, "() => document.activeElement.id") == "look"
            says(opened, "doing", "Ready")
            submitted.append(js(opened, "() => window.submitted"))
        assert submitted[1] < submitted[0] and opened.inner_text("#look-wrong") == "", submitted
    js(opened, "() => { window.wait = 0; }")
    opened.click("#look")
    opened.wait_for_selector("#attention .maps button", timeout=LONG)
    says(opened, "attention", "stands out")


def test_stop_of_measuring(opened):
    """The button that measures stops it, too, also while it waits for its turn; then it measures again."""
    opened.click("#tab-speed")
    opened.click("#measure")
    says(opened, "figures", "matmul")
    opened.click("#measure:has-text('Stop')")
    says(opened, "figures", r"stopped\s*$")
    says(opened, "doing", "Ready")
    says(opened, "measure", "Measure")
    js(opened, """async () => {
        const { queue } = await import("/page_common.js");
        queue(() => new Promise((resolve) => { window.goOn = resolve; }));
    }""")
    opened.click("#measure")
    opened.click("#measure:has-text('Stop')")
    js(opened, "() => window.goOn()")
    says(opened, "measure", "Measure")
    assert opened.inner_text("#figures").strip() == "stopped" and opened.inner_text("#speed-wrong") == ""
    opened.click("#measure")
    opened.wait_for_selector("#copy:visible", timeout=LONG)
    assert "learning" in opened.inner_text("#figures")


# ---- the loss chart, and runs ----------------------------------------------------------------------------------------


def test_smoothing(page):
    """It does not lag: a straight line stays as it is. It is the mean of the window around each update."""
    found = js(page, """async (losses) => {
        const { smooth } = await import("/page_draw.js"), points = losses.map((loss, i) => [i + 1, loss]);
        return [smooth(points), smooth(points.map(([step]) => [step, 9 - step / 100])), smooth(points.slice(0, 5))];
    }""", losses := np.random.default_rng(0).random(400).tolist())
    width = found[0]["width"]
    assert width == 21 and [step for step, _ in found[0]["line"]] == [*range(11, 391)]
    assert np.allclose([loss for _, loss in found[0]["line"]], np.convolve(losses, np.ones(width) / width, "valid"))
    assert all(abs(loss - (9 - step / 100)) < 1e-9 for step, loss in found[1]["line"])
    assert found[2] == {"width": 1, "line": [[i + 1, loss] for i, loss in enumerate(losses[:5])]}


def test_chart(page):
    """Its axes have names, its legend says what the smooth line is, and before the first loss it has no numbers."""
    texts = js(page, """async () => {
        const { lossChart } = await import("/page_draw.js"), many = 200_000;
        const train = Array.from({ length: many }, (_, i) => [i + 1, 3 + i % 7 / 10]);
        const texts = (given) => lossChart(given).map((node) =>
            [...node.querySelectorAll("text, span")].map((part) => part.textContent));
        return [texts({ train: [], held: [], until: 400 }), texts({ train, held: [[0, 4], [many, 3]], until: many })];
    }""")
    empty, (drawn, legend) = texts
    assert empty == [["loss, nats per token", "update", "Here the losses of a run are drawn."]]
    assert drawn[:2] == empty[0][:2] and {"learnt", "held out", "0", "200,000", "3", "4"} <= {*drawn}
    assert legend == ["learnt: each update", "learnt: the mean of the 10001 updates around each", "held out"]


def test_new_run(opened):
    """After a finished run one button begins a new one, and the other says what it needs before it can be pressed. The
    Enter key in a field begins no run anew. A run that cannot begin leaves the previous one as it is."""
    opened.click("#tab-train")
    opened.fill("#text", "the cat sat on the mat. a dog ran to the cat. " * 40)
    for name, value in dict(n_layer=1, n_head=1, n_embd=16, block_size=16, batch_size=1, max_iters=100000).items():
        opened.fill(f"#{name}", str(value))
    opened.click("#start")
    says(opened, "m-step", r"^[1-9]\d* of 100,000")
    opened.press("#sample_every", "Enter")
    opened.click("#pause")
    says(opened, "train-says", "Paused at update")
    step = int(opened.inner_text("#m-step").split()[0].replace(",", ""))
    opened.fill("#max_iters", str(step))
    assert opened.is_disabled("#resume") and f"raise Updates above {step:,}" in opened.inner_text("#train-size")
    opened.fill("#max_iters", str(step + 2))
    opened.press("#max_iters", "Enter")
    says(opened, "train-says", f"All updates are done at update {step + 2:,}.*A new run replaces this one: download it")
    assert opened.inner_text("#start") == "Start a new run" and opened.is_disabled("#resume")
    opened.press("#max_iters", "Enter")
    opened.fill("#text", "abc")
    opened.click("#start")
    says(opened, "train-wrong", "The text has 3 tokens, and windows of 16 need at least 36: give a longer text")
    with opened.expect_download() as file:
        opened.click("#download")
    assert file.value.suggested_filename == "ckpt.safetensors" and opened.input_value("#text") == "abc"
    opened.fill("#text", "the cat sat on the mat. a dog ran to the cat. " * 40)
    opened.fill("#max_iters", "3")
    opened.click("#start")
    says(opened, "train-says", "All updates are done at update 3")


# ---- patching --------------------------------------------------------------------------------------------------------


def test_patching_in_view(chromium, server, files):
    """On a phone, the columns of the figure say their positions, and the one in which the prompts differ is in view."""
    with browser.page(chromium, server, viewport=test_page.PHONE) as page:
        begin(page, files)
        page.fill("#look-prompt", "abcdefghijklmno")
        js(page, "() => { document.getElementById('recipient').value = 'abxdefghijklmno'; }")
        panel(page, "patching")
        page.wait_for_selector("#patching .here", timeout=LONG)
        heads = page.locator("#patching thead th").all_inner_texts()[1:]
        assert [head.split("\n") for head in heads[2:5]] == [["2", "b"], ["3", "c→x"], ["4", "d"]], heads
        assert len(heads) == 16 and page.get_attribute("#patching .here", "data-c") == "3"
        values = [float(text.replace("−", "-")) for text in page.locator("#patching [data-c='3']").all_inner_texts()]
        assert max(values) == float(page.inner_text("#patching .here").replace("−", "-"))
        box, view, label = (page.locator(f"#patching {name}").first.bounding_box() for name in
                            (".here", ".scroll", "tbody th"))
        assert label["x"] + label["width"] <= box["x"] and box["x"] + box["width"] <= view["x"] + view["width"]
        page.fill("#pairs", "3:3, 1:2")
        page.click("#look")
        page.wait_for_function("document.querySelectorAll('#patching thead th').length === 3", timeout=LONG)
        assert page.locator("#patching thead th").all_inner_texts()[1:] == ["3:3\nc→x", "1:2\na→b"]


# ---- likely mistakes -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mistaken(files):
    """More files that a visitor may drop by mistake."""
    other = GPT(GPTConfig(**test_page.TINY), seed=2)
    lenses = {"base": base_fingerprint(other)}
    tuned_lens.save_lens(str(files / "other.lenses"), tuned_lens.start(other), other, lenses)
    (files / "pytorch_model.bin").write_bytes(b"PK\3\4" + bytes(100))
    (files / "book.zip").write_bytes(b"PK\3\4" + bytes(100))
    (files / "latin.txt").write_bytes("für".encode("latin-1") * 50)
    return files


@pytest.mark.parametrize("name, place, words", [
    ("pytorch_model.bin", "card-wrong", "hf_reader.py makes a checkpoint"), ("book.zip", "card-wrong", "unpack it"),
    ("picture.png", "card-wrong", "drop another file"), ("latin.txt", "train-wrong", "save it as a UTF-8 text"),
    ("other.lenses", "look-wrong", "was made for another checkpoint: train lenses for this one")])
def test_mistaken_files(name, place, words, opened, mistaken):
    """The message says what to do next; the model that is open stays open. (test_page.py has more.)"""
    before = opened.inner_text("#card-name")
    opened.set_input_files("#open", mistaken / name)
    says(opened, place, f"{name} .*{words}")
    assert opened.inner_text("#card-name") == before


@pytest.mark.parametrize("tab, field, value, button, place, words", [
    ("lens", "prompt", "straße", "write", "write-wrong", "only the characters that it was trained on, and not 'ß'"),
    ("lens", "temperature", "abc", "write", "write-wrong", "Temperature must be a number from 0 to 5"),
    ("lens", "look-prompt", "x" * 100, "look", "look-wrong", "101 tokens, and this model's context is 80: shorten it"),
    ("ablation", "target", "ß", "look", "look-wrong", "not 'ß': leave them out"),
    ("patching", "pairs", "1:1, a:b", "look", "look-wrong", "“a:b” is no pair of positions: write the donor's and"),
    ("patching", "recipient", "", "look", "look-wrong", "There is no recipient: type the prompt"),
    ("train", "text", "abc", "start", "train-wrong", "The text has 3 tokens, .*: give a longer text"),
    ("train", "n_embd", "50", "start", "train-wrong", "50 cannot be divided into 2 heads of even width: take 52"),
    ("train", "n_head", "0", "start", "train-wrong", "Heads must be a whole number from 1 to 32"),
    ("train", "learning_rate", "0", "start", "train-wrong", r"Learning rate must be a number from 0\.0000001 to 1")])
def test_mistaken_fields(tab, field, value, button, place, words, opened):
    """The message says what to do next. What was typed stays, and with the previous value all is well."""
    says(opened, "write", "Write")
    opened.click(f"#tab-{tab}")
    if tab == "train":
        opened.select_option("#begin", "scratch")
        for name, right in dict(n_layer=1, n_head=2, n_embd=16, block_size=16, batch_size=1, max_iters=2).items():
            opened.fill(f"#{name}", str(right))
        opened.fill("#text", "the cat sat on the mat. " * 20)
    if tab == "patching":
        opened.fill("#look-prompt", "abcd")
        opened.fill("#recipient", "abxd")
    before = opened.input_value(f"#{field}")
    opened.fill(f"#{field}", "")
    opened.type(f"#{field}", value)  # a field of numbers takes no letters
    typed = opened.input_value(f"#{field}")
    opened.click(f"#{button}")
    says(opened, place, words)
    assert opened.input_value(f"#{field}") == typed
    opened.fill(f"#{field}", before)
    opened.click(f"#{button}")
    says(opened, place, "^$")
    says(opened, "doing", "Ready" if button != "write" else "Writing|Ready")
    assert opened.inner_text(f"#{place}") == ""


def test_two_tabs(page, files):
    """Only one of two tabs that train stores its run. The other one says so, and the browser asks before it closes."""
    begin(page, files)
    other = page.context.new_page()
    other.route("**/demo.safetensors", lambda route: route.fulfill(path=files / "tiny.safetensors"))
    other.goto(page.server.url)
    other.wait_for_selector("#sheet .t", state="attached", timeout=LONG)
    for each in page, other:
        each.bring_to_front()
        slow_down(each)
        each.click("#tab-train")
        each.fill("#text", "the cat sat on the mat. " * 20)
        for name, value in dict(n_layer=1, n_head=1, n_embd=16, block_size=16, batch_size=1, max_iters=9999).items():
            each.fill(f"#{name}", str(value))
        each.click("#start")
        says(each, "m-step", r"^[1-9]\d* of 9,999")
    says(other, "train-says", "Another tab is training, .*download this one before you close the tab")
    other.click("#pause")
    says(other, "train-says", "It is not stored: download it before you close the tab")
    asked = []
    other.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.accept()))
    other.close(run_before_unload=True)
    page.wait_for_timeout(SECOND)
    page.bring_to_front()
    page.click("#pause")
    says(page, "train-says", "Paused at update .* The run is stored")
    assert asked == ["beforeunload"]


# ---- the service worker ----------------------------------------------------------------------------------------------


def test_opens_without_server(chromium, files, tmp_path):
    """A page that was once open opens again without its server, writes, and says that it is a copy. While the server is
    there, changed files are seen at once. Checkpoints are not kept."""
    copy = tmp_path / "copy"
    shutil.copytree(test_page.ROOT, copy, ignore=lambda folder, names: [name for name in names if not (
        name == "webgpu" or name.endswith(".py") or "webgpu" in folder)])
    shutil.copy(files / "tiny.safetensors", copy / "webgpu" / "demo.safetensors")
    kernel = copy / "webgpu" / "kernels" / "add.wgsl"
    text = "async () => (await fetch('/kernels/add.wgsl')).text()"
    with contextlib.ExitStack() as until:
        server = until.enter_context(browser.serve(tmp_path, script=copy / "playground.py"))
        page = until.enter_context(browser.page(chromium, server, service_workers="allow"))
        page.add_init_script("""localStorage["tinygpt.fields"] ??= '{"length": "20"}'""")
        begin(page)
        page.wait_for_function("navigator.serviceWorker.controller", timeout=LONG)
        kernel.write_text(kernel.read_text() + "// changed\n")
        assert js(page, text).endswith("// changed\n")
        kept = js(page, "async () => (await (await caches.open('tinygpt')).keys()).map(({ url }) => url)")
        assert not [url for url in kept if "checkpoints" in url]
        server.process.terminate()
        server.process.wait()
        assert js(page, text).endswith("// changed\n")
        page.reload()
        page.wait_for_selector(".notice:has-text('the page as it was when it was last loaded')", timeout=LONG)
        page.wait_for_selector("#sheet .t", state="attached", timeout=LONG)
        panel(page, "flow")
        page.click("#tab-speed")
        page.click("#measure")
        page.wait_for_selector("#copy:visible", timeout=LONG)
        page.problems.clear()  # the list that could not be fetched
