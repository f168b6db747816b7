"""The blocks of a model on a CPU, forward and backward, for training: cpu_train.c, which matvec.py's compiler compiles.

MLX computes a block by 60 operations and more, each on one core but for large products, and each reads and writes all
of its numbers. cpu_train.c computes a block in one call, on every core, with OpenBLAS's products (blas.py). It knows
the settings in KNOWN, in float32; for all else model.py computes the block, as it does where there is no compiler or no
OpenBLAS, and in compiled functions. It also does where one of its own functions that cpu_train.c mirrors is another one
now: an experiment in model.py is what trains. Deleting this file and cpu_train.c costs speed and nothing else.
"""
import ctypes
import functools
import hashlib
import inspect
import os
import re
import sys

import blas  # before mlx
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map

import matvec
from config import UserError

KNOWN = """rotary_dim rope_scaling rope_pattern norm_bias out_bias head_bias embed_scale attn_scale residual_scale
logit_scale softcap"""
ACTIVATIONS = "relu2", "gelu", "gelu_tanh", "swiglu", "geglu"  # as in cpu_train.c
PARTS = "attn_norm", "q", "k", "v", "q_norm", "k_norm", "out", "mlp_norm", "gate", "up", "down"
IN_ATTENTION = "q", "k", "v", "q_norm", "k_norm", "out"
IN_MLP = "gate", "up", "down"
BLOCK = """Block.__call__ Block.normed Block.scaled Attention.__call__ Attention.heads Attention.turned
Attention.keys_values Attention.attended MLP.__call__ Linear.__call__ RMSNorm.__call__ LayerNorm.__call__ attend
score_mask rope rotary gelu_tanh"""  # of model.py, that cpu_train.c mirrors
LOSS = "GPT.project chunked_loss cross_entropy"
MIRRORED = {BLOCK: "1aa9500d77931f91", LOSS: "a742812d20b0de07"}  # see source_hash()
SOURCES = [os.path.join(matvec.FOLDER, name) for name in ("matvec.c", "cpu_train.c")]


class Part(ctypes.Structure):  # as in cpu_train.c, and so the others
    _fields_ = [("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p)]


class Parts(ctypes.Structure):
    _fields_ = [(name, Part) for name in PARTS]


class Shape(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int64) for name in ("batch", "length", "width", "heads", "kv_heads", "head_dim",
                                                      "hidden", "rotary")),
                *((name, ctypes.c_int) for name in ("layer_norm", "activation", "threads")),
                *((name, ctypes.c_float) for name in ("norm_eps", "attn_scale", "residual_scale")),
                *((name, ctypes.c_void_p) for name in ("cosines", "sines", "gemm"))]


@functools.cache
def library() -> ctypes.PyDLL | None:
    """cpu_train.c, compiled and loaded; None where that is not possible, or there is no OpenBLAS."""
    found = matvec.loaded(SOURCES) if blas.loaded and all(map(os.path.exists, SOURCES)) else None
    if found:
        found.saved_size.restype = ctypes.c_int64
    return found


@functools.cache
def knows(settings: tuple) -> bool:
    """Whether cpu_train.c knows a config: tuple(vars(config).values())."""
    import model as plain  # not above: it imports this file
    config = plain.GPTConfig(*settings)
    try:
        plain.check_known(config, KNOWN, "cpu_train.py")
    except UserError:
        return False
    known = config.mlp in ACTIVATIONS and config.norm_place == "before" and not config.qk_norm_width
    return known and not any(size % 8 for size in (config.n_embd, config.head_dim, config.ffn_dim))


@functools.cache
def source_hash(functions: tuple) -> str:
    """A hash of the text of functions, without comments and without the lines of variants, which end in a tag."""
    lines = [line for function in functions for line in inspect.getsource(function).splitlines()]
    lines = [line.partition("  #")[0].rstrip() for line in lines if not re.search(r"  # \w+$", line)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def functions_of(names: str) -> tuple:
    """Functions of model.py as they are at the moment, and with those of a block its activations."""
    import model as plain
    found = (functools.reduce(getattr, name.split("."), plain) for name in names.split())
    return *found, *(plain.ACTIVATIONS[name] for name in ACTIVATIONS if names == BLOCK)


def is_mirrored(names: str) -> bool:
    try:
        return source_hash(functions_of(names)) == MIRRORED[names]
    except (OSError, TypeError):  # no text is there, as of what was typed into Python
        return False


@functools.lru_cache(maxsize=8)
def cos_sin(inverse: bytes, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of the positions 0 ... length - 1: (length, R / 2). The angles are rounded as MLX's are."""
    angle = np.arange(length, dtype=np.float32)[:, None] * (1 / np.frombuffer(inverse, np.float32))
    return np.cos(angle), np.sin(angle)


def modules_of(block: nn.Module) -> dict[str, nn.Module] | None:
    """The norms and linear layers of a block, by the names of PARTS; None where one of them is of another class."""
    import model as plain
    if (type(block), type(block.attn), type(block.mlp)) != (plain.Block, plain.Attention, plain.MLP):
        return None
    owners = {name: block.attn if name in IN_ATTENTION else block.mlp if name in IN_MLP else block for name in PARTS}
    found = {name: owner[name] for name, owner in owners.items() if name in owner}
    return found if all(type(m) in (plain.Linear, plain.RMSNorm, plain.LayerNorm) for m in found.values()) else None


def parts_of(names: list[tuple[str, str]], arrays: list) -> Parts:
    """The addresses of parameters, or of their gradients. names: of a part, and weight or bias."""
    parts = Parts()
    for (name, kind), array in zip(names, arrays, strict=True):
        setattr(getattr(parts, name), kind, matvec.address(array))
    return parts


def call(function, *arguments):
    """Call a function of cpu_train.c while OpenBLAS uses one thread: its callers are threads of their own."""
    before = blas._library.openblas_get_num_threads()
    blas.threads(1)
    kinds = {ctypes.c_int64: lambda a: a, ctypes.c_float: lambda a: a, Shape: ctypes.byref, Parts: ctypes.byref}
    failed = function(*(kinds.get(type(a), lambda a: ctypes.c_void_p(matvec.address(a)))(a) for a in arguments))
    blas.threads(before)
    if failed:
        raise ValueError("no memory, or a target that is no token")


def shape_of(block: nn.Module, x: mx.array) -> Shape:
    config, cosines, sines, rotary = block.config, np.zeros(1), np.zeros(1), 0
    if "_inverse" in block.attn:
        rotary = 2 * block.attn._inverse.size
        cosines, sines = cos_sin(np.asarray(block.attn._inverse).tobytes(), x.shape[1])
    shape = Shape(
        batch=x.shape[0], length=x.shape[1], width=config.n_embd, heads=config.n_head, kv_heads=config.n_kv_head,
        head_dim=config.head_dim, hidden=config.ffn_dim, rotary=rotary, layer_norm=config.norm == "layer",
        activation=ACTIVATIONS.index(config.mlp), threads=matvec.threads(), norm_eps=config.norm_eps,
        attn_scale=config.attn_scale or config.head_dim ** -0.5, residual_scale=config.residual_scale,
        cosines=matvec.address(cosines), sines=matvec.address(sines),
        gemm=ctypes.cast(blas._library.cblas_sgemm, ctypes.c_void_p))
    shape.arrays = cosines, sines  # so that they outlive it
    return shape


def block_output(block: nn.Module, x: mx.array, offset, cache, tap, carry: dict) -> mx.array | None:
    """What a block gives in training for x (B, T, C), whose tokens are at the positions 0, 1, ... It is computed at
    once, not lazily, and so are its gradients. None where model.py must do it."""
    import model as plain
    if not block.training or mx.default_device() != mx.cpu or not x.size or not library():
        return None
    if not isinstance(offset, int) or offset or cache is not None or tap is not plain.no_tap or carry:
        return None
    modules = modules_of(block) if knows(tuple(vars(block.config).values())) and is_mirrored(BLOCK) else None
    if modules is None:
        return None
    names = [(name, kind) for name, module in modules.items() for kind in ("weight", "bias") if kind in module]
    arrays = [x, *(modules[name][kind] for name, kind in names)]
    if any(array.dtype != mx.float32 for array in arrays):
        return None
    saved = []

    @mx.custom_function
    def forward(x, *arrays):
        mx.eval(x, *arrays)  # at once: one by one they take ten times as long
        parts, y = parts_of(names, arrays), np.empty(x.shape, np.float32)
        saved[:] = np.empty(library().saved_size(ctypes.byref(shape), ctypes.byref(parts)), np.float32),
        call(library().block_forward, shape, parts, x, y, *saved)
        return mx.array(y)

    @forward.vjp
    def backward(primals, dy, _):
        (x, *arrays), dy = primals, mx.contiguous(dy)
        mx.eval(dy, *primals)
        gradients, dx = [np.empty(array.shape, np.float32) for array in arrays], np.empty(x.shape, np.float32)
        call(library().block_backward, shape, parts_of(names, arrays), parts_of(names, gradients), x, dy, *saved, dx)
        return tuple(map(mx.array, [dx, *gradients]))

    try:
        shape = shape_of(block, x)
        return forward(mx.contiguous(x), *arrays[1:])
    except (TypeError, ValueError, RuntimeError):  # x is being traced: see matvec.address()
        return None


def head_loss(model: nn.Module, x: mx.array, targets: mx.array, weights: mx.array) -> mx.array | None:
    """The sum of weights_i * cross_entropy(model.project(x_i), target_i) in training: x (N, C), the rest (N,). It is
    computed at once, and so are its gradients. None where model.py must do it."""
    import model as plain
    head, config = model.embed if model.config.tie else model.head, model.config
    if not model.training or mx.default_device() != mx.cpu or not len(x) or not library() or not is_mirrored(LOSS):
        return None
    if type(head) not in (plain.Linear, plain.Embedding) or "bias" in head or getattr(config, "softcap", 0):
        return None
    N, (V, C) = len(x), head.weight.shape
    if V % 8 or C % 8 or x.dtype != mx.float32 or head.weight.dtype != mx.float32:
        return None
    shape = Shape(batch=1, length=N, width=C, threads=matvec.threads(),
                  gemm=ctypes.cast(blas._library.cblas_sgemm, ctypes.c_void_p))
    gradients = []

    @mx.custom_function
    def loss(x, weight):
        given = [x, weight, mx.contiguous(targets.astype(mx.int32)), mx.contiguous(weights.astype(mx.float32))]
        mx.eval(given)
        total, gradients[:] = np.zeros(1), [np.empty(array.shape, np.float32) for array in (x, weight)]
        sizes = ctypes.c_int64(V), ctypes.c_float(config.logit_scale)
        call(library().head_loss, shape, *sizes, *given, total, *gradients)
        return mx.array(total[0], mx.float32)

    @loss.vjp
    def backward(primals, cotangent, _):
        scale = cotangent.item()
        return tuple(mx.array(g) if scale == 1 else scale * mx.array(g) for g in gradients)

    try:
        return loss(mx.contiguous(x), head.weight)
    except (TypeError, ValueError, RuntimeError):  # x is being traced: see matvec.address()
        return None


# ---- the optimizer ---------------------------------------------------------------------------------------------------


class Array(ctypes.Structure):  # as in cpu_train.c
    _fields_ = [*((name, ctypes.c_void_p) for name in ("gradient", "parameter", "mean", "square", "updated")),
                ("size", ctypes.c_int64)]


def arrays_of(columns: list[list]) -> ctypes.Array | None:
    """The arrays of all parameters as cpu_train.c sees them: lists of gradients, parameters, ... of equal length. None
    where one of them is not float32, or cpu_train.c cannot be used. RuntimeError where they are being traced."""
    mx.eval(columns[:4])
    if not library() or mx.default_device() != mx.cpu:
        return None
    if any(array.dtype not in (mx.float32, np.float32) or not array.size for column in columns for array in column):
        return None
    addresses = [list(map(matvec.address, column)) for column in columns]
    rows = zip(*addresses, *[[0] * len(columns[0])] * (5 - len(columns)), strict=True)
    return (Array * len(columns[0]))(*(Array(*row, array.size) for row, array in zip(rows, columns[0], strict=True)))


def clip_grad_norm(grads: dict, max_norm: float) -> tuple[dict, mx.array]:
    """mlx.optimizers.clip_grad_norm(): gradients scaled to a norm of max_norm at most, and their norm."""
    try:
        columns = [[mx.contiguous(g) for _, g in tree_flatten(grads)]]
        arrays = arrays_of(columns)
    except (TypeError, ValueError, RuntimeError):
        arrays = None
    if not arrays:
        return optim.clip_grad_norm(grads, max_norm)
    library().sum_of_squares.restype = ctypes.c_double
    norm = library().sum_of_squares(arrays, len(arrays), matvec.threads()) ** 0.5
    if norm + 1e-6 > max_norm:
        grads = tree_map(lambda g: g * (max_norm / (norm + 1e-6)), grads)
    return grads, mx.array(norm)


class AdamOnCPU(optim.Adam):
    """mlx.optimizers.Adam with bias correction. cpu_train.c computes it in one pass over all numbers, on every core. It
    writes the new means in place of the old ones."""

    def apply_gradients(self, gradients: dict, parameters: dict) -> dict:
        found = []
        tree_map(lambda *leaf: found.append(leaf), gradients, parameters, self.state)
        columns = [[mx.contiguous(g) for g, _, _ in found], [mx.contiguous(p) for _, p, _ in found],
                   *([state[name] for _, _, state in found] for name in ("m", "v")),
                   [np.empty(p.shape, np.float32) for _, p, _ in found]]
        try:
            arrays = arrays_of(columns) if found and self.bias_correction and not self._schedulers else None
        except (TypeError, ValueError, RuntimeError):
            arrays = None
        if not arrays:
            return super().apply_gradients(gradients, parameters)
        self.state["step"] = self.step + 1
        (b1, b2), step, rate = self.betas, self.step.item(), self.learning_rate.item()
        library().adam(arrays, len(arrays), *map(ctypes.c_float, (
            b1, b2, rate / (1 - b1**step), (1 - b2**step) ** -0.5, self.eps)), matvec.threads())
        updated = iter(columns[4])
        return tree_map(lambda _: mx.array(next(updated)), gradients)


Adam = AdamOnCPU if mx.default_device() == mx.cpu else optim.Adam


if __name__ == "__main__":
    print("cpu_train.py has no command of its own: run train.py, which uses it", file=sys.stderr)
    sys.exit(2)
