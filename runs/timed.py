"""Run a command, and write what it costs: python runs/timed.py NAME COMMAND ...

NAME.txt gets what the command prints, and if it does not fail, NAME.cost the seconds of processors' time that it took,
which other work on the machine changes little, and the GiB of memory.
"""
import os
import resource
import subprocess
import sys

name, *command = sys.argv[1:]
with subprocess.Popen(command, stdout=subprocess.PIPE) as process, open(f"{name}.txt", "wb") as copy:
    for line in process.stdout:
        copy.write(line)
        copy.flush()
        sys.stdout.buffer.write(line)
        sys.stdout.flush()
if process.returncode:
    sys.exit(process.returncode)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
with open(f"{name}.tmp", "w") as file:
    file.write(f"{used.ru_utime + used.ru_stime:.1f} {peak / 2**30:.2f}\n")
os.replace(f"{name}.tmp", f"{name}.cost")
