"""gguf_tokenizer.py, against the tokenizers package with each model's own regexes, and against llama.cpp."""
import json
import re

import numpy as np
import pytest
from conftest import ROOT
from peers import llama_cpp

import gguf_tokenizer
from config import UserError
from gguf_tokenizer import PRE, add_tokenizer, fields_of_tokenizer, tokenizer_of
from tokenizer import (
    BYTES_OF_LETTERS,
    EOT,
    Tokenizer,
    byte_tokenizer,
    char_tokenizer,
    from_tokenizer_json,
    train_bpe,
)

gguf = pytest.importorskip("gguf")
package = pytest.importorskip("tokenizers")

TEXTS = [
    "", " ", "\n", "I'll don't WE'VE it'S he'd they're o'clock ’s I’m 'tis", "  leading and trailing  ",
    "1 12 123 1234 12345 1234567 12345678901234567890 3.14159 1,000,000 ½ ² Ⅻ ٣٤٥ a1b2", "12:30 v1.2.3-rc4 0b10 1e-5",
    "日本語のテキスト。中文，測試：한국어 문장입니다", "🙂👩\u200d👩\u200d👧 👍🏽 🇫🇷 ❤️\u200d🔥",
    "ภาษาไทยไม่มีวรรค กำลังทดสอบ",
    "مرحبا بالعالم، كيف حالك؟ اَلْعَرَبِيَّةُ \u200f(RTL)", "tabs\tand\t\ttabs\t\t\tend\t", "crlf\r\nline\r\n\r\nend\r",
    "many      blanks        here   x  y z    ", "blank\n\n\nlines\n\n\n\n\n\nhere\n \n  \n   \nx",
    "nul\x00in\x00\x00side \x00", "control \x01\x02\x06\x07\x0b\x0c\x1b[31m \x7f \x80\x85\x9f !\x04!",
    "\ufeffat the start\ufeff and\ufeffwithin", "cafe\u0301 n\u0303 o\u0302\u0323 \u1112\u1161\u11ab", "café ñ ộ 한",
    f"{EOT} <s>a</s> <|eot_id|> [INST] <unk> <think>\nwell\n</think>",
    "a" * 300 + " " + "ab" * 99 + " Donaudampfschiff",
    "def f(x):\n    if x != 0 and y >= 1:\n        return {'a': [1, 2], \"b\": x**2}  # note\n\n\tpass\n",
    "for (int i = 0; i < n; ++i) { printf(\"%d\\n\", a[i] & 0xFF); } // C++\n#include <stdio.h>\n",
    "\u00a0no-break\u00a0\u2003em \u3000ideographic \u200bzero \u2028ls\u2029",
    "ſ'ſ K'k ß'll İi ǅ CamelCaseWORDS iPhone's",
    "Привет, мир! Ελληνικά Ὕβρις עִבְרִית हिन्दी में বাংলা தமிழ்",
    "http://example.com/a/b?c=d&e=f#g C:\\Win /usr//bin///x",
    "$100 €50 100% #tag @name a+b=c a*b a/b ~`^|<> ... !!! ??? —– “quotes” «g»",
    "𝐀𝐁𝐂 ∑∫√ 𐍈 𓀀 \ue000 \U0010fffd \uffff x",
    "▁▁under▁blocks ▁ <0x0A> Ġ Ċ [PAD0] \ufffd",
    "half \ud83d surrogate \udc00\ud83d\ude42", "   \t \n \t\n x\n\t y   \n",
]
CORPUS = [(ROOT / "README.md").read_text(), *(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                                              for text in TEXTS)] * 2
CONTRACTIONS, LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?\p{L}+"
END = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BIG, SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# As the models' own tokenizer.json have it: steps before the letters of bytes, whether GPT-2's regex follows, NFC.
THEIRS = {
    "gpt-2": ([], True, False),
    "smollm": ([package.pre_tokenizers.Digits(True)], True, False),
    "llama-bpe": ([f"{CONTRACTIONS}|{LETTERS}|\\p{{N}}{{1,3}}|{END}"], False, False),
    "qwen2": ([f"{CONTRACTIONS}|{LETTERS}|\\p{{N}}|{END}"], False, True),
    "gpt-4o": ([rf"[^\r\n\p{{L}}\p{{N}}]?{BIG}*{SMALL}+{CONTRACTIONS}?"
                rf"|[^\r\n\p{{L}}\p{{N}}]?{BIG}+{SMALL}*{CONTRACTIONS}?"
                r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"], False, False),
    "tekken": ([rf"[^\r\n\p{{L}}\p{{N}}]?{BIG}*{SMALL}+|[^\r\n\p{{L}}\p{{N}}]?{BIG}+{SMALL}*"
                r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"], False, False),
    "deepseek-v3": ([r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+",
                     "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
                     "| ?[\\p{P}\\p{S}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"], False, False),
}
ADDED = {"<|im_start|>": True, "<|im_end|>": True, "<think>": False, "</think>": False}  # whether special


def trained(steps, use_regex=False, nfc=False, letters=None):
    """A byte-level tokenizer, trained here by the tokenizers package."""
    pre = package.pre_tokenizers
    theirs = package.Tokenizer(package.models.BPE())
    splits = [pre.Split(package.Regex(step), "isolated") if isinstance(step, str) else step for step in steps]
    theirs.pre_tokenizer = pre.Sequence([*splits, pre.ByteLevel(add_prefix_space=False, use_regex=use_regex)])
    theirs.decoder = package.decoders.ByteLevel()
    if nfc:
        theirs.normalizer = package.normalizers.NFC()
    theirs.train_from_iterator(CORPUS, package.trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=letters or pre.ByteLevel.alphabet(), show_progress=False,
        limit_alphabet=256 if letters is None else len(letters)))
    theirs.add_tokens([package.AddedToken(name, special=special, normalized=False) for name, special in ADDED.items()])
    return theirs


def ids_of(theirs, text, special=False):
    """Their ids; half of a surrogate pair is U+FFFD, as in ours."""
    theirs.encode_special_tokens = not special
    return theirs.encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"),
                         add_special_tokens=False).ids


def fields_of(theirs, pre, **more):
    """The settings that llama.cpp's converter writes for a tokenizer of the package, written out here."""
    found, names = json.loads(theirs.to_str()), theirs.get_vocab(with_added_tokens=True)
    tokens = [name for name, _ in sorted(names.items(), key=lambda pair: pair[1])]
    types = [3 if ADDED.get(name) else 4 if name in ADDED else 1 for name in tokens]
    fields = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types, "eos_token_id": names["<|im_end|>"],
              "merges": [" ".join(pair) for pair in found["model"]["merges"]], **more}
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items() if value is not None}


def write_vocab(path, meta, n):
    """A GGUF file with a tokenizer and next to no weights."""
    writer = gguf.GGUFWriter(str(path), "llama")
    for add in (writer.add_context_length, writer.add_embedding_length, writer.add_feed_forward_length,
                writer.add_rope_dimension_count):
        add(8)
    for add in (writer.add_block_count, writer.add_head_count):
        add(1)
    writer.add_layer_norm_rms_eps(1e-5)
    add_tokenizer(writer, meta, n)
    writer.add_tensor("token_embd.weight", np.zeros((n, 8), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {name: field.contents() for name, field in gguf.GGUFReader(str(path)).fields.items()}


# ---- byte-level ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre", THEIRS)
def test_ids_of_byte_level_tokenizers(pre, tmp_path):
    """From the fields that a converter writes: the ids are those of the package with the model's own regexes, also
    after a checkpoint's header, and after our GGUF file, which names the same regexes."""
    theirs = trained(*THEIRS[pre])
    ours, more = tokenizer_of(fields_of(theirs, pre, bos_token_id=700 if pre != "gpt-2" else None), "a.gguf")
    assert ours.added.keys() == {"<think>", "</think>"} and ours.special.keys() == {"<|im_start|>", "<|im_end|>"}
    assert ours.start == ([700] if pre in ("llama-bpe", "tekken") else []) and more["ends"] == [701]
    assert ours.kind == ("hf" if pre == "deepseek-v3" else "bpe")  # three regexes, one after the other
    meta = {"tokenizer": json.loads(json.dumps(ours.to_dict())), **more}
    fields = write_vocab(tmp_path / "a.gguf", meta, 720)
    again, _ = tokenizer_of(fields, "a.gguf")
    assert fields["tokenizer.ggml.pre"] == pre and again.start == ours.start and again.eot == ours.eot == 701
    for enc in (ours, Tokenizer.from_dict(meta["tokenizer"]), again):
        for text in TEXTS:
            assert enc.encode(text).tolist() == ids_of(theirs, text), ascii(text)
            assert enc.encode(f"{text}<|im_end|>", special=True).tolist() == ids_of(theirs, f"{text}<|im_end|>", True)


def test_bytes_that_are_no_token():
    """SmolLM2 lacks 21 of the 256 bytes. The package drops them before it merges: !, byte 4, ! becomes !!."""
    lost = [4, 6, 19, 20, 22, 29, 192, 193, 241, 242, *range(245, 256)]
    letters = [letter for letter, byte in BYTES_OF_LETTERS.items() if byte not in lost]
    theirs = trained(*THEIRS["smollm"], letters=letters)
    ours, _ = tokenizer_of(fields_of(theirs, "smollm"), "a.gguf")
    assert ours.kind == "bpe" and [*ours._missing] == lost
    for text in (*TEXTS, "!\x04!", "a\x04b", " \x04 x", "'\x04s", "\x04\x04"):
        assert ours.encode(text).tolist() == ids_of(theirs, text), ascii(text)
    assert ours.encode("!\x04!").tolist() == ours.encode("!!").tolist()


def test_merges_stand_in_their_own_order():
    """The ids are sorted by name here, so that they say nothing of the order of the merges."""
    theirs = trained(*THEIRS["gpt-2"])
    found, names = json.loads(theirs.to_str()), sorted(theirs.get_vocab(with_added_tokens=False))
    fields = {"model": "gpt2", "pre": "gpt-2", "tokens": [*names, EOT], "token_type": [1] * len(names) + [3],
              "eos_token_id": len(names), "merges": [" ".join(pair) for pair in found["model"]["merges"]]}
    ours, _ = tokenizer_of({f"tokenizer.ggml.{name}": value for name, value in fields.items()}, "a.gguf")
    assert ours.kind == "hf"
    for text in TEXTS:
        if "<think>" not in text:
            assert [names[i] for i in ours.encode(text)] == [theirs.id_to_token(i) for i in ids_of(theirs, text)]


@pytest.mark.parametrize("pre, says", [(None, "tokenizer.ggml.pre is missing"),
                                       ("new-one", "'new-one', which is not known")])
def test_a_missing_pre_is_told(pre, says, capsys):
    ours, _ = tokenizer_of(fields_of(trained(*THEIRS["gpt-2"]), pre), "a.gguf")
    told = capsys.readouterr().out
    assert says in told and "`default` are assumed" in told and told.count("\n") == 1
    assert ours.decode(ours.encode("12345 a")) == "12345 a"


@pytest.mark.parametrize("more, start", [
    (dict(pre="llama-bpe"), [700]), (dict(pre="llama-bpe", add_bos_token=False), []), (dict(pre="qwen2"), []),
    (dict(pre="qwen2", add_bos_token=True), [700]), (dict(pre="llama-bpe", bos_token_id=None), []),
    (dict(pre="chameleon"), [700]), (dict(pre="smollm"), [])])
def test_the_first_token(more, start):
    """As the file says, else as llama.cpp has it by the name of the regexes; no token is invented."""
    fields = fields_of(trained(*THEIRS["gpt-2"]), **{"bos_token_id": 700, **more})
    assert tokenizer_of(fields, "a.gguf")[0].start == start


def test_the_ends():
    theirs, more = trained(*THEIRS["gpt-2"]), dict(eot_token_id=5, eom_token_id=6)
    assert tokenizer_of(fields_of(theirs, "gpt-2", **more), "a")[1]["ends"] == [701, 5, 6]
    names, none = ["<|return|>", "<|call|>", "<|end|>", "<|endoftext|>"], dict(eos=0, eot=None, eom=None)
    assert gguf_tokenizer.ends_of(names, [3] * 4, none) == [0, 1, 3]  # GPT-OSS: <|end|> ends a part of an answer
    assert gguf_tokenizer.ends_of(["</s>", "<|end|>"], [3] * 2, none) == [0, 1]
    assert gguf_tokenizer.ends_of(["</s>", "<|end|>"], [3, 1], none) == [0]  # an ordinary token


@pytest.mark.parametrize("model, pre, says", [
    ("bert", None, "WordPiece"), ("t5", None, "Unigram"), ("rwkv", None, "RWKV"), ("gpt2", "gemma4", "gemma4"),
    ("new", None, "'new'"), (None, None, "no tokenizer")])
def test_refused_by_name(model, pre, says, capsys):
    fields = {"tokenizer.ggml.model": model, "tokenizer.ggml.pre": pre, "tokenizer.chat_template": "x"}
    ours, more = tokenizer_of(fields, "a.gguf")
    assert ours is None and more == {"chat_template": "x", "template": "own"}
    assert says in (told := capsys.readouterr().out) and told.count("\n") == 1


@pytest.mark.parametrize("spoil, says", [
    (dict(token_type=[1]), "703 tokens and 1 types"), (dict(eos_token_id=None), "which token is eos"),
    (dict(eos_token_id=9999), "which token is eos"), (dict(bos_token_id=-1), "which token is bos"),
    (dict(merges=["a xx"]), "merges ['a', 'xx']"), (dict(tokens=["a"] * 703), "two tokens of one name"),
    (dict(tokens=[f"[{i}]" for i in range(703)], merges=[]), "not byte-level")])
def test_damaged_fields(spoil, says):
    fields = fields_of(trained(*THEIRS["gpt-2"]), "gpt-2", **spoil)
    fields["tokenizer.ggml.token_type"] = fields["tokenizer.ggml.token_type"][:703]
    fields["tokenizer.ggml.tokens"] = fields["tokenizer.ggml.tokens"][:703]
    with pytest.raises(UserError, match=re.escape(says)):
        tokenizer_of(fields, "a.gguf")


# ---- SentencePiece ---------------------------------------------------------------------------------------------------


def pieces():
    """A small SentencePiece vocabulary: pieces with scores, bytes, and tokens in the text."""
    words = ["▁", "t", "h", "e", "a", "n", "▁t", "he", "▁the", "an", "▁a", "▁an", "nd", "▁and", "d", "\n", "the",
             "hean", "ha", "ea", "te", "en", "ed", "da", "nt", "ath", "▁d", "nda"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words, "  ", "<b>"]
    types = [2, 3, 3, *[6] * 256, *[1] * len(words), 4, 4]
    return tokens, types, [0.0] * 259 + [-float(i) for i in range(len(words))] + [0.0, 0.0]


def naive_spm(text, tokens, types, scores, prefix):
    """SentencePiece's merges, from their definition: the pair with the best score first, the leftmost of several."""
    rank = {token: scores[i] for i, token in enumerate(tokens) if types[i] == 1}
    found = []
    for part in re.split("(  |<b>)", text):
        if part in ("  ", "<b>"):
            found.append(tokens.index(part))
        elif part:
            parts = list((" " if prefix else "") + part)
            parts = ["▁" if letter == " " else letter for letter in parts]
            while pairs := [(-rank[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
                            if a + b in rank]:
                _, i = min(pairs)
                parts[i:i + 2] = [parts[i] + parts[i + 1]]
            for piece in parts:
                found += [tokens.index(piece)] if piece in rank else [3 + byte for byte in piece.encode()]
    return found


@pytest.mark.parametrize("prefix", [True, False])
def test_sentence_piece(prefix, tmp_path):
    tokens, types, scores = pieces()
    fields = {"model": "llama", "pre": "default", "tokens": tokens, "token_type": types, "scores": scores,
              "add_space_prefix": prefix}
    ours, more = tokenizer_of({f"tokenizer.ggml.{name}": value for name, value in fields.items()}, "a.gguf")
    assert (ours.kind, ours.bos, ours.eot, more["ends"]) == ("hf", 1, 2, [2])  # llama.cpp's ids where none is named
    written = write_vocab(tmp_path / "a.gguf", {"tokenizer": ours.to_dict(), **more}, len(tokens))
    again, _ = tokenizer_of(written, "a.gguf")
    mixed = np.random.default_rng(0).choice([*"theand "], (20, 40))
    for text in [*map("".join, mixed), "the an and", "and then", "hean the  an", "a<b>the <b> an", "é 世\x00", " ", "",
                 "</s>the<unk>", "\n\nthe"]:
        ids = naive_spm(text, tokens, types, scores, prefix)
        assert ours.encode(text).tolist() == again.encode(text).tolist() == ids, text
    assert (again.start, again.eot, again.added, again.special) == (ours.start, ours.eot, ours.added, ours.special)
    if not prefix:  # else a blank follows each token that the text names
        assert ours.decode(ours.encode("the  an\n<b>é")) == "the  an\n<b>é"


# ---- write -----------------------------------------------------------------------------------------------------------


def test_our_own_tokenizers(tmp_path, capsys):
    """Bytes, and our own bpe, whose regex llama.cpp lacks: the whole tokenizer.json goes into the file beside it."""
    for enc in (byte_tokenizer(), train_bpe(iter(CORPUS), 500)):
        fields = write_vocab(tmp_path / f"{enc.kind}.gguf", {"tokenizer": enc.to_dict()}, enc.n_vocab)
        again, _ = tokenizer_of(fields, "a.gguf")
        assert (again.kind, again.start, again.eot) == (enc.kind, enc.start, enc.eot)
        assert fields["tokenizer.ggml.add_bos_token"] is True
        for text in TEXTS:
            assert again.encode(text).tolist() == enc.encode(text).tolist()
    assert capsys.readouterr().out.count("at runs of newlines") == 1


def refused_json(**changes):
    found = json.loads(trained(*THEIRS["gpt-2"]).to_str())
    found["model"] |= changes.pop("model", {})
    return from_tokenizer_json(json.dumps(found | changes), eos="<|im_end|>")


@pytest.mark.parametrize("make, says", [
    (lambda: char_tokenizer(["ab"]), "a tokenizer of characters"),
    (lambda: refused_json(normalizer={"type": "Lowercase"}), "the normalizer Lowercase"),
    (lambda: refused_json(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}),
     "no list of regexes"),
    (lambda: refused_json(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "q+"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}), r"\(q\+\)"),
    (lambda: refused_json(pre_tokenizer={"type": "Whitespace"}, decoder=None), "neither byte-level nor"),
])
def test_tokenizers_that_are_not_written(make, says):
    with pytest.raises(UserError, match=says):
        fields_of_tokenizer({"tokenizer": make().to_dict()}, 800)


# ---- llama.cpp -------------------------------------------------------------------------------------------------------


# llama.cpp's own approximations: marks within words of one case; the regex \d with \b; a zero-width split.
APART = {"gpt-4o", "tekken", "youtu", "tiny_aya", "superbpe", "afmoe", "spark2_5", "exaone-moe", "deepseek-llm"}


@pytest.mark.parametrize("pre", list({tuple(regexes): pre for pre, regexes in reversed(PRE.items())}.values()))
def test_llama_cpp(pre, tmp_path):
    """One name of each list of regexes: llama.cpp's ids of our file, for texts of ASCII and, but for its own
    approximations, all others that are in the form NFC."""
    theirs = trained(PRE[pre])
    ours, more = tokenizer_of(fields_of(theirs, pre, bos_token_id=700), "a.gguf")
    write_vocab(tmp_path / "a.gguf", {"tokenizer": ours.to_dict(), **more}, 720)
    texts = [text for text in TEXTS if text and "\ud83d" not in text and "cafe\u0301" not in text]
    texts = [text for text in texts if text.isascii() or pre not in APART]
    wrong = [text for text, ids in zip(texts, llama_cpp(tmp_path / "a.gguf", "tokenize", texts=texts), strict=True)
             if ours.encode(text).tolist() != ids]
    assert not wrong, (pre, wrong)


def test_llama_cpp_reads_sentence_piece(tmp_path):
    tokens, types, scores = pieces()
    fields = {"model": "llama", "tokens": tokens, "token_type": types, "scores": scores}
    ours, more = tokenizer_of({f"tokenizer.ggml.{name}": value for name, value in fields.items()}, "a.gguf")
    write_vocab(tmp_path / "a.gguf", {"tokenizer": ours.to_dict(), **more}, len(tokens))
    texts = ["the an and", "hean the  an", "a<b>the <b> an", "é 世", " ", "\n\nthe"]
    assert llama_cpp(tmp_path / "a.gguf", "tokenize", texts=texts) == [ours.encode(text).tolist() for text in texts]
