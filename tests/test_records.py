"""records.py: each layout that it reads, as tokens and mask; bad rows; the split."""
import gzip
import json
import random
import subprocess
import sys

import numpy as np
import pytest

import records
from config import UserError
from conversations import encode, encode_prompt
from records import read_conversations, read_labelled, read_preferences, show, split
from tokenizer import Tokenizer, byte_tokenizer

BYTES = byte_tokenizer()
START, END, EOT = 257, 258, 256
CHATML = Tokenizer("byte", BYTES.tokens, {**BYTES.special, "<|im_start|>": START, "<|im_end|>": END})

# ---- layouts: a file, and the turns that it must give ----------------------------------------------------------------
#
# "answer: ..." is a message of the assistant that is learned, "assistant: ..." one that is not.

CONVERSATIONS = {
    "Alpaca (instruction, input, output)": ("a.json", """[
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Sing.", "input": "", "output": "La"}]""",
        [["user: Add.\n\n1 2", "answer: 3"], ["user: Sing.", "answer: La"]]),
    "Alpaca (system, history, instruction, input, output)": ("a.json", """[
        {"instruction": "Sing.", "input": "", "output": "La", "system": "", "history": []},
        {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief.", "history": [["Hi", "Hello"],
         ["How?", "So."]]}]""",
        [["user: Sing.", "answer: La"], ["system: Be brief.", "user: Hi", "answer: Hello", "user: How?", "answer: So.",
                                         "user: Add.\n\n1 2", "answer: 3"]]),
    "Alpaca (instruction, context, output)": ("a.jsonl", """
        {"instruction": "Who?", "context": "Ann sang.", "output": "Ann"}""",
        [["user: Who?\n\nAnn sang.", "answer: Ann"]]),
    "Dolly (instruction, input, response)": ("a.json", """[
        {"instruction": "Add.", "input": "1 2", "response": "3"},
        {"instruction": "Sing.", "input": "", "response": "La"}]""",
        [["user: Add.\n\n1 2", "answer: 3"], ["user: Sing.", "answer: La"]]),
    "messages (messages)": ("a.jsonl", """
        {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hey", "weight": 0}, {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Ciao", "weight": 1}]}
        {"messages": [{"role": "user", "content": "Hi", "train": true}, {"role": "assistant", "content": "Hey", "train": false}, {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Ciao", "train": true}]}
        {"messages": [{"role": "developer", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]}, {"role": "assistant", "content": " né 漢 "}]}""",  # noqa: E501
        [["system: Be kind.", "user: Hi", "assistant: Hey", "user: Bye", "answer: Ciao"],
         ["user: Hi", "assistant: Hey", "user: Bye", "answer: Ciao"],
         ["system: x", "user: a b", "answer:  né 漢 "]]),
    "messages (system, messages)": ("a.jsonl", """
        {"system": "Be kind.", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hey"}]}
        {"system": "Be kind.", "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hey"}]}""",  # noqa: E501
        [["system: Be kind.", "user: Hi", "answer: Hey"]] * 2),
    "ShareGPT (system, conversations)": ("a.json", """[{"id": "x_0", "system": "Be kind.", "conversations": [
        {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hey"},
        {"from": "user", "value": "Bye"}, {"from": "bing", "value": "Ciao"}, {"from": "human", "value": "More"}]}]""",
        [["system: Be kind.", "user: Hi", "answer: Hey", "user: Bye", "answer: Ciao"]]),
    "ShareGPT (conversations)": ("a.jsonl", """
        {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "Hi"}, {"from": "chatgpt", "value": "Hey"}]}
        {"conversations": [{"role": "user", "content": "Hi", "from": null, "value": null}, {"role": "assistant", "content": "Hey"}]}
        {"conversations": ["Hi", "Hey", "Bye", "Ciao"], "source": "lima"}""",  # noqa: E501
        [["system: s", "user: Hi", "answer: Hey"], ["user: Hi", "answer: Hey"],
         ["user: Hi", "answer: Hey", "user: Bye", "answer: Ciao"]]),
    "Capybara (conversation)": ("a.jsonl", """
        {"source": "x", "conversation": [{"input": "Hi", "output": "Hey"}, {"input": "Bye", "output": "Ciao"}]}""",
        [["user: Hi", "answer: Hey", "user: Bye", "answer: Ciao"]]),
    "prompt and completion (prompt, completion)": ("a.jsonl", """
        {"prompt": "The sky is", "completion": " blue."}
        {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "Color?"}], "completion": [{"role": "assistant", "content": "Blue."}]}
        {"prompt": "\\n\\nHuman: Hi\\n\\nAssistant: Hey\\n\\nHuman: Bye\\n\\nAssistant:", "completion": "Ciao"}
        {"prompt": "Human: a kind of ape?", "completion": "Yes"}""",  # noqa: E501
        [["user: The sky is", "answer:  blue."], ["system: s", "user: Color?", "answer: Blue."],
         ["user: Hi", "answer: Hey", "user: Bye", "answer: Ciao"], ["user: Human: a kind of ape?", "answer: Yes"]]),
    "problem and solution (problem, solution)": ("a.jsonl", '{"lang": "py", "problem": "p", "solution": "s"}',
                                                 [["user: p", "answer: s"]]),
    "inputs and targets (inputs, targets)": ("a.csv", "inputs,targets,task\np,t,flan\n", [["user: p", "answer: t"]]),
    "prompt and response (prompt, response)": ("a.jsonl", '{"prompt": "p", "response": "r", "more": 1}',
                                               [["user: p", "answer: r"]]),
    "Dolly (instruction, context, response)": ("a.jsonl", """
        {"instruction": "Who?", "context": "Ann sang.", "response": "Ann", "category": "closed_qa"}
        {"instruction": "Why?", "context": "", "response": "So.", "category": "open_qa"}""",
        [["user: Who?\n\nAnn sang.", "answer: Ann"], ["user: Why?", "answer: So."]]),
    "OpenOrca (system_prompt, question, response)": ("a.jsonl", """
        {"id": "niv.1", "system_prompt": "Explain.", "question": "Why?", "response": "So."}
        {"id": "niv.2", "system_prompt": "", "question": "Who?", "response": "Ann"}""",
        [["system: Explain.", "user: Why?", "answer: So."], ["user: Who?", "answer: Ann"]]),
    "question and answer (question, answer)": ("a.csv", '\ufeffQuestion,Answer\r\n"1, 2\r\nor ""3""?",2\r\n',
                                               [['user: 1, 2\r\nor "3"?', "answer: 2"]]),
    "question and answer (question, context, answer)": ("a.csv", "question;context;answer\nWho?;Ann sang.;Ann\n",
                                                        [["user: Who?\n\nAnn sang.", "answer: Ann"]]),
    "MetaMath (query, response)": ("a.json", """[{"type": "x", "query": "1+1?", "original_question": "?",
        "response": "2"}]""", [["user: 1+1?", "answer: 2"]]),
    "input and output (input, output)": ("a.tsv", "input\toutput\na, b\tc\n", [["user: a, b", "answer: c"]]),
    "Self-Instruct (instruction, instances)": ("a.jsonl", """
        {"id": "seed_0", "instruction": "Add.", "instances": [{"input": "1 2", "output": "3"}, {"input": "", "output": "?"}]}""",  # noqa: E501
        [["user: Add.\n\n1 2", "answer: 3"], ["user: Add.", "answer: ?"]]),
}
ORCA = {"system": "s", "question": "Q?", "chosen": "good", "rejected": "bad"}
HH = """{"chosen": "\\n\\nHuman: Hi\\n\\nAssistant: Hey\\n\\nHuman: Bye\\n\\nAssistant: Ciao", "rejected": "\\n\\nHuman: Hi\\n\\nAssistant: Hey\\n\\nHuman: Bye\\n\\nAssistant: What?"}"""  # noqa: E501
PREFERENCES = {  # the turns of the prompt, of which none is learned, the chosen and the rejected answer
    "HH (chosen, rejected)": ("a.jsonl.gz", HH, [["user: Hi", "assistant: Hey", "user: Bye", "Ciao", "What?"]]),
    "pairs (prompt, chosen, rejected)": ("a.jsonl", """
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
        {"prompt": [{"role": "user", "content": "Color?"}], "chosen": [{"role": "assistant", "content": "Blue."}], "rejected": [{"role": "assistant", "content": "Red."}]}
        {"prompt": "Hi", "prompt_id": "f0", "chosen": [{"content": "Hi", "role": "user"}, {"content": "Hey", "role": "assistant"}], "rejected": [{"content": "Hi", "role": "user"}, {"content": "No", "role": "assistant"}], "messages": [{"content": "Hi", "role": "user"}, {"content": "Hey", "role": "assistant"}], "score_chosen": 8.0, "score_rejected": 1.0}
        {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "Hi"}], "chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hey"}], "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No"}]}
        {"prompt": [{"role": "system", "content": "s"}], "chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hey"}], "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No"}]}
        {"prompt": "b", "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "A"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "B"}], "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "A"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "C"}]}
        {"prompt": "\\n\\nHuman: Hi\\n\\nAssistant:", "chosen": "Hey", "rejected": "No"}""",  # noqa: E501
        [["user: The sky is", " blue.", " green."], ["user: Color?", "Blue.", "Red."], ["user: Hi", "Hey", "No"],
         *[["system: s", "user: Hi", "Hey", "No"]] * 2, ["user: a", "assistant: A", "user: b", "B", "C"],
         ["user: Hi", "Hey", "No"]]),
    "pairs with an implicit prompt (chosen, rejected)": ("a.jsonl", """
        {"chosen": "The sky is blue.", "rejected": "The sky is blurred."}
        {"chosen": [{"role": "user", "content": "Color?"}, {"role": "assistant", "content": "Blue."}], "rejected": [{"role": "user", "content": "Color?"}, {"role": "assistant", "content": "Red."}]}""",  # noqa: E501
        [["user: The sky is", " blue.", " blurred."], ["user: Color?", "Blue.", "Red."]]),
    "Orca pairs (system, question, chosen, rejected)": ("a.json", json.dumps([ORCA]), [["system: s", "user: Q?", "good", "bad"]]),  # noqa: E501
    "distilabel pairs (system, input, chosen, rejected)": ("a.json", """[{"system": "", "input": "Q?", "chosen": "good",
        "rejected": "bad", "rating": [9.0, 1.0]}]""", [["user: Q?", "good", "bad"]]),
    "Alpaca pairs (instruction, input, chosen, rejected)": ("a.json", """[
        {"instruction": "Add.", "input": "1 2", "chosen": "3", "rejected": "4"}]""", [["user: Add.\n\n1 2", "3", "4"]]),
    "ShareGPT pairs (conversations, chosen, rejected)": ("a.json", """[{"conversations": [{"from": "human", "value":
        "Hi"}], "chosen": {"from": "gpt", "value": "Hey"}, "rejected": {"from": "gpt", "value": "No"}}]""",
        [["user: Hi", "Hey", "No"]]),
    "OpenAI pairs (input, preferred_output, non_preferred_output)": ("a.jsonl", """
        {"input": {"messages": [{"role": "user", "content": "Hi"}], "tools": []}, "preferred_output": [{"role": "assistant", "content": "Hey"}], "non_preferred_output": [{"role": "assistant", "content": "No"}]}""",  # noqa: E501
        [["user: Hi", "Hey", "No"]]),
    "torchtune pairs (chosen_conversations, rejected_conversations)": ("a.json", """[{
        "chosen_conversations": [{"content": "Hi", "role": "user"}, {"content": "Hey", "role": "assistant"}],
        "rejected_conversations": [{"content": "Hi", "role": "user"}, {"content": "No", "role": "assistant"}]}]""",
        [["user: Hi", "Hey", "No"]]),
}
LABELLED = {  # the turns of the prompt, the answer, the label
    "labelled prompt and completion (prompt, completion, label)": ("a.jsonl", """
        {"prompt": "The sky is", "completion": " blue.", "label": true}
        {"prompt": [{"role": "user", "content": "Color?"}], "completion": [{"role": "assistant", "content": "Red."}], "label": false}
        {"prompt": "a", "completion": "b", "label": 1}
        {"prompt": "a", "completion": "b", "label": 0}""",  # noqa: E501
        [["user: The sky is", " blue.", True], ["user: Color?", "Red.", False], ["user: a", "b", True],
         ["user: a", "b", False]]),
    "labelled prompt and response (prompt, response, label)": ("a.csv", "prompt,response,label\na,b,True\na,c,0.0\n"
                                                               "a,d,Desirable\na,e,undesirable\n",
                                                               [["user: a", "b", True], ["user: a", "c", False],
                                                                ["user: a", "d", True], ["user: a", "e", False]]),
    "labelled messages (messages, kto_tag)": ("a.json", """[{"messages": [{"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hey"}, {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"}], "kto_tag": false}]""",
        [["user: Hi", "assistant: Hey", "user: a", "b", False]]),
    "HH (chosen, rejected)": ("a.jsonl", HH[:-1] + ', "label": 1}',
                              [["user: Hi", "assistant: Hey", "user: Bye", "Ciao", True],
                               ["user: Hi", "assistant: Hey", "user: Bye", "What?", False]]),
}


def chatml(turns: list[str]) -> tuple[list[int], list[bool]]:
    """Tokens and mask as ChatML is defined: <|im_start|>ROLE, a new line, the text, <|im_end|>, a new line."""
    ids, learned = [EOT], [False]
    for i, turn in enumerate(turns):
        role, text = turn.split(": ", 1)
        before = [START, *("assistant" if role == "answer" else role).encode(), *b"\n"]
        after = b"" if i + 1 == len(turns) else b"\n"
        ids += [*before, *text.encode(), END, *after]
        learned += [False] * len(before) + [role == "answer"] * (len(text.encode()) + 1) + [False] * len(after)
    return ids, learned


def write(path, content) -> str:
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


@pytest.mark.parametrize("layout", CONVERSATIONS)
def test_conversations(tmp_path, capsys, layout):
    name, content, turns = CONVERSATIONS[layout]
    path = write(tmp_path / name, content)
    found = read_conversations(path)
    assert [encode(CHATML, messages, "chatml") for messages in found] == list(map(chatml, turns))
    out, err = capsys.readouterr()
    assert out.startswith(f"{path}: {len(turns)} conversations, {layout}") and out.count("\n") == 1 and not err


@pytest.mark.parametrize("layout", PREFERENCES)
def test_preferences(tmp_path, capsys, layout):
    name, content, pairs = PREFERENCES[layout]
    path = write(tmp_path / name, content)
    found = read_preferences(path)
    assert len(found) == len(pairs)
    for (prompt, *answers), (*turns, chosen, rejected) in zip(found, pairs, strict=True):
        for answer, wanted in zip(answers, (chosen, rejected), strict=True):
            ids, learned = chatml([*turns, f"answer: {wanted}"])
            assert encode(CHATML, [*prompt, {"role": "assistant", "content": answer}], "chatml")[0] == ids
            assert len(encode_prompt(CHATML, prompt, "chatml")) == learned.index(True)
    assert f"{path}: {len(pairs)} pairs, {layout}" in capsys.readouterr().out


@pytest.mark.parametrize("layout", LABELLED)
def test_labelled(tmp_path, capsys, layout):
    name, content, answers = LABELLED[layout]
    path = write(tmp_path / name, content)
    found = read_labelled(path)
    assert [label for _, _, label in found] == [label for *_, label in answers]
    for (prompt, answer, _), (*turns, wanted, _) in zip(found, answers, strict=True):
        ids, learned = chatml([*turns, f"answer: {wanted}"])
        assert encode(CHATML, [*prompt, {"role": "assistant", "content": answer}], "chatml")[0] == ids
        assert len(encode_prompt(CHATML, prompt, "chatml")) == learned.index(True)
    assert f"{path}: {len(answers)} labelled answers, {layout}" in capsys.readouterr().out


def test_every_known_layout_is_in_the_tables():
    tested = [name for table in (CONVERSATIONS, PREFERENCES) for name in table]
    for layout in {**records.CONVERSATIONS, **records.PREFERENCES}:
        assert any(name.startswith(f"{layout} (") for name in tested)


def test_texts_are_kept(tmp_path):
    text = "né 🙂 \u2028\x00\r\n " + "x" * 200_000
    messages = [{"role": "user", "content": ""}, {"role": "assistant", "content": text}]
    for ensure_ascii in (True, False):
        path = write(tmp_path / "a.jsonl", json.dumps({"messages": messages}, ensure_ascii=ensure_ascii))
        assert read_conversations(path) == [messages]
    ids, learned = encode(CHATML, messages, "chatml")
    assert CHATML.decode([i for i, yes in zip(ids, learned, strict=True) if yes][:-1]) == text


def test_messages_in_parquet(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [[USER, ANSWER], [USER, {**ANSWER, "weight": 0}, {**ANSWER, "content": "x", "weight": 1}]]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": row, "system": None} for row in rows] * 300),
                        tmp_path / "a.parquet")
    assert read_conversations(str(tmp_path / "a.parquet")) == [
        [USER, ANSWER], [USER, {**ANSWER, "weight": 0}, {**ANSWER, "content": "x"}]] * 300


def test_all_rows_of_a_mixed_file(tmp_path, capsys):
    """Each row is read by itself. Messages come before a prompt, a prompt before an instruction."""
    path = write(tmp_path / "a.jsonl", """
        {"instruction": "i", "output": "o", "prompt": "p", "response": "r", "text": "t"}
        {"prompt": "p", "response": "r", "messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}
        {"instruction": "i", "output": "o", "messages": null}
        {"instruction": "i", "output": "o"}""")  # noqa: E501
    assert [[m["content"] for m in talk] for talk in read_conversations(path)] == [
        ["p", "r"], ["u", "a"], ["i", "o"], ["i", "o"]]
    line = capsys.readouterr().out
    assert "4 conversations, 2 Alpaca (instruction, output), 1 prompt and response (prompt, response), 1 mess" in line
    assert "not read: instruction, output, text, prompt, response" in line


def test_turns_without_an_answer_are_counted(tmp_path, capsys):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"},
            {"role": "user", "content": "d"}]
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"messages": talk[:n]}) for n in (2, 3, 4)))
    assert read_conversations(path) == [talk[:2]] * 3
    assert "; 3 turns after the last answer left out" in capsys.readouterr().out


def test_unread_fields_are_named(tmp_path, capsys):
    thought = {"role": "assistant", "content": "Hey", "thinking": "Hm.", "tool_calls": [], "name": None}
    path = write(tmp_path / "a.jsonl", json.dumps({"id": 3, "messages": [{"role": "user", "content": "Hi"}, thought]}))
    read_conversations(path)
    assert capsys.readouterr().out == f"{path}: 1 conversations, messages (messages); not read: id, messages.thinking\n"


# ---- bad rows --------------------------------------------------------------------------------------------------------

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hey"}


@pytest.mark.parametrize("row, says", [
    ("{", "no JSON"), ("[1]", "not an object"), ("3", "not an object"), ("[" * 3000, "no JSON"),
    ({}, "no known layout"), ({"prompt": "x"}, "no known layout has the fields prompt"),
    ({"text": "x"}, "data.py reads texts"), ({"A\n b": "x"}, "the fields a b\n"),
    (ORCA, "dpo.py reads pairs"), ({"prompt": 3, "response": "x"}, "prompt is not a text"),
    ({"prompt": "x", "response": " \n"}, "an empty response"), ({"prompt": "x", "response": None}, "no known layout"),
    ({"messages": []}, "no list of messages"), ({"messages": "x"}, "no list"), ({"messages": [3]}, "not an object"),
    ({"messages": [USER]}, "no answer to learn"), ({"messages": [USER, {**ANSWER, "weight": 0}]}, "no answer to learn"),
    ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "weight is 0.5"),
    ({"messages": [USER, {"role": "assistant", "content": ""}, USER, ANSWER]}, "an empty response"),
    ({"messages": [USER, {"role": "tool", "content": "x"}, ANSWER]}, "role 'tool' is not one"),
    ({"messages": [USER, {**ANSWER, "tool_calls": [{}]}]}, "calls a tool"), ({"messages": [USER, {}]}, "role 'None'"),
    ({"messages": [{"role": "user"}, ANSWER]}, "content is missing"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "text": "x"}]}, ANSWER]}, "a part that is not text"),
    ({"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "y"}]}, "'function_call'"),
    ({"instruction": "x", "output": "y", "history": [["a", None]]}, "history has an item"),
    ({"prompt": "x", "completion": "y", "label": False}, "its label is false"),
    ({"prompt": "x", "completion": "y", "kto_tag": "False"}, "its label is false"),
    ({"instruction": "x", "instances": [3]}, "instances is not a list"),
    ({"instruction": "x", "instances": [{"input": "y"}]}, "output is missing"),
])
def test_bad_conversation(tmp_path, capsys, row, says):
    path = write(tmp_path / "a.jsonl", "\n".join([json.dumps({"prompt": "x", "response": "y"}), "", row if isinstance(
        row, str) else json.dumps(row)]))
    assert read_conversations(path) == [[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]]
    out, err = capsys.readouterr()
    assert "1 conversations" in out and out.endswith("; 1 of 2 rows SKIPPED\n")
    assert err.startswith(f"{path}, line 3 is skipped: ") and says in err and err.count("\n") == 1
    with pytest.raises(UserError, match="1 of 2 rows are bad, such as .*line 3: .*--strict=True"):
        read_conversations(path, strict=True)


@pytest.mark.parametrize("row, says", [
    ({**ORCA, "rejected": ""}, "rejected has no answer"), ({**ORCA, "chosen": "\n"}, "chosen has no answer"),
    ({**ORCA, "rejected": "good"}, "are equal"), ({"chosen": "a b", "rejected": "c d"}, "do not answer one prompt"),
    ({"chosen": [USER], "rejected": [USER, ANSWER]}, "chosen has no answer"),
    ({"chosen": [USER, ANSWER], "rejected": [ANSWER]}, "do not answer one prompt"),
    ({"chosen": [ANSWER], "rejected": [ANSWER]}, "do not answer one prompt"), ({"chosen": "x"}, "no known layout"),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: b"}, "not answer one prompt"),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant:"}, "rejected has no answer"),
    ({"prompt": "x", "completion": "y", "label": True}, "--loss=kto"), ({**ORCA, "chosen": 1}, "chosen is not a text"),
])
def test_bad_pair(tmp_path, capsys, row, says):
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, (ORCA, row))))
    assert len(read_preferences(path)) == 1
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("row, says", [
    ({"prompt": "x", "completion": "y", "label": "good"}, "label is 'good', not true or false"),
    ({"prompt": "x", "completion": "y", "label": 0.5}, "'0.5'"), ({"prompt": "x", "completion": "y"}, "no known"),
    ({"prompt": "x", "completion": "", "label": 1}, "an empty response"), ({**ORCA, "rejected": ""}, "no answer"),
])
def test_bad_label(tmp_path, capsys, row, says):
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, (ORCA, row))))
    assert len(read_labelled(path)) == 2
    assert says in capsys.readouterr().err


def test_many_bad_rows(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", "x\n" * 30 + json.dumps({"prompt": "a", "response": "b"}))
    assert len(read_conversations(path)) == 1
    out, err = capsys.readouterr()
    assert err.count("\n") == 3 and "30 of 31 rows SKIPPED" in out
    path = write(tmp_path / "b.json", json.dumps([{"head": "x", "tail": "y"}] * 5))
    for read, layout in ((read_conversations, "Alpaca (instruction, output)"), (read_preferences, "Orca pairs (quest"),
                         (read_labelled, "labelled answers (prompt, completion, label)")):
        with pytest.raises(UserError, match="row 1: no known layout has the fields head, tail") as caught:
            read(path)
        assert layout in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="is empty: it must hold conversations"):
        read_conversations(write(tmp_path / "c.jsonl", "\n \n"))
    assert not capsys.readouterr().err


def test_any_row_is_read_or_refused():
    """Rows of random fields and values never raise anything but ValueError."""
    rng = random.Random(0)
    layouts = [*records.CONVERSATIONS.values(), *records.PREFERENCES.values(), *records.OPENING, *records.LABELS]
    names = sorted(set(" ".join(layouts).replace("?", "").split()))
    keys = ["role", "content", "from", "value", "input", "output", "messages", "text", "type", "weight"]
    words = ["", "x", "\n\nHuman: a\n\nAssistant: b", "\n\nHuman:", "[1]", "true", "\ud800", "Hi there", "Hi you",
             "user", "assistant", "[" * 5000]

    def value(depth=0):
        kind = rng.random()
        if kind < 0.5 or depth > 3:
            return rng.choice(words)
        if kind < 0.6:
            return rng.choice([None, 0, 1, 2.5, True, {}, []])
        if kind < 0.8:
            return [value(depth + 1) for _ in range(rng.randrange(4))]
        return {key: value(depth + 1) for key in rng.sample(keys, 3)}

    read = 0
    for _ in range(8_000):
        row = {name: value() for name in rng.sample(names, 4)}
        if rng.random() < 0.5:
            row["messages"] = [{"role": rng.choice(["user", "assistant"]), "content": value()} for _ in range(3)]
        for convert in (records.to_conversations, records.to_pairs, records.to_labelled):
            try:
                _, fields, found = convert({name: part for name, part in row.items() if part is not None})
            except ValueError:
                continue
            read += 1
            assert set(fields) <= set(row) and found
            json.dumps(found, ensure_ascii=False).encode()  # no half of a surrogate pair is left
    assert read > 300


# ---- use -------------------------------------------------------------------------------------------------------------


def talk(*texts) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_split_keeps_equal_prompts_together():
    rng = np.random.default_rng(0)
    for share in (0.05, 0.3, 0.9):
        questions = rng.integers(0, 300, 1000)
        found = [talk(f"{'Why' if rng.random() < 0.5 else ' why  '} {question}?", f"So {rng.integers(3)}",
                      *["And?", "Yes"] * (i % 2)) for i, question in enumerate(questions)]
        training, held_out = split(found, share, 1)
        sides = [{int("".join(filter(str.isdigit, messages[0]["content"]))) for messages in side}
                 for side in (training, held_out)]
        assert not sides[0] & sides[1] and abs(len(held_out) / 1000 - share) < 0.01
        assert sorted(map(repr, training + held_out)) == sorted(map(repr, found))
        assert split(found, share, 1) == (training, held_out) != split(found, share, 2)


@pytest.mark.parametrize("examples", [
    [talk(str(i), "x") for i in range(40)], [(talk(str(i)), "x", "y") for i in range(40)],
    [(talk(str(i)), "x", i % 2 > 0) for i in range(40)]])
def test_split_of_different_prompts_is_a_permutation(examples):
    order = np.random.default_rng(7).permutation(40)
    assert split(examples, 0.1, 7) == ([examples[i] for i in order[4:]], [examples[i] for i in order[:4]])


def test_split_needs_two_prompts():
    for found in ([talk("a", "b")], [talk("a", "b"), talk("A ", "c")] * 9, [(talk("a"), "b", True)] * 2, []):
        with pytest.raises(UserError, match="cannot be split.*--val_data"):
            split(found, 0.1, 1)
    with pytest.raises(UserError, match="none for training"):
        split([talk("a", "b"), talk("c", "d")], 0.9, 1)
    training, held_out = split([talk("a", "b")] * 99 + [talk("c", "d")] * 2, 0.01, 1)  # no group has one example
    assert len(training) == 99 and len(held_out) == 2
    assert len(split([talk("", str(i // 2)) for i in range(40)], 0.1, 1)[1]) == 4  # no prompt: only equal ones together
    systems = [[{"role": "system", "content": str(i)}, *talk("Sum up.", "x")] for i in range(40)]
    assert len(split(systems, 0.1, 1)[1]) == 4
    with pytest.raises(UserError, match="cannot be split"):
        split([[*systems[0][:2], *talk("", text)[1:]] for text in "xyz"], 0.1, 1)


def test_show(capsys):
    messages = [{"role": "user", "content": "né\x1b[2J\r\n\x07"}, {"role": "assistant", "content": "a", "weight": 0},
                {"role": "user", "content": "c"}, {"role": "assistant", "content": "漢 b"}]
    show(CHATML, *encode(CHATML, messages, "chatml"))
    first, *lines = capsys.readouterr().out.splitlines()
    assert "59 tokens, of which 6 are learned" in first
    assert lines == ["<|endoftext|><|im_start|>user", "né\\x1b[2J\\r", "\\x07<|im_end|>", "<|im_start|>assistant",
                     "a<|im_end|>", "<|im_start|>user", "c<|im_end|>", "<|im_start|>assistant", ">>>漢 b<|im_end|><<<"]
    show(BYTES, list(b"a" * 300 + b"b" * 300), [i >= 250 for i in range(600)])
    assert capsys.readouterr().out.splitlines()[1:] == ["a" * 200, "[... 200 tokens ...]", ">>>" + "b" * 200 + "<<<"]


def test_no_command_of_its_own():
    done = subprocess.run([sys.executable, records.__file__], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.endswith("no command of its own: run sft.py, which uses it\n")
