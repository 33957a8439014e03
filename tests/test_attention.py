"""FP8 attention: against float64, with and without the casts; what it promises, and what it refuses."""

import copy
import math
import time

import oracle
import pytest
import torch
import torch_fp8 as fp8
from torch.library import opcheck
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch_fp8.layers import attention as layer
from torch_fp8.layers import modes

E4M3, E5M2 = oracle.E4M3, oracle.E5M2
RECIPES = {
    "delayed": fp8.DelayedScaling(),
    "current": fp8.CurrentScaling(),
    "constant": fp8.ConstantScaling(bias=4),
    "power of two": fp8.DelayedScaling(power_of_two=True),
    "E4M3": fp8.DelayedScaling(fp8_format="E4M3"),
}
# Errors of the whole, standard-normal q, k, v and dy, against exact attention; measured on an H100 with cuDNN 9.19 and
# the same on the CPU: E4M3 has 3 bits of mantissa, E5M2 has 2. A tenth more is allowed.
OUTPUT_ERROR = 0.0585 * 1.1
GRADIENT_ERROR = {  # dq, dk, dv
    ("fp8_forward", "HYBRID"): (0.055, 0.055, 0.040),
    ("fp8", "HYBRID"): (0.107, 0.107, 0.088),
    ("fp8", "E4M3"): (0.076, 0.076, 0.062),
}


def tensors(device, batch=2, heads=4, kv_heads=2, tokens=64, kv_tokens=None, dims=128, dtype=torch.bfloat16, seed=0):
    """q, k, v, dy, with heads between tokens in memory, as projections give them."""
    generator = torch.Generator().manual_seed(seed)
    kv_tokens = tokens if kv_tokens is None else kv_tokens
    sizes = ((heads, tokens), (kv_heads, kv_tokens), (kv_heads, kv_tokens), (heads, tokens))
    made = [torch.randn(batch, t, n, dims, generator=generator).to(device, dtype).transpose(1, 2) for n, t in sizes]
    return [t.detach().requires_grad_() for t in made[:3]] + made[3:]


def plain(q, k, v, causal, scale=None):
    """In float64, written for reading."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) * (scale or 1 / math.sqrt(q.shape[-1]))
    if causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -math.inf)
    return scores.softmax(-1) @ v


def exact(tensors, dy, causal, scale=None):
    """The result and the three gradients in float64."""
    q, k, v = (t.detach().double().requires_grad_() for t in tensors)
    y = plain(q, k, v, causal, scale)
    y.backward(dy.double())
    return y.detach(), q.grad, k.grad, v.grad


def error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def run(module, q, k, v, dy, causal=True, scale=None):
    q, k, v = (t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (q, k, v))
    y = module(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
    y.backward(dy)
    return y.detach(), q.grad, k.grad, v.grad


def stepped(module):
    """After its scaling update."""
    fp8.update_scales(torch.nn.ModuleList([module]))
    return module


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tokens", [2, 37, 256])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("mode, fp8_format", GRADIENT_ERROR)
def test_it_is_attention_but_for_the_casts(device, mode, fp8_format, heads, kv_heads, tokens, causal):
    q, k, v, dy = tensors(device, heads=heads, kv_heads=kv_heads, tokens=tokens)
    module = fp8.ScaledDotProductAttention(fp8.DelayedScaling(fp8_format=fp8_format), mode=mode)
    wanted = exact((q, k, v), dy, causal)
    for _ in range(2):  # by own amaxes, and by the history
        y, *grads = run(module, q, k, v, dy, causal)
        assert module.last[0] == mode
        assert y.dtype == q.dtype and y.shape == q.shape
        assert error(y, wanted[0]) < OUTPUT_ERROR
        for grad, of_exact, bound in zip(grads, wanted[1:], GRADIENT_ERROR[mode, fp8_format]):
            # Of two keys little is left of a gradient but differences.
            assert grad.shape == of_exact.shape and error(grad, of_exact) < bound * (2.6 if tokens == 2 else 1.1)
        stepped(module)


def dequantised(saved):
    """The numbers of the codes that attention_forward gave, as (B, H, S, D)."""
    _, *codes, scales, lse = saved
    rows = (0, 1, 2, 4)  # q, k, v, o
    return [c.double().transpose(1, 2) * scales[row, 0].double() for c, row in zip(codes, rows)], lse


def forward_op(device, *given, causal=True, recipe=None, **options):
    module = fp8.ScaledDotProductAttention(recipe, mode="fp8", **options)
    call = layer.call_of(module, given[0], layer.FORWARD_ROLES)
    scale = 1 / math.sqrt(given[0].shape[-1])
    out = torch.ops.torch_fp8.attention_forward(
        *(t.detach() for t in given[:3]), call.slots, call.casts, call.history, call.training, call.record, causal,
        scale, call.shared_scale,
    )  # fmt: skip
    return module, call, out


@pytest.mark.parametrize("causal", [True, False])
def test_the_result_is_exact_attention_of_the_codes_but_for_p_and_o(device, causal):
    given = tensors(device, tokens=200)
    _, _, saved = forward_op(device, *given, causal=causal)
    (q, k, v, o), lse = dequantised(saved)
    assert error(o, plain(q, k, v, causal)) < 0.0365  # P's rounding and O's
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) / math.sqrt(128)
    if causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -math.inf)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(saved[0].double(), o, rtol=2**-8, atol=0)  # y is o as it was rounded, in 16 bits


def test_codes_are_those_of_quantize(device):
    q, k, v, _ = tensors(device, tokens=48)
    _, _, (_, *codes, _, _) = forward_op(device, q, k, v)
    for t, code, scale_of in zip((q, k, v), codes, (oracle.power_of_two_scale,) * 2 + (oracle.exact_scale,)):
        scale = scale_of(oracle.amax(t.detach().float().cpu()), E4M3)
        wanted = oracle.codes(t.detach().float().cpu().transpose(1, 2), scale, E4M3)
        assert torch.equal(code.view(torch.uint8).cpu(), wanted)


@pytest.mark.parametrize("fp8_format", ["HYBRID", "E4M3"])
def test_the_gradient_in_16_bits_is_that_of_what_was_computed(device, fp8_format):
    """From the numbers of the codes and the result that was returned, so that each row of P sums to 1."""
    q, k, v, dy = tensors(device, tokens=100)
    module = fp8.ScaledDotProductAttention(fp8.DelayedScaling(fp8_format=fp8_format), mode="fp8_forward")
    _, *grads = run(module, q, k, v, dy)
    _, _, saved = forward_op(device, q, k, v)
    (q_, k_, v_, o_), _ = dequantised(saved)
    p = (q_ @ k_.repeat_interleave(2, 1).transpose(-1, -2) / math.sqrt(128)).masked_fill(
        ~torch.ones(100, 100, dtype=torch.bool, device=device).tril(), -math.inf
    ).softmax(-1)  # fmt: skip
    ds = p * (dy.double() @ v_.repeat_interleave(2, 1).transpose(-1, -2) - (dy.double() * o_).sum(-1, keepdim=True))
    summed = lambda t: t.unflatten(1, (2, 2)).sum(2)  # noqa: E731
    wanted = (
        ds @ k_.repeat_interleave(2, 1) / math.sqrt(128),
        summed(ds.transpose(-1, -2) @ q_) / math.sqrt(128),
        summed(p.transpose(-1, -2) @ dy.double()),
    )
    for grad, want in zip(grads, wanted):
        assert error(grad, want) < 0.012  # 16-bit arithmetic and the rounding of what is read


def amaxes_of(q, k, v, dy, causal):
    """Of the ten roles, exact."""
    q, k, v, dy = (t.detach().double() for t in (q, k, v, dy))
    wanted = exact((q, k, v), dy, causal)
    p = (q @ k.transpose(-1, -2) / math.sqrt(128)).masked_fill(
        ~torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(), -math.inf
    ).softmax(-1)  # fmt: skip
    ds = p * (dy @ v.transpose(-1, -2) - (dy * wanted[0]).sum(-1, keepdim=True)) / math.sqrt(128)
    return [t.abs().max().item() for t in (q, k, v, torch.ones(1), wanted[0], dy, ds, *wanted[1:])]


@pytest.mark.parametrize("p_scale", [256.0, None])
def test_amaxes_are_recorded_in_real_units(device, p_scale):
    q, k, v, dy = tensors(device, kv_heads=4)
    module = fp8.ScaledDotProductAttention(mode="fp8", p_scale=p_scale)
    for _ in range(2):  # twice in one step: a maximum
        run(module, q, k, v, dy)
    wanted = amaxes_of(q, k, v, dy, causal=True)
    for i, (seen, want) in enumerate(zip(module.fp8_slots[:, 2].tolist(), wanted)):
        if layer.ROLES[i] == "p":
            assert seen == (0 if p_scale else 1)
        else:
            assert seen == pytest.approx(want, rel=1e-6 if i in (0, 1, 2, 5) else 0.3), layer.ROLES[i]
    stepped(module)
    for i, role in enumerate(layer.ROLES):
        if role != "p" or p_scale is None:
            target = 57344 if role.startswith("grad") else 448
            wanted = target / module.fp8_history[i, 0].item()
            wanted = 2.0 ** math.floor(math.log2(wanted)) if role in ("q", "k") else wanted
            assert module.fp8_slots[i, 1].item() == pytest.approx(wanted, rel=1e-6)
    assert module.fp8_slots[3, 1] == (256 if p_scale else 448)


def test_amaxes_do_not_depend_on_the_scales(device):
    """So that a scale that is far off is right after one update."""
    q, k, v, dy = tensors(device)
    amaxes = []
    for factor in (1.0, 1 / 16):  # 16 x smaller values than the history knows: flushed; the output's, gradients' too
        module = fp8.ScaledDotProductAttention(mode="fp8")
        run(module, q, k, v, dy)
        stepped(module)
        with torch.no_grad():
            module.fp8_slots[4:, 1] *= factor
            module.fp8_slots[4:, 0] /= factor
        run(module, q, k, v, dy)
        amaxes.append(module.fp8_slots[:, 2].clone())
    torch.testing.assert_close(amaxes[0][4], amaxes[1][4], rtol=1e-6, atol=0)  # o
    torch.testing.assert_close(amaxes[0][6], amaxes[1][6], rtol=0.1, atol=0)  # dP, of another o
    torch.testing.assert_close(amaxes[0][7:], amaxes[1][7:], rtol=0.2, atol=0)


@pytest.mark.parametrize("mode", ["fp8_forward", "fp8"])
@pytest.mark.parametrize("factor", [16.0, 1 / 16])
def test_stale_scales_saturate_or_lose_digits_and_stay_finite(device, mode, factor):
    q, k, v, dy = tensors(device)
    module = fp8.ScaledDotProductAttention(fp8.DelayedScaling(amax_history_len=1), mode=mode)
    run(module, *(t.detach() * factor if t is not q else t.detach() for t in (q, k, v)), dy * factor)
    stepped(module)
    wanted = exact((q, k, v), dy, True)
    got = run(module, q, k, v, dy)
    assert all(t.isfinite().all() for t in got)
    if factor > 1:  # 4 binades less of E4M3's 15
        assert error(got[0], wanted[0]) < 2.5 * OUTPUT_ERROR
    else:
        assert got[0].abs().max() <= wanted[0].abs().max() / 8
    stepped(module)  # q, k and v have their scales; the result was of what had saturated
    run(module, q, k, v, dy)
    assert error(run(stepped(module), q, k, v, dy)[0], wanted[0]) < OUTPUT_ERROR


@pytest.mark.parametrize("what", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_finite_is_seen_and_moves_no_scale(device, what, which):
    given = tensors(device)
    module = fp8.ScaledDotProductAttention(mode="fp8")
    run(module, *given)
    stepped(module)
    scales = module.fp8_slots.clone()
    with torch.no_grad():
        given[which][0, 0, 5, 3] = what
    y, *grads = run(module, *given)
    assert not y.isfinite().all()
    assert y[1].isfinite().all()  # the other sequence is not touched
    assert not torch.cat([g.flatten() for g in grads]).isfinite().all()
    stepped(module)
    assert torch.equal(module.fp8_slots[which, :2], scales[which, :2])


@pytest.mark.parametrize("mode", ["fp8_forward", "fp8"])
@pytest.mark.parametrize("recipe", ["delayed", "constant", "power of two"])
def test_nothing_leaks_from_later_tokens(device, recipe, mode):
    q, k, v, dy = tensors(device, tokens=96)
    module = fp8.ScaledDotProductAttention(RECIPES[recipe], mode=mode)
    run(module, q, k, v, dy)
    stepped(module)
    before = run(module, q, k, v, dy)[0]
    with torch.no_grad():
        for t in (q, k, v):
            t[:, :, 60:] *= 3
    after = run(module, q, k, v, dy)[0]
    assert torch.equal(before[:, :, :60], after[:, :, :60])
    assert not torch.equal(before[:, :, 60:], after[:, :, 60:])


def test_with_current_scaling_it_leaks(device):
    """As the documentation says."""
    q, k, v, dy = tensors(device, tokens=96)
    module = fp8.ScaledDotProductAttention(RECIPES["current"], mode="fp8_forward")
    before = run(module, q, k, v, dy)[0]
    with torch.no_grad():
        v[:, :, 60:] *= 3
    assert not torch.equal(before[:, :, :60], run(module, q, k, v, dy)[0][:, :, :60])


@pytest.mark.parametrize("mode", ["fp8_forward", "fp8"])
def test_twice_the_same_is_the_same(device, mode):
    module = fp8.ScaledDotProductAttention(mode=mode)
    given = tensors(device, tokens=300)
    first, second = (run(copy.deepcopy(module), *given) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_grouped_heads_are_expanded_ones(device):
    """With the same scales: the forward's bits, and gradients that are summed after their cast."""
    q, k, v, dy = tensors(device)
    module = fp8.ScaledDotProductAttention(mode="fp8")
    run(module, q, k, v, dy)
    stepped(module)
    call = layer.call_of(module, q, layer.EVERY_ROLE)
    results = []
    for expand in (False, True):
        for t in (q, k, v):
            t.grad = None
        y = layer.run(call, q, k, v, True, None, True, expand)
        y.backward(dy)
        results.append((y.detach(), q.grad, k.grad, v.grad))
    wanted = exact((q, k, v), dy, True)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    for grouped, expanded, want in zip(results[0][2:], results[1][2:], wanted[2:]):
        assert not torch.equal(grouped, expanded)
        assert error(expanded, want) < 0.118
        assert error(grouped, expanded) < 0.12


@pytest.mark.parametrize("mode", ["fp8_forward", "fp8"])
def test_heads_in_any_layout(device, mode):
    q, k, v, dy = tensors(device)
    module = fp8.ScaledDotProductAttention(mode=mode)
    wanted = run(copy.deepcopy(module), q, k, v, dy)
    contiguous = [t.detach().contiguous() for t in (q, k, v)]
    fused = torch.cat([t.detach().transpose(1, 2).flatten(2) for t in (q, k, v)], -1)
    split = [
        t.unflatten(-1, (-1, 128)).transpose(1, 2) for t in fused.split([4 * 128, 2 * 128, 2 * 128], -1)
    ]  # fmt: skip
    for given in (contiguous, split):
        assert all(torch.equal(a, b) for a, b in zip(run(copy.deepcopy(module), *given, dy.contiguous()), wanted))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_tokens", [48, 160])
def test_other_numbers_of_keys(device, kv_tokens, causal):
    q, k, v, dy = tensors(device, tokens=96, kv_tokens=kv_tokens)
    wanted = exact((q, k, v), dy, causal)
    for mode in ("fp8_forward", "fp8"):
        y, *grads = run(fp8.ScaledDotProductAttention(mode=mode), q, k, v, dy, causal)
        assert error(y, wanted[0]) < OUTPUT_ERROR
        for grad, want, bound in zip(grads, wanted[1:], GRADIENT_ERROR[mode, "HYBRID"]):
            assert error(grad, want) < bound * 1.2


@pytest.mark.parametrize("dims", [64, 96, 192, 256])
def test_other_heads_run_forward_in_fp8(device, dims):
    q, k, v, dy = tensors(device, dims=dims)
    module = fp8.ScaledDotProductAttention(mode="fp8_forward")
    y, *grads = run(module, q, k, v, dy)
    wanted = exact((q, k, v), dy, True)
    assert error(y, wanted[0]) < OUTPUT_ERROR
    assert all(error(g, w) < 0.07 for g, w in zip(grads, wanted[1:]))


@pytest.mark.parametrize("scale", [0.125, 1.0, 0.03])
def test_the_scale_of_scores_is_free(device, scale):
    q, k, v, dy = tensors(device)
    q = (q.detach() * 0.2).requires_grad_()
    module = fp8.ScaledDotProductAttention(mode="fp8")
    got = run(module, q, k, v, dy, scale=scale)
    wanted = exact((q, k, v), dy, True, scale)
    assert error(got[0], wanted[0]) < OUTPUT_ERROR
    assert all(error(g, w) < 0.15 for g, w in zip(got[1:], wanted[1:]))


def test_one_scale_for_q_k_and_v(device):
    q, k, v, dy = tensors(device)
    k = (k.detach() * 8).requires_grad_()
    module = fp8.ScaledDotProductAttention(mode="fp8", shared_scale=True)
    largest = max(t.detach().abs().max().item() for t in (q, k, v))
    scale = 2.0 ** math.floor(math.log2(448 / largest))
    for history in (False, True):
        call = layer.call_of(module, q, layer.FORWARD_ROLES)
        *_, scales, _ = torch.ops.torch_fp8.attention_forward(
            *(t.detach() for t in (q, k, v)), call.slots, call.casts, call.history, True, True, True, 0.1, True
        )
        assert scales[:3, 0].tolist() == [1 / scale] * 3, history
        run(module, q, k, v, dy)
        stepped(module)
        assert module.fp8_slots[0, 1].item() == scale


def test_an_update_between_forward_and_backward_changes_no_code_of_forward(device):
    q, k, v, dy = tensors(device)
    module = fp8.ScaledDotProductAttention(mode="fp8_forward")
    wanted = run(module, q, k, v, dy)
    given = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    y = module(*given, is_causal=True, enable_gqa=True)
    with torch.no_grad():
        module.fp8_slots[:5, :2] *= 3
    y.backward(dy)
    assert torch.equal(given[0].grad, wanted[1]) and torch.equal(given[2].grad, wanted[3])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mode", ["fp8_forward", "fp8"])
def test_what_keys_have_in_common_is_not_in_the_gradient_of_queries(device, mode, causal):
    """As biases make it. Rows of dS do not sum to 0 where O was rounded, and the rest would multiply it."""
    q, k, v, dy = tensors(device, batch=1, tokens=512)
    generator = torch.Generator().manual_seed(1)
    k, v = (
        (t.detach() + factor * torch.randn(1, 1, 1, 128, generator=generator).to(device)).bfloat16()
        for t, factor in ((k, 4), (v, 1))
    )
    wanted = exact((q, k, v), dy, causal)
    _, *grads = run(fp8.ScaledDotProductAttention(mode=mode), q, k, v, dy, causal)
    for grad, want, bound in zip(grads, wanted[1:], (0.22, 0.18, 0.16)):  # BF16 itself: 0.05 to 0.09
        assert error(grad, want) < bound


@pytest.mark.parametrize("mode", ["fp8_forward", "fp8"])
def test_equal_keys_give_queries_no_gradient(device, mode):
    q, k, v, dy = (t.detach() for t in tensors(device, batch=1, tokens=48))
    q, k = q.requires_grad_(), k[:, :, :1].expand_as(k) * 3
    module = fp8.ScaledDotProductAttention(fp8.CurrentScaling(), mode=mode)
    module(q, k, v, is_causal=True, enable_gqa=True).backward(dy)
    assert q.grad.abs().max() == 0


@pytest.mark.parametrize("mode", ["fp8_forward", "fp8"])
def test_large_scores_that_all_keys_have_in_common(device, mode):
    """Softmax does not see them, and the probabilities of backward are those of forward."""
    q, k, v, dy = (t.detach() for t in tensors(device, batch=1))
    q[..., 0], k[..., 0] = 33, 33  # a score of 96
    wanted = exact((q, k, v), dy, True)
    _, _, _, dv = run(fp8.ScaledDotProductAttention(fp8.CurrentScaling(), mode=mode), q, k, v, dy)
    assert error(dv, wanted[3]) < 0.2


@pytest.mark.parametrize("mode", ["fp8_forward", "fp8"])
def test_large_scores_of_one_key(mode):
    """Nothing that keys have in common: backward's probabilities are forward's, since codes of q and k are numbers of
    16 bits too. A score of 3e3 that is rounded by 2^-9 would be another probability altogether. A tensor core sums
    products of codes with 14 bits, by which such scores differ between forward and backward in every mode."""
    q, k, v, dy = (t.detach() for t in tensors("cpu", batch=1, kv_heads=4))
    q, k = q.abs() + 0.3, k * 0.1
    k[:, :, 21:] += 300.0
    module = fp8.ScaledDotProductAttention(fp8.CurrentScaling(), mode=mode)
    _, _, _, dv = run(module, q, k, v, dy, causal=False)
    # Rows of P sum to 1, so that dv summed over keys is dy summed over queries.
    assert error(dv.sum(2), dy.sum(2)) < 0.1


@pytest.mark.parametrize("token", ["none", "first key", "long key", "long query"])
@pytest.mark.parametrize("strength", [4, 60])
@pytest.mark.parametrize("mode", ["fp8_forward", "fp8"])
def test_gradients_of_large_scores_do_not_grow_with_their_exponential(device, mode, strength, token):
    """Keys are rounded once more without what they have in common. Scores that this moved would have other
    probabilities in backward than in forward: a Llama without norms of q and k diverged of it. One token that is unlike
    the others, as the first often is, moves more than all of them."""
    if device.type == "cuda" and strength == 60 and token.startswith("long"):
        pytest.skip("a tensor core's sums of 14 bits move scores of 3e4 by themselves")
    q, k, v, dy = (t.detach().float() for t in tensors(device, batch=1, tokens=256))
    generator = torch.Generator().manual_seed(1)
    k += 2 * torch.randn(1, k.shape[1], 1, 128, generator=generator).to(device)
    if token == "first key":
        k[:, :, 0] = 10 * torch.randn(128, generator=generator).to(device)
    elif token == "long key":
        k[:, :, 50] *= 20
    elif token == "long query":
        q[:, :, 50] *= 30
    q, k, v, dy = (t.bfloat16() for t in (q * strength, k, v, dy))
    module = fp8.ScaledDotProductAttention(fp8.CurrentScaling(), mode=mode)
    for made, wanted in zip(run(module, q, k, v, dy), exact((q, k, v), dy, True)):
        assert 0.6 < made.float().norm() / wanted.float().norm() < 10


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mode", ["fp8_forward", "fp8"])
def test_checkpointing_gives_the_same_bits(device, mode, reentrant):
    q, k, v, dy = tensors(device)
    plain_module = fp8.ScaledDotProductAttention(mode=mode)
    kept = copy.deepcopy(plain_module)
    for _ in range(2):
        wanted = run(plain_module, q, k, v, dy)
        given = [t.detach().clone().requires_grad_() for t in (q, k, v)]
        attend = lambda *t: kept(*t, is_causal=True, enable_gqa=True)  # noqa: E731
        checkpoint(attend, *given, use_reentrant=reentrant).backward(dy)
        assert all(torch.equal(a.grad, b) for a, b in zip(given, wanted[1:]))
        assert torch.equal(kept.fp8_slots, plain_module.fp8_slots)
        stepped(plain_module), stepped(kept)


@pytest.mark.parametrize("mode", ["fp8_forward", "fp8"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_it_has_eager_modes_bits(device, backend, mode):
    module = fp8.ScaledDotProductAttention(mode=mode)
    twin = copy.deepcopy(module)
    compiled = torch.compile(twin, fullgraph=True, backend=backend)
    for step in range(3):
        given = tensors(device, seed=step)
        wanted, got = run(module, *given), run(compiled, *given)
        assert all(torch.equal(a, b) for a, b in zip(wanted, got))
        assert torch.equal(module.fp8_slots, twin.fp8_slots)
        stepped(module), stepped(twin)


def test_several_forwards_before_a_backward(device):
    module = fp8.ScaledDotProductAttention(mode="fp8")
    twin = copy.deepcopy(module)
    many = [tensors(device, seed=seed) for seed in range(3)]
    wanted = [run(module, *given) for given in many]
    inputs = [[t.detach().clone().requires_grad_() for t in given[:3]] for given in many]
    ys = [twin(*given, is_causal=True, enable_gqa=True) for given in inputs]
    for y, given, (*_, dy), want in zip(ys, inputs, many, wanted):
        y.backward(dy)
        assert all(torch.equal(t.grad, w) for t, w in zip(given, want[1:]))
    assert torch.equal(module.fp8_slots, twin.fp8_slots)


def test_autocast(device):
    q, k, v, dy = tensors(device, dtype=torch.float32)
    module = fp8.ScaledDotProductAttention(mode="fp8_forward")
    with torch.autocast(device.type, torch.bfloat16):
        y = module(q, k, v, is_causal=True, enable_gqa=True)
    assert y.dtype == torch.bfloat16
    y.float().backward(dy)
    assert q.grad.dtype == torch.float32
    assert error(q.grad, exact((q, k, v), dy, True)[1]) < 0.07
    with pytest.raises(ValueError, match=r"float32.*what can is 16bit"):
        module(q, k, v, is_causal=True, enable_gqa=True)


def test_in_evaluation_nothing_is_recorded(device):
    q, k, v, dy = tensors(device)
    module = fp8.ScaledDotProductAttention(mode="fp8")
    run(module, q, k, v, dy)
    stepped(module)
    slots = module.fp8_slots.clone()
    with torch.no_grad():
        module(q * 2, k, v, is_causal=True, enable_gqa=True)
    module.eval()
    _, *grads = run(module, q, k, v, dy * 1e-4)  # another loss: its gradients are scaled by their own amax
    assert torch.equal(module.fp8_slots, slots)
    wanted = exact((q, k, v), dy * 1e-4, True)
    assert all(error(g, w) < 0.118 for g, w in zip(grads, wanted[1:]))


def test_the_function_without_a_state(device):
    q, k, v, dy = tensors(device)
    wanted = exact((q, k, v), dy, True)
    y = fp8.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, mode="fp8")
    y.backward(dy)
    assert error(y, wanted[0]) < OUTPUT_ERROR and error(q.grad, wanted[1]) < 0.118
    state = fp8.ScaledDotProductAttention()
    y = fp8.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True, mode="fp8_forward", state=state
    )  # fmt: skip
    assert state.last[0] == "fp8_forward" and state.fp8_slots[0, 2] > 0


@pytest.mark.parametrize(
    "what", ["mask", "dropout", "float32", "head_dim", "heads", "empty", "one query", "width", "scale"]
)
def test_what_fp8_cannot_is_refused_with_the_modes_that_can(device, what):
    q, k, v, _ = tensors(device)
    options = {"is_causal": True, "enable_gqa": True}
    words = {
        "mask": "it has a mask", "dropout": "it has dropout", "float32": "float32", "head_dim": "head_dim 72",
        "heads": "2 heads of keys do not divide 3", "empty": "a sequence is empty", "one query": "there is one query",
        "width": "shapes", "scale": "scale is -0.1",
    }  # fmt: skip
    if what == "mask":
        options = {"attn_mask": torch.ones(64, 64, dtype=torch.bool, device=device), "enable_gqa": True}
    elif what == "dropout":
        options["dropout_p"] = 0.1
    elif what == "scale":
        options["scale"] = -0.1
    elif what == "float32":
        q, k, v = (t.float() for t in (q, k, v))
    elif what == "head_dim":
        q, k, v = (t[..., :72] for t in (q, k, v))
    elif what == "heads":
        q = q[:, :3]
    elif what == "one query":
        q = q[:, :, :1]
    elif what == "empty":
        k, v = k[:, :, :0], v[:, :, :0]
    else:
        v = v[..., :64]
    began = time.perf_counter()
    for mode in ("fp8_forward", "fp8"):
        with pytest.raises(ValueError, match=f"{words[what]}.*; what can is 16bit"):
            fp8.scaled_dot_product_attention(q, k, v, **options, mode=mode)
    assert time.perf_counter() - began < 1
    if what not in ("heads", "empty"):  # where PyTorch can
        module = fp8.ScaledDotProductAttention(mode="auto")
        with torch.no_grad():
            got = module(q, k, v, **options)
        assert module.last[0] == "16bit" and words[what] in module.last[1]
        if what != "dropout":
            same = F.scaled_dot_product_attention(q, k, v, **options)  # NaN of a negative scale, on CUDA
            torch.testing.assert_close(got, same, rtol=0, atol=0, equal_nan=True)


def test_backward_takes_one_head_dim(device):
    q, k, v, _ = tensors(device, dims=64)
    with pytest.raises(ValueError, match=r"head_dim 64.*takes 128 alone; what can is fp8_forward or 16bit"):
        fp8.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, mode="fp8")
    with torch.no_grad():  # forward alone it can
        fp8.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, mode="fp8")


def test_of_too_many_keys_probabilities_are_no_numbers_of_fp8():
    q = torch.empty(1, 1, 70000, 128, dtype=torch.bfloat16, device="meta")
    assert modes.choose("fp8", q, q, q, None, 0.0, True, False, False).mode == "fp8"  # forward alone
    assert modes.choose("fp8_forward", q, q, q, None, 0.0, True, False, True).mode == "fp8_forward"
    with pytest.raises(ValueError, match="70000 keys.*what can is fp8_forward or 16bit"):
        modes.choose("fp8", q, q, q, None, 0.0, True, False, True)


def test_a_mode_that_is_none(device):
    with pytest.raises(ValueError, match="mode must be one of auto, 16bit, fp8_forward, fp8, got 'fp4'"):
        fp8.scaled_dot_product_attention(*tensors(device)[:3], mode="fp4")


def test_the_ops_refuse_before_anything_is_written(device):
    q, k, v, _ = tensors(device)
    module, call, _ = forward_op(device, q, k, v)
    run_op = torch.ops.torch_fp8.attention_forward
    before = module.fp8_slots.clone()
    rest = (call.casts, 0, True, True, True, 0.1, False)
    for given, words in {
        (q, k, v[:, :, :3], call.slots): "key and value must be of one shape",
        (q[:, :3], k, v, call.slots): "do not divide",
        (q.float(), k, v, call.slots): "bfloat16 or float16",
        (q, k.half(), v, call.slots): "of one dtype",
        (q, k, v, call.slots[:3].clone()): r"slots must be .*\(10, 4\)",
        (q[0], k, v, call.slots): r"\(batch, heads, tokens, head_dim\)",
    }.items():
        with pytest.raises((RuntimeError, TypeError, ValueError), match=words):
            run_op(*given, *rest)
    for scale in (-0.1, 0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="a scale that is positive and finite, got"):
            run_op(q, k, v, call.slots, *rest[:5], scale, False)
    assert torch.equal(module.fp8_slots, before)


@pytest.mark.parametrize(
    "at, change",
    [
        (0, lambda t: t[:, :, 1:]),
        (1, lambda t: t[:, 1:]),
        (2, lambda t: t[:, :, :0]),
        (3, lambda t: t.view(torch.float8_e5m2)),
        (4, lambda t: t.transpose(1, 2)),
        (5, lambda t: t[:4].clone()),
        (6, lambda t: t.half()),
        (7, lambda t: t[:3].clone()),
        (8, lambda casts: casts[:5]),
        (13, lambda scale: -scale),
        (13, lambda scale: math.nan),
    ],
)
def test_backward_refuses_what_is_not_of_one_forward(device, at, change):
    q, k, v, dy = (t.detach() for t in tensors(device, tokens=32))
    _, call, saved = forward_op(device, q, k, v)
    given = [dy, *saved[1:], call.slots, call.casts, 0, True, True, True, 0.1, True, False]
    given[at], before = change(given[at]), call.slots.clone()
    with pytest.raises((RuntimeError, TypeError, ValueError), match="torch_fp8: "):
        torch.ops.torch_fp8.attention_backward(*given)
    assert torch.equal(call.slots, before)


def test_opcheck(device):
    q, k, v, dy = (t.detach() for t in tensors(device, batch=1, tokens=32))
    _, call, saved = forward_op(device, q, k, v)
    rest = (call.casts, 0, True, False, True, 0.1, False)
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    opcheck(torch.ops.torch_fp8.attention_forward, (q, k, v, call.slots, *rest), test_utils=tests[1:2])
    backward = (dy, *saved[1:], call.slots, call.casts, 0, True, False, True, 0.1, True, False)
    opcheck(torch.ops.torch_fp8.attention_backward, backward, test_utils=tests[1:2])
    given = [t.requires_grad_() for t in (q, k, v)]
    whole = (*given, call.slots, call.grad_slots, *rest, True, False)
    opcheck(torch.ops.torch_fp8.attention, whole, test_utils=tests)


def test_double_backward_and_transforms_are_refused(device):
    q, k, v, _ = tensors(device)
    y = fp8.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, mode="fp8_forward")
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(y.sum(), q, create_graph=True)


def test_a_batch_of_none(device):
    q, k, v, _ = (t[:0] for t in tensors(device))
    y = fp8.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, mode="fp8")
    assert y.shape == (0, 4, 64, 128)
    y.sum().backward()


def test_auto_follows_the_table(device, monkeypatch):
    long = {"16bit": [10.0, 30.0], "fp8_forward": [8.0, 29.9], "fp8": [8.0, 31.0], "fp8 expanded": [8.0, 25.0]}
    short = {"16bit": [10.0, 30.0], "fp8_forward": [11.0, 32.0], "fp8": [11.0, 40.0], "fp8 expanded": [11.0, 50.0]}
    cells = [modes.Cell(True, 128, True, tokens, 8, us) for tokens, us in ((32, short), (512, long))]
    monkeypatch.setattr(modes, "CELLS", cells)
    monkeypatch.setattr(modes, "_missing", lambda device: "")
    module = fp8.ScaledDotProductAttention()
    for tokens, grads, mode in (
        (64, True, "16bit"),
        (64, False, "16bit"),
        (200, False, "16bit"),  # nothing was recorded yet
        (200, True, "fp8"),
        (200, False, "fp8_forward"),
    ):
        q, k, v, _ = tensors(device, tokens=tokens)
        if mode == "fp8_forward":
            fp8.update_scales(module)
        with torch.set_grad_enabled(grads):
            module(q, k, v, is_causal=True, enable_gqa=True)
        assert module.last[0] == mode, (tokens, grads)
        # Whoever asks for FP8 gets the faster of its two ways.
        assert modes.choose("fp8", q, k, v, None, 0.0, True, True, True).expand == (tokens == 200)
    q, k, v, dy = tensors(device, tokens=200)
    run(torch.compile(module, fullgraph=True, backend="aot_eager"), q, k, v, dy)
    assert module.last[0] == "fp8"
    current = fp8.ScaledDotProductAttention(fp8.CurrentScaling())
    constant = fp8.ScaledDotProductAttention(fp8.ConstantScaling(bias=2))
    for one, mode in ((current, "16bit"), (constant, "fp8"), (module.eval(), "fp8"), (copy.deepcopy(module), "fp8")):
        one(q, k, v, is_causal=True, enable_gqa=True)
        assert one.last[0] == mode and ("would compute it twice" in one.last[1]) == (mode == "16bit")
        with torch.no_grad():
            one.eval()(q, k, v, is_causal=True, enable_gqa=True)
        assert one.last[0] == (mode if mode == "16bit" else "fp8_forward")
    module.reset_scaling()
    module(q, k, v, is_causal=True, enable_gqa=True)
    assert module.last[0] == "16bit"
    q, k, v, _ = tensors(device, tokens=200, dims=64)  # of which nothing was measured
    module(q, k, v, is_causal=True, enable_gqa=True)
    assert module.last[0] == "16bit"


@pytest.mark.parametrize("tokens", [64, 100])
def test_auto_compiles_as_it_is(device, tokens):
    module = fp8.ScaledDotProductAttention()
    q, k, v, _ = tensors(device, tokens=tokens)
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    made = [m(q, k, v, is_causal=True, enable_gqa=True) for m in (compiled, module)]
    assert error(*made) < 0.01
    assert module.last == ("16bit", "faster at this size, or not measured")


def test_cuda_graph_replays_with_the_scales_of_now(cuda):
    q, k, v, dy = tensors(cuda)
    module = fp8.ScaledDotProductAttention(mode="fp8")
    for _ in range(2):
        run(module, q, k, v, dy)
        stepped(module)
    given = [t.detach().clone().requires_grad_() for t in (q, k, v)]

    def step():
        for t in given:
            t.grad = None
        y = module(*given, is_causal=True, enable_gqa=True)
        y.backward(dy)
        return y

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    for factor in (1.0, 4.0):
        with torch.no_grad():
            for t, source in zip(given, (q, k, v)):
                t.copy_(source * factor)
        graph.replay()
        torch.cuda.synchronize()
        twin = copy.deepcopy(module)
        wanted = run(twin, *given, dy)
        for a, b in zip((y, *(t.grad for t in given)), wanted):
            assert torch.equal(a, b)
        stepped(module)
        module.fp8_state.memo.forget()


@pytest.mark.parametrize("tokens", [1000, 8192, 32768])
@pytest.mark.parametrize("mode", ["fp8_forward", "fp8"])
def test_long_sequences(cuda, mode, tokens):
    q, k, v, dy = tensors(cuda, batch=1, heads=2, kv_heads=1, tokens=tokens)
    y, *grads = run(fp8.ScaledDotProductAttention(mode=mode), q, k, v, dy)
    reference = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    of_16_bits = F.scaled_dot_product_attention(*reference, is_causal=True, enable_gqa=True)
    of_16_bits.backward(dy)
    assert error(y, of_16_bits) < OUTPUT_ERROR * 1.1
    for grad, t, bound in zip(grads, reference, GRADIENT_ERROR[mode, "HYBRID"]):
        assert error(grad, t.grad) < bound * 1.5  # rows of many small probabilities


@pytest.mark.parametrize("mode", ["fp8_forward", "fp8"])
def test_cpu_and_gpu_agree(cuda, mode):
    """Sums are made in another order, and the tensor core cuts off what is small."""
    given = tensors("cpu", tokens=200)
    module = fp8.ScaledDotProductAttention(mode=mode)
    on_cpu = run(copy.deepcopy(module), *given)
    on_gpu = run(module, *(t.detach().to(cuda) for t in given))
    exact_y = exact(given[:3], given[3], True)
    for a, b, want in zip(on_cpu, on_gpu, exact_y):
        b = b.cpu()
        assert error(a, b) < 1.2 * error(a, want)
        assert error(b, want) == pytest.approx(error(a, want), rel=0.1)
