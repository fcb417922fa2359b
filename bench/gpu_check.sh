#!/usr/bin/env bash
# Builds, proves, tests and measures the CUDA kernels on one GPU in under nine minutes, offline, with what a CUDA image
# has:
#   bash bench/gpu_check.sh [FOLDER]
# Needs nvcc, cmake, ninja and a Python with torch, pybind11, pytest and rich. Peers that are not installed are left out.
# Writes FOLDER/<device>.json, bench/results by default, anew after every step: one that hangs is stopped and costs its
# own figures alone. Holds device, driver, versions, commit, the verdict on every kernel, what the compiler made of it,
# every test's outcome and every figure.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
results=$(realpath "${1:-bench/results}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH=$work DEFTCORE_CACHE=$work/cache
mkdir -p "$results"

# step NAME SECONDS COMMAND...: runs it for at most so long, and writes down how it ended.
step() {
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  printf '\n== %s\n' "$name"
  timeout -s INT -k 10 "$limit" "$@"
  status=$?
  echo "$name $status $((SECONDS - start))" >>"$work/steps"
  python3 -m bench.gpu_report "$work" "$results"
  return "$status"
}

cp -r deftcore tests bench pyproject.toml "$work"
rm -f "$work"/deftcore/_C.*.so  # of another build
python3 - "$(git rev-parse HEAD)" >"$work/machine.json" <<'PY' || exit 1
import json, subprocess, sys, torch
query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
driver = subprocess.run(query, capture_output=True, text=True).stdout.split()
print(json.dumps({"device": torch.cuda.get_device_name(), "driver": " ".join(driver[:1]), "torch": torch.__version__,
                  "cuda": torch.version.cuda, "commit": sys.argv[1]}))
PY

cmake -S . -B "$work/build" -G Ninja -DDEFTCORE_CUDA=on -DDEFTCORE_BUILD_PYTHON=ON \
  -Dpybind11_DIR="$(python3 -m pybind11 --cmakedir)" -DPython_EXECUTABLE="$(command -v python3)" || exit 1
step build 170 ninja -C "$work/build" _C || exit 1
cp "$work"/build/_C.*.so "$work/deftcore"
cd "$work" || exit 1

step static 120 python3 -m bench.cuda_static build --json static.json >static.log 2>&1 &
static=$!

step proof 60 sh -c 'python3 -m deftcore gpu-check --timeout 30 --json >proof.json'

step tests 150 python3 -m pytest tests/test_cuda.py -m cuda -q --junitxml tests.xml -p no:cacheprovider

if command -v compute-sanitizer >/dev/null; then
  step compute-sanitizer 50 compute-sanitizer --tool memcheck --error-exitcode 9 \
    python3 -m pytest tests/test_cuda.py -m cuda -q -x -p no:cacheprovider \
    -k "side_stream or 4bit_format or lora or slices or fused_blocks"
fi

wait "$static"
step benchmarks $((530 - SECONDS)) python3 -m bench --device cuda --quick --output figures.json --only linear_4bit qlora \
  quantise sparse_4bit sparse_down gated act_density gated_linear s2ft_serving s2ft_training selective_scan \
  mamba_chunk_scan conv1d state_update mamba_mixer mamba_decode overhead neighbours tsvit

python3 -m bench.gpu_report "$work" "$results"
