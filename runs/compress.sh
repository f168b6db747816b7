#!/usr/bin/env bash
# What compression costs: train a model, compress it in every way, and write the table in docs/compression.md.
#
#     bash runs/compress.sh train.txt test.txt
#
# The calibrated methods read the training text; LASER's search reads its held-out part. runs/compress.py measures the
# perplexity on test.txt. The embedding, which is the head too, keeps 8 bits everywhere.
set -eu
train=$(realpath "${1:?the text to train on}")
test=$(realpath "${2:?the text to measure on}")
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=out-compress
base=$out/base/best.safetensors
data=data/$(basename "${train%.*}")-bpe-4096  # where train.py writes the tokens

if ! [ -e "$out/base/done" ]; then
    "$python" train.py --data="$train" --n_layer=4 --n_head=4 --n_embd=256 --max_iters=600 --sample_tokens=0 \
        --overwrite=True --out_dir="$out/base"
    touch "$out/base/done"
fi

timed() {  # NAME SCRIPT ARGUMENTS: writes OUT/NAME.safetensors, and the seconds it took to OUT/NAME.seconds
    name=$1
    shift
    echo "== $*"
    start=$("$python" -c "import time; print(time.time())")
    "$python" "$@" --out="$out/$name.safetensors"
    "$python" -c "import time; print(time.time() - $start)" > "$out/$name.seconds"
}

for bits in 8 4 3 2; do
    widths="$bits, embed=8"
    timed "rtn-$bits" hqq.py "$base" --bits="$widths" --method=rtn
    timed "hqq-zero-$bits" hqq.py "$base" --bits="$widths" --scale_moves=False
    timed "hqq-$bits" hqq.py "$base" --bits="$widths"
    timed "awq-$bits" awq.py "$base" --bits="$widths" --data="$data"
    timed "gptq-$bits" gptq.py "$base" --bits="$widths" --data="$data"
done
timed laser laser.py "$base" --search=True --factored=True --data="$data" --picture="$out/laser.png"
"$python" runs/compress.py "$out" "$test" --max_tokens=60000
