"""The part of bench.py about the page: its kernels through Vulkan, and the page in headless Chromium. It prints JSON.

    python bench_page.py kernels      # lines of [what, unit, figure, the device's peak], measured by wgsl.py
    python bench_page.py chromium     # the text of the page's own benchmark, with the page's own checkpoint
"""
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np

import wgsl
from config import UserError, overrides

part = "kernels"  # kernels | chromium

settings = overrides(globals(), "part")

# peak TFLOP/s of float32, and peak GB/s
PEAKS = {"H100": (66.9, 3350), "H200": (66.9, 4800), "A100": (19.5, 2039), "RTX 4090": (82.6, 1008)}


def kernels():
    """Speed of a float32 matmul, beside the device's peak; bandwidth of a product of one row with 4-bit weights."""
    gpu = wgsl.device()
    name = gpu.adapter.info["device"]
    flops, bandwidth = next((peak for known, peak in PEAKS.items() if known in name), (0, 0))
    software = gpu.adapter.info["adapter_type"] == "CPU"
    print(json.dumps([name, "", 0, 0]), flush=True)
    n, rng = 512 if software else 4096, np.random.default_rng(0)
    nothing = wgsl.buffer(np.zeros(4, np.float32))
    x, W, y = (wgsl.buffer(rng.standard_normal(n * n, dtype=np.float32)) for _ in range(3))
    for side in (0, 64, 128):
        settings, width = ({"SIDE": side, "WHOLE": True}, side) if side else ({}, 32)
        groups = (-(-n // width), -(-n // width))
        taken = wgsl.seconds("matmul_tiled" if side else "matmul", settings, (n, n, n),
                             [[W, nothing, nothing, nothing, x, y]], groups)
        what = f"matmul {n}, {f'tiles of {side}' if side else 'plain'}"
        print(json.dumps([what, "GFLOP/s", 2 * n**3 / taken / 1e9, 1000 * flops]), flush=True)
    lanes = gpu.adapter.info.get("subgroup_max_size") or 32
    for N, K in [(1024, 1024)] if software else [(16384, 4096), (65536, 4096)]:
        x, y = (wgsl.buffer(rng.standard_normal(size, dtype=np.float32)) for size in (K, N))
        several = [[wgsl.buffer(rng.integers(0, 2**32, N * K // 8, dtype=np.uint32)),
                    *(wgsl.buffer(np.full(N * K // 64, 0.01, np.float16)) for _ in range(2)), nothing, x, y]
                   for _ in range(1 if software else 6)]  # together larger than a cache
        for kernel, rows in (("matvec", 4), ("matvec_subgroup", 128 // lanes), ("matvec_packed", 512 // lanes)):
            params, more = ((N, K), []) if kernel == "matvec" else ((N, K, 0.0), [nothing] * 2)  # see vector.wgsl
            taken = wgsl.seconds(kernel, {"BITS": 4}, params, [[*each, *more] for each in several],
                                 wgsl.threads(N, max(1, rows)))
            size = N * K * (0.5 + 4 / 64) + 4 * (N + K)
            print(json.dumps([f"{N} x {K} of 4 bits, {kernel}", "GB/s", size / taken / 1e9, bandwidth]), flush=True)


def chromium():
    """The text that webgpu/bench.js makes for demo.safetensors."""
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError as error:
        raise UserError("there is no browser: pip install playwright, and install chromium") from error
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not path:
        raise UserError("there is no browser: install chromium")
    here = os.path.dirname(os.path.abspath(__file__))
    server = subprocess.Popen([sys.executable, os.path.join(here, "playground.py"), "--port=0", "--open=False"],
                              stdout=subprocess.PIPE, text=True)

    def stop(*_):  # a KeyboardInterrupt in playwright's loop may leave a traceback
        server.terminate()
        print("stopped", file=sys.stderr, flush=True)
        os._exit(130)

    signal.signal(signal.SIGINT, stop)
    try:
        url = next(line.split()[0] for line in server.stdout if line.startswith("http://"))
        with sync_playwright() as tools:
            arguments = ["--no-sandbox", "--enable-unsafe-webgpu"]
            if not os.path.exists("/dev/nvidia0") and not os.path.exists("/dev/dri"):
                arguments.append("--use-webgpu-adapter=swiftshader")
            page = tools.chromium.launch(executable_path=path, args=arguments).new_page()
            empty = dict(body="<!doctype html>", content_type="text/html")
            page.route(f"{url}/empty.html", lambda route: route.fulfill(**empty))
            page.goto(f"{url}/empty.html")
            text = page.evaluate("""async () => {
                const { GPU, chooseKernels } = await import("/gpu.js"), { GPT } = await import("/gpt.js");
                const { benchmark } = await import("/bench.js"), gpu = await GPU.open();
                await chooseKernels(gpu);
                const model = await GPT.load(gpu, await (await fetch("/demo.safetensors")).blob());
                return (await benchmark(gpu, model)).text;
            }""")
            print(json.dumps(text), flush=True)
    except Error as error:
        raise UserError(f"the browser has failed ({str(error).splitlines()[0]}): run the page in it by hand") from error
    finally:
        server.terminate()
        server.wait()


# ---- run -------------------------------------------------------------------------------------------------------------

if part not in ("kernels", "chromium"):
    raise UserError(f"part={part!r} is not one of kernels, chromium")
if part == "kernels":
    kernels()
else:
    chromium()
