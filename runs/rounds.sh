#!/usr/bin/env bash
# Preferences in rounds: a model answers, code or a judge chooses between its answers, dpo.py learns from that; then the
# model that it has become answers, with other draws, and so on. What follows the two files is for constitution.py.
#
#     bash runs/rounds.sh out-sft/sft.safetensors problems.jsonl held-out.jsonl --principle=right --label=code --draws=8
#     ROUNDS=2 DPO="--learning_rate=1e-4" bash runs/rounds.sh CKPT prompts.jsonl held-out.jsonl --principle=short:20 \
#         --judge=CKPT
#
# Before the first round and after each one it prints how many answers to the file held out keep the principle.
set -eu
model=${1:?the checkpoint to begin with}
prompts=${2:?the file of prompts, or of problems}
held_out=${3:?a file of other prompts or problems}
shift 3
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
out=${OUT:-out-rounds}
mkdir -p "$out"

measured() {  # WHEN ARGUMENTS
    "$python" "$root/constitution.py" "$model" "$held_out" --out="$out/held-out.jsonl" --overwrite=True "${@:2}" \
        | sed -n "s/^drawn:/$1:/p"
}

measured "before" "$@"
for round in $(seq "${ROUNDS:-3}"); do
    "$python" "$root/constitution.py" "$model" "$prompts" --out="$out/pairs-$round.jsonl" --seed="$round" \
        --overwrite=True "$@" > "$out/pairs-$round.txt"
    # shellcheck disable=SC2086
    "$python" "$root/dpo.py" "$model" --data="$out/pairs-$round.jsonl" --out_dir="$out/round-$round" --seed="$round" \
        --overwrite=True ${DPO:-} > "$out/dpo-$round.txt"
    model=$out/round-$round/dpo.safetensors
    measured "round $round" "$@"
done
