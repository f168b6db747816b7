"""One position through the blocks of a model on a CPU, for writing: cpu_decode.c, which matvec.py compiles.

MLX evaluates four pieces of a block one after another, each for a tenth of a millisecond and more, and Python builds
them. For one position of a small model this takes longer than the arithmetic. cpu_decode.c computes all blocks in one
call. It knows the settings in KNOWN, in float32; for all else model.py computes the blocks, as it does where there is
no compiler. The keys and values are those of model.py's cache, written in place. Deleting this file and cpu_decode.c
costs speed and nothing else.
"""
import ctypes
import sys
import weakref

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import numpy as np

import matvec
from config import UserError

KNOWN = """rotary_dim rope_scaling rope_pattern parallel norm_place norm_bias out_bias head_bias qk_norm_width
embed_scale attn_scale residual_scale logit_scale sliding_window window_pattern window_theta softcap attn_softcap"""
ACTIVATIONS = "relu2", "gelu", "gelu_tanh", "swiglu", "geglu"  # as in cpu_decode.c
ROWS = 4  # of a batch; for more, BLAS is the faster one


class Linear(ctypes.Structure):  # as in cpu_decode.c, and so the others
    _fields_ = [("layer", matvec.Layer), ("bias", ctypes.c_void_p)]


class Norm(ctypes.Structure):
    _fields_ = [("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p)]


NORMS = "attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm"
LINEARS = "q", "k", "v", "out", "gate", "up", "down"


class Block(ctypes.Structure):
    _fields_ = [*((name, Norm) for name in (*NORMS, "q_norm", "k_norm")), *((name, Linear) for name in LINEARS),
                *((name, ctypes.c_void_p) for name in ("inverse", "keys", "values")),
                ("room", ctypes.c_int64), ("window", ctypes.c_int64)]


class Model(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int64) for name in ("rows", "width", "heads", "kv_heads", "head_dim", "hidden",
                                                      "rotary", "blocks", "position")),
                *((name, ctypes.c_int) for name in ("layer_norm", "parallel", "qk_norm_width", "activation",
                                                    "threads")),
                *((name, ctypes.c_float) for name in ("norm_eps", "attn_scale", "attn_softcap", "residual_scale"))]


class Plan:
    """What cpu_decode.c needs to know of a model. It holds the arrays whose addresses it has given away."""

    def __init__(self, model: nn.Module):
        """UserError where the model is one that cpu_decode.c does not know."""
        import model as plain  # not above: it imports this file
        config, self.arrays, rotary = model.config, [], 0
        windowed = getattr(plain, "windowed", lambda *_: False)  # a variant may have been deleted
        plain.check_known(config, KNOWN, "cpu_decode.py")
        if config.mlp not in ACTIVATIONS:
            raise UserError(f"mlp={config.mlp}")
        self.blocks = (Block * config.n_layer)()
        for given, block in zip(self.blocks, model.blocks, strict=True):
            attn, mlp = block.attn, block.mlp
            if (type(block), type(attn), type(mlp)) != (plain.Block, plain.Attention, plain.MLP):
                raise UserError("a block of another class")
            for name in NORMS:
                setattr(given, name, self.norm(block, name))
            for name in ("q_norm", "k_norm"):
                setattr(given, name, self.norm(attn, name))
            for name in LINEARS:
                owner = attn if name in ("q", "k", "v", "out") else mlp
                if name in owner:
                    setattr(given, name, self.linear(owner[name], (plain.Linear, nn.QuantizedLinear)))
            if "_inverse" in attn:
                rotary, given.inverse = 2 * attn._inverse.size, self.address(attn._inverse)
            given.window = config.sliding_window if windowed(config, block.layer) else 0
        sizes = config.n_embd, config.head_dim, config.ffn_dim
        if any(size % 8 for size in sizes):
            raise UserError(f"widths {sizes} that are no multiples of 8")
        self.model = Model(
            width=config.n_embd, heads=config.n_head, kv_heads=config.n_kv_head, head_dim=config.head_dim,
            hidden=config.ffn_dim, rotary=rotary, blocks=config.n_layer, layer_norm=config.norm == "layer",
            parallel=config.parallel, qk_norm_width=config.qk_norm_width, activation=ACTIVATIONS.index(config.mlp),
            norm_eps=config.norm_eps, attn_scale=config.attn_scale or config.head_dim ** -0.5,
            attn_softcap=getattr(config, "attn_softcap", 0.0), residual_scale=config.residual_scale)
        self.layers = None  # of a cache

    def address(self, array: mx.array) -> int:
        """Where a small vector lies in memory, in float32."""
        self.arrays.append(np.array(array.astype(mx.float32)))
        return self.arrays[-1].ctypes.data

    def norm(self, owner: nn.Module, name: str) -> Norm:
        if name not in owner:
            return Norm()
        bias = self.address(owner[name].bias) if "bias" in owner[name] else None
        return Norm(self.address(owner[name].weight), bias)

    def linear(self, linear: nn.Module, known: tuple) -> Linear:
        other = "order" in linear or getattr(linear, "mode", "affine") != "affine"
        if type(linear) not in known or other:
            raise UserError("a linear layer of another class")
        packed = "scales" in linear
        layer = matvec.layer(*(linear[name] for name in ("weight", "scales", "biases")[:3 if packed else 1]),
                             *((linear.group_size, linear.bits) if packed else ()))
        if layer is None:
            raise UserError("a linear layer in another dtype or shape")
        self.arrays += [linear[name] for name in ("weight", "scales", "biases") if name in linear]
        return Linear(layer, self.address(linear.bias) if "bias" in linear else None)

    def own(self, layers: list, position: int):
        """Take over the keys and values of the layers, unless the last call wrote the position before this one. They
        are copied, since other arrays that MLX has yet to compute, or another cache, may read those that it has."""
        if layers is not self.layers or position != self.model.position + 1:
            for block, layer in zip(self.blocks, layers, strict=True):
                layer.keys, layer.values = (mx.array(np.asarray(array)) for array in (layer.keys, layer.values))
                block.keys, block.values = matvec.address(layer.keys), matvec.address(layer.values)
                block.room = layer.keys.shape[2]
        self.layers, self.model.position = layers, position


PLANS = weakref.WeakKeyDictionary()  # of caches: a plan, or None where cpu_decode.c does not know the model


def plan_of(model: nn.Module, cache) -> Plan | None:
    """The plan for a cache and its model, made once: a cache goes with the weights that it was first used with."""
    if cache not in PLANS:
        try:
            known = hasattr(matvec.library(), "decode") and cache.room is mx.zeros  # no decode: cpu_decode.c is missing
            PLANS[cache] = Plan(model) if known else None
        except (TypeError, ValueError, RuntimeError):  # UserError too; see matvec.address()
            PLANS[cache] = None
    return PLANS[cache]


def after_blocks(model: nn.Module, x: mx.array, position: int, cache) -> mx.array | None:
    """The residual stream x (B, 1, C) of one position after all blocks, and its keys and values in the cache. It is
    computed at once, not lazily. None where model.py must do it, with the cache as it was."""
    known = len(x) <= ROWS and x.dtype == mx.float32 and mx.default_device() == mx.cpu and not model.training
    known = known and not hasattr(cache, "starts")  # rows of different texts, see batching.py
    plan = plan_of(model, cache) if known else None
    if plan is None or position == 0 or any(layer.length != position for layer in cache.layers):
        return None
    if any(not block.window and layer.keys.shape[2] == position
           for layer, block in zip(cache.layers, plan.blocks, strict=True)):  # the cache must grow
        return None

    @mx.custom_function
    def decoded(x):
        y = np.array(x)
        plan.own(cache.layers, position)
        plan.model.rows, plan.model.threads = len(x), matvec.threads()
        if matvec.library().decode(ctypes.byref(plan.model), plan.blocks, ctypes.c_void_p(y.ctypes.data)):
            raise ValueError("no memory")
        return mx.array(y)

    @decoded.vjp
    def no_gradient(*_):
        raise NotImplementedError("cpu_decode.py has no gradient: call the model with a tap, or without a cache")

    try:
        y = decoded(x)
    except (TypeError, ValueError, RuntimeError):  # x is being traced, or there is no memory
        plan.layers = None
        return None
    for layer in cache.layers:
        layer.length += 1
    return y


if __name__ == "__main__":
    print("cpu_decode.py has no command of its own: run sample.py, which uses it", file=sys.stderr)
    sys.exit(2)
