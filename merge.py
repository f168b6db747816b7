"""Merge adapters into the weights of a checkpoint, which then needs no adapter.

    python merge.py out-sft/sft.safetensors merged.safetensors         # an adapter, into the base that its header names
    python merge.py out/ckpt.safetensors merged.safetensors --adapter=a.safetensors:0.5 --adapter=b.safetensors
    python merge.py out/ckpt.safetensors merged.safetensors --adapter=out-sft/peft          # a folder of PEFT's

An adapter changes a matrix W by s B A (lora.py has the formulas). Adapters with an equal base add up, each times its
weight; one that was trained on a model with adapters (sft.py, then dpo.py) is added to the merged weights of that
model. A quantized matrix becomes a dense one of float32 where an adapter changes it; the others stay as they are. The
table shows how much each matrix changes: |W' - W| / |W|, in the Frobenius norm.
"""
import os
import shlex

import blas  # noqa: F401  (before mlx)
import mlx.core as mx

import run_folder
from config import UserError, check_output, overrides
from draw import check_folder
from lora import dense_weight, linear_layers, load_adapted
from lora import merge as merge_adapters
from model import compute_dtype, load_checkpoint, save_checkpoint

checkpoint = "out-sft/sft.safetensors"  # an adapter, or a checkpoint for --adapter
out = "merged.safetensors"  # the checkpoint to write
adapter = ()                # an adapter for the checkpoint, PATH or PATH:WEIGHT; can be given several times
dtype = ""                  # float32 | bfloat16 | float16, of all weights; "": float32 where an adapter changes them
overwrite = False           # replace OUT without asking

settings = overrides(globals(), "checkpoint", "out")

SCRIPT = os.path.basename(__file__)
if dtype:
    compute_dtype(dtype)  # UserError for an unknown one
check_folder(out)
model, meta = load_adapted(checkpoint, adapter)
files = meta.pop("files")
check_output(out, *files)
if len(files) == 1:
    raise UserError(f"{checkpoint} is a checkpoint, and there is no adapter to merge into it: give --adapter=PATH")
if os.path.exists(out) and not overwrite:
    free = run_folder.free_name(out, os.path.splitext(out)[1])
    run_folder.ask_to_replace(f"{out} exists", ["--overwrite=True to replace it", f"--out={shlex.quote(free)}"])

merge_adapters(model)
if dtype:
    model.set_dtype(compute_dtype(dtype))
before, after = linear_layers(load_checkpoint(files[0])[0]), linear_layers(model)
print(f"{'matrix':24} {'shape':>13} {'change':>8}")
for path, layer in after.items():
    if path not in before:  # the unembedding, which was tied to the embedding
        continue
    old, new = dense_weight(before[path]), dense_weight(layer)
    change = (mx.linalg.norm(new - old) / mx.maximum(mx.linalg.norm(old), 1e-30)).item()
    if change or type(layer) is not type(before[path]):
        print(f"{path:24} {'{} x {}'.format(*new.shape):>13} {change:8.2%}")

of_base = ("fingerprint", "losses", "step")  # these are not true of the merged model
header = {name: value for name, value in meta.items() if name not in of_base}
save_checkpoint(out, model, {**header, "script": SCRIPT, "settings": settings, "merged": files})
print(f"{out}: {' + '.join(files)}, {os.path.getsize(out) / 1e6:.2f} MB")
