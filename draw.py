"""Curves and grids of numbers as pictures (PNG), grids also as pages (HTML) of one file each; tokens as labels."""
import contextlib
import html
import io
import math
import os
import sys
import textwrap
import warnings
from base64 import b64encode

import blas  # noqa: F401  (before mlx)
import numpy as np

from config import UserError
from model import GPT
from tokenizer import Tokenizer

STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; }
"""
TABLES = """
.scroll { overflow-x: auto; padding: 0 16em 10em 0; }
table { border-collapse: collapse; font: 12px/1.3 ui-monospace, monospace; margin: 1em 0; }
th { font-weight: normal; padding: .2em .5em; white-space: pre; }
th[scope=row] { text-align: right; position: sticky; left: 0; z-index: 1; background: Canvas; }
td { position: relative; padding: .3em .5em; text-align: center; white-space: pre;
     border: 1px solid var(--line, #8884); }
td span { display: none; position: absolute; z-index: 2; left: 0; top: 100%; padding: .4em .6em; text-align: left;
          background: Canvas; color: CanvasText; border: 1px solid; }
tr.line > * { border-top: 2px solid; }
td:hover span, td:focus span { display: block; }
"""
PAGE = '<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'


def prompt_ids(enc: Tokenizer, text: str, model: GPT, name: str = "prompt", bos: bool = True) -> list[int]:
    """The tokens of the setting `name`, after those that begin a text, unless bos is False. UserError if the context is
    shorter."""
    if not text:
        raise UserError(f"no prompt: give --{name}=TEXT")
    start = enc.start if bos else []
    ids = [*start, *enc.encode(text).tolist()]
    if len(ids) > model.config.block_size:
        begins = " with the one that begins a text" * len(start)
        raise UserError(f"--{name}: the prompt has {len(ids)} tokens{begins}, the model's context is "
                        f"{model.config.block_size}: give a shorter one")
    return ids


def labels(enc: Tokenizer, ids: list[int]) -> list[str]:
    """Tokens as text: a space is written as a dot, and a character that cannot be printed as its Python escape."""
    texts = [enc.decode_bytes([i]).decode(errors="backslashreplace") for i in ids]
    return ["".join("·" if letter == " " else letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
            for text in texts]


def state_name(index: int) -> str:
    """The name of the residual stream's state that layer `index` reads, or, for n_layer, the head. Layers count from
    0."""
    return f"after layer {index - 1}" if index else "embedding"


def pictures(path: str) -> tuple[str, str]:
    """The paths of a picture and of its page (PNG, HTML). UserError if one of them cannot be written, or is a file that
    was not drawn here: a user who names a picture may not think of the page."""
    stem, ending = os.path.splitext(path)
    if ending != ".png":
        raise UserError(f"picture={path!r}: it is a PNG, so let its name end in .png")
    for name, mark in ((path, b"https://matplotlib.org/"), (f"{stem}.html", PAGE.encode())):
        check_folder(name)
        if os.path.exists(name):
            with open(name, "rb") as file:
                if mark not in file.read(1000):
                    raise UserError(f"{name} exists, and was not drawn here: give the picture another name")
    return path, f"{stem}.html"


def check_folder(path: str):
    """UserError if no file can be written at this path. Called before long work, whose result would be lost."""
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise UserError(f"cannot write {path}: there is no folder {folder}")
    if os.path.isdir(path):
        raise UserError(f"cannot write {path}: it is a folder; name a file in it")
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write {path}: the folder may not be written to")


def check_finite(values):
    """UserError if a value is infinite or not a number."""
    if not np.isfinite(values).all():
        raise UserError("the model's numbers are not finite: its weights are damaged; take another checkpoint")


@contextlib.contextmanager
def whole_file(path: str):
    """A file to write bytes to. The path holds either the old content or all of the new one, never a part; an error
    leaves the old content. UserError if it cannot be written."""
    temporary = f"{path}.tmp{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def write_whole(path: str, content: bytes):
    """Write a file as whole_file() does."""
    with whole_file(path) as file:
        file.write(content)


def write_figure(path: str, figure, dpi: int = 150):
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a letter that no font here has is drawn as a box
        figure.savefig(file, format="png", dpi=dpi)
    write_whole(path, file.getvalue())


def curves(path: str, rows: list[dict], panels: dict[str, dict[str, str]], title: str, level: dict | None = None):
    """A PNG of columns of loss.csv over its steps. panels: for each panel the label of its vertical axis, with its
    columns and what the legend calls them. A row without a value in a column is left out of that curve. level: the
    legend and the height of a dotted line in the first panel."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 + 4 * len(panels), 4), layout="constrained")
    for axes, (label, columns) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for column, name in columns.items():
            points = [(int(row["step"]), float(row[column])) for row in rows if row.get(column) not in (None, "")]
            if points:
                style = "o-" if column.startswith("val") else "-"
                axes.plot(*zip(*points, strict=True), style, label=f"{name}, last {points[-1][1]:.4g}", ms=4)
        for name, height in (level or {}).items():
            axes.axhline(height, color="gray", lw=0.8, ls=":", label=name)
        level = None
        axes.set(xlabel="step", ylabel=label)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
        axes.grid(alpha=0.3)
    figure.suptitle(printable(title), parse_math=False)
    write_figure(path, figure)


COLOURS = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"  # told apart by colour-blind eyes too (Okabe and Ito)


def growth(path: str, panels: list[dict], title: str):
    """A PNG of small multiples with logarithmic axes: panels come in pairs, the second below the first. A panel has a
    name, labels x and y, and curves: name, x, measured (dots) and expected (a line)."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    def number(value: float, _=None) -> str:
        for size, letter in ((2**20, "M"), (2**10, "k")):
            if value >= size and value % size == 0:
                return f"{value / size:g}{letter}"
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    n = len(panels) // 2
    figure = Figure(figsize=(0.3 + 2.45 * n, 5.8), layout="constrained")
    colours = {}
    columns = figure.subplots(2, n, squeeze=False).T
    for two, both in zip(columns, zip(panels[::2], panels[1::2], strict=True), strict=True):
        for i, (axes, panel) in enumerate(zip(two, both, strict=True)):
            for curve in panel["curves"]:
                colour = colours.setdefault(curve["name"], COLOURS[len(colours) % len(COLOURS)])
                axes.plot(curve["x"], curve["expected"], "-", color=colour, lw=5, alpha=0.22, solid_capstyle="round")
                axes.plot(curve["x"], curve["measured"], "o-", color=colour, ms=4.5, lw=1.1, label=curve["name"])
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            xs = sorted({x for curve in panel["curves"] for x in curve["x"]})
            axes.xaxis.set_major_locator(FixedLocator(xs))
            axes.xaxis.set_major_formatter(FuncFormatter(number))
            values = [v for curve in panel["curves"] for v in (*curve["measured"], *curve["expected"])]
            low, high = min(values), max(values)
            if high < 4 * low:  # flat: two decades of nothing would look like growth
                middle = (low * high) ** 0.5
                low, high = middle / 2.2, middle * 2.2
            axes.set_ylim(low / 1.35, high * 1.35)
            axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5) if high < 60 * low else (1,)))
            axes.yaxis.set_major_formatter(FuncFormatter(number))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.tick_params(labelsize=8, color="#999999")
            axes.grid(color="#000000", alpha=0.08)
            axes.spines[["top", "right"]].set_visible(False)
            axes.spines[["left", "bottom"]].set_color("#999999")
            axes.set_ylabel(panel["y"], fontsize=9)
            if i == 0:
                axes.set_title(panel["name"], fontsize=10, fontweight="bold", loc="left")
            else:
                axes.set_xlabel(panel["x"], fontsize=9)
    handles = {name: axes for axes in figure.axes for name in axes.get_legend_handles_labels()[1]}
    shown = [handles[name].get_legend_handles_labels() for name in colours]
    lines = [found[names.index(name)] for name, (found, names) in zip(colours, shown, strict=True)]
    figure.legend(lines, colours, loc="outside lower center", ncols=len(colours), fontsize=9, frameon=False)
    figure.suptitle(printable(title), fontsize=11, parse_math=False)
    write_figure(path, figure)


def lines(path: str, panels: list[dict], title: str, x: str):
    """A PNG of panels side by side, whose horizontal axes have the label x. A panel has a label y and curves
    {name: (x, y)}; it may have ticks {x: name}, and levels {name: y}, which are dotted lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 4 * len(panels), 4), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for (name, points), colour in zip(panel["curves"].items(), COLOURS, strict=False):
            axes.plot(*points, "o-", color=colour, ms=4, label=name)
        for name, height in panel.get("levels", {}).items():
            axes.axhline(height, color="gray", lw=0.8, ls=":", label=name)
        if panel.get("ticks"):
            axes.set_xticks([*panel["ticks"]], [*panel["ticks"].values()])
        axes.set(xlabel=x)
        axes.set_ylabel(panel["y"], parse_math=False)
        axes.grid(alpha=0.3)
        if len(axes.get_legend_handles_labels()[0]) > 1:
            axes.legend(fontsize=8)
    figure.suptitle(printable(title), fontsize=10, parse_math=False)
    write_figure(path, figure)


def image(path: str) -> str:
    """The HTML of a picture, for a page that needs no other file."""
    with open(path, "rb") as file:
        content = b64encode(file.read()).decode()
    return f'<img alt="the curves" style="max-width:100%" src="data:image/png;base64,{content}">'


def expert_load(path: str, steps: list[int], load: np.ndarray, title: str):
    """A PNG of how many tokens each expert took, over the mean of its layer: load (steps, layers, experts). Layer 0 is
    at the bottom. The column of a step stands for all steps since the one before it."""
    from matplotlib.figure import Figure

    _, L, E = load.shape
    figure = Figure(figsize=(7, 1.2 + 0.1 * L * E), layout="constrained")
    axes = figure.subplots()
    image = axes.pcolormesh([0, *steps], np.arange(L * E + 1), load.reshape(-1, L * E).T, cmap="RdBu_r", vmin=0, vmax=2)
    axes.set(xlabel="step", ylabel="layer", yticks=[E * (layer + 0.5) for layer in range(L)], yticklabels=range(L))
    axes.set_title(printable(title), parse_math=False)
    axes.hlines([E * layer for layer in range(1, L)], 0, steps[-1], color="black", lw=1)
    figure.colorbar(image, ax=axes, extend="max")
    write_figure(path, figure)


def printable(text: str) -> str:
    """A text that a picture can show: the bytes of a file's name that Python could not decode are read as UTF-8."""
    return text.encode(errors="any_text").decode(errors="replace")  # config.py defines any_text


def short(text: str, width: int = 10) -> str:
    return text if len(text) <= width else f"{text[:width - 1]}…"


LARGEST = 40  # inches of a heat map: wider ones, and those of more than TEXTS cells, have no numbers in their cells
TEXTS = 2500


def heat_map(path: str, values, rows: list[str], columns: list[str], title: str, texts, unit: str,
             signed: bool = False, axis: str = "", group: int = 0, notes: list[str] = ()):
    """A PNG of values (rows, columns), with texts (rows, columns) in the cells, where they can be read. signed: values
    below and above 0 have different colours. unit: what the colours measure. axis: what the rows are. group: rows
    between two lines; 0: no lines. notes: lines below the picture."""
    from matplotlib.figure import Figure

    values, columns = np.asarray(values, np.float64), [short(name, 14) for name in columns]
    texts = [[short(text) for text in line] for line in texts]
    low, high = (-1, 1) if signed else (0, 1)
    if values.any():
        low, high = -np.abs(values).max() if signed else min(0, values.min()), np.abs(values).max()
    wide, tall = max(0.35, 0.08 * max(len(text) for line in texts for text in line)), 0.3  # of a cell, in inches
    if with_texts := values.size <= TEXTS and wide * len(columns) <= LARGEST:
        tall = min(tall, max(0.15, LARGEST / len(rows)))
    else:
        wide, tall = (min(size, LARGEST / n) for size, n in ((0.2, len(columns)), (0.3 if len(rows) < 50 else 0.11,
                                                                                  len(rows))))
    width, height = wide * len(columns), tall * len(rows)
    size = max(2.2 + width, 0.5 + 0.075 * max(len(title), len(unit))), 1.8 + height
    notes = [line for note in notes for line in textwrap.wrap(printable(note), int(14 * size[0]))]
    figure = Figure(figsize=(size[0], size[1] + 0.14 * len(notes)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap="RdBu_r" if signed else "Blues", vmin=low, vmax=high, aspect="auto",
                        interpolation="nearest")
    for (i, j), value in np.ndenumerate(values) if with_texts else ():
        dark = abs(value) > 0.6 * high if signed else value > low + 0.6 * (high - low)
        axes.text(j, i, texts[i][j], ha="center", va="center", fontsize=7 if tall > 0.2 else 6, family="monospace",
                  parse_math=False, color="white" if dark else "black", in_layout=False)
    every = math.ceil(0.13 / wide)  # a label takes 0.13 inches
    axes.set_xticks(range(0, len(columns), every), columns[::every], fontsize=8, family="monospace", parse_math=False,
                    rotation=90 if max(map(len, columns)) * len(columns) > 12 * width else 0)
    every = math.ceil(0.1 / tall)
    axes.set_yticks(range(0, len(rows), every), rows[::every], fontsize=8 if tall > 0.12 else 6)
    axes.set_ylabel(axis, fontsize=8)
    if group:
        axes.hlines(np.arange(group, len(rows), group) - 0.5, -0.5, len(columns) - 0.5, color="black", lw=0.8)
    axes.set_title(printable(f"{title}\n{unit}"), fontsize=10, parse_math=False)
    if notes:
        figure.supxlabel("\n".join(notes), x=0.01, ha="left", fontsize=7, parse_math=False)
    figure.colorbar(image, ax=axes, fraction=0.5 / size[0], pad=0.1 / size[0])
    write_figure(path, figure)


def grid(values, rows: list[str], columns: list[str], texts, hovers, signed: bool = False, axis: str = "",
         group: int = 0) -> str:
    """The HTML of a table of values (rows, columns), with texts in its cells. A cell's hover text appears while the
    mouse is over it. signed: values below and above 0 have different colours. axis: what the rows are. group: rows
    between two lines; 0: no lines."""
    values = np.nan_to_num(np.asarray(values, np.float64))
    top = np.abs(values).max() or 1
    lines = [f"<div class=scroll><table><tr><th scope=col>{html.escape(axis)}"
             + "".join(f"<th scope=col>{html.escape(name)}" for name in columns)]
    for n, (name, line, text, hover) in enumerate(zip(rows, values, texts, hovers, strict=True)):
        cells = []
        for value, inside, above in zip(line, text, hover, strict=True):
            cells.append(f'<td tabindex=0 style="background:{colour_of(value / top, signed)}">'
                         f"{html.escape(inside)}<span>{html.escape(above)}</span>")
        line = " class=line" if group and n and n % group == 0 else ""
        lines.append(f"<tr{line}><th scope=row>{html.escape(name)}" + "".join(cells))
    return "\n".join(lines) + "</table></div>"


def colour_of(share: float, signed: bool) -> str:
    """The colour of a cell whose value is this share of the largest one, for CSS."""
    return f"rgb({'235 90 60' if signed and share > 0 else '60 130 235'}/{0.75 * abs(share):.2f})"


def legend(values, unit: str, signed: bool = False) -> str:
    """The HTML of a legend of grid()'s colours."""
    top = np.abs(np.nan_to_num(np.asarray(values, np.float64))).max() or 1
    shares = (-1, -0.5, 0, 0.5, 1) if signed else (0, 0.5, 1)
    cells = "".join(f'<td style="background:{colour_of(share, signed)}">{share * top:{"+" * signed}.2g}'
                    for share in shares)
    return f"<table><tr><th scope=row>{html.escape(unit)}{cells}</table>"


def page(path: str, title: str, text: str, *parts: str):
    """Write an HTML page that needs no other file. title and text are escaped, parts are HTML."""
    title = html.escape(title)
    content = "\n".join([
        f"{PAGE}<title>{title}</title><style>{STYLE}{TABLES}</style><h1>{title}</h1><p>{html.escape(text)}</p>", *parts,
        ""])
    write_whole(path, printable(content).encode())


def for_notebook(*parts: str) -> str:
    """Parts of a page as a notebook shows them: with the style of tables, which holds for them alone."""
    return f"<div class=tinygpt><style>.tinygpt {{{TABLES}}}</style>{''.join(parts)}</div>"


if __name__ == "__main__":
    print("draw.py has no command of its own: run train.py, which uses it", file=sys.stderr)
    sys.exit(2)
