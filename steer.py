"""Add a direction to a model's states while it writes, and compare the text with that of the unchanged model.

    python steer.py webgpu/demo.safetensors --prompt=$'def open(self):\\n' --layer=2 --over=mean --strength=0.75 \\
        --positive="the socket of the server and the address of the client" --max_new_tokens=40 --seed=2 \\
        --negative="the list of items and the value of the key" --out=sockets.safetensors
    state: after layer 2; norm of the direction 1.02, of the prompt's states 3.00 on average
    written: sockets.safetensors
    ---- the unchanged model
    def open(self):
        \"""Update (internal) mode to an open file.\"""
        return self.stat()
    ---- the changed model
    def open(self):
        \"""\\
            User code - connection a socket.

            This server can be connected to a given host (server.host/host/port/port/port/port/port
    ---- token 3 is the first that differs: U and \\
    KL(unchanged || changed) of the changed text's tokens: mean 0.220 nats, largest 0.516 at token 12

    python steer.py webgpu/demo.safetensors --prompt="class" --direction=sockets.safetensors --strength=0.75

This is activation addition (Turner et al. 2023): the direction is the difference of two prompts' states in the residual
stream after --layer, the positive prompt's less the negative one's; strength times the direction is added to the states
after that layer while the model reads the prompt and writes. --over=last takes the state of each prompt's last token,
--over=mean the mean over its tokens. --start=-1 leaves the states of the prompt as they are, but for its last token,
from which the first new token is predicted.

Both texts are drawn with the same random numbers, so that they are equal as long as the models predict the same. KL,
the divergence of the changed model's prediction from the unchanged one's, is for each token of the changed text, given
the text before it, in nats. --out writes the direction to a file, which the page in the browser reads as well. In
Python:

    >>> from model import generate, load_checkpoint; from steer import direction_of, pasting, states_of, steering
    >>> model, meta = load_checkpoint("out/ckpt.safetensors")
    >>> direction = direction_of(model, [5, 17, 2], [5, 18, 2], layer=1)   # (C,)
    >>> text = list(generate(model, [5, 9], 20, tap=steering(direction, layer=1, strength=2.0)))
    >>> state = states_of(model, [5, 17, 2], layer=1)[-1]                  # (C,), pasted at position 1:
    >>> text = list(generate(model, [5, 9], 20, tap=pasting(state, layer=1, start=1, end=2)))

Departures from the paper: Turner et al. add the differences of all positions of two prompts, each at its own position
from the beginning of the text on; here one difference is added at every position, as in Rimsky et al. (2024).
"""
import os
import sys
from collections.abc import Callable

import blas  # noqa: F401  (before mlx)
import mlx.core as mx

from config import UserError, check_output, check_replaced, overrides
from conversations import ends_of_text
from draw import check_finite, check_folder, labels, prompt_ids, state_name
from lora import base_fingerprint
from model import GPT, VERSION, compute_dtype, generate, load_arrays, load_checkpoint, no_tap, save_arrays
from tokenizer import Tokenizer

checkpoint = "out/ckpt.safetensors"  # any checkpoint, quantized or not
prompt = ""               # the beginning of both texts
# direction
positive = ""             # a prompt whose state the direction leads to
negative = ""             # a prompt whose state it leads away from
over = "last"             # last | mean: the state of a prompt's last token, or the mean over its tokens
layer = 2                 # the layer after which states are taken and changed; -1: the embedding
direction = ""            # a file that --out wrote, in place of positive, negative, over and layer
out = ""                  # write the direction to this file, which the page reads too; "": do not
# steering
strength = 1.0            # factor of the direction; below 0: away from the positive prompt
start = 0                 # change the states from this position of the text on; -1: from the prompt's last token on
# text
max_new_tokens = 100      # tokens to generate at most
temperature = 0.8         # 0: always the most probable token; 1: the model's own distribution
top_k = 50                # keep the k most probable tokens; 0: all
seed = 1337               # of the random draws, equal for both texts

settings = overrides(globals(), "checkpoint")

# ---- steering --------------------------------------------------------------------------------------------------------


def states_of(model: GPT, ids: list[int], layer: int) -> mx.array:
    """The states (T, C) of tokens ids (T,) after a layer; -1: the embedding."""
    found = []

    def tap(site, at, x):
        if (site, at) == ("resid", layer + 1):
            found.append(x[0])
        return x

    model.residual(mx.array([ids]), tap=tap)
    return found[0].astype(mx.float32)


def direction_of(model: GPT, positive: list[int], negative: list[int], layer: int, over: str = "last",
                 skip: int = 0) -> mx.array:
    """The difference (C,) of two prompts' states after a layer: of their last tokens; or of the means over their tokens
    without the first `skip`, those that begin every text. UserError if a prompt has no other tokens."""
    if min(len(positive), len(negative)) <= skip:
        raise UserError("a prompt of the direction has no token: give a longer one")
    ends = [states_of(model, ids, layer) for ids in (positive, negative)]
    first, second = (x[-1] if over == "last" else x[skip:].mean(0) for x in ends)
    return first - second


def acting(layer: int, change: Callable, start: int = 0, end: int | None = None) -> Callable:
    """A tap for one generate() of one text: the states (B, n, C) after a layer become change(states) at the positions
    from `start` up to `end` - 1, which count from the beginning of the text. It counts the tokens that were read, since
    a tap does not see their positions: each call after the first one reads one token more, and a call that reads the
    second half of a full context again reads the last ones."""
    read = 0

    def tap(site, at, x):
        nonlocal read
        if (site, at) == ("resid", 0):
            read = read + 1 if read else x.shape[1]
        if (site, at) == ("resid", layer + 1):
            position = mx.arange(read - x.shape[1], read)[:, None]
            inside = position >= start if end is None else (position >= start) & (position < end)
            x = mx.where(inside, change(x).astype(x.dtype), x)
        return x

    return tap


def steering(direction: mx.array, layer: int, strength: float, start: int = 0) -> Callable:
    """A tap for one generate(): direction (C,) times the strength is added to the states after a layer, from a position
    of the text on."""
    return acting(layer, lambda x: x + strength * direction, start)


def pasting(state: mx.array, layer: int, start: int, end: int | None = None) -> Callable:
    """A tap for one generate(): the states after a layer at these positions of the text become `state` (C,)."""
    return acting(layer, lambda x: mx.broadcast_to(state, x.shape), start, end)


def divergence(model: GPT, ids: list[int], n: int, tap: Callable, n_vocab: int) -> mx.array:
    """KL(the unchanged model's distribution || the changed model's) in nats of each of the last n of tokens ids, given
    those before it: (n,). Token ids from n_vocab on pad the vocabulary."""
    idx = mx.array([ids[:-1]])
    plain, changed = (log_softmax(model(idx, tap=each)[0, -n:, :n_vocab]) for each in (no_tap, tap))
    return (mx.exp(plain) * (plain - changed)).sum(-1)


def log_softmax(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


# ---- files -----------------------------------------------------------------------------------------------------------


def load_direction(path: str, model: GPT, fingerprint: str) -> tuple[mx.array, int]:
    """A direction (C,) and its layer, from a file of --out. UserError if it was made for another checkpoint."""
    arrays, header = load_arrays(path)
    if "direction" not in header or "direction" not in arrays:
        raise UserError(f"{path} holds no direction: --out=FILE writes one")
    found, layer = arrays["direction"], header.get("layer")
    if header.get("base") != fingerprint or found.shape != (model.config.n_embd,) or type(layer) is not int:
        raise UserError(f"{path} was made for another checkpoint: make a direction of this one")
    return found.astype(mx.float32), layer


# ---- run -------------------------------------------------------------------------------------------------------------


def write(model: GPT, enc: Tokenizer, ids: list[int], ends: set[int], tap: Callable) -> list[int]:
    """The tokens that follow ids, up to one that ends a text."""
    found = []
    for token in generate(model, ids, max_new_tokens, temperature, top_k, seed=seed, n_vocab=enc.n_vocab, tap=tap):
        found.append(token)
        if token in ends:
            break
    return found


def compare(model: GPT, enc: Tokenizer, ids: list[int], ends: set[int], tap: Callable):
    """Write both texts, and print them with their first difference and the divergence. tap(): a new tap."""
    plain, changed = (write(model, enc, ids, ends, each) for each in (no_tap, tap()))
    for name, tokens in ("the unchanged model", plain), ("the changed model", changed):
        print(f"---- {name}\n{prompt}{enc.decode([token for token in tokens if token not in ends])}")
    same = next((i for i, (a, b) in enumerate(zip(plain, changed, strict=False)) if a != b), None)
    if same is None:
        print("---- both texts are equal")
    else:
        first, second = labels(enc, [plain[same], changed[same]])
        print(f"---- token {same + 1} is the first that differs: {first} and {second}")
    fit = changed[:model.config.block_size + 1 - len(ids)]  # beyond the context, a part of the text is read again
    kl = divergence(model, [*ids, *fit], len(fit), tap(), enc.n_vocab)
    most = int(mx.argmax(kl))
    print(f"KL(unchanged || changed) of the changed text's tokens: mean {kl.mean().item():.3f} nats, largest "
          f"{kl[most].item():.3f} at token {most + 1}")


if __name__ == "__main__":
    if over not in ("last", "mean"):
        raise UserError(f"over={over!r} is not one of last, mean")
    if start < -1 or max_new_tokens < 1 or temperature < 0 or top_k < 0 or not 0 <= seed < 2**63:
        raise UserError("start must be -1 or more, max_new_tokens 1 or more, temperature, top_k and seed 0 or more")
    if not direction and not (positive and negative):
        raise UserError("there is no direction: give --positive=TEXT and --negative=TEXT, or --direction=FILE")
    if direction and (positive or negative):
        raise UserError("give either --direction=FILE, or --positive=TEXT and --negative=TEXT")
    if out:
        check_output(out, checkpoint, direction)
        check_folder(out)
        check_replaced(out, os.path.basename(__file__))
    model, meta = load_checkpoint(checkpoint)
    if not meta.get("tokenizer"):
        raise UserError(f"{checkpoint} holds no tokenizer to encode a prompt with: give another checkpoint")
    enc = Tokenizer.from_dict(meta["tokenizer"])
    ids, fingerprint = prompt_ids(enc, prompt, model), base_fingerprint(model)
    model.set_dtype(compute_dtype("auto"))
    if direction:
        vector, layer = load_direction(direction, model, fingerprint)
    elif not -1 <= layer < model.config.n_layer:
        raise UserError(f"layer={layer}: the model has layers 0 to {model.config.n_layer - 1}, and -1 is the embedding")
    else:
        both = [prompt_ids(enc, text, model, name) for name, text in (("positive", positive), ("negative", negative))]
        vector = direction_of(model, *both, layer, over, len(enc.start))
    states = states_of(model, ids, layer)[len(enc.start):]
    check_finite([vector.sum().item(), states.sum().item()])
    print(f"state: {state_name(layer + 1)}; norm of the direction {mx.linalg.norm(vector).item():.2f}, of the prompt's "
          f"states {mx.linalg.norm(states, axis=-1).mean().item():.2f} on average")
    if out:
        save_arrays(out, {"direction": vector}, {
            "version": VERSION, "direction": over, "layer": layer, "base": fingerprint,
            "script": os.path.basename(__file__), "settings": settings})
        print(f"written: {out}")
    begin = len(ids) - 1 if start == -1 else start
    sys.stdout.reconfigure(errors="replace")  # characters that the terminal's encoding lacks become "?"
    compare(model, enc, ids, ends_of_text(enc, meta, "none"), lambda: steering(vector, layer, strength, begin))
