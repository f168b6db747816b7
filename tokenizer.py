"""Tokenizers: from text to token ids and back.

A tokenizer has a list of byte strings, tokens[id], and a method to split text into them. There are four kinds:
    byte    the 256 bytes
    char    the characters of one corpus
    bpe     byte pair encoding (Sennrich et al. 2016; on bytes as in GPT-2): a regex splits the text into words; in each
            word, the two neighbours whose concatenation has the lowest id are merged, until no concatenation is a
            token. It is trained by rustbpe, or copied from tiktoken or from a tokenizer.json, and run by tiktoken.
    hf      any other tokenizer.json, stored whole, and run by the tokenizers package
Each also has special tokens, which encoding a text never gives. One of them, <|endoftext|>, ends a document; it also
precedes each document, unless the tokenizer has another special token for that.
"""
import base64
import hashlib
import json
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from functools import cached_property
from importlib.util import find_spec

import numpy as np
from safetensors import SafetensorError, safe_open

from config import UserError, nearest

EOT = "<|endoftext|>"
KINDS = ("byte", "char", "bpe", "hf")
# GPT-4's words: contractions; letters, with one other character before them; up to three digits; punctuation, with the
# newlines after it; blank lines; spaces, the last of which belongs to the next word.
PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
           r"|\s*[\r\n]|\s+(?!\S)|\s+")
LONGEST_BLANK = 50_000  # runs of blanks that are too long for the regex engine (a million) are cut into such pieces


class Tokenizer:
    def __init__(self, kind: str, tokens: list[bytes], special: dict[str, int], pattern: str = "",
                 bos: int | None = None, eot: int | None = None, source: str = ""):
        self.kind = kind        # byte | char | bpe | hf
        self.tokens = tokens    # by id; b"" at ids of special tokens, and at unused ids
        self.special = special  # special tokens: text -> id
        self.pattern = pattern  # bpe: the regex that splits text into words
        self.source = source    # hf: the text of tokenizer.json
        self.n_vocab = max(len(tokens), 1 + max(special.values(), default=0))
        self.eot = special[EOT] if eot is None else eot  # the token after a document
        self.bos = self.eot if bos is None else bos      # the token before a document

    def encode(self, text: str) -> np.ndarray:
        """Token ids (n,), uint32. The text of a special token is encoded like any other text."""
        if self.kind == "bpe":
            return self._encode_bpe(text)
        text = well_formed(text)
        if self.kind == "hf":
            return np.array(self._hf.encode(text, add_special_tokens=False).ids, dtype=np.uint32)
        if self.kind == "char":
            return self._encode_chars(text)
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join([self._pieces[i] for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """The bytes of each token (n_vocab,), int32; 0 for special tokens, which are not text. For bits per byte."""
        lengths = np.zeros(self.n_vocab, dtype=np.int32)
        lengths[:len(self.tokens)] = [len(token) for token in self.tokens]
        return lengths

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that determines the ids of a text."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict:
        """The tokenizer as JSON, for a checkpoint's header, which Python and the browser read."""
        more = {"source": self.source} if self.source else {}
        if (self.bos, self.eot) != (self.special.get(EOT),) * 2:
            more |= {"bos": self.bos, "eot": self.eot}
        return {"kind": self.kind, "tokens": [base64.b64encode(token).decode() for token in self.tokens],
                "special": self.special, "pattern": self.pattern, **more}

    @classmethod
    def from_dict(cls, d: dict) -> "Tokenizer":
        """The tokenizer that to_dict() described. UserError if the description is not whole."""
        try:
            if d["kind"] not in KINDS:
                raise UserError(f"the tokenizer is of unknown kind {d['kind']!r}: it must be one of {', '.join(KINDS)}")
            tokens, ids = [base64.b64decode(token) for token in d["tokens"]], [*d["special"].values()]
            if not all(type(i) is int and i >= 0 for i in ids):
                raise TypeError("ids of special tokens must be whole numbers")
            return cls(d["kind"], tokens, d["special"], d["pattern"], d.get("bos"), d.get("eot"), d.get("source", ""))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"the tokenizer is not whole ({error!r}): copy its file again") from error

    @cached_property
    def _pieces(self) -> list[bytes]:
        pieces = self.tokens + [b""] * (self.n_vocab - len(self.tokens))
        for name, i in self.special.items():
            pieces[i] = name.encode()
        return pieces

    @cached_property
    def _bpe(self):  # built when needed: decoding and loading do without it
        import tiktoken
        ranks = {token: i for i, token in enumerate(self.tokens) if token}
        return tiktoken.Encoding("tinygpt", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens=self.special)

    @cached_property
    def _hf(self):
        try:
            import tokenizers
        except ImportError as error:
            raise UserError("this checkpoint's tokenizer needs the Python package tokenizers: pip install tokenizers"
                            ) from error
        try:
            found = tokenizers.Tokenizer.from_str(self.source)
        except Exception as error:  # the package raises no other type
            raise UserError(f"the tokenizers package cannot read this tokenizer.json ({error}): copy the file again"
                            ) from error
        found.encode_special_tokens = True  # encode their names as ordinary text
        return found

    @cached_property
    def _char_ids(self) -> np.ndarray:
        """The id of each code point (largest code point + 2,), -1 where it has none."""
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
            raise UserError(f"the char tokenizer lacks {shown}: leave them out, or train on text that has them")
        return ids.astype(np.uint32)

    def _encode_bpe(self, text: str) -> np.ndarray:
        # encode_to_numpy is 1.5 times faster than encode on two threads, since it releases Python's lock.
        # disallowed_special=(): names of special tokens in the text are encoded as text, and are not an error.
        try:
            return self._bpe.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # half a surrogate pair, or blanks that overflow the regex engine's stack
            parts = re.split(rf"(\s{{{LONGEST_BLANK}}})", well_formed(text))
            return np.concatenate([self._bpe.encode_to_numpy(part, disallowed_special=()) for part in parts])


def well_formed(text: str) -> str:
    """The text in a form that UTF-8 can hold: half of a surrogate pair, which JSON may have, becomes U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def tokens_folder(source: str, tokenizer: str, vocab_size: int) -> str:
    """The folder in which data.py by default writes the tokens of a source, and in which train.py looks for them. The
    tokenizer may be the file of a checkpoint; checkpoints with equal tokenizers have the same folder."""
    stem = os.path.splitext(os.path.basename(source.rstrip("/")))[0] if os.path.exists(source) else source
    safe = "".join(c if c.isalnum() or c in "._-" else "-" for c in stem)
    if tokenizer.endswith(".safetensors"):
        enc = tokenizer_of(tokenizer)
        name = f"{enc.kind}-{enc.fingerprint[:8]}"
    else:
        name = f"bpe-{vocab_size}" if tokenizer == "bpe" else tokenizer
    return os.path.join("data", f"{safe}-{name}")


def tokenizer_of(path: str) -> Tokenizer:
    """The tokenizer in the header of a checkpoint, read without its weights. UserError if there is none."""
    try:
        with safe_open(path, "numpy") as file:
            header = json.loads((file.metadata() or {}).get("tinygpt", "null"))
    except FileNotFoundError as error:
        raise UserError(f"no checkpoint at {path}: correct the name") from error
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}): copy or train it again") from error
    if not isinstance(header, dict) or not isinstance(header.get("tokenizer"), dict):
        raise UserError(f"{path} holds no tokenizer: give a checkpoint of train.py, or one that a reader imported")
    return Tokenizer.from_dict(header["tokenizer"])


def open_tokens(folder: str) -> tuple[dict, dict[str, np.ndarray]]:
    """Open a folder that data.py wrote: (meta.json, ids {"train": (N,), "val": (M,)}, which are mapped into memory).
    UserError, with the command that makes the folder again, if meta.json is not whole, a file is longer or shorter than
    meta.json says, or an id is not in the tokenizer's vocabulary."""
    path, meta, tokens = os.path.join(folder, "meta.json"), {}, {}
    try:
        with open(path, encoding="utf-8") as file:
            meta = json.load(file)
        meta = meta if isinstance(meta, dict) else {}
        for name, kind in {"dtype": str, "train_tokens": int, "val_tokens": int, "tokenizer": dict}.items():
            if type(meta.get(name)) is not kind:
                raise ValueError(f"it has no {name}")
        if meta["dtype"] not in ("uint16", "uint32"):
            raise ValueError(f"its dtype is {meta['dtype']!r}, not uint16 or uint32")
        dtype, n_vocab = np.dtype(meta["dtype"]).newbyteorder("<"), Tokenizer.from_dict(meta["tokenizer"]).n_vocab
        for split in ("train", "val"):
            path, n = os.path.join(folder, f"{split}.bin"), meta[f"{split}_tokens"]
            if (size := os.path.getsize(path)) != n * dtype.itemsize:
                raise ValueError(f"it has {size:,} bytes, not {n * dtype.itemsize:,} as meta.json says")
            if (largest := largest_id(path, dtype)) >= n_vocab:
                raise ValueError(f"it has the id {largest}, but the tokenizer has {n_vocab} tokens")
            tokens[split] = np.memmap(path, dtype, "r") if n else np.empty(0, dtype)  # an empty file cannot be mapped
    except (OSError, ValueError, RecursionError) as error:  # JSON that is nested too deeply ends in the last
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path} cannot be used ({reason}): {how_to_make(folder, meta)}") from error
    return meta, tokens


def largest_id(path: str, dtype: np.dtype) -> int:
    """The largest id in a token file, -1 if it is empty. Read in parts, as a map of a large file would fill memory."""
    largest = -1
    with open(path, "rb") as file:
        while len(ids := np.fromfile(file, dtype, count=2**20)):
            largest = max(largest, int(ids.max()))
    return largest


def how_to_make(folder: str, meta: dict) -> str:
    """The end of an error message: the command that makes a token folder again."""
    given = meta.get("arguments")  # what data.py was given
    given = given if isinstance(given, dict) and given else {"source": "SOURCE"}
    words = [f"--{name}={value}" for name, value in {**given, "out": folder}.items()]
    return f"make it again with python data.py {shlex.join(words)}"


def byte_tokenizer() -> Tokenizer:
    return Tokenizer("byte", [bytes([i]) for i in range(256)], {EOT: 256})


def char_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A tokenizer of all characters in the texts, sorted."""
    characters = set()
    for text in texts:
        characters.update(text)
    return Tokenizer("char", [c.encode() for c in sorted(characters)], {EOT: len(characters)})


def train_bpe(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Train byte pair encoding. vocab_size includes the end-of-text token. 256 texts are in memory at a time, so that
    each should have at most about 100 KB."""
    import rustbpe
    if vocab_size < 257:
        raise UserError(f"vocab_size={vocab_size}: bpe needs 257 or more, for 256 bytes and the end-of-text token")
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size - 1, buffer_size=256, pattern=PATTERN)
    tokens = [bytes(token) for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])]
    if len(tokens) < vocab_size - 1:
        print(f"no more pairs to merge: the vocabulary has {len(tokens) + 1} tokens, not {vocab_size}",
              file=sys.stderr)
    return Tokenizer("bpe", tokens, {EOT: len(tokens)}, PATTERN)


def tiktoken_tokenizer(name: str) -> Tokenizer:
    """A copy of a tiktoken tokenizer, so that a checkpoint with this tokenizer needs no download."""
    import tiktoken
    names = ["byte", "char", "bpe", *tiktoken.list_encoding_names()]
    if name not in names:
        raise UserError(f"unknown tokenizer {name!r}: {nearest(name, names)}"
                        "; or give a checkpoint, PATH.safetensors, for the tokenizer in it")
    try:
        encoding = tiktoken.get_encoding(name)
    except OSError as error:
        raise UserError(f"tiktoken could not download {name} ({type(error).__name__}): connect to the internet once, "
                        "set TIKTOKEN_CACHE_DIR to a folder that holds it, or use --tokenizer=bpe") from error
    tokens = [b""] * (1 + max(encoding._mergeable_ranks.values()))
    for token, i in encoding._mergeable_ranks.items():
        tokens[i] = token
    return Tokenizer("bpe", tokens, dict(encoding._special_tokens), encoding._pat_str)


# ---- Hugging Face's tokenizer.json -----------------------------------------------------------------------------------

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def from_tokenizer_json(text: str, bos: str = "", eos: str = "") -> Tokenizer:
    """Read a tokenizer.json. The kind is bpe (or byte) if that gives exactly equal ids, else hf. bos and eos: the names
    of the tokens that begin and end a document; without them, the usual names are searched for."""
    try:
        found = json.loads(text)
        model, added = found["model"], {token["content"]: token["id"] for token in found.get("added_tokens") or ()}
        vocab = model["vocab"]
        if not isinstance(vocab, dict):  # Unigram: pairs of a piece and its score
            vocab = {piece: i for i, (piece, _) in enumerate(vocab)}
        byte_level = "ByteLevel" in json.dumps(found.get("decoder") or found.get("pre_tokenizer"))
        tokens = [b""] * (1 + max(vocab.values()))
        for piece, i in vocab.items():
            if piece not in added:
                tokens[i] = bytes_of_letters(piece) if byte_level else bytes_of_piece(piece)
        ends = [eos, EOT, "</s>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>"]
        eot = next((added[name] for name in ends if name in added), None)
        if eot is None:
            raise UserError("tokenizer.json has no token that ends a document: name one as eos_token in "
                            "tokenizer_config.json")
        start = next((added[name] for name in (bos, "<s>", "<|begin_of_text|>") if name in added), eot)
        pattern = bpe_pattern(found)
        exact = pattern is not None and byte_level and merges_go_by_ids(model["merges"], vocab)
        exact = exact and {bytes([i]) for i in range(256)} <= set(tokens)  # tiktoken needs all bytes
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"tokenizer.json cannot be read ({error!r}): copy the file again") from error
    if tokens[:256] == [bytes([i]) for i in range(256)] and not any(tokens[256:]) and not model.get("merges"):
        return Tokenizer("byte", tokens[:256], added, "", start, eot)
    theirs = Tokenizer("hf", tokens, added, "", start, eot, text)
    ours = Tokenizer("bpe", tokens, added, pattern or "", start, eot)
    if exact and same_ids(ours, theirs):
        return ours
    if find_spec("tokenizers"):
        theirs.encode("")  # UserError if the tokenizers package cannot read it
    return theirs


def bpe_pattern(found: dict) -> str | None:
    """The regex that splits text into words, or None if the tokenizer.json does more than byte pair encoding."""
    model, pre = found["model"], found.get("pre_tokenizer") or {}
    plain = model.get("type", "BPE") == "BPE" and not found.get("normalizer") and not any(
        model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"))
    steps = pre.get("pretokenizers", []) if pre.get("type") == "Sequence" else [pre]
    if not plain or not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space", True):
        return None
    if len(steps) == 1 and steps[0].get("use_regex", True):
        return GPT2_PATTERN
    split = steps[0]
    alone = len(steps) == 2 and split.get("type") == "Split" and split.get("behavior") == "Isolated"
    if alone and not split.get("invert") and not steps[1].get("use_regex", True):
        return split["pattern"].get("Regex")
    return None


def merges_go_by_ids(merges: list, vocab: dict[str, int]) -> bool:
    """Whether the tokens that the merges make have increasing ids, as tiktoken assumes. Several merges in a row may
    make one token."""
    ids = [vocab["".join(merge.split(" ") if isinstance(merge, str) else merge)] for merge in merges]
    return ids == sorted(ids)


def same_ids(ours: Tokenizer, theirs: Tokenizer) -> bool:
    """Whether both tokenizers encode a text that has every token twice, in both orders, to equal ids. True if the
    tokenizers package is not installed."""
    pieces = [token.decode("utf-8", "ignore") for token in ours.tokens]
    text = "".join(pieces) + " ".join(reversed(pieces))
    try:
        ids = ours.encode(text)
    except ValueError:  # a regex that tiktoken does not know
        return False
    return not find_spec("tokenizers") or np.array_equal(ids, theirs.encode(text))


def letters_of_bytes() -> dict[int, str]:
    """GPT-2's letters for bytes: printable bytes are their own letters, the others are letters from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


BYTES_OF_LETTERS = {letter: byte for byte, letter in letters_of_bytes().items()}


def bytes_of_letters(piece: str) -> bytes:
    if any(letter not in BYTES_OF_LETTERS for letter in piece):
        return piece.encode()
    return bytes(BYTES_OF_LETTERS[letter] for letter in piece)


def bytes_of_piece(piece: str) -> bytes:
    """The bytes of a SentencePiece token, where U+2581 is a blank, and <0x0A> is a byte."""
    match = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
    return bytes([int(match[1], 16)]) if match else piece.replace("\u2581", " ").encode()


def to_tokenizer_json(enc: Tokenizer) -> dict | None:
    """The tokenizer as a tokenizer.json, for the kinds byte, bpe and hf; None for char."""
    if enc.kind == "hf":
        return json.loads(enc.source)
    if enc.kind not in ("byte", "bpe"):
        return None
    letters, ranks = letters_of_bytes(), {token: i for i, token in enumerate(enc.tokens) if token}
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.get):  # tiktoken merges any two tokens that make a token
        merges += [[spelled[token[:i]], spelled[token[i:]]] for i in range(1, len(token))
                   if token[:i] in ranks and token[i:] in ranks]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    pattern = enc.pattern.replace("?+", "?").replace("++", "+")  # possessive quantifiers only save time
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    added = [{"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": True} for name, i in sorted(enc.special.items(), key=lambda pair: pair[1])]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]} if pattern else level,
            "post_processor": None, "decoder": level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                      "vocab": {spelled[token]: i for token, i in ranks.items()}, "merges": merges}}


if __name__ == "__main__":
    print(f"{sys.argv[0]} has no command of its own: run data.py, which uses it", file=sys.stderr)
    sys.exit(2)
