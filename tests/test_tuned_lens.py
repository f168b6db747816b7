"""tuned_lens.py: before training it is the logit lens, in every variant; KL as by the tuned-lens package; gradients;
files; bad input."""
import re
import struct
import sys
from functools import partial

import blas  # noqa: F401  (before mlx)
import conftest
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import prepared
import pytest
from conftest import ROOT
from test_gptq import FLAVOURS, checkpoint
from test_hqq import words

import tuned_lens
from config import UserError
from lora import base_fingerprint
from model import GPT, GPTConfig, cross_entropy, load_checkpoint, save_checkpoint
from tokenizer import byte_tokenizer
from tuned_lens import logit_lens

IDX = mx.array(np.random.default_rng(0).integers(0, 64, (2, 20)))


def small(**settings):
    sizes = dict(block_size=32, vocab_size=64, n_layer=4, n_head=2, n_embd=64)
    return GPT(GPTConfig(**sizes | settings), seed=1).eval()


def log_softmax(logits) -> np.ndarray:
    logits = np.array(logits, np.float64)
    return logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(
        -1, keepdims=True)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("settings", FLAVOURS, ids=str)
def test_the_start(settings, packed):
    """The logit lens equals the model without the later blocks; the tuned lens starts as the logit lens; and the last
    logits are the model's."""
    model = small(**settings)
    if packed:
        nn.quantize(model, 32, 8, class_predicate=lambda path, module: isinstance(module, nn.Linear | nn.Embedding)
                    and "depth" not in path and "predictor" not in path and "pos" not in path)
    logits = logit_lens(model, IDX)
    assert logits.shape == (5, 2, 20, 64) and mx.array_equal(logits[4], model(IDX))
    start = tuned_lens.start(model)
    assert mx.array_equal(logit_lens(model, IDX, start), logits)
    blocks, n_layer = model.blocks, model.config.n_layer
    for layer in range(3 if settings.get("yoco") else 4):  # without the later blocks
        model.blocks = blocks[:layer]
        assert mx.allclose(model(IDX), logits[layer], atol=1e-5)
    assert n_layer == 4


@pytest.mark.parametrize("name", ["gpt2", "linear"])
def test_the_package(name, tmp_path):
    """KL at each layer and position equals that of tuned-lens 0.2.0 (tests/fixtures/make_tuned_lens.py)."""
    fixtures = ROOT / "tests" / "fixtures"
    prepared.run([sys.executable, ROOT / "hf_reader.py", fixtures / "hf" / name, tmp_path / "m.safetensors"],
                   check=True)
    model, _ = load_checkpoint(str(tmp_path / "m.safetensors"))
    with np.load(fixtures / "tuned_lens.npz") as file:
        lens, kl = {part: mx.array(file[f"{name}.{part}"]) for part in "Ab"}, file[f"{name}.kl"]
    idx = mx.array(np.load(fixtures / "hf" / "idx.npy"))
    log_q = log_softmax(logit_lens(model, idx, lens))
    ours = (np.exp(log_q[-1]) * (log_q[-1] - log_q)).sum(-1).mean(1)
    np.testing.assert_allclose(ours, kl, rtol=1e-4, atol=1e-5)
    rows = mx.concatenate([idx, idx[:, :1]], axis=1)
    np.testing.assert_allclose(tuned_lens.measure(model, lens, rows)[0], kl.mean(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", ["affine", "full"])
def test_gradients(head):
    """Gradients equal those of the plain formula: the mean over layers of KL(model || lens), or of cross-entropy."""
    model = small(n_layer=2)
    h = tuned_lens.residuals(model, IDX).reshape(3, -1, 64)
    lens = {name: array + 0.1 * mx.random.normal(array.shape)
            for name, array in tuned_lens.start(model, head).items()}
    targets = mx.roll(IDX, -1, 1).reshape(-1)
    p = mx.softmax(model.unembed(h[-1]), axis=-1)

    def loss(lens):
        logits = mx.stack([tuned_lens.read(model, lens, h[layer], layer) for layer in range(2)])
        log_q = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        if head == "full":
            return -mx.take_along_axis(log_q, mx.broadcast_to(targets[None, :, None], (2, 40, 1)), -1).mean()
        return (p * (mx.log(p) - log_q)).sum(-1).mean()

    expected, gradient = mx.value_and_grad(loss)(lens)
    found, ours = tuned_lens.gradients(model, lens, h, targets)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    for name in lens:
        assert mx.abs(ours[name] - gradient[name]).max() < 1e-4 * mx.abs(gradient[name]).max() + 1e-8


# ---- files -----------------------------------------------------------------------------------------------------------


run = partial(conftest.run, "tuned_lens.py")


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A model that learned a text, and the text."""
    folder = tmp_path_factory.mktemp("lens")
    path, model = checkpoint(folder, n_layer=3)
    text, optimizer = words(1), optim.Adam(5e-3)
    step, tokens = nn.value_and_grad(model, lambda x: model.loss(x[:, :-1], x[:, 1:])), np.frombuffer(text, np.uint8)
    for i in range(300):
        starts = np.random.default_rng(i).integers(len(text) // 2, size=16)
        _, gradients = step(mx.array(np.stack([tokens[start:start + 33] for start in starts]).astype(np.int32)))
        optimizer.update(model, gradients)
        mx.eval(model.parameters())
    save_checkpoint(str(path), model, {"tokenizer": byte_tokenizer().to_dict()})
    (folder / "text.txt").write_bytes(text)
    return folder


def figures(output: str) -> np.ndarray:
    """(layers + 1, 4) of the table, whose last row is the embedding."""
    lines = re.findall(r"^(embedding|after layer \d(?:: the model)?) (.+)$", output, re.M)
    assert [name for name, _ in lines] == ["after layer 2: the model", "after layer 1", "after layer 0", "embedding"]
    return np.array([numbers.split() for _, numbers in lines[::-1]], np.float64)


@pytest.mark.parametrize("head", ["affine", "full"])
def test_train(head, learned):
    """KL and cross-entropy fall below the logit lens's at every layer; both files hold the lens that was measured."""
    path, out = learned / "ckpt.safetensors", learned / f"{head}.lenses"
    done = run(path, f"--data={learned / 'text.txt'}", f"--head={head}", f"--out={out}",
               *(["--max_iters=150", "--learning_rate=3e-3"] if head == "affine" else
                 ["--max_iters=400", "--learning_rate=1e-2"]))
    table = figures(done.stdout)
    assert table.shape == (4, 4) and (table[3, :2] == 0).all() and table[3, 2] == table[3, 3]
    if head == "affine":
        assert (table[:3, 1] < table[:3, 0]).all()
        assert (np.diff(table[:, 1]) < 0).all()  # less at each later layer
    assert (table[:3, 3] < table[:3, 2]).all()
    assert (learned / f"{head}-lenses.png").read_bytes().startswith(b"\x89PNG")
    model, _ = load_checkpoint(str(path))
    lens, raw = tuned_lens.load_lens(str(out), model), (learned / f"{head}.tgtl").read_bytes()
    version, layers, vocab, width = struct.unpack("<4I", raw[4:20])
    assert raw[:4] == b"TGTL" and (version, layers, vocab, width) == (1 if head == "full" else 2, 3, 320, 64)
    at = 20
    for layer in range(layers):
        for name, shape in (("W", (vocab, width)), ("b", (vocab,))) if head == "full" else (
                ("A", (width, width)), ("b", (width,))):
            n = int(np.prod(shape))
            assert np.array_equal(np.frombuffer(raw, "<f4", n, at).reshape(shape), np.array(lens[name][layer]))
            at += 4 * n
    assert at == len(raw)
    again = tuned_lens.load_lens(str(learned / f"{head}.tgtl"), model)
    assert all(mx.array_equal(again[name], lens[name]) for name in lens)
    text = np.frombuffer((learned / "text.txt").read_bytes(), np.uint8)  # the last tenth is held out
    stream = np.concatenate([[byte_tokenizer().bos], text[len(text) * 9 // 10:]]).astype(np.int32)
    rows = mx.array(np.stack([stream[i * 32:i * 32 + 33] for i in range(16)]))
    log_q = log_softmax(logit_lens(model, rows[:, :-1], lens))
    kl = (np.exp(log_q[-1]) * (log_q[-1] - log_q)).sum(-1).mean((1, 2)) / np.log(2)
    np.testing.assert_allclose(table[:, 1], kl, atol=2e-4)
    ce = [cross_entropy(each.reshape(-1, 320), rows[:, 1:].reshape(-1)).mean().item() / np.log(2)
          for each in logit_lens(model, rows[:, :-1])]
    np.testing.assert_allclose(table[:, 2], ce, atol=2e-4)


def test_apply(learned):
    """The table, the picture and the page of a prompt show each layer's most probable tokens, as computed here."""
    path, out = learned / "ckpt.safetensors", learned / "a.lenses"
    text = (learned / "text.txt").read_text()
    run(path, f"--data={learned / 'text.txt'}", f"--out={out}", "--max_iters=20")
    model, _ = load_checkpoint(str(path))
    ids = mx.array([[byte_tokenizer().bos, *text[:9].encode()]])
    for sidecar, color in ((out, "entropy"), (learned / "a.tgtl", "probability"), ("none", "entropy")):
        done = run(path, f"--apply={sidecar}", f"--prompt={text[:9]}", f"--color={color}",
                   f"--picture={learned / 'p.png'}", f"--save={learned / 'p.npz'}")
        lens = {} if sidecar == "none" else tuned_lens.load_lens(str(sidecar), model)
        log_p = log_softmax(logit_lens(model, ids, lens)[::-1, 0, :, :257])  # the end stands above
        entropy = -(np.exp(log_p) * log_p).sum(-1) / np.log(2)
        values = entropy if color == "entropy" else np.exp(log_p.max(-1))
        best = [[chr(i).replace(" ", "·") for i in line] for line in log_p.argmax(-1)[:, 1:]]
        title, _, rest = done.stdout.partition("residual stream")
        lines = f"residual stream{rest}".partition("\ndrawn: ")[0].splitlines()
        assert re.search(("tuned", "logit")[sidecar == "none"] + r" lens:\s+the most probable next token", title)
        assert all(len(line) <= 80 for line in [*title.splitlines(), *lines] if str(learned) not in line)
        found = [[] for _ in range(4)]  # the columns come in tables of 5 lines that fit 80 characters
        assert len(lines) % 5 == 0
        for start in range(0, len(lines), 5):
            for row, line in zip(found, lines[start + 1:start + 5], strict=True):
                row += line[15:].split()
        assert [row[1:] for row in found] == best
        assert (learned / "p.png").read_bytes().startswith(b"\x89PNG")
        html = (learned / "p.html").read_text()
        shade = np.array(re.findall(r"<td tabindex[^>]*rgb\(60 130 235/([\d.]+)\)", html), float).reshape(4, 10)
        np.testing.assert_allclose(shade, 0.75 * values / values.max(), atol=0.006)
        told = np.array(re.findall(r"entropy ([\d.]+) bits\n *([\d.]+)%", html), float).reshape(4, 10, 2)
        np.testing.assert_allclose(told[..., 0], entropy, atol=0.006)
        np.testing.assert_allclose(told[..., 1], 100 * np.exp(log_p.max(-1)), atol=0.006)
        assert "http" not in html and base_fingerprint(model) in html and f"--color={color}" in html
        with np.load(learned / "p.npz") as saved:
            np.testing.assert_allclose(saved["values"][::-1], values, atol=1e-4)
            np.testing.assert_allclose(saved["entropy"][::-1], entropy, atol=1e-4)
            np.testing.assert_allclose(saved["probability"][::-1], -np.sort(-np.exp(log_p))[..., :5], atol=1e-5)
            assert (saved["best"][::-1, :, 0] == log_p.argmax(-1)).all() and (saved["tokens"] == ids[0]).all()


def test_between(learned):
    """With --between the states between attention and the MLP have rows, which the logit lens reads; --bos=False leaves
    out the token that begins a text."""
    path, out = learned / "ckpt.safetensors", learned / "between.npz"
    text = (learned / "text.txt").read_text()[:9]
    run(path, "--apply=none", f"--prompt={text}", "--between=True", "--bos=False", f"--save={out}")
    model, _ = load_checkpoint(str(path))
    resid, attn = [], []
    model.residual(mx.array([[*text.encode()]]), tap=lambda site, layer, x: {"resid": resid, "attn": attn}.get(
        site, []).append(x) or x)
    streams = [resid[0], *(x for layer in range(3) for x in (resid[layer] + attn[layer], resid[layer + 1]))]
    log_p = log_softmax(mx.stack([model.unembed(x)[0, :, :257] for x in streams]))
    with np.load(out) as saved:
        assert saved["rows"].tolist() == ["embedding", *(name for layer in range(3) for name in (
            f"after layer {layer}'s attention", f"after layer {layer}"))]
        np.testing.assert_allclose(saved["values"], np.exp(log_p.max(-1)), rtol=1e-4)
    lens = {"A": mx.zeros((3, 64, 64)), "b": mx.ones((3, 64))}
    table = tuned_lens.lens_table(model, byte_tokenizer(), [*text.encode()], lens, between=True)
    assert table.rows[:3] == ["embedding", "after layer 0's attention, logit lens", "after layer 0"]
    np.testing.assert_allclose(table.values[1::2], np.exp(log_p.max(-1))[1::2], rtol=1e-4)
    tuned = np.exp(log_softmax(logit_lens(model, mx.array([[*text.encode()]]), lens)[:, 0, :, :257]).max(-1))
    np.testing.assert_allclose(np.array(table)[::2], tuned, rtol=1e-4)
    assert "after layer 0&#x27;s attention" in table._repr_html_()
    with pytest.raises(UserError, match="leave out --between"):
        tuned_lens.lens_table(small(parallel=True), byte_tokenizer(), [1, 2], between=True)


@pytest.mark.parametrize("arguments, says", [
    ([], "give --data=FILE"), (["--data={text}", "--head=linear"], "head='linear'"),
    (["--data={text}", "--max_iters=0"], "must be over 0"), (["--data={short}"], "less than 32 tokens"),
    (["--apply=none"], "give --prompt"), (["--apply=none", "--prompt=" + "x" * 40], "the prompt has 41 tokens"),
    (["--apply=none", "--prompt=x", "--color=red"], "color='red'"), (["--apply=x.lenses", "--prompt=x"], "x.lenses"),
    (["--apply=x.tgtl", "--prompt=x"], "cannot read the lens file x.tgtl"),
    (["--data={text}", "--out=none/x.lenses"], "there is no folder none"),
    (["--data={text}", "--out={path}"], "its name must end in .lenses"),
    (["--data={text}", "--out={folder}"], "d.lenses: it is a folder"), (["--data={text}", "--seed=-1"], "seed=-1"),
    (["--data={text}", "--picture=x.html"], "let its name end in .png"),
    (["--data={text}", "--out={wild}", "--max_iters=5", "--learning_rate=1e38"], "smaller --learning_rate"),
    (["--apply={path}", "--prompt=x"], "is not a lens file"),
    (["--apply=none", "--prompt=x", "--seed=2", "--data={text}"], "--data, --seed: not used with --apply"),
    (["--data={text}", "--between=True", "--prompt=x"], "--between, --prompt: not used in training"),
    (["--apply=none", "--prompt=x", "--save=x.txt"], "let its name end in .npz"),
    (["--apply={cut}", "--prompt=x"], "is not a whole TGTL file"),
])
def test_bad_input(arguments, says, learned, tmp_path):
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "d.lenses").mkdir()
    (tmp_path / "cut.tgtl").write_bytes(struct.pack("<4s4I", b"TGTL", 2, 3, 320, 64) + b"123")
    names = dict(text=learned / "text.txt", short=tmp_path / "short.txt", path=learned / "ckpt.safetensors",
                 cut=tmp_path / "cut.tgtl", wild=tmp_path / "wild.lenses", folder=tmp_path / "d.lenses")
    done = run(names["path"], *(argument.format(**names) for argument in arguments), status=2)
    assert says in done.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cut.tgtl", "d.lenses", "short.txt"]


def test_what_is_not_replaced(learned, tmp_path):
    """A file that another script made under the name of the lenses, or that stands beside them."""
    path = learned / "ckpt.safetensors"
    command = [path, f"--data={learned / 'text.txt'}", f"--out={tmp_path / 'a.lenses'}", "--max_iters=1"]
    (tmp_path / "a.tgtl").write_text("mine")
    assert "a.tgtl exists without a .lenses file beside it" in run(*command, status=2).stderr
    (tmp_path / "a.lenses").write_bytes(path.read_bytes())
    assert "a.lenses exists, and is no result of a script" in run(*command, status=2).stderr
    assert (tmp_path / "a.tgtl").read_text() == "mine"
    for name in ("a.tgtl", "a.lenses"):
        (tmp_path / name).unlink()
    run(*command)
    assert "a.lenses is an earlier result of tuned_lens.py, which is replaced" in run(*command).stdout


def test_docstring(tmp_path):
    checkpoint(tmp_path, n_layer=4)
    names = conftest.docstring_use(tuned_lens, tmp_path)
    assert np.array(names["table"]).shape == (5, 3)
    assert names["logits"].shape == (5, 1, 3, 320)
    assert mx.array_equal(names["logits"][4], names["model"](mx.array([[5, 17, 2]])))


def test_weights_that_are_not_finite(tmp_path):
    """A model whose outputs are NaN gives a one-line error, and no file is written."""
    path, model = checkpoint(tmp_path)
    model.blocks[1].mlp.up.weight = model.blocks[1].mlp.up.weight * float("nan")
    save_checkpoint(str(path), model, {"tokenizer": byte_tokenizer().to_dict()})
    assert "are not finite" in run(path, "--apply=none", "--prompt=x", status=2).stderr
    assert "its outputs are not finite" in run(path, f"--data={ROOT / 'README.md'}", status=2).stderr
    assert [file.name for file in tmp_path.iterdir()] == ["ckpt.safetensors"]


def test_another_base(learned, tmp_path):
    path, out = learned / "ckpt.safetensors", tmp_path / "a.lenses"
    run(path, f"--data={learned / 'text.txt'}", f"--out={out}", "--max_iters=1")
    model, meta = load_checkpoint(str(path))
    model.blocks[1].mlp.up.weight[0, 0] += 1
    save_checkpoint(str(tmp_path / "b.safetensors"), model, meta)
    done = run(tmp_path / "b.safetensors", f"--apply={out}", "--prompt=x", status=2)
    assert "made for another checkpoint" in done.stderr
    other, _ = checkpoint(tmp_path, n_layer=2)
    assert "of other shapes" in run(other, f"--apply={tmp_path / 'a.tgtl'}", "--prompt=x", status=2).stderr
