#!/usr/bin/env bash
# On a machine with a Hopper GPU: build, run all tests (a missing GPU is a failure), run the benchmarks.
#   tools/gpu.sh [build] [test] [sanitize] [bench]      all four by default
# Uses the Python environment that is active and installs nothing but torch_fp8 itself, in place. Logs, and the
# results in one archive, go to $OUT where that is set.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-runs/gpu}
mkdir -p "$out"
stages=${*:-build test sanitize bench}
bin=$(dirname "$(python3 -c 'import sys; print(sys.executable)')")
export PATH=$bin:$PATH TORCH_FP8_REQUIRE_CUDA=1 PYTHONUNBUFFERED=1
# Warnings are errors in .ci/run; the compiler here may be another one, with others of its own.
export TORCH_FP8_CMAKE_ARGS="-DTORCH_FP8_TESTS=ON -DTORCH_FP8_WERROR=OFF -DTORCH_FP8_CUDA=ON"
# A compiler that links libstdc++ statically (some images set CXX to one) puts a second copy of it beside torch's, and the
# first number formatted into an error message crashes.
export CXX=/usr/bin/g++ CUDAHOSTCXX=/usr/bin/g++
status=0

for stage in $stages; do
  case $stage in
    build)
      nvidia-smi --query-gpu=name,driver_version,clocks.sm,power.limit --format=csv,noheader
      time python3 -m pip install --quiet --no-build-isolation --no-deps --editable . > "$out/build.log" 2>&1 ||
        { tail -40 "$out/build.log"; exit 1; }
      python3 -c "import torch_fp8; print(torch_fp8.build_info())" ;;
    test)
      ctest --test-dir build --output-on-failure > "$out/ctest.log" 2>&1 || status=1
      grep -E "tests passed|tests failed|FAILED|Failed" "$out/ctest.log" | tail -20
      # A process a core, and a thread a process: what torch's threads gain in one test they take from fifteen others.
      workers=$(python3 -c 'import xdist' 2>/dev/null && echo "-n $(nproc) --dist worksteal" || true)
      export OMP_NUM_THREADS=1
      # Interrupted and not killed where time runs out: pytest then still tells what failed.
      timeout --signal=INT "${TEST_SECONDS:-480}" python3 -m pytest -q $workers > "$out/pytest.log" 2>&1 || status=1
      grep -E "^E   |^FAILED|^ERROR| passed| failed" "$out/pytest.log" | cut -c1-220 | tail -60 ;;
    sanitize)
      for tool in memcheck racecheck; do
        timeout 120 compute-sanitizer --tool $tool --error-exitcode 1 build/tests/cpp/torch_fp8_tests \
          --gtest_filter='Cuda.Codes*:Cuda.Shapes*:Cuda.Updates*' > "$out/$tool.log" 2>&1 || status=1
        echo "$tool: $(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$out/$tool.log" || tail -3 "$out/$tool.log")"
      done ;;
    bench)
      python3 benchmarks 2>&1 | tee "$out/bench.log" || status=1
      tar -czf "$out/results.tar.gz" -C benchmarks results ;;
  esac
done
exit $status
