"""hqq.py: the solver against results of the hqq package and against float64 numpy; files; bad input."""
import json
import re
import struct
import subprocess
import sys
from functools import partial
from importlib.metadata import distributions

import blas  # noqa: F401  (before mlx)
import conftest
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import prepared
import pytest
from conftest import ROOT
from mlx.utils import tree_flatten
from peers import peer

from hqq import quantize, shrink
from model import GPT, GPTConfig, load_checkpoint, save_checkpoint
from packing import matrices, round_to_nearest
from quantized import BITS
from tokenizer import byte_tokenizer

PEER = np.load(ROOT / "tests" / "fixtures" / "hqq.npz")
IDX = mx.array(np.random.default_rng(1).integers(0, 256, (2, 20)))


def errors(weight, q, scale, zero, p=1) -> np.ndarray:
    """|W - (q - zero) scale|^p of each weight, float64."""
    scale, zero = (np.repeat(np.array(x, np.float64), weight.shape[-1] // x.shape[-1], -1) for x in (scale, zero))
    return np.abs(weight - (np.array(q, np.float64) - zero) * scale) ** p


# ---- solver ----------------------------------------------------------------------------------------------------------


def test_shrink():
    x = np.array([-2, -0.5, -0.18, -0.17, -1e-6, 0, 1e-30, 0.1, 0.171, 0.3, 40])
    with np.errstate(divide="ignore"):
        expected = np.sign(x) * np.maximum(np.abs(x) - np.abs(x) ** -0.3 / 10, 0)
    np.testing.assert_allclose(np.array(shrink(mx.array(x, dtype=mx.float32))), expected, atol=1e-6)


def slow_hqq(weight, bits, group_size, iterations, scale_moves=False):
    """The paper's iterations in float64, one group at a time, of the zero alone or of zero and scale. Each group keeps
    the zero and scale of its least mean squared error."""
    zeros, scales = [], []
    for g in weight.reshape(-1, group_size).astype(np.float64):
        s = (2**bits - 1) / (g.max() - g.min())
        z = -g.min() * s
        least = np.inf
        for _ in range(iterations):
            q = np.clip(np.round(g * s + z), 0, 2**bits - 1)
            d = g - (q - z) / s
            if (d**2).mean() < least:
                least, best = (d**2).mean(), (z, 1 / s)
            e = np.sign(d) * np.maximum(np.abs(d) - np.maximum(np.abs(d), 1e-12) ** -0.3 / 10, 0)
            if scale_moves:
                s = 1 / np.polyfit(q, g - e, 1)[0]
            z = (q - (g - e) * s).mean()
        zeros.append(best[0])
        scales.append(best[1])
    return [np.array(x).reshape(len(weight), -1) for x in (scales, zeros)]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("size", [0.02, 1.0])
def test_zero_alone(bits, size):
    """The zero alone is fitted, as in the paper. At size 1 some errors are so large that shrink() is not 0."""
    weight = (np.random.default_rng(2).standard_t(3, (12, 128)) * size).astype(np.float32)
    _, scale, zero = quantize(mx.array(weight), bits, 64, scale_moves=False)
    expected = slow_hqq(weight, bits, 64, 20)
    np.testing.assert_allclose(np.array(scale), expected[0], rtol=1e-5)
    near = np.isclose(np.array(zero), expected[1], rtol=1e-3, atol=1e-3)
    assert near.mean() > 0.9  # float32 may round a tie the other way, and then goes another way


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("size", [0.02, 1.0])
def test_zero_and_scale(bits, size):
    """The scale is fitted too, by least squares."""
    weight = (np.random.default_rng(2).standard_t(3, (12, 128)) * size).astype(np.float32)
    _, scale, zero = quantize(mx.array(weight), bits, 64, iterations=5)
    expected = slow_hqq(weight, bits, 64, 5, scale_moves=True)
    near = np.isclose(np.array(scale), expected[0], rtol=1e-3) & np.isclose(np.array(zero), expected[1], atol=1e-2)
    assert near.mean() > 0.9


def test_the_package_gives_the_fixture(tmp_path):
    """In a process of its own, where our hqq.py is not found in place of the package."""
    peer("torch")
    if not any(distributions(name="hqq")):
        pytest.skip("could not find the package hqq")
    subprocess.run([sys.executable, ROOT / "tests" / "fixtures" / "make_hqq.py"], cwd=tmp_path, check=True)
    made = np.load(tmp_path / "hqq.npz")
    assert set(made) == set(PEER)
    for name in PEER:
        np.testing.assert_allclose(made[name], PEER[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_beside_the_package(bits, group_size):
    """With the zero alone: the package's scales, over 99% of its integers, and an error no larger. With the scale:
    lower means of e^2, |e| and |e|^0.7; at 5 and 6 bits the last two are at most 1% higher."""
    weight, name = PEER["weight"], f"{bits}.{group_size}"
    theirs = [PEER[f"{name}.{part}"] for part in ("q", "scale", "zero")]
    paper = quantize(mx.array(weight), bits, group_size, scale_moves=False)
    np.testing.assert_allclose(np.array(paper[1]), theirs[1], rtol=1e-5)
    assert (np.array(paper[0]) == theirs[0]).mean() > 0.99
    assert errors(weight, *paper, 2).mean() <= errors(weight, *theirs, 2).mean() * 1.0001
    ours = quantize(mx.array(weight), bits, group_size)
    for p in (1, 2, 0.7):
        most = 1.01 if p != 2 and bits in (5, 6) else 1
        assert errors(weight, *ours, p).mean() < most * errors(weight, *theirs, p).mean()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("heavy", [False, True], ids=["normal", "heavy tails"])
def test_beats_rounding(bits, group_size, heavy):
    rng = np.random.default_rng(bits)
    weight = (rng.standard_t(3, (64, 256)) if heavy else rng.standard_normal((64, 256))).astype(np.float32) * 0.05
    ours, nearest = (f(mx.array(weight), bits, group_size) for f in (quantize, round_to_nearest))
    assert (np.array(ours[0]) < 2**bits).all() and ours[1].shape == ours[2].shape == (64, 256 // group_size)
    squares = [errors(weight, *found, 2).reshape(64, -1, group_size).mean(-1) for found in (ours, nearest)]
    assert (squares[0] <= squares[1] * 1.001).all() and squares[0].mean() < 0.99 * squares[1].mean()
    assert errors(weight, *ours).mean() < errors(weight, *nearest).mean()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_constants_and_outliers(bits):
    """Constant groups are exact; next to an outlier the error is at most half a step."""
    weight = np.zeros((4, 64), np.float32)
    weight[1], weight[2] = 0.3, 1e-30
    weight[3] = np.random.default_rng(0).standard_normal(64) * 0.01
    weight[3, 9] = 1000
    for f in (quantize, round_to_nearest):
        found = errors(weight, *f(mx.array(weight), bits, 64))
        assert found[:3].max() == 0
        assert np.isfinite(found).all() and found[3].max() <= 0.51 * (1000.1 / (2**bits - 1))


def test_groups_near_zero():
    """Weights near the smallest float32 number, as weight decay leaves them, change no other group."""
    weight = (np.random.default_rng(0).standard_t(4, (8, 128)) * 0.02).astype(np.float32)
    expected = quantize(mx.array(weight[4:]), 3, 64)
    weight[:2] *= np.float32(1e-39)
    found = quantize(mx.array(weight), 3, 64)
    assert mx.array_equal(found[0][4:], expected[0]) and errors(weight, *found)[:2].max() < 1e-30
    assert np.isfinite(np.array(found[1])).all() and np.isfinite(np.array(found[2])).all()


def test_experts_are_matrices():
    """Each expert's matrix gets the integers that it gets alone."""
    weight = mx.random.normal((3, 8, 64), key=mx.random.key(0))
    settings = dict(bits=3, group_size=32, scale_moves=False)
    for whole, part in zip(quantize(weight, **settings), quantize(weight[1], **settings), strict=True):
        assert mx.array_equal(whole[1], part)


# ---- files -----------------------------------------------------------------------------------------------------------


def checkpoint(tmp_path, **settings):
    model = GPT(GPTConfig(**dict(block_size=64, vocab_size=320, n_layer=2, n_head=2, n_embd=64) | settings), seed=1)
    path = tmp_path / "ckpt.safetensors"
    save_checkpoint(str(path), model, {"tokenizer": byte_tokenizer().to_dict(), "step": 7})
    return path, model


run = partial(conftest.run, "hqq.py")


@pytest.mark.parametrize("settings", [
    dict(), dict(tie=False, bias=True, norm="layer"), dict(n_expert=3, mlp="swiglu"), dict(diff_attn=True, yoco=True),
    dict(mod="soft", alibi=True), dict(sliding_window=9, diff_attn=True, diff_attn_version=2),
], ids=str)
def test_checkpoint(settings, tmp_path):
    """Every matrix is quantized, and computes with the weight of its integers. The table has its error and that of
    rounding; the header has the settings."""
    path, model = checkpoint(tmp_path, **settings)
    done = run(path, "--scale_dtype=float32")
    packed, meta = load_checkpoint(str(tmp_path / "ckpt-hqq-4.safetensors"))
    assert meta["quantization"] == {"method": "hqq", "bits": "4", "group_size": 64} and meta["step"] == 7
    for name, module in matrices(model).items():
        found = matrices(packed)[name]
        q, scale, zero = found_here = quantize(module.weight, 4, 64)
        wanted = (q.reshape(*scale.shape, 64) - zero[..., None]) * scale[..., None]
        weight = mx.dequantize(found.weight, found.scales, found.biases, 64, 4)
        assert mx.abs(weight - wanted.reshape(weight.shape)).max() < 1e-5 * mx.abs(weight).max()
        told = re.search(rf"^{re.escape(name)} +4 +(\S+) +(\S+)", done.stdout, re.M).groups()
        for told_error, integers in zip(told, (found_here, round_to_nearest(module.weight, 4, 64)), strict=True):
            assert float(told_error) == pytest.approx(errors(np.array(module.weight), *integers).mean(), rel=0.01)
        module.weight = weight
    logits = model(IDX)
    assert mx.abs(packed(IDX) - logits).max() < 1e-4 * mx.abs(logits).max()


def test_patterns_and_sizes(tmp_path):
    """Bits by name; a file of 4 bits in groups of 64 has at most 0.30 of the bytes of float16."""
    path, model = checkpoint(tmp_path, n_embd=256, n_head=4)
    run(path, f"--out={tmp_path / 'b.safetensors'}", "--bits=4, mlp=3, blocks.1=8, embed=0", "--group_size=32")
    packed, _ = load_checkpoint(str(tmp_path / "b.safetensors"))
    found = {name: (module.get("bits") or getattr(module, "bits", 0)) for name, module in matrices(packed).items()}
    assert found["blocks.0.attn.q"] == 4 and found["blocks.0.mlp.up"] == 3 and found["blocks.1.mlp.up"] == 8
    assert found["embed"] == 0 and mx.array_equal(packed.embed.weight, model.embed.weight)
    run(path)
    half = sum(p.size * 2 for _, p in tree_flatten(model.parameters()))
    assert (tmp_path / "ckpt-hqq-4.safetensors").stat().st_size < 0.30 * half + 20_000  # of the header


def test_loading_makes_nothing_dense(tmp_path):
    path, model = checkpoint(tmp_path, n_embd=512, n_head=8, n_layer=4)
    run(path)
    size = sum(p.nbytes for _, p in tree_flatten(load_checkpoint(str(tmp_path / "ckpt-hqq-4.safetensors"))[0]))
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    packed, _ = load_checkpoint(str(tmp_path / "ckpt-hqq-4.safetensors"))
    mx.eval(packed.parameters())
    assert mx.get_peak_memory() - before < 1.1 * size


def words(seed: int) -> bytes:
    """A text of 300 invented words, each of which is followed by few others."""
    rng = np.random.default_rng(seed)
    spelled = ["".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(2, 9))) for _ in range(300)]
    follows, word, text = rng.dirichlet(np.full(300, 0.02), 300), 0, []
    for _ in range(6000):
        word = rng.choice(300, p=follows[word])
        text.append(spelled[word])
    return " ".join(text).encode()


def test_perplexity(tmp_path):
    """Perplexity before and after equals eval.py's. On a text that the model learned, HQQ loses less than rounding."""
    path, model = checkpoint(tmp_path)
    text, optimizer = words(1), optim.Adam(1e-3)  # at a larger rate it learns letters alone, and the gain is noise
    step, tokens = nn.value_and_grad(model, lambda x: model.loss(x[:, :-1], x[:, 1:])), np.frombuffer(text, np.uint8)
    for i in range(500):
        starts = np.random.default_rng(i).integers(len(text) - 65, size=16)
        loss, gradients = step(mx.array(np.stack([tokens[start:start + 65] for start in starts]).astype(np.int32)))
        optimizer.update(model, gradients)
        mx.eval(model.parameters())
    assert loss.item() < 1.8
    save_checkpoint(str(path), model, {"tokenizer": byte_tokenizer().to_dict()})
    (tmp_path / "text.txt").write_bytes(text)
    settings, found = (f"--data={tmp_path / 'text.txt'}", "--max_tokens=8000"), {}
    for bits in (4, 3, 2):
        for method in ("hqq", "rtn"):
            done = run(path, f"--method={method}", f"--bits={bits}", *settings)
            before, found[method] = map(float, re.findall(r"perplexity ([\d.]+)", done.stdout))
        assert before < found["hqq"] < 0.995 * found["rtn"], bits
    for name, told in (("ckpt", before), ("ckpt-hqq-2", found["hqq"])):
        score = prepared.run([sys.executable, ROOT / "eval.py", tmp_path / f"{name}.safetensors", *settings]).stdout
        assert float(re.search(r"perplexity ([\d.]+)", score)[1]) == pytest.approx(told, abs=0.01)


def broken(path, change):
    """The checkpoint with one matrix changed."""
    arrays, meta = mx.load(str(path), return_metadata=True)
    arrays["blocks.0.mlp.up.weight"] = change(arrays["blocks.0.mlp.up.weight"])
    mx.eval(arrays)
    mx.save_safetensors(str(path), arrays, meta)


@pytest.mark.parametrize("arguments, says", [
    (["--group_size=128"], "has 64 inputs, not a multiple of group_size=128"), (["--bits=7"], "'7' is not one of"),
    (["--bits=4, mlpp=3"], "did you mean mlp.up"), (["--method=nf4"], "method='nf4'"),
    (["--iterations=0"], "iterations=0"), (["--scale_dtype=int8"], "scale_dtype='int8'"),
    (["--data=none.txt"], "none.txt is not a text file"),
    (["--out={path}"], "would overwrite the input"), (["--out=none/a"], "there is no folder none"),
    (["--out={path.parent}"], "it is a folder"),
    (["--data={path}", "--max_tokens=-1"], "max_tokens=-1"), (["--group_sise=32"], "did you mean --group_size"),
])
def test_bad_settings(arguments, says, tmp_path):
    path, _ = checkpoint(tmp_path)
    assert says in run(path, *(argument.format(path=path) for argument in arguments), status=2).stderr
    assert [file.name for file in tmp_path.iterdir()] == ["ckpt.safetensors"]


def test_bad_weights(tmp_path):
    path, model = checkpoint(tmp_path)
    run(path)
    assert "is quantized already, to 4 bits" in run(tmp_path / "ckpt-hqq-4.safetensors", status=2).stderr
    broken(path, lambda w: w * 1e8)
    assert "blocks.0.mlp.up has scales beyond the range" in run(path, f"--out={tmp_path / 'b'}", status=2).stderr
    run(path, f"--out={tmp_path / 'c'}", "--scale_dtype=float32")
    broken(path, lambda w: mx.where(mx.arange(64) == 3, mx.nan, w))
    assert "has infinite or NaN numbers in blocks.0.mlp.up.weight" in run(path, "--out=d", status=2).stderr
    save_checkpoint(str(path), model, {})
    model.blocks[1].attn_norm.weight[5] = mx.inf  # not a matrix, but it breaks the model, too
    save_checkpoint(str(path), model, {})
    done = run(path, "--out=d", status=2)
    assert "has infinite or NaN numbers in blocks.1.attn_norm.weight" in done.stderr and done.stdout == ""
    assert not (tmp_path / "b").exists() and not (ROOT / "d").exists()
    assert "hqq.py is a text file, not a checkpoint" in run(ROOT / "hqq.py", status=2).stderr
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "other").write_bytes(struct.pack("<Q", len(header)) + header + b"1234")
    assert "not one of ours" in run(tmp_path / "other", status=2).stderr
