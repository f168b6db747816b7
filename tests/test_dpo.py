"""dpo.py: each loss against its formula in float64; run as a user runs it; bad input."""
import csv
import json
import math
import subprocess
import sys

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT
from test_sft import folder  # noqa: F401  (a checkpoint)

import lora
from conversations import encode
from model import GPT, GPTConfig, cross_entropy, load_checkpoint
from tokenizer import byte_tokenizer

ENC = byte_tokenizer()
SOURCE = (ROOT / "dpo.py").read_text()
START, END = SOURCE.index("# ---- losses"), SOURCE.index("# ---- data")
made = {"mx": mx, "GPT": GPT, "cross_entropy": cross_entropy}
exec(SOURCE[START:END], made)  # the section of the losses stands by itself

RNG = np.random.default_rng(0)
PI, REF = -RNG.uniform(5, 60, (3, 16)), -RNG.uniform(5, 60, (3, 16))
N = RNG.integers(3, 30, (2, 16)).astype(float)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def formula(name: str, beta: float) -> np.ndarray:
    """From the papers, float64."""
    h = (PI[0] - PI[1]) - (REF[0] - REF[1])
    mean = PI[:2] / N
    odds = np.exp(mean) / (1 - np.exp(mean))
    z = max(0, (PI[2] - REF[2]).mean()) * beta
    return {
        "dpo": -np.log(sigmoid(beta * h)),
        "cdpo": -0.8 * np.log(sigmoid(beta * h)) - 0.2 * np.log(sigmoid(-beta * h)),
        "ipo": (h - 1 / (2 * beta)) ** 2,
        "simpo": -np.log(sigmoid(beta * mean[0] - beta * mean[1] - 0.7)),
        "orpo": -mean[0] - beta * np.log(sigmoid(np.log(odds[0] / odds[1]))),
        "kto": (1 - sigmoid(beta * (PI[0] - REF[0]) - z) + 1 - sigmoid(z - beta * (PI[1] - REF[1]))) / 2,
    }[name]


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("name", ["dpo", "cdpo", "ipo", "simpo", "orpo", "kto"])
def test_formula(name, beta):
    pi, ref, n = (mx.array(x.astype(np.float32)) for x in (PI, REF, N))
    f = made["dpo" if name == "cdpo" else name]
    found = {"dpo": lambda: f(*pi[:2], *ref[:2], beta), "cdpo": lambda: f(*pi[:2], *ref[:2], beta, 0.2),
             "ipo": lambda: f(*pi[:2], *ref[:2], beta), "simpo": lambda: f(*pi[:2], *n, beta, 0.7),
             "orpo": lambda: f(*pi[:2], *n, beta), "kto": lambda: f(*pi[:2], *ref[:2], pi[2], ref[2], beta)}[name]()
    np.testing.assert_allclose(np.array(found), formula(name, beta), rtol=2e-4, atol=2e-5)


def test_divergence_of_kto_is_a_constant():
    pi = mx.array(PI.astype(np.float32))
    ref = pi - mx.array([[1.0], [9.0], [3.0]])  # with equal ones, the two halves of its gradient would cancel
    gradient = mx.grad(lambda other: made["kto"](pi[0], pi[1], ref[0], ref[1], other, ref[2], 0.1).sum())(pi[2])
    assert mx.array_equal(gradient, mx.zeros(16))


def test_log_probs_are_a_plain_sum():
    model = GPT(GPTConfig(block_size=64, vocab_size=320, n_layer=2, n_head=2, n_embd=32), seed=1).eval()
    ids, learned = np.zeros((2, 30), np.int32), np.zeros((2, 30), np.float32)
    wanted = []
    for row, answer in enumerate(("four", "a longer one")):
        talk = [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": answer}]
        row_ids, row_learned = encode(ENC, talk, "plain")
        ids[row, :len(row_ids)], learned[row, :len(row_ids)] = row_ids, row_learned
        total = 0.0
        for t in range(1, len(row_ids)):
            if row_learned[t]:
                logits = np.array(model(mx.array([row_ids[:t]]))[0, -1], np.float64)
                total += logits[row_ids[t]] - np.log(np.exp(logits).sum())
        wanted.append(total)
    found = made["answer_log_probs"](model, mx.array(ids), mx.array(learned))
    np.testing.assert_allclose(np.array(found), wanted, rtol=1e-5)


# ---- the script ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """It prefers the answer in capitals."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    with open(path, "w") as file:
        for i in range(40):
            word = "abcdefgh"[i % 8] * 3
            print(json.dumps({"prompt": f"{i} {word}", "chosen": word.upper(), "rejected": word}), file=file)
    return path


def dpo(folder, pairs, out, *arguments, status=0):  # noqa: F811
    done = subprocess.run([sys.executable, ROOT / "dpo.py", folder / "base.safetensors", f"--data={pairs}",
                           f"--out_dir={out}", "--epochs=20", "--eval_interval=20", "--learning_rate=3e-3",
                           "--template=plain", *arguments], capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def rows_of(out, split) -> list[dict]:
    """The figures of its rows, with "loss" for the loss of this split, train or val."""
    with open(out / "loss.csv", newline="") as file:
        return [{name: float(value) for name, value in {**row, "loss": row[f"{split}_loss"]}.items() if value}
                for row in csv.DictReader(file) if row[f"{split}_loss"]]


@pytest.mark.parametrize("arguments, first", [
    (["--loss=dpo"], math.log(2)), (["--loss=ipo", "--kind=dora"], 1 / (4 * 0.1**2)), (["--loss=kto"], 0.5),
    (["--loss=dpo", "--label_smoothing=0.1", "--base_bits=8"], math.log(2)), (["--loss=simpo", "--beta=2"], None),
    (["--loss=orpo", "--kind=full", "--learning_rate=1e-3"], None),
], ids=lambda argument: argument[0][2:] if isinstance(argument, list) else "")
def test_learns(folder, pairs, tmp_path, arguments, first):  # noqa: F811
    """It starts where the formula says, learns to prefer what it never saw, and leaves a file that does."""
    done = dpo(folder, pairs, tmp_path, *arguments)
    held_out, train = rows_of(tmp_path, "val"), rows_of(tmp_path, "train")
    assert max(len(line) for line in done.stdout.splitlines() if line.startswith("step ")) <= 80
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "source" / "dpo.py").exists()
    if first:
        assert held_out[0]["loss"] == pytest.approx(first, rel=1e-5) and held_out[0]["margin"] == 0
        assert train[0]["loss"] == pytest.approx(first, rel=1e-5)  # of the first update, before it
    assert held_out[-1]["loss"] < 0.8 * held_out[0]["loss"] and held_out[-1]["accuracy"] == 1
    assert held_out[-1]["margin"] > 0.1 and "acc 100%" in done.stdout
    if "--kind=full" in arguments:
        model, meta = load_checkpoint(str(tmp_path / "dpo.safetensors"))
    else:
        model, _ = load_checkpoint(str(folder / "base.safetensors"))
        meta = lora.load_adapter(model, str(tmp_path / "dpo.safetensors"))
    best = min(held_out[1:], key=lambda row: row["loss"])
    with open(pairs) as file:
        lines = [json.loads(line) for line in file]
    sums, margins = [], []
    reference, _ = load_checkpoint(str(folder / "base.safetensors"))
    lora.quantize_base(reference, 8 if "--base_bits=8" in arguments else 0)
    for i in np.random.default_rng(1337).permutation(40)[:4]:
        rewards = []
        for answer in ("chosen", "rejected"):
            talk = [{"role": "user", "content": lines[i]["prompt"]}, {"role": "assistant", "content": lines[i][answer]}]
            ids, learned = (mx.array([x]) for x in encode(ENC, talk, "plain"))
            pi, ref = (made["answer_log_probs"](m, ids, learned).item() for m in (model, reference))
            if "--loss=simpo" in arguments or "--loss=orpo" in arguments:
                pi_by_token, beta = pi / learned.sum().item(), 2 if "--beta=2" in arguments else 0.1
                rewards.append(beta * pi_by_token)
            else:
                rewards.append(0.1 * (pi - ref))
            sums.append(pi)
        margins.append(rewards[0] - rewards[1])
    assert np.mean(sums[::2]) == pytest.approx(best["chosen"], rel=1e-3) and meta["losses"]["chosen"] == best["chosen"]
    assert np.mean(sums[1::2]) == pytest.approx(best["rejected"], rel=1e-3)
    assert np.mean(margins) == pytest.approx(best["margin"], rel=1e-3)


def test_merged(folder, pairs, tmp_path):  # noqa: F811
    dpo(folder, pairs, tmp_path, "--epochs=1", "--merge=True")
    _, meta = load_checkpoint(str(tmp_path / "dpo.safetensors"))
    assert meta["template"] == "plain" and meta["tokenizer"] == ENC.to_dict()


@pytest.mark.parametrize("line, says", [
    ({"prompt": "x", "chosen": "y"}, "rejected is missing"), ({"chosen": "x", "rejected": "y"}, "prompt is missing"),
    ({"prompt": "x", "chosen": "y", "rejected": "y"}, "the same"), ("{", "no JSON"), ([], "not an object"),
    ({"prompt": "x", "chosen": " ", "rejected": "y"}, "empty chosen"),
    ({"prompt": [{"role": "bot", "content": "x"}], "chosen": "x", "rejected": "y"}, "unknown role 'bot'"),
    ({"prompt": "x", "chosen": [{"role": "assistant", "content": ""}], "rejected": "y"}, "empty chosen"),
], ids=str)
def test_bad_lines(folder, tmp_path, line, says):  # noqa: F811
    path = tmp_path / "bad.jsonl"
    path.write_text(line if isinstance(line, str) else json.dumps(line))
    done = dpo(folder, path, tmp_path / "out", status=2)
    assert f"{path}, line 1: " in done.stderr and says in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments, says", [
    (["--loss=ppo"], "loss='ppo'"), (["--beta=0"], "beta=0"), (["--kind=x"], "kind='x'"), (["--data="], "give --data"),
    (["--label_smoothing=0.5"], "label_smoothing"), (["--kind=full", "--base_bits=4"], "packed weights"),
], ids=str)
def test_mistakes(folder, pairs, tmp_path, arguments, says):  # noqa: F811
    assert says in dpo(folder, pairs, tmp_path / "out", *arguments, status=2).stderr
