"""What the studies share: ``corpus`` is the text, ``runs`` the folder that keeps what came out, ``training`` one
training, ``pool`` several at once on the GPUs of a machine; ``arms`` what is trained, ``checkpoints`` from where;
``policies`` how scales are chosen, ``emulation`` layers by them, ``inference`` what they keep, ``biases`` sees them;
``results`` what is kept of runs, ``intervals`` what may be said of differences, ``figures`` and ``page`` the report.
"""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parents[2]))  # for models/ and examples/; the script's own folder stays first
