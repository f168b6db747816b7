"""data.py, run from a command line, on small corpora of every kind."""

import hashlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import prepared
import pytest
from conftest import run_here
from safetensors.numpy import save_file

from tokenizer import EOT, Tokenizer, from_tokenizer_json, train_bpe

ROOT = Path(__file__).resolve().parent.parent


def data(folder: Path, *arguments, script=ROOT / "data.py") -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, script, *arguments], cwd=folder, env=environment, capture_output=True,
                          text=True, timeout=100)


def prepare(folder: Path, *arguments, out="out") -> str:
    done = data(folder, *arguments, f"--out={out}")
    assert done.returncode == 0, done.stderr
    return done.stdout


def load(out: Path):
    """(meta, train ids, val ids, the tokenizer)"""
    assert sorted(os.listdir(out)) == ["meta.json", "train.bin", "val.bin"]
    meta = json.loads((out / "meta.json").read_text())
    train, val = (np.fromfile(out / f"{split}.bin", dtype=meta["dtype"]) for split in ("train", "val"))
    assert (len(train), len(val)) == (meta["train_tokens"], meta["val_tokens"])
    return meta, train, val, Tokenizer.from_dict(meta["tokenizer"])


def documents(out: Path) -> tuple[list[str], list[str]]:
    """The decoded documents of each split."""
    meta, *ids, tokenizer = load(out)
    splits = []
    for split, tokens in zip(("train", "val"), ids, strict=True):
        assert tokens[-1] == tokenizer.eot != tokens[0]
        parts = np.split(tokens, np.flatnonzero(tokens == tokenizer.eot) + 1)[:-1]
        splits.append([tokenizer.decode(part[:-1]) for part in parts])
        assert meta[f"{split}_bytes"] == sum(len(text.encode()) for text in splits[-1])
    assert meta["documents"] == len(splits[0]) + len(splits[1])
    return tuple(splits)


def some_texts(n=60) -> list[str]:
    rng = random.Random(3)
    words = ["def", "return", "the", "naïve", "日本", "🙂", "x = 1", EOT, "\n", "\r\n", "    "]
    return [f"{i}: " + " ".join(rng.choices(words, k=rng.randint(1, 80))) for i in range(n)]


def write_jsonl(path: Path, texts, field="text"):
    path.write_text("".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)))


def whole(folder: Path, texts, *arguments):
    """Run data.py, and check that the documents decode exactly, each in one split only. Returns the splits."""
    prepare(folder, *arguments)
    train, val = documents(folder / "out")
    assert sorted(train + val) == sorted(texts)
    assert train and val and not set(train) & set(val)
    return train, val


@pytest.mark.parametrize("tokenizer", ["byte", "char", "bpe"])
def test_jsonl(tmp_path, tokenizer):
    write_jsonl(tmp_path / "a.jsonl", some_texts())
    train, val = whole(tmp_path, some_texts(), "a.jsonl", f"--tokenizer={tokenizer}", "--vocab_size=300")
    assert train == [text for text in some_texts() if text not in val], "the order of the file"
    assert 1 <= len(val) <= 15 and val == [text for text in some_texts() if draw(text, 1337) < 0.1]
    meta, ids, _, _ = load(tmp_path / "out")
    assert meta["dtype"] == "uint16" and (tmp_path / "out" / "train.bin").stat().st_size == 2 * len(ids)
    assert meta["version"] == 2 and meta["source"] == "a.jsonl" and meta["tokenizer"]["kind"] == tokenizer


def test_jsonl_with_another_field_and_nothing_in_some(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["", *some_texts(), None], field="body")
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write("\n" + json.dumps({"body": "half a pair \ud83d"}) + "\n")
    whole(tmp_path, [*some_texts(), "half a pair \ufffd"], "a.jsonl", "--field=body", "--tokenizer=byte")


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq
    pq.write_table(pa.table({"text": [*some_texts(), None], "n": range(61)}), tmp_path / "a.parquet", row_group_size=7)
    whole(tmp_path, some_texts(), "a.parquet", "--tokenizer=byte")
    done = data(tmp_path, "a.parquet", "--out=b", "--field=n")
    assert done.returncode == 2 and "is int, not text" in done.stderr
    done = data(tmp_path, "a.parquet", "--out=b", "--field=body")
    assert done.returncode == 2 and "'text', 'n'" in done.stderr and not (tmp_path / "b").exists()


def test_folder_and_pattern(tmp_path):
    texts = [text.replace(EOT, "") for text in some_texts(30)]
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / ".git").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "in" / ("deep" if i % 2 else "") / f"{i}.md").write_bytes(text.encode())
    (tmp_path / "in" / ".hidden").write_text("hidden")
    (tmp_path / "in" / ".git" / "config").write_text("hidden")
    (tmp_path / "in" / "picture").write_bytes(b"abc\0def")
    (tmp_path / "in" / "latin1").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "in" / "p.pkl").write_bytes(b"I1\n.")
    (tmp_path / "in" / "empty").write_bytes(b"")
    assert prepare(tmp_path, "in", "--tokenizer=byte", out="other").startswith(
        "skipped 2 files:\n"
        "  in/latin1 is not UTF-8 text (byte 3): convert it with iconv -f CP1252 -t UTF-8 in/latin1 > in/latin1-utf8\n"
        "  in/p.pkl is a pickle, not text: leave it out\n"
        "skipped 1 binary file, such as in/picture\n"
        "in: 30 documents, ")
    whole(tmp_path, texts, "in", "--tokenizer=byte")
    whole(tmp_path, texts[1::2], "in/deep/*.md", "--tokenizer=byte")
    whole(tmp_path, texts, "in/**/*.md", "--tokenizer=byte")
    assert "up to date" not in prepare(tmp_path, ".", "--tokenizer=byte", out="in/made")
    assert "up to date" in prepare(tmp_path, ".", "--tokenizer=byte", out="in/made"), "the output is not the input"


def test_single_file_is_cut_at_a_line(tmp_path):
    text = "".join(f"line {i} é\r\n" for i in range(2000))
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())  # with a byte order mark
    assert "1 document," in prepare(tmp_path, "a.txt", "--tokenizer=char")
    meta, train, val, tokenizer = load(tmp_path / "out")
    assert tokenizer.eot not in train and np.flatnonzero(val == tokenizer.eot).tolist() == [len(val) - 1]
    assert tokenizer.decode(train) + tokenizer.decode(val[:-1]) == text
    assert tokenizer.decode(train).endswith("\n")
    assert 0.0995 < meta["val_bytes"] / len(text.encode()) < 0.102 and meta["documents"] == 1
    (tmp_path / "a.txt").write_text("word " * 1000)
    prepare(tmp_path, "a.txt", "--tokenizer=byte")
    assert load(tmp_path / "out")[1][-1] == ord(" ")
    (tmp_path / "a.txt").write_text("é" * 1000)
    prepare(tmp_path, "a.txt", "--tokenizer=byte", "--val_fraction=0.2501")
    _, train, val, tokenizer = load(tmp_path / "out")
    assert tokenizer.decode(train) == "é" * 749 and tokenizer.decode(val[:-1]) == "é" * 251


def test_stdlib(tmp_path):
    said = prepare(tmp_path, "--max_bytes=300000")
    assert "bytes a token" in said and "MB/s" in said
    train, val = documents(tmp_path / "out")
    sources = {path.read_text() for path in Path(sysconfig.get_path("stdlib")).rglob("*.py")
               if "site-packages" not in path.parts and not {"test", "tests"} & set(path.parts)}
    cut = [text for text in train + val if text not in sources]
    assert len(cut) <= 1 and len(train) > 1 and val
    assert any(source.startswith(cut[0]) for source in sources) if cut else True
    assert abs(sum(len(text.encode()) for text in train + val) - 300000) < 4
    assert load(tmp_path / "out")[3].n_vocab == 4096
    assert data(tmp_path, "--max_bytes=30000", "--tokenizer=byte").returncode == 0
    assert (tmp_path / "data" / "stdlib-byte" / "meta.json").exists(), "the folder's own name"


def test_hf_from_a_file_and_a_folder(tmp_path):
    pytest.importorskip("datasets")
    write_jsonl(tmp_path / "a.jsonl", some_texts())
    whole(tmp_path, some_texts(), "hf:a.jsonl", "--tokenizer=byte")
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", some_texts(20))
    whole(tmp_path, some_texts(20), "hf:set", "--tokenizer=byte")
    assert "up to date" in prepare(tmp_path, "hf:set", "--tokenizer=byte")
    done = data(tmp_path, "hf:set", "--field=body", "--out=b")
    assert done.returncode == 2 and "'id', 'text'" in done.stderr and not (tmp_path / "b").exists()


def test_hf_without_datasets(tmp_path):
    (tmp_path / "datasets.py").write_text("raise ImportError('not installed')")
    (tmp_path / "data.py").write_text((ROOT / "data.py").read_text())
    done = data(tmp_path, "hf:name", script=tmp_path / "data.py")
    assert done.returncode == 2 and "pip install datasets" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("sizes", [[50], [99_000, 500, 500], [300, 400], [30_000] * 5, [10] * 40 + [5_000, 90_000]])
@pytest.mark.parametrize("fraction", [0.1, 0.01, 0.5, 0.95])
def test_the_share_of_bytes_is_bounded(tmp_path, monkeypatch, capsys, sizes, fraction):
    """Each split has between half and twice of its share, whatever the seed; the text is whole, and one document may be
    cut. Where the hashes alone give that, they alone decide."""
    def fair(val: int) -> bool:
        share = val / sum(sizes)
        return fraction / 2 <= share <= 2 * fraction and (1 - fraction) / 2 <= 1 - share <= 2 * (1 - fraction)

    texts = [(f"{i} " + "word\n" * size)[:size] for i, size in enumerate(sizes)]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "in" / f"{i}.txt").write_text(text)
    for seed in range(3):
        run_here("data.py", "in", "--tokenizer=byte", "--out=out", f"--val_fraction={fraction}", f"--seed={seed}")
        meta, train, val, tokenizer = load(tmp_path / "out")
        assert fair(meta["val_bytes"])
        train, val = ([part for part in tokenizer.decode(ids).split(EOT) if part] for ids in (train, val))
        starts = [text for text in train if text not in texts]
        ends = [text for text in val if text not in texts]
        assert len(starts) == len(ends) <= 1
        assert sorted(set(train + val) - set(starts + ends) | {a + b for a, b in zip(starts, ends, strict=True)}
                      ) == sorted(texts)
        drawn = [text for text in texts if draw(text, seed) < fraction]
        if fair(sum(map(len, drawn))):
            assert set(val) == set(drawn) and not starts


def draw(text: str, seed: int) -> float:
    """Which documents are for validation shall never change: models were compared on them."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=b"%d" % seed).digest(), "big") / 2**64


def test_where_a_document_is_cut(tmp_path):
    """By hand: of 10,000 bytes 1,000 are for validation. The long document's draw is below the short one's for one of
    these seeds and above it for the other."""
    write_jsonl(tmp_path / "a.jsonl", ["a" * 9_990, "b" * 10])
    seeds = {draw("a" * 9_990, seed) < draw("b" * 10, seed): seed for seed in range(9)}
    prepare(tmp_path, "a.jsonl", "--tokenizer=byte", f"--seed={seeds[True]}")
    _, train, val, _ = load(tmp_path / "out")
    assert train.tolist() == [97] * 8_990 + [256] + [98] * 10 + [256] and val.tolist() == [97] * 1_000 + [256]
    prepare(tmp_path, "a.jsonl", "--tokenizer=byte", f"--seed={seeds[False]}")
    _, train, val, _ = load(tmp_path / "out")
    assert train.tolist() == [97] * 9_000 + [256] and val.tolist() == [97] * 990 + [256] + [98] * 10 + [256]


def test_copies_are_cut_at_one_place(tmp_path):
    """By hand: of 20,000 bytes 2,000 are for validation: the last 1,000 of each copy if the copies come first."""
    write_jsonl(tmp_path / "a.jsonl", ["a" * 9_900, "b" * 200, "a" * 9_900])
    seed = next(seed for seed in range(9) if draw("a" * 9_900, seed) < draw("b" * 200, seed))
    prepare(tmp_path, "a.jsonl", "--tokenizer=byte", f"--seed={seed}")
    _, train, val, _ = load(tmp_path / "out")
    assert val.tolist() == ([97] * 1_000 + [256]) * 2
    assert train.tolist() == [97] * 8_900 + [256] + [98] * 200 + [256] + [97] * 8_900 + [256]


def test_a_small_validation_split_is_told(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 49_990)  # 4,999 tokens for validation, and the end-of-text token
    assert "for validation: their loss" not in prepare(tmp_path, "a.txt", "--tokenizer=byte")
    (tmp_path / "a.txt").write_text("a" * 40_000)
    assert prepare(tmp_path, "a.txt", "--tokenizer=byte").endswith(
        "only 4,001 tokens for validation: their loss says little; give more text, or run "
        "`python data.py a.txt --tokenizer=byte --out=out --val_fraction=0.13`, then train.py with --data=out\n")
    assert "for validation: their loss" not in prepare(tmp_path, "a.txt", "--tokenizer=byte", "--val_fraction=0.13")
    (tmp_path / "a.txt").write_text("a" * 4_000)
    assert prepare(tmp_path, "a.txt", "--tokenizer=byte").endswith("their loss says little; give more text\n")


def test_equal_documents_are_in_one_split(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", some_texts() * 3)
    train, val = whole(tmp_path, some_texts() * 3, "a.jsonl", "--tokenizer=byte", "--val_fraction=0.3")
    assert len(val) % 3 == 0


def test_deterministic_whatever_the_threads(tmp_path):
    made = set()
    for threads in (1, 1, 5):
        out = f"out{len(os.listdir(tmp_path))}"
        prepare(tmp_path, "--max_bytes=1500000", "--vocab_size=600", f"--threads={threads}", out=out)
        meta = json.loads((tmp_path / out / "meta.json").read_text())
        made.add(hashlib.sha256(b"".join((tmp_path / out / name).read_bytes() for name in ("train.bin", "val.bin"))
                                + json.dumps(meta, sort_keys=True).encode()).hexdigest())
    assert len(made) == 1
    write_jsonl(tmp_path / "a.jsonl", some_texts())
    splits = [whole(tmp_path, some_texts(), "a.jsonl", "--tokenizer=byte", f"--seed={seed}") for seed in (1, 2, 1)]
    assert splits[0] == splits[2] != splits[1]


def test_the_sample_for_bpe_is_spread_evenly(tmp_path):
    """Of many small files, most of which are not read again, with rows and long files between them. By hand: each
    character of the training documents adds train_bytes / (their expected bytes) to a debt, which a slice pays."""
    rng = random.Random(2)
    (tmp_path / "in").mkdir()
    for i in range(300):
        text = "".join(rng.choices(["naïve ", "the ", "of ", "日本 ", "x = 1\n", "return "], k=rng.randrange(1, 400)))
        (tmp_path / "in" / f"{i}.txt").write_text(f"{i} {text}", newline="")
    write_jsonl(tmp_path / "in" / "rows.jsonl", some_texts(200))
    for i in range(2):
        (tmp_path / "in" / f"long{i}.txt").write_text(f"{i} other words\n" * 30_000)
    prepare(tmp_path, "in", "--train_bytes=30000", "--vocab_size=330")
    meta, _, _, made = load(tmp_path / "out")
    train, _ = documents(tmp_path / "out")  # in the order of the files
    share, debt, left, sample = 30_000 / ((meta["train_bytes"] + meta["val_bytes"]) * 0.9), 1.0, 30_000, []
    for text in train:
        for part in (text[i:i + 30_000] for i in range(0, len(text), 30_000)):
            debt += share * len(part)
            if debt > 0 < left:
                debt, left = debt - len(part), left - len(part)
                sample.append(part)
    assert 0.5 < sum(map(len, sample)) / 30_000 < 3 and len(sample) < len(train) / 5
    assert made.to_dict() == train_bpe(iter(sample), 330).to_dict()


def test_each_file_is_read_no_more_often_than_needed(tmp_path):
    """Small files are read twice, and a few of them a third time, for bpe."""
    (tmp_path / "in").mkdir()
    for i in range(100):
        (tmp_path / "in" / f"{i}.txt").write_text(f"{i} some words\n" * 100)
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "sys.addaudithook(lambda event, got: event == 'open' and got[1] and 'in/' in str(got[0]) and print(got[0]))\n")
    done = data(tmp_path, "in", "--out=out", "--vocab_size=300", "--train_bytes=10000")
    assert done.returncode == 0, done.stderr
    assert 205 <= len(re.findall(r"^in/\d+\.txt$", done.stdout, re.MULTILINE)) <= 215


@pytest.mark.parametrize("kind", ["prose", "windows", "no blanks"])
def test_pieces_of_a_long_document_have_the_tokens_of_the_whole(tmp_path, kind):
    """The tokens are equal where a text can be cut at a single blank before a letter or digit; elsewhere a few tokens
    next to a cut may differ."""
    rng = random.Random(1)
    words = ["the", "of", "naïve", "x=1;", "“日本”", "12345", "and"]
    space, line = {"prose": (" ", "\n"), "windows": (" ", "\r\n"), "no blanks": ("", "")}[kind]
    text = "".join(rng.choice(words) + (line if rng.random() < 0.1 else space) for _ in range(40_000))
    (tmp_path / "a.txt").write_bytes(text.encode())
    source = (ROOT / "data.py").read_text()
    assert "PIECE = 4 * 2**20" in source
    (tmp_path / "data.py").write_text(source.replace("PIECE = 4 * 2**20", "PIECE = 10_001"))
    done = data(tmp_path, "a.txt", "--out=out", "--vocab_size=400", script=tmp_path / "data.py")
    assert done.returncode == 0, done.stderr
    _, train, val, tokenizer = load(tmp_path / "out")
    assert len(text) > 12 * 10_001 and tokenizer.decode(train) + tokenizer.decode(val[:-1]) == text
    at_once = tokenizer.encode(tokenizer.decode(train))
    if kind == "no blanks":
        pieces = len(text.encode()) // 10_001
        assert 0 < len(train) - len(at_once) < 4 * pieces, "there must be cuts, and they must cost little"
    else:
        assert (train == at_once).all()


def test_uint32_for_a_large_vocabulary(tmp_path):
    text = "".join(map(chr, [*range(0x20, 0x7f), *range(0x4e00, 0x9fff), *range(0xac00, 0xd7a0),
                             *range(0x20000, 0x2a000)]))
    (tmp_path / "a.txt").write_text(text)
    prepare(tmp_path, "a.txt", "--tokenizer=char")
    meta, train, val, tokenizer = load(tmp_path / "out")
    assert meta["dtype"] == "uint32" and tokenizer.n_vocab > 65536 < train.max()
    assert tokenizer.decode(train) + tokenizer.decode(val[:-1]) == text


def test_bpe_learns_from_the_training_split_only_and_not_from_more_than_it_may(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [f"{i} " + chr(0x4e00 + i) * 50 for i in range(100)])
    _, val = whole(tmp_path, [f"{i} " + chr(0x4e00 + i) * 50 for i in range(100)], "a.jsonl", "--vocab_size=2000")
    tokens = load(tmp_path / "out")[3].tokens
    learned = {i for i in range(100) if any(chr(0x4e00 + i).encode() * 2 in token for token in tokens)}
    assert learned == set(range(100)) - {int(text.split()[0]) for text in val}
    prepare(tmp_path, "a.jsonl", "--vocab_size=2000", "--train_bytes=5000")
    tokens = load(tmp_path / "out")[3].tokens
    some = {i for i in range(100) if any(chr(0x4e00 + i).encode() * 2 in token for token in tokens)}
    assert 5 < len(some) < 60 and some < learned and max(some) > 80, "a part, from all over the file"


def test_rows_of_every_kind_of_file(tmp_path):
    """Each holds the same two texts; the values are written by hand."""
    two = 'say "hi",\n日本'
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n' + json.dumps({"text": two, "n": 1}))
    (tmp_path / "a.ndjson").write_text('\ufeff{"n": 1, "text": "one"}\r\n' + json.dumps({"text": two}) + "\r\n")
    (tmp_path / "a.json").write_text(json.dumps([{"text": "one"}, {"text": two}], indent=1))
    (tmp_path / "b.json").write_text(json.dumps({"version": 1, "data": [{"text": "one"}, {"text": two}]}))
    (tmp_path / "a.csv").write_text('n,text\n1,one\n2,"say ""hi"",\n日本"\n')
    (tmp_path / "b.csv").write_text('text;n\r\none;1\r\n"say ""hi"",\n日本";2\r\n')
    (tmp_path / "a.tsv").write_text('text\tn\none\t1\n"say ""hi"",\n日本"\t2\n')
    expected = sorted([[*b"one", 256], [*two.encode(), 256]])
    for name in ("a.jsonl", "a.ndjson", "a.json", "b.json", "a.csv", "b.csv", "a.tsv"):
        prepare(tmp_path, name, "--tokenizer=byte", "--val_fraction=0.3")
        meta, train, val, _ = load(tmp_path / "out")
        assert sorted([train.tolist(), val.tolist()]) == expected and meta["documents"] == 2, name


def test_end_of_text_in_a_file_ends_a_document_and_in_a_row_does_not(tmp_path):
    """tiktoken, which may read <|endoftext|> as a token, gives equal tokens."""
    text = "".join(f"Story {i} of a fox.\n<|endoftext|>\n" for i in range(200)) + "The end.\n"
    (tmp_path / "a.txt").write_text(text)
    prepare(tmp_path, "a.txt", "--vocab_size=300", "--val_fraction=0.2")
    meta, train, val, tokenizer = load(tmp_path / "out")
    assert meta["documents"] == 201
    tiktoken = pytest.importorskip("tiktoken")
    theirs = tiktoken.Encoding("theirs", pat_str=tokenizer.pattern, special_tokens={EOT: 299},
                               mergeable_ranks={token: i for i, token in enumerate(tokenizer.tokens)})
    ids = np.array([*theirs.encode(text, allowed_special="all"), 299])
    wanted = sorted(part.tolist() for part in np.split(ids, np.flatnonzero(ids == 299) + 1)[:-1])
    found = [part.tolist() for ids in (train, val) for part in np.split(ids, np.flatnonzero(ids == 299) + 1)[:-1]]
    assert sorted(found) == wanted
    write_jsonl(tmp_path / "a.jsonl", ["a<|endoftext|>b", "c" * 15])
    whole(tmp_path, ["a<|endoftext|>b", "c" * 15], "a.jsonl", "--tokenizer=byte", "--val_fraction=0.5")


def test_end_of_text_across_pieces(tmp_path):
    """PIECE is 10 bytes, so that nearly every <|endoftext|> is read in two parts."""
    source = (ROOT / "data.py").read_text()
    (tmp_path / "data.py").write_text(source.replace("PIECE = 4 * 2**20", "PIECE = 10"))
    texts = [f"{n}:" + "x" * n for n in range(1, 40)]
    (tmp_path / "a.txt").write_text(EOT.join(texts))
    done = data(tmp_path, "a.txt", "--out=out", "--tokenizer=byte", "--val_fraction=0.3", script=tmp_path / "data.py")
    assert done.returncode == 0, done.stderr
    assert sorted(sum(documents(tmp_path / "out"), [])) == sorted(texts)


MIXED = {
    "notes/a.txt": b"a text\n" * 400,
    "notes/utf16.txt": "größer".encode("utf-16"),
    "notes/rows.jsonl": b'{"text": "one"}\n{"text": \n{"txt": "no"}\n{"text": 7}\n[1]\n{"text": "two"}\n',
    "notes/table.csv": b"id,text\n1,a cell\n2\n",
    "notes/chat.jsonl": b'{"messages": [{"role": "user", "content": "hi"}]}\n',
    "notes/pairs.jsonl": b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n',
    "notes/alpaca.json": b'[{"instruction": "a", "input": "", "output": "b"}]',
    "notes/package.json": b'{\n "name": "x"\n}',
    "notes/broken.json": b"{",
    "notes/latin 1.txt": "Le café était là".encode("cp1252"),
    "notes/russian.txt": "Все счастливые семьи похожи".encode("koi8-r"),
    "notes/picture": b"\x89PNG\0",
}
AGAIN = "run `python data.py notes --tokenizer=byte --out=out --field=NAME`, then train.py with --data=out"
SKIPPED = f"""skipped 7 files:
  notes/alpaca.json, row 1 has no field 'text', but 'instruction', 'input', 'output': sft.py reads it with \
--data=notes/alpaca.json, or {AGAIN}
  notes/broken.json: no JSON can be read (Expecting property name enclosed in double quotes: line 1 column 2 \
(char 1)): correct it, or copy the file again
  notes/chat.jsonl, line 1 has no field 'text', but 'messages': sft.py reads it with --data=notes/chat.jsonl, or \
{AGAIN}
  notes/latin 1.txt is not UTF-8 text (byte 6): convert it with iconv -f CP1252 -t UTF-8 'notes/latin 1.txt' > \
'notes/latin 1-utf8.txt'
  notes/package.json, row 1 has no field 'text', but 'name': {AGAIN}
  notes/pairs.jsonl, line 1 has no field 'text', but 'prompt', 'chosen', 'rejected': dpo.py reads it with \
--data=notes/pairs.jsonl, or {AGAIN}
  notes/russian.txt is not UTF-8 text (byte 0): convert it with iconv -f KOI8-R -t UTF-8 notes/russian.txt > \
notes/russian-utf8.txt
skipped 1 binary file, such as notes/picture
skipped 5 of 8 rows, such as:
"""


def test_a_folder_of_mixed_files(tmp_path):
    """What cannot be read is named, with what to do; the rest is read."""
    (tmp_path / "notes").mkdir()
    for name, content in MIXED.items():
        (tmp_path / name).write_bytes(content)
    said = prepare(tmp_path, "notes", "--tokenizer=byte")
    assert said.startswith(SKIPPED) and said.count("\n  notes/rows.jsonl, line ") + said.count("table.csv, line ") == 3
    _, train, val, tokenizer = load(tmp_path / "out")
    texts = [part for ids in (train, val) for part in tokenizer.decode(ids).split(EOT) if not part.startswith("a text")]
    assert sorted(filter(None, texts)) == sorted(["größer", "one", "two", "a cell"])
    done = data(tmp_path, "notes", "--tokenizer=byte", "--strict=True", "--out=b")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (tmp_path / "b").exists()
    for i in range(4):
        (tmp_path / "notes" / f"more{i}.txt").write_bytes(b"caf\xe9 noir")
    said = prepare(tmp_path, "notes", "--tokenizer=byte", out="c")
    listed = (tmp_path / "c" / "skipped.txt").read_text().splitlines()
    assert said.startswith("skipped 11 files, all listed in c/skipped.txt, such as:\n  ") and len(listed) == 11
    assert {f"  {line}" for line in listed} > set(said.splitlines()[1:11])
    for i in range(4):
        (tmp_path / "notes" / f"more{i}.txt").unlink()
    prepare(tmp_path, "notes", "--tokenizer=byte", out="c")
    load(tmp_path / "c")  # skipped.txt, which is out of date, is gone


def test_a_file_that_breaks_off_in_the_middle_is_left_out_as_a_whole(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes(b"word " * 10**6 + b"\xe9 caf\xe9")  # read in two pieces
    (tmp_path / "in" / "b.txt").write_bytes(b"other\n" * 2000)
    for seed in (1, 2, 3):
        assert "in/a.txt is not UTF-8 text (byte 5000000)" in prepare(tmp_path, "in", "--tokenizer=byte",
                                                                     f"--seed={seed}")
        _, train, val, tokenizer = load(tmp_path / "out")
        assert tokenizer.decode(train) + tokenizer.decode(val[:-1]) == "other\n" * 2000


def test_up_to_date(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", some_texts())
    arguments = ["a.jsonl", "--tokenizer=byte"]
    assert "up to date" not in prepare(tmp_path, *arguments)
    before = (tmp_path / "out" / "train.bin").stat().st_mtime_ns
    assert prepare(tmp_path, *arguments) == "out is up to date\n"
    assert (tmp_path / "out" / "train.bin").stat().st_mtime_ns == before
    assert "up to date" not in prepare(tmp_path, *arguments, "--seed=4")
    whole(tmp_path, some_texts(), *arguments)
    write_jsonl(tmp_path / "a.jsonl", some_texts(61))
    whole(tmp_path, some_texts(61), *arguments)
    os.utime(tmp_path / "a.jsonl", ns=(0, 0))
    assert "up to date" not in prepare(tmp_path, *arguments)
    (tmp_path / "out" / "val.bin").write_bytes(b"")
    assert "up to date" not in prepare(tmp_path, *arguments)
    ids = np.fromfile(tmp_path / "out" / "train.bin", np.uint16)
    np.array([257, *ids[1:]], np.uint16).tofile(tmp_path / "out" / "train.bin")  # beyond the vocabulary
    assert "up to date" not in prepare(tmp_path, *arguments) and load(tmp_path / "out")[1].max() == 256


def test_killed_in_the_middle(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", some_texts())
    whole(tmp_path, some_texts(), "a.jsonl", "--tokenizer=byte")
    before = documents(tmp_path / "out")
    (tmp_path / "long.txt").write_text("some words of text\n" * 3_000_000)
    process = subprocess.Popen([sys.executable, ROOT / "data.py", "long.txt", "--tokenizer=byte", "--out=out"],
                               cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    part = tmp_path / "out" / "train.bin.tmp"
    while process.poll() is None and not (part.exists() and part.stat().st_size):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL and part.exists()
    for name in tmp_path.glob("out/*.tmp"):
        name.rename(tmp_path / name.name)
    assert documents(tmp_path / "out") == before
    for name in tmp_path.glob("*.tmp"):
        name.rename(tmp_path / "out" / name.name)
    whole(tmp_path, some_texts(), "a.jsonl", "--tokenizer=byte")  # it also removes the files that the killed run left


@pytest.mark.parametrize("source, name", [("in", "in/meta.json"), ("in/*", "in/val.bin"), ("link/a.txt", "in/a.txt")])
def test_no_source_is_written_over(tmp_path, source, name):
    """The output's files may be neither a file of the source nor a link to one."""
    (tmp_path / "in").mkdir()
    for file in {name, "in/b.txt"}:
        (tmp_path / file).write_bytes(LINES)
    (tmp_path / "link").symlink_to("in")
    (tmp_path / "out").mkdir()
    if source.startswith("link"):
        (tmp_path / "out" / "train.bin").symlink_to("../in/a.txt")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    done = data(tmp_path, source, "--out=" + ("out" if source.startswith("link") else "in"), "--tokenizer=byte")
    assert done.returncode == 2 and "would overwrite" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def bad(name: str, content: bytes = b"", *arguments, message: str):
    return pytest.param(name, content, arguments, message, id=message)


LINES = b"".join(b'{"text": "line %d"}\n' % i for i in range(300))


@pytest.mark.parametrize("name, content, arguments, message", [
    bad("", message="none.txt is not a file, a folder"),
    bad("a.txt", b"", message="holds no text"),
    bad("in/a", b"", message="in holds no text"),
    bad("in/b", b"\0", message="its 1 files are binary"),
    bad("a.txt", b"abc\0def", message="a.txt is not UTF-8 text (byte 3)"),
    bad("a.txt", b"x" * 5_000_000 + b"\xe9", message="a.txt is not UTF-8 text (byte 5000000)"),
    bad("a.txt", b"x" * (4 * 2**20 - 1) + b"\xc3(", message=f"a.txt is not UTF-8 text (byte {4 * 2**20 - 1})"),
    bad("a.txt", b"abc\xc3", message="a.txt is not UTF-8 text (byte 3)"),
    bad("a.jsonl", LINES + b'{"text": \n', "--strict=True", message="a.jsonl, line 301: no JSON can be read"),
    bad("a.jsonl", b'{"text": \n' * 2, message="a.jsonl, line 1: no JSON can be read"),
    bad("a.jsonl", b'"text"\n', message="object in { }"),
    bad("a.jsonl", b'{"text": "caf\xe9"}\n', message="convert it with iconv -f CP1252 -t UTF-8 a.jsonl > a-utf8.jsonl"),
    bad("a.json", b'{\n"a": 1}\n', message="a.json, row 1 has no field 'text', but 'a': run `python "),
    bad("a.json", b"[1, 2]", message="object in { }"),
    bad("a.csv", b"id,body\n1,x\n", message="no field 'text', but 'id', 'body': run `python data.py a.csv"),
    bad("a.pkl", b"I1\n.", message="a.pkl is a pickle"),
    bad("a.txt.gz", b"\x1f\x8b\x08\0", message="convert it with gunzip -k a.txt.gz"),
    bad("a.jsonl", b'{"messages": [], "id": 1}\n', message="has no field 'text', but 'messages', 'id'"),
    bad("a.jsonl", b'{"messages": []}\n', "--field=messages", message="field 'messages' is list, not text"),
    bad("a.jsonl", b'{"text": "same"}\n' * 9, message="are all equal"),
    bad("a.parquet", b"nonsense", message="a.parquet is not a parquet file"),
    bad("a.txt", LINES, "--tokenizer=gtp2", message="unknown tokenizer 'gtp2': did you mean gpt2?"),
    bad("a.txt", LINES, "--tokenizer=bite", message="did you mean byte?"),
    bad("a.txt", LINES, "--tokenizer=hf", message="unknown tokenizer 'hf': choose one of byte, char, bpe, gpt2"),
    bad("a.txt", LINES, "--tokenizer=a.safetensors", message="no checkpoint at a.safetensors"),
    bad("a.safetensors", LINES, "--tokenizer=a.safetensors", message="a.safetensors is not a whole safetensors file"),
    bad("a.txt", LINES, "--vocab_size=256", message="257 or more"),
    bad("a.txt", LINES, "--val_fraction=1", message="between 0 and 1"),
    bad("a.txt", LINES, "--max_bytes=-1", message="0 or more"),
    bad("a.txt", b"a", "--tokenizer=byte", message="only 1 training and 1 validation tokens"),
    bad("a.txt", LINES, "--out=a.txt/out", message="cannot write to a.txt/out"),
    bad("a.txt", LINES, "--out=a.txt", message="cannot write to a.txt"),
])
def test_bad_input(tmp_path, name, content, arguments, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    if name:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    done = data(tmp_path, name.split("/")[0] or "none.txt", *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_hints_are_right_for_train_py(tmp_path):
    """train.py has no --field and no --val_fraction: what data.py tells a user of train.py can be pasted."""
    (tmp_path / "my notes.jsonl").write_text("".join(f'{{"body": "line {i} of a text"}}\n' for i in range(2000)))
    small = "--max_iters=1", "--n_layer=1", "--n_embd=32", "--block_size=32", "--eval_windows=2", "--out_dir=run"

    def train(*arguments):
        return prepared.run([sys.executable, ROOT / "train.py", *small, *arguments], cwd=tmp_path, timeout=100)

    def pasted(told: str, *words: str) -> str:
        """Run the command that an error names, with the words that a user fills in, and train.py on the folder."""
        command, folder = re.search("run `python (.*?)`, then train.py with (.*)\n", told).groups()
        for word in words:
            command = command.replace(*word.split("="))
        script, *arguments = shlex.split(command)
        done = data(tmp_path, *arguments, script=ROOT / script)
        assert done.returncode == 0, done.stderr
        trained = train(*shlex.split(folder), "--overwrite=True")
        assert trained.returncode == 0, trained.stderr
        return done.stdout

    done = train("--data=none")
    assert done.returncode == 2 and "--" not in done.stderr, done.stderr
    done = train("--data=my notes.jsonl", "--tokenizer=byte")
    assert done.returncode == 2 and done.stderr.startswith("data.py: my notes.jsonl, line 1 has no field 'text', but ")
    told = pasted(done.stderr, "NAME=body")
    few = load(tmp_path / "data" / "my-notes-byte")[0]["val_tokens"]
    assert f"only {few:,} tokens for validation" in told and "--val_fraction=0.13`" in told
    pasted(told)
    assert load(tmp_path / "data" / "my-notes-byte")[0]["val_tokens"] > few


def test_shakespeare_is_checked(tmp_path):
    (tmp_path / "wrong.txt").write_text("To be, or not to be\n" * 1000)
    source = (ROOT / "data.py").read_text()
    url = source.split('SHAKESPEARE_URL = "')[1].split('"')[0]
    script = tmp_path / "data.py"
    script.write_text(source.replace(url, (tmp_path / "wrong.txt").as_uri()))
    before = sorted(tmp_path.rglob("*"))
    done = data(tmp_path, "shakespeare", script=script)
    assert done.returncode == 2 and "SHA-256 differs" in done.stderr and done.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    script.write_text(source.replace(url, (tmp_path / "missing.txt").as_uri()))
    done = data(tmp_path, "shakespeare", script=script)
    assert done.returncode == 2 and "save it as data/tinyshakespeare.txt" in done.stderr
    digest = hashlib.sha256((tmp_path / "wrong.txt").read_bytes()).hexdigest()
    right = source.split('SHAKESPEARE_SHA256 = "')[1].split('"')[0]
    assert len(right) == 64
    script.write_text(source.replace(url, (tmp_path / "wrong.txt").as_uri()).replace(right, digest))
    done = data(tmp_path, "shakespeare", "--tokenizer=char", script=script)
    assert done.returncode == 0 and (tmp_path / "data" / "tinyshakespeare.txt").exists(), done.stderr
    load(tmp_path / "data" / "shakespeare-char")
    (tmp_path / "data" / "tinyshakespeare.txt").write_text("changed")
    assert "SHA-256 differs" in data(tmp_path, "shakespeare", "--tokenizer=byte", script=script).stderr


# ---- a checkpoint's tokenizer ----------------------------------------------------------------------------------------


def save_header(path: Path, tokenizer: Tokenizer):
    """A file with a tokenizer in its header, as checkpoints have it."""
    header = {"version": 1, "tokenizer": tokenizer.to_dict()}
    save_file({"w": np.zeros(3, np.float32)}, path, {"tinygpt": json.dumps(header)})


def test_the_tokenizer_of_a_checkpoint(tmp_path):
    """Special tokens may have large ids, which need uint32. By hand: 70000 is the end-of-text token."""
    save_header(tmp_path / "a.safetensors", Tokenizer("byte", [bytes([i]) for i in range(256)], {EOT: 70_000}))
    write_jsonl(tmp_path / "a.jsonl", ["abc", "xyz"])
    done = data(tmp_path, "a.jsonl", "--tokenizer=a.safetensors", "--val_fraction=0.5")
    assert done.returncode == 0, done.stderr
    folder, = (tmp_path / "data").iterdir()
    meta, train, val, tokenizer = load(folder)
    assert meta["dtype"] == "uint32" and tokenizer.n_vocab == 70_001
    assert sorted([train.tolist(), val.tolist()]) == [[97, 98, 99, 70_000], [120, 121, 122, 70_000]]
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "b.safetensors")  # an equal tokenizer: an equal folder
    done = data(tmp_path, "a.jsonl", "--tokenizer=b.safetensors", "--val_fraction=0.5")
    assert done.stdout == f"{folder.relative_to(tmp_path)} is up to date\n"
    save_header(tmp_path / "b.safetensors", Tokenizer("byte", [bytes([i]) for i in range(256)], {EOT: 256}))
    assert data(tmp_path, "a.jsonl", "--tokenizer=b.safetensors").returncode == 0
    assert len(list((tmp_path / "data").iterdir())) == 2 and load(folder)[1].tolist() == train.tolist()


def test_an_imported_tokenizer(tmp_path):
    """Of kind hf, with a token of its own for the start of a document: the ids are those of the tokenizers package."""
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True))
    theirs.pre_tokenizer, theirs.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    texts = [f"{i}: the fox and the crow " * 9 + "é" for i in range(40)]
    theirs.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))]))
    ours = from_tokenizer_json(theirs.to_str(), "<s>", "</s>", add_bos=True)
    assert (ours.kind, ours.bos, ours.eot) == ("hf", 1, 2)
    save_header(tmp_path / "a.safetensors", ours)
    write_jsonl(tmp_path / "a.jsonl", texts)
    prepare(tmp_path, "a.jsonl", "--tokenizer=a.safetensors")
    _, *splits, _ = load(tmp_path / "out")
    parts = [part.tolist() for ids in splits for part in np.split(ids, np.flatnonzero(ids == 2) + 1)[:-1]]
    assert all(ids[-1] == 2 for ids in splits)
    assert sorted(parts) == sorted([1, *theirs.encode(text, add_special_tokens=False).ids, 2] for text in texts)


# ---- what goes wrong outside -----------------------------------------------------------------------------------------


def test_names_beyond_ascii_where_the_locale_has_no_utf8(tmp_path):
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    (tmp_path / "é 日").mkdir()
    (tmp_path / "é 日" / "ü.txt").write_bytes(b"some words\n" * 9000)
    (tmp_path / "é 日" / "café.txt").write_bytes("café".encode("cp1252"))
    (tmp_path / "é 日" / "rows.jsonl").write_bytes(b'{"text": 1}\n{"text": "a"}\n')
    for source, out in (("é 日", ()), ("é 日/ü.txt", ()), ("é 日/*.txt", ("--out=ö",))):
        arguments = [sys.executable, ROOT / "data.py", source, "--tokenizer=byte", *out]
        first, second = (subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True) for _ in "12")
        assert first.returncode == 0 and first.stdout.decode().split("\n")[-5].startswith(f"{source}: "), first.stderr
        assert second.returncode == 0 and second.stdout.decode().endswith(" is up to date\n"), second.stderr
    done = subprocess.run([sys.executable, ROOT / "data.py", "é 日/café.txt"], cwd=tmp_path, env=environment,
                          capture_output=True)
    assert done.returncode == 2 and done.stderr.decode().endswith(
        "convert it with iconv -f CP1252 -t UTF-8 'é 日/café.txt' > 'é 日/café-utf8.txt'\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("name", ["train.bin.tmp", "val.bin.tmp", "meta.json.tmp"])
def test_a_full_disk(tmp_path, name):
    write_jsonl(tmp_path / "a.jsonl", some_texts())
    whole(tmp_path, some_texts(), "a.jsonl", "--tokenizer=byte")
    before = documents(tmp_path / "out")
    (tmp_path / "out" / name).symlink_to("/dev/full")
    done = data(tmp_path, "a.jsonl", "--tokenizer=byte", "--seed=3", "--out=out")
    assert done.returncode == 2 and done.stderr == (
        "data.py: cannot write to out (No space left on device): make room, or run `python data.py a.jsonl "
        "--seed=3 --tokenizer=byte --out=FOLDER`, then train.py with --data=FOLDER\n")
    assert documents(tmp_path / "out") == before, "the old tokens remain"


def test_ctrl_c(tmp_path):
    """One line, and nothing new is left."""
    (tmp_path / "long.txt").write_text("some words of text\n" * 3_000_000)
    command = [sys.executable, ROOT / "data.py", "long.txt", "--vocab_size=257", "--out=out/deep"]
    for number in range(4):
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while not (tmp_path / "out").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(0.2 * number)
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=60)
        if process.returncode == 0:  # it was faster
            break
        assert (process.returncode, said, errors) == (130, "", "stopped\n") and os.listdir(tmp_path) == ["long.txt"]
    assert number > 0


def test_a_folder_of_tokens_is_no_source(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", some_texts())
    prepare(tmp_path, "a.jsonl", "--tokenizer=byte", out="made/x")
    done = data(tmp_path, "made/x", "--out=b")
    assert done.returncode == 2 and "train on them with python train.py --data=made/x\n" in done.stderr
    (tmp_path / "made" / "x" / "meta.json").unlink()
    done = data(tmp_path, "made/x", "--out=b")
    assert done.returncode == 2 and "make it again with python data.py --source=SOURCE --out=made/x\n" in done.stderr
    (tmp_path / "made" / "b.txt").write_text("text\n" * 99)
    assert prepare(tmp_path, "made", "--tokenizer=byte").startswith("made: 1 document, 495 bytes"), "it is passed over"
