"""FP8 checkpoints.

``shard`` knows files of tensors, ``folder`` what lies in a checkpoint's folder, ``scheme`` what its config says of
quantisation; ``load`` and ``save`` make models of it and back, ``quantize`` makes one checkpoint of another, tensor by
tensor, and ``inspect`` lists what is in one.

Files come from anywhere, so whatever is read is checked before it is used; a file that is not what it should be raises
:class:`CheckpointError`, which names the file and the tensor.
"""

from .errors import CheckpointError
from .pretrained import load_pretrained
from .register import QuantizationConfig, register
from .save import save_pretrained

__all__ = ["CheckpointError", "QuantizationConfig", "load_pretrained", "save_pretrained"]

register()
