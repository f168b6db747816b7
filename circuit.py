"""An attribution graph: which tokens, heads, MLPs or features of a model led to an answer, and through which others.

    clean=$'def __init__(self, name):\\n        self.name ='
    python circuit.py webgpu/demo.safetensors --prompt="$clean" --target=" name" --foil=" value"
    The answer is the logit of ' name' less that of ' value': 5.4322.
    The graph has 38 of 274 nodes and 341 edges. Sums of incoming edges are off by 2e-07 of the largest.
    20 edges were cut in the real model: the correlation of predicted and measured changes of the answer is 0.767.
    influence  part of answer  node                          writes
        0.342          +2.856  layer 4, head 2 at 12 ·=      [name ·name (name .name
    ...
       weight  share  edge                                                 kind
       +2.537  0.325  layer 4, head 2 at 12 ·= → the answer                value
    ...
    python circuit.py webgpu/demo.safetensors --prompt="$clean" --target=" name" --foil=" value" \\
        --transcoders="out/demo-*.sae" --node_threshold=0.5

The answer is the target's logit at the end of the prompt, less the foil's, or less the mean of all. Attention weights
and the scales of the norms are frozen at the values that they have for the prompt. Then all of the model but its MLPs
is linear, and what a node writes to the residual stream reaches another node by a weight that can be computed: the
product of what it writes and the gradient there. The nodes depend on --nodes:

features: of a transcoder for each layer (Dunefsky et al. 2024; sae.py trains them), in place of its MLP, as in Ameisen
    et al. (2025) and circuit-tracer (Hanna et al. 2025). A node is a feature that is active at a position, a token's
    embedding, or an error: what the MLP writes and the transcoder does not. The edges into a feature and a constant,
    from biases, sum to its input, and those into the answer to the answer.
neurons: the MLPs' own neurons as features, without errors. A gate's factor is frozen, like attention's weights. There
    are many of them, so use it for small models and short prompts.
parts: heads and MLPs at each position, where each neuron is a multiple of its input for this prompt. The edges into a
    part (value: into a head; input: into an MLP) and a constant sum to what the part contributes to the answer,
    directly and through later parts. Edges of kinds key and query divide what a head's attention weights add to its
    contribution, beside even weights, by the parts that its keys and its query are made of: half each, in proportion
    to the scores. That is an approximation, since a softmax is not linear. Do not add up the contributions of parts in
    different layers: that of a later part includes what it got from earlier parts.

The sums are checked, and the largest difference is printed. The influence of a node is the sum over all paths from it
to the answer of the products of their edges' shares; a share is an edge's absolute weight over the sum of all edges
into its receiver. Shown are the most influential nodes that have --node_threshold of the influence, and of the edges
between them those that have --edge_threshold of what is left, as in circuit-tracer. The replacement score is the share
of the influence that starts at embeddings, not at errors; completeness is the share of edges that do not come from
errors, over all nodes by their influence; KL compares the model with one whose MLPs are the transcoders, from the
second token on, as they are trained without the first.

Interventions in the real model test the graph, where nothing is frozen. For features and neurons: the activation of one
node is multiplied by --factor, and the changes of the answer and of the inputs of later nodes are compared with what
all paths of the graph predict. For parts: what a sender writes is taken from what one receiver reads, for one use
(path patching), and the change of the answer is compared with the edge's weight.

It prints the strongest nodes and edges, and draws a picture and a page on which one can walk the graph. A node's
`writes` are the tokens whose logits it raises most, `reads` the tokens whose embeddings a feature reads most from. With
features, an edge between positions has the heads that it passes through. --save writes the graph as JSON:

    answer, value; scores, agreement   what is explained; how exact, complete and confirmed the graph is
    tokens, layers, about              the prompt's tokens, the number of layers, what the graph was computed from
    nodes          id, kind, layer (-1: embedding), position, index (of a head or feature, or -1), value (activation; of
                   a part, the contribution; of an error, the length), influence, name, writes; of features also input,
                   constant and reads
    edges          from, to (ids), kind, weight, score (influence that passes through it), heads: [layer, head, part]
    interventions  from, to, kind, predicted and measured change; inputs: changes of other nodes' inputs

In Python:

    >>> from model import load_checkpoint; from circuit import *
    >>> model, meta = load_checkpoint("webgpu/demo.safetensors")
    >>> graph = part_graph(freeze(model, mx.array([5, 17, 2])), Answer(9, 3, 4096))   # target 9, foil 3
    >>> [graph.nodes[i] for i in np.argsort(-influence(normal(graph.rows), graph.column))[:10]]
"""
import glob
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np

import sparse
from circuit_page import drawn, page_of
from config import UserError, check_output, given, overrides
from draw import check_finite, check_folder, labels, pictures, short, write_whole
from frozen import Answer, Frozen, freeze, linear
from inside import log_p, measured, numbered, opened, prompt_of
from model import ACTIVATIONS, GATED, GPT, LayerNorm, attention_weights, no_tap
from tokenizer import Tokenizer

checkpoint = "out/ckpt.safetensors"  # any checkpoint, quantized or not
prompt = ""             # the text to read
target = ""             # the token that should follow it
foil = ""               # a token to compare the target with; "": the mean of all tokens' logits
bos = True              # begin the prompt with the token that begins every text, where the tokenizer has one
# graph
nodes = ""              # parts (heads and MLPs) | neurons | features; "": features with transcoders, else parts
transcoders = ""        # features: a file of sae.py for every layer, as in "out/layer-*.sae"
max_nodes = 1000        # neurons, features: those whose incoming edges are computed
node_threshold = 0.8    # share of the influence that the nodes shown have
edge_threshold = 0.98   # share of the remaining influence that the edges shown have
# interventions
interventions = 20      # the strongest nodes, or edges between parts, that are changed in the real model; 0: none
factor = 0.0            # neurons, features: the factor of a node's activation
# output
picture = ""            # a PNG; "": the name of the checkpoint with -circuit.png; a page .html is written beside it
save = ""               # write the graph to this .json file; "": do not

settings = overrides(globals(), "checkpoint")

# ---- graph -----------------------------------------------------------------------------------------------------------


class Node(NamedTuple):
    """kind: embedding, head, MLP, neuron, feature, error or answer. index: of the head, neuron or feature, else -1.
    value: the activation of a neuron or feature; for a part, what it contributes to the answer."""
    kind: str
    layer: int
    position: int
    index: int
    value: float


@dataclass
class Graph:
    """rows (R, S): the edges into R receivers from all S nodes, of which the last one is the answer; column: which node
    a receiver is; kinds: the rows by kind of edge, where a pair of nodes may have several. wanted (R, sums) is what a
    row's edges and its constant should sum to, found (R, sums) what they sum to."""
    nodes: list[Node]
    rows: np.ndarray
    column: np.ndarray
    kinds: dict[str, np.ndarray]
    wanted: np.ndarray
    found: np.ndarray
    extra: dict = field(default_factory=dict)

    def error(self) -> float:
        """The largest difference of a row's sum from what it should be, over the largest sum."""
        return float(np.abs(self.found - self.wanted).max() / max(1e-9, np.abs(self.wanted).max()))


def normal(rows: np.ndarray) -> np.ndarray:
    """Absolute values over their sum in each row."""
    rows = np.abs(rows)
    return rows / np.maximum(rows.sum(1, keepdims=True), 1e-10)


def influence(shares: np.ndarray, column: np.ndarray) -> np.ndarray:
    """The influence (S,) of nodes on the last one: the sums over all paths to it of the products of their edges'
    shares, e (A + A^2 + ...), from rows `shares` (R, S) of normal() for the nodes `column` (R,). Edges lead from
    earlier nodes to later ones, so that one pass over the receivers, the last one first, adds up all paths."""
    found = np.zeros(shares.shape[1])
    for row in np.argsort(-column):
        weight = found[column[row]] + (column[row] == len(found) - 1)
        if weight:
            found += weight * shares[row]
    return found


def least_kept(scores: np.ndarray, share: float) -> float:
    """The smallest of the largest scores that together have this share of all."""
    ordered = np.sort(scores[scores > 0])[::-1]
    total = np.cumsum(ordered, dtype=np.float64)
    return ordered[min(np.searchsorted(total, share * total[-1]), len(ordered) - 1)] if len(ordered) else 0.0


def pruned(graph: Graph, node_share: float, edge_share: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The influence of nodes (S,), whether each is kept (S,), the score of edges (R, S) and whether each is kept. As in
    circuit-tracer (Hanna et al. 2025): the most influential nodes that have node_share of the influence, then the edges
    that have edge_share of what is left, then only nodes on a path to the answer. Embeddings always stay."""
    column, S = graph.column, len(graph.nodes)
    fixed = np.array([node.kind in ("embedding", "answer") for node in graph.nodes])
    leaf = np.array([node.kind in ("embedding", "error") for node in graph.nodes])
    known = np.zeros(S, bool)
    known[column] = True
    of = influence(normal(graph.rows), column)
    kept = ((of >= least_kept(of, node_share)) & (of > 0) & (known | leaf)) | fixed
    left = normal(graph.rows * kept[column, None] * kept)
    scores = left * (influence(left, column) + (np.arange(S) == S - 1))[column, None]
    edges = (scores >= least_kept(scores, edge_share)) & (scores > 0)
    while True:
        edges &= kept[column, None] & kept
        fed, used = np.zeros(S, bool), edges.any(0)
        fed[column] = edges.any(1)
        fewer = kept & (fixed | used) & (fixed | leaf | fed)
        if (fewer == kept).all():
            return of, kept, scores, edges
        kept = fewer


def trust(graph: Graph) -> dict[str, float]:
    """Replacement score: the influence of embeddings, over that of embeddings, errors and nodes whose incoming edges
    are not known. Completeness: the share of incoming edges that do not come from the latter two, over all nodes by
    their influence. Error and unknown: the shares that the replacement score lacks."""
    shares = normal(graph.rows)
    of, kinds = influence(shares, graph.column), np.array([node.kind for node in graph.nodes])
    known = np.isin(np.arange(len(kinds)), graph.column)
    wrong, unknown = kinds == "error", ~known & ~np.isin(kinds, ("error", "embedding"))
    parts = {"embedding": of[kinds == "embedding"].sum(), "error": of[wrong].sum(), "unknown": of[unknown].sum()}
    total = max(sum(parts.values()), 1e-10)
    weight = (of + (np.arange(len(of)) == len(of) - 1))[graph.column]
    complete = (weight * (1 - shares[:, wrong | unknown].sum(1))).sum() / weight.sum()
    return {"replacement": parts["embedding"] / total, "completeness": complete,
            "error": parts["error"] / total, "unknown": parts["unknown"] / total}


# ---- graph of features or neurons ------------------------------------------------------------------------------------


class Features(NamedTuple):
    """The features of one MLP, or its neurons: directions encoder (F, C) that they read, of the normed stream, with
    bias (F,); decoder (F, C), what they write; constant (C,), what is written beside them; inputs and activations
    (T, F) for the prompt; slopes (T, F) of the activation there; error (T, C), what the MLP adds to the stream beside
    all that. normed: whether what they write still passes the norm after the MLP, where there is one."""
    normed: bool
    encoder: mx.array
    bias: mx.array
    decoder: mx.array
    constant: mx.array
    inputs: mx.array
    activations: mx.array
    slopes: mx.array
    error: mx.array


def neurons(f: Frozen, layer: int) -> Features:
    """The neurons of an MLP as features, without error. A gate's factor is frozen, as attention's weights are."""
    config, mlp, activations = f.model.config, f.model.blocks[layer].mlp, f.states["hidden", layer][0]
    inputs = mlp.up(f.model.blocks[layer].normed("mlp_norm", f.middle(layer)))
    if config.mlp in GATED:
        slope = f.slopes(layer)
    else:
        slope = mx.grad(lambda x: ACTIVATIONS[config.mlp](x).sum())(inputs)
    (F, C), zeros = (config.ffn_dim, config.n_embd), mx.zeros
    return Features(True, linear(mlp.up, mx.eye(C), False).T, mlp.up(zeros((1, C)))[0],
                    linear(mlp.down, mx.eye(F), False), mlp.down(zeros((1, F)))[0], inputs, activations, slope,
                    zeros((len(f.ids), C)))


def read_transcoders(paths: list[str], model: GPT, fingerprint: str) -> list[sparse.Dictionary]:
    """One transcoder for each layer, from files of sae.py. UserError if a layer has none, or two."""
    found = {}
    for path in paths:
        each = sparse.load(path, model, fingerprint)
        layer = each.writes[1]
        if (each.reads, each.writes) != (("mlp_in", layer), ("mlp", layer)):
            raise UserError(f"{path} reads {each.reads[0]} and writes {each.writes[0]}: give transcoders, which read "
                            "mlp_in and write mlp")
        if each.skip is not None:
            raise UserError(f"{path} has a skip connection, which circuit.py does not know: train one without it")
        if layer in found:
            raise UserError(f"{path} is a second transcoder of layer {layer}: give one for each layer")
        found[layer] = each
    missing = [str(layer) for layer in range(model.config.n_layer) if layer not in found]
    if missing:
        raise UserError(f"there is no transcoder of layer {', '.join(missing)}: give one for each layer")
    return [found[layer] for layer in range(model.config.n_layer)]


def features_of(f: Frozen, layer: int, d: sparse.Dictionary) -> Features:
    """The features of a transcoder for the prompt, and its error."""
    x = f.model.blocks[layer].normed("mlp_norm", f.middle(layer))
    activations = sparse.encode(d, x)
    return Features(False, d.encoder, d.encoder_bias, d.decoder, d.decoder_bias, x @ d.encoder.T + d.encoder_bias,
                    activations, (activations > 0).astype(mx.float32),
                    f.states["mlp", layer][0] - sparse.decode(d, activations))


def divergence(f: Frozen, coders: list[sparse.Dictionary], n_vocab: int) -> list[float]:
    """KL(model || model with transcoders in place of its MLPs, from the second token on), in nats: at the last token,
    and the mean over all."""
    own, other = (log_p(f.model(f.ids[None], tap=tap)[0, :, :n_vocab])
                  for tap in (no_tap, sparse.replacing(f.model, coders)))
    kl = (mx.exp(own) * (own - other)).sum(-1)
    return [float(kl[-1]), float(kl.mean())]


def constants(f: Frozen, features: list[Features]) -> tuple[list[mx.array], mx.array]:
    """What is left of the stream without all nodes, from biases: what each MLP reads (T, C), before its norm, and the
    final stream."""
    x, found = mx.zeros((1, len(f.ids), f.model.config.n_embd)), []
    for layer, each in enumerate(features):
        entered, x = x, x + f.attention(layer, x)
        found.append((entered if f.model.config.parallel else x)[0])
        constant = mx.broadcast_to(each.constant, x.shape)
        x = x + (f.added(layer, constant) if each.normed else constant)
    return found, x[0]


def receiver_gradient(f: Frozen, layer: int, encoder: mx.array, positions: np.ndarray) -> mx.array:
    """The gradients (N, T, C) of N features' inputs at these positions with respect to the stream that the MLP reads:
    encoder (N, C)."""
    onto = mx.zeros((len(encoder), len(f.ids), encoder.shape[1]))
    onto[mx.arange(len(encoder)), mx.array(positions)] = encoder
    return mx.vjp(lambda x: f.mlp_input(layer, x), [mx.zeros(onto.shape)], [onto])[1][0]


class Sources(NamedTuple):
    """What nodes write: their layers and positions (S,), and vectors (S, C), in order of layer and position."""
    layer: np.ndarray
    position: np.ndarray
    vectors: mx.array


def edges_to(f: Frozen, layer: int, gradient: mx.array, sources: Sources) -> np.ndarray:
    """The edges (N, S) into N receivers whose gradients (N, T, C) are with respect to the stream that a layer's MLP
    reads: the products with what each node writes."""
    found, T = [], len(f.ids)
    for at, g in f.down_the_stream(layer, gradient):
        begin, end = np.searchsorted(sources.layer, [at, at + 1])
        places = sources.position[begin:end]
        ends = begin + np.searchsorted(places, np.arange(T + 1))
        found.append(mx.concatenate([g[:, t] @ sources.vectors[int(ends[t]):int(ends[t + 1])].T for t in range(T)], 1))
    edges = mx.concatenate(found[::-1], axis=1)
    return np.pad(np.array(edges), ((0, 0), (0, len(sources.layer) - edges.shape[1])))


def feature_graph(f: Frozen, answer: Answer, features: list[Features], kind: str, most: int) -> Graph:
    """The graph of the features of all MLPs (Ameisen et al. 2025). Receivers are the answer and `most` features, which
    are chosen as circuit-tracer does: again and again those with the largest influence in the graph so far."""
    T, model, L = len(f.ids), f.model, f.model.config.n_layer
    nodes = [Node("embedding", -1, t, -1, 1.0) for t in range(T)]
    vectors, inputs, slope = [f.states["resid", 0][0]], [np.zeros(T)], [np.zeros(T)]
    for layer, each in enumerate(features):
        activations, error = np.array(each.activations), np.array(mx.abs(each.error).sum(1)) > 0
        check_finite(activations)
        for t in range(T):
            active = np.flatnonzero(activations[t])
            if len(nodes) + len(active) > 200_000:
                raise UserError(f"more than 200,000 {kind}s are active: give a shorter prompt, or --nodes=parts")
            nodes += [Node(kind, layer, t, int(i), float(activations[t, i])) for i in active]
            at = mx.array(active)
            parts = [each.decoder[at] * each.activations[t][at][:, None]] if len(active) else []
            inputs.append(np.array(each.inputs[t])[active])
            slope.append(np.array(each.slopes[t])[active])
            if error[t]:
                nodes.append(Node("error", layer, t, -1, float(mx.linalg.norm(each.error[t]))))
                parts.append(each.error[t:t + 1])
                inputs.append(np.zeros(1))
                slope.append(np.zeros(1))
            if parts:
                y = mx.concatenate(parts)
                vectors.append(f.added(layer, y, False, mx.full((len(y),), t)) if each.normed else y)
        mx.eval(vectors)
    sources = Sources(np.array([node.layer for node in nodes]), np.array([node.position for node in nodes]),
                      mx.concatenate(vectors))
    index, S = np.array([node.index for node in nodes]), len(nodes) + 1
    inputs, slope = np.concatenate(inputs), np.concatenate(slope)
    rest, final = constants(f, features)
    most = min(most, max(1, 2**28 // S))

    whole = answer(model.unembed(f.states["resid", L][0, -1]))
    row = edges_to(f, L, f.answer_gradient(answer), sources)
    column, rows = [S - 1], [np.pad(row, ((0, 0), (0, 1)))]
    wanted, constant = [float(whole)], [float(answer(f.read(final[-1:]))[0])]
    can = np.array([node.kind == kind for node in nodes])
    while len(column) <= most:
        of = influence(normal(np.concatenate(rows)), np.array(column))[:-1]
        of[column[1:]] = 0
        chosen = np.argsort(-of * can, kind="stable")[:min(most + 1 - len(column), max(64, most // 8))]
        chosen = chosen[(of * can)[chosen] > 1e-6]
        if not len(chosen):
            break
        for layer in np.unique(sources.layer[chosen]):
            here = chosen[sources.layer[chosen] == layer]
            each, step = features[layer], max(1, 2**23 // sources.vectors.shape[1] // T)
            for some in (here[i:i + step] for i in range(0, len(here), step)):
                at, which = sources.position[some], mx.array(index[some])
                gradient = receiver_gradient(f, int(layer), each.encoder[which], at)
                rows.append(np.pad(edges_to(f, int(layer), gradient, sources), ((0, 0), (0, 1))))
                base = f.mlp_input(int(layer), rest[layer][None])[0]
                constant += np.array((base[mx.array(at)] * each.encoder[which]).sum(1) + each.bias[which]).tolist()
                column += some.tolist()
                wanted += inputs[some].tolist()
    rows = np.concatenate(rows)
    found = rows.sum(1, dtype=np.float64) + constant
    nodes.append(Node("answer", L, T - 1, -1, float(whole)))
    return Graph(nodes, rows, np.array(column), {"": rows}, np.array(wanted)[:, None], found[:, None],
                 {"inputs": inputs, "slopes": slope, "vectors": sources.vectors, "constant": np.array(constant)})


def heads_between(f: Frozen, graph: Graph, answer: Answer, features: list[Features],
                  pairs: list[tuple[int, int]]) -> np.ndarray:
    """How much of each edge passes through each head: (N, n_layer, H), for pairs (source, receiver) of nodes. A path
    through two heads counts for both, so that these numbers do not sum to the edge."""
    found, L = np.zeros((len(pairs), f.model.config.n_layer, f.model.config.n_head)), f.model.config.n_layer
    step = max(1, 2**22 // graph.extra["vectors"].shape[1] // len(f.ids))
    for first in range(0, len(pairs), step):
        some = pairs[first:first + step]
        shape = (len(some), len(f.ids), f.model.config.n_embd)
        onto, carried = {}, {}  # gradients of the receivers, and what the sources write, by layer
        for row, (source, to) in enumerate(some):
            node, other = graph.nodes[to], graph.nodes[source]
            if node.kind == "answer":
                gradient = f.answer_gradient(answer)[0]
            else:
                encoder = features[node.layer].encoder[node.index][None]
                gradient = receiver_gradient(f, node.layer, encoder, np.array([node.position]))[0]
            onto.setdefault(node.layer, mx.zeros(shape))[row] = gradient
            carried.setdefault(other.layer + 1, mx.zeros(shape))[row, other.position] = graph.extra["vectors"][source]
        gradients, G = [None] * L, onto.get(L, mx.zeros(shape))
        for layer in range(L - 1, -1, -1):
            early, late = (0, onto.get(layer, 0))[::-1 if f.model.config.parallel else 1]
            gradients[layer] = G + late
            G = f.through(layer, gradients[layer]) + early
        x = mx.zeros(shape)
        for layer in range(L):
            x = x + carried.get(layer, 0)
            z = f.weights[layer] @ f.for_heads(f.values(layer, x, False))
            g = mx.vjp(lambda z, layer=layer: f.joined(layer, z), [z], [gradients[layer]])[1][0]
            found[first:first + step, layer] = np.array((g * z).sum((2, 3)))
            x = x + f.joined(layer, z, False)
    return found


# ---- graph of heads and MLPs -----------------------------------------------------------------------------------------
#
# Here a receiver is a part's contribution F to the answer: the product of what the part writes and the gradient G of
# the answer there. With frozen attention weights, and each neuron a multiple of its input, F is an affine map of what
# the part reads, so that the edges of kind "value" (into a head) or "input" (into an MLP) and a constant sum to F.
#
# Attention weights are not free: a head also needs its keys and queries. P = sum_s (A_ts - U_ts) G v_s is what a head's
# pattern A adds to its contribution, beside even weights U. It is divided in proportion to the pattern's scores,
# C = sum_s (A_ts - U_ts) q_t k_s / sqrt(D): half by what the keys are made of, half by what the query is. The edges of
# kinds "key" and "query" and a constant sum to P. G of earlier parts has their gradient, P / C of C's, too.


def part_names(f: Frozen) -> list[tuple[str, int, int]]:
    """The parts of which the stream is the sum: (kind, layer, head), in order."""
    config = f.model.config
    heads = [[("head", layer, h) for h in range(config.n_head)] + [("MLP", layer, -1)]
             for layer in range(config.n_layer)]
    return [("embedding", -1, -1), *(part for layer in heads for part in layer)]


def part_vectors(f: Frozen) -> tuple[mx.array, mx.array]:
    """What each part writes (P, T, C), and the rest, from biases, at the beginning of each layer (n_layer + 1, T, C),
    and after attention of each layer (n_layer, T, C)."""
    config, T = f.model.config, len(f.ids)
    own, rest, middles = [f.states["resid", 0][0][None]], [mx.zeros((T, config.n_embd))], []
    for layer in range(config.n_layer):
        heads = f.states["heads", layer][0]
        alone = mx.eye(config.n_head)[:, :, None, None] * heads
        own += [f.joined(layer, alone, False)]
        middles.append(rest[-1] + f.joined(layer, mx.zeros(heads.shape)[None])[0])
        down, hidden = f.model.blocks[layer].mlp.down, f.states["hidden", layer]
        own.append(f.added(layer, linear(down, hidden, False), False))
        rest.append(middles[-1] + f.added(layer, down(mx.zeros(hidden.shape)))[0])
    return mx.concatenate(own), mx.stack(rest), mx.stack(middles)


class Pattern(NamedTuple):
    """How heads (H, T) of a layer attend: A - U (H, T, T), frozen queries and keys, and P / C."""
    more: mx.array
    q: mx.array
    k: mx.array
    ratio: mx.array


def pattern_of(f: Frozen, layer: int, gradient: mx.array) -> tuple[Pattern, mx.array]:
    """The pattern of a layer's heads, and P (H, T), for gradients (H, T, D) with respect to the heads' outputs."""
    q, k, v = (f.states[name, layer][0] for name in "qkv")
    seen = f.masks[layer] > -mx.inf
    more = f.weights[layer] - seen / seen.sum(-1, keepdims=True)
    P = (more * (gradient @ f.for_heads(v).swapaxes(1, 2))).sum(-1)
    C = (more * scores_of(f, layer, q, k)).sum(-1)
    return Pattern(more, q, k, mx.where(C < 1e-6, 0, P / mx.where(C < 1e-6, 1, C))), P


def scores_of(f: Frozen, layer: int, q: mx.array, k: mx.array) -> mx.array:
    """Attention's scores (..., H, T, T) of q (..., H, T, D) and k (..., KV, T, D), with ALiBi's distances; 0 for keys
    that are not seen."""
    config, mask = f.model.config, f.masks[layer]
    scale = config.attn_scale or config.head_dim ** -0.5
    return scale * product(f, q, k) + mx.where(mask > -mx.inf, mask, 0)


def product(f: Frozen, q: mx.array, k: mx.array) -> mx.array:
    """q k^T of each head: (..., H, T, D), (..., KV, T, D) -> (..., H, T, T)."""
    return q @ f.for_heads(k).swapaxes(-1, -2)


def into_mlp(f: Frozen, layer: int, own: mx.array, low: mx.array, G: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """The edges (P, T) into an MLP at each position from parts at the same position, own (P, T, C); the constants (T,);
    and the gradient (T, C) with respect to what it reads. low (T, C): what is left of that without parts."""
    slope = f.slopes(layer)
    edges = (G * f.straight_mlp(layer, own, slope, False)).sum(-1)
    constant = (G * f.straight_mlp(layer, low[None], slope)[0]).sum(-1)
    back = mx.vjp(lambda x: f.straight_mlp(layer, x, slope), [mx.zeros((1, *G.shape))], [G[None]])[1][0][0]
    return edges, constant, back


def into_heads(f: Frozen, layer: int, own: mx.array, low: mx.array, G: mx.array) -> tuple[dict, tuple, tuple, mx.array]:
    """The edges into a layer's heads by kind, (H, T, P, T), from parts own (P, T, C); F and P (H, T); what the edges
    and the constants sum to, for both; and the gradient (T, C) of the sum of P with respect to what keys and queries
    read. low (T, C): what is left of the stream without parts."""
    config, T, heads = f.model.config, len(f.ids), f.states["heads", layer]
    scale = config.attn_scale or config.head_dim ** -0.5
    g = mx.vjp(lambda z: f.joined(layer, z), [heads], [G[None]])[1][0][0]  # (H, T, D)
    v = f.for_heads(f.values(layer, own, False))
    by_value = f.weights[layer][:, :, None] * mx.einsum("htd,phsd->htps", g, v)
    rest_v = f.weights[layer] @ f.for_heads(f.values(layer, low[None])[0])
    F = (g * heads[0]).sum(-1)

    pattern, P = pattern_of(f, layer, g)
    half = pattern.ratio[..., None] * 0.5 * scale
    q, k = f.turned(layer, "q", own, False), f.for_heads(f.turned(layer, "k", own, False))
    rest_q, rest_k = (f.turned(layer, name, low[None])[0] for name in "qk")
    by_key = (half * pattern.more)[:, :, None] * mx.einsum("htd,phsd->htps", pattern.q, k)
    by_query = half * mx.einsum("phtd,htd->htp", q, pattern.more @ f.for_heads(pattern.k))
    bias = mx.where(f.masks[layer] > -mx.inf, f.masks[layer], 0)
    rest_scores = product(f, rest_q, pattern.k) + product(f, pattern.q, rest_k) + 2 / scale * bias
    constant = half[..., 0] * (pattern.more * rest_scores).sum(-1)
    sums = by_value.sum((2, 3)) + (g * rest_v).sum(-1), by_key.sum((2, 3)) + by_query.sum(2) + constant

    def both_halves(x):  # of P, as functions of what keys and queries read
        scores = product(f, f.turned(layer, "q", x), pattern.k) + product(f, pattern.q, f.turned(layer, "k", x))
        return (half * pattern.more * scores).sum()

    edges = {"value": by_value, "key": by_key, "query": by_query[..., None] * mx.eye(T)[:, None]}
    return edges, (F, P), sums, mx.grad(both_halves)(mx.zeros((1, *G.shape)))[0]


def part_graph(f: Frozen, answer: Answer) -> Graph:
    """The graph of all heads and MLPs at all positions."""
    config, T, model = f.model.config, len(f.ids), f.model
    names, L, H = part_names(f), config.n_layer, config.n_head
    S = len(names) * T + 1
    if S > 8000:
        raise UserError(f"heads and MLPs at {T} positions are {S:,} nodes, 8,000 are the most: give a shorter prompt")
    own, rest, middles = part_vectors(f)
    kinds = {kind: np.zeros((S - T, S), np.float32) for kind in ("value", "key", "query", "input")}
    wanted, found = np.zeros((S - T, 2)), np.zeros((S - T, 2))

    whole, G = float(answer(model.unembed(f.states["resid", L][0, -1]))), f.answer_gradient(answer)[0]
    kinds["value"][-1, :-1] = np.array((own * G).sum(-1)).reshape(-1)
    wanted[-1, 0] = whole
    found[-1, 0] = kinds["value"][-1].sum(dtype=np.float64) + float(answer(f.read(rest[-1][-1:]))[0])
    for layer in range(L - 1, -1, -1):
        heads = 1 + layer * (H + 1)  # the first head among the parts, and the number of parts before it
        n = heads if config.parallel else heads + H
        edges, constant, back = into_mlp(f, layer, own[:n], rest[layer] if config.parallel else middles[layer], G)
        rows = slice((heads + H - 1) * T, (heads + H) * T)  # embeddings have no rows
        kinds["input"][rows, :n * T] = np.array(edges.T[:, :, None] * mx.eye(T)[:, None]).reshape(T, -1)
        wanted[rows, 0] = np.array((G * own[heads + H]).sum(-1))
        found[rows, 0] = np.array(edges.sum(0) + constant)
        if not config.parallel:
            G = G + back
        edges, contributions, sums, pattern_back = into_heads(f, layer, own[:heads], rest[layer], G)
        rows = slice((heads - 1) * T, (heads - 1 + H) * T)
        for kind, each in edges.items():
            kinds[kind][rows, :heads * T] = np.array(each).reshape(H * T, -1)
        wanted[rows], found[rows] = (np.stack([np.array(x).reshape(-1) for x in two], 1)
                                     for two in (contributions, sums))
        G = f.through(layer, G[None])[0] + pattern_back + (back if config.parallel else 0)
    value = [*np.array((G * own[0]).sum(-1)), *wanted[:-1, 0], whole]
    nodes = [Node(kind, layer, t, h, 0.0) for kind, layer, h in names for t in range(T)]
    nodes = [node._replace(value=float(x)) for node, x in zip([*nodes, Node("answer", L, T - 1, -1, 0)], value,
                                                              strict=True)]
    return Graph(nodes, sum(np.abs(each) for each in kinds.values()), np.arange(T, S), kinds, wanted, found,
                 {"vectors": own.reshape(-1, own.shape[-1])})


# ---- interventions ---------------------------------------------------------------------------------------------------


class Change(NamedTuple):
    """An intervention in the real model: what the graph predicts, and what is measured, for the answer, and for the
    inputs of features: (column, predicted, measured)."""
    source: int
    to: int
    kind: str
    predicted: float
    measured: float
    inputs: list[tuple[int, float, float]]


def run(f: Frozen, n: int, change: Callable, answer: Answer) -> tuple[np.ndarray, dict]:
    """n copies of the prompt in the real model, with change(site, layer, x) as its tap: the answers (n,), and the
    streams and attention's outputs."""
    found = {}

    def tap(site, layer, x):
        x = change(site, layer, x)
        if site in ("resid", "attn"):
            found[site, layer] = x
        return x

    final = f.model.residual(mx.broadcast_to(f.ids, (n, len(f.ids))), tap=tap)
    return np.array(answer(f.model.unembed(final[:, -1]))), found


def change_features(f: Frozen, answer: Answer, graph: Graph, features: list[Features], columns: list[int],
                    receivers: np.ndarray, factor: float) -> list[Change]:
    """Multiply the activation of one feature after the other by a factor: what its MLP adds gets the change times the
    decoder's row. The prediction follows all paths in the graph, with the slopes of the receivers' activations.
    receivers: rows whose inputs are compared."""
    nodes, n, vectors = graph.nodes, len(columns), graph.extra["vectors"]
    added_to = {}
    for row, source in enumerate(columns):
        node = nodes[source]
        delta = added_to.setdefault(node.layer, np.zeros((n + 1, len(f.ids), vectors.shape[1]), np.float32))
        delta[row, node.position] = (factor - 1) * np.array(vectors[source])
    added_to = {layer: mx.array(delta) for layer, delta in added_to.items()}

    def tap(site, layer, x):
        return x + added_to[layer] if site == "mlp" and layer in added_to else x

    answers, states = run(f, n + 1, tap, answer)
    layers = np.array([node.layer for node in nodes])
    share = np.zeros((len(nodes), n))  # relative changes of what nodes write
    share[columns, np.arange(n)] = factor - 1
    change = np.zeros((len(graph.column), n))
    value = np.array([node.value for node in nodes])
    for layer in range(f.model.config.n_layer + 1):
        rows = np.flatnonzero(layers[graph.column] == layer)
        at = graph.column[rows]
        change[rows] = graph.rows[rows] @ share
        if layer < f.model.config.n_layer:
            share[at] += (graph.extra["slopes"][at] / value[at])[:, None] * change[rows]
    measured = np.zeros_like(change)
    for layer in np.unique(layers[graph.column[receivers]]):
        if layer == f.model.config.n_layer:
            continue
        rows = receivers[layers[graph.column[receivers]] == layer]
        x = states["resid", layer] + (0 if f.model.config.parallel else states["attn", layer])
        x = f.model.blocks[layer].normed("mlp_norm", x)
        at = mx.array([nodes[column].position for column in graph.column[rows]])
        which = mx.array([nodes[column].index for column in graph.column[rows]])
        inputs = np.array((x[:, at] * features[layer].encoder[which]).sum(-1))
        measured[rows] = (inputs[:-1] - inputs[-1]).T
    found = []
    for row, source in enumerate(columns):
        below = [r for r in receivers if r and layers[graph.column[r]] > layers[source] and (change[r, row] != 0)]
        inputs = [(int(graph.column[r]), float(change[r, row]), float(measured[r, row])) for r in below]
        found.append(Change(source, len(nodes) - 1, "", float(change[0, row]),
                            float(answers[row] - answers[-1]), inputs))
    return found


def cut_edges(f: Frozen, answer: Answer, graph: Graph, edges: list[tuple[int, int, str]]) -> list[Change]:
    """Take what a part writes from what one receiver reads, at one position and for one use (path patching), for edges
    (source, receiver, kind); the receiver then computes with its own norm, softmax and activation, and so do all later
    layers. The prediction is that the edge's weight vanishes from the answer."""
    config, states = f.model.config, f.states
    replaced, direct = [], {}
    shared = config.n_head // config.n_kv_head
    for source, to, kind in edges:
        sender, node = graph.nodes[source], graph.nodes[to]
        vector, s = graph.extra["vectors"][source], sender.position
        block, t = f.model.blocks[min(node.layer, config.n_layer - 1)], node.position
        if node.kind == "answer":
            direct[len(replaced)] = answer(f.model.unembed(states["resid", config.n_layer][0, s] - vector))
            replaced.append(None)
        elif node.kind == "MLP":
            x = block.normed("mlp_norm", (f.middle(node.layer)[s] - vector)[None, None])
            y = block.scaled(block.normed("mlp_post_norm", block.mlp(x, lambda site, layer, x: x)))
            replaced.append(("mlp", node.layer, (t,), y[0, 0]))
        else:
            x = block.normed("attn_norm", (states["resid", node.layer][0, s] - vector)[None, None])
            q, k, v = (mx.array(states[name, node.layer]) for name in "qkv")
            if kind == "value":
                v[:, :, s] = block.attn.v(x).reshape(1, config.n_kv_head, -1)
            elif kind == "key":
                k[:, :, s] = block.attn.turned("k", x, s)[:, :, 0]
            else:
                q[:, :, s] = block.attn.turned("q", x, s)[:, :, 0]
            weights = attention_weights(config, q, k, f.masks[node.layer][None])[0, node.index, t]
            replaced.append(("heads", node.layer, (node.index, t), weights @ v[0, node.index // shared]))

    def tap(site, layer, x):
        for row, change in enumerate(replaced):
            if change and change[:2] == (site, layer):
                x = mx.array(x)
                x[(row, *change[2])] = change[3]
        return x

    answers, _ = run(f, len(edges) + 1, tap, answer)
    found = []
    for row, (source, to, kind) in enumerate(edges):
        after = float(direct[row]) if row in direct else answers[row]
        weight = graph.kinds[kind][np.flatnonzero(graph.column == to)[0], source]
        found.append(Change(source, to, kind, -float(weight), float(after - answers[-1]), []))
    return found


def agreement(changes: list[Change]) -> dict[str, float | None]:
    """The correlations of predictions with measurements: of the answer, and of features' inputs."""
    def correlation(pairs):
        a, b = np.array(pairs, np.float64).reshape(-1, 2).T
        return float(np.corrcoef(a, b)[0, 1]) if len(a) > 2 and a.std() and b.std() else None

    return {"answer": correlation([(c.predicted, c.measured) for c in changes]),
            "inputs": correlation([pair[1:] for c in changes for pair in c.inputs])}


# ---- names -----------------------------------------------------------------------------------------------------------


def name_of(node: Node, tokens: list[str], answer: str = "the answer") -> str:
    if node.kind == "answer":
        return answer
    part = node.kind if node.layer < 0 else f"layer {node.layer}'s {node.kind}" if node.index < 0 else (
        f"layer {node.layer}, {node.kind} {node.index}")
    return f"{part} at {tokens[node.position]}"


def words(enc: Tokenizer, scores: np.ndarray, n: int = 6) -> list[list[str]]:
    """The tokens of the n largest scores in each row (N, V), where they are above 0."""
    best = np.argsort(-scores, axis=1)[:, :n]
    return [labels(enc, [int(i) for i in row if each[i] > 0]) for row, each in zip(best, scores, strict=True)]


def written(f: Frozen, enc: Tokenizer, vectors: mx.array) -> list[list[str]]:
    """The tokens whose logits vectors (N, C) in the stream raise most: by the unembedding, without the norm's scale."""
    norm = f.model.norm
    if isinstance(norm, LayerNorm):
        vectors = vectors - vectors.mean(-1, keepdims=True)
    logits = f.model.project(mx.concatenate([mx.zeros((1, vectors.shape[1])), vectors * norm.weight]))
    return words(enc, np.array(logits[1:] - logits[:1])[:, :enc.n_vocab])


def wanted_tokens(f: Frozen, enc: Tokenizer, layer: int, encoder: mx.array) -> list[list[str]]:
    """The tokens whose embeddings, normed as the MLP's input is, lie most in the directions encoder (N, C)."""
    embedded = f.model.embed(mx.arange(enc.n_vocab))
    return words(enc, np.array(encoder @ f.model.blocks[layer].normed("mlp_norm", embedded).T))


# ---- result ----------------------------------------------------------------------------------------------------------


def result_of(f: Frozen, enc: Tokenizer, answer: Answer, graph: Graph, cut: tuple, changes: list[Change],
              features: list[Features]) -> dict:
    """The pruned graph as --save writes it: see the head of this file. cut: from pruned()."""
    of, kept, scores, edges = cut
    columns = [i for i in np.argsort(-of, kind="stable").tolist() if kept[i]]
    columns.sort(key=lambda i: i != len(of) - 1)  # the answer first
    number = {column: i for i, column in enumerate(columns)}
    tokens, row_of = numbered(enc, f.ids.tolist()), {int(column): r for r, column in enumerate(graph.column)}
    vectors = graph.extra["vectors"]
    writes = dict(zip(columns[1:], written(f, enc, vectors[mx.array(columns[1:])]), strict=True))
    found = []
    for column in columns:
        node = graph.nodes[column]
        each = {"id": number[column], **node._asdict(), "name": name_of(node, tokens), "influence": float(of[column]),
                "writes": writes.get(column, [])}
        if column in row_of and features and node.kind != "answer":
            each |= {"input": float(graph.wanted[row_of[column], 0]), "constant": float(
                graph.wanted[row_of[column], 0] - graph.rows[row_of[column]].sum(dtype=np.float64))}
            encoder = features[node.layer].encoder[node.index][None]
            each["reads"] = wanted_tokens(f, enc, node.layer, encoder)[0]
        found.append(each)
    at, listed_edges = np.nonzero(edges), []
    total = np.abs(graph.rows[at])
    for kind, rows in graph.kinds.items():
        part = np.abs(rows[at]) / total
        for r, source, weight, score in zip(*at, rows[at].tolist(), (scores[at] * part).tolist(), strict=True):
            if abs(weight) > 0.02 * abs(graph.rows[r, source]):
                listed_edges.append({"from": number[int(source)], "to": number[int(graph.column[r])], "kind": kind,
                                     "weight": weight, "score": score})
    listed_edges.sort(key=lambda edge: -edge["score"])
    if features:
        moving = (e for e in listed_edges if found[e["from"]]["position"] != found[e["to"]]["position"])
        strong = [edge for edge, _ in zip(moving, range(400), strict=False)]
        pairs = [(columns[edge["from"]], columns[edge["to"]]) for edge in strong]
        for edge, of_heads in zip(strong, heads_between(f, graph, answer, features, pairs), strict=True):
            best = np.argsort(-np.abs(of_heads), axis=None)[:3]
            edge["heads"] = [[int(i) for i in np.unravel_index(at, of_heads.shape)] + [float(of_heads.flat[at])]
                             for at in best if abs(of_heads.flat[at]) > 0.1 * abs(edge["weight"])]
    tried = [{"from": number[c.source], "to": number[c.to], "kind": c.kind, "predicted": c.predicted,
              "measured": c.measured, "inputs": [
                  {"to": number[to], "predicted": p, "measured": m}
                  for to, p, m in sorted(c.inputs, key=lambda each: -abs(each[1]))[:12] if to in number]}
             for c in changes]
    return {"tokens": tokens, "layers": f.model.config.n_layer, "nodes": found, "edges": listed_edges,
            "interventions": tried}


def summary(result: dict, graph: Graph) -> list[str]:
    """What was explained, and how far it can be trusted."""
    scores, agreed = result["scores"], result["agreement"]
    lines = [f"The answer is the {result['answer']}: {result['value']:.4f}.",
             f"The graph has {len(result['nodes'])} of {len(graph.nodes):,} nodes and {len(result['edges'])} edges. "
             f"Sums of incoming edges are off by {scores['sum_error']:.0e} of the largest."]
    if scores["replacement"] < 1:
        lines.append(f"Replacement score {scores['replacement']:.3f}, completeness {scores['completeness']:.3f}: of "
                     f"the influence, {scores['error']:.3f} comes from errors of transcoders, and "
                     f"{scores['unknown']:.3f} from nodes whose edges were not computed.")
    if "kl" in scores:
        lines.append(f"KL(model || model of transcoders): {scores['kl'][0]:.3f} nats at the last token, "
                     f"{scores['kl'][1]:.3f} on average.")
    if result["interventions"]:
        what = "edges were cut" if result["interventions"][0]["kind"] else "nodes were changed"
        more = f", and of inputs of nodes {agreed['inputs']:.3f}" if agreed["inputs"] else ""
        most = f" {agreed['answer']:.3f}" if agreed["answer"] is not None else ": too few"
        lines.append(f"{len(result['interventions'])} {what} in the real model: the correlation of predicted and "
                     f"measured changes of the answer is{most}{more}.")
    return lines


def printed(result: dict, most: int = 12):
    """The strongest nodes and edges."""
    nodes = result["nodes"]
    parts = not any("input" in node for node in nodes)
    width = max(len(node["name"]) for node in nodes[:most + 1])
    print(f"influence  {'part of answer' if parts else '    activation'}  {'node':{width}}  writes")
    for node in nodes[1:most + 1]:
        writes = " ".join(node["writes"][:4])
        print(f"{node['influence']:9.3f}  {node['value']:+14.3f}  {node['name']:{width}}  {writes}".rstrip())
    pairs = [f"{nodes[edge['from']]['name']} → {nodes[edge['to']]['name']}" for edge in result["edges"][:most]]
    width = max(map(len, pairs), default=0)
    print(f"\n   weight  share  {'edge':{width}}  {'kind' if parts else 'of which through'}")
    for edge, pair in zip(result["edges"], pairs, strict=False):
        heads = [f"layer {layer}, head {head}: {part:+.3f}" for layer, head, part in edge.get("heads", [])[:1]]
        more = "".join([edge["kind"], *heads])
        print(f"{edge['weight']:+9.3f}  {edge['score']:5.3f}  {pair:{width}}  {more}".rstrip())


# ---- run -------------------------------------------------------------------------------------------------------------

FORMAT = "tinygpt circuit 1"


def check_settings() -> str:
    """UserError for settings that do not fit; the kind of nodes."""
    kind = nodes or ("features" if transcoders else "parts")
    if kind not in ("parts", "neurons", "features"):
        raise UserError(f"nodes={kind!r} is not one of parts, neurons, features")
    for name in {"parts": ["transcoders", "max_nodes", "factor"], "neurons": ["transcoders"]}.get(kind, []):
        if name in given:
            raise UserError(f"--{name} has no effect with --nodes={kind}: leave it out")
    if kind == "features" and not transcoders:
        raise UserError('features are read from transcoders: give --transcoders="FILES", or --nodes=parts or neurons')
    if not (0 < node_threshold <= 1 and 0 < edge_threshold <= 1):
        raise UserError("node_threshold and edge_threshold must be over 0, and 1 at most")
    if max_nodes < 1 or interventions < 0:
        raise UserError("max_nodes must be 1 or more, and interventions 0 or more")
    return kind


def check_json(path: str):
    """UserError if the file exists and is no graph of this script."""
    if not path.endswith(".json"):
        raise UserError(f"save={path!r}: let its name end in .json")
    check_folder(path)
    if os.path.exists(path):
        with open(path, "rb") as file:
            if FORMAT.encode() not in file.read(100):
                raise UserError(f"{path} exists, and was not written here: give another name")


def strongest_edges(graph: Graph, scores: np.ndarray, edges: np.ndarray, most: int) -> list[tuple[int, int, str]]:
    """The (source, receiver, kind) of the edges with the largest scores, each with its kind of largest weight."""
    at = np.argwhere(edges)
    return [(int(s), int(graph.column[r]), max(graph.kinds, key=lambda kind: abs(graph.kinds[kind][r, s])))
            for r, s in at[np.argsort(-scores[edges], kind="stable")[:most]]]


if __name__ == "__main__":
    kind = check_settings()
    picture, written_page = pictures(picture or f"{checkpoint.removesuffix('.safetensors')}-circuit.png")
    paths = [path for part in transcoders.split(",") if part for path in sorted(glob.glob(part)) or [part]]
    for name in filter(None, (picture, written_page, save)):
        check_output(name, checkpoint, *paths)
    if save:
        check_json(save)
    model, enc, known = opened(checkpoint)
    asked = prompt_of(enc, model, prompt, "", target, foil, bos, name="prompt")
    known |= {"prompt": prompt, "target": target, "foil": foil or "the mean of all logits"}
    coders = read_transcoders(paths, model, known["sha256"]) if kind == "features" else []
    if coders:
        known["transcoders"] = ", ".join(map(os.path.basename, paths))
    f, answer = freeze(model, mx.array(asked.clean)), Answer(asked.target, asked.foil, enc.n_vocab)
    of = measured(enc, asked) if foil else f"logit of {enc.decode([asked.target])!r} less the mean logit"
    features = []
    if kind == "parts":
        graph = part_graph(f, answer)
    else:
        features = [features_of(f, layer, coders[layer]) if coders else neurons(f, layer)
                    for layer in range(model.config.n_layer)]
        graph = feature_graph(f, answer, features, kind.removesuffix("s"), max_nodes)
    check_finite(graph.rows)
    cut = pruned(graph, node_threshold, edge_threshold)
    influence_of, kept, scores, edges = cut
    changes = []
    if interventions and kind == "parts":
        changes = cut_edges(f, answer, graph, strongest_edges(graph, scores, edges, interventions))
    elif interventions:
        columns = [i for i in np.argsort(-influence_of, kind="stable").tolist()
                   if kept[i] and graph.nodes[i].kind == kind.removesuffix("s")][:interventions]
        changes = change_features(f, answer, graph, features, columns, np.flatnonzero(kept[graph.column]), factor)
    result = {"format": FORMAT, "about": known, "answer": of, "value": graph.nodes[-1].value,
              "scores": {"sum_error": graph.error(), **trust(graph)} | (
                  {"kl": divergence(f, coders, enc.n_vocab)} if coders else {}), "agreement": agreement(changes),
              **result_of(f, enc, answer, graph, cut, changes, features)}
    told = summary(result, graph)
    print("\n".join(told))
    printed(result)
    title = f"{of}, after {short(prompt, 60)!r}"
    drawn(picture, result, title)
    page_of(written_page, result, title, " ".join(told), f"Its activation times {factor:g} in the real model")
    print(f"drawn: {picture}, {written_page}")
    if save:
        write_whole(save, json.dumps(result, ensure_ascii=False, allow_nan=False, indent=1).encode())
        print(f"written: {save}")
