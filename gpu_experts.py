"""A mixture of experts on an NVIDIA GPU, forward and backward: gpu_experts.cu.

In model.py the (token, expert) pairs are sorted into blocks, copied, multiplied block by block, and copied back. MLX's
kernels for that run at a third of a matmul's speed. Here each product takes the rows where they are: it reads tokens by
their numbers, knows where each expert's rows begin, and computes the activation or its slope before it writes. It knows
MLPs of the kinds in ACTIVATIONS without biases, in bfloat16 and float16; for all else model.py computes. Before its
first use it is tried on random tokens, and where the GPU does not compute what float32 gives, model.py computes, too.
On an H100 or H200 gpu_experts_hopper.cu computes the products, with the tensor cores' larger instructions.
Deleting this file, gpu_experts.cu and gpu_experts_hopper.cu, or the last one alone, costs speed and nothing else.
"""
import math
import sys
from functools import cache, lru_cache

import mlx.core as mx
import mlx.nn as nn

import gpu_kernels

ACTIVATIONS = {"relu2": 0, "gelu": 1, "gelu_tanh": 2, "swiglu": 3, "geglu": 2}  # as in gpu_experts.cu
GATED = "swiglu", "geglu"
TILES = (128, 256, 64), (128, 128, 64)  # rows and columns of a tile, and the step of its sum: the first that fits
ALIGNED = 1024   # shared memory for the first stage to begin at a multiple of so many bytes, as wgmma wants
TRIED = 2048     # tokens with which the kernels are tried
LARGEST = 2**27  # weights of a kind with which they are; a trial with more would take gigabytes
SOURCES = {  # of each kernel: inputs, outputs, and the call
    "route": ("logits balance size", "gates chosen counts",
              "route<0>(logits, balance, size[0], gates, chosen, counts);"),
    "route_backward": ("logits chosen count dgates size", "dlogits",
                       "route_backward<0>(logits, chosen, count, dgates, size[0], dlogits);"),
    "sort": ("chosen size", "pair row begin", "sort<0>(chosen, size[0], pair, row, begin);"),
    "up": ("x weight pair begin", "h hidden", "products<false, false>(Up{{x, weight, pair, begin}, h, hidden});"),
    "down": ("x weight begin", "y", "products<false, false>(Plain<HID, false>{{x, weight, nullptr, begin}, y});"),
    "sum": ("rows row gates begin", "y", "sum_of_rows<0>(rows, row, gates, begin, y);"),
    "down_backward": ("dy weight pair begin h gates", "dh weighed parts",
                      "products<false, true>(DownBackward{{dy, weight, pair, begin}, h, gates, dh, weighed, parts});"),
    "up_backward": ("dh weight begin", "dx",
                    "products<false, true>(Plain<F, true>{{dh, weight, nullptr, begin}, dx});"),
    "weights": ("x dy dh weighed pair begin", "down up",
                "products<true, true>(Weights{x, dy, dh, weighed, pair, begin, down, up});"),
    "sum_backward": ("rows row begin", "dx", "sum_of_rows<0>(rows, row, nullptr, begin, dx);"),
    "gates": ("parts row begin", "dgates", "sum_of_parts<0>(parts, row, begin, dgates);"),
}
THREADS = {"sort": 1024} | dict.fromkeys(("sum", "sum_backward", "gates", "route", "route_backward"), 256)


def on_gpu() -> bool:
    return mx.default_device() == mx.gpu and mx.cuda.is_available()


def fits(tile: tuple[int, int, int]) -> bool:
    """Whether shared memory has room for three steps of both operands: one is computed, and two are on their way."""
    BM, BN, BK = tile
    return gpu_kernels.device()[1] >= 3 * (BM + BN) * BK * 2 + ALIGNED


def on_hopper() -> bool:
    """Whether gpu_experts_hopper.cu computes the products, which only GPUs of one generation can run (H100, H200)."""
    return gpu_kernels.device()[2] == 9 and (gpu_kernels.FOLDER / "gpu_experts_hopper.cu").exists()


@lru_cache(maxsize=64)
def kernel(name: str, dtype: mx.Dtype, mlp: str, E: int, K: int, C: int, HID: int, switch: float = 0.0,
           z_loss: float = 0.0):
    """A function (inputs, thread blocks or 0, output shapes, output dtypes) -> outputs. 0: as many blocks as there are
    multiprocessors, which take tile after tile."""
    inputs, outputs, call = SOURCES[name]
    blocks, room, _ = gpu_kernels.device()
    BM, BN, BK = next(filter(fits, TILES))
    stages = min(4, (room - ALIGNED) // ((BM + BN) * BK * 2))
    constants = dict(T=dtype, E=E, K=K, C=C, HID=HID, GATED=mlp in GATED, ACTIVATION=ACTIVATIONS[mlp],
                     HALF=dtype == mx.float16, BM=BM, BN=BN, BK=BK, STAGES=stages, SWITCH=switch, Z_LOSS=z_loss)
    threads = THREADS.get(name, BM // 64 * (BN // 64) * 32)  # of a thread block
    shared = 0 if name in THREADS else stages * (BM + BN) * BK * 2 + ALIGNED
    files, macros = ["gpu_experts.cu"], ""
    if on_hopper():
        files.append("gpu_experts_hopper.cu")
        macros = (f"#define HOPPER\n#define REGISTERS \"{{{', '.join(f'%{i}' for i in range(128))}}}\"\n#define SUMS "
                  + ", ".join(f'"+f"(c[{i // 4}][{i % 4}])' for i in range(128)) + "\n")

    @cache
    def code(kinds: tuple[mx.Dtype, ...]) -> bytes:
        """For inputs and outputs of these dtypes."""
        names = [*(f"const {{}}* {each}" for each in inputs.split()), *(f"{{}}* {each}" for each in outputs.split())]
        parameters = ", ".join(each.format(gpu_kernels.TYPES[kind]) for each, kind in zip(names, kinds, strict=True))
        function = (f'extern "C" __global__ void __launch_bounds__({threads}, 1) experts_{name}({parameters}) '
                    f"{{\n{call}\n}}\n")
        return gpu_kernels.compiled(
            macros + gpu_kernels.definitions(**constants) + gpu_kernels.source_of(*files) + function)

    def run(given: list, grid: int, shapes: list, dtypes: list) -> list:
        kinds = (*(array.dtype for array in given), *dtypes)
        return gpu_kernels.run(f"experts_{name}", code(kinds), given, [*zip(shapes, dtypes, strict=True)],
                               grid or blocks, threads, shared=shared)

    return run


@lru_cache(maxsize=64)
def functions(dtype: mx.Dtype, mlp: str, E: int, K: int, C: int, HID: int):
    """Two functions, of which the second one has gradients:
    sort (chosen (N, K)) -> pair, row, begin: see gpu_experts.cu, as for F;
    mixture (x (N, C), gates (N, K), up (E, F, C), down (E, C, HID), pair, row, begin) -> y (N, C), and what its
    backward pass needs. The matrices may be of another dtype, in which their gradients then are."""
    F = 2 * HID if mlp in GATED else HID

    def run(name, *arguments):
        return kernel(name, dtype, mlp, E, K, C, HID)(*arguments)

    def sort(chosen: mx.array) -> list:
        n = chosen.size
        return run("sort", [chosen.astype(mx.uint32), mx.array([n] * 4, mx.int32)], math.ceil(n / 1024),
                   [(n,), (n,), (E + 1,)], [mx.int32] * 3)

    @mx.custom_function
    def mixture(x, gates, up, down, pair, row, begin):
        n, up, down = pair.size, up.astype(dtype), down.astype(dtype)
        h, hidden = run("up", [x, up, pair, begin], 0, [(n, F), (n, HID)], [dtype] * 2)
        rows, = run("down", [hidden, down, begin], 0, [(n, C)], [dtype])
        y, = run("sum", [rows, row, gates, begin], math.ceil(x.size / 8 / 256), [x.shape], [dtype])
        return y, h, up, down

    @mixture.vjp
    def backward(primals, cotangents, outputs):
        (x, gates, up, down, pair, row, begin), dy, (_, h, up_rounded, down_rounded) = primals, cotangents[0], outputs
        n = pair.size
        dh, weighed, parts = run("down_backward", [dy, down_rounded, pair, begin, h, gates], 0,
                                 [(n, F), (n, HID), (HID // 64, n)], [dtype, dtype, mx.float32])
        rows, = run("up_backward", [dh, up_rounded, begin], 0, [(n, C)], [dtype])
        dx, = run("sum_backward", [rows, row, begin], math.ceil(x.size / 8 / 256), [x.shape], [dtype])
        dgates, = run("gates", [parts, row, begin], math.ceil(n / 256), [gates.shape], [dtype])
        ddown, dup = run("weights", [x, dy, dh, weighed, pair, begin], 0, [down.shape, up.shape], [mx.float32] * 2)
        return (dx, dgates, dup.astype(up.dtype), ddown.astype(down.dtype),
                *(mx.zeros_like(each) for each in (pair, row, begin)))

    return sort, mixture


def known(moe: nn.Module, dtype: mx.Dtype) -> bool:
    """Whether the kernels can compute a model.MoE for tokens of a dtype, and have been tried."""
    import model as plain  # not above: it imports this file
    config, layers = moe.config, [moe[name] for name in ("up", "down", "gate") if name in moe]
    C, HID, E = config.n_embd, config.ffn_dim, config.n_expert
    return (on_gpu() and dtype in (mx.bfloat16, mx.float16) and config.mlp in ACTIVATIONS and C % 64 == HID % 64 == 0
            and E <= 32 and all(type(layer) is plain.Experts and "bias" not in layer for layer in layers)
            and usable() and is_right(dtype, config.mlp, E, config.expert_top_k, C, HID))


def routed(moe: nn.Module, logits: mx.array) -> tuple[mx.array, mx.array, mx.array] | None:
    """The choice of a model.MoE in training, with the losses that keep the experts even: the router's logits (N, E) ->
    gates and chosen (N, K), and how many pairs each expert has (E,). None where model.py must compute it."""
    import model as plain  # not above: it imports this file
    config, (N, E), K = moe.config, logits.shape, moe.config.expert_top_k
    if not moe.training or not known(moe, logits.dtype):
        return None
    switch = plain.SWITCH_LOSS * E if config.expert_balance == "loss" else 0.0
    blocks, balance = math.ceil(N / 256), moe.balance if "balance" in moe else mx.zeros(E)
    size = mx.array([N] * 4, mx.int32)

    def run(name, *arguments):
        return kernel(name, logits.dtype, "relu2", E, K, 64, 64, switch, plain.Z_LOSS)(*arguments)

    @mx.custom_function
    def forward(logits):
        gates, chosen, counts = run("route", [logits, balance, size], blocks, [(N, K), (N, K), (blocks, E)],
                                    [logits.dtype, mx.uint32, mx.float32])
        count = counts.sum(0)
        return gates, chosen, count, moe.over_processes(count)

    @forward.vjp
    def backward(logits, cotangents, outputs):
        _, chosen, _, count = outputs
        return run("route_backward", [logits, chosen, count, cotangents[0], size], blocks, [(N, E)], [logits.dtype])[0]

    gates, *counted, _ = forward(logits)  # without stop_gradient, zeros would reach the kernel that sorts the choice
    return gates, *map(mx.stop_gradient, counted)


def by_matmuls(mlp: str, x: mx.array, gates: mx.array, up: mx.array, down: mx.array, chosen: mx.array) -> mx.array:
    """What mixture() of functions() computes, by all experts for all tokens."""
    import model as plain  # not above: it imports this file
    y = mx.zeros_like(x)
    for e in range(len(up)):
        h = x @ up[e].T
        hidden = plain.ACTIVATIONS[mlp](*((h[:, ::2], h[:, 1::2]) if mlp in GATED else (h,)))
        y = y + mx.where(chosen == e, gates, 0).sum(1, keepdims=True) * (hidden @ down[e].T)
    return y


@cache
def is_right(dtype: mx.Dtype, mlp: str, E: int, K: int, C: int, HID: int) -> bool:
    """Whether this GPU's values and gradients for random tokens are within 2% of those that matmuls in float32 give."""
    F = 2 * HID if mlp in GATED else HID
    if E * F * C > LARGEST:
        return True
    shapes = dict(x=(TRIED, C), gates=(TRIED, K), up=(E, F, C), down=(E, C, HID), dy=(TRIED, C))
    scales = dict(x=1, gates=1, up=C**-0.5, down=HID**-0.5, dy=1)
    *given, dy = (mx.random.normal(shape, scale=scales[name], key=mx.random.key(i)).astype(dtype).astype(mx.float32)
                  for i, (name, shape) in enumerate(shapes.items()))
    chosen = mx.argsort(mx.random.uniform(shape=(TRIED, E), key=mx.random.key(len(shapes))), axis=1)[:, :K]

    def fast(x, gates, up, down):
        sort, of_rows = functions(dtype, mlp, E, K, C, HID)
        return of_rows(x.astype(dtype), gates.astype(dtype), up, down, *sort(chosen))[0].astype(mx.float32)

    try:
        found, right = ([f(*given), *mx.grad(lambda *x, f=f: (f(*x) * dy).sum(), (0, 1, 2, 3))(*given)]
                        for f in (fast, lambda *x: by_matmuls(mlp, *x, chosen)))
        errors = [(mx.linalg.norm((a - b).reshape(-1)) / mx.linalg.norm(b.reshape(-1))).item()
                  for a, b in zip(found, right, strict=True)]
    except (OSError, RuntimeError) as error:  # it does not compile, or this GPU cannot run it
        errors = [math.inf]
        lines = str(error).splitlines() or [""]
        print(f"gpu_experts.py: {next((x for x in lines if 'error' in x), lines[0])[:200]}", file=sys.stderr)
    if not max(errors) < 0.02:
        print("gpu_experts.py does not work on this GPU: model.py computes the experts, more slowly", file=sys.stderr)
    return max(errors) < 0.02


def mixture(moe: nn.Module, x: mx.array, gates: mx.array, chosen: mx.array) -> mx.array | None:
    """What the experts of a model.MoE add for tokens x (N, C), the sums over chosen (N, K) of gates (N, K) times their
    outputs: (N, C). None where model.py must compute it."""
    if not known(moe, x.dtype):
        return None
    config, C, K, up, down = moe.config, x.shape[1], chosen.shape[1], moe.up.weight, moe.down.weight
    E, HID = config.n_expert, config.ffn_dim
    if config.mlp in GATED:
        up = mx.stack([moe.gate.weight, up], axis=2).reshape(E, 2 * HID, C)
    sort, of_rows = functions(x.dtype, config.mlp, E, K, C, HID)
    return of_rows(x, gates, up, down, *sort(chosen))[0]


@cache
def usable() -> bool:
    """Whether the GPU is of 2020 (Ampere) or later, has room for a tile, and gpu_experts.cu is here."""
    try:
        return gpu_kernels.device()[2] >= 8 and any(map(fits, TILES)) and bool(gpu_kernels.source_of("gpu_experts.cu"))
    except OSError:
        return False


if __name__ == "__main__":
    print("gpu_experts.py has no command of its own: run train.py, which uses it", file=sys.stderr)
    sys.exit(2)
