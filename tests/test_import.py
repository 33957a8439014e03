"""What ``import torch_fp8`` and the command line load, and what type checkers are told."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch_fp8 as fp8
from torch_fp8 import progress
from torch_fp8.__main__ import main

# What torch has not loaded already must be ours or Python's: torch._dynamo, sympy, transformers, matplotlib and
# torch.distributed.tensor each take about as long as torch itself.
FOREIGN = """
import sys, torch
before = set(sys.modules)
try:
    {code}
finally:
    loaded = {{name for name in set(sys.modules) - before if name.split(".")[0] not in sys.stdlib_module_names}}
    print(*sorted(name for name in loaded if name.split(".")[0] != "torch_fp8"), file=sys.stderr, end="")
"""


@pytest.mark.parametrize(
    "code",
    [
        "import torch_fp8",
        "from torch_fp8.__main__ import main; main(['--help'])",
        "from torch_fp8.__main__ import main; main(['quantize', '--help'])",
        "import torch_fp8; torch_fp8.convert(torch.nn.Linear(16, 16), tokens=None)(torch.ones(2, 16)).sum().backward()",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_used(code):
    run = subprocess.run([sys.executable, "-c", FOREIGN.format(code=code)], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


def test_version_on_the_command_line():
    run = subprocess.run([sys.executable, "-m", "torch_fp8", "--version"], capture_output=True, text=True, check=True)
    info = fp8.build_info()
    backends = f"CUDA {info['cuda']}" if info["cuda"] else "the CPU alone"
    assert run.stdout == f"torch_fp8 {fp8.__version__} for PyTorch {info['torch']}, {backends}\n"


def test_without_transformers_the_extra_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)  # an ImportError
    named = 'transformers, which is not installed; pip install "transformers", or torch_fp8 with its extra'
    with pytest.raises(ImportError, match=named):
        fp8.load_pretrained(tmp_path)
    folder, new = str(tmp_path), str(tmp_path / "new")
    for command in (
        ["quantize", folder, new],
        ["quantize", folder, new, "--format", "static", "--calibrate", __file__],
        ["evaluate", folder, folder, "--text", __file__],
    ):
        assert main(command) == 1
        assert named in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_progress_bars_do_without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)  # an ImportError
    assert list(progress.bar([1, 2], desc="numbers")) == [1, 2]
    with progress.bar(total=3, unit="B") as bar:
        bar.update(3)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16))
    fp8.calibrate(model, [torch.ones(2, 16)])
    fp8.freeze(model, activations="static")


def test_the_stub_names_what_the_module_has():
    """python/torch_fp8/_C.pyi beside csrc/bindings.cpp: functions, classes and their members."""
    stub = ast.parse((Path(__file__).parent.parent / "python" / "torch_fp8" / "_C.pyi").read_text())
    declared = {node.name: node for node in stub.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert declared.keys() == {name for name in dir(fp8._C) if not name.startswith("_")}
    for name, node in declared.items():
        assert isinstance(node, ast.ClassDef) == isinstance(getattr(fp8._C, name), type), name
        if isinstance(node, ast.ClassDef):
            assert _members(node) == {member for member in dir(getattr(fp8._C, name)) if not member.startswith("_")}


def _members(node: ast.ClassDef) -> set[str]:
    names = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
    names |= {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}
    names |= {item.targets[0].id for item in node.body if isinstance(item, ast.Assign)}
    if [base.id for base in node.bases] == ["Enum"]:
        names |= {"name", "value"}
    return {name for name in names if not name.startswith("_")}
