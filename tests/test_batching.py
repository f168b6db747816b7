"""batching.py: each of many texts is the one that model.generate() writes alone."""
import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

import batching
from batching import generate_many
from config import UserError
from model import GPT, GPTConfig, generate

SETTINGS = {
    "default": {}, "GPT-2": dict(pos="learned", norm="layer", mlp="gelu", bias=True, qk_norm=False),
    "alibi": dict(alibi=True), "windows": dict(sliding_window=5, window_pattern="SL"), "diff": dict(diff_attn=True),
    "experts": dict(n_expert=4, ffn_dim=32), "yoco": dict(yoco=True, n_layer=4, sliding_window=6),
    "values": dict(value_residual=True, value_embeds=True), "sink logits": dict(sink_logits=True),
    "Gemma": dict(norm_place="both", mlp="geglu", attn_softcap=3.0, n_kv_head=1)}


def build(settings: dict) -> GPT:
    model = GPT(GPTConfig(**dict(n_layer=2, n_head=2, n_embd=32, vocab_size=40, block_size=32) | settings))
    rng = np.random.default_rng(0)
    model.update(tree_map(lambda p: p + mx.array(rng.normal(0, 0.2, p.shape).astype(np.float32)), model.parameters()))
    model.eval()
    return model


def prompts_of(lengths: list[int]) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 40, n).tolist() for n in lengths]


def written(model: GPT, prompts: list, n: int, **settings) -> list[list[int]]:
    texts, over = [[] for _ in prompts], []
    for number, token in generate_many(model, prompts, n, **settings):
        assert number not in over
        over.append(number) if token is None else texts[number].append(token)
    assert sorted(over) == [*range(len(prompts))]
    return texts


def alone(model: GPT, prompt: list[int], n: int) -> list[int]:
    return list(generate(model, prompt, n, temperature=0))


@pytest.mark.parametrize("name, batch_size", [*((name, 3) for name in SETTINGS), ("default", 1), ("default", 20)])
def test_as_alone(name, batch_size):
    """Prompts of several lengths, more than rows, with end tokens, so that rows are refilled at different times; and
    more tokens than the context holds."""
    model, prompts = build(SETTINGS[name]), prompts_of([5, 1, 9, 30, 2, 7, 16, 3])
    whole = [alone(model, prompt, 40) for prompt in prompts]
    ends = {whole[0][6], whole[3][9], whole[5][2]}
    expected = [text[:next((i for i, token in enumerate(text) if token in ends), 40)] for text in whole]
    assert written(model, prompts, 40, batch_size=batch_size, ends=ends, temperature=0) == expected
    assert len({*map(len, expected)}) > 1


def test_columns_are_dropped(monkeypatch):
    """The cache does not grow with the number of texts."""
    monkeypatch.setattr(batching, "SPARE", 8)
    most, read = [], batching.Rows.read
    monkeypatch.setattr(batching.Rows, "read", lambda self, *a: (read(self, *a), most.append(self.columns))[0])
    model, prompts = build({}), prompts_of([4] * 30)
    expected = [alone(model, prompt, 10) for prompt in prompts]
    assert written(model, prompts, 10, batch_size=2, temperature=0) == expected
    assert max(most) <= 14 + 8


def test_sampling():
    """A text depends on the seed and its number, not on the other texts; filters and penalty act as in generate()."""
    model, prompts = build({}), prompts_of([4, 6, 2, 5])
    settings = dict(temperature=0.9, top_k=9, top_p=0.9, seed=5)
    one, all_ = (written(model, prompts, 12, batch_size=n, **settings) for n in (1, 4))
    assert one == all_ and written(model, prompts[:1] * 2, 12, **settings)[0] == one[0]
    assert len({*map(tuple, written(model, prompts[:1] * 4, 12, **settings))}) == 4
    assert one != written(model, prompts, 12, **settings | dict(seed=6))
    same = prompts_of([5]) * 2
    assert written(model, same, 9, temperature=0, repetition_penalty=1.5)[1] == list(
        generate(model, same[0], 9, temperature=0, repetition_penalty=1.5))
    assert max(map(max, written(model, prompts, 12, temperature=3.0, n_vocab=7))) < 7


def test_distribution():
    """The first tokens of 3,000 texts have the model's probabilities."""
    model, prompt = build({}), prompts_of([4])[0]
    first = [text[0] for text in written(model, [prompt] * 3000, 1, batch_size=1000)]
    p = np.array(mx.softmax(model(mx.array([prompt]))[0, -1]))
    assert np.abs(np.bincount(first, minlength=40) / 3000 - p).max() < 4 * np.sqrt(p.max() / 3000)


@pytest.mark.parametrize("settings, words", [
    (dict(mod="topk", mod_every=2), "Mixture of Depths"), (dict(sliding_window=8, sinks=2), "sinks")])
def test_refused(settings, words):
    with pytest.raises(UserError, match=words):
        next(generate_many(build(settings), [[1]], 3, batch_size=2))


def test_not_finite():
    """A token that a caller can tell from all others."""
    model = build({})
    model.norm.weight = model.norm.weight * mx.nan
    for temperature in (0, 1):
        assert written(model, prompts_of([3, 5]), 2, temperature=temperature, n_vocab=30) == [[40, 40], [40, 40]]


def test_empty():
    assert written(build({}), [], 3) == []
    assert written(build({}), [[1], [2, 3]], 0) == [[], []]
    with pytest.raises(UserError, match="nothing to continue"):
        next(generate_many(build({}), [[1], []], 3))
