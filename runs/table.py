"""Tables that the scripts beside this one write into the pages of docs/, and the files of runs that they read."""
import csv

from config import UserError
from draw import write_whole

END = "<!-- end of the table -->"


def column(path: str, name: str, beside: str = "") -> list[float]:
    """The numbers in a column of a loss.csv, of the lines that have one there, or in the column `beside`. UserError if
    there are none, or a line is spoilt."""
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        rows = csv.DictReader(file, strict=True)
        try:
            found = [float(row[name]) for row in rows if row[beside or name]]
        except (KeyError, ValueError, TypeError, csv.Error) as error:
            raise UserError(f"{path}, line {rows.line_num}: {name} is no number: run it again") from error
    if not found:
        raise UserError(f"{path} has no {name} yet: wait for its run, or run it again")
    return found


def read_number(path: str) -> float:
    """The number that a file holds: the seconds that a run took."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return float(file.read())
    except ValueError as error:
        raise UserError(f"{path} holds no number: run it again") from error


def put_table(path: str, script: str, lines: list[str]):
    """Write a Markdown table in place of what stands between the script's mark and the next end mark."""
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        before, mark, rest = file.read().partition(f"<!-- {script} writes this table -->\n")
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise UserError(f"{path} has lost the two marks of the table: nothing was written there")
    text = "\n".join([before + mark + lines[0], *lines[1:], end]) + after
    write_whole(path, text.encode(errors="surrogateescape"))
