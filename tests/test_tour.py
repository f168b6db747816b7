"""docs/tour.md: every link to a line of code leads to the code that it names, and every block prints its lines of #>.

    python tests/test_tour.py            # lists the links whose line has moved
    python tests/test_tour.py --write    # writes the right lines into the page
"""
import ast
import contextlib
import io
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PAGE = ROOT / "docs" / "tour.md"
LINK = re.compile(r"^\[`(.+)`\]: \.\./([\w/]+\.py)#L(\d+)$", re.M)  # [`name`]: ../file.py#L12, at the end of the page
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
STEP = re.compile(r"((?:^(?!#>).*\n)+)((?:^#>.*\n)*)", re.M)  # some lines of a block, and what they print
DECIMAL = re.compile(r"-?\d+\.\d+")


# ---- the links -------------------------------------------------------------------------------------------------------


def lines_of_names(source: str) -> dict[str, int]:
    """The line at which each function, class and global begins; methods as Class.method."""
    found = {}

    def visit(body: list, prefix: str):
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found[prefix + node.name] = node.lineno
                visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and not prefix:
                found[node.targets[0].id] = node.lineno

    visit(ast.parse(source).body, "")
    return found


def line_of(name: str, path: Path) -> int:
    """The line of a function, class or global; else the only line of the file that contains `name`, a piece of code."""
    source = path.read_text()
    names = lines_of_names(source)
    if name in names:
        return names[name]
    lines = [number for number, line in enumerate(source.splitlines(), 1) if name in line]
    assert len(lines) == 1, f"docs/tour.md links to `{name}`, which is on {len(lines)} lines of {path.name}, not on 1"
    return lines[0]


def moved(text: str, root: Path = ROOT) -> list[str]:
    """A line for each link that does not lead to the code that it names."""
    found = []
    for name, file, number in LINK.findall(text):
        line = line_of(name, root / file)
        if line != int(number):
            found.append(f"`{name}` is at line {line} of {file}: write ../{file}#L{line}, not L{number}")
    return found


def rewritten(text: str, root: Path = ROOT) -> str:
    """The page with the right line in every link."""
    return LINK.sub(lambda link: f"[`{link[1]}`]: ../{link[2]}#L{line_of(link[1], root / link[2])}", text)


def test_links():
    wrong = moved(PAGE.read_text())
    assert not wrong, "\n".join([*wrong, "or run: python tests/test_tour.py --write"])


def test_links_are_complete():
    """Each link in the text has a line at the end, and the other way round; no file is linked to in another way."""
    text = PAGE.read_text()
    prose = LINK.sub("", BLOCK.sub("", text))
    named, given = set(re.findall(r"\[`([^`\]]+)`\]", prose)), [name for name, _, _ in LINK.findall(text)]
    assert named == set(given) and len({name.lower() for name in given}) == len(given) > 20
    assert text.count(".py#") == len(given)


def test_moved_code(tmp_path):
    """Where two lines are put above some code, its link is reported and rewritten, and no other."""
    for name in ("one.py", "two.py"):
        (tmp_path / name).write_text("X = 1\n\n\nclass A:\n    @staticmethod\n    def f():\n        return X + 1\n")
    lines = [("one.py", "X", 1), ("one.py", "A", 4), ("two.py", "A.f", 6), ("one.py", "return X + 1", 7)]
    page = "".join(f"[`{name}`]: ../{file}#L{number}\n" for file, name, number in lines)
    assert not moved(page, tmp_path) and rewritten(page, tmp_path) == page
    source = (tmp_path / "one.py").read_text()
    (tmp_path / "one.py").write_text(source.replace("class", "# class A\n\nclass"))
    assert moved(page, tmp_path) == ["`A` is at line 6 of one.py: write ../one.py#L6, not L4",
                                     "`return X + 1` is at line 9 of one.py: write ../one.py#L9, not L7"]
    assert rewritten(page, tmp_path) == page.replace("L4", "L6").replace("L7", "L9")
    for text in ("no such code", "X"):  # on no line; the name is not defined, and X is on 2 lines
        (tmp_path / "one.py").write_text(source.replace("X = 1", "X += 1"))
        with pytest.raises(AssertionError, match=f"`{text}`, which is on [02] lines of one.py"):
            moved(f"[`{text}`]: ../one.py#L1\n", tmp_path)


# ---- the blocks ------------------------------------------------------------------------------------------------------


def differs(printed: str, shown: str) -> bool:
    """Whether the texts differ. The last digit of a decimal number may differ by 1: processors differ in rounding."""
    if DECIMAL.sub("0.0", printed) != DECIMAL.sub("0.0", shown):
        return True
    pairs = zip(DECIMAL.findall(printed), DECIMAL.findall(shown), strict=True)
    return any(abs(float(a) - float(b)) > 1.01 * 10.0 ** -len(b.split(".")[1]) for a, b in pairs)


def test_differs():
    assert not differs("(8, 256) 0.27 True\n", "(8, 256) 0.28 True\n")
    for other in ("(8, 257) 0.27 True\n", "(8, 256) 0.29 True\n", "(8, 256) 0.27 False\n", "(8, 256) 0.27 True"):
        assert differs(other, "(8, 256) 0.27 True\n")


def test_blocks(monkeypatch):
    """All blocks in one session, as a reader pastes them."""
    import blas  # noqa: F401  (before mlx)

    import model
    monkeypatch.setattr(model, "score_mask", model.score_mask)  # put back, even if the step that removes it fails
    text, names = PAGE.read_text(), {"__name__": "tour"}
    steps = [(block.start(1) + step.start(), *step.groups()) for block in BLOCK.finditer(text)
             for step in STEP.finditer(block[1])]
    assert len(steps) > 15
    for start, code, shown in steps:
        line, output = text.count("\n", 0, start) + 1, io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile("\n" * (line - 1) + code, PAGE, "exec"), names)
        printed = "".join(f"#> {line}\n" for line in output.getvalue().splitlines())
        assert shown and not differs(printed, shown), f"docs/tour.md, from line {line}: this is printed\n{printed}"


if __name__ == "__main__":
    page = PAGE.read_text()
    wrong = moved(page)
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(rewritten(page))
        print(f"docs/tour.md: {len(wrong)} links rewritten")
    else:
        print("\n".join(wrong or ["docs/tour.md: every link leads to the code that it names"]))
