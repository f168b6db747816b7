"""Runs that are killed at random moments and resumed leave what a run without a kill leaves, to the last bit."""
import json
import random
import subprocess
import sys
import time

import prepared
import pytest
from conftest import ROOT
from test_dpo import pairs  # noqa: F401  (preferences)
from test_magpie import tuned  # noqa: F401  (a checkpoint that writes conversations)
from test_sft import folder, state  # noqa: F401  (folder: a checkpoint and examples)


def start(*command) -> subprocess.Popen:
    return subprocess.Popen(list(map(str, [sys.executable, *command])), stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def size(path) -> int:
    return path.stat().st_size if path.exists() else -1


def kill_and_resume(begin: list, go_on: list, begun, written, n: int, seed: int):
    """Start, kill and resume a script, so that it is killed n times in all, fewer where the machine is so fast that it
    ends before; then let it end. begun() tells whether there is something to resume: before, it is begun anew. It is
    killed soon after it has written to the file `written`."""
    rng, killed = random.Random(seed), 0
    while True:
        before = size(written)
        process = start(*(go_on if begun() else [*begin, "--overwrite=True"]))
        if killed == n:
            told, _ = process.communicate(timeout=300)
            assert process.returncode == 0 or "already: give more" in told, told
            break
        while process.poll() is None and size(written) == before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.25))
        process.kill()
        told, _ = process.communicate()
        if process.returncode == 0 or "already: give more" in told:
            break
        assert process.returncode == -9, told
        killed += 1
    assert killed >= 3


@pytest.mark.parametrize("script, arguments, kills", [
    ("sft", ["--kind=lora", "--epochs=40", "--dropout=0.1", "--batch_size=2"], 4),
    ("dpo", ["--kind=full", "--epochs=25", "--learning_rate=1e-4", "--dropout=0.1", "--batch_size=2"], 3),
    ("reward", ["--kind=lora", "--epochs=8", "--batch_size=4"], 3),
    ("ppo", ["--kind=full", "--learning_rate=1e-4", "--max_iters=36", "--prompts=4", "--max_new_tokens=4",
             "--minibatches=2", "--kl_target=0.1", "--eval_problems=4", "--pass_k=1", "--partial_weight=1"], 3)],
    ids=["sft", "dpo", "reward", "ppo"])
def test_training(folder, pairs, tmp_path, script, arguments, kills):  # noqa: F811
    data = folder / "tasks.jsonl" if script in ("sft", "ppo") else pairs
    begin = [ROOT / f"{script}.py", folder / "base.safetensors", f"--data={data}", "--template=plain", *arguments,
             "--eval_interval=5", "--log_interval=3"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    prepared.run([sys.executable, *begin, f"--out_dir={whole}"], check=True)
    go_on = [ROOT / f"{script}.py", f"--out_dir={killed}", "--resume=True"]
    kill_and_resume([*begin, f"--out_dir={killed}"], go_on, (killed / "resume.safetensors").exists, killed / "loss.csv",
                    kills, seed=1)
    one, other = state(whole), state(killed)
    assert one.keys() == other.keys() and len(one["loss.csv"]) > 20
    for name, array in one.items():
        assert (array == other[name]).all(), name
    assert not list(killed.glob("*.tmp*"))


def test_magpie(tuned, tmp_path):  # noqa: F811
    settings = ["--n=150", "--batch_size=8", "--min_words=2", "--temperature=1", "--max_similarity=0.95"]
    whole, killed = tmp_path / "whole" / "made.jsonl", tmp_path / "killed" / "made.jsonl"  # the name is of the seed
    for path in (whole, killed):
        path.parent.mkdir()
    begin = [ROOT / "magpie.py", tuned, *settings]
    prepared.run(list(map(str, [sys.executable, *begin, f"--out={whole}"])), check=True)
    begun = lambda: killed.exists() and killed.stat().st_size > 0  # noqa: E731
    kill_and_resume([*begin, f"--out={killed}"], [*begin, f"--out={killed}", "--resume=True"], begun, killed, 4, seed=2)
    assert killed.read_bytes() == whole.read_bytes()
    assert len({json.dumps(json.loads(line)["messages"]) for line in whole.read_text().splitlines()}) == 150
