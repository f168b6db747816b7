"""For page_speed.py, page_equal.py and the tests: the installed browser, and a script in it without a window."""
import os
import shutil
import subprocess
import tempfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

from config import UserError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FLAGS = ["--no-sandbox", "--no-first-run", "--enable-unsafe-webgpu", "--disable-sync",
         "--disable-background-networking", "--disable-component-update"]
SOFTWARE = "--use-webgpu-adapter=swiftshader"  # the processor instead of a graphics card
PAGE = """<!doctype html><html lang=en><title>measured</title><link rel=icon href="data:,"><script type=module>
const say = (line) => fetch("/say", {method: "POST", body: line});
let failure = "";
try {
  MODULE
} catch (error) { failure = String(error); }
await fetch("/end", {method: "POST", body: failure});
</script>"""


def installed() -> str | None:
    """The program of a browser that has WebGPU."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def program_of(browser: str) -> str:
    """The program of a browser, "": the one that is installed. UserError if there is none."""
    program = browser or installed()
    if not program or not shutil.which(program):
        raise UserError(f"there is no browser {browser}: install chromium, or give --browser=PATH".replace("  ", " "))
    return program


def run_in_browser(module: str, browser: str = "", folder: str = "", software: bool = False, timeout: float = 500.0,
                   say=lambda line: print(line, flush=True)):
    """Run JavaScript on a page whose server has webgpu/, and a folder's files as /files/NAME. say(line) is called with
    what the script gives to its own say(). browser: a Chromium; "": the one that is installed. software: without a
    graphics card. timeout: seconds. UserError if the script throws an error."""
    if not 0 < timeout < 1e6:
        raise UserError(f"timeout={timeout:g}: it must be over 0 and below 1,000,000 seconds")
    program = program_of(browser)
    over, failures = threading.Event(), []

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=os.path.join(ROOT, "webgpu"))

        def log_message(self, *_):
            pass

        def translate_path(self, path):
            if folder and path.startswith("/files/"):
                return os.path.join(folder, os.path.basename(path))
            return super().translate_path(path)

        def do_GET(self):
            if self.path != "/":
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(PAGE.replace("MODULE", module).encode())

        def do_POST(self):
            text = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            if self.path == "/say":
                say(text)
            else:
                failures.extend([text] if text else [])
                over.set()
            self.send_response(204)
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    flags = ["--headless=new", *FLAGS, *([SOFTWARE] if software else [])]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [program, *flags, f"--user-data-dir={profile}", f"http://127.0.0.1:{server.server_port}/"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            if not over.wait(timeout):
                raise UserError(f"the browser was not done after {timeout:.0f} s: give --timeout=SECONDS")
        finally:
            process.terminate()
            process.wait(20)
            server.shutdown()
    if failures:
        raise UserError(f"the page failed: {failures[0]}")
