"""Add a direction to a model's states while it writes, or take it out, and see what that does to texts and figures.

    python steer.py webgpu/demo.safetensors --prompt=$'def open(self):\\n' --layer=2 --over=mean --strength=0.75 \\
        --positive="the socket of the server and the address of the client" --max_new_tokens=40 --seed=2 \\
        --negative="the list of items and the value of the key" --out=sockets.safetensors
    state: after layer 2; norm of the direction 1.02, of the prompt's states 3.00 on average
    written: sockets.safetensors
    ---- the unchanged model
    def open(self):
        \"""Update (internal) mode to an open file.\"""
        return self.stat()
    ---- the changed model
    def open(self):
        \"""\\
            User code - connection a socket.

            This server can be connected to a given host (server.host/host/port/port/port/port/port
    ---- token 3 is the first that differs: U and \\
    KL(unchanged || changed) of the changed text's tokens: mean 0.220 nats, largest 0.516 at token 12

    python steer.py webgpu/demo.safetensors --prompt="class" --direction=sockets.safetensors --strength=0.75
    python steer.py CKPT --positives=polite.txt --negatives=rude.txt --layer=12 --out=polite.safetensors
    python steer.py CKPT --direction=polite.safetensors --strengths=-1,-0.5,0,0.5,1 --data=book.txt \\
        --prompt="The waiter said:" --words="please,thank,sorry"
    python sample.py CKPT --steer=polite.safetensors:0.5

This is activation addition (Turner et al. 2023): the direction is the difference of two prompts' states in the residual
stream after --layer, the positive prompt's less the negative one's; strength times the direction is added to the states
after that layer while the model reads the prompt and writes. --over=last takes the state of each prompt's last token,
--over=mean the mean over its tokens. With --positives and --negatives, files of prompts, it is the difference of the
means over both sets (contrastive activation addition, Rimsky et al. 2024): a prompt on each line, or rows with a field
`text` (.jsonl, .csv). --start=-1 leaves the states of the prompt as they are, but for its last token, from which the
first new token is predicted. --how=remove takes the part along the direction out of all states that a layer or the head
reads (directional ablation, Arditi et al. 2024).

Both texts are drawn with the same random numbers, so that they are equal as long as the models predict the same. KL,
the divergence of the changed model's prediction from the unchanged one's, is for each token of the changed text, given
the text before it, in nats. --out writes the direction to a file, which sample.py and the page in the browser read too.

--words or --data prints a table in place of the two texts, a line for each of --strengths:

    perplexity   of the first --max_tokens tokens of --data: the price of steering
    log p        of the words after the prompt, with a space before them or without, in nats: the mean over the words
    texts        how many of --samples texts that follow the prompt name one of the words, in any case of letters
    namings      how often they name one

The words of a text are counted whole: "port" is not in "support". Curves are drawn as a picture; a page beside it has
the table and the first text of each strength. --save writes the table to an .npz file. In Python:

    >>> from model import generate, load_checkpoint; from steering import direction_of, pasting, states_of, steering
    >>> model, meta = load_checkpoint("out/ckpt.safetensors")
    >>> direction = direction_of(model, [[5, 17, 2]], [[5, 18, 2]], layer=1)   # (C,)
    >>> text = list(generate(model, [5, 9], 20, tap=steering(direction, layer=1, strength=2.0)))
    >>> state = states_of(model, [5, 17, 2], layer=1)[-1]                  # (C,), pasted at position 1:
    >>> text = list(generate(model, [5, 9], 20, tap=pasting(state, layer=1, start=1, end=2)))

Departures from the papers: Turner et al. add the differences of all positions of two prompts, each at its own position
from the beginning of the text on; here one difference is added at every position. Rimsky et al. add it at the positions
after the prompt only, which --start=-1 does.
"""
import html
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np

from config import UserError, check_output, check_replaced, given, overrides
from conversations import ends_of_text
from draw import check_finite, check_folder, grid, image, labels, lines, page, pictures, prompt_ids, short, state_name
from inside import Table, about, check_saved, listed, log_p
from model import GPT, compute_dtype, generate, load_checkpoint, no_tap
from score import in_windows, read_tokens, score, window_length
from steering import adding, direction_of, load_direction, read_texts, removing, save_direction, states_of, steering
from tokenizer import Tokenizer

checkpoint = "out/ckpt.safetensors"  # any checkpoint, quantized or not
prompt = ""               # the beginning of the texts
bos = True                # begin each prompt with the token that begins every text, where the tokenizer has one
# direction
positive = ""             # a prompt whose state the direction leads to
negative = ""             # a prompt whose state it leads away from
positives = ""            # a file of such prompts, in place of positive
negatives = ""            # a file of such prompts, in place of negative
over = "last"             # last | mean: the state of a prompt's last token, or the mean over its tokens
layer = 2                 # the layer after which states are taken and changed; -1: the embedding
direction = ""            # a file that --out or probe.py wrote, in place of positive, negative, over and layer
out = ""                  # write the direction to this file, which the page reads too; "": do not
# steering
how = "add"               # add | remove: add strength times the direction, or take it out of every state
strength = 1.0            # factor of the direction; below 0: away from the positive prompt
start = 0                 # change the states from this position of the text on; -1: from the prompt's last token on
# measures
strengths = ""            # "-1,0,1": the strengths of the table, beside 0; "": 0 and --strength
words = ""                # "socket,server": how probable they are after the prompt, and how often texts name them
samples = 16              # texts that are written for this at each strength; 0: none
data = ""                 # a text file, or a folder that data.py made (its val split), whose perplexity is measured
max_tokens = 5_000        # of it: only this many of the first tokens; 0: all
picture = ""              # a PNG; "": the name of the checkpoint with -steer.png; a page .html is written beside it
save = ""                 # write the table to this .npz file; "": do not
# text
max_new_tokens = 100      # tokens to generate at most
temperature = 0.8         # 0: always the most probable token; 1: the model's own distribution
top_k = 50                # keep the k most probable tokens; 0: all
seed = 1337               # of the random draws, equal for all strengths

settings = overrides(globals(), "checkpoint")

# ---- texts -----------------------------------------------------------------------------------------------------------


def write(model: GPT, enc: Tokenizer, ids: list[int], ends: set[int], tap: Callable, n: int = 1) -> list[list[int]]:
    """n texts that follow ids: their new tokens, up to and with one that ends a text."""
    found, over = [[] for _ in range(n)], [False] * n
    for tokens in generate(model, [ids] * n, max_new_tokens, temperature, top_k, seed=seed, n_vocab=enc.n_vocab,
                           tap=tap):
        for i, token in enumerate(tokens):
            if not over[i]:
                found[i].append(token)
            over[i] = over[i] or token in ends
        if all(over):
            break
    return found


def divergence(model: GPT, ids: list[int], n: int, tap: Callable, n_vocab: int) -> mx.array:
    """KL(the unchanged model's distribution || the changed model's) in nats of each of the last n of tokens ids, given
    those before it: (n,). Token ids from n_vocab on pad the vocabulary."""
    idx = mx.array([ids[:-1]])
    plain, changed = (log_p(model(idx, tap=each)[0, -n:, :n_vocab]) for each in (no_tap, tap))
    return (mx.exp(plain) * (plain - changed)).sum(-1)


def compare(model: GPT, enc: Tokenizer, ids: list[int], ends: set[int], tap: Callable):
    """Write both texts, and print them with their first difference and the divergence. tap(): a new tap."""
    plain, changed = (write(model, enc, ids, ends, each)[0] for each in (no_tap, tap()))
    for name, tokens in ("the unchanged model", plain), ("the changed model", changed):
        print(f"---- {name}\n{prompt}{enc.decode([token for token in tokens if token not in ends])}")
    same = next((i for i, (a, b) in enumerate(zip(plain, changed, strict=False)) if a != b), None)
    if same is None:
        print("---- both texts are equal")
    else:
        first, second = labels(enc, [plain[same], changed[same]])
        print(f"---- token {same + 1} is the first that differs: {first} and {second}")
    fit = changed[:model.config.block_size + 1 - len(ids)]  # beyond the context, a part of the text is read again
    kl = divergence(model, [*ids, *fit], len(fit), tap(), enc.n_vocab)
    most = int(mx.argmax(kl))
    print(f"KL(unchanged || changed) of the changed text's tokens: mean {kl.mean().item():.3f} nats, largest "
          f"{kl[most].item():.3f} at token {most + 1}")


# ---- measures --------------------------------------------------------------------------------------------------------


def word_scores(model: GPT, enc: Tokenizer, ids: list[int], words: Sequence[str], tap: Callable) -> np.ndarray:
    """The log-probability (W,) of each word after tokens ids, in nats: that it follows with a space before it, or
    without. A word's probability is the product of its tokens'."""
    forms = [enc.encode(form).tolist() for word in words for form in (word, f" {word}")]
    longest = max(map(len, forms))
    idx, targets, real = (np.zeros((len(forms), n), np.int32) for n in (len(ids) + longest - 1, longest, longest))
    for i, form in enumerate(forms):
        idx[i, :len(ids) + len(form) - 1] = [*ids, *form[:-1]]
        targets[i, :len(form)], real[i, :len(form)] = form, 1
    logits = model.unembed(model.residual(mx.array(idx), tap=tap)[:, len(ids) - 1:])[..., :enc.n_vocab]
    each = mx.take_along_axis(log_p(logits), mx.array(targets)[..., None], axis=-1)[..., 0] * mx.array(real)
    return np.array(mx.logsumexp(each.sum(-1).reshape(len(words), 2), axis=-1))


def namings(texts: Sequence[str], words: Sequence[str]) -> list[int]:
    """How often each text names one of the words, as a whole, in any case of letters."""
    named = re.compile("|".join(rf"(?<!\w){re.escape(word)}(?!\w)" for word in words), re.I)
    return [len(named.findall(text)) for text in texts]


def measure(model: GPT, enc: Tokenizer, ids: list[int], ends: set[int], taps: dict[str, Callable], known: dict):
    """Print the table, draw it, and save it. taps: by the name of its row, a function that makes a new tap."""
    wanted, tokens = [word.strip() for word in words.split(",") if word.strip()], None
    columns = [*["perplexity"] * bool(data), *["log p"] * bool(words), *["texts", "namings"] * bool(words and samples)]
    if data:
        tokens = read_tokens(data, enc, max_tokens=max_tokens)
        T = min(window_length(model.config), len(tokens))
        print(f"{data}: {len(tokens):,} tokens{in_windows(model.config, T)}")
    print(" ".join(["strength", *(f"{name:>10}" for name in columns)]))
    values, firsts = [], {}
    for name, tap in taps.items():
        row, texts, shown = [], [], []
        if data:
            row.append(np.exp(score(model, tokens, enc.start, tap=tap())[0]))
            shown.append(f"{row[-1]:.3f}" if row[-1] < 1e5 else f"{row[-1]:.2e}")
        if words:
            scores = word_scores(model, enc, ids, wanted, tap())
            row.append(scores.mean())
            shown.append(f"{row[-1]:.3f}")
        if words and samples:
            texts = [enc.decode([token for token in text if token not in ends])
                     for text in write(model, enc, ids, ends, tap(), samples)]
            found = namings(texts, wanted)
            row += [np.count_nonzero(found), sum(found)]
            shown += [f"{row[-2]}/{samples}", str(row[-1])]
        check_finite(row)
        print(" ".join([f"{name:>8}", *(f"{text:>10}" for text in shown)]), flush=True)
        values.append([*row, *(scores if words else ())])
        if texts:
            firsts[name] = texts[0]
    for name, text in firsts.items():
        print(f"---- {name}\n{prompt}{text}")
    columns += [f"log p({word})" for word in wanted]
    table = Table(np.array(values, np.float64), [*taps], columns, known["title"], "each column has a unit of its own",
                  "strength", about=known)
    if how == "add":
        draw(table, firsts)
    if save:
        table.save(save)


def draw(table: Table, texts: dict[str, str]):
    """The columns of a table over the strengths, as a picture and a page with the first text of each strength."""
    x, panels = [float(name) for name in table.rows], []
    names = {"perplexity": "perplexity", "log p": "mean log p of the words, nats", "texts": f"texts of {samples}",
             "namings": "namings in all texts"}
    for name in (name for name in table.columns if name in names):
        panels.append({"y": names[name], "curves": {name: (x, table.values[:, table.columns.index(name)])}})
    path, written = pictures(picture)
    lines(path, panels, table.title, "strength")
    change = table.values - table.values[table.rows.index("0")]
    shown = [[f"{value:.4g}" for value in line] for line in table.values]
    hovers = [[f"{column}\nchange {value:+.4g}" for column, value in zip(table.columns, line, strict=True)]
              for line in change]
    cells = grid(change / np.maximum(np.abs(change).max(0), 1e-9), table.rows, table.columns, shown, hovers,
                 signed=True, axis="strength")
    told = "".join(f"<h2>strength {name}</h2><pre style='white-space:pre-wrap'>{html.escape(prompt + text)}</pre>"
                   for name, text in texts.items())
    page(written, table.title, "Colour: the change from strength 0, by column. Hover over a cell, or reach it with the "
         "Tab key, to see it.", image(path), cells, listed(table.about), told)
    print(f"drawn: {path}, {written}")


# ---- run -------------------------------------------------------------------------------------------------------------


def refuse(why: str, *names: str):
    """UserError if one of these settings was given, which has no effect."""
    for name in names:
        if name in given:
            raise UserError(f"--{name} has no effect {why}: leave it out")


def strengths_of(text: str) -> list[float]:
    """The numbers between commas, and 0, in order."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [float("nan")]
    if not np.isfinite(found).all():
        raise UserError(f"strengths={text!r}: write numbers with commas, as in --strengths=-1,0,1")
    return sorted({0.0, *found})


def found_direction(model: GPT, enc: Tokenizer) -> mx.array:
    """The direction (C,) between the prompts of the settings."""
    if not -1 <= layer < model.config.n_layer:
        raise UserError(f"layer={layer}: the model has layers 0 to {model.config.n_layer - 1}, and -1 is the embedding")
    if positive:
        texts = ("positive", positive), ("negative", negative)
        both = [[prompt_ids(enc, text, model, name, bos)] for name, text in texts]
    else:
        files = ("positives", positives), ("negatives", negatives)
        both = [read_texts(path, enc, model, name, bos) for name, path in files]
        print(f"direction: from {len(both[1])} negative to {len(both[0])} positive texts")
    return direction_of(model, *both, layer, over, len(enc.start) * bos)


def check_settings():
    """UserError for settings that are wrong, or that have no effect beside others."""
    one, many = (positive, negative), (positives, negatives)
    if over not in ("last", "mean"):
        raise UserError(f"over={over!r} is not one of last, mean")
    if how not in ("add", "remove"):
        raise UserError(f"how={how!r} is not one of add, remove")
    if start < -1 or max_new_tokens < 1 or temperature < 0 or top_k < 0 or not 0 <= seed < 2**63:
        raise UserError("start must be -1 or more, max_new_tokens 1 or more, temperature, top_k and seed 0 or more")
    if words and not words.replace(",", "").strip():
        raise UserError(f"words={words!r}: there is no word; write them with commas, as in --words=socket,server")
    if samples < 0 or max_tokens < 0:
        raise UserError("samples and max_tokens must be 0 or more")
    if not direction and not all(one) and not all(many):
        raise UserError("there is no direction: give --positive=TEXT and --negative=TEXT, files of such texts as "
                        "--positives and --negatives, or --direction=FILE")
    if bool(direction) + any(one) + any(many) > 1:
        raise UserError("give either --direction=FILE, or --positive=TEXT and --negative=TEXT, or --positives=FILE and "
                        "--negatives=FILE")
    texts = "max_new_tokens", "temperature", "top_k", "seed"
    if direction:
        refuse("with --direction, whose file tells it", "layer", "over", "out")
    if how == "remove":
        refuse("with --how=remove", "strength", "strengths", "start", "picture")
    if strengths:
        refuse("with --strengths", "strength")
    if not (words or data):
        refuse("without --words or --data", "strengths", "samples", "max_tokens", "picture", "save")
        if not prompt and out:
            refuse("without --prompt", "how", "strength", "start", *texts)
    elif not words:
        refuse("without --words", "prompt", "samples", "start", *texts)
    elif data:
        refuse("on the text of --data, all of which is changed", "start")
    if data and not words or words and not samples:
        refuse("where no texts are written", *texts)
    if not data:
        refuse("without --data", "max_tokens")


if __name__ == "__main__":
    check_settings()
    table = bool(words or data)
    if table and how == "add":
        picture, written = pictures(picture or f"{checkpoint.removesuffix('.safetensors')}-steer.png")
    inputs = checkpoint, direction, positives, negatives, data
    for name in (out, *((picture, written) if table and how == "add" else ())):
        if name:
            check_output(name, *inputs)
            check_folder(name)
    check_saved(save, *inputs)
    if out:
        check_replaced(out, os.path.basename(__file__))
    model, meta = load_checkpoint(checkpoint)
    if not meta.get("tokenizer"):
        raise UserError(f"{checkpoint} holds no tokenizer to encode a prompt with: give another checkpoint")
    enc = Tokenizer.from_dict(meta["tokenizer"])
    ids = [] if not prompt and not words and (out or data) else prompt_ids(enc, prompt, model, bos=bos)
    known = about(checkpoint, model)
    fingerprint = known["sha256"]
    model.set_dtype(compute_dtype("auto"))
    vector, layer = load_direction(direction, model, fingerprint) if direction else (found_direction(model, enc), layer)
    size = mx.linalg.norm(vector).item()
    check_finite([size])
    beside = ""
    if ids:
        states = states_of(model, ids, layer)[len(enc.start) * bos:]
        check_finite([states.sum().item()])
        beside = f", of the prompt's states {mx.linalg.norm(states, axis=-1).mean().item():.2f} on average"
    print(f"state: {state_name(layer + 1)}; norm of the direction {size:.2f}{beside}")
    if out:
        save_direction(out, vector, layer, over, fingerprint, os.path.basename(__file__), settings)
    begin = len(ids) - 1 if start == -1 else start

    def changing(factor: float) -> Callable:
        if how == "remove":
            return removing(vector)
        return steering(vector, layer, factor, begin) if begin else adding(vector, layer, factor)

    ends = ends_of_text(enc, meta, "none")
    sys.stdout.reconfigure(errors="replace")  # characters that the terminal's encoding lacks become "?"
    if table:
        if how == "remove":
            taps = {"as it is": lambda: no_tap, "removed": partial(changing, 1.0)}
        else:
            taps = {f"{factor:g}": partial(changing, factor) if factor else lambda: no_tap
                    for factor in strengths_of(strengths or str(strength))}
        what = os.path.basename(direction) or f"{short(positive or positives, 40)} - {short(negative or negatives, 40)}"
        known |= {"title": f"{what}, {state_name(layer + 1)}", "direction": what, "layer": layer, "how": how,
                  "prompt": prompt, "words": words, "data": data}
        measure(model, enc, ids, ends, taps, known)
    elif ids:
        compare(model, enc, ids, ends, lambda: changing(strength))
