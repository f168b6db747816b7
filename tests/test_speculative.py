"""speculative.py: the text is the large model's, token for token at temperature 0, else in distribution, by algebra."""
import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
import pytest
from test_batching import build, prompts_of

from config import UserError
from model import GPT, GPTConfig, generate
from speculative import check_draft, forget, generate_by_draft, kept_share, rest

SETTINGS = {
    "default": {}, "GPT-2": dict(pos="learned", norm="layer", mlp="gelu", bias=True, qk_norm=False),
    "alibi": dict(alibi=True), "diff": dict(diff_attn=True), "experts": dict(n_expert=4, ffn_dim=32),
    "values": dict(value_residual=True, value_embeds=True), "sink logits": dict(sink_logits=True)}


def near(model: GPT, size: float) -> GPT:
    """A draft model that is right at times: the model with noise on its weights."""
    draft, rng = build({name: getattr(model.config, name) for name in vars(GPTConfig())}), np.random.default_rng(2)
    draft.update(model.parameters())
    weight = draft.blocks[0].mlp.down.weight if not model.config.n_expert else draft.blocks[0].attn.out.weight
    noise = mx.array(rng.normal(0, size, weight.shape).astype(np.float32))
    if model.config.n_expert:
        draft.blocks[0].attn.out.weight = weight + noise
    else:
        draft.blocks[0].mlp.down.weight = weight + noise
    return draft


@pytest.mark.parametrize("name, n_draft", [*((name, 3) for name in SETTINGS), ("default", 1), ("default", 7)])
def test_greedy(name, n_draft):
    """The large model's own text, beyond the end of its context; with a draft model that is right at times, never, and
    always."""
    model, prompt = build(SETTINGS[name]), prompts_of([7])[0]
    expected = list(generate(model, prompt, 60, temperature=0))
    other = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=40, block_size=64), seed=9)
    shares = []
    for draft in (near(model, 0.3), other.eval(), model):
        count = {}
        assert list(generate_by_draft(model, draft, prompt, 60, n_draft, temperature=0, count=count)) == expected
        shares.append(count["kept"] / count["drafted"])
    assert shares[2] > 0.99 and shares[0] < 1 and shares[1] < shares[2]


def test_algebra():
    """The probability of each token, from the shares that are kept and what comes in place of the rest, is p: also
    where p or q is 0, and where they are equal."""
    rng = np.random.default_rng(0)
    for case in range(20):
        p, q = (np.float32(rng.dirichlet(np.full(9, 0.4))) for _ in range(2))
        if case % 3 == 1:
            p[:4], q[3:6] = 0, 0
            p, q = p / p.sum(), q / q.sum()
        if case % 3 == 2:
            q = p
        share, left = (np.array(f(mx.array(p), mx.array(q)), dtype=np.float64) for f in (kept_share, rest))
        kept = q * share
        assert np.abs(kept + (1 - kept.sum()) * left / left.sum() - p).max() < 1e-6


def test_sampling():
    """Its draws have the large model's probabilities, with filters: the second of two tokens, given the first."""
    model, prompt = build({}), prompts_of([4])[0]
    draft, settings = near(model, 0.5), dict(temperature=0.8, top_k=6)
    pairs = [tuple(generate_by_draft(model, draft, prompt, 2, 1, seed=seed, **settings)) for seed in range(700)]
    first = max({a for a, _ in pairs}, key=lambda a: sum(a == b for b, _ in pairs))
    from model import filtered
    for given, found in (([], [a for a, _ in pairs]), ([first], [b for a, b in pairs if a == first])):
        p = np.array(mx.softmax(filtered(model(mx.array([prompt + given]))[:, -1], 0.8, 6, 1.0, 0.0)[0]))
        count = np.bincount(found, minlength=40)
        assert not count[p == 0].any()
        assert np.abs(count / len(found) - p).max() < 4 * np.sqrt(0.25 / len(found))


def test_forget():
    """Positions that are forgotten and read again, by the code for one position and by that for several: both see what
    the other one has written."""
    model, ids = build({}), mx.array([prompts_of([20])[0]])
    cache, changed = model.make_cache(), (ids + 1) % 40
    model(ids[:, :5], cache=cache)
    for i in range(5, 9):
        model(changed[:, i:i + 1], cache=cache)
    forget(cache, 7)
    assert cache.offset == 7 and {layer.length for layer in cache.layers} == {7}
    forget(cache, 12)  # more than there is
    assert cache.offset == 7
    model(ids[:, 7:9], cache=cache)
    found = model(ids[:, 9:10], cache=cache)[0, -1]
    whole = mx.concatenate([ids[:, :5], changed[:, 5:7], ids[:, 7:10]], axis=1)
    assert np.abs(np.array(found - model(whole)[0, -1])).max() < 1e-5


def test_settings():
    model, prompt = build({}), prompts_of([4])[0]
    draft = near(model, 0.3)
    assert max(generate_by_draft(model, draft, prompt, 30, temperature=3.0, n_vocab=7)) < 7
    one, two, three = (list(generate_by_draft(model, draft, prompt, 20, seed=seed)) for seed in (1, 1, 2))
    assert one == two != three and len(one) == 20
    assert list(generate_by_draft(model, draft, prompt, 0)) == []
    with pytest.raises(UserError, match="nothing to continue"):
        next(generate_by_draft(model, draft, [], 3))


@pytest.mark.parametrize("settings", [dict(sliding_window=8), dict(mod="topk", mod_every=2)], ids=str)
def test_refused(settings):
    with pytest.raises(UserError, match="windows or Mixture of Depths"):
        check_draft(build(settings), build({}))
    with pytest.raises(UserError, match="one tokenizer"):
        check_draft(build({}), build(dict(vocab_size=50)))
