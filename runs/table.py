"""Tables that the scripts beside this one write into the pages of docs/."""
import os

from config import UserError

END = "<!-- end of the table -->"


def put_table(path: str, script: str, lines: list[str]):
    """Write a Markdown table in place of what stands between the script's mark and the next end mark."""
    with open(path, encoding="utf-8") as file:
        before, mark, rest = file.read().partition(f"<!-- {script} writes this table -->\n")
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise UserError(f"{path} has lost the two marks of the table: nothing was written there")
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        file.write("\n".join([before + mark + lines[0], *lines[1:], end]) + after)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)
