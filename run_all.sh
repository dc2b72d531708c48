#!/usr/bin/env bash
# Trains every row of the report's Tables 4-7, one after the other, then prints them.
#
#   bash run_all.sh                    Tables 4, 5, 6 and 7: 12 runs
#   bash run_all.sh 5 7                only these tables
#   bash run_all.sh extended           the 64,000-iteration run
#   bash run_all.sh --shorten 10       each run at a tenth (1/N, N divides 1000) of its length
#   bash run_all.sh --list [TABLE...]  print the commands of the runs, train nothing
#   bash run_all.sh 4 -- --seed 1      what follows -- goes to every train.py
#
# Stop it with Ctrl-C and start it again: it skips what is complete and continues the rest. Paths
# are relative to its folder. Exit: 0 all trained, 1 a row failed, 2 a bad flag, 127 no PyTorch.

# The rows, with the report's accuracy in percent; report.py reads them from here.
rows='
# table    accuracy  optimizer  lr0  bs   step   iters
4          60.47      adam       0.1  64   5000   32000
4          88.51      sgd        0.1  64   5000   32000
4          84.90      adagrad    0.1  64   5000   32000
4          88.95      asgd       0.1  64   5000   32000
5          88.51      sgd        0.1  64   5000   32000
5          89.31      sgd        0.3  64   5000   32000
5          87.70      sgd        0.5  64   5000   32000
6          84.96      sgd        0.3  32   5000   32000
6          89.31      sgd        0.3  64   5000   32000
6          91.07      sgd        0.3  128  5000   32000
6          90.40      sgd        0.3  256  5000   32000
7          89.83      sgd        0.3  128  4000   32000
7          91.07      sgd        0.3  128  5000   32000
7          92.65      sgd        0.3  128  8000   32000
7          92.14      sgd        0.3  128  10000  32000
extended   93.18      sgd        0.3  128  10000  64000
'
[ "$BASH_VERSION" ] || exec bash "$0" "$@"  # started as `sh run_all.sh`
cd "$(dirname "$0")" || exit 1

fail() { echo "run_all.sh: $2" >&2; exit "$1"; }

tables='' list='' n=1 more=''
while [ $# -gt 0 ]; do
  case $1 in
    4 | 5 | 6 | 7 | extended) tables="$tables $1" ;;
    --list) list=yes ;;
    --shorten) n=${2:-0}; [ $# -gt 1 ] && shift ;;
    --help | -h) sed -n '2,/^$/s/^# \{0,1\}//p' run_all.sh; exit ;;
    --) shift; break ;;
    *) n=0 ;;
  esac
  [[ $n =~ ^[1-9][0-9]{0,3}$ && $((1000 % n)) = 0 ]] ||
    fail 2 "cannot use '$1' (--help): N divides 1000; flags of train.py follow --: -- --seed 1"
  shift
done
# The lines of the log are closer, too, but one is at each hundredth iteration, for report.py.
for every in 100 50 25 20 10 5 4 2 1; do [ $((every * n)) -le 100 ] && break; done
[ $# = 0 ] || more=$(printf ' %q' "$@")

runs=$(while read -r table accuracy optimizer lr bs step iters; do
  [[ " ${tables:-4 5 6 7} " == *" $table "* && $iters ]] || continue
  flags="--optimizer $optimizer --lr $lr --bs $bs --step $((step / n)) --iters $((iters / n))"
  echo "python train.py $flags --log-every $every$more"
done <<< "$rows" | awk '!seen[$0]++')  # a row that tables share is one run

[ -z "$list" ] || { echo "$runs"; exit; }

python -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("torch"))' 2> /dev/null ||
  fail 127 "no python with PyTorch here; activate the environment (source .venv/bin/activate)"

i=0 total=$(grep -c . <<< "$runs") failed=''
while read -r -u 3 run; do  # not from stdin, which is train.py's
  echo "== Run $((++i)) of $total, $((SECONDS / 60)) min so far"
  eval "$run"
  status=$?
  [ $status != 2 ] || exit 2  # a bad flag: every row would fail alike
  [ $status = 0 ] || failed="${failed}run_all.sh: failed, exit $status: $run"$'\n'
done 3<<< "$runs"

# The folder to which they wrote: the last --logs, if there is one.
logs=$(printf '%s\n' --logs=logs "$@" | sed -n 's/^--logs=//p; /^--logs$/{n;p;}' | tail -n 1)
python report.py --logs "$logs" || failed="${failed}run_all.sh: report.py failed"$'\n'
printf '%s' "$failed" >&2
[ -z "$failed" ]
