#!/usr/bin/env bash
# Each variant of model.py on the same text and the same tokens, with three seeds; then the table in README.md.
#
#     bash runs/architectures.sh                                  # on an H100
#     bash runs/architectures.sh --n_layer=4 --max_iters=200      # settings after it go to every run; CPUs want less
#
# All have the baseline's number of parameters, but for experts, whose point is to have more of them at the same cost a
# token, and mod-deep, which has as many FLOPs as the baseline in more layers. A run that is done is not done again.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=out-architectures
shape="--n_layer=8 --n_embd=256 --n_head=4 --block_size=512 --batch_size=32 --max_iters=400 --eval_interval=200
    --eval_windows=256 --sample_tokens=0"

run() {
    name=$1
    shift
    for seed in 1 2 3; do
        [ -e "$out/$name-$seed/done" ] && continue
        echo "== $name, seed $seed"
        # shellcheck disable=SC2086  # shape is several words
        "$python" train.py --out_dir="$out/$name-$seed" --seed=$seed $shape "$@" $more
        touch "$out/$name-$seed/done"
    done
}

more="$*"
run baseline
run alibi      --alibi=True
run window     --sliding_window=128
run pattern    --sliding_window=128 --window_pattern=SSSL
run sinks      --sliding_window=128 --sinks=4
run diff       --diff_attn=True
run diff2      --diff_attn=True --diff_attn_version=2 --ffn_dim=896
run moe        --n_expert=8 --ffn_dim=512
run moe-bias   --n_expert=8 --ffn_dim=512 --expert_balance=bias
run moe-shared --n_expert=8 --ffn_dim=512 --expert_top_k=1 --n_shared_expert=1
run mod        --mod=topk
run mod-deep   --mod=topk --n_layer=14
run mod-soft   --mod=soft
run yoco       --yoco=True --ffn_dim=1120
"$python" runs/architectures.py $out
