"""The scaling state: where it goes, what keeps it whole, and what is refused."""

import copy
import io
import pickle

import pytest
import torch
import torch_fp8 as fp8
from torch import nn


def make(device, **recipe):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24)).to(device)
    return fp8.convert(model, recipe=fp8.DelayedScaling(amax_history_len=5, **recipe), tokens=None)


def train(model, optimizer, steps, start=0):
    device = next(model.parameters()).device
    losses = []
    for step in range(start, start + steps):
        x = torch.randn(16, 24, generator=torch.Generator().manual_seed(step)).to(device)
        loss = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def state_bits(model):
    return [(k, t.cpu().view(torch.uint8)) for k, t in {**model.state_dict(), **fp8.state_dict(model)}.items()]


def assert_same(a, b):
    for (key, ours), (other, theirs) in zip(state_bits(a), state_bits(b), strict=True):
        assert key == other and torch.equal(ours, theirs), key


@pytest.mark.parametrize("weights_first", [True, False])
def test_resumed_training_gives_the_same_bits(device, weights_first):
    straight = make(device)
    optimizer = adamw(straight)
    train(straight, optimizer, 4)
    file = io.BytesIO()
    torch.save({"model": straight.state_dict(), "optimizer": optimizer.state_dict(),
                "fp8": fp8.state_dict(straight)}, file)  # fmt: skip
    expected = train(straight, optimizer, 4, start=4)

    file.seek(0)
    saved = torch.load(file, weights_only=True, map_location=device)
    resumed = make(device)
    train(resumed, adamw(resumed), 1, start=99)  # a past to be forgotten
    optimizer = adamw(resumed)
    if weights_first:
        resumed.load_state_dict(saved["model"])
    fp8.load_state_dict(resumed, saved["fp8"])
    if not weights_first:
        resumed.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert train(resumed, optimizer, 4, start=4) == expected
    assert_same(resumed, straight)


def test_weights_without_scaling_state_start_like_step_0(device):
    model, fresh = make(device), make(device)
    train(model, adamw(model), 3)
    weights = {key: 100 * t for key, t in fresh.state_dict().items()}
    model.load_state_dict(weights)
    fresh.load_state_dict(weights)
    x = torch.randn(8, 24, device=device)
    assert torch.equal(model(x), fresh(x))


def test_state_is_plain_named_float32_and_a_copy(device):
    model = make(device)
    state = fp8.state_dict(model)
    assert {key: tuple(t.shape) for key, t in state.items()} == {
        "0.fp8_slots": (3, 4), "0.fp8_history": (3, 5), "2.fp8_slots": (3, 4), "2.fp8_history": (3, 5),
    }  # fmt: skip
    assert all(type(t) is torch.Tensor and t.dtype == torch.float32 for t in state.values())
    train(model, adamw(model), 1)
    assert state["0.fp8_slots"][0, 3] == 0
    assert fp8.state_dict(fp8.convert(make(device), recipe=fp8.ConstantScaling())) == {}


def test_state_loaded_into_a_model_in_use_counts_at_once(device):
    trained, model = make(device), make(device)
    train(trained, torch.optim.SGD(trained.parameters(), lr=0.0), 2)
    x = torch.randn(8, 24, device=device)
    model(x)  # it knows now that it has no history, and keeps its weight's codes
    fp8.load_state_dict(model, fp8.state_dict(trained))
    assert torch.equal(model(100 * x), trained(100 * x))  # saturated by the history's scales


def damaged(state, key, change):
    state = dict(state)
    change(state) if key is None else state.__setitem__(key, change(state[key].clone()))
    return state


def put(row, column, value):
    def change(tensor):
        tensor[row, column] = value
        return tensor

    return change


@pytest.mark.parametrize(
    "key, change, error, match",
    [
        (None, lambda s: s.pop("2.fp8_slots"), KeyError, "missing 2.fp8_slots, surplus none"),
        (None, lambda s: s.update({"9.fp8_slots": 1}), KeyError, "missing none, surplus 9.fp8_slots"),
        ("2.fp8_slots", lambda t: t[:2], ValueError, r"2.fp8_slots must have shape \[3, 4\], got \[2, 4\]"),
        ("2.fp8_history", lambda t: t[:, :3], ValueError, r"shape \[3, 5\], got \[3, 3\]; .*amax_history_len"),
        ("2.fp8_slots", lambda t: t.double(), TypeError, "must be a float32 tensor, got torch.float64"),
        ("2.fp8_slots", lambda t: t.tolist(), TypeError, "must be a float32 tensor, got list"),
        ("2.fp8_slots", put(1, 1, float("nan")), ValueError, "2.fp8_slots holds values that no scaling state has"),
        ("2.fp8_slots", put(1, 1, 0.0), ValueError, "2.fp8_slots holds values"),
        ("2.fp8_slots", put(1, 0, 123.0), ValueError, "2.fp8_slots holds values"),
        ("2.fp8_slots", put(1, 2, -1.0), ValueError, "2.fp8_slots holds values"),
        ("2.fp8_slots", put(1, 3, 1.5), ValueError, "2.fp8_slots holds values"),
        ("2.fp8_slots", put(1, 3, 6.0), ValueError, "2.fp8_slots holds values"),
        ("2.fp8_history", put(2, 2, float("inf")), ValueError, "2.fp8_history holds values"),
    ],
)
def test_a_state_that_does_not_fit_is_named_and_nothing_is_loaded(device, key, change, error, match):
    model, other = make(device), make(device)
    train(model, adamw(model), 3)
    train(other, adamw(other), 6)
    before = state_bits(model)
    with pytest.raises(error, match=match):
        fp8.load_state_dict(model, damaged(fp8.state_dict(other), key, change))
    for (name, ours), (_, theirs) in zip(state_bits(model), before):
        assert torch.equal(ours, theirs), name
    with pytest.raises(TypeError, match="must be a dict of tensors, got list"):
        fp8.load_state_dict(model, [])


@pytest.mark.parametrize("assign", [False, True])
def test_codes_of_a_frozen_layer_are_no_weight(assign):
    layer = fp8.Linear(32, 32)
    before = layer.weight.detach().clone()
    state = fp8.freeze(nn.Linear(32, 32)).state_dict()
    with pytest.raises(RuntimeError, match="torch_fp8: weight must be 16-bit or float32, got .*, codes of a frozen"):
        layer.load_state_dict(state, strict=False, assign=assign)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double", "float"])
def test_state_stays_float32_to_the_bit_when_the_model_is_cast(device, cast):
    model = make(device)
    train(model, adamw(model), 3)
    before = fp8.state_dict(model)
    getattr(model, cast)()
    for key, tensor in fp8.state_dict(model).items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, before[key])
    model.to(torch.bfloat16).to(device, torch.float32).type(torch.float16)
    for key, tensor in fp8.state_dict(model).items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, before[key])
    model.float()(torch.randn(4, 24, device=device)).sum().backward()


def test_state_moves_with_the_model(cuda):
    model = make("cpu")
    train(model, adamw(model), 3)
    before = fp8.state_dict(model)
    model.to(cuda)
    assert all(t.is_cuda and torch.equal(t.cpu(), before[key]) for key, t in fp8.state_dict(model).items())
    train(model, adamw(model), 2)
    model.cpu()
    train(model, adamw(model), 1)
    assert model[0].fp8_slots.device.type == "cpu" and model[0].fp8_slots[0, 3] == 1  # the ring of 5 has turned


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_whole_and_independent(device, copied):
    model = make(device)
    optimizer = adamw(model)
    train(model, optimizer, 2)
    twin = copied(model)
    assert_same(twin, model)
    twin_optimizer = adamw(twin)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = copied(model)
    expected = train(twin, twin_optimizer, 3, start=2)
    assert_same(model, before)
    assert train(model, optimizer, 3, start=2) == expected
    assert_same(model, twin)


def test_torch_save_of_a_whole_model(device):
    model = make(device)
    train(model, adamw(model), 2)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert_same(torch.load(file, weights_only=False), model)


def test_shared_memory(device):
    model = make(device)
    train(model, adamw(model), 2)
    before = fp8.state_dict(model)
    model.share_memory()
    for key, tensor in fp8.state_dict(model).items():
        assert torch.equal(tensor, before[key])
    train(model, adamw(model), 1)


def test_meta_construction(device):
    with torch.device("meta"):
        model = fp8.convert(nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24)), tokens=None)
    assert model[0].fp8_slots.is_meta and "own amax" in str(fp8.summary(model))
    model.to_empty(device=device)
    assert model[0].fp8_slots.tolist() == [[1, 1, 0, 0]] * 3 and model[0].fp8_history.count_nonzero() == 0
    model.load_state_dict(make(device).state_dict())
    train(model, adamw(model), 2)


def test_a_state_of_a_larger_format_is_refused(device):
    """E5M2's scale for gradients would saturate E4M3, and the first step would learn from what is left of them."""
    saved, other = (make(device, fp8_format=name) for name in ("HYBRID", "E4M3"))
    for model in (saved, other):
        train(model, torch.optim.SGD(model.parameters(), lr=0.01), 2)
    before = fp8.state_dict(other)
    with pytest.raises(ValueError, match="grad_output has a format up to 448, the saved scale is of one up to 57344; "):
        fp8.load_state_dict(other, fp8.state_dict(saved))
    assert all(torch.equal(value, before[key]) for key, value in fp8.state_dict(other).items())
    fp8.load_state_dict(saved, before)  # where nothing saturates
    fp8.load_state_dict(make(device, margin=3), fp8.state_dict(saved))
