#!/usr/bin/env bash
# Everything that needs a GPU, in parts that do not need each other, the most telling ones first.
#
#   bench/gpu.sh                        all parts, as far as ten minutes go
#   bench/gpu.sh warm peers             some of them; what bench/results/gpu.json holds from other runs stays in it
#   bench/gpu.sh --rehearse [parts]     the same on a CPU with tiny shapes: does every part run?
#
# In four calls of four minutes:        bench/gpu.sh build tests sanitizer kernels training
#                                       bench/gpu.sh build warm peers
#                                       bench/gpu.sh build calls absorbed decode gather profile
#                                       bench/gpu.sh build model search autotune tuning
#
# Seconds on an H100 with 16 cores: build 20, tests 55, warm 50, sanitizer 50, kernels 50, training 50, calls 80 and more,
# absorbed 60 and more, decode 27, gather 15, profile 40; peers are as long as they may be.
#
# Needs no network: the extension is built in place, packages are those at hand. OUT (default bench/results) gets the rows,
# goals.md and log.txt, renewed after every part. LIMIT is the time for all parts in seconds; each has its own limit
# too, and one that fails or runs over costs nothing but itself: it is named at the end, and the exit status is 1.
# FAISS_ARCHIVE names a .tar.xz with a GPU build of faiss, RESULT another file of rows: bench/results/gpu_h200.json is an H200's,
# bench/results/gpu.json, which is what it is by itself, an H100's.
set -uo pipefail
cd "$(dirname "$0")/.."

ALL="build warm static tests calls kernels absorbed decode gather peers autotune model training search sanitizer profile tuning"
REHEARSE=
[ "${1:-}" = --rehearse ] && { REHEARSE=1; shift; }
PARTS="${*:-$ALL}"
PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-570}
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
if [ -n "$REHEARSE" ]; then OUT=${OUT:-$WORK/out}; RESULT=$WORK/gpu.json; else OUT=${OUT:-bench/results}; RESULT=${RESULT:-bench/results/gpu.json}; fi
mkdir -p "$OUT" bench/results
SITE=$WORK/site SCRATCH=$WORK/extension
export PYTHONUNBUFFERED=1 PYTHONPATH="$SITE:$PWD${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false
[ -n "$REHEARSE" ] && export RETRO_BENCH_TINY=1
started=$SECONDS

left() { echo $((LIMIT - (SECONDS - started))); }

# What was measured and said so far, where the caller looks for it.
publish() {
    cat "$WORK"/*.log > "$OUT/log.txt" 2> /dev/null
    [ -f "$RESULT" ] || return 0
    local copy=$OUT/${RESULT##*/}  # under its own name: another GPU's file may lie there
    [ "$RESULT" -ef "$copy" ] || cp "$RESULT" "$copy"
    "$PYTHON" bench/goals.py "$RESULT" --gpu > "$OUT/goals.md" 2>> "$WORK/publish.log"
}

# part NAME SECONDS FUNCTION [ARGUMENT…]: run it within its limit and what is left of the whole, log it, say how it ended.
part() {
    local name=$1 seconds=$2 rest status begin=$SECONDS
    shift 2
    case " $PARTS " in *" $name "*) ;; *) return 0 ;; esac
    rest=$(left)
    if [ "$rest" -lt 10 ]; then
        echo "$name" >> "$WORK/failed"
        echo "$name: not begun, no time left" | tee "$WORK/$name.log"
        return 0
    fi
    [ "$seconds" -gt "$rest" ] && seconds=$rest
    {
        echo "=== $name (at most $seconds s) ==="
        BUDGET=$seconds DEADLINE=$(($(date +%s) + seconds)) timeout --kill-after=5 "$seconds" bash -c '"$@"' part "$@"
    } > "$WORK/$name.log" 2>&1
    status=$?
    [ "$status" = 0 ] || echo "$name" >> "$WORK/failed"
    [ "$status" = 124 ] && status="124, stopped at its limit"
    echo "$name: status $status, $((SECONDS - begin)) s" | tee -a "$WORK/$name.log"
    [ "$status" = 0 ] || tail -n 12 "$WORK/$name.log" | cut -c1-300
    publish
}

# Cases of the benchmarks. The run stops by itself before the part does, and so keeps its rows.
cases() {
    local flags=()
    [ -n "$REHEARSE" ] && flags=(--rehearse)
    "$PYTHON" bench/run.py "$@" "${flags[@]}" --merge --out "$RESULT" --seconds $((DEADLINE - $(date +%s) - 15))
}

have() { [ -f "$1" ] || { echo "there is no $1"; return 1; }; }

build() {
    nvidia-smi || echo "no GPU"
    "$PYTHON" --version
    local built=$(ls -t retro_kernels/_C.*.so 2> /dev/null | head -n 1)
    if [ -n "$built" ] && [ -z "$(find csrc setup.py -newer "$built")" ] \
        && "$PYTHON" -c "from retro_kernels import _C; assert ${REHEARSE:-0} or _C.cuda"; then
        echo "$built is up to date"
        return 0
    fi
    # beside the project's metadata, which an older setuptools than the one that a build would fetch cannot read
    mkdir -p "$SCRATCH" && cp -r setup.py csrc "$SCRATCH"
    (
        cd "$SCRATCH"
        [ -n "$REHEARSE" ] || export RETRO_CUDA=1 RETRO_CUDA_ARCHS="${RETRO_CUDA_ARCHS:-90}"
        MAX_JOBS=8 "$PYTHON" setup.py -q build_ext --build-lib built
    ) || return
    [ -n "$REHEARSE" ] || cp "$SCRATCH"/built/retro_kernels/_C.*.so retro_kernels/
}

# Compilations of FlexAttention and einsum, in several processes and into the disk cache, while nothing is timed.
warm() {
    local shards=8 i code status=0 running=()
    [ -n "$REHEARSE" ] && shards=1
    for ((i = 0; i < shards; i++)); do
        RETRO_BENCH_SHARD=$i/$shards TORCHINDUCTOR_COMPILE_THREADS=2 "$PYTHON" -m pytest bench/bench_kernels.py -q \
            -o python_files='bench_*.py' -p no:cacheprovider --benchmark-disable -k "test_cca and (Flex or compiled) and not autotune" &
        running+=($!)
    done
    for i in "${running[@]}"; do
        wait "$i" || { code=$?; [ "$code" = 5 ] || status=$code; }  # 5: nothing to compile in this one
    done
    return $status
}

static() {
    have bench/static.py || return 0
    [ -n "$REHEARSE" ] && { "$PYTHON" bench/static.py --help; return; }
    "$PYTHON" bench/static.py
}

tests() {
    local workers=()
    "$PYTHON" -c "import xdist" 2> /dev/null && [ -z "$REHEARSE" ] && workers=(-n 12)
    "$PYTHON" -m pytest tests -m gpu -q -p no:cacheprovider --continue-on-collection-errors \
        --ignore tests/test_peers.py --deselect tests/ops/test_tuning.py::test_tuning_on_the_gpu "${workers[@]}"
}

# A hundred kernels are compiled one after another.
tuning() {
    "$PYTHON" -m pytest tests/ops/test_tuning.py -m gpu -q -p no:cacheprovider
}

sanitizer() {
    local tool status=0
    if ! command -v compute-sanitizer > /dev/null; then
        echo "compute-sanitizer is not here; its cases alone:"
        "$PYTHON" bench/once.py --small --positions none bias relative -D 64 128 && "$PYTHON" bench/once.py --decode
        return
    fi
    local -A running
    local run kernels
    local -A cases=([whole]="--small --positions bias relative -D 64" [decode]="--decode")
    for tool in memcheck racecheck synccheck initcheck; do  # without the caching allocator, bounds are those of tensors
        kernels=(--kernel-regex "kns=_kernel")
        [ "$tool" = initcheck ] && kernels=()  # it has to see who writes what ours read
        for run in "${!cases[@]}"; do
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "$BUDGET" compute-sanitizer --tool "$tool" --error-exitcode 9 \
                "${kernels[@]}" "$PYTHON" bench/once.py ${cases[$run]} > "$SCRATCH.$tool-$run" 2>&1 &
            running[$tool-$run]=$!
        done
    done
    for tool in "${!running[@]}"; do
        wait "${running[$tool]}" || status=$?
        echo "--- $tool"
        cat "$SCRATCH.$tool"
    done
    return $status
}

profile() {
    local head_dim positions reason metrics
    command -v ncu > /dev/null || { echo "ncu is not here"; "$PYTHON" bench/once.py --small; return; }
    metrics=gpu__time_duration.sum,dram__bytes.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed
    metrics+=,sm__throughput.avg.pct_of_peak_sustained_elapsed,launch__registers_per_thread
    metrics+=,sm__warps_active.avg.pct_of_peak_sustained_active
    for reason in long_scoreboard barrier wait math_pipe_throttle short_scoreboard; do
        metrics+=,smsp__average_warps_issue_stalled_${reason}_per_issue_active.ratio
    done
    for positions in bias relative; do
        for head_dim in 128 64; do
            ncu --clock-control none --kernel-name "regex:_cca_" --csv --page raw --metrics "$metrics" \
                "$PYTHON" bench/once.py --positions $positions -D $head_dim -K 10 || return
        done
    done
}

search() {
    local status=0
    [ -n "$REHEARSE" ] || "$PYTHON" -m pytest tests/retrieval -m gpu -q -p no:cacheprovider || status=$?
    cases bench/bench_search.py && return $status
}

peers() {
    local status=0
    "$PYTHON" -m pytest tests/test_peers.py -m gpu -q -p no:cacheprovider -k "not autotune" || status=$?
    cases bench/bench_kernels.py -k "test_cca and not autotune and not lengths and not retro_kernels" && return $status
}

one_file() { have "bench/bench_$1.py" && cases "bench/bench_$1.py"; }

export PYTHON REHEARSE RESULT SITE SCRATCH
export -f cases have build warm static tests tuning sanitizer profile search peers one_file
echo "parts: $PARTS"
[ -n "${FAISS_ARCHIVE:-}" ] && mkdir -p "$SITE" && tar -xJf "$FAISS_ARCHIVE" -C "$SITE"
"$PYTHON" -c "import torch, faiss; print('faiss', faiss.__version__, 'GPUs:', faiss.get_num_gpus())" 2>&1 | tail -n 1
# what times nothing runs side by side; the extension comes before the tests that use it
( part build 150 build; part tests 240 tests ) &
( part warm 240 warm ) &
( part static 200 static ) &
wait
part calls 90 cases bench/bench_kernels.py -k "overhead or first_call or memory"
part kernels 150 cases bench/bench_kernels.py -k "test_cca and retro_kernels"
part absorbed 60 one_file absorbed
part decode 60 one_file decode
part gather 40 one_file gather
part peers 420 peers
part model 90 one_file model
part training 90 one_file training
part search 120 search
part autotune 200 cases bench/bench_kernels.py \
    -k "test_cca and (autotune or retro_kernels) and bias and H$([ -n "$REHEARSE" ] && echo 2 || echo 16) and not K40"
part sanitizer 90 sanitizer
part profile 90 profile
part tuning 150 tuning
publish
cat "$OUT/goals.md" 2> /dev/null
echo "all parts: $((SECONDS - started)) s; results in $OUT"
[ ! -f "$WORK/failed" ] || { echo "failed or not begun: $(sort "$WORK/failed" | tr '\n' ' ')"; exit 1; }
