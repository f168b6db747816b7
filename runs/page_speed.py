"""How fast the page's kernels are in a browser on this machine's graphics card, without anybody clicking.

    python runs/page_speed.py                               # GPT-2's small shape: 124M parameters
    python runs/page_speed.py --browser=/path/to/chromium --shape=3M --profile=True

It serves webgpu/, starts a Chromium without a window, and prints what bench.js measures on random weights: a matmul,
learning, reading and writing in float16 and in 4 bits. With --profile=True also the time of each kernel, run alone again
and again: the sum is more than a step takes where kernels overlap.
"""
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from config import UserError, overrides  # noqa: E402

browser = ""          # a Chromium; "": chromium or google-chrome, where it is installed
shape = "124M"        # of SHAPES
only = ""             # of matmul, learn, read, write, with commas; "": all
profile = False       # the time of each kernel too
software = False      # the processor instead of a graphics card
timeout = 500.0       # seconds

settings = overrides(globals())

GPT2 = {"pos": "learned", "norm": "layer", "mlp": "gelu_tanh", "bias": True, "qk_norm": False}
SHAPES = {
    "124M": {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50304, "block_size": 1024, **GPT2},
    "27M": {"n_layer": 8, "n_head": 8, "n_embd": 512, "vocab_size": 4096, "block_size": 512},
    "3M": {"n_layer": 6, "n_head": 4, "n_embd": 192, "vocab_size": 4096, "block_size": 256},
    "tiny": {"n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 256, "block_size": 64},
}
PAGE = """<!doctype html><html lang=en><title>speed</title><link rel=icon href="data:,"><script type=module>
const say = (line) => fetch("/say", {method: "POST", body: line});
try {
  const {GPU, chooseKernels} = await import("/gpu.js"), {measureShape} = await import("/bench.js");
  const gpu = await GPU.open();
  await chooseKernels(gpu);
  await measureShape(gpu, SETTINGS, say);
  if (gpu.errors.length) await say(`errors: ${gpu.errors[0]}`);
} catch (error) { await say(`failed: ${error.stack ?? error}`); }
await fetch("/end", {method: "POST"});
</script>"""


def serve(page: str, over: threading.Event) -> ThreadingHTTPServer:
    """webgpu/ at a free port, with `page` at /; lines that are posted to /say are printed, /end sets `over`."""
    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=os.path.join(ROOT, "webgpu"))

        def log_message(self, *_): pass

        def do_GET(self):
            if self.path != "/":
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(page.encode())

        def do_POST(self):
            text = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            print(text, flush=True) if self.path == "/say" else over.set()
            self.send_response(204)
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


if __name__ == "__main__":
    program = browser or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not program or not shutil.which(program):
        raise UserError(f"there is no browser {browser}: install chromium, or give --browser=PATH")
    if shape not in SHAPES:
        raise UserError(f"shape={shape}: it must be one of {', '.join(SHAPES)}")
    asked = {"config": SHAPES[shape], "only": only.split(",") if only else [], "profile": profile}
    over = threading.Event()
    server = serve(PAGE.replace("SETTINGS", json.dumps(asked)), over)
    flags = ["--headless=new", "--no-sandbox", "--no-first-run", "--enable-unsafe-webgpu", "--disable-sync",
             "--disable-background-networking", "--disable-component-update"]
    flags += ["--use-webgpu-adapter=swiftshader"] if software else []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = [program, *flags, f"--user-data-dir={folder}", f"http://127.0.0.1:{server.server_port}/"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            if not over.wait(timeout):
                raise UserError(f"the browser was not done after {timeout:.0f} s: give --timeout=SECONDS")
        finally:
            process.terminate()
            process.wait(20)
