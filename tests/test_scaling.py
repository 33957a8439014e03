"""The step contract: delayed scaling follows its formula to the bit, whatever happens in a step."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import torch_fp8 as fp8
from oracle import E4M3, E5M2, MAX, amax, exact_scale, power_of_two_scale, quantised
from torch.utils.checkpoint import checkpoint
from torch_fp8.scaling import scales

INF, NAN = float("inf"), float("nan")
FORMATS = (E4M3, E4M3, E5M2)


@dataclass
class Role:
    """DESIGN's update rule in plain Python, amaxes in a list."""

    dtype: torch.dtype
    recipe: fp8.DelayedScaling
    history: list = field(default_factory=list)
    scale: float = 1.0
    amax: float = 0.0

    def record(self, x: torch.Tensor) -> None:
        seen = amax(x)
        self.amax = NAN if NAN in (seen, self.amax) or seen != seen or self.amax != self.amax else max(seen, self.amax)

    def update(self) -> None:
        if 0 < self.amax < INF:
            self.history.append(self.amax)
            length = 1 if self.recipe.amax_compute_algo == "most_recent" else self.recipe.amax_history_len
            compute = power_of_two_scale if self.recipe.power_of_two else exact_scale
            self.scale = compute(max(self.history[-length:]), self.dtype, self.recipe.margin)
        self.amax = 0.0


def bits(*values: float) -> list[int]:
    return [int(np.float32(v).view(np.int32)) for v in values]


def assert_state(layer: fp8.Linear, roles: list[Role], when: object) -> None:
    for row, role in zip(layer.fp8_slots.tolist(), roles):
        scale_inv, scale, seen, cursor = row
        assert bits(scale) == bits(role.scale), when
        assert bits(scale_inv) == bits(np.float32(1) / np.float32(role.scale)), when
        assert bits(seen) == bits(role.amax) or (seen != seen and role.amax != role.amax), when
        length = layer.fp8_history.shape[1]
        assert cursor == ((len(role.history) - 1) % length + 1 if role.history else 0), when
    for ring, role in zip(layer.fp8_history.tolist(), roles):
        kept = role.history[-len(ring):]  # fmt: skip
        assert sorted(bits(*ring)) == sorted(bits(*kept, *[0.0] * (len(ring) - len(kept)))), when


RECIPES = [fp8.DelayedScaling(amax_history_len=n, amax_compute_algo=algo, **extra)
           for n in (1, 3, 16, 1024) for algo in ("max", "most_recent")
           for extra in ({},)] + [
    fp8.DelayedScaling(amax_history_len=3, margin=2),
    fp8.DelayedScaling(amax_history_len=5, power_of_two=True, margin=1),
]  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("accumulate", [1, 4])
def test_forty_five_eventful_steps(device, recipe, accumulate):
    layer = fp8.Linear(24, 40, device=device, recipe=recipe)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    roles = [Role(dtype, recipe) for dtype in FORMATS]
    generator = torch.Generator().manual_seed(1)

    def tensor(rows, cols, magnitude):
        return (torch.randn(rows, cols, generator=generator) * magnitude).to(device)

    def forward(x, times=1):
        roles[0].record(x)
        roles[1].record(layer.weight)
        y = layer(x)
        for _ in range(times - 1):
            y = y + layer(x)
        return y

    def backward(y, dy):
        roles[2].record(dy)
        y.backward(dy)

    events = {
        5: "zero", 8: "inf", 11: "nan", 14: "spike", 17: "recompute", 20: "twice", 23: "unused", 26: "evaluate",
        29: "update between", 32: "forward only", 35: "zero weight", 38: "inf weight", 41: "tiny", 43: "huge",
    }  # fmt: skip
    for step in range(45):
        event = events.get(step, "")
        if event not in ("zero weight", "inf weight"):
            with torch.no_grad():
                layer.weight.copy_(tensor(40, 24, 2.0 ** (step % 7 - 3)))
        elif event == "zero weight":
            torch.nn.init.zeros_(layer.weight)
        else:
            with torch.no_grad():
                layer.weight[1, 1] = INF
        for micro in range(accumulate):
            magnitude = {"spike": 1e4, "tiny": 1e-41, "huge": 1e37}.get(event, 2.0 ** ((step + micro) % 5 - 2))
            x, dy = tensor(8, 24, magnitude), tensor(8, 40, 1e-3 * magnitude)
            if event == "zero":
                x.zero_(), dy.zero_()
            elif event in ("inf", "nan"):
                x[3, 3] = dy[2, 2] = INF
                if event == "nan":
                    x[4, 4] = dy[5, 5] = NAN
            if event == "unused":
                continue
            if event == "recompute":
                roles[0].record(x), roles[1].record(layer.weight)
                backward(checkpoint(layer, x.requires_grad_(), use_reentrant=bool(micro % 2)), dy)
            elif event == "twice":
                backward(forward(x, times=2), dy)
            elif event == "evaluate":
                layer.eval()(x * 1e3)  # with gradients, but not in training
                layer.train()
                with torch.no_grad():
                    layer(x * 1e4)
                backward(forward(x), dy)
                with torch.no_grad(), fp8.disabled(layer):
                    layer(x * 1e5)
            elif event == "update between":
                y = forward(x)
                fp8.update_scales(layer)
                for role in roles:
                    role.update()
                backward(y, dy)
            elif event == "forward only":
                forward(x)
            else:
                backward(forward(x), dy)
        assert_state(layer, roles, ("before the update", step, event))
        optimizer.step()
        for role in roles:
            role.update()
        assert_state(layer, roles, ("after the update", step, event))


def test_scales_are_constant_within_a_step_and_used(device):
    """The codes that the GEMMs read are those of the last update's scales, in every micro-batch."""
    layer = fp8.Linear(32, 48, bias=False, device=device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    layer(torch.full((4, 32), 3.0, device=device)).sum().backward()
    optimizer.step()
    scale_x, scale_w = exact_scale(3.0, E4M3), exact_scale(amax(layer.weight), E4M3)
    w = quantised(layer.weight.detach().cpu(), scale_w, E4M3)
    for magnitude in (1.0, 100.0, 0.01):  # 100 saturates: 448 / scale is 3
        x = torch.randn(4, 32) * magnitude
        expected = quantised(x, scale_x, E4M3) @ w.t()
        error = (layer(x.to(device)).detach().double().cpu() - expected).abs().max()
        assert error < 1e-3 * expected.abs().max()


def test_first_use_is_scaled_by_its_own_amax(device):
    """Step 0 and everything before the first update: a wrong scale of 1 would flush or saturate these."""
    for magnitude in (1e-6, 1e6):
        layer = fp8.Linear(32, 48, bias=False, device=device)
        x = (torch.randn(16, 32, device=device) * magnitude).requires_grad_()
        for shrink in (1.0, 1e-3):  # the second micro-batch by its own amax too
            y = layer(x * shrink)
            expected = (x * shrink).double() @ layer.weight.double().t()
            assert (y - expected).norm() < 0.06 * expected.norm()
            y.backward(torch.randn_like(y) / magnitude)
            assert x.grad.count_nonzero() > 0.9 * x.numel()


def test_a_role_that_saw_only_zeros_keeps_its_first_use(device):
    """A zero-initialised output projection gives the layers before it a zero gradient in step 0."""
    layer = fp8.Linear(32, 48, device=device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    x = torch.randn(16, 32, device=device, requires_grad=True)
    layer(x).backward(torch.zeros(16, 48, device=device))
    optimizer.step()
    x.grad = None
    layer(x).backward(torch.full((16, 48), 1e-9, device=device))  # far below E5M2's range at scale 1
    expected = torch.full((16, 48), 1e-9, dtype=torch.float64, device=device) @ layer.weight.detach().double()
    assert (x.grad - expected).norm() < 0.08 * expected.norm()


def test_a_tensor_keeps_the_scale_it_was_quantised_with(device):
    layer = fp8.Linear(32, 48, bias=False, device=device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    x = torch.randn(16, 32, device=device, requires_grad=True)
    dy = torch.randn(16, 48, device=device)
    layer(x).backward(dy)
    optimizer.step()
    layer.weight.grad = x.grad = None
    layer(x).backward(dy)
    plain = layer.weight.grad.clone(), x.grad.clone()

    layer.weight.grad = x.grad = None
    y = layer(x)
    layer.fp8_slots[:2].mul_(torch.tensor([8.0, 0.125, 1.0, 1.0], device=device))  # what an update could do
    y.backward(dy)
    assert torch.equal(layer.weight.grad, plain[0]) and torch.equal(x.grad, plain[1])


@pytest.mark.parametrize("training, grad", [(False, True), (True, False), (False, False)])
def test_evaluation_records_nothing(device, training, grad):
    layer = fp8.Linear(32, 48, device=device).train(training)
    before = layer.fp8_slots.clone()
    with torch.set_grad_enabled(grad):
        y = layer(torch.randn(4, 32, device=device, requires_grad=True))
    if grad:
        y.sum().backward()
    assert torch.equal(layer.fp8_slots, before)


def test_evaluation_between_update_and_training_hides_no_weight_amax(device):
    layer = fp8.Linear(32, 48, device=device)
    x = torch.randn(4, 32, device=device)
    with torch.no_grad():
        layer(x)  # quantises and keeps the weight, unrecorded
    layer(x)
    assert layer.fp8_slots[1, 2] == layer.weight.abs().max()


class TestWhoUpdates:
    def step(self, layer, optimizer, x):
        layer(x).sum().backward()
        optimizer.step()

    def test_two_optimizers_in_one_step_update_once(self, device):
        layer = fp8.Linear(32, 48, device=device, recipe=fp8.DelayedScaling(amax_history_len=8))
        one, two = torch.optim.SGD([layer.weight], lr=0.0), torch.optim.AdamW([layer.bias])
        x = torch.randn(4, 32, device=device)
        layer(x).sum().backward()
        one.step(), two.step()
        assert layer.fp8_slots[:, 3].tolist() == [1, 1, 1]
        assert (layer.fp8_history != 0).sum() == 3

    def test_frozen_base_under_another_optimizer(self, device):
        base, adapter = fp8.Linear(32, 32, device=device).requires_grad_(False), torch.nn.Linear(32, 32, device=device)
        optimizer = torch.optim.SGD(adapter.parameters(), lr=0.0)
        base(adapter(torch.randn(4, 32, device=device))).sum().backward()
        optimizer.step()
        assert base.fp8_slots[:, 3].tolist() == [1, 1, 1]

    def test_other_models_are_left_alone(self, device):
        mine, other = fp8.Linear(32, 32, device=device), fp8.Linear(32, 32, device=device)
        x = torch.randn(4, 32, device=device)
        with torch.no_grad():
            other(x)
        before = other.fp8_slots.clone()
        self.step(mine, torch.optim.SGD(mine.parameters(), lr=0.0), x)
        assert torch.equal(other.fp8_slots, before)

    def test_off_and_by_hand(self, device):
        layer = fp8.Linear(32, 48, device=device, auto_update=False)
        self.step(layer, torch.optim.SGD(layer.parameters(), lr=0.0), torch.randn(4, 32, device=device))
        assert layer.fp8_slots[:, 3].tolist() == [0, 0, 0] and (layer.fp8_slots[:, 2] > 0).all()
        fp8.update_scales(torch.nn.Sequential(layer))
        assert layer.fp8_slots[:, 3].tolist() == [1, 1, 1] and (layer.fp8_slots[:, 2] == 0).all()

    def test_a_late_backward_joins_the_next_update(self, device):
        layer = fp8.Linear(32, 48, device=device)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
        y = layer(torch.randn(4, 32, device=device))
        optimizer.step()
        y.sum().backward()
        optimizer.step()  # the layer was in no forward since the last update
        assert layer.fp8_slots[:, 3].tolist() == [1, 1, 1]


@pytest.mark.parametrize("power_of_two", [False, True])
def test_current_scaling_uses_every_tensors_own_amax(device, power_of_two):
    recipe = fp8.CurrentScaling(power_of_two=power_of_two, grad_margin=3)
    layer = fp8.Linear(32, 48, bias=False, device=device, recipe=recipe)
    compute = power_of_two_scale if power_of_two else exact_scale
    # The last is so small that the margin is taken off a scale that was clipped.
    for magnitude in (1.0, 1e-3, 1e3, 2.0**-30):
        x = torch.randn(16, 32) * magnitude
        dy = torch.randn(16, 48) * magnitude
        layer.weight.grad = None
        y = layer(x.to(device))
        y.backward(dy.to(device))
        w = layer.weight.detach().cpu()
        qx, qw = (quantised(t, compute(amax(t), E4M3), E4M3) for t in (x, w))
        qdy = quantised(dy, compute(amax(dy), E5M2, 3), E5M2)
        for ours, expected in ((y.detach(), qx @ qw.t()), (layer.weight.grad, qdy.t() @ qx)):
            assert (ours.cpu() - expected).abs().max() < 1e-3 * expected.abs().max()


def test_constant_scaling(device):
    layer = fp8.Linear(32, 48, bias=False, device=device, recipe=fp8.ConstantScaling(bias=3, grad_margin=5))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    for _ in range(3):
        x, dy = torch.randn(16, 32) * 30, torch.randn(16, 48)
        layer.weight.grad = None
        y = layer(x.to(device))
        y.backward(dy.to(device))
        qx, qw = quantised(x, 8.0, E4M3), quantised(layer.weight.detach().cpu(), 8.0, E4M3)
        assert x.abs().max() * 8 > MAX[E4M3]  # saturates, as it must
        for ours, expected in ((y.detach(), qx @ qw.t()), (layer.weight.grad, quantised(dy, 0.25, E5M2).t() @ qx)):
            assert (ours.cpu() - expected).abs().max() < 1e-3 * expected.abs().max()
        optimizer.step()
    assert layer.fp8_slots.tolist() == [[0.125, 8.0, 0, 0], [0.125, 8.0, 0, 0], [4.0, 0.25, 0, 0]]


def test_constants_of_their_own():
    recipe = fp8.ConstantScaling(bias=3, weight_bias=11, grad_bias=20, grad_margin=2)
    layer = fp8.Linear(32, 48, recipe=recipe)
    x, dy = torch.randn(16, 32) * 5, torch.randn(16, 48) * 2.0**-20
    layer(x).backward(dy)
    assert scales(layer) == {"input": 2.0**3, "weight": 2.0**11, "grad_output": 2.0**18}
    expected = quantised(dy, 2.0**18, E5M2).t() @ quantised(x, 8.0, E4M3)
    assert (layer.weight.grad - expected).abs().max() < 1e-3 * expected.abs().max()
    qw = quantised(layer.weight.detach(), 2.0**11, E4M3)
    assert (layer(x) - layer.bias - quantised(x, 8.0, E4M3) @ qw.t()).abs().max() < 1e-3
    assert scales(fp8.Linear(32, 48, recipe=fp8.ConstantScaling(bias=3, weight_bias=0)))["weight"] == 1.0
    for name in ("weight_bias", "grad_bias"):
        for value in (32, -32, 1.5, True, "3"):
            with pytest.raises(ValueError, match=f"{name} must be an integer from -31 to 31, or None"):
                fp8.ConstantScaling(**{name: value})


@dataclass
class LayerOfRoles:
    """A layer's state for update_scales_, on a device, beside what the oracle has of it."""

    slots: torch.Tensor
    history: torch.Tensor
    targets: list
    power_of_two: list
    roles: list


def layer_of_roles(count: int, length: int, device: torch.device, power_of_two: bool | None = None) -> LayerOfRoles:
    """Formats, margins and, where power_of_two is None, its values alternate over the roles."""
    roles = []
    for i in range(count):
        exact = i % 3 != 1 if power_of_two is None else not power_of_two
        recipe = fp8.DelayedScaling(amax_history_len=length, margin=i % 4, power_of_two=not exact)
        roles.append(Role((E4M3, E5M2)[i % 2], recipe))
    slots = torch.zeros(count, 4, device=device)
    slots[:, :2] = 1.0
    return LayerOfRoles(
        slots,
        torch.zeros(count, length, device=device),
        [MAX[role.dtype] * 2.0**-role.recipe.margin for role in roles],
        [(1 + role.recipe.margin) * role.recipe.power_of_two for role in roles],
        roles,
    )


def update_of(layers: list[LayerOfRoles], one_a_layer: bool = False) -> tuple:
    return (
        [layer.slots for layer in layers],
        [layer.history for layer in layers],
        [target for layer in layers for target in layer.targets],
        [p for layer in layers for p in (layer.power_of_two[:1] if one_a_layer else layer.power_of_two)],
    )


def state_of(layer: LayerOfRoles) -> tuple:
    return layer.slots.clone(), layer.history.clone()


@pytest.mark.parametrize("counts", [[1], [3], [10], [16], [3, 10, 1, 16, 3], [3] * 5], ids=str)
def test_update_of_any_number_of_roles(device, counts):
    layers = [layer_of_roles(count, 1 + 4 * i, device) for i, count in enumerate(counts)]
    generator = torch.Generator().manual_seed(2)
    for step in range(14):
        for layer in layers:
            amaxes = torch.exp2(torch.randn(len(layer.roles), generator=generator) * 6)
            for special in (0.0, INF, NAN):
                amaxes[torch.rand(len(amaxes), generator=generator) < 0.1] = special
            layer.slots[:, 2] = amaxes.to(device)
            for role, seen in zip(layer.roles, amaxes.tolist()):
                role.amax = seen
                role.update()
        torch.ops.torch_fp8.update_scales_(*update_of(layers))
        for layer in layers:
            for (scale_inv, scale, seen, cursor), ring, role in zip(
                layer.slots.tolist(), layer.history.tolist(), layer.roles
            ):
                assert bits(scale, seen) == bits(role.scale, 0.0), step
                assert bits(scale_inv) == bits(np.float32(1) / np.float32(role.scale)), step
                length = len(ring)
                assert cursor == ((len(role.history) - 1) % length + 1 if role.history else 0), step
                kept = role.history[-length:]
                assert sorted(bits(*ring)) == sorted(bits(*kept, *[0.0] * (length - len(kept)))), step


def test_a_role_that_never_records_keeps_what_it_has(device):
    """So that roles of constant and of current scaling can be in one call with others."""
    layer = layer_of_roles(4, 3, device)
    layer.slots[1] = torch.tensor([0.125, 8.0, 0.0, 0.0])
    before = state_of(layer)
    layer.slots[[0, 2], 2] = 5.0
    torch.ops.torch_fp8.update_scales_(*update_of([layer]))
    for now, then in zip((layer.slots, layer.history), before):
        assert torch.equal(now[[1, 3]], then[[1, 3]])
        assert not torch.equal(now[0], then[0]) and not torch.equal(now[2], then[2])


@pytest.mark.parametrize("power_of_two", [False, True])
def test_power_of_two_for_each_layer_or_for_each_role(device, power_of_two):
    results = []
    for one_a_layer in (True, False):
        kinds = ((3, power_of_two), (10, not power_of_two), (1, power_of_two))
        layers = [layer_of_roles(count, 4, device, kind) for count, kind in kinds]
        for layer in layers:
            layer.slots[:, 2] = torch.arange(1.0, len(layer.roles) + 1, device=device)
        torch.ops.torch_fp8.update_scales_(*update_of(layers, one_a_layer))
        results.append([t for layer in layers for t in state_of(layer)])
    for one, other in zip(*results):
        assert torch.equal(one, other)
    assert power_of_two == all(s == 2.0 ** round(np.log2(s)) for s in results[0][0][:, 1].tolist())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"histories": []}, "2 layers need as many histories, got 0"),
        ({"targets": [448.0] * 6}, "2 layers with 13 roles need a target for each role .* got 6 and 13"),
        ({"power_of_two": [0] * 3}, "a power_of_two for each role or layer, got 13 and 3"),
        ({"power_of_two": [0] * 12 + [33]}, "a power_of_two must be 0, or 1 \\+ a margin from 0 to 31, got 33"),
        ({"power_of_two": [-1] + [0] * 12}, "a power_of_two must be 0, or 1 \\+ a margin from 0 to 31, got -1"),
        ({"targets": [448.0] * 12 + [0.0]}, r"a target must be in \(0, 57344\], got 0"),
    ],
)
def test_what_does_not_fit_the_roles_is_refused(device, change, message):
    layers = [layer_of_roles(count, 2, device) for count in (3, 10)]
    for layer in layers:
        layer.slots[:, 2] = 7.0
    before = [state_of(layer) for layer in layers]
    names = ("slots", "histories", "targets", "power_of_two")
    arguments = dict(zip(names, update_of(layers))) | change
    with pytest.raises((RuntimeError, ValueError), match=message):
        torch.ops.torch_fp8.update_scales_(*arguments.values())
    for layer, then in zip(layers, before):
        assert all(map(torch.equal, state_of(layer), then))


# A kernel's arguments hold 1364 roles: 454 of these layers and two roles of the next.
@pytest.mark.parametrize("count", [1, 454, 455, 999, 5000])
def test_update_of_any_number_of_layers(device, count):
    """In few launches: a kernel's arguments hold over a thousand roles, more than that travel as one table."""
    amaxes = torch.rand(count, 3) + 0.5
    slots = [fp8._C.new_slots(device) for _ in range(count)]
    for row, seen in zip(slots, amaxes.to(device)):
        row[:, 2] = seen
    histories = [torch.zeros(3, 2, device=device) for _ in range(count)]
    arguments = (slots, histories, [448.0, 448.0, 57344.0] * count, [0] * count)
    if device.type == "cuda":
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
            torch.ops.torch_fp8.update_scales_(*arguments)
            torch.cuda.synchronize()
        assert sum(e.count for e in profile.key_averages() if e.device_type.name == "CUDA") <= 3
    else:
        torch.ops.torch_fp8.update_scales_(*arguments)
    scales = torch.stack(slots)[:, :, 1].cpu()
    assert torch.equal(scales, torch.tensor([448.0, 448.0, 57344.0]) / amaxes)
    assert torch.equal(torch.stack(histories)[:, :, 0].cpu(), amaxes)


def test_capture_before_the_first_update_is_an_error(cuda):
    layer = fp8.Linear(32, 48, device=cuda)
    x = torch.randn(16, 32, device=cuda)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="before this layer's first scaling update"), torch.cuda.graph(graph):
        layer(x)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("change", ["4", "1e3", "1e-3", "add", "other"])
def test_a_weight_changed_behind_the_optimizer_is_cast_by_its_own_amax(device, change, power_of_two):
    """By a write that nothing can see, after an update has made its scale; in training too."""
    layer = fp8.Linear(128, 96, bias=False, device=device, recipe=fp8.DelayedScaling(power_of_two=power_of_two))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    for _ in range(2):
        layer(torch.randn(64, 128, device=device)).backward(torch.randn(64, 96, device=device))
        optimizer.step()
    weight = layer.weight.data
    if change == "add":
        weight.add_(torch.randn_like(weight))
    elif change == "other":
        weight.copy_(torch.randn_like(weight) * 20)
    else:
        weight.mul_(float(change))
    x = torch.randn(64, 128, device=device, requires_grad=True)
    y = layer(x)
    exact = x.detach().double() @ weight.double().t()
    assert (y.double() - exact).norm() < 0.045 * exact.norm()
    dy = torch.randn_like(y)
    y.backward(dy)
    exact = dy.double() @ weight.double()  # through the transpose
    assert (x.grad.double() - exact).norm() < 0.1 * exact.norm()


# ---- what is not finite ----------------------------------------------------------------------------------------------

OVERFLOW_RECIPES = [
    fp8.DelayedScaling(amax_history_len=4),
    fp8.DelayedScaling(fp8_format="E4M3", power_of_two=True),
    fp8.CurrentScaling(),
    fp8.CurrentScaling(fp8_format="E4M3", power_of_two=True, grad_margin=3),
    fp8.ConstantScaling(),
    fp8.ConstantScaling(fp8_format="E4M3", grad_margin=6),
]


class Overflow:
    """Two layers without bias. The gradient between them is 4 times the sum of 16 output gradients of +-2^11: within
    float16 where the signs alternate, 2^17 and so beyond it where they agree. No output gradient ever saturates."""

    def __init__(self, device, recipe=None):
        self.device = device
        torch.manual_seed(3)
        self.model = torch.nn.Sequential(torch.nn.Linear(32, 48, bias=False), torch.nn.Linear(48, 16, bias=False))
        with torch.no_grad():
            self.model[1].weight.fill_(4.0)
        self.model.to(device)
        if recipe is not None:
            fp8.convert(self.model, recipe, tokens=None)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4)
        self.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**8, growth_interval=10**6)

    def backward(self, overflow: bool) -> None:
        x = torch.randn(24, 32, generator=torch.Generator().manual_seed(4)).to(self.device)
        signs = torch.ones(16) if overflow else torch.tensor([1.0, -1.0] * 7 + [1.0, -0.75])
        with torch.autocast(self.device.type, torch.float16):
            y = self.model(x)
        self.scaler.scale((y.float() * 8.0 * signs.to(self.device)).sum()).backward()

    def step(self, overflow: bool) -> tuple:
        """The scale that follows, and whether the optimizer stepped."""
        before = self.model[0].weight.detach().clone()
        self.backward(overflow)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return self.scaler.get_scale(), not torch.equal(self.model[0].weight, before)


@pytest.mark.parametrize("recipe", OVERFLOW_RECIPES, ids=str)
@pytest.mark.parametrize("good_steps", [0, 3])
def test_grad_scaler_sees_an_inner_overflow(device, recipe, good_steps):
    ours, theirs = Overflow(device, recipe), Overflow(device)
    for _ in range(good_steps):
        assert ours.step(False) == theirs.step(False) == (2.0**8, True)
    assert ours.step(True) == theirs.step(True) == (2.0**7, False)
    for _ in range(3):
        assert ours.step(False) == theirs.step(False) == (2.0**7, True)
    assert all(p.isfinite().all() for p in ours.model.parameters())


@pytest.mark.parametrize("recipe", [None, *OVERFLOW_RECIPES], ids=str)
def test_clipping_sees_an_inner_overflow(device, recipe):
    model = Overflow(device, recipe)
    model.backward(overflow=True)
    with pytest.raises(RuntimeError, match="non-finite"):
        torch.nn.utils.clip_grad_norm_(model.model.parameters(), 1.0, error_if_nonfinite=True)


@pytest.mark.parametrize("recipe", OVERFLOW_RECIPES, ids=str)
@pytest.mark.parametrize("special", [INF, -INF, NAN])
def test_where_nn_linear_is_not_finite_neither_is_ours(device, recipe, special):
    """In every role, each alone, before the first update and after."""
    for place in ("input", "weight", "grad_output"):
        for steps in (0, 2):
            theirs = torch.nn.Linear(32, 48, bias=False, device=device)
            ours = fp8.convert(torch.nn.Sequential(torch.nn.Linear(32, 48, bias=False, device=device)), recipe,
                               tokens=None)[0]  # fmt: skip
            ours.load_state_dict(theirs.state_dict())
            optimizer = torch.optim.SGD(ours.parameters(), lr=0.0)
            for _ in range(steps):
                ours(torch.randn(16, 32, device=device)).backward(torch.randn(16, 48, device=device))
                optimizer.step()
                optimizer.zero_grad()
            x, dy = torch.randn(16, 32, device=device), torch.randn(16, 48, device=device)
            if place == "input":
                x[3, 5] = special
            elif place == "grad_output":
                dy[7, 9] = special
            else:
                with torch.no_grad():
                    ours.weight[11, 13] = theirs.weight[11, 13] = special
            results = []
            for layer in (ours, theirs):
                given = x.clone().requires_grad_()
                y = layer(given)
                y.backward(dy)
                results.append((y.detach(), given.grad, layer.weight.grad))
            for a, b in zip(*results):
                assert torch.equal(a.isfinite(), b.isfinite()), (place, steps)
