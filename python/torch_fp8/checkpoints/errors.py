"""What is wrong with a checkpoint, or is not installed."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util


class CheckpointError(ValueError):
    """A file of a checkpoint is not what it should be. The message names the file, and the tensor if there is one."""

    def __init__(self, where: object, what: str) -> None:
        super().__init__(f"torch_fp8: {where}: {what}")


def need_transformers() -> None:
    """Raise ImportError, in words, where there is none, or one without what names.py and others take from it."""
    if importlib.util.find_spec("transformers") is None:
        raise ImportError(
            'torch_fp8: models are read and written by transformers, which is not installed; pip install "transformers"'
            ", or torch_fp8 with its extra of that name"
        )
    try:
        importlib.import_module(f"{__package__}.quantizer")
    except ImportError as error:
        raise ImportError(
            "torch_fp8: models are read and written by transformers, and the one that is installed, "
            f"{importlib.metadata.version('transformers')}, lacks something for that ({error}); pip install "
            '"transformers>=5.24", or torch_fp8 with its extra "transformers"'
        ) from error
