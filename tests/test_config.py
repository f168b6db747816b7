"""config.py, through little scripts that are run as a user runs them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

SCRIPT = '''"""Train a thing.

    python script.py --n_layer=2
"""
import json
import sys

from config import UserError, overrides

# data
data = "tiny # shakespeare"  # folder under data/
prompt = ""  # what to go on from, "#" or not
# model
n_layer = 6  # blocks
# Two words: no group
dropout: float = 0.0  # 0 .. 1
bias = False
_hidden = 1
UPPER = 2
shape = (1, 2)
settings = overrides(globals(), "data", "prompt")
later = 3  # not a setting
n_layer = n_layer + 0  # not the comment of n_layer
assert all(globals()[name] == value for name, value in settings.items())
print(json.dumps(settings))
'''


def run(tmp_path, *arguments, body="", script=SCRIPT, shell=""):
    """(exit status, stdout, stderr) of a script with some more code at its end."""
    path = tmp_path / "script.py"
    path.write_text(script + body)
    command = [sys.executable, str(path), *arguments]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    if shell:
        command = ["bash", "-c", f'"{sys.executable}" "{path}" {shell}']
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    return done.returncode, done.stdout, done.stderr


def settings(tmp_path, *arguments):
    status, out, err = run(tmp_path, *arguments)
    assert (status, err) == (0, "")
    return eval(out, {"true": True, "false": False})


def refused(tmp_path, *arguments):
    """The one line that refuses the arguments."""
    status, out, err = run(tmp_path, *arguments)
    assert (status, out) == (2, "")  # nothing ran
    assert err.startswith("script.py: ") and err.count("\n") == 1, err
    return err.strip()


def test_defaults_in_source_order(tmp_path):
    values = settings(tmp_path)
    assert list(values.items()) == [
        ("data", "tiny # shakespeare"), ("prompt", ""), ("n_layer", 6), ("dropout", 0.0), ("bias", False)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "argument, name, value",
    [
        ("--prompt=123", "prompt", "123"),
        ("--prompt=a=b", "prompt", "a=b"),
        ("--data=", "data", ""),
        ("--prompt=--help", "prompt", "--help"),
        ("--prompt=two words", "prompt", "two words"),
        ("--dropout=1", "dropout", 1.0),
        ("--dropout=1e-3", "dropout", 0.001),
        ("--n_layer=1_000", "n_layer", 1000),
        ("--n_layer=-1", "n_layer", -1),
        ("--bias=TRUE", "bias", True),
        ("--bias=false", "bias", False),
    ],
)
def test_values(tmp_path, argument, name, value):
    found = settings(tmp_path, argument)[name]
    assert found == value and type(found) is type(value)


def test_the_last_of_several_counts(tmp_path):
    values = settings(tmp_path, "a", "--n_layer=1", "--data=b", "--n_layer=2")
    assert (values["data"], values["n_layer"]) == ("b", 2)


def test_given_names_what_was_set(tmp_path):
    status, out, _ = run(tmp_path, "a", "--n_layer=6", body="from config import given\nprint(sorted(given))")
    assert (status, out.splitlines()[-1]) == (0, "['data', 'n_layer']")


def test_bare_arguments_fill_names_in_order(tmp_path):
    values = settings(tmp_path, "-1", "--n_layer=2", "-x y")
    assert (values["data"], values["prompt"], values["n_layer"]) == ("-1", "-x y", 2)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--n_layr=6"], "did you mean --n_layer=VALUE?"),
        (["--n-layer=6"], "did you mean --n_layer=VALUE?"),
        (["--zzzzzz=6"], "--help"),
        (["--_hidden=2"], "unknown"),
        (["--UPPER=3"], "unknown"),
        (["--later=4"], "unknown"),
        (["--n_layer", "6"], "write --n_layer=VALUE"),
        (["--n_layer=0.5"], "whole number"),
        (["--n_layer=true"], "whole number"),
        (["--n_layer=9223372036854775808"], "at most 64 bits"),
        (["--dropout=nan"], "a number that is finite"),
        (["--dropout=-1e400"], "a number that is finite"),
        (["--dropout="], "a number that is finite"),
        (["--bias=1"], "true or false"),
        (["a", "b", "c"], "'c'"),
    ],
)
def test_refused_in_one_line(tmp_path, arguments, says):
    assert says in refused(tmp_path, *arguments)


def test_nearest_name_takes_minus_for_underscore(tmp_path):
    script = "from config import overrides\nnlayer = n_layer = 1\noverrides(globals())\n"
    assert "--n_layer=VALUE" in run(tmp_path, "--n-layer=5", script=script)[2]


def test_bare_argument_where_none_is_taken(tmp_path):
    script = "from config import overrides\nx = 1\noverrides(globals())\n"
    status, _, err = run(tmp_path, "5", script=script)
    assert status == 2 and "--name=value" in err


def test_nothing_is_set_when_one_argument_is_wrong(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    import config

    monkeypatch.setattr(sys, "argv", ["script.py", "--a=2", "--b=x"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # put back afterwards
    script = {"__name__": "__main__", "a": 1, "b": 1}
    with pytest.raises(config.UserError):
        config.overrides(script)
    assert (script["a"], script["b"]) == (1, 1)


def test_imported_script_ignores_arguments(tmp_path):
    (tmp_path / "other.py").write_text("from config import overrides\nx = 1\nsettings = overrides(globals(), 'x')\n")
    script = "import sys\nbefore = sys.excepthook\nimport other\nprint(other.settings, sys.excepthook is before)\n"
    assert run(tmp_path, "--x=2", "--help", script=script) == (0, "{'x': 1} True\n", "")


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(tmp_path, flag):
    status, out, err = run(tmp_path, "--n_layer=2", flag)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "Train a thing." and "usage: python script.py [data] [prompt] [--name=value ...]" in lines
    groups = [line for line in lines[lines.index("data") :] if line and line[0] != " "]
    assert groups == ["data", "model"]
    rows = {line.split("=")[0].strip(): line for line in lines if line.startswith("  --")}
    assert list(rows) == ["--data", "--prompt", "--n_layer", "--dropout", "--bias"]
    assert "'tiny # shakespeare'" in rows["--data"] and rows["--data"].endswith("[argument 1] folder under data/")
    assert rows["--prompt"].endswith('[argument 2] what to go on from, "#" or not')
    assert "--n_layer=6 " in rows["--n_layer"] and rows["--n_layer"].endswith(" blocks")
    assert rows["--dropout"].endswith(" 0 .. 1") and rows["--bias"].rstrip().endswith("--bias=false")
    assert lines.index("model") < lines.index(rows["--n_layer"])


def test_help_fits_120_columns(tmp_path):
    script = SCRIPT.replace("# blocks", "# " + "many words " * 30).replace('"tiny', '"' + "long default " * 12)
    _, out, _ = run(tmp_path, "--help", script=script)
    assert 100 < max(map(len, out.splitlines())) <= 120


def test_help_needs_neither_mlx_nor_numpy(tmp_path):
    body = "\nassert not {'mlx', 'mlx.core', 'numpy'} & set(sys.modules), 'slow'\n"
    assert run(tmp_path, body=body)[0] == 0


@pytest.mark.parametrize(
    "body, status, says",
    [
        ('raise UserError("no data: run\\nprepare.py")', 2, "script.py: no data: run prepare.py"),
        ('open("missing/file.bin")', 2, "script.py: No such file or directory: missing/file.bin"),
        ('raise OSError("the disk is gone")', 2, "script.py: the disk is gone"),
        ("bytearray(2**62)", 2, "script.py: there is not enough memory: make something smaller"),
        ("raise RuntimeError('Could not load C++ shared library a.so')", 130,
         "stopped while MLX compiled a kernel: start again"),
        ("raise RuntimeError('Failed to compile function f: g++\\nNo space left')", 2,
         "script.py: MLX cannot compile a kernel: is the disk full? (No space left)"),
        ("raise KeyboardInterrupt", 130, "stopped"),
        ("raise BrokenPipeError", 141, ""),
        ("raise SystemExit(7)", 7, ""),
    ],
)
def test_errors_in_one_line(tmp_path, body, status, says):
    found, _, err = run(tmp_path, body=f"\n{body}\n")
    assert (found, err.strip()) == (status, says)


def test_a_bug_keeps_its_traceback(tmp_path):
    status, _, err = run(tmp_path, body="\n{}['key']\n")
    assert status == 1 and err.startswith("Traceback") and "KeyError: 'key'" in err


@pytest.mark.parametrize("body", ["\nprint('x')\n", "\nfor i in range(100000): print(i)\n"])
def test_output_into_a_closed_pipe_is_quiet(tmp_path, body):
    # the first body breaks at the last flush, the second within print
    assert run(tmp_path, body="\nimport time; time.sleep(0.2)" + body, shell="| true") == (0, "", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has such a device")
@pytest.mark.parametrize("body", ["\nprint('x')\n", "\nfor i in range(100000): print(i)\n"])
def test_output_onto_a_full_disk(tmp_path, body):
    status, out, err = run(tmp_path, body=body, shell="> /dev/full")
    assert (status, out) == (2, "") and err.count("\n") == 1 and err.startswith("script.py: "), err


def test_unknown_positional_is_a_bug(tmp_path):
    status, _, err = run(tmp_path, script="from config import overrides\nx = 1\noverrides(globals(), 'y')\n")
    assert status == 1 and "AssertionError" in err


def test_a_setting_that_collects(tmp_path):
    script = SCRIPT.replace('settings =', 'adapter = ()  # may be given several times\nsettings =', 1)
    assert '"adapter": []' in run(tmp_path, script=script)[1]
    assert '"adapter": ["a:0.5", "b=c"]' in run(tmp_path, "--adapter=a:0.5", "--adapter=b=c", script=script)[1]
    line, = [line for line in run(tmp_path, "--help", script=script)[1].splitlines() if "--adapter" in line]
    assert line.split(maxsplit=1) == ["--adapter=''", "may be given several times"]


def test_a_tuple_takes_all_arguments(tmp_path):
    script = tmp_path / "several.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom config import overrides\nfirst = ''\n"
                      "rest = ()  # paths\nsettings = overrides(globals(), 'first', 'rest')\nprint(first, rest)\n")
    for arguments, printed in ((["a"], "a ()"), (["a", "b", "--rest=c", "d"], "a ('b', 'c', 'd')"),
                               (["--help"], "[first] [rest ...]")):
        done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=True)
        assert printed in done.stdout


def test_modules_say_that_they_are_no_scripts():
    """A file calls overrides(), or ends with a line for those who run it by mistake; muon.py's is tried."""
    ending = re.compile(r"has no command of its own: run [^\n]*(\n +)?file=sys\.stderr\)\n    sys\.exit\(2\)\n\Z")
    for path in ROOT.glob("*.py"):
        source = path.read_text()
        if path.name not in ("config.py", "bench_peers.py"):  # which define it, and take a task from bench.py
            assert ("= overrides(globals()" in source) != bool(ending.search(source)), path.name
    done = subprocess.run([sys.executable, ROOT / "muon.py"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "muon.py has no command of its own: run train.py, which uses it\n")


def test_an_output_is_none_of_the_inputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    import config

    for name in ("model", "folder/deep/tokens", "other"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("whole")
    (tmp_path / "link").symlink_to("model")
    (tmp_path / "hard").hardlink_to("model")
    (tmp_path / "to_folder").symlink_to("folder")
    (tmp_path / "broken").symlink_to("gone")
    (tmp_path / "folder" / "inside").symlink_to("../other")
    for path, *inputs in (["model", "model"], ["folder/../model", "", "other", str(tmp_path / "model")],
                          ["link", "model"], ["model", "link"], ["hard", "link"], ["folder/deep/tokens", "folder"],
                          ["to_folder/deep/tokens", "folder"], ["folder/deep/tokens", "to_folder"],
                          ["other", "folder"]):
        with pytest.raises(config.UserError, match=f"{re.escape(path)} would overwrite the input "):
            config.check_output(path, *inputs)
    for path, *inputs in (["model", "other"], ["model", ""], ["new", "new"], ["folder/new", "folder"],
                          ["broken", "model"], ["model", "folder", "broken"]):
        config.check_output(path, *inputs)


INTERRUPTER = """
import os, signal, sys

class Finder:  # Python asks it first for every module that is imported
    seen = 0

    def find_spec(name, path=None, target=None):
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # config has been imported
            Finder.seen += 1
        if Finder.seen == int(os.environ["MOMENT"]):
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder)
"""


@pytest.mark.parametrize("script", ["train.py", "hqq.py", "gguf_reader.py", "runs/compress.py"])
def test_ctrl_c_while_a_script_imports(script, tmp_path):
    """SIGINT at the 1st, 2nd, 4th, ... import after that of config: one line, status 130."""
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTER)
    for power in range(8):
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "MOMENT": str(2**power)}
        done = subprocess.run([sys.executable, ROOT / script, "--nothing"], capture_output=True, text=True,
                              env=environment)
        assert (done.returncode, done.stderr) == (130, "stopped\n"), 2**power


def test_a_terminal_without_utf8(tmp_path):
    """What an encoding lacks is printed as an escape, and a file's name as the bytes that it has."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT + "print('▌ é')\nprint(data)\nraise UserError(f'— {data}')", encoding="utf-8")
    environment = {"PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for name in ("bücher", b"b\xfccher"):
        done = subprocess.run([sys.executable, path, name], capture_output=True, env=environment)
        name = name if isinstance(name, bytes) else name.encode()
        assert done.stdout.split(b"\n", 1)[1] == b"\\u258c \\xe9\n" + name + b"\n"
        assert (done.returncode, done.stderr) == (2, b"script.py: \\u2014 " + name + b"\n")
        utf8 = {**environment, "PYTHONUTF8": "1"}
        done = subprocess.run([sys.executable, path, name], capture_output=True, env=utf8)
        assert done.stdout.split(b"\n", 1)[1] == "▌ é\n".encode() + name + b"\n"
