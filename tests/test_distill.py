"""distill.py: losses against TRL's and in float64, stored logits, own texts; run as a user runs it; bad input."""
import csv
import math
import subprocess
import sys

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import prepared
import pytest
from conftest import ROOT, run_here
from mlx.utils import tree_flatten, tree_map
from safetensors.numpy import load_file
from test_sft import ON_PATH, STOPPED

import lora
from config import UserError
from model import GPT, GPTConfig, generate, load_checkpoint, save_checkpoint
from score import read_splits
from tokenizer import byte_tokenizer, char_tokenizer

ENC = byte_tokenizer()
SOURCE = (ROOT / "distill.py").read_text()
made = {"mx": mx, "math": math}
exec(SOURCE[SOURCE.index("# ---- losses"):SOURCE.index("# ---- resume")], made)  # the section stands by itself
TRL = dict(np.load(ROOT / "tests" / "fixtures" / "distill.npz"))
divergence, outcomes = made["divergence"], made["outcomes"]


def float32(x) -> mx.array:
    return mx.array(np.asarray(x, np.float32))


# ---- losses ----------------------------------------------------------------------------------------------------------


def test_losses_of_trl():
    """Loss and gradient for the student's logits, with a mask, at two temperatures."""
    V, mask = TRL["student"].shape[-1], float32(TRL["mask"].flatten())
    student, log_p = float32(TRL["student"].reshape(-1, V)), float32(TRL["teacher"].reshape(-1, V))
    names = [name.removesuffix(".loss") for name in TRL if name.endswith(".loss")]
    assert len(names) == 10
    for name in names:
        beta, temperature = float(name[:3]), float(name[4:])

        def loss(z, beta=beta, temperature=temperature):
            each = divergence(outcomes(log_p / temperature, None, V), outcomes(z / temperature, None, V), beta)
            return (each * mask).sum() / mask.sum()

        found, gradient = mx.value_and_grad(loss)(student)
        assert found.item() == pytest.approx(float(TRL[f"{name}.loss"]), rel=2e-4, abs=2e-6), name
        wanted = TRL[f"{name}.gradient"].reshape(-1, V)
        np.testing.assert_allclose(np.array(gradient), wanted, rtol=2e-3, atol=2e-6, err_msg=name)


def test_closed_forms():
    """In float64; the gradient of the forward one is q - p; models that change places mirror it; equal ones have 0."""
    rng = np.random.default_rng(1)
    p, q = rng.dirichlet(np.full(7, 0.5), 4), rng.dirichlet(np.full(7, 0.5), 4)
    kl = lambda a, b: (a * np.log(a / b)).sum(1)  # noqa: E731
    for beta, wanted in ((0, kl(p, q)), (1, kl(q, p)), (0.5, (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2),
                         (0.2, 0.2 * kl(p, 0.2 * p + 0.8 * q) + 0.8 * kl(q, 0.2 * p + 0.8 * q))):
        log_p, log_q = float32(np.log(p)), float32(np.log(q))
        np.testing.assert_allclose(np.array(divergence(log_p, log_q, beta)), wanted, rtol=2e-4, atol=1e-6)
        np.testing.assert_allclose(np.array(divergence(log_q, log_p, 1 - beta)), wanted, rtol=2e-4, atol=1e-6)
        np.testing.assert_allclose(np.array(divergence(log_p, log_p, beta)), 0, atol=1e-6)
    gradient = mx.grad(lambda z: divergence(float32(np.log(p)), outcomes(z, None, 7), 0).sum())(float32(np.log(q)))
    np.testing.assert_allclose(np.array(gradient), q - p, atol=1e-5)


@pytest.mark.parametrize("beta", [0, 0.3, 1])
def test_top_k(beta):
    """Of k tokens and the rest: never more than over all, more with each token, and equal with all of them, also its
    gradient. Padding of the vocabulary is one outcome."""
    rng = np.random.default_rng(2)
    z, t = float32(rng.normal(0, 2, (6, 12))), float32(rng.normal(0, 2, (6, 12)))
    order = mx.argsort(-t, axis=1)

    def loss(z, k=0):
        ids = order[:, :k] if k else None
        log_p = mx.maximum(outcomes(t, ids, 12), -30)
        return divergence(log_p, outcomes(z, ids, 12), beta).sum()

    sizes = [loss(z, k).item() for k in range(1, 13)]
    assert all(a <= b + 1e-5 for a, b in zip(sizes, sizes[1:], strict=False)) and sizes[3] < 0.98 * sizes[-1]
    whole, gradient = mx.value_and_grad(loss)(z)
    assert sizes[-1] == pytest.approx(whole.item(), rel=1e-5)
    np.testing.assert_allclose(np.array(mx.grad(lambda z: loss(z, 12))(z)), np.array(gradient), atol=1e-5)
    padded, p = outcomes(z, None, 9), np.exp(np.array(z, np.float64))
    np.testing.assert_allclose(np.exp(np.array(padded))[:, 9], p[:, 9:].sum(1) / p.sum(1), rtol=1e-5)
    assert padded.shape == (6, 10) and outcomes(z, None, 12).shape == (6, 12)


# ---- the script ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A text, and a teacher of it."""
    folder = tmp_path_factory.mktemp("distill")
    (folder / "text.txt").write_text((ROOT / "LICENSE").read_text() * 3)
    model = GPT(GPTConfig(block_size=32, vocab_size=320, n_layer=2, n_head=2, n_embd=32), seed=1)
    train(model, read_splits(str(folder / "text.txt"), ENC)[0])
    save_checkpoint(str(folder / "teacher.safetensors"), model, {"tokenizer": ENC.to_dict(), "script": "train.py"})
    return folder


def train(model: GPT, text: np.ndarray, steps: int = 80):
    optimizer, step = optim.Adam(5e-3), nn.value_and_grad(model, lambda x: model.loss(x[:, :-1], x[:, 1:]))
    for i in range(steps):
        starts = np.random.default_rng(i).integers(len(text) - 33, size=8)
        _, gradients = step(mx.array(np.stack([text[start:start + 33] for start in starts])))
        optimizer.update(model, gradients)
        mx.eval(model.parameters())


def distill(folder, out, *arguments, teacher="teacher.safetensors", status=0):
    first = [folder / teacher] if teacher else []
    done = prepared.run([sys.executable, ROOT / "distill.py", *first, f"--data={folder / 'text.txt'}",
                         f"--out_dir={out}", "--log_interval=1", "--eval_windows=8", *arguments])
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and (not status or done.stderr.count("\n") == 1), done.stderr
    return done


def column(out, name) -> list[float]:
    with open(out / "loss.csv", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


@pytest.mark.parametrize("arguments", [
    ["--loss=forward", "--compile=True", "--optimizer=adamw"], ["--loss=reverse", "--temperature=2", "--plain=0.3"],
    ["--loss=jsd", "--beta=0.3", "--on_policy=0.5"]], ids=lambda arguments: arguments[0][7:])
def test_learns(folder, tmp_path, arguments):
    """The student comes near the teacher; what is logged holds for the file that is left, by numpy in float64."""
    done = distill(folder, tmp_path, *arguments, "--max_iters=30", "--eval_interval=15")
    kept, val, far = (column(tmp_path, name) for name in ("val_kept", "val_loss", "divergence"))
    assert kept[-1] > kept[0] + 0.03 and far[-1] < 0.6 * far[0] and "as a draft:" in done.stdout
    own = "--on_policy=0.5" in arguments
    assert ("nats    own" in done.stdout) == own and (len(column(tmp_path, "nats")) < 30) == own
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    text = read_splits(str(folder / "text.txt"), ENC)[1]
    rows = np.stack([text[i:i + 33] for i in range(0, len(text) - 32, 32)])
    rows = rows[np.random.default_rng(0).permutation(len(rows))[:8]]
    student, meta = load_checkpoint(str(tmp_path / "distill.safetensors"))
    teacher, _ = load_checkpoint(str(folder / "teacher.safetensors"))
    p, q = (np.exp(np.array(model(mx.array(rows[:, :-1])), np.float64)) for model in (teacher, student))
    p, q = p[..., :257] / p[..., :257].sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    nats = -np.log(np.take_along_axis(q, rows[:, 1:, None], axis=-1)).mean()
    assert nats == pytest.approx(min(val[1:]), abs=1e-3) and meta["tokenizer"] == ENC.to_dict()
    assert np.minimum(p, q[..., :257]).sum(-1).mean() == pytest.approx(kept[1 + int(np.argmin(val[1:]))], abs=1e-3)
    assert student.config.n_embd == 16 and student.config.n_layer == 2 and student.config.ffn_dim == 64


def test_first_loss(folder, tmp_path):
    """The loss of the first step is that of the first rows, by the models themselves; its factors are as documented."""
    order = np.random.default_rng([1337, 0]).permutation
    text = read_splits(str(folder / "text.txt"), ENC)[0]
    rows = np.stack([text[i:i + 33] for i in range(0, len(text) - 32, 32)])
    rows = rows[order(len(rows))[:8]]
    teacher, _ = load_checkpoint(str(folder / "teacher.safetensors"))
    student = GPT(GPTConfig(block_size=32, vocab_size=320, n_layer=2, n_head=1, n_embd=16), seed=1337)
    z, t = (np.array(model(mx.array(rows[:, :-1])), np.float64) for model in (student, teacher))
    nats = student.loss(mx.array(rows[:, :-1]), mx.array(rows[:, 1:])).item()
    p, q = np.exp(t[..., :257] / 2), np.exp(z / 2)
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    far = (p * np.log(p / q[..., :257])).sum(-1).mean()
    distill(folder, tmp_path, "--temperature=2", "--plain=0.25", "--max_iters=1")
    assert column(tmp_path, "nats")[0] == pytest.approx(nats, rel=1e-5)
    assert column(tmp_path, "divergence")[0] == pytest.approx(far, rel=1e-4)
    assert column(tmp_path, "train_loss")[0] == pytest.approx(0.75 * 4 * far + 0.25 * nats, rel=1e-4)
    distill(folder, tmp_path, "--plain=1", "--max_iters=1", "--overwrite=True")
    assert column(tmp_path, "train_loss")[0] == pytest.approx(nats, rel=1e-5)


def test_stored(folder, tmp_path):
    """The file of logits holds what the teacher says; training from it, with the teacher gone, is training by the
    teacher where it holds all tokens, and less where it does not. Another text, and a file cut short, are refused."""
    for k in (3, 999):
        done = distill(folder, tmp_path, f"--store={tmp_path / f'{k}.logits'}", f"--top_k={k}", "--temperature=1.5")
    assert "257 of 257 tokens" in done.stdout and "0.00% of the probability" in done.stdout
    found = load_file(tmp_path / "3.logits")["logits"]
    text, _ = read_splits(str(folder / "text.txt"), ENC)
    teacher, _ = load_checkpoint(str(folder / "teacher.safetensors"))
    p = np.exp(np.array(teacher(mx.array(text[32:64])[None]), np.float64)[0, :, :257] / 1.5)
    p /= p.sum(-1, keepdims=True)
    best = np.sort(p, axis=1)[:, :-4:-1]
    ids, log_p = found[1, :, 0, :3], found[1, :, 1].copy().view(np.float16).astype(np.float64)
    np.testing.assert_allclose(np.sort(np.take_along_axis(p, ids.astype(int), 1), axis=1)[:, ::-1], best, rtol=1e-5)
    np.testing.assert_allclose(np.exp(log_p[:, :3]), np.take_along_axis(p, ids.astype(int), 1), rtol=5e-3)
    np.testing.assert_allclose(np.exp(log_p[:, 3]), 1 - best.sum(1), rtol=5e-3, atol=1e-6)
    distill(folder, tmp_path / "live", "--loss=jsd", "--temperature=1.5", "--max_iters=3")
    live = column(tmp_path / "live", "train_loss")
    for k in (3, 999):
        distill(folder, tmp_path / f"{k}", "--loss=jsd", f"--logits={tmp_path / f'{k}.logits'}", "--max_iters=3",
                teacher=None)
    assert column(tmp_path / "999", "train_loss") == pytest.approx(live, rel=2e-3)
    assert column(tmp_path / "3", "train_loss")[0] < 0.95 * live[0]
    (tmp_path / "cut.logits").write_bytes((tmp_path / "3.logits").read_bytes()[:-1])
    (tmp_path / "text.txt").write_text((folder / "text.txt").read_text() + "!")
    for name, data, says in (("3", tmp_path, "is not the text that"), ("cut", folder, "no whole file of --store")):
        told = distill(data, tmp_path / "no", f"--logits={tmp_path / f'{name}.logits'}", teacher=None, status=2).stderr
        assert says in told


def test_own_texts(folder):
    """A step of own texts: rows begin as those of the data, go on as the student writes, and teach only there."""
    student, _ = load_checkpoint(str(folder / "teacher.safetensors"))
    student.update(tree_map(lambda p: 3 * p, student.parameters()))  # what comes first has a strong effect
    rows = np.arange(5 * 33, dtype=np.int32).reshape(5, 33) % 250
    names = {"np": np, "mx": mx, "seed": 3, "on_policy": 1.0, "batch_size": 2, "T": 32, "N": 5, "begin": 6, "V": 257,
             "small": student, "train_rows": rows, "generate": generate, "plain": 0.5, "logits": "",
             "order": lambda epoch: np.arange(5)}
    exec(SOURCE[SOURCE.index("def is_own"):SOURCE.index("def evaluate()")], names)
    batch = names["batch_at"](1)
    text = np.concatenate([np.array(batch["idx"]), np.array(batch["targets"])[:, -1:]], axis=1)
    wrote = np.array([*generate(student, rows[2:4, :6].tolist(), 27, seed=3 * 2**32 + 1, n_vocab=257)]).T
    assert (text[:, :6] == rows[2:4, :6]).all() and (text[:, 6:] == wrote).all() and batch["plain"].item() == 0
    weights = np.array(batch["weights"]).reshape(2, 32)
    assert not weights[:, :5].any() and weights[:, 5:] == pytest.approx(1 / 54)
    names["on_policy"] = 0
    batch = names["batch_at"](2)
    assert np.array(batch["idx"]).tolist() == rows[[4, 0], :-1].tolist() and batch["plain"].item() == 0.5
    assert np.array(batch["weights"]) == pytest.approx(1 / 64)


def test_chunks(folder, tmp_path, monkeypatch):
    """Logits of a part of the rows at a time: the same losses and gradients."""
    for size in (2**24, 320 * 50):
        monkeypatch.setattr("model.LOSS_CHUNK", size)
        run_here(str(ROOT / "distill.py"), folder / "teacher.safetensors", f"--data={folder / 'text.txt'}",
                 "--max_iters=2", "--loss=jsd", "--plain=0.5", "--log_interval=1", f"--out_dir={tmp_path / str(size)}")
    for name in ("train_loss", "grad_norm", "val_loss", "val_kept"):
        one, other = (column(tmp_path / str(size), name) for size in (2**24, 320 * 50))
        assert one == pytest.approx(other, rel=1e-4)


def test_resume_is_exact(folder, tmp_path):
    settings = ["--loss=jsd", "--on_policy=0.5", "--max_iters=6", "--eval_interval=4"]
    distill(folder, tmp_path / "whole", *settings)
    out = tmp_path / "part"
    (tmp_path / "stop.py").write_text(STOPPED)
    command = [sys.executable, tmp_path / "stop.py", "3", ROOT / "distill.py", folder / "teacher.safetensors",
               f"--data={folder / 'text.txt'}", "--log_interval=1", "--eval_windows=8", f"--out_dir={out}", *settings]
    done = subprocess.run(command, capture_output=True, text=True, env=ON_PATH)
    assert done.returncode == 130 and "--resume=True" in done.stdout, done.stderr
    again = prepared.run([sys.executable, ROOT / "distill.py", f"--out_dir={out}", "--resume=True"])
    assert again.returncode == 0, again.stderr
    for name in ("distill", "resume"):
        a, b = (mx.load(str(folder / f"{name}.safetensors")) for folder in (tmp_path / "whole", out))
        assert a.keys() == b.keys() and all(mx.array_equal(a[key], b[key]) for key in a)
    for name in ("train_loss", "divergence", "val_loss", "val_kept"):
        assert column(out, name) == column(tmp_path / "whole", name)
    changed = prepared.run([sys.executable, ROOT / "distill.py", f"--out_dir={out}", "--resume=True", "--loss=reverse"])
    assert changed.returncode == 2 and "loss is 'jsd'" in changed.stderr


def test_refused(folder, tmp_path):
    """Students that have another tokenizer, packed weights, or no finite loss."""
    base, meta = load_checkpoint(str(folder / "teacher.safetensors"))
    save_checkpoint(str(tmp_path / "other.safetensors"), base, {"tokenizer": char_tokenizer(["abc"]).to_dict()})
    broken = GPT(base.config, seed=1)
    broken.norm.weight = mx.full(broken.norm.weight.shape, 3e38)
    save_checkpoint(str(tmp_path / "broken.safetensors"), broken, meta)
    lora.quantize_base(base, 4)
    save_checkpoint(str(tmp_path / "packed.safetensors"), base, meta)
    for name, says in (("other", "has another tokenizer than"), ("packed", "packed weights, which do not train"),
                       ("broken", "the loss held out is")):
        told = distill(folder, tmp_path / "out", f"--student={tmp_path / name}.safetensors", status=2).stderr
        assert says in told and (name == "broken" or not (tmp_path / "out").exists())


@pytest.mark.parametrize("arguments, says", [
    (["--loss=kl"], "loss='kl'"), (["--beta=0.5"], "beta has no effect without"),
    (["--loss=jsd", "--beta=1"], "beta=1"),
    (["--temperature=0"], "over 0"), (["--plain=2"], "from 0 to 1"), (["--top_k=3"], "without --store"),
    (["--logits=x"], "teacher has no effect with --logits"), (["--plain=1", "--on_policy=0.5"], "with --plain=1"),
    (["--block_size=99"], "up to 32"), (["--prompt_tokens=3"], "without --on_policy"),
    (["--on_policy=1", "--prompt_tokens=32"], "less than block_size"), (["--store=x", "--loss=jsd"], "with --store"),
    (["--n_embd=16", "--student=x"], "with --student"), (["--max_iters=0"], "max_iters=0"), (["--data="], "no data"),
], ids=str)
def test_mistakes(folder, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as told:
        run_here(str(ROOT / "distill.py"), folder / "teacher.safetensors", f"--data={folder / 'text.txt'}",
                 "--out_dir=out", *arguments)
    assert says in str(told.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("variant", [
    dict(n_expert=4, ffn_dim=32, expert_balance="bias"), dict(mod="topk"), dict(sliding_window=8, sinks=2),
    dict(yoco=True, diff_attn=True, value_residual=True, n_head=4, n_kv_head=4),
    dict(pos="learned", norm="layer", mlp="gelu", bias=True, tie=False, softcap=20.0, value_embeds=True)], ids=str)
def test_variants(folder, tmp_path, variant):
    """Every kind of model is teacher, packed here, and student, with a step of own texts too."""
    config = dict(block_size=48, vocab_size=320, n_layer=2, n_head=2, n_embd=32) | variant
    model = GPT(GPTConfig(**config), seed=1)
    lora.quantize_base(model, 4)
    save_checkpoint(str(folder / "variant.safetensors"), model, {"tokenizer": ENC.to_dict()})
    distill(folder, tmp_path, "--max_iters=3", "--on_policy=0.6", "--batch_size=2", "--eval_windows=2", "--n_embd=16",
            "--n_layer=2", teacher="variant.safetensors")
    norms = column(tmp_path, "grad_norm")
    assert len(norms) == 3 > len(column(tmp_path, "nats")) and min(norms) > 0
    student, _ = load_checkpoint(str(tmp_path / "distill.safetensors"))
    assert {name: getattr(student.config, name) for name in variant if "head" not in name and name != "ffn_dim"} == {
        name: value for name, value in variant.items() if "head" not in name and name != "ffn_dim"}
    assert not any("scales" in name for name, _ in tree_flatten(student.parameters()))
