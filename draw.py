"""Grids of numbers as pictures (PNG) and as pages that stand alone (HTML); the tokens of a prompt as labels."""
import contextlib
import html
import io
import os

import blas  # noqa: F401  (before mlx)
import numpy as np

from config import UserError
from model import GPT
from tokenizer import Tokenizer

STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; }
.scroll { overflow-x: auto; padding: 0 16em 10em 0; }
table { border-collapse: collapse; font: 12px/1.3 ui-monospace, monospace; margin: 1em 0; }
th { font-weight: normal; padding: .2em .5em; white-space: pre; }
th[scope=row] { text-align: right; position: sticky; left: 0; z-index: 1; background: Canvas; }
td { position: relative; padding: .3em .5em; text-align: center; white-space: pre; border: 1px solid var(--line); }
td span { display: none; position: absolute; z-index: 2; left: 0; top: 100%; padding: .4em .6em; text-align: left;
          background: Canvas; color: CanvasText; border: 1px solid; }
td:hover span, td:focus span { display: block; }
"""


def prompt_ids(enc: Tokenizer, text: str, model: GPT, name: str = "prompt") -> list[int]:
    """The tokens of the setting `name`, after the one that begins a text. UserError if they are more than the context.
    """
    if not text:
        raise UserError(f"no prompt: give --{name}=TEXT")
    ids = [enc.bos, *enc.encode(text).tolist()]
    if len(ids) > model.config.block_size:
        raise UserError(f"--{name}: the prompt has {len(ids)} tokens with the one that begins a text, the model's "
                        f"context is {model.config.block_size}: give a shorter one")
    return ids


def labels(enc: Tokenizer, ids: list[int]) -> list[str]:
    """Tokens as people read them: blanks as dots in the middle, and what cannot be printed as in Python."""
    texts = [enc.decode_bytes([i]).decode(errors="backslashreplace") for i in ids]
    return ["".join("·" if letter == " " else letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
            for text in texts]


def pictures(path: str) -> tuple[str, str]:
    """The names of a picture and of its page. UserError, before any work, if it cannot be written there."""
    stem, ending = os.path.splitext(path)
    if ending != ".png":
        raise UserError(f"picture={path!r}: it is a PNG, so let its name end in .png")
    for name in (path, f"{stem}.html"):
        check_folder(name)
    return path, f"{stem}.html"


def check_folder(path: str):
    """UserError, before any work, if no file of that name can be written."""
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise UserError(f"cannot write {path}: there is no folder {folder}")
    if os.path.isdir(path):
        raise UserError(f"cannot write {path}: it is a folder; name a file in it")
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write {path}: the folder may not be written to")


def check_finite(values):
    """UserError where a table would tell nonsense."""
    if not np.isfinite(values).all():
        raise UserError("the model's numbers are not finite: its weights are spoilt; take another checkpoint")


def write_whole(path: str, content: bytes):
    """Write a file: the path has the old one or the whole new one."""
    temporary = f"{path}.tmp{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def write_figure(path: str, figure, dpi: int = 150):
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    write_whole(path, file.getvalue())


def short(text: str, width: int = 10) -> str:
    return text if len(text) <= width else f"{text[:width - 1]}…"


def heat_map(path: str, values, rows: list[str], columns: list[str], title: str, texts, unit: str,
             signed: bool = False):
    """A PNG of values (rows, columns); texts (rows, columns) stand in the cells. signed: colours differ below and above
    0. unit: what the colours tell."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    values, columns = np.asarray(values, np.float64), [short(name, 14) for name in columns]
    texts = [[short(text) for text in line] for line in texts]
    low, high = (-1, 1) if signed else (0, 1)
    if values.any():
        low, high = -np.abs(values).max() if signed else min(0, values.min()), np.abs(values).max()
    width = max(0.35, 0.08 * max(len(text) for line in texts for text in line)) * len(columns)
    size = max(2.2 + width, 0.5 + 0.075 * max(len(title), len(unit))), 1.8 + 0.3 * len(rows)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    image = axes.imshow(values, cmap="RdBu_r" if signed else "Blues", vmin=low, vmax=high, aspect="auto",
                        interpolation="nearest")
    for i, line in enumerate(texts):
        for j, text in enumerate(line):
            dark = abs(values[i, j]) > 0.6 * high if signed else values[i, j] > low + 0.6 * (high - low)
            axes.text(j, i, text, ha="center", va="center", fontsize=7, family="monospace", parse_math=False,
                      color="white" if dark else "black")
    axes.set_xticks(range(len(columns)), columns, fontsize=8, family="monospace", parse_math=False,
                    rotation=90 if max(map(len, columns)) * len(columns) > 12 * width else 0)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_title(f"{title}\n{unit}", fontsize=10, parse_math=False)
    figure.colorbar(image, fraction=0.5 / size[0], pad=0.1 / size[0])
    write_figure(path, figure)
    plt.close(figure)


def grid(values, rows: list[str], columns: list[str], texts, hovers, signed: bool = False) -> str:
    """The HTML of a table of values (rows, columns): texts stand in the cells, hovers appear above them."""
    values = np.nan_to_num(np.asarray(values, np.float64))
    top = np.abs(values).max() or 1
    lines = ["<div class=scroll><table><tr><th>" + "".join(f"<th scope=col>{html.escape(name)}" for name in columns)]
    for name, line, text, hover in zip(rows, values, texts, hovers, strict=True):
        cells = []
        for value, inside, above in zip(line, text, hover, strict=True):
            colour = "235 90 60" if signed and value > 0 else "60 130 235"
            cells.append(f'<td tabindex=0 style="background:rgb({colour}/{0.75 * abs(value) / top:.2f})">'
                         f"{html.escape(inside)}<span>{html.escape(above)}</span>")
        lines.append(f"<tr><th scope=row>{html.escape(name)}" + "".join(cells))
    return "\n".join(lines) + "</table></div>"


def page(path: str, title: str, text: str, *parts: str):
    """An HTML page that needs nothing beside itself: title and text are escaped, parts are HTML."""
    title = html.escape(title)
    content = "\n".join([
        f'<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}</style><h1>{title}</h1><p>{html.escape(text)}</p>", *parts, ""])
    write_whole(path, content.encode())
