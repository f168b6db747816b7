"""Chat templates: conversations as tokens with a loss mask, and several of them in a row.

    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]
    template = template_of(meta, enc)                     # as the header of a checkpoint says, or by a name: "chatml"
    ids, learned = encode(enc, messages, template)        # learned: True for tokens of the assistant's messages
    ids = encode_prompt(enc, messages[:1], template)      # ends where the answer begins
    rows = pack([(ids, learned), ...], block_size)        # several examples in a row, for model.loss(..., places=)

A message has a role (system, user or assistant) and a content. records.py reads conversations from files. A template is
one of the names in TEMPLATES, or an OwnTemplate, which came with a model of another project.
"""
import datetime
import json
import os
import re
import sys
import unicodedata
from collections.abc import Callable

import numpy as np

from config import UserError
from model import DOCUMENT, PADDING
from tokenizer import Tokenizer, well_formed

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


# ---- a model's own template ------------------------------------------------------------------------------------------


class OwnTemplate:
    """The chat template that came with a model: a program in Jinja that writes a conversation as one text. It runs in
    jinja2's sandbox, with the settings and the functions that transformers' apply_chat_template gives it.

    text: the program. names: the texts of special tokens, by the names that a template has for them: {"bos_token":
    "<s>"}. now: the date that a template may write into the system message; None: of today."""

    name = "own"  # in a checkpoint's header

    def __init__(self, text: str, names: dict[str, str], now: datetime.datetime | None = None):
        self.text, self.names = text, names
        self.not_located = 0  # answers that encode() did not find in the text of their conversation
        try:
            self.program = sandbox(now).from_string(text)
        except UserError:
            raise
        except Exception as error:  # the text comes from elsewhere, and jinja2 raises errors of many types
            raise UserError(f"the model's chat template is no Jinja program ({first_line(error)}): give --template=NAME"
                            ) from error

    def render(self, messages: list[dict], answer: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and the parts of it (start, end) that the template marks as the assistant's, by
        {% generation %}. answer: the text goes on to where the assistant's next message begins. UserError tells why the
        template refuses the messages."""
        messages = [{"role": message["role"], "content": message["content"]} for message in messages]
        environment, environment.written, environment.marked = self.program.environment, [], []
        try:
            for part in self.program.generate(messages=messages, tools=None, documents=None,
                                              add_generation_prompt=answer, **self.names):
                environment.written.append(part)
        except Exception as error:
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(f"the model's chat template refuses messages of the roles {roles or '(none)'}: "
                            f"{first_line(error)}") from error
        return "".join(environment.written), environment.marked

    def locate(self, enc: Tokenizer, messages: list[dict], i: int, text: str) -> tuple[int, int] | None:
        """Where the answer messages[i], with the token that ends it, stands in the text of the whole conversation:
        (start, end). None unless the text up to the end of the answer is the text with which the model is asked, and
        then the answer: some templates change earlier messages when a conversation goes on."""
        try:
            before, prompt, whole = (self.render(messages[:n], answer)[0]
                                     for n, answer in ((i, False), (i, True), (i + 1, False)))
        except UserError:
            return None
        start, content = common_length(prompt, text), messages[i]["content"].strip()
        if start < len(prompt):  # the prompt may go on in a way that no conversation has, as DeepSeek's by <think>
            if not (content and text[start:].startswith(content) and text[:start].startswith(before)):
                return None
        special = names_of_special(enc)
        mark = re.search(rf"(?:{special})(?=(?:\s|{special})*\Z)", whole[start:]) if special else None
        end = start + mark.end() if mark else len(whole)
        return (start, end) if end <= common_length(whole, text) else None


def sandbox(now: datetime.datetime | None):
    """The environment in which a template runs. Beside Jinja's own there are: {% generation %}, {% break %} and
    {% continue %}, raise_exception(), strftime_now(), and tojson without escapes for HTML."""
    try:
        import jinja2
        import jinja2.ext
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise UserError("the model's chat template needs the Python package jinja2: pip install jinja2, or give "
                        "--template=NAME") from error
    if tuple(int(number) for number in re.findall(r"\d+", jinja2.__version__)[:3]) < (3, 1, 6):
        raise UserError(f"jinja2 {jinja2.__version__} has known ways out of its sandbox: pip install -U jinja2")

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("mark"), [], [], body, lineno=line)

        def mark(self, caller) -> str:
            text, start = caller(), sum(map(len, self.environment.written))
            self.environment.marked.append((start, start + len(text)))
            return text

    class Namespace(jinja2.utils.Namespace):  # names with an underscore could lead out of the sandbox
        def __init__(self, /, *args, **kwargs):
            attributes = dict(*args, **kwargs)
            for name in attributes:
                check_name(name)
            super().__init__(attributes)

        def __setitem__(self, name, value):
            check_name(name)
            super().__setitem__(name, value)

    class Dict:  # not the type itself, whose attributes lead to other types
        def __call__(self, /, *args, **kwargs):
            return dict(*args, **kwargs)

        def fromkeys(self, *args):
            return dict.fromkeys(*args)

    def check_name(name):
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "dict": Dict(), "namespace": Namespace,
                            "strftime_now": lambda form: (now or datetime.datetime.now()).strftime(form)}
    return environment


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def common_length(a: str, b: str) -> int:
    """The number of characters with which both texts begin."""
    return len(os.path.commonprefix([a, b]))


def names_of_special(enc: Tokenizer) -> str:
    """A regular expression for the names of the special tokens, the longest first; "" if there are none."""
    return "|".join(map(re.escape, sorted(enc.special, key=len, reverse=True)))


# ---- tokens ----------------------------------------------------------------------------------------------------------

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def template_of(meta: dict, enc: Tokenizer, name: str = "", now: datetime.datetime | None = None,
                ) -> "str | OwnTemplate":
    """The template of a checkpoint: `name`, else that of its header; "none" where there is neither. The name "own"
    stands for the Jinja program in the header. now: see OwnTemplate."""
    text = meta.get("chat_template")
    name = name or meta.get("template") or ("own" if text else "none")
    if name != "own":
        return name if name == "none" else check_template(name)
    if not isinstance(text, str):
        raise UserError(f"template=own: the checkpoint has no chat template of its own; give {', '.join(TEMPLATES)}")
    return OwnTemplate(text, special_names(meta, enc), now)


def special_names(meta: dict, enc: Tokenizer) -> dict[str, str]:
    """The texts of special tokens by the names that a template has for them, as tokenizer_config.json gives them; where
    there is none, by the ids of the tokens."""
    given = (meta.get("hf") or {}).get("tokenizer_config")
    if not given:
        texts = {i: text for text, i in enc.special.items()}
        return {name: texts[i] for name, i in (("bos_token", enc.bos), ("eos_token", enc.eot)) if i in texts}
    given = {name: token.get("content") if isinstance(token, dict) else token for name, token in given.items()}
    return {name: given[name] for name in SPECIAL_NAMES if isinstance(given.get(name), str)}


def template_for_training(meta: dict, enc: Tokenizer, name: str = "", started: str | None = None,
                          ) -> "str | OwnTemplate":
    """template_of(); a model that has none gets llama3 if its tokenizer has that template's tokens, else chatml, and a
    line tells so. started: when the run that is resumed began, so that a template writes the date of that day."""
    form = template_of(meta, enc, name, datetime.datetime.fromisoformat(started) if started else None)
    if form != "none" or name == "none":
        return form if form != "none" else check_template(name)
    form = "llama3" if TEMPLATES["llama3"]["end"] in enc.special else "chatml"
    why = (f"as the tokenizer has {TEMPLATES[form]['end']}" if TEMPLATES[form]["end"] in enc.special else
           "whose marks become text, as the tokenizer has no tokens for them")
    print(f"the checkpoint has no chat template: {form} is taken, {why}")
    return form


def entries_to_keep(meta: dict, template: "str | OwnTemplate") -> dict:
    """The entries of a checkpoint's header that also hold once the model is tuned with this template."""
    names = ("ends", "hf", "chat_template") if isinstance(template, OwnTemplate) else ("ends", "hf")
    chat = chat_entry(Tokenizer.from_dict(meta["tokenizer"]), template)
    return {name: meta[name] for name in names if name in meta} | chat


def written(examples: list, encoded: Callable, template: "str | OwnTemplate", strict: bool = False,
            ) -> tuple[list, list]:
    """(examples, what encoded() makes of each), without those that a model's own template refuses. It prints how many
    are left out, and how many answers are not learned. UserError: none is left or, if strict, one is refused."""
    kept, found, refused = [], [], []
    for example in examples:
        try:
            found.append(encoded(example))
            kept.append(example)
        except UserError as error:
            if not isinstance(template, OwnTemplate):
                raise
            refused.append(str(error))
    if refused and (strict or not found):
        raise UserError(f"{refused[0]} ({len(refused):,} of {len(examples):,} examples): remove them, or give another "
                        "--template")
    if refused:
        print(f"{len(refused):,} of {len(examples):,} examples are SKIPPED: {refused[0]}")
    if number := getattr(template, "not_located", 0):
        print(f"{number:,} answers are NOT LEARNED: the model's chat template does not write them as it asks for them")
        template.not_located = 0
    return kept, found


def check_template(name: str) -> str:
    if name not in [*TEMPLATES]:  # a damaged header may hold a list here, which no dict can look up
        raise UserError(f"template={name!r} is not one of {', '.join(TEMPLATES)}")
    return name


def encode_placed(enc: Tokenizer, text: str) -> tuple[list[int], np.ndarray]:
    """The tokens of a rendered text, and for each the first character that it stands for and the one after its last:
    (n, 2). The characters are counted in the normal form that the tokenizer gives the text."""
    text = in_normal_form(enc, well_formed(text))
    if enc.kind == "hf":
        enc.encode("", special=True)  # names of special tokens stand for these tokens
        found = enc._hf.encode(text, add_special_tokens=False)
        return found.ids, np.array(found.offsets, np.int64).reshape(-1, 2)
    ids = enc.encode(text, special=True).tolist()
    ends = np.cumsum([0, *(len(enc.decode_bytes([i])) for i in ids)])  # in bytes, as the tokens are
    characters = np.cumsum([0, *(len(character.encode()) for character in text)])
    starts = np.searchsorted(characters, ends[:-1], "right") - 1
    return ids, np.stack([starts, np.searchsorted(characters, ends[1:])], 1)


def in_normal_form(enc: Tokenizer, text: str) -> str:
    return unicodedata.normalize(enc.normalizer, text) if enc.normalizer else text


def end_of_answer(enc: Tokenizer, template: "str | OwnTemplate") -> int:
    """The token that ends a message of the assistant."""
    if isinstance(template, OwnTemplate):
        content = "answer"
        after = template.render(turns("question", content))[0].rpartition(content)[2]
        special = names_of_special(enc)
        found = re.match(rf"\s*({special})", after) if special else None
        return enc.special[found[1]] if found else enc.eot
    return enc.special.get(TEMPLATES[template]["end"], enc.eot)


def ends_of_text(enc: Tokenizer, meta: dict, template: "str | OwnTemplate") -> set[int]:
    """All tokens that end a generated text: eot, those in a checkpoint's header, and the one that ends an answer."""
    ends = {enc.eot, *(i for i in meta.get("ends") or () if type(i) is int)}
    return ends if template == "none" else ends | {end_of_answer(enc, template)}


def encode(enc: Tokenizer, messages: list[dict], template: "str | OwnTemplate", learn_prompts: bool = False,
           ) -> tuple[list[int], list[bool]]:
    """The tokens of a conversation, and for each whether it is learned: whether it belongs to a message of the
    assistant, with the token that ends the message, or, with learn_prompts, to anything. A message with "weight": 0 is
    not learned. The first token is the template's start token if the tokenizer has it, else bos; a model's own template
    writes all tokens."""
    if isinstance(template, OwnTemplate):
        return encode_own(enc, messages, template, learn_prompts)
    form = TEMPLATES[template]
    ids = [enc.special[form["start"]]] if form["start"] in enc.special else enc.start
    learned = [learn_prompts] * len(ids)
    for i, message in enumerate(messages):
        before, after = (enc.encode(mark, special=True).tolist() for mark in form[message["role"]])
        content, answer = enc.encode(message["content"]).tolist(), message["role"] == "assistant"
        if answer:
            content.append(end_of_answer(enc, template))
            after = after if i + 1 < len(messages) else []
        ids = ids + before + content + after
        yes = (answer or learn_prompts) and message.get("weight") != 0
        learned += [learn_prompts] * len(before) + [yes] * len(content) + [learn_prompts] * len(after)
    return ids, learned


def encode_own(enc: Tokenizer, messages: list[dict], template: OwnTemplate, learn_prompts: bool,
               ) -> tuple[list[int], list[bool]]:
    """encode() for a model's own template: the ids are those of the whole text. An answer is learned where the template
    marks it or locate() finds it; others are counted in template.not_located."""
    text, marked = template.render(messages)
    ids, places = encode_placed(enc, text)
    learned = np.full(len(ids), learn_prompts)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for number, i in enumerate(answers):
        learn = messages[i].get("weight") != 0
        if learn and learn_prompts or not learn and not learn_prompts:
            continue
        if len(marked) == len(answers):
            span = marked[number][0], marked[number][1] + length_of_end(enc, template, text[marked[number][1]:])
        else:
            span = template.locate(enc, messages, i, text)
        if span is None:
            template.not_located += 1
            learned[:] &= learn  # where an answer that must not be learned may be anywhere, nothing is learned
        else:
            start, end = (len(in_normal_form(enc, text[:at])) for at in span)
            learned[(places[:, 0] < end) & (places[:, 1] > start)] = learn
    return ids, learned.tolist()


def length_of_end(enc: Tokenizer, template: OwnTemplate, after: str) -> int:
    """The characters of the token that ends an answer, if the text after the answer begins with that token."""
    name = enc.decode([end_of_answer(enc, template)])
    return len(name) if after.startswith(name) else 0


def encode_prompt(enc: Tokenizer, messages: list[dict], template: "str | OwnTemplate", role: str = "assistant",
                  ) -> list[int]:
    """The tokens of a conversation, and those that begin the next message, which is of this role."""
    if isinstance(template, OwnTemplate):
        text = template.render(messages, answer=True)[0] if role == "assistant" else around(template, messages)[0]
        return enc.encode(text, special=True).tolist()
    ids, _ = encode(enc, [*messages, {"role": role, "content": ""}], template)
    end = 1 if role == "assistant" else len(enc.encode(TEMPLATES[template][role][1], special=True))
    return ids[:len(ids) - end]


def around(template: OwnTemplate, messages: list[dict]) -> tuple[str, str]:
    """The text before and after the content of a user's message that follows these messages, up to the answer."""
    content = "question"
    text = template.render([*messages, {"role": "user", "content": content}], answer=True)[0]
    before, found, after = text.rpartition(content)
    if not found:
        raise UserError("the model's chat template does not show the user's message: give --template=NAME")
    return before.rstrip(" "), after  # a word's token begins with the blank before it


def chat_entry(enc: Tokenizer, template: "str | OwnTemplate") -> dict:
    """The header's entry "chat", by which the page in the browser, where no Jinja runs, makes a prompt of one message
    of a user: {"chat": {"template", "before", "after", "strips", "end"}}. before, after: with a model's own template
    texts, which are encoded together with the message, and where names of special tokens stand for these tokens; with
    another template ids, between which the message is encoded by itself. strips: blanks around the message are left
    out. end: the token that ends an answer. A date that a template writes is that of today. {} where there is no
    template, or one that refuses the message or changes it in another way."""
    if template == "none":
        return {}

    def prompt(message: str) -> list[dict]:
        return [{"role": "user", "content": message}]

    try:
        if isinstance(template, OwnTemplate):
            mark = "x7message7x"
            before, _, after = template.render(prompt(mark), answer=True)[0].partition(mark)
            forms = [(before + message + after, before + message.strip() + after,
                      template.render(prompt(message), answer=True)[0]) for message in MESSAGES]
            strips = next((strips for strips in (False, True) if all(form[strips] == form[2] for form in forms)), None)
            if strips is None:
                return {}
        else:
            form, strips = TEMPLATES[template], False
            after = [i for mark in (form["user"][1], form["assistant"][0]) for i in enc.encode(mark, True).tolist()]
            before = encode_prompt(enc, prompt(""), template)
            before = before[:len(before) - len(after)]
        return {"chat": {"template": getattr(template, "name", template), "before": before, "after": after,
                         "strips": strips, "end": end_of_answer(enc, template)}}
    except UserError:
        return {}


MESSAGES = ("Hi", " \n Two  lines,\n\n'quoted' \"text\", <b>&amp;</b> {{ x }} {% y %} é\\n \t\n")  # probes


def end_of_prompt(enc: Tokenizer, template: "str | OwnTemplate", messages: list[dict]) -> str:
    """The mark that follows a user's message: a special token, or a text; where that is blank, with the beginning of
    the answer. messages: those before the user's."""
    if isinstance(template, OwnTemplate):
        after, special = around(template, messages)[1], names_of_special(enc)
        found = re.match(rf"\s*({special})", after) if special else None
        return found[1] if found else after.strip() or after
    after, before = TEMPLATES[template]["user"][1], TEMPLATES[template]["assistant"][0]
    return after.strip() or after + before


# ---- rows ------------------------------------------------------------------------------------------------------------


def row_length(longest: int, context: int, block_size: int = 0) -> int:
    """The number of tokens in a row: block_size if it is given, else the model's context, or, where that is more than
    1,024, what the longest example needs, as a multiple of 64 up to 1,024."""
    if not 0 <= block_size <= context:
        raise UserError(f"block_size={block_size}: it must be from 1 to {context}, the model's context, or 0")
    return block_size or (context if context <= 1024 else min(-(-longest // 64) * 64, 1024))


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
