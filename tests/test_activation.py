"""activation_cast and activation_backward_cast: what stands between the linear layers of an MLP, made and cast at once,
against float64."""

import pytest
import torch
import torch_fp8 as fp8
from oracle import E4M3, E5M2, MAX, OUTPUT, amax, codes, exact_scale, power_of_two_scale, rounding
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

ops = torch.ops.torch_fp8
ALPHAS, BETA = (0.8, 0.9), 0.5


def xielu(x, alphas=ALPHAS):
    return torch.where(x > 0, alphas[0] * x * x, alphas[1] * (torch.expm1(x.clamp(max=0)) - x)) + BETA * x


FUNCTIONS = [F.silu, F.gelu, lambda x: F.gelu(x, approximate="tanh"), xielu, lambda x: F.relu(x).square()]
ACTIVATIONS = range(len(FUNCTIONS))
XIELU = 3
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 1), (7, 17), (128, 128), (130, 264), (3, 5, 40), (300, 1)]
HALVES = {1: "gate first", 2: "up first"}  # of one layer's output
RELATIVE = 2e-6  # of float32 arithmetic with a GPU's fast exp


def casts_of(recipe):
    return [recipe.options().cast(role).packed for role in range(3)]


def slots_with(scale, device):
    slots = fp8._C.new_slots(device)
    slots[:, 0], slots[:, 1] = 1 / scale, scale
    return slots


def tensors(shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(2 * torch.randn(shape, generator=generator)).to(dtype).to(device) for _ in range(3)]


def parameters(activation, device):
    return {"alphas": torch.tensor(ALPHAS, device=device), "beta": BETA} if activation == XIELU else {}


def assert_codes(q, exact, scale, dtype, slack=1e-30):
    """The codes of exact float64 values, or where float32's rounding decides, those of a neighbour."""
    exact = exact.reshape(-1, exact.shape[-1]).cpu()
    m, k = exact.shape
    error = RELATIVE * exact.abs() + slack
    got = q.cpu().view(torch.uint8)[:m, :k]
    low, high = (codes((exact + e).float(), scale, dtype) for e in (-error, error))
    assert ((got == low) | (got == high)).all()
    padding = q.cpu().view(torch.uint8).clone()
    padding[:m, :k] = 0
    assert not padding.any()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(device, shape, dtype, activation, gated):
    gate, up, _ = tensors(shape, dtype, device)
    exact = FUNCTIONS[activation](gate.double()) * (up.double() if gated else 1)
    scale = 16.0
    slots = slots_with(scale, device)
    q, q_t, scale_inv = ops.activation_cast(
        gate, up if gated else None, activation, slots, 0, casts_of(fp8.DelayedScaling()), 7, True, True, True, True,
        **parameters(activation, device),
    )  # fmt: skip
    # Where xielu crosses zero float32 has lost digits: its error is one of the terms that cancel.
    slack = 4e-7 * ((1 + gate.double().abs()) * (up.double().abs() if gated else 1)).reshape(-1, shape[-1]).cpu()
    assert_codes(q, exact, scale, E4M3, slack if activation == XIELU else 1e-30)
    assert torch.equal(q.view(torch.uint8).t(), q_t.view(torch.uint8))
    assert scale_inv.item() == 1 / scale
    assert slots[0, 2].item() == pytest.approx(exact.abs().max().item(), rel=RELATIVE)
    assert slots[1:, 2].count_nonzero() == 0


@pytest.mark.parametrize("recipe", [fp8.DelayedScaling(), fp8.CurrentScaling(power_of_two=True)])
def test_own_amax(device, recipe):
    """Without a history, or by current scaling: in two passes."""
    gate, up, _ = tensors((70, 90), torch.float32, device)
    slots = fp8._C.new_slots(device)
    q, _, scale_inv = ops.activation_cast(gate, up, 0, slots, 0, casts_of(recipe), 0, True, True, True, False)
    product = F.silu(gate.double()) * up.double()
    scale = 1 / scale_inv.item()
    assert scale <= exact_scale(product.abs().max().item(), E4M3) * (1 + 1e-5)
    assert 2 * scale > exact_scale(product.abs().max().item(), E4M3)
    assert_codes(q, product, scale, E4M3)
    assert slots[0, 2].item() == pytest.approx(product.abs().max().item(), rel=RELATIVE)


def exact_gradients(shape, dtype, device, activation, gated):
    """dy, gate, up, and what the exact gradients of gate and up are, in float64."""
    gate, up, dy = tensors(shape, dtype, device)
    wide = [t.double().requires_grad_() for t in ((gate, up) if gated else (gate,))]
    product = FUNCTIONS[activation](wide[0]) * (wide[1] if gated else 1)
    product.backward(dy.double())
    return dy, gate, up if gated else None, [t.grad.reshape(-1, shape[-1]) for t in wide]


@pytest.mark.parametrize("e4m3", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(device, shape, dtype, activation, gated, e4m3):
    dy, gate, up, gradients = exact_gradients(shape, dtype, device, activation, gated)
    recipe = fp8.DelayedScaling(fp8_format="E4M3" if e4m3 else "HYBRID")
    fmt = E4M3 if e4m3 else E5M2
    gate_slots, up_slots = slots_with(8.0, device), slots_with(32.0, device)
    histories = [7, 7] if gated else [7]
    made = ops.activation_backward_cast(
        dy, gate, up, activation, gate_slots, up_slots if gated else None, 2, casts_of(recipe), histories, True, True,
        **parameters(activation, device),
    )  # fmt: skip
    assert gated or made[3].numel() == 0
    # Where f' vanishes float32 has lost digits: its error is one of the terms that cancel.
    slack = 4e-7 * (dy.double().abs() * (up.double().abs() if gated else 1) * (1 + gate.double().abs()))
    for exact, slots, scale, of_one in zip(gradients, (gate_slots, up_slots), (8.0, 32.0), (made[:3], made[3:6])):
        assert of_one[0].dtype == fmt and of_one[2].item() == 1 / scale
        assert_gradients(of_one, exact, slack.reshape(exact.shape), scale)
        assert slots[2, 2].item() == pytest.approx(exact.abs().max().item(), rel=1e-4, abs=1e-6)


def assert_gradients(made, exact, slack, scale):
    """Codes between those of exact values less and plus what float32 may be off; their transpose; zeros behind."""
    q, q_t, _ = (t.cpu() for t in made)
    exact, slack, fmt = exact.cpu(), slack.cpu(), q.dtype
    error = RELATIVE * exact.abs() + slack
    m, k = exact.shape
    value = q.view(torch.uint8)[:m, :k].clone().view(fmt).float()
    low, high = (codes((exact + e).float(), scale, fmt).view(fmt).float() for e in (-error, error))
    assert ((value >= low.minimum(high)) & (value <= low.maximum(high))).all()
    assert torch.equal(q.view(torch.uint8).t(), q_t.view(torch.uint8))
    assert q.shape == (-(-m // 16) * 16, -(-k // 16) * 16)
    q.view(torch.uint8)[:m, :k] = 0
    assert not q.view(torch.uint8).any()


# ---- gate and up of one layer: one matrix, with one scale ------------------------------------------------------------


def side_by_side(gate, up, halves):
    return torch.cat([gate, up] if halves == 1 else [up, gate], -1)


@pytest.mark.parametrize("halves", HALVES, ids=HALVES.get)
@pytest.mark.parametrize("e4m3", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (0, 32), (600, 520)])
def test_backward_by_halves(device, shape, dtype, activation, e4m3, halves):
    dy, gate, up, gradients = exact_gradients(shape, dtype, device, activation, True)
    recipe = fp8.DelayedScaling(fp8_format="E4M3" if e4m3 else "HYBRID")
    slots = slots_with(8.0, device)
    made = ops.activation_backward_cast(
        dy, side_by_side(gate, up, halves), None, activation, slots, None, 2, casts_of(recipe), [7], True, True,
        torch.float32, halves=halves, **parameters(activation, device),
    )  # fmt: skip
    assert made[0].dtype == (E4M3 if e4m3 else E5M2) and all(t.numel() == 0 for t in (*made[3:6], made[7]))
    exact = side_by_side(*gradients, halves)
    slack = 4e-7 * (dy.double().abs() * up.double().abs() * (1 + gate.double().abs())).reshape(-1, shape[-1])
    assert_gradients(made[:3], exact, torch.cat([slack, slack], -1), 8.0)
    assert made[6].shape == (2 * shape[-1],)
    of_sums = 1e-6 * exact.abs().sum(0) + 4e-7 * dy.numel() / shape[-1] + 2.0**-24 * exact.sum(0).abs()
    assert ((made[6].double() - exact.sum(0)).abs() <= of_sums).all()
    if exact.numel():
        assert made[2].item() == 1 / 8.0
        assert slots[2, 2].item() == pytest.approx(exact.abs().max().item(), rel=1e-4, abs=1e-6)
    assert slots[:2, 2].count_nonzero() == 0


@pytest.mark.parametrize("halves", HALVES, ids=HALVES.get)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("columnwise", [True, False])
def test_halves_are_the_same_as_two_tensors(device, shape, activation, halves, columnwise):
    """By one scale: the same codes, sums and gradients of alphas, to the bit."""
    gate, up, dy = tensors(shape, torch.bfloat16, device)
    rest = {**parameters(activation, device), "columnwise": columnwise, "dbias": torch.float32}
    casts, slots = casts_of(fp8.DelayedScaling()), [slots_with(8.0, device) for _ in range(3)]
    two = ops.activation_backward_cast(dy, gate, up, activation, *slots[:2], 2, casts, [7, 7], True, True, **rest)
    both = side_by_side(gate, up, halves)
    one = ops.activation_backward_cast(
        dy, both, None, activation, slots[2], None, 2, casts, [7], True, True, halves=halves, **rest
    )
    m, k = dy.numel() // shape[-1], shape[-1]
    parts = [t.view(torch.uint8)[:m, :k] for t in (two[0], two[3])]
    assert torch.equal(one[0].view(torch.uint8)[:m, : 2 * k], side_by_side(*parts, halves))
    assert torch.equal(one[6], side_by_side(two[6], two[7], halves)) and torch.equal(one[8], two[8])
    assert (one[1].numel() > 0) == columnwise
    assert slots[2][2, 2] == max(slots[0][2, 2], slots[1][2, 2])
    keywords = parameters(activation, device)
    a, b = (
        ops.activation_cast(*given, activation, slots[0], 0, casts, 7, True, True, True, True, **keywords, **how)
        for given, how in (((gate, up), {}), ((both, None), {"halves": halves}))
    )
    assert all(torch.equal(s.view(torch.uint8), t.view(torch.uint8)) for s, t in zip(a, b))


@pytest.mark.parametrize("recipe", [fp8.DelayedScaling(), fp8.CurrentScaling(power_of_two=True, grad_margin=3)])
@pytest.mark.parametrize("large", ["gate", "up"])
@pytest.mark.parametrize("halves", HALVES, ids=HALVES.get)
@pytest.mark.parametrize("width", [96, 90])
def test_one_amax_of_both_halves(device, width, halves, large, recipe):
    """By their own amax: the larger one's, even where the gradient of the other is a thousand times smaller."""
    gate, up, dy = tensors((70, width), torch.float32, device)
    gate, up = (gate, 1e3 * up) if large == "gate" else (gate, 1e-3 * up)  # d_gate grows with up
    slots = fp8._C.new_slots(device)
    made = ops.activation_backward_cast(
        dy, side_by_side(gate, up, halves), None, 0, slots, None, 2, casts_of(recipe), [0], True, True, halves=halves
    )
    wide = [t.double().requires_grad_() for t in (gate, up)]
    (F.silu(wide[0]) * wide[1]).backward(dy.double())
    of_gate, of_up = (t.grad for t in wide)
    ratio = (of_gate.abs().max() / of_up.abs().max()).item()
    assert ratio > 100 if large == "gate" else ratio < 0.01
    exact = side_by_side(of_gate, of_up, halves)
    most = exact.abs().max().item()
    assert slots[2, 2].item() == pytest.approx(most, rel=1e-5)
    rule = exact_scale if isinstance(recipe, fp8.DelayedScaling) else power_of_two_scale
    margin = 0 if isinstance(recipe, fp8.DelayedScaling) else 3
    assert 1 / made[2].item() == pytest.approx(rule(most, E5M2, margin), rel=1e-5)
    slack = 4e-7 * (dy.double().abs() * (up.double().abs() + 1) * (1 + gate.double().abs()))
    assert_gradients(made[:3], exact, torch.cat([slack, slack], -1), 1 / made[2].item())


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("history", [0, 7])
@pytest.mark.parametrize("halves", HALVES, ids=HALVES.get)
@pytest.mark.parametrize("width", [48, 50])
def test_a_half_that_is_not_finite(device, width, halves, history, bad):
    """up is not finite, which the gradient of gate alone depends on: that is seen, and no other element changes."""
    gate, up, dy = tensors((40, width), torch.float32, device)
    results = []
    for value in (bad, 1.0):
        up[3, 7] = value
        slots = slots_with(8.0, device)
        made = ops.activation_backward_cast(
            dy, side_by_side(gate, up, halves), None, 0, slots, None, 2, casts_of(fp8.DelayedScaling()), [history],
            True, True, torch.float32, halves=halves,
        )  # fmt: skip
        results.append((made, slots))
    (got, slots), (right, _) = results
    place = 7 if halves == 1 else width + 7
    seen = ~got[0].float()[:40, : 2 * width].isfinite().cpu()
    assert torch.nonzero(seen).tolist() == [[3, place]]
    assert torch.nonzero(~got[1].float()[: 2 * width, :40].isfinite()).tolist() == [[place, 3]]
    assert torch.nonzero(~got[6].isfinite()).tolist() == [[place]] and not slots[2, 2].isfinite()
    if history:
        differs = got[0].view(torch.uint8) != right[0].view(torch.uint8)
        assert differs.sum() == 1
    else:
        assert got[2].item() == 1  # an amax without meaning


@pytest.mark.parametrize("halves", HALVES, ids=HALVES.get)
def test_strides_of_halves(device, halves):
    gate, up, dy = tensors((60, 48), torch.bfloat16, device)
    both, casts, made = side_by_side(gate, up, halves), casts_of(fp8.DelayedScaling()), []
    ones = torch.ones_like(both)
    layouts = [both, torch.cat([ones, both], -1)[:, 96:], torch.cat([ones[:, :1], both], -1)[:, 1:],
               both.t().contiguous().t(), both.repeat_interleave(2, 1)[:, ::2]]  # fmt: skip
    for y, gradient in [*((layout, dy) for layout in layouts), (both, dy.t().contiguous().t())]:
        slots = slots_with(4.0, device)
        forward = ops.activation_cast(y, None, 0, slots, 0, casts, 7, True, True, True, True, halves=halves)
        backward = ops.activation_backward_cast(
            gradient, y, None, 0, slots, None, 2, casts, [7], True, True, torch.float32, halves=halves
        )
        made.append([*forward, *backward, slots])
    for other in made[1:]:
        for a, b in zip(made[0], other, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("dbias", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [*SHAPES, (0, 32), (600, 520)])
def test_column_sums(device, shape, activation, gated, dbias):
    """The gradients of two biases: sums of what is cast, as it was before the cast. The codes are the same."""
    dy, gate, up, exact = exact_gradients(shape, torch.bfloat16, device, activation, gated)
    slots = [slots_with(8.0, device) for _ in range(2)]
    arguments = (dy, gate, up, activation, slots[0], slots[1] if gated else None, 2, casts_of(fp8.DelayedScaling()),
                 [7, 7] if gated else [7], True, True)  # fmt: skip
    keywords = parameters(activation, device)
    plain = ops.activation_backward_cast(*arguments, **keywords)
    made = ops.activation_backward_cast(*arguments, dbias=dbias, **keywords)
    assert plain[6].numel() == plain[7].numel() == 0
    for without, with_sums in zip(plain[:6], made):
        assert not dy.numel() or torch.equal(without.view(torch.uint8), with_sums.view(torch.uint8))
    assert gated or made[7].numel() == 0
    for sums, terms in zip(made[6:8], exact):
        assert sums.dtype == dbias and sums.shape == shape[-1:]
        error = 1e-6 * terms.abs().sum(0) + 4e-7 * dy.numel() / shape[-1] + OUTPUT[dbias] * terms.sum(0).abs()
        assert ((sums.double() - terms.sum(0)).abs() <= error).all()


def test_column_sums_in_two_passes(device):
    """A sum that is not finite is its own column's alone, and it makes no difference which of the two has a scale."""
    gate, up, dy = tensors((70, 90), torch.float32, device)
    dy[3, 7] = float("inf")
    casts = casts_of(fp8.CurrentScaling())
    for histories in [[0, 0], [0, 7], [7, 0]]:
        slots = [fp8._C.new_slots(device) for _ in range(2)]
        made = ops.activation_backward_cast(dy, gate, up, 0, *slots, 2, casts, histories, True, True, torch.float32)
        assert [torch.nonzero(~sums.isfinite()).tolist() for sums in made[6:8]] == [[[7]], [[7]]]
        d_up = (dy.double() * F.silu(gate.double())).sum(0)
        d_up[7] = made[7][7]
        torch.testing.assert_close(made[7].double(), d_up, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (0, 32), (600, 520)])
def test_gradients_of_alphas(device, shape, gated):
    dy, gate, up, _ = exact_gradients(shape, torch.bfloat16, device, XIELU, gated)
    alphas = torch.tensor(ALPHAS, dtype=torch.float64, device=device, requires_grad=True)
    (xielu(gate.double(), alphas) * (up.double() if gated else 1) * dy.double()).sum().backward()
    parts = dy.double().abs() * (up.double().abs() if gated else 1) * gate.double().square()
    for history in (0, 7):  # in two passes, and in one
        made = ops.activation_backward_cast(
            dy, gate, up, XIELU, slots_with(8.0, device), slots_with(8.0, device) if gated else None, 2,
            casts_of(fp8.DelayedScaling()), [history] * (2 if gated else 1), True, True,
            **parameters(XIELU, device),
        )  # fmt: skip
        assert made[8].dtype == torch.float32 and made[8].shape == (2,)
        assert ((made[8].double() - alphas.grad).abs() <= 1e-6 * parts.sum() + 1e-30).all()


def test_xielu_is_that_of_transformers(device):
    """alphas are what its module makes of its parameters; their gradients reach these by the ordinary way."""
    activations = pytest.importorskip("transformers.activations")
    if not hasattr(activations, "XIELUActivation"):
        pytest.skip("this transformers has no XIELUActivation")
    module = activations.XIELUActivation().double().to(device)
    module.eps.zero_()
    gate, _, dy = tensors((70, 90), torch.float32, device)
    wide = gate.double().requires_grad_()
    exact = module._xielu_python(wide)
    exact.backward(dy.double())
    alphas = torch.cat([F.softplus(module.alpha_p), module.beta + F.softplus(module.alpha_n)])
    slots, casts = slots_with(2.0, device), casts_of(fp8.DelayedScaling())
    given = alphas.detach().float()
    q, *_ = ops.activation_cast(gate, None, XIELU, slots, 0, casts, 7, True, True, True, False, given)
    made = ops.activation_backward_cast(dy, gate, None, XIELU, slots, None, 2, casts, [7], True, True, None, given)
    for got, expected in [(q, exact.detach()), (made[0], wide.grad)]:
        error = (got.float().double()[:70, :90] / 2 - expected).abs().cpu()
        assert (error <= rounding(expected.cpu(), 2.0, got.dtype) + 1e-5 * (1 + expected.abs().cpu())).all()
    ours = torch.autograd.grad(alphas, [module.alpha_p, module.alpha_n], made[8].double())
    for a, b in zip(ours, [module.alpha_p.grad, module.alpha_n.grad]):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dbias", [None, torch.bfloat16])
@pytest.mark.parametrize("activation", [0, XIELU])
@pytest.mark.parametrize("gated", [False, True, "halves"])
def test_fakes(device, gated, activation, dbias):
    """What tracing believes of the results is what they are."""
    gate, up, dy = tensors((3, 5, 40), torch.bfloat16, device)
    if gated == "halves":
        gate = torch.cat([gate, up], -1)

    def results(dy, gate, up, slots, alphas):
        halves = int(gated == "halves")
        up, casts = up if gated is True else None, casts_of(fp8.DelayedScaling())
        keywords = {"halves": halves, **({"alphas": alphas} if activation == XIELU else {})}
        forward = ops.activation_cast(gate, up, activation, slots, 0, casts, 7, True, True, True, False, **keywords)
        backward = ops.activation_backward_cast(
            dy, gate, up, activation, slots, slots if gated is True else None, 2, casts,
            [7, 7] if gated is True else [7], True, True, dbias, **keywords,
        )  # fmt: skip
        return [*forward, *backward]

    given = dy, gate, up, slots_with(8.0, device), torch.tensor(ALPHAS, device=device)
    real = results(*given)
    with FakeTensorMode() as mode:
        fake = results(*(mode.from_tensor(t) for t in given))
    assert [(t.shape, t.dtype, t.device) for t in real] == [(t.shape, t.dtype, t.device) for t in fake]


def test_first_gradients_scale_themselves(device):
    gate, up, dy = tensors((70, 90), torch.bfloat16, device)
    gate_slots, up_slots = fp8._C.new_slots(device), slots_with(4.0, device)
    made = ops.activation_backward_cast(
        dy, gate, up, 0, gate_slots, up_slots, 2, casts_of(fp8.DelayedScaling()), [0, 7], True, True
    )
    d_up = dy.double() * F.silu(gate.double())
    assert 1 / made[2].item() == pytest.approx(MAX[E5M2] / gate_slots[2, 2].item(), rel=1e-6)
    assert made[5].item() == 0.25
    assert_codes(made[3], d_up, 4.0, E5M2)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_not_finite_is_seen(device, activation, bad):
    """Not finite in, not finite out, as the plain functions have it."""
    for which in range(2):
        gate, up, _ = tensors((40, 50), torch.float32, device)
        (gate, up)[which][3, 7] = bad
        plain = FUNCTIONS[activation](gate) * up
        slots = slots_with(1.0, device)
        q, q_t, _ = ops.activation_cast(
            gate, up, activation, slots, 0, casts_of(fp8.DelayedScaling()), 7, True, True, True, True,
            **parameters(activation, device),
        )  # fmt: skip
        assert torch.equal(q.float()[:40, :50].isfinite(), plain.isfinite())
        assert torch.equal(q_t.float()[:50, :40].isfinite(), plain.t().isfinite())
        assert slots[0, 2].isfinite() == plain.isfinite().all()


def test_views(device):
    """Halves of one tensor, as where gate and up are one layer's output; and a transposed one."""
    both = torch.randn(60, 2 * 48, device=device, dtype=torch.bfloat16)
    gate, up = both.chunk(2, -1)
    args = (0, casts_of(fp8.DelayedScaling()), 7, True, True, True, True)
    ours = ops.activation_cast(gate, up, 0, slots_with(4.0, device), *args)
    plain = ops.activation_cast(gate.contiguous(), up.contiguous(), 0, slots_with(4.0, device), *args)
    turned = ops.activation_cast(gate.t().contiguous().t(), up, 0, slots_with(4.0, device), *args)
    for a, b, c in zip(ours, plain, turned):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        assert torch.equal(a.view(torch.uint8), c.view(torch.uint8))


def test_nothing(device):
    gate = torch.empty(0, 32, device=device)
    q, q_t, _ = ops.activation_cast(
        gate, None, 0, slots_with(1.0, device), 0, casts_of(fp8.DelayedScaling()), 7, True, True, True, True
    )
    assert q.shape == (0, 32) and q_t.shape == (32, 0)


def test_refusals(device):
    gate, up, dy = tensors((20, 30), torch.bfloat16, device)
    slots, casts = slots_with(1.0, device), casts_of(fp8.DelayedScaling())

    def call(gate=gate, up=up, activation=0, slots=slots, role=0, alphas=None, beta=0.5, halves=0):
        ops.activation_cast(gate, up, activation, slots, role, casts, 7, True, True, True, True, alphas, beta, halves)

    for arguments, error, words in [
        ({"up": up.float()}, TypeError, "up must have gate's dtype"),
        ({"up": up[:, :20]}, RuntimeError, "up must have gate's shape"),
        ({"gate": gate.to(torch.int32)}, TypeError, "gate must be bfloat16"),
        ({"activation": 5}, ValueError, "activation must be 0"),
        ({"activation": XIELU}, RuntimeError, "give them"),
        ({"alphas": torch.ones(2, device=device)}, RuntimeError, "leave them out"),
        ({"activation": XIELU, "alphas": torch.ones(3, device=device)}, RuntimeError, "of shape"),
        ({"activation": XIELU, "alphas": torch.ones(2, device=device).half()}, RuntimeError, "must be float32"),
        ({"beta": float("nan")}, ValueError, "beta must be"),
        ({"role": 3}, IndexError, "role must be in"),
        ({"role": 2}, ValueError, "cast to E4M3"),
        ({"slots": slots[:, :3]}, RuntimeError, "slots must be"),
        ({"halves": 3}, ValueError, "halves must be 0"),
        ({"halves": 1}, RuntimeError, "leave up out"),
        ({"halves": 1, "up": None, "gate": gate[:, :29]}, RuntimeError, "two equal halves, got 29"),
    ]:
        with pytest.raises(error, match=words):
            call(**arguments)
    with pytest.raises(RuntimeError, match="dy must have gate's shape"):
        ops.activation_backward_cast(dy[:3], gate, up, 0, slots, slots, 2, casts, [7, 7], True, True)
    with pytest.raises(TypeError, match="dbias must be bfloat16"):
        ops.activation_backward_cast(dy, gate, up, 0, slots, slots, 2, casts, [7, 7], True, True, torch.int32)
    with pytest.raises(RuntimeError, match=r"dy must have a half of gate's shape \[20, 15\], got \[20, 30\]"):
        ops.activation_backward_cast(dy, gate, None, 0, slots, None, 2, casts, [7], True, True, halves=2)
    with pytest.raises(RuntimeError, match="come together"):
        ops.activation_backward_cast(dy, gate, up, 0, slots, None, 2, casts, [7, 7], True, True)
    assert amax(slots[:, 2].cpu()) == 0
