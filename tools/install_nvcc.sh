#!/usr/bin/env bash
# Brings nvcc from PyPI beside a CUDA PyTorch on a machine that has none; does nothing elsewhere.
set -euo pipefail
command -v nvcc >/dev/null || [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ] && exit 0
cuda=$(python -c "import torch; print(torch.version.cuda or '')")
[ -n "$cuda" ] || exit 0
echo "No nvcc found: installing the CUDA $cuda compiler from PyPI"
pip install --quiet --disable-pip-version-check \
  "nvidia-cuda-nvcc==$cuda.*" "nvidia-nvvm==$cuda.*" "nvidia-cuda-crt==$cuda.*" "nvidia-cuda-cccl==$cuda.*"
