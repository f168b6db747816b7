"""A Hugging Face folder into a checkpoint of this collection, and back.

    python hf_reader.py Llama-3.2-1B llama.safetensors
    python hf_reader.py out/ckpt.safetensors --export=my-gpt2

It reads GPT-2, GPT-NeoX and Pythia, Llama, Mistral, Mixtral, Qwen2, Qwen3, Qwen3-MoE, Gemma 1 to 3 (text), Phi-2,
Phi-3, OLMo-2, SmolLM3, StableLM, Granite and GPT-OSS, from config.json and one or several .safetensors files; rope
scaling is linear, llama3 or yarn (dynamic has no effect within the context of config.json). Weights stay in their
dtype, but for Gemma's norms, to which 1 is added in float32. The tokenizer (tokenizer.json) and the chat template go
into the checkpoint too. Layers that mlx-lm quantized, and GPT-OSS's experts in MXFP4, stay quantized. Models packed
by AWQ, GPTQ or compressed-tensors are read by awq_reader.py, gptq_reader.py and compressed_reader.py. A setting of
config.json that is not known here is refused, unless its value turns it off.

It writes such a folder, which transformers and mlx-lm load, of every checkpoint whose architecture is one of these.
Quantized layers are unpacked, and low-rank layers multiplied out. With --packed=True quantized layers stay so, in
mlx-lm's format.
"""
import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, fields

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
from tqdm import tqdm

from config import UserError, overrides
from model import GPT, GPTConfig, load_checkpoint
from quantized import dense_weight
from readers import (
    FUSED,
    GEMMAS,
    LETTERS,
    MLX_GPT_OSS,
    PART_OF,
    ROPE_SETTINGS,
    SETTINGS,
    check_finite,
    check_out,
    family_of,
    join,
    model_config,
    multiply_factors,
    names_of,
    open_folder,
    read_model,
    skeleton,
    stacked,
    their_name,
    title_of,
    tokenizer_files,
    tokenizer_of,
    write_checkpoint,
    yarn_boost,
)

source = ""  # a folder with config.json; with --export: a checkpoint
out = "model.safetensors"  # the checkpoint to be written
export = ""  # a folder to be written, instead of `out`
packed = False  # with --export: quantized layers stay quantized; mlx-lm loads the folder, transformers does not

settings = overrides(globals(), "source", "out")

# ---- write a folder --------------------------------------------------------------------------------------------------


CLASSES = {"gpt2": "GPT2LMHeadModel", "gpt_neox": "GPTNeoXForCausalLM", "gpt_oss": "GptOssForCausalLM",
           "qwen3_moe": "Qwen3MoeForCausalLM", "gemma3_text": "Gemma3ForCausalLM", "smollm3": "SmolLM3ForCausalLM",
           "stablelm": "StableLmForCausalLM"}


def letters_of(pattern: str, config: GPTConfig) -> str:
    """A pattern of letters, one for each layer."""
    return (pattern * config.n_layer)[:config.n_layer]


def their_config(config: GPTConfig, family: str) -> dict:
    """The settings for config.json, spelled for transformers 4 and 5. UserError names a setting of the model that the
    family does not have."""
    letters = letters_of(config.window_pattern if config.sliding_window else "L", config)
    gelu = {"gelu_tanh": "gelu_new"}.get(config.mlp, "gelu")
    share = config.rotary_dim / config.head_dim if config.rotary_dim else 1.0
    scale = config.attn_scale or config.head_dim**-0.5
    values = {
        "vocab_size": config.vocab_size, "n_positions": config.block_size, "n_embd": config.n_embd,
        "n_layer": config.n_layer, "n_head": config.n_head, "n_inner": config.ffn_dim, "activation_function": gelu,
        "layer_norm_epsilon": config.norm_eps, "layer_norm_eps": config.norm_eps, "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.block_size, "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head, "head_dim": config.head_dim, "intermediate_size": config.ffn_dim,
        "hidden_act": gelu, "tie_word_embeddings": config.tie, "attention_bias": config.bias or config.out_bias,
        "mlp_bias": config.bias, "use_qkv_bias": config.qkv_bias, "use_parallel_residual": config.parallel,
        "sliding_window": config.sliding_window or None, "use_sliding_window": config.sliding_window > 0,
        "num_local_experts": config.n_expert, "num_experts": config.n_expert,
        "num_experts_per_tok": config.expert_top_k, "moe_intermediate_size": config.ffn_dim, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "swiglu_alpha": 1.702, "swiglu_limit": 7.0,
        "embedding_multiplier": config.embed_scale, "residual_multiplier": config.residual_scale,
        "attention_multiplier": scale, "query_pre_attn_scalar": round(scale**-2),
        "logits_scaling": 1 / config.logit_scale, "final_logit_softcapping": config.softcap or None,
        "attn_logit_softcapping": config.attn_softcap or None,
        "no_rope_layers": ["NR".index(letter) for letter in letters_of(config.rope_pattern, config)],
        "rotary_pct": share, "rotary_emb_base": config.rope_theta, "rope_theta": config.rope_theta,
        "rope_local_base_freq": config.window_theta or config.rope_theta, **their_rope(config, family)}
    if family == "gpt2":
        values["n_ctx"] = config.block_size
    elif family == "gpt_neox":
        values["attention_bias"] = True
        values["rope_parameters"]["partial_rotary_factor"] = share
    elif family in ("phi", "phi3", "stablelm"):
        values["partial_rotary_factor"] = values["rope_parameters"]["partial_rotary_factor"] = share
    if family in GEMMAS:
        values["hidden_act"] = values["hidden_activation"] = "gelu_pytorch_tanh"
    elif family not in ("gpt2", "gpt_neox", "phi"):
        values["hidden_act"] = "silu"
    if family in ("qwen2", "qwen3", "gemma2", "gemma3_text", "smollm3", "gpt_oss"):
        kinds = {letter: kind for kind, letter in LETTERS.items()}
        values["layer_types"] = [kinds[letter] for letter in letters]
        values["sliding_window_pattern"] = (letters + "L").index("L") + 1  # mlx-lm does not look at layer_types
        if config.sliding_window:
            values["max_window_layers"] = len(letters.rstrip("S"))
    if family in (*GEMMAS, "gpt_oss") and not config.sliding_window:
        values["sliding_window"] = config.block_size
    found = {"model_type": family, "architectures": [CLASSES.get(family, f"{family.capitalize()}ForCausalLM")],
             "pad_token_id": None,  # some families have a number that may be beyond the vocabulary
             **{name: values[name] for name in (*SETTINGS[family], "n_ctx") if name in values}}
    if config.n_expert and config.expert_top_k < 2:
        raise UserError(f"expert_top_k=1 has no counterpart in {title_of(family)}, whose gates sum to 1")
    check_counterparts(config, model_config(found, "config.json"), title_of(family))
    if family in ("qwen2", "phi3", "granite") and config.head_dim * config.n_head != config.n_embd:
        raise UserError(f"head_dim={config.head_dim} has no counterpart in {title_of(family)}, where heads share "
                        "n_embd: the model cannot be exported")
    return found


def check_counterparts(config: GPTConfig, again: GPTConfig, title: str):
    """UserError names a setting that is another one in `again`, which was read from the exported settings: the family
    does not have it. A setting that GPTConfig may gain is not lost in silence."""
    given, found = with_effect(config), {field.name: field.default for field in fields(config)} | with_effect(again)
    names = [field.name for field in fields(config)]
    last = names.index("tie") + 1
    for name in (*reversed(names[last:]), *names[:last]):  # variants first, which may have set others
        same = given[name] == found[name] or isinstance(given[name], float) and math.isclose(given[name], found[name])
        switch = PART_OF.get(name, name)  # another setting, which is told if it differs
        if not same and (switch == name or given[switch] == found[switch]):
            raise UserError(f"{name}={getattr(config, name)!r} has no counterpart in {title}, which has "
                            f"{found[name]!r}: the model cannot be exported")


def with_effect(config: GPTConfig) -> dict:
    """The settings of a model. Those that have no effect beside others get their default values, and two spellings of
    the same become one."""
    found, default = asdict(config), {field.name: field.default for field in fields(config)}
    found["window_pattern"] = letters_of(config.window_pattern, config)
    found["rope_pattern"] = letters_of(config.rope_pattern, config)
    if config.pos != "rope":
        found |= {name: default[name] for name in ("rope_pattern", "rotary_dim", *ROPE_SETTINGS, "rope_scaling")}
    if config.rope_factor == 1 or is_linear(config):
        found |= {name: default[name] for name in ("rope_low_freq", "rope_high_freq", "rope_original")}
        found["rope_scaling"] = "linear"
    if config.bias:
        found |= {"qkv_bias": False, "out_bias": False, "norm_bias": False}
    if config.rotary_dim == config.head_dim:
        found["rotary_dim"] = 0
    if config.window_theta == config.rope_theta and config.rope_factor == 1:
        found["window_theta"] = 0.0
    found["attn_scale"] = config.attn_scale or config.head_dim**-0.5
    if config.expert_balance == "loss":  # it is a loss of training
        found["expert_balance"] = "none"
    return found | {name: default[name] for name, switch in PART_OF.items() if found[switch] == default[switch]}


def is_linear(config: GPTConfig) -> bool:
    """Whether a scaling makes all wavelengths longer: no wavelength is short enough to stay as it is."""
    return config.rope_scaling == "linear" or (
        config.rope_scaling == "llama3" and config.rope_original / config.rope_low_freq < 2 * math.pi)


def their_rope(config: GPTConfig, family: str) -> dict:
    """The settings of rotary positions for config.json."""
    scaling = {"rope_type": "default"}
    if config.rope_factor != 1 and is_linear(config):
        scaling = {"rope_type": "linear", "type": "linear", "factor": config.rope_factor}
    elif config.rope_factor != 1 and config.rope_scaling == "llama3":
        scaling = {"rope_type": "llama3", "factor": config.rope_factor, "low_freq_factor": config.rope_low_freq,
                   "high_freq_factor": config.rope_high_freq, "original_max_position_embeddings": config.rope_original}
    elif config.rope_factor != 1:
        scaling = {"rope_type": "yarn", "type": "yarn", "factor": config.rope_factor,
                   "beta_slow": config.rope_low_freq, "beta_fast": config.rope_high_freq,
                   "original_max_position_embeddings": config.rope_original}
        if config.rope_scaling == "yarn_untruncated":
            scaling["truncate"] = False
        boost = (config.attn_scale or config.head_dim**-0.5) ** 0.5 * config.head_dim**0.25
        boost = 1.0 if family in ("granite", *GEMMAS) else boost  # they have settings of their own for attn_scale
        if not math.isclose(boost, yarn_boost(config.rope_factor, {})):
            scaling["attention_factor"] = boost
            scaling["mscale"] = (boost - 1) / (0.1 * math.log(config.rope_factor))  # as mlx-lm has it
    short = {"rope_scaling": None if config.rope_factor == 1 else scaling}
    if family == "gemma3_text":
        windowed = {"rope_type": "default"} if config.window_theta else scaling
        return short | {"rope_parameters": {
            "full_attention": scaling | {"rope_theta": config.rope_theta},
            "sliding_attention": windowed | {"rope_theta": config.window_theta or config.rope_theta}}}
    return short | {"rope_parameters": scaling | {"rope_theta": config.rope_theta}}


def their_names(config: GPTConfig, family: str) -> dict[str, str]:
    """The names of modules in the folder, by ours. mlx-lm has mlp.gate and mlp.up of GPT-OSS apart."""
    return MLX_GPT_OSS if packed and family == "gpt_oss" else names_of(family, config)


def their_arrays(model: GPT, family: str) -> Iterator[tuple[str, mx.array]]:
    """The folder's tensors, by name, unpacked unless `packed`."""
    config, modules, seen = model.config, dict(model.named_modules()), {}
    names, dtype = their_names(config, family), unpacked(modules["embed"])["weight"].dtype
    for path in skeleton(config):
        theirs, (layer, _, inner) = their_name(path, names), path.removeprefix("blocks.").partition(".")
        fused = next((name for name in FUSED if name in names and inner in FUSED[name]), None)
        if fused and inner != FUSED[fused][0]:
            continue  # it goes with the first one
        if fused:
            theirs = their_name(f"blocks.{layer}.{fused}", names)
            each = alike([modules[f"blocks.{layer}.{name}"] for name in FUSED[fused]])
            parts = {part: join(config, family, [found[part] for found in each]) for part in each[0]}
        else:
            (parts,) = alike([modules[path]])
        if theirs in seen:
            other = unpacked(modules[seen[theirs]])
            if not all(mx.array_equal(other[part], array) for part, array in parts.items()):
                raise UserError(f"{path} differs from {seen[theirs]}, but {title_of(family)} has one norm for both: "
                                "the model cannot be exported")
            continue
        seen[theirs] = path
        for part, array in parts.items():
            if family in GEMMAS and "norm" in path:
                array = (array.astype(mx.float32) - 1).astype(dtype)
            if family == "gpt2" and part == "weight" and array.ndim == 2 and path.startswith("blocks."):
                array = array.T
            if theirs.endswith(".sinks"):
                yield theirs, array
            elif family == "gpt_oss" and ".experts." in theirs and not packed:
                yield (theirs, array.swapaxes(1, 2)) if part == "weight" else (f"{theirs}_bias", array)
            elif "{}" in theirs:
                for expert, piece in enumerate(array):
                    yield f"{theirs.format(expert)}.{part}", piece
            else:
                yield f"{theirs}.{part}", array


def alike(modules: list[nn.Module]) -> list[dict[str, mx.array]]:
    """The arrays of modules, to be joined part by part. With `packed`, modules that are quantized to as many bits in
    groups of one size stay quantized."""
    parts = [dict(module.parameters()) for module in modules]
    shapes = [{part: array.shape[1:] for part, array in found.items()} for found in parts]
    if packed and all("scales" in found and "order" not in found and shape == shapes[0]
                      for found, shape in zip(parts, shapes, strict=True)):
        return parts
    return [unpacked(module) for module in modules]


def their_quantization(model: GPT, family: str, arrays: dict[str, mx.array]) -> dict:
    """The settings for config.json, as mlx-lm writes them, of layers whose scales are among the arrays: bits and group
    size of most of them, and those of each other one by name."""
    names, found = their_names(model.config, family), {}
    for path, module in model.named_modules():
        layer, _, inner = path.removeprefix("blocks.").partition(".")
        fused = next((name for name in FUSED if name in names and inner in FUSED[name]), None)
        theirs = their_name(f"blocks.{layer}.{fused}" if fused else path, names)
        if theirs and "scales" in module and f"{theirs.format(0)}.scales" in arrays:
            found[stacked(theirs) or theirs] = {"group_size": module.group_size, "bits": module.bits}
    if not found:
        return {}
    most = max(found.values(), key=list(found.values()).count)
    others = {name: settings for name, settings in found.items() if settings != most}
    return {"quantization": {**most, "mode": "affine", **others}}


def unpacked(module: nn.Module) -> dict[str, mx.array]:
    """The weight and the bias of a module, dense."""
    parts = dict(module.parameters())
    if "scales" in module:
        parts = {part: array for part, array in parts.items() if part in ("weight", "bias")}
        parts["weight"] = dense_weight(module).astype(module.scales.dtype)
    return parts


def their_settings(config: GPTConfig, family: str | None) -> dict:
    """their_config() of the family that the model was read from, or of another one that has all settings of the
    model."""
    if family in SETTINGS:
        with contextlib.suppress(UserError):
            return their_config(config, family)
    return their_config(config, family_of(config))


def write_folder(folder: str, model: GPT, meta: dict):
    """Write a checkpoint as a new folder. UserError if it exists, or no architecture fits the model."""
    if os.path.exists(folder):
        raise UserError(f"{folder} exists: give another --export, or remove it")
    config = their_settings(model.config, (meta.get("hf") or {}).get("model_type"))
    if packed and config["model_type"] == "gpt2":
        raise UserError("mlx-lm keeps the matrices of GPT-2 transposed, which quantized ones cannot be: leave out "
                        "--packed")
    multiply_factors(model)
    temporary = f"{folder.rstrip('/')}.tmp{os.getpid()}"
    os.makedirs(temporary)
    try:
        arrays = {}
        tensors = their_arrays(model, config["model_type"])
        for name, array in tqdm(tensors, unit=" tensors", disable=None, dynamic_ncols=True):
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
        if packed:
            files["config.json"] |= their_quantization(model, config["model_type"], arrays)
        more = tokenizer_files(meta)
        if meta.get("tokenizer") and not more:
            print("tokenizer.json is not written: a tokenizer of characters has no counterpart there")
        files["config.json"] |= more.pop("config.json", {})
        for name, content in (files | more).items():
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


READERS = {"awq": "awq_reader.py", "gptq": "gptq_reader.py", "compressed-tensors": "compressed_reader.py"}


def check_quantization(found: dict, where: str):
    """UserError unless the settings of a config.json are mlx-lm's, with formats that are read here, or GPT-OSS's."""
    method = found.get("quant_method", "mlx-lm") if isinstance(found, dict) else found
    if method in READERS:
        raise UserError(f"{where}: the model is packed by {method}: read it with {READERS[method]}")
    if method not in ("mlx-lm", "mxfp4"):
        raise UserError(f"{where}: the model is packed by {method!r}, which has no reader here: take the original "
                        "model")
    for name, settings in {"quantization": found, **found}.items():
        mode = settings.get("mode", "affine") if isinstance(settings, dict) else "affine"
        if mode not in ("affine", "mxfp4"):
            raise UserError(f"{where}: {name} has mode={mode!r}, which cannot be read, only affine and mxfp4")


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
    if quantization := folder.raw.get("quantization_config") or folder.raw.get("quantization"):  # mlx-lm's
        check_quantization(quantization, os.path.join(source, "config.json"))
    if name := next((name for name in sorted(folder.names) if name.endswith(".qweight")), ""):
        raise UserError(f"{folder.file_of(name)}: {name} is packed: read it with awq_reader.py or gptq_reader.py")
    config = model_config(folder.raw, os.path.join(source, "config.json"))
    tokenizer, more = tokenizer_of(folder)
    more["hf"] = {**more.get("hf", {}), "model_type": folder.raw["model_type"]}
    write_checkpoint(out, config, read_model(config, folder), tokenizer, more)
