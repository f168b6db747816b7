"""A GPT in MLX, and its checkpoint: one file that everything else stands on.

    model = GPT(GPTConfig(n_layer=4, n_embd=256))
    logits = model(idx)                                  # idx (B, T) token ids -> (B, T, vocab_size)
    loss = model.loss(idx, targets)                      # mean cross-entropy in nats
    for token in generate(model, [1, 2, 3], 100): ...    # sampling with a key/value cache
    save_checkpoint("ckpt.safetensors", model, meta); model, meta = load_checkpoint("ckpt.safetensors")

The settings of GPTConfig cover GPT-2 (Radford et al. 2019) and the Llama family (Touvron et al. 2023). The default is a
modern small model: rotary positions, RMSNorm, relu squared (So et al. 2021), QK-norm (Henry et al. 2020), no biases.

Shapes: B batch, T positions, C = n_embd, H heads, KV key/value heads, D = head_dim, V = vocab_size, S keys.
"""
import contextlib
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields

import blas  # noqa: F401  (before mlx: a fast BLAS for the CPU on Linux)
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_map_with_path
from safetensors import SafetensorError, safe_open

import cpu
from config import UserError

ON_CPU = mx.default_device() == mx.cpu
if mx.cuda.is_available():  # work queued at a time: less of it frees memory sooner, here by a third, at 1% of the speed
    os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", "500")
VERSION = 1  # of the checkpoint's header

# ---- config ----------------------------------------------------------------------------------------------------------


@dataclass
class GPTConfig:
    """The only list of architecture settings. Every script takes them by these names."""
    block_size: int = 256        # context length, in tokens
    vocab_size: int = 4096       # V; train.py takes the tokenizer's, rounded up to a multiple of 64
    n_layer: int = 4             # blocks
    n_head: int = 2              # query heads
    n_kv_head: int = 0           # key/value heads, each shared by n_head / n_kv_head query heads; 0: n_head
    n_embd: int = 128            # width of the residual stream
    head_dim: int = 0            # width of a head; 0: n_embd / n_head
    ffn_dim: int = 0             # hidden width of the MLP; 0: 4 n_embd (swiglu: 8/3 n_embd, up to a multiple of 64)
    pos: str = "rope"            # rope | learned | none
    rope_theta: float = 10000.0  # base of the rotary wavelengths
    rope_factor: float = 1.0     # Llama 3 scaling: long wavelengths grow by it (8 in Llama 3.1); 1: off
    rope_low_freq: float = 1.0   # wavelengths over rope_original / this grow by the whole factor
    rope_high_freq: float = 4.0  # wavelengths under rope_original / this stay
    rope_original: int = 8192    # context length before the scaling
    norm: str = "rms"            # rms | layer
    norm_eps: float = 1e-5       # added to the variance
    mlp: str = "relu2"           # relu2 | gelu | gelu_tanh | swiglu
    bias: bool = False           # biases in all linear layers and in LayerNorm
    qkv_bias: bool = False       # biases in q, k and v alone (Qwen2)
    qk_norm: bool = True         # RMSNorm of every head's query and key
    tie: bool = True             # the unembedding is the embedding's transpose
    alibi: bool = False          # biases that grow with the distance, and no other positions  # alibi
    sliding_window: int = 0      # keys that a query sees, itself included; 0: all  # window
    window_pattern: str = "S"    # a letter a layer, over and over: S short (the window), L long (all keys)  # window
    diff_attn: bool = False      # differential attention  # diff
    diff_attn_version: int = 1   # 1 (2024): pairs of the n_head heads; 2 (2026): n_head pairs  # diff

    def __post_init__(self):
        check_alibi(self)  # alibi
        check_window(self)  # window
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
        swiglu_dim = -(-8 * self.n_embd // (3 * 64)) * 64
        self.ffn_dim = self.ffn_dim or (swiglu_dim if self.mlp == "swiglu" else 4 * self.n_embd)
        choices = {"pos": ("rope", "learned", "none"), "norm": ("rms", "layer"), "mlp": tuple(ACTIVATIONS)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}")


def compute_dtype(name: str) -> mx.Dtype:
    """The dtype of a setting: float32, bfloat16, float16, or auto: bfloat16 on a GPU, float32 on a CPU."""
    if name not in ("auto", "float32", "bfloat16", "float16"):
        raise UserError(f"dtype={name!r} is not one of auto, float32, bfloat16, float16")
    return getattr(mx, ("float32" if ON_CPU else "bfloat16") if name == "auto" else name)


# ---- positions -------------------------------------------------------------------------------------------------------


def rope_inv_freq(config: GPTConfig) -> np.ndarray:
    """Radians that each pair of dimensions turns from one position to the next: (D/2,), theta^(-2i/D) (Su et al. 2021),
    with Llama 3.1's scaling: pairs that turn slowly over the original context turn slower still, by rope_factor."""
    inv_freq = config.rope_theta ** (-np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    if config.rope_factor != 1:
        low, high = config.rope_low_freq, config.rope_high_freq
        turns = config.rope_original * inv_freq / (2 * math.pi)  # full turns within the original context
        keep = np.clip((turns - low) / (high - low), 0, 1)       # 1: fast, stays as it is; 0: slow, scaled
        inv_freq = keep * inv_freq + (1 - keep) * inv_freq / config.rope_factor
    return inv_freq


def rope(x: mx.array, inverse: mx.array, offset: int) -> mx.array:
    """Turn each pair (i, i + D/2) of a head by its position: x (B, H, T, D) at positions offset, offset + 1, ...;
    inverse: 1 / rope_inv_freq, which is what MLX calls freqs."""
    return mx.fast.rope(x, x.shape[-1], traditional=False, base=None, scale=1.0, offset=offset, freqs=inverse)


# ---- score: which keys a query may see, and with what bias -----------------------------------------------------------


def score_mask(config: GPTConfig, layer: int, T: int, offset: int, keys: mx.array | None):
    """What is added to the scores of T queries at positions offset, offset + 1, ...: "causal", None (all keys are
    seen), or an array (B, H, T, S). keys (S,): the keys' positions; None: 0, 1, ..., offset + T - 1. The baseline
    builds no array: fused causal kernels need none."""
    mask = "causal" if T > 1 else None
    if windowed(config, layer) and T > 1:  # window
        mask = window_mask(config, distances(T, offset, keys))  # window
    if config.alibi:  # alibi
        mask = alibi_bias(config, distances(T, offset, keys)) + (mask if isinstance(mask, mx.array) else 0)  # alibi
    return mask


def distances(T: int, offset: int, keys: mx.array | None) -> mx.array:
    """How far each key lies behind each query: (T, S), negative for the future."""
    keys = mx.arange(offset + T) if keys is None else keys
    return mx.arange(offset, offset + T)[:, None] - keys


# ---- variant alibi: attention with linear biases (Press et al. 2022) -------------------------------------------------
#
#   score(i, j) = q_i k_j / sqrt(D) - slope_h (i - j)
#
# Far keys weigh less, by a slope of each head's own; nothing else tells positions. Costs an array (H, T, S) of biases.


def check_alibi(config: GPTConfig):
    if config.alibi:
        if config.pos == "learned":
            raise UserError("alibi=True and pos=learned both tell positions: leave one of them out")
        config.pos = "none"


def alibi_slopes(n_head: int) -> list[float]:
    """2^(-8 i / n) for i = 1 ... n; where n is no power of 2, those of the power below and every second of the one
    above."""
    power = 2 ** (n_head.bit_length() - 1)
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    return slopes + [2 ** (-4 * i / power) for i in range(1, 2 * power + 1, 2)][:n_head - power]


def alibi_bias(config: GPTConfig, distance: mx.array) -> mx.array:
    """-slope * distance, and -inf for the future: (T, S) -> (1, H, T, S)."""
    slopes = alibi_slopes(config.n_head)
    if config.diff_attn:  # diff
        slopes = [slope for slope in alibi_slopes(diff_pairs(config)) for _ in range(2)]  # diff
    slopes = mx.array(slopes)[:, None, None]
    return mx.where(distance < 0, -mx.inf, -slopes * distance)[None]


# ---- end of alibi ----------------------------------------------------------------------------------------------------

# ---- variant window: sliding-window attention (Beltagy et al. 2020; Jiang et al. 2023) -------------------------------
#
#   query i sees keys i - W < j <= i
#
# Training costs T * W instead of T * T: blocks of queries see their own block of keys and the one before. The cache
# holds W tokens, each in the place of the one that has left the window.


def check_window(config: GPTConfig):
    if config.sliding_window < 0:
        raise UserError(f"sliding_window={config.sliding_window}: it must be 0, which is no window, or more")
    if not config.window_pattern or set(config.window_pattern) - set("SL"):
        raise UserError(f"window_pattern={config.window_pattern!r}: it must be letters S (short) and L (long)")


def windowed(config: GPTConfig, layer: int) -> bool:
    """Whether a layer's queries see the window only."""
    return config.sliding_window > 0 and config.window_pattern[layer % len(config.window_pattern)] == "S"


def window_mask(config: GPTConfig, distance: mx.array) -> mx.array:
    return mx.where((distance >= 0) & (distance < config.sliding_window), 0.0, -mx.inf)


def window_attention(config: GPTConfig, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """attend() under the window's mask, without scores that it hides but in a block: q (B, H, T, D), k and v
    (B, KV, T, D) -> (B, H, T, D)."""
    B, H, T, D = q.shape
    size = window_block(config)
    n = -(-T // size)

    def blocks(x):  # (B, H, T, D) -> (B, n, H, size, D)
        x = mx.pad(x, ((0, 0), (0, 0), (0, n * size - T), (0, 0)))
        return x.reshape(B, x.shape[1], n, size, -1).swapaxes(1, 2)

    def with_previous(x):  # (B, n, KV, size, D) -> (B n, KV, 2 size, D)
        before = mx.concatenate([mx.zeros_like(x[:, :1]), x[:, :-1]], axis=1)
        return mx.concatenate([before, x], axis=3).reshape(B * n, x.shape[2], 2 * size, -1)

    distance = mx.arange(size)[:, None] + size - mx.arange(2 * size)
    mask = window_mask(config, distance)
    if config.alibi:  # alibi
        mask = mask + alibi_bias(config, distance)[0]  # alibi
    mask = mask.reshape(1, -1, size, 2 * size)
    nothing_before = (mx.arange(n) == 0)[:, None, None, None] & (mx.arange(2 * size) < size)
    mask = mx.broadcast_to(mx.where(nothing_before, -mx.inf, mask), (B, n, *mask.shape[1:])).flatten(0, 1)
    y = attend(blocks(q).flatten(0, 1), with_previous(blocks(k)), with_previous(blocks(v)), mask)
    return y.reshape(B, n, H, size, -1).swapaxes(1, 2).reshape(B, H, n * size, -1)[:, :, :T]


def window_block(config: GPTConfig) -> int:
    """Queries a block: at least the window, so that it reaches into one earlier block only, and enough for a matmul."""
    return max(config.sliding_window, 64)


def endless(config: GPTConfig) -> bool:
    """Whether every distance that a query sees is one of training, however long the text: then nothing is full."""
    return config.pos != "learned" and all(windowed(config, layer) for layer in range(config.n_layer))


class WindowCache:
    """Keys and values of one layer's last W tokens: position p lies in place p % W."""

    def __init__(self, window: int):
        self.window, self.length = window, 0  # length: tokens seen
        self.keys = self.values = None

    def update(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Append k and v (B, KV, T, D); return the keys and values that the new queries may see, and the positions."""
        W, start, T = self.window, self.length, k.shape[2]
        self.length += T
        if self.keys is None:
            self.keys, self.values = (mx.zeros((*x.shape[:2], W, x.shape[3]), x.dtype) for x in (k, v))
        if T == 1:
            place = start % W
            self.keys[..., place:place + 1, :] = k
            self.values[..., place:place + 1, :] = v
            filled = min(self.length, W)
            return self.keys[..., :filled, :], self.values[..., :filled, :], self.positions(self.length)
        filled = min(start, W)
        old_k, old_v, old = self.keys[..., :filled, :], self.values[..., :filled, :], self.positions(start)
        new = mx.arange(max(start, self.length - W), self.length)  # what stays
        self.keys[..., new % W, :] = k[..., -new.size:, :]
        self.values[..., new % W, :] = v[..., -new.size:, :]
        return (mx.concatenate([old_k, k], axis=2), mx.concatenate([old_v, v], axis=2),
                mx.concatenate([old, mx.arange(start, self.length)]))

    def positions(self, length: int) -> mx.array:
        """Of the tokens in the cache once `length` have been seen, in the order of their places."""
        return length - 1 - (length - 1 - mx.arange(min(length, self.window))) % self.window

    @property
    def nbytes(self) -> int:
        return 0 if self.keys is None else self.keys.nbytes + self.values.nbytes


# ---- end of window ---------------------------------------------------------------------------------------------------

# ---- mixer: attention ------------------------------------------------------------------------------------------------


class KVCache:
    """Keys and values (B, KV, S, D) of one layer. Room grows in steps, and a token is written in place."""
    STEP = 256  # positions

    def __init__(self):
        self.keys = self.values = None
        self.length = 0  # positions filled

    def update(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array, None]:
        """Append k and v (B, KV, T, D); return all keys and values so far, and None: their positions are 0, 1, ..."""
        start, self.length = self.length, self.length + k.shape[2]
        room = 0 if self.keys is None else self.keys.shape[2]
        if self.length > room:
            more = -(-(self.length - room) // self.STEP) * self.STEP
            more_k, more_v = (mx.zeros((*x.shape[:2], more, x.shape[3]), x.dtype) for x in (k, v))
            self.keys = mx.concatenate([self.keys, more_k], axis=2) if room else more_k
            self.values = mx.concatenate([self.values, more_v], axis=2) if room else more_v
        self.keys[..., start:self.length, :] = k
        self.values[..., start:self.length, :] = v
        return self.keys[..., :self.length, :], self.values[..., :self.length, :], None

    @property
    def nbytes(self) -> int:
        return 0 if self.keys is None else self.keys.nbytes + self.values.nbytes


class Cache:
    """What generation remembers: each layer's own cache, and how many tokens the model has read."""

    def __init__(self, blocks: list):
        self.layers = [block.make_cache() for block in blocks]
        self.offset = 0  # tokens read so far = position of the next

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)


class Attention(nn.Module):
    """Causal multi-head attention (Vaswani et al. 2017) with grouped key/value heads (Ainslie et al. 2023)."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        C, D, bias = config.n_embd, config.head_dim, config.bias or config.qkv_bias
        self.config, self.layer = config, layer
        self.q = nn.Linear(C, config.n_head * D, bias=bias)
        self.k = nn.Linear(C, config.n_kv_head * D, bias=bias)
        self.v = nn.Linear(C, config.n_kv_head * D, bias=bias)
        self.out = nn.Linear(config.n_head * D, C, bias=config.bias)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(D, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(D, eps=config.norm_eps)
        if config.pos == "rope":
            self._inverse = mx.array(1 / rope_inv_freq(config), dtype=mx.float32)  # "_": not a parameter

    def make_cache(self):
        if windowed(self.config, self.layer):  # window
            return WindowCache(self.config.sliding_window)  # window
        return KVCache()

    def __call__(self, x: mx.array, offset: int, cache, tap: Callable) -> mx.array:
        y = tap("heads", self.layer, self.heads(x, offset, cache, tap))
        return self.out(y.swapaxes(1, 2).reshape(*x.shape[:2], -1))

    def heads(self, x: mx.array, offset: int, cache, tap: Callable) -> mx.array:
        """What each head reads: (B, T, C) -> (B, H, T, D)."""
        (B, T, _), config, layer, D = x.shape, self.config, self.layer, self.config.head_dim
        q, k, v = (linear(x).reshape(B, T, -1, D).swapaxes(1, 2) for linear in (self.q, self.k, self.v))
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if config.pos == "rope":
            q, k = rope(q, self._inverse, offset), rope(k, self._inverse, offset)
        q, k, v = tap("q", layer, q), tap("k", layer, k), tap("v", layer, v)
        positions = None
        if cache is not None:
            k, v, positions = cache.update(k, v)
        if config.diff_attn:  # diff
            v = values_of_pairs(config, v)  # diff
        y = attend(q, k, v, score_mask(config, layer, T, offset, positions))
        if windowed(config, layer) and offset == 0 and T > 2 * window_block(config):  # window
            y = window_attention(config, q, k, v)  # window
        return y


def attend(q: mx.array, k: mx.array, v: mx.array, mask) -> mx.array:
    """softmax(q k^T / sqrt(D) + mask) v: q (B, H, T, D), k and v (B, KV, S, D) -> (B, H, T, D)."""
    scale = q.shape[-1] ** -0.5
    if isinstance(mask, mx.array) and mask.dtype != mx.bool_:
        mask = mask.astype(q.dtype)  # the fused kernels refuse a wider one
    if ON_CPU and q.shape[2] > 1 and q.dtype == mx.float32:
        return cpu.attention(q, k, v, scale, mask)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)


# ---- variant diff: differential attention (Ye et al. 2024; version 2, 2026) ------------------------------------------
#
#   1: norm(A1 V - lambda A2 V) (1 - lambda_0),   lambda = exp(lq1 lk1) - exp(lq2 lk2) + lambda_0, one a layer
#   2: A1 V - sigmoid(lambda) A2 V,               lambda = W x, one a token and head
#
# A1 and A2 are the attention maps of two neighbouring query heads. What both look at cancels, as noise does. Version 1
# takes neighbours among the n_head heads, so its queries, keys and values are the baseline's, and two value heads make
# one of twice the width. Version 2 has n_head pairs: twice the queries, and the same keys and values.

DIFF_LAMBDAS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")


def check_diff(config: GPTConfig):
    if config.diff_attn_version not in (1, 2):
        raise UserError(f"diff_attn_version={config.diff_attn_version} is not one of 1, 2")
    if config.diff_attn and config.diff_attn_version == 1 and (config.n_head % 2 or config.n_kv_head % 2):
        raise UserError(f"n_head={config.n_head} and n_kv_head={config.n_kv_head} must be even for diff_attn, which "
                        "pairs them")


def diff_pairs(config: GPTConfig) -> int:
    return config.n_head // 2 if config.diff_attn_version == 1 else config.n_head


def values_of_pairs(config: GPTConfig, v: mx.array) -> mx.array:
    """Version 1: value heads 2i and 2i + 1, side by side, for both key heads 2i and 2i + 1: (B, KV, S, 2 D)."""
    if config.diff_attn_version == 2:
        return v
    return mx.repeat(mx.concatenate([v[:, 0::2], v[:, 1::2]], axis=-1), 2, axis=1)


class DiffAttention(Attention):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__(config, layer)
        C, D = config.n_embd, config.head_dim
        if config.diff_attn_version == 1:
            self.lambda_0 = 0.8 - 0.6 * math.exp(-0.3 * layer)
            for name in DIFF_LAMBDAS:
                self[name] = mx.zeros((D,))
            self.head_norm = nn.RMSNorm(2 * D, eps=1e-5)
        else:
            self.q = nn.Linear(C, 2 * config.n_head * D, bias=config.bias or config.qkv_bias)
            self.lam = nn.Linear(C, config.n_head, bias=False)

    def heads(self, x: mx.array, offset: int, cache, tap: Callable) -> mx.array:
        y = super().heads(x, offset, cache, tap)
        first, second = y[:, 0::2], y[:, 1::2]
        if self.config.diff_attn_version == 2:
            return first - sigmoid(self.lam(x)).swapaxes(1, 2)[..., None] * second
        q1, k1, q2, k2 = (self[name].astype(mx.float32) for name in DIFF_LAMBDAS)
        lam = mx.exp((q1 * k1).sum()) - mx.exp((q2 * k2).sum()) + self.lambda_0
        return self.head_norm(first - lam.astype(y.dtype) * second) * (1 - self.lambda_0)


# ---- end of diff -----------------------------------------------------------------------------------------------------

# ---- ffn: what each position computes by itself ----------------------------------------------------------------------


def recompute(f: Callable) -> Callable:
    """Keep only f's inputs for the backward pass. For elementwise functions, which cost less than what they store."""
    return f if ON_CPU else mx.checkpoint(f)


erf, sigmoid = (cpu.erf, cpu.sigmoid) if ON_CPU else (mx.erf, mx.sigmoid)
ACTIVATIONS = {
    "relu2": recompute(lambda x: mx.square(mx.maximum(x, 0))),
    "gelu": recompute(lambda x: x * (0.5 + 0.5 * erf(x * 0.5**0.5))),
    "gelu_tanh": recompute(lambda x: x * sigmoid((8 / math.pi) ** 0.5 * (x + 0.044715 * x * x * x))),
    "swiglu": recompute(lambda gate, x: gate * sigmoid(gate) * x),  # SiLU of the gate (Shazeer 2020)
}


class MLP(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        if config.mlp == "swiglu":
            self.gate = nn.Linear(config.n_embd, config.ffn_dim, bias=config.bias)
        self.up = nn.Linear(config.n_embd, config.ffn_dim, bias=config.bias)
        self.down = nn.Linear(config.ffn_dim, config.n_embd, bias=config.bias)

    def __call__(self, x: mx.array, tap: Callable) -> mx.array:
        inputs = (self.gate(x), self.up(x)) if self.config.mlp == "swiglu" else (self.up(x),)
        return self.down(tap("hidden", self.layer, ACTIVATIONS[self.config.mlp](*inputs)))


# ---- route: which positions a block works on -------------------------------------------------------------------------


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), for every position."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.attn_norm = make_norm(config)
        self.attn = Attention(config, layer)
        if config.diff_attn:  # diff
            self.attn = DiffAttention(config, layer)  # diff
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config, layer)

    def make_cache(self):
        return self.attn.make_cache()

    def __call__(self, x: mx.array, offset: int, cache, tap: Callable) -> mx.array:
        x = tap("resid", self.layer, x)
        x = x + tap("attn", self.layer, self.attn(self.attn_norm(x), offset, cache, tap))
        return x + tap("mlp", self.layer, self.mlp(self.mlp_norm(x), tap))


def make_norm(config: GPTConfig) -> nn.Module:
    if config.norm == "layer":
        return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)
    return nn.RMSNorm(config.n_embd, eps=config.norm_eps)


# ---- tap: looking inside ---------------------------------------------------------------------------------------------


def no_tap(site: str, layer: int, x: mx.array) -> mx.array:
    """A tap is called at every site of every layer, and what it returns flows on. This one changes nothing.

    Sites in a layer, in order: "resid" (B, T, C) what enters the block; "q" (B, H, T, D), "k" and "v" (B, KV, T, D) as
    attention takes them; "heads" (B, H, T, D) what each head read; "attn" (B, T, C) what attention adds to the residual
    stream; "hidden" (B, T, ffn_dim) the neurons of the MLP; "mlp" (B, T, C) what it adds. After the last block "resid"
    once more, with layer = n_layer. With a cache, T counts the new positions only.

        def silence(site, layer, x):  # head 2 of layer 1
            return x * (mx.arange(x.shape[1]) != 2)[:, None, None] if (site, layer) == ("heads", 1) else x
        logits = model(idx, tap=silence)
    """
    return x


# ---- GPT -------------------------------------------------------------------------------------------------------------


class GPT(nn.Module):
    """A decoder-only transformer. Parameters are float32 until model.set_dtype(...)."""

    def __init__(self, config: GPTConfig, seed: int = 0):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        if config.pos == "learned":
            self.pos_embed = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = [Block(config, layer) for layer in range(config.n_layer)]
        self.norm = make_norm(config)
        if not config.tie:
            self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.checkpoint_every = 0  # recompute every k-th block's activations in the backward pass; 0: store all
        init_weights(self, seed)

    def residual(self, idx: mx.array, cache: Cache | None = None, tap: Callable = no_tap) -> mx.array:
        """The residual stream after the last block: (B, T) token ids -> (B, T, C)."""
        T, offset = idx.shape[1], 0 if cache is None else cache.offset
        x = self.embed(idx)
        if self.config.pos == "learned":
            if offset + T > self.config.block_size:
                raise UserError(f"{offset + T} tokens, but positions are learned up to {self.config.block_size}")
            x = x + self.pos_embed(mx.arange(offset, offset + T))
        for layer, block in enumerate(self.blocks):
            run = block
            if self.checkpoint_every and self.training and tap is no_tap and layer % self.checkpoint_every == 0:
                run = nn.utils.checkpoint(block)  # not with a tap: what that captures would get no gradient
            x = run(x, offset, None if cache is None else cache.layers[layer], tap)
        if cache is not None:
            cache.offset += T
        return tap("resid", self.config.n_layer, x)

    def unembed(self, x: mx.array) -> mx.array:
        """Final norm and vocabulary projection: (..., C) -> logits (..., V)."""
        return self.project(self.norm(x))

    def project(self, x: mx.array) -> mx.array:
        """The vocabulary projection alone."""
        return self.embed.as_linear(x) if self.config.tie else self.head(x)

    def __call__(self, idx: mx.array, cache: Cache | None = None, tap: Callable = no_tap) -> mx.array:
        """(B, T) token ids -> logits (B, T, V). With a cache, idx continues the tokens that it holds."""
        return self.unembed(self.residual(idx, cache, tap))

    def make_cache(self) -> Cache:
        """An empty key/value cache: model(idx, cache=cache) fills it, any number of tokens at a time."""
        return Cache(self.blocks)

    def loss(self, idx: mx.array, targets: mx.array, mask: mx.array | None = None, tap: Callable = no_tap) -> mx.array:
        """Mean cross-entropy in nats of targets (B, T), weighted by mask (B, T) if there is one.

        It is cross_entropy(model(idx), targets), computed without all logits in memory at once.
        """
        x = self.norm(self.residual(idx, tap=tap))
        weights = mx.ones(targets.shape) if mask is None else mask.astype(mx.float32)
        total = chunked_loss(self, x.reshape(-1, x.shape[-1]), targets.reshape(-1), weights.reshape(-1))
        return total / mx.where(weights.sum() > 0, weights.sum(), 1)


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """-log softmax(logits)[target] in float32: (N, V), (N,) -> (N,)."""
    if ON_CPU:
        return cpu.cross_entropy(logits.astype(mx.float32), targets)
    return mx.fast.cross_entropy(logits, targets)


LOSS_CHUNK = 2**26 if ON_CPU else 2**28  # logits that exist at a time


def chunked_loss(model: GPT, x: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
    """sum_i weights_i * cross_entropy(project(x_i), target_i), without all logits at once: x (N, C), the rest (N,).

    In training each chunk's gradients are computed while its logits are there, and before the next chunk begins (as in
    Liger kernels, Hsu et al. 2024): the logits are neither stored for the backward pass nor computed twice.
    """
    rows = max(1, LOSS_CHUNK // model.config.vocab_size)
    starts = range(0, x.shape[0], rows)
    head = model.embed if model.config.tie else model.head

    def chunk_loss(parameters, x, start):
        head.update(parameters)  # MLX differentiates by a function's arguments, not by what it captures
        losses = cross_entropy(model.project(x), targets[start:start + rows])
        return (losses * weights[start:start + rows]).sum()

    @mx.custom_function
    def loss_and_gradients(parameters, x):
        total, gradient, dx = mx.array(0.0), tree_map(lambda p: mx.zeros(p.shape), parameters), []
        for start in starts:
            piece = x[start:start + rows]
            if dx:  # wait for the chunk before: else all would be in memory together
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
    head.update(parameters)  # in place of what the tracing left there
    return total


# ---- init ------------------------------------------------------------------------------------------------------------


def init_weights(model: GPT, seed: int = 0):
    """Set every parameter. float32; the same seed gives the same weights on every device.

    embed, pos_embed, head         normal, 0.02
    q, k, v, gate, up              normal, n_embd^-0.5 (keeps the variance of a normalised input)
    out, down                      normal, n_embd^-0.5 / sqrt(2 n_layer) (the residual stream sums 2 n_layer of them)
    norms 1, biases 0, anything else as its module made it
    """
    std = model.config.n_embd ** -0.5
    stds = {"embed": 0.02, "pos_embed": 0.02, "head": 0.02, "q": std, "k": std, "v": std, "gate": std, "up": std}
    stds["out"] = stds["down"] = std / math.sqrt(2 * model.config.n_layer)
    stds.update(dict.fromkeys(DIFF_LAMBDAS, 0.1), lam=std)  # diff

    def initial(path: str, p: mx.array) -> mx.array:
        *_, module, kind = ["", *path.split(".")]
        if kind in DIFF_LAMBDAS:  # diff
            module, kind = kind, "weight"  # diff
        if kind == "bias":
            return mx.zeros(p.shape)
        if kind == "weight" and "norm" in module:
            return mx.ones(p.shape)
        if kind == "weight" and module in stds:  # each has a stream of its own, so that one more moves no other
            rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
            return mx.array(rng.standard_normal(p.shape, dtype=np.float32) * np.float32(stds[module]))
        return p  # as its module made it

    model.update(tree_map_with_path(initial, model.parameters()))


# ---- generate --------------------------------------------------------------------------------------------------------


def sample_token(logits: mx.array, key: mx.array, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
                 min_p: float = 0.0) -> mx.array:
    """Draw one token a row: logits (B, V) -> (B,). temperature 0 takes the most probable one. The filters, in order:
    top_k (keep the k most probable; 0: all), top_p (the fewest whose probabilities sum to p; Holtzman et al. 2020),
    min_p (those with at least min_p times the largest probability; Nguyen et al. 2024)."""
    if temperature == 0:
        return mx.argmax(logits, axis=-1)
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
    return mx.random.categorical(logits, key=key)


def generate(model: GPT, ids, max_new_tokens: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
             min_p: float = 0.0, repetition_penalty: float = 1.0, seed: int = 0, n_vocab: int = 0,
             tap: Callable = no_tap) -> Iterator:
    """Continue token ids (T,), yielding one int a token; or a batch of them (B, T), yielding a list of B ints.

    repetition_penalty divides the positive logits of tokens seen before (Keskar et al. 2019) and multiplies the
    negative ones. n_vocab: ids from here on are padding of the vocabulary and never drawn. When the context is full,
    its second half is read again into a new cache: a token never sees more than block_size tokens.
    """
    block_size, V = model.config.block_size, model.config.vocab_size
    history = np.array(ids, dtype=np.int64)
    single, history = history.ndim == 1, np.atleast_2d(history)
    if history.shape[1] == 0:
        raise UserError("nothing to continue: give at least one token")
    key = mx.random.key(seed)
    seen = mx.zeros((len(history), V), dtype=mx.bool_)
    if repetition_penalty != 1:
        seen = mx.put_along_axis(seen, mx.array(history), mx.array(True), axis=1)
    padding = mx.arange(V) >= (n_vocab or V)
    cache, read = model.make_cache(), [mx.array(history[:, -block_size:])]  # read: the tokens since the cache began

    def step(x):  # x (B, T) -> the next token (B, 1); nothing is computed yet
        nonlocal key, seen
        logits = model(x, cache=cache, tap=tap)[:, -1]
        if repetition_penalty != 1:
            less = mx.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
            logits = mx.where(seen, less, logits)
        if n_vocab:
            logits = mx.where(padding, -mx.inf, logits)
        key, subkey = mx.random.split(key)
        token = sample_token(logits, subkey, temperature, top_k, top_p, min_p)[:, None]
        if repetition_penalty != 1:
            seen = mx.put_along_axis(seen, token, mx.array(True), axis=1)
        return token

    token = step(read[0])
    mx.async_eval(token)
    for i in range(max_new_tokens):
        read.append(token)
        if i + 1 < max_new_tokens:  # start the next token before this one is looked at: the device never waits
            full = cache.offset == block_size
            if endless(model.config):  # window
                full = False  # window
            if full:
                cache, read = model.make_cache(), [mx.concatenate(read, axis=1)[:, -max(1, block_size // 2):]]
                token = step(read[0])
            else:
                token = step(token)
            mx.async_eval(token)
        out = read[-1][:, -1].tolist()
        yield out[0] if single else out


# ---- checkpoint ------------------------------------------------------------------------------------------------------


def save_arrays(path: str, arrays: dict[str, mx.array], header: dict):
    """Write a safetensors file whose header holds `header` as JSON. The path has the old file or the whole new one."""
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
    """Read what save_arrays wrote: (arrays, header). UserError for anything else."""
    if not os.path.exists(path):
        raise UserError(f"no checkpoint at {path}: train one with `python train.py`, or check the name")
    try:
        with safe_open(path, "numpy") as file:  # checks the header against the file's length
            header = json.loads((file.metadata() or {}).get("tinygpt", "null"))
        if not isinstance(header, dict) or "version" not in header:
            raise UserError(f"{path} is a safetensors file, but not one of ours: its header has no `tinygpt` entry")
        if header["version"] != VERSION:
            raise UserError(f"{path} has version {header['version']}, this code reads {VERSION}: update the code")
        arrays = mx.load(path, format="safetensors")
        mx.eval(arrays)  # read now: the file may be replaced later
    except (SafetensorError, OSError, RuntimeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}): copy or train it again") from error
    return arrays, header


def save_checkpoint(path: str, model: GPT, meta: dict):
    """Write the weights and, in the header, the model's config and all of `meta` (tokenizer, script, settings, step,
    losses, commit: whatever JSON can hold)."""
    arrays = dict(tree_flatten(model.parameters()))
    save_arrays(path, arrays, {**meta, "version": VERSION, "config": asdict(model.config)})


def load_checkpoint(path: str) -> tuple[GPT, dict]:
    """Read a checkpoint: (model, meta). Its config rules. UserError if it is missing, cut short, or not ours."""
    arrays, meta = load_arrays(path)
    known = {field.name for field in fields(GPTConfig)}
    config = meta.get("config")
    if not isinstance(config, dict) or not config.keys() <= known:
        raise UserError(f"{path} has settings that this code does not know ({config}): update the code")
    try:
        model = GPT(GPTConfig(**config))
    except (UserError, TypeError) as error:
        raise UserError(f"{path} has settings that make no model ({error})") from error
    if "quantization" in meta:  # {"group_size": ..., "bits": ...}: packed where the file has scales
        nn.quantize(model, **meta["quantization"], class_predicate=lambda path, _: f"{path}.scales" in arrays)
    try:
        model.load_weights(list(arrays.items()), strict=True)
    except ValueError as error:
        raise UserError(f"{path} lacks weights of its config, or has others: {' '.join(str(error).split())}") from error
    model.eval()
    return model, meta
