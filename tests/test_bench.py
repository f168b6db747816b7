"""bench.py with tiny settings: every section prints its rows, also where a peer is missing."""
import json
import re
import shutil
import subprocess
import sys

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import ROOT, launch
from mlx.utils import tree_flatten

import bench_devices
import bench_growth
import draw
from model import GPT, GPTConfig, save_checkpoint
from tokenizer import byte_tokenizer

SMALLER = {  # sizes on a CPU
    "bench.py": {
        "(1, 4, 4096)": "(1, 4, 512)", "T, models = 4096": "T, models = 512", "text[:4_000_000]": "text[:400_000]",
        "n_layer=4, n_embd=256, n_head=4, block_size=256, vocab_size=4096":
            "n_layer=2, n_embd=64, n_head=4, block_size=64, vocab_size=256",
        "n_layer=8, n_embd=256, n_head=4, vocab_size=4096": "n_layer=2, n_embd=64, n_head=4, vocab_size=256",
        '"124M": (12, 12, 768, 1024, 16, 50304, {}, 5)': '"124M": (12, 12, 48, 1024, 16, 256, {}, 5)',
        "n_head=16, n_embd=1024, vocab_size=16384": "n_head=16, n_embd=128, vocab_size=320",
        "n = 96 if": "n = 5 if", "2**28 if ON_CPU": "2**20 if ON_CPU"},
    "bench_growth.py": {
        "block_size=256, vocab_size=512), 2048, 128": "block_size=16, vocab_size=64), 64, 16",
        "(1, 2, 4, 8, 16), (512, 2048, 8192, 32768), (512, 2048, 8192, 32768)": "(1, 2), (64, 512), (128, 2048)",
        "(256, 512, 1024, 2048, 4096, 8192), 8192, (2, 4, 8, 16, 32)": "(16, 64), 64, (2, 4)"},
    "bench_devices.py": {
        "(2**26, 2**23, 2**20)": "(2**16, 2**12)", "BATCH, STEPS = 16, 10": "BATCH, STEPS = 4, 5",
        "n_layer=4, n_head=4, n_embd=128, block_size=64": "n_layer=2, n_head=2, n_embd=32, block_size=16"},
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
    only = "--only=train,tokenize,variants,adapters,packed,inside,convert"
    arguments = only, "--shapes=4x4x128", "--new_tokens=3", "--compile=False"
    lines = bench(*arguments, folder=scripts).stdout.splitlines()
    assert "mlx" in lines[0] and "peer" in lines[2] and max(map(len, lines)) <= 80
    sections = ["train 4x4x128", "tokenize",
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


def rows_of(line: str) -> tuple[str, float]:
    side, speed, *_ = line.split()
    return side, speed if speed == "missing" else float(speed.replace(",", ""))


def test_writing(scripts):
    """Each side has a line, in a table for each batch, draw and format."""
    arguments = "--only=decode,many", "--shapes=4x4x128", "--new_tokens=3", "--batches=1,3", "--draws=greedy,sampled"
    lines = bench(*arguments, folder=scripts).stdout.splitlines()[3:]
    assert re.fullmatch(r"a copy: [\d.,]+ GB/s", lines[0]) and lines[1].split()[0] == "tok/s"
    assert max(map(len, lines)) <= 80
    found, title = {}, ""
    for line in lines[2:]:
        if line.startswith(" "):
            side, speed = rows_of(line)
            assert speed == "missing" and not side.startswith("ours") or speed > 0
            found.setdefault(title, []).append(side)
        else:
            title = line
    ours, packed = ["ours", "torch", "mlx_lm"], ["ours_4bit", "mlx_lm_4bit"]
    expected = {}
    for batch in 1, 3:
        for kind in "greedy", "sampled":
            expected[f"decode 4x4x128, batch {batch}, {kind}, float32: tok/s"] = ours
            expected[f"decode 4x4x128, batch {batch}, {kind}, 4 bits: tok/s"] = packed
    expected["prefill 4x4x128, 63 tokens, float32: tok/s"] = ours
    for batch in 1, 3:
        expected[f"many 4x4x128, 5 texts, {batch} at a time, float32: tok/s"] = ["ours", "mlx_lm"]
        expected[f"many 4x4x128, 5 texts, {batch} at a time, 4 bits: tok/s"] = packed
    assert found == expected


def test_growth(scripts, tmp_path):
    """Every panel as a table, a picture and figures; they can be drawn again."""
    picture = tmp_path / "growth.png"
    lines = bench("--only=growth", f"--out={picture}", folder=scripts).stdout.splitlines()[3:]
    titles = [line for line in lines if not line.startswith(" ")]
    assert len(titles) == 10 and titles[0] == "training: context: ms a step, measured and expected, by tokens"
    figures = json.loads(picture.with_suffix(".json").read_text())
    assert [len(panel["curves"]) for panel in figures["panels"]] == [2, 2, *[1] * 6, 4, 4]
    for panel in figures["panels"]:
        for curve in panel["curves"]:
            assert len(curve["x"]) == len(curve["measured"]) == len(curve["expected"]) == 2
            assert min(curve["measured"] + curve["expected"]) > 0
            point = {"ms a token": -1, "MB of the cache": 1}.get(panel["y"], 0)
            assert curve["measured"][point] == pytest.approx(curve["expected"][point])
    first = picture.read_bytes()
    assert first.startswith(b"\x89PNG") and len(lines) == 10 + sum(
        1 + len(curve["x"]) for panel in figures["panels"] for curve in panel["curves"])
    picture.unlink()
    again = bench("--only=growth", f"--again={picture.with_suffix('.json')}", f"--out={picture}", folder=scripts)
    assert again.stdout.splitlines()[3:] == lines and picture.read_bytes() == first


@pytest.mark.parametrize("n", [1, 2])
def test_devices(scripts, n):
    """Sums and gathers, and training; the losses of two processes are those of one."""
    done = subprocess.run([*launch(n), sys.executable, scripts / "bench.py", "--only=devices", "--rounds=1"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[3:]
    assert lines[0].startswith(f"{n} process") and max(map(len, lines)) <= 80
    sums = [line for line in lines if "MiB" in line]
    assert [line.split()[0] for line in sums][:2] == ["all_sum", "all_gather"] and len(sums) >= 4
    rows = [line.split() for line in lines if line.startswith(("adamw", "muon"))]
    modes = ["alone", "data,", "zero1,", "fsdp,", "tensor,", "pipeline,", "data,"]
    assert [row[1] for row in rows] == modes * 2
    assert all(abs(float(row[-2])) < 1e-5 for row in rows)


def test_collectives_in_one_order(monkeypatch):
    """All processes must ask for the same sums in the same order, of whatever dtypes."""
    monkeypatch.setattr(bench_devices, "SIZES", (64,))
    asked = [[what for what, *_ in bench_devices.collectives(dtype, 1)] for dtype in (mx.bfloat16, mx.float32)]
    assert [what.split(", ")[1] for what in asked[0] if "all_sum" in what] == ["float32", "bfloat16"]
    assert [what.split(", ")[1] for what in asked[1] if "all_sum" in what] == ["float32"]


@pytest.mark.parametrize("own", [{}, dict(sliding_window=5), dict(n_expert=4, ffn_dim=48)])
def test_expected_operations(own):
    """Twice the multiplications of the matmuls of a forward pass, which are counted as it runs; thrice with backward.
    The scores of a causal block that need not be computed are left out."""
    config = GPTConfig(**dict(n_layer=2, n_head=2, n_embd=32, block_size=12, vocab_size=40) | own)
    model, T, matmuls = GPT(config), 12, 0
    for name, p in tree_flatten(model.parameters()):
        if p.ndim > 1:
            matmuls += p.size / (2 if name.endswith(("up.weight", "down.weight")) and own.get("n_expert") else 1) * T
    seen = sum(min(i + 1, own.get("sliding_window", T)) for i in range(T))
    matmuls += 2 * 2 * 32 * seen  # two layers; scores, and values by scores
    assert bench_growth.step_cost(config, 3 * T, 4)[0] == pytest.approx(3 * 3 * 2 * matmuls)


@pytest.mark.parametrize("own", bench_growth.CURVES.values(), ids=bench_growth.CURVES)
def test_expected_cache(own):
    """The bytes that a cache of 1,024 positions has in keys and values."""
    config = GPTConfig(**dict(n_layer=4, n_head=2, n_embd=32, block_size=4096, vocab_size=40) | own)
    cache = bench_growth.filled(GPT(config).eval(), 2048)
    assert cache.offset == 2048 and cache.nbytes == bench_growth.cache_cost(config, 2048, 4)[1]


def test_routed_blocks_work_on_an_eighth():
    config = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=4096, vocab_size=40, mod="topk")
    model = GPT(config).eval()
    cache = bench_growth.filled(model, 800)
    before = [layer.rows[0].positions.size if hasattr(layer, "rows") else layer.length for layer in cache.layers]
    for number in range(16):
        bench_growth.choose(model, number)
        mx.eval(model(mx.array([[1]]), cache=cache))
    after = [layer.rows[0].positions.size if hasattr(layer, "rows") else layer.length for layer in cache.layers]
    assert before == [800, 100] and after == [816, 102]


@pytest.mark.parametrize("variant", ["window", "moe", "mod", "yoco"])
def test_growth_without_a_variant(variant, tmp_path):
    """What is left after the variant is deleted still knows the baseline and the others."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    command = re.search(r"^sed .*\\\n.*$", (ROOT / "docs" / "variants.md").read_text(), re.M)[0]
    subprocess.run(command.replace("resformer", variant), shell=True, check=True, cwd=tmp_path)
    code = """if True:
        import bench_growth as growth
        from model import GPT, GPTConfig
        for own in growth.CURVES.values():
            config = GPTConfig(block_size=2048, **own)
            print(growth.step_cost(config, 10, 4), growth.cache_cost(config, 1024, 4))
            growth.filled(GPT(config), 1024)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("\n") == (4 if variant == "moe" else 3), done.stderr


def test_picture_of_growth(tmp_path):
    """Curves that are flat, and of four orders of magnitude."""
    panels = [dict(name="a", x="x", y="y", curves=[dict(name=str(i), x=[1, 2, 1024], measured=[1, 1, top],
                                                        expected=[1, 1.5, 2]) for i in range(6)])
              for top in (1.01, 1e4)]
    draw.growth(f"{tmp_path}/a.png", panels, "title")
    assert np.frombuffer((tmp_path / "a.png").read_bytes()[16:24], ">u4").tolist()[0] > 300


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
    assert "no side 'foo'" in bench("--sides=ours,foo", status=2).stderr
    assert "so name it too" in bench("--sides=torch", status=2).stderr
    assert "no draw 'foo'" in bench("--draws=foo", status=2).stderr
    assert "no panel 'foo'" in bench("--panels=foo", status=2).stderr
    assert "give whole numbers" in bench("--batches=1,x", status=2).stderr
    assert "batches=0" in bench("--batches=0", status=2).stderr
    assert "let its name end in .png" in bench("--out=a.svg", status=2).stderr
    assert "there is no folder" in bench("--out=none/a.png", status=2).stderr
