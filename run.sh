#!/usr/bin/env bash
# MetaRM from nothing to a report.
#
#   bash run.sh          the toy preset: no GPU, no downloads; writes runs/toy/report.md and its pictures
#   bash run.sh hh       the real one, for one GPU: HH-RLHF harmless-base and SmolLM2-135M, both from the hub
#   bash run.sh hh-smoke the same with a few steps a stage: does my model, my data, my GPU's memory do?
#   bash run.sh smoke    the toy loop, shortened to about a minute, in a temporary folder
#   bash run.sh test     the tests
#   bash run.sh study    the evidence: two tasks, all arms, 8 seeds, many hours; it says how many first: docs/study/README.md
#   bash run.sh bench    how fast, beside TRL and torchopt (HH-RLHF from the hub, or --data FILE): docs/bench/README.md
#   bash run.sh killtest smoke, killed at 20 random moments (KILLS=20): does it end as if it had not been? (Linux)
#
# Options behind the preset: --seed 3  --run FOLDER (where to write)
#   and for hh: --model FOLDER_OR_HUB_NAME  --data FILE_OR_HUB_FILE
#               --ood FILE (prompts of another domain: S and PPO move there, D stays; the paper's OOD setting)
# PYTHON=/path/to/python bash run.sh ...  uses this interpreter as it is, instead of making .venv
#
# Interrupted? The same command goes on: finished stages are skipped, a long one goes on from its last checkpoint.
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
shift || true

# ---------------------------------------------------------------------------------------------------- set-up
# .venv is made once; the list it was made from is kept in it, so that a changed or half-done install is mended.
# (The bench has one of its own: what it compares with is nothing that this project needs.)
venv=.venv list=requirements.txt
[ "$preset" != bench ] || venv=.venv-bench list=docs/bench/requirements.txt
install() {
  [ -x $venv/bin/python ] || python3 -m venv $venv
  cmp -s "$1" "$venv/$2" || { $venv/bin/python -m pip install -q -r "$1" && cp "$1" "$venv/$2"; }
}
if [ -z "${PYTHON:-}" ]; then
  install $list installed.txt
  [ "$preset" != test ] || install tests/requirements.txt installed-tests.txt
  PYTHON=$venv/bin/python
fi
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
case $preset in
  test) exec "$PYTHON" -m pytest -q tests "$@" ;;
  bench) exec "$PYTHON" docs/bench/bench.py "$@" ;;
  study) exec "$PYTHON" docs/study/study.py "$@" ;;
esac

seed=0 run=runs/$preset model=HuggingFaceTB/SmolLM2-135M data=Anthropic/hh-rlhf/harmless-base/train.jsonl.gz ood=""
scratch="" controls=""
cleanup() {
  if [ -n "$controls" ]; then kill -- "-$controls" 2> /dev/null || true; fi
  if [ -n "$scratch" ]; then rm -rf "$scratch"; fi
}
trap cleanup EXIT
if [ "$preset" = smoke ]; then scratch=$(mktemp -d); run=$scratch/smoke; fi
while [ $# -gt 0 ]; do
  case $1 in
    --seed | --run | --model | --data | --ood)
      [ $# -gt 1 ] || { echo "run.sh: $1 needs a value" >&2; exit 2; }
      [[ $preset$1 =~ ^hh|--seed$|--run$ ]] || { echo "run.sh: $1 is for hh and hh-smoke only" >&2; exit 2; }
      declare "${1#--}=$2"; shift 2 ;;
    *) echo "run.sh: unknown option '$1'; there are --seed --run --model --data --ood" >&2; exit 2 ;;
  esac
done

case $preset in hh | hh-smoke) real=1 ;; *) real="" ;; esac

# ------------------------------------------------------------------------------------------------ the kill test
# SIGKILL to all processes at once, as a power cut would, at seeded random moments: the same command, given again and
# again, must end with the very results.json of an undisturbed run. Where it got that far, the next folder follows.
if [ "$preset" = killtest ]; then
  scratch=$(mktemp -d) kills=0 n=1 RANDOM=$((seed + 1))
  export PYTHON TMPDIR=$scratch
  start() { exec setsid "$BASH" run.sh smoke --seed "$seed" --run "$scratch/$1" &>> "$scratch/$1.log"; }
  fail() { tail -n 20 "$scratch/$1.log"; echo "killtest: $1: $2"; exit 1; }
  living() { # the process groups of a session (the controls have one of their own), less the dead that nobody buried
    ps -A -o sess= -o pgid= -o state= | awk -v session="$1" '$1 == session && $3 !~ /Z/ { print -$2 }' | sort -u
  }
  finish() {
    wait "$controls" || fail "$1" "the run failed"
    [ -z "$(find "$scratch/$1" -name '*.partial' -o -name '*.lock' -o -name '*.tmp')" ] || fail "$1" "something is left over"
    cmp "$scratch/undisturbed/results.json" "$scratch/$1/results.json" || fail "$1" "another results.json"
    echo "$1: results.json is identical"
  }
  SECONDS=0; start undisturbed & controls=$!; wait "$controls" || fail undisturbed "the run failed"
  moments=$((8 * SECONDS)) # tenths of a second
  while start "killed-$n" & controls=$!; [ "$kills" -lt "${KILLS:-20}" ]; do
    for ((wait = RANDOM % moments; wait > 0; wait--)); do kill -0 "$controls" 2> /dev/null || break; sleep 0.1; done
    if [ "$wait" -gt 0 ]; then finish "killed-$n"; n=$((n + 1)); continue; fi
    { while kill -0 "$controls" || [ -n "$(living "$controls")" ]; do
        kill -KILL -- $(living "$controls") || true; sleep 0.1
      done; wait "$controls" || true; } 2> /dev/null
    kills=$((kills + 1)) stages=$(find "$scratch/killed-$n" -name '*.partial' -printf '%P ' 2> /dev/null || true)
    echo "kill $kills, killed-$n, in the midst of ${stages:-no stage}"
  done
  finish "killed-$n"
  controls=""
  exit 0
fi

# -------------------------------------------------------------------------------------------------- the presets
# The climb eta is as long as one step of the optimizer, as in the paper (alpha = eta): AdamW moves each of P weights
# by about alpha, so its step is alpha sqrt(P) long - 0.11 for the toy's 132 thousand, 0.06 for 135 million at 5e-6.
# Rollouts are not truncated (no top-p, no penalty: see ppo.py); the paper's 0.9 and 1.1 serve S where they make sense.
case $preset in
  toy | smoke)
    rounds=3 k=5 world=()
    sft_flags=(--lr 5e-3 --batch_size 32 --epochs 4)
    rm_flags=(--lr 3e-4 --batch_size 16 --log_every 85)
    meta_flags=(--eta 0.1 --normalize)
    dpo_flags=(--lr 1e-4 --batch_size 16)
    sample_flags=(--max_new_tokens 48 --batch_size 512)
    meta_sample_flags=(--temperature 1.1)
    ppo_flags=(--steps 15 --batch_size 96 --minibatch_size 48 --micro_batch_size 48 --max_new_tokens 48
               --lr 2e-4 --critic_lr 1e-3 --kl_coef 0.003)
    eval_flags=()
    if [ "$preset" = smoke ]; then # every stage, no result worth reading
      rounds=1 k=3 world=(--sft 320 --pairs 160 --meta 32 --ppo 96 --valid 16 --test 16 --ood_ppo 16)
      sft_flags+=(--epochs 1 --checkpoint_minutes 0) # a checkpoint a step: the kill test goes on from these
      rm_flags+=(--checkpoint_minutes 0)
      dpo_flags+=(--checkpoint_minutes 0)
      ppo_flags+=(--steps 2 --batch_size 16 --minibatch_size 8 --scale_prompts 16 --checkpoint_minutes 0)
    fi ;;
  hh | hh-smoke) # the paper's settings but for: a small model, --max_length 512, fewer rollouts a step
    rounds=3 k=5
    sft_flags=(--lr 2e-5 --batch_size 32 --micro_batch_size 8 --epochs 2 --max_length 512)
    rm_flags=(--lr 5e-6 --batch_size 16 --micro_batch_size 8 --max_length 512)
    meta_flags=(--eta 0.06 --normalize --meta_batch_size 16 --micro_batch_size 4)
    dpo_flags=(--lr 5e-7 --batch_size 32 --micro_batch_size 8 --max_length 512)
    sample_flags=(--max_length 512 --max_new_tokens 128 --batch_size 128 --top_p 0.9 --repetition_penalty 1.1)
    meta_sample_flags=(--temperature 0.9) # the paper's 0.8, a little raised, so that the k responses differ
    ppo_flags=(--steps 200 --batch_size 128 --rollouts_per_prompt 16 --minibatch_size 32 --micro_batch_size 8
               --max_length 512 --max_new_tokens 128 --temperature 0.8 --lr 5e-7 --critic_lr 1.5e-6 --kl_coef 0.05)
    eval_flags=(--judge "$run/judge/rm" --max_new_tokens 128 --batch_size 128)
    if [ "$preset" = hh-smoke ]; then # give it a small --data; batches stay large enough to see what memory they take
      rounds=1
      sft_flags+=(--batch_size 8 --epochs 1)
      rm_flags+=(--batch_size 8)
      meta_flags+=(--meta_batch_size 8)
      dpo_flags+=(--batch_size 8)
      sample_flags+=(--max_new_tokens 16)
      ppo_flags+=(--steps 2 --batch_size 16 --rollouts_per_prompt 4 --minibatch_size 8 --scale_prompts 4 --max_new_tokens 16)
      eval_flags+=(--max_new_tokens 16)
    fi ;;
  *)
    echo "run.sh: unknown preset '$preset'; there are toy, hh, hh-smoke, smoke, test, bench, study, killtest" >&2; exit 2 ;;
esac

# Two threads up to D (SFT gains a third from the second), then MetaRM and its controls side by side with one each (an RM
# gains nothing). Fixed numbers, since another count may add up in another order and give other (equally good) results.
export OMP_NUM_THREADS=2
# glibc gives the memory of each step back to the system and gets it anew, page by page; keeping it saves a tiny model 10 %.
[ -n "$real" ] || export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=67108864
py() { "$PYTHON" "$@"; }

# ------------------------------------------------------------------------------------- before the first round
if [ -n "$real" ]; then
  echo "== Real preferences, split: D and SFT, prompts for S and PPO, held-out pairs, the judge's own pairs"
  py data.py split --source "$data" ${ood:+--ood "$ood"} --out "$run/data" --seed "$seed" --valid_share 0.02
  pairs=$run/data
else
  echo "== The toy world: help-desk text, its tokenizer, an untrained model"
  py data.py toy --out "$run/data" --seed "$seed" "${world[@]}"
  model=$run/data/model pairs=$run/pairs
fi

echo "== SFT policy: where the paper's RLHF starts"
py ppo.py sft --model "$model" --data "$run/data/sft.jsonl" "${sft_flags[@]}" --seed "$seed" --out "$run/sft"

if [ -z "$real" ]; then
  echo "== D: pairs of SFT samples, labelled once with Bradley-Terry noise; never added to"
  py ppo.py sample --model "$run/sft" --prompts "$run/data/prompts-pairs.jsonl" --k 2 "${sample_flags[@]}" \
                   --seed "$seed" --out "$run/pairs-samples"
  py data.py label --samples "$run/pairs-samples/samples.jsonl" --noise 1.0 --seed "$seed" --out "$run/pairs"
fi

# --------------------------------------------------------------------------------------------- what is compared
# Every arm starts from the SFT policy and takes the same number of PPO steps; each round goes on from the arm's
# last policy. Only the reward model differs.
rm_flags+=(--data "$pairs/train.jsonl" --eval_data "$pairs/valid.jsonl")
domain=$run/data/prompts-${ood:+ood-} # of S and PPO
ppo_flags+=(--ref_policy "$run/sft" --prompts "${domain}ppo.jsonl")

metarm_arm() { # the paper's rounds
  local last=$run/sft r
  for r in $(seq "$rounds"); do
    # S: k unlabelled responses of the last policy (round 1: SFT's), a little hotter so that they differ
    py ppo.py sample --model "$last" --prompts "${domain}meta.jsonl" --k "$k" "${sample_flags[@]}" \
                     "${meta_sample_flags[@]}" --seed "$seed$r" --out "$run/metarm-$r/meta"
    # Algorithm 1 on D and S, from the same initialisation and in the same order of D as RM 0 (Figure 4)
    py metarm.py --model "$run/sft" "${rm_flags[@]}" "${meta_flags[@]}" --meta "$run/metarm-$r/meta/samples.jsonl" \
                 --seed "$seed" --out "$run/metarm-$r/rm" --save_adapted "$run/metarm-$r/adapted"
    # PPO on the new RM, KL to the SFT policy
    py ppo.py ppo --model "$last" --reward_model "$run/metarm-$r/rm" "${ppo_flags[@]}" --seed "$seed$r" \
                  --out "$run/metarm-$r/policy"
    last=$run/metarm-$r/policy
  done
}

vanilla_arm() { # RM 0, Eq. 1 on D, throughout: vanilla RLHF, whose policy walks away from RM 0
  local last=$run/sft r
  py rm.py --model "$run/sft" "${rm_flags[@]}" --seed "$seed" --out "$run/rm0"
  for r in $(seq "$rounds"); do
    py ppo.py ppo --model "$last" --reward_model "$run/rm0" "${ppo_flags[@]}" --seed "$seed$r" --out "$run/ppo-$r/policy"
    last=$run/ppo-$r/policy
  done
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
  py ppo.py dpo --model "$run/sft" --data "$pairs/train.jsonl" "${dpo_flags[@]}" --seed "$seed" --out "$run/dpo"
}

judge() { # whose word the report takes
  if [ -n "$real" ]; then # an RM on pairs that no arm sees; in the paper, GPT-4
    py rm.py --model "$run/sft" "${rm_flags[@]}" --data "$run/data/judge.jsonl" --epochs 2 --seed "$((seed + 7))" \
             --out "$run/judge/rm"
  else # the gold reward; and an RM with gold labels on vanilla PPO's samples: what could still be told apart there
    py ppo.py sample --model "$run/ppo-$rounds/policy" --prompts "$run/data/prompts-meta.jsonl" --k 4 \
                     "${sample_flags[@]}" --seed "$seed" --out "$run/oracle/samples"
    py data.py label --samples "$run/oracle/samples/samples.jsonl" --noise 0 --seed "$seed" --out "$run/oracle/pairs"
    py rm.py --model "$run/sft" --data "$run/oracle/pairs/train.jsonl" --lr 3e-4 --epochs 4 --seed "$seed" \
             --out "$run/oracle/rm"
  fi
}

if [ -n "$real" ]; then # one GPU: one after the other
  metarm_arm; dpo_arm; vanilla_arm; reseeded_arm; judge
else # two cores: two at a time
  echo "== $rounds round(s) of MetaRM here; its controls beside it on the other core (their progress: $run/controls.log)"
  export OMP_NUM_THREADS=1
  set -m  # a process group of its own: Ctrl-C here then stops it as a whole, the Python inside included
  { vanilla_arm; judge; reseeded_arm; dpo_arm; } > "$run/controls.log" 2>&1 &
  controls=$!
  set +m
  metarm_arm
  echo "== waiting for the controls"
  wait "$controls" || { tail -n 5 "$run/controls.log" >&2; exit 1; }
  controls=""
  grep -v 'it/s\|s/it' "$run/controls.log" || true
fi

echo "== The report"
export OMP_NUM_THREADS=2
py eval.py --run "$run" --seed "$seed" "${eval_flags[@]}"
