#!/usr/bin/env bash
# Runs what a GPU is needed for: tests, speed, memory and roofline. The limits of all parts sum to less than ten minutes.
#
#   benchmarks/gpu.sh                            rows go to benchmarks/results
#   OUT=folder PARTS="tests roofline" TESTS="tests/test_triton.py" WORKERS=1 PYTHON=python3 benchmarks/gpu.sh
#   DEVICE=cpu OUT=folder benchmarks/gpu.sh      tiny sizes, to try the script
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
device="${DEVICE:-cuda}" out="${OUT:-benchmarks/results}" parts=" ${PARTS:-tests speed memory roofline} "
read -ra tests <<< "${TESTS:-tests}"

python="${PYTHON:-python}"
"$python" - "$device" <<'END' || exit 2
import sys, torch
if sys.argv[1] != "cpu" and not torch.cuda.is_available():
    sys.exit("benchmarks/gpu.sh: torch finds no GPU; DEVICE=cpu tries the script at tiny sizes")
END

speed=() memory=() roofline=()
if [ "$device" = cpu ]; then
    speed=(--cases dense --sweep steps --sizes 2 --rounds 2 --libraries snntorch)
    memory=(--cases dense --steps 2 --methods "ulr auto" --repeats 1)
    roofline=(--tiny --cases dense)
else
    speed=(--rounds 5)
    memory=(--steps 500 --methods "ulr auto" "ulr replay" "snntorch BPTT" --repeats 1)
fi

mkdir -p "$out"
failed=0 summary=()
part() {  # part NAME SECONDS COMMAND...: runs a command with a time limit, and keeps its output
    local name="$1" limit="$2" start=$SECONDS code
    shift 2
    [[ "$parts" == *" $name "* ]] || return
    echo "== $name: $*"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$out/gpu_$name.log"
    code=${PIPESTATUS[0]}
    [ "$code" = 0 ] || failed=1
    case "$code" in
        0) code="ok" ;;
        124 | 137) code="stopped after $limit s" ;;
        *) code="failed with exit code $code" ;;
    esac
    summary+=("$name: $code, $((SECONDS - start)) s; $(tail -n 1 "$out/gpu_$name.log")")
}

part tests 210 "$python" -m pytest -q -n "${WORKERS:-4}" --dist worksteal -m "gpu and not slow" "${tests[@]}"
part speed 150 "$python" -m benchmarks.speed --device "$device" --results "$out" "${speed[@]}"
part memory 120 "$python" -m benchmarks.memory --device "$device" --results "$out" "${memory[@]}"
part roofline 60 "$python" -m benchmarks.roofline --device "$device" --results "$out" ${roofline[@]+"${roofline[@]}"}

echo "== summary: rows and logs are in $out"
printf '%s\n' "${summary[@]}"
exit "$failed"
