"""How well a checkpoint predicts a text.

    python eval.py out/ckpt.safetensors --data=book.txt
    python eval.py out/ckpt.safetensors --data=data/stdlib-bpe-4096     # the validation split that data.py made
    data/stdlib-bpe-4096: 398,605 tokens, 1,485,568 bytes, 8,706 tok/s, 0.47 GiB
    loss 4.2234 nats | perplexity 68.26 | bits per byte 1.6349 | accuracy 26.66%

Every token of the text is predicted exactly once, from at least block_size - stride tokens before it (where there are
as many): a window of block_size tokens slides by `stride`. It prints the loss in nats a token, its exponential
(perplexity), bits per byte of the text, which compares across tokenizers, and the share of tokens that were the most
probable.
"""
import json
import math
import os
import time

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
from tqdm import tqdm

from config import UserError, overrides
from model import compute_dtype, cross_entropy, load_checkpoint
from tokenizer import Tokenizer

checkpoint = "out/ckpt.safetensors"  # from train.py
data = ""          # a text file, or a folder that data.py made
block_size = 0     # tokens of context; 0: as in training; more shows how a model extrapolates
stride = 0         # tokens that the window moves, each of them scored; 0: half of block_size
batch_size = 16    # windows at a time
max_tokens = 0     # stop after as many; 0: the whole text
dtype = "auto"     # float32 | bfloat16 | float16; auto: bfloat16 on a GPU, float32 on a CPU

settings = overrides(globals(), "checkpoint", "data")

if not data:
    raise UserError("no text to evaluate on: give --data=FILE")
if batch_size < 1 or max_tokens < 0 or block_size < 0:
    raise UserError("batch_size must be 1 or more, max_tokens and block_size 0 or more")
model, meta = load_checkpoint(checkpoint)
if not meta.get("tokenizer"):
    raise UserError(f"{checkpoint} holds no tokenizer: it cannot read a text")
enc = Tokenizer.from_dict(meta["tokenizer"])
model.set_dtype(compute_dtype(dtype))


def read_tokens(path: str) -> np.ndarray:
    """Token ids of a text file, or of the validation split of a folder that data.py made."""
    if os.path.exists(os.path.join(path, "meta.json")):
        with open(os.path.join(path, "meta.json")) as file:
            prepared = json.load(file)
        if prepared.get("tokenizer") != meta["tokenizer"]:
            raise UserError(f"{path} was made with another tokenizer than {checkpoint}: give a text file instead")
        return np.fromfile(os.path.join(path, "val.bin"), dtype=prepared["dtype"])
    if not os.path.isfile(path):
        raise UserError(f"{path} is not a text file, nor a folder that data.py made")
    with open(path, "rb") as file:
        raw = file.read()
    try:
        return enc.encode(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from error


tokens = read_tokens(data).astype(np.int32)
tokens = tokens[:max_tokens or None]
if len(tokens) == 0:
    raise UserError(f"{data} is empty: there is nothing to predict")
block_size = block_size or model.config.block_size
T = min(block_size, len(tokens))
stride = stride or max(1, block_size // 2)
if not 0 < stride <= block_size:
    raise UserError(f"stride={stride}: it must be from 1 to {block_size}")

# Window w reads tokens[w - 1], ..., and predicts tokens[w], ..., tokens[w + T - 1]; before the first token stands an
# end-of-text token, as in training. The last window ends with the text.
stream = np.concatenate([[enc.bos], tokens]).astype(np.int32)
starts = [*range(0, len(tokens) - T, stride), len(tokens) - T]


def score(x, y):
    """Loss of each target and whether it was the most probable token: (B, T), (B, T) -> (B, T), (B, T)."""
    logits = model(x)
    losses = cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1)).reshape(y.shape)
    return losses, mx.argmax(logits, axis=-1) == y


nats, hits, scored, began = 0.0, 0, 0, time.perf_counter()
bar = tqdm(total=len(tokens), unit="tok", unit_scale=True, disable=None, dynamic_ncols=True)
for i in range(0, len(starts), batch_size):
    batch = starts[i:i + batch_size]
    rows = np.stack([stream[start:start + T + 1] for start in batch])
    losses, right = score(mx.array(rows[:, :-1]), mx.array(rows[:, 1:]))
    losses, right = np.array(losses), np.array(right)
    for start, loss, hit in zip(batch, losses, right, strict=True):
        new = start + T - scored  # the window's last tokens, which no window before it has scored
        nats += float(loss[T - new:].sum(dtype=np.float64))
        hits += int(hit[T - new:].sum())
        scored += new
        bar.update(new)
bar.close()
seconds = time.perf_counter() - began

n_bytes = int(enc.token_bytes[tokens].sum())
print(f"{data}: {scored:,} tokens, {n_bytes:,} bytes, {scored / seconds:,.0f} tok/s, "
      f"{mx.get_peak_memory() / 2**30:.2f} GiB")
print(f"loss {nats / scored:.4f} nats | perplexity {math.exp(min(nats / scored, 700)):.2f} | "
      f"bits per byte {nats / max(n_bytes, 1) / math.log(2):.4f} | accuracy {hits / scored:.2%}")
