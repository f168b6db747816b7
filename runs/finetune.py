"""The table of what runs/finetune.sh has run: python runs/finetune.py out-finetune

Loss is the best on the examples held out: of pretraining nats a token, of sft.py nats a response token, of dpo.py its
own. out, out-sft and out-dpo are the folders that train.py, sft.py and dpo.py write to by default. Accuracy is the
share of pairs held out whose chosen answer has the larger reward, at the start and at the end.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from table import column, read_number  # noqa: E402

from config import UserError, overrides  # noqa: E402

out_dir = "out-finetune"  # with a folder for each run

settings = overrides(globals(), "out_dir")

names = [name for name in ("out", "out-sft", "out-dpo", "full", "lora", "dora", "qlora8", "qlora4")
         if os.path.exists(os.path.join(out_dir, name, "seconds"))]
if not names:
    raise UserError(f"no run in {out_dir}: bash runs/finetune.sh makes them")
print("| | held-out loss, before and after | held-out accuracy, before and after | minutes |\n|---|---|---|---|")
for name in names:
    folder = os.path.join(out_dir, name)
    path, minutes = os.path.join(folder, "loss.csv"), read_number(os.path.join(folder, "seconds")) / 60
    losses, accuracy = column(path, "val_loss"), ""
    if name == "out-dpo":
        accuracies = column(path, "accuracy", beside="val_loss")
        accuracy = f"{accuracies[0]:.0%} to {accuracies[-1]:.0%}"
    print(f"| {name} | {losses[0]:.3f} to {min(losses):.3f} | {accuracy} | {minutes:.1f} |")
