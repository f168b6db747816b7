"""A folder that GPTQ packed, into a checkpoint of this collection that stays packed.

    python gptq_reader.py Llama-3.2-1B-GPTQ llama.safetensors
    python gptq_reader.py Llama-3.2-1B-GPTQ llama.safetensors --dense=True

GPTQ (Frantar et al. 2023), as AutoGPTQ and GPTQModel write it: integers q of 2, 3, 4 or 8 bits, with a scale and a zero
point for each group of inputs, w = (q - zero) scale. The integers go into MLX's layout, w = scale q + bias with bias =
-scale zero, as they are. The first version of the format stores zero - 1, the second zero. Where groups were made of
inputs in another order (desc_act), the layer keeps its columns in the order of the groups, and the model takes its
inputs in that order.
"""
import os
from collections.abc import Callable

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np

import hub
from config import UserError, overrides

source = ""  # a folder with config.json
out = "model.safetensors"  # the checkpoint to be written
scale_dtype = "float32"  # of scales and biases: float32 | float16, which rounds the biases
dense = False  # unpack to float16

settings = overrides(globals(), "source", "out")

# ---- layouts ---------------------------------------------------------------------------------------------------------


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """uint32 (n, m) -> uint8 (n, 32 m / bits): fields of so many bits, low bits first, over the words' borders."""
    stream = np.unpackbits(np.ascontiguousarray(words).astype("<u4").view(np.uint8), axis=1, bitorder="little")
    return np.packbits(stream.reshape(len(words), -1, bits), axis=2, bitorder="little")[:, :, 0]


def pack(q: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of unpack."""
    stream = np.unpackbits(q[:, :, None], axis=2, bitorder="little")[:, :, :bits]
    return np.packbits(stream.reshape(len(q), -1), axis=1, bitorder="little").view("<u4")


def zeros_of(qzeros: np.ndarray, bits: int, version: int) -> np.ndarray:
    """int32 (groups, out bits / 32) -> (groups, out). Version 1 had 1 taken from each: from the word as a whole, so
    that a zero point of 0 borrowed from its neighbour; but at 3 bits, where fields go over the words' borders."""
    words = qzeros.view(np.uint32)
    if version == 2:
        return unpack(words, bits)
    if bits == 3:
        return (unpack(words, 3) + 1) % 8
    return unpack(words + np.uint32({2: 0x55555555, 4: 0x11111111, 8: 0x01010101}[bits]), bits)


# ---- a layer of a folder ---------------------------------------------------------------------------------------------


def reader(settings: dict, where: str) -> Callable[[hub.Folder, str], dict[str, mx.array]]:
    """What hub.read_model calls for each linear layer. settings: quantization_config."""
    bits, form = settings.get("bits"), settings.get("checkpoint_format") or "gptq"
    if settings.get("quant_method", "gptq") != "gptq":
        raise UserError(f"{where}: quant_method is {settings['quant_method']!r}, not gptq: take that one's reader")
    if bits not in (2, 3, 4, 8) or form not in ("gptq", "gptq_v2"):
        raise UserError(f"{where}: {bits} bits in the format {form!r}; gptq and gptq_v2 of 2, 3, 4, 8 bits are read")

    def linear(source: hub.Folder, name: str) -> dict[str, mx.array]:
        if f"{name}.qweight" not in source.names:
            return hub.dense_linear(source, name)
        qweight, qzeros = (np.array(source[f"{name}.{part}"]) for part in ("qweight", "qzeros"))
        scales, file = np.array(source[f"{name}.scales"].astype(mx.float32)), source.file_of(f"{name}.qweight")
        matrices = all(array.ndim == 2 for array in (qweight, qzeros, scales))
        if not matrices or {qweight.dtype, qzeros.dtype} != {np.dtype(np.int32)}:
            raise UserError(f"{file}: {name}.qweight, qzeros and scales are not matrices of int32 and floats")
        (rows, outputs), groups = qweight.shape, len(scales)
        inputs = rows * 32 // bits
        width = inputs // max(1, groups)
        if rows * 32 % bits or not groups or inputs % groups or scales.shape[1] != outputs or (
                qzeros.shape != (groups, outputs * bits // 32)):
            raise UserError(f"{file}: {name} has qweight {qweight.shape}, qzeros {qzeros.shape}, scales {scales.shape},"
                            f" which do not fit one another at {bits} bits")
        words, order = np.ascontiguousarray(qweight.T).view(np.uint32), None
        if f"{name}.g_idx" in source.names:
            group = np.array(source[f"{name}.g_idx"])
            if group.shape != (inputs,) or not np.array_equal(np.sort(group), np.arange(inputs) // width):
                raise UserError(f"{file}: {name}.g_idx does not share {inputs} inputs among {groups} equal groups")
            if (np.diff(group) < 0).any():
                order = np.argsort(group, kind="stable").astype(np.int32)
                words = pack(unpack(words, bits)[:, order], bits)
        zeros = zeros_of(qzeros, bits, 2 if form == "gptq_v2" else 1).T
        found = hub.packed_linear(words, zeros, scales.T, bits, scale_dtype, dense)
        if order is not None and dense:
            found["weight"] = found["weight"][:, mx.array(np.argsort(order))]
        elif order is not None:
            found["order"] = mx.array(order)
        return found | ({"bias": source[f"{name}.bias"]} if f"{name}.bias" in source.names else {})

    return linear


# ---- run -------------------------------------------------------------------------------------------------------------

if not source:
    raise UserError("nothing to read: give a folder that AutoGPTQ or GPTQModel wrote")
if scale_dtype not in ("float32", "float16"):
    raise UserError(f"scale_dtype={scale_dtype!r} is not one of float32, float16")
folder = hub.open_folder(source)
where = os.path.join(source, "config.json")
if not folder.raw.get("quantization_config"):
    raise UserError(f"{where} has no quantization_config: the model is not packed; read it with hf_reader.py")
config = hub.model_config(folder.raw, where)
linear = reader(folder.raw["quantization_config"], where)
tokenizer, more = hub.tokenizer_of(folder)
more["script"] = "gptq_reader.py"
hub.write_checkpoint(out, config, hub.read_model(config, folder, linear), tokenizer, more)
