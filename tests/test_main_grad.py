"""fuse_main_grad: the GEMM adds the weight's gradient to weight.main_grad, as Megatron's optimizers want it."""

import pytest
import torch
import torch_fp8 as fp8
from oracle import OUTPUT
from torch import nn


def pair(device, dtype, main_dtype, k=48, n=32):
    """The same layer without and with fusion, the second with a main_grad that is not zero."""
    plain = fp8.Linear(k, n, device=device, dtype=dtype)
    fused = fp8.Linear(k, n, device=device, dtype=dtype, fuse_main_grad=True)
    fused.load_state_dict(plain.state_dict())
    fused.weight.main_grad = torch.randn(n, k, device=device).to(main_dtype)
    return plain, fused


def run(layer, x, dy):
    """The gradient of x."""
    x = x.clone().requires_grad_()
    layer(x).backward(dy)
    return x.grad


def batches_of(device, dtype, k=48, n=32, m=20):
    return [(torch.randn(m, k, device=device).to(dtype), torch.randn(m, n, device=device).to(dtype)) for _ in range(3)]


@pytest.mark.parametrize("main_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [48, 50])
def test_adds_every_micro_batch_and_nothing_else_changes(device, main_dtype, k):
    plain, fused = pair(device, torch.float32, main_dtype, k)
    exact = fused.weight.main_grad.double()
    magnitude = exact.abs()
    for x, dy in batches_of(device, torch.float32, k):
        assert torch.equal(run(fused, x, dy), run(plain, x, dy))
        assert fused.weight.grad is None
        assert torch.equal(fused.bias.grad, plain.bias.grad)
        exact += plain.weight.grad.double()
        magnitude += plain.weight.grad.abs().double()
        plain.weight.grad = None
    # In each of three steps the product and the total are rounded to main_grad's type; what is rounded is never larger
    # than the sum of all magnitudes.
    bound = 6 * OUTPUT[main_dtype] * magnitude
    assert ((fused.weight.main_grad.double() - exact).abs() <= bound).all()


def test_hooks_that_wait_for_a_gradient_run(device):
    """Where the weight says grad_added_to_main_grad, as Megatron's parameters do, autograd gets a stand-in."""
    _, fused = pair(device, torch.bfloat16, torch.float32)
    fused.weight.grad_added_to_main_grad = False
    seen = []
    fused.weight.register_post_accumulate_grad_hook(lambda p: seen.append((p.grad.shape, p.grad.dtype)))
    run(fused, *batches_of(device, torch.bfloat16)[0])
    assert fused.weight.grad_added_to_main_grad is True
    assert seen == [(fused.weight.shape, torch.bfloat16)]


def test_a_forward_without_gradients_leaves_it_alone(device):
    _, fused = pair(device, torch.bfloat16, torch.float32)
    fused.weight.grad_added_to_main_grad = False
    start = fused.weight.main_grad.clone()
    x = torch.randn(4, 48, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        fused(x)
    fused.weight.requires_grad_(False)
    fused(x.requires_grad_()).sum().backward()
    assert fused.weight.grad_added_to_main_grad is False
    assert torch.equal(fused.weight.main_grad, start)


def test_convert_and_disabled(device):
    """convert passes the option on; in 16 bits the gradient goes where nn.Linear's goes."""
    model = fp8.convert(nn.Sequential(nn.Linear(16, 16, device=device)), tokens=None, fuse_main_grad=True)
    model[0].weight.main_grad = torch.zeros(16, 16, device=device)
    x = torch.randn(4, 16, device=device)
    with fp8.disabled(model):
        model(x).sum().backward()
    assert model[0].weight.grad is not None and not model[0].weight.main_grad.any()
    model[0].weight.grad = None
    model(x).sum().backward()
    assert model[0].weight.grad is None and model[0].weight.main_grad.any()
    fp8.revert(model)
    assert not hasattr(model[0], "fuse_main_grad")


@pytest.mark.parametrize(
    "main_grad, error, message",
    [
        (None, RuntimeError, "needs a tensor weight.main_grad before its forward pass, got NoneType"),
        (torch.zeros(16, 32), RuntimeError, r"of the weight's shape \[32, 16\].*got shape \[16, 32\]"),
        (torch.zeros(16, 32).t(), RuntimeError, "must be a contiguous tensor"),
        (torch.zeros(32, 16).half(), TypeError, "must be float32 or bfloat16, got .*Half"),
        (torch.zeros(32, 16, requires_grad=True), RuntimeError, "that does not require grad"),
        (torch.zeros(32 * 16 + 1)[1:].view(32, 16), RuntimeError, "must start at a 16-byte boundary"),
    ],
)
def test_bad_main_grad(main_grad, error, message):
    layer = fp8.Linear(16, 32, fuse_main_grad=True)
    layer.weight.main_grad = main_grad
    before = layer.fp8_slots.clone()
    with pytest.raises(error, match=message):
        layer(torch.randn(4, 16))
    assert torch.equal(layer.fp8_slots, before)
