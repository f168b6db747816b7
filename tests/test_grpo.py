"""grpo.py: losses against TRL's, against closed forms and an enumerated bandit; run as a user runs it; bad input."""
import csv
import itertools
import json
import math
import re
import subprocess
import sys

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import prepared
import pytest
from conftest import ROOT, load_adapter
from mlx.utils import tree_flatten
from test_sft import ON_PATH, STOPPED

import lora
import rollouts
import tasks
from conversations import encode, encode_prompt
from model import GPT, GPTConfig, load_checkpoint, save_checkpoint
from tokenizer import byte_tokenizer

ENC = byte_tokenizer()
SOURCE = (ROOT / "grpo.py").read_text()
made = {"mx": mx, "np": np}
exec(SOURCE[SOURCE.index("# ---- losses"):SOURCE.index("# ---- resume")], made)  # the section stands by itself
TRL = dict(np.load(ROOT / "tests" / "fixtures" / "grpo.npz"))
NAMES = [name.removesuffix(".off.loss") for name in TRL if name.endswith(".off.loss")]
CLIPS = {"grpo.wide": (0.1, 0.5), "gspo.wide": (0.1, 0.1)}


def loss_of(loss: str, pi, old, advantage, mask, low=0.2, high=0.2, max_length=9, ref=None, kl=0.0):
    """The loss of an update, as grpo.py sums it."""
    each, _ = made["token_losses"](loss, pi, old, advantage, mask, low, high)
    if ref is not None:
        each = each + kl * made["divergence"](pi, ref)
    return (mx.array(made["weights"](loss, np.array(mask), max_length).astype(np.float32)) * each).sum()


# ---- TRL -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["off", "on"])
@pytest.mark.parametrize("name", NAMES)
def test_losses_of_trl(name, policy):
    """Loss and gradient; "on": the first update, where the policy is the one that answered."""
    pi, old, ref, mask, advantage = (mx.array(TRL[key].astype(np.float32))
                                     for key in ("pi", "old", "ref", "mask", "advantages"))
    old, loss = old if policy == "off" else pi, name.split(".")[0]
    low, high = CLIPS.get(name, made["LOSSES"][loss])
    found, gradient = mx.value_and_grad(lambda pi: loss_of(
        loss, pi, old, advantage, mask, low, high, int(TRL["max_length"]), ref if ".kl" in name else None, 0.1))(pi)
    assert found.item() == pytest.approx(float(TRL[f"{name}.{policy}.loss"]), rel=2e-4, abs=2e-6)
    np.testing.assert_allclose(np.array(gradient), TRL[f"{name}.{policy}.gradient"], rtol=2e-3, atol=2e-6)


def test_penalty_of_trl():
    found = [made["overlong_penalty"](n, 10, 4) for n in range(11)]
    np.testing.assert_allclose(found, TRL["overlong"])
    assert found[6] == 0 and found[7] == -0.25 and found[10] == -1 and made["overlong_penalty"](10, 10, 0) == 0


def test_fixture_clips():
    """The tensors of the fixture reach both ends of the clip, with advantages of both signs."""
    ratio = np.exp(TRL["pi"] - TRL["old"])[TRL["mask"] == 1]
    assert ratio.min() < 0.7 and ratio.max() > 1.4 and TRL["advantages"].min() < -0.3 and TRL["advantages"].max() > 0.3


# ---- advantages, and closed forms ------------------------------------------------------------------------------------


def test_advantages():
    rewards = np.random.default_rng(0).normal(size=(5, 4))
    for p, i in itertools.product(range(5), range(4)):
        own, others = rewards[p], np.delete(rewards[p], i)
        deviation = math.sqrt(sum((r - own.mean())**2 for r in own) / 3)
        wanted = {"grpo": (own[i] - own.mean()) / (deviation + 1e-4), "dr_grpo": own[i] - own.mean(),
                  "rloo": own[i] - others.mean(), "reinforce": own[i] - rewards.mean()}
        wanted |= {"dapo": wanted["grpo"], "gspo": wanted["grpo"]}
        for loss, value in wanted.items():
            assert made["advantages"](loss, rewards)[p, i] == pytest.approx(value), loss


@pytest.mark.parametrize("loss", made["LOSSES"])
def test_equal_rewards_teach_nothing(loss):
    found = made["advantages"](loss, np.full((3, 4), 0.7))
    np.testing.assert_allclose(found, 0, atol=1e-12)


@pytest.mark.parametrize("loss", made["LOSSES"])
def test_on_policy_gradient(loss):
    """In the first update the gradient for each log-probability is -A times its weight, with no trace of the ratio:
    for dr_grpo that is REINFORCE with the mean of the group as baseline, up to a constant."""
    rng = np.random.default_rng(1)
    mask = (np.arange(5) < rng.integers(1, 6, (8, 1))).astype(np.float32)
    rewards, pi = rng.normal(size=(2, 4)), mx.array(-rng.uniform(0.1, 3, (8, 5)).astype(np.float32))
    advantage = made["advantages"](loss, rewards).flatten()
    gradient = mx.grad(lambda pi: loss_of(loss, pi, mx.stop_gradient(pi), mx.array(advantage.astype(np.float32)),
                                          mx.array(mask)))(pi)
    lengths = mask.sum(1, keepdims=True)
    per_token = {"dapo": mask / mask.sum(), "dr_grpo": mask / (8 * 9), "reinforce": mask / 8}
    per_token |= {"grpo": mask / (8 * lengths), "gspo": mask / (8 * lengths), "rloo": mask / 8}
    np.testing.assert_allclose(np.array(gradient), -advantage[:, None] * per_token[loss], rtol=1e-5, atol=1e-7)
    baseline = np.repeat(rewards.mean(1), 4)
    if loss == "dr_grpo":
        np.testing.assert_allclose(np.array(gradient) * 9, -(rewards.flatten() - baseline)[:, None] * mask / 8,
                                   rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss, factor", [("dr_grpo", 2 / 3), ("rloo", 1), ("grpo", None)])
def test_bandit(loss, factor):
    """Two tokens of reward 1 and 0, three answers of one token: the expectation over all 8 outcomes. The gradient of
    the expected reward is p (1 - p) for the first token's logit. rloo is unbiased, dr_grpo (G - 1) / G of it; grpo,
    whose deviation depends on the outcome, is known by the sum."""
    logit = mx.array([0.4, -0.3])
    p = np.exp(0.4) / (np.exp(0.4) + np.exp(-0.3))
    expected, by_hand = 0.0, 0.0
    for outcome in itertools.product((0, 1), repeat=3):
        rewards = np.array([[1.0 - token for token in outcome]])
        chance = np.prod([p if token == 0 else 1 - p for token in outcome])
        advantage = made["advantages"](loss, rewards).flatten()
        tokens, ones = mx.array(outcome)[:, None], mx.ones((3, 1))

        def of(logit, tokens=tokens, advantage=advantage, ones=ones):
            pi = (logit - mx.logsumexp(logit))[tokens]
            return loss_of(loss, pi, mx.stop_gradient(pi), mx.array(advantage.astype(np.float32)), ones, max_length=1)

        expected += chance * -mx.grad(of)(logit)[0].item()
        by_hand += chance * np.mean([a * ((token == 0) - p) for a, token in zip(advantage, outcome, strict=True)])
    assert expected == pytest.approx(by_hand, rel=1e-4)
    if factor:
        assert expected == pytest.approx(factor * p * (1 - p), rel=1e-4)
    else:  # (1, 1, 0) and (1, 0, 0), with chances 3 p^2 q and 3 p q^2, both have the deviation 1 / sqrt(3)
        assert expected == pytest.approx(2 * p * (1 - p) / (3 * (3**-0.5 + 1e-4)), rel=1e-4)


def test_divergence():
    """It is never negative, 0 for equal ones, and its mean over tokens of pi is KL(pi || ref), here by enumeration."""
    rng = np.random.default_rng(2)
    pi, ref = (np.log(rng.dirichlet(np.ones(6))) for _ in range(2))
    each = np.array(made["divergence"](mx.array(pi.astype(np.float32)), mx.array(ref.astype(np.float32))))
    assert each.min() >= 0 and (np.exp(pi) * each).sum() == pytest.approx((np.exp(pi) * (pi - ref)).sum(), rel=1e-4)
    assert made["divergence"](mx.array([-1.0]), mx.array([-1.0])).item() == 0


def test_log_probs_and_entropy():
    """Against softmax in float64, one answer at a time without padding: the end token counts, padding does not."""
    model = GPT(GPTConfig(block_size=32, vocab_size=320, n_layer=2, n_head=2, n_embd=32), seed=1).eval()
    asked, answers, n_vocab, t = [[256, 5, 6], [256, 7, 8, 9, 1]], [[65, 66, 256], [70, 256]], 257, 0.7
    arrays = rollouts.arrays_of(asked, answers)
    ids, places, targets = (mx.array(arrays[name]) for name in ("ids", "places", "targets"))
    pi, entropy = rollouts.log_probs(model, rollouts.states(model, ids, places), targets, t, n_vocab)
    for i, (prompt, answer) in enumerate(zip(asked, answers, strict=True)):
        assert arrays["mask"][i].tolist() == [1] * len(answer) + [0] * (3 - len(answer))
        for j, token in enumerate(answer):
            logits = np.array(model(mx.array([prompt + answer[:j]]))[0, -1], np.float64)[:n_vocab] / t
            p = np.exp(logits) / np.exp(logits).sum()
            assert pi[i, j].item() == pytest.approx(np.log(p[token]), rel=1e-4)
            assert entropy[i, j].item() == pytest.approx(-(p * np.log(p)).sum(), rel=1e-4)


# ---- the script ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint that copies some of its letters: it is right now and then."""
    folder = tmp_path_factory.mktemp("grpo")
    model = GPT(GPTConfig(block_size=48, vocab_size=320, n_layer=2, n_head=2, n_embd=48), seed=1)
    optimizer = optim.Adam(3e-3)
    step = nn.value_and_grad(model, lambda x, mask: model.loss(x[:, :-1], x[:, 1:], mask))
    learned = tasks.problems("copy", range(2, 3), 1, 400)
    for i in range(70):
        rows, masks = np.zeros((16, 24), np.int32), np.zeros((16, 23), np.float32)
        for row, one in enumerate(learned[j] for j in np.random.default_rng(i).integers(len(learned), size=16)):
            talk = [{"role": "user", "content": one.prompt}, {"role": "assistant", "content": one.answer}]
            ids, yes = encode(ENC, talk, "plain")
            rows[row, :len(ids)], masks[row, :len(ids) - 1] = ids, yes[1:]
        _, gradients = step(mx.array(rows), mx.array(masks))
        optimizer.update(model, gradients)
        mx.eval(model.parameters())
    save_checkpoint(str(folder / "base.safetensors"), model, {"tokenizer": ENC.to_dict(), "script": "train.py"})
    return folder


FAST = ["--max_new_tokens=4", "--eval_problems=32", "--log_interval=1", "--learning_rate=1e-2", "--template=plain",
        "--samples=1", "--pass_k=4"]


@pytest.fixture(scope="module")
def half(folder):
    """Problems whose answers must be of the first half of the alphabet."""
    with open(folder / "half.jsonl", "w") as file:
        for prompt in map("".join, itertools.product("abcdefghijklmnopqrstuvwxyz", "aeimquy")):
            print(json.dumps({"prompt": f"copy {prompt}", "pattern": "[a-m][a-m]"}), file=file)
    return f"--data={folder / 'half.jsonl'}"


def grpo(folder, out, *arguments, status=0):
    done = prepared.run([sys.executable, ROOT / "grpo.py", folder / "base.safetensors", *FAST, f"--out_dir={out}",
                         *arguments])
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and (not status or done.stderr.count("\n") == 1), done.stderr
    return done


def rows_of(out) -> list[dict]:
    with open(out / "loss.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


@pytest.mark.parametrize("arguments", [
    ["--loss=grpo", "--kind=full", "--minibatches=2", "--learning_rate=1e-3"],
    ["--loss=dapo", "--dynamic=True", "--refills=3", "--overlong=2", "--base_bits=8"],
    ["--loss=dr_grpo", "--kl=0.01", "--kind=dora", "--passes=2"], ["--loss=gspo", "--minibatches=2"],
    ["--loss=rloo", "--kl=0.01"], ["--loss=reinforce"],
], ids=lambda argument: argument[0][7:])
def test_learns(folder, half, tmp_path, arguments):
    """More problems that it never saw are answered right, by the file that is left too."""
    done = grpo(folder, tmp_path, half, "--max_iters=16", "--eval_interval=16", *arguments)
    rows = rows_of(tmp_path)
    (first, last), steps = [row for row in rows if "val_pass1" in row], [row for row in rows if "reward" in row]
    assert first["val_pass1"] < 0.5 and last["val_pass1"] > first["val_pass1"] + 0.25
    assert max(len(line) for line in done.stdout.splitlines() if line.startswith("step ")) <= 80
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "source" / "tasks.py").exists()
    assert first["val_pass1"] <= first["val_passk"] and steps[-1]["step"] == 16
    if "--dynamic=True" in arguments:
        assert last["rollouts"] >= 16 * 128 and any(row["reward"] < row["right"] for row in steps)
    else:
        assert last["rollouts"] == 16 * 128 and all(row["reward"] == row["right"] for row in steps)
    if "--kl=0.01" in arguments:
        assert steps[-1]["kl"] > 1e-4
    several = "--minibatches=2" in arguments or "--passes=2" in arguments
    assert (max(row["clipped"] for row in steps) > 0) == several
    model, meta = lora.load_adapted(str(tmp_path / "grpo.safetensors"))
    asked = sorted({f"copy {a}{b}" for a, b in itertools.product("abcdefghijklmnopqrstuvwxyz", "aeimquy")})
    held_out = [asked[i] for i in np.random.default_rng(1337).permutation(len(asked))[:18]]
    right = 0
    for prompt in held_out:
        ids = encode_prompt(ENC, [{"role": "user", "content": prompt}], "plain")
        for _ in range(3):
            ids.append(int(mx.argmax(model(mx.array([ids]))[0, -1, :257]).item()))
        right += bool(re.fullmatch("[a-m][a-m]", ENC.decode(ids[-3:-1]))) and ids[-1] == 256
    assert f"{len(held_out)} problems held out" in done.stdout and meta["template"] == "plain"
    assert right / len(held_out) > first["val_pass1"] + 0.2


def test_reference_is_the_base(folder):
    """Without its adapter a model is its base to the last bit, packed or not, and afterwards itself again."""
    x = mx.array([[256, 5, 6, 7]])
    for bits in (0, 4):
        model, _ = load_checkpoint(str(folder / "base.safetensors"))
        lora.quantize_base(model, bits)
        base = model(x)
        lora.attach(model, "attn, mlp", 4, 8, "dora", 0)
        for _, module in model.named_modules():
            if isinstance(module, lora.Adapter):
                module.b, module.m = mx.random.normal(module.b.shape), module.m * 1.5
        trained = model(x)
        assert not mx.allclose(base, trained)
        with lora.without_adapters(model):
            assert mx.array_equal(model(x), base)
        assert mx.array_equal(model(x), trained)


@pytest.mark.parametrize("arguments", [["--kind=lora"], ["--kind=full"]], ids=lambda argument: argument[0][7:])
def test_divergence_at_the_start(folder, half, tmp_path, arguments):
    """The reference is the model itself before the first update, also where a run goes on."""
    settings = half, "--kl=0.5", "--max_iters=2", "--eval_interval=2", *arguments
    grpo(folder, tmp_path / "a", *settings)
    first, second = [row["kl"] for row in rows_of(tmp_path / "a") if "kl" in row]
    assert abs(first) < 1e-7 and second > 1e-6
    grpo(folder, tmp_path / "b", *settings, "--max_iters=1")
    again = prepared.run([sys.executable, ROOT / "grpo.py", f"--out_dir={tmp_path / 'b'}", "--resume=True",
                          "--max_iters=2"])
    assert again.returncode == 0, again.stderr
    assert [row["kl"] for row in rows_of(tmp_path / "b") if "kl" in row][-1] > 1e-6


def test_accumulated_gradients_are_those_of_one_batch(folder, half, tmp_path):
    for size in (128, 48):
        grpo(folder, tmp_path / f"{size}", half, "--loss=dapo", "--max_iters=1", f"--batch_size={size}",
             "--minibatches=2", "--eval_interval=9")
    (one,), (other,) = ([row for row in rows_of(tmp_path / f"{size}") if "reward" in row] for size in (128, 48))
    names = ["reward", "train_loss", "grad_norm", "entropy", "length", "clipped"]
    assert [one[name] for name in names] == pytest.approx([other[name] for name in names], rel=1e-3, abs=1e-5)


def test_compiled(folder, half, tmp_path):
    """As on a GPU: all steps have one shape, and the figures are those of the plain step."""
    for name in ("True", "False"):
        grpo(folder, tmp_path / name, half, f"--compile={name}", "--max_iters=1", "--batch_size=48", "--kind=full",
             "--eval_interval=9", "--eval_problems=4")
    (one,), (other,) = ([row for row in rows_of(tmp_path / name) if "reward" in row] for name in ("True", "False"))
    names = ["reward", "train_loss", "grad_norm", "entropy", "length"]
    assert [one[name] for name in names] == pytest.approx([other[name] for name in names], rel=1e-4, abs=1e-6)


def test_resume_is_exact(folder, tmp_path):
    settings = ["--task=copy", "--difficulty=2", "--max_iters=6", "--eval_interval=4", "--minibatches=2", "--kl=0.01",
                "--dynamic=True", "--refills=2"]
    grpo(folder, tmp_path / "whole", *settings)
    out = tmp_path / "part"
    (tmp_path / "stop.py").write_text(STOPPED.replace("train_loss", "entropy"))
    command = [sys.executable, tmp_path / "stop.py", "3", ROOT / "grpo.py", folder / "base.safetensors",
               *FAST, f"--out_dir={out}", *settings]
    done = subprocess.run(command, capture_output=True, text=True, env=ON_PATH)
    assert done.returncode == 130 and "--resume=True" in done.stdout, done.stderr
    again = prepared.run([sys.executable, ROOT / "grpo.py", f"--out_dir={out}", "--resume=True"])
    assert again.returncode == 0, again.stderr
    assert_same_rows(tmp_path / "whole", out)
    changed = prepared.run([sys.executable, ROOT / "grpo.py", f"--out_dir={out}", "--resume=True", "--loss=dapo"])
    assert changed.returncode == 2 and "loss is 'grpo'" in changed.stderr


def assert_same_rows(one, other):
    """Equal weights, optimizers and rows, apart from seconds and memory."""
    for name in ("grpo", "resume"):
        a, b = (mx.load(str(out / f"{name}.safetensors")) for out in (one, other))
        assert a.keys() == b.keys() and all(mx.array_equal(a[key], b[key]) for key in a)
    left_out = {"seconds", "sampling_s", "learning_s", "peak_gib"}
    a, b = ([{name: x for name, x in row.items() if name not in left_out} for row in rows_of(out)]
            for out in (one, other))
    assert a == b and len(a) > 7


def test_own_reward(folder, tmp_path):
    """A reward that a user wrote, for problems of a file: here for short answers."""
    with open(tmp_path / "own.jsonl", "w") as file:
        for i in range(40):
            print(json.dumps({"prompt": f"copy {i:02}"}), file=file)
    (tmp_path / "own.py").write_text("def reward(prompt, answer):\n    return 1 - len(answer) / 4\n")
    own = [f"--data={tmp_path / 'own.jsonl'}", f"--reward={tmp_path / 'own.py'}"]
    done = grpo(folder, tmp_path / "out", *own, "--max_iters=12", "--eval_interval=12")
    first, last = [row for row in rows_of(tmp_path / "out") if "val_reward" in row]
    assert last["val_reward"] > first["val_reward"] + 0.2 and last["val_length"] < first["val_length"] - 0.5
    assert "4 problems held out, 36 for training" in done.stdout
    (tmp_path / "own.py").write_text("def reward(prompt, answer):\n    return 1 / 0\n")
    again = prepared.run([sys.executable, ROOT / "grpo.py", f"--out_dir={tmp_path / 'out'}", "--resume=True",
                          "--max_iters=13"])
    assert again.returncode == 2 and "own.py has changed since" in again.stderr
    told = grpo(folder, tmp_path / "b", *own, status=2).stderr
    assert re.search(r"own.py, line 2: reward\(\) raised ZeroDivisionError: division by zero for the answer '.*' to "
                     r"the prompt 'copy \d\d'\n$", told)


def test_not_finite(folder, half, tmp_path):
    """A model that has no finite loss ends the run with one line."""
    model, meta = load_checkpoint(str(folder / "base.safetensors"))
    model.norm.weight = mx.full(model.norm.weight.shape, 3e38)
    save_checkpoint(str(tmp_path / "base.safetensors"), model, meta)
    told = grpo(tmp_path, tmp_path / "out", half, "--kind=full", "--max_iters=9", status=2).stderr
    assert re.search(r"step 1: the loss is \S+, the gradient's norm \S+; no step was saved: try a smaller", told)


@pytest.mark.parametrize("arguments, says", [
    (["--loss=ppo"], "loss='ppo'"), (["--task=srot"], "did you mean sort"), (["--group=1"], "group=1"),
    (["--kind=x"], "kind='x'"), (["--kl=-1"], "kl, clip_low"), (["--loss=reinforce", "--passes=2"], "has no ratio"),
    (["--loss=reinforce", "--clip_low=0.1"], "clip_low has no effect with"), (["--temperature=0"], "over 0"),
    (["--refills=3"], "without --dynamic"), (["--rank=4", "--kind=full"], "rank has no effect with --kind=full"),
    (["--overlong=9"], "overlong=9"), (["--minibatches=999"], "only 128 answers"),
    (["--success=0.5"], "without --reward"),
    (["--max_new_tokens=40"], "has room for 8"), (["--data=x.jsonl", "--task=sort"], "one of them"),
    (["--reward=nowhere.py"], "there is no file nowhere.py"), (["--difficulty=x"], "difficulty='x'"),
    (["--eval_problems=5000"], "not so many problems"), (["--val_data=x"], "without --data"),
    (["--data=x.jsonl", "--difficulty=2"], "difficulty has no effect with --data"),
], ids=str)
def test_mistakes(folder, tmp_path, arguments, says):
    task = [] if "--data=" in " ".join(arguments) else ["--task=copy", "--difficulty=2"]
    assert says in grpo(folder, tmp_path / "out", *task, *arguments, status=2).stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("variant", [
    dict(n_expert=4, ffn_dim=32), dict(mod="topk"), dict(sliding_window=8, sinks=2), dict(yoco=True, diff_attn=True),
    dict(pos="learned", norm="layer", mlp="gelu", bias=True, tie=False, softcap=20.0)], ids=str)
def test_variants(folder, half, tmp_path, variant):
    """Every kind of model takes a step, with the reference and a second update."""
    config = dict(block_size=48, vocab_size=320, n_layer=2, n_head=2, n_embd=32) | variant
    save_checkpoint(str(tmp_path / "base.safetensors"), GPT(GPTConfig(**config), seed=1), {"tokenizer": ENC.to_dict()})
    (tmp_path / "own.py").write_text("def reward(prompt, answer):\n    return answer.count('a') - len(answer)\n")
    grpo(tmp_path, tmp_path / "out", half, f"--reward={tmp_path / 'own.py'}", "--max_iters=1", "--minibatches=2",
         "--kl=0.1", "--prompts=4", "--eval_problems=4", "--targets=attn")
    row = next(row for row in rows_of(tmp_path / "out") if "reward" in row)
    assert row["signal"] > 0 and row["grad_norm"] > 0 and row["kl"] >= 0


def test_several_adapters(folder, half, tmp_path):
    """The adapter that one run left is the beginning of the next one, and finds both bases."""
    grpo(folder, tmp_path / "a", half, "--max_iters=4", "--eval_interval=4")
    grpo(folder, tmp_path / "b", half, f"--checkpoint={tmp_path / 'a' / 'grpo.safetensors'}", "--max_iters=1",
         "--eval_interval=9")
    last, first = rows_of(tmp_path / "a")[-1], rows_of(tmp_path / "b")[0]
    assert first["val_pass1"] == pytest.approx(last["val_pass1"], abs=0.02)
    model, meta = lora.load_adapted(str(tmp_path / "b" / "grpo.safetensors"))
    assert len(meta["files"]) == 3 and tree_flatten(model.parameters())
    plain, _ = load_checkpoint(str(folder / "base.safetensors"))
    assert load_adapter(plain, str(tmp_path / "a" / "grpo.safetensors"))["template"] == "plain"
