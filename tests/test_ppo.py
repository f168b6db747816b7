"""ppo.py: advantages and losses against TRL's and closed forms; run as a user runs it; bad input."""
import re
import sys

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
import prepared
import pytest
from conftest import ROOT
from test_grpo import ENC, FAST, folder, half, rows_of  # noqa: F401  (folder, half: a checkpoint and problems)

import reward_model
from lora import load_adapted, save_merged
from model import GPT, GPTConfig, load_checkpoint, save_checkpoint

SOURCE = (ROOT / "ppo.py").read_text()
made = {"mx": mx, "np": np}
exec(SOURCE[SOURCE.index("# ---- advantages and"):SOURCE.index("# ---- resume")], made)  # the section stands by itself
TRL = dict(np.load(ROOT / "tests" / "fixtures" / "rewards.npz"))


@pytest.mark.parametrize("name, gamma, lam", [("ppo.plain", 1.0, 0.95), ("ppo.whitened", 0.9, 0.8)])
def test_trl(name, gamma, lam):
    """Rewards of tokens, advantages, returns, both losses, and the gradients of their sum."""
    old, ref, mask, values, score = (TRL[key] for key in ("old", "ref", "mask", "values", "score"))
    rewards = made["token_rewards"](score, old, ref, mask, 0.05)
    if name == "ppo.whitened":
        rewards = made["whiten"](rewards, mask, shift=False)
    np.testing.assert_allclose(rewards, TRL[f"{name}.rewards"], atol=1e-6)
    gained = made["advantages"](rewards, values * mask, mask, gamma, lam)
    whitened = made["whiten"](gained, mask)
    np.testing.assert_allclose(whitened, TRL[f"{name}.advantages"], atol=1e-6)
    np.testing.assert_allclose((gained + values) * mask, TRL[f"{name}.returns"] * mask, atol=1e-6)
    pi, new, old, values, advantage, returns, m = (mx.array(x.astype(np.float32)) for x in (
        TRL["pi"], TRL["new_values"], old, values, whitened, gained + values, mask))

    def loss(pi, new):
        policy, value = made["policy_losses"](pi, old, advantage, 0.2)[0], made["value_losses"](
            new, values, returns, 0.2)
        policy, value = (policy * m).sum() / m.sum(), (value * m).sum() / m.sum()
        return policy + 0.1 * value, policy, value

    found = dict(zip(("loss", "pg_loss", "vf_loss"), (x.item() for x in loss(pi, new)), strict=True))
    assert found == pytest.approx({key: float(TRL[f"{name}.{key}"]) for key in found}, rel=1e-4)
    gradients = mx.grad(lambda *x: loss(*x)[0], (0, 1))(pi, new)
    for key, gradient in zip(("pi", "values"), gradients, strict=True):
        np.testing.assert_allclose(np.array(gradient), TRL[f"{name}.gradient_{key}"], rtol=1e-3, atol=1e-6)


def test_advantages_in_closed_form():
    """gamma = lam = 1: the sum of the later rewards, less the value; lam = 0: one step; else the sum over n of
    (gamma lam)^n d. Nothing comes from beyond an answer's end."""
    rng = np.random.default_rng(1)
    rewards, values = rng.normal(size=(2, 4, 6))
    mask = (np.arange(6) < np.array([[6], [1], [3], [5]])).astype(float)
    for gamma, lam in ((1.0, 1.0), (0.9, 0.0), (0.9, 0.7)):
        found = made["advantages"](rewards, values, mask, gamma, lam)
        for i, t in zip(*np.nonzero(mask), strict=True):
            end = int(mask[i].sum())
            v = [*values[i, :end], 0.0]
            deltas = [rewards[i, s] + gamma * v[s + 1] - v[s] for s in range(end)]
            wanted = sum((gamma * lam)**(s - t) * deltas[s] for s in range(t, end))
            assert found[i, t] == pytest.approx(wanted)
            if lam == 1:
                assert found[i, t] == pytest.approx(rewards[i, t:end].sum() - values[i, t])
        assert (found[mask == 0] == 0).all()


def test_whitened_and_scored_by_the_mask():
    rng = np.random.default_rng(2)
    mask = (np.arange(6) < rng.integers(1, 7, (5, 1))).astype(float)
    x = np.where(mask > 0, rng.normal(3, 2, (5, 6)), 1e6)  # what is beyond the mask must not count
    for shift in (True, False):
        found = made["whiten"](x, mask, shift)
        real = found[mask > 0]
        assert real.std(ddof=1) == pytest.approx(1, abs=1e-6) and (found[mask == 0] == 0).all()
        assert real.mean() == pytest.approx(0 if shift else x[mask > 0].mean(), abs=1e-6)
    rewards = made["token_rewards"](np.arange(1.0, 6), np.zeros((5, 6)), np.zeros((5, 6)), mask, 0.3)
    assert (rewards.sum(1) == np.arange(1, 6)).all() and ((rewards > 0).argmax(1) == mask.sum(1) - 1).all()


def test_weight_of_the_divergence():
    """Ziegler et al. 2019, equation 4: up where the divergence is over the target, by at most 0.2 n / horizon."""
    found = [made["adapted_kl"](0.1, kl, 6.0, 256, 10000) for kl in (6.0, 6.6, 60.0, 0.0)]
    assert found == pytest.approx([0.1, 0.1 * (1 + 0.1 * 0.0256), 0.1 * (1 + 0.2 * 0.0256), 0.1 * (1 - 0.2 * 0.0256)])


# ---- the script ------------------------------------------------------------------------------------------------------


def ppo(folder, out, *arguments, status=0):  # noqa: F811
    done = prepared.run([sys.executable, ROOT / "ppo.py", folder / "base.safetensors", *FAST, f"--out_dir={out}",
                         *arguments])
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and (not status or done.stderr.count("\n") == 1), done.stderr
    return done


@pytest.mark.parametrize("arguments", [
    ["--kind=full", "--kl=0", "--learning_rate=1e-3", "--minibatches=2", "--whiten_rewards=True"],
    ["--kind=lora", "--kl=0.01", "--kl_target=0.5", "--kl_horizon=500", "--base_bits=8"]], ids=lambda a: a[0])
def test_learns(folder, half, tmp_path, arguments):  # noqa: F811
    """More problems that it never saw are answered right, by the file that is left, and the values learn, too."""
    done = ppo(folder, tmp_path, half, "--max_iters=12", "--eval_interval=12", *arguments)
    rows = rows_of(tmp_path)
    (first, last), steps = [row for row in rows if "val_pass1" in row], [row for row in rows if "reward" in row]
    assert first["val_pass1"] < 0.5 and last["val_pass1"] > first["val_pass1"] + 0.2
    assert steps[0]["explained"] == pytest.approx(0, abs=1e-3) and last["rollouts"] == 12 * 128
    assert max(row["clipped"] for row in steps) > 0
    assert steps[-1]["value_loss"] < 0.9 * steps[0]["value_loss"] or "--kind=lora" in arguments
    assert max(len(line) for line in done.stdout.splitlines() if line.startswith("step ")) <= 80
    if "--kl=0" in arguments:
        assert all("kl" not in row for row in steps)
    else:  # the reference is the model itself at first; over the target the weight grows
        assert abs(steps[0]["kl"]) < 1e-5 and steps[-1]["kl"] > 0.5
        weights = [row["kl_weight"] for row in steps]
        assert weights[1] == pytest.approx(0.01 * (1 - 0.2 * 128 / 500)) and weights[-1] > min(weights)
    model, meta = load_adapted(str(tmp_path / "ppo.safetensors"))
    assert meta["template"] == "plain" and "value" not in model


def test_rewards_of_a_model(folder, tmp_path):  # noqa: F811
    """A reward model's rewards are learned, the checker's are shown; with no_end, unfinished answers cost."""
    model, meta = load_checkpoint(str(folder / "base.safetensors"))
    judge = str(tmp_path / "judge.safetensors")
    save_merged(judge, model, {"tokenizer": meta["tokenizer"], "template": "plain", "reward": {}},
                {"reward.weight": mx.random.normal((48,), key=mx.random.key(3))})
    ppo(folder, tmp_path / "a", "--task=copy", "--difficulty=2", f"--reward={judge}", "--max_iters=8", "--kl=0.01",
        "--eval_interval=8", "--no_end=1")
    first, last = [row for row in rows_of(tmp_path / "a") if "val_reward" in row]
    assert last["val_reward"] > first["val_reward"] + 0.5 and 0 < first["val_pass1"] < 1
    ppo(folder, tmp_path / "c", "--task=copy", "--difficulty=2", f"--reward={judge}", "--max_iters=1",
        "--eval_interval=9", "--eval_problems=1")
    with_cost, without = (next(row for row in rows_of(tmp_path / name) if "reward" in row) for name in "ac")
    assert with_cost["truncated"] > 0 and 0 < with_cost["right"] == without["right"] < 1
    assert with_cost["reward"] == pytest.approx(without["reward"] - with_cost["truncated"], rel=1e-4)
    asked = [[{"role": "user", "content": "copy ab"}]]
    assert reward_model.load(judge)(asked, ["ab"])[0] != reward_model.load(judge)(asked, ["ba"])[0]
    told = ppo(folder, tmp_path / "b", "--task=copy", f"--reward={folder / 'base.safetensors'}", status=2).stderr
    assert "base.safetensors is no reward model" in told
    told = ppo(folder, tmp_path / "b", "--task=copy", "--reward=nowhere.safetensors", status=2).stderr
    assert "there is no reward model nowhere.safetensors" in told


def test_accumulated_gradients_are_those_of_one_batch(folder, half, tmp_path):  # noqa: F811
    for size in (128, 48):
        ppo(folder, tmp_path / f"{size}", half, "--max_iters=1", f"--batch_size={size}", "--minibatches=2",
            "--eval_interval=9", "--eval_problems=4", "--value_weight=10")
    (one,), (other,) = ([row for row in rows_of(tmp_path / f"{size}") if "reward" in row] for size in (128, 48))
    names = ["reward", "train_loss", "policy_loss", "value_loss", "grad_norm", "entropy", "clipped", "explained"]
    assert [one[name] for name in names] == pytest.approx([other[name] for name in names], rel=1e-3, abs=1e-5)
    # each update's loss is the mean over its own tokens
    assert one["train_loss"] == pytest.approx(one["policy_loss"] + 10 * one["value_loss"], rel=0.1)


@pytest.mark.parametrize("variant", [dict(n_expert=2, ffn_dim=32, mod="topk", yoco=True, sliding_window=8),
                                     dict(pos="learned", norm="layer", mlp="gelu", bias=True, tie=False)], ids=str)
def test_variants(folder, half, tmp_path, variant):  # noqa: F811
    """Every kind of model takes a step, with the reference and a second update; one that is not finite is told."""
    config = dict(block_size=48, vocab_size=320, n_layer=2, n_head=2, n_embd=32) | variant
    model = GPT(GPTConfig(**config), seed=1)
    (tmp_path / "own.py").write_text("def reward(prompt, answer):\n    return answer.count('a') - len(answer)\n")
    settings = [half, f"--reward={tmp_path / 'own.py'}", "--max_iters=1", "--prompts=8", "--eval_problems=4",
                "--kl=0.1"]
    save_checkpoint(str(tmp_path / "base.safetensors"), model, {"tokenizer": ENC.to_dict()})
    ppo(tmp_path, tmp_path / "out", *settings, "--minibatches=2", "--targets=attn")
    row = next(row for row in rows_of(tmp_path / "out") if "reward" in row)
    assert row["grad_norm"] > 0 and row["value_loss"] > 0
    model.norm.weight = mx.full(model.norm.weight.shape, 3e38)
    save_checkpoint(str(tmp_path / "base.safetensors"), model, {"tokenizer": ENC.to_dict()})
    told = ppo(tmp_path, tmp_path / "bad", *settings, "--kind=full", status=2).stderr
    assert re.search(r"step 1: the loss is \S+, the gradient's norm \S+; no step was saved: try a smaller", told)


@pytest.mark.parametrize("arguments, says", [
    (["--task=srot"], "did you mean sort"), (["--clip=0"], "clip=0"), (["--lam=1.1"], "lam=1.1"),
    (["--kl=-1"], "0 or more"), (["--kl_target=1", "--kl=0"], "kl_target has no effect with --kl=0"),
    (["--kl_horizon=5"], "without --kl_target"), (["--minibatches=999"], "only 128 answers"),
    (["--success=0.5"], "without --reward"), (["--max_new_tokens=40"], "has room for 8"),
    (["--rank=4", "--kind=full"], "rank has no effect with --kind=full"), (["--reward=x.py"], "no file x.py"),
], ids=str)
def test_mistakes(folder, tmp_path, arguments, says):  # noqa: F811
    task = [] if arguments[0].startswith("--task") else ["--task=copy", "--difficulty=2"]
    assert says in ppo(folder, tmp_path / "out", *task, *arguments, status=2).stderr
    assert not (tmp_path / "out").exists()
