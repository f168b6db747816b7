"""heads.py: planted heads are found at their place; circuits, copying scores and composition against float64 matrices
V x V and C x C; QK against the model's own scores; TransformerLens; the command line."""
import re
from functools import partial

import blas  # noqa: F401  (before mlx)
import conftest
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map
from peers import peer
from test_gptq import FLAVOURS, checkpoint

import heads
import patching
import quantized
from config import UserError
from habits import attention_maps
from model import GPT, GPTConfig, rope_inv_freq, rotary

V, N = 24, 12  # tokens of the planted model, and of a copy


def planted() -> GPT:
    """A model whose head 1 of layer 0 writes the previous token, and whose head 0 of layer 2 looks for the place after
    an earlier copy of the current token, and makes the token that stands there likely. The other heads are noise."""
    config = GPTConfig(block_size=32, vocab_size=V, n_layer=3, n_head=2, n_embd=128, head_dim=64, pos="learned",
                       qk_norm=False, tie=False)
    model, rng = GPT(config, seed=1).eval(), np.random.default_rng(0)
    token, place, before, answer = range(V), range(24, 56), range(56, 80), range(80, 104)
    embed, positions, head = np.zeros((V, 128)), np.zeros((32, 128)), np.zeros((V, 128))
    embed[range(V), token] = 1
    positions[range(32), place] = 3
    head[range(V), answer] = 20
    weights = {(layer, name): rng.normal(0, 0.02, (128, 128)) for layer in range(3) for name in ("q", "k", "v", "out")}

    def plant(layer, h, **entries):
        rows = 64 * h
        for name, (outputs, inputs, size) in entries.items():
            w = weights[layer, name].T if name == "out" else weights[layer, name]
            w[rows:rows + 64] = 0
            w[rows + np.array(outputs), inputs] = size

    plant(0, 1, q=(range(31), place[1:], 1.2), k=(range(32), place, 1.2), v=(range(V), token, 1),
          out=(range(V), before, 1))
    plant(2, 0, q=(range(V), token, 3), k=(range(V), before, 3), v=(range(V), token, 1), out=(range(V), answer, 1))
    for (layer, name), w in weights.items():
        model.blocks[layer].attn[name].weight = mx.array(w.astype(np.float32))
    for block in model.blocks:
        block.mlp.down.weight = mx.zeros_like(block.mlp.down.weight)
    for module, w in (model.embed, embed), (model.pos_embed, positions), (model.head, head):
        module.weight = mx.array(w.astype(np.float32))
    return model


@pytest.fixture(scope="module")
def circuit():
    model = planted()
    texts = heads.repeated(None, V, N, 3, 5)
    return model, texts, heads.scores(model, texts)


def test_planted_heads_have_their_scores(circuit):
    model, texts, found = circuit
    assert texts.shape == (3, 2 * N) and all(len({*text}) == N for text in texts.tolist())
    assert np.array_equal(texts[:, :N], texts[:, N:]) and not np.array_equal(texts[0], texts[1])
    assert heads.induction_pair(found) == ((0, 1), (2, 0))
    for (layer, _, h), told in found.items():
        assert (told["previous"][0] > 0.9) == ((layer, h) == (0, 1))
        assert (told["induction"][0] > 0.9) == ((layer, h) == (2, 0))
        if (layer, h) not in ((0, 1), (2, 0)):  # noise
            assert all(share == pytest.approx(chance, abs=0.04) for share, chance, _ in told.values())
    told, by_hand = found[1, "map", 1]["same token"], []
    for ids in texts:  # row by row
        weights = attention_maps(model, mx.array(ids))[1]["map"][1]
        by_hand += [weights[N + i, i] for i in range(1, N)]  # key 0 is the start, and no copy
    assert told[0] == pytest.approx(np.mean(by_hand), rel=1e-5) and told[2] == 3 * (N - 1)
    assert told[1] == pytest.approx(np.mean([1 / (N + i + 1) for i in range(1, N)]))


def test_pair():
    """The previous-token head is in a layer below the induction head; a share that is not far above chance is none."""
    def told(previous, induction):
        return {"previous": (previous, 0.05, 9), "induction": (induction, 0.02, 9)}

    found = {(0, "map", 0): told(0.5, 0), (0, "map", 1): told(0.3, 0.05), (1, "map", 0): told(0.9, 0.7),
             (1, "map", 1): told(0, 0.8)}
    assert heads.induction_pair(found) == ((0, 0), (1, 1)) and heads.best(found, "previous") == (1, 0)
    few = {place: told(each["previous"][0], 0.05) for place, each in found.items()}
    assert heads.induction_pair(few) == ((1, 0), None)


def test_planted_heads_have_their_circuits(circuit):
    model, *_ = circuit
    scores = [heads.copying(model, layer) for layer in range(3)]
    assert scores[2][0] == pytest.approx(1) and scores[0][1] == 0 and max(map(abs, (*scores[1], scores[2][1]))) < 0.9
    assert not heads.own_rank(model, 2, 0, np.arange(V), V).any()
    assert heads.own_rank(model, 1, 0, np.arange(V), V).mean() > 5
    found = heads.composition(model, 2, 0)
    assert found["K"].shape == (2, 2) and np.unravel_index(found["K"].argmax(), (2, 2)) == (0, 1)
    assert found["K"][0, 1] == pytest.approx(V ** -0.5, rel=1e-3)  # the product of identities in V dimensions
    chance = 128 ** -0.5
    for name, values in found.items():
        rest = np.delete(values.flatten(), 1) if name == "K" else values[1]
        np.testing.assert_allclose(rest, chance, rtol=0.25)
    assert found["Q"][0, 1] == found["V"][0, 1] == pytest.approx(0, abs=1e-6)


def test_planted_heads_are_missed(circuit):
    """The losses are those of patching.ablate, and rise without either head of the pair, and without no other."""
    model, texts, _ = circuit
    whole, without = heads.losses(model, texts, N)
    assert whole < 0.5 and float(heads.copy_loss(model, mx.array(texts), N, copy=1)) > 2
    planted = np.array([[False, True], [False, False], [True, False]])
    assert (without[planted] > 2).all() and (np.abs(without - whole)[~planted] < 0.5).all()
    for place in np.ndindex(3, 2):
        logits = patching.ablate(model, mx.array(texts), "head", place[0], "zero", place[1])
        p = np.array(mx.softmax(logits, axis=-1), np.float64)
        expected = -np.mean([np.log(p[b, i, texts[b, i + 1]]) for b in range(3) for i in range(N, 2 * N - 1)])
        assert without[place] == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert float(heads.copy_loss(model, mx.array(texts), N, [place])) == pytest.approx(expected, rel=1e-4, abs=1e-5)


# ---- circuits, in float64 --------------------------------------------------------------------------------------------


CIRCUITS = [dict(), dict(n_kv_head=1, bias=True, norm="layer", tie=False, pos="learned", qk_norm=False, mlp="gelu"),
            dict(n_expert=3, mlp="swiglu"), FLAVOURS[8], FLAVOURS[9] | dict(tie=True, head_bias=False), FLAVOURS[9],
            dict(sliding_window=9, alibi=True, n_kv_head=2, n_head=4, head_dim=16), dict(packed=True),
            dict(factored=True, embed_scale=3.0, softcap=5.0)]


def made(settings: dict) -> GPT:
    settings = dict(settings)
    packed, factored = settings.pop("packed", False), settings.pop("factored", False)
    sizes = dict(block_size=32, vocab_size=48, n_head=2, n_embd=64, n_layer=2)
    model = GPT(GPTConfig(**sizes | settings), seed=1).eval()
    rng = np.random.default_rng(2)

    def drawn(x):
        return mx.array((rng.normal(0, 0.3, x.shape) + (x.ndim == 1)).astype(np.float32))

    model.update(tree_map(drawn, model.parameters()))
    if packed:
        nn.quantize(model, 32, 4)
    if factored:
        for block in model.blocks:
            for name in ("q", "v", "out"):
                block.attn[name] = quantized.Factored(block.attn[name], 5)
                block.attn[name].update(tree_map(drawn, block.attn[name].parameters()))
    return model


def dense(layer) -> np.ndarray:
    """(out, in), float64."""
    if isinstance(layer, quantized.Factored):
        return dense(layer.u) @ dense(layer.v)
    return np.array(quantized.dense_weight(layer), np.float64)


def norm64(norm, x, divide=True):
    x = x - x.mean(-1, keepdims=True) if isinstance(norm, nn.LayerNorm) else x
    size = np.sqrt((x ** 2).mean(-1, keepdims=True) + norm.eps) if divide else 1
    return x / size * np.array(norm.weight, np.float64)


def whole_ov(model: GPT, layer: int, h: int) -> np.ndarray:
    """The OV circuit, V x V."""
    config, block = model.config, model.blocks[layer]
    D, share = config.head_dim, config.n_head // config.n_kv_head
    x = dense(model.embed) * config.embed_scale
    if "attn_norm" in block:
        x = norm64(block.attn_norm, x)
    v, out = dense(block.attn.v)[D * (h // share):][:D], dense(block.attn.out)[:, D * h:D * (h + 1)]
    y = x @ v.T @ out.T * config.residual_scale
    if "attn_post_norm" in block:
        y = norm64(block.attn_post_norm, y, divide=False)
    unembed = dense(model.embed if config.tie else model.head)
    return norm64(model.norm, y, divide=False) @ unembed.T * config.logit_scale


@pytest.mark.parametrize("settings", CIRCUITS, ids=str)
def test_ov(settings):
    model = made(settings)
    for layer in range(2):
        a, b = heads.ov(model, layer)
        scores = heads.copying(model, layer)
        for h in range(model.config.n_head):
            whole = whole_ov(model, layer, h)
            np.testing.assert_allclose(np.array(a[h] @ b[h]), whole, atol=2e-4 * np.abs(whole).max())
            eigenvalues = np.linalg.eigvals(whole)
            assert scores[h] == pytest.approx(eigenvalues.sum().real / np.abs(eigenvalues).sum(), abs=1e-3)
            rank = (whole[:, :40] > np.diag(whole)[:, None])[3:40].sum(1)  # as with 8 ids that are padding
            assert (heads.own_rank(model, layer, h, np.arange(3, 40), 40) == rank).mean() > 0.9


@pytest.mark.parametrize("settings", CIRCUITS, ids=str)
def test_qk(settings):
    """In layer 0, the QK circuit is the model's own scores, at any distance, without ALiBi's bias."""
    if settings.get("pos") == "learned":
        settings = settings | dict(pos="none")
    model, config = made(settings), made(settings).config
    for distance in (0, 1, 7):
        ids, states = [5, *[9] * (distance - 1), 31][-distance - 1:], {}
        model(mx.array([ids]), tap=lambda site, layer, x, states=states: states.setdefault((site, layer), x))
        for h in range(config.n_head):
            q, k = (np.array(states[name, 0], np.float64)[0] for name in "qk")
            score = q[h, -1] @ k[h * config.n_kv_head // config.n_head, 0]
            score *= config.attn_scale or config.head_dim ** -0.5
            if config.attn_softcap:
                score = config.attn_softcap * np.tanh(score / config.attn_softcap)
            found = heads.qk(model, 0, h, mx.array([2, 31]), distance)
            assert found.shape == (2, 48) and float(found[1, ids[0]]) == pytest.approx(score, rel=1e-3, abs=1e-3)


def turn(config, at: int) -> np.ndarray:
    """The matrix (D, D) by which a row is multiplied that stands at a position."""
    found, half = np.eye(config.head_dim), (config.rotary_dim or config.head_dim) // 2
    for i, angle in enumerate(at * rope_inv_freq(config)):
        j = i + half
        found[i, i] = found[j, j] = np.cos(angle)
        found[i, j], found[j, i] = np.sin(angle), -np.sin(angle)
    return found


@pytest.mark.parametrize("settings", [each for each in CIRCUITS if "window_theta" not in each], ids=str)
def test_composition(settings):
    """Products of whole matrices, C x C."""
    model = made(settings)
    config, (below, block) = model.config, model.blocks
    D, share = config.head_dim, config.n_head // config.n_kv_head
    centre = np.eye(64) - (config.norm == "layer") / 64

    def read(block, name, h):
        w = dense(block.attn[name])[D * h:D * (h + 1)].T
        if config.qk_norm and name != "v":
            weight = np.array(block.attn[f"{name}_norm"].weight, np.float64)
            w = w * (weight[D * h:D * (h + 1)] if config.qk_norm_width else weight)
        return centre @ (np.array(block.attn_norm.weight)[:, None] * w) if "attn_norm" in block else w

    def written(block, h):
        out = dense(block.attn.out)[:, D * h:D * (h + 1)].T * config.residual_scale
        if "attn_post_norm" in block:
            out = norm64(block.attn_post_norm, out, divide=False)
        return read(block, "v", h // share) @ (out @ centre)

    for distance in (0, 3):
        turned = turn(config, distance) if rotary(config, 1) else np.eye(D)
        found = heads.composition(model, 1, 1, distance)
        qk = read(block, "q", 1) @ turned @ read(block, "k", 1 // share).T
        for h in range(config.n_head):
            ov = written(below, h)
            for name, after in ("Q", qk), ("K", qk.T), ("V", written(block, 1)):
                expected = np.linalg.norm(ov @ after) / (np.linalg.norm(ov) * np.linalg.norm(after))
                assert found[name][0, h] == pytest.approx(expected, rel=1e-3), (name, h)


@pytest.mark.parametrize("settings, name", [(dict(diff_attn=True), "diff_attn"), (dict(yoco=True), "yoco"),
                                            (dict(mod="topk"), "mod"), (dict(value_residual=True), "value_residual"),
                                            (dict(value_embeds=True), "value_embeds")])
def test_refused(settings, name):
    """Circuits refuse by name the variants that they were not written for; scores and losses work with all."""
    model = GPT(GPTConfig(block_size=32, vocab_size=48, n_head=2, n_embd=64, n_layer=2, **settings), seed=1).eval()
    for call in (lambda: heads.copying(model, 1), lambda: heads.qk(model, 1, 0, mx.array([1])),
                 lambda: heads.composition(model, 1, 0)):
        with pytest.raises(UserError, match=f"does not know {name}="):
            call()
    texts = heads.repeated(None, 48, 6, 2, 0)
    assert heads.scores(model, texts)
    whole, without = heads.losses(model, texts, 6)
    ablated = patching.ablate(model, mx.array(texts), "head", 0, "zero", 0)
    p = np.array(mx.softmax(ablated, axis=-1))
    expected = -np.mean([np.log(p[b, i, texts[b, i + 1]]) for b in range(2) for i in range(6, 11)])
    assert without[0, 0] == pytest.approx(expected, rel=1e-4) and np.isfinite(whole)


# ---- beside TransformerLens ------------------------------------------------------------------------------------------


def test_head_detector(circuit):
    """TransformerLens divides by all rows, and so by the number of those where the habit is possible here."""
    torch, detector = peer("torch"), peer("transformer_lens.head_detector")
    model, texts, found = circuit
    patterns = {"previous": detector.get_previous_token_head_detection_pattern,
                "induction": detector.get_induction_head_detection_pattern,
                "same token": detector.get_duplicate_token_head_detection_pattern}
    for habit, pattern in patterns.items():
        theirs = np.zeros((3, 2))
        for ids in texts:
            wanted = pattern(torch.tensor(ids[None]))
            wanted[:, 0] = 0  # ours leaves out key 0, the start
            for layer, named in enumerate(attention_maps(model, mx.array(ids))):
                theirs[layer] += [detector.compute_head_attention_similarity_score(
                    torch.tensor(each), wanted, exclude_bos=False, exclude_current_token=False,
                    error_measure="mul") for each in named["map"]]
        for layer, h in np.ndindex(3, 2):
            share, _, rows = found[layer, "map", h][habit]
            assert share * rows / (3 * 2 * N) == pytest.approx(theirs[layer, h] / 3, abs=1e-5)


def test_factored_matrices():
    """Eigenvalues and composition scores by TransformerLens' FactoredMatrix."""
    torch, lens = peer("torch"), peer("transformer_lens")
    compose = peer("transformer_lens.utilities.matrix").composition_scores
    model = made(dict(n_kv_head=1, qk_norm=False, pos="none"))

    def theirs(a, b):
        return lens.FactoredMatrix(torch.tensor(np.array(a, np.float64)), torch.tensor(np.array(b, np.float64)))

    eigenvalues = theirs(*heads.ov(model, 1)).eigenvalues
    scores = (eigenvalues.sum(-1).real / eigenvalues.abs().sum(-1)).numpy()
    np.testing.assert_allclose(heads.copying(model, 1), scores, atol=1e-4)
    before = theirs(*heads.values_outputs(model, 0))
    q, k = heads.queries_keys(model, 1)
    v, out = heads.values_outputs(model, 1)
    found = [heads.composition(model, 1, h) for h in range(2)]
    for name, after in ("Q", theirs(q, k.swapaxes(1, 2))), ("K", theirs(k, q.swapaxes(1, 2))), ("V", theirs(v, out)):
        expected = compose(before, after).numpy()  # (heads before, heads after)
        np.testing.assert_allclose(np.stack([each[name][0] for each in found], 1), expected, rtol=1e-4)


# ---- command line ----------------------------------------------------------------------------------------------------


run = partial(conftest.run_here, "heads.py")


@pytest.mark.parametrize("settings", [dict(), dict(diff_attn=True)], ids=str)
def test_scores_script(settings, tmp_path, capsys):
    path, model = checkpoint(tmp_path, **settings)
    run(path, "--length=10", "--draws=2", "--confirm=True", f"--save={tmp_path / 'h.npz'}")
    out = capsys.readouterr().out
    texts = heads.repeated(conftest_enc(), 320, 10, 2, 1337)
    assert texts.shape == (2, 21) and (texts[:, 0] == 256).all() and texts[:, 1:].max() < 256
    found = heads.scores(model.eval(), texts)
    which = "first" if settings else "map"
    line = re.search(rf"^ +1\.0{'a' * bool(settings)}" + r" +([\d.]+)%[* ]" * 5, out, re.M)
    expected = [100 * share for share, *_ in found[1, which, 0].values()]
    np.testing.assert_allclose([float(part) for part in line.groups()], expected, atol=0.06)
    assert ("no copying scores" in out) == bool(settings)
    with np.load(tmp_path / "h.npz") as held:
        whole, without = heads.losses(model, texts, 10)
        np.testing.assert_allclose(held["without"], without, rtol=1e-5)
        assert held["loss"] == pytest.approx(whole, rel=1e-5)
        if not settings:
            copying = heads.copying(model, 1, heads.through_tokens(model, 257))
            np.testing.assert_allclose(held["copying"][1], copying, atol=1e-5)
    assert f"{whole:.3f}" in out and (tmp_path / "ckpt-heads.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "ckpt-heads.html").read_text()
    assert "http" not in page and page.count("<h2>") == (6 if settings else 7)


def conftest_enc():
    from tokenizer import byte_tokenizer
    return byte_tokenizer()


def test_circuits_script(tmp_path, capsys):
    path, model = checkpoint(tmp_path)
    run(path, "--head=1.1", "--prompt=ab", "--top=3", "--distance=4", f"--save={tmp_path / 'h.npz'}")
    out, enc = capsys.readouterr().out, conftest_enc()
    a, b = heads.ov(model.eval(), 1, mx.array([97]))
    raised = np.argsort(-np.array(a[1] @ b[1])[0, :enc.n_vocab])[:3]
    attended = np.argsort(-np.array(heads.qk(model, 1, 1, mx.array([97]), 4))[0, :enc.n_vocab])[:3]
    with np.load(tmp_path / "h.npz") as held:
        assert held["tokens"].tolist() == [97, 98]
        assert np.array_equal(held["raised"][0], raised) and np.array_equal(held["attended"][0], attended)
        np.testing.assert_allclose(held["K-composition"], heads.composition(model, 1, 1, 4)["K"])
    score = heads.copying(model, 1, heads.through_tokens(model, enc.n_vocab))[1]
    assert "4 positions back" in out and f"copying score {score:+.3f}" in out
    assert (tmp_path / "ckpt-head-1.1.png").exists() and (tmp_path / "ckpt-head-1.1.html").exists()
    run(path, "--head=0.0")  # no earlier heads, and tokens drawn at random
    assert "composition" not in capsys.readouterr().out


@pytest.mark.parametrize("arguments, told", [
    (["--head=2.0"], "from 0.0 to 1.1"), (["--head=1"], "write layer and head"), (["--draws=0"], "1 or more"),
    (["--length=16"], "give a smaller one"), (["--length=1"], "it must be 2 to 256"), (["--top=3"], "give --head too"),
    (["--head=1.0", "--draws=3"], "leave it"), (["--save=x.txt"], "end in .npz"), (["--picture=x.jpg"], "in .png")])
def test_bad_input(arguments, told, tmp_path):
    path, _ = checkpoint(tmp_path)
    with pytest.raises(UserError, match=told):
        run(path, *arguments)


def test_docstring(tmp_path):
    _, model = checkpoint(tmp_path)
    names = conftest.docstring_use(heads, tmp_path)
    assert names["score"].shape == (1, 2) and heads.copying(model.eval(), 1).shape == (2,)


def test_copying_of_tokens_alone():
    """Rows of the embedding without a token, which fill the vocabulary up, count for nothing."""
    model, n = made(dict(tie=False)), 40
    through = np.array(heads.through_tokens(model, n), np.float64)
    logits = np.array(heads.logits_of(model, mx.eye(model.config.n_embd)), np.float64)
    entering = np.array(heads.divided(model, mx.arange(n)), np.float64)
    np.testing.assert_allclose(through, logits[:, :n] @ entering, atol=1e-3)
    eigenvalues = np.linalg.eigvals(whole_ov(model, 1, 0)[:n, :n])
    score = heads.copying(model, 1, mx.array(through.astype(np.float32)))[0]
    assert score == pytest.approx(eigenvalues.sum().real / np.abs(eigenvalues).sum(), abs=1e-3)
    assert abs(score - heads.copying(model, 1)[0]) > 1e-3
