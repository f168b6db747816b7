"""circuit.py: sums of edges in many variants; edges against formulas in float64; planted circuits; pruning against a
matrix inverse; interventions against taps; the page in a browser; bad input."""
import json

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
import pytest
from conftest import run
from mlx.utils import tree_map_with_path
from test_gptq import FLAVOURS, checkpoint

import circuit
import quantized
import sparse
from circuit import Answer, cut_edges, feature_graph, freeze, neurons, part_graph, pruned
from config import UserError
from lora import base_fingerprint
from model import GPT, GPTConfig, load_checkpoint

RNG = np.random.default_rng(4)
IDS = mx.array(RNG.integers(0, 64, 9))
KNOWN = [
    dict(), dict(n_kv_head=2), dict(norm="layer", bias=True, pos="learned", mlp="gelu", qk_norm=False),
    dict(parallel=True, mlp="gelu_tanh", rotary_dim=8, rope_pattern="RN"),
    dict(norm_place="both", mlp="geglu", embed_scale=8.0, attn_scale=0.1, rope_factor=4.0),
    dict(norm_place="after", qk_norm_width=True, mlp="swiglu", out_bias=True),
    dict(alibi=True, sliding_window=4, residual_scale=0.5, logit_scale=0.3),
    dict(sliding_window=3, window_pattern="SL", window_theta=100.0, tie=False, head_bias=True, qkv_bias=True)]


def small(**settings):
    """A model whose biases, norms and lambdas are no longer those of the start."""
    model = GPT(GPTConfig(**dict(block_size=32, vocab_size=64, n_layer=3, n_head=4, n_embd=64) | settings), seed=1)
    model.update(tree_map_with_path(lambda path, p: p + 0.1 * mx.random.normal(
        p.shape, key=mx.random.key(len(path) + ord(path[-8]))), model.parameters()))
    return model.eval()


# ---- sums ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("foil", [5, None])
@pytest.mark.parametrize("settings", KNOWN, ids=str)
def test_sums(settings, foil):
    """The edges into a node and its constant sum to its input, or to its part of the answer. No edge comes from the
    future. The graph of neurons has the same constants and sums as the real model."""
    model, answer = small(**settings), Answer(3, foil, 64)
    f = freeze(model, IDS)
    logits = np.array(model(IDS[None])[0, -1], np.float64)
    whole = logits[3] - (logits.mean() if foil is None else logits[5])
    parts, both = part_graph(f, answer), neurons_of(f, answer, 40)
    for graph in parts, both:
        np.testing.assert_allclose(graph.found, graph.wanted, atol=1e-4, rtol=1e-4)
        assert graph.error() < 1e-5 and graph.nodes[-1].value == pytest.approx(whole, abs=1e-4)
        place = np.array([(node.position, node.layer) for node in graph.nodes])
        to, source = place[graph.column][:, None], place[None]
        wrong = (source[..., 0] > to[..., 0]) | (source[..., 1] > to[..., 1])
        assert np.abs(graph.rows)[wrong].max() == 0
    direct = np.array((parts.extra["vectors"] * f.answer_gradient(answer)[0, -1]).sum(-1))
    last = np.array([node.position == 8 for node in parts.nodes[:-1]])
    np.testing.assert_allclose(parts.kinds["value"][-1, :-1], direct * last, atol=1e-5)  # direct logit attribution
    out = sum(rows.sum(0, dtype=np.float64) for rows in parts.kinds.values())[:-1]
    contributions = [node.value for node in parts.nodes[:-1]]
    np.testing.assert_allclose(out, contributions, atol=1e-4, rtol=1e-4)  # the edges out of a part, too


def neurons_of(f, answer, most):
    return feature_graph(f, answer, [neurons(f, layer) for layer in range(f.model.config.n_layer)], "neuron", most)


def test_packed():
    """A model with packed weights has the graph of the model with the same weights unpacked."""
    dense = small(n_embd=64)
    for block in dense.blocks:
        for part, name in (("mlp", "up"), ("mlp", "down"), ("attn", "v"), ("attn", "out")):
            layer = block[part][name]
            packed = layer.to_quantized(group_size=64, bits=4)
            layer.weight = quantized.dense_weight(packed)
    packed = small(n_embd=64)
    for block in packed.blocks:
        for part, name in (("mlp", "up"), ("mlp", "down"), ("attn", "v"), ("attn", "out")):
            block[part][name] = block[part][name].to_quantized(group_size=64, bits=4)
    for make in part_graph, lambda f, answer: neurons_of(f, answer, 20):
        one, two = (make(freeze(model, IDS), Answer(3, 5, 64)) for model in (dense, packed))
        assert len(one.nodes) == len(two.nodes)
        np.testing.assert_allclose(one.rows, two.rows, atol=2e-4)


def transcoder(layer, seed=0, F=96, C=64, kind="relu", **more):
    rng = np.random.default_rng([seed, layer])
    arrays = (mx.array(rng.standard_normal(shape).astype(np.float32) * size)
              for shape, size in (((F, C), 0.1), ((F,), 0.1), ((F, C), 0.1), ((C,), 0.1)))
    return sparse.Dictionary(kind, more.pop("k", 0), ("mlp_in", layer), ("mlp", layer), *arrays, **more)


@pytest.mark.parametrize("more", [dict(), dict(kind="topk", k=5), dict(kind="batchtopk", threshold=mx.array(0.6)),
                                  dict(kind="jumprelu", threshold=mx.arange(96) / 96)], ids=str)
@pytest.mark.parametrize("settings", [KNOWN[0], KNOWN[3], KNOWN[4], KNOWN[6]], ids=str)
def test_transcoders(settings, more):
    """Sums are exact with transcoders that are no good, thanks to the error nodes; these are what the MLP adds less
    what the transcoder does. The replacement model's KL is that of a model whose MLPs are transcoders from the
    second token on."""
    model, answer = small(**settings), Answer(3, 5, 64)
    f, coders = freeze(model, IDS), [transcoder(layer, **more) for layer in range(3)]
    features = [circuit.features_of(f, layer, each) for layer, each in enumerate(coders)]
    graph = feature_graph(f, answer, features, "feature", 60)
    np.testing.assert_allclose(graph.found, graph.wanted, atol=1e-4, rtol=1e-4)
    trusted = circuit.trust(graph)
    assert trusted["error"] > 0.2 and trusted["replacement"] + trusted["error"] + trusted["unknown"] == pytest.approx(1)
    states = {}
    model(IDS[None], tap=lambda site, layer, x: states.setdefault((site, layer), x))
    for column, node in enumerate(graph.nodes):
        if node.kind in ("feature", "error") and node.layer == 1 and node.position % 3 == 0:
            entered = states["resid", 1][0] + (0 if model.config.parallel else states["attn", 1][0])
            x = model.blocks[1].normed("mlp_norm", entered)
            p = np.array(x[node.position] @ coders[1].encoder.T + coders[1].encoder_bias, np.float64)
            bound = np.sort(p)[-5] if more.get("k") else np.array(more.get("threshold", 0)) + 1e-12
            z = np.where(p >= bound, np.maximum(p, 0), 0)
            if node.kind == "feature":
                assert node.value == pytest.approx(z[node.index], rel=1e-4) and node.value > 0
            else:
                lacks = np.array(states["mlp", 1][0, node.position]) - z @ np.array(coders[1].decoder) - np.array(
                    coders[1].decoder_bias)
                np.testing.assert_allclose(np.array(graph.extra["vectors"][column]), lacks, atol=1e-4)
                assert node.value == pytest.approx(np.linalg.norm(lacks), rel=1e-3)

    def tap(site, layer, x):
        if site in ("resid", "attn"):
            states[site, layer] = x
        if site == "mlp":
            entered = states["resid", layer] + (0 if model.config.parallel else states["attn", layer])
            read = model.blocks[layer].normed("mlp_norm", entered)[:, 1:]  # the first token keeps its MLP
            written = sparse.decode(coders[layer], sparse.encode(coders[layer], read))
            x = mx.concatenate([x[:, :1], written], axis=1)
        return x

    own, other = (np.array(circuit.log_p(model(IDS[None], tap=each)[0]), np.float64)
                  for each in (circuit.no_tap, tap))
    kl = (np.exp(own) * (own - other)).sum(-1)
    assert circuit.divergence(f, coders, 64) == pytest.approx([kl[-1], kl.mean()], rel=1e-3)


def test_transcoder_files(tmp_path):
    """Files are read in any order; what is no transcoder, a second one of a layer, or a missing one is refused."""
    model, paths = small(), []
    for layer in (2, 0, 1):
        paths.append(str(tmp_path / f"{layer}.sae"))
        sparse.save(paths[-1], transcoder(layer, layer), "mine")
    assert [each.reads[1] for each in circuit.read_transcoders(paths, model, "mine")] == [0, 1, 2]
    sparse.save(str(tmp_path / "skip"), transcoder(1, skip=mx.zeros((64, 64))), "mine")
    sparse.save(str(tmp_path / "auto"), transcoder(1)._replace(reads=("mlp", 1)), "mine")
    for some, told in [(paths[:2], "no transcoder of layer 1"), ([*paths, paths[0]], "a second transcoder of layer 2"),
                       ([str(tmp_path / "skip")], "skip connection"), ([str(tmp_path / "auto")], "reads mlp and"),
                       ([str(tmp_path / "none")], "no dictionary at")]:
        with pytest.raises(UserError, match=told):
            circuit.read_transcoders(some, model, "mine")
    with pytest.raises(UserError, match="made for another checkpoint"):
        circuit.read_transcoders(paths, model, "yours")


# ---- formulas --------------------------------------------------------------------------------------------------------


class Numpy:
    """The default architecture in float64, with all that is frozen, written from the formulas."""

    def __init__(self, model, ids):
        self.config, self.w = model.config, dict((name, np.array(p, np.float64)) for name, p in flat(model))
        self.T, self.H, self.D = len(ids), model.config.n_head, model.config.head_dim
        x, self.layers = self.w["embed.weight"][np.array(ids)], []
        for layer in range(model.config.n_layer):
            at = f"blocks.{layer}."
            s1 = self.scale(x)
            n = x * s1 * self.w[f"{at}attn_norm.weight"]
            q, k, v = (self.heads(n @ self.w[f"{at}attn.{name}.weight"].T) for name in "qkv")
            sq, sk = self.scale(q), self.scale(k)
            q = self.rope(q * sq * self.w[f"{at}attn.q_norm.weight"])
            k = self.rope(k * sk * self.w[f"{at}attn.k_norm.weight"])
            scores = np.where(np.tri(self.T), q @ k.swapaxes(1, 2) / self.D**0.5, -np.inf)
            A = np.exp(scores - scores.max(-1, keepdims=True))
            A /= A.sum(-1, keepdims=True)
            z = A @ v
            middle = x + self.out(layer, z)
            s2 = self.scale(middle)
            u = (middle * s2 * self.w[f"{at}mlp_norm.weight"]) @ self.w[f"{at}mlp.up.weight"].T
            h = np.maximum(u, 0) ** 2
            self.layers.append(dict(x=x, s1=s1, q=q, k=k, v=v, sq=sq, sk=sk, A=A, z=z, s2=s2, u=u, h=h, scores=scores))
            x = middle + h @ self.w[f"{at}mlp.down.weight"].T
        self.last, self.final = self.scale(x), x

    def scale(self, x):
        return 1 / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)

    def heads(self, x):
        return x.reshape(self.T, -1, self.D).swapaxes(0, 1)

    def out(self, layer, z):
        return z.swapaxes(0, 1).reshape(self.T, -1) @ self.w[f"blocks.{layer}.attn.out.weight"].T

    def rope(self, x):
        half = self.D // 2
        angle = np.arange(self.T)[:, None] * 10000.0 ** (-np.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], -1)

    def attention(self, layer, x):
        """What attention adds for a change x of the stream, weights and scales being frozen."""
        at, n = self.layers[layer], x * self.layers[layer]["s1"] * self.w[f"blocks.{layer}.attn_norm.weight"]
        return self.out(layer, at["A"] @ self.heads(n @ self.w[f"blocks.{layer}.attn.v.weight"].T))

    def input(self, layer, x):
        return (x * self.layers[layer]["s2"] * self.w[f"blocks.{layer}.mlp_norm.weight"]) @ self.w[
            f"blocks.{layer}.mlp.up.weight"].T

    def answer(self, x, target, foil):
        head = self.w["embed.weight"]
        return ((x * self.last)[-1] * self.w["norm.weight"]) @ (head[target] - head[foil])


def flat(model):
    from mlx.utils import tree_flatten
    return tree_flatten(model.parameters())


def test_neuron_edges():
    """Each edge is what a neuron's output, carried forwards through attention alone, adds to the input of another, or
    to the answer: in float64, forwards, where circuit.py goes backwards."""
    model = small()
    graph, exact = neurons_of(freeze(model, IDS), Answer(3, 5, 64), 60), Numpy(small(), IDS)
    place = {column: row for row, column in enumerate(graph.column)}
    sources = [column for column, node in enumerate(graph.nodes) if node.layer == 0][::97]
    sources += [2, 8, *(column for column, node in enumerate(graph.nodes) if node.layer == 1)][:12:2]
    compared = 0
    for source in sources:
        node = graph.nodes[source]
        x = np.zeros((9, 64))
        if node.kind == "embedding":
            x[node.position] = exact.layers[0]["x"][node.position]
        else:
            assert node.value == pytest.approx(exact.layers[node.layer]["h"][node.position, node.index], rel=1e-3)
            x[node.position] = node.value * exact.w[f"blocks.{node.layer}.mlp.down.weight"][:, node.index]
        for layer in range(node.layer + 1, 3):
            x = x + exact.attention(layer, x)
            inputs = exact.input(layer, x)
            for to in graph.column[1:]:
                other = graph.nodes[to]
                if other.layer == layer:
                    compared += 1
                    assert graph.rows[place[to], source] == pytest.approx(inputs[other.position, other.index], abs=1e-4)
        assert graph.rows[0, source] == pytest.approx(exact.answer(x, 3, 5), abs=1e-4)
    assert compared > 200


def test_head_edges():
    """Edges into the heads of the last layer, by value, key and query, from their definitions in float64."""
    model = small()
    graph, exact = part_graph(freeze(model, IDS), Answer(3, 5, 64)), Numpy(small(), IDS)
    T, H, D, at, last = 9, 4, 16, "blocks.2.", exact.layers[2]
    head = exact.w["embed.weight"]
    G = np.zeros((T, 64))
    G[-1] = (head[3] - head[5]) * exact.w["norm.weight"] * exact.last[-1]
    slope = np.where(last["u"] > 0, last["u"], 0)  # relu squared over its input
    G += ((G @ exact.w[f"{at}mlp.down.weight"]) * slope) @ exact.w[f"{at}mlp.up.weight"] * exact.w[
        f"{at}mlp_norm.weight"] * last["s2"]
    g = exact.heads(G @ exact.w[f"{at}attn.out.weight"])  # (H, T, D)
    names = [(node.kind, node.layer, node.index, node.position) for node in graph.nodes]
    vectors = np.array(graph.extra["vectors"])
    row = {column: r for r, column in enumerate(graph.column)}
    t, found = T - 1, 0
    even = np.tri(T) / np.arange(1, T + 1)[:, None]
    for h in range(H):
        to = names.index(("head", 2, h, t))
        more = last["A"][h, t] - even[t]
        P = (more * (last["v"][h] @ g[h, t])).sum()
        C = (more * last["scores"][h, t]).sum()
        assert graph.wanted[row[to]] == pytest.approx([(g[h, t] * last["z"][h, t]).sum(), P], abs=1e-4)
        for source in range(0, 9 * (1 + 2 * 5), 4):
            s = graph.nodes[source].position
            x = np.zeros((T, 64))
            x[s] = vectors[source]
            n = x * last["s1"] * exact.w[f"{at}attn_norm.weight"]
            q, k, v = (exact.heads(n @ exact.w[f"{at}attn.{name}.weight"].T)[h] for name in "qkv")
            q = exact.rope(q * last["sq"][h] * exact.w[f"{at}attn.q_norm.weight"])
            k = exact.rope(k * last["sk"][h] * exact.w[f"{at}attn.k_norm.weight"])
            expected = {"value": last["A"][h, t, s] * (g[h, t] * v[s]).sum(),
                        "key": P / C / 2 * more[s] * (last["q"][h, t] * k[s]).sum() / D**0.5,
                        "query": P / C / 2 * (more * (last["k"][h] @ q[t])).sum() / D**0.5 if s == t else 0}
            for kind, value in expected.items():
                found += 1
                assert graph.kinds[kind][row[to], source] == pytest.approx(value, abs=1e-4), (kind, names[source])
    assert found > 150


@pytest.mark.parametrize("settings", [KNOWN[1], KNOWN[3], KNOWN[4], KNOWN[6]], ids=str)
def test_edges_by_heads(settings):
    """An edge from another position that has one layer of attention to pass is the sum of what its heads pass. A
    head's part is what the edge loses where the head attends to nothing."""
    model, answer = small(**settings), Answer(3, 5, 64)
    f = freeze(model, IDS)
    features = [neurons(f, layer) for layer in range(3)]
    graph = feature_graph(f, answer, features, "neuron", 60)
    row = {int(column): r for r, column in enumerate(graph.column)}
    between = 1 + bool(model.config.parallel)  # of the same layer's attention, a parallel MLP reads nothing
    pairs = [(source, to) for to in row for source in range(0, len(graph.nodes) - 1, 31)
             if graph.nodes[source].position < graph.nodes[to].position
             and graph.nodes[source].layer < graph.nodes[to].layer and graph.rows[row[to], source]]
    found, near = circuit.heads_between(f, graph, answer, features, pairs), 0
    for of_heads, (source, to) in zip(found, pairs, strict=True):
        layers = range(graph.nodes[source].layer + 1, min(3, graph.nodes[to].layer + 2 - between))
        assert not np.delete(of_heads, layers, axis=0).any()
        if len(layers) == 1:
            near += 1
            assert of_heads.sum() == pytest.approx(graph.rows[row[to], source], abs=1e-4)
    assert near > 20

    # paths through a head: the edges that are gone where its weights are 0
    source, to = max(pairs, key=lambda pair: graph.nodes[pair[1]].layer - graph.nodes[pair[0]].layer)
    layer, head = np.unravel_index(np.abs(found[pairs.index((source, to))]).argmax(), found.shape[1:])
    silent = list(f.weights)
    silent[layer] = mx.where((mx.arange(4) == head)[:, None, None], 0, silent[layer])
    node, end, part = graph.nodes[source], graph.nodes[to], found[pairs.index((source, to)), layer, head]
    other = circuit.Sources(np.array([node.layer]), np.array([node.position]), graph.extra["vectors"][source][None])
    gradient = f.answer_gradient(answer) if end.kind == "answer" else circuit.receiver_gradient(
        f, end.layer, features[end.layer].encoder[end.index][None], np.array([end.position]))
    with_it, without = (circuit.edges_to(each, end.layer, gradient, other)[0, 0]
                        for each in (f, f._replace(weights=silent)))
    assert with_it == pytest.approx(graph.rows[row[to], source], abs=1e-5) and part == pytest.approx(
        with_it - without, abs=1e-5) and abs(part) > 1e-4


# ---- planted circuits ------------------------------------------------------------------------------------------------


def planted(n_layer=3, **weights):
    """A model of zeros but for its embeddings: of 64 dimensions, 0 ... 15 hold the token, 16 ... 31 the position; what
    is written to 48 ... 63 is the answer. weights: matrices by path, "_" for ".", as lists of (row, column, value)."""
    config = GPTConfig(block_size=16, vocab_size=16, n_layer=n_layer, n_head=2, head_dim=64, n_embd=64, pos="learned",
                       qk_norm=False, tie=False, ffn_dim=64)
    model = GPT(config, seed=1).eval()
    eye, blank = np.eye(16), np.zeros((16, 16))
    arrays = {"embed.weight": np.hstack([eye, blank, blank, blank]),
              "pos_embed.weight": np.hstack([blank, eye, blank, blank]),
              "head.weight": np.hstack([blank, blank, blank, eye])}

    def value(path, p):
        if "norm" in path:
            return p
        found = np.zeros(p.shape, np.float32)
        found[...] = arrays.get(path, 0)
        for row, column, number in weights.get(path.removesuffix(".weight").replace(".", "_"), []):
            found[row, column] = number
        return mx.array(found)

    model.update(tree_map_with_path(value, model.parameters()))
    return model


def copied(layer, head, source, target):
    """An attention head that writes what it reads in the dimensions from `source` on to those from `target` on."""
    return {f"blocks_{layer}_attn_v": [(64 * head + i, source + i, 0.2) for i in range(16)],
            f"blocks_{layer}_attn_out": [(target + i, 64 * head + i, 1) for i in range(16)]}


def strongest(graph, row, kind):
    """The node with the largest edge of a kind into the receiver in a row, and its share of all such edges."""
    edges = np.abs(graph.kinds[kind][row])
    return graph.nodes[edges.argmax()][:4], edges.max() / edges.sum()


def test_induction():
    """Head 1 of layer 0 moves each token to the next position, and head 0 of layer 2 attends to what followed an
    earlier copy of the last token. The graph has this path: value, key and query, at the exact positions."""
    previous = {"blocks_0_attn_q": [(64 + i, 16 + i, 12) for i in range(16)],
                "blocks_0_attn_k": [(64 + i + 1, 16 + i, 12) for i in range(15)]}
    matching = {"blocks_2_attn_q": [(i, i, 6) for i in range(16)],
                "blocks_2_attn_k": [(i, 32 + i, 6) for i in range(16)]}
    model = planted(**previous, **copied(0, 1, 0, 32), **matching, **copied(2, 0, 0, 48))
    ids = mx.array([4, 5, 9, 3, 7, 5])
    assert int(model(ids[None])[0, -1].argmax()) == 9
    f, answer = freeze(model, ids), Answer(9, 3, 16)
    graph = part_graph(f, answer)
    np.testing.assert_allclose(graph.found, graph.wanted, atol=1e-4)
    row = {graph.nodes[column][:4]: r for r, column in enumerate(graph.column)}
    into, of = row["head", 2, 5, 0], circuit.influence(circuit.normal(graph.rows), graph.column)
    assert strongest(graph, -1, "value") == (("head", 2, 5, 0), pytest.approx(1, abs=1e-3))
    source, share = strongest(graph, into, "value")
    assert source == ("embedding", -1, 2, -1) and share > 0.9
    source, share = strongest(graph, into, "key")
    assert source == ("head", 0, 2, 1) and share > 0.9
    source, share = strongest(graph, into, "query")
    assert source == ("embedding", -1, 5, -1) and share > 0.9
    source, share = strongest(graph, row["head", 0, 2, 1], "value")
    assert source == ("embedding", -1, 1, -1) and share > 0.9
    kept = [graph.nodes[i][:4] for i in np.flatnonzero(pruned(graph, 0.8, 0.98)[1])]
    assert {node for node in kept if node[0] != "embedding"} == {
        ("head", 2, 5, 0), ("head", 0, 2, 1), ("answer", 3, 5, -1)}
    assert of[[node[:4] for node in graph.nodes].index(("head", 0, 2, 1))] > 0.1

    # each edge of the path, cut in the real model, takes away nearly all of the answer
    number = {node[:4]: i for i, node in enumerate(graph.nodes)}
    path = [(("head", 2, 5, 0), ("answer", 3, 5, -1), "value"), (("embedding", -1, 2, -1), ("head", 2, 5, 0), "value"),
            (("head", 0, 2, 1), ("head", 2, 5, 0), "key"), (("embedding", -1, 5, -1), ("head", 2, 5, 0), "query"),
            (("embedding", -1, 1, -1), ("head", 0, 2, 1), "value"), (("head", 0, 4, 1), ("head", 2, 5, 0), "key")]
    whole = graph.nodes[-1].value
    for source, to, kind in path:
        change = cut_edges(f, answer, graph, [(number[source], number[to], kind)])[0]
        if source[2] == 4:  # not of the path
            assert abs(change.measured) < 0.05 * whole
        else:
            assert change.measured < -0.6 * whole, (source, to, kind)


def test_copying():
    """A head that copies from one position, and a decoy in the layer before that writes where nothing is read."""
    model = planted(**{"blocks_1_attn_q": [(64, 16 + 5, 10)], "blocks_1_attn_k": [(64, 16 + 2, 10)]},
                    **copied(1, 1, 0, 48), **copied(0, 0, 0, 32))
    f, answer = freeze(model, mx.array([1, 2, 3, 4, 5, 6])), Answer(3, None, 16)
    graph = part_graph(f, answer)
    row = {graph.nodes[column][:4]: r for r, column in enumerate(graph.column)}
    assert strongest(graph, -1, "value") == (("head", 1, 5, 1), pytest.approx(1, abs=1e-3))
    source, share = strongest(graph, row["head", 1, 5, 1], "value")
    assert source == ("embedding", -1, 2, -1) and share > 0.9
    assert graph.wanted[row["head", 0, 5, 0], 0] == pytest.approx(0, abs=1e-5)


def one_neuron():
    """Neuron 17 of layer 1 is active for token 9 alone, and raises token 12 by way of head 0 of layer 2, which attends
    to position 2 from position 5."""
    return planted(blocks_1_mlp_up=[(17, 9, 1)], blocks_1_mlp_down=[(32 + 12, 17, 1)],
                   blocks_2_attn_q=[(0, 16 + 5, 10)], blocks_2_attn_k=[(0, 16 + 2, 10)], **copied(2, 0, 32, 48))


def test_one_neuron():
    """The only path to the answer is embedding, neuron, answer, with the exact weights; of the neuron as a feature of a
    transcoder, too."""
    model, ids = one_neuron(), mx.array([4, 5, 9, 3, 7, 5])
    f, answer = freeze(model, ids), Answer(12, 3, 16)
    graph = neurons_of(f, answer, 10)
    assert [node[:4] for node in graph.nodes if node.kind == "neuron"] == [("neuron", 1, 2, 17)]
    neuron = [node.kind for node in graph.nodes].index("neuron")
    assert graph.rows[0, neuron] == pytest.approx(graph.nodes[-1].value, rel=1e-3) and graph.nodes[-1].value > 1
    passed = circuit.heads_between(f, graph, answer, [neurons(f, layer) for layer in range(3)],
                                   [(neuron, len(graph.nodes) - 1)])[0]
    assert passed[2, 0] == pytest.approx(graph.nodes[-1].value, rel=1e-3) and np.abs(passed).sum() == passed[2, 0]
    assert strongest(graph, 1, "")[0] == ("embedding", -1, 2, -1)
    of, kept, _, edges = pruned(graph, 0.8, 0.98)
    assert edges.sum() == 2 and of[neuron] == pytest.approx(1) and of[2] == pytest.approx(1)
    assert circuit.trust(graph)["replacement"] == pytest.approx(1)

    # a transcoder with this feature, exact for the neuron's one activation, among features that are never active
    u = float(features_at(f, 1, 9))
    encoder, decoder = np.zeros((2, 8, 64), np.float32)
    encoder[5, 9], decoder[5, 32 + 12] = 1, u
    coders = [sparse.Dictionary("relu", 0, ("mlp_in", layer), ("mlp", layer), mx.array(encoder * (layer == 1)),
                                mx.zeros(8), mx.array(decoder), mx.zeros(64)) for layer in range(3)]
    graph = feature_graph(f, answer, [circuit.features_of(f, *each) for each in enumerate(coders)], "feature", 10)
    assert [node[:4] for node in graph.nodes if node.kind == "feature"] == [("feature", 1, 2, 5)]
    assert max([node.value for node in graph.nodes if node.kind == "error"], default=0) < 1e-4
    feature = [node.kind for node in graph.nodes].index("feature")
    assert graph.rows[0, feature] == pytest.approx(graph.nodes[-1].value, rel=1e-3)
    assert strongest(graph, 1, "")[0] == ("embedding", -1, 2, -1)
    assert max(circuit.divergence(f, coders, 16)) < 1e-5


def features_at(f, layer, dimension):
    """What the MLP of a layer reads in a dimension, at position 2."""
    return f.model.blocks[layer].normed("mlp_norm", f.middle(layer))[2, dimension]


# ---- pruning ---------------------------------------------------------------------------------------------------------


def test_influence():
    """The power series is (I - A)^-1 - I; the kept nodes are the fewest that have the share of the influence, and the
    scores of a graph without errors are 1."""
    graph = part_graph(freeze(small(), IDS), Answer(3, 5, 64))
    S = len(graph.nodes)
    A = np.zeros((S, S))
    A[graph.column] = np.abs(graph.rows) / np.maximum(np.abs(graph.rows).sum(1, keepdims=True), 1e-10)
    expected = (np.linalg.inv(np.eye(S) - A) - np.eye(S))[-1]
    of, kept, scores, edges = pruned(graph, 0.6, 0.9)
    np.testing.assert_allclose(of, expected, atol=1e-6)
    order = np.argsort(-expected)
    n = np.searchsorted(np.cumsum(expected[order]), 0.6 * expected.sum()) + 1
    most = {*order[:n]} | {*range(9), S - 1}
    assert {*np.flatnonzero(kept)} <= most and len(most) - kept.sum() < 0.2 * len(most)
    B = A * [i in most for i in range(S)] * np.array([i in most for i in range(S)])[:, None]
    B = B / np.maximum(B.sum(1, keepdims=True), 1e-10)
    weight = (np.linalg.inv(np.eye(S) - B))[-1]
    np.testing.assert_allclose(scores, (B * weight[:, None])[graph.column], atol=1e-6)
    assert edges.any(1)[[r for r, column in enumerate(graph.column) if kept[column]]].all()
    trusted = circuit.trust(graph)
    assert trusted["replacement"] == pytest.approx(1) and trusted["completeness"] == pytest.approx(1)
    whole = pruned(graph, 1, 1)
    assert whole[3].sum() == (np.abs(graph.rows) > 0)[:, :].sum() or whole[1].sum() <= S


def test_dead_ends():
    """A feature whose edges out are all cut is cut, and so are the edges into it."""
    rows = np.array([[0, 0.9, 0.1, 0], [0.81, 0, 0.09, 0], [0.5, 0, 0, 0]], np.float32)[:, [0, 2, 1, 3]]
    nodes = [circuit.Node("embedding", -1, 0, -1, 1.0), *(circuit.Node("feature", i, 0, i, 1.0) for i in (0, 1)),
             circuit.Node("answer", 2, 0, -1, 1.0)]
    graph = circuit.Graph(nodes, rows, np.array([3, 2, 1]), {"": rows}, np.zeros((3, 1)), np.zeros((3, 1)))
    of, kept, _, edges = pruned(graph, 0.99, 0.87)
    np.testing.assert_allclose(of, [1, 0.19, 0.9, 0], rtol=1e-6)
    assert kept.tolist() == [True, False, True, True] and np.argwhere(edges).tolist() == [[0, 2], [1, 0]]
    assert pruned(graph, 0.99, 1)[1].all()


# ---- interventions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [dict(), dict(parallel=True, mlp="gelu"), dict(mlp="swiglu", n_kv_head=2)],
                         ids=str)
def test_neurons_changed(settings):
    """What is measured equals a pass in which the neuron itself is changed, at the site "hidden"; in the last layer the
    prediction differs from it by the final norm alone."""
    model, answer = small(**settings), Answer(3, 5, 64)
    f = freeze(model, IDS)
    features = [neurons(f, layer) for layer in range(3)]
    graph = feature_graph(f, answer, features, "neuron", 30)
    columns = [*graph.column[1:6], *[i for i, node in enumerate(graph.nodes) if node[1:3] == (2, 8)][:3]]
    receivers = np.arange(len(graph.column))
    for change, column in zip(circuit.change_features(f, answer, graph, features, columns, receivers, 0.5), columns,
                              strict=True):
        node, inputs = graph.nodes[column], {}

        def tap(site, layer, x, node=node, inputs=inputs):
            if (site, layer) == ("hidden", node.layer):
                x = x * mx.where((mx.arange(x.shape[1]) == node.position)[:, None]
                                 & (mx.arange(x.shape[2]) == node.index), 0.5, 1)
            inputs[site, layer] = x
            return x

        after = float(answer(model(IDS[None], tap=tap)[0, -1]))
        assert change.measured == pytest.approx(after - graph.nodes[-1].value, abs=1e-4)
        for to, _, measured in change.inputs:
            at = graph.nodes[to]
            entered = inputs["resid", at.layer] + (0 if model.config.parallel else inputs["attn", at.layer])
            block = model.blocks[at.layer]
            now = block.mlp.up(block.normed("mlp_norm", entered))[0, at.position, at.index]
            row = np.flatnonzero(graph.column == to)[0]
            assert measured == pytest.approx(float(now) - graph.wanted[row, 0], abs=1e-4)
        if node.layer == 2:
            assert change.predicted == pytest.approx(change.measured, abs=0.02 + 0.2 * abs(change.measured))


def test_predictions():
    """With the edges of all neurons, the predicted changes are those of the frozen model, with the MLPs' slopes, in
    float64: over all paths, for the answer and for the inputs of later neurons."""
    model, answer = small(ffn_dim=16), Answer(3, 5, 64)
    f, exact = freeze(model, IDS), Numpy(small(ffn_dim=16), IDS)
    features = [neurons(f, layer) for layer in range(3)]
    graph = feature_graph(f, answer, features, "neuron", 1000)
    columns = [i for i in graph.column if graph.nodes[i].kind == "neuron" and graph.nodes[i].layer < 2][::9]
    changes = circuit.change_features(f, answer, graph, features, columns, np.arange(len(graph.column)), 0.25)
    compared = 0
    for change, column in zip(changes, columns, strict=True):
        node, inputs, x = graph.nodes[column], {}, np.zeros((9, 64))
        for layer in range(3):
            x = x + exact.attention(layer, x)
            inputs[layer] = exact.input(layer, x)
            down = exact.w[f"blocks.{layer}.mlp.down.weight"]
            x = x + (2 * np.maximum(exact.layers[layer]["u"], 0) * inputs[layer]) @ down.T
            if layer == node.layer:
                x[node.position] += -0.75 * node.value * down[:, node.index]
        assert change.predicted == pytest.approx(exact.answer(x, 3, 5), abs=1e-4)
        for to, predicted, _ in change.inputs:
            at = graph.nodes[to]
            compared += 1
            assert predicted == pytest.approx(inputs[at.layer][at.position, at.index], abs=1e-4)
    assert len(columns) > 5 and compared > 100


@pytest.mark.parametrize("settings", [dict(), dict(norm_place="both", parallel=True, n_kv_head=2),
                                      dict(alibi=True, sliding_window=4, mlp="gelu")], ids=str)
def test_edges_cut(settings):
    """A cut edge equals a pass that computes the receiver's whole layer once more, for a changed stream."""
    model, answer = small(**settings), Answer(3, 5, 64)
    f = freeze(model, IDS)
    graph = part_graph(f, answer)
    number = {node[:4]: i for i, node in enumerate(graph.nodes)}
    cuts = [(("embedding", -1, 7, -1), ("head", 1, 8, 2), kind) for kind in ("value", "key")]
    cuts += [(("head", 0, 8, 1), ("head", 2, 8, 3), "query"), (("MLP", 0, 8, -1), ("MLP", 2, 8, -1), "input"),
             (("head", 1, 8, 0), ("answer", 3, 8, -1), "value")]
    cuts = [(number[source], number[to], kind) for source, to, kind in cuts]
    for change, (source, to, kind) in zip(cut_edges(f, answer, graph, cuts), cuts, strict=True):
        node, vector = graph.nodes[to], graph.extra["vectors"][source]
        s, seen = graph.nodes[source].position, {}

        def first(site, layer, x, node=node, s=s, vector=vector, seen=seen, kind=kind):
            """Of a pass whose stream lacks the vector, the queries, keys or values, or the MLP's output."""
            if (site, layer) == ("resid", node.layer) and kind != "input" or (
                    (site, layer) == ("attn", node.layer) and kind == "input"):
                x = mx.array(x)
                x[0, s] = x[0, s] - vector
            if layer == node.layer:
                seen[site] = x
            return x

        if kind == "input" and model.config.parallel:
            continue  # the MLP does not read what attention adds
        lacking = model(IDS[None], tap=first)
        if node.kind == "answer":
            assert change.measured == pytest.approx(float(answer(lacking[0, -1])) - graph.nodes[-1].value, abs=1e-4)
            continue

        def second(site, layer, x, node=node, seen=seen, kind=kind, s=s):
            if layer == node.layer and site == {"query": "q", "key": "k", "value": "v"}.get(kind):
                each = mx.array(x)
                each[:, :, s] = seen[site][:, :, s]
                return each
            if layer == node.layer and site == ("mlp" if kind == "input" else "heads"):
                seen["result"] = seen["mlp"] if kind == "input" else x
            return x

        def third(site, layer, x, node=node, seen=seen, kind=kind):
            if layer == node.layer and site == ("mlp" if kind == "input" else "heads"):
                x = mx.array(x)
                at = (0, node.position) if kind == "input" else (0, node.index, node.position)
                x[at] = seen["result"][at]
            return x

        model(IDS[None], tap=second)
        after = float(answer(model(IDS[None], tap=third)[0, -1]))
        assert change.measured == pytest.approx(after - graph.nodes[-1].value, abs=1e-4), (node, kind)
        row = np.flatnonzero(graph.column == to)[0]
        assert change.predicted == pytest.approx(-graph.kinds[kind][row, source])


# ---- command line ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [each for each in FLAVOURS if len(each) in (1, 2, 3)], ids=str)
def test_refused(settings):
    """Variants for which the frozen model was not written are refused by name."""
    with pytest.raises(UserError, match=r"circuit\.py does not know \w+="):
        freeze(small(**settings), IDS)


def test_command_line(tmp_path):
    path, _ = checkpoint(tmp_path)
    out = ["--picture=" + str(tmp_path / "c.png"), "--save=" + str(tmp_path / "c.json")]
    asked = [path, "--prompt=abcab", "--target=c", "--foil=b", *out]
    model, _ = load_checkpoint(str(path))
    for layer in range(2):
        sparse.save(str(tmp_path / f"{layer}.sae"), transcoder(layer), base_fingerprint(model))
    of_features = ["--max_nodes=50", "--factor=2", "--interventions=3"]
    for more in ["--interventions=8"], ["--nodes=neurons", *of_features], [f"--transcoders={tmp_path}/?.sae",
                                                                          *of_features]:
        printed = run("circuit.py", *asked, *more).stdout
        assert "Sums of incoming edges are off by" in printed and "correlation" in printed
        saved = json.loads((tmp_path / "c.json").read_text())
        assert saved["format"] == circuit.FORMAT and saved["scores"]["sum_error"] < 1e-4
        assert [node["id"] for node in saved["nodes"]] == [*range(len(saved["nodes"]))]
        assert {"from", "to", "kind", "weight", "score"} == {*saved["edges"][0]} - {"heads"}
        assert ("kl" in saved["scores"]) == ("KL(model" in printed) == any("trans" in name for name in more)
        assert saved["about"]["checkpoint"] == "ckpt.safetensors" and len(saved["interventions"]) == int(more[-1][-1])
    tokens = []
    for bos in "True", "False":
        run("circuit.py", *asked, "--interventions=0", f"--bos={bos}")
        tokens.append(json.loads((tmp_path / "c.json").read_text())["tokens"])
    assert len(tokens[0]) == 6 and [each.partition(" ")[2] for each in tokens[0][1:]] == [
        each.partition(" ")[2] for each in tokens[1]]
    for wrong, told in [
            (["--nodes=heads"], "is not one of parts, neurons, features"), (["--factor=2"], "--factor has no effect"),
            (["--max_nodes=9"], "--max_nodes has no effect"), (["--nodes=features"], "give --transcoders"),
            (["--transcoders=x", "--nodes=parts"], "--transcoders has no effect"), (["--foil=c"], "the same token"),
            (["--prompt="], "give --prompt=TEXT"),
            (["--node_threshold=0"], "must be over 0"), (["--save=" + str(path)], "would overwrite the input"),
            (["--save=c.txt"], "end in .json")]:
        assert told in run("circuit.py", *asked, *wrong, status=2).stderr
    (tmp_path / "mine.json").write_text("{}")
    assert "was not written here" in run("circuit.py", *asked, f"--save={tmp_path}/mine.json", status=2).stderr


@pytest.mark.parametrize("kind", ["parts", "neurons"])
def test_page(kind, chromium, tmp_path):
    """A node's panel has the weights of the saved edges; the arrow keys walk, and Escape goes back."""
    path, _ = checkpoint(tmp_path)
    run("circuit.py", path, "--prompt=abcab", "--target=c", f"--picture={tmp_path}/c.png", f"--save={tmp_path}/c.json",
        f"--nodes={kind}", *["--max_nodes=60"] * (kind == "neurons"))
    graph, problems = json.loads((tmp_path / "c.json").read_text()), []
    opened = chromium.new_page()
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.goto(f"file://{tmp_path}/c.html")
    assert opened.locator("g[role=button]").count() == len(graph["nodes"])
    assert "Choose a node" in opened.inner_text("aside")
    opened.focus("[data-node='0']")
    opened.keyboard.press("Enter")
    into = sorted((edge for edge in graph["edges"] if edge["to"] == 0), key=lambda edge: -abs(edge["weight"]))
    cells = opened.locator("aside table").first.locator("tr").nth(1).locator("td").all_inner_texts()
    assert float(cells[0].replace("\u2212", "-")) == pytest.approx(into[0]["weight"], rel=0.01)
    assert cells[2 if kind == "parts" else 1] == graph["nodes"][into[0]["from"]]["name"]
    opened.keyboard.press("ArrowDown")
    assert opened.get_attribute("g:focus", "data-node") != "0" and opened.locator("g.chosen").count() == 1
    opened.click("aside button >> nth=0")
    assert opened.locator("aside h2").inner_text() in [node["name"] for node in graph["nodes"]]
    opened.keyboard.press("Escape")
    assert "Choose a node" in opened.inner_text("aside")
    opened.close()
    assert not problems


def test_factored_biases():
    """A bias that a layer of low rank holds is no part of what passes through the layer."""
    model = small(bias=True, norm="layer", mlp="gelu")
    for block in model.blocks:
        for name in "v", "out":
            block.attn[name] = quantized.Factored(block.attn[name], 30)
        block.mlp.up = quantized.Factored(block.mlp.up, 30)
        block.mlp.down = quantized.Factored(block.mlp.down, 30)
    f = freeze(model.eval(), IDS)
    for graph in part_graph(f, Answer(3, 5, 64)), neurons_of(f, Answer(3, 5, 64), 40):
        assert graph.error() < 1e-5


def test_neurons_that_are_no_multiples():
    with pytest.raises(UserError, match="does not know mlp='swiglu_clip'"):
        freeze(small(mlp="swiglu_clip"), IDS)
