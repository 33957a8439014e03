"""The scaling update: once per optimizer step, by itself or by hand."""

from __future__ import annotations

import itertools
import math
import re
import warnings
import weakref
from collections import defaultdict
from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import _C
from .checks import check_model
from .layers.scaled import Scaled, alive_modules, scaled_modules
from .layers.traced import traced_training
from .recipe import DelayedScaling
from .state import State


def update_scales(model: nn.Module) -> None:
    """One scaling update of every FP8 layer and attention of ``model``: roll the histories, compute the scales, clear
    the amaxes.

    Runs by itself after ``optimizer.step()`` for every layer whose step that ends; call it by hand for layers with
    ``auto_update=False``. A role that recorded nothing keeps its scale and its history. Raises ValueError where the
    model has no FP8 layer.
    """
    modules = scaled_modules(model).values()
    if not modules:
        raise ValueError(f"torch_fp8: {type(model).__name__} has no FP8 layer to update; torch_fp8.convert it first")
    _update(modules, held=modules)


class _AmaxReduction:
    """Layers whose amaxes are reduced together, in one order on all ranks."""

    _count = itertools.count()

    def __init__(self, states: Iterable[State], group: Any) -> None:
        self.group = group
        self.number = next(self._count)
        self._states = [weakref.ref(state) for state in states]

    def states(self) -> list[State]:
        found = (ref() for ref in self._states)
        return [state for state in found if state is not None and state.reduction is self]

    def run(self) -> None:
        amaxes = [state.slots[:, 2] for state in self.states()]
        sizes = [len(amax) for amax in amaxes]
        together = torch.cat(amaxes).view(torch.int32)  # magnitudes are ordered as integers, and NaN is the largest
        torch.distributed.all_reduce(together, torch.distributed.ReduceOp.MAX, self.group)
        torch._foreach_copy_(amaxes, list(together.view(torch.float32).split(sizes)))


def reduce_amaxes(model: nn.Module, group: Any = None) -> None:
    """From now on the ranks of ``group`` (a ProcessGroup; by default all) share the amaxes of ``model``'s FP8 layers:
    every scaling update first takes their maximum, in one collective for the whole model, so that all ranks have the
    same scales. Call it once on each rank, after convert and moving the model. Without it each rank follows its own
    amaxes, which is right too and spares the collective.

    Every rank must then train in every step. Copies of the model (deepcopy, pickle) are without it. Raises ValueError
    where the model has no layer with amaxes, RuntimeError where torch.distributed is not initialised.
    """
    states = [module.fp8_state for module in scaled_modules(model).values()]
    states = [state for state in states if not state.is_constant]
    if not states:
        raise ValueError(f"torch_fp8: {type(model).__name__} has no FP8 layer with amaxes; torch_fp8.convert it first")
    if not torch.distributed.is_initialized():
        raise RuntimeError("torch_fp8: there is nobody to share amaxes with: torch.distributed is not initialised")
    reduction = _AmaxReduction(states, group)
    for state in states:
        state.reduction = reduction


def _update(modules: Iterable[Scaled], held: Container[Scaled]) -> None:
    # The weights as their optimizer leaves them, where it is known to hold them: masters may be copied to others later.
    weights = {module.fp8_state: module.cast_weight() if module in held else None for module in modules}
    states = dict.fromkeys(weights)
    # A module that this rank did not use may have been used on another: all enter the collective. Several models' take
    # the order in which they were set up.
    reductions = {state.reduction for state in states} - {None}
    groups = {state.group: None for state in states if state.group is not None}
    _share_amaxes([group.end_step() for group in groups])
    for reduction in sorted(reductions, key=lambda reduction: reduction.number):
        reduction.run()
        states.update(dict.fromkeys(reduction.states()))
    by_device: dict[torch.device, list[State]] = defaultdict(list)
    for state in states:
        if not state.is_constant and not state.slots.is_meta:
            by_device[state.slots.device].append(state)
        state.was_loaded = False
    for together in by_device.values():
        _join_amaxes([state.slots[state.one_scale, 2] for state in together if state.one_scale != slice(0)])
        torch.ops.torch_fp8.update_scales_(
            [state.slots for state in together],
            [state.history for state in together],
            [target for state in together for target in state.targets],
            [power_of_two for state in together for power_of_two in state.powers_of_two],
        )
    begun = [[state for state in together if _may_have_begun(state)] for together in by_device.values()]
    for state in states:
        state.memo.end_step(weights.get(state))
    for group in groups:
        group.part_unless(states)
    for together in begun:
        _read_history(together)


_Pairs = list[tuple[torch.Tensor, torch.Tensor]]  # of amaxes: a taker's, a maker's


def _share_amaxes(steps: list[tuple[_Pairs, _Pairs]]) -> None:
    """Who took the codes of another has seen its amax, too: for all groups in one launch. In a compiled step a layer
    that recorded nothing has taken what it read; one that recorded has cast it."""
    took = [pair for step in steps for pair in step[0]]
    may_have_taken = [pair for step in steps for pair in step[1]]
    if took:
        takers, makers = zip(*took, strict=True)
        torch._foreach_maximum_(takers, makers)
    if may_have_taken:
        takers, makers = zip(*may_have_taken, strict=True)
        own, others = torch.stack(takers), torch.stack(makers)
        torch._foreach_copy_(takers, torch.where(own == 0, others, own).unbind())


def _join_amaxes(amaxes: list[torch.Tensor]) -> None:
    """Roles with one scale have one amax, the largest: for all modules in one launch."""
    if amaxes:
        largest = torch.stack(amaxes).amax(1, keepdim=True)
        torch._foreach_copy_(amaxes, list(largest.expand(-1, len(amaxes[0])).unbind()))


def _used_roles(state: State) -> int:
    """The roles that took part in training since the last scaling update, or may have, one bit each."""
    return (1 << len(state.roles)) - 1 if traced_training() else state.memo.used_roles


def _may_have_begun(state: State) -> bool:
    """A role without history was used. Where that is only a guess (compiled or captured steps), and the role may well
    be one that nobody ever uses, it is looked up at the first updates and then ever more rarely."""
    awaited = ~(state.known_roles() | state.constant_roles)
    if not awaited & (1 << len(state.roles)) - 1:
        return False
    memo = state.memo
    if (traced_training() or memo.captured) and memo.updates & (memo.updates - 1):  # not 0, 1, 2, 4, 8, ...
        return False
    return bool(_used_roles(state) & (1 << len(state.roles)) - 1 & awaited)


def _read_history(states: list[State]) -> None:
    """Bring ``has_history`` up to date, waiting for the device: in the first steps, until every role has one."""
    if not states or (states[0].slots.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    rows = torch.cat([state.slots for state in states]).tolist()
    for state in states:
        state.read_history(rows[: len(state.roles)])
        del rows[: len(state.roles)]
    for group in {state.group: None for state in states if state.group is not None}:
        group.compare()


_PATIENCE = 8  # steps of other optimizers, such as a critic's between two of a generator's


def _alive(ref: weakref.ref[Any] | None) -> bool:
    return ref is not None and ref() is not None


def _trains(model: nn.Module | None) -> bool:
    return model is not None and any(parameter.requires_grad for parameter in model.parameters())


def _learns_in_eval(module: Scaled) -> bool:
    """Its owners have gradients of a forward that recorded nothing."""
    is_delayed = isinstance(module.fp8_state.recipe, DelayedScaling)
    return is_delayed and not module.training and any(owner.grad is not None for owner in module.owners())


def _after_optimizer_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """An optimizer's step ends the step of the modules of which it holds an owner: a layer's weight or bias, what an
    attention goes with. And of those that no optimizer is known to hold: an FP8 base under adapters, the flat parameter
    of FSDP1, a model whose optimizer has float32 masters, an attention that goes with nothing. Such a module goes with
    its model, which is what ``convert`` was given. Where there is none, or the optimizer holds nothing of any FP8
    model, it goes with the thread of its last forward."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    ended: list[Scaled] = []
    unowned: list[Scaled] = []
    along: list[Scaled] = []
    in_eval = False
    for module in alive_modules():
        state = module.fp8_state
        used = module.auto_update and not state.slots.is_meta and _used_roles(state)
        if any(id(owner) in held for owner in module.owners()):
            state.optimizer, state.passed_over = weakref.ref(optimizer), 0
            if used:
                ended.append(module)
            else:
                if (weight := module.cast_weight()) is not None:
                    state.memo.see_weight(weight)  # the change is the optimizer's
                state.unused_steps += 1
                in_eval = in_eval or _learns_in_eval(module)
        elif used:
            # An owner that has not stepped for so long is alive, but not in use any more.
            state.passed_over += 1
            if state.passed_over > _PATIENCE or not _alive(state.optimizer) or not module.is_trained():
                unowned.append(module)
    models = {module: ref() if (ref := module.fp8_state.model) is not None else None for module in unowned}
    ours = {
        model: any(id(parameter) in held for parameter in model.parameters())
        for model in set(models.values())
        if model is not None
    }
    is_stranger = not ended and not any(ours.values())  # it holds parameters that nobody here knows
    for module, model in models.items():
        in_thread = module.fp8_state.memo.thread in (0, _C.this_thread())
        if is_stranger or not (module.is_trained() or _trains(model)):
            goes_along = in_thread
        else:
            goes_along = model is not None and ours[model]
        if goes_along:
            along.append(module)
    if ended or along:
        _update(ended + along, held=ended)
    if in_eval:
        warnings.warn(
            "torch_fp8: layers with DelayedScaling are trained in eval(), where nothing is recorded and tensors are "
            "scaled by their own amax, which takes longer. Call model.train() before the loop; from_pretrained gives "
            "models in eval(). Where that is meant, take CurrentScaling",
            stacklevel=2,
        )


register_optimizer_step_post_hook(_after_optimizer_step)


def state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The scaling state of a model, to be saved beside its weights and its optimizer: a dict of plain float32 tensors,
    ``"<layer>.fp8_slots"`` (3, 4) and ``"<layer>.fp8_history"`` (3, length), copied; of an attention (10, 4) and
    (10, length). Layers with ConstantScaling have none. Names are those of the model without its wrappers for
    checkpointing, FSDP1 and torch.compile."""
    return {key: tensor.detach().clone() for key, tensor in _state(model).items()}


def load_state_dict(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Restore what :func:`state_dict` gave, before or after the weights are loaded.

    Everything is checked first: on a KeyError (entries missing or surplus), TypeError or ValueError (not a float32
    tensor, another shape, values no scaling state can have, another constant scale, scales of a larger format; a model
    on the meta device) the model is as it was.
    """
    modules = scaled_modules(model)
    for name, module in modules.items():
        if module.fp8_slots.is_meta:
            module.settle()
        if module.fp8_slots.is_meta and not module.fp8_state.is_constant:
            raise ValueError(
                f"torch_fp8: {name or '(root)'} is on the meta device, where its scaling state has no values; give the "
                "model its weights first"
            )
    own = _state(model)
    if not isinstance(state, dict):
        raise TypeError(f"torch_fp8: the scaling state must be a dict of tensors, got {type(state).__name__}")
    if not all(isinstance(key, str) for key in state):
        raise TypeError("torch_fp8: the scaling state must be a dict of tensors by name, got keys that are no strings")
    state = {_plain_name(key): tensor for key, tensor in state.items()}
    missing, surplus = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or surplus:
        raise KeyError(
            f"torch_fp8: the scaling state does not fit the model: missing {_few(missing)}, surplus {_few(surplus)}; "
            "convert the model as it was converted when the state was saved"
        )
    for key, tensor in own.items():
        _check_entry(key, state[key], tensor, length=own[key.replace("fp8_slots", "fp8_history")].shape[1])
    for name, module in modules.items():
        if not module.fp8_state.is_constant:
            slots, history = (state[_key(name, part)] for part in _PARTS)
            if why := module.fp8_state.why_not(slots.detach().cpu(), history.detach().cpu()):
                raise ValueError(
                    f"torch_fp8: {_key(name, 'fp8_slots')} does not fit the model: {why}; build the model with the "
                    "options that it was saved with"
                )
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(state[key])
    for module in modules.values():
        module.fp8_state.memo.forget()  # what the host knew of the old state is void
        module.fp8_state.was_loaded = True
        _read_history([module.fp8_state])


class ScalingState:
    """The scaling state of a model as an object with ``state_dict()`` and ``load_state_dict(state)``: what accelerate's
    ``register_for_checkpointing`` and the Stateful protocol of torch.distributed.checkpoint ask for."""

    def __init__(self, model: nn.Module) -> None:
        check_model(model)
        self.model = model

    def state_dict(self) -> dict[str, torch.Tensor]:
        return state_dict(self.model)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        load_state_dict(self.model, state)


def _plain_name(name: str) -> str:
    """A name without the wrappers that hide themselves from the names of parameters, too."""
    return re.sub(r"(^|\.)(_checkpoint_wrapped_module|_fsdp_wrapped_module|_orig_mod)(?=\.)", "", name).lstrip(".")


_PARTS = ("fp8_slots", "fp8_history")


def _key(name: str, part: str) -> str:
    return _plain_name(f"{name}.{part}" if name else part)


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        _key(name, part): getattr(module, part)
        for name, module in scaled_modules(model).items()
        if not module.fp8_state.is_constant
        for part in _PARTS
    }


def _few(names: list[str]) -> str:
    return "none" if not names else ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _check_entry(key: str, value: Any, own: torch.Tensor, length: int) -> None:
    if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
        what = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        raise TypeError(f"torch_fp8: {key} must be a float32 tensor, got {what}")
    if value.is_nested or value.layout != torch.strided or value.is_meta:
        kind = "nested" if value.is_nested else "meta" if value.is_meta else value.layout
        raise TypeError(f"torch_fp8: {key} must be a dense tensor with values, got a {kind} one")
    if value.shape != own.shape:
        hint = "" if key.endswith("slots") else "; the recipe's amax_history_len must be the one it was saved with"
        raise ValueError(f"torch_fp8: {key} must have shape {list(own.shape)}, got {list(value.shape)}{hint}")
    value = value.detach().cpu()
    if key.endswith("history"):
        sound = bool((value.isfinite() & (value >= 0)).all())
    else:
        scale_inv, scale, amax, cursor = value.unbind(1)
        sound = bool(
            ((scale >= 2.0**-126) & (scale <= 2.0**126) & (scale_inv == 1 / scale)).all()
            and ((amax >= 0) & ~amax.signbit() | amax.isnan()).all()
            and ((cursor >= 0) & (cursor <= length) & (cursor == cursor.round())).all()
        )
    if not sound:
        raise ValueError(f"torch_fp8: {key} holds values that no scaling state has: the checkpoint is damaged")


def scales(module: Scaled) -> dict[str, float]:
    """The current scale of each role of a module; NaN where a role has no history and so no scale of its own yet."""
    state = module.fp8_state
    names = [role.name for role in state.roles]
    if state.slots.is_meta:
        return dict.fromkeys(names, math.nan)
    rows = state.slots.detach().tolist()
    return {
        role.name: row[1] if role.constant or row[3] > 0 else math.nan for role, row in zip(state.roles, rows)
    }  # fmt: skip
