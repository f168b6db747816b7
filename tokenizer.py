"""From text to token ids and back.

A tokenizer is a list of byte strings, tokens[id], and a way to choose among them. Three kinds:
    byte    the 256 bytes
    char    the characters of one corpus
    bpe     byte pair encoding (Sennrich et al. 2016, on bytes as in GPT-2): a regex cuts the text into words, and in
            each word the neighbours whose union has the lowest id are merged, until there are none. Trained here by
            rustbpe, or copied from tiktoken; run by tiktoken.
Each has one more token, <|endoftext|>, which stands after every document and which no text can produce.
"""
import base64
import difflib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import numpy as np

from config import UserError

EOT = "<|endoftext|>"
KINDS = ("byte", "char", "bpe")
# As GPT-4's: contractions; letters with one character before them; up to three digits; punctuation with the newlines
# after it; lines that are blank; spaces, of which the last goes to the next word.
PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
           r"|\s*[\r\n]|\s+(?!\S)|\s+")
LONGEST_BLANK = 50_000  # where runs of blanks are cut that are too long for the regex engine (a million)


class Tokenizer:
    def __init__(self, kind: str, tokens: list[bytes], special: dict[str, int], pattern: str = ""):
        self.kind = kind        # byte | char | bpe
        self.tokens = tokens    # by id, special tokens excluded; b"" where there is none
        self.special = special  # their text -> id
        self.pattern = pattern  # bpe: the regex that cuts text into words
        self.n_vocab = max(len(tokens), 1 + max(special.values()))
        self.eot = special[EOT]

    def encode(self, text: str) -> np.ndarray:
        """Token ids (n,), uint32. The text of a special token is encoded like any other text."""
        if self.kind == "bpe":
            return self._encode_bpe(text)
        text = well_formed(text)
        if self.kind == "char":
            return self._encode_chars(text)
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join([self._pieces[i] for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """Length of each token in bytes (n_vocab,), int32; 0 for special tokens, which are no text: for bits a byte."""
        lengths = np.zeros(self.n_vocab, dtype=np.int32)
        lengths[:len(self.tokens)] = [len(token) for token in self.tokens]
        return lengths

    def to_dict(self) -> dict:
        """For JSON: what a checkpoint carries and the browser reads."""
        return {"kind": self.kind, "tokens": [base64.b64encode(token).decode() for token in self.tokens],
                "special": self.special, "pattern": self.pattern}

    @classmethod
    def from_dict(cls, d: dict) -> "Tokenizer":
        if d["kind"] not in KINDS:
            raise UserError(f"a tokenizer of the unknown kind {d['kind']!r}: it must be one of {', '.join(KINDS)}")
        return cls(d["kind"], [base64.b64decode(token) for token in d["tokens"]], d["special"], d["pattern"])

    @cached_property
    def _pieces(self) -> list[bytes]:
        pieces = self.tokens + [b""] * (self.n_vocab - len(self.tokens))
        for name, i in self.special.items():
            pieces[i] = name.encode()
        return pieces

    @cached_property
    def _bpe(self):  # built on first use, as decoding and loading do not need it
        import tiktoken
        ranks = {token: i for i, token in enumerate(self.tokens) if token}
        return tiktoken.Encoding("tinygpt", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens=self.special)

    @cached_property
    def _char_ids(self) -> np.ndarray:
        """Id of each code point, -1 where it has none."""
        points = [ord(token.decode()) for token in self.tokens]
        ids = np.full(max(points, default=0) + 2, -1, dtype=np.int32)
        ids[points] = np.arange(len(points))
        return ids

    def _encode_chars(self, text: str) -> np.ndarray:
        points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        ids = self._char_ids[np.minimum(points, len(self._char_ids) - 1)]  # the last one is -1
        if (ids < 0).any():
            missing = [chr(point) for point in np.unique(points[ids < 0])]
            shown = ", ".join(map(ascii, missing[:10])) + (f" and {len(missing) - 10} more" if missing[10:] else "")
            raise UserError(f"the char tokenizer has no {shown}: leave them out, or prepare data that has them")
        return ids.astype(np.uint32)

    def _encode_bpe(self, text: str) -> np.ndarray:
        # encode_to_numpy is 1.5 times faster than lists on two threads, since it holds no lock while it works.
        # disallowed_special=(): the text of special tokens is no error; it stays text, as no special token is allowed.
        try:
            return self._bpe.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # a lone surrogate, or a run of blanks that overflows the stack of the regex engine
            parts = re.split(rf"(\s{{{LONGEST_BLANK}}})", well_formed(text))
            return np.concatenate([self._bpe.encode_to_numpy(part, disallowed_special=()) for part in parts])


def well_formed(text: str) -> str:
    """What UTF-8 can hold: half of a surrogate pair, which JSON may have, becomes U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def tokens_folder(source: str, tokenizer: str, vocab_size: int) -> str:
    """Where data.py writes the tokens of a source, if it is not told where, and where train.py looks for them."""
    stem = os.path.splitext(os.path.basename(source.rstrip("/")))[0] if os.path.exists(source) else source
    safe = "".join(c if c.isalnum() or c in "._-" else "-" for c in stem)
    return os.path.join("data", f"{safe}-{tokenizer}" + (f"-{vocab_size}" if tokenizer == "bpe" else ""))


def byte_tokenizer() -> Tokenizer:
    return Tokenizer("byte", [bytes([i]) for i in range(256)], {EOT: 256})


def char_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Of all characters in the texts, sorted."""
    characters = set()
    for text in texts:
        characters.update(text)
    return Tokenizer("char", [c.encode() for c in sorted(characters)], {EOT: len(characters)})


def train_bpe(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """vocab_size counts the end-of-text token. Texts should be short of some 100 KB each: 256 are held at a time."""
    import rustbpe
    if vocab_size < 257:
        raise UserError(f"vocab_size={vocab_size}: bpe needs 257 or more, for 256 bytes and the end-of-text token")
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size - 1, buffer_size=256, pattern=PATTERN)
    tokens = [bytes(token) for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])]
    if len(tokens) < vocab_size - 1:
        print(f"the text has no more pairs to merge: the vocabulary has {len(tokens) + 1} tokens, not {vocab_size}",
              file=sys.stderr)
    return Tokenizer("bpe", tokens, {EOT: len(tokens)}, PATTERN)


def tiktoken_tokenizer(name: str) -> Tokenizer:
    """A copy of tiktoken's, so that a checkpoint which holds it never downloads."""
    import tiktoken
    names = [*KINDS, *tiktoken.list_encoding_names()]
    if name not in names:
        raise UserError(f"unknown tokenizer {name!r}: {nearest(name, names)}")
    try:
        encoding = tiktoken.get_encoding(name)
    except OSError as error:
        raise UserError(f"tiktoken could not download {name} ({type(error).__name__}): connect once, or set "
                        f"TIKTOKEN_CACHE_DIR to a folder that holds it, or use --tokenizer=bpe") from error
    tokens = [b""] * (1 + max(encoding._mergeable_ranks.values()))
    for token, i in encoding._mergeable_ranks.items():
        tokens[i] = token
    return Tokenizer("bpe", tokens, dict(encoding._special_tokens), encoding._pat_str)


def nearest(name: str, names: Sequence[str]) -> str:
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {found[0]}?" if found else f"choose one of {', '.join(names)}"
