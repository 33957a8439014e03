"""norm_cast and norm_backward: RMSNorm and LayerNorm, made and cast at once, against float64."""

import pytest
import torch
import torch_fp8 as fp8
from oracle import E4M3, OUTPUT, codes, exact_scale
from torch.nn import functional as F

ops = torch.ops.torch_fp8
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Odd widths and few rows; widths of one block, of a cluster, of the largest, and beyond it.
SHAPES = [(1, 1), (7, 17), (3, 5, 40), (33, 264), (130, 1000), (64, 1024), (48, 5000), (35, 14336), (18, 20000)]
SHAPES += [(3, 40000)]
EPS = 1e-5
RELATIVE = 2e-6  # of float32 arithmetic
FLOAT32 = 2.0**-24


def casts_of(recipe=None):
    recipe = recipe or fp8.DelayedScaling()
    return [recipe.options().cast(role).packed for role in range(3)]


def slots_with(scale, device):
    slots = fp8._C.new_slots(device)
    slots[:, 0], slots[:, 1] = 1 / scale, scale
    return slots


def random(shape, dtype, device, seed, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator) + shift).to(dtype).to(device)


def norm_cast(x, residual=None, gain=None, bias=None, *, layer_norm=False, offset=0.0, slots=None, recipe=None,
              eps=EPS, role=0, history=7, rowwise=True, columnwise=True, wants_y=True):  # fmt: skip
    return ops.norm_cast(
        x, residual, gain, bias, eps, layer_norm, offset, slots, role, casts_of(recipe), history, True, True, rowwise,
        columnwise, wants_y,
    )  # fmt: skip


def exact_norm(x, gain, bias, layer_norm, offset):
    """In float64: the norm, and by how much float32 may miss it."""
    x = x.double()
    mean = x.mean(-1, keepdim=True) if layer_norm else torch.zeros_like(x[..., :1])
    rstd = ((x - mean).square().mean(-1, keepdim=True) + EPS).rsqrt()
    factor = 1.0 if gain is None else gain.double() + offset
    product = (x - mean) * rstd * factor
    y = product if bias is None else product + bias.double()
    # The mean is a sum in float32: it misses by some roundings of its largest term, whatever it comes to.
    of_mean = 4 * FLOAT32 * x.abs().amax(-1, keepdim=True) * rstd * abs(factor) if layer_norm else 0.0
    error = RELATIVE * product.abs() + of_mean + 2 * FLOAT32 * y.abs()
    return y, error, mean[..., 0], rstd[..., 0]


def assert_codes(q, exact, error, scale):
    """The codes of exact values or, where float32's rounding decides, those of a neighbour; and no padding but 0."""
    exact, error = (t.reshape(-1, t.shape[-1]).cpu() for t in (exact, error))
    m, k = exact.shape
    got = q.cpu().view(torch.uint8)
    value, low, high = (
        t.view(E4M3).float()
        for t in (got[:m, :k].contiguous(), *(codes((exact + e).float(), scale, E4M3) for e in (-error, error)))
    )
    assert ((value >= low) & (value <= high)).all()
    padding = got.clone()
    padding[:m, :k] = 0
    assert not padding.any()


def assert_near(got, exact, error, dtype):
    assert got.dtype == dtype and got.shape == exact.shape
    rounding = OUTPUT[dtype] * (exact.abs() + error) + (2.0**-24 if dtype == torch.float16 else 0)
    assert ((got.double() - exact).abs() <= error + rounding).all()


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(device, shape, dtype, added, layer_norm):
    x = random(shape, dtype, device, 0, scale=2.0, shift=0.5)
    residual = random(shape, dtype, device, 1) if added else None
    gain = random(shape[-1:], torch.float32 if added else dtype, device, 2)
    bias = random(shape[-1:], gain.dtype, device, 3) if layer_norm else None
    offset, scale = float(added), 16.0
    slots = slots_with(scale, device)
    y, total, q, q_t, scale_inv, stats = norm_cast(
        x, residual, gain, bias, layer_norm=layer_norm, offset=offset, slots=slots
    )
    if added:
        assert torch.equal(total, x + residual)
    else:
        assert total.numel() == 0
    exact, error, mean, rstd = exact_norm(total if added else x, gain, bias, layer_norm, offset)
    assert_codes(q, exact, error, scale)
    assert torch.equal(q.view(torch.uint8).t(), q_t.view(torch.uint8))
    assert_near(y, exact, error, dtype)
    assert scale_inv.item() == 1 / scale
    assert abs(slots[0, 2].item() - exact.abs().max().item()) <= error.max().item()
    assert slots[1:, 2].count_nonzero() == 0
    assert torch.allclose(stats.double().reshape(-1, rstd.numel())[-1], rstd.flatten(), rtol=RELATIVE, atol=0)
    if layer_norm:
        assert torch.allclose(stats[0].double(), mean.flatten(), rtol=RELATIVE, atol=4 * FLOAT32 * 10)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_more_rows_than_blocks_hold(device, layer_norm):
    test_forward(device, (2000, 4112), torch.bfloat16, True, layer_norm)


@pytest.mark.parametrize("shape", [(40, 96), (35, 17)])
def test_what_is_not_asked_for(device, shape):
    """Has no elements, and changes nothing of the rest; without slots there is no cast at all."""
    x, gain = random(shape, torch.bfloat16, device, 0), random(shape[-1:], torch.bfloat16, device, 1)
    whole = norm_cast(x, gain=gain, slots=slots_with(8.0, device))
    for wants in ([True, False, False], [False, True, False], [False, False, True]):
        y, q, q_t = wants
        part = norm_cast(x, gain=gain, slots=slots_with(8.0, device), wants_y=y, rowwise=q, columnwise=q_t)
        for index, wanted in zip((0, 2, 3), wants):
            if wanted:
                assert torch.equal(part[index].view(torch.uint8), whole[index].view(torch.uint8))
            else:
                assert part[index].numel() == 0
    plain = norm_cast(x, gain=gain)
    assert torch.equal(plain[0], whole[0]) and torch.equal(plain[5], whole[5])
    assert [t.numel() for t in plain[1:5]] == [0, 0, 0, 0]


@pytest.mark.parametrize("shape", [(40, 4096), (40, 1001)])
def test_plain_norms_of_torch(device, shape):
    """Those of nn.RMSNorm and nn.LayerNorm in float32."""
    x, gain, bias = (random(shape[i:], torch.float32, device, i) for i in (0, 1, 1))
    assert torch.allclose(norm_cast(x, gain=gain)[0], F.rms_norm(x, shape[1:], gain, EPS), rtol=1e-5, atol=1e-6)
    ours = norm_cast(x, gain=gain, bias=bias, layer_norm=True)[0]
    assert torch.allclose(ours, F.layer_norm(x, shape[1:], gain, bias, EPS), rtol=1e-5, atol=1e-6)
    assert torch.allclose(norm_cast(x)[0], F.rms_norm(x, shape[1:], None, EPS), rtol=1e-5, atol=1e-6)
    assert torch.equal(norm_cast(x, offset=1.0)[0], norm_cast(x)[0])


@pytest.mark.parametrize("width", [256, 1000, 4096, 20000])
def test_a_large_mean_cancels_nothing(device, width):
    """Of float32 x with mean 1e4 and deviation 1: the sum of squares is 1e8, its seventh digit the variance."""
    x = random((40, width), torch.float32, device, 0, shift=1e4)
    exact, error, _, rstd = exact_norm(x, None, None, True, 0)
    y, *_, stats = norm_cast(x, layer_norm=True)
    assert torch.allclose(stats[1].double(), rstd, rtol=1e-5, atol=0)
    assert_near(y, exact, error, torch.float32)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("recipe", [fp8.DelayedScaling(), fp8.CurrentScaling(power_of_two=True)])
@pytest.mark.parametrize("shape", [(70, 90), (70, 96)])
def test_own_amax(device, shape, recipe, added):
    """Without a history, or by current scaling: in two passes."""
    x, gain = random(shape, torch.bfloat16, device, 0), random(shape[-1:], torch.float32, device, 1)
    residual = random(shape, torch.bfloat16, device, 2) if added else None
    slots = fp8._C.new_slots(device)
    y, total, q, q_t, scale_inv, stats = norm_cast(x, residual, gain, slots=slots, recipe=recipe, history=0)
    exact, error, _, rstd = exact_norm(total if added else x, gain, None, False, 0)
    scale, largest = 1 / scale_inv.item(), exact.abs().max().item()
    assert scale <= exact_scale(largest, E4M3) * (1 + 1e-5)
    assert 2 * scale > exact_scale(largest, E4M3)
    assert_codes(q, exact, error, scale)
    assert torch.equal(q.view(torch.uint8).t(), q_t.view(torch.uint8))
    assert slots[0, 2].item() == pytest.approx(largest, rel=RELATIVE)
    assert_near(y, exact, error, torch.bfloat16)
    assert torch.allclose(stats.double(), rstd, rtol=RELATIVE, atol=0)
    assert not added or torch.equal(total, x + residual)


def gradients(x, gain, bias, dy, dsum, layer_norm, offset):
    """By autograd, in float64; and the magnitudes of what each dx is the sum of."""
    wide = [t if t is None else t.double().requires_grad_() for t in (x, gain, bias)]
    y = exact_norm(wide[0], wide[1], wide[2], layer_norm, offset)[0]
    y.backward(dy.double())
    rstd = exact_norm(x, None, None, layer_norm, 0)[3][..., None]
    g = (dy.double() * (1 if gain is None else gain.double() + offset)).abs()
    n = exact_norm(x, None, None, layer_norm, 0)[0].abs()
    terms = rstd * (g + g.mean(-1, keepdim=True) + n * (g * n).mean(-1, keepdim=True))
    dx = wide[0].grad + (0 if dsum is None else dsum.double())
    return dx, terms + dx.abs(), wide[1], wide[2]


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (600, 264), (300, 4096)])
def test_backward(device, shape, dtype, added, layer_norm):
    x, dy = random(shape, dtype, device, 0, scale=2.0, shift=0.5), random(shape, dtype, device, 1)
    dsum = random(shape, dtype, device, 4) if added else None
    gain = random(shape[-1:], torch.float32 if added else dtype, device, 2)
    bias = random(shape[-1:], gain.dtype, device, 3) if layer_norm else None
    offset = float(added)
    stats = norm_cast(x, gain=gain, layer_norm=layer_norm)[5]
    args = (dy, x, dsum, gain, stats, layer_norm, offset)
    dx, dgain, dbias = ops.norm_backward(*args, True, layer_norm)
    exact, terms, wide_gain, wide_bias = gradients(x, gain, bias, dy, dsum, layer_norm, offset)
    assert_near(dx, exact, 1e-5 * terms, dtype)
    rows = x.numel() // shape[-1]
    n = exact_norm(x, None, None, layer_norm, 0)[0]
    of_gain, of_bias = ((dy.double() * t).abs().reshape(rows, -1).sum(0) for t in (n, torch.ones_like(n)))
    assert_near(dgain, wide_gain.grad, (1e-5 + rows * FLOAT32) * of_gain + 1e-6, gain.dtype)
    if layer_norm:
        assert_near(dbias, wide_bias.grad, (1e-6 + rows * FLOAT32) * of_bias, gain.dtype)
    else:
        assert dbias.numel() == 0
    again = ops.norm_backward(*args, True, layer_norm)
    for a, b in zip((dx, dgain, dbias), again):
        assert torch.equal(a, b)
    alone = ops.norm_backward(*args, False, False)
    assert torch.equal(alone[0], dx) and alone[1].numel() == alone[2].numel() == 0


@pytest.mark.parametrize("layer_norm", [False, True])
def test_backward_without_gain(device, layer_norm):
    x, dy = (random((50, 96), torch.float32, device, seed) for seed in range(2))
    stats = norm_cast(x, layer_norm=layer_norm)[5]
    dx, dgain, _ = ops.norm_backward(dy, x, None, None, stats, layer_norm, 0.0, False, False)
    exact, terms, *_ = gradients(x, None, None, dy, None, layer_norm, 0)
    assert_near(dx, exact, 1e-5 * terms, torch.float32)
    assert dgain.numel() == 0


@pytest.mark.parametrize("width", [50, 48, 1056])
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_seen(device, bad, width):
    """Not finite in, not finite out, as the plain norm has it: a bad x in its row, a bad gain in its column."""
    x, gain = random((40, width), torch.float32, device, 0), random((width,), torch.float32, device, 1)
    for of_gain in (False, True):
        (gain if of_gain else x[3])[7] = bad
        plain = exact_norm(x, gain, None, False, 0)[0]
        slots = slots_with(1.0, device)
        y, _, q, q_t, *_ = norm_cast(x, gain=gain, slots=slots)
        assert torch.equal(y.isfinite(), plain.isfinite())
        assert torch.equal(q.float()[:40, :width].isfinite(), plain.isfinite())
        assert torch.equal(q_t.float()[:width, :40].isfinite(), plain.t().isfinite())
        assert not slots[0, 2].isfinite()
        padding = q.float().clone()
        padding[:40, :width] = 0
        assert not padding.any()


def test_finite_values_saturate(device):
    x = random((16, 64), torch.float32, device, 0)
    q = norm_cast(x, slots=slots_with(1e6, device))[2]
    assert torch.equal(q.float().abs(), torch.full((16, 64), 448.0, device=device))


@pytest.mark.parametrize("shape", [(20, 64), (20, 33)])
def test_rows_of_zeros(device, shape):
    x, dy = torch.zeros(shape, device=device), random(shape, torch.float32, device, 0)
    for layer_norm in (False, True):
        y, _, q, _, _, stats = norm_cast(x, layer_norm=layer_norm, slots=slots_with(1.0, device))
        assert not y.any() and not q.view(torch.uint8).any()
        dx, *_ = ops.norm_backward(dy, x, None, None, stats, layer_norm, 0.0, False, False)
        exact = dy.double() - (dy.double().mean(-1, keepdim=True) if layer_norm else 0)
        assert torch.allclose(dx.double(), exact / EPS**0.5, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("width", [40, 33])
def test_views(device, width):
    """A slice of wider rows, one that starts off a 16-byte boundary, and a transposed one."""
    x = random((60, width), torch.bfloat16, device, 0)
    gain, dy = random((width,), torch.bfloat16, device, 1), random((60, width), torch.bfloat16, device, 2)
    wide = torch.zeros(60, 2 * width + 1, device=device, dtype=x.dtype)
    wide[:, width : 2 * width] = x
    shifted = torch.zeros(60 * width + 1, device=device, dtype=x.dtype)[1:].view(60, width).copy_(x)
    gains = torch.zeros(width, 2, device=device, dtype=x.dtype)
    gains[:, 0] = gain

    def whole(x, dy, gain):
        made = norm_cast(x, x, gain, slots=slots_with(8.0, device))
        return *made, *ops.norm_backward(dy, made[1], dy, gain, made[5], False, 0.0, True, True)

    plain = whole(x, dy, gain)
    for view in (wide[:, width : 2 * width], shifted, x.t().contiguous().t()):
        assert torch.equal(view, x)
        for a, b in zip(plain, whole(view, dy.t().contiguous().t(), gains[:, 0])):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("shape", [(0, 32), (4, 0, 7), (3, 0)])
def test_nothing(device, shape):
    x, gain = torch.empty(shape, device=device), torch.ones(shape[-1:], device=device)
    for layer_norm in (False, True):
        y, total, q, q_t, _, stats = norm_cast(
            x, x, gain, layer_norm=layer_norm, slots=slots_with(1.0, device), history=0
        )
        assert y.shape == total.shape == shape and q.numel() == q_t.numel() == 0
        dx, dgain, dbias = ops.norm_backward(x, x, x, gain, stats, layer_norm, 0.0, True, True)
        assert dx.shape == shape
        assert torch.equal(dgain, torch.zeros_like(gain)) and torch.equal(dbias, torch.zeros_like(gain))


def test_a_vector_is_a_row(device):
    x = random((64,), torch.bfloat16, device, 0)
    y, _, q, *_ = norm_cast(x, slots=slots_with(8.0, device))
    assert torch.equal(y[None], norm_cast(x[None])[0]) and q.shape == (16, 64)


def test_refusals(device):
    x, gain, slots = torch.randn(20, 32, device=device), torch.ones(32, device=device), slots_with(1.0, device)
    half = x.bfloat16()

    def call(x=x, residual=None, gain=gain, bias=None, **options):
        norm_cast(x, residual, gain, bias, **{"slots": slots, **options})

    for arguments, error, words in [
        ({"x": x.to(torch.int32)}, TypeError, "x must be bfloat16"),
        ({"x": x[0, 0]}, RuntimeError, "at least one dimension"),
        ({"x": x.to_sparse()}, (RuntimeError, NotImplementedError), "torch_fp8"),
        ({"gain": gain[:31]}, RuntimeError, r"gain must have shape \[32\]"),
        ({"gain": gain[None]}, RuntimeError, r"gain must have shape \[32\]"),
        ({"gain": gain.half()}, TypeError, "gain must be Float as x is"),
        ({"x": half, "gain": gain.half()}, TypeError, "gain must be BFloat16 as x is, or float32"),
        ({"bias": gain[1:]}, RuntimeError, r"bias must have shape \[32\]"),
        ({"residual": half}, TypeError, "residual must have x's dtype"),
        ({"residual": x[:19]}, RuntimeError, "residual must have x's shape"),
        ({"role": 3}, IndexError, "role must be in"),
        ({"role": -1}, IndexError, "role must be in"),
        ({"role": 2}, ValueError, "cast to E4M3"),
        ({"slots": slots[:, :3]}, RuntimeError, "slots must be"),
        ({"eps": -1.0}, ValueError, "eps must be"),
        ({"eps": float("nan")}, ValueError, "eps must be"),
        ({"offset": float("inf")}, ValueError, "gain_offset must be"),
    ]:
        with pytest.raises(error, match=words):
            call(**arguments)
    assert slots[:, 2].count_nonzero() == 0

    stats = norm_cast(x)[5]
    for arguments, error, words in [
        ((x[:19], x, None, gain, stats, False), RuntimeError, "dy must have x's shape"),
        ((half, x, None, gain, stats, False), TypeError, "dy must have x's dtype"),
        ((x, x, half, gain, stats, False), TypeError, "dsum must have x's dtype"),
        ((x, x, None, gain[1:], stats, False), RuntimeError, "gain must have shape"),
        ((x, x, None, gain, stats[:19], False), RuntimeError, "stats must be what norm_cast gave"),
        ((x, x, None, gain, stats, True), RuntimeError, r"float32 of shape \[2, 20\]"),
    ]:
        with pytest.raises(error, match=words):
            ops.norm_backward(*arguments, 0.0, True, True)
