"""hf_reader.py: folders that mlx-lm quantized, with integers that MLX packs, read and written; and beside mlx-lm."""
import json
import re

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
import pytest
from conftest import run, run_here
from peers import peer

import readers
from model import GPT, GPTConfig, load_checkpoint, save_checkpoint
from quantized import dense_weight

IDX = mx.array(np.random.default_rng(1).integers(0, 64, (2, 20)))
EXPERTS = {"tie": False, "n_expert": 3, "expert_balance": "none"}
NAMES = {"attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj",
         "attn.out": "self_attn.o_proj", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj",
         "mlp.down": "mlp.down_proj", "embed": "model.embed_tokens", "head": "lm_head"}
STACKED = {name: theirs.replace("mlp.", "block_sparse_moe.switch_mlp.") for name, theirs in NAMES.items()}
STACKED["mlp.router"] = "block_sparse_moe.gate"  # mlx-lm's names in a Mixtral


def folder_of(tmp_path, settings: dict, mode: str):
    """A folder as mlx-lm quantizes it, to 4 bits in groups of 32, but mlp.down, where the mode is affine, to 8 bits in
    groups of 64; the model with the weights that MLX unpacks; the folder's arrays and settings."""
    config = GPTConfig(block_size=64, vocab_size=64, n_layer=2, n_head=2, n_embd=64, ffn_dim=192, mlp="swiglu",
                       qk_norm=False, **settings)
    model, folder = GPT(config), tmp_path / "folder"
    save_checkpoint(str(tmp_path / "dense.safetensors"), model, {})
    run_here("hf_reader.py", tmp_path / "dense.safetensors", f"--export={folder}")
    arrays = mx.load(str(folder / "model.safetensors"))
    arrays = {name: array for name, array in arrays.items()
              if not re.search(r"(_proj|embed_tokens|lm_head|gate|w[123])\.weight", name)}
    quantization = {"group_size": 32, "bits": 4, "mode": mode}
    for path, module in model.named_modules():
        if not hasattr(module, "to_quantized"):
            continue
        layer, _, inner = path.removeprefix("blocks.").partition(".")
        theirs = (STACKED if config.n_expert else NAMES)[inner or path]
        theirs = f"model.layers.{layer}.{theirs}" if inner else theirs
        own = mode == "affine" and inner == "mlp.down"
        form = dict(group_size=64, bits=8) if own else dict(group_size=32, bits=4, mode=mode)
        quantization |= {theirs: form} if own else {}
        parts = mx.quantize(module.weight, **form)
        names = [f"{theirs}.{part}" for part in ("weight", "scales", "biases")]  # MXFP4 has no biases
        arrays |= dict(zip(names, parts, strict=False))
        module.weight = mx.dequantize(*parts, **form).astype(mx.float32)
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "mlx"})
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"quantization": quantization, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder, model, arrays, quantization


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
@pytest.mark.parametrize("settings", [{"tie": True}, {"tie": False, "qkv_bias": True}, EXPERTS], ids=str)
def test_read(settings, mode, tmp_path):
    """Every weight is exactly what MLX unpacks, and stays packed: MXFP4 in 5 bits."""
    folder, model, arrays, _ = folder_of(tmp_path, settings, mode)
    run_here("hf_reader.py", folder, tmp_path / "out.safetensors")
    found, _ = load_checkpoint(str(tmp_path / "out.safetensors"))
    for path, module in model.named_modules():
        if hasattr(module, "to_quantized"):
            packed = dict(found.named_modules())[path]
            assert packed.bits == (5 if mode == "mxfp4" else 8 if path.endswith("down") else 4)
            assert mx.array_equal(dense_weight(packed), module.weight), path
    assert mx.abs(found(IDX) - model(IDX)).max() < 1e-5 * mx.abs(model(IDX)).max()


def test_every_number_of_mxfp4():
    """All 16 codes times all exponents up to 2^123, as MLX unpacks them."""
    words = mx.array(np.uint32([[0x76543210, 0xFEDCBA98] * 2]))
    words, exponents = mx.repeat(words, 248, axis=0), mx.arange(3, 251, dtype=mx.uint8)[:, None]
    exact = mx.dequantize(words, exponents, group_size=32, bits=4, mode="mxfp4").astype(mx.float32)
    found = readers.from_mxfp4({"weight": words, "scales": exponents}, "a file")
    parts = found["weight"], found["scales"].astype(mx.float32), found["biases"].astype(mx.float32)
    assert mx.array_equal(mx.dequantize(*parts, 32, 5), exact) and len(set(exact[100].tolist())) == 15  # 0 and -0


@pytest.mark.parametrize("settings", [{"tie": True}, EXPERTS], ids=str)
def test_written_again(settings, tmp_path):
    """An export of the packed model holds the arrays and the settings of the folder that was read; the
    experts, which mlx-lm stacks when it reads them, have arrays of their own."""
    folder, model, arrays, quantization = folder_of(tmp_path, settings, "affine")
    run_here("hf_reader.py", folder, tmp_path / "out.safetensors")
    run_here("hf_reader.py", tmp_path / "out.safetensors", f"--export={tmp_path / 'back'}", "--packed=True")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["quantization"] == quantization
    back = mx.load(str(tmp_path / "back" / "model.safetensors"))
    for name, array in arrays.items():
        if "switch_mlp" in name:
            letter = {"gate": "w1", "up": "w3", "down": "w2"}[re.search("(gate|up|down)_proj", name)[1]]
            each = re.sub(r"switch_mlp\.\w+", f"experts.{{}}.{letter}", name)
            back[name] = mx.stack([back.pop(each.format(expert)) for expert in range(3)])
        assert mx.array_equal(back.pop(name), array), name
    assert not back
    run_here("hf_reader.py", tmp_path / "back", tmp_path / "again.out")
    found, _ = load_checkpoint(str(tmp_path / "again.out"))
    assert mx.abs(found(IDX) - model(IDX)).max() < 1e-5 * mx.abs(model(IDX)).max()


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
@pytest.mark.parametrize("settings", [{"tie": True}, EXPERTS], ids=str)
def test_beside_mlx_lm(settings, mode, tmp_path):
    """mlx-lm gives the model's logits for the folder, and for our export of it."""
    load = peer("mlx_lm.utils").load_model
    folder, model, _, _ = folder_of(tmp_path, settings, mode)
    run_here("hf_reader.py", folder, tmp_path / "out.safetensors")
    run_here("hf_reader.py", tmp_path / "out.safetensors", f"--export={tmp_path / 'back'}", "--packed=True")
    for each in (folder, tmp_path / "back"):
        theirs, _ = load(each)
        assert mx.abs(theirs(IDX) - model(IDX)).max() < 2e-5 * mx.abs(model(IDX)).max()


@pytest.mark.parametrize("change, says", [
    ({"mode": "nvfp4"}, "quantization has mode='nvfp4', which cannot be read"),
    ({"lm_head": {"mode": "mxfp8", "bits": 8}}, "lm_head has mode='mxfp8', which cannot be read"),
    ({"quant_method": "bitnet"}, "packed by 'bitnet', which has no reader here"),
    ({"quant_method": "awq"}, "packed by awq: read it with awq_reader.py")], ids=str)
def test_other_formats(change, says, tmp_path):
    folder, *_ = folder_of(tmp_path, {"tie": False}, "affine")
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(raw))
    assert says in run("hf_reader.py", folder, tmp_path / "out.safetensors", status=2).stderr


def test_packed_gpt2_is_refused(tmp_path):
    config = GPTConfig(block_size=64, vocab_size=64, n_layer=1, n_head=2, n_embd=64, pos="learned", norm="layer",
                       mlp="gelu_tanh", bias=True, qk_norm=False)
    save_checkpoint(str(tmp_path / "model.safetensors"), GPT(config), {})
    done = run("hf_reader.py", tmp_path / "model.safetensors", f"--export={tmp_path / 'x'}", "--packed=True", status=2)
    assert "transposed" in done.stderr and not (tmp_path / "x").exists()
