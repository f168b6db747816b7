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
ROWS = {mx.bfloat16: 16, mx.float16: 16, mx.float32: 4}  # of a batch; for more, matmuls are the faster ones
THREADS = 512    # of a thread block, of which each multiprocessor runs one
TYPES = {mx.bfloat16: "__nv_bfloat16", mx.float16: "__half", mx.float32: "float"}


def on_gpu() -> bool:
    return mx.default_device() == mx.gpu


@cache
def device() -> tuple[int, int]:
    """How many multiprocessors the GPU has, and the bytes of shared memory that a thread block may have. All thread
    blocks must run at once, since they wait for each other: there is one for each multiprocessor."""
    number, found, driver = ctypes.c_int(), [], ctypes.CDLL("libcuda.so.1")
    driver.cuInit(0)
    driver.cuDeviceGet(ctypes.byref(number), 0)
    for attribute in (16, 97):  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, ..._MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        value = ctypes.c_int()
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, number):
            raise OSError("no CUDA device")
        found.append(value.value)
    return tuple(found)


class Plan:
    """What gpu_decode.cu needs to know of a model, compiled for batches of B rows in a dtype."""

    def __init__(self, model: nn.Module, B: int, dtype: mx.Dtype):
        """UserError where the model is one that gpu_decode.cu does not know."""
        import model as plain  # not above: it imports this file
        config, self.dtype = model.config, dtype
        plain.check_known(config, KNOWN, "gpu_decode.py")
        H, KV, D, C, F = config.n_head, config.n_kv_head, config.head_dim, config.n_embd, config.ffn_dim
        self.shared = B * (max(C, F, H * D) + 16) * dtype.size
        self.blocks, room = device()
        room -= 64 * (2 * D + 2) + 17_000 + 320 * config.n_layer  # of other arrays in it
        if (config.mlp not in ACTIVATIONS or D % 32 or D > 256 or C % 16 or F % 16 or self.shared > room
                or config.norm_place != "before" or config.parallel or config.qk_norm_width):
            raise UserError("settings or sizes that are not known")
        self.formats = {}  # of each kind of matrix: bits and group
        blocks = [self.of_block(plain, block) for block in model.blocks]
        places = [[None if array is None else (array.shape, array.dtype) for _, _, array in block] for block in blocks]
        if any(each != places[0] for each in places):
            raise UserError("blocks that differ")
        self.weights = [together(block) for block in blocks]
        inverse = [block.attn._inverse for block in model.blocks if "_inverse" in block.attn]
        self.inverse = inverse[0] if inverse else mx.ones(1)
        self.parts = max(1, min(8, self.blocks // (B * H)))
        numbers = dict(B=B, C=C, H=H, KV=KV, D=D, F=F, P=self.parts, LAYERS=config.n_layer, THREADS=THREADS,
                       BLOCKS=self.blocks, ROTARY=2 * self.inverse.size if inverse else 0,
                       ACTIVATION=ACTIVATIONS.index(config.mlp),
                       GATED=int(config.mlp in plain.GATED), LAYER_NORM=int(config.norm == "layer"),
                       HALF=int(dtype == mx.float16))
        for name, (bits, group) in self.formats.items():
            numbers[f"BITS_{name}"], numbers[f"GROUP_{name}"] = bits, group
        floats = dict(NORM_EPS=config.norm_eps, SCALE=config.attn_scale or D**-0.5, SOFTCAP=config.attn_softcap,
                      RESIDUAL=config.residual_scale)
        turns = ", ".join(str(int("_inverse" in block.attn)) for block in model.blocks)
        offsets = ", ".join(map(str, offsets_of(blocks[0])))
        self.header = "".join([
            "#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n",
            f"using T = {TYPES[dtype]};\n",
            *(f"constexpr int {name} = {value};\n" for name, value in numbers.items()),
            *(f"constexpr float {name} = {value!r}f;\n" for name, value in floats.items()),
            f"__device__ const bool TURNS[] = {{{turns}}};\n",
            f"__device__ const long long OFFSETS[] = {{{offsets}}};\n",
            (Path(__file__).parent / "gpu_decode.cu").read_text(encoding="utf-8")])
        self.size = B * (C + 2 * (H + KV) * D + F) + self.parts * B * H * (D + 2) + 4  # floats between the steps
        self.layers, self.position, self.starts, self.kernels = None, -1, [], {}  # of a cache

    def of_block(self, plain, block: nn.Module) -> list[tuple]:
        """A block's arrays in the order of `struct Layer`, without the cache: (owner, name, array); the array is None
        where there is none."""
        attn, mlp = block.attn, block.mlp
        if (type(block), type(attn), type(mlp)) != (plain.Block, plain.Attention, plain.MLP):
            raise UserError("a block of another class")
        parts = [(block, "attn_norm"), (block, "mlp_norm"), (attn, "q_norm"), (attn, "k_norm"),
                 *((attn, name) for name in ("q", "k", "v", "out")), *((mlp, name) for name in ("gate", "up", "down"))]
        found = []
        for owner, part in parts:
            names = ("weight", "bias") if part.endswith("norm") else ("weight", "scales", "biases", "bias")
            here = owner[part] if part in owner else {}
            if here and not part.endswith("norm"):
                self.check_format(part, here, (plain.Linear, nn.QuantizedLinear))
            found += [(here, name, here[name] if name in here else None) for name in names]
        if any(array is not None and array.dtype not in (self.dtype, mx.uint32) for _, _, array in found):
            raise UserError("weights of another dtype than the activations")
        return found

    def check_format(self, name: str, linear: nn.Module, known: tuple):
        packed = "scales" in linear
        other = "order" in linear or getattr(linear, "mode", "affine") != "affine"
        kind = (linear.bits, linear.group_size) if packed else (32 if self.dtype == mx.float32 else 16, 1)
        if type(linear) not in known or other or kind[0] not in (4, 8, 16, 32):
            raise UserError("a linear layer of another class")
        kinds = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "up"}  # those that are computed together
        if self.formats.setdefault(kinds.get(name, name), kind) != kind:
            raise UserError("layers of different formats")

    def left_at(self, layers: list, position: int, starts: list[int]) -> bool:
        """Whether the cache is as the last call has left it. Other code that changes keys and values also changes the
        position, or makes a new list of layers."""
        return layers is self.layers and position == self.position + 1 and starts == self.starts

    def own(self, layers: list, position: int, starts: list[int]):
        """Take over the keys and values of the layers, unless the last call wrote the position before this one. They
        are copied, since other arrays that MLX has yet to compute, or another cache, may read those that it has."""
        if not self.left_at(layers, position, starts):
            self.caches = [mx.stack([layer.keys, layer.values]) for layer in layers]
            # How many thread blocks have arrived, the position, and where the rows' texts begin. In a large array that
            # the GPU has made, as MLX has others on the host, where this kernel would be a hundred times as slow.
            self.state = mx.concatenate([mx.array([0, position, *starts], mx.uint32), mx.zeros(4096, mx.uint32)])
            mx.eval(self.state, self.caches)
            for layer, both in zip(layers, self.caches, strict=True):  # parts of it, no copies, which both[0] would be
                layer.keys, layer.values = (part.reshape(both.shape[1:]) for part in mx.split(both, 2))
            mx.eval([[layer.keys, layer.values] for layer in layers])
        self.layers, self.position, self.starts = layers, position, starts

    def kernel(self, room: int):
        """The kernel for a cache with room for so many positions, whose arguments are all arrays, one after another."""
        if room not in self.kernels:
            n = len(self.weights)
            source = "\n".join([
                "__shared__ Layer layers[LAYERS];",
                f"const void* weights[] = {{{', '.join(f'w{i}' for i in range(n))}}};",
                f"const T* caches[] = {{{', '.join(f'c{i}' for i in range(n))}}};",
                "if (threadIdx.x == 0)",
                "  for (int l = 0; l < LAYERS; l++) find(layers[l], weights[l], caches[l]);",
                "__syncthreads();",
                "decode(layers, x, inverse, (unsigned*)state, buffer, y);"])
            header = f"constexpr int ROOM = {room};\n" + self.header
            name = "decode_" + hashlib.sha256((header + source).encode()).hexdigest()[:16]
            # The declaration bounds the registers of the kernel, which MLX defines without bounds.
            kinds = ["T", "float", "uint32_t", *["uint32_t"] * n, *["T"] * n]
            header += (f"namespace mlx::core::cu {{ __global__ void __launch_bounds__(THREADS, 1) custom_kernel_{name}("
                       f"{', '.join(f'const {kind}*' for kind in kinds)}, T*, float*); }}\n")
            names = ["x", "inverse", "state", *(f"w{i}" for i in range(n)), *(f"c{i}" for i in range(n))]
            self.kernels[room] = mx.fast.cuda_kernel(name, names, ["y", "buffer"], source, header,
                                                     shared_memory=self.shared)
        return self.kernels[room]

    def __call__(self, x: mx.array, position: int, layers: list, starts: list[int]) -> mx.array:
        self.own(layers, position, starts)
        y, _ = self.kernel(layers[0].keys.shape[2])(
            inputs=[x, self.inverse, self.state, *self.weights, *self.caches],
            grid=(self.blocks * THREADS, 1, 1), threadgroup=(THREADS, 1, 1),
            output_shapes=[x.shape, (self.size,)], output_dtypes=[x.dtype, mx.float32])
        mx.async_eval(y)  # at once: MLX does not know that keys and values change, but runs later work after this
        return y


def offsets_of(block: list[tuple]) -> list[int]:
    """Where the arrays of a block begin in together(block), in bytes, each at a multiple of 16; -1: there is none."""
    found, end = [], 0
    for _, _, array in block:
        found.append(-1 if array is None else end)
        end += 0 if array is None else -(-array.nbytes // 16) * 16
    return found


def together(block: list[tuple]) -> mx.array:
    """The arrays of a block in one buffer of words, of which they become parts: a kernel that is given 30 arrays for
    each block would take longer to start than to run. A buffer that a plan still holds is found again."""
    arrays = [array for _, _, array in block if array is not None]
    buffer, *parts = (found() for found in getattr(block[0][0], "_together", [lambda: None]))
    if buffer is not None and len(parts) == len(arrays) and all(a is b for a, b in zip(parts, arrays, strict=True)):
        return buffer
    words = []
    for array in arrays:
        flat = array.reshape(-1).view(mx.uint32) if array.nbytes % 4 == 0 else None
        if flat is None:
            raise UserError("an array of an odd number of halves")
        words += [flat, mx.zeros(-flat.size % 4, mx.uint32)]
    buffer, at = mx.concatenate(words), 0
    parts = []
    for array in arrays:
        n = array.nbytes // 4
        parts.append(buffer[at:at + n].view(array.dtype).reshape(array.shape))
        at += n + -n % 4
    mx.eval(buffer, parts)
    left = iter(parts)
    for owner, name, array in block:
        if array is not None:
            owner[name] = next(left)
    block[0][0]._together = [*map(weakref.ref, (buffer, *parts))]  # "_": not a parameter
    return buffer


PLANS = weakref.WeakKeyDictionary()  # of caches: a plan, or None where gpu_decode.cu does not know the model


def plan_of(model: nn.Module, cache, x: mx.array) -> Plan | None:
    """The plan for a cache and its model, made once: a cache goes with the weights that it was first used with."""
    if cache not in PLANS:
        try:
            PLANS[cache] = Plan(model, len(x), x.dtype) if cache.room is mx.zeros else None
        except (UserError, OSError, TypeError):
            PLANS[cache] = None
    return PLANS[cache]


def after_blocks(model: nn.Module, x: mx.array, position: int, cache) -> mx.array | None:
    """The residual stream x (B, 1, C) of one position after all blocks, and its keys and values in the cache. None
    where model.py must do it, with the cache as it was. A cache may have `starts`, the positions in it at which the
    texts of its rows begin: see batching.py."""
    known = len(x) <= ROWS.get(x.dtype, 0) and position > 0 and on_gpu() and not model.training
    plan = plan_of(model, cache, x) if known else None
    if plan is None or any(layer.length != position for layer in cache.layers):
        return None
    starts = getattr(cache, "starts", None) or [0] * len(x)
    here = plan.left_at(cache.layers, position, starts)
    if not here and any(layer.keys.shape[0] != len(x) or layer.keys.dtype != x.dtype for layer in cache.layers):
        return None
    if cache.layers[0].keys.shape[2] == position:  # the cache must grow
        return None
    try:
        y = plan(x, position, cache.layers, starts)
    except ValueError:  # x is being traced
        plan.layers = None
        return None
    except RuntimeError:  # this GPU cannot run it
        PLANS[cache] = None
        return None
    for layer in cache.layers:
        layer.length += 1
    return y


if __name__ == "__main__":
    print("gpu_decode.py has no command of its own: run sample.py, which uses it", file=sys.stderr)
    sys.exit(2)
