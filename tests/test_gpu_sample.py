"""gpu_sample.cu, compiled for the processor by cuda_on_cpu.h, against what model.py's sample_token() draws without it.
On a GPU, python runs/gpu_decode_check.py compares the code that runs there."""
import shutil
import subprocess
import sys

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT
from cuda_kernels import compiles, on_cpu

import gpu_kernels
import gpu_sample
import model as core
from model import sample_token


@pytest.fixture(autouse=True)
def as_if_on_a_gpu(monkeypatch):
    on_cpu(monkeypatch)
    monkeypatch.setattr(gpu_sample, "on_gpu", lambda: True)
    gpu_sample.kernel.cache_clear()
    yield
    gpu_sample.kernel.cache_clear()


def both(monkeypatch, *arguments) -> list:
    """Tokens of sample_token() with and without gpu_sample.py; and that its kernel was used."""
    drawn = gpu_sample.draw(*arguments)
    assert drawn is not None
    with monkeypatch.context() as patched:
        patched.setattr(core, "gpu_sample", None)
        logits, keys, temperature, top_k, min_p = arguments
        return [drawn.tolist(), sample_token(logits, keys, temperature, top_k, 1.0, min_p).tolist()]


def logits_of(kind: str, B: int, V: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    x = np.random.default_rng(V).normal(0, 3, (B, V))
    if kind == "sorted":
        x = np.sort(x)
    if kind == "equal":
        x = np.round(x / 4)
    if kind == "side by side":  # all large ones belong to few threads
        x[:, ::1024] += 20
    if kind == "cut":
        x[:, V // 2:] = -np.inf
    return mx.array(x.astype(np.float32)).astype(dtype)


@compiles
@pytest.mark.parametrize("kind, V", [("normal", 1000), ("normal", 5003), ("sorted", 5003), ("equal", 9000),
                                     ("side by side", 9000), ("cut", 3000)])
@pytest.mark.parametrize("temperature, top_k, min_p", [(0.0, 0, 0.0), (0.8, 1, 0.0), (1.7, 40, 0.0), (1.0, 700, 0.02)])
def test_draws_of_mlx(monkeypatch, kind, V, temperature, top_k, min_p):
    """The tokens that MLX draws, for one key and for one a row."""
    logits, key = logits_of(kind, 3, V), mx.random.key(V + top_k)
    for keys in (key, mx.random.split(key, 3)):
        drawn, expected = both(monkeypatch, logits, keys, temperature, top_k, min_p)
        assert drawn == expected


@compiles
def test_bfloat16(monkeypatch):
    drawn, expected = both(monkeypatch, logits_of("normal", 4, 3000, mx.bfloat16), mx.random.key(1), 0.7, 50, 0.0)
    assert drawn == expected


@compiles
def test_not_finite():
    """A token beyond the vocabulary tells of NaN."""
    logits = logits_of("normal", 2, 1000)
    logits[1, 5] = mx.nan
    for temperature in (0.0, 1.0):
        one, two = gpu_sample.draw(logits, mx.random.key(0), temperature, 10, 0.0).tolist()
        assert one < 1000 and two == 2**32 - 1


def test_not_known(monkeypatch, tmp_path):
    """All tokens, more than there are threads, a processor, a missing kernel."""
    logits, key = logits_of("normal", 1, 3000), mx.random.key(0)
    assert gpu_sample.draw(logits, key, 1.0, 0, 0.0) is None
    assert gpu_sample.draw(logits, key, 1.0, 1025, 0.0) is None
    assert gpu_sample.draw(logits_of("normal", 1, 20), key, 1.0, 40, 0.0) is None
    monkeypatch.setattr(gpu_kernels, "FOLDER", tmp_path)
    assert gpu_sample.draw(logits, key, 1.0, 5, 0.0) is None
    monkeypatch.setattr(gpu_sample, "on_gpu", lambda: False)
    assert gpu_sample.draw(logits, key, 0.0, 0, 0.0) is None


def test_deletion(tmp_path):
    """The other files run without gpu_sample.py."""
    for name in ROOT.glob("*.py"):
        if name.name != "gpu_sample.py":
            shutil.copy(name, tmp_path)
    code = ("from model import *; m = GPT(GPTConfig(n_layer=2, n_embd=64, vocab_size=96)); m.eval()\n"
            "print(*generate(m, [1, 2, 3], 5, top_k=4))")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert len(result.stdout.split()) == 5, result.stderr
