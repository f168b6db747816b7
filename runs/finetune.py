"""The table of what runs/finetune.sh has run: python runs/finetune.py out-finetune

Loss is the best on the examples held out: of pretraining nats a token, of sft.py nats a response token, of dpo.py its
own. Accuracy is the share of pairs held out whose chosen answer has the larger reward, at the start and at the end.
"""
import csv
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from config import UserError, overrides  # noqa: E402

out_dir = "out-finetune"  # with a folder for each run

settings = overrides(globals(), "out_dir")

names = [name for name in ("base", "full", "lora", "dora", "qlora8", "qlora4", "dpo")
         if os.path.exists(os.path.join(out_dir, name, "seconds"))]
if not names:
    raise UserError(f"no run in {out_dir}: bash runs/finetune.sh makes them")
print("| | held-out loss, before and after | held-out accuracy, before and after | minutes |\n|---|---|---|---|")
for name in names:
    folder = os.path.join(out_dir, name)
    with open(os.path.join(folder, "seconds")) as file:
        minutes = int(file.read()) / 60
    with open(os.path.join(folder, "loss.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    if name == "dpo":
        held_out = [row for row in rows if row["val_loss"]]
        losses = [float(row["val_loss"]) for row in held_out]
        accuracy = f"{float(held_out[0]['accuracy']):.0%} to {float(held_out[-1]['accuracy']):.0%}"
    else:
        losses, accuracy = [float(row["val_loss"]) for row in rows if row["val_loss"]], ""
    print(f"| {name} | {losses[0]:.3f} to {min(losses):.3f} | {accuracy} | {minutes:.1f} |")
