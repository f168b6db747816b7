"""probe.py: its regression against Newton's method; planted labels are found in the layers that hold them, and there
alone; control tasks; the split; what it writes; bad input."""
import json
import re

import blas  # noqa: F401  (before mlx)
import conftest
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import run_here
from test_patching import copying
from test_tuned_lens import small

import probe
from model import load_arrays, save_checkpoint
from steering import load_direction, mean_states, states_of
from tokenizer import byte_tokenizer, char_tokenizer

# ---- the regression --------------------------------------------------------------------------------------------------


def newton(x: np.ndarray, labels: np.ndarray, K: int, l2: float) -> tuple[np.ndarray, np.ndarray]:
    """The same by Newton's method, with the whole Hessian."""
    n, C = x.shape
    rows = np.hstack([x, np.ones((n, 1))])
    both, wanted = np.zeros((C + 1, K)), np.eye(K)[labels]
    penalty = l2 * np.diag([1.0] * C + [0.0])
    for _ in range(50):
        p = np.exp(rows @ both)
        p /= p.sum(1, keepdims=True)
        gradient = rows.T @ (p - wanted) / n + penalty @ both
        hessian = np.zeros((K, C + 1, K, C + 1))
        for i in range(K):
            for j in range(K):
                weight = p[:, i] * ((i == j) - p[:, j])
                hessian[i, :, j] = (rows * weight[:, None]).T @ rows / n + (penalty if i == j else 0)
        size = K * (C + 1)
        move = np.linalg.pinv(hessian.reshape(size, size)) @ gradient.T.reshape(-1)
        both -= move.reshape(K, C + 1).T
    return both[:-1], both[-1]


@pytest.mark.parametrize("K, l2", [(2, 0.001), (2, 1.0), (4, 0.01)])
def test_fit(K, l2):
    rng = np.random.default_rng(K)
    x = rng.normal(size=(60, 7)) * rng.uniform(0.3, 3, 7)
    labels = np.argmax(x[:, :K] + 2 * rng.normal(size=(60, K)), axis=1)
    found, expected = probe.fit(x, labels, K, l2), newton(x, labels, K, l2)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other - (other.mean() if other.ndim == 1 else 0), atol=2e-4)
    assert abs(found[0]).max() > 0.05


def test_accuracy():
    x = np.array([[1.0, 0], [0, 1], [3, 2], [-1, 0]])
    assert probe.accuracy(x, np.array([0, 1, 1, 1]), np.eye(2), np.zeros(2)) == 0.75
    assert probe.accuracy(x, np.array([0, 1, 1, 1]), np.eye(2), np.array([0, 5.0])) == 0.75
    assert probe.accuracy(x, np.array([1, 1, 1, 1]), np.eye(2), np.array([0, 5.0])) == 1


def test_probed():
    """Standardized states give the same probe for states of another scale; one dimension does not change."""
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(80, 5)).astype(np.float32), rng.integers(0, 2, 80)
    x[:, 1] += 3 * labels
    x[:, 4] = 7
    held = np.arange(80) % 4 == 0
    train, test, weights, biases = probe.probed(x, labels, held, 2, 0.01)
    scale = np.array([1, 100, 0.01, 5, 1])
    other = probe.probed(x * scale + 3, labels, held, 2, 0.01)
    np.testing.assert_allclose(other[2] * scale[:, None], weights, atol=1e-3)
    assert (train, test) == other[:2] and test > 0.85 and (weights[4] == 0).all()
    standard = (x[~held] - x[~held].mean(0)) / np.where(x[~held].std(0) > 0, x[~held].std(0), 1)
    expected = newton(standard[:, :4].astype(np.float64), labels[~held], 2, 0.01)[0]
    np.testing.assert_allclose(weights[:4] * x[~held][:, :4].std(0)[:, None], expected, atol=1e-3)


# ---- planted labels --------------------------------------------------------------------------------------------------


def rows_of(tmp_path, rows: list[dict]) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def planted(tmp_path):
    """A model that copies the token at position 2 to position 5, in block 1."""
    model, enc = copying(), char_tokenizer(["abcdefghijklmno"])
    assert enc.n_vocab == 16 and enc.start == [enc.eot]
    save_checkpoint(str(tmp_path / "ckpt.safetensors"), model, {"tokenizer": enc.to_dict()})
    return tmp_path / "ckpt.safetensors"


def accuracies(path, *arguments) -> np.ndarray:
    save = path.parent / "found.npz"
    run_here("probe.py", path, *arguments, f"--save={save}", f"--picture={path.parent / 'found.png'}")
    return np.load(save)["values"]


def test_planted(planted, tmp_path):
    """A label that is the token at position 2, read at position 5: by chance before block 1, certain after it. A label
    of the token that is read is there from the start."""
    rng = np.random.default_rng(0)
    texts = {"".join(rng.choice([*"abcdefgh"], 5)) for _ in range(160)}
    texts = sorted(texts)
    data = rows_of(tmp_path, [{"text": text, "label": "early" if text[1] < "e" else "late"} for text in texts])
    found = accuracies(planted, f"--data={data}")
    assert (found[:2, 1] < 0.65).all() and (found[2:, :2] == 1).all()
    assert (abs(found[:, 2] - 0.5) < 0.12).all() and (found[2:, 4] > 0.35).all()
    data = rows_of(tmp_path, [{"text": text, "label": int(text[4] < "e")} for text in texts])
    assert (accuracies(planted, f"--data={data}")[:, :2] == 1).all()
    data = rows_of(tmp_path, [{"text": text, "label": text[1]} for text in texts])  # eight labels
    found = accuracies(planted, f"--data={data}", "--controls=0")
    assert found.shape == (4, 2) and (found[:2, 1] < 0.35).all() and (found[2:] == 1).all()


def test_control(planted, tmp_path, capsys):
    """A label that each token has at random is in the state of that token, and selectivity tells that a probe learned
    it by heart."""
    rng, letters = np.random.default_rng(1), [*"abcdefgh"]
    own = dict(zip(letters, [0, 1, 1, 0, 1, 0, 0, 1], strict=True))
    texts = sorted({"".join(rng.choice(letters, 5)) for _ in range(160)})
    rows = [{"text": text, "label": own[text[2]], "position": 3, "word": text[2:]} for text in texts]
    found = accuracies(planted, f"--data={rows_of(tmp_path, rows)}", "--over=position")
    assert (found[:, :4] == 1).all() and (found[:, 4] == 0).all()
    assert "each of 8 tokens, 0 of which are in held-out rows only" in capsys.readouterr().out
    assert "shuffled" not in capsys.readouterr().out
    found = accuracies(planted, f"--data={rows_of(tmp_path, rows)}", "--over=position", "--controls=1", "--seed=5")
    assert (found[:, :4] == 1).all()


def test_places(planted, tmp_path):
    """The last token, the mean, the last token of the last such word, and a position that counts the first token."""
    enc, ids = char_tokenizer(["abcdefghijklmno"]), [0, 1, 2, 3, 2, 3, 5]
    text = "abcbce"
    ids = [*enc.start, *enc.encode(text).tolist()]
    for over, row, expected in (("last", {}, (6, 7, None)), ("mean", {}, (1, 7, None)),
                                ("word", {"word": "bc"}, (5, 6, "bc")), ("word", {"word": "a"}, (1, 2, "a")),
                                ("position", {"position": 0}, (0, 1, ids[0])),
                                ("position", {"position": "4"}, (4, 5, ids[4]))):
        probe.over = over
        assert probe.place_of(enc, ids, row) == expected
    byte, probe.over = byte_tokenizer(), "word"
    ids = [*byte.start, *byte.encode("né ô né!").tolist()]
    first, end, word = probe.place_of(byte, ids, {"word": "né"})
    assert ids[first] == "é".encode()[-1] and end == len(ids) - 1 and word == "né"
    ids = [*byte.start, *b"The one near the stones"]
    assert probe.place_of(byte, ids, {"word": "one"}) == (len(byte.start) + 6, len(byte.start) + 7, "one")
    assert probe.place_of(byte, ids, {"word": "ton"}) == (len(byte.start) + 20, len(byte.start) + 21, "ton")
    probe.over = "last"


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_split():
    """The share of each label; whole groups; by the seed."""
    labels = np.array([0] * 40 + [1] * 12 + [2] * 2)
    held = probe.split(labels, [*range(54)], 0.25, np.random.default_rng(3))
    assert [held[labels == label].sum() for label in range(3)] == [10, 3, 1]
    again = probe.split(labels, [*range(54)], 0.25, np.random.default_rng(3))
    other = probe.split(labels, [*range(54)], 0.25, np.random.default_rng(4))
    assert (held == again).all() and (held != other).any()
    groups = np.arange(54) // 4
    held = probe.split(labels, groups.tolist(), 0.3, np.random.default_rng(0))
    assert all(len({*held[groups == group]}) == 1 for group in range(14)) and held[:40].sum() == 12


def test_control_labels():
    labels, rng = np.array([0, 1, 1, 1] * 25), np.random.default_rng(0)
    shuffled = probe.control_labels(labels, [None] * 100, rng)
    assert shuffled.sum() == 75 and (shuffled != labels).any()
    kinds = [str(i % 20) for i in range(100)]
    drawn = probe.control_labels(labels, kinds, rng)
    assert all(len({*drawn[i::20]}) == 1 for i in range(20)) and 0.4 < drawn.mean() < 1


def test_repeated(planted, tmp_path, capsys):
    """A row that repeats what the probe reads of another would be known from training."""
    rows = [{"text": text, "label": text[0], "position": 2} for text in
            ("abc", "abd", "abc", "bcd", "bbb", "baa", "aac")]
    run_here("probe.py", planted, f"--data={rows_of(tmp_path, rows)}", f"--picture={tmp_path / 'a.png'}")
    assert "rows: 6 (a 3, b 3); 1 more repeat others" in capsys.readouterr().out
    run_here("probe.py", planted, f"--data={rows_of(tmp_path, rows)}", f"--picture={tmp_path / 'a.png'}",
             "--over=position")
    assert "rows: 5 (a 2, b 3); 2 more repeat others" in capsys.readouterr().out


# ---- what it writes --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A packed checkpoint, and rows beside it."""
    path = tmp_path_factory.mktemp("probe") / "ckpt.safetensors"
    model = small(vocab_size=320)
    nn.quantize(model, 32, 8)
    save_checkpoint(str(path), model, {"tokenizer": byte_tokenizer().to_dict()})
    rng = np.random.default_rng(0)
    rows_of(path.parent, [{"text": f"{a} is {b}", "label": "low" if a + b < 100 else "high"}
                          for a, b in rng.integers(0, 100, (60, 2)).tolist()])
    return path


def test_direction(path, tmp_path, capsys):
    """The probes in the file give the accuracies that were printed, by states that are computed here; the direction is
    along the normal of one of them, as long as the means of the training rows are apart; steer.py and sample.py take
    it. A second run gives the same file."""
    data, out = path.parent / "rows.jsonl", tmp_path / "direction.safetensors"
    arguments = [path, f"--data={data}", "--over=mean", f"--out={out}", f"--picture={tmp_path / 'a.png'}",
                 "--toward=low", "--layer=1"]
    found = [run_here("probe.py", *arguments, f"--save={tmp_path / 'a.npz'}"), np.load(tmp_path / "a.npz")["values"]][1]
    told = capsys.readouterr().out
    arrays, header = load_arrays(str(out))
    weights, biases = (np.array(arrays[name], np.float64) for name in ("weights", "biases"))
    assert header["labels"] == ["high", "low"] and header["direction"] == "probe" and header["layer"] == 1
    model = probe.load_checkpoint(str(path))[0]
    base = header["base"]
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    states = np.stack([[np.array(states_of(model, [256, *row["text"].encode()], layer), np.float64)[1:].mean(0)
                        for row in rows] for layer in range(-1, 4)])
    labels = np.array([row["label"] == "low" for row in rows], int)
    held = probe.split(labels, [*range(60)], 0.25, np.random.default_rng(1337))
    for i in range(5):
        right = np.argmax(states[i] @ weights[i] + biases[i], 1) == labels
        np.testing.assert_allclose(found[i, :2], [right[~held].mean(), right[held].mean()], atol=1e-6)
        assert re.search(rf"^\w[\w ]+ {found[i, 0]:11.3f} {found[i, 1]:11.3f} ", told, re.M)
    direction, layer = load_direction(str(out), model, base)
    direction, normal = np.array(direction, np.float64), weights[2, :, 1] - weights[2, :, 0]
    unit = normal / np.linalg.norm(normal)
    apart = states[2][~held & (labels == 1)].mean(0) - states[2][~held & (labels == 0)].mean(0)
    np.testing.assert_allclose(direction, unit * (unit @ apart), atol=1e-4)
    assert unit @ apart > 0 and f"norm {np.linalg.norm(direction):.2f}" in told
    run_here("steer.py", path, "--prompt=a", "--max_new_tokens=5", f"--direction={out}")
    assert "after layer 1" in capsys.readouterr().out
    assert conftest.run("sample.py", path, "--prompt=a", "--max_new_tokens=5", f"--steer={out}:2").stdout
    run_here("probe.py", *arguments)
    again = load_arrays(str(out))[0]
    assert all(mx.array_equal(again[name], arrays[name]) for name in arrays)
    assert "earlier result of probe.py" in capsys.readouterr().out
    html = (tmp_path / "a.html").read_text()
    assert "data:image/png;base64" in html and "selectivity" in html and "rows.jsonl" in html


def test_texts_are_read_together(path):
    model = probe.load_checkpoint(str(path))[0]
    texts = [[256, *text.encode()] for text in ("1 is 2", "25 is 33", "a")]
    found = mean_states(model, texts, [(1, len(ids)) for ids in texts])
    for i, ids in enumerate(texts):
        np.testing.assert_allclose(found[3, i], np.array(states_of(model, ids, 2))[1:].mean(0), atol=1e-4)


@pytest.mark.parametrize("content, arguments, words", [
    ("", [], "has these labels: none"), ('{"text": "a", "label": 1}\n', [], "has these labels: 1 1: a probe needs two"),
    ('{"text": "a"}\n', [], "line 1: it needs the fields text and label"),
    ('{"text": "", "label": 1}\n', [], "line 1: it needs the fields"), ("x\n", [], "line 1: no JSON"),
    ('{"text": "a", "label": [1]}\n', [], "line 1: it needs the fields"),
    ('{"text": "' + 99 * "a" + '", "label": 1}\n', [], "line 1: --data: the prompt has 100 tokens"),
    ('{"text": "a", "label": 1}\n', ["--over=word"], "line 1: its word is None, which is not in its text"),
    ('{"text": "a", "label": 1, "word": "b"}\n', ["--over=word"], "line 1: its word is 'b'"),
    ('{"text": "a", "label": 1, "position": 2}\n', ["--over=position"], "not a number from 0 to 1"),
    (None, ["--over=first"], "not one of last, mean, word, position"), (None, ["--held_out=1"], "held_out must be"),
    (None, ["--l2=0"], "l2 over 0"), (None, ["--layer=1"], "--layer has no effect without --out"),
    (None, ["--toward=low"], "--toward has no effect without --out"), (None, ["--data="], "there are no rows"),
    (None, ["--out=d", "--layer=4"], "layers 0 to 3"), (None, ["--out=d", "--toward=lower"], "choose one of high, low"),
    (None, ["--out=CKPT"], "overwrite"), (None, ["--save=DATA"], "end in .npz"), (None, ["--picture=a.jpg"], ".png"),
    ("".join(f'{{"text": "{x}", "label": "{x[0]}"}}\n' for x in ("a", "ab", "b", "ba", "c", "cd")), ["--out=d"],
     "the rows have 3 labels: choose one by --toward"),
    ("".join(f'{{"text": "{x}", "label": "{x[0]}", "group": "{x[0]}"}}\n' for x in ("a", "ab", "b", "ba")), [],
     "a label is not in both parts"),
])
def test_bad_input(content, arguments, words, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = path.parent / "rows.jsonl"
    if content is not None:
        data = tmp_path / "bad.jsonl"
        data.write_text(content)
    names = [each.replace("CKPT", str(path)).replace("DATA", str(data)) for each in arguments]
    with pytest.raises(ValueError, match=words):
        run_here("probe.py", path, f"--data={data}", *names)
    assert not {*tmp_path.iterdir()} - {data}


def test_docstring(path, tmp_path):
    (tmp_path / "ckpt.safetensors").write_bytes(path.read_bytes())
    names = conftest.docstring_use(probe, tmp_path)
    assert names["weights"].shape == (5, 3)
    assert probe.accuracy(names["x"], names["labels"], names["weights"], names["biases"]) > 0.3


def test_finite(path, tmp_path):
    """Damaged weights end in one line."""
    model, meta = probe.load_checkpoint(str(path))
    model.norm.weight = model.norm.weight
    model.blocks[2].attn_norm.weight = model.blocks[2].attn_norm.weight * mx.nan
    save_checkpoint(str(tmp_path / "nan.safetensors"), model, meta)
    done = conftest.run("probe.py", tmp_path / "nan.safetensors", f"--data={path.parent / 'rows.jsonl'}", status=2)
    assert "not finite" in done.stderr
