"""steer.py: strength 0 changes nothing; every figure of its table against the model itself; files; bad input; the
command line. Its directions and taps are steering.py's."""
import re
from functools import partial

import blas  # noqa: F401  (before mlx)
import conftest
import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, run_here
from test_steering import IDS, OTHER, stream
from test_tuned_lens import log_softmax, small

import steer
import steering
from model import generate, load_arrays, load_checkpoint, no_tap, save_checkpoint
from patching import ablation
from score import score
from tokenizer import Tokenizer, byte_tokenizer

run = partial(conftest.run, "steer.py")


def test_divergence():
    model, direction = small(), 9 * mx.array(np.random.default_rng(0).normal(size=64).astype(np.float32))
    found = np.array(steer.divergence(model, [*IDS, *OTHER], 3, steering.steering(direction, 1, 0.5), 60))
    plain, changed = (log_softmax(model(mx.array([[*IDS, *OTHER][:-1]]), tap=tap)[0, -3:, :60])
                      for tap in (no_tap, steering.steering(direction, 1, 0.5)))
    np.testing.assert_allclose(found, (np.exp(plain) * (plain - changed)).sum(-1), rtol=1e-3, atol=1e-6)
    assert (found > 0.01).all()


def test_documented():
    """The probabilities in docs/inside.md, of the page's own model."""
    model, meta = load_checkpoint(str(ROOT / "webgpu" / "demo.safetensors"))
    enc = Tokenizer.from_dict(meta["tokenizer"])
    model.set_dtype(mx.float32)
    text = "def __init__(self, name):\n        self.name ="
    name, value = ([*enc.start, *enc.encode(each).tolist()] for each in (text, text.replace("name", "value")))
    pasted = steering.pasting(steering.states_of(model, name, 1)[7], 1, 7, 8)
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


def test_without_bos(path, tmp_path):
    """--bos=False: prompts, those of the direction and that of the text, without the token that begins a text."""
    (tmp_path / "a.txt").write_text("the end\n")
    (tmp_path / "b.txt").write_text("cat\n")
    model, found = small(vocab_size=320), []
    expected = stream(model, [*b"the end"], 1).mean(0) - stream(model, [*b"cat"], 1).mean(0)
    for i, both in enumerate((["--positive=the end", "--negative=cat"],
                              [f"--positives={tmp_path}/a.txt", f"--negatives={tmp_path}/b.txt"])):
        out = tmp_path / f"{i}.safetensors"
        run(path, *both, "--layer=1", "--over=mean", "--bos=False", f"--out={out}")
        np.testing.assert_allclose(np.array(load_arrays(str(out))[0]["direction"]), expected, atol=1e-4)
    for bos in "True", "False":
        said = run(path, "--prompt=abc", f"--direction={out}", "--max_new_tokens=1", f"--bos={bos}").stdout
        own = stream(model, [256, *b"abc"], 1)[1:] if bos == "True" else stream(model, [*b"abc"], 1)
        norms = np.linalg.norm(own, axis=1)
        found.append(re.search(r"states ([\d.]+) on average", said)[1])
        assert found[-1] == f"{norms.mean():.2f}"
    assert found[0] != found[1]


def test_sets(path, tmp_path, capsys):
    """A direction between two files of texts, without a prompt."""
    (tmp_path / "a.txt").write_text("the end\nan ox\n")
    (tmp_path / "b.jsonl").write_text('{"text": "cat"}\n')
    out = tmp_path / "direction.safetensors"
    run_here("steer.py", path, f"--positives={tmp_path / 'a.txt'}", f"--negatives={tmp_path / 'b.jsonl'}", "--layer=0",
             f"--out={out}")
    model = small(vocab_size=320)
    first, second, third = (stream(model, [256, *text], 0)[-1] for text in (b"the end", b"an ox", b"cat"))
    arrays, header = load_arrays(str(out))
    np.testing.assert_allclose(np.array(arrays["direction"]), (first + second) / 2 - third, atol=1e-4)
    assert header["direction"] == "last" and header["layer"] == 0 and "from 1 negative to 2" in capsys.readouterr().out


def test_word_scores():
    """Against sums over single predictions, in float64: of words of one token and of several."""
    model, enc = small(vocab_size=320, tie=False, head_bias=True), byte_tokenizer()
    model.head.bias = 5.0 * (mx.arange(320) == ord(" "))  # a space is likely, as in most texts
    ids, words = [256, *b"ab"], ["c", "de"]
    tap = steering.adding(steering.direction_of(model, [IDS], [OTHER], 1), 1, 3.0)

    def p(form: bytes) -> float:
        found = log_softmax(model(mx.array([[*ids, *form]]), tap=tap)[0, len(ids) - 1:-1, :enc.n_vocab])
        return np.exp(sum(found[i, byte] for i, byte in enumerate(form)))

    expected = np.log([p(b"c") + p(b" c"), p(b"de") + p(b" de")])
    np.testing.assert_allclose(steer.word_scores(model, enc, ids, words, tap), expected, rtol=1e-4)
    assert abs(steer.word_scores(model, enc, ids, words, no_tap) - expected).min() > 1e-3


def test_namings():
    texts = ["A port, support; Port", "", "the server's port_1 c++"]
    assert steer.namings(texts, ["port", "server", "c++"]) == [2, 0, 2]


def test_table(path, tmp_path, capsys):
    """Each figure of the table is that of the steered model: perplexity by score(), log p, the counts in texts that
    generate() writes. The file has them too, and the page and the picture are there."""
    model, enc = small(vocab_size=320), byte_tokenizer()
    model.set_dtype(mx.float32)
    text = (ROOT / "LOG.md").read_text()[:150]
    (tmp_path / "text.txt").write_text(text)
    picture, save, out = tmp_path / "a.png", tmp_path / "a.npz", tmp_path / "d.safetensors"
    run_here("steer.py", path, "--positive=the end", "--negative=cat", "--layer=1", f"--out={out}")
    options = [path, f"--direction={out}", f"--data={tmp_path / 'text.txt'}", "--max_tokens=100", "--prompt=abc",
               "--words=e,the", "--samples=3", "--max_new_tokens=20", "--temperature=1"]
    capsys.readouterr()
    run_here("steer.py", *options, "--strengths=4,-2", f"--picture={picture}", f"--save={save}")
    told = capsys.readouterr().out
    saved = np.load(save)
    assert saved["rows"].tolist() == ["-2", "0", "4"]
    assert saved["columns"].tolist() == ["perplexity", "log p", "texts", "namings", "log p(e)", "log p(the)"]
    direction, layer = load_arrays(str(out))[0]["direction"], 1
    for strength, row in zip((-2, 0, 4), saved["values"], strict=True):
        tap = steering.adding(direction, layer, strength)
        whole = [256, *text.encode()[:100]]
        losses = []  # in windows of 32 tokens, which move by 16
        for start in [*range(0, 100 - 32, 16), 100 - 32]:
            part = whole[start:start + 33]
            found = -log_softmax(model(mx.array([part[:-1]]), tap=tap)[0])[np.arange(32), part[1:]]
            losses += [*found[len(losses) - start:]]
        words = steer.word_scores(model, enc, [256, *b"abc"], ["e", "the"], tap)
        texts = [*zip(*generate(model, [[256, *b"abc"]] * 3, 20, 1.0, 50, seed=1337, n_vocab=enc.n_vocab, tap=tap),
                      strict=True)]
        texts = [[*text[:text.index(enc.eot)]] if enc.eot in text else text for text in texts]
        counts = steer.namings([enc.decode(text) for text in texts], ["e", "the"])
        assert len(losses) == 100
        np.testing.assert_allclose(row, [np.exp(np.mean(losses)), words.mean(), np.count_nonzero(counts), sum(counts),
                                         *words], rtol=1e-4)
        assert re.search(rf"^ +{strength} +{row[0]:.3f} +{row[1]:.3f} +{row[2]:.0f}/3 +{row[3]:.0f}$", told, re.M)
    assert len(set(saved["values"][:, 0])) == len(set(saved["values"][:, 1])) == 3
    html = (tmp_path / "a.html").read_text()
    assert picture.stat().st_size > 10_000 and "data:image/png;base64" in html and "strength -2" in html
    assert str(tmp_path / "text.txt") in html and "sha256" in html
    run_here("steer.py", *options, "--how=remove")
    lines = re.findall(r"^ *(as it is|removed) +([\d.]+) ", capsys.readouterr().out, re.M)
    values = [float(value) for _, value in lines]
    expected = [np.exp(score(model, enc.encode(text)[:100], enc.start, tap=tap)[0])
                for tap in (no_tap, steering.removing(direction))]
    np.testing.assert_allclose(values, expected, rtol=1e-4)
    assert abs(values[0] - values[1]) > 0.01


BOTH = ["--prompt=a", "--positive=a", "--negative=b"]


@pytest.mark.parametrize("arguments, words", [
    (["--prompt=a"], "there is no direction"), (["--prompt=a", "--positive=a"], "there is no direction"),
    ([*BOTH, "--direction=c"], "give either"), ([*BOTH, "--positives=a", "--negatives=c"], "give either"),
    ([*BOTH, "--layer=4"], "layers 0 to 3"), ([*BOTH, "--over=all"], "not one of last, mean"),
    ([*BOTH, "--how=project"], "not one of add, remove"), ([*BOTH, "--start=-2"], "start must be -1"),
    (["--prompt=a", "--direction=CKPT"], "holds no direction"), ([*BOTH, "--out=CKPT"], "overwrite"),
    (BOTH[1:], "no prompt"),
    ([*BOTH[1:], "--out=o.safetensors", "--words=x"], "no prompt"),
    (["--prompt=a", "--direction=c", "--out=d"], "--out"),
    (["--prompt=a", "--positives=NONE", "--negatives=NONE"], "No such file"),
    (["--prompt=a", "--direction=c", "--layer=1"], "--layer has no effect with --direction"),
    ([*BOTH, "--how=remove", "--strength=2"], "--strength has no effect with --how=remove"),
    ([*BOTH, "--strengths=1,2"], "--strengths has no effect without --words or --data"),
    ([*BOTH, "--words=a", "--strengths=1", "--strength=2"], "--strength has no effect with --strengths"),
    ([*BOTH, "--words=a", "--strengths=1,x"], "write numbers with commas"),
    ([*BOTH, "--words=a", "--strengths=1,inf"], "write numbers with commas"),
    ([*BOTH, "--words=a", "--max_tokens=9"], "--max_tokens has no effect without --data"),
    ([*BOTH, "--words=a", "--samples=0", "--seed=1"], "--seed has no effect where no texts are written"),
    ([*BOTH, "--words=,"], "there is no word"), ([*BOTH, "--words=a", "--picture=a.jpg"], "let its name end in .png"),
    ([*BOTH, "--data=CKPT"], "--prompt has no effect without --words"),
    ([*BOTH, "--words=a", "--data=CKPT", "--start=1"], "--start has no effect on the text of --data"),
    ([*BOTH, "--save=a.npz"], "--save has no effect without --words or --data"),
    ([*BOTH[1:], "--out=d", "--strength=2"], "--strength has no effect without --prompt"),
])
def test_bad_input(arguments, words, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match=words):
        run_here("steer.py", path, *(each.replace("CKPT", str(path)) for each in arguments))
    assert not [*tmp_path.iterdir()]


def test_one_line(path):
    assert "no direction" in run(path, "--prompt=a", status=2).stderr


def test_docstring(path, monkeypatch):
    """The lines in the docstring run."""
    folder = path.parent / "use"
    folder.mkdir()
    (folder / "ckpt.safetensors").write_bytes(path.read_bytes())
    names = conftest.docstring_use(steer, folder)
    assert isinstance(names["text"], list) and (ROOT / "steer.py").exists()
