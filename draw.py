"""Grids of numbers as pictures (PNG) and as pages that stand alone (HTML); the tokens of a prompt as labels."""
import html
import os
import tempfile

import blas  # noqa: F401  (before mlx)
import numpy as np

from config import UserError
from model import GPT
from tokenizer import Tokenizer

STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font: 12px/1.3 ui-monospace, monospace; margin: 1em 0; }
th { font-weight: normal; padding: .2em .5em; text-align: right; white-space: pre; }
td { position: relative; padding: .3em .5em; text-align: center; white-space: pre; border: 1px solid var(--line); }
td span { display: none; position: absolute; z-index: 1; left: 0; top: 100%; padding: .4em .6em; text-align: left;
          background: Canvas; color: CanvasText; border: 1px solid; }
td:hover span, td:focus span { display: block; }
"""


def prompt_ids(enc: Tokenizer, prompt: str, model: GPT) -> list[int]:
    """The prompt's tokens, after the token that begins a text. UserError if they are more than the context."""
    if not prompt:
        raise UserError("no prompt: give --prompt=TEXT")
    ids = [enc.bos, *enc.encode(prompt).tolist()]
    if len(ids) > model.config.block_size:
        raise UserError(f"the prompt has {len(ids)} tokens with the one that begins a text, the model's context is "
                        f"{model.config.block_size}: give a shorter one")
    return ids


def labels(enc: Tokenizer, ids: list[int]) -> list[str]:
    """Tokens as people read them: blanks as low lines, the others' escapes as in Python."""
    return [enc.decode([i]).replace("\\", "\\\\").encode("unicode_escape").decode().replace("\\\\", "\\").replace(
        " ", "_") if not enc.decode([i]).isprintable() else enc.decode([i]).replace(" ", "_") for i in ids]


def write_whole(path: str, content: bytes):
    """Write a file: the path has the old one or the whole new one."""
    try:
        with tempfile.NamedTemporaryFile(dir=os.path.dirname(path) or ".", delete=False) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def heat_map(path: str, values, rows: list[str], columns: list[str], title: str, texts=None, signed: bool = False,
             unit: str = "", row_name: str = "layer"):
    """A PNG of values (rows, columns), numbers or nan; texts (rows, columns) stand in the cells. signed: colours differ
    below and above 0."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    values = np.asarray(values, np.float64)
    top = np.nanmax(np.abs(values)) if np.isfinite(values).any() else 0
    low, high = (-(top or 1), top or 1) if signed else (min(0, np.nanmin(values)), np.nanmax(values) or 1)
    widest = max([len(text) for line in texts for text in line], default=0) if texts is not None else 0
    width = max(0.35, 0.075 * widest) * len(columns)
    figure, axes = plt.subplots(figsize=(max(4, 2.2 + width), 1.6 + 0.3 * len(rows)), layout="constrained")
    image = axes.imshow(values, cmap="RdBu_r" if signed else "Blues", vmin=low, vmax=high, aspect="auto",
                        interpolation="nearest")
    for i, line in enumerate(texts if texts is not None else []):
        for j, text in enumerate(line):
            dark = abs(values[i, j]) > 0.6 * top if signed else values[i, j] > low + 0.6 * (high - low)
            axes.text(j, i, text.replace("$", "\\$"), ha="center", va="center", fontsize=7, family="monospace",
                      color="white" if dark else "black")
    axes.set_xticks(range(len(columns)), [text.replace("$", "\\$") for text in columns], fontsize=8,
                    rotation=90 if max(map(len, columns)) * len(columns) > 12 * width else 0)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set(ylabel=row_name, title=title.replace("$", "\\$"))
    axes.title.set_fontsize(10)
    figure.colorbar(image, label=unit)
    with tempfile.SpooledTemporaryFile() as file:
        figure.savefig(file, format="png", dpi=150)
        file.seek(0)
        write_whole(path, file.read())
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
