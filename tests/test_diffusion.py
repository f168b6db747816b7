"""diffusion.py: the bound against sums over all masks, the model without its causal mask against float64, writing that
keeps what was given; run as a user runs it; bad input."""
import itertools
import math
import subprocess
import sys

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import prepared
import pytest
from conftest import ROOT
from mlx.utils import tree_flatten
from test_model import close, float64, oracle
from test_sft import ON_PATH, STOPPED

import gpu_train
import model as core
from config import UserError
from model import DOCUMENT, GPT, GPTConfig
from tokenizer import byte_tokenizer

SOURCE = (ROOT / "diffusion.py").read_text()
made = {"np": np, "math": math, "EPS": 0.0, "Callable": object, "Iterator": list, "Tokenizer": object, "re": None}
exec(SOURCE[SOURCE.index("# ---- masks and losses"):SOURCE.index("# ---- write")], made)  # the section stands by itself
corrupted, bound, fill = made["corrupted"], made["bound"], made["fill"]
L, V = 3, 3
MASK = V
JOINT = np.random.default_rng(0).dirichlet(np.full(V**L, 0.3)).reshape((V,) * L)  # of all texts of three tokens


def conditionals(ids) -> np.ndarray:
    """p(token at i | what is not masked), of JOINT: (L, V)."""
    seen = tuple(slice(None) if x == MASK else slice(x, x + 1) for x in ids)
    fits = np.zeros_like(JOINT)
    fits[seen] = JOINT[seen]
    return np.stack([fits.sum(tuple(j for j in range(L) if j != i)) for i in range(L)]) / fits.sum()


def true_nats(ids, rows) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return -np.log(np.array([conditionals(x)[np.arange(L), row] for x, row in zip(ids, rows, strict=True)]))


def worse_nats(ids, rows) -> np.ndarray:
    """A model that mixes the true probabilities with equal ones."""
    return -np.log(0.7 * np.exp(-true_nats(ids, rows)) + 0.3 / V)


def over_all_masks(nats_of, row) -> float:
    """sum_S sum_{i in S} nats_i(S) / (|S| binomial(L, |S|)): the bound of -log p(row), without chance."""
    total = 0.0
    for n in range(1, L + 1):
        for chosen in itertools.combinations(range(L), n):
            ids = np.array(row)
            ids[[*chosen]] = MASK
            total += nats_of(ids[None], np.array([row]))[0, [*chosen]].sum() / (n * math.comb(L, n))
    return total


def test_bound_is_exact_for_true_conditionals():
    """Each order of showing tokens is a chain rule: the bound of a model that knows the conditionals is -log p."""
    for row in [(0, 1, 2), (2, 2, 0), (1, 0, 0)]:
        assert over_all_masks(true_nats, row) == pytest.approx(-math.log(JOINT[row]), rel=1e-12)


def test_bound_lies_above():
    """The mean over texts is at least the entropy, for a model whose conditionals belong to no joint distribution."""
    entropy = -(JOINT * np.log(JOINT)).sum()
    mean = sum(JOINT[row] * over_all_masks(worse_nats, row) for row in np.ndindex(JOINT.shape))
    assert entropy < mean < entropy + 1


@pytest.mark.parametrize("nats_of", [true_nats, worse_nats])
def test_measured_bound(nats_of):
    rows = np.array([(0, 1, 2), (1, 0, 0)])
    exact = np.mean([over_all_masks(nats_of, tuple(row)) for row in rows]) / L
    found, error = bound(nats_of, rows, MASK, 3000, 500, np.random.default_rng(1))
    assert error < 0.06 and abs(found - exact) < 3 * error


def test_unigrams():
    """A model that does not look gives its cross-entropy, whatever is masked."""
    p, rows = np.array([0.5, 0.3, 0.2]), np.array([(0, 1, 2), (1, 1, 1)])
    exact = -np.log(p)[rows]
    assert over_all_masks(lambda ids, rows: -np.log(p)[rows], rows[0]) == pytest.approx(exact[0].sum(), rel=1e-12)
    found, error = bound(lambda ids, rows: -np.log(p)[rows], rows, MASK, 2000, 400, np.random.default_rng(0))
    assert abs(found - exact.mean()) < 3 * error < 0.03
    assert bound(lambda ids, rows: -np.log(p)[rows], rows[1:], MASK, 4, 4, np.random.default_rng(0)) == (
        pytest.approx(-math.log(0.3)), pytest.approx(0))


def test_training_loss():
    """The mean of weights times -log p is the bound over L; times lie evenly; what is seen has no weight."""
    rng, rows = np.random.default_rng(2), np.array([(0, 1, 2)] * 64)
    losses = []
    for _ in range(400):
        ids, weights = corrupted(rows, MASK, rng)
        assert ((weights > 0) == (ids == MASK)).all() and (ids[weights == 0] == rows[weights == 0]).all()
        losses.append((weights * worse_nats(ids, rows)).sum())
    exact = over_all_masks(worse_nats, (0, 1, 2)) / L
    error = np.std(losses) / 20
    assert error < 0.05 and abs(np.mean(losses) - exact) < 3 * error
    many = np.array([[0] * 4000] * 8)
    shares = np.sort((corrupted(many, MASK, rng)[0] == MASK).mean(1))
    assert np.abs(np.diff(shares) - 1 / 8).max() < 0.04


# ---- writing ---------------------------------------------------------------------------------------------------------


def drawn(order: str, steps: int, **more) -> np.ndarray:
    """How often each text of three tokens is written."""
    counts, rng = np.zeros_like(JOINT), np.random.default_rng(5)
    for _ in range(3000):
        *_, ids = fill(conditionals, np.full(L, MASK), MASK, steps, order, rng, **more)
        counts[tuple(ids)] += 1
    return counts / 3000


@pytest.mark.parametrize("order, more", [("confidence", dict(threshold=1.0)), ("random", dict(block=1))], ids=str)
def test_one_token_at_a_time(order, more):
    """Left to right, in blocks of one token, the texts are those of the joint distribution; the most confident draws
    first are not, which is known of that order."""
    found = np.abs(drawn(order, 0, **more) - JOINT).sum()
    assert found < 0.12 if order == "random" else 0.12 < found < 1


def test_many_steps_are_one_at_a_time():
    """Shown at random in many steps, hardly ever two tokens come together; in one step all are independent."""
    at_once = np.einsum("i,j,k->ijk", *conditionals([MASK] * L))
    assert np.abs(drawn("random", 60) - JOINT).sum() < 0.15 < np.abs(JOINT - at_once).sum()
    assert np.abs(drawn("random", 1) - at_once).sum() < 0.15


@pytest.mark.parametrize("steps, order, more, n", [(5, "confidence", {}, 5), (0, "confidence", {}, 12),
                                                  (4, "confidence", dict(block=3), 4), (30, "random", {}, None),
                                                  (0, "confidence", dict(threshold=0.2), None)], ids=str)
def test_what_is_given_stays(steps, order, more, n):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 7, 20)
    ids[[0, 3, 4, 5, 6, 9, 11, 12, 13, 17, 18, 19]] = 7
    given, before, count = ids != 7, ids, 0
    probs = np.random.default_rng(1).dirichlet(np.ones(7), len(ids))
    for now in fill(lambda _: probs, ids, 7, steps, order, rng, **more):
        assert (now[before != 7] == before[before != 7]).all() and (now[given] == ids[given]).all()
        if more.get("block"):  # no token of a block before all of the block before
            hidden = (now[~given] == 7).reshape(-1, 3).sum(1)
            assert (hidden[np.flatnonzero(hidden)[1:]] == 3).all()
        before, count = now, count + 1
    assert (before < 7).all() and (n is None or count == n)


# ---- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, dict(pos="learned", norm="layer", bias=True, qk_norm=False, mlp="gelu"),
                                      dict(diff_attn=True), dict(attn_softcap=2.0, n_kv_head=1, sink_logits=True),
                                      dict(n_expert=3, ffn_dim=24, value_residual=True)], ids=str)
def test_reads_in_both_directions(settings):
    model = GPT(GPTConfig(**dict(n_layer=2, n_embd=32, n_head=2, vocab_size=31, block_size=16) | settings,
                          bidirectional=True))
    model.eval()
    idx = np.random.default_rng(0).integers(0, 31, (2, 9))
    assert close(model(mx.array(idx)), oracle(model.config, float64(model.parameters()), idx), 2e-4)
    places = mx.array(np.array([[*range(5), *(DOCUMENT + np.arange(4))]] * 2))  # two documents in a row
    packed = model(mx.array(idx), places=places)
    alone = mx.concatenate([model(mx.array(idx[:, :5])), model(mx.array(idx[:, 5:]))], axis=1)
    assert mx.allclose(packed, alone, atol=1e-4)


@pytest.mark.parametrize("name, value", [("alibi", True), ("sliding_window", 4), ("mod", "topk"), ("yoco", True)])
def test_variants_that_read_back(name, value):
    with pytest.raises(UserError, match=f"bidirectional=True does not know {name}="):
        GPTConfig(**{name: value}, bidirectional=True)


def test_no_next_tokens():
    """What predicts tokens from those before refuses the model."""
    model = GPT(GPTConfig(n_layer=1, n_embd=32, vocab_size=32, bidirectional=True))
    ids = mx.zeros((1, 4), mx.int32)
    for call in (model.make_cache, lambda: model.loss(ids, ids)):
        with pytest.raises(UserError, match="reads its text in both directions"):
            call()


def test_kernels_know_it(monkeypatch):
    """gpu_train.py computes such a block, whose attention is model.py's; the CPU's kernels leave it to model.py."""
    model = GPT(GPTConfig(n_layer=1, n_embd=64, bidirectional=True))
    monkeypatch.setattr(gpu_train, "ready", lambda: True)
    assert gpu_train.known(model.blocks[0], mx.zeros((1, 4, 64)))
    model.train()
    idx, weights = mx.array(np.arange(12).reshape(2, 6)), mx.ones((2, 6, 4096))
    found = []
    for cpu_train in (core.cpu_train, None):
        monkeypatch.setattr(core, "cpu_train", cpu_train)
        gradients = nn.value_and_grad(model, lambda idx: (model(idx) * weights).sum())(idx)[1]
        found.append(dict(tree_flatten(gradients)))
    assert all(mx.allclose(found[0][name], found[1][name], rtol=1e-3, atol=1e-4) for name in found[0])


# ---- as a user runs it -----------------------------------------------------------------------------------------------

SMALL = ["--n_layer=1", "--n_embd=32", "--block_size=32", "--batch_size=4", "--eval_rows=4", "--samples=2",
         "--log_interval=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("diffusion")
    (path / "text.txt").write_text("To be, or not to be, that is the question. " * 60)
    return path


def run(script, *arguments, status: int = 0):
    done = prepared.run([sys.executable, ROOT / script, *arguments])
    assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
    return done


def diffusion(folder, out, *arguments, status: int = 0):
    return run("diffusion.py", f"--data={folder / 'text.txt'}", f"--out_dir={out}", *arguments, status=status)


def test_trains_and_writes(folder, tmp_path):
    out = tmp_path / "out"
    told = diffusion(folder, out, *SMALL, "--max_iters=30", "--eval_interval=15").stdout
    assert "bits/byte at most" in told and "bound held out" in told
    rows = [line.split(",") for line in (out / "loss.csv").read_text().splitlines()]
    bounds = [float(row[rows[0].index("val_loss")]) for row in rows[1:] if row[rows[0].index("val_loss")]]
    assert bounds[-1] < bounds[0] - 1.5
    checkpoint = out / "diffusion.safetensors"
    told = run("diffusion.py", checkpoint, "--prompt=To be {9}not", "--steps=3", "--watch=True").stdout
    assert told.count("--- ") == 3 and "To be " in told.split("--- 3")[1] and "not" in told.split("--- 3")[1]
    page = tmp_path / "fill.html"
    run("diffusion.py", checkpoint, "--prompt=<b>{5}", "--steps=2", f"--page={page}")
    assert "data-step=0" in page.read_text() and page.read_text().count("<span") == 8 and "&lt;" in page.read_text()
    page.write_text("my page")
    assert "no page of ours" in run("diffusion.py", checkpoint, f"--page={page}", status=2).stderr
    begun = run("diffusion.py", checkpoint, "--prompt=To", "--tokens=7", "--temperature=0").stdout
    assert begun.startswith("To") and "[7 steps" in begun
    for command in (["sample.py", checkpoint, "--prompt=To"], ["eval.py", checkpoint, f"--data={folder / 'text.txt'}"]):
        done = run(*command, status=2)
        assert "use diffusion.py" in done.stderr and "Traceback" not in done.stderr
    assert "tokens has no effect" in run("diffusion.py", checkpoint, "--prompt=a{2}", "--tokens=3", status=2).stderr
    settings = ["--batch_size=4", "--eval_rows=4", "--samples=2", "--learning_rate=1e-3"]
    more = diffusion(folder, tmp_path / "more", f"--init={checkpoint}", *settings, "--max_iters=1").stdout
    assert float(more.split("val  ")[1][:6]) == pytest.approx(bounds[-1], abs=0.05)
    short = tmp_path / "short"  # a run with --init goes on with its own rows
    told = diffusion(folder, short, f"--init={checkpoint}", "--block_size=8", *settings, "--max_iters=1").stdout
    again = run("diffusion.py", f"--out_dir={short}", "--resume=True", "--max_iters=2").stdout
    assert "rows of 8 tokens" in told and "rows of 8 tokens" in again


def test_experts(folder, tmp_path):
    """Biases of experts, which spread tokens evenly, change with every update."""
    model = GPT(GPTConfig(n_layer=1, n_embd=32, n_head=1, vocab_size=320, block_size=32, n_expert=3, ffn_dim=32,
                          expert_balance="bias"))
    core.save_checkpoint(str(tmp_path / "a.safetensors"), model, {"tokenizer": byte_tokenizer().to_dict()})
    diffusion(folder, tmp_path / "out", f"--init={tmp_path / 'a.safetensors'}", "--max_iters=2", "--batch_size=4",
              "--eval_rows=2", "--samples=1")
    assert mx.load(str(tmp_path / "out" / "diffusion.safetensors"))["blocks.0.mlp.balance"].any()


def test_resume_is_exact(folder, tmp_path):
    settings = [*SMALL, "--max_iters=6", "--eval_interval=4"]
    diffusion(folder, tmp_path / "whole", *settings)
    out = tmp_path / "part"
    (tmp_path / "stop.py").write_text(STOPPED)
    command = [sys.executable, tmp_path / "stop.py", "3", ROOT / "diffusion.py", f"--data={folder / 'text.txt'}",
               f"--out_dir={out}", *settings]
    done = subprocess.run(command, capture_output=True, text=True, env=ON_PATH)
    assert done.returncode == 130 and "--resume=True" in done.stdout, done.stderr
    again = prepared.run([sys.executable, ROOT / "diffusion.py", f"--out_dir={out}", "--resume=True"])
    assert again.returncode == 0, again.stderr
    for name in ("diffusion", "resume"):
        a, b = (mx.load(str(folder / f"{name}.safetensors")) for folder in (tmp_path / "whole", out))
        assert a.keys() == b.keys() and all(mx.array_equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("arguments, says", [
    (["--prompt=x"], "prompt has no effect in training"), (["--order=left"], "order has no effect in training"),
    (["--optimizer=sgd"], "is not one of adamw, muon"), (["--samples=0"], "it must be 1 or more"),
    (["--block_size=99999"], "give more text"), (["--optimizer=adamw", "--muon_lr=1"], "without muon"),
], ids=str)
def test_refused(folder, tmp_path, arguments, says):
    told = diffusion(folder, tmp_path / "out", *arguments, status=2).stderr
    assert says in told and not (tmp_path / "out").exists()
