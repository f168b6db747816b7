"""eval.py, run from a command line: its figures against a slow oracle, and bad input."""
import json
import math
import re
import shlex
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT

from lora import attach, linear_layers, load_adapted, merge, save_adapter
from model import GPT, GPTConfig, load_checkpoint, save_checkpoint
from tokenizer import Tokenizer, byte_tokenizer, char_tokenizer, train_bpe

T = 16  # block_size


def evaluate(checkpoint, data, *arguments, status=0):
    """checkpoint: one or a list."""
    checkpoints = checkpoint if isinstance(checkpoint, list) else [checkpoint]
    command = [sys.executable, ROOT / "eval.py", *checkpoints, f"--data={data}", "--dtype=float32", *arguments]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def rows(done) -> list[tuple]:
    """For each checkpoint its path, and tokens, bytes, nats, perplexity, bits per byte, accuracy."""
    found, text = [], None
    for line in done.stdout.splitlines():
        if match := re.fullmatch(r".*: ([\d,]+) tokens, ([\d,]+) bytes", line):
            text = [int(number.replace(",", "")) for number in match.groups()]
        else:
            *numbers, path = re.fullmatch(r"loss ([\d.]+) \| perplexity ([\d.]+) \| bits/byte ([\d.]+) \| accuracy "
                                          r"([\d.]+)% \| (.*), [\d,]+ tok/s, [\d.]+ GiB", line).groups()
            found.append((path, [*text, *map(float, numbers)]))
    return found


def figures(done) -> list[float]:
    """Tokens, bytes, nats, perplexity, bits per byte, accuracy of one checkpoint."""
    (_, found), = rows(done)
    return found


def oracle(checkpoint, tokens, stride) -> list[float]:
    """The figures by a slow way: each token from a context that begins with the first window that holds the token."""
    model, meta = load_checkpoint(str(checkpoint))
    tokenizer = Tokenizer.from_dict(meta["tokenizer"])
    tokens = [int(token) for token in tokens]
    nats, hits = [], []
    for i, token in enumerate(tokens):
        start = 0
        while start + T <= i:  # token i is not yet in the window
            start = min(start + stride, len(tokens) - T)
        context = ([tokenizer.eot] + tokens)[start:i + 1]
        logits = np.array(model(mx.array([context]))[0, -1], dtype=np.float64)
        nats.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[token])
        hits.append(logits.argmax() == token)
    loss, n_bytes = np.mean(nats), len(tokenizer.decode_bytes(token for token in tokens if token != tokenizer.eot))
    return [len(tokens), n_bytes, loss, math.exp(loss), sum(nats) / n_bytes / math.log(2), 100 * np.mean(hits)]


def assert_close(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=0.006)  # perplexity and accuracy have two decimals
    np.testing.assert_allclose(got[:3], wanted[:3], atol=1e-4)
    np.testing.assert_allclose(got[4], wanted[4], atol=1e-4)


def checkpoint_of(tokenizer, folder):
    """Random weights, sharp enough that every token of the context matters."""
    config = GPTConfig(block_size=T, vocab_size=tokenizer.n_vocab, n_layer=2, n_head=2, n_embd=32, tie=False)
    model = GPT(config, seed=3)
    model.head.weight = model.head.weight * 20
    path = folder / "ckpt.safetensors"
    save_checkpoint(str(path), model, {"tokenizer": tokenizer.to_dict()})
    return path


@pytest.fixture(scope="module")
def chars(tmp_path_factory):
    """A checkpoint and a text of 100 characters, about half of which the model predicts right."""
    tokenizer = char_tokenizer(["abcdefghijklmnopqrstuvwxyz é,."])
    checkpoint = checkpoint_of(tokenizer, tmp_path_factory.mktemp("chars"))
    model, rng, ids = load_checkpoint(str(checkpoint))[0], np.random.default_rng(0), [tokenizer.eot]
    while len(ids) < 101:
        guess = int(mx.argmax(model(mx.array([ids[-T:]]))[0, -1, :tokenizer.eot]))
        ids.append(guess if rng.random() < 0.6 else int(rng.integers(tokenizer.eot)))
    return checkpoint, tokenizer, tokenizer.decode(ids[1:])


# ---- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length, stride, batch_size", [
    (1, 0, 16), (T - 5, 0, 16), (T - 5, T, 16), (T, 0, 16), (T, 1, 16), (T + 1, 0, 16), (T + 1, T, 1),
    (2 * T, T, 16), (37, 1, 4), (37, 5, 3), (61, 0, 2), (61, T, 16), (100, 0, 5),
])
def test_figures(chars, tmp_path, length, stride, batch_size):
    checkpoint, tokenizer, text = chars
    (tmp_path / "text.txt").write_text(text[:length], encoding="utf-8")
    got = figures(evaluate(checkpoint, tmp_path / "text.txt", f"--stride={stride}", f"--batch_size={batch_size}"))
    wanted = oracle(checkpoint, tokenizer.encode(text[:length]), stride or T // 2)
    assert wanted[:2] == [length, len(text[:length].encode())]
    assert_close(got, wanted)
    assert length == 1 or 10 < got[5] < 90


def test_bits_per_byte_of_bpe(tmp_path):
    """Some tokens have several bytes, some characters several tokens; a byte order mark is not part of the text."""
    text = "Zoë naïvely ate a crème brûlée — 東京 🙂🙃. " * 2
    tokenizer = train_bpe(iter([text]), 280)
    checkpoint = checkpoint_of(tokenizer, tmp_path)
    (tmp_path / "text.txt").write_text(text, encoding="utf-8-sig")
    got = figures(evaluate(checkpoint, tmp_path / "text.txt"))
    assert got[1] == len(text.encode()) and got[0] not in (got[1], len(text))
    assert_close(got, oracle(checkpoint, tokenizer.encode(text), T // 2))


def test_max_tokens(chars, tmp_path):
    checkpoint, tokenizer, text = chars
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    got = figures(evaluate(checkpoint, tmp_path / "text.txt", "--max_tokens=21"))
    assert_close(got, oracle(checkpoint, tokenizer.encode(text)[:21], T // 2))
    assert figures(evaluate(checkpoint, tmp_path / "text.txt", "--max_tokens=1000"))[0] == 100


def test_dtype(chars, tmp_path):
    checkpoint, tokenizer, text = chars
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    full, half = (figures(evaluate(checkpoint, tmp_path / "text.txt", f"--dtype={name}"))[2]
                  for name in ("float32", "bfloat16"))
    assert full != half == pytest.approx(full, rel=0.05)


def prepare(folder, tokenizer, train, val):
    """A folder as data.py makes it."""
    np.array(train, dtype="<u2").tofile(folder / "train.bin")
    np.array(val, dtype="<u2").tofile(folder / "val.bin")
    (folder / "meta.json").write_text(json.dumps({"dtype": "uint16", "tokenizer": tokenizer.to_dict(),
                                                  "train_tokens": len(train), "val_tokens": len(val)}))


def test_prepared_folder(chars, tmp_path):
    """The validation split is read. Its end-of-text tokens are predicted like others, and count as no bytes."""
    checkpoint, tokenizer, text = chars
    ids = tokenizer.encode(text).tolist()
    val = [*ids[:30], tokenizer.eot, *ids[30:40], tokenizer.eot]
    prepare(tmp_path, tokenizer, ids, val)
    assert_close(figures(evaluate(checkpoint, tmp_path)), oracle(checkpoint, val, T // 2))


# ---- several checkpoints, adapters -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name, told", [("rows.jsonl", True), ("text.txt", False)])
def test_files_with_fields(chars, tmp_path, name, told):
    """A .jsonl file is measured as it stands; the command that is told gives the texts alone."""
    checkpoint, tokenizer, _ = chars
    (tmp_path / name).write_text("ab, cd. " * 9, encoding="utf-8")
    done = evaluate([checkpoint, checkpoint], tmp_path / name)
    assert done.stdout.count("names of fields and quotes included") == told
    if told:
        command = shlex.split(re.search(r"python (data.py .*) makes tokens", done.stdout)[1])
        (tmp_path / name).write_text(json.dumps({"text": "ab, cd. " * 40}), encoding="utf-8")
        made = subprocess.run([sys.executable, *command, f"--out={tmp_path / 'tokens'}"], cwd=ROOT, capture_output=True)
        assert made.returncode == 0, made.stderr
        assert 0 < figures(evaluate(checkpoint, tmp_path / "tokens"))[0] < 320


@pytest.fixture(scope="module")
def adapted(chars):
    """Two adapters for the checkpoint, and the second one merged into it."""
    checkpoint, tokenizer, _ = chars
    for i, name in enumerate(("first", "second")):
        model, _ = load_checkpoint(str(checkpoint))
        for path in attach(model, "attn, mlp", rank=2):
            layer = linear_layers(model)[path]
            layer.b = mx.random.normal(layer.b.shape, key=mx.random.key(i))
        save_adapter(str(checkpoint.with_name(f"{name}.safetensors")), model, bases=[str(checkpoint)])
    merge(model)
    save_checkpoint(str(checkpoint.with_name("merged.safetensors")), model, {"tokenizer": tokenizer.to_dict()})
    return checkpoint.parent


def test_several_checkpoints(chars, adapted, tmp_path):
    """A row each, equal to the row that it has alone; tokens and bytes again where the tokenizer is another one."""
    text = tmp_path / "text.txt"
    text.write_text(chars[2], encoding="utf-8")
    (tmp_path / "bytes").mkdir()
    paths = [chars[0], adapted / "merged.safetensors", checkpoint_of(byte_tokenizer(), tmp_path / "bytes"), chars[0]]
    done = evaluate(paths, text)
    assert rows(done) == [(str(path), figures(evaluate(path, text))) for path in paths]
    assert len({str(found) for _, found in rows(done)}) == 3 and done.stdout.count(" bytes\n") == 3


def test_adapters(chars, adapted, tmp_path):
    """An adapter, as the checkpoint or as --adapter, has the figures of the merged weights."""
    checkpoint, tokenizer, text = chars
    path, merged = tmp_path / "text.txt", adapted / "merged.safetensors"
    path.write_text(text, encoding="utf-8")
    second = adapted / "second.safetensors"
    wanted = oracle(merged, tokenizer.encode(text), T // 2)
    assert_close(figures(evaluate(second, path)), wanted)
    assert_close(figures(evaluate(checkpoint, path, f"--adapter={second}")), wanted)
    model, meta = load_adapted(str(checkpoint), [f"{second}:0.5", str(adapted / "first.safetensors")])
    merge(model)
    save_checkpoint(str(tmp_path / "sum.safetensors"), model, {"tokenizer": meta["tokenizer"]})
    wanted = oracle(tmp_path / "sum.safetensors", tokenizer.encode(text), T // 2)
    found = evaluate(checkpoint, path, f"--adapter={second}:0.5", f"--adapter={adapted / 'first.safetensors'}")
    assert_close(figures(found), wanted)
    assert_one_line("second.safetensors was trained on another base", merged, path, f"--adapter={second}")


# ---- bad input -------------------------------------------------------------------------------------------------------


def assert_one_line(says, *arguments):
    done = evaluate(*arguments, status=2)
    assert done.stdout == "" and done.stderr.count("\n") == 1 and says in done.stderr, done.stderr


def test_bad_text(chars, tmp_path):
    checkpoint, bad = chars[0], tmp_path / "bad.txt"
    assert_one_line("--data=FILE", checkpoint, "")
    assert_one_line("bad.txt is not a text file", checkpoint, bad)
    assert_one_line("meta.json cannot be used (No such file", checkpoint, tmp_path)
    for content, says in ((b"", "empty"), (b"abc\xff\x00" * 9, "is a binary file"), ("abcÄ".encode(), "'\\xc4'"),
                          ("étagère ".encode("cp1252") * 9, "iconv -f CP1252 -t UTF-8 ")):
        bad.write_bytes(content)
        assert_one_line(says, checkpoint, bad)


def test_bad_folder(chars, tmp_path):
    checkpoint, tokenizer, _ = chars
    prepare(tmp_path, byte_tokenizer(), [1, 2, 3], [1, 2, 3])
    assert_one_line("another tokenizer", checkpoint, tmp_path)
    prepare(tmp_path, tokenizer, [1, 2, 3], [])
    assert_one_line("val.bin is empty", checkpoint, tmp_path)
    prepare(tmp_path, tokenizer, [1, 2, 3], [1, 2, 3])
    for content in (b"", b"\1\0\2\0\3", b"\1\0\2\0\3\0\3\0", b"\1\0\2\0\xff\0"):  # cut, odd, too long, no token
        (tmp_path / "val.bin").write_bytes(content)
        assert_one_line("val.bin cannot be used", checkpoint, tmp_path)
    (tmp_path / "val.bin").unlink()
    assert_one_line("val.bin cannot be used", checkpoint, tmp_path)
    (tmp_path / "meta.json").write_text("{")
    assert_one_line("meta.json cannot be used", checkpoint, tmp_path)


def test_bad_checkpoint(chars, tmp_path):
    (tmp_path / "text.txt").write_text("abc")
    assert_one_line("no checkpoint", tmp_path / "none.safetensors", tmp_path / "text.txt")
    save_checkpoint(str(tmp_path / "bare.safetensors"), load_checkpoint(str(chars[0]))[0], {})
    assert_one_line("no tokenizer", tmp_path / "bare.safetensors", tmp_path / "text.txt")
    assert_one_line("no checkpoint at none", [chars[0], "none"], tmp_path / "text.txt")
    model = GPT(GPTConfig(block_size=T, vocab_size=20, n_layer=1, n_head=1, n_embd=32))
    save_checkpoint(str(tmp_path / "few.safetensors"), model, {"tokenizer": byte_tokenizer().to_dict()})
    assert_one_line("more tokens than its vocab_size=20", tmp_path / "few.safetensors", tmp_path / "text.txt")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite(chars, tmp_path, value):
    """The line names the tensor; or tells that logits overflow."""
    (tmp_path / "text.txt").write_text("abc")
    model, meta = load_checkpoint(str(chars[0]))
    model.blocks[1].mlp.up.weight[3, 5] = value
    save_checkpoint(str(tmp_path / "bad.safetensors"), model, meta)
    assert_one_line("NaN numbers in blocks.1.mlp.up.weight", tmp_path / "bad.safetensors", tmp_path / "text.txt")
    model, meta = load_checkpoint(str(chars[0]))
    model.head.weight = mx.full(model.head.weight.shape, 3e38)
    save_checkpoint(str(tmp_path / "larger.safetensors"), model, meta)
    assert_one_line("its logits are too large", tmp_path / "larger.safetensors", tmp_path / "text.txt")


@pytest.mark.parametrize("argument, says", [
    (f"--stride={T + 1}", f"from 1 to {T}"), ("--stride=-1", f"from 1 to {T}"), ("--batch_size=0", "batch_size"),
    ("--max_tokens=-5", "max_tokens"), ("--dtype=int8", "bfloat16"), ("--strides=3", "--stride"),
])
def test_bad_settings(chars, tmp_path, argument, says):
    (tmp_path / "text.txt").write_text("abc" * 20)
    assert_one_line(says, chars[0], tmp_path / "text.txt", argument)


def test_kv_bits(tmp_path):
    """The loss that is printed is that with a quantized cache."""
    model = GPT(GPTConfig(block_size=T, vocab_size=320, n_layer=2, n_head=1, n_embd=32), seed=3).eval()
    model.embed.weight = model.embed.weight * 20
    save_checkpoint(str(tmp_path / "a"), model, {"tokenizer": byte_tokenizer().to_dict()})
    (tmp_path / "text").write_bytes(b"sixteen letters.")
    ids, losses = mx.array([[byte_tokenizer().bos, *b"sixteen letters."]]), {}
    for bits in (4, 0):
        logits = np.array(model(ids[:, :-1], cache=model.make_cache(bits) if bits else None)[0], np.float64)
        right = logits[np.arange(T), np.array(ids[0, 1:])]
        losses[bits] = (np.log(np.exp(logits).sum(-1)) - right).mean()
        assert figures(evaluate(tmp_path / "a", tmp_path / "text", f"--kv_bits={bits}"))[2] == pytest.approx(
            losses[bits], abs=1e-4)
    assert abs(losses[4] - losses[0]) > 1e-3
