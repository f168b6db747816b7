"""train.py, run as a user runs it: learning, resuming, being killed, two processes, bad input."""
import csv
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT
from mlx.utils import tree_flatten
from safetensors import safe_open
from test_variants import SOURCE, VARIANTS, without

from model import GPT, GPTConfig, load_checkpoint
from tokenizer import Tokenizer

TINY = ["--block_size=32", "--n_layer=2", "--n_head=2", "--n_embd=64", "--batch_size=8", "--max_iters=12",
        "--warmup_iters=4", "--eval_interval=4", "--eval_windows=16", "--log_interval=1", "--sample_tokens=20",
        "--compile=False", "--optimizer=adamw", "--learning_rate=3e-3"]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of byte tokens, made by data.py from this project's own scripts."""
    folder = tmp_path_factory.mktemp("data") / "scripts"
    subprocess.run([sys.executable, ROOT / "data.py", f"--source={ROOT}/*.py", "--tokenizer=byte", f"--out={folder}"],
                   check=True, capture_output=True)
    return folder


def command(data, out, *arguments):
    return [sys.executable, str(ROOT / "train.py"), f"--data={data}", f"--out_dir={out}", *TINY, *arguments]


def train(data, out, *arguments, status=0, prefix=(), **options):
    done = subprocess.run([*prefix, *command(data, out, *arguments)], capture_output=True, text=True, timeout=300,
                          **options)
    assert done.returncode == status, done.stdout + done.stderr
    return done


@pytest.fixture(scope="session")
def whole(data, tmp_path_factory):
    """Twelve updates without a stop."""
    out = tmp_path_factory.mktemp("whole")
    train(data, out)
    return out


def arrays(out) -> dict:
    """All parameters and the whole optimizer state of a run."""
    _, meta = load_checkpoint(str(out / "ckpt.safetensors"))
    return {**mx.load(str(out / "ckpt.safetensors")),
            **mx.load(str(out / f"ckpt.optimizer-{meta['step']}.safetensors"))}


def assert_same(out_a, out_b):
    a, b = arrays(out_a), arrays(out_b)
    assert a.keys() == b.keys()
    assert [key for key in a if not mx.array_equal(a[key], b[key]).item()] == []


def curve(out) -> list[dict]:
    with open(out / "loss.csv", newline="") as file:
        return list(csv.DictReader(file))


def column(out, name) -> list[float]:
    return [float(row[name]) for row in curve(out) if row[name]]


# ---- it learns -------------------------------------------------------------------------------------------------------


def test_learns_and_leaves_everything(data, tmp_path):
    done = train(data, tmp_path, "--max_iters=150", "--eval_interval=50", "--compile=True", "--tie=False",
                 "--mlp=swiglu")
    losses = column(tmp_path, "train_loss")
    assert abs(losses[0] - math.log(257)) < 0.4
    assert losses[-1] < 0.6 * math.log(257)
    assert re.search(r"step    150 \| loss +\d\.\d{4} \| lr .* norm .* tok/s", done.stdout)
    assert re.search(r"step    150 \| val .* ppl .* bpb .* GiB", done.stdout)
    names = {"ckpt.safetensors", "best.safetensors", "ckpt.optimizer-150.safetensors", "loss.csv", "loss.png",
             "run.json", "run.lock", "source"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["mlp"] == "swiglu"
    with safe_open(tmp_path / "ckpt.safetensors", "numpy") as file:
        header = json.loads(file.metadata()["tinygpt"])
    assert header["step"] == 150 and header["script"] == "train.py" and header["settings"]["max_iters"] == 150
    assert header["config"]["tie"] is False and header["config"]["vocab_size"] == 320
    assert header["losses"]["val"] == pytest.approx(column(tmp_path, "val_loss")[-1], rel=1e-6)
    assert Tokenizer.from_dict(header["tokenizer"]).decode([104, 105]) == "hi"


def test_validation_figures(whole, data):
    """nats, perplexity and bits per byte of the last evaluation, computed again."""
    model, meta = load_checkpoint(str(whole / "ckpt.safetensors"))
    tokens = np.fromfile(data / "val.bin", dtype=np.uint16)
    nats, n_bytes = [], 0
    for start in np.random.default_rng([0]).integers(len(tokens) - 32, size=16):
        window = tokens[start:start + 33].astype(np.int64)
        logits = np.array(model(mx.array(window[None, :-1]))[0], dtype=np.float64)
        p = np.exp(logits - logits.max(-1, keepdims=True))
        nats.extend(-np.log(p[np.arange(32), window[1:]] / p.sum(-1)))
        n_bytes += int((window[1:] < 256).sum())  # the end-of-text token is no byte
    assert meta["losses"]["val"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert meta["losses"]["bits_per_byte"] == pytest.approx(np.sum(nats) / n_bytes / np.log(2), rel=1e-5)


def gradients_at(weights: dict, data, step: int, **settings) -> dict:
    """Of the loss over the windows that update `step` takes; MLX computes them."""
    model = GPT(GPTConfig(block_size=32, n_layer=2, n_head=2, n_embd=64, vocab_size=320, **settings))
    model.load_weights(list(weights.items()))
    tokens = np.fromfile(data / "train.bin", dtype=np.uint16)
    starts = np.random.default_rng([1337, step]).integers(len(tokens) - 32, size=8)
    rows = mx.array(np.stack([tokens[start:start + 33] for start in starts]).astype(np.int32))
    gradients = mx.grad(lambda p: (model.update(p), model.loss(rows[:, :-1], rows[:, 1:]))[1])(model.parameters())
    return {name: np.array(g, dtype=np.float64) for name, g in tree_flatten(gradients)}


def test_first_update_is_adamw(data, tmp_path):
    """The first update, from the formulas (Loshchilov & Hutter 2019) in float64; decay on matrices only, clipped."""
    train(data, tmp_path, "--max_iters=1", "--warmup_iters=2", "--grad_clip=0.5", "--weight_decay=0.3")
    after = mx.load(str(tmp_path / "ckpt.safetensors"))
    model = GPT(GPTConfig(block_size=32, n_layer=2, n_head=2, n_embd=64, vocab_size=320), seed=1337)
    before = dict(tree_flatten(model.parameters()))
    gradients = gradients_at(before, data, 0)
    length = math.sqrt(sum((g**2).sum() for g in gradients.values()))
    assert column(tmp_path, "grad_norm")[0] == pytest.approx(length, rel=1e-4)
    rate = 3e-3 / 2  # the first of two warmup updates
    for name, g in gradients.items():
        w = np.array(before[name], dtype=np.float64)
        g = g * min(1, 0.5 / length)
        mean, square = 0.1 * g / (1 - 0.9), 0.05 * g**2 / (1 - 0.95)
        wanted = w - rate * (mean / (np.sqrt(square) + 1e-8) + (0.3 * w if w.ndim > 1 else 0))
        sure = np.abs(g) > 1e-6  # where g is rounding error alone, so is its sign
        np.testing.assert_allclose(np.array(after[name])[sure], wanted[sure], atol=2e-5, err_msg=name)


@pytest.mark.parametrize("settings", [dict(), dict(n_expert=3, ffn_dim=96)], ids=["dense", "experts"])
def test_two_updates_are_muon(data, tmp_path, settings):
    """Of the blocks' matrices, each expert's alone: momentum, then the quintic of Newton and Schulz on the singular
    values, in float64."""
    for n in (1, 2):
        train(data, tmp_path / str(n), f"--max_iters={n}", "--optimizer=muon", "--muon_lr=0.1", "--warmup_iters=0",
              "--decay_iters=10", "--grad_clip=0", "--weight_decay=0.3", *(f"--{k}={v}" for k, v in settings.items()))
    first, second = (mx.load(str(tmp_path / f"{n}" / "ckpt.safetensors")) for n in (1, 2))
    model = GPT(GPTConfig(block_size=32, n_layer=2, n_head=2, n_embd=64, vocab_size=320, **settings), seed=1337)
    before = dict(tree_flatten(model.parameters()))
    gradients = [gradients_at(before, data, 0, **settings), gradients_at(first, data, 1, **settings)]
    rates = [0.1 * (0.1 + 0.9 * (1 + math.cos(math.pi * i / 10)) / 2) for i in range(2)]
    names = [name for name, p in before.items() if name.startswith("blocks.") and p.ndim > 1 and "router" not in name]
    assert len(names) == 12
    for name in names:
        w, v = np.array(before[name], dtype=np.float64), 0.0
        for g, rate, after in zip(gradients, rates, (first, second), strict=True):
            v = 0.95 * v + 0.05 * g[name]
            U, S, V = np.linalg.svd(0.05 * g[name] + 0.95 * v, full_matrices=False)
            S = S / np.sqrt((S**2).sum(-1, keepdims=True))
            for _ in range(5):
                S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
            w = w * (1 - 0.3 * rate) - rate * max(1, w.shape[-2] / w.shape[-1]) ** 0.5 * (U * S[..., None, :]) @ V
            np.testing.assert_allclose(np.array(after[name]), w, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_schedule(data, tmp_path, schedule):
    train(data, tmp_path, f"--schedule={schedule}", "--max_iters=20", "--learning_rate=0.01", "--eval_interval=50")
    rates = column(tmp_path, "learning_rate")
    np.testing.assert_allclose(rates[:4], [0.0025, 0.005, 0.0075, 0.01])
    if schedule == "cosine":
        wanted = [0.01 * (0.1 + 0.9 * (1 + math.cos(math.pi * i / 16)) / 2) for i in range(16)]
    else:  # flat, then straight down over the last fifth
        wanted = [0.01] * 13 + [0.0075, 0.005, 0.0025]
    np.testing.assert_allclose(rates[4:], wanted, rtol=1e-5)


@pytest.mark.parametrize("arguments", [
    ["--optimizer=muon"], ["--optimizer=lion", "--learning_rate=1e-3"], ["--dtype=bfloat16"],
    ["--alibi=True", "--sliding_window=8", "--window_pattern=SL"],
    ["--diff_attn=True"], ["--diff_attn_version=2", "--diff_attn=True"], ["--sinks=2", "--sliding_window=8"],
    ["--n_expert=4", "--ffn_dim=64", "--n_shared_expert=1", "--checkpoint_every=2"], ["--mod=topk"],
    ["--mod_every=1", "--mod=soft"], ["--yoco=True", "--checkpoint_every=1", "--grad_accum=2"],
    ["--pos=learned", "--norm=layer", "--mlp=gelu", "--bias=True", "--qk_norm=False", "--n_kv_head=1"],
], ids=lambda arguments: arguments[0][2:])
def test_other_settings_learn(data, tmp_path, arguments):
    train(data, tmp_path, "--max_iters=30", "--eval_interval=30", *arguments)
    losses = column(tmp_path, "train_loss")
    assert losses[-1] < losses[0] - 1
    assert {array.dtype for array in mx.load(str(tmp_path / "ckpt.safetensors")).values()} == {mx.float32}


def test_split_of_a_batch_does_not_matter(data, whole, tmp_path):
    """Four micro-steps, recomputed activations, compiled or not: the same twelve updates."""
    for i, arguments in enumerate([["--grad_accum=4", "--batch_size=2"], ["--checkpoint_every=1"], ["--compile=True"]]):
        train(data, tmp_path / str(i), *arguments)
        for name in ("train_loss", "grad_norm"):
            np.testing.assert_allclose(column(tmp_path / str(i), name), column(whole, name), rtol=5e-5)


@pytest.mark.parametrize("settings", [[], ["--n_expert=4", "--expert_balance=bias"]], ids=["dense", "experts"])
def test_two_processes_equal_one(data, whole, tmp_path, settings):
    launch = [os.path.join(os.path.dirname(sys.executable), "mlx.launch"), "-n", "2", "--"]
    done = train(data, tmp_path / "two", *settings, prefix=launch)
    if settings:
        whole = tmp_path / "one"
        train(data, whole, *settings)
        loads = [np.loadtxt(out / "experts.csv", delimiter=",", skiprows=1) for out in (tmp_path / "two", whole)]
        np.testing.assert_allclose(*loads, atol=0.02)  # a token of 128 may fall the other way where two experts tie
    assert done.stdout.count("step     12 | loss") == 1  # rank 0 alone speaks
    for name in ("train_loss", "grad_norm", "val_loss"):  # such a token moves them, too
        np.testing.assert_allclose(column(tmp_path / "two", name), column(whole, name), rtol=1e-3 if settings else 2e-5)
    a, b = arrays(tmp_path / "two"), arrays(whole)
    most = max(mx.abs(a[key].astype(mx.float32) - b[key].astype(mx.float32)).max().item() for key in a)
    assert most < (1e-3 if settings else 1e-5)


def test_expert_load_is_kept_and_drawn(data, tmp_path):
    """experts.csv, of the first update: how often each expert is among a token's two of the largest logits."""
    done = train(data, tmp_path, "--n_expert=4", "--max_iters=2", "--log_interval=1", "--eval_interval=9")
    assert (tmp_path / "experts.png").read_bytes().startswith(b"\x89PNG")
    with open(tmp_path / "experts.csv", newline="") as file:
        rows = [*csv.DictReader(file)]
    assert [(row["step"], row["layer"]) for row in rows] == [("1", "0"), ("1", "1"), ("2", "0"), ("2", "1")]
    load = np.array([[float(row[f"expert{e}"]) for e in range(4)] for row in rows])
    model = GPT(GPTConfig(block_size=32, n_layer=2, n_head=2, n_embd=64, vocab_size=320, n_expert=4), seed=1337)
    tokens, routers = np.fromfile(data / "train.bin", dtype=np.uint16), {}
    starts = np.random.default_rng([1337, 0]).integers(len(tokens) - 32, size=8)
    model(mx.array(np.stack([tokens[i:i + 32] for i in starts]).astype(np.int32)),
          tap=lambda site, layer, x: routers.setdefault(layer, x) if site == "router" else x)
    for layer in (0, 1):
        top = np.argsort(-np.array(routers[layer]).reshape(-1, 4))[:, :2]
        np.testing.assert_allclose(load[layer], np.bincount(top.ravel(), minlength=4) / (8 * 32 / 2), atol=1e-4)
    said = [float(number) for number in re.findall(r"\| load (\S+)", done.stdout)]
    np.testing.assert_allclose(said, [load[:2].max(), load[2:].max()], atol=0.006)


def test_variants_can_be_deleted(data, whole, tmp_path):
    """Without the sections and the tagged lines of all variants, in model.py and in train.py, the losses are the same.
    """
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    (tmp_path / "model.py").write_text(without(SOURCE, *VARIANTS))
    source = (ROOT / "train.py").read_text()
    for variant in VARIANTS:
        source = re.sub(rf"^# ---- variant {variant}: .*?^# ---- end of {variant} -+\n", "", source, flags=re.M | re.S)
        source = re.sub(rf"^.*  # {variant}\n", "", source, flags=re.M)
    (tmp_path / "train.py").write_text(source)
    assert len(source.splitlines()) < len((ROOT / "train.py").read_text().splitlines()) - 40
    assert not re.search("rebalance|expert_load|record_load|load_rows", source)
    subprocess.run([sys.executable, tmp_path / "train.py", *command(data, tmp_path / "out")[2:]], check=True,
                   capture_output=True)
    for name in ("train_loss", "val_loss", "grad_norm"):
        assert column(tmp_path / "out", name) == column(whole, name)


def test_prepares_a_text_by_itself(tmp_path):
    (tmp_path / "book.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 300)
    done = train("book.txt", "out", "--tokenizer=char", "--max_iters=2", cwd=tmp_path)
    assert "data/book-char" in done.stdout and (tmp_path / "data" / "book-char" / "train.bin").exists()


# ---- it goes on ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [
    [], ["--optimizer=muon", "--compile=True"], ["--n_expert=4", "--expert_balance=bias", "--mod=topk"],
], ids=["adamw", "muon", "experts"])
def test_interrupted_equals_uninterrupted(data, whole, tmp_path, arguments):
    """Ctrl-C in the middle; then --resume=True, which takes all settings from the checkpoint. Bit for bit."""
    long = ["--max_iters=40", "--eval_interval=16", *arguments]
    train(data, tmp_path / "a", *long)
    process = subprocess.Popen(command(data, tmp_path / "b", *long), stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step      6"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.stdout.read()
    assert process.wait() == 130 and "--resume=True" in rest
    stopped = load_checkpoint(str(tmp_path / "b" / "ckpt.safetensors"))[1]["step"]
    assert 6 <= stopped < 40
    resume = [sys.executable, ROOT / "train.py", f"--out_dir={tmp_path / 'b'}", "--resume=True"]
    subprocess.run(resume, check=True, capture_output=True)
    assert_same(tmp_path / "a", tmp_path / "b")
    for name in ("step", "train_loss", "val_loss", "grad_norm", "learning_rate"):
        assert column(tmp_path / "a", name) == column(tmp_path / "b", name)
    for path in (tmp_path / "a").glob("experts.csv"):
        assert path.read_text() == (tmp_path / "b" / "experts.csv").read_text()


def test_killed_at_any_moment(data, tmp_path):
    """kill -9 again and again while it saves every second step: whatever is on disk loads, and it gets there."""
    busy = ["--max_iters=40", "--eval_interval=2"]
    train(data, tmp_path / "a", *busy)
    out, rng, kills = tmp_path / "b", random.Random(0), 0
    while kills < 60:
        path = out / "ckpt.safetensors"
        resume = ["--resume=True"] if path.exists() else ["--overwrite=True"]  # best.safetensors may be there alone
        process = subprocess.Popen(command(data, out, *busy, *resume), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   text=True)
        process.stdout.readline()  # it is about to train
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        error = process.communicate()[1]
        if process.returncode == 2 and "already" in error:
            break
        assert process.returncode in (0, -signal.SIGKILL), error
        kills += process.returncode != 0
        if path.exists():
            arrays(out)
        if (out / "best.safetensors").exists():
            load_checkpoint(str(out / "best.safetensors"))
    assert kills >= 5
    assert_same(tmp_path / "a", out)
    late = {"loss.png", "ckpt.optimizer-38.safetensors"}  # drawn, and deleted, after the last checkpoint is written
    assert sorted(name for name in os.listdir(out) if name not in late and not name.startswith("loss.png.tmp")) == [
        "best.safetensors", "ckpt.optimizer-40.safetensors", "ckpt.safetensors", "loss.csv", "run.json", "run.lock",
        "source"]


def test_interrupted_in_two_processes(data, tmp_path):
    """Both stop after the same update, and the checkpoint is there though mlx.launch ends the one that is left."""
    launch = [os.path.join(os.path.dirname(sys.executable), "mlx.launch"), "-n", "2", "--"]
    endless = command(data, tmp_path, "--max_iters=2000", "--eval_interval=2000")
    process = subprocess.Popen([*launch, *endless], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    for line in process.stdout:
        if line.startswith("step      6"):
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
            break
    error = process.communicate(timeout=60)[1]
    assert "exited with code 130" in error, error  # of both, unless mlx.launch is quicker to end the second
    assert 6 <= load_checkpoint(str(tmp_path / "ckpt.safetensors"))[1]["step"] < 2000
    arrays(tmp_path)


def test_a_new_run_replaces_the_old_one(data, tmp_path):
    """Its own best, never that of the run before; files of others stay."""
    (tmp_path / "notes.tmp.md").write_text("mine")
    train(data, tmp_path, "--max_iters=12")
    train(data, tmp_path, "--max_iters=2", "--n_embd=32", "--overwrite=True")
    for name in ("ckpt", "best"):
        model, meta = load_checkpoint(str(tmp_path / f"{name}.safetensors"))
        assert (model.config.n_embd, meta["step"]) == (32, 2)
    assert (tmp_path / "notes.tmp.md").read_text() == "mine"


# ---- bad input -------------------------------------------------------------------------------------------------------


def one_line(done) -> str:
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr
    return done.stderr


@pytest.mark.parametrize("arguments, says", [
    (["--n_layr=3"], "n_layer"),
    (["--n_embd=65"], "n_embd"),
    (["--n_kv_head=3"], "n_kv_head"),
    (["--optimizer=sgd"], "adamw"),
    (["--schedule=linear"], "cosine"),
    (["--mlp=relu"], "relu2"),
    (["--dtype=int8"], "bfloat16"),
    (["--max_iters=0"], "max_iters"),
    (["--seed=-1"], "seed"),
    (["--dtype=float16"], "bfloat16"),
    (["--out_dir="], "out_dir"),
    (["--data=nowhere.txt"], "nowhere.txt"),
    (["--block_size=10000000"], "block_size"),
    (["--resume=True"], "no checkpoint"),
    (["--out_dir=/dev/null/out"], "/dev/null/out"),
])
def test_bad_settings(data, tmp_path, arguments, says):
    assert says in one_line(train(data, tmp_path / "out", *arguments, status=2, cwd=tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content, says", [(b"", "bad.txt"), (b"\x00\xff" * 500, "bad.txt"), (b"hi\n" * 3, "bad.txt")])
def test_bad_data(tmp_path, content, says):
    (tmp_path / "bad.txt").write_bytes(content)
    assert says in one_line(train("bad.txt", "out", "--tokenizer=byte", status=2, cwd=tmp_path))
    assert not (tmp_path / "out").exists()


def test_resume_of_another_architecture(data, whole):
    before = {path: path.read_bytes() for path in whole.rglob("*.*")}
    done = train(data, whole, "--resume=True", "--n_embd=128", "--max_iters=20", status=2)
    assert "n_embd" in one_line(done)
    assert before == {path: path.read_bytes() for path in whole.rglob("*.*")}


def test_resume_of_a_finished_run_or_another_optimizer(data, whole):
    assert "max_iters" in one_line(train(data, whole, "--resume=True", status=2))
    for other in ("muon", "lion"):
        done = train(data, whole, "--resume=True", f"--optimizer={other}", "--max_iters=20", status=2)
        assert "optimizer" in one_line(done)


def test_loss_that_is_no_number(data, tmp_path):
    train(data, tmp_path, "--max_iters=4")
    good = (tmp_path / "ckpt.safetensors").read_bytes()
    done = train(data, tmp_path, "--resume=True", "--max_iters=40", "--learning_rate=1e30", "--grad_clip=0", status=2)
    assert "ckpt.safetensors" in one_line(done)
    assert (tmp_path / "ckpt.safetensors").read_bytes() == good


def test_full_disk(data, tmp_path):
    """Files may not grow over 100 KB, as on a disk that is full: one line, and the checkpoint from before survives."""
    train(data, tmp_path, "--max_iters=4")
    before = (tmp_path / "ckpt.safetensors").read_bytes()
    small = dict(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    done = train(data, tmp_path, "--resume=True", "--max_iters=8", status=2, **small)
    assert "cannot write" in one_line(done)
    assert (tmp_path / "ckpt.safetensors").read_bytes() == before
    assert not list(tmp_path.glob("*tmp*"))
    arrays(tmp_path)  # still resumes


def test_bfloat16(data, tmp_path):
    """--dtype=bfloat16 computes in it: losses are others than float32's, though near. The file keeps float32."""
    losses = []
    for dtype in ("float32", "bfloat16"):
        train(data, tmp_path / dtype, "--max_iters=2", "--sample_tokens=0", f"--dtype={dtype}")
        with open(tmp_path / dtype / "loss.csv", newline="") as file:
            losses.append([float(row[name]) for row in csv.DictReader(file) for name in ("train_loss", "val_loss")
                           if row[name]])
    exact, found = map(np.array, losses)
    assert len(exact) == 4 and (exact != found).all() and np.abs(found / exact - 1).max() < 0.01
    model, _ = load_checkpoint(str(tmp_path / "bfloat16" / "ckpt.safetensors"))
    assert {p.dtype for _, p in tree_flatten(model.parameters())} == {mx.float32}
