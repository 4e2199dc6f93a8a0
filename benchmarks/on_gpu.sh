#!/usr/bin/env bash
# on_gpu.sh [--part NAME] [--list] OUT_DIR: what has to be done where there is a GPU, into OUT_DIR.
#
# Versions and devices, the build, the tests of every operator, compute-sanitizer, and the benchmark of every operator on
# every suite, by wall clock and by replays of CUDA graphs. Every part is a call of its own with a limit of time, so that
# one that fails or hangs leaves the others' output. --list names the parts, --part runs one of them.
#
# Environment: PYTHON (python3), PART_SECONDS (570), ROUNDS (15).
# shellcheck disable=SC2329  # parts are called by their names
set -euo pipefail

usage() {
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

PYTHON=${PYTHON:-python3}
PART_SECONDS=${PART_SECONDS:-570}
ROUNDS=${ROUNDS:-15}

parts=(environment build tests sanitizer)
for operator in routing dispatch expert_ffn moe_layer grad_projection hypercolumn diverse_sampling; do
  case $operator in
    grad_projection) suites=(resnet18 vit_small vit_base many) ;;
    hypercolumn) suites=(vgg16 vit_base) ;;
    diverse_sampling) suites=(pyramid columns) ;;
    *) suites=(batch image large) ;;
  esac
  for suite in "${suites[@]}"; do
    parts+=("bench-$operator-$suite-wall" "bench-$operator-$suite-graph")
  done
done

out='' only=''
while (($#)); do
  case $1 in
    --list) printf '%s\n' "${parts[@]}" && exit ;;
    --part) only=${2:-} && shift ;;
    -*) usage ;;
    *) out=$1 ;;
  esac
  shift
done
[[ -n $out ]] || usage
if [[ -n $only && " ${parts[*]} " != *" $only "* ]]; then
  echo "on_gpu.sh: no part is called '$only'; --list names them" >&2
  exit 2
fi
mkdir -p "$out"
out=$(realpath "$out")
cd "$(dirname "$0")/.."

# bounded COMMAND: with the time that a part has; an interrupt comes first, so that what was measured is kept.
bounded() { timeout --signal=INT --kill-after=20 "$PART_SECONDS" "$@"; }

# cli ARGUMENTS: the moe-kernels command, in that time.
cli() { bounded "$PYTHON" -c 'from moe_kernels.cli import app; app()' "$@"; }

environment() {
  nvidia-smi
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,ecc.mode.current --format=csv
  "$PYTHON" -m pip freeze
  cli doctor
}

build() {
  MOE_KERNELS_REQUIRE_EXT=1 MOE_KERNELS_CUDA=1 bounded "$PYTHON" -m pip install --no-build-isolation --no-deps --editable .
}

tests() {
  bounded "$PYTHON" -m pytest tests/ops tests/triton tests/cuda tests/optim tests/models/segmentation/test_{classifier,replay}.py -q --junitxml="$out/tests.xml"
}

# Odd sizes, several dtypes, forward and backward of all operators at once; without torch's cache of memory, so that an
# access beside a tensor is one beside an allocation.
sanitizer() {
  local tool
  tool=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
  if [[ ! -x $tool ]]; then
    echo "compute-sanitizer is not installed"
    return 1
  fi
  cat >"$out/sanitized.py" <<'PY'
import torch
from moe_kernels import backend
from moe_kernels.nn import MoE
from moe_kernels.ops import grad_projection, hypercolumn
from moe_kernels.ops.diverse_sampling import diverse_sampling, farthest_points

for dtype in (torch.float32, torch.bfloat16):
    for top_k in (1, 2):
        layer = MoE(48, 80, 5, top_k, projection_dim=24).to("cuda", dtype)
        x = torch.randn(77, 48, device="cuda", dtype=dtype, requires_grad=True)
        layer(x).float().square().sum().backward()
        torch.cuda.synchronize()
        print(dtype, top_k, "done")
    sizes = (1, 5, 0, 2048, 4100) * 200  # more than a launch takes
    lists = [[torch.rand(n, device="cuda", dtype=dtype) for n in sizes] for _ in range(5)]
    params, grads, anchors, first, second = lists
    steps = [torch.ones((), device="cuda") for _ in sizes]
    record = grad_projection.new_record(7, "cuda")
    settings = {"record": record, "segments": [i % 7 for i in range(len(sizes))], "coefficient": 0.1, "rule": "dtnh"}
    with backend.force("cuda"):
        grad_projection.moments(grads, anchors, params=params)
        grad_projection.project_gradients_(grads, anchors, params=params, **settings)
        settings |= {"anchored": True, "lr": 0.1}
        grad_projection.sgd_(params, grads, anchors, first, momentum=0.9, **settings)
        adam = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.01}
        grad_projection.adamw_(params, grads, anchors, first, second, steps, **adam, **settings)
    torch.cuda.synchronize()
    print(dtype, "grad_projection done")
    sizes = ((13, 7, 9), (40, 7, 9), (300, 3, 4), (5, 1, 2))
    maps = [torch.rand(3, *size, device="cuda", dtype=dtype, requires_grad=True) for size in sizes]
    pyramid = hypercolumn.pyramid(maps, (7, 9))
    points = torch.randint(-1, 63, (3, 11), device="cuda")
    weight = torch.rand(6, 358, device="cuda", dtype=dtype, requires_grad=True)
    columns = hypercolumn.gather(pyramid, points)
    (columns.float().square().sum() + hypercolumn.linear(pyramid, weight).float().square().sum()).backward()
    hypercolumn.inner(pyramid, columns)
    hypercolumn.norm(pyramid)
    with backend.force("cuda"):
        for penalty in ("sum", "max"):
            diverse_sampling(torch.rand(3, 5, 63, device="cuda"), pyramid, 6, penalty=penalty)
        for metric in ("cosine", "euclidean"):
            farthest_points(pyramid, 70, start=3, metric=metric)
    torch.cuda.synchronize()
    print(dtype, "hypercolumn and diverse_sampling done")
PY
  local check status=0
  for check in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 PART_SECONDS=$((PART_SECONDS / 2)) \
      bounded "$tool" --tool "$check" --error-exitcode 1 "$PYTHON" "$out/sanitized.py" || status=$?
  done
  return "$status"
}

# bench OPERATOR SUITE STOPWATCH
bench() {
  local options=()
  [[ $3 == wall ]] || options+=(--no-memory)
  cli bench "$1" --suite "$2" --stopwatch "$3" --rounds "$ROUNDS" "${options[@]}" --out "$out/$2-$3"
}

# run PART: its output goes to the terminal and to OUT_DIR/PART.log, its status to OUT_DIR/status.
run() {
  local part=$1 status=0 start=$SECONDS command
  case $part in
    bench-*) IFS=- read -r -a command <<<"$part" ;;
    *) command=("$part") ;;
  esac
  printf '\n=== %s\n' "$part"
  "${command[@]}" 2>&1 | tee "$out/$part.log" || status=$?
  printf '%s: status %d, %d s\n' "$part" "$status" $((SECONDS - start)) | tee -a "$out/status"
  return "$status"
}

failed=0
for part in "${parts[@]}"; do
  if [[ -z $only || $part == "$only" ]]; then
    run "$part" || failed=1
  fi
done
exit "$failed"
