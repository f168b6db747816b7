"""merge.py, run as a user runs it: against the formulas and sft.py's own merged file; PEFT's folders; bad input."""
import json
import os
import resource
import subprocess
import sys

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, run
from mlx.utils import tree_flatten
from test_sft import folder, sft  # noqa: F401  (a checkpoint)

import lora
from lora import attach, linear_layers, load_adapted, save_adapter
from model import GPT, GPTConfig, load_checkpoint, save_checkpoint
from tokenizer import byte_tokenizer

IDX = mx.array(np.random.default_rng(0).integers(0, 256, (2, 40)))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint, adapters of all kinds for it, and one for it with the first."""
    out = tmp_path_factory.mktemp("merge")
    model = GPT(GPTConfig(block_size=64, vocab_size=320, n_layer=2, n_head=2, n_embd=64, norm="layer", pos="learned"),
                seed=1)
    save_checkpoint(str(out / "base"), model, {"tokenizer": byte_tokenizer().to_dict(), "script": "train.py", "step": 9,
                                               "losses": {"val": 3.0}, "template": "alpaca",
                                               "chat": {"template": "alpaca"}})
    for seed, kind in enumerate((*lora.KINDS, "chained")):
        bases = [str(out / "base"), *([f"{out / 'lora'}:0.5"] if kind == "chained" else [])]
        model, meta = load_adapted(bases[0], bases[1:])
        lora.merge(model)
        attach(model, "attn", rank=3, alpha=5, kind="dora" if kind == "chained" else kind, seed=seed)
        for i, module in enumerate(module for module in model.modules() if isinstance(module, lora.Adapter)):
            module.b = 0.2 * mx.random.normal(module.b.shape, key=mx.random.key(10 * seed + i))
        header = {} if kind == "lora" else {"template": "chatml", "chat": {"template": "chatml"}}
        save_adapter(str(out / kind), model, header, meta.get("fingerprint"), bases)
        if kind == "rslora":
            lora.save_peft(str(out / "peft"), model, {})
    return out


def in_float64(files, *adapters_and_weights) -> dict[str, np.ndarray]:
    """The weights of the base after adapters, one upon the other, by the formulas."""
    weights = {name: np.array(array, np.float64)
               for name, array in mx.load(str(files / "base"), format="safetensors").items()}
    for adapter, weight in adapters_and_weights:
        arrays, header = mx.load(str(files / adapter), format="safetensors", return_metadata=True)
        kind = json.loads(header["tinygpt"])["kind"]
        arrays = {name: np.array(array, np.float64) for name, array in arrays.items()}
        for path in {name.rpartition(".")[0] for name in arrays}:
            W = weights[f"{path}.weight"]
            W += weight * 5 / (3**0.5 if kind == "rslora" else 3) * arrays[f"{path}.b"] @ arrays[f"{path}.a"]
            if kind == "dora":
                W *= arrays[f"{path}.m"][:, None] / np.linalg.norm(W, axis=1, keepdims=True)
    return weights


@pytest.mark.parametrize("given, formula", [
    (["lora"], [("lora", 1)]), (["rslora"], [("rslora", 1)]), (["dora"], [("dora", 1)]),
    (["base", "--adapter=peft"], [("rslora", 1)]), (["base", "--adapter=peft:-0.5"], [("rslora", -0.5)]),
    (["base", "--adapter=lora:0.5", "--adapter=rslora:-2"], [("lora", 0.5), ("rslora", -2)]),
    (["lora", "--adapter=rslora"], [("lora", 1), ("rslora", 1)]),
    (["chained"], [("lora", 0.5), ("chained", 1)]),
    (["base", "--adapter=lora:0.5", "--adapter=chained"], [("lora", 0.5), ("chained", 1)]),
], ids=str)
def test_equals_the_formulas(files, tmp_path, monkeypatch, given, formula):
    """All weights, against float64; and the loss is that of the model with adapters attached."""
    monkeypatch.chdir(files)
    done = run("merge.py", given[0], tmp_path / "merged", *given[1:])
    wanted = in_float64(files, *formula)
    found = mx.load(str(tmp_path / "merged"), format="safetensors")
    assert found.keys() == wanted.keys()
    for name, array in found.items():
        assert np.abs(np.array(array) - wanted[name]).max() < 2e-5 * np.abs(wanted[name]).max(), name
    merged, meta = load_checkpoint(str(tmp_path / "merged"))
    attached, _ = load_adapted(given[0], [argument.removeprefix("--adapter=") for argument in given[1:]])
    losses = [model.loss(IDX[:, :-1], IDX[:, 1:]).item() for model in (merged, attached)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert abs(losses[0] - load_checkpoint("base")[0].loss(IDX[:, :-1], IDX[:, 1:]).item()) > 1e-3
    assert meta["tokenizer"] == byte_tokenizer().to_dict() and meta["script"] == "merge.py"
    assert meta["template"] == ("alpaca" if formula == [("lora", 1)] or "peft" in str(given) else "chatml")
    assert meta["chat"] == {"template": meta["template"]}
    assert not {"losses", "step", "fingerprint", "files"} & meta.keys() and meta["merged"][0] == "base"
    for line in done.stdout.splitlines()[1:-1]:
        path, rows, _, columns, change = line.split()
        before, after = np.array(load_checkpoint("base")[0].parameters()["embed"]["weight"]), wanted[f"{path}.weight"]
        before = np.array(mx.load("base", format="safetensors")[f"{path}.weight"])
        assert (int(rows), int(columns)) == after.shape
        share = np.linalg.norm(after - before) / np.linalg.norm(before)
        assert float(change.rstrip("%")) == pytest.approx(100 * share, abs=0.011)
    assert len(done.stdout.splitlines()) == 2 + 8  # q, k, v, out in two blocks
    assert done.stdout.splitlines()[-1].startswith(f"{tmp_path / 'merged'}: {' + '.join(meta['merged'])}, ")


def test_equals_what_sft_merges(folder, tmp_path):  # noqa: F811
    """Bit for bit sft.py's own file with --merge=True, on a base of which it leaves some layers quantized."""
    usual = "--epochs=1", "--dtype=float32", "--kind=dora", "--base_bits=4", "--targets=attn"
    sft(folder, tmp_path / "whole", *usual, "--merge=True")
    sft(folder, tmp_path / "adapter", *usual)
    run("merge.py", tmp_path / "adapter" / "sft.safetensors", tmp_path / "ours.safetensors")
    theirs, ours = (dict(tree_flatten(load_checkpoint(str(tmp_path / path))[0].parameters()))
                    for path in ("whole/sft.safetensors", "ours.safetensors"))
    assert theirs.keys() == ours.keys() and "blocks.0.mlp.up.scales" in ours and "blocks.0.attn.q.scales" not in ours
    assert all(mx.array_equal(theirs[name], ours[name]) for name in theirs)


def test_dtype(files, tmp_path):
    run("merge.py", files / "dora", tmp_path / "a")
    run("merge.py", files / "dora", tmp_path / "b", "--dtype=bfloat16")
    full, half = (mx.load(str(tmp_path / name), format="safetensors") for name in "ab")
    assert all(half[name].dtype == mx.bfloat16 and mx.array_equal(half[name], full[name].astype(mx.bfloat16))
               for name in full)


def test_result_takes_further_adapters(files, tmp_path):
    """It is a checkpoint like any other."""
    run("merge.py", files / "dora", tmp_path / "merged")
    model, meta = load_adapted(str(tmp_path / "merged"))
    attach(model, "mlp")
    save_adapter(str(tmp_path / "next"), model, bases=[str(tmp_path / "merged")])
    assert len(linear_layers(load_adapted(str(tmp_path / "next"))[0])) == 12


def refused(says, *arguments):
    done = run("merge.py", *arguments, status=2)
    assert says in done.stderr and not done.stdout


def test_nothing_is_lost(files, tmp_path, monkeypatch):
    """No input is replaced, by whatever name, and another file only if that is asked for."""
    monkeypatch.chdir(files)
    before = {path: path.read_bytes() for path in files.rglob("*") if path.is_file()}
    os.symlink(files / "base", tmp_path / "link")
    os.link(files / "lora", tmp_path / "hard link")
    for out in ("base", "lora", "chained", tmp_path / "link", tmp_path / "hard link", f"../{files.name}/base"):
        refused("would overwrite the input", "chained", out, "--overwrite=True")
    refused("would overwrite the input", "base", "peft/adapter_model.safetensors", "--adapter=peft", "--overwrite=True")
    assert before == {path: path.read_bytes() for path in files.rglob("*") if path.is_file()}
    (tmp_path / "my notes.txt").write_text("x")
    refused(f"exists: give --overwrite=True to replace it, or --out='{tmp_path}/my notes-2.txt'", "lora",
            tmp_path / "my notes.txt")
    assert (tmp_path / "my notes.txt").read_text() == "x"
    run("merge.py", "lora", tmp_path / "my notes.txt", "--overwrite=True")
    limit = 100_000

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # no file may grow larger

    whole = (tmp_path / "my notes.txt").read_bytes()
    assert len(whole) > limit
    done = subprocess.run([sys.executable, ROOT / "merge.py", "dora", tmp_path / "my notes.txt", "--overwrite=True"],
                          capture_output=True, text=True, preexec_fn=full)
    assert done.returncode == 2 and "what was there is unharmed" in done.stderr and done.stderr.count("\n") == 1
    assert (tmp_path / "my notes.txt").read_bytes() == whole


def test_mistakes(files, tmp_path, monkeypatch):
    monkeypatch.chdir(files)
    refused("base is a checkpoint, and there is no adapter to merge into it", "base", tmp_path / "a")
    refused("give the checkpoint, and --adapter=peft", "peft", tmp_path / "a")
    refused("there is no folder", "lora", tmp_path / "none" / "a")
    refused("it is a folder", "lora", tmp_path)
    refused("dtype='int8'", "lora", tmp_path / "a", "--dtype=int8")
    refused("no checkpoint at none", "none", tmp_path / "a")
    refused("no adapter at none", "base", tmp_path / "a", "--adapter=none")
    assert not list(tmp_path.iterdir())
