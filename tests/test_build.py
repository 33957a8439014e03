"""Installing: pip install, the build without CUDA, and what a copy says of itself."""

import os
import pickle
import pickletools
import re
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import Distribution
from pathlib import Path

import pytest
import torch
import torch_fp8 as fp8

ROOT = Path(__file__).parent.parent

CPU_ONLY = """
import warnings, torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch_fp8 as fp8
assert any("CPU backend only" in str(w.message) for w in caught) == torch.cuda.is_available()
info = fp8.build_info()
assert info["cuda"] is None and info["cublaslt"] is None, info
assert "TORCH_FP8_CUDA=OFF was asked for" in info["note"], info
model = fp8.convert(torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Linear(30, 20)), tokens=None)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(3):
    model(torch.ones(4, 20)).square().sum().backward()
    optimizer.step()
assert model[0].fp8_slots[0, 3] == 3
try:
    if torch.cuda.is_available():
        fp8.convert(torch.nn.Linear(4, 4).cuda(), tokens=None)
    else:
        fp8._C.check_capability(9, 0, "")
except RuntimeError as error:
    assert "built for the CPU only" in str(error) and "reinstall it" in str(error), error
else:
    raise AssertionError("ran on a GPU without kernels for it")
print(fp8.__file__)
"""


def test_pip_install_of_the_sdist(tmp_path):
    """sdist -> CPU-only wheel -> a folder of its own, from which it is imported."""
    large = shutil.ignore_patterns(".*", "build*", "runs", "benchmarks")
    source = shutil.copytree(
        ROOT, tmp_path / "source",
        ignore=lambda folder, names: large(folder, names) if Path(folder) == ROOT else [n for n in names if "egg" in n],
    )  # fmt: skip
    make = [sys.executable, "-c", "from setuptools import build_meta; build_meta.build_sdist('dist')"]
    subprocess.run(make, check=True, cwd=source, capture_output=True)
    (sdist,) = (source / "dist").iterdir()
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "python/torch_fp8/py.typed", "include/torch_fp8/torch_fp8.h"} <= names
    built = [name for name in names if name.endswith((".so", "/_build.py")) or name.startswith("python/torch_fp8/lib")]
    assert not built, built

    # Most of the time of this build would go into reading PyTorch's headers, once a file.
    headers = tmp_path / "headers.cmake"
    headers.write_text("cmake_language(DEFER CALL target_precompile_headers torch_fp8 PRIVATE <ATen/ATen.h>)\n")
    quick = f"-DCMAKE_PROJECT_torch_fp8_INCLUDE={headers} -DCMAKE_CXX_FLAGS_RELEASE=-O0"
    environment = os.environ | {"TORCH_FP8_CMAKE_ARGS": f"-DTORCH_FP8_CUDA=OFF {quick}"}
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps"]
    target = tmp_path / "target"
    subprocess.run([*pip, "--target", target, sdist], check=True, env=environment)
    run = subprocess.run([sys.executable, "-c", CPU_ONLY], cwd=target, capture_output=True, text=True,
                         env=os.environ | {"PYTHONPATH": str(target)})  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert Path(run.stdout.strip()).parent == target / "torch_fp8"

    (metadata,) = target.glob("torch_fp8-*.dist-info")
    installed = Distribution.at(metadata)
    assert installed.version == fp8.__version__
    needed = {re.match(r"[\w-]+", line)[0] for line in installed.requires if "extra ==" not in line}
    assert needed == {"torch", "numpy"}
    assert {"transformers", "monitor", "dev"} == set(installed.metadata.get_all("Provides-Extra"))


def test_build_info():
    info = fp8.build_info()
    assert info["version"] == fp8.__version__ and torch.__version__.startswith(info["torch"])
    assert (info["arch"] == "sm_90a") == (info["cuda"] is not None) == (info["cublaslt"] is not None)
    if info["cuda"]:
        assert torch.version.cuda.split(".")[0] == info["cuda"].split(".")[0]
        assert info["note"] == f"CUDA {info['cuda']} kernels for sm_90a (Hopper), and the CPU backend"


def test_another_pytorch_is_refused_in_words(monkeypatch):
    monkeypatch.setattr(fp8._build, "torch_version", "1.2.3")
    with pytest.raises(ImportError, match=r"built for PyTorch 1.2.3, but PyTorch .* is running; reinstall it"):
        fp8._check_torch()


def test_the_api_is_what_is_exported():
    assert all(hasattr(fp8, name) for name in fp8.__all__)


def test_pickles_name_no_inner_file():
    """Files may move; what was pickled before must load after."""
    model = torch.nn.Sequential(fp8.Linear(16, 16), fp8.freeze(torch.nn.Sequential(fp8.Linear(16, 16))))
    named = {opcode[1] for opcode in pickletools.genops(pickle.dumps(model)) if isinstance(opcode[1], str)}
    assert {name for name in named if name.startswith("torch_fp8")} == {"torch_fp8", "torch_fp8.state"}
