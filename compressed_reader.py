"""A folder that compressed-tensors packed (by llm-compressor, for vLLM) into a checkpoint of this collection, which
stays packed.

    python compressed_reader.py Llama-3.2-1B-W4A16 llama.safetensors
    python compressed_reader.py Llama-3.2-1B-W4A16 llama.safetensors --dense=True

The format is pack-quantized: integers q of 2 to 8 bits with a scale, and a zero point where it is not symmetric, for
each group of inputs or for each output, w = (q - zero) scale. The integers already stand as in MLX's layout, w = scale
q + bias with bias = -scale zero: nothing is rounded. Layers that were ignored stay as they are. Formats that also
quantize activations are refused, since their logits would differ.
"""
import os

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np

import readers
from config import UserError, overrides
from quantized import BITS

source = ""  # a folder with config.json
out = "model.safetensors"  # the checkpoint to be written
scale_dtype = "float32"  # of scales and biases: float32 | float16, which rounds the biases
dense = False  # unpack to float16

settings = overrides(globals(), "source", "out")

# ---- a layer of a folder ---------------------------------------------------------------------------------------------


def unpack(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """uint32 (n, m) -> (n, count): the first `count` integers of so many bits in each row, low bits first."""
    found = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")[:, :count * bits]
    return found.reshape(len(words), count, bits) @ (1 << np.arange(bits))


def linear(source: readers.Folder, name: str) -> dict[str, mx.array]:
    """What readers.read_model calls for each linear layer. Its bits and groups follow from the shapes."""
    if f"{name}.weight_packed" not in source.names:
        return readers.dense_linear(source, name)
    file, found = source.file_of(f"{name}.weight_packed"), {}
    for part in ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point"):
        if part != "weight_zero_point" or f"{name}.{part}" in source.names:
            found[part] = source[f"{name}.{part}"]
    words, scales = found["weight_packed"], found["weight_scale"]
    if words.dtype != mx.int32 or words.ndim != 2 or scales.ndim != 2 or scales.dtype not in readers.NOT_FINITE:
        raise UserError(f"{file}: {name}.weight_packed and weight_scale are not matrices of int32 and floats")
    outputs, inputs = (*found["weight_shape"].reshape(-1).tolist(), 0, 0)[:2]
    groups = max(1, scales.shape[1])
    bits = words.shape[1] * 32 // max(1, inputs)
    if bits not in BITS or words.shape != (outputs, inputs * bits // 32) or len(scales) != outputs or inputs % (
            32 * groups):
        raise UserError(f"{file}: {name} has weight_packed {words.shape}, weight_scale {scales.shape} and weight_shape "
                        f"({outputs}, {inputs}), which do not fit one another in groups of a multiple of 32")
    zeros = np.full((outputs, groups), 2 ** (bits - 1))
    if "weight_zero_point" in found:
        packed = np.array(found["weight_zero_point"])
        if packed.dtype == np.int32 and packed.shape == (-(-outputs * bits // 32), groups):
            zeros = unpack(packed.T, bits, outputs).T
        elif packed.dtype == np.int8 and packed.shape == zeros.shape:  # of older versions
            zeros = zeros + packed
        else:
            raise UserError(f"{file}: {name}.weight_zero_point has shape {packed.shape}, which does not fit")
    scales = np.array(scales.astype(mx.float32))
    found = readers.packed_linear(np.array(words).view(np.uint32), zeros, scales, bits, scale_dtype, dense)
    return found | ({"bias": source[f"{name}.bias"]} if f"{name}.bias" in source.names else {})


def check_scheme(settings: dict, where: str):
    """UserError for a format that cannot be read, or activations that are quantized too."""
    groups = settings.get("config_groups")
    groups = groups if isinstance(groups, dict) else {}
    forms = {settings.get("format"), *(group.get("format") for group in groups.values() if isinstance(group, dict))}
    if other := forms - {"pack-quantized", None}:
        raise UserError(f"{where}: the format {min(map(str, other))} cannot be read, only pack-quantized")
    for name, group in groups.items():
        if isinstance(group, dict) and (group.get("input_activations") or group.get("output_activations")):
            raise UserError(f"{where}: {name} quantizes activations too, which cannot be done here: take a model of "
                            "which only the weights are quantized, such as W4A16")
    for name in ("kv_cache_scheme", "transform_config"):
        if settings.get(name):
            raise UserError(f"{where}: {name} is not supported: take a model without it")
    if settings.get("sparsity_config") and settings["sparsity_config"].get("format") not in (None, "dense"):
        raise UserError(f"{where}: sparse weights cannot be read: take a model with dense ones")


# ---- run -------------------------------------------------------------------------------------------------------------

if not source:
    raise UserError("there is nothing to read: give a folder that compressed-tensors packed")
if scale_dtype not in ("float32", "float16"):
    raise UserError(f"scale_dtype={scale_dtype!r} is not one of float32, float16")
readers.check_out(out, source)
folder = readers.open_folder(source)
where = os.path.join(source, "config.json")
check_scheme(readers.quantization(folder, "compressed-tensors", ("config_groups", "format")), where)
config = readers.model_config(folder.raw, where)
tokenizer, more = readers.tokenizer_of(folder)
more["hf"] = {**more.get("hf", {}), "model_type": folder.raw["model_type"]}
readers.write_checkpoint(out, config, readers.read_model(config, folder, linear), tokenizer, more)
