#!/usr/bin/env bash
# Trains every row of the report's Tables 4-7, one after the other, then prints the results.
#
#   bash run_all.sh                    Tables 4, 5, 6 and 7: 12 different runs
#   bash run_all.sh 5 extended         only these tables; extended is the 64,000-iteration run
#   bash run_all.sh --list [TABLE...]  print the commands of the runs, train nothing
#   bash run_all.sh 4 -- --seed 1      what follows -- goes to every train.py
#
# Stopped and started again, it skips what is complete and continues the rest.
[ "$BASH_VERSION" ] || exec bash "$0" "$@"  # started as `sh run_all.sh`
die() { echo "run_all.sh: $2" >&2; exit "$1"; }
cd "$(dirname "$(readlink -f "$0")")" || exit  # through a link, too
[ -f train.py ] || cd "$OLDPWD" || exit  # a scheduler's copy
[ -f train.py ] || die 4 "no train.py beside it or here: start it in the folder of train.py"

list='' tables='' logs=logs seen=';' failed=()
while [ $# -gt 0 ]; do
  case $1 in
    [4-7] | extended) tables+=" $1" ;;
    --list) list=yes ;;
    --) shift; break ;;
    -*) die 2 "$1 is not its flag; flags of train.py follow --, as in: bash run_all.sh -- $*" ;;
    *) die 2 "no table $1: there are 4, 5, 6, 7 and extended" ;;
  esac
  shift
done
tables=" ${tables:-4 5 6 7} " flags=("$@")
while [ $# -gt 0 ]; do  # report.py reads where the runs write
  case $1 in --logs) logs=$2 ;; --logs=*) logs=${1#*=} ;; esac
  shift
done
[ "$list" ] || python -c 'import torch' 2> /dev/null ||
  die 4 "python cannot import torch: activate the environment (source .venv/bin/activate)"
trap 'kill $! 2> /dev/null; wait; die 130 "stopped; the same command continues"' INT TERM HUP

row() {  # table, the report's accuracy in percent, flags of train.py
  [[ $tables == *" $1 "* && $seen != *";${*:3};"* ]] || return  # tables share rows
  seen+="${*:3};"
  local run=(python train.py "${@:3}" "${flags[@]}") status
  printf '%q ' "${run[@]}" && echo
  [ -z "$list" ] || return
  "${run[@]}" & wait $!  # a signal would wait for a run in the foreground
  status=$?
  case $status in
    0 | 5) ;;  # 5: another process trains it
    2 | 4) exit $status ;;  # flags, data, disk or device: all others would fail alike
    *) failed+=("${run[*]}") ;;
  esac
}

row 4        60.47  --optimizer adam    --lr 0.1 --bs 64  --step 5000
row 4        88.51  --optimizer sgd     --lr 0.1 --bs 64  --step 5000
row 4        84.90  --optimizer adagrad --lr 0.1 --bs 64  --step 5000
row 4        88.95  --optimizer asgd    --lr 0.1 --bs 64  --step 5000
row 5        88.51  --optimizer sgd     --lr 0.1 --bs 64  --step 5000
row 5        89.31  --optimizer sgd     --lr 0.3 --bs 64  --step 5000
row 5        87.70  --optimizer sgd     --lr 0.5 --bs 64  --step 5000
row 6        84.96  --optimizer sgd     --lr 0.3 --bs 32  --step 5000
row 6        89.31  --optimizer sgd     --lr 0.3 --bs 64  --step 5000
row 6        91.07  --optimizer sgd     --lr 0.3 --bs 128 --step 5000
row 6        90.40  --optimizer sgd     --lr 0.3 --bs 256 --step 5000
row 7        89.83  --optimizer sgd     --lr 0.3 --bs 128 --step 4000
row 7        91.07  --optimizer sgd     --lr 0.3 --bs 128 --step 5000
row 7        92.65  --optimizer sgd     --lr 0.3 --bs 128 --step 8000
row 7        92.14  --optimizer sgd     --lr 0.3 --bs 128 --step 10000
row extended 93.18  --optimizer sgd     --lr 0.3 --bs 128 --step 10000 --iters 64000

[ -z "$list" ] || exit 0
python report.py --logs "$logs" || failed+=("python report.py")
[ ${#failed[@]} = 0 ] || die 1 "failed:$(printf '\n  %s' "${failed[@]}")"
