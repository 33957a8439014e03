"""A small GPT trainer, for comparing BF16 with FP8. ``model`` is plain PyTorch and knows nothing of FP8; ``arm`` trains
it and holds the one line that converts it; ``text`` and ``tokens`` make the data; ``checkpoint`` and ``journal`` keep
what must outlive the process; ``report`` and ``plot`` read it back.
"""
