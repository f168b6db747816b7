"""sample.py, run from a command line: its text, streaming, stop strings, a terminal, adapters, and bad input."""
import fcntl
import json
import os
import pty
import re
import select
import subprocess
import sys
import termios

import mlx.core as mx
import numpy as np
import prepared
import pytest
from conftest import ROOT, load_adapter
from mlx.utils import tree_flatten

from conversations import encode_prompt
from lora import attach, base_fingerprint, linear_layers, save_adapter
from model import GPT, GPTConfig, generate, load_arrays, load_checkpoint, no_tap, save_arrays, save_checkpoint
from steering import load_direction, removing, save_direction
from tokenizer import EOT, PATTERN, Tokenizer, byte_tokenizer, char_tokenizer

BYTES = byte_tokenizer()


def command(checkpoint, *arguments):
    return [sys.executable, str(ROOT / "sample.py"), str(checkpoint), "--dtype=float32", *arguments]


def sample(checkpoint, *arguments, status=0, **options) -> tuple[str, str]:
    """Standard output and standard error."""
    done = subprocess.run(command(checkpoint, *arguments), stdin=subprocess.DEVNULL, capture_output=True,
                          encoding="utf-8", timeout=120, **options)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout, done.stderr


def save(path, model, tokenizer):
    save_checkpoint(str(path), model, {"tokenizer": tokenizer.to_dict()})
    return path


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A checkpoint of random weights with confident predictions. Padding tokens of the vocabulary would often win."""
    tokenizer = char_tokenizer(["abcdefghijklmnopqrstuvwxyz ,.\n"])
    model = GPT(GPTConfig(block_size=64, vocab_size=64, n_layer=2, n_head=2, n_embd=32, tie=False), seed=1)
    model.head.weight = model.head.weight * mx.where(mx.arange(64) < tokenizer.n_vocab, 10, 30)[:, None]
    return save(tmp_path_factory.mktemp("writer") / "ckpt.safetensors", model, tokenizer)


def chain(folder, ids, tokenizer=BYTES):
    """A checkpoint that generates these ids, in order, after an end-of-text token."""
    V = tokenizer.n_vocab
    model = GPT(GPTConfig(block_size=64, vocab_size=V, n_layer=1, n_head=1, n_embd=V, head_dim=2, ffn_dim=1, tie=False))
    follows = np.zeros((V, V), dtype=np.float32)
    follows[list(ids), [tokenizer.eot, *ids[:-1]]] = 10
    model.embed.weight, model.head.weight = mx.eye(V), mx.array(follows)
    model.blocks[0].attn.out.weight *= 0
    model.blocks[0].mlp.down.weight *= 0
    return save(folder / "chain.safetensors", model, tokenizer)


# ---- what it writes --------------------------------------------------------------------------------------------------


def test_greedy_equals_a_plain_loop(writer):
    model, meta = load_checkpoint(str(writer))
    tokenizer = Tokenizer.from_dict(meta["tokenizer"])
    ids, padding_won = [tokenizer.eot, *tokenizer.encode("once upon").tolist()], False
    for _ in range(50):
        logits = np.array(model(mx.array([ids]))[0, -1])
        padding_won |= logits.argmax() >= tokenizer.n_vocab
        ids.append(int(logits[:tokenizer.n_vocab].argmax()))
    assert padding_won and tokenizer.eot not in ids[1:]
    out, _ = sample(writer, "once upon", "--temperature=0", "--max_new_tokens=50")
    assert out == tokenizer.decode(ids[1:]) + "\n"


@pytest.mark.parametrize("setting", ["temperature=2.5", "top_k=3", "top_p=0.4", "min_p=0.3", "repetition_penalty=1.7",
                                     "seed=7"])
def test_sampling_settings(writer, setting):
    model, meta = load_checkpoint(str(writer))
    tokenizer = Tokenizer.from_dict(meta["tokenizer"])
    settings = {"temperature": 0.8, "top_k": 0, "seed": 1337, "n_vocab": tokenizer.n_vocab}
    name, value = setting.split("=")
    texts = [tokenizer.decode(generate(model, [tokenizer.eot], 30, **s)).split(EOT)[0] + "\n"
             for s in (settings, settings | {name: type(settings.get(name, 1.0))(value)})]
    out, _ = sample(writer, "--max_new_tokens=30", "--top_k=0", f"--{setting}")
    assert out == texts[1] != texts[0]


def test_seed_and_num_samples(writer):
    one, again, two = (sample(writer, "a", "--max_new_tokens=30", f"--seed={seed}")[0] for seed in (1, 1, 2))
    assert one == again != two
    out, error = sample(writer, "a", "--max_new_tokens=30", "--seed=1", "--num_samples=2")
    assert out == one + two and error.count("tok/s") == 2


def test_prompt(tmp_path):
    """A prompt is a bare argument or a setting, with "=", digits or any script; the output begins with it."""
    checkpoint = chain(tmp_path, [*b"abc", BYTES.eot])
    for prompt in ("a", "1a", "x=a", "héllo 🙂 a", ""):
        wanted = (prompt or "a") + "bc\n"
        assert sample(checkpoint, prompt)[0] == sample(checkpoint, f"--prompt={prompt}")[0] == wanted


def test_prompt_longer_than_the_context(writer):
    """The next token is predicted from the last block_size tokens."""
    model, meta = load_checkpoint(str(writer))
    tokenizer = Tokenizer.from_dict(meta["tokenizer"])
    prompt = ("the quick brown fox jumps over the lazy dog. " * 3)[:100]
    logits = np.array(model(mx.array([tokenizer.encode(prompt)[-64:].tolist()]))[0, -1, :tokenizer.n_vocab])
    out, error = sample(writer, prompt, "--temperature=0", "--max_new_tokens=1")
    assert out == prompt + tokenizer.decode([logits.argmax()]) + "\n"
    assert "101 tokens" in error and "last 64" in error
    assert "are read" not in sample(writer, prompt[:63], "--max_new_tokens=70")[1]


def test_heads_that_cannot_be_quantized(tmp_path):
    """The error comes before the prompt is printed."""
    path = save(tmp_path / "ckpt.safetensors", GPT(GPTConfig(vocab_size=320, n_layer=1, n_head=4, n_embd=64)), BYTES)
    done = prepared.run([sys.executable, ROOT / "sample.py", path, "--prompt=x", "--kv_bits=8"])
    assert done.returncode == 2 and done.stdout == "" and "head_dim=16 is not a multiple of 32" in done.stderr


@pytest.mark.parametrize("window, kv_bits", [(0, 0), (20, 0), (0, 8), (20, 4)])
def test_speed(tmp_path, window, kv_bits):
    """GB/s counts all weights but the embedding, and the cache of 51 tokens and on average half of the 100 new ones; in
    a layer with a window (here all but the fourth) at most the window. 32 quantized numbers have two more, scale and
    bias."""
    model = GPT(GPTConfig(vocab_size=4096, n_layer=4, n_head=8, n_kv_head=4, head_dim=128, n_embd=64, tie=False,
                          sliding_window=window, window_pattern="SSSL"))
    _, error = sample(save(tmp_path / "ckpt.safetensors", model, BYTES), 50 * "x", "--max_new_tokens=100",
                      "--temperature=0", f"--kv_bits={kv_bits}")
    found = re.fullmatch(r"\[(\d+) tokens, ([\d.]+) tok/s, ([\d.]+) GB/s, first [\d.]+ s, [\d.]+ GiB, "
                         r"cache ([\d.]+) MB\]\n", error)
    count, speed, bandwidth, cache = map(float, found.groups())
    weights = sum(p.size for name, p in tree_flatten(model.parameters()) if name != "embed.weight")
    whole = 51 + count / 2
    number = kv_bits / 8 + 2 * 4 / 32 if kv_bits else 4
    read = 4 * weights + number * (whole + 3 * (window or whole)) * 2 * 4 * 128
    assert cache == pytest.approx(number * (256 + 3 * (window or 256)) * 2 * 4 * 128 / 1e6, abs=0.01)
    assert count == 100 and bandwidth == pytest.approx(speed * read / 1e9, abs=0.06)


@pytest.fixture(scope="module")
def steerable(tmp_path_factory):
    """A checkpoint, two directions as arguments, and the checkpoint whose biases have the sum instead."""
    folder, rng = tmp_path_factory.mktemp("steer"), np.random.default_rng(2)
    model = GPT(GPTConfig(block_size=64, vocab_size=320, n_layer=2, n_head=2, n_embd=32, tie=False, bias=True), seed=1)
    model.head.weight = model.head.weight * 10
    path, base, given = save(folder / "ckpt.safetensors", model, BYTES), base_fingerprint(model), []
    for layer, strength in ((0, 0.5), (1, -2)):
        direction, name = mx.array(rng.normal(size=32).astype(np.float32)), folder / f"{layer}:a.safetensors"
        save_direction(str(name), direction, layer, "last", base, "steer.py", {})
        given.append(f"--steer={name}:{strength}")
        bias = model.blocks[layer].mlp.down.bias
        model.blocks[layer].mlp.down.bias = bias + strength * direction
        if layer == 0:
            save(folder / "one.safetensors", model, BYTES)
    return path, given, folder / "one.safetensors", save(folder / "both.safetensors", model, BYTES)


def test_steer(steerable, tmp_path):
    """The text of a steered model is that of the model with other biases: of one prompt, of a file of prompts, in a
    conversation, and with a draft."""
    path, given, one, both = steerable
    options = ["--max_new_tokens=30", "--temperature=0.7"]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(["a", "once upon", "the end", "b c d", "x"]))
    for mode in (["abc"], [f"--prompts={prompts}", "--batch_size=2"], ["abc", "--template=chatml"],
                 ["abc", f"--draft={path}", "--temperature=0"]):
        assert sample(path, *given, *options, *mode)[0] == sample(both, *options, *mode)[0], mode
    texts = [sample(*each, "abc", *options)[0] for each in ((path,), (path, given[0]), (path, *given), (one,))]
    assert texts[1] == texts[3] and len({*texts}) == 3


def test_removed(steerable, tmp_path):
    """FILE:remove acts as a tap of steering.py, in batches and with a draft too."""
    path, given, *_ = steerable
    model, _ = load_checkpoint(str(path))
    name = given[0].removeprefix("--steer=").removesuffix(":0.5")
    tap = removing(load_direction(name, model, base_fingerprint(model))[0])
    expected = [BYTES.decode(list(generate(model, [BYTES.eot, *b"abc"], 30, 0, n_vocab=BYTES.n_vocab, tap=each)))
                for each in (tap, no_tap)]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("abc\nthe end of it\nabc\n")
    options = path, f"--steer={name}:remove", "--max_new_tokens=30", "--temperature=0"
    assert sample(*options, "abc")[0] == f"abc{expected[0]}\n" != f"abc{expected[1]}\n"
    assert sample(*options, "abc", f"--draft={path}")[0] == f"abc{expected[0]}\n"
    rows = [json.loads(line) for line in sample(*options, f"--prompts={prompts}", "--batch_size=2")[0].splitlines()]
    assert rows[0]["text"] == rows[2]["text"] == expected[0]


def test_steer_of_another(steerable, writer):
    assert "another checkpoint" in sample(writer, "a", steerable[1][0], status=2)[1]
    assert "no checkpoint at" in sample(writer, "a", "--steer=none.safetensors:2", status=2)[1]


# ---- streaming -------------------------------------------------------------------------------------------------------


def test_text_streams(tmp_path):
    """The text comes in many writes, and none of them holds a part of a character."""
    text = "aé🙂z"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(command(chain(tmp_path, [*text.encode(), *b"a"]), "--max_new_tokens=1600"), env=buffered,
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    parts = [part.decode() for part in iter(lambda: os.read(process.stdout.fileno(), 1 << 16), b"")]
    assert process.wait() == 0 and "".join(parts) == 200 * text + "\n"
    assert len(parts) > 5


def test_half_a_character_at_the_end(tmp_path):
    checkpoint = chain(tmp_path, [*"a🙂".encode(), BYTES.eot])
    assert sample(checkpoint, "--max_new_tokens=5")[0] == "a🙂\n"
    assert sample(checkpoint, "--max_new_tokens=4")[0] == "a\N{REPLACEMENT CHARACTER}\n"


def test_output_that_cannot_hold_it(tmp_path):
    checkpoint = chain(tmp_path, [*"ü".encode(), BYTES.eot])
    assert sample(checkpoint, "é", env=os.environ | {"PYTHONIOENCODING": "ascii"})[0].startswith("?")


# ---- where it stops --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop, text", [
    ("d", "abc"),
    ("cde", "ab"),              # comes in three tokens
    ("f|de|zz", "abc"),         # the first that appears
    ("|", "abcdefgh"),          # none
    ("cdx|fghi", "abcdefgh"),   # begins, but does not come: what was held back is written
    ("a", ""),
])
def test_stop(tmp_path, stop, text):
    assert sample(chain(tmp_path, [*b"abcdefgh", BYTES.eot]), f"--stop={stop}")[0] == text + "\n"


@pytest.mark.parametrize("stop, text", [
    ("e", "abcd"), ("ef|cd", "ab"), ("f!", "abcde"), ("!", "abcdef"), ("🙂", "abcdef!"),
])
def test_stop_within_tokens(tmp_path, stop, text):
    """A token may begin before the stop string that it holds, and end after it, even with half a character."""
    pieces = [b"a", b"bcdef", b"!\xf0\x9f", b"\x99\x82h"]
    tokenizer = Tokenizer("bpe", [*BYTES.tokens, *pieces[1:]], {EOT: 259}, PATTERN)
    checkpoint = chain(tmp_path, [ord("a"), 256, 257, 258, tokenizer.eot], tokenizer)
    assert sample(checkpoint, f"--stop={stop}")[0] == text + "\n"


def test_prompt_may_hold_the_stop(tmp_path):
    assert sample(chain(tmp_path, [*b"abcd", BYTES.eot]), "d a", "--stop=d")[0] == "d abc\n"


def test_end_of_text(tmp_path):
    out, error = sample(chain(tmp_path, [*b"abc", BYTES.eot]))
    assert out == "abc\n" and error.startswith("[4 tokens")
    assert sample(chain(tmp_path, [BYTES.eot])) == ("\n", "")


# ---- on a terminal ---------------------------------------------------------------------------------------------------


class Terminal:
    """sample.py on a pseudo-terminal."""

    def __init__(self, *arguments):
        self.fd, inner = pty.openpty()
        self.process = subprocess.Popen(
            command(*arguments), stdin=inner, stdout=inner, stderr=inner, env=os.environ | {"TERM": "dumb"},
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        os.close(inner)

    def type(self, text: str):
        os.write(self.fd, text.encode())

    def read(self, end: str = "") -> str:
        """All output up to `end`, or until sample.py has ended."""
        shown = b""
        while not end or not shown.endswith(end.encode()):
            assert select.select([self.fd], [], [], 60)[0], shown
            try:
                part = os.read(self.fd, 1024)
            except OSError:  # on Linux, where the end is an error
                part = b""
            if not part:
                break
            shown += part
        return shown.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("last", ["\n", "\x04"], ids=["empty line", "Ctrl-D"])
def test_terminal(tmp_path, last):
    """It asks for prompts until an empty line or Ctrl-D; a character that the tokenizer lacks does not end it."""
    tokenizer = char_tokenizer(["abcé"])
    terminal = Terminal(chain(tmp_path, [*tokenizer.encode("abcé"), tokenizer.eot], tokenizer))
    terminal.read("\n> ")
    for prompt, text in ("a", "abcé"), ("éb", "ébcé"):
        terminal.type(prompt + "\n")
        assert re.fullmatch(rf"{prompt}\n{text}\n\[\d tokens, .*\]\n> ", terminal.read("\n> "))
    terminal.type("xyz\n")
    assert re.fullmatch(r"xyz\n.*char tokenizer.*'x', 'y', 'z'.*\n> ", terminal.read("\n> "))
    terminal.type(last)
    assert terminal.read() == "\n" and terminal.process.wait() == 0


@pytest.mark.parametrize("prompt", ["", "a\n"], ids=["asking", "writing"])
def test_ctrl_c(tmp_path, prompt):
    terminal = Terminal(chain(tmp_path, b"abca"), "--max_new_tokens=10000000")
    terminal.read("\n> ")
    if prompt:
        terminal.type(prompt)
        terminal.read("bc")
    terminal.type("\x03")
    if not select.select([terminal.fd], [], [], 3)[0]:  # Python loses the signal if it comes just before readline waits
        terminal.type("\x03")
    rest = terminal.read()
    assert terminal.process.wait() == 130 and "stopped" in rest and "Traceback" not in rest


# ---- bad input -------------------------------------------------------------------------------------------------------


def assert_one_line(says, checkpoint, *arguments):
    out, error = sample(checkpoint, *arguments, status=2)
    assert out == "" and error.count("\n") == 1 and says in error


# ---- a draft model ---------------------------------------------------------------------------------------------------


def test_draft(writer, tmp_path):
    """The text is the large model's, with any draft model; a tokenizer or settings that do not fit are refused."""
    model, meta = load_checkpoint(str(writer))
    small = GPT(GPTConfig(block_size=32, vocab_size=64, n_layer=1, n_head=1, n_embd=16), seed=2)
    save_checkpoint(str(tmp_path / "small.safetensors"), small, meta)
    settings = ["--prompt=once upon", "--temperature=0", "--max_new_tokens=30"]
    alone, _ = sample(writer, *settings)
    for draft, share in ((writer, "100%"), (tmp_path / "small.safetensors", "")):
        text, err = sample(writer, *settings, f"--draft={draft}", "--n_draft=3")
        assert text == alone and f"{share} of drafts kept" in err
    other = save(tmp_path / "other.safetensors", GPT(GPTConfig(vocab_size=257, n_layer=1, n_head=1, n_embd=16)), BYTES)
    assert "has another tokenizer" in sample(writer, f"--draft={other}", status=2)[1]
    assert "neither --prompts nor" in sample(writer, f"--draft={other}", "--repetition_penalty=2", status=2)[1]


# ---- many prompts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2])
def test_prompts(writer, tmp_path, batch_size):
    """A row for each prompt of a file, in their order, is what the prompt alone gives; blank lines are left out."""
    prompts = ["once upon", "a", "the end, " * 12, "once upon", "in the"]
    (tmp_path / "a.txt").write_text("\n".join([*prompts[:2], "", *prompts[2:]]) + "\n")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"prompt": prompt, "n": 1}) + "\n" for prompt in prompts))
    settings = ["--temperature=0", "--max_new_tokens=20", f"--batch_size={batch_size}"]
    out, err = sample(writer, f"--prompts={tmp_path / 'a.txt'}", *settings)
    found = [json.loads(line) for line in out.splitlines()]
    assert [row["prompt"] for row in found] == prompts
    assert "1 prompts have more than 64 tokens" in err and re.search(r"\[5 texts, 100 tokens, [0-9.]+ tok/s", err)
    for row in found[:2]:
        alone, _ = sample(writer, f"--prompt={row['prompt']}", *settings[:2])
        assert row["prompt"] + row["text"] == alone.removesuffix("\n")
    assert found[0] == found[3]
    sample(writer, f"--prompts={tmp_path / 'a.jsonl'}", f"--out={tmp_path / 'b.jsonl'}", *settings)
    assert (tmp_path / "b.jsonl").read_text() == out and not (tmp_path / "b.jsonl.part").exists()
    both, _ = sample(writer, f"--prompts={tmp_path / 'a.txt'}", "--num_samples=2", "--max_new_tokens=5", "--top_k=0")
    first, second = (json.loads(line) for line in both.splitlines()[:2])
    assert first["prompt"] == second["prompt"] and first["text"] != second["text"]


def test_prompts_stop(tmp_path):
    """A stop string and an end token end one text, and the others go on."""
    path = chain(tmp_path, b"abcdefg")
    (tmp_path / "a.txt").write_text("a\nc\nf\n")
    out, _ = sample(path, f"--prompts={tmp_path / 'a.txt'}", "--temperature=0", "--max_new_tokens=3", "--stop=ef|zz",
                    "--batch_size=3")
    assert [json.loads(line)["text"] for line in out.splitlines()] == ["bcd", "d", "g" + json.loads(
        out.splitlines()[2])["text"][1:]]


@pytest.mark.parametrize("arguments, says", [
    (["--prompts=none.txt"], "none.txt"), (["--prompts=a.txt", "--prompt=a"], "neither --prompt nor --kv_bits"),
    (["--prompt=a", "--out=b"], "only texts of"), (["--prompts=a.txt", "--out=a.txt"], "a.txt exists"),
    (["--prompts=a.jsonl"], "line 2: it has no text named prompt")], ids=str)
def test_prompts_refused(writer, tmp_path, arguments, says):
    (tmp_path / "a.txt").write_text("a\n")
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n{"text": "a"}\n')
    _, err = sample(writer, *arguments, status=2, cwd=tmp_path)
    assert says in err and len(err.splitlines()) == 1
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "a.txt"]


def test_bad_checkpoints(writer, tmp_path):
    bad = tmp_path / "bad.safetensors"
    assert_one_line("no checkpoint", bad)
    bad.write_bytes(b"no checkpoint, but text")
    assert_one_line("bad.safetensors is a text file, not a checkpoint", bad)
    for content in (b"", writer.read_bytes()[:1000], writer.read_bytes()[:-1000]):
        bad.write_bytes(content)
        assert_one_line("not a whole safetensors file", bad)
    mx.save_safetensors(str(bad), {"x": mx.zeros(3)})
    assert_one_line("not one of ours", bad)
    save_checkpoint(str(bad), load_checkpoint(str(writer))[0], {})
    assert_one_line("no tokenizer", bad)
    assert_one_line("is a folder, not a checkpoint", tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite(writer, tmp_path, value):
    model, meta = load_checkpoint(str(writer))
    model.blocks[1].attn.v.weight[0, 1] = value
    save_checkpoint(str(tmp_path / "bad.safetensors"), model, meta)
    assert_one_line("infinite or NaN numbers in blocks.1.attn.v.weight", tmp_path / "bad.safetensors", "abc")


@pytest.mark.parametrize("argument, says", [
    ("--prompt=Zoë", "'Z', '\\xeb'"),
    ("--temprature=1", "--temperature"),
    ("--temperature=hot", "a number"),
    ("--temperature=-1", "temperature must be"),
    ("--temperature=inf", "a number that is finite"),
    ("--top_p=0", "top_p"),
    ("--top_p=1.5", "top_p"),
    ("--min_p=-1", "min_p"),
    ("--repetition_penalty=0", "repetition_penalty"),
    ("--seed=-1", "seed"),
    ("--dtype=int8", "bfloat16"),
])
def test_bad_settings(writer, argument, says):
    assert_one_line(says, writer, argument)


# ---- adapters, conversations -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A base of random weights, and two adapters for it with random B, as after training."""
    folder, rng = tmp_path_factory.mktemp("tuned"), np.random.default_rng(0)

    def base():
        return GPT(GPTConfig(block_size=64, vocab_size=320, n_layer=2, n_head=2, n_embd=64, tie=False), seed=1)

    save(folder / "base.safetensors", base(), BYTES)
    for name, kind in (("a", "lora"), ("b", "rslora")):
        model = base()
        for path in attach(model, "attn", rank=3, kind=kind):
            linear_layers(model)[path].b = mx.array(rng.standard_normal((64, 3)).astype(np.float32))
        save_adapter(str(folder / f"{name}.safetensors"), model, {"template": "alpaca" if name == "b" else None},
                     bases=[str(folder / "base.safetensors")])
    return folder


@pytest.mark.parametrize("adapters", [[("a", 1)], [("a", 0.5)], [("a", 0.5), ("b", -1)]], ids=str)
def test_adapters(tuned, adapters):
    model, _ = load_checkpoint(str(tuned / "base.safetensors"))
    for name, weight in adapters:
        load_adapter(model, str(tuned / f"{name}.safetensors"), weight)
    ids = list(generate(model, [BYTES.eot, *b"ab"], 20, temperature=0, n_vocab=257))
    wanted = "ab" + BYTES.decode(ids[:ids.index(256)] if 256 in ids else ids)
    given = [f"--adapter={tuned / name}.safetensors" + f":{weight}" * (weight != 1) for name, weight in adapters]
    for merge in ("False", "True"):
        out, _ = sample(tuned / "base.safetensors", "ab", *given, f"--merge={merge}", "--temperature=0",
                        "--max_new_tokens=20", "--template=none")
        assert out == wanted + "\n"
    plain, _ = sample(tuned / "base.safetensors", "ab", "--temperature=0", "--max_new_tokens=20")
    assert plain != wanted + "\n"


def test_an_adapter_as_the_checkpoint(tuned, tmp_path):
    """It finds its base from any folder, and brings its template; --adapter adds another one."""
    a, b, base, settings = "a.safetensors", "b.safetensors", "base.safetensors", ("Hi", "--temperature=0", "--seed=1")
    pairs = [([a], [base, f"--adapter={a}"]), ([b], [base, f"--adapter={b}"]),
             ([a, f"--adapter={b}:0.5"], [base, f"--adapter={a}", f"--adapter={b}:0.5"])]
    texts = [[sample(*given, *settings, cwd=tuned)[0] for given in pair] for pair in pairs]
    assert all(one == two for one, two in texts) and len({one for one, _ in texts}) == 3
    assert sample(tuned / b, *settings, cwd=tmp_path)[0] == texts[1][0]
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((tuned / a).read_bytes())
    _, error = sample(alone, "x", status=2)
    assert re.search(rf"alone.safetensors was trained on .*base.safetensors, which is missing: give the checkpoint, "
                     rf"and --adapter={alone}\n$", error) and error.count("\n") == 1


def test_an_adapter_of_another_base(tuned, tmp_path):
    other = save(tmp_path / "other.safetensors", GPT(GPTConfig(vocab_size=320, n_embd=64), seed=2), BYTES)
    _, error = sample(other, "x", f"--adapter={tuned / 'a.safetensors'}", status=2)
    assert "a.safetensors was trained on another base" in error
    _, error = sample(other, "x", "--adapter=nothing.safetensors:0.5", status=2)
    assert "no adapter at nothing.safetensors:" in error


def test_answer_by_the_template(tuned):
    """The template is the adapter's; the prompt is a message, and is not printed."""
    model, _ = load_checkpoint(str(tuned / "base.safetensors"))
    load_adapter(model, str(tuned / "b.safetensors"))
    talk = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    ids = list(generate(model, encode_prompt(BYTES, talk, "alpaca"), 9, temperature=0, n_vocab=257))
    out, _ = sample(tuned / "base.safetensors", "Hi", f"--adapter={tuned / 'b.safetensors'}", "--system=Be kind.",
                    "--temperature=0", "--max_new_tokens=9")
    assert out == BYTES.decode(ids[:ids.index(256)] if 256 in ids else ids) + "\n"
    assert "template='vicuna'" in sample(tuned / "base.safetensors", "x", "--template=vicuna", status=2)[1]


# ---- models of other projects ----------------------------------------------------------------------------------------


def test_all_ends_of_a_model(tmp_path):
    """A text ends at eot, at the template's end, and at each token that the header names; a model without bos begins
    with the text itself, and an empty text with eot."""
    special = {**BYTES.special, "<|a|>": 257, "<|b|>": 258, "<|c|>": 259}
    for end in (256, 258, 259, 257):
        enc = Tokenizer("byte", BYTES.tokens, special, "", None, 256)
        path = chain(tmp_path, [ord("x"), ord("y"), end, ord("z"), ord("z")], enc)
        arrays, meta = load_arrays(str(path))
        meta |= {"template": "own", "ends": [259], "chat_template":
                 "{{ messages[-1].content }}{% if messages[-1].role == 'assistant' %}<|b|>{% endif %}"}
        save_arrays(str(path), arrays, meta)
        out, _ = sample(path, "--prompt=x", "--temperature=0", "--max_new_tokens=3")
        assert out == ("y\n" if end != 257 else "y<|a|>z\n")
        out, _ = sample(path, "--prompt=", "--temperature=0", "--template=none", "--max_new_tokens=4")
        assert out == ("xy\n" if end in (256, 259) else f"xy<|{'ab'[end - 257]}|>z\n")


def test_a_template_that_refuses(tmp_path):
    path = chain(tmp_path, [ord("x")])
    arrays, meta = load_arrays(str(path))
    text = "{% if messages[0].role == 'system' %}{{ raise_exception('No system!') }}{% endif %}"
    for template, arguments, says in ((text, ["--system=s"], "refuses messages of the roles system, user: No system!"),
                                      ("{% if %}", [], "no Jinja program"), (7, [], "no chat template of its own")):
        save_arrays(str(path), arrays, {**meta, "template": "own", "chat_template": template})
        _, err = sample(path, "--prompt=x", *arguments, status=2)
        assert says in err and err.count("\n") == 1
