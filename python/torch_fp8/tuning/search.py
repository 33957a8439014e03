"""Find a faster algorithm for a model's FP8 GEMMs than the one cuBLASLt's heuristic would take, by timing them.

The heuristic ranks its candidates by a model of the GPU, and the first is not always the fastest. But a GPU at its
power limit changes its clock from second to second, so the fastest of a few timings is mostly the luckiest. Hence two
rules: candidates take turns within each round, and only a gain that luck cannot give counts (``choose``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from .. import _C, progress
from ..checks import check, is_int
from ..layers.frozen import ACTIVATIONS, FrozenLinear, frozen_layers
from ..layers.linear import Layer, Linear, fp8_layers
from .tuning import Problem, TunedGemm, Tuning, here

_MIN_ROUNDS = 20
_MAX_SIZE = 2**30
_FASTER_ROUNDS = 0.9
# For normally distributed values: 1.4826 median absolute deviations are a standard deviation, and the median of n of
# them is off by sqrt(pi / 2 / n) standard deviations.
_MEDIAN_ERROR = 1.4826 * math.sqrt(math.pi / 2)


def tune(
    what: nn.Module | Iterable[tuple[int, int, int]], *, tokens: int = 8192, rounds: int = 30, margin: float = 0.03
) -> Tuning:
    """Time cuBLASLt's algorithms for FP8 GEMMs on the current GPU, and from now on run each with the best.

    The default, the heuristic's first choice, stays unless another algorithm is faster beyond doubt. Nothing is ever
    timed but by this function. ``Tuning.save`` and ``load_tuning`` carry the result to the next run;
    ``forget_tuning`` takes it back. Another algorithm sums in another order, so results may differ in the last bits
    from those of the default; with one algorithm they repeat to the bit.

    what: a model whose FP8 layers, frozen ones too, are to be tuned, as they would be called now: call this under the
        ``torch.autocast`` of the training step, if it has one; without it a frozen layer's output has its bias's dtype,
        bfloat16 where it has none. Or an iterable of (tokens, in_features, out_features), which stand for
        layers in bfloat16 without bias with the default recipe.
    tokens: rows of a layer's input in one call (batch times sequence length). An algorithm is used for exactly the
        sizes it was tuned for. Not used with shapes, which name theirs.
    rounds: how often each algorithm is timed, 20 to 10000.
    margin: the part of the default's time that another algorithm must save, from 0 to below 1.

    Raises ValueError for other arguments and for a model without FP8 layers or on another GPU than the current one;
    RuntimeError where there is no Hopper GPU, or in a CPU-only build. The algorithms in use are then what they were.
    """
    check(is_int(tokens, 1, _MAX_SIZE), "tokens", "an integer from 1 to 2**30", tokens)
    check(is_int(rounds, _MIN_ROUNDS, 10_000), "rounds", f"an integer from {_MIN_ROUNDS} to 10000", rounds)
    is_number = isinstance(margin, (int, float)) and not isinstance(margin, bool)
    check(is_number and 0 <= margin < 1, "margin", "a number from 0 to below 1", margin)
    layers = _layers_of(what, tokens)
    place = here()
    _check_devices({layer.weight.device for layer, _ in layers})

    gemms = []
    for problem in progress.bar(problems_of(layers), desc="tuning", unit="GEMM"):
        candidates = _C.time_algorithms(problem.native(), rounds)
        if candidates:  # there are none for some deep and narrow products, which run without cuBLASLt
            best = choose(candidates, margin)
            (_, default_times), (algorithm, times) = candidates[0], candidates[best]
            gemms.append(TunedGemm(problem, median(default_times), median(times), best, algorithm))
    tuning = Tuning(**place, gemms=tuple(gemms))
    tuning._use()
    return tuning


def choose(candidates: Sequence[tuple[bytes, Sequence[float]]], margin: float) -> int:
    """Which of the candidates (algorithm, its time in each round) to use: 0, the default, or a better one's place.

    A candidate must pass three tests, each of which stops what the others let through:

    * Its median time is below the default's by more than ``margin``. This stops gains too small to be worth leaving
      the default for, and the gain that the best of many equals always seems to have.
    * It was faster in 9 rounds of 10. The two of a round ran side by side, under one clock, so equals win half of the
      rounds each; that one wins 27 of 30 has a chance of 4 in a million, whatever the noise looks like. This stops a
      median that the bad luck of some rounds has made.
    * The median of the differences within a round exceeds twice its standard error. This stops a candidate that is
      faster by next to nothing in some rounds and by anything in the others, as where something else disturbed the
      default half of the time: then nobody knows what the gain is.

    Of those that pass, the one with the lowest median; of equals the earlier, which the heuristic thinks better.
    """
    default = candidates[0][1]

    def is_better(times: Sequence[float]) -> bool:
        saved = [before - after for before, after in zip(default, times, strict=True)]
        gap = median(saved)
        error = _MEDIAN_ERROR * median(abs(value - gap) for value in saved) / math.sqrt(len(saved))
        return (
            median(times) < (1 - margin) * median(default)
            and sum(value > 0 for value in saved) >= _FASTER_ROUNDS * len(saved)
            and gap > 2 * error
        )

    better = [i for i, (_, times) in enumerate(candidates) if i > 0 and is_better(times)]
    return min(better, key=lambda i: median(candidates[i][1]), default=0)


def problems_of(layers: Iterable[tuple[Layer | FrozenLinear, int]]) -> list[Problem]:
    """The GEMMs of one forward and backward of each (layer, tokens), each problem once."""
    problems: dict[Problem, None] = {}
    for layer, tokens in layers:
        if isinstance(layer, FrozenLinear):
            run = partial(_run_frozen, layer, tokens)
        else:
            run = partial(_run_linear, layer, tokens)
        for gemm in _C.recorded_gemms(run):
            problems[Problem(*(getattr(gemm, field) for field in Problem._fields))] = None
    return list(problems)


# While GEMMs are recorded, an op on tensors of the meta device goes the way that it goes on a GPU, without memory and
# without a kernel. The layers themselves are only looked at.


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _if_any(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _on_meta(tensor)


def _autocast() -> torch.dtype | None:
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None


def _run_frozen(layer: FrozenLinear, tokens: int) -> None:
    state = [_on_meta(layer.weight), _on_meta(layer.weight_scale), _if_any(layer.bias), _if_any(layer.input_slot)]
    dtype = _autocast() or (torch.bfloat16 if layer.bias is None else layer.bias.dtype)
    x = torch.empty(tokens, layer.in_features, dtype=dtype, device="meta")
    torch.ops.torch_fp8.frozen_linear(x, *state, ACTIVATIONS.index(layer.activations), dtype)


@torch.no_grad()
def _run_linear(layer: Layer, tokens: int) -> None:
    state = layer.fp8_state
    weight, bias, slots = _on_meta(layer.matrix), _if_any(layer.bias), _on_meta(state.slots)
    main_grad = None
    if layer.fuse_main_grad:
        kept = getattr(layer.weight, "main_grad", None)
        main_grad = torch.empty_like(weight, dtype=torch.float32 if kept is None else kept.dtype)
    autocast = _autocast()
    casts, how = state.casts, (state.fp8_gemms, state.fast_accum, True, False, True, True)
    # The input's gradient has the input's dtype: under autocast that of a layer before it or that of the parameters.
    for x_dtype in dict.fromkeys([autocast or weight.dtype, weight.dtype]):
        x = torch.empty(tokens, layer.in_features, dtype=x_dtype, device="meta")
        y, *codes = torch.ops.torch_fp8.linear_forward(x, weight, bias, slots, [], [], casts, 0, *how, False, autocast)
        # Of layers that read one tensor all but the first add to the gradient that the first made.
        sums = [None] if state.group is None or x_dtype == torch.float16 else [None, torch.empty_like(x)]
        for dx_sum in sums:
            torch.ops.torch_fp8.linear_backward(
                y, [], *codes, x, weight, slots, main_grad, dx_sum, casts, 0, *how, None, layer.in_features, x_dtype,
                weight.dtype,
            )  # fmt: skip


def _layers_of(what: Any, tokens: int) -> list[tuple[Layer | FrozenLinear, int]]:
    """The layers to tune, each with its number of tokens; for a shape, a layer without memory."""
    if isinstance(what, nn.Module):
        found: list[Layer | FrozenLinear] = [*fp8_layers(what).values(), *frozen_layers(what).values()]
        layers = [(layer, tokens) for layer in found]
        if not layers:
            raise ValueError(f"torch_fp8: {type(what).__name__} has no FP8 layer to tune; torch_fp8.convert it first")
        return layers
    expected = "a model or a list of (tokens, in_features, out_features), integers from 1 to 2**30"
    check(isinstance(what, Iterable), "what", expected, what)
    shapes = list(what)
    check(len(shapes) > 0, "what", expected, shapes)
    for shape in shapes:
        is_shape = isinstance(shape, Sequence) and len(shape) == 3
        check(is_shape and all(is_int(size, 1, _MAX_SIZE) for size in shape), "what", expected, shape)
    return [
        (Linear(cols, rows, bias=False, device="meta", dtype=torch.bfloat16), tokens) for tokens, cols, rows in shapes
    ]


def _check_devices(devices: set[torch.device]) -> None:
    current = torch.device("cuda", torch.cuda.current_device())
    for device in devices:
        if device.type == "cuda" and device != current:
            raise ValueError(
                f"torch_fp8: tuning is for the current device, {current}, but the model has FP8 layers on {device}; "
                f"tune within torch.cuda.device({device.index}), and a model on several GPUs by its shapes on each"
            )
