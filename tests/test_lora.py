"""lora.py: against the formulas in float64 numpy, on dense and quantized bases, through files, and against PEFT."""
import contextlib
import json
import math
import os
import resource
import shlex
import shutil
import subprocess
import sys

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from conftest import ROOT, load_adapter, run_here
from families import FIXTURES, error, logits_here, logits_there, make
from mlx.utils import tree_flatten, tree_map
from peers import peer
from test_model import build, in_transformers

import lora
import packing
import quantized
from config import UserError
from lora import Adapter, attach, base_fingerprint, load_adapted, merge, quantize_base, save_adapter
from model import GPT, GPTConfig, load_checkpoint, save_arrays, save_checkpoint
from readers import NAMES

every_kind = pytest.mark.parametrize("kind", lora.KINDS)


def base(bits=0, seed=0, **settings) -> GPT:
    settings = {**dict(block_size=64, vocab_size=61, n_layer=2, n_head=2, n_embd=64, bias=True), **settings}
    model = GPT(GPTConfig(**settings), seed=seed)
    for name, p in tree_flatten(model.parameters()):
        if name.endswith("bias"):
            *path, _ = name.split(".")
            module = model
            for part in path:
                module = module[int(part)] if part.isdigit() else module[part]
            module.bias = mx.random.normal(p.shape, key=mx.random.key(len(name)))
    quantize_base(model, bits)
    return model


def shake(model: GPT, seed=1):
    """Give the adapters random b and m, as after training."""
    rng = np.random.default_rng(seed)
    for module in lora.linear_layers(model).values():
        if isinstance(module, Adapter):
            module.b = mx.array(0.2 * rng.standard_normal(module.b.shape).astype(np.float32))
            if "m" in module:
                module.m = module.m * mx.array(rng.uniform(0.5, 1.5, module.m.shape).astype(np.float32))


IDX = mx.array(np.random.default_rng(0).integers(0, 61, (2, 40)))


@every_kind
@pytest.mark.parametrize("bits", [0, 4, 8])
def test_a_new_adapter_changes_nothing(kind, bits):
    model = base(bits)
    before = model(IDX)
    paths = attach(model, "attn, mlp", rank=4, kind=kind)
    assert len(paths) == 12 and mx.abs(model(IDX) - before).max() < 1e-4
    trained = {name.rpartition(".")[2] for name, _ in tree_flatten(model.trainable_parameters())}
    assert trained == ({"a", "b", "m"} if kind == "dora" else {"a", "b"})
    starts = [module.a for module in lora.linear_layers(model).values()][:3]  # of equal shape, but drawn separately
    assert all(not mx.array_equal(starts[0], other) for other in starts[1:])


@every_kind
@pytest.mark.parametrize("bits", [0, 4])
def test_one_layer_is_its_formula(kind, bits):
    """A layer's output equals the formula in float64; on a quantized base, W is the weight of the integers."""
    model = base(bits)
    layer = model.blocks[0].mlp.up
    W, bias = np.array(lora.dense_weight(layer), np.float64), np.array(layer.bias)
    x = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    attach(model, "mlp.up", rank=3, alpha=5, kind=kind)
    shake(model)
    adapter = model.blocks[0].mlp.up
    a, b = (np.array(adapter[name], np.float64) for name in "ab")
    W2 = W + 5 / (3**0.5 if kind == "rslora" else 3) * b @ a
    if kind == "dora":
        W2 = np.array(adapter.m, np.float64)[:, None] * W2 / np.linalg.norm(W2, axis=1, keepdims=True)
    wanted = x @ W2.T + bias
    for found in (adapter(mx.array(x)), adapter.merged()(mx.array(x))):
        assert np.abs(np.array(found) - wanted).max() < 2e-5 * np.abs(wanted).max()


def test_dora_norm_is_a_constant_for_the_gradient():
    """The gradient of b equals that of the formula with constant norms, as the paper proposes."""
    model = base()
    attach(model, "mlp.up", rank=3, alpha=3, kind="dora")
    shake(model)
    adapter, x = model.blocks[0].mlp.up, mx.random.normal((7, 64), key=mx.random.key(5))
    found = mx.grad(lambda b: (adapter.update({"b": b}), mx.sin(adapter(x)).sum())[1])(adapter.b)
    a, b, m, W, bias = (np.array(p, np.float64) for p in (adapter.a, adapter.b, adapter.m, adapter.base.weight,
                                                         adapter.base.bias))
    V, x = W + b @ a, np.array(x, np.float64)
    scale = m / np.linalg.norm(V, axis=1)
    wanted = (np.cos(x @ V.T * scale + bias) * scale).T @ (x @ a.T)
    assert np.abs(np.array(found) - wanted).max() < 1e-4 * np.abs(wanted).max()


@every_kind
@pytest.mark.parametrize("bits", [0, 4])
def test_bfloat16_with_float32_parameters(kind, bits):
    """The output has the dtype of the input, and is near that of float32; gradients are float32, as the parameters."""
    model = base(bits)
    attach(model, "mlp.up", rank=3, alpha=5, kind=kind)
    shake(model)
    adapter, x = model.blocks[0].mlp.up, mx.random.normal((7, 64), key=mx.random.key(5))
    parameters = {name: adapter[name] for name in ("a", "b", "m") if name in adapter}

    def loss(parameters, x):
        adapter.update(parameters)
        return mx.square(adapter(x).astype(mx.float32)).mean()

    found, expected = (mx.grad(loss)(parameters, x.astype(dtype)) for dtype in (mx.bfloat16, mx.float32))
    y = adapter(x.astype(mx.bfloat16))
    assert y.dtype == mx.bfloat16 and mx.abs(y - adapter(x)).max() < 0.03 * mx.abs(y).max()
    for name, gradient in found.items():
        assert gradient.dtype == adapter[name].dtype == mx.float32
        assert mx.abs(gradient - expected[name]).max() < 0.05 * mx.abs(expected[name]).max()
    assert adapter.merged()(x.astype(mx.bfloat16)).dtype == mx.bfloat16


@every_kind
@pytest.mark.parametrize("bits", [0, 4])
def test_merged_equals_unmerged(kind, bits):
    model = base(bits)
    attach(model, "attn.(q|v)$, mlp", rank=4, kind=kind)
    shake(model)
    before = model(IDX)
    merge(model)
    assert not any(isinstance(module, Adapter) for module in model.modules())
    assert mx.abs(model(IDX) - before).max() < 1e-4 * mx.abs(before).max()


@pytest.mark.parametrize("bits", [0, 4])
def test_merged_into_a_file(bits, tmp_path):
    """The merged file is an ordinary checkpoint; layers without an adapter stay quantized; the model is unchanged."""
    model = base(bits)
    attach(model, "attn.q", rank=4, kind="dora")
    shake(model)
    before = model(IDX)
    lora.save_merged(str(tmp_path / "whole"), model, {"script": "sft.py"})
    loaded, meta = load_checkpoint(str(tmp_path / "whole"))
    assert mx.abs(loaded(IDX) - before).max() < 1e-4 * mx.abs(before).max() and meta["script"] == "sft.py"
    assert mx.array_equal(model(IDX), before)
    assert isinstance(loaded.blocks[0].attn.k, nn.QuantizedLinear) == (bits > 0)


@every_kind
@pytest.mark.parametrize("bits", [0, 4])
def test_through_a_file(kind, bits, tmp_path):
    """A saved adapter gives equal logits on a fresh base, which is quantized to the bits of the training."""
    model, path = base(), str(tmp_path / "adapter.safetensors")
    fingerprint = base_fingerprint(model)
    quantize_base(model, bits)
    attach(model, "attn", rank=4, alpha=6, kind=kind)
    shake(model)
    save_adapter(path, model, dict(base_bits=bits), fingerprint)
    fresh = base()
    meta = load_adapter(fresh, path)
    assert mx.array_equal(fresh(IDX), model(IDX))
    assert (meta["kind"], meta["rank"], meta["alpha"], meta["base"]) == (kind, 4, 6, fingerprint)
    cache = fresh.make_cache()
    parts = [fresh(IDX[:, a:b], cache=cache) for a, b in ((0, 30), (30, 31), (31, 40))]
    assert mx.abs(mx.concatenate(parts, axis=1) - model(IDX)).max() < 1e-4


def test_fingerprint():
    """The fingerprint depends on every weight of the base, and not on adapters."""
    model = base()
    before = base_fingerprint(model)
    for _ in range(2):
        attach(model, "attn", rank=2)
        shake(model)
        assert base_fingerprint(model) == before == base_fingerprint(base())
    model.blocks[1].mlp.up.weight[3, 5] += 1e-6
    assert base_fingerprint(model) != before
    with pytest.raises(UserError, match="one for each layer: merge the others first"):
        save_adapter("nowhere", model)


def test_several_add_up(tmp_path):
    changes, plain = [], base()
    W = plain.blocks[1].attn.q.weight
    for i, target in enumerate(("attn.q", "attn")):
        model = base()
        attach(model, target, rank=2 + i)
        shake(model, seed=i)
        changes.append(lora.dense_weight(model.blocks[1].attn.q) - W)
        save_adapter(str(tmp_path / f"{i}"), model)
    model = base()
    load_adapter(model, str(tmp_path / "0"), weight=0.5)
    load_adapter(model, str(tmp_path / "1"), weight=-2)
    wanted = W + 0.5 * changes[0] - 2 * changes[1]
    assert mx.abs(lora.dense_weight(model.blocks[1].attn.q) - wanted).max() < 1e-4
    before = model(IDX)
    merge(model)
    assert mx.abs(model(IDX) - before).max() < 1e-4 * mx.abs(before).max()


@pytest.mark.parametrize("bits, share", [(4, 0.29), (8, 0.54)])
def test_qlora_trains_the_adapter_alone(bits, share):
    """The loss falls; the base stays quantized, bit for bit, in `share` of the bytes of float16, scales included."""
    model = base(n_embd=128, bias=False)
    dense = sum(module.weight.nbytes / 2 for module in lora.linear_layers(model).values())
    quantize_base(model, bits)
    model.set_dtype(mx.bfloat16)
    layers = lora.linear_layers(model)
    assert sum(p.nbytes for module in layers.values() for _, p in tree_flatten(module.parameters())) < share * dense
    attach(model, rank=8)
    before = {name: np.array(p.view(mx.uint8)) for name, p in tree_flatten(model.parameters()) if ".base." in name}
    optimizer, losses = optim.Adam(3e-3), []
    step = nn.value_and_grad(model, lambda: model.loss(IDX[:, :-1], IDX[:, 1:]))
    for _ in range(60):
        loss, gradients = step()
        optimizer.update(model, gradients)
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    after = dict(tree_flatten(model.parameters()))
    assert all(np.array_equal(before[name], np.array(after[name].view(mx.uint8))) for name in before)


@pytest.mark.parametrize("settings", [
    dict(n_expert=4), dict(yoco=True, n_layer=4), dict(mod="topk"), dict(diff_attn=True, tie=False),
    dict(mlp="swiglu", n_kv_head=1)], ids=str)
def test_on_every_architecture(settings):
    model = base(**settings).eval()
    attach(model, "." if "n_expert" not in settings else "attn", rank=2, kind="dora")
    shake(model)
    model.train()
    gradients = dict(tree_flatten(nn.value_and_grad(model, lambda: model.loss(IDX, IDX))()[1]))
    assert gradients and all(0 < mx.abs(g).max() < mx.inf for g in gradients.values())
    before = model.eval()(IDX)
    merge(model)
    assert mx.abs(model(IDX) - before).max() < 1e-3 * mx.abs(before).max()


# ---- chains: adapters for adapted models -----------------------------------------------------------------------------


def train(out, checkpoint, *adapters, seed=0, bits=0, **settings):
    """An adapter for a checkpoint with adapters, as sft.py and dpo.py make it, with random b and m."""
    model, meta = load_adapted(str(checkpoint), adapters)
    fingerprint = meta.get("fingerprint") or base_fingerprint(model)
    merge(model)
    quantize_base(model, bits)
    attach(model, **{"targets": "attn", "rank": 3, "seed": seed, **settings})
    shake(model, seed)
    out.parent.mkdir(exist_ok=True)
    header = {"template": f"t{seed}" if seed else None, "base_bits": bits}
    save_adapter(str(out), model, header, fingerprint, [str(checkpoint), *adapters])


@pytest.fixture
def chain(tmp_path):
    """A checkpoint, an adapter for it, one for that, and one for that, each in a folder of its own."""
    (tmp_path / "out").mkdir()
    save_checkpoint(str(tmp_path / "out" / "ckpt"), base(), {"template": "t0", "tokenizer": None})
    files = [tmp_path / "out" / "ckpt", tmp_path / "a" / "lora", tmp_path / "b" / "dora", tmp_path / "b" / "rslora"]
    for i, out in enumerate(files[1:]):
        train(out, files[i], kind=out.name, alpha=5, seed=i)
    return files


def in_numpy(W, *files_and_weights, layer="blocks.1.attn.q") -> np.ndarray:
    """The weight of a layer after adapters, one upon the other, by the formulas in float64, from their files."""
    W = np.array(W, np.float64)
    for path, weight in files_and_weights:
        arrays, header = mx.load(str(path), format="safetensors", return_metadata=True)
        a, b = (np.array(arrays[f"{layer}.{name}"], np.float64) for name in "ab")
        kind = json.loads(header["tinygpt"])["kind"]
        W = W + weight * 5 / (len(a) ** 0.5 if kind == "rslora" else len(a)) * b @ a
        if kind == "dora":
            W *= np.array(arrays[f"{layer}.m"], np.float64)[:, None] / np.linalg.norm(W, axis=1, keepdims=True)
    return W


def test_a_chain_of_adapters(chain):
    """Each adapter is added to the merged weights of those before it: the last alone, or after any of them."""
    checkpoint, *adapters = map(str, chain)
    wanted, models = in_numpy(base().blocks[1].attn.q.weight, *((path, 1) for path in adapters)), []
    for given in (adapters[2:], adapters[1:], adapters, [checkpoint, *adapters]):
        model, meta = load_adapted(given[0], given[1:])
        q = model.blocks[1].attn.q
        assert isinstance(q, Adapter) and q.kind == "rslora" and isinstance(q.base, nn.Linear)
        assert np.abs(np.array(lora.dense_weight(q)) - wanted).max() < 2e-5 * np.abs(wanted).max()
        assert meta["template"] == "t2" and [*map(os.path.realpath, meta["files"])] == [checkpoint, *adapters]
        models.append((meta["fingerprint"], *np.array(model(IDX)).ravel()))
    assert models.count(models[0]) == 4
    assert load_adapted(adapters[0])[1]["template"] == "t0"  # it names none
    model, meta = load_adapted(checkpoint)
    assert mx.array_equal(model.eval()(IDX), base().eval()(IDX))
    assert meta["files"] == [checkpoint] and "fingerprint" not in meta


def test_a_base_of_several_adapters(chain):
    """Those for an equal base add up by their weights; the base of the next is their sum."""
    checkpoint, first = chain[:2]
    second, third = first.with_name("second"), first.parent.parent / "c:1" / "third"
    train(second, checkpoint, seed=5, alpha=5)
    third.parent.mkdir()
    train(third, checkpoint, f"{first}:0.5", f"{second}:-2", seed=6, kind="dora", alpha=5)
    wanted = in_numpy(base().blocks[1].attn.q.weight, (first, 0.5), (second, -2), (third, 1))
    for given in ([third], [checkpoint, f"{first}:0.5", f"{second}:-2", third]):
        model, _ = load_adapted(str(given[0]), [*map(str, given[1:])])
        found = np.array(lora.dense_weight(model.blocks[1].attn.q))
        assert np.abs(found - wanted).max() < 2e-5 * np.abs(wanted).max()
    for weights in (":0.5", ":-1"), (":0.5", ""), ("", ":-2"):
        with pytest.raises(UserError, match="third was trained on another base, .*ckpt.*third as the checkpoint"):
            load_adapted(str(checkpoint), [f"{first}{weights[0]}", f"{second}{weights[1]}", str(third)])
    with pytest.raises(UserError, match="a finite number"):
        load_adapted(str(checkpoint), [f"{first}:nan"])
    found = checkpoint.rename(checkpoint.with_name("moved"))
    with pytest.raises(UserError, match="ckpt, which is missing: give the checkpoint, and --adapter=") as told:
        load_adapted(str(third))
    given = shlex.split(str(told.value).split("the checkpoint, and ")[1].replace("--adapter=", ""))
    weight = lora.dense_weight(load_adapted(str(found), given)[0].blocks[1].attn.q)
    assert len(given) == 3 and np.abs(np.array(weight) - wanted).max() < 2e-5 * np.abs(wanted).max()


def test_a_chain_with_quantized_bases(chain):
    """The base of each is quantized for it alone, after the adapters before it are merged; fingerprints are taken
    before that."""
    checkpoint, folder = chain[0], chain[1].parent
    train(folder / "first", checkpoint, seed=3, alpha=5, bits=8)
    train(folder / "second", folder / "first", seed=4, alpha=5, bits=4, kind="dora")

    def quantized(W, bits):
        return mx.dequantize(*mx.quantize(mx.array(W.astype(np.float32)), 64, bits), 64, bits)

    W = in_numpy(quantized(np.array(base().blocks[1].attn.q.weight), 8), (folder / "first", 1))
    wanted = in_numpy(quantized(W, 4), (folder / "second", 1))
    for given in ([folder / "second"], [checkpoint, folder / "first", folder / "second"]):
        model, _ = load_adapted(str(given[0]), [*map(str, given[1:])])
        found = np.array(lora.dense_weight(model.blocks[1].attn.q))
        assert np.abs(found - wanted).max() < 2e-3 * np.abs(wanted).max()
        assert model.blocks[1].mlp.up.bits == 8 and model.blocks[1].attn.q.base.bits == 4


@pytest.mark.parametrize("move", ["folder", "cwd", "link to a folder", "link to a file"])
def test_bases_are_found_again(chain, tmp_path, monkeypatch, move):
    """Wherever the tree of folders has been moved to, however the files are named."""
    before, last = load_adapted(str(chain[3]))[0](IDX), chain[3]
    if move == "folder":
        new = tmp_path / "deeper" / "still"
        new.mkdir(parents=True)
        for name in ("out", "a", "b"):
            (tmp_path / name).rename(new / name)
        last = new / "b" / "rslora"
    elif move == "cwd":
        monkeypatch.chdir(chain[3].parent)
        last = "rslora"
    else:
        target = chain[3].parent if "folder" in move else chain[3]
        (tmp_path / "far" / "off").mkdir(parents=True)
        (tmp_path / "far" / "off" / "link").symlink_to(target)
        last = tmp_path / "far" / "off" / "link" / ("rslora" if "folder" in move else "")
    assert mx.array_equal(load_adapted(str(last))[0](IDX), before)


def test_bases_through_links(chain, tmp_path):
    """An adapter that is written into a linked folder, and whose base was given through a linked folder."""
    (tmp_path / "far" / "off").mkdir(parents=True)
    (tmp_path / "new").symlink_to(tmp_path / "far" / "off")
    (tmp_path / "far" / "base").symlink_to(chain[0].parent)
    train(tmp_path / "new" / "adapter", tmp_path / "far" / "base" / ".." / "out" / "ckpt")  # ".." is of the target
    for path in (tmp_path / "new" / "adapter", tmp_path / "far" / "off" / "adapter"):
        assert [*map(os.path.realpath, load_adapted(str(path))[1]["files"])] == [str(chain[0]), os.path.realpath(path)]


def test_bases_that_are_not_found(chain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    to_do = "give the checkpoint, and --adapter="

    def refused(says, *given):
        with pytest.raises(UserError, match=says) as told:
            load_adapted(given[0], given[1:])
        assert "\n" not in str(told.value)

    whole = chain[1].read_bytes()
    refused("^b/dora was trained on another base, a/lora: give b/dora as the checkpoint", "out/ckpt", "b/dora")
    train(chain[1], chain[0], seed=9)
    refused("b/dora was trained on a/lora, which has changed since then, to lora .*: put the old file back", "b/rslora")
    chain[1].unlink()
    refused(f"^b/dora was trained on a/lora, which is missing: {to_do}b/dora --adapter=b/rslora$", "b/rslora")
    chain[2].replace(chain[1])
    refused("a/lora names a/lora as its base, which is or needs a/lora itself", "a/lora")
    chain[1].write_bytes(whole)
    save_checkpoint("out/ckpt", base(seed=1), {})
    refused("a/lora was trained on out/ckpt, which has changed since then", "a/lora")
    refused("a/lora was trained on out/ckpt, which has changed since then", "out/ckpt", "a/lora")
    save_checkpoint("copy", base(seed=1), {})
    save_checkpoint("out/ckpt", base(seed=1), {"script": "train.py", "step": 30, "losses": {"val": 1.25}})
    changed = (r"^a/lora was trained on out/ckpt, which has changed since then, to ckpt \(train.py, step 30, "
               r"validation loss 1.2500, [-\d]+ [:\d]+\): put the old file back, or tune again$")
    for given in (["a/lora"], ["out/ckpt", "a/lora"], ["copy", "a/lora:0.5"], [str(chain[0]), "a/lora", "b/dora"]):
        refused(changed, *given)
    os.rename("out/ckpt", "out/moved")
    refused("^a/lora was trained on another base, out/ckpt, which is missing: put it back", "copy", "a/lora")
    os.rename("out/moved", "out/ckpt")
    model = base()
    attach(model, "attn.q")
    save_adapter("bare", model)
    refused(f"bare is an adapter that does not tell where its base is: {to_do}bare", "bare")
    save_adapter("old", model, {"settings": {"checkpoint": "out/ckpt"}})  # as before there were "bases"
    refused("old was trained on out/ckpt, which has changed", "old")
    save_checkpoint("out/ckpt", base(), {})
    assert mx.array_equal(load_adapted("old")[0](IDX), model(IDX))
    monkeypatch.chdir("a")
    refused("old was trained on out/ckpt, which is missing", "../old")
    lora.save_peft("my peft", base_with_adapter(), {})
    refused(f"my peft is an adapter of PEFT's, .*: {to_do}'my peft'", "my peft")
    refused("no adapter at none: train one with `python sft.py`", "../out/ckpt", "none:0.5")
    refused("no adapter at none/dpo.safetensors: train one with `python dpo.py`", "../out/ckpt", "none/dpo.safetensors")
    os.mkdir("tuned")
    state = {"model.blocks.0.attn.q.a": mx.zeros((3, 32)), "optimizer.learning_rate": mx.array(1.0)}
    refused("^tuned/adapter_config.json is missing", "../out/ckpt", "tuned")
    save_arrays("tuned/resume.safetensors", state, {"version": 1, "step": 3})
    shutil.copy("lora", "tuned/sft.safetensors")
    refused("^tuned is a folder, not an adapter: give tuned/sft.safetensors$", "../out/ckpt", "tuned")
    says = "^tuned/resume.safetensors is the state from which a run resumes, .*: give tuned/sft.safetensors$"
    refused(says, "../out/ckpt", "tuned/resume.safetensors")
    refused(says, "tuned/resume.safetensors")
    refused("^../out/ckpt is a checkpoint, not an adapter: give it as --checkpoint$", "../out/ckpt", "../out/ckpt")


def test_peft_in_a_locale_of_ascii(tmp_path):
    """A folder of PEFT's whose name is not ASCII, where Python reads names as ASCII."""
    model, folder = base_with_adapter(), os.fsdecode("größe".encode())  # the tests may run in such a locale, too
    save_checkpoint(str(tmp_path / "ckpt"), base(norm="layer"), {})
    (tmp_path / folder).mkdir()
    lora.save_peft(str(tmp_path / folder / "peft"), model, {})
    code = "import os, sys, lora; folder = f'{os.fsdecode(sys.argv[1])}/peft'; assert not folder.isprintable(); " \
           "model, _ = lora.load_adapted('ckpt', [folder]); lora.save_peft(f'{folder}-2', model, {})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code, folder], cwd=tmp_path, env=environment, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    a, b = (load_adapted(str(tmp_path / "ckpt"), [str(tmp_path / folder / name)])[0] for name in ("peft", "peft-2"))
    assert mx.allclose(a(IDX), model(IDX), atol=1e-5) and mx.allclose(b(IDX), model(IDX), atol=1e-5)
    assert not mx.allclose(a(IDX), base(norm="layer")(IDX), atol=1e-2)


def base_with_adapter() -> GPT:
    model = base(norm="layer")
    attach(model, "attn")
    shake(model)
    return model


def test_fingerprint_of_an_adapted_model(tmp_path):
    """It depends on all that the files hold, and is equal on every machine, as it stands in files."""
    model = GPT(GPTConfig(block_size=8, vocab_size=2, n_layer=1, n_head=1, n_embd=2))
    model.update(tree_map(lambda p: mx.full(p.shape, 0.5), model.parameters()))
    save_checkpoint(str(tmp_path / "ckpt"), model, {})
    found = {base_fingerprint(model)}
    for number, (kind, alpha, value) in enumerate([("lora", 2, 0.25), ("lora", 2, 0.5), ("lora", 3, 0.25),
                                                   ("rslora", 2, 0.25), ("dora", 2, 0.25)]):
        adapted, _ = load_checkpoint(str(tmp_path / "ckpt"))
        attach(adapted, "attn.q", rank=1, alpha=alpha, kind=kind)
        adapted.blocks[0].attn.q.update({name: mx.full(adapted.blocks[0].attn.q[name].shape, value) for name in "ab"})
        path = str(tmp_path / str(number))
        save_adapter(path, adapted)
        for weight in ("", ":0.5", ":-1")[:1 if kind == "dora" else 3]:
            for name in (path, f"{path}:1") if not weight else (path + weight,):
                _, meta = load_adapted(str(tmp_path / "ckpt"), [name])
                found.add(meta["fingerprint"])
        if not number:
            assert load_adapted(str(tmp_path / "ckpt"), [path])[1]["fingerprint"] == (
                "0608754641af420e39d5a70c5fc4f8148d2c823ac26e4f185a47fea3f89e6ca5")
    assert len(found) == 1 + 4 * 3 + 1


def test_numbers_that_are_not_finite(tmp_path):
    """Told by the tensor's name; large numbers whose sum overflows are finite."""
    packing.check_finite("", {"x": mx.full((4,), 3e38), "z": mx.full((4,), 6e4, mx.float16)})
    model = base()
    save_checkpoint(str(tmp_path / "ckpt"), model, {})
    attach(model, "attn.q")
    model.blocks[1].attn.q.b[2, 1] = -mx.inf
    save_adapter(str(tmp_path / "a"), model)
    for path in (str(tmp_path / "a"), f"{tmp_path / 'a'}:0.5"):
        with pytest.raises(UserError, match="NaN numbers in blocks.1.attn.q.b"):
            load_adapted(str(tmp_path / "ckpt"), [path])


def test_mistakes(tmp_path):
    path, model = str(tmp_path / "adapter.safetensors"), base()
    for bad, says in ((dict(targets="atn"), "target 'atn' .*attn.q"), (dict(targets=" ,"), "no targets"),
                      (dict(targets="attn.("), "is not a regular expression"), (dict(rank=0), "rank=0"),
                      (dict(kind="vera"), "vera")):
        with pytest.raises(UserError, match=says):
            attach(base(), **bad)
    attach(model, "attn", rank=4)
    save_adapter(path, model)
    with pytest.raises(UserError, match="adapts blocks.1.* which this model lacks"):
        load_adapter(base(n_layer=1), path)
    with pytest.raises(UserError, match=r"attn.[kv].b has shape \(64, 4\), but \(32, 4\)"):
        load_adapter(base(n_kv_head=1), path)
    with pytest.raises(UserError, match=f"is an adapter: .* `python merge.py {path} OUT`"):
        load_checkpoint(path)
    save_checkpoint(path, base(), {})
    with pytest.raises(UserError, match="checkpoint, not an adapter"):
        load_adapter(base(), path)
    with pytest.raises(UserError, match="base_bits=7"):
        quantize_base(base(), 7)


JUNK = [None, True, -1, math.nan, 1e400, 2**70, "", "x", "a\0b", [], ["x"], [None], ["."], {}, {"a": 1}, {"(": 1}]


def test_headers_that_hold_anything(chain):
    """A header with another value in any place: UserError, or a model where that value does not matter."""
    arrays, header = mx.load(str(chain[2]), format="safetensors", return_metadata=True)
    mx.eval(arrays)
    header, odd, refused = json.loads(header["tinygpt"]), str(chain[1].with_name("odd")), set()
    for name in header:
        for value in JUNK:
            mx.save_safetensors(f"{odd}.safetensors", arrays, {"tinygpt": json.dumps({**header, name: value})})
            os.replace(f"{odd}.safetensors", odd)
            for given in (odd, []), (str(chain[1]), [odd]):
                try:
                    model, _ = load_adapted(*given)
                    assert mx.isfinite(model(IDX)).all() or name == "alpha"
                except UserError:
                    refused.add(name)
    assert refused >= {"alpha", "kind", "base", "bases", "version"}


# ---- PEFT ------------------------------------------------------------------------------------------------------------

THEIR_TARGETS = {"GPT-2": ["c_attn", "c_fc", "mlp.c_proj"], "Llama": ["q_proj", "o_proj", "down_proj"],
                 "Qwen2": ["k_proj", "v_proj", "gate_proj", "up_proj"]}


@every_kind
@pytest.mark.parametrize("flavour, targets", [
    ("GPT-2", "attn, mlp"), ("GPT-2", "attn.v"), ("Llama", "attn, mlp, head"), ("Qwen2", "attn.[qk]$, mlp.down")])
def test_folder_of_peft_and_back(flavour, targets, kind, tmp_path):
    """A folder that save_peft() wrote can be loaded."""
    model = build(flavour)
    attach(model, targets, rank=3, alpha=7, kind=kind)
    shake(model)
    lora.save_peft(str(tmp_path / "peft"), model, {})
    assert {path.name for path in (tmp_path / "peft").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    fresh = build(flavour)
    load_adapter(fresh, str(tmp_path / "peft"))
    assert mx.abs(fresh(IDX) - model(IDX)).max() < 1e-4 * mx.abs(model(IDX)).max()
    assert mx.abs(build(flavour)(IDX) - model(IDX)).max() > 1e-2


@every_kind
@pytest.mark.parametrize("flavour", THEIR_TARGETS)
def test_peft_reads_what_we_write(flavour, kind, tmp_path):
    torch, peft = peer("torch"), peer("peft")
    model = build(flavour)
    theirs = in_transformers(flavour, model)
    attach(model, "attn, mlp", rank=3, alpha=7, kind=kind)
    shake(model)
    lora.save_peft(str(tmp_path), model, {})
    adapted = peft.PeftModel.from_pretrained(theirs, str(tmp_path)).eval()
    with torch.no_grad():
        logits = adapted(torch.tensor(np.array(IDX))).logits.numpy()
    assert np.abs(np.array(model(IDX)) - logits).max() < 2e-4 * np.abs(logits).max()


@every_kind
@pytest.mark.parametrize("flavour", THEIR_TARGETS)
def test_we_read_what_peft_writes(flavour, kind, tmp_path):
    torch, peft = peer("torch"), peer("peft")
    model = build(flavour)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=THEIR_TARGETS[flavour], use_dora=kind == "dora",
                             use_rslora=kind == "rslora", task_type="CAUSAL_LM", fan_in_fan_out=flavour == "GPT-2")
    adapted = peft.get_peft_model(in_transformers(flavour, model), config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.2)
            elif "magnitude" in name:
                p.mul_(torch.rand_like(p) + 0.5)
        logits = adapted(torch.tensor(np.array(IDX))).logits.numpy()
    adapted.save_pretrained(str(tmp_path))
    load_adapter(model, str(tmp_path))
    assert np.abs(np.array(model(IDX)) - logits).max() < 2e-4 * np.abs(logits).max()


WHOLE = {"GPT-2": ["wte", "ln_f"], "Llama": ["lm_head", "input_layernorm", "up_proj"], "Qwen2": ["embed_tokens"]}


def whole_in_peft(flavour: str, names: list[str], model: GPT, folder: str) -> np.ndarray:
    """A folder of PEFT's with LoRA and modules that were trained as a whole; its logits in PEFT."""
    torch, peft = peer("torch"), peer("peft")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=THEIR_TARGETS[flavour][:1], modules_to_save=names,
                             task_type="CAUSAL_LM", fan_in_fan_out=flavour == "GPT-2")
    adapted = peft.get_peft_model(in_transformers(flavour, model), config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
        logits = adapted(torch.tensor(np.array(IDX))).logits.numpy()
    adapted.save_pretrained(folder)
    return logits


@pytest.mark.parametrize("flavour", WHOLE)
def test_modules_to_save_in_peft(flavour, tmp_path):
    """Norms, a linear layer, the embedding, the unembedding, also of tied models: from PEFT, and back."""
    torch, peft = peer("torch"), peer("peft")
    model = build(flavour)
    logits = whole_in_peft(flavour, WHOLE[flavour], model, str(tmp_path / "theirs"))
    adapted = build(flavour)
    load_adapter(adapted, str(tmp_path / "theirs"))
    assert np.abs(np.array(adapted(IDX)) - logits).max() < 2e-4 * np.abs(logits).max()
    lora.save_peft(str(tmp_path / "ours"), adapted, {})
    again = peft.PeftModel.from_pretrained(in_transformers(flavour, model), str(tmp_path / "ours")).eval()
    with torch.no_grad():
        assert np.abs(again(torch.tensor(np.array(IDX))).logits.numpy() - logits).max() < 1e-5 * np.abs(logits).max()


def read(folder, out) -> tuple[GPT, dict]:
    run_here("hf_reader.py", folder, out)
    return load_checkpoint(str(out))


@pytest.mark.parametrize("name", sorted({path.name for path in FIXTURES.iterdir()} & {*NAMES, "stablelm-parallel"}))
def test_folder_of_every_family(name, tmp_path):
    """Names, shapes and rows of a folder of PEFT's are those of the family's own tensors: the family's folder, with
    m (W + B A) / ||W + B A|| put into it, has the logits of the model with the adapter, which the folder of PEFT's
    gives again."""
    model, header = read(FIXTURES / name, tmp_path / "base")
    head = "" if model.config.tie or name == "gpt_neox" else ", head"
    for targets in (f"attn, mlp{head}", "attn.[qv], mlp.up")[:1 if model.config.n_expert else 2]:
        model, _ = load_checkpoint(str(tmp_path / "base"))
        attach(model, targets.replace(", mlp", "") if model.config.n_expert else targets, 2, 3, "dora")
        shake(model)
        lora.save_peft(str(tmp_path / "peft"), model, header)
        added = mx.load(str(tmp_path / "peft" / "adapter_model.safetensors"))
        shutil.copytree(FIXTURES / name, tmp_path / "sum", dirs_exist_ok=True)
        arrays = mx.load(str(FIXTURES / name / "model.safetensors"))
        mx.eval(arrays, added)
        for theirs in {key.rpartition(".lora_")[0] for key in added}:
            a, b = (added.pop(f"{theirs}.lora_{letter}.weight") for letter in "AB")
            weight = arrays[f"{theirs.removeprefix('base_model.model.')}.weight"]
            summed = weight + 1.5 * b @ a
            m = added.pop(f"{theirs}.lora_magnitude_vector") / mx.linalg.norm(summed, axis=1)
            arrays[f"{theirs.removeprefix('base_model.model.')}.weight"] = m[:, None] * summed
        assert not added
        mx.save_safetensors(str(tmp_path / "sum" / "model.safetensors"), arrays)
        wanted = logits_here(read(tmp_path / "sum", tmp_path / "sum.safetensors")[0])
        assert error(logits_here(model), wanted) < 1e-5
        assert error(logits_here(load_adapted(str(tmp_path / "base"), [str(tmp_path / "peft")])[0]), wanted) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "gpt_neox-in-turn", "gemma", "gemma2", "gemma3_text", "qwen3_moe",
                                  "phi", "phi3", "olmo2", "smollm3", "stablelm", "stablelm-parallel", "granite"])
def test_every_family_in_peft(name, tmp_path):
    """From PEFT, with norms and block 0 as a whole; to PEFT, what came from there; to PEFT, layers of which some are a
    part of a matrix there. DoRA: it adds B A too."""
    torch, peft = peer("torch"), peer("peft")
    theirs, logits = make(name, tmp_path / "theirs")
    model, header = read(tmp_path / "theirs", tmp_path / "base")
    linear = [path for path, module in theirs.named_modules() if type(module).__name__ in ("Linear", "Conv1D")]
    whole = [path for path in linear if ".0." in path]
    whole += [path for path, _ in theirs.named_modules() if "norm" in path.lower() or ".ln_" in path]
    targets = [path for path in linear if path not in whole and (path != "lm_head" or not model.config.tie)]
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, modules_to_save=whole, use_dora=True,
                             task_type="CAUSAL_LM", fan_in_fan_out=name == "gpt2")
    adapted = peft.get_peft_model(theirs, config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    wanted = logits_there(adapted)
    adapted.save_pretrained(str(tmp_path / "peft"))
    found, _ = load_adapted(str(tmp_path / "base"), [str(tmp_path / "peft")])
    assert error(logits_here(found), wanted) < 1e-5 < 1e-2 < error(logits, wanted)
    attach(model, "attn.v" if model.config.n_expert else "attn.v, mlp.up", kind="dora")
    shake(model)
    if "gpt_neox" in name:  # its unembedding is embed_out in transformers 4, lm_head in 5
        with pytest.raises(UserError, match="head has no name in PEFT's folders for GPT-NeoX"):
            lora.save_peft(str(tmp_path / "ours"), found, header)
        found.head = found.head.base
    for ours in (found, model):
        lora.save_peft(str(tmp_path / "ours"), ours, header)
        again = peft.PeftModel.from_pretrained(make(name, tmp_path / "theirs")[0], str(tmp_path / "ours")).eval()
        assert error(logits_there(again), logits_here(ours)) < 1e-5 < 1e-2 < error(logits_here(ours), logits)


def test_layers_without_a_name_in_peft(tmp_path):
    """They are refused in one line, as are names of experts; no name of another family is taken."""
    model = base(norm="layer", n_kv_head=1)
    attach(model, "attn.q")
    with pytest.raises(UserError, match=r"blocks.\d.attn.q has no name .*query_key_value of GPT-NeoX holds"):
        lora.save_peft(str(tmp_path / "peft"), model, {})
    (model, header), whole = read(FIXTURES / "phi", tmp_path / "base"), {}
    attach(model, "attn.q")
    whole["weight"] = model.blocks[1].attn_norm.weight + 1
    lora.replace_whole(model, "", "blocks.1.attn_norm", whole)
    with pytest.raises(UserError, match=r"blocks.1.\w+_norm has no name .*layers.1.input_layernorm of Phi-2"):
        lora.save_peft(str(tmp_path / "peft"), model, header)
    assert not (tmp_path / "peft").exists()
    model, header = read(FIXTURES / "qwen3_moe", tmp_path / "base")
    attach(model, "attn.q")
    lora.save_peft(str(tmp_path / "peft"), model, header)
    for name in ("mlp.experts.0.up_proj", "mlp.experts", "mlp.gate"):
        name = f"base_model.model.model.layers.0.{name}.lora_A.weight"
        mx.save_safetensors(str(tmp_path / "peft" / "adapter_model.safetensors"), {name: mx.ones((1, 16))})
        with pytest.raises(UserError, match=f"holds {name}, which is not a layer of this Qwen3-MoE model"):
            load_adapted(str(tmp_path / "base"), [str(tmp_path / "peft")])


def test_unembedding_beside_its_adapter(tmp_path):
    """PEFT saves the weight that lm_head has without the adapter too; another weight than the base's is refused."""
    model, header = read(FIXTURES / "phi", tmp_path / "base")
    attach(model, "head")
    shake(model)
    lora.save_peft(str(tmp_path / "peft"), model, header)
    path = str(tmp_path / "peft" / "adapter_model.safetensors")
    arrays = mx.load(path)
    mx.eval(arrays)
    for part in ("weight", "bias"):
        arrays[f"base_model.model.lm_head.base_layer.{part}"] = model.head.base[part]
    mx.save_safetensors(path, arrays)
    found, _ = load_adapted(str(tmp_path / "base"), [str(tmp_path / "peft")])
    assert mx.array_equal(found(IDX[:, :24] % 40), model(IDX[:, :24] % 40))
    mx.save_safetensors(path, arrays | {"base_model.model.lm_head.base_layer.bias": model.head.base.bias + 1})
    with pytest.raises(UserError, match="lm_head.base_layer.bias, which is not a layer of this Phi-2"):
        load_adapted(str(tmp_path / "base"), [str(tmp_path / "peft")])
    model, arrays = base(tie=False, bias=False), {"base_model.model.lm_head.base_layer.weight": mx.ones((61, 64))}
    nn.quantize(model, 32, 8, class_predicate=lambda path, _: path == "head")  # no dense weight is equal to it
    attach(model, "head")
    lora.save_peft(str(tmp_path / "peft"), model, {})
    added = mx.load(path)
    mx.eval(added)
    mx.save_safetensors(path, added | arrays)
    load_adapter(model, str(tmp_path / "peft"))


def test_scales_of_one_matrix(tmp_path):
    """Adapters of q, k and v whose alphas differ are one adapter of Pythia's matrix, which has one alpha."""
    model, header = read(FIXTURES / "gpt_neox", tmp_path / "base")
    attach(model, "attn.[kv]", kind="rslora")
    shake(model)
    for block in model.blocks:
        block.attn.v.scale *= 3
    lora.save_peft(str(tmp_path / "peft"), model, header)
    found, _ = load_adapted(str(tmp_path / "base"), [str(tmp_path / "peft")])
    assert error(logits_here(found), logits_here(model)) < 1e-5


@pytest.mark.parametrize("value", [*JUNK, {"model_type": []}, {"model_type": "x"}, {"model_type": None}], ids=repr)
def test_family_of_an_odd_header(value):
    """A header that names no known family is as good as none."""
    assert lora.family_here(build("Llama"), {"hf": value}) == "llama"


LAYER = "model.layers.1."


@pytest.mark.parametrize("bits", [0, 8])
@pytest.mark.parametrize("names", [
    ("lm_head",), ("model.embed_tokens",), ("lm_head", "model.embed_tokens"),
    (f"{LAYER}input_layernorm", f"{LAYER}self_attn.k_proj", "model.norm")], ids=str)
def test_modules_to_save(names, bits, tmp_path):
    """Whole modules, named as PEFT names them, on a base that is tied and may be quantized: the logits are those of the
    base with these weights; a file of ours, a folder of PEFT's and a merged checkpoint keep them."""
    settings = dict(bias=False, qk_norm=False, mlp="swiglu", vocab_size=64)
    plain, path = base(**settings), str(tmp_path / "base.safetensors")
    if bits:
        nn.quantize(plain, 32, bits, class_predicate=lambda path, _: path in ("embed", "blocks.1.attn.k"))
    save_checkpoint(path, plain, {})
    fingerprint, wanted = base_fingerprint(plain), base(**settings, tie=False)
    for name, module in dict(plain.named_modules()).items():  # the wanted model: dense, and not tied
        if name != "" and "weight" in module:
            dict(wanted.named_modules())[name].weight = quantized.dense_weight(module)
    wanted.head.weight = wanted.embed.weight
    attach(plain, "attn.q", rank=2)
    shake(plain)
    lora.save_peft(str(tmp_path / "peft"), plain, {})
    attach(wanted, "attn.q", rank=2)
    shake(wanted)
    ours = {"lm_head": "head", "model.embed_tokens": "embed", "model.norm": "norm",
            f"{LAYER}input_layernorm": "blocks.1.attn_norm", f"{LAYER}self_attn.k_proj": "blocks.1.attn.k"}
    arrays, rng = mx.load(str(tmp_path / "peft" / "adapter_model.safetensors")), np.random.default_rng(0)
    mx.eval(arrays)
    for name in names:
        module = dict(wanted.named_modules())[ours[name]]
        module.weight = arrays[f"base_model.model.{name}.weight"] = mx.array(
            0.1 * rng.standard_normal(module.weight.shape).astype(np.float32))
    mx.save_safetensors(str(tmp_path / "peft" / "adapter_model.safetensors"), arrays)
    logits = wanted(IDX)
    found, meta = load_adapted(path, [str(tmp_path / "peft")])
    save_adapter(str(tmp_path / "a.safetensors"), found, fingerprint=fingerprint, bases=[path])
    lora.save_peft(str(tmp_path / "again"), found, {})
    lora.save_merged(str(tmp_path / "merged.safetensors"), found, {})
    for model in (found, load_adapted(str(tmp_path / "a.safetensors"))[0],
                  load_adapted(path, [str(tmp_path / "again")])[0],
                  load_adapted(str(tmp_path / "merged.safetensors"))[0]):
        assert mx.abs(model(IDX) - logits).max() < 1e-5 * mx.abs(logits).max()
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert sorted(config["modules_to_save"]) == sorted(names)
    with pytest.raises(UserError, match="as a whole, and can have no weight but 1"):
        load_adapted(path, [f"{tmp_path / 'peft'}:0.5"])
    arrays[f"base_model.model.{names[0]}.weight"] = mx.zeros((3,))
    mx.save_safetensors(str(tmp_path / "peft" / "adapter_model.safetensors"), arrays)
    with pytest.raises(UserError, match=r"weight has shape \(3,\), which does not fit"):
        load_adapted(path, [str(tmp_path / "peft")])


def test_bad_folders_of_peft(tmp_path):
    with pytest.raises(UserError, match="adapter_config.json is missing.*pickle"):
        load_adapter(base(), str(tmp_path))
    model = base(norm="layer")
    attach(model, "attn")
    lora.save_peft(str(tmp_path), model, {})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    with pytest.raises(UserError, match=r"has shape \(192, 24\), but by the settings it has 128 \+ 128 \+ 128 rows"):
        load_adapter(base(norm="layer", n_embd=128), str(tmp_path))
    with pytest.raises(UserError, match=r"attention.\w+.lora_..weight, which is not a layer of this Qwen3 model"):
        load_adapter(base(), str(tmp_path))
    for change, says in ((dict(bias="all"), "bias all"), (dict(peft_type="LOHA"), "LOHA"),
                         (dict(init_lora_weights="pissa_niter_4"), "changed the base's weights")):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match=says):
            load_adapter(base(), str(tmp_path))
    for name in config:
        for value in JUNK:
            (tmp_path / "adapter_config.json").write_text(json.dumps({**config, name: value}))
            with contextlib.suppress(UserError):  # and no other error
                load_adapter(base(norm="layer"), str(tmp_path))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    whole = (tmp_path / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(whole[:-50])
    with pytest.raises(UserError, match="not a whole adapter"):
        load_adapter(base(), str(tmp_path))
    mx.save_safetensors(str(tmp_path / "adapter_model.safetensors"), {"base_model.model.wte.lora_A.weight": mx.ones(3)})
    with pytest.raises(UserError, match="wte.lora_A.weight, which is not a layer"):
        load_adapter(base(), str(tmp_path))
    moe = base(diff_attn=True, diff_attn_version=2)
    attach(moe, "attn.lam")
    with pytest.raises(UserError, match="attn.lam has no name"):
        lora.save_peft(str(tmp_path), moe, {})


@pytest.mark.parametrize("old", [False, True])
def test_full_disk(tmp_path, old):
    """One line, and the folder is as before, or empty."""
    if old:
        lora.save_peft(str(tmp_path), base_with_adapter(), {})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model, limit = base_with_adapter(), resource.getrlimit(resource.RLIMIT_FSIZE)
    model.blocks[0].attn.q.b += 1
    for size in (0, 5000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))  # no file may grow larger
        try:
            with pytest.raises(UserError, match=f"cannot write {tmp_path}: .*; what was there is unharmed"):
                lora.save_peft(str(tmp_path), model, {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
