"""A C++ project finds an installed torch_fp8 with CMake, builds on it and runs, with no Python anywhere.

The library comes from the build tree of an editable install, or from the one that TORCH_FP8_BUILD_DIR names.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch_fp8 as fp8

ROOT = Path(__file__).parent.parent
BUILD = Path(os.environ.get("TORCH_FP8_BUILD_DIR", ROOT / "build"))
TORCH_ROOT = Path(torch.__file__).parent
# cmake and ninja of the machine, or of this virtual environment.
PATH = os.pathsep.join([os.environ["PATH"], str(Path(sys.executable).parent)])


def run(*command: str | Path, **environment: str) -> str:
    # Only what is passed: no LD_LIBRARY_PATH or CMAKE_PREFIX_PATH of the caller's may find what the install does not.
    done = subprocess.run(command, env={"PATH": PATH} | environment, text=True, capture_output=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> Path:
    assert (BUILD / "CMakeCache.txt").exists(), f"no build tree at {BUILD}; make build, or set TORCH_FP8_BUILD_DIR"
    prefix = tmp_path_factory.mktemp("prefix")
    run("cmake", "--install", BUILD, "--prefix", prefix, "--component", "cpp")
    return prefix


@pytest.fixture(scope="module")
def consumer(prefix, tmp_path_factory) -> Path:
    build = tmp_path_factory.mktemp("consumer")
    arguments = ["-S", ROOT / "tests/consumer", "-B", build, f"-DCMAKE_PREFIX_PATH={prefix}"]
    # Asked for Python, CMake fails now instead of finding it; and the project's own default is too old for PyTorch.
    log = run("cmake", *arguments, "-DCMAKE_DISABLE_FIND_PACKAGE_Python3=ON", "-DCMAKE_CXX_STANDARD=14")
    assert f"TORCH_ROOT is {TORCH_ROOT}" in log, "the PyTorch that torch_fp8 was built with is the default"
    run("cmake", "--build", build)
    return build / "consumer"


def test_installs_the_library_its_headers_and_its_cmake_files(prefix):
    installed = {str(path.relative_to(prefix)) for path in prefix.rglob("*") if path.is_file()}
    headers = {str(path.relative_to(ROOT)) for path in (ROOT / "include").rglob("*.h")}
    config = "lib/cmake/torch_fp8/"
    assert headers | {"lib/libtorch_fp8.so", config + "torch_fp8Config.cmake", config + "torch.cmake"} <= installed
    assert not [path for path in installed if path.endswith(".py") or "_C." in path]


def test_consumer_trains(consumer):
    assert run(consumer).splitlines()[:4] == [
        "torch_fp8::nn::Linear(in_features=32, out_features=16, bias=true)",
        "y: [4, 16]",
        "weight.grad: [16, 32] of 4",
        "input scale: 448",
    ]


def test_its_norms_and_mlp_compute_what_pythons_do(consumer):
    for line, dtype in zip(run(consumer).splitlines()[4:], (torch.float32, torch.bfloat16), strict=True):
        torch.manual_seed(0)
        norm, last, mlp = fp8.RMSNorm(32), fp8.LayerNorm(32), fp8.MLP(32, 48, activation="xielu")
        norm.feeds(*mlp.readers)
        model = torch.nn.Sequential(norm, last, mlp).to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        numbers = []
        for _ in range(4):
            x, residual = torch.randn(12, 32).to(dtype).requires_grad_(), torch.randn(12, 32).to(dtype)
            y, total = norm(x, residual)
            loss = last(mlp(y, total)).float().pow(3).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            numbers += [loss.item(), x.grad.double().abs().sum().item()]
        assert [float.fromhex(number) for number in line.split()[1:]] == numbers


def libraries_of(binary: Path) -> dict[str, Path]:
    """Name -> file of every shared library that the loader finds for it."""
    lines = run("ldd", binary)
    assert "not found" not in lines
    return {name: Path(path).resolve() for name, path in re.findall(r"(\S+) => (\S+)", lines)}


def test_consumer_loads_no_python(consumer):
    libraries = libraries_of(consumer)
    assert "libtorch_fp8.so" in libraries
    assert not [name for name in libraries if "python" in name]


def test_consumer_loads_the_libraries_that_pytorch_loads(consumer):
    # Not the machine's copy of libcublasLt or libcudart, where there is one.
    libraries, of_torch = libraries_of(consumer), libraries_of(TORCH_ROOT / "lib/libtorch.so")
    shared = libraries.keys() & of_torch.keys()
    assert "libtorch_cpu.so" in shared
    assert {name: libraries[name] for name in shared} == {name: of_torch[name] for name in shared}


def test_another_pytorch_version_is_refused(prefix, tmp_path):
    other = tmp_path / "torch"
    (other / "include/torch").mkdir(parents=True)
    (other / "include/torch/library.h").touch()
    (other / "build-version").write_text("1.0.0+cpu\n")
    arguments = ["-S", ROOT / "tests/consumer", "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={prefix}"]
    done = subprocess.run(
        ["cmake", *arguments, f"-DTORCH_ROOT={other}"], env={"PATH": PATH}, text=True, capture_output=True
    )
    assert done.returncode != 0
    version = torch.__version__.split("+")[0]
    message = " ".join(done.stderr.split())  # CMake wraps lines
    assert f"torch_fp8 was built for PyTorch {version}, but {other} is 1.0.0" in message
