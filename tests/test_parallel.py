"""parallel.py: the losses, gradients, weights and states of several processes are those of one."""
import functools
import re
import shutil
import subprocess
import sys

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from conftest import ROOT, launch
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from ranks import together
from test_train import arrays, column, data, train  # noqa: F401

import parallel
from config import UserError
from model import GPT, GPTConfig
from muon import Muon, by_muon

SHAPE = dict(n_layer=4, n_head=4, n_embd=32, vocab_size=64, block_size=16)


def training(group, mode: str, steps: int, config: dict, muon: bool = False, accumulate: int = 1, slices: int = 0,
             state: dict | None = None, start: int = 0) -> dict:
    """Train as train.py does: the losses, the whole gradients of the first step, the whole weights and states at the
    end. group None: one process. state: of a run that has taken `start` steps."""
    rng, losses, part, parts, shares = np.random.default_rng(0), [], 0, 1, None
    model = GPT(GPTConfig(**SHAPE | config))
    opt = rest = optim.Adam(1e-3, bias_correction=True)
    if muon:
        opt = optim.MultiOptimizer([Muon(0.01, group=group), rest], [by_muon])
    opt.init(model.trainable_parameters())
    if state:
        model.update(tree_unflatten(list(state["weights"].items())))
        opt.state = tree_unflatten(list(state["states"].items()))
    if group:
        shares = parallel.share(mode, model, opt, group, slices)
        part, parts = shares.others.rank(), shares.others.size()
    model.train()
    for step in range(start + steps):
        tokens = mx.array(rng.integers(0, 64, (4 * accumulate, 17)).astype(np.int32))
        if step < start:
            continue
        x, y, own, loss, gradients = tokens[:, :-1], tokens[:, 1:], 4 // parts, 0.0, None
        if mode == "pipeline":
            loss, gradients = parallel.run_stage(shares, x, y, accumulate, True)
        for micro in range(accumulate if mode != "pipeline" else 0):
            rows = slice((micro * parts + part) * own, (micro * parts + part + 1) * own)
            now, new = nn.value_and_grad(model, model.loss)(x[rows], y[rows])
            loss = loss + now / accumulate
            gradients = tree_map(lambda g, n: g + n / accumulate, gradients or tree_map(mx.zeros_like, new), new)
        changed, norm = model, mx.sqrt(sum(g.square().sum() for _, g in tree_flatten(gradients)))
        if group:
            gradients = parallel.average(shares, gradients)
            loss = mx.distributed.all_sum(loss) / group.size()
        if step == start:
            first = gradients
            if mode == "pipeline":
                like = dict(tree_flatten(GPT(shares.config).trainable_parameters()))
                first = parallel.of_stages(shares, dict(tree_flatten(gradients)), like)
            elif group and mode:
                first = parallel.whole(shares, gradients)
        if group:
            changed, gradients = parallel.updated_parts(shares, gradients)
            norm = parallel.norm(shares, gradients)
        opt.update(changed, tree_map(lambda g, norm=norm: g * mx.minimum(0.5 / norm, 1), gradients))
        if group:
            parallel.join_updated(shares, changed)
        mx.eval(loss, norm, first, model.parameters(), opt.state)
        losses.append([loss.item(), norm.item()])
    states = parallel.whole_state(shares, opt.state) if group else dict(tree_flatten(opt.state))
    weights = dict(tree_flatten((parallel.whole_model(shares) if group else model).parameters()))
    mx.eval(weights, states)
    return {"losses": np.array(losses), "first": dict(tree_flatten(first)), "weights": weights, "states": states}


@functools.cache
def one_process(steps: int, config: tuple, muon: bool, accumulate: int) -> dict:
    return training(None, "", steps, dict(config), muon, accumulate)


def same_arrays(found: dict, expected: dict, most: float):
    """most: the largest difference, over the largest number of an array, and 1e-8 for what is rounding alone, as in
    gradients of the keys' biases."""
    assert {name: (x.shape, x.dtype) for name, x in found.items()} == \
        {name: (x.shape, x.dtype) for name, x in expected.items()}
    for name, x in expected.items():
        x, y = (np.array(a, dtype=np.float64) for a in (x, found[name]))
        largest, off = np.abs(x).max(initial=0), np.abs(x - y).max(initial=0)
        assert off <= most * largest + 1e-8, (name, off, largest)


RUNS = [(mode, 2, 0, optimizer) for mode in parallel.MODES for optimizer in ("adamw", "muon")]
RUNS += [(mode, 4, slices, optimizer) for mode, _, slices, _ in [*RUNS[::2], ("tensor", 4, 2, "")]
         for optimizer in ("adamw", "muon, 2 micro-steps")]


@pytest.mark.parametrize("mode, n, slices, optimizer", RUNS)
def test_twenty_steps(mode, n, slices, optimizer):
    """20 clipped steps of 2 and 4 processes beside one process: losses to 1e-6, norms, and what a checkpoint has."""
    muon, accumulate = "muon" in optimizer, 2 if "micro" in optimizer else 1
    expected = one_process(20, (), muon, accumulate)
    for found in together(n, lambda group: training(group, mode, 20, {}, muon, accumulate, slices)):
        np.testing.assert_allclose(found["losses"][:, 0], expected["losses"][:, 0], rtol=1e-6)
        np.testing.assert_allclose(found["losses"][:, 1], expected["losses"][:, 1], rtol=1e-4)
        same_arrays(found["first"], expected["first"], 1e-5)
        same_arrays(found["weights"], expected["weights"], 1e-3)
        same_arrays(found["states"], expected["states"], 1e-3)


VARIANTS = {
    "swiglu, grouped heads, head": dict(mlp="swiglu", n_kv_head=4, n_head=8, tie=False, ffn_dim=64, head_bias=True),
    "GPT-2": dict(bias=True, norm="layer", pos="learned", mlp="gelu", qk_norm=False),
    "experts": dict(n_expert=4, ffn_dim=32), "biased experts": dict(n_expert=4, ffn_dim=32, expert_balance="bias",
                                                                    n_shared_expert=1),
    "MoD": dict(mod="topk", mod_capacity=0.25), "soft MoD": dict(mod="soft"), "YOCO": dict(yoco=True),
    "YOCO, window": dict(yoco=True, sliding_window=4), "window, sinks": dict(sliding_window=4, sinks=1),
    "resformer": dict(value_residual=True), "value embeddings": dict(value_embeds=True),
    "soft caps": dict(softcap=5.0, attn_softcap=5.0), "differential": dict(diff_attn=True),
    "ALiBi": dict(alibi=True, pos="none"), "sink logits": dict(sink_logits=True), "parallel": dict(parallel=True),
    "norms, factors": dict(norm_place="both", residual_scale=0.5, embed_scale=2.0, logit_scale=0.5),
    "wide QK-norm": dict(qk_norm_width=True),
}
REFUSED = {"tensor": ("value embeddings", "differential", "ALiBi", "wide QK-norm"),
           "pipeline": ("YOCO", "YOCO, window", "resformer")}


@pytest.mark.parametrize("mode, n, slices", [("fsdp", 2, 0), ("tensor", 4, 2), ("pipeline", 2, 0)])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(mode, n, slices, name):
    """The gradients of each variant, and the loss after an update, or a refusal by its name."""
    config = VARIANTS[name]
    if name in REFUSED.get(mode, ()):
        with pytest.raises(UserError, match="|".join(f"{key}={value}" for key, value in config.items())):
            together(n, lambda group: training(group, mode, 1, config, slices=slices))
        return
    expected = one_process(2, tuple(config.items()), False, 1)
    for found in together(n, lambda group: training(group, mode, 2, config, slices=slices)):
        same_arrays(found["first"], expected["first"], 1e-5)
        np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-4)


def test_fsdp_recomputes(monkeypatch):
    """With checkpoint_every=1 a block's parameters are gathered a second time, in the backward pass."""
    gathers, before = [], parallel.gathered
    monkeypatch.setattr(parallel, "gathered", lambda *a: gathers.append(1) or before(*a))
    make, found = GPT.__init__, {}
    for every in (0, 1):
        def init(self, *arguments, every=every, **named):
            make(self, *arguments, **named)
            self.checkpoint_every = every
        monkeypatch.setattr(GPT, "__init__", init)
        gathers.clear()
        found[every] = together(2, lambda group: training(group, "fsdp", 1, {}))[0]
        found[every]["gathers"] = len(gathers)
    same_arrays(found[1]["first"], found[0]["first"], 1e-6)
    assert found[1]["gathers"] - found[0]["gathers"] == 2 * SHAPE["n_layer"]  # on both processes


def test_what_a_process_keeps():
    """Bytes of parameters and of the optimizer's states beside those of one process."""
    def sizes(group, mode):
        model, opt = GPT(GPTConfig(**SHAPE)), optim.Adam(1e-3)
        opt.init(model.trainable_parameters())
        if mode != "one":
            parallel.share(mode, model, opt, group)
        return [sum(x.nbytes for _, x in tree_flatten(tree)) for tree in (model.parameters(), opt.state)]

    one = together(1, lambda group: sizes(group, "one"))[0]
    for mode, shares in {"": (1, 1), "zero1": (1, 0.25), "fsdp": (0.25, 0.25), "tensor": (0.25, 0.25)}.items():
        for found in together(4, lambda group, mode=mode: sizes(group, mode)):
            np.testing.assert_allclose(np.array(found) / one, shares, atol=0.02)
    kept = np.array(together(4, lambda group: sizes(group, "pipeline")))[:, 0] / one[0]
    assert kept.max() < 0.3 and kept.sum() == pytest.approx(1, abs=0.05)  # the embedding is at both ends


@pytest.mark.parametrize("mode", ["fsdp", "tensor"])
def test_memory(mode):
    """Four processes together have one model and one state, and no whole arrays behind their parts."""
    config = GPTConfig(**SHAPE | dict(n_embd=256, vocab_size=1024))

    def share(group):
        model, opt = GPT(config), optim.Adam(1e-3)
        opt.init(model.trainable_parameters())
        mx.eval(model.parameters(), opt.state)
        if group:
            parallel.share(mode, model, opt, group)
            mx.eval(model.parameters(), opt.state)
        return model, opt

    before = mx.get_active_memory()
    one = share(None)
    size = mx.get_active_memory() - before
    many = together(4, share)
    assert mx.get_active_memory() - before - size < 1.1 * size, (one, many)


@pytest.mark.parametrize("muon", [False, True])
def test_other_processes_go_on(muon):
    """Steps of 4 processes under fsdp, 2 under zero1, 2 under tensor, 4 in a pipeline, and one: those of one."""
    expected, state, losses = one_process(10, (), muon, 1), None, []
    for i, (mode, n) in enumerate((("fsdp", 4), ("zero1", 2), ("tensor", 2), ("pipeline", 4))):
        state = together(n, lambda group, mode=mode, state=state, i=i: training(
            group, mode, 2, {}, muon, state=state, start=2 * i))[-1]
        losses.append(state["losses"])
    state = training(None, "", 2, {}, muon, state=state, start=8)
    losses = np.concatenate([*losses, state["losses"]])
    np.testing.assert_allclose(losses[:, 0], expected["losses"][:, 0], rtol=1e-6)
    same_arrays(state["weights"], expected["weights"], 1e-4)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_parts(n):
    """Arrays of odd sizes are cut and joined, along an axis where it divides."""
    rng = np.random.default_rng(0)
    shapes = [(3, 5), (7,), (1,), (2, 3, 2), (2 * n, 3)]
    arrays = [mx.array(rng.standard_normal(shape).astype(np.float32)) for shape in shapes]
    axes = [parallel.FLAT, parallel.FLAT, parallel.FLAT, None, 0]

    def joined(group):
        parts = [parallel.own_part(x, axis, group) for x, axis in zip(arrays, axes, strict=True)]
        assert [part.ndim for part in parts] == [x.ndim for x in arrays]  # what decays has two axes or more
        assert parts[0].size == -(-15 // n) and parts[4].shape == (2, 3)
        return parallel.joined_all(parts, axes, shapes, group)

    for found in together(n, joined):
        assert all(mx.array_equal(x, y) for x, y in zip(arrays, found, strict=True))


@pytest.mark.parametrize("name", ["experts", "YOCO, window", "GPT-2", "soft MoD"])
def test_writing(name):
    """Two texts by cache, of four processes that share out the matrices, beside one process."""
    def write(group):
        model = GPT(GPTConfig(**SHAPE | VARIANTS[name]))
        if group:
            parallel.share("tensor", model, None, group)
        model.eval()
        cache, rows = model.make_cache(), mx.array([[1, 2, 3], [4, 5, 6]])
        logits = [model(rows, cache=cache)]
        for token in (7, 8):
            logits.append(model(mx.full((2, 1), token), cache=cache))
        return np.array(mx.concatenate(logits, axis=1)), cache.nbytes

    (expected, nbytes), found = write(None), together(4, write)
    for logits, own in found:
        np.testing.assert_allclose(logits, expected, atol=1e-5)
        assert own == nbytes / 4


def test_packed_layers_are_refused():
    def share(group):
        model = GPT(GPTConfig(**SHAPE))
        nn.quantize(model, 32, 4)
        parallel.share("tensor", model, None, group)

    with pytest.raises(UserError, match="a Quantized.*neither packed"):
        together(2, share)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_backend(monkeypatch, n):
    """Every process that waits for a number gets one, and all come to the same answers."""
    sent, awaited = [], []

    def ask(group):
        rank = group.rank()
        monkeypatch.setattr(mx.distributed, "send", lambda x, to, group: sent.append((rank, to)) or x)
        monkeypatch.setattr(mx.distributed, "recv", lambda shape, dtype, source, group: awaited.append(
            (source, rank)) or mx.zeros(shape))
        return parallel.backend(group)

    assert together(n, ask) == [(False, True)] * n and sorted(sent) == sorted(awaited)


# ---- real processes --------------------------------------------------------------------------------------------------


def close(a, b, most: float = 1e-6):
    for name in ("train_loss", "val_loss"):
        np.testing.assert_allclose(column(a, name), column(b, name), rtol=most)
    one, two = arrays(a), arrays(b)
    assert {name: x.shape for name, x in one.items()} == {name: x.shape for name, x in two.items()}
    for name, x in one.items():
        off = np.abs(np.array(x - two[name], dtype=np.float64))
        assert (off > 1e-4).mean() < 1e-2, name  # Adam's first updates are signs, of rounding errors too


@pytest.fixture(scope="module")
def one(data, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("one")
    train(data, out, "--max_iters=12", "--decay_iters=12", "--grad_accum=2", "--batch_size=4")
    return out


@pytest.mark.parametrize("mode", ["", "zero1", "fsdp", "tensor", "pipeline"])
def test_train(data, tmp_path, one, mode):  # noqa: F811
    """Two processes of train.py, which evaluate the collectives of each mode in one order."""
    train(data, tmp_path, "--max_iters=12", "--decay_iters=12", "--grad_accum=2", "--batch_size=4",
          f"--parallel={mode}", prefix=launch(2))
    close(tmp_path, one)


def test_pipeline_of_three(data, tmp_path):  # noqa: F811
    """The stage between the ends takes part in the sum of what only these have."""
    same = ["--max_iters=2", "--n_layer=3", "--optimizer=adamw"]
    train(data, tmp_path / "one", *same)
    train(data, tmp_path / "three", *same, "--parallel=pipeline", prefix=launch(3))
    close(tmp_path / "three", tmp_path / "one")


def test_train_goes_on(data, tmp_path, one):  # noqa: F811
    """Updates of four processes, then of two in other modes, then of one: the windows and losses of one."""
    same = ["--decay_iters=12", "--grad_accum=2", "--batch_size=4"]
    for n, end, mode in ((4, 3, "zero1"), (2, 6, "pipeline"), (2, 9, "tensor"), (1, 12, "")):
        train(data, tmp_path, f"--max_iters={end}", f"--parallel={mode}", *same, *["--resume=True"] * (n < 4),
              prefix=launch(n))
    np.testing.assert_allclose(column(tmp_path, "train_loss"), column(one, "train_loss"), rtol=1e-6)


def test_sample(data, tmp_path):  # noqa: F811
    """Two processes write the text of one, and a file of texts once."""
    train(data, tmp_path, "--max_iters=2", "--n_head=2")
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    for more in (["--prompt=a"], [f"--prompts={tmp_path / 'prompts.txt'}", f"--out={tmp_path / 'texts.jsonl'}"]):
        found = []
        for n, mode in ((1, ""), (2, "tensor")):
            done = subprocess.run([*launch(n), sys.executable, ROOT / "sample.py", tmp_path / "ckpt.safetensors",
                                   "--max_new_tokens=8", f"--parallel={mode}", *more], capture_output=True, text=True)
            assert not done.returncode and "rror" not in done.stderr, done.stderr
            texts = tmp_path / "texts.jsonl"
            found.append(done.stdout + (texts.read_text() if texts.exists() else ""))
            texts.unlink(missing_ok=True)
        assert found[0] == found[1] != ""


@pytest.mark.parametrize("arguments, told", [
    (["--parallel=zero9"], "is not one of zero1"),
    (["--parallel=zero1", "--optimizer_bits=8"], "leave out --precision"), (["--slices=2"], "needs --parallel=tensor"),
    (["--parallel=tensor", "--slices=2"], "must divide the 1 processes"),
    (["--parallel=tensor", "--dropout=0.1"], "leave out --dropout"),
    (["--parallel=pipeline", "--dropout=0.1"], "leave out --dropout")])
def test_bad_input(data, tmp_path, arguments, told):  # noqa: F811
    assert told in train(data, tmp_path, *arguments, status=2).stderr


@pytest.mark.parametrize("config, told", [
    (dict(n_head=2), "n_head=2 is not divisible"), (dict(ffn_dim=66), "ffn_dim=66 is not divisible"),
    (dict(n_expert=4, bias=True), "experts with biases")])
def test_tensor_refuses(config, told):
    with pytest.raises(UserError, match=told):
        together(4, lambda group: training(group, "tensor", 1, config))


def test_pipeline_refuses_few_blocks():
    with pytest.raises(UserError, match="a block for each of the 5 processes"):
        together(5, lambda group: training(group, "pipeline", 1, {}))


def test_deletion(data, tmp_path):  # noqa: F811
    """train.py runs without parallel.py, and then refuses the setting."""
    for path in ROOT.glob("*.py"):
        if path.name != "parallel.py":
            shutil.copy(path, tmp_path)
    users = [path.name for path in ROOT.glob("*.py") if re.search(r"^\s*import parallel\b", path.read_text(), re.M)]
    assert sorted(users) == ["bench.py", "sample.py", "train.py"]
    command = [sys.executable, "train.py", f"--data={data}", "--max_iters=2", "--n_layer=1", "--n_embd=32",
               "--block_size=16", "--sample_tokens=3", "--eval_windows=2", "--overwrite=True"]
    for more, status in ([], 0), (["--parallel=zero1"], 2):
        done = subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
    assert "parallel.py, which is missing" in done.stderr
