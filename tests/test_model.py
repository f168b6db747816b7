"""model.py against a GPT written a second time, from the papers' formulas, in float64 numpy."""
import itertools
import json
import math
import os
import struct
import subprocess
import sys
from dataclasses import asdict, fields

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from conftest import ROOT
from mlx.utils import tree_flatten, tree_unflatten
from peers import peer
from safetensors import safe_open
from safetensors.numpy import save_file

import model as core
from config import UserError
from model import GPT, GPTConfig, KVCache, generate, load_checkpoint, sample_token, save_checkpoint

SMALL = dict(block_size=96, vocab_size=61, n_layer=2, n_head=4, n_embd=32)
LLAMA3 = dict(rope_factor=8.0, rope_original=256)  # of head_dim 16, pairs 0 to 2 turn fast, 3 in between, 4 to 7 slowly
YARN = dict(rope_scaling="yarn", rope_factor=4.0, rope_original=64, rope_high_freq=8.0)  # likewise 0; 1 and 2; 3 to 7
FLAVOURS = {
    "default": {},
    "GPT-2": dict(pos="learned", norm="layer", mlp="gelu_tanh", bias=True, qk_norm=False),
    "Llama": dict(mlp="swiglu", ffn_dim=40, n_kv_head=2, qk_norm=False, tie=False, norm_eps=1e-6, rope_theta=500000.0),
    "Llama 3.1": dict(mlp="swiglu", ffn_dim=40, n_kv_head=2, head_dim=16, qk_norm=False, tie=False, **LLAMA3),
    "Qwen2": dict(mlp="swiglu", n_kv_head=2, qk_norm=False, qkv_bias=True, rope_theta=1e6, norm_eps=1e-6),
    "Qwen3": dict(mlp="swiglu", n_kv_head=2, head_dim=12, rope_theta=1e6, tie=False),
    "no positions": dict(pos="none", norm="layer", mlp="gelu", qk_norm=False),
    "one key head": dict(n_kv_head=1, head_dim=6, bias=True),
    "learned with qk_norm": dict(pos="learned", norm="layer", mlp="gelu", bias=True, tie=False),
    "all biases": dict(mlp="swiglu", bias=True, qkv_bias=True, n_layer=1),
    "LayerNorm of large eps": dict(norm="layer", norm_eps=0.2, mlp="relu2", head_dim=10, qk_norm=False),
    "RMSNorm of large eps": dict(norm_eps=0.2, mlp="gelu_tanh", qkv_bias=True, rope_theta=100.0),
    "odd width": dict(n_embd=21, head_dim=8, n_kv_head=2, pos="none", mlp="gelu_tanh", tie=False),
    "one head": dict(n_head=1, n_layer=3, mlp="swiglu", head_dim=32, norm="layer", bias=True),
    "ALiBi": dict(alibi=True, n_head=6, n_embd=36, n_kv_head=2),
    "diff": dict(diff_attn=True, n_kv_head=2),
    "diff, GPT-2": dict(diff_attn=True, pos="learned", norm="layer", mlp="gelu", bias=True, qk_norm=False),
    "diff 2": dict(diff_attn=True, diff_attn_version=2, n_kv_head=2, bias=True),
    "diff, ALiBi": dict(diff_attn=True, alibi=True, qk_norm=False),
    "diff 2, window, ALiBi": dict(diff_attn=True, diff_attn_version=2, alibi=True, sliding_window=5, n_kv_head=1),
    "diff, window": dict(diff_attn=True, sliding_window=5, window_pattern="LS", n_kv_head=2),
    "sinks": dict(sliding_window=6, sinks=4, n_kv_head=2),
    "sinks, in blocks": dict(sliding_window=9, sinks=3, n_layer=1),
    "sinks, ALiBi": dict(sliding_window=3, sinks=5, alibi=True),
    "sinks, diff, pattern": dict(sliding_window=4, sinks=1, diff_attn=True, window_pattern="SL"),
    "sinks, learned": dict(sliding_window=4, sinks=2, pos="learned", qk_norm=False),
    "MoE": dict(n_expert=5, expert_top_k=2, ffn_dim=24),
    "MoE, Mixtral": dict(n_expert=4, mlp="swiglu", ffn_dim=40, n_kv_head=2, qk_norm=False, tie=False),
    "MoE, all biases": dict(n_expert=3, expert_top_k=1, mlp="gelu", ffn_dim=24, bias=True, norm="layer"),
    "MoE, shared, loss-free": dict(n_expert=6, expert_top_k=3, ffn_dim=16, n_shared_expert=2, expert_balance="bias",
                                   mlp="swiglu", bias=True),
    "MoD": dict(mod="topk", n_layer=4),
    "MoD, each": dict(mod="topk", mod_every=1, pos="learned", norm="layer", mlp="gelu", bias=True),
    "MoD, no positions": dict(mod="topk", mod_every=1, pos="none"),
    "MoD, ALiBi": dict(mod="topk", mod_every=1, alibi=True),
    "MoD, window": dict(mod="topk", mod_every=1, sliding_window=7),
    "MoD, window, ALiBi": dict(mod="topk", mod_every=2, sliding_window=11, alibi=True, diff_attn=True),
    "MoD, MoE": dict(mod="topk", mod_every=1, mod_capacity=0.3, n_expert=4, ffn_dim=24),
    "MoD, soft": dict(mod="soft", n_layer=3),
    "MoD, soft, window": dict(mod="soft", sliding_window=5, sinks=2),
    "YOCO": dict(yoco=True, sliding_window=7, n_kv_head=2),
    "YOCO, GPT-2": dict(yoco=True, sliding_window=20, n_layer=3, pos="learned", norm="layer", mlp="gelu", bias=True),
    "YOCO, diff": dict(yoco=True, sliding_window=9, diff_attn=True, window_pattern="LS", n_layer=4),
    "YOCO, diff 2, ALiBi": dict(yoco=True, sliding_window=9, diff_attn=True, diff_attn_version=2, alibi=True, sinks=2),
    "YOCO, MoD": dict(yoco=True, sliding_window=9, mod="topk", mod_every=1, n_layer=4),
    "YOCO, MoD, MoE, ALiBi": dict(yoco=True, sliding_window=9, mod="topk", n_layer=4, alibi=True, n_expert=3),
    "value residual": dict(value_residual=True, n_layer=3),
    "value residual, grouped": dict(value_residual=True, n_kv_head=2, diff_attn=True, bias=True, norm="layer"),
    "value residual, MoD": dict(value_residual=True, mod="topk", mod_every=1, n_layer=3),
    "value residual, YOCO": dict(value_residual=True, yoco=True, sliding_window=9, n_layer=4),
    "value embeddings": dict(value_embeds=True, n_layer=3),
    "value embeddings, grouped": dict(value_embeds=True, n_kv_head=1, mlp="swiglu", tie=False),
    "value embeddings, MoD": dict(value_embeds=True, mod="topk", mod_every=1, n_layer=4, value_residual=True),
    "value embeddings, YOCO": dict(value_embeds=True, yoco=True, sliding_window=9, n_layer=3, value_residual=True),
    "softcap": dict(softcap=3.0),
    "softcap, head": dict(softcap=30.0, tie=False, pos="learned", norm="layer"),
    "Pythia": dict(pos="rope", norm="layer", mlp="gelu", bias=True, qk_norm=False, tie=False, parallel=True,
                   rotary_dim=2),
    "Phi-2": dict(norm="layer", mlp="gelu_tanh", bias=True, qk_norm=False, tie=False, parallel=True, rotary_dim=6,
                  head_bias=True, n_kv_head=2),
    "Gemma": dict(mlp="geglu", ffn_dim=40, n_kv_head=1, head_dim=12, qk_norm=False, norm_eps=1e-6, embed_scale=32**0.5),
    "Gemma 2": dict(mlp="geglu", ffn_dim=40, n_kv_head=2, head_dim=12, qk_norm=False, norm_eps=1e-6, norm_place="both",
                    embed_scale=32**0.5, attn_scale=0.4, attn_softcap=2.5, softcap=3.0, sliding_window=7,
                    window_pattern="SL"),
    "Gemma 3": dict(mlp="geglu", ffn_dim=40, n_kv_head=1, head_dim=12, norm_eps=1e-6, norm_place="both", n_layer=3,
                    embed_scale=32**0.5, attn_scale=0.4, sliding_window=7, window_pattern="SSL", window_theta=100.0,
                    rope_theta=1e6, rope_scaling="linear", rope_factor=8.0),
    "OLMo-2": dict(mlp="swiglu", ffn_dim=40, n_kv_head=2, qk_norm_width=True, norm_place="after", tie=False),
    "SmolLM3": dict(mlp="swiglu", ffn_dim=40, n_kv_head=2, qk_norm=False, rope_pattern="RRN", n_layer=4),
    "StableLM": dict(mlp="swiglu", ffn_dim=40, norm="layer", norm_bias=True, qk_norm=False, tie=False, qkv_bias=True,
                     rotary_dim=2),
    "Granite": dict(mlp="swiglu", ffn_dim=40, n_kv_head=2, qk_norm=False, norm_eps=1e-6, embed_scale=12.0,
                    attn_scale=0.2, residual_scale=0.22, logit_scale=0.125),
    "Llama, biases": dict(mlp="swiglu", ffn_dim=40, qk_norm=False, tie=False, qkv_bias=True, out_bias=True),
    "Llama, yarn": dict(mlp="swiglu", ffn_dim=40, head_dim=16, qk_norm=False, **YARN, attn_scale=0.3),
    "rotary part, linear": dict(rotary_dim=4, rope_scaling="linear", rope_factor=4.0),
    "parallel, both norms, MoD": dict(parallel=True, norm_place="both", mod="topk", mod_every=1, rotary_dim=4,
                                      attn_softcap=1.0),
    "one key norm, YOCO": dict(yoco=True, sliding_window=9, n_kv_head=2, qk_norm_width=True, norm_place="after",
                               window_theta=50.0),
    "geglu, MoE": dict(n_expert=4, ffn_dim=24, mlp="geglu", residual_scale=0.5, norm_place="both", norm="layer"),
    "sinks, of all": dict(sliding_window=6, sinks=3, rotary_dim=4, rope_pattern="RN", attn_softcap=2.0, attn_scale=0.5,
                          n_kv_head=2),
    "diff, softcap": dict(diff_attn=True, attn_softcap=1.5, attn_scale=0.5, rotary_dim=2, norm_place="after",
                          n_kv_head=2, logit_scale=0.5, softcap=3.0),
    "GPT-OSS": dict(mlp="swiglu_clip", ffn_dim=24, n_kv_head=2, head_dim=16, qk_norm=False, tie=False, bias=True,
                    n_expert=4, expert_balance="none", router_bias=True, sink_logits=True, sliding_window=7,
                    window_pattern="SL", **YARN | dict(rope_scaling="yarn_untruncated"), attn_scale=0.3),
    "sink logits, diff 2": dict(sink_logits=True, diff_attn=True, diff_attn_version=2, attn_softcap=1.5, n_kv_head=2),
    "sink logits, sinks": dict(sink_logits=True, sliding_window=6, sinks=3, n_kv_head=1, alibi=True),
    "sink logits, YOCO, MoD": dict(sink_logits=True, yoco=True, sliding_window=9, mod="topk", n_layer=4,
                                   diff_attn=True, mlp="swiglu_clip"),
    "window": dict(sliding_window=5),
    "window of one": dict(sliding_window=1, n_layer=1, qk_norm=False),
    "window over all": dict(sliding_window=500, n_layer=1),
    "window, GPT-2": dict(sliding_window=33, window_pattern="SL", n_layer=3, pos="learned", norm="layer", bias=True),
    "window, ALiBi": dict(sliding_window=17, window_pattern="SSL", n_layer=4, alibi=True, n_kv_head=1, mlp="swiglu"),
}
SLOPES = {2: [1 / 16, 1 / 256], 4: [1 / 4, 1 / 16, 1 / 64, 1 / 256],  # of ALiBi, by the number of heads
          6: [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]}
every_flavour = pytest.mark.parametrize("flavour", FLAVOURS)


# ---- the oracle ------------------------------------------------------------------------------------------------------


def oracle(c: GPTConfig, parameters: dict, idx, drop=lambda x: x) -> np.ndarray:
    """float64 logits (B, T, V). It takes every parameter that the config asks for, and fails if one is left over. drop
    is called where GPT-2 has dropout, in this order."""
    used = set()
    H, KV, D = c.n_head, c.n_kv_head, c.head_dim

    def weight(name):
        used.add(name)
        return parameters[name]

    def linear(name, x, bias=c.bias):
        y = x @ weight(f"{name}.weight").T
        return y + weight(f"{name}.bias") if bias else y

    def norm(name, x, kind=c.norm):
        if kind == "layer":
            x = x - x.mean(-1, keepdims=True)
        y = x / np.sqrt((x * x).mean(-1, keepdims=True) + c.norm_eps) * weight(f"{name}.weight")
        return y + weight(f"{name}.bias") if kind == "layer" and (c.bias or c.norm_bias) else y

    def is_short(layer):
        letter = (c.window_pattern * c.n_layer)[layer]
        return c.sliding_window and letter == "S" and not (c.yoco and layer >= c.n_layer // 2)

    def frequencies(layer):  # as transformers words Llama 3.1: by wavelength
        found, R = [], c.rotary_dim or D
        if is_short(layer) and c.window_theta:
            return 1 / c.window_theta ** (2 * np.arange(R // 2) / R)
        first, last = (R / 2 * math.log(c.rope_original / turns / 2 / math.pi) / math.log(c.rope_theta)
                       for turns in (c.rope_high_freq, c.rope_low_freq))  # yarn: pairs that turn so often
        if c.rope_scaling != "yarn_untruncated":
            first, last = math.floor(first), math.ceil(last)
        first, last = max(0, first), min(R - 1, last)
        for i in range(R // 2):
            frequency = 1 / c.rope_theta ** (2 * i / R)
            wavelength = 2 * math.pi / frequency
            if c.rope_scaling == "linear":
                found.append(frequency / c.rope_factor)
            elif c.rope_scaling.startswith("yarn"):
                part = (i - first) / (last - first) if first < i < last else float(i > first)
                found.append(part * frequency / c.rope_factor + (1 - part) * frequency)
            elif c.rope_factor == 1 or wavelength < c.rope_original / c.rope_high_freq:
                found.append(frequency)
            elif wavelength > c.rope_original / c.rope_low_freq:
                found.append(frequency / c.rope_factor)
            else:
                smooth = (c.rope_original / wavelength - c.rope_low_freq) / (c.rope_high_freq - c.rope_low_freq)
                found.append((1 - smooth) * frequency / c.rope_factor + smooth * frequency)
        return np.array(found)

    def turn(x, at, layer):  # (T, heads, D), positions (T,): dimensions i and i + R/2 are one complex number
        if c.pos != "rope" or (c.rope_pattern * c.n_layer)[layer] == "N":
            return x
        R = c.rotary_dim or D
        z = x[..., :R // 2] + 1j * x[..., R // 2:R]
        z = z * np.exp(1j * at[:, None] * frequencies(layer))[:, None]
        return np.concatenate([z.real, z.imag, x[..., R:]], axis=-1)

    def head_norm(name, x):  # (T, heads, D)
        if not c.qk_norm:
            return x
        return norm(name, x.reshape(len(x), -1) if c.qk_norm_width else x, "rms").reshape(x.shape)

    def keys_values(name, x, layer, at, seen):
        k, v = (linear(f"{name}.{n}", x, c.bias or c.qkv_bias).reshape(len(x), KV, D) for n in "kv")
        if c.value_embeds and layer % 2 == (c.n_layer - 1) % 2:
            gate = 2 / (1 + np.exp(-x[:, :32] @ weight(f"{name}.value_gate.weight").T))
            v = v + gate[..., None] * weight(f"{name}.value_embed.weight")[seen["ids"][at]].reshape(v.shape)
        if c.value_residual and layer == 0:
            seen["values"][at] = v
        elif c.value_residual:
            own, first = weight(f"{name}.value_mix")
            v = own * v + first * seen["values"][at]
        return turn(head_norm(f"{name}.k_norm", k), at, layer), v, at

    def attention(name, x, layer, at, seen):  # x (T, C) at the positions (T,)
        T, shared = len(x), seen["shared"]
        k, v, at_k = shared or keys_values(name, x, layer, at, seen)
        q = head_norm(f"{name}.q_norm", linear(f"{name}.q", x, c.bias or c.qkv_bias).reshape(T, -1, D))
        short = is_short(layer)
        within = np.minimum(at, c.sinks + c.sliding_window - 1) if short else at  # positions inside the cache
        maps = np.zeros((q.shape[1], T, len(k)))
        pairs = c.diff_attn and q.shape[1] // 2  # version 2 has twice the query heads
        q, q_within = turn(q, at, layer), turn(q, within, layer)
        for t, h, j in np.ndindex(T, len(maps), len(k)):
            sink = short and at_k[j] < c.sinks
            if at_k[j] > at[t] and not c.bidirectional or short and not sink and at[t] - at_k[j] >= c.sliding_window:
                continue
            score = (q_within if sink else q)[t, h] @ k[j, h * KV // len(maps)]
            score = score * c.attn_scale if c.attn_scale else score / math.sqrt(D)
            score = c.attn_softcap * math.tanh(score / c.attn_softcap) if c.attn_softcap else score
            if c.alibi:
                distance = (within if sink else at)[t] - at_k[j]
                score = score - (SLOPES[pairs][h // 2] if pairs else SLOPES[H][h]) * distance
            maps[h, t, j] = np.exp(score)
        rest = np.exp(weight(f"{name}.sink.weight"))[:, None, None] if c.sink_logits else 0
        maps = drop(maps / (maps.sum(-1, keepdims=True) + rest))
        if not pairs:
            y = np.stack([maps[h] @ v[:, h * KV // H] for h in range(H)], axis=1)
        elif c.diff_attn_version == 1:
            y, start = [], 0.8 - 0.6 * math.exp(-0.3 * layer)
            lam = [weight(f"{name}.lambda_{n}") for n in ("q1", "k1", "q2", "k2")]
            lam = math.exp(lam[0] @ lam[1]) - math.exp(lam[2] @ lam[3]) + start
            scale = weight(f"{name}.head_norm.weight")
            for i in range(pairs):
                value = v.reshape(len(k), KV // 2, 2 * D)[:, i * KV // H]
                z = (maps[2 * i] - lam * maps[2 * i + 1]) @ value
                y.append(z / np.sqrt((z * z).mean(-1, keepdims=True) + 1e-5) * scale * (1 - start))
            y = np.stack(y, axis=1)
        else:
            lam = 1 / (1 + np.exp(-x @ weight(f"{name}.lam.weight").T))
            y = np.stack([(maps[2 * i] - lam[:, i, None] * maps[2 * i + 1]) @ v[:, i * KV // H]
                          for i in range(pairs)], axis=1)
        return linear(f"{name}.out", y.reshape(T, H * D), c.bias or c.out_bias)

    def activation(up, gate):
        if c.mlp == "swiglu_clip":  # at most 7 of the gate, and -7 to 7 of up
            gate, up = np.where(gate > 7, 7, gate), np.where(np.abs(up) > 7, 7 * np.sign(up), up)
            return gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
        if c.mlp == "swiglu":
            return gate / (1 + np.exp(-gate)) * up
        if c.mlp == "relu2":
            return np.where(up > 0, up, 0) ** 2
        if c.mlp == "gelu":
            return up * (1 + np.vectorize(math.erf)(up / math.sqrt(2))) / 2
        x = gate if c.mlp == "geglu" else up
        y = x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))
        return y * up if c.mlp == "geglu" else y

    def mlp(name, x):
        gate = linear(f"{name}.gate", x) if c.mlp in ("swiglu", "geglu", "swiglu_clip") else None
        return linear(f"{name}.down", activation(linear(f"{name}.up", x), gate))

    def experts(name, x):  # every token through every expert, weighed
        logits = linear(f"{name}.router", x, c.router_bias)
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        score = p + (weight(f"{name}.balance") if c.expert_balance == "bias" else 0)
        gates = np.where(score >= np.sort(score)[:, -c.expert_top_k, None], p, 0)
        gates = gates / (gates.sum(-1, keepdims=True) if c.expert_top_k > 1 else 1)

        def expert_linear(part, x, e):
            y = x @ weight(f"{name}.{part}.weight")[e].T
            return y + weight(f"{name}.{part}.bias")[e] if c.bias else y

        y = mlp(f"{name}.shared", x) if c.n_shared_expert else 0
        for e in range(c.n_expert):
            gate = expert_linear("gate", x, e) if c.mlp in ("swiglu", "geglu", "swiglu_clip") else None
            hidden = activation(expert_linear("up", x, e), gate)
            y = y + gates[:, e, None] * expert_linear("down", hidden, e)
        return y

    def block(x, layer, at, seen):
        name = f"blocks.{layer}"

        def added(part, x, f):  # f with its norms
            y = f(f"{name}.{part}", x if c.norm_place == "after" else norm(f"{name}.{part}_norm", x))
            y = y if c.norm_place == "before" else norm(f"{name}.{part}_post_norm", y)
            return drop(c.residual_scale * y)

        y = added("attn", x, lambda *of: attention(*of, layer, at, seen))
        return x + y + added("mlp", x if c.parallel else x + y, experts if c.n_expert else mlp)

    def row(idx):
        x, at = c.embed_scale * weight("embed.weight")[idx], np.arange(len(idx))
        seen = {"ids": idx, "values": np.zeros((len(idx), KV, D)), "shared": None}
        if c.pos == "learned":
            x = x + weight("pos_embed.weight")[at]
        x = drop(x)
        for layer in range(c.n_layer):
            if c.yoco and layer == c.n_layer // 2:
                seen["shared"] = keys_values("shared", norm("shared.norm", x), layer, at, seen)
            if c.mod == "none" or layer % c.mod_every < c.mod_every - 1:
                x = block(x, layer, at, seen)
                continue
            r = x @ weight(f"blocks.{layer}.depth_router.weight")[0]
            if c.mod == "soft":
                x = x + (block(x, layer, at, seen) - x) / (1 + np.exp(-r[:, None]))
            else:
                likely = x @ weight(f"blocks.{layer}.predictor.weight")[0] - weight(f"blocks.{layer}.threshold")
                chosen, = np.nonzero(likely > 0)
                x = x.copy()
                x[chosen] += r[chosen, None] * (block(x[chosen], layer, at[chosen], seen) - x[chosen])
        y = norm("norm", x) @ weight("embed.weight").T if c.tie else linear("head", norm("norm", x), c.head_bias)
        y = c.logit_scale * y
        return c.softcap * np.tanh(y / c.softcap) if c.softcap else y

    logits = np.stack([row(ids) for ids in idx])
    assert used == set(parameters), f"parameters without a use: {set(parameters) - used}"
    return logits


def oracle_loss(logits, targets, mask=None) -> float:
    top = logits.max(-1, keepdims=True)
    log_p = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    nats = -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    return nats.mean() if mask is None else (nats * mask).sum() / mask.sum()


# ---- helpers ---------------------------------------------------------------------------------------------------------


def build(flavour="default", **changes) -> GPT:
    """A small model in which nothing is 0 or 1, so that a dropped bias or weight of a norm shows."""
    model = GPT(GPTConfig(**{**SMALL, **FLAVOURS[flavour], **changes}))
    rng, weights = np.random.default_rng(1), []
    for name, p in tree_flatten(model.parameters()):
        noise = rng.standard_normal(p.shape)
        if p.ndim == 1:
            value = 0.3 * noise + ("norm" in name and name.endswith("weight"))
        else:
            value = noise if name.startswith("embed") else noise * p.shape[-1] ** -0.5
        weights.append((name, mx.array(value.astype(np.float32))))
    model.update(tree_unflatten(weights))
    return model.eval() if model.config.mod == "topk" else model  # in training it looks ahead


def float64(tree) -> dict:
    return {name: np.array(p.astype(mx.float32), np.float64) for name, p in tree_flatten(tree)}


def tokens(*shape, seed=0, vocab=61) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, shape)


def close(a, b, tolerance=1e-4) -> bool:
    """Equal but for a part of the largest number."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return a.shape == b.shape and bool(np.abs(a - b).max() <= tolerance * np.abs(b).max())


def same_gradients(a, b, tolerance=1e-4):
    a, b = float64(a), float64(b)
    assert a.keys() == b.keys()
    assert [name for name in a if not close(a[name], b[name], tolerance)] == []


def plain_loss(model, idx, targets, mask=None, tap=core.no_tap):
    nats = nn.losses.cross_entropy(model(idx, tap=tap), targets)
    return nats.mean() if mask is None else (nats * mask).sum() / mask.sum()


# ---- forward ---------------------------------------------------------------------------------------------------------


@every_flavour
def test_logits(flavour):
    model, idx = build(flavour), tokens(2, 90)
    assert close(model(mx.array(idx)), oracle(model.config, float64(model.parameters()), idx), 2e-4)


@every_flavour
@pytest.mark.parametrize("chunks", [(5, 1, 11, 3, 70, 2, 4), (*[1] * 48, 48), (96,)], ids=["chunks", "tokens", "all"])
def test_cache(flavour, chunks, monkeypatch):
    monkeypatch.setattr(KVCache, "STEP", 7)
    model, idx = build(flavour), mx.array(tokens(2, 96))
    cache, logits, start = model.make_cache(), [], 0
    for size in chunks:
        logits.append(model(idx[:, start:start + size], cache=cache))
        start += size
        assert cache.offset == start
    assert close(mx.concatenate(logits, axis=1), model(idx))


def test_cache_grows_in_steps(monkeypatch):
    monkeypatch.setattr(KVCache, "STEP", 8)
    model = build("Llama")  # 2 key heads of 8
    cache = model.make_cache()
    assert cache.nbytes == 0
    for length in range(1, 40):
        mx.eval(model(mx.array(tokens(3, 1)), cache=cache))
        rooms = -(-length // 8) * 8
        assert cache.nbytes == 3 * 2 * rooms * 8 * 4 * 2 * 2  # B, heads, positions, D, bytes, keys and values, layers


def test_cache_writes_in_place():
    cache, token = KVCache(), mx.ones((1, 4, 1, 64))
    mx.eval(token, cache.update(*[mx.zeros((1, 4, 4000, 64))] * 2))
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for _ in range(10):
        keys, values, _ = cache.update(token, token)
        assert (keys.sum() + values.sum()).item() == 2 * 4 * 64 * (cache.length - 4000)
    assert mx.get_peak_memory() - before < cache.nbytes / 4


@every_flavour
def test_future_moves_nothing_in_the_past(flavour):
    model, idx = build(flavour), tokens(2, 90)
    before = np.array(model(mx.array(idx)))
    for t in (1, 37, 64, 89):
        changed = idx.copy()
        changed[:, t:] = (idx[:, t:] + 1 + tokens(2, 90 - t, vocab=59)) % 61
        after = np.array(model(mx.array(changed)))
        if model.config.n_expert:  # another token may move a row to another place of its block: rounding differs
            assert close(after[:, :t], before[:, :t], 1e-6)
        else:
            assert np.array_equal(before[:, :t], after[:, :t])
        assert (before[:, t:] != after[:, t:]).any(-1).all()


def test_learned_positions_end():
    model = build("GPT-2")
    cache = model.make_cache()
    model(mx.zeros((1, 90), mx.int32), cache=cache)
    for call in (lambda: model(mx.zeros((1, 97), mx.int32)), lambda: model(mx.zeros((1, 7), mx.int32), cache=cache)):
        with pytest.raises(UserError, match="97 tokens.*96"):
            call()


@pytest.mark.parametrize("flavour", ["default", "GPT-2", "Llama 3.1"])
def test_bfloat16(flavour):
    model, idx = build(flavour), mx.array(tokens(2, 40))
    expected, loss = np.array(model(idx)), model.loss(idx, idx).item()
    model.set_dtype(mx.bfloat16)
    logits = model(idx)
    assert logits.dtype == mx.bfloat16
    assert np.abs(np.array(logits.astype(mx.float32)) - expected).mean() < 0.03 * np.abs(expected).mean()
    half, gradients = nn.value_and_grad(model, GPT.loss)(model, idx, idx)
    assert half.dtype == mx.float32 and abs(half.item() - loss) < 0.02 * loss
    assert {g.dtype for _, g in tree_flatten(gradients)} == {mx.bfloat16}


@pytest.mark.parametrize("flavour", ["default", "GPT-2", "Llama", "diff", "MoE, all biases", "YOCO", "value embeddings",
                                     "value residual, grouped", "softcap, head"])
def test_float32_parameters_train_in_bfloat16(flavour):
    """With compute_dtype every array that a tap sees is bfloat16, and every gradient float32 and near the exact one."""
    model, idx, seen = build(flavour), mx.array(tokens(2, 40)), {}
    exact, gradients = nn.value_and_grad(model, GPT.loss)(model, idx, idx)
    model.compute_dtype = mx.bfloat16

    def look(site, layer, x):
        seen[site, layer] = x.dtype
        return x

    model(idx, tap=look)
    assert {*seen.values()} == {mx.bfloat16} and len(seen) > 10
    loss, found = nn.value_and_grad(model, GPT.loss)(model, idx, idx)
    assert loss.dtype == mx.float32 and 0 < abs(loss.item() - exact.item()) < 0.02 * exact.item()
    exact, found = dict(tree_flatten(gradients)), dict(tree_flatten(found))
    assert {g.dtype for g in found.values()} == {p.dtype for _, p in tree_flatten(model.parameters())} == {mx.float32}
    a, b = (np.concatenate([np.array(grads[name]).ravel() for name in exact]) for grads in (exact, found))
    assert a @ b > 0.98 * np.linalg.norm(a) * np.linalg.norm(b)


# ---- loss and gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", ["default", "Llama"])  # tied, untied
@pytest.mark.parametrize("chunk", [61 * 7, 61 * 20, 1, 2**26])  # 40 rows in parts of 7, 20, 1, 40
@pytest.mark.parametrize("masked", [False, True])
def test_loss_and_gradients(flavour, chunk, masked, monkeypatch):
    monkeypatch.setattr(core, "LOSS_CHUNK", chunk)
    model, idx, targets = build(flavour), mx.array(tokens(2, 20)), mx.array(tokens(2, 20, seed=1))
    mask = mx.array(np.random.default_rng(2).random((2, 20)) * (tokens(2, 20) % 2)) if masked else None
    expected = oracle_loss(oracle(model.config, float64(model.parameters()), np.array(idx)), np.array(targets),
                           None if mask is None else np.array(mask, np.float64))
    _, gradients = nn.value_and_grad(model, plain_loss)(model, idx, targets, mask)
    loss, found = nn.value_and_grad(model, GPT.loss)(model, idx, targets, mask)
    assert close(loss, expected, 1e-5)
    same_gradients(found, gradients)
    _, doubled = nn.value_and_grad(model, lambda m: 2 * m.loss(idx, targets, mask))(model)
    same_gradients(tree_unflatten([(name, 2 * g) for name, g in tree_flatten(found)]), doubled, 1e-6)
    model.eval()
    assert close(model.loss(idx, targets, mask), expected, 1e-5)
    same_gradients(nn.value_and_grad(model, GPT.loss)(model, idx, targets, mask)[1], gradients)


@pytest.mark.parametrize("flavour", ["default", "Llama"])
@pytest.mark.parametrize("frozen", ["embed", "head", "blocks", "norm"])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_a_part(flavour, frozen, training, monkeypatch):
    monkeypatch.setattr(core, "LOSS_CHUNK", 61 * 7)
    model, idx, targets = build(flavour), mx.array(tokens(2, 20)), mx.array(tokens(2, 20, seed=1))
    for module in getattr(model, frozen, None) if frozen == "blocks" else [getattr(model, frozen, None)]:
        if module is None:
            return  # tied: no head
        module.freeze()
    model.train(training)
    expected, gradients = nn.value_and_grad(model, plain_loss)(model, idx, targets)
    loss, found = nn.value_and_grad(model, GPT.loss)(model, idx, targets)
    assert close(loss, expected, 1e-5) and not any(name.startswith(frozen) for name in float64(found))
    same_gradients(found, gradients)


def test_loss_leaves_the_model_as_it_was():
    model, idx = build("Llama"), mx.array(tokens(2, 20))
    before = float64(model.parameters())
    gradient, state = nn.value_and_grad(model, GPT.loss), [model.state]
    step = mx.compile(lambda idx: gradient(model, idx, idx), inputs=state, outputs=state)
    compiled, gradients = step(idx)
    loss, expected = nn.value_and_grad(model, GPT.loss)(model, idx, idx)
    assert close(compiled, loss, 1e-6)
    same_gradients(gradients, expected, 1e-5)
    model.eval()
    model.loss(idx, idx)
    after = float64(model.parameters())
    assert before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in before)


def test_loss_without_targets():
    model, idx = build(), mx.array(tokens(2, 20))
    loss, gradients = nn.value_and_grad(model, GPT.loss)(model, idx, idx, mx.zeros((2, 20)))
    assert loss.item() == 0 and not any(g.any() for g in float64(gradients).values())


@pytest.mark.parametrize("flavour", ["GPT-2", "Qwen3"])
def test_gradients_are_slopes(flavour):
    model, idx, targets = build(flavour), tokens(2, 9), tokens(2, 9, seed=1)
    gradients = float64(nn.value_and_grad(model, GPT.loss)(model, mx.array(idx), mx.array(targets))[1])
    parameters, rng, h = float64(model.parameters()), np.random.default_rng(0), 1e-5
    for name, p in parameters.items():
        direction = rng.standard_normal(p.shape)
        up, down = (oracle_loss(oracle(model.config, {**parameters, name: p + sign * h * direction}, idx), targets)
                    for sign in (1, -1))
        error = abs((up - down) / (2 * h) - (gradients[name] * direction).sum())
        assert error < 1e-4 * np.linalg.norm(gradients[name]) * np.linalg.norm(direction) + 1e-7, name  # k.bias: 0


DROPS = ["default", "GPT-2", "Llama", "diff", "diff 2", "ALiBi", "sinks", "window", "MoE", "MoD, soft", "YOCO",
         "value residual", "softcap", "Gemma 2", "OLMo-2", "Granite", "Phi-2", "diff, softcap", "GPT-OSS"]


@pytest.mark.parametrize("flavour", DROPS)
def test_dropout(flavour, monkeypatch):
    """In training the numbers that are 0 in the model's masks are dropped at GPT-2's places, and the others divided by
    1 - p; the masks drop a share p. model.eval() drops nothing."""
    model, idx, masks, bernoulli = build(flavour), tokens(1, 90), [], mx.random.bernoulli
    monkeypatch.setattr(mx.random, "bernoulli", lambda *of, **key: masks.append(bernoulli(*of, **key)) or masks[-1])
    whole = model.eval()(mx.array(idx))
    model.dropout = 0.25
    assert mx.array_equal(whole, model(mx.array(idx))) and not masks
    mx.random.seed(1)
    found = model.train()(mx.array(idx))
    left = [np.array(mask[0]) for mask in masks]
    kept = np.concatenate([mask.ravel() for mask in left])
    assert len(left) == 3 * model.config.n_layer + 1
    assert kept.mean() == pytest.approx(0.75, abs=5 * math.sqrt(0.25 * 0.75 / kept.size))
    assert len({mask[..., :8, :8].tobytes() for mask in left}) == len(left)  # no mask is used twice
    expected = oracle(model.config, float64(model.parameters()), idx, lambda x: x * left.pop(0) / 0.75)
    assert close(found, expected) and not close(found, whole, 0.05) and not left


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("flavour", ["default", "YOCO", "MoD"])
def test_dropout_of_recomputed_blocks(flavour, every):
    """A block that is computed twice drops the same numbers twice: gradients do not depend on it."""
    model, idx = build(flavour).train(), mx.array(tokens(2, 40))
    model.dropout = 0.3
    found = []
    for model.checkpoint_every in (0, every):
        mx.random.seed(5)
        found.append(nn.value_and_grad(model, model.loss)(idx[:, :-1], idx[:, 1:]))
    assert found[0][0].item() == pytest.approx(found[1][0].item(), rel=1e-6)
    same_gradients(found[0][1], found[1][1])
    mx.random.seed(6)
    assert model.loss(idx[:, :-1], idx[:, 1:]).item() != pytest.approx(found[0][0].item(), rel=1e-4)


@pytest.mark.parametrize("settings, says", [
    (dict(head_dim=2**32), "head_dim=4294967296"), (dict(n_layer=1001), "n_layer=1001"),
    (dict(n_layer="4"), "n_layer='4'"), (dict(rope_theta=10**400), "rope_theta=1000"),
    (dict(softcap=math.nan), "softcap=nan"), (dict(norm_eps=math.inf), "norm_eps=inf"),
    (dict(n_head=2**29, head_dim=2), "n_head . head_dim"), (dict(n_layer=1000, n_embd=2**17), "GiB does not fit"),
], ids=str)
def test_sizes_that_make_no_model(settings, says):
    with pytest.raises(UserError, match=says):
        GPT(GPTConfig(**settings))


def test_swiglu_clip():
    """GPT-OSS's activation where its inputs are clipped, which those of small models are not."""
    gate, x = np.meshgrid(np.linspace(-12, 12, 49), np.linspace(-12, 12, 49))
    low, high = np.minimum(gate, 7), np.maximum(np.minimum(x, 7), -7)
    expected = low / (1 + np.exp(-1.702 * low)) * (high + 1)
    assert close(core.ACTIVATIONS["swiglu_clip"](mx.array(gate), mx.array(x)), expected, 1e-6)


@pytest.mark.parametrize("every, recomputed", [(0, []), (1, [0, 1, 2]), (2, [0, 2])])
def test_activation_checkpointing(every, recomputed, monkeypatch):
    model, idx, blocks = build("Llama", n_layer=3), mx.array(tokens(2, 20)), []
    expected, gradients = nn.value_and_grad(model, plain_loss)(model, idx, idx)
    checkpoint = nn.utils.checkpoint
    monkeypatch.setattr(nn.utils, "checkpoint", lambda block, f: blocks.append(block.layer) or checkpoint(block, f))
    model.checkpoint_every = every
    loss, found = nn.value_and_grad(model, GPT.loss)(model, idx, idx)
    assert blocks == recomputed
    assert close(loss, expected, 1e-6)
    same_gradients(found, gradients)
    model.eval()
    model.loss(idx, idx)
    assert blocks == recomputed  # only what has a backward pass


@pytest.mark.parametrize("every", [0, 1])
def test_gradient_of_what_a_tap_holds(every):
    model, idx = build("Qwen2"), mx.array(tokens(2, 20))
    model.checkpoint_every = every

    def loss(delta, f):
        def steer(site, layer, x):
            return x + delta if (site, layer) == ("resid", 1) else x
        return f(model, idx, idx, tap=steer)

    delta = mx.array(np.random.default_rng(0).standard_normal(32, np.float32))
    assert close(mx.grad(loss)(delta, GPT.loss), mx.grad(loss)(delta, plain_loss))


# ---- tap -------------------------------------------------------------------------------------------------------------


def test_tap_sites():
    model = build("Qwen3")  # 4 heads of 12, 2 key heads, ffn_dim 128
    B, T, cache = 2, 5, model.make_cache()
    layers = [(site, layer, shape) for layer in (0, 1) for site, shape in [
        ("resid", (B, T, 32)), ("q", (B, 4, T, 12)), ("k", (B, 2, T, 12)), ("v", (B, 2, T, 12)),
        ("heads", (B, 4, T, 12)), ("attn", (B, T, 32)), ("mid", (B, T, 32)), ("hidden", (B, T, 128)),
        ("mlp", (B, T, 32))]]
    idx = mx.array(tokens(B, T))
    calls = [lambda tap: model(idx, tap=tap), lambda tap: model(idx, cache=cache, tap=tap),
             lambda tap: model(idx, cache=cache, tap=tap), lambda tap: model.loss(idx, idx, tap=tap),
             lambda tap: next(generate(model, idx.tolist(), 1, tap=tap))]
    for call in calls:
        seen = []
        call(lambda site, layer, x, seen=seen: seen.append((site, layer, x.shape)) or x)
        assert seen == layers + [("resid", 2, (B, T, 32))]


@every_flavour
def test_tap_that_changes_nothing(flavour):
    model, idx = build(flavour).eval(), mx.array(tokens(2, 20))
    assert np.array_equal(model(idx, tap=lambda site, layer, x: x), model(idx))


EDITS = {  # site: (what a tap in layer 1 does, the change of weights that does the same)
    "q": (lambda x: x * (mx.arange(4) != 2)[:, None, None], lambda b: ("attn.q.weight", np.s_[16:24])),
    "k": (lambda x: x * (mx.arange(2) != 1)[:, None, None], lambda b: ("attn.k.weight", np.s_[8:])),
    "v": (lambda x: x * (mx.arange(2) != 1)[:, None, None], lambda b: ("attn.v.weight", np.s_[8:])),
    "heads": (lambda x: x * (mx.arange(4) != 2)[:, None, None], lambda b: ("attn.out.weight", np.s_[:, 16:24])),
    "attn": (lambda x: x * (mx.arange(32) != 3), lambda b: ("attn.out.weight", np.s_[3])),
    "hidden": (lambda x: x * (mx.arange(40) != 7), lambda b: ("mlp.down.weight", np.s_[:, 7])),
    "mlp": (lambda x: x * 0, lambda b: ("mlp.down.weight", np.s_[:])),
}


@pytest.mark.parametrize("site", EDITS)
def test_what_a_tap_returns_flows_on(site):
    model, idx = build("Llama"), mx.array(tokens(2, 20))
    edit, weight = EDITS[site]

    def tap(s, layer, x):
        return edit(x) if (s, layer) == (site, 1) else x

    plain, cache = model(idx), model.make_cache()
    whole = model(idx, tap=tap)
    parts = [model(idx[:, start:end], cache=cache, tap=tap) for start, end in ((0, 12), (12, 13), (13, 20))]
    name, where = weight(1)
    parameters = float64(model.parameters())
    parameters[f"blocks.1.{name}"][where] = 0
    assert close(whole, oracle(model.config, parameters, np.array(idx)))
    assert close(mx.concatenate(parts, axis=1), whole)
    assert not close(whole, plain, 1e-2)


def test_tap_of_the_residual_stream():
    model, idx = build("Llama"), mx.array(tokens(2, 20))
    stream = mx.random.normal((2, 20, 32), key=mx.random.key(0))
    last = model(idx, tap=lambda site, layer, x: stream if (site, layer) == ("resid", 2) else x)
    assert np.array_equal(last, model.unembed(stream))
    first = model(idx, tap=lambda site, layer, x: 2 * x if (site, layer) == ("resid", 0) else x)
    model.embed.weight = 2 * model.embed.weight
    assert close(first, model(idx), 1e-6)


def test_tap_between_attention_and_the_mlp():
    """What the tap returns is what the MLP reads and adds to. With `parallel` there is no such state."""
    model, idx, stream = build("Llama"), mx.array(tokens(2, 20)), {}

    def without_attention(site, layer, x):
        if site == "resid":
            stream[layer] = x
        return stream[1] if (site, layer) == ("mid", 1) else x

    parameters = float64(model.parameters())
    parameters["blocks.1.attn.out.weight"][:] = 0
    assert close(model(idx, tap=without_attention), oracle(model.config, parameters, np.array(idx)))
    seen = []
    build("Llama", parallel=True)(idx, tap=lambda site, layer, x: seen.append(site) or x)
    assert "mlp" in seen and "mid" not in seen


# ---- init ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", ["GPT-2", "Qwen3"])
def test_init(flavour):
    config = GPTConfig(**{**SMALL, **FLAVOURS[flavour], "n_embd": 64, "n_layer": 3})
    mx.random.seed(5)
    a, b = float64(GPT(config, seed=1).parameters()), float64(GPT(config, seed=2).parameters())
    mx.random.seed(6)
    again = float64(GPT(config, seed=1).parameters())
    out = 64 ** -0.5 / math.sqrt(2 * 3)
    stds = dict(embed=0.02, pos_embed=0.02, head=0.02, q=1 / 8, k=1 / 8, v=1 / 8, gate=1 / 8, up=1 / 8, out=out,
                down=out)
    for name, p in a.items():
        assert np.array_equal(p, again[name])
        module, kind = name.split(".")[-2:]
        if p.ndim == 1:
            assert (p == (kind == "weight")).all(), name
        else:
            assert not (p == b[name]).any(), name
            assert abs(p.std() / stds[module] - 1) < 5 / math.sqrt(2 * p.size), name
            assert abs(p.mean()) < 5 * stds[module] / math.sqrt(p.size), name
            assert abs((p ** 4).mean() / stds[module] ** 4 - 3) < 1, name  # normal: kurtosis 3
    streams = {p.flat[0] / p.std() for p in a.values() if p.ndim > 1}
    assert len(streams) == sum(p.ndim > 1 for p in a.values())


def test_init_of_one_parameter_depends_on_no_other():
    small = float64(GPT(GPTConfig(**SMALL)).parameters())
    large = float64(GPT(GPTConfig(**{**SMALL, "n_layer": 3, "mlp": "swiglu", "tie": False})).parameters())
    for name in ("embed.weight", "blocks.0.attn.q.weight", "blocks.1.attn.v.weight"):
        assert np.array_equal(small[name], large[name])


def test_golden():
    """What the seeded model says: if this moves, so does every figure that was measured with it."""
    logits = GPT(GPTConfig(**SMALL), seed=3)(mx.arange(48).reshape(2, 24))
    golden = [-0.004263503, -0.146667063, 0.018817695, 0.038216129]
    assert np.abs(np.array(logits[1, -1, :4]) - golden).max() < 1e-5


# ---- config ----------------------------------------------------------------------------------------------------------


def test_config_defaults():
    config = GPTConfig(n_embd=96, n_head=6)
    assert (config.head_dim, config.n_kv_head, config.ffn_dim) == (16, 6, 384)
    assert GPTConfig(n_embd=96, mlp="swiglu").ffn_dim == 256
    assert GPTConfig(n_embd=97, head_dim=8, mlp="swiglu").ffn_dim == 320  # 258.7, up to a multiple of 64
    assert GPTConfig(head_dim=7, pos="none").head_dim == 7
    assert GPTConfig(**asdict(config)) == config


@pytest.mark.parametrize("bad", [
    dict(block_size=0), dict(vocab_size=0), dict(n_layer=0), dict(n_head=0), dict(n_embd=-1), dict(n_kv_head=-1),
    dict(head_dim=-1), dict(ffn_dim=-1), dict(n_head=3), dict(n_kv_head=3), dict(n_kv_head=8), dict(head_dim=7),
    dict(pos="alibi"), dict(norm="batch"), dict(mlp="relu"), dict(rope_scaling="ntk"), dict(norm_place="under"),
    dict(rotary_dim=-2), dict(rotary_dim=5), dict(rotary_dim=66), dict(rope_pattern=""), dict(rope_pattern="RS"),
    dict(rope_theta=-1.0), dict(rope_factor=0.0), dict(rope_low_freq=4.0), dict(rope_high_freq=-1.0),
    dict(attn_scale=-0.5), dict(embed_scale=0.0), dict(residual_scale=-1.0), dict(logit_scale=0.0),
    dict(attn_softcap=-1.0), dict(window_theta=-1.0)], ids=str)
def test_bad_config(bad):
    with pytest.raises(UserError) as error:
        GPTConfig(**bad)
    (name, value), = bad.items()
    assert f"{name}={value!r}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("bad", [
    dict(norm_bias=True, norm="rms"), dict(head_bias=True, tie=True), dict(qk_norm_width=True, qk_norm=False),
    dict(qk_norm_width=True, diff_attn=True), dict(rotary_dim=4, pos="learned"), dict(rope_pattern="RN", pos="none"),
    dict(rope_pattern="RN", yoco=True), dict(window_theta=1e4, sliding_window=0),
    dict(window_theta=1e4, sliding_window=8, pos="learned")], ids=str)
def test_settings_that_exclude_each_other(bad):
    """One line names both."""
    with pytest.raises(UserError) as error:
        GPTConfig(**bad)
    assert all(f"{name}={value}" in str(error.value).replace("'", "") for name, value in bad.items())
    assert "\n" not in str(error.value)


def test_compute_dtype():
    assert core.compute_dtype("bfloat16") == mx.bfloat16
    assert core.compute_dtype("auto") == (mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16)
    with pytest.raises(UserError, match="int8"):
        core.compute_dtype("int8")


# ---- sampling --------------------------------------------------------------------------------------------------------

LOGITS = np.random.default_rng(0).standard_normal((3, 16))


def kept(logits, top_k=0, top_p=1.0, min_p=0.0) -> set:
    """The tokens of one row that the filters leave."""
    ranked = sorted(range(len(logits)), key=lambda i: -logits[i])
    ranked = ranked[:top_k] if top_k else ranked
    p = np.exp(logits[ranked])
    p /= p.sum()
    count = next((n for n in range(1, len(p) + 1) if p[:n].sum() >= top_p), len(p))
    p, ranked = p[:count] / p[:count].sum(), ranked[:count]
    return {token for token, probability in zip(ranked, p, strict=True) if probability >= min_p * p.max()}


def draw(logits, n=6000, seed=0, **settings) -> list[set]:
    """For each row, the set of n tokens drawn."""
    rows = mx.repeat(mx.array(logits.astype(np.float32)), n, axis=0)
    return [set(row) for row in sample_token(rows, mx.random.key(seed), **settings).reshape(-1, n).tolist()]


@pytest.mark.parametrize("settings", [
    dict(), dict(top_k=1), dict(top_k=5), dict(top_k=16), dict(top_k=99), dict(top_p=0.3), dict(top_p=0.75),
    dict(top_p=1e-9), dict(top_p=0.0), dict(min_p=0.05), dict(min_p=0.4), dict(min_p=1.0), dict(top_k=7, top_p=0.6),
    dict(top_p=0.8, min_p=0.3), dict(top_k=9, top_p=0.9, min_p=0.2)], ids=str)
def test_filters(settings):
    assert draw(LOGITS, **settings) == [kept(row, **settings) for row in LOGITS]


def test_filters_after_temperature():
    settings = dict(top_k=12, top_p=0.7, min_p=0.35)
    assert draw(LOGITS, temperature=0.5, **settings) == [kept(row / 0.5, **settings) for row in LOGITS]
    assert kept(LOGITS[0] / 0.5, **settings) != kept(LOGITS[0], **settings)


def test_filters_of_equal_logits():
    equal, pairs = np.zeros((1, 4)), np.array([[2.0, 2.0, 0.0, 0.0]])
    assert [len(tokens) for tokens in draw(equal, top_p=0.5) + draw(equal, top_p=1e-9)] == [2, 1]
    assert draw(pairs, top_k=2) == draw(pairs, top_p=0.8) == draw(pairs, min_p=0.9) == [{0, 1}]
    assert draw(pairs, top_k=3)[0] >= {0, 1}
    assert draw(np.array([[-np.inf, 0.0, -np.inf, 1.0]]), top_k=3, top_p=0.999) == [{1, 3}]


def test_temperature_0_is_argmax():
    logits = mx.array(LOGITS)
    for dtype in (mx.float32, mx.bfloat16):
        drawn = sample_token(logits.astype(dtype), mx.random.key(0), temperature=0, top_k=3, top_p=0.5, min_p=0.5)
        assert drawn.tolist() == LOGITS.argmax(-1).tolist()


@pytest.mark.parametrize("temperature, top_k", [(1.0, 0), (0.6, 0), (2.0, 0), (1.5, 6)])
def test_distribution(temperature, top_k):
    n, row = 40000, LOGITS[0].astype(np.float32)
    drawn = sample_token(mx.broadcast_to(mx.array(row), (n, 16)), mx.random.key(3), temperature, top_k)
    p = np.exp(row / temperature)
    if top_k:
        p[np.argsort(row)[:-top_k]] = 0
    p /= p.sum()
    counts = np.bincount(np.array(drawn), minlength=16)
    assert (counts[p == 0] == 0).all()
    expected = n * p[p > 0]
    chi_square, freedom = ((counts[p > 0] - expected) ** 2 / expected).sum(), len(expected) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


# ---- generate --------------------------------------------------------------------------------------------------------

# Untied: an embedding that is its own unembedding would say the same token again and again.


def slow_generate(model, ids, count, penalty=1.0, n_vocab=0) -> list[int]:
    """Greedy, without a cache: each token from its window."""
    block_size, ids, made = model.config.block_size, list(ids), []
    window = ids[-block_size:]
    for _ in range(count):
        logits = np.array(model(mx.array([window]))[0, -1])[:n_vocab or None]
        for token in set(ids + made if penalty != 1 else []):
            if token < len(logits):
                logits[token] *= penalty if logits[token] < 0 else 1 / penalty
        made.append(int(logits.argmax()))
        window = window + made[-1:] if len(window) < block_size else (window + made[-1:])[-max(1, block_size // 2):]
    return made


@every_flavour
def test_greedy(flavour):
    model, prompt = build(flavour, tie=False), tokens(7).tolist()
    expected = slow_generate(model, prompt, 60)
    assert list(generate(model, prompt, 60, temperature=0)) == expected and len(set(expected)) > 2


@pytest.mark.parametrize("flavour", ["default", "GPT-2", "no positions"])
@pytest.mark.parametrize("block_size, length", [(16, 5), (15, 15), (16, 40), (2, 1), (1, 3)])
def test_beyond_the_context(flavour, block_size, length):
    model, prompt = build(flavour, block_size=block_size, tie=False), tokens(length).tolist()
    assert list(generate(model, prompt, 50, temperature=0)) == slow_generate(model, prompt, 50)


@pytest.mark.parametrize("penalty", [1.3, 3.0, 0.8])
def test_repetition_penalty(penalty):
    model, prompt = build(block_size=16, tie=False), tokens(20).tolist()
    found = list(generate(model, prompt, 40, temperature=0, repetition_penalty=penalty))
    assert found == slow_generate(model, prompt, 40, penalty) != slow_generate(model, prompt, 40)
    batch = [prompt, prompt[::-1]]
    rows = zip(*generate(model, batch, 40, temperature=0, repetition_penalty=penalty), strict=True)
    assert [list(row) for row in rows] == [slow_generate(model, ids, 40, penalty) for ids in batch]


def test_seeds():
    model, prompt = build(tie=False), tokens(5).tolist()
    mx.random.seed(1)
    first = list(generate(model, prompt, 30, seed=4))
    mx.random.seed(2)
    assert list(generate(model, prompt, 30, seed=4)) == first != list(generate(model, prompt, 30, seed=5))
    assert list(generate(model, np.array(prompt), 10, seed=4)) == first[:10]
    assert len(set(first)) > 5


def test_single_and_batch():
    model, batch = build("Llama"), tokens(3, 8).tolist()
    rows = list(generate(model, batch, 20, temperature=0))
    assert all(type(row) is list and [type(token) for token in row] == [int] * 3 for row in rows)
    for i, prompt in enumerate(batch):
        single = list(generate(model, prompt, 20, temperature=0))
        assert single == [row[i] for row in rows] and {type(token) for token in single} == {int}
    assert [row[0] for row in generate(model, batch[:1], 20)] == list(generate(model, batch[0], 20))
    same = list(generate(model, [batch[0]] * 2, 20))
    assert any(a != b for a, b in same)  # rows draw for themselves
    assert list(generate(model, batch, 0)) == [] and len(list(generate(model, batch, 1))) == 1


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.5}])
def test_rows_of_different_lengths(settings):
    """Each row goes on as it would alone, wherever the others end."""
    model, lengths = build("Llama"), (4, 9, 5, 4)
    batch = [[*tokens(length - 1).tolist()[::-1], 0] for length in lengths]
    rows = list(zip(*generate(model, batch, 12, temperature=0, **settings), strict=True))
    for prompt, row in zip(batch, rows, strict=True):
        waiting = len(prompt) - 4
        assert row[:waiting] == (None,) * waiting and len(row) == 12 + 5
        assert list(row[waiting:]) == slow_generate(model, prompt, 17 - waiting, settings.get("repetition_penalty", 1))


def test_settings_reach_the_sampler():
    model, prompt = build(tie=False), tokens(5).tolist()
    greedy = list(generate(model, prompt, 20, temperature=0))
    for settings in (dict(top_k=1), dict(top_p=1e-9), dict(min_p=1.0), dict(temperature=1e-6)):
        assert list(generate(model, prompt, 20, **settings)) == greedy
    assert list(generate(model, prompt, 20)) != greedy


@pytest.mark.parametrize("settings", [
    dict(temperature=0), dict(temperature=9.0), dict(top_k=20), dict(top_p=0.99), dict(repetition_penalty=5.0)],
    ids=str)
def test_n_vocab(settings):
    model, prompt = build(tie=False), tokens(5).tolist()
    drawn = list(generate(model, prompt, 80, n_vocab=7, **settings))
    assert len(drawn) == 80 and set(drawn) <= set(range(7))
    if settings == dict(temperature=9.0):
        assert len(set(drawn)) == 7
    if settings == dict(temperature=0):
        assert drawn == slow_generate(model, prompt, 80, n_vocab=7)


def test_tap_of_generate():
    model, prompt = build(tie=False), tokens(5).tolist()
    wiped = list(generate(model, prompt, 20, temperature=0,
                          tap=lambda site, layer, x: x * 0 if site in ("attn", "mlp") else x))
    for block in model.blocks:
        block.attn.out.weight *= 0
        block.mlp.down.weight *= 0
    assert wiped == slow_generate(model, prompt, 20)


@pytest.mark.parametrize("prompt", [[], [[]], [[], []]], ids=str)
def test_empty_prompt(prompt):
    with pytest.raises(UserError, match="at least one token"):
        next(generate(build(), prompt, 5))


# ---- checkpoint ------------------------------------------------------------------------------------------------------

META = {"tokenizer": {"kind": "char", "characters": "aé\n\"🙂"}, "step": 12, "loss": 1.25, "script": None}


@every_flavour
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
def test_round_trip(flavour, dtype, tmp_path):
    path, model = str(tmp_path / "ckpt.safetensors"), build(flavour)
    model.set_dtype(dtype)
    save_checkpoint(path, model, META)
    loaded, meta = load_checkpoint(path)
    a, b = (dict(tree_flatten(m.parameters())) for m in (model, loaded))
    assert a.keys() == b.keys()
    assert all(a[name].dtype == b[name].dtype == dtype and mx.array_equal(a[name], b[name]) for name in a)
    assert loaded.config == model.config and not loaded.training
    assert {name: meta[name] for name in META} == META
    assert os.listdir(tmp_path) == ["ckpt.safetensors"]


def test_others_can_read_it(tmp_path):
    path, model = str(tmp_path / "ckpt.safetensors"), build("Llama")
    save_checkpoint(path, model, META)
    weights = float64(model.parameters())
    with safe_open(path, "numpy") as file:
        assert set(file.keys()) == set(weights)
        assert all(np.array_equal(file.get_tensor(name), weights[name]) for name in weights)
        ours = json.loads(file.metadata()["tinygpt"])
    with open(path, "rb") as file:  # as the browser does
        size, = struct.unpack("<Q", file.read(8))
        header, body = json.loads(file.read(size)), file.read()
    assert json.loads(header.pop("__metadata__")["tinygpt"]) == ours == {
        **META, "version": 1, "config": {field.name: getattr(model.config, field.name) for field in fields(GPTConfig)}}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        assert entry["dtype"] == "F32"
        assert np.array_equal(np.frombuffer(body[start:end], "<f4").reshape(entry["shape"]), weights[name])


def spoil_header(change):
    def spoil(path):
        arrays, header = core.load_arrays(path)
        core.save_arrays(path, arrays, change(arrays, header) or header)
    return spoil


def config_with(**settings):
    return spoil_header(lambda arrays, header: header["config"].update(settings))


def spoil_bytes(change):
    def spoil(path):
        with open(path, "rb") as file:
            old = file.read()
        with open(path, "wb") as file:
            file.write(change(old))
    return spoil


FOREIGN = {"x": np.zeros(3, np.float32)}
BAD_FILES = {
    "missing": (os.remove, "no checkpoint"),
    "a folder": (lambda path: (os.remove(path), os.mkdir(path)), "is a folder, not a checkpoint: give a .safetensors"),
    "empty": (spoil_bytes(lambda old: b""), "not a whole"),
    "random bytes": (spoil_bytes(lambda old: np.random.default_rng(0).bytes(5000)), "not a whole"),
    "text": (spoil_bytes(lambda old: b"hello world, this is no checkpoint\n" * 9), "is a text file, not a checkpoint"),
    "one line": (spoil_bytes(lambda old: b'{"prompt": 1}'), "is a text file, not a checkpoint: give a .safe"),
    "text cut in a letter": (spoil_bytes(lambda old: b"x" + "é".encode() * 4000), "is a text file"),
    "blanks": (spoil_bytes(lambda old: b"  \n"), "not a whole"),
    "seven letters": (spoil_bytes(lambda old: b"hello w"), "not a whole"),  # may be the start of a cut file
    "text and a zero": (spoil_bytes(lambda old: b"hello\0" * 99), "not a whole"),
    "an empty header": (spoil_bytes(lambda old: struct.pack("<Q", 0)), "not a whole"),
    "bytes too many": (spoil_bytes(lambda old: old + b"\0"), "not a whole"),
    "foreign": (lambda path: save_file(FOREIGN, path), "not one of ours"),
    "foreign of float64": (lambda path: save_file({"x": np.zeros(3)}, path), "not one of ours"),  # MLX has none
    "foreign with metadata": (lambda path: save_file(FOREIGN, path, {"format": "pt"}), "not one of ours"),
    "header is a list": (lambda path: save_file(FOREIGN, path, {"tinygpt": "[1]"}), "not one of ours"),
    "header is not JSON": (lambda path: save_file(FOREIGN, path, {"tinygpt": "{a"}), ""),
    "other version": (spoil_header(lambda arrays, header: {**header, "version": 2}), "version 2"),
    "no config": (spoil_header(lambda arrays, header: {"version": 1}), "no config"),
    "a lens": (spoil_header(lambda arrays, header: {"version": 1, "lens": "full"}), "is a lens of tuned_lens.py"),
    "unknown setting": (config_with(dropout=0.1), "dropout"),
    "setting out of range": (config_with(n_layer=0), "n_layer"),
    "setting of another type": (config_with(n_layer="2"), ""),
    "tensor missing": (spoil_header(lambda arrays, header: arrays.pop("blocks.1.attn.q.weight") is None),
                       "blocks.1.attn.q.weight"),
    "tensor too many": (spoil_header(lambda arrays, header: arrays.update(extra=mx.zeros(3))), "extra"),
    "wrong shape": (spoil_header(lambda arrays, header: arrays.update({"norm.weight": mx.zeros(3)})), "norm.weight"),
}


def user_error(path) -> str:
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    assert path in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_file(kind, tmp_path):
    path = str(tmp_path / "ckpt.safetensors")
    save_checkpoint(path, build(), META)
    spoil, words = BAD_FILES[kind]
    spoil(path)
    assert words in user_error(path)


@pytest.mark.parametrize("name", ["ckpt", "best", "sft", "dpo"])
@pytest.mark.parametrize("optimizer", [optim.Adam(1), optim.Lion(1), optim.MultiOptimizer([optim.Adam(1)], [])],
                         ids=["adam", "lion", "multi"])
def test_states_and_folders(name, optimizer, tmp_path):
    """The states that train.py, sft.py and dpo.py resume from, and a run's folder, lead to the checkpoint there."""
    model, wanted = build(), str(tmp_path / f"{name}.safetensors")
    optimizer.init(model.parameters())
    states = {"ckpt.optimizer-20.safetensors": optimizer.state,
              "resume.safetensors": {"model": model.parameters(), "optimizer": optimizer.state}}
    for file, state in states.items():
        core.save_arrays(str(tmp_path / file), dict(tree_flatten(state)), {"version": 1, "step": 20})
        says = f"{tmp_path / file} is the state from which a run resumes, not a checkpoint: give "
        assert user_error(str(tmp_path / file)) == f"{says}a .safetensors file of train.py, sft.py or dpo.py"
    save_checkpoint(wanted, model, META)
    for file in states:
        says = f"{tmp_path / file} is the state from which a run resumes, not a checkpoint: give {wanted}"
        assert user_error(str(tmp_path / file)) == says
    assert user_error(str(tmp_path)) == f"{tmp_path} is a folder, not a checkpoint: give {wanted}"
    for more in ("ckpt", "best"):
        save_checkpoint(str(tmp_path / f"{more}.safetensors"), model, META)
    assert f"{tmp_path / 'ckpt.safetensors'} or {tmp_path / 'best.safetensors'}" in user_error(str(tmp_path))


@pytest.mark.parametrize("name, script", [("ckpt", "train.py"), ("sft", "sft.py"), ("dpo", "dpo.py")])
def test_the_script_that_makes_a_missing_file(name, script, tmp_path):
    path = str(tmp_path / f"{name}.safetensors")
    assert user_error(path) == f"no checkpoint at {path}: train one with `python {script}`, or check the name"


def test_names_in_a_locale_of_ascii(tmp_path):
    """A folder whose name is not ASCII, where Python reads names as ASCII: bytes that it cannot decode."""
    name = os.fsdecode("größe".encode())  # the tests may run in such a locale, too
    save_checkpoint(str(tmp_path / "ckpt.safetensors"), build(), META)
    (tmp_path / name).mkdir()
    os.rename(tmp_path / "ckpt.safetensors", tmp_path / name / "a.safetensors")
    code = "import os, model; os.chdir(os.listdir()[0]); folder = os.getcwd(); assert not folder.isprintable(); " \
           "loaded, meta = model.load_checkpoint(f'{folder}/a.safetensors'); " \
           "model.save_checkpoint(f'{folder}/b.safetensors', loaded, meta)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    a, b = (load_checkpoint(str(tmp_path / name / f"{file}.safetensors"))[0].parameters() for file in "ab")
    assert all(mx.array_equal(p, q) for (_, p), (_, q) in zip(tree_flatten(a), tree_flatten(b), strict=True))


def test_cut_short(tmp_path):
    path = str(tmp_path / "ckpt.safetensors")
    save_checkpoint(path, build(), META)
    whole = (tmp_path / "ckpt.safetensors").read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    rng = np.random.default_rng(0)
    for end in [1, 7, 8, header - 1, header, len(whole) - 1, *rng.integers(9, header, 10),
                *rng.integers(9, len(whole), 20)]:
        (tmp_path / "ckpt.safetensors").write_bytes(whole[:end])
        assert "not a whole" in user_error(path)


class file_size_limit:
    """No file may grow over so many bytes: a full disk, for root too."""
    def __init__(self, size):
        self.resource, self.size = pytest.importorskip("resource"), size

    def __enter__(self):
        self.old = self.resource.getrlimit(self.resource.RLIMIT_FSIZE)
        self.resource.setrlimit(self.resource.RLIMIT_FSIZE, (self.size, self.old[1]))

    def __exit__(self, *_):
        self.resource.setrlimit(self.resource.RLIMIT_FSIZE, self.old)


def test_full_disk(tmp_path, monkeypatch):
    path = str(tmp_path / "ckpt.safetensors")
    save_checkpoint(path, build(), META)
    old = (tmp_path / "ckpt.safetensors").read_bytes()

    def check(error):
        assert path in str(error) and "\n" not in str(error)
        assert (tmp_path / "ckpt.safetensors").read_bytes() == old and os.listdir(tmp_path) == ["ckpt.safetensors"]

    for size in (0, 1000, len(old) - 1):
        with pytest.raises(UserError) as error, file_size_limit(size):
            save_checkpoint(path, build("GPT-2"), META)
        check(error.value)

    def no_space(*_):
        raise OSError(28, "No space left on device")
    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left") as error:
            patch.setattr(os, function, no_space)
            save_checkpoint(path, build("GPT-2"), META)
        check(error.value)


def test_saved_before_it_is_renamed(tmp_path, monkeypatch):
    path, order = str(tmp_path / "ckpt.safetensors"), []
    for name, f in (("fsync", os.fsync), ("replace", os.replace)):
        monkeypatch.setattr(os, name, lambda *a, name=name, f=f: order.append(name) or f(*a))
    save_checkpoint(path, build(), META)
    assert order == ["fsync", "replace"]


def test_folder_that_cannot_be_written(tmp_path):
    folder = tmp_path / "kept"
    folder.mkdir()
    path = str(folder / "ckpt.safetensors")
    save_checkpoint(path, build(), META)
    old = (folder / "ckpt.safetensors").read_bytes()
    folder.chmod(0o500)
    try:
        if not os.access(folder, os.W_OK):  # root may write everywhere
            with pytest.raises(UserError, match="kept"):
                save_checkpoint(path, build("GPT-2"), META)
            assert os.listdir(folder) == ["ckpt.safetensors"] and (folder / "ckpt.safetensors").read_bytes() == old
    finally:
        folder.chmod(0o700)
    for path in (str(tmp_path / "none" / "ckpt.safetensors"), str(folder)):
        with pytest.raises(UserError, match="cannot write") as error:
            save_checkpoint(path, build(), META)
        assert path in str(error.value) and "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["kept"]


# ---- transformers ----------------------------------------------------------------------------------------------------

THEIR_NAMES = {
    ".transformer.": ".", ".model.": ".", ".h.": ".blocks.", ".layers.": ".blocks.", ".wte.": ".embed.",
    ".wpe.": ".pos_embed.", ".embed_tokens.": ".embed.", ".ln_f.": ".norm.", ".lm_head.": ".head.",
    ".ln_1.": ".attn_norm.", ".ln_2.": ".mlp_norm.", ".input_layernorm.": ".attn_norm.",
    ".post_attention_layernorm.": ".mlp_norm.", ".self_attn.": ".attn.", "attn.c_proj.": "attn.out.",
    "mlp.c_proj.": "mlp.down.", ".c_fc.": ".up.", "_proj.": ".", ".o.": ".out."}


def in_transformers(flavour: str, model: GPT):
    """The same model, made by transformers."""
    torch, transformers = peer("torch"), peer("transformers")
    c = model.config
    if flavour == "GPT-2":
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head))
    else:
        family = flavour.split()[0]
        rope = dict(rope_type="default", rope_theta=c.rope_theta)
        if c.rope_factor != 1:
            rope.update(rope_type="llama3", factor=c.rope_factor, low_freq_factor=c.rope_low_freq,
                        high_freq_factor=c.rope_high_freq, original_max_position_embeddings=c.rope_original)
        theirs = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(
            vocab_size=c.vocab_size, max_position_embeddings=c.block_size, hidden_size=c.n_embd, head_dim=c.head_dim,
            num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head,
            intermediate_size=c.ffn_dim, rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tie, rope_parameters=rope))
    ours, state = float64(model.parameters()), {}
    for name in theirs.state_dict():
        source = f".{name}"
        for old, new in THEIR_NAMES.items():
            source = source.replace(old, new)
        source = source[1:]
        if "c_attn" in source:  # GPT-2 keeps q, k and v in one matrix
            value = np.concatenate([ours.pop(source.replace("c_attn", n)) for n in "qkv"])
        elif source == "head.weight" and c.tie:
            value = float64(model.parameters())["embed.weight"]
        else:
            value = ours.pop(source)
        if flavour == "GPT-2" and source.startswith("blocks.") and value.ndim == 2:
            value = value.T  # and its matrices transposed
        state[name] = torch.tensor(value, dtype=torch.float32)
    assert not ours
    theirs.load_state_dict(state)
    return theirs.eval()


@pytest.mark.parametrize("flavour", ["GPT-2", "Llama", "Llama 3.1", "Qwen2", "Qwen3"])
def test_transformers(flavour):
    torch = peer("torch")
    model, idx = build(flavour), tokens(2, 90)
    theirs = in_transformers(flavour, model)
    with torch.no_grad():
        logits = theirs(torch.tensor(idx)).logits.numpy()
    assert close(model(mx.array(idx)), logits, 2e-4)


@pytest.mark.parametrize("kind, settings", [
    ("linear", {}), ("llama3", dict(low_freq_factor=1.0, high_freq_factor=4.0)),
    ("llama3", dict(low_freq_factor=2.0, high_freq_factor=3.0)), ("yarn", dict(beta_slow=1.0, beta_fast=32.0)),
    ("yarn", dict(beta_slow=2.0, beta_fast=8.0))], ids=str)
def test_rope_scaling_of_transformers(kind, settings):
    of = peer("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS[kind]
    low, high = settings.values() or (1.0, 4.0)
    for D, theta, original, factor in itertools.product((8, 64, 128), (1e4, 1e6), (64, 2048, 40960), (2.0, 40.0)):
        theirs, _ = of(peer("transformers").LlamaConfig(
            hidden_size=2 * D, num_attention_heads=2, max_position_embeddings=int(original * factor), rope_parameters={
                "rope_type": kind, "rope_theta": theta, "factor": factor,
                "original_max_position_embeddings": original, **settings}), "cpu")
        ours = core.rope_inv_freq(GPTConfig(
            n_head=2, n_embd=2 * D, rope_scaling=kind, rope_theta=theta, rope_factor=factor, rope_original=original,
            rope_low_freq=low, rope_high_freq=high))
        assert np.abs(theirs.numpy() / ours - 1).max() < 1e-6


@pytest.mark.parametrize("settings", [{}, dict(rotary_dim=6), dict(rope_factor=4.0, rope_scaling="linear")], ids=str)
def test_rope_by_places_as_on_a_gpu(settings, monkeypatch):
    """Places that differ from row to row, with documents and padding, turn as they do on a CPU; gradients, too."""
    config = GPTConfig(n_embd=48, n_head=3, **settings)
    inverse = mx.array(1 / core.rope_inv_freq(config), mx.float32)
    places = mx.array([[0, 1, 2, 3, 4], [7, 9, core.DOCUMENT, core.DOCUMENT + 1, core.PADDING]])
    for at in (places, places[:1]):
        x, factors = (mx.random.normal((2, 5, 3, 16), key=mx.random.key(i)) for i in range(2))

        def value(x, at=at, factors=factors):
            y = core.rope(x.swapaxes(1, 2), inverse, at).swapaxes(1, 2)
            return (y * factors).sum(), y

        (_, right), right_gradient = mx.value_and_grad(value)(x)
        with monkeypatch.context() as patched:
            patched.setattr(core, "ON_CPU", False)
            (_, found), gradient = mx.value_and_grad(value)(x)
        assert mx.abs(found - right).max() < 1e-5 and mx.abs(gradient - right_gradient).max() < 1e-5
