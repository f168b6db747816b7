"""Many texts to token ids with gigatoken, some 20 times as fast as tiktoken, and equal in every id.

    encode_texts(tokenizer, ["a text", "another"])      # what [tokenizer.encode(text) for text in texts] gives

gigatoken splits texts into words without a regex engine, and remembers the ids of words. It knows only certain
patterns, and its Unicode is newer than tiktoken's: tiktoken encodes all texts where the two could differ, and
everything where gigatoken is not installed.
"""
import base64
import functools
import re
import sys
import tempfile

import numpy as np

from tokenizer import GPT2_PATTERN, LONGEST_BLANK, PATTERN, Tokenizer

TIKTOKENS_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
SCHEMES = {PATTERN: "gpt4", GPT2_PATTERN: "gpt2", TIKTOKENS_GPT2: "gpt2"}  # gigatoken's names of patterns
MANY = 32 * 2**20  # bytes of text, after which gigatoken begins anew: it forgets no word that it has seen
# In UTF-8, the letters and numbers of Unicode 17, which tiktoken does not know, and others of the same rare scripts.
NEW = [b"\xe0\xa2\x8f", b"\xe0\xb1\x9c", b"\xe0\xb3\x9c", b"\xea\x9f"]
NEW_SCRIPTS = re.compile(rb"\xf0[\x90\x91\x96\x98\x9e\xab\xac\xb2\xb3]")
n_read = 0  # bytes of text that gigatoken has encoded


def encode_texts(tokens: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """The token ids of each text, uint32. Threads may call it at the same time: it releases Python's lock."""
    global n_read
    encoder = encoder_of(tokens, n_read // MANY)
    if not encoder or not texts:
        return [tokens.encode(text) for text in texts]
    parts, others = [], {}  # two parts of each text; {i: ids} of those that tiktoken encodes
    for i, text in enumerate(texts):
        raw = is_simple(text)
        if raw is None:
            others[i], raw = tokens.encode(text), b""
        end = len(raw)
        n_read += end
        if tokens.pattern == PATTERN and text[-1:].isspace() and not raw.endswith((b"\n", b"\r")):
            # Blanks at the end of a text are one word to gigatoken. Ours ends after a newline, where a cut is harmless.
            end = max(raw.rfind(b"\n"), raw.rfind(b"\r")) + 1
        parts += [raw[:end], raw[end:]]
    made = encoder.encode_batch(parts, parallel=False).layout  # all ids, and where each part's begin
    ids, starts = np.asarray(made.content.data), np.asarray(made.offsets.data)[::2]
    return [others.get(i, ids[starts[i]:starts[i + 1]]) for i in range(len(texts))]


def is_simple(text: str) -> bytes | None:
    """The text in UTF-8 if gigatoken surely gives tiktoken's ids, else None."""
    try:
        raw = text.encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return None
    if not text.isascii() and (any(part in raw for part in NEW) or NEW_SCRIPTS.search(raw)):
        return None
    half = LONGEST_BLANK // 2  # a longer run of blanks covers one of the pieces of half its length
    return None if any(text[i:i + half].isspace() for i in range(0, len(text) - half + 1, half)) else raw


@functools.lru_cache(maxsize=1)
def encoder_of(tokens: Tokenizer, turn: int = 0):
    """gigatoken with a tokenizer's vocabulary, a new one for each turn; None if it cannot be used."""
    return new_encoder(tokens) if is_known(tokens) else None


@functools.cache
def is_known(tokens: Tokenizer) -> bool:
    """Whether gigatoken is installed, knows the pattern, and gives equal ids for a text that has all tokens twice, in
    both orders, but for those with letters that it could take for others."""
    if tokens.kind != "bpe" or tokens.pattern not in SCHEMES or tokens.added or tokens.normalizer or tokens._missing:
        return False
    decoded = [token.decode("utf-8", "ignore") for token in tokens.tokens]
    pieces = [piece for piece in decoded if is_simple(piece) is not None]
    text = "".join(pieces) + " ".join(reversed(pieces)) + "."
    try:
        ids = new_encoder(tokens).encode_batch([text], parallel=False).layout.content.data
    except (ImportError, OSError, ValueError, RuntimeError):  # not installed, no room for its file, ids with gaps
        return False
    return np.array_equal(ids, tokens.encode(text))


def new_encoder(tokens: Tokenizer):
    import gigatoken
    with tempfile.NamedTemporaryFile(suffix=".tiktoken") as file:
        file.writelines(b"%s %d\n" % (base64.b64encode(token), i) for i, token in enumerate(tokens.tokens) if token)
        file.flush()
        return gigatoken.Tokenizer.from_tiktoken(file.name, SCHEMES[tokens.pattern])


if __name__ == "__main__":
    print(f"{sys.argv[0]} has no command of its own: run data.py, which uses it", file=sys.stderr)
    sys.exit(2)
