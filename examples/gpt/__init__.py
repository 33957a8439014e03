"""A small trainer, for comparing BF16 with FP8. ``arm`` trains ``models/gpt.py`` or ``models/fog.py`` and holds the one
line that converts it; ``text`` and ``tokens`` make the data; ``checkpoint`` and ``journal`` keep what must outlive the
process; ``report`` and ``plot`` read it back.
"""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parents[2]))  # where models/ is; the script's own folder stays first
