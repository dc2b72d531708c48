#!/usr/bin/env bash
# Trains every row of the report's Tables 4-7, one after the other, then prints them.
#
#   bash run_all.sh                        Tables 4, 5, 6 and 7: 12 runs
#   bash run_all.sh 5 7                    only these tables
#   bash run_all.sh extended               the 64,000-iteration run
#   bash run_all.sh --shorten 10           every run at a tenth of its iterations and decay step
#   bash run_all.sh --list [TABLE...]      print the commands of the runs, train nothing
#   bash run_all.sh 4 -- --seed 1          what follows -- goes to every train.py
#
# Stop it however you like and start it again: it skips what is complete and continues the rest.
# Paths are relative to this script's folder. Exit: 0 all trained, 1 a row failed, 2 usage.

# The rows; report.py reads them from here.
rows='
# table    accuracy  optimizer  lr   bs   step   iters
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

tables='' list='' n=1
while [ $# -gt 0 ]; do
  case $1 in
    4 | 5 | 6 | 7 | extended) tables="$tables $1" ;;
    --list) list=yes ;;
    --shorten) n=${2:-0}; [ $# -gt 1 ] && shift ;;
    --help | -h) sed -n '2,/^$/s/^# \{0,1\}//p' run_all.sh; exit ;;
    --) shift; break ;;
    *) n=0 ;;
  esac
  [[ $n =~ ^[1-9][0-9]{0,3}$ && $((1000 % n)) = 0 ]] || {
    echo "run_all.sh: '$1'? usage: bash run_all.sh [4|5|6|7|extended ...] [--list]" \
      "[--shorten N, a divisor of 1000] [-- FLAGS of train.py]" >&2
    exit 2; }
  shift
done

runs=() titles=() images=() todo=0  # of each run; one that tables share stands here once
while read -r table accuracy optimizer lr bs step iters; do
  [[ " ${tables:-4 5 6 7} " == *" $table "* && $iters ]] || continue
  flags="--optimizer $optimizer --lr $lr --bs $bs --step $((step / n)) --iters $((iters / n))"
  [ "$n" = 1 ] || flags="$flags --log-every $(((n + 99) / n))"
  for i in "${!runs[@]}"; do
    [ "${runs[i]}" != "$flags" ] || { titles[i]="${titles[i]} and Table $table"; continue 2; }
  done
  runs+=("$flags") titles+=("Report $accuracy % in Table $table") images+=($((bs * iters)))
  todo=$((todo + bs * iters))
done <<< "$rows"

if [ "$list" ]; then
  for flags in "${runs[@]}"; do
    echo "python train.py $flags$([ $# -eq 0 ] || printf ' %q' "$@")"
  done
  exit
fi

# In the background, as bash heeds a signal to itself only between commands or in `wait`.
trap 'kill $! 2> /dev/null; exit 130' INT
trap 'kill $! 2> /dev/null; exit 143' TERM
failed='' left='' trained=0 spent=0  # complete runs take a few seconds, and do not count
for i in "${!runs[@]}"; do
  [ $trained = 0 ] || left=", perhaps $((spent * todo / trained / 60)) min left"
  began=$SECONDS
  echo "== $((i + 1)) of ${#runs[@]}, $((SECONDS / 60)) min so far$left. ${titles[i]}: ${runs[i]}"
  read -r -a flags <<< "${runs[i]}"
  python train.py "${flags[@]}" "$@" &
  wait $!
  status=$? took=$((SECONDS - began))
  [ $took -lt 10 ] || spent=$((spent + took)) trained=$((trained + images[i]))
  todo=$((todo - images[i]))
  case $status in
    0) ;;
    2 | 127) exit $status ;;  # a bad flag or no python: every row would fail alike
    *) failed="${failed}run_all.sh: failed, exit $status: ${runs[i]}"$'\n' ;;
  esac
done

report=(python report.py)  # it looks where train.py wrote
for ((i = 1; i <= $#; i++)); do
  case ${!i} in
    --logs) report+=(--logs "${@:i+1:1}") ;;
    --logs=*) report+=("${!i}") ;;
  esac
done
"${report[@]}" || failed="${failed}run_all.sh: report.py failed"$'\n'
printf '%s' "$failed" >&2
[ -z "$failed" ]
