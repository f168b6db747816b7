"""attribution.py: estimates against finite differences and real patches in every variant; shares of an answer against
numpy in float64; models with known circuits; the command line; bad input."""
import json
import re
from functools import partial

import blas  # noqa: F401  (before mlx)
import conftest
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from test_gptq import FLAVOURS, checkpoint
from test_patching import DONOR, RECIPIENT, copying, in_place, small

import attribution
from attribution import attribute, direct, patch_cells
from config import UserError
from inside import SITES, record
from model import GPT, GPTConfig, save_checkpoint
from tokenizer import byte_tokenizer

run = partial(conftest.run, "attribution.py")
MORE = [*FLAVOURS, dict(mod="topk", mod_every=1),
        dict(mod="soft", mod_every=1, norm_place="both", norm="layer", bias=True),
        dict(sink_logits=True, n_expert=3, n_shared_expert=1, softcap=3.0, logit_scale=3.0),
        dict(value_residual=True, value_embeds=True, yoco=True, residual_scale=0.3),
        dict(diff_attn=True, mod="topk", norm_place="after", bias=True, norm="layer", pos="learned")]


def answer(logits):
    return logits[..., 3] - logits[..., 5]


def shaken(**settings):
    """A model none of whose norms, biases and gates has the value of its start."""
    model, rng = small(4, **settings), np.random.default_rng(1)
    model.update(tree_unflatten([
        (name, p if name.endswith("threshold") else p + mx.array(0.1 * rng.standard_normal(p.shape).astype(np.float32)))
        for name, p in tree_flatten(model.parameters())]))
    return model


def sites_of(model) -> list[str]:
    """The sites that this model has."""
    without = {"mid"} if model.config.parallel else set()
    if model.config.n_expert:
        without.add("hidden")
    return [site for site in SITES if site not in without]


def of_cell(site: str, unit: int, position: int) -> tuple:
    """The index of a cell in states (1, ...)."""
    return {"hidden": (0, position, unit), **dict.fromkeys(("heads", "q", "k", "v"), (0, unit, position))}.get(
        site, (0, position))


def put(model, idx, site: str, layer: int, unit: int, position: int, states: list) -> np.ndarray:
    """The answers after tokens (T,), where each of some states takes the place of one, by whole forward passes."""
    stream = None

    def tap(name, at, x):
        nonlocal stream
        if name == "resid":
            stream = x[0]
        if (name, at) == (site, layer):
            rows = range(12) if site == "resid" else in_place(model, layer, stream, mx.zeros((x.shape[-2], 1)))[0]
            x, cell = mx.array(x), of_cell(site, unit, int(rows[position]))[1:]
            x[(slice(None), *cell)] = mx.stack(states)
        return x

    return np.array(answer(model(mx.broadcast_to(idx, (len(states), len(idx))), tap=tap)[:, -1]))


# ---- estimates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", MORE, ids=str)
def test_derivatives(settings):
    """Each estimate is the derivative along the change of the state, by finite differences; each real effect is that of
    a pass of its own; a prompt beside itself has none."""
    model, rng, step = shaken(**settings), np.random.default_rng(2), 0.004  # small: experts change
    sites = sites_of(model)
    found = attribute(model, DONOR, RECIPIENT, answer, sites)
    donor, own = record(model, DONOR[None], sites), record(model, RECIPIENT[None], sites)
    before = float(answer(model(RECIPIENT[None])[0, -1]))
    for site in sites:
        layers = [layer for name, layer in found if name == site]
        assert len(layers) == (4 if site not in "kv" or not settings.get("yoco") else 3)
        layer = int(rng.choice(layers))
        units, T = found[site, layer].shape
        assert T == 12
        cells = np.stack([np.full(2, layer), rng.integers(0, units, 2), [11, rng.integers(0, 11)]], 1)
        real = patch_cells(model, DONOR, RECIPIENT, answer, site, cells, batch_size=1)
        for (_, unit, position), effect in zip(cells.tolist(), real, strict=True):
            cell = of_cell(site, unit, position)
            old, new = own[site, layer][cell], donor[site, layer][cell]
            low, high, alone = put(model, RECIPIENT, site, layer, unit, position,
                                   [old - step * (new - old), old + step * (new - old), new])
            estimate = float(found[site, layer][unit, position])
            assert estimate == pytest.approx((high - low) / (2 * step), rel=0.01, abs=1e-3), site
            assert effect == pytest.approx(alone - before, abs=1e-4), site
    assert not any(x.any() for x in attribute(model, DONOR, DONOR, answer, sites).values())


@pytest.mark.parametrize("settings", [dict(), dict(diff_attn=True, value_residual=True),
                                      dict(yoco=True, norm_place="both")], ids=str)
@pytest.mark.parametrize("site", ["resid", "v", "hidden"])
def test_integrated(settings, site):
    """The effects in a layer sum to the effect of all of them together, the nearer the more steps; and at the
    embedding, without settings that look up tokens elsewhere, to the difference of the answers, on both lines."""
    model = shaken(**settings)
    together = {}
    for steps in (2, 40):
        found = attribute(model, DONOR, RECIPIENT, answer, [site], steps, batch_size=16)
        layers = [layer for _, layer in found]
        real = patch_cells(model, DONOR, RECIPIENT, answer, site, np.array([(layer, -1, -1) for layer in layers]))
        together[steps] = np.abs([float(found[site, layer].sum()) - real[n] for n, layer in enumerate(layers)])
    assert together[40].max() < 0.004 and together[40].max() < max(0.5 * together[2].max(), 1e-3)
    if site == "resid" and not settings:
        ends = [float(answer(model(idx[None])[0, -1])) for idx in (DONOR, RECIPIENT)]
        for line in ("states", "embeddings"):
            at_embedding = attribute(model, DONOR, RECIPIENT, answer, ["resid"], 40, line)["resid", 0]
            assert float(at_embedding.sum()) == pytest.approx(ends[0] - ends[1], abs=0.004)
        assert real[0] == pytest.approx(ends[0] - ends[1], abs=1e-4)


class Identity(nn.Module):
    def __call__(self, x):
        return x


@pytest.mark.parametrize("settings", [dict(), dict(parallel=True, norm="layer", bias=True)], ids=str)
def test_a_linear_path(settings):
    """Where the answer is linear in a state, the estimate is the real effect: in the last layer, without the last norm.
    A share of the answer is then what its part's removal takes away."""
    model = shaken(**settings)
    model.norm, model.compute_dtype = Identity(), mx.float32
    for site in ("mlp", "attn", "heads", "hidden", "resid")[:4 if settings else 1]:
        cells = np.array([(3, unit, 11) for unit in (0, 1)[:1 + (site in ("heads", "hidden"))]])
        real = patch_cells(model, DONOR, RECIPIENT, answer, site, cells)
        for steps in (0, 3):
            found = attribute(model, DONOR, RECIPIENT, answer, [site], steps)[site, 3]
            np.testing.assert_allclose([float(found[unit, 11]) for _, unit, _ in cells.tolist()], real, atol=1e-5)
        assert np.abs(real).max() > 1e-3


def test_pairs():
    """Positions of prompts of different lengths; at the others the estimate is 0."""
    model, long = shaken(), mx.concatenate([DONOR[:2], DONOR])  # longer by two tokens
    pairs = [(13, 11), (4, 9)]
    donor, own = (record(model, idx[None], ["v"])["v", 2] for idx in (long, RECIPIENT))
    for steps, line in ((0, "states"), (3, "states"), (3, "embeddings")):
        found = np.array(attribute(model, long, RECIPIENT, answer, ["v"], steps, line, pairs)["v", 2])
        assert found[:, [9, 11]].all() and not np.delete(found, [9, 11], axis=1).any()
    real = patch_cells(model, long, RECIPIENT, answer, "v", np.array([(2, 1, 9), (2, 0, 11)]), pairs)
    before = answer(model(RECIPIENT[None])[0, -1])
    for effect, (unit, i, j) in zip(real, ((1, 4, 9), (0, 13, 11)), strict=True):
        assert effect == pytest.approx(float(put(model, RECIPIENT, "v", 2, unit, j, [donor[0, unit, i]])[0] - before),
                                       abs=1e-4)
    found = np.array(attribute(model, long, RECIPIENT, answer, ["v"], 0, "states", pairs)["v", 2])
    low, high = put(model, RECIPIENT, "v", 2, 1, 9, [own[0, 1, 9] + by * (donor[0, 1, 4] - own[0, 1, 9])
                                                     for by in (-0.01, 0.01)])
    assert found[1, 9] == pytest.approx((high - low) / 0.02, abs=2e-4) and abs(found[1, 9]) > 0.002
    with pytest.raises(UserError, match="pair 14:0: the prompts have positions 0 to 13 and 0 to 11"):
        attribute(model, long, RECIPIENT, answer, ["v"], pairs=[(14, 0)])


def test_bad_sites():
    for settings, site in ((dict(parallel=True), "mid"), (dict(n_expert=3), "hidden")):
        with pytest.raises(UserError, match=f"site={site}:"):
            attribute(small(**settings), DONOR, RECIPIENT, answer, ["attn", site])
    with pytest.raises(UserError, match="the prompts have 7 and 12 tokens"):
        attribute(small(), DONOR[:7], RECIPIENT, answer)


# ---- shares of an answer ---------------------------------------------------------------------------------------------


def total_of(shares) -> float:
    return float(shares.embedding + shares.positions + shares.layers.sum() + shares.last)


def logits_before_the_cap(model, idx) -> np.ndarray:
    logits = np.array(model(idx[None])[0, -1], np.float64)
    return np.arctanh(logits / model.config.softcap) * model.config.softcap if model.config.softcap else logits


@pytest.mark.parametrize("settings", MORE, ids=str)
def test_shares_sum_to_the_answer(settings):
    model = shaken(**settings)
    for measure in (answer, lambda logits: logits[..., 7] - logits[..., :50].mean(-1)):
        for length in (12, 7):
            shares = direct(model, DONOR[:length], measure)
            expected = measure(logits_before_the_cap(model, DONOR[:length]))
            assert total_of(shares) == pytest.approx(expected, abs=1e-4) == shares.total
            np.testing.assert_allclose(shares.layers, shares.heads.sum(1) + shares.bias + shares.mlp, atol=1e-5)
            assert np.abs(shares.layers).max() > 0.01 or length == 7  # with mod=topk every block skips this token
    assert bool(shares.positions) == (settings.get("pos") == "learned")


def centred(x):
    return x - x.mean(-1, keepdims=True)


@pytest.mark.parametrize("settings", [
    dict(), dict(tie=False, bias=True, norm="layer", mlp="gelu", pos="learned"),
    dict(mlp="geglu", norm_place="both", n_kv_head=1, embed_scale=8.0, softcap=5.0),
    dict(norm="layer", norm_bias=True, norm_place="after", parallel=True, tie=False, out_bias=True, head_bias=True,
         residual_scale=0.5, logit_scale=0.5)], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_shares(settings, packed):
    """Each share, frozen or not, against numpy in float64, from the heads' outputs and the weights."""
    model = shaken(**settings)
    if packed:
        nn.quantize(model, 32, 8)
    config, states = model.config, record(model, DONOR[None], ["heads", "mlp"])
    last = {place: np.array(x[0, ..., -1, :], np.float64) for place, x in states.items()}

    def weight(module):
        found = module.weight if not packed else mx.dequantize(module.weight, module.scales, module.biases, 32, 8)
        return np.array(found, np.float64)

    def norm(module, part, x, with_bias=False):
        if config.norm == "layer":
            part, x = centred(part), centred(x)
        y = part * np.array(module.weight, np.float64) / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5)
        return y + np.array(module.bias, np.float64) if with_bias and "bias" in module else y

    place = weight(model.pos_embed)[11] if config.pos == "learned" else np.zeros(64)
    parts = {"positions": place, "embedding": weight(model.embed)[int(DONOR[11])] * config.embed_scale}
    for layer, block in enumerate(model.blocks):
        W, z = weight(block.attn.out), last["heads", layer]
        heads = [W[:, 32 * h:32 * h + 32] @ z[h] for h in (0, 1)]
        bias = np.array(block.attn.out.bias, np.float64) if "bias" in block.attn.out else np.zeros(64)
        if config.norm_place != "before":
            whole, post = heads[0] + heads[1] + bias, block.attn_post_norm
            *heads, bias = *(norm(post, x, whole) for x in heads), norm(post, bias, whole, with_bias=True)
        parts |= {("heads", layer, h): heads[h] * config.residual_scale for h in (0, 1)}
        parts |= {("bias", layer): bias * config.residual_scale, ("mlp", layer): last["mlp", layer]}
    stream = sum(parts.values())
    np.testing.assert_allclose(stream, last["resid", 4], atol=1e-4)
    rows = weight(model.embed if config.tie else model.head)
    direction = (rows[3] - rows[5]) * config.logit_scale
    for frozen in (True, False):
        shares = direct(model, DONOR, answer, frozen)
        for name, part in parts.items():
            own = (norm(model.norm, part, stream) if frozen else
                   norm(model.norm, stream, stream) - norm(model.norm, stream - part, stream - part)) @ direction
            field, *cell = (name,) if isinstance(name, str) else name
            assert getattr(shares, field)[tuple(cell)] == pytest.approx(own, abs=1e-4), (name, frozen)
    if not config.parallel and not packed:  # the last MLP has no other path to the answer
        gone = model(DONOR[None], tap=lambda name, at, x: x * 0 if (name, at) == ("mlp", 3) else x)[0, -1]
        if not config.softcap:
            assert shares.mlp[3] == pytest.approx(float(answer(model(DONOR[None])[0, -1]) - answer(gone)), abs=1e-4)


# ---- known circuits --------------------------------------------------------------------------------------------------


def test_a_copying_head():
    """It copies the token at position 2 to the last position, in layer 1."""
    model, donor, recipient = copying(), mx.array([1, 2, 3, 4, 5, 6]), mx.array([1, 2, 9, 4, 5, 6])
    measure = lambda logits: logits[..., 3] - logits[..., 9]  # noqa: E731
    whole = float(measure(model(donor[None])[0, -1]) - measure(model(recipient[None])[0, -1]))
    for steps in (0, 5):
        found = attribute(model, donor, recipient, measure, sites_of(model), steps)
        for site, layer, position in (("heads", 1, 5), ("attn", 1, 5), ("v", 1, 2), ("resid", 0, 2), ("resid", 1, 2),
                                      ("resid", 2, 5), ("mid", 0, 2), ("mid", 1, 5)):
            expected = np.zeros(6)
            expected[position] = 1
            np.testing.assert_allclose(np.array(found[site, layer][0]) / whole, expected, atol=0.05 if steps else 0.25)
        for layer in (0, 2):
            for site in ("heads", "v", "mlp"):
                np.testing.assert_allclose(found[site, layer], 0, atol=1e-4)
    shares = direct(model, donor, measure)
    assert shares.heads[1, 0] == pytest.approx(shares.total, rel=1e-4)
    assert np.abs(shares.heads[[0, 2]]).max() < 1e-4 and np.abs(shares.mlp).max() < 1e-4 and shares.embedding < 1e-4


def induction(sharp: float):
    """A model that continues the last token as it was continued before: in layer 0, head 1 copies to each position the
    token before it; in layer 1, head 0 attends to where that token is the last one, and copies the token there. sharp:
    factor of its queries and keys."""
    config = GPTConfig(block_size=12, vocab_size=16, n_layer=2, n_head=2, n_embd=64, pos="learned", qk_norm=False,
                       tie=False)
    model = GPT(config, seed=1).eval()
    embed, place, head = np.zeros((16, 64)), np.zeros((12, 64)), np.zeros((16, 64))
    embed[np.arange(16), np.arange(16)] = 1           # dimensions 0 ... 15: the token
    place[np.arange(12), 16 + np.arange(12)] = 1      # 16 ... 27: the position
    head[np.arange(16), 44 + np.arange(16)] = 1       # 44 ... 59: the answer; 28 ... 43: the token before
    for block, (own, q_from, k_from, out_to, scale) in zip(model.blocks, [
            (1, 16 + np.arange(1, 12), 16 + np.arange(11), 28, 3), (0, np.arange(16), 28 + np.arange(16), 44, sharp)],
            strict=True):
        q, k, v, out = (np.zeros((64, 64)) for _ in range(4))
        rows = 32 * own + np.arange(len(q_from))
        q[rows, q_from] = k[rows, k_from] = scale
        v[32 * own + np.arange(16), np.arange(16)] = out[out_to + np.arange(16), 32 * own + np.arange(16)] = 1
        for name, x in dict(q=q, k=k, v=v, out=out).items():
            block.attn[name].weight = mx.array(x.astype(np.float32))
        block.attn.out.weight = 0.2 * block.attn.out.weight  # as large as token and position, after the norm
        block.mlp.down.weight = mx.zeros(block.mlp.down.weight.shape)
    for part, x in ((model.embed, embed), (model.pos_embed, place), (model.head, head)):
        part.weight = mx.array(x.astype(np.float32))
    return model


@pytest.mark.parametrize("sharp", [0.7, 1])
def test_two_heads_of_induction(sharp):
    """The corrupted prompt exchanges the tokens before the two answers: what it changes is found at both heads, at the
    positions where they act, and nowhere else. Sharp attention to the wrong answer is saturated: one derivative does
    not see that patching position 5 changes anything, and integrated gradients do."""
    model, clean, corrupt = induction(sharp), mx.array([7, 1, 2, 8, 3, 4, 9, 1]), mx.array([7, 3, 2, 8, 1, 4, 9, 1])
    logits = [model(idx[None])[0, -1] for idx in (clean, corrupt)]
    assert [int(each.argmax()) for each in logits] == [2, 4]
    measure = lambda logits: logits[..., 2] - logits[..., 4]  # noqa: E731
    whole = float(measure(logits[0]) - measure(logits[1]))
    places = {("heads", 1): [(0, 7)], ("heads", 0): [(1, 2), (1, 5)], ("k", 1): [(0, 2), (0, 5)],
              ("v", 0): [(1, 1), (1, 4)], ("resid", 0): [(0, 1), (0, 4)], ("resid", 1): [(0, 2), (0, 5)]}
    for steps, line in ((0, "states"), (5, "states"), (5, "embeddings")):
        found = attribute(model, clean, corrupt, measure, sites_of(model), steps, line)
        for at, cells in places.items():
            effects = np.array(found[at]) / whole
            inside = np.array([effects[cell] for cell in cells])
            outside = effects.copy()
            outside[tuple(np.array(cells).T)] = 0
            if steps == 0 and sharp == 1:
                assert at[0] in ("heads", "k") and at[1] == 1 or inside[0] > 0.05 and -0.03 < inside[1] < 0
            else:
                assert (inside > 0.08).all() and np.abs(outside).max() < 0.01, (steps, line, at, effects)
            if (steps, line) == (5, "states"):
                np.testing.assert_allclose(inside, 1 / len(cells), atol=0.01)
    shares = direct(model, clean, measure)
    assert shares.heads[1, 0] == pytest.approx(shares.total, rel=1e-4)
    assert np.abs(shares.heads).sum() < 1.001 * shares.total


# ---- the script ------------------------------------------------------------------------------------------------------

CLEAN, CORRUPT, TARGET, FOIL = "--clean=the cat sat", "--corrupt=the dog sat", "--target= ", "--foil=x"
ROWS = [dict(clean=f"the {a} sat", corrupt=f"the {b} sat", target=t, foil="x") for a, b, t in
        (("cat", "dog", " "), ("ant", "bee", "s"), ("cow", "pig", " "), ("goat", "lion", "e"))]


def ids(text):
    return mx.array([256, *text.encode()])


def prompt_file(folder, rows) -> str:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"--prompts={path}"


@pytest.mark.parametrize("arguments, rows, columns", [
    (["--check=1"], 2, 12), (["--site=heads", "--check=0.5"], 4, 12), (["--site=q", "--positions=all"], 2, 2),
    (["--site=hidden", "--top=7", "--check=1"], 7, 12), (["--site=mlp", "--positions=last"], 2, 1),
    (["--mode=integrated", "--steps=3", "--check=1"], 2, 12), (["--mode=integrated", "--line=embeddings"], 2, 12),
    (["--pairs=5:5, 6:6", "--check=1"], 2, 2), (["--bos=false"], 2, 11)], ids=str)
def test_grids(arguments, rows, columns, tmp_path, capsys):
    """Each mode prints a table that fits 80 columns, and writes a picture, a page and a file of arrays."""
    path, model = checkpoint(tmp_path)
    saved = tmp_path / "found.npz"
    conftest.run_here("attribution.py", path, CLEAN, CORRUPT, TARGET, FOIL, *arguments, f"--save={saved}")
    output = capsys.readouterr().out
    assert max(len(line) for line in output.splitlines() if re.match(r"\d\.|layer|after|embedding", line)) <= 80
    held = np.load(saved)
    assert held["values"].shape == (rows, columns) == (len(held["rows"]), len(held["columns"]))
    mode = "integrated" if "--mode=integrated" in arguments else "patching"
    site = next((f"-{argument[7:]}" for argument in arguments if argument.startswith("--site")), "")
    page = (tmp_path / f"ckpt-{mode}{site}.html").read_text()
    assert (tmp_path / f"ckpt-{mode}{site}.png").exists() and "estimated (patched - corrupt)" in page
    assert "the dog sat" in page and "the cat sat" in page
    known = json.loads(str(held["about"]))
    assert known["foil"] == "'x'" and re.search(r"clean [-\d.]+, corrupt [-\d.]+", known["answer"])
    checked = ~np.isnan(held["patched"])
    share = float((re.findall(r"check=([\d.]+)", " ".join(arguments)) or [0])[0])
    assert checked.sum() == round(share * rows * columns)
    if share:
        estimate, real = held["values"][checked], held["patched"][checked]
        slope = (estimate * real).sum() / np.square(estimate).sum()
        told = f"correlation {np.corrcoef(estimate, real)[0, 1]:.3f}, slope {slope:.2f}"
        assert told in output and told in page
        assert f"patched: {real[-1]:+.4f}" in page


def test_its_numbers(tmp_path, capsys):
    """The table is attribute()'s result, divided by the difference of both answers, and means with their errors over
    prompts; positions count from the end where prompts are not equally long."""
    path, model = checkpoint(tmp_path)
    model.eval()
    saved = tmp_path / "found.npz"

    def parts(row, site, pairs=None):
        measure = lambda logits: logits[..., ord(row["target"])] - logits[..., ord(row["foil"])]  # noqa: E731
        clean, corrupt = ids(row["clean"]), ids(row["corrupt"])
        whole = float(measure(model(clean[None])[0, -1]) - measure(model(corrupt[None])[0, -1]))
        found = attribute(model, clean, corrupt, measure, [site])
        return whole, np.stack([np.array(found[site, layer]) for layer in (0, 1)])

    conftest.run_here("attribution.py", path, CLEAN, CORRUPT, TARGET, FOIL, "--site=heads", f"--save={saved}")
    whole, found = parts(ROWS[0], "heads")
    held = np.load(saved)
    np.testing.assert_allclose(held["values"], found.reshape(4, 12) / whole, atol=1e-5)
    assert held["rows"].tolist() == ["0.0", "0.1", "1.0", "1.1"]

    for positions, rows in (("each", ROWS[:3]), ("each", ROWS), ("all", ROWS), ("last", ROWS)):
        capsys.readouterr()
        conftest.run_here("attribution.py", path, prompt_file(tmp_path, rows), "--site=v", f"--positions={positions}",
                          f"--save={saved}", "--check=0.5")
        wholes, values = zip(*(parts(row, "v") for row in rows), strict=True)
        if positions == "each":
            values = np.stack([x[..., -12:].reshape(4, 12) for x in values])  # the longest has 13
        else:
            values = np.stack([x.sum(-1) if positions == "all" else x[..., -1] for x in values])
        ratio = values.mean(0) / np.mean(wholes)
        held, output = np.load(saved), capsys.readouterr().out
        np.testing.assert_allclose(held["values"], ratio, atol=1e-4)
        left = values - ratio * np.reshape(wholes, (-1, 1, 1))
        np.testing.assert_allclose(held["standard_error"], left.std(0, ddof=1) / len(rows)**0.5 / abs(np.mean(wholes)),
                                   atol=1e-4)
        assert held["count"] == len(rows) and f"means over {len(rows)} prompts" in output
        assert ("columns count from the end" in output) == (positions == "each" and len(rows) == 4)
        checked = ~np.isnan(held["patched"])
        assert checked.sum() == checked.size // 2
        assert np.abs(held["patched"] - held["values"])[checked].max() < 0.3 * np.abs(held["values"]).max()


@pytest.mark.parametrize("settings", [dict(), dict(pos="learned", bias=True, norm="layer", softcap=5.0)], ids=str)
def test_direct_tables(settings, tmp_path, capsys):
    path, model = checkpoint(tmp_path, **settings)
    model = shaken(block_size=32, vocab_size=320, **settings)
    save_checkpoint(str(path), model, {"tokenizer": byte_tokenizer().to_dict()})
    saved = tmp_path / "found.npz"
    conftest.run_here("attribution.py", path, "--mode=direct", CLEAN, TARGET, f"--save={saved}")  # without a foil
    output, held, n_vocab = capsys.readouterr().out, np.load(saved), byte_tokenizer().n_vocab
    logits = logits_before_the_cap(model, ids("the cat sat"))
    expected = logits[32] - logits[:n_vocab].mean()
    assert f"logit of ' ' less the mean logit: clean {expected:.4f}" in output and n_vocab < 320
    assert ("before the cap" in output) == bool(settings) and f"the shares sum to {expected:.4f}" in output
    rows, columns = held["rows"].tolist(), held["columns"].tolist()
    more = ["attention's bias"] if settings else []
    assert columns == ["head 0", "head 1", *more, "MLP", "together"]
    assert rows == ["embedding", *["position"] * bool(settings), "layer 0", "layer 1", "layer 2", "layer 3",
                    *["last biases"] * bool(settings)]
    assert held["values"][:, -1].sum() == pytest.approx(expected, abs=1e-4)
    np.testing.assert_allclose(held["values"][rows.index("layer 0"):][:4, :-1].sum(1),
                               held["values"][rows.index("layer 0"):][:4, -1], atol=1e-4)
    for frozen in ("true", "false"):
        conftest.run_here("attribution.py", path, "--mode=direct", prompt_file(tmp_path, ROWS), f"--save={saved}",
                          f"--frozen={frozen}")
        found = [direct(model, ids(row["clean"]), lambda logits, row=row: (
            logits[..., ord(row["target"])] - logits[..., ord(row["foil"])]), frozen == "true") for row in ROWS]
        heads, held = np.stack([each.heads for each in found]), np.load(saved)
        first = held["rows"].tolist().index("layer 0")
        np.testing.assert_allclose(held["values"][first:first + 4, :2], heads.mean(0), atol=1e-4)
        np.testing.assert_allclose(held["standard_error"][first:first + 4, :2], heads.std(0, ddof=1) / 2, atol=1e-4)
        assert "4 prompts" in (tmp_path / "ckpt-direct.html").read_text()


PAIR = [CLEAN, CORRUPT, TARGET]


@pytest.mark.parametrize("arguments, says", [
    ([], "give --clean"), ([CLEAN, TARGET], "give --corrupt"), ([CLEAN, CORRUPT], "give --target"),
    ([CLEAN, "--corrupt=a dog", TARGET], "say which positions correspond"), ([CLEAN, "--mode=patch"], "mode='patch'"),
    ([*PAIR, "--pairs=5:99"], "pair 5:99"), ([*PAIR, "--site=head"], "site='head'"), ([*PAIR, "--line=x"], "line='x'"),
    ([*PAIR, "--check=2"], "check from 0 to 1"), ([*PAIR, "--steps=0"], "steps and batch_size must be 1 or more"),
    ([*PAIR, "--steps=5"], "--steps has no effect"), ([*PAIR, "--top=5"], "--top has no effect"),
    ([*PAIR, "--frozen=false"], "--frozen has no effect"), ([*PAIR, "--seed=5"], "--seed has no effect"),
    ([*PAIR, "--batch_size=5"], "--batch_size has no effect"),
    ([*PAIR, "--mode=direct"], "--corrupt has no effect with mode=direct"),
    ([CLEAN, TARGET, "--mode=direct", "--check=1"], "--check has no effect"),
    ([CLEAN, "--corrupt=the cat sat", TARGET], "so there is no effect"),
    ([CLEAN, TARGET, "--prompts=x.jsonl"], "--prompts and --clean"), ([*PAIR, "--save=x.txt"], "let its name end in"),
    ([*PAIR, "--picture={rows}"], "let its name end in"), (["--prompts={rows}"], "prompt 1 has no corrupt"),
], ids=str)
def test_bad_input(arguments, says, tmp_path):
    path, _ = checkpoint(tmp_path)
    rows = prompt_file(tmp_path, [dict(clean="a", target="b")]).removeprefix("--prompts=")
    with pytest.raises(UserError, match=says):
        conftest.run_here("attribution.py", path, *(text.format(rows=rows) for text in arguments))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ckpt.safetensors", "prompts.jsonl"]


def test_docstring(tmp_path):
    checkpoint(tmp_path, n_layer=4)
    names = conftest.docstring_use(attribution, tmp_path)
    assert names["found"]["heads", 3].shape == (2, 3) and names["shares"].heads.shape == (4, 2)


@pytest.mark.parametrize("arguments", [[CORRUPT], ["--mode=direct"]], ids=str)
def test_weights_that_are_not_finite(arguments, tmp_path):
    path, model = checkpoint(tmp_path)
    model.blocks[1].mlp.up.weight = model.blocks[1].mlp.up.weight * float("nan")
    save_checkpoint(str(path), model, {"tokenizer": byte_tokenizer().to_dict()})
    assert "are not finite" in run(path, CLEAN, TARGET, *arguments, status=2).stderr
    assert [file.name for file in tmp_path.iterdir()] == ["ckpt.safetensors"]


def test_columns_do_not_matter(tmp_path):
    """On the line of the embeddings all of them move, whichever positions the table shows."""
    model, a, b = small(3), mx.array([5, 9, 2, 7, 3]), mx.array([5, 8, 2, 7, 3])
    whole = attribute(model, a, b, answer, ["heads"], 4, "embeddings")
    last = attribute(model, a, b, answer, ["heads"], 4, "embeddings", [(4, 4)])
    plain = attribute(model, a, b, answer, ["heads"], 0)
    for place, x in whole.items():
        np.testing.assert_allclose(np.array(last[place])[:, 4], np.array(x)[:, 4], atol=1e-6)
    assert max(float(mx.abs(x - plain[place])[:, 4].max()) for place, x in whole.items()) > 1e-5
    with pytest.raises(UserError, match="two pairs have the same corrupt position"):
        attribute(model, a, b, answer, ["heads"], 0, pairs=[(1, 2), (3, 2)])
    with pytest.raises(UserError, match="turned by their position"):
        attribute(model, a, b, answer, ["q"], 0, pairs=[(1, 2)])


def test_name_of_the_answer(tmp_path):
    path, _ = checkpoint(tmp_path)
    said = run(path, "--mode=direct", "--clean=f(x", "--target=)", f"--picture={tmp_path / 'a.png'}").stdout
    assert "logit of ')' less the mean logit" in said
