#!/usr/bin/env bash
# MetaRM from nothing to a report (Linux and macOS):
#   bash run.sh           the toy preset: no GPU, no downloads; writes runs/toy/report.md and its pictures
#   bash run.sh hh        real data, one GPU: HH-RLHF harmless-base and SmolLM2-135M, both from the Hugging Face hub
#   bash run.sh hh-smoke  one round, two PPO steps: does my model, and a small --data file, run and fit into memory?
#   bash run.sh smoke     the toy loop cut to about a minute, in a temporary folder unless --run names one
#   bash run.sh test      format, lint and tests; further options go to pytest
#   bash run.sh study     the evidence, many hours: docs/study/README.md; and bench, the speed: docs/bench/README.md
#
# Options after the preset: --seed N  --run FOLDER (where to write); for hh and hh-smoke also --model FOLDER_OR_HUB_NAME
#   --data FILE_OR_HUB_FILE  --ood FILE (prompts of another domain for S and PPO; D stays: the paper's OOD setting)
# Interrupted? The same command goes on: finished stages are skipped, a long one resumes from its last checkpoint.
# PYTHON=/path/to/python bash run.sh ... uses that interpreter as it is, instead of making .venv.
#
# One round r of the paper's iterative RLHF (policy 0 is SFT's). D is labelled once and never added to.
#   policy r-1 --sample, k = 5--> S --+
#                                     +--Algorithm 1--> RM r --PPO, KL to SFT--> policy r --> next round
#            D (labelled pairs) ------+
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
fail() { echo "run.sh: $*" >&2; exit 2; }

setup() { # VENV LIST...: installs each list into VENV, which keeps a copy of it, so that a changed list is installed again
  [ -z "${PYTHON:-}" ] || return 0
  PYTHON=$1/bin/python
  for list in "${@:2}"; do
    cmp -s "$list" "$1/${list//\//-}" && continue
    python3 -m venv "$1"
    "$PYTHON" -m pip install -q -r "$list"
    cp "$list" "$1/${list//\//-}"
  done
}
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
case ${1:-} in "" | --*) preset=toy ;; *) preset=$1; shift ;; esac
case $preset in
  smoke | toy) real="" options="seed|run" ;;
  hh | hh-smoke) real=1 options="seed|run|model|data|ood" ;;
  study) setup .venv requirements.txt docs/study/requirements.txt; exec "$PYTHON" docs/study/study.py "$@" ;;
  bench) setup .venv-bench docs/bench/requirements.txt; exec "$PYTHON" docs/bench/bench.py "$@" ;;
  test)
    setup .venv requirements.txt tests/requirements.txt
    "$PYTHON" -m ruff format --check --line-length 100 --output-format concise --exclude "*.md" *.py docs tests
    "$PYTHON" -m ruff check --select E,F,B,I,UP --line-length 100 --output-format concise *.py docs tests
    exec "$PYTHON" -m pytest -q tests "$@" ;;
  *) fail "unknown preset '$preset'; there are toy, hh, hh-smoke, smoke, test, study, bench" ;;
esac
seed=0 run="" scratch="" model=HuggingFaceTB/SmolLM2-135M data=Anthropic/hh-rlhf/harmless-base/train.jsonl.gz ood=""
while [ $# -gt 0 ]; do
  [[ $1 =~ ^--($options)$ ]] || fail "unknown option '$1'; $preset has --${options//|/ --}"
  [ -n "${2:-}" ] || fail "$1 needs a value"
  declare "${1#--}=$2"
  shift 2
done
setup .venv requirements.txt

# The run folder. One run at a time: all processes below share the open file 9 and its lock, until the last one ends.
# Finished stages are skipped, so the folder belongs to one set of options and one state of the code.
if [ "$preset$run" = smoke ]; then scratch=$(mktemp -d) run=$scratch/smoke; fi
trap 'kill -- $(jobs -rp | sed s/^/-/) 2> /dev/null || true; [ -z "$scratch" ] || rm -rf "$scratch"' EXIT
mkdir -p "${run:=runs/$preset}"
exec 9>> "$run/.lock"
"$PYTHON" -c "import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)" 2> /dev/null || fail "$run is in use by another process"
made_by="$preset $seed $model $data $ood $(cat run.sh {data,rm,metarm,ppo,eval}.py | cksum)"
[ -s "$run/made_by" ] || [ -e "$run/data" ] || echo "$made_by" > "$run/made_by"
grep -qsxF "$made_by" "$run/made_by" || fail "$run was made with other options or code: name another --run, or delete it"
[ ! -e "$run/results.json" ] || { echo "== finished: $run/report.md"; exit; }
stage() { # OUT FILE.py OPTIONS...: unless OUT is there, runs FILE.py, which writes OUT whole or not at all
  [ -e "$1" ] || { echo "== $1"; "$PYTHON" "${@:2}" --out "$1"; }
}

# The presets; of an option given twice, the later one counts. Rollouts are not truncated (no top-p, no penalty: see ppo.py); the paper's 0.9 and 1.1 serve S in hh.
case $preset in
  toy | smoke)
    pairs=$run/pairs rounds=3 k=5 world=(--seed "$seed")
    sft_flags=(--lr 5e-3 --batch_size 32 --epochs 4)
    rm_flags=(--lr 1e-3 --batch_size 64 --micro_batch_size 64 --epochs 2 --log_every 42) # 1 epoch, as for the paper's 7B, is too few here
    meta_flags=(--normalize) dpo_flags=(--lr 1e-4 --batch_size 16) # eta: the default, lr * sqrt(weights)
    sample_flags=(--max_new_tokens 48 --batch_size 512) meta_sample_flags=(--temperature 1.1)
    ppo_flags=(--steps 15 --batch_size 96 --minibatch_size 48 --micro_batch_size 48 --max_new_tokens 48
               --lr 2e-4 --critic_lr 1e-3 --kl_coef 0.003)
    eval_flags=(--temperature 1.0)
    if [ "$preset" = smoke ]; then # every stage, no result worth reading; a checkpoint per step, for tests/kill.sh
      rounds=1 k=3 often=(--checkpoint_minutes 0) world+=(--sft 320 --pairs 160 --meta 32 --ppo 96 --valid 16 --test 16 --ood_ppo 16)
      sft_flags+=(--epochs 1 "${often[@]}") rm_flags+=("${often[@]}") dpo_flags+=("${often[@]}")
      ppo_flags+=(--steps 2 --batch_size 16 --minibatch_size 8 --scale_prompts 16 "${often[@]}")
    fi ;;
  hh | hh-smoke) # the paper's settings, or why not: docs/hh. Micro-batches: 20 GB for SmolLM2-135M, if no row is longer
    pairs=$run/data rounds=3 k=5 held_out=0.02 longest=(--max_length 320)
    sft_flags=(--lr 2e-5 --batch_size 32 --micro_batch_size 16 --epochs 2 "${longest[@]}")
    rm_flags=(--lr 5e-6 --batch_size 16 --micro_batch_size 16 --log_every 100 "${longest[@]}")
    meta_flags=(--meta_batch_size 16 --micro_batch_size 8)
    dpo_flags=(--lr 5e-7 --batch_size 32 --micro_batch_size 8 "${longest[@]}")
    sample_flags=(--max_new_tokens 128 --batch_size 512 --top_p 0.9 --repetition_penalty 1.1 "${longest[@]}")
    meta_sample_flags=(--temperature 0.9) # the paper's 0.8, a little raised, so that the k responses differ
    ppo_flags=(--steps 50 --batch_size 512 --rollouts_per_prompt 16 --minibatch_size 32 --micro_batch_size 32
               --ppo_epochs 1 --max_new_tokens 128 --temperature 0.8 --lr 5e-7 --critic_lr 1.5e-6 --kl_coef 0.05
               "${longest[@]}")
    eval_flags=(--judge "$run/judge/rm" --temperature 0.8 --max_new_tokens 128 --batch_size 256) # PPO's temperature
    if [ "$preset" = hh-smoke ]; then # for a small --data: lengths and micro-batches are hh's, and so is the memory
      rounds=1 held_out=0.1
      sft_flags+=(--epochs 1) meta_flags+=(--meta_batch_size 8)
      ppo_flags+=(--steps 2 --batch_size 32 --scale_prompts 4)
    fi ;;
esac

export OMP_NUM_THREADS=2 # a fixed number: another one may add up in another order, and so change the last digits
if [ -n "$real" ]; then # preferences, split: D and SFT, prompts for S and PPO, held-out pairs, the judge's own pairs
  stage "$run/data" data.py split --source "$data" ${ood:+--ood "$ood"} --seed "$seed" --valid_share "$held_out"
  stage "$run/sft" ppo.py sft --model "$model" --data "$run/data/sft.jsonl" "${sft_flags[@]}" --seed "$seed"
else # help-desk texts, an untrained model; D: pairs of SFT samples, labelled by the gold reward with Bradley-Terry noise
  export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=67108864 # glibc: a tenth faster
  stage "$run/data" data.py toy "${world[@]}"
  stage "$run/sft" ppo.py sft --model "$run/data/model" --data "$run/data/sft.jsonl" "${sft_flags[@]}" --seed "$seed"
  stage "$run/pairs-samples" ppo.py sample --model "$run/sft" --prompts "$run/data/prompts-pairs.jsonl" --k 2 \
    "${sample_flags[@]}" --seed "$seed"
  stage "$run/pairs" data.py label --samples "$run/pairs-samples/samples.jsonl" --noise 1.0 --seed "$seed"
fi
rm_flags+=(--model "$run/sft" --data "$pairs/train.jsonl" --eval_data "$pairs/valid.jsonl")
ppo_flags+=(--ref_policy "$run/sft" --prompts "$run/data/prompts-${ood:+ood-}ppo.jsonl")

# An arm is one way to get the reward models; each has its own chain of policies, from SFT on. Seeds of a round: $seed$r.
arm() { # metarm, ppo or reseeded
  local last=$run/sft r reward_model
  for ((r = 1; r <= rounds; r++)); do
    reward_model=$run/$1-$r/rm
    case $1 in
      metarm) # S: k unlabelled responses of the last policy, a little hotter so that they differ. Then Algorithm 1 on
        # D and S, from the same initialisation and in the same order of D as RM 0 (Figure 4)
        stage "$run/metarm-$r/meta" ppo.py sample --model "$last" --prompts "$run/data/prompts-${ood:+ood-}meta.jsonl" \
          --k "$k" "${sample_flags[@]}" "${meta_sample_flags[@]}" --seed "$seed$r"
        [ -e "$reward_model" ] || rm -rf "$run/metarm-$r/adapted" # of a run killed between the two
        stage "$reward_model" metarm.py "${rm_flags[@]}" --meta "$run/metarm-$r/meta/samples.jsonl" "${meta_flags[@]}" \
          --save_adapted "$run/metarm-$r/adapted" --seed "$seed" ;;
      ppo) # vanilla RLHF: RM 0 (Eq. 1 on D), trained once and used in every round
        reward_model=$run/rm0
        stage "$reward_model" rm.py "${rm_flags[@]}" --seed "$seed" ;;
      reseeded) # a plain RM with another head and order of D each round: one the policy was not optimised against
        stage "$reward_model" rm.py "${rm_flags[@]}" --seed "$((1000 * r + seed))" ;;
    esac
    stage "$run/$1-$r/policy" ppo.py ppo --model "$last" --reward_model "$reward_model" "${ppo_flags[@]}" --seed "$seed$r"
    last=$run/$1-$r/policy
  done
}

controls() { # what MetaRM is compared with, and what judges them all
  arm ppo
  if [ -n "$real" ]; then # an RM on pairs that no arm sees; in the paper, GPT-4
    stage "$run/judge/rm" rm.py "${rm_flags[@]}" --data "$run/data/judge.jsonl" --epochs 2 --seed "$((seed + 7))"
  else # the gold reward; and an RM with gold labels on vanilla PPO's samples: what could still be told apart there
    stage "$run/oracle/samples" ppo.py sample --model "$run/ppo-$rounds/policy" --prompts "$run/data/prompts-meta.jsonl" \
      --k 10 "${sample_flags[@]}" --seed "$seed"
    stage "$run/oracle/pairs" data.py label --samples "$run/oracle/samples/samples.jsonl" --noise 0 --seed "$seed"
    stage "$run/oracle/rm" rm.py --model "$run/sft" --data "$run/oracle/pairs/train.jsonl" --lr 3e-4 --epochs 4 --seed "$seed"
  fi
  arm reseeded
}
dpo() { stage "$run/dpo" ppo.py dpo --model "$run/sft" --data "$pairs/train.jsonl" "${dpo_flags[@]}" --seed "$seed"; } # no RM
if [ -n "$real" ]; then # one GPU: one after the other
  arm metarm; controls; dpo
else # two cores: two lanes. set -m makes each a process group, which the trap above can end as a whole
  echo "== MetaRM, then DPO here; the other arms beside them on the other core: $run/controls.log"
  export OMP_NUM_THREADS=1
  set -m
  { arm metarm; dpo; } & metarm=$!
  controls >> "$run/controls.log" 2>&1 & controls=$!
  set +m
  running() { kill -0 "$1" 2> /dev/null; }
  while running "$metarm" && { running "$controls" || wait "$controls"; }; do sleep 1; done # until one ends or fails
  running "$metarm" || wait "$metarm"
  wait "$controls" || { tail -n 3 "$run/controls.log" >&2; exit 1; }
fi
OMP_NUM_THREADS=2 "$PYTHON" eval.py --run "$run" --seed "$seed" "${eval_flags[@]}"
