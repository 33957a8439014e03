"""torch_fp8: the linear layers of GPT and Llama models in FP8, with per-tensor scaling, on Hopper GPUs.

    import torch_fp8 as fp8
    fp8.convert(model)          # nn.Linear -> fp8.Linear, in place
    print(fp8.summary(model))

Everything else of a training script stays as it is: the scales follow the optimizer's step by themselves. On a machine
without a GPU the same code runs on an exact, slow CPU backend.
"""

from pathlib import Path as _Path
from typing import Any as _Any

import torch as _torch

from . import _build


def _check_torch() -> None:
    # A C++ extension fits one minor version of PyTorch; anything else fails later with an unreadable symbol.
    running = _torch.__version__.split("+")[0]
    if running.split(".")[:2] != _build.torch_version.split(".")[:2]:
        raise ImportError(
            f"torch_fp8 was built for PyTorch {_build.torch_version}, but PyTorch {running} is running; "
            "reinstall it (pip install --force-reinstall --no-deps .)"
        )


_check_torch()

from . import _C  # noqa: E402
from .checkpoints import CheckpointError, QuantizationConfig, load_pretrained, save_pretrained  # noqa: E402
from .layers import replicas as _replicas  # noqa: E402, F401  DDP finds it there
from .layers.attend import Attention  # noqa: E402
from .layers.attention import ScaledDotProductAttention, scaled_dot_product_attention  # noqa: E402
from .layers.block import MLP, LayerNorm, RMSNorm, TransformerBlock  # noqa: E402
from .layers.frozen import FrozenLinear  # noqa: E402
from .layers.linear import Linear  # noqa: E402
from .layers.siblings import share_input  # noqa: E402
from .observe.activations import Activations, activations  # noqa: E402
from .observe.monitor import Monitor, monitor  # noqa: E402
from .observe.sharpness import sharpness  # noqa: E402
from .observe.watch import Alarm, Watch, watch  # noqa: E402
from .recipe import ConstantScaling, CurrentScaling, DelayedScaling, Recipe  # noqa: E402
from .scaling import ScalingState, load_state_dict, reduce_amaxes, state_dict, update_scales  # noqa: E402
from .swap import adapters as _adapters  # noqa: E402, F401  peft finds it there
from .swap.convert import convert, disabled, revert  # noqa: E402
from .swap.freeze import calibrate, freeze  # noqa: E402
from .swap.fuse import fuse, unfuse  # noqa: E402
from .swap.summary import summary  # noqa: E402
from .tuning.search import tune  # noqa: E402
from .tuning.tuning import Tuning, forget_tuning, load_tuning  # noqa: E402

__version__ = _build.version

#: Where CMake finds this installation: ``-DCMAKE_PREFIX_PATH=$(python -c "import torch_fp8; ...")``.
cmake_prefix_path = str(_Path(__file__).parent / "lib" / "cmake")


def build_info() -> dict[str, _Any]:
    """What this copy was built from and for: ``version``, ``torch`` and ``cuda`` versions (``cuda`` is None in a
    CPU-only build), the GPU ``arch``, the loaded ``cublaslt`` version, and ``note``, a sentence for people."""
    cuda = _C.toolkit_version() or None
    note = f"CUDA {cuda} kernels for sm_90a (Hopper), and the CPU backend" if cuda else ""
    return {
        "version": _build.version,
        "torch": _build.torch_version,
        "cuda": cuda,
        "arch": "sm_90a" if cuda else None,
        "cublaslt": _C.cublaslt_version() or None,
        "note": note or f"the CPU backend only: {_C.why_no_cuda()}",
    }


if not _C.toolkit_version() and _torch.cuda.is_available():
    import warnings as _warnings

    _warnings.warn(f"torch_fp8 was built with {build_info()['note']}; the GPU is of no use to it", stacklevel=2)

__all__ = [
    "MLP",
    "Activations",
    "Alarm",
    "Attention",
    "CheckpointError",
    "ConstantScaling",
    "CurrentScaling",
    "DelayedScaling",
    "FrozenLinear",
    "LayerNorm",
    "Linear",
    "Monitor",
    "QuantizationConfig",
    "RMSNorm",
    "Recipe",
    "ScaledDotProductAttention",
    "ScalingState",
    "TransformerBlock",
    "Tuning",
    "Watch",
    "activations",
    "build_info",
    "calibrate",
    "cmake_prefix_path",
    "convert",
    "disabled",
    "forget_tuning",
    "freeze",
    "fuse",
    "load_pretrained",
    "load_state_dict",
    "load_tuning",
    "monitor",
    "reduce_amaxes",
    "revert",
    "save_pretrained",
    "scaled_dot_product_attention",
    "share_input",
    "sharpness",
    "state_dict",
    "summary",
    "tune",
    "unfuse",
    "update_scales",
    "watch",
]

# Users find these here, so pickles and error messages name this module and not the file behind it.
for _name in __all__:
    if hasattr(globals()[_name], "__module__"):
        globals()[_name].__module__ = __name__
