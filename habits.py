"""Attention maps of a model's heads, and what they attend to: for each of five habits, the share of a head's weights.

    states = record(model, idx)                                     # idx (T,): what the model taps
    maps = attention_maps(model, idx, states)                       # for each layer {"map": (H, T, T)}
    visible = visible_keys(model, states, 3)                        # (T, T)
    habits(maps[3]["map"][1], idx, visible)["induction"]            # of head 1: share, share by chance, rows

docs/inside.md has the formulas. attention_maps.py and heads.py use them; webgpu/habits.js computes the same numbers.
"""
import sys

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np

from model import (
    DIFF_LAMBDAS,
    GPT,
    attention_weights,
    check_known,
    crosses,
    rope_to_sinks,
    rotary,
    score_mask,
    windowed,
)

# ---- maps ------------------------------------------------------------------------------------------------------------

# Settings of the variants that attention_maps() was written for
KNOWN = ("alibi sliding_window window_pattern sinks diff_attn diff_attn_version n_expert expert_top_k n_shared_expert "
         "expert_balance mod mod_capacity mod_every yoco value_residual value_embeds softcap attn_softcap attn_scale "
         "rotary_dim rope_scaling rope_pattern window_theta parallel norm_place norm_bias out_bias head_bias "
         "qk_norm_width embed_scale residual_scale logit_scale sink_logits router_bias")


def record(model: GPT, idx: mx.array) -> dict[tuple[str, int], mx.array]:
    """The arrays that the model taps for tokens (T,), by (site, layer): see no_tap in model.py."""
    states = {}

    def tap(site, layer, x):
        states[site, layer] = x
        return x

    model.residual(idx[None], tap=tap)
    return states


def order_of(model: GPT, layer: int, x: mx.array) -> tuple[mx.array, mx.array]:
    """The order (T,) in which a routed block (mod=topk) holds the tokens of the stream x (1, T, C), the computed tokens
    first, and how many tokens it computes."""
    chosen, order = model.blocks[layer].taken(x)
    return order[0], chosen.sum()


def places(model: GPT, layer: int, x: mx.array) -> tuple[mx.array, int, int | mx.array, mx.array | None]:
    """The order (T,) in which a layer holds the tokens of the stream x (1, T, C), how many tokens it computes, and the
    arguments offset and keys of score_mask()."""
    T = x.shape[1]
    keys = mx.arange(T) if crosses(model.config, layer) else None
    if "predictor" not in model.blocks[layer]:
        return mx.arange(T), T, 0, keys
    order, n = order_of(model, layer, x)
    return order, n.item(), mx.where(mx.arange(T) < n, order, 2 * T)[None], keys


def attention_maps(model: GPT, idx: mx.array, states: dict | None = None,
                   layers: list[int] | None = None) -> list[dict[str, np.ndarray]]:
    """For each layer {"map": (H, T, T)}, queries by keys, for tokens (T,); with differential attention "first",
    "second" and "difference". Rows of tokens that a routed block skips are nan. states: from record(), if known.
    layers: None: all."""
    check_known(model.config, KNOWN, "habits.py")
    config, T, found = model.config, len(idx), []
    states = states or record(model, idx)
    for layer in range(config.n_layer) if layers is None else layers:
        block, crossing, x = model.blocks[layer], crosses(config, layer), states["resid", layer]
        q, k = states["q", layer], states["k", config.n_layer // 2 if crossing else layer]
        order, n, offset, keys = places(model, layer, x)
        if windowed(config, layer) and config.sinks and rotary(config, layer):
            q, k = rope_to_sinks(config, q, k, block.attn._inverse, offset, keys)
        mask = score_mask(config, layer, T, offset, keys)
        sink = block.attn.sink.weight if config.sink_logits else None
        maps = {"map": attention_weights(config, q, k, mask, sink)[0]}
        if config.diff_attn:
            maps = differential(config, block.attn, block.normed("attn_norm", x)[:, order], maps["map"])
        rows = np.array(order)[:n]
        columns = np.arange(T) if crossing else rows
        found.append({})
        for name, each in maps.items():
            whole = np.full((len(each), T, T), np.nan if n < T else 0, np.float32)
            whole[:, rows[:, None], columns] = np.array(each)[:, :n, :T if crossing else n]
            found[-1][name] = whole
    return found


def visible_keys(model: GPT, states: dict, layer: int) -> np.ndarray:
    """Whether a layer's queries see its keys, (T, T); a token that the layer skips sees none."""
    x = states["resid", layer]
    (order, n, offset, keys), T = places(model, layer, x), x.shape[1]
    mask = score_mask(model.config, layer, T, offset, keys)
    seen = np.tri(T, dtype=bool)
    if isinstance(mask, mx.array):
        seen = np.array(mask if mask.dtype == mx.bool_ else mask > -mx.inf)[0, 0]
    rows = np.array(order)[:n]
    columns = rows if keys is None else np.arange(T)
    found = np.zeros((T, T), bool)
    found[rows[:, None], columns] = seen[:n, :len(columns)]
    return found


def differential(config, attn, x: mx.array, maps: mx.array) -> dict[str, mx.array]:
    """Split maps (2 pairs, T, T) into the first and the second of each pair, and add the difference A1 - lambda A2.
    x (1, T, C): the output of the norm before attention."""
    first, second = maps[0::2], maps[1::2]
    if config.diff_attn_version == 2:
        weight = mx.sigmoid(attn.lam(x))[0].T[..., None].astype(mx.float32)
    else:
        q1, k1, q2, k2 = (attn[name].astype(mx.float32) for name in DIFF_LAMBDAS)
        weight = mx.exp((q1 * k1).sum()) - mx.exp((q2 * k2).sum()) + attn.lambda_0
    return {"first": first, "second": second, "difference": first - weight * second}


# ---- what heads do ---------------------------------------------------------------------------------------------------

HABITS = {"start": "attends to the start of the text", "itself": "attends to the token itself",
          "previous": "attends to the previous token",
          "induction": "attends to the token after an earlier copy of the current one (induction)",
          "same token": "attends to earlier copies of the current token"}


def habits(weights: np.ndarray, ids: list[int], visible: np.ndarray) -> dict[str, tuple[float, float, int]]:
    """For each of HABITS the mean share of a head's weights (T, T) that it gets over the rows where it is possible, the
    share by chance, which is that of even weights on the visible keys of these rows, and the number of these rows.
    Without such rows, both shares are nan. ids (T,): the tokens; visible (T, T): see visible_keys()."""
    ids, T = np.asarray(ids), len(ids)
    same, earlier = ids[:, None] == ids, np.tri(T, k=-1, dtype=bool) & (np.arange(T) > 0)
    keys_of = {"start": np.tile(np.arange(T) == 0, (T, 1)), "itself": np.eye(T, dtype=bool),
               "previous": np.eye(T, k=-1, dtype=bool) & earlier,  # not key 0, the start
               "induction": np.roll(same, 1, axis=1) & earlier, "same token": same & earlier}
    n_visible, found = visible.sum(-1), {}
    for name, keys in keys_of.items():
        keys = keys & visible
        rows = keys.any(-1) & (n_visible > 1)  # a row with one key says nothing about the head
        if not rows.any():
            found[name] = float("nan"), float("nan"), 0
            continue
        share = np.where(keys, weights, 0)[rows].sum(-1, dtype=np.float64).mean()
        found[name] = float(share), float((keys.sum(-1)[rows] / n_visible[rows]).mean()), int(rows.sum())
    return found


def far(share: float, chance: float, rows: int) -> bool:
    """Whether a habit is far above chance."""
    return rows > 1 and share >= 2 * chance and share >= chance + 0.1


def stands_out(found: list[dict]) -> tuple[int, str] | None:
    """Of the habits of several heads, the head and the habit with the largest share above chance: (index, name). Most
    heads give weight to the start, so that counts only where no head has another habit. None: no head has one."""
    pairs = [(name != "start", share - chance, i, name) for i, each in enumerate(found)
             for name, (share, chance, rows) in each.items() if far(share, chance, rows)]
    return max(pairs)[2:] if pairs else None


if __name__ == "__main__":
    print("habits.py has no command of its own: run attention_maps.py, which uses it", file=sys.stderr)
    sys.exit(2)
