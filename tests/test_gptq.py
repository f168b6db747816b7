"""gptq.py: its integers against the method without Cholesky factors, in float64; files; bad input. awq.py: files."""
import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, run

from config import UserError
from gptq import quantize
from model import GPT, GPTConfig, load_checkpoint, save_checkpoint
from packing import matrices, matrix_inputs, round_to_nearest
from score import read_tokens, windows
from tokenizer import byte_tokenizer


def correlated(n: int, seed: int = 0) -> np.ndarray:
    """Inputs (2000, n) that are strongly correlated."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2000, n // 4)) @ rng.standard_normal((n // 4, n)) + 0.3 * rng.standard_normal((2000, n))


def one_column_at_a_time(weight, gram, bits, group_size, damping=0.01):
    """Optimal brain quantization in a fixed order: after column j, the remaining columns F change by -err / [H_F^-1]_jj
    times row j of H_F^-1, an inverse that is computed for every column."""
    W, H = np.array(weight, np.float64), np.array(gram, np.float64)
    H += damping * np.diag(H).mean() * np.eye(len(H))
    q = np.zeros(W.shape, np.int64)
    for j in range(W.shape[1]):
        if j % group_size == 0:
            low, high = W[:, j:j + group_size].min(1), W[:, j:j + group_size].max(1)
            scale = (high - low) / (2**bits - 1)
        q[:, j] = np.clip(np.round((W[:, j] - low) / scale), 0, 2**bits - 1)
        inverse = np.linalg.inv(H[j:, j:])
        error = (W[:, j] - (q[:, j] * scale + low)) / inverse[0, 0]
        W[:, j:] -= np.outer(error, inverse[0])
    return q


@pytest.mark.parametrize("bits, group_size", [(2, 32), (3, 64), (4, 128), (8, 64)])
def test_integers(bits, group_size):
    """Nearly all integers are equal: float32 rounds some near ties the other way. 192 columns are more than a block."""
    x = correlated(256 if group_size == 128 else 192)
    gram, weight = x.T @ x / len(x), np.random.default_rng(1).standard_normal((6, x.shape[1])).astype(np.float32)
    q, scale, zero = quantize(mx.array(weight), mx.array(gram.astype(np.float32)), bits, group_size)
    expected = one_column_at_a_time(weight, gram.astype(np.float32), bits, group_size)
    assert (np.array(q) == expected).mean() > (0.97 if bits < 8 else 0.8)
    assert np.abs(np.array(q).astype(int) - expected).max() <= 2 + bits // 8 * 8
    assert scale.shape == zero.shape == (6, x.shape[1] // group_size)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_outputs_are_nearer(bits):
    """The error of the outputs is far below that of rounding to the nearest; the error of the weights is above it."""
    x = correlated(128)
    weight = np.random.default_rng(1).standard_normal((32, 128)).astype(np.float32)
    errors = {}
    for name, found in (("gptq", quantize(mx.array(weight), mx.array((x.T @ x / len(x)).astype(np.float32)), bits, 64)),
                        ("rtn", round_to_nearest(mx.array(weight), bits, 64))):
        q, scale, zero = (np.array(part, np.float64) for part in found)
        W = (q - np.repeat(zero, 64, 1)) * np.repeat(scale, 64, 1)
        errors[name] = np.square(x @ (W - weight).T).mean(), np.square(W - weight).mean()
    assert errors["gptq"][0] < 0.7 * errors["rtn"][0] and errors["gptq"][1] > errors["rtn"][1]


def test_dead_inputs():
    """Columns of inputs that are always 0 become about 0, and all other weights stay finite."""
    x = correlated(64)
    x[:, [3, 40]] = 0
    q, scale, zero = quantize(mx.random.normal((4, 64)), mx.array((x.T @ x / 2000).astype(np.float32)), 4, 32)
    W = (np.array(q, np.float64) - np.repeat(np.array(zero), 32, 1)) * np.repeat(np.array(scale), 32, 1)
    assert np.isfinite(W).all() and np.abs(W[:, [3, 40]]).max() < 0.6 * np.array(scale).max()


# ---- calibration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [
    dict(), dict(tie=False, mlp="swiglu"), dict(yoco=True), dict(n_expert=3)], ids=str)
def test_inputs(settings):
    """The input of q is the norm's output, that of down the hidden layer, that of the head the last norm's output; the
    model is unchanged afterwards."""
    model = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=64, **settings), seed=1).eval()
    rows, seen = mx.array(np.random.default_rng(0).integers(0, 64, (5, 16))), {}

    def tap(site, layer, x):
        seen[site, layer] = x
        return x

    logits = model(rows, tap=tap)
    linear = {path: module for path, module in matrices(model).items() if hasattr(module, "input_dims") or
              type(module).__name__ == "Linear"}
    found = matrix_inputs(model, linear, rows, 2)
    assert mx.array_equal(model(rows), logits) and found.keys() == linear.keys()
    expected = {"blocks.1.attn.q": model.blocks[1].attn_norm(seen["resid", 1])}
    if not settings.get("n_expert"):
        expected["blocks.1.mlp.down"] = seen["hidden", 1]
    if "head" in linear:
        expected["head"] = model.norm(seen["resid", 2])
    for path, x in expected.items():
        flat = np.array(x, np.float64).reshape(-1, x.shape[-1])
        np.testing.assert_allclose(np.array(found[path][0]), flat.T @ flat / len(flat), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(np.array(found[path][1]), np.abs(flat).mean(0), rtol=1e-4)


def test_windows():
    tokens = np.arange(100)
    rows = np.array(windows(tokens, 64, 7, 0))
    assert rows.shape == (14, 7) and (np.diff(rows) == 1).all() and len(set(rows[:, 0].tolist())) == 14


# ---- files -----------------------------------------------------------------------------------------------------------


def checkpoint(tmp_path, **settings):
    model = GPT(GPTConfig(**dict(block_size=32, vocab_size=320, n_layer=2, n_head=2, n_embd=64) | settings), seed=1)
    path = tmp_path / "ckpt.safetensors"
    save_checkpoint(str(path), model, {"tokenizer": byte_tokenizer().to_dict(), "step": 7})
    return path, model


FLAVOURS = [
    dict(), dict(tie=False, bias=True, norm="layer", mlp="gelu", pos="learned"), dict(n_expert=3, mlp="swiglu"),
    dict(diff_attn=True, yoco=True, mlp="swiglu"), dict(mod="topk", alibi=True),
    dict(sliding_window=9, diff_attn=True, diff_attn_version=2, n_kv_head=1), dict(value_residual=True),
    dict(value_embeds=True, softcap=5.0),
    dict(mlp="geglu", norm_place="both", sliding_window=9, window_theta=100.0, rope_theta=1e6, n_kv_head=1,
         embed_scale=8.0, attn_scale=0.2, attn_softcap=5.0),
    dict(norm="layer", norm_bias=True, norm_place="after", parallel=True, qk_norm_width=True, rotary_dim=8, tie=False,
         rope_pattern="RN", out_bias=True, head_bias=True, residual_scale=0.5, logit_scale=0.5),
]


@pytest.mark.parametrize("script", ["gptq.py", "awq.py"])
@pytest.mark.parametrize("settings", FLAVOURS, ids=str)
def test_checkpoint(script, settings, tmp_path):
    """At 8 bits the logits of every variant hardly change; the header has the method, the bits and the group size."""
    path, model = checkpoint(tmp_path, **settings)
    text = f"--data={ROOT / 'README.md'}"
    done = run(script, path, text, "--bits=8", "--samples=8", "--scale_dtype=float32", f"--test={ROOT / 'LOG.md'}",
               "--max_tokens=200")
    method = script.removesuffix(".py")
    packed, meta = load_checkpoint(str(tmp_path / f"ckpt-{method}-8.safetensors"))
    assert meta["quantization"] == {"method": method, "bits": "8", "group_size": 64} and meta["step"] == 7
    assert all(module.bits == 8 for module in matrices(packed).values())
    assert ("embed " in done.stdout) and "rounded" in done.stdout and "before: perplexity" in done.stdout
    idx = mx.array(np.random.default_rng(1).integers(0, 256, (2, 20)))
    logits, found = model.eval()(idx), packed(idx)
    error = mx.abs(found - logits)  # the median: a token near a threshold may take another expert, or depth
    assert mx.median(error) < 0.02 * mx.abs(logits).max()


def test_blocks_are_calibrated_in_order(tmp_path):
    """The second block's integers are those for its inputs after the quantized first block, not after the dense one."""
    path, model = checkpoint(tmp_path)
    run("gptq.py", path, f"--data={ROOT / 'README.md'}", "--bits=2", "--samples=8", "--scale_dtype=float32")
    packed, _ = load_checkpoint(str(tmp_path / "ckpt-gptq-2.safetensors"))
    found = packed.blocks[1].attn.q
    rows = windows(read_tokens(str(ROOT / "README.md"), byte_tokenizer()), 8, 32, 1337)
    packed.blocks[1], packed.embed = model.blocks[1], model.embed  # as they were at that time
    same, name = [], "blocks.1.attn.q"
    for before in (packed, model):
        gram, _ = matrix_inputs(before, {name: before.blocks[1].attn.q}, rows, 8)[name]
        q, _, _ = quantize(model.blocks[1].attn.q.weight, gram, 2, 64)
        theirs = mx.dequantize(found.weight, mx.ones_like(found.scales), mx.zeros_like(found.scales), 64, 2)
        same.append((q == theirs).mean().item())
    assert same[0] > 0.95 > 0.85 > same[1]


@pytest.mark.parametrize("script", ["gptq.py", "awq.py"])
@pytest.mark.parametrize("arguments, says", [
    ([], "give --data=FILE"), (["--data={readme}", "--group_size=128"], "not a multiple of group_size=128"),
    (["--data={readme}", "--bits=7"], "'7' is not one of"), (["--data={short}"], "less than one window of 32"),
    (["--data={readme}", "--samples=0"], "samples"), (["--data=none.txt"], "none.txt is not a text file"),
    (["--data={readme}", "--out={path}"], "would overwrite the input"), (["--data={readme}", "--seed=-1"], "seed=-1"),
])
def test_bad_input(script, arguments, says, tmp_path):
    path, _ = checkpoint(tmp_path)
    (tmp_path / "short.txt").write_text("short")
    names = dict(readme=ROOT / "README.md", short=tmp_path / "short.txt", path=path)
    assert says in run(script, path, *(argument.format(**names) for argument in arguments), status=2).stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ckpt.safetensors", "short.txt"]


def test_damping(tmp_path):
    """Inputs that are fully correlated have no inverse without enough damping."""
    path, _ = checkpoint(tmp_path)
    for damping, says in (("0", "damping a finite number over 0"), ("inf", "a number that is finite")):
        done = run("gptq.py", path, "--data=x", f"--damping={damping}", status=2)
        assert says in done.stderr
    with pytest.raises(UserError, match="give a greater --damping"):
        quantize(mx.random.normal((4, 64)), mx.ones((64, 64)), 4, 32, damping=1e-300)
    quantize(mx.random.normal((4, 64)), mx.ones((64, 64)), 4, 32)


@pytest.mark.parametrize("script", ["gptq.py", "awq.py"])
def test_inputs_beyond_float16(script, tmp_path):
    """The weights are finite, but the inputs of a layer are not."""
    path, model = checkpoint(tmp_path)
    model.blocks[0].mlp.up.weight = model.blocks[0].mlp.up.weight * 1e5
    model.set_dtype(mx.float16)
    save_checkpoint(str(path), model, {"tokenizer": byte_tokenizer().to_dict()})
    done = run(script, path, f"--data={ROOT / 'README.md'}", "--samples=2", status=2)
    assert "blocks.0.mlp.down has infinite or NaN inputs on this text" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["ckpt.safetensors"]


@pytest.mark.parametrize("script", ["gptq.py", "awq.py"])
def test_bad_weights(script, tmp_path):
    path, model = checkpoint(tmp_path)
    text = f"--data={ROOT / 'README.md'}"
    run(script, path, text, "--samples=2")
    packed = next(tmp_path.glob("ckpt-*"))
    assert "is quantized already" in run(script, packed, text, status=2).stderr
    model.blocks[1].mlp.up.weight[3, 4] = mx.nan
    save_checkpoint(str(path), model, {"tokenizer": byte_tokenizer().to_dict()})
    assert "has infinite or NaN numbers in blocks.1.mlp.up.weight" in run(
        script, path, text, "--out=d", "--samples=2", status=2).stderr
    assert not (ROOT / "d").exists()
