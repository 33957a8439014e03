"""fp8.Linear against float64: its numbers, its gradients, its shapes, and the work it does not do."""

import copy
import warnings

import pytest
import torch
import torch_fp8 as fp8
from casts import count_casts
from oracle import E4M3, E5M2, OUTPUT, OUTPUT_SUBNORMAL, accumulation, amax, exact_scale, quantised, rounding
from torch import nn
from torch.nn import functional as F

# (M, K, N): Llama and GPT shapes in small, and odd ones. 4097 on one side at a time.
SHAPES = [
    (64, 256, 688), (48, 688, 256), (32, 192, 576), (16, 768, 192),
    (1, 1, 1), (7, 17, 100), (17, 7, 1), (1, 100, 257), (257, 1000, 17), (100, 257, 7), (1000, 7, 100),
    (4097, 17, 7), (7, 4097, 17), (17, 7, 4097), (33, 48, 8),
]  # fmt: skip
BIG_SHAPES = [(2048, 4096, 4096), (1024, 4096, 14336), (4097, 1000, 257)]  # on a GPU only
FORMATS = {"HYBRID": E5M2, "E4M3": E4M3}


def layer_of(k, n, device, dtype=torch.float32, bias=True, recipe=None):
    return fp8.Linear(k, n, bias, device, dtype, recipe=recipe)


def assert_gemm(out, a, b, formats, device, what, addend=0.0):
    """out = a . b^T + addend (float64) up to what FP8 must lose, element by element.

    Twice: tightly against the product of the rounded operands, where only the sum's and the output's rounding are
    left; and against the true product, where each operand may be off by half a unit of its format besides.
    """
    scales = [exact_scale(amax(t), f) for t, f in zip((a, b), formats)]
    qa, qb = (quantised(t.cpu(), s, f).to(device) for t, s, f in zip((a, b), scales, formats))
    sum_error = accumulation(device, a.shape[1]) * (qa.abs() @ qb.abs().t())
    exact = qa @ qb.t() + addend
    out_error = OUTPUT[out.dtype] * exact.abs() + OUTPUT_SUBNORMAL[out.dtype] + 1e-300
    error = (out.double() - exact).abs()
    assert (error <= sum_error + out_error).all(), f"{what}: over by {(error / (sum_error + out_error)).max():.3g}"

    a, b = a.double(), b.double()
    da, db = (rounding(t, s, f) for t, s, f in zip((a, b), scales, formats))
    operand_error = (a.abs() + da) @ (b.abs() + db).t() - a.abs() @ b.abs().t()
    error = (out.double() - (a @ b.t() + addend)).abs()
    assert (error <= operand_error + sum_error + out_error).all(), f"{what} is not the true product"


def check_against_float64(device, shape, dtype, bias, fp8_format="HYBRID"):
    m, k, n = shape
    layer = layer_of(k, n, device, dtype, bias, fp8.DelayedScaling(fp8_format=fp8_format))
    x = torch.randn(m, k, device=device).to(dtype).requires_grad_()
    dy = (torch.randn(m, n, device=device) * 1e-3).to(dtype)
    y = layer(x)
    y.backward(dy)
    w, g = layer.weight.detach(), FORMATS[fp8_format]
    assert y.shape == (m, n) and all(t.dtype == dtype for t in (y, x.grad, layer.weight.grad))
    addend = layer.bias.detach().double() if bias else 0.0
    assert_gemm(y.detach(), x.detach(), w, (E4M3, E4M3), device, "fprop", addend)
    assert_gemm(x.grad, dy, w.t(), (g, E4M3), device, "dgrad")
    assert_gemm(layer.weight.grad, dy.t(), x.detach().t(), (g, E4M3), device, "wgrad")
    if bias:  # from the gradient as it came, not from its FP8 copy
        column_error = m * 2.0**-24 * dy.double().abs().sum(0) + OUTPUT[dtype] * dy.double().sum(0).abs()
        assert ((layer.bias.grad.double() - dy.double().sum(0)).abs() <= column_error).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_against_float64(device, shape, dtype):
    check_against_float64(device, shape, dtype, bias=True)


@pytest.mark.parametrize("shape", SHAPES[3:8])
@pytest.mark.parametrize("fp8_format", ["HYBRID", "E4M3"])
def test_without_bias_and_both_formats(device, shape, fp8_format):
    check_against_float64(device, shape, torch.bfloat16, bias=False, fp8_format=fp8_format)


@pytest.mark.parametrize("shape", BIG_SHAPES)
def test_model_shapes_against_float64(device, shape):
    if device.type == "cpu":
        shape = tuple(-(-size // 8) for size in shape)
    check_against_float64(device, shape, torch.bfloat16, bias=True)


@pytest.mark.parametrize("recipe", [fp8.DelayedScaling(fast_accum=()), fp8.DelayedScaling(),
                                    fp8.DelayedScaling(fast_accum=("fprop", "dgrad", "wgrad"))], ids=str)  # fmt: skip
def test_typical_error_is_that_of_the_formats(device, recipe):
    """Root mean square over Gaussian data: E4M3 rounds off 2.65 %, E5M2 5.3 %; two roundings add up as squares."""
    x = torch.randn(256, 512, device=device, requires_grad=True)
    dy = torch.randn(256, 384, device=device)
    layer = layer_of(512, 384, device, bias=False, recipe=recipe)
    nn.init.normal_(layer.weight, std=0.02)
    y = layer(x)
    y.backward(dy)

    def relative(ours, exact):
        return ((ours.double() - exact).norm() / exact.norm()).item()

    xd, wd, dyd = x.detach().double(), layer.weight.detach().double(), dy.double()
    forward = (2 * 0.0265**2) ** 0.5
    backward = (0.0265**2 + 0.053**2) ** 0.5
    assert relative(y.detach(), xd @ wd.t()) == pytest.approx(forward, rel=0.05)
    assert relative(x.grad, dyd @ wd) == pytest.approx(backward, rel=0.05)
    assert relative(layer.weight.grad, dyd.t() @ xd) == pytest.approx(backward, rel=0.05)


@pytest.mark.parametrize("shape", [(48,), (3, 48), (2, 3, 48), (2, 1, 3, 48), (0, 48), (2, 0, 48)])
def test_any_rank_and_empty_batches(device, shape):
    layer = layer_of(48, 40, device)
    x = torch.randn(shape, device=device, requires_grad=True)
    y = layer(x)
    reference = nn.Linear(48, 40, device=device)
    assert y.shape == reference(x).shape
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert layer.weight.grad.shape == (40, 48)
    if x.numel() == 0:
        assert layer.weight.grad.count_nonzero() == 0 and layer.bias.grad.count_nonzero() == 0
    else:
        rows = layer_of(48, 40, device)
        rows.load_state_dict(layer.state_dict())
        assert torch.equal(rows(x.detach().reshape(-1, 48)), y.detach().reshape(-1, 40))


def test_non_contiguous_input_and_gradient(device):
    layer = layer_of(32, 24, device)
    base = torch.randn(5, 32, 7, device=device)
    x = base.transpose(1, 2).detach().requires_grad_()
    dense = base.transpose(1, 2).contiguous().requires_grad_()
    dy = torch.randn(24, 7, 5, device=device).permute(2, 1, 0)
    layer(x).backward(dy)
    grad, layer.weight.grad = layer.weight.grad, None
    layer(dense).backward(dy.contiguous())
    assert torch.equal(x.grad, dense.grad) and torch.equal(grad, layer.weight.grad)


def test_output_may_be_changed_in_place(device):
    """As nn.Linear's: residual additions and in-place activations follow it."""
    layer = layer_of(32, 24, device)
    x = torch.randn(2, 5, 32, device=device)
    expected = F.relu(layer(x)).detach()
    assert torch.equal(F.relu_(layer(x)).detach(), expected)


@pytest.mark.parametrize("frozen", ["x", "weight", "bias", "weight and bias", "x and weight"])
def test_no_work_for_gradients_nobody_asked_for(device, frozen):
    layer = layer_of(32, 48, device)
    x = torch.randn(16, 32, device=device, requires_grad="x" not in frozen)
    layer.weight.requires_grad_("weight" not in frozen)
    layer.bias.requires_grad_("bias" not in frozen)
    y = layer(x)
    dy = torch.randn_like(y)
    with count_casts() as counts:
        y.backward(dy)
    assert (counts["dgrad"], counts["wgrad"]) == (x.requires_grad, layer.weight.requires_grad)
    for t in (x, layer.weight, layer.bias):
        assert (t.grad is not None) == t.requires_grad


def test_frozen_layer_on_frozen_input_builds_no_graph(device):
    layer = layer_of(32, 48, device).requires_grad_(False)
    assert layer(torch.randn(4, 32, device=device)).grad_fn is None


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
def test_autocast(device, x_dtype, autocast_dtype):
    layer = layer_of(64, 48, device)
    x = torch.randn(8, 64, device=device).to(x_dtype).requires_grad_()
    with torch.autocast(device.type, autocast_dtype):
        y = layer(x)
    assert y.dtype == autocast_dtype
    dy = torch.randn_like(y)
    y.backward(dy)
    assert x.grad.dtype == x_dtype and layer.weight.grad.dtype == torch.float32
    assert layer.bias.grad.dtype == torch.float32
    # Quantised from the values as they are, not from 16-bit copies.
    addend = layer.bias.detach().to(autocast_dtype).double()
    assert_gemm(y.detach(), x.detach(), layer.weight.detach(), (E4M3, E4M3), device, "fprop", addend)
    assert_gemm(layer.weight.grad, dy.t(), x.detach().t(), (E5M2, E4M3), device, "wgrad")


def test_saves_one_byte_an_element(device):
    layer = layer_of(64, 48, device, torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(32, 64, device=device).bfloat16().requires_grad_())
    assert sum(t.nbytes for t in saved) == 32 * 64 + 64 * 48 + 2 * 4  # x^T, w^T and their scale_inv


def test_the_weight_is_quantised_once_for_the_micro_batches_of_a_step(device):
    layer = layer_of(32, 48, device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = torch.randn(4, 32, device=device, requires_grad=True)

    def casts():
        with count_casts() as counts:
            layer(x).sum().backward()
        return counts["cast_weight"]

    assert [casts() for _ in range(20)] == [1] * 20  # how many there will be is seen in the step before
    optimizer.step()
    assert [casts() for _ in range(3)] == [1, 0, 0]
    with torch.no_grad():
        layer.weight.mul_(2)
    assert [casts(), casts()] == [1, 0]
    layer.weight.data = layer.weight.data.clone()
    assert [casts(), casts()] == [1, 0]
    optimizer.zero_grad()  # the gradient may have been used, past every counter
    assert [casts(), casts()] == [1, 0]
    layer.forget_weight()
    assert [casts(), casts()] == [1, 0]
    layer.weight = nn.Parameter(torch.randn(48, 32, device=device))
    assert [casts(), casts()] == [1, 0]
    layer.load_state_dict({"weight": torch.randn(48, 32), "bias": torch.zeros(48)})
    assert casts() == 1


def test_a_write_past_the_version_counter_is_stale_for_no_step(device):
    layer = layer_of(32, 48, device, bias=False)
    nn.init.constant_(layer.weight, 2.0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    x = torch.ones(1, 32, device=device)
    layer(x).sum().backward()
    layer.weight.data.fill_(1.0)
    optimizer.step()
    torch.testing.assert_close(layer(x), torch.full((1, 48), 32.0, device=device))


def test_weights_that_come_and_go_at_one_address(device):
    """functional_call makes a new weight for each call, often where the last one lay."""
    layer = layer_of(32, 48, device, bias=False)
    x = torch.ones(1, 32, device=device)
    for value in [1.0, 2.0, 3.0, 4.0]:
        weight = torch.full((48, 32), value, device=device)
        y = torch.func.functional_call(layer, {"weight": weight}, (x,))
        torch.testing.assert_close(y, torch.full((1, 48), 32 * value, device=device))
        del weight


def test_a_weight_replaced_twice_at_one_address(device):
    """The allocator gives the second replacement the memory of the original, whose storage is gone."""
    layer = layer_of(64, 64, device, bias=False).eval()
    x = torch.ones(1, 64, device=device)
    for value in range(1, 20):
        layer(x)
        layer.weight.data = torch.full((64, 64), -1.0, device=device)
        layer.weight.data = torch.full((64, 64), float(value), device=device)
        torch.testing.assert_close(layer(x), torch.full((1, 64), 64.0 * value, device=device))


def test_inference_mode_before_training(device):
    layer = layer_of(32, 48, device)
    x = torch.randn(4, 32, device=device)
    with torch.inference_mode():
        expected = layer(x)
    layer.eval()
    y = layer(x.requires_grad_())
    y.sum().backward()
    assert torch.equal(y.detach(), expected) and x.grad is not None


def test_create_graph_is_refused(device):
    layer = layer_of(32, 48, device)
    x = torch.randn(4, 32, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated again.*disabled\(model\)"):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)


def test_backward_twice_with_retain_graph(device):
    layer = layer_of(32, 48, device)
    y = layer(torch.randn(4, 32, device=device))
    dy = torch.randn_like(y)
    y.backward(dy, retain_graph=True)
    first, layer.weight.grad = layer.weight.grad, None
    y.backward(dy)
    assert torch.equal(layer.weight.grad, first)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(dy)


def test_hooks_and_checkpoint_see_the_layer(device):
    layer = layer_of(32, 32, device)
    seen = []
    layer.register_forward_hook(lambda *_: seen.append("forward"))
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    layer(torch.randn(4, 32, device=device, requires_grad=True)).sum().backward()
    assert seen == ["forward", "backward"]


def test_meta_device(device):
    layer = layer_of(32, 48, "meta")
    assert layer(torch.empty(2, 3, 32, device="meta")).shape == (2, 3, 48)
    layer = layer.to_empty(device=device)
    layer.reset_parameters()
    assert torch.equal(layer.fp8_slots[:, 1].cpu(), torch.ones(3))
    layer(torch.randn(2, 32, device=device)).sum().backward()
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("recipe", [fp8.DelayedScaling(amax_history_len=2), fp8.CurrentScaling()], ids=str)
def test_a_gathered_weight_leaves_nothing_behind(device, recipe):
    """FSDP2's case: the same bits, and what waits for backward is the weight itself, which FSDP2 frees and gathers."""
    kept = fp8.Linear(64, 48, device=device, recipe=recipe)
    gathered = copy.deepcopy(kept)
    gathered.fp8_state.memo.set_gathered(True)
    saved = []
    for _ in range(3):
        x = torch.randn(8, 64, device=device, requires_grad=True)
        z = x.detach().clone().requires_grad_()
        kept(x).square().sum().backward()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = gathered(z).square().sum()
        y.backward()
        assert torch.equal(x.grad, z.grad) and torch.equal(kept.weight.grad, gathered.weight.grad)
        for layer in (kept, gathered):
            fp8.update_scales(layer)
            layer.zero_grad()
        assert torch.equal(kept.fp8_slots, gathered.fp8_slots)
    assert any(t.data_ptr() == gathered.weight.data_ptr() for t in saved)
    assert not any(t.numel() == 64 * 48 and t.dtype == torch.float8_e4m3fn for t in saved)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("out_features", [48, 512, 1024])
def test_casts_together_and_apart(device, training, out_features):
    """A GPU casts a small input and a small weight in one launch: codes, scales and amaxes are those of two casts."""
    torch.manual_seed(0)
    x, weight = torch.randn(100, 272, device=device), 1e4 * torch.randn(out_features, 272, device=device)
    layer = fp8.Linear(272, out_features, device=device)
    fresh = layer.fp8_slots
    casts = [layer.fp8_state.options.cast(role).packed for role in range(3)]
    ops = torch.ops.torch_fp8
    for history in range(4):  # of the input, of the weight
        together, apart = fresh.clone(), fresh.clone()
        how = (casts, history, training, training)
        made = ops.linear_forward(x, weight, None, together, [], [], casts, history, [True] * 3, [True, False, False],
                                  training, training, True, True, False, None)  # fmt: skip
        _, x_t, x_scale_inv = ops.cast(x, apart, 0, *how, False, True)
        _, weight_t, weight_scale_inv = ops.cast(weight, apart, 1, *how, False, True)
        for ours, theirs in zip(made[1:], (x_t, x_scale_inv, weight_t, weight_scale_inv)):
            assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
        assert torch.equal(together, apart)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("fp8_gemms", [[True] * 3, [False, True, True]])
@pytest.mark.parametrize("n", [48, 17])
def test_residual(device, dtype, fp8_gemms, n):
    """What is added to y, in the GEMM's sum or after it; the rest that is made does not depend on it."""
    x, weight = torch.randn(2, 5, 64, device=device).to(dtype), torch.randn(n, 64, device=device).to(dtype)
    residual = 4 * torch.randn(2, 5, n, device=device).to(dtype)
    layer = fp8.Linear(64, n, device=device, recipe=fp8.CurrentScaling())
    casts = [layer.fp8_state.options.cast(role).packed for role in range(3)]

    def forward(added):
        return torch.ops.torch_fp8.linear_forward(
            x, weight, None, layer.fp8_slots, [], [], casts, 0, fp8_gemms, [False] * 3, True, False, True, True, False,
            None, added,
        )  # fmt: skip

    without, made = forward(None), forward(residual)
    total = without[0].double() + residual.double()
    rounding = torch.finfo(dtype).eps * (without[0].double().abs() + total.abs())
    assert made[0].dtype == dtype and ((made[0].double() - total).abs() <= rounding).all()
    for a, b in zip(made[1:], without[1:], strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    before = layer.fp8_slots.clone()
    for bad, error, words in [
        (residual[:, :4], RuntimeError, r"the residual must have the output's shape \[2, 5, "),
        (residual[:1], RuntimeError, r"the residual must have the output's shape \[2, 5, "),
        (residual.double(), TypeError, "the residual is Double but the output is .*; cast it"),
    ]:
        with pytest.raises(error, match=f"torch_fp8: {words}"):
            forward(bad)
    assert torch.equal(layer.fp8_slots, before)


@pytest.mark.parametrize(
    "recipe",
    [
        fp8.CurrentScaling(),
        fp8.CurrentScaling(power_of_two=True, grad_margin=3),
        fp8.ConstantScaling(bias=-2, grad_margin=4),
        fp8.DelayedScaling(),
    ],
)
def test_what_has_no_history_trains_in_eval_as_in_train(recipe, device):
    """To the bit; of delayed scaling that is the first step, and in eval() each one."""
    train = layer_of(64, 48, device, recipe=recipe)
    in_eval = copy.deepcopy(train).eval()
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (train, in_eval)]
    for step in range(3):
        x, dy = (torch.randn(32, n, device=device) * (1 + step) for n in (64, 48))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that delayed scaling is trained in eval()
            seen = []
            for layer, optimizer in zip((train, in_eval), optimizers):
                leaf = x.clone().requires_grad_()
                y = layer(leaf)
                y.backward(dy)
                seen.append([y.detach(), leaf.grad, *(parameter.grad.clone() for parameter in layer.parameters())])
                optimizer.step(), optimizer.zero_grad()
        alike = all(map(torch.equal, *seen))
        assert alike == (step == 0 or not isinstance(recipe, fp8.DelayedScaling)), step
    assert not in_eval.fp8_history.any()
