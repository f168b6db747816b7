"""laser.py: the theorem's error in float64; the search finds planted noise; low-rank layers; bad input."""
import re
import subprocess
import sys
from functools import partial

import blas  # noqa: F401  (before mlx)
import conftest
import mlx.core as mx
import numpy as np
import prepared
import pytest
from conftest import ROOT
from test_gptq import FLAVOURS, checkpoint
from tqdm import tqdm

import laser
from model import GPT, GPTConfig, load_checkpoint, save_checkpoint
from packing import matrices
from quantized import Factored
from tokenizer import byte_tokenizer


@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (3, 20, 30)])
@pytest.mark.parametrize("rho", [1, 0.5, 0.1, 0.001])
def test_error(shape, rho):
    """The error is the root of the sum of squares of the singular values that were dropped (Eckart and Young)."""
    W = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    k = laser.rank_of(shape, rho)
    assert k == max(1, int(min(shape[-2:]) * rho))
    u, v = laser.low_rank(laser.svd(mx.array(W)), k)
    assert u.shape == (*shape[:-1], k) and v.shape == (*shape[:-2], k, shape[-1])
    dropped = np.linalg.svd(W.astype(np.float64), compute_uv=False)[..., k:]
    error = np.linalg.norm(np.array(u, np.float64) @ np.array(v, np.float64) - W, axis=(-2, -1))
    np.testing.assert_allclose(error, np.sqrt(np.square(dropped).sum(-1)), rtol=1e-5, atol=2e-5)


def small(seed=1, **settings):
    sizes = dict(block_size=32, vocab_size=64, n_layer=3, n_head=2, n_embd=64)
    return GPT(GPTConfig(**sizes | settings), seed=seed).eval()


ROWS = mx.array(np.random.default_rng(0).integers(0, 64, (20, 33)))


@pytest.mark.parametrize("settings", FLAVOURS, ids=str)
def test_measure(settings):
    """Loss and accuracy from the stream before any block equal those from the tokens, and the model's loss; the model
    is unchanged afterwards."""
    model = small(**settings)
    logits = model(ROWS[:, :-1])
    loss, accuracy = laser.measure(model, ROWS)
    assert loss == pytest.approx(model.loss(ROWS[:, :-1], ROWS[:, 1:]).item(), rel=1e-5)
    assert accuracy == pytest.approx((mx.argmax(logits, -1) == ROWS[:, 1:]).mean().item())
    for layer in range(3):
        streams = laser.streams_before(model, ROWS, layer)
        assert laser.measure(model, ROWS, streams, layer) == pytest.approx((loss, accuracy), rel=1e-5)
    layers = {path: matrices(model)[path] for path in ("blocks.1.mlp.up", "blocks.2.attn.q")}
    found = laser.grid(model, ROWS, layers, [1.0, 0.1], tqdm(disable=True))
    assert mx.array_equal(model(ROWS[:, :-1]), logits)
    for path in layers:
        assert found[path, 1.0][0] == pytest.approx(loss, rel=1e-4)
        u, v = laser.low_rank(laser.svd(layers[path].weight), 6)
        weight, layers[path].weight = layers[path].weight, u @ v
        assert found[path, 0.1] == pytest.approx(laser.measure(model, ROWS), rel=1e-5)
        layers[path].weight = weight


def planted():
    """A model with noise added to one matrix of rank 6, and text that the model without the noise generated."""
    model, rng = small(), np.random.default_rng(2)
    for path, module in matrices(model).items():
        if path.startswith("blocks"):
            module.weight = mx.array(rng.standard_normal(module.weight.shape).astype(np.float32)) / 8
    matrix, root = model.blocks[1].mlp.up, model.embed.weight
    model.embed.weight = root * (4 / mx.abs(root).max())  # confident predictions
    u, s, v = np.linalg.svd(np.array(matrix.weight), full_matrices=False)
    matrix.weight = mx.array((u[:, :6] * (3 * s[:6])) @ v[:6])
    idx = mx.array(rng.integers(0, 64, (32, 1)))
    mx.random.seed(0)
    for _ in range(32):
        idx = mx.concatenate([idx, mx.random.categorical(model(idx, last=True))], axis=1)
    noise = rng.standard_normal(matrix.weight.shape).astype(np.float32)
    matrix.weight = matrix.weight + mx.array(noise * (0.6 * s[5] / np.linalg.norm(noise, 2)))
    return model, idx


def test_search_finds_planted_noise():
    model, idx = planted()
    layers = {path: module for path, module in matrices(model).items() if path.startswith("blocks.")}
    dense = laser.measure(model, idx)
    found = laser.grid(model, idx, layers, [0.6, 0.1, 0.02], tqdm(disable=True))
    assert min(found, key=found.get) == ("blocks.1.mlp.up", 0.1)
    kept = laser.compose(model, idx, layers, found, dense[0])
    assert kept[0] == ("blocks.1.mlp.up", 0.1)
    assert laser.measure(model, idx)[0] <= found["blocks.1.mlp.up", 0.1][0] < dense[0]
    assert np.linalg.matrix_rank(np.array(layers["blocks.1.mlp.up"].weight), tol=1e-3) == 6
    fixed = small()  # where no edit helps, none is kept, and the model is unchanged
    layers, logits = {"blocks.1.mlp.up": fixed.blocks[1].mlp.up}, fixed(idx)
    assert laser.compose(fixed, idx, layers, {("blocks.1.mlp.up", 0.1): (1.0, 0)}, 0.5) == []
    assert laser.compose(fixed, idx, layers, {("blocks.1.mlp.up", 0.1): (0.1, 0)}, 0.5) == []
    assert laser.compose(fixed, idx, layers, {("blocks.1.mlp.up", 0.1): (11.0, 0)}, 10.0) == []  # not even tried
    assert mx.array_equal(fixed(idx), logits)


# ---- files -----------------------------------------------------------------------------------------------------------


run = partial(conftest.run, "laser.py")


@pytest.mark.parametrize("settings", [dict(), dict(bias=True, norm="layer", mlp="gelu"), dict(mod="soft", yoco=True)],
                         ids=str)
def test_factored(settings, tmp_path):
    """A low-rank layer gives the logits of the whole matrix, in a smaller file, which hqq.py can quantize."""
    path, model = checkpoint(tmp_path, **settings)
    if settings.get("bias"):
        model.blocks[1].mlp.down.bias = mx.random.normal((64,))
        save_checkpoint(str(path), model, {"tokenizer": byte_tokenizer().to_dict(), "step": 7})
    edit, idx = ("--matrix=mlp.down", "--layer=1", "--rho=0.5"), mx.array([[1, 7, 200, 300]])
    run(path, *edit, f"--out={tmp_path / 'dense.safetensors'}")
    done = run(path, *edit, "--factored=True")
    dense, _ = load_checkpoint(str(tmp_path / "dense.safetensors"))
    thin, meta = load_checkpoint(str(tmp_path / "ckpt-laser.safetensors"))
    assert isinstance(thin.blocks[1].mlp.down, Factored) and thin.blocks[1].mlp.down.u.weight.shape == (64, 32)
    assert mx.abs(thin(idx) - dense(idx)).max() < 1e-5 * mx.abs(dense(idx)).max()
    assert not mx.allclose(model.eval()(idx), dense(idx))
    assert meta["laser"] == [{"matrix": "blocks.1.mlp.down", "rho": 0.5, "rank": 32}] and meta["step"] == 7
    twice = run(tmp_path / "ckpt-laser.safetensors", *edit, status=2)
    assert "blocks.1.mlp.down is stored as two factors" in twice.stderr
    run(tmp_path / "ckpt-laser.safetensors", "--matrix=mlp.down.u", "--layer=1", "--rho=0.1", "--factored=True",
        f"--out={tmp_path / 'again.safetensors'}")
    again = load_checkpoint(str(tmp_path / "again.safetensors"))[0].blocks[1].mlp.down.u.weight
    assert np.linalg.matrix_rank(np.array(again), tol=1e-4) == 3
    run(path, "--matrix=mlp.down", "--rho=0.9", "--factored=True", f"--out={tmp_path / 'larger.safetensors'}")
    assert not isinstance(load_checkpoint(str(tmp_path / "larger.safetensors"))[0].blocks[0].mlp.down, Factored)
    saved = path.stat().st_size - (tmp_path / "ckpt-laser.safetensors").stat().st_size
    assert abs(saved - 4 * (64 * 256 - 32 * (64 + 256))) < 1000 and "0.066" in done.stdout and "0.041" in done.stdout
    hqq = prepared.run([sys.executable, ROOT / "hqq.py", tmp_path / "ckpt-laser.safetensors", "--bits=8",
                        "--group_size=32"])
    assert hqq.returncode == 0, hqq.stderr
    packed, _ = load_checkpoint(str(tmp_path / "ckpt-laser-hqq-8.safetensors"))
    assert packed.blocks[1].mlp.down.v.bits == 8
    assert mx.abs(packed(idx) - dense(idx)).max() < 0.05 * mx.abs(dense(idx)).max()


def test_value_embeddings(tmp_path):
    """An embedding is edited like any matrix, and is not stored as factors."""
    path, model = checkpoint(tmp_path, value_embeds=True)
    run(path, "--matrix=attn.value_embed", "--layer=1", "--rho=0.25", "--factored=True")
    found = load_checkpoint(str(tmp_path / "ckpt-laser.safetensors"))[0].blocks[1].attn.value_embed.weight
    u, v = laser.low_rank(laser.svd(model.blocks[1].attn.value_embed.weight), 16)
    assert mx.allclose(found, u @ v, atol=1e-5)


def test_experts(tmp_path):
    """Each expert's matrix is edited on its own, and is not stored as factors."""
    path, model = checkpoint(tmp_path, n_expert=3)
    run(path, "--matrix=mlp.down", "--layer=1", "--rho=0.25", "--factored=True")
    found = load_checkpoint(str(tmp_path / "ckpt-laser.safetensors"))[0].blocks[1].mlp.down.weight
    for expert in range(3):
        u, v = laser.low_rank(laser.svd(model.blocks[1].mlp.down.weight[expert]), 16)
        assert mx.allclose(found[expert], u @ v, atol=1e-5)


def test_search(tmp_path):
    """A search prints its table, draws its picture, measures on both kinds of windows, and writes the header."""
    path, _ = checkpoint(tmp_path)
    done = run(path, "--search=True", f"--data={ROOT / 'LOG.md'}", "--samples=4", "--rhos=0.5, 0.1")
    for name in matrices(load_checkpoint(str(path))[0]):
        assert (f"{name} " in done.stdout) == name.startswith("blocks.")
    chose, held_out = (re.search(rf"{name}: loss (\S+) ->", done.stdout)[1]
                       for name in ("windows of the search", "held-out windows"))
    assert chose != held_out
    assert (tmp_path / "ckpt-laser.png").read_bytes().startswith(b"\x89PNG")
    edits = load_checkpoint(str(tmp_path / "ckpt-laser.safetensors"))[1]["laser"]
    assert all(edit["rho"] in (0.5, 0.1) for edit in edits)


@pytest.mark.parametrize("arguments, says", [
    ([], "give --search=True, or --matrix, one of"), (["--matrix=mlp.upp"], "did you mean mlp.up"),
    (["--matrix=mlp.up", "--rho=0"], "rho=0: it must be"), (["--matrix=mlp.up", "--rho=1.5"], "rho=1.5: it must be"),
    (["--matrix=mlp.up", "--layer=2"], "layer=2 is not one of 0 to 1"), (["--search=True"], "give --data"),
    (["--matrix=mlp.up", "--layer=-1"], "layer=-1 is not one of 0 to 1"),
    (["--search=True", "--data={readme}", "--rhos=0.5, all"], "is not a list of numbers"),
    (["--search=True", "--data={readme}", "--rhos=0.5, 2"], "rho=2: it must be"),
    (["--search=True", "--data={readme}", "--samples=0"], "samples"),
    (["--search=True", "--data={short}"], "less than one window"), (["--matrix=embed"], "is in no block"),
    (["--matrix=mlp.up", "--out={path}"], "would overwrite the input"),
    (["--search=True", "--data={readme}", "--matrix=mlp.up"], "leave out --matrix"),
    (["--search=True", "--data={readme}", "--rho=0.5"], "leave out --rho"),
    (["--search=True", "--data={readme}", "--layer=1"], "leave out --layer"),
    (["--matrix=mlp.up", "--rhos=0.5"], "--rhos is for a search"),
    (["--search=True", "--data={readme}", "--picture=a.jpg"], "let its name end in .png"),
    (["--matrix=mlp.up", "--out={folder}"], "it is a folder"),
    (["--search=True", "--data={readme}", "--picture=none/a.png"], "there is no folder none"),
])
def test_bad_input(arguments, says, tmp_path):
    path, _ = checkpoint(tmp_path)
    (tmp_path / "short.txt").write_text("short")
    names = dict(readme=ROOT / "README.md", short=tmp_path / "short.txt", path=path, folder=tmp_path)
    assert says in run(path, *(argument.format(**names) for argument in arguments), status=2).stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ckpt.safetensors", "short.txt"]


def test_bad_weights(tmp_path):
    path, model = checkpoint(tmp_path, yoco=True)
    assert "block 1 has no attn.k" in run(path, "--matrix=attn.k", "--layer=1", status=2).stderr
    model.blocks[1].mlp.up.weight[3, 4] = mx.nan
    save_checkpoint(str(path), model, {"tokenizer": byte_tokenizer().to_dict()})
    assert "has infinite or NaN numbers in blocks.1.mlp.up.weight" in run(
        path, "--matrix=mlp.up", "--layer=1", status=2).stderr
    model.blocks[1].mlp.up.weight[3, 4] = 0
    save_checkpoint(str(path), model, {"tokenizer": byte_tokenizer().to_dict()})
    assert subprocess.run([sys.executable, ROOT / "hqq.py", path]).returncode == 0
    assert "is quantized to 4 bits" in run(tmp_path / "ckpt-hqq-4.safetensors", "--matrix=mlp.up", status=2).stderr
