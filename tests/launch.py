"""Run a command in n processes that MLX's ring connects, as mlx.launch -n N does: python launch.py N PORT COMMAND...

mlx.launch takes a core while it waits, because its loops ask without a pause whether they can write to the processes.
The exit status is that of the process that failed first; the others have some seconds to end by themselves.
"""
import json
import os
import subprocess
import sys
import tempfile
import threading

n, port, command = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
with tempfile.TemporaryDirectory() as folder:
    hosts = os.path.join(folder, "hosts.json")
    with open(hosts, "w") as file:
        json.dump([[f"127.0.0.1:{port + i}"] for i in range(n)], file)
    running, failed = {}, 0
    for i in range(n):
        process = subprocess.Popen(command, env=os.environ | {"MLX_HOSTFILE": hosts, "MLX_RANK": str(i)})
        running[process.pid] = process
    while running:
        pid, status = os.wait()
        running.pop(pid).returncode = os.waitstatus_to_exitcode(status)
        if status and not failed:
            failed = status
            rest = threading.Timer(20, lambda: [process.kill() for process in running.values()])
            rest.daemon = True
            rest.start()
sys.exit(abs(os.waitstatus_to_exitcode(failed)))
