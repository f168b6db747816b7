"""runs/: the table of architectures, from tiny runs."""
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from test_variants import SOURCE, without

TINY = ["--n_layer=2", "--n_embd=32", "--block_size=32", "--batch_size=4", "--max_iters=2", "--eval_windows=4",
        "--warmup_iters=1", "--sample_tokens=0", "--compile=False"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Two seeds of the baseline, one of two variants, as runs/architectures.sh leaves them."""
    folder = tmp_path_factory.mktemp("runs")
    subprocess.run([sys.executable, ROOT / "data.py", f"--source={ROOT}/*.py", "--tokenizer=byte",
                    f"--out={folder / 'data'}"], check=True, capture_output=True)
    for name, *flags in (["baseline-1", "--seed=1"], ["baseline-2", "--seed=2"], ["alibi-1", "--alibi=True"],
                         ["yoco-1", "--yoco=True", "--sliding_window=16"]):
        subprocess.run([sys.executable, ROOT / "train.py", f"--data={folder / 'data'}", f"--out_dir={folder / name}",
                        *TINY, *flags], check=True, capture_output=True)
        (folder / name / "done").touch()
    return folder


def table(out, readme, status=0):
    shutil.copy(ROOT / "README.md", readme)
    done = subprocess.run([sys.executable, ROOT / "runs" / "architectures.py", out, f"--readme={readme}",
                           "--length=512"], capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return done


def test_table(out, tmp_path):
    done = table(out, tmp_path / "README.md")
    text = (tmp_path / "README.md").read_text()
    before, rest = (ROOT / "README.md").read_text().split("<!-- runs/architectures.sh writes this table -->\n")
    after = rest.split("<!-- end of the table -->")[1]
    assert text == (f"{before}<!-- runs/architectures.sh writes this table -->\n{done.stdout}<!-- end of the table -->"
                    f"{after}")
    rows = {line.split(" | ")[0][2:]: line.rstrip(" |").split(" | ") for line in done.stdout.splitlines()[2:]}
    assert [*rows] == ["baseline", "alibi", "yoco"] and rows["alibi"][1] == "`--alibi=True`"
    losses = []
    for seed in (1, 2):
        with open(out / f"baseline-{seed}" / "loss.csv") as file:
            losses.append(float([line.split(",")[4] for line in file if line.startswith("2,")][-1]))
    assert rows["baseline"][3] == f"{np.mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})"
    assert float(rows["baseline"][6]) == pytest.approx(2 * 2 * 512 * 32 * 4 / 1e6, abs=0.005)
    assert float(rows["yoco"][6]) == pytest.approx(2 * (16 + 512) * 32 * 4 / 1e6, abs=0.005)
    lines = len(SOURCE.splitlines()) - len(without(SOURCE, "alibi").splitlines())
    assert int(rows["alibi"][7]) == lines


def test_no_runs(tmp_path):
    assert "no run in" in table(tmp_path, tmp_path / "README.md", status=2).stderr
