"""The logits of one position on an NVIDIA GPU, for writing: gpu_decode.cu.

MLX starts a kernel for each operation, some 20 a block, and each start takes about 10 microseconds. For one position of
a small model that is ten times what it takes to read the weights. gpu_decode.cu computes all of them in one kernel. It
knows the settings in KNOWN, in bfloat16, float16 and float32, also with layers packed to 4 or 8 bits, and batches of
up to ROWS; for all else model.py computes. The keys and values are those of model.py's cache, written in place.
Deleting this file and gpu_decode.cu costs speed and nothing else.
"""
import sys
import weakref

import mlx.core as mx
import mlx.nn as nn

import gpu_kernels
from config import UserError

KNOWN = """rotary_dim rope_scaling rope_pattern norm_bias out_bias head_bias embed_scale attn_scale residual_scale
logit_scale softcap attn_softcap"""
ACTIVATIONS = "relu2", "gelu", "gelu_tanh", "swiglu", "geglu"  # as in gpu_decode.cu
ROWS = {mx.bfloat16: 16, mx.float16: 16, mx.float32: 4}  # of a batch; for more, matmuls are the faster ones
THREADS = 512    # of a thread block, of which each multiprocessor runs one


def on_gpu() -> bool:
    return mx.default_device() == mx.gpu


class Plan:
    """What gpu_decode.cu needs to know of a model, compiled for batches of B rows."""

    def __init__(self, model: nn.Module, B: int):
        """UserError where the model is one that gpu_decode.cu does not know."""
        import model as plain  # not above: it imports this file
        config, self.dtype = model.config, model.norm.weight.dtype
        plain.check_known(config, KNOWN, "gpu_decode.py")
        H, KV, D, C, F = config.n_head, config.n_kv_head, config.head_dim, config.n_embd, config.ffn_dim
        self.shared = B * (max(C, F, H * D) + 32) * self.dtype.size
        self.blocks, room, _ = gpu_kernels.device()
        room -= 64 * (2 * D + 2) + 17_000 + 320 * config.n_layer  # of other arrays in it
        if (B > ROWS.get(self.dtype, 0) or model.compute_dtype not in (None, self.dtype)
                or config.mlp not in ACTIVATIONS or D % 32 or D > 256 or C % 32 or F % 32 or self.shared > room
                or config.norm_place != "before" or config.parallel or config.qk_norm_width):
            raise UserError("settings or sizes that are not known")
        self.formats = {}  # of each kind of matrix: bits and group
        blocks, ends = [self.of_block(plain, block) for block in model.blocks], self.of_ends(plain, model)
        places = [[None if array is None else (array.shape, array.dtype) for _, _, array in block] for block in blocks]
        if any(each != places[0] for each in places):
            raise UserError("blocks that differ")
        self.weights = [*map(together, [*blocks, ends])]
        inverse = [block.attn._inverse for block in model.blocks if "_inverse" in block.attn]
        self.inverse = inverse[0] if inverse else mx.ones(1)
        self.parts = max(1, min(8, self.blocks // (B * H)))
        numbers = dict(B=B, C=C, H=H, KV=KV, D=D, F=F, V=config.vocab_size, P=self.parts, LAYERS=config.n_layer,
                       THREADS=THREADS, BLOCKS=self.blocks, ROTARY=2 * self.inverse.size if inverse else 0,
                       ACTIVATION=ACTIVATIONS.index(config.mlp),
                       GATED=config.mlp in plain.GATED, LAYER_NORM=config.norm == "layer",
                       HALF=self.dtype == mx.float16, TURNS=tuple("_inverse" in block.attn for block in model.blocks))
        for name, (bits, group) in self.formats.items():
            numbers[f"BITS_{name}"], numbers[f"GROUP_{name}"] = bits, group
        floats = dict(NORM_EPS=config.norm_eps, SCALE=config.attn_scale or D**-0.5, ATTN_SOFTCAP=config.attn_softcap,
                      RESIDUAL=config.residual_scale, EMBED_SCALE=config.embed_scale, LOGIT_SCALE=config.logit_scale,
                      SOFTCAP=config.softcap)
        offsets = "".join(f"__device__ const long long {name}[] = {{{', '.join(map(str, offsets_of(arrays)))}}};\n"
                          for name, arrays in (("OFFSETS", blocks[0]), ("OFFSETS_OF_ENDS", ends)))
        floats = {name: float(value) for name, value in floats.items()}
        self.code = gpu_kernels.compiled(gpu_kernels.definitions(T=self.dtype, **numbers, **floats) + offsets
                                         + gpu_kernels.source_of("gpu_decode.cu") + function(config.n_layer))
        self.size = B * (C + 2 * (H + KV) * D + F) + self.parts * B * H * (D + 2) + 4  # floats between the steps
        self.shape = B, 1, config.vocab_size
        self.layers, self.position, self.starts = None, -1, []  # of a cache

    def of_block(self, plain, block: nn.Module) -> list[tuple]:
        """A block's arrays in the order of `struct Layer`, without the cache, as arrays_of() gives them."""
        attn, mlp = block.attn, block.mlp
        if (type(block), type(attn), type(mlp)) != (plain.Block, plain.Attention, plain.MLP):
            raise UserError("a block of another class")
        parts = [(block, "attn_norm"), (block, "mlp_norm"), (attn, "q_norm"), (attn, "k_norm"),
                 *((attn, name) for name in ("q", "k", "v", "out")), *((mlp, name) for name in ("gate", "up", "down"))]
        return self.arrays_of(parts, (plain.Linear, nn.QuantizedLinear))

    def of_ends(self, plain, model: nn.Module) -> list[tuple]:
        """What comes before and after the blocks, in the order of `struct Ends`."""
        if type(model) is not plain.GPT:
            raise UserError("a model of another class")
        parts = [(model, "norm"), (model, "pos_embed"), (model, "embed")]
        found = self.arrays_of(parts, (plain.Embedding, nn.QuantizedEmbedding))
        self.formats.setdefault("pos_embed", (16, 1))  # where there is none
        if model.config.tie:
            self.formats["head"] = self.formats["embed"]
            return [*found, *found[-4:]]
        return found + self.arrays_of([(model, "head")], (plain.Linear, nn.QuantizedLinear))

    def arrays_of(self, parts: list[tuple], known: tuple) -> list[tuple]:
        """The arrays of layers, each (owner, name): (layer, name, array) in a fixed order; the array is None where
        there is none. known: the classes that linear layers and embeddings may have."""
        found = []
        for owner, part in parts:
            names = ("weight", "scales", "biases", "bias")
            names = ("weight", "bias") if part.endswith("norm") else names
            here = owner[part] if part in owner else {}
            if here and not part.endswith("norm"):
                self.check_format(part, here, known)
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
            # How many thread blocks have arrived, the position, the room, and where the rows' texts begin. In a large
            # array that the GPU has made, as MLX has others on the host, where this kernel would be a hundred times as
            # slow.
            numbers = mx.array([0, position, layers[0].keys.shape[2], *starts], mx.uint32)
            self.state = mx.concatenate([numbers, mx.zeros(4096, mx.uint32)])
            mx.eval(self.state, self.caches)
            for layer, both in zip(layers, self.caches, strict=True):  # parts of it, no copies, which both[0] would be
                layer.keys, layer.values = (part.reshape(both.shape[1:]) for part in mx.split(both, 2))
            mx.eval([[layer.keys, layer.values] for layer in layers])
        self.layers, self.position, self.starts = layers, position, starts

    def __call__(self, idx: mx.array, position: int, layers: list, starts: list[int]) -> mx.array:
        self.own(layers, position, starts)
        inputs = [idx.astype(mx.uint32), self.inverse, self.state, *self.weights, *self.caches]
        outputs = (self.shape, self.dtype), ((self.size,), mx.float32)
        y, _ = gpu_kernels.run("one_position", self.code, inputs, outputs, self.blocks, THREADS, shared=self.shared)
        mx.async_eval(y)  # at once: MLX does not know that keys and values change, but runs later work after this
        return y


def function(n: int) -> str:
    """The kernel of a model of n blocks, whose arguments are all arrays, one after another."""
    weights, caches = (", ".join(f"{kind} {name}{i}" for i in range(many))
                       for kind, name, many in (("const unsigned*", "w", n + 1), ("T*", "c", n)))
    return "\n".join([
        'extern "C" __global__ void __launch_bounds__(THREADS, 1)',
        f"one_position(const unsigned* ids, const float* inverse, unsigned* state, {weights}, {caches}, T* y, "
        "float* buffer) {",
        "__shared__ Layer layers[LAYERS];",
        "__shared__ Ends ends;",
        "int warp = threadIdx.x / 32;",
        *(f"if (warp == {i} % WARPS) find((const void**)&layers[{i}], w{i}, OFFSETS, sizeof(OFFSETS) / 8);"
          for i in range(n)),
        *(f"if (threadIdx.x == {i} % THREADS) layers[{i}].keys = c{i}, "
          f"layers[{i}].values = c{i} + (size_t)B * KV * D * __ldcg(state + 2);" for i in range(n)),
        f"if (warp == 0) find((const void**)&ends, w{n}, OFFSETS_OF_ENDS, sizeof(OFFSETS_OF_ENDS) / 8);",
        "__syncthreads();",
        "decode(layers, ends, ids, inverse, state, buffer, y);", "}", ""])


def offsets_of(block: list[tuple]) -> list[int]:
    """Where the arrays of a block begin in together(block), in bytes, each at a multiple of 16; -1: there is none. An
    array that comes twice, the embedding that is also the head, is there once."""
    found, end = {}, 0
    for owner, name, array in block:
        if array is not None and (id(owner), name) not in found:
            found[id(owner), name] = end
            end += -(-array.nbytes // 16) * 16
    return [found.get((id(owner), name), -1) for owner, name, _ in block]


def together(block: list[tuple]) -> mx.array:
    """The arrays of a block in one buffer of words, of which they become parts: a kernel that is given 30 arrays for
    each block would take longer to start than to run. A buffer that a plan still holds is found again."""
    block = list({(id(owner), name): (owner, name, array) for owner, name, array in block
                  if array is not None}.values())
    arrays = [array for _, _, array in block]
    buffer, *parts = (found() for found in getattr(block[0][0], "_together", [lambda: None]))
    if buffer is not None and len(parts) == len(arrays) and all(a is b for a, b in zip(parts, arrays, strict=True)):
        return buffer
    words = []
    for array in arrays:
        flat = array.reshape(-1)
        flat = mx.concatenate([flat, mx.zeros(-array.nbytes % 16 // array.itemsize, array.dtype)])
        words.append(flat.view(mx.uint32))
    buffer, at = mx.concatenate(words), 0
    parts = []
    for array in arrays:
        n = -(-array.nbytes // 16) * 4
        parts.append(buffer[at:at + n].view(array.dtype)[:array.size].reshape(array.shape))
        at += n
    mx.eval(buffer, parts)
    left = iter(parts)
    for owner, name, _ in block:
        owner[name] = next(left)
    block[0][0]._together = [*map(weakref.ref, (buffer, *parts))]  # "_": not a parameter
    return buffer


PLANS = weakref.WeakKeyDictionary()  # of caches: a plan, or None where gpu_decode.cu does not know the model


def plan_of(model: nn.Module, cache, B: int) -> Plan | None:
    """The plan for a cache and its model, made once: a cache goes with the weights that it was first used with."""
    if cache not in PLANS:
        try:
            PLANS[cache] = Plan(model, B) if cache.room is mx.zeros else None
        except (UserError, OSError, TypeError):
            PLANS[cache] = None
    return PLANS[cache]


def logits(model: nn.Module, idx: mx.array, cache, places: mx.array | None = None) -> mx.array | None:
    """The logits (B, 1, V) of tokens idx (B, 1) that follow those of the cache. None where model.py must compute them,
    with the cache as it was. A cache may have `starts`, the positions in it at which the texts of its rows begin, and
    `column`, the position for this token: see batching.py."""
    if model.training or not on_gpu() or places is not None and not hasattr(cache, "column"):
        return None
    if (plan := plan_of(model, cache, len(idx))) is None:
        return None
    layers, position = cache.layers, getattr(cache, "column", cache.offset)
    starts = getattr(cache, "starts", None) or [0] * len(idx)
    if (position == 0 or plan.shape[0] != len(idx) or any(layer.length != position for layer in layers)
            or model.config.pos == "learned" and position - min(starts) >= model.config.block_size
            or layers[0].keys.shape[2] == position):  # the cache must grow
        return None
    if not plan.left_at(layers, position, starts) and any(
            layer.keys.shape[0] != len(idx) or layer.keys.dtype != plan.dtype for layer in layers):
        return None
    try:
        y = plan(idx, position, layers, starts)
    except ValueError:  # idx is being traced
        plan.layers = None
        return None
    except RuntimeError:  # this GPU cannot run it
        PLANS[cache] = None
        return None
    cache.offset += 1
    for layer in layers:
        layer.length += 1
    return y


if __name__ == "__main__":
    print("gpu_decode.py has no command of its own: run sample.py, which uses it", file=sys.stderr)
    sys.exit(2)
