"""Conversations: reading them from .jsonl files, chat templates, and tokens with a loss mask.

    conversations = read_conversations("tasks.jsonl")
    ids, learned = encode(enc, conversations[0], "chatml")   # learned: True for tokens of the assistant's messages
    ids = encode_prompt(enc, [{"role": "user", "content": "Hello"}], "chatml")   # ends where the answer begins
    rows = pack([(ids, learned), ...], block_size)           # several examples in a row, for model.loss(..., places=)

A line of a file is a JSON object: {"messages": [{"role": "system" | "user" | "assistant", "content": ...}, ...]}, or
{"instruction": ..., "input": ..., "output": ...}, where input is optional, or {"prompt": ..., "response": ...}.
"""
import json
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
ROLES = ("system", "user", "assistant")


# ---- files -----------------------------------------------------------------------------------------------------------


def read_jsonl(path: str, convert) -> list:
    """convert(object) for the JSON object in each line. A line is bad if it is not JSON or convert raises ValueError.
    The first ten bad lines are printed with their numbers, and UserError is raised."""
    found, bad = [], []
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    found.append(convert(json.loads(line)))
                except ValueError as error:  # JSONDecodeError is one
                    what = f"no JSON can be read ({error})" if isinstance(error, json.JSONDecodeError) else str(error)
                    bad.append(f"{path}, line {number}: {what}")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it first") from error
    if bad:
        print("\n".join(bad[:10]), file=sys.stderr)
        raise UserError(f"{len(bad)} bad lines in {path}, of which {min(10, len(bad))} are shown above: correct them")
    if not found:
        raise UserError(f"{path} is empty: it must have a conversation in each line")
    return found


def read_conversations(path: str) -> list[list[dict]]:
    """The messages of each line of a .jsonl file."""
    return read_jsonl(path, to_messages)


def to_messages(line) -> list[dict]:
    """The messages of a line; the last one is the assistant's. ValueError tells what is wrong with the line."""
    if not isinstance(line, dict):
        raise ValueError("not an object in { }")
    if "messages" in line:
        messages = check_messages(line["messages"])
        if not messages or messages[-1]["role"] != "assistant":
            raise ValueError("the last message is not the assistant's")
    elif "instruction" in line and "output" in line:
        given = text_of(line, "instruction"), text_of(line, "input") if line.get("input") is not None else ""
        messages = turns("\n\n".join(part for part in given if part), text_of(line, "output"))
    elif "prompt" in line and "response" in line:
        messages = turns(text_of(line, "prompt"), text_of(line, "response"))
    else:
        raise ValueError("it has neither messages, nor instruction and output, nor prompt and response")
    for message in messages:
        if message["role"] == "assistant" and not message["content"].strip():
            raise ValueError("an empty response")
    return messages


def check_messages(messages) -> list[dict]:
    """The role and content of each message. ValueError tells what is wrong."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError("messages is not a list of objects")
    for message in messages:
        if message.get("role") not in ROLES:
            raise ValueError(f"unknown role {message.get('role')!r}: it must be one of {', '.join(ROLES)}")
    return [{"role": message["role"], "content": text_of(message, "content")} for message in messages]


def text_of(line: dict, field: str) -> str:
    """The text in a field. ValueError if it is missing or not a text."""
    if not isinstance(line.get(field), str):
        raise ValueError(f"{field} is missing" if field not in line else f"{field} is not a text")
    return line[field]


def turns(prompt: str, response: str) -> list[dict]:
    """A user's message and the assistant's."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


# ---- tokens ----------------------------------------------------------------------------------------------------------


def check_template(name: str) -> str:
    if name not in TEMPLATES:
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


def encode(enc: Tokenizer, messages: list[dict], template: str) -> tuple[list[int], list[bool]]:
    """The tokens of a conversation, and for each whether it is learned: whether it belongs to a message of the
    assistant, its end token included, unless the message has "weight": 0. The first token is the template's start token
    if the tokenizer has it, else bos."""
    form = TEMPLATES[template]
    ids = encode_marked(enc, form["start"]) if form["start"] in enc.special else [enc.bos]
    learned = [False] * len(ids)
    for i, message in enumerate(messages):
        before, after = (encode_marked(enc, mark) for mark in form[message["role"]])
        content, answer = enc.encode(message["content"]).tolist(), message["role"] == "assistant"
        if answer:
            content.append(end_of_answer(enc, template))
            after = after if i + 1 < len(messages) else []
        ids += before + content + after
        yes = answer and message.get("weight") != 0
        learned += [False] * len(before) + [yes] * len(content) + [False] * len(after)
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
