"""The policies of arXiv 2309.17224 against integers and brute force, over every amax that BF16 has."""

import math

import pytest
import torch
from torch import nn

from studies.lib.emulation import by_amax, by_constant, emulated
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
