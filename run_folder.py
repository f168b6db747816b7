"""The folder of a training run, as train.py, sft.py, dpo.py and scripts copied from them keep it.

    source = run_folder.read_source(__file__)         # the script and its modules, before anybody edits them
    run_folder.check(out_dir, SCRIPT, overwrite)      # before any work: is the folder free?
    run_folder.start(out_dir, SCRIPT, settings, source)
    run_folder.add_row(out_dir, COLUMNS, {"step": 1, "train_loss": 8.3})

    OUT_DIR/run.json       commit, arguments, settings, script, and started, the date
    OUT_DIR/source/        the script and the modules that it imported, as they were at the start; source-STEP/ where
                           they had changed when the run was resumed at that step
    OUT_DIR/loss.csv       a row for each log line and each evaluation; with --log also in TensorBoard or wandb
    OUT_DIR/run.lock       held by the process that writes here
"""
import contextlib
import csv
import datetime
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

from safetensors import SafetensorError, safe_open

from config import UserError

try:
    import fcntl
except ImportError:  # Windows has no such locks: two runs in one folder go unnoticed there
    fcntl = None

RESULTS = ("ckpt", "best", "sft", "dpo")
locks = {}  # open files by path: a lock is held until its file is closed, at the latest when the process ends
allowed = {}  # by folder: the results, and their time, that check() allowed to replace

# ---- may it write there? ---------------------------------------------------------------------------------------------


def check(out_dir: str, script: str, overwrite: bool, resume: bool | None = None):
    """UserError if another process writes to this folder, or if it holds results that a new run would replace: then a
    user at a terminal is asked first. resume: that setting; None where the script has none."""
    if os.path.exists(os.path.join(out_dir, "run.lock")):
        lock(out_dir, script)
    path = newest_result(out_dir)
    allowed[out_dir] = (path, path and os.path.getmtime(path))
    if overwrite and resume:
        raise UserError("--overwrite=True begins anew and --resume=True goes on: give one of them")
    if overwrite or resume or not path:
        return
    header = header_of(path)
    ways = ["--overwrite=True to replace it", f"--out_dir={shlex.quote(free_name(out_dir))}"]
    if resume is not None and header.get("script") == script and os.path.exists(f"{out_dir}/ckpt.safetensors"):
        step = header.get("step", 0)
        done = step and step == header.get("settings", {}).get("max_iters")
        more = f" --max_iters={2 * step}" if done else ""
        ways.insert(1, f"--resume=True{more} to go on with it")
    ask_to_replace(f"{out_dir} holds {describe(path, header)}", ways)


def ask_to_replace(what: str, ways: list[str]):
    """Ask at a terminal whether the results described by `what` may be replaced. UserError, which names the ways out,
    if the answer is no or nobody can be asked."""
    if sys.stdin and sys.stdin.isatty():
        print(what, flush=True)
        with contextlib.suppress(EOFError):
            if input("replace it? [y/N] ").strip().lower() in ("y", "yes"):
                return
        what = "nothing was replaced"
    raise UserError(f"{what}: give {', '.join(ways[:-1])}, or {ways[-1]}")


def check_maker(path: str, script: str, out_dir: str):
    """UserError if the checkpoint at this path was made by another script than the one that is to resume it."""
    header = header_of(path)
    maker = header.get("script", "an unknown script")
    if maker == script or not header:  # a file that is no checkpoint is refused when it is loaded
        return
    if "resume" not in header.get("settings", {}):
        raise UserError(f"{path} was made by {maker}: it cannot be resumed")
    beside = os.path.join(os.path.dirname(sys.argv[0]), maker)
    command = f"python {shlex.quote(beside if os.path.exists(beside) else maker)}"
    raise UserError(f"{path} was made by {maker}: go on with {command} --out_dir={shlex.quote(out_dir)} --resume=True")


def lock(out_dir: str, script: str):
    """Hold OUT_DIR/run.lock as long as this process lives. UserError, which names the holder, if another one does."""
    path = os.path.abspath(os.path.join(out_dir, "run.lock"))
    if path in locks:
        return
    file = open(path, "a+")
    if not locked(file):
        file.seek(0)
        holder = file.read().strip() or "another process"
        raise UserError(f"{holder} is writing to {out_dir}: wait until it ends, or give another --out_dir")
    locks[path] = file
    file.truncate(0)
    file.write(f"{script} (process {os.getpid()})\n")
    file.flush()


def locked(file) -> bool:
    """Lock an open file against other processes until it is closed. False if another process has locked it."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some file systems have no locks: two runs in one folder go unnoticed there
        pass
    return True


def newest_result(out_dir: str) -> str | None:
    """The path of the checkpoint or adapter in a run's folder that was written last; None where there is none."""
    names = os.listdir(out_dir) if os.path.isdir(out_dir) else []
    names = [name for name in names if re.fullmatch(r"(?!ckpt\.optimizer-).*\.safetensors", name)]
    if not os.path.exists(os.path.join(out_dir, "run.json")):  # it may be a folder for anything
        names = [name for name in names if name.removesuffix(".safetensors") in RESULTS]
    return max((os.path.join(out_dir, name) for name in names), key=os.path.getmtime, default=None)


def header_of(path: str) -> dict:
    """What the header of a checkpoint says of the run that made it; {} if the file is no checkpoint of ours."""
    try:
        with safe_open(path, "numpy") as file:
            header = json.loads((file.metadata() or {}).get("tinygpt", "null"))
    except (SafetensorError, OSError, ValueError):
        return {}
    kinds = {"version": int, "script": str, "step": int, "losses": dict, "settings": dict}
    header = header if isinstance(header, dict) else {}
    return {name: header[name] for name, kind in kinds.items() if isinstance(header.get(name), kind)}


def describe(path: str, header: dict) -> str:
    """A checkpoint in a few words: its file, script, step, loss and date."""
    loss = header.get("losses", {}).get("val")
    facts = [header.get("script"), f"step {header['step']}" if "step" in header else None,
             f"validation loss {loss:.4f}" if isinstance(loss, float) else None,
             datetime.datetime.fromtimestamp(os.path.getmtime(path)).strftime("%Y-%m-%d %H:%M")]
    return f"{os.path.basename(path)} ({', '.join(fact for fact in facts if fact)})"


def free_name(path: str, ending: str = "") -> str:
    """The first of PATH-2, PATH-3, ... that does not exist, numbered before the ending; PATH-7 is numbered as PATH."""
    path = os.path.normpath(path)
    stem = re.sub(r"-\d+$", "", "out" if path in (".", "..", os.sep) else path.removesuffix(ending))
    number = 2
    while os.path.exists(f"{stem}-{number}{ending}"):
        number += 1
    return f"{stem}-{number}{ending}"


# ---- begin -----------------------------------------------------------------------------------------------------------


def start(out_dir: str, script: str, settings: dict, source: dict[str, bytes], step: int = 0):
    """Make the folder, lock it, keep the source and write run.json. step: where a resumed run goes on; 0: a new run."""
    os.makedirs(out_dir, exist_ok=True)
    lock(out_dir, script)
    path = newest_result(out_dir)
    if path and allowed.get(out_dir) != (path, os.path.getmtime(path)):
        raise UserError(f"{out_dir} has got results of another run since this one began: give another --out_dir")
    for name in os.listdir(out_dir):
        if re.fullmatch(r".+\.safetensors\.tmp\d+|(loss|experts)\.(csv|png)\.tmp\d*", name):  # of a killed run
            os.remove(os.path.join(out_dir, name))
    path = os.path.join(out_dir, "run.json")
    before = {}
    with contextlib.suppress(OSError, ValueError), open(path) as file:
        before = json.load(file)
    if not step and os.path.exists(os.path.join(out_dir, "source", before.get("script", "none"))):  # of another run
        for name in os.listdir(out_dir):
            if re.fullmatch(r"source(-\d+)*", name):
                shutil.rmtree(os.path.join(out_dir, name))
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    facts = {"commit": git_commit(), "arguments": sys.argv[1:], "settings": settings, "script": script,
             "started": before.get("started", now) if step else now}
    with open(f"{path}.tmp", "w") as file:
        json.dump(facts, file, indent=1)
    os.replace(f"{path}.tmp", path)
    keep_source(out_dir, source, step)


def read_source(script: str) -> dict[str, bytes]:
    """The files of a script and of all modules that it has imported from its own folder or from ours, by name."""
    folders = {os.path.dirname(os.path.abspath(path)) for path in (script, __file__)}
    files = [getattr(module, "__file__", None) for module in [*sys.modules.values()]]  # None: built into Python
    paths = {os.path.abspath(path) for path in (*files, script) if path}
    paths = {path for path in paths if os.path.dirname(path) in folders}
    source = {}
    for path in sorted(paths):
        with open(path, "rb") as file:
            source[os.path.basename(path)] = file.read()
    return source


def keep_source(out_dir: str, source: dict[str, bytes], step: int):
    """Write the source to OUT_DIR/source, or after a change to a new folder OUT_DIR/source-STEP."""
    kept = [name for name in os.listdir(out_dir) if re.fullmatch(r"source(-\d+)*", name)]
    kept.sort(key=lambda name: [int(number) for number in name.split("-")[1:]])
    if kept and source == read_folder(os.path.join(out_dir, kept[-1])):
        return
    stem = f"source-{step}" if step else "source"
    name, number = stem, 2
    while name in kept:  # it has changed again since it was resumed at this step before
        name, number = f"{stem}-{number}", number + 1
    temporary = os.path.join(out_dir, "source.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    os.mkdir(temporary)
    for file_name, content in source.items():
        with open(os.path.join(temporary, file_name), "wb") as file:
            file.write(content)
    os.replace(temporary, os.path.join(out_dir, name))


def read_folder(folder: str) -> dict[str, bytes]:
    found = {}
    for entry in os.scandir(folder):
        if entry.is_file():
            with open(entry.path, "rb") as file:
                found[entry.name] = file.read()
    return found


def git_commit() -> str:
    """The commit of this checkout, with -dirty where files have changed since; "" where there is no git."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=here, capture_output=True)
        return found.stdout.decode().strip()
    except OSError:
        return ""


# ---- rows: loss.csv, TensorBoard, wandb ------------------------------------------------------------------------------


def write_rows(out_dir: str, columns: list[str], rows: list[dict]):
    """Begin loss.csv with these rows: those of a resumed run up to its checkpoint, or none."""
    path = os.path.join(out_dir, "loss.csv")
    with open(f"{path}.tmp", "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(f"{path}.tmp", path)


def add_row(out_dir: str, columns: list[str], row: dict):
    """Add a row to loss.csv. A column that the row lacks stays empty."""
    with open(os.path.join(out_dir, "loss.csv"), "a", newline="") as file:
        csv.DictWriter(file, columns, restval="").writerow(row)


def check_log(log: str):
    """UserError unless --log names a package that is installed, or none."""
    packages = {"tensorboard": "tensorboardX", "wandb": "wandb"}
    if log and log not in packages:
        raise UserError(f"log={log!r} is not one of {', '.join(packages)}")
    if log and not importlib.util.find_spec(packages[log]):
        raise UserError(f"log={log} needs a package that is not installed: pip install {packages[log]}")


def log_to(log: str, out_dir: str, settings: dict, step: int = 0):
    """A function that sends a row, a dict with "step", to OUT_DIR/tensorboard (shown by `tensorboard --logdir=OUT_DIR`)
    or to wandb: by default offline, to OUT_DIR/wandb, and to its server if WANDB_MODE=online is set. step: where a
    resumed run goes on; 0: a new run. With log="" the function does nothing."""
    if log == "tensorboard":
        from tensorboardX import SummaryWriter
        folder = os.path.join(out_dir, "tensorboard")
        os.makedirs(folder, exist_ok=True)
        for name in os.listdir(folder):
            if not step and name.startswith("events.out.tfevents"):  # of a run that this one replaces
                os.remove(os.path.join(folder, name))
        writer = SummaryWriter(folder, purge_step=step + 1 if step else None, flush_secs=5, filename_suffix=f".{step}")

        def send(row: dict):
            for name, value in row.items():
                if name != "step":
                    writer.add_scalar(name, value, row["step"])
    elif log == "wandb":
        import wandb
        run = wandb.init(project="tinygpt", name=os.path.basename(os.path.abspath(out_dir)), dir=out_dir,
                         config=settings, mode=os.environ.get("WANDB_MODE", "offline"))

        def send(row: dict):
            run.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])
    else:
        def send(row: dict):
            pass
    return send


if __name__ == "__main__":
    print("run_folder.py has no command of its own: run train.py, which uses it", file=sys.stderr)
    sys.exit(2)
