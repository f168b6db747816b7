#!/usr/bin/env bash
# Train the page's second model: 3M parameters, on children's books (runs/english.py), packed by hqq.py.
#
#     bash runs/english.sh [settings of train.py]
#
# It takes a minute on an H200, and hours on two CPU cores.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=out-english

"$python" runs/english.py --folder="$out"
"$python" data.py "$out/text" --val_fraction=0.05 --out="$out/tokens"
"$python" train.py --data="$out/tokens" --n_layer=5 --n_head=3 --n_embd=192 --batch_size=64 --max_iters=3000 \
    --eval_interval=100 --learning_rate=6e-3 --muon_lr=0.03 --weight_decay=0.6 --overwrite=True --out_dir="$out/run" "$@"
"$python" hqq.py "$out/run/best.safetensors" --out=webgpu/english.safetensors
