"""steer.py: the direction is numpy's difference of states; where a tap acts; strength 0 changes nothing; files; bad
input; the command line."""
import re
from functools import partial

import blas  # noqa: F401  (before mlx)
import conftest
import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT
from test_tuned_lens import log_softmax, small

import steer
from model import generate, load_arrays, load_checkpoint, no_tap, save_checkpoint
from patching import ablation
from tokenizer import Tokenizer, byte_tokenizer

IDS, OTHER = [5, 17, 2, 33, 8, 1], [9, 40, 2]
run = partial(conftest.run, "steer.py")


def stream(model, ids: list[int], layer: int) -> np.ndarray:
    """The states (T, C) after a layer, by the layers alone."""
    x = model.embed(mx.array([ids]))
    for block in model.blocks[:layer + 1]:
        x = block(x, 0, None, no_tap, {})
    return np.array(x[0])


@pytest.mark.parametrize("layer", [-1, 0, 3])
def test_direction(layer):
    model = small()
    first, second = (stream(model, ids, layer) for ids in (IDS, OTHER))
    for over, skip, expected in (("last", 1, first[-1] - second[-1]),
                                 ("mean", 0, first.mean(0) - second.mean(0)),
                                 ("mean", 1, first[1:].mean(0) - second[1:].mean(0))):
        found = steer.direction_of(model, IDS, OTHER, layer, over, skip)
        np.testing.assert_allclose(np.array(found), expected, atol=1e-5)
    with pytest.raises(steer.UserError, match="no token"):
        steer.direction_of(model, IDS, OTHER[:1], layer, "mean", 1)


@pytest.mark.parametrize("settings", [{}, {"yoco": True}, {"sliding_window": 5}, {"value_residual": True}], ids=str)
@pytest.mark.parametrize("start, end", [(0, None), (4, None), (3, 5), (9, None)])
def test_positions(start, end, settings):
    """A tap acts at its positions of the text only: with a cache, token by token, as in one pass over the whole text,
    which sees all positions. The direction is added to the state after layer 1."""
    model, d = small(**settings), mx.array(np.random.default_rng(0).normal(size=64).astype(np.float32))

    def whole(site, layer, x):
        at = (mx.arange(x.shape[1]) >= start) & (mx.arange(x.shape[1]) < (end or 99))
        return x + 2 * at[:, None] * d if (site, layer) == ("resid", 2) else x

    text, tap = [*IDS, *range(40, 52)], steer.acting(1, lambda x: x + 2 * d, start, end)
    cache, found = model.make_cache(), []
    for part in [IDS, *([token] for token in text[len(IDS):])]:
        found.append(model(mx.array([part]), cache=cache, tap=tap, last=True)[0, -1])
    for expected, differs in ((whole, False), (no_tap, True)):
        logits = model(mx.array([text]), tap=expected)[0, len(IDS) - 1:]
        assert (mx.abs(mx.stack(found) - logits).max() > 1e-3) == differs


def test_read_again():
    """When the context is full and its second half is read again, positions still count from the beginning."""
    model, state = small(block_size=8), mx.array(np.random.default_rng(1).normal(size=64).astype(np.float32))
    seen = []

    def tap(site, layer, x):
        if (site, layer) == ("resid", 0):
            seen.append(np.array(acts("resid", 0, x) != x).any(-1)[0].tolist())
        return x

    acts = steer.pasting(state, -1, 6, 12)
    list(generate(model, IDS, 12, temperature=0, tap=tap))
    positions = [[*range(6)], [6], [7], [5, 6, 7, 8], [9], [10], [11], [12], [10, 11, 12, 13], [14], [15], [16]]
    assert seen == [[6 <= at < 12 for at in row] for row in positions]


def test_divergence():
    model, direction = small(), 9 * mx.array(np.random.default_rng(0).normal(size=64).astype(np.float32))
    found = np.array(steer.divergence(model, [*IDS, *OTHER], 3, steer.steering(direction, 1, 0.5), 60))
    plain, changed = (log_softmax(model(mx.array([[*IDS, *OTHER][:-1]]), tap=tap)[0, -3:, :60])
                      for tap in (no_tap, steer.steering(direction, 1, 0.5)))
    np.testing.assert_allclose(found, (np.exp(plain) * (plain - changed)).sum(-1), rtol=1e-3, atol=1e-6)
    assert (found > 0.01).all()


def test_documented():
    """The probabilities in docs/inside.md, of the page's own model."""
    model, meta = load_checkpoint(str(ROOT / "webgpu" / "demo.safetensors"))
    enc = Tokenizer.from_dict(meta["tokenizer"])
    model.set_dtype(mx.float32)
    text = "def __init__(self, name):\n        self.name ="
    name, value = ([*enc.start, *enc.encode(each).tolist()] for each in (text, text.replace("name", "value")))
    pasted = steer.pasting(steer.states_of(model, name, 1)[7], 1, 7, 8)
    found = [mx.softmax(model(mx.array([ids]), tap=tap)[0, -1])[enc.encode(" name").item()].item() for ids, tap in (
        (name, no_tap), (name, ablation(model, "head", 4, head=2)), (value, no_tap), (value, pasted))]
    assert [round(p, 2) for p in found] == [0.90, 0.14, 0.01, 0.57]


# ---- files, command line ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("steer") / "ckpt.safetensors"
    save_checkpoint(str(path), small(vocab_size=320), {"tokenizer": byte_tokenizer().to_dict()})
    return path


def texts(output: str) -> list[str]:
    """The two texts, the line about their difference, and the line about KL."""
    return re.search(r"---- the unchanged model\n(.*)\n---- the changed model\n(.*)\n---- (.*)\n(KL.*)\n", output,
                     re.S).groups()


def test_command(path):
    """At strength 0 both texts are equal; a strong direction changes the text; its file gives that text again, and is
    refused with another checkpoint."""
    options = ["--prompt=abc", "--max_new_tokens=12", "--temperature=0.5"]
    both = ["--positive=the end", "--negative=cat", "--layer=1", "--over=mean"]
    plain, changed, said, kl = texts(run(path, *options, *both, "--strength=0").stdout)
    assert plain == changed and said == "both texts are equal" and "mean 0.000 nats" in kl and plain.startswith("abc")
    out = path.parent / "direction.safetensors"
    first, second, said, _ = texts(run(path, *options, *both, "--strength=9", f"--out={out}").stdout)
    assert first == plain != second and "is the first that differs" in said
    arrays, header = load_arrays(str(out))
    model, (a, b) = small(vocab_size=320), ([256, *text.encode()] for text in ("the end", "cat"))
    expected = stream(model, a, 1)[1:].mean(0) - stream(model, b, 1)[1:].mean(0)
    np.testing.assert_allclose(np.array(arrays["direction"]), expected, atol=1e-4)
    assert header["layer"] == 1 and header["direction"] == "mean" and header["settings"]["positive"] == "the end"
    assert texts(run(path, *options, f"--direction={out}", "--strength=9").stdout)[:2] == (first, second)
    last = texts(run(path, *options, f"--direction={out}", "--strength=9", "--start=-1").stdout)
    assert last[0] == plain and last[1] not in (plain, second)
    other = path.parent / "other.safetensors"
    model = small(vocab_size=320)
    model.norm.weight = model.norm.weight + 1
    save_checkpoint(str(other), model, {"tokenizer": byte_tokenizer().to_dict()})
    assert "another checkpoint" in run(other, *options, f"--direction={out}", status=2).stderr
    assert "is a direction of steer.py" in run(out, *options, *both, status=2).stderr


@pytest.mark.parametrize("arguments, words", [
    ([], "there is no direction"), (["--positive=a"], "there is no direction"),
    (["--positive=a", "--negative=b", "--direction=c"], "give either"),
    (["--positive=a", "--negative=b", "--layer=4"], "layers 0 to 3"),
    (["--positive=a", "--negative=b", "--over=all"], "not one of last, mean"),
    (["--positive=a", "--negative=b", "--start=-2"], "start must be -1"),
    (["--direction=CKPT"], "holds no direction"), (["--positive=a", "--negative=b", "--out=CKPT"], "overwrite"),
])
def test_bad_input(arguments, words, path):
    arguments = [each.replace("CKPT", str(path)) for each in arguments]
    assert words in run(path, "--prompt=a", *arguments, status=2).stderr


def test_docstring(path, monkeypatch):
    """The lines in the docstring run."""
    folder = path.parent / "use"
    folder.mkdir()
    (folder / "ckpt.safetensors").write_bytes(path.read_bytes())
    names = conftest.docstring_use(steer, folder)
    assert isinstance(names["text"], list) and (ROOT / "steer.py").exists()
