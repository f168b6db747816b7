#!/usr/bin/env bash
# From a text to a model that prefers: pretrain, learn written instructions in five ways, learn preferences.
#
#     bash runs/finetune.sh book.txt seed_tasks.jsonl        # tasks as runs/tasks.py reads them
set -eu
text=$(realpath "$1")
tasks=$(realpath "$2")
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=out-finetune

timed() {
    echo "== $*"
    start=$SECONDS
    "$python" "$@"
    echo "== $((SECONDS - start)) s"
}

timed train.py --data="$text" --out_dir=$out/base --max_iters=500 --sample_tokens=0
timed runs/tasks.py "$tasks" $out
sft="--data=$out/tasks.jsonl --val_data=$out/tasks-val.jsonl --epochs=6"
# shellcheck disable=SC2086  # sft is several words
{
    timed sft.py $out/base/best.safetensors $sft --out_dir=$out/full --kind=full --learning_rate=1e-3
    timed sft.py $out/base/best.safetensors $sft --out_dir=$out/lora --learning_rate=3e-3
    timed sft.py $out/base/best.safetensors $sft --out_dir=$out/dora --learning_rate=3e-3 --kind=dora
    timed sft.py $out/base/best.safetensors $sft --out_dir=$out/qlora8 --learning_rate=3e-3 --base_bits=8
    timed sft.py $out/base/best.safetensors $sft --out_dir=$out/qlora4 --learning_rate=3e-3 --base_bits=4
}
timed dpo.py $out/full/sft.safetensors --data=$out/pairs.jsonl --val_data=$out/pairs-val.jsonl --out_dir=$out/dpo \
    --learning_rate=1e-3 --epochs=6
