"""frozen_linear against float64: every kind of scale, any shape, and which inputs are quantised."""

import math

import pytest
import torch
import torch_fp8 as fp8
from oracle import (
    E4M3,
    OUTPUT,
    OUTPUT_SUBNORMAL,
    accumulation,
    by_own_amax,
    by_row,
    codes,
    exact_scale,
    weight_of,
)
from torch_fp8.observe.emulate import emulated_linear

NONE, STATIC, TENSOR, TOKEN = range(4)
FEW, WIDE = 16, 8192  # rows of x up to which x is not quantised; half as many with more outputs
frozen_linear = torch.ops.torch_fp8.frozen_linear


def as_quantised(x, activations, slot, by_groups=False):
    """x in float64 as the product sees it."""
    if by_groups:
        return as_quantised(x.reshape(-1, 128), TOKEN, slot).view(x.shape)
    if activations == NONE:
        return x.double()
    if activations == STATIC:
        return codes(x, slot[0, 1].item(), E4M3).view(E4M3).double() * slot[0, 0].double()
    return by_own_amax(x) if activations == TENSOR else by_row(x)


def check(device, m, n, k, kind, activations, dtype=torch.bfloat16, bias=True, layout=lambda x: x):
    weight, scale, exact_weight = weight_of(n, k, kind)
    x = layout(torch.randn(m, k).to(dtype))
    b = torch.randn(n).to(dtype) if bias else None
    slot = torch.tensor([[1 / 64, 64.0, 0.0, 0.0]])
    on = [None if t is None else t.to(device) for t in (x, weight, scale, b, slot)]
    y = frozen_linear(*on[:4], on[4] if activations == STATIC else None, activations)
    assert y.dtype == dtype and y.shape == (m, n)
    blocks = kind == "block" and scale.numel() > 1
    quantised = m > (FEW // 2 if n > WIDE else FEW) and activations != NONE
    if blocks:
        quantised = quantised and activations == TOKEN and k % 128 == 0
    seen = as_quantised(x, activations if quantised else NONE, slot, quantised and blocks)
    expected = seen @ exact_weight.T + (0 if b is None else b.double())
    size = seen.abs() @ exact_weight.abs().T + (0 if b is None else b.double().abs())
    bound = OUTPUT[dtype] * expected.abs() + OUTPUT_SUBNORMAL[dtype] + accumulation(device, k) * size
    if not quantised:  # in 16 bits where there is no kernel of ours for it: the weight is rounded to them
        bound = bound + size * (k * 2.0**-24 + (0 if device.type == "cpu" else 2.0**-8))
    assert ((y.cpu().double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("kind", ["tensor", "channel", "block"])
@pytest.mark.parametrize("m", [1, 2, 7, 8, 9, 16, 17, 33, 64, 70])
@pytest.mark.parametrize("activations", [NONE, STATIC, TENSOR, TOKEN])
def test_against_float64(device, kind, m, activations):
    check(device, m, 144, 320, kind, activations)


@pytest.mark.parametrize("n", [1536, 1530])
@pytest.mark.parametrize("activations", [STATIC, TENSOR, TOKEN])
@pytest.mark.parametrize("kind", ["tensor", "channel"])
def test_vectors_of_scales(device, kind, activations, n):
    """So many tiles of output that cuBLASLt applies the scales: a vector on each side, unless there is one on each."""
    m, k = 1000, 96
    words = {"weight": kind, "activations": ("none", "static", "tensor", "token")[activations]}
    for dtype in (torch.bfloat16, torch.float16):
        assert fp8._C.frozen_way(m, n, k, **words, x_dtype=dtype, dtype=dtype) == "scaled"
        check(device, m, n, k, kind, activations, dtype)
    check(device, m, n, k, kind, activations, bias=False)
    check(device, m, n, k, kind, activations, torch.float32)


BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("way", "size", "change"),
    [
        ("zeros", (0, 64, 64), {}),
        ("zeros", (4, 0, 64), {}),
        ("zeros", (4, 64, 0), {}),
        ("few_rows", (16, 8192, 64), {}),
        ("few_rows", (8, 8193, 64), {}),
        ("few_rows", (32, 64, 64), {"activations": "none"}),
        ("few_rows", (32, 64, 64), {"weight": "block", "activations": "static"}),
        ("few_rows", (32, 64, 64), {"weight": "block"}),  # of 64 columns
        ("dequantized", (33, 64, 64), {"activations": "none"}),
        ("dequantized", (16, 64, 72), {}),
        ("dequantized", (16, 64, 64), {"is_aligned": False}),
        ("dequantized", (16, 64, 64), {"on_cuda": False}),
        ("dequantized", (16, 64, 64), {"x_dtype": FP32}),
        ("dequantized", (16, 64, 64), {"dtype": FP32}),
        ("streamed", (17, 64, 64), {}),
        ("streamed", (9, 8193, 64), {}),
        ("streamed", (32, 64, 64), {"x_dtype": FP32}),
        ("streamed", (32, 8192, 64), {"weight": "tensor", "activations": "static"}),
        ("scaled", (32, 8193, 64), {"weight": "tensor", "activations": "static"}),
        ("scaled", (32, 64, 128), {"weight": "block"}),
        ("rescaled", (32, 64, 72), {}),
        ("rescaled", (32, 64, 64), {"is_aligned": False}),
        ("rescaled", (32, 64, 64), {"on_cuda": False}),
        ("rescaled", (32, 64, 64), {"dtype": FP32}),
        ("rescaled", (33, 64, 64), {}),
        ("rescaled", (896, 1536, 64), {"weight": "tensor"}),
        ("rescaled", (4096, 4096, 64), {"dtype": FP32}),
        ("scaled", (1024, 1521, 64), {}),
        ("scaled", (33, 64, 64), {"weight": "tensor", "activations": "tensor"}),
        ("scaled", (33, 64, 64), {"weight": "tensor", "activations": "static", "dtype": FP32}),
    ],
)
def test_which_way(way, size, change):
    words = {"weight": "channel", "activations": "token", "x_dtype": BF16, "dtype": BF16} | change
    assert fp8._C.frozen_way(*size, **words) == way


SIZES = [(16, 16), (129, 64), (40, 1040), (130, 4096), (33, 17408), (7, 33), (250, 250), (250, 640), (8208, 128)]


@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("m", [1, 5, 16, 19, 50])
def test_any_size(device, n, k, m):
    for kind in ("tensor", "channel", "block"):
        check(device, m, n, k, kind, TOKEN)
    check(device, m, n, k, "channel", STATIC, bias=False)
    check(device, m, n, k, "tensor", STATIC)


@pytest.mark.parametrize("kind", ["channel", "block"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [2, 6, 7, 8, 9, 16])
@pytest.mark.parametrize(("n", "k"), [(4300, 4112), (8196, 2064)])
def test_few_rows_on_many_tiles(cuda, n, k, m, dtype, kind):
    """More tiles than multiprocessors, and more of them than a ring holds; columns and rows that fill none."""
    check(cuda, m, n, k, kind, NONE, dtype)


@pytest.mark.parametrize(("n", "few"), [(WIDE, FEW), (WIDE + 1, FEW // 2)])
def test_which_inputs_are_quantised(device, n, few):
    k = 256
    weight, scale, _ = weight_of(n, k, "channel")
    x, weight, scale = torch.randn(few + 1, k).bfloat16().to(device), weight.to(device), scale.to(device)
    for rows in (x[:few], x):
        token, none = (frozen_linear(rows, weight, scale, None, None, how) for how in (TOKEN, NONE))
        assert torch.equal(token, none) == (len(rows) == few)


@pytest.mark.parametrize("m", [1, 3, 12])
def test_small_inputs_beside_a_large_one(device, m):
    """Where the weight of the large one is 0, nothing of the others is lost to it."""
    x = torch.full((m, 320), 2.0**-15)
    x[:, 7] = 2.0**15
    weight = torch.ones(8192, 320)
    weight[:, 7] = 0
    scale = torch.ones(8192, 1, device=device)
    y = frozen_linear(x.bfloat16().to(device), weight.to(E4M3).to(device), scale, None, None, NONE)
    assert (y.cpu() == torch.tensor(319 * 2.0**-15).bfloat16()).all()


@pytest.mark.parametrize("kind", ["tensor", "channel", "block"])
@pytest.mark.parametrize("m", [1, 2, 6, 7, 8, 9, 16, 17, 40])
@pytest.mark.parametrize(("n", "k"), [(144, 320), (8192, 320), (144, 8208)])
def test_sums_that_only_their_scale_keeps_finite(device, n, k, m, kind):
    """A product of x and the codes is beyond float32, the output is not."""
    check(device, m, n, k, kind, NONE, layout=lambda x: x * 1e36)


@pytest.mark.parametrize("m", [1, 12, 20, 40])  # 2 to 8 rows are exact down to 2^-31 of a row's maximum
def test_scales_whose_product_is_beyond_float32(device, m):
    """The large input meets a weight of 0. Where x is quantised, the others are 0 beside it."""
    x = torch.ones(m, 320)
    x[:, 7] = 3e38
    weight = torch.ones(144, 320)
    weight[:, 7] = 0
    scale = torch.full((144, 1), 2048.0)
    y = frozen_linear(x.bfloat16().to(device), weight.to(E4M3).to(device), scale.to(device), None, None, TOKEN)
    assert (y.cpu() == torch.tensor(319 * 2048.0 if m <= FEW else 0.0).bfloat16()).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("m", [1, 4, 16, 40])
def test_other_types(device, dtype, m):
    for activations in (NONE, TOKEN):
        check(device, m, 96, 256, "channel", activations, dtype)


@pytest.mark.parametrize("m", [1, 3, 24])
def test_any_strides(device, m):
    for layout in (
        lambda x: x.T.contiguous().T,
        lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
        lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),  # at an odd address
    ):
        for activations in (NONE, TOKEN):
            check(device, m, 64, 256, "channel", activations, layout=layout)


@pytest.mark.parametrize("cols", [8, 17, 2048, 2050, 5000, 16384, 20000])
def test_each_row_is_scaled_by_its_own_amax(device, cols):
    """Through an identity: a row of very different size than the others keeps its digits."""
    x = torch.randn(20, cols).mul(torch.logspace(-20, 20, 20)[:, None])
    x[3], x[4, 0] = 0, math.nan
    k = min(cols, 64)
    weight = torch.zeros(k, cols)
    weight[:, :k] = torch.eye(k)
    y = frozen_linear(x.to(device), weight.to(E4M3).to(device), torch.ones(1, device=device), None, None, TOKEN).cpu()
    for row in (0, 3, 5, 19):
        scale = exact_scale(x[row].abs().max().item(), E4M3)
        expected = codes(x[row], scale, E4M3).view(E4M3).double() / scale
        torch.testing.assert_close(y[row].double(), expected[:k], rtol=1e-6, atol=0)
    assert y[4].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_each_group_is_scaled_by_its_own_amax_before_blocks(device, dtype):
    """As above, by 128 columns: output j is one of the columns of group j."""
    groups = 9
    x = torch.randn(18, groups, 128) * torch.logspace(-20, 20, groups)[:, None]
    x[3, 4] = 0
    x = x.to(dtype)
    weight = torch.zeros(groups, groups, 128)
    weight[range(groups), range(groups), 7] = 1
    scale = torch.ones(1, groups, device=device)
    y = frozen_linear(x.flatten(1).to(device), weight.flatten(1).to(E4M3).to(device), scale, None, None, TOKEN).cpu()
    for row, j in ((0, 0), (3, 4), (5, 8), (17, 3)):
        exact = exact_scale(x[row, j].abs().max().item(), E4M3)
        expected = codes(x[row, j], exact, E4M3).view(E4M3).double() / exact
        torch.testing.assert_close(y[row, j].double(), expected[7], rtol=2.0**-8, atol=0)


@pytest.mark.parametrize("special", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("m", [1, 6, 16, 17, 33, 200])
@pytest.mark.parametrize("kind", ["tensor", "channel", "block"])
@pytest.mark.parametrize("activations", [NONE, STATIC, TENSOR, TOKEN])
def test_nan_and_inf_are_seen(device, activations, kind, m, special):
    """In the row that has them, whatever the number of rows; and their emulation sees the same."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for k in (256, 80):
            weight, scale, _ = weight_of(32, k, kind)
            weight.view(torch.uint8)[5, 7] = 0x7F
            x = torch.randn(m, k).to(dtype)
            x[m // 2, 3] = special
            slot = torch.tensor([[1 / 64, 64.0, 0.0, 0.0]])
            arguments = [t.to(device) for t in (x, weight, scale)] + [None, slot.to(device), activations]
            expected = torch.ones(m, 32, dtype=torch.bool)
            expected[:, 5] = expected[m // 2] = False
            for linear in (frozen_linear, emulated_linear):
                assert torch.equal(linear(*arguments).isfinite().cpu(), expected), (dtype, k, linear)


@pytest.mark.parametrize("m", [1, 20, 70])
def test_no_outputs(device, m):
    x, weight = torch.randn(m, 64, device=device).bfloat16(), torch.zeros(0, 64, device=device).to(E4M3)
    for activations in (NONE, TOKEN):
        y = frozen_linear(x, weight, torch.ones(1, device=device), None, None, activations)
        assert y.shape == (m, 0) and y.dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (64,), (2, 3, 64)])
def test_any_rank_and_empty(device, shape):
    weight = torch.randn(48, 64).to(E4M3).to(device)
    y = frozen_linear(torch.randn(shape, device=device), weight, torch.ones(1, device=device), None, None, TOKEN)
    assert y.shape == (*shape[:-1], 48)


@pytest.mark.parametrize("m", [2, 24])
def test_output_type_and_autocast(device, m):
    weight = torch.randn(48, 64).to(E4M3).to(device)
    x, one = torch.randn(m, 64, device=device), torch.ones(1, device=device)
    for activations in (NONE, TOKEN):
        y = frozen_linear(x, weight, one, torch.ones(48, device=device), None, activations, torch.bfloat16)
        exact = frozen_linear(x, weight, one, torch.ones(48, device=device), None, activations)
        assert y.dtype == torch.bfloat16 and exact.dtype == torch.float32
        assert (y - exact).abs().max() <= 2.0**-6 * exact.abs().max()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"weight": torch.zeros(48, 64)}, TypeError, "float8_e4m3fn"),
        ({"weight": torch.zeros(48, 65, dtype=E4M3)[:, :64]}, RuntimeError, "contiguous"),
        ({"weight_scale": torch.ones(48)}, RuntimeError, r"\[48, 1\] or \[1, 1\]"),
        ({"weight_scale": torch.ones(1).double()}, TypeError, "float32"),
        ({"x": torch.zeros(4, 63)}, RuntimeError, "in_features = 64"),
        ({"x": torch.zeros(4, 64).double()}, TypeError, "bfloat16, float16 or float32"),
        ({"bias": torch.zeros(47)}, RuntimeError, r"shape \[48\]"),
        ({"activations": STATIC}, RuntimeError, "input_slot; calibrate"),
        ({"activations": 4}, ValueError, "0, 1, 2 or 3"),
    ],
)
def test_bad_arguments_are_named(change, error, match):
    arguments = {
        "x": torch.zeros(4, 64), "weight": torch.zeros(48, 64, dtype=E4M3), "weight_scale": torch.ones(1),
        "bias": None, "input_slot": None, "activations": NONE,
    }  # fmt: skip
    with pytest.raises(error, match=match):
        fp8._C.frozen_linear(*(arguments | change).values(), None)

    def on_meta(value):
        if not isinstance(value, torch.Tensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")

    with pytest.raises(error, match=match):
        frozen_linear(*map(on_meta, (arguments | change).values()))


WRITTEN = ["weight", "weight_scale", "bias"]


@pytest.mark.parametrize("how", ["copy", "multiply", "data"])
@pytest.mark.parametrize("activations", [NONE, TOKEN])
@pytest.mark.parametrize("m", [1, 2, 6, 7, 8, 12, 16, 17, 24, 32])
def test_writes_in_a_graph_are_seen(cuda, m, activations, how):
    """Each kernel for few rows, in a CUDA graph that changes the weight, its scale or the bias between calls, against
    the same calls with the device waited for. A weight that nobody wrote is read before its turn."""
    n, k = 4096, 4096
    state = {"weight": weight_of(n, k, "channel")[0], "weight_scale": torch.rand(n, 1) * 2.0**-7 + 2.0**-9,
             "bias": torch.randn(n).bfloat16()}  # fmt: skip
    state = {name: tensor.to(cuda) for name, tensor in state.items()}
    first = {name: tensor.clone() for name, tensor in state.items()}
    others = {name: (tensor.float() * 2 + 1).clamp(-448, 448).to(tensor.dtype) for name, tensor in state.items()}
    x = torch.randn(m, k, device=cuda).bfloat16()

    def call():
        return frozen_linear(x, *state.values(), None, activations)

    def write(name, i):
        tensor, source = state[name], (others if i % 2 else first)[name]
        if how == "multiply" and tensor.dtype != E4M3:
            tensor.mul_(1.5)
        elif how == "data":
            tensor.data.copy_(source)
        else:
            tensor.copy_(source)

    def run():
        out = [call(), call()]
        for i in range(12):
            write(WRITTEN[i % 3], i // 3 + 1)
            out += [call(), call()]
        return out

    def restore():
        for name, tensor in first.items():
            state[name].copy_(tensor)
        torch.cuda.synchronize()

    expected = []
    with torch.no_grad():
        expected = [call()]
        for i in range(12):
            write(WRITTEN[i % 3], i // 3 + 1)
            torch.cuda.synchronize()
            expected.append(call())
            torch.cuda.synchronize()
    restore()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for _ in range(20):
        restore()
        graph.replay()
        torch.cuda.synchronize()
        for i, y in enumerate(out):
            assert torch.equal(y, expected[i // 2]), i


@pytest.mark.parametrize("m", [1, 6, 12, 24])
def test_codes_of_the_kernel_in_front(cuda, m):
    """quantize lets its successors start before it has stored anything; its codes are the weight of the next call."""
    n = k = 4096
    slots = fp8._C.new_slots(cuda)
    x, scale = torch.randn(m, k, device=cuda).bfloat16(), torch.ones(1, device=cuda)
    weights = [torch.randn(n, k, device=cuda).bfloat16() * 8 for _ in range(8)]

    def codes_of(w):
        return torch.ops.torch_fp8.quantize(w, slots, 1, E4M3, own_amax=True, record=False)[0]

    expected = []
    for w in weights:
        codes = codes_of(w)
        torch.cuda.synchronize()
        expected.append(frozen_linear(x, codes, scale, None, None, TOKEN))
        torch.cuda.synchronize()
        del codes
    for _ in range(5):
        for w, y in zip(weights, expected, strict=True):
            assert torch.equal(frozen_linear(x, codes_of(w), scale, None, None, TOKEN), y)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = [frozen_linear(x, codes_of(w), scale, None, None, TOKEN) for w in weights]
    for _ in range(5):
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(y, z) for y, z in zip(out, expected, strict=True))


@pytest.mark.parametrize("m", [1, 6, 12, 24])
def test_a_bias_cast_by_the_call(cuda, m):
    """Under autocast a float32 bias is cast in front of the product."""
    layer = fp8.freeze(torch.nn.Linear(4096, 4096, device=cuda))
    x = torch.randn(m, 4096, device=cuda)
    with torch.autocast("cuda", torch.bfloat16), torch.no_grad():
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = [layer(x) for _ in range(8)]
        for _ in range(5):
            layer.bias.normal_()
            torch.cuda.synchronize()
            expected = layer(x)
            torch.cuda.synchronize()
            graph.replay()
            torch.cuda.synchronize()
            assert all(torch.equal(y, expected) for y in out)


@pytest.mark.parametrize("m", [2, 12, 24, 70])
def test_another_stream_than_the_current_device_s(cuda, m):
    """Kernels run on the tensors' device, on its current stream."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    weight, scale, _ = weight_of(144, 256, "channel")
    x = torch.randn(m, 256).bfloat16()
    here, there = (frozen_linear(*(t.to(f"cuda:{i}") for t in (x, weight, scale)), None, None, TOKEN) for i in range(2))
    assert there.device.index == 1 and torch.equal(here.cpu(), there.cpu())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("n", "k"), [(130, 272), (40, 33), (3, 4112)])
def test_many_rows_see_the_weight_rounded_once(device, dtype, n, k):
    """Through an identity, past the kernel for few rows. Sums of one value and zeros are exact, so the bits are."""
    weight, _, _ = weight_of(n, k, "tensor")
    weight.view(torch.uint8)[0, :2] = torch.tensor([0x01, 0x87])  # subnormal codes
    eye = torch.eye(max(k, 65), k, dtype=dtype, device=device)
    for size in ((1,), (n, 1), (math.ceil(n / 128), math.ceil(k / 128))):
        scale = torch.rand(size) * 2.0**-7 + 2.0**-9
        blocks = len(size) == 2 and size != (n, 1)
        spread = scale.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k] if blocks else scale
        y = frozen_linear(eye, weight.to(device), scale.to(device), None, None, NONE)
        assert torch.equal(y[:k].cpu(), (weight.float() * spread).to(dtype).T)
