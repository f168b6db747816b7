"""A Hugging Face folder into a checkpoint of this collection, and back.

    python hf_reader.py Llama-3.2-1B llama.safetensors
    python hf_reader.py out/ckpt.safetensors --export=my-gpt2

It reads GPT-2, Llama (with rope scaling), Mistral (with a window), Qwen2, Qwen3 and Mixtral, from config.json and one
or several .safetensors files. Weights stay in their dtype. The tokenizer (tokenizer.json) and the chat template go into
the checkpoint too. Models packed by AWQ or GPTQ are read by awq_reader.py and gptq_reader.py. A setting of config.json
that is not known here is refused, unless its value turns it off.

It writes such a folder, which transformers and mlx-lm load, of every checkpoint whose architecture is one of these six.
Quantized layers are unpacked, and low-rank layers multiplied out.
"""
import json
import math
import os
import shutil
from collections.abc import Iterator

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
from tqdm import tqdm

from config import UserError, overrides
from model import GPT, GPTConfig, load_checkpoint
from quantized import dense_weight
from readers import (
    EXPERTS,
    GPT2,
    LLAMA,
    PREFIX,
    ROPE_SETTINGS,
    SIZES,
    check_export,
    check_finite,
    check_out,
    model_config,
    multiply_factors,
    open_folder,
    read_model,
    skeleton,
    their_name,
    tokenizer_of,
    write_checkpoint,
)
from tokenizer import EOT, Tokenizer, to_tokenizer_json

source = ""  # a folder with config.json; with --export: a checkpoint
out = "model.safetensors"  # the checkpoint to be written
export = ""  # a folder to be written, instead of `out`

settings = overrides(globals(), "source", "out")

# ---- write a folder --------------------------------------------------------------------------------------------------


def their_config(config: GPTConfig) -> dict:
    """The settings for config.json, spelled for transformers 4 and 5. UserError names a setting that no architecture
    has."""
    if config.pos == "learned":
        has = dict(norm=("layer",), mlp=("gelu", "gelu_tanh"), bias=(True,), qk_norm=(False,), pos=("learned",),
                   n_kv_head=(config.n_head,), head_dim=(config.n_embd // config.n_head,))
        check_export(config, "GPT-2", has, (*SIZES, *ROPE_SETTINGS, "qkv_bias"))  # the last six have no effect
        return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_positions": config.block_size,
                "n_ctx": config.block_size,
                "vocab_size": config.vocab_size, "n_layer": config.n_layer, "n_head": config.n_head,
                "n_embd": config.n_embd, "n_inner": config.ffn_dim, "layer_norm_epsilon": config.norm_eps,
                "activation_function": "gelu" if config.mlp == "gelu" else "gelu_new",
                "tie_word_embeddings": config.tie}
    has = dict(norm=("rms",), mlp=("swiglu",), bias=(False,), pos=("rope",))
    if config.n_expert:  # "bias" adds a parameter that Mixtral does not have
        has |= {"expert_balance": ("loss", "none")}
    check_export(config, "the Llama family", has, (
        *SIZES, *ROPE_SETTINGS, "n_kv_head", "head_dim", "qkv_bias", "qk_norm", "sliding_window", "window_pattern",
        "n_expert", "expert_top_k"))
    kinds = {"Mixtral": config.n_expert > 0, "Qwen3": config.qk_norm, "Qwen2": config.qkv_bias,
             "Mistral": config.sliding_window > 0 and config.window_pattern == "S"}
    own = [name for name in ("Mixtral", "Qwen3", "Qwen2") if kinds[name]]
    if len(own) > 1:
        raise UserError(f"no architecture has what {' and '.join(own)} have: the model cannot be exported")
    name = next((name for name, has in kinds.items() if has), "Llama")
    if name == "Qwen2" and config.head_dim * config.n_head != config.n_embd:
        raise UserError(f"head_dim={config.head_dim} has no counterpart in Qwen2, where heads share n_embd")
    found = {"model_type": name.lower(), "architectures": [f"{name}ForCausalLM"], "hidden_act": "silu",
             "max_position_embeddings": config.block_size, "vocab_size": config.vocab_size,
             "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head,
             "num_key_value_heads": config.n_kv_head, "hidden_size": config.n_embd, "head_dim": config.head_dim,
             "intermediate_size": config.ffn_dim, "rms_norm_eps": config.norm_eps, "tie_word_embeddings": config.tie,
             "attention_bias": False, "mlp_bias": False, "rope_theta": config.rope_theta, **their_rope(config)}
    if name == "Mixtral":
        if config.expert_top_k < 2:
            raise UserError("expert_top_k=1 has no counterpart in Mixtral, whose gates sum to 1")
        found |= {"num_local_experts": config.n_expert, "num_experts_per_tok": config.expert_top_k}
    letters = (config.window_pattern * config.n_layer)[:config.n_layer]
    long = letters.count("L")
    if not config.sliding_window:
        return found | {"sliding_window": None}
    if name in ("Qwen2", "Qwen3") and letters == "L" * long + "S" * (config.n_layer - long):
        kinds = ["full_attention"] * long + ["sliding_attention"] * (config.n_layer - long)
        return found | {"use_sliding_window": True, "sliding_window": config.sliding_window, "max_window_layers": long,
                        "layer_types": kinds}
    if name in ("Mistral", "Mixtral") and not long:
        return found | {"sliding_window": config.sliding_window}
    raise UserError(f"window_pattern={config.window_pattern!r} has no counterpart in {name}: the model cannot be "
                    "exported")


def their_rope(config: GPTConfig) -> dict:
    """The settings of rotary positions for config.json."""
    if config.rope_factor == 1:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}, "rope_scaling": None}
    scaling = {"rope_type": "llama3", "factor": config.rope_factor, "low_freq_factor": config.rope_low_freq,
               "high_freq_factor": config.rope_high_freq, "original_max_position_embeddings": config.rope_original}
    if config.rope_original / config.rope_low_freq < 2 * math.pi:  # no wavelength is short enough to stay as it is
        scaling = {"rope_type": "linear", "type": "linear", "factor": config.rope_factor}
    return {"rope_parameters": {**scaling, "rope_theta": config.rope_theta}, "rope_scaling": scaling}


def their_arrays(model: GPT) -> Iterator[tuple[str, mx.array]]:
    """The folder's tensors, by name, unpacked."""
    config, modules = model.config, dict(model.named_modules())
    column = GPT2 if config.pos == "learned" else LLAMA
    for path in skeleton(config):
        module, theirs = modules[path], their_name(path, column)
        layer, _, inner = path.removeprefix("blocks.").partition(".")
        number, parts = f"{PREFIX[column]}{layer}", dict(module.parameters())
        if "scales" in module:
            parts = {part: array for part, array in parts.items() if part in ("weight", "bias")}
            parts["weight"] = dense_weight(module).astype(module.scales.dtype)
        for part, array in parts.items():
            linear = isinstance(module, (nn.Linear, nn.QuantizedLinear)) and path != "head"
            if column == GPT2 and linear and part == "weight":
                array = array.T
            if column == GPT2 and inner in ("attn.q", "attn.k", "attn.v"):
                if inner == "attn.q":
                    three = [modules[path[:-1] + letter] for letter in "qkv"]
                    pieces = [other.bias if part == "bias" else dense_weight(other).astype(array.dtype).T
                              for other in three]
                    yield f"{number}.attn.c_attn.{part}", mx.concatenate(pieces, axis=-1)
            elif inner in EXPERTS and config.n_expert:
                for expert, piece in enumerate(array):
                    yield f"{number}.block_sparse_moe.experts.{expert}.{EXPERTS[inner]}.{part}", piece
            else:
                yield f"{theirs}.{part}", array


def write_folder(folder: str, model: GPT, meta: dict):
    """Write a checkpoint as a new folder. UserError if it exists, or no architecture fits the model."""
    if os.path.exists(folder):
        raise UserError(f"{folder} exists: give another --export, or remove it")
    config = their_config(model.config)
    multiply_factors(model)
    temporary = f"{folder.rstrip('/')}.tmp{os.getpid()}"
    os.makedirs(temporary)
    try:
        arrays = {}
        for name, array in tqdm(their_arrays(model), unit=" tensors", disable=None, dynamic_ncols=True):
            name = name.removeprefix("transformer.")  # as in GPT-2's own files; mlx-lm reads no other
            arrays[name] = mx.contiguous(array)
            mx.eval(arrays[name])
            check_finite(arrays[name], name)
        dtype = str(next(array for name, array in arrays.items() if "norm" in name or "ln_f" in name).dtype)[9:]
        with open(os.path.join(temporary, "model.safetensors"), "wb") as file:
            mx.save_safetensors(file, arrays, {"format": "pt"})
            file.flush()
            os.fsync(file.fileno())
        files = {"config.json": {**config, "torch_dtype": dtype, "dtype": dtype}}
        if meta.get("tokenizer"):
            enc = Tokenizer.from_dict(meta["tokenizer"])
            names = {i: name for name, i in enc.special.items()}
            files["config.json"] |= {"bos_token_id": enc.bos, "eos_token_id": enc.eot}
            files["tokenizer.json"] = to_tokenizer_json(enc)
            files["tokenizer_config.json"] = {
                "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": names.get(enc.bos, EOT),
                "eos_token": names.get(enc.eot, EOT), "clean_up_tokenization_spaces": False,
                **({"chat_template": meta["chat_template"]} if meta.get("chat_template") else {})}
        for name, content in files.items():
            if content is None:
                print(f"{name} is not written: a tokenizer of kind {enc.kind} has no counterpart there")
                continue
            with open(os.path.join(temporary, name), "w", encoding="utf-8") as file:
                json.dump(content, file, indent=2, ensure_ascii=False)
                file.flush()
                os.fsync(file.fileno())
        os.rename(temporary, folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{folder}: {config['architectures'][0]}, {len(arrays)} tensors, "
          f"{sum(array.nbytes for array in arrays.values()) / 1e6:,.1f} MB, {dtype}")


# ---- run -------------------------------------------------------------------------------------------------------------

if not source:
    raise UserError("there is nothing to read: give a folder with config.json, or a checkpoint and --export=FOLDER")
if export and os.path.isdir(source):
    raise UserError(f"{source} is a folder, but --export takes a checkpoint: read the folder into one first")
if export:
    write_folder(export, *load_checkpoint(source))
else:
    check_out(out, source)
    folder = open_folder(source)
    if packed := folder.raw.get("quantization_config") or folder.raw.get("quantization"):  # mlx-lm has the second
        method = packed.get("quant_method", "mlx-lm") if isinstance(packed, dict) else packed
        raise UserError(f"{source} is packed by {method}: read it with {method}_reader.py" if method in ("awq", "gptq")
                        else f"{source} is packed by {method!r}, which has no reader here: take the original model")
    if packed := next((name for name in sorted(folder.names) if name.endswith(".qweight")), ""):
        raise UserError(f"{folder.file_of(packed)}: {packed} is packed: read it with awq_reader.py or gptq_reader.py")
    config = model_config(folder.raw, os.path.join(source, "config.json"))
    tokenizer, more = tokenizer_of(folder)
    write_checkpoint(out, config, read_model(config, folder), tokenizer, more)
