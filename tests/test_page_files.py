"""Files of the page, in headless Chromium: tokenizer.js against tokenizer.py, safetensors.js against model.py and the
safetensors package."""
import base64
import codecs
import hashlib
import json
import math
import random
import sys
import unicodedata

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiktoken_ext.openai_public as openai
from browser import js
from mlx.utils import tree_flatten
from safetensors import SafetensorError, safe_open

from model import GPT, GPTConfig, load_arrays, load_checkpoint, save_arrays, save_checkpoint
from tokenizer import DIGITS_ALONE, EOT, GPT2_PATTERN, PATTERN, Tokenizer, byte_tokenizer, char_tokenizer


@pytest.fixture
def page(opened):
    """One page for all of these tests, which only call functions of the modules."""
    yield opened
    assert not opened.problems, opened.problems


# ---- tokenizer.js ----------------------------------------------------------------------------------------------------

TEXTS = [
    "", " ", "\n", "a", "def f(x):\n    return x  # it's 12345\n", "don't WE'LL 'ok' I'D YOU'RE o'Ve 'T",
    "'\u017f it'\u017f", "KK\u212a'\u212a'K", "a\r\nb\r\n\r\n  c\t\td   ", "  \r\n \n\r", "a\n \n  \n\tb", "naïve café",
    "ﬁn\u0301 e\u0301\u0327x", "日本語のテキスト。中文", "🙂👩\u200d👩\u200d👧 emoji🇫🇷 👍🏽", "İıſßẞǅΣσς ΑΣ",
    "\x00\x1b\u2028\u2029\x85 \x85a\x85", "\ufeffstart\ufeff end \ufeff", "x\u180e y\u180e", "1234567890" * 3,
    "no\u00a0\u00a0break\u00a0 \u00a0here\u3000 \u200b\u2007\u202f", "١٢٣٤٥ ੧੨੩ ⅷⅧ ½ ① 𝟘𝟙𝟚𝟛", f"x{EOT}y {EOT}{EOT}",
    "\ud83d", "a\ud83da \udc00\udc00 \ud83d\ude42\ud83d", "\udbff\udfff\uffff\ufffe", "\ue000\U000f0000", "ไทย हिन्दी",
    "((((()))))==>>\n\n\n\nfoo", "https://x.y/z?a=b&c=d//", "HTTPResponse camelCaseWord iPhone ÀÉîÕ",
    "한국어 텍스트 \u1100\u1161\u11a8", " " * 1000 + "x" + " " * 997, "\n" * 333, "\t \u3000" * 300 + "b", "ab" * 500,
    "\\ \\n '\" `", "a\uf900\uff0cb \uf900\uff0c\uf900\uff01", "\ufbff\ufc00 \ufb50\ufe8d\ufbb2\ufe8d",
    "'\ufb06\ufffd\uf8ff\ufeff",
]
PIECES = [  # words, signs and blanks of many scripts, for random combinations
    "'s", "'S", "'ſ", "'LL", "'ll", "'Re", "'vE", "'d", "'m", "'t", "'", " ", "  ", "   ", "\n", "\r\n", "\r", "\t",
    "\u00a0", "\x85", "\ufeff", "\u180e", "\u2028", "\u3000", "\u200d", "\u0301", "🙂", "👩\u200d👧", "\ud83d",
    "\udc00", "the", "The", "THE", "naïve", "中文", "é", "12", "1234567", "٣", "½", "/", "==", "(", ")", "_", "a", "b",
    "x\\", "\uf900", "\ufb06", "\ufb1e", "\ufb29", "\ufbff", "\uff0c", "\ufe8d", "\ufffd",
]
# In what this Python's Unicode has not yet, the browser's and tiktoken's may differ. U+0295 was a small letter once.
ASSIGNED = [c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) not in ("Cn", "Cs")]
ASSIGNED.remove("\u0295")


def random_text(rng: random.Random) -> str:
    size = rng.randint(1, 40)
    return "".join(rng.choice(PIECES) if rng.random() < 0.8 else rng.choice(ASSIGNED) for _ in range(size))


RANDOM = [random_text(random.Random(seed)) for seed in range(400)]
RANDOM += ["".join(random.Random(seed).choices(ASSIGNED, k=50)) for seed in range(40)]
PATTERNS = {
    "ours": PATTERN,
    "gpt2 of tokenizer.json": GPT2_PATTERN,
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
              r"|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
             r"|\s+(?!\S)|\s+",
}
ENCODE = """async (dict, texts, special = false) => {
  const { Tokenizer } = await import("/tokenizer.js");
  const enc = new Tokenizer(dict);
  return texts.map((text) => [...enc.encode(text, special)]);
}"""
REFUSED = """async (dicts, text) => {
  const { UserError } = await import("/errors.js");
  const { Tokenizer } = await import("/tokenizer.js");
  return dicts.map((dict) => {
    try {
      new Tokenizer(dict).encode(typeof text === "string" ? text : text[0].repeat(text[1]) + text[2]);
      return "";
    } catch (error) {
      if (!(error instanceof UserError)) throw error;
      return error.message;
    }
  });
}"""


def of_pattern(pattern: str, n_tokens: int = 700) -> Tokenizer:
    """Byte pair encoding on the words of a regex, trained on difficult texts."""
    import rustbpe
    trainer = rustbpe.Tokenizer()
    texts = [text for text in (TEXTS + RANDOM) * 3 if not any("\ud800" <= c <= "\udfff" for c in text)]
    trainer.train_from_iterator(iter(texts), n_tokens, pattern=pattern)
    tokens = [bytes(token) for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])]
    return Tokenizer("bpe", tokens, {EOT: len(tokens)}, pattern)


def bytes_alone(pattern: str) -> Tokenizer:
    """Each id is a byte. Text that the regex does not match is missing from the ids."""
    return Tokenizer("bpe", [bytes([i]) for i in range(256)], {EOT: 256}, pattern)


def assert_encodes_alike(page, enc: Tokenizer, texts: list[str], special: bool = False):
    for text, ids in zip(texts, js(page, ENCODE, enc.to_dict(), texts, special), strict=True):
        assert ids == enc.encode(text, special).tolist(), ascii(text)


@pytest.mark.parametrize("name", PATTERNS)
def test_bpe_encodes_alike(page, name):
    enc = of_pattern(PATTERNS[name])
    assert enc.n_vocab > 600
    assert_encodes_alike(page, enc, TEXTS + RANDOM)


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base"])
def test_the_regexes_of_tiktoken(page, name, monkeypatch):
    monkeypatch.setattr(openai, "load_tiktoken_bpe", lambda *_, **__: {})  # they would download files
    monkeypatch.setattr(openai, "data_gym_to_mergeable_bpe_ranks", lambda *_, **__: {})
    assert_encodes_alike(page, of_pattern(getattr(openai, name)()["pat_str"]), TEXTS + RANDOM)


def test_byte_and_char_encode_alike(page):
    assert_encodes_alike(page, byte_tokenizer(), TEXTS + RANDOM)
    texts = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in TEXTS + RANDOM]
    assert_encodes_alike(page, char_tokenizer(texts), TEXTS + RANDOM)


def test_any_vocabulary_merges_alike(page):
    """Ids in any order, so that merges compete by their ids; ties; tokens that no merges reach; unused ids."""
    for seed in range(60):
        rng = random.Random(seed)
        letters = b"ab" if seed % 2 else b"abc"
        made = {bytes(rng.choices(letters, k=rng.randint(2, 6))) for _ in range(rng.randint(1, 40))}
        tokens = [*({bytes([i]) for i in range(256)} | made), b"", b""]
        rng.shuffle(tokens)
        enc = Tokenizer("bpe", tokens, {EOT: len(tokens) + 3}, r"\w+|\W")
        words = ["".join(rng.choices(letters.decode(), k=rng.randint(1, 30))) for _ in range(60)]
        assert_encodes_alike(page, enc, [*words, "a" * 31, " ".join(words)])


SETS = [
    r"\p{L}", r"\p{N}", r"\s", r"\S", r"\d", r"\D", r"\w", r"\W", ".", r"[^\s\p{L}\p{N}]", r"\P{L}", r"\pN", r"\p{M}",
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\S\n]", r"[^\S\n]", r"[\w.]", r"\p{Han}", r"\p{Letter}", r"[\p{Greek}a-]",
    r"[\u4e00-\u9fa5\x{3040}-\x{309f}\x41]", "(?i:s)", "(?i:k)", "(?i:[^s])", "(?i:[a-z])", "(?i:[P-]|[^ -z])",
    r"(?i:\w)", r"(?i:[\d\s'’])", r"[-\].\^]", r"[+\-*/]",
]


def test_sets_of_characters_over_all_of_unicode(page):
    function = """async (dicts, ranges) => {
      const { Tokenizer } = await import("/tokenizer.js");
      const text = ranges.map(([first, last]) => Array.from({ length: last - first + 1 }, (_, i) =>
        String.fromCodePoint(first + i)).join("")).join("");
      const hashes = [];
      for (const dict of dicts) {
        const hash = new Uint8Array(await crypto.subtle.digest("SHA-256", new Tokenizer(dict).encode(text)));
        hashes.push([...hash].map((byte) => byte.toString(16).padStart(2, "0")).join(""));
      }
      return hashes;
    }"""
    ranges = []
    for point in map(ord, ASSIGNED):
        if ranges and ranges[-1][1] == point - 1:
            ranges[-1][1] = point
        else:
            ranges.append([point, point])
    text, counts = "".join(ASSIGNED), set()
    made = [bytes_alone(f"(?:{regex})+") for regex in SETS]
    for regex, enc, found in zip(SETS, made, js(page, function, [enc.to_dict() for enc in made], ranges), strict=True):
        ids = enc.encode(text)
        assert found == hashlib.sha256(ids.astype("<u4").tobytes()).hexdigest(), regex
        counts.add(len(ids))
    assert len(counts) > 20 and min(counts) > 0


CONSTRUCTS = [
    r"\p{L}++s", r"\p{L}+s", "a?+a", "a?a", "a*+b|a", "(?:ab|a)c", "a{1,2}+a", "a{1,2}+b", "[ab]{2,3}+c?", "a{2}+a",
    "a{2,}+b", "a{0,1}+a", "a{2,2}+a", "a{2}", "a{2,}", "a{1,2}", ".*+.", ".++", "(?:a++|b)+c", "(?:a?+b)+",
    "(?i:s++)t?", "(a|b)+?b", "a??b", "(?<=s)s", "(?<!s)s", "^a", "s$", r"\s++$", "s(?=s)", "s(?!s)", "(?i:GRA)s",
    "(?i:a(?:B)|[c])", r"\x61|\t|\/|\.|\'|-|]|}",
]


def test_constructs(page):
    texts = ["grass s", "aaaa", "aab", "abc abac aabc ababc", "bbab", "  a\tb. ", "s\u017f", "GRASS gras", "a/b'-]}",
             "s \n", ""]
    for regex in CONSTRUCTS:
        enc = bytes_alone(regex)
        assert any(len(enc.encode(text)) for text in texts) or regex in (r"\p{L}++s", ".*+."), regex
        assert_encodes_alike(page, enc, texts)


UNKNOWN = [
    r"\ba", "(?i)a", "(?x: a)", "(?-i:a)", "[a&&b]", "[[:alpha:]]", "[a[b]]", "[a--b]", "[a~~b]", "a**", "a{2}{3}",
    "*a", "|+", "(?P<n>a)", "(?<n>a)", r"(a)\1", r"\h", r"\K", r"\Aa", r"\za", r"\R", "(", "(a", ")", "a)", "[a", "[]",
    "[]a]", "[z-a]", r"[a-\d]", "a{,3}", "a{x", r"\p{Klingon}", r"\p{^L}", r"\p{L", r"[\W]", "(?i:é)", r"(?i:\p{L})",
    "\\", "(?i:[a-é])", r"\x{110000}", r"\x{}", "^*", "(?#a)", "[a-", "(?=a)+",
    "(?>ab|a)c", "(?:a|ab)++c", "a??+b", "(?:ab)?+", "", "a|b|", "a*",
]


def test_what_it_does_not_know_it_refuses(page):
    told = js(page, REFUSED, [bytes_alone(regex).to_dict() for regex in UNKNOWN], "a")
    for regex, message in zip(UNKNOWN, told, strict=True):
        assert "regex" in message and "use sample.py" in message, regex


def test_long_words_take_no_more_than_their_length(page):
    rng = random.Random(0)
    random_word = "".join(rng.choices("abcdetnhis", k=300_000))
    texts = ["a" * 300_000, random_word, "=" * 300_000, "中" * 100_000, " " * 900_000 + "x"]
    page.set_default_timeout(60_000)
    assert_encodes_alike(page, of_pattern(PATTERN), texts)


def test_runs_of_blanks_that_python_cuts_are_refused(page):
    cases = [(" ", 999_998, "b"), (" ", 999_999, "b"), ("\u3000\t", 1_500_000, ""), (" ", 20_000_000, ""),
             (" ", 49_999, "\ud83d"), (" ", 50_000, "\ud83d")]
    told = [js(page, REFUSED, [bytes_alone(PATTERN).to_dict()], case)[0] for case in cases]
    assert [bool(message) for message in told] == [False, True, True, True, False, True]
    assert all("blanks" in message for message in told if message)


DECODE = """async (dict, lists) => {
  const { Tokenizer } = await import("/tokenizer.js");
  const enc = new Tokenizer(dict);
  const streams = lists.map((ids) => {
    const stream = enc.stream();
    return [...ids.map(stream.push), stream.end()];
  });
  return { texts: lists.map((ids) => enc.decode(ids)), streams, n_vocab: enc.n_vocab, bos: enc.bos, eot: enc.eot,
    kind: enc.kind, pieces: enc.pieces.map((bytes) => [...bytes]) };
}"""
GAPS = Tokenizer(  # tokens that cut characters, an unused id, special tokens between and after the others
    "bpe", [bytes([i]) for i in range(256)] + [b"", "\ufeffé\n\\ ".encode(), b"\xe4\xb8", b"\xad\xf0\x9f"],
    {EOT: 256, "<|\\é\n|>": 266, "<s>": 264}, PATTERN, bos=264)
ILL_FORMED = [b"\xe2\x82", b"\xed\xa0\x80a", b"\xf0\x80\x80\x80", b"\xf4\x90\x80\x80", b"\xc0\xaf", b"\xf0\x9f\x99",
              b"\xe2\xe2\x82\x82", b"\xef\xbb\xbfa\xef\xbb\xbf"]


@pytest.mark.parametrize("kind", ["byte", "char", "bpe", "gaps"])
def test_decode_and_stream_are_pythons(page, kind):
    rng = np.random.default_rng(0)
    chars = "aé\n\x85\x7f\u00a0\ufeff\\ 🙂\U000e0001\u0301中\u2028"
    enc = {"byte": byte_tokenizer, "char": lambda: char_tokenizer([chars]), "bpe": lambda: of_pattern(PATTERN),
           "gaps": lambda: GAPS}[kind]()
    texts = [chars] if kind == "char" else TEXTS + RANDOM
    lists = [enc.encode(text).tolist() for text in texts]
    lists += [rng.integers(0, enc.n_vocab, size).tolist() for size in [0, 1, 2, 3, 30, 300] + [12] * 200]
    if kind != "char":
        lists += [[*part] for part in ILL_FORMED] + [(128 + rng.integers(0, 128, 40)).tolist() for _ in range(200)]
    found = js(page, DECODE, enc.to_dict(), lists)
    assert found["texts"] == [enc.decode(ids) for ids in lists]
    for ids, pushed in zip(lists, found["streams"], strict=True):
        assert "".join(pushed) == enc.decode(ids)
    for ids, pushed in zip(lists[:len(texts)], found["streams"], strict=False):  # UTF-8: and piece by piece
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        assert pushed == [decoder.decode(enc.decode_bytes([i])) for i in ids] + [decoder.decode(b"", True)]
    assert [found[name] for name in ("n_vocab", "bos", "eot", "kind")] == [enc.n_vocab, enc.bos, enc.eot, enc.kind]
    assert [bytes(piece) for piece in found["pieces"]] == [enc.decode_bytes([i]) for i in range(enc.n_vocab)]


def test_an_id_beyond_the_vocabulary_has_no_text(page):
    function = """async (dict) => new (await import("/tokenizer.js")).Tokenizer(dict).decode([97, 300, 98])"""
    assert js(page, function, byte_tokenizer().to_dict()) == "ab"


def test_tokenizers_that_the_page_makes(page):
    texts = ["", "hello", "b\U0001f642a\ufb01\uffff\n\U00020000a"]
    function = """async (texts) => {
      const { byteTokenizer, charTokenizer } = await import("/tokenizer.js");
      return [byteTokenizer(), ...texts.map(charTokenizer)];
    }"""
    ours = [byte_tokenizer(), *(char_tokenizer([text]) for text in texts)]
    assert js(page, function, texts) == [enc.to_dict() for enc in ours]


def test_bad_tokenizers(page):
    good = byte_tokenizer().to_dict()
    bad = [(None, "holds no tokenizer"), ({}, "unknown kind"), ({**good, "kind": "word"}, "unknown kind"),
           ({**good, "kind": "toString"}, "unknown kind"), ({**good, "tokens": "abc"}, "damaged"),
           ({**good, "tokens": [5]}, "damaged"), ({**good, "tokens": ["?"]}, "damaged"),
           ({**good, "special": None}, "damaged"), ({**good, "special": {EOT: "1"}}, "damaged"),
           ({**good, "special": {EOT: 2**40}}, "damaged"), ({**good, "eot": -1}, "damaged"),
           ({**good, "pattern": 5}, "damaged"), ({**good, "special": {}}, "names no token"),
           ({**good, "added": {"<think>": "x"}}, "damaged"), ({**good, "added": 5}, "damaged"),
           ({**good, "normalizer": "NFKC"}, "damaged"), ({**good, "source": 5}, "damaged")]
    told = js(page, REFUSED, [dict_ for dict_, _ in bad], "a")
    assert [part for _, part in bad if part in told.pop(0)] == [part for _, part in bad]


def test_char_names_what_it_lacks(page):
    told, = js(page, REFUSED, [char_tokenizer(["abc\n"]).to_dict()], "a\tзbз🙂")
    assert all(name in told for name in (r"'\t'", "'з'", "'🙂'")) and "'a'" not in told and told.count("з") == 1


# ---- tokenizer.js: the text of a tokenizer.json ----------------------------------------------------------------------

LLAMA3 = {"type": "Split", "pattern": {"Regex": PATTERNS["llama3"]}, "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
TO_BLANKS = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREPEND = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, TO_BLANKS]}


def sequence(*steps) -> dict:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def metaspace(scheme: str, split: bool) -> dict:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}


SOURCES = {  # normalizer, pre_tokenizer, of byte-level tokenizers, and of SentencePiece's
    "gpt2": (None, BYTES | {"use_regex": True}),
    "llama3": (None, sequence(LLAMA3, BYTES)),
    "smollm": (None, sequence({"type": "Digits", "individual_digits": True}, BYTES | {"use_regex": True})),
    "digits together": (None, sequence({"type": "Digits", "individual_digits": False}, BYTES | {"use_regex": True})),
    "nfc": ({"type": "NFC"}, sequence(LLAMA3 | {"pattern": {"Regex": PATTERNS["qwen2"]}}, BYTES)),
    "prefix": (None, BYTES | {"add_prefix_space": True, "use_regex": True}),
    "lines": (None, sequence(LLAMA3 | {"pattern": {"Regex": "[\r\n]"}}, LLAMA3 | {"pattern": {"Regex": r"\s?\p{L}+"}},
                             LLAMA3 | {"pattern": {"String": "e"}, "behavior": "MergedWithPrevious"}, BYTES)),
    "removed": (None, sequence(LLAMA3 | {"behavior": "Removed", "pattern": {"Regex": r"\p{L}+|\p{N}"},
                                         "invert": True}, BYTES)),
    "llama2": (PREPEND, None),
    "gemma": (TO_BLANKS, LLAMA3 | {"pattern": {"String": " "}, "behavior": "MergedWithPrevious"}),
    "always": (None, metaspace("always", True)), "first": (None, metaspace("first", False)),
    "never": ({"type": "NFC"}, metaspace("never", True)),
}


def source_of(name: str, **model) -> str:
    """A tokenizer.json of these steps, trained on difficult texts, whose merges do not go by ids, with added tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    normalizer, pre = SOURCES[name]
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": normalizer,
             "pre_tokenizer": pre, "post_processor": None, "decoder": None,
             "model": {"type": "BPE", "vocab": {}, "merges": []}}
    trained = tokenizers.Tokenizer.from_str(json.dumps(whole))
    bytes_too = "ByteLevel" in json.dumps(pre)
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet() if bytes_too else []
    texts = [text for text in (TEXTS + RANDOM) * 3 if not any("\ud800" <= c <= "\udfff" for c in text)]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=800, initial_alphabet=letters, limit_alphabet=300,
                                             show_progress=False)
    trained.train_from_iterator(texts, trainer)
    found = json.loads(trained.to_str())
    pieces = [*found["model"]["vocab"]]
    if not bytes_too:
        pieces += [f"<0x{byte:02X}>" for byte in range(256)] + ["<unk>"]
        found["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    random.Random(0).shuffle(pieces)
    found["model"] |= {"vocab": {piece: i for i, piece in enumerate(pieces)}} | model
    names = {"<think>": (False, False), "<think>x": (False, False), "the": (False, True), " \n": (False, False),
             "<|im_end|>": (True, False), "<|im": (False, False)}
    fresh = [text for text in names if text not in pieces]  # one that is a piece keeps its id
    ids = {text: pieces.index(text) if text in pieces else len(pieces) + fresh.index(text) for text in names}
    found["added_tokens"] = [{"id": ids[text], "content": text, "single_word": False, "lstrip": False,
                              "rstrip": False, "normalized": normalized, "special": special}
                             for text, (special, normalized) in names.items()]
    return json.dumps(found)


def of_source(source: str) -> Tokenizer:
    added = json.loads(source)["added_tokens"]
    named = [{token["content"]: token["id"] for token in added if token["special"] == special}
             for special in (True, False)]
    return Tokenizer("hf", [], named[0], "", None, named[0]["<|im_end|>"], source, named[1])


NAMED = ["<think>", "a<think>x <think> the\n", "<|im_end|>a<|im_en", "x the \n <|im <|im_end|>", "<<think>> the the"]


@pytest.mark.parametrize("name, model", [*((name, {}) for name in SOURCES), ("llama3", {"ignore_merges": True}),
                                         ("llama2", {"byte_fallback": False}), ("gemma", {"unk_token": None})])
def test_hf_encodes_as_the_tokenizers_package(page, name, model):
    enc = of_source(source_of(name, **model))
    assert_encodes_alike(page, enc, TEXTS + RANDOM + NAMED)
    ids = [i for text in TEXTS + NAMED for i in enc.encode(text).tolist()]
    assert len(set(ids)) > 100 and set(enc.added.values()) & set(ids) and not set(enc.special.values()) & set(ids)


@pytest.mark.parametrize("flags", [{}, {"rstrip": True}, {"lstrip": True}, {"lstrip": True, "rstrip": True}], ids=str)
@pytest.mark.parametrize("name", SOURCES)
def test_special_tokens_of_hf(page, name, flags):
    """In a chat template, names of special tokens are these tokens, which may take the blanks around them."""
    source = json.loads(source_of(name))
    for token in source["added_tokens"]:
        token.update(flags if token["special"] or token["content"] == "<think>" else {})
    enc = of_source(json.dumps(source))
    assert_encodes_alike(page, enc, [f"a{a}<think>{a}b{a}<think>" for a in ("", " ", " \n\t ")])
    names = [*enc.special, *enc.added]
    texts = [f"{a}user\n Hi{b} \n\t {c}a {a}" for a in names for b in names for c in names] + NAMED + TEXTS
    assert_encodes_alike(page, enc, texts, special=True)
    assert {*enc.special.values()} <= {i for text in texts for i in enc.encode(text, True).tolist()}


@pytest.mark.parametrize("change, says", [
    (dict(normalizer={"type": "NFKC"}), "the normalizer NFKC"),
    (dict(normalizer=TO_BLANKS | {"pattern": {"Regex": "a+"}}), "a regex in its normalizer"),
    (dict(pre_tokenizer={"type": "BertPreTokenizer"}), "the pre-tokenizer BertPreTokenizer"),
    (dict(pre_tokenizer=LLAMA3 | {"behavior": "MergedWithNext"}), "MergedWithNext"),
    (dict(model={"type": "Unigram", "vocab": []}), "the model Unigram"),
    (dict(model={"type": "BPE", "vocab": {}, "merges": [], "end_of_word_suffix": "</w>"}), "end_of_word_suffix"),
    (dict(added_tokens=[{"id": 3, "content": "<x>", "special": False, "single_word": True}]), "<x>"),
], ids=str)
def test_hf_refuses_other_steps_by_name(page, change, says):
    whole = {"added_tokens": [], "normalizer": None, "pre_tokenizer": None, "model": {"vocab": {"a": 0}, "merges": []}}
    enc = Tokenizer("hf", [b"a"], {EOT: 1}, source=json.dumps(whole))
    assert js(page, ENCODE, enc.to_dict(), ["a"]) == [[0]]
    told, = js(page, REFUSED, [Tokenizer("hf", [b"a"], {EOT: 1}, source=json.dumps(whole | change)).to_dict()], "a")
    assert says in told and "use sample.py" in told


def test_added_tokens_of_bpe(page):
    """The longest name at the leftmost place is a token, and bytes that are no token are left out, as in tokenizer.py;
    blanks before digits; NFC."""
    tokens = of_pattern(PATTERNS["qwen2"]).tokens
    tokens[0x80] = tokens[ord("z")] = b""
    added = {"<think>": 1002, "<think>x": 1003, "<|im": 1004, "  ": 1005, "é": 1006}
    texts = TEXTS + RANDOM + NAMED + ["ez zoo fizz", "e\u0301 é", "\u0080"]
    for pattern in (PATTERNS["qwen2"], DIGITS_ALONE):
        for normalizer in ("", "NFC"):
            enc = Tokenizer("bpe", tokens, {EOT: 1000, "<|im_end|>": 1001}, pattern, None, 1001, "", added, normalizer)
            assert_encodes_alike(page, enc, texts)
            assert_encodes_alike(page, enc, [*texts, f"a{EOT}<think>b<|im_end|> c<|im_end|>"], special=True)
            assert js(page, DECODE, enc.to_dict(), [[1002, 65]])["bos"] is None


def test_hf_decodes(page):
    enc = Tokenizer("hf", [b"", b" the", b"\xe2\x82"], {"</s>": 3}, "", 3, 3, "{")
    told, = js(page, REFUSED, [enc.to_dict()], "a")
    assert "damaged" in told
    function = """async (dict) => new (await import("/tokenizer.js")).Tokenizer(dict).decode([1, 2, 3])"""
    assert js(page, function, enc.to_dict()) == enc.decode([1, 2, 3])


# ---- safetensors.js --------------------------------------------------------------------------------------------------

READ = """async (path) => {
  const { readHeader, readTensor } = await import("/safetensors.js");
  const blob = await (await fetch(path)).blob();
  const { meta, tensors, size } = await readHeader(blob);
  const found = {};
  for (const [name, entry] of tensors) {
    const bytes = new Uint8Array(await readTensor(blob, entry));
    found[name] = [entry.dtype, entry.shape, btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""))];
  }
  return { meta, size, found };
}"""
DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "U32": mx.uint32, "I32": mx.int32, "U8": mx.uint8,
          "I64": mx.int64, "BOOL": mx.bool_}


def bits(array: mx.array) -> bytes:
    unsigned = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}[array.dtype.size]
    return np.array(array.view(unsigned) if array.dtype != mx.bool_ else array).tobytes()


def some_arrays() -> dict[str, mx.array]:
    mx.random.seed(0)
    halves = mx.arange(65536).astype(mx.uint16)
    return {"f32": mx.random.normal((3, 5)), "f32.special": mx.array([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-42]),
            "f16": halves.view(mx.float16), "bf16": halves.view(mx.bfloat16), "odd f16": mx.ones((3,), mx.float16),
            "u32": mx.arange(7).astype(mx.uint32) * 613566757, "i32": mx.array([-1, 2**31 - 1]),
            "u8": mx.arange(5).astype(mx.uint8), "i64": mx.array([-2**60, 1]), "bool": mx.array([True, False, True]),
            "é \"name\" 中": mx.zeros((1, 1, 1, 2)), "scalar": mx.array(2.5), "nothing": mx.zeros((0, 4))}


def same(a: mx.array, b: mx.array) -> bool:
    return (a.dtype, a.shape, bits(a)) == (b.dtype, b.shape, bits(b))


def test_reads_every_number(page, server):
    arrays, header = some_arrays(), {"version": 1, "config": {}, "text": "é\"\\ 🙂", "loss": [1.5, None]}
    save_arrays(str(server.folder / "numbers.safetensors"), arrays, header)
    got = js(page, READ, "/checkpoints/numbers.safetensors")
    assert got["meta"] == header and got["size"] == (server.folder / "numbers.safetensors").stat().st_size
    assert got["found"].keys() == arrays.keys()
    for name, (dtype, shape, data) in got["found"].items():
        assert (DTYPES[dtype], tuple(shape)) == (arrays[name].dtype, arrays[name].shape), name
        assert base64.b64decode(data) == bits(arrays[name]), name


def test_floats(page, server):
    """All 65,536 float16 and bfloat16 numbers, bit for bit; for NaN, only that it stays NaN."""
    save_arrays(str(server.folder / "numbers.safetensors"), some_arrays(), {"version": 1, "config": {}})
    function = """async (path, names) => {
      const { readHeader, readTensor, toFloat32 } = await import("/safetensors.js");
      const blob = await (await fetch(path)).blob();
      const { tensors } = await readHeader(blob);
      const found = [];
      for (const name of names) {
        const floats = toFloat32(await readTensor(blob, tensors.get(name)), tensors.get(name).dtype);
        if (!(floats instanceof Float32Array)) throw new Error(name);
        found.push([...new Uint32Array(floats.buffer)]);
      }
      return found;
    }"""
    names = ["f32", "f32.special", "f16", "bf16", "odd f16", "nothing"]
    for name, found in zip(names, js(page, function, "/checkpoints/numbers.safetensors", names), strict=True):
        array = some_arrays()[name]
        wanted = np.array(array.astype(mx.float32)).ravel()
        if name == "f16":
            wanted = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
        found = np.array(found, dtype=np.uint32).view(np.float32)
        nan = np.isnan(wanted)
        assert (np.isnan(found) == nan).all(), name
        assert (found[~nan].view(np.uint32) == wanted[~nan].view(np.uint32)).all(), name
    refused = """async () => {
      const { UserError } = await import("/errors.js");
      try {
        (await import("/safetensors.js")).toFloat32(new ArrayBuffer(4), "U32");
      } catch (error) {
        return error instanceof UserError && error.message;
      }
    }"""
    assert "U32" in js(page, refused)


WRITE = """async (found, meta, asMap) => {
  const { readHeader, readTensor, writeSafetensors } = await import("/safetensors.js");
  const bytesOf = (text) => Uint8Array.from(atob(text), (byte) => byte.charCodeAt(0));
  const entries = Object.entries(found).map(([name, [dtype, shape, text]]) =>
    [name, { dtype, shape, data: asMap ? bytesOf(text) : new DataView(bytesOf("AAAA" + text).buffer, 3) }]);
  const blob = writeSafetensors(asMap ? new Map(entries) : Object.fromEntries(entries), meta);
  const again = await readHeader(blob);
  if (JSON.stringify(again.meta) !== JSON.stringify(meta) || again.tensors.size !== entries.length) throw new Error();
  for (const { dtype, start } of again.tensors.values()) {
    if (start % ({ F32: 4, U32: 4, I32: 4, F16: 2, BF16: 2, I64: 8 }[dtype] ?? 1)) throw new Error("not aligned");
  }
  const bytes = new Uint8Array(await blob.arrayBuffer());
  return btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
}"""


@pytest.mark.parametrize("as_map", [True, False])
def test_writes_what_python_reads(page, tmp_path, as_map):
    arrays, header = some_arrays(), {"version": 1, "config": {"n": 1.5}, "text": "é\"\\ 🙂\n", "none": None}
    names = {dtype: name for name, dtype in DTYPES.items()}
    found = {name: [names[array.dtype], array.shape, base64.b64encode(bits(array)).decode()]
             for name, array in arrays.items()}
    content = base64.b64decode(js(page, WRITE, found, header, as_map))
    (tmp_path / "x.safetensors").write_bytes(content)
    assert int.from_bytes(content[:8], "little") % 8 == 0
    loaded, meta = load_arrays(str(tmp_path / "x.safetensors"))
    assert meta == header and loaded.keys() == arrays.keys()
    assert all(same(array, arrays[name]) for name, array in loaded.items())


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "packed"])
def test_checkpoints_there_and_back(page, server, tmp_path, kind):
    model = GPT(GPTConfig(block_size=16, vocab_size=320, n_layer=2, n_head=2, n_embd=64, bias=True), seed=3)
    if kind == "packed":
        nn.quantize(model, 32, 4)
    else:
        model.set_dtype(getattr(mx, kind))
    path = server.folder / f"{kind}.safetensors"
    save_checkpoint(str(path), model, {"tokenizer": of_pattern(PATTERN, 300).to_dict(), "step": 7})
    model, meta = load_checkpoint(str(path))
    got = js(page, READ, f"/checkpoints/{kind}.safetensors")
    assert got["meta"] == meta
    weights = dict(tree_flatten(model.parameters()))
    for name, (dtype, shape, data) in got["found"].items():
        assert (DTYPES[dtype], tuple(shape)) == (weights[name].dtype, weights[name].shape), name
        assert base64.b64decode(data) == bits(weights[name]), name
    (tmp_path / "again.safetensors").write_bytes(base64.b64decode(js(page, WRITE, got["found"], got["meta"], True)))
    again, meta_again = load_checkpoint(str(tmp_path / "again.safetensors"))
    assert meta_again == meta and got["found"].keys() == weights.keys()
    ids = mx.array([[1, 2, 3, 300]])
    assert mx.array_equal(again(ids), model(ids))


HEADERS = """async (files) => {
  const { UserError } = await import("/errors.js");
  const { readHeader } = await import("/safetensors.js");
  const told = [];
  for (const text of files) {
    const blob = new Blob([Uint8Array.from(atob(text), (byte) => byte.charCodeAt(0))]);
    try {
      told.push({ meta: (await readHeader(blob)).meta });
    } catch (error) {
      if (!(error instanceof UserError)) throw error;
      told.push(error.message);
    }
  }
  return told;
}"""


def headers(page, files: list[bytes]) -> list:
    """{"meta": ...} of each file, or the message that refuses it."""
    return js(page, HEADERS, [base64.b64encode(file).decode() for file in files])


def file_of(header, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BAD = {
    "empty": b"",
    "seven bytes": b"1234567",
    "garbage": random.Random(0).randbytes(5000),
    "a picture": b"\x89PNG\r\n\x1a\n" + b"\0" * 100,
    "a text": b"What is this? Just a text file, and a long one. " * 50,
    "a huge header": file_of({}, b"\0" * 100, 100_000_001),
    "the hugest": b"\xff" * 8 + b"{}",
    "a header longer than the file": file_of({"a": tensor()}, b"", 5000),
    "no JSON": file_of(b"{'a': 1}"),
    "no UTF-8": file_of(b'{"\xff": 1}'),
    "deep": file_of(b"[" * 200_000),
    "a list": file_of([]),
    "a number": file_of(5),
    "null": file_of(None),
    "an empty header": file_of(b""),
    "no tensor": file_of({"a": 5}),
    "null for a tensor": file_of({"a": None}),
    "no shape": file_of({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, b"\0" * 8),
    "no dtype": file_of({"a": {"shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8),
    "a dtype in a list": file_of({"a": tensor(["F32"])}, b"\0" * 8),
    "an unknown dtype": file_of({"a": tensor("F31")}, b"\0" * 8),
    "a dtype of all objects": file_of({"a": tensor("toString")}, b"\0" * 8),
    "a negative size": file_of({"a": tensor(shape=[-2])}, b"\0" * 8),
    "half a size": file_of({"a": tensor(shape=[0.5, 4])}, b"\0" * 8),
    "another size": file_of({"a": tensor(shape=[3])}, b"\0" * 8),
    "another dtype": file_of({"a": tensor("F16")}, b"\0" * 8),
    "three offsets": file_of({"a": tensor(offsets=[0, 8, 16])}, b"\0" * 8),
    "turned offsets": file_of({"a": tensor(offsets=[8, 0])}, b"\0" * 8),
    "negative offsets": file_of({"a": tensor(offsets=[-8, 0])}, b"\0" * 8),
    "offsets beyond the file": file_of({"a": tensor()}, b"\0" * 7),
    "offsets beyond all": file_of({"a": tensor(offsets=[2**60, 2**60 + 8])}, b"\0" * 8),
    "overlapping": file_of({"a": tensor(), "b": tensor(offsets=[4, 12])}, b"\0" * 12),
    "the same twice": file_of({"a": tensor(), "b": tensor()}, b"\0" * 8),
    "a gap": file_of({"a": tensor(), "b": tensor(offsets=[12, 20])}, b"\0" * 20),
    "a gap before": file_of({"a": tensor(offsets=[4, 12])}, b"\0" * 12),
    "more than its tensors": file_of({"a": tensor()}, b"\0" * 9),
    "a header of ours that is cut": file_of({"__metadata__": {"tinygpt": '{"version": 1'}}),
}


def test_bad_files(page, tmp_path):
    told = dict(zip(BAD, headers(page, [*BAD.values()]), strict=True))
    for name, message in told.items():
        assert isinstance(message, str), name
        assert message.startswith("This file ") and message.endswith(".") and message.count("\n") == 0, (name, message)
        (tmp_path / "x.safetensors").write_bytes(BAD[name])
        with pytest.raises(ValueError):  # Python refuses it as well
            load_arrays(str(tmp_path / "x.safetensors"))


def test_files_cut_short_anywhere(page, tmp_path):
    path = tmp_path / "x.safetensors"
    save_arrays(str(path), {"a": mx.arange(10), "b": mx.ones((3, 2))}, {"version": 1, "config": {"x": "é"}})
    whole = path.read_bytes()
    told = headers(page, [whole[:size] for size in range(len(whole))] + [whole])
    assert told[-1] == {"meta": {"version": 1, "config": {"x": "é"}}}
    assert all(isinstance(message, str) for message in told[:-1])


def test_what_python_reads_the_page_reads(page, tmp_path):
    """The page and Python accept and refuse the same files, among files with one changed byte in the header."""
    path = tmp_path / "x.safetensors"
    save_arrays(str(path), {"a": mx.arange(10), "b": mx.ones((3, 2))}, {"version": 1})
    whole, rng = path.read_bytes(), random.Random(0)
    files = []
    for _ in range(1500):
        file = bytearray(whole)
        file[rng.randrange(8 + int.from_bytes(whole[:8], "little"))] = rng.choice(b'0123456789"[]{},: aF\\\xff')
        files.append(bytes(file))
    read = 0
    for file, told in zip(files, headers(page, files), strict=True):
        path.write_bytes(file)
        try:
            with safe_open(path, "numpy") as opened:
                json.loads((opened.metadata() or {}).get("tinygpt", "null"))
            readable = True
        except (SafetensorError, json.JSONDecodeError):
            readable = False
        assert isinstance(told, dict) == readable, (file, told)
        read += readable
    assert read > 50


def test_a_file_of_others_has_no_meta(page):
    files = [file_of({"a": tensor()}, b"\0" * 8), file_of({}), file_of({"__metadata__": {"format": "pt"}}),
             file_of({"__metadata__": {"tinygpt": "5"}}),
             file_of(json.dumps({"a": tensor()}).encode() + b"   ", b"\0" * 8)]
    assert headers(page, files) == [{"meta": None}] * len(files)


def test_pythons_numbers_that_json_lacks(page):
    meta = {"version": 1, "losses": [math.nan, math.inf, -math.inf], "text": 'NaN \\"Infinity\\ -Infinity'}
    got, = headers(page, [file_of({"__metadata__": {"tinygpt": json.dumps(meta)}})])
    assert got == {"meta": {**meta, "losses": [None] * 3}}


def test_a_file_that_is_changed_while_it_is_used(page, tmp_path):
    save_arrays(str(tmp_path / "x.safetensors"), {"a": mx.arange(10)}, {"version": 1})
    page.set_content("<input type=file>")
    page.set_input_files("input", tmp_path / "x.safetensors")
    size = js(page, "async () => (await document.querySelector('input').files[0].arrayBuffer()).byteLength")
    assert size == (tmp_path / "x.safetensors").stat().st_size  # the browser has seen the first content
    (tmp_path / "x.safetensors").write_bytes(b"another, and a longer one " * 100)
    function = """async () => {
      const { UserError } = await import("/errors.js");
      const { readHeader } = await import("/safetensors.js");
      try {
        await readHeader(document.querySelector("input").files[0]);
      } catch (error) {
        return error instanceof UserError && error.message;
      }
    }"""
    assert "x.safetensors cannot be read any more" in js(page, function)
