"""magpie.py, run as a user runs it: what it makes, filters, resumes; and its filters against plain formulas."""
import fcntl
import itertools
import json
import re
import subprocess
import sys
from collections import Counter

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import pytest
from conftest import ROOT
from test_sft import folder, sft  # noqa: F401  (a checkpoint)

from conversations import encode, encode_prompt, read_conversations, turns
from model import load_checkpoint
from tokenizer import byte_tokenizer

SOURCE = (ROOT / "magpie.py").read_text()
START, END = SOURCE.index("# ---- filters"), SOURCE.index("# ---- load")
made = {"re": re, "Counter": Counter}
exec(SOURCE[START:END], made)  # the section of the filters stands by itself


@pytest.fixture(scope="module")
def tuned(folder, tmp_path_factory):  # noqa: F811
    """A checkpoint that has learned both turns, with a system message before them and without."""
    out = tmp_path_factory.mktemp("tuned")
    tasks = [json.loads(line) for line in (folder / "tasks.jsonl").read_text().splitlines()]
    greeted = [{"messages": [{"role": "system", "content": "Hi."}, *turns(task["prompt"], task["response"])]}
               for task in tasks]
    data = out / "tasks.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*tasks, *greeted]))
    sft(folder, out, f"--data={data}", "--kind=full", "--template=plain", "--learn_prompts=True",
        "--learning_rate=5e-3", "--epochs=40", "--eval_interval=40")
    return out / "sft.safetensors"


def magpie(checkpoint, out, *arguments, status=0):
    usual = "--batch_size=16", "--n=12", "--min_words=2", "--temperature=1", "--answer_temperature=0"
    done = subprocess.run([sys.executable, ROOT / "magpie.py", checkpoint, f"--out={out}", *usual, *arguments],
                          capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_makes_conversations(folder, tuned, tmp_path):  # noqa: F811
    """As many as asked for, all different, in the form of what it learned; sft.py takes them."""
    out = tmp_path / "made.jsonl"
    done = magpie(tuned, out, "--n=24")
    found = read_conversations(str(out))
    assert len(found) == 24 and "24 kept" in done.stdout and "user:" in done.stdout
    assert [message["role"] for message in found[0]] == ["user", "assistant"]
    prompts = [messages[0]["content"] for messages in found]
    for a, b in itertools.combinations(map(made["runs_of_five"], prompts), 2):
        assert len(a & b) / len(a | b) <= 0.7
    assert sum(bool(re.match(r"\d+ [a-h]+", prompt)) for prompt in prompts) >= 16  # "17 bbb", as it learned
    sft(folder, tmp_path / "again", f"--data={out}", "--template=plain", "--epochs=1")


def test_answers_are_the_model_s_own(tuned, tmp_path):
    """Greedy answers, and prompts in a batch of different lengths: each equals what the model says to it alone."""
    out = tmp_path / "made.jsonl"
    magpie(tuned, out, "--dtype=float32")
    model, _ = load_checkpoint(str(tuned))
    enc = byte_tokenizer()
    for messages in read_conversations(str(out)):
        ids = encode_prompt(enc, messages[:1], "plain")
        for _ in range(32):
            token = int(model(mx.array([ids]))[0, -1, :257].argmax())
            if token == enc.eot:
                break
            ids.append(token)
        start = len(encode_prompt(enc, messages[:1], "plain"))
        assert enc.decode(ids[start:]).strip() == messages[1]["content"]


def test_resume_is_exact(tuned, tmp_path):
    """Stopped in the middle of a line, or asked for more later: the file of one run."""
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    settings = "--batch_size=8", "--max_similarity=1"
    magpie(tuned, whole, "--n=20", *settings)
    magpie(tuned, part, "--n=7", *settings)
    assert whole.read_bytes().startswith(part.read_bytes())
    with open(part, "ab") as file:
        file.write(whole.read_bytes()[part.stat().st_size:][:25])  # the beginning of a line
    magpie(tuned, part, "--n=20", *settings, "--resume=True")
    assert part.read_bytes() == whole.read_bytes()
    batches = [json.loads(line)["batch"] for line in whole.read_text().splitlines()]
    assert batches == sorted(batches) and batches[-1] > 0


def test_overwrite_and_lock(tuned, tmp_path):
    """--overwrite=True begins the file anew, but never a file that another process is writing."""
    out = tmp_path / "made.jsonl"
    magpie(tuned, out, "--n=5")
    first = out.read_bytes()
    out.write_bytes(first * 2)
    magpie(tuned, out, "--n=5", "--overwrite=True")
    assert out.read_bytes() == first
    with open(out) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for way in ("--overwrite=True", "--resume=True"):
            assert "another process is writing" in magpie(tuned, out, "--n=9", way, status=2).stderr
    assert out.read_bytes() == first


def test_avoid(tuned, tmp_path):
    """What another file has is not made again."""
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    magpie(tuned, first)
    done = magpie(tuned, second, f"--avoid={first}", "--max_similarity=0.99")
    prompts = [{messages[0]["content"] for messages in read_conversations(str(path))} for path in (first, second)]
    assert not prompts[0] & prompts[1] and re.search(r"\d+ prompt known", done.stdout)


def test_system_message(tuned, tmp_path):
    out = tmp_path / "made.jsonl"
    magpie(tuned, out, "--system=Hi.")
    assert read_conversations(str(out))[0][0] == {"role": "system", "content": "Hi."}


def test_bad_input(folder, tuned, tmp_path):  # noqa: F811
    out = tmp_path / "made.jsonl"
    assert "not tuned on conversations" in magpie(folder / "base.safetensors", out, status=2).stderr
    assert not out.exists()
    done = magpie(folder / "base.safetensors", out, "--template=alpaca", "--patience=2", status=2)
    assert "none of 32 conversations passed the filters" in done.stderr and "learn_prompts" in done.stderr
    out.write_text("{}\n")
    told = magpie(tuned, out, status=2).stderr
    assert f"{out} exists: give --overwrite=True to replace it, --resume=True" in told
    assert told.endswith(f" or --out={tmp_path / 'made-2.jsonl'}\n")
    assert "give one of them" in magpie(tuned, out, "--resume=True", "--overwrite=True", status=2).stderr
    assert "is not a file of magpie.py" in magpie(tuned, out, "--resume=True", status=2).stderr
    assert out.read_text() == "{}\n"
    row = '{"messages": [{"content": "a"}, {"content": "b"}], "batch": %d}\n'
    out.write_text(row % 5 + row % 2)
    assert "out of order" in magpie(tuned, out, "--resume=True", status=2).stderr
    assert out.read_text() == row % 5 + row % 2
    new = tmp_path / "new.jsonl"
    assert "batch_size=0" in magpie(tuned, new, "--batch_size=0", status=2).stderr
    assert "half of the context" in magpie(tuned, new, f"--system={'long ' * 20}", status=2).stderr
    assert not new.exists()


# ---- filters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "share"), [
    ("", 0), ("one two", 0), ("a b c d", 0), ("a b c a b c", 1 / 4), ("No. No. No. No.", 4 / 6), ("ja " * 32, 29 / 30),
])
def test_repetition(text, share):
    assert made["repetition"](text) == pytest.approx(share)


def test_similarity():
    """The largest Jaccard index, by comparing with each."""
    prompts = ["Name three birds.", "Name three  BIRDS .", "Name four birds.", "What is the sum of 3 and 4?",
               "What is the sum of 3 and 5?", "Wie heißt du?", "あなたの名前は何ですか", "a"]
    known = made["Known"]()
    for i, prompt in enumerate(prompts):
        runs = made["runs_of_five"](prompt)
        expected = [len(runs & other) / len(runs | other) for other in map(made["runs_of_five"], prompts[:i])]
        assert known.similarity(prompt) == pytest.approx(max(expected, default=0))
        known.add(prompt)
        assert known.similarity(prompt) == 1
    assert made["runs_of_five"]("Name three birds.") == made["runs_of_five"](" name three birds .")
    assert made["runs_of_five"]("ab") == {" ab  "}


def test_prompt_of_a_user_ends_where_the_turn_begins():
    enc = byte_tokenizer()
    for template in ("plain", "alpaca", "chatml", "llama3"):
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        ids, _ = encode(enc, [*messages, {"role": "user", "content": "c"}], template)
        start = encode_prompt(enc, messages, template, "user")
        assert ids[:len(start)] == start and enc.decode(ids[len(start):]).startswith("c")
