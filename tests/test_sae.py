"""sae.py and sparse.py: losses and gradients against float64 numpy; planted features, in states and in a model, are
found; sae-lens computes the same features; where dictionaries read and write in every variant; the command line."""
import re
from functools import partial

import blas  # noqa: F401  (before mlx)
import conftest
import mlx.core as mx
import numpy as np
import pytest
from peers import peer
from test_gptq import FLAVOURS
from test_patching import small

import sae
import sparse
from config import UserError
from lora import base_fingerprint
from model import GPT, GPTConfig, load_arrays, load_checkpoint, no_tap, save_checkpoint
from sparse import Dictionary, decode, encode, kth_largest, replacing, states
from tokenizer import byte_tokenizer

run = partial(conftest.run, "sae.py")
RNG = np.random.default_rng(5)
IDX = mx.array(RNG.integers(0, 64, (2, 12)))


def array(*shape, scale=1.0) -> mx.array:
    return mx.array(RNG.normal(size=shape).astype(np.float32) * scale)


def as64(own: dict) -> dict:
    return {name: np.array(value, np.float64) for name, value in own.items()}


# ---- formulas --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("F, k", [(512, 5), (512, 20), (96, 3), (100, 3), (64, 64), (7, 1), (4096, 1)])
def test_kth_largest(F, k):
    x = array(9, F)
    x[3] = mx.round(x[3])  # with equal numbers
    np.testing.assert_array_equal(np.array(kth_largest(x, k))[:, 0], np.sort(np.array(x), axis=1)[:, -k])


def numpy_loss(own: dict, x, y, kind: str, k: int, dead=None, sparsity=0.0):
    """The loss of the module's docstring, in float64, with its parts."""
    p = x @ own["encoder"].T + own["encoder_bias"]
    if kind == "topk":
        z = np.where(p >= np.sort(p, axis=1)[:, [-k]], np.maximum(p, 0), 0)
    elif kind == "batchtopk":
        z = np.where(p >= max(0, np.sort(p.ravel())[-k * len(p)]), np.maximum(p, 0), 0)
    else:
        z = np.where(p > np.exp(own["log_threshold"]), p, 0)
    left = y - z @ own["decoder"] - own["decoder_bias"] - (x @ own["skip"].T if "skip" in own else 0)
    total = (left**2).sum() / len(x) + sparsity * ((z > 0).sum() / len(x) / k - 1) ** 2
    if dead is not None:
        spare = np.maximum(p[:, dead], 0) @ own["decoder"][dead]
        total += ((left - spare)**2).sum() / (left**2).sum() / 32
    return total, z, left, p


def parameters(C_in: int, C_out: int, F: int, kind: str) -> dict:
    own = {"encoder": array(F, C_in), "encoder_bias": array(F, scale=0.1), "decoder": array(F, C_out),
           "decoder_bias": array(C_out), "skip": array(C_out, C_in)}
    return own | ({"log_threshold": array(F, scale=0.3)} if kind == "jumprelu" else {})


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "jumprelu"])
@pytest.mark.parametrize("rescue", [False, True])
def test_loss_and_gradients(kind, rescue, monkeypatch):
    """Loss, features and gradients against numpy: finite differences where the loss has a gradient, and the formulas
    of Rajamanoharan et al. (2024) for the thresholds. A dead feature has a gradient in the auxiliary loss alone."""
    e = 0.3
    for name, value in dict(kind=kind, k=4, sparsity=0.7, bandwidth=e).items():
        monkeypatch.setattr(sae, name, value)
    own, x, y = parameters(6, 5, 32, kind), array(20, 6), array(20, 5)
    own["encoder_bias"][mx.array([3, 9])] = -50.0  # two dead features
    dead = np.array([3, 9, 12]) if rescue else None
    given = None if dead is None else mx.array(dead)
    (total, error, z, bound), gradient = mx.value_and_grad(
        lambda own: sae.dictionary_loss(own, x, y, given))(own)
    own64, x64, y64 = as64(own), np.array(x, np.float64), np.array(y, np.float64)
    expected, z64, left, p = numpy_loss(own64, x64, y64, kind, 4, dead, 0.7 if kind == "jumprelu" else 0)
    np.testing.assert_allclose(np.array(z), z64, atol=1e-5)
    np.testing.assert_allclose([total.item(), error.item()], [expected, (left**2).sum() / 20], rtol=1e-5)
    if kind == "batchtopk":
        assert bound.item() == pytest.approx(z64[z64 > 0].min(), rel=1e-5) and (z64 > 0).sum() == 80
    for name in set(own) - {"log_threshold"}:
        for at in [tuple(RNG.integers(0, n) for n in own[name].shape) for _ in range(6)]:
            ends = []
            for step in (1e-6, -1e-6):
                moved = {key: value.copy() for key, value in own64.items()}
                moved[name][at] += step
                again, _, rest, q = numpy_loss(moved, x64, y64, kind, 4, None)
                if rescue:  # what is left counts as a constant there, as in Gao et al.
                    spare = np.maximum(q[:, dead], 0) @ moved["decoder"][dead]
                    again = (rest**2).sum() / 20 + ((left - spare)**2).sum() / (left**2).sum() / 32
                ends.append(again)
            slope = (ends[0] - ends[1]) / 2e-6
            np.testing.assert_allclose(gradient[name][at].item(), slope, rtol=2e-3, atol=1e-4, err_msg=f"{name} {at}")
    assert not mx.any(gradient["encoder"][mx.array([3, 9])]).item()  # p < 0: nothing can revive it
    if rescue:
        assert mx.all(mx.abs(gradient["decoder"][12]) > 0).item()
    if kind == "jumprelu":
        t = np.exp(own64["log_threshold"])
        dz = -2 / 20 * left @ own64["decoder"].T  # of the loss by z
        near = np.abs(p - t) < e / 2  # the rectangle kernel
        L0 = (p > t).sum() / 20
        by_t = (-(t / e) * near * dz).sum(0) + 0.7 * 2 * (L0 / 4 - 1) / 4 * -(1 / e) * near.sum(0) / 20
        np.testing.assert_allclose(np.array(gradient["log_threshold"]), by_t * t, rtol=1e-3, atol=1e-5)
        assert near.any(0).sum() > 10


def test_dead_features_learn(monkeypatch):
    """A feature that is never among the k largest gets a gradient from the auxiliary loss alone."""
    for name, value in dict(kind="topk", k=2).items():
        monkeypatch.setattr(sae, name, value)
    own, x = parameters(6, 6, 16, "topk"), array(30, 6)
    own["encoder"][5], own["encoder_bias"][5] = own["encoder"][5] * 1e-3, 0.05
    for dead, learns in ((None, False), (mx.array([5]), True)):
        gradient = mx.grad(lambda own, dead=dead: sae.dictionary_loss(own, x, x, dead)[0])(own)
        assert mx.any(gradient["encoder"][5]).item() == mx.any(gradient["decoder"][5]).item() == learns


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "jumprelu"])
def test_folded(kind, monkeypatch):
    """The dictionary does to states what the parameters do to normalised ones."""
    for name, value in dict(kind=kind, k=4).items():
        monkeypatch.setattr(sae, name, value)
    own, x = parameters(6, 5, 32, kind), 7 * array(20, 6) + 3
    scales = {("mlp_in", 1): sae.normaliser(x), ("mlp", 1): (array(5), mx.array(0.4))}
    d = sae.folded(own, ("mlp_in", 1), ("mlp", 1), scales, mx.array(0.9))
    inside = np.array(x, np.float64) - np.array(x, np.float64).mean(0)
    inside /= np.sqrt((inside**2).sum(1).mean())
    _, z, left, p = numpy_loss(as64(own), inside, 0, "topk" if kind == "batchtopk" else kind, 4)
    if kind == "batchtopk":
        z = np.where(p > 0.9, p, 0)
        left = -z @ np.array(own["decoder"]) - np.array(own["decoder_bias"]) - inside @ np.array(own["skip"]).T
    expected = -left * 0.4 + np.array(scales["mlp", 1][0])
    np.testing.assert_allclose(np.array(encode(d, x)), z * 0.4, atol=1e-4)
    np.testing.assert_allclose(np.array(decode(d, encode(d, x), x)), expected, atol=1e-4)


# ---- planted features ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "jumprelu"])
def test_planted_directions(kind, monkeypatch):
    """States are sums of two of 40 known directions in 32 dimensions: each is a row of the decoder, and its feature is
    active where the direction is."""
    rng = np.random.default_rng(1)
    directions = rng.normal(size=(40, 32))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)

    def planted(n):
        on = np.where(rng.random((n, 40)).argsort(axis=1) < 2, rng.uniform(1, 2, (n, 40)), 0)
        return on, mx.array((on @ directions + 0.5).astype(np.float32))

    def streamed(model, rows, places, batch, _):
        while True:
            yield {("resid", 0): planted(batch)[1]}

    for name, value in dict(kind=kind, k=2, features=64, tokens=300_000, batch_size=512, learning_rate=1e-2,
                            dead_after=5000, site="resid", streamed=streamed, sparsity=0.1, bandwidth=0.05).items():
        monkeypatch.setattr(sae, name, value)
    (d,), curve = sae.train(None, None, [("resid", 0)], [("resid", 0)])
    rows = np.array(d.decoder)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    cosines = directions @ rows.T
    assert (cosines.max(1) > 0.95).mean() >= 0.9, np.sort(cosines.max(1))
    on, x = planted(2000)
    z = np.array(encode(d, x))
    agree = [((z[:, cosines[i].argmax()] > 0.1) == (on[:, i] > 0)).mean() for i in range(40)]
    assert np.median(agree) > 0.97 and 1 < (z > 0).sum(1).mean() < 3
    assert curve[-1]["explained 0"] > 0.9 > curve[0]["explained 0"]


def one_token_model() -> tuple[GPT, np.ndarray]:
    """Bytes, three layers that add almost nothing; only the token "q" has a direction of its own, on top of small
    noise."""
    model = GPT(GPTConfig(vocab_size=256, block_size=32, n_embd=16, n_head=2, n_layer=3, tie=False), seed=1).eval()
    rng = np.random.default_rng(2)
    u = rng.normal(size=16)
    u /= np.linalg.norm(u)
    table = rng.normal(size=(256, 16)) * 0.1
    table -= np.outer(table @ u, u)
    table[ord("q")] = 3 * u
    model.embed.weight = mx.array(table.astype(np.float32))
    for block in model.blocks:
            block.attn.out.weight, block.mlp.down.weight = block.attn.out.weight * 1e-3, block.mlp.down.weight * 1e-3
    return model, u


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The model with a feature for "q", a text, and an autoencoder of each layer."""
    folder = tmp_path_factory.mktemp("sae")
    model, u = one_token_model()
    save_checkpoint(str(folder / "ckpt.safetensors"), model, {"tokenizer": byte_tokenizer().to_dict()})
    rng = np.random.default_rng(3)
    letters = rng.choice(list("abcdefghijklmnop \n"), 12_000)
    letters[rng.random(12_000) < 0.04] = "q"
    (folder / "text.txt").write_text("".join(letters))
    done = run(folder / "ckpt.safetensors", f"--data={folder / 'text.txt'}", "--layer=all", "--features=32", "--k=1",
               "--tokens=60000", "--batch_size=256", "--eval_tokens=1000", f"--out={folder / 'd.sae'}")
    return folder, u, done.stdout


def test_one_token(trained):
    """In each layer, exactly one feature fires on every "q", and on no other token; it is the planted direction; with
    the dictionary in place, the model's loss is close to its own."""
    folder, u, printed = trained
    model, _ = load_checkpoint(str(folder / "ckpt.safetensors"))
    text = (folder / "text.txt").read_bytes()[:31 * 40]
    idx = mx.array(np.frombuffer(text, np.uint8).reshape(40, 31).astype(np.int32))
    assert len(re.findall(r"resid [012] +1\.0 +0\.9", printed)) == 3, printed
    for layer in range(3):
        d = sparse.load(str(folder / f"d-{layer}.sae"), model, base_fingerprint(model))
        z = np.array(encode(d, states(model, idx, [d.reads])[d.reads]))
        best = int(np.argmax(np.array(d.decoder) @ u))
        assert np.array(d.decoder)[best] @ u > 0.97
        fires = z[:, 1:] > 1
        np.testing.assert_array_equal(fires[..., best], np.array(idx)[:, 1:] == ord("q"))
        assert not np.delete(fires, best, axis=-1)[np.array(idx)[:, 1:] == ord("q")].any()
    header = load_arrays(str(folder / "d-0.sae"))[1]
    assert header["measured"]["explained"] > 0.9 and header["settings"]["features"] == 32
    assert (folder / "d-curves.png").stat().st_size > 1000


def test_page_and_direction(trained, tmp_path):
    """The page shows the feature of "q" with its texts; its direction steers."""
    folder, u, _ = trained
    ckpt, data = folder / "ckpt.safetensors", f"--data={folder / 'text.txt'}"
    d = load_arrays(str(folder / "d-1.sae"))[0]
    number = int(np.argmax(np.array(d["decoder"]) @ u))
    shown = run(ckpt, data, f"--show={folder / 'd-1.sae'}", f"--feature={number},0", "--eval_tokens=1000")
    assert re.search(rf"feature +{number} \| active +[2-6]\.\d+% \| most at '.{{2,4}}q'", shown.stdout), shown.stdout
    html = (folder / "d-1.html").read_text()
    part = html[html.index(f"<section id=f{number}>"):].split("</section>")[0]
    assert set(re.findall(r"<i>(.*?)</i>", part)) == {"q"} and part.count("<p class=text>") == 8
    assert set(re.findall(r'style="background[^>]*>(?:<i>)?(.)', part)) == {"q"}
    assert part.count("data-at=") == 5 and "It raises <code>" in part
    out = tmp_path / "q.safetensors"
    run(ckpt, f"--show={folder / 'd-1.sae'}", f"--feature={number}", "--strength=3", f"--direction={out}")
    arrays, header = load_arrays(str(out))
    np.testing.assert_allclose(np.array(arrays["direction"]), 3 * np.array(d["decoder"])[number], rtol=1e-6)
    assert header["layer"] == 0  # the stream that enters layer 1 is that after layer 0
    done = conftest.run("steer.py", ckpt, f"--direction={out}", "--prompt=abc", "--max_new_tokens=3")
    assert "after layer 0; norm of the direction 3.00" in done.stdout


def test_removed_feature(trained):
    """The slider's predictions: as it is, they are the model's; at 0, they are those of the states without z d."""
    folder, u, _ = trained
    model, _ = load_checkpoint(str(folder / "ckpt.safetensors"))
    d = sparse.load(str(folder / "d-1.sae"), model)
    ids, number = mx.array(list(b"abq")), int(np.argmax(np.array(d.decoder) @ u))
    p = sae.turned(model, d, number, ids, 256)
    z = encode(d, states(model, ids[None], [d.reads])[d.reads])[..., number, None]

    def without(site, layer, x):
        return x - z * d.decoder[number] if (site, layer) == ("resid", 1) else x

    for i, tap in ((sae.STRENGTHS.index(1), no_tap), (0, without)):
        np.testing.assert_allclose(p[i], np.array(mx.softmax(model(ids[None], tap=tap)[0, -1])), atol=1e-6)
    assert np.abs(p[0] - p[2]).max() > 1e-4


# ---- places ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [*(each for each in FLAVOURS if each.get("mod") != "topk"),
                                      dict(norm_place="after"), dict(parallel=True)], ids=str)
def test_places(settings):
    """In every variant: what a transcoder reads gives what it should write; a dictionary that is exact changes nothing;
    zeros change the logits, but not those of the first token."""
    model = small(4, **settings)
    plain = model(IDX)
    for layer in (0, 3):
        block, found = model.blocks[layer], states(model, IDX, [("mlp_in", layer), ("mlp", layer)])
        y = block.scaled(block.normed("mlp_post_norm", block.mlp(found["mlp_in", layer], no_tap)))
        np.testing.assert_allclose(np.array(y), np.array(found["mlp", layer]), atol=1e-4)
    for site in sparse.SITES:
        if site == "hidden" and model.config.n_expert:
            with pytest.raises(UserError, match="experts"):
                sparse.check_site(model, (site, 1))
            continue
        sparse.check_site(model, (site, 1))
        both = mx.eye(states(model, IDX, [(site, 1)])[site, 1].shape[-1])
        both = mx.concatenate([both, -both])
        d = Dictionary("relu", 0, (site, 1), (site, 1), both, mx.zeros(len(both)), both, mx.zeros(both.shape[1]))
        same, zeros = (model(IDX, tap=replacing(model, [d], zero)) for zero in (False, True))
        tolerance = 1e-4 * mx.abs(plain).max()
        assert mx.abs(same - plain).max() < tolerance < mx.abs(zeros - plain).max()
        if not model.config.diff_attn:
            np.testing.assert_allclose(np.array(zeros[:, 0]), np.array(plain[:, 0]), atol=1e-4)


def test_refused_places():
    routed = small(4, mod="topk", mod_every=1)
    sparse.check_site(routed, ("resid", 4))
    for place, says in ((("mlp", 0), "skip tokens"), (("resid", 5), "layers 0 to 4"), (("mid", 0), "not one of")):
        with pytest.raises(UserError, match=says):
            sparse.check_site(routed, place)


# ---- peers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "jumprelu", "relu", "transcoder"])
def test_sae_lens(kind):
    """sae-lens' classes, with the same weights, have the same features and outputs. Its TopK applies ReLU first, and
    its BatchTopK is saved as JumpReLU."""
    lens, torch = peer("sae_lens"), peer("torch")
    F, C, x = 96, 12, array(50, 12)
    d = Dictionary("jumprelu" if kind == "transcoder" else kind, 6, ("mlp_in", 0), ("mlp", 0), array(F, C), array(F),
                   array(F, C), array(C), {"batchtopk": mx.array(2.5), "topk": None, "relu": None}.get(
                       kind, mx.abs(array(F)) + 1), array(C, C) if kind == "transcoder" else None)
    name = {"topk": "TopKSAE", "relu": "StandardSAE", "transcoder": "JumpReLUSkipTranscoder"}.get(kind, "JumpReLUSAE")
    sizes = dict(d_in=C, d_sae=F, apply_b_dec_to_input=False) | ({"k": 6} if kind == "topk" else {})
    if kind == "transcoder":
        sizes |= {"d_out": C}
    theirs = getattr(lens, name)(getattr(lens, f"{name}Config")(**sizes))
    given = {"W_enc": d.encoder.T, "b_enc": d.encoder_bias, "W_dec": d.decoder, "b_dec": d.decoder_bias}
    if d.threshold is not None:
        given["threshold"] = mx.broadcast_to(d.threshold, (F,))
    if d.skip is not None:
        given["W_skip"] = d.skip
    theirs.load_state_dict({name: torch.tensor(np.array(value)) for name, value in given.items()})
    with torch.no_grad():
        x_there = torch.tensor(np.array(x))
        z, y = theirs.encode(x_there), theirs(x_there)
    np.testing.assert_allclose(np.array(encode(d, x)), z.numpy(), atol=1e-4)
    np.testing.assert_allclose(np.array(decode(d, encode(d, x), x)), y.numpy(), atol=1e-4)
    assert 0 < (z > 0).sum() < F * 50


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, says", [
    (["--kind=gated"], "kind='gated' is not one of"), (["--site=q"], "site='q' is not one of"),
    (["--k=0"], "k, tokens"),
    (["--block_size=2"], "block_size must be 0, or 3"),
    (["--layer=x"], "layer='x': give a number"), (["--layer=9"], "layers 0 to 3"),
    (["--k=99", "--features=64"], "k=99 is more than the 64 features"),
    (["--skip=True"], "only a transcoder"), (["--bandwidth=0.1"], "jumprelu alone"), (["--strength=2"], "in training"),
    (["--show=d-0.sae", "--k=3"], "--k is not used with --show"), (["--out=x.safetensors"], "must end in .sae"),
    (["--show=d-0.sae", "--strength=2"], "--strength is not used with --show"),
    (["--show=d-0.sae", "--feature=99"], "features 0 to 31"), (["--show=none.sae"], "no dictionary at"),
    (["--show=d-0.sae", "--direction=o.safetensors", "--top=3"], "--top is not used with --direction"),
    (["--show=d-0.sae", "--direction=o.safetensors"], "needs one --feature=NUMBER")], ids=str)
def test_refused(trained, arguments, says):
    folder = trained[0]
    arguments = [argument.replace("=d-0", f"={folder}/d-0") for argument in arguments]
    done = run(folder / "ckpt.safetensors", f"--data={folder / 'text.txt'}", *arguments, status=2)
    assert says in done.stderr


def test_other_checkpoint(trained, tmp_path):
    """A dictionary of another checkpoint is refused, and is no checkpoint itself."""
    folder = trained[0]
    model = one_token_model()[0]
    model.norm.weight = model.norm.weight * 2
    other = tmp_path / "other.safetensors"
    save_checkpoint(str(other), model, {"tokenizer": byte_tokenizer().to_dict()})
    done = run(other, f"--data={folder / 'text.txt'}", f"--show={folder / 'd-0.sae'}", status=2)
    assert "made for another checkpoint" in done.stderr
    with pytest.raises(UserError, match="dictionary of sae.py"):
        load_checkpoint(str(folder / "d-0.sae"))
    with pytest.raises(UserError, match="no dictionary of features"):
        sparse.load(str(other), model)


@pytest.mark.parametrize("settings", [dict(), dict(yoco=True, sliding_window=9)], ids=str)
def test_slider(settings):
    """At its own activation a feature leaves the model's prediction, at others it changes it, also in YOCO's second
    half, which computes only the last position where no more is asked for."""
    model, ids = small(4, **settings), IDX[0]
    for place in (("mlp", 3), ("resid", 3), ("attn", 2)):
        C = model.config.n_embd
        d = Dictionary("relu", 0, place, place, array(8, C), mx.full(8, 50.0), array(8, C), mx.zeros(C))
        p = sae.turned(model, d, 2, ids, 64)
        own = np.array(mx.softmax(model(ids[None])[0, -1], axis=-1))
        np.testing.assert_allclose(p[sae.STRENGTHS.index(1)], own, atol=1e-5)
        assert all(np.abs(p[i] - own).max() > 1e-4 for i, factor in enumerate(sae.STRENGTHS) if factor != 1)
