"""tasks.py: every answer is right by a second computation, wrong ones are told apart, no operands are on both sides."""
import json
import re
from collections import Counter

import numpy as np
import pytest
from conftest import run

import tasks
from config import UserError
from tasks import TASKS, Problem, check, difficulties, load_reward, problem, problems, read_problems

LEVELS = {"countdown": "2-4"}


def of(task: str, n: int = 200, **more) -> list[Problem]:
    return problems(task, difficulties(task, LEVELS.get(task, "1-4")), 7, n, **more)


def solved(prompt: str) -> str:
    """The answer, computed from the prompt alone and in another way."""
    if found := re.fullmatch(r"copy (\w+)", prompt):
        return found[1]
    if found := re.fullmatch(r"reverse ([a-z]+)", prompt):
        return "".join(reversed(found[1]))
    if found := re.fullmatch(r"sort (\d+)", prompt):
        return "".join(map(str, np.sort([int(c) for c in found[1]])))
    if found := re.fullmatch(r"count (\w) in (\w+)", prompt):
        return str(Counter(found[2])[found[1]])
    if found := re.fullmatch(r"(\d+)\+(\d+)=", prompt):
        return str(int(found[1]) + int(found[2]))
    if found := re.fullmatch(r"reverse (\d+)\+(\d+)", prompt):
        return "".join(reversed(str(int(found[1]) + int(found[2]))))
    found = re.fullmatch(r"(\d+)\+(\d+) in <a></a>", prompt)
    return f"<a>{int(found[1]) + int(found[2])}</a>"


@pytest.mark.parametrize("task", TASKS)
def test_answers(task):
    """The answer of a problem is right, one with another character is not, and the partial score lies between."""
    rng = np.random.default_rng(0)
    for one in of(task, 150):
        assert check(one, one.answer) == (1, 1) and check(one, f" {one.answer}\n") == (1, 1)
        if task != "countdown":
            assert one.answer == solved(one.prompt)
        assert check(one, "")[0] == 0
        place = int(rng.integers(len(one.answer)))
        wrong = one.answer[:place] + "!" + one.answer[place + 1:]
        right, partial = check(one, wrong)
        assert right == 0 and 0 <= partial < 1


@pytest.mark.parametrize("task", TASKS)
def test_sides(task):
    """Seeds change the problems, not what is held out; about a tenth of the operands are."""
    sides = []
    for held_out in (False, True):
        found = [one for seed in (1, 2) for one in problems(task, difficulties(task), seed, 150, held_out)]
        assert len({one.prompt for one in found}) > 200  # two seeds have different ones
        assert problems(task, difficulties(task), 1, 150, held_out) == found[:150]
        sides.append({one.operands for one in found})
    assert not sides[0] & sides[1]
    share = np.mean([tasks.is_held_out(TASKS[task][0](np.random.default_rng(i), 3)[2]) for i in range(2000)])
    assert 0.05 < share < 0.16


def test_operands():
    """What is the same problem in another order is on the same side."""
    for task, difficulty, one, twin in (("sort", 2, "sort 31", "sort 13"), ("copy", 2, "copy ab", "copy ba"),
                                        ("addition_reversed", 1, "reverse 3+9", "reverse 9+3")):
        rng, by = np.random.default_rng(0), {}
        for _ in range(8000):
            prompt, _, operands = TASKS[task][0](rng, difficulty)
            by[prompt] = operands
        assert by[one] == by[twin]
    rng, other = np.random.default_rng(1), np.random.default_rng(1)
    assert tasks.addition(rng, 3)[2] == tasks.formatted(other, 3)[2]  # of the same numbers


def test_difficulty():
    assert {len(one.answer) for one in of("sort")} == {1, 2, 3, 4} and {one.difficulty for one in of("sort")} == {
        1, 2, 3, 4}
    assert difficulties("sort") == range(6, 7) and difficulties("countdown", "2-4") == range(2, 5)
    for task, text in (("sort", "x"), ("sort", "0"), ("sort", "4-3"), ("countdown", "1"), ("countdown", "9")):
        with pytest.raises(UserError, match="difficulty"):
            difficulties(task, text)
    with pytest.raises(UserError, match="did you mean sort"):
        difficulties("sorted")
    with pytest.raises(UserError, match="not so many problems"):
        problems("addition", range(1, 2), 1, 1000)


@pytest.mark.parametrize("prompt, answer, wanted", [
    ("make 46 of 3 7 25", "25+3*7", (1, 1)), ("make 46 of 3 7 25", "(3*7)+25", (1, 1)),
    ("make 46 of 3 7 25", "25 + 7 * 3", (1, 1)), ("make 46 of 3 7 25", "46", (0, 0.25)),
    ("make 46 of 3 7 25", "25+3+7", (0, 0.5)), ("make 46 of 3 7 25", "25+21", (0, 0.25)),
    ("make 46 of 3 7 25", "25+3*7=46", (0, 0)), ("make 46 of 3 7 25", "(25+3*7", (0, 0)),
    ("make 1 of 2 2 2", "2/2", (0, 0.25)), ("make 1 of 2 2 2", "2/(2-2)", (0, 0)),
    ("make 3 of 2 2 2", "2/2+2", (1, 1)),
    ("make 18 of 20 9 10", "9/(10/20)", (1, 1)), ("make 8 of 2 3", "2**3", (0, 0)),
    ("make 2 of 7 3", "7//3", (0, 0)),
    ("make 1 of 3 3 1", "(1/3)*3", (1, 1)), ("make 1 of 3 3 1", "3*(1/3)*1", (0, 0.25)),
    ("make 3 of 3 3 1", "(1/3)*3*3", (0, 0.25)), ("make 1 of 3 3", "3/3", (1, 1)),
    ("make 5 of 2 3", "--2+3", (0, 0)),
    ("make 5 of 2 3", "__import__('os')", (0, 0)), ("make 5 of 2 3", "(" * 150 + "2", (0, 0)),
    ("make 5 of 2 3", "2(3)", (0, 0)),
])
def test_countdown(prompt, answer, wanted):
    assert check(Problem(prompt, "", "countdown", 3, ""), answer) == wanted


@pytest.mark.parametrize("task, right, answer, partial", [
    ("sort", "012348", "012384", 4 / 6), ("sort", "012", "0123", 3 / 4), ("sort", "012", "", 0),
    ("copy", "ab", "ba", 0),
    ("count", "3", "2", 1 / 2), ("count", "3", "6", 1 / 4), ("count", "3", "three", 0), ("count", "3", "٣", 0),
    ("formatted", "<a>46</a>", "46", 0), ("formatted", "<a>46</a>", "<a>47</a>", 0.75),
    ("formatted", "<a>46</a>", "<a></a>", 0.5), ("formatted", "<a>46</a>", "<a>46</a>.", 0),
    ("answer", "yes", "yes!", 3 / 4),
])
def test_partial(task, right, answer, partial):
    assert check(Problem("", right, task, 0, ""), answer) == (0, pytest.approx(partial))


def test_command(tmp_path):
    """What the docstring shows is what is printed; sft.py's reader takes the file, and so does read_problems()."""
    from records import read_conversations
    path = tmp_path / "sort.jsonl"
    told = run("tasks.py", "sort", path, "--n=3").stdout.splitlines()
    shown = re.findall(r"    (sort.*)\n", tasks.__doc__)[:4]
    assert told[0].endswith(shown[0].removeprefix("sort.jsonl")) and told[1:] == shown[1:]
    (one, two, _), found = read_conversations(str(path)), read_problems(str(path))
    assert [message["content"] for message in one] == ["sort 929901", "012999"] == [found[0].prompt, found[0].answer]
    assert found[0].task == "sort" and check(found[1], two[1]["content"]) == (1, 1)
    assert "exists" in run("tasks.py", "sort", path, status=2).stderr
    run("tasks.py", "countdown", path, "--n=2", "--overwrite=True", "--held_out=True", "--difficulty=4")
    assert all(json.loads(line)["difficulty"] == 4 for line in path.read_text().splitlines())
    assert [one.task for one in read_problems(str(path))] == ["countdown"] * 2
    for arguments in (["srot"], ["sort", "--n=0"], ["addition", "--difficulty=1", "--n=200"], ["sort", tmp_path]):
        run("tasks.py", *arguments, status=2)


def test_own_problems(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "a year", "pattern": "[12]\\\\d{3}"}\n{"prompt": "yes?", "completion": "yes"}\n')
    year, yes = read_problems(str(path))
    assert [check(year, text)[0] for text in ("1984", "1984!", "x1984", "3000", "")] == [1, 0, 0, 0, 0]
    assert check(yes, " yes ")[0] == 1 and check(yes, "no")[0] == 0
    for row, says in (('{"prompt": "x", "pattern": "("}', "no regular expression"), ('{"prompt": "x"}', "it needs"),
                      ('{"prompt": 3, "answer": "x"}', "both texts"), ("{", "no JSON"), ("", "is empty"),
                      ('{"prompt": "x", "answer": "3", "task": "countdown"}', "no prompt of the task countdown"),
                      ('{"prompt": "x", "answer": "y", "task": "count"}', "is a number")):
        path.write_text(row)
        with pytest.raises(UserError, match=says):
            read_problems(str(path))
    path.write_text('{"prompt": "x"}')
    assert read_problems(str(path), answers=False)[0].prompt == "x"


@pytest.mark.parametrize("source, says", [
    ("def reward(prompt, answer):\n    return 1 / (len(answer) - 2)", r"line 2: reward\(\) raised ZeroDivisionError"),
    ("def reward(prompt, answer):\n    return None", r"gave None, not a finite number"),
    ("def reward(prompt, answer):\n    return float('nan')", r"gave nan, not a finite"),
    ("def reward(prompt):\n    return 1", r"raised TypeError"),
    ("import sys\ndef reward(prompt, answer):\n    sys.exit(3)", r"line 3: reward\(\) raised SystemExit: 3"),
], ids=str)
def test_own_reward_that_fails(tmp_path, source, says):
    """The answer is told that did it."""
    path = tmp_path / "own.py"
    path.write_text(source)
    with pytest.raises(UserError, match=says + ".* for the answer 'no' to the prompt 'why'") as told:
        load_reward(str(path))("why", "no")
    assert str(path) in str(told.value)


@pytest.mark.parametrize("source, says", [
    ("x = 1", "has no function reward"), ("def reward(:", "line 1: SyntaxError"), ("\n1 / 0", "line 2: ZeroDivision"),
    ("import nowhere_at_all", "line 1: ModuleNotFoundError"), ("raise SystemExit", "line 1: SystemExit"),
    ("reward = 3", "has no function reward"), (None, "there is no file")], ids=str)
def test_no_reward(tmp_path, source, says):
    path = tmp_path / "own.py"
    if source:
        path.write_text(source)
    with pytest.raises(UserError, match=says):
        load_reward(str(path))


def test_own_reward(tmp_path):
    """Its imports and its globals are there when it is called."""
    path = tmp_path / "own.py"
    path.write_text("import math\ncalls = []\ndef reward(prompt, answer):\n    calls.append(answer)\n"
                    "    return math.sqrt(len(answer)) + len(calls)\n")
    reward = load_reward(str(path))
    assert reward("", "abcd") == 3 and reward("", "abcd") == 4
    assert problem("sort", range(6, 7), 1, 5) == problem("sort", range(6, 7), 1, 5)
