"""run_folder.py, through the scripts: their source, their lock, what they replace, where rows go; copied scripts."""
import contextlib
import csv
import json
import math
import os
import pty
import re
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from datetime import datetime
from types import SimpleNamespace

import numpy as np
import prepared
import pytest
from conftest import ROOT
from safetensors.numpy import save_file
from test_sft import folder  # noqa: F401  (a checkpoint and tasks)
from test_train import TINY, data  # noqa: F401  (tokens)

import run_folder
from config import UserError
from model import load_checkpoint, save_checkpoint

QUICK = [*TINY, "--max_iters=2", "--sample_tokens=0"]


def python(*command, status=0, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, capture_output=True, text=True, **options) if options else prepared.run(command)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and (not status or done.stderr.count("\n") == 1), done.stderr
    return done


def pasted(command: str, **options) -> subprocess.CompletedProcess:
    """A command that a script printed, run by a shell."""
    assert command.startswith("python ")
    done = subprocess.run(f"{shlex.quote(sys.executable)} {command.removeprefix('python ')}", shell=True,
                          capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def contents(out) -> dict:
    """All files of a run but its lock."""
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != "run.lock"}


# ---- a copied script -------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path):
    """A copy of this checkout's modules, with train.py and a changed copy of it that claims to know the peak FLOPS."""
    copy = tmp_path / "a checkout"
    copy.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, copy)
    source = (copy / "train.py").read_text()
    assert "PEAK_FLOPS = {" in source
    (copy / "train_mine.py").write_text(source.replace("PEAK_FLOPS = {", 'PEAK_FLOPS = {"": 1e11, '))
    return copy


def test_a_copied_script(checkout, data):  # noqa: F811
    """It trains, stops at Ctrl-C, is resumed by the commands that are printed, is refused by the script that it was
    copied from, and keeps its own source, also after a change. All of its log fits 80 columns."""
    out = checkout / "my runs" / "one"
    begin = [sys.executable, "train_mine.py", f"--data={data}", f"--out_dir={out}", *TINY, "--max_iters=40",
             "--dtype=bfloat16", "--n_expert=2", "--eval_interval=4"]
    process = subprocess.Popen(begin, cwd=checkout, stdout=subprocess.PIPE, text=True)
    printed = ""
    for line in process.stdout:
        printed += line
        if line.startswith("step      6"):
            process.send_signal(signal.SIGINT)
            break
    printed += process.stdout.read()
    assert process.wait() == 130
    log = [line for line in printed.splitlines() if line.startswith("step ")]
    assert max(map(len, log)) <= 80 and len(log) > 8
    assert re.search(r"^step      6 \| loss .*\| load \d\.\d\d$", printed, re.M)
    assert re.search(r"^step      4 \| val .* GiB \| mfu [\d.]+% \| best$", printed, re.M)

    _, meta = load_checkpoint(str(out / "ckpt.safetensors"))
    start = json.loads((out / "run.json").read_text())
    assert meta["script"] == start["script"] == "train_mine.py" and start["arguments"] == begin[2:]
    assert abs((datetime.now().astimezone() - datetime.fromisoformat(start["started"])).total_seconds()) < 600
    source = {path.name: path.read_text() for path in (out / "source").iterdir()}
    assert {"train_mine.py", "model.py", "muon.py", "config.py", "run_folder.py", "tokenizer.py"} <= {*source}
    assert not {"train.py", "sample.py"} & {*source}
    assert all(text == (checkout / name).read_text() for name, text in source.items())

    before = contents(out)
    refused = python("train.py", f"--out_dir={out}", "--resume=True", cwd=checkout, status=2).stderr
    assert "was made by train_mine.py: go on with python train_mine.py" in refused and before == contents(out)
    with open(checkout / "muon.py", "a") as file:
        file.write("# changed\n")
    own, = re.findall("^go on with: (.*)", printed, re.M)
    command = refused.split("go on with ")[1]
    assert shlex.split(own) == shlex.split(command) and "'" in command
    done = pasted(command, cwd=checkout)
    assert "step     40 | val" in done.stdout
    assert {path.name: path.read_text() for path in (out / "source").iterdir()} == source
    changed = out / f"source-{meta['step']}" / "muon.py"
    assert changed.read_text() == source["muon.py"] + "# changed\n"
    assert json.loads((out / "run.json").read_text())["started"] == start["started"]


def test_a_script_beside_nothing(data, tmp_path):  # noqa: F811
    """Its modules come from elsewhere, and are kept; the next command, to write, can be pasted."""
    shutil.copy(ROOT / "train.py", tmp_path / "mine.py")
    done = python("mine.py", f"--data={data}", "--out_dir=an out", *QUICK, "--block_size=400", cwd=tmp_path,
                  env={**os.environ, "PYTHONPATH": str(ROOT)})
    kept = {path.name for path in (tmp_path / "an out" / "source").iterdir()}
    assert {"mine.py", "model.py", "run_folder.py"} <= kept and "conftest.py" not in kept
    command, = re.findall("^next: (.*)", done.stdout, re.M)
    prompt, = (word.partition("=")[2] for word in shlex.split(command) if word.startswith("--prompt="))
    assert 3 < len(prompt) <= 24 and any(prompt in path.read_text() for path in ROOT.glob("*.py"))
    assert prompt in pasted(f"{command} --max_new_tokens=2", cwd=tmp_path).stdout


def test_source_of_many_resumptions(tmp_path):
    """A folder for each change, none of them written over, and none where nothing has changed."""
    out, settings = str(tmp_path / "out"), {}
    for step, text in ((0, b"a"), (10, b"a"), (20, b"b"), (20, b"b"), (20, b"c"), (20, b"d"), (100, b"d"), (100, b"a")):
        run_folder.start(out, "x.py", settings, {"x.py": text}, step)
    kept = {path.name: (path / "x.py").read_bytes() for path in (tmp_path / "out").glob("source*")}
    assert kept == {"source": b"a", "source-20": b"b", "source-20-2": b"c", "source-20-3": b"d", "source-100": b"a"}
    run_folder.start(out, "y.py", settings, {"y.py": b"e"})  # a new run
    assert [path.name for path in (tmp_path / "out").glob("source*")] == ["source"]
    assert [path.name for path in (tmp_path / "out" / "source").iterdir()] == ["y.py"]


def test_a_folder_that_is_called_source(tmp_path):
    """A new run never deletes a folder that no run has made."""
    mine = tmp_path / "source"
    mine.mkdir()
    (mine / "notes.py").write_text("mine")
    for _ in range(2):
        run_folder.start(str(tmp_path), "x.py", {}, {"x.py": b"a"})
        assert (mine / "notes.py").read_text() == "mine" and [*mine.iterdir()] == [mine / "notes.py"]


@pytest.mark.parametrize("room", [50, 1000])  # bytes of a file: fewer than run.json has, than the source has
def test_full_disk_at_the_start(tmp_path, room):
    """Nothing is left that is not whole."""
    start = f"import run_folder; run_folder.start({str(tmp_path / 'out')!r}, 'x.py', {{}}, {{'x.py': b'a' * 2000}})"
    limited = dict(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)))
    done = subprocess.run([sys.executable, "-c", start], cwd=ROOT, capture_output=True, text=True, **limited)
    assert "the last checkpoint is unharmed" in done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {"run.json", "run.lock"}


# ---- one process a folder --------------------------------------------------------------------------------------------


def test_lock(data, tmp_path):  # noqa: F811
    """A second run in the folder of the first is refused, in whatever way it is started, until the first is killed."""
    command = [ROOT / "train.py", f"--data={data}", f"--out_dir={tmp_path}", *TINY]
    first = subprocess.Popen([sys.executable, *command, "--max_iters=100000", "--eval_interval=2"],
                             stdout=subprocess.PIPE, text=True)
    try:
        for line in first.stdout:
            if line.startswith("step      3"):
                break
        for more in ("--overwrite=True", "--resume=True"):
            told = python(*command, more, "--max_iters=100000", status=2).stderr
            assert f"train.py (process {first.pid}) is writing to {tmp_path}: " in told
    finally:
        first.kill()
        first.communicate()
    python(*command, "--overwrite=True", "--max_iters=1")


# ---- nothing is replaced unasked -------------------------------------------------------------------------------------


def test_replacing(data, tmp_path):  # noqa: F811
    """Without a terminal a new run in a used folder is refused; each way out that the message names can be pasted."""
    out = tmp_path / "an out"
    command = [ROOT / "train.py", f"--data={data}", f"--out_dir={out}", *QUICK]
    python(*command)
    before = contents(out)
    told = python(*command, "--seed=2", status=2, stdin=subprocess.DEVNULL).stderr
    loss, = (float(row["val_loss"]) for row in csv.DictReader((out / "loss.csv").open()) if row["step"] == "2"
             and row["val_loss"])
    written = datetime.fromtimestamp((out / "ckpt.safetensors").stat().st_mtime)
    assert f"ckpt.safetensors (train.py, step 2, validation loss {loss:.4f}, {written:%Y-%m-%d %H:%M})" in told
    assert before == contents(out)
    overwrite, resume, other = re.search("give (.*) to replace it, (.*) to go on with it, or (.*)", told).groups()
    assert (overwrite, resume) == ("--overwrite=True", "--resume=True --max_iters=4")
    assert other == f"--out_dir='{out}-2'"
    python(*command, *shlex.split(resume))
    assert load_checkpoint(str(out / "ckpt.safetensors"))[1]["step"] == 4
    python(*command, *shlex.split(other))
    assert (tmp_path / "an out-2" / "ckpt.safetensors").exists()
    told = python(*command, "--resume=True", "--overwrite=True", "--max_iters=9", status=2).stderr
    assert "give one of them" in told
    python(*command, overwrite, "--seed=2")
    assert load_checkpoint(str(out / "ckpt.safetensors"))[1]["settings"]["seed"] == 2


@pytest.mark.parametrize("answer, status", [(b"n\n", 2), (b"\n", 2), (b"\x04", 2), (b"y\n", 0), (b"YES\n", 0)])
def test_question(answer, status, tmp_path):
    """At a terminal the user is asked, and no is the answer unless it is yes."""
    (tmp_path / "sft.safetensors").write_bytes(b"x")
    script = ("from config import overrides\nimport run_folder\nsettings = overrides(globals())\n"
              f"run_folder.check({str(tmp_path)!r}, 'sft.py', False)\nprint('trains')\n")
    (tmp_path / "script.py").write_text(script)
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, tmp_path / "script.py"], stdin=theirs, stdout=theirs, stderr=theirs,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})
    os.close(theirs)
    printed = b""
    with contextlib.suppress(OSError):  # the terminal's end
        while True:
            printed += os.read(ours, 1000)
            if printed.endswith(b"replace it? [y/N] "):
                os.write(ours, answer)
    os.close(ours)
    assert process.wait() == status
    assert f"{tmp_path} holds sft.safetensors (20".encode() in printed and (b"trains" in printed) == (status == 0)
    assert (b"script.py: nothing was replaced: give --overwrite=True" in printed) == (status == 2)
    assert b"--resume" not in printed


def test_another_script_s_folder(folder, data, tmp_path):  # noqa: F811
    """sft.py would replace the curve of a run of train.py, and is refused; results of no run are left alone."""
    python(ROOT / "train.py", f"--data={data}", f"--out_dir={tmp_path}", *QUICK)
    before = contents(tmp_path)
    command = [ROOT / "sft.py", folder / "base.safetensors", f"--data={folder / 'tasks.jsonl'}",
               f"--out_dir={tmp_path}", "--epochs=1", "--samples=0", "--compile=False"]
    told = python(*command, status=2).stderr
    assert "ckpt.safetensors (train.py, step 2" in told and "--resume" not in told and before == contents(tmp_path)
    python(*command, "--overwrite=True")
    assert (tmp_path / "sft.safetensors").exists() and (tmp_path / "ckpt.safetensors").exists()
    start = json.loads((tmp_path / "run.json").read_text())
    assert start["script"] == "sft.py" and start["settings"]["overwrite"]
    assert {path.name for path in tmp_path.glob("source*")} == {"source"}
    assert (tmp_path / "source" / "sft.py").exists() and not (tmp_path / "source" / "train.py").exists()
    told = python(ROOT / "train.py", f"--out_dir={tmp_path}", f"--data={data}", *QUICK, status=2).stderr
    assert "sft.safetensors (sft.py" in told and "--resume" not in told


def test_what_counts_as_a_result(tmp_path):
    """In any folder the names of our scripts' results; in a run's folder every checkpoint but an optimizer's state."""
    out = str(tmp_path)
    for name in ("model.safetensors", "ckpt.optimizer-5.safetensors", "best.safetensors.tmp12", "loss.csv"):
        (tmp_path / name).write_bytes(b"x")
    assert run_folder.newest_result(out) is None and run_folder.newest_result(f"{out}/none") is None
    (tmp_path / "run.json").write_text("{}")
    assert run_folder.newest_result(out) == f"{out}/model.safetensors"
    (tmp_path / "run.json").unlink()
    (tmp_path / "dpo.safetensors").write_bytes(b"x")
    assert run_folder.newest_result(out) == f"{out}/dpo.safetensors"


@pytest.mark.parametrize("header", [b"x", b"[1]", b'{"losses": [], "step": "a", "script": 3, "version": 1}',
                                    b'{"losses": {"val": "x"}, "settings": {}, "script": "hf_reader.py"}'])
def test_odd_headers(header, tmp_path):
    """Files that are no checkpoints of ours, or say odd things, are described by what can be said."""
    text = json.dumps({"__metadata__": {"tinygpt": header.decode()}}).encode()
    path = tmp_path / "ckpt.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(run_folder.UserError, match=r"holds ckpt.safetensors \("):
        run_folder.check(str(tmp_path), "train.py", False, False)
    if header.startswith(b"{"):
        with pytest.raises(run_folder.UserError, match="was made by (hf_reader.py|an unknown script): it cannot be"):
            run_folder.check_maker(str(path), "train.py", str(tmp_path))


def test_free_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("out-2", "out-3", "v1.5", "made-2.jsonl"):
        (tmp_path / name).touch()
    names = {"out": "out-4", "out/": "out-4", "out-2": "out-4", "v1.5": "v1.5-2", ".": "out-4", "a/b-7": "a/b-2"}
    assert {name: run_folder.free_name(name) for name in names} == names
    assert run_folder.free_name("made.jsonl", ".jsonl") == "made-3.jsonl"


# ---- rows elsewhere --------------------------------------------------------------------------------------------------


def events(logs) -> dict:
    """{(name, step): value} of TensorBoard's files, records of a length, its checksum, an event, and its checksum. As
    TensorBoard does, it forgets the values from the step on where a run says that it starts again there."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = {}
    for path in sorted(logs.iterdir()):
        content, start = path.read_bytes(), 0
        while start < len(content):
            length, = struct.unpack_from("<Q", content, start)
            event = event_pb2.Event.FromString(content[start + 12:start + 12 + length])
            if event.HasField("session_log"):
                found = {key: value for key, value in found.items() if key[1] < event.step}
            found.update({(value.tag, event.step): value.simple_value for value in event.summary.value})
            start += length + 16
    return found


def test_tensorboard(data, tmp_path):  # noqa: F811
    """Its events are the numbers of loss.csv; of a run that is replaced, none is left."""
    pytest.importorskip("tensorboardX")
    command = [ROOT / "train.py", f"--data={data}", f"--out_dir={tmp_path}", *QUICK, "--log=tensorboard"]
    python(*command, "--max_iters=3")
    python(*command, "--overwrite=True")
    python(ROOT / "train.py", f"--out_dir={tmp_path}", "--resume=True", "--max_iters=4")  # log is the checkpoint's
    with open(tmp_path / "loss.csv", newline="") as file:
        rows = {(name, int(row["step"])): float(value) for row in csv.DictReader(file) for name, value in row.items()
                if value and name not in ("step", "tokens", "seconds")}
    found = {key: value for key, value in events(tmp_path / "tensorboard").items()
             if key[0] not in ("tokens", "seconds")}
    assert found == pytest.approx(rows, rel=1e-6) and ("val_loss", 4) in found and ("train_loss", 1) in found


def test_tensorboard_after_a_crash(tmp_path):
    """A run that goes on at an earlier step than the last row replaces the rows from there."""
    pytest.importorskip("tensorboardX")
    for start, steps in ((0, (1, 2, 3, 4)), (2, (3,))):
        python("-c", f"import run_folder\nsend = run_folder.log_to('tensorboard', {str(tmp_path)!r}, {{}}, {start})\n"
                     f"for step in {steps}: send({{'step': step, 'loss': {start} + step}})", cwd=ROOT)
    assert events(tmp_path / "tensorboard") == {("loss", 1): 1, ("loss", 2): 2, ("loss", 3): 5}


def test_wandb(folder, tmp_path):  # noqa: F811
    """Through a module that stands in for it: offline unless WANDB_MODE says otherwise, a row for each of loss.csv."""
    (tmp_path / "wandb.py").write_text("""
import json
class Run:
    def log(self, row, step):
        print("row", json.dumps([row, step]))
def init(**arguments):
    print("init", json.dumps(arguments))
    return Run()
""")
    out = tmp_path / "out"
    command = [ROOT / "sft.py", folder / "base.safetensors", f"--data={folder / 'tasks.jsonl'}", f"--out_dir={out}",
               "--epochs=1", "--samples=0", "--log=wandb", "--compile=False"]
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_MODE"}
    done = python(*command, env={**environment, "PYTHONPATH": str(tmp_path)})
    init, = (json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("init"))
    assert (init["mode"], init["dir"], init["name"]) == ("offline", str(out), "out")
    assert init["config"]["epochs"] == 1
    rows = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("row")]
    with open(out / "loss.csv", newline="") as file:
        wanted = [({name: float(value) for name, value in row.items() if value and name != "step"}, int(row["step"]))
                  for row in csv.DictReader(file)]
    assert [(row, step) for row, step in rows] == wanted and len(rows) > 3


@pytest.mark.parametrize("log, says", [("tensorboard", "pip install tensorboardX"), ("wandb", "pip install wandb"),
                                       ("mlflow", "log='mlflow' is not one of tensorboard, wandb")])
def test_log_that_is_not_there(log, says, monkeypatch):
    monkeypatch.setattr(run_folder.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(run_folder.UserError, match=says):
        run_folder.check_log(log)
    run_folder.check_log("")


def test_results_that_came_since(tmp_path):
    """Another run ended between check() and start(), as while data was prepared: its results are not replaced."""
    out = str(tmp_path / "out")
    run_folder.check(out, "train.py", False, False)
    os.makedirs(out)
    (tmp_path / "out" / "ckpt.safetensors").write_bytes(b"of another run")
    with pytest.raises(UserError, match="results of another run since"):
        run_folder.start(out, "train.py", {}, {"train.py": b"a"})
    assert (tmp_path / "out" / "ckpt.safetensors").read_bytes() == b"of another run"


def test_source_from_a_folder_below(tmp_path, monkeypatch):
    """Started in a subfolder of the scripts, as python ../train.py is: modules without a file are no folders."""
    (tmp_path / "below").mkdir()
    (tmp_path / "mine.py").write_text("x = 1")
    monkeypatch.chdir(tmp_path / "below")
    monkeypatch.setitem(sys.modules, "nowhere", SimpleNamespace(__file__="../nowhere.py"))  # like torch.classes
    source = run_folder.read_source("../mine.py")
    assert source["mine.py"] == b"x = 1" and "model.py" in source and all(name.endswith(".py") for name in source)


# ---- inputs are never replaced ---------------------------------------------------------------------------------------


def names_of(path, other) -> list[str]:
    """Names of a file: its path, relative, through .., a symbolic link, one to its folder, and a hard link in `other`.
    """
    (other / "link").symlink_to(path)
    (other / "folder").symlink_to(path.parent)
    os.link(path, other / "hard")
    return [str(path), os.path.relpath(path), f"{path.parent}/../{path.parent.name}/{path.name}",
            str(other / "link"), str(other / "folder" / path.name), str(other / "hard")]


@pytest.mark.parametrize("name", ["sft.safetensors", "ckpt.safetensors", "best.safetensors", "resume.safetensors",
                                  "mine.safetensors", "ckpt.optimizer-7.safetensors", "loss.csv", "loss.png",
                                  "experts.csv", "run.json", "peft/adapter_model.safetensors", "source/train.py",
                                  "source-20-2/train.py", "tensorboard/events"])
def test_inputs(name, tmp_path):
    """A file that a run in the folder may write or delete is refused as an input under any name, whatever else is
    asked for; the --out_dir that the message offers is free. A file of another name in that folder is taken."""
    out, elsewhere = tmp_path / "an out", tmp_path / "elsewhere"
    (out / name).parent.mkdir(parents=True)
    elsewhere.mkdir()
    (out / name).write_bytes(b"x")
    (out / "run.json").write_text("{}")
    for path in names_of(out / name, elsewhere):
        for overwrite, resume in ((False, False), (True, False), (False, True), (True, None)):
            with pytest.raises(UserError) as raised:
                run_folder.check(str(out), "sft.py", overwrite, resume, ["", "stdlib", path])
            other, = re.findall("--out_dir=(.*)", str(raised.value))
            assert str(raised.value).startswith(path) and shlex.split(other) == [f"{tmp_path}/an out-2"]
        run_folder.check(f"{tmp_path}/an out-2", "sft.py", False, False, [path])
    (out / "tasks.jsonl").write_bytes(b"x")
    (out / "base.bin").write_bytes(b"x")
    run_folder.check(str(out), "sft.py", True, False, [str(out / "tasks.jsonl"), str(out / "base.bin"), str(out)])
    assert contents(out).keys() == {out / name, out / "run.json", out / "tasks.jsonl", out / "base.bin"}


def test_a_model_that_is_no_result(tmp_path):
    """In a folder of no run, a checkpoint of another name than those of results may be the input."""
    (tmp_path / "llama.safetensors").write_bytes(b"x")
    run_folder.check(str(tmp_path), "sft.py", False, False, [str(tmp_path / "llama.safetensors")])


def test_files_of_somebody_else(tmp_path):
    """loss.csv or run.json that no run has written are not replaced unasked; those of a run that has saved nothing
    yet are."""
    for name, text in (("loss.csv", "epoch,loss\n1,2\n"), ("run.json", '{"name": "mine"}'), ("run.json", "[1]")):
        out = tmp_path / name / text[:3]
        out.mkdir(parents=True)
        (out / name).write_text(text)
        for resume in (False, None):
            with pytest.raises(UserError, match=rf"holds {name}, and not of a run: give --overwrite=True"):
                run_folder.check(str(out), "train.py", False, resume)
        run_folder.check(str(out), "train.py", True, False)
    out = str(tmp_path / "killed")
    run_folder.start(out, "x.py", {}, {"x.py": b"a"})
    run_folder.write_rows(out, ["step"], [])
    run_folder.check(out, "x.py", False, False)


def test_state_of_other_scripts(tmp_path):
    """sft.py and dpo.py go on from resume.safetensors: it is named where it is missing, or made by another script; and
    the way out --resume=True is offered where it is there."""
    header = {"version": 1, "script": "sft.py", "step": 3, "settings": {"resume": False}}
    (tmp_path / "run.json").write_text("{}")
    path = str(tmp_path / "resume.safetensors")
    with pytest.raises(UserError, match=rf"no checkpoint {path} to go on from: leave out --resume=True"):
        run_folder.check_maker(path, "sft.py", str(tmp_path))
    save_file({"a": np.zeros(2)}, tmp_path / "sft.safetensors", {"tinygpt": json.dumps(header)})
    with pytest.raises(UserError, match=r"to go on from; .* holds sft.safetensors \(sft.py, step 3, "):
        run_folder.check_maker(path, "sft.py", str(tmp_path))
    with pytest.raises(UserError, match="give --overwrite=True to replace it, or --out_dir="):
        run_folder.check(str(tmp_path), "sft.py", False, False, state="resume.safetensors")
    save_file({"a": np.zeros(2)}, path, {"tinygpt": json.dumps(header)})
    run_folder.check_maker(path, "sft.py", str(tmp_path))
    with pytest.raises(UserError, match="made by sft.py: go on with python .*sft.py --out_dir=.* --resume=True"):
        run_folder.check_maker(path, "dpo.py", str(tmp_path))
    with pytest.raises(UserError, match=r"holds sft.safetensors .* --resume=True to go on with it"):
        run_folder.check(str(tmp_path), "sft.py", False, False, state="resume.safetensors")
    (tmp_path / "sft.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds resume.safetensors \(sft.py, step 3, .* --resume=True"):
        run_folder.check(str(tmp_path), "sft.py", False, False, state="resume.safetensors")


def test_state_of_a_run_that_another_script_replaced(tmp_path):
    """sft.py's state is left where train.py has begun a run with --overwrite=True: loss.csv is train.py's then."""
    header = {"version": 1, "script": "sft.py", "step": 3, "settings": {"resume": False}}
    state, out = str(tmp_path / "a" / "resume.safetensors"), str(tmp_path / "a")
    run_folder.start(out, "sft.py", {}, {"sft.py": b"a"})
    save_file({"a": np.zeros(2)}, state, {"tinygpt": json.dumps(header)})
    run_folder.check_maker(state, "sft.py", out)
    run_folder.check(out, "train.py", True, False)
    run_folder.start(out, "train.py", {}, {"train.py": b"a"})
    with pytest.raises(UserError, match=f"{state} is of a run before that of train.py in {out}: move the files"):
        run_folder.check_maker(state, "sft.py", out)
    (tmp_path / "b").mkdir()
    run_folder.check_maker(shutil.move(state, tmp_path / "b"), "sft.py", str(tmp_path / "b"))


@pytest.mark.parametrize("script", ["sft.py", "dpo.py"])
def test_resume_on_a_base_that_changed(folder, tmp_path, script):  # noqa: F811
    """An adapter, and the reference of dpo.py, belong to the weights that the run began with."""
    base, pairs = tmp_path / "base.safetensors", tmp_path / "pairs.jsonl"
    shutil.copy(folder / "base.safetensors", base)
    pairs.write_text("".join(json.dumps({"prompt": f"{i} x", "chosen": "x", "rejected": "y"}) + "\n" for i in range(9)))
    data = pairs if script == "dpo.py" else folder / "tasks.jsonl"  # noqa: F811
    more = ["--samples=0"] if script == "sft.py" else []
    resume = ROOT / script, f"--out_dir={tmp_path / 'a'}", "--resume=True"
    python(ROOT / script, base, data, f"--out_dir={tmp_path / 'a'}", "--epochs=1", "--template=plain", *more)
    python(*resume, "--epochs=2")
    state = (tmp_path / "a" / "resume.safetensors").read_bytes()
    model, meta = load_checkpoint(str(base))
    model.embed.weight = model.embed.weight * 1.5
    save_checkpoint(str(base), model, {"tokenizer": meta["tokenizer"], "script": "train.py"})
    says = f"{base} has changed since {tmp_path / 'a' / 'resume.safetensors'} was written: put the old file back"
    assert says in python(*resume, "--epochs=3", status=2).stderr
    assert (tmp_path / "a" / "resume.safetensors").read_bytes() == state
    shutil.copy(folder / "base.safetensors", base)
    python(*resume, "--epochs=3")


# ---- two at one moment -----------------------------------------------------------------------------------------------


RACE = """
import sys, time
sys.path.insert(0, {root!r})
import run_folder
from config import UserError
try:
    run_folder.check({out!r}, "x.py", {overwrite})
    print("checked", flush=True)
    moment = float(sys.stdin.readline())
    while time.time() < moment:
        pass
    run_folder.start({out!r}, "x.py", {{"number": int(sys.argv[1])}}, {{"x.py": sys.argv[1].encode()}})
    run_folder.write_rows({out!r}, ["step"], [{{"step": sys.argv[1]}}])
    print("started", flush=True)
    sys.stdin.readline()
except UserError as error:
    print(error, flush=True)
"""


@pytest.mark.parametrize("overwrite", [False, True])
def test_race(tmp_path, overwrite):
    """Four processes, which all have found the folder free, start in one moment, eight times: one goes on, the others
    end with a line, and all that is in the folder afterwards is of that one, and whatever was there before."""
    for turn in range(8):
        out = tmp_path / str(turn)
        if overwrite:  # a folder as old scripts left it, without a lock
            out.mkdir()
            (out / "best.safetensors").write_bytes(b"of the run before")
            (out / "notes.txt").write_bytes(b"mine")
        script = RACE.format(root=str(ROOT), out=str(out), overwrite=overwrite)
        started = [subprocess.Popen([sys.executable, "-c", script, str(number)], stdin=subprocess.PIPE,
                                    stdout=subprocess.PIPE, text=True) for number in range(4)]
        assert [process.stdout.readline() for process in started] == ["checked\n"] * 4
        moment = time.time() + 0.1
        for process in started:
            process.stdin.write(f"{moment}\n")
            process.stdin.flush()
        said = [process.stdout.readline() for process in started]
        winner, = (number for number, line in enumerate(said) if line == "started\n")
        assert all("is writing to" in line for number, line in enumerate(said) if number != winner), said
        names = {path.name for path in out.iterdir()} - ({"best.safetensors", "notes.txt"} if overwrite else set())
        assert names == {"run.json", "run.lock", "loss.csv", "source"}
        assert not overwrite or (out / "best.safetensors").exists() and (out / "notes.txt").exists()
        assert json.loads((out / "run.json").read_text())["settings"] == {"number": winner}
        assert (out / "source" / "x.py").read_text() == str(winner) == (out / "loss.csv").read_text().split()[1]
        for process in started:
            process.communicate()


def test_two_runs_at_once(data, tmp_path):  # noqa: F811
    """The scripts themselves: one trains, the other ends with one line before its first step."""
    for turn in range(3):
        out = tmp_path / str(turn)
        command = [sys.executable, ROOT / "train.py", f"--data={data}", f"--out_dir={out}", *QUICK]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        both = [subprocess.Popen([*command, f"--seed={seed}"], **pipes) for seed in (1, 2)]
        told = [(process.communicate(), process.returncode) for process in both]
        assert sorted(status for _, status in told) == [0, 2], told
        for seed, ((printed, error), status) in enumerate(told, 1):
            if status:
                assert error.count("\n") == 1 and ("is writing to" in error or "holds ckpt" in error
                                                   or "results of another run" in error), error
                assert "step " not in printed
            else:
                assert load_checkpoint(str(out / "ckpt.safetensors"))[1]["settings"]["seed"] == seed


# ---- rows that somebody edited ---------------------------------------------------------------------------------------

ROWS = ["step,tokens,seconds,train_loss,val_loss", "0,0,1.5,,8.25", "10,80,3.5,6.5,", "20,160,5.5,6.25,",
        "20,160,6,,6.125", "30,240,9,6,"]
COLUMNS = ROWS[0].split(",")


def edited(**lines) -> bytes:
    """ROWS with other lines: _3="x" for the fourth."""
    return "\r\n".join([*(lines.get(f"_{i}", row) for i, row in enumerate(ROWS)), ""]).encode()


@pytest.mark.parametrize("content, steps, says", [
    (edited(), [0, 10, 20, 20], ""),
    (edited().replace(b"\r", b""), [0, 10, 20, 20], ""),
    (b"\xef\xbb\xbf" + edited(), [0, 10, 20, 20], ""),  # a byte order mark
    (edited(_0=",".join(f'"{name}"' for name in COLUMNS), _2='"10","80","3.5","6.5",""'), [0, 10, 20, 20], ""),
    (edited(_5="30,240,9,oh,"), [0, 10, 20, 20], "line 6 is no row"),
    (edited(_5="") + b"30,240,9", [0, 10, 20, 20], "line 7 is no row"),  # cut by a crash
    (edited(_5="30,240,9,6,\r\nbeyond"), [0, 10, 20, 20], ""),  # left out anyway
    (edited(_2="10,80,3.5,6.5"), [0, 20, 20], "line 3 is no row"),
    (edited(_2="10,80,3.5,6.5,,"), [0, 20, 20], "line 3 is no row"),
    (edited(_2="10;80;3.5;6.5;", _3="here I changed the data"), [0, 20], "line 3 and 1 more are no rows"),
    (edited(_2="10,80,3.5,nan,", _4="20,160,,,6.125"), [0, 20], "line 3 and 1 more are no rows"),
    (edited(_2="1e1,80,3.5,6.5,", _3="-1,160,5.5,6.25,"), [0, 20], "line 3 and 1 more are no rows"),
    (edited(_2=",80,3.5,6.5,", _3="9" * 5000 + ",1,5.5,6.25,"), [0, 20], "line 3 and 1 more are no rows"),
    (edited(_2='"10,80,3.5,6.5,'), [0, 20, 20], "line 3 is no row"),  # a quote without an end
    (edited(_2="\x00" * 40), [0, 20, 20], "line 3 is no row"),
    (edited(_2="1" * 200_000), [0, 20, 20], "line 3 is no row"),
    (edited().replace(b",", b";"), [], "line 1 and 5 more are no rows"),
    (edited(_0="step,tokens,seconds,train_loss,train_loss"), [], "line 1 and 5 more are no rows"),
    (edited(_0="step,tokens,train_loss,val_loss,seconds_"), [], "line 1 and 5 more are no rows"),
    (b"\xff\xfe" + edited().decode().encode("utf-16-le"), [], "are no rows"),
    (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 9, [], "are no rows"),
    (b"", [], "line 1 is no row"),
    (edited(_3="", _4="", _5=""), [0, 10], ""),                         # rows may be 10 steps apart, as those before
    (edited(_2="9,80,3.5,6.5,", _3="", _4="", _5=""), [0, 9], "ends at step 9, before step 20"),
    (edited(_0="step,tokens,seconds,train_loss,note"), [0, 10, 20, 20], "no run writes the column 'note'"),
    (None, [], "is missing: its rows begin at step 20"),
])
def test_rows(content, steps, says, tmp_path, capsys):
    """What is left of loss.csv, one line about the rest, and the file that was edited, whole; another run can go on."""
    path = tmp_path / "loss.csv"
    if content is not None:
        path.write_bytes(content)
    rows = run_folder.read_rows(str(tmp_path), 20, COLUMNS)
    assert [int(row["step"]) for row in rows] == steps
    assert all(row["val_loss"] == "8.25" for row in rows if row["step"] == "0" and "val_loss" in row)
    printed = capsys.readouterr().out
    assert printed.count("\n") == (says != "") and says in printed, printed
    kept = re.findall("kept in (.*)", printed)
    assert bool(kept) == ("row of" in printed or "rows of" in printed or "column" in printed)
    assert [open(name, "rb").read() for name in kept] == [content for _ in kept]
    run_folder.write_rows(str(tmp_path), COLUMNS, rows)
    run_folder.add_row(str(tmp_path), COLUMNS, {"step": 21, "seconds": 7})
    with open(path, newline="") as file:
        again = [*csv.DictReader(file)]
    assert [int(row["step"]) for row in again] == [*steps, 21] and all(len(row) == 5 for row in again)


# ---- learning rates, a full disk, signals ----------------------------------------------------------------------------


@pytest.mark.parametrize("settings, says", [
    # nanoGPT's own
    ({"learning_rate": 6e-4, "min_lr": 6e-5}, r"the share 0.1 of learning_rate=0.0006: give --min_lr=0.1$"),
    ({"learning_rate": 3e-4, "min_lr": 2.5e-5}, r"the share 0.0833 of .* give --min_lr=0.0833$"),
    ({"learning_rate": 1e-2, "min_lr": 6e-5}, r"the share 0.006 of .* the nearest to take is --min_lr=0.01$"),
    ({"learning_rate": 1e-3, "min_lr": 0.005}, r"a share of the peak, 0 or from 0.01 to 1$"),
    ({"learning_rate": 0.0, "min_lr": 0.005}, r"a share of the peak, 0 or from 0.01 to 1$"),
    ({"learning_rate": 1e-3, "min_lr": 1.5}, r"a share of the peak, 0 or from 0.01 to 1$"),
    ({"learning_rate": 1e-3, "min_lr": -0.1}, r"a share of the peak, 0 or from 0.01 to 1$"),
    ({"learning_rate": 1e-3, "min_lr": math.nan}, r"a share of the peak, 0 or from 0.01 to 1$"),
    ({"learning_rate": -1e-3}, "learning_rate=-0.001: it must be a number from 0 up"),
    ({"muon_lr": -1e-9}, "muon_lr=-1e-09: it must be"), ({"muon_lr": math.inf}, "muon_lr=inf: it must be"),
    ({"weight_decay": math.nan}, "weight_decay=nan: it must be"), ({"grad_clip": -1.0}, "grad_clip=-1.0: it must be"),
    ({"beta1": 1.0}, "beta1=1.0: it must be"), ({"beta2": -0.1}, "beta2=-0.1: it must be"),
    ({"dropout": 1.0}, "dropout=1.0: it must be"), ({"dropout": math.nan}, "dropout=nan: it must be"),
])
def test_rates(settings, says, monkeypatch):
    with pytest.raises(UserError, match=says):
        run_folder.check_settings(settings)
    if "min_lr" in settings:  # an old checkpoint's own stays
        run_folder.check_settings(settings, resume=True)
        monkeypatch.setattr(run_folder, "given", {"min_lr"})
        with pytest.raises(UserError, match=says):
            run_folder.check_settings(settings, resume=True)


def test_rates_that_are_right():
    for least in (0.0, 0.01, 0.1, 1.0):
        run_folder.check_settings({"learning_rate": 0.0, "muon_lr": 0.05, "min_lr": least, "beta1": 0.0, "beta2": 0.999,
                                "dropout": 0.5, "weight_decay": 0.0, "grad_clip": math.inf})
    run_folder.check_settings({})


def test_a_file_that_cannot_be_written(tmp_path):
    """Where the disk is full, as /dev/full is, one line names the file."""
    out = str(tmp_path / "out")
    run_folder.start(out, "x.py", {}, {"x.py": b"a"})
    os.symlink("/dev/full", f"{out}/loss.csv")
    with pytest.raises(UserError, match=f"^cannot write {out}/loss.csv: No space left on device; the last checkpoint"):
        run_folder.add_row(out, ["step"], {"step": 1})
    os.symlink("/dev/full", f"{out}/loss.csv.tmp")
    with pytest.raises(UserError, match=f"^cannot write {out}/loss.csv: No space left on device"):
        run_folder.write_rows(out, ["step"], [])
    os.symlink("/dev/full", f"{out}/run.json.tmp")
    with pytest.raises(UserError, match=f"^cannot write {out}: No space left on device"):
        run_folder.start(out, "x.py", {}, {"x.py": b"a"})


def test_stops():
    """Signals are counted, whichever they are; the second Ctrl-C ends the process, a second SIGTERM does not."""
    script = (f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport run_folder\nstops = run_folder.catch_stops()\n"
              "print(stops(), flush=True)\nfor line in sys.stdin: print(stops(), flush=True)\n")
    for signals in ([signal.SIGINT], [signal.SIGTERM, signal.SIGTERM], [signal.SIGTERM, signal.SIGINT]):
        process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "0\n"
        for number in signals:
            process.send_signal(number)
            time.sleep(0.2)
        printed, error = process.communicate("\n")
        if signals == [signal.SIGTERM, signal.SIGINT]:
            assert "KeyboardInterrupt" in error and printed == ""
        else:
            assert printed == f"{len(signals)}\n" and not error
