"""Many texts at once: a batch in which each row takes the next prompt as soon as its text ends.

    for number, token in generate_many(model, [[5, 9], [7]], max_new_tokens=100, batch_size=8, ends={0}):
        ...                                      # token is None when the text of prompts[number] is over

The keys and values of a row's text end at the last column of the cache that is in use, where the next token comes for
all rows; its prompt is read, with those of other rows that begin with it, into the columns before. Columns that no text
needs any more are dropped.
"""
import sys
from collections.abc import Callable, Iterator

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np

from config import UserError
from model import GPT, PADDING, Cache, KVCache, no_tap, sample_token

SPARE = 256  # columns that no text needs, before they are dropped


class RowsLayer(KVCache):
    """Keys and values of one layer, and the places of the keys (B, S), which `rows` has for all layers."""

    def __init__(self, rows: "Rows"):
        super().__init__()
        self.rows = rows

    def update(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        keys, values, _ = super().update(k, v)
        return keys, values, self.rows.places


class Rows(Cache):
    """A cache whose rows are of different texts. places (B, S): the position in its text of each key, or PADDING where
    a row has none. blocks: those of model.make_cache(). tap: of the model."""

    def __init__(self, blocks: list, n: int, tap: Callable = no_tap):
        self.n, self.tap = n, tap
        super().__init__(blocks)

    def clear(self):
        self.layers, self.offset, self.starts = [RowsLayer(self) for _ in self.blocks], 0, []
        self.places = mx.zeros((self.n, 0), dtype=mx.int32)

    @property
    def columns(self) -> int:
        return self.places.shape[1]

    @property
    def column(self) -> int:
        return self.columns - 1

    def read(self, model: GPT, tokens: mx.array, places: list[list[int]]) -> mx.array:
        """Append T tokens to each row (B, T): the logits after the last one, (B, V)."""
        self.starts = [self.columns - (place if place < PADDING else 0) for place, *_ in places]  # if T = 1
        places, self.offset = mx.array(places, dtype=mx.int32), 0  # the places tell the positions
        self.places = mx.concatenate([self.places, places], axis=1)
        return model(tokens, cache=self, tap=self.tap, places=places, last=True)[:, -1]

    def shift(self, n: int):
        """Drop n columns at the left; or, with n < 0, put -n empty ones there."""
        drop, empty = max(0, n), max(0, -n)

        def moved(x: mx.array) -> mx.array:
            return mx.pad(x[:, :, drop:], ((0, 0), (0, 0), (empty, 0), (0, 0)))

        self.places = mx.pad(self.places[:, drop:], ((0, 0), (empty, 0)), constant_values=PADDING)
        self.layers = [*self.layers]  # a new list: see gpu_decode.py
        for layer in self.layers:
            if layer.keys is not None:  # a layer without a cache of its own has none
                layer.keys, layer.values = moved(layer.keys), moved(layer.values)
            layer.length = max(0, layer.length - n)

    def enter(self, rows: list[int], model: GPT, texts: list[list[int]]) -> mx.array:
        """Read texts into rows, in place of what these hold: the logits after each text, (len(rows), V)."""
        P = max(map(len, texts))
        new = Rows(self.blocks, len(rows), self.tap)
        logits = new.read(model, mx.array([[0] * (P - len(ids)) + ids for ids in texts]),
                          [[PADDING] * (P - len(ids)) + [*range(len(ids))] for ids in texts])
        if self.columns < P:
            self.shift(self.columns - P)
        end, self.layers = self.columns, [*self.layers]  # a new list: see gpu_decode.py
        self.places[mx.array(rows)] = PADDING
        for i, row in enumerate(rows):
            self.places[row, end - P:] = new.places[i]
        for layer, other in zip(self.layers, new.layers, strict=True):
            if other.keys is None:
                continue
            if layer.keys is None:
                layer.keys, layer.values = (mx.zeros((self.n, x.shape[1], end, x.shape[3]), x.dtype)
                                            for x in (other.keys, other.values))
            layer.length = end
            for i, row in enumerate(rows):
                layer.keys[row, :, end - P:end] = other.keys[i, :, :P]
                layer.values[row, :, end - P:end] = other.values[i, :, :P]
        return logits


class OneRow:
    """The same for a batch of one text: the usual cache, for which model.py has the fastest code."""
    columns = 0

    def __init__(self, model: GPT, tap: Callable = no_tap):
        self.cache, self.tap = model.make_cache(), tap

    def read(self, model: GPT, tokens: mx.array, places: list[list[int]]) -> mx.array:
        return model(tokens, cache=self.cache, tap=self.tap, last=True)[:, -1]

    def enter(self, rows: list[int], model: GPT, texts: list[list[int]]) -> mx.array:
        self.cache.clear()
        return self.read(model, mx.array(texts), [])


def check_rows(model: GPT, batch_size: int):
    """UserError for a model whose rows cannot be of different texts."""
    if batch_size == 1:
        return
    if model.config.mod != "none":  # mod
        raise UserError("Mixture of Depths chooses among the tokens of one text: take batch_size=1")  # mod
    if model.config.sinks:  # window
        raise UserError("sinks: a batch has one set of first tokens; take batch_size=1")  # window


def generate_many(model: GPT, prompts: list[list[int]], max_new_tokens: int, batch_size: int = 16, ends=frozenset(),
                  stops: Callable = lambda number, token: False, temperature: float = 1.0, top_k: int = 0,
                  top_p: float = 1.0, min_p: float = 0.0, repetition_penalty: float = 1.0, seed: int = 0,
                  n_vocab: int = 0, tap: Callable = no_tap) -> Iterator:
    """Continue many prompts, batch_size at a time, in their order; yields (number of the prompt, token), and (number,
    None) when its text is over: before a token in `ends`, after one for which stops(number, token) is true, or after
    max_new_tokens. Sampling is that of model.generate(); a text depends on the seed and the number of its prompt, not
    on the other texts. A full context is cut to its second half. A token of V or more: logits are not finite. tap: what
    it does must not depend on which tokens are read at a time."""
    check_rows(model, batch_size)
    if not all(prompts):
        raise UserError("nothing to continue: give each text at least one token")
    V, block_size = model.config.vocab_size, model.config.block_size
    padding, n = mx.arange(V) >= (n_vocab or V), min(batch_size, len(prompts))
    cache = Rows(model.make_cache().blocks, n, tap) if batch_size > 1 else OneRow(model, tap)
    waiting, texts, numbers = iter(enumerate(prompts)), [None] * n, [-1] * n   # of each row; number -1: it is free
    lengths, counts = [0] * n, [0] * n                                        # in the cache; of new tokens
    keys = mx.zeros((n, 2), dtype=mx.uint32)

    tokens = mx.zeros(n, dtype=mx.int32)  # the last one of each row, V where its logits were not finite
    unread = []  # rows, each with its number, whose last token is not in texts yet

    def draw(logits: mx.array, rows: list[int]):
        """Begin to draw a token for each of the rows."""
        nonlocal tokens, unread
        if repetition_penalty != 1:
            seen = mx.zeros(logits.shape, dtype=mx.bool_)
            for i, row in enumerate(rows):
                seen[i, mx.array(texts[row])] = True
            less = mx.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
            logits = mx.where(seen, less, logits)
        if n_vocab:
            logits = mx.where(padding, -mx.inf, logits)
        both = mx.vmap(mx.random.split)(keys[mx.array(rows)])  # a key for each text
        keys[mx.array(rows)] = both[:, 0]
        found = sample_token(logits, both[:, 1], temperature, top_k, top_p, min_p)
        finite = mx.isfinite(mx.take_along_axis(logits, mx.minimum(found, V - 1)[:, None], axis=-1)[:, 0])
        tokens = mx.array(tokens)
        tokens[mx.array(rows)] = mx.where(finite, found, V).astype(mx.int32)
        mx.async_eval(tokens, keys)
        unread = [(row, numbers[row]) for row in rows]

    def read(tokens: mx.array, unread: list[tuple[int, int]]) -> Iterator:
        """Wait for tokens, add them to the texts, and find which texts are over."""
        tokens = tokens.tolist() if unread else []
        for row, number in unread:
            if number != numbers[row]:  # this text was over one token earlier
                continue
            over = tokens[row] in ends or counts[row] == max_new_tokens
            if not over:
                texts[row].append(tokens[row])
                counts[row] += 1
                yield number, tokens[row]
                over = counts[row] == max_new_tokens or stops(number, tokens[row])
            if over:
                yield number, None
                numbers[row] = -1

    free = True  # whether a prompt may be waiting for a free row
    while True:
        begun = {row for row, _ in unread}
        full = [row for row in range(n) if numbers[row] >= 0 and lengths[row] == block_size]
        rows = [row for row in range(n) if numbers[row] >= 0 and counts[row] + (row in begun) < max_new_tokens]
        if unread and (full or not rows or free and min(numbers) < 0 or repetition_penalty != 1):
            yield from read(tokens, unread)
            unread = []
            continue
        for row in (row for row in range(n) if numbers[row] < 0 and free):
            if (following := next(waiting, None)) is None:
                free = False
                break
            numbers[row], prompt = following
            texts[row], counts[row] = [*prompt], 0
            keys[row] = mx.array(np.random.SeedSequence([seed, numbers[row]]).generate_state(2))
            full.append(row)
        if full:  # texts that begin, or whose context is full
            parts = [texts[row][-(block_size if counts[row] == 0 else max(1, block_size // 2)):] for row in full]
            logits = cache.enter(full, model, parts)
            for row, part in zip(full, parts, strict=True):
                lengths[row] = len(part)
            draw(logits, full)
            continue
        if not rows:
            return
        if (spare := cache.columns - max(lengths[row] for row in rows)) >= SPARE:
            cache.shift(spare)
        last = mx.minimum(tokens, V - 1)[:, None]
        places = [[PADDING] for _ in range(n)]
        for row in rows:
            places[row], lengths[row] = [lengths[row]], lengths[row] + 1
        logits = cache.read(model, last, places)
        before = tokens, unread
        draw(logits[mx.array(rows)], rows)
        yield from read(*before)  # while the next tokens are computed


if __name__ == "__main__":
    print("batching.py has no command of its own: run sample.py --prompts=FILE, which uses it", file=sys.stderr)
    sys.exit(2)
