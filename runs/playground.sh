#!/usr/bin/env bash
# Train the checkpoint that the browser page opens with: 3M parameters, on the default corpus, packed by hqq.py.
#
#     bash runs/playground.sh [settings of train.py]
#
# It takes a minute on a GPU, and more than an hour on two CPU cores. On another kind of device the weights differ, and
# so does the text that tests/test_page_model.py expects.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=out-playground

"$python" train.py --n_layer=5 --n_head=3 --n_embd=192 --batch_size=64 --max_iters=900 --eval_interval=50 \
    --learning_rate=6e-3 --muon_lr=0.03 --weight_decay=0.6 --overwrite=True --out_dir="$out" "$@"
"$python" hqq.py "$out/best.safetensors" --out=webgpu/demo.safetensors
