"""magpie.py, run as a user runs it: what it makes, filters, resumes; and its filters against plain formulas."""
import fcntl
import itertools
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
import prepared
import pytest
from conftest import ROOT, run_here
from test_sft import folder, sft  # noqa: F401  (a checkpoint)

import lora
from config import UserError
from conversations import encode, encode_prompt, turns
from lora import load_adapted
from model import load_checkpoint, save_checkpoint
from records import read_conversations
from tokenizer import byte_tokenizer

SOURCE = (ROOT / "magpie.py").read_text()
START, END = SOURCE.index("# ---- filters"), SOURCE.index("# ---- load")
made = {"re": re, "Counter": Counter, "Iterable": Iterable}
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


USUAL = "--batch_size=16", "--rows=7", "--n=12", "--min_words=2", "--temperature=1", "--answer_temperature=0"


def magpie(checkpoint, out, *arguments, status=0, **options):
    command = [sys.executable, ROOT / "magpie.py", checkpoint, f"--out={out}", *USUAL, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, **options) if options else prepared.run(command)
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


SMALL = "--batch_size=4", "--rows=3", "--max_similarity=1"


@pytest.fixture(scope="module")
def longer(tuned, tmp_path_factory):
    """The file of a run with more batches: one that is to be stopped several times."""
    out = tmp_path_factory.mktemp("longer") / "made.jsonl"
    magpie(tuned, out, "--n=40", *SMALL)
    return out


@pytest.fixture(scope="module")
def whole(tuned, tmp_path_factory):
    """The file of a run without a stop, which has several batches."""
    out = tmp_path_factory.mktemp("whole") / "made.jsonl"
    magpie(tuned, out, "--n=20", *SMALL)
    batches = [json.loads(line)["batch"] for line in out.read_text().splitlines()]
    assert batches == sorted(batches) and batches[-1] > 0
    return out


def test_resume_is_exact(tuned, whole, tmp_path):
    """Stopped in the middle of a line, or asked for more later: the file of one run."""
    part = tmp_path / "made.jsonl"
    for n in (7, 8, 15, 20):
        magpie(tuned, part, f"--n={n}", *SMALL, f"--resume={n > 7}")
        assert part.read_bytes() == b"".join(whole.read_bytes().splitlines(True)[:n])
        with open(part, "ab") as file:
            file.write(whole.read_bytes()[part.stat().st_size:][:25])  # the beginning of a line


def test_resume_never_shortens(tuned, whole, tmp_path):
    """Nothing happens where the file has as many as are asked for, or more. With other settings, what is there stays,
    and what is added is made by batches with later numbers."""
    part = tmp_path / "made.jsonl"
    part.write_bytes(whole.read_bytes())
    for n in (1, 12, 20):
        done = magpie("none.safetensors", part, f"--n={n}", "--resume=True")  # it does not even look for the checkpoint
        assert done.stdout == f"{part} holds 20 conversations: give a larger --n for more\n"
        assert part.read_bytes() == whole.read_bytes()
    done = magpie(tuned, part, "--n=24", *SMALL, "--resume=True", "--seed=2")
    before, after = whole.read_text().splitlines(), part.read_text().splitlines()
    last = json.loads(before[-1])["batch"]
    assert f"batch {last} of {part} was made with other settings" in done.stderr + done.stdout
    assert after[:20] == before and len(after) == 24
    assert all(json.loads(line)["batch"] > last for line in after[20:])


def test_rows(tuned, whole, tmp_path):
    """Texts do not depend on how many are written at a time."""
    for rows in (1, 9):
        out = tmp_path / str(rows) / "made.jsonl"
        out.parent.mkdir()
        magpie(tuned, out, "--n=20", *SMALL, f"--rows={rows}")
        assert out.read_bytes() == whole.read_bytes()


def test_not_finite(tuned, tmp_path):
    model, meta = load_checkpoint(str(tuned))
    model.norm.weight, model.embed.weight = model.norm.weight * 1e32, model.embed.weight * 1e9
    save_checkpoint(str(tmp_path / "nan.safetensors"), model, meta)
    told = magpie(tmp_path / "nan.safetensors", tmp_path / "made.jsonl", status=2).stderr
    assert "has logits that are not finite" in told


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_killed_and_resumed(tuned, longer, tmp_path, number):
    """Again and again, wherever it is: lines stay whole, and in the end the file is that of one run."""
    part, kills, rng = tmp_path / "made.jsonl", 0, random.Random(0)
    command = [sys.executable, ROOT / "magpie.py", tuned, f"--out={part}", *USUAL, *SMALL, "--n=40", "--resume=True"]
    while not part.exists() or part.read_bytes() != longer.read_bytes():
        size = part.stat().st_size if part.exists() else 0
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while process.poll() is None and (part.stat().st_size if part.exists() else 0) == size:
            if number == signal.SIGKILL and kills < 3 and rng.random() < 0.01:  # others, so early, end in a traceback
                break                                                           # of Python's own
            time.sleep(0.003)
        time.sleep(rng.uniform(0, 0.03))
        if process.poll() is None:
            process.send_signal(number)
            kills += 1
        told, _ = process.communicate()
        assert "Traceback" not in told and process.returncode in (0, 130, -number), told  # -number: while Python ends
        assert part.exists() or number == signal.SIGKILL
        if process.returncode == 130:
            found = part.read_bytes()
            assert found.endswith(b"\n") and f"{part} holds {found.count(b'messages')} conversations; --resume" in told
        assert longer.read_bytes().startswith(part.read_bytes() if part.exists() else b"")
    assert kills > 2


def test_two_at_once(tuned, whole, tmp_path, monkeypatch):
    """The second is refused: at its start, or if the file has come into being since."""
    out = tmp_path / "made.jsonl"

    def meanwhile(*arguments):
        out.write_bytes(whole.read_bytes())
        return load_adapted(*arguments)

    monkeypatch.setattr(lora, "load_adapted", meanwhile)
    for resume in (True, False):
        out.unlink(missing_ok=True)
        with pytest.raises(UserError, match="another process has made .*made.jsonl since this one began"):
            run_here("magpie.py", tuned, f"--out={out}", "--n=30", f"--resume={resume}")
        assert out.read_bytes() == whole.read_bytes()
    monkeypatch.undo()
    with open(out) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for way in ("--overwrite=True", "--resume=True", "--resume=False"):
            assert "another process is writing" in magpie(tuned, out, "--n=30", way, status=2).stderr
    assert out.read_bytes() == whole.read_bytes()


def test_no_two_runs_share_a_batch(tuned, whole, tmp_path):
    """Every seed, name of a file, batch and turn has random numbers of its own; folders of equal names share them."""
    source = SOURCE[SOURCE.index("def seed_of"):SOURCE.index("def continued")]
    numbers = set()
    for seed, out in itertools.product((0, 1, 2, 1337, 1338, 1339), ("a.jsonl", "b.jsonl", "/tmp/b.jsonl")):
        names = {"seed": seed, "out": out, "np": np, "os": os}
        exec(source, names)
        numbers |= {names["seed_of"](batch, turn) for batch in range(40) for turn in (0, 1)}
    assert len(numbers) == 6 * 2 * 40 * 2 and 0 <= min(numbers) and max(numbers) < 2**63
    batches = []
    for name, seed in (("made.jsonl", 1338), ("made.jsonl", 1339), ("other.jsonl", 1337)):
        out = tmp_path / str(seed) / name
        out.parent.mkdir()
        magpie(tuned, out, "--n=20", *SMALL, f"--seed={seed}")
        batches.append(out)
    found = []
    for path in (whole, *batches):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found += [str([row["messages"] for row in rows if row["batch"] == i]) for i in range(rows[-1]["batch"] + 1)]
    assert len(found) > 4 and len(set(found) - {"[]"}) == len([batch for batch in found if batch != "[]"])


def test_full_disk(tuned, whole, tmp_path):
    """One line, and a file of whole lines that a later run goes on with."""
    part = tmp_path / "made.jsonl"
    size = whole.stat().st_size
    for limit in (size // 2, size - 20):
        told = magpie(tuned, part, "--n=20", *SMALL, "--resume=True", status=2,
                      preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))).stderr  # noqa: B023
        assert re.search(rf"cannot write {part}: .*; it holds \d+ conversations, and --resume=True goes on\n$", told)
        assert whole.read_bytes().startswith(part.read_bytes()) and part.read_bytes().endswith(b"\n")
    magpie(tuned, part, "--n=20", *SMALL, "--resume=True")
    assert part.read_bytes() == whole.read_bytes()


def test_inputs_are_safe(tuned, whole, tmp_path):
    """--out is no input, nor a link to one."""
    inputs = [tmp_path / "model.safetensors", tmp_path / "tasks.jsonl", tmp_path / "adapter.safetensors"]
    for path, source in zip(inputs, (tuned, whole, tuned), strict=True):
        path.write_bytes(source.read_bytes())
    model, _ = load_adapted(str(inputs[0]))
    lora.attach(model, "attn")
    lora.save_adapter(str(inputs[2]), model, {"template": "plain"}, bases=[str(inputs[0])])
    before, link = [path.read_bytes() for path in inputs], tmp_path / "link.jsonl"
    for path in inputs:
        link.symlink_to(path)
        for out, way in itertools.product((path, link), ("--overwrite=True", "--resume=True")):
            for given in ([inputs[2]], [inputs[0], f"--adapter={inputs[2]}:1"]):
                with pytest.raises(UserError, match="would overwrite the input"):
                    run_here("magpie.py", *given, f"--out={out}", "--n=99", f"--avoid={inputs[1]}", way)
        link.unlink()
    assert [path.read_bytes() for path in inputs] == before


def test_from_an_adapter(tuned, tmp_path):
    """An adapter that changes nothing makes what its base makes."""
    model, _ = load_adapted(str(tuned))
    lora.attach(model, "attn")
    lora.save_adapter(str(tmp_path / "adapter.safetensors"), model, {"template": "plain"}, bases=[str(tuned)])
    found = []
    for i, given in enumerate(([tuned], [tmp_path / "adapter.safetensors"],
                               [tuned, f"--adapter={tmp_path / 'adapter.safetensors'}"])):
        (tmp_path / str(i)).mkdir()
        magpie(given[0], tmp_path / str(i) / "made.jsonl", *given[1:])
        found.append((tmp_path / str(i) / "made.jsonl").read_bytes())
    assert found[0] == found[1] == found[2]


def test_overwrite(tuned, tmp_path):
    """--overwrite=True begins the file anew; an empty file is no result."""
    out = tmp_path / "made.jsonl"
    out.touch()
    magpie(tuned, out, "--n=5")
    first = out.read_bytes()
    out.write_bytes(first * 2)
    magpie(tuned, out, "--n=5", "--overwrite=True")
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
    messages = '{"messages": [{"content": "a"}, {"content": "b"}]}'
    no_messages = "has no messages with a prompt and an answer, and so is not of magpie.py: give another --out"
    no_batch = "has no number of a batch, and so is not of magpie.py: give another --out"
    for line, says in {
            "{}": no_messages, '{"prompt": "a", "response": "b"}': no_messages, "[1]": no_messages,
            '{"messages": 1}': no_messages, '{"messages": [{"content": "a"}]}': no_messages,
            '{"messages": ["a", "b"]}': no_messages, messages.replace('"a"', "7"): no_messages, messages: no_batch,
            messages[:-1] + ', "batch": "1"}': no_batch, messages[:-1] + ', "batch": -1}': no_batch}.items():
        out.write_text(f"{line}\n")
        assert magpie(tuned, out, "--resume=True", status=2).stderr == f"magpie.py: {out}, line 1 {says}\n"
        assert out.read_text() == f"{line}\n"
    out.write_text("some text\n")
    assert f"{out}, line 1: no JSON can be read" in magpie(tuned, out, "--resume=True", status=2).stderr
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
