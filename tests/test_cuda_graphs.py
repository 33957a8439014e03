"""Training steps recorded in CUDA graphs: replays equal eager steps to the bit, and the scales advance in them."""

import copy

import pytest
import torch
import torch_fp8 as fp8
from casts import count_casts
from torch import nn

REPLAYS = 50


def twins(cuda, count, **kwargs):
    """Models in the same state, each after three eager steps, with its optimizer."""
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)).to(cuda, torch.bfloat16)
    fp8.convert(model, fp8.DelayedScaling(amax_history_len=8), tokens=None)
    models = [copy.deepcopy(model) for _ in range(count)]
    # The way of torch.cuda.graph's documentation: gradients and optimizer state are made on a side stream.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2, **kwargs) for model in models]
        for model, optimizer in zip(models, optimizers):
            for step in range(3):
                eager_step(model, optimizer, batch(step, cuda))
    torch.cuda.current_stream().wait_stream(side)
    return models, optimizers


def batch(step, cuda):
    # Growing, so that scales change all the time.
    generator = torch.Generator().manual_seed(step)
    return (torch.randn(32, 64, generator=generator) * (1 + step)).to(cuda, torch.bfloat16)


def eager_step(model, optimizer, x):
    optimizer.zero_grad(set_to_none=True)
    loss = (model(x) - x).float().square().mean()
    loss.backward()
    optimizer.step()
    return loss


def assert_same(a, b):
    states = [[*m.named_parameters(), *fp8.state_dict(m).items()] for m in (a, b)]
    for (name, p), (_, q) in zip(*states, strict=True):
        assert torch.equal(p, q), name


def test_whole_step_with_optimizer_and_scaling_update(cuda):
    (eager, captured), optimizers = twins(cuda, 2, capturable=True)
    x = batch(3, cuda)
    graph = torch.cuda.CUDAGraph()
    before = fp8.state_dict(captured)
    with torch.cuda.graph(graph):
        loss = eager_step(captured, optimizers[1], x)
    for key, value in fp8.state_dict(captured).items():
        assert torch.equal(value, before[key]), key  # capturing runs nothing
    scales = set()
    for step in range(3, 3 + REPLAYS):
        x.copy_(batch(step, cuda))
        graph.replay()
        assert torch.equal(eager_step(eager, optimizers[0], batch(step, cuda)), loss), step
        scales.add(captured[0].fp8_slots[0, 1].item())
    assert_same(eager, captured)
    assert len(scales) >= REPLAYS / 3
    # And on in eager mode: nothing of what was recorded is taken for a cast weight.
    for step in range(3):
        losses = [
            eager_step(model, optimizer, batch(step, cuda)) for model, optimizer in zip((eager, captured), optimizers)
        ]
        assert torch.equal(*losses)
    assert_same(eager, captured)


def test_micro_batches_in_one_graph_cast_the_weight_once(cuda):
    (captured,), (optimizer,) = twins(cuda, 1, capturable=True)
    x = batch(3, cuda)
    optimizer.zero_grad()
    for _ in range(3):  # how many a step has is known from the step before
        captured(x).float().sum().backward()
    optimizer.step()
    with count_casts() as counts, torch.cuda.graph(torch.cuda.CUDAGraph()):
        for _ in range(3):
            captured(x).float().sum().backward()
    assert counts["cast_weight"] == len([m for m in captured if isinstance(m, fp8.Linear)])


def test_graphed_callables_beside_an_eager_optimizer(cuda):
    """Replays tell the host nothing, and still the scales follow the optimizer's steps."""
    (eager, graphed), optimizers = twins(cuda, 2)
    call = torch.cuda.make_graphed_callables(copy.deepcopy(graphed), (batch(0, cuda),))
    # make_graphed_callables runs the model a few times to warm up, which records amaxes: start both from one state.
    call.load_state_dict(eager.state_dict()), fp8.load_state_dict(call, fp8.state_dict(eager))
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in (eager, call)]
    for step in range(REPLAYS):
        losses = [eager_step(model, opt, batch(step, cuda)) for model, opt in zip((eager, call), optimizers)]
        assert torch.equal(*losses), step
        assert_same(eager, call)


def test_a_captured_forward_follows_the_weight(cuda):
    (model,), _ = twins(cuda, 1)
    model.eval()
    x = batch(0, cuda)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        model(x)
        with torch.cuda.graph(graph):
            out = model(x)
        model[0].weight.mul_(2)
        graph.replay()
        assert torch.equal(out, model(x))


@pytest.mark.parametrize("recipe", [fp8.CurrentScaling(), fp8.ConstantScaling()], ids=str)
def test_recipes_without_history_can_be_captured_at_once(cuda, recipe):
    layer = fp8.Linear(64, 64, device=cuda, recipe=recipe)
    x = torch.randn(16, 64, device=cuda)
    expected = layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("attention", ["16bit", "fp8_forward", "fp8"])
def test_a_block_with_its_optimizer(cuda, attention):
    torch.manual_seed(0)
    block = fp8.TransformerBlock(
        64, 4, 96, num_kv_heads=2, head_dim=128, attention=attention, device=cuda, dtype=torch.bfloat16,
        recipe=fp8.DelayedScaling(amax_history_len=8),
    )  # fmt: skip
    models = [copy.deepcopy(block) for _ in range(2)]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True) for model in models]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for model, optimizer in zip(models, optimizers):
            for step in range(3):
                eager_step(model, optimizer, batch(step, cuda).view(2, 16, 64))
    torch.cuda.current_stream().wait_stream(side)
    x = batch(3, cuda).view(2, 16, 64)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = eager_step(models[1], optimizers[1], x)
    for step in range(3, 13):
        x.copy_(batch(step, cuda).view(2, 16, 64))
        graph.replay()
        assert torch.equal(eager_step(models[0], optimizers[0], batch(step, cuda).view(2, 16, 64)), loss), step
    assert_same(*models)
    if attention != "16bit":
        assert [model.sdpa.last for model in models] == [(attention, "asked for")] * 2
        assert (models[0].sdpa.fp8_slots[[0, 1, 2, 4], 3] == 13 % 8).all()  # the scales advance in replays


@pytest.mark.parametrize("mode", ["fp8_forward", "fp8"])
def test_a_graphed_block_with_fp8_attention_beside_an_eager_optimizer(cuda, mode):
    torch.manual_seed(0)
    made = {"num_kv_heads": 2, "head_dim": 128, "attention": mode, "device": cuda, "dtype": torch.bfloat16}
    eager = fp8.TransformerBlock(64, 4, 96, recipe=fp8.DelayedScaling(amax_history_len=8), **made)
    optimizer = torch.optim.AdamW(eager.parameters(), lr=1e-3)
    for step in range(3):
        eager_step(eager, optimizer, batch(step, cuda).view(2, 16, 64))
    call = torch.cuda.make_graphed_callables(copy.deepcopy(eager), (batch(0, cuda).view(2, 16, 64),))
    call.load_state_dict(eager.state_dict()), fp8.load_state_dict(call, fp8.state_dict(eager))
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (eager, call)]
    for step in range(3, 13):
        x = batch(step, cuda).view(2, 16, 64)
        losses = [eager_step(model, opt, x) for model, opt in zip((eager, call), optimizers)]
        assert torch.equal(*losses), step
        assert_same(eager, call)
