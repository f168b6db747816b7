"""muon.py against NumPy's singular value decomposition in float64, one matrix at a time; which parameters it takes."""
from types import SimpleNamespace

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from lora import attach
from model import GPT, GPTConfig
from muon import Muon, by_muon, orthogonalized, shared_out


def svd_update(g: np.ndarray) -> np.ndarray:
    """The quintic of Newton and Schulz, five times, on the singular values of g over its Frobenius norm."""
    U, S, V = np.linalg.svd(g, full_matrices=False)
    S = S / np.sqrt((S**2).sum())
    for _ in range(5):
        S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
    return (U * S) @ V


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24), (1, 8)])
def test_orthogonalized(shape):
    """The formula; and what it is for: singular values between 0.7 and 1.2 (Jordan et al. 2024)."""
    X = np.random.default_rng(0).standard_normal((3, *shape))
    found = np.array(orthogonalized(mx.array(X.astype(np.float32))))
    np.testing.assert_allclose(found, [svd_update(g) for g in X], atol=1e-4)
    largest = np.linalg.svd(found, compute_uv=False)
    assert (largest[:, 0] < 1.25).all() and np.median(largest) > 0.65


def test_three_updates():
    """Matrices of two shapes and a stack of experts, each as if it were alone."""
    rng = np.random.default_rng(1)
    parameters = {"a": (6, 4), "b": (6, 4), "c": (4, 6), "experts": (3, 6, 4)}
    parameters = {name: rng.standard_normal(shape) for name, shape in parameters.items()}
    found, muon = {name: mx.array(p.astype(np.float32)) for name, p in parameters.items()}, Muon(0.1, momentum=0.9)
    means = dict.fromkeys(parameters, 0.0)
    for step in range(3):
        gradients = {name: rng.standard_normal(p.shape) for name, p in parameters.items()}
        muon.learning_rate = rate = 0.1 / (step + 1)
        found = muon.apply_gradients({name: mx.array(g.astype(np.float32)) for name, g in gradients.items()}, found)
        for name, g in gradients.items():
            means[name] = 0.9 * means[name] + 0.1 * g
            ahead = (0.9 * means[name] + 0.1 * g).reshape(-1, *g.shape[-2:])
            update = np.stack([svd_update(matrix) for matrix in ahead]).reshape(g.shape)
            parameters[name] = parameters[name] - rate * max(1, g.shape[-2] / g.shape[-1])**0.5 * update
    for name, p in parameters.items():
        np.testing.assert_allclose(np.array(found[name]), p, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_shared_out(monkeypatch, n):
    """Every process computes its part of five matrices, and none more than its share."""
    X = mx.array(np.random.default_rng(0).standard_normal((5, 6, 4)).astype(np.float32))
    sizes, parts = [], []
    monkeypatch.setattr(mx.distributed, "all_gather", lambda part, group: parts.append(part) or mx.zeros((8, 6, 4)))

    def counted(X):
        sizes.append(len(X))
        return orthogonalized(X)

    for rank in range(n):
        group = SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: n)
        found = shared_out(counted, X, group)
        assert found.shape == X.shape
    together = np.concatenate([np.array(part) for part in parts])[:5] if n > 1 else np.array(found)
    np.testing.assert_allclose(together, np.array(orthogonalized(X)), atol=1e-5)
    assert sizes == [-(-5 // n)] * n


def test_dtype():
    """In bfloat16 the update is coarse, but the parameters and the momentum stay float32."""
    g = np.random.default_rng(2).standard_normal((16, 16)).astype(np.float32)
    found = {}
    for dtype in (mx.float32, mx.bfloat16):
        muon = Muon(1.0, dtype=dtype)
        found[dtype] = muon.apply_gradients({"w": mx.array(g)}, {"w": mx.zeros((16, 16))})["w"]
        assert found[dtype].dtype == muon.state["w"]["v"].dtype == mx.float32
    difference = mx.abs(found[mx.float32] - found[mx.bfloat16]).max()
    assert 1e-4 < difference < 0.1


def test_the_matrices_it_takes():
    """Of a model with every kind of matrix: those that multiply hidden states, and nothing that looks up or chooses."""
    model = GPT(GPTConfig(block_size=16, vocab_size=32, n_layer=4, n_head=2, n_embd=32, n_expert=2, ffn_dim=32,
                          tie=False, mod="topk", mlp="swiglu", bias=True, value_embeds=True))
    taken = {path.split(".", 2)[2] for path, p in tree_flatten(model.parameters()) if by_muon(path, p)}
    assert taken == {f"attn.{name}.weight" for name in "q k v out".split()} | {
        f"mlp.{name}.weight" for name in "gate up down".split()}
    left = {path for path, p in tree_flatten(model.parameters()) if p.ndim > 1 and not by_muon(path, p)}
    assert {path.removeprefix("blocks.") for path in left if "router" in path or "predictor" in path} > {
        "0.mlp.router.weight", "1.depth_router.weight", "1.predictor.weight"}
    assert {"head.weight", "embed.weight"} < left and any("value_embed" in path for path in left)
    assert any("value_gate" in path for path in left)
    model = GPT(GPTConfig(block_size=16, vocab_size=32, n_layer=2, n_head=2, n_embd=32))
    attach(model, "attn.q", 2, 4, "dora")
    trainable = tree_flatten(model.trainable_parameters())
    assert {path.split(".", 2)[2] for path, p in trainable if by_muon(path, p)} == {"attn.q.a", "attn.q.b"}


def test_beside_another_optimizer():
    """As the docstring has it: one optimizer for the matrices of the blocks, another for the rest."""
    muon, rest = Muon(0.05), optim.SGD(0.5)
    opt = optim.MultiOptimizer([muon, rest], [by_muon])
    parameters = {"embed": {"weight": mx.zeros((4, 4))}, "blocks": [{"attn": {"q": {"weight": mx.zeros((4, 4))}}}]}
    g = np.random.default_rng(3).standard_normal((4, 4))
    gradients = {"embed": {"weight": mx.array(g)}, "blocks": [{"attn": {"q": {"weight": mx.array(g)}}}]}
    after = opt.apply_gradients(gradients, parameters)
    np.testing.assert_allclose(np.array(after["embed"]["weight"]), -0.5 * g, atol=1e-6)
    np.testing.assert_allclose(np.array(after["blocks"][0]["attn"]["q"]["weight"]), -0.05 * svd_update(g), atol=1e-5)
