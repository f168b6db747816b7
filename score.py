"""Read the tokens of a text, and measure how well a model predicts them: mean loss and accuracy.

    tokens = read_tokens("book.txt", enc)
    nats, accuracy = score(model, tokens, enc.start)      # perplexity = exp(nats)
"""
import os
import sys
from collections.abc import Callable

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
from tqdm import tqdm

from config import UserError
from model import GPT, LOSS_CHUNK, GPTConfig, check_reads_back, cross_entropy, no_tap
from text_files import NotText, decoded
from tokenizer import Tokenizer, open_tokens


def read_tokens(path: str, enc: Tokenizer, split: str = "val", max_tokens: int = 0) -> np.ndarray:
    """Token ids (N,) of a text file, or of a split (train or val) of a folder that data.py made. max_tokens: at most
    that many, from the start; 0: all."""
    if os.path.isdir(path):
        prepared, tokens = open_tokens(path)
        if prepared["tokenizer"] != enc.to_dict():
            raise UserError(f"{path} was made with another tokenizer than the checkpoint's: give a text file, or make "
                            "the folder with python data.py SOURCE --tokenizer=CHECKPOINT")
        path, tokens = os.path.join(path, f"{split}.bin"), tokens[split][:max_tokens or None]
    elif not os.path.isfile(path):
        raise UserError(f"{path} is not a text file, nor a folder that data.py made")
    else:
        try:
            tokens = enc.encode("".join(decoded(path, 2**22)))[:max_tokens or None]
        except NotText as error:  # which tells how to convert the file, if it is text in another encoding
            raise error if error.advice else UserError(f"{path} is a binary file: give a text") from error
    if len(tokens) == 0:
        raise UserError(f"{path} is empty: there is nothing to predict")
    return tokens.astype(np.int32)


LONGEST = 1024  # tokens of a window where no length is asked for


def read_splits(path: str, enc: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Token ids to train on and held-out ones: the splits of a folder that data.py made; of a text, its last tenth is
    held out."""
    if os.path.isdir(path):
        return read_tokens(path, enc, "train"), read_tokens(path, enc, "val")
    tokens = read_tokens(path, enc)
    return tokens[:len(tokens) * 9 // 10], tokens[len(tokens) * 9 // 10:]


def window_length(config: GPTConfig, block_size: int = 0) -> int:
    """The tokens of a window of a text: block_size; where that is 0, the model's context, but LONGEST at most, because
    memory and time grow with a window, and contexts may be of 131,072 tokens. UserError if it is negative, or more than
    a context of learned positions."""
    if block_size < 0:
        raise UserError(f"block_size={block_size}: it must be 0, for the model's context, or more")
    if config.pos == "learned" and block_size > config.block_size:
        raise UserError(f"block_size={block_size} is over {config.block_size}, the positions that the model learned")
    return block_size or min(config.block_size, LONGEST)


def in_windows(config: GPTConfig, T: int) -> str:
    """The end of a line with figures: nothing if they are of windows of the model's whole context."""
    return "" if T == config.block_size else f", in windows of {T:,} tokens"


def windows(tokens: np.ndarray, n: int, T: int, seed: int) -> mx.array:
    """n different windows of T tokens each, drawn from a text at multiples of T: (n, T), or fewer if it is short."""
    if seed < 0:
        raise UserError(f"seed={seed}: it must be 0 or more")
    if len(tokens) < T:
        raise UserError(f"the text has {len(tokens)} tokens, less than one window of {T}: give a longer text, "
                        "or a smaller --block_size")
    starts = np.random.default_rng(seed).permutation(len(tokens) // T)[:n] * T
    return mx.array(np.stack([tokens[start:start + T] for start in starts]))


def rated(model: GPT, x: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """The loss of each target (B, T), in nats, and whether the model held it most probable, both (B, T), for the last
    residual streams x (B, T, C). There are at most LOSS_CHUNK logits in memory at a time."""
    step, losses, right = max(1, LOSS_CHUNK // (len(x) * model.config.vocab_size)), [], []
    for start in range(0, x.shape[1], step):
        logits, y = model.unembed(x[:, start:start + step]), targets[:, start:start + step]
        losses.append(cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1)).reshape(y.shape))
        right.append(mx.argmax(logits, axis=-1) == y)
        mx.eval(losses[-1], right[-1])
    return mx.concatenate(losses, axis=1), mx.concatenate(right, axis=1)


def score(model: GPT, tokens: np.ndarray, start: list[int], block_size: int = 0, stride: int = 0,
          batch_size: int = 16, kv_bits: int = 0, tap: Callable = no_tap) -> tuple[float, float]:
    """The mean loss of tokens (N,), in nats, and the accuracy: the share of tokens that the model held most probable.

    Every token is predicted once, from at least block_size - stride tokens before it, or from all where there are
    fewer: a window of block_size tokens (0: see window_length()) moves by stride tokens (0: half of block_size). The
    text follows `start`, from Tokenizer.start; if that is empty, nothing predicts the first token, which is left out.
    kv_bits: keys and values go through a cache of that many bits; 0: no cache. tap: of the model.
    """
    check_reads_back(model.config)
    stream = np.concatenate([start, tokens]).astype(np.int32)
    n, block_size = len(stream) - 1, window_length(model.config, block_size)  # n tokens are predicted
    if n < 1:
        raise UserError("the text is a single token, which nothing predicts: give a longer text")
    T, stride = min(block_size, n), stride or max(1, block_size // 2)
    # Window w reads stream[w], ..., and predicts stream[w + 1], ..., stream[w + T]. The last ends with the text.
    starts = [*range(0, n - T, stride), n - T]
    nats, hits, scored = 0.0, 0, 0
    with tqdm(total=n, unit="tok", unit_scale=True, leave=False, disable=None, dynamic_ncols=True) as bar:
        for i in range(0, len(starts), batch_size):
            batch = starts[i:i + batch_size]
            rows = np.stack([stream[w:w + T + 1] for w in batch])
            x, y = mx.array(rows[:, :-1]), mx.array(rows[:, 1:])
            x = model.residual(x, cache=model.make_cache(kv_bits) if kv_bits else None, tap=tap)
            losses, right = map(np.array, rated(model, x, y))
            for w, loss, hit in zip(batch, losses, right, strict=True):
                new = w + T - scored  # the window's last tokens, which earlier windows have not scored
                nats += float(loss[T - new:].sum(dtype=np.float64))
                hits += int(hit[T - new:].sum())
                scored += new
                bar.update(new)
    return nats / scored, hits / scored


if __name__ == "__main__":
    print(f"{sys.argv[0]} has no command of its own: run eval.py, which uses it", file=sys.stderr)
    sys.exit(2)
