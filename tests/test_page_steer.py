"""The Steer panel: webgpu/steer.js changes a model while it writes, as steer.py and patching.py do; and the panel as a
user sees it."""
import blas  # noqa: F401  (before mlx)
import browser
import mlx.core as mx
import numpy as np
import pytest
from test_page_model import flavour, in_page

import patching
import steer
from model import generate, no_tap

IDS, OTHER, AT = [*range(7, 37)], [*range(90, 105)], 3  # a prompt, another one, and a position in it


@pytest.fixture(scope="module")
def opened(chromium, server):
    with browser.page(chromium, server) as page:
        yield page


def together(*taps):
    """A tap that calls all of these."""
    def tap(site, layer, x):
        for each in taps:
            x = each(site, layer, x)
        return x
    return tap


# For each change: its lists in the page, and its tap, made of the `state` and the `direction`.
CHANGES = [
    ("[off(model, 1, 'head 1'), off(model, 0, 'mlp')]", lambda model, state, direction: together(
        patching.ablation(model, "head", 1, head=1), patching.ablation(model, "mlp", 0))),
    ("[off(model, 0, 'attn'), off(model, 2, 'block')]", lambda model, state, direction: together(
        patching.ablation(model, "attn", 0), patching.ablation(model, "block", 2))),
    ("[paste(state, { after: 1, first: 5, last: 6 })]", lambda model, state, direction:
        steer.pasting(state, 1, 5, 6)),
    ("[paste(state, { after: 1, first: ids.length })]", lambda model, state, direction:
        steer.pasting(state, 1, len(IDS))),
    ("[add(direction, { after: -1, strength: -0.7, first: ids.length - 1 })]", lambda model, state, direction:
        steer.steering(direction, -1, -0.7, len(IDS) - 1)),
    ("[add(direction, { after: 0, strength: 0.7 }), off(model, 1, 'head 0'), paste(state, { after: 2, first: 20, "
     "last: 29 })]", lambda model, state, direction: together(
        steer.steering(direction, 0, 0.7), patching.ablation(model, "head", 1, head=0),
        steer.pasting(state, 2, 20, 29))),
    ("[add(direction, { after: 1, strength: 0 })]", lambda model, state, direction: no_tap),
]


@pytest.mark.parametrize("name", ["default", "gpt2", "llama", "gemma"])
def test_changed_text(name, opened, server):
    """Each kind of change, and several together: greedy text beyond the context, where its second half is read again,
    and the divergence of each token, are those of model.py with a tap; strength 0 changes nothing."""
    path, model = flavour(server, name)
    found = in_page(opened, path, """
        const { Writer } = await import("/gpt.js");
        const { add, Changes, directionOf, off, paste, stateOf } = await import("/steer.js");
        const state = await stateOf(model, other, 1, AT);
        const direction = await directionOf(model, ids, other, 0, { mean: true, skip: 1 }), texts = [];
        for (const list of [LISTS]) {
            const writer = new Writer(model, new Changes(model, list)), text = [];
            const options = { max_new_tokens: 20, temperature: 0, probabilities: true, writer };
            for await (const { token, divergence, unchanged } of model.generate(ids, options)) {
                text.push([token, divergence, unchanged[0][0]]);
            }
            writer.destroy();
            texts.push(text);
        }
        return texts;""".replace("LISTS", ", ".join(lists for lists, _ in CHANGES)).replace("AT", str(AT)),
        IDS, OTHER, parameters="ids, other")
    state, direction = steer.states_of(model, OTHER, 1)[AT], steer.direction_of(model, IDS, OTHER, 0, "mean", 1)
    n = model.config.block_size - len(IDS) + 1  # tokens before the context is full
    for text, (lists, tap) in zip(found, CHANGES, strict=True):
        tokens, divergences, unchanged = zip(*text, strict=True)
        expected = list(generate(model, IDS, 20, temperature=0, n_vocab=257, tap=tap(model, state, direction)))
        assert list(tokens) == expected, lists
        kl = steer.divergence(model, [*IDS, *tokens[:n]], n, tap(model, state, direction), 257)
        np.testing.assert_allclose(divergences[:n], np.array(kl), rtol=1e-3, atol=1e-5)
        best = mx.argmax(model(mx.array([[*IDS, *tokens[:n - 1]]]))[0, -n:, :257], axis=-1)
        assert list(unchanged[:n]) == best.tolist()
    texts = [[token for token, *_ in text] for text in found]
    assert max(kl for _, kl, _ in found[-1]) < 1e-5 and sum(text != texts[-1] for text in texts) >= 5
