#!/usr/bin/env bash
# The checkpoint that the browser page opens with: 3M parameters, trained on the default corpus, packed by hqq.py.
#
#     bash runs/playground.sh [settings of train.py]
#
# A minute on a GPU; on two CPU cores more than an hour. On CPUs and GPUs of another kind the weights differ, and so does
# the golden text in tests/test_page_model.py.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=out-playground

"$python" train.py --n_layer=5 --n_head=3 --n_embd=192 --batch_size=64 --max_iters=900 --eval_interval=50 \
    --learning_rate=6e-3 --muon_lr=0.03 --weight_decay=0.6 --out_dir=$out "$@"
"$python" hqq.py $out/best.safetensors --out=webgpu/demo.safetensors
