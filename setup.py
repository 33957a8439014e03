"""pip's way into CMake. CMakeLists.txt is the build; this file finds PyTorch, runs it and says what goes where.

An extension fits one minor version of PyTorch, so it is built against the one that is installed (also under pip's
build isolation, which hides it from imports) and requires that one. Where none is installed, pip brings one.
"""

import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
DEFAULT_TORCH = "torch==2.11.0"  # the version that the GPU figures were measured with


def find_torch() -> Path | None:
    # Under build isolation sys.path holds only the build requirements; purelib is the environment's own folder.
    candidates = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path]
    folders = (Path(folder) / "torch" for folder in candidates)
    return next((folder.resolve() for folder in folders if (folder / "version.py").exists()), None)


def find_frontend() -> str | None:
    """The folder of cudnn-frontend's headers, which build isolation puts elsewhere than PyTorch."""
    folders = (Path(folder) / "include" for folder in sys.path)
    return next((str(folder) for folder in folders if (folder / "cudnn_frontend.h").exists()), None)


def build_requirements() -> list[str]:
    """What pip brings for the build under its isolation: PyTorch where there is none, headers for its CUDA."""
    torch = find_torch()
    on_cuda = torch is None or "\ncuda: Optional[str] = '" in (torch / "version.py").read_text()
    return ([] if torch else [DEFAULT_TORCH]) + ([requirements()["nvidia-cudnn-frontend"]] if on_cuda else [])


def torch_requirement() -> str:
    torch = find_torch()
    if torch is None:
        return DEFAULT_TORCH
    version = re.search(r"__version__ = '(\d+\.\d+)", (torch / "version.py").read_text())[1]
    return f"torch=={version}.*"


def requirements() -> dict[str, str]:
    """The lines of requirements.txt by name: the one place where versions stand. An extra is some of them."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    return {re.match(r"[\w-]+", line)[0]: line for line in lines if line}


class CMakeBuild(build_ext):
    """Configure, build and install into the package's folder. TORCH_FP8_CMAKE_ARGS adds arguments."""

    def run(self) -> None:
        torch = find_torch()
        if torch is None:
            raise SystemExit("torch_fp8: no PyTorch to build against; pip install torch first")
        if self.editable_mode or self.inplace:
            # The build tree stays, and ctest finds the C++ tests in it.
            build, package = ROOT / "build", ROOT / "python" / "torch_fp8"
        else:
            build, package = Path(self.build_temp).resolve(), Path(self.build_lib).resolve() / "torch_fp8"
        configure = ["-G", "Ninja", f"-DTORCH_ROOT={torch}", f"-DPython3_EXECUTABLE={sys.executable}"]
        if (frontend := find_frontend()) and "TORCH_FP8_CUDNN_FRONTEND" not in os.environ:
            configure += [f"-DTORCH_FP8_CUDNN_FRONTEND={frontend}"]
        configure += shlex.split(os.environ.get("TORCH_FP8_CMAKE_ARGS", ""))
        for arguments in (
            ["-S", str(ROOT), "-B", str(build), *configure],
            ["--build", str(build)],
            ["--install", str(build), "--prefix", str(package)],
        ):
            subprocess.run(["cmake", *arguments], check=True)

    # CMake has put every file where it belongs; setuptools has nothing to copy.
    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    version=re.search(r"project\(torch_fp8 VERSION ([\d.]+)", (ROOT / "CMakeLists.txt").read_text())[1],
    packages=find_packages("python"),
    package_dir={"": "python"},
    package_data={"torch_fp8": ["py.typed", "*.pyi", "layers/*.json"]},
    ext_modules=[Extension("torch_fp8._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    setup_requires=build_requirements(),
    install_requires=[torch_requirement(), requirements()["numpy"]],
    extras_require={
        "transformers": [requirements()["transformers"]],  # checkpoints, and all of python -m torch_fp8
        "monitor": [requirements()[name] for name in ("matplotlib", "tensorboard")],  # its pictures and its writer
        "dev": list(requirements().values()),
    },
)
