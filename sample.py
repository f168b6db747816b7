"""Generate text with a checkpoint.

    python sample.py out/ckpt.safetensors --prompt="def main"
    def main(from):
        ...
    [200 tokens, 269.9 tok/s, 1.5 GB/s, first 0.02 s, 0.01 GiB, cache 1.05 MB]

    python sample.py out/ckpt.safetensors                     # asks for one prompt after another
    python sample.py out-sft/sft.safetensors --prompt="Name three birds."
    python sample.py out/ckpt.safetensors --prompts=prompts.txt --out=texts.jsonl --batch_size=32

A checkpoint that was tuned on conversations, by sft.py or by its makers, answers through its chat template: the prompt
is a message, the generated text is the answer, and on a terminal the conversation goes on until an empty line. The
template that came with a model of another project is run by jinja2. --template=none continues the text instead.
The checkpoint may be an adapter: its base is found through its header. --adapter=PATH adds another one to it, or with
--adapter=PATH:0.5 half of it, and can be given several times. --merge=True folds all adapters into the weights, which
is faster.

--prompts names a file of prompts: a line each, or rows with a "prompt" (.jsonl, .json, .csv, .tsv, .parquet). They are
continued batch_size at a time, and a text that ends makes room for the next one. A row {"prompt": ..., "text": ...} is
written for each of them, in their order, to --out or to standard output. A text depends on the seed and on its place in
the file.

--draft=CKPT names a small checkpoint with the same tokenizer, which drafts n_draft tokens that the large one then reads
at once. The text is the large model's own, sooner where the drafts are often right.

--parallel=tensor, under mlx.launch -n 2 -- python sample.py ..., lets two devices share out every matrix and the cache.

--steer=FILE:STRENGTH adds a direction that steer.py or probe.py wrote, times the strength, to the model's states at all
positions; FILE:remove takes it out of them. It can be given several times.

Text is printed as it is generated. A line after each text tells how many tokens were generated; tokens a second; the
bytes of weights and key/value cache that were read a second, which bounds the speed; the time until the first token;
the peak of all memory; and the size of the key/value cache, which in a layer without a window has room for a multiple
of 256 tokens.
"""
import codecs
import contextlib
import json
import os
import sys
import time

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
from mlx.utils import tree_flatten
from tqdm import tqdm

from batching import check_rows, generate_many
from config import UserError, overrides
from conversations import encode_prompt, ends_of_text, template_of
from lora import base_fingerprint, load_adapted
from lora import merge as merge_adapters
from model import compute_dtype, generate, no_tap
from rows import ENDINGS, open_text, read_rows
from speculative import check_draft, generate_by_draft
from steering import steered
from tokenizer import Tokenizer

try:
    import parallel as shared  # what several devices share out
except ImportError:
    shared = None

# model
checkpoint = "out/ckpt.safetensors"  # from train.py; or a checkpoint or an adapter of sft.py or dpo.py
adapter = ()              # an adapter for it, PATH or PATH:WEIGHT; can be given several times
merge = False             # fold the adapters into the weights
steer = ()                # FILE:STRENGTH or FILE:remove: change states by a direction; can be given several times
# text
prompt = ""               # the beginning of the text, or a message; "": ask for it on a terminal, else a new document
max_new_tokens = 200      # tokens to generate at most
prompts = ""              # a file of prompts, which are all continued
out = ""                  # of --prompts: the file to write; "": standard output
batch_size = 16           # of --prompts: texts at a time
draft = ""                # a small checkpoint that drafts tokens
n_draft = 4               # tokens that it drafts at a time
num_samples = 1           # texts for each prompt
stop = ""                 # end a text before this string; several are separated by |
template = ""             # own | plain | alpaca | chatml | llama3: answer; none: continue the text; "": as trained
system = ""               # with a template: the system message
# sampling
temperature = 0.8         # 0: always the most probable token; 1: the model's own distribution
top_k = 200               # keep the k most probable tokens; 0: all
top_p = 1.0               # keep the fewest tokens whose probabilities sum to this
min_p = 0.0               # keep tokens with at least this share of the largest probability
repetition_penalty = 1.0  # above 1: tokens that are in the text already become less probable
seed = 1337               # of the random draws
kv_bits = 0               # 8 | 4: quantize the key/value cache to this many bits; 0: do not
parallel = ""             # tensor: the processes of mlx.launch share out the model
dtype = "auto"            # float32 | bfloat16 | float16; auto: bfloat16 on a GPU, float32 on a CPU

settings = overrides(globals(), "checkpoint", "prompt")

if not 0 <= temperature < float("inf") or not 0 < top_p <= 1 or not 0 <= min_p <= 1 or repetition_penalty <= 0:
    raise UserError("temperature must be 0 or more, top_p over 0 and up to 1, min_p 0 to 1, repetition_penalty over 0")
if kv_bits not in (0, 4, 8):
    raise UserError(f"kv_bits={kv_bits} is not one of 0, 4, 8")
if not 0 <= seed < 2**63:
    raise UserError(f"seed={seed}: it must be from 0 to 2^63 - 1")
if prompts and (prompt or kv_bits):
    raise UserError("--prompts goes with neither --prompt nor --kv_bits: leave one of them out")
if out and not prompts:
    raise UserError(f"out={out}: only texts of --prompts=FILE are written to a file; use > to keep other output")
if out and os.path.exists(out):
    raise UserError(f"{out} exists: remove it, or give another name to --out")
if draft and (prompts or repetition_penalty != 1):
    raise UserError("--draft goes with neither --prompts nor --repetition_penalty: leave one of them out")
if n_draft < 1:
    raise UserError("n_draft must be 1 or more")
if batch_size < 1 or num_samples < 1:
    raise UserError("batch_size and num_samples must be 1 or more")

if parallel not in ("", "tensor"):
    raise UserError(f"parallel={parallel!r} is not tensor, the only mode in which devices write one text")
if parallel and (draft or steer or not (prompt or prompts)):
    raise UserError("--parallel goes with --prompt or --prompts, and with neither --draft nor --steer")

model, meta = load_adapted(checkpoint, adapter)
if not meta.get("tokenizer"):
    raise UserError(f"{checkpoint} holds no tokenizer to encode a prompt with: give another checkpoint")
enc = Tokenizer.from_dict(meta["tokenizer"])
tap = steered(model, steer, base_fingerprint(model)) if steer else no_tap
if merge:
    merge_adapters(model)
form = template_of(meta, enc, template)
ends = ends_of_text(enc, meta, form)
opening = [{"role": "system", "content": system}] if system else []
if system and form != "none":
    encode_prompt(enc, [*opening, {"role": "user", "content": prompt}], form)  # UserError if it has no system message
model.make_cache(kv_bits)  # UserError, before the prompt is printed, where head_dim does not suit kv_bits
model.set_dtype(compute_dtype(dtype))
if parallel:
    if not shared:
        raise UserError("--parallel needs parallel.py, which is missing: leave it out")
    shared.share(parallel, model, None, mx.distributed.init())
    if mx.distributed.init().rank():  # the first process writes
        out, sys.stdout, sys.stderr = "", *[open(os.devnull, "w")] * 2
mx.eval(model.parameters())
if draft:
    drafting, its_meta = load_adapted(draft, ())
    if its_meta.get("tokenizer") != meta["tokenizer"]:
        raise UserError(f"{draft} has another tokenizer than {checkpoint}: train both with one")
    check_draft(model, drafting)
    drafting.set_dtype(compute_dtype(dtype))
    mx.eval(drafting.parameters())
config = model.config
idle = 1 - config.expert_top_k / max(1, config.n_expert)  # share of the experts that a token does not run through
weight_bytes = sum(p.nbytes * (1 - idle * (p.ndim == 3)) for name, p in tree_flatten(model.parameters())
                   if "embed" not in name or config.tie and name.startswith("embed."))  # a lookup reads one row only
size = compute_dtype(dtype).size
number = kv_bits / 8 + 2 * size / 32 if kv_bits else size  # bytes of a number; 32 quantized ones share scale and bias
cache_bytes = 2 * config.n_kv_head * config.head_dim * number  # of one position in one layer
stops = [part for part in stop.split("|") if part]


def ask() -> str:
    try:
        return input("> ")
    except EOFError:  # Ctrl-D
        print()
        return ""


def held(layer, positions: float) -> float:
    """How many of the positions read so far a layer's cache holds."""
    if hasattr(layer, "rows"):  # mod
        return positions * config.mod_capacity  # mod
    return min(positions, getattr(layer, "window", positions))


def end_of(new: str) -> tuple[int, int]:
    """Where a stop string begins in `new` (-1: it has none), and how many characters at the end of `new` may be the
    beginning of one."""
    found = min((new.find(part) for part in stops if part in new), default=-1)
    return found, max((n for part in stops for n in range(1, len(part)) if new.endswith(part[:n])), default=0)


def encoded(prompt: str, before: list[dict]) -> list[int]:
    """The token ids after which the text of a prompt begins."""
    if form == "none":
        return [*enc.start, *enc.encode(prompt).tolist()] or [enc.eot]
    return encode_prompt(enc, [*before, {"role": "user", "content": prompt}], form)


def read_prompts(path: str) -> list[str]:
    """The prompts of a file."""
    if not path.lower().endswith(ENDINGS):
        with open_text(path) as file:
            return [line.rstrip("\r\n") for line in file if line.strip()]
    found = []
    for where, row in read_rows(path):
        if isinstance(row, ValueError) or not isinstance(row.get("prompt"), str):
            raise UserError(f"{where}: {row if isinstance(row, ValueError) else 'it has no text named prompt'}")
        found.append(row["prompt"])
    return found


def write_many(given: list[str], file):
    """Continue all prompts, and write a row for each to the file, in their order."""
    given, began, made = [text for text in given for _ in range(num_samples)], time.perf_counter(), 0
    texts, over, following = [b""] * len(given), [False] * len(given), 0
    ids = [encoded(text, opening) for text in given]
    if long := sum(len(each) > config.block_size for each in ids):
        print(f"{long} prompts have more than {config.block_size} tokens: only their last {config.block_size} are read",
              file=sys.stderr)

    def stopped(number: int, token: int) -> bool:
        return any(part.encode() in texts[number] for part in stops)

    with tqdm(total=len(given), unit=" texts", disable=None, dynamic_ncols=True) as bar:
        for number, token in generate_many(
                model, ids, max_new_tokens, batch_size, ends, stopped,
                temperature, top_k, top_p, min_p, repetition_penalty, seed, enc.n_vocab, tap):
            if token is not None:
                if token >= enc.n_vocab:  # where a logit is NaN
                    raise UserError(f"the logits of {checkpoint} are not finite: give --dtype=float32")
                texts[number] += enc.decode_bytes([token])
                made += 1
                continue
            over[number] = True
            bar.update()
            while following < len(given) and over[following]:
                text = texts[following].decode("utf-8", "replace")
                text = text[:found] if (found := end_of(text)[0]) >= 0 else text
                print(json.dumps({"prompt": given[following], "text": text}, ensure_ascii=False), file=file, flush=True)
                following += 1
    seconds = time.perf_counter() - began
    print(f"[{len(given)} texts, {made} tokens, {made / seconds:.1f} tok/s, {mx.get_peak_memory() / 2**30:.2f} GiB]",
          file=sys.stderr)


def write(prompt: str, seed: int, before: list[dict]) -> str:
    """Continue a prompt on standard output; or, with a template, answer it as the message that follows those in
    `before`. The text ends at a stop string, a token that ends a text or max_new_tokens. Returns the new text."""
    ids = encoded(prompt, before)
    if len(ids) > config.block_size:
        print(f"the prompt has {len(ids)} tokens: only the last {config.block_size} are read", file=sys.stderr)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character can take several tokens
    if form == "none":
        print(prompt, end="", flush=True)
    text, new, count, cache, began = "", "", 0, model.make_cache(kv_bits), time.perf_counter()
    kept, sampling = {}, dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed,
                              n_vocab=enc.n_vocab, cache=cache, tap=tap)
    if draft:
        tokens = generate_by_draft(model, drafting, ids, max_new_tokens, n_draft, count=kept, **sampling)
    else:
        tokens = generate(model, ids, max_new_tokens, repetition_penalty=repetition_penalty, **sampling)
    for token in tokens:
        count += 1
        if count == 1:
            first = time.perf_counter()
        if token in ends:
            break
        if token >= enc.n_vocab:  # where a logit is NaN
            raise UserError(f"the logits of {checkpoint} are not finite: give --dtype=float32, or another checkpoint")
        new += decoder.decode(enc.decode_bytes([token]))
        found, waiting = end_of(new)
        if found >= 0:
            new = new[:found]
            decoder.reset()  # it may hold the first bytes of a character after the stop string
            break
        print(new[:len(new) - waiting], end="", flush=True)
        text += new[:len(new) - waiting]
        new = new[len(new) - waiting:]
    new += decoder.decode(b"", True)
    print(new, flush=True)
    if count > 1:
        speed = (count - 1) / (time.perf_counter() - first)
        positions = min(len(ids) + count / 2, config.block_size)  # in the cache, on average
        read = weight_bytes + sum(held(layer, positions) for layer in cache.layers[:config.n_layer]) * cache_bytes
        reads = (f"{kept['kept'] / max(1, kept['drafted']):.0%} of drafts kept" if draft else
                 f"{read * speed / 1e9:.1f} GB/s")
        print(f"[{count} tokens, {speed:.1f} tok/s, {reads}, first {first - began:.2f} s, "
              f"{mx.get_peak_memory() / 2**30:.2f} GiB, cache {cache.nbytes / 1e6:.2f} MB]", file=sys.stderr)
    return text + new


sys.stdout.reconfigure(errors="replace")  # characters that the terminal's encoding lacks become "?"
with contextlib.suppress(ImportError):
    import readline  # noqa: F401  (input() gains a history and editing)

if prompts:
    check_rows(model, batch_size)  # UserError, before any file is made
    given = read_prompts(prompts)
    if out:
        part = f"{out}.part"  # what is finished stays there if the run is stopped
        with open(part, "w", encoding="utf-8") as file:
            write_many(given, file)
            os.fsync(file.fileno())
        os.replace(part, out)
    else:
        write_many(given, sys.stdout)
elif prompt or not sys.stdin.isatty():
    for i in range(num_samples):
        write(prompt, seed + i, opening)
else:
    if form == "none" and not template:
        print("The checkpoint has no chat template: it continues a text.")
    print("Write the beginning of a text; an empty line ends." if form == "none" else
          "Write a message; an empty line ends the conversation.")
    while prompt := ask():
        try:
            for i in range(num_samples):
                answer = write(prompt, seed + i, opening)
            if form != "none":  # the conversation goes on
                opening += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        except UserError as error:  # the tokenizer may lack a character: ask again
            print(error, file=sys.stderr)
