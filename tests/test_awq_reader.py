"""awq_reader.py: layers that AutoAWQ packed (fixtures/make_awq.py), an independent packer, whole folders, bad input."""
import json
import re
import shutil
import sys
from collections.abc import Callable

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
import prepared
import pytest
from conftest import ROOT, OneLayer, peak_memory, run_here, survives

import readers
from config import UserError
from model import GPT, GPTConfig, load_checkpoint, save_checkpoint

SOURCE = (ROOT / "awq_reader.py").read_text()
START, END = SOURCE.index("# ---- layouts"), SOURCE.index("# ---- run")
made = {"np": np, "mx": mx, "readers": readers, "UserError": UserError, "Callable": Callable, "scale_dtype": "float32",
        "dense": False}
exec(SOURCE[START:END], made)  # without the part that runs
FIXTURE = {name: np.array(array) for name, array in mx.load(str(ROOT / "tests/fixtures/awq.safetensors")).items()}


def integers(words) -> np.ndarray:
    """(n, m) of MLX's words of 4 bits -> (n, 8 m), one at a time."""
    return np.array([[int(word) >> 4 * i & 15 for word in row for i in range(8)] for row in words], np.uint8)


@pytest.mark.parametrize("name", ["gemm.32", "gemm.64", "gemm.128", "gemm.-1", "gemv.32", "gemv.64", "gemv.128"])
def test_what_autoawq_packed(name):
    """Integers, zeros and scales are exact, and from our arrays MLX unpacks w = (q - zero) scale."""
    layer = {part: FIXTURE[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "q", "zero", "scale")}
    packed = [layer[part] for part in ("qweight", "qzeros", "scales")]
    groups = layer["zero"].shape[1]
    words, zeros, scales = made["from_gemm"](*packed) if "gemm" in name else made["from_gemv"](*packed, groups)
    assert np.array_equal(integers(words), layer["q"])
    assert np.array_equal(zeros, layer["zero"]) and np.array_equal(scales, layer["scale"])
    weight, scales, biases = readers.packed_linear(words, zeros, scales, 4).values()
    width = 256 // scales.shape[1]
    assert width in (32, 64, 128)
    found = np.array(mx.dequantize(weight, scales, biases, width, 4), np.float64)
    q, zero, scale = (layer[part].astype(np.float64) for part in ("q", "zero", "scale"))
    wide = [np.repeat(x, 256 // groups, axis=1) for x in (zero, scale)]
    assert np.abs(found - (q - wide[0]) * wide[1]).max() < 1e-6


# ---- an independent packer -------------------------------------------------------------------------------------------


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


def packed(q: np.ndarray, zero: np.ndarray, scale: np.ndarray, version: str) -> dict[str, mx.array]:
    """A layer (out, in) with zeros and scales (out, groups) in AutoAWQ's arrays."""
    if version == "gemm":
        parts = pack_gemm(q.T), pack_gemm(zero.T), scale.T
    else:
        words, at_once = -(-zero.shape[1] // 8), {32: 4, 64: 2}.get(q.shape[1] // zero.shape[1], 1)
        words = -(-words // at_once) * at_once
        padded = np.zeros((len(q), 8 * words), np.float16)
        padded[:, :zero.shape[1]] = scale
        parts = pack_plain(q, q.shape[1] // 8), pack_plain(zero, words), padded
    return {part: mx.array(np.ascontiguousarray(array)) for part, array in
            zip(("qweight", "qzeros", "scales"), parts, strict=True)}


@pytest.mark.parametrize("version", ["gemm", "gemv"])
@pytest.mark.parametrize("group_size", [32, 64, 96, 128, 256, -1])
def test_every_group_size(version, group_size):
    """A layer's integers are exact, and so are the weights that they stand for. MLX has no groups of 96, 256 and 768:
    they become several groups."""
    rng, width = np.random.default_rng(0), 768 if group_size == -1 else group_size
    q, zero = rng.integers(0, 16, (24, 768)), rng.integers(0, 16, (24, 768 // width))
    scale = rng.uniform(0.005, 0.02, zero.shape).astype(np.float16)
    source = OneLayer({f"a.{part}": array for part, array in packed(q, zero, scale, version).items()})
    found = made["reader"]({"version": version, "group_size": group_size}, "config.json")(source, "a")
    width = 768 // found["scales"].shape[1]
    assert np.array_equal(integers(np.array(found["weight"])), q) and width in (32, 64, 128)
    weight = np.array(mx.dequantize(*found.values(), width, 4), np.float64)
    wide = [np.repeat(x.astype(np.float64), 768 // zero.shape[1], axis=1) for x in (zero, scale)]
    assert np.abs(weight - (q - wide[0]) * wide[1]).max() < 1e-6


# ---- whole folders ---------------------------------------------------------------------------------------------------


def folder_of(tmp_path, version="gemm", group_size=32, n_expert=0, **more):
    """A folder with a packed Llama or Mixtral, and the same model with float weights."""
    config = GPTConfig(block_size=64, vocab_size=64, n_layer=2, n_head=2, n_embd=64, ffn_dim=128, mlp="swiglu",
                       qk_norm=False, tie=False, n_expert=n_expert, expert_balance="none")
    model, rng, folder = GPT(config), np.random.default_rng(0), tmp_path / "folder"
    model.set_dtype(mx.float16)
    save_checkpoint(str(tmp_path / "dense.safetensors"), model, {})
    run_here("hf_reader.py", tmp_path / "dense.safetensors", f"--export={folder}")
    arrays = mx.load(str(folder / "model.safetensors"))
    for name in [name for name in arrays if re.search(r"(_proj|w[123])\.weight$", name)]:
        outputs, inputs = arrays.pop(name).shape
        path, width = name.removesuffix(".weight"), inputs if group_size == -1 else group_size
        q = rng.integers(0, 16, (outputs, inputs))
        zero = rng.integers(0, 16, (outputs, inputs // width))
        scale = rng.uniform(0.005, 0.02, zero.shape).astype(np.float16)
        arrays |= {f"{path}.{part}": array for part, array in packed(q, zero, scale, version).items()}
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
    done = prepared.run(command)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and (not status or done.stderr.count("\n") == 1), done.stderr
    return done


@pytest.mark.parametrize("version", ["gemm", "gemv"])
@pytest.mark.parametrize(("group_size", "n_expert"), [(32, 0), (64, 0), (-1, 0), (32, 3)])
def test_folder(version, group_size, n_expert, tmp_path):
    """Packed and unpacked checkpoints give the logits of the model with float weights."""
    folder, model = folder_of(tmp_path, version, group_size, n_expert)
    idx = mx.array(np.random.default_rng(1).integers(0, 64, (2, 20)))
    logits = np.array(model(idx))
    for name, tolerance in (("packed", 1e-5), ("float16", 5e-3), ("dense", 2e-3)):
        out = tmp_path / f"{name}.out"
        scales = ["--scale_dtype=float16"] if name == "float16" else []
        run_here("awq_reader.py", folder, out, *scales, f"--dense={name == 'dense'}")
        found, _ = load_checkpoint(str(out))
        found.set_dtype(mx.float32)
        assert np.abs(np.array(found(idx)) - logits).max() < tolerance * np.abs(logits).max()
        assert hasattr(found.blocks[0].attn.q, "bits") == (name != "dense")
        assert hasattr(found.blocks[0].mlp.up, "bits") == (name != "dense")
        if group_size == 64:
            linear = sum(p.nbytes for p in found.blocks[0].attn.q.parameters().values())
            assert name != "packed" or linear <= (0.25 + 8 / 64 / 2 + 0.001) * 64 * 64 * 2


def test_peak_memory(tmp_path):
    """Reading needs the memory of the output and of one tensor: no layer is unpacked and kept."""
    small, _ = folder_of(tmp_path)
    large, rng = tmp_path / "large", np.random.default_rng(0)
    shutil.copytree(small, large)
    raw = json.loads((small / "config.json").read_text())
    raw |= {"num_hidden_layers": 16, "hidden_size": 1024, "head_dim": 512, "intermediate_size": 3072}
    arrays = {name: array for name, array in mx.load(str(small / "model.safetensors")).items() if "layers" not in name}
    arrays = {name: mx.zeros((*array.shape[:-1], 1024), mx.float16) for name, array in arrays.items()}
    for layer in range(16):
        for name in ("input_layernorm", "post_attention_layernorm"):
            arrays[f"model.layers.{layer}.{name}.weight"] = mx.ones((1024,), mx.float16)
        for name, inputs, outputs in (*((f"self_attn.{letter}_proj", 1024, 1024) for letter in "qkvo"),
                                      ("mlp.gate_proj", 1024, 3072), ("mlp.up_proj", 1024, 3072),
                                      ("mlp.down_proj", 3072, 1024)):
            words = mx.array(rng.integers(-2**31, 2**31, (inputs, outputs // 8), np.int64).astype(np.int32))
            parts = {"qweight": words, "qzeros": words[:inputs // 32], "scales": mx.ones((inputs // 32, outputs))}
            arrays |= {f"model.layers.{layer}.{name}.{part}": array for part, array in parts.items()}
    mx.save_safetensors(str(large / "model.safetensors"), arrays)
    (large / "config.json").write_text(json.dumps(raw))
    least, most = (peak_memory("awq_reader.py", folder, tmp_path / f"{folder.name}.out") for folder in (small, large))
    dense = 16 * 13 * 2**20 * 2  # bytes of float16; packed with scales of float32 in groups of 32, 6/16 of it
    size = (tmp_path / "large.out").stat().st_size
    assert size < 0.38 * dense and most - least < 1.2 * size, (least, most, size)


def test_older_folders(tmp_path):
    """Older folders have a separate file about how they are packed."""
    folder, model = folder_of(tmp_path)
    raw = json.loads((folder / "config.json").read_text())
    del raw["quantization_config"]
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "quant_config.json").write_text(json.dumps({"w_bit": 4, "q_group_size": 32, "version": "GEMM"}))
    run_here("awq_reader.py", folder, tmp_path / "out.safetensors")
    found, idx = load_checkpoint(str(tmp_path / "out.safetensors"))[0], mx.arange(20)[None]
    found.set_dtype(mx.float32)
    assert mx.abs(found(idx) - model(idx)).max() < 1e-5 * mx.abs(model(idx)).max()


@pytest.mark.parametrize("change, says", [
    ("drop scales", "no tensor model.layers.1.mlp.up_proj.scales"), ("drop qzeros", "mlp.up_proj.qzeros"),
    ("cut scales", "mlp.up_proj has qweight"), ("bits", "3 bits in the layout 'gemm'"), ("version", "'marlin'"),
    ("truncate", "not a whole safetensors file"), ("group", "do not fit one another in groups of 64"),
    ("not packed", "no quantization_config"), ("gptq", "quant_method is 'gptq'"), ("half", "matrices of int32"),
    ("no group", "group_size=0"), ("text", "group_size='32'"), ("narrow", "multiples of 32"),
    ("letter", "'versjon', which should be 'version'"),
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
    elif change == "half":
        arrays[f"{name}.qweight"] = arrays[f"{name}.qweight"].astype(mx.bfloat16)
    elif change == "narrow":  # groups of 16
        arrays |= {key: mx.repeat(array, 2, axis=0) for key, array in arrays.items()
                   if key.endswith(("qzeros", "scales"))}
    settings = {"bits": ("bits", 3), "version": ("version", "marlin"), "group": ("group_size", 64),
                "gptq": ("quant_method", "gptq"), "no group": ("group_size", 0), "text": ("group_size", "32"),
                "narrow": ("group_size", 16), "letter": ("versjon", "gemm")}
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


@pytest.mark.parametrize("file, refused", [("config.json", 0.6), ("model.safetensors", 0.98)])
def test_fuzz(file, refused, tmp_path):
    folder, _ = folder_of(tmp_path)
    survives("awq_reader.py", folder, folder / file, 100, refused)
