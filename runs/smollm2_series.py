"""The tables of what runs/smollm2_series.sh has run, in docs/models.md: python runs/smollm2_series.py out-smollm2"""
import os
import re
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from table import column, put_table  # noqa: E402

from config import UserError, overrides  # noqa: E402

out = "out-smollm2"  # what runs/smollm2_series.sh wrote
page = ""            # where the tables go; "": docs/models.md

settings = overrides(globals(), "out")

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NAMES = {"dense": "float16, unpacked from Q4_1", "hqq-8": "HQQ, 8 bits", "hqq-4": "HQQ, 4 bits", "hqq-3": "HQQ, 3 bits",
         "gptq-4": "GPTQ, 4 bits", "awq-4": "AWQ, 4 bits"}


def read(name: str) -> str:
    path = os.path.join(out, name)
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): bash runs/smollm2_series.sh makes it") from error


def cost(name: str) -> str:
    """The minutes of processors' time and the GiB of a step, as the end of a row."""
    found = re.fullmatch(r"(\d+\.\d+) (\d+\.\d+)\n", read(f"{name}.cost"))
    if not found:
        raise damaged(f"{name}.cost", "seconds and GiB")
    return f"{float(found[1]) / 60:.1f} | {found[2]} |"


def damaged(name: str, lacks: str) -> UserError:
    return UserError(f"{os.path.join(out, name)} has no {lacks}: remove it, and run bash runs/smollm2_series.sh again")


lines = ["| | MB | perplexity | accuracy | CPU minutes | GiB |", "|---|---|---|---|---|---|"]
figures = {name: values for *values, name in re.findall(
    r"perplexity ([\d.]+) .*accuracy ([\d.]+%) \| .*?([\w-]+)\.safetensors,", read("perplexity.txt"))}
for name, label in NAMES.items():
    if name not in figures:
        raise damaged("perplexity.txt", f"figures of {name}")
    size = os.path.getsize(os.path.join(out, f"{name}.safetensors")) / 1e6
    lines.append(f"| {label} | {size:.0f} | {' | '.join(figures[name])} | {cost(name)}")
losses = column(os.path.join(out, "sft", "loss.csv"), "val_loss")
kl = re.findall(r"(?m)^(embedding|after layer \d+) +(\d+\.\d+) +(\d+\.\d+) ", read("lens.txt"))
if not kl:
    raise damaged("lens.txt", "divergences of states")
lens = f"KL to the model, bits a byte: logit lens {sum(float(a) for _, a, _ in kl) / len(kl):.2f}"
lines += ["", "| | result | CPU minutes | GiB |", "|---|---|---|---|",
          f"| LoRA | held-out loss {losses[0]:.3f} to {min(losses):.3f} | {cost('sft')}",
          f"| tuned lens | {lens}, tuned lens {sum(float(b) for *_, b in kl) / len(kl):.2f} | {cost('lens')}",
          f"| patching | the picture below | {cost('patching')}"]
print("\n".join(lines))
put_table(page or os.path.join(HERE, "docs", "models.md"), "runs/smollm2_series.sh", lines)
