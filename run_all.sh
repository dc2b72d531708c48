#!/usr/bin/env bash
# Trains every row of the report's Tables 4-7, one after the other, then prints them.
#
#   bash run_all.sh                        Tables 4, 5, 6 and 7: 12 runs
#   bash run_all.sh 5 7                    only these tables
#   bash run_all.sh extended               the 64,000-iteration run
#   bash run_all.sh --list [TABLE...]      print the commands of the runs, train nothing
#   bash run_all.sh 4 -- --seed 1          what follows -- goes to every train.py
#
# Started again, it skips what is complete and continues what was interrupted. Paths are
# relative to this script's folder. Exit: 0 all trained, 1 a row failed, 2 usage,
# 130 Ctrl-C, 143 SIGTERM.

# table    report, %  flags of train.py
rows='
4          60.47      --optimizer adam    --lr 0.1 --bs 64  --step 5000
4          88.51      --optimizer sgd     --lr 0.1 --bs 64  --step 5000
4          84.90      --optimizer adagrad --lr 0.1 --bs 64  --step 5000
4          88.95      --optimizer asgd    --lr 0.1 --bs 64  --step 5000
5          88.51      --optimizer sgd     --lr 0.1 --bs 64  --step 5000
5          89.31      --optimizer sgd     --lr 0.3 --bs 64  --step 5000
5          87.70      --optimizer sgd     --lr 0.5 --bs 64  --step 5000
6          84.96      --optimizer sgd     --lr 0.3 --bs 32  --step 5000
6          89.31      --optimizer sgd     --lr 0.3 --bs 64  --step 5000
6          91.07      --optimizer sgd     --lr 0.3 --bs 128 --step 5000
6          90.40      --optimizer sgd     --lr 0.3 --bs 256 --step 5000
7          89.83      --optimizer sgd     --lr 0.3 --bs 128 --step 4000
7          91.07      --optimizer sgd     --lr 0.3 --bs 128 --step 5000
7          92.65      --optimizer sgd     --lr 0.3 --bs 128 --step 8000
7          92.14      --optimizer sgd     --lr 0.3 --bs 128 --step 10000
extended   93.18      --optimizer sgd     --lr 0.3 --bs 128 --step 10000 --iters 64000
'

cd "$(dirname "$0")" || exit 1

tables='' list=no
while [ $# -gt 0 ]; do
  case $1 in
    4 | 5 | 6 | 7 | extended) tables="${tables:+$tables|}$1" ;;
    --list) list=yes ;;
    --) shift; break ;;
    *) echo "run_all.sh: unknown argument '$1'; usage:" \
         "bash run_all.sh [--list] [4|5|6|7|extended ...] [-- FLAGS of train.py]" >&2
       exit 2 ;;
  esac
  shift
done
rows=$(grep -E "^(${tables:-4|5|6|7}) " <<< "$rows" | tr -s ' ')
runs=$(cut -d ' ' -f 3- <<< "$rows" | awk '!seen[$0]++')  # rows that share a run: once

if [ $list = yes ]; then
  while read -r flags; do
    echo "python train.py $flags$([ $# -eq 0 ] || printf ' %q' "$@")"
  done <<< "$runs"
  exit
fi

# bash runs a trap only between commands or in `wait`, so training goes to the background.
# SIGTERM also for Ctrl-C: a background child is born deaf to SIGINT.
stop() {
  trap '' INT TERM
  kill -TERM $! 2> /dev/null
  wait
  echo "run_all.sh: stopped; start it again to continue" >&2
  exit "$1"
}
trap 'stop 130' INT
trap 'stop 143' TERM

report=(python report.py)
previous=''
for flag in "$@"; do
  [ "$previous" = --logs ] && report+=(--logs "$flag")
  case $flag in --logs=*) report+=("$flag") ;; esac
  previous=$flag
done

total=$(wc -l <<< "$runs") n=0 seen='' failed=''
while read -r table accuracy flags <&3; do
  row="Table $table (report ${accuracy} %): $flags"
  case $seen in *"<$flags>"*) echo "== $row: same run as above, not trained again"; continue ;; esac
  seen="$seen<$flags>" n=$((n + 1))
  printf '== %d of %d, %dh%02dm so far. %s\n' \
    $n "$total" $((SECONDS / 3600)) $((SECONDS / 60 % 60)) "$row"
  read -r -a args <<< "$flags"
  python train.py "${args[@]}" "$@" &
  wait $!
  status=$?
  case $status in
    0) ;;
    130 | 143) stop $status ;;
    *) failed="$failed$row: exit $status"$'\n'
       echo "run_all.sh: failed, exit $status: $row" >&2 ;;
  esac
done 3<<< "$rows"

"${report[@]}" || failed="${failed}report.py: exit $?"$'\n'
[ -z "$failed" ] && exit 0
printf 'run_all.sh: failed, start it again to retry:\n%s' "$failed" >&2
exit 1
