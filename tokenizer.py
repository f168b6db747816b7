"""Tokenizers: from text to token ids and back.

A tokenizer has a list of byte strings, tokens[id], and a method to split text into them. There are four kinds:
    byte    the 256 bytes
    char    the characters of one corpus
    bpe     byte pair encoding (Sennrich et al. 2016; on bytes as in GPT-2): a regex splits the text into words; in each
            word, the two neighbours whose concatenation has the lowest id are merged, until no concatenation is a
            token. It is trained by rustbpe, or copied from tiktoken or from a tokenizer.json, and run by tiktoken.
    hf      any other tokenizer.json, stored whole, and run by the tokenizers package
Each also has special tokens, which encoding a text never gives. One of them, <|endoftext|>, ends a document; it also
precedes each document, unless the tokenizer has another special token for that, or none. Tokenizers of other projects
may also have added tokens that are not special, as <think>: where a text holds the name of one, it becomes that token.
"""
import base64
import hashlib
import json
import os
import re
import shlex
import sys
import unicodedata
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
                 bos: int | None = -1, eot: int | None = None, source: str = "", added: dict[str, int] | None = None,
                 normalizer: str = ""):
        self.kind = kind        # byte | char | bpe | hf
        self.tokens = tokens    # by id; b"" at ids of special tokens, of added ones in a bpe, and at unused ids
        self.special = special  # special tokens: text -> id
        self.added = added or {}  # added tokens that are not special: text -> id
        self.pattern = pattern  # bpe: the regex that splits text into words
        self.normalizer = normalizer  # bpe: "NFC" if the text gets this Unicode normal form first
        self.source = source    # hf: the text of tokenizer.json
        self.n_vocab = max(len(tokens), 1 + max([*special.values(), *self.added.values()], default=0))
        self.eot = special[EOT] if eot is None else eot  # the token after a document
        self.bos = self.eot if bos == -1 else bos        # the token before a document; None: there is none

    @property
    def start(self) -> list[int]:
        """The tokens before a document: one, or none."""
        return [] if self.bos is None else [self.bos]

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """Token ids (n,), uint32. The text of a special token is encoded like any other text, unless `special`, as for
        a rendered chat template: then it becomes that token."""
        if self.kind == "hf":
            if self._hf.encode_special_tokens == special:  # to set it needs the object, which threads may be using
                self._hf.encode_special_tokens = not special
            return np.array(self._hf.encode(well_formed(text), add_special_tokens=False).ids, dtype=np.uint32)
        if not self.added and not special:
            return self._encode_part(text)
        found = self.added | self.special if special else self.added
        parts, start = [], 0
        for match in self._names.finditer(text):  # an added token's name within a special one's is not found
            if match[0] in found:
                parts += [self._encode_part(text[start:match.start()]), [found[match[0]]]]
                start = match.end()
        return np.concatenate([*parts, self._encode_part(text[start:])]).astype(np.uint32)

    def _encode_part(self, text: str) -> np.ndarray:
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
        """The bytes of each token (n_vocab,), int32; 0 for special tokens, which are not text. For bits per byte."""
        lengths = np.zeros(self.n_vocab, dtype=np.int32)
        lengths[:len(self.tokens)] = [len(token) for token in self.tokens]
        for i in self.added.values():
            lengths[i] = len(self._pieces[i])
        return lengths

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that determines the ids of a text."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict:
        """The tokenizer as JSON, for a checkpoint's header, which Python and the browser read."""
        more = {name: getattr(self, name) for name in ("source", "added", "normalizer") if getattr(self, name)}
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
            tokens, added = [base64.b64decode(token) for token in d["tokens"]], d.get("added", {})
            bos, eot = d.get("bos", -1), d.get("eot")  # bos: without it eot; null: none
            ids = [*d["special"].values(), *added.values(), *(i for i in (eot, bos) if i not in (None, -1))]
            if not all(type(i) is int and i >= 0 for i in ids):
                raise TypeError("ids of special tokens must be whole numbers")
            if (normalizer := d.get("normalizer", "")) not in ("", "NFC"):
                raise ValueError(f"normalizer {normalizer!r}")
            return cls(d["kind"], tokens, d["special"], d["pattern"], bos, eot, d.get("source", ""), added, normalizer)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"the tokenizer is not whole ({error!r}): copy its file again") from error

    @cached_property
    def _pieces(self) -> list[bytes]:
        pieces = self.tokens + [b""] * (self.n_vocab - len(self.tokens))
        for name, i in self.added.items():
            pieces[i] = pieces[i] or name.encode()
        for name, i in self.special.items():
            pieces[i] = name.encode()
        return pieces

    @cached_property
    def _names(self) -> re.Pattern:
        """Finds the names of added and special tokens: the leftmost one, and of several there the longest."""
        names = sorted(filter(None, self.added | self.special), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or "(?!)")

    @cached_property
    def _bpe(self):  # built when needed: decoding and loading do without it
        import tiktoken
        ranks = {token: i for i, token in enumerate(self.tokens) if token}
        ranks |= {bytes([byte]): self.n_vocab + byte for byte in self._missing}  # tiktoken needs all bytes
        return tiktoken.Encoding("tinygpt", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens=self.special)

    @cached_property
    def _missing(self) -> bytes:
        """The bytes that are no token, which can be left out of a vocabulary where the training text lacks them."""
        known = set(self.tokens)
        return bytes(byte for byte in range(256) if bytes([byte]) not in known)

    @cached_property
    def _by_package(self) -> "Tokenizer":
        """The tokenizer as one of kind hf, for texts that tiktoken cannot encode to equal ids."""
        source = json.dumps({**to_tokenizer_json(self), "added_tokens": [], "post_processor": None})
        return Tokenizer("hf", self.tokens, self.special, eot=self.eot, source=source)

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
        if self._missing and set(well_formed(text).encode()) & {*self._missing}:
            return self._by_package.encode(text)  # it removes these bytes from a word before it merges
        if self.normalizer and not unicodedata.is_normalized(self.normalizer, text):
            return self._by_package.encode(text)  # it goes by Unicode 9, which lacks some combining marks
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


def open_tokens(folder: str, part: tuple[int, int] = (0, 1)) -> tuple[dict, dict[str, np.ndarray]]:
    """Open a folder that data.py wrote: (meta.json, ids {"train": (N,), "val": (M,)}, which are mapped into memory).
    UserError, with the command that makes the folder again, if meta.json is not whole, a file is longer or shorter than
    meta.json says, or an id is not in the tokenizer's vocabulary. part (i, n): n processes share out the ids that are
    checked, and this one is number i."""
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
            if (largest := largest_id(path, dtype, part)) >= n_vocab:
                raise ValueError(f"it has the id {largest}, but the tokenizer has {n_vocab} tokens")
            tokens[split] = np.memmap(path, dtype, "r") if n else np.empty(0, dtype)  # an empty file cannot be mapped
    except (OSError, ValueError, RecursionError) as error:  # JSON that is nested too deeply ends in the last
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path} cannot be used ({reason}): {how_to_make(folder, meta)}") from error
    return meta, tokens


def largest_id(path: str, dtype: np.dtype, part: tuple[int, int]) -> int:
    """The largest id in part i of n of a token file, -1 if that is empty. A million ids are read at a time, as a map of
    a large file would fill memory."""
    largest, total = -1, os.path.getsize(path) // dtype.itemsize
    start, end = (total * i // part[1] for i in (part[0], part[0] + 1))
    with open(path, "rb") as file:
        file.seek(start * dtype.itemsize)
        while len(ids := np.fromfile(file, dtype, count=min(2**20, end - start))):
            start, largest = start + len(ids), max(largest, int(ids.max()))
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


def from_tokenizer_json(text: str, bos: str = "", eos: str = "", add_bos: bool = False) -> Tokenizer:
    """Read a tokenizer.json. The kind is bpe (or byte) if that gives exactly equal ids, else hf. A token precedes each
    text only if the file's post_processor says so, or if add_bos does (add_bos_token of tokenizer_config.json), which
    then is the one of the name `bos`. eos: the name of the token that ends a document; without it, the usual names are
    searched for."""
    try:
        found = json.loads(text)
        model, entries = found["model"], found.get("added_tokens") or []
        special = {token["content"]: token["id"] for token in entries if token.get("special")}
        added = {token["content"]: token["id"] for token in entries if not token.get("special")}
        vocab = model["vocab"]
        if not isinstance(vocab, dict):  # Unigram: pairs of a piece and its score
            vocab = {piece: i for i, (piece, _) in enumerate(vocab)}
        byte_level = "ByteLevel" in json.dumps(found.get("decoder") or found.get("pre_tokenizer"))
        tokens = [b""] * (1 + max([*vocab.values(), *added.values()]))
        for piece, i in vocab.items():
            if piece not in special:
                tokens[i] = bytes_of_letters(piece) if byte_level else bytes_of_piece(piece)
        for name, i in added.items():
            tokens[i] = name.encode() if byte_level else bytes_of_piece(name)
        known = special | added
        ends = [eos, EOT, "</s>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>"]
        eot = next((known[name] for name in ends if name in known), None)
        if eot is None:
            raise UserError("tokenizer.json has no token that ends a document: name one as eos_token in "
                            "tokenizer_config.json")
        first = first_token(found)
        if first is None and add_bos:
            first = known.get(bos, vocab.get(bos))
        pattern, normalizer = bpe_pattern(found), (found.get("normalizer") or {}).get("type", "")
        exact = pattern is not None and byte_level and flags_are_simple(entries, bool(normalizer))
        exact = exact and is_tiktokens(model["merges"], vocab, known, model.get("ignore_merges", False))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"tokenizer.json cannot be read ({error!r}): copy the file again") from error
    if tokens[:256] == [bytes([i]) for i in range(256)] and not any(tokens[256:]) and not model.get("merges"):
        return Tokenizer("byte", tokens[:256], special, "", first, eot)
    theirs = Tokenizer("hf", tokens, special, "", first, eot, compact(found), added)
    if exact:
        ids = {*added.values()}
        tokens = [b"" if i in ids else token for i, token in enumerate(tokens)]
        ours = Tokenizer("bpe", tokens, special, pattern, first, eot, "", added, normalizer)
        if same_ids(ours, theirs):
            return ours
    if find_spec("tokenizers"):
        theirs.encode("")  # UserError if the tokenizers package cannot read it
    return theirs


def compact(found: dict) -> str:
    """A tokenizer.json as text without blanks between its parts, and with merges as pairs in one string where no piece
    has a blank, as a header's JSON escapes each quotation mark twice."""
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in found["model"].get("merges") or ()]
    if merges and all(merge.count(" ") == 1 for merge in merges):
        found = {**found, "model": {**found["model"], "merges": merges}}
    return json.dumps(found, ensure_ascii=False, separators=(",", ":"))


def first_token(found: dict) -> int | None:
    """The token that the post_processor of a tokenizer.json puts before a text, or None."""
    steps = found.get("post_processor") or {}
    for step in steps.get("processors", [steps]):
        if step.get("type") == "TemplateProcessing":
            names = []
            for piece in step["single"]:
                if "SpecialToken" not in piece:
                    break
                names.append(piece["SpecialToken"]["id"])
            ids = [i for name in names for i in step["special_tokens"][name]["ids"]]
            if len(ids) > 1:
                raise UserError(f"tokenizer.json puts {len(ids)} tokens before a text ({', '.join(names)}): only one "
                                "is supported")
            return ids[0] if ids else None
        if step.get("type") in ("BertProcessing", "RobertaProcessing"):
            return step["cls"][1]
    return None


def flags_are_simple(entries: list[dict], normalized: bool) -> bool:
    """Whether added tokens are found by their names alone: none takes blanks with it or must be a whole word. With a
    normalizer, a token that is searched for after it must be of blanks, which it does not change; without one, tokens
    that are searched for first must have no character of those that come later."""
    if any(token.get(flag) for token in entries for flag in ("single_word", "lstrip", "rstrip")):
        return False
    later = {token["content"] for token in entries if token.get("normalized")}
    if normalized and any(name.strip(" ") for name in later):
        return False
    first = {letter for token in entries if not token.get("normalized") for letter in token["content"]}
    return not later or not first & {letter for name in later for letter in name}


# GPT-2's words after each digit became a word of its own, as in SmolLM2 and StarCoder: where blanks come before a
# digit, the text that is left ends, so that the last blank belongs to them.
DIGITS_ALONE = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"


def bpe_pattern(found: dict) -> str | None:
    """The regex that splits text into words, or None if the tokenizer.json does more than byte pair encoding of the
    text in the form NFC or as it is."""
    model, regexes = found["model"], bpe_regexes(found)
    if model.get("type", "BPE") != "BPE" or found.get("normalizer") not in (None, {"type": "NFC"}) or any(
            model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback",
                                         "unk_token")):
        return None
    if regexes == [r"\p{N}", GPT2_PATTERN]:
        return DIGITS_ALONE
    return regexes[0] if regexes and len(regexes) == 1 else None


def bpe_regexes(found: dict) -> list[str] | None:
    """The regexes by which a tokenizer.json cuts a text into words, one after the other, each into what it matches and
    what lies between. None if it does anything else before it takes the bytes."""
    pre = found.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", []) if pre.get("type") == "Sequence" else [pre]
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space", True):
        return None
    regexes = []
    for step in steps[:-1]:
        if step.get("type") == "Digits":
            regexes.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
        elif step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            regexes.append(step["pattern"].get("Regex"))
        else:
            return None
    if steps[-1].get("use_regex", True):
        regexes.append(GPT2_PATTERN)
    written_out = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    regexes = [GPT2_PATTERN if regex == written_out else regex for regex in regexes]
    return None if None in regexes else regexes


def is_tiktokens(merges: list, vocab: dict[str, int], known: dict[str, int], ignore_merges: bool) -> bool:
    """Whether tiktoken gives the ids that the merges give, though it merges any two neighbours that make a token, and
    takes a word that is a token as it is. It does if merges stand in the order of the tokens' ids, and if each token's
    own text becomes that token: then no other two tokens that make it can be neighbours. (Of a token whose text does
    not, all pairs that make it must be among the merges, and ignore_merges must be true.)"""
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
    ids = [vocab["".join(pair)] for pair in pairs]
    if ids != sorted(ids) or not find_spec("tokenizers"):
        return ids == sorted(ids)
    from tokenizers import models
    ranks, others = set(pairs), [piece for piece in vocab if piece not in known]
    model = models.BPE({piece: vocab[piece] for piece in others}, pairs)
    for piece in others:
        if [token.id for token in model.tokenize(piece)] != [vocab[piece]]:
            cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
            if not ignore_merges or any(a in vocab and b in vocab and (a, b) not in ranks for a, b in cuts):
                return False
    return True


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
    return {"version": "1.0", "truncation": None, "padding": None,
            "added_tokens": sorted([*added_entries(enc.special, True), *added_entries(enc.added, False)],
                                   key=lambda entry: entry["id"]),
            "normalizer": {"type": enc.normalizer} if enc.normalizer else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]} if pattern else level,
            "post_processor": begin_with(enc.bos, enc._pieces[enc.bos].decode()) if enc.start else None,
            "decoder": level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                      "vocab": {spelled[token]: i for token, i in ranks.items()}, "merges": merges}}


def added_entries(names: dict[str, int], special: bool) -> list[dict]:
    """The entries of added tokens in a tokenizer.json."""
    return [{"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": special} for name, i in names.items()]


def begin_with(bos: int, name: str) -> dict:
    """The post_processor of a tokenizer.json that puts a token before each text."""
    def part(sequence: str, number: int) -> list[dict]:
        return [{"SpecialToken": {"id": name, "type_id": number}}, {"Sequence": {"id": sequence, "type_id": number}}]

    return {"type": "TemplateProcessing", "single": part("A", 0), "pair": part("A", 0) + part("B", 1),
            "special_tokens": {name: {"id": name, "ids": [bos], "tokens": [name]}}}


if __name__ == "__main__":
    print(f"{sys.argv[0]} has no command of its own: run data.py, which uses it", file=sys.stderr)
    sys.exit(2)
