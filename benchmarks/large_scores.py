"""How far backward's probabilities are from forward's where scores are large, in each mode of attention. Times nothing.
Writes results/large_scores.md."""

from __future__ import annotations

import torch
import torch_fp8 as fp8
from lib.common import options, randn, start
from lib.report import header, table, write

SCORES = (10, 30, 100, 300, 1_000, 3_000, 10_000)
MODES = ("16bit", "fp8_forward", "fp8")
BATCH, HEADS, KEYS, DIMS = 4, 32, 1024, 128  # as many queries as channels
SHARES = torch.tensor([0.01, 0.5, 0.99, 1.0])
NOTE = f"""Standard-normal q, k and v of {BATCH} x {HEADS} heads, {DIMS} queries on {KEYS:,} keys, not causal; the
softmax scale makes the largest |score| what the row says. The gradient of query i is 1 in channel i and 0 elsewhere, so
that channel i of dv, added over keys, is the sum of row i of the probabilities that backward used: 1 where they are
those of forward. Of {BATCH * HEADS * DIMS:,} such sums: the smallest percent, the median, the largest percent, the
largest. *off by more than a quarter*: the share of them. *dv*: its error against float64, of its norm."""


def measure(largest: float, mode: str) -> tuple[torch.Tensor, float]:
    """The sums of rows, and the error of dv."""
    torch.manual_seed(0)
    batch, heads, keys = (1, 2, 64) if options.dry else (BATCH, HEADS, KEYS)
    q, k, v = (randn(batch, heads, tokens, DIMS) for tokens in (DIMS, keys, keys))
    dy = torch.eye(DIMS, dtype=q.dtype, device=q.device).expand_as(q).contiguous()
    products = q.double() @ k.double().transpose(-1, -2)
    scale = largest / products.abs().max().item()
    v.requires_grad_()
    module = fp8.ScaledDotProductAttention(fp8.CurrentScaling(), mode=mode)
    module(q, k, v, scale=scale).backward(dy)
    wanted = (products * scale).softmax(-1).transpose(-1, -2) @ dy.double()
    dv = v.grad.double()
    return dv.sum(-2).flatten(), ((dv - wanted).norm() / wanted.norm()).item()


def main() -> None:
    start(__doc__)
    rows = []
    for largest in SCORES:
        for mode in MODES:
            sums, error = measure(largest, mode)
            quantiles = torch.quantile(sums, SHARES.to(sums))
            share = ((sums - 1).abs() > 0.25).double().mean().item()
            told = ", ".join(f"{q:.3g}" for q in quantiles.tolist())
            rows.append([f"{largest:,}", mode, told, f"{share:.1%}", f"{error:.3f}"])
    head = ["largest score", "mode", "sum of a row: 1 %, median, 99 %, most", "off by more than a quarter", "dv"]
    title = "Backward's probabilities where scores are large"
    write("large_scores", header(title, timed=False), table(head, rows), NOTE)


if __name__ == "__main__":
    main()
