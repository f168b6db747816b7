"""webgpu/kernels: every kernel, forward or backward, gives the numbers of model.py, MLX or numpy, also for odd shapes.
It writes nothing else, and reads nothing behind the end of an array."""
import math
from dataclasses import replace
from functools import cache, partial

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from test_cpu import near, numbers

import model
import wgsl
from config import UserError
from model import GPTConfig
from quantized import BITS, GROUP_SIZES

try:
    wgsl.device()
except UserError as error:
    pytest.skip(str(error), allow_module_level=True)

NONE = np.zeros(4, np.uint32)  # for bindings that a kernel does not read


def guarded(array: np.ndarray, written: bool) -> np.ndarray:
    """The array, flattened, followed by values that no kernel may read (NaN or huge integers) or change."""
    flat = np.ascontiguousarray(array).reshape(-1)
    if flat.dtype == np.float16:
        flat = np.append(flat, np.float16([0] * (flat.size % 2))).view(np.uint32)
    guard = 2**32 - 1 if flat.dtype == np.uint32 else 12345 if written else np.nan
    return np.append(flat, np.full(9, guard, flat.dtype))


def run(name: str, constants: dict, params: tuple, arrays: list, groups, out: list[int]) -> list[np.ndarray]:
    """wgsl.run() with guarded arrays, whose guards must not change. groups: the numbers of workgroups; or their total,
    which is laid out in two dimensions, with some workgroups too many."""
    groups = (3, -(-groups // 3)) if isinstance(groups, int) else groups
    arrays = [np.asarray(array) for array in arrays]
    padded = [guarded(array, i in out) for i, array in enumerate(arrays, 1)]
    found = []
    for i, each in zip(out, wgsl.run(name, constants, params, padded, groups, out), strict=True):
        array = arrays[i - 1]
        assert np.array_equal(each[-9:], padded[i - 1][-9:]), f"{name} wrote too far"
        found.append(each[:array.size].reshape(array.shape))
    return found


def elements(n: int, size: int = 64) -> int:
    """Workgroups for n threads."""
    return -(-n // size)


def zeros(*shape) -> np.ndarray:
    return np.zeros(shape, np.float32)


def grad(f, *arrays, cotangent: np.ndarray) -> list[np.ndarray]:
    """The gradient of sum(f(arrays) cotangent) in each array."""
    _, found = mx.vjp(lambda *a: [f(*a)], [mx.array(a) for a in arrays], [mx.array(cotangent)])
    return [np.array(each) for each in found]


# ---- matrices --------------------------------------------------------------------------------------------------------

PACKED = [(bits, group, scale_bits) for bits in BITS for group in GROUP_SIZES for scale_bits in (16, 32)]
SHAPES = [(1, 1, 1), (3, 5, 7), (9, 66, 33), (66, 9, 82), (5, 34, 1), (131, 67, 18)]  # M, N, K


def packed(rows: int, width: int, bits: int, group: int, scale_bits: int, seed: int = 0):
    """Bindings 1 to 3 of a packed matrix (rows, width), its constants, and MLX's arrays of it, in float32."""
    words, scales, biases = mx.quantize(mx.array(numbers(rows, width, seed=seed)), group, bits)
    dtype = np.float16 if scale_bits == 16 else np.float32
    scales, biases = (np.array(part).astype(dtype) for part in (scales, biases))
    affine = [mx.array(part.astype(np.float32)) for part in (scales, biases)]
    constants = {"BITS": bits, "GROUP": group, "SCALE_BITS": scale_bits}
    return [np.array(words), scales, biases], constants, (words, *affine)


def dense(weight: np.ndarray, bits: int) -> list[np.ndarray]:
    """Bindings 1 to 3 of a matrix of float32 or float16."""
    return [weight.astype(np.float16) if bits == 16 else weight, NONE, NONE]


def weights_of(bits: int, shape: tuple, seed: int = 0) -> np.ndarray:
    """A matrix of numbers that this many bits can hold."""
    weight = numbers(*shape, seed=seed + 100)
    return weight.astype(np.float16).astype(np.float32) if bits == 16 else weight


def matmul(kernel: str | int, constants: dict, sizes: tuple, matrix: list, bias, x, y) -> np.ndarray:
    """y of matmul.wgsl, or of matmul_tiled.wgsl with tiles of this width."""
    side = 32 if kernel == "matmul" else kernel
    name, constants = ("matmul", constants) if kernel == "matmul" else ("matmul_tiled", constants | {"SIDE": side})
    return run(name, constants, sizes, [*matrix, bias, x, y], (-(-sizes[1] // side), -(-sizes[0] // side)), [6])[0]


DENSE = [("matmul", *settings) for settings in (  # TRANSPOSE_X, TRANSPOSE_W, bits, ACCUMULATE, BIAS
    (0, 0, 32, 0, 1), (0, 1, 32, 1, 0), (1, 1, 32, 0, 0), (1, 0, 16, 1, 1), (0, 1, 16, 0, 0))]
DENSE += [(64, *settings[1:]) for settings in DENSE] + [(128, 0, 0, 16, 0, 1), (128, 1, 1, 32, 1, 0)]


@pytest.mark.parametrize("kernel, turned_x, turned_w, bits, accumulate, with_bias", DENSE)
def test_matmul(kernel, turned_x, turned_w, bits, accumulate, with_bias):
    """Against x W^T in float64: float32 and float16 weights, transposed or not; a bias; accumulation."""
    constants = {"TRANSPOSE_X": turned_x, "TRANSPOSE_W": turned_w, "ACCUMULATE": accumulate, "BIAS": with_bias}
    for seed, (M, N, K) in enumerate(SHAPES):
        x, weight, bias, before = numbers(M, K), weights_of(bits, (N, K), seed), numbers(N, seed=2), numbers(M, N)
        matrix = dense(weight.T if turned_w else weight, bits)
        found = matmul(kernel, constants | {"BITS": bits}, (M, N, K), matrix, bias, x.T if turned_x else x, before)
        expected = x.astype(np.float64) @ weight.T.astype(np.float64) + with_bias * bias + accumulate * before
        assert near(found, expected), (M, N, K)


@pytest.mark.parametrize("turned_x, turned_w", [(0, 0), (0, 1), (1, 1)])
def test_matmul_whole(turned_x, turned_w):
    """Without checks of bounds, where all tiles are full, the numbers are equal; so are they where x, not transposed,
    ends amid a block of rows."""
    more = [] if turned_x else [("matmul", (13, 36, 20)), ("matmul", (1, 8, 4))]
    for side, sizes in [("matmul", (12, 36, 20)), (64, (64, 128, 48)), (128, (128, 128, 32)), *more]:
        M, N, K = sizes
        x, weight = numbers(M, K), weights_of(32, (N, K))
        constants = {"TRANSPOSE_X": turned_x, "TRANSPOSE_W": turned_w, "BITS": 32}
        arguments = (sizes, dense(weight.T if turned_w else weight, 32), NONE, x.T if turned_x else x, zeros(M, N))
        found = matmul(side, constants | {"WHOLE": True}, *arguments)
        assert np.array_equal(found, matmul(side, constants, *arguments))
        assert near(found, x.astype(np.float64) @ weight.T.astype(np.float64))


@pytest.mark.parametrize("side, turned_x, turned_w, bits, parts, sizes", [
    (64, 0, 0, 16, 3, (70, 30, 100)), (64, 1, 1, 32, 2, (64, 64, 64)), (128, 1, 1, 32, 5, (130, 36, 64)),
    (128, 0, 1, 32, 4, (128, 128, 320))])
def test_matmul_in_parts(side, turned_x, turned_w, bits, parts, sizes):
    """The parts of K, of which the last ones may be shorter or empty, sum to the product; one of them has the bias."""
    M, N, K = sizes
    x, weight, bias = numbers(M, K), weights_of(bits, (N, K)), numbers(N, seed=2)
    constants = {"SIDE": side, "PARTS": parts, "TRANSPOSE_X": turned_x, "TRANSPOSE_W": turned_w, "BITS": bits,
                 "BIAS": 1, "WHOLE": M % side == N % side == K % 16 == 0}
    arrays = [*dense(weight.T if turned_w else weight, bits), bias, x.T if turned_x else x, zeros(parts, M, N)]
    found, = run("matmul_tiled", constants, sizes, arrays, (-(-N // side), -(-M // side), parts), [6])
    expected = x.astype(np.float64) @ weight.T.astype(np.float64) + bias
    assert near(found.astype(np.float64).sum(0), expected)
    depth = -(-K // (16 * parts)) * 16  # of a part
    assert near(found[1], x[:, depth:2 * depth].astype(np.float64) @ weight[:, depth:2 * depth].T)
    before = numbers(M, N, seed=3)
    found, = run("sum_parts", {"ACCUMULATE": 1}, (parts, M * N), [found, before], elements(M * N), [2])
    assert near(found, expected + before)


@pytest.mark.parametrize("kernel, turned, bits, group, scale_bits", [
    ("matmul", 0, 2, 64, 32), ("matmul", 1, 3, 32, 16), ("matmul", 0, 4, 128, 16), ("matmul", 1, 5, 64, 16),
    ("matmul", 0, 6, 32, 32), ("matmul", 1, 8, 128, 32), (64, 0, 3, 64, 16), (64, 1, 4, 32, 16), (64, 0, 8, 32, 32),
    (128, 0, 4, 64, 16)])
def test_matmul_packed(kernel, turned, bits, group, scale_bits):
    """As mx.quantized_matmul: the product, and with transposed weights the gradient of x."""
    for M, rows, width in ((5, 39, 256), (70, 130, 384), (8, 36, 256)):
        matrix, constants, parts = packed(rows, width, bits, group, scale_bits)
        N, K = (width, rows) if turned else (rows, width)
        x = numbers(M, K, seed=3)
        settings = constants | {"TRANSPOSE_W": turned, "WHOLE": kernel == "matmul" and M % 4 == N % 4 == K % 4 == 0}
        found = matmul(kernel, settings, (M, N, K), matrix, NONE, x, zeros(M, N))
        expected = mx.quantized_matmul(mx.array(x), *parts, transpose=not turned, group_size=group, bits=bits)
        assert near(found, expected, 5e-6)


VECTORS = ("matvec", "matvec_subgroup")


@cache
def rows_of_a_workgroup(kernel: str) -> int:
    """The numbers of y that a workgroup computes, which may depend on the size of a subgroup."""
    if kernel != "matvec" and "subgroup" not in wgsl.device().features:
        pytest.skip("an adapter without subgroups")
    matrix, constants, _ = packed(512, 128, 4, 64, 16)
    more, of_norm = around(kernel)
    y, = run(kernel, constants, (512, 128, *more), [*matrix, NONE, numbers(128), zeros(512), *of_norm], (1, 1), [6])
    return int(np.count_nonzero(y))


def around(kernel: str, eps=0.0, weight=NONE, bias=NONE):
    """The uniforms and arrays of vector.wgsl, which the kernels of subgroups have beside those of matvec.wgsl."""
    return ((), ()) if kernel == "matvec" else ((eps,), (weight, bias))


def matvec(kernel: str, constants: dict, sizes: tuple, matrix: list, bias, x, y=None, more=None) -> np.ndarray:
    groups, (eps, of_norm) = elements(sizes[0], rows_of_a_workgroup(kernel)), more or around(kernel)
    y = zeros(sizes[0]) if y is None else y
    return run(kernel, constants, (*sizes, *eps), [*matrix, bias, x, y, *of_norm], groups, [6])[0]


@pytest.mark.parametrize("kernel", VECTORS)
@pytest.mark.parametrize("bits, bias", [(32, True), (16, False)])
def test_matvec(kernel, bits, bias):
    for N, K in ((1, 1), (5, 3), (33, 67), (130, 129), (7, 320)):
        x, weight, b = numbers(K), weights_of(bits, (N, K)), numbers(N, seed=2)
        found = matvec(kernel, {"BITS": bits, "BIAS": bias}, (N, K), dense(weight, bits), b, x)
        assert near(found, weight.astype(np.float64) @ x + bias * b), (N, K)


@pytest.mark.parametrize("kernel, bits, group, scale_bits", [
    *((kernel, *each) for kernel in VECTORS for each in PACKED),
    *(("matvec_packed", *each) for each in PACKED if each[0] in (4, 8))])
def test_matvec_packed(kernel, bits, group, scale_bits):
    """As mx.quantized_matmul of one row, and a bias."""
    for N, K in ((3, 3 * group), (261, 384)):
        matrix, constants, parts = packed(N, K, bits, group, scale_bits)
        x, bias = numbers(1, K, seed=3), numbers(N, seed=4)
        found = matvec(kernel, constants | {"BIAS": True}, (N, K), matrix, bias, x)
        expected = mx.quantized_matmul(mx.array(x), *parts, group_size=group, bits=bits)[0] + mx.array(bias)
        assert near(found, expected, 5e-6)


@pytest.mark.parametrize("kernel, bits", [("matvec_subgroup", 32), ("matvec_subgroup", 16), ("matvec_subgroup", 3),
                                          ("matvec_packed", 4), ("matvec_packed", 8)])
def test_around_a_product(kernel, bits):
    """The norm of x or its activation before the product, and the sum with y after it, as in float64 and MLX."""
    N, K, group, eps = 37, 128, 32, 0.003
    weight, bias, before = weights_of(bits, (N, K)), numbers(N, seed=2), 3 * numbers(N, seed=3)
    matrix, constants = dense(weight, bits), {"BITS": bits, "BIAS": True}
    if bits < 16:
        matrix, of_packed, parts = packed(N, K, bits, group, 16)
        constants, weight = constants | of_packed, np.array(mx.dequantize(*parts, group, bits))
    weight = weight.astype(np.float64)
    x, scale, shift = numbers(K, scale=0.2) + 0.5, 1 + numbers(K, seed=5), numbers(K, seed=6)
    for layer in (False, True):
        wide = x.astype(np.float64) - layer * x.mean(dtype=np.float64)
        normed = wide / np.sqrt((wide * wide).mean() + eps) * scale + layer * shift
        found = matvec(kernel, constants | {"NORM": 1 + layer}, (N, K), matrix, bias, x,
                       more=around(kernel, eps, scale, shift))
        assert near(found, weight @ normed + bias, 1e-5)
    names = ("relu2", "gelu", "gelu_tanh", "swiglu", "geglu", "swiglu_clip")
    for kind, name in enumerate(names):
        inputs = numbers(2 if name in model.GATED else 1, K, seed=7, scale=2)
        found = matvec(kernel, constants | {"ACTIVATES": True, "KIND": kind, "ACCUMULATE": True}, (N, K), matrix, bias,
                       inputs, before)
        active = np.array(model.ACTIVATIONS[name](*map(mx.array, inputs)))
        assert near(found, weight @ active + bias + before, 1e-5), name


@pytest.mark.parametrize("bits, group, scale_bits", [(32, 0, 0), (16, 0, 0), *PACKED])
def test_embed(bits, group, scale_bits):
    """Rows of a matrix in any format, as MLX unpacks them, and positions from at[0] on for each sequence."""
    V, T, width = 11, 3, 7 if bits in (16, 32) else 2 * group
    if bits in (16, 32):
        table, constants = weights_of(bits, (V, width)), {"BITS": bits}
        matrix = dense(table, bits)
    else:
        matrix, constants, parts = packed(V, width, bits, group, scale_bits)
        table = np.array(mx.dequantize(*parts, group, bits))
    tokens, positions = np.array([10, 0, 3, 3, 9, 10], np.uint32), numbers(8, width, seed=5)
    for learned in (True, False):
        if not learned and bits == 3:  # a few cases are enough
            continue
        arrays = [*matrix, np.array([5], np.uint32), tokens, positions, zeros(6, width)]
        found, = run("embed", constants | {"LEARNED": learned}, (6, T, width, 1.5, 0, V), arrays,
                     elements(6 * -(-width // 4)), [7])
        expected = 1.5 * table[tokens] + (np.tile(positions[5:8], (2, 1)) if learned else 0)
        assert near(found, expected, 3e-7)


# ---- norms and activations -------------------------------------------------------------------------------------------

WIDTHS = [(5, 1), (1, 3), (7, 65), (3, 130), (2, 256), (67, 24)]  # R, C


def norm(layer: bool, eps: float):
    """(x, weight, bias) -> y in MLX."""
    if layer:
        return lambda x, weight, bias: mx.fast.layer_norm(x, weight, bias, eps)
    return lambda x, weight, bias: mx.fast.rms_norm(x, weight, eps) + bias


@pytest.mark.parametrize("layer, bias, add", [(0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_norm(layer, bias, add):
    """As MLX's norms, also of x that is small beside eps, or far from 0; with ADD, x holds the sum afterwards."""
    for seed, (R, C) in enumerate(WIDTHS):
        x, more, weight, b = numbers(R, C, seed=seed, scale=0.1), numbers(R, C, seed=9), numbers(C, seed=8), numbers(C)
        x += layer * 3
        more *= 0.02
        eps = 1e-5 if seed % 2 else 0.003
        now, y = run("norm", {"LAYER": layer, "ADD": add, "BIAS": bias}, (R, C, eps), [weight, b, more, x, zeros(R, C)],
                     R, [4, 5])
        assert near(now, x + add * more, 1e-7)
        wide = (x + add * more).astype(np.float64)  # in float64, as MLX's variance of numbers far from 0 is less exact
        wide -= layer * wide.mean(-1, keepdims=True)
        expected = wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + eps) * weight + bias * b
        by_mlx = norm(layer, eps)(*map(mx.array, (x + add * more, weight, bias * b)))
        assert near(by_mlx, expected, 3e-5) and near(y, expected, 1e-5), (R, C)


@pytest.mark.parametrize("layer, add", [(0, 0), (0, 1), (1, 1), (1, 0)])
def test_norm_backward(layer, add):
    """Gradients of x, and of weight and bias, which need the statistics of the first kernel."""
    for seed, (R, C) in enumerate(WIDTHS):
        x, weight, dy, before = numbers(R, C, seed=seed), numbers(C, seed=8), numbers(R, C, seed=7), numbers(R, C)
        x, eps = x * 0.1 + layer * 0.2, 1e-5 if seed % 2 else 0.003
        dx, statistics = run("norm_backward", {"LAYER": layer, "ADD": add}, (R, C, eps),
                             [weight, x, dy, before, zeros(R, 2)], R, [4, 5])
        groups = (elements(C, 16), 1)
        d_weight, = run("column_sum", {"NORM": True}, (R, C), [x, dy, statistics, zeros(C)], groups, [4])
        d_bias, = run("column_sum", {}, (R, C), [x, dy, statistics, zeros(C)], groups, [4])
        expected = grad(norm(layer, eps), x, weight, zeros(C), cotangent=dy)
        assert near(dx, expected[0] + add * before, 1e-5), (R, C)
        assert near(d_weight, expected[1], 1e-5) and near(d_bias, expected[2]), (R, C)


@pytest.mark.parametrize("kind", range(6))
def test_activation(kind):
    """As model.py's activations and their gradients, also of large numbers; nothing is NaN where exp() overflows."""
    name = ("relu2", "gelu", "gelu_tanh", "swiglu", "geglu", "swiglu_clip")[kind]
    act, n = model.ACTIVATIONS[name], 403
    x, gate, dy = numbers(n, scale=2), numbers(n, seed=1, scale=2), numbers(n, seed=2)
    x[:8], gate[8:16] = (-100, -30, -9, -1e-4, 0, 9, 30, 100), (-100, -30, -9, -1e-4, 0, 9, 30, 100)
    y, = run("activation", {"KIND": kind}, (n,), [gate, x, zeros(n)], elements(-(-n // 4)), [3])
    inputs = (gate, x) if name in model.GATED else (x,)
    assert np.abs(y - np.array(act(*map(mx.array, inputs)))).max() <= 1e-6 * np.abs(y[16:]).max()
    dx, d_gate = run("activation_backward", {"KIND": kind}, (n,), [gate, x, dy, zeros(n)], elements(n), [3, 4])
    *d_gates, d_x = grad(act, *inputs, cotangent=dy)
    assert near(dx, d_x)
    assert near(d_gate, d_gates[0]) if d_gates else not d_gate.any()


@pytest.mark.parametrize("P", [1, 3, 70])
def test_column_sum_of_many_rows(P):
    """1,000 rows, and one column more than a workgroup computes; each part has the rows of some workgroups, or none."""
    dy = numbers(1000, 17)
    parts, = run("column_sum", {}, (1000, 17), [NONE.view(np.float32), dy, zeros(2), zeros(P, 17)], (2, P), [4])
    for before in (zeros(17), 100 * numbers(17, seed=1)):
        found, = run("sum_parts", {"ACCUMULATE": before.any()}, (P, 17), [parts, before], 1, [2])
        assert near(found, dy.astype(np.float64).sum(0) + before)


# ---- Mixture of Depths -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True])
def test_depth_gate(soft):
    """The factors of all tokens, and whether each is taken, by rows or by positions from 4 on; the last is padding."""
    R, T = 6, 3
    likely, r, before = numbers(R), numbers(R, seed=1), np.full(9, 7, np.uint32)
    at, threshold = np.array([4, 2], np.uint32), np.float32([np.sort(likely)[2]])
    arrays = [at, threshold, likely, r, zeros(R), before]
    gate, taken = run("depth_gate", {"SOFT": soft}, (R, T), arrays, elements(R), [5, 6])
    chosen = likely > threshold
    assert 0 < chosen.sum() < R and near(gate, 1 / (1 + np.exp(-r)) if soft else r * chosen)
    expected = before.copy()
    if not soft:
        expected[[0, 1, 3, 4]] = chosen[[0, 1, 3, 4]]
    assert np.array_equal(taken, expected)
    if not soft:
        arrays = [at, threshold, likely[:T], r[:T], zeros(T), before]
        _, taken = run("depth_gate", {"CACHE": True}, (T, T), arrays, elements(T), [5, 6])
        assert np.array_equal(taken, [7, 7, 7, 7, *chosen[:2], 7, 7, 7])


def test_depth_leave():
    entered, stream, y = (numbers(5, 67, seed=seed) for seed in range(3))
    gate = np.float32([0, -0.5, 0, 1, 0.3])
    y[2] = np.inf  # of a token that was not chosen
    found, = run("depth_leave", {}, (5, 67), [entered, gate, stream, y], elements(335), [4])
    assert np.array_equal(found[gate == 0], entered[gate == 0])
    entered, gate, stream, y, found = (array[gate != 0] for array in (entered, gate, stream, y, found))
    assert near(found, entered + gate[:, None] * (stream + y - entered))


@pytest.mark.parametrize("mean", [False, True])
def test_depth_blank(mean):
    x, taken = numbers(2, 4, 67), np.array([[0, 1, 0, 1], [0, 0, 0, 0]], np.uint32)
    found, = run("depth_blank", {"MEAN": mean}, (2, 4, 67), [taken, x], elements(134), [2])
    expected = np.where(taken[..., None] == 0, 0, x)
    if mean:
        expected[0, [0, 2]] = x[0, [1, 3]].mean(0)
    assert near(found, expected)


@pytest.mark.parametrize("T, start, window, cap, slope", [(70, 0, 0, 0, 0), (5, 90, 0, 3, 0.2), (9, 80, 70, 0, 0.1)])
def test_depth_attention(T, start, window, cap, slope):
    """Against softmax in float64 over the keys that are taken and the query's own, and the map of taken tokens."""
    H, KV, D, S = 4, 2, 10, start + T + 3
    B = 1 if start else 2
    q, k, v = numbers(B, T, H, D), numbers(B, S, KV, D, seed=1), numbers(B, S, KV, D, seed=2)
    taken = np.random.default_rng(T).integers(0, 2, (B, S)).astype(np.uint32)
    slopes = np.float32(slope * np.arange(1, H + 1))
    arrays = [np.uint32([start, T]), slopes, q, k, v, taken, zeros(B, T, H, D), zeros(B, T, H)]
    o, lse = run("depth_attention", {"WIDTH": 16}, (T, S, H, KV, D, window, 0.5, float(cap)), arrays, (T, H, B), [7, 8])
    keys, places = np.arange(S), start + np.arange(T)[:, None]
    seen = (keys <= places) & ((taken[:, None] != 0) | (keys == places))
    if window:
        seen &= places - keys < window
    scores = 0.5 * np.einsum("bthd,bshd->bhts", q.astype(np.float64), np.repeat(k, H // KV, axis=2))
    if cap:
        scores = cap * np.tanh(scores / cap)
    scores = np.where(seen[:, None], scores - slopes[:, None, None] * (places - keys), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    total = weights.sum(-1, keepdims=True)
    assert near(o, np.einsum("bhts,bshd->bthd", weights / total, np.repeat(v, H // KV, axis=2)), 2e-5)
    assert near(lse, (np.log(total) + scores.max(-1, keepdims=True))[..., 0].swapaxes(1, 2), 2e-5)


def test_depth_map():
    weights, taken = numbers(3, 9, 9), np.uint32([1, 0, 1, 1, 0, 0, 1, 0, 1])
    found, = run("depth_map", {}, (3, 9), [taken, weights], elements(243), [2])
    assert np.array_equal(found, weights * taken[:, None] * taken)


# ---- experts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("balance", [False, True])
def test_experts_route(balance):
    """Against a sort in numpy: the k largest, of which several are equal; one expert alone; balance chooses only."""
    for seed, (R, E, k) in enumerate([(3, 5, 2), (70, 9, 1), (2, 66, 66), (1, 1, 1)]):
        logits, bias = 3 * numbers(R, E, seed=seed), numbers(E, seed=9)
        logits[0] = logits[0, 0]
        chosen, gates = run("experts_route", {"BALANCE": balance}, (R, E, k),
                            [logits, bias, np.zeros((R, k), np.uint32), zeros(R, k)], elements(R), [3, 4])
        p = np.exp(logits - logits.max(-1, keepdims=True), dtype=np.float64)
        p /= p.sum(-1, keepdims=True)
        expected = np.argsort(-(p + bias * balance), axis=-1, kind="stable")[:, :k]
        share = np.take_along_axis(p, expected, axis=-1)
        assert np.array_equal(chosen, expected)
        assert near(gates, share / share.sum(-1, keepdims=True) if k > 1 else share, 1e-5)


def sort_pairs(chosen: np.ndarray, E: int) -> tuple[np.ndarray, int]:
    """experts_sort.wgsl: its result, and the number of blocks."""
    P = chosen.size
    blocks = -(-P // 32) + E
    found, = run("experts_sort", {}, (P, E, blocks), [chosen, np.full(blocks * 33 + P, 7, np.uint32)], (1, 1), [2])
    return found, blocks


@pytest.mark.parametrize("P, E", [(70, 3), (64, 130), (200, 1), (96, 2)])
def test_experts_sort(P, E):
    """Each pair has a row, in a block of its expert; all other rows are empty, and stand behind it in their block."""
    chosen = np.random.default_rng(P).integers(0, E, P).astype(np.uint32)
    found, blocks = sort_pairs(chosen, E)
    expert, pairs, rows = np.split(found, [blocks, blocks * 33])
    assert np.array_equal(pairs[rows], np.arange(P)) and np.array_equal(expert[rows // 32], chosen)
    used = pairs.reshape(blocks, 32)[expert < E]
    assert (used < 2**32 - 1).sum() == P and np.array_equal(used, np.sort(used, axis=1))
    assert (expert[np.bincount(rows // 32, minlength=blocks) == 0] == E).all()


@pytest.mark.parametrize("bits, ordered", [(32, False), (16, True), (4, False), (3, True)])
def test_experts_products(bits, ordered):
    """Pairs of a token and an expert, as they come and in sorted rows, with one row of x for each token or for each
    pair, against a loop over pairs in float64."""
    E, N, K, R, k = (4, 37, 64, 25, 3) if bits < 16 else (4, 37, 30, 25, 3)
    rng, P = np.random.default_rng(bits), R * k
    chosen = np.argsort(rng.random((R, E)), axis=1)[:, :k].astype(np.uint32).reshape(-1)
    order = np.stack([rng.permutation(K) for _ in range(E)]).astype(np.uint32) if ordered else NONE
    bias, constants = numbers(E, N, seed=2), {"BITS": bits, "BIAS": True, "ORDER": ordered}
    if bits < 16:
        matrix, more, parts = packed(E * N, K, bits, 32, 16)
        weight, constants = np.array(mx.dequantize(*parts, 32, bits)).reshape(E, N, K), constants | more
    else:
        weight = weights_of(bits, (E * N, K)).reshape(E, N, K)
        matrix = dense(weight, bits)
    sorted_pairs, blocks = sort_pairs(chosen, E)
    row = sorted_pairs[blocks * 33:]
    for share in (k, 1):  # a row of x for each token, or for each pair
        x = numbers(P // share, K, seed=share)

        def column_order(e):
            return order[e] if ordered else np.arange(K)

        expected = np.stack([weight[e].astype(np.float64) @ x[i // share][column_order(e)] + bias[e]
                             for i, e in enumerate(chosen)])
        found, = run("experts_matvec", constants, (N, K, share), [*matrix, bias, x, zeros(P, N), chosen, order],
                     (elements(N, 4), P), [6])
        assert near(found, expected)
        if share == 1:
            rows = np.full((blocks * 32, K), 1e30, np.float32)  # in rows without a pair
            rows[row] = x
            x = rows
        found, = run("experts_matmul", constants, (N, K, E, blocks, share if share > 1 else 0),
                     [*matrix, bias, x, zeros(blocks * 32, N), sorted_pairs, order], (elements(N, 32), blocks), [6])
        assert near(found[row], expected)


@pytest.mark.parametrize("is_sorted", [False, True])
def test_experts_sum(is_sorted):
    R, k, C = 5, 3, 67
    gates, row = numbers(R, k), np.random.default_rng(0).permutation(40)[:R * k].astype(np.uint32)
    rows = numbers(40, C, seed=1)
    found, = run("experts_sum", {"SORTED": is_sorted}, (R, k, C, 2), [gates, np.append([9, 9], row).astype(np.uint32),
                 rows, zeros(R, C)], elements(R * C), [4])
    outputs = rows[row if is_sorted else np.arange(R * k)].reshape(R, k, C)
    assert near(found, (gates[..., None] * outputs).sum(1))


# ---- positions -------------------------------------------------------------------------------------------------------


def frequencies(R: int) -> np.ndarray:
    return 10000.0 ** (-np.arange(0, R, 2) / R)


def turns(R: int, room: int) -> np.ndarray:
    """Cosine and sine of each position and pair: (room, R / 2, 2)."""
    angle = np.arange(room)[:, None] * frequencies(R)
    return np.stack([np.cos(angle), np.sin(angle)], -1).astype(np.float32)


def rope(x, B: int, first: int, R: int):
    """model.py's rope() of (B T, H, D), of which R numbers turn."""
    x = mx.array(x).reshape(B, -1, *x.shape[1:]).swapaxes(1, 2)
    y = model.rope(x, mx.array(1 / frequencies(R), dtype=mx.float32), first)
    return y.swapaxes(1, 2).flatten(0, 1)


def heads_first(x: np.ndarray, B: int) -> np.ndarray:
    """(B T, H, D), as in the kernels, to (B, H, T, D), as in model.py."""
    return x.reshape(B, -1, *x.shape[1:]).swapaxes(1, 2)


def rows_first(x) -> np.ndarray:
    """(B, H, T, D) to (B T, H, D)."""
    x = np.array(x).swapaxes(1, 2)
    return x.reshape(-1, *x.shape[2:])


# B, T, H, D, first position, numbers that turn
ROPES = [(1, 1, 1, 2, 0, 2), (2, 5, 3, 6, 7, 6), (3, 4, 2, 64, 0, 64), (1, 7, 1, 130, 20, 130), (2, 3, 2, 8, 5, 2),
         (1, 4, 3, 80, 9, 32)]


def test_rope():
    """As model.py's rope() at any offset, with equal positions in all sequences."""
    for B, T, H, D, first, R in ROPES:
        x, before = numbers(B * T, H, D), numbers(B * T, H, D, seed=1)
        arrays = [np.array([first, T], np.uint32), turns(R, 40), x, before]
        y, = run("rope", {}, (B * T, T, H, D, R), arrays, elements(B * T * H * D // 2), [4])
        assert near(y, rope(x, B, first, R), 1e-5)


def test_rope_backward():
    """UNDO computes the gradient of rope(), which is its inverse."""
    for B, T, H, D, first, R in ROPES:
        x = numbers(B * T, H, D)
        at, size, n = np.array([first, T], np.uint32), (B * T, T, H, D, R), elements(B * T * H * D // 2)
        dx, = run("rope", {"UNDO": True}, size, [at, turns(R, 40), x, zeros(*x.shape)], n, [4])
        expected, = grad(partial(rope, B=B, first=first, R=R), x, cotangent=x)
        assert near(dx, expected, 1e-5)
        y, = run("rope", {}, size, [at, turns(R, 40), dx, zeros(*x.shape)], n, [4])
        assert near(y, x)


@pytest.mark.parametrize("turn", ["all", "some", "none"])
def test_rope_into_the_cache(turn):
    """A row is written to its position, rotated or not; padding is not written. Heads of odd width are only copied."""
    odd = [(4, 3, 2, 5, 2)] if turn == "none" else []
    for T, real, H, D, first in [(5, 3, 2, 6, 4), (1, 1, 3, 4, 9), (8, 8, 1, 34, 0), *odd]:
        R = {"all": D, "some": D // 2 // 2 * 2, "none": 0}[turn]
        x, cache = numbers(T, H, D), numbers(12, H, D, seed=1)
        arrays = [np.array([first, real], np.uint32), turns(R or 2, 12), x, cache]
        found, = run("rope", {"CACHE": True}, (T, T, H, D, R), arrays, elements(T * H * -(-D // 2)), [4])
        expected = cache.copy()
        expected[first:first + real] = np.array(rope(x, 1, first, R))[:real] if R else x[:real]
        assert near(found, expected, 1e-5)


def normed_and_turned(qkv: np.ndarray, weights: np.ndarray | None, H: int, KV: int, first: int, R: int, eps: float):
    """The queries and keys of a token's heads (H + 2 KV, D) at position `first`, (H + KV, D), with their norms, if they
    have weights (2, D), and R numbers rotated."""
    x = qkv[:H + KV].astype(np.float64)
    if weights is not None:
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * np.repeat(weights, [H, KV], axis=0)
    return np.array(rope(x[None].astype(np.float32), 1, first, R))[0] if R else x


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("H, KV, D, R", [
    (4, 2, 16, 16), (2, 2, 6, 4), (3, 1, 200, 64), (1, 1, 256, 256), (0, 2, 5, 0), (6, 3, 7, 0)])
def test_enter_cache(H, KV, D, R, normed):
    """The norms and rotary positions of a token's heads, and its rows of the caches; other rows do not change."""
    first, eps, qkv = 9, 0.003, numbers(H + 2 * KV, D)
    weights, caches = numbers(2, D, seed=1), numbers(2, 12, KV, D, seed=2)
    arrays = [np.array([first, 1], np.uint32), turns(R or 2, 12), *weights, qkv, zeros(max(H, 1), D), *caches]
    q, k, v = run("enter_cache", {"NORM": normed}, (H, KV, D, R, eps), arrays, (H + 2 * KV, 1), [6, 7, 8])
    x = normed_and_turned(qkv, weights if normed else None, H, KV, first, R, eps)
    expected = caches.copy()
    expected[0, first], expected[1, first] = x[H:], qkv[H + KV:]
    assert near(k, expected[0], 1e-5) and np.array_equal(v, expected[1]) and (not H or near(q, x[:H], 1e-5))


# ---- attention -------------------------------------------------------------------------------------------------------

# B, T, H, KV, D, position of the first query, window, whether ALiBi
PREFILLS = [
    (1, 1, 1, 1, 3, 0, 0, 0), (2, 5, 2, 2, 8, 0, 0, 0), (1, 67, 4, 2, 5, 0, 0, 0), (2, 9, 6, 2, 33, 0, 0, 1),
    (1, 130, 2, 1, 16, 0, 1, 0), (1, 131, 2, 1, 7, 0, 66, 0), (2, 70, 3, 3, 4, 0, 7, 1), (1, 12, 4, 1, 65, 0, 12, 0),
    (1, 6, 2, 2, 130, 0, 50, 1), (1, 7, 2, 1, 256, 0, 0, 0), (1, 66, 3, 1, 12, 0, 64, 1)]
CACHED = [
    (1, 1, 4, 2, 16, 70, 0, 0), (2, 3, 2, 1, 7, 5, 0, 0), (1, 1, 2, 2, 5, 129, 9, 1), (1, 6, 3, 1, 64, 65, 64, 0),
    (2, 5, 2, 2, 20, 3, 4, 0), (1, 1, 1, 1, 8, 63, 0, 1), (1, 1, 2, 1, 6, 40, 1, 0), (1, 7, 6, 3, 8, 130, 66, 1)]


class Case:
    """The inputs of one of the cases above for the kernels, and model.py's attention with these inputs."""

    def __init__(self, B, T, H, KV, D, first, window, alibi, seed=0, scale=1.5, **settings):
        self.B, self.T, self.H, self.KV, self.D, self.window, self.seen = B, T, H, KV, D, window, first + T
        self.room, self.first = self.seen + 3 * (first > 0), first
        self.q = numbers(B * T, H, D, seed=seed, scale=scale)
        self.k, self.v = (numbers(B * self.room, KV, D, seed=seed + i, scale=scale) for i in (1, 2))
        self.config = config = GPTConfig(n_head=H, n_kv_head=KV, n_embd=H * D, pos="none", sliding_window=window,
                                         alibi=bool(alibi), **settings)
        self.slopes = np.array(model.alibi_slopes(H), np.float32) if alibi else zeros(H)
        places = mx.arange(first, self.seen)[None]  # as an array, since an int makes no mask for a single query
        self.mask = model.score_mask(config, 0, T, places, mx.arange(self.seen))

    def outputs(self, q=None, k=None, v=None, sink=None) -> mx.array:
        """model.attend() of the kernels' shapes, (B T, H, D) and (B S, KV, D)."""
        q, k, v = (mx.array(x) if x is not None else mx.array(own) for x, own in (
            (q, self.q), (k, self.k), (v, self.v)))
        q, k, v = (x.reshape(self.B, -1, *x.shape[1:]).swapaxes(1, 2) for x in (q, k, v))
        y = model.attend(self.config, q, k[:, :, :self.seen], v[:, :, :self.seen], self.mask, sink)
        return y.swapaxes(1, 2).reshape(-1, self.H, self.D)

    def exact(self) -> tuple[np.ndarray, np.ndarray]:
        """In float64: the weights (B, H, T, keys), and the logarithms of their sums (B T, H)."""
        q, k = (heads_first(x.astype(np.float64), self.B) for x in (self.q, self.k))
        k = np.repeat(k[:, :, :self.seen], self.H // self.KV, 1)
        scores, bound = q @ k.swapaxes(2, 3) * self.scale, self.config.attn_softcap
        scores = (bound * np.tanh(scores / bound) if bound else scores) + np.array(self.mask)
        top = scores.max(-1, keepdims=True)
        total = np.exp(scores - top).sum(-1, keepdims=True)
        return np.exp(scores - top) / total, rows_first(top + np.log(total))[..., 0]

    @property
    def scale(self) -> float:
        return self.config.attn_scale or self.D**-0.5

    def params(self, *more) -> tuple:
        return (self.T, *more, self.H, self.KV, self.D, self.window, self.scale)

    def attention(self, name="attention", size=4) -> tuple[np.ndarray, np.ndarray]:
        arrays = [np.array([self.first], np.uint32), self.slopes, self.q, self.k, self.v, zeros(*self.q.shape),
                  zeros(*self.q.shape[:2])]
        groups = elements(self.T, size), self.H, self.B
        params = (*self.params(self.room), self.config.attn_softcap)
        return run(name, {"WIDTH": self.D}, params, arrays, groups, [6, 7])


@pytest.mark.parametrize("case", PREFILLS + CACHED, ids=str)
def test_attention(case):
    """As model.attend() with score_mask(): windows, ALiBi, grouped heads, a cache with unused rows; and the logarithm
    of each softmax's sum."""
    case = Case(*case)
    o, lse = case.attention()
    assert near(o, case.outputs(), 1e-5)
    assert near(lse, case.exact()[1])


TILED = [case for case in PREFILLS + CACHED if case[4] % 4 == 0 and case[4] <= 128] + [
    (2, 130, 4, 2, 64, 0, 0, 0), (1, 150, 2, 1, 128, 0, 70, 0), (1, 65, 2, 2, 68, 64, 0, 1),
    (1, 200, 2, 1, 40, 190, 33, 0), (2, 140, 2, 1, 72, 0, 65, 1),
    (1, 140, 1, 1, 8, 0, 66, 0)]  # the last: a query of the next tile sees the last of 64 keys


@pytest.mark.parametrize("case", TILED, ids=str)
@pytest.mark.parametrize("settings", [{}, dict(attn_softcap=2.0, attn_scale=0.7)], ids=str)
def test_attention_in_tiles(case, settings):
    case = Case(*case, **settings)
    o, lse = case.attention("attention_tiled", 64)
    assert near(o, case.outputs(), 1e-5)
    assert near(lse, case.exact()[1])


def test_attention_in_tiles_of_large_scores():
    case = Case(1, 70, 2, 1, 8, 0, 0, 0, scale=20)
    o, lse = case.attention("attention_tiled", 64)
    assert near(o, case.outputs(), 3e-5) and near(lse, case.exact()[1])


ONE = [(1, 1, 4, 2, 16, 70, 0, 0), (1, 1, 2, 2, 4, 0, 0, 0), (1, 1, 2, 1, 12, 255, 0, 1), (1, 1, 6, 3, 64, 700, 0, 0),
       (1, 1, 2, 1, 256, 513, 40, 0), (1, 1, 1, 1, 128, 256, 1, 0), (1, 1, 2, 2, 20, 300, 290, 1)]


@pytest.mark.parametrize("case", ONE, ids=str)
@pytest.mark.parametrize("settings", [{}, dict(attn_softcap=2.0, attn_scale=0.7)], ids=str)
def test_attention_of_one_query(case, settings):
    """As attention.wgsl's, for one query: few keys and several times as many as there are threads."""
    case = Case(*case, **settings)
    arrays = [np.array([case.first], np.uint32), case.slopes, NONE, NONE, case.q, case.k, case.v, zeros(*case.q.shape)]
    params = (*case.params()[1:], case.config.attn_softcap, 0, 0.0)
    k, v, o = run("attention_one", {}, params, arrays, (case.H, 1), [6, 7, 8])
    assert near(o, case.outputs(), 1e-5) and np.array_equal(k, case.k) and np.array_equal(v, case.v)


@pytest.mark.parametrize("case", ONE, ids=str)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_attention_of_one_query_that_enters(case, normed, share):
    """The same with the token's norms and rotary positions of a share of its numbers, and its rows of the caches."""
    case = Case(*case, attn_softcap=3.0)
    H, KV, D, first, eps = case.H, case.KV, case.D, case.first, 0.003
    R = 0 if case.config.alibi else int(share * D) // 2 * 2
    qkv, weights = numbers(H + 2 * KV, D, seed=7, scale=1.5), numbers(2, D, seed=8)
    places = turns(R, first + 1) if R else case.slopes
    arrays = [np.array([first], np.uint32), places, *weights, qkv, case.k, case.v, zeros(H, D)]
    params = (*case.params()[1:], case.config.attn_softcap, R, eps)
    found = run("attention_one", {"ENTERS": True, "NORM": normed}, params, arrays, (H, 1), [6, 7, 8])
    x = normed_and_turned(qkv, weights if normed else None, H, KV, first, R, eps)
    k, v = case.k.copy(), case.v.copy()
    k[first], v[first] = x[H:], qkv[H + KV:]
    assert near(found[0], k, 3e-5) and np.array_equal(found[1], v)
    assert near(found[2], case.outputs(x[None, :H].astype(np.float32), k, v)[0], 2e-5)


@pytest.mark.parametrize("settings", [
    dict(attn_scale=0.7), dict(attn_softcap=2.0), dict(attn_softcap=9.0, attn_scale=0.1)], ids=str)
def test_scaled_and_bounded_scores(settings):
    """Another factor of the scores, and Gemma 2's bound, beside a window, ALiBi and a cache."""
    for sizes in (PREFILLS[6], PREFILLS[3], CACHED[2]):
        case = Case(*sizes, **settings)
        o, lse = case.attention()
        weights, exact = case.exact()
        assert near(o, case.outputs(), 1e-5) and near(lse, exact)
        if case.B == 1 and not case.first:
            arrays = [case.slopes, case.q, case.k, lse, zeros(case.H, case.T, case.T)]
            found, = run("attention_map", {}, (*case.params(), case.config.attn_softcap), arrays,
                         elements(case.H * case.T * case.T), [5])
            assert near(found, weights[0], 1e-5)


def test_attention_of_large_scores():
    """Scores of hundreds, for which a softmax is finite only if it subtracts the largest score so far."""
    case = Case(1, 70, 2, 1, 8, 0, 0, 0, scale=20)
    o, lse = case.attention()
    assert np.abs(case.exact()[1]).max() > 200
    assert near(o, case.outputs(), 3e-5) and near(lse, case.exact()[1])


@pytest.mark.parametrize("name, size, case", [("", 4, case) for case in PREFILLS] + [
    ("_tiled", 64, case) for case in TILED if not case[5]], ids=str)
def test_attention_backward(name, size, case):
    """Gradients of queries, keys and values; the first half of lse_delta does not change."""
    case, d_o = Case(*case), numbers(*Case(*case).q.shape, seed=5)
    o, lse = case.attention()
    before = np.concatenate([lse, np.full_like(lse, 7)])
    lse_delta, dq = run("attention_backward_q" + name, {"WIDTH": case.D}, case.params(),
                        [case.slopes, case.q, case.k, case.v, o, d_o, before, zeros(*case.q.shape)],
                        (elements(case.T, size), case.H, case.B), [7, 8])
    assert np.array_equal(lse_delta[:len(lse)], lse)
    dk, dv = run("attention_backward_kv" + name, {"WIDTH": case.D}, case.params(),
                 [case.slopes, case.q, case.k, case.v, d_o, lse_delta, zeros(*case.k.shape), zeros(*case.k.shape)],
                 (elements(case.T, size), case.KV, case.B), [7, 8])
    for found, expected in zip((dq, dk, dv), grad(case.outputs, case.q, case.k, case.v, cotangent=d_o), strict=True):
        assert near(found, expected, 1e-5) or np.abs(found - expected).max() < 4e-6  # of a single key: 0, of sums of 10


@pytest.mark.parametrize("case", [case for case in PREFILLS if case[0] == 1], ids=str)
def test_attention_map(case):
    case = Case(*case)
    weights, lse = case.exact()
    arrays = [case.slopes, case.q, case.k, lse.astype(np.float32), zeros(case.H, case.T, case.T) + 7]
    found, = run("attention_map", {}, (*case.params(), 0.0), arrays, elements(case.H * case.T * case.T), [5])
    assert near(found, weights[0], 1e-5)


@pytest.mark.parametrize("shift", [0, 40])
@pytest.mark.parametrize("case", [PREFILLS[3], PREFILLS[6], CACHED[2]], ids=str)
def test_sink_logits(case, shift):
    """A logit for each head in the softmax, as in model.attend(), also one that is far larger than all scores. The sum
    of what the other kernel gives for each query is the gradient of the logits."""
    case = Case(*case)
    R, H, sink = case.B * case.T, case.H, numbers(case.H, seed=9) + np.float32(shift)
    o, lse = run("sink_logits", {}, (R, H, case.D), [sink, *case.attention()], elements(R * H), [2, 3])
    assert near(lse, np.logaddexp(case.exact()[1], sink)) and np.abs(o - case.outputs(sink=mx.array(sink))).max() < 1e-5
    d_o = numbers(*o.shape, seed=5)
    arrays = [sink, np.concatenate([lse, (d_o * o).sum(-1)]), zeros(R, H)]
    each, = run("sink_logits_backward", {}, (R, H), arrays, elements(R * H), [3])
    expected, = grad(lambda sink: case.outputs(sink=sink), sink, cotangent=d_o)
    assert np.abs(each.sum(0) - expected).max() < 1e-5


@pytest.mark.parametrize("case", [
    (2, 23, 4, 2, 12, 0, 5, 0), (1, 20, 3, 1, 8, 0, 4, 1), (1, 19, 2, 2, 10, 0, 7, 0), (1, 6, 2, 1, 7, 30, 2, 1),
    (2, 1, 2, 1, 10, 9, 3, 0)], ids=str)
def test_sinks(case):
    """Three first keys beside a window, as in model.py: with rotary positions or ALiBi, a cache, grouped heads."""
    case = Case(*case, sinks=3, attn_softcap=2.0 * case[7])
    H, T, D, seen, half = case.H, case.T, case.D, case.seen, 0 if case.config.alibi else case.D // 2 - 1
    inverse = 1 / np.linspace(0.3, 0.01, max(half, 1)).astype(np.float32)
    angles = np.arange(seen)[:, None] / inverse
    turns = np.stack([np.cos(angles), np.sin(angles)], -1).astype(np.float32) if half else NONE
    q, k, v = (heads_first(mx.array(x), case.B) for x in (case.q, case.k, case.v))
    if half:
        q, k = model.rope(q, mx.array(inverse), case.first), model.rope(k, mx.array(inverse), 0)
        case.q, case.k = rows_first(q), rows_first(k)
    k, v, places, keys = k[:, :, :seen], v[:, :, :seen], mx.arange(case.first, seen)[None], mx.arange(seen)
    q, k = model.rope_to_sinks(case.config, q, k, mx.array(inverse), case.first, keys) if half else (q, k)
    mask = model.score_mask(case.config, 0, T, places, keys)
    weights = model.attention_weights(replace(case.config, attn_scale=D**-0.5), q, k, mask)
    uniforms = (case.B * T, T, case.room, H, case.KV, D, 2 * half, 3, case.window, D**-0.5, case.config.attn_softcap)
    arrays = [np.array([case.first], np.uint32), case.slopes, turns, case.q, case.k]
    o, lse = run("sinks", {}, uniforms, [*arrays, case.v, *case.attention()], elements(case.B * T * H), [7, 8])
    assert near(o, rows_first(model.weighed(weights, v)), 1e-5)
    if case.B == 1 and not case.first:
        found, = run("sinks_map", {}, uniforms, [*arrays, lse, zeros(H, T, T)], elements(H * T * 3), [7])
        distant = np.arange(T)[:, None] - np.arange(T) >= case.window
        assert near(found, np.where(distant, np.array(weights)[0], 0), 1e-5) and found.any()


@pytest.mark.parametrize("case", [PREFILLS[3], PREFILLS[6], CACHED[3], CACHED[4]], ids=str)
def test_joined_values(case):
    """Differential attention's first version: two neighbouring heads of values are one of twice the width."""
    case = Case(*case[:2], 2 * case[3], 2 * case[3], *case[4:])
    q, k, v = (heads_first(mx.array(x), case.B) for x in (case.q, case.k, case.v))
    pairs = model.values_of_pairs(replace(case.config, diff_attn=True), v[:, :, :case.seen])
    expected = rows_first(model.attend(case.config, q, k[:, :, :case.seen], pairs, case.mask))
    arrays = [np.array([case.first], np.uint32), case.slopes, case.q, case.k, case.v, zeros(*expected.shape),
              zeros(*case.q.shape[:2])]
    o, lse = run("attention", {"WIDTH": 2 * case.D, "JOINED": 2}, (*case.params(case.room), 0.0), arrays,
                 (elements(case.T, 4), case.H, case.B), [6, 7])
    assert near(o, expected, 1e-5) and near(lse, case.exact()[1])


@pytest.mark.parametrize("tokens", [False, True])
def test_diff(tokens):
    """The first of two neighbouring heads minus a share of the second: of outputs and of maps."""
    R, P, W = 9, 3, 10
    x, maps, scores = numbers(R, 2 * P, W), numbers(2 * P, R, R), numbers(R, P, seed=2) if tokens else numbers(1)
    share = 1 / (1 + np.exp(-scores)) if tokens else np.full((R, P), scores[0])
    found, = run("diff", {"TOKENS": tokens}, (R, P, W), [scores, x, zeros(R, P, W)], elements(R * P * W), [3])
    assert near(found, x[:, 0::2] - share[..., None] * x[:, 1::2], 1e-6)
    found, = run("diff_map", {"TOKENS": tokens}, (P, R), [scores, maps, zeros(P, R, R)], elements(P * R * R), [3])
    assert near(found, maps[0::2] - share.T[..., None] * maps[1::2], 1e-6)


def test_values():
    """Mixed with those of the first layer; with gated embeddings of the tokens. The gates read the first columns."""
    R, KV, D = 7, 3, 10
    v, first, gate, mix = numbers(R, KV, D), numbers(R, KV, D, seed=1), numbers(R, KV, seed=2), numbers(2, seed=3)
    found, = run("value_mix", {}, (v.size,), [mix, first, v], elements(v.size), [3])
    assert near(found, mix[0] * v + mix[1] * first, 1e-6)
    found, = run("value_embed", {}, (R, KV, D), [gate, first, v], elements(v.size), [3])
    assert near(found, v + 2 / (1 + np.exp(-gate))[..., None] * first, 1e-6)
    found, = run("first_columns", {}, (R, KV * D, 8), [v, zeros(R, 8)], elements(R * 8), [2])
    assert np.array_equal(found, v.reshape(R, -1)[:, :8])


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("evaluate", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 2.5, 50.0])
def test_loss(evaluate, softcap):
    """Cross-entropy and the gradient of its mean, also of bounded logits, by float64 formulas; logits of hundreds;
    EVALUATE leaves them."""
    for R, V in ((1, 1), (5, 3), (4, 128), (7, 300)):
        logits, targets = numbers(R, V, seed=R, scale=3), np.random.default_rng(R).integers(0, V, R).astype(np.uint32)
        logits[0] += 300
        targets[-1] = V - 1
        uniforms, arrays = (R, V, 1 / R, softcap), [targets, logits, zeros(R)]
        after, losses = run("loss", {"EVALUATE": evaluate}, uniforms, arrays, R, [2, 3])

        wide = logits.astype(np.float64)
        slope = 1 - np.tanh(wide / softcap) ** 2 if softcap else 1
        wide = softcap * np.tanh(wide / softcap) if softcap else wide
        p = np.exp(wide - wide.max(-1, keepdims=True))
        exact = np.log(p.sum(-1)) + wide.max(-1) - wide[range(R), targets]
        assert np.abs(losses - exact).max() < 4e-5  # float32 of 300
        expected = (p / p.sum(-1, keepdims=True) - np.eye(V)[targets]) * slope / R
        assert np.abs(after - (logits if evaluate else expected)).max() < 1e-6


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap(softcap):
    """To the digits that float32 has of softcap; large numbers do not overflow."""
    y = np.concatenate([numbers(200), 1e-6 * numbers(20, seed=1), np.float32([0, 100, -100, 1e4, -1e4, 3e38, -3e38])])
    found, = run("softcap", {}, (len(y), softcap), [y], elements(len(y)), [1])
    np.testing.assert_allclose(found, softcap * np.tanh(y.astype(np.float64) / softcap), rtol=1e-6, atol=1e-7 * softcap)


@pytest.mark.parametrize("accumulate", [True, False])
def test_embed_backward(accumulate):
    """A scatter-add, by lists of the rows that hold an id."""
    for tokens, V, C, room in (([4], 5, 3, 1), ([2, 0, 2, 6, 2, 0], 7, 65, 6), ([1] * 40, 3, 4, 50)):
        dx, before = numbers(len(tokens), C), numbers(V, C, seed=1)
        ids, count = np.unique(tokens, return_counts=True)
        lists = np.full(1 + room + room + 1 + len(tokens), 2**32 - 1, np.uint32)
        lists[0], lists[1:1 + len(ids)] = len(ids), ids
        lists[1 + room:2 + room + len(ids)] = np.concatenate([[0], np.cumsum(count)])
        lists[2 + 2 * room:] = np.argsort(tokens, kind="stable")
        found, = run("embed_backward", {"ACCUMULATE": accumulate}, (C, room), [lists, dx, before], elements(room * C),
                     [3])
        expected = before.copy()
        expected[ids] *= accumulate
        np.add.at(expected, np.array(tokens), dx)
        assert near(found, expected)


@pytest.mark.parametrize("clip, scale", [(1.0, 1.0), (1.0, 1e-3), (0.0, 1.0), (0.3, 1e-9), (1e-6, 1e-7)])
def test_adamw(clip, scale):
    """Five updates as in train.py: clipping, weight decay of matrices, Adam, with short and long gradients."""
    b1, b2, decay = 0.9, 0.95, 0.1
    for shape, bias in (((3, 5), 4), ((300, 255), 130)):
        n, decayed = math.prod(shape) + bias, math.prod(shape)
        parameters = {"weight": mx.array(numbers(*shape)), "bias": mx.array(numbers(bias, seed=1))}
        x = np.concatenate([np.array(p).reshape(-1) for p in parameters.values()])
        opt, moments = optim.Adam(0.0, betas=[b1, b2], bias_correction=True), zeros(2 * n)
        for step in range(1, 6):
            rate = 0.01 / step
            g = numbers(n, seed=step, scale=scale)
            g[0] = 3 * scale
            parts, = run("sum_squares", {}, (n,), [g, zeros(256) + 7], (256, 1), [2])
            squares = (g.astype(np.float64)**2).sum()
            whole, = run("column_sum", {}, (256, 1), [NONE, parts, NONE, zeros(1)], (1, 1), [4])
            assert near(whole, [squares])
            now = np.array([rate, 1 - b1**step, math.sqrt(1 - b2**step)], np.float32)
            moments, x = run("adamw", {}, (n, decayed, clip, decay, b1, b2), [now, whole, g, moments, x], elements(n),
                             [4, 5])
            grads = {"weight": mx.array(g[:decayed].reshape(shape)), "bias": mx.array(g[decayed:])}
            grads, _ = optim.clip_grad_norm(grads, clip or math.inf)
            opt.learning_rate = mx.array(rate)
            parameters["weight"] *= 1 - decay * rate
            parameters = opt.apply_gradients(grads, parameters)
        expected = np.concatenate([np.array(p).reshape(-1) for p in parameters.values()])
        assert np.abs(x - expected).max() < 2e-6


# ---- what the page shows ---------------------------------------------------------------------------------------------


def test_top():
    """The five most probable tokens, of equal ones the first, without padding; log p, which includes padding."""
    for R, V, n in ((1, 5, 5), (3, 70, 67), (6, 300, 300), (2, 64, 63), (1, 64, 3), (2, 5003, 4990)):
        logits, targets, five = numbers(R, V, seed=V, scale=2), np.arange(R).astype(np.uint32) * 2, min(n, 5)
        logits[0, :n] = np.round(logits[0, :n])  # many equal logits
        logits[-1] += 200
        logits[:, n:] = 150 + logits[:, :1]      # padding, more probable than any token
        found, = run("top", {}, (R, V, n), [targets, logits, zeros(R, 16)], R, [3])
        wide = logits.astype(np.float64)
        p = np.exp(wide[:, :n] - wide[:, :n].max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        order = np.argsort(-wide[:, :n], -1, kind="stable")[:, :5]
        assert np.array_equal(found[:, :five], order)
        assert np.abs(found[:, 5:5 + five] - np.take_along_axis(p, order, -1)).max() < 1e-6
        assert not found[:, 5 + five:10].any()
        assert np.abs(found[:, 10] + (p * np.log2(p)).sum(-1)).max() < 1e-5
        log_p = wide - wide.max(-1, keepdims=True)
        log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
        assert np.abs(found[:, 11] - log_p[np.arange(R), targets]).max() < 3e-5
        assert not found[:, 12:].any()


@pytest.mark.parametrize("n", [1, 3])
def test_dot(n):
    for R, C in ((6, 1), (3, 67), (12, 130)):
        x, y = numbers(R, C), numbers(R // n, C, seed=1)
        found, = run("dot", {}, (R, C, n), [x, y, zeros(R)], R, [3])
        assert near(found, (x.astype(np.float64) * np.repeat(y, n, axis=0)).sum(-1), 1e-5)


def test_head_alone():
    """A row for each head of each position, with that head's columns only."""
    x = numbers(5, 3, 7)
    found, = run("head_alone", {}, (5, 3, 21), [x, zeros(15, 21)], elements(15 * 21), [2])
    assert np.array_equal(found.reshape(5, 3, 3, 7), x[:, None] * np.eye(3, dtype=np.float32)[..., None])


@pytest.mark.parametrize("layer", [False, True])
def test_norm_share(layer):
    """The shares of three addends sum to norm.wgsl's row of their sum; each is linear in its addend."""
    for R, C in ((1, 3), (7, 65), (2, 256)):
        x, weight = numbers(R, 3, C) + layer, numbers(C, seed=8)
        whole = x.sum(1)
        arrays = [weight, whole, x, zeros(R, 3, C)]
        found, = run("norm_share", {"LAYER": layer}, (3 * R, C, 3, 0.003), arrays, 3 * R, [4])
        normed = norm(layer, 0.003)(*map(mx.array, (whole, weight, zeros(C))))
        assert near(found.sum(1), normed, 2e-5)
        arrays[2] = 2 * x
        assert near(run("norm_share", {"LAYER": layer}, (3 * R, C, 3, 0.003), arrays, 3 * R, [4])[0], 2 * found, 1e-6)


def test_embed_by_slices():
    """Each slice of the matrix writes the rows of its own tokens, and no others."""
    table, tokens, y = numbers(11, 8), np.array([10, 0, 3, 4, 9, 5], np.uint32), zeros(6, 8) - 1
    for first, rows in ((4, 5), (9, 2), (0, 4)):
        before = y
        arrays = [table[first:first + rows], NONE, NONE, NONE, tokens, NONE, y]
        y, = run("embed", {"BITS": 32}, (6, 6, 8, 2.0, first, rows), arrays, elements(12), [7])
        mine = (tokens >= first) & (tokens < first + rows)
        assert np.array_equal(y[mine], 2 * table[tokens[mine]]) and np.array_equal(y[~mine], before[~mine])
    assert np.array_equal(y, 2 * table[tokens])


def test_put_columns():
    x, y = numbers(5, 7), numbers(5, 40, seed=1)
    expected = y.copy()
    expected[:, 30:37] = x
    found, = run("put_columns", {}, (5, 7, 40, 30), [x, y], elements(35), [2])
    assert np.array_equal(found, expected)


def test_rows():
    x, which = numbers(9, 67), np.array([8, 0, 3, 3], np.uint32)
    assert np.array_equal(run("rows", {}, (4, 67), [which, x, zeros(4, 67)], elements(268), [3])[0], x[which])


def test_columns():
    x, order = numbers(9, 67), np.random.default_rng(0).permutation(67).astype(np.uint32)
    assert np.array_equal(run("columns", {}, (9, 67), [order, x, zeros(9, 67)], elements(603), [3])[0], x[:, order])


def test_add():
    x, y = numbers(201), numbers(201, seed=1)
    assert np.array_equal(run("add", {}, (201,), [y, x], elements(201), [2])[0], x + y)


def test_scale():
    x = numbers(201)
    assert np.array_equal(run("scale", {}, (201, 0.75), [x], elements(201), [1])[0], np.float32(0.75) * x)


def test_patch():
    """A position of each sequence becomes the donor's activation at another position."""
    B, T, C, S = 4, 5, 67, 7
    x, donor, source, to = numbers(B, T, C), numbers(S, C, seed=1), np.array([6, 0, 2, 2]), np.array([4, 0, 1, 4])
    found, = run("patch", {}, (B, T, C), [np.append(source, to).astype(np.uint32), donor, x], elements(B * C), [3])
    x[np.arange(B), to] = donor[source]
    assert np.array_equal(found, x)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("base", [False, True])
def test_ablate(mean, base):
    """The output of a part becomes 0, or its mean over the rows; other columns and rows do not change."""
    for start, R, C, first, last in ((0, 1, 3, 0, 3), (0, 7, 150, 20, 133), (10, 5, 8, 3, 4)):
        x, before = numbers(2 * start + R, C), numbers(R, C, seed=1)
        found, = run("ablate", {"MEAN": mean, "BASE": base}, (start, R, C, first, last), [before, x],
                     (elements(last - first), 1), [2])
        rows = slice(start, start + R)
        part, kept = (a[:, first:last].astype(np.float64) for a in (x[rows], before * base))
        expected = x.copy()
        expected[rows, first:last] = kept + mean * (part - kept).mean(0)
        assert near(found, expected, 1e-6)


@pytest.mark.parametrize("has_state", [False, True])
def test_steer(has_state):
    """Rows at the positions from first to last - 1, in some columns, become keep x + strength state; others stay."""
    state = numbers(70, seed=1)
    for R, left, right, keep, strength, first, last in (
            (1, 0, 70, 1, 2.5, 0, 2**24), (9, 3, 67, 0, 1, 12, 15), (9, 0, 70, 1, -0.5, 15, 2**24),
            (5, 20, 30, 0, 0, -4, 12), (5, 0, 70, 0, 1, -9, -8)):
        x, start = numbers(R, 70), 10
        dial = np.array([keep, strength, first, last], np.float32)
        arrays = [np.array([start, R], np.uint32), dial, state if has_state else NONE, x]
        found, = run("steer", {"STATE": has_state}, (R, 70, left, right), arrays, elements(R * (right - left)), [4])
        for r in range(R):
            if first <= start + r < last:
                x[r, left:right] = keep * x[r, left:right] + has_state * strength * state[left:right]
        assert near(found, x, 1e-6)


def test_divergence():
    """KL of two distributions in float64, without padding; of equal ones 0; also where logits are large."""
    for V, n, more in ((5, 5, 0), (70, 67, 200), (5003, 4990, -300)):
        a, b = numbers(V, seed=V, scale=3), numbers(V, seed=V + 1, scale=2)
        a[n:] = b[n:] = 999
        p, q = (np.exp(x[:n].astype(np.float64) - x[:n].max()) for x in (a, b))
        p, q = p / p.sum(), q / q.sum()
        found, = run("divergence", {}, (n,), [a + np.float32(more), b, zeros(1)], (1, 1), [3])
        assert abs(found[0] - (p * np.log(p / q)).sum()) < 1e-4
        assert run("divergence", {}, (n,), [a, a, zeros(1)], (1, 1), [3])[0][0] < 1e-6


# ---- sampling --------------------------------------------------------------------------------------------------------


def draw(logits: np.ndarray, n: int, times: int, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, ring=0):
    """Draw tokens one after another. Returns the kernel's `at`, the last token, and the ring buffer of this size."""
    ring = ring or times + -times % 4  # a multiple of 16 bytes, without guards: it is all used
    maxima, = run("maxima", {}, (n,), [logits, zeros(1024, 2)], (16, 1), [2])
    arrays = [logits, maxima, np.array([7, 3, 0, seed], np.uint32), np.zeros(4, np.uint32), np.zeros(ring, np.uint32)]
    return wgsl.run("sample", {}, (n, top_k, float(temperature), float(top_p), float(min_p)), arrays, (1, 1), [3, 4, 5],
                    times)


@pytest.mark.parametrize("n", [1, 3, 64, 1000, 1024, 5000, 9001])
def test_maxima(n):
    """The largest of every 1024th logit, of equal ones the first; the padding behind the n tokens does not count."""
    logits = np.round(numbers(n + 10, seed=n, scale=2))
    logits[n:] = 99
    found, = run("maxima", {}, (n,), [logits, zeros(1024, 2)], (16, 1), [2])
    parts = np.append(logits[:n], np.full(-n % 1024, np.float32(-1e30))).reshape(-1, 1024)
    assert np.array_equal(found[:, 0], parts.max(axis=0))
    assert np.array_equal(found[:n, 1], (parts.argmax(axis=0) * 1024 + np.arange(1024))[:n])


def test_greedy():
    """Temperature 0 takes the most probable token, of equal ones the first, and never padding."""
    for n, best in ((1, [0]), (300, [5, 133]), (300, [261, 6]), (140, [139]), (130, [129, 1, 128])):
        logits = numbers(n + 10, seed=n)
        logits[n:], logits[best] = 9, 7
        assert draw(logits, n, 1, temperature=0)[1][0] == min(best)
        assert draw(logits - 1000, n, 1, temperature=0, top_k=3, top_p=0.5)[1][0] == min(best)


def test_sample_moves_on():
    """Position, count and step; the token for the next pass; the ring buffer wraps around."""
    logits = numbers(9)
    at, tokens, ring = draw(logits, 9, 11, seed=5, ring=8)
    everything = draw(logits, 9, 11, seed=5)[2][:11]
    assert list(at) == [7 + 3 + 10, 1, 11, 5] and list(tokens) == [everything[-1], 0, 0, 0]
    assert np.array_equal(ring, np.append(everything[8:], everything[3:8]))
    assert not np.array_equal(everything, draw(logits, 9, 11, seed=6)[2][:11])


def kept(monkeypatch, logits, temperature, top_k, top_p, min_p) -> np.ndarray:
    """The probability with which sample_token() draws each token: 0 for those that it filters out."""
    monkeypatch.setattr(mx.random, "categorical", lambda logits, key: logits)
    left = model.sample_token(mx.array(logits[None]), None, temperature, top_k, top_p, min_p)
    return np.array(mx.softmax(left.astype(mx.float32), axis=-1))[0]


def as_often(drawn: np.ndarray, p: np.ndarray) -> bool:
    """Whether numbers are drawn by their probabilities, by a chi-square test; those of probability 0 never, all others
    at least once."""
    count, expected = np.bincount(drawn, minlength=len(p)), len(drawn) * p
    free = (p > 0).sum() - 1
    chi = ((count - expected)[p > 0]**2 / expected[p > 0]).sum()
    return not count[p == 0].any() and bool(count[p > 0].all()) and chi <= free + 3 * math.sqrt(2 * free)


@pytest.mark.parametrize("temperature, top_k, top_p, min_p", [
    (1.0, 0, 1.0, 0.0), (0.7, 0, 1.0, 0.0), (1.5, 5, 1.0, 0.0), (1.0, 1, 1.0, 0.0), (1.0, 0, 0.8, 0.0),
    (2.0, 0, 0.5, 0.0), (1.0, 0, 0.0, 0.0), (1.0, 0, 1.0, 0.1), (0.5, 0, 1.0, 0.1), (1.2, 9, 0.9, 0.2),
    (1.0, 400, 0.97, 0.0), (0.8, 11, 0.95, 0.0)])
def test_sample(monkeypatch, temperature, top_k, top_p, min_p):
    """Exactly the tokens that sample_token() keeps are drawn, with its probabilities."""
    n, logits = 140, np.full(150, -1000, np.float32)
    some = np.array([0, 3, 17, 31, 64, 65, 66, 100, 127, 128, 129, 130, 138, 139])
    logits[some] = 2 * np.random.default_rng(1).permutation(len(some)) / len(some) - 1
    logits[n:] = 9  # padding
    p = kept(monkeypatch, logits[:n], temperature, top_k, top_p, min_p)
    times = 300 if top_k or top_p < 1 else 2000
    assert as_often(draw(logits, n, times, temperature, top_k, top_p, min_p, seed=3)[2][:times], p)


def test_top_k_of_equals(monkeypatch):
    """All tokens that are as probable as the last of the top_k are kept."""
    logits = np.array([1, 2, 0.5, 1, -1, 1, 0], np.float32)
    p = kept(monkeypatch, logits, 1.0, 2, 1.0, 0.0)
    assert (p > 0).sum() == 4 and as_often(draw(logits, 7, 100, top_k=2)[2], p)


@pytest.mark.parametrize("top_k, top_p", [(50, 1.0), (256, 0.3), (7, 0.9), (300, 0.5)])
@pytest.mark.parametrize("equal", [False, True])
def test_top_k_of_many(monkeypatch, top_k, top_p, equal):
    """Of a large vocabulary: the few candidates that the threads' own best tokens leave; or, where too many tokens are
    equal, all of them."""
    logits = np.random.default_rng(3).normal(size=3010).astype(np.float32)
    logits[:1500] = 4 if equal else np.sort(logits[:1500])  # the best tokens are neighbours
    top_p = 1.0 if equal else top_p  # top_p keeps equal tokens together, sample_token() does not
    p = kept(monkeypatch, logits[:3001], 1.0, top_k, top_p, 0.0)
    drawn = draw(logits, 3001, 1200, top_k=top_k, top_p=top_p)[2]
    assert not np.bincount(drawn, minlength=3001)[p == 0].any()
    assert np.unique(drawn).size > (770 if equal else min(30, (p > 0).sum() // 4))  # 826 are expected of 1500


def test_noise():
    """Neighbouring tokens of a text, and the first tokens of neighbouring seeds, are independent; rare tokens have
    their probability."""
    logits = np.log(np.array([0.1, 0.2, 0.3, 0.4])).astype(np.float32)
    drawn, p = draw(logits, 4, 4000, seed=1)[2], np.exp(logits)
    assert as_often(drawn[:-1] * 4 + drawn[1:], np.outer(p, p).reshape(-1))
    assert as_often(np.array([draw(logits, 4, 1, seed=seed)[1][0] for seed in range(200)]), p)
    logits = np.log(np.append(0.96, np.full(200, 0.0002))).astype(np.float32)
    drawn = draw(logits, 201, 4000, seed=2)[2]
    assert as_often((drawn > 0).astype(int), np.array([0.96, 0.04])) and np.unique(drawn).size > 90
