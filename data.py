"""Turn text into tokens for train.py.

    python data.py
    stdlib: 609 documents, 10,703,912 bytes, 13.9% of them for validation
    bpe: 4,096 tokens, made in 1.1 s
    data/stdlib-bpe-4096: 2,515,448 + 398,605 tokens, 3.67 bytes a token
    encoded at 16.0 MB/s, 1.8 s in all

    python data.py shakespeare --tokenizer=char
    shakespeare: 1 document, 1,115,394 bytes, 10.0% of them for validation
    char: 66 tokens, made in 0.0 s
    data/shakespeare-char: 1,003,836 + 111,559 tokens, 1.00 bytes a token
    encoded at 54.3 MB/s, 0.0 s in all

(2 CPU cores, Linux, Python 3.11, 2026-11-27. MB/s counts reading, encoding and writing, not making the tokenizer.)

It writes OUT/train.bin and OUT/val.bin, each with all token ids one after another (little-endian uint16, or uint32 for
more than 65,536 tokens), and OUT/meta.json, which describes them and holds the tokenizer. If these files exist, were
made with the same settings, and the source files have not changed, it does nothing.

Sources: stdlib, the source text of Python's standard library; shakespeare, a download of 1.1 MB; hf:NAME or
hf:NAME:CONFIG, a dataset on Hugging Face; hf:PATH, a folder or a file that the `datasets` library reads; a file; a
folder, with its subfolders; or a pattern such as "notes/*.md".

Of .jsonl, .json, .csv, .tsv and .parquet files (see rows.py) the texts of one field are read. Each is a document,
whatever it says. Any other file is text: a document, or several with <|endoftext|> between them, as in GPT-2's data.
Text is UTF-8, or UTF-16 or UTF-32 with a byte order mark, which is dropped. Line ends are kept, since a model should be
able to generate the text that it has read. Files and rows that cannot be read are skipped and printed; for text in
another encoding, with the command that converts it.

The tokenizer's end-of-text token follows each document. If the tokenizer has another token for the start of a document,
as Llama's have, this token precedes each document.

Validation gets whole documents, chosen by a hash of their text, so that equal documents are in one split. With few
documents, or a very long one, the share of the bytes can be far from val_fraction. If it is less than half of
val_fraction or more than twice, documents are taken in the order of their hashes until validation has its share. The
last of them may be cut: its end is for validation. A source of one document is always cut, and no end-of-text token is
put at the cut.
"""
from config import UserError, given, overrides  # first: then Ctrl-C ends the script quietly, also while it imports

# isort: split
import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import random
import shlex
import sys
import sysconfig
import time
import urllib.request
from array import array
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from fast_bpe import encode_texts
from rows import read_rows
from text_files import NotText, cut_up, read_text
from tokenizer import (
    byte_tokenizer,
    char_tokenizer,
    open_tokens,
    tiktoken_tokenizer,
    tokenizer_of,
    tokens_folder,
    train_bpe,
    well_formed,
)

# text
source = "stdlib"           # stdlib | shakespeare | hf:NAME | a file, a folder or a pattern
field = "text"              # the field of a row, or the column of a table or of a dataset, that holds the text
hf_split = "train"          # the split of a Hugging Face dataset to read
max_bytes = 0               # read only so many bytes; 0: all
val_fraction = 0.1          # share of the text for validation
seed = 1337                 # for the order of files and the choice of documents for validation
strict = False              # refuse a source with files or rows that cannot be read, instead of skipping them
# tokens
tokenizer = "bpe"           # bpe | byte | char | a tiktoken name such as gpt2 | the file of a checkpoint, for its own
vocab_size = 4096           # for bpe, including the end-of-text token
train_bytes = 50_000_000    # bytes of text to train bpe on, spread over the training documents
threads = 0                 # for encoding; 0: one for each core
# output
out = ""                    # the folder to write; "": data/SOURCE-TOKENIZER, with -VOCAB_SIZE for bpe

settings = overrides(globals(), "source")

VERSION = 2  # of the output files, and of how they are made
PIECE = 4 * 2**20  # bytes; longer documents are read and encoded in pieces, to bound the memory
BATCH = 2**19      # characters that a thread encodes at a time
LARGE = 15_000_000  # bytes of text above which gigatoken is faster: it takes half a second to begin
FEW = 5_000        # validation tokens, below which their loss says little
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_FILE = os.path.join("data", "tinyshakespeare.txt")
HF_BUILDERS = {".jsonl": "json", ".txt": "text"}  # formats that `datasets` does not call by their extension
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ROWS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")  # files of rows; all others are text
SCRIPTS = {"chosen": "dpo.py", **dict.fromkeys(  # the script that reads rows with this field
    ("messages", "conversations", "instruction", "response", "completion"), "sft.py")}
OUTPUT = ["train.bin", "val.bin", "meta.json", "skipped.txt"]
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
        if is_output(path):
            open_tokens(path)  # UserError if they cannot be used
            raise UserError(f"{path} holds tokens already: train on them with python train.py {quoted('data', path)}")
        return shuffled(walk(path))
    if any(c in path for c in "*?["):
        return shuffled(filter(os.path.isfile, glob.glob(path, recursive=True)))
    raise UserError(f"{source} is not a file, a folder, a pattern, stdlib, shakespeare or hf:NAME: correct the name")


def walk(root: str, leave_out: tuple = ()) -> Iterator[str]:
    """All files in a folder, except hidden files, the folders `leave_out`, and folders that data.py writes."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in leave_out
                      and not is_output(os.path.join(folder, name))
                      and os.path.realpath(os.path.join(folder, name)) != os.path.realpath(out)]
        paths = [os.path.join(folder, name) for name in names if not name.startswith(".")]
        yield from filter(os.path.isfile, paths)


def is_output(folder: str) -> bool:
    """Whether a folder has tokens of data.py."""
    return all(os.path.exists(os.path.join(folder, name)) for name in ("train.bin", "val.bin"))


def shuffled(paths) -> list[str]:
    """Paths in an order that depends only on the seed, so that max_bytes takes a random sample."""
    paths = sorted(paths)
    random.Random(seed).shuffle(paths)
    return paths


def quoted(name: str, value) -> str:
    """A setting as a shell needs it."""
    return shlex.quote(f"--{name}={value}")


def again(name: str, value) -> str:
    """What to run to read the source with another setting. It is complete also for a user who ran train.py, which has
    none of these settings."""
    others = [quoted(other, settings[other]) for other in settings if other in given - {"source", name}]
    command = " ".join(["python data.py", shlex.quote(source), *others, quoted(name, value)])
    return f"run `{command}`, then train.py with {quoted('data', value if name == 'out' else out)}"


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
    with open(copy, "w", encoding="utf-8") as file, progress("reading", max_bytes) as bar:
        try:
            for row in load_dataset(**arguments, split=hf_split, streaming=True):
                text = text_in(row, source)
                file.write(json.dumps({field: text}) + "\n")
                written += utf8_size(text)
                bar.update(utf8_size(text))
                if 0 < max_bytes <= written:
                    break
        except UserError:
            raise
        except Exception as error:  # datasets raises errors of many types
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                raise
            raise UserError(f"datasets cannot read {source}: {' '.join(str(error).split())[:200]}") from error
    return copy


# ---- documents -------------------------------------------------------------------------------------------------------


def text_in(row: dict | ValueError, where: str) -> str:
    """The text of a row. UserError if the row has none, or could not be read."""
    if isinstance(row, ValueError):
        raise UserError(f"{where}: {row}")
    if field not in row:
        names = ", ".join(repr(name[:30]) for name in list(row)[:12]) or "none"
        name, script = where.rpartition(", ")[0], next((SCRIPTS[key] for key in SCRIPTS if key in row), "")
        also = f"{script} reads it with {quoted('data', name)}, or " if name and script else ""
        raise UserError(f"{where} has no field {field!r}, but {names}: {also}{again('field', 'NAME')}")
    if not isinstance(row[field], str | None):
        raise UserError(f"{where}: field {field!r} is {type(row[field]).__name__}, not text: {again('field', 'NAME')}")
    return well_formed(row[field] or "")


def texts_of_rows(name: str) -> Iterator[str]:
    """The texts of a file's rows. `bad_rows` gets their number, and the reasons why some have no text. UserError if no
    row has a text."""
    total, reasons = 0, []
    for where, row in read_rows(name):
        total += 1
        try:
            text = text_in(row, where)
        except UserError as error:
            reasons.append(str(error))
        else:
            yield text
        bad_rows[name] = total, reasons
    if 0 < total == len(reasons):
        raise UserError(reasons[0])


def pieces_of(name: str, most: float) -> Iterator[tuple[bool, str, int]]:
    """The pieces of a file's documents, up to a number of bytes: (whether a document begins, text, bytes of the text).
    UserError if it cannot be read."""
    extension = os.path.splitext(name.lower().removesuffix(".tmp").removesuffix(".gz"))[1]
    if extension in (".pkl", ".pickle"):  # it may look like text
        raise UserError(f"{name} is a pickle, not text: leave it out")
    if extension in ROWS:
        parts = (part for text in texts_of_rows(name) for part in cut_up(text, PIECE))
    else:
        parts = read_text(name, PIECE)
    for begins, text in parts:
        size = utf8_size(text)
        if size > most:
            text, most = text.encode()[:int(most)].decode(errors="ignore"), 0
            size = utf8_size(text)
        most -= size
        if text:
            yield begins, text, size
        if most <= 0:
            return


def pieces(wanted=lambda numbers, lengths: True) -> Iterator[tuple[float | None, str, int]]:
    """The pieces of all documents in order, up to max_bytes: (the document's draw() where one begins, else None; text;
    bytes). A file is read only if it is wanted(), given the draws and the lengths of its documents."""
    left, ends = max_bytes or math.inf, np.cumsum(found["documents"])
    for name, start, end in zip(files, ends - found["documents"], ends, strict=True):
        numbers = found["draw"][start:end]
        if wanted(numbers, found["length"][start:end]):
            drawn = iter(numbers)
            for begins, text, size in pieces_of(name, left):
                yield (next(drawn, 1.0) if begins else None), text, size
        left -= found["size"][start:end].sum()


def read_ahead(names: list[str], n: int = 32) -> Iterator[str]:
    """The names of files. The system begins to read each file when n others come before it: a disk reads several small
    files at a time two or three times as fast as one."""
    waiting = deque()
    for name in names:
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                file = os.open(name, os.O_RDONLY)
                try:
                    os.posix_fadvise(file, 0, PIECE, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(file)
        waiting.append(name)
        if len(waiting) > n:
            yield waiting.popleft()
    yield from waiting


def utf8_size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def draw(text: str) -> float:
    """A pseudo-random number in [0, 1) that depends only on the seed and on a document's first piece."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big") / 2**64


def survey() -> tuple[list[str], dict[str, np.ndarray]]:
    """Read all files once: (those that can be read; the "draw", the "size" in bytes and the "length" in characters of
    each document, and the number of "documents" of each file). `skipped` gets the reason why another file cannot be
    read, "" for a binary one."""
    good, left, n = [], max_bytes or math.inf, 0
    found = {"draw": array("d"), "size": array("q"), "length": array("q"), "documents": array("q")}
    numbers, sizes, lengths, _ = found.values()
    with progress("reading", max_bytes) as bar:
        for name in read_ahead(files):
            try:
                for begins, text, size in pieces_of(name, left):
                    if begins:
                        numbers.append(draw(text))
                        sizes.append(0)
                        lengths.append(0)
                    sizes[-1] += size
                    lengths[-1] += len(text)
                    bar.update(size)
            except (UserError, OSError) as error:
                if len(files) == 1 and not os.path.isdir(path):
                    raise
                why = f"{name} cannot be read ({error.strerror})" if isinstance(error, OSError) else str(error)
                skipped[name] = "" if isinstance(error, NotText) and not error.advice else why
                bad_rows.pop(name, None)
                for column in (numbers, sizes, lengths):
                    del column[n:]
                continue
            good.append(name)
            found["documents"].append(len(sizes) - n)
            left -= sum(sizes[n:])
            n = len(sizes)
            if left <= 0:
                break
    reasons = [reason for reason in skipped.values() if reason]
    reasons += [reason for _, reasons in bad_rows.values() for reason in reasons]
    if strict and reasons:
        raise UserError(reasons[0])
    if not n:
        reasons += [f"its {len(skipped)} files are binary"] if skipped else ["name another source"]
        raise UserError(f"{source} holds no text: {reasons[0]}")
    return good, {name: np.array(column) for name, column in found.items()}


# ---- splits ----------------------------------------------------------------------------------------------------------


def plan_split() -> tuple[float, float, int, int]:
    """(val_below, cut, val_from, near): validation gets the documents whose draw() is below val_below. A document whose
    draw() is `cut`, and its copies, are cut: the part from byte val_from on, or from up to `near` characters before it,
    is for validation.

    The draw alone decides where that gives both splits between half and twice of their share of the bytes. Otherwise
    documents are taken in the order of their draws until validation has its share, and the last one is cut if with it
    the share is too large, and without it too small."""
    def fair(val: float) -> bool:
        return all(part / 2 <= share / n_bytes <= 2 * part for share, part in (
            (val, val_fraction), (n_bytes - val, 1 - val_fraction)))

    numbers, group, copies = np.unique(found["draw"], return_inverse=True, return_counts=True)
    sizes, training = np.bincount(group, found["size"]), n_bytes * (1 - val_fraction)
    ends = np.cumsum(sizes)
    last = np.searchsorted(ends, n_bytes - training)
    for below in (val_fraction, np.nextafter(numbers[last], 1), numbers[last]):
        if fair(sizes[numbers < below].sum()):
            return below, -1, 0, 0
    if len(numbers) == 1 < documents:
        raise UserError(f"the {documents} documents of {source} are all equal: add other ones, for validation")
    start, size = (training - (n_bytes - ends[last])) / copies[last], sizes[last] / copies[last]
    return numbers[last], numbers[last], int(start), int(min(2000, start / 2, (size - start) / 2))


def split_pieces(wanted=lambda numbers, lengths: True) -> Iterator[tuple[str, bool, str, int]]:
    """The pieces() with their split, "train" or "val", and whether a document begins, before each."""
    for drawn, text, size in pieces(wanted):
        begins = drawn is not None
        if begins:
            number, position = drawn, 0
            split = "val" if number < val_below else "train"
        if number == cut and position <= val_from < position + size:
            end = max(len(text.encode()[:val_from - position].decode(errors="ignore")), int(begins))
            before = max(0, end - near)  # from there on, the end of a line, or else of a word
            end = text.rfind("\n", before, end) + 1 or text.rfind(" ", before, end) + 1 or end
            yield split, begins, text[:end], utf8_size(text[:end])
            split, begins, text = "val", True, text[end:]
        yield split, begins, text, utf8_size(text)
        position += size


def bpe_sample() -> Iterator[str]:
    """Texts to train bpe on: about train_bytes, in slices spread evenly over the training documents. A file is not read
    again if it has only one slice, and that is not due."""
    share, due, left, step = train_bytes / (n_bytes * (1 - val_fraction)), 1.0, train_bytes, min(100_000, train_bytes)

    def wanted(numbers: np.ndarray, lengths: np.ndarray) -> bool:
        nonlocal due
        if len(numbers) != 1 or lengths[0] > step or numbers[0] == cut or due + min(share, 1) * lengths[0] > 0:
            return True
        if numbers[0] >= val_below:
            due += min(share, 1) * lengths[0]
        return False

    for split, _, text, _ in split_pieces(wanted):
        for start in range(0, len(text) if split == "train" else 0, step):
            part = text[start:start + step]
            due += min(share, 1) * len(part)
            if due > 0:
                due, left = due - len(part), left - len(part)
                yield part
            if left <= 0:
                return


def ready_tokenizer():
    """The tokenizer, if it does not depend on the text; else None."""
    if tokenizer in ("bpe", "char"):
        return None
    if tokenizer.endswith(".safetensors"):
        return tokenizer_of(tokenizer)
    return byte_tokenizer() if tokenizer == "byte" else tiktoken_tokenizer(tokenizer)


# ---- encoding, in threads: gigatoken and tiktoken release Python's lock ----------------------------------------------


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
    texts = [text for _, _, text, _ in batch]
    made = encode_texts(tokens, texts) if n_bytes > LARGE else map(tokens.encode, texts)
    return [ids.astype(dtype) for ids in made]


def encode_all(bins: dict):
    """Encode all documents and write their tokens in order. Only a few batches are in memory at a time."""
    def put(split: str, ids: np.ndarray):
        bins[split].write(ids.tobytes())
        count[f"{split}_tokens"] += len(ids)

    def write(batch: list, encoded: list):
        for (split, begins, _, size), ids in zip(batch, encoded, strict=True):
            if begins and count[f"{split}_tokens"]:
                put(split, end)
            if begins and tokens.bos != tokens.eot:
                put(split, start)
            put(split, ids)
            count[f"{split}_bytes"] += size
            bar.update(size)

    start, end, waiting = np.array(tokens.start, dtype), np.array([tokens.eot], dtype), deque()
    with ThreadPoolExecutor(n_threads) as pool, progress("encoding", n_bytes) as bar:
        for batch in batches():
            waiting.append((batch, pool.submit(encode, batch)))
            if len(waiting) > n_threads + 1:
                batch, future = waiting.popleft()
                write(batch, future.result())
        for batch, future in waiting:
            write(batch, future.result())
    for split in ("train", "val"):
        if split == "val" or documents > 1:  # not at the cut of a single document
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
        raise UserError(f"cannot write to {out} ({error.strerror}): {again('out', 'FOLDER')}") from error
    with contextlib.suppress(OSError):  # some network file systems have no locks
        fcntl.flock(folder, fcntl.LOCK_EX)  # a second run waits, then finds the folder up to date
    try:
        yield folder
    except BaseException as error:
        with contextlib.suppress(OSError):
            remove(TEMPORARY)
            for name in missing:
                os.rmdir(name)
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise UserError(f"cannot write to {out} ({error.strerror}): make room, or "
                            f"{again('out', 'FOLDER')}") from error
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
    state = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in zip(listed, map(os.stat, listed), strict=True)]
    used = {name: value for name, value in settings.items() if name not in ("out", "threads")}
    if tokenizer.endswith(".safetensors"):
        used["tokenizer"] = tokenizer_of(tokenizer).fingerprint
    return hashlib.sha256(json.dumps([VERSION, used, sorted(state)]).encode()).hexdigest()


def identity(name: str) -> tuple[int, int] | None:
    """The device and the inode of a file, which all its names have in common; None if there is none."""
    try:
        stat = os.stat(name)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def up_to_date() -> bool:
    try:
        return open_tokens(out)[0].get("fingerprint") == wanted
    except UserError:
        return False


def describe_skipped() -> list[str]:
    """Lines that tell which files and rows were skipped, and why. A long list goes to OUT/skipped.txt."""
    named, binary = sorted(filter(None, skipped.values())), [name for name in skipped if not skipped[name]]
    lines, also = [], ":"
    if len(named) > 10:
        also = f", all listed in {os.path.join(out, 'skipped.txt')}, such as:"
        with open(os.path.join(out, "skipped.txt"), "w", encoding="utf-8", errors="surrogateescape") as file:
            file.writelines(f"{reason}\n" for reason in named)
    if named:
        lines += [f"skipped {len(named)} file{'s' * (len(named) > 1)}{also}", *(f"  {reason}" for reason in named[:10])]
    if binary:
        lines.append(f"skipped {len(binary)} binary file{'s' * (len(binary) > 1)}, such as {min(binary)}")
    if reasons := [reason for _, reasons in bad_rows.values() for reason in reasons]:
        lines.append(f"skipped {len(reasons):,} of {sum(total for total, _ in bad_rows.values()):,} rows, such as:")
        lines += [f"  {reason}" for reason in reasons[:3]]
    return lines


# ---- run -------------------------------------------------------------------------------------------------------------

began = time.perf_counter()
skipped: dict[str, str] = {}  # files that cannot be read: why; "" for a binary file
bad_rows: dict[str, tuple[int, list[str]]] = {}  # for each file of rows: how many, and why some have no text
files = find_files()
listed = files or [*filter(os.path.isfile, [path]), *walk(path)]  # a dataset of `datasets` may be files, too
wanted = fingerprint()
written = {identity(os.path.join(out, name)) for name in OUTPUT + TEMPORARY} - {None}
for name in [*listed, tokenizer]:
    if identity(name) in written:
        raise UserError(f"--out={out} would overwrite {name}, which is an input: {again('out', 'FOLDER')}")

with output_folder() as folder:
    if up_to_date():
        print(f"{out} is up to date")
        sys.exit()
    tokens = ready_tokenizer()
    if source == "shakespeare":
        files = [fetch_shakespeare()]
    elif source.startswith("hf:"):
        files = [fetch_dataset()]
    files, found = survey()
    n_bytes, documents = int(found["size"].sum()), len(found["size"])
    val_below, cut, val_from, near = plan_split()
    if tokenizer == "bpe":
        tokens = train_bpe(bpe_sample(), vocab_size)
    elif tokenizer == "char":  # with the characters of validation, too, which must be encoded
        tokens = char_tokenizer(text for _, text, _ in pieces())
    trained = time.perf_counter()
    dtype = np.dtype("<u2" if tokens.n_vocab <= 2**16 else "<u4")
    count = dict.fromkeys(("train_tokens", "val_tokens", "train_bytes", "val_bytes"), 0)
    with (open(os.path.join(out, "train.bin.tmp"), "wb", buffering=BATCH) as train_bin,
          open(os.path.join(out, "val.bin.tmp"), "wb", buffering=BATCH) as val_bin,
          open(os.path.join(out, "meta.json.tmp"), "w", encoding="utf-8") as meta_json):
        encode_all({"train": train_bin, "val": val_bin})
        if min(count["train_tokens"], count["val_tokens"]) < 2:
            raise UserError(f"{source} has only {count['train_tokens']} training and {count['val_tokens']} validation "
                            "tokens: give more text")
        named = {"source"} | given - {"out", "threads"}
        json.dump({"version": VERSION, "source": source, "dtype": dtype.name, **count, "documents": documents,
                   "fingerprint": wanted, "arguments": {name: settings[name] for name in settings if name in named},
                   "tokenizer": tokens.to_dict()}, meta_json)
        for file in (train_bin, val_bin, meta_json):
            file.flush()
            os.fsync(file.fileno())
    remove(["skipped.txt"])
    lines = describe_skipped()
    remove(["meta.json"])  # until the new one is in place, the folder counts as empty
    for name in ("train.bin", "val.bin", "meta.json"):
        os.replace(os.path.join(out, name + ".tmp"), os.path.join(out, name))
        os.fsync(folder)
    remove(TEMPORARY)

now = time.perf_counter()
n_tokens = count["train_tokens"] + count["val_tokens"]
print("".join(f"{line}\n" for line in lines), end="")
print(f"{source}: {documents:,} document{'s' * (documents > 1)}, {n_bytes:,} bytes, "
      f"{count['val_bytes'] / n_bytes:.1%} of them for validation\n"
      f"{tokenizer}: {tokens.n_vocab:,} tokens, made in {trained - began:.1f} s\n"
      f"{out}: {count['train_tokens']:,} + {count['val_tokens']:,} tokens, {n_bytes / n_tokens:.2f} bytes a token\n"
      f"encoded at {n_bytes / 1e6 / (now - trained):.1f} MB/s, {now - began:.1f} s in all")
if count["val_tokens"] < FEW:
    more = math.ceil(100 * FEW / n_tokens) / 100
    print(f"only {count['val_tokens']:,} tokens for validation: their loss says little; give more text"
          + (f", or {again('val_fraction', more)}" if more <= 0.5 else ""))
