"""A folder that AutoAWQ packed into a checkpoint of this collection, which stays packed.

    python awq_reader.py Llama-3.2-1B-AWQ llama.safetensors
    python awq_reader.py Llama-3.2-1B-AWQ llama.safetensors --dense=True

AWQ (Lin et al. 2024) stores integers q of 4 bits with a scale and a zero point for each group of inputs: w = (q - zero)
scale. The integers are repacked into MLX's layout, w = scale q + bias with bias = -scale zero: nothing is rounded, and
no layer is unpacked to floating point on the way. Both of AutoAWQ's layouts are read, GEMM and GEMV. Layers that
AutoAWQ did not pack, often the unembedding, stay as they are.
"""
import os
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

COLUMN_OF_NIBBLE = [0, 2, 4, 6, 1, 3, 5, 7]  # GEMM: nibble i of a word, from the low bits on, belongs to this column


def nibbles(words: np.ndarray, columns: list[int]) -> np.ndarray:
    """int32 (n, m) -> uint8 (n, 8 m): the eight nibbles of each word; the i-th goes to columns[i]."""
    words = words.view(np.uint32)
    found = np.empty((*words.shape, 8), np.uint8)
    for i, column in enumerate(columns):
        found[:, :, column] = words >> (4 * i) & 15
    return found.reshape(len(words), -1)


def pack(q: np.ndarray) -> np.ndarray:
    """uint8 (n, m) of 4 bits -> uint32 (n, m / 8), low bits first, which is MLX's layout."""
    return np.ascontiguousarray(q[:, ::2] | q[:, 1::2] << 4).view("<u4")


def from_gemm(qweight, qzeros, scales) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """qweight (in, out / 8), qzeros (groups, out / 8), scales (groups, out) -> words (out, in / 8), zeros and scales
    (out, groups)."""
    q, zeros = nibbles(qweight, COLUMN_OF_NIBBLE), nibbles(qzeros, COLUMN_OF_NIBBLE)
    return pack(q.T), zeros.T, scales.T


def from_gemv(qweight, qzeros, scales, groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As from_gemm(), of qweight (out, in / 8), which is in MLX's layout already, qzeros (out, words) and scales (out,
    8 words); the last two end in padding."""
    return qweight.view(np.uint32), nibbles(qzeros, range(8))[:, :groups], scales[:, :groups]


# ---- a layer of a folder ---------------------------------------------------------------------------------------------


def reader(settings: dict, where: str) -> Callable[[readers.Folder, str], dict[str, mx.array]]:
    """The function that readers.read_model calls for each linear layer. settings: quantization_config."""
    version, bits = str(settings.get("version", "gemm")).lower(), settings.get("bits", settings.get("w_bit", 4))
    if bits != 4 or version not in ("gemm", "gemv"):
        raise UserError(f"{where}: {bits} bits in the layout {version!r} cannot be read, only gemm and gemv of 4 bits")
    group_size = settings.get("group_size", settings.get("q_group_size", 128))
    if type(group_size) is not int or group_size < 1 and group_size != -1:
        raise UserError(f"{where}: group_size={group_size!r} is neither a number of inputs nor -1, which means all")

    def linear(source: readers.Folder, name: str) -> dict[str, mx.array]:
        if f"{name}.qweight" not in source.names:
            return readers.dense_linear(source, name)
        qweight, qzeros, scales = readers.packed_parts(source, name)
        if version == "gemm":
            (inputs, outputs), shapes = qweight.shape, (qzeros.shape, scales.shape)
            outputs *= 8
            groups = 1 if group_size == -1 else inputs // group_size
            fits = shapes == ((groups, outputs // 8), (groups, outputs))
        else:
            (outputs, inputs), words = qweight.shape, qzeros.shape[1]
            inputs *= 8
            groups = 1 if group_size == -1 else inputs // group_size
            fits = words * 8 >= groups and qzeros.shape[0] == outputs and scales.shape == (outputs, 8 * words)
        if not fits or not groups or inputs % (32 * groups):
            raise UserError(f"{source.file_of(f'{name}.qweight')}: {name} has qweight {qweight.shape}, qzeros "
                            f"{qzeros.shape}, scales {scales.shape}, which do not fit one another in groups of "
                            f"{group_size}, layout {version}; groups must be multiples of 32")
        parts = from_gemm(qweight, qzeros, scales) if version == "gemm" else from_gemv(qweight, qzeros, scales, groups)
        found = readers.packed_linear(*parts, 4, scale_dtype, dense)
        return found | ({"bias": source[f"{name}.bias"]} if f"{name}.bias" in source.names else {})

    return linear


# ---- run -------------------------------------------------------------------------------------------------------------

if not source:
    raise UserError("there is nothing to read: give a folder that AutoAWQ wrote")
if scale_dtype not in ("float32", "float16"):
    raise UserError(f"scale_dtype={scale_dtype!r} is not one of float32, float16")
readers.check_out(out, source)
folder = readers.open_folder(source)
where = os.path.join(source, "config.json")
linear = reader(readers.quantization(folder, "awq", ("bits", "group_size", "version")), where)
config = readers.model_config(folder.raw, where)
tokenizer, more = readers.tokenizer_of(folder)
more["hf"] = {**more.get("hf", {}), "model_type": folder.raw["model_type"]}
readers.write_checkpoint(out, config, readers.read_model(config, folder, linear), tokenizer, more)
