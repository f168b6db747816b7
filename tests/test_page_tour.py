"""What makes the page easy to show: links to a state of it, the tour, examples, pictures, and a recording for browsers
without WebGPU."""
import blas  # noqa: F401  (before mlx)
import browser
import pytest
from browser import js
from test_page import LONG, begin, files, says  # noqa: F401


@pytest.fixture(scope="module")
def playground(chromium, server, files):  # noqa: F811
    """The playground with the tiny checkpoint, opened through a link."""
    with browser.page(chromium, server) as page:
        kept = '{"fields": {"length": "30", "how": "mean", "target": "old"}}'
        page.add_init_script(f"localStorage.tinygpt ??= '{kept}'")
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
    assert link == "#panel=lens&model=english&prompt=Once+upon+a+time&look-prompt=She+opened+the+door+and+went+into+the"
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
