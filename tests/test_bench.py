"""bench.py with tiny settings: every section prints its rows, also where a peer is missing."""
import re
import subprocess
import sys

import pytest
from conftest import ROOT


def bench(*arguments, status=0):
    done = subprocess.run([sys.executable, ROOT / "bench.py", "--rounds=1", *arguments], capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def test_every_section():
    only = "--only=train,decode,tokenize,variants,adapters,packed,inside,convert"
    lines = bench(only, "--shapes=4x4x128", "--new_tokens=3", "--compile=False").stdout.splitlines()
    assert "mlx" in lines[0] and "peer" in lines[2] and max(map(len, lines)) <= 80
    sections = ["train 4x4x128", "decode 4x4x128, batch 1,", "decode 4x4x128, batch 16,", "prefill 4x4x128", "tokenize",
                "window 128", "8 experts", "MoD, 1/8", "YOCO, 12 layers, prompt", "YOCO, 12 layers, cache",
                "LoRA 8; frozen base", "LoRA 8; all", "LoRA 8 on a base of 4 bits",
                "decode 29M, 8 bits", "memory 29M, 8 bits", "decode 29M, 4 bits", "memory 29M, 4 bits",
                "patching 124M, 12 x 3 cells", "convert a Llama"]
    assert len(lines) == 3 + 2 * len(sections)
    assert all(re.fullmatch(rf"{re.escape(section)}.*: (tok/s|cells/s|MB/s|GB/s|MB)", line)
               for line, section in zip(lines[3::2], sections, strict=True))
    for line in lines[4::2]:
        speed, peer, *_ = line.split()
        assert float(speed.replace(",", "")) > 0
        assert peer == "missing" or float(peer.replace(",", "")) > 0


def test_the_page(chromium):
    pytest.importorskip("wgpu", reason="no WebGPU: pip install wgpu")
    text = "\n".join(bench("--only=page").stdout.splitlines()[4:])  # the fourth line names the adapter
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
