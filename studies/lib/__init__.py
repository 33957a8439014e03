"""What the studies share: ``corpus`` is the text, ``runs`` the folder that keeps what came out, ``training`` one
training, ``pool`` several at once on the GPUs of a machine, ``progress`` how far they are, ``bounds`` and ``memory``
what none is beyond, ``intervals`` what may be said of their differences;
``biases`` and ``kurtosis`` look on, ``divergence`` says when a loss leaves another's.

``arms`` is what scales.py trains, ``checkpoints`` from where; ``policies`` how scales are chosen, ``emulation``
layers by them, ``inference`` what they keep of 16 bits. ``lines`` is the file of what came out, ``scales_...`` and
``fog_...`` are the reports.
"""

import sys
from pathlib import Path
from types import TracebackType

sys.path.insert(1, str(Path(__file__).parents[2]))  # for models/ and examples/; the script's own folder stays first


def _say(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Of Ctrl-C a line, wherever it comes, in the midst of imports too; the process ends by that signal all the same,
    which shells know as 130."""
    if issubclass(kind, KeyboardInterrupt):
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _say
