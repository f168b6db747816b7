"""lora.py: against the formulas in float64 numpy, on dense and quantized bases, through files, and against PEFT."""
import json
import sys

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from test_model import build, in_transformers

import lora
from config import UserError
from lora import Adapter, attach, base_fingerprint, load_adapter, merge, quantize_base, save_adapter
from model import GPT, GPTConfig, load_checkpoint, save_checkpoint

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


def test_mistakes(tmp_path):
    path, model = str(tmp_path / "adapter.safetensors"), base()
    for bad, says in ((dict(targets="atn"), "target 'atn' .*attn.q"), (dict(targets=" ,"), "no targets"),
                      (dict(targets="attn.("), "is not a regular expression"), (dict(rank=0), "rank=0"),
                      (dict(kind="vera"), "vera")):
        with pytest.raises(UserError, match=says):
            attach(base(), **bad)
    attach(model, "attn", rank=4)
    save_adapter(path, model)
    other = base(seed=1)
    with pytest.raises(UserError, match="another base"):
        load_adapter(other, path)
    with pytest.raises(UserError, match="adapts blocks.1.* which this model lacks"):
        load_adapter(base(n_layer=1), path, fingerprint=base_fingerprint(base()))
    with pytest.raises(UserError, match=r"attn.[kv].b has shape \(64, 4\), but \(32, 4\)"):
        load_adapter(base(n_kv_head=1), path, fingerprint=base_fingerprint(base()))
    with pytest.raises(UserError, match=f"is an adapter: .* `python merge.py {path} OUT`"):
        load_checkpoint(path)
    save_checkpoint(path, base(), {})
    with pytest.raises(UserError, match="checkpoint, not an adapter"):
        load_adapter(base(), path)
    with pytest.raises(UserError, match="base_bits=7"):
        quantize_base(base(), 7)


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
    lora.save_peft(str(tmp_path / "peft"), model)
    assert {path.name for path in (tmp_path / "peft").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    fresh = build(flavour)
    load_adapter(fresh, str(tmp_path / "peft"))
    assert mx.abs(fresh(IDX) - model(IDX)).max() < 1e-4 * mx.abs(model(IDX)).max()
    assert mx.abs(build(flavour)(IDX) - model(IDX)).max() > 1e-2


def package_peft():
    """peft takes a module called hqq for the package of that name: ours is hidden while it looks."""
    ours, sys.modules["hqq"] = sys.modules.get("hqq"), None
    try:
        return pytest.importorskip("peft")
    finally:
        del sys.modules["hqq"]
        if ours:
            sys.modules["hqq"] = ours


@every_kind
@pytest.mark.parametrize("flavour", THEIR_TARGETS)
def test_peft_reads_what_we_write(flavour, kind, tmp_path):
    torch, peft = pytest.importorskip("torch"), package_peft()
    model = build(flavour)
    theirs = in_transformers(flavour, model)
    attach(model, "attn, mlp", rank=3, alpha=7, kind=kind)
    shake(model)
    lora.save_peft(str(tmp_path), model)
    adapted = peft.PeftModel.from_pretrained(theirs, str(tmp_path)).eval()
    with torch.no_grad():
        logits = adapted(torch.tensor(np.array(IDX))).logits.numpy()
    assert np.abs(np.array(model(IDX)) - logits).max() < 2e-4 * np.abs(logits).max()


@every_kind
@pytest.mark.parametrize("flavour", THEIR_TARGETS)
def test_we_read_what_peft_writes(flavour, kind, tmp_path):
    torch, peft = pytest.importorskip("torch"), package_peft()
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


def test_bad_folders_of_peft(tmp_path):
    with pytest.raises(UserError, match="adapter_config.json is missing.*pickle"):
        load_adapter(base(), str(tmp_path))
    model = base(norm="layer")
    attach(model, "attn")
    lora.save_peft(str(tmp_path), model)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    with pytest.raises(UserError, match=r"attn.\w+.a has shape \((8|24), 64\), but \((8|24), 128\)"):
        load_adapter(base(n_embd=128), str(tmp_path))
    for change, says in ((dict(bias="all"), "bias all"), (dict(peft_type="LOHA"), "LOHA")):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match=says):
            load_adapter(base(), str(tmp_path))
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
        lora.save_peft(str(tmp_path), moe)
