"""activations.py: every array against the model's own tap, in every variant and in bfloat16; files, as numpy and
safetensors read them; windows; sizes; bad input."""
import json
import re
import shlex
from functools import partial

import blas  # noqa: F401  (before mlx)
import conftest
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import ROOT, peak_memory, run_here
from safetensors import safe_open
from test_gptq import FLAVOURS, checkpoint

import activations
from activations import read_states, states_of
from config import UserError
from lora import base_fingerprint
from model import load_arrays, load_checkpoint, save_checkpoint
from tokenizer import byte_tokenizer

SITES = ["resid", "mid", "attn", "mlp", "heads", "q", "k", "v", "hidden"]
IDX = mx.array(np.random.default_rng(0).integers(0, 64, (3, 12)))
run = partial(conftest.run, "activations.py")


def tapped(model, idx) -> dict[str, np.ndarray]:
    """The states that the model hands to a tap, in float32, with positions as the second axis."""
    found = {}

    def tap(site, layer, x):
        x32 = np.array(x.astype(mx.float32))
        found[f"{site}.{layer}"] = x32.swapaxes(1, 2) if x.ndim == 4 else x32
        return x

    model.residual(idx, tap=tap)
    return {name: x for name, x in found.items() if name.split(".")[0] in SITES}


# ---- states ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("settings", [each for each in FLAVOURS if "mod" not in each], ids=str)
def test_states(settings, dtype, tmp_path):
    _, model = checkpoint(tmp_path, **settings)
    if settings == FLAVOURS[0]:
        nn.quantize(model, 32, 8, class_predicate=lambda path, module: "blocks" in path and "norm" not in path)
    model.eval().set_dtype(dtype)
    expected, found = tapped(model, IDX), states_of(model, IDX, SITES)
    assert found.keys() == expected.keys() and "resid.2" in found
    for name, x in found.items():
        assert x.dtype == np.float32 and np.array_equal(x, expected[name]), name
    some = states_of(model, IDX, ["attn", "q"], [1], "last")
    names = {"attn.1", "q.1"}
    assert some.keys() == names and all(np.array_equal(some[name], expected[name][:, -1:]) for name in names)


def test_skipped_tokens(tmp_path):
    """With mod=topk, a token's states stand at its position, and those of a token that a block skips are 0."""
    _, model = checkpoint(tmp_path, mod="topk", mod_every=1)
    for block in model.blocks:
        block.predictor.weight, block.threshold = mx.random.normal((1, 64), key=mx.random.key(2)), mx.array([0.0])
    expected, found = tapped(model.eval(), IDX), states_of(model, IDX, ["resid", "mlp", "heads"])
    for layer in range(2):
        works = (expected[f"resid.{layer}"] @ np.array(model.blocks[layer].predictor.weight).T)[..., 0] > 0
        for name in (f"mlp.{layer}", f"heads.{layer}"):
            for row in range(3):
                n = works[row].sum()
                assert 0 < n < 12 and not found[name][row][~works[row]].any()
                assert np.array_equal(found[name][row][works[row]], expected[name][row][:n])


# ---- files -----------------------------------------------------------------------------------------------------------


def arrays_of(path) -> tuple[dict, dict]:
    """A file's arrays and what it says about them, as numpy and the package safetensors read it."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return arrays, json.loads(str(arrays.pop("about")))
    with safe_open(path, "numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["tinygpt"])


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_prompt(ending, tmp_path):
    """The file holds the states of the prompt, its tokens with their texts, and what they were computed from; the
    printed figures are numpy's."""
    path, model = checkpoint(tmp_path)
    out, text = tmp_path / f"states.{ending}", "a cät\n"
    done = run(path, f"--prompt={text}", "--sites=resid,heads,hidden", "--layers=1-2", f"--out={out}")
    ids = [256, *text.encode()]
    expected = tapped(model.eval(), mx.array([ids]))
    found, about = arrays_of(out)
    names = {"resid.1", "heads.1", "hidden.1", "resid.2"}
    assert found.keys() == names | {"tokens", "positions"}
    assert found["tokens"].tolist() == [ids] and found["positions"].tolist() == [*range(8)]
    assert found["tokens"].dtype == found["positions"].dtype == np.int32
    texts = [about["texts"][str(i)] for i in ids]
    assert texts[1:4] == ["a", " ", "c"] and texts[4:] == ["\\xc3", "\\xa4", "t", "\n"]
    assert about["sha256"] == base_fingerprint(model) and about["prompt"] == text
    assert shlex.split(about["command"])[0] == "activations.py" and f"--prompt={text}" in shlex.split(about["command"])
    size = 0
    for name in names:
        x = expected[name]
        np.testing.assert_allclose(found[name], x, rtol=1e-5, atol=1e-6)
        line = re.search(rf"^{name} +([\dx ]+?)  +(-?[\d.]+) +([\d.]+) +([\d.]+)  ", done.stdout, re.M)
        assert line[1] == " x ".join(map(str, x.shape))
        norm = np.linalg.norm(x, axis=-1).mean()
        np.testing.assert_allclose([*map(float, line.groups()[1:])], [x.mean(), x.std(), norm], atol=6e-4)
        size += x.nbytes
    assert f"{out}: {size / 1e6:.2f} MB of states" in done.stdout
    again, told = read_states(str(out))
    assert told == about and all(np.array_equal(again[name], found[name]) for name in found)
    if ending == "safetensors":
        assert load_arrays(str(out))[0].keys() == found.keys()


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_text(ending, bos, tmp_path):
    """The windows are the text in its order, each after the token that begins a text; as many as are asked for, in
    batches of any size."""
    path, model = checkpoint(tmp_path)
    out, text = tmp_path / f"states.{ending}", (ROOT / "README.md").read_bytes()[:1000]
    (tmp_path / "text.txt").write_bytes(text)
    run(path, f"--data={tmp_path / 'text.txt'}", "--sites=mlp", "--layers=0", f"--bos={bos}", "--block_size=20",
        "--samples=7", "--batch_size=3", "--positions=last", f"--out={out}")
    step = 19 if bos else 20
    rows = [[256] * bos + [*text[i * step:(i + 1) * step]] for i in range(7)]
    found, _ = arrays_of(out)
    assert found["tokens"].tolist() == rows and found["positions"].tolist() == [19]
    assert found["mlp.0"].shape == (7, 1, 64)
    expected = tapped(model.eval(), mx.array(rows))["mlp.0"][:, -1:]
    np.testing.assert_allclose(found["mlp.0"], expected, rtol=1e-4, atol=1e-6)


def test_windows():
    """A text that is shorter than a window is one window; samples=0 takes all whole ones."""
    enc, tokens = byte_tokenizer(), np.arange(50)
    assert activations.windows_of(enc, tokens, 100, 16, True).tolist() == [[256, *range(50)]]
    assert activations.windows_of(enc, tokens, 11, 0, True)[:, 1:].ravel().tolist() == [*range(50)]
    assert activations.windows_of(enc, tokens, 12, 0, False).ravel().tolist() == [*range(48)]
    with pytest.raises(UserError, match="block_size=1"):
        activations.windows_of(enc, tokens, 1, 0, True)


def test_memory(tmp_path):
    """Ten times as many windows do not take more memory: their states have 50 MB."""
    path, _ = checkpoint(tmp_path, block_size=256)
    (tmp_path / "text.txt").write_bytes((ROOT / "model.py").read_bytes()[:52000])
    peaks = [peak_memory("activations.py", path, f"--data={tmp_path / 'text.txt'}", "--sites=hidden", "--layers=0",
                         f"--samples={n}", f"--out={tmp_path / 'states.safetensors'}") for n in (20, 200)]
    assert (tmp_path / "states.safetensors").stat().st_size > 50e6 and peaks[1] - peaks[0] < 15e6


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_sizes(tmp_path):
    """What does not fit the memory or the disk is refused before anything is computed."""
    path, _ = checkpoint(tmp_path)
    (tmp_path / "text.txt").write_bytes(b"abcdefgh" * 160_000)
    done = run(path, f"--data={tmp_path / 'text.txt'}", "--sites=hidden,resid", "--samples=0", status=2)
    assert "GB of states" in done.stdout and re.search(r"would have 3\.7 GB, and an \.npz file .*--positions=last",
                                                       done.stderr)
    with pytest.raises(UserError, match=r"needs 1000000000\.0 GB, and the disk has [\d.]+ GB free: give fewer --sites"):
        activations.check_size(str(tmp_path / "a.safetensors"), 10**18)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ckpt.safetensors", "text.txt"]


PROMPT = "--prompt=x"


@pytest.mark.parametrize("arguments, says", [
    ([], "give either --prompt=TEXT or --data=FILE"), ([PROMPT, "--data=ruff.toml"], "give either --prompt"),
    ([PROMPT, "--sites=resid,head"], "'head' is not one of resid"), ([PROMPT, "--sites="], "'' is not one of"),
    ([PROMPT, "--layers=3"], "write layers from 0 to 2"), ([PROMPT, "--sites=mlp", "--layers=2"], "layers from 0 to 1"),
    ([PROMPT, "--positions=first"], "positions='first'"), ([PROMPT, "--samples=3"], "samples: used with --data only"),
    ([PROMPT, "--out=x.npy"], "must end in .npz or .safetensors"), ([PROMPT, "--out=none/x.npz"], "no folder none"),
    ([PROMPT, "--out={path}"], "would overwrite the input"), ([PROMPT, "--out={mine}"], "mine.npz exists, and was not"),
    ([PROMPT, "--out={other}"], "exists, and is no result of a script"), (["--prompt=" + "x" * 40], "has 41 tokens"),
    (["--data={path}"], "is a binary file"), (["--data={mine}", "--batch_size=0"], "batch_size 1 or more"),
    (["--data=ruff.toml", "--block_size=1"], "block_size=1: it must be more"),
], ids=str)
def test_bad_input(arguments, says, tmp_path):
    path, _ = checkpoint(tmp_path)
    names = dict(path=path, mine=tmp_path / "mine.npz", other=tmp_path / "other.safetensors")
    names["mine"].write_bytes(b"mine")
    save_checkpoint(str(names["other"]), load_checkpoint(str(path))[0], {})
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    arguments = [argument.format(**names).replace("=ruff.toml", f"={ROOT / 'ruff.toml'}") for argument in arguments]
    with pytest.raises(UserError, match=re.escape(says)):
        run_here("activations.py", path, *arguments)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_site_that_is_missing(tmp_path):
    path, _ = checkpoint(tmp_path, parallel=True)
    assert "attention and MLP read the same state" in run(path, PROMPT, "--sites=mid", status=2).stderr
    path, _ = checkpoint(tmp_path, n_expert=3, n_shared_expert=1)
    assert "experts, whose neurons are not read" in run(path, PROMPT, "--sites=hidden", status=2).stderr


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_earlier_results(ending, tmp_path):
    """One of this script is replaced, and that is told. Weights that are not finite leave it as it is."""
    path, model = checkpoint(tmp_path)
    out = tmp_path / f"states.{ending}"
    run(path, PROMPT, f"--out={out}")
    told = run(path, "--prompt=yz", f"--out={out}").stdout
    assert re.match(rf"{out} is an earlier result( of activations.py)?, which is replaced\n", told)
    assert arrays_of(out)[0]["tokens"].tolist() == [[256, *b"yz"]]
    model.blocks[1].mlp.up.weight = model.blocks[1].mlp.up.weight * float("nan")
    save_checkpoint(str(path), model, {"tokenizer": byte_tokenizer().to_dict()})
    before = out.read_bytes()
    assert "are not finite" in run(path, PROMPT, f"--out={out}", status=2).stderr
    assert out.read_bytes() == before and len([*tmp_path.iterdir()]) == 2


def test_docstring(tmp_path):
    checkpoint(tmp_path)
    states = conftest.docstring_use(activations, tmp_path)["states"]
    assert {name: x.shape for name, x in states.items()} == {
        "resid.0": (1, 3, 64), "heads.0": (1, 3, 2, 32), "resid.1": (1, 3, 64), "heads.1": (1, 3, 2, 32)}
