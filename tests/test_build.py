"""Installing: pip install, the build without CUDA, and what a copy says of itself."""

import os
import pickle
import pickletools
import subprocess
import sys
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


def test_pip_install_of_a_cpu_only_wheel(tmp_path):
    environment = os.environ | {"TORCH_FP8_CMAKE_ARGS": "-DTORCH_FP8_CUDA=OFF"}
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps"]
    subprocess.run([*pip, "--target", tmp_path, ROOT], check=True, env=environment)
    run = subprocess.run([sys.executable, "-c", CPU_ONLY], cwd=tmp_path, capture_output=True, text=True,
                         env=os.environ | {"PYTHONPATH": str(tmp_path)})  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert Path(run.stdout.strip()).parent == tmp_path / "torch_fp8"


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
