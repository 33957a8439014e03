"""The policies of arXiv 2309.17224 against integers and brute force, over every amax that BF16 has."""

import copy
import math

import pytest
import torch
import torch_fp8 as fp8
from torch import nn
from torch_fp8.scaling import scales

from studies.lib.emulation import Emulation, by_amax, by_constant, by_histogram, emulate, emulated
from studies.lib.policies import E4M3, E5M2, GRAPHCORE_E4M3, GRAPHCORE_E5M2, amax_bias, cast, histogram_bias

FORMATS = {"E4M3": E4M3, "E5M2": E5M2, "Graphcore E4M3": GRAPHCORE_E4M3, "Graphcore E5M2": GRAPHCORE_E5M2}
NAMES = list(FORMATS)
ALL = torch.arange(1 << 15, dtype=torch.int16).view(torch.bfloat16)  # +0, subnormals, normals, Inf, NaN


def exact_bias(bits: int, numerator: int, denominator_shift: int, margin: int) -> int:
    """clip(clip(floor(log2(max / amax)), -31, 31) - margin, -31, 31) of the BF16 number with these bits, in Python's
    integers alone: max is numerator * 2**denominator_shift."""
    exponent, mantissa = bits >> 7, bits & 0x7F
    if exponent == 0xFF or bits == 0:
        return 0
    significand, power = (mantissa | 0x80, exponent - 134) if exponent else (mantissa, -133)
    # The largest b with significand * 2**(power + b) <= numerator * 2**shift.
    b = -300
    up = max(0, 300 - power + denominator_shift)
    target = numerator << (denominator_shift + up)
    value = significand << (power + b + up) if power + b + up >= 0 else None
    while value is None or value * 2 <= target:
        b += 1
        value = significand << (power + b + up) if power + b + up >= 0 else None
    clip = lambda bias: max(-31, min(31, bias))  # noqa: E731
    return clip(clip(b) - margin)


MAXIMA = {"E4M3": (7, 6), "E5M2": (7, 13), "Graphcore E4M3": (15, 4), "Graphcore E5M2": (7, 13)}


@pytest.mark.parametrize("name", NAMES)
def test_maxima_are_those_of_the_dtypes(name):
    to, (numerator, shift) = FORMATS[name], MAXIMA[name]
    info = torch.finfo(to.dtype)
    assert info.max == to.max == to.mantissa * 2.0**to.exponent == numerator * 2.0**shift
    codes = torch.arange(256, dtype=torch.uint8).view(to.dtype).float()
    assert info.smallest_normal == 2.0**to.lowest and ((codes >= 1) & (codes < 2)).sum() == 2**to.bits


@pytest.mark.parametrize("name", NAMES)
def test_amax_biases_are_exact_for_every_bf16_and_margin(name):
    exact = torch.tensor([exact_bias(bits, *MAXIMA[name], 0) for bits in range(1 << 15)], dtype=torch.int32)
    usable = ALL.isfinite() & (ALL > 0)
    for margin in range(32):
        expected = torch.where(usable, (exact - margin).clamp(-31, 31), 0)
        assert torch.equal(amax_bias(ALL, FORMATS[name], margin), expected), margin
    for bits in range(0, 1 << 15, 97):
        assert amax_bias(ALL[bits], FORMATS[name], 3) == exact_bias(bits, *MAXIMA[name], 3)


def test_biases_of_both_families_differ_as_their_formats_do():
    """One more on OCP's E4M3, but the same where amax is between 1.75 and 1.875 times a power of two; E5M2 the same."""
    inner = ALL[(ALL > 2.0**-20) & (ALL < 2.0**20)]  # where nothing is clipped
    mantissa = torch.frexp(inner.float())[0] * 2
    between = (mantissa > 1.75) & (mantissa <= 1.875)
    apart = amax_bias(inner, E4M3) - amax_bias(inner, GRAPHCORE_E4M3)
    assert torch.equal(apart, (~between).int())
    assert torch.equal(amax_bias(ALL, E5M2), amax_bias(ALL, GRAPHCORE_E5M2))


@pytest.mark.parametrize("c", [-16, -3, 0, 5, 16])
def test_a_constant_of_graphcore_is_one_more_here(c):
    """But for Graphcore's largest code, which is beyond this E4M3 after the shift."""
    x = torch.cat([ALL, -ALL])
    ours, theirs = cast(x, c + 1, E4M3).float(), cast(x, c, GRAPHCORE_E4M3).float()
    inside = x.float().abs() * 2.0**c < 232  # what rounds to 224 or less
    assert torch.equal(ours[inside], theirs[inside]) and inside.sum() > 30_000


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bias", [-9, 0, 4])
def test_casts_are_the_nearest_numbers_of_the_format(name, bias):
    to = FORMATS[name]
    codes = torch.arange(256, dtype=torch.uint8).view(to.dtype).float()
    values = codes[codes.isfinite()].unique() / 2.0**bias
    got = cast(ALL, bias, to)
    assert got.dtype == torch.bfloat16 and torch.equal(got.isnan(), ~ALL.isfinite())
    x = ALL[ALL.isfinite()].double()
    found, best = got[ALL.isfinite()].double(), torch.empty_like(x)
    for start in range(0, len(x), 4096):
        part = x[start : start + 4096]
        best[start : start + 4096] = (part[:, None] - values.double()).abs().amin(1)
    assert torch.equal((x - found).abs(), best) and torch.isin(found, values.double()).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["normal", "tails", "one outlier", "tiny", "huge", "uniform"])
def test_the_histogram_finds_a_bias_as_good_as_the_best(name, kind):
    torch.manual_seed(0)
    x = torch.randn(20_000)
    x = {
        "normal": x,
        "tails": torch.distributions.StudentT(2.0).sample((20_000,)),
        "one outlier": torch.cat([x, torch.tensor([3000.0])]),
        "tiny": x * 1e-6,
        "huge": x * 1e6,
        "uniform": torch.rand(20_000),
    }[kind]
    to = FORMATS[name]
    errors = {b: (cast(x, b, to) - x).double().square().mean().item() for b in range(-31, 32)}
    found = int(histogram_bias(x, to))
    assert errors[found] <= 1.02 * min(errors.values())


def test_the_histogram_can_be_better_than_amax():
    torch.manual_seed(0)
    x = torch.cat([torch.randn(100_000) * 2.0**-12, torch.tensor([400.0, -400.0])])
    small = x[:-2]
    amax, histogram = amax_bias(x.abs().amax(), E4M3), histogram_bias(small, E4M3)
    assert amax == 0 and histogram > 5


def test_tensors_that_say_nothing_have_bias_0_and_margins_are_taken_off():
    for x in (torch.zeros(5), torch.tensor([math.nan, math.inf]), torch.empty(0)):
        assert histogram_bias(x, E4M3) == 0
    x = torch.tensor([1.0, 2.0, math.nan, -math.inf])
    assert histogram_bias(x, E5M2, 3) == histogram_bias(x[:2], E5M2) - 3


def test_emulated_layers_cast_inputs_and_weights_and_leave_no_trace():
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 16), torch.randn(4, 32)
    before = layer.weight.clone()
    for rule in (by_amax, by_constant(2)):
        with emulated({"": layer}, rule, GRAPHCORE_E4M3):
            y = layer(x)
        w8, x8 = (cast(t, rule(t, GRAPHCORE_E4M3), GRAPHCORE_E4M3) for t in (before, x))
        assert torch.equal(y, nn.functional.linear(x8, w8, layer.bias))
        assert torch.equal(layer.weight, before) and torch.equal(layer(x), nn.functional.linear(x, before, layer.bias))


@pytest.mark.parametrize("rule", [by_amax, by_histogram, by_constant(4)])
@pytest.mark.parametrize("family", ["ocp", "graphcore"])
def test_emulated_layers_train_by_the_papers_dataflow(rule, family):
    torch.manual_seed(0)
    layer, x, dy = nn.Linear(32, 16), torch.randn(2, 4, 32, requires_grad=True), torch.randn(2, 4, 16) * 2.0**-25
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    emulate({"": layer}, Emulation(rule, family, 3))
    y = layer(x)
    y.backward(dy)
    e4m3, e5m2 = {"ocp": (E4M3, E5M2), "graphcore": (GRAPHCORE_E4M3, GRAPHCORE_E5M2)}[family]
    w8, x8 = (cast(t, rule(t, e4m3), e4m3).detach() for t in (layer.weight, x))
    bias = (torch.as_tensor(rule(dy, e5m2)) - 3).clamp(-31, 31)
    g8 = cast(dy, bias, e5m2)
    assert torch.equal(y, nn.functional.linear(x8, w8) + layer.bias) and torch.equal(x.grad, g8 @ w8)
    assert torch.equal(layer.weight.grad, g8.flatten(0, 1).t() @ x8.flatten(0, 1))
    assert torch.allclose(layer.bias.grad, dy.sum((0, 1)))  # of what was not cast
    assert g8.unique().numel() < dy.unique().numel() or rule is not by_amax
    layer.eval()
    with torch.no_grad():
        assert torch.equal(layer(x), nn.functional.linear(x, before["weight"], before["bias"]))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_a_conv1d_is_emulated_as_the_linear_layer_that_it_is():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(0)
    linear, conv = nn.Linear(32, 16), pytorch_utils.Conv1D(16, 32)
    with torch.no_grad():
        conv.weight.copy_(linear.weight.t()), conv.bias.copy_(linear.bias)
    x, dy = torch.randn(2, 4, 32), torch.randn(2, 4, 16)
    with emulated({"": linear}, by_amax, GRAPHCORE_E4M3), emulated({"": conv}, by_amax, GRAPHCORE_E4M3):
        assert torch.allclose(linear(x), conv(x), rtol=1e-6)
    gradients = []
    for layer in (linear, conv):
        emulate({"": layer}, Emulation(by_amax, "graphcore", 3))
        leaf = x.clone().requires_grad_()
        layer(leaf).backward(dy)
        gradients.append([leaf.grad, layer.bias.grad, layer.weight.grad])
    gradients[1][2] = gradients[1][2].t()
    assert all(map(torch.equal, *gradients)) and isinstance(conv, pytorch_utils.Conv1D)
    assert torch.equal(layer.eval()(x), nn.functional.linear(x, linear.weight, linear.bias))


def test_emulated_and_real_layers_train_alike():
    """FP8-AMAX on this hardware's formats, the one way and the other."""
    torch.manual_seed(0)
    plain = nn.Linear(32, 48)
    x, dy = torch.randn(16, 32), torch.randn(16, 48)
    real = fp8.convert(
        nn.Sequential(nn.Linear(32, 48)), fp8.CurrentScaling(power_of_two=True, grad_margin=3), tokens=None
    )
    real[0].load_state_dict(plain.state_dict())
    emulate({"": plain}, Emulation(by_amax, "ocp", 3))
    for layer in (plain, real):
        layer(x).backward(dy)
    for one, other in zip(plain.parameters(), real.parameters()):
        assert torch.allclose(one.grad, other.grad, rtol=1e-5, atol=1e-5)
    assert torch.allclose(plain(x), real(x), rtol=1e-5, atol=1e-5)


def test_emulated_layers_round_float32_once_under_autocast():
    """As real ones do: not to BF16 first."""
    torch.manual_seed(0)
    plain, x = nn.Linear(256, 128), torch.randn(64, 256)
    real = fp8.convert(copy.deepcopy(nn.Sequential(plain)), fp8.CurrentScaling(power_of_two=True), tokens=None)
    emulate({"": plain}, Emulation(by_amax, "ocp", 0))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = plain(x), real(x)
    assert ours.dtype == torch.bfloat16 and ((ours - theirs).norm() / theirs.norm()).item() < 4e-3  # of BF16's sums


# ---- the same in the extension ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["E4M3", "E5M2"])
def test_the_extensions_scales_are_exact_for_every_bf16_and_margin(device, name):
    """The scaling update's, over all amaxes at once: a role for each."""
    exact = torch.tensor([exact_bias(bits, *MAXIMA[name], 0) for bits in range(1 << 15)])
    usable = ALL.isfinite() & (ALL > 0)
    for margin in range(32):
        slots = torch.ones(len(ALL), 4, device=device)
        slots[:, 2] = ALL.float()
        target = FORMATS[name].max * 2.0**-margin
        history = torch.zeros(len(ALL), 1, device=device)
        torch.ops.torch_fp8.update_scales_([slots], [history], [target] * len(ALL), [1 + margin])
        expected = torch.where(usable, torch.exp2((exact - margin).clamp(-31, 31).float()), 1.0)  # left as it was
        assert torch.equal(slots[:, 1].cpu(), expected) and torch.equal(slots[:, 0].cpu(), 1 / expected), margin


@pytest.mark.parametrize("name", ["E4M3", "E5M2"])
@pytest.mark.parametrize("margin", [0, 3, 31])
def test_a_tensors_own_scale_is_the_papers(device, name, margin):
    """Of amaxes at every exponent, on both sides of the step in its middle; and so is a layer's gradient."""
    to, slots = FORMATS[name], fp8._C.new_slots(device)
    for bits in [*range(0x60, 0x7F80, 0x80), *range(0x61, 0x7F80, 0x80), 1, 0x7F, 0, 0x7F80, 0x7F81]:
        x = ALL[bits].repeat(16, 16).to(device)
        _, _, scale_inv, _ = torch.ops.torch_fp8.quantize(
            x, slots, 0, to.dtype, own_amax=True, power_of_two=True, margin=margin
        )
        assert scale_inv.item() == 2.0 ** -exact_bias(bits, *MAXIMA[name], margin), hex(bits)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("grad_margin", [0, 3])
@pytest.mark.parametrize("magnitude", [2.0**-36, 2.0**-14, 1.0])
def test_layers_scale_gradients_as_the_paper_does(device, grad_margin, magnitude, compiled):
    """Converted, eager and compiled, and as the scaling update leaves it, which summary and monitor read."""
    torch.manual_seed(0)
    recipe = fp8.CurrentScaling(power_of_two=True, grad_margin=grad_margin)
    model = fp8.convert(nn.Sequential(nn.Linear(32, 48)).to(device), recipe, tokens=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x = torch.randn(16, 32, device=device)
    dy = torch.randn(16, 48, device=device) * magnitude
    (torch.compile(model, backend="aot_eager") if compiled else model)(x).backward(dy)
    bias = amax_bias(dy.abs().amax().cpu(), E5M2, grad_margin)
    x8 = cast(x.cpu(), amax_bias(x.abs().amax().cpu(), E4M3), E4M3).double()
    expected = cast(dy.cpu(), bias, E5M2).double().t() @ x8
    apart = (model[0].weight.grad.cpu().double() - expected).abs().max()
    precision = 1e-5 if device.type == "cpu" else 5e-4  # a tensor core sums products of FP8 in 14 bits
    assert apart <= precision * expected.abs().max() and expected.abs().max() > 0
    optimizer.step()
    assert scales(model[0])["grad_output"] == 2.0 ** int(bias)


@pytest.mark.parametrize("magnitude", [2.0**-36, 1.0])
def test_attention_scales_gradients_as_the_paper_does(device, magnitude):
    """Every role by the amax that it had."""
    torch.manual_seed(0)
    recipe = fp8.CurrentScaling(power_of_two=True, grad_margin=3)
    attention = fp8.ScaledDotProductAttention(recipe, mode="fp8").to(device)
    q, k, v = torch.randn(3, 1, 2, 128, 128, device=device, dtype=torch.bfloat16).requires_grad_()
    attention(q, k, v).backward(torch.randn_like(q) * magnitude)
    state = attention.fp8_state
    amaxes = state.slots[:, 2].cpu().clone()
    fp8.update_scales(attention)
    for role, amax, scale in zip(state.roles, amaxes, state.slots[:, 1].tolist()):
        to = E5M2 if role.name.startswith("grad_") else E4M3
        if not role.constant:
            assert amax > 0 and scale == 2.0 ** int(amax_bias(amax, to, role.cast.margin)), role.name


def test_frozen_weights_have_the_papers_scale(device):
    for bits in (*range(0x3480, 0x4500, 0x35), 0x3F5F, 0x3F60, 0x3F61):  # on both sides of the step
        layer = nn.Linear(32, 48, bias=False, device=device)
        nn.init.constant_(layer.weight, ALL[bits].item())
        frozen = fp8.freeze(nn.Sequential(layer), activations="none", weight="tensor")[0]
        assert frozen.weight_scale.item() == 2.0 ** -exact_bias(bits, *MAXIMA["E4M3"], 0), hex(bits)
