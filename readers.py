"""Models of other projects: reads Hugging Face folders tensor by tensor; knows the tensors' names and the settings of
the architectures in SETTINGS; writes checkpoints.

    source = open_folder("Llama-3.2-1B")
    config = model_config(source.raw, source.folder)
    write_checkpoint("llama.safetensors", config, read_model(config, source), *tokenizer_of(source))

Pickled weights (.bin, .pt) are refused, since unpickling runs whatever code they hold. No code of a folder is run.
"""
import json
import math
import os
import re
import reprlib
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, fields

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from config import UserError, check_output, check_replaced
from conversations import chat_entry, template_of
from draw import check_folder
from model import GPT, VERSION, Experts, GPTConfig, save_arrays
from packing import pack
from quantized import Factored, dense_weight, natural, replace_module
from tokenizer import EOT, Tokenizer, from_tokenizer_json, to_tokenizer_json

# ---- names -----------------------------------------------------------------------------------------------------------

# The names of modules in other projects, by their names here. "blocks." is what stands before the number of a layer. A
# matrix attn.qkv holds the rows of q, k and v, and mlp.gate_up those of gate and up; {} is the number of an expert.
LLAMA = {"blocks.": "model.layers.", "embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head",
         "attn_norm": "input_layernorm", "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj",
         "attn.v": "self_attn.v_proj", "attn.out": "self_attn.o_proj", "attn.q_norm": "self_attn.q_norm",
         "attn.k_norm": "self_attn.k_norm", "mlp_norm": "post_attention_layernorm", "mlp.gate": "mlp.gate_proj",
         "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj"}
MIXTRAL = LLAMA | {
    "mlp.router": "block_sparse_moe.gate", "mlp.gate": "block_sparse_moe.experts.{}.w1",
    "mlp.up": "block_sparse_moe.experts.{}.w3", "mlp.down": "block_sparse_moe.experts.{}.w2"}
QWEN3_MOE = LLAMA | {"mlp.router": "mlp.gate", "mlp.gate": "mlp.experts.{}.gate_proj",
                     "mlp.up": "mlp.experts.{}.up_proj", "mlp.down": "mlp.experts.{}.down_proj"}
MLX_GPT_OSS = LLAMA | {"attn.sink": "self_attn.sinks", "mlp.router": "mlp.router",  # as mlx-lm names them
                       "mlp.gate": "mlp.experts.gate_proj", "mlp.up": "mlp.experts.up_proj",
                       "mlp.down": "mlp.experts.down_proj"}
GPT_OSS = MLX_GPT_OSS | {"mlp.gate_up": "mlp.experts.gate_up_proj"}
OLMO2 = LLAMA | {"attn_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}
GEMMA2 = OLMO2 | {"mlp_norm": "pre_feedforward_layernorm"}
PHI3 = LLAMA | {"attn.qkv": "self_attn.qkv_proj", "mlp.gate_up": "mlp.gate_up_proj"}
PHI = LLAMA | {"norm": "model.final_layernorm", "mlp_norm": "input_layernorm",  # one norm for attention and MLP
               "attn.out": "self_attn.dense", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}
GPT_NEOX = {"blocks.": "gpt_neox.layers.", "embed": "gpt_neox.embed_in", "norm": "gpt_neox.final_layer_norm",
            "head": "embed_out", "attn_norm": "input_layernorm", "attn.qkv": "attention.query_key_value",
            "attn.out": "attention.dense", "mlp_norm": "post_attention_layernorm", "mlp.up": "mlp.dense_h_to_4h",
            "mlp.down": "mlp.dense_4h_to_h"}
GPT2 = {"blocks.": "transformer.h.", "embed": "transformer.wte", "pos_embed": "transformer.wpe",
        "norm": "transformer.ln_f", "head": "lm_head", "attn_norm": "ln_1", "attn.qkv": "attn.c_attn",
        "attn.out": "attn.c_proj", "mlp_norm": "ln_2", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
GGUF = {"blocks.": "blk.", "embed": "token_embd", "pos_embed": "position_embd", "norm": "output_norm",
        "head": "output", "attn_norm": "attn_norm", "attn.q": "attn_q", "attn.k": "attn_k", "attn.v": "attn_v",
        "attn.out": "attn_output", "attn.q_norm": "attn_q_norm", "attn.k_norm": "attn_k_norm",
        "attn_post_norm": "post_attention_norm", "mlp_norm": "ffn_norm", "mlp_post_norm": "post_ffw_norm",
        "mlp.gate": "ffn_gate", "mlp.up": "ffn_up", "mlp.down": "ffn_down", "mlp.router": "ffn_gate_inp",
        "attn.sink": "attn_sinks"}
NAMES = {"gpt2": GPT2, "gpt_neox": GPT_NEOX, "llama": LLAMA, "mistral": LLAMA, "mixtral": MIXTRAL, "qwen2": LLAMA,
         "qwen3": LLAMA, "qwen3_moe": QWEN3_MOE, "gemma": LLAMA, "gemma2": GEMMA2, "gemma3_text": GEMMA2, "phi": PHI,
         "phi3": PHI3, "olmo2": OLMO2, "smollm3": LLAMA, "stablelm": LLAMA, "granite": LLAMA,
         "gpt_oss": GPT_OSS}
FUSED = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "mlp.gate_up": ("mlp.gate", "mlp.up")}


def their_name(ours: str, names: dict[str, str]) -> str | None:
    """The name of a module in another project, by a dictionary such as LLAMA: blocks.3.attn.q ->
    model.layers.3.self_attn.q_proj. None if that project has no such module."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", ours)
    if not match:
        return names.get(ours)
    return f"{names['blocks.']}{match[1]}.{names[match[2]]}" if match[2] in names else None


# ---- settings --------------------------------------------------------------------------------------------------------


# The settings of config.json that are read or checked, by family, with the values that transformers takes where a file
# leaves them out; ... for those that must be there.
GPT2_SETTINGS = dict(
    vocab_size=..., n_positions=..., n_embd=..., n_layer=..., n_head=..., n_inner=None, activation_function="gelu_new",
    layer_norm_epsilon=1e-5, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, tie_word_embeddings=True,
    is_causal=True)
COMMON_SETTINGS = dict(
    vocab_size=..., hidden_size=..., intermediate_size=..., num_hidden_layers=..., num_attention_heads=...,
    max_position_embeddings=..., rope_theta=1e4, rope_scaling=None, rope_parameters=None, partial_rotary_factor=None,
    tie_word_embeddings=False, is_causal=True)
LAYER_NORM_SETTINGS = COMMON_SETTINGS | dict(num_key_value_heads=None, layer_norm_eps=1e-5, qk_layernorm=False)
LLAMA_SETTINGS = COMMON_SETTINGS | dict(
    num_key_value_heads=None, head_dim=None, hidden_act="silu", activation="swiglu", rms_norm_eps=...,
    attention_bias=False, mlp_bias=False, sliding_window=None, use_sliding_window=False, max_window_layers=28,
    layer_types=None)
QWEN_SETTINGS = LLAMA_SETTINGS | dict(num_key_value_heads=32, sliding_window=4096)
GEMMA_SETTINGS = LLAMA_SETTINGS | dict(
    num_key_value_heads=4, head_dim=256, hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh",
    tie_word_embeddings=True)
SETTINGS = {
    "gpt2": GPT2_SETTINGS,
    "gpt_neox": COMMON_SETTINGS | dict(
        layer_norm_eps=1e-5, hidden_act="gelu", attention_bias=True, rotary_pct=0.25, rotary_emb_base=1e4,
        use_parallel_residual=True),
    "llama": LLAMA_SETTINGS,
    "mistral": LLAMA_SETTINGS | dict(num_key_value_heads=8, sliding_window=4096),
    "mixtral": LLAMA_SETTINGS | dict(num_key_value_heads=8, rope_theta=1e6, num_experts_per_tok=2,
                                     num_local_experts=8),
    "qwen2": QWEN_SETTINGS,
    "qwen3": QWEN_SETTINGS | dict(head_dim=128),
    "qwen3_moe": QWEN_SETTINGS | dict(
        num_key_value_heads=4, intermediate_size=None, moe_intermediate_size=768, num_experts=None,
        num_local_experts=128, num_experts_per_tok=8, norm_topk_prob=False, decoder_sparse_step=1,
        mlp_only_layers=None),
    "gemma": GEMMA_SETTINGS | dict(num_key_value_heads=16),
    "gemma2": GEMMA_SETTINGS | dict(
        sliding_window=4096, query_pre_attn_scalar=256, attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
    "gemma3_text": GEMMA_SETTINGS | dict(
        sliding_window=4096, query_pre_attn_scalar=256, final_logit_softcapping=None, rope_theta=1e6,
        rope_local_base_freq=1e4, sliding_window_pattern=6),
    "phi": LAYER_NORM_SETTINGS | dict(hidden_act="gelu_new", partial_rotary_factor=0.5),
    "phi3": LLAMA_SETTINGS | dict(original_max_position_embeddings=4096),
    "olmo2": LLAMA_SETTINGS,
    "smollm3": LLAMA_SETTINGS | dict(num_key_value_heads=4, tie_word_embeddings=True, rope_theta=2e6,
                                     no_rope_layers=None, no_rope_layer_interval=4),
    "stablelm": LAYER_NORM_SETTINGS | dict(
        num_key_value_heads=32, hidden_act="silu", use_qkv_bias=False, use_parallel_residual=False,
        partial_rotary_factor=0.25),
    "granite": LLAMA_SETTINGS | dict(embedding_multiplier=1.0, attention_multiplier=1.0, residual_multiplier=1.0,
                                     logits_scaling=1.0),
    "gpt_oss": COMMON_SETTINGS | dict(
        num_key_value_heads=8, head_dim=64, hidden_act="silu", rms_norm_eps=1e-5, attention_bias=True,
        sliding_window=128, layer_types=None, num_local_experts=128, num_experts_per_tok=4, experts_per_token=None,
        swiglu_alpha=1.702, swiglu_limit=7.0, rope_theta=1.5e5, initial_context_length=None),
}
# Settings that no logit depends on, of: the file, tokens, training, outputs, other tasks, quantization, sampling.
WITHOUT_EFFECT = re.compile(r"""
    _.* | architectures | auto_map | is_llama_config | license | model_type | name_or_path | transformers\.js_config
    | unsloth_.* | .*_version | .*dtype
    | .*_token_ids? | tokenizer_class | prefix | n_ctx | seq_length | max_seq(uence)?_len(gth)? | model_max_length
    | .*dropout.* | .*_pdrop | gradient_checkpointing | initializer_range | neftune_noise_alpha | pretraining_tp
    | router_(aux_loss_coef|jitter_noise) | tf_legacy_loss
    | .*attn_implementation | cache_implementation | chunk_size_feed_forward | is_decoder | output_.*
    | reorder_and_upcast_attn | return_dict.* | torchscript | use_bfloat16 | use_cache | use_flash_.*
    | finetuning_task | id2label | label2id | num_labels | predict_special_tokens | problem_type | summary_.*
    | task_specific_params
    | quantization(_config)?
    | (begin_)?suppress_tokens | bad_words_ids | diversity_penalty | do_sample | early_stopping | exponential_decay_.*
    | (encoder_)?no_repeat_ngram_size | length_penalty | (max|min)_(new_tokens|length) | min_p | num_beam.*
    | num_return_sequences | remove_invalid_values | repetition_penalty | temperature | top_[kp] | typical_p
    """, re.X)
ROPE = {"rope_theta", "rope_type", "type", "factor", "low_freq_factor", "high_freq_factor",
        "original_max_position_embeddings", "partial_rotary_factor", "attention_factor", "beta_fast", "beta_slow",
        "mscale", "mscale_all_dim", "truncate"}
ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
GELUS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}
GEMMAS = ("gemma", "gemma2", "gemma3_text")
GPT_OSS_ROPE = dict(rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
                    original_max_position_embeddings=4096)  # where a file says nothing
LETTERS = {"full_attention": "L", "sliding_attention": "S"}
MOST_LAYERS = 1000


def model_config(raw: dict, where: str) -> GPTConfig:
    """The GPTConfig for the settings `raw` of a config.json, spelled as transformers 4 or 5 spells them. where: the
    file, for messages. UserError names a setting that GPT cannot follow."""
    family = raw.get("model_type")
    if isinstance(text := raw.get("text_config"), dict):
        raise UserError(f"{where}: architecture {family!r} is one for pictures and text, of which "
                        f"{text.get('model_type')!r} is a part: take a model of that architecture alone")
    if not isinstance(family, str) or family not in SETTINGS:
        raise UserError(f"{where}: architecture {family!r} is not one of {', '.join(SETTINGS)}")
    known = SETTINGS[family]
    check_spelling(raw, where, tuple(known))
    check_unknown(raw, tuple(known), WITHOUT_EFFECT, where)
    raw = {**{name: value for name, value in known.items() if value is not ...}, **raw}
    try:
        if raw["is_causal"] is not True:
            raise UserError(f"{where}: is_causal={raw['is_causal']!r} is not supported, only True")
        found = gpt2_settings(raw, where) if family == "gpt2" else {
            **common_settings(raw, where), **rope_settings(raw, where), **window_settings(raw, where),
            **OWN_SETTINGS[family](raw, where)}
        return checked(where, **found)
    except KeyError as error:
        raise UserError(f"{where} lacks {error}: it is no config.json of {family}") from error
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{where} has a setting of the wrong type ({error}): copy it again") from error


def require(raw: dict, where: str, **allowed: tuple):
    """UserError for a setting whose value is not one of those allowed."""
    for name, values in allowed.items():
        if raw[name] not in values:
            raise UserError(f"{where}: {name}={raw[name]!r} is not supported, only {' or '.join(map(repr, values))}")


def common_settings(raw: dict, where: str) -> dict:
    """The settings that all families but GPT-2 have."""
    return dict(
        block_size=raw["max_position_embeddings"], vocab_size=raw["vocab_size"], n_layer=raw["num_hidden_layers"],
        n_head=raw["num_attention_heads"], n_kv_head=raw.get("num_key_value_heads") or 0, n_embd=raw["hidden_size"],
        head_dim=raw.get("head_dim") or 0, ffn_dim=raw["intermediate_size"], qk_norm=False,
        tie=raw["tie_word_embeddings"])


def gpt2_settings(raw: dict, where: str) -> dict:
    require(raw, where, scale_attn_weights=(True,), scale_attn_by_inverse_layer_idx=(False,),
            activation_function=tuple(GELUS))
    return dict(
        block_size=raw["n_positions"], vocab_size=raw["vocab_size"], n_layer=raw["n_layer"], n_head=raw["n_head"],
        n_embd=raw["n_embd"], ffn_dim=raw["n_inner"] or 0, pos="learned", norm="layer",
        norm_eps=raw["layer_norm_epsilon"], mlp=GELUS[raw["activation_function"]], bias=True, qk_norm=False,
        tie=raw["tie_word_embeddings"])


def gpt_neox_settings(raw: dict, where: str) -> dict:
    require(raw, where, hidden_act=tuple(GELUS), attention_bias=(True,))
    return dict(norm="layer", norm_eps=raw["layer_norm_eps"], mlp=GELUS[raw["hidden_act"]], bias=True,
                parallel=raw["use_parallel_residual"])


def llama_settings(raw: dict, where: str) -> dict:
    """Those of llama, mistral, qwen2, qwen3, phi3, and with further ones of other families."""
    require(raw, where, hidden_act=("silu",), activation=("swiglu",))  # the second is Falcon 3's
    return dict(mlp="swiglu", norm_eps=raw["rms_norm_eps"], **bias_settings(raw, where),
                qk_norm=raw["model_type"].startswith("qwen3"))


def bias_settings(raw: dict, where: str) -> dict:
    """Biases of linear layers. Qwen2 has them in q, k and v; others, where attention_bias says so, also in the output
    projection; with mlp_bias all linear layers have one."""
    require(raw, where, attention_bias=(False, True), mlp_bias=(False, True) if raw["attention_bias"] else (False,))
    if raw["mlp_bias"]:
        return dict(bias=True)
    return dict(qkv_bias=raw["attention_bias"] or raw["model_type"] == "qwen2", out_bias=raw["attention_bias"])


def mixtral_settings(raw: dict, where: str) -> dict:
    return dict(llama_settings(raw, where), **expert_settings(raw["num_local_experts"], raw, where))


def qwen3_moe_settings(raw: dict, where: str) -> dict:
    require(raw, where, norm_topk_prob=(True,), decoder_sparse_step=(1,), mlp_only_layers=(None, []))
    n_expert = raw["num_experts"] or raw["num_local_experts"]  # transformers 5 has the second
    return dict(llama_settings(raw, where), **expert_settings(n_expert, raw, where),
                ffn_dim=raw["moe_intermediate_size"])


def expert_settings(n_expert: int, raw: dict, where: str) -> dict:
    """The gates of a token's experts sum to 1 there. GPT has another rule for a single expert."""
    if raw["num_experts_per_tok"] == 1:
        raise UserError(f"{where}: num_experts_per_tok=1 is not supported, only 2 or more")
    return dict(n_expert=n_expert, expert_top_k=raw["num_experts_per_tok"], expert_balance="none")


def gemma_settings(raw: dict, where: str) -> dict:
    """Those of Gemma 1, 2 and 3. Gemma 1's files say "gelu" and mean its approximation by a tanh."""
    require(raw, where, hidden_act=("gelu_pytorch_tanh", "gelu"), hidden_activation=("gelu_pytorch_tanh", None))
    found = dict(mlp="geglu", norm_eps=raw["rms_norm_eps"], embed_scale=raw["hidden_size"] ** 0.5,
                 **bias_settings(raw, where), qk_norm=raw["model_type"] == "gemma3_text")
    if raw["model_type"] == "gemma":
        return found
    return dict(found, norm_place="both", softcap=raw["final_logit_softcapping"] or 0.0,
                attn_softcap=raw.get("attn_logit_softcapping") or 0.0)


def phi_settings(raw: dict, where: str) -> dict:
    require(raw, where, hidden_act=tuple(GELUS), qk_layernorm=(False,))
    return dict(norm="layer", norm_eps=raw["layer_norm_eps"], mlp=GELUS[raw["hidden_act"]], bias=True, parallel=True,
                head_bias=True)


def olmo2_settings(raw: dict, where: str) -> dict:
    return dict(llama_settings(raw, where), norm_place="after", qk_norm=True, qk_norm_width=True)


def smollm3_settings(raw: dict, where: str) -> dict:
    return dict(llama_settings(raw, where), rope_pattern=rope_letters(raw, where))


def rope_letters(raw: dict, where: str) -> str:
    """rope_pattern for SmolLM3's no_rope_layers, in which 1 stands for a layer with rotary positions."""
    n_layer, each = min(raw["num_hidden_layers"], MOST_LAYERS), raw["no_rope_layer_interval"]
    flags = raw["no_rope_layers"] or [int((i + 1) % each != 0) for i in range(n_layer)]
    if len(flags) < n_layer or set(flags) - {0, 1}:
        raise UserError(f"{where}: no_rope_layers is not a list of 0 and 1, one for each layer")
    return "".join("NR"[flag] for flag in flags[:n_layer]) if 0 in flags[:n_layer] else "R"


def stablelm_settings(raw: dict, where: str) -> dict:
    require(raw, where, hidden_act=("silu",), qk_layernorm=(False,))
    return dict(norm="layer", norm_bias=True, norm_eps=raw["layer_norm_eps"], mlp="swiglu",
                qkv_bias=raw["use_qkv_bias"], parallel=raw["use_parallel_residual"])


def granite_settings(raw: dict, where: str) -> dict:
    return dict(llama_settings(raw, where), embed_scale=raw["embedding_multiplier"],
                residual_scale=raw["residual_multiplier"], logit_scale=1 / raw["logits_scaling"])


def gpt_oss_settings(raw: dict, where: str) -> dict:
    require(raw, where, hidden_act=("silu",), attention_bias=(True,), swiglu_alpha=(1.702,), swiglu_limit=(7.0,),
            experts_per_token=(None, raw["num_experts_per_tok"]))
    return dict(expert_settings(raw["num_local_experts"], raw, where), mlp="swiglu_clip", norm_eps=raw["rms_norm_eps"],
                bias=True, router_bias=True, sink_logits=True)


OWN_SETTINGS = {"gpt_neox": gpt_neox_settings, "llama": llama_settings, "mistral": llama_settings,
                "mixtral": mixtral_settings, "qwen2": llama_settings, "qwen3": llama_settings,
                "qwen3_moe": qwen3_moe_settings, "gemma": gemma_settings, "gemma2": gemma_settings,
                "gemma3_text": gemma_settings, "phi": phi_settings, "phi3": llama_settings, "olmo2": olmo2_settings,
                "smollm3": smollm3_settings, "stablelm": stablelm_settings, "granite": granite_settings,
                "gpt_oss": gpt_oss_settings}


def check_spelling(raw: Iterable[str], where: str, names: Sequence[str]):
    """UserError for a name that differs in one letter from one of `names`: the reader would not find the setting and
    would take its default value."""
    for found in raw:
        for name in names:
            if len(found) == len(name) and sum(map(str.__ne__, found, name)) == 1 and found not in names:
                raise UserError(f"{where} has a setting {found!r}, which should be {name!r}: copy it again")


def check_unknown(settings: dict, known: Sequence[str], without_effect: re.Pattern, where: str):
    """UserError names a setting that is neither in `known` nor matched by without_effect: it may change the logits. It
    passes if its value turns it off: false, 0, null, "none", an empty list, or 1 for a factor."""
    for name, value in settings.items():
        off = not value or value == "none" or (
            value == 1 and value is not True and re.search("factor|multiplier|pct|scal", name))
        if not off and name not in known and not without_effect.fullmatch(name):
            raise UserError(f"{where}: {name}={reprlib.repr(value)} is not a setting that is known here; if no logit "
                            "depends on it, remove it from the file")


def checked(where: str, **settings) -> GPTConfig:
    """A GPTConfig of these settings. UserError if one has the wrong type or is too large for any model, as in a damaged
    file."""
    try:
        config = GPTConfig(**settings)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    for field in fields(config):
        value = getattr(config, field.name)
        if field.type is float and type(value) is int:
            value = float(value)
            setattr(config, field.name, value)
        fits = type(value) is field.type
        if fits and field.type in (int, float) and value != field.default:
            most = {"n_layer": MOST_LAYERS, "norm_eps": 1}.get(field.name, 2**31)
            fits = 0 <= value < most and (value > 0 or field.type is int)
        if not fits:
            raise UserError(f"{where}: {field.name}={value!r} is no value for a model: copy the file again")
    if config.n_head * config.head_dim >= 2**31:
        raise UserError(f"{where}: no model can have {config.n_head} heads of {config.head_dim}: copy the file again")
    return config


def head_width(raw: dict) -> int:
    return raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]


def rope_settings(raw: dict, where: str) -> dict:
    """The settings of rotary positions and of the attention's scale for a config.json."""
    family, found, rope = raw["model_type"], {}, raw["rope_parameters"] or {}
    if family == "gemma3_text":  # one set of settings for each kind of layer
        if rope.keys() - LETTERS.keys():
            raise UserError(f"{where}: rope_parameters has {min(rope)!r} beside {' and '.join(LETTERS)}")
        windowed, rope = rope.get("sliding_attention") or {}, rope.get("full_attention") or {}
        if windowed.get("rope_type", "default") != "default":
            raise UserError(f"{where}: rope scaling {windowed['rope_type']!r} of layers with a window is not supported")
        if "S" in window_letters(raw, where):
            found["window_theta"] = windowed.get("rope_theta", raw["rope_local_base_freq"])
    rope = {**(raw["rope_scaling"] or {}), **rope} or (GPT_OSS_ROPE if family == "gpt_oss" else {})
    plain = not rope.keys() - {"rope_theta", "partial_rotary_factor"}
    kind = "default" if plain else rope.get("rope_type", rope.get("type"))
    kinds = ("default",) if family == "phi3" else ROPE_KINDS
    if kind not in kinds:
        raise UserError(f"{where}: rope scaling {kind!r} is not supported, only {' or '.join(map(repr, kinds))}")
    if unknown := rope.keys() - ROPE:
        raise UserError(f"{where}: rope setting {min(unknown)!r} is not supported")
    found["rope_theta"] = rope.get("rope_theta", raw.get("rotary_emb_base", raw["rope_theta"]))
    original = rope.get("original_max_position_embeddings", raw["max_position_embeddings"])
    boost = 1.0  # factor of turned queries and keys
    if kind == "llama3":
        found |= dict(rope_factor=rope["factor"], rope_low_freq=rope["low_freq_factor"],
                      rope_high_freq=rope["high_freq_factor"], rope_original=original)
    elif kind == "linear":
        found |= dict(rope_scaling="linear", rope_factor=rope["factor"])
    elif kind == "yarn":
        if type(truncate := rope.get("truncate", True)) is not bool:
            raise UserError(f"{where}: truncate={truncate!r} of rope scaling yarn is not supported, only True or False")
        factor = rope["factor"] or raw["max_position_embeddings"] / original
        found |= dict(rope_scaling="yarn" if truncate else "yarn_untruncated", rope_factor=factor,
                      rope_low_freq=rope.get("beta_slow") or 1.0, rope_high_freq=rope.get("beta_fast") or 32.0,
                      rope_original=original)
        boost = yarn_boost(factor, rope)
    elif kind == "dynamic":
        print("rope scaling dynamic begins beyond max_position_embeddings, at which the context ends here: no effect")
    found |= rotary_dim(raw, rope, where)
    some = family == "smollm3" and "N" in rope_letters(raw, where)
    if boost != 1 and ("rotary_dim" in found or "window_theta" in found or some):
        raise UserError(f"{where}: attention_factor={boost:g} of rope scaling yarn is not supported where not all "
                        "numbers of all layers are turned")
    return found | attention_scale(raw, boost)


def yarn_boost(factor: float, rope: dict) -> float:
    """The factor by which YaRN (Peng et al. 2023, equation 22) multiplies turned queries and keys."""
    def grown(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return grown(rope["mscale"]) / grown(rope["mscale_all_dim"])
    return grown(1)


def rotary_dim(raw: dict, rope: dict, where: str) -> dict:
    """How many numbers of a head are turned. Most families turn all of them."""
    name = "rotary_pct" if raw["model_type"] == "gpt_neox" else "partial_rotary_factor"
    share = rope.get("partial_rotary_factor", raw[name])
    if raw["model_type"] not in ("gpt_neox", "phi", "phi3", "stablelm") and share not in (None, 1):
        raise UserError(f"{where}: {name}={share!r} is not supported, only 1")
    width, turned = head_width(raw), int(head_width(raw) * (1 if share is None else share))
    if not 0 < turned <= width:
        raise UserError(f"{where}: {name}={share!r} turns {turned} of a head's {width} numbers, which is not supported")
    return {} if turned == width else {"rotary_dim": turned}


def attention_scale(raw: dict, boost: float) -> dict:
    """attn_scale, the factor of the scores, with boost^2, since boost multiplies queries and keys."""
    scale, usual = head_width(raw) ** -0.5, head_width(raw) ** -0.5
    if raw["model_type"] == "granite":
        scale = raw["attention_multiplier"]
    if raw["model_type"] in ("gemma2", "gemma3_text"):
        scale = raw["query_pre_attn_scalar"] ** -0.5
    return {} if scale * boost**2 == usual else {"attn_scale": scale * boost**2}


def window_letters(raw: dict, where: str) -> str:
    """One letter a layer, S or L, for a config.json; "" for a family or a model without windows."""
    family, window = raw["model_type"], raw.get("sliding_window")
    n_layer, kinds = min(raw["num_hidden_layers"], MOST_LAYERS), raw.get("layer_types")
    if family in ("qwen2", "qwen3", "qwen3_moe", "smollm3") and not raw["use_sliding_window"]:
        return ""
    if family in ("llama", "gemma", "olmo2", "granite", "gpt_neox", "phi", "stablelm") or (
            window is None and family not in GEMMAS):
        return ""
    if not kinds:
        first = raw["max_window_layers"] if family in ("qwen2", "qwen3") else 0
        letters = ["L" if i < first else "S" for i in range(n_layer)]
        if family in ("gemma2", "gpt_oss"):
            letters = ["LS"[(i + 1) % 2] for i in range(n_layer)]
        if family == "gemma3_text":
            letters = ["S" if (i + 1) % raw["sliding_window_pattern"] else "L" for i in range(n_layer)]
        if family == "smollm3":
            letters = ["S" if letter == "N" else "L" for letter in (rope_letters(raw, where) * n_layer)[:n_layer]]
        return "".join(letters)
    if len(kinds) != n_layer or set(kinds) - LETTERS.keys():
        raise UserError(f"{where}: layer_types is not a list of {' and '.join(LETTERS)}, one for each layer")
    return "".join(LETTERS[kind] for kind in kinds)


def window_settings(raw: dict, where: str) -> dict:
    """sliding_window and window_pattern for a config.json; {} if no layer has a window."""
    letters = window_letters(raw, where)
    if "S" not in letters:
        return {}
    return {"sliding_window": raw["sliding_window"], "window_pattern": letters if "L" in letters else "S"}


# ---- export ----------------------------------------------------------------------------------------------------------

# Settings of GPTConfig that every family has, with any value; and those of rotary positions.
SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "ffn_dim", "norm_eps", "tie")
ROPE_SETTINGS = ("rope_theta", "rope_factor", "rope_low_freq", "rope_high_freq", "rope_original")
# A setting on the left has no effect while the one on the right has its default value.
PART_OF = {"rope_scaling": "rope_factor", "window_pattern": "sliding_window", "window_theta": "sliding_window",
           "diff_attn_version": "diff_attn", "expert_top_k": "n_expert", "expert_balance": "n_expert",
           "router_bias": "n_expert", "mod_capacity": "mod", "mod_every": "mod"}


TITLES = {"gpt2": "GPT-2", "gpt_neox": "GPT-NeoX", "qwen3_moe": "Qwen3-MoE", "gemma2": "Gemma 2", "phi": "Phi-2",
          "gemma3_text": "Gemma 3", "phi3": "Phi-3", "olmo2": "OLMo-2", "smollm3": "SmolLM3", "stablelm": "StableLM",
          "gpt_oss": "GPT-OSS"}


def title_of(family: str) -> str:
    return TITLES.get(family, family.capitalize())


def family_of(config: GPTConfig) -> str:
    """The family, by its name in config.json, that has what is special in a model. If it lacks something else, no other
    family has both."""
    if config.pos == "learned":
        return "gpt2"
    if config.mlp == "swiglu_clip":
        return "gpt_oss"
    if config.mlp == "geglu":
        return "gemma" if config.norm_place == "before" else "gemma3_text" if config.qk_norm else "gemma2"
    if config.norm == "layer" and (config.bias or config.norm_bias):
        return "stablelm" if config.norm_bias else "phi" if config.head_bias else "gpt_neox"
    if config.n_expert:
        return "qwen3_moe" if config.qk_norm else "mixtral"
    if config.norm_place == "after":
        return "olmo2"
    if "N" in config.rope_pattern:
        return "smollm3"
    if config.rotary_dim:
        return "phi3"
    if (config.embed_scale, config.residual_scale, config.logit_scale) != (1, 1, 1) or (
            config.attn_scale and not config.rope_scaling.startswith("yarn")):
        return "granite"
    if config.qk_norm:
        return "qwen3"
    if config.qkv_bias and not config.out_bias:
        return "qwen2"
    return "mistral" if config.sliding_window else "llama"


def check_export(config: GPTConfig, family: str, limited: dict[str, tuple], free: Sequence[str]):
    """UserError names a setting that a family of models does not have. limited: settings of which the family has some
    values, and these values; free: settings of which it has every value. All other settings must have the value that
    GPTConfig gives them by default, so that a setting which is new to GPTConfig is not lost in silence."""
    plain = type(config)(**{name: getattr(config, name) for name in (*limited, *free)})
    default, others = {field.name: field.default for field in fields(config)}, {}
    for name, value in reversed(asdict(plain).items()):  # the last first: a variant may set fields above its own
        switch = PART_OF.get(name)
        if name not in limited and name not in free and not (switch and getattr(config, switch) == default[switch]):
            others[name] = (value,)
    for name, values in (others | limited).items():
        if getattr(config, name) not in values:
            raise UserError(f"{name}={getattr(config, name)!r} has no counterpart in {family}, which has "
                            f"{' or '.join(map(repr, values))}: the model cannot be exported")


def multiply_factors(model: GPT):
    """Replace each low-rank layer by the product of its two factors: other projects have no low-rank layers."""
    for path, layer in model.named_modules():
        if isinstance(layer, Factored):
            linear, dtype = nn.Linear(1, 1, bias=False), layer.u.get("scales", layer.u.weight).dtype
            linear.weight = (dense_weight(layer.u) @ dense_weight(layer.v)).astype(dtype)
            if "bias" in layer.u:
                linear.bias = layer.u.bias
            replace_module(model, path, linear)


# ---- folders ---------------------------------------------------------------------------------------------------------


class Folder:
    """A Hugging Face folder. raw: the settings of its config.json; names: of its tensors; folder[name]: an array, which
    is read when it is asked for."""

    def __init__(self, folder: str):
        self.folder, self.raw, self.files, self.open = folder, read_json(folder, "config.json"), {}, {}
        self.used = set()  # names of tensors that were read
        found = sorted(os.listdir(folder))
        index = next((name for name in found if name.endswith(".safetensors.index.json")), None)
        shards = [name for name in found if name.endswith(".safetensors")]
        pickled = [name for name in found if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        if not shards and pickled:
            raise UserError(f"{os.path.join(folder, pickled[0])} is a pickle, which can run code when it is read: take "
                            "the model's safetensors files, or convert it where you trust it")
        if index:
            shards = read_json(folder, index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
                raise UserError(f"{os.path.join(folder, index)} has no weight_map of file names: copy it again")
            shards = sorted(set(shards.values()))
        if not shards:
            raise UserError(f"{folder} holds no .safetensors file: copy the whole model")
        for shard in shards:
            path = os.path.join(folder, os.path.basename(shard))
            if not os.path.exists(path):
                raise UserError(f"{path} is missing, though {index} names it: copy the whole model")
            try:
                with safe_open(path, "numpy") as file:  # checks the header against the file's length
                    self.files.update(dict.fromkeys(file.keys(), path))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} is not a whole safetensors file ({error}): copy it again") from error
        self.names = set(self.files)
        names = NAMES.get(self.raw.get("model_type"), LLAMA) if isinstance(self.raw.get("model_type"), str) else LLAMA
        self.prefix = names["embed"].partition(".")[0] + "."  # which some files leave out

    def file_of(self, name: str) -> str:
        for found in (name, name.removeprefix(self.prefix)):
            if found in self.files:
                return self.files[found]
        raise UserError(f"{self.folder} holds no tensor {name}: the files do not fit config.json; copy them again")

    def place(self, module: str, part: str) -> str:
        """The file and the name of a tensor, part (weight, bias) of a module, for messages."""
        for name in (f"{module}.{part}", f"{module}.{part}".removeprefix(self.prefix), f"{module}.qweight"):
            if name in self.files:
                return f"{self.files[name]}: {name}"
        return f"{self.folder}: {module}.{part}"

    def __getitem__(self, name: str) -> mx.array:
        """The tensor of this name, read from its file. The folder keeps no copy of it."""
        path = self.file_of(name)
        name = name if name in self.files else name.removeprefix(self.prefix)
        self.used.add(name)
        try:
            if name not in self.open.get(path, {}):
                with open(path, "rb") as file:  # MLX opens a name beyond ASCII only where the locale is UTF-8
                    place = path if path.isascii() else f"/dev/fd/{file.fileno()}"
                    self.open[path] = mx.load(place, format="safetensors")  # lazy: MLX reads an evaluated array only
            found = self.open[path].pop(name)
            mx.eval(found)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise UserError(f"{path}: tensor {name} cannot be read ({error}): copy the file again") from error
        return found


def open_folder(folder: str) -> Folder:
    """UserError if it is not a folder, or not a whole one."""
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is not a folder: give the one that holds config.json and the .safetensors files")
    return Folder(folder)


def read_json(folder: str, name: str) -> dict:
    """The object in a JSON file of a folder. UserError if there is none."""
    path = os.path.join(folder, name)
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: copy the whole model") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): copy it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object of settings: copy it again")
    return found


def dense_linear(source: Folder, name: str) -> dict[str, mx.array]:
    """The weight (out, in), and the bias (out,) if there is one, of a module, by its name in the folder; of one that
    MLX quantized also scales and biases. GPT-2's matrices are stored transposed, and so are GPT-OSS's experts."""
    if f"{name}_bias" in source.names:
        return gpt_oss_experts(source, name)
    found = {part: source[f"{name}.{part}"] for part in ("weight", "scales", "biases")
             if part == "weight" or f"{name}.{part}" in source.names}
    if "scales" in found and "biases" not in found:
        found = from_mxfp4(found, source.place(name, "weight"))
    if name.startswith(GPT2["blocks."]):
        found["weight"] = found["weight"].T
    if f"{name}.bias" in source.names or f"{name.removeprefix(source.prefix)}.bias" in source.names:
        found["bias"] = source[f"{name}.bias"]
    return found


def gpt_oss_experts(source: Folder, name: str) -> dict[str, mx.array]:
    """dense_linear() of all experts (E, out, in), as transformers stores them: (E, in, out); or in MXFP4, as (E, out,
    groups, 16) bytes of two numbers each, the first one in the low bits, and (E, out, groups) exponents."""
    found = {"bias": source[f"{name}_bias"]}
    if name in source.names:
        weight = source[name]
        if weight.ndim != 3:
            raise UserError(f"{source.file_of(name)}: {name} has shape {weight.shape}, but it is one matrix for each "
                            "expert: copy the folder again")
        return found | {"weight": weight.swapaxes(1, 2)}
    place = f"{source.file_of(f'{name}_blocks')}: {name}_blocks"
    blocks, exponents = source[f"{name}_blocks"], source[f"{name}_scales"]
    if blocks.dtype != mx.uint8 or blocks.ndim != 4 or blocks.shape != (*exponents.shape, 16):
        raise UserError(f"{place} has shape {blocks.shape}, which does not fit {exponents.shape} of {name}_scales in "
                        "MXFP4: copy the folder again")
    words = blocks.flatten(-2).view(mx.uint32)
    each = [from_mxfp4({"weight": words[i], "scales": exponents[i]}, place) for i in range(len(words))]
    return found | {part: mx.stack([expert.pop(part) for expert in each]) for part in ("weight", "scales", "biases")}


MXFP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12])  # twice the numbers of 4 bits without the sign, which is the last bit


def from_mxfp4(found: dict[str, mx.array], place: str) -> dict[str, mx.array]:
    """A weight in MXFP4 (Rouhani et al. 2023), 4 bits for each of the numbers 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their
    negatives, times a power of two for each group of 32, in MLX's affine format. They are multiples of 0.5 from -6 to
    6: integers of 5 bits hold them exactly."""
    words, exponents = (np.array(found[part]) for part in ("weight", "scales"))
    if words.dtype != np.uint32 or exponents.dtype != np.uint8 or words.shape[-1] != 4 * exponents.shape[-1]:
        raise UserError(f"{place} is packed without biases, but not as MXFP4: it cannot be read")
    q = (words[..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15).reshape(*words.shape[:-1], -1)
    q = 12 + np.where(q & 8, -1, 1) * MXFP4[q & 7]
    scales = mx.array(np.ldexp(np.float32(0.5), exponents.astype(np.int32) - 127))
    return {"weight": pack(mx.array(q), 5), "scales": scales.astype(mx.bfloat16),
            "biases": (-12 * scales).astype(mx.bfloat16)}


def packed_parts(source: Folder, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """qweight (int32), qzeros (int32) and scales (float32) of a layer that AWQ or GPTQ packed."""
    found = [source[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")]
    kinds = [array.dtype for array in found]
    if any(array.ndim != 2 for array in found) or kinds[:2] != [mx.int32] * 2 or kinds[2] not in NOT_FINITE:
        raise UserError(f"{source.place(name, 'qweight')}, qzeros and scales are not matrices of int32 and floats")
    return np.array(found[0]), np.array(found[1]), np.array(found[2].astype(mx.float32))


def quantization(source: Folder, method: str, names: Sequence[str]) -> dict:
    """The settings by which `method`, awq or gptq, packed a folder's model. They stand in config.json, or, in older
    folders, in a file beside it. names: of the settings that the caller reads."""
    where, found = os.path.join(source.folder, "config.json"), source.raw.get("quantization_config")
    for older in ("quantize_config.json", "quant_config.json"):  # AutoGPTQ's, AutoAWQ's
        if not found and os.path.exists(os.path.join(source.folder, older)):
            found = read_json(source.folder, older)
    if not found or not isinstance(found, dict):
        raise UserError(f"{where} has no quantization_config: the model is not quantized; read it with hf_reader.py")
    check_spelling(found, where, ("quant_method", *names))
    if found.get("quant_method", method) != method:
        raise UserError(f"{where}: quant_method is {found['quant_method']!r}, not {method}: take another reader")
    return found


def packed_linear(words: np.ndarray, zeros: np.ndarray, scales: np.ndarray, bits: int, scale_dtype: str = "float32",
                  dense: bool = False) -> dict[str, mx.array]:
    """Weight, scales and biases, in MLX's format, of a quantized layer w = (q - zero) scale: words (out, in bits / 32)
    of integers q, zeros and scales (out, groups). A group is a multiple of 32 wide; where MLX does not have its width,
    it becomes several groups. dense: only the weight, unpacked to float16."""
    inputs, scales = words.shape[1] * 32 // bits, scales.astype(np.float32)
    biases, width = -scales * zeros, inputs // scales.shape[1]
    if width not in (32, 64, 128):
        narrow = next(narrow for narrow in (128, 64, 32) if width % narrow == 0)
        scales, biases = (np.repeat(x, width // narrow, axis=1) for x in (scales, biases))
    weight, scales, biases = mx.array(words), mx.array(scales), mx.array(biases)
    if dense:
        return {"weight": mx.dequantize(weight, scales, biases, inputs // scales.shape[1], bits).astype(mx.float16)}
    dtype = getattr(mx, scale_dtype)
    return {"weight": weight, "scales": scales.astype(dtype), "biases": biases.astype(dtype)}


def names_of(family: str, config: GPTConfig) -> dict[str, str]:
    """The names of a family's modules, by ours. A StableLM that is parallel has one norm for attention and MLP."""
    one_norm = {"mlp_norm": "input_layernorm"} if family == "stablelm" and config.parallel else {}
    return NAMES[family] | one_norm


def read_model(config: GPTConfig, source: Folder,
               linear: Callable[[Folder, str], dict[str, mx.array]] = dense_linear) -> Iterator:
    """All arrays of a GPT, one at a time: the name in the checkpoint, the array, and the file and the name it was read
    from. linear(source, name in the folder) reads a linear layer: its weight, and its bias if there is one; of a
    quantized layer also scales, biases and `order` (see quantized.py)."""
    family = source.raw.get("model_type")
    names = names_of(family, config)
    if f"{their_name('blocks.0.mlp.gate', MLX_GPT_OSS)}.weight" in source.names:  # a folder of mlx-lm
        names = MLX_GPT_OSS
    for path, module in skeleton(config).items():
        theirs, (layer, _, inner) = their_name(path, names), path.removeprefix("blocks.").partition(".")
        fused = next((name for name in FUSED if name in names and inner in FUSED[name]), None)
        if fused and inner != FUSED[fused][0]:
            continue  # it came with the first one
        if fused:
            theirs = their_name(f"blocks.{layer}.{fused}", names)
            for part, array in linear(source, theirs).items():
                pieces = split(config, family, fused, array, source.place(theirs, part)) if part != "order" else [
                    array] * len(FUSED[fused])
                for name, piece in zip(FUSED[fused], pieces, strict=True):
                    if part != "bias" or "bias" in module or array.any().item():
                        yield f"blocks.{layer}.{name}.{part}", mx.contiguous(piece), source.place(theirs, part)
        elif theirs and f"{stacked(theirs)}.weight" in source.names:
            for part, array in linear(source, stacked(theirs)).items():
                yield f"{path}.{part}", array, source.place(stacked(theirs), part)
        elif theirs and "{}" in theirs:
            each = [theirs.format(expert) for expert in range(config.n_expert)]
            experts = [linear(source, name) for name in each]
            shapes = [{part: array.shape for part, array in found.items()} for found in experts]
            for name, shape in zip(each, shapes, strict=True):
                if shape != shapes[0]:
                    raise UserError(f"{source.place(name, 'weight')} has shape {shape}, but expert 0 {shapes[0]}: they "
                                    "do not fit")
            for part in shapes[0]:
                yield f"{path}.{part}", mx.stack([found.pop(part) for found in experts]), source.place(each[0], part)
        elif isinstance(module, nn.Linear | Experts) or f"{theirs}.scales" in source.names:
            for part, array in linear(source, theirs).items():
                if part != "bias" or "bias" in module or array.any().item():  # some quantizers write biases of zeros
                    yield f"{path}.{part}", array, source.place(theirs, part)
        else:
            for part in module.parameters():
                array = source[theirs if theirs in source.names else f"{theirs}.{part}"]  # sinks are no module there
                if family in GEMMAS and "norm" in path:
                    array = array.astype(mx.float32) + 1  # the files hold what is added to 1
                yield f"{path}.{part}", array, source.place(theirs, part)
    if config.tie:
        check_tied(source, names)
    more = [name for name in sorted(source.names - source.used) if not re.search(IGNORED, name)]
    if more:
        raise UserError(f"{source.file_of(more[0])} holds {more[0]}, and {len(more) - 1} more, which have no "
                        "place in the architecture of config.json: copy the files again")


def stacked(theirs: str) -> str:
    """The name in mlx-lm's files of one array for all experts, by their_name(); "" for other modules."""
    before, _, name = theirs.partition(".experts.{}.")
    name = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}.get(name, name)
    return f"{before}.switch_mlp.{name}" if name else ""


def fused_rows(config: GPTConfig, family: str, fused: str) -> list[int]:
    """How many rows q, k and v have in a matrix that holds all of them, or gate and up."""
    if fused == "mlp.gate_up":
        return [config.ffn_dim] * 2
    n_kv_head = config.n_head if family in ("gpt2", "gpt_neox") else config.n_kv_head
    return [config.head_dim * heads for heads in (config.n_head, n_kv_head, n_kv_head)]


def split(config: GPTConfig, family: str, fused: str, array: mx.array, place: str) -> list[mx.array]:
    """The rows of q, k and v, or of gate and up, in a matrix that holds all of them, or in its bias or scales. GPT-NeoX
    has q, k and v of the first head, then those of the second one, and so on. In GPT-OSS, rows of gate and up of all
    experts, (E, rows, ...), take turns."""
    D, sizes, axis = config.head_dim, fused_rows(config, family, fused), int(family == "gpt_oss")
    if array.shape[axis] != sum(sizes):
        raise UserError(f"{place} has shape {array.shape}, but by the settings it has {' + '.join(map(str, sizes))} "
                        "rows: they do not fit")
    if family == "gpt_neox":
        heads = array.reshape(config.n_head, 3, D, *array.shape[1:])
        return [heads[:, i].reshape(-1, *array.shape[1:]) for i in range(3)]
    if family == "gpt_oss":
        return [array[:, 0::2], array[:, 1::2]]
    return mx.split(array, np.cumsum(sizes)[:-1].tolist())


def join(config: GPTConfig, family: str, parts: list[mx.array]) -> mx.array:
    """One matrix of the rows of several, as split() takes it apart; or one bias."""
    if family == "gpt_neox":
        heads = [array.reshape(config.n_head, config.head_dim, *array.shape[1:]) for array in parts]
        return mx.stack(heads, axis=1).reshape(-1, *parts[0].shape[1:])
    if family == "gpt_oss":
        return mx.stack(parts, axis=2).flatten(1, 2)
    return mx.concatenate(parts)


def check_tied(source: Folder, names: dict[str, str]):
    """UserError if the unembedding of a tied model is in the files and differs from the embedding."""
    head = f"{names['head']}.weight"
    if head in source.names and not mx.array_equal(source[head], source[f"{names['embed']}.weight"]):
        raise UserError(f"{source.file_of(head)}: {head} differs from {names['embed']}.weight, though config.json has "
                        "tie_word_embeddings=true: set it to false to use both, or remove the first from the file")


# Constants that some versions of transformers wrote: causal masks, and the frequencies of rotary positions.
IGNORED = r"rotary_emb\.inv_freq$|\.(attn|attention)\.(masked_)?bias$"


def skeleton(config: GPTConfig) -> dict[str, nn.Module]:
    """The modules of a model that have parameters of their own, by path. Their arrays are lazy and take no memory."""
    modules = GPT(config, seed=None).named_modules()
    return {path: module for path, module in sorted(modules, key=lambda pair: natural(pair[0]))
            if any(isinstance(value, mx.array) for value in module.parameters().values())}


# ---- tokenizer -------------------------------------------------------------------------------------------------------


def tokenizer_of(source: Folder) -> tuple[Tokenizer | None, dict]:
    """The folder's tokenizer, if it has one, and further entries for a checkpoint's header: "chat_template", unchanged,
    and `template`; "ends", the ids of all tokens that the files name as the end of an answer; and "hf", what
    tokenizer_files() gives back."""
    path = os.path.join(source.folder, "tokenizer.json")
    if not os.path.exists(path):
        print(f"{path} is missing: the checkpoint will have no tokenizer")
        return None, {}
    kept = {}
    for name in ("special_tokens_map", "tokenizer_config", "generation_config"):
        if os.path.exists(os.path.join(source.folder, f"{name}.json")):
            kept[name] = read_json(source.folder, f"{name}.json")
    settings = {**kept.pop("special_tokens_map", {}), **kept.get("tokenizer_config", {})}
    check_spelling(settings, os.path.join(source.folder, "tokenizer_config.json"),
                   ("add_bos_token", "add_eos_token", "boi_token", "bos_token", "chat_template", "eoi_token",
                    "eos_token"))  # boi, eoi: of an image
    found = read_json(source.folder, "tokenizer.json")
    ids = [i for place in (kept.get("generation_config", {}), source.raw) for i in whole_numbers(place, "eos_token_id")]
    names = {i: name for name, i in known_ids(found).items()}
    try:
        with open(path, encoding="utf-8") as file:
            tokenizer = from_tokenizer_json(
                file.read(), token_name(settings, "bos_token"),
                token_name(settings, "eos_token") or next((names[i] for i in ids if i in names), ""),
                settings.get("add_bos_token") is True)
    except UserError as error:
        raise UserError(f"{source.folder}: {error}") from error
    template = settings.get("chat_template")
    jinja = os.path.join(source.folder, "chat_template.jinja")
    if isinstance(template, list):  # several, by name
        template = next((one.get("template") for one in template if isinstance(one, dict)
                         and one.get("name") == "default"), None)
    if os.path.exists(jinja):
        with open(jinja, encoding="utf-8", errors="replace") as file:
            template = file.read()
    if found.get("post_processor"):
        kept["post_processor"] = found["post_processor"]
    if any(entry.get(flag) for entry in found.get("added_tokens") or () for flag in FLAGS) and tokenizer.kind != "hf":
        kept["added_tokens"] = found["added_tokens"]
    if "tokenizer_config" in kept:  # without what is elsewhere: added_tokens_decoder is in tokenizer.json
        kept["tokenizer_config"] = {name: value for name, value in kept["tokenizer_config"].items()
                                    if name not in ("chat_template", "added_tokens_decoder")}
    return tokenizer, {**template_settings(template), "ends": list(dict.fromkeys([tokenizer.eot, *ids])), "hf": kept}


FLAGS = ("single_word", "lstrip", "rstrip", "normalized")  # of an added token


def known_ids(found: dict) -> dict[str, int]:
    """The ids of the added tokens of a tokenizer.json, by name; {} where they cannot be read."""
    try:
        return {token["content"]: token["id"] for token in found.get("added_tokens") or ()}
    except (KeyError, TypeError):
        return {}


def whole_numbers(settings: dict, name: str) -> list[int]:
    """The ids in a setting that holds one id, a list of ids, or nothing."""
    given = settings.get(name)
    return [i for i in (given if isinstance(given, list) else [given]) if type(i) is int and i >= 0]


def token_name(settings: dict, name: str) -> str:
    """The text of a token in tokenizer_config.json, where it stands alone or with its flags; "" if there is none."""
    given = settings.get(name)
    given = given.get("content") if isinstance(given, dict) else given
    return given if isinstance(given, str) else ""


def template_settings(template) -> dict:
    """The header's entries for a Jinja template, which is the model's own. It is stored, and not run here."""
    return {"chat_template": template, "template": "own"} if isinstance(template, str) else {}


def chat_settings(meta: dict, tokenizer: Tokenizer) -> dict:
    """The header's entry "chat"; {} where there is no template, or one of which chat_entry() makes none."""
    try:
        return chat_entry(tokenizer, template_of(meta, tokenizer))
    except UserError:
        return {}


def fitting(tokenizer: Tokenizer | None, vocab_size: int) -> Tokenizer | None:
    """The tokenizer without those added tokens for which the embedding has no row; a line names them. UserError if
    other tokens have none."""
    if tokenizer is None or tokenizer.n_vocab <= vocab_size:
        return tokenizer
    beyond = {name: i for name, i in (tokenizer.special | tokenizer.added).items() if i >= vocab_size}
    others = [i for i, token in enumerate(tokenizer.tokens) if i >= vocab_size and token and i not in beyond.values()]
    if others or {tokenizer.eot, tokenizer.bos} & {*beyond.values()}:
        raise UserError(f"the tokenizer has {tokenizer.n_vocab:,} tokens, but the embedding {vocab_size:,} rows: they "
                        "do not fit each other; copy both again")
    shown = ", ".join([*beyond][:5]) + (f" and {len(beyond) - 5} more" if len(beyond) > 5 else "")
    print(f"the embedding has no row for {len(beyond)} of the tokenizer's tokens, which are left out: {shown}")
    parts = tokenizer.to_dict()
    parts["tokens"] = parts["tokens"][:vocab_size]
    for kind in ("special", "added"):
        parts[kind] = {name: i for name, i in getattr(tokenizer, kind).items() if i < vocab_size}
    if tokenizer.source:
        found = json.loads(tokenizer.source)
        found["added_tokens"] = [entry for entry in found["added_tokens"] if entry["id"] < vocab_size]
        found["model"]["vocab"] = {piece: i for piece, i in found["model"]["vocab"].items() if i < vocab_size}
        parts["source"] = json.dumps(found, ensure_ascii=False, separators=(",", ":"))
    return Tokenizer.from_dict(parts)


def tokenizer_files(meta: dict) -> dict[str, dict]:
    """The files of a Hugging Face folder that a checkpoint's tokenizer makes, by name, as they were where it came from
    such a folder; and for config.json the ids of the tokens that begin and end a text. {} if the header holds no
    tokenizer, or one of characters, which has no counterpart there."""
    enc = Tokenizer.from_dict(meta["tokenizer"]) if meta.get("tokenizer") else None
    found = to_tokenizer_json(enc) if enc else None
    if found is None:
        return {}
    kept = meta.get("hf") or {}
    if enc.kind != "hf":
        found |= {name: kept[name] for name in ("post_processor", "added_tokens") if name in kept}
    names, ids = {i: name for name, i in (enc.special | enc.added).items()}, enc.special | enc.added
    begin = {"bos_token": names[enc.bos]} if enc.bos in names else {}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **begin, "eos_token": names.get(enc.eot, EOT),
              "clean_up_tokenization_spaces": False, **kept.get("tokenizer_config", {})}
    if meta.get("chat_template"):
        config["chat_template"] = meta["chat_template"]
    bos = enc.bos if enc.start else ids.get(token_name(config, "bos_token"))
    files = {"config.json": {"bos_token_id": bos, "eos_token_id": enc.eot}, "tokenizer.json": found,
             "tokenizer_config.json": config}
    ends = meta.get("ends") or []
    if kept.get("generation_config") or len(ends) > 1:
        files["generation_config.json"] = kept.get("generation_config") or {"bos_token_id": bos, "eos_token_id": ends}
    return files


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def check_out(out: str, source: str):
    """UserError, before any work, if the checkpoint `out` cannot be written, is (a part of) the source, or the result
    of another script."""
    check_output(out, source)
    check_folder(out)
    check_replaced(out, os.path.basename(sys.argv[0]))


def write_checkpoint(out: str, config: GPTConfig, arrays: Iterator, tokenizer: Tokenizer | None, meta: dict):
    """Write a checkpoint of the arrays (name, array, the file and the name it was read from), which are computed one at
    a time, with a progress bar. UserError, before anything is written, if an array is missing, has a shape that does
    not fit the config, or holds infinite numbers or NaN."""
    tokenizer = fitting(tokenizer, config.vocab_size)
    modules, found, places = skeleton(config), {}, {}
    wanted = {f"{path}.{part}": p.shape for path, module in modules.items() for part, p in module.parameters().items()}
    bar = tqdm(total=len(wanted), unit=" tensors", disable=None, dynamic_ncols=True)
    for name, array, place in arrays:
        array = mx.contiguous(array)  # else a transposed view would be copied later, beside all others
        mx.eval(array)
        check_array(name, array, place, wanted)
        found[name], places[name] = array, place
        bar.update(name in wanted)  # scales and biases are not counted
    bar.close()
    if missing := [name for name in wanted if name not in found]:
        raise UserError(f"{missing[0]} is missing, and {len(missing) - 1} more: copy the whole model")
    for name, array in found.items():
        if name.endswith(".scales") or array.dtype == mx.uint32:
            check_packed(name.rpartition(".")[0], found, places[name], wanted)
    header = {"script": os.path.basename(sys.argv[0]), **meta, "version": VERSION, "config": asdict(config)}
    if tokenizer:
        header |= {"tokenizer": tokenizer.to_dict(), **chat_settings(meta, tokenizer)}
    save_arrays(out, found, header)
    print(f"{out}: {len(found)} tensors, {sum(array.nbytes for array in found.values()) / 1e6:,.1f} MB"
          + (f"\nnext: python sample.py {shlex.quote(out)}" if tokenizer else ""))


def check_array(name: str, array: mx.array, place: str, wanted: dict):
    """UserError for an array that is not one of the `wanted` (shapes by name), or damaged. place: its origin."""
    path, _, part = name.rpartition(".")
    packed = part in ("scales", "biases", "order") or part == "weight" and array.dtype == mx.uint32  # see check_packed
    if (f"{path}.weight" if packed else name) not in wanted:
        raise UserError(f"{place} has no place in this architecture: the settings do not fit the weights")
    if not packed and array.shape != wanted[name]:
        raise UserError(f"{place} has shape {array.shape}, but by the settings it is {wanted[name]}: copy both again")
    if not packed and array.dtype not in NOT_FINITE:
        raise UserError(f"{place} holds {str(array.dtype)[9:]}, where floating-point numbers of 16 or 32 bits should "
                        "be: this format cannot be read")
    check_finite(array, place)


def check_finite(array: mx.array, place: str):
    """UserError for floating-point numbers that are infinite or NaN."""
    if array.dtype in NOT_FINITE and not finite(array):
        raise UserError(f"{place} holds infinite numbers or NaN: the file is damaged; copy it again")


NOT_FINITE = {mx.float32: (mx.uint32, 0x7F800000), mx.bfloat16: (mx.uint16, 0x7F80), mx.float16: (mx.uint16, 0x7C00)}


def finite(array: mx.array) -> bool:
    """Whether no number is infinite or NaN. It looks at the exponent's bits, which takes a tenth of the time of
    mx.isfinite on a CPU."""
    integer, exponent = NOT_FINITE[array.dtype]
    bits = array.view(integer) & (2 ** (8 * array.dtype.size - 1) - 1)  # without the sign
    return array.size == 0 or bits.max().item() < exponent


def check_packed(path: str, found: dict, place: str, wanted: dict):
    """UserError if weight, scales and biases of a quantized layer do not fit each other or the `wanted` shape."""
    *_, outputs, inputs = wanted[f"{path}.weight"]
    parts = [found.get(f"{path}.{part}") for part in ("weight", "scales", "biases")]
    shapes = [None if array is None else array.shape for array in parts]
    fits = None not in shapes and shapes[1] == shapes[2] and shapes[0][:-1] == shapes[1][:-1]
    fits = fits and shapes[0][:-1] == wanted[f"{path}.weight"][:-1] and inputs % shapes[1][-1] == 0
    if not fits or shapes[0][-1] * 32 % inputs or inputs // shapes[1][-1] not in (32, 64, 128):
        raise UserError(f"{place} is packed in shapes {shapes}, which do not fit ({outputs}, {inputs}) by the settings")


if __name__ == "__main__":
    print("readers.py has no command of its own: run hf_reader.py, awq_reader.py, gptq_reader.py or gguf_reader.py",
          file=sys.stderr)
    sys.exit(2)
