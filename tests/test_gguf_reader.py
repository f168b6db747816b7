"""gguf_reader.py: all types against the gguf package, models by its writer, exports, bad input."""
import json
import math
import re
import subprocess
import sys

import blas  # noqa: F401  (before mlx)
import gguf
import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, peak_memory, run, run_here, survives
from mlx.utils import tree_flatten

from config import UserError
from model import GPT, GPTConfig, load_checkpoint, save_checkpoint
from tokenizer import Tokenizer, train_bpe

SOURCE = (ROOT / "gguf_reader.py").read_text()
START, END = SOURCE.index("# ---- types"), SOURCE.index("# ---- read")
made = {"np": np, "mx": mx, "gguf": gguf, "bits": 0}
exec(SOURCE[START:END], made)  # the section about types needs no other code
IDX = np.random.default_rng(1).integers(0, 96, (2, 20))
USUAL = dict(block_size=64, vocab_size=96, n_layer=2, n_head=4, n_embd=64, ffn_dim=128)
FLAVOURS = {
    "llama": dict(mlp="swiglu", qk_norm=False, n_kv_head=2, tie=False),
    "qwen2": dict(mlp="swiglu", qk_norm=False, n_kv_head=2, qkv_bias=True),
    "qwen3": dict(mlp="swiglu", n_kv_head=2, head_dim=32),
    "mixtral": dict(mlp="swiglu", qk_norm=False, tie=False, n_expert=4, expert_balance="none"),
    "gpt2": dict(pos="learned", norm="layer", mlp="gelu_tanh", bias=True, qk_norm=False),
}
ARCHITECTURE = {name: name for name in FLAVOURS} | dict.fromkeys(("mixtral", "llama3", "linear"), "llama")


# ---- types -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_packed_is_exact(kind):
    """MLX unpacks from our arrays what the gguf package unpacks from its own."""
    kind = gguf.GGMLQuantizationType[kind]
    data = gguf.quants.quantize(np.random.default_rng(0).standard_normal((6, 256)).astype(np.float32), kind)
    weight, scales, biases = map(mx.array, made["packed"](data, kind.name))
    assert scales.dtype == biases.dtype == mx.float16  # 5 bits a weight at 4, as 4.5 in the file
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    found = mx.dequantize(weight, scales, biases, 32, 8 if kind.name == "Q8_0" else 4)
    wanted = gguf.quants.dequantize(data, kind)
    np.testing.assert_allclose(np.array(found), wanted, rtol=0, atol=2e-7 * np.abs(wanted).max() * 16)


@pytest.mark.parametrize("kind", sorted(kind.name for kind in gguf.quants._type_traits))
def test_every_type(kind):
    """Random bytes are valid blocks. They are unpacked as by the package, up to the rounding to float16."""
    kind = gguf.GGMLQuantizationType[kind]
    size, width = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (3, 512 // size * width), np.uint8)
    data.reshape(3, -1, width)[..., 1::2] &= 0x3B  # no float16 scale is infinite, wherever a block has it
    with np.errstate(all="ignore"):
        wanted = gguf.quants.dequantize(data, kind)
        found = made["arrays_of"](kind, data, False)["weight"]
    found = np.array(mx.array(found).astype(mx.float32))
    assert found.shape == wanted.shape
    near = np.isclose(found, wanted, rtol=1e-3, atol=1e-6) | (np.abs(wanted) > 6e4) | np.isnan(wanted)
    assert near.all()


def test_rows_of_rope():
    x = np.arange(24).reshape(24, 1)
    turned = made["rows_in_pairs"](x, 2)
    assert turned[:6, 0].tolist() == [0, 6, 1, 7, 2, 8] and np.array_equal(made["rows_in_halves"](turned, 2), x)


# ---- models ----------------------------------------------------------------------------------------------------------


def build(name: str, **more) -> GPT:
    model, rng = GPT(GPTConfig(**USUAL | FLAVOURS[name] | more), seed=1), np.random.default_rng(0)
    for block in model.blocks:
        for linear in (block.attn.q, block.attn.k, block.attn.v):
            if "bias" in linear:
                linear.bias = mx.array(rng.standard_normal(linear.bias.shape).astype(np.float32))
    return model


def written(path, name: str, model: GPT, kind=gguf.GGMLQuantizationType.F32, skip="", settings=(), more=()):
    """Write a model with the package's writer and names and settings that are listed here again. skip: a tensor that is
    left out; settings: further ones (name, value, type); more: further tensors (name, array)."""
    name = ARCHITECTURE[name]
    c, p = model.config, {key: np.array(value) for key, value in tree_flatten(model.parameters())}
    w = gguf.GGUFWriter(path, name)
    for key, value in {"context_length": c.block_size, "embedding_length": c.n_embd, "block_count": c.n_layer,
                       "feed_forward_length": c.ffn_dim, "attention.head_count": c.n_head}.items():
        w.add_uint32(f"{name}.{key}", value)
    if name == "gpt2":
        w.add_float32("gpt2.attention.layer_norm_epsilon", c.norm_eps)
    else:
        w.add_uint32(f"{name}.attention.head_count_kv", c.n_kv_head)
        w.add_uint32(f"{name}.attention.key_length", c.head_dim)
        w.add_float32(f"{name}.attention.layer_norm_rms_epsilon", c.norm_eps)
        w.add_float32(f"{name}.rope.freq_base", c.rope_theta)
    for key, value, type_ in settings:
        w.add_key_value(key, value, type_)
    for key, value in more:
        w.add_tensor(key, value)
    if c.n_expert:
        w.add_uint32("llama.expert_count", c.n_expert)
        w.add_uint32("llama.expert_used_count", c.expert_top_k)
    theirs = {"embed": "token_embd", "pos_embed": "position_embd", "norm": "output_norm", "head": "output"}
    inner = {"attn_norm": "attn_norm", "attn.q": "attn_q", "attn.k": "attn_k", "attn.v": "attn_v",
             "attn.out": "attn_output", "attn.q_norm": "attn_q_norm", "attn.k_norm": "attn_k_norm",
             "mlp_norm": "ffn_norm", "mlp.router": "ffn_gate_inp"}
    inner |= {f"mlp.{part}": f"ffn_{part}{'_exps' if c.n_expert else ''}" for part in ("gate", "up", "down")}
    found = {}
    for key, value in p.items():
        path_, _, part = key.rpartition(".")
        if path_.startswith("blocks."):
            _, layer, ours = path_.split(".", 2)
            if name == "llama" and ours in ("attn.q", "attn.k"):
                D = c.head_dim
                value = np.concatenate([value[h * D + i:h * D + i + 1] for h in range(len(value) // D)
                                        for j in range(D // 2) for i in (j, j + D // 2)])
            found[f"blk.{layer}.{inner[ours]}.{part}"] = value
        else:
            found[f"{theirs[path_]}.{part}"] = value
    if name == "gpt2":
        for layer in range(c.n_layer):
            for part in ("weight", "bias"):
                three = [found.pop(f"blk.{layer}.attn_{letter}.{part}") for letter in "qkv"]
                found[f"blk.{layer}.attn_qkv.{part}"] = np.concatenate(three)
    for key, value in found.items():
        if key != skip:
            if value.ndim > 1 and "position" not in key and "gate_inp" not in key:
                w.add_tensor(key, gguf.quants.quantize(value, kind), raw_dtype=kind)
            else:
                w.add_tensor(key, value)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def rounded(model: GPT, kind: str) -> GPT:
    """The model, with matrices rounded as in a file of this type."""
    kind = gguf.GGMLQuantizationType[kind]
    weights = [(key, gguf.quants.dequantize(gguf.quants.quantize(np.array(value), kind), kind))
               for key, value in tree_flatten(model.parameters())
               if value.ndim > 1 and "pos_embed" not in key and "router" not in key]
    return model.load_weights([(key, mx.array(value.astype(np.float32))) for key, value in weights], strict=False)


def read(*arguments, status=0):
    command = [sys.executable, ROOT / "gguf_reader.py", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and (not status or done.stderr.count("\n") == 1), done.stderr
    return done


def logits_of(path) -> np.ndarray:
    model, _ = load_checkpoint(str(path))
    model.set_dtype(mx.float32)
    return np.array(model(mx.array(IDX)))


@pytest.mark.parametrize("name", FLAVOURS)
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_models(name, kind, tmp_path):
    model = build(name)
    written(tmp_path / "a.gguf", name, model, gguf.GGMLQuantizationType[kind])
    run_here("gguf_reader.py", tmp_path / "a.gguf", tmp_path / "a.safetensors")
    logits = np.array(rounded(model, kind)(mx.array(IDX)))
    assert np.abs(logits_of(tmp_path / "a.safetensors") - logits).max() < 1e-5 * np.abs(logits).max()
    found, _ = load_checkpoint(str(tmp_path / "a.safetensors"))
    assert hasattr(found.blocks[0].attn.q, "bits") == kind.startswith("Q")
    assert kind != "BF16" or found.blocks[0].mlp.up.weight.dtype == mx.bfloat16


@pytest.mark.parametrize("bits", [0, 8])
def test_other_types_are_unpacked(bits, tmp_path):
    """Q5_0 becomes float16, or is quantized again if asked, also if the width is not a multiple of 64; a line says so.
    """
    model = build("llama", ffn_dim=96)
    written(tmp_path / "a.gguf", "llama", model, gguf.GGMLQuantizationType.Q5_0)
    done = read(tmp_path / "a.gguf", tmp_path / "a.safetensors", f"--bits={bits}").stdout
    assert "16 tensors of Q5_0 are unpacked to float16" in done and ("again to 8 bits" in done) == (bits > 0)
    found, _ = load_checkpoint(str(tmp_path / "a.safetensors"))
    assert hasattr(found.blocks[0].attn.q, "bits") == (bits > 0)
    logits = np.array(rounded(model, "Q5_0")(mx.array(IDX)))
    tolerance = 0.05 if bits else 2e-3
    assert np.abs(logits_of(tmp_path / "a.safetensors") - logits).max() < tolerance * np.abs(logits).max()


@pytest.mark.parametrize("name", [*FLAVOURS, "llama3", "linear"])
@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_there_and_back(name, kind, tmp_path):
    scaling = dict(llama3=dict(rope_factor=8.0, rope_original=16), linear=dict(
        rope_factor=4.0, rope_low_freq=1e9, rope_high_freq=2e9)).get(name, {})
    flavour = FLAVOURS.get(name, FLAVOURS["llama"])
    model, enc = GPT(GPTConfig(**USUAL | flavour | scaling | {"vocab_size": 512})), train_bpe(iter([SOURCE]), 500)
    meta = {"tokenizer": enc.to_dict(), "chat_template": "<|im_start|>"}
    save_checkpoint(str(tmp_path / "a.safetensors"), model, meta)
    run_here("gguf_reader.py", tmp_path / "a.safetensors", f"--export={tmp_path / 'b.gguf'}", f"--type={kind}")
    reader = gguf.GGUFReader(tmp_path / "b.gguf")
    assert reader.fields["general.architecture"].contents() == ARCHITECTURE[name]
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types[f"blk.1.ffn_up{'_exps' if name == 'mixtral' else ''}.weight"] == kind
    assert types["output_norm.weight"] == "F32"
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == 512 and tokens[enc.eot] == "<|endoftext|>"
    run_here("gguf_reader.py", tmp_path / "b.gguf", tmp_path / "c.safetensors")
    logits = np.array(rounded(model, kind)(mx.array(IDX)))
    assert np.abs(logits_of(tmp_path / "c.safetensors") - logits).max() < 1e-5 * np.abs(logits).max()
    assert load_checkpoint(str(tmp_path / "c.safetensors"))[1]["template"] == "chatml"


@pytest.mark.parametrize("name", [*FLAVOURS, "llama3", "linear"])
def test_llama_cpp_runs_what_we_write(name, tmp_path):
    """The logits of llama.cpp, computed in float16, are those of the model."""
    llama_cpp = pytest.importorskip("llama_cpp")
    scaling = dict(llama3=dict(rope_factor=8.0, rope_original=16), linear=dict(
        rope_factor=4.0, rope_low_freq=1e9, rope_high_freq=2e9)).get(name, {})
    model = build(name if name in FLAVOURS else "llama", vocab_size=512, **scaling)
    meta = {"tokenizer": train_bpe(iter([SOURCE]), 500).to_dict()}
    save_checkpoint(str(tmp_path / "a.safetensors"), model, meta)
    read(tmp_path / "a.safetensors", f"--export={tmp_path / 'b.gguf'}")
    theirs = llama_cpp.Llama(str(tmp_path / "b.gguf"), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
    theirs.eval(IDX[0].tolist())
    logits = np.array(rounded(model, "F16")(mx.array(IDX[:1])))[0]
    assert np.abs(np.array(theirs.scores[:20]) - logits).max() < 5e-3 * np.abs(logits).max()


def test_the_tokenizer_comes_along(tmp_path):
    """A tokenizer whose regex llama.cpp has a name for goes to GGUF and back."""
    enc = train_bpe(iter([SOURCE]), 500)
    made_ = {}
    exec(SOURCE[SOURCE.index("WORDS = {"):START], {"GPT2_PATTERN": __import__("tokenizer").GPT2_PATTERN}, made_)
    enc = Tokenizer("bpe", enc.tokens, enc.special, made_["WORDS"]["qwen2"])
    save_checkpoint(str(tmp_path / "a.safetensors"), GPT(GPTConfig(**USUAL | FLAVOURS["qwen2"] | {"vocab_size": 512})),
                    {"tokenizer": enc.to_dict()})
    read(tmp_path / "a.safetensors", f"--export={tmp_path / 'b.gguf'}")
    read(tmp_path / "b.gguf", tmp_path / "c.safetensors")
    found = Tokenizer.from_dict(load_checkpoint(str(tmp_path / "c.safetensors"))[1]["tokenizer"])
    for text in ("def f(x): return 12345", "grüße, 世界\n\n  x"):
        assert found.encode(text).tolist() == enc.encode(text).tolist()
    assert (found.eot, found.bos, found.pattern) == (enc.eot, enc.bos, enc.pattern)


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
    assert "500 tokens, 499 scores" in read(tmp_path / "b.gguf", tmp_path / "b.safetensors", status=2).stderr
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
    (FLAVOURS["mixtral"] | {"expert_top_k": 1}, "expert_top_k=1"), (dict(mlp="swiglu", n_expert=2), "n_expert=2"),
    (FLAVOURS["mixtral"] | {"expert_balance": "bias"}, "expert_balance='bias'"), (dict(alibi=True), "alibi=True"),
    (FLAVOURS["gpt2"] | {"mlp": "gelu"}, "mlp='gelu' has no counterpart in GGUF's gpt2, which has 'gelu_tanh'"),
    (FLAVOURS["gpt2"] | {"head_dim": 8}, "head_dim=8"), (dict(mlp="swiglu", qkv_bias=True), "qkv_bias=True"),
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
    ("bias", "holds blk.0.attn_q.bias, and 0 more, for which"), ("split", "is one of 3 parts"),
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
    kinds, more = gguf.GGUFValueType, [("blk.0.attn_q.bias", np.ones(64, np.float32))] if change == "bias" else []
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
