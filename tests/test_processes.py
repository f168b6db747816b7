"""processes.py: when one of several processes ends or hangs, all end, with status 2 and one line from one of them."""
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, launch
from test_train import arrays, command, data, train  # noqa: F401

from model import load_checkpoint

# Processes that work for some time, or without end: most of them sleep, as the ring takes a core while a sum waits.
LOOP = """
import os, socket, sys, time
sys.path.insert(0, {root!r})
rank = int(os.environ["MLX_RANK"])
{before}
import blas, mlx.core as mx, processes
from config import UserError, overrides
overrides(globals())
world = mx.distributed.init()
over = processes.watch(world, 4)
for i in range({steps}):
    if i == 9:
        {during}
    if {sums}:
        mx.distributed.all_sum(mx.array(1.0)).item()
    if i == 3:
        print("ready", flush=True)
    time.sleep(0.1)
mx.distributed.all_sum(mx.array(1.0)).item()
over.set()
"""
SUMS = "killed: the first", "killed: the middle one", "stopped: of two", "slow"
FAILS = "def fails(*_, **__):\n    raise OSError('no way')\n"
TWO_MACHINES = "socket.gethostname = lambda: f'host{rank // 2}'"
ENDED, SILENT = "has ended: go on from", "has given no sign of life for 4 seconds: go on from"
CASES = {  # processes, before, during, signals to processes, their statuses, the line
    "Ctrl-Z": (2, "", "", {0: "STOP", 1: "STOP"}, [0, 0], ""),
    "killed: the first": (3, "", "", {0: "KILL"}, [-9, 2, 2], f"loop.py: process 0 of 3 {ENDED}"),
    "killed: the middle one": (3, "", "", {1: "KILL"}, [2, -9, 2], f"loop.py: process 1 of 3 {ENDED}"),
    "killed: the last": (3, "", "", {2: "KILL"}, [2, 2, -9], f"loop.py: process 2 of 3 {ENDED}"),
    "killed, and told by a launcher": (3, "", "", {1: "KILL", 0: "TERM", 2: "TERM"}, [2, -9, 2],
                                       f"loop.py: process 1 of 3 {ENDED}"),
    "stopped: the first": (3, "", "", {0: "STOP"}, [-9, 2, 2], f"loop.py: process 0 of 3 {SILENT}"),
    "stopped: the middle one": (3, "", "", {1: "STOP"}, [2, -9, 2], f"loop.py: process 1 of 3 {SILENT}"),
    "stopped: of two": (2, "", "", {1: "STOP"}, [2, -9], f"loop.py: process 1 of 2 {SILENT}"),
    "killed: a machine": (4, TWO_MACHINES, "", {0: "KILL", 1: "KILL"}, [-9, -9, 2, 2],
                          f"loop.py: process 0 of 4 {ENDED}"),
    "stopped: on another machine": (3, TWO_MACHINES, "", {2: "STOP"}, [2, 2, None],
                                    f"loop.py: process 2 of 3 {SILENT}"),
    "an error of one": (3, "", "if rank == 1: raise OSError(28, 'No space left on device')", {}, [2, 2, 2],
                        "loop.py, process 1: No space left on device"),
    "an error of the first": (3, "", "if rank == 0: raise UserError('it is wrong')", {}, [2, 2, 2],
                              "loop.py: it is wrong"),
    "an error of all": (3, "", "raise UserError('it is wrong')", {}, [2, 2, 2], "loop.py: it is wrong"),
    "sys.exit in one": (3, "", "if rank == 2: sys.exit('bye')", {}, [2, 2, 1], "bye"),
    "slow": (3, "", "if rank == 0: time.sleep(8)", {}, [0, 0, 0], ""),
    "no port": (2, f"{FAILS}socket.create_server = fails", "", {}, [0, 0],
                "loop.py: the processes cannot reach process 0 at 127.0.0.1:0 (it found no port)"),
    "no connection": (2, f"{FAILS}socket.create_connection = fails", "", {}, [0, 0], "loop.py: the processes cannot"),
}


PORTS = itertools.count(30_100 + os.getpid() * 64 % 2560)  # up to 32,767: no system gives them away unasked


def ring(folder, n: int) -> list[dict]:
    """What mlx.launch adds to the environments of n processes, so that they connect. Without it nobody ends the others,
    and the status of each is seen."""
    hosts = [[f"127.0.0.1:{next(PORTS)}"] for _ in range(n)]
    (folder / "hosts.json").write_text(json.dumps(hosts))
    return [{"MLX_HOSTFILE": str(folder / "hosts.json"), "MLX_RANK": str(i)} for i in range(n)]


# For each line it reads, a process that runs a script, as Python does. It has imported what takes long, as prepared.py
# has. Beside the script it writes files: what the process printed, its id, and its exit status.
NURSERY = f"""
import json, os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import blas, mlx.core, mlx.nn, mlx.optimizers, mlx.utils, numpy, prepared
for line in sys.stdin:
    path, env = json.loads(line)
    beside = lambda name: open(os.path.join(os.path.dirname(path), name + env["MLX_RANK"]), "w")
    if os.fork():
        continue
    if child := os.fork():
        with beside("pid") as file:
            print(child, file=file)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with beside("status") as file:
            print(status, file=file)
        os._exit(0)
    os.environ.update(env)
    for number, name in ((1, "out"), (2, "err")):
        with beside(name) as file:
            os.dup2(file.fileno(), number)
    os._exit(prepared.status_of([path]))
"""


@pytest.fixture(scope="module")
def nursery():
    with subprocess.Popen([sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, text=True) as process:
        yield process


def begin(nursery, path: Path, n: int):
    """Run a script in n processes together."""
    for env in ring(path.parent, n):
        print(json.dumps([str(path), env]), file=nursery.stdin, flush=True)


def content(path: Path, text: str = "\n") -> str:
    """What a file says as soon as it has this text."""
    until = time.monotonic() + 60
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < until, path
        time.sleep(0.05)
    return path.read_text()


def signals(folder: Path, victims: dict[int, str]):
    for i, name in victims.items():
        os.kill(int(content(folder / f"pid{i}")), getattr(signal, f"SIG{name}"))


def end(folder: Path, n: int) -> tuple[list[int], str]:
    """The exit statuses, and what all have told on stderr, without what MLX's ring says there."""
    statuses = [int(content(folder / f"status{i}")) for i in range(n)]
    lines = [line for i in range(n) for line in open(folder / f"err{i}")]
    told = "".join(line for line in lines if "ring]" not in line and "Socket" not in line and "errno" not in line)
    return statuses, told


@pytest.fixture(scope="module")
def loops(nursery, tmp_path_factory):
    """All cases, side by side, as their processes do little but wait: the folder of each."""
    found = {}
    for name, (n, before, during, _, statuses, _) in CASES.items():
        path, steps = tmp_path_factory.mktemp("loop") / "loop.py", 50 if statuses == [0] * n else 1_000
        path.write_text(LOOP.format(root=str(ROOT), before=before, during=during or "pass", steps=steps,
                                    sums=name in SUMS))
        begin(nursery, path, n)
        found[name] = path.parent
    for name, folder in found.items():
        for i in range(CASES[name][0]):
            content(folder / f"out{i}", "ready")
        signals(folder, CASES[name][3])
    time.sleep(8)
    signals(found["Ctrl-Z"], {0: "CONT", 1: "CONT"})
    yield found
    for name, folder in found.items():
        for i in range(CASES[name][0]):
            if not (folder / f"status{i}").exists():  # of a test that has failed
                signals(folder, {i: "KILL"})


@pytest.mark.parametrize("name", CASES)
def test_ends(loops, name):
    n, _, _, _, statuses, line = CASES[name]
    if None in statuses:  # it ends as soon as it goes on
        assert end(loops[name], 2)[0] == [2, 2] and not (loops[name] / "status2").exists()
        signals(loops[name], {2: "CONT"})
        statuses = [2, 2, 2]
    found, told = end(loops[name], n)
    assert found == statuses and told.count("\n") == bool(line) and told.startswith(line), told


def test_of_mlx_launch(data, tmp_path):  # noqa: F811
    """A run ends when its first process is stopped, and goes on from the last checkpoint."""
    process = subprocess.Popen([*launch(2, by_mlx=True), *command(data, tmp_path, "--max_iters=20000", "--timeout=4")],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step      9"):
            break
    own = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(own[0]), signal.SIGSTOP)
    error = process.communicate(timeout=60)[1]
    assert error.count("train.py: process 0 of 2 has given no sign of life for 4 seconds") == 1, error
    assert error.count("--resume=True") == 1 and "Traceback" not in error
    assert "exited with code 2" in error and "exited with code -9" in error, error
    arrays(tmp_path)
    step = load_checkpoint(str(tmp_path / "ckpt.safetensors"))[1]["step"]
    assert step >= 8
    train(data, tmp_path, "--resume=True", f"--max_iters={step + 2}")


# train.py, whose fifth step does something else in one process.
INJECTED = """
import os, sys, runpy
sys.path.insert(0, {root!r})
import blas, mlx.core as mx
rank, calls, before = int(os.environ["MLX_RANK"]), [], mx.async_eval
def fails(*arrays):
    calls.append(1)
    if len(calls) == 6 and rank == {rank}:
        {does}
    before(*arrays)
mx.async_eval = fails
sys.argv = {argv!r}
sys.argv = [text.replace("RANK", str(rank)) for text in sys.argv]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("rank, does, arguments, line", [
    (1, "raise MemoryError", [], "train.py, process 1: there is not enough memory"),
    (1, "os.kill(os.getpid(), 9)", [], "train.py: process 1 of 2 has ended"),
    (0, "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))", [], "train.py: cannot write"),
    (9, "", ["--learning_rate=1e38", "--grad_clip=0"], "train.py: step"),
    (9, "", ["--seed=RANK"], "train.py: seed differs between the processes"),
    (9, "", ["--data={data}RANK"], "train.py: data, its train tokens, differs between the processes"),
    (9, "", ["--timeout=2"], "train.py: timeout=2: it must be 3 seconds or more"),
], ids=["an error", "killed", "a full disk", "NaN", "settings", "data", "timeout"])
def test_of_train(nursery, data, tmp_path, rank, does, arguments, line):  # noqa: F811
    """All end with one line; what has been saved is whole, and one process goes on from there."""
    for i in range(2):
        shutil.copytree(data, tmp_path / f"data{i}")
    with open(tmp_path / "data1" / "train.bin", "r+b") as file:
        file.write(b"\0")
    argv = command(tmp_path / "data0", tmp_path / "out", "--max_iters=2000",
                   *(text.format(data=tmp_path / "data") for text in arguments))[1:]
    (tmp_path / "run.py").write_text(INJECTED.format(root=str(ROOT), rank=rank, does=does or "pass", argv=argv))
    begin(nursery, tmp_path / "run.py", 2)
    found, told = end(tmp_path, 2)
    assert found == [2, -9 if "kill" in does else 2] and told.count("\n") == 1 and told.startswith(line), told
    assert (tmp_path / "out" / "ckpt.safetensors").exists() == bool(does)
    if does:
        assert load_checkpoint(str(tmp_path / "out" / "ckpt.safetensors"))[1]["step"] == 4
        arrays(tmp_path / "out")
        train(data, tmp_path / "out", "--resume=True", "--max_iters=6")


def test_one_process(data, tmp_path):  # noqa: F811
    assert "timeout is for several processes" in train(data, tmp_path, "--timeout=9", status=2).stderr


def test_deletion(data, tmp_path):  # noqa: F811
    """train.py runs without processes.py, and then refuses the setting that is for it."""
    for path in ROOT.glob("*.py"):
        if path.name != "processes.py":
            shutil.copy(path, tmp_path)
    command = [sys.executable, "train.py", f"--data={data}", "--max_iters=2", "--n_layer=1", "--n_embd=32",
               "--block_size=16", "--sample_tokens=3", "--eval_windows=2", "--overwrite=True"]
    for prefix, more, status in (launch(2), [], 0), ([], ["--timeout=9"], 2):
        done = subprocess.run([*prefix, *command, *more], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == status and (status or "rror" not in done.stderr), done.stderr
    assert "processes.py" in done.stderr
