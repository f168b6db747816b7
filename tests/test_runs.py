"""runs/: the table of architectures, from tiny runs; tasks and pairs."""
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from test_variants import SOURCE, without

from chat import read_conversations

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


# ---- tasks -----------------------------------------------------------------------------------------------------------


def test_tasks(tmp_path):
    """Everything that sft.py and dpo.py read, and what is held out is not trained on."""
    tasks = [{"instruction": f"do {i}", "instances": [{"input": "it" * (i % 2), "output": f"done {i}"}]}
             for i in range(25)]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    command = [sys.executable, ROOT / "runs" / "tasks.py", tmp_path / "tasks.jsonl", tmp_path / "out"]
    subprocess.run(command, check=True, capture_output=True)

    def read(name):
        return [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]

    assert read("tasks-val") == [{"prompt": f"do {i}", "response": f"done {i}"} for i in (0, 10, 20)]
    assert [task["prompt"] for task in read("tasks")[:2]] == ["do 1\n\nit", "do 2"]
    assert len(read("tasks")) == len(read("pairs")) == 22
    assert read("pairs")[-1] == {"prompt": "do 24", "chosen": "done 24", "rejected": "done 1"}
    assert len(read_conversations(str(tmp_path / "out" / "tasks.jsonl"))) == 22
    (tmp_path / "tasks.jsonl").write_text('{"instruction": "x"}')
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "line 1 is no task" in done.stderr and "Traceback" not in done.stderr
