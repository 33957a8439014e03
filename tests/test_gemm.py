"""gemm and gemm_accumulate_ against float64."""

import pytest
import torch
from oracle import E4M3, E5M2, OUTPUT, accumulation

gemm = torch.ops.torch_fp8.gemm
OUT_DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def operand(rows: int, k: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(rows, k, device=device).mul_(3).to(dtype)


def scale_inv(value: float, device: torch.device) -> torch.Tensor:
    return torch.tensor([value], device=device)


def product(a, b, sa, sb, device):
    """The exact product, and how far a sum on this device may be off."""
    a, b, s = a.double(), b.double(), sa.double() * sb.double()
    return a @ b.t() * s, accumulation(device, a.shape[1]) * (a.abs() @ b.abs().t()) * s.abs()


def assert_within(out, exact, bound):
    error = (out.double() - exact).abs()
    assert (error <= bound).all(), f"error over bound by {(error / bound.clamp(min=1e-300)).max().item():.3g}"


@pytest.mark.parametrize("formats", [(E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2)])
@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("fast_accum", [False, True])
@pytest.mark.parametrize("mnk", [(16, 16, 16), (1, 48, 32), (100, 257, 64), (257, 7, 1008), (384, 512, 2048)])
def test_product(device, formats, out_dtype, with_bias, fast_accum, mnk):
    m, n, k = mnk
    a, b = operand(m, k, formats[0], device), operand(-(-n // 16) * 16, k, formats[1], device)
    sa, sb = scale_inv(0.03, device), scale_inv(2.5, device)
    bias = torch.randn(n, device=device).to(out_dtype) if with_bias else None
    out = gemm(a, b, sa, sb, bias, [m, n], out_dtype, fast_accum)
    assert out.shape == (m, n) and out.dtype == out_dtype and out.is_contiguous()
    exact, bound = product(a, b[:n], sa, sb, device)
    if with_bias:
        exact += bias.double()
    assert_within(out, exact, bound + OUTPUT[out_dtype] * exact.abs())


def test_output_of_any_rank_and_spare_rows(device):
    a, b = operand(32, 64, E4M3, device), operand(48, 64, E4M3, device)
    one = scale_inv(1.0, device)
    out = gemm(a, b, one, one, None, [2, 3, 5, 48], torch.float32)
    assert torch.equal(out.view(30, 48), gemm(a, b, one, one, None, [32, 48], torch.float32)[:30])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [64, 50])
def test_accumulate(device, dtype, n):
    a, b = operand(48, 128, E5M2, device), operand(64, 128, E4M3, device)
    sa, sb = scale_inv(0.5, device), scale_inv(0.25, device)
    start = torch.randn(48, n, device=device).to(dtype)
    out = start.clone()
    assert torch.ops.torch_fp8.gemm_accumulate_(out, a, b, sa, sb) is None
    exact, bound = product(a, b[:n], sa, sb, device)
    total = start.double() + exact
    # bfloat16: cuBLASLt rounds the product before it adds what out holds.
    assert_within(out, total, bound + OUTPUT[dtype] * (exact.abs() + total.abs()))


def test_scales_whose_product_is_beyond_float32():
    """A sum of zero stays zero, and what float32 holds comes out. Where cuBLASLt multiplies the scales itself, nothing
    is promised (docs/design.md)."""
    cpu = torch.device("cpu")
    a, b = torch.zeros(16, 16), torch.eye(16)
    a[0, 0], a[1, 1] = 2.0**-9, 448.0
    big = 2.0**66
    out = gemm(a.to(E4M3), b.to(E4M3), scale_inv(big, cpu), scale_inv(big, cpu), None, [16, 16], torch.float32)
    expected = torch.zeros(16, 16)
    expected[0, 0], expected[1, 1] = 2.0**123, float("inf")
    assert torch.equal(out, expected)


@pytest.mark.parametrize("size", [[0, 32], [3, 0], [0, 0]])
def test_empty_output(device, size):
    one = scale_inv(1.0, device)
    out = gemm(operand(16, 32, E4M3, device), operand(32, 32, E4M3, device), one, one, None, size, torch.bfloat16)
    assert list(out.shape) == size


@pytest.mark.parametrize("with_bias", [False, True])
def test_empty_sum(device, with_bias):
    one = scale_inv(1.0, device)
    empty = torch.empty(16, 0, device=device).to(E4M3)
    bias = torch.randn(16, device=device).bfloat16() if with_bias else None
    out = gemm(empty, empty, one, one, bias, [16, 16], torch.bfloat16)
    assert torch.equal(out, bias.expand(16, 16) if with_bias else torch.zeros_like(out))


@pytest.mark.parametrize("k", [16, 4112, 16400])
def test_same_bits_again(device, k):
    """k with few divisors, where an uneven split of the sum would be wrong, and no atomics decide the order."""
    a, b = operand(64, k, E4M3, device), operand(64, k, E4M3, device)
    one = scale_inv(1.0, device)
    first = gemm(a, b, one, one, None, [64, 64], torch.float32)
    assert_within(first, *product(a, b, one, one, device))
    for _ in range(5):
        assert torch.equal(gemm(a, b, one, one, None, [64, 64], torch.float32), first)


@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("layout", ["dense", "strided", "unaligned"])
@pytest.mark.parametrize("mnk", [(16, 16, 16), (33, 48, 64), (20, 7, 32), (8, 16, 0), (0, 16, 16)])
def test_addend(device, out_dtype, with_bias, layout, mnk):
    """Added in the GEMM's own sum where it can be, after it where it cannot; never changed."""
    m, n, k = mnk
    a, b = operand(m + -m % 16, k, E4M3, device), operand(n + -n % 16, k, E4M3, device)
    sa, sb = scale_inv(0.03, device), scale_inv(2.5, device)
    bias = torch.randn(n, device=device).to(out_dtype) if with_bias else None
    addend = (3 * torch.randn(m, n, device=device)).to(out_dtype)
    if layout == "strided":
        addend = addend.t().contiguous().t()
    elif layout == "unaligned":
        addend = torch.cat([addend.new_zeros(1), addend.flatten()])[1:].view(m, n)
    before = addend.clone()
    out = gemm(a, b, sa, sb, bias, [m, n], out_dtype, False, addend)
    exact, bound = product(a[:m], b[:n], sa, sb, device)
    made = exact + (bias.double() if with_bias else 0)
    total = made + before.double()
    # Rounded once in one sum; a product with a bias, or a result in float16, is rounded before it is added to.
    assert_within(out, total, bound + OUTPUT[out_dtype] * (made.abs() + total.abs() + exact.abs()) + 2.0**-24)
    assert torch.equal(addend, before)


@pytest.mark.parametrize("addend", [torch.zeros(16, 15), torch.zeros(1, 16), torch.zeros(16, 16).bfloat16()])
def test_an_addend_that_does_not_fit(device, addend):
    one, a = scale_inv(1.0, device), operand(16, 16, E4M3, device)
    with pytest.raises(RuntimeError, match=r"torch_fp8: addend must be Float of the output's shape \[16, 16\], got"):
        gemm(a, a, one, one, None, [16, 16], torch.float32, False, addend.to(device))
