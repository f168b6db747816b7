"""Conversations: jsonl files of them, chat templates, and their tokens, of which some are to be learned.

    conversations = read_conversations("tasks.jsonl")
    ids, learned = encode(enc, conversations[0], "chatml")   # learned: True for the tokens of responses
    ids = encode_prompt(enc, [{"role": "user", "content": "Hello"}], "chatml")   # ends where the answer begins
    rows = pack([(ids, learned), ...], block_size)           # several examples a row, for model.loss(..., places=)

A line of a file is {"messages": [{"role": "system" | "user" | "assistant", "content": ...}, ...]}, or {"instruction",
"input", "output"} (input may be missing), or {"prompt", "response"}.
"""
import json
import re
import sys

import numpy as np

from config import UserError
from model import DOCUMENT, PADDING
from tokenizer import Tokenizer

# For each role, what stands before and after its text. An answer ends with the template's own mark where the tokenizer
# has that as a special token, else with the end-of-text token; what follows it stands before the next turn only.
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
    """convert(the object of each line). Where a line is not JSON or convert raises ValueError, the first ten are told
    with their numbers, and UserError is raised."""
    found, bad = [], []
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    found.append(convert(json.loads(line)))
                except ValueError as error:  # JSONDecodeError is one
                    what = f"no JSON ({error})" if isinstance(error, json.JSONDecodeError) else str(error)
                    bad.append(f"{path}, line {number}: {what}")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it first") from error
    if bad:
        print("\n".join(bad[:10]), file=sys.stderr)
        raise UserError(f"{len(bad)} bad lines in {path}, of which {min(10, len(bad))} stand above: mend them")
    if not found:
        raise UserError(f"{path} is empty: give one conversation a line")
    return found


def read_conversations(path: str) -> list[list[dict]]:
    return read_jsonl(path, to_messages)


def to_messages(line) -> list[dict]:
    """The messages of a line, the last of them an answer. ValueError says what is wrong with it."""
    if not isinstance(line, dict):
        raise ValueError("not an object of fields in { }")
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
    """The role and content of each message. ValueError says what is wrong."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError("messages is not a list of objects")
    for message in messages:
        if message.get("role") not in ROLES:
            raise ValueError(f"unknown role {message.get('role')!r}: it must be one of {', '.join(ROLES)}")
    return [{"role": message["role"], "content": text_of(message, "content")} for message in messages]


def text_of(line: dict, field: str) -> str:
    if not isinstance(line.get(field), str):
        raise ValueError(f"{field} is missing" if field not in line else f"{field} is not a text")
    return line[field]


def turns(prompt: str, response: str) -> list[dict]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


# ---- tokens ----------------------------------------------------------------------------------------------------------


def check_template(name: str) -> str:
    if name not in TEMPLATES:
        raise UserError(f"template={name!r} is not one of {', '.join(TEMPLATES)}")
    return name


def encode_marked(enc: Tokenizer, text: str) -> list[int]:
    """Tokens of a template's text: where it names a special token that the tokenizer has, that token."""
    if not enc.special:
        return enc.encode(text).tolist()
    ids = []
    for part in re.split(f"({'|'.join(map(re.escape, enc.special))})", text):
        ids += [enc.special[part]] if part in enc.special else enc.encode(part).tolist()
    return ids


def end_of_answer(enc: Tokenizer, template: str) -> int:
    return enc.special.get(TEMPLATES[template]["end"], enc.eot)


def encode(enc: Tokenizer, messages: list[dict], template: str) -> tuple[list[int], list[bool]]:
    """Tokens of a conversation, and which of them are an answer or end one. It begins with the template's start, or as
    documents in training do."""
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
        learned += [False] * len(before) + [answer] * len(content) + [False] * len(after)
    return ids, learned


def encode_prompt(enc: Tokenizer, messages: list[dict], template: str, role: str = "assistant") -> list[int]:
    """Tokens of a conversation up to where the next message, of this role, begins."""
    ids, _ = encode(enc, [*messages, {"role": role, "content": ""}], template)
    end = 1 if role == "assistant" else len(encode_marked(enc, TEMPLATES[template][role][1]))
    return ids[:len(ids) - end]


def shorten(examples: list, block_size: int) -> tuple[list, int, int]:
    """Cut examples (ids, learned) to block_size + 1 tokens, and leave out those that then have nothing to learn.
    Returns what is left, how many were cut, and how many left out."""
    cut = sum(len(ids) > block_size + 1 for ids, _ in examples)
    short = [(ids[:block_size + 1], learned[:block_size + 1]) for ids, learned in examples]
    left = [(ids, learned) for ids, learned in short if any(learned[1:])]
    return left, cut, len(short) - len(left)


def pack(examples: list, block_size: int, together: bool = True) -> dict[str, np.ndarray]:
    """Rows (R, block_size) of examples (ids, learned): "idx", "targets", "mask" (1 where the target is learned),
    "places" (each token's position, and its document: see model.py). together: several examples a row where they fit,
    longest first; else one. No target reaches from one example into the next."""
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
