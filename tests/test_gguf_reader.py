"""gguf_reader.py: all types against the gguf package, models by its writer, exports, bad input."""
import json
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict

import blas  # noqa: F401  (before mlx)
import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import peers
import prepared
import pytest
from conftest import ROOT, peak_memory, run, run_here, survives
from mlx.utils import tree_flatten

from config import UserError
from gguf_tokenizer import QWEN2
from model import GPT, GPTConfig, load_checkpoint, save_checkpoint
from tokenizer import Tokenizer, train_bpe

SOURCE = (ROOT / "gguf_reader.py").read_text()
START, END = SOURCE.index("# ---- types"), SOURCE.index("# ---- files")
made = {"np": np, "mx": mx, "nn": nn, "gguf": gguf, "Callable": Callable, "bits": 0, "dense": False,
        "scale_dtype": "float32"}
exec(SOURCE[START:END], made)  # the section about types needs no other code
IDX = np.random.default_rng(1).integers(0, 96, (2, 20))
USUAL = dict(block_size=64, vocab_size=96, n_layer=2, n_head=4, n_embd=64, ffn_dim=128)
SWIGLU = dict(mlp="swiglu", qk_norm=False)
LAYER = dict(norm="layer", qk_norm=False, tie=False)
GEMMA = dict(mlp="geglu", n_kv_head=1, head_dim=32, embed_scale=8.0)
FLAVOURS = {
    "llama": SWIGLU | dict(n_kv_head=2, tie=False), "llama biases": SWIGLU | dict(qkv_bias=True, out_bias=True),
    "llama all biases": SWIGLU | dict(bias=True),
    "mixtral": SWIGLU | dict(tie=False, n_expert=4, expert_balance="none"),
    "llama3": SWIGLU | dict(n_kv_head=2, rope_factor=8.0, rope_original=16),
    "linear": SWIGLU | dict(rope_scaling="linear", rope_factor=4.0),
    "yarn": SWIGLU | dict(rope_scaling="yarn", rope_factor=4.0, rope_original=16, rope_low_freq=1.0,
                          rope_high_freq=32.0, attn_scale=(1 + 0.1 * math.log(4)) ** 2 / 4),
    "qwen2": SWIGLU | dict(n_kv_head=2, qkv_bias=True), "qwen3": dict(mlp="swiglu", n_kv_head=2, head_dim=32),
    "qwen3moe": dict(mlp="swiglu", n_kv_head=2, head_dim=32, n_expert=4, expert_balance="none", tie=False),
    "gemma": GEMMA | dict(qk_norm=False),
    "gemma2": GEMMA | dict(qk_norm=False, norm_place="both", sliding_window=8, window_pattern="SL", softcap=2.0,
                           attn_softcap=3.0),
    "gemma3": GEMMA | dict(norm_place="both", sliding_window=8, window_pattern="SSSSSL", window_theta=500.0, n_layer=6),
    "gemma3 default": GEMMA | dict(norm_place="both", sliding_window=8, window_pattern="SSSSSL", window_theta=10000.0,
                                   rope_theta=1e6, n_layer=6),
    "gemma3 linear": GEMMA | dict(norm_place="both", sliding_window=8, window_pattern="SSSSSL", window_theta=1e6,
                                  rope_theta=1e6, n_layer=6, rope_scaling="linear", rope_factor=8.0),
    "gemma3 one theta": GEMMA | dict(norm_place="both", sliding_window=8, window_pattern="SSSSSL", rope_theta=777.0,
                                     n_layer=6),
    "phi2": LAYER | dict(mlp="gelu_tanh", bias=True, parallel=True, head_bias=True, rotary_dim=8),
    "phi3": SWIGLU | dict(n_kv_head=2, rotary_dim=8, tie=False),
    "olmo2": dict(mlp="swiglu", norm_place="after", qk_norm_width=True, n_kv_head=2, tie=False),
    "olmo3": dict(mlp="swiglu", norm_place="after", qk_norm_width=True, sliding_window=8, window_pattern="SSSL",
                  n_layer=4, tie=False),
    "smollm3": SWIGLU | dict(rope_pattern="RRRN", n_layer=4, n_kv_head=2),
    "stablelm": LAYER | dict(mlp="swiglu", norm_bias=True, rotary_dim=4, qkv_bias=True),
    "stablelm parallel": LAYER | dict(mlp="swiglu", norm_bias=True, rotary_dim=4, parallel=True),
    "granite": SWIGLU | dict(n_kv_head=2, embed_scale=12.0, attn_scale=0.1, residual_scale=0.22, logit_scale=0.125),
    "gptneox": LAYER | dict(mlp="gelu", bias=True, parallel=True, rotary_dim=4),
    "gptneox in turn": LAYER | dict(mlp="gelu", bias=True, rotary_dim=4),
    "gpt2": dict(pos="learned", norm="layer", mlp="gelu_tanh", bias=True, qk_norm=False),
}
ARCHITECTURE = {name: name.split()[0] for name in FLAVOURS} | dict.fromkeys(
    ("mixtral", "llama3", "linear", "yarn"), "llama") | {"olmo3": "olmo2"}


# ---- types -----------------------------------------------------------------------------------------------------------


def random_blocks(kind: gguf.GGMLQuantizationType, rows: int, width: int) -> np.ndarray:
    """Random bytes are valid blocks. Their float16 are small, wherever a block has them, and so are MXFP4's powers."""
    size, block = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(0).integers(0, 256, (rows, width // size * block), np.uint8)
    data.reshape(rows, -1, block)[..., 1::2] &= 0x3B
    if kind.name == "MXFP4":
        data.reshape(rows, -1, block)[..., 0] = np.random.default_rng(1).integers(115, 130, data.shape[1] // block)
    return data


@pytest.mark.parametrize("kind", made["PACKED"])
def test_packed_is_exact(kind):
    """MLX unpacks from our arrays what the gguf package unpacks from its own."""
    kind, bits = gguf.GGMLQuantizationType[kind], made["PACKED"][kind]
    data = random_blocks(kind, 6, 512)
    weight, scales, biases = map(mx.array, made["packed"](data, kind.name))
    assert scales.dtype == biases.dtype == (mx.float32 if kind.name in made["ROUNDED"] else mx.float16)
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    found = mx.dequantize(weight, scales, biases, 512 // scales.shape[1], bits)
    wanted = gguf.quants.dequantize(data, kind)
    assert (weight.shape[1], np.array(weight).size) == (512 * bits // 32, 6 * 16 * bits)
    np.testing.assert_allclose(np.array(found), wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K"])
def test_rounded_scales(kind):
    """Scale and bias in float16 move a weight by at most 2^-11 of each of its two terms."""
    made["scale_dtype"] = "float16"
    kind, bits = gguf.GGMLQuantizationType[kind], made["PACKED"][kind]
    data = random_blocks(kind, 6, 512)
    weight, scales, biases = made["packed"](data, kind.name)
    made["scale_dtype"] = "float32"
    assert scales.dtype == biases.dtype == np.float16
    parts = [mx.array(scales).astype(mx.float32), mx.array(biases).astype(mx.float32)]
    found = np.array(mx.dequantize(mx.array(weight), *parts, 32, bits))
    bias = np.repeat(biases.astype(np.float32), 32, axis=1)
    wanted = gguf.quants.dequantize(data, kind)
    bound = 2.0**-11 * (np.abs(wanted - bias) + np.abs(bias)) + 1e-6
    error = np.abs(found - wanted)
    assert (error <= 1.01 * bound).all() and error.max() > 0


@pytest.mark.parametrize("kind", sorted(kind.name for kind in gguf.quants._type_traits))
def test_every_type(kind):
    """All types are unpacked as by the package, up to the rounding to float16; also in pieces, and of experts."""
    kind = gguf.GGMLQuantizationType[kind]
    data = random_blocks(kind, 4, 512)
    with np.errstate(all="ignore"):
        wanted = gguf.quants.dequantize(data, kind)
        found = mx.array(made["arrays_of"](kind, data.reshape(2, 2, -1), False)["weight"])
        made["PIECE"] = 1
        again = mx.array(made["arrays_of"](kind, data.reshape(2, 2, -1), False)["weight"])
        made["PIECE"] = 2**22
    assert mx.array_equal(found.view(mx.uint16), again.view(mx.uint16))
    found = np.array(found.astype(mx.float32)).reshape(4, -1)
    assert found.shape == wanted.shape
    near = np.isclose(found, wanted, rtol=1e-3, atol=1e-6) | (np.abs(wanted) > 6e4) | np.isnan(wanted)
    assert near.all()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_blocks_go_back(kind):
    """A layer that came from a type goes back to it, bit for bit."""
    weights = np.random.default_rng(0).standard_normal((6, 256)).astype(np.float32)
    data = gguf.quants.quantize(weights, gguf.GGMLQuantizationType[kind])
    layer = nn.QuantizedLinear(256, 6, False, 32, made["PACKED"][kind])
    layer.weight, layer.scales, layer.biases = map(mx.array, made["packed"](data, kind))
    assert made["held_as"](layer) == kind
    assert np.array_equal(made["blocks_of"](layer, kind), data)


@pytest.mark.parametrize("bits, group_size", [(2, 32), (3, 64), (4, 64), (4, 128), (5, 64)])
def test_blocks_of_our_own(bits, group_size):
    """A layer that MLX quantized, with float16 scales, becomes blocks of just its numbers."""
    weights = mx.array(np.random.default_rng(0).standard_normal((6, 256)).astype(np.float16))
    layer = nn.QuantizedLinear(256, 6, False, group_size, bits)
    layer.weight, layer.scales, layer.biases = mx.quantize(weights, group_size, bits)
    kind = made["held_as"](layer)
    assert kind == ("Q5_1" if bits == 5 else "Q4_1")
    found = gguf.quants.dequantize(made["blocks_of"](layer, kind), gguf.GGMLQuantizationType[kind])
    parts = layer.scales.astype(mx.float32), layer.biases.astype(mx.float32)
    wanted = np.array(mx.dequantize(layer.weight, *parts, group_size, bits))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
    layer.bits = 6  # no type has affine groups of 6 bits
    assert made["held_as"](layer) is None


def test_rows_of_rope():
    x = np.arange(24).reshape(24, 1)
    turned = made["rows_in_pairs"](x, 2)
    assert turned[:6, 0].tolist() == [0, 6, 1, 7, 2, 8] and np.array_equal(made["rows_in_halves"](turned, 2), x)


# ---- models ----------------------------------------------------------------------------------------------------------


def build(name: str, **more) -> GPT:
    """A model with random norms and biases."""
    model, rng = GPT(GPTConfig(**USUAL | FLAVOURS[name] | more), seed=1), np.random.default_rng(0)
    vectors = {key: mx.array((0.2 * rng.standard_normal(value.shape) + key.endswith("weight")).astype(np.float32))
               for key, value in tree_flatten(model.parameters()) if value.ndim == 1}
    if name in ("phi2", "stablelm parallel"):  # one norm for both
        vectors |= {key.replace("attn_norm", "mlp_norm"): value for key, value in vectors.items() if "attn_norm" in key}
    return model.load_weights(list(vectors.items()), strict=False)


def settings_of(name: str, c: GPTConfig) -> dict:
    """The settings of a file beyond llama's, listed here again."""
    found = {"rope.dimension_count": c.rotary_dim} if c.rotary_dim else {}
    found |= {"llama3": {"rope.scaling.original_context_length": 16},
              "linear": {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
              "yarn": {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
                       "rope.scaling.original_context_length": 16},
              "qwen3moe": {"expert_feed_forward_length": 128, "feed_forward_length": 999, "expert_weights_norm": True},
              "gemma2": {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0, "attention.sliding_window": 8},
              "gemma3": {"attention.sliding_window": 8, "rope.freq_base_swa": 500.0},
              "gemma3 default": {"attention.sliding_window": 8},
              "gemma3 linear": {"attention.sliding_window": 8, "rope.freq_base_swa": 1e6,
                                "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
              "gemma3 one theta": {"attention.sliding_window": 8, "rope.freq_base_swa": 777.0},
              "phi3": {"attention.sliding_window": 0, "rope.scaling.original_context_length": 64},
              "olmo3": {"attention.sliding_window": 8, "attention.sliding_window_pattern": [True, True, True, False]},
              "granite": {"embedding_scale": 12.0, "attention.scale": 0.1, "residual_scale": 0.22, "logit_scale": 8.0},
              "gptneox": {"use_parallel_residual": True}, "gptneox in turn": {"use_parallel_residual": False},
              "stablelm": {"use_parallel_residual": False}, "stablelm parallel": {"use_parallel_residual": True},
              }.get(name, {})
    if c.n_expert:
        found |= {"expert_count": c.n_expert, "expert_used_count": c.expert_top_k}
    return found


def written(path, name: str, model: GPT, kind=gguf.GGMLQuantizationType.F32, skip="", settings=(), more=(),
            quantize=gguf.quants.quantize, **splits):
    """Write a model with the package's writer and names and settings that are listed here again. skip: a tensor that is
    left out; settings: further ones (name, value, type); more: further tensors (name, array)."""
    arch, c = ARCHITECTURE[name], model.config
    p = {key: np.array(value) for key, value in tree_flatten(model.parameters())}
    w = gguf.GGUFWriter(path, arch, **splits)
    own = {"context_length": c.block_size, "embedding_length": c.n_embd, "block_count": c.n_layer,
           "feed_forward_length": c.ffn_dim, "attention.head_count": c.n_head}
    norm = "attention.layer_norm_epsilon" if c.norm == "layer" else "attention.layer_norm_rms_epsilon"
    own |= {norm: float(c.norm_eps)} | ({} if arch == "gpt2" else {
        "attention.head_count_kv": c.n_kv_head, "attention.key_length": c.head_dim, "rope.freq_base": c.rope_theta})
    for key, value in (own | settings_of(name, c)).items():
        add = {bool: w.add_bool, int: w.add_uint32, float: w.add_float32, str: w.add_string, list: w.add_array}
        add[type(value)](f"{arch}.{key}", value)
    for key, value, type_ in settings:
        w.add_key_value(key, value, type_)
    for key, value in more:
        w.add_tensor(key, value)
    if name == "llama3":
        w.add_tensor("rope_freqs.weight", np.array(DIVISORS, np.float32))
    theirs = {"embed": "token_embd", "pos_embed": "position_embd", "norm": "output_norm", "head": "output"}
    inner = {"attn_norm": "attn_norm", "attn.q": "attn_q", "attn.k": "attn_k", "attn.v": "attn_v",
             "attn.out": "attn_output", "attn.q_norm": "attn_q_norm", "attn.k_norm": "attn_k_norm",
             "attn_post_norm": "post_attention_norm", "mlp_post_norm": "post_ffw_norm",
             "mlp_norm": "ffn_norm", "mlp.router": "ffn_gate_inp"}
    inner |= {f"mlp.{part}": f"ffn_{part}{'_exps' if c.n_expert else ''}" for part in ("gate", "up", "down")}
    found = {}
    for key, value in p.items():
        path_, _, part = key.rpartition(".")
        if path_.startswith("blocks."):
            _, layer, ours = path_.split(".", 2)
            if arch in ("llama", "granite", "smollm3") and ours in ("attn.q", "attn.k"):
                D = c.head_dim
                value = np.concatenate([value[h * D + i:h * D + i + 1] for h in range(len(value) // D)
                                        for j in range(D // 2) for i in (j, j + D // 2)])
            found[f"blk.{layer}.{inner[ours]}.{part}"] = value
        else:
            found[f"{theirs[path_]}.{part}"] = value
    for key in list(found):
        both = []
        if name in ("phi2", "stablelm parallel") and "ffn_norm" in key:
            del found[key]
        if arch in ("gpt2", "gptneox", "phi3", "phi2") and ".attn_q." in key:
            both = [key.replace("attn_q", f"attn_{letter}") for letter in "qkv"], key.replace("attn_q", "attn_qkv")
        if arch == "phi3" and ".ffn_gate." in key:
            both = [key, key.replace("gate", "up")], key.replace("gate", "up")
        if both:
            three = [found.pop(each) for each in both[0]]
            found[both[1]] = np.concatenate(three)
    for key, value in found.items():
        if key != skip:
            if value.ndim > 1 and "position" not in key and "gate_inp" not in key:
                w.add_tensor(key, quantize(value, kind), raw_dtype=kind)
            else:
                w.add_tensor(key, value)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


# Llama 3.1's formula for heads of 16 and theta 10000, factor 8, and 16 positions before the scaling.
FREQUENCIES = [10000 ** (-2 * i / 16) for i in range(8)]
SHARES = [min(1, max(0, (16 * f / (2 * math.pi) - 1) / 3)) for f in FREQUENCIES]
DIVISORS = [1 / (share + (1 - share) / 8) for share in SHARES]


def q6_k(weights: np.ndarray, kind) -> np.ndarray:
    """Random blocks of Q6_K, with small scales, in place of the weights: the package cannot quantize to this type."""
    data = random_blocks(kind, *weights.shape)
    data.reshape(len(data), -1, 210)[..., 208:] = np.array([2e-5], np.float16).view(np.uint8)
    return data


def rounded(model: GPT, kind: str, quantize=gguf.quants.quantize) -> GPT:
    """The model, with matrices rounded as in a file of this type."""
    kind = gguf.GGMLQuantizationType[kind]
    weights = [(key, gguf.quants.dequantize(quantize(np.array(value), kind), kind))
               for key, value in tree_flatten(model.parameters())
               if value.ndim > 1 and "pos_embed" not in key and "router" not in key]
    return model.load_weights([(key, mx.array(value.astype(np.float32))) for key, value in weights], strict=False)


def read(*arguments, status=0):
    command = [sys.executable, ROOT / "gguf_reader.py", *map(str, arguments)]
    done = prepared.run(command)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and (not status or done.stderr.count("\n") == 1), done.stderr
    return done


def in_float32(path) -> GPT:
    model, _ = load_checkpoint(str(path))
    model.set_dtype(mx.float32)
    return model


def logits_of(path) -> np.ndarray:
    return np.array(in_float32(path)(mx.array(IDX)))


def check_models(name: str, kind: str, folder, model: GPT, **more):
    """A file of this architecture and type, read, gives the logits of the model, rounded as in the file, and its
    settings."""
    written(folder / "a.gguf", name, model, gguf.GGMLQuantizationType[kind], **more)
    run_here("gguf_reader.py", folder / "a.gguf", folder / "a.safetensors")
    logits = np.array(rounded(model, kind)(mx.array(IDX)))
    assert np.abs(logits_of(folder / "a.safetensors") - logits).max() < 1e-5 * np.abs(logits).max()
    found, _ = load_checkpoint(str(folder / "a.safetensors"))
    assert hasattr(found.blocks[0].attn.q, "bits") == kind.startswith("Q")
    assert kind != "BF16" or found.blocks[0].mlp.up.weight.dtype == mx.bfloat16
    return found


@pytest.mark.parametrize("name", FLAVOURS)
def test_models(name, tmp_path):
    model = build(name)
    found = asdict(check_models(name, "F32", tmp_path, model).config)
    wanted = asdict(model.config) | {"expert_balance": found["expert_balance"]}  # it has no effect where it is used
    for key, value in wanted.items():
        same = math.isclose(value, found[key], rel_tol=1e-6) if isinstance(value, float) else value == found[key]
        assert same, (key, value, found[key])


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@pytest.mark.parametrize("name", ["llama", "llama biases", "mixtral", "gpt2", "phi3", "gemma3", "qwen3moe"])
def test_types_of_models(name, kind, tmp_path):
    check_models(name, kind, tmp_path, build(name))


@pytest.mark.parametrize("count", [2, 3])
def test_a_model_in_parts(count, tmp_path):
    """The package's writer cuts a model into files; a part that is missing, changed or not the first is one line."""
    written(tmp_path / "m.gguf", "llama", build("llama"), split_max_tensors=-(-21 // count))
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) == count
    run_here("gguf_reader.py", parts[0], tmp_path / "a.safetensors")
    logits = np.array(build("llama")(mx.array(IDX)))
    assert np.abs(logits_of(tmp_path / "a.safetensors") - logits).max() < 1e-5 * np.abs(logits).max()
    out = tmp_path / "b.safetensors"
    with pytest.raises(UserError, match=f"is one of {count} parts: give the first one, NAME-00001-of-0000{count}.gguf"):
        run_here("gguf_reader.py", parts[1], out)
    whole = parts[1].read_bytes()
    parts[1].write_bytes(whole[:-100])
    with pytest.raises(UserError, match=f"^{re.escape(str(parts[1]))} is not a whole GGUF file"):
        run_here("gguf_reader.py", parts[0], out)
    parts[1].write_bytes(parts[0].read_bytes())
    with pytest.raises(UserError, match=f"^{re.escape(str(parts[1]))} is no part 2 of {count}"):
        run_here("gguf_reader.py", parts[0], out)
    parts[1].unlink()
    with pytest.raises(UserError, match=f"^{re.escape(str(parts[1]))} is missing: the model has {count} parts"):
        run_here("gguf_reader.py", parts[0], out)
    assert not out.exists()


@pytest.mark.parametrize("arguments, says", [
    ((), "15 tensors of Q6_K are unpacked to float16 (--bits=6"), (("--bits=8",), "quantized again to 8 bits"),
    (("--dense=True",), "15 tensors of Q6_K are unpacked to float16")])
def test_other_types_are_unpacked(arguments, says, tmp_path):
    """Q6_K becomes float16, or is quantized again if asked; a line says so."""
    model = build("qwen2", n_embd=256, ffn_dim=256)
    written(tmp_path / "a.gguf", "qwen2", model, gguf.GGMLQuantizationType.Q6_K, quantize=q6_k)
    model = rounded(model, "Q6_K", q6_k)
    done = read(tmp_path / "a.gguf", tmp_path / "a.safetensors", *arguments).stdout
    assert says in done
    found, _ = load_checkpoint(str(tmp_path / "a.safetensors"))
    assert hasattr(found.blocks[0].attn.q, "bits") == ("--bits=8" in arguments)
    logits = np.array(model(mx.array(IDX)))
    tolerance = 0.05 if "--bits=8" in arguments else 3e-3
    assert np.abs(logits_of(tmp_path / "a.safetensors") - logits).max() < tolerance * np.abs(logits).max()


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
@pytest.mark.parametrize("name", FLAVOURS)
def test_there_and_back(name, kind, tmp_path):
    model, enc = build(name, vocab_size=512), train_bpe(iter([SOURCE]), 500)
    meta = {"tokenizer": enc.to_dict(), "chat_template": "<|im_start|>"}
    save_checkpoint(str(tmp_path / "a.safetensors"), model, meta)
    run_here("gguf_reader.py", tmp_path / "a.safetensors", f"--export={tmp_path / 'b.gguf'}", f"--type={kind}")
    reader = gguf.GGUFReader(tmp_path / "b.gguf")
    assert reader.fields["general.architecture"].contents() == ARCHITECTURE[name]
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types[f"blk.1.ffn_up{'_exps' if model.config.n_expert else ''}.weight"] == kind
    assert types["output_norm.weight"] == "F32"
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == 512 and tokens[enc.eot] == "<|endoftext|>"
    run_here("gguf_reader.py", tmp_path / "b.gguf", tmp_path / "c.safetensors")
    logits = np.array(rounded(model, kind)(mx.array(IDX)))
    assert np.abs(logits_of(tmp_path / "c.safetensors") - logits).max() < 1e-5 * np.abs(logits).max()
    assert load_checkpoint(str(tmp_path / "c.safetensors"))[1]["chat_template"] == "<|im_start|>"


def test_a_gemma2_without_windows(tmp_path):
    """llama.cpp's gemma2 always has a window: it is as long as the context."""
    save_checkpoint(str(tmp_path / "a.safetensors"), build("gemma2", sliding_window=0), {})
    run_here("gguf_reader.py", tmp_path / "a.safetensors", f"--export={tmp_path / 'b.gguf'}")
    window = gguf.GGUFReader(tmp_path / "b.gguf").fields["gemma2.attention.sliding_window"].contents()
    assert window == USUAL["block_size"]


def test_phi2_has_one_norm(tmp_path):
    model = build("phi2")
    model.blocks[1].mlp_norm.weight = model.blocks[1].mlp_norm.weight + 0.5
    save_checkpoint(str(tmp_path / "a.safetensors"), model, {})
    with pytest.raises(UserError, match="blocks.1.attn_norm and blocks.1.mlp_norm differ"):
        run_here("gguf_reader.py", tmp_path / "a.safetensors", f"--export={tmp_path / 'b.gguf'}")


def test_gpt_oss_is_refused(tmp_path):
    model = GPT(GPTConfig(**USUAL, mlp="swiglu_clip", sink_logits=True, bias=True))
    save_checkpoint(str(tmp_path / "a.safetensors"), model, {})
    with pytest.raises(UserError, match="^GGUF's gpt-oss is not known here: write a Hugging Face folder"):
        run_here("gguf_reader.py", tmp_path / "a.safetensors", f"--export={tmp_path / 'b.gguf'}")


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q5_1", "Q5_0", "Q4_1", "Q4_0"])
def test_types_that_are_written(kind, tmp_path):
    """The package unpacks what its own quantizer would give. Embedding and unembedding have 8 bits beside 4 or 5."""
    model = build("llama")
    save_checkpoint(str(tmp_path / "a.safetensors"), model, {})
    run_here("gguf_reader.py", tmp_path / "a.safetensors", f"--export={tmp_path / 'b.gguf'}", f"--type={kind}")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "b.gguf").tensors}
    up = found["blk.1.ffn_up.weight"]
    assert up.tensor_type.name == kind
    wanted = gguf.quants.quantize(np.array(model.blocks[1].mlp.up.weight), gguf.GGMLQuantizationType[kind])
    assert np.array_equal(up.data, wanted)
    assert {found[f"{name}.weight"].tensor_type.name for name in ("token_embd", "output")} == {
        "Q8_0" if kind.startswith("Q") else kind}


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_packed_layers_go_back(name, kind, tmp_path):
    """A file, read and written, has the same blocks in all matrices."""
    written(tmp_path / "a.gguf", name, build(name, tie=True), gguf.GGMLQuantizationType[kind])
    run_here("gguf_reader.py", tmp_path / "a.gguf", tmp_path / "a.safetensors")
    run_here("gguf_reader.py", tmp_path / "a.safetensors", f"--export={tmp_path / 'b.gguf'}")
    before, after = ({tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
                     for path in (tmp_path / "a.gguf", tmp_path / "b.gguf"))
    assert before.keys() == after.keys()
    for name_, tensor in before.items():
        assert np.array_equal(tensor.data, after[name_].data), name_
    assert before["blk.0.ffn_up" + "_exps" * (name == "mixtral") + ".weight"].tensor_type.name == kind


def check_llama_cpp(path, model: GPT, ids: list[int], tolerance: float, start: int = 0):
    """llama.cpp, which rounds to 8 or 16 bits, gives next tokens the probabilities that the model gives them, up to
    this distance (half the sum of differences), on average over the positions from `start` on."""
    theirs = peers.llama_cpp(path, "logprobs", ids=ids, top=100, **{"from": start})
    ours = np.array(mx.softmax(model(mx.array(ids)[None])[0, start:].astype(mx.float32), axis=-1))
    far = [sum(abs(probability - row[int(token)]) for token, probability in found.items()) / 2
           for found, row in zip(theirs, ours, strict=True)]
    assert np.mean(far) < tolerance, far


@pytest.mark.parametrize("name, more", [*((name, {}) for name in FLAVOURS), *(
    (name, {"tie": True}) for name in ("olmo2", "stablelm", "gptneox"))], ids=str)
def test_llama_cpp_runs_what_we_write(name, more, tmp_path):
    model = build(name, vocab_size=512, **more)
    save_checkpoint(str(tmp_path / "a.safetensors"), model, {"tokenizer": train_bpe(iter([SOURCE]), 500).to_dict()})
    run_here("gguf_reader.py", tmp_path / "a.safetensors", f"--export={tmp_path / 'b.gguf'}")
    check_llama_cpp(tmp_path / "b.gguf", rounded(model, "F16"), IDX[0].tolist(), 2e-3)


def test_smollm2(tmp_path):
    """SmolLM2-135M-Instruct is read and written back with the blocks of the original file; and llama.cpp gives it the
    same probabilities."""
    source = peers.smollm2()
    run_here("gguf_reader.py", source, tmp_path / "a.safetensors")
    run_here("gguf_reader.py", tmp_path / "a.safetensors", f"--export={tmp_path / 'b.gguf'}")
    before, after = ({tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
                     for path in (source, tmp_path / "b.gguf"))
    assert len(before) == len(after) == 272
    for name, tensor in before.items():
        assert tensor.tensor_type == after[name].tensor_type and np.array_equal(tensor.data, after[name].data), name
    ids = peers.llama_cpp(source, "tokenize", texts=["The capital of France is Paris, and that of Italy is"])[0]
    check_llama_cpp(tmp_path / "b.gguf", in_float32(tmp_path / "a.safetensors"), ids, 0.03)


def test_gemma3(tmp_path):
    """Gemma 3 at a length of more than one window, whose positions have another theta; in llama.cpp it has the same
    probabilities. GEMMA3 names its GGUF file."""
    if not os.path.isfile(os.environ.get("GEMMA3", "")):
        pytest.skip("could not find Gemma 3: GEMMA3 names no GGUF file of it")
    source = os.environ["GEMMA3"]
    run_here("gguf_reader.py", source, tmp_path / "a.safetensors")
    text = "".join(line for line in (ROOT / "model.py").read_text().splitlines(keepends=True) if line.strip())
    ids = peers.llama_cpp(source, "tokenize", texts=[text[:4000]])[0]
    check_llama_cpp(source, in_float32(tmp_path / "a.safetensors"), [2, *ids][:1000], 0.05, start=980)


def test_the_tokenizer_comes_along(tmp_path):
    """A tokenizer whose regex llama.cpp has a name for goes to GGUF and back."""
    enc = train_bpe(iter([SOURCE]), 500)
    enc = Tokenizer("bpe", enc.tokens, enc.special, QWEN2)
    save_checkpoint(str(tmp_path / "a.safetensors"), GPT(GPTConfig(**USUAL | FLAVOURS["qwen2"] | {"vocab_size": 512})),
                    {"tokenizer": enc.to_dict()})
    read(tmp_path / "a.safetensors", f"--export={tmp_path / 'b.gguf'}")
    read(tmp_path / "b.gguf", tmp_path / "c.safetensors")
    found = Tokenizer.from_dict(load_checkpoint(str(tmp_path / "c.safetensors"))[1]["tokenizer"])
    for text in ("def f(x): return 12345", "grüße, 世界\n\n  x"):
        assert found.encode(text).tolist() == enc.encode(text).tolist()
    assert (found.eot, found.bos) == (enc.eot, enc.bos)


def with_sentence_piece(path, change=lambda pieces, scores, types: (pieces, scores, types)):
    """Write a GGUF file of a Llama with the tokenizer of tests/fixtures/make_sentencepiece.py. Returns texts with ids.
    """
    found = json.loads((ROOT / "tests" / "fixtures" / "sentencepiece.json").read_text())
    pieces, scores, types = change(found["pieces"], found["scores"], found["types"])
    save_checkpoint(str(path.with_suffix(".s")), GPT(GPTConfig(**USUAL | FLAVOURS["llama"] | {"vocab_size": 500})), {})
    read(path.with_suffix(".s"), f"--export={path}.plain")
    plain = gguf.GGUFReader(f"{path}.plain")
    writer = gguf.GGUFWriter(path, "llama")
    for key, field in plain.fields.items():
        if not key.startswith(("GGUF.", "general.architecture", "tokenizer.")):
            writer.add_key_value(key, field.contents(), field.types[0])
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for tensor in plain.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found["texts"]


def test_sentence_piece(tmp_path):
    """Ids are those of sentencepiece, and decode to the text."""
    texts = with_sentence_piece(tmp_path / "a.gguf")
    read(tmp_path / "a.gguf", tmp_path / "a.safetensors")
    enc = Tokenizer.from_dict(load_checkpoint(str(tmp_path / "a.safetensors"))[1]["tokenizer"])
    assert (enc.kind, enc.bos, enc.eot) == ("hf", 1, 2)
    for text, ids in texts.items():
        assert enc.encode(text).tolist() == ids
        assert enc.decode(ids).lstrip(" ") == text.lstrip(" ").replace("\u2581", " ")
    done = run("sample.py", tmp_path / "a.safetensors", "--prompt=def f(x)", "--max_new_tokens=3")
    assert done.stdout.startswith("def f(x)") and "[3 tokens" in done.stderr
    with_sentence_piece(tmp_path / "b.gguf", lambda pieces, scores, types: (pieces, scores[:-1], types))
    assert "500 tokens and 499 scores" in read(tmp_path / "b.gguf", tmp_path / "b.safetensors", status=2).stderr
    assert not (tmp_path / "b.safetensors").exists()


def test_peak_memory(tmp_path):
    """Reading needs the memory of the output and of one tensor: tensors of the file do not stay in memory."""
    outs, peaks = [], []
    for name, width in (("small", 64), ("large", 1024)):
        shape = dict(n_layer=4, n_embd=width, ffn_dim=2 * width, vocab_size=1024)
        model = GPT(GPTConfig(**USUAL | FLAVOURS["llama"] | shape | {"n_kv_head": 4}), seed=None)
        model.set_dtype(mx.float16)
        save_checkpoint(str(tmp_path / f"{name}.s"), model, {})
        run_here("gguf_reader.py", tmp_path / f"{name}.s", f"--export={tmp_path / name}.gguf")
        outs.append(tmp_path / f"{name}.safetensors")
        peaks.append(peak_memory("gguf_reader.py", f"{tmp_path / name}.gguf", outs[-1]))
    assert peaks[1] - peaks[0] < 1.2 * outs[1].stat().st_size, peaks


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings, says", [
    (dict(), "mlp='relu2' has no counterpart"), (dict(mlp="swiglu", sliding_window=8), "sliding_window=8"),
    (FLAVOURS["mixtral"] | {"expert_top_k": 1}, "expert_top_k=1"),
    (dict(mlp="swiglu", n_expert=2, n_shared_expert=1), "n_shared_expert=1"),
    (FLAVOURS["mixtral"] | {"expert_balance": "bias"}, "expert_balance='bias'"), (dict(alibi=True), "alibi=True"),
    (FLAVOURS["gpt2"] | {"mlp": "gelu"}, "mlp='gelu' has no counterpart in GGUF's gpt2, which has 'gelu_tanh'"),
    (FLAVOURS["gpt2"] | {"head_dim": 8}, "head_dim=8"), (dict(mlp="swiglu", qkv_bias=True), "qkv_bias=True"),
    (FLAVOURS["qwen3"] | {"rope_factor": 8.0}, "rope_scaling='llama3' has no counterpart in GGUF's qwen3"),
    (FLAVOURS["gemma2"] | {"tie": False}, "tie=False"), (FLAVOURS["gemma"] | {"embed_scale": 1.5}, "embed_scale=1.5"),
    (FLAVOURS["gemma3"] | {"attn_scale": 0.5}, "attn_scale=0.5"),
    (FLAVOURS["gemma3"] | {"window_pattern": "SL"}, "window_pattern='SL'"),
    (FLAVOURS["smollm3"] | {"rope_pattern": "RN"}, "rope_pattern='RN'"),
    (FLAVOURS["gemma3 one theta"] | {"rope_scaling": "linear", "rope_factor": 8.0}, "window_theta=0.0"),
    (FLAVOURS["llama"] | {"softcap": 15.0}, "softcap=15.0"), (FLAVOURS["qwen3"] | {"yoco": True}, "yoco=True"),
], ids=str)
def test_what_has_no_counterpart(settings, says, tmp_path):
    save_checkpoint(str(tmp_path / "a.safetensors"), GPT(GPTConfig(**USUAL | settings)), {})
    with pytest.raises(UserError, match=re.escape(says)):
        run_here("gguf_reader.py", tmp_path / "a.safetensors", f"--export={tmp_path / 'b.gguf'}")
    assert not list(tmp_path.glob("b*"))


@pytest.mark.parametrize("kind, value, says", [
    ("F16", 1e6, "numbers beyond the range of float16"), ("Q8_0", 1e9, "numbers beyond the range of float16"),
    ("F16", math.nan, "infinite numbers or NaN"), ("Q8_0", -math.inf, "infinite numbers or NaN")])
def test_numbers_that_float16_lacks(kind, value, says, tmp_path):
    """A weight of 1e6 would be infinite in F16, and so would the scale of a block with 1e9 in Q8_0: nothing is written.
    """
    model = GPT(GPTConfig(**USUAL | FLAVOURS["llama"]))
    model.blocks[1].mlp.up.weight[0, 0] = value
    save_checkpoint(str(tmp_path / "a.safetensors"), model, {})
    with pytest.raises(UserError, match=f"^blk.1.ffn_up.weight holds {says}"):
        run_here("gguf_reader.py", tmp_path / "a.safetensors", f"--export={tmp_path / 'b.gguf'}", f"--type={kind}")
    if not math.isfinite(value):
        with pytest.raises(UserError, match=r"^model.layers.1.mlp.up_proj.weight holds infinite numbers or NaN"):
            run_here("hf_reader.py", tmp_path / "a.safetensors", f"--export={tmp_path / 'folder'}")
    assert len([*tmp_path.iterdir()]) == 1


def test_what_is_not_written_over(tmp_path):
    written(tmp_path / "a.gguf", "llama", build("llama"))
    before = (tmp_path / "a.gguf").read_bytes()
    run_here("gguf_reader.py", tmp_path / "a.gguf", tmp_path / "a.safetensors")
    for arguments in ((tmp_path / "a.gguf", tmp_path / "a.gguf"),
                      (tmp_path / "a.safetensors", f"--export={tmp_path / 'a.gguf'}"),
                      (tmp_path / "a.safetensors", f"--export={tmp_path / 'none' / 'a.gguf'}")):
        with pytest.raises(UserError, match="exists|would overwrite the input"):
            run_here("gguf_reader.py", *arguments)
    assert (tmp_path / "a.gguf").read_bytes() == before and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("change, says", [
    ("skip", "holds no tensor blk.1.ffn_up.weight"), ("architecture", "architecture 'mamba'"),
    ("cut", "is not a whole GGUF file"), ("text", "is not a whole GGUF file"), ("none", "no file at"),
    ("bias", "holds no tensor blk.0.attn_k.bias"), ("more", "holds blk.0.attn_sinks, and 0 more, for which"),
    ("split", "is one of 3 parts"),
    ("half a head", "rope.dimension_count=8, which is not the width of a head, 16"), ("no number", "norm_eps=nan"),
    ("negative", "wrong type"), ("a letter", "'llama.rope.freq_basf', which should be 'llama.rope.freq_base'"),
    ("unknown", "a.gguf: llama.logit_scale=0.5 is not a setting that is known here"),
    ("older scaling", "llama.rope.scale_linear=4.0 is not a setting"), ("not causal", "llama.attention.causal=False"),
    ("shape", "a.gguf: blk.1.ffn_up.weight has shape (127, 64), but by the settings it is (128, 64)"),
])
def test_bad_files(change, says, tmp_path):
    path = tmp_path / "a.gguf"
    model = build("llama")
    if change == "shape":
        model.blocks[1].mlp.up.weight = model.blocks[1].mlp.up.weight[:-1]
    kinds, more = gguf.GGUFValueType, [
        ({"bias": "blk.0.attn_q.bias", "more": "blk.0.attn_sinks"}[change], np.ones(64, np.float32))
    ] if change in ("bias", "more") else []
    settings = {"split": [("split.count", 3, kinds.UINT16)], "a letter": [("llama.rope.freq_basf", 5e5, kinds.FLOAT32)],
                "half a head": [("llama.rope.dimension_count", 8, kinds.UINT32)],
                "negative": [("llama.expert_count", -1.0, kinds.FLOAT32)],
                "unknown": [("llama.logit_scale", 0.5, kinds.FLOAT32)],
                "older scaling": [("llama.rope.scale_linear", 4.0, kinds.FLOAT32)],
                "not causal": [("llama.attention.causal", False, kinds.BOOL)]}.get(change, [])
    if change == "no number":
        model.config.norm_eps = float("nan")
    if change != "none":
        skip = "blk.1.ffn_up.weight" if change == "skip" else ""
        written(path, "llama", model, skip=skip, settings=settings, more=more)
    if change == "architecture":
        path.write_bytes(path.read_bytes().replace(b"llama", b"mamba"))
    elif change == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    elif change == "text":
        path.write_text("GGUF? no.")
    assert says in read(path, tmp_path / "out.safetensors", status=2).stderr
    assert not list(tmp_path.glob("out*"))


def test_settings_that_change_nothing(tmp_path):
    """Other settings that llama.cpp's converters write, and unknown settings at values that turn them off, are read
    over."""
    kinds = gguf.GGUFValueType
    written(tmp_path / "a.gguf", "llama", build("llama"), settings=[
        ("llama.vocab_size", 96, kinds.UINT32), ("llama.rope.dimension_count", 16, kinds.UINT32),
        ("llama.tensor_data_layout", "Meta AI original pth", kinds.STRING),
        ("llama.attention.causal", True, kinds.BOOL),
        ("llama.rope.scaling.finetuned", True, kinds.BOOL), ("llama.logit_scale", 1.0, kinds.FLOAT32),
        ("llama.attention.clamp_kqv", 0.0, kinds.FLOAT32), ("llama.use_parallel_residual", False, kinds.BOOL)])
    run_here("gguf_reader.py", tmp_path / "a.gguf", tmp_path / "a.safetensors")
    logits = np.array(build("llama")(mx.array(IDX)))
    assert np.abs(logits_of(tmp_path / "a.safetensors") - logits).max() < 1e-5 * np.abs(logits).max()


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_fuzz(name, tmp_path):
    (tmp_path / "source").mkdir()
    path = tmp_path / "source" / "a.gguf"
    written(path, name, build(name))
    survives("gguf_reader.py", path, path, 100, 0.7, int(gguf.GGUFReader(path).data_offset))
