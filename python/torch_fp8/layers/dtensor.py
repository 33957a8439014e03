"""A layer whose weight is a DTensor, and an attention of DTensors: tensor and sequence parallelism as
``parallelize_module`` arranges them.

Each rank runs the ordinary layer on its local tensors. The scaling state is every rank's own; ``reduce_amaxes`` over
the tensor-parallel group makes it what one process would have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from .linear import Layer


def is_dtensor(tensor: object) -> bool:
    # By its attribute: importing the class takes as long as the rest of PyTorch.
    return type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "device_mesh")


def linear(layer: Layer, x: Tensor) -> Tensor:
    """``layer(x)`` as a DTensor, by how the weight (out, in) lies on its one-dimensional mesh:

    * Shard(0), column-wise: x is replicated, y sharded in its last dimension, dx a partial sum.
    * Shard(1), row-wise: x is sharded in its last dimension, y a partial sum. The bias enters on one rank.
    * Replicate: y lies as x does, in any dimension but the last.

    x: a DTensor on that mesh, which is redistributed where it lies otherwise. Raises NotImplementedError for a mesh of
    more dimensions, another placement, or fuse_main_grad; TypeError for a plain x, as ``nn.Linear`` does: nobody has
    said that it is the same on all ranks, and it may have come past FSDP2's hooks.
    """
    from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

    weight: DTensor
    bias: DTensor | None
    weight, bias = layer.matrix, layer.bias  # type: ignore[assignment]
    mesh, placements = weight.device_mesh, weight.placements
    if len(placements) != 1 or placements[0] not in (Shard(0), Shard(1), Replicate()):
        raise NotImplementedError(
            f"torch_fp8: an FP8 layer's weight can be sharded over one mesh dimension, by rows or by columns, got "
            f"{placements}; leave this layer out of convert, or out of the parallelize plan"
        )
    if layer.fuse_main_grad:
        raise NotImplementedError(
            "torch_fp8: fuse_main_grad needs a plain weight, got a DTensor; convert without fuse_main_grad"
        )
    if not is_dtensor(x):
        raise TypeError(
            f"torch_fp8: a layer whose weight is a DTensor ({placements}) needs a DTensor as input, got "
            f"{type(x).__name__}; name the layer in the parallelize plan, or, under FSDP2, call the module that "
            "fully_shard was given"
        )
    assert isinstance(x, DTensor)
    last = x.dim() - 1
    place: Placement = x.placements[0]
    y_place: Placement
    weight_grad: Placement

    if placements[0] == Shard(0):
        x_local = x.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        y_place, weight_grad = Shard(last), Shard(0)
    elif placements[0] == Shard(1):
        x_local = x.redistribute(placements=[Shard(last)]).to_local()
        y_place, weight_grad = Partial(), Shard(1)
    else:
        if place == Shard(last) or place.is_partial():
            x, place = x.redistribute(placements=[Replicate()]), Replicate()
        x_local = x.to_local()
        y_place, weight_grad = place, Replicate() if place.is_replicate() else Partial()

    # Through redistribute, which turns a gradient in partial sums into one that lies as the parameter does.
    weight_local = weight.redistribute(placements=placements).to_local(grad_placements=[weight_grad])
    bias_local = None
    if bias is not None:
        bias_grad = weight_grad if placements[0] != Shard(1) else Replicate()
        bias_local = bias.redistribute(placements=bias.placements).to_local(grad_placements=[bias_grad])
        if placements[0] == Shard(1) and mesh.get_local_rank() > 0:
            bias_local = bias_local - bias_local.detach()  # nothing, but with the same gradient as on the first rank
    y = layer._linear(x_local, weight_local, bias_local)
    return DTensor.from_local(y, mesh, [y_place], run_check=False)


def has_whole_heads(*heads: Any) -> bool:
    """Whether query, key and value are DTensors that lie alike, whole samples and heads of them on each rank."""
    from torch.distributed.tensor import Replicate, Shard

    lie = [(t.device_mesh, t.placements) for t in heads if is_dtensor(t)]
    if len(lie) < len(heads) or any(other != lie[0] for other in lie):
        return False
    mesh, placements = lie[0]
    parts = {0: 1, 1: 1}  # of samples and of heads
    for i, place in enumerate(placements):
        if type(place) is Shard and place.dim in parts:
            parts[place.dim] *= mesh.size(i)
        elif type(place) is not Replicate:
            return False
    return all(t.shape[dim] % count == 0 for t in heads for dim, count in parts.items())


def attention(attend: Callable[[Tensor, Tensor, Tensor], Tensor], query: Any, key: Any, value: Any) -> Tensor:
    """``attend(query, key, value)`` of each rank's own samples and heads, where ``has_whole_heads``."""
    from torch.distributed.tensor import DTensor

    y = attend(query.to_local(), key.to_local(), value.to_local())
    return DTensor.from_local(y, query.device_mesh, query.placements, run_check=False)
