#!/usr/bin/env bash
# All that waits for a GPU, within nine minutes on one H200, the most valuable first. Every step has its own time limit;
# what a step has written stays when the next one fails or the time is out. Results: benchmarks/results/*_gpu.json.
#
#   PYTHON=/path/to/python benchmarks/gpu_run.sh              on a GPU (SECONDS_IN_ALL=540, OUT=folder for copies)
#   PYTHON=/path/to/python benchmarks/gpu_run.sh --rehearse   every step on a CPU at toy size, nothing is kept
#   benchmarks/gpu_run.sh --list                              the steps' command lines
#
# Needs no network: torch, transformers, numpy, einops, pillow and PyAV (`av`) have to be there; a package that is
# missing can lie in a folder on PYTHONPATH (`pip install --target FOLDER av einops` where there is a network).
set -u -o pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
IN_ALL=${SECONDS_IN_ALL:-540}
MODE=${1:-run}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
LOGS=$(mktemp -d)
trap 'rm -rf "$LOGS"' EXIT

has() { "$PYTHON" -c "import importlib.util, sys; sys.exit(not importlib.util.find_spec('$1'))"; }

# step NAME LIMIT COMMAND...: runs it for at most LIMIT seconds, or as many as are left.
step() {
    local name=$1 limit=$2 left=$((IN_ALL - SECONDS))
    shift 2
    if [ "$MODE" = --list ]; then printf '%s\t%s\n' "$name" "$*"; return; fi
    [ "$MODE" = --rehearse ] && limit=300 left=3600
    if [ "$left" -lt 10 ]; then echo "== $name: no time left" | tee -a "$LOGS/steps"; return; fi
    [ "$limit" -gt "$left" ] && limit=$left
    echo "== $name (at most $limit s): $*"
    local started=$SECONDS code=0
    timeout -k 5 "$limit" "$@" 2>&1 | tee "$LOGS/$name.log" || code=$?
    local said=done
    [ "$code" -ne 0 ] && said="failed with $code"
    [ "$code" -eq 124 ] && said="stopped at its limit"
    echo "== $name: $said after $((SECONDS - started)) s" | tee -a "$LOGS/steps"
    [ "$code" -ne 0 ] && FAILED=1
}
FAILED=0

FLASH=flash_attention_2 FLEX=flex_attention ONE="--repeats 1"
SHORT=2048 LONG=10000 SHORT_TOKENS=78584 LONG_TOKENS=384736 TOWER_FRAMES=512
SIZE="--preset video-xl-2-8b" TOWER=$SIZE TRUE="--true-size --device cuda --dtype bfloat16" TESTS=
STORE="--device cuda --dtype bfloat16"
if [ "$MODE" = run ]; then
    for package in torch transformers numpy einops PIL av safetensors; do
        has "$package" || { echo "missing for $PYTHON: $package (see the head of this script)"; exit 2; }
    done
    "$PYTHON" -c "import torch, sys; sys.exit(not torch.cuda.is_available())" ||
        { echo "$PYTHON sees no CUDA device; --rehearse runs on a CPU"; exit 2; }
elif [ "$MODE" = --rehearse ]; then
    FLASH=sdpa FLEX=sdpa SHORT=8 LONG=16 SHORT_TOKENS=700 LONG_TOKENS=1400 TOWER_FRAMES=4
    SIZE="--hidden 32 --mlp 64 --layers 1 --heads 2 --kv-heads 1" TRUE="--scale 16" TESTS=--collect-only
    STORE="--frames 256 --layers 1"  # more than the window, which is never packed
    TOWER="--image-size 112 --vision-hidden 64 --vision-layers 1"
    export BENCHMARK_RESULTS=$LOGS/results
elif [ "$MODE" != --list ]; then
    echo "unknown: $MODE (nothing, --rehearse or --list)"; exit 2
fi

# Prefill, vision, memory, second questions from the GPU and from the host: most targets are here.
step end_to_end_2048 70 "$PYTHON" benchmarks/end_to_end.py $TRUE $ONE --frames $SHORT --out end_to_end_2048_gpu
step end_to_end_10000 120 "$PYTHON" benchmarks/end_to_end.py $TRUE $ONE --frames $LONG --out end_to_end_10000_gpu
step cuda_tests 60 "$PYTHON" -m pytest -q -m cuda -p no:cacheprovider --continue-on-collection-errors $TESTS \
    tests/test_cuda.py tests/test_video_file.py tests/test_witness.py tests/test_clients.py
step tower 40 "$PYTHON" benchmarks/encode.py $TOWER $ONE --frames $TOWER_FRAMES --tower-only --out tower_gpu
step tower_channels_last 40 "$PYTHON" benchmarks/encode.py $TOWER $ONE --frames $TOWER_FRAMES --tower-only \
    --channels-last --out tower_channels_last_gpu
step prefill_2048 50 "$PYTHON" benchmarks/prefill.py $SIZE $ONE --modes streaming mask full dense \
    --lengths $SHORT_TOKENS --out prefill_2048_gpu
step decode 50 "$PYTHON" benchmarks/decode.py $SIZE $ONE --lengths $SHORT_TOKENS --out decode_gpu
step store 60 "$PYTHON" benchmarks/end_to_end.py $TRUE $ONE --frames $SHORT --stores int8 int4 --out store_gpu
step store_bytes 30 "$PYTHON" benchmarks/store.py $STORE --out store_bytes_gpu
step prefill_10000 60 "$PYTHON" benchmarks/prefill.py $SIZE $ONE --modes streaming mask --lengths $LONG_TOKENS \
    --out prefill_10000_gpu
if [ "$MODE" != run ] || has flash_attn; then
    step flash 50 "$PYTHON" benchmarks/prefill.py $SIZE $ONE --modes dense full --attention $FLASH \
        --lengths $SHORT_TOKENS --out flash_gpu
else
    echo "== flash: left out, flash_attn is not installed" | tee -a "$LOGS/steps"
fi
step flex 60 "$PYTHON" benchmarks/prefill.py $SIZE $ONE --modes dense --attention $FLEX --lengths $SHORT_TOKENS \
    --out flex_gpu
step full_10000 120 "$PYTHON" benchmarks/prefill.py $SIZE $ONE --modes full --lengths $LONG_TOKENS \
    --out full_10000_gpu

[ "$MODE" = --list ] && exit 0
printf '\nsteps:\n'
cat "$LOGS/steps"
"$PYTHON" benchmarks/gpu_summary.py || FAILED=1
# One archive, for machines that hand back few files.
[ -n "${OUT:-}" ] && tar czf "$OUT/gpu_run.tgz" -C "$LOGS" . -C "$PWD/benchmarks" results
exit $FAILED
