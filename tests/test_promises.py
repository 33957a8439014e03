"""Where scales are made of the past, or are constant, an output depends on its own inputs alone: no token on later
ones, no sample on others of its batch, to the bit. Current scaling cannot promise that: one amax is of all tokens."""

import pytest
import torch
import torch_fp8 as fp8
from torch import nn

from models.llama import SIZES, DecoderLayer

BATCH, TOKENS = 3, 40
RECIPES = {
    "delayed": fp8.DelayedScaling(amax_history_len=4),
    "constant": fp8.ConstantScaling(bias=3),
    "current": fp8.CurrentScaling(),
}


class Stack(nn.Module):
    """x (batch, tokens, 64) -> the same."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(SIZES["tiny"][0]) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def inputs(device, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, TOKENS, 64, generator=generator).to(device, torch.bfloat16)


def trained(recipe, device):
    """After three steps, so that each role has a history."""
    torch.manual_seed(0)
    model = fp8.convert(Stack().to(device, torch.bfloat16), recipe, tokens=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for step in range(3):
        model(inputs(device, step)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def disturbed(x, where):
    """What is there now is another thing, and 50 times as large."""
    y = x.clone()
    y[where] = 50 * torch.randn_like(y[where])
    return y


LATER_TOKENS = (slice(None), slice(TOKENS // 2, None))
OTHER_SAMPLES = (slice(1, None),)
FIRST = {"tokens": (slice(None), slice(0, TOKENS // 2)), "samples": (slice(0, 1),)}
CHANGED = {"tokens": LATER_TOKENS, "samples": OTHER_SAMPLES}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("what", ["tokens", "samples"])
@pytest.mark.parametrize("recipe", ["delayed", "constant"])
def test_an_output_depends_on_its_own_inputs_alone(device, recipe, what, training, compiled):
    model = trained(RECIPES[recipe], device).train(training)
    run = torch.compile(model, backend="aot_eager") if compiled else model
    x = inputs(device, 9)
    plain, other = run(x), run(disturbed(x, CHANGED[what]))
    assert torch.equal(plain[FIRST[what]], other[FIRST[what]])
    assert not torch.equal(plain[CHANGED[what]], other[CHANGED[what]])


@pytest.mark.parametrize("recipe", ["delayed", "constant"])
def test_a_sample_s_gradient_depends_on_no_other_sample(device, recipe):
    model = trained(RECIPES[recipe], device)
    gradients = []
    for x in (inputs(device, 9), disturbed(inputs(device, 9), OTHER_SAMPLES)):
        x.requires_grad_()
        model(x).float().square().sum().mul(1e-3).backward()
        gradients.append(x.grad[:1])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("what", ["tokens", "samples"])
def test_current_scaling_promises_no_such_thing(device, what):
    """As the documentation says of it: this is what an amax of all tokens means."""
    model = trained(RECIPES["current"], device)
    x = inputs(device, 9)
    plain, other = model(x), model(disturbed(x, CHANGED[what]))
    assert not torch.equal(plain[FIRST[what]], other[FIRST[what]])


@pytest.mark.parametrize("activations", ["token", "static", "tensor"])
@pytest.mark.parametrize("what", ["tokens", "samples"])
def test_frozen(device, activations, what):
    """By token and by static scales, but not by one amax of the whole input."""
    torch.manual_seed(0)
    model = Stack().to(device, torch.bfloat16)
    if activations == "static":
        fp8.calibrate(model, [inputs(device, 0)])
    fp8.freeze(model, activations=activations, weight="tensor")
    x = inputs(device, 9)
    with torch.no_grad():
        plain, other = model(x), model(disturbed(x, CHANGED[what]))
    assert torch.equal(plain[FIRST[what]], other[FIRST[what]]) == (activations != "tensor")


@pytest.mark.parametrize("columns", [48, 272, 4096])
def test_a_row_of_a_product_is_one_sum(device, columns):
    """What the promise rests on: rows of a GEMM are summed alike, wherever they stand and whatever stands beside."""
    layer = fp8.Linear(columns, 96, device=device, dtype=torch.bfloat16, recipe=fp8.ConstantScaling(bias=3))
    x = torch.randn(200, columns, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        y = layer(x)
        for order in (torch.randperm(200, device=device), torch.zeros(200, dtype=torch.long, device=device)):
            assert torch.equal(layer(x[order]), y[order])
