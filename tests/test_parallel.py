"""parallel.py: the losses, weights and states of several processes that share out the optimizer are those of one."""
import os
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from conftest import ROOT, launch
from mlx.utils import tree_flatten, tree_map
from test_train import arrays, column, command, data, train  # noqa: F401

import parallel
from model import GPT, GPTConfig, load_checkpoint


def ranks(monkeypatch, n: int) -> list:
    """Groups of n processes, one after the other in this one: what a process gathers is made of what all have given to
    this call, which the last one knows."""
    given = {}

    def all_gather(x, group):
        call = given.setdefault(group.calls, {})
        call[group.rank()] = x
        group.calls += 1
        return mx.concatenate([call.get(rank, mx.zeros_like(x)) for rank in range(n)])

    monkeypatch.setattr(mx.distributed, "all_gather", all_gather)
    return [SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: n, calls=0) for rank in range(n)]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_adam(monkeypatch, n):
    """Three updates of arrays of odd sizes; the states together are Adam's, and are cut again from a checkpoint."""
    rng, shapes = np.random.default_rng(0), {"a": (3, 5), "b": {"c": (7,), "d": (1,)}, "e": (2, 3, 2)}
    start = tree_map(lambda shape: mx.array(rng.standard_normal(shape).astype(np.float32)), shapes,
                     is_leaf=lambda x: isinstance(x, tuple))
    gradients = [tree_map(lambda p: mx.array(rng.standard_normal(p.shape).astype(np.float32)), start) for _ in range(3)]
    plain, groups = optim.Adam(0.1, bias_correction=True), ranks(monkeypatch, n)
    sharded = [parallel.ShardedAdam(0.1, group, bias_correction=True) for group in groups]
    p, found = start, start
    for opt in (plain, *sharded):
        opt.init(start)
    for g in gradients:
        p = plain.apply_gradients(g, p)
        for opt in sharded:
            new = opt.apply_gradients(g, found)  # whole on the last process
        found = new
    for (name, a), (_, b) in zip(tree_flatten(p), tree_flatten(found), strict=True):
        np.testing.assert_array_equal(np.array(a), np.array(b), err_msg=name)
    parameters = dict(tree_flatten(start))
    for opt, group in zip(sharded, groups, strict=True):
        state = dict(tree_flatten(opt.state))
        whole = parallel.whole_state(state, parameters, group)
        assert n == 1 or sum(x.size for x in state.values()) < sum(x.size for x in whole.values())
    expected = dict(tree_flatten(plain.state))
    assert {name: x.shape for name, x in whole.items()} == {name: x.shape for name, x in expected.items()}
    for name, x in expected.items():
        np.testing.assert_array_equal(np.array(whole[name]), np.array(x), err_msg=name)
    for opt, group in zip(sharded, groups, strict=True):
        state = dict(tree_flatten(opt.state))
        again = parallel.own_state(whole, state, group)
        assert all(again[name].shape == x.shape for name, x in state.items())
        assert all(mx.array_equal(again[name], x) for name, x in state.items())


def close(a, b, most: float = 1e-6):
    for name in ("train_loss", "val_loss"):
        np.testing.assert_allclose(column(a, name), column(b, name), rtol=most)
    one, two = arrays(a), arrays(b)
    assert {name: x.shape for name, x in one.items()} == {name: x.shape for name, x in two.items()}
    for name, x in one.items():
        off = np.abs(np.array(x - two[name], dtype=np.float64))
        assert (off > 1e-4).mean() < 1e-2, name  # Adam's first updates are signs, of rounding errors too


SETTINGS = {
    "plain": (["--grad_accum=2", "--batch_size=4"], (1, 2, 4)),
    "muon": (["--optimizer=muon"], (2,)),
    "experts": (["--n_expert=4", "--ffn_dim=64", "--expert_balance=bias"], (2,)),
    "MoD": (["--mod=soft"], (2,)),
    "YOCO, window": (["--yoco=True", "--sliding_window=8"], (2,)),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_as_one_process(data, tmp_path, name):  # noqa: F811
    settings, numbers = SETTINGS[name]
    train(data, tmp_path / "one", "--max_iters=20", *settings)
    for n in numbers:
        train(data, tmp_path / str(n), "--max_iters=20", "--parallel=zero1", *settings, prefix=launch(n))
        close(tmp_path / str(n), tmp_path / "one", 1e-3 if name == "experts" else 1e-5)


def test_resumed_on_another_number(data, tmp_path):  # noqa: F811
    """Four updates on four processes, eight on two, and eight on one without it: the windows and losses of one."""
    train(data, tmp_path / "one", "--max_iters=20", "--decay_iters=20")
    out = tmp_path / "many"
    for n, end, mode in ((4, 4, "zero1"), (2, 12, "zero1"), (1, 20, "")):
        resume = ["--resume=True"] if n < 4 else ["--decay_iters=20"]
        train(data, out, f"--max_iters={end}", f"--parallel={mode}", *resume, prefix=launch(n))
    close(out, tmp_path / "one", 1e-5)


def test_a_process_is_killed(data, tmp_path):  # noqa: F811
    """The other one says so and ends; a run goes on from the checkpoint."""
    out = tmp_path / "out"
    process = subprocess.Popen([*launch(2), *command(data, out, "--max_iters=20000", "--eval_interval=20")],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step     41"):
            break
    own = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(own[-1]), signal.SIGKILL)
    error = process.communicate(timeout=30)[1]
    assert error.count("another process has ended") == 1 and "exited with code 2" in error, error
    step = load_checkpoint(str(out / "ckpt.safetensors"))[1]["step"]
    assert step >= 40
    train(data, out, "--resume=True", f"--max_iters={step + 2}")


@pytest.mark.parametrize("arguments, told", [
    (["--parallel=zero9"], "is not one of zero1"), (["--parallel=zero1", "--optimizer=lion"], "leave out --optimizer"),
    (["--parallel=zero1", "--optimizer_bits=8"], "leave out --optimizer_bits=8")])
def test_bad_input(data, tmp_path, arguments, told):  # noqa: F811
    assert told in train(data, tmp_path, *arguments, status=2).stderr


def test_deletion(data, tmp_path):  # noqa: F811
    """train.py runs without parallel.py, and then refuses the setting."""
    for path in ROOT.glob("*.py"):
        if path.name != "parallel.py":
            shutil.copy(path, tmp_path)
    users = [path.name for path in ROOT.glob("*.py") if re.search(r"^\s*import parallel\b", path.read_text(), re.M)]
    assert users == ["train.py"]
    command = [sys.executable, "train.py", f"--data={data}", "--max_iters=2", "--n_layer=1", "--n_embd=32",
               "--block_size=16", "--sample_tokens=3", "--eval_windows=2", "--overwrite=True"]
    for more, status in ([], 0), (["--parallel=zero1"], 2):
        done = subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
    assert "parallel.py, which is missing" in done.stderr


def test_shapes():
    """Every array of a state is that of a parameter, under Adam alone and beside another optimizer."""
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=16, vocab_size=24))
    parameters = dict(tree_flatten(model.parameters()))
    for opt in (optim.Adam(1e-3), optim.MultiOptimizer([optim.SGD(1e-3, momentum=0.9), optim.Adam(1e-3)],
                                                       [lambda path, p: p.ndim > 1])):
        opt.init(model.parameters())
        state = dict(tree_flatten(opt.state))
        assert parallel.shapes_of(state, parameters) == {name: x.shape for name, x in state.items()}
