#!/usr/bin/env bash
# From a text to a model with preferences, by the scripts' own defaults: pretrain, learn written instructions, learn
# preferences, make instructions, write. Then the instructions once more, in five ways.
#
#     bash runs/finetune.sh book.txt seed_tasks.jsonl        # tasks in the form that runs/tasks.py reads
#
# At the end it prints the table of runs/finetune.py, and compares the five ways.
set -eu
text=$(realpath "${1:?the text to pretrain on}")
tasks=$(realpath "${2:?the written tasks, as jsonl}")
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
mkdir -p "$root/out-finetune"
cd "$root/out-finetune"

timed() {  # FOLDER SCRIPT ARGUMENTS: a script that writes to the folder, and there the seconds it took
    folder=$1
    shift
    echo "== $*"
    start=$SECONDS
    "$python" "$root/$1" "${@:2}" --overwrite=True
    echo $((SECONDS - start)) > "$folder/seconds"
}

tuned() {  # NAME ARGUMENTS
    timed "$1" sft.py --data=tasks.jsonl --val_data=tasks-val.jsonl --epochs=6 --out_dir="$1" "${@:2}"
}

timed out train.py --data="$text" --max_iters=500 --out_dir=out
"$python" "$root/runs/tasks.py" "$tasks" .
timed out-sft sft.py --data=tasks.jsonl --val_data=tasks-val.jsonl --learn_prompts=True \
    --out_dir=out-sft
timed out-dpo dpo.py --data=pairs.jsonl --val_data=pairs-val.jsonl --learning_rate=1e-3 --out_dir=out-dpo
"$python" "$root/magpie.py" --n=10 --batch_size=32 --patience=10 --temperature=0.6 --overwrite=True || echo "magpie.py made fewer"
"$python" "$root/sample.py" out-dpo/dpo.safetensors --prompt="Name three birds."
"$python" "$root/merge.py" out-dpo/dpo.safetensors merged.safetensors --overwrite=True
"$python" "$root/eval.py" out/ckpt.safetensors out-sft/sft.safetensors out-dpo/dpo.safetensors merged.safetensors \
    --data="$text" --max_tokens=20000

tuned full --kind=full --learning_rate=1e-3
tuned lora --learning_rate=3e-3
tuned dora --learning_rate=3e-3 --kind=dora
tuned qlora8 --learning_rate=3e-3 --base_bits=8
tuned qlora4 --learning_rate=3e-3 --base_bits=4
"$python" "$root/runs/finetune.py" .
"$python" "$root/compare.py" full lora dora qlora8 qlora4 --out=compare.png
