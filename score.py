"""Read the tokens of a text, and measure how well a model predicts them: mean loss and accuracy.

    tokens = read_tokens("book.txt", enc)
    nats, accuracy = score(model, tokens, enc.bos)        # perplexity = exp(nats)
"""
import os
import sys

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
from tqdm import tqdm

from config import UserError
from model import GPT, cross_entropy
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


def windows(tokens: np.ndarray, n: int, T: int, seed: int) -> mx.array:
    """n different windows of T tokens each, drawn from a text at multiples of T: (n, T), or fewer if it is short."""
    if seed < 0:
        raise UserError(f"seed={seed}: it must be 0 or more")
    if len(tokens) < T:
        raise UserError(f"the text has {len(tokens)} tokens, less than one window of {T}: give a longer text")
    starts = np.random.default_rng(seed).permutation(len(tokens) // T)[:n] * T
    return mx.array(np.stack([tokens[start:start + T] for start in starts]))


def score(model: GPT, tokens: np.ndarray, bos: int, block_size: int = 0, stride: int = 0,
          batch_size: int = 16, kv_bits: int = 0) -> tuple[float, float]:
    """The mean loss of tokens (N,), in nats, and the accuracy: the share of tokens that the model held most probable.

    Every token is predicted once, from at least block_size - stride tokens before it, or from all where there are
    fewer: a window of block_size tokens (0: the model's context) moves by stride tokens (0: half of block_size). The
    token bos precedes the text. kv_bits: keys and values go through a cache of that many bits; 0: no cache.
    """
    block_size = block_size or model.config.block_size
    T, stride = min(block_size, len(tokens)), stride or max(1, block_size // 2)
    # Window w reads tokens[w - 1], ..., and predicts tokens[w], ..., tokens[w + T - 1]. The last ends with the text.
    stream = np.concatenate([[bos], tokens]).astype(np.int32)
    starts = [*range(0, len(tokens) - T, stride), len(tokens) - T]
    nats, hits, scored = 0.0, 0, 0
    with tqdm(total=len(tokens), unit="tok", unit_scale=True, leave=False, disable=None, dynamic_ncols=True) as bar:
        for i in range(0, len(starts), batch_size):
            batch = starts[i:i + batch_size]
            rows = np.stack([stream[start:start + T + 1] for start in batch])
            x, y = mx.array(rows[:, :-1]), mx.array(rows[:, 1:])
            logits = model(x, cache=model.make_cache(kv_bits) if kv_bits else None)
            losses = cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1)).reshape(y.shape)
            losses, right = np.array(losses), np.array(mx.argmax(logits, axis=-1) == y)
            for start, loss, hit in zip(batch, losses, right, strict=True):
                new = start + T - scored  # the window's last tokens, which earlier windows have not scored
                nats += float(loss[T - new:].sum(dtype=np.float64))
                hits += int(hit[T - new:].sum())
                scored += new
                bar.update(new)
    return nats / scored, hits / scored


if __name__ == "__main__":
    print(f"{sys.argv[0]} has no command of its own: run eval.py, which uses it", file=sys.stderr)
    sys.exit(2)
