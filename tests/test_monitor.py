"""What the monitor counts, against counts of plain PyTorch; when it looks, and that looking changes nothing."""

import copy
import json
import math

import pytest
import torch
import torch_fp8 as fp8
from oracle import E4M3, E5M2, MAX, amax, codes, exact_scale, power_of_two_scale
from torch import nn
from torch.utils.checkpoint import checkpoint

SPECIAL = [0.0, -0.0, 1e-45, -1e-40, 1e-30, 448.0, 449.0, 57344.0, -6e4, 3e38, math.inf, -math.inf, math.nan]


def losses(x, scale, dtype):
    """saturated, flushed, Inf, NaN."""
    scaled = (x.float() * torch.tensor(scale, dtype=torch.float32)).abs().where(x.isfinite(), 0)
    flushed = (x != 0) & ((codes(x, scale, dtype) & 0x7F) == 0)
    return [t.sum().item() for t in (scaled > MAX[dtype], flushed, x.isinf(), x.isnan())]


@pytest.mark.parametrize("fp8_dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 2.0**-9, 3.7e5])
def test_counts(device, dtype, fp8_dtype, scale):
    x = torch.randn(37, 65).mul(torch.logspace(-9, 6, 65)).to(dtype)
    x[3, : len(SPECIAL)] = torch.tensor(SPECIAL).to(dtype)
    slots = fp8._C.new_slots(torch.device("cpu"))
    slots[1, 0], slots[1, 1] = 1 / scale, scale
    for view in (x, x.T, x[::2, 1::3], x[:1], x[0], x[:0]):
        before = slots.clone()
        counts, values = torch.ops.torch_fp8.count_losses(view.to(device), slots.to(device), 1, fp8_dtype)
        assert counts.tolist() == losses(view, scale, fp8_dtype)
        assert values[0].item() == torch.tensor(scale).item()
        assert values[1].item() == amax(view) or (values[1].isnan() and view.isnan().any())
        assert torch.equal(slots, before)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_counts_by_own_amax(device, power_of_two):
    x = torch.randn(64, 48) * 1e-6
    x[0, 0] = 1.0
    slots = fp8._C.new_slots(device)
    options = {"own_amax": True, "power_of_two": power_of_two, "margin": 2}
    counts, values = torch.ops.torch_fp8.count_losses(x.to(device), slots, 0, E4M3, **options)
    scale = (power_of_two_scale if power_of_two else exact_scale)(amax(x), E4M3, 2)
    assert values.tolist() == [scale, amax(x)]
    assert counts.tolist() == losses(x, scale, E4M3) and counts[1] > 0


def test_counting_is_exact_beyond_float32(device):
    x = torch.full((1, 2**24 + 1), 2.0, dtype=torch.bfloat16, device=device)
    slots = fp8._C.new_slots(device)
    slots[:, 1] = 1e6
    counts, _ = torch.ops.torch_fp8.count_losses(x, slots, 0, E4M3)
    assert counts.tolist() == [2**24 + 1, 0, 0, 0]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)
        self.recompute = False

    def inner(self, x):
        return self.down(torch.relu(self.up(x)))

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False) if self.recompute else self.inner(x)


def train(model, device, steps, micro_batches=1, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        for micro in range(micro_batches):
            generator = torch.Generator().manual_seed(10 * step + micro)
            model(torch.randn(8, 32, generator=generator).to(device)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


RECIPES = [fp8.DelayedScaling(amax_history_len=2), fp8.CurrentScaling(power_of_two=True), fp8.ConstantScaling(bias=3)]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_samples_what_the_layers_cast_and_changes_nothing(device, recipe):
    model = fp8.convert(Net().to(device), recipe, tokens=None)
    twin = copy.deepcopy(model)
    monitor = fp8.monitor(model, every=2)
    used = []  # scale_inv of every cast, as the layers see it

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.torch_fp8.linear_backward.default:  # the scale is not among its results
                dy, slots, cast = args[0], args[8].clone(), fp8.Linear(1, 1, recipe=recipe).fp8_state.options.cast(2)
                own = isinstance(recipe, fp8.CurrentScaling) or (not slots[2, 3] and cast.scaling.name == "delayed")
                used.append(
                    torch.ops.torch_fp8.quantize(
                        dy, slots, 2, cast.dtype, own_amax=bool(own), power_of_two=cast.power_of_two, record=False
                    )[2].item()
                )
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.torch_fp8.linear_forward.default:
                used.extend(scale_inv.item() for scale_inv in (out[2], out[4]) if scale_inv.numel())
            return out

    with torch.autograd.set_multithreading_enabled(False), Watch():
        train(model, device, 1)
    scales = {(s.layer, s.role): s.scale for s in monitor.samples}
    sampled = list(scales.values())
    for scale_inv in used:
        sampled.remove(next(scale for scale in sampled if scale == pytest.approx(1 / scale_inv, rel=1e-6)))
    assert len(sampled) == 1  # the first layer's weight, whose scale is not kept where nobody asks for dx
    train(model, device, 4)
    monitor.close()
    train(twin, device, 1), train(twin, device, 4)
    states = [[*m.named_parameters(), *fp8.state_dict(m).items()] for m in (model, twin)]
    for (name, p), (_, q) in zip(*states, strict=True):
        assert torch.equal(p, q), name
    assert sorted({s.step for s in monitor.samples}) == [0, 2, 4]
    assert len(monitor.samples) == 3 * 2 * 3
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_micro_batches_are_summed_and_evaluation_is_not_seen(device):
    model = fp8.convert(Net().to(device), fp8.ConstantScaling(bias=31), tokens=None)
    with fp8.monitor(model) as monitor:
        model.eval()
        model(torch.randn(8, 32, device=device))
        model.train()
        with torch.no_grad():
            model(torch.randn(8, 32, device=device))
        with fp8.disabled(model):
            model(torch.randn(8, 32, device=device))
        train(model, device, 1, micro_batches=3)
    elements = {(s.layer, s.role): s.elements for s in monitor.samples}
    assert elements["up", "input"] == 3 * 8 * 32 and elements["up", "weight"] == 32 * 48
    assert elements["down", "grad_output"] == 3 * 8 * 32
    assert all(s.saturated == s.elements for s in monitor.samples if s.layer == "up" and s.role != "grad_output")


def test_recomputation_and_frozen_layers(device):
    model = fp8.convert(Net().to(device), tokens=None)
    model.recompute = True
    model.up.requires_grad_(False)
    with fp8.monitor(model) as monitor:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        train(model, device, 1, optimizer=optimizer)
    assert {(s.layer, s.role) for s in monitor.samples} >= {
        ("down", role) for role in ("input", "weight", "grad_output")
    }


def test_of_two_optimizers_one_counts(device):
    model = fp8.convert(Net().to(device), tokens=None)
    monitor = fp8.monitor(model, every=1)
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (model.up, model.down)]
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    for _ in range(3):
        model(torch.randn(8, 32, device=device)).sum().backward()
        for optimizer in (other, *optimizers):
            optimizer.step()
            optimizer.zero_grad()
    monitor.close()
    assert sorted({s.step for s in monitor.samples}) == [0, 1, 2]


def test_a_compiled_model_is_sampled_in_eager_steps(device):
    model = fp8.convert(Net().to(device), tokens=None)
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(compiled, device, 2, optimizer=optimizer)
    with fp8.monitor(model, every=3) as monitor:
        train(compiled, device, 4, optimizer=optimizer)
    assert sorted({s.step for s in monitor.samples}) == [0, 3]


class Writer:
    def __init__(self):
        self.scalars = {}

    def add_scalar(self, tag, value, step):
        self.scalars[tag, step] = value


def test_outputs(device, tmp_path):
    model = fp8.convert(Net().to(device), fp8.ConstantScaling(bias=8), tokens=None)
    with torch.no_grad():
        model.down.weight.mul_(1e-6)[0, 0] = math.nan
    writer = Writer()
    monitor = fp8.monitor(model, every=2, writer=writer)
    assert "no step was sampled" in str(monitor)
    train(model, device, 3)
    monitor.close()
    table = str(monitor).splitlines()
    assert table[0] == "step 2" and "NaN" in table[2]  # the worst on top
    assert len(table) == 2 + 6
    tags = {tag for tag, _ in writer.scalars}
    assert "fp8/log2_scale/input/up" in tags and len(tags) == 2 * 3 * 5
    assert writer.scalars["fp8/log2_scale/weight/down", 0] == 8.0
    monitor.save_png(tmp_path / "scales.png")
    assert (tmp_path / "scales.png").read_bytes()[:4] == b"\x89PNG"
    monitor.save_json(tmp_path / "samples.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [s.step for s in monitor.samples]


def test_tensorboard_takes_it(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    model = fp8.convert(Net(), tokens=None)
    with tensorboard.SummaryWriter(str(tmp_path)) as writer, fp8.monitor(model, writer=writer):
        train(model, "cpu", 1)
    assert any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "every", "match"),
    [
        (nn.Linear(4, 4), 100, "no FP8 layer"),
        (fp8.Linear(16, 16), 0, "positive number"),
        (fp8.Linear(16, 16), 2.0, "2.0"),
    ],
)
def test_impossible_monitors(model, every, match):
    with pytest.raises(ValueError, match=match):
        fp8.monitor(model, every)


@pytest.mark.parametrize(
    "transform",
    [
        lambda model, x: torch.vmap(model)(x),
        lambda model, x: torch.func.grad(lambda x: model(x).sum())(x),
        lambda model, x: torch.func.jvp(model, (x,), (x,)),
        lambda model, x: torch.autograd.functional.jacobian(model, x, vectorize=True),
        lambda model, x: model(x[:, 1:]),
        lambda model, x: model("text"),
        lambda model, x: model(x.int()),
    ],
)
def test_a_call_that_the_layer_refuses_breaks_no_later_step(transform, device):
    model = fp8.convert(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).to(device), tokens=None)
    x = torch.randn(8, 32, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with fp8.monitor(model, every=1) as monitor:
        for step in range(3):
            if step == 1:
                with pytest.raises((RuntimeError, TypeError)) as with_monitor:
                    transform(model, x)
            model(x).sum().backward()
            optimizer.step()
        assert [sample.step for sample in monitor.samples] == [0] * 6 + [1] * 6 + [2] * 6
    with pytest.raises(type(with_monitor.value)) as without:
        transform(model, x)
    assert str(with_monitor.value).split("Invoked with")[0] == str(without.value).split("Invoked with")[0]


@pytest.mark.parametrize("amax, words", [(448.001, "less than 0.1 binade high"), (896.0, "1.0 binades high")])
def test_a_scale_that_is_hardly_too_high_is_not_called_0_binades_high(amax, words):
    sample = fp8.observe.monitor.Sample(0, "", "input", 1.0, amax, 448.0, 1024, 1, 0, 0, 0)
    assert sample.verdict == f"saturates 0.00098: the scale is {words}"


def test_in_a_notebook(device):
    model = fp8.convert(nn.ModuleDict({"a<b": nn.Linear(32, 32)}).to(device), tokens=None)
    monitor = fp8.monitor(model)
    assert "no step was sampled yet" in monitor._repr_html_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model["a<b"](torch.randn(8, 32, device=device)).sum().backward()
    optimizer.step()
    html = monitor._repr_html_()
    assert "<p>step 0</p>" in html and html.count("<tr>") == 4 and "<td>a&lt;b</td>" in html
