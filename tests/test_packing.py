"""packing.py: integers of any number of bits, unpacked by MLX; the choice of bits for each matrix; paths to write."""
import os
import re
import shlex

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import run
from test_cpu import near, numbers

import packing
from config import UserError
from model import GPT, Experts, GPTConfig, save_checkpoint
from quantized import BITS

# ---- integers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 128)])
def test_pack(bits, shape):
    """MLX unpacks the integers that were packed."""
    q = np.random.default_rng(bits).integers(0, 2**bits, shape)
    q.flat[:2] = 0, 2**bits - 1
    words, ones = packing.pack(mx.array(q), bits), mx.ones((*shape[:-1], shape[-1] // 32))
    assert words.dtype == mx.uint32 and words.shape == (*shape[:-1], shape[-1] * bits // 32)
    assert np.array_equal(np.array(mx.dequantize(words, ones, mx.zeros_like(ones), 32, bits)), q)


@pytest.mark.parametrize("bits", BITS)
def test_packed_module(bits):
    """A linear layer, an embedding and experts compute with the weight (q - zero) scale."""
    rng = np.random.default_rng(0)
    q, scale, zero = rng.integers(0, 2**bits, (40, 128)), rng.uniform(1, 2, (40, 2)), rng.uniform(0, 2**bits, (40, 2))
    weight = (q - np.repeat(zero, 64, 1)) * np.repeat(scale, 64, 1)
    arrays = mx.array(q), mx.array(scale.astype(np.float32)), mx.array(zero.astype(np.float32))
    x = numbers(3, 128)
    linear = packing.packed_module(nn.Linear(128, 40), *arrays, bits, mx.float32)
    assert near(linear(mx.array(x)) - linear.bias, x @ weight.T)
    embedding = packing.packed_module(nn.Embedding(40, 128), *arrays, bits, mx.float32)
    assert near(embedding(mx.array([3, 39])), weight[[3, 39]])
    experts = packing.packed_module(Experts(2, 128, 40, False), *(mx.stack([a, a[::-1]]) for a in arrays), bits,
                                      mx.float32)
    expected = [weight @ x[0], weight[::-1] @ x[1], weight[::-1] @ x[2]]
    assert near(experts(mx.array(x), mx.array([0, 1, 1]), None), expected)


def test_plan():
    """The last rule that matches counts; routers are left as they are."""
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=64, vocab_size=64, tie=False, n_expert=4, mod="soft"))
    found = packing.plan(model, "4, mlp=3, head=0, blocks.1=8", 32)
    assert found["embed"] == found["blocks.0.attn.q"] == 4 and found["blocks.0.mlp.up"] == 3 and "head" not in found
    assert found["blocks.1.mlp.up"] == found["blocks.1.attn.out"] == 8
    assert not [path for path in found if "router" in path]
    assert [path for path in found if ".attn.q" in path] == ["blocks.0.attn.q", "blocks.1.attn.q"]


@pytest.mark.parametrize("bits, group_size, says", [
    ("7", 64, "'7' is not one of 0, 2"), ("4, mlpp=3", 64, "did you mean mlp.up?"), ("", 64, "'' is not one of"),
    ("4", 48, "group_size=48"), ("0", 64, "quantizes nothing"),
    ("4", 128, "attn.k has 64 inputs, not a multiple of group_size=128: give --group_size=64"),
    ("4, (=3", 64, "is not a regular expression"), ("four", 64, "'four' is not one of"),
])
def test_plan_is_refused(bits, group_size, says):
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=64, vocab_size=64))
    with pytest.raises(UserError, match=re.escape(says)):
        packing.plan(model, bits, group_size)


def test_plan_tells_what_to_leave_out():
    """Where no group size divides all widths, the message names rules that make it work."""
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=96, ffn_dim=100, vocab_size=64))
    with pytest.raises(UserError, match="leave it out by --bits='4, mlp.down=0'"):
        packing.plan(model, "4", 32)
    with pytest.raises(UserError) as refused:
        packing.plan(model, "4", 64)
    rules = shlex.split(str(refused.value))[-1].removeprefix("--bits=")
    assert "blocks" not in rules and "attn.q=0" in rules and rules.count("mlp.down") == 1
    with pytest.raises(UserError, match="quantizes nothing"):
        packing.plan(model, rules, 64)
    assert "blocks.0.mlp.down" not in packing.plan(model, "4, mlp.down=0", 32)


def test_plan_refuses_quantized_matrices():
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=64, vocab_size=64))
    nn.quantize(model, 64, 4, class_predicate=lambda path, _: path.endswith("mlp.up"))
    with pytest.raises(UserError, match="mlp.up is quantized already, to 4 bits"):
        packing.plan(model, "4", 64)


@pytest.mark.parametrize("module", ["packing", "quantized", "score", "tokenizer", "conversations", "lora", "blas"])
def test_modules_are_not_scripts(module):
    """A module that is run says in one line which script to run."""
    assert run(f"{module}.py", status=2).stderr.endswith(".py, which uses it\n")


def test_output_path(tmp_path, monkeypatch):
    """No input is written over, by whatever name it is given."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("ckpt.safetensors", "book.txt", "data/val.bin"):
        (tmp_path / name).touch()
    os.symlink("ckpt.safetensors", "link")
    assert packing.output_path("ckpt.safetensors", "", "hqq-4", "book.txt", "") == "ckpt-hqq-4.safetensors"
    for out in ("ckpt.safetensors", "link", "data/../ckpt.safetensors", str(tmp_path / "book.txt"), "data/val.bin"):
        with pytest.raises(UserError, match="would overwrite the input"):
            packing.output_path("./ckpt.safetensors", out, "hqq-4", "book.txt", "data")


def test_results_are_not_replaced(tmp_path, capsys, monkeypatch):
    """Only an earlier result of the same script may be replaced, which is printed."""
    monkeypatch.setattr("sys.argv", ["hqq.py"])
    path = str(tmp_path / "out.safetensors")
    model = GPT(GPTConfig(n_layer=1, n_embd=32, n_head=2, vocab_size=32))
    for header, says in (({"script": "train.py"}, "made by train.py"), ({}, "and is no result of a script"),
                         ({"script": ["hqq.py"]}, "and is no result of a script")):
        save_checkpoint(path, model, header)
        with pytest.raises(UserError, match=f"out.safetensors exists, {says}: give another name"):
            packing.output_path("ckpt.safetensors", path, "hqq-4")
    for content in (b"", b"text", b"\xff" * 8 + b"{}", (2).to_bytes(8, "little") + b"{}", b"[" * 100_000):
        (tmp_path / "out.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="exists, and is no result of a script"):
            packing.output_path("ckpt.safetensors", path, "hqq-4")
    save_checkpoint(path, model, {"script": "hqq.py"})
    assert packing.output_path("ckpt.safetensors", path, "hqq-4") == path
    assert capsys.readouterr().out == f"{path} is an earlier result of hqq.py, which is replaced\n"


@pytest.mark.parametrize("settings", [
    {}, dict(value_residual=True), dict(value_embeds=True), dict(yoco=True, n_layer=4, sliding_window=8),
    dict(mod="topk", n_layer=4), dict(n_expert=2), dict(parallel=True), dict(norm_place="both"),
], ids=str)
def test_kept_streams(settings):
    """A block's inputs are those that are computed from the tokens on, where the blocks before it have changed since
    the streams before them were recorded."""
    sizes = dict(block_size=16, vocab_size=64, n_layer=3, n_head=2, n_embd=64)
    model = GPT(GPTConfig(**sizes | settings), seed=1).eval()
    rows, streams = mx.array(np.random.default_rng(0).integers(0, 64, (5, 16))), {}
    for layer in range(model.config.n_layer):
        part, layers = f"blocks.{layer}", {path: module for path, module in packing.matrices(model).items()
                                           if path.startswith(f"blocks.{layer}.") and isinstance(module, nn.Linear)}
        found = packing.matrix_inputs(model, layers, rows, 2, part, streams)
        expected = packing.matrix_inputs(model, layers, rows, 2)
        assert layers and [*streams] == [layer] and len(streams[layer]) == 3
        for path in layers:
            assert all(mx.array_equal(x, y) for x, y in zip(found[path], expected[path], strict=True)), path
            packing.replace_module(model, path, packing.packed_module(
                layers[path], *packing.round_to_nearest(layers[path].weight, 2, 32), 2))
