#!/usr/bin/env bash
# From a text to a model with preferences: pretrain, learn written instructions in five ways, learn preferences.
#
#     bash runs/finetune.sh book.txt seed_tasks.jsonl        # tasks in the form that runs/tasks.py reads
#
# At the end it prints the table of runs/finetune.py, and compares the five ways.
set -eu
text=$(realpath "${1:?the text to pretrain on}")
tasks=$(realpath "${2:?the written tasks, as jsonl}")
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=out-finetune

timed() {  # NAME SCRIPT ARGUMENTS: trains in the folder OUT/NAME, and writes there the seconds it took
    name=$1
    shift
    echo "== $*"
    start=$SECONDS
    "$python" "$@" --overwrite=True --out_dir="$out/$name"
    echo $((SECONDS - start)) > "$out/$name/seconds"
}

tuned() {  # NAME ARGUMENTS
    name=$1
    shift
    timed "$name" sft.py "$out/base/best.safetensors" --data="$out/tasks.jsonl" --val_data="$out/tasks-val.jsonl" \
        --epochs=6 "$@"
}

timed base train.py --data="$text" --max_iters=500 --sample_tokens=0
"$python" runs/tasks.py "$tasks" "$out"
tuned full --kind=full --learning_rate=1e-3
tuned lora --learning_rate=3e-3
tuned dora --learning_rate=3e-3 --kind=dora
tuned qlora8 --learning_rate=3e-3 --base_bits=8
tuned qlora4 --learning_rate=3e-3 --base_bits=4
timed dpo dpo.py "$out/full/sft.safetensors" --data="$out/pairs.jsonl" --val_data="$out/pairs-val.jsonl" \
    --learning_rate=5e-4 --epochs=4
"$python" runs/finetune.py "$out"
"$python" compare.py "$out/full" "$out/lora" "$out/dora" "$out/qlora8" "$out/qlora4" --out="$out/compare.png"
