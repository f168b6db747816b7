"""sft.py, run as a user runs it: adapters and whole models learn; what it writes does what it says; bad input."""
import csv
import json
import math
import os
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

import lora
from conversations import encode
from model import GPT, GPTConfig, load_checkpoint, save_checkpoint
from records import read_conversations, split
from tokenizer import Tokenizer, byte_tokenizer

ENC = byte_tokenizer()
FAST = ["--epochs=25", "--batch_size=2", "--eval_interval=5", "--log_interval=1", "--samples=1", "--sample_tokens=5",
        "--learning_rate=1e-2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, and examples that answer with the question's last word."""
    folder = tmp_path_factory.mktemp("sft")
    model = GPT(GPTConfig(block_size=64, vocab_size=320, n_layer=2, n_head=2, n_embd=64), seed=1)
    text, optimizer = np.frombuffer((ROOT / "LICENSE").read_bytes(), np.uint8).astype(np.int32), optim.Adam(5e-3)
    step = nn.value_and_grad(model, lambda x: model.loss(x[:, :-1], x[:, 1:]))
    for i in range(100):
        starts = np.random.default_rng(i).integers(len(text) - 65, size=8)
        _, gradients = step(mx.array(np.stack([text[start:start + 65] for start in starts])))
        optimizer.update(model, gradients)
        mx.eval(model.parameters())
    save_checkpoint(str(folder / "base.safetensors"), model, {"tokenizer": ENC.to_dict(), "script": "train.py"})
    with open(folder / "tasks.jsonl", "w") as file:
        for i in range(40):
            word = "abcdefgh"[i % 8] * 3
            print(json.dumps({"prompt": f"{i} {word}", "response": word}), file=file)
    return folder


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A checkpoint as a reader makes it: a context of 4,096 tokens, a chat template of its own, no bos."""
    special = {**ENC.special, "<|im_start|>": 257, "<|im_end|>": 258, "<|end|>": 259}
    enc = Tokenizer("byte", ENC.tokens, special, "", None, 258)
    meta = {"tokenizer": enc.to_dict(), "chat_template": OWN, "template": "own", "ends": [256, 259],
            "hf": {"tokenizer_config": {"eos_token": "<|im_end|>"}}, "script": "hf_reader.py"}
    path = tmp_path_factory.mktemp("foreign") / "foreign.safetensors"
    save_checkpoint(str(path), GPT(GPTConfig(block_size=4096, vocab_size=320, n_layer=1, n_head=2, n_embd=32), seed=1),
                    meta)
    return path


OWN = """{% for message in messages %}
{% if loop.first and message.role != 'system' %}{{ '<|im_start|>system\nYou are a test.<|im_end|>\n' }}{% endif %}
{% if message.content == 'no' %}{{ raise_exception('Not this!') }}{% endif %}
{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def sft(folder, out, *arguments, status=0):
    done = prepared.run([sys.executable, ROOT / "sft.py", folder / "base.safetensors",
                         f"--data={folder / 'tasks.jsonl'}", f"--out_dir={out}", *FAST, *arguments])
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def column(out, name) -> list[float]:
    with open(out / "loss.csv", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def tuned(folder, out) -> GPT:
    """The model that sft.py left."""
    if "--adapter" in out.name:
        model, _ = load_checkpoint(str(folder / "base.safetensors"))
        load_adapter(model, str(out / "sft.safetensors"))
        return model
    return load_checkpoint(str(out / "sft.safetensors"))[0]


@pytest.mark.parametrize("arguments", [
    ["--kind=lora"], ["--kind=dora", "--base_bits=8"], ["--kind=full", "--learning_rate=3e-3", "--compile=True"],
    ["--kind=rslora", "--packing=False", "--neftune=1", "--epochs=6"],
    ["--kind=lora", "--precision=mxfp8", "--optimizer_bits=8"],
    ["--kind=full", "--learning_rate=3e-3", "--precision=nvfp4", "--optimizer_bits=4", "--optimizer=muon"],
], ids=lambda arguments: arguments[0][2:])
def test_learns(folder, tmp_path, arguments):
    """The loss falls; and the last validation figure that was saved is, computed again, that of the file."""
    out = tmp_path / ("full" if "--kind=full" in arguments else "--adapter")
    done = sft(folder, out, *arguments, "--template=plain")
    losses, held_out = column(out, "train_loss"), column(out, "val_loss")
    assert losses[-1] < 0.6 * losses[0] and held_out[-1] < 0.7 * held_out[0]
    assert re.search(r"step +\d+ \| loss .* tok/s\n", done.stdout) and "before:" in done.stdout
    assert max(len(line) for line in done.stdout.splitlines() if line.startswith("step ")) <= 80
    names = "step,tokens,seconds,train_loss,val_loss,learning_rate,muon_lr,grad_norm,tok_per_s,peak_gib\n"
    assert (out / "loss.csv").read_text().startswith(names) and column(out, "tokens")[-1] > 1000
    assert json.loads((out / "run.json").read_text())["settings"]["template"] == "plain"
    assert {path.name for path in out.iterdir()} == {"sft.safetensors", "resume.safetensors", "loss.csv", "loss.png",
                                                         "run.json", "run.lock", "source"}
    best = min(held_out.index(min(held_out)) * 5, len(losses))
    assert f"sft.safetensors: step {best}, loss held out {min(held_out):.4f}, {held_out[0]:.4f} before" in done.stdout
    model, nats, count = tuned(folder, out), 0.0, 0
    talks = split(read_conversations(str(folder / "tasks.jsonl")), 0.1, 1337)[1]
    assert len(talks) == 4
    for talk in talks:
        ids, learned = encode(ENC, talk, "plain")
        logits = np.array(model(mx.array([ids[:-1]]))[0], np.float64)
        for t, row in enumerate(logits):
            if learned[t + 1]:
                nats, count = nats + np.log(np.exp(row).sum()) - row[ids[t + 1]], count + 1
    assert min(held_out) == pytest.approx(nats / count, rel=1e-3)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_first_update_by_muon(folder, tmp_path, kind):
    """Each matrix of the blocks changes by a norm of muon_lr, times 0.7 to 1.2 (Jordan et al. 2024). Of an adapter
    that is b alone, as the gradient of a is 0 where b is 0. Vectors and embeddings move as Adam moves them."""
    settings = [f"--kind={kind}", "--optimizer=muon", "--muon_lr=0.5", "--learning_rate=1e-3", "--epochs=1",
                "--batch_size=999", "--grad_clip=0"]
    sft(folder, tmp_path, *settings)
    after = mx.load(str(tmp_path / "sft.safetensors"))
    before = mx.load(str(folder / "base.safetensors")) if kind == "full" else {
        name: mx.zeros(array.shape) for name, array in after.items() if name.endswith(".b")}
    for name, old in before.items():
        change = np.array(after[name] - old, np.float64)
        if name.startswith("blocks.") and change.ndim > 1:
            assert 0.65 < np.linalg.norm(change, 2) / (0.5 * max(1, len(change) / len(change.T))**0.5) < 1.25, name
        else:
            if name == "embed.weight":  # bytes that occur: gradients of others are as small as Adam's epsilon
                change = change[list(b"aeinorst ")]
            moved = np.abs(change[np.abs(change) > 1e-5])
            assert moved.max() < 1.01e-3 and np.median(moved) > 0.9e-3, name
    if kind == "full":  # the decay of a matrix goes by the learning rate of its optimizer
        sft(folder, tmp_path, *settings, "--weight_decay=0.2", "--overwrite=True")
        for name, array in mx.load(str(tmp_path / "sft.safetensors")).items():
            rate = 0 if array.ndim < 2 else 0.5 if name.startswith("blocks.") else 1e-3
            decay = np.array(before[name] * (0.2 * rate))
            np.testing.assert_allclose(np.array(after[name] - array), decay, atol=1e-5, err_msg=name)


def test_keeps_the_best_step(folder, tmp_path):
    """Where answers cannot be guessed, what is learned by heart makes the loss held out grow again."""
    rng = np.random.default_rng(0)
    with open(tmp_path / "random.jsonl", "w") as file:
        for i in range(24):
            print(json.dumps({"prompt": str(i), "response": "".join(rng.choice([*"abcd"], 8))}), file=file)
    sft(folder, tmp_path, f"--data={tmp_path / 'random.jsonl'}", "--kind=full", "--epochs=120", "--template=plain")
    held_out, meta = column(tmp_path, "val_loss"), load_checkpoint(str(tmp_path / "sft.safetensors"))[1]
    assert held_out[-1] > 1.1 * min(held_out) and meta["losses"]["val"] == min(held_out)
    assert meta["step"] == 5 * int(np.argmin(held_out))


def test_noise_of_neftune():
    """Uniform, within neftune / sqrt(T C) of the embeddings, and nowhere else (Jain et al. 2023)."""
    source = (ROOT / "sft.py").read_text()
    made = {"mx": mx, "math": math, "neftune": 5.0}
    exec(source[source.index("def noise"):source.index("def loss_of")], made)
    x = mx.zeros((4, 16, 64))
    found, size = np.array(made["noise"]("resid", 0, x)), 5 / 32
    assert 0.99 * size < np.abs(found).max() <= size and found.std() == pytest.approx(size / 3**0.5, rel=0.05)
    assert made["noise"]("resid", 1, x) is x and made["noise"]("attn", 0, x) is x


def test_folder_for_peft(folder, tmp_path):
    """--peft=True writes the same adapter once more; what has no such form is told before any training."""
    sft(folder, tmp_path / "a", "--epochs=1", "--peft=True")
    models = [load_checkpoint(str(folder / "base.safetensors"))[0] for _ in range(2)]
    for model, path in zip(models, ("sft.safetensors", "peft"), strict=True):
        load_adapter(model, str(tmp_path / "a" / path))
    ids = mx.arange(40)[None]
    assert mx.abs(models[0](ids) - models[1](ids)).max() < 1e-5
    model = GPT(GPTConfig(block_size=64, vocab_size=320, n_layer=2, n_head=2, n_embd=64, norm="layer", bias=True,
                          mlp="swiglu"))
    save_checkpoint(str(tmp_path / "odd.safetensors"), model, {"tokenizer": ENC.to_dict()})
    done = sft(folder, tmp_path / "b", f"--checkpoint={tmp_path / 'odd.safetensors'}", "--peft=True", status=2)
    assert "has no name in PEFT's folders" in done.stderr and "step" not in done.stdout


def test_an_adapter_is_small_and_names_its_base(folder, tmp_path):
    sft(folder, tmp_path, "--rank=2", "--targets=attn.q", "--epochs=1")
    arrays, meta = mx.load(str(tmp_path / "sft.safetensors"), return_metadata=True)
    meta = json.loads(meta["tinygpt"])
    model, _ = load_checkpoint(str(folder / "base.safetensors"))
    assert meta["base"] == lora.base_fingerprint(model) and meta["template"] == "chatml"
    assert (meta["rank"], meta["alpha"], meta["kind"], meta["targets"]) == (2, 16.0, "lora", "attn.q")
    assert {name: array.shape for name, array in arrays.items()} == {
        f"blocks.{i}.attn.q.{part}": shape for i in (0, 1) for part, shape in (("a", (2, 64)), ("b", (64, 2)))}


def test_full_continues_from_full(folder, tmp_path):
    """What kind=full wrote is a checkpoint like any other, and keeps its template."""
    sft(folder, tmp_path / "a", "--kind=full", "--epochs=1", "--template=alpaca")
    done = prepared.run([sys.executable, ROOT / "sft.py", tmp_path / "a" / "sft.safetensors",
                         f"--data={folder / 'tasks.jsonl'}", f"--out_dir={tmp_path / 'b'}", *FAST, "--epochs=1"])
    assert done.returncode == 0
    _, meta = load_checkpoint(str(tmp_path / "a" / "sft.safetensors"))
    adapter = json.loads(mx.load(str(tmp_path / "b" / "sft.safetensors"), return_metadata=True)[1]["tinygpt"])
    assert meta["template"] == adapter["template"] == "alpaca"
    assert all(p.dtype == mx.float32 for _, p in tree_flatten(load_checkpoint(
        str(tmp_path / "a" / "sft.safetensors"))[0].parameters()))


def test_long_examples_are_cut_or_skipped_and_told(folder, tmp_path):
    """And examples whose prompts are also held out are left out."""
    path = tmp_path / "long.jsonl"
    path.write_text((folder / "tasks.jsonl").read_text() + "".join(
        json.dumps(talk) + "\n" for talk in [{"prompt": f"{i}" * 90, "response": "y"} for i in range(3)]
        + [{"prompt": "x", "response": "y" * 90}] * 2))
    (tmp_path / "val.jsonl").write_text("".join((folder / "tasks.jsonl").open().readlines()[:7]).replace(" ", "  "))
    done = sft(folder, tmp_path / "out", f"--data={path}", f"--val_data={tmp_path / 'val.jsonl'}", "--template=plain",
               "--epochs=1")
    assert re.search(r"training: 35 examples.*\n +5 cut at 64 tokens; 3 SKIPPED", done.stdout)
    assert "7 training examples are LEFT OUT, since their prompts are also held out" in done.stdout


@pytest.mark.parametrize("arguments, says", [
    (["--data="], "give --data"), (["--data=nothing.jsonl"], "nothing.jsonl"), (["--kind=prefix"], "kind='prefix'"),
    (["--targets=atn"], "target 'atn'"), (["--template=vicuna"], "template='vicuna'"),
    (["--base_bits=5x"], "base_bits"), (["--base_bits=7"], "base_bits=7"),
    (["--kind=full", "--base_bits=4"], "packed weights do not train"), (["--val_share=1"], "val_share"),
    (["--epochs=0"], "epochs=0"), (["--rank=0"], "rank=0"), (["--dtype=float16"], "float16"),
    (["--optimizer=lion"], "optimizer='lion'"), (["--learning_rate=-1e-3"], "learning_rate=-0.001"),
    (["--min_lr=6e-5"], "share of the peak"), (["--dropout=1"], "dropout"), (["--grad_accum=0"], "grad_accum=0"),
    (["--resume=True"], "resume"), (["--precision=fp4"], "precision='fp4'"), (["--optimizer_bits=16"], "must be 32"),
    (["--precision=fp8", "--kind=dora"], "take kind=lora"), (["--precision=fp8", "--base_bits=4"], "packed ones"),
    (["--precision_off=square"], "precision=''"),
], ids=lambda argument: str(argument)[:40])
def test_mistakes(folder, tmp_path, arguments, says):
    done = sft(folder, tmp_path / "out", *arguments, status=2)
    assert says in done.stderr and not (tmp_path / "out").exists()


def test_bad_rows(folder, tmp_path):
    """They are skipped and counted; --strict=True refuses the file."""
    path = tmp_path / "bad.jsonl"
    path.write_text((folder / "tasks.jsonl").read_text() + '{"prompt": "x", "response": ""}\n{"prompt": "x"\n')
    done = sft(folder, tmp_path / "out", f"--data={path}", "--strict=True", status=2)
    assert "line 41: an empty response" in done.stderr and not (tmp_path / "out").exists()
    done = sft(folder, tmp_path / "out", f"--data={path}", "--epochs=1")
    assert "40 conversations" in done.stdout and "2 of 42 rows SKIPPED" in done.stdout
    assert f"{path}, line 42 is skipped: no JSON" in done.stderr


# ---- models of other projects ----------------------------------------------------------------------------------------


def test_own_template(foreign, folder, tmp_path):
    """The template of the model is learned and kept, with all that its header says of tokens; a conversation that it
    refuses is skipped and told; rows are as long as the data needs; the model keeps its context."""
    data = tmp_path / "tasks.jsonl"
    data.write_text((folder / "tasks.jsonl").read_text() + '{"prompt": "no", "response": "x"}\n' * 3)
    for out, arguments in (("full", ["--kind=full"]), ("--adapter", [])):
        done = sft(folder, tmp_path / out, f"--checkpoint={foreign}", f"--data={data}", "--epochs=1", *arguments)
        assert re.search(r"<\|im_start\|>system\nYou are a test\.<\|im_end\|>\n<\|im_start\|>user\n\d+ [a-h]{3}"
                         r"<\|im_end\|>\n<\|im_start\|>assistant\n>>>[a-h]{3}<\|im_end\|><<<\n", done.stdout)
        skipped = re.findall(r"(\d+) of \d+ examples are SKIPPED: .*: Not this!", done.stdout)
        assert sum(map(int, skipped)) == 3 and "rows of 64 tokens" in done.stdout
        model, meta = lora.load_adapted(str(tmp_path / out / "sft.safetensors"))
        theirs = load_checkpoint(str(foreign))[1]
        assert all(meta[name] == theirs[name] for name in ("chat_template", "template", "ends", "hf", "tokenizer"))
        assert model.config.block_size == 4096
    given = sft(folder, tmp_path / "b", f"--checkpoint={foreign}", "--epochs=1", "--block_size=96", "--template=alpaca",
                "--kind=full")
    assert "rows of 96 tokens" in given.stdout
    meta = load_checkpoint(str(tmp_path / "b" / "sft.safetensors"))[1]
    assert meta["template"] == "alpaca" and meta["ends"] == [256, 259] and "chat_template" not in meta
    resumed = [sys.executable, ROOT / "sft.py", f"--out_dir={tmp_path / 'b'}", "--resume=True", "--epochs=2"]
    done = prepared.run([*resumed, "--block_size=128"])
    assert done.returncode == 2 and "block_size is 96" in done.stderr
    assert "rows of 96 tokens" in prepared.run(resumed, check=True).stdout


def test_mistakes_with_an_own_template(foreign, folder, tmp_path):
    data = tmp_path / "tasks.jsonl"
    data.write_text((folder / "tasks.jsonl").read_text() + '{"prompt": "no", "response": "x"}\n')
    for arguments, says in ((["--block_size=5000"], "block_size=5000: it must be from 1 to 4096"),
                            (["--block_size=8"], "within 8 tokens: give a larger --block_size"),
                            (["--strict=True"], "user, assistant: Not this! (1 of")):
        done = sft(folder, tmp_path / "a", f"--checkpoint={foreign}", f"--data={data}", *arguments, status=2)
        assert says in done.stderr and done.stderr.count("\n") == 1 and not (tmp_path / "a").exists()


def test_a_base_model_is_told_its_template(folder, tmp_path):
    done = sft(folder, tmp_path / "a", "--epochs=1")
    assert "the checkpoint has no chat template: chatml is taken, whose marks become text" in done.stdout
    names = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    enc = Tokenizer("byte", ENC.tokens, {**ENC.special, **{name: 257 + i for i, name in enumerate(names)}})
    model, _ = load_checkpoint(str(folder / "base.safetensors"))
    save_checkpoint(str(tmp_path / "llama.safetensors"), model, {"tokenizer": enc.to_dict()})
    done = sft(folder, tmp_path / "b", f"--checkpoint={tmp_path / 'llama.safetensors'}", "--epochs=1")
    assert "llama3 is taken, as the tokenizer has <|eot_id|>" in done.stdout
    assert "<|begin_of_text|><|start_header_id|>user" in done.stdout


# ---- resume, stop ----------------------------------------------------------------------------------------------------


def state(out) -> dict[str, np.ndarray]:
    """The arrays of what a run leaves, and loss.csv without times."""
    arrays = {f"{path.name} {name}": np.array(array) for path in out.glob("*.safetensors")
              for name, array in mx.load(str(path)).items()}
    with open(out / "loss.csv", newline="") as file:
        rows = [[value for name, value in row.items() if name not in (
            "seconds", "tok_per_s", "peak_gib", "sampling_s", "learning_s")]
                for row in csv.DictReader(file)]
    return {**arrays, "loss.csv": np.array(rows)}


def assert_equal(a, b):
    a, b = state(a), state(b)
    assert a.keys() == b.keys() and [name for name in a if not np.array_equal(a[name], b[name])] == []


ON_PATH = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
STOPPED = """
import os, runpy, signal, sys
import run_folder
stop, add_row = int(sys.argv[1]), run_folder.add_row

def add_and_stop(out_dir, columns, row):
    add_row(out_dir, columns, row)
    if row["step"] == stop and "train_loss" in row:
        os.kill(os.getpid(), signal.SIGTERM)

run_folder.add_row, sys.argv = add_and_stop, sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("arguments", [
    ["--kind=lora", "--dropout=0.2", "--neftune=2", "--grad_accum=2", "--epochs=8"], ["--kind=dora", "--base_bits=8"],
    ["--kind=full", "--optimizer=muon", "--weight_decay=0.1"],
    ["--kind=full", "--optimizer_bits=8", "--precision=nvfp4"],
], ids=lambda arguments: arguments[0][2:])
def test_resume_is_exact(folder, tmp_path, arguments):
    """Asked to stop in the middle, between evaluations and at one, and resumed, a run leaves what an unstopped one
    leaves, to the last bit."""
    settings = ["--epochs=3", *arguments, "--template=plain", "--eval_interval=4"]
    sft(folder, tmp_path / "whole", *settings)
    for stop in (6, 8):
        out = tmp_path / f"part{stop}"
        (tmp_path / "stop.py").write_text(STOPPED)
        command = [sys.executable, tmp_path / "stop.py", str(stop), ROOT / "sft.py", folder / "base.safetensors",
                   f"--data={folder / 'tasks.jsonl'}", f"--out_dir={out}", *FAST, *settings]
        done = subprocess.run(command, capture_output=True, text=True, env=ON_PATH)
        assert done.returncode == 130, done.stderr
        step = int(re.search(r"stopped at step (\d+) of \d+", done.stdout)[1])
        assert stop <= step <= stop + 1 and "--resume=True" in done.stdout
        again = prepared.run([sys.executable, ROOT / "sft.py", f"--out_dir={out}", "--resume=True"])
        assert again.returncode == 0, again.stderr
        assert_equal(tmp_path / "whole", out)


def test_more_epochs(folder, tmp_path):
    """A finished run goes on with more epochs; what the state depends on cannot change."""
    def again(*arguments):
        return prepared.run([sys.executable, ROOT / "sft.py", f"--out_dir={tmp_path / 'a'}", "--resume=True",
                             *arguments])

    data = tmp_path / "tasks.jsonl"
    data.write_bytes((folder / "tasks.jsonl").read_bytes())
    sft(folder, tmp_path / "a", f"--data={data}", "--epochs=1")
    steps = len(column(tmp_path / "a", "train_loss"))
    assert f"is at step {steps} of {steps} already: give more --epochs" in again().stderr
    for setting, says in (("--rank=4", "rank is 8"), ("--grad_accum=2", "grad_accum is 1"), ("--seed=1", "seed is")):
        done = again("--epochs=2", setting)
        assert done.returncode == 2 and says in done.stderr and "leave it out" in done.stderr
    done = again("--epochs=2")
    assert done.returncode == 0 and len(column(tmp_path / "a", "train_loss")) == 2 * steps
    data.write_text(data.read_text().replace("aaa", "aba"))
    assert f"{data} has changed since" in again("--epochs=3").stderr


def test_a_state_of_the_run_before_is_not_resumed(folder, tmp_path):
    """A new run that is killed before it saves has not yet replaced the state of the run before it."""
    sft(folder, tmp_path / "a", "--epochs=1")
    facts = json.loads((tmp_path / "a" / "run.json").read_text())
    (tmp_path / "a" / "run.json").write_text(json.dumps({**facts, "started": "2026-01-01T00:00:00+00:00"}))
    command = [sys.executable, ROOT / "sft.py", f"--out_dir={tmp_path / 'a'}", "--resume=True", "--epochs=2"]
    done = prepared.run(command)
    assert done.returncode == 2 and "another one began" in done.stderr and "--overwrite=True" in done.stderr
    (tmp_path / "a" / "run.json").write_text(json.dumps(facts))
    for epochs in (2, 3):
        prepared.run([*command[:-1], f"--epochs={epochs}"], check=True)
    assert json.loads((tmp_path / "a" / "run.json").read_text())["started"] == facts["started"]


def test_accumulated_gradients_are_those_of_one_batch(folder, tmp_path):
    """Two micro-steps of two rows and one of four rows make equal updates, though their rows have different numbers of
    response tokens."""
    data = tmp_path / "uneven.jsonl"
    with open(data, "w") as file:
        for i in range(12):
            print(json.dumps({"prompt": f"{i}", "response": "ab" * (1 + 5 * (i % 4))}), file=file)
    for name, sizes in (("one", ["--batch_size=4"]), ("two", ["--batch_size=2", "--grad_accum=2"])):
        sft(folder, tmp_path / name, f"--data={data}", "--kind=full", "--packing=False", "--template=plain",
            "--epochs=3", "--dtype=float32", *sizes)
    for name in ("train_loss", "val_loss", "grad_norm"):
        np.testing.assert_allclose(column(tmp_path / "one", name), column(tmp_path / "two", name), rtol=1e-4)


def test_the_step_before_training_may_be_the_best(folder, tmp_path):
    sft(folder, tmp_path / "a", "--kind=full")
    done = sft(folder, tmp_path / "b", f"--checkpoint={tmp_path / 'a' / 'sft.safetensors'}", "--kind=full",
               "--learning_rate=0.5", "--epochs=3", "--grad_clip=0")
    held_out = column(tmp_path / "b", "val_loss")
    assert held_out[0] < min(held_out[1:]) and "| best" not in done.stdout
    assert "NO STEP WAS BETTER than the model before training" in done.stdout
    assert f"loss held out {min(held_out[1:]):.4f}, {held_out[0]:.4f} before training" in done.stdout


# ---- chains ----------------------------------------------------------------------------------------------------------


def test_nothing_is_written_over_an_input(folder, tmp_path):
    """Not the checkpoint, through a link or not; not the base of an adapter; not with --overwrite=True."""
    sft(folder, tmp_path / "a", "--kind=full", "--epochs=1")
    result = tmp_path / "a" / "sft.safetensors"
    before = result.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(result)
    os.link(result, tmp_path / "hard.safetensors")
    (tmp_path / "a" / "more.jsonl").write_bytes((folder / "tasks.jsonl").read_bytes())
    for path in (result, tmp_path / "link.safetensors", tmp_path / "hard.safetensors",
                 tmp_path / "a" / ".." / "a" / "sft.safetensors"):
        done = sft(folder, tmp_path / "a", f"--checkpoint={path}", "--overwrite=True", status=2)
        assert str(path) in done.stderr and "--out_dir=" in done.stderr and result.read_bytes() == before
    sft(folder, tmp_path / "b", f"--checkpoint={result}", "--epochs=1")
    done = sft(folder, tmp_path / "a", f"--checkpoint={tmp_path / 'b' / 'sft.safetensors'}", "--overwrite=True",
               status=2)
    named = re.search("would overwrite the input (.+): give", done.stderr)[1]  # a relative path, where that is shorter
    assert (ROOT / named).samefile(result) and result.read_bytes() == before


def test_chain_of_adapters(folder, tmp_path):
    """An adapter on an adapter: the second is trained on the first one merged, and finds it by itself."""
    sft(folder, tmp_path / "a", "--template=plain", "--dtype=float32")
    sft(folder, tmp_path / "b", f"--checkpoint={tmp_path / 'a' / 'sft.safetensors'}", "--epochs=2", "--dtype=float32")
    assert column(tmp_path / "b", "val_loss")[0] == pytest.approx(min(column(tmp_path / "a", "val_loss")), rel=1e-4)
    model, meta = lora.load_adapted(str(tmp_path / "b" / "sft.safetensors"))
    assert meta["template"] == "plain" and meta["tokenizer"] == ENC.to_dict()
    base, _ = load_checkpoint(str(folder / "base.safetensors"))
    expected = {}
    for name, weight in tree_flatten(base.parameters()):
        expected[name] = np.array(weight, np.float64)
        for run in "ab":
            arrays = mx.load(str(tmp_path / run / "sft.safetensors"))
            if (a := arrays.get(name.replace(".weight", ".a"))) is not None:
                b = arrays[name.replace(".weight", ".b")]
                expected[name] = expected[name] + 2 * np.array(b, np.float64) @ np.array(a, np.float64)
    lora.merge(model)
    for name, weight in tree_flatten(model.parameters()):
        np.testing.assert_allclose(np.array(weight), expected[name], atol=1e-5, err_msg=name)


def test_bfloat16(folder, tmp_path):
    """--dtype=bfloat16 computes in it also where the parameters that train are float32."""
    losses = []
    for dtype in ("float32", "bfloat16"):
        sft(folder, tmp_path / dtype, "--kind=full", "--template=plain", "--epochs=1", "--learning_rate=1e-3",
            f"--dtype={dtype}")
        losses.append([column(tmp_path / dtype, name)[0] for name in ("train_loss", "val_loss")])
    exact, found = map(np.array, losses)
    assert (exact != found).all() and np.abs(found / exact - 1).max() < 0.02
