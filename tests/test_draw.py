"""draw.py: tokens as labels; files whole or not at all; cells of a page; pictures of any grid."""
import re
import stat

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


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("values", [[[0.0, 0.0]], [[-1.0, 2.0], [3.0, 0.0]], [[1e-9] * 40] * 6], ids=len)
def test_heat_map(values, signed, tmp_path):
    rows = [f"layer {i}" for i in range(len(values))]
    columns = ["a$b$c", "<|endoftext|> and more"] * (len(values[0]) // 2)
    texts = [["$x^$", "·" * 30] * (len(columns) // 2) for _ in rows]
    draw.heat_map(str(tmp_path / "x.png"), values, rows, columns, "a $title$", texts, "unit", signed)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
