"""Train linear probes of the residual stream, layer by layer: where can a label of a text be read from the states?

    python probe.py webgpu/english.safetensors --data=agreement.jsonl --out=number.safetensors
    rows: 1,073 (many 537, one 536)
    830 to train on, 243 held out; majority 0.502, with a standard error of 0.032
    control: the labels of all rows, shuffled
    state               train    held out     control   its train selectivity
    embedding           0.576       0.481       0.520       0.585      -0.038
    after layer 0       0.925       0.782       0.499       0.702       0.283
    ...
    after layer 4       1.000       0.984       0.516       0.717       0.468
    best: after layer 4, 0.984
    drawn: webgpu/english-probe.png, webgpu/english-probe.html
    direction: after layer 4, toward one; norm 0.23, cosine with the difference of the means 0.76
    written: number.safetensors

(docs/inside.md has these rows, which took 5 s of a core of an AMD EPYC, 2026-11-28.)

--data has rows with the fields `text` and `label` (.jsonl, .csv, .parquet and others; a label is any text or number). A
probe is a logistic regression (with more than two labels a softmax) from the state of one token to the label: of the
text's last token; with --over=mean from the mean over all tokens; with --over=word from the last token of the last
occurrence of the row's `word` (as a word of its own, if there is one); with --over=position from the token at the row's
`position`, which counts from 0 and includes a token that begins every text. States are standardized by the mean and the
standard deviation of the training rows; the loss is the mean cross-entropy plus l2 / 2 times the squares of the
weights. It is minimized by L-BFGS in float64 until the gradient is below 1e-6, so that the result depends on --seed
alone. A share --held_out of the rows of each label is not trained on; rows with the same `group`, a field that they may
have, stay together. Rows that repeat another one, up to the token that is read, are left out.

For each state it prints accuracies, the shares of rows whose label the probe tells:

    train         on the rows that it was trained on
    held out      on the others
    control       held out, of a probe for control labels (Hewitt and Liang 2019), the mean over --controls of them:
                  with --over=word or --over=position each word, or token, gets a label at random, for all rows that
                  have it, and else the labels of all rows are shuffled
    its train     the same on the rows that it was trained on: 1 where a probe is so rich that it learns any labels
    selectivity   held out less control: how much more than such labels a probe finds in the state

Compare with "majority", the share of held-out rows with the most frequent label. A probe shows that a state holds the
label, not that the model uses it. For that, --out writes a direction, by which steer.py and sample.py steer: from the
other labels to the label --toward, along the normal of the probe of one state; at strength 1 it moves a state as far
along it as the means of the labels are apart. The file has the probes of all states, too: `weights` (n_layer + 1, C, K)
and `biases` (n_layer + 1, K), by which the logits of the labels in the header are state @ weights[i] + biases[i].

A picture and a page show the accuracies over the layers; --save writes them to an .npz file. In Python:

    >>> import numpy as np; from probe import accuracy, fit
    >>> x, labels = np.random.default_rng(0).normal(size=(90, 5)), np.arange(90) % 3
    >>> weights, biases = fit(x, labels, 3, l2=0.001)                       # (5, 3), (3,)
    >>> accuracy(x, labels, weights, biases) > 0.3
    True
"""
import os
import re
from collections import Counter, deque
from typing import NamedTuple

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
from tqdm import tqdm

from config import UserError, check_output, check_replaced, given, overrides
from draw import check_finite, check_folder, grid, image, lines, page, pictures, prompt_ids, state_name
from inside import Table, about, check_saved, listed
from model import GPT, compute_dtype, load_checkpoint
from rows import read_rows
from steering import mean_states, save_direction
from tokenizer import Tokenizer

checkpoint = "out/ckpt.safetensors"  # any checkpoint, quantized or not
# data
data = ""             # a file of rows with the fields text and label
over = "last"         # last | mean | word | position: which token of a text the probe reads
held_out = 0.25       # share of the rows that are not trained on
seed = 1337           # of the choice of these rows, and of the control labels
# probe
l2 = 0.001            # weight of the squares of the weights
controls = 3          # control tasks; 0: none
# direction
out = ""              # write a direction to this file; "": do not
layer = -2            # of it: the layer after which the state is read; -1: the embedding; -2: the best on held-out rows
toward = ""           # the label to which it leads; "": of two labels the second one
# results
picture = ""          # a PNG; "": the name of the checkpoint with -probe.png; a page .html is written beside it
save = ""             # write the accuracies to this .npz file; "": do not

settings = overrides(globals(), "checkpoint")

# ---- logistic regression ---------------------------------------------------------------------------------------------


def fit(x: np.ndarray, labels: np.ndarray, n_labels: int, l2: float, steps: int = 1000,
        memory: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Weights (C, K) and biases (K,) of a softmax regression from x (N, C) to labels (N,), which minimize
    mean_i -log softmax(x_i weights + biases)[label_i] + l2 / 2 |weights|^2. By L-BFGS (Liu and Nocedal 1989)."""
    x, wanted = x.astype(np.float64), np.eye(n_labels)[labels]

    def loss_and_gradient(both):  # (C + 1, K): the biases are the last row
        z = x @ both[:-1] + both[-1]
        z -= z.max(axis=1, keepdims=True)
        total = np.exp(z).sum(axis=1, keepdims=True)
        loss = (np.log(total[:, 0]) - (z * wanted).sum(axis=1)).mean() + l2 / 2 * np.square(both[:-1]).sum()
        dz = (np.exp(z) / total - wanted) / len(x)
        return loss, np.vstack([x.T @ dz + l2 * both[:-1], dz.sum(axis=0)])

    both, pairs = np.zeros((x.shape[1] + 1, n_labels)), deque(maxlen=memory)
    loss, gradient = loss_and_gradient(both)
    for _ in range(steps):
        if np.abs(gradient).max() < 1e-6:
            break
        move, shares = -gradient, []  # times an estimate of the inverse Hessian by the last steps s and changes y
        for s, y in reversed(pairs):
            shares.append((s * move).sum() / (s * y).sum())
            move = move - shares[-1] * y
        if pairs:
            s, y = pairs[-1]
            move = move * (s * y).sum() / (y * y).sum()
        for s, y in pairs:
            move = move + s * (shares.pop() - (y * move).sum() / (s * y).sum())
        slope, step = (move * gradient).sum(), 1.0
        while True:  # halve the step until the loss falls enough
            new = both + step * move
            new_loss, new_gradient = loss_and_gradient(new)
            if new_loss <= loss + 1e-4 * step * slope or step < 1e-9:
                break
            step /= 2
        s, y = new - both, new_gradient - gradient
        if (s * y).sum() <= 0:  # the loss is as low as float64 tells
            break
        pairs.append((s, y))
        both, loss, gradient = new, new_loss, new_gradient
    return both[:-1], both[-1]


def accuracy(x: np.ndarray, labels: np.ndarray, weights: np.ndarray, biases: np.ndarray) -> float:
    """The share of rows x (N, C) whose label has the highest logit."""
    return float((np.argmax(x @ weights + biases, axis=1) == labels).mean())


# ---- rows ------------------------------------------------------------------------------------------------------------


class Example(NamedTuple):
    """The tokens of a text up to the last one that the probe reads, the first one that it reads, the text's label, what
    gets one control label (the word, or the token; None: the row itself), and what is not parted by the split."""
    ids: tuple[int, ...]
    first: int
    label: str
    kind: object
    group: object


def place_of(enc: Tokenizer, ids: list[int], row: dict) -> tuple[int, int, object]:
    """The first position that the probe reads and the one after the last, and what gets one control label."""
    start = len(enc.start)
    if over in ("last", "mean"):
        if len(ids) <= start:
            raise UserError("its text has no token")
        return (start if over == "mean" else len(ids) - 1), len(ids), None
    if over == "position":
        at = row.get("position")
        at = int(at) if isinstance(at, str) and at.strip().isdigit() else at
        if type(at) is not int or not 0 <= at < len(ids):
            raise UserError(f"its position is {at!r}, and not a number from 0 to {len(ids) - 1}")
        return at, at + 1, ids[at]
    word, pieces = row.get("word"), [b""] * start + [enc.decode_bytes([i]) for i in ids[start:]]
    text, low = b"".join(pieces), -1
    if isinstance(word, str) and word:
        whole = [*re.finditer(rb"(?<!\w)" + re.escape(word.encode()) + rb"(?!\w)", text)]
        low = whole[-1].start() if whole else text.rfind(word.encode())  # else a part of a longer word
    if low < 0:
        raise UserError(f"its word is {word!r}, which is not in its text")
    end = int(np.searchsorted(np.cumsum([len(piece) for piece in pieces]), low + len(word.encode()))) + 1
    return end - 1, end, word


def read_examples(path: str, enc: Tokenizer, model: GPT) -> tuple[list[Example], int]:
    """The examples in a file, and how many more rows repeat one of these. UserError tells which row is wrong."""
    found, repeated = {}, 0
    for where, row in read_rows(path):
        try:
            if isinstance(row, ValueError):
                raise UserError(str(row))
            text, label = row.get("text"), row.get("label")
            if not isinstance(text, str) or not text or not isinstance(label, str | int | float) or label == "":
                raise UserError("it needs the fields text and label")
            ids = prompt_ids(enc, text, model, "data")
            first, end, kind = place_of(enc, ids, row)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        key = (*ids[:end], first)
        repeated += key in found
        group = row.get("group")  # without one, each row is a group
        found.setdefault(key, Example(tuple(ids[:end]), first, str(label), kind, key if group is None else str(group)))
    return [*found.values()], repeated


def split(labels: np.ndarray, groups: list, share: float, rng: np.random.Generator) -> np.ndarray:
    """Which rows are held out (N,): of the groups whose first row has a label, this share, but one at least, and never
    all."""
    firsts, out = {}, set()
    for group, label in zip(groups, labels, strict=True):
        firsts.setdefault(group, label)
    for label in np.unique(labels):
        own = [group for group, first in firsts.items() if first == label]
        n = min(max(1, round(share * len(own))), len(own) - 1)
        out |= {own[i] for i in rng.permutation(len(own))[:max(n, 0)]}
    return np.array([group in out for group in groups])


def control_labels(labels: np.ndarray, kinds: list, rng: np.random.Generator) -> np.ndarray:
    """Labels (N,) that say nothing of the rows: those of all rows, shuffled; or for each kind one of them at random."""
    if kinds[0] is None:
        return rng.permutation(labels)
    drawn = {kind: rng.choice(labels) for kind in dict.fromkeys(kinds)}
    return np.array([drawn[kind] for kind in kinds])


# ---- probes ----------------------------------------------------------------------------------------------------------


def probed(x: np.ndarray, labels: np.ndarray, held: np.ndarray, n_labels: int, l2: float) -> tuple:
    """A probe from states x (N, C) to labels (N,), trained on the rows that are not held: its accuracy on these and on
    the held ones, its weights (C, K) and its biases (K,), for states that are not standardized."""
    x = x.astype(np.float64)
    mean, deviation = x[~held].mean(axis=0), x[~held].std(axis=0)
    deviation[deviation < 1e-8 * max(deviation.max(), 1e-30)] = np.inf  # such a dimension gets the weight 0
    weights, biases = fit((x[~held] - mean) / deviation, labels[~held], n_labels, l2)
    weights = weights / deviation[:, None]
    biases = biases - mean @ weights
    return *(accuracy(x[rows], labels[rows], weights, biases) for rows in (~held, held)), weights, biases


def toward_label(x: np.ndarray, ours: np.ndarray, weights: np.ndarray, label: int) -> tuple[np.ndarray, float]:
    """The direction (C,) of a probe, from other labels to this one, as long as the means of training states x (N, C)
    are apart along it; and its cosine with the difference of these means. ours (N,): which rows have the label."""
    normal = weights[:, label] - np.delete(weights, label, axis=1).mean(axis=1)
    unit = normal / max(np.linalg.norm(normal), 1e-30)
    apart = x[ours].mean(axis=0, dtype=np.float64) - x[~ours].mean(axis=0, dtype=np.float64)
    return unit * (unit @ apart), float(unit @ apart / max(np.linalg.norm(apart), 1e-30))


# ---- run -------------------------------------------------------------------------------------------------------------

COLUMNS = ["train", "held out", "control", "its train", "selectivity"]


def check_settings():
    """UserError for settings that are wrong, or that have no effect beside others."""
    if not data:
        raise UserError("there are no rows to train on: give --data=FILE, with the fields text and label")
    if over not in ("last", "mean", "word", "position"):
        raise UserError(f"over={over!r} is not one of last, mean, word, position")
    if not 0 < held_out < 1 or not 0 < l2 < 1e6 or controls < 0 or not 0 <= seed < 2**63:
        raise UserError("held_out must be over 0 and below 1, l2 over 0, controls and seed 0 or more")
    for name in ("layer", "toward"):
        if name in given and not out:
            raise UserError(f"--{name} has no effect without --out: leave it out")


def show(values: np.ndarray, majority: float, known: dict):
    """Draw the accuracies (n_layer + 1, columns), and save them."""
    n = len(values)
    names = [state_name(i) for i in range(n)]
    read = {"last": "the last token", "mean": "the mean over the tokens", "word": "the word's last token",
            "position": "the token at the position"}[over]
    title = f"probes for the label in {os.path.basename(data)}, of {read}"
    curves = {name: (range(-1, n - 1), values[:, i]) for i, name in enumerate(COLUMNS[:2 + (controls > 0)])}
    ticks = {i: str(i) if i >= 0 else "embedding" for i in range(-1, n - 1, max(1, n // 10))}
    path, written = pictures(picture)
    lines(path, [{"y": "accuracy", "curves": curves, "ticks": ticks, "levels": {"majority": majority}}], title,
          "after layer")
    columns = COLUMNS if controls else COLUMNS[:2]
    table = Table(values[:, :len(columns)], names, columns, title, "accuracy", "state", about=known)
    texts = [[f"{value:.3f}" for value in line] for line in table.values]
    hovers = [[f"{row}, {column}" for column in columns] for row in names]
    cells = grid(table.values[::-1], names[::-1], columns, texts[::-1], hovers[::-1], axis="state")
    page(written, title, "Colour: accuracy. control: of control labels; selectivity: held out less control.",
         image(path), cells, listed(known))
    print(f"drawn: {path}, {written}")
    if save:
        table.save(save)


def chosen(path: str, enc: Tokenizer, model: GPT) -> tuple[list[Example], list[str], np.ndarray]:
    """The examples, the names of the labels, and the label of each example (N,). Says how many there are."""
    examples, repeated = read_examples(path, enc, model)
    counts = Counter(example.label for example in examples)
    names, told = sorted(counts), ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))
    if len(names) < 2 or min(counts.values()) < 2:
        raise UserError(f"{path} has these labels: {told or 'none'}: a probe needs two labels, and two rows of each")
    if toward and toward not in names:
        raise UserError(f"toward={toward!r} is no label: choose one of {', '.join(names)}")
    if out and not toward and len(names) > 2:
        raise UserError(f"the rows have {len(names)} labels: choose one by --toward, of {', '.join(names)}")
    print(f"rows: {len(examples):,} ({told})" + (f"; {repeated:,} more repeat others" if repeated else ""))
    return examples, names, np.array([names.index(example.label) for example in examples])


def probes_of(states: np.ndarray, labels: np.ndarray, held: np.ndarray, n_labels: int, others: list) -> tuple:
    """Probes of states (n_layer + 1, N, C) from labels (N,) and from the control labels in `others`: accuracies
    (n_layer + 1, 5), weights (n_layer + 1, C, K) and biases (n_layer + 1, K). Prints the accuracies."""
    values, probes = np.zeros((len(states), len(COLUMNS))), []
    columns = COLUMNS if controls else COLUMNS[:2]
    margin = max(len(state_name(i)) for i in range(len(states)))
    print(" ".join([f"{'state':{margin}}", *(f"{name:>11}" for name in columns)]))
    with tqdm(total=len(states) * (1 + controls), unit=" probes", leave=False, disable=None, dynamic_ncols=True) as bar:
        for i, x in enumerate(states):
            train, test, *probe = probed(x, labels, held, n_labels, l2)
            probes.append(probe)
            bar.update()
            control = np.zeros((controls, 2))
            for row, wanted in zip(control, others, strict=True):
                row[:] = probed(x, wanted, held, n_labels, l2)[:2]
                bar.update()
            its_train, chance = control.mean(axis=0) if controls else (0, 0)
            values[i] = train, test, chance, its_train, test - chance
            bar.clear()
            print(" ".join([f"{state_name(i):{margin}}", *(f"{value:11.3f}" for value in values[i, :len(columns)])]),
                  flush=True)
    return values, np.stack([weights for weights, _ in probes]), np.stack([biases for _, biases in probes])


def run(model: GPT, enc: Tokenizer, known: dict):
    examples, names, labels = chosen(data, enc, model)
    rng, kinds = np.random.default_rng(seed), [example.kind for example in examples]
    held = split(labels, [example.group for example in examples], held_out, rng)
    for side in held, ~held:
        if len({*labels[side]}) < len(names):
            raise UserError("a label is not in both parts of the rows: give more groups of it, or another --seed")
    others = [control_labels(labels, kinds, rng) for _ in range(controls)]
    n, majority = int(held.sum()), np.bincount(labels[held]).max() / held.sum()
    print(f"{len(labels) - n:,} to train on, {n:,} held out; majority {majority:.3f}, with a standard error of "
          f"{(majority * (1 - majority) / n)**0.5:.3f}")
    if controls:
        new = len({kind for kind, is_held in zip(kinds, held, strict=True) if is_held}
                  - {kind for kind, is_held in zip(kinds, held, strict=True) if not is_held})
        print("control: the labels of all rows, shuffled" if kinds[0] is None else
              f"control: a label at random for each of {len({*kinds})} {'words' if over == 'word' else 'tokens'}, "
              f"{new} of which are in held-out rows only")
    states = mean_states(model, [[*example.ids] for example in examples],
                         [(example.first, len(example.ids)) for example in examples])
    check_finite(states)
    values, weights, biases = probes_of(states, labels, held, len(names), others)
    best = int(np.argmax(values[:, 1]))
    print(f"best: {state_name(best)}, {values[best, 1]:.3f}")
    show(values, majority, known | {
        "data": data, "over": over, "rows": len(labels), "held out": n, "labels": names, "majority": majority, "l2": l2,
        "seed": seed})
    if out:
        i, label = best if layer == -2 else layer + 1, names.index(toward) if toward else 1
        vector, cosine = toward_label(states[i][~held], labels[~held] == label, weights[i], label)
        print(f"direction: {state_name(i)}, toward {names[label]}; norm {np.linalg.norm(vector):.2f}, cosine with the "
              f"difference of the means {cosine:.2f}")
        more = {name: mx.array(array.astype(np.float32)) for name, array in (("weights", weights), ("biases", biases))}
        save_direction(out, mx.array(vector.astype(np.float32)), i - 1, "probe", known["sha256"],
                       os.path.basename(__file__), settings, more, labels=names)


if __name__ == "__main__":
    check_settings()
    picture, written = pictures(picture or f"{checkpoint.removesuffix('.safetensors')}-probe.png")
    for name in filter(None, (picture, written, out)):
        check_output(name, checkpoint, data)
        check_folder(name)
    check_saved(save, checkpoint, data)
    if out:
        check_replaced(out, os.path.basename(__file__))
    model, meta = load_checkpoint(checkpoint)
    if not meta.get("tokenizer"):
        raise UserError(f"{checkpoint} holds no tokenizer to encode texts with: give another checkpoint")
    if not -2 <= layer < model.config.n_layer:
        raise UserError(f"layer={layer}: the model has layers 0 to {model.config.n_layer - 1}, and -1 is the embedding")
    known = about(checkpoint, model)
    model.set_dtype(compute_dtype("auto"))
    run(model, Tokenizer.from_dict(meta["tokenizer"]), known)
