#!/usr/bin/env bash
# A run that is killed at random moments ends as if it had not been (Linux: setsid, procps and GNU find).
#   bash tests/kill.sh [KILLS] [SEED]     20 kills, seed 0; about 20 minutes
# SIGKILL ends all processes of a smoke run at once, as a power cut would. The same command, given again and again, must
# end with the very results.json of a run that nobody disturbed, and leave nothing half-written.
# A run that ends between two kills is compared, and the next kills fall on a new folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
kills=${1:-20} seed=${2:-0} killed=0 n=1 pid="" scratch=$(mktemp -d)
RANDOM=$((seed + 1)) # seeds $RANDOM
living() { # the process groups of run $pid, which is a session of its own, less the dead that nobody has waited for
  ps -A -o sess= -o pgid= -o state= | awk -v session="$pid" '$1 == session && $3 !~ /Z/ { print -$2 }' | sort -u
}
kill_all() { # again and again, since a process may just be starting another
  while kill -0 "$pid" || [ -n "$(living)" ]; do
    kill -KILL -- $(living) || true
    sleep 0.1
  done
  wait "$pid" || true
}
trap '[ -z "$pid" ] || kill_all 2> /dev/null; rm -rf "$scratch"' EXIT
fail() {
  tail -n 20 "$scratch/$1.log"
  echo "kill.sh: $1: $2"
  exit 1
}
start() { # FOLDER
  TMPDIR=$scratch setsid "$BASH" run.sh smoke --seed "$seed" --run "$scratch/$1" >> "$scratch/$1.log" 2>&1 &
  pid=$!
}
finish() { # FOLDER
  wait "$pid" || fail "$1" "the run failed"
  [ -z "$(find "$scratch/$1" -name '*.partial' -o -name '*.tmp')" ] || fail "$1" "something is left over"
  cmp "$scratch/undisturbed/results.json" "$scratch/$1/results.json" || fail "$1" "another results.json"
  echo "$1: results.json is identical"
}

SECONDS=0
start undisturbed
finish undisturbed
moments=$((8 * SECONDS)) # tenths of a second: a kill falls on any moment of the first four fifths
while start "killed-$n" && [ "$killed" -lt "$kills" ]; do
  for ((left = RANDOM % moments; left > 0; left--)); do
    kill -0 "$pid" 2> /dev/null || break
    sleep 0.1
  done
  if [ "$left" -gt 0 ]; then # it ended before its moment came
    finish "killed-$n"
    n=$((n + 1))
    continue
  fi
  kill_all 2> /dev/null
  killed=$((killed + 1))
  midst=$(find "$scratch/killed-$n" -name '*.partial' -printf '%P ' 2> /dev/null || true)
  echo "kill $killed, killed-$n, in the midst of ${midst:-no stage}"
done
finish "killed-$n"
