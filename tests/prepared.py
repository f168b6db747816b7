"""Scripts in processes that need not import packages: tests run over a thousand, and half of a short run is imports.

    done = prepared.run([sys.executable, "train.py", "--help"], cwd=folder)    # as subprocess.run(..., text=True)

One process has imported the packages, but none of this project's modules besides blas.py; for each script it forks, and
the copy runs the script as its main program. Python's start, and the order of imports, are tested by those tests that
start a script by subprocess.run().
"""
import atexit
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
waiting = threading.Lock()
server = None  # (process, socket, its environment)


def run(command: list, check: bool = False, **options) -> subprocess.CompletedProcess:
    """Run a Python script, and capture what it prints, as text. options: cwd, env, timeout. A script of another folder
    than this checkout's, one with another environment than the tests', or one that runs beside another one, has its own
    process from the start."""
    done = finished([*map(str, command)], **options)
    if check and done.returncode:
        raise AssertionError(f"exit status {done.returncode}: {done.stdout}{done.stderr}")
    return done


def finished(command: list[str], cwd=None, env=None, timeout: float = 300) -> subprocess.CompletedProcess:
    env = without_pytest(os.environ if env is None else env)
    ours = command[0] == sys.executable and Path(command[1]).parent in (ROOT, ROOT / "runs")
    if not hasattr(os, "fork") or not ours or not waiting.acquire(blocking=False):
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=timeout)
    try:
        if (server or start()) and server[2] != env:
            return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=timeout)
        return forked(command, os.fspath(cwd or os.getcwd()), timeout)
    finally:
        waiting.release()


def without_pytest(env: dict) -> dict:
    return {name: value for name, value in env.items() if not name.startswith("PYTEST_")}  # the name of the test


def start():
    global server
    ours, other = socket.socketpair()
    env = without_pytest(os.environ)
    process = subprocess.Popen([sys.executable, __file__, str(other.fileno())], pass_fds=[other.fileno()], env=env,
                               stdin=subprocess.DEVNULL)
    other.close()
    server = process, ours, env
    atexit.register(stop)
    return server


def stop():
    server[1].close()
    server[0].wait()


def forked(command: list[str], folder: str, timeout: float) -> subprocess.CompletedProcess:
    pipes = [os.pipe() for _ in range(2)]
    socket.send_fds(server[1], [json.dumps([command[1:], folder]).encode()], [write for _, write in pipes])
    for _, write in pipes:
        os.close(write)
    pid, texts = int(server[1].recv(20)), ["", ""]

    def read(i: int):
        with open(pipes[i][0], encoding="utf-8") as file:
            texts[i] = file.read()

    readers = [threading.Thread(target=read, args=(i,)) for i in range(2)]
    for reader in readers:
        reader.start()
    readers[0].join(timeout)
    late = readers[0].is_alive()
    if late:
        os.kill(pid, signal.SIGKILL)
    for reader in readers:
        reader.join()
    status = int(server[1].recv(20))
    if late:
        raise subprocess.TimeoutExpired(command, timeout)
    return subprocess.CompletedProcess(command, status, *texts)


# ---- the process that is copied --------------------------------------------------------------------------------------


def serve(connection: socket.socket):
    while True:
        message, files, *_ = socket.recv_fds(connection, 1 << 20, 2)
        if not message:
            return
        arguments, folder = json.loads(message)
        pid = os.fork()
        if pid == 0:
            connection.close()
            for name, number, file in zip(("stdout", "stderr"), (1, 2), files, strict=True):
                os.dup2(file, number)
                os.close(file)
                old = getattr(sys, name)
                setattr(sys, name, open(number, "w", 1 if number == 2 else -1, old.encoding, old.errors, closefd=False))
            os.chdir(folder)
            os._exit(status_of(arguments))
        for file in files:
            os.close(file)
        connection.sendall(f"{pid:<20}".encode())
        connection.sendall(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):<20}".encode())


def status_of(arguments: list[str]) -> int:
    """Run a script, and end it as Python does: its exit status."""
    sys.argv, sys.path[0], status = arguments, os.path.dirname(arguments[0]), 0
    try:
        try:
            runpy.run_path(arguments[0], run_name="__main__")
        except SystemExit:
            raise
        except BaseException:
            status = 1
            sys.excepthook(*sys.exc_info())  # may raise SystemExit, with the status
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    return status & 255


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    import blas  # noqa: F401  (before mlx)
    import matplotlib.backends.backend_agg  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import mlx.core
    import mlx.nn
    import mlx.optimizers
    import mlx.utils  # noqa: F401
    import numpy  # noqa: F401
    import tqdm  # noqa: F401
    sys.path.pop(0)
    serve(socket.socket(fileno=int(sys.argv[1])))
