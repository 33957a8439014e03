"""A look at what FP8 does: samples of the casts, quality of a frozen model, its twin in plain PyTorch."""
