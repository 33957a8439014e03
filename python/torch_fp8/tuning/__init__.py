"""Faster cuBLASLt algorithms for the GEMMs of a model, and the file that keeps them."""
