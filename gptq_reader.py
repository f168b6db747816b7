"""A folder that GPTQ packed into a checkpoint of this collection, which stays packed.

    python gptq_reader.py Llama-3.2-1B-GPTQ llama.safetensors
    python gptq_reader.py Llama-3.2-1B-GPTQ llama.safetensors --dense=True

GPTQ (Frantar et al. 2023), as AutoGPTQ and GPTQModel write it, stores integers q of 2, 3, 4 or 8 bits, with a scale and
a zero point for each group of inputs: w = (q - zero) scale. The integers are repacked into MLX's layout, w = scale q +
bias with bias = -scale zero, without rounding. The first version of the format stores zero - 1, the second one zero.
Where a group's inputs are not neighbours (desc_act), the layer keeps its columns in the order of the groups, and the
model brings the inputs into this order. GPTQModel's rules for single modules (dynamic) are followed.
"""
import os
import re
from collections.abc import Callable

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np

import readers
from config import UserError, overrides

source = ""  # a folder with config.json
out = "model.safetensors"  # the checkpoint to be written
scale_dtype = "float32"  # of scales and biases: float32 | float16, which rounds the biases
dense = False  # unpack to float16

settings = overrides(globals(), "source", "out")

# ---- layouts ---------------------------------------------------------------------------------------------------------


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """uint32 (n, m) -> uint8 (n, 32 m / bits): fields of `bits` bits each, low bits first; one may span two words."""
    words = words.reshape(len(words), -1, 3 if bits == 3 else 1)
    q = np.empty((*words.shape[:2], words.shape[2] * 32 // bits), np.uint8)
    for i in range(q.shape[2]):
        word, shift = divmod(bits * i, 32)
        q[:, :, i] = words[:, :, word] >> shift & (2**bits - 1)
        if shift + bits > 32:
            q[:, :, i] |= (words[:, :, word + 1] << (32 - shift) & (2**bits - 1)).astype(np.uint8)
    return q.reshape(len(words), -1)


def pack(q: np.ndarray, bits: int) -> np.ndarray:
    """uint8 (n, m) -> uint32 (n, m bits / 32): the inverse of unpack()."""
    width = 3 if bits == 3 else 1
    q = q.reshape(len(q), -1, width * 32 // bits)
    words = np.zeros((*q.shape[:2], width), np.uint32)
    for i in range(q.shape[2]):
        word, shift = divmod(bits * i, 32)
        field = q[:, :, i].astype(np.uint32)
        words[:, :, word] |= field << shift
        if shift + bits > 32:
            words[:, :, word + 1] |= field >> (32 - shift)
    return words.reshape(len(q), -1)


def zeros_of(qzeros: np.ndarray, bits: int, version: int) -> np.ndarray:
    """Zero points: int32 (groups, out bits / 32) -> (groups, out). Version 1 stores zero - 1. It subtracts in whole
    words, so that a zero point of 0 borrows from the next one; only at 3 bits, where a field may span two words, it
    subtracts field by field."""
    words = qzeros.view(np.uint32)
    if version == 2:
        return unpack(words, bits)
    if bits == 3:
        return (unpack(words, 3) + 1) % 8
    return unpack(words + np.uint32({2: 0x55555555, 4: 0x11111111, 8: 0x01010101}[bits]), bits)


# ---- a layer of a folder ---------------------------------------------------------------------------------------------


def bits_of(settings: dict, name: str, where: str) -> int:
    """The bits of a module. `dynamic` holds settings of single modules by regular expressions, of which the first that
    matches the beginning of the name counts; "+:" may stand before one, and "-:" before one of modules that are not
    quantized."""
    bits, form = settings.get("bits"), settings.get("checkpoint_format") or settings.get("format") or "gptq"
    try:
        rules = [(rule.removeprefix("+:"), own) for rule, own in (settings.get("dynamic") or {}).items()
                 if not rule.startswith("-:")]
        bits = next((own.get("bits", bits) for rule, own in rules if re.match(rule, name)), bits)
    except (re.error, AttributeError) as error:
        raise UserError(f"{where}: dynamic holds a rule that cannot be read ({error}): copy it again") from error
    if type(bits) is not int or bits not in (2, 3, 4, 8) or form not in ("gptq", "gptq_v2"):
        raise UserError(f"{where}: {bits} bits in the format {form!r} cannot be read, only 2, 3, 4, 8 in gptq, gptq_v2")
    return bits


def reader(settings: dict, where: str) -> Callable[[readers.Folder, str], dict[str, mx.array]]:
    """The function that readers.read_model calls for each linear layer. settings: quantization_config."""
    form = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    bits_of(settings, "", where)

    def linear(source: readers.Folder, name: str) -> dict[str, mx.array]:
        if f"{name}.qweight" not in source.names:
            return readers.dense_linear(source, name)
        bits = bits_of(settings, name, where)
        (qweight, qzeros, scales), file = readers.packed_parts(source, name), source.file_of(f"{name}.qweight")
        (rows, outputs), groups = qweight.shape, len(scales)
        inputs = rows * 32 // bits
        width = inputs // max(1, groups)
        if rows * 32 % bits or not groups or inputs % (32 * groups) or scales.shape[1] != outputs or (
                outputs * bits % 32 or qzeros.shape != (groups, outputs * bits // 32)):
            raise UserError(f"{file}: {name} has qweight {qweight.shape}, qzeros {qzeros.shape}, scales {scales.shape},"
                            f" which do not fit one another at {bits} bits, in groups of a multiple of 32")
        words, order = np.ascontiguousarray(qweight.T).view(np.uint32), None
        if f"{name}.g_idx" in source.names:
            group = np.array(source[f"{name}.g_idx"].astype(mx.int32))
            if group.shape != (inputs,) or not np.array_equal(np.sort(group), np.arange(inputs) // width):
                raise UserError(f"{file}: {name}.g_idx does not share {inputs} inputs among {groups} equal groups")
            if (np.diff(group) < 0).any():
                order = np.argsort(group, kind="stable").astype(np.int32)
                words = pack(unpack(words, bits)[:, order], bits)
        zeros = zeros_of(qzeros, bits, 2 if form == "gptq_v2" else 1).T
        found = readers.packed_linear(words, zeros, scales.T, bits, scale_dtype, dense)
        if order is not None and dense:
            found["weight"] = found["weight"][:, mx.array(np.argsort(order))]
        elif order is not None:
            found["order"] = mx.array(order)
        return found | ({"bias": source[f"{name}.bias"]} if f"{name}.bias" in source.names else {})

    return linear


# ---- run -------------------------------------------------------------------------------------------------------------

if not source:
    raise UserError("there is nothing to read: give a folder that AutoGPTQ or GPTQModel wrote")
if scale_dtype not in ("float32", "float16"):
    raise UserError(f"scale_dtype={scale_dtype!r} is not one of float32, float16")
readers.check_out(out, source)
folder = readers.open_folder(source)
where = os.path.join(source, "config.json")
linear = reader(readers.quantization(folder, "gptq", ("bits", "checkpoint_format", "dynamic", "format")), where)
config = readers.model_config(folder.raw, where)
tokenizer, more = readers.tokenizer_of(folder)
more["hf"] = {**more.get("hf", {}), "model_type": folder.raw["model_type"]}
readers.write_checkpoint(out, config, readers.read_model(config, folder, linear), tokenizer, more)
