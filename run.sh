#!/usr/bin/env bash
# MetaRM from nothing to a report (Linux and macOS):
#   bash run.sh           the toy preset: on the CPU, no downloads; writes runs/toy/report.md and its pictures
#   bash run.sh hh        real data, one GPU: HH-RLHF harmless-base and SmolLM2-135M, both from the Hugging Face hub
#   bash run.sh hh-smoke  hh with one round and two PPO steps: do my model and a small --data run, and fit into memory?
#   bash run.sh smoke     the toy loop cut to about a minute, in a temporary folder unless --run names one
#   bash run.sh test      format, lint and tests; further options go to pytest
#   bash run.sh study     the evidence, many hours: docs/study/README.md; and bench, the speed: docs/bench/README.md
# Options after the preset, with paths as seen from your folder: --seed N  --run FOLDER (to write to); for hh, hh-smoke:
#   --model FOLDER_OR_HUB_NAME  --data FILE_OR_HUB_FILE  --ood FILE (prompts of another domain for S, PPO; D stays: the
#   paper's OOD setting)  --micro_batch_size N (rows per pass of training: memory, not results; may change on the way)
# Interrupted? The same command goes on: finished stages are skipped, a long one resumes from its last checkpoint.
# In front: PYTHON=/path/to/python takes that interpreter, not .venv's; METARM_DEVICE=cpu (or cuda:1 ...) that device.
# One round r of the paper's iterative RLHF (policy 0 is SFT's). D is labelled once and never added to.
#   policy r-1 --sample, k = 5--> S --+
#                                     +--Algorithm 1--> RM r --PPO, KL to SFT--> policy r --> next round
#            D (labelled pairs) ------+
set -euo pipefail
root=$(dirname "${BASH_SOURCE[0]}")/ root=${root#./} # from where you are to here: "", if that is the same
fail() { echo "run.sh: $*" >&2; exit 2; }
setup() { # VENV LIST...: installs each list into VENV, which keeps a copy: a changed list is installed again
  [ -z "${PYTHON:-}" ] || { command -v "$PYTHON" > /dev/null || fail "PYTHON=$PYTHON: no such program"; return 0; }
  PYTHON=$root$1/bin/python
  for list in "${@:2}"; do
    cmp -s "$root$list" "$root$1/${list//\//-}" && continue
    python3 -m venv "$root$1"
    "$PYTHON" -m pip install -q -r "$root$list"
    cp "$root$list" "$root$1/${list//\//-}"
  done
}
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
case ${1:-} in help|-h|--help) sed -n '2,17s/^# //p' "$0"; exit ;; "" | --*) preset=toy ;; *) preset=$1; shift ;; esac
case $preset in
  smoke | toy) real="" once=9 options="seed|run" ;; # stages: six in each round, and these
  hh | hh-smoke) real=1 once=5 options="seed|run|model|data|ood|micro_batch_size" ;;
  study) setup .venv requirements.txt docs/study/requirements.txt; exec "$PYTHON" "${root}docs/study/study.py" "$@" ;;
  bench) setup .venv-bench docs/bench/requirements.txt; exec "$PYTHON" "${root}docs/bench/bench.py" "$@" ;;
  test)
    cd "${root:-.}" && root=""
    setup .venv requirements.txt tests/requirements.txt
    "$PYTHON" -m ruff format --check --line-length 100 --output-format concise --exclude "*.md" *.py docs tests
    "$PYTHON" -m ruff check --select E,F,B,I,UP --line-length 100 --output-format concise *.py docs tests
    exec "$PYTHON" -m pytest -q tests "$@" ;;
  *) fail "unknown preset '$preset'; there are toy, hh, hh-smoke, smoke, test, study, bench" ;;
esac
seed=0 run="" scratch="" ood="" micro_batch_size="" each=""
model=HuggingFaceTB/SmolLM2-135M data=Anthropic/hh-rlhf/harmless-base/train.jsonl.gz
while [ $# -gt 0 ]; do
  [[ $1 =~ ^--($options)$ ]] || fail "unknown option '$1'; $preset has --${options//|/ --}"
  [ -n "${2:-}" ] || fail "$1 needs a value"
  declare "${1#--}=$2"; shift 2
done
[[ $micro_batch_size =~ ^([1-9][0-9]*)?$ ]] || fail "--micro_batch_size $micro_batch_size: give a number above 0"
[[ $seed =~ ^0*([0-9]{1,17})$ ]] && seed=${BASH_REMATCH[1]} || fail "--seed $seed: give 0 to 99999999999999999" # 08: 8
setup .venv requirements.txt
# The run folder. One run at a time: all processes below share the open file 9 and its lock, until the last one ends.
if [ "$preset$run" = smoke ]; then scratch=$(mktemp -d) run=$scratch/smoke; fi
trap 'kill -- $(jobs -rp | sed s/^/-/) 2> /dev/null || true; [ -z "$scratch" ] || rm -rf "$scratch"' EXIT
mkdir -p "${run:=${root}runs/$preset}"
exec 9>> "$run/.lock"
"$PYTHON" -c "from fcntl import *; flock(9, LOCK_EX | LOCK_NB)" 2> /dev/null || fail "$run is in use by another process"
# Finished stages are skipped: from the first model on, a folder belongs to one set of options and one state of the
# code, less comments, docstrings and what is for the report only. If that changes, report and pictures are made anew.
made_by="$preset $seed $model $data $ood $(cd "${root:-.}" && cat run.sh {data,rm,metarm,ppo}.py | sed -E \
  '/^ *r?""".*"""$/d; /^ *r?"""[^)]/,/"""$/d; s/ *# .*//; /^ *$/d; s/eval_flags=[^)]*//; /eval[.]py/d' | cksum)"
if ! grep -qsxF "$made_by" "$run/made_by"; then # a mistyped --data or --model made the data at most, in seconds
  [ ! -s "$run/made_by" ] || [ -e "$run/sft" ] || [ -e "$run/sft.partial" ] || rm -rf "$run/data"
  [ ! -e "$run/data" ] && [ ! -e "$run/sft" ] || fail "$run: made with other options or code; delete it or name another"
  echo "$made_by" > "$run/made_by"
fi
results=$run/results.json
[[ $results -nt ${root}eval.py && $results -nt ${root}run.sh ]] && echo "== finished: $run/report.md" && exit
stage() { # OUT FILE.py OPTIONS...: unless OUT is there, runs FILE.py, which writes OUT whole or not at all
  [ ! -e "$1" ] || return 0
  local start=$SECONDS
  echo "== $1"
  [[ $* != *" --lr "* ]] || set -- "$@" $each ${micro_batch_size:+--micro_batch_size "$micro_batch_size"} # all training
  "$PYTHON" "$root$2" "${@:3}" --out "$1"
  echo "$((SECONDS - start)) $1" >> "$run/seconds"
  awk '{ s += $1 } END { print "run.sh:", NR, "of '$((6 * rounds + once))' stages,", s, "s of work" }' "$run/seconds"
}

# The presets; of an option given twice, the later one counts. Rollouts take any token (ppo.py: no top-p, no penalty).
case $preset in
  toy | smoke)
    pairs=$run/pairs rounds=3 k=5 world=(--seed "$seed") eval_flags=(--temperature 1.0)
    sft_flags=(--lr 5e-3 --batch_size 32 --epochs 4)
    rm_flags=(--lr 1e-3 --batch_size 64 --micro_batch_size 64 --epochs 2 --log_every 42) # 1, as for 7B, is too few here
    meta_flags=(--normalize) dpo_flags=(--lr 1e-4 --batch_size 16) # eta: the default, a climb of that length
    sample_flags=(--max_new_tokens 48 --batch_size 512) meta_sample_flags=(--temperature 1.1)
    ppo_flags=(--steps 15 --batch_size 96 --minibatch_size 48 --micro_batch_size 48 --max_new_tokens 48
               --lr 2e-4 --critic_lr 1e-3 --kl_coef 0.003)
    if [ "$preset" = smoke ]; then # every stage, no result worth reading; a checkpoint per step, for tests/kill.sh
      rounds=1 k=3 each="--checkpoint_minutes 0"
      world+=(--sft 320 --pairs 160 --meta 32 --ppo 96 --valid 16 --test 16 --ood_ppo 16)
      sft_flags+=(--epochs 1) ppo_flags+=(--steps 2 --batch_size 16 --minibatch_size 8 --scale_prompts 16)
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
no_cuda() { "$PYTHON" - <<< 'import torch; torch.ones(1, device="cuda")' 2>&1 | grep -m 1 "^[A-Za-z.]*Error"; }
if [ -n "$real" ]; then # preferences, split: D and SFT, prompts for S and PPO, held-out pairs, the judge's own pairs
  why=$([ -n "${METARM_DEVICE:-}" ] || no_cuda || true) # in PyTorch's words
  [ -z "$why" ] || echo "run.sh: no CUDA device: $why; METARM_DEVICE=cpu bash run.sh hh goes on, for weeks" >&2
  [ -z "$why" ] || [ $preset = hh-smoke ] || exit 2
  stage "$run/data" data.py split --source "$data" ${ood:+--ood "$ood"} --seed "$seed" --valid_share "$held_out"
  stage "$run/sft" ppo.py sft --model "$model" --data "$run/data/sft.jsonl" "${sft_flags[@]}" --seed "$seed"
else # help-desk texts, an untrained model; D: pairs of SFT samples, labelled by the gold reward with some noise
  [ -n "$(no_cuda)" ] || echo "== $preset runs on the CPU: its models are too small to gain from the GPU"
  export METARM_DEVICE=cpu CUDA_VISIBLE_DEVICES=
  export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=67108864 # glibc: quicker
  stage "$run/data" data.py toy "${world[@]}"
  stage "$run/sft" ppo.py sft --model "$run/data/model" --data "$run/data/sft.jsonl" "${sft_flags[@]}" --seed "$seed"
  stage "$run/pairs-samples" ppo.py sample --model "$run/sft" --prompts "$run/data/prompts-pairs.jsonl" --k 2 \
    "${sample_flags[@]}" --seed "$seed"
  stage "$run/pairs" data.py label --samples "$run/pairs-samples/samples.jsonl" --noise 1.0 --seed "$seed"
fi
rm_flags+=(--model "$run/sft" --data "$pairs/train.jsonl" --eval_data "$pairs/valid.jsonl")
ppo_flags+=(--ref_policy "$run/sft" --prompts "$run/data/prompts-${ood:+ood-}ppo.jsonl")
# An arm is one way to get the reward models; each has its own chain of policies, from SFT on. A round's seed: $seed$r.
arm() { # metarm, ppo or reseeded
  local last=$run/sft r reward
  for ((r = 1; r <= rounds; r++)); do
    reward=$run/$1-$r/rm
    case $1 in
      metarm) # S: k unlabelled responses of the last policy. Algorithm 1 from RM 0's start, in its order of D (Fig. 4)
        stage "$run/metarm-$r/meta" ppo.py sample --model "$last" --prompts "$run/data/prompts-${ood:+ood-}meta.jsonl" \
          --k "$k" "${sample_flags[@]}" "${meta_sample_flags[@]}" --seed "$seed$r"
        [ -e "$reward" ] || rm -rf "$run/metarm-$r/adapted" # of a run killed between the two
        stage "$reward" metarm.py "${rm_flags[@]}" --meta "$run/metarm-$r/meta/samples.jsonl" "${meta_flags[@]}" \
          --save_adapted "$run/metarm-$r/adapted" --seed "$seed" ;;
      ppo) reward=$run/rm0 # vanilla RLHF: RM 0 (Eq. 1 on D), trained once and used in every round
        stage "$reward" rm.py "${rm_flags[@]}" --seed "$seed" ;;
      reseeded) stage "$reward" rm.py "${rm_flags[@]}" --seed "$((1000 * r + seed))" ;; # another head, order of D
    esac
    stage "$run/$1-$r/policy" ppo.py ppo --model "$last" --reward_model "$reward" "${ppo_flags[@]}" --seed "$seed$r"
    last=$run/$1-$r/policy
  done
}
controls() { # what MetaRM is compared with, and what judges them all
  arm ppo
  if [ -n "$real" ]; then # an RM on pairs that no arm sees; in the paper, GPT-4
    stage "$run/judge/rm" rm.py "${rm_flags[@]}" --data "$run/data/judge.jsonl" --epochs 2 --seed "$((seed + 7))"
  else # the gold reward; and an RM with gold labels on vanilla PPO's samples: what could still be told apart there
    local oracle=$run/oracle
    stage "$oracle/samples" ppo.py sample --model "$run/ppo-$rounds/policy" --prompts "$run/data/prompts-meta.jsonl" \
      --k 10 "${sample_flags[@]}" --seed "$seed"
    stage "$oracle/pairs" data.py label --samples "$oracle/samples/samples.jsonl" --noise 0 --seed "$seed"
    stage "$oracle/rm" rm.py --model "$run/sft" --data "$oracle/pairs/train.jsonl" --lr 3e-4 --epochs 4 --seed "$seed"
  fi
  arm reseeded
}
dpo() { stage "$run/dpo" ppo.py dpo --model "$run/sft" --data "$pairs/train.jsonl" "${dpo_flags[@]}" --seed "$seed"; }
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
OMP_NUM_THREADS=2 "$PYTHON" "${root}eval.py" --run "$run" --seed "$seed" "${eval_flags[@]}"
[ -n "$real" ] || echo "== next, on one GPU with real data: bash run.sh hh"
