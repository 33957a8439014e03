"""What the studies share: ``corpus`` is the text, ``runs`` the folder that keeps what came out, ``training`` one
training, ``pool`` several at once on the GPUs of a machine, ``intervals`` what may be said of their differences;
``policies`` how scales are chosen, ``biases`` and ``kurtosis`` look on, ``divergence`` says when a loss leaves
another's; ``fog_results``, ``fog_figures`` and ``fog_page`` are the report of ``fog.py``.
"""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parents[2]))  # for models/ and examples/; the script's own folder stays first
