"""A GGUF file, as llama.cpp runs it, into a checkpoint of this collection, and back into a GGUF file.

    python gguf_reader.py model.gguf model.safetensors
    python gguf_reader.py out/ckpt.safetensors --export=model.gguf --type=Q8_0

It reads the architectures llama (with rope scaling, biases, and Mixtral's experts), qwen2, qwen3, qwen3moe, gemma,
gemma2, gemma3, phi2, phi3, olmo2, smollm3, stablelm, granite, gptneox and gpt2. Of a model in several files, give the
first one, NAME-00001-of-0000N.gguf. A setting that is not known here is refused, unless its value turns it off.

Tensors of the types F32, F16 and BF16 keep their dtype. These stay packed, since MLX's layout holds them: Q4_0, Q4_1,
Q5_0, Q5_1, Q8_0, MXFP4 (in 5 bits), IQ4_NL (in 8 bits), TQ1_0 and TQ2_0 (in 2 bits) exactly; Q4_K and Q5_K with scales
rounded to float16, unless --scale_dtype=float32. All other types, such as Q6_K, whose groups of 16 MLX does not have,
become float16; --bits quantizes them again, with a loss.

It writes matrices of the type --type; of 4 and 5 bits, embedding and unembedding as Q8_0. A layer that is quantized in
the checkpoint stays as it is where a type of GGUF holds it: 2 to 4 bits in Q4_0 or Q4_1, 5 bits in Q5_0 or Q5_1, 8 bits
in Q8_0 if one number is both scale and bias.
"""
import errno
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from config import UserError, overrides
from gguf_tokenizer import add_tokenizer, tokenizer_of
from model import GPT, Experts, GPTConfig, load_checkpoint, rope_inv_freq
from quantized import dense_weight
from readers import (
    FUSED,
    GGUF,
    MOST_LAYERS,
    ROPE_SETTINGS,
    SIZES,
    check_export,
    check_finite,
    check_out,
    check_spelling,
    check_unknown,
    checked,
    multiply_factors,
    skeleton,
    their_name,
    write_checkpoint,
)

source = ""  # a .gguf file, the first one of several; with --export: a checkpoint
out = "model.safetensors"  # the checkpoint to be written
bits = 0  # quantize tensors that do not stay packed again, to 2 | 3 | 4 | 5 | 6 | 8 bits; 0: float16
scale_dtype = "float16"  # of the scales of Q4_K and Q5_K: float16, which rounds them | float32
dense = False  # unpack all tensors, to float16
export = ""  # a .gguf file to be written, instead of `out`
type = "F16"  # of the matrices in it: F32 | F16 | BF16 | Q8_0 | Q5_1 | Q5_0 | Q4_1 | Q4_0

settings = overrides(globals(), "source", "out")

try:
    import gguf
except ImportError as error:
    raise UserError("the gguf package is missing: pip install gguf") from error

# ---- types -----------------------------------------------------------------------------------------------------------

DENSE = ("F32", "F16", "BF16")  # types whose numbers are not changed
# Types that MLX's layout holds, with the bits of q there: w = scale q + bias, with one scale and bias for each group of
# 32 weights (TQ: 128). IQ4_NL and MXFP4 have tables of 16 values, which are integers up to a factor.
PACKED = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8, "Q4_K": 4, "Q5_K": 5, "MXFP4": 5, "IQ4_NL": 8,
          "TQ1_0": 2, "TQ2_0": 2}
ROUNDED = ("Q4_K", "Q5_K")  # types whose scales are products of a float16 and an integer, and are rounded to float16
PIECE = 2**22  # bytes of a tensor that are converted at a time


def to_words(q: np.ndarray, bits: int) -> np.ndarray:
    """uint8 (n, m) -> uint32 (n, m bits / 32), MLX's layout: the integers without gaps, each with its lowest bit first.
    Eight integers fill `bits` bytes."""
    eight = q.reshape(len(q), -1, 8)
    found = np.zeros(eight.shape[:2], "<u8")
    for i in range(8):
        found |= eight[..., i].astype("<u8") << np.uint64(bits * i)
    found = found.view(np.uint8).reshape(*found.shape, 8)[..., :bits]
    return np.ascontiguousarray(found).reshape(len(q), -1).view("<u4")


def from_words(words: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of to_words()."""
    pieces = np.ascontiguousarray(words).view(np.uint8).reshape(len(words), -1, bits)
    eight = np.zeros((*pieces.shape[:2], 8), np.uint8)
    eight[..., :bits] = pieces
    found = eight.view("<u8") >> np.arange(0, 8 * bits, bits, dtype=np.uint64) & np.uint64(2**bits - 1)
    return found.astype(np.uint8).reshape(len(words), -1)


def halves(blocks: np.ndarray) -> np.ndarray:
    """The float16 at the beginning of each block, uint8 (n, blocks, 2) -> float32 (n, blocks)."""
    return np.ascontiguousarray(blocks).view("<f2")[..., 0].astype(np.float32)


def nibbles(blocks: np.ndarray) -> np.ndarray:
    """uint8 (..., bytes) -> (..., 2 bytes): of each block the low nibbles, then the high ones."""
    return np.concatenate([blocks & 15, blocks >> 4], axis=-1)


def integers(blocks: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of blocks, uint8 (n, blocks, bytes) -> q (n, blocks, ...), uint8; scales and biases (n, blocks) or (n,
    blocks, groups of a block), float32."""
    d = halves(blocks[..., :2])
    if kind in ("Q4_0", "Q4_1"):  # d (q - 8); d q + m
        return nibbles(blocks[..., -16:]), d, -8 * d if kind == "Q4_0" else halves(blocks[..., 2:4])
    if kind in ("Q5_0", "Q5_1"):  # d (q - 16); d q + m. The fifth bits stand before the others
        fifth = np.unpackbits(blocks[..., -20:-16], axis=-1, bitorder="little")
        return nibbles(blocks[..., -16:]) | fifth << 4, d, -16 * d if kind == "Q5_0" else halves(blocks[..., 2:4])
    if kind == "Q8_0":  # d q, with q from -128 on: ^ 128 adds 128
        return blocks[..., 2:] ^ 128, d, -128 * d
    if kind in ("Q4_K", "Q5_K"):  # d s q - dmin m, with s and m of 6 bits for each of 8 groups
        a, b, c = (blocks[..., i:i + 4] for i in (4, 8, 12))
        s = np.concatenate([a & 63, c & 15 | a >> 6 << 4], axis=-1)
        m = np.concatenate([b & 63, c >> 4 | b >> 6 << 4], axis=-1)
        q = nibbles(blocks[..., -128:].reshape(*blocks.shape[:2], 4, 32)).reshape(*blocks.shape[:2], 8, 32)
        if kind == "Q5_K":
            q |= (blocks[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1) << 4
        return q, d[..., None] * s, -halves(blocks[..., 2:4])[..., None] * m
    if kind == "MXFP4":  # a power of 2, and twice the values of FP4, from -12 to 12
        d = gguf.quants.MXFP4.e8m0_to_fp32_half(blocks[..., 0])
        return np.array(gguf.quants.MXFP4.kvalues, np.int8).astype(np.uint8)[nibbles(blocks[..., 1:])] + 12, d, -12 * d
    if kind == "IQ4_NL":
        values = np.array(gguf.quants.IQ4_NL.kvalues, np.int8).view(np.uint8) ^ 128
        return values[nibbles(blocks[..., 2:])], d, -128 * d
    found = gguf.quants.dequantize(blocks.reshape(len(blocks), -1), gguf.GGMLQuantizationType[kind])  # TQ: d (q - 1)
    d = np.repeat(halves(blocks[..., -2:]), 2, axis=1)  # for groups of 128
    return np.rint(found / np.where(d == 0, 1, d).repeat(128, axis=1) + 1).astype(np.uint8), d, -d


def packed(data: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of blocks, uint8 (out, bytes) -> words (out, in bits / 32), scales and biases (out, groups). The scales are
    float16, which is exact but for ROUNDED, or scale_dtype."""
    _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    q, *scales = integers(data.reshape(len(data), -1, size), kind)
    dtype = scale_dtype if kind in ROUNDED else "float16"
    with np.errstate(over="ignore"):  # infinite scales are found later
        scales = [array.reshape(len(data), -1).astype(dtype) for array in scales]
    return to_words(q.reshape(len(data), -1), PACKED[kind]), *scales


def unpacked(data: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Rows of blocks of any type, uint8 (out, bytes) -> float16 (out, in)."""
    with np.errstate(over="ignore"):
        return gguf.quants.dequantize(data, kind).astype(np.float16)


def by_pieces(convert: Callable, *arrays: np.ndarray) -> list[np.ndarray]:
    """The results of convert(), a list of arrays, for all rows of the arrays, computed for some rows at a time: the
    numbers in between are several times as large."""
    n, found = len(arrays[0]), []
    step = max(1, PIECE // max(1, arrays[0][:1].nbytes))
    for start in range(0, n, step):
        for i, part in enumerate(convert(*(array[start:start + step] for array in arrays))):
            if start == 0:
                found.append(np.empty((n, *part.shape[1:]), part.dtype))
            found[i][start:start + step] = part
    return found


def arrays_of(kind: gguf.GGMLQuantizationType, data: np.ndarray, linear: bool) -> dict[str, np.ndarray | mx.array]:
    """The weight of a tensor, by its type and rows of blocks (..., bytes); of a quantized one also scales and biases.
    Of experts, all arrays have one more dimension, the first."""
    if kind.name in ("F32", "F16"):
        return {"weight": data}
    if kind.name == "BF16":
        return {"weight": mx.array(np.ascontiguousarray(data).view(np.uint16)).view(mx.bfloat16)}
    rows, names = data.reshape(-1, data.shape[-1]), ("weight", "scales", "biases")
    if kind.name in PACKED and linear and not dense:
        found = by_pieces(lambda part: packed(part, kind.name), rows)
    elif bits and linear:
        group_size = 64 if gguf.quants.quant_shape_from_byte_shape(data.shape, kind)[-1] % 64 == 0 else 32
        found = by_pieces(lambda part: [*map(np.array, mx.quantize(mx.array(unpacked(part, kind)), group_size, bits))],
                          rows)
    else:
        found = by_pieces(lambda part: [unpacked(part, kind)], rows)
    return {name: array.reshape(*data.shape[:-1], -1) for name, array in zip(names, found, strict=False)}


def held_as(module: nn.Module) -> str | None:
    """The type that holds a quantized layer as it is, or with scales rounded to float16. None if there is none, or the
    layer is not quantized."""
    if "scales" not in module or "order" in module or dense:
        return None
    scales, biases = module.scales.astype(mx.float32), module.biases.astype(mx.float32)
    if mx.maximum(mx.abs(scales).max(), mx.abs(biases).max()).item() > 65504:
        return None
    zero = {4: 8, 5: 16, 8: 128}.get(module.bits, 0)
    even = zero and mx.array_equal(biases, -zero * scales).item()  # one number is both scale and bias
    return {2: "Q4_1", 3: "Q4_1", 4: "Q4_0" if even else "Q4_1", 5: "Q5_0" if even else "Q5_1",
            8: "Q8_0" if even else None}.get(module.bits)


def blocks_of(module: nn.Module, kind: str) -> np.ndarray:
    """The rows of blocks, uint8 (..., out, bytes), of a quantized layer, in the type that held_as() found. A group of
    64 or 128 weights becomes several groups."""
    words, scales, biases = (np.array(x).reshape(-1, x.shape[-1]) for x in (
        module.weight, module.scales.astype(mx.float16), module.biases.astype(mx.float16)))

    def convert(words, scales, biases):
        q = from_words(words, module.bits).reshape(len(words), -1, 32)
        parts = [np.repeat(x, module.group_size // 32, axis=1)[..., None].view(np.uint8)
                 for x in ((scales, biases) if kind.endswith("_1") else (scales,))]
        if kind.startswith("Q5"):
            parts.append(np.packbits(q >> 4, axis=-1, bitorder="little"))
        parts.append(q ^ 128 if kind == "Q8_0" else q[..., :16] & 15 | q[..., 16:] << 4)
        return [np.concatenate(parts, axis=-1).reshape(len(words), -1)]

    return by_pieces(convert, words, scales, biases)[0].reshape(*module.weight.shape[:-1], -1)


def rows_in_halves(x, n_head: int):
    """The rows of a q or k matrix in the order of this collection: rotary positions turn row i of a head together with
    row i + D/2, and in llama.cpp's order row 2i with row 2i + 1."""
    heads = x.reshape(n_head, -1, 2, *x.shape[1:])
    return heads.swapaxes(1, 2).reshape(x.shape)


def rows_in_pairs(x, n_head: int):
    """The inverse of rows_in_halves()."""
    heads = x.reshape(n_head, 2, -1, *x.shape[1:])
    return heads.swapaxes(1, 2).reshape(x.shape)


# ---- files -----------------------------------------------------------------------------------------------------------

# numpy's names of the types of values in a header; 8 is a string, 9 an array.
NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
STRING, ARRAY = 8, 9


@dataclass
class Tensor:
    """A tensor of a file: its name; type; shape, rows last but one; the file's path; and the place of its bytes."""
    name: str
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    path: str
    offset: int

    @property
    def rows(self) -> tuple[tuple[int, ...], str]:
        """The shape and the dtype of its rows of blocks, or of its numbers."""
        per_block, size = gguf.GGML_QUANT_SIZES[self.kind]
        if self.kind.name in ("F32", "F16"):
            return self.shape, {"F32": "<f4", "F16": "<f2"}[self.kind.name]
        if self.shape[-1] % per_block:
            raise ValueError(f"tensor {self.name} has rows of {self.shape[-1]} numbers, in blocks of {per_block}")
        return (*self.shape[:-1], self.shape[-1] // per_block * size), "u1"

    @property
    def nbytes(self) -> int:
        shape, dtype = self.rows
        return math.prod(shape) * np.dtype(dtype).itemsize


def read_header(path: str) -> tuple[dict, list[Tensor]]:
    """The settings and the tensors of one file. ValueError and others if it is damaged. (The package's reader takes 15
    seconds and 700 MB for the 262,144 tokens of Gemma.)"""
    size = os.path.getsize(path)
    with open(path, "rb") as file:

        def take(count: int) -> bytes:
            found = file.read(count) if count <= size else b""
            if len(found) < count:
                raise ValueError("its header is cut short or damaged")
            return found

        def number(dtype: str):
            return np.frombuffer(take(np.dtype(dtype).itemsize), dtype)[0].item()

        def text() -> str:
            return take(int.from_bytes(take(8), "little")).decode()

        def value(kind: int):
            if kind == STRING:
                return text()
            if kind != ARRAY:
                return number(NUMBERS[kind])
            kind, count = number("<u4"), number("<u8")
            if kind in NUMBERS:
                return np.frombuffer(take(count * np.dtype(NUMBERS[kind]).itemsize), NUMBERS[kind]).tolist()
            if count > size:
                raise ValueError(f"it has an array of {count} values")
            return [value(kind) for _ in range(count)]

        if take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        if (version := number("<u4")) not in (2, 3):
            raise ValueError(f"its version is {version}, not 2 or 3")
        n_tensors, n_fields, fields, tensors = number("<u8"), number("<u8"), {}, {}
        if max(n_tensors, n_fields) > size:
            raise ValueError("its header is cut short or damaged")
        for _ in range(n_fields):
            name = text()
            if name in fields:
                raise ValueError(f"it has two settings {name}")
            fields[name] = value(number("<u4"))
        for _ in range(n_tensors):
            name, n_dim = text(), number("<u4")
            if name in tensors or not 0 < n_dim <= 4:
                raise ValueError(f"tensor {name} stands there twice, or has {n_dim} dimensions")
            shape = tuple(number("<u8") for _ in range(n_dim))[::-1]
            kind = gguf.GGMLQuantizationType(number("<u4"))
            tensors[name] = Tensor(name, kind, shape, path, number("<u8"))
        alignment = fields.get("general.alignment", 32)
        start = place = -(-file.tell() // alignment) * alignment
    for tensor in tensors.values():  # they must follow one another without gaps
        tensor.offset += start
        if tensor.offset != place:
            raise ValueError(f"tensor {tensor.name} begins at byte {tensor.offset}, not at {place}")
        if place + tensor.nbytes > size:
            raise ValueError(f"tensor {tensor.name} is cut short")
        place += -(-tensor.nbytes // alignment) * alignment
    if size > place:
        raise ValueError(f"{size - place} bytes belong to no tensor")
    return fields, list(tensors.values())


class File:
    """A GGUF model, in one or several files: `fields`, its settings; `tensors`, by name."""

    def __init__(self, path: str):
        self.path, self.used = path, set()  # used: names of tensors that were read
        self.fields, tensors = self.part(path)
        self.tensors = {tensor.name: tensor for tensor in tensors}
        count = self.fields.get("split.count", 1)
        if count != 1:
            self.add_parts(count)

    def part(self, path: str) -> tuple[dict, list[Tensor]]:
        """read_header(), with UserError for a damaged file."""
        if not os.path.isfile(path):
            raise UserError(f"no file at {path}: give a .gguf file")
        try:
            return read_header(path)
        except Exception as error:  # a damaged file may raise anything
            raise UserError(f"{path} is not a whole GGUF file ({error}): copy it again") from error

    def add_parts(self, count: int):
        """The tensors of the other files of a model in `count` files."""
        match = re.fullmatch(r"(.*-)00001(-of-(\d{5})\.gguf)", self.path, re.S)
        if not match or int(match[3]) != count or self.fields.get("split.no") != 0:
            raise UserError(f"{self.path} is one of {count} parts: give the first one, NAME-00001-of-{count:05}.gguf, "
                            "and keep the others beside it")
        for number in range(2, count + 1):
            path = f"{match[1]}{number:05}{match[2]}"
            if not os.path.isfile(path):
                raise UserError(f"{path} is missing: the model has {count} parts; copy all of them")
            fields, tensors = self.part(path)
            if fields.get("split.no") != number - 1 or fields.get("split.count") != count or any(
                    tensor.name in self.tensors for tensor in tensors):
                raise UserError(f"{path} is no part {number} of {count} of {self.path}: copy all of them again")
            self.tensors |= {tensor.name: tensor for tensor in tensors}
        if self.fields.get("split.tensors.count", len(self.tensors)) != len(self.tensors):
            raise UserError(f"{self.path} and the other parts hold {len(self.tensors)} tensors, not "
                            f"{self.fields['split.tensors.count']}: copy all of them again")

    def tensor(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise UserError(f"{self.path} holds no tensor {name}: it is not whole; copy it again")
        return self.tensors[name]

    def arrays(self, name: str, linear: bool) -> dict:
        """arrays_of() a tensor. linear: whether its layer can be quantized."""
        tensor = self.tensor(name)
        self.used.add(name)
        try:
            shape, dtype = tensor.rows
            data = np.fromfile(tensor.path, dtype, math.prod(shape), offset=tensor.offset)
            return arrays_of(tensor.kind, data.reshape(shape), linear)
        except (ValueError, NotImplementedError, KeyError) as error:
            raise UserError(f"{tensor.path}: tensor {name}, of type {tensor.kind.name}, cannot be read ({error})"
                            ) from error


# ---- architectures ---------------------------------------------------------------------------------------------------

LLAMA = dict(mlp="swiglu", qk_norm=False)
GEMMA = dict(mlp="geglu", qk_norm=False)
# The settings of GPTConfig that follow from the name of an architecture. (Of gptneox, llama.cpp computes gelu's
# approximation by a tanh, though Pythia was trained with gelu.)
ARCHITECTURES = {
    "llama": LLAMA, "qwen2": LLAMA, "qwen3": dict(mlp="swiglu"), "qwen3moe": dict(mlp="swiglu"),
    "gemma": GEMMA, "gemma2": GEMMA | dict(norm_place="both"), "gemma3": dict(mlp="geglu", norm_place="both"),
    "phi2": dict(norm="layer", mlp="gelu_tanh", qk_norm=False, bias=True, parallel=True), "phi3": LLAMA,
    "olmo2": dict(mlp="swiglu", norm_place="after", qk_norm_width=True), "smollm3": LLAMA | dict(rope_pattern="RRRN"),
    "stablelm": LLAMA | dict(norm="layer", norm_bias=True), "granite": LLAMA,
    "gptneox": dict(norm="layer", mlp="gelu", qk_norm=False, bias=True),
    "gpt2": dict(norm="layer", mlp="gelu_tanh", qk_norm=False, bias=True, pos="learned")}
PAIRED = ("llama", "granite", "smollm3")  # they have the rows of q and k in pairs, see rows_in_halves()
TIED = ("gemma", "gemma2")  # they have no unembedding of their own
UNTIED = ("phi2", "olmo2", "stablelm", "gptneox")  # llama.cpp does not read them without one
# Of every so many layers, the last one has no window.
PERIOD = {"gemma2": 2, "gemma3": 6, "olmo2": 4}
# Settings of GPTConfig of which a file may say any value, beside those of all architectures.
FREE = {"llama": ("qkv_bias", "out_bias"), "qwen2": ("qkv_bias",), "phi2": ("rotary_dim",), "phi3": ("rotary_dim",),
        "gemma2": ("sliding_window", "softcap", "attn_softcap"), "gemma3": ("sliding_window", "window_theta"),
        "olmo2": ("sliding_window",), "stablelm": ("qkv_bias", "parallel", "rotary_dim"),
        "granite": ("qkv_bias", "out_bias", "embed_scale", "attn_scale", "residual_scale", "logit_scale"),
        "gptneox": ("parallel", "rotary_dim")}
# The settings that are read or checked, after the architecture's name and a dot; further ones of some architectures;
# and those that no logit depends on.
SETTINGS = ("attention.causal", "attention.head_count", "attention.head_count_kv", "attention.key_length",
            "attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon", "attention.value_length", "block_count",
            "context_length", "embedding_length", "expert_count", "expert_used_count", "feed_forward_length",
            "rope.dimension_count", "rope.freq_base", "rope.scaling.attn_factor", "rope.scaling.factor",
            "rope.scaling.original_context_length", "rope.scaling.type", "rope.scaling.yarn_beta_fast",
            "rope.scaling.yarn_beta_slow")
WINDOW = ("attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa")
MORE_SETTINGS = {
    "qwen3moe": ("expert_feed_forward_length", "expert_gating_func", "expert_weights_norm"),
    "gemma2": (*WINDOW, "attn_logit_softcapping", "final_logit_softcapping"),
    "gemma3": (*WINDOW, "final_logit_softcapping"), "phi3": WINDOW[:1], "olmo2": WINDOW,
    "granite": ("attention.scale", "embedding_scale", "logit_scale", "residual_scale"),
    "gptneox": ("use_parallel_residual",), "stablelm": ("use_parallel_residual",)}
WITHOUT_EFFECT = re.compile(r".*\.(rope\.scaling\.finetuned|tensor_data_layout|vocab_size)")
TOKENIZER_SETTINGS = ("add_bos_token", "add_eos_token", "add_space_prefix", "bos_token_id", "eom_token_id",
                      "eos_token_id", "eot_token_id", "merges", "model", "pre", "scores", "token_type", "tokens")


def scales_of(name: str, config: GPTConfig) -> dict:
    """The factors that follow from the name of an architecture and its sizes. The largest Gemmas have another one in
    attention."""
    if not name.startswith("gemma"):
        return {}
    largest = config.n_layer == {"gemma2": 46, "gemma3": 62}.get(name)
    return {"embed_scale": config.n_embd**0.5,
            "attn_scale": (config.n_embd / config.n_head) ** -0.5 if largest else 0.0}


def gguf_names(name: str, fused: bool, one_norm: bool) -> dict[str, str]:
    """The names of an architecture's tensors, for their_name(). fused: q, k and v are one matrix; one_norm: attention
    and MLP share a norm."""
    return (GGUF | ({"attn.qkv": "attn_qkv"} if fused else {}) | ({"mlp_norm": "attn_norm"} if one_norm else {})
            | ({"mlp.gate_up": "ffn_up"} if name == "phi3" else {}))


def tensors_of(config: GPTConfig, names: dict[str, str]) -> dict[str, list[str]]:
    """The tensors of a model, by name without .weight and .bias, each with the paths of the modules that it holds: one;
    or several matrices, one after another; or several norms, which are equal."""
    found = {}
    for path in skeleton(config):
        layer, _, inner = path.removeprefix("blocks.").partition(".")
        fused = next((both for both, parts in FUSED.items() if both in names and inner in parts), None)
        if fused:
            found[their_name(f"blocks.{layer}.{fused}", names)] = [f"blocks.{layer}.{part}" for part in FUSED[fused]]
            continue
        experts = config.n_expert and re.search(r"\.mlp\.(gate|up|down)$", path)
        found.setdefault(their_name(path, names) + ("_exps" if experts else ""), []).append(path)
    return found


# ---- read ------------------------------------------------------------------------------------------------------------


def our_config(file: File) -> GPTConfig:
    """The GPTConfig for a file's settings. UserError names one that GPT cannot follow."""
    name, tensors = file.fields.get("general.architecture"), file.tensors
    if name not in ARCHITECTURES:
        raise UserError(f"{file.path}: architecture {name!r} is not one of {', '.join(ARCHITECTURES)}")
    known = [f"{name}.{key}" for key in (*SETTINGS, *MORE_SETTINGS.get(name, ()))]
    check_spelling(file.fields, file.path, [*known, "tokenizer.chat_template",
                                            *(f"tokenizer.ggml.{key}" for key in TOKENIZER_SETTINGS)])
    own = {key: value for key, value in file.fields.items() if key.startswith(f"{name}.")}
    check_unknown(own, known, WITHOUT_EFFECT, file.path)

    def get(key: str, *default):
        found = file.fields.get(f"{name}.{key}", *default)
        if found is None and not default:
            raise UserError(f"{file.path} lacks {name}.{key}: it is not whole; copy it again")
        if default and not isinstance(found, default[0].__class__):
            raise UserError(f"{file.path}: {name}.{key}={found!r} is of the wrong type: copy it again")
        return found

    for key, only in (("attention.causal", True), ("expert_gating_func", 1), ("expert_weights_norm", True)):
        if get(key, only) != only:
            raise UserError(f"{file.path}: {name}.{key}={get(key, only)} is not supported, only {only}")
    tokens = file.fields.get("tokenizer.ggml.tokens") or []
    shape, fixed = file.tensor("token_embd.weight").shape, ARCHITECTURES[name]
    epsilon = "layer_norm_epsilon" if fixed.get("norm") == "layer" else "layer_norm_rms_epsilon"
    try:
        config = checked(
            file.path, **fixed, block_size=get("context_length"), vocab_size=shape[0] if len(shape) == 2 else
            len(tokens), n_layer=get("block_count"), n_head=get("attention.head_count"), n_embd=get("embedding_length"),
            ffn_dim=get("feed_forward_length"), norm_eps=get(f"attention.{epsilon}"),
            tie="output.weight" not in tensors, **({} if name == "gpt2" else dict(
                n_kv_head=get("attention.head_count_kv", 0), head_dim=get("attention.key_length", 0),
                rope_theta=get("rope.freq_base", 10000.0))))
        if name == "gpt2":
            return config
        found = asdict(config) | scales_of(name, config)
        if not config.bias:
            found |= {"bias": True} if "blk.0.ffn_up.bias" in tensors else {
                "qkv_bias": "blk.0.attn_q.bias" in tensors, "out_bias": "blk.0.attn_output.bias" in tensors}
        found |= {"head_bias": "output.bias" in tensors}
        if get("expert_count", 0):
            found |= {"n_expert": get("expert_count"), "expert_top_k": get("expert_used_count"),
                      "expert_balance": "none"}
        if name == "qwen3moe":
            found["ffn_dim"] = get("expert_feed_forward_length")
        if name == "granite":
            found |= {"embed_scale": get("embedding_scale", 0.0) or 1.0, "attn_scale": get("attention.scale", 0.0),
                      "residual_scale": get("residual_scale", 0.0) or 1.0,
                      "logit_scale": 1 / (get("logit_scale", 0.0) or 1.0)}
        if name == "gptneox":
            found["parallel"] = get("use_parallel_residual", True)
        if name == "stablelm":
            found["parallel"] = "blk.0.ffn_norm.weight" not in tensors
        if name in ("gemma2", "gemma3"):
            found |= {"softcap": get("final_logit_softcapping", 30.0 if name == "gemma2" else 0.0),
                      "attn_softcap": get("attn_logit_softcapping", 50.0) if name == "gemma2" else 0.0}
        width, turned = config.head_dim, get("rope.dimension_count", config.head_dim)
        partial = name in ("gptneox", "phi2", "phi3", "stablelm")  # their heads may turn a part of their numbers
        for key, value in (("rope.dimension_count", width if partial else turned),
                           ("attention.value_length", get("attention.value_length", width))):
            if value != width:
                raise UserError(f"{file.path}: {name}.{key}={value}, which is not the width of a head, {width}, is not "
                                "supported")
        found["rotary_dim"] = turned if turned != width else 0
        found |= rope_scaling(checked(file.path, **found), file, get)
        window = get("attention.sliding_window", 4096 if name == "gemma2" else 0)
        if window and name in MORE_SETTINGS:
            period = file.fields.get(f"{name}.attention.sliding_window_pattern", PERIOD.get(name, 0))
            letters = "".join("LS"[bool(short)] for short in period[:MOST_LAYERS]) if isinstance(period, list) else \
                "S" * (min(period, MOST_LAYERS) - 1) + "L" if period else "S"
            theta = get("rope.freq_base_swa", 10000.0 if name == "gemma3" else config.rope_theta)
            scaled = name in ("gemma3", "olmo2") and found["rope_factor"] != 1  # the scaling is not for windows
            found |= {"sliding_window": window, "window_pattern": letters,
                      "window_theta": theta if theta != config.rope_theta or scaled else 0.0}
        return checked(file.path, **found)
    except UserError:
        raise
    except (TypeError, ArithmeticError, ValueError) as error:
        raise UserError(f"{file.path} has a setting of the wrong type ({error}): copy it again") from error


def rope_scaling(config: GPTConfig, file: File, get: Callable) -> dict:
    """The settings of GPTConfig for the file's rope scaling. Llama 3's is a tensor of divisors, one for each frequency,
    for which the settings of its formula are found. UserError if there are none."""
    kind, factor = get("rope.scaling.type", "none"), get("rope.scaling.factor", 1.0)
    original, found = get("rope.scaling.original_context_length", 0), {}
    boost = get("rope.scaling.attn_factor", 1.0)  # factor of turned queries and keys
    if kind not in ("none", "linear", "yarn"):
        raise UserError(f"{file.path}: rope scaling {kind!r} is not one of none, linear, yarn")
    if kind != "none" and factor not in (0, 1):
        found = {"rope_scaling": kind, "rope_factor": factor}
    if found and kind == "yarn":
        found |= {"rope_original": original or config.block_size,
                  "rope_low_freq": get("rope.scaling.yarn_beta_slow", 1.0),
                  "rope_high_freq": get("rope.scaling.yarn_beta_fast", 32.0)}
        boost *= 1 + 0.1 * math.log(factor)
    if boost != 1:
        if config.rotary_dim or "N" in config.rope_pattern or get("attention.sliding_window", 0):
            raise UserError(f"{file.path}: rope.scaling.attn_factor={boost:g}, of {kind!r}, is not supported where not "
                            "all numbers of all layers are turned alike")
        found["attn_scale"] = boost**2 * (config.attn_scale or config.head_dim**-0.5)
    if "rope_freqs.weight" in file.tensors:
        divisors = np.array(file.arrays("rope_freqs.weight", False)["weight"]).reshape(-1)
        plain, factor = rope_inv_freq(config), float(divisors.max())
        for length in (original, 8192) if original else (8192,):
            llama3 = checked(file.path, **asdict(config) | {"rope_factor": factor, "rope_original": length})
            if divisors.shape == plain.shape and np.allclose(plain / rope_inv_freq(llama3), divisors, rtol=1e-4):
                return {"rope_factor": factor, "rope_original": length}
        raise UserError(f"{file.path}: rope_freqs.weight does not follow Llama 3.1's formula, and cannot be read")
    return found


def read_model(file: File, config: GPTConfig) -> Iterator:
    """All arrays of a GPT, one at a time: the name in the checkpoint, the array, and the file and the tensor that the
    array was read from."""
    name, modules = file.fields["general.architecture"], skeleton(config)
    one_norm = config.parallel and "blk.0.ffn_norm.weight" not in file.tensors
    names = gguf_names(name, "blk.0.attn_qkv.weight" in file.tensors, one_norm)
    for theirs, paths in tensors_of(config, names).items():
        module = modules[paths[0]]
        matrix = isinstance(module, nn.Linear | nn.Embedding | Experts)
        linear = matrix and not paths[0].endswith(("pos_embed", "router"))
        found = file.arrays(f"{theirs}.weight", linear)
        if "bias" in module.parameters():
            found["bias"] = file.arrays(f"{theirs}.bias", False)["weight"]
        for part, array in found.items():
            place, pieces = f"{file.path}: {theirs}.{'bias' if part == 'bias' else 'weight'}", [array] * len(paths)
            if matrix and len(paths) > 1:
                sizes = [modules[path].weight.shape[0] for path in paths]
                if array.shape[0] != sum(sizes):
                    raise UserError(f"{place} has {array.shape[0]} rows, not {' + '.join(map(str, sizes))} by the "
                                    "settings: copy it again")
                ends = np.cumsum([0, *sizes]).tolist()
                pieces = [array[start:end] for start, end in zip(ends, ends[1:], strict=False)]
            for path, piece in zip(paths, pieces, strict=True):
                heads = {"q": config.n_head, "k": config.n_kv_head}.get(path.partition(".attn.")[2])
                if name in PAIRED and heads:
                    if piece.shape[0] % (2 * heads):
                        raise UserError(f"{place} has {piece.shape[0]} rows, which does not fit {heads} heads of "
                                        f"{config.head_dim}: copy it again")
                    piece = rows_in_halves(piece, heads)
                yield f"{path}.{part}", mx.array(piece), place
    if more := sorted(file.tensors.keys() - file.used):
        raise UserError(f"{file.path} holds {more[0]}, and {len(more) - 1} more, for which its architecture has no "
                        "place: it cannot be read")


def told_types(file: File):
    """Say what becomes of the tensors whose numbers change, by their types."""
    counts = Counter(tensor.kind.name for tensor in file.tensors.values())
    rounded = {kind: n for kind, n in counts.items() if kind in ROUNDED and not dense and scale_dtype == "float16"}
    others = {kind: n for kind, n in counts.items() if kind not in DENSE and (dense or kind not in PACKED)}
    done = f"and quantized again to {bits} bits, with a loss" if bits else "" if dense else (
        "(--bits=6 quantizes them, with a loss)")
    for found, what in ((rounded, "keep their integers; their scales are rounded to float16 (not by "
                                  "--scale_dtype=float32)"), (others, f"are unpacked to float16 {done}")):
        if found:
            print(f"{sum(found.values())} tensors of {', '.join(sorted(found))} {what}".rstrip())


# ---- write -----------------------------------------------------------------------------------------------------------


def expanded(pattern: str, n_layer: int) -> str:
    return (pattern * n_layer)[:n_layer]


def architecture_of(config: GPTConfig) -> tuple[str, GPTConfig]:
    """GGUF's name of the architecture; and the config, with the patterns of that architecture where they mean the same.
    UserError names a setting that the architecture does not have."""
    scaled = (config.embed_scale, config.residual_scale, config.logit_scale) != (1, 1, 1)
    boosted = config.rope_scaling == "yarn" and config.rope_factor != 1
    if config.mlp == "swiglu_clip":
        raise UserError("GGUF's gpt-oss is not known here: write a Hugging Face folder, by hf_reader.py")
    if config.pos == "learned":
        name = "gpt2"
    elif config.mlp == "geglu":
        name = "gemma" if config.norm_place == "before" else "gemma3" if config.qk_norm else "gemma2"
    elif config.norm_place == "after":
        name = "olmo2"
    elif config.norm == "layer":
        name = "stablelm" if config.mlp == "swiglu" else "phi2" if config.head_bias else "gptneox"
    elif "N" in expanded(config.rope_pattern, config.n_layer):
        name = "smollm3"
    elif scaled or config.attn_scale and not boosted:
        name = "granite"
    elif config.rotary_dim:
        name = "phi3"
    elif config.qk_norm:
        name = "qwen3moe" if config.n_expert else "qwen3"
    else:
        name = "qwen2" if config.qkv_bias and not config.out_bias else "llama"
    has = dict(norm=("rms",), bias=(False,), pos=("rope",)) | {
        key: (value,) for key, value in ARCHITECTURES[name].items()}
    free = [*SIZES, *ROPE_SETTINGS, "rope_scaling", "n_kv_head", "head_dim", *FREE.get(name, ())]
    if name == "gpt2":
        has |= dict(n_kv_head=(config.n_head,), head_dim=(config.n_embd // config.n_head,))
        free = [key for key in free if key not in has] + ["qkv_bias"]  # this and those of rope have no effect
    if name in ("llama", "granite"):
        has |= dict(bias=(False, True))
    if name == "gptneox":
        has |= dict(mlp=("gelu", "gelu_tanh"))
    if name == "phi2":
        has |= dict(head_bias=(True,))
    if name in TIED:
        has |= dict(tie=(True,))
    if name in ("llama", "qwen3moe") and config.n_expert:  # gates sum to 1, and no bias takes part in the choice
        free += ["n_expert"]
        has |= {"expert_top_k": range(2, config.n_expert + 1), "expert_balance": ("loss", "none")}
    for key, value in scales_of(name, config).items():
        usual = (value or config.head_dim**-0.5, value)  # attn_scale 0 is the usual one
        found = getattr(config, key)
        has |= {key: (found,) if math.isclose(found or usual[0], usual[0], rel_tol=1e-6) else (value,)}
    if name == "olmo2":
        has |= dict(window_theta=(0.0, config.rope_theta))
    if name in ("gemma3", "olmo2") and config.sliding_window and config.rope_factor != 1:  # for layers without a window
        has |= dict(window_theta=(config.window_theta or config.rope_theta,))
    if config.rope_factor != 1 and name not in ("llama", "granite", "gpt2"):  # llama.cpp reads no tensor of divisors
        has |= dict(rope_scaling=("linear", "yarn"))
    patterns = {"window_pattern": "S" * (PERIOD[name] - 1) + "L"} if name in PERIOD else {}
    patterns |= {"rope_pattern": "RRRN"} if name == "smollm3" else {}
    for key, pattern in patterns.items():
        has |= {key: (pattern,)}
        if expanded(getattr(config, key), config.n_layer) == expanded(pattern, config.n_layer):
            config = replace(config, **{key: pattern})
    if boosted and name not in ("gpt2", "smollm3") and not config.rotary_dim and not config.window_theta:
        free += ["attn_scale"]
    check_export(config, f"GGUF's {name}", has, free)
    return name, config


def write_gguf(path: str, model: GPT, meta: dict):
    """Write a checkpoint as a new GGUF file. UserError if it exists, or no architecture fits the model."""
    temporary = f"{path}.tmp{os.getpid()}"
    name, config = architecture_of(model.config)
    multiply_factors(model)
    if os.path.exists(path) or not os.path.isdir(os.path.dirname(path) or "."):
        raise UserError(f"{path} exists, or its folder does not: give another --export")
    if name == "gptneox" and config.mlp == "gelu":
        print("llama.cpp computes the approximation of gelu by a tanh for GGUF's gptneox: its logits differ a little")
    writer, modules = gguf.GGUFWriter(temporary, name), dict(model.named_modules())
    tensors = list(their_tensors(modules, config, name))
    try:
        kinds = Counter(kind for _, kind, _, part in tensors if part == "weight" and kind.name != "F32")
        most = kinds.most_common(1)[0][0].name if kinds else "F32"
        add_settings(writer, config, name)
        writer.add_file_type(gguf.LlamaFileType["ALL_F32" if most == "F32" else f"MOSTLY_{most}"])
        if any(kind.name.startswith("Q") for kind in kinds):
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        if meta.get("tokenizer"):
            add_tokenizer(writer, meta, config.vocab_size)
        for tensor, kind, paths, part in tensors:
            shape = shape_of([modules[path] for path in paths], part)
            per_block, size = gguf.GGML_QUANT_SIZES[kind]
            writer.add_tensor_info(tensor, shape, np.dtype(np.float32), math.prod(shape) // per_block * size, kind)
        divisors = rope_divisors(config)
        if divisors is not None:
            writer.add_tensor_info("rope_freqs.weight", divisors.shape, divisors.dtype, divisors.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, kind, paths, part in tqdm(tensors, unit=" tensors", disable=None, dynamic_ncols=True):
            writer.write_tensor_data(data_of(tensor, kind, {path: modules[path] for path in paths}, part, config, name))
        if divisors is not None:
            writer.write_tensor_data(divisors)
        end = writer.fout[0].tell()
        writer.close()
        if os.path.getsize(temporary) != end:  # numpy's tofile is silent where the disk is full
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    found = ", ".join(f"{count} {kind.name}" for kind, count in kinds.most_common())
    print(f"{path}: {name}, matrices: {found or 'F32'}, {os.path.getsize(path) / 1e6:,.1f} MB")


def add_settings(writer, config: GPTConfig, name: str):
    """The settings of an architecture."""
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.n_head)
    if config.norm == "layer":
        writer.add_layer_norm_eps(config.norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.norm_eps)
    if name == "gpt2":
        return
    writer.add_head_count_kv(config.n_kv_head)
    if config.n_expert:
        writer.add_expert_count(config.n_expert)
        writer.add_expert_used_count(config.expert_top_k)
    if name == "qwen3moe":
        writer.add_expert_feed_forward_length(config.ffn_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.rotary_dim or config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    if name in ("gptneox", "stablelm"):
        writer.add_parallel_residual(config.parallel)
    if name == "gemma2":  # it has a window
        writer.add_sliding_window(config.sliding_window or config.block_size)
    if name in ("gemma3", "olmo2") and config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    if name == "gemma3":
        writer.add_float32("gemma3.rope.freq_base_swa", config.window_theta or config.rope_theta)
    if name == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_softcap)
        writer.add_final_logit_softcapping(config.softcap)
    if name == "granite":
        writer.add_attention_scale(config.attn_scale)
        writer.add_embedding_scale(config.embed_scale)
        writer.add_residual_scale(config.residual_scale)
        writer.add_logit_scale(1 / config.logit_scale)
    if config.rope_factor != 1:
        writer.add_rope_scaling_orig_ctx_len(config.rope_original)
        if config.rope_scaling != "llama3":
            writer.add_rope_scaling_type(gguf.RopeScalingType(config.rope_scaling))
            writer.add_rope_scaling_factor(config.rope_factor)
        if config.rope_scaling == "yarn":
            writer.add_float32(f"{name}.rope.scaling.yarn_beta_slow", config.rope_low_freq)
            writer.add_float32(f"{name}.rope.scaling.yarn_beta_fast", config.rope_high_freq)
            boost = (config.attn_scale * config.head_dim**0.5) ** 0.5 if config.attn_scale else 1
            writer.add_rope_scaling_attn_factors(boost / (1 + 0.1 * math.log(config.rope_factor)))


def rope_divisors(config: GPTConfig) -> np.ndarray | None:
    """The tensor of Llama 3's rope scaling."""
    if config.pos != "rope" or config.rope_factor == 1 or config.rope_scaling != "llama3":
        return None
    return (rope_inv_freq(replace(config, rope_factor=1.0)) / rope_inv_freq(config)).astype(np.float32)


def shape_of(modules: list[nn.Module], part: str) -> tuple[int, ...]:
    """The shape of a tensor that holds these modules."""
    if part == "bias" or modules[0].weight.ndim == 1:
        return (sum(module[part].size for module in modules),)
    *outer, inputs = modules[0].weight.shape
    if "scales" in modules[0]:
        inputs = inputs * 32 // modules[0].bits
    outer[-1] = sum(module.weight.shape[-2] for module in modules)
    return (*outer, inputs)


def their_tensors(modules: dict, config: GPTConfig, name: str) -> Iterator[tuple]:
    """The tensors of a model: the name in GGUF, the type, the paths of the modules that it holds, and their part, which
    is weight or bias."""
    one_norm = name == "phi2" or name == "stablelm" and config.parallel
    names = gguf_names(name, name in ("gpt2", "gptneox", "phi3"), one_norm)
    for theirs, paths in tensors_of(config, names).items():
        module = modules[paths[0]]
        if "norm" in paths[0] and len(paths) > 1:
            other = modules[paths[1]]
            if not all(mx.array_equal(module[part], other[part]) for part in module.parameters()):
                raise UserError(f"{paths[0]} and {paths[1]} differ, but GGUF's {name} has one norm for both: the model "
                                "cannot be exported")
            paths = paths[:1]
        shape, kind = shape_of([module], "weight"), "F32"
        if len(shape) > 1 and not paths[0].endswith(("pos_embed", "router")):
            held = {held_as(modules[path]) for path in paths}
            outside = paths[0] in ("embed", "head") and type[:2] in ("Q4", "Q5")
            kind = held.pop() if held != {None} and len(held) == 1 else "Q8_0" if outside else type
            if shape[-1] % 32 and kind.startswith("Q"):
                kind = "F16"
        yield f"{theirs}.weight", gguf.GGMLQuantizationType[kind], paths, "weight"
        if "bias" in module:
            yield f"{theirs}.bias", gguf.GGMLQuantizationType.F32, paths, "bias"
        if theirs == names["embed"] and config.tie and name in UNTIED:
            yield f"{names['head']}.weight", gguf.GGMLQuantizationType[kind], paths, "weight"


def data_of(tensor: str, kind: gguf.GGMLQuantizationType, modules: dict[str, nn.Module], part: str, config: GPTConfig,
            name: str) -> np.ndarray:
    """The numbers or the blocks of a tensor that holds these modules, by path."""
    found = []
    for path, module in modules.items():
        if part == "weight" and held_as(module) == kind.name:
            check_finite(module.scales, tensor)
            check_finite(module.biases, tensor)
            array = blocks_of(module, kind.name)
        else:
            array = dense_weight(module) if part == "weight" else module.bias.astype(mx.float32)
            check_finite(array, tensor)
            array = np.array(array)
            try:
                with np.errstate(over="raise"):
                    array = by_pieces(lambda rows: [gguf.quants.quantize(rows, kind)],
                                      array.reshape(-1, array.shape[-1]))[0].reshape(*array.shape[:-1], -1)
            except FloatingPointError as error:
                raise UserError(f"{tensor} holds numbers beyond the range of float16: it cannot be exported") from error
        heads = {"q": config.n_head, "k": config.n_kv_head}.get(path.partition(".attn.")[2])
        found.append(rows_in_pairs(array, heads) if name in PAIRED and heads else array)
    return np.concatenate(found) if len(found) > 1 else np.ascontiguousarray(found[0])


# ---- run -------------------------------------------------------------------------------------------------------------

if not source:
    raise UserError("there is nothing to read: give a .gguf file, or a checkpoint and --export=FILE.gguf")
if type not in (types := ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")):
    raise UserError(f"type={type!r} is not one of {', '.join(types)}")
if bits not in (0, 2, 3, 4, 5, 6, 8):
    raise UserError(f"bits={bits} is not one of 0, 2, 3, 4, 5, 6, 8")
if bits and dense:
    raise UserError(f"bits={bits} and dense=True: packed or not; give one of them")
if scale_dtype not in ("float16", "float32"):
    raise UserError(f"scale_dtype={scale_dtype!r} is not one of float16, float32")
if export:
    write_gguf(export, *load_checkpoint(source))
else:
    check_out(out, source)
    file = File(source)
    config = our_config(file)
    tokenizer, more = tokenizer_of(file.fields, file.path)
    if file.fields["general.architecture"] == "phi3":  # by its settings alone it could be another family's
        more["hf"] = {**more.get("hf", {}), "model_type": "phi3"}
    told_types(file)
    write_checkpoint(out, config, read_model(file, config), tokenizer, more)
