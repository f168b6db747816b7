"""docs/ioi.ipynb: its code, run in plain Python on SmolLM2, prints what the notebook shows, and finds the head.

    python tests/test_ioi.py --write    runs the code and writes what it prints into the notebook
"""
import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import blas  # noqa: E402, F401  (before mlx)
import numpy as np  # noqa: E402
from conftest import ROOT, run_here  # noqa: E402
from peers import smollm2  # noqa: E402

NOTEBOOK = ROOT / "docs" / "ioi.ipynb"
NUMBER = r"[+-]?\d+\.\d+"


def ran(cells: list[dict], checkpoint: Path) -> tuple[dict, list[str]]:
    """The names that the code leaves behind, and what each of its cells prints."""
    names, printed, before = {"__name__": "notebook"}, [], (os.getcwd(), [*sys.path])
    os.chdir(NOTEBOOK.parent)
    try:
        for cell in cells:
            source = "".join(cell["source"]).replace("../data/smollm2/smollm2.safetensors", str(checkpoint))
            with contextlib.redirect_stdout(io.StringIO()) as told:
                exec(compile(source, NOTEBOOK.name, "exec"), names)
            printed.append(told.getvalue())
    finally:
        os.chdir(before[0])
        sys.path[:] = before[1]
    return names, printed


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run_all(folder: Path) -> tuple[dict, list[dict], dict, list[str]]:
    run_here("gguf_reader.py", smollm2(), folder / "smollm2.safetensors")
    notebook = json.loads(NOTEBOOK.read_text())
    cells = code_cells(notebook)
    return notebook, cells, *ran(cells, folder / "smollm2.safetensors")


def test_the_notebook(tmp_path):
    _, cells, names, printed = run_all(tmp_path)
    for cell, text in zip(cells, printed, strict=True):
        shown = "".join(line for output in cell["outputs"] for line in output.get("text", []))
        assert re.sub(NUMBER, "#", text) == re.sub(NUMBER, "#", shown)  # but for numbers, which differ a little
        values = [np.array(re.findall(NUMBER, each), float) for each in (text, shown)]
        np.testing.assert_allclose(*values, atol=0.05)
    assert (names["before"] > 0).all() and (names["after"] < 0).all()
    totals = [share.embedding + share.layers.sum() for share in (names["of_right"], names["of_repeated"])]
    np.testing.assert_allclose(totals[0] - totals[1], names["before"].mean(), atol=1e-3)  # there are no biases
    assert names["largest"][0] == tuple(names["cells"][np.argmax(names["effect"]), :2]) == (23, 3)
    assert names["table"]._repr_html_().count("<td tabindex") == 14 * 9 and np.array(names["table"]).shape == (14, 9)


if __name__ == "__main__":
    import tempfile
    with tempfile.TemporaryDirectory() as place:
        notebook, cells, _, printed = run_all(Path(place))
    for number, (cell, text) in enumerate(zip(cells, printed, strict=True), 1):
        lines = text.splitlines(keepends=True)
        cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []
        cell["execution_count"] = number
    if sys.argv[1:] == ["--write"]:
        NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
    print("".join(printed))
