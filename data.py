"""Turn text into tokens for train.py.

    python data.py
    stdlib: 609 documents, 10,703,912 bytes, 13.9% of them for validation
    bpe: 4,096 tokens, made in 1.1 s
    data/stdlib-bpe-4096: 2,515,448 + 398,605 tokens, 3.67 bytes a token
    encoded at 14.2 MB/s, 1.8 s in all

    python data.py shakespeare --tokenizer=char
    shakespeare: 1 document, 1,115,394 bytes, 10.0% of them for validation
    char: 66 tokens, made in 0.0 s
    data/shakespeare-char: 1,003,836 + 111,559 tokens, 1.00 bytes a token
    encoded at 32.0 MB/s, 0.1 s in all

(2 CPU cores, Linux, Python 3.11, 2026-11-23. MB/s counts reading, encoding and writing, not making the tokenizer.)

It writes OUT/train.bin and OUT/val.bin, each with all token ids one after another (little-endian uint16, or uint32 for
more than 65,536 tokens), and OUT/meta.json, which describes them and holds the tokenizer. If these files exist, were
made with the same settings, and the source files have not changed, it does nothing.

Sources: stdlib, the source text of Python's standard library; shakespeare, a download of 1.1 MB; hf:NAME or
hf:NAME:CONFIG, a dataset on Hugging Face; hf:PATH, a folder or a file that the `datasets` library reads; a file of
text, .jsonl or .parquet; a folder, with its subfolders; or a pattern such as "notes/*.md". A text file is one document,
and so is a line of .jsonl or a row of .parquet. An end-of-text token follows every document.

Whole documents are chosen for validation, by a hash of their text, so that equal documents are in one split. A source
of one document is cut: the end is for validation, and no end-of-text token is put at the cut. A byte order mark is
dropped; line ends are kept, since a model should be able to generate the text that it has read.
"""
import codecs
import contextlib
import fcntl
import glob
import hashlib
import json
import math
import os
import random
import sys
import sysconfig
import time
import urllib.request
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from config import UserError, overrides
from tokenizer import byte_tokenizer, char_tokenizer, tiktoken_tokenizer, tokens_folder, train_bpe, well_formed

# text
source = "stdlib"           # stdlib | shakespeare | hf:NAME | a file, a folder or a pattern
field = "text"              # the field of .jsonl, or the column of .parquet or of a dataset, that holds the text
hf_split = "train"          # the split of a Hugging Face dataset to read
max_bytes = 0               # read only so many bytes; 0: all
val_fraction = 0.1          # share of the documents for validation
seed = 1337                 # for the order of files and the choice of documents for validation
# tokens
tokenizer = "bpe"           # bpe | byte | char | a tiktoken name such as gpt2
vocab_size = 4096           # for bpe, including the end-of-text token
train_bytes = 50_000_000    # bytes of text to train bpe on, spread over the training documents
threads = 0                 # for encoding; 0: one for each core
# output
out = ""                    # the folder to write; "": data/SOURCE-TOKENIZER, with -VOCAB_SIZE for bpe

settings = overrides(globals(), "source")

VERSION = 1  # of the format of the output files
PIECE = 4 * 2**20  # bytes; longer documents are read and encoded in pieces, to bound the memory
BATCH = 2**19      # characters that a thread encodes at a time
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_FILE = os.path.join("data", "tinyshakespeare.txt")
HF_BUILDERS = {".jsonl": "json", ".txt": "text"}  # formats that `datasets` does not call by their extension
OUTPUT = ["train.bin", "val.bin", "meta.json"]
TEMPORARY = ["train.bin.tmp", "val.bin.tmp", "meta.json.tmp", "documents.jsonl.tmp"]

if not 0 < val_fraction < 1:
    raise UserError(f"val_fraction={val_fraction}: it must be between 0 and 1")
if min(max_bytes, threads) < 0 or train_bytes < 1:
    raise UserError("max_bytes and threads must be 0 or more, train_bytes 1 or more")
out = out or tokens_folder(source, tokenizer, vocab_size)
path = os.path.expanduser(source.removeprefix("hf:"))
n_threads = threads or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)

# ---- source files ----------------------------------------------------------------------------------------------------


def find_files() -> list[str]:
    """The files of the source; none for a source that is fetched later."""
    if source == "stdlib":  # without tests, three fifths of it, and code pages, which are mostly data
        root, leave_out = sysconfig.get_path("stdlib"), ("test", "tests", "idle_test", "encodings", "site-packages",
                                                         "dist-packages")
        return shuffled(name for name in walk(root, leave_out) if name.endswith(".py"))
    if source == "shakespeare" or source.startswith("hf:"):
        return []
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        return shuffled(walk(path))
    if any(c in path for c in "*?["):
        return shuffled(filter(os.path.isfile, glob.glob(path, recursive=True)))
    raise UserError(f"{source} is not a file, a folder, a pattern, stdlib, shakespeare or hf:NAME: correct --source")


def walk(root: str, leave_out: tuple = ()) -> Iterator[str]:
    """All files in a folder, except hidden files, the folders `leave_out`, and the output folder."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in leave_out
                      and os.path.realpath(os.path.join(folder, name)) != os.path.realpath(out)]
        paths = [os.path.join(folder, name) for name in names if not name.startswith(".")]
        yield from filter(os.path.isfile, paths)


def shuffled(paths) -> list[str]:
    """Paths in an order that depends only on the seed, so that max_bytes takes a random sample."""
    paths = sorted(paths)
    random.Random(seed).shuffle(paths)
    return paths


def text_size(path: str) -> int:
    """Bytes of text in a file, which is an estimate for .jsonl and .parquet."""
    if path.lower().endswith(".parquet"):
        metadata = open_parquet(path).metadata
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        return sum(group.column(i).total_uncompressed_size for group in groups for i in range(group.num_columns)
                   if group.column(i).path_in_schema == field)
    return os.path.getsize(path)


def fetch_shakespeare() -> str:
    """The path of the text, which is downloaded once."""
    cached = os.path.exists(SHAKESPEARE_FILE)
    place = SHAKESPEARE_FILE if cached else SHAKESPEARE_URL
    try:
        with open(place, "rb") if cached else urllib.request.urlopen(place, timeout=60) as file:
            content = file.read(2**22)
    except OSError as error:
        raise UserError(f"cannot read {place} ({getattr(error, 'reason', error)}): download the text another way, and "
                        f"save it as {SHAKESPEARE_FILE}") from error
    if hashlib.sha256(content).hexdigest() != SHAKESPEARE_SHA256:
        raise UserError(f"{place} is not the expected text of 1,115,394 bytes (its SHA-256 differs): save the right "
                        f"text as {SHAKESPEARE_FILE}")
    if not cached:
        os.makedirs(os.path.dirname(SHAKESPEARE_FILE), exist_ok=True)
        with open(SHAKESPEARE_FILE + ".tmp", "wb") as file:
            file.write(content)
        os.replace(SHAKESPEARE_FILE + ".tmp", SHAKESPEARE_FILE)
    return SHAKESPEARE_FILE


def fetch_dataset() -> str:
    """Copy a Hugging Face dataset into a temporary .jsonl file: it is read two or three times, but downloaded once."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(f"{source} needs the Python package datasets: pip install datasets") from error
    name, _, config = path.partition(":")
    arguments = {"path": path} if os.path.isdir(path) else {"path": name, "name": config or None}
    if os.path.isfile(path):
        extension = os.path.splitext(path)[1].lower()
        arguments = {"path": HF_BUILDERS.get(extension, extension[1:]), "data_files": path}
    copy, written = os.path.join(out, "documents.jsonl.tmp"), 0
    with open(copy, "w") as file, progress("reading", max_bytes) as bar:
        try:
            for row in load_dataset(**arguments, split=hf_split, streaming=True):
                text = well_formed(field_of(row, source) or "")
                file.write(json.dumps({field: text}) + "\n")
                written += utf8_size(text)
                bar.update(utf8_size(text))
                if 0 < max_bytes <= written:
                    break
        except UserError:
            raise
        except Exception as error:  # datasets raises errors of many types
            raise UserError(f"datasets cannot read {source}: {str(error).strip().splitlines()[0][:200]}") from error
    return copy


# ---- documents -------------------------------------------------------------------------------------------------------


def field_of(row, where: str) -> str | None:
    """The text of a row, a dict. UserError, which names `where` the row comes from, if it has none."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object such as {{\"{field}\": \"...\"}}: correct the line")
    if field not in row:
        raise UserError(f"{where} has no field {field!r}, but {', '.join(map(repr, row)) or 'none'}: give --field=NAME")
    if not isinstance(row[field], str | None):
        raise UserError(f"{where}: field {field!r} is {type(row[field]).__name__}, not text: give another --field")
    return row[field]


class NotText(UserError):
    def __init__(self, path: str, offset: int):
        super().__init__(f"{path} is not UTF-8 text (byte {offset}): convert it first, or leave it out")


def read_text(path: str) -> Iterator[tuple[bool, str]]:
    """The pieces of a text file, which is one document: (whether it is the first piece, text)."""
    decoder, rest, position, block = codecs.getincrementaldecoder("utf-8")(), "", 0, None
    with open(path, "rb") as file:
        while block is None or len(block) == PIECE:
            block = file.read(PIECE)
            if (nul := block.find(0)) >= 0:
                raise NotText(path, position + nul)
            first, position = position == 0, position + len(block)
            try:
                text = rest + decoder.decode(block, final=len(block) < PIECE)
            except UnicodeDecodeError as error:  # error.object begins with bytes of the block before
                raise NotText(path, position - len(error.object) + error.start) from error
            text = text.removeprefix("\ufeff") if first else text
            end = boundary(text, len(text)) if len(block) == PIECE else len(text)
            yield first, text[:end]
            rest = text[end:]


def read_jsonl(path: str) -> Iterator[str | None]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            if line.strip():
                try:
                    row = json.loads(line.decode("utf-8-sig"))
                except ValueError as error:
                    raise UserError(f"{where}: not valid JSON ({error}): correct the line") from error
                yield field_of(row, where)


def open_parquet(path: str):
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(".parquet files need the Python package pyarrow: pip install pyarrow") from error
    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a parquet file: leave it out") from error
    if field not in table.schema_arrow.names:
        raise UserError(f"{path} has no column {field!r}, but {', '.join(map(repr, table.schema_arrow.names))}: "
                        "give --field=NAME")
    return table


def read_parquet(path: str) -> Iterator[str | None]:
    for batch in open_parquet(path).iter_batches(batch_size=256, columns=[field]):
        for text in batch.column(0).to_pylist():
            yield field_of({field: text}, path)


def boundary(text: str, end: int) -> int:
    """The position at or shortly before `end` at which to cut a text: before a single space, or after a single newline,
    that is followed by a letter or digit. The patterns of tiktoken and of tokenizer.py end a word there in any case, so
    that cutting does not change the tokens. Without such a position it is `end`, and a few tokens may change."""
    for i in range(end - 2, max(end - 2**16, 0), -1):
        if text[i] in " \n" and text[i + 1].isalnum() and not text[i - 1].isspace():
            return i + (text[i] == "\n")
    return end


def cut_up(texts: Iterator[str | None]) -> Iterator[tuple[bool, str]]:
    """The pieces of documents, each of which is in memory: (whether it is the first piece of a document, text)."""
    for text in texts:
        text, start = well_formed(text or ""), 0
        while start < len(text):
            end = boundary(text, start + PIECE) if len(text) > start + PIECE else len(text)
            yield start == 0, text[start:end]
            start = end


def utf8_size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def pieces() -> Iterator[tuple[bool, str, int]]:
    """The pieces of all documents in order, up to max_bytes: (whether a document begins, text, bytes of the text)."""
    left = max_bytes or math.inf
    for name in files:
        extension, taken = os.path.splitext(name.removesuffix(".tmp"))[1].lower(), False
        if extension in (".pkl", ".pickle"):  # a pickle may look like text
            skipped.add(name)
            continue
        if extension == ".parquet":
            parts = cut_up(read_parquet(name))
        else:
            parts = cut_up(read_jsonl(name)) if extension == ".jsonl" else read_text(name)
        try:
            for begins, text in parts:
                if utf8_size(text) > left:
                    text, left = text.encode()[:left].decode(errors="ignore"), 0
                left -= utf8_size(text)
                if text:
                    taken = True
                    yield begins, text, utf8_size(text)
                if left <= 0:
                    return
        except NotText:
            if taken or files == [path]:  # the only source file, or partly used already
                raise
            skipped.add(name)


# ---- splits ----------------------------------------------------------------------------------------------------------


def draw(text: str) -> float:
    """A pseudo-random number in [0, 1) that depends only on the text and the seed."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big") / 2**64


def plan_split() -> tuple[float, float]:
    """(the limit of draw() below which a document is for validation, the byte at which validation begins if the source
    is a single document). It reads documents until it has seen one of each split; if one split would stay empty, the
    limit is moved by one document."""
    lowest, highest, documents, total = math.inf, -1.0, 0, 0
    for begins, text, size in pieces():
        total += size
        if begins:
            lowest, highest, documents = min(lowest, draw(text)), max(highest, draw(text)), documents + 1
            if lowest < val_fraction <= highest:
                return val_fraction, math.inf
    if not documents:
        raise UserError(f"{source} holds no text" + (f": its {len(skipped)} files are binary" if skipped else
                                                     ": give another --source"))
    if documents == 1:
        return 0.0, total * (1 - val_fraction)
    if lowest == highest:
        raise UserError(f"the {documents} documents of {source} are all equal: add other ones, for validation")
    return (highest if highest < val_fraction else math.nextafter(lowest, 1)), math.inf


def split_pieces() -> Iterator[tuple[str, bool, str, int]]:
    """The pieces() with their split, "train" or "val", before each."""
    position, split = 0, ""
    for begins, text, size in pieces():
        if begins:
            split = "val" if draw(text) < val_below else "train"
        if position <= val_from < position + size:  # cut a single document, at the end of a line or word if possible
            end = len(text.encode()[:int(val_from - position)].decode(errors="ignore"))
            near = max(0, end - 2000)
            end = text.rfind("\n", near, end) + 1 or text.rfind(" ", near, end) + 1 or end
            yield split, begins, text[:end], utf8_size(text[:end])
            split, begins, text = "val", False, text[end:]
        yield split, begins, text, utf8_size(text)
        position += size


def bpe_sample() -> Iterator[str]:
    """Texts to train bpe on: about train_bytes, in slices spread evenly over the training documents."""
    share, due, left, step = train_bytes / (estimate * (1 - val_fraction)), 1.0, train_bytes, min(100_000, train_bytes)
    for split, _, text, _ in split_pieces():
        for start in range(0, len(text) if split == "train" else 0, step):
            part = text[start:start + step]
            due += min(share, 1) * len(part)
            if due > 0:
                due, left = due - len(part), left - len(part)
                yield part
            if left <= 0:
                return


def make_tokenizer():
    if tokenizer == "byte":
        return byte_tokenizer()
    if tokenizer == "char":  # with the characters of validation, too, which must be encoded
        return char_tokenizer(text for _, text, _ in pieces())
    if tokenizer == "bpe":
        return train_bpe(bpe_sample(), vocab_size)
    return tiktoken_tokenizer(tokenizer)


# ---- encoding, in threads: tiktoken releases Python's lock, and processes were not faster ----------------------------


def batches() -> Iterator[list]:
    batch, length = [], 0
    for piece in split_pieces():
        batch.append(piece)
        length += len(piece[2])
        if length >= BATCH:
            yield batch
            batch, length = [], 0
    yield batch


def encode(batch: list) -> list[np.ndarray]:
    return [tokens.encode(text).astype(dtype) for _, _, text, _ in batch]


def encode_all(bins: dict):
    """Encode all documents and write their tokens in order. Only a few batches are in memory at a time."""
    def put(split: str, ids: np.ndarray):
        bins[split].write(ids.tobytes())
        count[f"{split}_tokens"] += len(ids)

    def write(batch: list, encoded: list):
        for (split, begins, _, size), ids in zip(batch, encoded, strict=True):
            if begins and count[f"{split}_tokens"]:
                put(split, end)
            put(split, ids)
            count[f"{split}_bytes"] += size
            count["documents"] += begins
            bar.update(size)

    end, waiting = np.array([tokens.eot], dtype), deque()
    with ThreadPoolExecutor(n_threads) as pool, progress("encoding", estimate) as bar:
        for batch in batches():
            waiting.append((batch, pool.submit(encode, batch)))
            if len(waiting) > n_threads + 1:
                batch, future = waiting.popleft()
                write(batch, future.result())
        for batch, future in waiting:
            write(batch, future.result())
    for split in ("train", "val"):
        if split == "val" or val_from == math.inf:  # not at the cut of a single document
            put(split, end)


def progress(what: str, total: int) -> tqdm:
    return tqdm(desc=what, total=total or None, unit="B", unit_scale=True, disable=None, dynamic_ncols=True)


# ---- the output folder -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def output_folder() -> Iterator[int]:
    """Make the output folder, and lock it against other runs. After an error, everything new in it is removed."""
    missing, parent = [], os.path.abspath(out)
    while not os.path.lexists(parent):
        missing.append(parent)
        parent = os.path.dirname(parent)
    try:
        os.makedirs(out, exist_ok=True)
        folder = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UserError(f"cannot write to {out} ({error.strerror}): give another --out") from error
    with contextlib.suppress(OSError):  # some network file systems have no locks
        fcntl.flock(folder, fcntl.LOCK_EX)  # a second run waits, then finds the folder up to date
    try:
        yield folder
    except BaseException:
        with contextlib.suppress(OSError):
            remove(TEMPORARY)
            for name in missing:
                os.rmdir(name)
        raise
    finally:
        os.close(folder)


def remove(names: list[str]):
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(out, name))


def fingerprint() -> str:
    """A hash of the settings that matter and of the source files' names, sizes and times; for a remote dataset, of the
    name."""
    state = [(name, os.stat(name).st_size, os.stat(name).st_mtime_ns) for name in listed]
    used = {name: value for name, value in settings.items() if name not in ("out", "threads")}
    return hashlib.sha256(json.dumps([VERSION, used, sorted(state)]).encode()).hexdigest()


def up_to_date() -> bool:
    try:
        with open(os.path.join(out, "meta.json")) as file:
            old = json.load(file)
        sizes = [os.path.getsize(os.path.join(out, f"{split}.bin")) for split in ("train", "val")]
        width = np.dtype(old["dtype"]).itemsize
        return old["fingerprint"] == wanted and sizes == [old["train_tokens"] * width, old["val_tokens"] * width]
    except (OSError, ValueError, KeyError, TypeError):
        return False


# ---- run -------------------------------------------------------------------------------------------------------------

began = time.perf_counter()
skipped: set[str] = set()  # files that are not text
files = find_files()
listed = files or [*filter(os.path.isfile, [path]), *walk(path)]  # a dataset of `datasets` may be files, too
wanted = fingerprint()
written = {os.path.realpath(os.path.join(out, name)) for name in OUTPUT + TEMPORARY}
for name in listed:
    if os.path.realpath(name) in written:
        raise UserError(f"--out={out} would overwrite {name}, a file of the source: give another --out")

with output_folder() as folder:
    if up_to_date():
        print(f"{out} is up to date")
        sys.exit()
    if source == "shakespeare":
        files = [fetch_shakespeare()]
    elif source.startswith("hf:"):
        files = [fetch_dataset()]
    estimate = min(max_bytes or math.inf, sum(map(text_size, files)))
    val_below, val_from = plan_split()
    tokens = make_tokenizer()
    trained = time.perf_counter()
    dtype = np.dtype("<u2" if tokens.n_vocab <= 2**16 else "<u4")
    count = dict.fromkeys(("train_tokens", "val_tokens", "train_bytes", "val_bytes", "documents"), 0)
    with (open(os.path.join(out, "train.bin.tmp"), "wb") as train_bin,
          open(os.path.join(out, "val.bin.tmp"), "wb") as val_bin,
          open(os.path.join(out, "meta.json.tmp"), "w") as meta_json):
        encode_all({"train": train_bin, "val": val_bin})
        if min(count["train_tokens"], count["val_tokens"]) < 2:
            raise UserError(f"{source} has only {count['train_tokens']} training and {count['val_tokens']} validation "
                            "tokens: give more text")
        json.dump({"version": VERSION, "source": source, "dtype": dtype.name, **count, "fingerprint": wanted,
                   "tokenizer": tokens.to_dict()}, meta_json)
        for file in (train_bin, val_bin, meta_json):
            file.flush()
            os.fsync(file.fileno())
    remove(["meta.json"])  # until the new one is in place, the folder counts as empty
    for name in OUTPUT:
        os.replace(os.path.join(out, name + ".tmp"), os.path.join(out, name))
        os.fsync(folder)
    remove(TEMPORARY)

now = time.perf_counter()
n_bytes, n_tokens = count["train_bytes"] + count["val_bytes"], count["train_tokens"] + count["val_tokens"]
if skipped:
    print(f"skipped {len(skipped)} files that are not text, such as {min(skipped)}")
print(f"{source}: {count['documents']:,} document{'s' * (count['documents'] > 1)}, {n_bytes:,} bytes, "
      f"{count['val_bytes'] / n_bytes:.1%} of them for validation\n"
      f"{tokenizer}: {tokens.n_vocab:,} tokens, made in {trained - began:.1f} s\n"
      f"{out}: {count['train_tokens']:,} + {count['val_tokens']:,} tokens, {n_bytes / n_tokens:.2f} bytes a token\n"
      f"encoded at {n_bytes / 1e6 / (now - trained):.1f} MB/s, {now - began:.1f} s in all")
