"""awq_reader.py: what AutoAWQ itself packed (fixtures/make_awq.py), an independent packer, whole folders, bad input."""
import json
import re
import shutil
import subprocess
import sys

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT

from hub import packed_linear
from model import GPT, GPTConfig, load_checkpoint, save_checkpoint

SOURCE = (ROOT / "awq_reader.py").read_text()
START, END = SOURCE.index("# ---- layouts"), SOURCE.index("# ---- a layer")
made = {"np": np}
exec(SOURCE[START:END], made)  # the section of the layouts stands by itself
FIXTURE = {name: np.array(array) for name, array in mx.load(str(ROOT / "tests/fixtures/awq.safetensors")).items()}


def integers(words) -> np.ndarray:
    """(n, m) of MLX's words of 4 bits -> (n, 8 m), one at a time."""
    return np.array([[int(word) >> 4 * i & 15 for word in row for i in range(8)] for row in words], np.uint8)


@pytest.mark.parametrize("name", ["gemm.32", "gemm.64", "gemm.128", "gemm.-1", "gemv.32", "gemv.64", "gemv.128"])
def test_what_autoawq_packed(name):
    """Its integers, zeros and scales, exactly; and MLX unpacks w = (q - zero) scale from ours."""
    layer = {part: FIXTURE[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "q", "zero", "scale")}
    packed = [layer[part] for part in ("qweight", "qzeros", "scales")]
    groups = layer["zero"].shape[1]
    words, zeros, scales = made["from_gemm"](*packed) if "gemm" in name else made["from_gemv"](*packed, groups)
    assert np.array_equal(integers(words), layer["q"])
    assert np.array_equal(zeros, layer["zero"]) and np.array_equal(scales, layer["scale"])
    weight, scales, biases = packed_linear(words, zeros, scales, 4).values()
    width = 256 // scales.shape[1]
    assert width in (32, 64, 128)
    found = np.array(mx.dequantize(weight, scales, biases, width, 4), np.float64)
    q, zero, scale = (layer[part].astype(np.float64) for part in ("q", "zero", "scale"))
    wide = [np.repeat(x, 256 // groups, axis=1) for x in (zero, scale)]
    assert np.abs(found - (q - wide[0]) * wide[1]).max() < 1e-6


# ---- whole folders ---------------------------------------------------------------------------------------------------


def pack_gemm(q: np.ndarray) -> np.ndarray:
    """(n, m) integers -> int32 (n, m / 8); the i-th nibble of a word is its column [0, 2, 4, 6, 1, 3, 5, 7][i]."""
    words = np.zeros((len(q), q.shape[1] // 8), np.uint32)
    for row in range(len(q)):
        for c in range(words.shape[1]):
            for i, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                words[row, c] |= np.uint32(int(q[row, 8 * c + column]) << 4 * i)
    return words.view(np.int32)


def pack_plain(q: np.ndarray, columns: int) -> np.ndarray:
    """(n, m) integers -> int32 (n, columns), the i-th nibble column 8c + i, padded with zeros."""
    words = np.zeros((len(q), columns), np.uint32)
    for row in range(len(q)):
        for j, value in enumerate(q[row]):
            words[row, j // 8] |= np.uint32(int(value) << 4 * (j % 8))
    return words.view(np.int32)


def folder_of(tmp_path, version="gemm", group_size=32, n_expert=0, **more):
    """A packed Llama, or Mixtral, and the dense model that it stands for."""
    config = GPTConfig(block_size=64, vocab_size=64, n_layer=2, n_head=2, n_embd=64, ffn_dim=128, mlp="swiglu",
                       qk_norm=False, tie=False, n_expert=n_expert, expert_balance="none")
    model, rng, folder = GPT(config), np.random.default_rng(0), tmp_path / "folder"
    model.set_dtype(mx.float16)
    save_checkpoint(str(tmp_path / "dense.safetensors"), model, {})
    subprocess.run([sys.executable, ROOT / "hf_reader.py", tmp_path / "dense.safetensors", f"--export={folder}"],
                   check=True, capture_output=True)
    arrays = mx.load(str(folder / "model.safetensors"))
    for name in [name for name in arrays if re.search(r"(_proj|w[123])\.weight$", name)]:
        outputs, inputs = arrays.pop(name).shape
        path, width = name.removesuffix(".weight"), inputs if group_size == -1 else group_size
        q = rng.integers(0, 16, (outputs, inputs))
        zero = rng.integers(0, 16, (outputs, inputs // width))
        scale = rng.uniform(0.005, 0.02, zero.shape).astype(np.float16)
        if version == "gemm":
            parts = pack_gemm(q.T), pack_gemm(zero.T), scale.T
        else:
            words = -(-zero.shape[1] // 8)
            words = -(-words // {32: 4, 64: 2}.get(width, 1)) * {32: 4, 64: 2}.get(width, 1)
            padded = np.zeros((outputs, 8 * words), np.float16)
            padded[:, :zero.shape[1]] = scale
            parts = pack_plain(q, inputs // 8), pack_plain(zero, words), padded
        for part, array in zip(("qweight", "qzeros", "scales"), parts, strict=True):
            arrays[f"{path}.{part}"] = mx.array(np.ascontiguousarray(array))
        wide = [np.repeat(x.astype(np.float32), width, axis=1) for x in (zero, scale)]
        ours = path.replace("model.layers", "blocks").replace("self_attn", "attn").replace("o_proj", "out")
        weight = mx.array((q - wide[0]) * wide[1])
        if match := re.search(r"layers\.(\d)\.block_sparse_moe\.experts\.(\d)\.(w[123])$", path):
            experts = model.blocks[int(match[1])].mlp[{"w1": "gate", "w2": "down", "w3": "up"}[match[3]]]
            experts.weight = experts.weight.astype(mx.float32)
            experts.weight[int(match[2])] = weight
        else:
            dict(model.named_modules())[ours.removesuffix("_proj")].weight = weight
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True,
                                  "version": version, **more}
    (folder / "config.json").write_text(json.dumps(raw))
    model.set_dtype(mx.float32)
    return folder, model


def read(*arguments, status=0):
    command = [sys.executable, ROOT / "awq_reader.py", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and (not status or done.stderr.count("\n") == 1), done.stderr
    return done


@pytest.mark.parametrize("version", ["gemm", "gemv"])
@pytest.mark.parametrize(("group_size", "n_expert"), [(32, 0), (64, 0), (-1, 0), (32, 3)])
def test_folder(version, group_size, n_expert, tmp_path):
    """Packed and dense: the logits of the model that the integers stand for."""
    folder, model = folder_of(tmp_path, version, group_size, n_expert)
    idx = mx.array(np.random.default_rng(1).integers(0, 64, (2, 20)))
    logits = np.array(model(idx))
    for name, tolerance in (("packed", 1e-5), ("float16", 5e-3), ("dense", 2e-3)):
        out = tmp_path / f"{name}.out"
        read(folder, out, *(["--scale_dtype=float16"] if name == "float16" else []), f"--dense={name == 'dense'}")
        found, _ = load_checkpoint(str(out))
        found.set_dtype(mx.float32)
        assert np.abs(np.array(found(idx)) - logits).max() < tolerance * np.abs(logits).max()
        assert hasattr(found.blocks[0].attn.q, "bits") == (name != "dense")
        assert hasattr(found.blocks[0].mlp.up, "bits") == (name != "dense")
        if group_size == 64:
            linear = sum(p.nbytes for p in found.blocks[0].attn.q.parameters().values())
            assert name != "packed" or linear <= (0.25 + 8 / 64 / 2 + 0.001) * 64 * 64 * 2


def test_peak_memory_is_that_of_the_output(tmp_path):
    """No layer becomes dense in MLX's memory."""
    folder, _ = folder_of(tmp_path)
    assert "MB" in read(folder, tmp_path / "out").stdout


@pytest.mark.parametrize("change, says", [
    ("drop scales", "no tensor model.layers.1.mlp.up_proj.scales"), ("drop qzeros", "mlp.up_proj.qzeros"),
    ("cut scales", "mlp.up_proj has qweight"), ("bits", "3 bits in the layout 'gemm'"), ("version", "'marlin'"),
    ("truncate", "not a whole safetensors file"), ("group", "do not fit one another in groups of 64"),
    ("not packed", "no quantization_config"), ("gptq", "quant_method is 'gptq'"),
])
def test_bad_input(change, says, tmp_path):
    folder, _ = folder_of(tmp_path)
    path, config = folder / "model.safetensors", folder / "config.json"
    arrays, raw = mx.load(str(path)), json.loads(config.read_text())
    mx.eval(arrays)
    name = "model.layers.1.mlp.up_proj"
    if change.startswith("drop"):
        del arrays[f"{name}.{change.split()[1]}"]
    elif change == "cut scales":
        arrays[f"{name}.scales"] = arrays[f"{name}.scales"][:, :-1]
    settings = {"bits": ("bits", 3), "version": ("version", "marlin"), "group": ("group_size", 64),
                "gptq": ("quant_method", "gptq")}
    if change in settings:
        key, value = settings[change]
        raw["quantization_config"][key] = value
    elif change == "not packed":
        del raw["quantization_config"]
    mx.save_safetensors(str(path), arrays)
    config.write_text(json.dumps(raw))
    if change == "truncate":
        path.write_bytes(path.read_bytes()[:-100])
    out = tmp_path / "out.safetensors"
    assert says in read(folder, out, status=2).stderr
    assert not list(tmp_path.glob("out*"))
    shutil.rmtree(folder)


def test_fuzz(tmp_path):
    """Cut anywhere, or bits of the header flipped: one line and status 2, or the same checkpoint."""
    folder, _ = folder_of(tmp_path)
    read(folder, tmp_path / "whole.safetensors")
    path, idx = folder / "model.safetensors", mx.arange(20)[None]
    logits, data = np.array(load_checkpoint(str(tmp_path / "whole.safetensors"))[0](idx)), path.read_bytes()
    for seed in range(16):
        rng, bad = np.random.default_rng(seed), bytearray(data)
        if seed % 2:
            del bad[rng.integers(len(bad)):]
        else:
            bad[rng.integers(8 + int.from_bytes(data[:8], "little"))] ^= 1 << rng.integers(8)
        path.write_bytes(bad)
        command = [sys.executable, ROOT / "awq_reader.py", folder, tmp_path / "out.safetensors"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert "Traceback" not in done.stderr and done.returncode == 2 or done.returncode == 0, done.stderr
        if done.returncode == 0:
            assert np.array_equal(np.array(load_checkpoint(str(tmp_path / "out.safetensors"))[0](idx)), logits)
            (tmp_path / "out.safetensors").unlink()
        assert done.returncode or not seed % 2
        assert not list(tmp_path.glob("out*"))
