"""quantize: codes, transposes, padding, amax, scale_inv and column sums."""

import pytest
import torch
import torch_fp8
from oracle import E4M3, E5M2, MAX, amax, codes, exact_scale, power_of_two_scale

quantize = torch.ops.torch_fp8.quantize
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
INF, NAN = float("inf"), float("nan")


def slots_with(scale: float, device: torch.device) -> torch.Tensor:
    slots = torch_fp8._C.new_slots(device)
    slots[:, 0], slots[:, 1] = 1 / slots.new_tensor(scale), scale
    return slots


def every_bfloat16(device: torch.device) -> torch.Tensor:
    return torch.arange(2**16, dtype=torch.int32, device=device).to(torch.uint16).view(torch.bfloat16).view(256, 256)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.cpu().view(torch.uint8), b.cpu().view(torch.uint8))


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_codes_of_every_bfloat16_value(device, dtype):
    x = every_bfloat16(device)
    for scale in [2.0**-126, 1e-20, 2.0**-9, 0.3, 1.0, 1.7, 448.0, 3.1e4, 1e30, 2.0**126]:
        q, q_t, scale_inv, _ = quantize(x, slots_with(scale, device), 1, dtype, columnwise=True)
        assert torch.equal(q.cpu().view(torch.uint8), codes(x.cpu(), scale, dtype)), scale
        assert same_bits(q_t, q.t().contiguous())
        assert torch.equal(scale_inv.cpu(), 1 / torch.tensor([scale]))


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(16, 16), (1, 1), (7, 17), (100, 257), (128, 128), (129, 4097), (1000, 24), (300, 512)]
)
def test_layouts_and_padding(device, dtype, x_dtype, shape):
    x = torch.randn(shape, device=device).to(x_dtype)
    slots = slots_with(20.0, device)
    q, q_t, _, dbias = quantize(x, slots, 0, dtype, columnwise=True, dbias=torch.float32)
    m, k = shape
    assert q.shape == (-(-m // 16) * 16, -(-k // 16) * 16)
    expected = torch.zeros(q.shape, dtype=torch.uint8)
    expected[:m, :k] = codes(x.cpu(), 20.0, dtype)
    assert torch.equal(q.cpu().view(torch.uint8), expected)
    assert torch.equal(q_t.cpu().view(torch.uint8), expected.t())
    assert slots[0, 2].item() == amax(x.cpu())
    assert slots[1:, 2].count_nonzero() == 0  # other roles see nothing
    # m float32 additions of half a unit in the last place each.
    bound = m * 2.0**-24 * x.double().abs().sum(0)
    assert ((dbias.double() - x.double().sum(0)).abs() <= bound).all()


def test_only_what_is_asked_for(device):
    x = torch.randn(32, 48, device=device)
    slots = slots_with(1.0, device)
    q, q_t, _, dbias = quantize(x, slots, 0, E4M3, record=False)
    assert (q.numel(), q_t.numel(), dbias.numel()) == (32 * 48, 0, 0)
    assert slots[0, 2] == 0
    q, q_t, _, dbias = quantize(x, slots, 0, E4M3, rowwise=False, columnwise=True, dbias=torch.bfloat16)
    assert (q.numel(), q_t.numel(), dbias.shape, dbias.dtype) == (0, 32 * 48, (48,), torch.bfloat16)


@pytest.mark.parametrize("x_dtype", DTYPES)
def test_strides(device, x_dtype):
    base = torch.randn(40, 72, 6, device=device).to(x_dtype)
    views = {
        "transposed": base[:, :, 0].t(),
        "stepped": base[::2, 1::3, 2],
        "offset": base.reshape(40, -1)[:, 3:],
        "expanded": base[0, :, :1].t().expand(33, 72),
        "permuted": base.permute(2, 0, 1),
        "vector": base[3, :, 1],
    }
    for name, x in views.items():
        dense = x.contiguous()
        results = [quantize(t, slots_with(3.0, device), 2, E5M2, columnwise=True) for t in (x, dense)]
        for ours, theirs in zip(*results):
            assert same_bits(ours, theirs), name
        rows = dense.reshape(-1, dense.shape[-1])
        assert torch.equal(results[0][0].cpu().view(torch.uint8)[: len(rows), : rows.shape[1]],
                           codes(rows.cpu(), 3.0, E5M2)), name  # fmt: skip


@pytest.mark.parametrize("shape", [(16, 32), (7, 17), (100, 257), (300, 512), (2, 1), (5, 3)])
@pytest.mark.parametrize("rowwise, columnwise", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("own_amax", [False, True])
def test_a_transposed_matrix(device, shape, rowwise, columnwise, own_amax):
    """It is read along its memory, and gives the codes of a copy that is not transposed."""
    x = torch.randn(shape, device=device).t()
    asked_for = {"own_amax": own_amax, "rowwise": rowwise, "columnwise": columnwise}
    for how in ({}, {"recast": True}, {"record": False, "recast": True}, {"dbias": torch.float32}):
        slots = [slots_with(0.01 if "recast" in how else 100.0, device) for _ in range(2)]
        results = [quantize(t, s, 1, E4M3, **asked_for, **how) for t, s in zip((x, x.contiguous()), slots)]
        for ours, theirs in zip(*results):
            assert ours.shape == theirs.shape and ours.is_contiguous() and same_bits(ours, theirs)
        assert torch.equal(*slots)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("margin", [0, 3])
@pytest.mark.parametrize("magnitude", [1e-42, 1e-12, 1.0, 1.75, 1.7500001, 3.3e38])
def test_own_amax(device, dtype, power_of_two, margin, magnitude):
    x = torch.rand(70, 90, device=device) - 0.5
    x[3, 4] = 1.0
    x = x * magnitude
    slots = slots_with(7.0, device)
    q, _, scale_inv, _ = quantize(x, slots, 0, dtype, own_amax=True, power_of_two=power_of_two, margin=margin)
    scale = (power_of_two_scale if power_of_two else exact_scale)(amax(x.cpu()), dtype, margin)
    assert scale_inv.item() == (1 / torch.tensor(scale)).item()
    assert torch.equal(q.cpu().view(torch.uint8)[:70, :90], codes(x.cpu(), scale, dtype))
    assert slots[0, 2].item() == amax(x.cpu())
    assert slots[0, 1] == 7.0  # the slot's own scale changes only in an update


@pytest.mark.parametrize("special", [0.0, INF, -INF, NAN])
@pytest.mark.parametrize("x_dtype", DTYPES)
def test_values_that_say_nothing_of_the_scale(device, special, x_dtype):
    x = torch.full((20, 30), special, device=device).to(x_dtype)
    slots = slots_with(7.0, device)
    q, _, scale_inv, _ = quantize(x, slots, 0, E4M3, own_amax=True)
    assert scale_inv.item() == 1.0
    assert (q.view(torch.uint8)[:20, :30] == (0x7F if special else 0x00)).all()
    recorded = slots[0, 2].item()
    assert recorded != recorded if special != special else recorded == abs(special)


def test_one_nan_is_seen_beside_infinity_and_survives(device):
    x = torch.randn(300, 200, device=device).bfloat16()
    x[17, 5], x[250, 199] = INF, NAN
    slots = slots_with(1.0, device)
    q, q_t, _, _ = quantize(x, slots, 0, E5M2, columnwise=True)
    assert slots[0, 2].isnan()
    assert q.float()[:300, :200].isnan().nonzero().tolist() == [[17, 5], [250, 199]]
    assert q_t.float().isnan().nonzero().tolist() == [[5, 17], [199, 250]]


# Alone in a row, a column, a patch of 4 x 8, at the end of x, and all over a tile; dense and padded.
INFINITE = {
    "one": [(30, 5)],
    "first and last": [(0, 0), (-1, -1)],
    "row": [(3, slice(None))],
    "column": [(slice(None), 9)],
    "tile": [(slice(0, 128), slice(0, 128))],
    "all": [(slice(None), slice(None))],
}


@pytest.mark.parametrize("where", INFINITE)
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("x_dtype", DTYPES)
def test_what_is_not_finite_stays_so(device, where, dtype, x_dtype):
    """Inf becomes NaN, and what is finite saturates as ever, whichever kernel casts and whatever is asked for."""
    for shape in [(128, 256), (140, 250), (33, 16), (300, 131)]:
        x = torch.randn(shape) * 1e3
        for i, place in enumerate(INFINITE[where]):
            x[place] = -INF if i % 2 else INF
        x[-1, 0], x[0, -1] = 6e4, -6e4  # finite in every type
        x = x.to(x_dtype)
        for scale in (2.0**-126, 3.0, 2.0**126):
            expected = codes(x, scale, dtype)
            assert scale < 4 or x.float().mul(scale).isinf().sum() > x.isinf().sum()
            assert expected.eq(0x7F).equal(~x.isfinite())
            for rowwise, columnwise, dbias in [
                (True, False, None), (True, True, None), (False, True, torch.float32), (True, False, torch.float32),
            ]:  # fmt: skip
                for role, options in enumerate([{}, {"record": False}, {}]):
                    slots = slots_with(scale, device)
                    q, q_t, _, sums = quantize(x.to(device), slots, role, dtype, rowwise=rowwise,
                                               columnwise=columnwise, dbias=dbias, **options)  # fmt: skip
                    if rowwise:
                        assert torch.equal(q.cpu().view(torch.uint8)[: shape[0], : shape[1]], expected)
                    if columnwise:
                        assert torch.equal(q_t.cpu().view(torch.uint8)[: shape[1], : shape[0]], expected.t())
                    if dbias:
                        assert torch.equal(sums.isfinite().cpu(), x.isfinite().all(0))


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_infinity_by_its_own_amax(device, dtype, power_of_two):
    x = torch.randn(40, 70)
    x[11, 13] = -INF
    for view in (x, x.t(), x[:, ::3], x[5:25, 3:33].expand(2, 20, 30)):
        q, q_t, scale_inv, _ = quantize(view.to(device), slots_with(5.0, device), 0, dtype, columnwise=True,
                                        own_amax=True, power_of_two=power_of_two)  # fmt: skip
        rows = view.reshape(-1, view.shape[-1])
        scale = (power_of_two_scale if power_of_two else exact_scale)(amax(rows), dtype)
        assert scale_inv.item() == (1 / torch.tensor(scale)).item()
        expected = codes(rows, scale, dtype)
        assert torch.equal(q.cpu().view(torch.uint8)[: rows.shape[0], : rows.shape[1]], expected)
        assert torch.equal(q_t.cpu().view(torch.uint8)[: rows.shape[1], : rows.shape[0]], expected.t())


def test_a_loaded_amax_of_minus_zero_is_raised(device):
    for x in (torch.tensor([[1.5, -2.5]]), torch.zeros(3, 3), torch.full((2, 2), 1e-45)):
        slots = slots_with(1.0, device)
        slots[1, 2] = -0.0
        quantize(x.to(device), slots, 1, E4M3)
        assert same_bits(slots[1, 2:3], torch.tensor([amax(x)]))
    torch.ops.torch_fp8.update_scales_([slots], [torch.zeros(3, 2, device=device)], [448.0] * 3, [0])
    assert slots.view(torch.int32)[1, 2] == 0


# ---- recast ----------------------------------------------------------------------------------------------------------


def unfit(value: float, scale: float, dtype: torch.dtype, margin: int) -> bool:
    """The documented rule, in float32."""
    mapped = float(torch.tensor(value) * torch.tensor(scale))
    usable = 0 < value < INF
    return usable and (mapped > MAX[dtype] * 2 or mapped < MAX[dtype] * 2.0**-margin / 32)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("margin", [0, 3])
@pytest.mark.parametrize("x_dtype", DTYPES)
def test_recast(device, dtype, power_of_two, margin, x_dtype):
    """At both bounds, just beyond them, far beyond, and where the amax says nothing."""
    high, low = MAX[dtype] * 2, MAX[dtype] * 2.0**-margin / 32
    up, down = 1 + 2.0**-7, 1 - 2.0**-7  # neighbours of a 16-bit number
    for peak in [high, high * up, low, low * down, 1e3 * high, 1e-3 * low, 1.0, 0.0, INF, NAN]:
        for shape in [(33, 50), (160, 272)]:
            x = torch.rand(shape) - 0.5
            x = (x * peak).to(x_dtype)
            x[1, 2] = -peak
            if x_dtype is torch.float16 and x.isinf().any() and peak < INF:
                continue  # beyond what it holds
            for scale in (1.0, 2.0**-9, 0.3):
                y = (x.float() / scale).to(x_dtype)
                seen = amax(y)
                again = unfit(seen, scale, dtype, margin)
                if scale == 1.0:
                    assert again == (peak in (high * up, low * down, 1e3 * high, 1e-3 * low)) or peak == 1.0
                compute = power_of_two_scale if power_of_two else exact_scale
                expected = compute(seen, dtype, margin) if again else scale
                for record in (True, False):
                    slots = slots_with(scale, device)
                    q, q_t, scale_inv, dbias = quantize(
                        y.to(device), slots, 1, dtype, columnwise=True, dbias=torch.float32, power_of_two=power_of_two,
                        margin=margin, record=record, recast=True,
                    )  # fmt: skip
                    plain = quantize(y.to(device), slots_with(scale, device), 1, dtype, dbias=torch.float32)
                    m, k = shape
                    want = torch.zeros(q.shape, dtype=torch.uint8)
                    want[:m, :k] = codes(y, expected, dtype)
                    assert torch.equal(q.cpu().view(torch.uint8), want), (peak, scale)
                    assert torch.equal(q_t.cpu().view(torch.uint8), want.t()), (peak, scale)
                    assert scale_inv.item() == (1 / torch.tensor(expected)).item()
                    assert same_bits(dbias, plain[3])
                    assert slots[1, 1] == torch.tensor(scale)  # the slot's own scale changes only in an update
                    recorded = torch.tensor(seen if record else 0.0)
                    torch.testing.assert_close(slots[1, 2].cpu(), recorded, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("shape", [(1, 1), (7, 17), (128, 128), (129, 400), (0, 32), (3, 0), (2100, 2100)])
def test_recast_of_any_layout(device, dtype, shape):
    """Also of more tiles than the kernel has blocks; what is not asked for is not written."""
    x = torch.randn(*shape, 2)[..., 0] * 1e4
    for view in (x, x.t(), x.contiguous()):
        expected = codes(view, exact_scale(amax(view), dtype), dtype)
        for rowwise, columnwise in [(True, False), (False, True), (True, True)]:
            q, q_t, _, _ = quantize(view.to(device), slots_with(3.0e5, device), 1, dtype, rowwise=rowwise,
                                    columnwise=columnwise, recast=True)  # fmt: skip
            m, k = view.shape
            assert q.numel() > 0 or not rowwise or not view.numel()
            if rowwise:
                assert torch.equal(q.cpu().view(torch.uint8)[:m, :k], expected)
            if columnwise:
                assert torch.equal(q_t.cpu().view(torch.uint8)[:k, :m], expected.t())


@pytest.mark.parametrize("columnwise", [False, True])
@pytest.mark.parametrize("shape", [(512, 512), (500, 510), (512, 528), (16, 2048), (16, 2064)])
def test_small_and_not_so_small(device, shape, columnwise):
    """A GPU casts up to 16 tiles of 128 x 128 in one launch, with amax, recast and all."""
    x = torch.randn(shape).bfloat16()
    x[3, 5], x[-1, -1] = INF, 1e3
    finite = x.clone()
    finite[3, 5] = 0
    for y, options, seen in [
        (finite, {"own_amax": True}, amax(finite)),
        (finite * 3e4, {"recast": True}, amax(finite * 3e4)),
        (finite * 3e4, {"recast": True, "record": False}, amax(finite * 3e4)),
        (finite * 3e4, {"recast": True}, 1e9),  # another micro-batch has seen this
        (finite * 0.4, {"recast": True}, 1.0),  # and here that its scale will do
        (x, {"recast": True}, INF),
    ]:
        scale = 1.0 if seen in (1.0, INF) else exact_scale(seen, E4M3)
        slots = slots_with(1.0, device)
        before = seen if seen in (1.0, 1e9) else 0.0
        slots[1, 2] = before
        q, q_t, scale_inv, _ = quantize(y.to(device), slots, 1, E4M3, columnwise=columnwise, **options)
        m, k = shape
        want = codes(y, scale, E4M3)
        assert torch.equal(q.cpu().view(torch.uint8)[:m, :k], want), options
        assert not columnwise or torch.equal(q_t.cpu().view(torch.uint8)[:k, :m], want.t()), options
        assert scale_inv.item() == (1 / torch.tensor(scale)).item()
        assert slots[1, 2].item() == (max(before, amax(y)) if options.get("record", True) else before)


def test_recast_means_nothing_with_own_amax(device):
    x = torch.randn(40, 60, device=device) * 1e6
    slots = slots_with(1.0, device)
    slots[0, 2] = 1e30  # what an earlier cast of the step has seen
    with_recast, without = (quantize(x, slots, 0, E4M3, own_amax=True, recast=r) for r in (True, False))
    for ours, theirs in zip(with_recast, without):
        assert same_bits(ours, theirs)


def test_amax_only_rises(device):
    slots = slots_with(1.0, device)
    for peak, expected in [(3.0, 3.0), (2.0, 3.0), (5.0, 5.0), (0.0, 5.0)]:
        quantize(torch.full((5, 5), peak, device=device), slots, 1, E4M3)
        assert slots[1, 2] == expected


@pytest.mark.parametrize("shape", [(0, 32), (3, 0), (0, 0), (2, 0, 16)])
def test_empty(device, shape):
    slots = slots_with(2.0, device)
    q, q_t, _, dbias = quantize(torch.empty(shape, device=device), slots, 0, E4M3, columnwise=True, own_amax=True,
                                dbias=torch.float32)  # fmt: skip
    rows = torch.Size(shape[:-1]).numel()
    assert q.shape == (-(-rows // 16) * 16, -(-shape[-1] // 16) * 16) and q_t.shape == q.t().shape
    assert torch.equal(dbias.cpu(), torch.zeros(shape[-1]))
    assert slots[0, 2] == 0
