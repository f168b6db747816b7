"""gptq_reader.py: layers that GPTQModel packed (fixtures/make_gptq.py), an independent packer, folders, bad input."""
import json
import re
import sys
from collections.abc import Callable

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
import prepared
import pytest
from conftest import ROOT, OneLayer, run_here, survives

import readers
from config import UserError
from model import GPT, GPTConfig, load_checkpoint, save_checkpoint

SOURCE = (ROOT / "gptq_reader.py").read_text()
START, END = SOURCE.index("# ---- layouts"), SOURCE.index("# ---- run")
made = {"np": np, "mx": mx, "re": re, "readers": readers, "UserError": UserError, "Callable": Callable,
        "scale_dtype": "float32", "dense": False}
exec(SOURCE[START:END], made)  # without the part that runs
FIXTURE = {name: np.array(array) for name, array in mx.load(str(ROOT / "tests/fixtures/gptq.safetensors")).items()}
every_width = pytest.mark.parametrize("bits", [2, 3, 4, 8])


def packed_down(q: np.ndarray, bits: int) -> np.ndarray:
    """(n, m) integers -> int32 (n bits / 32, m): a stream of bits down each column, written with Python's integers."""
    words = np.zeros((len(q) * bits // 32, q.shape[1]), np.uint32)
    for column in range(q.shape[1]):
        stream = sum(int(value) << bits * row for row, value in enumerate(q[:, column]))
        for row in range(len(words)):
            words[row, column] = stream >> 32 * row & 0xFFFFFFFF
    return words.view(np.int32)


def minus_one(zeros: np.ndarray, bits: int) -> np.ndarray:
    """(groups, out) -> qzeros of version 1, as packers write it: 1 is subtracted in whole words, or by field at 3 bits.
    """
    if bits == 3:
        return packed_down((zeros.T - 1) % 8, 3).T
    ones = sum(1 << bits * i for i in range(32 // bits))
    return (packed_down(zeros.T, bits).T.view(np.uint32) - np.uint32(ones)).view(np.int32)


@every_width
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_what_gptqmodel_packed(bits, group_size):
    """Integers and zeros are exact; transposed, the words are MLX's."""
    layer = {part: FIXTURE[f"{bits}.{group_size}.{part}"] for part in ("qweight", "qzeros", "g_idx", "q", "zero")}
    words = np.ascontiguousarray(layer["qweight"].T).view(np.uint32)
    assert np.array_equal(made["unpack"](words, bits), layer["q"])
    assert np.array_equal(made["pack"](layer["q"], bits), words)
    assert np.array_equal(made["zeros_of"](layer["qzeros"], bits, 2).T, layer["zero"])
    scales, biases = mx.ones((32, 128 // group_size)), mx.zeros((32, 128 // group_size))
    assert np.array_equal(np.array(mx.dequantize(mx.array(words), scales, biases, group_size, bits)), layer["q"])
    assert np.array_equal(packed_down(layer["q"].T, bits), layer["qweight"])  # so the packer is right


@every_width
def test_zeros_of_version_1(bits):
    """All values of zero points, also 0, which borrows from the next field."""
    zeros = np.random.default_rng(0).integers(0, 2**bits, (6, 96))
    zeros[0], zeros[1, ::2] = 0, 0
    assert np.array_equal(made["zeros_of"](np.ascontiguousarray(minus_one(zeros, bits)), bits, 1), zeros)


@every_width
@pytest.mark.parametrize("group_size", [32, 64, 96, 128, -1])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("act_order", [False, True])
def test_every_layout(bits, group_size, version, act_order):
    """A layer of the packer above: its integers, in their order, and the weights that they stand for, are exact."""
    rng, width = np.random.default_rng(0), 384 if group_size == -1 else group_size
    q, zero = rng.integers(0, 2**bits, (32, 384)), rng.integers(0, 2**bits, (32, 384 // width))
    zero[0] = 0
    scale, group = rng.uniform(0.1, 0.3, zero.shape).astype(np.float16), np.arange(384) // width
    group = rng.permutation(group) if act_order else group
    arrays = {"qweight": packed_down(q.T, bits), "scales": scale.T, "g_idx": group.astype(np.int32),
              "qzeros": minus_one(zero.T, bits) if version == 1 else packed_down(zero, bits).T}
    source = OneLayer({f"a.{part}": mx.array(np.ascontiguousarray(array)) for part, array in arrays.items()})
    form = {"bits": bits, "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}
    found = made["reader"](form, "config.json")(source, "a")
    order = np.array(found.pop("order")) if "order" in found else np.arange(384)
    assert np.array_equal(made["unpack"](np.array(found["weight"]), bits), q[:, order])
    assert (act_order and width < 384) == (order != np.arange(384)).any()
    weight = np.empty((32, 384))
    weight[:, order] = np.array(mx.dequantize(*found.values(), 384 // found["scales"].shape[1], bits), np.float64)
    wanted = (q - zero[:, group]) * scale[:, group].astype(np.float64)
    assert np.abs(weight - wanted).max() < 1e-6 * np.abs(wanted).max()


# ---- whole folders ---------------------------------------------------------------------------------------------------


def folder_of(tmp_path, bits=4, group_size=32, act_order=False, version=1, symmetric=False, n_expert=0):
    """A folder with a packed Qwen2, which has biases, or Mixtral, and the same model with float weights."""
    config = GPTConfig(block_size=64, vocab_size=64, n_layer=1, n_head=2, n_embd=64, ffn_dim=128, mlp="swiglu",
                       qk_norm=False, qkv_bias=not n_expert, n_expert=n_expert, expert_balance="none")
    model, rng, folder = GPT(config), np.random.default_rng(0), tmp_path / "folder"
    for letter in "qkv":
        if not n_expert:
            model.blocks[0].attn[letter].bias = mx.array(rng.standard_normal(64).astype(np.float32))
    model.set_dtype(mx.float16)
    save_checkpoint(str(tmp_path / "dense.safetensors"), model, {})
    run_here("hf_reader.py", tmp_path / "dense.safetensors", f"--export={folder}")
    arrays = mx.load(str(folder / "model.safetensors"))
    for name in [name for name in arrays if re.search(r"(_proj|w[123])\.weight$", name)]:
        outputs, inputs = arrays.pop(name).shape
        path, width = name.removesuffix(".weight"), inputs if group_size == -1 else group_size
        q = rng.integers(0, 2**bits, (outputs, inputs))
        zero = rng.integers(0, 2**bits, (outputs, inputs // width))
        if symmetric:
            zero[:] = 2 ** (bits - 1)
        scale = rng.uniform(0.1, 0.3, zero.shape).astype(np.float16) / np.float16(2**bits)
        group = np.arange(inputs) // width
        if act_order:
            group = rng.permutation(group)
        qzeros = minus_one(zero.T, bits) if version == 1 else packed_down(zero, bits).T
        for part, array in (("qweight", packed_down(q.T, bits)), ("qzeros", qzeros), ("scales", scale.T),
                            ("g_idx", group.astype(np.int32))):
            arrays[f"{path}.{part}"] = mx.array(np.ascontiguousarray(array))
        ours = path.replace("model.layers", "blocks").replace("self_attn", "attn").replace("o_proj", "out")
        weight = mx.array(((q - zero[:, group]) * scale[:, group].astype(np.float32)).astype(np.float32))
        if match := re.search(r"experts\.(\d+)\.(w[123])$", path):
            experts = model.blocks[0].mlp[{"w1": "gate", "w2": "down", "w3": "up"}[match[2]]]
            experts.weight = experts.weight.astype(mx.float32)
            experts.weight[int(match[1])] = weight
        else:
            dict(model.named_modules())[ours.removesuffix("_proj")].weight = weight
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": symmetric,
                                  "desc_act": act_order} | ({"checkpoint_format": "gptq_v2"} if version == 2 else {})
    (folder / "config.json").write_text(json.dumps(raw))
    model.set_dtype(mx.float32)
    return folder, model


def read(*arguments, status=0):
    command = [sys.executable, ROOT / "gptq_reader.py", *map(str, arguments)]
    done = prepared.run(command)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and (not status or done.stderr.count("\n") == 1), done.stderr
    return done


@every_width
@pytest.mark.parametrize("settings", [dict(), dict(version=2, group_size=64), dict(act_order=True),
                                      dict(group_size=-1, symmetric=True), dict(n_expert=3),
                                      dict(n_expert=3, act_order=True)], ids=str)
def test_folder(bits, settings, tmp_path):
    """Packed and unpacked checkpoints give the logits of the model with float weights."""
    folder, model = folder_of(tmp_path, bits, **settings)
    idx = mx.array(np.random.default_rng(1).integers(0, 64, (2, 20)))
    logits = np.array(model(idx))
    for dense, tolerance in ((False, 1e-5), (True, 3e-3)):
        out = tmp_path / f"{dense}.out"
        run_here("gptq_reader.py", folder, out, f"--dense={dense}")
        found, _ = load_checkpoint(str(out))
        found.set_dtype(mx.float32)
        assert np.abs(np.array(found(idx)) - logits).max() < tolerance * np.abs(logits).max()
        layer = found.blocks[0].attn.q
        assert dense or layer.bits == bits and ("order" in layer) == settings.get("act_order", False)
        assert dense or found.blocks[0].mlp.up.bits == bits


def test_bits_of_single_modules(tmp_path):
    """GPTQModel's `dynamic`: the first rule that matches counts. mlp.up_proj is packed anew, to 8 bits."""
    folder, model = folder_of(tmp_path)
    arrays, name = mx.load(str(folder / "model.safetensors")), "model.layers.0.mlp.up_proj"
    rng = np.random.default_rng(2)
    q, zero, scale = rng.integers(0, 256, (128, 64)), rng.integers(0, 256, (128, 1)), np.full((128, 1), 2**-10)
    for part, array in (("qweight", packed_down(q.T, 8)), ("qzeros", minus_one(zero.T, 8)),
                        ("scales", scale.T.astype(np.float16)), ("g_idx", np.zeros(64, np.int32))):
        arrays[f"{name}.{part}"] = mx.array(np.ascontiguousarray(array))
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "pt"})
    model.blocks[0].mlp.up.weight = mx.array(((q - zero) * scale).astype(np.float32))
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"]["dynamic"] = {
        "-:lm_head": {}, r"+:.*\.up_proj": {"bits": 8, "group_size": 64}, r".*\.mlp\.": {"desc_act": False},
        r"+:model\.layers\.0\.mlp\.up": {"bits": 2}}
    (folder / "config.json").write_text(json.dumps(raw))
    run_here("gptq_reader.py", folder, tmp_path / "out.safetensors")
    found, idx = load_checkpoint(str(tmp_path / "out.safetensors"))[0], mx.arange(20)[None]
    found.set_dtype(mx.float32)
    assert [found.blocks[0].mlp[part].bits for part in ("gate", "up", "down")] == [4, 8, 4]
    assert mx.abs(found(idx) - model(idx)).max() < 1e-5 * mx.abs(model(idx)).max()
    for rules in ({"+:(": {"bits": 8}}, {"+:.*up": 8}, ["+:.*up"]):
        raw["quantization_config"]["dynamic"] = rules
        (folder / "config.json").write_text(json.dumps(raw))
        with pytest.raises(UserError, match="dynamic holds a rule that cannot be read"):
            run_here("gptq_reader.py", folder, tmp_path / "out.safetensors")


def test_older_folders(tmp_path):
    """Older folders have a separate file about how they are packed."""
    folder, model = folder_of(tmp_path)
    raw = json.loads((folder / "config.json").read_text())
    del raw["quantization_config"]
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="qweight is packed: read it with awq_reader.py or gptq_reader.py"):
        run_here("hf_reader.py", folder, tmp_path / "out.safetensors")
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "desc_act": False}))
    read(folder, tmp_path / "out.safetensors")
    found, idx = load_checkpoint(str(tmp_path / "out.safetensors"))[0], mx.arange(20)[None]
    found.set_dtype(mx.float32)
    assert mx.abs(found(idx) - model(idx)).max() < 1e-5 * mx.abs(model(idx)).max()


@pytest.mark.parametrize("change, says", [
    ("drop scales", "no tensor model.layers.0.mlp.up_proj.scales"), ("drop qzeros", "mlp.up_proj.qzeros"),
    ("cut scales", "mlp.up_proj has qweight"), ("bits", "5 bits in the format 'gptq'"), ("form", "'marlin'"),
    ("g_idx", "mlp.up_proj.g_idx does not share 64 inputs among 2 equal groups"),
    ("truncate", "not a whole safetensors file"), ("other bits", "do not fit one another at 8 bits"),
    ("not packed", "no quantization_config"), ("awq", "quant_method is 'awq'"), ("dtype", "are not matrices of int32"),
    ("half", "are not matrices of int32"), ("float bits", "4.0 bits"), ("list", "no quantization_config"),
    ("letter", "which should be 'checkpoint_format'"),
])
def test_bad_input(change, says, tmp_path):
    folder, _ = folder_of(tmp_path)
    path, config = folder / "model.safetensors", folder / "config.json"
    arrays, raw = mx.load(str(path)), json.loads(config.read_text())
    mx.eval(arrays)
    name = "model.layers.0.mlp.up_proj"
    if change.startswith("drop"):
        del arrays[f"{name}.{change.split()[1]}"]
    elif change == "cut scales":
        arrays[f"{name}.scales"] = arrays[f"{name}.scales"][:, :-1]
    elif change == "g_idx":
        arrays[f"{name}.g_idx"] = mx.zeros((64,), dtype=mx.int32)
    elif change == "dtype":
        arrays[f"{name}.qweight"] = arrays[f"{name}.qweight"].astype(mx.float16)
    elif change == "half":
        arrays[f"{name}.qzeros"] = arrays[f"{name}.qzeros"].astype(mx.bfloat16)
    settings = {"bits": ("bits", 5), "form": ("checkpoint_format", "marlin"), "other bits": ("bits", 8),
                "awq": ("quant_method", "awq"), "float bits": ("bits", 4.0),
                "letter": ("checkpoint_formaT", "gptq_v2")}
    if change in settings:
        key, value = settings[change]
        raw["quantization_config"][key] = value
    elif change == "not packed":
        del raw["quantization_config"]
    elif change == "list":
        raw["quantization_config"] = [raw["quantization_config"]]
    mx.save_safetensors(str(path), arrays)
    config.write_text(json.dumps(raw))
    if change == "truncate":
        path.write_bytes(path.read_bytes()[:-100])
    assert says in read(folder, tmp_path / "out.safetensors", status=2).stderr
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("file, refused", [("config.json", 0.6), ("model.safetensors", 0.98)])
def test_fuzz(file, refused, tmp_path):
    folder, _ = folder_of(tmp_path, act_order=True, version=2)
    survives("gptq_reader.py", folder, folder / file, 100, refused)
