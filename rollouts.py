"""Problems, a model's answers to them, and their rewards: what grpo.py and ppo.py share.

    check(settings)                                  # UserError for settings that cannot be
    problems = read(settings)                        # those for training, those held out, and what scores answers
    writer = Writer(model, enc, meta, form, settings)
    asked = [writer.ids_of(problems.at(i)) for i in range(4)]
    answers = writer.answered(asked, 1.0, 0)         # lists of tokens, each up to the token that ends it
    scores = problems.scores([problems.at(i) for i in range(4)], [writer.text_of(answer) for answer in answers])
    batch = arrays_of(asked, answers)                # what log_probs() reads
"""
import contextlib
import hashlib
import itertools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

import reward_model
import tasks
from config import UserError, given
from conversations import encode_prompt, ends_of_text
from lora import KINDS, attach, quantize_base, without_adapters
from lora import merge as merge_adapters
from model import GPT, compute_dtype, cross_entropy, generate
from tokenizer import Tokenizer

# ---- settings --------------------------------------------------------------------------------------------------------


def check(settings: dict):
    """UserError for settings of problems, answers and adapters that cannot be, or that have no effect beside others."""
    s = settings
    task, data, reward, kind = s["task"], s["data"], s["reward"], s["kind"]
    if bool(task) == bool(data):
        raise UserError("give --task=NAME or --data=FILE, one of them: " + ", ".join(tasks.TASKS))
    if kind not in ("full", *KINDS):
        raise UserError(f"kind={kind!r} is not one of full, {', '.join(KINDS)}")
    if kind == "full" and s["base_bits"]:
        raise UserError(f"base_bits={s['base_bits']} with kind=full: packed weights do not train; take kind=lora")
    refuse_idle(
        ("difficulty", "with --data", task), ("val_data", "without --data", data),
        ("val_share", "without --data", data), ("val_share", "with --val_data", not s["val_data"]),
        ("success", "without --reward", reward), ("success", "with --task", not task),
        ("partial_weight", "with --reward", not reward),
        *((name, "with --kind=full", kind != "full") for name in ("rank", "alpha", "targets", "merge", "peft")))
    for name in ("prompts", "max_new_tokens", "rows", "passes", "minibatches", "eval_problems", "pass_k"):
        if s[name] < 1:
            raise UserError(f"{name}={s[name]}: it must be 1 or more")
    if not s["temperature"] > 0:
        raise UserError(f"temperature={s['temperature']}: it must be over 0")


def refuse_idle(*rules: tuple):
    """UserError for a setting of the command line that has no effect: rules of (name, beside what, whether used)."""
    for name, where, used in rules:
        if name in given and not used:
            raise UserError(f"{name} has no effect {where}: leave it out")


# ---- problems --------------------------------------------------------------------------------------------------------


@dataclass
class Problems:
    name: str                       # of the task or the file
    task: str                       # "" for those of a file
    levels: range                   # the task's difficulties
    seed: int
    known: list[tasks.Problem]      # of a file, for training; a task makes an endless series instead
    held_out: list[tasks.Problem]
    hash: str                       # of all of these, and of the reward: a run that goes on needs the same ones
    scores: Callable[[list[tasks.Problem], list[str]], np.ndarray]  # of N answers: (N, 3) reward, right, partial

    def at(self, index: int) -> tasks.Problem:
        """Of an endless series for training; those of a file come in another order in every pass."""
        if self.task:
            return tasks.problem(self.task, self.levels, self.seed, index)
        epoch, i = divmod(index, len(self.known))
        return self.known[np.random.default_rng([self.seed, epoch]).permutation(len(self.known))[i]]


def read(settings: dict) -> Problems:
    """The problems that the settings name, and the function that scores answers to them."""
    s = settings
    task, data, reward, seed = s["task"], s["data"], s["reward"], s["seed"]
    score, levels, known = scorer(s), tasks.difficulties(task, s["difficulty"]) if task else range(0), []
    if task:
        held_out = tasks.problems(task, levels, seed, s["eval_problems"], held_out=True)
    else:
        known = tasks.read_problems(data, not reward)
        if s["val_data"]:
            held_out = tasks.read_problems(s["val_data"], not reward)
            texts = {one.prompt for one in held_out}
        else:  # by prompts, so that none is on both sides
            texts = sorted({one.prompt for one in known})
            order = np.random.default_rng(seed).permutation(len(texts))
            texts = {texts[i] for i in order[:max(1, round(s["val_share"] * len(texts)))]}
            held_out = [one for one in known if one.prompt in texts]
        known = [one for one in known if one.prompt not in texts]
        if not known:
            raise UserError(f"no problem of {data} is left for training: give more, or another --val_data")
        held_out = held_out[:s["eval_problems"]]
    parts = repr((held_out, known, reward and hashlib.sha256(Path(reward).read_bytes()).hexdigest()))
    return Problems(task or data, task, levels, seed, known, held_out, hashlib.sha256(parts.encode()).hexdigest(),
                    score)


def scorer(settings: dict) -> Callable[[list[tasks.Problem], list[str]], np.ndarray]:
    """Problems' scores(). The checker's, unless there is a reward: the function of a Python file, or a reward model.
    Then right and partial stay the checker's for a task; for problems of a file right is whether the reward reaches
    `success`, and partial is the reward."""
    reward, task, success, weight = (settings[name] for name in ("reward", "task", "success", "partial_weight"))
    opening = opening_of(settings)
    if reward.endswith(".safetensors"):
        judge = reward_model.load(reward)
        rewards_of = lambda some, texts: judge(  # noqa: E731
            [[*opening, {"role": "user", "content": one.prompt}] for one in some], texts)
    elif reward:
        function = tasks.load_reward(reward)
        rewards_of = lambda some, texts: [  # noqa: E731
            function(one.prompt, text) for one, text in zip(some, texts, strict=True)]

    def scores(some: list[tasks.Problem], texts: list[str]) -> np.ndarray:
        checked = np.array([tasks.check(one, text) if task or not reward else (0, 0)
                            for one, text in zip(some, texts, strict=True)], np.float64).reshape(-1, 2)
        if not reward:
            return np.column_stack([checked[:, 0] + weight * checked[:, 1], checked])
        rewards = np.array(rewards_of(some, texts), np.float64)
        return np.column_stack([rewards, checked] if task else [rewards, rewards >= success, rewards])

    return scores


def opening_of(settings: dict) -> list[dict]:
    return [{"role": "system", "content": settings["system"]}] if settings["system"] else []


# ---- answers ---------------------------------------------------------------------------------------------------------


class Writer:
    """Draws a model's answers to problems."""

    def __init__(self, model: GPT, enc: Tokenizer, meta: dict, form, settings: dict):
        self.model, self.enc, self.form, self.ends = model, enc, form, ends_of_text(enc, meta, form)
        self.opening, self.seed, self.rows = opening_of(settings), settings["seed"], settings["rows"]
        self.most = settings["max_new_tokens"]

    def ids_of(self, one: tasks.Problem) -> list[int]:
        """The tokens of a problem, up to where the answer begins."""
        ids = encode_prompt(self.enc, [*self.opening, {"role": "user", "content": one.prompt}], self.form)
        room = self.model.config.block_size - self.most
        if len(ids) > room:
            raise UserError(f"the prompt {one.prompt[:60]!r} has {len(ids)} tokens, and a context of "
                            f"{self.model.config.block_size} with max_new_tokens={self.most} has room for "
                            f"{max(0, room)}")
        return ids

    def answered(self, asked: list[list[int]], temperature: float, *numbers: int) -> list[list[int]]:
        """An answer to each prompt, with the token that ends it if that comes within max_new_tokens. They are drawn
        `rows` at a time, prompts of about one length together, as all begin where the shortest ends. The draws depend
        on the numbers."""
        self.model.eval()
        order, found = sorted(range(len(asked)), key=lambda i: len(asked[i])), [[] for _ in asked]
        for start in range(0, len(asked), self.rows):
            which = order[start:start + self.rows]
            open_rows, key = {*range(len(which))}, np.random.SeedSequence([self.seed, start, *numbers])
            for tokens in generate(self.model, [asked[i] for i in which], self.most, temperature,
                                   seed=int(key.generate_state(1, np.uint64)[0]) >> 1, n_vocab=self.enc.n_vocab):
                for row in [*open_rows]:
                    if tokens[row] is not None:
                        answer = found[which[row]]
                        answer.append(tokens[row])
                        if tokens[row] in self.ends or len(answer) == self.most:
                            open_rows.discard(row)
                if not open_rows:
                    break
        self.model.train()
        return found

    def text_of(self, answer: list[int]) -> str:
        return self.enc.decode(itertools.takewhile(lambda token: token not in self.ends, answer))

    def evaluate(self, problems: Problems, pass_k: int, temperature: float) -> dict[str, float]:
        """Figures of the problems held out, each answered pass_k times, always with the same draws."""
        some = [one for one in problems.held_out for _ in range(pass_k)]
        ids = [ids for ids in map(self.ids_of, problems.held_out) for _ in range(pass_k)]
        answers = self.answered(ids, temperature, 1)
        found = problems.scores(some, [*map(self.text_of, answers)])
        right = found[:, 1].reshape(-1, pass_k)
        return {"val_pass1": right.mean(), "val_passk": right.max(1).mean(), "val_partial": found[:, 2].mean(),
                "val_reward": found[:, 0].mean(), "val_length": np.mean([*map(len, answers)])}

    def greedy(self, problems: Problems, n: int) -> list[str]:
        """The most probable answers to the first n problems held out."""
        asked = [self.ids_of(one) for one in problems.held_out[:n]]
        return [self.text_of(answer) for answer in self.answered(asked, 0.0)] if n else []


# ---- the training pass -----------------------------------------------------------------------------------------------


def adapted(model: GPT, settings: dict, checkpoint: str):
    """Prepare a model for training: all of it in float32 (kind=full), or adapters on a base in the working dtype."""
    kind, dtype = settings["kind"], compute_dtype(settings["dtype"])
    merge_adapters(model)
    model.compute_dtype = dtype
    if kind == "full":
        if any("scales" in path for path, _ in tree_flatten(model.parameters())):
            raise UserError(f"{checkpoint} has packed weights, which do not train: take --kind=lora")
        model.unfreeze()
        model.set_dtype(mx.float32)
    else:
        model.set_dtype(dtype)
        quantize_base(model, settings["base_bits"])
        attach(model, settings["targets"], settings["rank"], settings["alpha"], kind, settings["seed"])


def arrays_of(asked: list[list[int]], answers: list[list[int]], most: int = 0, block_size: int = 0,
              ) -> dict[str, np.ndarray]:
    """What log_probs() reads, and the mask, padded at the right. most: to so many tokens of an answer, and to a
    multiple of 64 up to block_size, so that all steps have one shape, as mx.compile wants it; 0: to the longest."""
    N, A = len(answers), most or max(map(len, answers))
    T = max(len(ids) + len(answer) for ids, answer in zip(asked, answers, strict=True)) - 1
    T = min(-(-T // 64) * 64, block_size) if most else T
    ids, mask = np.zeros((N, T), np.int32), np.zeros((N, A), np.float32)
    places, targets = np.zeros((N, A), np.int32), np.zeros((N, A), np.int32)
    for i, (prompt, answer) in enumerate(zip(asked, answers, strict=True)):
        ids[i, :len(prompt) + len(answer) - 1] = [*prompt, *answer[:-1]]
        places[i, :len(answer)] = np.arange(len(answer)) + len(prompt) - 1
        targets[i, :len(answer)], mask[i, :len(answer)] = answer, 1
    return {"ids": ids, "places": places, "targets": targets, "mask": mask}


def states(model: GPT, ids: mx.array, places: mx.array) -> mx.array:
    """The normed states from which the tokens of answers are predicted (N, A, C): ids (N, T) what is read, places
    (N, A). Only these are computed further: A is smaller than T."""
    return mx.take_along_axis(model.norm(model.residual(ids)), places[:, :, None], axis=1)


def log_probs(model: GPT, hidden: mx.array, targets: mx.array, temperature: float, n_vocab: int,
              ) -> tuple[mx.array, mx.array]:
    """Log-probabilities of answers' tokens at a temperature, and the entropies of the distributions that they were
    drawn from (for which there is no gradient), both (N, A): from states (N, A, C) and targets (N, A)."""
    logits = model.project(hidden.flatten(0, 1))[:, :n_vocab].astype(mx.float32) / temperature
    nats, constant = cross_entropy(logits, targets.flatten()), mx.stop_gradient(logits)
    entropy = mx.logsumexp(constant, axis=1) - (mx.softmax(constant, axis=1) * constant).sum(1)
    return -nats.reshape(targets.shape), entropy.reshape(targets.shape)


def in_parts(batch: dict[str, np.ndarray], size: int, function: Callable) -> list[np.ndarray]:
    """What function(ids, places, targets) gives of all answers, computed `size` at a time: arrays (N, A), 0 beyond an
    answer's end."""
    parts = []
    for start in range(0, len(batch["ids"]), size):
        parts.append(function(*(mx.array(batch[name][start:start + size]) for name in ("ids", "places", "targets"))))
        mx.eval(parts[-1])
    return [np.array(mx.concatenate(some)) * batch["mask"] for some in zip(*parts, strict=True)]


@contextlib.contextmanager
def as_reference(model: GPT, reference: dict | None):
    """Inside, the model is the one before training: without its adapters, or with the weights `reference`."""
    if reference is None:
        with without_adapters(model):
            yield
        return
    now = model.parameters()
    model.update(reference)
    try:
        yield
    finally:
        model.update(now)


if __name__ == "__main__":
    print(f"{os.path.basename(sys.argv[0])} has no command of its own: run grpo.py, which uses it", file=sys.stderr)
    sys.exit(2)
