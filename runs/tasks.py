"""Written tasks into what sft.py and dpo.py read: python runs/tasks.py seed_tasks.jsonl OUT_DIR

A line of the input is {"instruction", "instances": [{"input", "output"}]}, as in Self-Instruct (Wang et al. 2023); the
first instance is taken. Every fifth task is held out. The rule of the pairs: the chosen answer is the task's own, the
rejected one the same words in another order; answers of fewer than four words make no pair.
"""
import json
import os
import random
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from config import UserError, overrides  # noqa: E402
from draw import write_whole  # noqa: E402

source = ""            # the tasks
out_dir = "out-tasks"  # where tasks.jsonl, tasks-val.jsonl, pairs.jsonl and pairs-val.jsonl go

settings = overrides(globals(), "source", "out_dir")

if not source:
    raise UserError("no tasks: give a jsonl file")
tasks = []
with open(source, "rb") as file:
    for number, line in enumerate(file, 1):
        try:
            task = json.loads(line)
            instance = task["instances"][0]
            prompt = "\n\n".join(part for part in (task["instruction"], instance["input"]) if part)
            if instance["output"].strip():
                tasks.append({"prompt": prompt, "response": instance["output"]})
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {str(error)[:80]}"
            raise UserError(f"{source}, line {number} is no task ({reason})") from error
rng, files = random.Random(1337), {}
for name, part in (("", [task for i, task in enumerate(tasks) if i % 5]), ("-val", tasks[::5])):
    files[f"tasks{name}.jsonl"] = part
    files[f"pairs{name}.jsonl"] = pairs = []
    for task in part:
        words = task["response"].split()
        shuffled = rng.sample(words, len(words))
        if len(words) >= 4 and shuffled != words:
            pairs.append({"prompt": task["prompt"], "chosen": " ".join(words), "rejected": " ".join(shuffled)})
os.makedirs(out_dir, exist_ok=True)
files = {os.path.join(out_dir, name): "".join(json.dumps(row) + "\n" for row in rows) for name, rows in files.items()}
for path, text in files.items():
    if os.path.exists(path):
        with open(path, "rb") as file:
            if file.read() != text.encode():
                raise UserError(f"{path} exists, and is not of these tasks: give another OUT_DIR, or remove it")
for path, text in files.items():
    write_whole(path, text.encode())
print(f"{len(tasks)} tasks, {len(tasks[::5])} of them held out, in {out_dir}")
