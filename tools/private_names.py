"""Fails where a file uses a private name of another file of this project: python tools/private_names.py FOLDER ..."""

import ast
import sys
from pathlib import Path

OURS = {"torch_fp8", "models", "lib", "gpt", "llm"}
SHARED = {"_C", "_build", "_fields"}  # private to the package and not to a file; and public, of named tuples


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in SHARED


def private_names(path: Path) -> list[str]:
    found, imported = [], set()
    nodes = list(ast.walk(ast.parse(path.read_text(), path)))
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").partition(".")[0] in OURS):
            found += [(node.lineno, alias.name) for alias in node.names if is_private(alias.name)]
            imported |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            imported |= {a.asname for a in node.names if a.asname and a.name.partition(".")[0] in OURS}
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imported:
            found += [(node.lineno, node.attr)] if is_private(node.attr) else []
    return [f"{path}:{line}: {name} is private to another file" for line, name in found]


if __name__ == "__main__":
    paths = [path for folder in sys.argv[1:] for path in sorted(Path(folder).rglob("*.py"))]
    complaints = [complaint for path in paths for complaint in private_names(path)]
    if complaints:
        sys.exit("\n".join(complaints))
