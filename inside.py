"""What the scripts that look inside a model share: states at its sites, prompts with answers, and tables of results.

    states = record(model, mx.array([[5, 17, 2]]), ["resid", "heads"])   # {("heads", layer): (B, H, T, D), ...}
    prompts = read_prompts("ioi.jsonl", enc, model)                      # clean, corrupt, target, foil of each line
    table = Table(values, rows, columns, "swap, MLP", "change of log p, nats", about=about(path, model, prompts[0]))
    table.show("swap.png"); table.save("swap.npz"); np.array(table)

A prompt set is a .jsonl, .csv or other file that rows.py reads. Each row has the fields `clean` and `target`, and may
have `corrupt` and `foil`: texts. A Table prints itself, draws a picture and a page, is saved as arrays, and shows
itself in a notebook.
"""
import html
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np

from config import UserError
from draw import check_finite, grid, heat_map, labels, page, pictures, prompt_ids, short, state_name, write_whole
from lora import base_fingerprint
from model import GPT
from rows import read_rows
from tokenizer import Tokenizer

# ---- states ----------------------------------------------------------------------------------------------------------

SITES = {  # what a tap sees: see no_tap in model.py; T is the axis before the last one in each
    "resid": "residual stream", "attn": "attention", "mlp": "MLP",
    "heads": "heads", "q": "queries", "k": "keys", "v": "values", "hidden": "neurons"}


def routed(model: GPT, layer: int, stream: mx.array) -> tuple[mx.array, mx.array]:
    """For the stream (B, T, C) that enters a block: whether the block computes each token, and the token's row in the
    arrays that the block taps, both (B, T). With mod=topk, skipped tokens come after the others in these arrays."""
    block, shape = model.blocks[layer], stream.shape[:2]
    if "predictor" not in block:
        return mx.ones(shape, mx.bool_), mx.broadcast_to(mx.arange(shape[1]), shape)
    chosen, order = block.taken(stream)
    return chosen, mx.argsort(order, axis=1)


def record(model: GPT, idx: mx.array, sites: Iterable[str] = ("resid", "attn", "mlp"),
           noisy: Callable | None = None) -> dict[tuple[str, int], mx.array]:
    """The states of tokens (B, T) at each (site, layer), 0 where a block skips a token: (B, T, C), or for heads, q, k
    and v (B, H, T, D). A layer that has no such site (k and v in YOCO's second half) is left out. noisy: a function
    that is applied to the embeddings."""
    wanted, found = {"resid", *sites}, {}

    def tap(at, layer, x):
        if (at, layer) == ("resid", 0) and noisy is not None:
            x = noisy(x)
        if at in wanted:
            found[at, layer] = x
        return x

    model.residual(idx, tap=tap)
    if model.config.mod == "topk":
        for (site, layer), x in found.items():
            if site == "resid":
                continue
            chosen, row = routed(model, layer, found["resid", layer])
            if x.ndim == 4:
                chosen, row = chosen[:, None], row[:, None]
            x = mx.take_along_axis(x, row[..., None], axis=-2)
            found[site, layer] = mx.where(chosen[..., None], x, 0)
    return found


# ---- answers ---------------------------------------------------------------------------------------------------------


def log_p(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


class Prompt(NamedTuple):
    """Tokens of a clean prompt, of a corrupted one (empty: there is none), the token that should follow the clean one,
    and the token to compare it with (None: there is none)."""
    clean: list[int]
    corrupt: list[int]
    target: int
    foil: int | None

    def measure(self, logits: mx.array) -> mx.array:
        """Of logits (..., V): the target's less the foil's, or without a foil the target's log-probability, (...)."""
        if self.foil is None:
            return log_p(logits)[..., self.target]
        return (logits[..., self.target] - logits[..., self.foil]).astype(mx.float32)


def one_token(enc: Tokenizer, text: str, name: str) -> int:
    """The first token of the setting `name`. UserError if it is empty."""
    ids = enc.encode(text).tolist()
    if not ids:
        raise UserError(f"no {name}: give --{name}=TOKEN")
    if len(ids) > 1:
        print(f"{name} {text!r} is {len(ids)} tokens: the first, {enc.decode(ids[:1])!r}, is used")
    return ids[0]


def prompt_of(enc: Tokenizer, model: GPT, clean: str, corrupt: str, target: str, foil: str) -> Prompt:
    """The prompts and answers of a script's settings, of which corrupt and foil may be "". UserError if they do not
    fit the model, or target and foil begin with the same token."""
    ids = prompt_ids(enc, clean, model, "clean")
    found = Prompt(ids, prompt_ids(enc, corrupt, model, "corrupt") if corrupt else [],
                   one_token(enc, target, "target"), one_token(enc, foil, "foil") if foil else None)
    if found.target == found.foil:
        raise UserError(f"target and foil begin with the same token, {enc.decode([found.target])!r}: give another foil")
    return found


def read_prompts(path: str, enc: Tokenizer, model: GPT) -> list[Prompt]:
    """The prompts of a file, one a row. UserError tells which row is wrong."""
    found = []
    for where, row in read_rows(path):
        if isinstance(row, ValueError):
            raise UserError(f"{path}, {where}: {row}")
        texts = [row.get(name) or "" for name in ("clean", "corrupt", "target", "foil")]
        if not all(isinstance(text, str) for text in texts) or not (texts[0] and texts[2]):
            raise UserError(f"{path}, {where}: it needs the texts clean and target, and may have corrupt and foil")
        try:
            found.append(prompt_of(enc, model, *texts))
        except UserError as error:
            raise UserError(f"{path}, {where}: {error}") from None
    if not found:
        raise UserError(f"{path} has no rows: write one a line, as in "
                        '{"clean": "...", "corrupt": "...", "target": "...", "foil": "..."}')
    return found


def measured(enc: Tokenizer, prompt: Prompt) -> str:
    """What Prompt.measure() gives, in words."""
    if prompt.foil is None:
        return f"log p({enc.decode([prompt.target])!r})"
    return f"logit of {enc.decode([prompt.target])!r} less that of {enc.decode([prompt.foil])!r}"


# ---- tables ----------------------------------------------------------------------------------------------------------


def numbered(enc: Tokenizer, ids: list[int]) -> list[str]:
    """The labels of tokens, with their positions."""
    return [f"{i} {text}" for i, text in enumerate(labels(enc, ids))]


def rows_of(site: str, n_layer: int) -> tuple[list[str], str]:
    """The names of the states at a site in each layer, and what they are."""
    if site == "resid":
        return [state_name(layer) for layer in range(n_layer)], SITES[site]
    return [f"layer {layer}'s {SITES[site]}" for layer in range(n_layer)], "output of"


def about(checkpoint: str, model: GPT, **more) -> dict:
    """What a result was computed from: the checkpoint's name and hash, the command, and more of it by name. Call it
    before set_dtype(), which changes the weights."""
    command = " ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]])
    return {"checkpoint": os.path.basename(checkpoint), "sha256": base_fingerprint(model), "command": command, **more}


@dataclass
class Table:
    """Numbers (rows, columns) with names: the result of a script that looks inside. Row 0 is drawn at the bottom.
    unit: what is measured. axis: what the rows are. hovers (rows, columns): more about each cell. about: from about().
    """
    values: np.ndarray
    rows: list[str]
    columns: list[str]
    title: str
    unit: str
    axis: str = ""
    hovers: list[list[str]] | None = None
    about: dict = field(default_factory=dict)

    def __array__(self, dtype=None, copy=None):
        return np.array(self.values, dtype)

    def texts(self, digits: int) -> list[list[str]]:
        def signed(value: float) -> str:
            text = f"{value:+.{digits}f}"
            return text if float(text) else "0"

        return [[signed(value) for value in line] for line in self.values]

    @property
    def digits(self) -> int:
        """After the point, so that the largest number has two digits that are not 0."""
        largest = np.abs(self.values).max()
        return min(5, max(2, 1 - math.floor(math.log10(largest)))) if largest else 2

    def print(self):
        margin = max(map(len, [self.axis, *self.rows]))
        width = max(self.digits + 5, min(11, max(map(len, self.columns))))
        print(f"{self.title}: {self.unit}" if len(self.title) + len(self.unit) < 79 else f"{self.title}:\n{self.unit}")
        step = max(1, (80 - margin) // (width + 1))  # columns that fit into 80 characters
        texts = self.texts(self.digits + 1)
        for first in range(0, len(self.columns), step):
            part = slice(first, first + step)
            print(f"{self.axis:{margin}}" + "".join(f" {short(name, width):>{width}}" for name in self.columns[part]))
            for name, line in zip(self.rows[::-1], texts[::-1], strict=True):
                print(f"{name:{margin}}" + "".join(f" {text:>{width}}" for text in line[part]))

    def grid(self) -> str:
        """The table as HTML."""
        hovers = self.hovers or [[""] * len(self.columns)] * len(self.rows)
        hovers = [[f"{row}, {column}\n{more}" for column, more in zip(self.columns, line, strict=True)]
                  for row, line in zip(self.rows, hovers, strict=True)]
        return grid(self.values[::-1], self.rows[::-1], self.columns, self.texts(self.digits)[::-1], hovers[::-1],
                    signed=True, axis=self.axis)

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self.title)}: {html.escape(self.unit)}</p>{self.grid()}{listed(self.about)}"

    def show(self, picture: str):
        """Print the table, and draw it as a picture and a page."""
        check_finite(self.values)
        self.print()
        picture, written = pictures(picture)
        heat_map(picture, self.values[::-1], self.rows[::-1], self.columns, self.title,
                 self.texts(self.digits)[::-1], self.unit, signed=True, axis=self.axis)
        page(written, self.title, f"Colour: {self.unit}. Hover over a cell, or reach it with the Tab key, to see more.",
             self.grid(), listed(self.about))
        print(f"drawn: {picture}, {written}")

    def save(self, path: str):
        """Write the table to an .npz file: values, rows, columns, and the rest as JSON in `about`."""
        more = {"title": self.title, "unit": self.unit, "axis": self.axis, **self.about}
        save_arrays(path, values=self.values, rows=np.array(self.rows), columns=np.array(self.columns),
                    about=np.array(json.dumps(more)))


def listed(about: dict) -> str:
    """What a result was computed from, as HTML."""
    lines = [f"<dt>{html.escape(name)}<dd><code>{html.escape(str(value))}</code>" for name, value in about.items()]
    return f"<dl>{''.join(lines)}</dl>" if lines else ""


def save_arrays(path: str, **arrays):
    """Write arrays to an .npz file."""
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    write_whole(path, file.getvalue())
    print(f"written: {path}")


if __name__ == "__main__":
    print("inside.py has no command of its own: run patching.py, which uses it", file=sys.stderr)
    sys.exit(2)
