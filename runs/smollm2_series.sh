#!/usr/bin/env bash
# What can be done with a real model on CPU cores: SmolLM2-135M-Instruct quantized in five ways, tuned on written
# tasks, and taken apart. Writes a table into docs/models.md.
#
#     bash runs/smollm2_series.sh test.txt calibration.txt seed_tasks.jsonl
#
# runs/smollm2.py gets the model. Perplexity is that of the first 4,096 tokens of test.txt, in windows of 512; gptq.py
# and awq.py read 16 windows of 512 tokens of calibration.txt. The embedding, which is the head too, keeps 8 bits. The
# tasks have the form that runs/tasks.py reads. What is there from an earlier run is not made again.
set -eu
test=$(realpath "${1:?the text to measure on}")
calibration=$(realpath "${2:?the text to calibrate on}")
tasks=$(realpath "${3:?the written tasks, as jsonl}")
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=out-smollm2
dense=$out/dense.safetensors
mkdir -p "$out"

timed() {  # NAME COMMAND: writes the seconds and the GiB that it took to OUT/NAME.cost, and what it printed to .txt
    [ -e "$out/$1.cost" ] && return
    echo "== ${*:2}"
    "$python" runs/timed.py "$out/$1" "$python" "${@:2}"
}

"$python" runs/smollm2.py "Why is the sky blue?"
timed dense gguf_reader.py data/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf "$dense" --dense=True
for bits in 8 4 3; do
    timed "hqq-$bits" hqq.py "$dense" --bits="$bits, embed=8" --out="$out/hqq-$bits.safetensors"
done
for method in gptq awq; do
    timed "$method-4" "$method.py" "$dense" --bits="4, embed=8" --data="$calibration" --samples=16 --block_size=512 \
        --batch_size=4 --out="$out/$method-4.safetensors"
done
timed perplexity eval.py "$dense" "$out"/{hqq-8,hqq-4,hqq-3,gptq-4,awq-4}.safetensors --data="$test" \
    --block_size=512 --max_tokens=4096 --batch_size=4

"$python" runs/tasks.py "$tasks" "$out"
timed sft sft.py "$dense" --data="$out/tasks.jsonl" --val_data="$out/tasks-val.jsonl" --epochs=1 \
    --block_size=512 --batch_size=2 --out_dir="$out/sft" --overwrite=True

prompt="Mr. Dursley met Mrs. Potter. Later that day, Mr. Dursley met Mrs."
timed lens tuned_lens.py "$dense" --data="$calibration" --block_size=64 --batch_size=2 --max_iters=30 --eval_windows=8
timed lens-picture tuned_lens.py "$dense" --apply="$out/dense.lenses" --prompt="$prompt"
timed patching patching.py "$dense" --clean="$prompt" --corrupt="${prompt/Potter/Dudley}" --target=" Potter"
"$python" runs/smollm2_series.py "$out"
