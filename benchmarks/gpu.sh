#!/usr/bin/env bash
# Everything worth doing on a machine with a GPU that nobody has seen before: correctness first, then studies and
# measurements; without network, nothing installed. Made for calls of at most ten minutes: what one leaves undone,
# the next does.
#
#   bash benchmarks/gpu.sh                            all parts that are not done yet
#   bash benchmarks/gpu.sh e2e-int4 energy-int4       these alone, done or not
#   bash benchmarks/gpu.sh --list                     the parts, and about how many seconds each takes
#   bash benchmarks/gpu.sh --prepare 90               where nvcc is and no GPU need be: builds the library for all
#                                                     architectures, compiles Triton's kernels for these (90), packs them
#   DEVICE=cpu PRESET=tiny bash benchmarks/gpu.sh     a rehearsal without a GPU, in some minutes
#
# PYTHON   interpreter [python3]                    PRESET  dimensions, random weights [7b]
# OUT      folder for results [benchmarks/results]  LIMIT   seconds of this call [540]
# EARLIER  folder with the results of an earlier    SKIP    parts to leave out, such as "native tests-model"
#          call, where that is another one [OUT]    FORCE   1: parts that are done run again
#
# The order is: the library, tests of the kernels and of the model, what the persistent engine's cost model is
# calibrated by (exchanges, bandwidths, both at once), what no GPU has run yet, first of it the engine itself,
# measurements by what they are worth. A part begins where the seconds that it takes are still left, and is ended
# after three times as many.
# Its records are written as they are made: what is cut off loses one part. In OUT are, for a call on a card NAME:
#
#   DATE-NAME-N.jsonl    records of the N-th call          DATE-NAME-N.log    what everything printed
#   gpu-done.txt         parts that are done               kernels-*.tar.gz   Triton's cache
#   performance.md       the report of OUT, where matplotlib is installed
#
# It ends with the figures that README quotes. What an earlier call has done, and its cache or that of --prepare, are
# taken from EARLIER: its parts are not done again, its kernels not compiled again.
# Triton's cache is /tmp/mimo-fast-triton on every machine (TRITON_CACHE_DIR), since its entries hold absolute paths.
# The exit code is 1 if a part failed, and the last line names it; 2 for bad usage.
set -uo pipefail
usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; }
list_only=0 prepare=0 chosen=()
for argument; do
    case $argument in
    -h | --help) usage && exit 0 ;;
    --list) list_only=1 ;;
    --prepare) prepare=1 ;;
    -*) echo "gpu.sh: no option $argument; see --help" >&2 && exit 2 ;;
    *) chosen+=("$argument") ;;
    esac
done
cd "$(dirname "$0")/.." || exit 2

python=${PYTHON:-python3} device=${DEVICE:-cuda} preset=${PRESET:-7b} limit=${LIMIT:-540} skip=" ${SKIP:-} "
out=${OUT:-benchmarks/results} force=${FORCE:-0}
earlier=${EARLIER:-$out}
# NAME:SECONDS of benchmarks/studies: what no GPU has run, or not in its present form, and the others.
new_studies=(turns:100 row_tiles:70 gemm:45) studies=(overlap:90 products:80)
export PYTHONPATH=. PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/mimo-fast-triton}
unset MIMO_FAST_KERNELS MIMO_FAST_NO_GRAPH

failed=() left=() known=() new=

report() { printf '%-18s %s\n' "$1" "$2"; }

# wanted NAME SECONDS: whether a part runs in this call; says why not.
wanted() {
    known+=("$1")
    if ((list_only)); then report "$1" "about $2 s${new:+, no GPU has run it}"; return 1; fi
    if ((${#chosen[@]})); then [[ " ${chosen[*]} " == *" $1 "* ]]; return; fi
    if [[ $skip == *" $1 "* ]]; then report "$1" "skipped: SKIP names it"; return 1; fi
    if [[ $force != 1 ]] && done_before=$(grep "^$1 " "$done_list" 2>/dev/null | tail -n 1); then
        report "$1" "skipped: done before, ${done_before#* }"
        return 1
    fi
}

# part NAME SECONDS COMMAND...: runs it where about so many seconds are left.
part() {
    local title=$1 about=$2 began=$SECONDS code before spent room=$((limit - SECONDS))
    shift 2
    wanted "$title" "$about" || return 0
    if ((room < about)); then
        report "$title" "left for the next call: it takes about $about s, $((room > 0 ? room : 0)) s are left"
        left+=("$title")
        return 0
    fi
    echo "== $title: $*" >>"$log"
    before=$(wc -l <"$log")
    timeout --foreground -k 5 $((3 * about < room ? 3 * about : room)) "$@" >>"$log" 2>&1
    code=$? spent=$((SECONDS - began))
    if ((code == 0)); then
        report "$title" "ok, $spent s$([[ -z $new || $device != cuda ]] || echo ", the first time on a GPU")"
        echo "$title on $name in $spent s, $(date -u +%FT%TZ)" >>"$done_list"
        return 0
    fi
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
    if [[ $device == cuda ]]; then part "$@"; else wanted "$1" "$2" && report "$1" "skipped: needs a CUDA device"; fi
}

# bench NAME SECONDS COMMAND OPTIONS...: of python -m benchmarks.
bench() {
    local title=$1 about=$2 command=$3
    shift 3
    part "$title" "$about" "$python" -m benchmarks "$command" --device "$device" -o "$records" "$@"
}
gpu_bench() { if [[ $device == cuda ]]; then bench "$@"; else gpu_part "$1" "$2"; fi; }

native() {
    local why=
    if ((list_only)); then wanted native 60; return; fi
    "$python" - 2>>"$log" <<'PY' && why="is built already"
import shutil, sys
from mimo_fast import _native
from mimo_fast.kernels.cuda import library as cuda
sys.exit(cuda.library() is None and shutil.which("nvcc") is not None)
PY
    [[ -z $why ]] && ! command -v "${CXX:-g++}" >/dev/null && why="no C++ compiler is installed"
    [[ -z $why ]] && ! "$python" -c 'import setuptools' 2>>"$log" && why="setuptools is not installed"
    [[ -z $why ]] && ! "$python" -c 'import pybind11' 2>>"$log" && why="pybind11 is not installed"
    if [[ -n $why ]]; then wanted native 60 && report native "skipped: $why"; return; fi
    # A build that fails is only a warning to setuptools: what counts is whether it can be imported.
    part native 60 bash -c '"$0" setup.py build_ext --inplace && "$0" -c "from mimo_fast import _native"' "$python"
}

# study NAME SECONDS [PART OPTIONS...]: benchmarks/studies/NAME.py, where there is one, as the part study-NAME or PART;
# its JSON becomes a record.
study() {
    local runs=gpu_part title=${3:-study-$1} options=("${@:4}")
    local found=$scratch/$title.json
    [[ -e benchmarks/studies/$1.py ]] || return 0
    [[ $1 != turns ]] || runs=part options=("${turned[@]}")
    "$runs" "$title" "$2" "$python" -m "benchmarks.studies.$1" --out "$found" "${options[@]}"
    # What it wrote before it was ended counts as well.
    [[ ! -e $found ]] || "$python" -m benchmarks.records "$1" "$found" "$records" >>"$log" 2>&1
}

pack() { "$python" -m benchmarks.kernel_cache pack "$out" >>"$log" 2>&1; }

begin() {
    if ! name=$("$python" - "$device" <<'PY'
import re, sys
import torch
cuda = sys.argv[1] == "cuda"
if cuda and not torch.cuda.is_available():
    sys.exit("no CUDA device here; DEVICE=cpu PRESET=tiny rehearses without one")
found = torch.cuda.get_device_name() if cuda else "cpu"
print(re.sub("[^a-z0-9]+", "-", found.lower()).strip("-"))
PY
    ); then exit 2; fi
    mkdir -p "$out" "$TRITON_CACHE_DIR" && scratch=$(mktemp -d) || exit 2
    local call=1 stem
    done_list=$out/gpu-done.txt
    [[ -e $earlier/gpu-done.txt && ! $earlier -ef $out ]] && cp "$earlier/gpu-done.txt" "$done_list"
    [[ -e $done_list ]] && call=$(($(grep -c '^call ' "$done_list") + 1))
    echo "call $call on $name, $(date -u +%FT%TZ)" >>"$done_list"
    stem=$out/$(date +%F)-$name-$call
    records=$stem.jsonl log=$stem.log
    : >"$log"
    trap 'rm -rf "$scratch"' EXIT
    trap 'pack; echo "interrupted: what was measured is in $out"; exit 130' INT TERM
    "$python" -m benchmarks.kernel_cache unpack "$earlier" >>"$log" 2>&1
}
if ((prepare)); then
    # The library holds code for all architectures; only the Triton kernels are compiled for those named.
    mkdir -p "$out" "$TRITON_CACHE_DIR" || exit 2
    stop() { echo "gpu.sh: $1" >&2 && exit 1; }
    "$python" setup.py build_ext --inplace || stop "the library was not built"
    "$python" -m benchmarks.studies.engine --build || stop "the engine's microbenchmarks were not built"
    "$python" -m benchmarks.kernel_cache compile "${chosen[@]:-90}" || stop "Triton's kernels were not compiled"
    "$python" -m benchmarks.kernel_cache pack "$out" || stop "Triton's kernels were not packed"
    echo "prepared: mimo_fast/libmimo_fast_cuda.so, benchmarks/studies/libmicro.so and $out/kernels-*.tar.gz;" \
        "bring all, and give EARLIER=$out"
    exit 0
fi
if ((!list_only)); then begin; else records= scratch= log=/dev/null; fi

if [[ $device == cuda ]]; then
    products=(--format '[di]*' --m 1 4 16 64 --seconds 0.1 --provider ours-gpu --provider eager --provider linear
        --provider torch-int4-cuda --provider 'bitsandbytes-*')
    others=(--quick --provider ours-gpu --provider linear --provider 'bitsandbytes-*')
    reply=(--words 6 --patches 15 --limit 30)
    sweep=(--batch 1 4 16 --context 256 2048 8192 --groups 12 --task "${reply[@]}")
    wide=(--batch 64 --context 256 2048 --groups 12 --task "${reply[@]}")
    asked=(--batch 1 4 16 64 --prompt 32 128 512 2048 --context --task tts "${reply[@]}")
    tasks=(--batch 1 4 16 --context "${reply[@]}")
    drawn=(--batch 1 16 64 --context --task tts --words 10 --patches 150 --limit 30)
    said=(--words 6 --patches 12) profiled=(--context 1024) turned=(--preset "$preset")
else
    products=(--format 'int8' --op patch_decoder.out --m 1 --seconds 0.05 --provider ours-cpu)
    others=(--quick --op 'patch_decoder.rms_norm' --provider ours-cpu --provider eager)
    reply=(--words 2 --patches 3 --seconds 0.5 --limit 30 --dtype float32)
    sweep=(--batch 1 2 --context 32 --groups 2 --task "${reply[@]}")
    wide=(--batch 4 --context 24 --groups 2 --task "${reply[@]}")
    asked=(--batch 1 2 --prompt 8 40 --context --task tts "${reply[@]}")
    tasks=(--batch 1 --context "${reply[@]}")
    drawn=(--batch 1 --context --task tts "${reply[@]}")
    said=(--words 2 --patches 3 --dtype float32) profiled=(--context 24 --groups 2 --dtype float32)
    turned=(--preset "$preset" --device cpu --dtype float32 --quantization bf16 --capacity 64 --part encode turn)
fi
tests=(-p no:cacheprovider -v --durations 10)
((list_only)) || tests+=($("$python" -c 'import xdist' 2>>"$log" && echo "-n auto"))
# Tests of a GPU are marked, or take the device that conftest.py gives.
model_tests=()
for path in $(grep -lE '@pytest\.mark\.gpu|device: torch\.device' tests --include 'test_*.py' -r); do
    [[ $path == */test_gpu_kernels.py ]] || model_tests+=("$path")
done
model=(--preset "$preset")

native
gpu_part tests-kernels 90 "$python" -m pytest -m gpu tests/kernels/test_gpu_kernels.py "${tests[@]}"
gpu_part tests-model 90 "$python" -m pytest -m gpu "${model_tests[@]}" "${tests[@]}"
# Most kernels are compiled by now; a call that is cut off keeps them.
((list_only)) || pack
study engine 75 engine-micro --parts exchange stream phases
new=1
study engine 90 study-engine --parts engine-int8 engine-int4
for study in "${new_studies[@]}"; do study "${study%:*}" "${study#*:}"; done
new=
# What this card measured beside the model's predictions, in the log.
gpu_part engine-costs 10 "$python" -m benchmarks engine --calibration "$records"
bench profile-int4 25 profile "${model[@]}" --quantization int4 "${profiled[@]}"
bench e2e-int4 55 e2e "${model[@]}" --quantization int4 "${sweep[@]}"
bench requests-int4 75 e2e "${model[@]}" --quantization int4 "${asked[@]}"
bench ops-products 90 ops "${products[@]}"
bench baseline-eager 40 baselines "${model[@]}" --baseline eager "${said[@]}"
gpu_bench baseline-compiled 60 baselines "${model[@]}" --baseline compiled "${said[@]}"
bench energy-int4 40 e2e "${model[@]}" --quantization int4 "${drawn[@]}"
bench tasks-int4 40 e2e "${model[@]}" --quantization int4 "${tasks[@]}"
bench e2e-wide 20 e2e "${model[@]}" --quantization int4 "${wide[@]}"
gpu_bench e2e-int8-bf16 60 e2e "${model[@]}" --quantization int8 bf16 "${sweep[@]}"
gpu_bench tasks-int8-bf16 60 e2e "${model[@]}" --quantization int8 bf16 "${tasks[@]}"
gpu_bench profile-bf16 20 profile "${model[@]}" --quantization bf16 "${profiled[@]}"
for study in "${studies[@]}"; do study "${study%:*}" "${study#*:}"; done
bench ops-others 30 ops "${others[@]}"

for name in "${chosen[@]}"; do
    [[ " ${known[*]} " == *" $name "* ]] || { echo "gpu.sh: no part $name; see --list" >&2 && exit 2; }
done
((list_only)) && exit 0
pack
if "$python" -c 'import matplotlib' 2>>"$log"; then
    "$python" -m benchmarks report --results "$out" -o "$out/performance.md" >>"$log" 2>&1
fi
"$python" -m benchmarks report --figures --results "$out" 2>>"$log" | tee -a "$log" | sed '/./s/^/    /'
echo "results and log: ${records%.jsonl}.*"
if ((${#left[@]})); then echo "left for the next call: ${left[*]}"; fi
if ((${#failed[@]})); then
    echo "FAILED after $SECONDS s: ${failed[*]}"
    exit 1
fi
echo "all is well after $SECONDS s"
