"""bench.py with tiny settings: every section prints its rows, also where a peer is missing."""
import re
import shutil
import subprocess
import sys

import blas  # noqa: F401  (before mlx)
import mlx.nn as nn
import pytest
from conftest import ROOT

from model import GPT, GPTConfig, save_checkpoint
from tokenizer import byte_tokenizer

SMALLER = {  # sizes on a CPU
    "bench.py": {
        "(1, 4, 4096)": "(1, 4, 512)", "T, models = 4096": "T, models = 512", "text[:4_000_000]": "text[:400_000]",
        "n_layer=4, n_embd=256, n_head=4, block_size=256, vocab_size=4096":
            "n_layer=2, n_embd=64, n_head=4, block_size=64, vocab_size=256",
        "n_layer=8, n_embd=256, n_head=4, vocab_size=4096": "n_layer=2, n_embd=64, n_head=4, vocab_size=256",
        '"124M": (12, 12, 768, 1024, 16, 50304, {}, 5)': '"124M": (12, 12, 48, 1024, 16, 256, {}, 5)',
        "n_head=16, n_embd=1024, vocab_size=16384": "n_head=16, n_embd=128, vocab_size=320"},
    "bench_page.py": {"512 if software": "128 if software", "(1024, 1024)": "(256, 256)"},
    "webgpu/bench.js": {"LEAST = 50": "LEAST = 5"},
}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """A copy of the scripts and the page with smaller sizes, and a smaller checkpoint of the page's own."""
    folder = tmp_path_factory.mktemp("scripts")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "webgpu", folder / "webgpu")
    for name, sizes in SMALLER.items():
        source = (folder / name).read_text()
        for size, smaller in sizes.items():
            assert size in source, f"{name} has no {size}"
            source = source.replace(size, smaller)
        (folder / name).write_text(source)
    model = GPT(GPTConfig(block_size=64, vocab_size=320, n_layer=2, n_head=2, n_embd=64), seed=1)
    nn.quantize(model, 64, 4)
    save_checkpoint(str(folder / "webgpu" / "demo.safetensors"), model, {"tokenizer": byte_tokenizer().to_dict()})
    return folder


def bench(*arguments, folder=ROOT, status=0):
    done = subprocess.run([sys.executable, folder / "bench.py", "--rounds=1", *arguments], capture_output=True,
                          text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def test_every_section(scripts):
    only = "--only=train,decode,tokenize,variants,adapters,packed,inside,convert"
    arguments = only, "--shapes=4x4x128", "--new_tokens=3", "--compile=False"
    lines = bench(*arguments, folder=scripts).stdout.splitlines()
    assert "mlx" in lines[0] and "peer" in lines[2] and max(map(len, lines)) <= 80
    sections = ["train 4x4x128", "decode 4x4x128, batch 1,", "decode 4x4x128, batch 16,", "prefill 4x4x128", "tokenize",
                "window 128", "differential attention", "8 experts", "MoD, 1/8", "YOCO, 12 layers, prompt",
                "YOCO, 12 layers, cache", "LoRA 8; frozen base", "LoRA 8; all", "LoRA 8 on a base of 4 bits",
                "decode 29M, 8 bits", "memory 29M, 8 bits", "decode 29M, 4 bits", "memory 29M, 4 bits",
                "patching 124M, 12 x 3 cells", "convert a Llama"]
    assert len(lines) == 3 + 2 * len(sections)
    assert all(re.fullmatch(rf"{re.escape(section)}.*: (tok/s|cells/s|MB/s|GB/s|MB)", line)
               for line, section in zip(lines[3::2], sections, strict=True))
    for line in lines[4::2]:
        speed, peer, *_ = line.split()
        assert float(speed.replace(",", "")) > 0
        assert peer == "missing" or float(peer.replace(",", "")) > 0


def test_the_page(chromium, scripts):
    pytest.importorskip("wgpu", reason="no WebGPU: pip install wgpu")
    text = "\n".join(bench("--only=page", folder=scripts).stdout.splitlines()[4:])  # the fourth line names the adapter
    rates = [*re.finditer(r"(GFLOP/s|GB/s)\n +([\d,.]+)|: ([\d.]+) (GFLOP/s|tokens/s)", text)]
    assert [(rate[1] or rate[4]) for rate in rates] == [
        *["GFLOP/s"] * 3, *["GB/s"] * 3, "GFLOP/s", *["tokens/s"] * 3]
    assert all(float((rate[2] or rate[3]).replace(",", "")) > 0 for rate in rates)


def test_peers_alone():
    done = subprocess.run([sys.executable, ROOT / "bench_peers.py"], capture_output=True, text=True)
    assert done.returncode == 2 and "run `python bench.py` instead" in done.stderr and done.stderr.count("\n") == 1


def test_unknown():
    assert "no shape 9x9" in bench("--shapes=9x9", status=2).stderr
    assert "no section 'foo'" in bench("--only=foo", status=2).stderr
