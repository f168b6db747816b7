"""All processes of mlx.launch end when one of them is killed, hangs, or has an error; the others would wait for it for
ever. train.py calls watch(). Deleting this file costs that and nothing else.
"""
import atexit
import contextlib
import hashlib
import json
import os
import secrets
import signal
import socket
import struct
import sys
import threading
import time
from pathlib import Path

import blas  # noqa: F401  (before mlx)
import mlx.core as mx

from config import UserError

GO_ON = "go on from the last checkpoint with --resume=True"
BEAT = 1.0  # seconds between two signs of life
ALIVE, ENDS = b".", b"e"  # all that is sent; the second: "the reason is told, end yourself"


def watch(group: mx.distributed.Group, timeout: float) -> threading.Event:
    """From here on all processes end, with status 2, when one of them has ended, or gives no sign of life for so many
    seconds: a sum would wait for it for ever. One line tells which one it was. Set the event that is returned when the
    processes need each other no more.

    Once a second a thread of each process sends a byte to process 0, and that one's to all, also while the main thread
    computes, waits, or runs another program. None comes from a process that is stopped, or whose machine or network is
    dead. A process that is alive but makes no progress is not noticed: no limit of time tells a slow step or disk from
    one that will never end.

    All processes must reach process 0 at the address that MLX uses for it, on any free port. Where they cannot, as
    behind a firewall, one line says so, and training goes on unwatched. A process that hangs is killed if it is on the
    machine of the one that notices it; on another one it ends as soon as it goes on."""
    rank, script, usual, over = group.rank(), os.path.basename(sys.argv[0]), sys.excepthook, threading.Event()
    sockets, machines, pids = connect(group)
    # Process 0 tells of any other one. Of process 0 tells the first one on another machine, as its own may be dead.
    speaks = rank in (0, next((r for r, machine in enumerate(machines) if machine != machines[0]), 1))
    turn = 0 if rank == 0 else 1 if machines.index(machines[rank]) == rank else 2  # 1: the first of its machine

    def send(message: bytes):
        for other in sockets.values():
            with contextlib.suppress(OSError):
                other.send(message)

    def part():
        if not over.is_set():
            over.set()
            send(ENDS)
            time.sleep(2 * BEAT)  # until all have read it
            for other in sockets.values():
                with contextlib.suppress(OSError):
                    other.recv(4096)  # TCP resets a connection that ends with bytes unread, and ENDS may be lost

    def leave(status: int = 2):
        part()
        os._exit(status)  # to end in order, Python would wait for sums that have begun

    def tell(r: int, what: str, hangs: bool = False):
        if speaks:
            print(f"{script}: process {r} of {len(pids)} {what}: {GO_ON}", file=sys.stderr, flush=True)
        else:
            time.sleep(BEAT)  # the one that tells must find it hanging, too
        if hangs and machines[r] == machines[rank]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[r], signal.SIGKILL)  # it would keep its device, and run.lock
        leave()

    def look():
        silent, before = dict.fromkeys(sockets, 0.0), time.monotonic()
        while not over.wait(BEAT):
            passed, before = time.monotonic() - before, time.monotonic()
            for r, other in sockets.items():
                silent[r] += min(passed, 2 * BEAT)  # if this process was stopped itself, as by Ctrl-Z, none was silent
                try:
                    heard = other.recv(4096)
                except BlockingIOError:
                    if silent[r] > timeout:
                        tell(r, f"has given no sign of life for {timeout:g} seconds", hangs=True)
                    continue
                except OSError:
                    heard = b""
                silent[r] = 0.0
                if ENDS in heard:
                    leave() if rank == 0 else os._exit(2)
                if not heard and not over.wait(BEAT):  # it may be the end of training for all
                    tell(r, "has ended")
            send(ALIVE)  # last, as it resets a connection that has ended

    def on_error(kind, error, trace):
        """The first process tells of an error that several have: while others wait for their turn, look() ends them.
        So it does after it has told why the ring of MLX broke: another process has ended."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        time.sleep(0 if over.is_set() else 3 * BEAT * turn)  # it is set where all know of the error
        if kind is RuntimeError and "connection to a peer was lost" in str(error):
            time.sleep(9 * BEAT)
            kind, error = UserError, UserError(f"a connection is lost: {GO_ON}")
        sys.argv[0] = f"{script}, process {rank}" if rank else script
        try:
            status = usual(kind, error, trace) or 1
        except SystemExit as end:
            status = end.code
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        leave(status)

    if sockets:
        sys.excepthook = on_error
        # A launcher sends SIGTERM as soon as one process has ended: look() tells first which one.
        signal.signal(signal.SIGTERM, lambda *_: (time.sleep(3 * BEAT), sys.exit(2)))
        atexit.register(part)
        threading.Thread(target=look, daemon=True).start()
    if not timeout >= 3 * BEAT:
        raise UserError(f"timeout={timeout:g}: it must be {3 * BEAT:g} seconds or more")
    return over


def connect(group: mx.distributed.Group) -> tuple[dict[int, socket.socket], list[int], list[int]]:
    """By rank: of process 0 the connections to all others, of these the one to process 0, none where that failed; then
    all machines, each as a number that says whose process ids count there, and all process ids."""
    rank, n, server, ip, port = group.rank(), group.size(), None, "0.0.0.0", 0
    if rank == 0:  # at its address of MLX's ring, NCCL or JACCL, else by the machine's name
        name = os.environ.get("NCCL_HOST_IP") or os.environ.get("MLX_JACCL_COORDINATOR") or socket.gethostname()
        with contextlib.suppress(OSError):
            if path := os.environ.get("MLX_HOSTFILE"):
                name = json.loads(Path(path).read_text())[0][0]
            ip = socket.gethostbyname(name.partition(":")[0])
            server = socket.create_server((ip, 0), backlog=n)
            server.settimeout(10)
            port = server.getsockname()[1]
    where = [socket.gethostname()]
    with contextlib.suppress(OSError):  # Linux: containers of one name have process ids of their own
        where += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    machine = int(hashlib.sha256(repr(where).encode()).hexdigest()[:7], 16)
    own = [*socket.inet_aton(ip), port, secrets.randbits(31), machine, os.getpid()]
    everyone = mx.distributed.all_gather(mx.array([own]), group=group).tolist()
    *ip, port, secret = everyone[0][:6]
    ip, sockets, reason = ".".join(map(str, ip)), {}, "it found no port"
    try:
        if rank and port:
            sockets[0] = socket.create_connection((ip, port), timeout=10)
            sockets[0].sendall(struct.pack("!II", secret, rank))
        while server and len(sockets) < n - 1:
            other = server.accept()[0]
            other.settimeout(10)
            code, r = struct.unpack("!II", other.recv(8, socket.MSG_WAITALL).ljust(8, b"\0"))
            if code == secret:
                sockets[r] = other
    except OSError as error:
        reason, sockets = str(error), {}
    if mx.distributed.all_sum(mx.array(len(sockets)), group=group).item() < 2 * (n - 1):
        if rank == 0:
            print(f"{os.path.basename(sys.argv[0])}: the processes cannot reach process 0 at {ip}:{port} ({reason}): "
                  "if one of them hangs, the others will wait for it", file=sys.stderr, flush=True)
        sockets = {}
    for other in sockets.values():
        other.setblocking(False)
    return sockets, [row[6] for row in everyone], [row[7] for row in everyone]


if __name__ == "__main__":
    print("processes.py has no command of its own: run mlx.launch -n 2 -- python train.py, which uses it",
          file=sys.stderr)
    sys.exit(2)
