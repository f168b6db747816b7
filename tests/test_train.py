"""train.py, run as a user runs it: learning, resuming, being killed, two processes, bad input."""
import contextlib
import csv
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import prepared
import pytest
from conftest import ROOT, launch, peak_memory
from mlx.utils import tree_flatten, tree_map
from safetensors import safe_open
from test_variants import SOURCE, VARIANTS, without

import quantized
from model import GPT, VERSION, GPTConfig, load_arrays, load_checkpoint, save_arrays, save_checkpoint
from tokenizer import Tokenizer

TINY = ["--block_size=32", "--n_layer=2", "--n_head=2", "--n_embd=64", "--batch_size=8", "--max_iters=12",
        "--warmup_iters=4", "--eval_interval=4", "--eval_windows=16", "--log_interval=1", "--sample_tokens=20",
        "--compile=False", "--optimizer=adamw", "--learning_rate=3e-3"]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of byte tokens, made by data.py from this project's own scripts, without the rules between sections: a
    window of dashes alone has no line that could be a prompt."""
    folder, texts = tmp_path_factory.mktemp("data") / "scripts", tmp_path_factory.mktemp("texts")
    for path in ROOT.glob("*.py"):
        (texts / path.name).write_text(re.sub("-{9,}", "", path.read_text(encoding="utf-8")), encoding="utf-8")
    prepared.run([sys.executable, ROOT / "data.py", f"--source={texts}/*.py", "--tokenizer=byte", f"--out={folder}"],
                   check=True)
    return folder


def command(data, out, *arguments):
    return [sys.executable, str(ROOT / "train.py"), f"--data={data}", f"--out_dir={out}", *TINY, *arguments]


def train(data, out, *arguments, status=0, prefix=(), **options):
    if prefix or options:
        done = subprocess.run([*prefix, *command(data, out, *arguments)], capture_output=True, text=True, timeout=300,
                              **options)
    else:
        done = prepared.run(command(data, out, *arguments))
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


@pytest.mark.parametrize("init", [False, True], ids=["random", "init"])
def test_first_update_is_adamw(data, whole, tmp_path, init):
    """The first update, from the formulas (Loshchilov & Hutter 2019) in float64; decay on matrices only, clipped. It
    begins with random weights, or with those of a checkpoint."""
    more = [f"--init={whole / 'ckpt.safetensors'}"] if init else []
    train(data, tmp_path, "--max_iters=1", "--warmup_iters=2", "--grad_clip=0.5", "--weight_decay=0.3", *more)
    after = mx.load(str(tmp_path / "ckpt.safetensors"))
    model = GPT(GPTConfig(block_size=32, n_layer=2, n_head=2, n_embd=64, vocab_size=320), seed=1337)
    before = mx.load(str(whole / "ckpt.safetensors")) if init else dict(tree_flatten(model.parameters()))
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


@pytest.mark.parametrize("settings", [[], ["--optimizer=muon"], ["--n_expert=4", "--expert_balance=bias"]],
                         ids=["dense", "muon", "experts"])
def test_two_processes_equal_one(data, whole, tmp_path, settings):
    done, experts = train(data, tmp_path / "two", *settings, prefix=launch(2)), "--n_expert=4" in settings
    if settings:
        whole = tmp_path / "one"
        train(data, whole, *settings)
    if experts:
        loads = [np.loadtxt(out / "experts.csv", delimiter=",", skiprows=1) for out in (tmp_path / "two", whole)]
        np.testing.assert_allclose(*loads, atol=0.02)  # a token of 128 may fall the other way where two experts tie
    assert done.stdout.count("step     12 | loss") == 1  # rank 0 alone speaks
    for name in ("train_loss", "grad_norm", "val_loss"):  # such a token moves them, too
        np.testing.assert_allclose(column(tmp_path / "two", name), column(whole, name), rtol=1e-3 if experts else 2e-5)
    a, b = ({name: np.array(array, dtype=np.float64) for name, array in arrays(out).items()}
            for out in (tmp_path / "two", whole))
    for name in a:  # Adam's first update is a sign: where a gradient is rounding error alone, the sign is too
        off = np.abs(a[name] - b[name]) > (1e-3 if experts else 1e-5)
        sure = np.sqrt(b[f"{name}.v"]) > 1e-6 if f"{name}.v" in b else np.ones_like(off)
        assert off[sure].mean() < 1e-3 and np.abs(a[name] - b[name])[sure].max() < 2e-3, name


@pytest.mark.parametrize("change, told", [("--seed=$MLX_RANK", "seed differs"),
                                          ("--data={}$MLX_RANK", "data, its train")])
def test_processes_that_differ(data, tmp_path, change, told):
    """Other settings, or one token that is another one: all end, and one of them tells why."""
    for rank in "01":
        shutil.copytree(data, tmp_path / f"data{rank}")
    with open(tmp_path / "data1" / "train.bin", "r+b") as file:
        file.write(b"\0")
    line = shlex.join(command(tmp_path / "data0", tmp_path / "out")) + " " + change.format(tmp_path / "data")
    done = subprocess.run([*launch(2), "sh", "-c", f"exec {line}"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("differs between the processes") == 1 and told in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out" / "ckpt.safetensors").exists()


def test_processes_with_disks_of_their_own(tmp_path):
    """Each machine's first process makes the tokens there; together the processes check all ids, each its part."""
    text = "".join(f"{i} is not {i + 1}\n" for i in range(3000))
    (tmp_path / "a.txt").write_text(text)
    for rank in "01":
        (tmp_path / rank).mkdir()
    line = shlex.join(command(tmp_path / "a.txt", "out", "--tokenizer=byte", "--max_iters=2", "--overwrite=True"))
    together = [*launch(2), "sh", "-c", f"cd {shlex.quote(str(tmp_path))}/$MLX_RANK && exec {line}"]
    done = subprocess.run(together, capture_output=True, text=True, timeout=100)
    assert "step      2 | val" in done.stdout, done.stderr
    one, two = ((tmp_path / rank / "data" / "a-byte" / "train.bin").read_bytes() for rank in "01")
    assert one == two
    for rank in "01":
        with open(tmp_path / rank / "data" / "a-byte" / "train.bin", "r+b") as file:
            file.seek(-2000, os.SEEK_END)  # the second process's part
            file.write(b"\xff\xff")
    line = line.replace(str(tmp_path / "a.txt"), "data/a-byte").replace(" --tokenizer=byte", "")
    together[-1] = together[-1].rpartition("exec ")[0] + "exec " + line
    done = subprocess.run(together, capture_output=True, text=True, timeout=100)
    assert done.stderr.count("it has the id 65535, but the tokenizer has 257 tokens") == 1, done.stderr
    assert "Traceback" not in done.stderr and "step      1" not in done.stdout


def test_memory_does_not_grow_with_the_tokens(data, tmp_path):
    """A gigabyte of tokens takes no more than a few hundred kilobytes of them."""
    meta, large = json.loads((data / "meta.json").read_text()), tmp_path / "large"
    shutil.copytree(data, large)
    with open(large / "train.bin", "r+b") as file:  # zeros, which take no room on the disk
        file.truncate(2**30)
    (large / "meta.json").write_text(json.dumps({**meta, "train_tokens": 2**29}))
    peaks = [peak_memory("train.py", *command(folder, tmp_path / "out", "--overwrite=True", "--batch_size=64",
                                              "--max_iters=8")[2:]) for folder in (data, large)]
    assert peaks[1] < peaks[0] + 40 * 2**20


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
    for path in (*ROOT.glob("*.py"), *ROOT.glob("*.c")):
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
    ["--dropout=0.3", "--grad_accum=2", "--checkpoint_every=1"],
], ids=["adamw", "muon", "experts", "dropout"])
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
    prepared.run(resume, check=True)
    assert_same(tmp_path / "a", tmp_path / "b")
    for name in ("step", "train_loss", "val_loss", "grad_norm", "learning_rate"):
        assert column(tmp_path / "a", name) == column(tmp_path / "b", name)
    for path in (tmp_path / "a").glob("experts.csv"):
        assert path.read_text() == (tmp_path / "b" / "experts.csv").read_text()


def test_killed_at_any_moment(data, tmp_path):
    """kill -9 again and again while it saves every second step: whatever is on disk loads, and it gets there."""
    busy = ["--max_iters=160", "--eval_interval=2"]
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
    late = {"loss.png", "ckpt.optimizer-158.safetensors"}  # drawn, and deleted, after the last checkpoint is written
    assert sorted(name for name in os.listdir(out) if name not in late and not name.startswith("loss.png.tmp")) == [
        "best.safetensors", "ckpt.optimizer-160.safetensors", "ckpt.safetensors", "loss.csv", "run.json", "run.lock",
        "source"]


def test_interrupted_in_two_processes(data, tmp_path):
    """Both stop after the same update, and the checkpoint is there though mlx.launch ends the one that is left."""
    endless = command(data, tmp_path, "--max_iters=2000", "--eval_interval=2000")
    process = subprocess.Popen([*launch(2, by_mlx=True), *endless], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, start_new_session=True)
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
    (["--learning_rate=6e-4", "--min_lr=6e-5"], "give --min_lr=0.1"),
    (["--min_lr=1.5"], "min_lr"),
    (["--learning_rate=-1e-3"], "learning_rate"),
    (["--muon_lr=-1"], "muon_lr"),
    (["--beta1=1"], "beta1"),
    (["--beta2=-0.5"], "beta2"),
    (["--weight_decay=nan"], "weight_decay"),
    (["--dropout=1"], "dropout"),
    (["--init=nowhere.safetensors"], "nowhere.safetensors"),
    (["--init=nowhere.safetensors", "--resume=True"], "one of them"),
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


def test_bfloat16(tmp_path):
    """--dtype=bfloat16 computes in it: losses are others than float32's, though near. The file keeps float32. The text
    does not depend on this project's files: for one in some hundred texts, two losses are equal by accident."""
    losses, text = [], tmp_path / "text.txt"
    text.write_text(" ".join(np.random.default_rng(0).choice(["a", "tree", "of", "words", "grows", "here"], 20_000)))
    for dtype in ("float32", "bfloat16"):
        train(text, tmp_path / dtype, "--max_iters=2", "--sample_tokens=0", f"--dtype={dtype}")
        with open(tmp_path / dtype / "loss.csv", newline="") as file:
            losses.append([float(row[name]) for row in csv.DictReader(file) for name in ("train_loss", "val_loss")
                           if row[name]])
    exact, found = map(np.array, losses)
    assert len(exact) == 4 and (exact != found).all() and np.abs(found / exact - 1).max() < 0.01
    model, _ = load_checkpoint(str(tmp_path / "bfloat16" / "ckpt.safetensors"))
    assert {p.dtype for _, p in tree_flatten(model.parameters())} == {mx.float32}


# ---- from a checkpoint: --init ---------------------------------------------------------------------------------------


def save_as(path, source, change=lambda model: None, **header):
    """A checkpoint of another run's weights, as the readers write it: with a tokenizer, without settings."""
    model, meta = load_checkpoint(str(source / "ckpt.safetensors"))
    change(model)
    save_checkpoint(str(path), model, {"script": "hf_reader.py", "tokenizer": meta["tokenizer"], **header})
    return path


def nats_of(path, data, T=32) -> float:
    """The mean cross-entropy of a checkpoint on the windows of the evaluation, by numpy in float64."""
    model, _ = load_checkpoint(str(path))
    model.set_dtype(mx.float32)
    tokens = np.fromfile(data / "val.bin", dtype=np.uint16)
    rows = np.stack([tokens[i:i + T + 1] for i in np.random.default_rng([0]).integers(len(tokens) - T, size=16)])
    logits = np.array(model(mx.array(rows[:, :-1].astype(np.int32))), dtype=np.float64)
    logits -= logits.max(-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(logits, rows[:, 1:, None].astype(np.int64), -1).mean()


def test_init(data, whole, tmp_path):
    """An imported bfloat16 file: step 0 has its loss, steps and the schedule begin anew, and float32 is trained and
    kept. The settings say where it came from. Then it is resumed, when that file has gone, bit for bit."""
    base = save_as(tmp_path / "base.safetensors", whole, lambda model: model.set_dtype(mx.bfloat16))
    more = [f"--init={base}", "--max_iters=8", "--eval_interval=4"]
    flags = [flag for flag in TINY if not re.match("--(block_size|n_)", flag)]  # of the architecture
    for out, stop in (("a", 8), ("b", 4)):
        last = ["--decay_iters=8", f"--max_iters={stop}"]
        prepared.run([sys.executable, ROOT / "train.py", f"--data={data}", f"--out_dir={tmp_path / out}", *flags,
                      *more, *last], check=True)
    model, meta = load_checkpoint(str(tmp_path / "a" / "ckpt.safetensors"))
    assert {p.dtype for _, p in tree_flatten(model.parameters())} == {mx.float32}
    assert (model.config.n_embd, model.config.block_size) == (64, 32)
    settings = meta["settings"]
    assert (settings["init"], settings["tokenizer"], settings["n_embd"]) == (str(base), str(base), 64)
    assert [int(row["step"]) for row in curve(tmp_path / "a")][:3] == [0, 1, 2]
    np.testing.assert_allclose(column(tmp_path / "a", "learning_rate")[:4], [0.00075, 0.0015, 0.00225, 0.003])
    losses = column(tmp_path / "a", "val_loss")
    assert losses[0] == pytest.approx(nats_of(base, data), rel=1e-5) and losses[-1] < losses[0]
    base.unlink()
    resume = [sys.executable, ROOT / "train.py", f"--out_dir={tmp_path / 'b'}", "--resume=True", "--max_iters=8"]
    prepared.run(resume, check=True)
    assert_same(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("pos, T", [("learned", 16), ("rope", 16), ("rope", 48)])
def test_init_with_another_context(data, tmp_path, pos, T):
    """A shorter context, or with rotary positions a longer one: step 0 has the loss of the model in such windows."""
    tokenizer = json.loads((data / "meta.json").read_text())["tokenizer"]
    model = GPT(GPTConfig(block_size=32, n_layer=2, n_head=2, n_embd=64, vocab_size=257, pos=pos, mlp="gelu"), seed=5)
    model.update(tree_map(lambda p: p + 0.1 * mx.random.normal(p.shape), model.parameters()))
    save_checkpoint(str(tmp_path / "base.safetensors"), model, {"tokenizer": tokenizer})
    flags = [f"--init={tmp_path / 'base.safetensors'}", f"--block_size={T}", "--max_iters=1"]
    printed = train(data, tmp_path / "out", *flags).stdout
    assert f"the context is {T} tokens; that of {tmp_path / 'base.safetensors'} is 32" in printed
    wanted = nats_of(tmp_path / "base.safetensors", data, T)  # learned positions: the first 16 rows of 32
    assert column(tmp_path / "out", "val_loss")[0] == pytest.approx(wanted, rel=1e-5)
    model, meta = load_checkpoint(str(tmp_path / "out" / "ckpt.safetensors"))
    assert model.config.block_size == meta["settings"]["block_size"] == T and model.config.vocab_size == 257
    if pos == "learned":
        assert model.pos_embed.weight.shape == (T, 64)
        told = one_line(train(data, tmp_path / "no", *flags, "--block_size=64", status=2))
        assert "block_size=64" in told and "32 positions" in told and not (tmp_path / "no").exists()


def test_init_takes_the_tokenizer(whole, tmp_path):
    """A text is prepared with the checkpoint's own tokenizer; tokens of another one are refused."""
    (tmp_path / "book.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 300)
    base = whole / "ckpt.safetensors"
    shape = ["--block_size=32", "--n_embd=64"]
    train("book.txt", "out", f"--init={base}", "--max_iters=1", *shape, cwd=tmp_path)
    folder, = (tmp_path / "data").iterdir()
    ids = np.fromfile(folder / "train.bin", dtype=np.uint16)
    assert bytes(ids[:44].astype(np.uint8)) == b"the quick brown fox jumps over the lazy dog\n"
    assert load_checkpoint(str(tmp_path / "out" / "ckpt.safetensors"))[1]["settings"]["data"] == "book.txt"
    prepared.run([sys.executable, ROOT / "data.py", "--source=book.txt", "--tokenizer=char", "--out=chars"],
                   cwd=tmp_path, check=True)
    told = one_line(train("chars", "no", f"--init={base}", status=2, cwd=tmp_path))
    assert "chars has another tokenizer than" in told and f"--tokenizer={base}" in told
    assert not (tmp_path / "no").exists()


def factored(model):
    for block in model.blocks:
        block.attn.q = quantized.Factored(block.attn.q, 8)


def spoilt(model):
    model.norm.weight = model.norm.weight * math.nan


@pytest.mark.parametrize("change, flags, says", [
    (None, ["--n_layer=3"], "n_layer is 3, but 2 in"), (None, ["--mlp=swiglu"], "mlp is swiglu, but relu2 in"),
    (None, ["--tokenizer=byte"], "leave out --tokenizer"), (None, ["--vocab_size=300"], "leave out --tokenizer"),
    (lambda model: nn.quantize(model, 32, 8), [], "quantized or low-rank layers"),
    (factored, [], "quantized or low-rank layers"), (spoilt, [], "its weights are damaged"),
    ("no tokenizer", [], "no tokenizer"), ("adapter", [], "is an adapter"),
])
def test_init_refused(data, whole, tmp_path, change, flags, says):
    base, more = tmp_path / "base.safetensors", {"tokenizer": None} if change == "no tokenizer" else {}
    save_as(base, whole, change if callable(change) else lambda model: None, **more)
    if change == "adapter":
        save_arrays(str(base), {"a": mx.zeros(2)}, {"version": VERSION, "adapter": {"kind": "lora"}})
    told = one_line(train(data, tmp_path / "out", f"--init={base}", *flags, status=2))
    assert says in told and str(base) in told or "leave out" in told
    assert not (tmp_path / "out" / "ckpt.safetensors").exists()
    assert (change == "adapter") == ("merge.py" in told)


def test_init_is_not_replaced(data, whole, tmp_path):
    """Its own folder is refused, also through a link; the folder that the message offers is taken."""
    out = tmp_path / "an out"
    shutil.copytree(whole, out)
    (tmp_path / "link.safetensors").symlink_to(out / "best.safetensors")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for name in ("an out/ckpt.safetensors", "an out/best.safetensors", "link.safetensors"):
        told = one_line(train(data, out, f"--init={name}", "--overwrite=True", status=2, cwd=tmp_path))
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    other, = shlex.split(re.search("--out_dir=.*", told)[0])
    train(data, out, f"--init={name}", other, "--max_iters=1", cwd=tmp_path)
    assert (tmp_path / "an out-2" / "ckpt.safetensors").exists()


# ---- dropout ---------------------------------------------------------------------------------------------------------


def test_dropout(data, whole, tmp_path):
    """It changes the updates, and no evaluation: before training the validation loss is the one without it. Another
    seed of the same weights draws other numbers; processes draw numbers of their own."""
    train(data, tmp_path / "a", "--dropout=0.5", "--max_iters=4")
    assert column(tmp_path / "a", "val_loss")[0] == column(whole, "val_loss")[0]
    a, b = column(tmp_path / "a", "train_loss"), column(whole, "train_loss")
    assert all(x != y for x, y in zip(a, b, strict=False)) and abs(a[0] - b[0]) < 0.5
    init = f"--init={whole / 'ckpt.safetensors'}"
    first = {}
    for name, flags in (("plain", []), ("1", ["--dropout=0.5", "--seed=1"]), ("2", ["--dropout=0.5", "--seed=2"])):
        train(data, tmp_path / name, init, "--max_iters=1", "--batch_size=64", *flags)
        first[name] = column(tmp_path / name, "train_loss")[0]
    assert first["1"] != first["2"] and min(first["1"], first["2"]) > first["plain"] + 0.05  # half a model knows less


# ---- what the last lines say -----------------------------------------------------------------------------------------


def last_lines(printed: str) -> list[str]:
    return printed[printed.index("▌"):].split("\n\n")[-1].splitlines()


def test_best_is_named(data, whole, tmp_path):
    """The lowest validation loss of loss.csv and its step, in the last lines and in best.safetensors; the last step
    where it is another. The command that follows samples the best one. Where the weights of the start were better,
    that is said."""
    printed = train(data, tmp_path / "a").stdout
    losses = {int(row["step"]): float(row["val_loss"]) for row in curve(tmp_path / "a") if row["val_loss"]}
    assert min(losses, key=losses.get) == 12
    best = tmp_path / "a" / "best.safetensors"
    lines = last_lines(printed)
    assert lines[0].startswith(f"{best}: best step 12, validation loss {losses[12]:.4f}, ") and len(lines) == 3
    assert lines[-1].startswith("next: python ") and f"sample.py {best} --prompt=" in lines[-1]
    assert not re.search("NO STEP|ckpt.safetensors", "".join(lines))

    printed = train(data, tmp_path / "a", "--resume=True", "--max_iters=20", "--learning_rate=3").stdout  # too much
    losses = {int(row["step"]): float(row["val_loss"]) for row in curve(tmp_path / "a") if row["val_loss"]}
    assert min(losses, key=losses.get) == 12, losses
    lines = last_lines(printed)
    assert lines[0].startswith(f"{tmp_path / 'a' / 'ckpt.safetensors'}: last step 20, validation loss {losses[20]:.4f}")
    assert lines[1].startswith(f"{best}: best step 12, validation loss {losses[12]:.4f}") and "NO STEP" not in printed
    assert nats_of(best, data) == pytest.approx(losses[12], rel=1e-5) and f"sample.py {best}" in lines[-1]

    init = f"--init={whole / 'ckpt.safetensors'}"
    printed = train(data, tmp_path / "c", init, "--learning_rate=1", "--warmup_iters=0", "--max_iters=8").stdout
    losses = column(tmp_path / "c", "val_loss")
    assert losses[0] == min(losses)
    assert f"NO STEP WAS BETTER than the model before training, validation loss {losses[0]:.4f}: " in printed
    assert not re.search(r"\| best$", printed, re.M) and (tmp_path / "c" / "best.safetensors").exists()


def test_best_that_is_lost(data, tmp_path):
    """Where best.safetensors has gone, or is another file, the best step from here on takes its place."""
    for i, spoil in enumerate((os.remove, lambda path: open(path, "w").write("x"))):
        out = tmp_path / str(i)
        train(data, out, "--max_iters=8")
        spoil(out / "best.safetensors")
        printed = train(data, out, "--resume=True", "--max_iters=12", "--learning_rate=0").stdout
        assert load_checkpoint(str(out / "best.safetensors"))[1]["step"] == 12
        assert f"{out / 'best.safetensors'}: best step 12" in printed


def test_rates_are_logged(data, tmp_path):
    """Both learning rates under Muon, in a line of at most 80 columns and in loss.csv, from the formula of the cosine;
    of other optimizers one."""
    shares = [0.5, 1, *(0.1 + 0.9 * (1 + math.cos(math.pi * i / 2)) / 2 for i in range(2))]
    for flags in (["--optimizer=muon"], ["--optimizer=muon", "--n_expert=2"], ["--optimizer=adamw"]):
        out = tmp_path / "".join(flags)
        printed = train(data, out, *flags, "--max_iters=4", "--warmup_iters=2", "--muon_lr=0.08").stdout
        assert column(out, "learning_rate") == pytest.approx([3e-3 * share for share in shares])
        muon = [0.08 * share for share in shares] if "muon" in flags[0] else []
        assert column(out, "muon_lr") == pytest.approx(muon)
        lines = [line for line in printed.splitlines() if line.startswith("step ")]
        assert max(map(len, lines)) <= 80
        told = [[float(rate) for rate in re.search(r"\| lr ([^|]*) \|", line)[1].split()] for line in lines
                if "| loss" in line]
        wanted = [[3e-3 * share, *([0.08 * share] if muon else [])] for share in shares]
        assert told == pytest.approx(np.array(wanted), rel=0.35 if len(flags) > 1 else 0.05)


def test_extended_run(data, whole, tmp_path):
    """A larger max_iters raises the rate: one line says so, from what to what by the formula of the cosine, and names
    the settings with which the rate stays; with those, or without a change, nothing is said."""
    def again(name, *flags):
        out = tmp_path / name
        shutil.copytree(whole, out)
        printed = train(data, out, "--resume=True", *flags).stdout
        return re.findall("rate jumps, (.*); (.*) would keep it", printed), column(out, "learning_rate")[12:]

    rate = 3e-3 * (0.1 + 0.9 * (1 + math.cos(math.pi * (12 - 4) / (24 - 4))) / 2)
    (told, keep), = again("a", "--max_iters=24")[0]
    assert told == f"learning_rate from 3.0e-04 to {rate:.1e}" and keep == "--decay_iters=12"
    told, rates = again("b", "--max_iters=24", keep)
    assert not told and rates == pytest.approx([3e-4] * 12)
    (told, keep), = again("c", "--max_iters=24", "--decay_iters=12", "--min_lr=0.5")[0]
    assert told == "learning_rate from 3.0e-04 to 1.5e-03" and keep == "--min_lr=0.1"
    (told, keep), = again("d", "--max_iters=13", "--decay_iters=12", "--learning_rate=1e-4", "--schedule=wsd")[0]
    assert told == "learning_rate from 3.0e-04 to 1.0e-05"
    assert keep == "--learning_rate=0.003 --schedule=cosine"

    train(data, tmp_path / "e", "--max_iters=4", "--decay_iters=12", "--optimizer=muon")
    printed = train(data, tmp_path / "e", "--resume=True", "--max_iters=8", "--muon_lr=0.1",
                    "--optimizer=muon").stdout
    assert "the rate jumps, muon_lr from 5.0e-02 to 1.0e-01; --muon_lr=0.05 would keep it" in printed
    again = ["--resume=True", "--max_iters=12", "--optimizer=muon"]  # decay_iters and muon_lr are the checkpoint's
    assert "jumps" not in train(data, tmp_path / "e", *again).stdout


def test_tokens_when_the_batch_changes(data, whole, tmp_path):
    """12 steps of 8 x 32 tokens, then of 2 x 4 x 32 more; a checkpoint that does not count them, as old ones, too."""
    for name in ("a", "old"):
        out = tmp_path / name
        shutil.copytree(whole, out)
        if name == "old":
            arrays, header = load_arrays(str(out / "ckpt.safetensors"))
            assert header.pop("tokens") == 12 * 256
            save_arrays(str(out / "ckpt.safetensors"), arrays, header)
        train(data, out, "--resume=True", "--max_iters=16", "--batch_size=16", "--grad_accum=3")
        assert column(out, "tokens")[-5:] == [3072 + 1536 * i for i in (1, 2, 3, 4, 4)]
        train(data, out, "--resume=True", "--max_iters=18", "--batch_size=4", "--grad_accum=1")
        assert column(out, "tokens")[-3:] == [9216 + 128, 9216 + 256, 9216 + 256]
        assert load_checkpoint(str(out / "ckpt.safetensors"))[1]["tokens"] == 9472


# ---- broken folders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spoil", ["gone", "cut", "another", "text"])
def test_optimizer_file(data, whole, tmp_path, spoil):
    """Missing, cut short, of another model, no such file: one line before the first step, and the command that it
    gives begins a new run from the whole weights."""
    out = tmp_path / "an out"
    shutil.copytree(whole, out)
    path = out / "ckpt.optimizer-12.safetensors"
    if spoil == "gone":
        path.unlink()
    elif spoil == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    elif spoil == "another":
        save_arrays(str(path), {"step": mx.array(3)}, {"version": VERSION, "step": 12})
    else:
        path.write_text("hello")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != "run.lock"}
    told = one_line(train(data, out, "--resume=True", "--max_iters=16", status=2))
    assert "ckpt.optimizer-12.safetensors is missing or spoilt" in told
    assert before == {path: path.read_bytes() for path in before}
    train(data, out, *shlex.split(re.search("--init.*", told)[0]), "--max_iters=4")
    assert column(tmp_path / "an out-2", "val_loss")[0] == pytest.approx(column(whole, "val_loss")[-1], rel=1e-6)


def test_headers_that_lack_a_part(data, whole, tmp_path):
    """A checkpoint without settings, or with one that cannot be: one line. A page writes 1.0 as 1, which is right."""
    out = tmp_path / "page"
    shutil.copytree(whole, out)
    arrays, header = load_arrays(str(out / "ckpt.safetensors"))
    assert header["settings"]["grad_clip"] == 1.0
    header["settings"]["grad_clip"] = 1
    save_arrays(str(out / "ckpt.safetensors"), arrays, header)
    train(data, out, "--resume=True", "--max_iters=13")
    for change, says in (({"settings": None}, "lacks settings"), ({"step": "x"}, "lacks step"),
                         ({"tokens": "x"}, "lacks tokens"), ({"losses": 3}, "lacks losses"),
                         ({"settings": {"resume": True, "beta1": "x"}}, "beta1='x'")):
        out = tmp_path / says
        shutil.copytree(whole, out)
        arrays, header = load_arrays(str(out / "ckpt.safetensors"))
        save_arrays(str(out / "ckpt.safetensors"), arrays, {**header, **change})
        told = one_line(train(data, out, "--resume=True", "--max_iters=16", status=2))
        assert says in told or "cannot be resumed" in told


def test_broken_tokens(data, tmp_path):
    """A token folder that is not whole: one line, and nothing is written."""
    for name, content in (("train.bin", b"123"), ("val.bin", None), ("meta.json", b"{}"),
                          ("val.bin", np.full(40_000, 60_000, np.uint16).tobytes())):
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        shutil.copytree(data, tmp_path / "data")
        if content is None:
            (tmp_path / "data" / name).unlink()
        else:
            (tmp_path / "data" / name).write_bytes(content)
        told = one_line(train(tmp_path / "data", tmp_path / "out", status=2))
        assert name in told and "python data.py" in told and not (tmp_path / "out").exists()


def test_edited_curves(data, whole, tmp_path):
    """loss.csv and experts.csv with lines that somebody edited: told in a line each, left out, and kept elsewhere; what
    follows is that of an untouched run."""
    train(data, tmp_path / "a", "--n_expert=2", "--max_iters=8")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for name in ("loss.csv", "experts.csv"):
        path = tmp_path / "b" / name
        lines = path.read_text().splitlines()
        lines[3] = "# my notes"
        path.write_text("\n".join([*lines, ""]))
    for out in ("a", "b"):
        printed = train(data, tmp_path / out, "--resume=True", "--max_iters=12").stdout
        assert printed.count("line 4 is no row") == (2 if out == "b" else 0)
    for name in ("loss", "experts"):
        a, b = (open(tmp_path / out / f"{name}.csv").read().splitlines() for out in "ab")
        assert "# my notes" in (tmp_path / "b" / f"{name}-2.csv").read_text() and b[2] == a[2]
        a, b = ([line.split(",") for line in lines] for lines in (a, b))
        drop = 2 if name == "experts" else 1  # both layers of that step
        assert len(b) == len(a) - drop and [line[0] for line in b[-6:]] == [line[0] for line in a[-6:]]
    assert (tmp_path / "b" / "experts.png").exists()
    assert column(tmp_path / "a", "train_loss")[-4:] == column(tmp_path / "b", "train_loss")[-4:]


# ---- Ctrl-C at any moment, a full disk -------------------------------------------------------------------------------


def test_stopped_at_any_moment(data, tmp_path):
    """Ctrl-C, as a terminal sends it, after random times: status 130 and at most one line, and the run goes on to the
    end that it would have come to."""
    busy = ["--max_iters=200", "--eval_interval=5"]
    train(data, tmp_path / "a", *busy)
    out, rng, stops = tmp_path / "b", random.Random(1), 0
    while True:
        resume = ["--resume=True"] if (out / "ckpt.safetensors").exists() else []
        process = subprocess.Popen(command(data, out, *busy, *resume), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   text=True, start_new_session=True)
        process.stdout.readline()  # it is about to train, or has ended
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0, 0.5))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
        printed, error = process.communicate()
        if process.returncode == 2 and "already" in error or process.returncode == 0:
            break
        if process.returncode == -signal.SIGINT:  # a shell calls it 130, too: all was done, and Python was ending
            assert not error and "sample.py" in printed.splitlines()[-1]
            break
        assert process.returncode == 130 and error in ("", "stopped\n"), error
        assert error or f"train.py --out_dir={out} --resume=True" in printed.splitlines()[-1]
        stops += 1
    assert stops >= 3
    assert_same(tmp_path / "a", out)


def test_stopped_while_data_is_prepared(tmp_path):
    """Ctrl-C while data.py works: one line; no run has begun, and the next one prepares the data."""
    letters = random.Random(0)
    (tmp_path / "long.txt").write_text("".join(f"{letters.random()} " for _ in range(400_000)))
    start = [sys.executable, str(ROOT / "train.py"), "--data=long.txt", "--out_dir=out", *TINY, "--max_iters=1"]
    process = subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
                               start_new_session=True)
    while not (tmp_path / "data").exists():
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    printed, error = process.communicate()
    assert (process.returncode, error) == (130, "stopped\n") and not (tmp_path / "out").exists()
    train("long.txt", "out", "--max_iters=1", cwd=tmp_path)


def test_stopped_in_the_first_evaluation(data, tmp_path):
    """There is nothing to save: it ends after that evaluation."""
    process = subprocess.Popen(command(data, tmp_path, "--eval_windows=6000"), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    process.stdout.readline(), process.stdout.readline()  # parameters, device
    process.send_signal(signal.SIGINT)
    printed, error = process.communicate()
    assert (process.returncode, error) == (130, "stopped\n") and "| loss" not in printed
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("most", [400, 20_000, 100_000, "ckpt.safetensors"])
def test_full_disk_at_any_size(data, tmp_path, most):
    """Files may not grow over so many bytes, as on a disk that is full: one line, the checkpoint from before is whole,
    and with more room the run comes to where it would have come. Lion's state is smaller than the model's file."""
    lion = ["--optimizer=lion", "--learning_rate=1e-3", "--decay_iters=12"]
    train(data, tmp_path / "a", "--max_iters=8", *lion)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    before = (tmp_path / "b" / "ckpt.safetensors").read_bytes()
    room = most if isinstance(most, int) else len(before) - 1000
    small = dict(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)))
    told = one_line(train(data, tmp_path / "b", "--resume=True", "--max_iters=12", *lion, status=2, **small))
    assert "cannot write" in told and "unharmed" in told
    assert (tmp_path / "b" / "ckpt.optimizer-12.safetensors").exists() == (room > 100_000)
    assert (tmp_path / "b" / "ckpt.safetensors").read_bytes() == before
    for out in ("a", "b"):
        train(data, tmp_path / out, "--resume=True", "--max_iters=12", *lion)
    assert_same(tmp_path / "a", tmp_path / "b")
    assert not list((tmp_path / "b").glob("*tmp*"))
