"""Reward models: a language model with one more weight vector, which gives an answer a number. reward.py trains them.

    judge = load("out-reward/reward.safetensors")
    judge([[{"role": "user", "content": "2 + 2"}]], ["4"])     # [1.3]: the larger, the better

    r(x, y) = w . h,    h: the state after the model's last norm at the last token of answer y to prompt x

The file is a checkpoint or an adapter with the array reward.weight (C,) beside its own. Other scripts refuse it by
name, as its states are no longer made for writing.
"""
import os
import sys
from collections.abc import Callable

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np

from config import UserError
from conversations import encode, template_of
from lora import load_adapted
from model import GPT, compute_dtype
from run_folder import read_header
from tokenizer import Tokenizer

BATCH = 64  # answers that are scored at a time


def encode_answer(enc: Tokenizer, prompt: list[dict], answer: str, form) -> tuple[list[int], list[bool]]:
    """The tokens of a conversation up to the end of its last answer, and for each whether it is of that answer."""
    earlier = [message | {"weight": 0} for message in prompt]
    ids, learned = encode(enc, [*earlier, {"role": "assistant", "content": answer}], form)
    end = len(ids) - learned[::-1].index(True) if any(learned) else 0
    return ids[:end], learned[:end]


def scores(model: GPT, weight: mx.array, ids: mx.array, last: mx.array) -> mx.array:
    """w . h of each row's token at the place `last` (N,): ids (N, T), padded at the right -> (N,), float32."""
    hidden = model.norm(model.residual(ids))
    return mx.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0].astype(mx.float32) @ weight


def load(path: str) -> Callable[[list[list[dict]], list[str]], list[float]]:
    """The function of a reward model's file: (N prompts as messages, N answers) -> N rewards."""
    header = read_header(path)
    if not os.path.exists(path):
        raise UserError(f"there is no reward model {path}: train one with reward.py")
    if header and "reward" not in header:
        raise UserError(f"{path} is no reward model: give one of reward.py")
    model, meta = load_adapted(path, reward=True)
    enc, weight = Tokenizer.from_dict(meta["tokenizer"]), meta.get("reward")
    if not isinstance(weight, mx.array) or weight.shape != (model.config.n_embd,):
        raise UserError(f"{path} has no vector reward.weight that fits its model: copy or train it again")
    form = template_of(meta, enc)
    model.set_dtype(compute_dtype("auto"))
    model.eval()

    def judge(prompts: list[list[dict]], answers: list[str]) -> list[float]:
        rows, found = [], np.zeros(len(answers))
        for prompt, answer in zip(prompts, answers, strict=True):
            ids, _ = encode_answer(enc, prompt, answer, form)
            if len(ids) > model.config.block_size:
                raise UserError(f"{path} reads {model.config.block_size} tokens, and an answer with its prompt has "
                                f"{len(ids)}: train a longer reward model, or take a smaller --max_new_tokens")
            rows.append(ids)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for start in range(0, len(rows), BATCH):
            which = order[start:start + BATCH]
            ids = np.zeros((len(which), max(len(rows[i]) for i in which)), np.int32)
            for row, i in zip(ids, which, strict=True):
                row[:len(rows[i])] = rows[i]
            last = mx.array([len(rows[i]) - 1 for i in which])
            found[which] = np.array(scores(model, weight, mx.array(ids), last))
        return found.tolist()

    return judge


if __name__ == "__main__":
    print(f"{os.path.basename(sys.argv[0])} has no command of its own: run reward.py, which uses it", file=sys.stderr)
    sys.exit(2)
