"""For page_speed.py and page_equal.py: a page of the playground in a browser without a window."""
import os
import shutil
import subprocess
import tempfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

from config import UserError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FLAGS = ["--headless=new", "--no-sandbox", "--no-first-run", "--enable-unsafe-webgpu", "--disable-sync",
         "--disable-background-networking", "--disable-component-update"]
PAGE = """<!doctype html><html lang=en><title>measured</title><link rel=icon href="data:,"><script type=module>
const say = (line) => fetch("/say", {method: "POST", body: line});
try {
  MODULE
} catch (error) { await say(`failed: ${error.stack ?? error}`); }
await fetch("/end", {method: "POST"});
</script>"""


def run_in_browser(module: str, browser: str = "", folder: str = "", software: bool = False, timeout: float = 500.0,
                   say=lambda line: print(line, flush=True)):
    """Run JavaScript on a page that webgpu/ is served to, and a folder's files as /files/NAME. say(line) is called with
    what the script gives to its own say(). browser: a Chromium; "": the one that is installed. software: without a
    graphics card. timeout: seconds."""
    program = browser or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not program or not shutil.which(program):
        raise UserError(f"there is no browser {browser}: install chromium, or give --browser=PATH".replace("  ", " "))
    over = threading.Event()

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
            say(text) if self.path == "/say" else over.set()
            self.send_response(204)
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    flags = FLAGS + (["--use-webgpu-adapter=swiftshader"] if software else [])
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
