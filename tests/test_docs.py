"""README.md, CONTRIBUTING.md and docs/: every link, file, command and setting named there exists, and every number of
lines is true."""
import ast
import re
import subprocess
import sys

import blas  # noqa: F401  (before mlx)
import numpy as np
import pytest
from conftest import ROOT
from mlx.utils import tree_flatten
from test_variants import SOURCE, VARIANTS, without

from model import GPT, GPTConfig, save_checkpoint

README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
MADE_UP = {"norms.py", "fill.html"}  # examples' names in CONTRIBUTING.md and diffusion.md
VALUES = {bool: "True|False", int: r"-?\d+", float: r"-?[\d.]+(e-?\d+)?"}  # of settings, as texts; of other types: any


def code_of(page) -> list[str]:
    """The lines of fenced blocks, and what stands between backticks, a string each."""
    text = page.read_text()
    fences = re.findall(r"^```\w*\n(.*?)^```$", text, re.M | re.S)
    rest = re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.M | re.S)
    lines = [line for fence in fences for line in fence.replace("\\\n", " ").splitlines()]
    return lines + [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", rest)]


def settings_of(script) -> dict:
    """The settings of a script, by their names, with their defaults: None where that is no literal."""
    found = {}
    for statement in ast.parse(script.read_text()).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            name = statement.targets[0].id
            if name == "settings":
                return found
            try:
                found[name] = ast.literal_eval(statement.value)
            except ValueError:
                found[name] = None
    return {}  # a module, which has none


SETTINGS = {path.relative_to(ROOT).as_posix(): settings_of(path)
            for path in (*ROOT.glob("*.py"), *(ROOT / "runs").glob("*.py"))}


def anchors(page) -> set[str]:
    """Of headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_links(page):
    text, missing = page.read_text(), []
    for target in re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", text):
        path, _, anchor = "".join(target).partition("#")
        if re.match(r"\w+:", path):
            continue
        there = page.parent / path if path else page
        if not there.exists() or anchor and anchor not in anchors(there):
            missing.append("".join(target))
    assert not missing, f"{page.name} links to what is not there: {missing}"


@every_page
def test_files(page):
    """Source files and folders of this project that a page names, wherever it names them."""
    text, code, begin = page.read_text(), " ".join(code_of(page)), r"(?<![\w./-])"
    found = set(re.findall(begin + r"(?:[\w.-]+/)*[\w-]+\.(?:py|sh|md|js|wgsl|html|css|yml|toml)\b", text))
    found |= set(re.findall(begin + r"(?:docs|tests|runs|webgpu)/[\w./-]*\w", code))
    places = ROOT, page.parent, ROOT / "webgpu"
    missing = sorted(name for name in found - MADE_UP if not any((place / name).exists() for place in places))
    assert not missing, f"{page.name} names what is not there: {missing}"


@every_page
def test_commands(page):
    """The scripts of commands exist, their flags are settings of that script, and the values are of the settings' type.
    A flag without a script is a setting of some script."""
    wrong = []
    for line in code_of(page):
        for command in re.split(r"&&|\|\||;|  #", line):
            script = re.search(r"\bpython3? ([\w/]+\.py)\b", command)
            script = script and script[1]
            if script in MADE_UP:
                continue
            if script and script not in SETTINGS:
                wrong.append(f"no script {script}: {line}")
                continue
            for name, value in re.findall(r"(?<!\S)--([a-z]\w*)=(\S*)", command):
                given = [SETTINGS[script]] if script else SETTINGS.values()
                kinds = {type(settings[name]) for settings in given if name in settings}
                fits = any(re.fullmatch(VALUES.get(kind, ".*"), value) for kind in kinds)
                if not kinds:
                    wrong.append(f"{script or 'no script'} has no setting {name}: {line}")
                elif not fits:
                    wrong.append(f"--{name} has another type: {line}")
    assert not wrong, f"{page.name}: {wrong}"


def test_every_script_is_named():
    named = set(re.findall(r"\w+\.py\b", README.read_text()))
    missing = {path.name for path in ROOT.glob("*.py")} - named
    assert not missing, f"README.md does not name {sorted(missing)}"
    links = set(re.findall(r"\]\((docs/[^)]+|\w+\.md|LICENSE)\)", README.read_text()))
    pages = {page.relative_to(ROOT).as_posix() for page in PAGES} - {"README.md"}
    assert pages <= links, f"README.md does not link to {sorted(pages - links)}"


def test_every_picture_is_shown():
    text = "".join(page.read_text() for page in PAGES)
    unseen = [path.name for path in (ROOT / "docs").glob("*.png") if not re.search(rf"{path.name}[)\"]", text)]
    assert not unseen, f"no page shows {unseen}"


def test_tables():
    """A table that a script writes lies between its two marks, in the page that the script names."""
    writers = {path.name for path in (ROOT / "runs").glob("*.py") if re.search("import .*put_table", path.read_text())}
    marks = [(page, name) for page in PAGES
             for name in re.findall(r"<!-- runs/(\w+)\.sh writes this table -->\n\|", page.read_text())]
    assert {f"{name}.py" for _, name in marks} == writers and len(marks) == len(writers)
    for page, name in marks:
        assert page.read_text().count("\n<!-- end of the table -->") == 1
        assert page.name in (ROOT / "runs" / f"{name}.py").read_text(), f"runs/{name}.py does not write to {page.name}"


# ---- lines -----------------------------------------------------------------------------------------------------------


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 170


def test_lines():
    """README.md rounds to the nearest 50."""
    text = " ".join(README.read_text().split())
    whole, variants = re.search(r"`model\.py` of about ([\d,]+) lines, ([\d,]+) of them variants", text).groups()
    train, = re.search(r"`train\.py` of about ([\d,]*\d)", text).groups()
    source, stripped = SOURCE.splitlines(), without(SOURCE, *VARIANTS).splitlines()
    count = len((ROOT / "train.py").read_text().splitlines())
    for told, real in ((whole, len(source)), (variants, len(source) - len(stripped)), (train, count)):
        assert int(told.replace(",", "")) == 50 * round(real / 50), f"README.md says {told} lines, there are {real}"


def test_lines_of_kernels():
    sizes = [len(path.read_text().splitlines()) for path in (ROOT / "webgpu" / "kernels").glob("*.wgsl")]
    text = " ".join((ROOT / "docs" / "page.md").read_text().split())
    assert f"WGSL kernels of {min(sizes)} to {max(sizes)} lines" in text, f"they have {min(sizes)} to {max(sizes)}"


# ---- the example of CONTRIBUTING.md ----------------------------------------------------------------------------------


def test_example(tmp_path):
    """It runs, prints the norms that numpy computes, and refuses what it says it refuses."""
    source, = re.findall(r"^```python\n(.*?)^```$", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S)
    (tmp_path / "norms.py").write_text(source)
    model = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=1, n_head=2, n_embd=32), seed=3)
    save_checkpoint(str(tmp_path / "a.safetensors"), model, {})

    def norms(*arguments):
        command = [sys.executable, tmp_path / "norms.py", tmp_path / "a.safetensors", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})

    wanted = {name: np.sqrt(np.square(np.array(array, np.float64)).sum())
              for name, array in tree_flatten(model.parameters()) if array.ndim == 2}
    least = sorted(wanted.values())[2]
    for bound in (0, least - 1e-3):
        found = {line.split()[0]: float(line.split()[-1]) for line in norms(f"--least={bound}").stdout.splitlines()}
        assert set(found) == {name for name in wanted if wanted[name] >= bound}
        assert all(abs(found[name] - wanted[name]) < 1e-3 for name in found)
    done = norms("--least=-1")
    assert done.returncode == 2 and done.stderr == "norms.py: least=-1.0: it must be 0 or more\n"
