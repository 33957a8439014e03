"""The gradient of a frozen layer's input: against float64, the 16-bit layer, and under all that differentiates."""

import copy
import math

import pytest
import torch
import torch_fp8 as fp8
from frozen_pairs import freeze
from oracle import E4M3, OUTPUT, OUTPUT_SUBNORMAL, accumulation, by_row, weight_of
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch_fp8.format import dequantize
from torch_fp8.layers.frozen import ACTIVATIONS, WEIGHTS

NONE, STATIC, TENSOR, TOKEN = range(4)
FEW = 32  # rows of dy up to which dy is not quantised
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
backward_op = torch.ops.torch_fp8.frozen_linear_backward


def as_quantised(dy, kind, scale):
    """dy in float64 as the product sees it: of channels with their scales, which lie along the sum, taken in."""
    if kind == "channel":
        return by_row(dy.float() * scale.view(-1)) / scale.view(-1).double()
    if kind == "block":
        return by_row(dy.reshape(-1, 128)).view(dy.shape)
    return by_row(dy)


def check(device, m, n, k, kind, activations=TOKEN, dtype=BF16, x_dtype=None, layout=lambda dy: dy):
    weight, scale, exact_weight = weight_of(n, k, kind)
    if scale.numel() == 1:
        kind = "tensor"
    dy = layout(torch.randn(m, n).mul(torch.logspace(-3, 3, m)[:, None]).to(dtype))
    dx = backward_op(dy.to(device), weight.to(device), scale.to(device), activations, x_dtype or dtype).cpu()
    assert dx.dtype == (x_dtype or dtype) and dx.shape == (m, k)
    quantised = m > FEW and activations != NONE and (kind != "block" or n % 128 == 0)
    seen = as_quantised(dy, kind, scale) if quantised else dy.double()
    expected, size = seen @ exact_weight, seen.abs() @ exact_weight.abs()
    bound = OUTPUT[dtype] * expected.abs() + OUTPUT_SUBNORMAL[dtype] + accumulation(device, n) * size
    if not quantised:  # the weight is rounded to 16 bits on a GPU
        bound = bound + size * (n * 2.0**-24 + (0 if device.type == "cpu" else 2.0**-8))
    assert ((dx.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("m", [1, 2, 16, 17, 32, 33, 70])
@pytest.mark.parametrize("activations", range(4))
def test_against_float64(device, kind, m, activations):
    check(device, m, 256, 320, kind, activations)


SIZES = [(16, 16), (128, 129), (1040, 40), (4096, 130), (17408, 33), (33, 7), (250, 250), (640, 250), (128, 8208)]


@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("m", [5, 50])
def test_any_size(device, n, k, m):
    for kind in WEIGHTS:
        check(device, m, n, k, kind)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_as_many_tiles_as_cublaslt_scales_itself(device, kind):
    m, n, k = 1000, 128, 1530
    assert way(m, n, k, kind) == "scaled"
    for dtype in (BF16, FP16, FP32):
        check(device, m, n, k, kind, dtype=dtype)


@pytest.mark.parametrize("dtype", [FP16, FP32])
@pytest.mark.parametrize("m", [4, 40])
def test_other_types(device, dtype, m):
    for kind in WEIGHTS:
        check(device, m, 256, 96, kind, dtype=dtype)
    check(device, m, 256, 96, "channel", NONE, dtype)


@pytest.mark.parametrize("m", [4, 40])
def test_the_input_has_its_own_dtype(device, m):
    """As under autocast: dy in 16 bits, the input in 32."""
    for kind in WEIGHTS:
        weight, scale, _ = weight_of(256, 96, kind)
        on = [t.to(device) for t in (torch.randn(m, 256).bfloat16(), weight, scale)]
        wide, narrow = (backward_op(*on, TOKEN, dtype) for dtype in (FP32, BF16))
        assert wide.dtype == FP32 and torch.equal(wide.bfloat16(), narrow)


@pytest.mark.parametrize("m", [3, 64])
def test_any_strides(device, m):
    for layout in (
        lambda dy: dy.T.contiguous().T,
        lambda dy: torch.cat([dy, dy], 1)[:, : dy.shape[1]],
        lambda dy: torch.cat([dy.new_zeros(1), dy.flatten()])[1:].view_as(dy),  # at an odd address
        lambda dy: dy[:, :1].expand_as(dy),  # as of sum()
    ):
        for kind in WEIGHTS:
            check(device, m, 256, 64, kind, layout=layout)


def way(m, n, k, weight="channel", activations="token", **change):
    words = {"x_dtype": BF16, "dtype": BF16} | change
    return fp8._C.frozen_way(m, n, k, weight=weight, activations=activations, gradient=True, **words)


@pytest.mark.parametrize(
    ("expected", "size", "change"),
    [
        ("zeros", (0, 64, 64), {}),
        ("zeros", (4, 0, 64), {}),
        ("zeros", (4, 64, 0), {}),
        ("dequantized", (32, 64, 64), {}),
        ("dequantized", (4096, 4096, 4096), {"activations": "none"}),
        ("dequantized", (4096, 4000, 4096), {"weight": "block"}),  # the sum's blocks are not whole
        ("scaled", (4096, 4096, 4000), {"weight": "block", "activations": "static"}),
        ("scaled", (4096, 4096, 4096), {"activations": "static", "weight": "tensor"}),  # rows on either side
        ("scaled", (4096, 4096, 4096), {"is_aligned": False}),
        ("rescaled", (33, 64, 64), {}),
        ("rescaled", (4096, 4096, 4096), {"dtype": FP32}),
    ],
)
def test_which_way(expected, size, change):
    assert way(*size, **change) == expected
    if expected != "zeros":
        assert way(*size, **change, on_cuda=False) == expected  # a CPU quantises what a GPU does


@pytest.mark.parametrize("special", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("m", [1, 32, 33, 200])
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("activations", [NONE, TOKEN])
def test_nan_and_inf_are_seen(device, activations, kind, m, special):
    """In the row that has them, and of a weight in the column."""
    for dtype in (BF16, FP16, FP32):
        for n in (256, 80):
            weight, scale, _ = weight_of(n, 32, kind)
            weight.view(torch.uint8)[7, 5] = 0x7F
            dy = torch.randn(m, n).to(dtype)
            dy[m // 2, 3] = special
            expected = torch.ones(m, 32, dtype=torch.bool)
            expected[:, 5] = expected[m // 2] = False
            dx = backward_op(dy.to(device), weight.to(device), scale.to(device), activations, dtype)
            assert torch.equal(dx.isfinite().cpu(), expected), (dtype, n)


def test_a_product_beyond_float32_is_seen(device):
    """Of dy and a channel's scale; finite, it would be a wrong number."""
    dy, scale = torch.ones(40, 64, device=device), torch.ones(64, 1, device=device)
    dy[7, 3], scale[3] = 1e36, 1e4
    dx = backward_op(dy, torch.ones(64, 32, device=device).to(E4M3), scale, TOKEN, FP32)
    assert torch.equal(dx.isfinite().all(1).cpu(), torch.arange(40) != 7)


def test_each_row_keeps_its_digits(device):
    """Tokens' gradients differ by many orders of magnitude; so may the channels' scales."""
    n = k = 64
    dy = torch.randn(40, n) * torch.logspace(-20, 20, 40)[:, None]
    for kind in ("tensor", "channel"):
        scale = torch.full((n, 1) if kind == "channel" else (1,), 2.0**-5)
        dx = backward_op(dy.to(device), torch.eye(n, k).to(E4M3).to(device), scale.to(device), TOKEN, FP32).cpu()
        torch.testing.assert_close(dx.double(), by_row(dy) * 2.0**-5, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(0, 48), (2, 0, 48), (48,), (2, 3, 48), (3, 20, 48)])
def test_any_rank_and_empty(device, shape):
    layer = fp8.FrozenLinear(64, 48, device=device)
    x = torch.randn(*shape[:-1], 64, device=device, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"dy": torch.zeros(4, 47)}, RuntimeError, "out_features = 48, got a gradient of shape"),
        ({"dy": torch.zeros(4, 48).double()}, TypeError, "bfloat16, float16 or float32"),
        ({"weight": torch.zeros(48, 64)}, TypeError, "float8_e4m3fn"),
        ({"weight_scale": torch.ones(48)}, RuntimeError, r"\[48, 1\] or \[1, 1\]"),
        ({"activations": 4}, ValueError, "0, 1, 2 or 3"),
        ({"x_dtype": torch.float64}, TypeError, "x_dtype"),
    ],
)
def test_bad_arguments_are_named(change, error, match):
    arguments = {"dy": torch.zeros(4, 48), "weight": torch.zeros(48, 64, dtype=E4M3), "weight_scale": torch.ones(1),
                 "activations": NONE, "x_dtype": FP32}  # fmt: skip
    with pytest.raises(error, match=match):
        backward_op(*(arguments | change).values())


# ---- the layer ------------------------------------------------------------------------------------------------------

N, K = 256, 320


def layer_of(device, activations="token", weight="channel", dtype=BF16, n=N, k=K):
    plain = nn.Linear(k, n, device=device, dtype=dtype)
    twin = copy.deepcopy(plain)
    fp8.calibrate(plain, [torch.randn(8, k, device=device, dtype=dtype)])
    return freeze(plain, activations, weight), twin


def gradient(function, x, dy):
    x = x.detach().requires_grad_()
    y = function(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    return dx


def error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("rows", [8, 80])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_the_error_is_that_of_fp8(device, activations, weight, rows):
    """Against the layer in 16 bits: E4M3 costs 0.026 a side. Against the values of the codes: one side."""
    layer, plain = layer_of(device, activations, weight)
    x, dy = (torch.randn(2, rows, size, device=device).bfloat16() for size in (K, N))
    dx = gradient(layer, x, dy)
    assert dx.dtype == BF16 and dx.shape == x.shape
    quantised = activations != "none" and 2 * rows > FEW
    assert 0.015 < error(dx, gradient(plain, x, dy)) < (0.045 if quantised else 0.032)
    values = dy.float() @ dequantize(layer.weight, layer.weight_scale)
    assert (error(dx, values) > 0.02) == quantised and error(dx, values) < 0.032


def test_nothing_is_kept_but_the_codes(device):
    layer, _ = layer_of(device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(64, K, device=device).bfloat16().requires_grad_())
    assert {t.data_ptr() for t in kept} == {layer.weight.data_ptr(), layer.weight_scale.data_ptr()}


def test_no_gradient_no_graph(device):
    layer, _ = layer_of(device)
    x = torch.randn(4, K, device=device).bfloat16()
    assert not layer(x).requires_grad
    with torch.no_grad():
        assert not layer(x.requires_grad_()).requires_grad


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("x_dtype", [FP32, BF16])
def test_autocast(device, weight, x_dtype):
    layer, _ = layer_of(device, weight=weight, dtype=FP32)
    x, dy = torch.randn(64, K, device=device).to(x_dtype), torch.randn(64, N, device=device).bfloat16()
    with torch.autocast(device.type, BF16):
        dx = gradient(layer, x, dy)
    assert dx.dtype == x_dtype
    expected = backward_op(dy, layer.weight, layer.weight_scale, TOKEN, BF16)
    assert torch.equal(dx, expected.to(x_dtype))


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled(device, activations, backend):
    if backend == "inductor" and device.type == "cpu":
        pytest.skip("once is enough")
    layer, _ = layer_of(device, activations)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for rows in (4, 40, 80):
        x, dy = (torch.randn(rows, size, device=device).bfloat16() for size in (K, N))
        assert torch.equal(gradient(compiled, x, dy), gradient(layer, x, dy))


def test_several_forwards_before_a_backward(device):
    layer, _ = layer_of(device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    xs = [torch.randn(40, K, device=device).bfloat16().requires_grad_() for _ in range(3)]
    (compiled(xs[0]) + compiled(xs[1]) + compiled(xs[2])).sum().backward()
    for x in xs:
        assert torch.equal(x.grad, gradient(layer, x, torch.ones(40, N, device=device).bfloat16()))


def test_compiled_autograd(device):
    layer, _ = layer_of(device)
    x = torch.randn(40, K, device=device).bfloat16()
    expected = gradient(layer, x, torch.ones(40, N, device=device).bfloat16())
    x.requires_grad_()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        layer(x).sum().backward()
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_make_fx(device, mode):
    layer, _ = layer_of(device)
    x, dy = (torch.randn(40, size, device=device).bfloat16() for size in (K, N))
    graph = make_fx(lambda x, dy: gradient(layer, x, dy), tracing_mode=mode, _allow_non_fake_inputs=True)(x, dy)
    assert backward_op.default in [node.target for node in graph.graph.nodes]
    assert torch.equal(graph(x, dy), gradient(layer, x, dy))


def test_modes_see_both_ops(device):
    layer, _ = layer_of(device)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.randn(40, K, device=device).bfloat16().requires_grad_()
    with Watch():
        layer(x).sum().backward()
    assert {torch.ops.torch_fp8.frozen_linear.default, backward_op.default} <= set(seen)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(device, reentrant):
    layers = nn.Sequential(layer_of(device, n=K)[0], nn.GELU(), layer_of(device, n=K)[0])
    x, dy = (torch.randn(40, K, device=device).bfloat16() for _ in range(2))
    expected = gradient(layers, x, dy)
    x.requires_grad_()
    checkpoint(layers, x, use_reentrant=reentrant).backward(dy)
    assert torch.equal(x.grad, expected)


def test_in_a_cuda_graph(cuda):
    layer, _ = layer_of(cuda)
    x, dy = (torch.randn(64, size, device=cuda).bfloat16() for size in (K, N))
    call = torch.cuda.make_graphed_callables(lambda x: layer(x), (x.clone().requires_grad_(),))
    for _ in range(3):
        x.normal_()
        assert torch.equal(gradient(call, x, dy), gradient(layer, x, dy))


def test_a_weight_that_was_written_to_is_noticed(device):
    layer, _ = layer_of(device)
    y = layer(torch.randn(4, K, device=device).bfloat16().requires_grad_())
    layer.weight_scale.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ---- refusals -------------------------------------------------------------------------------------------------------


def second_derivative(layer, x):
    (dx,) = torch.autograd.grad(layer(x.requires_grad_()).float().square().sum(), x, create_graph=True)
    return dx.sum().backward()


def without_a_scale(layer, x):
    static = fp8.FrozenLinear(K, N, device=x.device, dtype=x.dtype, activations="static")
    static.input_slot = None
    return static(x.requires_grad_())


@pytest.mark.parametrize(
    ("use", "match"),
    [
        (second_derivative, "torch_fp8: .*cannot be differentiated again.*keep the layer in 16 bits"),
        (lambda layer, x: torch.func.grad(lambda x: layer(x).sum())(x), r"torch_fp8: .*torch.func.*loss.backward\(\)"),
        (lambda layer, x: torch.func.jvp(layer, (x,), (x,)), "torch_fp8: .*(forward-mode|torch.func)"),
        (without_a_scale, "static activations need an input_slot; calibrate"),
        *(
            (
                lambda layer, x, name=name: torch.func.functional_call(
                    layer, {name: getattr(layer, name).float().to(FP32 if name == "weight_scale" else BF16)
                            .requires_grad_()}, (x,)
                ),
                "torch_fp8: .*gradient of its input only",
            )
            for name in ("bias", "weight_scale")
        ),
    ],
    ids=["twice", "grad", "jvp", "scale", "bias", "weight_scale"],
)  # fmt: skip
def test_what_has_no_gradient_says_so(device, use, match):
    layer, _ = layer_of(device)
    with pytest.raises(RuntimeError, match=match):
        use(layer, torch.randn(40, K, device=device).bfloat16())


def test_nothing_to_reset():
    with pytest.raises(RuntimeError, match=r"torch_fp8: .*no parameters to reset.*freeze"):
        fp8.FrozenLinear(16, 16).reset_parameters()
