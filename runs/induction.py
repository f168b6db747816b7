"""The induction pair of a model, by five methods on one kind of text, in one picture.

    python runs/induction.py webgpu/demo.safetensors --picture=docs/induction.png

The model reads random tokens, all different, twice: A B C A B C (see heads.py). An induction head (I) attends from the
second A to the first B, and writes B to the answer. It finds B by its keys, into which a previous-token head (P) has
written that A stood before (Olsson et al. 2022). Each method has its own sign of this, for every head:

    habits            the share of attention to the previous token, and to the token after an earlier copy
    weights           K-composition: how much of what a head writes I's keys read
    ablation          how much the loss on the second copy grows without the head
    path patching     how much of B's logit the path from the head to I's keys carries, and the path to the logits: the
                      corrupted text has another token in place of the first A, which B must not follow
    attribution graph the head's share of the edges into I's keys, and what it gives the answer, B's logit less the mean

A picture shows all of them, and a table tells the head with the largest number, and the ranks of P and I. The pair is
that of heads.py: the largest share of "previous" below the largest share of "induction".
"""
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import blas  # noqa: E402, F401  (before mlx)
import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

from circuit import Answer, Graph, freeze, part_graph  # noqa: E402
from config import UserError, check_output, overrides  # noqa: E402
from draw import pictures  # noqa: E402
from heads import composition, induction_pair, losses, name_of, panels_of, repeated, scores, small_maps  # noqa: E402
from model import GPT, load_checkpoint  # noqa: E402
from paths import paths  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

checkpoint = "out/ckpt.safetensors"  # any checkpoint with an induction pair
length = 25    # random tokens, which a text holds twice
draws = 8      # texts
seed = 1337    # for the random tokens
picture = ""   # a PNG; "": the name of the checkpoint with -induction.png

settings = overrides(globals(), "checkpoint")


def cut(texts: np.ndarray, length: int, spare: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Texts (D, T) from repeated(), up to a token A in the middle of the second copy; the same texts with a spare token
    (D,) in place of the first A; the tokens B that should follow (D,)."""
    first = texts.shape[1] - 2 * length + length // 2
    clean, corrupt = texts[:, :first + length + 1], texts[:, :first + length + 1].copy()
    corrupt[:, first] = spare
    return clean, corrupt, texts[:, first + 1]


def carried(model: GPT, clean: np.ndarray, corrupt: np.ndarray, answers: np.ndarray, receivers: list) -> np.ndarray:
    """The share of the answers' logits that the path from each head to the receivers carries, (layers, H), as means
    over the texts: (patched - clean) / (corrupt - clean)."""
    clean, corrupt, at = mx.array(clean), mx.array(corrupt), mx.array(answers)[:, None]

    def logit(logits):  # (..., D, V) -> (..., D)
        return mx.take_along_axis(logits, mx.broadcast_to(at, (*logits.shape[:-1], 1)), axis=-1)[..., 0]

    start, end = (logit(model(ids)[:, -1]).mean() for ids in (clean, corrupt))
    cells = paths(model, clean, corrupt, receivers, measure=logit)[:, :-1, 0].mean(-1)  # without the MLPs
    return np.array((cells - start) / (end - start))


def into_keys(graph: Graph, head: tuple[int, int], T: int) -> np.ndarray:
    """Each earlier head's share (layers, H) of the edges, by absolute weight, into a head's keys at the last of T
    tokens."""
    row = graph.kinds["key"][[(node.layer, node.index, node.position) == (*head, T - 1) and node.kind == "head"
                              for node in (graph.nodes[column] for column in graph.column)]][0]
    return by_head(graph, np.abs(row) / np.abs(row).sum())[:head[0]]


def by_head(graph: Graph, values: np.ndarray) -> np.ndarray:
    """The sums (layers, H) over positions of values (S,) of nodes."""
    heads = [(node.layer, node.index) for node in graph.nodes if node.kind == "head"]
    found = np.zeros(np.max(heads, axis=0) + 1)
    np.add.at(found, tuple(np.transpose(heads)), values[[node.kind == "head" for node in graph.nodes]])
    return found


def told(name: str, values: np.ndarray, pair: tuple) -> str:
    """A line: the head with the largest number, and the numbers and ranks of the pair."""
    known = np.where(np.isnan(values), -np.inf, values)
    best = np.unravel_index(known.argmax(), known.shape)
    parts = [f"{name:36}{best[0]:>4}.{best[1]:<4}{values[best]:>8.3f}"]
    for place in pair:
        rank = f"{1 + int((known > known[place]).sum())} of {np.isfinite(known).sum()}"
        parts.append(f"{values[place]:8.3f}  {rank:10}" if np.isfinite(known[place]) else f"{'-':>8}  {'':10}")
    return "".join(parts).rstrip()


if __name__ == "__main__":
    if length < 4 or draws < 1 or seed < 0:
        raise UserError("length must be 4 or more, draws 1 or more, and seed 0 or more")
    picture, _ = pictures(picture or f"{checkpoint.removesuffix('.safetensors')}-induction.png")
    check_output(picture, checkpoint)
    model, meta = load_checkpoint(checkpoint)
    model.set_dtype(mx.float32)  # sums are compared
    config = model.config
    enc = Tokenizer.from_dict(meta["tokenizer"]) if meta.get("tokenizer") else None
    drawn = repeated(enc, config.vocab_size, length + 1, draws, seed)
    spare, texts = drawn[:, -1], np.delete(drawn, [drawn.shape[1] - length - 2, drawn.shape[1] - 1], axis=1)
    if texts.shape[1] > config.block_size:
        raise UserError(f"length={length}: two copies have {texts.shape[1]} tokens, the model's context is "
                        f"{config.block_size}: give a smaller one")

    found = scores(model, texts)
    pair = first, second = induction_pair(found)
    if None in pair:
        raise UserError(f"{checkpoint} has no {'previous-token head below its ' * bool(second)}induction head that is "
                        "far above chance: give another checkpoint")
    clean, corrupt, answers = cut(texts, length, spare)
    shares = {panel["name"]: panel["values"] for panel in panels_of(found, None, config.n_layer)}
    whole, without = losses(model, texts, length)
    keys, given = [], []
    n_vocab = enc.n_vocab if enc else config.vocab_size
    for ids, answer in zip(tqdm(clean, unit=" graphs", disable=None, dynamic_ncols=True), answers, strict=True):
        graph = part_graph(freeze(model, mx.array(ids)), Answer(int(answer), None, n_vocab))
        keys.append(into_keys(graph, second, len(ids)))
        given.append(by_head(graph, graph.kinds["value"][-1]))  # the last row: edges into the answer
    receivers = [(second[0], second[1] * config.n_kv_head // config.n_head, "k")]

    def of_all(values):  # (layers, H), where later layers have none
        return np.pad(values, ((0, config.n_layer - len(values)), (0, 0)), constant_values=np.nan)

    panels = [
        {"name": "attention: to the previous token", "values": shares["previous"], "unit": "share of attention"},
        {"name": "weights: read by I's keys", "values": of_all(composition(model, *second)["K"]),
         "unit": "K-composition"},
        {"name": "path patching: to I's keys", "values": of_all(carried(model, clean, corrupt, answers, receivers)),
         "unit": "share of B's logit", "signed": True},
        {"name": "graph: edges into I's keys", "values": of_all(np.mean(keys, axis=0)),
         "unit": "share of their weight"},
        {"name": "attention: to what followed", "values": shares["induction"], "unit": "share of attention"},
        {"name": "ablation: loss without it", "values": without - whole, "unit": "rise, nats", "signed": True},
        {"name": "path patching: to the logits", "values": carried(model, clean, corrupt, answers, []),
         "unit": "share of B's logit", "signed": True},
        {"name": "graph: edge to the answer", "values": np.mean(given, axis=0), "unit": "logits", "signed": True},
    ]
    for panel in panels:
        panel["marks"] = {at: name for at, name in zip(pair, "PI", strict=True) if np.isfinite(panel["values"][at])}
    print(f"P: {name_of(first)}. I: {name_of(second)}. Loss on the second copy: {whole:.3f} nats.\n")
    print(f"{'':36}{'largest':>9}{'':8}{'P':>8}  {'rank':10}{'I':>8}  rank")
    print("\n".join(told(panel["name"], panel["values"], pair) for panel in panels))
    notes = [f"P: {name_of(first)}, the largest share of attention to the previous token in a layer below I's.",
             f"I: {name_of(second)}, the largest share of attention to what followed an earlier copy.",
             "Above: which head tells I where to look. Below: which head gives the answer. Grey: layers after I."]
    small_maps(picture, panels, f"The induction pair of {os.path.basename(checkpoint)}, by five methods", notes)
    print(f"drawn: {picture}")
