"""Models of other projects: reads Hugging Face folders tensor by tensor; knows the tensors' names and the settings of
the architectures gpt2, llama, mistral, qwen2, qwen3 and mixtral; writes checkpoints.

    source = open_folder("Llama-3.2-1B")
    config = model_config(source.raw, source.folder)
    write_checkpoint("llama.safetensors", config, read_model(config, source), *tokenizer_of(source))

Pickled weights (.bin, .pt) are refused, since unpickling runs whatever code they hold. No code of a folder is run.
"""
import json
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
from draw import check_folder
from model import GPT, VERSION, GPTConfig, save_arrays
from quantized import Factored, dense_weight, natural, replace_module
from tokenizer import Tokenizer, from_tokenizer_json

# ---- names -----------------------------------------------------------------------------------------------------------

OURS, LLAMA, GPT2, GGUF = range(4)
PREFIX = ("blocks.", "model.layers.", "transformer.h.", "blk.")  # of a layer, before its number
NAMES = [  # modules of a layer: ours, the Llama family's, GPT-2's, GGUF's
    ("attn_norm", "input_layernorm", "ln_1", "attn_norm"),
    ("attn.q", "self_attn.q_proj", None, "attn_q"),  # GPT-2 has attn.c_attn: q, k and v in one
    ("attn.k", "self_attn.k_proj", None, "attn_k"),
    ("attn.v", "self_attn.v_proj", None, "attn_v"),
    ("attn.out", "self_attn.o_proj", "attn.c_proj", "attn_output"),
    ("attn.q_norm", "self_attn.q_norm", None, "attn_q_norm"),
    ("attn.k_norm", "self_attn.k_norm", None, "attn_k_norm"),
    ("mlp_norm", "post_attention_layernorm", "ln_2", "ffn_norm"),
    ("mlp.gate", "mlp.gate_proj", None, "ffn_gate"),
    ("mlp.up", "mlp.up_proj", "mlp.c_fc", "ffn_up"),
    ("mlp.down", "mlp.down_proj", "mlp.c_proj", "ffn_down"),
    ("mlp.router", "block_sparse_moe.gate", None, "ffn_gate_inp"),
]
OUTSIDE = [
    ("embed", "model.embed_tokens", "transformer.wte", "token_embd"),
    ("pos_embed", None, "transformer.wpe", "position_embd"),
    ("norm", "model.norm", "transformer.ln_f", "output_norm"),
    ("head", "lm_head", "lm_head", "output"),
]
EXPERTS = {"mlp.gate": "w1", "mlp.up": "w3", "mlp.down": "w2"}  # Mixtral: block_sparse_moe.experts.{expert}.w1


def their_name(ours: str, column: int) -> str | None:
    """The name of a module in another project: blocks.3.attn.q -> model.layers.3.self_attn.q_proj, or GPT-2's or GGUF's
    name for it, by the column of NAMES. None if that project has no such module."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", ours)
    for row in NAMES if match else OUTSIDE:
        if row[OURS] == (match[2] if match else ours):
            return row[column] and (f"{PREFIX[column]}{match[1]}.{row[column]}" if match else row[column])
    return None


# ---- settings --------------------------------------------------------------------------------------------------------


# The settings of config.json that are read or checked, by family. mistral, qwen2 and qwen3 have llama's.
SETTINGS = {
    "gpt2": ("activation_function", "is_causal", "layer_norm_epsilon", "n_embd", "n_head", "n_inner", "n_layer",
             "n_positions", "scale_attn_by_inverse_layer_idx", "scale_attn_weights", "tie_word_embeddings",
             "vocab_size"),
    "llama": ("activation", "attention_bias", "head_dim", "hidden_act", "hidden_size", "intermediate_size", "is_causal",
              "layer_types", "max_position_embeddings", "max_window_layers", "mlp_bias", "num_attention_heads",
              "num_hidden_layers", "num_key_value_heads", "partial_rotary_factor", "rms_norm_eps", "rope_parameters",
              "rope_scaling", "rope_theta", "sliding_window", "tie_word_embeddings", "use_sliding_window",
              "vocab_size")}
SETTINGS["mixtral"] = (*SETTINGS["llama"], "num_experts_per_tok", "num_local_experts")
# Settings that no logit depends on, of: the file, tokens, training, outputs, other tasks, quantization, sampling.
WITHOUT_EFFECT = re.compile(r"""
    _.* | architectures | auto_map | is_llama_config | license | model_type | name_or_path | transformers\.js_config
    | unsloth_.* | .*_version | .*dtype
    | .*_token_ids? | tokenizer_class | prefix | n_ctx | seq_length | max_seq(uence)?_len(gth)? | model_max_length
    | .*dropout.* | .*_pdrop | gradient_checkpointing | initializer_range | neftune_noise_alpha | pretraining_tp
    | router_(aux_loss_coef|jitter_noise) | tf_legacy_loss
    | .*attn_implementation | chunk_size_feed_forward | is_decoder | output_.* | reorder_and_upcast_attn | return_dict.*
    | torchscript | use_bfloat16 | use_cache | use_flash_.*
    | finetuning_task | id2label | label2id | num_labels | predict_special_tokens | problem_type | summary_.*
    | task_specific_params
    | quantization(_config)?
    | (begin_)?suppress_tokens | bad_words_ids | diversity_penalty | do_sample | early_stopping | exponential_decay_.*
    | (encoder_)?no_repeat_ngram_size | length_penalty | (max|min)_(new_tokens|length) | min_p | num_beam.*
    | num_return_sequences | remove_invalid_values | repetition_penalty | temperature | top_[kp] | typical_p
    """, re.X)
ROPE = {"rope_theta", "rope_type", "type", "factor", "low_freq_factor", "high_freq_factor",
        "original_max_position_embeddings", "partial_rotary_factor"}
MOST_LAYERS = 1000


def model_config(raw: dict, where: str) -> GPTConfig:
    """The GPTConfig for the settings `raw` of a config.json, spelled as transformers 4 or 5 spells them. where: the
    file, for messages. UserError names a setting that GPT cannot follow."""
    family = raw.get("model_type")
    if family not in ("gpt2", "llama", "mistral", "qwen2", "qwen3", "mixtral"):
        raise UserError(f"{where}: architecture {family!r} is not one of gpt2, llama, mistral, qwen2, qwen3, mixtral")
    known = SETTINGS.get(family, SETTINGS["llama"])
    check_spelling(raw, where, known)
    check_unknown(raw, known, WITHOUT_EFFECT, where)

    def refuse(name: str, *allowed):
        if raw.get(name, allowed[0]) not in allowed:
            raise UserError(f"{where}: {name}={raw[name]!r} is not supported, only {' or '.join(map(repr, allowed))}")

    try:
        refuse("is_causal", True)
        if family == "gpt2":
            refuse("scale_attn_weights", True)
            refuse("scale_attn_by_inverse_layer_idx", False)
            refuse("activation_function", "gelu_new", "gelu_pytorch_tanh", "gelu")
            mlp = "gelu" if raw.get("activation_function") == "gelu" else "gelu_tanh"
            return checked(
                where, block_size=raw["n_positions"], vocab_size=raw["vocab_size"], n_layer=raw["n_layer"],
                n_head=raw["n_head"], n_embd=raw["n_embd"], ffn_dim=raw.get("n_inner") or 0, pos="learned",
                norm="layer", norm_eps=raw.get("layer_norm_epsilon", 1e-5), mlp=mlp, bias=True, qk_norm=False,
                tie=raw.get("tie_word_embeddings", True))
        refuse("activation", "swiglu")  # Falcon 3's; transformers reads hidden_act
        refuse("hidden_act", "silu")
        refuse("attention_bias", False)
        refuse("mlp_bias", False)
        refuse("partial_rotary_factor", 1, None)
        n_layer = raw["num_hidden_layers"]
        moe = dict(n_expert=raw["num_local_experts"], expert_top_k=raw["num_experts_per_tok"],
                   expert_balance="none") if family == "mixtral" else {}
        return checked(
            where, block_size=raw["max_position_embeddings"], vocab_size=raw["vocab_size"], n_layer=n_layer,
            n_head=raw["num_attention_heads"], n_embd=raw["hidden_size"], head_dim=raw.get("head_dim") or 0,
            n_kv_head=raw.get("num_key_value_heads") or 0, ffn_dim=raw["intermediate_size"], mlp="swiglu",
            norm_eps=raw["rms_norm_eps"], qkv_bias=family == "qwen2", qk_norm=family == "qwen3",
            tie=raw.get("tie_word_embeddings", False), **rope_settings(raw, where), **window_settings(raw, where),
            **moe)
    except KeyError as error:
        raise UserError(f"{where} lacks {error}: it is no config.json of {family}") from error
    except (TypeError, ArithmeticError) as error:
        raise UserError(f"{where} has a setting of the wrong type ({error}): copy it again") from error


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


def rope_settings(raw: dict, where: str) -> dict:
    """The rotary settings of GPTConfig for a config.json."""
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    if unknown := rope.keys() - ROPE:
        raise UserError(f"{where}: rope setting {min(unknown)!r} is not supported")
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise UserError(f"{where}: partial_rotary_factor={rope['partial_rotary_factor']!r} is not supported, only 1")
    theta = 1e6 if raw["model_type"] == "mixtral" else 1e4
    found = {"rope_theta": rope.get("rope_theta", raw.get("rope_theta", theta))}
    kind = rope.get("rope_type", rope.get("type")) if rope.keys() - {"rope_theta"} else "default"
    if kind == "llama3":
        found |= {"rope_factor": rope["factor"], "rope_low_freq": rope["low_freq_factor"],
                  "rope_high_freq": rope["high_freq_factor"], "rope_original": rope["original_max_position_embeddings"]}
    elif kind == "linear":  # all wavelengths grow: none is short enough to stay as it is
        found |= {"rope_factor": rope["factor"], "rope_low_freq": 1e9, "rope_high_freq": 2e9}
    elif kind != "default":
        raise UserError(f"{where}: rope scaling {kind!r} is not one of default, linear, llama3")
    return found


def window_settings(raw: dict, where: str) -> dict:
    """sliding_window and window_pattern for a config.json; {} if no layer has a window."""
    family = raw["model_type"]
    window, qwen = raw.get("sliding_window", None if family == "mixtral" else 4096), family.startswith("qwen")
    if family == "llama" or window is None or qwen and not raw.get("use_sliding_window"):
        return {}
    letters = {"full_attention": "L", "sliding_attention": "S"}
    n_layer, first = min(raw["num_hidden_layers"], MOST_LAYERS), raw.get("max_window_layers", 28) if qwen else 0
    kinds = raw.get("layer_types") or [[*letters][i >= first] for i in range(n_layer)]
    if len(kinds) != n_layer or set(kinds) - letters.keys():
        raise UserError(f"{where}: layer_types is not a list of {' and '.join(letters)}, one for each layer")
    pattern = "".join(letters[kind] for kind in kinds)
    if "S" not in pattern:
        return {}
    return {"sliding_window": window, "window_pattern": pattern if "L" in pattern else "S"}


# ---- export ----------------------------------------------------------------------------------------------------------

# Settings of GPTConfig that every family has, with any value; and those of rotary positions.
SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "ffn_dim", "norm_eps", "tie")
ROPE_SETTINGS = ("rope_theta", "rope_factor", "rope_low_freq", "rope_high_freq", "rope_original")
# A setting on the left has no effect while the one on the right has its default value.
PART_OF = {"window_pattern": "sliding_window", "diff_attn_version": "diff_attn", "expert_top_k": "n_expert",
           "expert_balance": "n_expert", "mod_capacity": "mod", "mod_every": "mod"}


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

    def file_of(self, name: str) -> str:
        if name not in self.files and name.startswith("transformer."):  # some of GPT-2's files leave it out
            name = name.removeprefix("transformer.")
        if name not in self.files:
            raise UserError(f"{self.folder} holds no tensor {name}: the files do not fit config.json; copy them again")
        return self.files[name]

    def place(self, module: str, part: str) -> str:
        """The file and the name of a tensor, part (weight, bias) of a module, for messages."""
        for name in (f"{module}.{part}", f"{module}.{part}".removeprefix("transformer."), f"{module}.qweight"):
            if name in self.files:
                return f"{self.files[name]}: {name}"
        return f"{self.folder}: {module}.{part}"

    def __getitem__(self, name: str) -> mx.array:
        """The tensor of this name, read from its file. The folder keeps no copy of it."""
        path = self.file_of(name)
        name = name if name in self.files else name.removeprefix("transformer.")
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
    """The weight (out, in), and the bias (out,) if there is one, of a module, by its name in the folder. GPT-2's
    matrices are stored transposed."""
    found = {"weight": source[f"{name}.weight"]}
    if name.startswith("transformer.h."):
        found["weight"] = found["weight"].T
    if f"{name}.bias" in source.names or f"{name.removeprefix('transformer.')}.bias" in source.names:
        found["bias"] = source[f"{name}.bias"]
    return found


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


def read_model(config: GPTConfig, source: Folder,
               linear: Callable[[Folder, str], dict[str, mx.array]] = dense_linear) -> Iterator:
    """All arrays of a GPT, one at a time: the name in the checkpoint, the array, and the file and the name it was read
    from. linear(source, name in the folder) reads a linear layer: its weight, and its bias if there is one; of a
    quantized layer also scales, biases and `order` (see quantized.py)."""
    column = GPT2 if source.raw.get("model_type") == "gpt2" else LLAMA
    for path, module in skeleton(config).items():
        theirs = their_name(path, column)
        layer = path.rpartition(".attn.")[0] or path.rpartition(".mlp.")[0]
        if column == GPT2 and path.endswith("attn.q"):
            theirs = f"{PREFIX[GPT2]}{layer.removeprefix('blocks.')}.attn.c_attn"
            for part, array in linear(source, theirs).items():
                if array.shape[0] != 3 * config.n_embd:
                    raise UserError(f"{source.place(theirs, part)} has shape {array.shape}, which is not three times "
                                    f"{config.n_embd}, as config.json says: they do not fit")
                for letter, piece in zip("qkv", mx.split(array, 3), strict=True):
                    yield f"{layer}.attn.{letter}.{part}", mx.contiguous(piece), source.place(theirs, part)
        elif column == GPT2 and path.endswith((".attn.k", ".attn.v")):
            continue  # these came with q
        elif theirs is not None and path.partition(".mlp.")[2] in ("gate", "up", "down") and config.n_expert:
            name, number = f"mlp.{path.partition('.mlp.')[2]}", layer.removeprefix("blocks.")
            names = [f"{PREFIX[LLAMA]}{number}.block_sparse_moe.experts.{expert}.{EXPERTS[name]}"
                     for expert in range(config.n_expert)]
            experts = [linear(source, name) for name in names]
            shapes = [{part: array.shape for part, array in found.items()} for found in experts]
            for name, shape in zip(names, shapes, strict=True):
                if shape != shapes[0]:
                    raise UserError(f"{source.place(name, 'weight')} has shape {shape}, but expert 0 {shapes[0]}: they "
                                    "do not fit")
            for part in shapes[0]:
                yield f"{path}.{part}", mx.stack([found.pop(part) for found in experts]), source.place(names[0], part)
        elif isinstance(module, nn.Linear):
            for part, array in linear(source, theirs).items():
                if part != "bias" or "bias" in module or array.any().item():  # some quantizers write biases of zeros
                    yield f"{path}.{part}", array, source.place(theirs, part)
        else:
            for part in module.parameters():
                yield f"{path}.{part}", source[f"{theirs}.{part}"], source.place(theirs, part)
    more = [name for name in sorted(source.names - source.used) if not re.search(IGNORED, name)
            and not (config.tie and name == "lm_head.weight")]
    if more:
        raise UserError(f"{source.file_of(more[0])} holds {more[0]}, and {len(more) - 1} more, which have no "
                        "place in the architecture of config.json: copy the files again")


# Constants that some versions of transformers wrote: causal masks, and the frequencies of rotary positions.
IGNORED = r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$"


def skeleton(config: GPTConfig) -> dict[str, nn.Module]:
    """The modules of a model that have parameters of their own, by path. Their arrays are lazy and take no memory."""
    modules = GPT(config, seed=None).named_modules()
    return {path: module for path, module in sorted(modules, key=lambda pair: natural(pair[0]))
            if any(isinstance(value, mx.array) for value in module.parameters().values())}


# ---- tokenizer -------------------------------------------------------------------------------------------------------


def tokenizer_of(source: Folder) -> tuple[Tokenizer | None, dict]:
    """The folder's tokenizer, if it has one, and further entries for a checkpoint's header: chat_template, unchanged,
    and `template`, the name that conversations.py has for it."""
    path = os.path.join(source.folder, "tokenizer.json")
    if not os.path.exists(path):
        print(f"{path} is missing: the checkpoint will have no tokenizer")
        return None, {}
    settings = {}
    if os.path.exists(os.path.join(source.folder, "tokenizer_config.json")):
        settings = read_json(source.folder, "tokenizer_config.json")
        check_spelling(settings, os.path.join(source.folder, "tokenizer_config.json"),
                       ("bos_token", "chat_template", "eos_token"))

    def text_of(name: str) -> str | None:
        given = settings.get(name)
        return given.get("content") if isinstance(given, dict) else given

    read_json(source.folder, "tokenizer.json")
    try:
        with open(path, encoding="utf-8") as file:
            tokenizer = from_tokenizer_json(file.read(), text_of("bos_token") or "", text_of("eos_token") or "")
    except UserError as error:
        raise UserError(f"{source.folder}: {error}") from error
    template = settings.get("chat_template")
    jinja = os.path.join(source.folder, "chat_template.jinja")
    if isinstance(template, list):  # several, by name
        template = next((one.get("template") for one in template if isinstance(one, dict)
                         and one.get("name") == "default"), None)
    if template is None and os.path.exists(jinja):
        with open(jinja, encoding="utf-8", errors="replace") as file:
            template = file.read()
    return tokenizer, template_settings(template)


def template_settings(template) -> dict:
    """The header's entries for a Jinja template. It is stored, and never run."""
    if not isinstance(template, str):
        return {}
    for name, mark in (("chatml", "<|im_start|>"), ("llama3", "<|start_header_id|>")):
        if mark in template:
            return {"chat_template": template, "template": name}
    return {"chat_template": template}


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
    save_arrays(out, found, header if tokenizer is None else {**header, "tokenizer": tokenizer.to_dict()})
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
