"""Chat templates: conversations as tokens with a loss mask, and several of them in a row.

    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]
    ids, learned = encode(enc, messages, "chatml")        # learned: True for tokens of the assistant's messages
    ids = encode_prompt(enc, messages[:1], "chatml")      # ends where the answer begins
    rows = pack([(ids, learned), ...], block_size)        # several examples in a row, for model.loss(..., places=)

A message has a role (system, user or assistant) and a content. records.py reads conversations from files.
"""
import re
import sys

import numpy as np

from config import UserError
from model import DOCUMENT, PADDING
from tokenizer import Tokenizer

# For each role, the texts before and after a message. The assistant's message ends with the special token "end" if the
# tokenizer has it, else with the end-of-text token; the text after that message is left out after the last message.
TEMPLATES = {
    "plain": {"start": "", "system": ("", "\n\n"), "user": ("", "\n\n"), "assistant": ("", "\n\n"), "end": ""},
    "alpaca": {"start": "", "system": ("", "\n\n"), "user": ("### Instruction:\n", "\n\n"),
               "assistant": ("### Response:\n", "\n\n"), "end": ""},
    "chatml": {"start": "", "system": ("<|im_start|>system\n", "<|im_end|>\n"),
               "user": ("<|im_start|>user\n", "<|im_end|>\n"), "assistant": ("<|im_start|>assistant\n", "\n"),
               "end": "<|im_end|>"},
    "llama3": {"start": "<|begin_of_text|>", "system": ("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
               "user": ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
               "assistant": ("<|start_header_id|>assistant<|end_header_id|>\n\n", ""), "end": "<|eot_id|>"},
}


def turns(prompt: str, response: str) -> list[dict]:
    """A user's message and the assistant's."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


# ---- tokens ----------------------------------------------------------------------------------------------------------


def check_template(name: str) -> str:
    if name not in [*TEMPLATES]:  # a damaged header may hold a list here, which no dict can look up
        raise UserError(f"template={name!r} is not one of {', '.join(TEMPLATES)}")
    return name


def encode_marked(enc: Tokenizer, text: str) -> list[int]:
    """Tokens of a template's text, in which names of special tokens stand for these tokens."""
    if not enc.special:
        return enc.encode(text).tolist()
    ids = []
    for part in re.split(f"({'|'.join(map(re.escape, enc.special))})", text):
        ids += [enc.special[part]] if part in enc.special else enc.encode(part).tolist()
    return ids


def end_of_answer(enc: Tokenizer, template: str) -> int:
    """The token that ends a message of the assistant."""
    return enc.special.get(TEMPLATES[template]["end"], enc.eot)


def encode(enc: Tokenizer, messages: list[dict], template: str, learn_prompts: bool = False,
           ) -> tuple[list[int], list[bool]]:
    """The tokens of a conversation, and for each whether it is learned: whether it belongs to a message of the
    assistant, with the token that ends the message, or, with learn_prompts, to anything. A message with "weight": 0 is
    not learned. The first token is the template's start token if the tokenizer has it, else bos."""
    form = TEMPLATES[template]
    ids = encode_marked(enc, form["start"]) if form["start"] in enc.special else [enc.bos]
    learned = [learn_prompts] * len(ids)
    for i, message in enumerate(messages):
        before, after = (encode_marked(enc, mark) for mark in form[message["role"]])
        content, answer = enc.encode(message["content"]).tolist(), message["role"] == "assistant"
        if answer:
            content.append(end_of_answer(enc, template))
            after = after if i + 1 < len(messages) else []
        ids += before + content + after
        yes = (answer or learn_prompts) and message.get("weight") != 0
        learned += [learn_prompts] * len(before) + [yes] * len(content) + [learn_prompts] * len(after)
    return ids, learned


def encode_prompt(enc: Tokenizer, messages: list[dict], template: str, role: str = "assistant") -> list[int]:
    """The tokens of a conversation, and those that begin the next message, which is of this role."""
    ids, _ = encode(enc, [*messages, {"role": role, "content": ""}], template)
    end = 1 if role == "assistant" else len(encode_marked(enc, TEMPLATES[template][role][1]))
    return ids[:len(ids) - end]


def shorten(examples: list, block_size: int) -> tuple[list, int, int]:
    """Cut examples (ids, learned) to block_size + 1 tokens, and drop those without a learned token. Returns the other
    examples, how many were cut, and how many were dropped."""
    cut = sum(len(ids) > block_size + 1 for ids, _ in examples)
    short = [(ids[:block_size + 1], learned[:block_size + 1]) for ids, learned in examples]
    left = [(ids, learned) for ids, learned in short if any(learned[1:])]
    return left, cut, len(short) - len(left)


def pack(examples: list, block_size: int, together: bool = True) -> dict[str, np.ndarray]:
    """Put examples (ids, learned) into rows (R, block_size): "idx", "targets", "mask" (1 where the target is learned),
    and "places" (position and document of each token: see model.py). together: examples share a row where they fit, the
    longest first; otherwise each has a row of its own. A target is always of the same example as its input."""
    room, rows = [], []
    for example in sorted(examples, key=lambda example: -len(example[0])):
        need = len(example[0]) - 1
        fitting = (i for i, left in enumerate(room) if left >= need and len(rows[i]) < PADDING // DOCUMENT)
        row = next(fitting, None) if together else None
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(block_size)
        rows[row].append(example)
        room[row] -= need
    shape = len(rows), block_size
    found = {"idx": np.zeros(shape, np.int32), "targets": np.zeros(shape, np.int32),
             "mask": np.zeros(shape, np.float32), "places": np.full(shape, PADDING, np.int32)}
    for row, packed in enumerate(rows):
        start = 0
        for number, (ids, learned) in enumerate(packed):
            part = row, slice(start, start + len(ids) - 1)
            found["idx"][part], found["targets"][part], found["mask"][part] = ids[:-1], ids[1:], learned[1:]
            found["places"][part] = number * DOCUMENT + np.arange(len(ids) - 1)
            start += len(ids) - 1
    return found


if __name__ == "__main__":
    print(f"{sys.argv[0]} has no command of its own: run sft.py, which uses it", file=sys.stderr)
    sys.exit(2)
