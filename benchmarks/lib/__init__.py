"""What the benchmarks share."""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parents[2]))  # where models/ is; the script's own folder stays first
