"""dpo.py: each loss against its formula in float64; run as a user runs it; bad input."""
import csv
import json
import math
import os
import re
import subprocess
import sys
from functools import partial
from typing import NamedTuple

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import prepared
import pytest
from conftest import ROOT, load_adapter
from mlx.utils import tree_flatten, tree_map
from test_sft import ON_PATH, STOPPED, assert_equal, folder, foreign, sft  # noqa: F401  (folder, foreign: checkpoints)

import lora
from conversations import encode
from model import GPT, LOSS_CHUNK, GPTConfig, cross_entropy, load_checkpoint
from records import read_labelled, read_preferences, split
from tokenizer import byte_tokenizer

ENC = byte_tokenizer()
SOURCE = (ROOT / "dpo.py").read_text()
START, END = SOURCE.index("# ---- losses"), SOURCE.index("# ---- resume")
made = {"mx": mx, "GPT": GPT, "NamedTuple": NamedTuple, "cross_entropy": cross_entropy, "tree_map": tree_map,
        "LOSS_CHUNK": LOSS_CHUNK}
exec(SOURCE[START:END], made)  # the section of the losses stands by itself
TRL = dict(np.load(ROOT / "tests" / "fixtures" / "dpo.npz"))  # beta 0.3, of simpo 2


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def losses_of(name: str, pi, p=1.0) -> mx.array:
    """Of the answers of the fixture, as dpo.py calls it."""
    ref, n, other, label = (mx.array(TRL[key].astype(np.float32)) for key in ("ref", "n", "other", "label"))
    if name == "kto":
        z = made["kto_z"](other, ref[1], 0.3)
        return made["kto"](pi[0], ref[0], label, z, 0.3, 1.5, 0.5)
    settings = {"robust": {"flipped": 0.2}, "simpo": {"beta": 2.0, "gamma": 0.7}}.get(name, {})
    loss = partial(made[name.partition(".")[0]], **{"beta": 0.3, **settings})
    chosen, rejected = (made["Answers"](pi[i], ref[i], n[i]) for i in (0, 1))
    return made["expected"](loss, chosen, rejected, mx.array(0.8 if name == "dpo.smooth" else p))


@pytest.mark.parametrize("name", [name[:-5] for name in TRL if name.endswith(".loss")])
def test_losses_of_trl(name):
    """Loss and gradient."""
    pi = mx.array(TRL["pi"].astype(np.float32))
    found, gradient = mx.value_and_grad(lambda pi: losses_of(name, pi).mean())(pi)
    assert found.item() == pytest.approx(float(TRL[f"{name}.loss"]), rel=1e-5)
    np.testing.assert_allclose(np.array(gradient), TRL[f"{name}.gradient"], rtol=2e-4, atol=1e-6)


def formula(name: str, p: np.ndarray) -> np.ndarray:
    """From the papers, float64; beta 0.3, of simpo 2."""
    pi, ref, n, label = (TRL[key].astype(np.float64) for key in ("pi", "ref", "n", "label"))
    ratio, mean = pi - ref, pi / n
    h, g, odds = ratio[0] - ratio[1], ratio[0] / n[0] - ratio[1] / n[1], np.exp(mean) / (1 - np.exp(mean))
    z = max(0, (TRL["other"] - ref[1]).mean()) * 0.3
    good, bad = -np.log(sigmoid(0.3 * h)), -np.log(sigmoid(-0.3 * h))
    return {"dpo": p * good + (1 - p) * bad,
            "dpo_norm": -p * np.log(sigmoid(0.3 * g)) - (1 - p) * np.log(sigmoid(-0.3 * g)),
            "robust": (p * (0.8 * good - 0.2 * bad) + (1 - p) * (0.8 * bad - 0.2 * good)) / 0.6,
            "ipo": (g - (2 * p - 1) / 0.6) ** 2 + (1 - (2 * p - 1) ** 2) / 0.36,
            "simpo": -p * np.log(sigmoid(2 * (mean[0] - mean[1]) - 0.7)) - (1 - p) * np.log(
                sigmoid(2 * (mean[1] - mean[0]) - 0.7)),
            "orpo": -p * mean[0] - (1 - p) * mean[1] - 0.3 * p * np.log(sigmoid(np.log(odds[0] / odds[1])))
            - 0.3 * (1 - p) * np.log(sigmoid(np.log(odds[1] / odds[0]))),
            "kto": np.where(label == 1, 1.5 * (1 - sigmoid(0.3 * ratio[0] - z)),
                            0.5 * (1 - sigmoid(z - 0.3 * ratio[0])))}[name]


@pytest.mark.parametrize("name", ["dpo", "dpo_norm", "robust", "ipo", "simpo", "orpo", "kto"])
def test_formula(name):
    """With a probability of its own for each pair."""
    p = np.linspace(0, 1, 12)
    found = losses_of(name, mx.array(TRL["pi"].astype(np.float32)), mx.array(p.astype(np.float32)))
    np.testing.assert_allclose(np.array(found), formula(name, p), rtol=2e-4, atol=2e-5)


def test_robust_is_unbiased():
    """With the share of swapped pairs that it assumes, it is DPO's loss in expectation."""
    pi = mx.array(TRL["pi"].astype(np.float32))
    np.testing.assert_allclose(np.array(losses_of("robust", pi, 0.8)), np.array(losses_of("dpo", pi)), atol=2e-5)


def test_a_soft_label_is_fitted():
    """The gradient is 0 where the model's own probability of the preference is the label: sigmoid(beta h) = p."""
    h = np.log(0.7 / 0.3) / 0.3
    pi = mx.array(TRL["ref"].astype(np.float32)) + mx.array([[h], [0.0]])
    gradient = mx.grad(lambda pi: losses_of("dpo", pi, 0.7).sum())(pi)
    np.testing.assert_allclose(np.array(gradient), 0, atol=1e-5)


def test_divergence_of_kto_is_a_constant():
    pi, other = mx.array(TRL["pi"].astype(np.float32)), mx.array(TRL["other"].astype(np.float32))
    gradient = mx.grad(lambda other: made["kto"](
        pi[0], pi[0] - 1, mx.ones(12), made["kto_z"](other, other - 3, 0.1), 0.1, 1.0, 1.0).sum())(other)
    assert mx.array_equal(gradient, mx.zeros(12))


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


@pytest.mark.parametrize("tie", [True, False])
def test_logits_in_parts(monkeypatch, tie):
    """Log-probabilities and gradients do not depend on how many logits are in memory at a time."""
    model = GPT(GPTConfig(block_size=64, vocab_size=320, n_layer=1, n_head=2, n_embd=32, tie=tie), seed=1).train()
    ids, learned = mx.random.randint(0, 320, (3, 21), key=mx.random.key(1)), mx.ones((3, 21))
    found = []
    for chunk in (320 * 7, 320 * 1000):  # parts of 7 of the 60 rows of logits, or all
        monkeypatch.setitem(made, "LOSS_CHUNK", chunk)
        values, gradients = nn.value_and_grad(model, lambda: (
            made["answer_log_probs"](model, ids, learned) * mx.array([1.0, -2.0, 0.5])).sum())()
        found.append({"value": values, **dict(tree_flatten(gradients))})
    plain = nn.value_and_grad(model, lambda: -(cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
                                               .reshape(3, 20).sum(1) * mx.array([1.0, -2.0, 0.5])).sum())()
    for name, array in {"value": plain[0], **dict(tree_flatten(plain[1]))}.items():
        for one in found:
            np.testing.assert_allclose(np.array(one[name]), np.array(array), rtol=1e-4, atol=1e-5, err_msg=name)


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
    done = prepared.run([sys.executable, ROOT / "dpo.py", folder / "base.safetensors", f"--data={pairs}",
                         f"--out_dir={out}", "--epochs=20", "--eval_interval=20", "--learning_rate=3e-3",
                         "--template=plain", *arguments])
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
    (["--loss=robust", "--label_smoothing=0.1", "--base_bits=8"], math.log(2)), (["--loss=simpo", "--beta=2"], None),
    (["--loss=orpo", "--kind=full", "--learning_rate=1e-3"], None),
    (["--loss=dpo", "--precision=fp8", "--optimizer_bits=8"], None),
    (["--loss=dpo", "--kind=full", "--learning_rate=1e-3", "--precision=nvfp4", "--optimizer_bits=4"], None),
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
        meta = load_adapter(model, str(tmp_path / "dpo.safetensors"))
    best = min(held_out[1:], key=lambda row: row["loss"])
    reference, _ = load_checkpoint(str(folder / "base.safetensors"))
    lora.quantize_base(reference, 8 if "--base_bits=8" in arguments else 0)
    if "--loss=kto" in arguments:
        answers = split(read_labelled(str(pairs)), 0.1, 1337)[1]
    else:
        held = split(read_preferences(str(pairs)), 0.1, 1337)[1]
        answers = [pair for prompt, *both in held for pair in zip((prompt, prompt), both, (True, False), strict=True)]
    sums, rewards = {True: [], False: []}, {True: [], False: []}
    for prompt, answer, good in answers:
        talk = [*prompt, {"role": "assistant", "content": answer}]
        ids, learned = (mx.array([x]) for x in encode(ENC, talk, "plain"))
        pi, ref = (made["answer_log_probs"](m, ids, learned).item() for m in (model, reference))
        if "--loss=simpo" in arguments or "--loss=orpo" in arguments:
            rewards[good].append((2 if "--beta=2" in arguments else 0.1) * pi / learned.sum().item())
        else:
            rewards[good].append(0.1 * (pi - ref) / (learned.sum().item() if "--loss=ipo" in arguments else 1))
        sums[good].append(pi)
    assert len(answers) == 8 and meta["losses"]["chosen"] == best["chosen"]
    assert np.mean(sums[True]) == pytest.approx(best["chosen"], rel=1e-3)
    assert np.mean(sums[False]) == pytest.approx(best["rejected"], rel=1e-3)
    assert np.mean(rewards[True]) - np.mean(rewards[False]) == pytest.approx(best["margin"], rel=1e-3)


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_accumulated_gradients_are_those_of_one_batch(folder, pairs, tmp_path, loss):  # noqa: F811
    """For kto only the gradient's norm and loss of the first update, as z is an estimate from one micro-step."""
    for name, sizes in (("one", ["--batch_size=8"]), ("two", ["--batch_size=4", "--grad_accum=2"])):
        dpo(folder, pairs, tmp_path / name, f"--loss={loss}", "--epochs=1", "--log_interval=1",
            "--dtype=float32", *sizes)
    both = [rows_of(tmp_path / name, "train")[:1 if loss == "kto" else 99] for name in ("one", "two")]
    for one, two in zip(*both, strict=True):
        assert [one[name] for name in ("loss", "grad_norm", "margin", "chosen", "rejected")] == pytest.approx(
            [two[name] for name in ("loss", "grad_norm", "margin", "chosen", "rejected")], rel=1e-3, abs=1e-5)


def test_labelled_answers(folder, tmp_path):  # noqa: F811
    """Answers with a label, of which 1 in 4 is good and none is of a pair: their rewards go apart."""
    path = tmp_path / "labelled.jsonl"
    with open(path, "w") as file:
        for i in range(64):
            word = "abcdefgh"[i % 8] * 3
            answer = word if i % 4 else word.upper()
            print(json.dumps({"prompt": f"{i} {word}", "completion": answer, "label": i % 4 == 0}), file=file)
    done = dpo(folder, path, tmp_path / "out", "--loss=kto", "--desirable_weight=3")
    assert "16 desirable" not in done.stdout and "labelled" in done.stdout  # some are held out
    rows = rows_of(tmp_path / "out", "val")
    assert rows[-1]["margin"] > 0.2 and rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert rows[-1]["chosen"] > rows[0]["chosen"] and rows[-1]["rejected"] < rows[0]["rejected"]
    assert "no known layout" in dpo(folder, path, tmp_path / "b", "--loss=dpo", status=2).stderr


def test_soft_labels(folder, tmp_path):  # noqa: F811
    """With the probability 0.2 for all pairs the "rejected" answers win, up to odds of 4."""
    path = tmp_path / "soft.jsonl"
    with open(path, "w") as file:
        for i in range(40):
            word = "abcdefgh"[i % 8] * 3
            print(json.dumps({"prompt": f"{i} {word}", "chosen": word.upper(), "rejected": word, "probability": 0.2}),
                  file=file)
    done = dpo(folder, path, tmp_path / "out", "--loss=dpo_norm", "--beta=5")
    rows = rows_of(tmp_path / "out", "val")
    assert "probability)" in done.stdout and "of mean probability 0.200" in done.stdout
    assert rows[-1]["accuracy"] == 1 and rows[-1]["margin"] == pytest.approx(-math.log(4), abs=0.4)
    entropy = -0.2 * math.log(0.2) - 0.8 * math.log(0.8)
    assert entropy - 1e-4 < rows[-1]["loss"] < entropy + 0.05


def test_chain(folder, pairs, tmp_path):  # noqa: F811
    """dpo.py on the adapter that sft.py left: the reference is the tuned model, and the result finds both bases."""
    sft(folder, tmp_path / "a", "--template=plain", "--epochs=4")
    tuned = tmp_path / "a" / "sft.safetensors"
    dpo(folder, pairs, tmp_path / "b", f"--checkpoint={tuned}", "--epochs=2")
    model, meta = lora.load_adapted(str(tmp_path / "b" / "dpo.safetensors"))
    assert any(os.path.samefile(tuned, path) for path in meta["files"]) and meta["template"] == "plain"
    prompt, chosen, _ = split(read_preferences(str(pairs)), 0.1, 1337)[1][0]
    ids, learned = encode(ENC, [*prompt, {"role": "assistant", "content": chosen}], "plain")
    first, _ = lora.load_adapted(str(tuned))
    found = [made["answer_log_probs"](m, mx.array([ids]), mx.array([learned])).item() for m in (first, model)]
    assert found[1] > found[0]


def test_resume_is_exact(folder, pairs, tmp_path):  # noqa: F811
    settings = "--epochs=4", "--eval_interval=5", "--dropout=0.1", "--log_interval=1"
    dpo(folder, pairs, tmp_path / "whole", *settings)
    for stop in (7, 10):
        out = tmp_path / f"part{stop}"
        (tmp_path / "stop.py").write_text(STOPPED)
        command = [sys.executable, tmp_path / "stop.py", str(stop), ROOT / "dpo.py", folder / "base.safetensors",
                   f"--data={pairs}", f"--out_dir={out}", "--template=plain", "--learning_rate=3e-3", *settings]
        done = subprocess.run(command, capture_output=True, text=True, env=ON_PATH)
        assert done.returncode == 130 and "--resume=True" in done.stdout, done.stderr
        again = prepared.run([sys.executable, ROOT / "dpo.py", f"--out_dir={out}", "--resume=True"])
        assert again.returncode == 0, again.stderr
        assert_equal(tmp_path / "whole", out)


def test_merged(folder, pairs, tmp_path):  # noqa: F811
    dpo(folder, pairs, tmp_path, "--epochs=1", "--merge=True")
    _, meta = load_checkpoint(str(tmp_path / "dpo.safetensors"))
    assert meta["template"] == "plain" and meta["tokenizer"] == ENC.to_dict()


@pytest.mark.parametrize("line, says", [
    ({"prompt": "x", "chosen": "y"}, "no known layout"), ({"chosen": "x", "rejected": "y"}, "do not answer one prompt"),
    ({"prompt": "x", "chosen": "y", "rejected": "y"}, "are equal"), ("{", "no JSON"), ("[] ", "is empty"),
    ({"prompt": "x", "chosen": " ", "rejected": "y"}, "chosen has no answer"),
    ({"prompt": "x", "chosen": "y", "rejected": "z", "probability": 1.5}, "not a number from 0 to 1"),
    ({"prompt": [{"role": "bot", "content": "x"}], "chosen": "x", "rejected": "y"}, "role 'bot' is not"),
    ({"prompt": "x", "chosen": [{"role": "assistant", "content": ""}], "rejected": "y"}, "chosen has no answer"),
], ids=str)
def test_bad_lines(folder, tmp_path, line, says):  # noqa: F811
    path = tmp_path / "bad.jsonl"
    path.write_text(line if isinstance(line, str) else json.dumps(line))
    done = dpo(folder, path, tmp_path / "out", status=2)
    assert str(path) in done.stderr and says in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments, says", [
    (["--loss=ppo"], "loss='ppo'"), (["--beta=0"], "beta=0"), (["--kind=x"], "kind='x'"), (["--data="], "give --data"),
    (["--label_smoothing=0.5"], "label_smoothing"), (["--learning_rate=-1"], "learning_rate=-1.0"),
    (["--min_lr=1e-6"], "share of the peak"), (["--dropout=-0.1"], "dropout"), (["--grad_accum=0"], "grad_accum=0"),
    (["--kind=full", "--base_bits=4"], "packed weights"), (["--precision=fp4"], "precision='fp4'"),
    (["--optimizer_bits=16"], "must be 32"), (["--loss=ipo", "--label_smoothing=0.1"], "ipo has no label_smoothing"),
    (["--gamma=1"], "take another loss (simpo)"), (["--loss=robust"], "needs the assumed share"),
], ids=str)
def test_mistakes(folder, pairs, tmp_path, arguments, says):  # noqa: F811
    assert says in dpo(folder, pairs, tmp_path / "out", *arguments, status=2).stderr


def test_own_template(foreign, folder, pairs, tmp_path):  # noqa: F811
    """With the template that came with a model, the default length of a large context, and one that is given."""
    done = dpo(folder, pairs, tmp_path / "a", f"--checkpoint={foreign}", "--template=", "--epochs=1")
    assert re.search(r">>>[A-Z]{3}<\|im_end\|><<<", done.stdout)
    assert "<|im_start|>system\nYou are a test." in done.stdout
    assert json.loads(mx.load(str(tmp_path / "a" / "dpo.safetensors"), return_metadata=True)[1]["tinygpt"])[
        "template"] == "own"
    short = dpo(folder, pairs, tmp_path / "b", f"--checkpoint={foreign}", "--template=", "--block_size=10", status=2)
    assert "fits into 10 tokens: give a larger --block_size" in short.stderr
