"""precision.py: formats against ml_dtypes, scales against the papers' formulas, and the three products of a layer
against float64 numpy; packed_states.py against the same. What train.py does with them, and that both files can be
deleted."""
import shutil
import subprocess
import sys
import time

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from conftest import ROOT, run_here
from mlx.utils import tree_flatten

import packed_states
import precision
from config import UserError
from model import GPT, Experts, GPTConfig, Linear, dispatch, load_checkpoint
from muon import Muon
from precision import E2M1, E4M3, E5M2, rounded, to_fp8, to_mxfp8, to_nvfp4

SMALL = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=16", "--batch_size=4", "--eval_windows=8",
         "--sample_tokens=0", "--tokenizer=byte", "--warmup_iters=2"]
# every positive number of E2M1, the edges of E4M3 and E5M2, and numbers halfway between two of them with what the even
# rule makes of them: from the tables of the OCP specifications
E2M1_NUMBERS = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
KNOWN = [(E4M3, 2**-9, 2**-9), (E4M3, 2**-10, 0), (E4M3, 3 * 2**-10, 2**-8), (E4M3, 1.0625, 1), (E4M3, 1.1875, 1.25),
         (E4M3, 448, 448), (E4M3, 1e9, 448), (E4M3, -460, -448), (E5M2, 2**-16, 2**-16), (E5M2, 2**-17, 0),
         (E5M2, 1.125, 1), (E5M2, 1.375, 1.5), (E5M2, 57344, 57344), (E5M2, 1e9, 57344), (E2M1, 0.25, 0),
         (E2M1, 0.75, 1), (E2M1, 2.5, 2), (E2M1, 3.5, 4), (E2M1, 5, 4), (E2M1, 7, 6)]


def numbers(seed: int, shape=(48, 64)) -> np.ndarray:
    """Normal numbers of many sizes."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * np.exp(2 * rng.standard_normal(shape))).astype(np.float32)


# ---- formats ---------------------------------------------------------------------------------------------------------


def test_numbers_of_the_specifications():
    for kind, x, y in KNOWN:
        assert rounded(mx.array([x]), kind).item() == y and rounded(mx.array([-x]), kind).item() == -y, (kind, x)
    fine = np.linspace(-6, 6, 9999, dtype=np.float32)
    assert sorted({*np.abs(np.array(rounded(mx.array(fine), E2M1))).tolist()}) == E2M1_NUMBERS
    assert np.isnan(np.array(rounded(mx.array([np.nan]), E4M3))).all()


@pytest.mark.parametrize("name, kind", [("float8_e4m3fn", E4M3), ("float8_e5m2", E5M2), ("float4_e2m1fn", E2M1)])
def test_casts_equal_ml_dtypes(name, kind):
    """Bit for bit, the sign of 0 too: all numbers of bfloat16, of float16, and the neighbours in float32 of all numbers
    of the format and of those halfway between two; saturated beyond the largest one."""
    other = getattr(pytest.importorskip("ml_dtypes"), name)
    whole = np.arange(2**16, dtype=np.uint32)
    grid = np.arange(256 if "8" in name else 16, dtype=np.uint8).view(other).astype(np.float32)
    grid = np.sort(grid[np.isfinite(grid)])
    edges = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2])
    x = np.concatenate([(whole << 16).view(np.float32), whole.astype(np.uint16).view(np.float16).astype(np.float32),
                        edges, np.nextafter(edges, np.float32(np.inf)), np.nextafter(edges, np.float32(-np.inf))])
    x = x[np.isfinite(x)]
    x[(x != 0) & (np.abs(x) < 2.0**-126)] = 0  # subnormal numbers of float32 are 0 where a GPU computes
    found = np.array(rounded(mx.array(x), kind))
    expected = np.clip(x, -kind[2], kind[2]).astype(other).astype(np.float32)
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))
    assert np.abs(found).max() == kind[2]


def test_scales_of_mxfp8_equal_ml_dtypes():
    """A power of two that E8M0 holds, the smallest one that is not below x."""
    e8m0 = pytest.importorskip("ml_dtypes").float8_e8m0fnu
    powers = np.float32(2.0) ** np.arange(-125, 127)
    x = np.concatenate([powers, np.nextafter(powers, np.float32(np.inf)), np.nextafter(powers, np.float32(0)),
                        np.abs(numbers(0)).ravel()]).astype(np.float32)
    found = np.array(precision.next_power(mx.array(x)))
    np.testing.assert_array_equal(found, found.astype(e8m0).astype(np.float32))
    assert (found >= x).all() and (found / 2 < x).all()


def test_the_mean_of_stochastic_rounding_is_x():
    """Of each number the mean over many draws, within five standard errors; only its two neighbours are drawn."""
    x = np.float32([0.1, -0.3, 0.7, 1.2, 1.9, 2.25, -2.9, 3.5, 4.4, -5.9, 6.0, 0.0])
    draws = 20_000
    noise = mx.random.uniform(shape=(draws, len(x)), key=mx.random.key(3))
    found = np.array(rounded(mx.broadcast_to(mx.array(x), noise.shape), E2M1, noise))
    assert all(len({*column}) <= 2 for column in found.T)
    error = np.abs(found.mean(0) - x)
    assert (error <= 5 * found.std(0) / draws**0.5 + 1e-6).all(), error


# ---- matrices: scale and values against the formulas, in float64 -----------------------------------------------------


def grid_of(kind) -> np.ndarray:
    """Every number of a format, by its bits: the oracle of nearest() needs no rounding rule of ours."""
    bits, lowest, largest = kind
    fractions = np.arange(2 ** bits) / 2 ** bits
    found = np.concatenate([fractions * 2.0 ** lowest, *((1 + fractions) * 2.0 ** e for e in range(lowest, 16))])
    found = np.unique(found[found <= largest])
    return np.concatenate([-found[:0:-1], found])


def nearest(x: np.ndarray, kind) -> np.ndarray:
    grid = grid_of(kind)
    place = np.clip(np.searchsorted(grid, x), 1, len(grid) - 1)
    below, above = grid[place - 1], grid[place]
    even = np.where((place - 1 - len(grid) // 2) % 2 == 0, below, above)
    return np.where(x - below < above - x, below, np.where(x - below > above - x, above, even))


def value(parts) -> np.ndarray:
    return np.array(parts[0]).astype(np.float64) * np.array(parts[1]).astype(np.float64)


@pytest.mark.parametrize("gradient", [False, True])
def test_fp8_of_a_matrix(gradient):
    x, kind = numbers(1), E5M2 if gradient else E4M3
    scale = np.float64(np.float32(kind[2]) / np.abs(x).max())
    np.testing.assert_allclose(value(to_fp8(mx.array(x), 0, gradient)), nearest(x * scale, kind) / scale, rtol=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
def test_mxfp8_of_a_matrix(axis):
    x = numbers(2, (70, 96))  # 70: the last block is not full
    rows = x.T if axis == 0 else x
    expected = np.zeros(rows.shape)
    for start in range(0, rows.shape[1], 32):
        part = rows[:, start:start + 32].astype(np.float64)
        scale = 2.0 ** np.ceil(np.log2(np.abs(part).max(1, keepdims=True) / 448))
        expected[:, start:start + 32] = nearest(part / scale, E4M3) * scale
    found = value(to_mxfp8(mx.array(x), axis))
    np.testing.assert_array_equal(found, expected.T if axis == 0 else expected)


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_nvfp4_of_a_matrix(axis, square):
    x = numbers(3, (40, 70))
    rows = x.T if axis == 0 else x
    factor, expected = np.abs(x).max() / np.float64(6 * 448), np.zeros(rows.shape)
    for top in range(0, len(rows), 16 if square else 1):
        for start in range(0, rows.shape[1], 16):
            where = np.s_[top:top + (16 if square else 1), start:start + 16]
            part = rows[where].astype(np.float64)
            scale = nearest(np.abs(part).max() / 6 / factor, E4M3)
            expected[where] = nearest(part / (scale * factor), E2M1) * scale * factor if scale else 0
    found = value(to_nvfp4(mx.array(x), axis, square=square))
    wrong = np.abs(found - (expected.T if axis == 0 else expected)) > 1e-5 * np.abs(x).max()
    assert wrong.mean() < 0.002  # float32 and float64 may differ where a number lies halfway between two
    if square:  # the same values forward and transposed
        np.testing.assert_array_equal(value(to_nvfp4(mx.array(x), 1 - axis, square=True)), found)


def test_zeros_stay():
    for to in (to_fp8, to_mxfp8, to_nvfp4, lambda x, axis: to_nvfp4(x, axis, True, True)):
        assert not np.array(to(mx.zeros((32, 48)), 0)[0]).any()
    x = mx.concatenate([mx.zeros((16, 32)), mx.ones((16, 32)), mx.full((16, 32), 1e-7)])
    assert np.isfinite(value(to_nvfp4(x, 0))).all() and not value(to_nvfp4(x, 0))[:16].any()


# ---- products --------------------------------------------------------------------------------------------------------


def gradients(product, x, weight, dy):
    def loss(x, weight):
        y = product(x, weight)
        return (y * dy).sum(), y
    (_, y), (dx, dweight) = mx.value_and_grad(loss, argnums=(0, 1))(x, weight)
    return [np.array(array) for array in (y, dx, dweight)]


@pytest.mark.parametrize("kind, without", [("fp8", ""), ("mxfp8", ""), ("nvfp4", "stochastic"),
                                           ("nvfp4", "stochastic,square"), ("nvfp4", "stochastic,hadamard")])
def test_products_and_gradients(kind, without):
    """y, dx and dW are float64 products of the rounded inputs; which axis and which format each has is written down
    here once more, from the papers."""
    x, weight, dy = (mx.array(numbers(seed, shape)) for seed, shape in enumerate([(50, 48), (40, 48), (50, 40)]))
    found = gradients(precision.rounded_product(kind, precision.parse(kind, without)), x, weight, dy)
    if kind == "fp8":
        a, b, g = to_fp8(x, 1), to_fp8(weight, 1), to_fp8(dy, 1, gradient=True)
        expected = value(a) @ value(b).T, value(g) @ value(b), value(g).T @ value(a)
    elif kind == "mxfp8":
        expected = (value(to_mxfp8(x, 1)) @ value(to_mxfp8(weight, 1)).T,
                    value(to_mxfp8(dy, 1)) @ value(to_mxfp8(weight, 0)),
                    value(to_mxfp8(dy, 0)).T @ value(to_mxfp8(x, 0)))
    else:
        square, matrix = "square" not in without, np.array(precision.signed_hadamard(), np.float64)
        matrix = np.eye(16) if "hadamard" in without else matrix
        turned = [np.concatenate([matrix @ np.pad(np.array(array, np.float64), ((0, 14), (0, 0)))[i:i + 16]
                                  for i in range(0, 64, 16)]) for array in (dy, x)]
        g, a = (value(to_nvfp4(mx.array(array.astype(np.float32)), 0)) for array in turned)
        expected = (value(to_nvfp4(x, 1)) @ value(to_nvfp4(weight, 1, square=square)).T,
                    value(to_nvfp4(dy, 1)) @ value(to_nvfp4(weight, 0, square=square)), g.T @ a)
    for name, one, other in zip(("y", "dx", "dW"), found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4 * np.abs(other).max(), err_msg=name)


@pytest.mark.parametrize("kind, without", [("fp8", ""), ("mxfp8", ""), ("nvfp4", "stochastic"),
                                           ("nvfp4", "stochastic,square,hadamard")])
def test_products_of_experts(kind, without):
    """Rows of three experts, of which one has none and the others end within a block: float64 products of the rounded
    rows of each expert, whatever stands in the rows of no token."""
    without, rng = precision.parse(kind, without), np.random.default_rng(3)
    chosen = mx.array(rng.choice([0, 2], (100, 1), p=[0.7, 0.3]))
    pair, row, expert, ends = dispatch(chosen, 3)
    n, of_row = len(pair), np.repeat(np.array(expert), 64)
    full, weights = np.zeros(n, bool), mx.array(numbers(1, (3, 40, 48)))
    full[np.array(row)] = True
    assert full.sum() == 100 < n and 0 < (of_row == 2).sum() < n
    x, dy = mx.array(numbers(2, (n, 48))), mx.array(numbers(4, (n, 40)))
    product = precision.rounded_experts(kind, without)
    found = gradients(lambda x, weights: product(x, weights, expert, ends), x, weights, dy)

    def rounding(array, axis: int, role: str = "") -> np.ndarray:
        if kind == "nvfp4":
            return value(to_nvfp4(array, axis, square=role == "weight" and "square" not in without))
        return value(to_fp8(array, axis, gradient=role == "dy") if kind == "fp8" else to_mxfp8(array, axis))

    zeroed = [np.where(full[:, None], np.array(array), 0) for array in (x, dy)]
    matrix = np.array(precision.signed_hadamard(), np.float64)
    matrix = matrix if kind == "nvfp4" and "hadamard" not in without else np.eye(16)
    turned = [np.concatenate([matrix @ array[i:i + 16] for i in range(0, n, 16)]) for array in zeroed]
    a, b = (rounding(mx.array(np.float32(part)), 0, role) for part, role in zip(turned, ("", "dy"), strict=True))
    y, dx, dweight = np.zeros((n, 40)), np.zeros((n, 48)), np.zeros((3, 40, 48))
    for e in range(3):
        mine = of_row == e
        y[mine] = rounding(x, 1)[mine] @ rounding(weights[e], 1, "weight").T
        dx[mine] = rounding(mx.array(zeroed[1]), 1, "dy")[mine] @ rounding(weights[e], 0, "weight")
        dweight[e] = b[mine].T @ a[mine] if (chosen == e).any() else 0
    for name, one, other in zip(("y", "dx", "dW"), found, (y, dx, dweight), strict=True):
        one, other = (one, other) if name == "dW" else (one[full], other[full])
        np.testing.assert_allclose(one, other, atol=2e-5 * np.abs(other).max(), err_msg=name)


def test_few_rows_of_experts():
    """Fewer pairs than a block has, which are not sorted: each row by its own expert."""
    layer = Experts(3, 48, 40, True)
    layer.weight, layer.bias = mx.array(numbers(1, (3, 40, 48))), mx.array(numbers(2, (3, 40)))
    x, expert = mx.array(numbers(3, (7, 48))), mx.array([2, 0, 0, 1, 2, 2, 0])
    of_one = precision.rounded_product("mxfp8")
    y = precision.RoundedExperts(layer, precision.rounded_experts("mxfp8"), of_one).train()(x, expert, None)
    for i, e in enumerate(expert.tolist()):
        one = value(to_mxfp8(x[i:i + 1], 1)) @ value(to_mxfp8(layer.weight[e], 1)).T + np.array(layer.bias[e])
        np.testing.assert_allclose(np.array(y[i:i + 1]), one, atol=1e-3)


def test_gradients_of_stochastic_rounding():
    """Their mean over many draws is that of dy without rounding, where no block's largest number is beyond the grid."""
    x, weight, dy = (mx.array(numbers(seed, (32, 32))) for seed in range(3))
    product = precision.rounded_product("nvfp4", frozenset({"hadamard"}))
    mx.random.seed(5)
    found = np.stack([gradients(product, x, weight, dy)[1] for _ in range(200)])
    w = value(to_nvfp4(weight, 0, square=True))
    # numbers beyond 6 of the rounded scale are cut off: that much of the mean is known
    parts = np.array(dy, np.float64).reshape(32, 2, 16)
    factor = np.abs(parts).max() / (6 * 448)
    scale = nearest(np.abs(parts).max(2, keepdims=True) / 6 / factor, E4M3) * factor
    kept, grid = np.clip(parts / scale, -6, 6), grid_of(E2M1)
    above = np.clip(np.searchsorted(grid, kept), 1, len(grid) - 1)
    spread = (kept - grid[above - 1]) * (grid[above] - kept) * scale**2  # the variance: (x - below) (above - x)
    expected, spread = (kept * scale).reshape(32, 32) @ w, (spread.reshape(32, 32) @ w**2 / 200) ** 0.5
    error = np.abs(found.mean(0) - expected)
    assert (error <= 6 * spread + 1e-5 * np.abs(expected).max()).all() and 0.5 < error.mean() / spread.mean() < 1.1
    nearest_dx = value(to_nvfp4(dy, 1)) @ w
    assert error.mean() < 0.3 * np.abs(nearest_dx - expected).mean()  # what rounding to the nearest number costs


def test_a_hadamard_matrix_alone_changes_nothing():
    matrix = precision.signed_hadamard()
    np.testing.assert_allclose(np.array(matrix @ matrix.T), np.eye(16), atol=1e-6)
    assert len({*np.sign(np.array(matrix)).sum(0).tolist()}) > 1 or not (np.array(matrix)[0] > 0).all()  # random signs
    a, b = (mx.array(numbers(seed, (50, 24))) for seed in (1, 2))
    exact = np.array(a, np.float64).T @ np.array(b, np.float64)
    found = precision.turned(a, matrix).T @ precision.turned(b, matrix)
    np.testing.assert_allclose(np.array(found), exact, atol=1e-5 * np.abs(exact).max())
    lonely = mx.zeros((16, 1)).at[3].add(1.0)
    assert np.abs(np.array(precision.turned(lonely, matrix))).tolist() == [[0.25]] * 16  # an outlier is spread


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_values_are_exact_in_bfloat16(dtype):
    for kind in (lambda x: to_fp8(x, 0), lambda x: to_fp8(x, 0, True), lambda x: to_mxfp8(x, 0),
                 lambda x: to_nvfp4(x, 0)):
        values = kind(mx.array(numbers(6)))[0]
        assert mx.array_equal(values, values.astype(dtype).astype(mx.float32)).item()


@pytest.mark.parametrize("kind", precision.FORMATS)
def test_products_in_bfloat16(kind):
    """The same values as in float32, as they are exact in both: only the result is rounded."""
    x, weight = (mx.array(numbers(seed, (32, 32))).astype(mx.bfloat16).astype(mx.float32) for seed in range(2))
    product = precision.rounded_product(kind)
    exact, found = product(x, weight), product(x.astype(mx.bfloat16), weight)
    assert found.dtype == mx.bfloat16
    np.testing.assert_allclose(np.array(found.astype(mx.float32)), np.array(exact), rtol=2**-6,
                               atol=1e-3 * mx.abs(exact).max().item())


# ---- a model ---------------------------------------------------------------------------------------------------------


def test_layers_that_are_rounded():
    """Those that multiply hidden states; not those that choose a path or compute a gate; nor nvfp4's last block."""
    config = GPTConfig(block_size=16, vocab_size=64, n_layer=4, n_head=2, n_embd=32, mod="topk", mlp="swiglu",
                       value_embeds=True, diff_attn=True, diff_attn_version=2, tie=False)

    def rounded_layers(kind, off=""):
        model = GPT(config)
        precision.convert(model, kind, precision.parse(kind, off))
        return {path for path, module in model.named_modules() if type(module) is precision.RoundedLinear}

    names = [f"attn.{name}" for name in ("q", "k", "v", "out")] + [f"mlp.{name}" for name in ("gate", "up", "down")]
    assert {path.split(".", 2)[2] for path in rounded_layers("fp8")} == {*names}
    assert len(rounded_layers("mxfp8")) == 4 * len(names) == len(rounded_layers("nvfp4", "last"))
    assert {path.split(".")[1] for path in rounded_layers("nvfp4")} == {"0", "1", "2"}


@pytest.mark.parametrize("variant", [{}, {"mod": "topk"}, {"yoco": True}, {"sliding_window": 4}, {"diff_attn": True},
                                     {"value_residual": True}, {"value_embeds": True}, {"bias": True, "mlp": "gelu"},
                                     {"softcap": 20.0}, {"parallel": True},
                                     {"n_expert": 4, "mlp": "swiglu", "bias": True},
                                     {"n_expert": 3, "n_shared_expert": 1, "expert_top_k": 1}])
@pytest.mark.parametrize("kind", precision.FORMATS)
def test_variants(kind, variant):
    """Every format with every variant: a loss near that without rounding, gradients that are finite and near too, and
    in evaluation no rounding at all."""
    config = GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32, **variant)
    idx, targets = (mx.random.randint(0, 64, (3, 16), key=mx.random.key(i)) for i in range(2))
    plain, model = GPT(config, seed=3), GPT(config, seed=3)
    precision.convert(model, kind, frozenset({"last"}) if kind == "nvfp4" else frozenset())
    assert mx.array_equal(plain.eval()(idx), model.eval()(idx)).item()
    plain.train(), model.train()
    (loss, grads), (known, exact) = (nn.value_and_grad(m, m.loss)(idx, targets) for m in (model, plain))
    assert loss.item() != known.item() and abs(loss.item() - known.item()) < 0.3
    a, b = (np.concatenate([np.array(g).ravel() for _, g in tree_flatten(found)]) for found in (grads, exact))
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert np.isfinite(a).all()
    chooses = {"mod", "n_expert"} & {*variant}  # a router may choose others
    assert cosine > (0.7 if kind == "nvfp4" else 0.97) or chooses


def test_checkpointed_blocks_have_the_same_gradients():
    config = GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32)
    idx, found = mx.random.randint(0, 64, (3, 16), key=mx.random.key(0)), []
    for every in (0, 1):
        model = GPT(config, seed=3)
        precision.convert(model, "mxfp8")
        model.train()
        model.checkpoint_every = every
        found.append(tree_flatten(nn.value_and_grad(model, model.loss)(idx, idx)[1]))
    for (name, a), (_, b) in zip(*found, strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), atol=1e-6, err_msg=name)


@pytest.mark.parametrize("arguments, message", [
    (["--precision=fp4"], "precision='fp4' is not one of fp8, mxfp8, nvfp4"),
    (["--precision=nvfp4", "--precision_off=hadamar"], "'hadamar' is not one of stochastic, hadamard, square, last"),
    (["--precision=fp8", "--precision_off=square"], "leaves out choices of nvfp4"),
    (["--precision_off=square"], "precision='' is not one of"),
    (["--precision=nvfp4", "--n_layer=1"], "keeps the last block"),
    (["--optimizer_bits=16"], "optimizer_bits=16: it must be 32"),
])
def test_refusals(arguments, message, text, tmp_path):
    with pytest.raises(UserError, match=".*" + message.replace("(", r"\(")):
        run_here("train.py", f"--data={text}", f"--out_dir={tmp_path}/out", *SMALL, *arguments)


# ---- states of the optimizer -----------------------------------------------------------------------------------------


def test_tables():
    """The tables of the papers: 2110.02861's by bitsandbytes' numbers, 2309.01507's by its formula."""
    table = packed_states.dynamic_table(8, True)
    assert len(table) == 256 and table[-1] == 1 and 0 in table
    assert table[table > 0].min() == np.float32(5.5e-7)  # 10^-6 * 0.55
    assert np.isclose(table[-2], 0.9929687) and (-table[0] == table[-2])
    assert (table > 0.1).sum() == 65 and (np.diff(table) > 0).all()  # 64 and 1
    unsigned = packed_states.dynamic_table(8, False)
    assert len(unsigned) == 256 and unsigned[0] == 0 and (unsigned > 0.1).sum() == 129
    np.testing.assert_allclose(packed_states.dynamic_table(4, True), [
        -0.8875, -0.6625, -0.4375, -0.2125, -0.0775, -0.0325, -0.0055, 0, 0.0055, 0.0325, 0.0775, 0.2125, 0.4375,
        0.6625, 0.8875, 1], rtol=1e-6)
    np.testing.assert_array_equal(packed_states.table_of(4, False), np.arange(1, 17) / 16)


@pytest.mark.parametrize("shape", [(100, 77), (5000,), (3, 40, 41)])
@pytest.mark.parametrize("bits, signed", [(8, True), (8, False), (4, True), (4, False)])
def test_packed_arrays(bits, signed, shape):
    """The nearest values, by argmin in float64, times the scales of the blocks, or of rank 1."""
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    x = x if signed else x**2
    size = {8: 256, 4: 128}[bits]
    flat = np.abs(np.pad(x.ravel(), (0, -x.size % size))).reshape(-1, size)
    scale = np.repeat(flat.max(1), size)[:x.size].reshape(shape).astype(np.float64)
    if bits == 4 and not signed and len(shape) > 1:
        axes = range(len(shape))
        scale = np.minimum.reduce([np.broadcast_to(x.max(tuple(j for j in axes if j != i), keepdims=True), shape)
                                   for i in axes]).astype(np.float64)
    table = packed_states.table_of(bits, signed).astype(np.float64)
    expected = table[np.abs((x / scale)[..., None] - table).argmin(-1)] * scale
    state = packed_states.pack(mx.array(x), bits, signed)
    found = np.array(packed_states.unpack(state, bits, signed, shape))
    assert (np.abs(found - expected) > 1e-6).mean() < 1e-3  # float32 may find another one halfway between two
    assert sum(part.nbytes for part in state.values()) < (x.nbytes * bits / 32) * 1.2
    if signed:  # its table has 1, but not -1
        return
    again = packed_states.pack(mx.array(found), bits, signed)  # packed numbers stay as they are
    np.testing.assert_allclose(np.array(packed_states.unpack(again, bits, signed, shape)), found, rtol=1e-5)


@pytest.mark.parametrize("bits, most", [(8, 0.01), (4, 0.25)])
def test_optimizers(bits, most):
    """Updates near those of float32 states; small arrays exactly the same; and the states are as small as they say."""
    rng = np.random.default_rng(0)
    draw = lambda: {name: mx.array(rng.standard_normal(shape).astype(np.float32))  # noqa: E731
                    for name, shape in {"wide": (96, 64), "small": (32,), "experts": (2, 64, 48)}.items()}
    for make in (lambda bits: packed_states.PackedAdam(0.01, bits, betas=[0.9, 0.95], bias_correction=True) if bits
                 else optim.Adam(0.01, betas=[0.9, 0.95], bias_correction=True),
                 lambda bits: packed_states.PackedMuon(0.01, bits) if bits else Muon(0.01),
                 lambda bits: packed_states.PackedLion(0.01, bits, betas=[0.9, 0.95]) if bits
                 else optim.Lion(0.01, betas=[0.9, 0.95])):
        begin, gradients = draw(), [draw() for _ in range(5)]
        if isinstance(make(0), Muon):
            for tree in (begin, *gradients):
                del tree["small"]  # no matrix
        found = []
        for opt in (make(bits), make(0)):
            p = begin
            for g in gradients:
                p = opt.apply_gradients(g, p)
                mx.eval(p, opt.state)
            found.append({name: np.array(p[name] - begin[name]) for name in p})
            sizes = {name: sum(part.nbytes for _, part in tree_flatten(opt.state[name])) for name in p}
            if opt.__class__.__name__.startswith("Packed"):
                whole = (2 if isinstance(opt, optim.Adam) else 1) * begin["wide"].nbytes
                assert sizes["wide"] < whole * bits / 32 * 1.14
        for name, exact in found[1].items():
            error = np.linalg.norm(found[0][name] - exact) / np.linalg.norm(exact)
            if isinstance(opt, optim.Lion):  # its update is a sign, which is another one for numbers near 0
                error = (error / 4) ** 2  # of five updates, each other sign moves a number by 2
            assert (error == 0) if name == "small" else 0 < error < most, (name, error)


def test_compiled_updates():
    """mx.compile sees the packed states: two compiled updates equal two plain ones."""
    begin, found = {"w": mx.array(numbers(1, (64, 64)))}, []
    for compiled in (False, True):
        opt, p = packed_states.PackedAdam(0.01, 4), begin
        opt.init(begin)
        update = mx.compile(opt.apply_gradients, [opt.state], [opt.state]) if compiled else opt.apply_gradients
        for seed in range(2):
            p = update({"w": mx.array(numbers(seed, (64, 64)))}, p)
            mx.eval(p, opt.state)
        found.append(np.array(p["w"]))
    np.testing.assert_allclose(*found, atol=1e-6)


# ---- train.py --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"line {i}: the quick brown fox jumps over the lazy dog, {i * i}\n" for i in range(900)))
    return path


def weights(folder) -> dict[str, np.ndarray]:
    model, _ = load_checkpoint(f"{folder}/ckpt.safetensors")
    return {name: np.array(p) for name, p in tree_flatten(model.parameters())}


@pytest.mark.parametrize("arguments", [
    ["--optimizer_bits=4", "--optimizer=adamw"], ["--optimizer_bits=8", "--optimizer=lion"],
    ["--precision=nvfp4", "--optimizer_bits=8"]])
def test_a_killed_run_continues_bit_for_bit(arguments, text, tmp_path):
    """Killed after its first checkpoint, and resumed: the weights and the states of a run that nobody disturbed."""
    command = [sys.executable, ROOT / "train.py", f"--data={text}", *SMALL, "--n_embd=64", "--max_iters=24",
               "--eval_interval=4", *arguments]
    subprocess.run([*command, f"--out_dir={tmp_path}/whole"], check=True, capture_output=True, cwd=tmp_path)
    going = subprocess.Popen([*command, f"--out_dir={tmp_path}/killed"], stdout=subprocess.PIPE, cwd=tmp_path,
                             stderr=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "ckpt.safetensors").exists():
        assert going.poll() is None
        time.sleep(0.005)
    going.kill()
    going.communicate()
    subprocess.run([sys.executable, ROOT / "train.py", f"--data={text}", f"--out_dir={tmp_path}/killed",
                    "--resume=True"], check=True, capture_output=True, cwd=tmp_path)
    for name, p in weights(tmp_path / "whole").items():
        np.testing.assert_array_equal(weights(tmp_path / "killed")[name], p, err_msg=name)
    states = [mx.load(str(tmp_path / run / "ckpt.optimizer-24.safetensors")) for run in ("whole", "killed")]
    assert any(array.dtype == mx.uint8 for array in states[0].values())
    assert states[0].keys() == states[1].keys()
    assert all(mx.array_equal(array, states[1][name]).item() for name, array in states[0].items())


@pytest.mark.parametrize("kind", precision.FORMATS)
def test_training(kind, text, tmp_path, capsys):
    """The loss falls as it does without rounding; the checkpoint is one of float32 like any other."""
    run_here("train.py", f"--data={text}", f"--out_dir={tmp_path}/out", *SMALL, "--max_iters=40", "--eval_interval=40",
             f"--precision={kind}")
    model, meta = load_checkpoint(f"{tmp_path}/out/ckpt.safetensors")
    assert meta["settings"]["precision"] == kind and meta["losses"]["val"] < 0.8 * meta["losses"]["initial_val"]
    assert all(p.dtype == mx.float32 for _, p in tree_flatten(model.parameters()))
    assert all(type(m) is not precision.RoundedLinear for m in model.modules())
    assert any(type(m) is Linear for m in model.modules())


def test_deletion(text, tmp_path):
    """Without both files train.py trains as before; with their settings it says what is missing."""
    for path in (*ROOT.glob("*.py"), *ROOT.glob("*.c")):
        if path.name not in ("precision.py", "packed_states.py"):
            shutil.copy(path, tmp_path)
    command = [sys.executable, "train.py", f"--data={text}", *SMALL, "--max_iters=3", "--out_dir=out"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    for setting, said in (("--precision=fp8", "needs precision.py, which is missing"),
                          ("--optimizer_bits=8", "packed_states.py at hand")):
        done = subprocess.run([*command[:-1], "--out_dir=other", setting], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
