"""Fails where a file makes a tensor and leaves its dtype or device to the defaults, which belong to the user: python
tools/factories.py PATH ...

Python: a call of torch.empty and its like must name dtype and device. C++: its last argument must be options that name
a dtype, or a dtype alone where the tensor is the CPU's. *_like and new_* take theirs from a tensor and are fine."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

FACTORIES = {
    "arange", "empty", "empty_permuted", "empty_strided", "empty_symint", "eye", "full", "full_symint", "linspace",
    "logspace", "ones", "rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros", "zeros_symint",
}  # fmt: skip
SAYS_WHAT = re.compile(r"options\b|\bk(Float|Half|BFloat16|Long|Int|Byte|Bool)\b|\bfp(8|32)\b")


def in_python(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(), path)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FACTORIES):
            continue
        named = {keyword.arg for keyword in node.keywords}
        if isinstance(node.func.value, ast.Name) and node.func.value.id == "torch" and not {"dtype", "device"} <= named:
            yield node.lineno, f"torch.{node.func.attr}"


def in_cpp(path: Path) -> Iterator[tuple[int, str]]:
    text = re.sub(r"//[^\n]*", "", path.read_text())
    for call in re.finditer(rf"\b(?:at|torch)::({'|'.join(sorted(FACTORIES))})\(", text):
        arguments = _arguments(text, call.end())
        if len(arguments) < 2 or not SAYS_WHAT.search(arguments[-1]):
            yield text.count("\n", 0, call.start()) + 1, call.group(0)[:-1]
    for options in re.finditer(r"TensorOptions\(\)(?!\.dtype)", text):
        yield text.count("\n", 0, options.start()) + 1, options.group(0)


def _arguments(text: str, begin: int) -> list[str]:
    """Of a call whose parenthesis opens before begin."""
    depth, arguments = 1, [""]
    for char in text[begin:]:
        depth += {"(": 1, "{": 1, ")": -1, "}": -1}.get(char, 0)
        if not depth:
            break
        if char == "," and depth == 1:
            arguments.append("")
        else:
            arguments[-1] += char
    return arguments


def complaints(path: Path) -> list[str]:
    found = in_python(path) if path.suffix == ".py" else in_cpp(path)
    return [f"{path}:{line}: {what} leaves dtype or device to the defaults" for line, what in found]


if __name__ == "__main__":
    suffixes = {".py", ".cpp", ".h", ".cu", ".cuh"}
    paths = [path for folder in sys.argv[1:] for path in sorted(Path(folder).rglob("*")) if path.suffix in suffixes]
    found = [complaint for path in paths for complaint in complaints(path)]
    if found:
        sys.exit("\n".join(found))
