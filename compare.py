"""Compare runs: their curves in one picture, the settings that differ, and whether a difference is more than noise.

    for seed in 1 2 3; do
        python train.py --seed=$seed --out_dir=out-base-$seed
        python train.py --seed=$seed --out_dir=out-alibi-$seed --alibi=True
        python train.py --seed=$seed --out_dir=out-low-$seed --muon_lr=0.01
    done
    python compare.py out-*
    out-alibi  alibi=True
    out-base   as most
    out-low    muon_lr=0.01

    run        seeds  val_loss        range  step   last  val_bpb  tok/s   GiB
    out-alibi      3     4.711  4.624-4.776    60  4.711    3.646    724  0.02
    out-base       3     4.777  4.749-4.815    60  4.777    3.697  1,274  0.02
    out-low        3     4.974  4.961-4.986    60  4.974    3.849  5,392  0.02

    These rows have a higher val_loss than out-alibi (the best), and the ranges do
    not overlap: out-low (+0.263).

    These rows differ from out-alibi (the best) by no more than noise, as the ranges
    of val_loss overlap: out-base (+0.066).

    drawn: compare-alibi-base-low.png, compare-alibi-base-low.html

    python compare.py out-base-1 out-low-1 --x=tokens --out=two.png

(Models of 2 layers and width 64, 60 updates of 8 x 64 tokens, on 0.5 MB of Python; two AMD EPYC cores, 2026-11-26. They
were busy with other work besides, which is all that tok/s shows here.)

Each argument is an OUT_DIR of train.py, sft.py or dpo.py; a run that is still going is drawn as far as it has come.
Runs whose settings differ in nothing but the seed (and out_dir, log, resume and the like) make one row. In the table,
val_loss is the mean over the row's seeds of each run's lowest validation loss, in nats; step is where those losses were
reached; last is the validation loss of the last evaluation. val_bpb (bits a byte) and accuracy (of dpo.py) belong to
the step of val_loss. range is from the lowest to the highest seed, of the column on its left. tok/s is the median; GiB
is the peak memory.

The picture and the page beside it show training loss as a thin line, validation loss as a thick one with markers, and
the range of the seeds as a band. On the page, pointing at a line tells run, step and loss.

Noise: each row is compared with the best row, or with the row named by --against. Two rows are said to differ only if
both have two seeds or more and their ranges do not overlap. If the settings made no difference at all, the ranges would
still lie apart in 1 of 3 comparisons with two seeds a row, in 1 of 10 with three, and in 1 of 35 with four.
"""
import json
import math
import os
import re
import shutil
import statistics
import textwrap
from html import escape

from safetensors import SafetensorError, safe_open

from config import UserError, nearest, overrides
from draw import page, pictures, short, write_figure

runs = ()          # folders, each an OUT_DIR of train.py, sft.py or dpo.py
against = ""       # the name of the row that the others are compared with; "": the best
x = "step"         # step | tokens | seconds
markdown = False   # print the table as Markdown
out = ""           # the picture, with .html beside it; "": compare-NAMES.png in the working folder

settings = overrides(globals(), "runs")

RUN_ONLY = {"out_dir", "seed", "resume", "overwrite", "log", "log_interval", "sample_tokens", "samples", "peft"}
NUMBERS = "step", "tokens", "seconds", "train_loss", "val_loss", "val_bpb", "accuracy", "tok_per_s", "peak_gib"
CHECKPOINTS = "ckpt", "best", "sft", "dpo"
MOST_COLUMNS = 6  # of settings, in a table

# ---- read ------------------------------------------------------------------------------------------------------------


def read_rows(path: str) -> list[dict[str, float]]:
    """The numbers of a loss.csv, a dict a line. dpo.py says in a column, split, which loss a line has. UserError names
    a line that is spoilt; a last line without its end is still being written, and left out."""
    with open(path, newline="", errors="replace") as file:
        lines = file.read().split("\n")[:-1]
    rows = []
    for number, line in enumerate(lines, 1):
        fields = line.rstrip("\r").split(",")  # numbers, which need no quotes
        if number == 1:
            names = fields
            if "step" not in names or not {"train_loss", "val_loss", "split"} & {*names}:
                raise UserError(f"{path}, line 1 names no step and loss: it is not from train.py, sft.py or dpo.py")
            continue
        if len(fields) != len(names):
            raise UserError(f"{path}, line {number} has {len(fields)} fields, not {len(names)}: mend or delete it")
        row = dict(zip(names, fields, strict=True))
        if "split" in row:
            row["val_loss" if row["split"] == "val" else "train_loss"] = row.get("loss", "")
        if not row["step"]:
            raise UserError(f"{path}, line {number} has no step: mend or delete it")
        rows.append({name: to_number(row[name], f"{path}, line {number}: {name}") for name in NUMBERS if row.get(name)})
    return rows


def to_number(text: str, where: str) -> float:
    try:
        value = float(text)
        if math.isfinite(value):
            return value
    except ValueError:
        pass
    raise UserError(f"{where} is {text!r}, not a number: mend or delete the line")


def read_start(folder: str) -> dict:
    """What a run was started with, {"settings", "commit", perhaps "script"}, from run.json or a checkpoint's header."""
    paths = [os.path.join(folder, name) for name in ("run.json", *(f"{n}.safetensors" for n in CHECKPOINTS))]
    path = next((path for path in paths if os.path.exists(path)), None)
    if not path:
        raise UserError(f"{folder} has neither run.json nor a checkpoint: its settings are unknown")
    try:
        if path == paths[0]:
            with open(path) as file:
                start = json.load(file)
        else:
            with safe_open(path, "numpy") as file:
                start = json.loads((file.metadata() or {}).get("tinygpt", "null"))
    except (ValueError, SafetensorError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): is it whole?") from error
    if not isinstance(start, dict) or not isinstance(start.get("settings"), dict):
        raise UserError(f"{path} names no settings: it is not from train.py, sft.py or dpo.py")
    for name, kind in {"script": str, "commit": str, "max_iters": int, "seed": int}.items():
        value = (start["settings"] if kind is int else start).get(name)
        if value is not None and type(value) is not kind:
            raise UserError(f"{path} has {name}={value!r}: correct it, or leave the run out")
    return start


def read_run(folder: str) -> dict:
    """{"folder", "seed", "settings", "kind", "commit", "rows", "last", "end"}: last is the step it has come to, end
    the step where it stops (none: unknown)."""
    path = os.path.join(folder, "loss.csv")
    if not os.path.exists(path):
        raise UserError(f"{folder} has no loss.csv: give folders that train.py, sft.py or dpo.py wrote")
    rows, start = read_rows(path), read_start(folder)
    known = start["settings"]
    kind = script = start.get("script")
    if kind not in ("train.py", "sft.py", "dpo.py"):  # a copy of one of them: which one, its settings tell
        kind = "train.py" if "max_iters" in known else "dpo.py" if "beta" in known else "sft.py"
    return {"folder": folder, "seed": known.get("seed"), "settings": {"script": script or kind, **known}, "rows": rows,
            "kind": kind, "commit": start.get("commit"), "last": max((int(row["step"]) for row in rows), default=0),
            "end": known.get("max_iters")}


def curve(run: dict, column: str) -> dict[int, tuple[float, float]]:
    """step -> (x, value), in the order of the steps, of a column of loss.csv. UserError if the run has no such x."""
    found = {}
    for row in run["rows"]:
        if column in row:
            if x not in row:
                raise UserError(f"{run['folder']}/loss.csv has no {x}: take --x=step")
            found[int(row["step"])] = row[x], row[column]
    return dict(sorted(found.items()))


def figures(run: dict) -> dict[str, float]:
    """Of a run, what the table has: a part of val_loss, step, last, val_bpb, accuracy, tok_per_s, peak_gib."""
    measured = [row for row in run["rows"] if "val_loss" in row]
    found = {}
    if measured:
        best = min(measured, key=lambda row: row["val_loss"])
        found = {name: best[name] for name in ("val_loss", "step", "val_bpb", "accuracy") if name in best}
        found["last"] = measured[-1]["val_loss"]
    for name, of in (("tok_per_s", statistics.median), ("peak_gib", max)):
        values = [row[name] for row in run["rows"] if name in row]
        if values:
            found[name] = of(values)
    return found


# ---- rows: runs that differ in their seeds alone ---------------------------------------------------------------------


def differing(found: list[dict]) -> list[str]:
    """The settings of which runs have more than one value. One that an older run has not is no difference by itself."""
    names = dict.fromkeys(name for run in found for name in run["settings"] if name not in RUN_ONLY)
    return [name for name in names
            if len({json.dumps(run["settings"][name]) for run in found if name in run["settings"]}) > 1]


def finished(run: dict) -> bool:
    return run["end"] is None or run["last"] >= run["end"]


def rows_of(found: list[dict]) -> list[dict]:
    """Rows {"name", "settings", "runs", "counted", "figures"}. counted: its finished runs, or all if none is; figures:
    name -> the values of those."""
    names, groups = differing(found), {}
    for run in found:
        key = json.dumps([run["settings"].get(name) for name in names])
        groups.setdefault(key, []).append(run)
    rows = []
    for group in groups.values():
        counted = [run for run in group if finished(run)] or group
        each = [figures(run) for run in counted]
        rows.append({"runs": group, "counted": counted, "settings": {n: group[0]["settings"].get(n) for n in names},
                     "figures": {n: [f[n] for f in each if n in f] for n in {n for f in each for n in f}}})
    for row, name in zip(rows, row_names([row["runs"] for row in rows]), strict=True):
        row["name"] = name
    return rows


def row_names(groups: list[list[dict]]) -> list[str]:
    """What all folders of a row are called but for a number at the end; where that is nothing, or another row's name
    too, the first one's name and how many more there are."""
    folders = [[os.path.normpath(run["folder"]) for run in group] for group in groups]
    if len({os.path.dirname(folder) for group in folders for folder in group}) == 1:
        folders = [[os.path.basename(folder) for folder in group] for group in folders]
    stems = [{re.sub(r"([-_.](s|seed)[-_.]?|[-_.]?)\d+$", "", folder) if group[1:] else folder for folder in group}
             for group in folders]
    names = []
    for group, stem in zip(folders, stems, strict=True):
        name = min(stem)
        unique = len(stem) == 1 and os.path.basename(name) and stems.count(stem) == 1
        names.append(name if unique else group[0] + (f" +{len(group) - 1}" if len(group) > 1 else ""))
    return names


def seeds(row: dict) -> int:
    return len({run["seed"] for run in row["counted"]})


def mean_curve(row: dict, column: str) -> list[tuple[float, int, float, float, float]]:
    """(x, step, mean, lowest, highest), at the steps that all counted runs have."""
    curves = [curve(run, column) for run in row["counted"]]
    found = []
    for step in sorted(set.intersection(*map(set, curves))):
        places, values = zip(*(each[step] for each in curves), strict=True)
        found.append((statistics.fmean(places), step, statistics.fmean(values), min(values), max(values)))
    return found


# ---- what may be compared --------------------------------------------------------------------------------------------


def measure(rows: list[dict], names: list[str]) -> tuple[str, list[str]]:
    """The figure in which rows compare, val_loss or val_bpb ("": none), and sentences that say why."""
    kinds = {row["runs"][0]["kind"] for row in rows}
    if len(kinds) > 1:
        return "", [f"{' and '.join(sorted(kinds))} measure different losses, which cannot be compared."]
    kind, notes = kinds.pop(), []

    def differ(*asked):
        return ", ".join(name for name in asked if name in names)

    found = "val_loss"
    if kind == "train.py":
        if text := differ("data", "tokenizer", "vocab_size"):
            found = "val_bpb"
            notes.append(f"The runs differ in {text}: losses a token cannot be compared. Bits a byte can be, if the "
                         "validation text is the same; they are drawn.")
        if differ("eval_windows"):
            notes.append("The runs differ in eval_windows: they are measured on different pieces of the text.")
    elif kind == "sft.py":
        if text := differ("data", "val_data", "val_share", "template", "learn_prompts"):
            found = ""
            notes.append(f"The runs differ in {text}: their losses are of different tokens and cannot be compared.")
    elif text := differ("data", "val_data", "val_share", "loss", "beta", "gamma", "label_smoothing"):
        found = ""
        notes.append(f"The runs differ in {text}: their losses measure different things and cannot be compared; the "
                     "accuracy can, if the pairs held out are the same.")
    if kind != "train.py" and any(seeds(row) > 1 and not row["runs"][0]["settings"].get("val_data") for row in rows):
        notes.append("Without --val_data the seed also chooses which examples are held out: the ranges contain that.")
    return found, notes


def verdict(row: dict, other: dict, name: str) -> str:
    """"lower", "higher" or "noise" of a row beside another; "one seed" or "" (no figure) where nothing can be told."""
    mine, others = row["figures"].get(name), other["figures"].get(name)
    if not mine or not others:
        return ""
    if min(seeds(row), seeds(other)) < 2:
        return "one seed"
    return "lower" if max(mine) < min(others) else "higher" if min(mine) > max(others) else "noise"


def conclusions(rows: list[dict], name: str) -> list[str]:
    """A sentence for each verdict on the rows beside `against`, or beside the best. Rows without a finished run get
    none."""
    done = [row for row in rows if any(map(finished, row["runs"])) and row["figures"].get(name)]
    if against:
        names = [row["name"] for row in rows]
        if against not in names:
            raise UserError(f"--against={against}: no row has that name; {nearest(against, names)}")
        done = [row for row in done if row["name"] == against] + [row for row in done if row["name"] != against]
        if not done or done[0]["name"] != against:
            return [f"{against} has no finished run with a {name}: nothing is compared with it yet."]
    said = {}
    for row in done[1:]:
        change = statistics.fmean(row["figures"][name]) - statistics.fmean(done[0]["figures"][name])
        said.setdefault(verdict(row, done[0], name), []).append(f"{row['name']} ({change:+.3f})")
    first = done[0]["name"] + ("" if against else " (the best)") if done else ""
    texts = {"lower": f"These rows have a lower {name} than {first}, and the ranges do not overlap:",
             "higher": f"These rows have a higher {name} than {first}, and the ranges do not overlap:",
             "noise": f"These rows differ from {first} by no more than noise, as the ranges of {name} overlap:",
             "one seed": f"One seed cannot tell a difference from noise. Beside {first}, in {name}:"}
    return [f"{text} {', '.join(said[key])}." for key, text in texts.items() if key in said]


def remarks(rows: list[dict]) -> list[str]:
    """Sentences on runs that are unfinished, have no validation loss, are there twice, or come from different code."""
    notes = []
    for row in rows:
        for run in row["runs"]:
            if not finished(run):
                what = "it counts as far as it is" if run in row["counted"] else "it is drawn, but not counted"
                notes.append(f"{run['folder']} has reached step {run['last']} of {run['end']}: {what}.")
            if not any("val_loss" in line for line in run["rows"]):
                notes.append(f"{run['folder']} has no validation loss yet.")
        again = [run["folder"] for i, run in enumerate(row["runs"]) if run["seed"] in
                 [other["seed"] for other in row["runs"][:i]]]
        if again:
            notes.append(f"{', '.join(again)}: another run has the same settings and the same seed.")
    commits = sorted({run["commit"][:7] + "-dirty" * run["commit"].endswith("-dirty")
                      for row in rows for run in row["runs"] if run["commit"]})
    if len(commits) > 1:
        notes.append(f"The runs are of different commits of the code: {', '.join(commits)}.")
    return notes


# ---- table -----------------------------------------------------------------------------------------------------------


def text_of(value) -> str:
    return "-" if value is None else str(value)


def span(values: list, form: str = "{:.3f}") -> str:
    """The lowest and the highest of values; one number if they look alike."""
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low}-{high}"


def table_of(rows: list[dict], ranged: str) -> list[list[str]]:
    """A header and a line a row: name, seeds, figures, and the range of the figure `ranged`. Columns that are empty in
    all rows are left out."""
    columns = {
        "val_loss": lambda f: f"{statistics.fmean(f['val_loss']):.3f}",
        "step": lambda f: span(f["step"], "{:.0f}"),
        "last": lambda f: f"{statistics.fmean(f['last']):.3f}",
        "val_bpb": lambda f: f"{statistics.fmean(f['val_bpb']):.3f}",
        "range": lambda f: span(f[ranged]) if len(f[ranged]) > 1 else "",
        "accuracy": lambda f: f"{statistics.fmean(f['accuracy']):.1%}",
        "tok/s": lambda f: f"{statistics.median(f['tok_per_s']):,.0f}",
        "GiB": lambda f: f"{max(f['peak_gib']):.2f}",
    }
    order = list(columns)
    if ranged == "val_loss":
        order.insert(1, order.pop(order.index("range")))
    needs = {"range": ranged, "tok/s": "tok_per_s", "GiB": "peak_gib"}
    made = {"run": [row["name"] for row in rows], "seeds": [str(seeds(row)) for row in rows]}
    for name in order:
        cells = [columns[name](row["figures"]) if row["figures"].get(needs.get(name, name)) else "" for row in rows]
        if any(cells):
            made[name] = cells
    return [list(made), *map(list, zip(*made.values(), strict=True))]


def own_settings(row: dict, rows: list[dict]) -> list[str]:
    """name=value of the settings that differ; a value that more than half of the rows have is not repeated."""
    return [f"{name}={text_of(value)}" for name, value in row["settings"].items()
            if 2 * sum(other["settings"][name] == value for other in rows) <= len(rows)]


def with_settings(table: list[list[str]], rows: list[dict], names: list[str]) -> list[list[str]]:
    """The table with a column a setting after the names, or where they are many, with one column of them."""
    columns = [names, *([text_of(row["settings"][name]) for name in names] for row in rows)]
    if len(names) > MOST_COLUMNS:
        columns = [["settings"], *([" ".join(own_settings(row, rows))] for row in rows)]
    return [[line[0], *more, *line[1:]] for line, more in zip(table, columns, strict=True)]


def aligned(table: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                      for i, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip() for line in table]


def settings_lines(rows: list[dict], width: int) -> list[str]:
    """For a table that is too wide: a line a row of its settings."""
    column, lines = max(len(row["name"]) for row in rows) + 2, []
    for row in rows:
        text = " ".join(own_settings(row, rows)) or "as most"
        lines += textwrap.wrap(text, max(width, column + 20), initial_indent=row["name"].ljust(column),
                               subsequent_indent=" " * column, break_long_words=False, break_on_hyphens=False)
    return lines


def table_lines(table: list[list[str]], rows: list[dict], names: list[str], width: int) -> list[str]:
    """The table as the terminal shows it: with the settings as columns, or before it where they do not fit."""
    lines = aligned(with_settings(table, rows, names))
    if max(map(len, lines)) <= width:
        return lines
    room = max(10, width - max(map(len, aligned([line[1:] for line in table]))) - 2 - len(table[0][1]))
    return [*settings_lines(rows, width), "",
            *aligned([[short(line[0], room), *line[1:]] for line in table])]


def markdown_lines(table: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in table]
    return [lines[0], "|---" * len(table[0]) + "|", *lines[1:]]


# ---- picture and page ------------------------------------------------------------------------------------------------

COLOURS = "#1f77b4 #ff7f0e #2ca02c #d62728 #9467bd #8c564b #e377c2 #7f7f7f #bcbd22 #17becf".split()
DASHES = [(), (7, 3), (2, 2)]  # each for as many rows as there are colours


def style(i: int) -> tuple[str, tuple]:
    return COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]


def draw(path: str, rows: list[dict], val: str, unit: str):
    """The curves, and beside them their last half, larger. val: the column that is drawn as validation."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = [row["name"] + (f", {seeds(row)} seeds" if seeds(row) > 1 else "") for row in rows]
    columns = max(1, min(len(rows), 150 // (max(map(len, labels)) + 10)))
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.8 + 0.22 * -(-len(rows) // columns)), layout="constrained")
    seen, handles = [], []
    for i, row in enumerate(rows):
        colour, dashes = style(i)
        line = {"color": colour, "dashes": dashes} if dashes else {"color": colour}
        means = mean_curve(row, val)
        train = mean_curve(row, "train_loss") if val == "val_loss" else []
        unfinished = [each for run in row["runs"] if run not in row["counted"] and (each := curve(run, val))]
        for axes in panels:
            if train:
                axes.plot([p[0] for p in train], [p[2] for p in train], lw=0.7, alpha=0.6, **line)
            for each in unfinished:
                axes.plot(*zip(*each.values(), strict=True), lw=1, ls=":", marker=".", color=colour)
            marker = "o" if len(means) < 30 else "."
            handle, = axes.plot([p[0] for p in means], [p[2] for p in means], lw=2, marker=marker, ms=4, **line)
            if len(row["counted"]) > 1:
                axes.fill_between([p[0] for p in means], [p[3] for p in means], [p[4] for p in means], color=colour,
                                  alpha=0.18, lw=0)
        handles.append(handle)
        seen += [(p[0], value) for p in means for value in p[2:]] + [(p[0], p[2]) for p in train]
        seen += [point for each in unfinished for point in each.values()]
    if seen:
        end = max(place for place, _ in seen)
        late = [value for place, value in seen if place >= end / 2]
        low, high = min(late), max(late)
        room = 0.05 * (high - low) or 0.01
        panels[1].set(xlim=(end * 0.49, end * 1.01), ylim=(low - room, high + room))
    panels[0].set(xlabel=x, ylabel=unit, title="the whole runs")
    panels[1].set(xlabel=x, title="the last half")
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.ticklabel_format(useOffset=False)
    figure.suptitle(("thin: training loss; thick: validation loss" if val == "val_loss" else "the validation text") +
                    "; band: from the lowest to the highest seed", fontsize=10)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9, frameon=False, handlelength=3)
    write_figure(path, figure)
    plt.close(figure)


PAGE = """<style>
#frame { position: relative; }
#plot { width: 100%; height: 28em; display: block; touch-action: pan-y; }
#plot text { font: 12px system-ui, sans-serif; fill: currentColor; }
#told { position: absolute; display: none; pointer-events: none; white-space: pre; padding: .3em .6em; font-size: 13px;
        background: Canvas; color: CanvasText; border: 1px solid; }
button { font: inherit; font-size: 13px; margin: 0 .3em .4em 0; padding: .15em .6em; border: 1px solid #8886;
         background: none; color: inherit; cursor: pointer; }
button[aria-pressed=true] { border-color: currentColor; }
#names button[aria-pressed=false] { opacity: .4; text-decoration: line-through; }
#names svg { width: 24px; height: 8px; margin-right: .4em; vertical-align: middle; }
.wide { overflow-x: auto; }
.wide td { text-align: right; }
</style>
<div id=parts role=group aria-label="part of the runs"></div>
<div id=frame><svg id=plot role=img aria-label="loss curves"></svg><div id=told></div></div>
<div id=names role=group aria-label="rows"></div>"""

SCRIPT = """
const data = JSON.parse(document.getElementById('data').textContent);
const plot = document.getElementById('plot'), told = document.getElementById('told');
const left = 56, right = 12, top_ = 10, bottom = 40, hidden = new Set();
let from = 0, drawn = [];  // share of the x axis that is left out; points that can be pointed at

function add(parent, name, attributes, text) {
  const element = parent.appendChild(document.createElementNS('http://www.w3.org/2000/svg', name));
  for (const key in attributes) element.setAttribute(key, attributes[key]);
  if (text !== undefined) element.textContent = text;
  return element;
}
function ticks(low, high, most) {
  const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
  const size = [1, 2, 5, 10].find(factor => factor * power >= rough) * power, found = [];
  for (let i = Math.ceil(low / size); i * size <= high; i++) found.push(i * size);
  const digits = Math.max(0, -Math.floor(Math.log10(size) + 1e-9));
  return found.map(value => [value, value.toLocaleString('en', {minimumFractionDigits: digits,
                                                                maximumFractionDigits: digits})]);
}
function show() {
  plot.replaceChildren();
  told.style.display = 'none';
  const W = plot.clientWidth, H = plot.clientHeight, rows = data.rows.filter((_, i) => !hidden.has(i));
  const all = rows => rows.flatMap(row => [...row.mean, ...row.train, ...row.runs.flatMap(run => run.val)]);
  const end = all(data.rows).reduce((most, p) => Math.max(most, p[0]), 0) || 1, start = from * end;
  const seen = all(rows).filter(p => p[0] >= start).map(p => p[2]);
  let low = seen.reduce((a, b) => Math.min(a, b), seen[0] ?? 0), high = seen.reduce((a, b) => Math.max(a, b), low);
  const room = (high - low) * 0.05 || 0.01;
  low -= room;
  high += room;
  const X = value => left + (value - start) / (end - start) * (W - left - right);
  const Y = value => H - bottom - (value - low) / (high - low) * (H - top_ - bottom);
  const clip = add(add(plot, 'clipPath', {id: 'inside'}), 'rect',
    {x: left - 4, y: 0, width: W - left - right + 8, height: H - bottom + 4});
  for (const [value, text] of ticks(start, end, W / 90)) {
    add(plot, 'line', {x1: X(value), x2: X(value), y1: top_, y2: H - bottom, stroke: '#8883'});
    add(plot, 'text', {x: X(value), y: H - bottom + 16, 'text-anchor': 'middle'}, text);
  }
  for (const [value, text] of ticks(low, high, 8)) {
    add(plot, 'line', {x1: left, x2: W - right, y1: Y(value), y2: Y(value), stroke: '#8883'});
    add(plot, 'text', {x: left - 6, y: Y(value) + 4, 'text-anchor': 'end'}, text);
  }
  add(plot, 'text', {x: (left + W - right) / 2, y: H - 4, 'text-anchor': 'middle'}, data.x);
  add(plot, 'text', {transform: `translate(12 ${(top_ + H - bottom) / 2}) rotate(-90)`, 'text-anchor': 'middle'},
    data.unit);
  const inside = add(plot, 'g', {'clip-path': 'url(#inside)', fill: 'none'});
  const line = (points, row, width, more) => points.length && add(inside, 'polyline', {stroke: row.colour,
    'stroke-width': width, points: points.map(p => `${X(p[0]).toFixed(1)},${Y(p[2]).toFixed(1)}`).join(' '),
    'stroke-dasharray': row.dashes, ...more});
  drawn = [];
  const target = (points, row, run, what) => drawn.push(...points.filter(p => p[0] >= start)
    .map(p => ({x: X(p[0]), y: Y(p[2]), p, row, run, what})));
  for (const row of rows) {
    if (row.runs.length > 1) {
      const edge = [...row.mean.map(p => [p[0], p[3]]), ...row.mean.map(p => [p[0], p[4]]).reverse()];
      const points = edge.map(p => `${X(p[0]).toFixed(1)},${Y(p[1]).toFixed(1)}`).join(' ');
      add(inside, 'polygon', {points, fill: row.colour, opacity: 0.15});
    }
    line(row.train, row, 0.8, {opacity: 0.7});
    target(row.train, row, null, 'training loss');
    for (const run of row.runs) {
      line(run.val, row, 0.8, {opacity: 0.8, 'stroke-dasharray': '1 3'});
      target(run.val, row, run, data.val);
    }
    line(row.mean, row, 2.2);
    if (row.mean.length < 60)
      for (const p of row.mean) add(inside, 'circle', {cx: X(p[0]), cy: Y(p[2]), r: 3.2, fill: row.colour});
    target(row.mean, row, row.runs.length > 1 ? null : row.runs[0], data.val);
  }
  add(plot, 'circle', {id: 'ring', r: 6, fill: 'none', stroke: 'currentColor', visibility: 'hidden'});
}
function point(event) {
  const box = plot.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
  const ring = document.getElementById('ring');
  let best = null, least = 40 ** 2;
  for (const each of drawn) {
    const far = (each.x - x) ** 2 + (each.y - y) ** 2;
    if (far <= least) [best, least] = [each, far];
  }
  ring.setAttribute('visibility', best ? 'visible' : 'hidden');
  told.style.display = best ? 'block' : 'none';
  if (!best) return;
  ring.setAttribute('cx', best.x);
  ring.setAttribute('cy', best.y);
  const {p, row, run, what} = best, seeds = row.seeds > 1 ? `, mean of ${row.seeds} seeds` : '';
  told.textContent = `${run ? `${run.name}, seed ${run.seed}` : row.name + seeds}\\n` +
    `step ${p[1].toLocaleString('en')}${data.x === 'step' ? '' : `, ${p[0].toLocaleString('en')} ${data.x}`}\\n` +
    `${what} ${p[2].toFixed(4)}${p.length > 3 && !run ? ` (${p[3].toFixed(4)} to ${p[4].toFixed(4)})` : ''}`;
  told.style.left = Math.max(0, Math.min(best.x + 12, plot.clientWidth - told.offsetWidth)) + 'px';
  told.style.top = best.y + (best.y > plot.clientHeight / 2 ? -told.offsetHeight - 12 : 12) + 'px';
}
plot.onpointermove = plot.onpointerdown = point;
plot.onpointerleave = () => {
  told.style.display = 'none';
  document.getElementById('ring').setAttribute('visibility', 'hidden');
};
function button(parent, text, pressed, press) {
  const made = document.getElementById(parent).appendChild(document.createElement('button'));
  made.append(text);
  made.setAttribute('aria-pressed', pressed);
  made.onclick = () => { press(made); show(); };
  return made;
}
[['the whole runs', 0], ['the last half', 0.5], ['the last tenth', 0.9]].forEach(([text, share]) =>
  button('parts', text, share === from, made => {
    from = share;
    for (const other of made.parentNode.children) other.setAttribute('aria-pressed', other === made);
  }));
data.rows.forEach((row, i) => {
  const made = button('names', row.name, true, () => {
    hidden.has(i) ? hidden.delete(i) : hidden.add(i);
    made.setAttribute('aria-pressed', !hidden.has(i));
  });
  const sample = add(made, 'svg', {'aria-hidden': true});
  add(sample, 'line', {x2: 24, y1: 4, y2: 4, stroke: row.colour, 'stroke-width': 3, 'stroke-dasharray': row.dashes});
  made.prepend(sample);
});
new ResizeObserver(show).observe(plot);
"""


def write_page(path: str, rows: list[dict], val: str, unit: str, table: list[list[str]], notes: list[str]):
    def points(run: dict) -> list:
        return [(place, step, value) for step, (place, value) in curve(run, val).items()]

    shown = []
    for i, row in enumerate(rows):
        colour, dashes = style(i)
        shown.append({
            "name": row["name"], "colour": colour, "dashes": " ".join(map(str, dashes)), "seeds": seeds(row),
            "mean": mean_curve(row, val),
            "train": [p[:3] for p in mean_curve(row, "train_loss")] if val == "val_loss" else [],
            "runs": [{"name": run["folder"], "seed": run["seed"], "val": points(run)} for run in row["runs"]]})
    names = {"val_loss": "validation loss", "val_bpb": "bits a byte of the validation text"}
    data = {"x": x, "unit": unit, "val": names[val], "rows": shown}
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    lines = ["<div class=wide><table><tr>" + "".join(f"<th scope=col>{escape(cell)}" for cell in table[0])]
    lines += [f"<tr><th scope=row>{escape(line[0])}" + "".join(f"<td>{escape(cell)}" for cell in line[1:])
              for line in table[1:]]
    number = sum(len(row["runs"]) for row in rows)
    told = "Thin: training loss; thick: validation loss" if val == "val_loss" else "Thick: the validation text"
    page(path, "Runs compared", f"{number} runs, {len(rows)} rows. {told}; band: from the lowest to the highest seed; "
         "dotted: each seed. Point at a line to read it; press a name to hide its row.", PAGE,
         f'<script type="application/json" id=data>{text}</script><script>{SCRIPT}</script>',
         "\n".join(lines) + "</table></div>", *(f"<p>{escape(note)}</p>" for note in notes))


def drawn_runs(html: str) -> list[str] | None:
    """The runs on a page that this script wrote; none: there is no page, or another one."""
    try:
        with open(html, encoding="utf-8") as file:
            text = file.read().partition('id=data>')[2].partition("</script>")[0]
        return [run["name"] for row in json.loads(text)["rows"] for run in row["runs"]]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def default_out(rows: list[dict]) -> str:
    """compare-NAMES.png in the working folder."""
    names = sorted(re.sub(r"[^\w.-]+", "-", row["name"].removeprefix("out-")).strip("-.") for row in rows)
    whole = "-".join(names)
    return f"compare-{whole if len(whole) <= 40 else f'{names[0][:30]}-and-{len(names) - 1}-more'}.png"


# ---- run -------------------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    folders = {os.path.realpath(run): os.path.normpath(run) for run in runs if not os.path.isfile(run)}
    if not folders:  # files are left out, since a shell's * names them too
        raise UserError("no runs: give folders that train.py, sft.py or dpo.py wrote: python compare.py out-1 out-2")
    if x not in ("step", "tokens", "seconds"):
        raise UserError(f"x={x!r} is not one of step, tokens, seconds")
    rows = rows_of([*map(read_run, folders.values())])
    names = list(rows[0]["settings"])
    name, notes = measure(rows, names)
    rows.sort(key=lambda row: statistics.fmean(row["figures"].get(name or "val_loss") or [math.inf]))
    notes = [*(conclusions(rows, name) if name else []), *notes, *remarks(rows)]
    path, html = pictures(out or default_out(rows))
    here, before = {run["folder"] for row in rows for run in row["runs"]}, drawn_runs(html)
    others = os.path.exists(path) and (before is None or not set(before) <= here)
    what = f"a picture of {', '.join(before)}" if before else "another picture"
    if others and not out:
        raise UserError(f"{path} is {what}: name a new one with --out=, or that one to replace it")

    width = shutil.get_terminal_size().columns
    figures_alone = table_of(rows, name or "val_loss")
    table = with_settings(figures_alone, rows, names)
    print("\n".join(markdown_lines(table) if markdown else table_lines(figures_alone, rows, names, width)))
    for note in notes:
        print("\n" + textwrap.fill(note, width, break_long_words=False, break_on_hyphens=False))
    val = name if name == "val_bpb" else "val_loss"
    unit = {"train.py": "nats a token", "sft.py": "nats a response token"}.get(rows[0]["runs"][0]["kind"], "loss")
    unit = "bits a byte" if val == "val_bpb" else unit
    draw(path, rows, val, unit)
    write_page(html, rows, val, unit, table, notes)
    print(f"\ndrawn: {path}, {html}" + f"; replaced {what}" * others)
