"""Training on an NVIDIA GPU: a block, a norm and the loss, with their gradients, by kernels of gpu_train.cu.

What lies between the matmuls is bound by memory, so each of these is one kernel, forward and backward: a norm, with
the residual stream's sum before it; QK-norm and rotary positions; an activation, which the backward pass computes again
with its gradient; the loss, with the gradient of the logits. Queries, keys and values are one matmul, as are the MLP's
gate and values. For the backward pass a block keeps its input, the queries, keys and values, the output of attention,
the residual stream after it, and the input of the activation.

Attention itself, from queries, keys and values, is model.py's, with its windows and biases; so are experts, and which
tokens a block gets. The plain form of all this is model.py, which computes where a function here returns None:
settings, sizes and layers that are not known, another device. Deleting this file and gpu_train.cu costs speed and
nothing else.
"""
import math
import sys
from functools import cache

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

import gpu_kernels
from config import UserError

KNOWN = """rope_scaling rope_pattern norm_bias out_bias head_bias embed_scale attn_scale logit_scale softcap
attn_softcap sink_logits bidirectional alibi sliding_window window_pattern sinks window_theta diff_attn
diff_attn_version n_expert expert_top_k n_shared_expert expert_balance router_bias mod mod_capacity mod_every"""
ACTIVATIONS = "relu2", "gelu", "gelu_tanh", "swiglu", "geglu"  # as in gpu_train.cu
TYPES = mx.bfloat16, mx.float16, mx.float32
BLOCKS = 264          # thread blocks of a kernel that adds up rows: two for each multiprocessor of an H100
PIECE = 16384         # numbers of an array that a thread block takes at a time
GROUP = 8             # tensors that a kernel of AdamW takes; MLX's own work grows with the square of its outputs
READ = 400            # gradients that a kernel reads: its arguments take 4,096 bytes at most
LOSS_CHUNK = 2**28    # logits in memory at a time, and their gradients

# ---- kernels ---------------------------------------------------------------------------------------------------------


@cache
def kernel(name: str, part: str, dtype: mx.Dtype, ending: str = "", **constants: float | tuple) -> bytes:
    """The kernel `name` of a part of gpu_train.cu, for activations of a dtype. ending: further source text."""
    text = gpu_kernels.definitions(T=dtype, **constants) + f"#define {name.upper()}\n#define {part.upper()}\n"
    return gpu_kernels.compiled(f"{text}{gpu_kernels.source_of('gpu_train.cu')}\n{ending}")


def run(name: str, dtype: mx.Dtype, constants: dict, inputs: list, outputs: list, scalars: list, blocks: int,
        threads: int = 256, part: str = "", ending: str = "") -> list[mx.array]:
    """Run a kernel in so many thread blocks. outputs: (shape, dtype) of each."""
    code = kernel(name, part or name, dtype, ending, THREADS=threads, **constants)
    return gpu_kernels.run(name, code, inputs, outputs, blocks, threads, scalars)


def run_over(name: str, dtype: mx.Dtype, constants: dict, struct: str, cases: list[str], sizes: list[int],
             parameters: list[str], inputs: list, outputs: list, scalars: list, rest: str = "") -> list[mx.array]:
    """Run a kernel over many arrays of these sizes. cases: how a `struct` x of gpu_train.cu is set for each of them, by
    the parameters of the kernel; rest: those that its function there takes after pick()."""
    pieces = [-(-size // PIECE) for size in sizes]
    switch = "".join(f"case {i}: {case} break;\n" for i, case in enumerate(cases))
    ending = (f'extern "C" __global__ void __launch_bounds__(THREADS) {name}({", ".join(parameters)}) {{\n'
              f"{name}([&](int t) {{\n{struct} x = {{}};\nswitch (t) {{\n{switch}}}\nreturn x;\n}}{rest});\n}}\n")
    constants = dict(constants, COUNT=len(sizes), PIECE=PIECE, SIZES=tuple(sizes),
                     ENDS=tuple(sum(pieces[:i + 1]) for i in range(len(sizes))))
    blocks = min(4 * BLOCKS, sum(pieces))
    return run(name, dtype, constants, inputs, outputs or [((blocks,), mx.float32)], scalars, blocks, part="tensors",
               ending=ending)


@cache
def ready() -> bool:
    """Whether MLX computes on an NVIDIA GPU that can run the kernels: of 2020 (Ampere) or later, with NVRTC."""
    try:
        return mx.cuda.is_available() and bool(kernel("column_sums", "column_sums", mx.bfloat16, THREADS=1024))
    except OSError:
        return False


def usable(x: mx.array) -> bool:
    return x.dtype in TYPES and mx.default_device() == mx.gpu and ready()


def column_sums(x: mx.array) -> mx.array:
    """(rows, columns) -> (columns,), float32."""
    rows, columns = x.shape
    return run("column_sums", mx.float32, {}, [x], [((columns,), mx.float32)], [rows, columns], -(-columns // 32),
               1024)[0]


def added_up(parts: list[mx.array], factor: mx.array) -> mx.array:
    """factor times the sum of arrays of one shape, whose size is a multiple of 8, float32."""
    n = len(parts)
    parameters = [*(f"const T* part{i}" for i in range(n)), "const float* factor", "float* out", "int n"]
    ending = (f'extern "C" __global__ void __launch_bounds__(THREADS) add_up({", ".join(parameters)}) {{\n'
              f"const T* const parts[PARTS] = {{{', '.join(f'part{i}' for i in range(n))}}};\n"
              "add_up(parts, factor[0], out, n);\n}\n")
    blocks = min(8 * BLOCKS, -(-parts[0].size // (8 * 256)))
    return run("add_up", parts[0].dtype, dict(PARTS=n), [*parts, factor], [(parts[0].shape, mx.float32)],
               [parts[0].size], blocks, ending=ending)[0]


# ---- norms -----------------------------------------------------------------------------------------------------------


def norm_constants(norm: nn.Module) -> dict | None:
    """The constants of a norm's kernels, or None where they do not know it."""
    import model as plain  # not above: it imports this file
    if type(norm) not in (plain.RMSNorm, plain.LayerNorm) or norm.weight.dtype not in TYPES:
        return None
    C = norm.weight.size
    if C % 8 or C > 8192:
        return None
    return dict(C=C, LAYER=isinstance(norm, nn.LayerNorm), BIASED="bias" in norm, EPS=float(norm.eps))


def warps_of(C: int, columns: int) -> dict:
    """How a row is divided: at most 8 warps, whose lanes have so many columns each, or more if need be."""
    warps = min(8, -(-C // (32 * columns)))
    return dict(WARPS_A_ROW=warps, CHUNKS=-(-C // (256 * warps)))


def weight_and_bias(p: dict) -> list[mx.array]:
    return [p[name].astype(mx.float32) for name in ("weight", "bias" if "bias" in p else "weight")]


def norm_forward(x: mx.array, p: dict, constants: dict, added: mx.array | None = None) -> list[mx.array]:
    """norm(x) for rows x (N, C); with `added`, x + added and the norm of this sum."""
    n = 1 if added is None else 2
    name, inputs = ("norm_forward", [x]) if added is None else ("add_norm_forward", [x, added])
    row = warps_of(x.shape[1], 32)
    at_a_time = max(1, 8 // row["WARPS_A_ROW"])
    return run(name, x.dtype, constants | row, [*inputs, *weight_and_bias(p)], [(x.shape, x.dtype)] * n, [len(x)],
               -(-len(x) // at_a_time), at_a_time * row["WARPS_A_ROW"] * 32, "norm")


def norm_backward(x: mx.array, dy: mx.array, p: dict, constants: dict, residual: mx.array | None = None,
                  sums: bool = False) -> tuple:
    """The gradients of rows x (N, C) and of the norm's parameters. With the gradient `residual` that x has from
    elsewhere, which is added to that of x, also norm(x), and, if asked for, the sums over the rows of residual and of
    x's gradient."""
    kinds, row = 1 + constants["BIASED"] + 2 * sums, warps_of(x.shape[1], 8)
    at_a_time = max(1, 8 // row["WARPS_A_ROW"])
    threads = at_a_time * row["WARPS_A_ROW"] * 32
    blocks = min((3 if constants["LAYER"] else 4) * BLOCKS // 2, -(-len(x) // at_a_time))  # as many as run at a time
    constants = constants | row
    like, partial = (x.shape, x.dtype), ((blocks, kinds * x.shape[1]), mx.float32)
    if residual is None:
        dx, partial = run("norm_backward", x.dtype, constants, [x, dy, *weight_and_bias(p)], [like, partial], [len(x)],
                          blocks, threads, "norm")
        more = []
    else:
        dx, y, partial = run("norm_backward_in_block", x.dtype, dict(constants, SUMS=sums),
                             [x, dy, residual, *weight_and_bias(p)], [like, like, partial], [len(x)], blocks, threads,
                             "norm")
        more = [y]
    found = mx.split(column_sums(partial), kinds)
    gradients = {name: found[i].astype(p[name].dtype) for i, name in enumerate(["weight", "bias"]) if name in p}
    return dx, gradients, *more, *found[1 + constants["BIASED"]:]


def norm(module: nn.Module, x: mx.array) -> mx.array | None:
    """RMSNorm or LayerNorm of x (..., C) in training; None where model.py must compute it."""
    if not (module.training and x.shape[-1] >= 256 and usable(x)) or (constants := norm_constants(module)) is None:
        return None

    @mx.custom_function
    def forward(x, p):
        return norm_forward(x.reshape(-1, x.shape[-1]), p, constants)[0].reshape(x.shape)

    @forward.vjp
    def backward(primals, cotangent, _):
        x, p = primals
        dx, gradients = norm_backward(*(y.reshape(-1, y.shape[-1]) for y in (x, cotangent)), p, constants)
        return dx.reshape(x.shape), in_order(p, gradients)

    return forward(x, module.parameters())


# ---- the weights of a block ------------------------------------------------------------------------------------------


def in_order(p: dict, gradients: dict) -> dict:
    """Gradients by name in the order of the parameters: MLX goes by it, not by the names."""
    return {name: in_order(value, gradients[name]) if isinstance(value, dict) else gradients[name]
            for name, value in p.items()}


def moved(sources: list[mx.array], pieces: list[tuple], shapes: list, dtype: mx.Dtype) -> list[mx.array]:
    """Arrays of these shapes, put together from pieces of others in one kernel. pieces: (source, its first number,
    output, its first number, how many)."""
    parameters = [f"const FROM* source{i}" for i in range(len(sources))] + [f"TO* out{i}" for i in range(len(shapes))]
    cases = [f"x.from = source{i} + {first}; x.to = out{j} + {to};" for i, first, j, to, _ in pieces]
    return run_over("move", dtype, dict(FROM=sources[0].dtype, TO=dtype), "Place", cases, [n for *_, n in pieces],
                    parameters, sources, [(shape, dtype) for shape in shapes], [])


def in_rows(arrays: list[mx.array], dtype: mx.Dtype, n: int) -> mx.array | None:
    """parallel.in_rows() in one kernel, or None."""
    if not (movable(arrays, n) and dtype in TYPES):
        return None
    starts, total = starts_of([x.size // n for x in arrays])
    pieces = [(i, r * (x.size // n), 0, r * total + start, x.size // n)
              for i, (x, start) in enumerate(zip(arrays, starts, strict=True)) for r in range(n)]
    return moved(arrays, pieces, [(n, total)], dtype)[0]


def from_rows(rows: mx.array, shapes: list[tuple], dtype: mx.Dtype) -> list[mx.array] | None:
    """parallel.from_rows() by one kernel for every 16 arrays, since MLX's own work grows with the square of the outputs
    of a kernel; or None."""
    n, sizes = len(rows), [math.prod(shape) for shape in shapes]
    if not movable([rows], n) or dtype not in TYPES or any(size % n for size in sizes):
        return None
    (starts, total), found = starts_of([size // n for size in sizes]), []
    for at in (range(i, min(i + 16, len(shapes))) for i in range(0, len(shapes), 16)):
        pieces = [(0, r * total + starts[i], i - at[0], r * (sizes[i] // n), sizes[i] // n) for i in at
                  for r in range(n)]
        found += moved([rows], pieces, [shapes[i] for i in at], dtype)
    return found


def movable(arrays: list[mx.array], n: int) -> bool:
    """Whether moved() takes arrays, each in n parts."""
    return (n * len(arrays) <= READ and len({x.dtype for x in arrays}) == 1 and usable(arrays[0])
            and all(x.size and x.size % n == 0 and x.size < 2**31 for x in arrays))


def starts_of(sizes: list[int]) -> tuple[list[int], int]:
    """Where each of some arrays begins that lie one behind the other, and how many numbers they have together."""
    return [sum(sizes[:i]) for i in range(len(sizes))], sum(sizes)


def weights_of(block: nn.Module, dtype: mx.Dtype) -> dict:
    """The linear layers of a block in a dtype, by one kernel, and their gradients by another: {name: {"weight",
    "bias"}}. "qkv" and "inner" (the MLP's gate and values, or its only layer) are layers of one input, one below the
    other."""
    attn, mlp = block.attn, block.mlp
    groups = {"qkv": [attn.q, attn.k, attn.v], "out": [attn.out]}
    if has_mlp(block):
        groups |= {"down": [mlp.down], "inner": [mlp[name] for name in ("gate", "up") if name in mlp]}
    parts, shapes = [], {}  # (group, layer, kind, its first number in the whole, how many); {(group, kind): shape}
    for kind in "weight", "bias":
        for name, layers in groups.items():
            for i, layer in enumerate(layers):
                if kind in layer:
                    rows = shapes.get((name, kind), (0,))[0]
                    parts.append((name, i, kind, rows * (layer[kind].size // len(layer[kind])), layer[kind].size))
                    shapes[name, kind] = (rows + len(layer[kind]), *layer[kind].shape[1:])
    matrices = [part for part in parts if part[2] == "weight"]

    @mx.custom_function
    def forward(p):
        wholes, found = [*shapes], {name: {} for name in groups}
        pieces = [(i, 0, wholes.index((name, kind)), first, n) for i, (name, _, kind, first, n) in enumerate(parts)]
        arrays = moved([p[name][i][kind] for name, i, kind, *_ in parts], pieces, [*shapes.values()], dtype)
        for (name, kind), array in zip(wholes, arrays, strict=True):
            found[name][kind] = array
        return found

    @forward.vjp
    def backward(p, cotangents, _):
        names, found = [*groups], {name: [dict(layer) for layer in p[name]] for name in groups}
        pieces = [(names.index(name), first, i, 0, n) for i, (name, _, _, first, n) in enumerate(matrices)]
        like = [p[name][i]["weight"] for name, i, *_ in matrices]
        arrays = moved([cotangents[name]["weight"] for name in names], pieces, [w.shape for w in like], like[0].dtype)
        for (name, i, kind, first, n) in parts:
            found[name][i][kind] = (arrays.pop(0) if kind == "weight" else
                                    cotangents[name][kind][first:first + n].astype(p[name][i][kind].dtype))
        return found

    return forward({name: [layer.parameters() for layer in layers] for name, layers in groups.items()})


def linear(x: mx.array, p: dict) -> mx.array:
    return mx.addmm(p["bias"], x, p["weight"].T) if "bias" in p else x @ p["weight"].T


def linear_gradients(x: mx.array, dy: mx.array, p: dict, dbias: mx.array | None) -> dict:
    """The gradients of linear()'s layer by those of its outputs (N, out), whose sums over N are dbias."""
    return {"weight": dy.T @ x} | ({"bias": dbias} if "bias" in p else {})


# ---- a block ---------------------------------------------------------------------------------------------------------


def has_mlp(block: nn.Module) -> bool:
    """Whether the kernels compute the MLP of a block; else model.py does, as the experts'."""
    import model as plain
    return type(block.mlp) is plain.MLP


def known(block: nn.Module, x: mx.array) -> bool:
    """Whether this is a block of settings, sizes and layers that the kernels know."""
    import model as plain
    config, attn, mlp = block.config, block.attn, block.mlp
    variants = [getattr(plain, name, plain.Block) for name in ("RoutedBlock", "DiffAttention", "MoE")]
    kinds = [(plain.Block, variants[0]), (plain.Attention, variants[1]), (plain.MLP, variants[2])]
    try:
        plain.check_known(config, KNOWN, "gpu_train.py")
    except UserError:
        return False
    if not all(type(x) in classes for x, classes in zip((block, attn, mlp), kinds, strict=True)) or "lam" in attn:
        return False
    layers = [attn[name] for name in ("q", "k", "v", "out")]
    layers += [mlp[name] for name in ("gate", "up", "down") if name in mlp] if has_mlp(block) else []
    turns = config.qk_norm or "_inverse" in attn
    return (all(type(layer) is plain.Linear for layer in layers) and layers[0].weight.dtype in TYPES
            and len({p.dtype for layer in layers for p in layer.parameters().values()}) == 1
            and None not in map(norm_constants, (block.attn_norm, block.mlp_norm))
            and (not has_mlp(block) or config.mlp in ACTIVATIONS and config.ffn_dim % 8 == 0)
            and config.head_dim % 8 == 0
            and (not turns or config.head_dim in (16, 32, 64, 128, 256))
            and (config.n_head + 2 * config.n_kv_head) * config.head_dim <= 10240)  # sums fit into shared memory


def block(block: nn.Module, x: mx.array, offset: int | mx.array, carry: dict) -> mx.array | None:
    """A block in training: x (B, T, C) -> (B, T, C); None where model.py must compute it. offset, carry: as there."""
    import model as plain
    if not (usable(x) and known(block, x)):
        return None
    weights = weights_of(block, x.dtype)
    q, k, v, rows = before_attention(block, weights, x, offset)
    heads = block.attn.attended(q, k, v, None, offset, carry).swapaxes(1, 2).reshape(len(rows), -1)
    if has_mlp(block):
        return mlp(block, weights, rows, heads).reshape(x.shape)
    rows, normed = before_mlp(block, weights, rows, heads)
    return rows.reshape(x.shape) + block.mlp(normed.reshape(x.shape), plain.no_tap)


def before_attention(block: nn.Module, weights: dict, x: mx.array, offset: int | mx.array) -> tuple:
    """Norm, queries, keys and values: x (B, T, C) -> q (B, H, T, D), k and v (B, KV, T, D), and x as rows (B T, C),
    whose gradient comes back here, so that it is added where the norm's gradient is."""
    config, attn, (B, T, C) = block.config, block.attn, x.shape
    H, KV, D = config.n_head, config.n_kv_head, config.head_dim
    turns = "_inverse" in attn
    norm, sizes = norm_constants(block.attn_norm), dict(H=H, KV=KV, D=D)
    sizes |= dict(QK_NORM=config.qk_norm, TURNS=turns, BIASED="bias" in attn.q, EPS=float(config.norm_eps))
    inverse = attn._inverse if turns else mx.ones(1)
    length, first, positions = T, offset, mx.zeros(1, mx.int32)
    if turns and not isinstance(offset, int):
        import model as plain
        length, first = 0, 0
        positions = mx.broadcast_to(offset % plain.DOCUMENT, (B, T)).reshape(-1).astype(mx.int32)
    elif not turns:
        first = 0
    parameters = {name: attn[name].parameters() for name in ("q_norm", "k_norm") if name in attn}
    parameters |= {"norm": block.attn_norm.parameters(), "qkv": weights["qkv"]}

    def others(p: dict) -> list[mx.array]:
        """The other inputs of the kernels: weights of QK-norm, rotary wavelengths, positions."""
        scales = [p[name]["weight"].astype(mx.float32) for name in ("q_norm", "k_norm") if name in p]
        return [*(scales or [inverse] * 2), inverse, positions]

    @mx.custom_function
    def forward(x, p):
        rows = x.reshape(-1, C)
        products = linear(norm_forward(rows, p["norm"], norm)[0], p["qkv"])
        q, k, v = mx.split(products.reshape(B, T, -1, D), [H, H + KV], axis=2)
        if turns or config.qk_norm:
            q, k = run("qkv_forward", x.dtype, sizes, [products, *others(p)],
                       [(q.shape, x.dtype), (k.shape, x.dtype)], [len(rows), length, first], -(-len(rows) // 8),
                       part="qkv")
        return *(y.swapaxes(1, 2) for y in (q, k, v)), products, rows

    @forward.vjp
    def backward(primals, cotangents, outputs):
        (x, p), products = primals, outputs[3]
        rows = x.reshape(-1, C)
        dq, dk, dv = (g.swapaxes(1, 2) for g in cotangents[:3])
        blocks = min(BLOCKS, -(-len(rows) // 8))
        columns = sizes["BIASED"] * products.shape[1] + sizes["QK_NORM"] * 2 * D
        dproducts, partial = run(
            "qkv_backward", x.dtype, sizes, [products, dq, dk, dv, *others(p)],
            [(products.shape, x.dtype), ((blocks, max(1, columns)), mx.float32)], [len(rows), length, first], blocks,
            part="qkv")
        sums = column_sums(partial) if columns else None
        dx, dnorm, normed = norm_backward(rows, dproducts @ p["qkv"]["weight"], p["norm"], norm, cotangents[4])
        dbias = sums[:products.shape[1]] if sizes["BIASED"] else None
        found = {"qkv": linear_gradients(normed, dproducts, p["qkv"], dbias), "norm": dnorm}
        if config.qk_norm:
            for name, d in zip(("q_norm", "k_norm"), mx.split(sums[-2 * D:], 2), strict=True):
                found[name] = {"weight": d.astype(p[name]["weight"].dtype)}
        return dx.reshape(x.shape), in_order(p, found)

    q, k, v, _, rows = forward(x, parameters)
    return q, k, v, rows


def before_mlp(block: nn.Module, weights: dict, x: mx.array, y: mx.array) -> tuple[mx.array, mx.array]:
    """Attention's output projection, added to the residual stream, and the norm of the sum: rows x (N, C), y (N, H D),
    the output of the heads -> (N, C) each."""
    norm, parameters = norm_constants(block.mlp_norm), {"norm": block.mlp_norm.parameters(), "out": weights["out"]}

    @mx.custom_function
    def forward(x, y, p):
        return tuple(norm_forward(x, p["norm"], norm, added=linear(y, p["out"])))

    @forward.vjp
    def backward(primals, cotangents, outputs):
        (_, y, p), (residual, dnormed) = primals, cotangents
        dx, dnorm, _, *more = norm_backward(outputs[0], dnormed, p["norm"], norm, residual, "bias" in p["out"])
        found = {"norm": dnorm, "out": linear_gradients(y, dx, p["out"], more[1] if more else None)}
        return dx, dx @ p["out"]["weight"], in_order(p, found)

    return forward(x, y, parameters)


def mlp(block: nn.Module, weights: dict, x: mx.array, y: mx.array) -> mx.array:
    """before_mlp() and the MLP, added to the residual stream: (N, C)."""
    norm, F = norm_constants(block.mlp_norm), block.config.ffn_dim
    parameters = {"norm": block.mlp_norm.parameters()} | {name: weights[name] for name in ("out", "inner", "down")}
    sizes = dict(F=F, ACTIVATION=ACTIVATIONS.index(block.config.mlp))

    @mx.custom_function
    def forward(x, y, p):
        x, normed = norm_forward(x, p["norm"], norm, added=linear(y, p["out"]))
        pre = linear(normed, p["inner"])
        hidden, = run("mlp_forward", x.dtype, sizes, [pre], [((len(x), F), x.dtype)], [len(x)],
                      -(-len(x) * F // 2048), part="mlp")
        if "bias" in p["down"]:
            return x + linear(hidden, p["down"]), x, pre
        return mx.addmm(x, hidden, p["down"]["weight"].T), x, pre

    @forward.vjp
    def backward(primals, cotangents, outputs):
        (_, y, p), (_, x, pre), g = primals, outputs, cotangents[0]
        biased, dhidden = "bias" in p["inner"], g @ p["down"]["weight"]
        across = -(-F // 256)
        parts = max(1, min(8 * BLOCKS // across, -(-len(x) // 8)))
        hidden, dpre, partial = run(
            "mlp_backward", x.dtype, dict(sizes, BIASED=biased), [pre, dhidden],
            [(dhidden.shape, x.dtype), (pre.shape, x.dtype), ((parts, pre.shape[1] if biased else 1), mx.float32)],
            [len(x)], parts * across, part="mlp")
        sums = "bias" in p["down"] or "bias" in p["out"]
        dx, dnorm, normed, *more = norm_backward(x, dpre @ p["inner"]["weight"], p["norm"], norm, g, sums)
        ddown, dout = more or (None, None)
        found = {"norm": dnorm, "down": linear_gradients(hidden, g, p["down"], ddown),
                 "out": linear_gradients(y, dx, p["out"], dout),
                 "inner": linear_gradients(normed, dpre, p["inner"], column_sums(partial) if biased else None)}
        return dx, dx @ p["out"]["weight"], in_order(p, found)

    return forward(x, y, parameters)[0]


def difference(attn: nn.Module, y: mx.array) -> mx.array | None:
    """What a model.DiffAttention makes of pairs of heads y (B, 2 P, T, W): (B, P, T, W). None where model.py must
    compute it."""
    import model as plain
    B, P, T, W = y.shape[0], y.shape[1] // 2, y.shape[2], y.shape[3]
    if not attn.training or W not in (32, 64, 128, 256) or not usable(y):
        return None
    sizes, dtype, scalars = dict(W=W, EPS=float(attn.head_norm.eps)), y.dtype, [B * T * P, float(attn.lambda_0)]
    blocks = -(-B * T * P * W // 2048)

    @mx.custom_function
    def forward(heads, *vectors):
        return run("pairs_forward", dtype, sizes, [heads, *vectors], [((B, T, P, W), dtype), ((3,), mx.float32)],
                   scalars, blocks, part="pairs")

    @forward.vjp
    def backward(primals, cotangents, outputs):
        (heads, *vectors, weight), (_, lambdas) = primals, outputs
        some = min(4 * BLOCKS, blocks)
        dheads, sums = run("pairs_backward", dtype, sizes, [heads, cotangents[0], lambdas, weight],
                           [(heads.shape, dtype), ((some, W + 1), mx.float32)], scalars, some, part="pairs")
        sums = column_sums(sums)
        dq1, dk1, dq2, dk2 = (sums[W] * lambdas[1 + i // 2] * (1 - 2 * (i // 2)) * vectors[i ^ 1] for i in range(4))
        return dheads, dq1, dk1, dq2, dk2, sums[:W]

    vectors = [attn[name].astype(mx.float32) for name in plain.DIFF_LAMBDAS]
    rows = y.swapaxes(1, 2)  # each position's heads lie as attention writes them
    return forward(rows, *vectors, attn.head_norm.weight.astype(mx.float32))[0].swapaxes(1, 2)


# ---- the loss --------------------------------------------------------------------------------------------------------


def loss(model: nn.Module, x: mx.array, targets: mx.array, weights: mx.array) -> mx.array | None:
    """model.py's chunked_loss() in training; None where it must compute the loss. x (N, C), the rest (N,)."""
    import model as plain
    config, head = model.config, model.embed if model.config.tie else model.head
    if (not usable(x) or config.softcap or config.logit_scale != 1 or config.vocab_size % 8
            or type(head) not in (plain.Linear, plain.Embedding) or {*head.parameters()} != {"weight"}):
        return None
    N, V, dtype = len(x), config.vocab_size, x.dtype
    chunks = -(-N * V // LOSS_CHUNK)
    rows = -(-N // (8 * chunks)) * 8
    targets = targets.astype(mx.int32)

    @mx.custom_function
    def forward(weight, x):
        weight, total, dx, dweights = weight.astype(dtype), mx.array(0.0), [], []
        for start in range(0, N, rows):
            piece = x[start:start + rows]
            if dx:  # wait for the chunk before, or the logits of all chunks would be in memory together
                piece = mx.depends([piece], [dx[-1], dweights[-1]])[0]
            logits = piece @ weight.T
            losses, dlogits = run("cross_entropy", dtype, dict(V=V),
                                  [logits, targets[start:start + rows], weights[start:start + rows]],
                                  [((len(piece),), mx.float32), (logits.shape, dtype)], [], len(piece), 512)
            total = total + (losses * weights[start:start + rows]).sum()
            dx.append(dlogits @ weight)
            dweights.append(dlogits.T @ piece)
        return total, mx.concatenate(dx), dweights

    @forward.vjp
    def backward(primals, cotangents, outputs):
        g, (_, dx, dweights) = cotangents[0], outputs
        dweight = added_up(dweights, g.astype(mx.float32))
        return dweight.astype(primals[0].dtype), (g * dx).astype(dx.dtype)

    return forward(head.weight, x)[0]


# ---- the update of the parameters ------------------------------------------------------------------------------------


def squares(gradients: list[mx.array]) -> mx.array:
    """Parts of the sum of the squares of all gradients, float32."""
    found = []
    for group in (gradients[i:i + READ] for i in range(0, len(gradients), READ)):
        parameters = [*(f"const float* g{i}" for i in range(len(group))), "float* sums"]
        found += run_over("squares", mx.float32, {}, "Tensor", [f"x.g = g{i};" for i in range(len(group))],
                          [g.size for g in group], parameters, group, [], [], ", sums")
    return mx.concatenate(found)


def floats(tree) -> list[mx.array] | None:
    """The arrays of a tree, if the kernels can read all of them."""
    arrays = [x for _, x in tree_flatten(tree)]
    known = arrays and all(x.dtype == mx.float32 and 0 < x.size < 2**31 for x in arrays) and usable(arrays[0])
    return arrays if known else None


def clip_grad_norm(gradients: dict, largest: float) -> tuple[dict, mx.array]:
    """optim.clip_grad_norm() in one pass over the gradients."""
    if (arrays := floats(gradients)) is None:
        return optim.clip_grad_norm(gradients, largest)
    norm = mx.sqrt(squares(arrays).sum())
    scale = mx.minimum(largest / (norm + 1e-6), 1.0)
    return tree_map(lambda g: g * scale, gradients), norm


def adamw(model: nn.Module, opt: optim.Optimizer, gradients: dict, largest: float, weight_decay: float,
          norm: mx.array | None = None) -> mx.array | None:
    """Clip, decay the matrices, and apply as optim.Adam does, in one pass over parameters, gradients and states. Return
    the gradient's norm, or None where the caller must do all this. norm: of all gradients, if these are a part."""
    if type(opt) is not optim.Adam or not opt.bias_correction or (arrays := floats(gradients)) is None:
        return None
    names = [name for name, _ in tree_flatten(gradients)]
    parameters = dict(tree_flatten(model.trainable_parameters()))
    state = dict(tree_flatten(opt.state))
    if opt._schedulers or any(f"{name}.m" not in state for name in names):
        return None
    tensors = [(parameters[name], g, state[f"{name}.m"], state[f"{name}.v"])
               for name, g in zip(names, arrays, strict=True)]
    if floats([x for tensor in tensors for x in tensor]) is None:
        return None
    opt.state["step"] = opt.step + 1
    (beta1, beta2), rate, step = opt.betas, opt.learning_rate.astype(mx.float32), opt.step
    square, updated = squares(arrays).sum() if norm is None else norm.square(), []
    rates = mx.stack([1 - weight_decay * rate, rate / (1 - beta1**step), mx.rsqrt(1 - beta2**step), square])
    for group in (tensors[i:i + GROUP] for i in range(0, len(tensors), GROUP)):
        constants = dict(BETA1=float(beta1), BETA2=float(beta2), ADAM_EPS=float(opt.eps),
                         DECAYS=tuple(p.ndim > 1 for p, *_ in group))
        count, fields = range(len(group)), ("p", "g", "m", "v", "new_p", "new_m", "new_v")  # as in gpu_train.cu
        parameters = [*(f"const float* {field}{i}" for i in count for field in fields[:4]), "const float* rates",
                      *(f"float* {field}{i}" for i in count for field in fields[4:]), "float largest"]
        cases = [" ".join(f"x.{field} = {field}{i};" for field in fields) for i in count]
        updated += run_over("adam", mx.float32, constants, "Tensor", cases, [p.size for p, *_ in group], parameters,
                            [*(x for tensor in group for x in tensor), rates],
                            [(p.shape, mx.float32) for p, *_ in group for _ in "pmv"], [float(largest)],
                            ", rates, largest")
    model.update(tree_unflatten(list(zip(names, updated[::3], strict=True))))
    for name, m, v in zip(names, updated[1::3], updated[2::3], strict=True):
        place = opt.state
        for part in name.split("."):
            place = place[int(part) if isinstance(place, list) else part]
        place["m"], place["v"] = m, v
    return mx.sqrt(square)


if __name__ == "__main__":
    print("gpu_train.py has no command of its own: run train.py, which uses it", file=sys.stderr)
    sys.exit(2)
