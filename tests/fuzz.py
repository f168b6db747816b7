"""Throw arguments and broken files at every script: each must end well, or in one line, and must lose no input.

    python tests/fuzz.py --n=2000 --files=500
    python tests/fuzz.py --only=train.py --first=117 --n=1 --files=0        # one case again, with what it printed

The settings, their types and their choices are read from the scripts' source, so a new script or setting is covered. A
case is a valid command on tiny inputs (BASES, SMALL), of which one to four settings get other values; or such a command
where one input file is spoilt. In some cases the disk is full, or the terminal lacks UTF-8. With --more=True every
valid command is run as it is, and is told to write over each of its inputs, by its name, a link, or a path with "..".

A fault is: an exit status other than 0, 2 and 130; a signal; a message of more or less than one line; a warning of
Python; more memory than MEMORY, if no number asks for it; a temporary file that is left; an input that is changed,
if the command does not say resume or overwrite. A command that works longer than `limit` gets Ctrl-C, and is counted as
slow; one that does not react, or waits without using the processor, is a fault. There is no network.

A process that has imported MLX, but evaluated nothing, forks for every case: this takes 0.1 s instead of 1 s.
"""
import ast
import atexit
import contextlib
import json
import os
import random
import re
import resource
import runpy
import select
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
sys.path[:0] = [str(ROOT), str(TESTS)]

import blas  # noqa: E402

from config import UserError, _comments, given, overrides  # noqa: E402

n = 2000      # lists of arguments
files = 500   # broken files
more = False  # the valid commands themselves, and outputs that are inputs
seed = 0      # of the cases
first = 0     # the number of the first case
only = ""     # scripts, such as train.py, with commas; "": all
jobs = 2      # cases at a time
limit = 6.0   # seconds that a case may work
folder = ""   # for inputs and outputs; "": a temporary folder

settings = overrides(globals())

MEMORY = 3 * 2**30  # bytes

# ---- commands that are valid, on tiny inputs -------------------------------------------------------------------------

SMALL = dict(max_iters=2, eval_interval=1, eval_windows=2, log_interval=1, sample_tokens=4, batch_size=2, block_size=16,
             n_layer=2, n_head=2, n_embd=32, warmup_iters=1, max_new_tokens=4, n=2, rounds=1, epochs=1, samples=2,
             iterations=2, new_tokens=4, patience=1, threads=1, train_bytes=2000, vocab_size=300, open="False", port=0,
             max_tokens=300, draws=2, rhos="0.5, 0.1", tokenizer="byte", group_size=32, length=16, only="tokenize",
             page="page.md", checkpoint="model.safetensors", data="text.txt", compile="False")
ARCHITECTURE = dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size"))  # None: not given
ROWS = dict(block_size=100)  # tokens: a conversation of bytes is longer than SMALL's windows
NO_TEXT = dict.fromkeys(("data", "samples", "block_size"))
SMALL_STEP = dict(data=None, block_size=None, prompts=2, group=2, eval_problems=2, pass_k=2, max_new_tokens=4)
GO_ON = dict(resume="True", checkpoint=None, data=None, batch_size=None, block_size=None)
BASES = {
    "train.py": [dict(data="tokens"), dict(),
                 dict(ARCHITECTURE, data="tokens", init="model.safetensors", tokenizer=None, vocab_size=None),
                 dict(ARCHITECTURE, data="tokens", out_dir="run", resume="True", max_iters=3)],
    "sft.py": [dict(ROWS, data="messages.jsonl"), dict(ROWS, data="alpaca.json", kind="full"),
               dict(ROWS, data="rows.csv"), dict(ROWS, data="rows.parquet"), dict(GO_ON, out_dir="sft", epochs=2)],
    "dpo.py": [dict(ROWS, data="pairs.jsonl"), dict(ROWS, data="labelled.jsonl", loss="kto"),
               dict(ROWS, data="pairs.jsonl", checkpoint="sft/sft.safetensors"),
               dict(GO_ON, out_dir="dpo", epochs=2)],
    "grpo.py": [dict(SMALL_STEP, task="copy"), dict(SMALL_STEP, data="own.jsonl"),
                dict(GO_ON, out_dir="grpo", max_iters=3, max_new_tokens=None)],
    "ppo.py": [dict(SMALL_STEP, task="copy"), dict(SMALL_STEP, data="own.jsonl")],
    "reward.py": [dict(ROWS, data="pairs.jsonl"), dict(ROWS, data="pairs.jsonl", checkpoint="sft/sft.safetensors")],
    "distill.py": [dict(teacher="model.safetensors"), dict(logits="model.logits", block_size=None),
                   dict(teacher="model.safetensors", store="new.logits"),
                   dict(GO_ON | ARCHITECTURE, out_dir="distill", max_iters=3, eval_windows=None)],
    "diffusion.py": [dict(checkpoint=None, page=None), dict(checkpoint=None, page=None, init="model.safetensors",
                                                            **ARCHITECTURE)],
    "magpie.py": [dict(ROWS, checkpoint="dpo/dpo.safetensors")],
    "sample.py": [dict(prompt="def f"), dict(checkpoint="dpo/dpo.safetensors", prompt="Hello")],
    "eval.py": [dict(), dict(data="tokens"), dict(adapter="sft/sft.safetensors")],
    "merge.py": [dict(checkpoint="dpo/dpo.safetensors")],
    "data.py": [dict(source="text.txt"), dict(source="texts"), dict(source="rows.csv"), dict(source="rows.parquet"),
                dict(source="pairs.jsonl", field="prompt"),
                dict(source="alpaca.json", tokenizer="model.safetensors")],
    "compare.py": [dict(runs="run")],
    "hf_reader.py": [dict(source="hf", out="new.safetensors"), dict(source="model.safetensors", export="new")],
    "awq_reader.py": [dict(source="awq", out="new.safetensors")],
    "gptq_reader.py": [dict(source="gptq", out="new.safetensors")],
    "compressed_reader.py": [dict(source="compressed", out="new.safetensors")],
    "gguf_reader.py": [dict(source="model.gguf", out="new.safetensors"),
                       dict(source="model.safetensors", export="new.gguf")],
    "laser.py": [dict(matrix="mlp.up", rhos=None), dict(search="True", rhos="0.5", samples=1)],
    "tuned_lens.py": [dict(), dict(apply="model.lenses", prompt="def f", checkpoint="./model.safetensors"),
                      dict(apply="model.tgtl", prompt="def f", checkpoint="./model.safetensors")],
    "patching.py": [dict(NO_TEXT, clean="def f", corrupt="def g", target="x", draws=None),
                    dict(mode="ablate", draws=None),
                    dict(NO_TEXT, mode="trace", clean="def f", subject="f", target="x")],
    "paths.py": [dict(clean="def f", corrupt="def g", target="x")],
    "attention_maps.py": [dict(prompt="def f")],
    "heads.py": [dict(length=5, confirm="True"), dict(head="1.0", prompt="def f", length=None, draws=None)],
    "playground.py": [dict(folder="run")],
    "runs/architectures.py": [dict(out="architectures")],
    "runs/compress.py": [dict(out="compress", picture="compress/new.png")],
    "runs/finetune.py": [dict(out_dir="finetune")],
    "runs/smollm2.py": [dict(folder="smollm2", prompt="Hello")],
    "runs/smollm2_series.py": [dict(out="smollm2")],
    "runs/tasks.py": [dict(source="tasks.jsonl")],
}
SHORT = {"bench.py": 2.0, "bench_page.py": 1.5, "playground.py": 1.5}  # limits for what takes longer, or never ends


def settings_of(path: Path) -> tuple[dict, list]:
    """The settings of a script, {name: (type, comment)}, and the names of its positional arguments; ({}, []) for a
    module that is no script."""
    found, comments = {}, _comments(str(path))
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            name, value = statement.targets[0].id, statement.value
            if isinstance(value, ast.Call) and getattr(value.func, "id", "") == "overrides":
                return found, [argument.value for argument in value.args[1:]]
            default = () if isinstance(value, ast.Tuple) else getattr(value, "value", None)
            if isinstance(value, ast.UnaryOp):  # `not ON_CPU`, or a negative number
                default = False if isinstance(value.op, ast.Not) else -1
            if name.islower() and name[0] != "_" and type(default) in (bool, int, float, str, tuple):
                found[name] = type(default), comments.get(name, ("", ""))[1]
    return {}, []


SCRIPTS = {str(path.relative_to(ROOT)): found for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("runs/*.py")])
           if (found := settings_of(path))[0]}


def bases(script: str) -> list[dict[str, str]]:
    """The valid commands of a script: values by setting."""
    known = SCRIPTS[script][0]
    return [{name: str(value) for name, value in (SMALL | own).items() if name in known and value is not None}
            for own in BASES.get(script, [{}])]


def base(script: str, rng: random.Random) -> dict[str, str]:
    """One of the valid commands, perhaps with another model."""
    found = rng.choice(bases(script))
    if found.get("checkpoint") == "model.safetensors":
        found["checkpoint"] = rng.choice(["model.safetensors"] * 4 + ["gpt2.safetensors", "variant.safetensors"])
    return found


def make_world(world: Path):
    """The tiny inputs of all commands."""
    def run(script: str, *arguments):
        status, _, err, *_ = run_case(world, script, list(arguments))
        assert status == 0, (script, arguments, err)

    def forked(function):  # for what evaluates arrays or starts threads
        if not (pid := os.fork()):
            sys.stdout = open(os.devnull, "w")
            function()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0

    def lines(name: str, make):
        (world / name).write_text("".join(json.dumps(make(i)) + "\n" for i in range(12)))

    def parquet():
        import pyarrow
        import pyarrow.parquet
        rows = [{"prompt": f"Say {i}.", "response": f"{i}", "text": f"text {i}"} for i in range(12)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), world / "rows.parquet")

    text = (ROOT / "muon.py").read_text(encoding="utf-8")
    (world / "text.txt").write_text(text)
    (world / "texts").mkdir()
    for i in range(12):
        (world / "texts" / f"{i}.txt").write_text(text[300 * i:300 * i + 400])
    lines("messages.jsonl", lambda i: {"messages": [{"role": "user", "content": f"Say {i}."},
                                                    {"role": "assistant", "content": f"It is {i}."}]})
    lines("pairs.jsonl", lambda i: {"prompt": f"Say {i}.", "chosen": f"{i}", "rejected": "no"})
    lines("labelled.jsonl", lambda i: {"prompt": f"Say {i}.", "completion": "yes", "label": i % 2 == 0})
    lines("own.jsonl", lambda i: {"prompt": f"Say {i}.", "pattern": "[0-9]+"})
    lines("tasks.jsonl", lambda i: {"instruction": f"do {i}", "instances": [{"input": "", "output": "it is done now"}]})
    alpaca = [{"instruction": f"Say {i}.", "output": f"{i}", "text": f"text {i}"} for i in range(12)]
    (world / "alpaca.json").write_text(json.dumps(alpaca))
    (world / "rows.csv").write_text("prompt,response,text\n" + "".join(f"Say {i}.,{i},text {i}\n" for i in range(12)))
    forked(parquet)
    (world / "photo.png").write_bytes(b"not drawn here")
    (world / "photo.html").write_text("not drawn here")
    (world / "page.md").write_text("".join(f"<!-- runs/{name}.sh writes this table -->\n<!-- end of the table -->\n"
                                           for name in ("architectures", "compress", "smollm2_series")))
    train = [f"--{name}={value}" for name, value in SMALL.items() if name in SCRIPTS["train.py"][0]]
    run("data.py", "text.txt", "--tokenizer=byte", "--out=tokens")
    for name, *more in (["model", "--mlp=swiglu", "--qk_norm=False"],
                        ["gpt2", "--pos=learned", "--norm=layer", "--mlp=gelu", "--bias=True", "--qk_norm=False"],
                        ["variant", "--n_expert=4", "--mod=topk", "--sliding_window=8", "--yoco=True",
                         "--diff_attn=True", "--value_residual=True", "--softcap=15"]):
        run("train.py", *train, "--n_embd=64", "--block_size=128", "--data=tokens", f"--out_dir={name}", *more)
        shutil.copy(world / name / "ckpt.safetensors", world / f"{name}.safetensors")
    (world / "model").rename(world / "run")
    shutil.rmtree(world / "gpt2")
    shutil.rmtree(world / "variant")
    run("sft.py", "model.safetensors", "messages.jsonl", "--out_dir=sft", "--epochs=1", "--samples=0")
    run("dpo.py", "sft/sft.safetensors", "pairs.jsonl", "--out_dir=dpo", "--epochs=1")
    run("grpo.py", "model.safetensors", "copy", "--out_dir=grpo", "--max_iters=1", "--prompts=2", "--eval_problems=2",
        "--samples=0")
    run("distill.py", "model.safetensors", "text.txt", "--out_dir=distill", "--max_iters=1", "--eval_windows=2")
    run("distill.py", "model.safetensors", "text.txt", "--store=model.logits")
    run("hqq.py", "model.safetensors", "--group_size=32", "--out=packed.safetensors")
    run("tuned_lens.py", "model.safetensors", "--data=text.txt", "--max_iters=1", "--eval_windows=1")
    run("hf_reader.py", "model.safetensors", "--export=hf")
    run("gguf_reader.py", "model.safetensors", "--export=model.gguf")
    for name in ("awq", "gptq", "compressed"):
        forked(lambda name=name: __import__(f"test_{name}_reader").folder_of(world)[0].rename(world / name))
    (world / "dense.safetensors").unlink()
    for name in ("architectures/baseline-1", "compress/base", "finetune/base", "finetune/lora", "smollm2/sft"):
        shutil.copytree(world / "run", world / name)
        (world / name / "done").touch()
        (world / name / "seconds").write_text("3\n")
    shutil.copy(world / "packed.safetensors", world / "compress" / "hqq-4.safetensors")
    rows = []
    for name in ("dense", "hqq-8", "hqq-4", "hqq-3", "gptq-4", "awq-4", "sft", "lens", "patching"):
        (world / "smollm2" / f"{name}.cost").write_text("60 0.1\n")
        shutil.copy(world / "packed.safetensors", world / "smollm2" / f"{name}.safetensors")
        rows.append(f"perplexity 20.5 and accuracy 40.5% | {name}.safetensors, 1\n")
    (world / "smollm2" / "perplexity.txt").write_text("".join(rows))
    (world / "smollm2" / "lens.txt").write_text("embedding  2.5 1.5 \n")
    shutil.copy(world / "model.safetensors", world / "smollm2" / "smollm2.safetensors")
    (world / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf").touch()  # where both are, nothing is fetched
    for path in world.rglob("*"):
        if path.suffix in (".png", ".html") and path.stem != "photo" or path.name == "run.lock":
            path.unlink()


# ---- arguments -------------------------------------------------------------------------------------------------------

FAIR = ["0", "1", "2", "3", "5", "0.1", "0.5", "8", "16", "100"]
NUMBERS = ["0", "1", "-1", "2", "3", "7", "0.5", "-0.5", "1e-30", "1e30", "1e400", "1000000", str(2**31),
           str(2**32), str(2**62), str(2**63), str(-2**63 - 1), "nan", "inf", "-inf", "", "x", "1_0", " 1", "0x10", "١"]
TEXTS = ["", " ", "x", "-", "a,b", "a=b", "1:2, 3:4", "4, mlp=3", "\n", "two\nlines", "é▌\u2028", "\udcff", "'\"$(",
         "x" * 2000, "none", "0.5", "nan", "/", ".", "..", "~", "/dev/null", "missing/file", "*.txt", "[", "(", "\\",
         "new", "new.safetensors", "new.png", "new.lenses", "new.gguf", "new.jsonl", "{}", "<|endoftext|>", "é.txt"]
BOOLS = ["True", "False", "True", "False", "true", "1", "", "x"]


def value(kind: type, comment: str, inputs: list[str], rng: random.Random) -> str:
    """Something for a setting: one of its choices, an input, or nonsense."""
    choices = re.findall(r"[\w.-]+", comment) if "|" in comment else []
    if kind is bool:
        return rng.choice(BOOLS)
    if kind in (int, float):
        return rng.choice(rng.choice([[choice for choice in choices if choice[:1].isdigit()] or FAIR, FAIR, NUMBERS]))
    return rng.choice(rng.choice([choices] * 5 + [inputs, TEXTS] if choices else [inputs, inputs, TEXTS]))


def arguments(script: str, inputs: list[str], rng: random.Random) -> list[str]:
    known, positional = SCRIPTS[script]
    command = base(script, rng)
    if rng.random() < 0.1:
        command.pop(rng.choice([*command] or [""]), None)
    changed = [rng.choice([*known]) for _ in range(rng.randrange(1, 5))]
    for name in changed:
        command[name] = value(*known[name], inputs, rng)
    found, odd = [f"--{name}={text}" for name, text in command.items()], rng.random()
    if odd < 0.05:
        found.append(rng.choice(["--nothing=1", "--", "--=", "-x", f"--{rng.choice([*known])}", "--help=1", "", "-",
                                 "\udcff", "--help"]))
    elif odd < 0.15:  # a setting twice
        found.append(f"--{rng.choice(changed)}={rng.choice(NUMBERS + TEXTS)}")
    elif odd < 0.3 and positional:
        found = [command.pop(name) for name in positional if name in command]
        found += [f"--{name}={text}" for name, text in command.items()]
    return found


def others(world: Path) -> list[tuple[str, list[str], str]]:
    """The valid commands of every script, and those that write over one of their inputs, by several names of the file:
    (script, arguments, input or "")."""
    found = []
    for script, (known, _) in SCRIPTS.items():
        for command in bases(script):
            found.append((script, [f"--{name}={text}" for name, text in command.items()], ""))
            command.pop("page", None)
            used = [path for text in command.values() if (world / text).exists() and text
                    for path in [world / text, *(world / text).rglob("*")] if path.is_file()]
            for path in {path.parent: path for path in reversed(used)}.values():  # the first of each folder
                name = str(path.relative_to(world))
                for output in sorted({"out", "export", "picture", "page", "out_dir"} & {*known}):
                    for text in (name, f"texts/../{name}", f"soft{path.suffix}", f"hard{path.suffix}"):
                        text = os.path.dirname(text) or "." if output == "out_dir" else text
                        arguments = [f"--{name}={text}" for name, text in (command | {output: text}).items()]
                        if "overwrite" in known and "resume" not in command:
                            arguments.append("--overwrite=True")
                        found.append((script, arguments, name))
    return [case for i, case in enumerate(found) if case not in found[:i]]


# ---- files -----------------------------------------------------------------------------------------------------------

ABSURD = [None, True, -1, 0, 1, 3, 10**12, 2**63, 1e308, -0.5, "", "x", "../model.safetensors", [], {}, [1], [[]],
          {"a": 1}, "é\ud800", "float32", 10**400]


def spoil_json(node, rng: random.Random):
    """A JSON value with one of its parts removed, or replaced by something absurd."""
    if isinstance(node, (dict, list)) and node and rng.random() < 0.9:
        key = rng.choice([*node]) if isinstance(node, dict) else rng.randrange(len(node))
        if rng.random() < 0.15:
            del node[key]
        else:
            node[key] = spoil_json(node[key], rng)
        return node
    return rng.choice(ABSURD)


def spoil_tensors(raw: bytes, rng: random.Random) -> bytes:
    """A safetensors file with a change in its header, or with numbers that are not finite, or large."""
    size = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8:8 + size]), bytearray(raw[8 + size:])
    ours = header.get("__metadata__", {}).get("tinygpt")
    if ours and rng.random() < 0.6:
        ours = json.loads(ours)
        part = rng.choice([*ours]) if rng.random() < 0.5 else "config"  # most entries are the tokenizer's
        if part in ours:
            ours[part] = spoil_json(ours[part], rng)
        header["__metadata__"]["tinygpt"] = json.dumps(ours)
    elif rng.random() < 0.5:
        header = spoil_json(header, rng)
    else:
        start = rng.randrange(max(1, len(body) // 4)) * 4
        body[start:start + 64] = rng.choice([b"\xff", b"\x00\x00\xc0\x7f", b"\x7f"]) * 64
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def spoil_lines(raw: bytes, as_json: bool, rng: random.Random) -> bytes:
    lines = raw.split(b"\n")
    i = rng.randrange(len(lines))
    junk = [b"", b"x", b"\xff", b"{", b"[" * 3000, b"1" * 5000, lines[i] * 2, lines[i][:-2], b"\0", b'"', b"nan"]
    junk.append(lines[i].replace(b",", rng.choice([b",,", b",x", b""]), 1))
    lines[i] = json.dumps(spoil_json(json.loads(lines[i]), rng)).encode() if as_json and lines[i] else rng.choice(junk)
    return b"\n".join(lines)


def spoil(path: Path, others: list[Path], rng: random.Random) -> str:
    """Spoil a file, by its kind or as any file. Returns what was done."""
    raw, kind = path.read_bytes(), path.suffix
    how = rng.choice(["cut", "flip", "flip", "empty", "zeros", "longer", "swapped", "gone", "folder", "byte", "lines"]
                     + ["kind"] * 9)
    at, bits = rng.randrange(len(raw) + 1), bytearray(raw)
    for _ in range(rng.choice([1, 1, 8]) if raw else 0):  # nine of ten in the first kilobytes, where the settings are
        bits[rng.randrange(len(bits) if rng.random() < 0.1 else min(len(bits), 4000))] ^= 1 << rng.randrange(8)
    bad = {"cut": raw[:at], "flip": bytes(bits), "empty": b"", "zeros": raw[:at] + bytes(len(raw[at:])),
           "longer": raw + rng.choice([b"x", raw]), "byte": raw[:at] + b"\xfe" + raw[at:],
           "swapped": rng.choice(others).read_bytes()}.get(how)
    with contextlib.suppress(ValueError, RecursionError):  # a line that is no JSON, ...
        if how == "lines" or how == "kind" and kind in (".jsonl", ".csv", ".txt", ".md"):
            bad = spoil_lines(raw, how == "kind" and kind == ".jsonl", rng)
        elif how == "kind" and kind in (".safetensors", ".lenses"):
            bad = spoil_tensors(raw, rng)
        elif how == "kind" and kind == ".json":
            bad = json.dumps(spoil_json(json.loads(raw), rng)).encode()
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how != "gone":
        path.write_bytes(bytes(bits) if bad is None else bad)
    return how


# ---- a case ----------------------------------------------------------------------------------------------------------


def contents(place: Path) -> dict[str, bytes | None]:
    """The files of a folder by their names, and None for folders."""
    return {str(path.relative_to(place)): path.read_bytes() if path.is_file() else None for path in place.rglob("*")}


def child(place: Path, script: str, command: list[str], encoding: str, disk: int):
    """What Python does with a script, in a process that has just been forked."""
    os.setsid()
    os.chdir(place)
    resource.setrlimit(resource.RLIMIT_FSIZE, (disk, disk))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number, name in enumerate((os.devnull, f"{place}.out", f"{place}.err")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    errors = "strict" if encoding == "utf-8" else "surrogateescape"  # as Python has it by the locale
    sys.stdin = open(0, encoding=encoding, closefd=False)
    sys.stdout = open(1, "w", encoding=encoding, errors=errors, closefd=False)
    sys.stderr = open(2, "w", encoding=encoding, errors="backslashreplace", closefd=False, buffering=1)
    path = ROOT / script
    sys.argv, sys.path[0], sys.excepthook = [str(path), *command], str(path.parent), sys.__excepthook__
    given.clear()
    atexit._clear()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    socket.socket.connect = socket.socket.connect_ex = None  # no network
    blas._remove_broken_kernels()  # of cases that were stopped while MLX compiled
    status = 0
    try:
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit:
            raise
        except BaseException:
            status = 1
            sys.excepthook(*sys.exc_info())
    except SystemExit as end:
        status = end.code or 0
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)


def run_case(place: Path, script: str, command: list[str], encoding="utf-8", disk=2**28, limit=60.0) -> tuple:
    """Run a command in a folder: (exit status, standard output, standard error, seconds on a processor or waiting for
    one, how it was stopped). encoding: of the terminal; disk: bytes that fit into a file."""
    pid = os.fork()
    if not pid:
        try:
            child(place, script, command, encoding, disk)
        finally:
            os._exit(99)
    handle, poll = os.pidfd_open(pid), select.poll()
    poll.register(handle, select.POLLIN)
    signals, sent = [signal.SIGINT, signal.SIGINT, signal.SIGKILL], 0  # where the first Ctrl-C saves, the second ends
    if script in SHORT:
        signals[1] = 0  # none: a browser must be ended in order
    began, stopped, resident, queued = time.perf_counter(), "", Path(f"/proc/{pid}/statm"), 0.0
    while not poll.poll(50):
        with contextlib.suppress(OSError, IndexError):
            threads = Path(f"/proc/{pid}/task").glob("*/schedstat")  # nanoseconds: on a processor, waiting for one
            queued = max(queued, sum(int(path.read_text().split()[1]) for path in threads) / 1e9)
        with contextlib.suppress(OSError, IndexError):
            if int(resident.read_text().split()[1]) * resource.getpagesize() > MEMORY:
                stopped = "memory"
                os.killpg(pid, signal.SIGKILL)
        if stopped != "memory" and sent < len(signals) and time.perf_counter() - began > limit + (0, 2, 10)[sent]:
            stopped = getattr(signals[sent], "name", stopped)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signals[sent])
            sent += 1
    os.close(handle)
    _, status, usage = os.wait4(pid, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # the processes that it has started
    out, err = (Path(f"{place}.{name}").read_bytes().decode(errors="replace") for name in ("out", "err"))
    return os.waitstatus_to_exitcode(status), out, err, usage.ru_utime + usage.ru_stime + queued, stopped


# lines on standard error that are no error
KNOWN = re.compile("skipped |.* is skipped: |no run of |no more pairs to merge: ")


def fault(script: str, command: list[str], before: dict, after: dict, result: tuple, mine: list = ()) -> str:
    """What is wrong with the end of a command; "" if nothing is. mine: the inputs that it may change."""
    status, out, err, seconds, stopped = result
    told = [line for line in err.splitlines() if line.strip() and not KNOWN.match(line)]
    if "Traceback" in err or "Exception ignored" in err:
        places = re.findall(rf'File "{ROOT}/(?!tests/)(.+)", line (\d+)', err) or [("?", "?")]
        return f"traceback at {':'.join(places[-1])}: {told[-1][:150]}"
    if stopped == "memory":
        return "" if re.search(r"=\d{5,}|e30", " ".join(command)) else f"takes {MEMORY / 2**30:.0f} GiB"
    if stopped == "SIGKILL":
        return "does not react to Ctrl-C"
    if stopped and script not in SHORT and seconds < limit / 4:
        return f"waits: {seconds:.1f} s of the processor"
    if status < 0 and not (stopped and status == -signal.SIGINT):  # by the second Ctrl-C, while Python ended
        return f"signal {-status}"
    if status not in (0, 2, 130, -signal.SIGINT):
        return f"exit status {status}: {err.strip()[-150:]}"
    if status == 2 and len(told) != 1 or "Warning: " in err:
        return f"{len(told)} lines at exit status {status}: {err.strip()[:200]!r}"
    for name, content in before.items():
        announced = re.search(rf"{re.escape(os.path.splitext(name)[0])}\S* is an earlier result", out)
        allowed = any(os.path.normpath(name).startswith(os.path.normpath(place)) for place in mine if place)
        if after.get(name, b"") != content and not announced and not allowed:
            return f"{name} {'is changed' if name in after else 'is gone'}"
    left = [name for name in after.keys() - before.keys() if ".tmp" in name]
    return f"leaves {left[0]}" if left and not stopped else ""


def replaceable(script: str, command: list[str]) -> list[str]:
    """The files and folders that a command is told to change."""
    free = [text for text in command if not text.startswith("--")]
    values = dict(zip(SCRIPTS[script][1], free, strict=False))
    values |= dict(text[2:].partition("=")[::2] for text in command if text.startswith("--"))
    overwrites = "true" in (values.get("resume", "").lower(), values.get("overwrite", "").lower())
    return [values.get(name, "") for name in ("page", *(("out", "out_dir") if overwrites else ()))]


def one(kind: str, number: int, place: Path, before: dict, listed: list) -> tuple[str, str, str]:
    """A case: (command, how it ended, fault). place: a copy of the world, which is restored afterwards."""
    rng, at_start, how, mine = random.Random(f"{seed} {kind} {number}"), before, "", None
    scripts = [script for script in SCRIPTS if not only or script in only.split(",")]
    if kind == "files":
        scripts = [script for script in scripts if script in BASES or "checkpoint" in SCRIPTS[script][0]]
    script = scripts[number % len(scripts)]
    if kind == "arguments":
        command = arguments(script, [name for name in before if name.count("/") < 2], rng)
        for i, text in enumerate(command):
            name, equals, path = text.rpartition("=")
            if path in before and rng.random() < 0.05:  # by another name: one beyond ASCII, or one that is no text
                other = os.fsdecode(rng.choice(["é ▌".encode(), b"\xff'\n"])) + Path(path).suffix
                command[i] = f"{name}{equals}{other}"
                if not (place / other).exists():
                    (place / other).symlink_to(path)
    elif kind == "files":
        values = base(script, rng)
        command = [f"--{name}={text}" for name, text in values.items()]
        used = [path for text in values.values() for path in [place / text, *sorted((place / text).rglob("*"))]
                if text and path.is_file()]
        path = rng.choice(used)
        how = f"{spoil(path, [place / name for name in before if before[name]], rng)} {path.relative_to(place)}"
        at_start = contents(place)
    else:
        script, command, name = listed[number]
        mine = [*before] if "--resume=True" in command else [] if name else None
        if name:
            how = f"over {name}"
            (place / f"soft{Path(name).suffix}").symlink_to(name)
            (place / f"hard{Path(name).suffix}").hardlink_to(place / name)
    pages = [text for text in command if text.startswith("--page=")]
    if "page" in SCRIPTS[script][0] and pages[-1:] in ([], ["--page="]):
        command = [*command, "--page=page.md"]  # by default they write to docs/ of this checkout
    result = run_case(place, script, command, rng.choice(["utf-8"] * 3 + ["ascii"]),
                      rng.choice([2**28] * 6 + [3000, 100_000] * (kind != "more" and script not in SHORT)),
                      SHORT.get(script, limit))
    after = contents(place)
    if kind == "more" and not name and result[0] and script not in (*SHORT, "magpie.py"):  # no tiny model passes there
        return f"python {script} {shlex.join(command)}", f"status {result[0]}", f"a valid command fails: {result[2]}"
    wrong = fault(script, command, at_start, after, result, replaceable(script, command) if mine is None else mine)
    for name in sorted(after.keys() | before.keys(), reverse=True):
        if name not in before or before[name] != after.get(name, b""):
            path = place / name
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    for name, content in before.items():
        (place / name if content is None else (place / name).parent).mkdir(parents=True, exist_ok=True)
        if content is not None and not (place / name).exists():
            (place / name).write_bytes(content)
    if n + files == 1:
        print(result[1], result[2], sep="\n")
    end = f"status {result[0]}"
    if result[4] and not wrong and script not in SHORT:
        end = "too large for the memory" if result[4] == "memory" else "slow"
    return f"python {script} {shlex.join(command)}" + (f"   # {how}" if how else ""), end, wrong


# ---- run -------------------------------------------------------------------------------------------------------------


def main(place: Path):
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:  # the scripts are not to know of tests
        del os.environ[name]
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "BROWSER": "true",
                   "MPLBACKEND": "agg"}
    modules = [path.stem for path in sorted(ROOT.glob("*.py")) if path.name not in SCRIPTS and path.stem != "config"]
    for name in [*modules, "matplotlib.figure", "matplotlib.backends.backend_agg", "gguf", "tokenizers", "datasets"]:
        with contextlib.suppress(ImportError):
            __import__(name)
    world, began = place / "world", time.perf_counter()
    world.mkdir()
    make_world(world)
    before = contents(world)
    cases = [("arguments", first + i) for i in range(n)] + [("files", first + i) for i in range(files)]
    listed = [case for case in others(world) if not only or case[0] in only.split(",")] if more else []
    cases += [("more", i) for i in range(len(listed))]
    for job in range(jobs):
        if not os.fork():
            shutil.copytree(world, place / f"work{job}")
            with open(place / f"results{job}", "w") as file:
                for case in cases[job::jobs]:
                    file.write(json.dumps([*case, *one(*case, place / f"work{job}", before, listed)]) + "\n")
                    file.flush()
            os._exit(0)
    if any([os.wait()[1] for _ in range(jobs)]):
        raise UserError("a worker of the fuzz itself has failed: see above")
    results = [json.loads(line) for job in range(jobs) for line in open(place / f"results{job}")]
    faults = {}
    for kind, number, command, _, wrong in results:
        if wrong:
            faults.setdefault((command.split()[1], wrong), []).append((kind, number, command))
    for (script, wrong), cases in sorted(faults.items()):
        kind, number, command = min(cases, key=lambda case: len(case[2]))
        print(f"{len(cases)} x {script}: {wrong}\n    {command[:600]}\n    {kind} {number}")
    counts = Counter(case[0] for case in results)
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()) + f" in {time.perf_counter() - began:.0f} s: "
          + ", ".join(f"{count} {end}" for end, count in sorted(Counter(case[3] for case in results).items())))
    print(f"{sum(map(len, faults.values()))} faults of {len(faults)} kinds")
    sys.exit(bool(faults))


if __name__ == "__main__":
    place = Path(folder or tempfile.mkdtemp()).resolve()
    try:
        main(place)
    finally:
        if not folder:
            shutil.rmtree(place, ignore_errors=True)
