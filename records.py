"""Examples from files: conversations, pairs of answers and labelled answers, in the layouts that datasets have.

    conversations = read_conversations("alpaca.json")     # [[{"role", "content"}, ...], ...]
    pairs = read_preferences("hh.jsonl.gz")               # [(messages of the prompt, chosen text, rejected text), ...]
    pairs = read_preferences("judged.jsonl", soft=True)   # [(..., probability that the chosen one is better), ...]
    labelled = read_labelled("kto.parquet")               # [(messages of the prompt, text, 1 good or 0 bad), ...]
    training, held_out = split(conversations, 0.1, seed=1337)
    show(enc, *encode(enc, training[0], "chatml"))        # one example as the model sees it

Files: .jsonl, .json (a list of objects), .csv, .tsv and .parquet; the text files also compressed by gzip. A row is read
by the first layout of the tables below whose fields it has; mixed files are read row by row. Names of fields may have
capitals. The fields system, system_prompt and history are read in all layouts. All other fields are ignored, and named
in the line that is printed. Texts are kept as they are; several texts of a prompt are joined by a blank line.

Messages are a list of {"role", "content"} or {"from", "value"}, of {"input", "output"}, of texts by turns, or of pairs
of a question and an answer. Wherever a text may stand, messages may stand. A content may be a list of parts of text. An
answer with "weight": 0 or "train": false is not learned. Turns after the last answer are left out. A row is skipped,
and counted, if it has an answer without text, a role that the templates lack (such as tool), tools or a call of one, or
an image.
"""
import itertools
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable

import numpy as np

from config import UserError
from rows import loaded, read_rows
from tokenizer import Tokenizer, well_formed

# The fields of each layout; a row may lack those with a question mark. The last field holds the answer, those before it
# the prompt; a single field holds messages.
CONVERSATIONS = {
    "messages": "messages",
    "ShareGPT": "conversations",
    "Capybara": "conversation",
    "prompt and completion": "prompt completion",
    "prompt and response": "prompt response",
    "Alpaca": "instruction input? context? output",
    "Dolly": "instruction input? context? response",
    "OpenOrca": "question context? response",
    "question and answer": "question context? answer",
    "MetaMath": "query response",
    "problem and solution": "problem solution",
    "inputs and targets": "inputs targets",
    "input and output": "input output",
    "Self-Instruct": "instruction instances",  # a list of {"input", "output"}: each becomes a conversation
}
# The last two fields hold the chosen and the rejected answer: texts, or messages that may begin with the prompt.
PREFERENCES = {
    "pairs": "prompt chosen rejected",
    "Alpaca pairs": "instruction input? chosen rejected",
    "Orca pairs": "question context? chosen rejected",
    "distilabel pairs": "input chosen rejected",
    "ShareGPT pairs": "conversations chosen rejected",
    "pairs with an implicit prompt": "chosen rejected",
    "OpenAI pairs": "input preferred_output non_preferred_output",
    "torchtune pairs": "chosen_conversations rejected_conversations",
}
OPENING = ("system", "system_prompt", "history")  # they precede the prompt
TOOLS = ("tools", "functions")
LABELS = ("label", "kto_tag")
GOOD, BAD = ("true", "1", "desirable"), ("false", "0", "undesirable")  # values of a label
MESSAGE = {"role", "content", "from", "value", "input", "output", "weight", "train", "training", "messages"}  # are read
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user",
         **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "ai"), "assistant")}


# ---- messages --------------------------------------------------------------------------------------------------------


def text_of(row: dict, field: str) -> str:
    """The text in a field. ValueError if there is none."""
    value = row.get(field)
    if isinstance(value, list):  # of parts {"type": "text", "text"}
        parts = [part.get("text") for part in value if isinstance(part, dict) and part.get("type") == "text"]
        if len(parts) < len(value) or not all(isinstance(part, str) for part in parts):
            raise ValueError(f"{field} has a part that is not text")
        value = "".join(parts)
    if not isinstance(value, str):
        raise ValueError(f"{field} is missing" if value is None else f"{field} is not a text")
    return well_formed(value)


def message_of(item: dict) -> dict:
    """{"role", "content"}, and "weight" if that is 0."""
    name = item["role"] if item.get("role") is not None else item.get("from")
    role, weight = ROLES.get(str(name).lower()), item.get("weight")
    if item.get("train") is False or item.get("training") is False:
        weight = 0
    if not role:
        raise ValueError(f"role {str(name)[:30]!r} is not one that a template has: system, user, assistant")
    if item.get("tool_calls") or item.get("function_call"):
        raise ValueError("it calls a tool, which a template does not have")
    if weight not in (None, 0, 1):
        raise ValueError(f"weight is {str(weight)[:30]}, not 0 or 1")
    content = text_of(item, "value" if item.get("content") is None and "value" in item else "content")
    return {"role": role, "content": content} | ({"weight": 0} if weight == 0 and role == "assistant" else {})


def messages_of(value, field: str) -> list[dict]:
    """The messages in a field, which may also hold them as a JSON text. ValueError if it holds none."""
    if isinstance(value, str):
        value = loaded(value)
    if isinstance(value, dict):  # OpenAI's input is {"messages": [...]}
        if value.get("tools"):
            raise ValueError(f"{field} has tools, which no prompt here can offer")
        value = value["messages"] if isinstance(value.get("messages"), list) else [value]
    if not isinstance(value, list) or not value:
        raise ValueError(f"{field} has no list of messages")
    if all(isinstance(pair, dict) and {"input", "output"} <= set(pair) for pair in value):
        value = [[pair["input"], pair["output"]] for pair in value]
    if all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        value = [text for pair in value for text in pair]
    if all(isinstance(text, str) for text in value):
        value = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(value)]
    if not all(isinstance(item, dict) for item in value):
        raise ValueError(f"{field} has an item that is not an object in {{ }}")
    return [message_of(item) for item in value]


def hh_messages(text: str) -> list[dict]:
    """The messages of a text in the form of HH, "\\n\\nHuman: ...\\n\\nAssistant: ..."; none if it has another form."""
    before, *parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    return [] if before.strip() or parts[:1] != ["Human"] or "Assistant" not in parts else [
        {"role": "user" if name == "Human" else "assistant", "content": part.strip()}
        for name, part in zip(parts[::2], parts[1::2], strict=True)]


def turn(role: str, row: dict, fields: list[str]) -> list[dict]:
    """The messages in a field; where the fields hold texts, one message of them all."""
    if isinstance(row[fields[0]], list | dict):
        return messages_of(row[fields[0]], fields[0])
    content = "\n\n".join(text for field in fields if (text := text_of(row, field)))
    turns = [message for message in hh_messages(content) if message["content"]] if role == "user" else []
    return turns or [{"role": role, "content": content}]


def with_opening(row: dict, messages: list[dict]) -> list[dict]:
    """The messages, and before them those of the fields in OPENING, unless they begin with these already."""
    first = [{"role": "system", "content": text} for field in OPENING[:2]
             if field in row and (text := text_of(row, field)).strip()]
    first += messages_of(row["history"], "history") if row.get("history", "") not in ("", "[]", []) else []
    return messages if messages[:len(first)] == first else first + messages


# ---- layouts ---------------------------------------------------------------------------------------------------------


def recognise(row: dict, layouts: dict[str, str]) -> tuple[str, list[str]]:
    """The first of the layouts that a row has, and its fields. ValueError if the row has none of them, or tools."""
    for name in TOOLS:
        if row.get(name) not in (None, "", "[]", [], {}):
            raise ValueError(f"it has {name}, which no prompt here can offer")
    for name, fields in layouts.items():
        if all(field in row or field.endswith("?") for field in fields.split()):
            return name, [field for field in fields.replace("?", "").split() if field in row]
    hints = {"chosen": "dpo.py reads pairs", "text": "data.py reads texts", "label": "dpo.py --loss=kto reads labels"}
    hint = next((f" ({hint})" for field, hint in hints.items() if field in row), "")
    raise ValueError(f"no known layout has the fields {', '.join(name[:30] for name in list(row)[:12])}{hint}")


def to_conversations(row: dict) -> tuple[str, list[str], list[list[dict]]]:
    """(layout, fields that are read, conversations) of a row. ValueError tells what is wrong with the row."""
    layout, fields = recognise(row, CONVERSATIONS)
    if any(str(row.get(name)).lower() in ("false", "undesirable") for name in LABELS):
        raise ValueError("its label is false (dpo.py --loss=kto reads labels)")
    *prompt, answer = fields
    if answer == "instances":
        if not row[answer] or not isinstance(row[answer], list) or not all(isinstance(i, dict) for i in row[answer]):
            raise ValueError("instances is not a list of objects in { }")
        parts = [{"input": "", "output": None, **part, "instruction": row["instruction"]} for part in row[answer]]
        talks = [turn("user", part, ["instruction", "input"]) + turn("assistant", part, ["output"]) for part in parts]
    elif prompt:
        talks = [turn("user", row, prompt) + turn("assistant", row, [answer])]
    else:
        talks = [messages_of(row[answer], answer)]
    talks = [with_opening(row, messages) for messages in talks]
    for messages in talks:
        answers = [m["content"] for m in messages if m["role"] == "assistant" and "weight" not in m]
        if not answers:
            raise ValueError("it has no answer to learn")
        if not all(map(str.strip, answers)):
            raise ValueError("an empty response")
    return layout, fields, talks


def answered(messages: list[dict]) -> list[dict]:
    """The messages up to the last answer."""
    return messages[:max(i for i, message in enumerate(messages) if message["role"] == "assistant") + 1]


def to_pairs(row: dict) -> tuple[str, list[str], list[tuple[list[dict], str, str]]]:
    """(layout, fields that are read, one pair) of a row. ValueError tells what is wrong with the row."""
    layout, fields = recognise(row, PREFERENCES)
    *prompt, chosen, rejected = fields
    talks = [turn("assistant", row, [name]) for name in (chosen, rejected)]
    if prompt:
        talks = [with_prompt(turn("user", row, prompt), talk, isinstance(row[prompt[0]], str)) for talk in talks]
    elif len(talks[0]) == len(talks[1]) == 1:
        layout, talks = without_prompt(*(talk[0]["content"] for talk in talks))
    talks = [with_opening(row, messages) for messages in talks]
    for name, messages in zip((chosen, rejected), talks, strict=True):
        if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
            raise ValueError(f"{name} has no answer, or an empty one")
    if len(talks[0]) == 1 or talks[0][:-1] != talks[1][:-1]:
        raise ValueError(f"{chosen} and {rejected} do not answer one prompt")
    if talks[0] == talks[1]:
        raise ValueError(f"{chosen} and {rejected} are equal")
    return layout, fields, [(talks[0][:-1], talks[0][-1]["content"], talks[1][-1]["content"])]


def probability(row: dict) -> float:
    """That the chosen answer is the better one: 1 if the row does not say it."""
    try:
        found = float(row.get("probability", 1))
    except (TypeError, ValueError):
        found = math.nan
    if not 0 <= found <= 1:
        raise ValueError(f"probability is {str(row['probability'])[:30]!r}, not a number from 0 to 1")
    return found


def to_soft_pairs(row: dict) -> tuple[str, list[str], list[tuple[list[dict], str, str, float]]]:
    """to_pairs(), with the probability of each pair."""
    layout, fields, [pair] = to_pairs(row)
    return layout, fields + ["probability"] * ("probability" in row), [(*pair, probability(row))]


def with_prompt(prompt: list[dict], answer: list[dict], is_text: bool) -> list[dict]:
    """The messages of prompt and answer. The answer may repeat the end of the prompt; if that is a text, all of it."""
    both = next((n for n in range(min(len(prompt), len(answer)), 0, -1) if prompt[-n:] == answer[:n]), 0)
    return answer if is_text and not both and answer[0]["role"] != "assistant" else prompt + answer[both:]


def without_prompt(chosen: str, rejected: str) -> tuple[str, list[list[dict]]]:
    """(layout, two conversations) from texts that both begin with the prompt: HH's turns, or whole words in common."""
    talks = [hh_messages(text) for text in (chosen, rejected)]
    if all(talks):
        return "HH", talks
    end = len(re.match(r"(?:.*\S(?=\s))?", os.path.commonprefix([chosen, rejected]), re.DOTALL)[0])
    return "pairs with an implicit prompt", [
        [{"role": "user", "content": text[:end]}] * (end > 0) + [{"role": "assistant", "content": text[end:]}]
        for text in (chosen, rejected)]


def to_labelled(row: dict) -> tuple[str, list[str], list[tuple[list[dict], str, float]]]:
    """(layout, fields that are read, labelled answers) of a row: one, or the two of a pair."""
    field = next((name for name in LABELS if name in row), None)
    if field is None or "chosen" in row:
        layout, fields, [(prompt, chosen, rejected, p)] = to_soft_pairs(row)
        return layout, fields, [(prompt, chosen, p), (prompt, rejected, 1 - p)]
    label = str(row[field]).strip().lower().removesuffix(".0")
    if label not in GOOD + BAD:
        raise ValueError(f"{field} is {label[:30]!r}, not true or false")
    layout, fields, talks = to_conversations({name: value for name, value in row.items() if name != field})
    return f"labelled {layout}", [*fields, field], [
        (talk[:-1], talk[-1]["content"], float(label in GOOD)) for talk in map(answered, talks)]


# ---- files -----------------------------------------------------------------------------------------------------------


def read_conversations(path: str, strict: bool = False) -> list[list[dict]]:
    """The conversations of a file: lists of messages {"role", "content"}, of which the last is the assistant's. One of
    the assistant's with "weight": 0 is not learned. It prints one line: how many, the layout, what is left out; and on
    stderr why the first three bad rows are skipped. UserError: no row is good or, if strict, one is bad."""
    found, line = read_examples(path, strict, to_conversations, CONVERSATIONS, "conversations")
    talks = list(map(answered, found))
    cut = sum(map(len, found)) - sum(map(len, talks))
    print(line + f"; {cut:,} turns after the last answer left out" * bool(cut))
    return talks


def read_preferences(path: str, strict: bool = False, soft: bool = False) -> list[tuple]:
    """The pairs of a file: (messages of the prompt, chosen text, rejected text). soft: with the probability that the
    chosen answer is the better one, as a fourth item. The rest as read_conversations."""
    found, line = read_examples(path, strict, to_soft_pairs if soft else to_pairs, PREFERENCES, "pairs")
    print(line)
    return found


def read_labelled(path: str, strict: bool = False) -> list[tuple[list[dict], str, float]]:
    """The labelled answers of a file, of which a pair gives two: (messages of the prompt, text, probability that it is
    good: 1 or 0 but for pairs with a probability). The rest as read_conversations."""
    layouts = {"labelled answers": "prompt completion label", **PREFERENCES}
    found, line = read_examples(path, strict, to_labelled, layouts, "labelled answers")
    print(line)
    return found


def read_examples(path: str, strict: bool, convert: Callable, layouts: dict[str, str], what: str) -> tuple[list, str]:
    """What convert() makes of the good rows of a file, and the line that describes it."""
    found, bad, total, counts, used, unused = [], [], 0, Counter(), {}, {}
    for where, row in read_rows(path):
        total += 1
        try:
            if isinstance(row, ValueError):
                raise row
            row = {" ".join(str(name).lower().split()): value for name, value in row.items() if value is not None}
            layout, fields, made = convert(row)
        except ValueError as error:
            bad.append((where, str(error)))
            continue
        found += made
        counts[layout] += len(made)
        fields = [*(field for field in OPENING if field in row), *fields]
        used.setdefault(layout, {}).update(dict.fromkeys(fields))
        unused.update(dict.fromkeys(name for name in row if name not in fields))
        unused.update((f"{field}.{name}", None) for field in fields for name in unread_of_messages(row[field]))
    if not total:
        raise UserError(f"{path} is empty: it must hold {what}")
    if not found:
        needed = {name: [field for field in fields.split() if "?" not in field] for name, fields in layouts.items()}
        known = "; ".join(f"{name} ({', '.join(fields)})" for name, fields in needed.items())
        todo = f". Rename them to those of a known layout: {known}" if "no known layout" in bad[0][1] else ""
        raise UserError(f"no row of {path} can be used. {': '.join(bad[0])}{todo}")
    if bad and strict:
        raise UserError(f"{len(bad):,} of {total:,} rows are bad, such as {': '.join(bad[0])}: correct or remove them, "
                        "or leave out --strict=True")
    for where, reason in bad[:3]:
        print(f"{where} is skipped: {reason}", file=sys.stderr)
    shown = []
    for layout, count in counts.most_common():
        fields = sorted(used[layout], key=lambda field: field not in OPENING)
        shown.append(f"{f'{count:,} ' * (len(counts) > 1)}{layout} ({', '.join(fields)})")
    return found, (f"{path}: {len(found):,} {what}, {', '.join(shown)}"
                   + f"; not read: {', '.join(list(unused)[:8])}" * bool(unused)
                   + f"; {len(bad):,} of {total:,} rows SKIPPED" * bool(bad))


def unread_of_messages(value) -> list[str]:
    """The fields of messages that hold something and are not read, such as "reasoning_content"."""
    items = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, dict)]
    return [name for item in items for name, held in item.items() if held and name not in MESSAGE]


# ---- use -------------------------------------------------------------------------------------------------------------


def split(examples: list, share: float, seed: int) -> tuple[list, list]:
    """(training, held out) of conversations, pairs or labelled answers. Examples are never on both sides if they are
    equal up to the first answer, apart from capitals and blanks: a conversation and its continuation, two answers to a
    prompt. About `share` of the examples are held out, at least one. UserError if one side would be empty."""
    order, groups = np.random.default_rng(seed).permutation(len(examples)).tolist(), {}
    for i in order:
        groups.setdefault(beginning(examples[i]), []).append(i)
    if len(groups) < 2:
        raise UserError(f"{len(examples)} examples with {len(groups)} different prompts cannot be split: give more, or "
                        "--val_data=FILE")
    wanted, held_out = max(1, round(share * len(examples))), []
    for group in groups.values():
        if len(held_out) + len(group) <= wanted:
            held_out += group
    held_out = set(held_out or min(groups.values(), key=len))
    if len(held_out) == len(examples):
        raise UserError(f"{share} of {len(examples)} examples would leave none for training: hold out a smaller share")
    return [examples[i] for i in order if i not in held_out], [examples[i] for i in order if i in held_out]


def without(examples: list, held_out: list) -> list:
    """The examples whose prompts are not held out, too. It prints how many are left out. UserError: none is left."""
    known = {beginning(example) for example in held_out}
    kept = [example for example in examples if beginning(example) not in known]
    if not kept:
        raise UserError(f"the prompts of all {len(examples):,} examples are also held out: give another --val_data")
    if len(kept) < len(examples):
        print(f"{len(examples) - len(kept):,} training examples are LEFT OUT, since their prompts are also held out")
    return kept


def beginning(example) -> str:
    """The text before the first answer, in lower case and with single blanks; if there is none, the whole example."""
    messages = example if isinstance(example, list) else example[0]
    first = itertools.takewhile(lambda message: message["role"] != "assistant", messages)
    return " ".join(" ".join(message["content"] for message in first).lower().split()) or repr(example)


def show(enc: Tokenizer, ids: list[int], learned: list[bool], limit: int = 400):
    """Print an example as the model sees it: the text of its tokens, those of the loss between >>> and <<<. If it has
    more than `limit` tokens, the middle is left out."""
    half, texts = limit // 2, []
    whole = len(ids) <= limit
    for part in [slice(None)] if whole else [slice(half), slice(len(ids) - half, None)]:
        runs = itertools.groupby(zip(ids[part], learned[part], strict=True), key=lambda pair: pair[1])
        decoded = [(yes, enc.decode([i for i, _ in run])) for yes, run in runs]
        texts.append("".join(f">>>{text}<<<" if yes else text for yes, text in decoded))
    text = f"\n[... {len(ids) - 2 * half:,} tokens ...]\n".join(texts)
    text = re.sub(r"[^\n\t -~\xa0-\U0010ffff]", lambda match: ascii(match[0])[1:-1], text)  # a terminal obeys these
    print(f"an example of {len(ids):,} tokens, of which {sum(learned):,} are learned, those between >>> and <<<:")
    print(text)


if __name__ == "__main__":
    print(f"{sys.argv[0]} has no command of its own: run sft.py, which uses it", file=sys.stderr)
    sys.exit(2)
