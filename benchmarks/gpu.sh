#!/usr/bin/env bash
# Everything worth doing on a machine with a GPU, in one go: under nine minutes, without network, nothing installed.
# Tests run side by side where pytest-xdist is there: most of their time is the compilation of kernels.
#
#   bash benchmarks/gpu.sh
#   DEVICE=cpu PRESET=tiny bash benchmarks/gpu.sh     a rehearsal without a GPU, in a minute or two
#
# PYTHON  interpreter [python3]                     OUT    folder for results [benchmarks/results]
# PRESET  dimensions, random weights [7b]           LIMIT  seconds in all [530]
# SKIP    parts to leave out, such as "native"
#
# A part has a share of the time, and what those before it have left. One that fails or runs out of time keeps what it
# has measured and the next begins; the last line names it and the exit code is 1.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

python=${PYTHON:-python3} device=${DEVICE:-cuda} preset=${PRESET:-7b} limit=${LIMIT:-530} skip=" ${SKIP:-} "
out=${OUT:-benchmarks/results}
least=10 # seconds in which nothing can be measured
export PYTHONPATH=. PYTHONUNBUFFERED=1
unset MIMO_FAST_KERNELS MIMO_FAST_NO_GRAPH

if ! name=$("$python" - "$device" <<'EOF'
import re, sys
import torch
cuda = sys.argv[1] == "cuda"
if cuda and not torch.cuda.is_available():
    sys.exit("no CUDA device here; DEVICE=cpu PRESET=tiny rehearses without one")
found = torch.cuda.get_device_name() if cuda else "cpu"
print(re.sub("[^a-z0-9]+", "-", found.lower()).strip("-"))
EOF
); then exit 2; fi
mkdir -p "$out" || exit 2
stem=$out/$(date +%F)-$name
log=$stem-gpu.log
: >"$log"
failed=() shares=0
trap 'echo "interrupted: what was measured is in $out"; exit 130' INT

report() { printf '%-18s %s\n' "$1" "$2"; }

# pass NAME SHARE WHY: skips a part, which leaves its share to the next.
pass() {
    shares=$((shares + $2))
    report "$1" "skipped: $3"
}

# part NAME SHARE COMMAND...
part() {
    local title=$1 began=$SECONDS code
    shares=$((shares + $2))
    local room=$(((shares < limit ? shares : limit) - SECONDS))
    shift 2
    if [[ $skip == *" $title "* ]]; then report "$title" "skipped: SKIP names it"; return; fi
    if ((room < least)); then report "$title" "skipped: no time left"; return; fi
    echo "== $title: $*" >>"$log"
    local before
    before=$(wc -l <"$log")
    timeout --foreground -k 5 "$room" "$@" >>"$log" 2>&1
    code=$?
    local spent=$((SECONDS - began))
    if ((code == 0)); then report "$title" "ok, $spent s"; return; fi
    failed+=("$title")
    if ((code == 124 || code == 137)); then
        report "$title" "FAILED: out of time, $spent s"
    else
        report "$title" "FAILED: exit code $code, $spent s"
    fi
    tail -n +"$((before + 1))" "$log" | tr '\r' '\n' | tail -n 12 | cut -c -300 | sed 's/^/    /'
}

# For what needs a GPU.
gpu_part() {
    if [[ $device == cuda ]]; then part "$@"; else pass "$1" "$2" "needs a CUDA device"; fi
}

bench() { local title=$1 share=$2; shift 2; part "$title" "$share" "$python" -m benchmarks "$@"; }

native() {
    local why=
    "$python" - 2>>"$log" <<'EOF' && why="is built already"
import shutil, sys
from mimo_fast import _native
from mimo_fast.kernels import cuda
sys.exit(cuda.library() is None and shutil.which("nvcc") is not None)
EOF
    [[ -z $why ]] && ! command -v "${CXX:-g++}" >/dev/null && why="no C++ compiler is installed"
    [[ -z $why ]] && ! "$python" -c 'import setuptools' 2>>"$log" && why="setuptools is not installed"
    [[ -z $why ]] && ! "$python" -c 'import pybind11' 2>>"$log" && why="pybind11 is not installed"
    if [[ -n $why ]]; then pass native 60 "$why"; return; fi
    # A build that fails is only a warning to setuptools: what counts is whether it can be imported.
    part native 60 bash -c '"$0" setup.py build_ext --inplace && "$0" -c "from mimo_fast import _native"' "$python"
}

if [[ $device == cuda ]]; then
    products=(--format '[di]*' --m 1 4 16 --seconds 0.1 --provider ours-gpu --provider eager --provider linear
        --provider torch-int4-cuda --provider 'bitsandbytes-*')
    others=(--quick --provider ours-gpu --provider linear --provider 'bitsandbytes-*')
    sweep=(--batch 1 4 16 --context 256 2048 8192 --groups 12 --words 6 --patches 15 --limit 30)
    wide=(--batch 64 --context 256 2048 --groups 12 --words 6 --patches 15 --limit 30)
    said=(--words 6 --patches 12) profiled=(--context 1024)
else
    products=(--format 'int8' --op patch_decoder.out --m 1 --seconds 0.05 --provider ours-cpu)
    others=(--quick --op 'patch_decoder.rms_norm' --provider ours-cpu --provider eager)
    sweep=(--batch 1 2 --context 32 --groups 2 --words 2 --patches 3 --seconds 0.5 --limit 30 --dtype float32)
    wide=(--batch 4 --context 24 --groups 2 --task tts --words 2 --patches 3 --seconds 0.5 --limit 30 --dtype float32)
    said=(--words 2 --patches 3 --dtype float32) profiled=(--context 24 --groups 2 --dtype float32)
fi
where=(--device "$device")

native
gpu_part tests 150 "$python" -m pytest -m gpu tests/test_gpu.py tests/test_gpu_kernels.py \
    -p no:cacheprovider -v --durations 10 $("$python" -c 'import xdist' 2>>"$log" && echo "-n auto")
bench ops-products 75 ops "${where[@]}" "${products[@]}" -o "$stem-ops.jsonl"
bench e2e-int4 55 e2e "${where[@]}" --preset "$preset" --quantization int4 "${sweep[@]}" -o "$stem-e2e.jsonl"
bench profile-int4 25 profile "${where[@]}" --preset "$preset" "${profiled[@]}" -o "$stem-profile.jsonl"
bench baseline-eager 40 baselines "${where[@]}" --preset "$preset" --baseline eager "${said[@]}" \
    -o "$stem-baselines.jsonl"
bench ops-others 30 ops "${where[@]}" "${others[@]}" -o "$stem-ops.jsonl"
gpu_part e2e-int8-bf16 55 "$python" -m benchmarks e2e "${where[@]}" --preset "$preset" --quantization int8 bf16 \
    "${sweep[@]}" -o "$stem-e2e.jsonl"
gpu_part profile-bf16 20 "$python" -m benchmarks profile "${where[@]}" --preset "$preset" --quantization bf16 \
    "${profiled[@]}" -o "$stem-profile.jsonl"
gpu_part baseline-compiled 20 "$python" -m benchmarks baselines "${where[@]}" --preset "$preset" --baseline compiled \
    "${said[@]}" -o "$stem-baselines.jsonl"
bench e2e-wide 15 e2e "${where[@]}" --preset "$preset" --quantization int4 "${wide[@]}" -o "$stem-e2e.jsonl"

echo "results and log: $stem-*"
if ((${#failed[@]})); then
    echo "FAILED after $SECONDS s: ${failed[*]}"
    exit 1
fi
echo "all is well after $SECONDS s"
