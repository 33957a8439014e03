"""The models that examples and benchmarks share, in plain PyTorch: none of them knows of FP8."""
