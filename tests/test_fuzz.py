"""A sample of fuzz.py over all scripts; that it finds the faults it looks for; that it knows every setting."""
import re
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it reads /proc, and waits for pidfds")
if sys.platform.startswith("linux"):
    import fuzz


@pytest.mark.parametrize("more", [
    ["--n=30", "--files=25"], ["--n=0", "--files=0", "--more=True", "--only=hqq.py,hf_reader.py,patching.py"]])
def test_sample(more):
    """Arguments and broken files at every script, and outputs that are inputs: nothing but one-line errors, nothing
    lost. The whole count is in fuzz.py's docstring."""
    command = [sys.executable, ROOT / "tests" / "fuzz.py", "--jobs=1", "--limit=4", *more]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("\n0 faults of 0 kinds\n"), done.stdout + done.stderr


BEGIN = f"import os, sys, time\nsys.path.insert(0, {str(ROOT)!r})\nfrom config import UserError, overrides\nx = 1\n"
BEGIN += "settings = overrides(globals())\n"


@pytest.mark.parametrize("body, says", [
    ("print(x, file=sys.stderr)", ""),
    ("raise UserError('one line')", ""),
    ("raise KeyboardInterrupt", ""),
    ("while True: sum(range(10**6))", ""),  # Ctrl-C ends it
    ("open('new', 'w').write('x')", ""),
    ("{}['key']", "traceback at ?:?: KeyError: 'key'"),
    ("raise SystemExit(3)", "exit status 3: "),
    ("import ctypes, faulthandler; faulthandler.disable(); ctypes.string_at(0)", "signal 11"),
    ("print(x, file=sys.stderr); raise UserError('more')", "2 lines at exit status 2: '1\\nscript.py: more'"),
    ("sys.exit(2)", "0 lines at exit status 2: ''"),
    ("print('a.py:1: RuntimeWarning: overflow', file=sys.stderr)", "1 lines at exit status 0: "),
    ("time.sleep(60)", "waits: "),
    ("import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass", "does not react to Ctrl-C"),
    ("kept = bytearray(4 * 2**30)\nfor i in range(0, len(kept), 4096): kept[i] = 1\ntime.sleep(9)", "takes 3 GiB"),
    ("open('input', 'ab').write(b'x')", "input is changed"),
    ("os.remove('folder/input')", "folder/input is gone"),
    ("open('a.tmp7', 'w')", "leaves a.tmp7"),
])
def test_faults_are_found(body, says, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "limit", 1.0)
    place, script = tmp_path / "place", tmp_path / "script.py"
    (place / "folder").mkdir(parents=True)
    for name in ("input", "folder/input"):
        (place / name).write_text(name)
    script.write_text(BEGIN + body)
    before = fuzz.contents(place)
    assert before == {"input": b"input", "folder": None, "folder/input": b"folder/input"}
    result = fuzz.run_case(place, str(script), [], limit=1.0)
    found = fuzz.fault(str(script), [], before, fuzz.contents(place), result)
    assert found.startswith(says) and (says or not found), (found, result)


def test_a_terminal_and_a_disk(tmp_path):
    """The terminal's encoding, and a disk that is full after so many bytes."""
    script = tmp_path / "script.py"
    body = "print(text)\nwith open('new', 'w') as file: file.write(text * 2000)"
    script.write_text(BEGIN.replace("x = 1", "text = ''") + body)
    (tmp_path / "place").mkdir()
    for disk, status, says in ((2**20, 0, ""), (3000, 2, "script.py: File too large\n")):
        found = fuzz.run_case(tmp_path / "place", str(script), ["--text=é"], "ascii", disk)
        assert found[:3] == (status, "\\xe9\n", says)


@pytest.mark.parametrize("script", fuzz.SCRIPTS if sys.platform.startswith("linux") else [])
def test_every_setting_is_known(script, tmp_path):
    """The settings that --help lists, and their types, as fuzz.py reads them from the source."""
    (tmp_path / "place").mkdir()
    if script == "gguf_reader.py":
        pytest.importorskip("gguf")
    status, out, err, *_ = fuzz.run_case(tmp_path / "place", script, ["--help"])
    listed = dict(re.findall(r"^  --(\w+)=(.*?)(?:  |$)", out, re.M))
    assert (status, err) == (0, "") and [*listed] == [*fuzz.SCRIPTS[script][0]]
    for name, (kind, _) in fuzz.SCRIPTS[script][0].items():
        if kind in (bool, int, float):
            assert kind.__name__ == type({"true": True, "false": False}.get(listed[name].strip()) if kind is bool else
                                         kind(listed[name])).__name__
