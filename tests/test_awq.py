"""awq.py: scaling does not change the outputs of any variant; scales and ranges against a slow search. Files and bad
input are tested in test_gptq.py."""
import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, run
from test_gptq import FLAVOURS, checkpoint, correlated

import awq
from model import GPT, GPTConfig, load_checkpoint, save_checkpoint
from packing import matrix_inputs, pack, round_to_nearest
from quantized import Factored, replace_module
from score import read_tokens, windows
from tokenizer import byte_tokenizer


def dequantized(q, scale, zero):
    width = q.shape[1] // scale.shape[1]
    q, scale, zero = (np.array(part, np.float64) for part in (q, scale, zero))
    return (q - np.repeat(zero, width, 1)) * np.repeat(scale, width, 1)


@pytest.mark.parametrize("settings", [*FLAVOURS, dict(mlp="swiglu", bias=True), dict(mlp="relu2", bias=True),
                                      dict(mlp="swiglu_clip", bias=True, sink_logits=True)], ids=str)
def test_scaling_is_exact(settings):
    """The logits do not change, whatever s is and wherever it is applied."""
    sizes = dict(block_size=32, vocab_size=64, n_layer=4, n_head=2, n_embd=64)
    model = GPT(GPTConfig(**sizes | settings), seed=1).eval()
    rng, idx = np.random.default_rng(0), mx.array(np.random.default_rng(1).integers(0, 64, (2, 20)))
    for module in model.modules():
        if "bias" in module:
            module.bias = mx.array(rng.standard_normal(module.bias.shape).astype(np.float32)) * 0.1
    for path, module in model.named_modules():
        if path.endswith("value_gate"):  # 0 at the start
            module.weight = mx.array(rng.standard_normal(module.weight.shape).astype(np.float32))
    logits, scaled = model(idx), set()
    for start in (*(f"blocks.{i}" for i in range(4)), *(["shared"] if settings.get("yoco") else [])):
        for paths, producers in awq.shared_inputs(model, start):
            inputs = dict(model.named_modules())[paths[0]].weight.shape[1]
            awq.scale_inputs(model, paths, producers, mx.array(rng.uniform(0.5, 2, inputs).astype(np.float32)))
            scaled |= {path.split(".", 2 if start != "shared" else 1)[-1] for path in paths}
    assert mx.abs(model(idx) - logits).max() < 2e-4 * mx.abs(logits).max()
    assert ("attn.value_gate" in scaled) == bool(settings.get("value_embeds"))
    assert ("mlp.down" in scaled) == (settings.get("mlp", "relu2") not in ("gelu", "swiglu_clip")
                                        and not settings.get("n_expert"))
    assert ("attn.out" in scaled) == (not {"diff_attn", "n_kv_head", "value_residual"} & settings.keys())


def factor(path: str, model: GPT):
    """Replace a linear layer by a low-rank one."""
    mx.random.seed(0)
    old = dict(model.named_modules())[path]
    new = Factored(old, 32)
    if "bias" in old:
        new.u.bias = old.bias
    replace_module(model, path, new)


@pytest.mark.parametrize("settings", [dict(), dict(mlp="swiglu", bias=True), dict(yoco=True)], ids=str)
@pytest.mark.parametrize("names", [["mlp.up"], ["mlp.down", "attn.k"], ["attn.v", "attn.out", "attn.q"]], ids=str)
def test_low_rank_layers(settings, names, tmp_path):
    """Of a low-rank layer u v, v is scaled as the reader of an input, and u as its producer; the file is written."""
    path, model = checkpoint(tmp_path, **settings)
    for name in names:
        factor(f"blocks.0.{name}", model)
    save_checkpoint(str(path), model, {"tokenizer": byte_tokenizer().to_dict()})
    (tmp_path / "text.txt").write_text(" ".join(map(str, range(2000))))
    run("awq.py", path, f"--data={tmp_path / 'text.txt'}", "--bits=8", "--group_size=32", "--samples=4")
    packed, idx = load_checkpoint(str(tmp_path / "ckpt-awq-8.safetensors"))[0], mx.arange(20)[None]
    logits, rng = model.eval()(idx), np.random.default_rng(0)
    assert mx.abs(packed(idx) - logits).max() < 0.05 * mx.abs(logits).max()
    read = set()
    for paths, producers in awq.shared_inputs(model, "blocks.0"):
        inputs = dict(model.named_modules())[paths[0]].weight.shape[1]
        awq.scale_inputs(model, paths, producers, mx.array(rng.uniform(0.5, 2, inputs).astype(np.float32)))
        read |= set(paths)
    assert mx.abs(model(idx) - logits).max() < 2e-4 * mx.abs(logits).max()
    assert {f"blocks.0.{name}.v" for name in names} <= read


def test_best_scale():
    """The chosen exponent of the twenty has the least error of the outputs, computed from the outputs."""
    rng, x = np.random.default_rng(0), correlated(64)
    x[:, 5] *= 30  # an input that matters
    weights = [rng.standard_normal((16, 64)).astype(np.float32) for _ in range(2)]
    gram, size = x.T @ x / len(x), np.abs(x).mean(0)
    s = np.array(awq.best_scale([mx.array(w) for w in weights], mx.array(gram.astype(np.float32)),
                                mx.array(size.astype(np.float32)), [3, 3], 32), np.float64)
    errors, candidates = [], []
    for r in np.arange(20) / 20:
        scale = size**r / np.sqrt((size**r).max() * (size**r).min())
        rounded = [dequantized(*round_to_nearest(mx.array((w * scale).astype(np.float32)), 3, 32)) for w in weights]
        errors.append(sum(np.square(x @ (back / scale - w).T).mean() for back, w in zip(rounded, weights, strict=True)))
        candidates.append(scale)
    best = int(np.argmin(errors))
    assert best > 0 and errors[best] < 0.8 * errors[0]
    np.testing.assert_allclose(s, candidates[best], rtol=1e-4)


@pytest.mark.parametrize("bits", [2, 4])
def test_ranges(bits):
    """Each group of each row takes the share of its range that gives the least error of the outputs."""
    x, weight = correlated(64), np.random.default_rng(1).standard_t(3, (5, 64)).astype(np.float32)
    gram = x.T @ x / len(x)
    found = dequantized(*awq.quantize(mx.array(weight), mx.array(gram.astype(np.float32)), bits, 32))
    shares = set()
    for row in range(5):
        for group in range(2):
            part, columns = weight[row, 32 * group:32 * group + 32], x[:, 32 * group:32 * group + 32]
            errors = []
            for share in np.arange(20, 9, -1) / 20:
                cut = np.clip(part, part.min() * share, part.max() * share)
                back = dequantized(*round_to_nearest(mx.array(cut[None].astype(np.float32)), bits, 32))[0]
                errors.append(np.square(columns @ (back - part)).mean())
            error = np.square(columns @ (found[row, 32 * group:32 * group + 32] - part)).mean()
            assert error <= min(errors) * 1.001
            shares.add(int(np.argmin(errors)))
    assert len(shares) > 1


def test_file(tmp_path):
    """The norm's weights are divided by s; the next matrices hold the integers of W s, with ranges for inputs x / s."""
    path, model = checkpoint(tmp_path)
    model.blocks[0].attn_norm.weight = mx.array(np.random.default_rng(0).lognormal(0, 1, 64).astype(np.float32))
    save_checkpoint(str(path), model, {"tokenizer": byte_tokenizer().to_dict()})
    run("awq.py", path, f"--data={ROOT / 'README.md'}", "--bits=3", "--samples=8", "--scale_dtype=float32")
    found = load_checkpoint(str(tmp_path / "ckpt-awq-3.safetensors"))[0].blocks[0]
    s = model.blocks[0].attn_norm.weight / found.attn_norm.weight
    rows = windows(read_tokens(str(ROOT / "README.md"), byte_tokenizer()), 8, 32, 1337)
    name = "blocks.0.attn.q"
    gram, size = matrix_inputs(model, {name: model.blocks[0].attn.q}, rows, 8)[name]
    assert s.max() > 1.5 * s.min() and np.corrcoef(np.log(s), np.log(size))[0, 1] > 0.99
    q, scale, _ = awq.quantize(model.blocks[0].attn.q.weight * s, gram / (s[:, None] * s), 3, 64)
    assert (pack(q, 3) == found.attn.q.weight).mean() > 0.95
    np.testing.assert_allclose(np.array(scale), np.array(found.attn.q.scales), rtol=1e-3)
