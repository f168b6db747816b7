"""compare.py: the figures of made-up runs against numpy's, what it says of them, its picture and its page."""
import itertools
import json
import random
import re
import shutil

import numpy as np
import pytest
from conftest import ROOT, run, run_here
from safetensors.numpy import save_file

import compare
from config import UserError

COLUMNS = ["step", "tokens", "seconds", "train_loss", "val_loss", "val_bpb", "learning_rate", "grad_norm", "tok_per_s",
           "peak_gib"]
BASE = {"data": "book.txt", "tokenizer": "bpe", "vocab_size": 512, "max_iters": 20, "eval_windows": 64, "alibi": False}


def write(folder, losses: dict, speeds=(100, 300, 200), script="train.py", **settings):
    """A run: its validation losses by step; the bits a byte are half of them, the training losses 0.1 less."""
    folder.mkdir(parents=True)
    lines = [",".join(COLUMNS)]
    for i, (step, loss) in enumerate(losses.items()):
        speed = speeds[i % len(speeds)]
        lines.append(f"{step},{step * 10},{step / 4},{loss - 0.1:.6f},,,0.01,1.5,{speed},{0.5 + step / 100}")
        lines.append(f"{step},{step * 10},{step / 4},,{loss},{loss / 2},,,,")
    (folder / "loss.csv").write_text("\r\n".join([*lines, ""]))
    start = {"script": script, "commit": "0123456789", "arguments": [],
             "settings": {**BASE, "seed": 1, "out_dir": str(folder), **settings}}
    (folder / "run.json").write_text(json.dumps(start))


@pytest.fixture
def sweep(tmp_path):
    """Two settings by three seeds; of base, seed 2 was best in the middle. Returns the losses: name -> (seeds, steps).
    """
    losses = {"base": [[3.5, 2.5, 2.25], [3.5, 2.125, 2.75], [3.5, 2.5, 2.0]],
              "alibi": [[3.25, 1.75, 1.5], [3.25, 1.875, 1.625], [3.25, 1.5, 1.25]]}
    for name, table in losses.items():
        for seed, values in enumerate(table, 1):
            speeds = np.array([100, 300, 200]) * seed
            write(tmp_path / f"{name}-{seed}", dict(zip((0, 10, 20), values, strict=True)), speeds, seed=seed,
                  alibi=name == "alibi", resume=seed == 3, log_interval=seed, overwrite=seed == 2)
    return {name: np.array(table) for name, table in losses.items()}


def called(monkeypatch, capsys, folder, *arguments) -> str:
    """What it prints in a terminal of 200 columns; its picture goes to folder/c.png."""
    monkeypatch.setenv("COLUMNS", "200")
    run_here("compare.py", *arguments, *[f"--out={folder / 'c.png'}"] * (not any("--out" in str(a) for a in arguments)))
    return capsys.readouterr().out


def table(printed: str) -> dict[str, dict[str, str]]:
    """The rows by name: column -> cell, by the columns' right edges."""
    lines = printed.split("\n\n")[0].splitlines()
    ends = [match.end() for match in re.finditer(r"\S+", lines[0])]
    ends[0] = max(len(line.split("  ")[0]) for line in lines)
    cells = [[line[a:b].strip() for a, b in zip([0, *ends], ends, strict=False)] for line in lines]
    return {line[0]: dict(zip(cells[0], line, strict=True)) for line in cells[1:]}


def page_data(path) -> dict:
    return json.loads(path.read_text().split("id=data>")[1].split("</script>")[0])


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_figures(sweep, tmp_path, monkeypatch, capsys):
    """Rows of three seeds, which other settings of the run alone do not part: means and ranges as numpy has them."""
    printed = called(monkeypatch, capsys, tmp_path, *sorted(tmp_path.iterdir()))
    rows = table(printed)
    assert [*rows] == ["alibi", "base"]
    for name, losses in sweep.items():
        best = losses.min(1)
        speeds = [np.median([100 * seed, 300 * seed, 200 * seed]) for seed in (1, 2, 3)]
        assert rows[name] == {
            "run": name, "alibi": str(name == "alibi"), "seeds": "3", "val_loss": f"{best.mean():.3f}",
            "range": f"{best.min():.3f}-{best.max():.3f}", "step": "10-20" if name == "base" else "20",
            "last": f"{losses[:, -1].mean():.3f}", "val_bpb": f"{best.mean() / 2:.3f}",
            "tok/s": f"{np.median(speeds):.0f}", "GiB": "0.70"}
    assert "alibi (the best), and the ranges do not overlap: base (+0.667)." in printed
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")

    data = page_data(tmp_path / "c.html")
    for row in data["rows"]:
        losses = sweep[row["name"]]
        expected = np.stack([[0, 10, 20], [0, 10, 20], losses.mean(0), losses.min(0), losses.max(0)], axis=1)
        assert np.allclose(row["mean"], expected)
        assert np.allclose(row["train"], np.stack([[0, 10, 20], [0, 10, 20], losses.mean(0) - 0.1], axis=1))
        assert [np.array(each["val"])[:, 2].tolist() for each in row["runs"]] == losses.tolist()
    called(monkeypatch, capsys, tmp_path, tmp_path / "base-1", "--x=seconds")
    assert [point[:2] for point in page_data(tmp_path / "c.html")["rows"][0]["mean"]] == [[0, 0], [2.5, 10], [5, 20]]


def test_command(sweep, tmp_path):
    """As a user runs it: it fits 80 columns, also where many settings differ, and Markdown has every cell."""
    many = {f"a_long_name_{i}": i for i in range(6)}
    write(tmp_path / "other", {0: 3.0, 20: 2.0}, **many)
    write(tmp_path / "another", {0: 3.0, 20: 2.0}, **dict.fromkeys(many, 7))
    runs = sorted(tmp_path.iterdir())
    printed = run("compare.py", *runs, f"--out={tmp_path / 'c.png'}").stdout  # no terminal: 80 columns
    text, figures = printed.split("\n\n")[:2]
    assert max(map(len, printed.splitlines()[:-1])) <= 80
    assert "alibi=True" in text and text.count("a_long_name_3=3") == 1 and text.count("a_long_name_3=7") == 1
    assert {line.split()[0] for line in figures.splitlines()} == {"run", "alibi", "base", "other", "another"}
    again = run("compare.py", *runs, f"--out={tmp_path / 'c.png'}", "--markdown=True").stdout.split("\n\n")[0]
    cells = [line.split(" | ") for line in again.splitlines()]
    assert cells[0][:3] == ["| run", "settings", "seeds"] and {len(line) for line in cells[2:]} == {len(cells[0])}


# ---- what is said ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, share", [(2, 1 / 3), (3, 1 / 10), (4, 1 / 35)])
def test_noise_rule(n, share):
    """How often ranges lie apart where the settings make no difference: every way to deal 2n losses to two rows."""
    apart, ways = 0, list(itertools.combinations(range(2 * n), n))
    for mine in ways:
        rows = [{"figures": {"val_loss": values}, "counted": [{"seed": i} for i in range(n)]}
                for values in (list(mine), [i for i in range(2 * n) if i not in mine])]
        said = compare.verdict(*rows, "val_loss")
        assert said == ("noise" if max(mine) > min(rows[1]["figures"]["val_loss"])
                        and min(mine) < max(rows[1]["figures"]["val_loss"])
                        else "lower" if sum(mine) < n * (2 * n - 1) / 2 else "higher")
        apart += said != "noise"
    assert apart / len(ways) == pytest.approx(share)


def test_against(tmp_path, monkeypatch, capsys):
    """Below, above, overlapping and single-seed rows beside a named one; a name that is none is told."""
    finals = {"base": [2.0, 2.25], "low": [1.5, 1.75], "high": [2.5, 2.75], "near": [2.125, 2.5], "one": [1.0]}
    for i, (name, values) in enumerate(finals.items()):
        for seed, value in enumerate(values, 1):
            write(tmp_path / f"{name}-{seed}", {0: 3.0, 20: value}, seed=seed, width=i)
    runs = sorted(tmp_path.iterdir())
    printed = called(monkeypatch, capsys, tmp_path, *runs, "--against=base")
    assert "lower val_loss than base, and the ranges do not overlap: low (-0.500)." in printed
    assert "higher val_loss than base, and the ranges do not overlap: high (+0.500)." in printed
    assert "no more than noise, as the ranges of val_loss overlap: near (+0.188)." in printed
    assert "Beside base, in val_loss: one-1 (-1.125)." in printed
    with pytest.raises(UserError, match="did you mean base"):
        called(monkeypatch, capsys, tmp_path, *runs, "--against=bass")


def test_incomparable(tmp_path, monkeypatch, capsys):
    """Another tokenizer: bits a byte are compared and drawn. Another script, another loss: nothing is."""
    write(tmp_path / "bpe", {0: 5.0, 20: 4.0})
    write(tmp_path / "byte", {0: 3.0, 20: 2.0}, tokenizer="byte")
    printed = called(monkeypatch, capsys, tmp_path, tmp_path / "bpe", tmp_path / "byte")
    assert "differ in tokenizer: losses a token cannot be compared" in printed and "in val_bpb: bpe (+1.000)" in printed
    write(tmp_path / "byte-2", {0: 3.0, 20: 2.5}, tokenizer="byte", seed=2)
    lines = called(monkeypatch, capsys, tmp_path, tmp_path / "bpe", tmp_path / "byte", tmp_path / "byte-2").splitlines()
    assert lines[0].split()[-4:] == ["val_bpb", "range", "tok/s", "GiB"] and "1.125  1.000-1.250" in lines[1]
    printed = called(monkeypatch, capsys, tmp_path, tmp_path / "bpe", tmp_path / "byte")
    data = page_data(tmp_path / "c.html")
    assert data["unit"] == "bits a byte" and [row["mean"][1][2] for row in data["rows"]] == [1.0, 2.0]
    assert not any(row["train"] for row in data["rows"])

    write(tmp_path / "sft", {0: 5.0, 20: 4.0}, script="sft.py", kind="lora")
    printed = called(monkeypatch, capsys, tmp_path, tmp_path / "bpe", tmp_path / "sft")
    assert "sft.py and train.py measure different losses" in printed and "Beside" not in printed
    for seed in (1, 2):  # in dpo.py's columns
        write(tmp_path / f"dpo-{seed}", {}, script="dpo.py", seed=seed, loss="ipo" if seed == 2 else "dpo")
        (tmp_path / f"dpo-{seed}" / "loss.csv").write_text(
            "step,split,loss,accuracy\n0,val,0.75,0.5\n1,loss,0.7,1\n20,val,0.25,0.875\n")
    printed = called(monkeypatch, capsys, tmp_path, tmp_path / "dpo-1", tmp_path / "dpo-2")
    assert "The runs differ in loss" in printed and "Beside" not in printed
    rows = table(printed)
    assert rows["dpo-1"]["val_loss"] == "0.250" and rows["dpo-1"]["accuracy"] == "87.5%"
    assert page_data(tmp_path / "c.html")["rows"][0]["train"] == [[1, 1, 0.7]]
    for name in ("dpo-1", "dpo-2"):
        settings = json.loads((tmp_path / name / "run.json").read_text())
        settings["settings"]["loss"] = "dpo"
        (tmp_path / name / "run.json").write_text(json.dumps(settings))
    assert "the seed also chooses" in called(monkeypatch, capsys, tmp_path, tmp_path / "dpo-1", tmp_path / "dpo-2")


def test_unfinished(tmp_path, monkeypatch, capsys):
    """A run that goes on is drawn as far as it is, and counts where no other run of its row does."""
    for seed in (1, 2):
        write(tmp_path / f"base-{seed}", {0: 4.0, 10: 3.0, 20: 2.0 + seed}, seed=seed)
    write(tmp_path / "base-3", {0: 4.0, 10: 0.5}, seed=3)
    with open(tmp_path / "base-3" / "loss.csv", "a") as file:
        file.write("20,200,5.0,")  # being written
    write(tmp_path / "new", {0: 9.0}, alibi=True)
    (tmp_path / "new" / "loss.csv").write_text(",".join(COLUMNS) + "\n")
    runs = [tmp_path / name for name in ("base-1", "base-2", "base-3", "new")]
    printed = called(monkeypatch, capsys, tmp_path, *runs, runs[0], f"{runs[1]}/", ROOT / "compare.py")
    rows = table(printed)
    assert rows["base"]["range"] == "3.000" and rows["base"]["seeds"] == "2" and rows["new"]["val_loss"] == ""
    assert f"{tmp_path}/base-3 has reached step 10 of 20: it is drawn, but not counted." in printed
    assert f"{tmp_path}/new has reached step 0 of 20: it counts as far as it is." in printed
    assert f"{tmp_path}/new has no validation loss yet." in printed
    data = page_data(tmp_path / "c.html")["rows"][0]
    assert len(data["runs"]) == 3 and data["runs"][2]["val"] == [[0, 0, 4.0], [10, 10, 0.5]]
    assert [point[2] for point in data["mean"]] == [4.0, 3.0, 3.5]
    printed = called(monkeypatch, capsys, tmp_path, runs[2])
    assert table(printed)["base-3"]["val_loss"] == "0.500"
    called(monkeypatch, capsys, tmp_path, runs[3])  # nothing to draw yet
    write(tmp_path / "again", {0: 4.0, 20: 3.0}, seed=1)
    start = (tmp_path / "base-1" / "run.json").read_text().replace("0123456", "7654321")
    (tmp_path / "again" / "run.json").write_text(start)
    printed = called(monkeypatch, capsys, tmp_path, runs[0], runs[1], tmp_path / "again")
    assert "again: another run has the same settings and the same seed." in printed
    assert "different commits of the code: 0123456, 7654321." in printed and [*table(printed)] == ["base-1 +2"]


def test_header(tmp_path, monkeypatch, capsys):
    """Without run.json the settings come from a checkpoint's header."""
    for name, alibi in (("a", True), ("b", False)):
        write(tmp_path / name, {0: 3.0, 20: 2.0})
        (tmp_path / name / "run.json").unlink()
        header = {"script": "train.py", "settings": {**BASE, "alibi": alibi, "seed": 1}}
        save_file({"x": np.zeros(1)}, tmp_path / name / "best.safetensors", {"tinygpt": json.dumps(header)})
    rows = table(called(monkeypatch, capsys, tmp_path, tmp_path / "a", tmp_path / "b"))
    assert {name: row["alibi"] for name, row in rows.items()} == {"a": "True", "b": "False"}


# ---- errors and files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, line, told", [
    (3, "10,100,2.5,,2.x,1,,,,", "line 3: val_loss is '2.x'"),
    (3, "10,100,2.5,,nan,1,,,,", "line 3: val_loss is 'nan'"),
    (4, "10,100", "line 4 has 2 fields, not 10"), (5, ",100,2.5,,2,1,,,,", "line 5 has no step"),
    (4, "20,200,5,\x0c,2,1,,,,", "line 4: train_loss is '\\x0c'"), (1, "a,b", "line 1 names no step and loss")])
def test_spoilt_line(number, line, told, tmp_path, monkeypatch, capsys):
    write(tmp_path / "a", {0: 3.0, 10: 2.5, 20: 2.0})
    lines = (tmp_path / "a" / "loss.csv").read_text().splitlines()
    lines[number - 1] = line
    (tmp_path / "a" / "loss.csv").write_text("\n".join([*lines, ""]))
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}/a/loss.csv, {told}")):
        called(monkeypatch, capsys, tmp_path, tmp_path / "a")
    assert not (tmp_path / "c.png").exists()


def test_errors(tmp_path, monkeypatch, capsys):
    write(tmp_path / "a", {0: 3.0, 20: 2.0})
    (tmp_path / "b").mkdir()
    for arguments, told in (([], "no runs"), ([tmp_path / "b"], "b has no loss.csv"), (["no"], "no has no loss.csv"),
                            ([tmp_path / "a", "--x=s"], "not one of step"), ([tmp_path / "a", "--out=c"], "in .png")):
        with pytest.raises(UserError, match=told):
            called(monkeypatch, capsys, tmp_path, *arguments)
    for content, told in ((None, "neither run.json nor a checkpoint"), ("{", "cannot be read"), ("[]", "no settings")):
        (tmp_path / "a" / "run.json").unlink()
        if content:
            (tmp_path / "a" / "run.json").write_text(content)
        with pytest.raises(UserError, match=told):
            called(monkeypatch, capsys, tmp_path, tmp_path / "a")
        (tmp_path / "a" / "run.json").touch()
    (tmp_path / "a" / "loss.csv").write_text("step,train_loss,val_loss\n0,,3\n")
    (tmp_path / "a" / "run.json").write_text('{"settings": {"kind": "lora"}}')
    with pytest.raises(UserError, match="has no tokens: take --x=step"):
        called(monkeypatch, capsys, tmp_path, tmp_path / "a", "--x=tokens")
    assert "no loss.csv" in run("compare.py", tmp_path / "b", status=2).stderr


def test_files(tmp_path, monkeypatch, capsys):
    """The name comes from the runs. A picture of other runs is replaced only if it is named, and that is told."""
    for name in ("base-1", "base-2", "alibi-1"):
        write(tmp_path / name, {0: 3.0, 20: 2.0}, seed=int(name[-1]), alibi="alibi" in name)
    monkeypatch.chdir(tmp_path)
    keep = "--out="
    assert "drawn: compare-base-1.png, compare-base-1.html\n" in called(monkeypatch, capsys, tmp_path, "base-1", keep)
    assert "drawn: compare-base.png" in called(monkeypatch, capsys, tmp_path, "base-1", "base-2", keep)
    printed = called(monkeypatch, capsys, tmp_path, "base-1", "base-2", "alibi-1", keep)
    assert "drawn: compare-alibi-1-base.png" in printed
    printed = called(monkeypatch, capsys, tmp_path, "alibi-1", "--out=compare-base-1.png")
    assert "compare-base-1.html; replaced a picture of base-1\n" in printed
    with pytest.raises(UserError, match="compare-base-1.png is a picture of alibi-1: name a new one"):
        called(monkeypatch, capsys, tmp_path, "base-1", keep)
    assert page_data(tmp_path / "compare-base-1.html")["rows"][0]["name"] == "alibi-1"
    (tmp_path / "compare-base.html").unlink()
    with pytest.raises(UserError, match="compare-base.png is another picture"):
        called(monkeypatch, capsys, tmp_path, "base-1", "base-2", keep)
    printed = called(monkeypatch, capsys, tmp_path, "base-1", "alibi-1", "--out=compare-base-1.png")  # one more run
    assert "replaced" not in printed


# ---- the page --------------------------------------------------------------------------------------------------------


def test_hover(sweep, tmp_path, monkeypatch, capsys, chromium):
    """In a browser, without a server: pointing at a point tells its run, step and loss; a name hides its row."""
    (tmp_path / "base-1").rename(tmp_path / "<b>base-1")
    called(monkeypatch, capsys, tmp_path, *sorted(tmp_path.iterdir()))
    context = chromium.new_context(viewport={"width": 1000, "height": 900})
    opened, problems = context.new_page(), []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    context.on("request", lambda asked: asked.url.startswith("file:") or problems.append(asked.url))
    opened.goto(f"file://{tmp_path / 'c.html'}")
    spots = opened.evaluate("drawn.map(d => [d.x, d.y, d.row.name, d.run && d.run.name, d.p])")

    def told(spot):
        box = opened.locator("#plot").bounding_box()
        opened.mouse.move(box["x"] + spot[0], box["y"] + spot[1])
        return opened.inner_text("#told")

    mean = next(spot for spot in spots if spot[2] == "alibi" and not spot[3] and len(spot[4]) > 3 and spot[4][1] == 10)
    low, middle, high = (f(sweep["alibi"][:, 1]) for f in (np.min, np.mean, np.max))
    assert told(mean) == f"alibi, mean of 3 seeds\nstep 10\nvalidation loss {middle:.4f} ({low:.4f} to {high:.4f})"
    single = next(spot for spot in spots if spot[3] and spot[3].endswith("alibi-3") and spot[4][1] == 20)
    assert told(single) == f"{tmp_path}/alibi-3, seed 3\nstep 20\nvalidation loss {sweep['alibi'][2, 2]:.4f}"
    opened.click("text=the last half")
    assert opened.evaluate("Math.min(...drawn.map(d => d.p[0]))") == 10
    opened.click("#names button:has-text('alibi')")
    assert opened.evaluate("[...new Set(drawn.map(d => d.row.name))].length") == 1
    context.close()
    assert not problems


CELLS = ["", "nan", "inf", "-1", "1e999", "0", "x", '"', '"5"', "2.5", "9" * 30, "\x00", "é", "  7 "]
VALUES = [None, [], {}, "x", -1, True, "</script>", [1, 2], 1.5]


def test_edited_files(tmp_path, monkeypatch, capsys):
    """loss.csv and run.json with odd cells, lines and values, cut, or with other bytes: one line, or a comparison."""
    rng, refused = random.Random(0), 0
    for i in range(80):
        for name in ("a", "b"):
            shutil.rmtree(tmp_path / str(i) / name, ignore_errors=True)
            write(tmp_path / str(i) / name, {0: 3.0, 10: 2.5, 20: 2.0}, seed=1, alibi=name == "a")
        path = tmp_path / str(i) / "a" / ("loss.csv" if i % 4 else "run.json")
        content = bytearray(path.read_bytes())
        if i % 5 == 0:
            del content[rng.randrange(len(content)):]
        elif i % 5 == 1:
            content[rng.randrange(len(content))] = rng.randrange(256)
        elif path.name == "loss.csv":
            lines = [line.split(",") for line in content.decode().splitlines()]
            line = rng.choice(lines)
            line[rng.randrange(len(line))] = rng.choice(CELLS)
            lines.insert(rng.randrange(len(lines)), rng.choice(lines))
            content = "\n".join([*map(",".join, lines), ""]).encode()
        else:
            start = json.loads(content)
            part = rng.choice([start, start["settings"]])
            part[rng.choice(list(part))] = rng.choice(VALUES)
            content = json.dumps(start).encode()
        path.write_bytes(content)
        try:
            called(monkeypatch, capsys, tmp_path / str(i), tmp_path / str(i) / "a", tmp_path / str(i) / "b")
        except UserError as error:
            assert "\n" not in str(error) and path.parent.name in str(error), error
            refused += 1
    assert refused >= 20


@pytest.mark.parametrize("change", [{"script": 3}, {"commit": True}, {"settings": {"max_iters": "x"}},
                                    {"settings": {"seed": {}}}])
def test_a_start_of_another_kind(change, tmp_path, monkeypatch, capsys):
    write(tmp_path / "a", {0: 3.0, 10: 2.5})
    start = json.loads((tmp_path / "a" / "run.json").read_text())
    (tmp_path / "a" / "run.json").write_text(json.dumps({**start, **change}))
    name = [*change["settings"]][0] if "settings" in change else [*change][0]
    with pytest.raises(UserError, match=f"run.json has {name}="):
        called(monkeypatch, capsys, tmp_path, tmp_path / "a")
