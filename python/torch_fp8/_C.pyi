# What csrc/bindings.cpp gives, for type checkers. tests/test_import.py holds the names to those of the module.
from collections.abc import Callable, Sequence
from enum import Enum
from typing import overload

import torch
from torch import Tensor

class Scaling(Enum):
    delayed = 0
    current = 1
    constant = 2

class Cast:
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def scaling(self) -> Scaling: ...
    @property
    def power_of_two(self) -> bool: ...
    @property
    def margin(self) -> int: ...
    @property
    def target(self) -> float: ...
    @property
    def packed(self) -> int: ...

class LinearOptions:
    def __init__(
        self,
        *,
        scaling: Scaling,
        e4m3_gradients: bool,
        power_of_two: bool,
        margin: int,
        grad_margin: int,
        fast_accum: Sequence[bool],
        fp8: Sequence[bool],
    ) -> None: ...
    def cast(self, role: int, /) -> Cast: ...
    @property
    def fast_accum(self) -> list[bool]: ...
    @property
    def fp8_gemms(self) -> list[bool]: ...

class LayerMemo:
    def __init__(self) -> None: ...
    @property
    def used_roles(self) -> int: ...
    def end_step(self, weight: Tensor | None = None) -> None: ...
    def see_weight(self, weight: Tensor) -> None: ...
    @property
    def thread(self) -> int: ...
    @property
    def captured(self) -> bool: ...
    @property
    def updates(self) -> int: ...
    def set_history(self, roles: int, /) -> None: ...
    def forget(self) -> None: ...
    def set_gathered(self, gathered: bool, /) -> None: ...
    def set_recompute(self, recompute: bool, /) -> None: ...
    def forget_weight(self) -> None: ...

class Siblings:
    def __init__(self, members: int, /) -> None: ...
    def follows(self) -> list[int]: ...
    def set_follows(self, follows: Sequence[int], /) -> None: ...
    def end_step(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]], list[int]]: ...

class Place:
    @overload
    def __init__(self) -> None: ...
    @overload
    def __init__(self, siblings: Siblings, member: int, /) -> None: ...

def this_thread() -> int: ...
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slots: Tensor,
    options: LinearOptions,
    memo: LayerMemo,
    training: bool,
    main_grad: Tensor | None = None,
    dummy_grad: bool = False,
    place: Place = ...,
) -> Tensor: ...

class LinearLayer:
    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        slots: Tensor,
        options: LinearOptions,
        memo: LayerMemo,
        training: bool,
        main_grad: Tensor | None,
        dummy_grad: bool,
        place: Place,
        /,
    ) -> None: ...

def mlp(
    x: Tensor,
    residual: Tensor | None,
    gate: LinearLayer,
    up: LinearLayer | None,
    down: LinearLayer,
    activation: str,
    recompute: bool = False,
    alphas: Tensor | None = None,
    beta: float = 0.5,
    halves: int = 0,
) -> Tensor: ...
def norm(
    x: Tensor,
    residual: Tensor | None,
    gain: Tensor | None,
    bias: Tensor | None,
    eps: float,
    layer_norm: bool,
    gain_offset: float,
    reader: LinearLayer | None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]: ...
def stream_of(t: Tensor) -> tuple[int, int]: ...
def frozen_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_slot: Tensor | None,
    activations: int,
    dtype: torch.dtype | None,
    /,
) -> Tensor: ...
def is_input_quantized(m: int, n: int, k: int, weight: str, activations: str) -> bool: ...
def frozen_way(
    m: int,
    n: int,
    k: int,
    *,
    weight: str,
    activations: str,
    x_dtype: torch.dtype,
    dtype: torch.dtype,
    is_aligned: bool = True,
    on_cuda: bool = True,
    gradient: bool = False,
) -> str: ...
def recorded_gemms(call: Callable[[], object]) -> list[GemmProblem]: ...
def new_slots(device: torch.device, bias: int = 0, grad_bias: int = 0) -> Tensor: ...

class GemmProblem:
    def __init__(
        self,
        *,
        m: int,
        n: int,
        k: int,
        a_dtype: torch.dtype,
        b_dtype: torch.dtype,
        out_dtype: torch.dtype,
        bias: bool,
        accumulate: bool,
        fast_accum: bool,
        scales: str,
    ) -> None: ...
    @property
    def m(self) -> int: ...
    @property
    def n(self) -> int: ...
    @property
    def k(self) -> int: ...
    @property
    def a_dtype(self) -> torch.dtype: ...
    @property
    def b_dtype(self) -> torch.dtype: ...
    @property
    def out_dtype(self) -> torch.dtype: ...
    @property
    def bias(self) -> bool: ...
    @property
    def accumulate(self) -> bool: ...
    @property
    def fast_accum(self) -> bool: ...
    @property
    def scales(self) -> str: ...

def time_algorithms(problem: GemmProblem, rounds: int, /) -> list[tuple[bytes, list[float]]]: ...
def check_algorithm(problem: GemmProblem, algorithm: bytes, /) -> None: ...
def use_algorithms(gemms: Sequence[tuple[GemmProblem, bytes]], /) -> None: ...
def forget_algorithms() -> None: ...
def toolkit_version() -> str: ...
def why_no_cuda() -> str: ...
def cublaslt_version() -> int: ...
def check_capability(major: int, minor: int, name: str, /) -> None: ...
