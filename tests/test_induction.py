"""runs/induction.py: each method finds the planted pair; its sums over texts; models without a pair; bad input."""
import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, run
from test_heads import planted

from model import GPT, GPTConfig, save_checkpoint
from paths import paths
from runs.induction import carried, cut

FIRST = {  # the head that each method puts first in the planted model
    "attention: to the previous token": "0.1", "attention: to what followed": "2.0",
    "weights: read by I's keys": "0.1", "ablation: loss without it": "0.1",
    "path patching: to I's keys": "0.1", "path patching: to the logits": "2.0",
    "graph: edges into I's keys": "0.1", "graph: edge to the answer": "2.0"}


@pytest.fixture
def path(tmp_path):
    save_checkpoint(str(tmp_path / "planted.safetensors"), planted(), {})
    return tmp_path / "planted.safetensors"


def test_planted_pair(path):
    """Of 6 heads, each method puts one of the planted pair first, and ablation puts the other one second."""
    printed = run("runs/induction.py", path, "--length=8", "--draws=3").stdout
    assert "P: layer 0, head 1. I: layer 2, head 0." in printed
    lines = {line[:36].strip(): line[36:].split() for line in printed.splitlines()}
    assert {name: lines[name][0] for name in FIRST} == FIRST
    assert " ".join(lines["ablation: loss without it"][7:]) == "2 of 6"
    assert (path.parent / "planted-induction.png").stat().st_size > 20_000


def test_the_page_s_model(tmp_path):
    """The pair of docs/inside.md: each method puts heads 2.0 and 3.0 where it puts the planted pair."""
    printed = run("runs/induction.py", ROOT / "webgpu" / "demo.safetensors", "--draws=4",
                  f"--picture={tmp_path / 'a.png'}").stdout
    lines = {line[:36].strip(): line[36:].split() for line in printed.splitlines()}
    pair = {"0.1": "2.0", "2.0": "3.0"}
    assert {name: lines[name][0] for name in FIRST} == {name: pair[head] for name, head in FIRST.items()}


def test_texts():
    """The clean texts end in a token A that stood before B, the answer; in the corrupted ones A stands only there."""
    texts = np.array([[0, 5, 6, 7, 8, 5, 6, 7, 8], [0, 9, 4, 3, 2, 9, 4, 3, 2]])
    clean, corrupt, answers = cut(texts, 4, np.array([11, 12]))
    assert clean.tolist() == [[0, 5, 6, 7, 8, 5, 6, 7], [0, 9, 4, 3, 2, 9, 4, 3]]
    assert corrupt.tolist() == [[0, 5, 6, 11, 8, 5, 6, 7], [0, 9, 4, 12, 2, 9, 4, 3]] and answers.tolist() == [8, 2]


def test_carried():
    """The share that a path carries, from the logits of paths(); all of it, where the whole model is the sender."""
    model, rng = planted(), np.random.default_rng(3)
    clean, corrupt = rng.integers(0, 24, (2, 2, 9))
    answers = np.array([3, 4])
    logits = paths(model, mx.array(clean), mx.array(corrupt), [])[:, :-1, 0]
    ends = [np.array(model(mx.array(ids))[:, -1], np.float64)[[0, 1], answers].mean() for ids in (clean, corrupt)]
    wanted = (np.array(logits, np.float64)[..., [0, 1], answers].mean(-1) - ends[0]) / (ends[1] - ends[0])
    np.testing.assert_allclose(carried(model, clean, corrupt, answers, []), wanted, rtol=1e-4, atol=1e-5)


def test_wrong(path, tmp_path):
    save_checkpoint(str(tmp_path / "none.safetensors"), GPT(GPTConfig(
        block_size=32, vocab_size=24, n_layer=2, n_head=2, n_embd=32), seed=1), {})
    assert "has no induction head that is far above chance" in run(
        "runs/induction.py", tmp_path / "none.safetensors", "--length=8", status=2).stderr
    assert "the model's context is 32" in run("runs/induction.py", path, "--length=20", status=2).stderr
    assert "4 or more" in run("runs/induction.py", path, "--length=3", status=2).stderr
