"""runs/devices.py: closed forms that the simulation must equal, bytes of a real model and of its optimizers, and the
figures of docs/devices.md."""
import math
import re
from types import SimpleNamespace

import blas  # noqa: F401  (before mlx)
import mlx.optimizers as optim
import pytest
from conftest import ROOT, run
from mlx.utils import tree_flatten

from config import UserError
from model import GPT, GPTConfig
from muon import Muon, by_muon
from runs.devices import (
    MODES,
    Event,
    length,
    memory_of,
    newton_schulz_flops,
    pipeline_events,
    predict,
    settings,
    shares,
    simulate,
    sizes,
    step_events,
    wire,
)

INF = math.inf
NO_COMPUTE = {"matmul": INF, "attention": INF, "memory": INF, "newton_schulz": INF, "launch": 0.0}
NO_DELAY = {"latency": 0.0, "latency_across": 0.0, "call": 0.0}
PAGE = (ROOT / "docs" / "devices.md").read_text()


def given(**changes):
    """The default settings with these changes."""
    assert set(changes) <= set(settings)
    return SimpleNamespace(**{**settings, **changes})


# ---- discrete events -------------------------------------------------------------------------------------------------


def test_streams_and_order():
    """b waits for a on its stream; c for a on another one, as long as the link works; d for both."""
    a, b = Event("a", "compute 0", 3), Event("b", "compute 0", 2)
    c = Event("sum", "link 0", 4, (a,))
    d = Event("d", "compute 0", 1, (c, b))
    assert simulate([a, b, c, d]) == 8
    assert [(e.start, e.end) for e in (a, b, c, d)] == [(0, 3), (3, 5), (3, 7), (7, 8)]
    assert shares([a, b, c, d], 1) == (2 / 8, 0)  # from 5 to 7 the link is waited for


def test_length():
    """Of a union of spans, one of which lies in another, two of which overlap, two of which touch."""
    assert length([(4, 5), (0, 3), (1, 2), (2.5, 3.5), (5, 6)]) == 5.5 and length([]) == 0


def test_a_circle_is_an_error():
    a = Event("a", "compute 0", 1)
    b = Event("b", "link 0", 1, (a,))
    a.after = (b,)
    with pytest.raises(AssertionError, match="circle"):
        simulate([a, b])


@pytest.mark.parametrize("mode", MODES)
def test_no_communication(mode):
    """With links that take no time, a device's step is the sum of what it computes, except for a pipeline's bubble."""
    s = given(link=INF, link_across=INF, slices=4, **NO_DELAY)
    events = step_events(s, mode, 4)
    seconds = simulate(events)
    own = sum(event.seconds for event in events if event.stream == "compute 0")
    assert seconds == pytest.approx(own) if mode != "pipeline" else seconds > own * 1.01
    assert predict(s, mode, 4).waits == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("n", [2, 3, 8, 64])
@pytest.mark.parametrize("overlap", [True, False])
def test_no_compute(n, overlap):
    """Then a step of data parallelism is a ring's all-reduce: 2 (n - 1) / n of the bytes over the bandwidth. Between
    nodes of one device the slower card counts; nodes of 8 have 8 cards, together faster than a link."""
    s = given(overlap=overlap, **NO_COMPUTE, **NO_DELAY)
    wanted = 2 * (n - 1) / n * 4 * sizes(s).all / s.link
    assert predict(s, "data", n).seconds == pytest.approx(wanted)
    s.per_node = 1
    assert predict(s, "data", n).seconds == pytest.approx(wanted * s.link / s.link_across)


def test_latency():
    """16 devices in nodes of 4: three hops inside a node, two between four nodes, in both passes, and the call."""
    s = given(per_node=4, latency=1.0, latency_across=10.0, call=100.0, link=INF, link_across=INF)
    assert wire(s, 16, 1e9, 2)[0] == 100 + 2 * (3 + 2 * 10)
    assert wire(s, 16, 1e9, 1)[0] == 100 + (3 + 2 * 10)
    assert wire(s, 4, 1e9, 1, stride=4)[0] == 100 + 2 * 10  # one device of the group in each of 4 nodes
    assert wire(s, 1, 1e9, 2) == (0, 0)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize("p, m", [(1, 1), (2, 1), (4, 4), (4, 16), (8, 5)])
def test_bubble(schedule, p, m):
    """Idle: (p - 1) / (m + p - 1) of the step, with equal stages and transfers that take no time."""
    events = pipeline_events([1.0] * p, [2.0] * p, m, schedule, (0.0, 0.0))
    assert simulate(events) == pytest.approx(3 * (m + p - 1))
    assert shares(events, p)[1] == pytest.approx((p - 1) / (m + p - 1))


@pytest.mark.parametrize("schedule, most", [("1f1b", [4, 3, 2, 1]), ("gpipe", [9, 9, 9, 9])])
def test_micro_batches_in_memory(schedule, most):
    """Between its forward and its backward pass a micro-batch's activations are kept: at most so many at a time, on
    each stage, which is what the formula of memory says."""
    events = pipeline_events([1.0] * 4, [2.0] * 4, 9, schedule, (0.1, 0.0))
    simulate(events)
    for stage in range(4):
        own = sorted((e for e in events if e.stream == f"compute {stage}"), key=lambda e: e.start)
        kept, found = 0, []
        for event in own:
            kept += 1 if event.name.startswith("forward") else -1
            found.append(kept)
        assert max(found) == most[stage] and found[-1] == 0
    s = given(schedule=schedule, micro=9, batch_size=9, n_layer=4, vocab_size=64)
    stages = {"1f1b": 4, "gpipe": 9}[schedule]  # the first stage's
    activation = 10 * s.dtype_bytes * 4 * 1024 * s.n_embd
    assert memory_of(s, "pipeline", 4)["activations"] == stages * activation


@pytest.mark.parametrize("slow", [0.5, 4.0])
def test_full_overlap(slow):
    """One bucket a block: the step is the forward pass, then the larger of the backward pass with the last block's
    bucket and the first block's backward pass with all buckets, and then the embedding's, which is ready at the end."""
    s = given(memory=INF, attention=INF, launch=0.0, newton_schulz=INF, **NO_DELAY)
    size = sizes(s)
    s.bucket = 4 * size.block
    product = 2 * 16 * 1024 * size.matrices / s.matmul  # of a block, forward
    s.link = 4 * size.block / (slow * 2 * product)      # n = 2: as many bytes as there are
    head = 6 * 16 * 1024 * size.embedding / s.matmul
    each, last = slow * 2 * product, slow * 2 * product * (size.embedding + s.n_embd) / size.block
    wanted = 12 * product + head + max(12 * 2 * product + each, 2 * product + 12 * each) + last
    assert predict(s, "data", 2).seconds == pytest.approx(wanted)
    s.overlap = False
    assert predict(s, "data", 2).seconds == pytest.approx(12 * 3 * product + head + 12 * each + last)


@pytest.mark.parametrize("slow", [0.5, 4.0])
def test_gathers_ahead(slow):
    """fsdp with a link for which gathers are the larger part: one after the other, and the last block's compute. Else
    only the first gathers are waited for."""
    s = given(memory=INF, attention=INF, launch=0.0, vocab_size=1, gradient_bytes=0, **NO_DELAY)
    size = sizes(s)
    product = 2 * 16 * 1024 * size.matrices / s.matmul
    s.link = size.block * s.dtype_bytes / 2 / (slow * product)  # n = 2: a gather takes slow * product
    gather, embedding = slow * product, slow * product * size.embedding / size.block
    head = 2 * 16 * 1024 * size.embedding / s.matmul
    events = step_events(s, "fsdp", 2)
    simulate(events)
    last = next(event for event in events if event.name == "forward 11")
    assert last.end == pytest.approx(embedding + 12 * gather + product if slow > 1 else
                                     embedding + gather + 12 * product)
    whole = max(event.end for event in events if event.name.startswith("backward"))
    if slow < 1:  # the backward pass gathers its first block again, while the loss is computed
        assert whole == pytest.approx(last.end + max(3 * head, gather) + 24 * product)
    s.overlap = False
    simulate(events := step_events(s, "fsdp", 2))
    assert max(e.end for e in events if e.name.startswith("backward")) == pytest.approx(
        embedding + 24 * gather + 36 * product + 3 * head)


# ---- bytes -----------------------------------------------------------------------------------------------------------


SMALL = {"n_layer": 3, "n_head": 4, "n_embd": 64, "vocab_size": 320}


def nbytes(tree) -> int:
    return sum(array.nbytes for name, array in tree_flatten(tree) if not name.endswith(("step", "learning_rate")))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_bytes_of_a_model(optimizer):
    """Parameters and states of the optimizer of model.py's default architecture, as MLX holds them."""
    model = GPT(GPTConfig(block_size=16, **SMALL))
    opt = optim.AdamW(1e-3) if optimizer == "adamw" else optim.MultiOptimizer([Muon(0.05), optim.Adam(1e-2)], [by_muon])
    opt.init(model.trainable_parameters())
    found = memory_of(given(optimizer=optimizer, block_size=16, **SMALL), "data", 1)
    assert found["parameters"] == nbytes(model.parameters())
    assert found["optimizer"] == nbytes(opt.state)


@pytest.mark.parametrize("n", [2, 4])
def test_bytes_of_modes(n):
    """zero1 divides the optimizer's states, fsdp also parameters and gradients; tensor all but the norms."""
    s = given(block_size=16, batch_size=4, **SMALL)
    one = memory_of(s, "data", 1)
    states = one["optimizer"]
    zero1, fsdp, tensor = (memory_of(s, mode, n) for mode in ("zero1", "fsdp", "tensor"))
    assert (zero1["parameters"], zero1["optimizer"]) == (one["parameters"], states / n)
    assert (fsdp["parameters"], fsdp["gradients"], fsdp["optimizer"]) == (one["parameters"] / n, one["gradients"] / n,
                                                                        states / n)
    model = GPT(GPTConfig(block_size=16, **SMALL))
    arrays = [array for _, array in tree_flatten(model.parameters())]
    wanted = sum(array.nbytes / (n if array.ndim > 1 else 1) for array in arrays)
    assert tensor["parameters"] == wanted and tensor["optimizer"] == 2 * wanted


@pytest.mark.parametrize("p", [2, 3])
def test_bytes_of_stages(p):
    """The stages of a pipeline hold every array once, the embedding twice, as it is the unembedding too."""
    s = given(block_size=16, batch_size=6, micro=6, **SMALL)
    model = GPT(GPTConfig(block_size=16, **SMALL))
    blocks = nbytes(model.blocks[0].parameters())
    first = 3 // p + bool(3 % p)
    assert memory_of(s, "pipeline", p)["parameters"] in (
        first * blocks + nbytes(model.embed.parameters()),
        3 // p * blocks + nbytes(model.embed.parameters()) + nbytes(model.norm.parameters()))


@pytest.mark.parametrize("n", [2, 8])
def test_bytes_sent(n):
    """The formulas of docs/devices.md, for 2 micro-steps."""
    s = given(grad_accum=2, n_head=16, n_embd=1024, slices=4)
    size, ring, tokens = sizes(s), (n - 1) / n, 8 * 1024
    sent = {mode: predict(s, mode, n).sent for mode in ("data", "zero1", "fsdp", "tensor")}
    assert sent["data"] == pytest.approx(2 * ring * 4 * size.all)
    assert sent["zero1"] == pytest.approx(2 * ring * 4 * size.all + ring * 4 * size.all)
    blocks, rest = 12 * size.block, size.embedding
    assert sent["fsdp"] == pytest.approx(2 * ring * (2 * 2 * blocks + 2 * rest + 4 * size.all))
    assert sent["tensor"] == pytest.approx(2 * 2 * ring * n * tokens * ((4 * 12 + 2) * 2 * 1024 + 3 * 4))
    s.scatter = True
    assert predict(s, "zero1", n).sent == pytest.approx(2 * ring * 4 * size.all)
    if n == 8:  # 2 groups of 4
        s.grad_accum, vectors = 1, 12 * size.vectors + 1024
        mine = (size.all - vectors) / 4 + vectors
        assert predict(s, "data-tensor", n).sent == pytest.approx(
            2 * 3 / 4 * 4 * 16 * 1024 * ((4 * 12 + 2) * 2 * 1024 + 3 * 4) + 2 * 1 / 2 * 4 * mine)


def test_muon_gathers_whole_matrices():
    """fsdp and tensor gather them before the iteration, in bfloat16; its time is that of one device."""
    for mode in ("fsdp", "tensor"):
        adamw, muon = (predict(given(optimizer=optimizer), mode, 4) for optimizer in ("adamw", "muon"))
        assert muon.sent - adamw.sent == pytest.approx(3 / 4 * 2 * 12 * sizes(given()).matrices)
        events = step_events(given(optimizer="muon", memory=INF), mode, 4)
        assert events[-1].name == "optimizer"
        assert events[-1].seconds == pytest.approx(12 * newton_schulz_flops(given()) / settings["newton_schulz"])


@pytest.mark.parametrize("mode, n, t", [("data", 4, 1), ("zero1", 4, 1), ("fsdp", 4, 1), ("data-tensor", 4, 2)])
def test_seconds_of_the_optimizer(mode, n, t):
    """32 bytes a parameter: the gradient twice, and the parameter and both states read and written. zero1 and fsdp
    have 1 / n of them. Sums of gradients are copied into buckets and divided by n, which reads and writes twice."""
    s = given(slices=2, link=INF, link_across=INF, matmul=INF, attention=INF, launch=0.0, **NO_DELAY)
    events = step_events(s, mode, n)
    simulate(events)
    own = sum(event.seconds for event in events if event.name in ("optimizer", "copy"))
    size = sizes(s)
    vectors = 12 * size.vectors + s.n_embd
    mine = (size.all - vectors) / t + vectors
    parts = n if mode in ("zero1", "fsdp") else 1
    assert own == pytest.approx((32 * mine / parts + 4 * 4 * mine * (mode != "fsdp")) / s.memory)


def test_buffers():
    """The weights as they are multiplied, and two buckets or, without overlap, a copy of all gradients."""
    s, whole = given(), sizes(given()).all
    assert memory_of(s, "data", 1)["buffers"] == s.queue + 2 * whole
    assert memory_of(s, "data", 2)["buffers"] == s.queue + 2 * whole + 2 * s.bucket
    assert memory_of(given(overlap=False), "data", 2)["buffers"] == s.queue + 2 * whole + 4 * whole
    stage = memory_of(s, "pipeline", 2)
    assert stage["buffers"] == s.queue + stage["parameters"] / 2


def test_transfers_of_a_pipeline():
    """An activation's bytes, a hop and the call; at the end both holders of the embedding sum its gradients."""
    s = given(call=1.0, latency=2.0, per_node=4, latency_across=5.0, micro=8)
    for p, hop, speed in ((4, 2.0, s.link), (6, 5.0, s.link_across)):
        sends = [event for event in step_events(s, "pipeline", p) if event.name.startswith("send")]
        assert len(sends) == 2 * 8 * (p - 1)
        nbytes = 2 * 16 * p / 8 * 1024 * 768
        assert {(event.seconds, event.sent) for event in sends} == {(1 + hop + nbytes / speed, nbytes)}
        tied, = (event for event in step_events(s, "pipeline", p) if event.name.startswith("sum"))
        assert tied.sent == 4 * sizes(s).embedding
        assert tied.seconds == pytest.approx(1 + 2 * hop + tied.sent / speed)


def test_recomputing():
    """Every block's forward pass a second time, and in memory its input, besides what one block keeps."""
    s, again = given(), given(checkpoint=True)
    forward = sum(event.seconds for event in step_events(s, "data", 1) if event.name.startswith("forward"))
    assert predict(again, "data", 1).seconds - predict(s, "data", 1).seconds == pytest.approx(forward)
    whole = memory_of(s, "data", 1)["activations"]
    assert memory_of(again, "data", 1)["activations"] == pytest.approx(whole / 10 + whole / 12)


def test_newton_schulz():
    """The FLOPs of muon.py's iteration, counted product by product."""
    found = 0
    for rows, columns in [(64, 64)] * 4 + [(256, 64)] * 2:
        m, k = min(rows, columns), max(rows, columns)
        found += 5 * (2 * m * k * m + 2 * m * m * m + 2 * m * m * k)
    assert newton_schulz_flops(given(**SMALL)) == found


def test_shared_muon():
    """Shared out, Muon's iteration takes 1 / n of its time, and what it makes is gathered."""
    s = given(optimizer="muon", link=INF, memory=INF, **NO_DELAY)
    repeated, shared = (predict(given(**{**vars(s), "shared_muon": share}), "data", 4) for share in (False, True))
    whole = 12 * newton_schulz_flops(s) / s.newton_schulz
    assert repeated.seconds - shared.seconds == pytest.approx(whole * 3 / 4)
    assert shared.sent - repeated.sent == pytest.approx(3 / 4 * 2 * 12 * sizes(s).matrices)


# ---- what was measured -----------------------------------------------------------------------------------------------

PLAIN = {"vocab_size": 4096, "optimizer": "muon", "passes": 155.6, "kept": 18.7, "queue": 5.26e9}  # before gpu_train.py
TWO = {**PLAIN, "batch_size": 32, "strong": True, "overlap": False}


def test_one_card():
    """To these the settings were fitted: 487,398 and 459,000 and 411,000 tokens a second."""
    assert predict(given(), "data", 1).speed == pytest.approx(487_398, rel=0.01)
    assert predict(given(**PLAIN), "data", 1).speed == pytest.approx(411_000, rel=0.01)
    assert predict(given(**PLAIN, batch_size=32), "data", 1).speed == pytest.approx(459_000, rel=0.01)
    assert predict(given(**{**PLAIN, "optimizer": "adamw"}), "data", 1).speed == pytest.approx(474_000, rel=0.01)


def test_two_cards():
    """620,000 tokens a second were measured, which bandwidth alone does not explain; and this memory."""
    assert predict(given(**TWO), "data", 2).speed > 1.2 * 620_000
    one = sum(memory_of(given(**PLAIN), "data", 1).values()) / 2**30  # the fit: 11.58, and 17.1 for 32 sequences
    assert one == pytest.approx(11.58, rel=0.01)
    memory = sum(predict(given(**TWO), "data", 2).memory.values()) / 2**30
    assert memory == pytest.approx(11.7, rel=0.03)


def tables() -> list[tuple[str, list[str]]]:
    """The commands of docs/devices.md that print a Markdown table, each with the rows that follow it."""
    pattern = r"`python\s+runs/devices\.py ([^`]*--markdown=True[^`]*)`.*?\n\n((?:\|[^\n]*\n)+)"
    found = re.findall(pattern, PAGE, re.S)
    return [(" ".join(command.split()), rows.splitlines()) for command, rows in found]


def test_tables_of_the_page():
    assert len(tables()) == PAGE.count("--markdown=True") >= 2
    for command, rows in tables():
        printed = run("runs/devices.py", *command.split()).stdout.splitlines()
        assert [line for line in printed if line.startswith("|")] == rows, command


def test_figures_of_the_page():
    """What the page predicts for two cards, of as many sequences on each and in all: milliseconds, and times one."""
    pattern = r"takes ([\d.]+) ms \(([\d.]+) times one card\), or ([\d.]+) ms \(([\d.]+)\)"
    told = re.search(pattern, " ".join(PAGE.split()))
    for strong, ms, times in (False, *told.groups()[:2]), (True, *told.groups()[2:]):
        s = given(overlap=False, gradient_bytes=2, strong=strong)
        one, two = predict(s, "data", 1), predict(s, "data", 2)
        assert (f"{two.seconds * 1e3:.1f}", f"{two.speed / one.speed:.2f}") == (ms, times)
        assert strong or f"| {round(two.speed, -3):,.0f} tok/s |" in PAGE


# ---- the command -----------------------------------------------------------------------------------------------------


def test_command(tmp_path):
    done = run("runs/devices.py", "--mode=all", "--devices=1,2,4", "--slices=2", f"--picture={tmp_path / 'a.png'}")
    assert done.stdout.startswith("123.6M parameters, 16 x 1,024 tokens a device, adamw; predicted\n")
    blocks = done.stdout.split("\n\n")[1:]
    assert [block.split()[0] for block in blocks[:6]] == [*MODES]
    assert blocks[0].splitlines()[1].split()[3] == "100%"
    assert "1 is no multiple of slices=2" in blocks[5]
    assert (tmp_path / "a.png").stat().st_size > 20_000
    again = run("runs/devices.py", f"--picture={tmp_path / 'a.png'}", "--devices=2", "--picture_devices=2")
    assert again.stdout.count("\n") == 6


@pytest.mark.parametrize("arguments, message", [
    (["--mode=ring"], "mode='ring' is not one of"),
    (["--devices=2,x"], "it must be whole numbers"),
    (["--devices=0"], "it must be whole numbers"),
    (["--bucket=1000000", "--mode=tensor"], "--bucket is used by data and zero1 and data-tensor"),
    (["--micro=4"], "--micro is used by pipeline"),
    (["--shared_muon=True"], "needs --optimizer=muon"),
    (["--optimizer=lion"], "is not one of adamw, muon"),
    (["--mode=pipeline", "--schedule=zb"], "is not one of 1f1b, gpipe"),
    (["--n_head=7"], "is not divisible by n_head=7"),
    (["--n_layer=0"], "n_layer=0"),
    (["--link=-1"], "link=-1.0"),
    (["--bucket=1"], "too many events"),
    (["--n_layer=4611686018427387904"], "it must be from"),
    (["--mode=pipeline", "--micro=100000"], "too many events"),
    (["--picture_devices=4"], "needs --picture"),
    (["--picture=a.html"], "let its name end in .png"),
])
def test_errors(arguments, message):
    assert message in run("runs/devices.py", *arguments, status=2).stderr


def test_impossible_numbers():
    """They are told by name, in their lines of the table."""
    for mode, n, changes, message in (
            ("tensor", 8, {}, "12 heads are not divisible by 8"),
            ("data-tensor", 12, {}, "12 is no multiple of slices=8"),
            ("pipeline", 13, {}, "12 blocks are fewer than 13 stages"),
            ("data", 32, {"strong": True}, "16 sequences are not 32 equal parts"),
            ("pipeline", 2, {"strong": True}, "16 sequences are not 32 equal parts")):
        with pytest.raises(UserError, match=message):
            predict(given(**changes), mode, n)


def test_help():
    """--help tells of every mode, and which figures are assumed."""
    text = run("runs/devices.py", "--help").stdout
    assert all(re.search(rf"^ +{mode} ", text, re.M) for mode in MODES) and text.count("; assumed") >= 3
