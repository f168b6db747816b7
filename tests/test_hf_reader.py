"""hf_reader.py: reads folders that transformers wrote, with their logits (fixtures/make_hf.py); exports; bad input."""
import json
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import prepared
import pytest
from conftest import ROOT, peak_memory, run, run_here, survives
from peers import peer

import readers
from config import UserError
from model import GPT, GPTConfig, load_checkpoint, save_checkpoint
from quantized import Factored
from tokenizer import (
    EOT,
    Tokenizer,
    byte_tokenizer,
    from_tokenizer_json,
    letters_of_bytes,
    to_tokenizer_json,
    train_bpe,
)

FOLDERS = ROOT / "tests" / "fixtures" / "hf"
NAMES = ["gpt2", "llama", "llama3", "linear", "mistral", "qwen2", "qwen3", "mixtral"]
IDX = np.load(FOLDERS / "idx.npy")


def read(*arguments, status=0):
    done = prepared.run([sys.executable, ROOT / "hf_reader.py", *arguments])
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and (not status or done.stderr.count("\n") == 1), done.stderr
    return done


def near(model, logits, tolerance=2e-6):
    return np.abs(np.array(model(mx.array(IDX)).astype(mx.float32)) - logits).max() <= tolerance * np.abs(logits).max()


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_transformers(name, tmp_path):
    """A folder's model gives the logits that transformers computed; exported again, all tensors and settings are equal.
    """
    out = tmp_path / "model.safetensors"
    assert "tensors" in read(FOLDERS / name, out).stdout
    logits = np.load(FOLDERS / name / "logits.npy")
    assert near(load_checkpoint(str(out))[0], logits)
    read(out, f"--export={tmp_path / 'folder'}")
    theirs, ours = (readers.open_folder(str(folder)) for folder in (FOLDERS / name, tmp_path / "folder"))
    assert ours.names == {tensor.removeprefix("transformer.") for tensor in theirs.names}
    assert readers.model_config(ours.raw, "") == readers.model_config(theirs.raw, "")
    for tensor in theirs.names:
        assert mx.array_equal(ours[tensor], theirs[tensor])
    for key in ours.raw.keys() & theirs.raw.keys():
        assert ours.raw[key] == theirs.raw[key] or key in ("architectures", "rope_parameters", "head_dim", "n_inner")


@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_what_we_write(name, tmp_path):
    torch, transformers = peer("torch"), peer("transformers")
    read(FOLDERS / name, tmp_path / "model.safetensors")
    read(tmp_path / "model.safetensors", f"--export={tmp_path / 'folder'}")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
    with torch.no_grad():
        logits = model(torch.tensor(IDX)).logits.numpy()
    expected = np.load(FOLDERS / name / "logits.npy")
    assert np.abs(logits - expected).max() < 2e-6 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama3", "qwen2", "qwen3", "mixtral"])
def test_mlx_lm_reads_what_we_write(name, tmp_path):
    mlx_lm = peer("mlx_lm.utils")
    read(FOLDERS / name, tmp_path / "model.safetensors")
    read(tmp_path / "model.safetensors", f"--export={tmp_path / 'folder'}")
    model, _ = mlx_lm.load_model(tmp_path / "folder")
    short = IDX[:, :5]  # shorter than the window, which mlx-lm does not have for Qwen2
    expected = np.load(FOLDERS / name / "logits.npy")[:, :5]
    assert np.abs(np.array(model(mx.array(short))) - expected).max() < 2e-5 * np.abs(expected).max()


def in_bfloat16(name, folder):
    """A copy of one of the folders with bfloat16 weights in one file. Returns the arrays."""
    shutil.copytree(FOLDERS / name, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    arrays = {key: p.astype(mx.bfloat16) for path in (FOLDERS / name).glob("*.safetensors")
              for key, p in mx.load(str(path)).items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "pt"})
    return arrays


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_kept(name, tmp_path):
    """Weights stay bfloat16 in the checkpoint and in the export, bit for bit; logits in bfloat16 have its rounding
    error."""
    arrays = in_bfloat16(name, tmp_path / "half")
    run_here("hf_reader.py", tmp_path / "half", tmp_path / "model.safetensors")
    model, _ = load_checkpoint(str(tmp_path / "model.safetensors"))
    assert {p.dtype for p in mx.load(str(tmp_path / "model.safetensors")).values()} == {mx.bfloat16}
    half = np.array(model(mx.array(IDX)).astype(mx.float32))
    model.set_dtype(mx.float32)
    assert near(model, half, 0.02) and not near(model, half, 1e-3)
    run_here("hf_reader.py", tmp_path / "model.safetensors", f"--export={tmp_path / 'back'}")
    found = mx.load(str(tmp_path / "back" / "model.safetensors"))
    names = {key: key.removeprefix("transformer.") for key in arrays}
    assert all(mx.array_equal(found[names[key]], arrays[key]) for key in arrays) and len(found) == len(arrays)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_beside_transformers(name, tmp_path):
    """The error of logits in bfloat16 is no larger than in transformers."""
    torch, transformers = peer("torch"), peer("transformers")
    in_bfloat16(name, tmp_path / "half")
    run_here("hf_reader.py", tmp_path / "half", tmp_path / "model.safetensors")
    model, _ = load_checkpoint(str(tmp_path / "model.safetensors"))
    ours, theirs = np.array(model(mx.array(IDX)).astype(mx.float32)), {}
    for dtype in ("bfloat16", "float32"):
        built = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=getattr(torch, dtype)).eval()
        with torch.no_grad():
            theirs[dtype] = built(torch.tensor(IDX)).logits.float().numpy()
    errors = [np.sqrt(np.square(x - theirs["float32"]).mean()) for x in (ours, theirs["bfloat16"])]
    assert errors[0] < 1.3 * errors[1]
    model.set_dtype(mx.float32)
    assert near(model, theirs["float32"])


def test_prefix_may_be_missing(tmp_path):
    """Some of GPT-2's files leave out the prefix `transformer.`, and hold causal masks."""
    shutil.copytree(FOLDERS / "gpt2", tmp_path / "short")
    arrays = mx.load(str(FOLDERS / "gpt2" / "model.safetensors"))
    arrays = {name.removeprefix("transformer."): p for name, p in arrays.items()}
    arrays["h.0.attn.bias"] = mx.ones((1, 1, 8, 8))
    mx.save_safetensors(str(tmp_path / "short" / "model.safetensors"), arrays)
    read(tmp_path / "short", tmp_path / "model.safetensors")
    assert near(load_checkpoint(str(tmp_path / "model.safetensors"))[0], np.load(FOLDERS / "gpt2" / "logits.npy"))


@pytest.mark.parametrize("n_expert", [0, 3])
def test_packed_is_unpacked(n_expert, tmp_path):
    """On export, quantized layers become the float weights that their integers stand for."""
    model = GPT(GPTConfig(block_size=64, vocab_size=40, n_layer=1, n_head=1, n_embd=64, mlp="swiglu", qk_norm=False,
                          n_expert=n_expert))
    nn.quantize(model, 64, 4, class_predicate=lambda path, module: hasattr(module, "to_quantized")
                and not path.endswith("router"))
    save_checkpoint(str(tmp_path / "packed.safetensors"), model, {})
    logits = np.array(model(mx.array(IDX)))
    read(tmp_path / "packed.safetensors", f"--export={tmp_path / 'folder'}")
    read(tmp_path / "folder", tmp_path / "dense.safetensors")
    assert near(load_checkpoint(str(tmp_path / "dense.safetensors"))[0], logits)


@pytest.mark.parametrize("bits", [0, 8])
@pytest.mark.parametrize("script", ["hf_reader.py", "gguf_reader.py"])
def test_low_rank_layers_are_multiplied(script, bits, tmp_path):
    """On export, the two factors of laser.py, quantized or not, become one matrix."""
    if script == "gguf_reader.py":
        pytest.importorskip("gguf")
    model = GPT(GPTConfig(block_size=64, vocab_size=40, n_layer=2, n_head=2, n_embd=64, mlp="swiglu", qk_norm=False,
                          qkv_bias=True))
    for block in model.blocks:
        block.attn.q, block.mlp.down = Factored(block.attn.q, 32), Factored(block.mlp.down, 32)
        block.attn.q.u.bias = mx.random.normal((64,), key=mx.random.key(0))
    if bits:
        nn.quantize(model, 32, bits)
    save_checkpoint(str(tmp_path / "thin.safetensors"), model, {})
    out = tmp_path / ("folder" if script == "hf_reader.py" else "a.gguf")
    run_here(script, tmp_path / "thin.safetensors", f"--export={out}")
    run_here(script, out, tmp_path / "dense.safetensors")
    assert near(load_checkpoint(str(tmp_path / "dense.safetensors"))[0], np.array(model(mx.array(IDX))),
                2e-6 if script == "hf_reader.py" else 2e-3)  # GGUF's are float16


GPT2 = dict(pos="learned", norm="layer", mlp="gelu", bias=True, qk_norm=False)


@pytest.mark.parametrize("settings, says", [
    (dict(mlp="relu2"), "mlp='relu2'"), (dict(alibi=True), "alibi=True"), (dict(yoco=True), "yoco=True"),
    (dict(norm="layer"), "norm='layer'"), (dict(qkv_bias=True), "qkv_bias=True"),
    (dict(pos="learned"), "norm='rms' has no counterpart in GPT-2"), (dict(n_shared_expert=1, n_expert=4), "n_shared"),
    (dict(qk_norm=False, sliding_window=8, window_pattern="SL"), "window_pattern='SL' has no counterpart in Mistral"),
    (dict(qk_norm=False, n_expert=4, expert_top_k=1), "expert_top_k=1"),
    (dict(qk_norm=False, n_expert=4, expert_balance="bias"), "expert_balance='bias' has no counterpart"),
    (dict(softcap=15.0), "softcap=15.0"), (dict(value_residual=True), "value_residual=True"),
    (dict(value_embeds=True), "value_embeds=True"), (GPT2 | dict(softcap=15.0), "softcap=15.0"),
], ids=str)
def test_what_has_no_counterpart(settings, says, tmp_path):
    path, folder = str(tmp_path / "model.safetensors"), tmp_path / "folder"
    usual = dict(block_size=64, vocab_size=40, n_layer=2, n_head=2, n_embd=32, mlp="swiglu")
    save_checkpoint(path, GPT(GPTConfig(**usual | settings)), {})
    assert says in read(path, f"--export={folder}", status=2).stderr and not folder.exists()


@pytest.mark.parametrize("script", ["hf_reader.py", "gguf_reader.py"])
@pytest.mark.parametrize("flavour", [
    GPT2 | {"mlp": "gelu_tanh"}, {"mlp": "swiglu"}, {"mlp": "swiglu", "qk_norm": False}], ids=str)
def test_a_setting_that_is_new(script, flavour, monkeypatch, tmp_path):
    """Fields that GPTConfig may gain. At their defaults, which need not be 0, models are exported; another value is
    refused by the field's name."""
    @dataclass
    class Wider(GPTConfig):
        new_flag: bool = False
        new_number: float = 1.5
        new_choice: str = "all"

    if script == "gguf_reader.py":
        pytest.importorskip("gguf")
    monkeypatch.setattr("model.GPTConfig", Wider)
    usual = dict(block_size=64, vocab_size=40, n_layer=2, n_head=2, n_embd=32)
    for name, value in (("new_flag", True), ("new_number", 2.0), ("new_choice", "some"), ("new_flag", False)):
        path, out = str(tmp_path / f"{name}-{value}.safetensors"), tmp_path / f"{name}-{value}"
        save_checkpoint(path, GPT(Wider(**usual | flavour | {name: value})), {})
        if value is False:
            run_here(script, path, f"--export={out}")
            assert out.exists()
        else:
            with pytest.raises(UserError, match=f"{name}={value!r} has no counterpart in "):
                run_here(script, path, f"--export={out}")
            assert not out.exists()


@pytest.mark.parametrize("script", ["hf_reader.py", "gguf_reader.py"])
def test_settings_without_effect(script, tmp_path):
    """Settings of a variant that is off do not prevent an export, nor do rotary settings if positions are learned."""
    if script == "gguf_reader.py":
        pytest.importorskip("gguf")
    usual = dict(block_size=64, vocab_size=40, n_layer=2, n_head=2, n_embd=32, expert_top_k=1, diff_attn_version=2,
                 expert_balance="bias", mod_capacity=0.5, mod_every=1, window_pattern="SL")
    for i, flavour in enumerate((GPT2 | dict(mlp="gelu_tanh", rope_theta=500.0, rope_factor=2.0, qkv_bias=True),
                                 dict(mlp="swiglu"))):
        save_checkpoint(str(tmp_path / f"{i}.safetensors"), GPT(GPTConfig(**usual | flavour)), {})
        run_here(script, tmp_path / f"{i}.safetensors", f"--export={tmp_path / str(i)}")
        assert (tmp_path / str(i)).exists()


# ---- tokenizers ------------------------------------------------------------------------------------------------------

TEXTS = ["def f(x):\n    return x  # grüße, 世界 1234567", "  leading, trailing  \n\n\t", "I'll don't WE'VE", "",
         "<|endoftext|> is text", "\u00e9\u0301 \U0001f600 \x00\x7f", "a" * 300, "....!!!???   \r\n\r\n x"]


def tokenizers():
    text = (ROOT / "README.md").read_text() + (ROOT / "model.py").read_text()
    return {"byte": byte_tokenizer(), "bpe": train_bpe(iter([text]), 700)}


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_our_tokenizer_there_and_back(kind):
    """The tokenizers package, with the tokenizer.json that we write, gives the ids of our tokenizer; so do we after
    reading it again."""
    ours = tokenizers()[kind]
    written = json.dumps(to_tokenizer_json(ours))
    back = from_tokenizer_json(written, EOT, EOT)
    theirs = pytest.importorskip("tokenizers").Tokenizer.from_str(written)
    assert (back.eot, back.bos, back.special, back.tokens) == (ours.eot, ours.bos, ours.special, ours.tokens)
    for text in TEXTS:
        ids = ours.encode(text).tolist()
        if EOT not in text:  # the package encodes a special token in a text as that token
            assert theirs.encode(text, add_special_tokens=False).ids == ids
        assert back.encode(text).tolist() == ids and back.decode(ids) == text


def test_gpt2s_tokenizer_is_run_as_our_own():
    """A byte-level tokenizer with GPT-2's regex, trained here by the tokenizers package, becomes kind bpe, with equal
    ids."""
    package = pytest.importorskip("tokenizers")
    theirs = package.ByteLevelBPETokenizer()
    theirs.train_from_iterator([(ROOT / "model.py").read_text()], vocab_size=800, special_tokens=[EOT])
    found = from_tokenizer_json(theirs.to_str())
    assert found.kind == "bpe" and found.eot == 0
    for text in (*TEXTS, (ROOT / "train.py").read_text()):
        if EOT not in text:
            ids = theirs.encode(text).ids
            assert found.encode(text).tolist() == ids and found.decode(ids) == text
    again = Tokenizer.from_dict(json.loads(json.dumps(found.to_dict())))
    assert (again.eot, again.bos) == (0, None) and again.encode("a b").tolist() == found.encode("a b").tolist()


def test_merges_that_are_no_ranks():
    """b + c is merged before a + b, and a + bc is no merge: "abc" stays two tokens, which tiktoken would make one."""
    package = pytest.importorskip("tokenizers")
    vocab = {letter: i for i, letter in enumerate(sorted(letters_of_bytes().values()))}
    vocab |= {"bc": 256, "ab": 257, "abc": 258}
    model = package.models.BPE(vocab, [("b", "c"), ("a", "b"), ("ab", "c")])
    theirs = package.Tokenizer(model)
    theirs.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = package.decoders.ByteLevel()
    theirs.add_special_tokens([EOT])
    found = from_tokenizer_json(theirs.to_str())
    assert found.kind == "hf" and found.encode("abc").tolist() == theirs.encode("abc").ids == [vocab["a"], 256]
    assert found.encode(EOT).tolist() != [found.eot]  # a text is never encoded as a special token


def test_other_tokenizers_are_run_by_their_package():
    """Tokenizers as SentencePiece makes them, with a letter for blanks, and bytes for unknown characters (Llama 2)."""
    package = pytest.importorskip("tokenizers")
    theirs = package.SentencePieceBPETokenizer()
    theirs.train_from_iterator(["the cat sat on the mat"] * 3, vocab_size=60, special_tokens=["<unk>", "<s>", "</s>"])
    found = from_tokenizer_json(theirs.to_str())
    assert found.kind == "hf" and (found.bos, found.eot) == (None, 2)  # the file puts no token before a text
    ids = theirs.encode("the cat", add_special_tokens=False).ids
    again = Tokenizer.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again.encode("the cat").tolist() == ids and (again.bos, again.eot) == (None, 2)
    assert again.decode(ids).strip() == "the cat"


def test_the_tokenizer_travels(tmp_path):
    """The tokenizer and the chat template go from a checkpoint to a folder and back, and sample.py uses them."""
    shutil.copytree(FOLDERS / "llama", tmp_path / "folder")
    raw = json.loads((FOLDERS / "llama" / "config.json").read_text())
    enc = byte_tokenizer()
    model = GPT(GPTConfig(block_size=64, vocab_size=257, n_layer=2, n_head=4, n_kv_head=2, n_embd=16, ffn_dim=24,
                          mlp="swiglu", qk_norm=False, tie=False))
    meta = {"tokenizer": enc.to_dict(), "chat_template": "{{ '<|im_start|>' }}"}
    save_checkpoint(str(tmp_path / "a.safetensors"), model, meta)
    read(tmp_path / "a.safetensors", f"--export={tmp_path / 'b'}")
    out = tmp_path / "the model.safetensors"
    assert f"next: python sample.py '{out}'\n" in read(tmp_path / "b", out).stdout
    _, found = load_checkpoint(str(out))
    assert found["script"] == "hf_reader.py"
    assert Tokenizer.from_dict(found["tokenizer"]).encode("ab").tolist() == [97, 98]
    assert found["template"] == "own" and found["chat_template"] == "{{ '<|im_start|>' }}"
    done = prepared.run([sys.executable, ROOT / "sample.py", out, "--prompt=ab",
                         "--max_new_tokens=5", "--template=none"])
    assert done.returncode == 0 and done.stdout.startswith("ab") and raw["model_type"] == "llama"


@pytest.mark.parametrize("where", ["list", "jinja"])
def test_other_places_of_the_template(where, tmp_path):
    """A list of templates by name, as in older folders, and a separate file, as transformers 5 writes it."""
    shutil.copytree(FOLDERS / "llama", tmp_path / "folder")
    (tmp_path / "folder" / "tokenizer.json").write_text(json.dumps(to_tokenizer_json(byte_tokenizer())))
    template = "<|start_header_id|>{{ message }}"
    settings = {"eos_token": {"content": EOT}}
    if where == "list":
        settings["chat_template"] = [{"name": "tools", "template": "x"}, {"name": "default", "template": template}]
    else:
        (tmp_path / "folder" / "chat_template.jinja").write_text(template)
    (tmp_path / "folder" / "tokenizer_config.json").write_text(json.dumps(settings))
    _, found = readers.tokenizer_of(readers.open_folder(str(tmp_path / "folder")))
    assert (found["chat_template"], found["template"]) == (template, "own")


def test_a_tokenizer_that_is_larger_than_the_embedding(tmp_path):
    """The embedding has 40 rows: the 257 tokens of bytes do not fit, which is told before any weight is read."""
    shutil.copytree(FOLDERS / "llama", tmp_path / "folder")
    (tmp_path / "folder" / "tokenizer.json").write_text(json.dumps(to_tokenizer_json(byte_tokenizer())))
    refused(tmp_path / "folder", "the tokenizer has 257 tokens, but the embedding 40 rows")


# ---- bad input -------------------------------------------------------------------------------------------------------


def refused(folder, says):
    """The reader fails with one line that contains `says`, and writes nothing."""
    out = folder.parent / "out.safetensors"
    error = read(folder, out, status=2).stderr
    assert says in error, error
    assert not list(folder.parent.glob("out*"))


@pytest.mark.parametrize("name, value, says", [
    ("model_type", "rwkv", "architecture 'rwkv'"), ("hidden_act", "gelu", "hidden_act='gelu'"),
    ("attention_bias", True, "attn.k.bias is missing"), ("rope_parameters", {"rope_type": "yarn"}, "lacks 'factor'"),
    ("rope_parameters", {"rope_type": "longrope"}, "'longrope'"), ("attention_bias", 2, "attention_bias=2"),
    ("mlp_bias", True, "mlp_bias=True"),
    ("vocab_size", 41, "model.safetensors: model.embed_tokens.weight has shape (40, 16), but by the settings it is"),
    ("num_hidden_layers", 3, "holds no tensor model.layers.2"), ("hidden_size", "16", "n_embd='16'"),
    ("num_attention_heads", 3, "not divisible"), ("quantization_config", {"quant_method": "awq"}, "awq_reader.py"),
    ("quantization_config", {"quant_method": "bitsandbytes"}, "'bitsandbytes', which has no reader"),
], ids=str)
def test_bad_config(name, value, says, tmp_path):
    shutil.copytree(FOLDERS / "qwen3", tmp_path / "bad")
    path = tmp_path / "bad" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    refused(tmp_path / "bad", says)


# As their authors published them, but for the settings that every file of the family has.
PUBLISHED = {
    "gpt2": dict(model_type="gpt2", activation_function="gelu_new", architectures=["GPT2LMHeadModel"], attn_pdrop=0.1,
                 bos_token_id=50256, embd_pdrop=0.1, eos_token_id=50256, initializer_range=0.02, n_ctx=1024,
                 layer_norm_epsilon=1e-5, n_embd=768, n_head=12, n_layer=12, n_positions=1024, resid_pdrop=0.1,
                 summary_activation=None, summary_first_dropout=0.1, summary_proj_to_labels=True,
                 summary_type="cls_index", summary_use_proj=True, vocab_size=50257,
                 task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}}),
    "gpt2-xl": dict(model_type="gpt2", activation_function="gelu_new", architectures=["GPT2LMHeadModel"],
                    attn_pdrop=0.1, layer_norm_epsilon=1e-5, n_ctx=1024, n_embd=1600, n_head=25, n_layer=48,
                    n_positions=1024, output_past=True, vocab_size=50257, predict_special_tokens=True,
                    id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0}, _num_labels=1),
    "Llama-2-7b": dict(model_type="llama", _name_or_path="meta-llama/Llama-2-7b-hf", bos_token_id=1, eos_token_id=2,
                       hidden_size=4096, intermediate_size=11008, max_position_embeddings=4096,
                       num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32, pretraining_tp=1,
                       rope_scaling=None, torch_dtype="float16", transformers_version="4.31.0.dev0", vocab_size=32000),
    "Llama-3.2-1B": dict(
        model_type="llama", attention_bias=False, attention_dropout=0.0, bos_token_id=128000,
        eos_token_id=[128001, 128008, 128009], head_dim=64, hidden_size=2048, intermediate_size=8192,
        max_position_embeddings=131072, mlp_bias=False, num_attention_heads=32, num_hidden_layers=16,
        num_key_value_heads=8, pretraining_tp=1, rope_theta=500000.0, tie_word_embeddings=True, vocab_size=128256,
        rope_scaling={"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                      "original_max_position_embeddings": 8192, "rope_type": "llama3"}),
    "SmolLM2-135M": dict(
        model_type="llama", hidden_size=576, intermediate_size=1536, is_llama_config=True,
        max_position_embeddings=8192, num_attention_heads=9, num_hidden_layers=30, num_key_value_heads=3,
        rope_interleaved=False, rope_theta=100000, tie_word_embeddings=True, vocab_size=49152,
        **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}}),
    "Falcon3": dict(model_type="llama", activation="swiglu", head_dim=256, hidden_size=2048, intermediate_size=8192,
                    max_position_embeddings=8192, num_attention_heads=8, num_hidden_layers=18, num_key_value_heads=4,
                    rope_theta=1000042, vocab_size=131072, pretraining_tp=1),
    "unsloth": dict(model_type="mistral", hidden_size=4096, intermediate_size=14336, max_position_embeddings=32768,
                    num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8, sliding_window=None,
                    unsloth_version="2024.9", unsloth_fixed=True, model_max_length=32768, rope_theta=1e6,
                    vocab_size=32768, _attn_implementation_autoset=True),
    "Mixtral-8x7B": dict(model_type="mixtral", hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
                         max_position_embeddings=32768, num_experts_per_tok=2, num_hidden_layers=32,
                         num_key_value_heads=8, num_local_experts=8, output_router_logits=False, rope_theta=1e6,
                         router_aux_loss_coef=0.02, sliding_window=None, vocab_size=32000),
    "DeepSeek-R1-Distill-Qwen": dict(
        model_type="qwen2", hidden_size=1536, intermediate_size=8960, max_position_embeddings=131072,
        max_window_layers=21, num_attention_heads=12, num_hidden_layers=28, num_key_value_heads=2, rope_theta=10000,
        sliding_window=4096, use_mrope=False, use_sliding_window=False, vocab_size=151936),
    "Qwen3-0.6B": dict(model_type="qwen3", attention_bias=False, head_dim=128, hidden_size=1024, rope_scaling=None,
                       intermediate_size=3072, max_position_embeddings=40960, max_window_layers=28,
                       num_attention_heads=16, num_hidden_layers=28, num_key_value_heads=8, rope_theta=1000000,
                       sliding_window=None, use_sliding_window=False, vocab_size=151936)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name):
    """No setting of a well-known model is refused."""
    usual = dict(architectures=["AnyForCausalLM"], hidden_act="silu", rms_norm_eps=1e-6, tie_word_embeddings=False,
                 initializer_range=0.02, torch_dtype="bfloat16", transformers_version="4.51.0", use_cache=True)
    found = PUBLISHED[name] if "gpt2" in name else usual | PUBLISHED[name]
    config = readers.model_config(found, "config.json")
    assert config.n_embd == found.get("hidden_size", found.get("n_embd")) and config.sliding_window == 0


@pytest.mark.parametrize("family", ["GPT2", "Llama", "Mistral", "Qwen2", "Qwen3", "Mixtral"])
def test_settings_of_transformers(family):
    """The default settings of its classes are read."""
    transformers = peer("transformers")
    found = json.loads(getattr(transformers, f"{family}Config")().to_json_string(use_diff=False))
    assert readers.model_config(found, "config.json").n_layer == found.get("num_hidden_layers", found.get("n_layer"))


@pytest.mark.parametrize("name, value, off", [
    ("final_logit_softcapping", 30.0, None), ("attn_logit_softcapping", 50.0, 0), ("qk_layernorm", True, False),
    ("clip_qkv", 8.0, None), ("logit_scale", 0.0625, 1.0), ("residual_multiplier", 0.22, 1.0), ("scale_emb", 12, 1),
    ("embedding_multiplier", 12.0, 1.0), ("attention_multiplier", 0.0078125, 1), ("rotary_pct", 0.25, 1.0),
    ("rope_interleaved", True, False), ("use_qk_norm", True, False), ("is_causal", False, True), ("mup", [1], []),
    ("norm_type", "layer", "none"), ("pruned_heads", {"0": [1]}, {}), ("activation", "geglu", "swiglu"),
    ("original_max_position_embeddings", 4096, None),
])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_unknown_settings(family, name, value, off):
    """An unknown setting is refused by its name, unless its value turns it off."""
    raw = json.loads((FOLDERS / family / "config.json").read_text())
    if name != "activation" or family != "gpt2":
        assert readers.model_config(raw | {name: off}, "a.json") == readers.model_config(raw, "a.json")
    with pytest.raises(UserError, match=f"a.json: {name}="):
        readers.model_config(raw | {name: value}, "a.json")


@pytest.mark.parametrize("module", ["readers.py", "wgsl.py"])
def test_a_module_is_no_script(module):
    assert f"{module} has no command of its own: run " in run(module, status=2).stderr


def test_bad_folders(tmp_path):
    bad = tmp_path / "bad"
    shutil.copytree(FOLDERS / "llama", bad)
    (bad / "model-00002-of-00002.safetensors").rename(bad / "elsewhere")
    refused(bad, "model-00002-of-00002.safetensors is missing")
    for part in bad.glob("model*"):
        part.unlink()
    refused(bad, "no .safetensors file")
    (bad / "pytorch_model.bin").write_bytes(b"x")
    refused(bad, "is a pickle")
    (bad / "config.json").write_text("{")
    refused(bad, "not JSON")
    (bad / "config.json").unlink()
    refused(bad, "config.json is missing")
    assert "not a folder" in read(tmp_path / "nothing", tmp_path / "out", status=2).stderr
    assert "nothing to read" in read(status=2).stderr


def test_more_than_the_config_says(tmp_path):
    """Tensors that the architecture does not have are refused, but for constants, biases of zeros, and the unembedding
    of a tied model, which must equal the embedding."""
    shutil.copytree(FOLDERS / "qwen3", tmp_path / "bad")
    arrays = mx.load(str(FOLDERS / "qwen3" / "model.safetensors"))
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": mx.ones(4),
            "lm_head.weight": arrays["model.embed_tokens.weight"], "model.layers.1.self_attn.q_proj.bias": mx.zeros(32)}
    mx.save_safetensors(str(tmp_path / "bad" / "model.safetensors"), arrays | more)
    read(tmp_path / "bad", tmp_path / "model.safetensors")
    assert near(load_checkpoint(str(tmp_path / "model.safetensors"))[0], np.load(FOLDERS / "qwen3" / "logits.npy"))
    other = {"lm_head.weight": mx.contiguous(arrays["model.embed_tokens.weight"][::-1])}
    mx.save_safetensors(str(tmp_path / "bad" / "model.safetensors"), arrays | other)
    refused(tmp_path / "bad", "lm_head.weight differs from model.embed_tokens.weight, though config.json has tie_word")
    mx.save_safetensors(str(tmp_path / "bad" / "model.safetensors"), arrays | {"model.layers.2.mlp.x": mx.ones(4)})
    refused(tmp_path / "bad", "holds model.layers.2.mlp.x, and 0 more")
    more["model.layers.1.self_attn.q_proj.bias"] = mx.ones(32)
    mx.save_safetensors(str(tmp_path / "bad" / "model.safetensors"), arrays | more)
    refused(tmp_path / "bad", "model.layers.1.self_attn.q_proj.bias has no place")


def test_numbers_that_are_none(tmp_path):
    shutil.copytree(FOLDERS / "qwen3", tmp_path / "bad")
    arrays = mx.load(str(FOLDERS / "qwen3" / "model.safetensors"))
    arrays["model.norm.weight"] = arrays["model.norm.weight"] * mx.inf
    mx.save_safetensors(str(tmp_path / "bad" / "model.safetensors"), arrays)
    refused(tmp_path / "bad", "model.safetensors: model.norm.weight holds infinite numbers")


def outcome(folder, name, **change):
    """Read a folder with some settings changed (...: left out). Returns the config and the logits, or the error."""
    raw = json.loads((FOLDERS / name / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))
    out = folder.parent / "out.safetensors"
    out.unlink(missing_ok=True)
    try:
        run_here("hf_reader.py", folder, out)
    except UserError as error:
        assert "\n" not in str(error) and str(folder) in str(error) and not out.exists(), error
        return str(error)
    model, meta = load_checkpoint(str(out))
    return meta["config"], np.array(model(mx.array(IDX)))


@pytest.mark.parametrize("name", ["gpt2", "mistral", "mixtral"])
def test_any_value(name, tmp_path):
    """Any JSON value for a setting gives a model, or an error of one line."""
    shutil.copytree(FOLDERS / name, tmp_path / "bad")
    raw = json.loads((FOLDERS / name / "config.json").read_text())
    for key in raw:
        for value in (None, -1, 1.5, "x", [], 2**40):
            found = outcome(tmp_path / "bad", name, **{key: value})
            if isinstance(found, str):
                continue
            assert np.isfinite(found[1]).all() and (key != "sliding_window" or value is None)
    if name != "gpt2":
        for value in ({"rope_theta": "x"}, {"rope_theta": -1.0}, {"rope_theta": 1e4, "rope_type": "linear"},
                      {"rope_theta": 1e4, "beta_fast": 32}, {"rope_theta": 1e4, "partial_rotary_factor": 0.5}):
            assert isinstance(outcome(tmp_path / "bad", name, rope_parameters=value), str)
        assert "'sliding_windov', which should be 'sliding_window'" in outcome(
            tmp_path / "bad", name, sliding_window=..., sliding_windov=5)


def test_what_transformers_takes_for_granted(tmp_path):
    """Windows that are off, or that the family does not have; default values of settings that are left out."""
    for name in ("llama", "qwen2", "qwen3", "mistral", "mixtral"):
        shutil.copytree(FOLDERS / name, tmp_path / name)
    assert outcome(tmp_path / "llama", "llama", sliding_window=5)[0]["sliding_window"] == 0
    assert outcome(tmp_path / "qwen3", "qwen3", sliding_window=5)[0]["sliding_window"] == 0
    assert outcome(tmp_path / "mistral", "mistral", sliding_window=...)[0]["sliding_window"] == 4096
    assert outcome(tmp_path / "mixtral", "mixtral", rope_parameters=...)[0]["rope_theta"] == 1e6
    assert outcome(tmp_path / "mistral", "mistral", rope_parameters=...)[0]["rope_theta"] == 1e4
    older = dict(layer_types=..., max_window_layers=1)
    assert outcome(tmp_path / "qwen2", "qwen2", **older)[0]["window_pattern"] == "LS"
    assert outcome(tmp_path / "qwen2", "qwen2", **older | {"max_window_layers": ...})[0]["sliding_window"] == 0
    assert "layer_types is not a list" in outcome(tmp_path / "qwen2", "qwen2", layer_types=["chunked_attention"] * 2)
    assert "layer_types is not a list" in outcome(tmp_path / "qwen2", "qwen2", layer_types=["sliding_attention"])


@pytest.mark.parametrize("name, tensor, change, says", [
    ("qwen3", "model.layers.0.mlp.up_proj.weight", lambda p: p.astype(mx.uint8), "holds uint8, where floating-point"),
    ("qwen3", "model.layers.0.mlp.up_proj.weight", lambda p: p.astype(mx.uint32), "is packed in shapes"),
    ("qwen3", "model.layers.0.mlp.up_proj.weight", lambda p: p[:, :-1], "has shape (24, 15), but by the settings"),
    ("qwen3", "model.layers.1.self_attn.q_norm.weight", lambda p: p.astype(mx.int32), "holds int32"),
    ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w1.weight", lambda p: p[:-1], "has shape"),
    ("gpt2", "transformer.h.1.attn.c_attn.weight", lambda p: p[:, :-1], "has shape (47, 16)"),
    ("gpt2", "transformer.h.1.attn.c_attn.bias", lambda p: p[:-3], "has shape (45,)"),
    ("gpt2", "transformer.h.1.mlp.c_fc.weight", lambda p: p.T, "has shape (16, 64), but by the settings"),
])
def test_bad_tensors(name, tensor, change, says, tmp_path):
    """Wrong dtypes and wrong shapes: the error names the file and the tensor in it."""
    shutil.copytree(FOLDERS / name, tmp_path / "bad")
    path = tmp_path / "bad" / "model.safetensors"
    arrays = mx.load(str(FOLDERS / name / "model.safetensors"))
    mx.save_safetensors(str(path), arrays | {tensor: mx.contiguous(change(arrays[tensor]))})
    found = outcome(tmp_path / "bad", name)
    assert f"{path}: {tensor} {says}" in found, found


def test_what_is_not_written_over(tmp_path, capsys):
    """What is read, a model of another project and another script's result stay; a missing folder is reported."""
    shutil.copytree(FOLDERS / "qwen3", tmp_path / "folder")
    path = tmp_path / "folder" / "model.safetensors"
    before = path.read_bytes()
    (tmp_path / "other").write_bytes(before)
    for out, says in ((path, "would overwrite the input"), (tmp_path, "it is a folder"),
                      (tmp_path / "other", "and is no result of a script"),
                      (tmp_path / "none" / "a.safetensors", "there is no folder")):
        with pytest.raises(UserError, match=says):
            run_here("hf_reader.py", tmp_path / "folder", out)
    assert path.read_bytes() == (tmp_path / "other").read_bytes() == before and len([*tmp_path.iterdir()]) == 2
    for _ in range(2):  # an earlier result may be replaced
        run_here("hf_reader.py", tmp_path / "folder", tmp_path / "a.safetensors")
    assert f"{tmp_path / 'a.safetensors'} is an earlier result of hf_reader.py, which is replaced" in (
        capsys.readouterr().out)
    model, meta = load_checkpoint(str(tmp_path / "a.safetensors"))
    save_checkpoint(str(tmp_path / "a.safetensors"), model, {**meta, "script": "train.py"})
    with pytest.raises(UserError, match="exists, made by train.py: give another name"):
        run_here("hf_reader.py", tmp_path / "folder", tmp_path / "a.safetensors")
    for source, says in (("a.safetensors", "exists: give another --export"), ("folder", "--export takes a checkpoint")):
        with pytest.raises(UserError, match=says):
            run_here("hf_reader.py", tmp_path / source, f"--export={tmp_path / 'folder'}")


@pytest.mark.parametrize("name", ["b\xfccher".encode(), b"b\xfccher"])
@pytest.mark.parametrize("utf8", ["0", "1"])
def test_folders_beyond_ascii(name, utf8, tmp_path):
    """A folder whose name is no ASCII, or no text at all, in a locale with UTF-8 and in one without."""
    shutil.copytree(FOLDERS / "llama", tmp_path / os.fsdecode(name))
    command = [sys.executable, ROOT / "hf_reader.py", name, b"new-" + name]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env={
        **os.environ, "LC_ALL": "C", "PYTHONUTF8": utf8, "PYTHONCOERCECLOCALE": "0"})
    assert done.returncode == 0 and done.stdout.count(b"new-" + name) == 1, done
    assert (tmp_path / f"new-{os.fsdecode(name)}").exists()


@pytest.mark.parametrize("script", ["hf_reader.py", "gguf_reader.py"])
def test_full_disk(script, tmp_path):
    """If only 2000 bytes of a file can be written, there is an error of one line, and no part of the export is left."""
    run_here("hf_reader.py", FOLDERS / "qwen3", tmp_path / "a.safetensors")
    command = [sys.executable, ROOT / script, tmp_path / "a.safetensors", f"--export={tmp_path / 'export'}"]
    done = subprocess.run(command, capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)))
    assert done.returncode == 2 and f"{script}: cannot write {tmp_path / 'export'}: " in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_index_and_tokenizer_that_are_none(tmp_path):
    shutil.copytree(FOLDERS / "llama", tmp_path / "bad")
    for value in (None, [], {"a": 1}, {"a": None}):
        (tmp_path / "bad" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": value}))
        assert "index.json has no weight_map" in outcome(tmp_path / "bad", "llama")
    shutil.copy(FOLDERS / "llama" / "model.safetensors.index.json", tmp_path / "bad")
    good = to_tokenizer_json(tokenizers()["bpe"])
    for bad in ({}, [], good | {"model": 3}, good | {"added_tokens": []}, good | {"decoder": {"type": "x"}},
                good | {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "["}}}):
        (tmp_path / "bad" / "tokenizer.json").write_text(json.dumps(bad))
        assert "tokenizer.json" in outcome(tmp_path / "bad", "llama")


@pytest.mark.parametrize("name, file, refused", [
    ("llama3", "config.json", 0.6), ("qwen2", "config.json", 0.6), ("gpt2", "config.json", 0.5),
    ("llama", "model.safetensors.index.json", 0.5), ("mixtral", "model.safetensors", 0.98),
    ("gpt2", "model.safetensors", 0.98)])
def test_fuzz(name, file, refused, tmp_path):
    shutil.copytree(FOLDERS / name, tmp_path / "bad")
    survives("hf_reader.py", tmp_path / "bad", tmp_path / "bad" / file, 100, refused)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_peak_memory(name, tmp_path):
    """Reading needs the memory of the output and of one tensor, also if matrices are stored transposed."""
    flavour = dict(pos="learned", norm="layer", mlp="gelu", bias=True) if name == "gpt2" else dict(mlp="swiglu")
    outs, peaks = [], []
    for folder, width in (("small", 64), ("large", 512)):
        shape = dict(block_size=64, vocab_size=64, n_layer=8, n_head=4, n_embd=width, qk_norm=False)
        model = GPT(GPTConfig(**flavour | shape))
        save_checkpoint(str(tmp_path / f"{folder}.s"), model, {})
        run_here("hf_reader.py", tmp_path / f"{folder}.s", f"--export={tmp_path / folder}")
        outs.append(tmp_path / f"{folder}.safetensors")
        peaks.append(peak_memory("hf_reader.py", tmp_path / folder, outs[-1]))
    assert peaks[1] - peaks[0] < 1.2 * outs[1].stat().st_size, peaks
