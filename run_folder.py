"""The folder of a training run, as train.py, sft.py, dpo.py and scripts copied from them keep it.

    source = run_folder.read_source(__file__)         # the script and its modules, before anybody edits them
    run_folder.check(out_dir, SCRIPT, overwrite, inputs=[data])  # before any work: is the folder free?
    run_folder.start(out_dir, SCRIPT, settings, source)
    stops = run_folder.catch_stops()                  # how often Ctrl-C or SIGTERM has asked the run to stop
    rows, record = run_folder.open_rows(out_dir, COLUMNS, settings)
    record(step=1, train_loss=8.3)                    # adds a row to loss.csv

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
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from config import UserError, given

try:
    import fcntl
except ImportError:  # Windows has no such locks: two runs in one folder go unnoticed there
    fcntl = None

RESULTS = ("ckpt", "best", "sft", "dpo", "grpo", "ppo", "reward", "distill", "diffusion", "resume")
OWN = (r"(loss|experts|calibration)\.(csv|png)|run\.(json|lock)|ckpt\.optimizer-\d+\.safetensors|source(-\d+)*"
       r"|peft|tensorboard|wandb")  # what else a run writes
locks = {}  # open files by path: a lock is held until its file is closed, at the latest when the process ends
allowed = {}  # by folder: the results, and their time, that check() allowed to replace

# ---- may it write there? ---------------------------------------------------------------------------------------------


def check(out_dir: str, script: str, overwrite: bool, resume: bool | None = None, inputs: Iterable[str] = (),
          state: str = "ckpt.safetensors"):
    """UserError if another process writes to this folder, if a run in it may replace one of the `inputs`, or if it
    holds results that a new run would replace: then a user at a terminal is asked first. resume: that setting; None
    where the script has none. inputs: the files that the run reads; a text that is no file's name is passed over.
    state: the file in OUT_DIR that --resume=True needs."""
    if overwrite and resume:
        raise UserError("--overwrite=True begins anew and --resume=True goes on: give one of them")
    for path in inputs:
        if is_own(out_dir, path):
            raise UserError(f"{path} is in {out_dir}, and this run may replace it: give another folder, "
                            f"--out_dir={shlex.quote(free_name(out_dir))}")
    if os.path.exists(os.path.join(out_dir, "run.lock")):
        lock(out_dir, script)
    path = newest_result(out_dir)
    allowed[out_dir] = (path, path and os.path.getmtime(path))
    others = [name for name in ("loss.csv", "run.json") if os.path.exists(os.path.join(out_dir, name))]
    if overwrite or resume or not path and (not others or read_start(out_dir)):
        return
    ways = ["--overwrite=True to replace it", f"--out_dir={shlex.quote(free_name(out_dir))}"]
    if not path:
        ask_to_replace(f"{out_dir} holds {' and '.join(others)}, and not of a run", ways)
        return
    before = header_of(os.path.join(out_dir, state))
    if resume is not None and script == header_of(path).get("script") == before.get("script"):
        step = before.get("step", 0)
        done = step and step == before.get("settings", {}).get("max_iters")
        ways.insert(1, f"--resume=True{f' --max_iters={2 * step}' if done else ''} to go on with it")
    ask_to_replace(f"{out_dir} holds {describe(path)}", ways)


def is_own(out_dir: str, path: str) -> bool:
    """Whether a run in this folder may write or delete the file at this path, which may also be a link to it, or a
    folder of the run."""
    if not os.path.exists(path):
        return False
    names = os.listdir(out_dir) if os.path.isdir(out_dir) else []
    own = [Path(out_dir, name) for name in names if name in results(out_dir) or re.fullmatch(OWN, name)]
    own += [below for folder in own for below in folder.rglob("*")]
    return any(os.path.samefile(path, file) for file in own if file.exists())


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
    """UserError if there is no checkpoint, or other file to resume from, at this path, or if another script than the
    one that is to resume it has made it."""
    if not os.path.exists(path):
        found = newest_result(out_dir)
        there = f"; {out_dir} holds {describe(found)}" if found else ""
        raise UserError(f"there is no checkpoint {path} to go on from{there}: leave out --resume=True")
    header, begun = header_of(path), read_start(out_dir)
    maker, last, started = header.get("script", "an unknown script"), begun.get("script", script), begun.get("started")
    if maker == script == last and started and header.get("started", started) != started:
        raise UserError(f"{path} is of a run that began at {header['started']}; another one began in {out_dir} at "
                        f"{started} and has saved nothing: begin it again with --overwrite=True")
    if maker == script != last:
        raise UserError(f"{path} is of a run before that of {last} in {out_dir}: move the files of {script} into a "
                        "folder of their own, and give it as --out_dir")
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


def results(out_dir: str) -> list[str]:
    """The names of the checkpoints and adapters in a run's folder."""
    names = os.listdir(out_dir) if os.path.isdir(out_dir) else []
    names = [name for name in names if re.fullmatch(r"(?!ckpt\.optimizer-).*\.safetensors", name)]
    if not os.path.exists(os.path.join(out_dir, "run.json")):  # it may be a folder for anything
        names = [name for name in names if name.removesuffix(".safetensors") in RESULTS]
    return names


def newest_result(out_dir: str) -> str | None:
    """The path of the checkpoint or adapter in a run's folder that was written last; None where there is none. The
    state that sft.py and dpo.py resume from counts only where there is no other."""
    paths = [os.path.join(out_dir, name) for name in results(out_dir)]
    models = [path for path in paths if os.path.basename(path) != "resume.safetensors"]
    return max(models or paths, key=os.path.getmtime, default=None)


def read_header(path: str) -> dict:
    """The header of a checkpoint or an adapter; {} for any other file."""
    try:
        with safe_open(path, "numpy") as file:
            header = json.loads((file.metadata() or {}).get("tinygpt", "null"))
    except (SafetensorError, OSError, ValueError, RecursionError):  # the last: JSON that is nested too deeply
        header = None
    return header if isinstance(header, dict) else {}


def header_of(path: str) -> dict:
    """What the header of a checkpoint says of the run that made it, without values of a wrong type."""
    kinds = {"version": int, "script": str, "step": int, "losses": dict, "settings": dict, "started": str}
    header = read_header(path)
    return {name: header[name] for name, kind in kinds.items() if isinstance(header.get(name), kind)}


def describe(path: str) -> str:
    """A checkpoint in a few words: its file, script, step, loss and date."""
    header = header_of(path)
    loss = header.get("losses", {}).get("val")
    facts = [header.get("script"), f"step {header['step']}" if "step" in header else None,
             f"validation loss {loss:.4f}" if isinstance(loss, float) else None,
             datetime.datetime.fromtimestamp(os.path.getmtime(path)).strftime("%Y-%m-%d %H:%M")]
    return f"{os.path.basename(path)} ({', '.join(fact for fact in facts if fact)})"


def old_settings(path: str, header: dict, settings: dict, lasting: Iterable[str],
                 parts: Iterable[str] = ("settings", "step", "tokens", "losses", "rows")) -> dict:
    """The settings of the run whose state this file holds, for --resume=True, except those on the command line.
    UserError if the header lacks one of its parts, or if the command line changes one of the `lasting` settings, which
    the state depends on."""
    kinds = {"settings": dict, "step": int, "tokens": int, "losses": dict, "rows": str, "tokenizer": dict}
    if lacking := [name for name in parts if not isinstance(header.get(name), kinds[name])]:
        raise UserError(f"{path} lacks {', '.join(lacking)} in its header: begin anew with --overwrite=True")
    old = {}
    for name, value in header["settings"].items():
        if name not in settings or name in ("resume", "out_dir", "overwrite"):
            continue
        kind = type(settings[name])
        if (kind, type(value)) in ((tuple, list), (float, int)):  # JSON has no tuples, and JavaScript writes 1.0 as 1
            value = kind(value)
        if type(value) is not kind:
            raise UserError(f"{path} has the setting {name}={value!r}: begin anew with --overwrite=True")
        if name not in given:
            old[name] = value
        elif name in lasting and settings[name] != value:
            raise UserError(f"{name} is {value!r} in {path}: leave it out, or give another --out_dir")
    return old


def free_name(path: str, ending: str = "") -> str:
    """The first of PATH-2, PATH-3, ... that does not exist, numbered before the ending; PATH-7 is numbered as PATH."""
    path = os.path.normpath(path)
    stem = re.sub(r"-\d+$", "", "out" if path in (".", "..", os.sep) else path.removesuffix(ending))
    number = 2
    while os.path.exists(f"{stem}-{number}{ending}"):
        number += 1
    return f"{stem}-{number}{ending}"


def check_settings(settings: dict, resume: bool = False):
    """UserError for settings of train.py, sft.py and dpo.py, of those that the script has, with which no training is
    possible. min_lr is a share of the peak, and refused if it looks like a learning rate, as nanoGPT's 6e-5 does.
    resume: a min_lr that was not given is the checkpoint's own, and stays."""
    for name in ("max_iters", "epochs", "batch_size", "grad_accum", "eval_interval", "eval_windows", "log_interval"):
        if settings.get(name, 1) < 1:
            raise UserError(f"{name}={settings[name]}: it must be 1 or more")
    for name in ("seed", "warmup_iters", "decay_iters", "checkpoint_every", "samples", "sample_tokens", "neftune"):
        if settings.get(name, 0) < 0:
            raise UserError(f"{name}={settings[name]}: it must be 0 or more")
    for name in ("learning_rate", "muon_lr", "weight_decay", "grad_clip"):
        value = settings.get(name, 0.0)
        if not value >= 0 or value == math.inf and name != "grad_clip":
            raise UserError(f"{name}={value}: it must be a number from 0 up")
    for name in ("beta1", "beta2", "dropout"):
        if not 0 <= settings.get(name, 0.0) < 1:
            raise UserError(f"{name}={settings[name]}: it must be from 0 up to 1, and less than 1")
    if not 0 < settings.get("val_share", 0.5) < 1:
        raise UserError(f"val_share={settings['val_share']}: it must be between 0 and 1")
    if not 0 <= settings.get("warmup_share", 0.0) <= 1:
        raise UserError(f"warmup_share={settings['warmup_share']}: it must be from 0 to 1")
    if settings.get("dtype") == "float16":
        raise UserError("dtype=float16 would need loss scaling: take bfloat16, which has float32's range")
    check_log(settings.get("log", ""))
    least, peak = settings.get("min_lr", 0.0), settings.get("learning_rate", 0.0)
    if resume and "min_lr" not in given or least == 0 or 0.01 <= least <= 1:
        return
    rule = f"min_lr={least}: it is a share of the peak, 0 or from 0.01 to 1"
    if 0 < least < peak:
        share = float(f"{least / peak:.3g}")
        todo = f": give --min_lr={share}" if share >= 0.01 else "; the nearest to take is --min_lr=0.01"
        rule += f"; as a rate it is the share {share} of learning_rate={peak}{todo}"
    raise UserError(rule)


# ---- begin -----------------------------------------------------------------------------------------------------------


def start(out_dir: str, script: str, settings: dict, source: dict[str, bytes], step: int = 0, began: str = ""):
    """Make the folder, lock it, keep the source and write run.json. step: where a resumed run goes on; 0: a new run.
    began: when the run that is resumed did, as the header of its checkpoint or state says."""
    os.makedirs(out_dir, exist_ok=True)
    lock(out_dir, script)
    path = newest_result(out_dir)
    if path and allowed.get(out_dir) != (path, os.path.getmtime(path)):
        raise UserError(f"{out_dir} has got results of another run since this one began: give another --out_dir")
    for name in os.listdir(out_dir):
        # what a killed run left
        if re.fullmatch(r".+\.safetensors\.tmp\d+|(loss|experts|calibration)\.(csv|png)\.tmp\d*", name):
            os.remove(os.path.join(out_dir, name))
    path = os.path.join(out_dir, "run.json")
    before = read_start(out_dir)
    if not step and os.path.exists(os.path.join(out_dir, "source", before.get("script", "none"))):  # of another run
        for name in os.listdir(out_dir):
            if re.fullmatch(r"source(-\d+)*", name):
                shutil.rmtree(os.path.join(out_dir, name))
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    facts = {"commit": git_commit(), "arguments": sys.argv[1:], "settings": settings, "script": script,
             "started": began or (before.get("started", now) if step else now)}
    with writing(out_dir, f"{path}.tmp"):
        with open(f"{path}.tmp", "w") as file:
            json.dump(facts, file, indent=1)
        os.replace(f"{path}.tmp", path)
    temporary = os.path.join(out_dir, "source.tmp")
    with writing(out_dir, temporary):
        keep_source(out_dir, source, step, temporary)


def started(out_dir: str) -> str:
    """When the run in this folder began, for the headers of its files: by that a resumed run knows its own ones."""
    return read_start(out_dir).get("started", "")


def read_start(out_dir: str) -> dict:
    """What run.json says of the run that began in this folder; {} where it is missing or not a run's."""
    try:
        with open(os.path.join(out_dir, "run.json"), encoding="utf-8") as file:
            start = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    kinds = {"script": str, "settings": dict, "started": str}
    whole = isinstance(start, dict) and all(isinstance(start.get(name), kind) for name, kind in kinds.items())
    return start if whole else {}


def read_source(script: str) -> dict[str, bytes]:
    """The files of a script and of all modules that it has imported from its own folder or from ours, by name."""
    folders = {os.path.dirname(os.path.abspath(path)) for path in (script, __file__)}
    # None: a module is built into Python. Some name a file that there is not, as torch.classes does.
    files = [getattr(module, "__file__", None) for module in [*sys.modules.values()]]
    paths = {os.path.abspath(path) for path in (*files, script) if path}
    paths = {path for path in paths if os.path.dirname(path) in folders and os.path.isfile(path)}
    return {os.path.basename(path): Path(path).read_bytes() for path in sorted(paths)}


def keep_source(out_dir: str, source: dict[str, bytes], step: int, temporary: str):
    """Write the source to OUT_DIR/source, or after a change to a new folder OUT_DIR/source-STEP; first to the folder
    `temporary`, which is then renamed."""
    kept = [name for name in os.listdir(out_dir) if re.fullmatch(r"source(-\d+)*", name)]
    kept.sort(key=lambda name: [int(number) for number in name.split("-")[1:]])
    if kept:
        last = Path(out_dir, kept[-1])
        if source == {path.name: path.read_bytes() for path in last.iterdir() if path.is_file()}:
            return
    stem = f"source-{step}" if step else "source"  # with a number if it has changed at this step before
    name = next(name for name in (stem, *(f"{stem}-{i + 2}" for i in range(len(kept)))) if name not in kept)
    shutil.rmtree(temporary, ignore_errors=True)
    os.mkdir(temporary)
    for file_name, content in source.items():
        Path(temporary, file_name).write_bytes(content)
    os.replace(temporary, os.path.join(out_dir, name))


def git_commit() -> str:
    """The commit of this checkout, with -dirty where files have changed since; "" where there is no git."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        commit, changed = (subprocess.run(["git", "--no-optional-locks", *command], cwd=here, capture_output=True)
                           for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]))
        return commit.stdout.decode().strip() + "-dirty" * bool(changed.stdout)
    except OSError:
        return ""


# ---- stop ------------------------------------------------------------------------------------------------------------


def catch_stops() -> Callable[[], int]:
    """From here on Ctrl-C (SIGINT) and SIGTERM are counted, so that the script can save before it ends; the second
    Ctrl-C stops at once. The function that is returned gives the number of signals so far."""
    caught = []

    def catch(number, _):
        caught.append(number)
        if len(caught) > 1 and number == signal.SIGINT:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, catch)
    signal.signal(signal.SIGTERM, catch)
    return lambda: len(caught)


# ---- rows: loss.csv, TensorBoard, wandb ------------------------------------------------------------------------------


def open_rows(out_dir: str, columns: list[str], settings: dict, step: int = 0) -> tuple[list[dict], Callable]:
    """Begin loss.csv: (the rows of the run up to this step, none if it is new; a function that adds a row to these, to
    loss.csv and to --log). The function adds the column "seconds": since the run began, without its interruptions."""
    rows = read_rows(out_dir, step, columns) if settings["resume"] else []
    before, began = max((float(row["seconds"]) for row in rows), default=0.0), time.perf_counter()
    write_rows(out_dir, columns, rows)
    send = log_to(settings["log"], out_dir, settings, step)

    def record(**row):
        row["seconds"] = round(before + time.perf_counter() - began, 2)
        rows.append(row)
        add_row(out_dir, columns, row)
        send(row)

    return rows, record


def write_rows(out_dir: str, columns: list[str], rows: list[dict], name: str = "loss.csv"):
    """Begin loss.csv with these rows: those of a resumed run up to its checkpoint, or none."""
    path = os.path.join(out_dir, name)
    with writing(path, f"{path}.tmp"):
        with open(f"{path}.tmp", "w", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(f"{path}.tmp", path)


def add_row(out_dir: str, columns: list[str], row: dict, name: str = "loss.csv"):
    """Add a row to loss.csv. A column that the row lacks stays empty."""
    path = os.path.join(out_dir, name)
    with writing(path), open(path, "a", newline="") as file:
        csv.DictWriter(file, columns, restval="").writerow(row)


@contextlib.contextmanager
def writing(path: str, temporary: str = "") -> Iterator[None]:
    """UserError, which names this path, where a file cannot be written, as on a full disk. Then the file or folder
    `temporary` is removed."""
    try:
        yield
    except OSError as error:
        if os.path.isdir(temporary):
            shutil.rmtree(temporary, ignore_errors=True)
        elif os.path.exists(temporary):
            os.remove(temporary)
        raise UserError(f"cannot write {path}: {error.strerror or error}; the last checkpoint is unharmed") from error


def read_rows(out_dir: str, step: int, columns: Iterable[str], name: str = "loss.csv") -> list[dict[str, str]]:
    """The rows of loss.csv up to the step at which a run goes on: texts of finite numbers, or empty, but not for step
    and seconds. Other lines, as somebody edited the file or a crash cut it, and other columns than these are left out:
    then one line tells so, and the file is kept as loss-2.csv. One line also tells if rows are missing."""
    path = os.path.join(out_dir, name)
    try:
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
            lines = file.read().split("\n")
    except FileNotFoundError:
        print(f"{path} is missing: its rows begin at step {step}", flush=True)
        return []
    names, rows, spoilt, needed = fields_of(lines[0]), [], [], {"step", "seconds"} & {*columns}
    if not needed <= {*names} or len({*names}) < len(names):
        names, spoilt = [], [1]
    for number, line in enumerate(lines[1:], 2):
        fields = fields_of(line) if number < len(lines) else []  # the last line has no end: a crash may have cut it
        row = dict(zip(names, fields, strict=False))
        if 0 < len(fields) == len(names) and all(map(is_number, fields)) and row["step"].isdecimal() and all(
                row[name] for name in needed):
            rows.append(row)
        elif line.strip() and not (rows and int(rows[-1]["step"]) > step):  # later ones are left out anyway
            spoilt.append(number)
    rows, what = [row for row in rows if int(row["step"]) <= step], ""
    if spoilt:
        more = f"and {len(spoilt) - 1} more are no rows" if spoilt[1:] else "is no row"
        what = f"line {spoilt[0]} {more} of a run"
    elif other := [name for name in names if name not in columns]:
        what = f"no run writes the column {other[0]!r}"
    steps = [int(row["step"]) for row in rows] or [0]
    if what:
        kept = free_name(path, ".csv")
        shutil.copyfile(path, kept)
        print(f"{path}: {what}: left out here, and kept in {kept}", flush=True)
    elif step - steps[-1] > max((b - a for a, b in zip(steps, steps[1:], strict=False)), default=step):
        print(f"{path} ends at step {steps[-1]}, before step {step} of the checkpoint: rows are missing", flush=True)
    return rows


def fields_of(line: str) -> list[str]:
    """The fields of one line of a CSV file."""
    try:
        return next(csv.reader([line.rstrip("\r")]), [])
    except csv.Error:  # a field of more than 128 KiB
        return []


def is_number(text: str) -> bool:
    """Whether a field is empty or a finite number."""
    try:
        return math.isfinite(float(text or 0))
    except ValueError:
        return False


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
        return lambda row: [writer.add_scalar(name, row[name], row["step"]) for name in row if name != "step"]
    if log == "wandb":
        import wandb
        run = wandb.init(project="tinygpt", name=os.path.basename(os.path.abspath(out_dir)), dir=out_dir,
                         config=settings, mode=os.environ.get("WANDB_MODE", "offline"))
        return lambda row: run.log({name: row[name] for name in row if name != "step"}, step=row["step"])
    return lambda row: None


if __name__ == "__main__":
    print("run_folder.py has no command of its own: run train.py, which uses it", file=sys.stderr)
    sys.exit(2)
