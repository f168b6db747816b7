"""Tasks whose answers code can check: problems made from a seed, or from a file, for sft.py and grpo.py.

    python tasks.py sort sort.jsonl --n=3
    sort.jsonl: 3 problems, sort, difficulty 6, of the training side
    sort 929901 -> 012999
    sort 688887 -> 678888
    sort 006718 -> 001678

    python tasks.py addition sums.jsonl --n=500 --difficulty=2-3 --held_out=True

The file has a row {"prompt", "response", "task", "difficulty"} for each problem, which sft.py and grpo.py read. grpo.py
also makes problems itself, with --task=sort.

    task               prompt                   answer           difficulty
    copy               copy kqzabd              kqzabd           letters (6)
    reverse            reverse kqzabd           dbazqk           letters (6)
    sort               sort 583021              012358           digits (6)
    count              count a in abcaab        3                letters of the word (6)
    addition           123+456=                 579              digits of each number (3)
    addition_reversed  reverse 123+456          975              digits of each number (3); the ones come first
    formatted          123+456 in <a></a>       <a>579</a>       digits of each number (2)
    countdown          make 46 of 3 7 25        25+3*7           numbers (3), each of which is used once

Two scores are given to an answer: right, 1 or 0, and partial, from 0 to 1. Partial is the share of the characters that
are right at their places; for count 1 / (1 + the error); for formatted 1/2 for the marks, and 1/2 times that share of
what is between them; for countdown 1/4 for an expression, 1/2 if it uses each number once, 1 if it has the value, too.
Blanks around an answer do not matter.

A tenth of the problems are held out, by their operands: the two numbers of a sum, in whatever order and task; the
digits to sort, in whatever order; a word, also read from its end; the numbers of Countdown, with whatever aim. So no
seed makes a problem for training of operands that are held out.

Problems of one's own: a jsonl of rows with "prompt" and either "pattern", a regular expression that the whole answer
must match, or "answer" (or "response", "completion"), the text that it must be. A Python file with a function
reward(prompt, answer) -> float can take the place of these scores. Such a file is run as a program: give only one that
you trust. Nothing in a checkpoint is ever run.

Reversed sums: Lee et al. 2023 (2307.03381). Countdown as a task for rewards: Pan et al. 2025 (TinyZero).
"""
import ast
import json
import math
import operator
import os
import re
import runpy
import shlex
import sys
import traceback
import zlib
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np

import run_folder
from config import UserError, nearest, overrides
from draw import check_folder, write_whole
from rows import read_rows

# problems
task = "sort"           # copy | reverse | sort | count | addition | addition_reversed | formatted | countdown
out = ""                # the file to write; "": TASK.jsonl
n = 1000                # problems, all different
difficulty = ""         # of the problems, a number or a range such as 3-6; "": the task's own
held_out = False        # problems of the tenth that is held out, not of the others
seed = 1                # of the problems
overwrite = False       # replace the file without asking

settings = overrides(globals(), "task", "out")


class Problem(NamedTuple):
    prompt: str
    answer: str      # a right one; of the task "pattern" a regular expression
    task: str        # one of TASKS, or of a file "answer", "pattern" or "reward"
    difficulty: int
    operands: str    # by which it is held out or not


# ---- make: (prompt, answer, operands) of a random problem ------------------------------------------------------------

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def word(rng: np.random.Generator, length: int, letters: str) -> str:
    return "".join(letters[i] for i in rng.integers(len(letters), size=length))


def copy(rng: np.random.Generator, difficulty: int) -> tuple[str, str, str]:
    text = word(rng, difficulty, LETTERS)
    return f"copy {text}", text, min(text, text[::-1])


def reverse(rng: np.random.Generator, difficulty: int) -> tuple[str, str, str]:
    text = word(rng, difficulty, LETTERS)
    return f"reverse {text}", text[::-1], min(text, text[::-1])


def sort(rng: np.random.Generator, difficulty: int) -> tuple[str, str, str]:
    digits = word(rng, difficulty, "0123456789")
    return f"sort {digits}", "".join(sorted(digits)), "".join(sorted(digits))


def count(rng: np.random.Generator, difficulty: int) -> tuple[str, str, str]:
    text = word(rng, difficulty, LETTERS[:4])
    letter = LETTERS[rng.integers(4)]
    return f"count {letter} in {text}", str(text.count(letter)), min(text, text[::-1])


def summands(rng: np.random.Generator, digits: int) -> tuple[int, int, str]:
    """Two numbers of so many digits, and what they are as operands."""
    least = 0 if digits == 1 else 10 ** (digits - 1)
    a, b = (int(x) for x in rng.integers(least, 10 ** digits, size=2))
    return a, b, f"{min(a, b)}+{max(a, b)}"


def addition(rng: np.random.Generator, difficulty: int) -> tuple[str, str, str]:
    a, b, operands = summands(rng, difficulty)
    return f"{a}+{b}=", str(a + b), operands


def addition_reversed(rng: np.random.Generator, difficulty: int) -> tuple[str, str, str]:
    a, b, operands = summands(rng, difficulty)
    return f"reverse {a}+{b}", str(a + b)[::-1], operands


def formatted(rng: np.random.Generator, difficulty: int) -> tuple[str, str, str]:
    a, b, operands = summands(rng, difficulty)
    return f"{a}+{b} in <a></a>", f"<a>{a + b}</a>", operands


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def countdown(rng: np.random.Generator, difficulty: int) -> tuple[str, str, str]:
    """The aim is the value of a random expression, from 1 to 99."""
    numbers = [str(x) for x in rng.integers(1, 26, size=difficulty)]
    parts = [numbers[i] for i in rng.permutation(difficulty)]
    while len(parts) > 1:
        i = int(rng.integers(len(parts) - 1))
        a, b, sign = parts[i], parts[i + 1], "+-*/"[rng.integers(4)]
        parts[i:i + 2] = [f"({a}{sign}{b})"]
    expression = parts[0][1:-1] if difficulty > 1 else parts[0]
    value = value_of(expression)[0]
    if value is None or value.denominator > 1 or not 1 <= value < 100:
        return countdown(rng, difficulty)
    return f"make {value} of {' '.join(numbers)}", expression, " ".join(sorted(numbers))


def value_of(text: str) -> tuple[Fraction | None, list[int]]:
    """The value of an expression of whole numbers, + - * / and brackets, exactly, and the numbers in it. The value is
    None where there is no such expression, or a division by 0."""
    if not re.fullmatch(r"[0-9+\-*/() ]{1,200}", text) or "**" in text or "//" in text:
        return None, []
    numbers = []

    def walk(node) -> Fraction:
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](walk(node.left), walk(node.right))
        numbers.append(node.value)
        return Fraction(node.value)

    try:
        return walk(ast.parse(text.strip(), mode="eval").body), numbers
    except (SyntaxError, ValueError, AttributeError, TypeError, ZeroDivisionError, RecursionError, MemoryError):
        return None, numbers


TASKS = {"copy": (copy, "6"), "reverse": (reverse, "6"), "sort": (sort, "6"), "count": (count, "6"),
         "addition": (addition, "3"), "addition_reversed": (addition_reversed, "3"), "formatted": (formatted, "2"),
         "countdown": (countdown, "3")}  # with the usual difficulty
MOST = {"countdown": 6}  # difficulty; of the other tasks 100


def is_held_out(operands: str) -> bool:
    """Whether problems of these operands are held out: a tenth are, whatever the seed."""
    return zlib.crc32(operands.encode()) % 10 == 0


def difficulties(task: str, text: str = "") -> range:
    """Of a task: those that a text such as "3-6" names; "": the usual one. UserError for an unknown task or text."""
    if task not in TASKS:
        raise UserError(f"task={task!r}: {nearest(task, [*TASKS])}")
    found = re.fullmatch(r"(\d{1,3})(?:-(\d{1,3}))?", text or TASKS[task][1])
    least, most, limit = int(found[1]) if found else 0, int(found[2] or found[1]) if found else 0, MOST.get(task, 100)
    if not 1 <= least <= most <= limit or task == "countdown" and least < 2:
        raise UserError(f"difficulty={text!r}: give a number or a range such as 3-6, "
                        f"from {2 if task == 'countdown' else 1} to {limit}")
    return range(least, most + 1)


def problem(task: str, levels: range, seed: int, number: int, held_out: bool = False) -> Problem:
    """A random problem of a task, with a difficulty among these. It depends on the seed and the number alone."""
    rng = np.random.default_rng([seed, number, zlib.crc32(task.encode()), held_out])
    for _ in range(1000):
        level = int(rng.choice(levels))
        prompt, answer, operands = TASKS[task][0](rng, level)
        if is_held_out(operands) == held_out:
            return Problem(prompt, answer, task, level, operands)
    raise UserError(f"{task} of difficulty {levels[0]} has no problem that is {'' if held_out else 'not '}held out: "
                    "give another difficulty")


def problems(task: str, levels: range, seed: int, n: int, held_out: bool = False) -> list[Problem]:
    """The first n different problems of a seed."""
    found, number, latest = {}, 0, 0
    while len(found) < n:
        new, number = problem(task, levels, seed, number, held_out), number + 1
        if new.prompt not in found:
            found[new.prompt], latest = new, number
        if number - latest > 1000 + 10 * len(found):  # nothing but known ones for so long
            raise UserError(f"{task} of difficulty {levels[0]} to {levels[-1]} has not so many problems: {len(found)} "
                            f"were found on this side, not {n}")
    return [*found.values()]


# ---- check: an answer's scores ---------------------------------------------------------------------------------------


def alike(text: str, answer: str) -> float:
    """The share of characters that are equal at their places, of those of the longer text; 1 for two empty ones."""
    return sum(a == b for a, b in zip(text, answer, strict=False)) / max(len(text), len(answer), 1) if answer else (
        float(not text))


def check(problem: Problem, text: str) -> tuple[float, float]:
    """(right, partial) of an answer, both from 0 to 1: see this file's docstring."""
    text, answer = text.strip(), problem.answer
    if problem.task == "pattern":
        right = float(bool(re.fullmatch(answer, text)))
        return right, right
    if problem.task == "countdown":
        return check_countdown(problem, text)
    right = float(text == answer)
    if problem.task == "count":
        return right, 1 / (1 + abs(int(text) - int(answer))) if re.fullmatch(r"\d{1,9}", text, re.ASCII) else 0.0
    if problem.task == "formatted":
        inside = re.fullmatch(r"<a>(.*)</a>", text)
        return right, (1 + alike(inside[1], answer[3:-4])) / 2 if inside else 0.0
    return right, alike(text, answer)


def check_countdown(problem: Problem, text: str) -> tuple[float, float]:
    aim, numbers = re.fullmatch(r"make (\d+) of (.*)", problem.prompt).groups()
    value, used = value_of(text)
    if value is None:
        return 0.0, 0.0
    if sorted(used) != sorted(map(int, numbers.split())):
        return 0.0, 0.25
    right = float(value == int(aim))
    return right, max(0.5, right)


# ---- problems and rewards of a user's own ----------------------------------------------------------------------------


def read_problems(path: str, answers: bool = True) -> list[Problem]:
    """The problems of a file: rows with "prompt", and "pattern", "answer", "response" or "completion". A row of a task
    of this file is checked as the task is. UserError: a row has none of them, or a pattern is no regular expression.
    answers=False: a row needs only the prompt, as a function reward() is the check."""
    found = []
    for where, row in read_rows(path):
        if isinstance(row, ValueError):
            raise UserError(f"{where}: {row}")
        kind = next((name for name in ("pattern", "answer", "response", "completion") if name in row), None)
        if not answers and isinstance(row.get("prompt"), str):
            found.append(Problem(row["prompt"], "", "reward", 0, row["prompt"]))
            continue
        if kind is None or not isinstance(row.get("prompt"), str) or not isinstance(row[kind], str):
            raise UserError(f"{where}: it needs \"prompt\" and one of \"pattern\", \"answer\", \"response\", "
                            "\"completion\", both texts")
        if kind == "pattern":
            try:
                re.compile(row[kind])
            except re.error as error:
                raise UserError(f"{where}: the pattern is no regular expression ({error})") from error
        name = "pattern" if kind == "pattern" else row["task"] if row.get("task") in [*TASKS] else "answer"
        if name == "countdown" and not re.fullmatch(r"make \d{1,9} of \d{1,9}( \d{1,9})*", row["prompt"]):
            raise UserError(f"{where}: it is no prompt of the task countdown, such as \"make 46 of 3 7 25\"")
        if name == "count" and not re.fullmatch(r"\d{1,9}", row[kind], re.ASCII):
            raise UserError(f"{where}: an answer of the task count is a number")
        level = row.get("difficulty")
        answer = row[kind] if kind == "pattern" else row[kind].strip()
        found.append(Problem(row["prompt"], answer, name, level if type(level) is int else 0, row["prompt"]))
    if not found:
        raise UserError(f"{path} is empty: it must hold problems")
    return found


def load_reward(path: str) -> Callable[[str, str], float]:
    """The function reward(prompt, answer) of a Python file, which is run. UserError: it has none, or raises. What is
    returned raises UserError, with the answer, where the function raises or gives no finite number."""
    if not os.path.isfile(path):
        raise UserError(f"there is no file {path}: give a Python file with a function reward(prompt, answer)")
    try:
        function = runpy.run_path(path).get("reward")
    except (Exception, SystemExit) as error:  # whatever a user's file may raise
        raise UserError(f"{path}, line {line_of(error, path)}: {described(error)}") from error
    if not callable(function):
        raise UserError(f"{path} has no function reward(prompt, answer): add one")

    def reward(prompt: str, answer: str) -> float:
        about = f"for the answer {answer!r} to the prompt {prompt!r}"
        try:
            found = function(prompt, answer)
        except (Exception, SystemExit) as error:
            raise UserError(f"{path}, line {line_of(error, path)}: reward() raised {described(error)} {about}"
                            ) from error
        try:
            value = float(found)
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        if not math.isfinite(value):
            raise UserError(f"{path}: reward() gave {found!r}, not a finite number, {about}")
        return value

    return reward


def line_of(error: BaseException, path: str) -> int | str:
    """The line of this file at which an error arose."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return error.lineno or "?"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return lines[-1] if lines else "?"


def described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


# ---- the command -----------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    levels = difficulties(task, difficulty)
    out = out or f"{task}.jsonl"
    if n < 1 or seed < 0:
        raise UserError("n must be 1 or more, and seed 0 or more")
    check_folder(out)
    if os.path.isdir(out):
        raise UserError(f"{out} is a folder: give a file's name")
    if os.path.exists(out) and not overwrite:
        other = shlex.quote(run_folder.free_name(out, os.path.splitext(out)[1]))
        run_folder.ask_to_replace(f"{out} exists", ["--overwrite=True to replace it", f"--out={other}"])
    found = problems(task, levels, seed, n, held_out)
    rows = [{"prompt": one.prompt, "response": one.answer, "task": task, "difficulty": one.difficulty} for one in found]
    write_whole(out, "".join(json.dumps(row) + "\n" for row in rows).encode())
    shown = f"{levels[0]} to {levels[-1]}" if len(levels) > 1 else levels[0]
    print(f"{out}: {n:,} problems, {task}, difficulty {shown}, {'held out' if held_out else 'of the training side'}")
    for one in found[:3]:
        print(f"{one.prompt} -> {one.answer}")
    sys.exit(0)
