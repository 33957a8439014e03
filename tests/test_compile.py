"""torch.compile(fullgraph=True) against eager mode: the same bits, no graph break, no graph that is not needed.

The backend is aot_eager, which traces forward and backward as the default one does but runs PyTorch's own kernels, so
that bits can be compared; the default backend runs once, for its own kernels round the GELU differently.
"""

import copy
import pickle

import pytest
import torch
import torch_fp8 as fp8
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

STEPS = 5


class Net(nn.Module):
    def __init__(self, dtype=torch.float32, bias=True):
        super().__init__()
        self.up, self.down = nn.Linear(32, 48, bias, dtype=dtype), nn.Linear(48, 32, bias, dtype=dtype)
        self.recompute = False

    def block(self, x):
        return x + self.down(F.relu(self.up(x)))

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False) if self.recompute else self.block(x)


class CountingBackend:
    """aot_eager, and how many graphs it was given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


def twins(device, recipe=None, **kwargs):
    eager = fp8.convert(Net(**kwargs).to(device), recipe, tokens=None)
    traced = copy.deepcopy(eager)
    backend = CountingBackend()
    return eager, traced, torch.compile(traced, fullgraph=True, backend=backend), backend


def assert_same(eager, traced):
    for (name, a), b in zip(eager.named_parameters(), traced.parameters()):
        assert torch.equal(a, b), name
        assert (a.grad is None) == (b.grad is None) and (a.grad is None or torch.equal(a.grad, b.grad)), name
    for (name, a), b in zip(fp8.state_dict(eager).items(), fp8.state_dict(traced).values(), strict=True):
        assert torch.equal(a, b), name


def train(eager, traced, compiled, device, dtype=torch.float32, batch=lambda step: 24):
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (eager, traced)]
    for step in range(STEPS):
        losses = []
        for model in (eager, compiled):
            torch.manual_seed(step)
            for _ in range(2):  # micro-batches
                losses.append(model(torch.randn(batch(step), 32, device=device, dtype=dtype)).square().mean())
                losses[-1].backward()
        assert torch.equal(torch.stack(losses[:2]), torch.stack(losses[2:])), step
        assert_same(eager, traced)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert_same(eager, traced)


RECIPES = [
    fp8.DelayedScaling(amax_history_len=3),
    fp8.DelayedScaling(fp8_format="E4M3", margin=1, power_of_two=True, fast_accum=("fprop", "wgrad")),
    fp8.CurrentScaling(power_of_two=True, grad_margin=3),
    fp8.ConstantScaling(bias=2, grad_margin=1),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_same_bits_as_eager(device, recipe):
    eager, traced, compiled, backend = twins(device, recipe)
    train(eager, traced, compiled, device)
    # Of delayed scaling the first step is a graph of its own, scaled by each tensor's amax; no other step is.
    assert backend.graphs == (2 if isinstance(recipe, fp8.DelayedScaling) else 1)
    updates = 0 if isinstance(recipe, fp8.ConstantScaling) else (STEPS - 1) % recipe.history_length + 1
    assert traced.up.fp8_slots[:, 3].tolist() == [updates] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_16_bit_parameters(device, dtype, bias):
    eager, traced, compiled, _ = twins(device, dtype=dtype, bias=bias)
    train(eager, traced, compiled, device, dtype)


def test_many_forwards_before_the_first_backward(device):
    """As in a pipeline."""
    eager, traced, compiled, _ = twins(device)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (eager, traced)]
    for step in range(STEPS):
        for model in (eager, compiled):
            torch.manual_seed(step)
            for loss in [model(torch.randn(8, 32, device=device)).square().mean() for _ in range(3)]:
                loss.backward()
        assert_same(eager, traced)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_the_state_is_one_wherever_it_goes(device):
    """The gradient's slot is reached over two tensors; after every way of moving a model they are still one."""

    def check(layer):
        layer.fp8_state.grad_slots[2, 2] = 7.0
        assert layer.fp8_slots[2, 2] == 7.0

    layer = fp8.Linear(32, 32, device=device)
    check(layer)
    check(layer.bfloat16().to(device))
    check(copy.deepcopy(layer))
    check(pickle.loads(pickle.dumps(layer)))
    check(fp8.Linear(32, 32, device="meta").to_empty(device=device))
    if device.type == "cpu":
        check(layer.share_memory())


def test_recomputation(device):
    eager, traced, compiled, _ = twins(device)
    traced.recompute = True
    train(eager, traced, compiled, device)


def test_any_batch_size_in_one_more_graph(device):
    """The first size is a constant of the graph; the second makes a graph for all."""
    eager, traced, compiled, backend = twins(device)
    train(eager, traced, compiled, device, batch=lambda step: 24 + 8 * step)
    assert backend.graphs <= 3


def test_blocks_compiled_one_by_one_share_a_graph(device):
    """Regional compilation: what differs between layers is no part of the graph, and every layer's scales advance."""
    model = fp8.convert(nn.Sequential(*(Net() for _ in range(4))).to(device), tokens=None)
    backend = CountingBackend()
    for block in model:
        block.compile(fullgraph=True, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(STEPS):
        model(torch.randn(8, 32, device=device)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    # Two for each kind of input: the first block's needs no gradient.
    assert backend.graphs <= 4
    for block in model:
        assert block.up.fp8_slots[:, 3].eq(STEPS).all() and block.down.fp8_slots[:, 3].eq(STEPS).all()


def test_autocast(device):
    eager, traced, compiled, _ = twins(device)
    x = torch.randn(8, 32, device=device)
    outs = []
    for model in (eager, compiled):
        with torch.autocast(device.type, torch.bfloat16):
            outs.append(model(x))
        outs[-1].float().square().mean().backward()
    assert outs[0].dtype == outs[1].dtype and torch.equal(*outs)
    assert_same(eager, traced)


def test_frozen_weights_and_frozen_input(device):
    eager, traced, compiled, _ = twins(device)
    for model in (eager, traced):
        model.up.weight.requires_grad_(False)
        model.down.bias.requires_grad_(False)
    train(eager, traced, compiled, device)


def test_main_grad(device):
    eager, traced, compiled, _ = twins(device)
    for model in (eager, traced):
        model.up.fuse_main_grad = True
        model.up.weight.main_grad = torch.zeros(48, 32, device=device)
    train(eager, traced, compiled, device)
    assert eager.up.weight.main_grad.any()
    assert torch.equal(eager.up.weight.main_grad, traced.up.weight.main_grad)


@pytest.mark.parametrize("how", ["no_grad", "eval"])
def test_inference_records_nothing(device, how):
    eager, traced, compiled, _ = twins(device)
    train(eager, traced, compiled, device)
    before = traced.up.fp8_slots.clone()
    x = torch.randn(8, 32, device=device) * 100
    if how == "eval":
        eager.eval(), traced.eval()
    with torch.set_grad_enabled(how == "eval"):
        assert torch.equal(eager(x), compiled(x))
    assert torch.equal(traced.up.fp8_slots, before)
    assert traced.up.fp8_state.memo.used_roles == 0


def test_trained_in_eager_mode_then_compiled(device):
    """The history that eager steps left, or a loaded state, is known to the first traced step."""
    eager, traced, compiled, backend = twins(device)
    train(eager, traced, traced, device)
    train(eager, traced, compiled, device)
    assert backend.graphs == 1
    fresh = fp8.convert(Net().to(device), tokens=None)
    fresh.load_state_dict(eager.state_dict())
    fp8.load_state_dict(fresh, fp8.state_dict(eager))
    x = torch.randn(8, 32, device=device)
    assert torch.equal(torch.compile(fresh, fullgraph=True, backend="aot_eager")(x), eager(x))


def test_a_captured_step_waits_for_nothing_once_all_roles_have_a_history(device):
    """Only updates after a role was used without history read the device."""
    model = fp8.convert(Net().to(device), tokens=None)
    model.up.weight.requires_grad_(False)
    model.up.bias.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        model(torch.randn(4, 32, device=device)).sum().backward()
        assert fp8.scaling._may_have_begun(model.down.fp8_state) == (step == 0)
        assert fp8.scaling._may_have_begun(model.up.fp8_state) == (step == 0)
        optimizer.step()
    # Nobody asked for a gradient below up: its grad_output has no history and never will, and nobody waits for it.
    assert model.up.fp8_state.has_history == (True, True, False) and model.down.fp8_state.has_history == (True,) * 3


def test_bad_input_is_named(device):
    compiled = torch.compile(fp8.Linear(32, 48, device=device), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="in_features = 32"):
        compiled(torch.randn(4, 31, device=device))
    compiled = torch.compile(fp8.Linear(32, 48, device=device).bfloat16(), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="the input is Float but the weight is BFloat16;"):
        compiled(torch.randn(4, 32, device=device))


def test_default_backend_learns_the_same(device):
    learns_the_same(device, "default")


def test_cuda_graphs_of_the_default_backend_learn_the_same(cuda):
    learns_the_same(cuda, "reduce-overhead")


def learns_the_same(device, mode):
    eager, traced, _, _ = twins(device)
    compiled = torch.compile(traced, fullgraph=True, mode=mode)
    losses = []
    for model, parameters in ((eager, eager.parameters()), (compiled, traced.parameters())):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        run = []
        for _ in range(STEPS):
            x = torch.randn(24, 32, device=device)
            loss = (model(x) - x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.append(loss.item())
        losses.append(run)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[1][-1] < losses[1][0]
    assert traced.up.fp8_slots[:, 3].eq(STEPS).all()
