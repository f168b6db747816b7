"""A GPT in MLX, and the file that keeps it, a checkpoint: every script imports this module.

    model = GPT(GPTConfig(n_layer=4, n_embd=256))
    logits = model(idx)                                  # idx (B, T) token ids -> (B, T, vocab_size)
    loss = model.loss(idx, targets)                      # mean cross-entropy in nats
    for token in generate(model, [1, 2, 3], 100): ...    # sampling with a key/value cache
    save_checkpoint("ckpt.safetensors", model, meta); model, meta = load_checkpoint("ckpt.safetensors")

The settings of GPTConfig cover GPT-2 (Radford et al. 2019) and the Llama family (Touvron et al. 2023). The default is a
modern small model: rotary positions, RMSNorm, relu squared (So et al. 2021), QK-norm (Henry et al. 2020), no biases.

Shapes: B batch, T positions, C = n_embd, H heads, KV key/value heads, D = head_dim, V = vocab_size, S keys.
"""
import codecs
import contextlib
import json
import math
import os
import shlex
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial

import blas  # noqa: F401  (before mlx: a fast BLAS for the CPU on Linux)
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_map_with_path
from safetensors import SafetensorError, safe_open

import quantized
from config import UserError

ON_CPU = mx.default_device() == mx.cpu
try:
    import cpu  # faster functions for a CPU
except ImportError:
    cpu = None
try:
    import cpu_train  # whole blocks on a CPU, with their gradients
except ImportError:
    cpu_train = None
try:
    import cpu_decode  # one position at a time on a CPU
except ImportError:
    cpu_decode = None
try:
    import gpu_decode  # and on an NVIDIA GPU
except ImportError:
    gpu_decode = None
try:
    import gpu_sample  # drawing of tokens on an NVIDIA GPU
except ImportError:
    gpu_sample = None
try:
    import gpu_train  # and training there
except ImportError:
    gpu_train = None
FAST_CPU = ON_CPU and cpu is not None
if mx.cuda.is_available():  # a short queue of work: a third less memory than with 500, at 1 to 5% less speed
    os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", "200")
VERSION = 1  # of the checkpoint's header

# ---- config ----------------------------------------------------------------------------------------------------------


@dataclass
class GPTConfig:
    """The only list of architecture settings. Every script uses these names.

    A setting of a variant ends in the variant's tag: see docs/variants.md."""
    block_size: int = 256        # context length, in tokens
    vocab_size: int = 4096       # V; train.py takes the tokenizer's, rounded up to a multiple of 64
    n_layer: int = 4             # blocks
    n_head: int = 2              # query heads
    n_kv_head: int = 0           # key/value heads, each shared by n_head / n_kv_head query heads; 0: n_head
    n_embd: int = 128            # width of the residual stream
    head_dim: int = 0            # width of a head; 0: n_embd / n_head
    ffn_dim: int = 0             # hidden width of the MLP; 0: 4 n_embd (gated: 8/3 n_embd, up to a multiple of 64)
    pos: str = "rope"            # rope | learned | none
    rope_theta: float = 10000.0  # base of the rotary wavelengths
    rope_factor: float = 1.0     # factor by which long wavelengths grow (8 in Llama 3.1), see rope_scaling; 1: off
    rope_low_freq: float = 1.0   # wavelengths over rope_original / rope_low_freq grow by the whole factor
    rope_high_freq: float = 4.0  # wavelengths under rope_original / rope_high_freq stay
    rope_original: int = 8192    # context length before the scaling
    norm: str = "rms"            # rms | layer
    norm_eps: float = 1e-5       # added to the variance
    mlp: str = "relu2"           # relu2 | gelu | gelu_tanh | swiglu | geglu | swiglu_clip (GPT-OSS)
    bias: bool = False           # biases in all linear layers and in LayerNorm
    qkv_bias: bool = False       # biases in q, k and v alone (Qwen2)
    qk_norm: bool = True         # RMSNorm of every head's query and key
    tie: bool = True             # the unembedding is the embedding's transpose
    rotary_dim: int = 0          # numbers of a head that rotary positions turn, the first ones; 0: all
    rope_scaling: str = "llama3"  # formula of rope_factor: llama3 | linear | yarn | yarn_untruncated
    rope_pattern: str = "R"      # one letter a layer, repeated: R rotary positions, N no positions (SmolLM3)
    parallel: bool = False       # attention and MLP both read the block's input (GPT-NeoX)
    norm_place: str = "before"   # before | after | both: where norms stand about attention and MLP (OLMo-2, Gemma)
    norm_bias: bool = False      # a bias in LayerNorm, though linear layers have none (StableLM)
    out_bias: bool = False       # a bias in attention's output projection
    head_bias: bool = False      # a bias in the unembedding (Phi-2)
    qk_norm_width: bool = False  # QK-norm is over the numbers of all heads together, not of each (OLMo-2)
    embed_scale: float = 1.0     # factor of the embedding (Gemma, Granite)
    attn_scale: float = 0.0      # factor of attention's scores; 0: 1 / sqrt(head_dim)
    residual_scale: float = 1.0  # factor of what attention and MLP add to the residual stream (Granite)
    logit_scale: float = 1.0     # factor of the logits (Granite)
    sink_logits: bool = False    # a learned logit of each head joins the softmax of its scores (GPT-OSS)
    bidirectional: bool = False  # a position reads the whole text, not what is before it: diffusion.py
    alibi: bool = False          # scores fall linearly with the distance; no other position signal  # alibi
    sliding_window: int = 0      # keys that a query sees, itself included; 0: all  # window
    window_pattern: str = "S"    # one letter a layer, repeated: S short (the window), L long (all keys)  # window
    sinks: int = 0               # first tokens that windowed queries see too  # window
    window_theta: float = 0.0    # rope_theta of windowed layers, without scaling; 0: that of all layers  # window
    diff_attn: bool = False      # differential attention  # diff
    diff_attn_version: int = 1   # 1 (2024): pairs of the n_head heads; 2 (2026): n_head pairs  # diff
    n_expert: int = 0            # experts, MLPs of width ffn_dim, of which a token uses some; 0: one MLP  # moe
    expert_top_k: int = 2        # experts that a token uses  # moe
    n_shared_expert: int = 0     # further experts, which every token uses  # moe
    expert_balance: str = "loss"  # loss (Switch) | bias (loss-free) | none: spreads tokens evenly  # moe
    router_bias: bool = False    # a bias in the router of experts (GPT-OSS)  # moe
    mod: str = "none"            # none | topk | soft: which tokens a routed block works on  # mod
    mod_capacity: float = 0.125  # topk: share of the tokens that a routed block works on  # mod
    mod_every: int = 2           # the last of every mod_every blocks is routed  # mod
    yoco: bool = False           # the second half of the blocks shares one set of keys and values  # yoco
    value_residual: bool = False  # every layer's values are mixed with those of layer 0  # resformer
    value_embeds: bool = False   # every other layer adds an embedding of the token to its values  # valembed
    softcap: float = 0.0         # logits are bounded to +-softcap by a tanh; 0: they are not  # softcap
    attn_softcap: float = 0.0    # attention's scores are bounded to +-attn_softcap; 0: they are not  # softcap

    def __post_init__(self):
        check_numbers(self)
        check_bidirectional(self)
        check_alibi(self)  # alibi
        check_yoco(self)  # yoco
        check_window(self)  # window
        check_moe(self)  # moe
        check_mod(self)  # mod
        check_softcap(self)  # softcap
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: it must be 1 or more")
        for name in ("n_kv_head", "head_dim", "ffn_dim"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)}: it must be 0, which takes the default, or more")
        if not self.head_dim and self.n_embd % self.n_head:
            raise UserError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: change one of them")
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.n_kv_head = self.n_kv_head or self.n_head
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}: change one of them")
        if self.pos == "rope" and self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} is odd: rotary positions turn pairs; make it even or set pos")
        check_diff(self)  # diff
        gated_dim = -(-8 * self.n_embd // (3 * 64)) * 64
        self.ffn_dim = self.ffn_dim or (gated_dim if self.mlp in GATED else 4 * self.n_embd)
        if max(self.n_head * self.head_dim, self.ffn_dim) >= 2**30:
            raise UserError(f"n_head * head_dim or ffn_dim={self.ffn_dim} is 2^30 or more: make them smaller")
        choices = {"pos": ("rope", "learned", "none"), "norm": ("rms", "layer"), "mlp": tuple(ACTIVATIONS),
                   "rope_scaling": ("llama3", "linear", "yarn", "yarn_untruncated"),
                   "norm_place": ("before", "after", "both")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}")
        check_rotary(self)
        check_scales(self)
        check_needs(self)


def check_numbers(config: GPTConfig):
    """UserError for a setting, from a command line or a checkpoint's header, that is no number of its kind."""
    for field in fields(config):
        value = getattr(config, field.name)
        if field.type is int and not (isinstance(value, int) and abs(value) < 2**31):
            raise UserError(f"{field.name}={repr(value)[:40]}: it must be a whole number below 2^31")
        if field.type is float:
            if not (isinstance(value, int | float) and abs(value) < 1e300):
                raise UserError(f"{field.name}={str(value)[:40]}: it must be a finite number")
            setattr(config, field.name, float(value))
    if config.n_layer > 1000:
        raise UserError(f"n_layer={config.n_layer}: it must be 1000 or less")


def check_rotary(config: GPTConfig):
    if not 0 <= config.rotary_dim <= config.head_dim or config.rotary_dim % 2:
        raise UserError(f"rotary_dim={config.rotary_dim}: it must be even, and 0 to head_dim={config.head_dim}")
    if not config.rope_pattern or set(config.rope_pattern) - set("RN"):
        raise UserError(f"rope_pattern={config.rope_pattern!r}: it must be letters R (rotary) and N (no positions)")
    for name in ("rope_theta", "rope_factor", "rope_original"):
        if getattr(config, name) <= 0:
            raise UserError(f"{name}={getattr(config, name)}: it must be over 0")
    if config.rope_scaling.startswith("yarn") and config.rope_theta <= 1:
        raise UserError(f"rope_scaling={config.rope_scaling} and rope_theta={config.rope_theta}: rope_theta must be "
                        "over 1")
    if not 0 < config.rope_low_freq < config.rope_high_freq:
        raise UserError(f"rope_low_freq={config.rope_low_freq}, rope_high_freq={config.rope_high_freq}: both must be "
                        "over 0, and the first one the smaller")


def check_scales(config: GPTConfig):
    if config.attn_scale < 0:
        raise UserError(f"attn_scale={config.attn_scale}: it must be 0, which is 1 / sqrt(head_dim), or more")
    for name in ("embed_scale", "residual_scale", "logit_scale"):
        if getattr(config, name) <= 0:
            raise UserError(f"{name}={getattr(config, name)}: it must be over 0")


def check_needs(config: GPTConfig):
    """UserError for a setting that has no effect beside another one."""
    for name, other, wanted in (
            ("rotary_dim", "pos", "rope"), ("rope_pattern", "pos", "rope"), ("norm_bias", "norm", "layer"),
            ("head_bias", "tie", False), ("qk_norm_width", "qk_norm", True)):
        value, found = getattr(config, name), getattr(config, other)
        if value != getattr(GPTConfig, name) and found != wanted:
            raise UserError(f"{name}={value!r} needs {other}={wanted}, not {other}={found}: change one of them")


def check_bidirectional(config: GPTConfig):
    """UserError for a variant that is made for positions which read those before them."""
    on = {}
    on["alibi"] = config.alibi  # alibi
    on["sliding_window"] = config.sliding_window  # window
    on["mod"] = config.mod != "none"  # mod
    on["yoco"] = config.yoco  # yoco
    for name in on:
        if config.bidirectional and on[name]:
            raise UserError(f"bidirectional=True does not know {name}={getattr(config, name)!r}: leave one of them out")


def check_reads_back(config: GPTConfig):
    """UserError for a model that reads the tokens which it should predict from those before."""
    if config.bidirectional:
        raise UserError("this model reads its text in both directions (bidirectional=True): use diffusion.py")


def check_known(config: GPTConfig, known: str, what: str):
    """UserError names a setting of a variant that is on, and for which `what` was not written: code that computes a
    part of the model a second time would be wrong. known: the names of the settings for which it was written."""
    names = [field.name for field in fields(config)]
    for field in fields(config)[names.index("tie") + 1:]:  # the settings after it are those of variants
        if field.name not in known.split() and getattr(config, field.name) != field.default:
            value = getattr(config, field.name)
            raise UserError(f"{what} does not know {field.name}={value!r}: adapt it to that variant")


def compute_dtype(name: str) -> mx.Dtype:
    """The dtype of a setting: float32, bfloat16, float16, or auto: bfloat16 on a GPU, float32 on a CPU."""
    if name not in ("auto", "float32", "bfloat16", "float16"):
        raise UserError(f"dtype={name!r} is not one of auto, float32, bfloat16, float16")
    return getattr(mx, ("float32" if ON_CPU else "bfloat16") if name == "auto" else name)


# ---- layers that compute in the dtype of their input: float32 parameters train in bfloat16 ---------------------------


class Linear(nn.Linear):
    def __call__(self, x: mx.array) -> mx.array:
        if (y := quantized.dense_product(self, x)) is not None:
            return y + self.bias.astype(x.dtype) if "bias" in self else y
        weight = self.weight.astype(x.dtype).T
        return mx.addmm(self.bias.astype(x.dtype), x, weight) if "bias" in self else x @ weight


class Embedding(nn.Embedding):
    def as_linear(self, x: mx.array) -> mx.array:
        y = quantized.dense_product(self, x)
        return x @ self.weight.astype(x.dtype).T if y is None else y


class RMSNorm(nn.RMSNorm):
    def __call__(self, x: mx.array) -> mx.array:
        if gpu_train and (y := gpu_train.norm(self, x)) is not None:
            return y
        return mx.fast.rms_norm(x, self.weight.astype(x.dtype), self.eps)


class LayerNorm(nn.LayerNorm):
    def __call__(self, x: mx.array) -> mx.array:
        if gpu_train and (y := gpu_train.norm(self, x)) is not None:
            return y
        bias = self.bias.astype(x.dtype) if "bias" in self else None
        return mx.fast.layer_norm(x, self.weight.astype(x.dtype), bias, self.eps)


# ---- positions -------------------------------------------------------------------------------------------------------


def rope_inv_freq(config: GPTConfig) -> np.ndarray:
    """The angle in radians by which each pair of dimensions turns from one position to the next: (R/2,), theta^(-2i/R)
    (Su et al. 2021), for the R dimensions that turn. For a longer context a scaling divides angles by rope_factor:
    "linear" (Chen et al. 2023) all angles; "llama3" and "yarn" (Peng et al. 2023) the small ones, of long wavelengths.
    Between small and large angles a share is divided, which falls with the number of turns, or of the pair in yarn.
    "yarn" rounds the pairs at both ends of this range to whole numbers, "yarn_untruncated" (GPT-OSS) does not."""
    R, low, high = config.rotary_dim or config.head_dim, config.rope_low_freq, config.rope_high_freq
    inv_freq = config.rope_theta ** (-np.arange(0, R, 2, dtype=np.float64) / R)
    if config.rope_factor == 1:
        return inv_freq
    turns = config.rope_original * inv_freq / (2 * math.pi)  # full turns within the original context
    keep = np.zeros(len(turns))                              # 1: the angle is kept; 0: it is divided
    if config.rope_scaling == "llama3":
        keep = np.clip((turns - low) / (high - low), 0, 1)
    if config.rope_scaling.startswith("yarn"):  # first and last: the pairs that make `high` and `low` turns
        first, last = (R / 2 * math.log(turns[0] / n, config.rope_theta) for n in (high, low))
        if config.rope_scaling == "yarn":
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, R - 1)
        keep = 1 - np.clip((np.arange(len(turns)) - first) / max(last - first, 0.001), 0, 1)
    return keep * inv_freq + (1 - keep) * inv_freq / config.rope_factor


def rotary(config: GPTConfig, layer: int) -> bool:
    """Whether a layer turns its queries and keys by their positions."""
    return config.pos == "rope" and config.rope_pattern[layer % len(config.rope_pattern)] == "R"


# The positions of T tokens are given by `offset`. An int is the position of the first token; the others follow. Where
# rows hold several documents, an array (B, T) gives the place of each token: its position in its document, plus
# DOCUMENT times the number of documents before it in the row. A token attends to its own document only. No token
# attends to one whose place is PADDING; a padding token attends to all, so that its softmax does not divide by 0.
DOCUMENT, PADDING = 2**20, 2**30


def places_of(T: int, offset: int | mx.array) -> mx.array:
    """The places of T tokens: (B, T), or (1, T) where the rows do not differ."""
    return mx.arange(offset, offset + T)[None] if isinstance(offset, int) else offset


def rope(x: mx.array, inverse: mx.array, offset: int | mx.array) -> mx.array:
    """Turn each pair (i, i + R/2) of a head's first R numbers by its position: x (B, H, T, D); inverse (R/2,):
    1 / rope_inv_freq, which MLX calls freqs."""
    half = inverse.size
    if FAST_CPU and isinstance(offset, int) and x.shape[2] == 1 and x.dtype == mx.float32:
        return cpu.rope(x, inverse, offset)
    if isinstance(offset, int):
        return mx.fast.rope(x, 2 * half, traditional=False, base=None, scale=1.0, offset=offset, freqs=inverse)
    if not ON_CPU:  # each position is a row of its own, which MLX's kernel turns by the row's offset
        B, H, T, D = x.shape
        at = mx.broadcast_to(offset % DOCUMENT, (B, T)).reshape(-1)
        y = mx.fast.rope(x.swapaxes(1, 2).reshape(B * T, H, 1, D), 2 * half, traditional=False, base=None, scale=1.0,
                         offset=at, freqs=inverse)
        return y.reshape(B, T, H, D).swapaxes(1, 2)
    angle = (offset % DOCUMENT)[:, None, :, None] / inverse
    cos, sin = mx.cos(angle).astype(x.dtype), mx.sin(angle).astype(x.dtype)
    a, b, rest = mx.split(x, [half, 2 * half], axis=-1)
    return mx.concatenate([a * cos - b * sin, a * sin + b * cos, rest], axis=-1)


# ---- score: which keys a query may see, and with what bias -----------------------------------------------------------


def score_mask(config: GPTConfig, layer: int, T: int, offset: int | mx.array, keys: mx.array | None,
               in_order: bool = False):
    """The mask that is added to the scores of T queries: "causal", None (no mask), or an array (B, H, T, S). keys: the
    places of the keys, (S,) or (B, S); None: 0, 1, ..., offset + T - 1, or those of the queries where offset is an
    array. in_order: the keys are those of the queries, of one document, in the order of their places. The baseline
    builds no array, which keeps MLX on its fused causal kernels."""
    mask = "causal" if T > 1 and not config.bidirectional else None
    if not isinstance(offset, int) and not in_order:
        mask = seen_mask(*score_places(T, offset, keys), not config.bidirectional)
    if windowed(config, layer) and (T > 1 or not isinstance(offset, int)):  # window
        mask = window_mask(config, *score_places(T, offset, keys))  # window
    if config.alibi:  # alibi
        mask = alibi_mask(config, layer, mask, *score_places(T, offset, keys))  # alibi
    return mask


def score_places(T: int, offset: int | mx.array, keys: mx.array | None) -> tuple[mx.array, mx.array]:
    """The places of the queries (B, 1, T, 1) and of the keys (B, 1, 1, S), from the arguments of score_mask()."""
    queries = places_of(T, offset)
    if keys is None:
        keys = mx.arange(offset + T) if isinstance(offset, int) else queries
    return queries[:, None, :, None], keys.reshape(-1, 1, 1, keys.shape[-1])


def seen_mask(queries: mx.array, keys: mx.array, causal: bool = True) -> mx.array:
    """0 where a query may attend to a key, -inf for the future and for other documents: (B, 1, T, S)."""
    near = (queries // DOCUMENT == keys // DOCUMENT) | (queries >= PADDING)
    return mx.where(near & (queries >= keys) if causal else near, 0.0, -mx.inf)


# ---- variant alibi: attention with linear biases (Press et al. 2022) -------------------------------------------------
#
#   score(i, j) = q_i k_j / sqrt(D) - slope_h (i - j)
#
# The score falls with the distance, by a slope that each head has. There is no other position signal. This costs an
# array (H, T, S) of biases.


def check_alibi(config: GPTConfig):
    if config.alibi:
        if config.pos == "learned":
            raise UserError("alibi=True and pos=learned both tell positions: leave one of them out")
        config.pos = "none"


def alibi_slopes(n_head: int) -> list[float]:
    """2^(-8 i / n) for i = 1 ... n. Where n is not a power of 2: the slopes for the next lower power, then every second
    slope for the next higher one."""
    power = 2 ** (n_head.bit_length() - 1)
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    return slopes + [2 ** (-4 * i / power) for i in range(1, 2 * power + 1, 2)][:n_head - power]


def alibi_mask(config: GPTConfig, layer: int, mask, queries: mx.array, keys: mx.array) -> mx.array:
    """-slope * distance, and -inf for the future, plus another mask if there is one: (B, H, T, S)."""
    slopes, distance = alibi_slopes(config.n_head), queries - keys
    if config.diff_attn:  # diff
        slopes = [slope for slope in alibi_slopes(diff_pairs(config)) for _ in range(2)]  # diff
    if windowed(config, layer):  # window
        distance = mx.minimum(distance, farthest(config, keys))  # window
    bias = mx.where(distance < 0, -mx.inf, -mx.array(slopes)[:, None, None] * distance)
    return bias + mask if isinstance(mask, mx.array) else bias


# ---- end of alibi ----------------------------------------------------------------------------------------------------

# ---- variant window: sliding windows (Beltagy et al. 2020; Jiang et al. 2023) and sinks (Xiao et al. 2024) -----------
#
#   query i sees keys i - W < j <= i, and the sinks j < S, as if at distance min(i, S + W - 1) - j
#
# Training costs T * W instead of T * T: queries are taken in blocks, and a block attends to its own block of keys and
# to the block before it. The cache holds W tokens, of which a new token replaces the oldest, and the sinks: first
# tokens to which heads attend when no other token matters to them. The distance to a sink is counted inside the cache,
# so that it never exceeds S + W - 1, however long the text.

try:
    import gpu_window  # the same in one kernel, on an NVIDIA GPU
except ImportError:
    gpu_window = None


def check_window(config: GPTConfig):
    if config.sliding_window < 0:
        raise UserError(f"sliding_window={config.sliding_window}: it must be 0, which is no window, or more")
    if not config.window_pattern or set(config.window_pattern) - set("SL"):
        raise UserError(f"window_pattern={config.window_pattern!r}: it must be letters S (short) and L (long)")
    if config.sinks < 0 or config.sinks and not config.sliding_window:
        raise UserError(f"sinks={config.sinks}: they stay beside a window; give sliding_window too, or sinks=0")
    if config.window_theta < 0 or config.window_theta and not (config.sliding_window and config.pos == "rope"):
        raise UserError(f"window_theta={config.window_theta}: it is 0, or the theta of layers with a window; give "
                        f"sliding_window={config.sliding_window} and pos={config.pos} other values, or window_theta=0")


def refuse_sinks(config: GPTConfig, beside: str):
    if config.sinks:
        raise UserError(f"sinks and {beside}; leave one of them out")


def windowed(config: GPTConfig, layer: int) -> bool:
    """Whether the queries of a layer attend to the window alone."""
    if crosses(config, layer):  # yoco
        return False  # yoco
    return config.sliding_window > 0 and config.window_pattern[layer % len(config.window_pattern)] == "S"


def window_mask(config: GPTConfig, queries: mx.array, keys: mx.array) -> mx.array:
    """0 for keys in the window and sinks, -inf for the rest: (B, 1, T, S)."""
    near = (queries - keys < config.sliding_window) | (keys < config.sinks) | (queries >= PADDING)
    return mx.where(near & (queries >= keys), 0.0, -mx.inf)


def farthest(config: GPTConfig, keys: mx.array) -> mx.array:
    """The largest distance that is counted for each key: a sink's, inside the cache; no limit for other keys."""
    return mx.where(keys < config.sinks, config.sinks + config.sliding_window - 1 - keys, PADDING)


def rope_to_sinks(config: GPTConfig, q: mx.array, k: mx.array, inverse: mx.array, offset: int, keys: mx.array | None):
    """Rotary positions for sinks. q (B, H, T, D) and k (B, KV, S, D), rotated by their positions, become twice as wide.
    The first half of the width holds a key, the second half is 0; for a sink it is the other way round. The second half
    of a query is rotated for the query's position inside the cache, and decides the scores of sinks."""
    T, last = q.shape[2], config.sinks + config.sliding_window - 1
    queries, keys = score_places(T, offset, keys)
    back = mx.fast.rope(q, 2 * inverse.size, traditional=False, base=None, scale=-1.0, offset=offset - last,
                        freqs=inverse)
    q = mx.concatenate([q, mx.where(queries > last, back, q)], axis=-1)
    sink = (keys < config.sinks).swapaxes(2, 3)
    return q, mx.concatenate([mx.where(sink, 0, k), mx.where(sink, k, 0)], axis=-1)


def window_attention(config: GPTConfig, layer: int, q: mx.array, k: mx.array, v: mx.array, offset: int,
                     sink: mx.array | None = None) -> mx.array:
    """attend() under the window's mask, for T queries and the keys of these T tokens: q (B, H, T, D), k and v (B, KV,
    T, D) -> (B, H, T, D). Scores are computed for pairs of blocks that the window reaches, and for no others."""
    if gpu_window is not None and (y := gpu_window.attention(config, q, k, v, offset, sink)) is not None:
        return y
    B, H, T, _ = q.shape
    size = window_block(config)
    n = -(-T // size)

    def blocks(x):  # (B, H, T, D) -> (B, n, H, size, D)
        x = mx.pad(x, ((0, 0), (0, 0), (0, n * size - T), (0, 0)))
        return x.reshape(*x.shape[:2], n, size, -1).swapaxes(1, 2)

    def with_previous(x, first):  # the sinks, the block before, the block: (B, n, KV, S + 2 size, D)
        before = mx.concatenate([mx.zeros_like(x[:, :1]), x[:, :-1]], axis=1)
        first = mx.broadcast_to(first[:, None, :, :config.sinks], (*x.shape[:3], config.sinks, x.shape[4]))
        return mx.concatenate([first, before, x], axis=3)

    place = places_of(T, offset)[:, None, :, None] - PADDING  # so that the 0 which mx.pad adds stands for PADDING
    queries = blocks(place) + PADDING
    keys = with_previous(blocks(place), place).swapaxes(3, 4) + PADDING
    near = (queries >= keys) & (queries - keys < config.sliding_window)
    is_sink = mx.arange(keys.shape[-1]) < config.sinks  # used by queries whose window does not hold the sink
    mask = mx.where(mx.where(is_sink, queries - keys >= config.sliding_window, near), 0.0, -mx.inf)
    if config.alibi:  # alibi
        mask = alibi_mask(config, layer, mask, queries, keys)  # alibi
    mask = mx.broadcast_to(mask, (B, *mask.shape[1:])).flatten(0, 1)
    y = attend(config, blocks(q).flatten(0, 1), with_previous(blocks(k), k).flatten(0, 1),
               with_previous(blocks(v), v).flatten(0, 1), mask, sink)
    return y.reshape(B, n, H, size, -1).swapaxes(1, 2).reshape(B, H, n * size, -1)[:, :, :T]


def window_block(config: GPTConfig) -> int:
    """Queries in a block: at least the window, so that it reaches one earlier block at most; 64 suit a matmul."""
    return max(config.sliding_window, 64)


def endless(config: GPTConfig) -> bool:
    """Whether queries meet no distance beyond those of training, however long the text: the cache is never full."""
    return config.pos != "learned" and all(windowed(config, layer) for layer in range(config.n_layer))


class WindowCache:
    """Keys and values of one layer, of the sinks and the last W other tokens: position p is in row S + (p - S) % W."""

    def __init__(self, window: int, sinks: int = 0, room: Callable = mx.zeros):
        self.window, self.sinks, self.room, self.length = window, sinks, room, 0  # length: tokens seen
        self.keys = self.values = None

    def update(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Append k and v (B, KV, T, D); return keys and values that the new queries may see, and their positions."""
        size, start, T = self.window + self.sinks, self.length, k.shape[2]
        self.length += T
        if self.keys is None:
            self.keys, self.values = (self.room((*x.shape[:2], size, x.shape[3]), x.dtype) for x in (k, v))
        if T == 1:
            place, filled = self.place(start), min(self.length, size)
            self.keys[..., place:place + 1, :] = k
            self.values[..., place:place + 1, :] = v
            return self.keys[..., :filled, :], self.values[..., :filled, :], self.positions(self.length)
        filled, old = min(start, size), self.positions(start)
        old_k, old_v = self.keys[..., :filled, :], self.values[..., :filled, :]
        newest = range(max(start, self.sinks, self.length - self.window), self.length)
        stay = [*range(start, min(self.sinks, self.length)), *newest]
        place, new = mx.array([self.place(p) for p in stay]), mx.array(stay) - start
        self.keys[..., place, :] = k[..., new, :]
        self.values[..., place, :] = v[..., new, :]
        return (mx.concatenate([old_k, k], axis=2), mx.concatenate([old_v, v], axis=2),
                mx.concatenate([old, mx.arange(start, self.length)]))

    def place(self, position: int) -> int:
        return position if position < self.sinks else self.sinks + (position - self.sinks) % self.window

    def positions(self, length: int) -> mx.array:
        """The positions of the cached tokens after `length` tokens, in the order of the rows."""
        S, W, last = self.sinks, self.window, length - 1
        place = mx.arange(min(length, S + W))
        return mx.where(place < S, place, last - (last - place) % W)

    @property
    def nbytes(self) -> int:
        return 0 if self.keys is None else self.keys.nbytes + self.values.nbytes


# ---- end of window ---------------------------------------------------------------------------------------------------

# ---- mixer: attention ------------------------------------------------------------------------------------------------


class KVCache:
    """Keys and values (B, KV, S, D) of one layer. The buffer grows in steps, and a token is written into it."""
    STEP = 256  # positions

    def __init__(self, room: Callable = mx.zeros):
        self.room, self.keys, self.values = room, None, None
        self.length = 0  # positions filled

    def update(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array, None]:
        """Append k and v (B, KV, T, D); return all keys and values so far, and None: their positions are 0, 1, ..."""
        start, self.length = self.length, self.length + k.shape[2]
        room = 0 if self.keys is None else self.keys.shape[2]
        if self.length > room:
            more = -(-(self.length - room) // self.STEP) * self.STEP
            more_k, more_v = (self.room((*x.shape[:2], more, x.shape[3]), x.dtype) for x in (k, v))
            self.keys = quantized.joined(self.keys, more_k) if room else more_k
            self.values = quantized.joined(self.values, more_v) if room else more_v
        self.keys[..., start:self.length, :] = k
        self.values[..., start:self.length, :] = v
        return self.keys[..., :self.length, :], self.values[..., :self.length, :], None

    @property
    def nbytes(self) -> int:
        return 0 if self.keys is None else self.keys.nbytes + self.values.nbytes


class Cache:
    """The key/value cache of a model: one cache a layer, and the number of tokens read. room(shape, dtype) allocates an
    array of keys or values."""

    def __init__(self, blocks: list, room: Callable = mx.zeros):
        self.blocks, self.room = blocks, room
        self.clear()

    def clear(self):
        self.layers = [block.make_cache(self.room) for block in self.blocks]
        self.offset = 0  # tokens read = position of the next one

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)


class Attention(nn.Module):
    """Causal multi-head attention (Vaswani et al. 2017) with grouped key/value heads (Ainslie et al. 2023)."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        C, D, bias = config.n_embd, config.head_dim, config.bias or config.qkv_bias
        self.config, self.layer = config, layer
        self.q = Linear(C, config.n_head * D, bias=bias)
        self.k = Linear(C, config.n_kv_head * D, bias=bias)
        self.v = Linear(C, config.n_kv_head * D, bias=bias)
        self.out = Linear(config.n_head * D, C, bias=config.bias or config.out_bias)
        if config.qk_norm:
            wide = config.qk_norm_width
            self.q_norm = RMSNorm(D * config.n_head if wide else D, eps=config.norm_eps)
            self.k_norm = RMSNorm(D * config.n_kv_head if wide else D, eps=config.norm_eps)
        if config.sink_logits:
            self.sink = Sink(config.n_head)
        if rotary(config, layer):
            inv_freq = rope_inv_freq(config)
            if config.window_theta and windowed(config, layer):  # window
                inv_freq = rope_inv_freq(replace(config, rope_theta=config.window_theta, rope_factor=1.0))  # window
            self._inverse = mx.array(1 / inv_freq, dtype=mx.float32)  # "_": not a parameter
        if config.value_embeds:  # valembed
            make_value_embedding(self)  # valembed
        if config.value_residual and layer > 0:  # resformer
            self.value_mix = mx.array([0.5, 0.5])  # lambda_1, lambda_2  # resformer

    def make_cache(self, room: Callable = mx.zeros):
        if windowed(self.config, self.layer):  # window
            return WindowCache(self.config.sliding_window, self.config.sinks, room)  # window
        return KVCache(room)

    def __call__(self, x: mx.array, offset: int, cache, tap: Callable, carry: dict) -> mx.array:
        y = tap("heads", self.layer, self.heads(x, offset, cache, tap, carry))
        return self.out(y.swapaxes(1, 2).reshape(*x.shape[:2], -1))

    def heads(self, x: mx.array, offset: int, cache, tap: Callable, carry: dict) -> mx.array:
        """The output of each head, before the output projection: (B, T, C) -> (B, H, T, D)."""
        q = tap("q", self.layer, self.turned("q", x, offset))
        k, v, keys = self.keys_values(x, offset, cache, tap, carry)
        return self.attended(q, k, v, keys, offset, carry)

    def attended(self, q: mx.array, k: mx.array, v: mx.array, keys: mx.array | None, offset: int, carry: dict):
        """heads() from the queries (B, H, T, D), the keys and values (B, KV, S, D), and the places of the keys."""
        T, config, layer = q.shape[2], self.config, self.layer
        sink = self.sink.weight if config.sink_logits else None
        if config.diff_attn:  # diff
            v = values_of_pairs(config, v)  # diff
        if windowed(config, layer) and config.sinks and rotary(config, layer):  # window
            q, k = rope_to_sinks(config, q, k, self._inverse, offset, keys)  # window
        mask = score_mask(config, layer, T, offset, keys, "in_order" in carry and k.shape[2] == T)
        if "dropout" in carry:  # dropout
            return dropout_attention(self, q, k, v, mask, sink, carry)  # dropout
        if windowed(config, layer) and k.shape[2] == T > 2 * window_block(config):  # window
            return window_attention(config, layer, q, k, v, offset, sink)  # window
        return attend(config, q, k, v, mask, sink)

    def turned(self, name: str, x: mx.array, offset: int) -> mx.array:
        """The queries (name "q") or the keys ("k") of x (B, T, C), with their norm and positions: (B, H, T, D)."""
        config, y = self.config, self[name](x)
        if config.qk_norm_width:
            y = self[f"{name}_norm"](y)
        y = y.reshape(*x.shape[:2], -1, config.head_dim).swapaxes(1, 2)
        if config.qk_norm and not config.qk_norm_width:
            y = self[f"{name}_norm"](y)
        return rope(y, self._inverse, offset) if rotary(config, self.layer) else y

    def keys_values(self, x: mx.array, offset: int, cache, tap: Callable, carry: dict):
        """Keys and values (B, KV, S, D) of the cached tokens and of x (B, T, C), and the positions of the keys (S,), or
        None where they are 0, 1, ..."""
        config, layer, k = self.config, self.layer, self.turned("k", x, offset)
        v = self.v(x).reshape(*x.shape[:2], -1, config.head_dim).swapaxes(1, 2)
        if config.value_embeds:  # valembed
            v = add_value_embedding(self, x, v, carry)  # valembed
        if config.value_residual:  # resformer
            v = mix_first_values(self, v, carry)  # resformer
        k, v = tap("k", layer, k), tap("v", layer, v)
        return (k, v, None) if cache is None else cache.update(k, v)


class Sink(nn.Module):
    """A logit of each head (OpenAI 2025). It joins the softmax of a query's scores, but has no value: a head can attend
    to nothing."""

    def __init__(self, n_head: int):
        super().__init__()
        self.weight = mx.zeros((n_head,))


def attend(config: GPTConfig, q: mx.array, k: mx.array, v: mx.array, mask, sink: mx.array | None = None) -> mx.array:
    """softmax(scale q k^T + mask) v: q (B, H, T, D), k and v (B, KV, S, D) -> (B, H, T, D). sink: see Sink, (H,)."""
    if config.attn_softcap:  # softcap
        return weighed(attention_weights(config, q, k, mask, sink).astype(q.dtype), v)  # softcap
    scale = config.attn_scale or config.head_dim ** -0.5
    if isinstance(mask, mx.array) and mask.dtype != mx.bool_:
        mask = mask.astype(q.dtype)  # the fused kernels refuse a wider one
    sink = None if sink is None else sink.astype(q.dtype)
    if FAST_CPU and q.shape[2] > 1 and q.dtype == mx.float32:
        return cpu.attention(q, k, v, scale, mask, sink)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sink)


def attention_weights(config: GPTConfig, q: mx.array, k: mx.array, mask, sink: mx.array | None = None) -> mx.array:
    """The weights of attend(), which the fused kernels do not keep: (B, H, T, S), float32."""
    (B, H, T, D), (_, KV, S, _) = q.shape, k.shape
    scores = (q.reshape(B, KV, -1, D) @ k.swapaxes(2, 3)).reshape(B, H, T, S).astype(mx.float32)
    scores = scores * (config.attn_scale or config.head_dim ** -0.5)
    if config.attn_softcap:  # softcap
        scores = capped(scores, config.attn_softcap)  # softcap
    if isinstance(mask, str):
        mask = mx.tri(T, S, S - T, dtype=mx.bool_)
    if mask is not None:
        scores = mx.where(mask, scores, -mx.inf) if mask.dtype == mx.bool_ else scores + mask
    if sink is not None:
        column = mx.broadcast_to(sink.astype(mx.float32)[:, None, None], (B, H, T, 1))
        return softmax(mx.concatenate([scores, column], axis=-1))[..., :-1]
    return softmax(scores)


def weighed(weights: mx.array, v: mx.array) -> mx.array:
    """The sums of values v (B, KV, S, D) by weights (B, H, T, S): (B, H, T, D)."""
    (B, H, T, S), KV = weights.shape, v.shape[1]
    return (weights.reshape(B, KV, -1, S) @ v).reshape(B, H, T, -1)


# ---- variant diff: differential attention (Ye et al. 2024; version 2, 2026) ------------------------------------------
#
#   1: norm(A1 V - lambda A2 V) (1 - lambda_0),   lambda = exp(lq1 lk1) - exp(lq2 lk2) + lambda_0, one a layer
#   2: A1 V - sigmoid(lambda) A2 V,               lambda = W x, one a token and head
#
# A1 and A2 are the attention maps of two neighbouring query heads. Weight that both maps have cancels, which removes
# noise. Version 1 pairs the n_head heads of the baseline, and joins two value heads to one of twice the width. Version
# 2 has n_head pairs: twice the query heads of the baseline, and as many key and value heads.

DIFF_LAMBDAS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")


def check_diff(config: GPTConfig):
    if config.diff_attn and config.qk_norm_width:
        raise UserError("diff_attn=True and qk_norm_width=True: pairs of heads need a norm each; leave one of them out")
    if config.diff_attn_version not in (1, 2):
        raise UserError(f"diff_attn_version={config.diff_attn_version} is not one of 1, 2")
    if config.diff_attn and config.diff_attn_version == 1 and (config.n_head % 2 or config.n_kv_head % 2):
        raise UserError(f"n_head={config.n_head} and n_kv_head={config.n_kv_head} must be even for diff_attn, which "
                        "pairs them")


def diff_pairs(config: GPTConfig) -> int:
    return config.n_head // 2 if config.diff_attn_version == 1 else config.n_head


def values_of_pairs(config: GPTConfig, v: mx.array) -> mx.array:
    """Version 1 joins value heads 2i and 2i + 1, for both key heads 2i and 2i + 1: (B, KV, S, 2 D)."""
    if config.diff_attn_version == 2:
        return v
    B, KV, S, D = v.shape
    return mx.repeat(v.swapaxes(1, 2).reshape(B, S, KV // 2, 2 * D), 2, axis=2).swapaxes(1, 2)


def halves(x: mx.array) -> list[mx.array]:
    """The first and second heads of pairs: (B, 2 P, T, D) -> twice (B, P, T, D). x[:, 0::2] has a slower gradient."""
    B, H, T, D = x.shape
    return [part.squeeze(2) for part in mx.split(x.reshape(B, H // 2, 2, T, D), 2, axis=2)]


class DiffAttention(Attention):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__(config, layer)
        C, D = config.n_embd, config.head_dim
        if config.diff_attn_version == 1:
            self.lambda_0 = 0.8 - 0.6 * math.exp(-0.3 * layer)
            for name in DIFF_LAMBDAS:
                self[name] = mx.zeros((D,))
            self.head_norm = RMSNorm(2 * D, eps=1e-5)
        else:
            self.q = Linear(C, 2 * config.n_head * D, bias=config.bias or config.qkv_bias)
            self.lam = Linear(C, config.n_head, bias=False)
            if config.sink_logits:
                self.sink = Sink(2 * config.n_head)

    def heads(self, x: mx.array, offset: int, cache, tap: Callable, carry: dict) -> mx.array:
        y = super().heads(x, offset, cache, tap, carry)
        if self.config.diff_attn_version == 1:
            return y
        first, second = halves(y)
        return first - sigmoid(self.lam(x)).swapaxes(1, 2)[..., None] * second

    def attended(self, *arguments) -> mx.array:
        y = super().attended(*arguments)
        if self.config.diff_attn_version == 2:
            return y
        if gpu_train and (found := gpu_train.difference(self, y)) is not None:
            return found
        first, second = halves(y)
        q1, k1, q2, k2 = (self[name].astype(mx.float32) for name in DIFF_LAMBDAS)
        lam = mx.exp((q1 * k1).sum()) - mx.exp((q2 * k2).sum()) + self.lambda_0
        weight = (self.head_norm.weight * (1 - self.lambda_0)).astype(first.dtype)
        return mx.fast.rms_norm(first - lam.astype(first.dtype) * second, weight, self.head_norm.eps)


# ---- end of diff -----------------------------------------------------------------------------------------------------

# ---- variant resformer: value residual learning (Zhou et al. 2024) ---------------------------------------------------
#
#   v_l = lambda_1 v_l + lambda_2 v_0      for every layer l > 0; both lambdas are learned, and start at 1/2
#
# The values of layer 0 are computed from the token's embedding alone. The mixture keeps them within reach of deep
# layers. It costs two parameters a layer. The cache holds the mixed values.


def mix_first_values(attention: Attention, v: mx.array, carry: dict) -> mx.array:
    """The values (B, KV, T, D) of a layer, mixed with those of layer 0, which layer 0 puts into the carry."""
    if attention.layer == 0:
        carry["first_values"] = v.swapaxes(1, 2)
        return v
    own, first = attention.value_mix.astype(v.dtype)
    return own * v + first * carry["first_values"].swapaxes(1, 2)


def no_values(config: GPTConfig, x: mx.array) -> mx.array:
    """The initial value in the carry. It stays 0 for tokens that layer 0 skips, as it may with Mixture of Depths."""
    return mx.zeros((*x.shape[:2], config.n_kv_head, config.head_dim), x.dtype)


# ---- end of resformer ------------------------------------------------------------------------------------------------

# ---- variant valembed: value embeddings (modded-nanogpt, 2024; nanochat, 2026) ---------------------------------------
#
#   v_t = v_t + g_t E_l[token_t],      g = 2 sigmoid(W x[:GATE]), one a head, 1 at the start
#
# The last layer, and every second layer counted back from it, has a table E_l with one row for each token id. A table
# has V x KV x D parameters, but takes little time: a row is looked up, and no matrix is multiplied.

GATE = 32  # width of the part of x that the gate reads


def has_value_embedding(attention: Attention) -> bool:
    return (attention.config.n_layer - 1 - attention.layer) % 2 == 0


def make_value_embedding(attention: Attention):
    config = attention.config
    if has_value_embedding(attention):
        attention.value_embed = Embedding(config.vocab_size, config.n_kv_head * config.head_dim)
        attention.value_gate = Linear(min(GATE, config.n_embd), config.n_kv_head, bias=False)
        attention.value_gate.weight = mx.zeros(attention.value_gate.weight.shape)


def add_value_embedding(attention: Attention, x: mx.array, v: mx.array, carry: dict) -> mx.array:
    """The values v (B, KV, T, D) plus gated embeddings of the token ids; x (B, T, C) is the input of attention."""
    if not has_value_embedding(attention):
        return v
    found = attention.value_embed(mx.stop_gradient(carry["token_ids"])).astype(v.dtype)  # (B, T, KV D)
    gate = 2 * sigmoid(attention.value_gate(x[..., :GATE]))                              # (B, T, KV)
    found = found.reshape(*gate.shape, -1) * gate[..., None]
    return v + found.swapaxes(1, 2)


# ---- end of valembed -------------------------------------------------------------------------------------------------

# ---- ffn: what each position computes by itself ----------------------------------------------------------------------


@mx.custom_function
def with_loss(x: mx.array, loss: mx.array) -> mx.array:
    """Return x. In the backward pass the gradient of `loss`, a scalar, is added to the gradient of the model's loss,
    whose value stays the cross-entropy."""
    return x + 0


@with_loss.vjp
def with_loss_backward(primals, cotangent, _):
    return cotangent, mx.ones_like(primals[1])


def recompute(f: Callable) -> Callable:
    """f, computed again in the backward pass: for elementwise functions, where computing is cheaper than storing."""
    return f if ON_CPU else mx.checkpoint(f)


erf, sigmoid, softmax = mx.erf, mx.sigmoid, partial(mx.softmax, axis=-1)
if FAST_CPU:
    erf, sigmoid, softmax = cpu.erf, cpu.sigmoid, cpu.softmax


def gelu_tanh(x: mx.array) -> mx.array:
    return x * sigmoid((8 / math.pi) ** 0.5 * (x + 0.044715 * x * x * x))


def swiglu_clip(gate: mx.array, x: mx.array) -> mx.array:
    """GPT-OSS's SwiGLU (OpenAI 2025): inputs are clipped, and 1 is added to x."""
    gate = mx.minimum(gate, 7)
    return gate * sigmoid(1.702 * gate) * (mx.clip(x, -7, 7) + 1)


ACTIVATIONS = {
    "relu2": recompute(lambda x: mx.square(mx.maximum(x, 0))),
    "gelu": recompute(lambda x: x * (0.5 + 0.5 * erf(x * 0.5**0.5))),
    "gelu_tanh": recompute(gelu_tanh),
    "swiglu": recompute(lambda gate, x: gate * sigmoid(gate) * x),  # SiLU of the gate (Shazeer 2020)
    "geglu": recompute(lambda gate, x: gelu_tanh(gate) * x),
    "swiglu_clip": recompute(swiglu_clip),
}
GATED = ("swiglu", "geglu", "swiglu_clip")


class MLP(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        if config.mlp in GATED:
            self.gate = Linear(config.n_embd, config.ffn_dim, bias=config.bias)
        self.up = Linear(config.n_embd, config.ffn_dim, bias=config.bias)
        self.down = Linear(config.ffn_dim, config.n_embd, bias=config.bias)

    def __call__(self, x: mx.array, tap: Callable) -> mx.array:
        inputs = (self.gate(x), self.up(x)) if self.config.mlp in GATED else (self.up(x),)
        return self.down(tap("hidden", self.layer, ACTIVATIONS[self.config.mlp](*inputs)))


# ---- variant moe: mixture of experts (Shazeer et al. 2017; Fedus et al. 2022; Jiang et al. 2024) ---------------------
#
#   y = sum over the k experts of largest p_e of g_e MLP_e(x),   p = softmax(W x),   g = p_e / (sum of the k chosen);
#   g = p_e where k = 1, or the router would learn nothing
#
# A token uses only k experts. The (token, expert) pairs are sorted by expert into blocks of 64 rows, so that one matmul
# of blocks computes all experts. The cost is that of k MLPs of width ffn_dim, of the empty rows in the last block of
# each expert, and of two copies of the rows. gpu_experts.py has kernels without empty rows and without copies.
#
# Two ways keep the load of the experts even. "loss" adds E sum_e f_e P_e over the tokens of a pass, where f is the
# share of pairs and P the mean p (Fedus). "bias" adds a number to p where experts are chosen, which grows while an
# expert has too few tokens (Wang et al. 2024). With both, the square of the router's logsumexp keeps logits small (Zoph
# et al. 2022).

ROWS = 64  # of a block
SWITCH_LOSS, Z_LOSS, BIAS_STEP = 0.01, 0.001, 0.001

try:
    import gpu_experts  # the same in a few kernels, on an NVIDIA GPU
except ImportError:
    gpu_experts = None


def check_moe(config: GPTConfig):
    if config.n_expert < 0 or config.n_shared_expert < 0:
        raise UserError(f"n_expert={config.n_expert}, n_shared_expert={config.n_shared_expert}: they must be 0 or more")
    if config.n_expert and not 1 <= config.expert_top_k <= config.n_expert:
        raise UserError(f"expert_top_k={config.expert_top_k}: it must be 1 to n_expert={config.n_expert}")
    if config.n_shared_expert and not config.n_expert:
        raise UserError(f"n_shared_expert={config.n_shared_expert} needs others beside: give n_expert too")
    if config.router_bias and not config.n_expert:
        raise UserError("router_bias=True is of a router of experts: give n_expert too")
    if config.expert_balance not in ("loss", "bias", "none"):
        raise UserError(f"expert_balance={config.expert_balance!r} is not one of loss, bias, none")


def dispatch(chosen: mx.array, n_expert: int) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Sort the pairs of N tokens and their k experts, chosen (N, k), into rows. Returns the pair of each row (0 in
    empty rows), the row of each pair (N k,), the expert of each block of rows, and the rows where the pairs of each
    expert begin and end (E, 2). Results in empty rows are not read, forward or backward."""
    pairs = chosen.reshape(-1)
    order = mx.argsort(pairs)
    count = mx.zeros((n_expert,), dtype=mx.int32).at[pairs].add(1)
    blocks = (count + ROWS - 1) // ROWS
    last = mx.cumsum(blocks)
    n = pairs.size // ROWS + n_expert  # blocks that suffice for any counts
    expert = mx.minimum((mx.arange(n)[:, None] >= last).sum(1), n_expert - 1)
    empty_before = (last - blocks) * ROWS - (mx.cumsum(count) - count)  # empty rows before each pair
    rows_in_order = mx.arange(pairs.size) + empty_before[pairs[order]]
    pair = mx.put_along_axis(mx.zeros((n * ROWS,), dtype=mx.int32), rows_in_order, order.astype(mx.int32), axis=0)
    row = mx.put_along_axis(mx.zeros(pairs.shape, dtype=mx.int32), order, rows_in_order, axis=0)
    begin = (last - blocks) * ROWS
    return pair, row, expert.astype(mx.uint32), mx.stack([begin, begin + count], axis=1).astype(mx.uint32)


@mx.custom_function
def to_rows(x: mx.array, pair: mx.array, row: mx.array) -> mx.array:
    """Tokens (N, C) -> rows (n, C). The backward pass gathers, too, since a scatter-add is slow on a CPU."""
    return x[pair // (row.size // len(x))]


@to_rows.vjp
def to_rows_backward(primals, cotangent, _):
    x, pair, row = primals
    return cotangent[row].reshape(len(x), -1, x.shape[1]).sum(1), mx.zeros_like(pair), mx.zeros_like(row)


@mx.custom_function
def from_rows(y: mx.array, pair: mx.array, row: mx.array) -> mx.array:
    """Rows (n, C) -> pairs (N k, C)."""
    return y[row]


@from_rows.vjp
def from_rows_backward(primals, cotangent, _):
    _, pair, row = primals
    return cotangent[pair], mx.zeros_like(pair), mx.zeros_like(row)


def gather_mm(x: mx.array, weight: mx.array, expert: mx.array, is_sorted: bool = False) -> mx.array:
    """mx.gather_mm of x (n, rows, in) and weight (E, in, out). On a CPU, MLX has it for float32 alone."""
    dtype = x.dtype
    if ON_CPU:
        x, weight = x.astype(mx.float32), weight.astype(mx.float32)
    return mx.gather_mm(x, weight, rhs_indices=expert, sorted_indices=is_sorted).astype(dtype)


@mx.custom_function
def blocks_by_experts(x: mx.array, weight: mx.array, expert: mx.array, ends: mx.array) -> mx.array:
    """Rows (n, in), in blocks of ROWS, times the weight (E, out, in) of each block's expert -> (n, out)."""
    x = x.reshape(-1, ROWS, x.shape[-1])
    return gather_mm(x, weight.swapaxes(1, 2), expert, True).flatten(0, 1)


@blocks_by_experts.vjp
def blocks_by_experts_backward(primals, cotangent, _):
    x, weight, expert, ends = primals
    g = cotangent.reshape(-1, ROWS, cotangent.shape[-1])
    dx = gather_mm(g, weight, expert, True).flatten(0, 1)
    return dx, mx.segmented_mm(cotangent.T, x, ends), mx.zeros_like(expert), mx.zeros_like(ends)


class Experts(nn.Module):
    """One linear layer for each expert."""

    def __init__(self, n_expert: int, inputs: int, outputs: int, bias: bool):
        super().__init__()
        self.weight = mx.zeros((n_expert, outputs, inputs))
        if bias:
            self.bias = mx.zeros((n_expert, outputs))

    def __call__(self, x: mx.array, expert: mx.array, ends: mx.array | None) -> mx.array:
        """Rows (n, in) -> (n, out): in blocks, as dispatch() sorts them, or, without ends, one expert a row."""
        weight = self.weight.astype(x.dtype)
        if ends is None:
            y = gather_mm(x[:, None], weight.swapaxes(1, 2), expert)[:, 0]
            return y + self.bias[expert].astype(x.dtype) if "bias" in self else y
        y = blocks_by_experts(x, weight, expert, ends)
        if "bias" in self:
            expert = mx.repeat(expert, ROWS)
            empty = mx.arange(len(x)) >= ends[expert, 1]
            y = y + mx.where(empty[:, None], 0, self.bias[expert]).astype(x.dtype)
        return y

    def to_quantized(self, group_size: int, bits: int, **_) -> "PackedExperts":
        return PackedExperts(self, group_size, bits)


class PackedExperts(nn.Module):
    """Experts whose weights stay packed integers (see quantized.py). They are frozen."""

    def __init__(self, dense: Experts, group_size: int, bits: int):
        super().__init__()
        self.group_size, self.bits = group_size, bits
        self.weight, self.scales, self.biases = mx.quantize(dense.weight, group_size, bits)
        if "bias" in dense:
            self.bias = dense.bias
        self.freeze()

    def __call__(self, x: mx.array, expert: mx.array, ends: mx.array | None) -> mx.array:
        expert_of_row = expert if ends is None else mx.repeat(expert, ROWS)
        if "order" in self:  # (E, in): the columns are stored in this order
            x = mx.take_along_axis(x, self.order[expert_of_row], axis=1)
        if ends is None:
            y = mx.gather_qmm(x[:, None], self.weight, self.scales, self.biases, rhs_indices=expert,
                              group_size=self.group_size, bits=self.bits)[:, 0]
        else:
            y = self.in_blocks(x, expert)
        return y + self.bias[expert_of_row] if "bias" in self else y  # empty rows are not read

    def in_blocks(self, x: mx.array, expert: mx.array) -> mx.array:
        """blocks_by_experts() of packed weights, which are unpacked again in the backward pass."""

        def product(x, weight):
            x = x.reshape(-1, ROWS, x.shape[-1])
            return gather_mm(x, weight, expert, True).flatten(0, 1)

        @mx.custom_function
        def forward(x):
            return product(x, quantized.unpacked(self, x).swapaxes(1, 2))

        @forward.vjp
        def backward(x, cotangent, _):
            return product(cotangent, quantized.unpacked(self, cotangent))

        return forward(x)


class MoE(nn.Module):
    """A mixture of experts. It calls the tap at the site "router" with the logits (B, T, n_expert)."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        E, C, F = config.n_expert, config.n_embd, config.ffn_dim
        self.router = Linear(C, E, bias=config.router_bias)
        if config.mlp in GATED:
            self.gate = Experts(E, C, F, config.bias)
        self.up = Experts(E, C, F, config.bias)
        self.down = Experts(E, F, C, config.bias)
        if config.n_shared_expert:  # the sum of several MLPs is one wider MLP
            self.shared = MLP(replace(config, ffn_dim=F * config.n_shared_expert), layer)
        if config.expert_balance == "bias":
            self.balance = mx.zeros((E,))
            self.freeze(keys=["balance"], recurse=False)  # set by rebalance(), not by gradients
        self._count = mx.zeros((E,))  # pairs of each expert since the last rebalance()
        self.over_processes = lambda count: count  # the mean over those that compute other rows: see parallel.py

    def __call__(self, x: mx.array, tap: Callable) -> mx.array:
        flat = x.reshape(-1, x.shape[-1])
        gates, chosen = self.choose(tap("router", self.layer, self.router(x)).reshape(len(flat), -1))
        y = self.weighed(flat, gates.astype(x.dtype), chosen).reshape(x.shape)
        return y + self.shared(x, tap) if self.config.n_shared_expert else y

    def choose(self, logits: mx.array) -> tuple[mx.array, mx.array]:
        """The gates and the numbers of the chosen experts, (N, k) each, from the router's logits (N, n_expert)."""
        config, k = self.config, self.config.expert_top_k
        if gpu_experts is not None and (found := gpu_experts.routed(self, logits)) is not None:
            gates, chosen, count = found
            self._count = self._count + count
            return gates, chosen
        logits = logits.astype(mx.float32)
        p = mx.softmax(logits, axis=-1)
        score = p + self.balance if "balance" in self else p
        chosen = mx.argpartition(mx.stop_gradient(-score), k - 1, axis=-1)[:, :k]
        gates = mx.take_along_axis(p, chosen, axis=-1)
        gates = gates / gates.sum(-1, keepdims=True) if k > 1 else gates
        if self.training:
            count = (chosen.reshape(-1, 1) == mx.arange(config.n_expert)).astype(mx.float32).sum(0)
            self._count = self._count + count
            loss = Z_LOSS * mx.logsumexp(logits, axis=-1).square().mean()
            if config.expert_balance == "loss":
                load = self.over_processes(count) / chosen.size
                loss = loss + SWITCH_LOSS * config.n_expert * (load * p.mean(0)).sum()
            gates = with_loss(gates, loss)
        return gates, chosen

    def weighed(self, x: mx.array, gates: mx.array, chosen: mx.array) -> mx.array:
        """For tokens x (N, C), the sums of the outputs of the chosen experts (N, k) times gates (N, k): (N, C)."""
        config, k = self.config, chosen.shape[1]
        if gpu_experts is not None and chosen.size >= ROWS:
            if (y := gpu_experts.mixture(self, x, gates, chosen)) is not None:
                return y
        if chosen.size < ROWS:  # too few pairs to sort
            rows, expert, ends = mx.repeat(x, k, axis=0), chosen.reshape(-1), None
        else:
            pair, row, expert, ends = dispatch(chosen, config.n_expert)
            rows = to_rows(x, pair, row)
        inputs = (self.gate(rows, expert, ends),) if config.mlp in GATED else ()
        rows = self.down(ACTIVATIONS[config.mlp](*inputs, self.up(rows, expert, ends)), expert, ends)
        pairs = rows if ends is None else from_rows(rows, pair, row)
        return (gates[:, :, None] * pairs.reshape(len(x), k, -1)).sum(1)


def rebalance(model) -> mx.array:
    """Call it after an update. Returns the load of each expert over the mean load of its layer, (layers, E), where 1 is
    balanced, summed over processes. With expert_balance=bias it also changes the biases by one step."""
    loads, moes = [], [block.mlp for block in model.blocks]
    for moe, count in zip(moes, mx.distributed.all_sum(mx.stack([moe._count for moe in moes])), strict=True):
        moe._count = mx.zeros_like(count)
        loads.append(count / mx.maximum(count.mean(), 1e-9))
        if "balance" in moe:
            moe.balance = moe.balance + BIAS_STEP * mx.sign(1 - loads[-1])
    return mx.stack(loads)


# ---- end of moe ------------------------------------------------------------------------------------------------------

# ---- route: which positions a block works on -------------------------------------------------------------------------


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), for every position. Norms may also stand after attention and MLP
    (norm_place), and with `parallel` both read the same x."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        before, after = config.norm_place != "after", config.norm_place != "before"
        if before:
            self.attn_norm = make_norm(config)
        self.attn = Attention(config, layer)
        if config.diff_attn:  # diff
            self.attn = DiffAttention(config, layer)  # diff
        if crosses(config, layer):  # yoco
            self.attn = cross_attention(config, layer)  # yoco
        if after:
            self.attn_post_norm = make_norm(config)
        if before:
            self.mlp_norm = make_norm(config)
        self.mlp = MLP(config, layer)
        if config.n_expert:  # moe
            self.mlp = MoE(config, layer)  # moe
        if after:
            self.mlp_post_norm = make_norm(config)

    def make_cache(self, room: Callable = mx.zeros):
        return self.attn.make_cache(room)

    def __call__(self, x: mx.array, offset: int, cache, tap: Callable, carry: dict) -> mx.array:
        if cpu_train and (y := cpu_train.block_output(self, x, offset, cache, tap, carry)) is not None:
            return y
        if gpu_train and self.training and cache is None and tap is no_tap and carry.keys() <= {"in_order"}:
            if (y := gpu_train.block(self, x, offset, carry)) is not None:
                return y
        y = self.attn(self.normed("attn_norm", x), offset, cache, tap, carry)
        y = tap("attn", self.layer, self.scaled(self.normed("attn_post_norm", y)))
        if "dropout" in carry:  # dropout
            y = dropout(y, carry, 3 * self.layer + 1)  # dropout
        entered, x = x, x + y
        if not self.config.parallel:
            entered = x = tap("mid", self.layer, x)
        y = self.mlp(self.normed("mlp_norm", entered), tap)
        y = tap("mlp", self.layer, self.scaled(self.normed("mlp_post_norm", y)))
        if "dropout" in carry:  # dropout
            y = dropout(y, carry, 3 * self.layer + 2)  # dropout
        return x + y

    def normed(self, name: str, x: mx.array) -> mx.array:
        return self[name](x) if name in self else x

    def scaled(self, y: mx.array) -> mx.array:
        return y if self.config.residual_scale == 1 else y * self.config.residual_scale


def make_norm(config: GPTConfig) -> nn.Module:
    if config.norm == "layer":
        return LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias or config.norm_bias)
    return RMSNorm(config.n_embd, eps=config.norm_eps)


# ---- variant mod: Mixture of Depths (Raposo et al. 2024) -------------------------------------------------------------
#
#   topk: x_t + r_t (block(x)_t - x_t) for the tokens of the largest r_t, x_t for the others,   r = w x
#   soft: x_t + sigmoid(r_t) (block(x)_t - x_t) for all: it learns what to skip, but saves no work
#
# A routed block computes a share mod_capacity of the tokens of a sequence, which attend to one another only and keep
# their positions. Which r_t are the largest depends on future tokens. So outside of training, a predictor decides for
# each token by itself whether it would be among the largest.


def check_mod(config: GPTConfig):
    if config.mod not in ("none", "topk", "soft"):
        raise UserError(f"mod={config.mod!r} is not one of none, topk, soft")
    if not 0 < config.mod_capacity <= 1:
        raise UserError(f"mod_capacity={config.mod_capacity}: it must be over 0 and up to 1")
    if config.mod != "none" and not 1 <= config.mod_every <= config.n_layer:
        raise UserError(f"mod_every={config.mod_every}: it must be 1 to n_layer={config.n_layer}, or none is routed")
    if config.mod == "topk":  # window
        refuse_sinks(config, "mod=topk: routed blocks skip some of the first tokens")  # window


@mx.custom_function
def chosen_rows(x: mx.array, rows: mx.array, order: mx.array) -> tuple[mx.array, mx.array]:
    """x[rows, order] and x (B, T, C), whose gradients are added up at the chosen positions alone."""
    return x[rows, order], x


@chosen_rows.vjp
def chosen_rows_backward(primals, cotangents, _):
    _, rows, order = primals
    return cotangents[1].at[rows, order].add(cotangents[0]), mx.zeros_like(rows), mx.zeros_like(order)


class RoutedBlock(Block):
    """A block that skips tokens. It calls the tap at the site "depth" with r (B, T)."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__(config, layer)
        self.depth_router = Linear(config.n_embd, 1, bias=False)
        if config.mod == "topk":
            self.predictor = Linear(config.n_embd, 1, bias=False)
            self.predictor.weight = mx.zeros((1, config.n_embd))
            self.threshold = mx.array([math.log(1 / min(config.mod_capacity, 0.999) - 1)])

    def make_cache(self, room: Callable = mx.zeros):
        make = super().make_cache
        return make(room) if self.config.mod == "soft" else RoutedCache(lambda: make(room))

    def __call__(self, x: mx.array, offset: int, cache, tap: Callable, carry: dict) -> mx.array:
        r = tap("depth", self.layer, self.depth_router(x)[..., 0])
        if self.config.mod == "soft":
            return x + sigmoid(r)[..., None] * (super().__call__(x, offset, cache, tap, carry) - x)
        likely = self.likely(x)
        if isinstance(cache, RoutedCache):
            return self.continued(x, r, likely, offset, cache, tap, carry)
        T, rows = x.shape[1], mx.arange(len(x))[:, None]
        at = mx.broadcast_to(places_of(T, offset), r.shape)
        if not self.training:  # the chosen tokens first; the others follow as padding, to which no chosen token attends
            chosen, order = self.taken(x)
            worked = chosen[rows, order]
            at = mx.where(worked, at[rows, order], PADDING)
            change = self.change(x[rows, order], rows, order, worked, at, cache, tap, carry)
            return x.at[rows, order].add(change * (worked * r[rows, order]).astype(x.dtype)[..., None])
        k = max(1, round(self.config.mod_capacity * T))
        order = mx.sort(mx.argpartition(mx.stop_gradient(-r), k - 1, axis=1)[:, :k], axis=1)
        chosen = mx.put_along_axis(mx.zeros(r.shape), order, mx.array(1.0), axis=1)
        miss = mx.logaddexp(likely, 0) - likely * chosen  # the predictor's cross-entropy
        selected, x = chosen_rows(x, rows, order)
        # r of the chosen tokens, computed from these: its gradient is then theirs alone, not one of all tokens
        factor = self.depth_router(selected)[..., 0] if tap is no_tap else r[rows, order]
        selected = with_loss(selected, 0.01 * miss.mean())  # small: it must not dominate the norm that is clipped
        change = self.change(selected, rows, order, mx.ones(order.shape), at[rows, order], cache, tap, carry,
                             isinstance(offset, int))
        return x.at[rows, order].add(change * factor.astype(x.dtype)[..., None])

    def change(self, selected: mx.array, rows: mx.array, order: mx.array, worked: mx.array, at: mx.array, cache,
               tap: Callable, carry: dict, in_order: bool = False) -> mx.array:
        """What the block adds to the positions (rows, order), (B, k) each: selected (B, k, C) -> (B, k, C). It sees
        these positions of the carry, and changes them where worked (B, k) is not 0. in_order: they are of one document,
        and their places grow, so that the mask of their attention to one another is a causal one."""
        before = {name: value[rows, order] if isinstance(value, mx.array) else value for name, value in carry.items()}
        after = before | ({"in_order": ()} if in_order else {})
        y = super().__call__(selected, at, cache, tap, after)
        after.pop("in_order", None)
        for name, value in after.items():
            if isinstance(value, tuple):
                carry[name] = value
            elif value is not before[name]:
                kept = worked.reshape(*worked.shape, *[1] * (value.ndim - 2)) != 0
                carry[name] = carry[name].at[rows, order].add(mx.where(kept, value - before[name], 0))
        return y - selected

    def likely(self, x: mx.array) -> mx.array:
        """The predictor's logit that a token of x (B, T, C) is among the largest: (B, T)."""
        return self.predictor(mx.stop_gradient(x))[..., 0].astype(mx.float32) - self.threshold

    def taken(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Outside of training and without a cache: whether each token of x (B, T, C) is chosen, and the order in which
        the block, and its taps, get the tokens: (B, T) each."""
        chosen, T = self.likely(x) > 0, x.shape[1]
        return chosen, mx.argsort(mx.arange(T) + mx.where(chosen, 0, T), axis=1)

    def continued(self, x: mx.array, r: mx.array, likely: mx.array, offset: int, cache, tap: Callable,
                  carry: dict) -> mx.array:
        """With a cache the block computes the chosen tokens alone, and only they enter the cache. Their number is a
        shape, so the device is waited for, and each row of the batch is computed by itself."""
        for row, chosen in enumerate(np.array(likely > 0)):
            if chosen.any():
                place = mx.array(np.flatnonzero(chosen))
                rows, order, of_row = mx.array([[row]]), place[None], cache.row(row, place + offset)
                ones = mx.ones(order.shape)
                change = self.change(x[rows, order], rows, order, ones, order + offset, of_row, tap, carry)
                x = x.at[row, place].add(change[0] * r[row, place, None])
        return x


class RoutedCache:
    """One cache for each row of the batch, of the tokens that were chosen there, and their positions."""

    def __init__(self, make: Callable):
        self.make, self.rows = make, {}

    def row(self, number: int, positions: mx.array):
        """The cache of a row, to which tokens at these positions will be appended."""
        if number not in self.rows:
            self.rows[number] = RowCache(self.make())
        row = self.rows[number]
        row.positions = mx.concatenate([row.positions, positions])
        return row

    @property
    def nbytes(self) -> int:
        return sum(row.cache.nbytes for row in self.rows.values())


class RowCache:
    def __init__(self, cache):
        self.cache, self.positions = cache, mx.array([], dtype=mx.int32)

    def update(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        keys, values, order = self.cache.update(k, v)
        return keys, values, self.positions if order is None else self.positions[order]


# ---- end of mod ------------------------------------------------------------------------------------------------------

# ---- variant yoco: You Only Cache Once (Sun et al. 2024) -------------------------------------------------------------
#
#   blocks 0 ... L/2 - 1 attend in windows;   K, V = keys and values of norm(x), once;   blocks L/2 ... L - 1 have
#   queries only, all to K and V
#
# The cache holds L/2 windows and one K, V, instead of L of them. The second half caches nothing, so that only the last
# token of a prompt needs to pass through it. The carry hands K and V to the second half.


def check_yoco(config: GPTConfig):
    if config.yoco:
        if config.n_layer < 2:
            raise UserError("yoco=True has two halves: give n_layer=2 or more")
        if "N" in config.rope_pattern:
            raise UserError(f"yoco=True and rope_pattern={config.rope_pattern!r}: its layers share keys, which turn or "
                            "do not; leave one of them out")
        config.sliding_window = config.sliding_window or max(1, config.block_size // 4)  # window


def crosses(config: GPTConfig, layer: int) -> bool:
    """Whether a block is in the second half, which attends to the shared keys and values."""
    return config.yoco and layer >= config.n_layer // 2


class SharedKeysValues(Attention):
    """The part of attention that makes keys and values, and a norm before it."""

    def __init__(self, config: GPTConfig):
        super().__init__(config, config.n_layer // 2)
        for name in {"q", "out", "q_norm", "sink"} & self.keys():
            del self[name]
        self.norm = make_norm(config)

    def __call__(self, x: mx.array, offset: int, cache, tap: Callable, carry: dict) -> tuple:
        k, v, keys = self.keys_values(self.norm(x), offset, cache, tap, carry)
        if keys is None:
            keys = mx.arange(k.shape[2])[None] if isinstance(offset, int) else offset
        return k, v, keys


class CrossAttention(Attention):
    """The part of attention that makes queries. Keys and values come from SharedKeysValues, through the carry."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__(config, layer)
        for name in {"k", "v", "k_norm"} & self.keys():
            del self[name]
        self.pop("value_mix", None)  # resformer
        self.pop("value_embed", None)  # valembed
        self.pop("value_gate", None)  # valembed

    def keys_values(self, x: mx.array, offset: int, cache, tap: Callable, carry: dict):
        return carry["keys_values"]


def last_position(x: mx.array, offset: int | mx.array, carry: dict) -> tuple[mx.array, int | mx.array, dict]:
    """The last position of the residual stream, of the offset, and of arrays (B, T, ...) in the carry."""
    rows = {name: value[:, -1:] if isinstance(value, mx.array) else value for name, value in carry.items()}
    return x[:, -1:], offset + x.shape[1] - 1 if isinstance(offset, int) else offset[:, -1:], rows


def cross_attention(config: GPTConfig, layer: int) -> Attention:
    if config.diff_attn:  # diff
        return type("CrossDiffAttention", (CrossAttention, DiffAttention), {})(config, layer)  # diff
    return CrossAttention(config, layer)


# ---- end of yoco -----------------------------------------------------------------------------------------------------

# ---- variant softcap: bounded logits (Bello et al. 2016; Gemma Team 2024) --------------------------------------------
#
#   logits = c tanh(logits / c)
#
# Logits stay within +-c. The gradient of a logit near this bound vanishes: no token can become ever more probable.


def check_softcap(config: GPTConfig):
    for name in ("softcap", "attn_softcap"):
        if getattr(config, name) < 0:
            raise UserError(f"{name}={getattr(config, name)}: it must be 0, which bounds nothing, or more")


def capped(x: mx.array, bound: float) -> mx.array:
    scaled = x.astype(mx.float32) / bound  # bfloat16 is too coarse near 0
    tanh = 2 * sigmoid(2 * scaled) - 1     # by the sigmoid, which is the faster one on a CPU
    return (bound * tanh).astype(x.dtype)


# ---- end of softcap --------------------------------------------------------------------------------------------------

# ---- variant dropout: some numbers become 0 in training (Srivastava et al. 2014) -------------------------------------
#
#   x_i / (1 - p) with probability 1 - p, else 0
#
# GPT-2's places: the embeddings, the attention weights, and what attention and the MLP add to the residual stream. It
# is no part of the architecture: a training script sets model.dropout = p, and only model.train() has an effect. The
# fused attention cannot drop weights, so that all T x T scores of a layer are in memory.


def dropout_keys(model, p: float) -> tuple[mx.array, mx.array]:
    """For the carry: p, and a key of random numbers for each place, drawn from mx.random's state. Keys, not the state,
    go into the blocks, so that a block which is computed again in the backward pass drops the same numbers again."""
    key = mx.random.randint(0, 2**31 - 1, (2,)).astype(mx.uint32)
    return mx.array(p), mx.random.split(key, 3 * model.config.n_layer + 1)


def dropout(x: mx.array, carry: dict, place: int) -> mx.array:
    """x of any shape. place: 3 layer for attention weights, + 1 for attention, + 2 for the MLP; -1 for embeddings."""
    p, keys = map(mx.stop_gradient, carry["dropout"])
    return x * (mx.random.bernoulli(1 - p, x.shape, key=keys[place]) / (1 - p)).astype(x.dtype)


def dropout_attention(attention: Attention, q: mx.array, k: mx.array, v: mx.array, mask, sink: mx.array | None,
                      carry: dict) -> mx.array:
    """attend(), with dropout of the attention weights."""
    weights = attention_weights(attention.config, q, k, mask, sink).astype(q.dtype)
    return weighed(dropout(weights, carry, 3 * attention.layer), v)


# ---- end of dropout --------------------------------------------------------------------------------------------------

# ---- tap: looking inside ---------------------------------------------------------------------------------------------


def no_tap(site: str, layer: int, x: mx.array) -> mx.array:
    """The model calls a tap at every site of every layer, and goes on with what the tap returns. This one returns x.

    Sites in a layer, in order: "resid" (B, T, C) what enters the block; "q" (B, H, T, D), "k" and "v" (B, KV, T, D) as
    attention takes them; "heads" (B, H, T, D) the output of each head; "attn" (B, T, C) what attention adds to the
    residual stream; "mid" (B, T, C) the stream with it, which the MLP reads (not with `parallel`, where the MLP reads
    "resid"); "hidden" (B, T, ffn_dim) the neurons of the MLP; "mlp" (B, T, C) what the MLP adds. After the last block
    comes "resid" once more, with layer = n_layer. With a cache, T counts the new positions only.

        def silence(site, layer, x):  # head 2 of layer 1
            return x * (mx.arange(x.shape[1]) != 2)[:, None, None] if (site, layer) == ("heads", 1) else x
        logits = model(idx, tap=silence)
    """
    return x


# ---- GPT -------------------------------------------------------------------------------------------------------------


class GPT(nn.Module):
    """A decoder-only transformer. Parameters are float32 until model.set_dtype(...). seed None: they are not
    initialised, since a checkpoint will be loaded."""

    def __init__(self, config: GPTConfig, seed: int | None = 0):
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.n_embd)
        if config.pos == "learned":
            self.pos_embed = Embedding(config.block_size, config.n_embd)
        self.blocks = [Block(config, layer) for layer in range(config.n_layer)]
        if config.mod != "none":  # mod
            for layer in range(config.mod_every - 1, config.n_layer, config.mod_every):  # mod
                self.blocks[layer] = RoutedBlock(config, layer)  # mod
        if config.yoco:  # yoco
            self.shared = SharedKeysValues(config)  # yoco
        self.norm = make_norm(config)
        if not config.tie:
            self.head = Linear(config.n_embd, config.vocab_size, bias=config.head_bias)
        self.checkpoint_every = 0  # recompute every k-th block's activations in the backward pass; 0: store all
        self.compute_dtype = None  # dtype of the activations; None: that of the parameters
        self.dropout = 0.0  # share of the numbers that are dropped in training  # dropout
        if seed is not None:
            check_memory(self)
            init_weights(self, seed)

    def residual(self, idx: mx.array, cache: Cache | None = None, tap: Callable = no_tap, last: bool = False,
                 places: mx.array | None = None) -> mx.array:
        """The residual stream after the last block: (B, T) token ids -> (B, T, C), or, with last=True, of the last
        position alone, (B, 1, C). places (B, T): the places of the tokens, where rows hold several documents.

        carry: a dict of what crosses layers. An array (B, T, ...) has a row for each token of this call. It is put into
        the carry here; a block may read it and replace it, and a block that skips tokens sees the rows of the others. A
        tuple may hold arrays of any shape: every block sees it whole. The baseline's carry is empty."""
        T, offset = idx.shape[1], 0 if cache is None else cache.offset
        if cache is not None:
            cache.offset += T
        if places is not None:  # window
            refuse_sinks(self.config, "packing: a row has one set of first tokens")  # window
        x = self.embedded(idx, offset, places)
        offset, carry = offset if places is None else places, {}
        if self.config.value_residual:  # resformer
            carry["first_values"] = no_values(self.config, x)  # resformer
        if self.config.value_embeds:  # valembed
            carry["token_ids"] = idx  # valembed
        if self.dropout and self.training:  # dropout
            carry["dropout"] = dropout_keys(self, self.dropout)  # dropout
            x = dropout(x, carry, -1)  # dropout
        column = offset if places is None else getattr(cache, "column", None)  # of the cache, for this position
        if T == 1 and cache is not None and column is not None and tap is no_tap and not carry:
            if cpu_decode and (y := cpu_decode.after_blocks(self, x, column, cache)) is not None:
                return y
        for layer, block in enumerate(self.blocks):
            memory, x = None if cache is None else cache.layers[layer], tap("resid", layer, x)
            if self.config.yoco and layer == self.config.n_layer // 2:  # yoco
                carry["keys_values"] = self.shared(x, offset, cache and cache.layers[-1], tap, carry)  # yoco
                if last:  # no later block needs the other positions  # yoco
                    x, offset, carry = last_position(x, offset, carry)  # yoco
            if crosses(self.config, layer):  # yoco
                memory = None  # yoco
            x, carry = self.run(block, x, offset, memory, tap, carry)
        x = tap("resid", self.config.n_layer, x)
        return x[:, -1:] if last else x

    def embedded(self, idx: mx.array, offset: int, places: mx.array | None = None) -> mx.array:
        """What enters the first block: (B, T) token ids -> (B, T, C)."""
        x = self.embed(idx)
        if self.config.embed_scale != 1:
            x = x * self.config.embed_scale
        if self.config.pos == "learned":
            T = idx.shape[1]
            if offset + T > self.config.block_size:
                raise UserError(f"{offset + T} tokens, but positions are learned up to {self.config.block_size}")
            x = x + self.pos_embed(places_of(T, offset if places is None else places) % DOCUMENT)
        return x.astype(self.compute_dtype or mx.result_type(x, self.norm.weight))

    def run(self, block: Block, x: mx.array, offset: int | mx.array, cache, tap: Callable, carry: dict):
        """Run a block; return x and the carry after it. In training with checkpoint_every=k, every k-th block stores
        only its input, and is computed again in the backward pass (Chen et al. 2016)."""

        def changed(x, carry):
            carry = dict(carry)
            return block(x, offset, cache, tap, carry), carry

        k = self.checkpoint_every
        if k and self.training and tap is no_tap and block.layer % k == 0:  # what a tap captures would get no gradient
            return nn.utils.checkpoint(block, changed)(x, carry)
        return changed(x, carry)

    def unembed(self, x: mx.array) -> mx.array:
        """Final norm and vocabulary projection: (..., C) -> logits (..., V)."""
        return self.project(self.norm(x))

    def project(self, x: mx.array) -> mx.array:
        """The vocabulary projection alone."""
        logits = self.embed.as_linear(x) if self.config.tie else self.head(x)
        if self.config.logit_scale != 1:
            logits = logits * self.config.logit_scale
        if self.config.softcap:  # softcap
            logits = capped(logits, self.config.softcap)  # softcap
        return logits

    def __call__(self, idx: mx.array, cache: Cache | None = None, tap: Callable = no_tap, last: bool = False,
                 places: mx.array | None = None) -> mx.array:
        """(B, T) token ids -> logits (B, T, V); with last=True of the last position alone, (B, 1, V). With a cache, idx
        continues the tokens that the cache holds. places: see residual()."""
        if gpu_decode and cache is not None and idx.shape[1] == 1 and tap is no_tap:
            if (logits := gpu_decode.logits(self, idx, cache, places)) is not None:
                return logits
        return self.unembed(self.residual(idx, cache, tap, last, places))

    def make_cache(self, bits: int = 0) -> Cache:
        """An empty key/value cache, which model(idx, cache=cache) fills, any number of tokens at a time. bits: quantize
        keys and values to so many bits; 0: do not."""
        check_reads_back(self.config)
        room = quantized.packed_rows(bits, self.config.head_dim) if bits else mx.zeros
        if self.config.yoco:  # yoco
            return Cache([*self.blocks, self.shared], room)  # yoco
        return Cache(self.blocks, room)

    def loss(self, idx: mx.array, targets: mx.array, mask: mx.array | None = None, tap: Callable = no_tap,
             places: mx.array | None = None) -> mx.array:
        """Mean cross-entropy in nats of targets (B, T), weighted by mask (B, T) if there is one.

        It is cross_entropy(model(idx), targets), computed without all logits in memory at once.
        """
        check_reads_back(self.config)
        x = self.norm(self.residual(idx, tap=tap, places=places))
        weights = mx.ones(targets.shape) if mask is None else mask.astype(mx.float32)
        total = chunked_loss(self, x.reshape(-1, x.shape[-1]), targets.reshape(-1), weights.reshape(-1))
        return total / mx.where(weights.sum() > 0, weights.sum(), 1)


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """-log softmax(logits)[target] in float32: (N, V), (N,) -> (N,)."""
    if FAST_CPU:
        return cpu.cross_entropy(logits.astype(mx.float32), targets)
    return mx.fast.cross_entropy(logits, targets)


LOSS_CHUNK = 2**24 if ON_CPU else 2**28  # logits in memory at a time; computing a loss takes several times as much


def chunked_loss(model: GPT, x: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
    """sum_i weights_i * cross_entropy(project(x_i), target_i), without all logits at once: x (N, C), the rest (N,).

    In training each chunk's gradients are computed while its logits are there, and before the next chunk begins (as in
    Liger kernels, Hsu et al. 2024): the logits are neither stored for the backward pass nor computed twice.
    """
    if gpu_train and model.training and (total := gpu_train.loss(model, x, targets, weights)) is not None:
        return total
    rows = max(1, LOSS_CHUNK // model.config.vocab_size)
    starts = range(0, x.shape[0], rows)
    head = model.embed if model.config.tie else model.head

    def chunk_loss(parameters, x, start):
        head.update(parameters)  # MLX differentiates by the arguments of a function, not by variables that it captures
        part = slice(start, start + rows)
        if cpu_train and (loss := cpu_train.head_loss(model, x, targets[part], weights[part])) is not None:
            return loss
        losses = cross_entropy(model.project(x), targets[part])
        return (losses * weights[part]).sum()

    @mx.custom_function
    def loss_and_gradients(parameters, x):
        total, gradient, dx = mx.array(0.0), tree_map(lambda p: mx.zeros(p.shape), parameters), []
        for start in starts:
            piece = x[start:start + rows]
            if dx:  # wait for the chunk before, or the logits of all chunks would be in memory together
                piece = mx.depends([piece], [dx[-1]])[0]
            loss, (dp, d) = mx.value_and_grad(chunk_loss, (0, 1))(parameters, piece, start)
            total = total + loss
            gradient = tree_map(lambda sum, g: sum + g.astype(mx.float32), gradient, dp)
            dx.append(d)
        return total, tree_map(lambda g, p: g.astype(p.dtype), gradient, parameters), mx.concatenate(dx)

    @loss_and_gradients.vjp
    def backward(primals, cotangents, outputs):
        return tree_map(lambda g: (cotangents[0] * g).astype(g.dtype), outputs[1:])

    parameters = head.trainable_parameters()
    if model.training:
        total = loss_and_gradients(parameters, x)[0]
    else:
        total = sum(chunk_loss(parameters, x[start:start + rows], start) for start in starts)
    head.update(parameters)  # instead of the traced arrays that chunk_loss left there
    return total


# ---- init ------------------------------------------------------------------------------------------------------------


def check_memory(model: GPT):
    """UserError if the parameters, which are not computed yet, are larger than the memory of this machine."""
    size = sum(p.nbytes for _, p in tree_flatten(model.parameters())) / 2**30
    room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    if size > room:
        raise UserError(f"a model of {size:,.0f} GiB does not fit into {room:,.0f} GiB of memory: make it smaller")


def init_weights(model: GPT, seed: int = 0):
    """Set every parameter. float32; the same seed gives the same weights on every device.

    embed, pos_embed, head         normal, 0.02
    q, k, v, gate, up              normal, n_embd^-0.5 (keeps the variance of a normalised input)
    out, down                      normal, n_embd^-0.5 / sqrt(2 n_layer) (the residual stream sums 2 n_layer of them)
    norms 1, biases 0, all others keep the values that their modules gave them
    """
    std = model.config.n_embd ** -0.5
    stds = {"embed": 0.02, "pos_embed": 0.02, "head": 0.02, "q": std, "k": std, "v": std, "gate": std, "up": std}
    stds["out"] = stds["down"] = std / math.sqrt(2 * model.config.n_layer)
    stds.update(dict.fromkeys(DIFF_LAMBDAS, 0.1), lam=std)  # diff
    stds.update(router=std)  # moe
    stds.update(depth_router=std)  # mod
    stds.update(value_embed=std)  # valembed

    def initial(path: str, p: mx.array) -> mx.array:
        *_, module, kind = ["", *path.split(".")]
        if kind in DIFF_LAMBDAS:  # diff
            module, kind = kind, "weight"  # diff
        if kind == "bias":
            return mx.zeros(p.shape)
        if kind == "weight" and "norm" in module:
            return mx.ones(p.shape)
        if kind == "weight" and module in stds:  # a seed for each name: a further parameter changes no other
            rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
            return mx.array(rng.standard_normal(p.shape, dtype=np.float32) * np.float32(stds[module]))
        return p

    model.update(tree_map_with_path(initial, model.parameters()))


# ---- generate --------------------------------------------------------------------------------------------------------


def sample_token(logits: mx.array, key: mx.array, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
                 min_p: float = 0.0) -> mx.array:
    """Draw one token a row: logits (B, V) -> (B,), with a key, with keys (B, 2), one a row, or with None, by MLX's own
    random state. temperature 0 takes the most probable one. The filters, in order: top_k (keep the k most probable; 0:
    all), top_p (the fewest whose probabilities sum to p; Holtzman et al. 2020), min_p (those with at least min_p times
    the largest probability; Nguyen et al. 2024)."""
    if gpu_sample and top_p == 1 and (
            tokens := gpu_sample.draw(logits, key, temperature, top_k, min_p)) is not None:
        return tokens
    if temperature == 0:
        return mx.argmax(logits, axis=-1)
    logits = filtered(logits, temperature, top_k, top_p, min_p)
    if key is None or key.ndim == 1:
        return mx.random.categorical(logits, key=key)
    noise = mx.vmap(lambda key: mx.random.gumbel(logits.shape[-1:], key=key))(key)  # with it, the largest one is a draw
    return mx.argmax(logits + noise, axis=-1)


def filtered(logits: mx.array, temperature: float, top_k: int, top_p: float, min_p: float) -> mx.array:
    """The logits (B, V) with which sample_token() draws: by temperature, and -inf where a filter cuts a token off."""
    logits = logits.astype(mx.float32) / temperature
    if 0 < top_k < logits.shape[-1]:
        smallest = mx.min(mx.topk(logits, top_k, axis=-1), axis=-1, keepdims=True)
        logits = mx.where(logits < smallest, -mx.inf, logits)
    if top_p < 1:
        order = mx.argsort(-logits, axis=-1)
        p = mx.softmax(mx.take_along_axis(logits, order, axis=-1), axis=-1)
        beyond = mx.cumsum(p, axis=-1) - p >= max(top_p, 1e-9)  # the tokens before it suffice; the first always stays
        beyond = mx.put_along_axis(beyond, order, beyond, axis=-1)
        logits = mx.where(beyond, -mx.inf, logits)
    if min_p > 0:
        logits = mx.where(logits < logits.max(-1, keepdims=True) + math.log(min_p), -mx.inf, logits)
    return logits


def decode(model: GPT, tokens: mx.array, n: int, draw: Callable, cache: Cache, tap: Callable = no_tap) -> Iterator:
    """Continue token ids (B, T) by n tokens; yields arrays (B, 1), one a step. draw: logits (B, V) -> tokens (B, 1)."""
    read = [tokens[:, -model.config.block_size:]]  # the token ids that the cache is of
    token = draw(model(read[0], cache=cache, tap=tap, last=True)[:, -1])
    mx.async_eval(token)
    for i in range(1, n + 1):
        drawn, x = token, token
        read.append(drawn)
        if i < n:  # start the next token before the caller looks at this one: the device never waits
            if is_full(model.config, cache):
                cache.clear()
                read = [mx.concatenate(read, axis=1)[:, -max(1, model.config.block_size // 2):]]
                x = read[0]
            token = draw(model(x, cache=cache, tap=tap, last=True)[:, -1])
            mx.async_eval(token)
        yield drawn


def is_full(config: GPTConfig, cache: Cache) -> bool:
    """Whether another token would see more than block_size tokens."""
    if endless(config):  # window
        return False  # window
    return cache.offset == config.block_size


def generate(model: GPT, ids, max_new_tokens: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
             min_p: float = 0.0, repetition_penalty: float = 1.0, seed: int = 0, n_vocab: int = 0,
             tap: Callable = no_tap, cache: Cache | None = None) -> Iterator:
    """Continue token ids (T,), yielding one int a token; or a batch of B prompts, yielding a list of B.

    Prompts may differ in length: see generate_batch. repetition_penalty divides the positive logits of tokens seen
    before (Keskar et al. 2019) and multiplies the negative ones. n_vocab: ids from here on pad the vocabulary to a
    round number and are never drawn. When the context is full, the cache is cleared and the second half of the context
    is read again: a token never sees more than block_size tokens. cache: an empty one of model.make_cache(), for a
    caller who wants to look into it.
    """
    single = len(ids) == 0 or np.ndim(ids[0]) == 0
    prompts = [ids] if single else ids
    if min(map(len, prompts)) == 0:
        raise UserError("nothing to continue: give at least one token")
    key, V = mx.random.key(seed), model.config.vocab_size
    common = min(map(len, prompts))
    start = mx.array(np.array([prompt[:common] for prompt in prompts], dtype=np.int32))
    seen = mx.zeros((len(prompts), V), dtype=mx.bool_)
    if repetition_penalty != 1:
        seen = mx.put_along_axis(seen, start, mx.array(True), axis=1)
    padding = mx.arange(V) >= (n_vocab or V)

    def draw(logits: mx.array, given: mx.array | None = None) -> mx.array:
        """Tokens (B, 1) by logits (B, V), except where a prompt gives one: given (B, 1), -1 where it does not."""
        nonlocal key, seen
        if repetition_penalty != 1:
            less = mx.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
            logits = mx.where(seen, less, logits)
        if n_vocab:
            logits = mx.where(padding, -mx.inf, logits)
        key, subkey = mx.random.split(key)
        token = sample_token(logits, subkey, temperature, top_k, top_p, min_p)[:, None]
        if given is not None:
            token = mx.where(given < 0, token, given)
        if repetition_penalty != 1:
            seen = mx.put_along_axis(seen, token, mx.array(True), axis=1)
        return token

    cache = cache or model.make_cache()
    if single:
        for token in decode(model, start, max_new_tokens, draw, cache, tap):
            yield token.item()
    else:
        rest = [prompt[common:] for prompt in prompts]
        yield from generate_batch(model, start, rest, max_new_tokens, draw, cache, tap)


def generate_batch(model: GPT, start: mx.array, rest: list, max_new_tokens: int, draw: Callable, cache: Cache,
                   tap: Callable) -> Iterator[list]:
    """Continue prompts of several lengths: all are read together up to the end of the shortest, start (B, T). Then each
    goes on with the rest of its own tokens, yielding None, until it ends; max_new_tokens more follow on the longest."""
    lengths = [len(tokens) for tokens in rest]
    given = np.full((len(rest), max(lengths)), -1, dtype=np.int32)
    for row, tokens in zip(given, rest, strict=True):
        row[:len(tokens)] = tokens
    columns = iter(mx.split(mx.array(given), given.shape[1], axis=1) if given.size else [])
    steps = max_new_tokens + given.shape[1]
    for i, token in enumerate(decode(model, start, steps, lambda x: draw(x, next(columns, None)), cache, tap)):
        drawn = token.tolist()  # no operation, which would wait for the next token
        yield [None if i < length else token for (token,), length in zip(drawn, lengths, strict=True)]


# ---- checkpoint ------------------------------------------------------------------------------------------------------


def save_arrays(path: str, arrays: dict[str, mx.array], header: dict):
    """Write a safetensors file with `header` as JSON. A crash leaves the old file or the whole new one."""
    temporary = f"{path}.tmp{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            mx.save_safetensors(file, arrays, {"tinygpt": json.dumps(header)})
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; what was there is unharmed") from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def load_arrays(path: str) -> tuple[dict[str, mx.array], dict]:
    """Read a file of save_arrays(): (arrays, header). UserError for any other file."""
    if not os.path.exists(path):
        raise UserError(f"no checkpoint at {path}: train one with `python {maker_of(path)}`, or check the name")
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder, not a checkpoint: {give_one_of(path)}")
    try:
        with safe_open(path, "numpy") as file:  # checks the header against the file's length
            header = json.loads((file.metadata() or {}).get("tinygpt", "null"))
        if not isinstance(header, dict) or "version" not in header:
            raise UserError(f"{path} is a safetensors file, but not one of ours: its header has no `tinygpt` entry")
        if header["version"] != VERSION:
            raise UserError(f"{path} has version {header['version']}, this code reads {VERSION}: update the code")
        with open(path, "rb") as file:  # by a name beyond ASCII, MLX opens a file only where the locale is UTF-8
            arrays = mx.load(path if path.isascii() else f"/dev/fd/{file.fileno()}", format="safetensors")
            mx.eval(arrays)  # read now: the file may be replaced later
    except (SafetensorError, OSError, RuntimeError, json.JSONDecodeError) as error:
        if is_text(path):
            raise UserError(f"{path} is a text file, not a checkpoint: give a .safetensors file") from error
        raise UserError(f"{path} is not a whole safetensors file ({error}): copy or train it again") from error
    return arrays, header


def maker_of(path: str) -> str:
    """The script that writes a checkpoint or an adapter under a file name such as sft.safetensors."""
    names = ("sft", "dpo", "grpo", "ppo", "reward", "distill", "diffusion")
    return {f"{x}.safetensors": f"{x}.py" for x in names}.get(os.path.basename(path), "train.py")


def give_one_of(folder: str) -> str:
    """The end of an error message: the checkpoints and adapters in a folder, by the names that the scripts use."""
    names = ("ckpt", "best", "sft", "dpo", "grpo", "ppo", "distill")
    paths = (os.path.join(folder, f"{name}.safetensors") for name in names)
    found = [*filter(os.path.exists, paths)]
    return f"give {' or '.join(found)}" if found else "give a .safetensors file of train.py, sft.py or dpo.py"


def is_text(path: str) -> bool:
    """Whether a file begins as UTF-8 text does. No safetensors file does: its first 8 bytes, a length, hold zeros."""
    with contextlib.suppress(OSError, UnicodeDecodeError), open(path, "rb") as file:
        start = file.read(4096)
        codecs.getincrementaldecoder("utf-8")().decode(start)
        return len(start.strip()) >= 8 and b"\0" not in start
    return False


def other_kind(path: str, arrays: dict, header: dict) -> str:
    """The line for a file of save_arrays() that holds neither a checkpoint nor an adapter."""
    if "lens" in header:
        return f"{path} is a lens of tuned_lens.py, not a checkpoint: give the checkpoint that it was trained on"
    if "direction" in header:
        return f"{path} is a direction of steer.py, not a checkpoint: give the checkpoint that it was made for"
    if "sae" in header:
        return f"{path} is a dictionary of sae.py, not a checkpoint: give the checkpoint that it was trained on"
    if "reward" in header:
        return f"{path} is a reward model, which does not write: give the checkpoint that it was trained on"
    if "top_k" in header:
        return f"{path} holds a teacher's logits for distill.py, not a checkpoint: give the teacher"
    if any(name.endswith("learning_rate") for name in arrays):  # of an optimizer
        return f"{path} is the state from which a run resumes, not a checkpoint: {give_one_of(os.path.dirname(path))}"
    return f"{path} has no config in its header: copy or train it again"


def save_checkpoint(path: str, model: GPT, meta: dict):
    """Write the weights and, in the header, the model's config and all of `meta` (tokenizer, script, settings, step,
    losses, commit: whatever JSON can hold)."""
    arrays = dict(tree_flatten(model.parameters()))
    save_arrays(path, arrays, {**meta, "version": VERSION, "config": asdict(model.config)})


def known_settings(config, path: str) -> dict:
    """The settings in a checkpoint's header that this code knows. One that it does not know, since newer code wrote it,
    is left out where it is off (false, 0 or "none"), and refused by name where it is on."""
    if not isinstance(config, dict):
        raise UserError(f"{path} has no config in its header: copy or train it again")
    known = {field.name for field in fields(GPTConfig)}
    for name in sorted(config.keys() - known):
        if config[name] not in (False, "none"):  # 0 == False
            raise UserError(f"{path} has {name}={config[name]!r}, which this code does not know: update the code")
    return {name: value for name, value in config.items() if name in known}


def load_checkpoint(path: str, reward: bool = False) -> tuple[GPT, dict]:
    """Read a checkpoint: (model, meta). UserError if the file is missing, cut short, or no checkpoint of model.py.
    reward: of reward.py, whose vector becomes meta["reward"]; else such a file is refused."""
    arrays, meta = load_arrays(path)
    if meta.get("adapter"):
        command = f"python merge.py {shlex.quote(path)} OUT"
        raise UserError(f"{path} is an adapter: give a checkpoint, or make one of it by `{command}`")
    if "config" not in meta or "reward" in meta and not reward:
        raise UserError(other_kind(path, arrays, meta))
    if "reward" in meta:
        meta["reward"] = arrays.pop("reward.weight", None)
    settings = known_settings(meta["config"], path)
    try:
        model = GPT(GPTConfig(**settings), seed=None)
    except (UserError, TypeError) as error:
        raise UserError(f"{path} has settings that make no model ({error})") from error
    try:
        quantized.factor_like(model, arrays)
        quantized.pack_like(model, arrays)
        model.load_weights(list(arrays.items()), strict=True)
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path} lacks weights of its config, or has others: {' '.join(str(error).split())}") from error
    model.eval()
    return model, meta


if __name__ == "__main__":
    print("model.py has no command of its own: run train.py, which uses it", file=sys.stderr)
    sys.exit(2)
