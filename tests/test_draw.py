"""draw.py: tokens as labels; files whole or not at all; cells of a page; curves and grids as pictures."""
import re
import stat

import numpy as np
import pytest

import draw
from config import UserError
from tokenizer import byte_tokenizer


def test_labels():
    """Blanks as dots, the rest as Python writes it; a prompt has the token that begins a text before it."""
    enc = byte_tokenizer()
    assert draw.labels(enc, [*b" a\n\t$", 0xe2, enc.bos]) == ["·", "a", "\\n", "\\t", "$", "\\xe2", "<|endoftext|>"]
    assert draw.short("abcdefghij") == "abcdefghij" and draw.short("abcdefghijk") == "abcdefghi…"


def test_files(tmp_path):
    """Readable by all, as other files; where nothing can be written, one error, and nothing is left."""
    draw.write_whole(str(tmp_path / "a"), b"old")
    draw.write_whole(str(tmp_path / "a"), b"new")
    assert (tmp_path / "a").read_bytes() == b"new" and stat.S_IMODE((tmp_path / "a").stat().st_mode) & 0o400
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "none" / "a"):
        with pytest.raises(UserError, match="cannot write"):
            draw.write_whole(str(path), b"x")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b", "folder"]
    assert draw.pictures(f"{tmp_path}/x.y.png") == (f"{tmp_path}/x.y.png", f"{tmp_path}/x.y.html")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "x.html").mkdir()
    for bad in ("x.html", "x", "none/x.png", f"{tmp_path}/folder.png", f"{tmp_path}/x.png"):
        with pytest.raises(UserError):
            draw.pictures(bad)


def test_pictures_replace_only_pictures(tmp_path):
    """A file that was drawn here may be drawn again. One that was not is refused, also where only the page is one."""
    path, html = draw.pictures(f"{tmp_path}/a.png")
    for _ in range(2):
        draw.curves(path, [{"step": 1, "x": 2.0}], {"y": {"x": "x"}}, "title")
        draw.page(html, "a \udcff", "text")
        draw.pictures(path)
    for name in (path, html):
        whole = (tmp_path / name).read_bytes()
        for other in (b"", whole[1:90], b"my own"):
            (tmp_path / name).write_bytes(other)
            with pytest.raises(UserError, match=f"{re.escape(name)} exists, and was not drawn here"):
                draw.pictures(path)
        (tmp_path / name).write_bytes(whole)


def test_letters_without_a_picture(tmp_path, recwarn):
    """Tokens of any script can be drawn: where the font has no picture of a letter, nothing is printed about it."""
    draw.heat_map(f"{tmp_path}/a.png", np.ones((1, 2)), ["a"], ["\u5165", "b"], "title", [["\u0b95", "c"]], "unit")
    assert (tmp_path / "a.png").exists() and not recwarn.list


def test_page(tmp_path):
    """What is text is escaped; a cell's colour tells its sign and, by 3/4 of the largest, its size."""
    table = draw.grid([[1, -2], [0, 0.5]], ["<r>", "s"], ["a&b", "c"], [["<i>", "j"], ["k", "l"]],
                      [["<h>", "1"], ["2", "3"]], signed=True)
    assert re.findall(r"rgb\((.*?)\)", table) == ["235 90 60/0.38", "60 130 235/0.75", "60 130 235/0.00",
                                                  "235 90 60/0.19"]
    draw.page(str(tmp_path / "p.html"), "<t>", "x & y", table)
    html = (tmp_path / "p.html").read_text()
    assert not re.search(r"<[rihtx]>", html) and all(f"&lt;{letter}&gt;" in html for letter in "riht")
    assert "a&amp;b" in html and "x &amp; y" in html


def test_names_beyond_ascii(tmp_path):
    """A file's name as Python has it where the locale is not UTF-8, or where its bytes are no text."""
    for name, text in (("b\udcc3\udcbc.txt", "bü.txt"), ("\udcff", "\ufffd"), ("\ud800", "\\ud800"), ("ü", "ü")):
        assert draw.printable(name) == text
        draw.curves(str(tmp_path / "a.png"), [{"step": 1, "x": 2.0}], {"y": {"x": "x"}}, name)
        draw.expert_load(str(tmp_path / "b.png"), [1], np.ones((1, 1, 2)), name)
        draw.heat_map(str(tmp_path / "c.png"), [[1.0]], ["r"], ["c"], name, [["t"]], name)
        draw.page(str(tmp_path / "d.html"), name, name)
        assert f"<title>{text}</title>" in (tmp_path / "d.html").read_text()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("values", [[[0.0, 0.0]], [[-1.0, 2.0], [3.0, 0.0]], [[1e-9] * 40] * 6], ids=len)
def test_heat_map(values, signed, tmp_path):
    rows = [f"layer {i}" for i in range(len(values))]
    columns = ["a$b$c", "<|endoftext|> and more"] * (len(values[0]) // 2)
    texts = [["$x^$", "·" * 30] * (len(columns) // 2) for _ in rows]
    draw.heat_map(str(tmp_path / "x.png"), values, rows, columns, "a $title$", texts, "unit", signed)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_heat_map_without_room(drawn, tmp_path):
    """Where the numbers could not be read, cells have none, labels are left out, and the picture stays small. Lines
    part groups of rows; notes stand below."""
    values = np.arange(12 * 1024).reshape(12, 1024)
    texts = [["+1.23"] * 1024] * 12
    draw.heat_map(str(tmp_path / "a.png"), values, ["r"] * 12, ["c"] * 1024, "title", texts, "unit", group=4,
                  notes=["a note " * 100])
    draw.heat_map(str(tmp_path / "b.png"), values[:, :40], ["r"] * 12, ["c"] * 40, "title", [["+1.23"] * 40] * 12, "u")
    for figure, cells, columns in zip(drawn, (0, 480), (256, 40), strict=True):
        axes = figure.axes[0]
        assert len(axes.texts) == cells and len(axes.get_xticks()) == columns and figure.get_figwidth() < 45
    lines = drawn[0].axes[0].collections[0].get_segments()
    assert [line[0][1] for line in lines] == [3.5, 7.5] and "a note a note" in drawn[0].get_supxlabel()
    table = draw.grid(values[:3, :1], ["a", "b", "c"], ["x"], [["1"]] * 3, [["h"]] * 3, group=2)
    assert table.count("class=line") == 1 and table.index("class=line") > table.index(">b")
    legend = draw.legend([[1, -2]], "<u>", True)
    assert re.findall(r'">([^<]*)', legend) == ["-2", "-1", "+0", "+1", "+2"] and "&lt;u&gt;" in legend


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are written, as Matplotlib holds them; the files are written too."""
    figures, write = [], draw.write_figure
    monkeypatch.setattr(draw, "write_figure", lambda path, figure: (figures.append(figure), write(path, figure)))
    return figures


@pytest.mark.filterwarnings("error")
def test_curves(drawn, tmp_path):
    """Rows as csv.DictReader reads them and as a script holds them; a column that no row has leaves no curve."""
    rows = [{"step": "0", "train_loss": "", "val_loss": "3.5"}, {"step": "1", "train_loss": "3", "val_loss": ""},
            {"step": 2, "train_loss": 2.5, "val_loss": 2.25}, {"step": 3, "train_loss": None}]
    panels = {"nats": {"train_loss": "training", "val_loss": "validation"}, "share": {"val_accuracy": "accuracy"}}
    draw.curves(str(tmp_path / "x.png"), rows, panels, "a $title$", {"guessing": 4.0})
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    first, second = drawn[0].axes
    training, validation, guessing = first.get_lines()
    assert training.get_xydata().tolist() == [[1, 3], [2, 2.5]] and training.get_marker() == "None"
    assert validation.get_xydata().tolist() == [[0, 3.5], [2, 2.25]] and validation.get_marker() == "o"
    assert guessing.get_ydata() == [4, 4] and not second.get_lines() and second.get_ylabel() == "share"
    assert [text.get_text() for text in first.get_legend().get_texts()] == [
        "training, last 2.5", "validation, last 2.25", "guessing"]


@pytest.mark.filterwarnings("error")
def test_expert_load(drawn, tmp_path):
    """A row of cells for each expert, from layer 0 at the bottom; a column as wide as the steps that it stands for."""
    load = np.random.default_rng(0).uniform(0, 2, (3, 2, 4))
    draw.expert_load(str(tmp_path / "x.png"), [25, 50, 60], load, "4 experts")
    axes = drawn[0].axes[0]
    mesh, = axes.collections[:1]
    np.testing.assert_allclose(mesh.get_array(), [load[:, layer, e] for layer in (0, 1) for e in range(4)])
    assert mesh.get_coordinates()[0, :, 0].tolist() == [0, 25, 50, 60] and not axes.yaxis_inverted()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1"]
