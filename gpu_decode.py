"""One position through the blocks of a model on an NVIDIA GPU, for writing: gpu_decode.cu, which MLX compiles.

MLX starts a kernel for each operation, some 20 a block, and each start takes about 10 microseconds. For one position of
a small model that is ten times what it takes to read the weights. gpu_decode.cu computes all blocks in one kernel. It
knows the settings in KNOWN, in bfloat16, float16 and float32, also with layers packed to 4 or 8 bits, and batches of
up to ROWS; for all else model.py computes the blocks. The keys and values are those of model.py's cache, written in
place. Deleting this file and gpu_decode.cu costs speed and nothing else.
"""
import ctypes
import hashlib
import sys
import weakref
from functools import cache
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from config import UserError

KNOWN = """rotary_dim rope_scaling rope_pattern norm_bias out_bias head_bias embed_scale attn_scale residual_scale
logit_scale softcap attn_softcap"""
ACTIVATIONS = "relu2", "gelu", "gelu_tanh", "swiglu", "geglu"  # as in gpu_decode.cu
ROWS = 16        # of a batch; for more, matmuls are the faster ones
THREADS = 512    # of a thread block, of which each multiprocessor runs one
SHARED = 96_000  # bytes of shared memory that a thread block may need, which all cards since 2020 have
NORMS = "attn_norm", "mlp_norm", "q_norm", "k_norm"
LINEARS = "q", "k", "v", "out", "gate", "up", "down"
TYPES = {mx.bfloat16: "__nv_bfloat16", mx.float16: "__half", mx.float32: "float"}


@cache
def multiprocessors() -> int:
    """How many multiprocessors the GPU has. All thread blocks must run at once, since they wait for each other."""
    found, driver = ctypes.c_int(), ctypes.CDLL("libcuda.so.1")
    driver.cuInit(0)
    device = ctypes.c_int()
    if driver.cuDeviceGet(ctypes.byref(device), 0) or driver.cuDeviceGetAttribute(ctypes.byref(found), 16, device):
        raise OSError("no CUDA device")
    return found.value


class Plan:
    """What gpu_decode.cu needs to know of a model, compiled for batches of B rows in a dtype."""

    def __init__(self, model: nn.Module, B: int, dtype: mx.Dtype):
        """UserError where the model is one that gpu_decode.cu does not know."""
        import model as plain  # not above: it imports this file
        config, self.dtype = model.config, dtype
        plain.check_known(config, KNOWN, "gpu_decode.py")
        H, KV, D, C, F = config.n_head, config.n_kv_head, config.head_dim, config.n_embd, config.ffn_dim
        widest = max(C, F, H * D)
        self.shared = B * widest * dtype.size
        if (config.mlp not in ACTIVATIONS or D % 32 or D > 256 or C % 8 or F % 8 or self.shared > SHARED
                or config.norm_place != "before" or config.parallel or config.qk_norm_width):
            raise UserError("settings or sizes that are not known")
        self.formats = {}  # of each kind of matrix: bits and group
        self.weights = [self.of_block(plain, block) for block in model.blocks]
        inverse = [block.attn._inverse for block in model.blocks if "_inverse" in block.attn]
        self.inverse = inverse[0] if inverse else mx.ones(1)
        self.blocks = multiprocessors()
        self.parts = max(1, min(8, self.blocks // (B * H)))
        numbers = dict(B=B, C=C, H=H, KV=KV, D=D, F=F, P=self.parts, LAYERS=config.n_layer, THREADS=THREADS,
                       ROTARY=2 * self.inverse.size if inverse else 0, ACTIVATION=ACTIVATIONS.index(config.mlp),
                       LAYER_NORM=int(config.norm == "layer"))
        for name in LINEARS:
            numbers[f"BITS_{name}"], numbers[f"GROUP_{name}"] = self.formats.get(name, (16, 1))
        floats = dict(NORM_EPS=config.norm_eps, SCALE=config.attn_scale or D**-0.5, SOFTCAP=config.attn_softcap,
                      RESIDUAL=config.residual_scale)
        turns = ", ".join(str(int("_inverse" in block.attn)) for block in model.blocks)
        self.header = "".join([
            "#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n",
            f"using T = {TYPES[dtype]};\n",
            *(f"constexpr int {name} = {value};\n" for name, value in numbers.items()),
            *(f"constexpr float {name} = {value!r}f;\n" for name, value in floats.items()),
            f"__device__ const bool TURNS[] = {{{turns}}};\n",
            "constexpr int ROOM = ROOM_OF_CACHE;\n",
            (Path(__file__).parent / "gpu_decode.cu").read_text(encoding="utf-8")])
        self.size = B * (C + (H + 2 * KV) * D + F) + self.parts * B * H * (D + 2)  # floats between the steps
        self.arrived = mx.zeros(1, mx.uint32)
        self.layers, self.position, self.kernels = None, -1, {}  # of a cache
        mx.eval(self.arrived)

    def of_block(self, plain, block: nn.Module) -> list[mx.array | None]:
        """A block's arrays in the order of `struct Layer`, without the cache."""
        attn, mlp = block.attn, block.mlp
        if (type(block), type(attn), type(mlp)) != (plain.Block, plain.Attention, plain.MLP):
            raise UserError("a block of another class")
        found = []
        for name in NORMS:
            owner = attn if name in ("q_norm", "k_norm") else block
            found += [owner[name].weight if name in owner else None,
                      *([owner[name].bias if "bias" in owner[name] else None] if owner is block else [])]
        for name in LINEARS:
            owner = attn if name in ("q", "k", "v", "out") else mlp
            found += self.matrix(name, owner[name], (plain.Linear, nn.QuantizedLinear)) if name in owner else [None] * 4
        if any(array is not None and array.dtype not in (self.dtype, mx.uint32) for array in found):
            raise UserError("weights of another dtype than the activations")
        return found

    def matrix(self, name: str, linear: nn.Module, known: tuple) -> list[mx.array | None]:
        packed = "scales" in linear
        other = "order" in linear or getattr(linear, "mode", "affine") != "affine"
        kind = (linear.bits, linear.group_size) if packed else (32 if self.dtype == mx.float32 else 16, 1)
        if type(linear) not in known or other or kind[0] not in (4, 8, 16, 32):
            raise UserError("a linear layer of another class")
        if self.formats.setdefault(name, kind) != kind:
            raise UserError("layers of different formats")
        return [linear.weight, *(linear[part] if part in linear else None for part in ("scales", "biases", "bias"))]

    def own(self, layers: list, position: int):
        """Take over the keys and values of the layers, unless the last call wrote the position before this one. They
        are copied, since other arrays that MLX has yet to compute, or another cache, may read those that it has."""
        if layers is not self.layers or position != self.position + 1:
            for layer in layers:
                layer.keys, layer.values = layer.keys + 0, layer.values + 0
            mx.eval([[layer.keys, layer.values] for layer in layers])
        self.layers, self.position = layers, position

    def kernel(self, room: int):
        """The kernel for a cache with room for so many positions, whose arguments are all arrays, one after another."""
        if room not in self.kernels:
            names, rows = [], []
            for i, arrays in enumerate(self.weights):
                fields = [f"w{i}_{j}" if array is not None else "nullptr" for j, array in enumerate(arrays)]
                norms, matrices = fields[:6], fields[6:]
                matrices = [f"{{{', '.join(matrices[j:j + 4])}}}" for j in range(0, len(matrices), 4)]
                rows.append(f"layers[{i}] = {{{', '.join([*norms, *matrices])}, (T*)k{i}, (T*)v{i}}};")
                names += [*(field for field in fields if field != "nullptr"), f"k{i}", f"v{i}"]
            source = "\n".join([
                "__shared__ Layer layers[LAYERS];", "if (threadIdx.x == 0) {", *rows, "}", "__syncthreads();",
                "decode(layers, x, position[0], inverse, (unsigned*)arrived, buffer, y);"])
            header = self.header.replace("ROOM_OF_CACHE", str(room))
            name = "decode_" + hashlib.sha256((header + source).encode()).hexdigest()[:16]
            self.kernels[room] = mx.fast.cuda_kernel(
                name, ["x", "position", "inverse", "arrived", *names], ["y", "buffer"], source, header,
                shared_memory=self.shared)
        return self.kernels[room]

    def __call__(self, x: mx.array, position: int, layers: list) -> mx.array:
        self.own(layers, position)
        arrays = [x, mx.array([position], mx.int32), self.inverse, self.arrived]
        for weights, layer in zip(self.weights, layers, strict=True):
            arrays += [*(array for array in weights if array is not None), layer.keys, layer.values]
        y, _ = self.kernel(layers[0].keys.shape[2])(
            inputs=arrays, grid=(self.blocks * THREADS, 1, 1), threadgroup=(THREADS, 1, 1),
            output_shapes=[x.shape, (self.size,)], output_dtypes=[x.dtype, mx.float32])
        mx.async_eval(y)  # at once: MLX does not know that it writes keys and values, but runs what is begun later after it
        return y


PLANS = weakref.WeakKeyDictionary()  # of caches: a plan, or None where gpu_decode.cu does not know the model


def plan_of(model: nn.Module, cache, x: mx.array) -> Plan | None:
    """The plan for a cache and its model, made once: a cache goes with the weights that it was first used with."""
    if cache not in PLANS:
        try:
            PLANS[cache] = Plan(model, len(x), x.dtype) if cache.room is mx.zeros and x.dtype in TYPES else None
        except (UserError, OSError, TypeError):
            PLANS[cache] = None
    return PLANS[cache]


def after_blocks(model: nn.Module, x: mx.array, position: int, cache) -> mx.array | None:
    """The residual stream x (B, 1, C) of one position after all blocks, and its keys and values in the cache. None where
    model.py must do it, with the cache as it was."""
    known = len(x) <= ROWS and position > 0 and mx.default_device() == mx.gpu and not model.training
    plan = plan_of(model, cache, x) if known else None
    if plan is None or any(layer.length != position or layer.keys.shape[2] == position or
                           layer.keys.shape[0] != len(x) or layer.keys.dtype != x.dtype for layer in cache.layers):
        return None
    try:
        y = plan(x, position, cache.layers)
    except (ValueError, RuntimeError):  # x is being traced
        plan.layers = None
        return None
    for layer in cache.layers:
        layer.length += 1
    return y


if __name__ == "__main__":
    print("gpu_decode.py has no command of its own: run sample.py, which uses it", file=sys.stderr)
    sys.exit(2)
