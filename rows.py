"""The rows of .jsonl, .json, .csv, .tsv and .parquet files; the text files may be compressed by gzip.

    for where, row in read_rows("tasks.jsonl"): ...       # ("tasks.jsonl, line 7", {"prompt": "Hi", "response": "Hey"})
"""
import csv
import gzip
import itertools
import json
import os
import sys
import zlib
from collections.abc import Iterator

from config import UserError
from text_files import decoded

ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz")


def read_rows(path: str) -> Iterator[tuple[str, dict | ValueError]]:
    """The rows of a file: (where the row stands, the row). In place of a row that cannot be read stands a ValueError
    that says why. A list in a .json file is read whole; all else is read a part at a time. UserError: the file is not
    in UTF-8, UTF-16 or UTF-32, is damaged, is a folder, or needs pyarrow."""
    if os.path.isdir(path):
        held = [name for name in sorted(os.listdir(path)) if name.lower().endswith(ENDINGS)]
        example = f", such as {os.path.join(path, held[0])}" if held else ""
        raise UserError(f"{path} is a folder: give a file{example}")
    extension = os.path.splitext(path.lower().removesuffix(".gz"))[1]
    read = {".parquet": read_parquet, ".csv": read_table, ".tsv": read_table}.get(extension, read_json)
    try:
        for where, row in read(path, extension):
            known = isinstance(row, dict | ValueError)
            yield f"{path}, {where}", row if known else ValueError("it is not an object in { }")
    except UnicodeDecodeError as error:
        for _ in decoded(path, 2**22):  # raises NotText, which tells how to convert the file
            pass
        raise UserError(f"{path} is not text ({error}): copy it again") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged or cut short ({error}): copy it again") from error


def open_text(path: str):
    """A text file, which may be compressed, opened for reading. Its line ends are kept."""
    with open(path, "rb") as file:
        opened = gzip.open if file.read(2) == b"\x1f\x8b" else open
    with opened(path, "rb") as file:
        encoding = json.detect_encoding(file.read(4))
    return opened(path, "rt", encoding=encoding, newline="")


def read_json(path: str, extension: str) -> Iterator[tuple]:
    """The lines of a file, or the list in it. The content decides which, as files have wrong extensions."""
    with open_text(path) as file:
        lines = list(itertools.islice(filter(str.strip, file), 2))
        by_line = extension != ".json" and not "".join(lines).lstrip().startswith("[")
        by_line = by_line or len(lines) == 2 and not isinstance(loaded(lines[0]), ValueError)
        file.seek(0)
        if by_line or not lines:
            yield from ((f"line {number}", loaded(line)) for number, line in enumerate(file, 1) if line.strip())
            return
        whole = loaded(file.read())
    if isinstance(whole, ValueError):
        raise UserError(f"{path}: {whole}: correct it, or copy the file again")
    if isinstance(whole, dict):  # an object that holds the list, or a single row
        lists = [part for part in whole.values() if isinstance(part, list) and part and isinstance(part[0], dict)]
        whole = lists[0] if len(lists) == 1 and not {"role", "from", "input"} & set(lists[0][0]) else [whole]
    yield from ((f"row {number}", row) for number, row in enumerate(whole if isinstance(whole, list) else [whole], 1))


def loaded(text: str):
    """The value of a JSON text; a ValueError if there is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return ValueError(f"no JSON can be read ({error})")


def read_table(path: str, extension: str) -> Iterator[tuple]:
    """Cells separated by commas, semicolons or tabs, whichever the first line has most of. It names the fields."""
    csv.field_size_limit(2**31 - 1)
    with open_text(path) as file:
        delimiter = "\t" if extension == ".tsv" else max(",;\t", key=file.readline().count)
        file.seek(0)
        rows, names = csv.reader(file, delimiter=delimiter, strict=True), None
        while True:
            where = f"line {rows.line_num + 1}"
            try:
                cells = next(rows, None)
            except csv.Error as error:
                if not names or "end of data" in str(error):  # a quote that does not end hides the rows after it
                    raise UserError(f"{path}, {where}: the quotes are wrong ({error}): correct them") from error
                yield where, ValueError(f"the quotes are wrong ({error})")
                continue
            if cells is None:
                return
            if not names:
                names = [name.strip() for name in cells]
            elif len(cells) == len(names):
                yield where, dict(zip(names, cells, strict=True))
            elif cells:  # a blank line has none
                yield where, ValueError(f"it has {len(cells)} cells, and the first line {len(names)}")


def read_parquet(path: str, extension: str) -> Iterator[tuple]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(".parquet files need the Python package pyarrow: pip install pyarrow") from error
    with open(path, "rb") as file:
        try:
            batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=256)
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not a parquet file, or is damaged: copy it again") from error


if __name__ == "__main__":
    print(f"{sys.argv[0]} has no command of its own: run data.py, which uses it", file=sys.stderr)
    sys.exit(2)
