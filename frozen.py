"""A model that is linear for one prompt but for its MLPs, and the gradients through it: for circuit.py's graphs.

    f = freeze(model, ids)                                    # the attention weights and states for the tokens (T,)
    for layer, g in f.down_the_stream(n_layer, f.answer_gradient(Answer(9, 3, 4096))):
        ...                                                   # the gradient (1, T, C) at what this layer's MLP adds

With the attention weights and the scales of the norms frozen at the values that they have for the prompt, all of the
model but its MLPs is an affine map of the residual stream. Its vector-Jacobian products tell how much of what one part
writes reaches another part (Ameisen et al. 2025).
"""
import sys
from collections.abc import Iterator
from typing import NamedTuple

import blas  # noqa: F401  (before mlx)
import mlx.core as mx

from config import UserError
from inside import record
from model import ACTIVATIONS, GATED, GPT, LayerNorm, attention_weights, check_known, rope, rotary, score_mask

# Settings of the variants for which the frozen model was written
KNOWN = ("alibi sliding_window window_pattern window_theta attn_scale rotary_dim rope_factor rope_low_freq "
         "rope_high_freq rope_original rope_scaling rope_pattern parallel norm_place norm_bias out_bias head_bias "
         "qk_norm_width embed_scale residual_scale logit_scale qkv_bias")


class Answer(NamedTuple):
    """What the graph explains: the logit of a token less that of another one, or (foil None) than the mean of the
    first n_vocab."""
    target: int
    foil: int | None
    n_vocab: int

    def __call__(self, logits: mx.array) -> mx.array:
        """(..., V) -> (...)."""
        other = logits[..., :self.n_vocab].mean(-1) if self.foil is None else logits[..., self.foil]
        return logits[..., self.target] - other


class Frozen(NamedTuple):
    """A model and its states for a prompt of T tokens: states from record(), and for each layer the attention weights
    (H, T, T) and the mask that is added to the scores, (H or 1, T, T)."""
    model: GPT
    ids: mx.array
    states: dict
    weights: list[mx.array]
    masks: list[mx.array]

    def middle(self, layer: int) -> mx.array:
        """The stream (T, C) that an MLP reads, before its norm."""
        entered = self.states["resid", layer][0]
        return entered if self.model.config.parallel else entered + self.states["attn", layer][0]

    def normed_at(self, layer: int, name: str, x: mx.array, at: mx.array, biased: bool = True) -> mx.array:
        """norm_at() by a block's norm of this name; x where the block has none."""
        block = self.model.blocks[layer]
        return norm_at(block[name], x, at, biased) if name in block else x

    def values(self, layer: int, x: mx.array, biased: bool = True) -> mx.array:
        """The values (N, KV, T, D) of streams x (N, T, C) that enter a block."""
        x = self.normed_at(layer, "attn_norm", x, self.states["resid", layer][0], biased)
        return self.split(linear(self.model.blocks[layer].attn.v, x, biased))

    def split(self, x: mx.array) -> mx.array:
        """(N, T, heads D) -> (N, heads, T, D)."""
        return x.reshape(*x.shape[:2], -1, self.model.config.head_dim).swapaxes(1, 2)

    def turned(self, layer: int, name: str, x: mx.array, biased: bool = True) -> mx.array:
        """The queries (name "q") or the keys ("k"), (N, heads, T, D), of streams x (N, T, C) that enter a block. The
        scales of QK-norm are frozen too."""
        config, attn, entered = self.model.config, self.model.blocks[layer].attn, self.states["resid", layer][0]
        x = linear(attn[name], self.normed_at(layer, "attn_norm", x, entered, biased), biased)
        if config.qk_norm:
            at = attn[name](self.model.blocks[layer].normed("attn_norm", entered))
            wide, norm = config.qk_norm_width, attn[f"{name}_norm"]
            if wide:
                x = norm_at(norm, x, at)
            x = self.split(x)
            if not wide:
                x = norm_at(norm, x, self.split(at[None])[0])
        else:
            x = self.split(x)
        return rope(x, attn._inverse, 0) if rotary(config, layer) else x

    def joined(self, layer: int, heads: mx.array, biased: bool = True) -> mx.array:
        """What attention adds to the stream (N, T, C), given its heads' outputs (N, H, T, D)."""
        block = self.model.blocks[layer]

        def projected(z, biased):
            return linear(block.attn.out, z.swapaxes(1, 2).reshape(len(z), z.shape[2], -1), biased)

        at = projected(self.states["heads", layer], True)[0]
        return block.scaled(self.normed_at(layer, "attn_post_norm", projected(heads, biased), at, biased))

    def attention(self, layer: int, x: mx.array) -> mx.array:
        """What attention adds to streams x (N, T, C), with frozen weights: (N, T, C)."""
        return self.joined(layer, self.weights[layer] @ self.for_heads(self.values(layer, x)))

    def for_heads(self, x: mx.array) -> mx.array:
        """Keys or values (..., KV, T, D), repeated for the heads that share them: (..., H, T, D)."""
        return mx.repeat(x, self.model.config.n_head // self.model.config.n_kv_head, axis=-3)

    def added(self, layer: int, y: mx.array, biased: bool = True, positions: mx.array | slice = slice(None)):
        """What an MLP adds to the stream, given its output y (..., T, C): after a norm, if there is one. positions:
        those of y, if it has not all."""
        block, hidden = self.model.blocks[layer], self.states["hidden", layer][0, positions]
        return block.scaled(self.normed_at(layer, "mlp_post_norm", y, block.mlp.down(hidden), biased))

    def mlp_input(self, layer: int, x: mx.array, biased: bool = True) -> mx.array:
        """What an MLP reads of streams x (N, T, C), normed."""
        return self.normed_at(layer, "mlp_norm", x, self.middle(layer), biased)

    def slopes(self, layer: int) -> mx.array:
        """The neurons (T, F) of an MLP over its inputs, with which the MLP is a linear map for the prompt. With a gate:
        the gate's factor."""
        block, activation = self.model.blocks[layer], ACTIVATIONS[self.model.config.mlp]
        x = block.normed("mlp_norm", self.middle(layer))
        up = block.mlp.up(x)
        if self.model.config.mlp in GATED:
            return activation(block.mlp.gate(x), mx.ones_like(up))
        return mx.where(up == 0, 0, activation(up) / mx.where(up == 0, 1, up))

    def straight_mlp(self, layer: int, x: mx.array, slope: mx.array, biased: bool = True) -> mx.array:
        """What an MLP adds for streams x (N, T, C), with each neuron `slope` times its input; without the biases that
        stand after the neurons."""
        mlp = self.model.blocks[layer].mlp
        hidden = slope * linear(mlp.up, self.mlp_input(layer, x, biased), biased)
        return self.added(layer, linear(mlp.down, hidden, False), False)

    def read(self, x: mx.array) -> mx.array:
        """Logits (..., V) of final streams x (..., C) at the last position, with the final norm's scale frozen."""
        return self.model.project(norm_at(self.model.norm, x, self.states["resid", self.model.config.n_layer][0, -1:]))

    def answer_gradient(self, answer: Answer) -> mx.array:
        """The gradient (1, T, C) of the answer with respect to the final stream."""
        last = mx.grad(lambda x: answer(self.read(x)).sum())(mx.zeros((1, self.model.config.n_embd)))
        return mx.concatenate([mx.zeros((len(self.ids) - 1, len(last[0]))), last])[None]

    def through(self, layer: int, gradient: mx.array) -> mx.array:
        """Gradients (N, T, C) with respect to the stream before a layer's attention, from those after it."""
        return gradient + mx.vjp(lambda x: self.attention(layer, x), [mx.zeros(gradient.shape)], [gradient])[1][0]

    def down_the_stream(self, layer: int, gradient: mx.array) -> Iterator[tuple[int, mx.array]]:
        """Of gradients (N, T, C) with respect to the stream that the MLP of a layer reads (n_layer: to the final one),
        those with respect to what earlier MLPs add, by layer; -1: the embedding. They do not pass through MLPs."""
        if layer < self.model.config.n_layer and not self.model.config.parallel:
            gradient = self.through(layer, gradient)
        for earlier in range(layer - 1, -1, -1):
            yield earlier, gradient
            gradient = self.through(earlier, gradient)
        yield -1, gradient


def freeze(model: GPT, ids: mx.array) -> Frozen:
    """The frozen model for tokens (T,)."""
    check_known(model.config, KNOWN, "circuit.py")
    if model.config.mlp == "swiglu_clip":  # up to 7, its neurons are g (up + 1), which is no multiple of up
        raise UserError("circuit.py does not know mlp='swiglu_clip': give another model")
    states, weights, masks = record(model, ids[None], ("attn", "heads", "hidden", "mlp", "q", "k", "v")), [], []
    for layer in range(model.config.n_layer):
        mask, T = score_mask(model.config, layer, len(ids), 0, None), len(ids)
        weights.append(attention_weights(model.config, states["q", layer], states["k", layer], mask)[0])
        if not isinstance(mask, mx.array):
            mask = mx.where(mx.tri(T, dtype=mx.bool_), 0.0, -mx.inf)[None, None]
        masks.append(mask[0])
    mx.eval(states, weights)
    return Frozen(model, ids, states, weights, masks)


def norm_at(norm, x: mx.array, at: mx.array, biased: bool = True) -> mx.array:
    """A norm of x (..., T, C) with the scale that it has for the states `at` (T, C). biased: with its bias."""
    at = at.astype(mx.float32)
    if isinstance(norm, LayerNorm):
        at, x = at - at.mean(-1, keepdims=True), x - x.mean(-1, keepdims=True)
    y = x * mx.rsqrt(mx.square(at).mean(-1, keepdims=True) + norm.eps) * norm.weight
    return y + norm.bias if biased and "bias" in norm else y


def linear(layer, x: mx.array, biased: bool = True) -> mx.array:
    """A linear layer, without its bias if biased is False."""
    return layer(x) if biased else layer(x) - layer(mx.zeros((1, x.shape[-1])))


if __name__ == "__main__":
    print("frozen.py has no command of its own: run circuit.py, which uses it", file=sys.stderr)
    sys.exit(2)
