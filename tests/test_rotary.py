"""rotary, forward and backward: against float64, and against transformers' own functions."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint
from torch_fp8.layers.rotary import rotary

ops = torch.ops.torch_fp8
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}  # of one rounding, relative
ARITHMETIC = 3e-6  # of float32 arithmetic, relative to the largest of what is added
# batch, tokens, heads of q and k, dims, rotary_dims
SHAPES = [
    (2, 5, 4, 2, 64, 64),
    (1, 7, 3, 1, 80, 32),
    (2, 3, 2, 2, 96, 96),
    (2, 33, 8, 2, 128, 128),
    (1, 2, 2, 1, 256, 64),
    (1, 3, 5, 1, 96, 24),  # GPT-NeoX-20B's: half of what turns is no pack
    (3, 1, 1, 1, 6, 2),
    (1, 2, 2, 1, 512, 512),
]
NORMS = [None, "rms", "tanh"]


def tables(batch, tokens, width, dtype=torch.float32, device="cpu", attention_factor=1.25):
    """Such angles as transformers gives, for one column a pair; scaled, as YaRN's are."""
    angles = torch.rand(batch, tokens, width, generator=torch.Generator().manual_seed(1)) * 6
    return [(attention_factor * f(angles)).to(device, dtype) for f in (torch.cos, torch.sin)]


def doubled(table, interleaved):
    """One column for each element."""
    return table.repeat_interleave(2, -1) if interleaved else table.repeat(1, 1, 2)


def tensors(shape, dtype, device, seed=0):
    batch, tokens, q_heads, k_heads, dims, _ = shape
    generator = torch.Generator().manual_seed(seed)
    return [
        (2 * torch.randn(batch, tokens, heads, dims, generator=generator)).to(device, dtype)
        for heads in (q_heads, k_heads)
    ]


def gains_for(norm, dims, dtype, device):
    if norm is None:
        return None, None
    size = dims if norm == "rms" else 1
    generator = torch.Generator().manual_seed(2)
    return tuple((0.5 + torch.rand(size, generator=generator)).to(device, dtype) for _ in range(2))


def plain(x, cos, sin, interleaved, norm, gain, eps, gain_offset):
    """One tensor in float64, written for reading. cos and sin have one column for each pair."""
    x = x.double()
    if norm == "rms":
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (1 if gain is None else gain.double() + gain_offset)
    if norm == "tanh":
        x = torch.tanh(gain.double() * x)
    if cos is None:
        return x
    c, s = cos.double().unsqueeze(-2), sin.double().unsqueeze(-2)
    turned, rest = x[..., : 2 * c.shape[-1]], x[..., 2 * c.shape[-1] :]
    pairs = turned.unflatten(-1, (-1, 2)) if interleaved else turned.unflatten(-1, (2, -1)).transpose(-1, -2)
    x1, x2 = pairs.unbind(-1)
    pairs = torch.stack([x1 * c - x2 * s, x2 * c + x1 * s], -1)
    turned = pairs.flatten(-2) if interleaved else pairs.transpose(-1, -2).flatten(-2)
    return torch.cat([turned, rest], -1)


def assert_close(ours, exact, scale=None):
    """One rounding of ours' dtype, and float32 arithmetic on terms as large as scale (the row's largest value)."""
    exact = exact.cpu()
    scale = exact.abs().amax(-1, keepdim=True) if scale is None else scale
    error = (ours.cpu().double() - exact).abs()
    assert (error <= 1.01 * ROUNDING[ours.dtype] * exact.abs() + ARITHMETIC * scale + 1e-7).all(), error.max()


def both(q, k, cos, sin, **options):
    """Ours and float64's: results, and gradients of random weights. options are rotary's; cos and sin have one column
    for each pair."""
    interleaved = options.get("interleaved", False)
    gains = options.pop("q_gain", None), options.pop("k_gain", None)
    leaves = [None if t is None else t.detach().requires_grad_() for t in (q, k, *gains)]
    wide = [None if t is None else t.detach().double().requires_grad_() for t in (q, k, *gains)]
    both_tables = (None, None) if cos is None else (doubled(cos, interleaved), doubled(sin, interleaved))
    ours = rotary(*leaves[:2], *both_tables, q_gain=leaves[2], k_gain=leaves[3], **options)
    exact = [
        plain(x, cos, sin, interleaved, options.get("norm"), gain, options.get("eps", 1e-6),
              options.get("gain_offset", 0.0))
        for x, gain in zip(wide[:2], wide[2:])
    ]  # fmt: skip
    grads = [torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y) for y in ours]
    torch.autograd.backward(ours, grads)
    torch.autograd.backward(exact, [g.double() for g in grads])
    return ours, exact, [None if t is None else t.grad for t in leaves], [None if t is None else t.grad for t in wide]


def assert_same(ours, exact, grads, wide_grads, norm):
    for a, b in zip(ours, exact):
        assert_close(a, b)
    for a, b in zip(grads[:2], wide_grads[:2]):
        assert_close(a, b, 4 * b.abs().amax(-1, keepdim=True).cpu() if norm else None)
    for a, b in zip(grads[2:], wide_grads[2:]):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == grads[2].dtype and a.shape == b.shape
            # Sums of terms that cancel: each adds what float32 loses of it.
            torch.testing.assert_close(a.cpu().double(), b.cpu(), rtol=2 * ROUNDING[a.dtype], atol=2e-4)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(device, shape, dtype, interleaved, norm):
    q, k = tensors(shape, dtype, device)
    cos, sin = tables(shape[0], shape[1], shape[5] // 2, device=device)
    q_gain, k_gain = gains_for(norm, shape[4], torch.float32, device)
    result = both(q, k, cos, sin, interleaved=interleaved, norm=norm, q_gain=q_gain, k_gain=k_gain)
    assert_same(*result, norm)


@pytest.mark.parametrize("options", [
    {"norm": "rms"},  # without gains
    {"norm": "rms", "eps": 0.3, "gain_offset": 1.0, "gains": torch.bfloat16},
    {"norm": "tanh", "gains": torch.float16},
    {"norm": "rms", "gains": torch.float32, "turned": False},
])  # fmt: skip
def test_norms(device, options):
    options = dict(options)
    q, k = tensors(SHAPES[3], torch.bfloat16, device)
    cos, sin = tables(1, SHAPES[3][1], 64, torch.bfloat16, device) if options.pop("turned", True) else (None, None)
    gains = options.pop("gains", None)
    q_gain, k_gain = (None, None) if gains is None else gains_for(options["norm"], 128, gains, device)
    assert_same(*both(q, k, cos, sin, q_gain=q_gain, k_gain=k_gain, **options), options["norm"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_any_tables(device, dtype, interleaved):
    """One column a pair or an element, one row for all samples or each, any strides, two dimensions."""
    q, k = tensors((2, 9, 2, 1, 64, 64), torch.bfloat16, device)
    cos, sin = tables(1, 9, 32, dtype, device)
    wanted = rotary(q, k, doubled(cos, interleaved), doubled(sin, interleaved), interleaved=interleaved)
    for a, b in zip(wanted, (q, k)):
        assert_close(a, plain(b, cos, sin, interleaved, None, None, 0, 0))
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (cos, sin)]
    for c, s in [
        (cos, sin),
        (cos[0], sin[0]),
        (cos.expand(2, -1, -1), sin.expand(2, -1, -1)),
        (cos.repeat(2, 1, 1), sin.repeat(2, 1, 1)),
        turned,
        (cos, turned[1]),
        [torch.stack([t, t], -1).flatten(-2)[..., ::2] for t in (cos, sin)],
    ]:
        got = rotary(q, k, c, s, interleaved=interleaved, rotary_dims=64)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted))


@pytest.mark.parametrize("norm", NORMS)
def test_views(device, norm):
    """As they come out of one projection, transposed, misaligned, with strides of all kinds: the numbers are those of
    dense ones, and results lie token by token."""
    qkv = torch.randn(2, 6, (4 + 2 + 2) * 64, device=device, dtype=torch.bfloat16).unflatten(-1, (-1, 64))
    q, k = qkv[:, :, :4], qkv[:, :, 4:6]
    cos, sin = (doubled(t, False) for t in tables(2, 6, 32, torch.bfloat16, device))
    q_gain, k_gain = gains_for(norm, 64, torch.bfloat16, device)
    options = {"norm": norm, "q_gain": q_gain, "k_gain": k_gain}
    dy = [torch.randn(2, 6, heads, 64, device=device, dtype=torch.bfloat16) for heads in (4, 2)]

    def run(q, k, dy, **more):
        leaves = [t.detach().requires_grad_() for t in (q, k)]
        ys = rotary(*leaves, cos, sin, **options, **more)
        return [*ys, *torch.autograd.grad(ys, leaves, dy)]

    wanted = run(q.contiguous(), k.contiguous(), dy)

    def misaligned(t):
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    for move in (
        lambda t: t,
        misaligned,
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        lambda t: t.repeat_interleave(2, 3)[..., ::2],
    ):
        got = run(move(q), move(k), [move(t) for t in dy])
        # A misaligned head goes to other lanes, whose sums are added in another order.
        for a, b in zip(got, wanted):
            torch.testing.assert_close(a, b, rtol=2**-7 if norm else 0, atol=2**-9 if norm else 0)
            assert a.is_contiguous()
        first = run(*(move(t).transpose(1, 2) for t in (q, k)), [move(t).transpose(1, 2) for t in dy], heads_first=True)
        assert all(torch.equal(a.transpose(1, 2), b) for a, b in zip(first, got))
        assert all(t.transpose(1, 2).is_contiguous() for t in first)


def test_broadcast_gradients(device):
    """What sum() gives back has no strides at all."""
    q, k = (t.requires_grad_() for t in tensors(SHAPES[0], torch.float32, device))
    cos, sin = tables(1, 5, 32, device=device)
    y, _ = rotary(q, k, cos, sin, rotary_dims=64)
    y.sum().backward()
    assert k.grad is None
    wide = q.detach().double().requires_grad_()
    plain(wide, cos, sin, False, None, None, 0, 0).sum().backward()
    assert_close(q.grad, wide.grad)


@pytest.mark.parametrize("norm", ["rms", "tanh"])
def test_only_the_gradients_that_are_asked_for(device, norm):
    q, k = tensors(SHAPES[0], torch.float32, device)
    cos, sin = tables(1, 5, 32, device=device)
    gains = gains_for(norm, 64, torch.float32, device)
    leaves = [q, k, *gains]
    whole = both(q, k, cos, sin, norm=norm, q_gain=gains[0], k_gain=gains[1])[2]
    for wanted in ([0], [1], [2], [3], [0, 2], [1, 2]):
        now = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(leaves)]
        ys = rotary(now[0], now[1], cos, sin, rotary_dims=64, norm=norm, q_gain=now[2], k_gain=now[3])
        grads = [torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y) for y in ys]
        torch.autograd.backward(ys, grads)
        for i, t in enumerate(now):
            assert (t.grad is not None) == (i in wanted)
            if i in wanted:
                assert torch.equal(t.grad, whole[i])


@pytest.mark.parametrize("norm", ["rms", "tanh"])
def test_gradients_of_gains_are_the_same_every_time(device, norm):
    """Also with more heads than one round of blocks takes, and against float64."""
    shape = (2, 517, 12, 3, 64, 64)
    q, k = tensors(shape, torch.bfloat16, device)
    cos, sin = tables(1, 517, 32, device=device)
    q_gain, k_gain = gains_for(norm, 64, torch.float32, device)
    _, _, once, exact = both(q, k, cos, sin, norm=norm, q_gain=q_gain, k_gain=k_gain)
    _, _, twice, _ = both(q, k, cos, sin, norm=norm, q_gain=q_gain, k_gain=k_gain)
    for a, b, c in zip(once, twice, exact):
        assert torch.equal(a, b)
        if a.dim() == 1:
            # Terms of size 1 that cancel: their sum is of the size of the root of their number.
            torch.testing.assert_close(a.double(), c, rtol=1e-4, atol=1e-5 * q.numel() ** 0.5)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_place(device, bad):
    """It reaches its partner and, by a norm, its head; nobody else, and where nothing is turned nobody."""
    for column, pairs in [(3, [3, 11]), (20, [20])]:
        q, k = tensors((1, 4, 2, 1, 32, 16), torch.float32, device)
        q[0, 2, 1, column] = bad
        cos, sin = tables(1, 4, 8, device=device)
        expected = torch.ones(q.shape, dtype=torch.bool)
        expected[0, 2, 1, pairs] = False
        for interleaved in (False, True):
            y, other = rotary(q, k, cos, sin, rotary_dims=16, interleaved=interleaved)
            if interleaved and column == 3:
                expected[0, 2, 1, [2, 3, 11]] = torch.tensor([False, False, True])
            assert torch.equal(y.isfinite().cpu(), expected) and other.isfinite().all()
        y, _ = rotary(q, k, cos, sin, rotary_dims=16, norm="rms")
        head = torch.ones_like(expected)
        head[0, 2, 1] = False
        assert y.cpu()[head].isfinite().all() and not y[0, 2, 1, column].isfinite()


def test_nothing(device):
    cos, sin = tables(1, 0, 32, device=device)
    gain = torch.ones(64, device=device, requires_grad=True)
    for batch, tokens, heads in [(2, 0, 4), (0, 0, 4), (1, 0, 0)]:
        q = torch.randn(batch, tokens, heads, 64, device=device, requires_grad=True)
        gain.grad = None
        y, _ = rotary(q, q, cos, sin, rotary_dims=64, norm="rms", q_gain=gain)
        y.sum().backward()
        assert y.shape == q.shape == q.grad.shape and gain.grad.count_nonzero() == 0


# ---- against transformers --------------------------------------------------------------------------------------------


def models(name):
    pytest.importorskip("transformers")
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


# interleaved; the width of the tables over the head's; the columns of one each pair
FAMILIES = {
    "llama": (False, 1, lambda t: t),
    "gpt_neox": (False, 0.25, lambda t: t),
    "glm": (True, 0.5, lambda t: t[..., : t.shape[-1] // 2]),
    "cohere": (True, 1, lambda t: t),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_positions(device, name):
    """Each family's own function on its (batch, heads, tokens, dims) views, in float64 and, rounded more often, in
    bfloat16."""
    module = models(name)
    interleaved, part, columns = FAMILIES[name]
    width = int(64 * part)
    q, k = (t.transpose(1, 2) for t in tensors((2, 9, 4, 2, 64, width), torch.bfloat16, device))
    frequencies = 10_000.0 ** (-torch.arange(0, width, 2) / width)
    angles = torch.outer(torch.arange(9), frequencies)[None]
    angles = angles.repeat_interleave(2, -1) if name == "cohere" else angles.repeat(1, 1, 2)
    cos, sin = angles.cos().to(q), angles.sin().to(q)
    ours = rotary(q, k, columns(cos), columns(sin), rotary_dims=width, interleaved=interleaved, heads_first=True)
    exact = module.apply_rotary_pos_emb(q.double(), k.double(), cos.double(), sin.double())
    theirs = module.apply_rotary_pos_emb(q, k, cos, sin)
    for a, b, c, x in zip(ours, exact, theirs, (q, k)):
        if name != "cohere":  # which computes in float32
            assert_close(a, b)
        torch.testing.assert_close(a, c, rtol=0, atol=2**-8 * 3 * x.abs().max().item())
        assert a.stride() == x.stride()


@pytest.mark.parametrize("name,norm,offset", [("qwen3", "Qwen3RMSNorm", 0.0), ("gemma3", "Gemma3RMSNorm", 1.0)])
def test_transformers_norms(device, name, norm, offset):
    module = models(name)
    q, k = tensors((2, 9, 4, 2, 64, 64), torch.float32, device)
    norms = [getattr(module, norm)(64, eps=1e-5).to(device) for _ in range(2)]
    for layer in norms:
        torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
    cos, sin = (doubled(t, False) for t in tables(1, 9, 32, device=device))
    leaves = [t.detach().requires_grad_() for t in (q, k)]
    theirs = module.apply_rotary_pos_emb(*(n(t) for n, t in zip(norms, leaves)), cos, sin, unsqueeze_dim=2)
    parameters = [n.weight for n in norms]
    ours = rotary(
        *leaves, cos, sin, norm="rms", q_gain=parameters[0], k_gain=parameters[1], eps=1e-5, gain_offset=offset
    )
    dy = [torch.randn_like(y) for y in ours]
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(ys, leaves + parameters, dy) for ys in (ours, theirs))):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


# ---- among PyTorch's machinery ---------------------------------------------------------------------------------------


def arguments(device, norm):
    q, k = tensors((2, 5, 4, 2, 64, 32), torch.float32, device)
    cos, sin = (doubled(t, False) for t in tables(1, 5, 16, device=device))
    return q, k, cos, sin, gains_for(norm, 64, torch.float32, device)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("heads_first", [False, True])
def test_opcheck(device, norm, heads_first):
    q, k, cos, sin, gains = arguments(device, norm)
    if heads_first:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    leaves = [None if t is None else t.detach().requires_grad_() for t in (q, k, *gains)]
    code = NORMS.index(norm)
    opcheck(ops.rotary.default, (*leaves[:2], cos, sin, 32, False, heads_first, code, *leaves[2:]))
    inputs = (q, k) if norm else (None, None)
    opcheck(
        ops.rotary_backward.default,
        (q, k, *inputs, cos, sin, 32, False, heads_first, code, *gains, 1e-6, 0.0, norm is not None),
    )


@pytest.mark.parametrize("norm,dynamic,backend", [
    (None, True, "aot_eager"),
    ("rms", False, "inductor"),
    ("rms", True, "aot_eager"),
    ("tanh", False, "aot_eager"),
])  # fmt: skip
def test_compile(device, norm, dynamic, backend):
    q, k, cos, sin, gains = arguments(device, norm)

    def f(q, k, *gains):
        q, k = rotary(q * 2, k.transpose(1, 2).contiguous().transpose(1, 2), cos[:, : q.shape[1]],
                      sin[:, : q.shape[1]], norm=norm, q_gain=gains[0], k_gain=gains[1])  # fmt: skip
        return q.square().sum() + k.cos().sum()

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend=backend)
    for tokens in (5, 3, 4):
        results = []
        for function in (f, compiled):
            leaves = [
                None if t is None else t.detach().requires_grad_() for t in (q[:, :tokens], k[:, :tokens], *gains)
            ]
            y = function(*leaves)
            y.backward()
            results.append([y, *(t.grad for t in leaves if t is not None)])
        for a, b in zip(*results):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(device, reentrant):
    q, k, cos, sin, gains = arguments(device, "rms")

    def f(q, k, *gains):
        return rotary(q, k, cos, sin, norm="rms", q_gain=gains[0], k_gain=gains[1])

    results = []
    for run in (f, lambda *leaves: checkpoint(f, *leaves, use_reentrant=reentrant)):
        leaves = [t.detach().requires_grad_() for t in (q, k, *gains)]
        ys = run(*leaves)
        torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
        results.append([*ys, *(t.grad for t in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_what_is_kept_for_backward(device):
    """Tables and, with a norm, the inputs; without one nothing of their size."""
    q, k, cos, sin, gains = arguments(device, "rms")
    for norm, kept in [(None, 0), ("rms", q.numel() + k.numel())]:
        saved = []
        leaves = [t.detach().requires_grad_() for t in (q, k)]
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: (saved.append(t), t)[1], lambda t: t):
            rotary(*leaves, cos, sin, norm=norm, q_gain=gains[0] if norm else None)
        assert sum(t.numel() for t in saved if t.shape in (q.shape, k.shape)) == kept


def test_autocast_changes_nothing(device):
    q, k, cos, sin, gains = arguments(device, "rms")
    plain = rotary(q, k, cos, sin, norm="rms", q_gain=gains[0])
    with torch.autocast(device.type, torch.bfloat16):
        under = rotary(q, k, cos, sin, norm="rms", q_gain=gains[0])
    assert all(torch.equal(a, b) for a, b in zip(plain, under))


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_refusals(device):
    q, k, cos, sin, _ = arguments(device, None)
    gain, factor = torch.ones(64, device=device), torch.ones(1, device=device)
    whole = SimpleNamespace(q=q, k=k, cos=cos, sin=sin)
    for change, error, words in [
        ({"q": q[0]}, RuntimeError, "q must be .batch, tokens, heads, dims., got shape"),
        ({"q": q.int(), "k": k.int()}, TypeError, "q must be bfloat16"),
        ({"k": k.half()}, TypeError, "k must have the dtype of q"),
        ({"k": k[:, :4]}, RuntimeError, "k must differ from q .* in the number of heads alone"),
        ({"k": k[..., :32]}, RuntimeError, "k must differ from q"),
        ({"q": q.transpose(1, 2), "k": k.transpose(1, 2)}, RuntimeError, "pass heads_first as they lie"),
        ({"q": q[..., :63], "k": k[..., :63]}, RuntimeError, "even number of dims"),
        ({"q": q.repeat(1, 1, 1, 9), "k": k.repeat(1, 1, 1, 9)}, RuntimeError, "at most 512"),
        ({"cos": cos[:, :4], "sin": sin[:, :4]}, RuntimeError, "cos must be .* 5 tokens, 32 or 16.* one row a token"),
        ({"cos": cos.repeat(3, 1, 1), "sin": sin}, RuntimeError, "cos must be ..2 or 1,"),
        ({"sin": sin[..., :16]}, RuntimeError, "cos and sin must be alike"),
        ({"sin": sin.half()}, RuntimeError, "cos and sin must be alike"),
        ({"sin": None}, RuntimeError, "come together"),
        ({"cos": cos.long(), "sin": sin.long()}, TypeError, "cos must be bfloat16"),
        ({"cos": cos[..., :31], "sin": sin[..., :31]}, ValueError, "rotary_dims must be even"),
        ({"cos": cos.repeat(1, 1, 3), "sin": sin.repeat(1, 1, 3)}, ValueError, "no more than the 64 dims"),
        ({"rotary_dims": 48}, RuntimeError, "cos must be .* 48 or 24"),
        ({"norm": "rms", "q_gain": gain[:32]}, RuntimeError, r"q_gain must have shape \[64\]"),
        ({"norm": "rms", "k_gain": gain.long()}, TypeError, "k_gain must be bfloat16"),
        ({"norm": "tanh", "q_gain": factor}, RuntimeError, "norm tanh needs k_gain"),
        ({"norm": "tanh", "q_gain": gain, "k_gain": factor}, RuntimeError, "q_gain must have 1 element"),
        ({"q_gain": gain}, RuntimeError, "q_gain without a norm"),
        ({"norm": "layer"}, ValueError, "norm must be None"),
        ({"cos": cos.detach().requires_grad_()}, RuntimeError, "cos and sin no gradient"),
        ({"k": k.to("meta")}, RuntimeError, "move both to one device"),
    ]:
        call = {**vars(whole), **change}
        tensors = [call.pop(name) for name in ("q", "k", "cos", "sin")]
        with pytest.raises(error, match=words):
            rotary(*tensors, **call)


def test_derivatives_that_do_not_exist_are_refused_in_words(device):
    q, k, cos, sin, _ = arguments(device, None)
    leaf = q.detach().requires_grad_()
    y, _ = rotary(leaf, k, cos, sin)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(y.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="torch.func's transforms"):
        torch.func.grad(lambda x: rotary(x, k, cos, sin)[0].sum())(q)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        rotary(torch.autograd.forward_ad.make_dual(q, q), k, cos, sin)
