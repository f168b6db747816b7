#!/usr/bin/env bash
# Train each variant of model.py on the same tokens, with three seeds; then write the table in docs/variants.md, and
# compare the runs.
#
#     bash runs/architectures.sh                                  # on an H100
#     bash runs/architectures.sh --n_layer=4 --max_iters=200      # settings go to every run; CPUs need smaller ones
#
# Every model has about as many parameters as the baseline, with three exceptions: models with experts have as many
# *active* parameters, mod-deep costs as many FLOPs in more layers, and value-embeds has more embeddings, which are
# looked up, not multiplied. A run that is done is not done again; a run that was stopped half-way starts anew.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=out-architectures
shape=(--n_layer=8 --n_embd=256 --n_head=4 --block_size=512 --batch_size=32 --max_iters=400 --eval_interval=200
    --eval_windows=256)
more=(--sample_tokens=0 "$@")

run() {  # NAME SETTINGS
    name=$1
    shift
    for seed in 1 2 3; do
        folder=$out/$name-$seed
        [ -e "$folder/done" ] && continue
        echo "== $name, seed $seed"
        "$python" train.py --overwrite=True --out_dir="$folder" --seed="$seed" "${shape[@]}" "$@" "${more[@]}"
        touch "$folder/done"
    done
}

run baseline
run alibi          --alibi=True
run window         --sliding_window=128
run pattern        --sliding_window=128 --window_pattern=SSSL
run sinks          --sliding_window=128 --sinks=4
run diff           --diff_attn=True
run diff2          --diff_attn=True --diff_attn_version=2 --ffn_dim=896
run moe            --n_expert=8 --ffn_dim=512
run moe-bias       --n_expert=8 --ffn_dim=512 --expert_balance=bias
run moe-shared     --n_expert=8 --ffn_dim=512 --expert_top_k=1 --n_shared_expert=1
run mod            --mod=topk
run mod-deep       --mod=topk --n_layer=14
run mod-soft       --mod=soft
run yoco           --yoco=True --ffn_dim=1120
run value-residual --value_residual=True
run value-embeds   --value_embeds=True
run softcap        --softcap=15
"$python" runs/architectures.py "$out"
"$python" compare.py "$out"/*-[123] --against=baseline --out="$out/compare.png"
