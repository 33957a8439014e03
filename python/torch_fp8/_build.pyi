# What cmake/_build.py.in becomes.
version: str
torch_version: str
