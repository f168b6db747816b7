"""What each head of a model does: scores on repeated random tokens, its circuits, and the loss of the model without it.

    python heads.py out/ckpt.safetensors                                 # scores of every head
    python heads.py out/ckpt.safetensors --confirm=True                  # and the loss without each head
    python heads.py out/ckpt.safetensors --head=3.1 --prompt="def self"  # what head 1 of layer 3 reads and writes

Scores. The model reads random tokens, all different, twice: A B C A B C. No text has taught it these, so what it knows
of the second copy it has looked up in the first. For each head the shares of its attention that go to five places are
printed, means over --draws such texts, beside the shares by chance (docs/inside.md, "Where heads look", has the
formulas; attention_maps.py and the page in the browser use the same). In the words of Olsson et al. 2022 and of
TransformerLens, "previous" is the score of a previous-token head, "induction" the prefix-matching score of an induction
head, "same token" that of a duplicate-token head, and "start" that of a head that rests on the first token.
TransformerLens' head detector divides by all rows instead of those where a habit is possible: its score of induction is
half of ours, as only the second copy has an earlier one. "copying" is the copying score below.

--confirm=True sets the output of each head to zeros in turn, and measures how much the loss on the second copy grows
(its first token, which nothing foretells, is left out). The induction pair is the head with the largest share of
"previous" in a layer below the head with the largest share of "induction"; it is removed together, too.

Circuits (Elhage et al. 2021) of one head, for tokens as they enter: the stream holds a token's embedding alone, through
the norm before attention, and neither positions nor earlier layers have added to it. In layer 0 this is what happens;
in later layers it is what the weights would do with a token that came through unchanged.

    OV    N(E) W_V W_O w W_U   what a head that attends to a token adds to the logits of every token (w: weights of the
                               last norm, whose division is left out, as are biases)
    QK    the scores of a token's query with the keys of all tokens, as attention computes them, --distance positions
          apart (0 if it is not given: with rotary positions another distance gives other scores)

The copying score is the sum of the eigenvalues of the OV circuit over the sum of their sizes: 1 if a head that sees a
token makes that token likelier, whichever it is, 0 by chance, -1 if it makes it unlikelier. No matrix V x V is built:
the D eigenvalues that are not 0 are those of a D x D product. "among the top 5" is the share of tokens that the head
raises to one of the --top tokens, when it sees them, of --sample tokens.

Composition: how much of what an earlier head writes the head's queries (Q), keys (K) or values (V) read:
|W_OV W| / (|W_OV| |W|) in Frobenius norms, W being W_QK, its transpose, or W_OV of the head. By chance, after a random
rotation between the two, it is 1 / sqrt(C). In Python:

    >>> from model import load_checkpoint; from heads import copying, composition
    >>> model, meta = load_checkpoint("out/ckpt.safetensors")
    >>> score = copying(model, 1)                                        # (H,), of layer 1
    >>> score = composition(model, 1, 0)["K"]                            # (1, H): layers before 1, their heads
"""
import html
import json

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
from tqdm import tqdm

from config import UserError, check_output, given, overrides
from draw import check_finite, grid, labels, page, pictures, printable, write_figure
from habits import HABITS, attention_maps, far, habits, record, visible_keys
from inside import about, check_saved, listed, log_p, save_arrays
from model import GPT, LayerNorm, capped, check_known, compute_dtype, load_checkpoint, rope, rotary
from tokenizer import Tokenizer

checkpoint = "out/ckpt.safetensors"  # any checkpoint, quantized or not
# scores
length = 50       # random tokens, which the text holds twice
draws = 4         # texts
confirm = False   # whether the loss without each head is measured
# circuits
head = ""         # layer and head, as in 3.1, whose circuits are shown; "": scores of all heads
prompt = ""       # the tokens whose circuits are shown; "": 8 tokens drawn at random
distance = 0      # positions from a query back to its key
top = 5           # tokens that are shown of each list
sample = 4096     # tokens whose place in their own list is found; 0: all
# run
seed = 1337       # for the random tokens
picture = ""      # a PNG; "": the name of the checkpoint with -heads.png, or -head-3.1.png; a page .html beside it
save = ""         # an .npz file for the numbers; "": none

settings = overrides(globals(), "checkpoint")

# ---- scores on repeated random tokens --------------------------------------------------------------------------------


def repeated(enc: Tokenizer | None, vocab_size: int, length: int, draws: int, seed: int) -> np.ndarray:
    """Texts (draws, T): the tokens that begin a text, then `length` different random ones, twice. Special tokens and
    ids without a token are left out. UserError if there are too few."""
    allowed, start = np.arange(vocab_size), []
    if enc is not None:
        allowed = np.array([i for i, text in enumerate(enc.tokens[:vocab_size]) if text])
        allowed, start = np.setdiff1d(allowed, [*enc.special.values()]), enc.start
    if not 2 <= length <= len(allowed):
        raise UserError(f"length={length}: it must be 2 to {len(allowed)}, the number of tokens")
    rng = np.random.default_rng(seed)
    copies = [rng.choice(allowed, length, replace=False) for _ in range(draws)]
    return np.array([[*start, *copy, *copy] for copy in copies])


def scores(model: GPT, texts: np.ndarray) -> dict[tuple[int, str, int], dict[str, tuple[float, float, int]]]:
    """habits() of each head on texts (draws, T), the means over the texts, by (layer, map, head): see attention_maps().
    """
    found = {}
    for ids in tqdm(texts, unit=" texts", disable=None, dynamic_ncols=True):
        states = record(model, mx.array(ids))
        check_finite(np.array(states["resid", model.config.n_layer].astype(mx.float32)))
        for layer, named in enumerate(attention_maps(model, mx.array(ids), states)):
            visible = visible_keys(model, states, layer)
            for name, maps in named.items():
                for h, weights in enumerate(maps) if name != "difference" else ():
                    found.setdefault((layer, name, h), []).append(habits(weights, ids, visible))
    return {place: {habit: mean([each[habit] for each in of_texts]) for habit in HABITS}
            for place, of_texts in found.items()}


def mean(told: list[tuple[float, float, int]]) -> tuple[float, float, int]:
    """The means of shares and chances over the texts that have rows for a habit, and the number of all rows."""
    told = [each for each in told if each[2]]
    if not told:
        return float("nan"), float("nan"), 0
    shares, chances, rows = zip(*told, strict=True)
    return float(np.mean(shares)), float(np.mean(chances)), sum(rows)


def best(found: dict, habit: str, below: int | None = None) -> tuple[int, int] | None:
    """The (layer, head) with the largest share of a habit, if that is far above chance. below: in an earlier layer than
    this one."""
    places = [(told[habit][0], (layer, h)) for (layer, _, h), told in found.items()
              if far(*told[habit]) and (below is None or layer < below)]
    return max(places)[1] if places else None


def induction_pair(found: dict) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """The previous-token head and the induction head (layer, head) of scores(); None where there is none."""
    second = best(found, "induction")
    return best(found, "previous", second[0] if second else None), second


# ---- the loss without a head -----------------------------------------------------------------------------------------


def copy_loss(model: GPT, idx: mx.array, length: int, removed: list[tuple[int, int]] = (),
              streams: dict | None = None, copy: int = 2) -> mx.array:
    """The mean loss in nats of the second (or first) copy in texts (B, T) from repeated(), but for the copy's first
    token, with the outputs of the heads `removed`, (layer, head), set to zeros. streams: {layer: the stream (B, T, C)
    that enters it in a pass without changes}; layers before the first change are then not computed again."""
    first = min((layer for layer, _ in removed), default=0)

    def tap(site, layer, x):
        if site == "resid" and streams and layer <= first:
            return streams[layer]  # lazy: the blocks before it are not computed
        if site == "heads":
            for h in (h for at, h in removed if at == layer):
                x = mx.where((mx.arange(x.shape[1]) == h)[:, None, None], 0, x)
        return x

    end = idx.shape[1] - length * (2 - copy)
    logits = model.unembed(model.residual(idx, tap=tap)[:, end - length:end - 1])
    return -mx.take_along_axis(log_p(logits), idx[:, end - length + 1:end, None], axis=-1).mean()


def losses(model: GPT, texts: np.ndarray, length: int) -> tuple[float, np.ndarray]:
    """The loss on the second copy, and without each head (n_layer, H): see copy_loss()."""
    idx, streams, n_head = mx.array(texts), {}, {}

    def tap(site, layer, x):
        if site == "resid":
            streams[layer] = x
        if site == "heads":
            n_head[layer] = x.shape[1]
        return x

    model.residual(idx, tap=tap)
    mx.eval(streams)
    found = np.zeros((model.config.n_layer, max(n_head.values())))
    for place in tqdm([*np.ndindex(found.shape)], unit=" heads", disable=None, dynamic_ncols=True):
        found[place] = float(copy_loss(model, idx, length, [place], streams))
    return float(copy_loss(model, idx, length)), found


# ---- circuits --------------------------------------------------------------------------------------------------------

# Settings of the variants that the circuits below were written for
KNOWN = ("alibi sliding_window window_pattern sinks n_expert expert_top_k n_shared_expert expert_balance router_bias "
         "softcap attn_softcap attn_scale rotary_dim rope_scaling rope_pattern window_theta parallel norm_place "
         "norm_bias out_bias head_bias qk_norm_width embed_scale residual_scale logit_scale sink_logits")
CHUNK = 512  # rows of V numbers at a time
RANDOM = 5   # draws of two other heads


def matrix(layer, inputs: int) -> mx.array:
    """The matrix (in, out) of a linear layer of any class: dense, packed, of low rank or with an adapter."""
    return layer(mx.eye(inputs)) - layer(mx.zeros((1, inputs)))


def read_by(norm, x: mx.array) -> mx.array:
    """What the layer after a norm reads of x (..., C), but for the norm's division and bias."""
    if isinstance(norm, LayerNorm):
        x = x - x.mean(-1, keepdims=True)
    return x * norm.weight


def per_head(model: GPT, w: mx.array) -> mx.array:
    """The columns of a matrix (C, KV D), for each query head: (H, C, D)."""
    config = model.config
    w = w.reshape(len(w), -1, config.head_dim).swapaxes(0, 1)
    return mx.repeat(w, config.n_head // len(w), axis=0)


def reads(model: GPT, layer: int, w: mx.array) -> mx.array:
    """A matrix (C, KV D) that reads the norm before attention as one that reads the stream, for each query head:
    (H, C, D)."""
    block = model.blocks[layer]
    if "attn_norm" in block:
        w = read_by(block.attn_norm, mx.eye(len(w))) @ w
    return per_head(model, w)


def writes(model: GPT, layer: int) -> mx.array:
    """What heads add to the stream, for each number of their outputs: (H, D, C), with the weights of a norm after
    attention."""
    config, block = model.config, model.blocks[layer]
    w = block.scaled(matrix(block.attn.out, config.n_head * config.head_dim))
    if "attn_post_norm" in block:
        w = read_by(block.attn_post_norm, w)
    return w.reshape(config.n_head, config.head_dim, -1)


def embeddings(model: GPT, ids: mx.array) -> mx.array:
    """The embeddings of tokens (n,): (n, C)."""
    return model.embed(ids).astype(mx.float32) * model.config.embed_scale


def divided(model: GPT, ids: mx.array) -> mx.array:
    """The embeddings of tokens (n,), divided as by the norm before attention, without its weight: (n, C)."""
    x, config = embeddings(model, ids), model.config
    if config.norm_place == "after":
        return x
    if config.norm == "layer":
        return mx.fast.layer_norm(x, None, None, config.norm_eps)
    return mx.fast.rms_norm(x, None, config.norm_eps)


def logits_of(model: GPT, x: mx.array) -> mx.array:
    """What x (..., C), added to the stream, adds to logits (..., V), but for the last norm's division."""
    x, config = read_by(model.norm, x), model.config
    y = model.embed.as_linear(x) if config.tie else model.head(x) - model.head(mx.zeros((1, config.n_embd)))
    return y * config.logit_scale


def ov(model: GPT, layer: int, ids: mx.array | None = None) -> tuple[mx.array, mx.array]:
    """The OV circuits of a layer's heads, as factors: (H, n, D) of tokens (n,), or all, and (H, D, V)."""
    check_known(model.config, KNOWN, "the OV circuit")
    ids, attn = mx.arange(model.config.vocab_size) if ids is None else ids, model.blocks[layer].attn
    return (divided(model, ids) @ reads(model, layer, matrix(attn.v, model.config.n_embd)),
            logits_of(model, writes(model, layer)))


def through_tokens(model: GPT, n_vocab: int = 0) -> mx.array:
    """The sum over all tokens of what they add to each number of a layer's input, for what each number of the stream
    adds to their logits: (C, C). All that the copying scores need of the vocabulary."""
    n = n_vocab or model.config.vocab_size
    return logits_of(model, mx.eye(model.config.n_embd))[:, :n] @ divided(model, mx.arange(n))


def copying(model: GPT, layer: int, through: mx.array | None = None) -> np.ndarray:
    """The copying scores (H,) of a layer's heads: the sum of the eigenvalues of the OV circuit over that of their sizes
    (Elhage et al. 2021). 0 for a head that writes nothing. through: through_tokens(), if known."""
    check_known(model.config, KNOWN, "the OV circuit")
    through = through_tokens(model) if through is None else through
    values = reads(model, layer, matrix(model.blocks[layer].attn.v, model.config.n_embd))
    square = np.array(writes(model, layer) @ through @ values, np.float64)
    eigenvalues = np.linalg.eigvals(square)  # those of the OV circuit (V, V) that are not 0
    sizes = np.abs(eigenvalues).sum(-1)
    return eigenvalues.sum(-1).real / np.where(sizes > 0, sizes, 1)


def own_rank(model: GPT, layer: int, h: int, ids: np.ndarray, n_vocab: int) -> np.ndarray:
    """For tokens (n,), how many of the first n_vocab tokens a head raises more than the token itself: (n,)."""
    a, b = ov(model, layer, mx.array(ids))
    a, b, found = a[h], b[h][:, :n_vocab], []
    for at in range(0, len(ids), CHUNK):
        logits = a[at:at + CHUNK] @ b
        own = mx.take_along_axis(logits, mx.array(ids[at:at + CHUNK])[:, None], axis=-1)
        found.append(np.array((logits > own).sum(-1)))
    return np.concatenate(found)


def qk(model: GPT, layer: int, h: int, ids: mx.array, distance: int = 0) -> mx.array:
    """The QK circuit of a head: the scores of the queries of tokens (n,) with the keys of all tokens, which stand so
    many positions before them: (n, V). ALiBi's bias, the same for all keys, is left out."""
    check_known(model.config, KNOWN, "the QK circuit")
    config, block = model.config, model.blocks[layer]

    def turned(name: str, ids: mx.array, at: int) -> mx.array:
        return block.attn.turned(name, block.normed("attn_norm", embeddings(model, ids))[:, None], at)[:, :, 0]

    q, k = turned("q", ids, distance)[:, h], turned("k", mx.arange(config.vocab_size), 0)
    scores = q @ k[:, h * config.n_kv_head // config.n_head].T * (config.attn_scale or config.head_dim ** -0.5)
    return capped(scores, config.attn_softcap) if config.attn_softcap else scores


def queries_keys(model: GPT, layer: int, distance: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """W_Q and W_K of a layer's heads, (H, C, D) both, so that x_q W_Q W_K^T x_k^T is a score but for the division of
    norms, for keys so many positions before their queries."""
    config, block = model.config, model.blocks[layer]
    found = []
    for name, at in ("q", distance), ("k", 0):
        w = matrix(block.attn[name], config.n_embd)
        if config.qk_norm:
            w = w * mx.tile(norm := block.attn[f"{name}_norm"].weight, w.shape[1] // norm.size)
        w = w.reshape(len(w), -1, 1, config.head_dim)
        if rotary(config, layer):
            w = rope(w, block.attn._inverse, at)
        found.append(np.array(reads(model, layer, w.reshape(config.n_embd, -1)), np.float64))
    return *found,


def values_outputs(model: GPT, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """W_V (H, C, D) and W_O (H, D, C) of a layer's heads, with the weights of norms; with LayerNorm W_O is less its
    means over C, which the next norm does not see."""
    v = np.array(reads(model, layer, matrix(model.blocks[layer].attn.v, model.config.n_embd)), np.float64)
    out = np.array(writes(model, layer), np.float64)
    return v, out - out.mean(-1, keepdims=True) if model.config.norm == "layer" else out


def composition(model: GPT, layer: int, h: int, distance: int = 0) -> dict[str, np.ndarray]:
    """The Q-, K- and V-composition of a head with every head of the layers before it: (layer, H) each (Elhage et al.
    2021). Only D x D products of the factors are built."""
    check_known(model.config, KNOWN, "composition")
    q, k = (w[h] for w in queries_keys(model, layer, distance))
    v, out = (w[h] for w in values_outputs(model, layer))
    found = {name: np.zeros((layer, model.config.n_head)) for name in "QKV"}

    def r(w):  # (..., C, D) -> (..., D, D): the norm of u m w^T is that of r(u) m r(w)^T
        return np.linalg.qr(w, mode="r")

    def size(first, second):
        return np.linalg.norm(first @ second, axis=(-2, -1))

    ends = {"Q": (q, r(k)), "K": (k, r(q)), "V": (v, r(out.T))}
    for at in range(layer):
        v_1, out_1 = values_outputs(model, at)  # the stream gets x v_1 out_1
        start = r(v_1)
        whole = size(start, r(out_1.swapaxes(1, 2)).swapaxes(1, 2))
        for name, (read, end) in ends.items():
            both = whole * size(r(read), end.T)
            found[name][at] = size(start, out_1 @ read @ end.T) / np.where(both > 0, both, 1)
    return found


# ---- show ------------------------------------------------------------------------------------------------------------


def small_maps(path: str, panels: list[dict], title: str, notes: list[str] = (), bars: list[tuple] = ()):
    """A PNG of grids beside one another, layer 0 at the bottom. A panel has a name, values (layers, heads), marks
    {(layer, head): letter}, signed, high (the end of its colours) and unit. bars: names and values, drawn below."""
    from matplotlib.figure import Figure

    L, H = np.shape(panels[0]["values"])
    n_row = 1 if L > 12 or len(panels) < 5 else 2
    columns = -(-len(panels) // n_row)
    height = (min(0.42 if L <= 8 else 0.2, 11 / L) * L + 1.1) * n_row
    wide = max(1.9, (0.42 if H <= 4 else 0.27 if H <= 16 else 0.16) * H + 0.9)
    below = (0.75 + 0.24 * len(bars)) * bool(bars)
    figure = Figure(figsize=(0.5 + wide * columns, 0.4 + height + below + 0.15 * len(notes)), layout="constrained")
    above, *lower = figure.subfigures(2, 1, height_ratios=[height, below]) if bars else [figure]
    spots = above.subplots(n_row, columns, squeeze=False).flatten()
    for axes in spots[len(panels):]:
        axes.axis("off")
    for i, (axes, panel) in enumerate(zip(spots, panels, strict=False)):
        values, signed = np.asarray(panel["values"], np.float64), panel.get("signed")
        high = panel.get("high") or np.nanmax(np.abs(values), initial=0) or 1
        axes.set_facecolor("#dddddd")  # no number
        image = axes.imshow(values, cmap="RdBu_r" if signed else "Blues", vmin=-high if signed else 0, vmax=high,
                            origin="lower", aspect="auto", interpolation="nearest")
        for (layer, h), letter in panel.get("marks", {}).items():
            dark = abs(np.nan_to_num(values[layer, h])) > 0.6 * high
            axes.text(h, layer, letter, ha="center", va="center", fontsize=8 if L <= 12 else 6, fontweight="bold",
                      color="white" if dark else "black")
        every = -(-H // 12)
        axes.set_xticks(range(0, H, every), range(0, H, every), fontsize=7)
        every = -(-L // 15)
        axes.set_yticks(range(0, L, every), range(0, L, every) if i % columns == 0 else [], fontsize=7)
        axes.set_title(panel["name"], fontsize=9)
        axes.set_xlabel("head", fontsize=8)
        if i % columns == 0:
            axes.set_ylabel("layer", fontsize=8)
        bar = above.colorbar(image, ax=axes, orientation="horizontal", fraction=0.06, pad=0.02, aspect=25)
        bar.ax.tick_params(labelsize=6)
        bar.set_label(panel["unit"], fontsize=7)
    for part in lower:
        axes = part.subplots()
        axes.barh(range(len(bars)), [value for _, value in bars], color="#7799bb", height=0.7)
        for i, (_, value) in enumerate(bars):
            axes.text(value, i, f" {value:.2f}", va="center", fontsize=7)
        axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
        axes.tick_params(axis="x", labelsize=7)
        axes.invert_yaxis()
        axes.margins(x=0.08)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("loss, nats a token", fontsize=8)
    figure.suptitle(printable(title), fontsize=10, parse_math=False)
    if notes:
        figure.supxlabel("\n".join(notes), x=0.01, ha="left", fontsize=7, parse_math=False)
    write_figure(path, figure, dpi=130)


def tables(panels: list[dict]) -> list[str]:
    """The panels of small_maps() as HTML."""
    parts = []
    for panel in panels:
        values, digits = np.asarray(panel["values"], np.float64)[::-1], panel.get("digits", 2)
        L, H = values.shape
        texts = [["-" if np.isnan(value) else f"{value:.{digits}f}" for value in line] for line in values]
        rows, columns = [f"layer {layer}" for layer in range(L)][::-1], [f"head {h}" for h in range(H)]
        hovers = [[f"layer {L - 1 - i}, head {h}: {values[i, h]:.4f}" for h in range(H)] for i in range(L)]
        parts += [f"<h2>{html.escape(panel['name'])}</h2><p>{html.escape(panel.get('text') or panel['unit'])}</p>",
                  grid(values, rows, columns, texts, hovers, signed=bool(panel.get("signed")))]
    return parts


def name_of(place: tuple[int, int]) -> str:
    return f"layer {place[0]}, head {place[1]}"


def run_scores(model: GPT, enc: Tokenizer | None, known: dict):
    config = model.config
    texts = repeated(enc, config.vocab_size, length, draws, seed)
    if texts.shape[1] > config.block_size:
        raise UserError(f"length={length}: two copies have {texts.shape[1]} tokens, the model's context is "
                        f"{config.block_size}: give a smaller one")
    found, copies = scores(model, texts), None
    try:
        check_known(config, KNOWN, "the OV circuit")
        through = through_tokens(model, min(enc.n_vocab, config.vocab_size) if enc else 0)
        copies = np.array([copying(model, layer, through) for layer in range(config.n_layer)])
    except UserError as error:
        print(f"no copying scores: {error}")
    print_scores(found, copies)
    pair = first, second = induction_pair(found)
    for place, what in zip(pair, ("previous", "induction"), strict=True):
        told = [told[what][0] for (layer, _, h), told in found.items() if (layer, h) == place]
        print(f"{what}: {name_of(place)}, {max(told):.0%} of its weight" if place else
              f"{what}: no head is far above chance")
    panels, bars = panels_of(found, copies, config.n_layer), []
    marks = {place: letter for place, letter in zip(pair, "PI", strict=True) if place}
    notes = [f"{letter}: {name_of(place)}, the largest share of {what}" for (place, letter), what in zip(
        marks.items(), ("previous", "induction") if first else ("induction",), strict=False)]
    if first and second and copies is not None:
        values = np.full((config.n_layer, config.n_head), np.nan)
        values[:second[0]] = composition(model, *second)["K"]
        chance = config.n_embd ** -0.5
        panels.append({"name": "read by I's keys", "values": values, "digits": 3,
                       "unit": f"K-composition (chance {chance:.3f})",
                       "text": f"How much of what each earlier head writes is read by the keys of {name_of(second)} "
                               f"(K-composition); by chance {chance:.3f}."})
        print(f"K-composition of the two: {values[first]:.3f} (by chance {chance:.3f}), rank "
              f"{1 + int((values > values[first]).sum())} of {second[0] * config.n_head}")
    arrays = {panel["name"]: panel["values"] for panel in panels}
    if confirm:
        whole, without = losses(model, texts, length)
        panels.append({"name": "without the head", "values": without - whole, "signed": True, "digits": 3,
                       "unit": "rise of the loss, nats", "text": "How much the loss on the second copy, "
                       f"{whole:.3f} nats, grows where a head's output is set to zeros."})
        arrays |= {"loss": np.array(whole), "without": without}
        bars = confirmed(model, mx.array(texts), pair, whole, without)
    for panel in panels:
        panel["marks"] = marks
    title = f"Heads of {known['checkpoint']}, on {length} random tokens that stand there twice"
    small_maps(picture, panels, title, notes, bars)
    page(page_path, title, f"Means over {draws} texts. Layer 0 is at the bottom.", *(
        f"<p>{html.escape(note)}</p>" for note in notes), "<table>" * bool(bars) + "".join(
            f"<tr><th scope=row>{html.escape(name)}<td>{value:.3f}" for name, value in bars) + "</table>" * bool(bars),
        *tables(panels), listed(known))
    print(f"drawn: {picture}, {page_path}")
    if save:
        save_arrays(save, **arrays, pair=np.array([place or (-1, -1) for place in pair]),
                    about=np.array(json.dumps(known)))


def print_scores(found: dict, copies: np.ndarray | None):
    """A line for each head, the last layer first, and the shares by chance. found: from scores(); copies (layers, H).
    """
    print(f"{'head':>6}" + "".join(f"{name:>11} " for name in HABITS) + " copying" * (copies is not None))
    chances = {}
    for (layer, which, h), told in [*found.items()][::-1]:
        place = f"{layer}.{h}" + {"map": "", "first": "a", "second": "b"}[which]
        cells = [f"{share:>10.1%}{'*' if far(share, chance, rows) else ' '} " if rows else f"{'-':>10}  "
                 for share, chance, rows in told.values()]
        print(f"{place:>6}" + "".join(cells) + (f"{copies[layer, h]:>+8.2f}" if copies is not None else ""))
        chances[layer] = [f"{chance:>10.1%}  " if rows else f"{'-':>10}  " for _, chance, rows in told.values()]
    same = len({*map(tuple, chances.values())}) == 1
    for layer in [*chances][-1:] if same else chances:
        name = "chance" if same else f"{layer} by chance"
        print(f"{name:6}" + "".join(chances[layer])[len(name) - 6:] + "    0.00" * (copies is not None))
    print("*: far above chance")


def panels_of(found: dict, copies: np.ndarray | None, n_layer: int) -> list[dict]:
    """The panels of small_maps() for the habits and the copying scores; of two maps of a head, the larger share."""
    panels, H = [], 1 + max(h for _, _, h in found)
    for name, what in HABITS.items():
        values = np.full((n_layer, H), np.nan)
        for (layer, _, h), told in found.items():
            values[layer, h] = np.fmax(values[layer, h], told[name][0])
        chances = [told[name][1] for told in found.values() if told[name][2]]
        by_chance = f"by chance {np.mean(chances):.1%}" if chances else "not possible here"
        panels.append({"name": name, "values": values, "high": 1, "unit": f"share ({by_chance})",
                       "text": f"The share of its weight with which a head {what}; {by_chance}."})
    if copies is not None:
        panels.append({"name": "copying", "values": copies, "high": 1, "signed": True, "unit": "score (by chance 0)",
                       "text": "Whether a head that attends to a token makes that token likelier (1) or less likely "
                               "(-1) next: the eigenvalues of its OV circuit."})
    return panels


def confirmed(model: GPT, idx: mx.array, pair: tuple, whole: float, without: np.ndarray) -> list[tuple[str, float]]:
    """Print the loss on the second copy without the heads that matter most, without the induction pair, and without
    two other heads; return names and losses for a picture. whole and without: from losses()."""
    start = float(copy_loss(model, idx, length, copy=1))
    print(f"\n{'loss on the second copy, nats':44}{whole:8.3f}\n{'on the first copy':44}{start:8.3f}")
    bars = [("first copy", start), ("second copy", whole)]

    def line(name: str, value: float, more: str = ""):
        print(f"{name:44}{value:8.3f} {value - whole:+8.3f}  {more}".rstrip())

    places = sorted(np.ndindex(without.shape), key=lambda place: -without[place])
    for rank, place in enumerate(places):
        role = ["previous", "induction"][pair.index(place)] if place in pair else ""
        if rank < 5 or role:
            line(f"without {name_of(place)}", without[place], f"{rank + 1} of {without.size}  {role}")
        if role:
            bars.append((f"without {'PI'[pair.index(place)]}, {name_of(place)}", without[place]))
    others = [place for place in places if place not in pair]
    if None in pair or len(others) < 2:
        return bars
    both, rng = float(copy_loss(model, idx, length, pair)), np.random.default_rng(seed)
    drawn = [[others[i] for i in rng.choice(len(others), 2, replace=False)] for _ in range(RANDOM)]
    told = [float(copy_loss(model, idx, length, two)) for two in drawn]
    line("without both of the pair", both)
    told_range = f"{min(told):.3f} to {max(told):.3f}"
    line(f"without two other heads: mean of {RANDOM} draws", float(np.mean(told)), told_range)
    middle = float(np.median([without[place] for place in others]))
    line("without another head: the median", middle)
    return [*bars, ("without both", both), ("without two others (mean)", float(np.mean(told))),
            ("without another head (median)", middle)]


def parsed_head(text: str, config) -> tuple[int, int]:
    layer, _, h = text.partition(".")
    if not (layer.isdecimal() and h.isdecimal() and int(layer) < config.n_layer and int(h) < config.n_head):
        raise UserError(f"head={text!r}: write layer and head, as in --head=1.0, from 0.0 to "
                        f"{config.n_layer - 1}.{config.n_head - 1}")
    return int(layer), int(h)


def run_circuits(model: GPT, enc: Tokenizer, known: dict):
    config, (layer, h) = model.config, parsed_head(head, model.config)
    n_vocab = min(enc.n_vocab, config.vocab_size)
    rng = np.random.default_rng(seed)
    ids = [*dict.fromkeys(enc.encode(prompt).tolist())] if prompt else rng.choice(n_vocab, min(8, n_vocab),
                                                                                  replace=False).tolist()
    score = copying(model, layer, through_tokens(model, n_vocab))[h]
    some = np.arange(n_vocab) if sample == 0 or sample >= n_vocab else np.sort(rng.choice(n_vocab, sample, False))
    k = min(top, n_vocab)
    rank = own_rank(model, layer, h, some, n_vocab)
    print(f"layer {layer}, head {h}: copying score {score:+.3f}\nof {len(some):,} tokens, it raises "
          f"{(rank == 0).mean():.1%} above all others, and {(rank < k).mean():.1%} among\nthe top {k}, when it attends "
          f"to them (by chance {1 / n_vocab:.2%} and {k / n_vocab:.2%})")
    a, b = ov(model, layer, mx.array(ids))
    raised = np.array(a[h] @ b[h][:, :n_vocab])
    attended = np.array(qk(model, layer, h, mx.array(ids), distance)[:, :n_vocab])
    check_finite(raised)
    check_finite(attended)
    apart = f" {distance} positions back" if rotary(config, layer) else ""
    asked = ("raises most where it attends to this token (OV), in logits up to a factor",
             f"attends to most from this token{apart} (QK), scores")
    parts, tops = [], []
    for text, values in zip(asked, (raised, attended), strict=True):
        order = np.argsort(-values, axis=-1, kind="stable")[:, :k]
        tops.append(order)
        print(f"\nwhat it {text}")
        cells = [[f"{label} {values[i, j]:.2f}" for label, j in zip(labels(enc, line), line, strict=True)]
                 for i, line in enumerate(order.tolist())]
        for label, line in zip(labels(enc, ids), cells, strict=True):
            print(f"{label:>14}: " + "  ".join(line))
        chosen = np.take_along_axis(values, order, -1)
        parts += [f"<h2>What it {html.escape(text)}</h2>",
                  grid(chosen, labels(enc, ids), [f"{i + 1}." for i in range(k)], cells, cells, signed=True)]
    arrays = {"tokens": np.array(ids), "copying": np.array(score), "raised": tops[0], "attended": tops[1]}
    chance, panels = config.n_embd ** -0.5, []
    if layer:
        for name, values in composition(model, layer, h, distance).items():
            reads = {"Q": "queries", "K": "keys", "V": "values"}[name]
            text = f"How much of what each earlier head writes the {reads} of this head read; by chance {chance:.3f}."
            panels.append({"name": f"{name}-composition", "values": values, "unit": f"by chance {chance:.3f}",
                           "digits": 3, "text": text})
            arrays[f"{name}-composition"] = values
        high = max(panel["values"].max() for panel in panels)
        print(f"\ncomposition with earlier heads, the largest (by chance {chance:.3f})")
        for panel in panels:
            panel["high"] = high
            places = sorted(np.ndindex(panel["values"].shape), key=lambda place: -panel["values"][place])[:k]
            print(f"{panel['name'][0]:>14}: " + "  ".join(f"{a}.{b} {panel['values'][a, b]:.3f}" for a, b in places))
    title = f"Layer {layer}, head {h} of {known['checkpoint']}"
    page(page_path, title, f"Copying score {score:+.3f}. Tokens enter as their embeddings alone.", *parts,
         *tables(panels), listed(known))
    if panels:
        small_maps(picture, panels, f"{title}: what it reads of earlier heads")
    print(f"drawn: {f'{picture}, ' * bool(panels)}{page_path}")
    if save:
        save_arrays(save, **arrays, about=np.array(json.dumps(known)))


# ---- run -------------------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    for name in ("length", "draws", "confirm") if head else ("prompt", "distance", "top", "sample"):
        if name in given:
            raise UserError(f"--{name} is of " + ("scores: leave it or --head out" if head else
                                                  "the circuits of a head: give --head too"))
    if min(draws, top) < 1 or min(distance, seed, sample) < 0:
        raise UserError("draws and top must be 1 or more; distance, sample and seed 0 or more")
    ending = f"head-{head}" if head else "heads"
    picture, page_path = pictures(picture or f"{checkpoint.removesuffix('.safetensors')}-{ending}.png")
    for name in (picture, page_path):
        check_output(name, checkpoint)
    check_saved(save, checkpoint)
    model, meta = load_checkpoint(checkpoint)
    enc = Tokenizer.from_dict(meta["tokenizer"]) if meta.get("tokenizer") else None
    if head and enc is None:
        raise UserError(f"{checkpoint} holds no tokenizer to name tokens with: give another checkpoint")
    known = about(checkpoint, model)
    model.set_dtype(mx.float32 if head else compute_dtype("auto"))
    (run_circuits if head else run_scores)(model, enc, known)
