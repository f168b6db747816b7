"""Record what the page shows of its first model, for browsers without WebGPU: webgpu/recording.json.

    python runs/record_page.py

model.py writes a text and computes the five most probable tokens at each place, and what the logit lens reads from each
state of one prompt. tests/test_page_tour.py compares the file with the model.
"""
import json
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import blas  # noqa: F401, E402  (before mlx)
import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402

from config import overrides  # noqa: E402
from draw import write_whole  # noqa: E402
from model import GPT, generate, load_checkpoint  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402
from tuned_lens import logit_lens  # noqa: E402

checkpoint = "webgpu/demo.safetensors"
out = "webgpu/recording.json"
prompt = "class"      # that the text begins with
lens_prompt = "def __init__(self, name):\n        self.name ="
length = 160          # tokens of the text
temperature = 0.8     # of the draws
top_k = 50            # tokens that are drawn from
seed = 3              # of the draws

settings = overrides(globals())


def best(logits: mx.array, n: int = 5) -> tuple[list, list, list]:
    """The n most probable tokens, their probabilities, and the entropies in bits, by logits (T, V)."""
    logits = logits.astype(mx.float32)
    log_p = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True), np.float64)
    ids = np.argsort(-log_p, axis=-1)[:, :n]
    p = np.exp(np.take_along_axis(log_p, ids, axis=-1))
    entropy = -(np.exp(log_p) * log_p).sum(-1) / np.log(2)
    return ids.tolist(), p.round(5).tolist(), entropy.round(2).tolist()


def record(model: GPT, enc: Tokenizer, name: str) -> dict:
    """What the page shows, with all tokens that occur as text by id."""
    first = [*enc.start, *enc.encode(prompt).tolist()]
    written = list(generate(model, first, length, temperature=temperature, top_k=top_k, seed=seed, n_vocab=enc.n_vocab))
    written = written[:written.index(enc.eot)] if enc.eot in written else written
    top, p, _ = best(model(mx.array([[*first, *written]]))[0, len(first) - 1:-1])
    read = [*enc.start, *enc.encode(lens_prompt).tolist()]
    states = logit_lens(model, mx.array([read])).reshape(-1, len(read), model.config.vocab_size)
    rows = [best(logits) for logits in states]
    used = {*first, *written, *read, *np.ravel(top).tolist(), *np.ravel([ids for ids, _, _ in rows]).tolist()}
    return {"model": name, "made": "python runs/record_page.py", "n_vocab": enc.n_vocab, "eot": enc.eot,
            "tokens": {token: enc.decode([token]) for token in sorted(used)},
            "prompt": first, "written": written, "top": top, "p": p,
            "lens": {"ids": read, "rows": [[{"ids": i, "p": q, "entropy": e} for i, q, e in zip(*row, strict=True)]
                                           for row in rows]}}


if __name__ == "__main__":
    model, meta = load_checkpoint(checkpoint)
    model.set_dtype(mx.float32)  # as in the page
    found = record(model, Tokenizer.from_dict(meta["tokenizer"]), os.path.basename(checkpoint))
    write_whole(out, (json.dumps(found, ensure_ascii=False, separators=(",", ":")) + "\n").encode())
    print("".join(found["tokens"][token] for token in found["written"]))
    print(f"{len(found['written'])} tokens, {os.path.getsize(out):,} bytes: {out}")
