"""For tests of the page in a real browser: headless Chromium through Playwright, with playground.py as the server.

    def test_it(page):                                   # a fixture of conftest.py: an empty page from the server
        assert js(page, "async (x) => (await import('/tokenizer.js')).byteTokenizer().tokens[x]", 97) == "YQ=="
        page.goto(page.server.url)                       # the playground itself
"""
import contextlib
import functools
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from runs.headless import FLAGS, SOFTWARE, installed

ROOT = Path(__file__).resolve().parent.parent
ARGUMENTS = [*FLAGS, SOFTWARE]


@dataclass
class Server:
    url: str      # http://localhost:PORT
    folder: Path  # with the checkpoints that it lists
    process: subprocess.Popen


@contextlib.contextmanager
def serve(folder: Path, script: Path = ROOT / "playground.py"):
    """playground.py, at a free port. script: a copy of it, which serves the page beside it."""
    command = [sys.executable, str(script), str(folder), "--port=0", "--open=False"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        lines = []
        while not lines or not lines[-1].startswith("http://"):
            lines.append(process.stdout.readline())
            assert lines[-1], f"playground.py ended: {lines}"
        yield Server(lines[-1].split()[0], Path(folder), process)
    finally:
        process.terminate()
        process.wait(timeout=20)


@contextlib.contextmanager
def chromium():
    """A browser. Where there is none, the test is skipped."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no browser: pip install playwright")
    path = installed()
    if not path:
        pytest.skip("no browser: install chromium")
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


idle = {}  # browser: profiles, each an empty window of it, that no test has at the moment


@contextlib.contextmanager
def profile(browser, server: Server, **options):
    """A profile: with options a new one, else one that an earlier page had and whose data are deleted, because a new
    window takes 0.7 s of the processor for the browser's own buttons."""
    free = idle.setdefault(browser, [])
    if options or not free:
        context = browser.new_context(**{"service_workers": "block"} | options)
        context.empty = None if options else context.new_page()  # it keeps the window open
    else:
        context = free.pop()
    try:
        yield context
    except BaseException:
        options = {"failed": True}
        raise
    finally:
        if options:
            context.close()
    if not options:
        for opened in context.pages:
            if opened is not context.empty:
                opened.close()
        context.unroute_all()
        context.clear_permissions()
        session = context.new_cdp_session(context.empty)
        session.send("Storage.clearDataForOrigin", {"origin": server.url, "storageTypes": "all"})
        session.send("Network.clearBrowserCache")
        session.detach()
        free.append(context)


@contextlib.contextmanager
def page(browser, server: Server, first_text: int | None = None, **options):
    """An empty page of the server's, in a profile without data. It fails the test on an uncaught error, an error in the
    console and a request to any other server, all of which page.problems holds: a test may clear them that it expects.
    first_text: tokens that the page writes when it opens, which are 200 else and slow other tests down in software.
    options: of Playwright's new_context, such as viewport and color_scheme. Unless service_workers is "allow", the page
    has none: route() would not see its requests."""
    with profile(browser, server, **options) as context:
        opened, problems = context.new_page(), []
        opened.server, opened.problems = server, problems
        if first_text:
            kept = json.dumps({"length": str(first_text)})
            opened.add_init_script(f"try {{ localStorage['tinygpt.fields'] ??= '{kept}' }} catch {{}}")
        opened.on("pageerror", lambda error: problems.append(f"uncaught: {error}"))
        opened.on("crash", lambda _: problems.append("the page crashed"))
        opened.on("console", lambda message: message.type == "error" and problems.append(f"console: {message.text}"))
        ours = (server.url + "/", "data:", "blob:")

        def asked(request):
            request.url.startswith(ours) or problems.append(f"it asked {request.url}")

        context.on("request", asked)
        empty = "<!doctype html><html lang=en><title>empty</title><link rel=icon href='data:,'>"
        opened.route(f"{server.url}/empty.html", lambda route: route.fulfill(body=empty, content_type="text/html"))
        opened.goto(f"{server.url}/empty.html")
        opened.wait_for_function = functools.partial(opened.wait_for_function, polling=50)  # ms; else at each frame
        yield opened
        context.remove_listener("request", asked)
        assert not problems, problems


def js(page, function: str, *arguments):
    """The result of a JavaScript function. It is passed as ASCII JSON, so that half a surrogate pair is preserved, and
    NaN becomes None."""
    called = f"async (text) => JSON.stringify(await ({function})(...JSON.parse(text))) ?? 'null'"
    return json.loads(page.evaluate(called, json.dumps(arguments)))
