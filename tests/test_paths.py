"""paths.py: each cell against a model in float64 that is written here; a planted circuit; prompt sets; bad input."""
from functools import partial

import blas  # noqa: F401  (before mlx)
import conftest
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from test_gptq import checkpoint
from test_patching import CIRCUIT, CLEAN, CORRUPT, RNG, TARGET, induction, row, small

import paths as script
from config import UserError
from paths import paths
from tokenizer import byte_tokenizer

HEADS = 4


def weights_of(model):
    return {name: np.array(p, np.float64) for name, p in tree_flatten(model.parameters())}


def forward(w, idx, hook=lambda site, layer, x: x):
    """Logits (V,) of the last position of tokens (T,), in float64: learned positions, RMSNorm, relu squared, grouped
    keys. hook(site, layer, x) at q, k, v and z (heads, T, D), and at m (T, C), what the MLP adds."""
    def norm(x, name):
        return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"]

    T, layer = len(idx), 0
    x = w["embed.weight"][idx] + w["pos_embed.weight"][:T]
    while f"blocks.{layer}.attn.q.weight" in w:
        block, y = f"blocks.{layer}", norm(x, f"blocks.{layer}.attn_norm")
        D = w[f"{block}.attn.q.weight"].shape[0] // HEADS
        q, k, v = (hook(name, layer, (y @ w[f"{block}.attn.{name}.weight"].T).reshape(T, -1, D).swapaxes(0, 1))
                   for name in "qkv")
        k, v = (np.repeat(each, HEADS // len(each), axis=0) for each in (k, v))
        scores = np.where(np.tri(T, dtype=bool), q @ k.swapaxes(1, 2) / np.sqrt(D), -np.inf)
        a = np.exp(scores - scores.max(-1, keepdims=True))
        z = hook("z", layer, a / a.sum(-1, keepdims=True) @ v)
        x = x + z.swapaxes(0, 1).reshape(T, -1) @ w[f"{block}.attn.out.weight"].T
        h = np.maximum(norm(x, f"{block}.mlp_norm") @ w[f"{block}.mlp.up.weight"].T, 0) ** 2
        x = x + hook("m", layer, h @ w[f"{block}.mlp.down.weight"].T)
        layer += 1
    return norm(x[-1], "norm") @ w["head.weight"].T


def one_path(w, clean, corrupt, sender, receivers, frozen, position):
    """The logits by the two passes of the paper, each one whole. sender: a layer, and a head or "m"."""
    states = {}
    for name, idx in (("clean", clean), ("corrupt", corrupt)):
        forward(w, idx, lambda site, layer, x, name=name: states.setdefault((name, site, layer), x))
    got, at = {}, slice(None) if position is None else position

    def first(site, layer, x):
        if site == "z" or site == "m" and frozen:
            x = states["clean", site, layer].copy()
        if layer == sender[0] and site == ("m" if sender[1] == "m" else "z"):
            x, by = x.copy(), states["corrupt", site, layer]
            if site == "m":
                x[at] = by[at]
            else:
                x[sender[1], at] = by[sender[1], at]
        got[site, layer] = x
        return x

    logits = forward(w, clean, first)
    if not receivers:
        return logits

    def second(site, layer, x):
        for one, head, name in receivers:
            if (name, one) == (site, layer):
                x = x.copy()
                x[head] = got[site, layer][head]
        return x

    return forward(w, clean, second)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("receivers", [
    [], [(2, 1, "q")], [(1, 0, "k"), (3, 2, "q"), (3, 3, "q"), (2, 1, "v")]], ids=str)
def test_cells(receivers, frozen):
    """Every sender, at all positions, and at one."""
    model = small(4, n_head=HEADS, n_kv_head=2, pos="learned", qk_norm=False, tie=False, n_embd=64)
    w, how = weights_of(model), "frozen" if frozen else "recomputed"
    clean, corrupt = (RNG.integers(0, 64, (2, 7)) for _ in range(2))
    found = paths(model, mx.array(clean), mx.array(corrupt), receivers, mlps=how, batch_size=3)
    last = max((layer for layer, _, _ in receivers), default=4)
    assert found.shape == (last, HEADS + 1, 1, 2, 64)
    plain = forward(w, clean[0])
    some = paths(model, mx.array(clean), mx.array(corrupt), receivers, [5, 2], how)
    changes = 0
    for layer, part in np.ndindex(last, HEADS + 1):
        sender = layer, "m" if part == HEADS else part
        for n in range(2):
            expected = one_path(w, clean[n], corrupt[n], sender, receivers, frozen, None)
            np.testing.assert_allclose(found[layer, part, 0, n], expected, atol=2e-5)
        changes = max(changes, abs(one_path(w, clean[0], corrupt[0], sender, receivers, frozen, None) - plain).max())
        expected = one_path(w, clean[1], corrupt[1], sender, receivers, frozen, 2)
        np.testing.assert_allclose(some[layer, part, 1, 1], expected, atol=2e-5)
    assert changes > 0.005


@pytest.mark.parametrize("receivers, senders", [
    ([(1, 0, "k")], {(0, 0): 2}), ([(1, 0, "q")], {}), ([(1, 0, "v")], {}), ([(1, 1, "k")], {}), ([(2, 0, "k")], {}),
    ([], {(1, 0): 5})], ids=str)
def test_the_induction_circuit(receivers, senders):
    """The previous-token head acts through the key of the induction head, at the token that followed; the induction
    head acts on the logits, at the last position; and there is no other path."""
    model, (clean, corrupt) = induction(), (mx.array([ids]) for ids in CIRCUIT)
    high, low = (float(model(ids)[0, -1, 2]) for ids in (clean, corrupt))
    found = np.array(paths(model, clean, corrupt, receivers)[:, :, 0, 0, 2])
    each = np.array(paths(model, clean, corrupt, receivers, [*range(6)])[..., 0, 2])
    expected, at_each = np.zeros(found.shape), np.zeros(each.shape)
    for sender, position in senders.items():
        expected[sender] = at_each[(*sender, position)] = 1
    np.testing.assert_allclose((found - high) / (low - high), expected, atol=0.05)
    np.testing.assert_allclose((each - high) / (low - high), at_each, atol=0.05)


VARIANTS = [dict(n_expert=3, mlp="swiglu"), dict(diff_attn=True, yoco=True), dict(parallel=True, norm="layer"),
            dict(sliding_window=5, diff_attn=True, diff_attn_version=2, n_kv_head=1), dict(value_residual=True),
            dict(value_embeds=True, mod="soft"), dict(norm_place="both", residual_scale=0.5, softcap=5.0)]


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_variants(settings):
    """Where the prompts are equal, a path changes nothing; senders of the last layer change the logits by what they
    write, as a tap that replaces their output does."""
    model, (clean, corrupt) = small(3, **settings), mx.array(RNG.integers(0, 64, (2, 1, 8)))
    receivers = [(2, 0, "q"), (1, 0, "k")]
    own, states = model(clean)[0, -1], {}
    assert mx.abs(paths(model, clean, clean, receivers) - own).max() < 1e-3
    assert mx.abs(paths(model, clean, corrupt, receivers) - own).max() > 1e-4
    model(corrupt, tap=lambda site, layer, x: states.setdefault((site, layer), x))
    alone = model(clean, tap=lambda site, layer, x: mx.concatenate([states[site, 2][:, :1], x[:, 1:]], axis=1)
                  if (site, layer) == ("heads", 2) else x)[0, -1]
    assert mx.abs(paths(model, clean, corrupt, [])[2, 0, 0, 0] - alone).max() < 1e-3


def test_refused():
    model, idx = small(3, mod="topk", mod_every=1), mx.array([[1, 2]])
    with pytest.raises(UserError, match="mod=topk"):
        paths(model, idx, idx, [])
    with pytest.raises(UserError, match="no keys and values of its own"):
        paths(small(4, yoco=True), idx, idx, [(3, 0, "k")])


# ---- files -----------------------------------------------------------------------------------------------------------

run = partial(conftest.run, "paths.py")


def test_script(tmp_path):
    """Figures of a prompt and of a set equal those computed here; the table is saved, and replaced only by itself."""
    path, model = checkpoint(tmp_path, n_layer=3)
    model.eval()

    def measure(text):
        return float(script.measures([one], model(mx.array([[256, *text.encode()]]))[:, -1])[0])

    one = script.chosen_prompts(byte_tokenizer(), model, "", ("a", "", " ", "x"), True, False)[0]
    saved = tmp_path / "a.npz"
    done = run(path, CLEAN, CORRUPT, TARGET, "--foil=x", "--receiver=2.1.q,2.0.k", f"--save={saved}")
    clean, corrupt = measure("the cat sat"), measure("the dog sat")
    assert f"clean {clean:.4f}, corrupt {corrupt:.4f}" in done.stdout
    ids = [mx.array([[256, *f"the {animal} sat".encode()]]) for animal in ("cat", "dog")]
    cells = paths(model, *ids, [(2, 1, "q"), (2, 0, "k")], measure=lambda logits: script.measures([one], logits))
    expected = (np.array(cells)[:, :, 0, 0] - clean) / (corrupt - clean)
    table = np.load(saved)
    np.testing.assert_allclose(table["values"], expected, atol=1e-4)
    np.testing.assert_allclose(row(done.stdout, "layer 1"), expected[1], atol=2e-3)
    assert table["columns"].tolist() == ["head 0", "head 1", "MLP"]
    (tmp_path / "set.jsonl").write_text('{"clean": "the cat sat", "corrupt": "the dog sat", "target": " ", "foil": "x"}'
                                        '\n{"clean": "a cat", "corrupt": "a dog", "target": " ", "foil": "x"}\n')
    done = run(path, f"--prompts={tmp_path / 'set.jsonl'}", "--receiver=2.1.q,2.0.k", f"--save={saved}",
               "--base=corrupt")
    assert "means over 2 prompts" in done.stdout and "is an earlier result, which is replaced" in done.stdout
    wholes, changes = [], []
    for low, high in (("the dog sat", "the cat sat"), ("a dog", "a cat")):
        ids = [mx.array([[256, *text.encode()]]) for text in (low, high)]
        cells = paths(model, *ids, [(2, 1, "q"), (2, 0, "k")], measure=lambda logits: script.measures([one], logits))
        wholes.append(measure(high) - measure(low))
        changes.append(np.array(cells)[:, :, 0, 0] - measure(low))
    table = np.load(saved)
    np.testing.assert_allclose(table["values"], np.mean(changes, 0) / np.mean(wholes), atol=1e-3)
    assert table["count"] == 2 and table["each"].shape == (2, 2, 3)
    page = (tmp_path / "ckpt-paths.html").read_text()
    assert "the dog sat" in page and "<dt>foil" in page and "corrupt" in page


@pytest.mark.parametrize("arguments, says", [
    ([CLEAN, CORRUPT, TARGET, "--receiver=5.1"], "write layer.head.q"),
    ([CLEAN, CORRUPT, TARGET, "--receiver=0.1.q"], "give a layer from 1"),
    ([CLEAN, CORRUPT, TARGET, "--receiver=1.2.q"], "the layer has the query heads 0 to 1"),
    ([CLEAN, "--corrupt=a dog", TARGET], "12 and 6 tokens"), ([CLEAN, TARGET], "give --corrupt"),
    ([CLEAN, CORRUPT, TARGET, "--mlps=none"], "mlps='none'"),
    ([CLEAN, "--prompts=x.jsonl"], "leave one of the two out"),
    ([CLEAN, CORRUPT, TARGET, "--save=a.npy"], "let its name end in .npz"),
])
def test_bad_input(arguments, says, tmp_path):
    path, _ = checkpoint(tmp_path)
    assert says in run(path, *arguments, status=2).stderr
    assert [file.name for file in tmp_path.iterdir()] == ["ckpt.safetensors"]


def test_docstring(tmp_path):
    checkpoint(tmp_path, n_layer=4)
    assert conftest.docstring_use(script, tmp_path)["logits"].shape == (2, 3, 1, 1, 320)
