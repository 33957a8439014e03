"""The scaling update: once per optimizer step, by itself or by hand."""

from __future__ import annotations

import itertools
import weakref
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .layers.dtensor import make_state_local
from .layers.linear import ROLES, Linear, fp8_layers
from .layers.linear import layers as live_layers
from .layers.traced import traced_training
from .recipe import ConstantScaling


def update_scales(model: nn.Module) -> None:
    """One scaling update of every FP8 layer of ``model``: roll the histories, compute the scales, clear the amaxes.

    Runs by itself after ``optimizer.step()`` for every layer that took part in training since its last update; call
    it by hand for layers with ``auto_update=False``. A role that recorded nothing keeps its scale and its history.
    Raises ValueError where the model has no FP8 layer.
    """
    layers = fp8_layers(model).values()
    if not layers:
        raise ValueError(f"torch_fp8: {type(model).__name__} has no FP8 layer to update; torch_fp8.convert it first")
    _update(layers)


class _AmaxReduction:
    """Layers whose amaxes are reduced together, in one order on all ranks."""

    _count = itertools.count()

    def __init__(self, layers: Iterable[Linear], group: Any) -> None:
        self.group = group
        self.number = next(self._count)
        self._layers = [weakref.ref(layer) for layer in layers]

    def layers(self) -> list[Linear]:
        found = (ref() for ref in self._layers)
        return [layer for layer in found if layer is not None and layer._amax_reduction is self]

    def run(self) -> None:
        amaxes = [layer.fp8_slots[:, 2] for layer in self.layers()]
        together = torch.cat(amaxes).view(torch.int32)  # magnitudes are ordered as integers, and NaN is the largest
        torch.distributed.all_reduce(together, torch.distributed.ReduceOp.MAX, self.group)
        torch._foreach_copy_(amaxes, list(together.view(torch.float32).split(len(ROLES))))


def reduce_amaxes(model: nn.Module, group: Any = None) -> None:
    """From now on the ranks of ``group`` (a ProcessGroup; by default all) share the amaxes of ``model``'s FP8 layers:
    every scaling update first takes their maximum, in one collective for the whole model, so that all ranks have the
    same scales. Call it once on each rank, after convert and moving the model. Without it each rank follows its own
    amaxes, which is right too and spares the collective.

    Every rank must then train in every step. Copies of the model (deepcopy, pickle) are without it. Raises ValueError
    where the model has no layer with amaxes, RuntimeError where torch.distributed is not initialised.
    """
    layers = [layer for layer in fp8_layers(model).values() if not isinstance(layer.recipe, ConstantScaling)]
    if not layers:
        raise ValueError(f"torch_fp8: {type(model).__name__} has no FP8 layer with amaxes; torch_fp8.convert it first")
    if not torch.distributed.is_initialized():
        raise RuntimeError("torch_fp8: there is nobody to share amaxes with: torch.distributed is not initialised")
    reduction = _AmaxReduction(layers, group)
    for layer in layers:
        layer._amax_reduction = reduction


def _update(layers: Iterable[Linear]) -> None:
    layers = dict.fromkeys(layers)
    # A layer that this rank did not use may have been used on another: all enter the collective. Several models' take
    # the order in which they were set up, since the set of live layers has another one on each rank.
    reductions = {layer._amax_reduction for layer in layers} - {None}
    for reduction in sorted(reductions, key=lambda reduction: reduction.number):
        reduction.run()
        layers.update(dict.fromkeys(reduction.layers()))
    by_device: dict[torch.device, list[Linear]] = defaultdict(list)
    for layer in layers:
        if not isinstance(layer.recipe, ConstantScaling):
            by_device[layer.fp8_slots.device].append(layer)
        layer._scaling_was_loaded = False
    for group in by_device.values():
        torch.ops.torch_fp8.update_scales_(
            [layer.fp8_slots for layer in group],
            [layer.fp8_history for layer in group],
            [target for layer in group for target in layer._options.targets()],
            [int(layer.recipe.power_of_two) for layer in group],
        )
    begun = [[layer for layer in group if _may_have_begun(layer)] for group in by_device.values()]
    for layer in layers:
        layer._memo.after_update()
    for group in begun:
        _read_history(group)


def _may_have_begun(layer: Linear) -> bool:
    """A role without history was used. Where that is only a guess (compiled or captured steps), and the role may well
    be one that nobody ever uses, it is looked up at the first updates and then ever more rarely."""
    if all(layer.fp8_has_history):
        return False
    memo = layer._memo
    if (traced_training() or memo.captured) and memo.updates & (memo.updates - 1):  # not 0, 1, 2, 4, 8, ...
        return False
    used = layer.used_roles
    return any(used >> role & 1 and not known for role, known in enumerate(layer.fp8_has_history))


def _read_history(layers: list[Linear]) -> None:
    """Bring ``fp8_has_history`` up to date, waiting for the device: in the first steps, until every role has one."""
    if not layers or (layers[0].fp8_slots.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    for layer, roles in zip(layers, torch.stack([layer.fp8_slots[:, 3] for layer in layers]).gt(0).tolist()):
        layer.fp8_has_history = tuple(roles)
        layer._memo.set_history(roles)


def _after_optimizer_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    layers = [layer for layer in live_layers if layer.used_roles and layer.auto_update]
    if layers:
        _update(layers)


register_optimizer_step_post_hook(_after_optimizer_step)


def state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The scaling state of a model, to be saved beside its weights and its optimizer: a dict of plain float32 tensors,
    ``"<layer>.fp8_slots"`` (3, 4) and ``"<layer>.fp8_history"`` (3, length), copied. Layers with ConstantScaling have
    none."""
    return {key: tensor.detach().clone() for key, tensor in _state(model).items()}


def load_state_dict(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Restore what :func:`state_dict` gave, before or after the weights are loaded.

    Everything is checked first: on a KeyError (entries missing or surplus), TypeError or ValueError (not a float32
    tensor, another shape, values no scaling state can have) the model is as it was.
    """
    own = _state(model)
    if not isinstance(state, dict):
        raise TypeError(f"torch_fp8: the scaling state must be a dict of tensors, got {type(state).__name__}")
    missing, surplus = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or surplus:
        raise KeyError(
            f"torch_fp8: the scaling state does not fit the model: missing {_few(missing)}, surplus {_few(surplus)}; "
            "convert the model as it was converted when the state was saved"
        )
    for key, tensor in own.items():
        _check_entry(key, state[key], tensor, length=own[key.replace("fp8_slots", "fp8_history")].shape[1])
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(state[key])
    for layer in fp8_layers(model).values():
        layer._memo.forget()  # what the host knew of the old state is void
        layer._scaling_was_loaded = True
        _read_history([layer])


class ScalingState:
    """The scaling state of a model as an object with ``state_dict()`` and ``load_state_dict(state)``: what accelerate's
    ``register_for_checkpointing`` and the Stateful protocol of torch.distributed.checkpoint ask for."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, torch.Tensor]:
        return state_dict(self.model)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        load_state_dict(self.model, state)


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    for layer in fp8_layers(model).values():
        make_state_local(layer)
    return {
        f"{name}.{buffer}" if name else buffer: getattr(layer, buffer)
        for name, layer in fp8_layers(model).items()
        if not isinstance(layer.recipe, ConstantScaling)
        for buffer in ("fp8_slots", "fp8_history")
    }


def _few(names: list[str]) -> str:
    return "none" if not names else ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _check_entry(key: str, value: Any, own: torch.Tensor, length: int) -> None:
    if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
        what = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        raise TypeError(f"torch_fp8: {key} must be a float32 tensor, got {what}")
    if value.shape != own.shape:
        hint = "" if key.endswith("slots") else "; the recipe's amax_history_len must be the one it was saved with"
        raise ValueError(f"torch_fp8: {key} must have shape {list(own.shape)}, got {list(value.shape)}{hint}")
    value = value.detach().cpu()
    if key.endswith("history"):
        sound = bool((value.isfinite() & (value >= 0)).all())
    else:
        scale_inv, scale, amax, cursor = value.unbind(1)
        sound = bool(
            (scale.isfinite() & (scale > 0) & (scale_inv == 1 / scale)).all()
            and ((amax >= 0) | amax.isnan()).all()
            and ((cursor >= 0) & (cursor <= length) & (cursor == cursor.round())).all()
        )
    if not sound:
        raise ValueError(f"torch_fp8: {key} holds values that no scaling state has: the checkpoint is damaged")


def scales(layer: Linear) -> dict[str, float]:
    """The current scale of each role of a layer; NaN where a role has no history and so no scale of its own yet."""
    if layer.fp8_slots.is_meta:
        return dict.fromkeys(ROLES, float("nan"))
    slots = layer.fp8_slots.detach().cpu()
    has_scale = (slots[:, 3] > 0) | torch.tensor(isinstance(layer.recipe, ConstantScaling))
    return {role: slots[i, 1].item() if has_scale[i] else float("nan") for i, role in enumerate(ROLES)}
