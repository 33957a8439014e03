"""No tensor of the library takes its dtype or device from the user's defaults."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch_fp8 as fp8
from torch import nn
from torch_fp8.observe.evaluation import bootstrap

ROOT = Path(__file__).parent.parent
TOOL = ROOT / "tools" / "factories.py"


def run_tool(*paths):
    return subprocess.run([sys.executable, TOOL, *paths], capture_output=True, text=True)


def test_every_factory_of_the_library_names_dtype_and_device():
    result = run_tool(ROOT / "python", ROOT / "csrc", ROOT / "include")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "name, line, found",
    [
        ("a.py", "torch.zeros(3)", True),
        ("a.py", "torch.zeros(3, dtype=torch.float32)", True),
        ("a.py", "f(torch.tensor([x.device], device=x.device))", True),
        ("a.py", "torch.randint(3, (4,), generator=generator)", True),
        ("a.py", "torch.full((2,), 1.0, dtype=torch.float32, device=x.device)", False),
        ("a.py", "torch.zeros_like(x), x.new_empty(3), math.full(3)", False),
        ("a.cpp", "at::empty({options.rows(), 2});", True),
        ("a.cpp", "at::zeros({rows, f(x.options())});", True),
        ("a.cu", "torch::ones({2, 3}, c10::Device(at::kCUDA));", True),
        ("a.h", "const auto cuda = at::TensorOptions().device(at::kCUDA);", True),
        ("a.cpp", "at::full({n}, 1e-4, x.options().dtype(at::kFloat));", False),
        ("a.cpp", "at::tensor({1.0f, 0.0f}, at::kFloat);  // not at::empty({3})", False),
        ("a.cuh", "at::empty_symint({rows, cols}, fp8);", False),
    ],
)
def test_the_tool_finds_new_ones(tmp_path, name, line, found):
    (tmp_path / name).write_text(f"\n{line}\n")
    result = run_tool(tmp_path)
    assert (result.returncode == 1) == found, result.stderr
    assert not found or f"{name}:2: " in result.stderr


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("default_device", ["cpu", "meta"])
def test_a_model_is_what_it_is_whatever_the_defaults_are(dtype, default_device, device, tmp_path):
    def work(model, x):
        fp8.convert(model, tokens=None)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        monitor = fp8.monitor(model)
        for _ in range(2):
            model(x).sum().backward()
            optimizer.step()
        seen = [str(fp8.summary(model)), str(monitor), bootstrap([1.0, 2.0, 3.0], [1, 2, 2], draws=50)]
        fp8.load_state_dict(model, fp8.state_dict(model))
        fp8.freeze(model, activations="static", weight="tensor")
        return [*seen, model(x), *model.state_dict().values()]

    models, x = [], torch.randn(32, 64, device=device, dtype=torch.bfloat16)
    for _ in range(2):
        torch.manual_seed(0)
        models.append(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(device, torch.bfloat16))
    expected = work(models[0], x)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.set_default_device(default_device)
    try:
        found = work(models[1], x)
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
    for ours, theirs in zip(found, expected, strict=True):
        if isinstance(ours, torch.Tensor):
            assert ours.dtype == theirs.dtype and ours.device == theirs.device
            assert torch.equal(ours.float(), theirs.float())
        else:
            assert ours == theirs
