#!/usr/bin/env bash
# Builds, tests and measures the CUDA kernels on one GPU in under nine minutes, offline, with what a CUDA image has:
#   bash bench/gpu_check.sh
# Needs nvcc, cmake, ninja and a Python with torch, pybind11, scikit-build-core and pytest.
# Writes bench/results/<device>.json: device, driver, versions, commit, each kernel's proof, the outcome of every test,
# every figure.
set -uo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH="$work/site:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}" DEFTCORE_CUDA_KERNELS=all DEFTCORE_CACHE="$work/cache" MAX_JOBS=16

echo "== build"
DEFTCORE_CUDA=on python3 -m pip install -q --no-build-isolation --no-deps --target "$work/site" . || exit 1
cp -r tests bench pyproject.toml "$work/" && cd "$work" || exit 1  # the source folder must not shadow the install

echo "== proof"
timeout 200 python3 -m deftcore gpu-check --json >"$work/proof.json"
grep '"reason"' "$work/proof.json" | sort | uniq -c

echo "== tests"
timeout 240 python3 -m pytest tests/test_cuda.py -m cuda -q --junitxml "$work/tests.xml" -p no:cacheprovider
tests=$?

echo "== compute-sanitizer"
sanitizer="not found"
if command -v compute-sanitizer >/dev/null; then
  timeout 120 compute-sanitizer --tool memcheck --error-exitcode 9 \
    python3 -m pytest tests/test_cuda.py -m cuda -q -x -p no:cacheprovider \
    -k "bundled or poisoned or side_stream or density or 4bit or gated_linear or grouped or scan or conv1d or steps" >"$work/sanitizer.log" 2>&1
  sanitizer="exit $?"
  tail -n 3 "$work/sanitizer.log"
fi

echo "== benchmarks"
timeout 200 python3 -m bench --device cuda --quick --only linear_4bit quantise sparse_4bit sparse_down gated act_density \
  overhead selective_scan mamba_chunk_scan mamba_mixer mamba_decode s2ft_serving s2ft_training \
  --output "$work/figures.json"

cd "$OLDPWD" && python3 - "$work" "$tests" "$sanitizer" <<'PY'
import json, subprocess, sys
import xml.etree.ElementTree as xml
from pathlib import Path

import torch

work, tests, sanitizer = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True)
commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
cases = xml.parse(work / "tests.xml").getroot().iter("testcase") if (work / "tests.xml").exists() else []
outcome = {c.get("name"): next((child.tag for child in c if child.tag in ("failure", "error", "skipped")), "passed") for c in cases}
figures, proof = work / "figures.json", work / "proof.json"
device = torch.cuda.get_device_name()
result = {
    "device": device, "driver": driver.stdout.strip(), "torch": torch.__version__, "cuda": torch.version.cuda,
    "commit": commit, "pytest_exit": tests, "tests": outcome, "compute_sanitizer": sanitizer,
    "proof": json.loads(proof.read_text() or "null") if proof.exists() else None,
    "figures": json.loads(figures.read_text()) if figures.exists() else None,
}
path = Path("bench/results") / f"{device.lower().replace(' ', '-')}.json"
path.write_text(json.dumps(result, indent=1))
failed = [name for name, how in outcome.items() if how != "passed"]
print(f"{path}: {len(outcome)} tests, not passed: {failed or 'none'}; compute-sanitizer: {sanitizer}")
sys.exit(bool(failed) or tests)
PY
