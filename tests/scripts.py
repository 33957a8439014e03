"""Scripts as modules, for tests of what is in them."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


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
