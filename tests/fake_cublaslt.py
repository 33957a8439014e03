"""The tuning half of the library on a GPU that nobody has."""

import torch
import torch_fp8 as fp8
from torch_fp8.tuning.tuning import Problem


class GemmProblem(Problem):
    """The native record: takes its fields by name only."""

    def __new__(cls, **fields):
        return super().__new__(cls, **fields)


class CublasLt:
    """Stands in for _C and torch.cuda, and notes what is timed and used. Algorithm i of a problem is 72 bytes i."""

    def __init__(self, monkeypatch):
        self.timed, self.used, self.refused = [], {}, set()
        self.version, self.gpu, self.capability = 130100, "NVIDIA H200", (9, 0)
        native = {
            "GemmProblem": GemmProblem,
            "toolkit_version": lambda: "13.0",
            "cublaslt_version": lambda: self.version,
        }
        for name in ("time_algorithms", "check_algorithm", "use_algorithms", "forget_algorithms", "check_capability"):
            native[name] = getattr(self, name)
        cuda = {
            "is_available": lambda: True,
            "current_device": lambda: 0,
            "get_device_name": lambda: self.gpu,
            "get_device_capability": lambda: self.capability,
        }
        for module, stand_ins in ((fp8._C, native), (torch.cuda, cuda)):
            for name, stand_in in stand_ins.items():
                monkeypatch.setattr(module, name, stand_in, raising=False)

    def levels(self, problem):
        """What the candidates take, in microseconds: in some problems another one is better, and one has none."""
        return [] if problem.k == 16 else [100.0, 100.5, 90.0] if problem.fast_accum else [50.0, 50.0]

    def time_algorithms(self, problem, rounds):
        assert isinstance(problem, GemmProblem)
        self.timed.append(problem)
        return [(bytes([i]) * 72, [level] * rounds) for i, level in enumerate(self.levels(problem))]

    def check_algorithm(self, problem, algorithm):
        if problem.m in self.refused:
            raise RuntimeError(f"status 15 for {algorithm[0]}")

    def use_algorithms(self, pairs):
        self.used |= dict(pairs)

    def forget_algorithms(self):
        self.used = {}

    def check_capability(self, major, minor, name):
        if (major, minor) != (9, 0):
            raise RuntimeError(f"built for Hopper, but {name} has {major}.{minor}")


SHAPES = [(256, 64, 128), (512, 64, 128)]  # tokens, in, out; the fprops of both have a better candidate
