"""compressed_reader.py: folders that numpy packs as compressed-tensors does, the package itself, bad input."""
import json
import re

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
import pytest
from conftest import run, run_here, survives
from peers import peer

from config import UserError
from model import GPT, GPTConfig, load_checkpoint, save_checkpoint


def packed(q: np.ndarray, bits: int) -> np.ndarray:
    """(n, m) signed integers -> int32 (n, m bits / 32, rounded up): a stream of bits in each row, by Python's integers;
    half of the range is added first."""
    words = np.zeros((len(q), -(-q.shape[1] * bits // 32)), np.uint32)
    for row, values in enumerate(q):
        stream = sum((int(value) + 2 ** (bits - 1)) << bits * i for i, value in enumerate(values))
        words[row] = [stream >> 32 * i & 0xFFFFFFFF for i in range(words.shape[1])]
    return words.view(np.int32)


def folder_of(tmp_path, bits=4, group_size=32, symmetric=True, older=False, n_expert=0):
    """A folder with a packed Qwen2, which has biases, or Mixtral, and the same model with float weights. The
    unembedding is ignored."""
    config = GPTConfig(block_size=64, vocab_size=64, n_layer=1, n_head=2, n_embd=64, ffn_dim=96, mlp="swiglu",
                       qk_norm=False, qkv_bias=not n_expert, n_expert=n_expert, expert_balance="none", tie=False)
    model, rng, folder = GPT(config), np.random.default_rng(0), tmp_path / "folder"
    for letter in "qkv" if not n_expert else "":
        model.blocks[0].attn[letter].bias = mx.array(rng.standard_normal(64).astype(np.float32))
    save_checkpoint(str(tmp_path / "dense.safetensors"), model, {})
    run_here("hf_reader.py", tmp_path / "dense.safetensors", f"--export={folder}")
    arrays = mx.load(str(folder / "model.safetensors"))
    for name in [name for name in arrays if re.search(r"(_proj|w[123])\.weight$", name)]:
        (outputs, inputs), low = arrays.pop(name).shape, -(2 ** (bits - 1))
        width = group_size or inputs
        q = rng.integers(low, -low, (outputs, inputs))
        zero = rng.integers(low, -low, (outputs, inputs // width)) * (not symmetric)
        scale = mx.array(rng.uniform(0.1, 0.3, zero.shape) / 2**bits).astype(mx.bfloat16)
        arrays |= {f"{name}_packed": mx.array(packed(q, bits)), f"{name}_scale": scale,
                   f"{name}_shape": mx.array([outputs, inputs], mx.int64)}
        if not symmetric:
            arrays[f"{name}_zero_point"] = mx.array(zero.astype(np.int8) if older else packed(zero.T, bits).T.copy())
        spread = [np.repeat(part, width, axis=1) for part in (zero, np.array(scale.astype(mx.float32)))]
        weight = mx.array(((q - spread[0]) * spread[1]).astype(np.float32))
        path = name.removesuffix(".weight").replace("model.layers", "blocks").replace("self_attn", "attn")
        if match := re.search(r"experts\.(\d+)\.(w[123])", name):
            experts = model.blocks[0].mlp[{"w1": "gate", "w2": "down", "w3": "up"}[match[2]]]
            experts.weight[int(match[1])] = weight
        else:
            dict(model.named_modules())[path.replace("o_proj", "out").removesuffix("_proj")].weight = weight
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "pt"})
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "group_size": group_size or None,
               "strategy": "group" if group_size else "channel", "dynamic": False}
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": scheme}, "kv_cache_scheme": None, "sparsity_config": {}, "transform_config": {}}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder, model


@pytest.mark.parametrize("settings", [
    *({"bits": bits, "symmetric": symmetric} for bits in (2, 3, 4, 5, 6, 8) for symmetric in (True, False)),
    {"group_size": 0, "symmetric": False}, {"bits": 8, "group_size": 0}, {"symmetric": False, "older": True},
    {"n_expert": 3}, {"n_expert": 3, "symmetric": False, "bits": 3}], ids=str)
def test_folder(settings, tmp_path):
    """Packed and unpacked checkpoints give the logits of the model with float weights."""
    folder, model = folder_of(tmp_path, **settings)
    idx = mx.array(np.random.default_rng(1).integers(0, 64, (2, 20)))
    logits = np.array(model(idx))
    for dense, tolerance in ((False, 1e-5), (True, 3e-3)):
        out = tmp_path / f"{dense}.out"
        run_here("compressed_reader.py", folder, out, f"--dense={dense}")
        found, _ = load_checkpoint(str(out))
        found.set_dtype(mx.float32)
        assert np.abs(np.array(found(idx)) - logits).max() < tolerance * np.abs(logits).max()
        assert dense or found.blocks[0].attn.q.bits == found.blocks[0].mlp.up.bits == settings.get("bits", 4)
    with pytest.raises(UserError, match="packed by compressed-tensors: read it with compressed_reader.py"):
        run_here("hf_reader.py", folder, tmp_path / "other.out")


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_the_packer(bits):
    """What these tests pack is what the package packs."""
    torch, peer_of = peer("torch"), peer("compressed_tensors.compressors.pack_quantized.helpers")
    q = np.random.default_rng(0).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (7, 96))
    theirs = peer_of.pack_to_int32(torch.tensor(q.astype(np.int8)), bits).numpy()
    assert np.array_equal(theirs, packed(q, bits))


NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("change, says", [
    (lambda arrays, _: arrays.pop(f"{NAME}_scale"), f"no tensor {NAME}_scale"),
    (lambda arrays, _: arrays.pop(f"{NAME}_shape"), f"no tensor {NAME}_shape"),
    (lambda arrays, _: arrays.update({f"{NAME}_scale": arrays[f"{NAME}_scale"][:-1]}), "do not fit one another"),
    (lambda arrays, _: arrays.update({f"{NAME}_packed": arrays[f"{NAME}_packed"][:, :-1]}), "do not fit one another"),
    (lambda arrays, _: arrays.update({f"{NAME}_packed": arrays[f"{NAME}_packed"].astype(mx.float16)}), "of int32"),
    (lambda arrays, _: arrays.update({f"{NAME}_shape": mx.array([96])}), "do not fit one another"),
    (lambda arrays, _: arrays.update({f"{NAME}_zero_point": mx.zeros((3, 3), mx.int32)}), "has shape (3, 3), which"),
    (lambda arrays, _: arrays.update({f"{NAME}_g_idx": mx.zeros((64,), mx.int32)}), f"holds {NAME}_g_idx"),
    (lambda _, found: found.update(format="int-quantized"), "the format int-quantized cannot be read"),
    (lambda _, found: found["config_groups"]["group_0"].update(input_activations={"num_bits": 8}), "activations too"),
    (lambda _, found: found.update(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme is not supported"),
    (lambda _, found: found.update(transform_config={"config_groups": {"u": {}}}), "transform_config is not supported"),
    (lambda _, found: found.update(sparsity_config={"format": "sparse-24-bitmask"}), "sparse weights"),
    (lambda _, found: found.update(quant_method="gptq"), "quant_method is 'gptq'"),
])
def test_bad_input(change, says, tmp_path):
    folder, _ = folder_of(tmp_path)
    path, config = folder / "model.safetensors", folder / "config.json"
    arrays, raw = mx.load(str(path)), json.loads(config.read_text())
    mx.eval(arrays)
    change(arrays, raw["quantization_config"])
    mx.save_safetensors(str(path), arrays)
    config.write_text(json.dumps(raw))
    assert says in run("compressed_reader.py", folder, tmp_path / "out.safetensors", status=2).stderr
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("file, refused", [("config.json", 0.5), ("model.safetensors", 0.9)])
def test_fuzz(file, refused, tmp_path):
    folder, _ = folder_of(tmp_path, symmetric=False)
    survives("compressed_reader.py", folder, folder / file, 100, refused)
