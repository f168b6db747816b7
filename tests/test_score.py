"""score.py: windows of a text, the first token, logits in pieces; and --block_size of the scripts that read windows."""
import re

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, run_here

import score
import tuned_lens
from config import UserError
from model import GPT, GPTConfig, save_checkpoint
from tokenizer import byte_tokenizer

SIZES = dict(vocab_size=257, n_layer=2, n_head=2, n_embd=64)
TEXT = np.frombuffer((ROOT / "LOG.md").read_bytes()[:400], np.uint8)


def sharp(block_size: int, **settings) -> GPT:
    """A model whose predictions depend on every token of the context."""
    model = GPT(GPTConfig(block_size=block_size, **SIZES | settings), seed=1).eval()
    model.embed.weight = model.embed.weight * 20
    return model


def nats(model: GPT, stream: list[int], first: int) -> list[float]:
    """The losses of stream[first:], in float64, each from all tokens before it."""
    logits = np.array(model(mx.array([stream[:-1]]))[0], np.float64)
    logits -= logits.max(-1, keepdims=True)
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(logits)), stream[1:]]
    return losses[first - 1:].tolist()


@pytest.mark.parametrize("start", [[], [256]])
def test_first_token(start):
    """Without a token that begins a text, the first token is predicted by nothing, and the others count."""
    model, ids = sharp(64), TEXT[:40].tolist()
    expected = np.mean(nats(model, [*start, *ids], 1))
    assert score.score(model, np.array(ids), start)[0] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(UserError, match="a single token"):
        score.score(model, np.array(ids[:1]), [])


def test_window_is_moved():
    """Windows of 16 tokens in a context of 64: a token is predicted from the window that first holds it."""
    model, ids = sharp(64), TEXT[:41].tolist()
    expected = nats(model, ids[:17], 1)
    for start in (8, 16, 24):
        expected += nats(model, ids[start:start + 17], 9)
    found = score.score(model, np.array(ids), [], block_size=16)[0]
    assert len(expected) == 40 and found == pytest.approx(np.mean(expected), rel=1e-5)
    assert abs(found - score.score(model, np.array(ids), [])[0]) > 1e-3


def test_window_length():
    def length(context, block_size=0, **settings):
        return score.window_length(GPTConfig(block_size=context, **SIZES | settings), block_size)

    assert [length(256), length(1024), length(131_072)] == [256, 1024, 1024]
    assert [length(256, 64), length(8192, 2048), length(256, 512)] == [64, 2048, 512]
    for values in ((256, -1), (256, 257, "learned")):
        with pytest.raises(UserError, match="block_size=(-1|257)"):
            length(*values[:2], **(dict(pos=values[2]) if values[2:] else {}))


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_logits_in_pieces(rows, monkeypatch):
    """So many positions at a time give the figures of all at once; there is no larger array of logits."""
    model, sizes, unembed = sharp(32), [], GPT.unembed
    whole = score.score(model, TEXT, [256], batch_size=4)
    monkeypatch.setattr(score, "LOSS_CHUNK", rows * 257 * 4)
    monkeypatch.setattr(GPT, "unembed", lambda self, x: sizes.append(x.shape[1]) or unembed(self, x))
    found = score.score(model, TEXT, [256], batch_size=4)
    assert found == pytest.approx(whole, rel=1e-6) and max(sizes) == min(rows, 32)


def test_lenses_in_pieces(monkeypatch):
    model, rows = sharp(32), mx.array(TEXT[:66].reshape(2, 33)).astype(mx.int32)
    lens = {name: mx.random.normal(p.shape, key=mx.random.key(0)) * 0.1 for name, p in tuned_lens.start(model).items()}
    h = tuned_lens.residuals(model, rows[:, :-1]).flatten(1, 2)
    targets = rows[:, 1:].reshape(-1)
    whole = tuned_lens.gradients(model, lens, h, targets)
    monkeypatch.setattr(tuned_lens, "LOSS_CHUNK", 10 * 257)  # 10 of 64 tokens
    found = tuned_lens.gradients(model, lens, h, targets)
    assert found[0].item() == pytest.approx(whole[0].item(), rel=1e-5)
    for name in lens:
        np.testing.assert_allclose(np.array(found[1][name]), np.array(whole[1][name]), atol=1e-6, rtol=1e-3)


# ---- scripts ---------------------------------------------------------------------------------------------------------

SCRIPTS = {
    "eval.py": ["--max_tokens=3000"],
    "hqq.py": ["--max_tokens=3000"],
    "gptq.py": ["--samples=3", "--max_tokens=3000", "--test=TEXT"],
    "awq.py": ["--samples=3", "--max_tokens=3000", "--test=TEXT"],
    "laser.py": ["--search=True", "--rhos=0.3", "--samples=2"],
    "tuned_lens.py": ["--max_iters=2", "--eval_windows=2"],
    "patching.py": ["--mode=ablate", "--samples=2"],
}


def printed(script, folder, context, capsys, *arguments) -> tuple[str, str]:
    """What a script prints for a model with this context: without times, and without what it tells about windows; and
    the latter."""
    folder.mkdir()
    save_checkpoint(str(folder / "a.safetensors"), sharp(context), {"tokenizer": byte_tokenizer().to_dict()})
    text = str(ROOT / "LOG.md")
    given = [argument.replace("TEXT", text) for argument in SCRIPTS[script]]
    run_here(script, folder / "a.safetensors", f"--data={text}", *given, *arguments)
    out = re.sub(r"[\d,]+ tok/s.*|\d+ s, .* GiB|[\d.]+ MB, w.*", "", capsys.readouterr().out.replace(str(folder), ""))
    windows = r"(, in windows of [\d,]+ tokens|the loss is of windows of .*\n)"
    return re.sub(windows, "", out), "".join(re.findall(windows, out))


@pytest.mark.parametrize("script", SCRIPTS)
def test_block_size(script, tmp_path, capsys):
    """--block_size=16 of a context of 64 gives the figures of a context of 16, and is told."""
    figures, told = printed(script, tmp_path / "short", 16, capsys)
    assert not told and figures == printed(script, tmp_path / "whole", 16, capsys, "--block_size=16")[0]
    given = printed(script, tmp_path / "given", 64, capsys, "--block_size=16")
    assert given[0] == figures and "of 16 tokens" in given[1]
    assert printed(script, tmp_path / "long", 64, capsys)[0] != figures
    with pytest.raises(UserError, match="block_size"):
        printed(script, tmp_path / "bad", 64, capsys, "--block_size=-1")


@pytest.mark.parametrize("script", ["eval.py", "gptq.py", "tuned_lens.py"])
def test_long_contexts(script, tmp_path, capsys):
    """Of a context of 131,072 tokens, windows of 1,024 are read, and told."""
    figures, told = printed(script, tmp_path / "short", 1024, capsys)
    assert not told
    found = printed(script, tmp_path / "long", 131_072, capsys)
    assert found[0] == figures and "of 1,024 tokens" in found[1]
