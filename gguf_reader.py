"""A GGUF file, as llama.cpp runs it, into a checkpoint of this collection, and back into a GGUF file.

    python gguf_reader.py model.gguf model.safetensors
    python gguf_reader.py out/ckpt.safetensors --export=model.gguf --type=Q8_0

It reads the architectures llama (with rope scaling, and with Mixtral's experts), qwen2, qwen3 and gpt2. Tensors of the
types F32, F16 and BF16 keep their dtype; Q8_0, Q4_0 and Q4_1 stay packed, since MLX's layout holds them exactly, in
groups of 32; the gguf package unpacks all other types, and --bits quantizes them again, with a loss. A byte-level
tokenizer goes into the checkpoint if its regex is known here (gpt-2, llama-bpe, qwen2), and so does SentencePiece's, as
Llama 2 and Mistral have it, which is then run by the tokenizers package. A setting of the architecture that is not
known here is refused, unless its value turns it off. It writes matrices of the types F16 or Q8_0.
"""
import errno
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from config import UserError, overrides
from model import GPT, Experts, GPTConfig, load_checkpoint, rope_inv_freq
from quantized import dense_weight
from readers import (
    GGUF,
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
    template_settings,
    their_name,
    write_checkpoint,
)
from tokenizer import (
    GPT2_PATTERN,
    Tokenizer,
    bytes_of_letters,
    from_tokenizer_json,
    letters_of_bytes,
    to_tokenizer_json,
)

source = ""  # a .gguf file; with --export: a checkpoint
out = "model.safetensors"  # the checkpoint to be written
bits = 0  # quantize tensors of other types again, to 2 | 3 | 4 | 5 | 6 | 8 bits; 0: float16
export = ""  # a .gguf file to be written, instead of `out`
type = "F16"  # of the matrices in it: F16 | Q8_0

settings = overrides(globals(), "source", "out")

try:
    import gguf
except ImportError as error:
    raise UserError("the gguf package is missing: pip install gguf") from error

WORDS = {  # regexes that cut a text into words, by their names in tokenizer.ggml.pre
    "gpt-2": GPT2_PATTERN,
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                 r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
             r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}

# ---- types -----------------------------------------------------------------------------------------------------------


def low_bits_first(q: np.ndarray, bits: int) -> np.ndarray:
    """uint8 (n, m) -> uint32 (n, m bits / 32): MLX's layout, for 4 and 8 bits."""
    return np.ascontiguousarray(q if bits == 8 else q[:, ::2] | q[:, 1::2] << 4).view("<u4")


def halves(blocks: np.ndarray) -> np.ndarray:
    """The float16 at the beginning of each block, uint8 (n, groups, 2) -> (n, groups)."""
    return np.ascontiguousarray(blocks).view("<f2")[..., 0].astype(np.float16)


def nibbles(blocks: np.ndarray) -> np.ndarray:
    """uint8 (n, groups, 16) -> (n, 32 groups): of each block the low nibbles, then the high ones."""
    return np.concatenate([blocks & 15, blocks >> 4], axis=-1).reshape(len(blocks), -1)


def packed(data: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of blocks, uint8 (out, bytes) -> words (out, in bits / 32), scales and biases (out, in / 32), float16, which
    is exact, since 8 and 128 are powers of two. Of experts, all arrays have one more dimension, the first."""
    if data.ndim == 3:
        return tuple(np.stack(parts) for parts in zip(*(packed(one, kind) for one in data), strict=True))
    size = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[kind]
    blocks = data.reshape(len(data), -1, size)
    scales = halves(blocks[..., :2])
    if kind == "Q4_0":  # 16 values around 0: d (q - 8)
        return low_bits_first(nibbles(blocks[..., 2:]), 4), scales, -8 * scales
    if kind == "Q4_1":  # d q + m
        return low_bits_first(nibbles(blocks[..., 4:]), 4), scales, halves(blocks[..., 2:4])
    q = np.ascontiguousarray(blocks[..., 2:]).reshape(len(data), -1) ^ 128  # d q, with q from -128 on: ^ 128 adds 128
    return low_bits_first(q, 8), scales, -128 * scales


DENSE, PACKED = ("F32", "F16", "BF16"), ("Q8_0", "Q4_0", "Q4_1")  # types whose numbers are not changed


def arrays_of(kind: gguf.GGMLQuantizationType, data: np.ndarray, linear: bool) -> dict[str, np.ndarray | mx.array]:
    """The weight of a tensor, by its type and rows of blocks; of a quantized one also scales and biases."""
    if kind.name in PACKED and linear:
        return dict(zip(("weight", "scales", "biases"), packed(data, kind.name), strict=True))
    if kind.name in ("F32", "F16"):
        return {"weight": data}
    if kind.name == "BF16":
        return {"weight": mx.array(np.ascontiguousarray(data).view(np.uint16)).view(mx.bfloat16)}
    dense = gguf.quants.dequantize(data, kind).astype(np.float16)
    if bits and linear:
        group_size = 64 if dense.shape[-1] % 64 == 0 else 32
        return dict(zip(("weight", "scales", "biases"), mx.quantize(mx.array(dense), group_size, bits), strict=True))
    return {"weight": dense}


def rows_in_halves(x, n_head: int):
    """The rows of a q or k matrix in the order of this collection: rotary positions turn row i of a head together with
    row i + D/2, and in llama.cpp's order row 2i with row 2i + 1."""
    heads = x.reshape(n_head, -1, 2, *x.shape[1:])
    return heads.swapaxes(1, 2).reshape(x.shape)


def rows_in_pairs(x, n_head: int):
    """The inverse of rows_in_halves()."""
    heads = x.reshape(n_head, 2, -1, *x.shape[1:])
    return heads.swapaxes(1, 2).reshape(x.shape)


# ---- read ------------------------------------------------------------------------------------------------------------


class File:
    """A GGUF file: `fields`, its settings; `tensors`, by name."""

    def __init__(self, path: str):
        if not os.path.isfile(path):
            raise UserError(f"no file at {path}: give a .gguf file")
        try:
            size = os.path.getsize(path)
            with open(path, "rb") as file:
                counts = np.frombuffer(file.read(24)[8:], "<u8")
            if len(counts) < 2 or counts.max() > size:
                raise ValueError("its header is cut short or damaged")
            reader = gguf.GGUFReader(path)
            self.fields = {name: field.contents() for name, field in reader.fields.items()}
            place = reader.data_offset
            for tensor in reader.tensors:  # they must follow one another without gaps
                if tensor.data_offset != place:
                    raise ValueError(f"tensor {tensor.name} begins at byte {tensor.data_offset}, not at {place}")
                place += -(-tensor.n_bytes // reader.alignment) * reader.alignment
            if size > place:
                raise ValueError(f"{size - place} bytes belong to no tensor")
        except Exception as error:  # a parser may raise anything on a damaged file
            raise UserError(f"{path} is not a whole GGUF file ({error}): copy it again") from error
        self.path, self.tensors = path, {tensor.name: tensor for tensor in reader.tensors}
        self.used = set()  # names of tensors that were read
        if self.fields.get("split.count", 1) != 1:
            raise UserError(f"{path} is one of {self.fields['split.count']} parts: join them with llama.cpp's "
                            "`llama-gguf-split --merge`")

    def tensor(self, name: str):
        if name not in self.tensors:
            raise UserError(f"{self.path} holds no tensor {name}: it is not whole; copy it again")
        return self.tensors[name]

    def arrays(self, name: str, linear: bool) -> dict:
        """arrays_of() a tensor. linear: whether its layer can be quantized."""
        tensor = self.tensor(name)
        self.used.add(name)
        try:  # not through the package's memory map, whose pages would count as memory
            data = np.fromfile(self.path, tensor.data.dtype, tensor.data.size, offset=tensor.data_offset)
            return arrays_of(tensor.tensor_type, data.reshape(tensor.data.shape), linear)
        except (ValueError, NotImplementedError, KeyError) as error:
            raise UserError(f"{self.path}: tensor {name}, of type {tensor.tensor_type.name}, cannot be read ({error})"
                            ) from error


# The settings that are read or checked, after the architecture's name and a dot; and those that no logit depends on.
SETTINGS = ("attention.causal", "attention.head_count", "attention.head_count_kv", "attention.key_length",
            "attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon", "attention.value_length", "block_count",
            "context_length", "embedding_length", "expert_count", "expert_used_count", "feed_forward_length",
            "rope.dimension_count", "rope.freq_base", "rope.scaling.factor", "rope.scaling.original_context_length",
            "rope.scaling.type")
WITHOUT_EFFECT = re.compile(r".*\.(rope\.scaling\.finetuned|tensor_data_layout|vocab_size)")
TOKENIZER_SETTINGS = ("add_space_prefix", "bos_token_id", "eos_token_id", "model", "pre", "scores", "token_type",
                      "tokens")


def our_config(file: File) -> GPTConfig:
    """The GPTConfig for a file's settings. UserError names one that GPT cannot follow."""
    name = file.fields.get("general.architecture")
    if name not in ("llama", "qwen2", "qwen3", "gpt2"):
        raise UserError(f"{file.path}: architecture {name!r} is not one of llama, qwen2, qwen3, gpt2")
    check_spelling(file.fields, file.path, [*(f"{name}.{key}" for key in SETTINGS), "tokenizer.chat_template",
                                            *(f"tokenizer.ggml.{key}" for key in TOKENIZER_SETTINGS)])
    own = {key: value for key, value in file.fields.items() if key.startswith(f"{name}.")}
    check_unknown(own, [f"{name}.{key}" for key in SETTINGS], WITHOUT_EFFECT, file.path)

    def get(key: str, *default):
        found = file.fields.get(f"{name}.{key}", *default)
        if found is None and not default:
            raise UserError(f"{file.path} lacks {name}.{key}: it is not whole; copy it again")
        if default and not isinstance(found, default[0].__class__):
            raise UserError(f"{file.path}: {name}.{key}={found!r} is of the wrong type: copy it again")
        return found

    if not get("attention.causal", True):
        raise UserError(f"{file.path}: {name}.attention.causal=False is not supported, only True")
    tokens = file.fields.get("tokenizer.ggml.tokens") or []
    vocab = file.tensor("token_embd.weight").shape[-1] if len(file.tensor("token_embd.weight").shape) == 2 else 0
    common = dict(block_size=get("context_length"), vocab_size=int(vocab) or len(tokens), n_layer=get("block_count"),
                  n_head=get("attention.head_count"), n_embd=get("embedding_length"),
                  ffn_dim=get("feed_forward_length"),
                  qk_norm=name == "qwen3", tie="output.weight" not in file.tensors)
    try:
        if name == "gpt2":
            return checked(file.path, **common, pos="learned", norm="layer", mlp="gelu_tanh", bias=True,
                           norm_eps=get("attention.layer_norm_epsilon"))
        config = checked(file.path, **common, mlp="swiglu", qkv_bias=name == "qwen2",
                         n_kv_head=get("attention.head_count_kv", 0), head_dim=get("attention.key_length", 0),
                         norm_eps=get("attention.layer_norm_rms_epsilon"),
                         rope_theta=get("rope.freq_base", 10000.0), n_expert=get("expert_count", 0),
                         expert_top_k=get("expert_used_count", 0) or 2, expert_balance="none")
        for key in ("rope.dimension_count", "attention.value_length"):
            if get(key, config.head_dim) != config.head_dim:
                raise UserError(f"{file.path}: {name}.{key}={get(key, 0)}, which is not the width of a head, "
                                f"{config.head_dim}, is not supported")
        kind, factor = get("rope.scaling.type", "none"), get("rope.scaling.factor", 1.0)
        return checked(file.path, **asdict(with_rope_scaling(config, file, kind, factor)))
    except (TypeError, ArithmeticError) as error:
        raise UserError(f"{file.path} has a setting of the wrong type ({error}): copy it again") from error


def with_rope_scaling(config: GPTConfig, file: File, kind: str, factor: float) -> GPTConfig:
    """The config with the file's rope scaling. Linear scaling is a setting. Llama 3's is a tensor of divisors, one for
    each frequency, for which the settings of Llama 3's formula are found. UserError if there are none."""
    if kind == "linear" and factor != 1:
        config.rope_factor, config.rope_low_freq, config.rope_high_freq = factor, 1e9, 2e9
    elif kind not in ("none", "linear"):
        raise UserError(f"{file.path}: rope scaling {kind!r} is not one of none, linear")
    if "rope_freqs.weight" in file.tensors:
        divisors = np.array(file.arrays("rope_freqs.weight", False)["weight"]).reshape(-1)
        plain = rope_inv_freq(config)
        config.rope_factor = float(divisors.max())
        original = file.fields.get("llama.rope.scaling.original_context_length")
        for length in (original, 8192) if original else (8192,):
            config.rope_original = length
            if divisors.shape == plain.shape and np.allclose(plain / rope_inv_freq(config), divisors, rtol=1e-4):
                return config
        raise UserError(f"{file.path}: rope_freqs.weight does not follow Llama 3.1's formula, and cannot be read")
    return config


def gguf_name(path: str, config: GPTConfig) -> str:
    """The name of a module's tensor in GGUF, without .weight. All experts of a layer are one tensor."""
    experts = config.n_expert and re.search(r"\.mlp\.(gate|up|down)$", path)
    return their_name(path, GGUF) + ("_exps" if experts else "")


def read_model(file: File, config: GPTConfig) -> Iterator:
    """All arrays of a GPT, one at a time: the name in the checkpoint, the array, and the file and the tensor that the
    array was read from."""
    llama, gpt2 = (file.fields["general.architecture"] == name for name in ("llama", "gpt2"))
    for path, module in skeleton(config).items():
        theirs, inner = gguf_name(path, config), path.partition(".attn.")[2]
        linear = isinstance(module, (nn.Linear, nn.Embedding, Experts)) and not path.endswith(("pos_embed", "router"))
        fused = gpt2 and inner in ("q", "k", "v")
        if fused and inner != "q":
            continue  # these came with q
        theirs = theirs.replace("attn_q", "attn_qkv") if fused else theirs
        found = file.arrays(f"{theirs}.weight", linear)
        if "bias" in module.parameters():
            found["bias"] = file.arrays(f"{theirs}.bias", False)["weight"]
        for part, array in found.items():
            place = f"{file.path}: {theirs}.{'bias' if part == 'bias' else 'weight'}"
            heads = {"q": config.n_head, "k": config.n_kv_head}.get(inner)
            if fused and array.shape[0] != 3 * config.n_embd or llama and heads and array.shape[0] % (2 * heads):
                raise UserError(f"{place} has {array.shape[0]} rows, which does not fit {config.n_head} heads of "
                                f"{config.head_dim}: copy it again")
            if fused:
                for i, letter in enumerate("qkv"):
                    rows = array[i * config.n_embd:(i + 1) * config.n_embd]
                    yield f"{path[:-1]}{letter}.{part}", mx.array(rows), place
            else:
                yield f"{path}.{part}", mx.array(rows_in_halves(array, heads) if llama and heads else array), place
    if more := sorted(file.tensors.keys() - file.used):
        raise UserError(f"{file.path} holds {more[0]}, and {len(more) - 1} more, for which its architecture has no "
                        "place: it cannot be read")


def our_tokenizer(file: File) -> tuple[Tokenizer | None, dict]:
    """The tokenizer, if it is SentencePiece's, or byte-level with a regex in WORDS; and entries for the checkpoint's
    header about the chat template."""
    get = file.fields.get
    more, model, pre = template_settings(get("tokenizer.chat_template")), get("tokenizer.ggml.model"), None
    pre = get("tokenizer.ggml.pre", "gpt-2")
    if model == "llama":
        return sentence_piece(file), more
    if model != "gpt2" or pre not in WORDS:
        print(f"the tokenizer ({model}, {pre}) is not known here: the checkpoint cannot read or write text")
        return None, more
    names, types = get("tokenizer.ggml.tokens") or [], get("tokenizer.ggml.token_type") or []
    special = {name: i for i, name in enumerate(names) if i < len(types) and types[i] in (3, 4)}  # control, user's
    tokens = [b"" if name in special else bytes_of_letters(name) for name in names]
    eot = get("tokenizer.ggml.eos_token_id")
    if eot is None or not 0 <= eot < len(names):
        raise UserError(f"{file.path} does not say which token ends a document (tokenizer.ggml.eos_token_id)")
    return Tokenizer("bpe", tokens, special, WORDS[pre], get("tokenizer.ggml.bos_token_id"), eot), more


def sentence_piece(file: File) -> Tokenizer:
    """SentencePiece's BPE: of all neighbours that together make a known piece, those with the best score are merged
    first; a character that is not a piece becomes bytes. It is built as a tokenizer.json, in which not pieces but the
    pairs that make them are ranked."""
    get = file.fields.get
    pieces, scores, types = (get(f"tokenizer.ggml.{name}") for name in ("tokens", "scores", "token_type"))
    if not pieces or not scores or not types or not len(pieces) == len(scores) == len(types):
        raise UserError(f"{file.path} has a tokenizer of {len(pieces or [])} tokens, {len(scores or [])} scores and "
                        f"{len(types or [])} types: it is cut short; fetch it again")
    named = {name: get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "unknown")}
    for name, i in named.items():
        if i is not None and not 0 <= i < len(pieces) or name == "eos" and i is None:
            raise UserError(f"{file.path} has no token {i} for {name}: fetch it again")
    vocab = {piece: i for i, piece in enumerate(pieces)}
    plain = {piece for piece, kind in zip(pieces, types, strict=True) if kind == 1}
    pairs = [(-scores[vocab[piece]], vocab[piece[:cut]], vocab[piece[cut:]]) for piece in plain
             for cut in range(1, len(piece)) if piece[:cut] in plain and piece[cut:] in plain]
    lower = "\u2581"  # one-eighth block: a blank
    steps = [{"type": "Replace", "pattern": {"String": " "}, "content": lower}]
    if get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, {"type": "Prepend", "prepend": lower})
    found = {
        "version": "1.0", "pre_tokenizer": None, "post_processor": None,
        "added_tokens": [{"id": i, "content": piece, "special": kind in (2, 3), "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False}
                         for i, (piece, kind) in enumerate(zip(pieces, types, strict=True)) if kind in (2, 3, 4)],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": lower}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "unk_token": pieces[named["unknown"] or 0], "fuse_unk": True, "byte_fallback": True,
                  "vocab": vocab, "merges": [[pieces[left], pieces[right]] for _, left, right in sorted(pairs)]}}
    bos = named["eos"] if named["bos"] is None else named["bos"]
    return from_tokenizer_json(json.dumps(found, ensure_ascii=False), pieces[bos], pieces[named["eos"]])


# ---- write -----------------------------------------------------------------------------------------------------------


def architecture_of(config: GPTConfig) -> str:
    """GGUF's name of the architecture. UserError names a setting that the architecture does not have."""
    if config.pos == "learned":
        has = dict(norm=("layer",), mlp=("gelu_tanh",), bias=(True,), qk_norm=(False,), pos=("learned",),
                   n_kv_head=(config.n_head,), head_dim=(config.n_embd // config.n_head,))
        check_export(config, "GGUF's gpt2", has, (*SIZES, *ROPE_SETTINGS, "qkv_bias"))  # the last six have no effect
        return "gpt2"
    name = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    has = dict(norm=("rms",), mlp=("swiglu",), bias=(False,), pos=("rope",))
    has |= {"qkv_bias": (False,)} if name == "qwen3" else {}
    if name == "llama" and config.n_expert:  # Mixtral: gates sum to 1, and no bias takes part in the choice of experts
        has |= {"expert_top_k": range(2, config.n_expert + 1), "expert_balance": ("loss", "none")}
    free = (*SIZES, *ROPE_SETTINGS, "n_kv_head", "head_dim", "qk_norm", "qkv_bias")
    check_export(config, f"GGUF's {name}", has, (*free, "n_expert") if name == "llama" else free)
    return name


def write_gguf(path: str, model: GPT, meta: dict):
    """Write a checkpoint as a new GGUF file. UserError if it exists, or no architecture fits the model."""
    config, temporary = model.config, f"{path}.tmp{os.getpid()}"
    name = architecture_of(config)
    multiply_factors(model)
    if os.path.exists(path) or not os.path.isdir(os.path.dirname(path) or "."):
        raise UserError(f"{path} exists, or its folder does not: give another --export")
    writer = gguf.GGUFWriter(temporary, name)
    try:
        add_settings(writer, config, name)
        if meta.get("tokenizer"):
            add_tokenizer(writer, Tokenizer.from_dict(meta["tokenizer"]), config)
        if meta.get("chat_template"):
            writer.add_chat_template(meta["chat_template"])
        modules = dict(model.named_modules())
        for module_path in tqdm(skeleton(config), unit=" modules", disable=None, dynamic_ncols=True):
            for tensor, array in their_arrays(module_path, modules, config, name):
                matrix = array.ndim > 1 and not tensor.endswith(("position_embd.weight", "ffn_gate_inp.weight"))
                kind = gguf.GGMLQuantizationType[type if matrix and array.shape[-1] % 32 == 0 else
                                                 "F16" if matrix else "F32"]
                check_finite(array, tensor)
                try:
                    with np.errstate(over="raise"):
                        data = gguf.quants.quantize(np.array(array), kind)
                except FloatingPointError as error:
                    raise UserError(f"{tensor} holds numbers beyond the range of float16: it cannot be exported"
                                    ) from error
                writer.add_tensor(tensor, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
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
    print(f"{path}: {name}, {type}, {os.path.getsize(path) / 1e6:,.1f} MB")


def add_settings(writer, config: GPTConfig, name: str):
    """The settings of an architecture, and the tensor of Llama 3's rope scaling."""
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.n_head)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if type == "F16" else gguf.LlamaFileType.MOSTLY_Q8_0)
    if name == "gpt2":
        writer.add_layer_norm_eps(config.norm_eps)
        return
    writer.add_head_count_kv(config.n_kv_head)
    if config.n_expert:
        writer.add_expert_count(config.n_expert)
        writer.add_expert_used_count(config.expert_top_k)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    if config.rope_factor != 1:
        plain = GPTConfig(head_dim=config.head_dim, rope_theta=config.rope_theta)
        divisors = rope_inv_freq(plain) / rope_inv_freq(config)
        if np.allclose(divisors, config.rope_factor):
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(config.rope_factor)
        else:
            writer.add_rope_scaling_orig_ctx_len(config.rope_original)
            writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))


def add_tokenizer(writer, enc: Tokenizer, config: GPTConfig):
    """The tokenizer, if it is of kind byte or bpe."""
    if enc.kind not in ("byte", "bpe"):
        print(f"the tokenizer is not written: one of kind {enc.kind} has no counterpart in GGUF")
        return
    pre = next((name for name, pattern in WORDS.items() if pattern == enc.pattern), None)
    if pre is None:
        pre = "default"
        print("llama.cpp does not know the regex of this tokenizer: it will cut texts into words by its default one")
    letters, names = letters_of_bytes(), {i: name for name, i in enc.special.items()}
    spelled = ["".join(letters[byte] for byte in token) for token in enc.tokens]
    spelled += [""] * (config.vocab_size - len(spelled))
    tokens = [names.get(i) or piece or f"[PAD{i}]" for i, piece in enumerate(spelled)]
    kinds = [gguf.TokenType.CONTROL if i in names else gguf.TokenType.NORMAL if piece else gguf.TokenType.UNUSED
             for i, piece in enumerate(spelled)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in to_tokenizer_json(enc)["model"]["merges"]])
    writer.add_bos_token_id(enc.bos)
    writer.add_eos_token_id(enc.eot)


def their_arrays(path: str, modules: dict, config: GPTConfig, name: str) -> Iterator[tuple[str, mx.array]]:
    """The tensors of a module, by their names in GGUF, float32."""
    module, theirs, inner = modules[path], gguf_name(path, config), path.partition(".attn.")[2]
    if name == "gpt2" and inner in ("q", "k", "v"):
        if inner == "q":
            three, fused = [modules[path[:-1] + letter] for letter in "qkv"], theirs.replace("attn_q", "attn_qkv")
            yield f"{fused}.weight", mx.concatenate([dense_weight(other) for other in three])
            yield f"{fused}.bias", mx.concatenate([other.bias for other in three]).astype(mx.float32)
        return
    weight = dense_weight(module)
    if name == "llama" and inner in ("q", "k"):
        weight = rows_in_pairs(weight, config.n_head if inner == "q" else config.n_kv_head)
    yield f"{theirs}.weight", weight
    if "bias" in module:
        yield f"{theirs}.bias", module.bias.astype(mx.float32)


# ---- run -------------------------------------------------------------------------------------------------------------

if not source:
    raise UserError("there is nothing to read: give a .gguf file, or a checkpoint and --export=FILE.gguf")
if type not in ("F16", "Q8_0"):
    raise UserError(f"type={type!r} is not one of F16, Q8_0")
if bits not in (0, 2, 3, 4, 5, 6, 8):
    raise UserError(f"bits={bits} is not one of 0, 2, 3, 4, 5, 6, 8")
if export:
    write_gguf(export, *load_checkpoint(source))
else:
    check_out(out, source)
    file = File(source)
    config = our_config(file)
    tokenizer, more = our_tokenizer(file)
    others = [tensor.tensor_type.name for tensor in file.tensors.values()]
    if others := [kind for kind in others if kind not in DENSE + PACKED]:
        done = f"and quantized again to {bits} bits, with a loss" if bits else "(--bits=4 quantizes them, with a loss)"
        print(f"{len(others)} tensors of {', '.join(sorted(set(others)))} are unpacked to float16 {done}")
    write_checkpoint(out, config, read_model(file, config), tokenizer, more)
