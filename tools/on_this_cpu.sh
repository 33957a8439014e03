#!/usr/bin/env bash
# Runs the command it is given. Some virtual machines advertise AMX and trap on it, so that PyTorch's BF16 products on the
# CPU die of an illegal instruction; where a small one does, oneDNN is told to do without.
probe='import torch; torch.nn.functional.linear(*torch.ones(3, 64, 64).bfloat16()[:2])'
if [ -z "${ONEDNN_MAX_CPU_ISA:-}" ] && ! python3 -c "$probe" 2>/dev/null; then
  export ONEDNN_MAX_CPU_ISA=AVX512_CORE_FP16
fi
exec "$@"
