"""Scripts as modules, for tests of what is in them, and as commands that are called in the tests' own process."""

import functools
import importlib
import io
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]


@functools.cache
def script(path: str) -> ModuleType:
    """Of a path from the repository's root. What lies beside the script is imported by names that other scripts have
    too (lib), so it is forgotten under these."""
    folder = (ROOT / path).parent
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(Path(path).stem)
    finally:
        sys.path.remove(str(folder))
        for name in list(sys.modules):
            top = name.partition(".")[0]
            if (folder / top).is_dir() or (folder / f"{top}.py").is_file():
                del sys.modules[name]


def called(main: Callable[[], object], path: Path, *arguments: object) -> CompletedProcess:
    """What ``main`` of the script at ``path`` returns and says with these arguments. A process of its own would import
    PyTorch first, which takes longer than most of what is tested so."""
    command = [str(word) for word in (path, *arguments)]
    out, err, threads = io.StringIO(), io.StringIO(), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", command)
        try:
            code = main()
        except SystemExit as end:
            code = end.code
        finally:
            torch.set_num_threads(threads)
    return CompletedProcess(command, code, out.getvalue(), err.getvalue())
