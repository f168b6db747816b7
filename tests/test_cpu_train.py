"""cpu_train.py against the float64 numpy of test_model.py and against model.py; and where it must not be used."""
import shutil
import subprocess
import sys
from unittest import mock

import blas  # before mlx
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from conftest import ROOT
from mlx.utils import tree_flatten, tree_map
from test_cpu import near, numbers
from test_matvec import needs_a_compiler
from test_model import oracle, oracle_loss

import cpu_train
import matvec
import model as core
from model import GPT, GPTConfig, no_tap

pytestmark = [needs_a_compiler, pytest.mark.skipif(not blas.loaded, reason="no OpenBLAS")]

SETTINGS = {
    "default": {},
    "GPT-2": dict(pos="learned", norm="layer", mlp="gelu", bias=True, qk_norm=False),
    "gelu_tanh": dict(mlp="gelu_tanh", n_head=1),
    "Llama 3.1": dict(mlp="swiglu", n_kv_head=2, qk_norm=False, rope_factor=8.0, rope_original=16),
    "Qwen2": dict(mlp="swiglu", qkv_bias=True, qk_norm=False, head_dim=8),
    "Qwen3": dict(mlp="swiglu", n_kv_head=1, head_dim=24, ffn_dim=40),
    "geglu": dict(mlp="geglu", norm="layer", norm_bias=True, out_bias=True, attn_scale=0.3, rotary_dim=8),
    "SmolLM3": dict(mlp="swiglu", qk_norm=False, rope_pattern="RN"),
    "Granite": dict(mlp="swiglu", qk_norm=False, embed_scale=3.0, residual_scale=0.6, logit_scale=0.5, bias=True),
    "softcap": dict(softcap=5.0, tie=False, head_bias=True),
}
NOT_KNOWN = {
    "alibi": dict(alibi=True, pos="none"), "window": dict(sliding_window=8), "differential": dict(diff_attn=True),
    "experts": dict(n_expert=2), "Mixture of Depths": dict(mod="soft"), "YOCO": dict(yoco=True),
    "value residual": dict(value_residual=True), "softcap in attention": dict(attn_softcap=5.0),
    "norms after": dict(norm_place="after"), "parallel": dict(parallel=True), "sinks": dict(sink_logits=True),
    "wide QK-norm": dict(qk_norm_width=True), "odd width": dict(n_embd=36, n_head=3), "clip": dict(mlp="swiglu_clip"),
}


@pytest.fixture(autouse=True)
def on_cpu():
    with mx.stream(mx.cpu):
        yield


def build(settings: dict) -> GPT:
    """A small model of random weights, norms and biases included, in training."""
    sizes = dict(n_layer=2, n_head=4, n_embd=64, vocab_size=96, block_size=150)
    model, rng = GPT(GPTConfig(**sizes | settings)), np.random.default_rng(0)
    model.update(tree_map(lambda p: p + mx.array(rng.normal(0, 0.1, p.shape).astype(np.float32)), model.parameters()))
    return model.train()


def tokens(rows: int, length: int) -> mx.array:
    return mx.array(np.random.default_rng(rows).integers(0, 96, (rows, length)))


def loss_and_gradients(model: GPT, idx: mx.array, fast: bool = True) -> tuple[float, dict, int]:
    """The loss, the gradients by their names, and how many blocks and losses cpu_train computed; without `fast`, it
    computes none."""
    used = []

    def counted(function):
        return lambda *arguments: used.append(function(*arguments) if fast else None) or used[-1]

    with mock.patch.multiple(cpu_train, block_output=counted(cpu_train.block_output),
                             head_loss=counted(cpu_train.head_loss)):
        loss, gradients = nn.value_and_grad(model, model.loss)(idx[:, :-1], idx[:, 1:])
        mx.eval(loss, gradients)
    return loss.item(), dict(tree_flatten(gradients)), sum(y is not None for y in used)


def same(ours: dict, theirs: dict, tolerance: float = 2e-5):
    """Equal but for a part of the largest number of any gradient. (Some, as that of a key's bias, are 0 in truth.)"""
    largest = max(mx.abs(g).max().item() for g in theirs.values())
    assert ours.keys() == theirs.keys()
    for name in ours:
        own = max(mx.abs(theirs[name]).max().item(), 1e-2 * largest)
        assert mx.abs(ours[name] - theirs[name]).max().item() < tolerance * own, name


@pytest.mark.parametrize("T", [1, 9, 64, 150])
@pytest.mark.parametrize("name", SETTINGS)
def test_gradients(name, T):
    """Those of model.py, for one block of 64 queries and for several."""
    model, idx = build(SETTINGS[name]), tokens(3, T + 1)
    loss, gradients, used = loss_and_gradients(model, idx)
    wanted, theirs, none = loss_and_gradients(model, idx, fast=False)
    assert used == (2 if name == "softcap" else 3) and none == 0 and abs(loss - wanted) < 1e-6 * wanted
    same(gradients, theirs)


@pytest.mark.parametrize("name", SETTINGS)
def test_slope_of_float64(name):
    """The loss is that of float64 numpy, and the gradient is its slope along random directions."""
    model, idx = build(SETTINGS[name]), tokens(2, 71)
    x, y, rng = np.array(idx[:, :-1]), np.array(idx[:, 1:]), np.random.default_rng(1)
    loss, gradients, used = loss_and_gradients(model, idx)
    exact = {name: np.array(p, np.float64) for name, p in tree_flatten(model.parameters())}
    assert used >= 2 and abs(loss - oracle_loss(oracle(model.config, exact, x), y)) < 1e-6 * loss
    way = {name: rng.standard_normal(p.shape) for name, p in exact.items()}
    high, low = (oracle_loss(oracle(model.config, {n: p + step * way[n] for n, p in exact.items()}, x), y)
                 for step in (1e-6, -1e-6))
    slope = sum((np.array(g, np.float64) * way[name]).sum() for name, g in gradients.items())
    assert abs(slope - (high - low) / 2e-6) < 1e-5 * np.sqrt(sum(np.square(g).sum().item() for g in gradients.values()))


def test_threads_change_no_number(monkeypatch):
    model, idx = build(dict(bias=True, n_kv_head=2)), tokens(5, 151)
    loss, gradients, _ = loss_and_gradients(model, idx)
    monkeypatch.setattr(matvec, "threads", lambda: 3)
    for _ in range(20):
        again, others, _ = loss_and_gradients(model, idx)
        assert again == loss and all(mx.array_equal(gradients[name], others[name]) for name in gradients)


def test_openblas_keeps_its_threads():
    before = blas._library.openblas_get_num_threads()
    blas.threads(2)
    loss_and_gradients(build({}), tokens(3, 20))
    assert blas._library.openblas_get_num_threads() == 2
    blas.threads(before)


def test_inputs_that_are_not_contiguous():
    """Of x, and of its gradient, which is one number here."""
    block, x = build({}).blocks[0], mx.array(numbers(64, 20, 3)).transpose(2, 1, 0)

    def gradients(fast):
        def loss(block, x):
            tap = no_tap if fast else lambda site, layer, x: x  # with a tap, model.py computes the block
            return block(x, 0, None, tap, {}).sum()
        return nn.value_and_grad(block, lambda x: loss(block, x))(x)[1], mx.grad(lambda x: loss(block, x))(x)

    (ours, dx), (theirs, dx_) = gradients(True), gradients(False)
    same(dict(tree_flatten(ours)), dict(tree_flatten(theirs)))
    assert near(dx, dx_, 2e-5)


def test_two_losses_before_one_gradient():
    """What a pass saves is its own: two passes, then both gradients, as DPO takes them."""
    model, a, b = build({}), tokens(3, 20), tokens(2, 31)

    def both(a, b):
        return model.loss(a[:, :-1], a[:, 1:]) * 2 - model.loss(b[:, :-1], b[:, 1:])

    found = dict(tree_flatten(nn.value_and_grad(model, both)(a, b)[1]))
    first, second = loss_and_gradients(model, a, False)[1], loss_and_gradients(model, b, False)[1]
    same(found, {name: 2 * first[name] - second[name] for name in first}, 5e-5)


def test_parallel_gradient_of_a_missing_number():
    """A loss that is not a number stays one."""
    model = build({})
    model.blocks[0].attn.q.weight = mx.full((64, 64), float("nan"))
    assert np.isnan(loss_and_gradients(model, tokens(2, 20))[0])


@pytest.mark.parametrize("name", NOT_KNOWN)
def test_settings_that_it_does_not_know(name):
    loss, _, used = loss_and_gradients(build(NOT_KNOWN[name]), tokens(2, 40))
    assert used == (name != "odd width") and np.isfinite(loss)  # the loss of all hidden states is one


@pytest.mark.parametrize("change", ["eval", "bfloat16", "float16 weight", "another class", "tap", "cache", "places",
                                    "dropout", "checkpoints", "no library"])
def test_where_it_must_not_be_used(change, monkeypatch):
    model, idx, used, output = build({}), tokens(2, 20), [], cpu_train.block_output
    monkeypatch.setattr(cpu_train, "block_output", lambda *given: used.append(output(*given)) or used[-1])
    given = {}
    if change == "eval":
        model.eval()
    if change == "bfloat16":
        model.compute_dtype = mx.bfloat16
    if change == "float16 weight":
        for block in model.blocks:
            block.mlp.up.weight = block.mlp.up.weight.astype(mx.float16)
    if change == "another class":
        for block in model.blocks:
            block.attn.q = type("Silent", (core.Linear,), {"__call__": lambda self, x: 0 * x})(64, 64)
    if change == "tap":
        given = dict(tap=lambda site, layer, x: x)
    if change == "cache":
        given = dict(cache=model.make_cache())
    if change == "places":
        given = dict(places=mx.broadcast_to(mx.arange(20), (2, 20)))
    if change == "dropout":
        model.dropout = 0.1
    if change == "no library":
        monkeypatch.setattr(cpu_train, "library", lambda: None)
    if change == "checkpoints":
        model.checkpoint_every = 1  # a block is computed again in the backward pass: right, whoever computes it
        same(loss_and_gradients(model, idx)[1], loss_and_gradients(build({}), idx, False)[1])
        return
    mx.eval(model(idx, **given))
    assert len(used) == 2 and used == [None, None]


def test_what_it_mirrors():
    """If this fails, a function of model.py has changed: change cpu_train.c too, then its hash in cpu_train.py."""
    for names, known in cpu_train.MIRRORED.items():
        assert cpu_train.source_hash(cpu_train.functions_of(names)) == known


@pytest.mark.parametrize("name", ["score_mask", "attend", "rope", "Attention.turned", "cross_entropy"])
def test_an_experiment_in_model(name, monkeypatch):
    """Where a function of model.py is another one, that one is called."""
    called, owner = [], core
    for part in name.split(".")[:-1]:
        owner = getattr(owner, part)
    function = getattr(owner, name.split(".")[-1])
    monkeypatch.setattr(owner, name.split(".")[-1], lambda *given: called.append(1) or function(*given))
    _, _, used = loss_and_gradients(build({}), tokens(2, 20))
    assert called and used == (2 if name == "cross_entropy" else 1)


def test_compiled_functions():
    """They are traced, and nothing can be computed at once: MLX computes the blocks."""
    model, idx = build({}), tokens(2, 20)
    _, gradients, _ = loss_and_gradients(model, idx)
    step = mx.compile(lambda idx: nn.value_and_grad(model, model.loss)(idx[:, :-1], idx[:, 1:])[1], model.state)
    same(dict(tree_flatten(step(idx))), gradients)


# ---- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("chunk", [2**24, 64 * 96])
def test_weighted_loss(tie, chunk, monkeypatch):
    """With weights of the tokens, and in several chunks; the gradient of three times a loss is three times its own."""
    monkeypatch.setattr(core, "LOSS_CHUNK", chunk)
    model, idx, mask = build(dict(tie=tie, logit_scale=0.7)), tokens(4, 61), mx.array(numbers(4, 60) > 0)
    found = []
    for fast in (True, False):
        with mock.patch.object(core, "cpu_train", cpu_train if fast else None):
            loss, gradients = nn.value_and_grad(model, lambda x, y: 3 * model.loss(x, y, mask))(idx[:, :-1], idx[:, 1:])
            found.append((loss.item(), dict(tree_flatten(gradients))))
    assert abs(found[0][0] - found[1][0]) < 1e-6 * found[1][0]
    same(found[0][1], found[1][1])
    exact = {name: np.array(p, np.float64) for name, p in tree_flatten(model.parameters())}
    logits = oracle(model.config, exact, np.array(idx[:, :-1]))
    assert abs(found[0][0] - 3 * oracle_loss(logits, np.array(idx[:, 1:]), np.array(mask))) < 1e-5


def test_logits_of_any_size():
    """Large ones, whose exponentials would be infinite."""
    model, x, targets = build(dict(n_layer=1)), mx.array(numbers(70, 64, seed=1, scale=900)), mx.arange(70)
    found = cpu_train.head_loss(model, x, targets, mx.ones((70,))).item()
    logits = np.array(x, np.float64) @ np.array(model.embed.weight, np.float64).T
    assert abs(found / 70 / oracle_loss(logits[None], np.arange(70)[None]) - 1) < 1e-5


@pytest.mark.parametrize("target", [-1, 96])
def test_a_target_that_is_no_token(target):
    """C would read or write beyond its memory: MLX computes such a loss."""
    assert cpu_train.head_loss(build({}), mx.zeros((3, 64)), mx.array([0, target, 2]), mx.ones((3,))) is None


# ---- the optimizer ---------------------------------------------------------------------------------------------------

SHAPES = {"wide": (300, 257), "inside": {"vector": (17,), "long": (100_003,), "one": (1,)}}


def random_tree(seed: int, scale: float = 1.0) -> dict:
    rng = np.random.default_rng(seed)
    return tree_map(lambda shape: mx.array((rng.standard_normal(shape) * scale).astype(np.float32)), SHAPES,
                    is_leaf=lambda x: isinstance(x, tuple))


def flat(tree: dict) -> np.ndarray:
    return np.concatenate([np.array(array, np.float64).ravel() for _, array in tree_flatten(tree)])


def test_adam_of_float64():
    opt, parameters = cpu_train.Adam(0.01, betas=[0.9, 0.95], bias_correction=True), random_tree(0)
    opt.init(parameters)
    exact, before, m, v = flat(parameters), parameters, 0, 0
    for step in range(1, 6):
        gradients = random_tree(step, 10.0 ** -step)
        g = flat(gradients)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        exact = exact - 0.01 * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.95**step)) + 1e-8)
        parameters = opt.apply_gradients(gradients, parameters)
        assert np.abs(flat(parameters) - exact).max() < 2e-6 and opt.step.item() == step
    assert np.array_equal(flat(before), flat(random_tree(0)))  # arrays that others may hold are as they were


def test_adam_is_that_of_mlx(monkeypatch):
    """The same state too, so that a run may go on with the other one; and a tree of some parameters alone."""
    ours, theirs = (adam(0.01, betas=[0.9, 0.95], bias_correction=True) for adam in (cpu_train.Adam, optim.Adam))
    ours.init(random_tree(0)), theirs.init(random_tree(0))
    monkeypatch.setattr(optim.Adam, "apply_single", mock.Mock(side_effect=optim.Adam.apply_single, autospec=True))
    a, b = ours.apply_gradients(random_tree(1), random_tree(0)), None
    assert not optim.Adam.apply_single.called
    monkeypatch.undo()
    b = theirs.apply_gradients(random_tree(1), random_tree(0))
    assert near(flat(a), flat(b), 1e-6) and near(flat(ours.state), flat(theirs.state), 1e-6)
    some = {"inside": {"vector": random_tree(1)["inside"]["vector"]}}
    a, b = (opt.apply_gradients(some, random_tree(0)) for opt in (ours, theirs))
    assert near(flat(a), flat(b), 1e-6)


@pytest.mark.parametrize("settings", [
    dict(bias_correction=False), dict(learning_rate=optim.linear_schedule(0.1, 0, 9)), "bfloat16"],
    ids=["no correction", "a schedule", "bfloat16"])
def test_adam_by_mlx(settings):
    """For all else MLX's own Adam is used."""
    found = []
    for adam in (cpu_train.Adam, optim.Adam):
        opt = adam(**dict(learning_rate=0.01, bias_correction=True) | (settings if isinstance(settings, dict) else {}))
        gradients, parameters = random_tree(1), random_tree(0)
        if settings == "bfloat16":
            gradients, parameters = (tree_map(lambda x: x.astype(mx.bfloat16), t) for t in (gradients, parameters))
        opt.init(parameters)
        updated = opt.apply_gradients(gradients, parameters)
        found.append(flat(tree_map(lambda x: x.astype(mx.float32), updated)))
    assert near(*found, 1e-6)
    opt = cpu_train.Adam(0.01, bias_correction=True)
    opt.init(random_tree(0))
    mx.compile(opt.apply_gradients, inputs=opt.state, outputs=opt.state)(random_tree(1), random_tree(0))  # it is traced


@pytest.mark.parametrize("largest", [1.0, 1e6, float("inf"), 0.0])
def test_clip_grad_norm(largest):
    gradients = random_tree(3)
    gradients["wide"] = gradients["wide"].T
    clipped, norm = cpu_train.clip_grad_norm(gradients, largest)
    exact = np.sqrt(np.square(flat(gradients)).sum())
    assert abs(norm.item() / exact - 1) < 1e-6
    assert near(flat(clipped), flat(gradients) * min(1, largest / exact), 2e-6) or largest == 0 == flat(clipped).any()


def test_a_norm_that_is_no_number():
    gradients = random_tree(3) | {"wide": mx.full((3, 5), float("nan"))}
    assert np.isnan(cpu_train.clip_grad_norm(gradients, 1.0)[1].item())


# ---- deletion --------------------------------------------------------------------------------------------------------

WITHOUT = """
import sys
import blas
import mlx.core as mx
import mlx.nn as nn
from model import GPT, GPTConfig
model = GPT(GPTConfig(n_layer=2, vocab_size=96, block_size=64))
print(nn.value_and_grad(model, model.loss)(mx.arange(64)[None], mx.arange(64)[None] + 1)[0].item())
import model
print(model.cpu_train is not None, model.cpu_train is not None and model.cpu_train.library() is not None)
"""


def test_deleting_it_costs_speed_and_nothing_else(tmp_path):
    """The other files run without cpu_train.c, without cpu_train.py, and without what it stands on."""
    printed = []
    for deleted in ([], ["cpu_decode.c", "cpu_decode.py"], ["cpu_train.c"], ["cpu_train.c", "cpu_train.py"],
                    ["matvec.c"], ["matvec.c", "matvec.py"]):
        folder = tmp_path / "-".join(["with", *deleted])
        folder.mkdir()
        for path in (*ROOT.glob("*.py"), *ROOT.glob("*.c")):
            if path.name not in deleted:
                shutil.copy(path, folder)
        done = subprocess.run([sys.executable, "-c", WITHOUT], cwd=folder, capture_output=True, text=True, check=True)
        printed.append(done.stdout.split())
        if "cpu_train.py" in deleted:
            subprocess.run([sys.executable, "train.py", "--help"], cwd=folder, capture_output=True, check=True)
    assert [line[1:] for line in printed] == [["True", "True"]] * 2 + [["True", "False"], ["False", "False"]] * 2
    assert all(abs(float(line[0]) - float(printed[0][0])) < 1e-5 for line in printed)
