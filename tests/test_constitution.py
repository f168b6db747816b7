"""constitution.py: its measures against textbook values; the judge against a plain pass; run as a user runs it."""
import json
import math
import os
import re
import subprocess
import sys

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
import prepared
import pytest
from conftest import ROOT
from test_magpie import tuned  # noqa: F401  (a checkpoint that answers with the prompt's last word)
from test_sft import folder  # noqa: F401

from conversations import encode_prompt
from model import GPT, GPTConfig, save_checkpoint
from tokenizer import byte_tokenizer

ENC = byte_tokenizer()
SOURCE = (ROOT / "constitution.py").read_text()
made = {"np": np, "math": math}
exec(SOURCE[SOURCE.index("# ---- the judge"):SOURCE.index("# ---- check")], made)  # the section stands by itself


def s(x):
    return 1 / (1 + math.exp(-x))


# ---- measures --------------------------------------------------------------------------------------------------------


def test_kappa():
    """Of 50 verdicts both say yes in 20, no in 15, and differ in 5 and 10: 0.4 (Cohen's example in many textbooks)."""
    a = np.array([True] * 25 + [False] * 25)
    b = np.array([True] * 20 + [False] * 5 + [True] * 10 + [False] * 15)
    assert made["kappa"](a, b) == pytest.approx(0.4)
    assert made["kappa"](a, a) == 1 and made["kappa"](a, ~a) == -1 and math.isnan(made["kappa"](a[:9], a[:9]))


def test_preference():
    """A bias for A that empty answers have, too, cancels: what is left is the judge's own log-odds."""
    own, bias = np.array([0.3, -1.2, 0.0]), np.array([2.0, -0.7, 5.0])
    p = made["preference"](own + bias, -own + bias, bias)
    np.testing.assert_allclose(p, [s(0.3), s(-1.2), 0.5])
    np.testing.assert_allclose(made["preference"](-own + bias, own + bias, bias), 1 - p)  # the answers swapped
    raw = made["preference"](own + bias, -own + bias, 0)
    assert raw == pytest.approx([(s(2.3) + 1 - s(1.7)) / 2, (s(-1.9) + 1 - s(0.5)) / 2, 0.5])


def test_measures():
    ab, ba, better = np.array([2.0, -1.0, 0.5, 0.1]), np.array([-2.0, 1.0, 1.5, 0.0]), np.array([1, 1, 0, math.nan])
    found = made["measures"](ab, ba, 0 * ab, better, np.array([3, -1, 0, 2]), 0.05)
    p = [(s(x) + 1 - s(y)) / 2 for x, y in zip(ab, ba, strict=True)]
    assert found["P(A)"] == pytest.approx(sum(map(s, [*ab, *ba])) / 8)
    assert found["same"] == 3 / 4 and found["right"] == 2 / 3  # of the third pair, A in both orders
    assert found["kappa"] == pytest.approx((2 / 3 - 4 / 9) / (1 - 4 / 9))
    assert found["Brier"] == pytest.approx(((p[0] - 1)**2 + (p[1] - 1)**2 + p[2]**2) / 3)
    assert found["abstains"] == 1 / 4 and found["right else"] == 2 / 3
    assert found["length"] == pytest.approx(np.corrcoef(p, [3, -1, 0, 2])[0, 1])


# ---- the script ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i} {'abcdefgh'[i % 8] * 3}"}) + "\n" for i in range(12)))
    return path


def constitution(checkpoint, data, out, *arguments, status=0):
    done = prepared.run([sys.executable, ROOT / "constitution.py", checkpoint, data, f"--out={out}", *arguments])
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


DRAWN = "--temperature=1.5", "--max_new_tokens=12", "--batch_size=5", "--rows=3"


def test_judge(tuned, prompts, tmp_path):  # noqa: F811
    """Log-odds are those of a plain pass over each question; a run in parts writes the same file."""
    judge, model = tmp_path / "judge.safetensors", GPT(GPTConfig(block_size=512, vocab_size=320, n_layer=2, n_head=2,
                                                                 n_embd=32), seed=3).eval()
    save_checkpoint(str(judge), model, {"tokenizer": ENC.to_dict(), "template": "plain", "script": "sft.py"})
    asked = "--principle=contains:a", f"--judge={judge}", *DRAWN
    done = constitution(tuned, prompts, tmp_path / "a.jsonl", *asked)
    rows = rows_of(tmp_path / "a.jsonl")
    assert len(rows) >= 4 and "P(A)" in done.stdout and "next: python dpo.py" in done.stdout
    exec(re.search(r"JUDGE = .*?\n\n", SOURCE, re.DOTALL)[0], made)
    for row in rows:
        a, b = (row["chosen"], row["rejected"])[::1 if row["first_is_chosen"] else -1]
        odds = {}
        for name, both in (("ab", (a, b)), ("ba", (b, a)), ("empty", ("", ""))):
            text = made["JUDGE"].format(row["principle"], row["prompt"][0]["content"], *both)
            ids = encode_prompt(ENC, [{"role": "user", "content": text}], "plain")
            logits = np.array(model(mx.array([ids]))[0, -1], np.float64)
            odds[name] = logits[ord("A")] - logits[ord("B")]
            assert row["judged"][name] == pytest.approx(odds[name], abs=1e-3)
        p = (s(odds["ab"] - odds["empty"]) + 1 - s(odds["ba"] - odds["empty"])) / 2
        assert row["probability"] == pytest.approx(max(p, 1 - p), abs=1e-3)
        assert (p >= 0.5) == row["first_is_chosen"] and row["response"] == row["chosen"]
        assert row["scores"] == [float(bool(re.search(r"\ba\b", row[name], re.I))) for name in ("chosen", "rejected")]
    part = tmp_path / "b.jsonl"
    part.write_text("".join(json.dumps(row) + "\n" for row in rows if row["batch"] == 0))
    constitution(tuned, prompts, part, *asked, "--resume=True")
    assert part.read_text() == (tmp_path / "a.jsonl").read_text()
    again = constitution(tuned, tmp_path / "a.jsonl", tmp_path / "c.jsonl", "--principle=Be a good answer.",
                         "--pairs=file", f"--judge={judge}")
    assert f"{len(rows):6}{len(rows):6}" in again.stdout  # here the file knows the better answer
    assert [{row["chosen"], row["rejected"]} for row in rows_of(tmp_path / "c.jsonl")] == [
        {row["chosen"], row["rejected"]} for row in rows]


def test_code(tuned, tmp_path):  # noqa: F811
    """Of eight answers the right one is chosen; dpo.py takes the file."""
    data, out = tmp_path / "problems.jsonl", tmp_path / "a.jsonl"
    words = ["abcdefgh"[i % 8] * 3 for i in range(12)]
    data.write_text("".join(json.dumps({"prompt": f"{i} {word}", "answer": word}) + "\n"
                            for i, word in enumerate(words)))
    done = constitution(tuned, data, out, "--principle=right", "--label=code", "--draws=8", *DRAWN)
    rows = rows_of(out)
    assert len(rows) >= 6 and re.search(r"drawn: \d+ answers of .* keep: The answer is right", done.stdout)
    for row in rows:
        assert row["scores"][0] > row["scores"][1] and row["probability"] == 1
        assert row["scores"][0] < 1 or row["chosen"] == row["prompt"][0]["content"].split()[1]
    dpo = prepared.run([sys.executable, ROOT / "dpo.py", tuned, f"--data={out}", f"--out_dir={tmp_path / 'dpo'}",
                        "--epochs=1"])
    assert dpo.returncode == 0 and "pairs (prompt, chosen, rejected, probability)" in dpo.stdout, dpo.stderr


def test_revised(tuned, prompts, tmp_path):  # noqa: F811
    done = constitution(tuned, prompts, tmp_path / "a.jsonl", "--principle=short:1", "--pairs=revised",
                        "--label=revision", "--critique=False", *DRAWN)
    assert "before revision 1" in done.stdout or "holds 0 pairs" in done.stdout
    for row in rows_of(tmp_path / "a.jsonl"):
        assert row["revisions"][-1]["revision"] == row["chosen"] and row["probability"] == 1


@pytest.mark.parametrize("arguments, says", [
    (["--principle=shrt:3"], "is not one of short"), (["--principle=short"], "takes a number"), ([], "no principle"),
    (["--principle=no_digit", "--label=code", "--judge=x"], "does not use judge"),
    (["--principle=no_digit", "--rounds=2"], "does not use rounds"), (["--principle=no_digit", "--draws=3"], "even"),
    (["--principle=no_digit", "--label=revision"], "needs --pairs=revised"),
    (["--principle=Be nice.", "--label=code"], "code cannot check"), (["--principle=right"], "both texts"),
    (["--principle=right", "--principle=no_digit"], "stands alone"),
], ids=str)
def test_mistakes(tuned, prompts, tmp_path, arguments, says):  # noqa: F811
    assert says in constitution(tuned, prompts, tmp_path / "a.jsonl", *arguments, status=2).stderr


def test_earlier_file(tuned, prompts, tmp_path):  # noqa: F811
    (tmp_path / "a.jsonl").write_text("mine\n")
    for out, more, says in ((tmp_path / "a.jsonl", [], "--overwrite=True"),
                            (tmp_path / "a.jsonl", ["--resume=True"], "is not of constitution.py"),
                            (prompts, ["--overwrite=True"], "overwrite the input")):
        assert says in constitution(tuned, prompts, out, "--principle=no_digit", *more, status=2).stderr


def test_rounds(tmp_path):
    """Each round answers, learns and is measured with the model of the round before."""
    stub = tmp_path / "stub"
    stub.write_text(f'#!/bin/sh\necho "${{1##*/}} $2 $3 $*" >> {tmp_path}/asked\necho "drawn: 5 answers"\n')
    stub.chmod(0o755)
    there = {"PYTHON": str(stub), "ROUNDS": "2", "OUT": str(tmp_path / "out"), "DPO": "--x=1"}
    done = subprocess.run(["bash", ROOT / "runs" / "rounds.sh", "sft", "a.jsonl", "b.jsonl", "--principle=right"],
                          env={**os.environ, **there}, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["before: 5 answers", "round 1: 5 answers", "round 2: 5 answers"], done.stderr
    asked, first = (tmp_path / "asked").read_text().splitlines(), f"{tmp_path}/out/round-1/dpo.safetensors"
    assert [line.split()[:3] for line in asked] == [
        ["constitution.py", "sft", "b.jsonl"], ["constitution.py", "sft", "a.jsonl"],
        ["dpo.py", "sft", f"--data={tmp_path}/out/pairs-1.jsonl"], ["constitution.py", first, "b.jsonl"],
        ["constitution.py", first, "a.jsonl"], ["dpo.py", first, f"--data={tmp_path}/out/pairs-2.jsonl"],
        ["constitution.py", first.replace("round-1", "round-2"), "b.jsonl"]]
    assert "--x=1" in asked[2] and all("--principle=right" in line for line in asked if line[0] == "c")
