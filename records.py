"""Examples from files: conversations, pairs of answers and labelled answers, in the layouts that datasets have.

    conversations = read_conversations("alpaca.json")     # [[{"role", "content"}, ...], ...]
    pairs = read_preferences("hh.jsonl.gz")               # [(messages of the prompt, chosen text, rejected text), ...]
    labelled = read_labelled("kto.parquet")               # [(messages of the prompt, text, whether it is good), ...]
    training, held_out = split(conversations, 0.1, seed=1337)
    show(enc, *encode(enc, training[0], "chatml"))        # one example as the model sees it

Files: .jsonl, .json (a list of objects), .csv, .tsv and .parquet; the text files also compressed by gzip.

Conversations. Each row is read by the first line of this table that it fits:
    messages, conversations or conversation: a list of {"role", "content"} or {"from", "value"}, or of texts by turns
    a prompt and an answer, in the fields of COLUMNS; each may also be a list of messages
    instruction, instances: a list of {"input", "output"} (Self-Instruct), of which each becomes a conversation
Preferences. A row has chosen and rejected (or preferred_output and non_preferred_output): texts, or lists of messages
that may begin with the prompt. Without a field for the prompt, it is what both have in common: the turns before the
last one ("Human:" and "Assistant:" in a text, or messages), else the beginning of both texts.
Labelled answers. A row is a conversation and has a label, true or false (or kto_tag); or it is a row of preferences.

The fields system, system_prompt and history are read in all layouts. Names of fields may have capitals. Texts are kept
as they are. All other fields are ignored, and named in the line that is printed. An answer with "weight": 0 is not
learned. Turns after the last answer are left out. A row is skipped, and counted, if it has an answer without text, a
role that the templates lack (such as tool), a call of a tool, or an image.
"""
import csv
import gzip
import itertools
import json
import os
import re
import shlex
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np

from config import UserError
from tokenizer import Tokenizer, well_formed

ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user",
         **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "ai"), "assistant")}
LISTS = {"messages": "messages", "conversations": "ShareGPT", "conversation": "ShareGPT"}
# For each layout, the fields of the prompt, joined by a blank line, of which a row must have the first; and the answer.
COLUMNS = {
    "prompt and completion": (["prompt"], "completion"),
    "prompt and response": (["prompt"], "response"),
    "Alpaca": (["instruction", "input"], "output"),
    "Dolly": (["instruction", "context"], "response"),
    "OpenOrca": (["question", "context"], "response"),
    "question and answer": (["question", "context"], "answer"),
    "MetaMath": (["query"], "response"),
    "input and output": (["input"], "output"),
}
PAIRS = [("chosen", "rejected"), ("preferred_output", "non_preferred_output")]
PROMPTS = [["prompt"], ["instruction", "input"], ["question", "context"], ["query"], ["input"]]  # of pairs
OPENING = ["system", "system_prompt", "history"]
LABELS = ["label", "kto_tag"]
HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


class UnknownLayout(ValueError):
    def __init__(self, row: dict, wanted: str):
        names = [name[:30] for name, value in row.items() if value is not None]
        super().__init__(f"no known layout: its fields are {', '.join(names[:12]) or 'none'}; known are {wanted}")


# ---- rows ------------------------------------------------------------------------------------------------------------


def read_rows(path: str) -> Iterator[tuple[str, dict | ValueError]]:
    """The rows of a .jsonl, .json, .csv, .tsv or .parquet file: (where it stands, such as "a.jsonl, line 7", the row).
    In place of a row that cannot be read stands a ValueError that says why. A .json file is read whole; the others are
    read a part at a time. UserError: the file is not in UTF-8 or UTF-16, is damaged, or needs pyarrow."""
    kind = os.path.splitext(path.lower().removesuffix(".gz"))[1]
    read = read_parquet if kind == ".parquet" else read_table if kind in (".csv", ".tsv") else read_json
    try:
        for where, row in read(path, kind):
            yield f"{path}, {where}", row
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {how_to_convert(path, error.object)}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged or cut short ({error}): copy it again") from error


def open_text(path: str, newline: str = "\n"):
    """A text file, which may be compressed by gzip, opened for reading. Its encoding is UTF-8, or UTF-16 or UTF-32 if
    its first bytes show that. newline as in open()."""
    with open(path, "rb") as file:
        opened = gzip.open if file.read(2) == b"\x1f\x8b" else open
    with opened(path, "rb") as file:
        encoding = json.detect_encoding(file.read(4))
    return opened(path, "rt", encoding=encoding, newline=newline)


def how_to_convert(path: str, sample: bytes) -> str:
    """The end of an error message for a file that is not UTF-8. The sample: bytes of the file where decoding fails."""
    if b"\0" in sample:
        return "it is no text, or damaged"
    runs, encoding = re.findall(rb"[\x80-\xff]+", sample), "ENCODING"
    if sum(map(len, runs)) < 1.5 * len(runs):  # single accents between ASCII letters: a Western European language
        encoding = "WINDOWS-1252"
    stem, extension = os.path.splitext(path)
    command = f"iconv -f {encoding} -t UTF-8 {shlex.quote(path)} > {shlex.quote(f'{stem}-utf8{extension}')}"
    return f"convert it with {command}" + (" (iconv -l lists the names)" if encoding == "ENCODING" else "")


def read_json(path: str, kind: str) -> Iterator[tuple[str, dict | ValueError]]:
    """A file of lines, or a list. The content decides, so that a wrong extension does no harm."""
    with open_text(path) as file:
        lines = list(itertools.islice(filter(str.strip, file), 2))
    is_list = bool(lines) and lines[0].lstrip().startswith("[")
    by_line = len(lines) == 2 and not is_list and any(isinstance(parsed(line), dict) for line in lines)
    if lines and not by_line and (is_list or kind == ".json"):
        try:
            with open_text(path) as file:
                whole = json.load(file)
        except UnicodeDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            if kind == ".json":
                raise UserError(f"{path} is not valid JSON ({error}): correct it, or copy it again") from error
        else:
            for number, row in enumerate(rows_in(whole), 1):
                yield f"row {number}", row if isinstance(row, dict) else ValueError("not an object in { }")
            return
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"line {number}", parsed(line)


def parsed(line: str) -> dict | ValueError:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return ValueError(f"no JSON can be read ({error})")
    return row if isinstance(row, dict) else ValueError("not an object in { }")


def rows_in(whole) -> list:
    """The rows of a .json file: a list, the only list of objects in an object, or a single object."""
    if isinstance(whole, list):
        return whole
    lists = [part for part in whole.values() if isinstance(part, list) and part and isinstance(part[0], dict)
             and not {"role", "from"} & set(part[0])] if isinstance(whole, dict) else []
    return lists[0] if len(lists) == 1 else [whole]


def read_table(path: str, kind: str) -> Iterator[tuple[str, dict | ValueError]]:
    """A file of cells separated by commas, semicolons or tabs, whichever its first line has most of."""
    csv.field_size_limit(2**31 - 1)
    with open_text(path, newline="") as file:
        first = file.readline()
        file.seek(0)
        reader = csv.reader(file, delimiter="\t" if kind == ".tsv" else max(",;\t", key=first.count), strict=True)
        names, end = None, 0
        while True:
            try:
                cells, error = next(reader), None
            except StopIteration:
                return
            except csv.Error as found:
                cells, error = [], ValueError(f"its quotes cannot be read ({found})")
            where, end = f"line {end + 1}", reader.line_num
            if error:
                yield where, error
            elif cells and names is None:
                names = [name.strip() for name in cells]
            elif cells and len(cells) != len(names):
                yield where, ValueError(f"it has {len(cells)} cells, the first line has {len(names)}")
            elif cells:
                yield where, dict(zip(names, map(messages_or_text, cells), strict=True))


def messages_or_text(cell: str):
    """A list of messages that a cell holds as JSON; any other text remains."""
    if cell.startswith("["):
        try:
            found = json.loads(cell)
            if found and all(isinstance(item, dict) and {"role", "from"} & set(item) for item in found):
                return found
        except (ValueError, RecursionError):
            pass
    return cell


def read_parquet(path: str, kind: str) -> Iterator[tuple[str, dict]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(".parquet files need the Python package pyarrow: pip install pyarrow") from error
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a parquet file, or is damaged: copy it again") from error


# ---- texts and messages ----------------------------------------------------------------------------------------------


def text_of(row: dict, field: str) -> str:
    """The text in a field, which may consist of parts {"type": "text", "text"}. ValueError if there is no text."""
    value = row.get(field)
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        others = [part.get("type") for part in value if part.get("type") != "text"]
        if others:
            raise ValueError(f"{field} has a part of type {others[0]!r}, which is not text")
        return "".join(text_of(part, "text") for part in value)
    if not isinstance(value, str):
        raise ValueError(f"{field} is missing" if value is None else f"{field} is not a text")
    return well_formed(value)


def message_of(item, field: str) -> dict:
    """{"role", "content"}, and "weight" if that is 0, from {"role", "content"} or {"from", "value"}."""
    if not isinstance(item, dict):
        raise ValueError(f"{field} is not a list of objects")
    name = item.get("role") if item.get("role") is not None else item.get("from")
    role = ROLES.get(str(name).lower())
    if not role:
        raise ValueError(f"unknown role {name!r}: a template has system, user and assistant")
    if item.get("tool_calls") or item.get("function_call"):
        raise ValueError("it calls a tool, which the templates lack")
    weight = item.get("weight")
    if weight not in (None, 0, 1):
        raise ValueError(f"weight is {weight!r}, not 0 or 1")
    message = {"role": role, "content": text_of(item, "value" if item.get("content") is None and "value" in item
                                                else "content")}
    return message | ({"weight": 0} if weight == 0 and role == "assistant" else {})


def messages_of(value, field: str) -> list[dict]:
    """The messages in a field: a list of messages, a list of texts by turns, or pairs of a question and an answer, as
    JSON text or not. ValueError if it is none of these."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{field} is not a list") from error
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise ValueError(f"{field} is not a list")
    if value and all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        value = [text for pair in value for text in pair]
    if value and all(isinstance(text, str) for text in value):
        value = [{"role": role, "content": text} for role, text in zip(itertools.cycle(("user", "assistant")), value)]
    return [message_of(item, field) for item in value]


def turn(role: str, row: dict, fields: list[str]) -> list[dict]:
    """The messages in a field that holds messages, or one message of the texts in these fields."""
    if isinstance(row.get(fields[0]), list | dict):
        return messages_of(row[fields[0]], fields[0])
    texts = [text_of(row, field) for field in fields if row.get(field) is not None]
    return [{"role": role, "content": "\n\n".join(text for text in texts if text)}]


def opening(row: dict) -> list[dict]:
    """The messages that the fields system, system_prompt and history hold, which precede the prompt."""
    found = [{"role": "system", "content": text} for field in ("system", "system_prompt")
             if row.get(field) is not None and (text := text_of(row, field)).strip()]
    return found + (messages_of(row["history"], "history") if row.get("history") else [])


def joined(first: list[dict], messages: list[dict]) -> list[dict]:
    """Both, without messages of the first that the others begin with."""
    return messages if messages[:len(first)] == first else first + messages


# ---- conversations ---------------------------------------------------------------------------------------------------


def to_conversations(row: dict) -> tuple[str, list[str], list[list[dict]]]:
    """(name of the layout, fields that are read, conversations) of a row. ValueError tells what is wrong with it."""
    has, first = [name for name, value in row.items() if value is not None], opening(row)
    used = [field for field in OPENING if field in has]
    for field, layout in LISTS.items():
        if field in has:
            return layout, [*used, field], [checked(joined(first, messages_of(row[field], field)))]
    for layout, (prompt, answer) in COLUMNS.items():
        if prompt[0] in has and answer in has:
            messages = joined(first, turn("user", row, prompt)) + turn("assistant", row, [answer])
            return layout, [*used, *(field for field in prompt if field in has), answer], [checked(messages)]
    if "instruction" in has and isinstance(row.get("instances"), list):
        rows = [{"instruction": row["instruction"], **part} for part in row["instances"] if isinstance(part, dict)]
        found = [first + turn("user", part, ["instruction", "input"]) + turn("assistant", part, ["output"])
                 for part in rows]
        return "Self-Instruct", [*used, "instruction", "instances"], [checked(messages) for messages in found]
    wanted = [*LISTS, *(f"{', '.join(prompt)}, {answer}" for prompt, answer in COLUMNS.values())]
    raise UnknownLayout(row, "; ".join(wanted) + ("" if "chosen" not in has else ": dpo.py reads preferences"))


def checked(messages: list[dict]) -> list[dict]:
    """The messages, if one is to be learned. ValueError if none is, or if one is empty."""
    learned = [message for message in messages if message["role"] == "assistant" and "weight" not in message]
    if not learned:
        raise ValueError("no answer of the assistant is to be learned")
    if not all(message["content"].strip() for message in learned):
        raise ValueError("an empty response")
    return messages


def answered(messages: list[dict]) -> list[dict]:
    """The messages up to the last of the assistant's."""
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    return messages[:last + 1]


# ---- preferences -----------------------------------------------------------------------------------------------------


def hh_messages(text: str) -> list[dict]:
    """The messages of a text such as "\\n\\nHuman: Hi\\n\\nAssistant: Hello"; none if it does not begin so."""
    before, *parts = HH_TURN.split(text)
    return [] if before.strip() else [{"role": "user" if name == "Human" else "assistant", "content": part.strip()}
                                      for name, part in zip(parts[::2], parts[1::2], strict=True)]


def to_pairs(row: dict) -> tuple[str, list[str], list[tuple[list[dict], str, str]]]:
    """(name of the layout, fields that are read, one pair) of a row. ValueError tells what is wrong with it."""
    has = [name for name, value in row.items() if value is not None]
    names = next((names for names in PAIRS if set(names) <= set(has)), None)
    if names is None:
        raise UnknownLayout(row, "chosen, rejected, with or without prompt, question or instruction")
    fields = next((fields for fields in PROMPTS if fields[0] in has), [])
    first, prompt = opening(row), []
    if fields and isinstance(row[fields[0]], dict):  # OpenAI: {"messages": [...]}
        prompt = messages_of(row[fields[0]].get("messages"), fields[0])
    elif fields:
        prompt = turn("user", row, fields)
        if len(prompt) == 1:  # a prompt may be written as HH's texts are
            prompt = [turn for turn in hh_messages(prompt[0]["content"]) if turn["content"]] or prompt
    else:
        fields = next(([field] for field in LISTS if field in has), [])
        prompt = messages_of(row[fields[0]], fields[0]) if fields else []
    answers = [row[name] if isinstance(row[name], str) else messages_of(row[name], name) for name in names]
    layout = "preferences"
    if all(isinstance(answer, str) for answer in answers) and not prompt:
        turns = [hh_messages(answer) for answer in answers]
        if all(turns):
            layout, answers = "HH", turns
        else:
            layout, common = "preferences with implicit prompts", os.path.commonprefix(answers)
            start = len(re.match(r"(.*\S(?=\s))?", common, re.DOTALL)[0])  # words stay whole
            prompt, answers = turn("user", {"": common[:start]}, [""])[:start], [answer[start:] for answer in answers]
    talks = [[*prompt, {"role": "assistant", "content": answer}] if isinstance(answer, str)
             else with_prompt(prompt, answer) for answer in answers]
    used = [*(field for field in OPENING if field in has), *(field for field in fields if field in has), *names]
    return layout, used, [pair_of(*(joined(first, talk) for talk in talks))]


def with_prompt(prompt: list[dict], answer: list[dict]) -> list[dict]:
    """The conversation, where the messages of an answer may repeat the prompt, or the end of it."""
    n = next((n for n in range(min(len(prompt), len(answer)), 0, -1) if prompt[-n:] == answer[:n]), 0)
    if n or not answer or answer[0]["role"] == "assistant":
        return prompt + answer[n:]
    return answer


def pair_of(chosen: list[dict], rejected: list[dict]) -> tuple[list[dict], str, str]:
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if not messages or messages[-1]["role"] != "assistant":
            raise ValueError(f"{name} does not end with a message of the assistant")
        if not messages[-1]["content"].strip():
            raise ValueError(f"an empty {name} answer")
    if len(chosen) == 1:
        raise ValueError("chosen and rejected have no prompt in common")
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("chosen and rejected answer different prompts")
    if chosen[-1] == rejected[-1]:
        raise ValueError("chosen and rejected are equal")
    return chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]


def label_of(row: dict) -> bool | None:
    """The label of a row, or None if it has none. ValueError if it is neither true nor false."""
    value = next((row[name] for name in LABELS if row.get(name) is not None), None)
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    if value is not None and str(value).strip().lower() not in known:
        raise ValueError(f"the label is {str(value)[:30]!r}, not true or false")
    return None if value is None else known[str(value).strip().lower()]


def to_labelled(row: dict) -> tuple[str, list[str], list[tuple[list[dict], str, bool]]]:
    """(name of the layout, fields that are read, labelled answers) of a row: one, or the two of a pair."""
    label = label_of(row)
    if label is None and any(row.get(name) is not None for names in PAIRS for name in names):
        layout, used, [(prompt, chosen, rejected)] = to_pairs(row)
        return layout, used, [(prompt, chosen, True), (prompt, rejected, False)]
    if label is None:
        raise UnknownLayout(row, "prompt, completion, label; chosen, rejected")
    layout, used, found = to_conversations(row)
    talks = [answered(messages) for messages in found]
    return f"{layout}, labelled", [*used, next(name for name in LABELS if row.get(name) is not None)], [
        (talk[:-1], talk[-1]["content"], label) for talk in talks]


# ---- files of examples -----------------------------------------------------------------------------------------------


def read_conversations(path: str, strict: bool = False) -> list[list[dict]]:
    """The conversations of a file: lists of messages {"role", "content"}, of which the last is the assistant's. One of
    the assistant's with "weight": 0 is not learned. It prints one line: how many, the layout, what was left out; and on
    stderr why the first three bad rows are skipped. UserError: no row is good or, if strict, one is bad."""
    found, line = collect(path, strict, to_conversations, "conversations")
    ended = [answered(messages) for messages in found]
    cut = sum(len(messages) != len(whole) for messages, whole in zip(ended, found, strict=True))
    print(line + f"; {cut} end with a turn without an answer, which is left out" * (cut > 0))
    return ended


def read_preferences(path: str, strict: bool = False) -> list[tuple[list[dict], str, str]]:
    """The pairs of a file: (messages of the prompt, chosen text, rejected text). The rest as read_conversations."""
    found, line = collect(path, strict, to_pairs, "pairs")
    print(line)
    return found


def read_labelled(path: str, strict: bool = False) -> list[tuple[list[dict], str, bool]]:
    """The labelled answers of a file: (messages of the prompt, text, whether it is good). A pair gives two. The rest as
    read_conversations."""
    found, line = collect(path, strict, to_labelled, "labelled answers")
    print(line)
    return found


def has_labels(path: str) -> bool:
    """Whether the first row that can be read has a label, and is no pair."""
    row = next((lower(row) for _, row in read_rows(path) if isinstance(row, dict)), {})
    return any(row.get(name) is not None for name in LABELS) and not any(row.get(names[0]) for names in PAIRS)


def lower(row: dict) -> dict:
    return {str(name).strip().lower(): value for name, value in row.items()}


def collect(path: str, strict: bool, convert: Callable, what: str) -> tuple[list, str]:
    """The examples that convert() makes of the good rows of a file, and the line that describes them."""
    found, bad, total, layouts, fields, unused = [], [], 0, Counter(), {}, {}
    for where, row in read_rows(path):
        total += 1
        try:
            if isinstance(row, ValueError):
                raise row
            row = lower(row)
            layout, used, examples = convert(row)
        except ValueError as error:
            bad.append((where, error))
            continue
        found += examples
        layouts[layout] += len(examples)
        fields.setdefault(layout, {}).update(dict.fromkeys(used))
        unused.update(dict.fromkeys(name for name, value in row.items() if name not in used and value))
    if not total:
        raise UserError(f"{path} is empty: it must hold {what}")
    if bad and (strict or not found):
        raise UserError(f"{len(bad)} of the {total} rows of {path} are bad, the first is {bad[0][0]}: {bad[0][1]}")
    for where, error in bad[:3]:
        print(f"{where} is skipped: {error}", file=sys.stderr)
    shown = [f"{f'{count:,} ' * (len(layouts) > 1)}{layout} ({', '.join(fields[layout])})"
             for layout, count in layouts.most_common()]
    line = f"{path}: {len(found):,} {what}, {', '.join(shown)}"
    line += f"; not read: {', '.join(list(unused)[:8])}" * bool(unused)
    return found, line + f"; {len(bad):,} of {total:,} rows SKIPPED" * bool(bad)


# ---- use -------------------------------------------------------------------------------------------------------------


def split(examples: list, share: float, seed: int) -> tuple[list, list]:
    """(training, held out) of conversations, pairs or labelled answers. Examples are never on both sides if they are
    equal up to the first answer, apart from capitals and blanks: a conversation and its continuation, two answers to a
    prompt. About `share` of the examples are held out, at least one. UserError if one side would be empty."""
    def prompt(example) -> str:
        messages = example if isinstance(example, list) else example[0]
        first = itertools.takewhile(lambda message: message["role"] != "assistant", messages)
        text = "\n".join(" ".join(message["content"].lower().split()) for message in first)
        return text.strip() or repr(example)  # without a prompt, only equal examples belong together

    order, groups = np.random.default_rng(seed).permutation(len(examples)).tolist(), {}
    for i in order:
        groups.setdefault(prompt(examples[i]), []).append(i)
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


def show(enc: Tokenizer, ids: list[int], learned: list[bool], limit: int = 400):
    """Print an example as the model sees it: the text of its tokens, those of the loss between >>> and <<<. If it has
    more than `limit` tokens, the middle is left out."""
    print(f"the first example, {len(ids):,} tokens; the loss counts the {sum(learned):,} between >>> and <<<:")
    text = ""
    for yes, run in itertools.groupby(zip(ids, learned, strict=True), key=lambda pair: pair[1]):
        part = enc.decode([i for i, _ in run])
        text += f">>>{part}<<<" if yes else part
    print(text)


if __name__ == "__main__":
    print(f"{sys.argv[0]} has no command of its own: run sft.py, which uses it", file=sys.stderr)
    sys.exit(2)
