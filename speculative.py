"""Speculative writing: a small model drafts tokens, and the large one reads them all at once (Leviathan et al. 2023).

    for token in generate_by_draft(model, draft, ids, max_new_tokens=100, n_draft=4): ...

The text is the large model's: at temperature 0 token for token, else in distribution. A draft x of the small model,
which had the probability q(x), is kept with the probability min(1, p(x) / q(x)), where p(x) is the large model's. After
the first one that is not kept, a token is drawn by max(p - q, 0), divided by its sum:

    q(x) min(1, p(x) / q(x)) + (1 - sum_y min(p(y), q(y))) max(p(x) - q(x), 0) / sum_y max(p(y) - q(y), 0) = p(x)

If all are kept, one more token is drawn by p. Reading several tokens takes the large model hardly longer than reading
one, where the time goes into reading its weights.
"""
import sys
from collections.abc import Callable, Iterator

import blas  # noqa: F401  (before mlx)
import mlx.core as mx

from config import UserError
from model import GPT, Cache, KVCache, filtered, no_tap


def check_draft(model: GPT, draft: GPT):
    """UserError for models that cannot write together."""
    for who, each in (("the model", model), ("the draft model", draft)):
        if any(type(layer) is not KVCache for layer in each.make_cache().layers):
            raise UserError(f"{who} has windows or Mixture of Depths, whose cache cannot forget a draft that is not "
                            "kept: write without --draft")
    if model.config.vocab_size != draft.config.vocab_size:
        raise UserError(f"the draft model has {draft.config.vocab_size} tokens, the model {model.config.vocab_size}: "
                        "train both with one tokenizer")


def kept_share(p: mx.array, q: mx.array) -> mx.array:
    """The probability with which a draft of probability q is kept, where the model gives it p."""
    return mx.minimum(1.0, p / mx.maximum(q, 1e-30))


def rest(p: mx.array, q: mx.array) -> mx.array:
    """Numbers proportional to the probabilities of the token that comes in place of a draft: p and q (V,). Where p and
    q are equal, every draft is kept, and the numbers are p."""
    left = mx.maximum(p - q, 0.0)
    return mx.where(left.sum() > 0, left, p)


def forget(cache: Cache, offset: int):
    """Keep the first `offset` tokens of a cache."""
    cache.layers = [*cache.layers]  # a new list, by which cpu_decode.py and gpu_decode.py see the change
    for layer in cache.layers:
        layer.length -= max(0, cache.offset - offset)
    cache.offset = min(cache.offset, offset)


def generate_by_draft(model: GPT, draft: GPT, ids: list[int], max_new_tokens: int, n_draft: int = 4,
                      temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, seed: int = 0,
                      n_vocab: int = 0, cache: Cache | None = None, count: dict | None = None,
                      tap: Callable = no_tap) -> Iterator[int]:
    """Continue token ids (T,), as model.generate() does, with n_draft tokens of `draft` at a time. cache: an empty one
    of model.make_cache(). count: gets how many tokens were "drafted" and "kept". tap: of the model, not of its draft;
    what it does must not depend on which tokens are read at a time."""
    check_draft(model, draft)
    if not len(ids):
        raise UserError("nothing to continue: give at least one token")
    V, room = model.config.vocab_size, min(model.config.block_size, draft.config.block_size)
    caches, key = (cache or model.make_cache(), draft.make_cache()), mx.random.key(seed)
    padding, count = mx.arange(V) >= (n_vocab or V), {} if count is None else count
    count |= {"drafted": 0, "kept": 0}
    text, made = [*ids][-room:], 0

    def read(which: int, tokens: mx.array, n: int) -> mx.array:
        """The last n logits (n, V) after tokens (T,), which continue a model's cache."""
        logits = (model, draft)[which](tokens[None], cache=caches[which], tap=(tap, no_tap)[which])[0, -n:]
        return mx.where(padding, -mx.inf, logits) if n_vocab else logits

    def draws(logits: mx.array) -> mx.array:
        return filtered(logits, temperature, top_k, top_p, min_p)

    while made < max_new_tokens:
        if len(text) > room:
            text = text[-max(1, room // 2):]
            for each in caches:
                each.clear()
        k = min(n_draft, room - len(text), max_new_tokens - made - 1)
        drafts, guesses = [], []
        tokens = mx.array(text[caches[1].offset:], dtype=mx.int32)
        for _ in range(k):
            logits = read(1, tokens, 1)
            if temperature == 0:
                tokens = mx.argmax(logits, axis=-1)
            else:
                key, subkey = mx.random.split(key)
                guesses.append(draws(logits))
                tokens = mx.random.categorical(guesses[-1], key=subkey)
            drafts.append(tokens)
        tokens = mx.concatenate([mx.array(text[caches[0].offset:], dtype=mx.int32), *drafts])
        logits = read(0, tokens, k + 1)
        if temperature == 0:
            best = mx.argmax(logits, axis=-1)
            equal = best[:k] == mx.concatenate(drafts) if k else mx.zeros(0, dtype=mx.bool_)
            n = mx.cumprod(equal.astype(mx.int32)).sum() if k else mx.array(0)
            following = best[n]
        else:
            key, one, two = mx.random.split(key, 3)
            p = mx.softmax(draws(logits), axis=-1)
            n, following = mx.array(0), p[k]
            if k:
                q, at = mx.softmax(mx.concatenate(guesses), axis=-1), mx.concatenate(drafts)[:, None]
                share = kept_share(mx.take_along_axis(p[:k], at, axis=1), mx.take_along_axis(q, at, axis=1))[:, 0]
                n = mx.cumprod((mx.random.uniform(shape=(k,), key=one) < share).astype(mx.int32)).sum()
                following = mx.where(n == k, p[k], rest(p[n], q[mx.minimum(n, k - 1)]))
            following = mx.random.categorical(mx.log(following), key=two)
        mx.eval(n, following, drafts)
        n = n.item()
        count["drafted"] += k
        count["kept"] += n
        new = [*(each.item() for each in drafts[:n]), following.item()]
        for each in caches:
            forget(each, len(text) + n)
        text += new
        made += len(new)
        yield from new


if __name__ == "__main__":
    print("speculative.py has no command of its own: run sample.py --draft=CKPT, which uses it", file=sys.stderr)
    sys.exit(2)
