"""Measure how well checkpoints predict a text.

    python eval.py out/ckpt.safetensors --data=book.txt
    python eval.py out/best.safetensors out-sft/sft.safetensors --data=book.txt
    python eval.py out/ckpt.safetensors --data=data/stdlib-bpe-4096     # the validation split that data.py made
    data/stdlib-bpe-4096: 398,605 tokens, 1,485,568 bytes
    loss 4.2234 | perplexity 68.26 | bits/byte 1.6349 | accuracy 26.66% | out/ckpt.safetensors, 8,706 tok/s, 0.47 GiB

Every token of the text is predicted exactly once, from at least block_size - stride tokens before it, or from all
where there are fewer: a window of block_size tokens moves by `stride` tokens. For each checkpoint it prints the mean
loss in nats per token; the perplexity, which is exp(loss); bits per byte of the text, which can be compared between
tokenizers; the accuracy, the share of tokens that the model held the most probable one; and the speed and the peak
memory. An adapter is a checkpoint too: its base is found. Figures of other windows than the model's whole context are
told to be so; those of two models can be compared if their windows are equally long.
"""
import math
import os
import re
import shlex
import time

import blas  # noqa: F401  (before mlx)
import mlx.core as mx

from config import UserError, overrides
from lora import load_adapted
from model import compute_dtype
from score import in_windows, read_tokens, score, window_length
from tokenizer import Tokenizer

checkpoint = ()    # checkpoints or adapters; none: out/ckpt.safetensors
adapter = ()       # an adapter for each checkpoint, PATH or PATH:WEIGHT; can be given several times
data = ""          # a text file, or a folder that data.py made
block_size = 0     # tokens of context; 0: the model's, but 1,024 at most; a larger one than in training tests that, too
stride = 0         # tokens by which the window moves; 0: half of block_size
batch_size = 16    # windows at a time
max_tokens = 0     # only this many of the first tokens; 0: the whole text
kv_bits = 0        # 8 | 4: quantize keys and values to this many bits, as sample.py does; 0: no cache
dtype = "auto"     # float32 | bfloat16 | float16; auto: bfloat16 on a GPU, float32 on a CPU

settings = overrides(globals(), "checkpoint")

if not data:
    raise UserError("there is no text to evaluate on: give --data=FILE")
if batch_size < 1 or max_tokens < 0 or block_size < 0:
    raise UserError("batch_size must be 1 or more, max_tokens and block_size 0 or more")
if kv_bits not in (0, 4, 8):
    raise UserError(f"kv_bits={kv_bits} is not one of 0, 4, 8")
checkpoint = checkpoint or ("out/ckpt.safetensors",)
for path in checkpoint:  # before the first is measured, which may take long
    if not os.path.exists(path):
        raise UserError(f"no checkpoint at {path}: train one with `python train.py`, or check the name")

told = ""
for path in checkpoint:
    model, meta = load_adapted(path, adapter)
    if not meta.get("tokenizer"):
        raise UserError(f"{path} holds no tokenizer to encode a text with: give another checkpoint")
    enc = Tokenizer.from_dict(meta["tokenizer"])
    model.set_dtype(compute_dtype(dtype))

    tokens, T = read_tokens(data, enc, max_tokens=max_tokens), window_length(model.config, block_size)
    if not 0 <= stride <= T:
        raise UserError(f"stride={stride}: it must be from 1 to {T}")
    mx.reset_peak_memory()
    began = time.perf_counter()
    nats, accuracy = score(model, tokens, enc.start, T, stride, batch_size, kv_bits)
    seconds = time.perf_counter() - began
    if not math.isfinite(nats):
        raise UserError(f"{path} has the loss {nats}: its logits are too large; try --dtype=float32")

    tokens = tokens[1 - len(enc.start):]  # those that something precedes
    n_bytes = int(enc.token_bytes[tokens].sum())
    text = f"{data}: {len(tokens):,} tokens, {n_bytes:,} bytes{in_windows(model.config, T)}"
    if text != told:  # checkpoints may have different tokenizers
        print(text)
        if not told and re.search(r"\.(jsonl|json|csv|tsv)$", data.lower()):
            print(f"    names of fields and quotes included; python data.py --source={shlex.quote(data)} "
                  f"--tokenizer={shlex.quote(meta['files'][0])} makes tokens of a field's texts alone")
        told = text
    print(f"loss {nats:.4f} | perplexity {math.exp(min(nats, 700)):.2f} | "
          f"bits/byte {nats * len(tokens) / max(n_bytes, 1) / math.log(2):.4f} | accuracy {accuracy:.2%} | "
          f"{path}, {len(tokens) / seconds:,.0f} tok/s, {mx.get_peak_memory() / 2**30:.2f} GiB", flush=True)
