"""A look at what the scaling does: per layer and role scale, amax, and what the casts lose."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import _C
from ..files import StrPath, replacing
from ..layers.attention import ScaledDotProductAttention
from ..layers.dtensor import is_dtensor
from ..layers.linear import SUPPORTED_DTYPES, Layer
from ..layers.scaled import Scaled, scaled_modules
from ..state import Role
from ..table import html, plain
from .sampled import Hook, Sampled, check_writer


@dataclass(frozen=True)
class Sample:
    """One role of one layer or attention in one step: counts over all its micro-batches, in elements. Where elements is
    0 nothing was counted, for the tensor was there within a kernel alone: scale and amax are known."""

    step: int  # optimizer steps since the monitor began
    layer: str
    role: str  # "input", "weight" or "grad_output"; "q", "k", "v", "p", "o", "grad_o", ... "grad_v"
    scale: float  # of the last cast; x is multiplied by it
    amax: float  # of |x|
    fp8_max: float
    elements: int
    saturated: int  # |x * scale| > fp8_max, Inf not included
    flushed: int  # not zero before the cast, and zero after it
    inf: int
    nan: int

    @property
    def unused_binades(self) -> float:
        """log2 of how much larger the scale could have been."""
        return math.log2(self.fp8_max / (self.amax * self.scale)) if 0 < self.amax < math.inf else 0.0

    def share(self, count: int) -> float:
        """What of all elements that is."""
        return count / max(1, self.elements)

    @property
    def verdict(self) -> str:
        if not self.elements:
            high = -self.unused_binades
            return f"saturates: the scale is {high:.1f} binades high" if high >= 0.05 else ""
        if self.nan or self.inf:
            return f"{self.nan} NaN, {self.inf} Inf"
        if self.saturated:
            binades = -self.unused_binades
            beyond = f"{binades:.1f} binades" if binades >= 0.05 else "less than 0.1 binade"
            return f"saturates {self.saturated / self.elements:.2g}: the scale is {beyond} high"
        if self.amax == 0:
            return "only zeros"
        if self.flushed > 0.01 * self.elements:
            return f"{self.flushed / self.elements:.1%} become zero"
        return "scale far too small" if self.unused_binades > 8 else ""


def monitor(model: nn.Module, every: int = 100, writer: Any = None) -> Monitor:
    """Sample the FP8 layers and attentions of ``model`` in the next optimizer step and in each ``every``-th after it.
    The result is a :class:`Monitor`: ``print`` it for the latest sample, or see its methods.

    Between samples nothing of it is left on the layers. In a sampled step every cast is preceded by one more reading of
    its tensor. What attention casts within its kernels (p, o, grad_p, grad_q, grad_k, grad_v) is not counted; its scale
    and amax are reported once it has a history. writer: what has ``add_scalar(tag, value, step)``, such as
    TensorBoard's ``SummaryWriter``; each sample is written to it. Recomputed forwards (activation checkpointing) are
    counted again, which leaves shares as they are. A compiled model runs its sampled steps uncompiled
    (``torch.compiler.set_stance``); steps replayed from a CUDA graph cannot be sampled. Raises ValueError where the
    model has no FP8 layer or every is not positive.
    """
    return Monitor(model, every, writer)


class Monitor(Sampled):
    """What :func:`monitor` gives. ``samples`` grows by three records a layer with each sample, and by up to ten an
    attention."""

    def __init__(self, model: nn.Module, every: int = 100, writer: Any = None) -> None:
        self._layers = {name: weakref.ref(layer) for name, layer in scaled_modules(model).items()}
        if not self._layers:
            raise ValueError(
                f"torch_fp8: {type(model).__name__} has no FP8 layer to monitor; torch_fp8.convert it first"
            )
        check_writer(writer)
        self.writer = writer
        self._samples: list[Sample] = []
        self._pending: dict[tuple[int, str, str], _Count] = {}  # still on the device
        super().__init__(model, every)

    # ---- sampling ----------------------------------------------------------------------------------------------------

    def _hang(self, model: nn.Module) -> Iterator[Any]:
        for name, ref in self._layers.items():
            layer = ref()
            if isinstance(layer, ScaledDotProductAttention):
                yield layer.register_forward_hook(Hook(self._after_attention(name)), with_kwargs=True)
            if isinstance(layer, Layer):
                yield layer.register_forward_pre_hook(Hook(self._before_forward(name)), with_kwargs=True)
                yield layer.register_forward_hook(Hook(self._after_forward(name)))

    def _before_forward(self, name: str) -> Callable[..., None]:
        def hook(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if _records(layer):
                self._count(name, layer, "input", args[0] if args else kwargs.get("input"))
                if (self.step, name, "weight") not in self._pending:
                    self._count(name, layer, "weight", layer.weight)

        return hook

    def _after_forward(self, name: str) -> Callable[..., None]:
        def hook(layer: Layer, args: tuple[Any, ...], out: Tensor) -> None:
            if _records(layer) and out.requires_grad:
                out.register_hook(lambda dy: self._count(name, layer, "grad_output", dy))

        return hook

    def _after_attention(self, name: str) -> Callable[..., None]:
        def hook(layer: ScaledDotProductAttention, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
            mode = layer.last[0] if layer.last else "16bit"
            if mode == "16bit" or not _records(layer):
                return
            given = {**dict(zip(("query", "key", "value"), args)), **kwargs}
            tensors = [given["query"], given["key"], given["value"]]
            for role, x in zip(("q", "k", "v"), tensors):
                self._count(name, layer, role, x)
            self._note(name, layer, ("p", "o"))
            read = next((x for x in tensors if x.requires_grad), None)
            if mode == "fp8" and read is not None and out.requires_grad:
                out.register_hook(lambda dy: self._count(name, layer, "grad_o", dy))
                # Its gradient is there once attention's backward has run.
                read.register_hook(lambda _: self._note(name, layer, ("grad_p", "grad_q", "grad_k", "grad_v")))

        return hook

    def _note(self, name: str, layer: Scaled, roles: Iterable[str]) -> None:
        """What the slots know of tensors that nobody else sees."""
        state = layer.fp8_state
        for i, role in enumerate(state.roles):
            if role.name in roles and role.cast.scaling == _C.Scaling.delayed and state.has_history[i]:
                nothing = torch.zeros(4, dtype=torch.int64, device=state.slots.device)
                self._pending_of(name, role).add(0, nothing, state.slots[i, 1:3].clone())

    def _pending_of(self, name: str, role: Role) -> _Count:
        return self._pending.setdefault((self.step, name, role.name), _Count(torch.finfo(role.cast.dtype).max))

    def _count(self, name: str, layer: Scaled, role_name: str, x: Any) -> None:
        if not _is_countable(x):
            return  # the layer itself refuses it, in its words
        x = x.to_local() if is_dtensor(x) else x.detach()
        state = layer.fp8_state
        index, role = next((i, role) for i, role in enumerate(state.roles) if role.name == role_name)
        cast = role.cast
        with torch.no_grad():
            counts, values = torch.ops.torch_fp8.count_losses(
                x, state.slots, index, cast.dtype,
                own_amax=cast.scaling == _C.Scaling.current
                or (cast.scaling == _C.Scaling.delayed and not state.has_history[index]),
                power_of_two=cast.power_of_two, margin=cast.margin,
            )  # fmt: skip
            self._pending_of(name, role).add(x.numel(), counts, values)

    def _after_sample(self) -> None:
        if self.writer is not None and self._pending:
            self._or_give_up("writer", lambda: self.write(self.writer))

    # ---- results -----------------------------------------------------------------------------------------------------

    @property
    def samples(self) -> list[Sample]:
        """All samples so far, in order. Waits for the device if the last step was sampled."""
        if self._pending:
            counts = torch.stack([count.counts for count in self._pending.values()]).tolist()
            values = torch.stack([count.values for count in self._pending.values()]).tolist()
            for key, count, (saturated, flushed, inf, nan), (scale, amax) in zip(
                self._pending, self._pending.values(), counts, values
            ):
                losses = (saturated, flushed, inf, nan)
                self._samples.append(Sample(*key, scale, amax, count.fp8_max, count.elements, *losses))
            self._pending.clear()
        return self._samples

    @property
    def latest(self) -> list[Sample]:
        """The samples of the last sampled step; empty before the first."""
        return [sample for sample in self.samples if sample.step == self.samples[-1].step]

    def __str__(self) -> str:
        """The latest sample as a table, what loses most on top."""
        latest = self.latest
        return f"step {latest[0].step}\n{plain(_HEAD, _cells(latest))}" if latest else _NOTHING

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        latest = self.latest
        return f"<p>step {latest[0].step}</p>{html(_HEAD, _cells(latest))}" if latest else f"<p>{_NOTHING}</p>"

    def write(self, writer: Any) -> None:
        """Give the latest sample to what has ``add_scalar(tag, value, step)``. Tags: ``fp8/QUANTITY/ROLE/LAYER``."""
        for s in self.latest:
            quantities = {"log2_scale": math.log2(s.scale), "amax": s.amax}
            if s.elements:
                quantities |= {"saturated": s.share(s.saturated), "flushed": s.share(s.flushed), "nan": s.nan + s.inf}
            for name, value in quantities.items():
                writer.add_scalar(f"fp8/{name}/{s.role}/{s.layer}", value, s.step)

    def save_json(self, path: StrPath) -> None:
        """All samples, one JSON object a line."""
        with replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(asdict(sample)) + "\n" for sample in self.samples))

    def save_png(self, path: StrPath) -> None:
        """For each role the distribution of the layers' scales over the steps (as the figures of arXiv 2309.17224 show
        it) and the largest and median shares that saturate and that become zero. Needs matplotlib."""
        from matplotlib.figure import Figure

        if not self.samples:
            raise RuntimeError("torch_fp8: nothing to draw: no step was sampled yet")
        roles = list(dict.fromkeys(sample.role for sample in self.samples))
        figure = Figure(figsize=(12, 3 * len(roles)), layout="constrained")
        for (left, right), role in zip(figure.subplots(len(roles), 2, sharex=True, squeeze=False), roles):
            by_step: dict[int, list[Sample]] = {}
            for sample in self.samples:
                if sample.role == role:
                    by_step.setdefault(sample.step, []).append(sample)
            steps = list(by_step)
            scales = [_numbers(math.log2(s.scale) for s in samples) for samples in by_step.values()]
            quantiles = [[x.quantile(q).item() for x in scales] for q in (0, 0.1, 0.5, 0.9, 1)]
            for low, high, alpha in ((0, 4, 0.15), (1, 3, 0.3)):
                left.fill_between(steps, quantiles[low], quantiles[high], color="tab:orange", alpha=alpha, linewidth=0)
            left.plot(steps, quantiles[2], color="tab:orange", marker="." if len(steps) == 1 else "")
            left.set(ylabel=f"log2 scale of {role}")
            for what, color in (("saturated", "tab:red"), ("flushed", "tab:blue")):
                shares = [_numbers(s.share(getattr(s, what)) for s in samples) for samples in by_step.values()]
                right.plot(steps, [x.max().item() for x in shares], color=color, label=f"{what}, worst layer")
                right.plot(steps, [x.median().item() for x in shares], color=color, linestyle=":", label="median")
            right.set(ylabel="share of elements")
            right.set_yscale("symlog", linthresh=1e-6)
        left.set_xlabel("optimizer step"), right.set_xlabel("optimizer step")
        figure.axes[0].set_title("scales over the layers: median, 10 to 90 %, all")
        figure.axes[1].set_title("what the casts lose")
        figure.axes[1].legend(fontsize="small")
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=120, format="png")


_NOTHING = "torch_fp8.monitor: no step was sampled yet (the hooks of compiled code and of CUDA graphs do not run)"
_HEAD = ("layer", "role", "scale", "amax", "unused binades", "saturated", "flushed", "")


def _cells(samples: list[Sample]) -> list[tuple[str, ...]]:
    samples = sorted(samples, key=lambda s: (-s.nan - s.inf, -s.share(s.saturated), -s.share(s.flushed)))
    return [
        (s.layer or "(root)", s.role, f"{s.scale:.4g}", f"{s.amax:.4g}", f"{s.unused_binades:.1f}",
         *(f"{s.share(count):.2%}" if s.elements else "" for count in (s.saturated, s.flushed)), s.verdict)
        for s in samples
    ]  # fmt: skip


def _numbers(values: Iterable[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float32, device="cpu")


class _Count:
    """Sums over the micro-batches of a step, on the device."""

    def __init__(self, fp8_max: float) -> None:
        self.fp8_max, self.elements, self.calls = fp8_max, 0, 0
        self.counts: Tensor
        self.values: Tensor  # scale, amax

    def add(self, elements: int, counts: Tensor, values: Tensor) -> None:
        self.calls += 1
        if self.calls > 1:
            counts = self.counts + counts
            values = torch.maximum(self.values, values)
        self.elements, self.counts, self.values = self.elements + elements, counts, values


def _is_countable(x: Any) -> bool:
    """Counts that are made within a transform of torch.func or torch.autograd.functional would die with it."""
    functorch = torch._C._functorch
    return (
        isinstance(x, Tensor)
        and x.dtype in SUPPORTED_DTYPES
        and functorch.peek_interpreter_stack() is None
        and not functorch.is_legacy_batchedtensor(x)
    )


def _records(layer: Scaled) -> bool:
    if layer.fp8_slots.is_cuda and torch.cuda.is_current_stream_capturing():
        return False  # or every replay would count
    return layer.fp8_enabled and layer.training and torch.is_grad_enabled()
