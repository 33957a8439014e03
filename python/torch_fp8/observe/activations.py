"""What activations look like while a model trains: kurtosis, size and outliers by layer, in float32; norms of
gradients; sharpness of the last token's logits.

arXiv 2505.20524 sees runs in FP8 diverge long after the kurtosis of their activations has left its healthy growth.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layers.dtensor import is_dtensor
from ..layers.mlp import Look
from ..layers.transforms import is_transformed
from ..table import html, plain
from .points import Point, Points, clean, find_points, named_points, unwrapped
from .sampled import Hook, Sampled, check_writer
from .sharpness import sharpness


class Reading(NamedTuple):
    """One sampled step."""

    step: int  # optimizer steps before it
    tokens: int | None  # seen when it ended; None: nobody counts them
    values: dict[str, float]  # by tag: "kurtosis/qkv/layers.0.attention", "grad_norm/NAME", "sharpness", "loss"


def activations(
    model: nn.Module, every: int = 100, *, points: Points | None = None, tau: float = 10.0, writer: Any = None
) -> Activations:
    """Measure the activations of ``model`` in the next optimizer step and in each ``every``-th after it. The result is
    an :class:`Activations`: ``print`` it for the latest reading, or see its methods.

    Takes any decoder: plain PyTorch, transformers', after ``convert`` and ``fuse``, compiled (its sampled steps run
    uncompiled), under FSDP2 and DDP, where each rank measures its own tokens. Points are found by name and structure:

    * ``qkv``: the outputs of q, k and v side by side, or of the layer that gives all three, before any norm of them.
    * ``ffn``: what the second projection of an FFN reads.
    * ``block``: the outputs of the decoder's layers.

    At each of them, over the micro-batches of the step, with x (sequences, tokens, features) in float32 and a tensor of
    two dimensions taken for one sequence:

    * ``kurtosis``: mean(x^4) / mean(x^2)^2 over tokens and features together, averaged over sequences, as the code of
      arXiv 2505.20524 has it: 3 for normal numbers, at most tokens * features. ``kurtosis_token``: of each token's
      features, averaged over tokens. What is zero throughout has none, and is left out.
    * ``rms`` and ``mean`` of all elements.
    * ``outliers``: the share of elements with |x| >= tau * rms of their sequence; ``peak``: max |x| / rms, the largest
      over sequences, which is the largest tau that has an outlier.

    And once a step ``grad_norm`` of each parameter that has a gradient, and of all together, as the optimizer is given
    them, so after clipping; ``loss``, where the model returns it (mean over micro-batches, or their sum where the model
    is given ``num_items_in_batch``); ``sharpness`` of the last token's logits (:func:`sharpness`, mean over sequences),
    where the model has a head and is given ``labels`` or ``targets``.

    points: other places, or more kinds of them: {kind: pattern or patterns of modules' names}. The output of the
        modules is measured, or what they read where the pattern ends in ":input". Patterns in one list are parts of one
        activation. Kinds that are not named are looked for as above; an empty dict is no name.
    tau: of ``outliers``. writer: what has ``add_scalar(tag, value, step)``, such as TensorBoard's ``SummaryWriter``.

    Call it after ``convert`` and ``fuse``. Nothing of it is left on the model between samples, and the numbers of
    training are the same to the bit, but for what a compiler changes; from now on until the first step's end, and in
    every sampled step, compiled code runs eagerly. A fused MLP computes the input of its last layer once more then. A
    forward that backward repeats counts once; a step that a GradScaler skips is measured together with the next one,
    but is a step of its own where the optimizer is fused; ``eval()`` and ``no_grad`` are not seen, nor are CUDA graphs'
    replays. Of a DTensor the local part is measured.

    Raises ValueError where no point is found, a pattern matches nothing, every is not positive or tau is negative."""
    return Activations(model, every, points=points, tau=tau, writer=writer)


class Activations(Sampled):
    """What :func:`activations` gives. ``readings`` grows by one with each sample: a named tuple of ``step``, ``tokens``
    (None here) and ``values`` by tag, such as ``"kurtosis/qkv/layers.0.attention"``."""

    def __init__(
        self, model: nn.Module, every: int = 100, *, points: Points | None = None, tau: float = 10.0, writer: Any = None
    ) -> None:
        if not (isinstance(tau, float | int) and tau >= 0):
            raise ValueError(f"torch_fp8: tau must be a number that is not negative, got {tau!r}")
        check_writer(writer)
        self.tau, self.writer = float(tau), writer
        self.readings: list[Reading] = []
        self._points = points or {}
        self._tags = [point.tag for point in self._find(model)]
        self._counts: dict[str, _Count] = {}  # of this step, still on the device
        self._gradients: tuple[list[str], Tensor | None] = [], None
        self._noted: dict[str, list[Tensor]] = {}  # loss and sharpness of the micro-batches
        self._losses_are_shares = False  # of the step's
        self._without = 0  # so many samples in a row had no reading
        self._sees_sharpness = _sees_sharpness(model)
        super().__init__(model, every)

    def _find(self, model: nn.Module) -> list[Point]:
        named = named_points(model, self._points)
        found = [*(point for point in find_points(model) if point.kind not in self._points), *named]
        if not found:
            raise ValueError(
                f"torch_fp8: {type(model).__name__} has no point that is known: neither q, k and v, nor the second "
                "projection of an FFN, nor a list of layers with them; name some by points={kind: pattern}"
            )
        return found

    # ---- sampling ----------------------------------------------------------------------------------------------------

    def _hang(self, model: nn.Module) -> Iterator[Any]:
        self._counts.clear()
        self._noted.clear()
        for point in self._find(model):  # anew each time, since modules may be exchanged
            count = self._counts[point.tag] = _Count(self.tau, len(point.modules))
            for i, module in enumerate(point.modules):
                if point.is_input:
                    look = Look(count.wants, count.seer(i))
                    yield module.register_forward_pre_hook(look, with_kwargs=True)
                else:
                    yield module.register_forward_hook(Hook(_after(count, i)))
        inner = unwrapped(model)
        logits: list[Tensor] = []
        if (head := _head_of(inner)) is not None:
            yield head.register_forward_hook(Hook(_keep_last(logits)))
        yield inner.register_forward_hook(Hook(self._after_model(logits)), with_kwargs=True)

    def _after_model(self, logits: list[Tensor]) -> Callable[..., None]:
        def hook(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            if not in_training_forward(model):
                logits.clear()
                return
            if (loss := _loss_of(out)) is not None:
                self._noted.setdefault("loss", []).append(loss.detach().to(torch.float32))
                given = {**dict(zip(_parameters_of(model), args)), **kwargs}
                self._losses_are_shares = given.get("num_items_in_batch") is not None
            of_last = _targets_of(model, args, kwargs)
            if (returned := _logits_of(out)) is not None:
                logits.append(_last_of(returned))
            if logits and of_last is not None:
                targets, shift = of_last
                last = logits[-1][:, -1 - shift] if logits[-1].shape[1] > shift else None
                if last is not None and last.shape[0] == targets.shape[0]:
                    targets = targets.to(last.device)
                    known = (targets >= 0) & (targets < last.shape[-1])  # others are to be ignored
                    sharp = sharpness(last, targets.clamp(0, last.shape[-1] - 1))
                    self._noted.setdefault("sharpness", []).append(sharp.where(known, math.nan).nanmean())
            logits.clear()

        return hook

    def _before_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        names, squares = _gradient_norms(model)
        scale = getattr(optimizer, "grad_scale", None)  # that a GradScaler tells a fused optimizer
        if squares is not None and scale is not None:
            squares = squares / torch.as_tensor(scale, dtype=torch.float64, device=squares.device).square()
        self._gradients = names, squares

    def _after_sample(self) -> None:
        if self._has_begun():
            self._new_reading(Reading(self.step, self._tokens_so_far(), self._values()))
        self._without = 0 if self._has_begun() else self._without + 1
        if self._without == 2:
            warnings.warn(
                "torch_fp8: nothing of the model was seen in two sampled steps: only forwards in training mode are "
                "(model.train()), with gradients, and not replayed from a CUDA graph",
                stacklevel=2,
            )
        self._counts.clear()
        self._gradients = [], None

    def _has_begun(self) -> bool:
        return any(count.is_begun for count in self._counts.values())

    def _tokens_so_far(self) -> int | None:
        """With those of the step that ends."""
        return None

    def _values(self) -> dict[str, float]:
        """Brings everything to the host at once."""
        begun = {tag: count.sums for tag, count in self._counts.items() if count.is_begun}
        noted = {
            tag: torch.stack(values).nanmean() if tag == "sharpness" else torch.stack(values).mean()
            for tag, values in self._noted.items()
        }
        if "loss" in noted and self._losses_are_shares:
            noted["loss"] = torch.stack(self._noted["loss"]).sum()
        names, norms = self._gradients
        parts = [*begun.values(), *(value.reshape(1) for value in noted.values()), *([] if norms is None else [norms])]
        device = parts[0].device
        flat = torch.cat([part.to(device, torch.float64, non_blocking=True) for part in parts]).tolist()
        values: dict[str, float] = {}
        for tag in begun:
            of_point, flat = flat[:_SUMS], flat[_SUMS:]
            values |= {f"{metric}/{tag}": value for metric, value in _metrics(of_point).items()}
        of_model, squares = dict(zip(noted, flat)), flat[len(noted) :]
        values |= {tag: value for tag, value in of_model.items() if not (tag == "sharpness" and math.isnan(value))}
        if names:
            values["grad_norm"] = math.sqrt(sum(squares))
            values |= {f"grad_norm/{name}": math.sqrt(square) for name, square in zip(names, squares, strict=True)}
        return values

    def _new_reading(self, reading: Reading) -> None:
        self.readings.append(reading)
        if (writer := self.writer) is not None:

            def write() -> None:
                for tag, value in reading.values.items():
                    writer.add_scalar(f"activations/{tag}", value, reading.step)

            self._or_give_up("writer", write)

    # ---- results -----------------------------------------------------------------------------------------------------

    @property
    def found(self) -> str:
        """Which points were found, and what of the model cannot be measured, in words."""
        kinds: dict[str, list[str]] = {}
        for tag in self._tags:
            kind, _, layer = tag.partition("/")
            kinds.setdefault(kind, []).append(layer)
        lines = [f"{kind}: {len(layers)}, {layers[0]} to {layers[-1]}" for kind, layers in kinds.items()]
        lines += [f"{kind}: none found; name them by points=" for kind in ("qkv", "ffn", "block") if kind not in kinds]
        sharp = self._sees_sharpness or (self.readings and "sharpness" in self.readings[-1].values)
        lines += [] if sharp else [f"sharpness: not available; {_NO_SHARPNESS}"]
        if self.readings:
            seen = {tag.partition("/")[2] for tag in self.readings[-1].values}
            unseen = [tag for tag in self._tags if tag not in seen]
            lines += [f"not seen in the last sample: {', '.join(unseen)}"] if unseen else []
        return "\n".join(lines)

    def __str__(self) -> str:
        """The latest reading as a table, a line a point."""
        if not self.readings:
            return f"{_NOTHING}\n{self.found}"
        return (
            f"step {self.readings[-1].step}{self._of_model()}\n{plain(_HEAD, self._cells(), range(1, 7))}\n{self.found}"
        )

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        if not self.readings:
            return f"<p>{_NOTHING}</p>"
        return f"<p>step {self.readings[-1].step}{self._of_model()}</p>{html(_HEAD, self._cells())}"

    def _of_model(self) -> str:
        values = self.readings[-1].values
        return "".join(f", {tag} {values[tag]:.4g}" for tag in ("loss", "grad_norm", "sharpness") if tag in values)

    def _cells(self) -> list[tuple[str, ...]]:
        values = self.readings[-1].values
        seen = [tag for tag in self._tags if f"rms/{tag}" in values]
        return [
            (tag, *(f"{values[key]:.4g}" if (key := f"{metric}/{tag}") in values else "" for metric in METRICS))
            for tag in seen
        ]


METRICS = ("kurtosis", "kurtosis_token", "rms", "mean", "outliers", "peak")
_HEAD = ("point", *METRICS)
_NOTHING = "torch_fp8.activations: no step was sampled yet (CUDA graphs' replays run no hooks)"
_NO_SHARPNESS = "it takes a head (lm_head, head, output, ...) and a forward with labels or targets"


class _Count:
    """What a step's forwards have at one point, as sums on the device. A recomputed forward is not counted again:
    within backward a point counts only if it was seen nowhere else, as under reentrant checkpointing."""

    def __init__(self, tau: float, parts: int) -> None:
        self.tau, self.is_begun = tau, False
        self.sums: Tensor
        self._outside = False  # seen outside of backward
        self._parts: list[Tensor | None] = [None] * parts

    def wants(self, module: nn.Module) -> bool:
        if not _trains(module):
            return False
        if _in_forward():
            self._outside = True
            return True
        return not self._outside

    def seer(self, part: int) -> Callable[[Any], None]:
        return lambda x: self.see(part, x)

    def see(self, part: int, x: Any) -> None:
        if not isinstance(x, Tensor) or is_transformed(x) or x.is_nested or not x.is_floating_point():
            return
        x = x.to_local() if is_dtensor(x) else x  # type: ignore[attr-defined]
        if not x.numel() or x.dim() < 2 or x.is_meta:
            return
        self._parts[part] = x.detach()
        if all(held is not None for held in self._parts):
            together = [held for held in self._parts if held is not None]
            self._parts = [None] * len(together)
            alike = len({held.shape[:-1] for held in together}) == 1
            for tensors in [together] if alike else [[held] for held in together]:
                self._add(measure(tensors, self.tau))

    def _add(self, sums: Tensor) -> None:
        if self.is_begun:
            peak = torch.maximum(self.sums[-1:], sums[-1:])
            sums = torch.cat([self.sums[:-1] + sums[:-1], peak])
        self.sums, self.is_begun = sums, True


_SUMS = 9


@torch.no_grad()
def measure(tensors: Sequence[Tensor], tau: float) -> Tensor:
    """Sums over tensors ([sequences,] tokens, features_i) taken side by side, float64 (9): of kurtoses of sequences,
    and how many there were; the same of tokens; of squares, of elements, how many; outliers; the largest peak."""
    with torch.autocast(tensors[0].device.type, enabled=False):
        xs = [x.reshape(x.shape[0] if x.dim() > 2 else 1, -1, x.shape[-1]) for x in tensors]
        wide = torch.promote_types(xs[0].dtype, torch.float32)
        # One reading of each tensor, with no copy of it: norms and sums are accumulated in float32.
        second = sum(torch.linalg.vector_norm(x, 2, -1, dtype=wide).double().square() for x in xs)
        fourth = sum(torch.linalg.vector_norm(x, 4, -1, dtype=wide).double().pow(4) for x in xs)
        total = sum(x.sum((-1, -2), dtype=wide).double().sum() for x in xs)
        assert isinstance(second, Tensor) and isinstance(fourth, Tensor) and isinstance(total, Tensor)
        features, elements = sum(x.shape[-1] for x in xs), sum(x.numel() for x in xs)
        of_tokens = features * fourth / second.square()
        squares, fourths = second.sum(1), fourth.sum(1)
        of_sequences = features * second.shape[1] * fourths / squares.square()
        rms = (squares / (features * second.shape[1])).sqrt()
        limit = (tau * rms).masked_fill(rms == 0, math.inf).to(wide)[:, None, None]
        outliers = sum((x.abs() >= limit).sum() for x in xs)
        largest = torch.stack([torch.linalg.vector_norm(x, math.inf, (1, 2), dtype=wide) for x in xs]).amax(0)
        sums = [
            *_sum_of_defined(of_sequences, squares), *_sum_of_defined(of_tokens, second), squares.sum(), total,
            second.new_full((), elements), outliers, (largest / rms).where(rms > 0, 0.0).amax(),
        ]  # fmt: skip
        return torch.stack([torch.as_tensor(value, device=second.device).double() for value in sums])


def _sum_of_defined(kurtoses: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros have no kurtosis. What is not finite has one that is not."""
    zero = squares == 0
    return kurtoses.masked_fill(zero, 0.0).sum(), (~zero).sum()


def _metrics(sums: Sequence[float]) -> dict[str, float]:
    kurtosis, sequences, of_tokens, tokens, squares, total, elements, outliers, peak = sums
    found = {"kurtosis": kurtosis / sequences} if sequences else {}
    found |= {"kurtosis_token": of_tokens / tokens} if tokens else {}
    return found | {
        "rms": math.sqrt(squares / elements), "mean": total / elements, "outliers": outliers / elements, "peak": peak,
    }  # fmt: skip


def _trains(module: nn.Module) -> bool:
    if not (module.training and torch.is_grad_enabled()):
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())  # or every replay would count


def _in_forward() -> bool:
    return torch._C._current_graph_task_id() == -1


def in_training_forward(module: nn.Module) -> bool:
    """Whether a call of the module now is one of a step, and not one that backward repeats."""
    return _trains(module) and _in_forward()


def _after(count: _Count, part: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if count.wants(module):
            count.see(part, out[0] if isinstance(out, tuple | list) and out else out)

    return hook


# ---- the model as a whole --------------------------------------------------------------------------------------------

_HEADS = ("lm_head", "embed_out", "output", "head", "unembed", "output_layer")


def _head_of(model: nn.Module) -> nn.Module | None:
    return next((model._modules[name] for name in _HEADS if isinstance(model._modules.get(name), nn.Module)), None)


def _sees_sharpness(model: nn.Module) -> bool:
    inner = unwrapped(model)
    return _head_of(inner) is not None and bool(_TARGETS.keys() & set(_parameters_of(inner)))


def _keep_last(kept: list[Tensor]) -> Callable[..., None]:
    """Of each sequence the logits of the last two tokens: their targets may be shifted by one."""

    def hook(head: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if _is_logits(out) and in_training_forward(head):
            kept.append(_last_of(out))

    return hook


def _is_logits(out: Any) -> bool:
    return isinstance(out, Tensor) and not is_dtensor(out) and out.dim() == 3


def _last_of(logits: Tensor) -> Tensor:
    return logits.detach()[:, -2:].to(torch.float32, copy=True)


def _logits_of(out: Any) -> Tensor | None:
    """What the model returns under that name: it may have capped or scaled what its head gave."""
    logits = out.get("logits") if isinstance(out, dict) else getattr(out, "logits", None)
    return logits if _is_logits(logits) else None


# A forward's parameter, and by how much later than its token a target stands there: transformers shifts labels itself.
_TARGETS = {"labels": 1, "targets": 0, "target": 0}


def _parameters_of(model: nn.Module) -> list[str]:
    try:
        return list(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        return []


def _targets_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, int] | None:
    """The last target of each sequence, and how many tokens before the last one it belongs to."""
    given = {**dict(zip(_parameters_of(model), args)), **kwargs}
    for name, shift in _TARGETS.items():
        targets = given.get(name)
        if isinstance(targets, Tensor) and targets.dim() == 2 and targets.shape[1] and not is_dtensor(targets):
            return targets[:, -1].long(), shift
    return None


def _loss_of(out: Any) -> Tensor | None:
    """A number that can be differentiated, under the name "loss" or as what the model returns."""
    candidates = [getattr(out, "loss", None), out.get("loss") if isinstance(out, dict) else None, out]
    candidates += list(out) if isinstance(out, tuple | list) else []
    for value in candidates:
        if isinstance(value, Tensor) and value.dim() == 0 and value.requires_grad and not is_dtensor(value):
            return value
    return None


@torch.no_grad()
def _gradient_norms(model: nn.Module) -> tuple[list[str], Tensor | None]:
    """Names of parameters, and the squares of their gradients' norms, float64, on one device. Of a DTensor's gradient
    it is that of the whole, for which its ranks come together."""
    names: list[str] = []
    local: list[Any] = []
    meshes: dict[Any, list[int]] = {}
    for name, parameter in model.named_parameters():
        gradient: Any = getattr(parameter, "main_grad", None) if parameter.grad is None else parameter.grad
        if gradient is None or gradient.is_sparse or gradient.is_meta or not gradient.is_floating_point():
            continue
        if is_dtensor(gradient):
            meshes.setdefault((gradient.device_mesh, gradient.placements), []).append(len(names))
        names.append(clean(name))
        local.append(gradient.to_local() if is_dtensor(gradient) else gradient)
    if not names:
        return [], None
    wide = torch.float64 if any(gradient.dtype == torch.float64 for gradient in local) else torch.float32
    norms = torch._foreach_norm(local, 2, wide)
    device = norms[0].device
    squares = torch.stack([norm.to(device) for norm in norms]).double().square()
    for (mesh, placements), where in meshes.items():
        of_mesh = squares[where]
        for dim, place in enumerate(placements):
            if place.is_shard():
                torch.distributed.all_reduce(of_mesh, group=mesh.get_group(dim))
        squares[where] = of_mesh
    return names, squares
