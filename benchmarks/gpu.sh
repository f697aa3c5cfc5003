#!/usr/bin/env bash
# Try featcli on a machine with a GPU, in about nine minutes: its tests there, how near it comes to what bounds it, and
# the whole suite. Parts run in order of worth; one that fails, or takes too long, does not end the others.
#
#   benchmarks/gpu.sh [FOLDER]    from the repository, with featcli and its `dev` extra installed; default: build/gpu
#
# FOLDER gets table.md (for docs/speed.md), results.jsonl (all rounds), facts.txt and the logs of the parts.
#
#   PYTHON      the interpreter                      (.venv/bin/python, or python3)
#   DEVICE      cuda; or cpu, to try the script      (cuda)
#   MODELS      names of timm                        (resnet50 vit_base_patch16_224)
#   IMAGES      JPEGs of 500x375 that are drawn      (6000)
#   FORWARD     images of the bare forward pass      (4096)
#   BATCH       images in a batch                    (128)
#   ROUNDS      at most                              (3)
#   CUDA_S      seconds of the tests on the GPU      (120)
#   TEST_S      seconds of the whole suite           (110)
#   BENCH_S     seconds of the measurements          (what is left of nine minutes)
set -u
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] && python=.venv/bin/python || python=python3
python=${PYTHON:-$python} device=${DEVICE:-cuda} images=${IMAGES:-6000} out=${1:-build/gpu}
cores=$(nproc) began=$(date +%s) failed=""
export PYTHONUNBUFFERED=1
mkdir -p "$out"
out=$(cd "$out" && pwd)

say() { echo "[$(($(date +%s) - began)) s] $*"; }

# part NAME SECONDS COMMAND...: runs it with a limit, its output in NAME.log
part() {
  local name=$1 seconds=$2 code
  shift 2
  timeout -k 10 "$seconds" "$@" > "$out/$name.log" 2>&1
  code=$?
  say "$name: $([ $code = 124 ] && echo "not done after $seconds s" || echo "exit code $code")"
  [ $code = 0 ] || failed="$failed $name"
  tail -n "${TAIL:-3}" "$out/$name.log"
}

{
  nvidia-smi --query-gpu=name,memory.total,driver_version,pcie.link.gen.current --format=csv,noheader || echo "no nvidia-smi"
  "$python" -c 'import sys; sys.path.insert(0, "benchmarks"); from host import described; print(described())'
  "$python" -m pip list --disable-pip-version-check 2> /dev/null |
    grep -iE '^(featcli|torch|torchvision|timm|transformers|pillow|simplejpeg|numpy|h5py|nvidia|triton)' | tr -s ' ' | paste -sd,
  git rev-parse --short HEAD 2> /dev/null
  free -g | sed -n 2p
  df -h "$out" | tail -n 1
} > "$out/facts.txt" 2>&1
cat "$out/facts.txt"

"$python" benchmarks/gpu.py draw "$out/pictures" "$images" > "$out/draw.log" 2>&1 &
drawing=$!
workers=$((cores / 2 > 8 ? 8 : cores / 2 > 0 ? cores / 2 : 1))
[ "$device" = cuda ] || export FEATCLI_STAND_IN=$device
TAIL=15 part cuda_tests "${CUDA_S:-120}" "$python" -m pytest -q -n "$workers" -p no:cacheprovider -o filterwarnings= \
  tests/test_cuda.py tests/test_transfers.py
unset FEATCLI_STAND_IN
wait $drawing || { failed="$failed draw"; tail -n 3 "$out/draw.log"; }

seconds=${BENCH_S:-$((520 + began - $(date +%s) - ${TEST_S:-110}))}
rm -f "$out/results.jsonl"
part measurements $((seconds + 30)) "$python" benchmarks/gpu.py "$out/pictures" "$out" --device "$device" \
  --models ${MODELS:-resnet50 vit_base_patch16_224} --images "$images" --forward-images "${FORWARD:-4096}" \
  --batch "${BATCH:-128}" --rounds "${ROUNDS:-3}" --seconds "$seconds"
cat "$out/table.md"

workers=$((cores > 4 ? cores - 2 : 2))
TAIL=30 part all_tests "${TEST_S:-110}" "$python" -m pytest -q -n "$workers" -p no:cacheprovider -o filterwarnings= --maxfail=60
rm -rf "$out/pictures"
say "done${failed:+, but for:$failed}"
[ -z "$failed" ]
