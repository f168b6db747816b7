"""One planted circuit, a previous-token head and the induction head that reads it, found by every method that looks for
parts of an answer, at the two heads and at the two positions. (runs/induction.py and test_heads.py: the same model by
attention, weights and ablation; test_sae.py: a planted feature.)"""
import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
import pytest
from test_heads import planted

from attribution import attribute, direct
from circuit import Answer, freeze, part_graph
from heads import repeated
from patching import swap
from paths import paths
from runs.induction import cut

LENGTH = 10
FIRST_B, LAST = LENGTH // 2 + 1, LENGTH + LENGTH // 2  # where the pair acts: at the first B, and at the second A
P, I = (0, 1), (2, 0)  # noqa: E741  (layer, head)


@pytest.fixture(scope="module", params=range(3), ids="seed {}".format)
def case(request):
    """The model, a text that ends in the second A, the same text with another token in place of the first A, and B."""
    drawn = repeated(None, 24, LENGTH + 1, 1, request.param)
    texts = np.delete(drawn, [LENGTH, 2 * LENGTH + 1], axis=1)
    clean, corrupt, answers = cut(texts, LENGTH, drawn[:, -1])
    assert clean.shape[1] == LAST + 1 and clean[0, LAST] == clean[0, FIRST_B - 1] != corrupt[0, FIRST_B - 1]
    model = planted()
    measure = lambda logits: logits[..., int(answers[0])] - logits.mean(-1)  # noqa: E731
    return model, mx.array(clean[0]), mx.array(corrupt[0]), int(answers[0]), measure


def largest(values: np.ndarray, n: int) -> list[tuple]:
    return [tuple(map(int, np.unravel_index(i, values.shape))) for i in np.argsort(-values, axis=None)[:n]]


def test_patching(case):
    """Of 96 states of heads, the clean one of P at the first B, or of I at the second A, brings the answer back."""
    model, clean, corrupt, _, measure = case
    low, high = (float(measure(model(idx[None])[0, -1])) for idx in (corrupt, clean))
    back = (np.array(measure(swap(model, clean, corrupt, "heads"))) - low) / (high - low)
    assert {*largest(back, 2)} == {(*P, FIRST_B), (*I, LAST)}
    assert back[*P, FIRST_B] > 0.8 and back[*I, LAST] > 0.8
    back[*P, FIRST_B] = back[*I, LAST] = 0
    assert np.abs(back).max() < 0.1


def test_attribution(case):
    """Attribution patching finds both places, with one derivative and with integrated gradients."""
    model, clean, corrupt, _, measure = case
    for steps in 0, 20:
        found = sorted(attribute(model, clean, corrupt, measure, ["heads"], steps).items())
        assert {*largest(np.array(mx.stack([each for _, each in found])), 2)} == {(*P, FIRST_B), (*I, LAST)}, steps


def test_direct(case):
    """I alone writes the answer to the stream."""
    model, clean, _, answer, _ = case
    found = direct(model, clean, lambda logits: logits[..., answer] - logits.mean(-1))
    assert largest(found.heads, 1) == [I] and found.heads[I] > 0.9 * found.total > 1
    assert np.abs(np.delete(found.heads, 4)).max() < 0.1 * found.total


def test_paths(case):
    """P reaches I's keys at the first B, and I alone the logits, at the second A."""
    model, clean, corrupt, _, measure = case
    low, high = (float(measure(model(idx[None])[0, -1])) for idx in (corrupt, clean))
    for receivers, place in ([(*I, "k")], (*P, FIRST_B)), ([], (*I, LAST)):
        cells = paths(model, clean[None], corrupt[None], receivers, [*range(LAST + 1)], measure=measure)
        lost = (np.array(cells)[..., 0] - high) / (low - high)
        assert largest(lost, 1) == [place] and lost[place] > 0.8
        assert np.abs(np.delete(lost, np.ravel_multi_index(place, lost.shape))).max() < 0.1


def test_graph(case):
    """The largest key edge into I comes from P at the first B, and the largest edge into the answer from I."""
    model, clean, _, answer, _ = case
    graph = part_graph(freeze(model, clean), Answer(answer, None, 24))
    assert graph.error() < 1e-4
    nodes = [(node.kind, node.layer, node.index, node.position) for node in graph.nodes]
    rows = {nodes[column]: row for row, column in enumerate(graph.column)}
    into = graph.kinds["key"][rows["head", *I, LAST]]
    assert nodes[int(np.abs(into).argmax())] == ("head", *P, FIRST_B)
    assert nodes[int(graph.kinds["value"][-1].argmax())] == ("head", *I, LAST)
