"""Every family of readers.SETTINGS: tiny models that transformers made (families.py), with its logits; there and back;
and, where transformers and mlx-lm are installed, these models and others beside them."""
import json
import shutil
from dataclasses import asdict

import families
import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, run_here
from families import FIXTURES, MODELS, error, in_transformers, logits_cached, logits_here, logits_there, make
from mlx.utils import tree_flatten
from peers import peer

import readers
from config import UserError
from model import GPT, GPTConfig, load_checkpoint, save_checkpoint
from quantized import dense_weight

NAMES = sorted(path.name for path in FIXTURES.iterdir())


def settings(name: str) -> dict:
    return json.loads((FIXTURES / name / "config.json").read_text())


def copy(name: str, tmp_path):
    shutil.copytree(FIXTURES / name, tmp_path / "folder")
    return tmp_path / "folder"


def read(folder, out) -> GPT:
    run_here("hf_reader.py", folder, out)
    return load_checkpoint(str(out))[0]


# ---- fixtures: these run without peers -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_transformers(name, tmp_path):
    """A model gives the logits that transformers computed, at once and with a key/value cache. Its export has the same
    tensors and settings; the folder's spelling of transformers 4 gives the same model."""
    model, logits = read(FIXTURES / name, tmp_path / "a.safetensors"), np.load(FIXTURES / name / "logits.npy")
    assert error(logits_here(model), logits) < 3e-6
    assert error(logits_cached(model), logits) < 3e-6
    run_here("hf_reader.py", tmp_path / "a.safetensors", f"--export={tmp_path / 'back'}")
    theirs, ours = (readers.open_folder(str(folder)) for folder in (FIXTURES / name, tmp_path / "back"))
    found, expected = (asdict(readers.model_config(folder.raw, "")) for folder in (ours, theirs))
    assert found.pop("attn_scale") == pytest.approx(expected.pop("attn_scale")) and found == expected
    assert ours.names == theirs.names and ours.raw["model_type"] == theirs.raw["model_type"]
    for tensor in theirs.names:
        assert mx.allclose(ours[tensor], theirs[tensor], rtol=0, atol=2e-7)  # Gemma's norms: w + 1 - 1
    families.older(copy(name, tmp_path))
    older = readers.open_folder(str(tmp_path / "folder")).raw
    assert "rope_parameters" not in older and readers.model_config(older, "") == model.config


def test_every_family_has_a_model():
    raws = [json.loads(path.read_text()) for path in (ROOT / "tests" / "fixtures").glob("*/*/config.json")]
    assert {raw["model_type"] for raw in raws} >= set(readers.SETTINGS)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_layout_of_the_hub(name, tmp_path):
    """The files of GPT-2 leave out the prefix of all names; they and Pythia's hold causal masks and other constants."""
    folder = FIXTURES / name if name == "gpt_neox" else FIXTURES.parent / "hf" / "gpt2"
    shutil.copytree(folder, tmp_path / "folder")
    arrays = mx.load(str(folder / "model.safetensors"))
    prefix, attention = ("gpt_neox.layers.", "attention") if name == "gpt_neox" else ("transformer.h.", "attn")
    arrays |= {f"{prefix}{layer}.{attention}.{part}": value for layer in range(2) for part, value in {
        "bias": mx.tri(64, 64, dtype=mx.bool_)[None, None], "masked_bias": mx.array(-1e4),
        "rotary_emb.inv_freq": mx.ones(4)}.items()}
    arrays = {key.removeprefix("gpt_neox.").removeprefix("transformer."): p for key, p in arrays.items()}
    mx.save_safetensors(str(tmp_path / "folder" / "model.safetensors"), arrays)
    model = read(tmp_path / "folder", tmp_path / "a.safetensors")
    assert error(np.array(model(mx.array(np.load(FIXTURES.parent / "hf" / "idx.npy")))) if name == "gpt2" else
                 logits_here(model), np.load(folder / "logits.npy")) < 3e-6


def in_mxfp4(folder, dense_folder) -> dict:
    """Write GPT-OSS with experts of random bytes in MXFP4, as OpenAI's files have them; and the folder with the numbers
    that they stand for, by the format's definition (Rouhani et al. 2023). Returns the bytes, by name."""
    numbers = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    numbers, rng, packed = np.concatenate([numbers, -numbers]), np.random.default_rng(0), {}
    for place in (folder, dense_folder):
        shutil.copytree(FIXTURES / "gpt_oss", place)
    dense = mx.load(str(folder / "model.safetensors"))
    rest = dict(dense)
    for name in [name for name in dense if name.endswith(("gate_up_proj", "down_proj"))]:
        E, inputs, outputs = dense[name].shape
        blocks = rng.integers(0, 256, (E, outputs, inputs // 32, 16), dtype=np.uint8)
        exponents = rng.integers(122, 127, (E, outputs, inputs // 32), dtype=np.uint8)
        values = numbers[np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(E, outputs, -1, 32)]
        values = values * 2.0 ** (exponents.astype(int) - 127)[..., None]
        dense[name] = mx.array(values.reshape(E, outputs, inputs).swapaxes(1, 2).astype(np.float32))
        del rest[name]
        packed |= {f"{name}_blocks": mx.array(blocks), f"{name}_scales": mx.array(exponents)}
    mx.save_safetensors(str(folder / "model.safetensors"), rest | packed, {"format": "pt"})
    mx.save_safetensors(str(dense_folder / "model.safetensors"), dense, {"format": "pt"})
    raw = settings("gpt_oss") | {"quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(raw))
    return packed


def test_mxfp4(tmp_path):
    """GPT-OSS's experts stay packed, in 5 bits, and every number is exact. Logits are those of the unpacked model, with
    a key/value cache too. Damaged files are refused."""
    in_mxfp4(tmp_path / "packed", tmp_path / "dense")
    packed, dense = (read(tmp_path / name, tmp_path / f"{name}.safetensors") for name in ("packed", "dense"))
    for block, other in zip(packed.blocks, dense.blocks, strict=True):
        for name in ("gate", "up", "down"):
            assert block.mlp[name].bits == 5 and mx.array_equal(dense_weight(block.mlp[name]), other.mlp[name].weight)
            assert mx.array_equal(block.mlp[name].bias, other.mlp[name].bias)
    assert error(logits_here(packed), logits_here(dense)) < 3e-6
    assert error(logits_cached(packed), logits_here(dense)) < 3e-6
    whole = mx.load(str(tmp_path / "packed" / "model.safetensors"))
    name = "model.layers.1.mlp.experts.down_proj_blocks"
    for damaged in (whole[name][..., :8], whole[name].astype(mx.int32), whole[name][:, :-1]):
        mx.save_safetensors(str(tmp_path / "packed" / "model.safetensors"), whole | {name: damaged})
        with pytest.raises(UserError, match="down_proj"):
            run_here("hf_reader.py", tmp_path / "packed", tmp_path / "damaged.safetensors")


def test_mxfp4_in_transformers(tmp_path):
    """The numbers of MXFP4 are those that transformers unpacks."""
    convert = peer("transformers.integrations.mxfp4").convert_moe_packed_tensors
    import torch
    packed = in_mxfp4(tmp_path / "packed", tmp_path / "dense")
    dense = mx.load(str(tmp_path / "dense" / "model.safetensors"))
    for name in [name for name in packed if name.endswith("_blocks")]:
        parts = (torch.tensor(np.array(packed[name.replace("_blocks", part)])) for part in ("_blocks", "_scales"))
        found = convert(*parts, dtype=torch.float32).numpy()
        assert np.array_equal(found, np.array(dense[name.removesuffix("_blocks")]))


def in_bfloat16(name, folder):
    shutil.copytree(FIXTURES / name, folder)
    arrays = {key: p.astype(mx.bfloat16) for key, p in mx.load(str(folder / "model.safetensors")).items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "pt"})
    return arrays


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3_text", "olmo2", "gpt_neox", "phi3", "gpt_oss"])
def test_bfloat16_is_kept(name, tmp_path):
    """Weights stay bfloat16, bit for bit; Gemma's norms, to which 1 is added, become float32, and bfloat16 again."""
    arrays = in_bfloat16(name, tmp_path / "half")
    model = read(tmp_path / "half", tmp_path / "a.safetensors")
    kinds = {p.dtype for path, p in tree_flatten(model.parameters()) if name.startswith("gemma") == ("norm" in path)}
    assert kinds == {mx.float32 if name.startswith("gemma") else mx.bfloat16}
    run_here("hf_reader.py", tmp_path / "a.safetensors", f"--export={tmp_path / 'back'}")
    found = mx.load(str(tmp_path / "back" / "model.safetensors"))
    assert found.keys() == arrays.keys() and all(mx.array_equal(found[key], arrays[key]) for key in arrays)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


def test_quantized_matrices_are_taken_apart(tmp_path):
    """Phi-3's matrices of q, k and v, and of gate and up, when they are quantized: each part is quantized as it was."""
    source = readers.open_folder(str(FIXTURES / "phi3"))
    config = readers.model_config(source.raw, "")

    def linear(source, name):
        weight = mx.tile(source[f"{name}.weight"], (1, 4))[:, :32 * (source[f"{name}.weight"].shape[1] // 16)]
        return dict(zip(("weight", "scales", "biases"), mx.quantize(weight, 32, 8), strict=True)) | {
            "order": mx.arange(weight.shape[1])}

    found = {name: array for name, array, _ in readers.read_model(config, source, linear)}
    source = readers.open_folder(str(FIXTURES / "phi3"))
    whole = linear(source, "model.layers.1.self_attn.qkv_proj")
    for part in ("weight", "scales", "biases"):
        pieces = [found[f"blocks.1.attn.{letter}.{part}"] for letter in "qkv"]
        assert [len(piece) for piece in pieces] == [16, 8, 8] and mx.array_equal(mx.concatenate(pieces), whole[part])
    assert all(mx.array_equal(found[f"blocks.0.mlp.{name}.order"], mx.arange(32)) for name in ("gate", "up"))


def test_one_norm_for_both(tmp_path):
    """Phi-2 and parallel StableLM have one norm for attention and MLP, here two. If training has made them differ, the
    model cannot be exported."""
    for name in ("phi", "stablelm-parallel"):
        model = read(FIXTURES / name, tmp_path / f"{name}.safetensors")
        assert mx.array_equal(model.blocks[0].attn_norm.weight, model.blocks[0].mlp_norm.weight)
        model.blocks[1].mlp_norm.weight = model.blocks[1].mlp_norm.weight + 0.1
        save_checkpoint(str(tmp_path / f"{name}-2.safetensors"), model, {})
        with pytest.raises(UserError, match="blocks.1.mlp_norm differs from blocks.1.attn_norm"):
            run_here("hf_reader.py", tmp_path / f"{name}-2.safetensors", f"--export={tmp_path / 'folder'}")
        assert not (tmp_path / "folder").exists()


def test_the_family_is_kept(tmp_path):
    """A model goes back to the family it came from, where another one has all of its settings too, unless a setting was
    changed since."""
    read(FIXTURES / "phi3", tmp_path / "a.safetensors")
    model, meta = load_checkpoint(str(tmp_path / "a.safetensors"))
    assert meta["hf"]["model_type"] == "phi3"
    for name, change, family in (("same", {}, "phi3"), ("none", {"hf": {}}, "mistral")):
        save_checkpoint(str(tmp_path / f"{name}.safetensors"), model, meta | change)
        run_here("hf_reader.py", tmp_path / f"{name}.safetensors", f"--export={tmp_path / name}")
        assert json.loads((tmp_path / name / "config.json").read_text())["model_type"] == family
        assert error(logits_here(read(tmp_path / name, tmp_path / "b.safetensors")), logits_here(model)) < 1e-6


@pytest.mark.parametrize("name", ["gemma2", "smollm3-windows", "phi3"])
def test_windows_without_layer_types(name):
    """Older files have no layer_types: Gemma 2 has a window in every second layer, SmolLM3 where no positions are."""
    raw = settings(name)
    assert raw.pop("layer_types", "phi3") and readers.model_config(raw, "") == readers.model_config(settings(name), "")


LONGROPE = dict(rope_type="longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4, rope_theta=1e4)
YARN = dict(rope_type="yarn", factor=4.0, rope_theta=1e4, original_max_position_embeddings=16)


@pytest.mark.parametrize("name, change, says", [
    ("phi3", dict(rope_parameters=LONGROPE), "rope scaling 'longrope'"),
    ("phi3", dict(rope_scaling=LONGROPE | {"type": "su"}, rope_parameters=None), "rope scaling 'longrope'"),
    ("llama-yarn", dict(rope_parameters=LONGROPE), "rope scaling 'longrope'"),
    ("phi3", dict(rope_parameters=YARN), "rope scaling 'yarn' is not supported, only 'default'"),
    ("phi3", dict(model_type="phimoe"), "architecture 'phimoe'"),
    ("gemma3_text", dict(model_type="gemma3", text_config={"model_type": "gemma3_text"}),
     "architecture 'gemma3' is one for pictures and text, of which 'gemma3_text' is a part"),
    ("gemma3_text", dict(use_bidirectional_attention=True), "use_bidirectional_attention=True"),
    ("gemma3_text", dict(attn_logit_softcapping=50.0), "attn_logit_softcapping=50.0"),
    ("gemma3_text", dict(hidden_activation="silu"), "hidden_activation='silu'"),
    ("gemma3_text", dict(rope_parameters={"rope_theta": 1e4}), "rope_parameters has 'rope_theta'"),
    ("gemma3_text", dict(rope_parameters={"full_attention": YARN}), "attention_factor=1.13863"),
    ("gemma3_text", dict(rope_parameters={"sliding_attention": YARN}), "rope scaling 'yarn' of layers with a window"),
    ("gemma2", dict(sliding_window=None), "sliding_window=None"),
    ("gemma2", dict(layer_types=["full_attention"]), "layer_types is not a list"),
    ("qwen3_moe", dict(norm_topk_prob=False), "norm_topk_prob=False"),
    ("qwen3_moe", dict(mlp_only_layers=[1]), "mlp_only_layers=[1]"),
    ("qwen3_moe", dict(decoder_sparse_step=2), "decoder_sparse_step=2"),
    ("qwen3_moe", dict(num_experts_per_tok=1), "num_experts_per_tok=1"),
    ("phi", dict(qk_layernorm=True), "qk_layernorm=True"), ("phi", dict(hidden_act="relu"), "hidden_act='relu'"),
    ("phi", dict(partial_rotary_factor=1.5, rope_parameters=None), "partial_rotary_factor=1.5 turns 12"),
    ("gpt_neox", dict(attention_bias=False), "attention_bias=False"),
    ("gpt_neox", dict(rope_parameters=YARN | dict(partial_rotary_factor=0.5)), "attention_factor=1.13863"),
    ("smollm3", dict(no_rope_layers=[1]), "no_rope_layers is not a list"),
    ("smollm3", dict(no_rope_layers=[1, 2]), "no_rope_layers is not a list"),
    ("smollm3", dict(rope_parameters=YARN), "attention_factor=1.13863"),
    ("smollm3", dict(rope_parameters=YARN, no_rope_layers=None, no_rope_layer_interval=2), "attention_factor=1.13863"),
    ("stablelm", dict(qk_layernorm=True), "qk_layernorm=True"),
    ("granite", dict(logits_scaling=0), "has a setting of the wrong type"),
    ("olmo2", dict(clip_qkv=8.0), "clip_qkv=8.0"),
    ("olmo2", dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
    ("llama-attention_bias", dict(attention_bias=False, mlp_bias=True), "mlp_bias=True"),
    ("llama-yarn", dict(rope_parameters=YARN | dict(truncate=1)), "truncate=1"),
    ("gpt_oss", dict(attention_bias=False), "attention_bias=False"),
    ("gpt_oss", dict(swiglu_limit=0.5), "swiglu_limit=0.5"),
    ("gpt_oss", dict(swiglu_alpha=1.0), "swiglu_alpha=1.0"), ("gpt_oss", dict(mlp_bias=True), "mlp_bias=True"),
    ("gpt_oss", dict(experts_per_token=3), "experts_per_token=3"),
    ("gpt_oss", dict(num_experts_per_tok=1), "num_experts_per_tok=1"),
    ("llama-yarn", dict(rope_parameters=YARN | dict(mrope_section=[1])), "rope setting 'mrope_section'"),
], ids=str)
def test_what_is_refused(name, change, says):
    with pytest.raises(UserError) as caught:
        readers.model_config(settings(name) | change, "a.json")
    assert says in str(caught.value) and "a.json" in str(caught.value)


@pytest.mark.parametrize("family", sorted(readers.SETTINGS))
def test_unknown_settings(family):
    """Settings that other families have are refused by name, unless their value turns them off."""
    raws = [json.loads(path.read_text()) for path in (ROOT / "tests" / "fixtures").glob("*/*/config.json")]
    raw = next(raw for raw in raws if raw["model_type"] == family)
    for name, value in dict(clip_qkv=8.0, residual_scale=0.5, no_rope_layer=[1], scale_emb=12,
                            moe_layer_freq=2, attention_sinks=True).items():
        with pytest.raises(UserError, match=f"a.json: {name}="):
            readers.model_config(raw | {name: value}, "a.json")
        readers.model_config(raw | {name: None}, "a.json")


# As their authors published them, but for settings that every file has.
PUBLISHED = {
    "pythia-70m": (dict(model_type="gpt_neox", bos_token_id=0, eos_token_id=0, hidden_act="gelu", hidden_size=512,
                        initializer_range=0.02, intermediate_size=2048, layer_norm_eps=1e-5,
                        max_position_embeddings=2048, num_attention_heads=8, num_hidden_layers=6, rotary_emb_base=10000,
                        rotary_pct=0.25, tie_word_embeddings=False, torch_dtype="float16", use_cache=True,
                        use_parallel_residual=True, vocab_size=50304),
                   dict(rotary_dim=16, parallel=True, bias=True, norm="layer", mlp="gelu", tie=False)),
    "gemma-3-270m": (dict(model_type="gemma3_text", _sliding_window_pattern=6, attention_bias=False,
                          attn_logit_softcapping=None, final_logit_softcapping=None, head_dim=256,
                          hidden_activation="gelu_pytorch_tanh", hidden_size=640, intermediate_size=2048,
                          layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 3,
                          max_position_embeddings=32768, num_attention_heads=4, num_hidden_layers=18,
                          num_key_value_heads=1, pad_token_id=0, query_pre_attn_scalar=256, rms_norm_eps=1e-6,
                          rope_local_base_freq=10000.0, rope_scaling=None, rope_theta=1000000.0, sliding_window=512,
                          use_bidirectional_attention=False, vocab_size=262144),
                     dict(window_pattern="SSSSSL" * 3, sliding_window=512, window_theta=1e4, rope_theta=1e6, tie=True,
                          attn_scale=0.0, embed_scale=640**0.5, qk_norm=True, norm_place="both", mlp="geglu")),
    "gemma-3-1b": (dict(model_type="gemma3_text", cache_implementation="hybrid", head_dim=256,
                        hidden_activation="gelu_pytorch_tanh", hidden_size=1152, intermediate_size=6912,
                        max_position_embeddings=32768, num_attention_heads=4, num_hidden_layers=26,
                        num_key_value_heads=1, query_pre_attn_scalar=256, rms_norm_eps=1e-6,
                        rope_local_base_freq=10000, rope_scaling=None, rope_theta=1000000, sliding_window=512,
                        sliding_window_pattern=6, vocab_size=262144),
                   dict(window_pattern="SSSSSL" * 4 + "SS", window_theta=1e4)),
    "gemma-2-2b": (dict(model_type="gemma2", attn_logit_softcapping=50.0, cache_implementation="hybrid",
                        final_logit_softcapping=30.0, head_dim=256, hidden_act="gelu_pytorch_tanh",
                        hidden_activation="gelu_pytorch_tanh", hidden_size=2304, intermediate_size=9216,
                        max_position_embeddings=8192, num_attention_heads=8, num_hidden_layers=26,
                        num_key_value_heads=4, query_pre_attn_scalar=256, rms_norm_eps=1e-6, rope_theta=10000.0,
                        sliding_window=4096, vocab_size=256000),
                   dict(softcap=30.0, attn_softcap=50.0, window_pattern="SL" * 13, window_theta=0.0, qk_norm=False)),
    "gemma-2b": (dict(model_type="gemma", head_dim=256, hidden_act="gelu", hidden_activation=None, hidden_size=2048,
                      intermediate_size=16384, max_position_embeddings=8192, num_attention_heads=8,
                      num_hidden_layers=18, num_key_value_heads=1, rms_norm_eps=1e-6, rope_scaling=None,
                      rope_theta=10000.0, vocab_size=256000), dict(mlp="geglu", tie=True, norm_place="before")),
    "Qwen3-30B-A3B": (dict(model_type="qwen3_moe", attention_bias=False, decoder_sparse_step=1, head_dim=128,
                           hidden_act="silu", hidden_size=2048, intermediate_size=6144, max_position_embeddings=40960,
                           max_window_layers=48, mlp_only_layers=[], moe_intermediate_size=768, norm_topk_prob=True,
                           num_attention_heads=32, num_experts=128, num_experts_per_tok=8, num_hidden_layers=48,
                           num_key_value_heads=4, output_router_logits=False, rms_norm_eps=1e-6, rope_scaling=None,
                           rope_theta=1000000.0, router_aux_loss_coef=0.001, sliding_window=None,
                           tie_word_embeddings=False, use_sliding_window=False, vocab_size=151936),
                      dict(n_expert=128, expert_top_k=8, ffn_dim=768, qk_norm=True, sliding_window=0)),
    "phi-2": (dict(model_type="phi", attention_dropout=0.0, embd_pdrop=0.0, hidden_act="gelu_new", hidden_size=2560,
                   intermediate_size=10240, layer_norm_eps=1e-5, max_position_embeddings=2048, num_attention_heads=32,
                   num_hidden_layers=32, num_key_value_heads=32, partial_rotary_factor=0.4, qk_layernorm=False,
                   resid_pdrop=0.1, rope_scaling=None, rope_theta=10000.0, tie_word_embeddings=False, vocab_size=51200),
              dict(rotary_dim=32, parallel=True, head_bias=True, mlp="gelu_tanh")),
    "Phi-3-mini-4k": (dict(model_type="phi3", attention_bias=False, attention_dropout=0.0, embd_pdrop=0.0,
                           hidden_act="silu", hidden_size=3072, intermediate_size=8192, max_position_embeddings=4096,
                           num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32,
                           original_max_position_embeddings=4096, pad_token_id=32000, resid_pdrop=0.0,
                           rms_norm_eps=1e-5, rope_scaling=None, rope_theta=10000.0, sliding_window=2047,
                           tie_word_embeddings=False, vocab_size=32064, auto_map={"AutoConfig": "x"}),
                      dict(sliding_window=2047, window_pattern="S")),
    "OLMo-2-1B": (dict(model_type="olmo2", attention_bias=False, hidden_act="silu", hidden_size=2048,
                       intermediate_size=8192, max_position_embeddings=4096, num_attention_heads=16,
                       num_hidden_layers=16, num_key_value_heads=16, rms_norm_eps=1e-6, rope_scaling=None,
                       rope_theta=500000, tie_word_embeddings=False, vocab_size=100352),
                  dict(norm_place="after", qk_norm_width=True)),
    "SmolLM3-3B": (dict(model_type="smollm3", attention_bias=False, hidden_act="silu", hidden_size=2048,
                        intermediate_size=11008, layer_types=["full_attention"] * 36, max_position_embeddings=65536,
                        max_window_layers=28, mlp_bias=False, no_rope_layer_interval=4,
                        no_rope_layers=[1, 1, 1, 0] * 9, num_attention_heads=16, num_hidden_layers=36,
                        num_key_value_heads=4, pretraining_tp=2, rms_norm_eps=1e-6, rope_scaling=None,
                        rope_theta=5000000.0, sliding_window=None, use_sliding_window=False, vocab_size=128256),
                   dict(rope_pattern="RRRN" * 9, tie=True)),
    "stablelm-2-1_6b": (dict(model_type="stablelm", hidden_act="silu", hidden_size=2048, intermediate_size=5632,
                             layer_norm_eps=1e-5, max_position_embeddings=4096, num_attention_heads=32,
                             num_hidden_layers=24, num_key_value_heads=32, partial_rotary_factor=0.25,
                             qk_layernorm=False, rope_theta=10000, tie_word_embeddings=False,
                             use_parallel_residual=False, use_qkv_bias=True, vocab_size=100352),
                        dict(rotary_dim=16, norm="layer", norm_bias=True, qkv_bias=True)),
    "granite-3.1-2b": (dict(model_type="granite", attention_bias=False, attention_multiplier=0.015625,
                            embedding_multiplier=12.0, hidden_act="silu", hidden_size=2048, intermediate_size=8192,
                            logits_scaling=8.0, max_position_embeddings=131072, mlp_bias=False, num_attention_heads=32,
                            num_hidden_layers=40, num_key_value_heads=8, residual_multiplier=0.22, rms_norm_eps=1e-5,
                            rope_scaling=None, rope_theta=5000000.0, tie_word_embeddings=True, vocab_size=49155),
                       dict(attn_scale=0.015625, embed_scale=12.0, residual_scale=0.22, logit_scale=0.125)),
    "gpt-oss-20b": (dict(model_type="gpt_oss", attention_bias=True, experts_per_token=4, head_dim=64,
                         hidden_act="silu", hidden_size=2880, initial_context_length=4096, intermediate_size=2880,
                         layer_types=["sliding_attention", "full_attention"] * 12, max_position_embeddings=131072,
                         num_attention_heads=64, num_experts_per_tok=4, num_hidden_layers=24, num_key_value_heads=8,
                         num_local_experts=32, output_router_logits=False, pad_token_id=199999,
                         quantization_config=dict(quant_method="mxfp4", modules_to_not_convert=["lm_head"]),
                         rms_norm_eps=1e-5, rope_theta=150000, router_aux_loss_coef=0.9, sliding_window=128,
                         rope_scaling=dict(rope_type="yarn", beta_fast=32.0, beta_slow=1.0, factor=32.0, truncate=False,
                                           original_max_position_embeddings=4096), swiglu_limit=7.0,
                         tie_word_embeddings=False, vocab_size=201088),
                    dict(n_expert=32, expert_top_k=4, sliding_window=128, window_pattern="SL" * 12, mlp="swiglu_clip",
                         rope_scaling="yarn_untruncated", rope_factor=32.0, bias=True, sink_logits=True,
                         attn_scale=(0.1 * np.log(32) + 1) ** 2 / 8)),
    "Qwen2.5-128k": (dict(model_type="qwen2", hidden_act="silu", hidden_size=1536, intermediate_size=8960,
                          max_position_embeddings=32768, max_window_layers=28, num_attention_heads=12,
                          num_hidden_layers=28, num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=1000000.0,
                          rope_scaling={"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
                          sliding_window=131072, tie_word_embeddings=True, use_sliding_window=False, vocab_size=151936),
                     dict(rope_scaling="yarn", rope_factor=4.0, rope_low_freq=1.0, rope_high_freq=32.0,
                          rope_original=32768, attn_scale=(0.1 * np.log(4) + 1) ** 2 / 128**0.5)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name):
    """No setting of a well-known model is refused, and what is special in it is read."""
    raw, expected = PUBLISHED[name]
    usual = dict(architectures=["AnyForCausalLM"], initializer_range=0.02, torch_dtype="bfloat16", use_cache=True,
                 transformers_version="4.51.0", bos_token_id=1, eos_token_id=[2, 3])
    config = readers.model_config(usual | raw, "config.json")
    for setting, value in expected.items():
        assert getattr(config, setting) == (pytest.approx(value) if isinstance(value, float) else value), setting


# ---- beside peers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_beside_transformers_and_mlx_lm(name, tmp_path):
    """Logits, greedy tokens, cached logits; and the export, as transformers and mlx-lm read it."""
    peer("transformers")
    found = families.row(name, tmp_path)
    assert found["error"] < 3e-6 and found["cached"] < 3e-6 and found["tokens"] == 16
    assert found["export"] < 3e-6 and (found["mlx-lm"] is None or found["mlx-lm"] < 1e-5)


@pytest.mark.parametrize("name", ["gemma3_text", "gemma2", "phi3", "smollm3-windows", "llama-yarn", "gpt_neox",
                                  "gpt_oss"])
def test_far_beyond_the_window(name, tmp_path):
    """200 tokens, windows of 40: windows are computed in blocks, and the cache turns over."""
    peer("transformers")
    change = {"sliding_window": 40} if "sliding_window" in MODELS[name][1] else {}
    theirs, _ = make(name, tmp_path / "folder", max_position_embeddings=256, **change)
    model, logits = read(tmp_path / "folder", tmp_path / "a.safetensors"), logits_there(theirs, 200)
    assert model.config.sliding_window in (0, 40)
    assert error(logits_here(model, 200), logits) < 1e-5 and error(logits_cached(model, 200), logits) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_settings_that_are_left_out(name, tmp_path):
    """Where a setting is left out of config.json, it has the value that transformers takes, or the file is refused."""
    transformers = peer("transformers")
    make(name, tmp_path / "folder")
    raw = json.loads((tmp_path / "folder" / "config.json").read_text())
    kind = getattr(transformers, f"{MODELS[name][0]}Config")

    def ours(settings: dict):
        try:
            return readers.model_config(settings, "a.json")
        except UserError as error:
            return str(error)

    for key, default in readers.SETTINGS[raw["model_type"]].items():
        less = {other: value for other, value in raw.items() if other != key}
        if default is ...:
            assert f"a.json lacks '{key}'" in ours(less)
        elif key in raw:
            assert ours(less) == ours(json.loads(kind(**less).to_json_string(use_diff=False))), key


OURS = dict(block_size=64, vocab_size=64, n_layer=2, n_head=4, n_embd=32, ffn_dim=48, qk_norm=False)
TRAINED = {  # settings of models that are trained here, and the families into which they go
    "gpt_neox": dict(norm="layer", mlp="gelu", bias=True, parallel=True, rotary_dim=4, tie=False),
    "gpt2": dict(norm="layer", mlp="gelu_tanh", bias=True, pos="learned"),
    "gemma": dict(mlp="geglu", embed_scale=32**0.5, n_kv_head=2),
    "gemma2": dict(mlp="geglu", embed_scale=32**0.5, norm_place="both", attn_softcap=4.0, softcap=8.0),
    "gemma3_text": dict(mlp="geglu", embed_scale=32**0.5, norm_place="both", qk_norm=True, sliding_window=8,
                        window_pattern="SL", window_theta=100.0, attn_scale=0.25),
    "qwen3_moe": dict(mlp="swiglu", qk_norm=True, n_expert=4, expert_top_k=2),
    "mixtral": dict(mlp="swiglu", n_expert=4, expert_top_k=2, tie=False),
    "phi": dict(norm="layer", mlp="gelu_tanh", bias=True, parallel=True, head_bias=True, tie=False),
    "phi3": dict(mlp="swiglu", rotary_dim=4, sliding_window=8),
    "olmo2": dict(mlp="swiglu", norm_place="after", qk_norm=True, qk_norm_width=True),
    "smollm3": dict(mlp="swiglu", rope_pattern="RN", sliding_window=8, window_pattern="LS"),
    "stablelm": dict(norm="layer", norm_bias=True, mlp="swiglu", rotary_dim=2, n_kv_head=2),
    "granite": dict(mlp="swiglu", attn_scale=0.3, residual_scale=0.5, logit_scale=0.25, embed_scale=2.0, bias=True),
    "qwen2": dict(mlp="swiglu", qkv_bias=True, sliding_window=8, window_pattern="SL"),
    "qwen3": dict(mlp="swiglu", qk_norm=True, rope_scaling="yarn", rope_factor=2.0, rope_original=32, head_dim=16,
                  rope_high_freq=32.0),
    "llama": dict(mlp="swiglu", rope_scaling="linear", rope_factor=3.0, qkv_bias=True, out_bias=True),
    "mistral": dict(mlp="swiglu", sliding_window=8),
    "gpt_oss": dict(mlp="swiglu_clip", bias=True, n_expert=4, router_bias=True, sink_logits=True, n_kv_head=2),
}


def trained(family: str, folder) -> GPT:
    """A model with random weights, norms and biases, and its export."""
    model = GPT(GPTConfig(**OURS | TRAINED[family]))
    for i, (path, p) in enumerate(tree_flatten(model.parameters())):
        noise = 0.3 * mx.random.normal(p.shape, key=mx.random.key(i))
        model.load_weights([(path, p + noise)], strict=False)
    if family == "phi":
        for block in model.blocks:
            block.mlp_norm.update(block.attn_norm.parameters())
    save_checkpoint(str(folder / "ours.safetensors"), model, {})
    run_here("hf_reader.py", folder / "ours.safetensors", f"--export={folder / 'theirs'}")
    return model


@pytest.mark.parametrize("family", TRAINED)
def test_export_of_our_models(family, tmp_path):
    """Models of every family, made here: the export has the family's name, and gives the same logits when it is read
    again, here and by transformers."""
    model = trained(family, tmp_path)
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["model_type"] == family
    assert error(logits_here(read(tmp_path / "theirs", tmp_path / "again.safetensors")), logits_here(model)) < 3e-6


@pytest.mark.parametrize("family", TRAINED)
def test_export_of_our_models_in_transformers(family, tmp_path):
    peer("transformers")
    model = trained(family, tmp_path)
    assert error(logits_there(in_transformers(tmp_path / "theirs")), logits_here(model)) < 1e-5


@pytest.mark.parametrize("change, says", [
    (dict(mlp="geglu"), "embed_scale=1.0 has no counterpart in Gemma"),
    (dict(mlp="swiglu", attn_softcap=4.0), "attn_softcap=4.0 has no counterpart in Llama"),
    (dict(mlp="swiglu", norm_place="both"), "norm_place='both' has no counterpart in Llama"),
    (dict(mlp="swiglu", parallel=True), "parallel=True has no counterpart in Llama"),
    (dict(mlp="swiglu", rope_pattern="RN", norm_place="after"), "has no counterpart in OLMo-2"),
    (dict(mlp="swiglu", out_bias=True), "qkv_bias=False has no counterpart in Llama"),
    (dict(mlp="gelu", bias=True, norm="layer", qkv_bias=True, sliding_window=8), "sliding_window=8"),
    (dict(mlp="swiglu", head_dim=16, qkv_bias=True), "head_dim=16 has no counterpart in Qwen2"),
    (dict(mlp="geglu", norm_place="both", embed_scale=32**0.5, attn_scale=0.3), "attn_scale=0.3 has no counterpart"),
    (dict(mlp="swiglu", sliding_window=8, window_theta=100.0), "window_theta=100.0 has no counterpart in Mistral"),
], ids=str)
def test_what_no_family_has(change, says, tmp_path):
    save_checkpoint(str(tmp_path / "a.safetensors"), GPT(GPTConfig(**OURS | change)), {})
    with pytest.raises(UserError) as caught:
        run_here("hf_reader.py", tmp_path / "a.safetensors", f"--export={tmp_path / 'folder'}")
    assert says in str(caught.value) and not (tmp_path / "folder").exists()
