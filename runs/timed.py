"""Run a command, and write what it costs: python runs/timed.py NAME COMMAND ...

NAME.txt gets what the command prints, and if it does not fail, NAME.cost the seconds it took and the GiB of memory.
"""
import os
import resource
import subprocess
import sys
import time

name, *command = sys.argv[1:]
began = time.perf_counter()
with subprocess.Popen(command, stdout=subprocess.PIPE) as process, open(f"{name}.txt", "wb") as copy:
    for line in process.stdout:
        copy.write(line)
        sys.stdout.buffer.write(line)
        sys.stdout.flush()
if process.returncode:
    sys.exit(process.returncode)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
with open(f"{name}.tmp", "w") as file:
    file.write(f"{time.perf_counter() - began:.1f} {peak / 2**30:.2f}\n")
os.replace(f"{name}.tmp", f"{name}.cost")
