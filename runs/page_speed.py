"""How fast the page's kernels are in a browser on this machine's graphics card, without anybody clicking.

    python runs/page_speed.py                               # GPT-2's small shape: 124M parameters
    python runs/page_speed.py --browser=/path/to/chromium --shape=3M --profile=True

It serves webgpu/, starts a Chromium without a window, and prints what bench.js measures on random weights: a matmul,
learning, reading and writing in float16 and in 4 bits. With --profile=True also the time of each kernel, run alone
again and again: the sum is more than a step takes where kernels overlap.
"""
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from config import UserError, overrides  # noqa: E402
from runs.headless import run_in_browser  # noqa: E402

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
MODULE = """
  const {GPU, chooseKernels} = await import("/gpu.js"), {measureShape} = await import("/bench.js");
  const gpu = await GPU.open();
  await chooseKernels(gpu);
  await measureShape(gpu, SETTINGS, say);
  if (gpu.errors.length) throw new Error(gpu.errors[0]);
"""

if __name__ == "__main__":
    if shape not in SHAPES:
        raise UserError(f"shape={shape}: it must be one of {', '.join(SHAPES)}")
    asked = {"config": SHAPES[shape], "only": only.split(",") if only else [], "profile": profile}
    run_in_browser(MODULE.replace("SETTINGS", json.dumps(asked)), browser, software=software, timeout=timeout)
