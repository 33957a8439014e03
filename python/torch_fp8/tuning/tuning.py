"""What tuning found: the algorithm of each FP8 GEMM, in use, as a table to print and as a file to keep.

A cuBLASLt algorithm is opaque bytes that mean something to one version of the library on one kind of GPU. The one
record of what is in use is the library's own; nothing here is state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .. import _C
from ..files import StrPath
from ..table import plain
from . import file as tuning_file


class Problem(NamedTuple):
    """A GEMM as the library asks cuBLASLt for it: out (m, n) = a (m, k) . b (n, k)^T, n and k multiples of 16."""

    m: int
    n: int
    k: int
    a_dtype: torch.dtype
    b_dtype: torch.dtype
    out_dtype: torch.dtype
    bias: bool  # added by the epilogue
    accumulate: bool  # out += the product
    fast_accum: bool
    scales: str = "one"  # on each side; or a scale for each of "rows", or of "blocks" (a: 1 x 128, b: 128 x 128)

    def __str__(self) -> str:
        a, b = ("E5M2" if dtype == torch.float8_e5m2 else "E4M3" for dtype in (self.a_dtype, self.b_dtype))
        flags = [flag for flag in ("bias", "accumulate", "fast_accum") if getattr(self, flag)]
        flags += [f"scales of {self.scales}"] if self.scales != "one" else []
        return ", ".join([f"{self.m} x {self.n} x {self.k} {a} x {b} -> {_name(self.out_dtype)}", *flags])

    def native(self) -> _C.GemmProblem:
        return _C.GemmProblem(**self._asdict())


@dataclass(frozen=True)
class TunedGemm:
    problem: Problem
    default_us: float  # median time of the heuristic's first choice, microseconds
    chosen_us: float  # median time of the algorithm in use
    candidate: int  # its place among cuBLASLt's candidates; 0 is the heuristic's first choice
    algorithm: bytes

    @property
    def gain(self) -> float:
        """The part of the default's time that is saved; a little flattered, as the best of several medians is."""
        return 1 - self.chosen_us / self.default_us


@dataclass(frozen=True)
class Tuning:
    """What ``tune`` found or ``load_tuning`` read; ``print`` it.

    cublaslt, gpu, capability: where the algorithms mean something: ``130100``, ``"NVIDIA H200"``, ``"9.0"``.
    gemms: a ``TunedGemm`` for each problem that cuBLASLt has an algorithm for, also where that is the default: so a
        second tuning takes back what a first one chose.
    """

    cublaslt: int
    gpu: str
    capability: str
    gemms: tuple[TunedGemm, ...]

    def __str__(self) -> str:
        rows = [
            (
                str(gemm.problem),
                f"{gemm.default_us:.1f}",
                f"{gemm.chosen_us:.1f}",
                f"{gemm.gain:6.1%}",
                f"candidate {gemm.candidate}" if gemm.candidate else "default",
            )
            for gemm in self.gemms
        ]
        table = plain(("m x n x k", "default us", "chosen us", "  gain", "which"), rows, right=(1, 2, 3))
        changed = sum(gemm.candidate > 0 for gemm in self.gemms)
        where = f"cuBLASLt {self.cublaslt} on {self.gpu}"
        return "\n".join([table, f"{changed} of {len(self.gemms)} GEMMs leave the default of {where}"])

    def save(self, path: StrPath) -> None:
        """Write the tuning to a JSON file for ``load_tuning``. The file is there whole or not at all.

        Raises OSError where it cannot be written; a file that stood there before is then as it was.
        """
        place = {"cublaslt": self.cublaslt, "gpu": self.gpu, "capability": self.capability}
        tuning_file.write(path, place, [_to_entry(gemm) for gemm in self.gemms])

    def _use(self) -> None:
        _C.use_algorithms([(gemm.problem.native(), gemm.algorithm) for gemm in self.gemms])


def load_tuning(path: StrPath) -> Tuning:
    """Run FP8 GEMMs on the current GPU with the algorithms of a file that ``Tuning.save`` wrote. Times nothing.

    Problems that the file does not name keep the algorithms they have. Everything is checked first: on an error all of
    them do. Raises ValueError for a file of another cuBLASLt version or GPU, of another format, or damaged, and for an
    algorithm that cuBLASLt refuses; RuntimeError without a Hopper GPU or in a CPU-only build; OSError where the file
    cannot be read.
    """
    place = here()
    tuning = Tuning(**place, gemms=tuple(_from_entry(entry) for entry in tuning_file.read(path, place)))
    for gemm in tuning.gemms:
        try:
            _C.check_algorithm(gemm.problem.native(), gemm.algorithm)
        except RuntimeError as error:
            tuning_file.refuse(path, f"an algorithm that cuBLASLt takes for {gemm.problem}", str(error), error)
    tuning._use()
    return tuning


def forget_tuning() -> None:
    """Go back to cuBLASLt's own choice for every FP8 GEMM, on every GPU. Files stay."""
    _C.forget_algorithms()


def here() -> dict[str, Any]:
    """What algorithms are bound to: this cuBLASLt on the current GPU. RuntimeError where there is no Hopper GPU."""
    if not _C.toolkit_version():
        raise RuntimeError(
            "torch_fp8: a tuning needs a build with CUDA, but this one is for the CPU only "
            f"({_C.why_no_cuda()}); reinstall it where a CUDA PyTorch and nvcc are found"
        )
    if not torch.cuda.is_available():
        raise RuntimeError(
            "torch_fp8: a tuning needs a Hopper GPU, but PyTorch sees none; make and load it on the machine that runs "
            "the model"
        )
    capability, gpu = torch.cuda.get_device_capability(), torch.cuda.get_device_name()
    _C.check_capability(*capability, gpu)
    return {"cublaslt": _C.cublaslt_version(), "gpu": gpu, "capability": "{}.{}".format(*capability)}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _to_entry(gemm: TunedGemm) -> dict[str, Any]:
    fields = {**gemm.problem._asdict(), **vars(gemm), "algorithm": gemm.algorithm.hex()}
    del fields["problem"]
    return {key: _name(value) if isinstance(value, torch.dtype) else value for key, value in fields.items()}


def _from_entry(entry: dict[str, Any]) -> TunedGemm:
    fields = {key: getattr(torch, value) if key.endswith("dtype") else value for key, value in entry.items()}
    problem = Problem(**{name: fields.pop(name) for name in Problem._fields})
    return TunedGemm(problem, **{**fields, "algorithm": bytes.fromhex(fields["algorithm"])})
