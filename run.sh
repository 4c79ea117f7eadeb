#!/usr/bin/env bash
# MetaRM from nothing to a report.
#
#   bash run.sh          the toy preset: no GPU, no downloads; writes runs/toy/report.md and its pictures
#   bash run.sh smoke    the same loop, shortened to about a minute, in a temporary folder
#   bash run.sh test     the tests
#
# SEED=3 RUN=runs/toy-3 bash run.sh      another seed, in a folder of its own
# PYTHON=/path/to/python bash run.sh     use this interpreter as it is, instead of making .venv
#
# Interrupted? The same command goes on: finished stages are skipped, a half-finished one starts again.
#
# The data flow of one round r (the paper's iterative RLHF):
#
#   policy r-1 --sample, k = 5--> S --+
#                                     +--Algorithm 1--> RM r --PPO, KL to SFT--> policy r --> next round
#            D (labelled once) -------+
#
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
preset=${1:-toy}

# ---------------------------------------------------------------------------------------------------- set-up
# .venv is made once; the list it was made from is kept in it, so that a changed or half-done install is mended.
install() {
  [ -x .venv/bin/python ] || python3 -m venv .venv
  cmp -s "$1" ".venv/$2" || { .venv/bin/python -m pip install -q -r "$1" && cp "$1" ".venv/$2"; }
}
if [ -z "${PYTHON:-}" ]; then
  install requirements.txt installed.txt
  [ "$preset" != test ] || install tests/requirements.txt installed-tests.txt
  PYTHON=.venv/bin/python
fi
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false

case $preset in
  test)
    shift
    exec "$PYTHON" -m pytest -q tests "$@" ;;
  toy)   # sizes that show the illness and the cure in a few minutes on two cores
    run=${RUN:-runs/toy} rounds=3 world=() sft_epochs=4 steps=25 k=5 ;;
  smoke) # every stage, no result worth reading; the temporary folder goes when it is done
    run=${RUN:-$(mktemp -d)/smoke} rounds=1 sft_epochs=1 steps=2 k=3
    world=(--sft 320 --pairs 160 --meta 32 --ppo 96 --valid 16 --test 16 --ood_ppo 16) ;;
  *)
    echo "run.sh: unknown preset '$preset'; there are: toy, smoke, test" >&2; exit 2 ;;
esac
seed=${SEED:-0}

# Two threads up to RM 0, then two arms side by side with one thread each: these models are too small to gain much from
# the second thread. Fixed numbers, since another count adds up in another order and gives other (equally good) results.
export OMP_NUM_THREADS=2
py() { "$PYTHON" "$@"; }

sft_flags=(--lr 5e-3 --batch_size 32 --epochs "$sft_epochs" --seed "$seed")
rm_flags=(--data "$run/pairs/train.jsonl" --eval_data "$run/pairs/valid.jsonl" --lr 3e-4 --batch_size 16)
meta_flags=(--eta 0.1 --normalize --order first)
ppo_flags=(--ref_policy "$run/sft" --prompts "$run/data/prompts-ppo.jsonl" --steps "$steps" --batch_size 96
           --minibatch_size 48 --micro_batch_size 48 --max_new_tokens 48 --lr 3e-4 --critic_lr 1e-3 --kl_coef 0.03)
if [ "$preset" = smoke ]; then
  ppo_flags+=(--batch_size 16 --minibatch_size 8 --scale_prompts 16 --max_new_tokens 24)
fi

# ------------------------------------------------------------------------------------- before the first round
echo "== The toy world: help-desk text, its tokenizer, an untrained model"
py data.py toy --out "$run/data" --seed "$seed" "${world[@]}"

echo "== SFT policy: where the paper's RLHF starts"
py ppo.py sft --model "$run/data/model" --data "$run/data/sft.jsonl" --out "$run/sft" "${sft_flags[@]}"

echo "== D: pairs of SFT samples, labelled once with Bradley-Terry noise; never added to"
py ppo.py sample --model "$run/sft" --prompts "$run/data/prompts-pairs.jsonl" --k 2 --batch_size 512 --seed "$seed" \
                 --out "$run/pairs-samples"
py data.py label --samples "$run/pairs-samples/samples.jsonl" --out "$run/pairs" --noise 1.0 --seed "$seed"

echo "== RM 0: Eq. 1 on D"
py rm.py --model "$run/sft" "${rm_flags[@]}" --seed "$seed" --out "$run/rm0"

# --------------------------------------------------------------------------------------------- what is compared
# Every arm starts from the SFT policy and takes the same number of PPO steps; each round goes on from the arm's
# last policy. Only the reward model differs.

vanilla_arm() { # RM 0 throughout: vanilla RLHF, whose policy walks away from RM 0
  local last=$run/sft r
  for r in $(seq "$rounds"); do
    py ppo.py ppo --model "$last" --reward_model "$run/rm0" "${ppo_flags[@]}" --seed "$seed$r" --out "$run/ppo-$r/policy"
    last=$run/ppo-$r/policy
  done
  # the oracle: what an RM with GOLD labels on vanilla PPO's own samples can still tell apart
  py ppo.py sample --model "$last" --prompts "$run/data/prompts-meta.jsonl" --k 4 --batch_size 512 --seed "$seed" \
                   --out "$run/oracle/samples"
  py data.py label --samples "$run/oracle/samples/samples.jsonl" --noise 0 --seed "$seed" --out "$run/oracle/pairs"
  py rm.py --model "$run/sft" --data "$run/oracle/pairs/train.jsonl" --lr 3e-4 --epochs 4 --seed "$seed" \
           --out "$run/oracle/rm"
}

reseeded_arm() { # a plain RM with another head and order of D each round: any RM the policy was NOT optimised against
  local last=$run/sft r
  for r in $(seq "$rounds"); do
    py rm.py --model "$run/sft" "${rm_flags[@]}" --seed "$((1000 * r + seed))" --out "$run/reseeded-$r/rm"
    py ppo.py ppo --model "$last" --reward_model "$run/reseeded-$r/rm" "${ppo_flags[@]}" --seed "$seed$r" \
                  --out "$run/reseeded-$r/policy"
    last=$run/reseeded-$r/policy
  done
}

dpo_arm() { # preferences without RM or rollouts: the paper's other baseline
  py ppo.py dpo --model "$run/sft" --data "$run/pairs/train.jsonl" --lr 1e-4 --batch_size 16 --seed "$seed" \
                --out "$run/dpo"
}

metarm_arm() { # the paper's rounds
  local last=$run/sft r
  for r in $(seq "$rounds"); do
    # S: k unlabelled responses of the last policy (round 1: SFT's), a little hotter so that they differ
    py ppo.py sample --model "$last" --prompts "$run/data/prompts-meta.jsonl" --k "$k" --temperature 1.1 \
                     --batch_size 512 --seed "$seed$r" --out "$run/metarm-$r/meta"
    # Algorithm 1 on D and S, from the same initialisation and in the same order of D as RM 0 (Figure 4)
    py metarm.py --model "$run/sft" "${rm_flags[@]}" "${meta_flags[@]}" --meta "$run/metarm-$r/meta/samples.jsonl" \
                 --seed "$seed" --out "$run/metarm-$r/rm" --save_adapted "$run/metarm-$r/adapted"
    py ppo.py ppo --model "$last" --reward_model "$run/metarm-$r/rm" "${ppo_flags[@]}" --seed "$seed$r" \
                  --out "$run/metarm-$r/policy"
    last=$run/metarm-$r/policy
  done
}

echo "== $rounds round(s): MetaRM here; its controls beside it on the other core (progress in $run/controls.log)"
export OMP_NUM_THREADS=1
set -m  # a process group of its own: Ctrl-C here then stops it as a whole, the Python inside included
{ vanilla_arm; reseeded_arm; } > "$run/controls.log" 2>&1 &
controls=$!
set +m
trap 'kill -- "-$controls" 2>/dev/null || true' EXIT
dpo_arm
metarm_arm
echo "== waiting for the controls"
wait "$controls" || { tail -n 5 "$run/controls.log" >&2; exit 1; }
trap - EXIT
grep -v 'it/s\|s/it' "$run/controls.log" || true

echo "== The report"
export OMP_NUM_THREADS=2
py eval.py --run "$run" --seed "$seed"
