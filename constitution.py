"""Learn from principles instead of labels: a model revises its own answers, a model judges pairs, dpo.py learns them.

    python constitution.py out-sft/sft.safetensors prompts.jsonl --principle=short:20 --principle=no_digit
    python dpo.py out-sft/sft.safetensors --data=constitution.jsonl
    python constitution.py CKPT prompts.jsonl --principle=short:20 --pairs=revised --label=revision
    python constitution.py CKPT problems.jsonl --principle=right --label=code --draws=8

Where the two answers of a pair come from:
    --pairs=drawn     the model answers each prompt `draws` times
    --pairs=revised   it answers once, then criticizes its answer under a principle and writes it anew, `rounds` times
    --pairs=file      the rows of the file have two answers, as dpo.py reads them
Which of them is chosen:
    --label=judge     a model reads both and names A or B. The option's log-probabilities are read in both orders of the
                      answers, and those of two empty answers are subtracted: p is the mean of both orders
    --label=code      code checks the principle; pairs that it does not tell apart are left out. Of more than two draws
                      the best and the worst make the pair
    --label=revision  the last revision

A principle is one that code can check, or any sentence of one's own, which only a judge can apply. A pair is judged by
one of the principles given, drawn by the seed.
    short:N           at most N words                one_sentence      one sentence
    long:N            at least N words               question          ends with a question mark
    contains:WORD     has this word                  no_digit          has no digit
    right             is right: the file has problems of tasks.py, whose scores it gets

A line of the file has "prompt", "chosen", "rejected"; "response", the chosen one, for sft.py; "probability" for dpo.py;
"principle"; "scores" by code, or 1 and 0 by the file; "judged", the log-odds; "batch". A batch of prompts is written
at once. Ctrl-C stops before the next one; --resume=True, with the same settings, goes on to the same file.

At the end the judge is measured, where code or the file knows the better answer: P(A), the mean probability of answer
A, over both orders (1/2: no position bias); same, the share of pairs with one verdict in both orders; right, the share
of pairs with p on the side of the better answer; kappa, Cohen's, the same corrected for chance; Brier, the mean of
(p - better)^2 (1/4: p is always 1/2); abstains, the share of pairs with |p - 1/2| < abstain, and right without them;
length, the correlation of p with the difference in words. Both with and without the subtraction of empty answers.

Critique and revision: Bai et al. 2022 (2212.08073). Labels by both orders: Lee et al. 2023 (2309.00267). Subtraction of
what an empty text gets: Zhao et al. 2021 (2102.09690). The critiques have no examples before them, unlike the paper's.
"""
import json
import math
import os
import re
import shlex
import sys
import textwrap
from collections import Counter
from typing import NamedTuple

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
from tqdm import tqdm

import run_folder
import tasks
from batching import OneRow, Rows, check_rows, generate_many
from config import UserError, check_output, given, overrides
from conversations import encode_prompt, ends_of_text, template_of, turns
from draw import check_folder, write_whole
from lora import load_adapted
from lora import merge as merge_adapters
from model import PADDING, compute_dtype
from records import read_preferences, to_conversations, turn
from rows import read_rows
from tokenizer import Tokenizer

checkpoint = "out-sft/sft.safetensors"  # a checkpoint or an adapter that answers
data = ""               # a file of prompts, of problems (right) or of pairs (--pairs=file)
principle = ()          # NAME, NAME:VALUE or a sentence, see above; can be given several times
n = 0                   # prompts from the beginning of the file; 0: all
# pairs
pairs = "drawn"         # drawn | revised | file
draws = 2               # drawn: answers to each prompt, which make pairs two by two; with --label=code one pair
rounds = 1              # revised: revisions, each under a principle drawn anew
critique = True         # revised: criticize first; False: revise at once
label = "judge"         # judge | code | revision
# judge
judge = ""              # the checkpoint that judges; "": the one that answers
calibrate = True        # subtract what two empty answers get
abstain = 0.05          # |p - 1/2| below this counts as no verdict in the measures; the pair is written all the same
# sampling
system = ""             # the system message of every prompt
template = ""           # own | plain | alpaca | chatml | llama3; "": the one that the model was tuned with
max_new_tokens = 64     # of an answer; one without its end is left out
temperature = 1.0       # of the answers
top_p = 1.0             # of the answers
rows = 32               # texts at a time; more are faster and need more memory
batch_size = 64         # prompts of a batch
seed = 1337             # of the principles and of all draws
dtype = "auto"          # float32 | bfloat16 | float16; auto: bfloat16 on a GPU, float32 on a CPU
# output
out = "constitution.jsonl"  # the file to write
resume = False          # add to the file
overwrite = False       # replace the file without asking

settings = overrides(globals(), "checkpoint", "data")

# ---- principles ------------------------------------------------------------------------------------------------------


def is_one_sentence(answer: str) -> bool:
    return "\n" not in answer.strip() and len(re.findall(r"[.!?]+(?:\s|$)", answer.strip() + "\n")) <= 1


CHECKS = {  # the rule as a judge reads it, what it takes, and the check of an answer
    "short": ("The answer has at most {} words.", int, lambda answer, most: len(answer.split()) <= most),
    "long": ("The answer has at least {} words.", int, lambda answer, least: len(answer.split()) >= least),
    "contains": ('The answer has the word "{}" in it.', str,
                 lambda answer, word: re.search(rf"\b{re.escape(word)}\b", answer, re.IGNORECASE)),
    "no_digit": ("The answer has no digits in it.", None, lambda answer: not re.search(r"\d", answer)),
    "one_sentence": ("The answer is a single sentence.", None, is_one_sentence),
    "question": ("The answer ends with a question.", None, lambda answer: answer.rstrip().endswith("?")),
    "right": ("The answer is right.", None, None)}


class Principle(NamedTuple):
    rule: str
    name: str       # in CHECKS; "": code cannot check it
    values: tuple   # what the check takes beside the answer


def principle_of(text: str) -> Principle:
    name, _, value = text.partition(":")
    if name not in CHECKS and " " in text.strip():
        return Principle(text.strip(), "", ())
    if name not in CHECKS:
        raise UserError(f"principle={text!r} is not one of {', '.join(CHECKS)}, and no sentence")
    rule, kind, _ = CHECKS[name]
    good = not value if kind is None else bool(re.fullmatch(r"[1-9]\d{0,8}", value)) if kind is int else bool(value)
    if not good:
        takes = {int: f"a number, such as {name}:20", str: f"a word, such as {name}:please", None: "no value"}[kind]
        raise UserError(f"principle={text!r}: {name} takes {takes}")
    return Principle(rule.format(value), name, (kind(value),) if kind else ())


CRITIQUE = "Rule: {}\n\nSay in one sentence how your last answer breaks this rule, or that it keeps it."
REVISION = "Rule: {}\n\nWrite your answer again so that it keeps this rule. Write nothing but the answer."
JUDGE = ("Rule: {}\n\nQuestion: {}\n\nAnswer A: {}\n\nAnswer B: {}\n\n"
         "Which answer keeps the rule better? Reply with one letter, A or B.")

# ---- the judge: probabilities, and how good they are -----------------------------------------------------------------


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(x, np.float64)))


def preference(ab: np.ndarray, ba: np.ndarray, empty: np.ndarray) -> np.ndarray:
    """The probability (N,) that the first answer of a pair is the better one, from the log-odds of A against B with the
    first answer as A (ab), as B (ba), and with two empty answers: (s(ab - empty) + 1 - s(ba - empty)) / 2."""
    return (sigmoid(ab - empty) + 1 - sigmoid(ba - empty)) / 2


def kappa(a: np.ndarray, b: np.ndarray) -> float:
    """Cohen's kappa of two verdicts (N,) of True and False: (agreement - chance) / (1 - chance), chance from how often
    each says True. NaN where one verdict is all there is."""
    if not len(a):
        return math.nan
    agreement, chance = (a == b).mean(), a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
    return float((agreement - chance) / (1 - chance)) if chance < 1 else math.nan


def measures(ab, ba, empty, better, words, abstain: float) -> dict[str, float]:
    """Of N pairs, each (N,): log-odds as for preference(); whether the first answer is the better one, 1 or 0, or NaN
    where nobody knows; its words minus those of the second. What the docstring of this file says of each."""
    p, first, second = preference(ab, ba, empty), sigmoid(ab - empty), sigmoid(ba - empty)
    known = ~np.isnan(better)
    verdict, y, sure = p[known] > 0.5, better[known], abs(p[known] - 0.5) >= abstain
    correct = verdict == (y == 1)

    def mean(x: np.ndarray) -> float:
        return float(x.mean()) if len(x) else math.nan

    return {"P(A)": mean((first + second) / 2), "same": mean((first > 0.5) != (second > 0.5)), "right": mean(correct),
            "kappa": kappa(verdict, y == 1), "Brier": mean((p[known] - y) ** 2),
            "abstains": mean(abs(p - 0.5) < abstain), "right else": mean(correct[sure]),
            "length": float(np.corrcoef(p, words)[0, 1]) if p.std() * words.std() > 0 else math.nan}


# ---- check -----------------------------------------------------------------------------------------------------------

SCRIPT = os.path.basename(__file__)
for name, choices in (("pairs", ["drawn", "revised", "file"]), ("label", ["judge", "code", "revision"])):
    if settings[name] not in choices:
        raise UserError(f"{name}={settings[name]!r} is not one of {', '.join(choices)}")
DRAWS = {"temperature", "top_p", "max_new_tokens", "system", "template"}
USED = {"drawn": {"draws", *DRAWS}, "revised": {"rounds", "critique", *DRAWS}, "file": set(), "code": set(),
        "revision": set(), "judge": {"judge", "calibrate", "abstain"}}  # by --pairs or --label, of those that one needs
if idle := given & set().union(*USED.values()) - USED[pairs] - USED[label]:
    raise UserError(f"--pairs={pairs} with --label={label} does not use {', '.join(sorted(idle))}: leave that out")
if label == "revision" and pairs != "revised":
    raise UserError("--label=revision needs --pairs=revised")
for name in ("draws", "rounds", "max_new_tokens", "rows", "batch_size"):
    if settings[name] < 1:
        raise UserError(f"{name}={settings[name]}: it must be 1 or more")
if draws < 2 or draws % 2 and label == "judge":
    raise UserError(f"draws={draws}: it must be 2 or more, for a judge an even number")
if not 0 <= temperature < math.inf or temperature == 0 and pairs == "drawn" or not 0 < top_p <= 1:
    raise UserError("temperature must be finite, and more than 0 to draw different answers; top_p over 0 and up to 1")
if not 0 <= abstain < 0.5 or n < 0 or not 0 <= seed < 2**32:
    raise UserError("abstain must be from 0 up to 0.5, n 0 or more, seed from 0 to 2^32 - 1")
if overwrite and resume:
    raise UserError("--overwrite=True begins anew and --resume=True goes on: give one of them")
if not data:
    raise UserError("no prompts: give a file, such as a .jsonl of rows with \"prompt\"")
if not principle:
    raise UserError(f"no principle: give --principle=short:20, another of {', '.join(CHECKS)}, or a sentence")
principles = [principle_of(text) for text in principle]
if "right" in [p.name for p in principles] and (len(principles) > 1 or pairs == "file"):
    raise UserError("principle=right stands alone, and with problems of tasks.py, not with --pairs=file")
if label == "code" and not all(p.name for p in principles):
    raise UserError("--label=code: code cannot check a sentence; take --label=judge, or principles with a name")
check_folder(out)

# ---- load: models, prompts, the file ---------------------------------------------------------------------------------


class Model:
    """A checkpoint that answers."""

    def __init__(self, path: str, template: str = ""):
        self.model, meta = load_adapted(path, ())
        self.path, self.files = path, meta["files"]
        if not meta.get("tokenizer"):
            raise UserError(f"{path} holds no tokenizer: it cannot read prompts")
        self.enc = Tokenizer.from_dict(meta["tokenizer"])
        self.form = template_of(meta, self.enc, template)
        if self.form == "none":
            raise UserError(f"{path} was not tuned on conversations: give one that sft.py has tuned, or a --template")
        merge_adapters(self.model)
        self.model.set_dtype(compute_dtype(dtype))
        self.model.eval()
        self.ends, self.rows = ends_of_text(self.enc, meta, self.form), rows
        try:
            check_rows(self.model, rows)
        except UserError:  # its rows cannot be of different texts
            self.rows = 1

    def answers(self, talks: list[list[dict]], *key: int, ended: bool = True) -> list[str | None]:
        """An answer to each conversation; None where it does not end within max_new_tokens or the context.
        ended=False: then what there is. key: of the random draws."""
        ids = [encode_prompt(self.enc, talk, self.form) for talk in talks]
        fit = [i for i, row in enumerate(ids) if len(row) + max_new_tokens <= self.model.config.block_size]
        found, over = {i: [] for i in fit}, set()
        key = int(np.random.SeedSequence([seed, *key]).generate_state(1, np.uint64)[0]) >> 1
        drawn = generate_many(self.model, [ids[i] for i in fit], max_new_tokens, self.rows, self.ends, seed=key,
                              temperature=temperature, top_p=top_p, n_vocab=self.enc.n_vocab) if fit else ()
        for i, token in drawn:
            if token is None:
                over |= {fit[i]} if len(found[fit[i]]) < max_new_tokens or not ended else set()
            elif token >= self.enc.n_vocab:  # where a logit is NaN
                raise UserError(f"{self.path} has logits that are not finite: give --dtype=float32, or another one")
            else:
                found[fit[i]].append(token)
        texts = {i: self.enc.decode_bytes(found[i]).decode("utf-8", "replace").strip() for i in over}
        return [texts.get(i) or None for i in range(len(talks))]

    def log_odds(self, questions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """log P(A) / P(B) as the first token of the answer to each question, and P(A) + P(B), both (N,)."""
        a, b = (self.enc.encode(option).tolist() for option in "AB")
        if len(a) != 1 or len(b) != 1:
            raise UserError(f"{self.path} writes A or B in several tokens: give another --judge")
        ids = [encode_prompt(self.enc, [{"role": "user", "content": text}], self.form) for text in questions]
        odds, mass = np.full((2, len(ids)), np.nan)
        fit = sorted((i for i, row in enumerate(ids) if len(row) <= self.model.config.block_size),
                     key=lambda i: len(ids[i]))
        for start in range(0, len(fit), self.rows):
            part = fit[start:start + self.rows]
            empty = [max(len(ids[i]) for i in part) - len(ids[i]) for i in part]
            cache = Rows(self.model.make_cache().blocks, len(part)) if len(part) > 1 else OneRow(self.model)
            logits = cache.read(self.model, mx.array([[0] * e + ids[i] for i, e in zip(part, empty, strict=True)]),
                                [[PADDING] * e + [*range(len(ids[i]))] for i, e in zip(part, empty, strict=True)])
            logits = logits.astype(mx.float32)
            logs = np.array((logits - mx.logsumexp(logits, axis=-1, keepdims=True))[:, mx.array([*a, *b])], np.float64)
            odds[part], mass[part] = logs[:, 0] - logs[:, 1], np.exp(logs).sum(1)
        return odds, mass


def read_prompts(path: str) -> list[list[dict]]:
    """The messages before the first answer, of rows that have a prompt or are conversations; each prompt once."""
    found, skipped, why = {}, 0, ""
    for where, row in read_rows(path):
        try:
            if isinstance(row, ValueError):
                raise row
            talks = [turn("user", row, ["prompt"])] if row.get("prompt") else to_conversations(row)[2]
            for talk in talks:
                end = next((i for i, message in enumerate(talk) if message["role"] == "assistant"), len(talk))
                if end:
                    found.setdefault(json.dumps(talk[:end]), talk[:end])
        except ValueError as error:
            skipped, why = skipped + 1, why or f"{where}: {error}"
    if not found:
        raise UserError(f"no row of {path} has a prompt{f': {why}' if why else ''}")
    print(f"{path}: {len(found):,} prompts" + f"; {skipped:,} rows SKIPPED, such as {why}" * bool(skipped))
    return [*found.values()]


given_pairs = read_preferences(data) if pairs == "file" else []
problems = tasks.read_problems(data) if principles[0].name == "right" else []
prompts = ([prompt for prompt, *_ in given_pairs] or [turns(problem.prompt, "")[:1] for problem in problems]
           or read_prompts(data))[:n or None]
prompts = [[{"role": "system", "content": system}] * bool(system) + prompt for prompt in prompts]

lines, batch = [], 0
if os.path.exists(out) and resume:
    with open(out, "rb") as file:
        lines = file.readlines()
    try:
        batch = 1 + max(json.loads(line)["batch"] for line in lines) if lines else 0
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{out} is not of {SCRIPT}: give another --out") from error
elif os.path.exists(out) and os.path.getsize(out) and not overwrite:
    run_folder.ask_to_replace(f"{out} exists", [
        "--overwrite=True to replace it", "--resume=True to go on with it",
        f"--out={shlex.quote(run_folder.free_name(out, os.path.splitext(out)[1]))}"])

check_output(out, data, checkpoint, judge)
answering = Model(checkpoint, template) if pairs != "file" else None
judging = None if label != "judge" else answering if answering and not judge else Model(judge or checkpoint)
for one in filter(None, (answering, judging)):
    check_output(out, *one.files)

# ---- pairs -----------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    number: int          # of the prompt
    principle: Principle
    answers: tuple       # the first and the second
    scores: tuple = ()   # by the file
    revisions: tuple = ()


def drawn_principle(number: int, round: int = 0) -> Principle:
    return principles[np.random.default_rng([seed, number, round]).integers(len(principles))]


def score(rule: Principle, number: int, answer: str) -> float:
    """Of an answer to a prompt by code, from 0 to 1: whether it keeps the principle; for right also how nearly. NaN:
    unknown."""
    if rule.name == "right":
        return sum(tasks.check(problems[number], answer)) / 2
    return float(bool(CHECKS[rule.name][2](answer, *rule.values))) if rule.name else math.nan


def drawn_pairs(numbers: range, batch: int) -> list[Pair]:
    found = answering.answers([prompts[i] for i in numbers for _ in range(draws)], batch, 0)
    made = []
    for i, number in enumerate(numbers):
        answers, rule = found[i * draws:(i + 1) * draws], drawn_principle(number)
        count_kept("drawn", number, rule, answers)
        if label == "code":  # the best and the worst, in the order in which they were drawn
            scores = {k: score(rule, number, answer) for k, answer in enumerate(answers) if answer}
            ends = sorted((min(scores, key=scores.get), max(scores, key=scores.get))) if scores else (0, 0)
            answers = [answers[k] for k in ends]
        made += [Pair(number, rule, both) for both in zip(answers[::2], answers[1::2], strict=True)]
    return made


def revised_pairs(numbers: range, batch: int) -> list[Pair]:
    """The first answer is the last revision; None where a round gave none."""
    first = dict(zip(numbers, answering.answers([prompts[i] for i in numbers], batch, 0), strict=True))
    last, history = dict(first), {i: () for i in numbers}
    for round in range(rounds):
        going = [i for i in numbers if last[i]]
        rules, said = [drawn_principle(i, round) for i in going], [None] * len(going)
        talks = [[*prompts[i], {"role": "assistant", "content": last[i]}] for i in going]
        if critique:
            asked = [turns(CRITIQUE.format(rule.rule), "")[0] for rule in rules]
            said = answering.answers([talk + [one] for talk, one in zip(talks, asked, strict=True)], batch, 1, round,
                                     ended=False)
            talks = [[*talk, one, {"role": "assistant", "content": text or ""}]
                     for talk, one, text in zip(talks, asked, said, strict=True)]
        talks = [[*talk, *turns(REVISION.format(rule.rule), "")[:1]] for talk, rule in zip(talks, rules, strict=True)]
        for i, rule, words, text in zip(going, rules, said, answering.answers(talks, batch, 2, round), strict=True):
            count_kept(f"before revision {round + 1}", i, rule, [last[i]] if text else [])
            count_kept(f"after revision {round + 1}", i, rule, [text])
            last[i], history[i] = text, (*history[i], {"rule": rule.rule, "critique": words, "revision": text})
    return [Pair(i, drawn_principle(i, rounds - 1), (last[i], first[i]), revisions=history[i]) for i in numbers]


def pairs_of_file(numbers: range, _) -> list[Pair]:
    """In an order drawn by the seed."""
    orders = [(-1) ** int(np.random.default_rng([seed, i, 9]).integers(2)) for i in numbers]
    return [Pair(i, drawn_principle(i), given_pairs[i][1:][::order], (1.0, 0.0)[::order])
            for i, order in zip(numbers, orders, strict=True)]


MAKE, kept = {"drawn": drawn_pairs, "revised": revised_pairs, "file": pairs_of_file}, {}


def count_kept(what: str, number: int, rule: Principle, answers: list[str | None]):
    """Adds to kept[what, rule]: how many answers keep it, how many there are, and their words."""
    for answer in filter(None, answers):
        right = score(rule, number, answer) == 1 if rule.name else math.nan
        kept[what, rule.rule] = kept.get((what, rule.rule), np.zeros(3)) + [right, 1, len(answer.split())]


# ---- labels ----------------------------------------------------------------------------------------------------------


def judged(made: list[Pair]) -> list[dict]:
    """For each pair the log-odds of A against B with the first answer as A, as B, and with two empty answers; and the
    share of probability that A and B have together."""
    asked = []
    for pair in made:
        question = "\n\n".join(message["content"] for message in prompts[pair.number] if message["role"] != "system")
        asked += [JUDGE.format(pair.principle.rule, question, *answers)
                  for answers in (pair.answers, pair.answers[::-1], ("", ""))]
    unique = [*dict.fromkeys(asked)]  # pairs of one prompt have one question with empty answers
    odds, mass = (x[[unique.index(text) for text in asked]].reshape(-1, 3) for x in judging.log_odds(unique))
    return [{"ab": ab, "ba": ba, "empty": empty, "mass": both[:2].mean()}
            for (ab, ba, empty), both in zip(odds, mass, strict=True)]


def rows_of(made: list[Pair], batch: int) -> list[dict]:
    """The rows of the file. What is left out is counted in `dropped`."""
    whole = [pair for pair in made if all(pair.answers) and pair.answers[0] != pair.answers[1]]
    dropped["without two different answers that end"] += len(made) - len(whole)
    found = []
    for pair, odds in zip(whole, judged(whole) if label == "judge" else [{}] * len(whole), strict=True):
        scores = tuple(score(pair.principle, pair.number, answer) for answer in pair.answers)
        p = 1.0 if label == "revision" else float(scores[0] > scores[1])
        if label == "judge":
            p = float(preference(odds["ab"], odds["ba"], odds["empty"] if calibrate else 0))
        if math.isnan(p) or label == "code" and scores[0] == scores[1]:
            dropped["equal by code" if label == "code" else "too long for the judge"] += 1
            continue
        order, scores = 1 if p >= 0.5 else -1, scores if pair.principle.name else pair.scores
        chosen, rejected = pair.answers[::order]
        found.append({"prompt": prompts[pair.number], "chosen": chosen, "rejected": rejected, "response": chosen,
                      "probability": round(max(p, 1 - p), 6), "principle": pair.principle.rule,
                      "scores": scores[::order], "first_is_chosen": order == 1, "batch": batch,
                      "judged": {name: round(float(x), 6) for name, x in odds.items()}, "revisions": pair.revisions})
    return found


# ---- loop ------------------------------------------------------------------------------------------------------------

dropped, stops = Counter(), run_folder.catch_stops()
bar = tqdm(total=len(prompts), initial=min(batch * batch_size, len(prompts)), unit=" prompts", disable=None,
           dynamic_ncols=True)
for number in range(batch, math.ceil(len(prompts) / batch_size)):
    if stops():
        bar.close()
        print(f"stopped: {out} holds {len(lines)} pairs; --resume=True goes on", file=sys.stderr)
        sys.exit(130)
    numbers = range(number * batch_size, min((number + 1) * batch_size, len(prompts)))
    lines += [(json.dumps(row) + "\n").encode() for row in rows_of(MAKE[pairs](numbers, number), number)]
    write_whole(out, b"".join(lines))
    bar.update(len(numbers))
bar.close()

# ---- look at it ------------------------------------------------------------------------------------------------------

found = [json.loads(line) for line in lines]
for name in ("chosen", "rejected") if found else ():
    print(textwrap.fill(f"{name}: {found[-1][name]}", 120, subsequent_indent="    "))
for (what, rule), (good, count, words) in kept.items():
    share = "" if math.isnan(good) else f"{good / count:.0%} keep: "
    print(f"{what}: {int(count)} answers of {words / count:.1f} words, {share}{rule}")


def table(found: list[dict]):
    """The measures of the judge, for each principle and for all."""
    ab, ba, empty, mass = (np.array([row["judged"][name] for row in found]) for name in ("ab", "ba", "empty", "mass"))
    order = np.array([1 if row["first_is_chosen"] else -1 for row in found])
    ahead = order * np.array([np.sign(np.subtract(*row["scores"])) if row["scores"] else 0 for row in found])
    better = np.where(ahead == 0, np.nan, (ahead + 1) / 2)
    words = order * np.array([len(row["chosen"].split()) - len(row["rejected"].split()) for row in found])
    rules = np.array([row["principle"] for row in found])
    print(f"the judge's first token is A or B with probability {mass.mean():.2f}")
    for rule in [*dict.fromkeys(rules), "all of them"][:None if len({*rules}) > 1 else 1]:
        which = (rules == rule) | (rule == "all of them")
        for name, prior in (("raw", 0 * empty), ("calibrated", empty)):
            values = measures(*(x[which] for x in (ab, ba, prior, better, words)), abstain)
            if name == "raw":
                print(f"{rule}\n{'':12}{'pairs':>6}{'known':>6}" + "".join(f"{name:>11}" for name in values))
            print(f"  {name:10}{which.sum():6}{(~np.isnan(better[which])).sum():6}" + "".join(
                f"{'-' if math.isnan(value) else f'{value:.3f}':>11}" for value in values.values()))


if label == "judge" and found:
    table(found)
print("".join(f"{count} pairs left out: {reason}\n" for reason, count in (+dropped).items())
      + f"{out} holds {len(found)} pairs")
if found:
    print(f"next: python dpo.py {shlex.quote(checkpoint)} --data={shlex.quote(out)}")
