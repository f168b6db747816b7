"""Make instruction data with a chat-tuned checkpoint: it writes a user's turn, and then answers it.

    python magpie.py out-sft/sft.safetensors --n=1000
    python magpie.py out-sft/sft.safetensors --n=2000 --resume=True      # adds to the file
    python sft.py out/ckpt.safetensors --data=magpie.jsonl

Magpie (Xu et al. 2024): a tuned model is given its template up to where the user's turn begins, and so it writes a
user's turn. The models of the paper had seen user's turns in training. A model that sft.py has tuned can write them
only if it was tuned with --learn_prompts=True.

Each line of the file is {"messages": [...], "batch": number of the batch that made it}. Conversations are left out for
these reasons, which are counted for each turn: unended (no end mark within the context); short (a prompt of fewer than
min_words words, or an answer without a word); repetitive (more than max_repetition of the word triples of a turn are
repetitions of an earlier one); known (the prompt resembles one of the file or of --avoid: the Jaccard index of their
runs of five characters is above max_similarity).

A batch is made whole: all of its prompts, then the answers to those that pass. --rows texts are written at a time, and
one that ends makes room for the next one of the batch, so that a batch of several times as many keeps all rows in use.
The random numbers of a batch depend on --seed, the name of the file and the number of the batch. So a run that is
stopped and resumed writes the same file as a run without a stop, and two runs that write to files of different names
make different conversations. Ctrl-C stops after the conversations that are in the file.
"""
import json
import math
import os
import re
import shlex
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable

import blas  # noqa: F401  (before mlx)
import numpy as np
from tqdm import tqdm

import run_folder
from batching import check_rows, generate_many
from config import UserError, check_output, overrides
from conversations import encode_prompt, end_of_prompt, ends_of_text, row_length, template_of, turns
from draw import check_folder
from lora import chain_of, load_adapted, path_and_weight
from lora import merge as merge_adapters
from model import compute_dtype
from records import read_conversations
from tokenizer import Tokenizer

# model
checkpoint = "out-sft/sft.safetensors"  # a checkpoint or an adapter that was tuned on conversations
adapter = ()              # an adapter for it, PATH or PATH:WEIGHT; can be given several times
template = ""             # own | plain | alpaca | chatml | llama3; "": the one that the model was tuned with
system = ""               # the system message of every conversation
block_size = 0            # tokens of a conversation, of which half are for the answer; 0: the context, at most 1024
# output
out = "magpie.jsonl"      # the file to write, for sft.py --data
n = 100                   # conversations in the file at the end
resume = False            # add to the file
overwrite = False         # replace the file without asking
# sampling
batch_size = 128          # conversations of a batch, which is made whole
rows = 32                 # texts at a time; more are faster and need more memory
temperature = 0.8         # of the user's turn; the paper takes 1, which suits large models
top_p = 0.98              # of the user's turn
answer_temperature = 0.6  # 0: the most probable token, as in the paper; small models then repeat themselves
repetition_penalty = 1.0  # of the answer; above 1: tokens that are in the text already become less probable
seed = 1337               # of the random draws
dtype = "auto"            # float32 | bfloat16 | float16; auto: bfloat16 on a GPU, float32 on a CPU
# filters
min_words = 3             # of a prompt
max_repetition = 0.3      # share of word triples that repeat an earlier one of the turn
max_similarity = 0.7      # Jaccard index of the runs of five characters of two prompts
avoid = ""                # a file with prompts to avoid, such as the file that the model was tuned on
patience = 5              # batches without a conversation that passes, after which the script gives up

settings = overrides(globals(), "checkpoint", "out")

SCRIPT = os.path.basename(__file__)
for name in ("n", "batch_size", "rows", "patience"):
    if settings[name] < 1:
        raise UserError(f"{name}={settings[name]}: it must be 1 or more")
if not 0 <= temperature < math.inf or not 0 <= answer_temperature < math.inf:
    raise UserError("temperature and answer_temperature must be 0 or more, and finite")
if not 0 < top_p <= 1 or not 0 < repetition_penalty < math.inf:
    raise UserError("top_p must be over 0 and up to 1, repetition_penalty over 0 and finite")
if overwrite and resume:
    raise UserError("--overwrite=True begins anew and --resume=True goes on: give one of them")
if not 0 <= seed < 2**32:
    raise UserError(f"seed={seed}: it must be from 0 to 2^32 - 1")
check_folder(out)
if os.path.exists(out) and not os.path.isfile(out):
    raise UserError(f"{out} is not a file that can be read again: give another --out")
base, chain = chain_of(checkpoint)
check_output(out, avoid, base, *(path for path, _ in [*chain, *map(path_and_weight, adapter)]))

# ---- the file --------------------------------------------------------------------------------------------------------


def locked_file(mode: str):
    """The file, opened without a buffer, and locked until this process ends."""
    try:
        file = open(out, mode, buffering=0)
    except FileExistsError as error:
        raise UserError(f"another process has made {out} since this one began: give another --out") from error
    if not run_folder.locked(file):
        raise UserError(f"another process is writing {out}: wait until it ends, or give another --out")
    return file


def write(lines: list[bytes]):
    """Add all lines to the file, or none of them if the disk is full."""
    left, size = b"".join(lines), file.seek(0, os.SEEK_END)
    try:
        while left:
            left = left[file.write(left):]
        os.fsync(file.fileno())
    except BaseException as error:
        file.truncate(size)
        if isinstance(error, OSError):
            raise UserError(f"cannot write {out}: {error.strerror}; it holds {kept} conversations, and --resume=True "
                            "goes on") from error
        raise


def row_of(line: bytes, where: str) -> tuple[str, int]:
    """The last prompt of a line of the file, and the number of its batch. UserError if this script has not written
    it."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: no JSON can be read ({error}): give another --out") from error
    row = row if isinstance(row, dict) else {}
    messages, batch = row.get("messages"), row.get("batch")
    turn = messages[-2] if isinstance(messages, list) and len(messages) > 1 else None
    prompt = turn.get("content") if isinstance(turn, dict) else None
    lacks = ("messages with a prompt and an answer" if not isinstance(prompt, str) else
             "number of a batch" if type(batch) is not int or batch < 0 else "")
    if lacks:
        raise UserError(f"{where} has no {lacks}, and so is not of {SCRIPT}: give another --out")
    return prompt, batch


file, lines, asked, numbers = None, [], [], []  # of the file: its lines, and their prompts and batches
if os.path.exists(out):  # locked first, so that no other process can add lines after this one has looked
    file = locked_file("r+b")
    content = file.read()
    if resume:
        lines = [line for line in content.splitlines(True) if line.endswith(b"\n")]  # a crash may have cut the last one
        found = [row_of(line, f"{out}, line {i}") for i, line in enumerate(lines, 1)]
        asked, numbers = [prompt for prompt, _ in found], [number for _, number in found]
        for i, (before, number) in enumerate(zip(numbers, numbers[1:], strict=False), 2):
            if number < before:
                raise UserError(f"{out}, line {i}: batch {number} is out of order, after batch {before}: give another "
                                "--out")
    elif content and not overwrite:
        run_folder.ask_to_replace(f"{out} exists", [
            "--overwrite=True to replace it", "--resume=True to go on with it",
            f"--out={shlex.quote(run_folder.free_name(out, os.path.splitext(out)[1]))}"])
if len(lines) >= n:
    print(f"{out} holds {len(lines)} conversations: give a larger --n for more")
    raise SystemExit

# ---- filters ---------------------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def repetition(text: str) -> float:
    """The share of word triples that repeat an earlier one of the text, 0 to 1; 0 for fewer than three words."""
    found = words(text)
    triples = list(zip(found, found[1:], found[2:], strict=False))
    return 1 - len(set(triples)) / len(triples) if triples else 0.0


def runs_of_five(text: str) -> set[str]:
    plain = f" {' '.join(words(text))} ".ljust(5)
    return {plain[i:i + 5] for i in range(len(plain) - 4)}


class Known:
    """Prompts, and for every run of five characters the numbers of the prompts that hold it."""

    def __init__(self, texts: Iterable[str] = ()):
        self.sizes, self.holders = [], {}
        for text in texts:
            self.add(text)

    def add(self, text: str):
        runs = runs_of_five(text)
        for run in runs:
            self.holders.setdefault(run, []).append(len(self.sizes))
        self.sizes.append(len(runs))

    def similarity(self, text: str) -> float:
        """The largest Jaccard index of this text and one of the prompts, 0 to 1."""
        runs = runs_of_five(text)
        common = Counter(number for run in runs for number in self.holders.get(run, ()))
        return max((both / (len(runs) + self.sizes[number] - both) for number, both in common.items()), default=0.0)


# ---- load ------------------------------------------------------------------------------------------------------------

model, meta = load_adapted(checkpoint, adapter)
if not meta.get("tokenizer"):
    raise UserError(f"{checkpoint} holds no tokenizer: it cannot write conversations")
enc = Tokenizer.from_dict(meta["tokenizer"])
form = template_of(meta, enc, template)
if form == "none":
    raise UserError(f"{checkpoint} was not tuned on conversations: give one that sft.py has tuned, or a --template")
merge_adapters(model)
model.set_dtype(compute_dtype(dtype))
try:
    check_rows(model, rows)
except UserError:  # its rows cannot be of different texts
    rows = 1
opening = [{"role": "system", "content": system}] if system else []
beginning = encode_prompt(enc, opening, form, "user")
mark = end_of_prompt(enc, form, opening).encode()
ends = ends_of_text(enc, meta, form)
room = row_length(1024, model.config.block_size, block_size)
prompt_room = room // 2  # for everything before the answer
answer_room = room - prompt_room
if len(beginning) >= prompt_room:
    whole, todo = (("the context", "train a longer context") if room == model.config.block_size else
                   (f"block_size={room}", "give a larger one"))
    raise UserError(f"the template and the system message take {len(beginning)} tokens, and half of {whole} has "
                    f"{prompt_room}: {todo}")

avoided = [next((message["content"] for message in messages if message["role"] == "user"), "")
           for messages in (read_conversations(avoid) if avoid else [])]
file = file or locked_file("x+b")
file.truncate(sum(map(len, lines)))

# The last batch of the file may not be whole: it is made again, and what it lacks is added.
kept, batch = len(lines), max(numbers, default=0)
whole = sum(number < batch for number in numbers)
known, unfinished = Known([*avoided, *asked[:whole]]), lines[whole:]

# ---- write -----------------------------------------------------------------------------------------------------------


def seed_of(batch: int, turn: int) -> int:
    """A number below 2^63 for the random draws of a turn: 0, the user's, or 1, the assistant's."""
    name = [*os.path.basename(out).encode()]
    return int(np.random.SeedSequence([seed, batch, turn, *name]).generate_state(1, np.uint64)[0]) >> 1


def continued(prompts: list[list[int]], room: int, seed: int, mark: bytes = b"", **sampling) -> list[str | None]:
    """The continuation of each prompt, up to an end token or the mark; None if neither comes within `room` tokens."""
    texts, counts, ended = [b""] * len(prompts), [0] * len(prompts), [False] * len(prompts)
    for number, token in generate_many(model, prompts, room, rows, ends, lambda i, _: mark and mark in texts[i],
                                       seed=seed, n_vocab=enc.n_vocab, **sampling):
        if stops():
            raise KeyboardInterrupt
        if token is None:
            ended[number] = counts[number] < room or mark and mark in texts[number]
            continue
        if token >= enc.n_vocab:  # where a logit is NaN
            raise UserError(f"{checkpoint} has logits that are not finite: give --dtype=float32, or another one")
        texts[number] += enc.decode_bytes([token])
        counts[number] += 1
    texts = [text.partition(mark)[0] if mark else text for text in texts]
    return [text.decode("utf-8", "replace").strip() if done else None
            for text, done in zip(texts, ended, strict=True)]


def conversations(batch: int) -> list[list[dict]]:
    """The conversations of a batch that pass the filters. The others are counted in `dropped`."""
    asked = continued([beginning] * batch_size, prompt_room - len(beginning), seed_of(batch, 0), mark,
                      temperature=temperature, top_p=top_p)
    prompts = []
    for text in asked:
        reason = ("prompt unended" if text is None else "prompt short" if len(words(text)) < min_words else
                  "prompt repetitive" if repetition(text) > max_repetition else
                  "prompt known" if known.similarity(text) > max_similarity else "")
        if reason:
            dropped[reason] += 1
        else:
            prompts.append(text)
    ids = [encode_prompt(enc, [*opening, {"role": "user", "content": text}], form) for text in prompts]
    fitting = [i for i, row in enumerate(ids) if len(row) <= prompt_room]
    dropped["prompt unended"] += len(ids) - len(fitting)
    answers = continued([ids[i] for i in fitting], answer_room, seed_of(batch, 1), temperature=answer_temperature,
                        repetition_penalty=repetition_penalty) if fitting else []
    found = []
    for i, answer in zip(fitting, answers, strict=True):
        reason = ("answer unended" if answer is None else "answer short" if not words(answer) else
                  "answer repetitive" if repetition(answer) > max_repetition else
                  "prompt known" if known.similarity(prompts[i]) > max_similarity else "")  # by another of this batch
        if reason:
            dropped[reason] += 1
        else:
            known.add(prompts[i])
            found.append([*opening, *turns(prompts[i], answer)])
    return found


# ---- loop ------------------------------------------------------------------------------------------------------------

dropped, without, made = Counter(), 0, 0
bar = tqdm(total=n, initial=kept, unit=" conversations", disable=None, dynamic_ncols=True)
last, stops = [], run_folder.catch_stops()
while kept < n:
    try:
        found = conversations(batch)
    except KeyboardInterrupt:
        bar.close()
        print(f"stopped: {out} holds {kept} conversations; --resume=True goes on", file=sys.stderr)
        raise SystemExit(130) from None
    made += batch_size
    lines = [(json.dumps({"messages": messages, "batch": batch}) + "\n").encode() for messages in found]
    if lines[:len(unfinished)] != unfinished:  # made with other settings, or on another machine
        bar.write(f"batch {batch} of {out} was made with other settings: its {len(unfinished)} conversations are kept")
        lines, found, known = unfinished, [], Known([*avoided, *asked])
    lines, unfinished, found = lines[len(unfinished):][:n - kept], [], found[len(unfinished):][:n - kept]
    write(lines)
    kept, batch, without, last = kept + len(found), batch + 1, 0 if found else without + 1, found or last
    bar.update(len(found))
    bar.set_postfix_str(f"{(kept - whole) / made:.0%} kept")
    if without == patience:
        bar.close()
        reasons = ", ".join(f"{count} {reason}" for reason, count in (+dropped).most_common())
        raise UserError(f"none of {patience * batch_size} conversations passed the filters ({reasons}); {out} holds "
                        f"{kept}: tune with sft.py --learn_prompts=True, lower the temperature if prompts are unended, "
                        "or raise answer_temperature if answers are unended or repetitive")
bar.close()

# ---- look at it ------------------------------------------------------------------------------------------------------

for messages in last[:3]:
    for message in messages[-2:]:
        print(textwrap.fill(f"{message['role']}: {message['content']}", 120, subsequent_indent="    "))
print(f"{made} made, {kept - whole} kept"
      + "".join(f", {count} {reason}" for reason, count in (+dropped).most_common()) + f"; {out} holds {kept}")
