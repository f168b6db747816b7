"""reward.py and reward_model.py: the loss against TRL's; calibration by hand; run as a user runs it; bad input."""
import csv
import json
import sys

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
import prepared
import pytest
from conftest import ROOT
from test_dpo import pairs  # noqa: F401  (preferences: the answer in capitals is the better one)
from test_sft import folder  # noqa: F401  (a checkpoint)

import reward_model
from config import UserError
from conversations import encode
from lora import load_adapted, save_merged
from model import GPT, GPTConfig
from records import read_preferences, split
from tokenizer import byte_tokenizer

SOURCE = (ROOT / "reward.py").read_text()
made = {"mx": mx, "np": np}
exec(SOURCE[SOURCE.index("# ---- loss, and"):SOURCE.index("# ---- resume")], made)  # the section stands by itself
TRL = dict(np.load(ROOT / "tests" / "fixtures" / "rewards.npz"))


@pytest.mark.parametrize("name, center", [("plain", 0.0), ("center", 0.1), ("margin", 0.05)])
def test_loss_of_trl(name, center):
    both = mx.array(np.stack([TRL["chosen"], TRL["rejected"]]).astype(np.float32))
    margin = mx.array(TRL["margin"].astype(np.float32)) * (name == "margin")
    value, gradient = mx.value_and_grad(lambda r: made["bradley_terry"](*r, margin, center).mean())(both)
    assert value.item() == pytest.approx(float(TRL[f"reward.{name}.loss"]), rel=1e-5)
    np.testing.assert_allclose(np.array(gradient), TRL[f"reward.{name}.gradient"], rtol=1e-4, atol=1e-6)


def test_reliability():
    """Against a loop; and a model whose differences are the true log-odds has no error but that of the draws."""
    rng = np.random.default_rng(0)
    odds = rng.normal(0, 2, 4000)
    differences = np.where(rng.uniform(size=4000) < 1 / (1 + np.exp(-odds)), odds, -odds)  # of the chosen answer
    bins, error = made["reliability"](differences)
    assert sum(one["pairs"] for one in bins) == 4000 and error < 0.03
    assert made["reliability"](3 * differences)[1] > 0.08 and made["reliability"](-differences)[1] > 0.3
    wanted = 0.0
    for i in range(10):
        some = [d for d in differences if i == min(9, int((1 / (1 + np.exp(-abs(d))) - 0.5) * 20))]
        sure, right = np.mean([1 / (1 + np.exp(-abs(d))) for d in some]), np.mean([d > 0 for d in some])
        wanted += len(some) / 4000 * abs(sure - right)
        assert bins[i]["confidence"] == pytest.approx(sure) and bins[i]["accuracy"] == pytest.approx(right)
    assert error == pytest.approx(wanted)
    assert made["reliability"](np.zeros(4)) == ([{"from": 0.5, "to": 0.55, "pairs": 4, "confidence": 0.5,
                                                  "accuracy": 0.5}], 0.0)


def reward(folder, pairs, out, *arguments, status=0):  # noqa: F811
    done = prepared.run([sys.executable, ROOT / "reward.py", folder / "base.safetensors", f"--data={pairs}",
                         f"--out_dir={out}", "--epochs=6", "--eval_interval=6", "--log_interval=1",
                         "--learning_rate=1e-2", "--template=plain", *arguments])
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and (not status or done.stderr.count("\n") == 1), done.stderr
    return done


def rows_of(out, column="val_loss") -> list[dict]:
    with open(out / "loss.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)
                if row[column]]


@pytest.mark.parametrize("arguments", [["--kind=full", "--learning_rate=2e-3", "--center=0.01"],
                                       ["--kind=lora", "--base_bits=8"]], ids=lambda argument: argument[0])
def test_learns(folder, pairs, tmp_path, arguments):  # noqa: F811
    """It is right about pairs that it never saw, and the file gives the rewards of which loss.csv tells."""
    done = reward(folder, pairs, tmp_path, *arguments)
    first, *_, last = rows_of(tmp_path)
    assert first["val_loss"] == pytest.approx(np.log(2)) and first["accuracy"] == 0.5 and last["accuracy"] == 1
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("loss.png", "calibration.png"))
    best = min(rows_of(tmp_path)[1:], key=lambda row: row["val_loss"])
    path, held_out = str(tmp_path / "reward.safetensors"), split(read_preferences(str(pairs)), 0.1, 1337)[1]
    better, worse = (np.array(reward_model.load(path)([pair[0] for pair in held_out], [pair[i] for pair in held_out]))
                     for i in (1, 2))
    assert (better > worse).all() and "4 pairs, calibration error" in done.stdout
    assert (better - worse).mean() == pytest.approx(best["margin"], rel=1e-3)
    with pytest.raises(UserError, match="is a reward model, which does not write"):
        load_adapted(path)
    with pytest.raises(UserError, match="base.safetensors is no reward model"):
        reward_model.load(str(folder / "base.safetensors"))
    with open(tmp_path / "calibration.csv", newline="") as file:
        assert sum(int(row["pairs"]) for row in csv.DictReader(file)) == 4


def test_score_is_that_of_the_last_token(folder, tmp_path):  # noqa: F811
    """w . h in float64 of one conversation alone, for conversations of several lengths, in the order of the question;
    the end token is read. Variants work, too."""
    enc = byte_tokenizer()
    for variant in ({}, dict(yoco=True, sliding_window=8, n_expert=2, ffn_dim=32), dict(mod="topk")):
        config = dict(block_size=64, vocab_size=320, n_layer=2, n_head=2, n_embd=32) | variant
        model, path = GPT(GPTConfig(**config), seed=1), str(tmp_path / "model.safetensors")
        weight = mx.random.normal((32,), key=mx.random.key(1))
        model.eval()
        save_merged(path, model, {"tokenizer": enc.to_dict(), "template": "plain", "reward": {}},
                    {"reward.weight": weight})
        talks = [("2 + 2", "four"), ("a", "b"), ("a longer question", "and a longer answer")]
        found = reward_model.load(path)([[{"role": "user", "content": q}] for q, _ in talks], [a for _, a in talks])
        for (question, answer), value in zip(talks, found, strict=True):
            ids, _ = encode(enc, [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
                            "plain")
            assert ids[-1] == 256
            hidden = np.array(model.norm(model.residual(mx.array([ids])))[0, -1], np.float64)
            assert value == pytest.approx(hidden @ np.array(weight, np.float64), rel=1e-4, abs=1e-5), variant


def test_margins(folder, pairs, tmp_path):  # noqa: F811
    """The margin of a row stands in the loss: at first, where all rewards are 0, that is log(1 + e^margin)."""
    rows = [json.loads(line) | ({"margin": i % 3} if i % 3 else {}) for i, line in enumerate(open(pairs))]
    path = tmp_path / "margins.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward(folder, path, tmp_path / "a", "--val_share=0.5", "--epochs=1", "--batch_size=40", "--learning_rate=0")
    train, val = (row[f"{which}_loss"] * 20 for which in ("train", "val") for row in rows_of(
        tmp_path / "a", f"{which}_loss")[:1])
    assert train + val == pytest.approx(sum(np.log1p(np.exp(row.get("margin", 0))) for row in rows), rel=1e-4)
    path.write_text(json.dumps(rows[0] | {"margin": "wide"}) + "\n" + path.read_text())
    assert "line 1: the margin is 'wide', not a finite" in reward(folder, path, tmp_path / "b", status=2).stderr


@pytest.mark.parametrize("arguments, says", [
    (["--data="], "no pairs"), (["--kind=x"], "kind='x'"), (["--center=-1"], "center=-1.0"),
    (["--block_size=5"], "no training pair fits"), (["--learning_rate=nan"], "learning_rate=nan"),
    (["--rank=4", "--kind=full"], "rank has no effect with --kind=full"),
    (["--kind=full", "--base_bits=4"], "packed weights do not train"), (["--resume=True"], "no checkpoint"),
], ids=str)
def test_mistakes(folder, pairs, tmp_path, arguments, says):  # noqa: F811
    assert says in reward(folder, pairs, tmp_path / "out", *arguments, status=2).stderr
    assert not (tmp_path / "out").exists()


def test_not_finite(folder, pairs, tmp_path):  # noqa: F811
    told = reward(folder, pairs, tmp_path, "--kind=full", "--learning_rate=1e30", "--grad_clip=0", status=2).stderr
    assert "the loss" in told and "is nan" in told and "try a smaller learning_rate" in told
