"""fast_bpe.py against tiktoken: every id of every text must be equal. data.py's memory with it is bounded."""

import itertools
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_tokenizer import CORPUS

import fast_bpe
from fast_bpe import TIKTOKENS_GPT2, encode_texts, encoder_of, is_simple
from tokenizer import EOT, GPT2_PATTERN, PATTERN, Tokenizer, byte_tokenizer, open_tokens, train_bpe

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("gigatoken")
PATTERNS = {"ours": PATTERN, "gpt2": GPT2_PATTERN, "tiktoken's gpt2": TIKTOKENS_GPT2}
ODD = ["a", "B", "é", "ß", "Ж", "日", "ー", "1", "٣", "½", "²", "Ⅷ", " ", "  ", "\t", "\n", "\r", "\r\n", "\x0b",
       "\x1c", "\x85", "\xa0", "\u1680", "\u2003", "\u2028", "\u202f", "\u3000", "\u200b", "\ufeff", "'s", "'LL",
       "'Ve", "'ſ", "'", "!", "_", "-", "==", "🙂", "👩\u200d👧", "e\u0301", "\u093f", "क", "ı", "K", "\x00", "\x7f",
       "\U0010ffff", "\ue000", "\ud83d", "\u088f", "\ua7d2", "\U000323b0", "\U00010940", EOT, "the", " self", "    ",
       "12345"]


def made_of(tokens: list[bytes], pattern: str) -> Tokenizer:
    return Tokenizer("bpe", tokens, {EOT: len(tokens)}, pattern)


@pytest.fixture(scope="module", params=PATTERNS)
def bpe(request):
    """A trained vocabulary and pairs of bytes, so that the ids show where words end, with each of the patterns."""
    pairs = [bytes(pair) for pair in itertools.product(b"a '\n\r\ts!", repeat=2)]
    return made_of([*dict.fromkeys([*train_bpe(iter(CORPUS), 440).tokens, *pairs])], PATTERNS[request.param])


def compare(tokens: Tokenizer, texts: list[str]):
    assert encoder_of(tokens), "gigatoken is not used"
    for text, ids in zip(texts, encode_texts(tokens, texts), strict=True):
        assert ids.dtype == np.uint32 and np.array_equal(ids, tokens.encode(text)), ascii(text[:500])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_code_point(pattern):
    """Each character is a letter, a number, a blank or another one to gigatoken as it is to tiktoken. In this
    vocabulary each byte merges with an S before it or after it, so that the ids show where words end. Planes 4 to 13 of
    Unicode are empty."""
    letters = [bytes([byte]) for byte in range(256)]
    pairs = dict.fromkeys([byte + b"S" for byte in letters] + [b"S" + byte for byte in letters])
    tokens = made_of([*letters, *pairs], PATTERNS[pattern])
    points = [*range(0xd800), *range(0xe000, 0x40000), *range(0xe0000, 0xe1000), 0x50000, 0xf0000, 0x10ffff]
    texts = ["".join(f"|{c}_S\n|{c}S\n|S{c}\n|1{c}1S\n" for c in map(chr, points[i:i + 64]))
             for i in range(0, len(points), 64)]
    compare(tokens, texts)
    simple = sum(is_simple(text) is not None for text in texts)
    assert 0.7 < simple / len(texts) < 1, "tiktoken encodes the new letters of Unicode and little else"


def test_random_texts(bpe):
    rng = random.Random(1)
    texts = ["".join(rng.choices(ODD, k=rng.choice((1, 2, 3, 5, 9, 70)))) for _ in range(20_000)]
    texts += ["".join(chr(rng.choice((rng.randrange(0x80), rng.randrange(0x3000), rng.randrange(0x110000))))
                      for _ in range(rng.randrange(100))) for _ in range(5_000)]
    compare(bpe, [*CORPUS, *texts])
    common = [text for text in texts if is_simple(text) is not None]
    assert len(common) > len(texts) / 4


def test_every_short_text(bpe):
    """All texts of up to five of these characters: contractions, and blanks at both ends."""
    compare(bpe, ["".join(some) for n in range(6) for some in itertools.product("a '\n\rs!\u3000", repeat=n)])


def test_sources_on_this_machine(bpe):
    texts = [path.read_text() for path in sorted(ROOT.rglob("*")) if path.suffix in (".py", ".md", ".js", ".wgsl")]
    compare(bpe, texts)
    assert sum(map(len, texts)) > 1_000_000


def test_long_runs(bpe):
    """Of blanks that tiktoken's regex engine cannot match at once, and of letters."""
    texts = [f"a{blanks}b" for blanks in (" " * 49_999, " " * 75_000, "\t\t " * 500_000, "\n" * 60_000)]
    compare(bpe, [*texts, "ab" * 200_000, "日本" * 99_999, "!" * 300_000, "é" * 300_000, "1" * 99_999])


def test_where_gigatoken_is_not_used(monkeypatch):
    """Its ids could be others, or it is not installed. All texts get tiktoken's ids, also those of other kinds."""
    plain = train_bpe(iter(CORPUS), 400)
    others = [
        byte_tokenizer(),
        made_of(plain.tokens, r"\w+|\s+|[^\w\s]+"),
        made_of([*plain.tokens[:300], b"", *plain.tokens[300:]], PATTERN),
        made_of([token for token in plain.tokens if token != b"\xff"], PATTERN),
        Tokenizer("bpe", plain.tokens, {EOT: 399}, PATTERN, added={"self": 400}),
        Tokenizer("bpe", plain.tokens, {EOT: 399}, PATTERN, normalizer="NFC"),
    ]
    texts = ["", "return self.value\n\n  ", "é the", "\ud83d", f"{EOT}12345  6"]
    for tokens in others:
        assert not encoder_of(tokens)
        for text, ids in zip(texts, encode_texts(tokens, texts), strict=True):
            assert np.array_equal(ids, tokens.encode(text))
    assert encode_texts(plain, []) == []
    with monkeypatch.context() as changed:
        changed.setitem(fast_bpe.SCHEMES, PATTERN, "gpt2")
        assert not encoder_of(made_of(train_bpe(iter(["12345 " * 9]), 261).tokens, PATTERN)), "it gives other ids"
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    tokens = made_of(plain.tokens, PATTERN)
    assert not encoder_of(tokens) and encode_texts(tokens, ["the theory"])[0].tolist() == tokens.encode("the theory"
                                                                                                        ).tolist()


def test_the_memory_does_not_grow_with_the_text(tmp_path):
    """The peak of data.py on 24 and 96 MB of text in which most words are new. gigatoken begins anew every 4 MB."""
    rng, peaks = np.random.default_rng(1), []
    source = (ROOT / "fast_bpe.py").read_text()
    assert source.count("MANY = 32 * 2**20") == 1
    (tmp_path / "fast_bpe.py").write_text(source.replace("MANY = 32 * 2**20", "MANY = 4 * 2**20"))
    (tmp_path / "data.py").write_text((ROOT / "data.py").read_text())
    # A small process of its own tells the peak, as a fork of this one would begin with the peak of this one.
    run = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
           "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
    for size in (24_000_000, 96_000_000):
        letters = rng.choice(np.frombuffer(b"abcdefghijklmnopqrstuvwxyz      \n", np.uint8), size)
        (tmp_path / f"{size}.txt").write_bytes(letters.tobytes())
        done = subprocess.run([sys.executable, "-c", run, sys.executable, "data.py", f"{size}.txt", "--threads=2",
                               "--vocab_size=300", "--train_bytes=100000", f"--out=out{size}"],
                              cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout) // (2**20 if sys.platform == "darwin" else 2**10))  # MiB
        meta, ids = open_tokens(tmp_path / f"out{size}")
        tokens = Tokenizer.from_dict(meta["tokenizer"])
        assert np.array_equal(ids["val"][:-1], tokens.encode(letters[-meta["val_bytes"]:].tobytes().decode()))
    assert peaks[1] < peaks[0] + 200, peaks
