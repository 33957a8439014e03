"""fp8.RMSNorm, fp8.LayerNorm and fp8.TransformerBlock: against float64, against their parts one after the other, and
that what a norm hands over is cast by nobody else."""

import copy
import pickle

import pytest
import torch
import torch_fp8 as fp8
from casts import count_casts
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

WIDTH = 64
RECIPES = [
    fp8.DelayedScaling(amax_history_len=3),
    fp8.CurrentScaling(power_of_two=True),
    fp8.ConstantScaling(bias=2),
]
NORMS = {"rms": (fp8.RMSNorm, nn.RMSNorm), "layer": (fp8.LayerNorm, nn.LayerNorm)}


def error(made, exact):
    exact = exact.double()
    return ((made.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def assert_no_worse(made, apart, exact, dtype):
    rounding = torch.finfo(dtype).eps
    for i, (a, b, e) in enumerate(zip(made, apart, exact, strict=True)):
        assert error(a, e) <= 1.1 * error(b, e) + rounding, (i, error(a, e), error(b, e))


def assert_same(tensors, others):
    for i, (a, b) in enumerate(zip(tensors, others, strict=True)):
        assert torch.equal(a, b), i


def assert_same_state(model, twin):
    for (name, a), b in zip(fp8.state_dict(model).items(), fp8.state_dict(twin).values(), strict=True):
        assert torch.equal(a, b), name


def gradients(model, y, leaves, loss=lambda y: y.double().square().mean()):
    loss(y).backward()
    tensors = [*leaves, *model.parameters()]
    made = [y.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad.clone() for t in tensors)]
    model.zero_grad()
    return made


# ---- norms ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(5, 7, 40), (3, 17), (0, 24)])
@pytest.mark.parametrize("added", [True, False])
def test_a_norm_is_no_worse_than_pytorchs(device, kind, dtype, affine, shape, added):
    """Alone and with a residual; outputs and all gradients."""
    ours, plain = NORMS[kind]
    model = ours(shape[-1], 1e-5, affine, device=device, dtype=dtype)
    for p in model.parameters():
        nn.init.normal_(p, 1, 0.3)
    of_pytorch = plain(shape[-1], 1e-5, affine, device=device, dtype=dtype)
    of_pytorch.load_state_dict(model.state_dict())
    exact = copy.deepcopy(of_pytorch).double()
    x, residual = torch.randn(2, *shape, device=device).to(dtype)
    weight = torch.randn(2, *shape, device=device)
    results = []
    for m in (model, of_pytorch, exact):
        of = torch.float64 if m is exact else dtype
        leaves = [t.to(of, copy=True).requires_grad_() for t in (x, residual)]
        if not added:
            y, total = m(leaves[0]), leaves[1]
        elif m is model:
            y, total = m(*leaves)
        else:
            total = leaves[1] + leaves[0]
            y = m(total)
        loss = (y.double() * weight[0]).sum() + (total.double() * weight[1]).sum()
        results.append([total.detach(), *gradients(m, y, leaves, lambda y, loss=loss: loss)])
    assert [t.dtype for t in results[0]] == [t.dtype for t in results[1]]
    assert_no_worse(*results, dtype)


@pytest.mark.parametrize("kind", NORMS)
def test_a_norm_is_the_module_it_derives_from(device, kind):
    ours, plain = NORMS[kind]
    model, of_pytorch = ours(24, device=device), plain(24, device=device)
    assert isinstance(model, plain) and list(model.state_dict()) == list(of_pytorch.state_dict())
    of_pytorch.load_state_dict(model.state_dict()), model.load_state_dict(of_pytorch.state_dict())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        x = torch.randn(3, 24, device=device)
        assert torch.equal(copied(x), model(x))
    if kind == "rms":
        assert torch.allclose(fp8.RMSNorm(24, None, device=device)(x), nn.RMSNorm(24, device=device)(x))
        assert list(fp8.RMSNorm(24, elementwise_affine=False).state_dict()) == []
    else:
        assert list(fp8.LayerNorm(24, bias=False).state_dict()) == ["weight"]


@pytest.mark.parametrize("kind", NORMS)
def test_a_norm_takes_what_the_kernels_do_not(device, kind):
    """As PyTorch's own."""
    model = NORMS[kind][0](24, device=device).double()
    x = torch.randn(3, 24, device=device, dtype=torch.float64)
    y, total = model(x, x)
    assert torch.equal(total, 2 * x) and torch.allclose(y, NORMS[kind][1](24, 1e-5, device=device).double()(2 * x))


def test_bad_input_of_norms(device):
    norm = fp8.RMSNorm(24, device=device)
    x = torch.randn(4, 24, device=device)
    with pytest.raises(RuntimeError, match=r"torch_fp8: gain must have shape \[23\], one element for each column of x"):
        norm(x[:, :23])
    with pytest.raises(RuntimeError, match=r"torch_fp8: residual .*\[3, 24\]"):
        norm(x, x[:3])
    with pytest.raises(TypeError, match="torch_fp8: residual .*BFloat16"):
        norm(x, x.bfloat16())
    with pytest.raises(ValueError, match="torch_fp8: layers that share their input must have one in_features"):
        norm.feeds(fp8.Linear(24, 8, device=device), fp8.Linear(23, 8, device=device))


def test_a_norm_cannot_be_differentiated_twice(device):
    norm = fp8.RMSNorm(24, device=device)
    x = torch.randn(4, 24, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"torch_fp8: .*create_graph=True"):
        torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
    y = norm(x).square().sum()
    assert_same(torch.autograd.grad(y, x, retain_graph=True), torch.autograd.grad(y, x))


# ---- what a norm hands over -----------------------------------------------------------------------------------------


class Reads(nn.Module):
    """A norm and three layers that read it, in steps that a test writes."""

    def __init__(self, device, recipe=None, kind="rms", dtype=torch.float32, layers=3):
        super().__init__()
        torch.manual_seed(0)
        self.norm = NORMS[kind][0](WIDTH, device=device, dtype=dtype)
        nn.init.normal_(self.norm.weight, 1, 0.2)
        made = {"device": device, "dtype": dtype, "recipe": recipe or RECIPES[0]}
        self.layers = nn.ModuleList(fp8.Linear(WIDTH, 32 + 16 * i, **made) for i in range(layers))
        self.norm.feeds(*self.layers)
        self.between = lambda y, i: y

    def forward(self, x, residual=None):
        y = self.norm(x) if residual is None else self.norm(x, residual)
        y, total = (y, x) if residual is None else y
        made = torch.cat([layer(self.between(y, i)) for i, layer in enumerate(self.layers)], -1)
        return made if residual is None else made * total.sum()


def fed_and_not(device, *args, **kwargs):
    """The second's layers cast by themselves, each for itself."""
    model = Reads(device, *args, **kwargs)
    twin = copy.deepcopy(model)
    twin.norm.readers = ()
    for layer in twin.layers:
        layer.fp8_state.group.leave(layer.fp8_state)
    return model, twin


def both(model, twin, x, residual=None, calls=None):
    results = []
    for m, call in zip((model, twin), calls or (model, twin)):
        leaves = [None if t is None else t.clone().requires_grad_() for t in (x, residual)]
        leaves = [t for t in leaves if t is not None]
        results.append(gradients(m, call(*leaves), leaves))
    return results


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("added", [True, False])
def test_readers_of_a_norm_cast_nothing(device, compiled, recipe, kind, layers, added):
    """And all results but sums of gradients, and the scaling states, are to the bit those of layers that do."""
    model, twin = fed_and_not(device, recipe, kind, layers=layers)
    call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    for step in range(4):
        for micro in range(2):
            torch.manual_seed(10 * step + micro)
            x, residual = torch.randn(2, 3, 8, WIDTH, device=device)
            given = (x, residual) if added else (x,)
            with count_casts() as casts:
                results = both(model, twin, *given, calls=(call, twin))
            assert torch.equal(results[0][0], results[1][0]), step
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
            by_norm = step > 0 or not isinstance(recipe, fp8.DelayedScaling)
            if by_norm:
                assert casts["cast_input"] == layers, step  # the twin's
        fp8.update_scales(model), fp8.update_scales(twin)
        if not (
            compiled and isinstance(recipe, fp8.CurrentScaling)
        ):  # there who takes codes records no amax, nor reads one
            assert_same_state(model, twin)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("change", ["in place", "replaced", "view", "of one", "detached"])
def test_readers_cast_what_the_norm_did_not_make(device, compiled, recipe, change):
    model, twin = fed_and_not(device, recipe)
    call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model

    def between(y, i):
        if change == "in place":
            return y.mul_(0.5) if i == 0 else y
        if change == "replaced":
            return y * 0.5
        if change == "view":
            return y[1:]
        if change == "detached":
            return y.detach()
        return y * 3 if i == 1 else y

    for step in range(3):
        x = torch.randn(3, 8, WIDTH, device=device)
        if step:
            model.between = twin.between = between
        with count_casts() as casts:
            results = both(model, twin, x, calls=(call, twin))
        assert torch.equal(results[0][0], results[1][0]), step
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
        if step:
            assert casts["cast_input"] >= 3 + 1
        fp8.update_scales(model), fp8.update_scales(twin)
        fp8.load_state_dict(model, fp8.state_dict(twin))  # that step taught nothing: another scale, as good


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("member", [0, 1, 2])
@pytest.mark.parametrize("what", ["requires_grad", "eval", "disabled"])
def test_a_reader_that_wants_other_codes(device, compiled, member, what):
    """It casts; the scaling states are those of layers apart."""
    model, twin = fed_and_not(device)
    for m in (model, twin):
        if what == "requires_grad":
            m.layers[member].weight.requires_grad_(False)
        elif what == "eval":
            m.layers[member].eval()
        else:
            m.layers[member].fp8_enabled = False
    call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    for step in range(4):
        x = torch.randn(3, 8, WIDTH, device=device)
        results = both(model, twin, x, calls=(call, twin))
        assert torch.equal(results[0][0], results[1][0]), step
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
        fp8.update_scales(model), fp8.update_scales(twin)
        assert_same_state(model, twin)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("scale", [1e3, 1e-5])
def test_scales_follow_what_the_layers_read(device, compiled, order, scale):
    """One reader is given something larger, or smaller, by far than what the norm cast in its place: nobody's history
    says what its layer did not see."""
    model = Reads(device)
    model.scales = (1.0, 1.0, 1.0)

    def forward(x):
        y = model.norm(x)
        outs = {i: model.layers[i](y if model.scales[i] == 1 else y * model.scales[i]) for i in order}
        return outs[0], outs[1], outs[2]

    call = torch.compile(forward, fullgraph=True, backend="aot_eager") if compiled else forward
    for who in range(3):
        for step in range(6):  # the histories are of three steps
            model.scales = tuple(scale if step and i == who else 1.0 for i in range(3))
            x = torch.randn(3, 8, WIDTH, device=device)
            outs = call(x)
            sum(y.square().mean() for y in outs).backward()
            fp8.update_scales(model)
        y = F.rms_norm(x, (WIDTH,), model.norm.weight, model.norm.eps)
        for i, layer in enumerate(model.layers):
            expected = F.linear(y * model.scales[i], layer.weight)
            assert error(outs[i] - layer.bias, expected) < 0.06, i
        for layer in model.layers:
            layer.reset_scaling()
        torch._dynamo.reset()  # each of these is a few graphs


def test_two_results_of_a_norm_in_flight(device):
    model, twin = fed_and_not(device)
    for _ in range(3):
        xs = torch.randn(2, 8, WIDTH, device=device)
        outs = []
        for m in (model, twin):
            ys = [m.norm(x) for x in xs]
            made = [torch.cat([layer(y) for layer in m.layers], -1) for y in ys]
            for y in reversed(made):
                y.square().sum().backward()
            outs.append([*made, *(p.grad.clone() for p in m.parameters())])
            m.zero_grad()
            fp8.update_scales(m)
        assert_same(outs[0][:2], outs[1][:2])
        for a, b in zip(*outs):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
        fp8.load_state_dict(model, fp8.state_dict(twin))  # of what was read too late, that step taught nothing


@pytest.mark.parametrize("how", ["no_grad", "eval"])
def test_a_norm_records_nothing_in_evaluation(device, how):
    model, twin = fed_and_not(device)
    for _ in range(2):
        both(model, twin, torch.randn(8, WIDTH, device=device))
        fp8.update_scales(model), fp8.update_scales(twin)
    model.train(how != "eval"), twin.train(how != "eval")
    with torch.set_grad_enabled(how == "eval"):
        x = 100 * torch.randn(8, WIDTH, device=device)
        assert torch.equal(model(x), twin(x))
    assert_same_state(model, twin)
    assert all((layer.fp8_slots[:, 2] == 0).all() for layer in model.layers)


def test_what_a_compiled_norm_leaves_on_its_result(device):
    """Layers outside of its graph read values alone."""
    model, twin = fed_and_not(device)
    call = torch.compile(model.norm, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(8, WIDTH, device=device, requires_grad=True)
        y = call(x)
        made = torch.cat([layer(y) for layer in model.layers], -1)
        assert torch.equal(made, twin(x))
        y = y.mul_(-2)
        expected = torch.cat([layer(twin.norm(x) * -2) for layer in twin.layers], -1)
        assert error(torch.cat([layer(y) for layer in model.layers], -1), expected) < 1e-6
        made.sum().backward()
        fp8.update_scales(model), fp8.update_scales(twin)


@pytest.mark.parametrize("change", ["copy", "freeze", "revert", "replace", "disabled"])
def test_a_norm_whose_readers_become_others(device, change):
    model, _ = fed_and_not(device)
    for _ in range(2):
        model(torch.randn(8, WIDTH, device=device)).square().sum().backward(), fp8.update_scales(model)
    exact = copy.deepcopy(model)
    fp8.revert(exact)
    if change == "copy":
        model = copy.deepcopy(model)
        assert all(a is b for a, b in zip(model.norm.readers, model.layers))
    elif change == "freeze":
        fp8.freeze(model, filter=["layers.0"])
    elif change == "revert":
        fp8.revert(model.layers[1])
    elif change == "replace":
        model.layers[0] = nn.Linear(WIDTH, 32, device=device)
        model.layers[0].load_state_dict(exact.layers[0].state_dict())
    x = torch.randn(8, WIDTH, device=device)
    for _ in range(2):
        if change == "disabled":
            with fp8.disabled(model):
                assert torch.equal(model(x), exact(x))
        assert error(model(x), exact(x)) < 0.06
        if change != "freeze":
            model(x).square().sum().backward()
        fp8.update_scales(model)


# ---- the block ------------------------------------------------------------------------------------------------------

HEADS = 4


class Plain(nn.Module):
    """What a TransformerBlock computes, in plain PyTorch over the layers that it is given."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, cos=None, sin=None, mask=None):
        b = self.block
        if b.norm_first:
            h = x + self.attention(self.norm(b.attention_norm, x), cos, sin, mask)
            return h + self.mlp(self.norm(b.mlp_norm, h))
        h = x + self.norm(b.attention_norm, self.attention(x, cos, sin, mask))
        return h + self.norm(b.mlp_norm, self.mlp(h))

    @staticmethod
    def norm(norm, x):
        if isinstance(norm, nn.LayerNorm):
            return F.layer_norm(x, (x.shape[-1],), norm.weight, norm.bias, norm.eps)
        return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.eps)

    def attention(self, x, cos, sin, mask):
        b = self.block
        q, k, v = (layer(x).unflatten(-1, (-1, b.head_dim)) for layer in (b.q_proj, b.k_proj, b.v_proj))
        if b.q_norm is not None:
            q, k = self.norm(b.q_norm, q), self.norm(b.k_norm, k)
        if cos is not None:
            q, k = (self.turned(t, cos, sin) for t in (q, k))
        groups = b.num_heads // b.num_kv_heads
        q, k, v = q.transpose(1, 2), *(t.transpose(1, 2).repeat_interleave(groups, 1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) / b.head_dim**0.5
        if mask is None:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).tril()
        scores = scores.masked_fill(~mask, float("-inf"))
        return b.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))

    @staticmethod
    def turned(t, cos, sin):
        cos, sin = (table[:, None].to(t.dtype) for table in (cos, sin))
        a, b = t.chunk(2, -1)
        return t * cos + torch.cat([-b, a], -1) * sin

    def mlp(self, x):
        m = self.block.mlp
        f = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
             "relu_squared": lambda x: F.relu(x).square()}[m.activation]  # fmt: skip
        return m.down_proj(f(m.gate_proj(x)) * m.up_proj(x) if hasattr(m, "gate_proj") else f(m.up_proj(x)))


def blocks(device, dtype=torch.float32, **kwargs):
    """A block; its layers with plain PyTorch in between; and all in float64."""
    torch.manual_seed(0)
    kwargs.setdefault("recipe", RECIPES[0])
    block = fp8.TransformerBlock(WIDTH, HEADS, 96, device=device, dtype=dtype, **kwargs)
    for name, p in block.named_parameters():
        if "norm" in name:
            nn.init.normal_(p, 1, 0.2)
    apart = Plain(copy.deepcopy(block))
    apart.block.attention_norm.readers = apart.block.mlp_norm.readers = ()
    exact = Plain(fp8.revert(copy.deepcopy(block))).double()
    return block, apart, exact


def tables(device, tokens=6, head_dim=WIDTH // HEADS):
    angles = torch.arange(tokens).double()[:, None] * 10.0 ** -torch.arange(head_dim // 2).double() / 3
    return tuple(
        t.to(device, torch.float32) for t in (torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1))
    )


def inputs(device, dtype=torch.float32, seed=0, shape=(2, 6, WIDTH)):
    torch.manual_seed(100 + seed)
    return torch.randn(shape, device=device).to(dtype)


def run(model, x, *args, call=None):
    leaf = x.clone().requires_grad_()
    return gradients(model, (model if call is None else call)(leaf, *args), [leaf])


VARIANTS = {
    "llama": {"num_kv_heads": 2},
    "qwen3": {"num_kv_heads": 1, "qk_norm": True, "head_dim": 24},
    "gpt": {"norm": "layer", "gated": False, "activation": "gelu", "bias": True},
    "olmo2": {"norm_first": False},
    "layer norms after": {"norm": "layer", "norm_first": False, "activation": "gelu_tanh"},
    "squared": {"activation": "relu_squared", "gated": False, "bias": True},
}


def assert_block_no_worse(made, apart, exact, dtype):
    """Two samples of rounding errors in tiny tensors differ by a fifth from step to step, those of gains most of all,
    which are sums of few rows; on the whole they do not."""
    largest = max(e.abs().max().item() for e in exact[1:])
    errors = torch.tensor([
        [error(a, e), error(b, e)] for a, b, e in zip(made, apart, exact, strict=True)
        if e.abs().max() > 1e-9 * largest  # a bias of k moves all scores of a query alike: its gradient is 0
    ])  # fmt: skip
    rounding = torch.finfo(dtype).eps
    assert (errors[:, 0] <= 2 * errors[:, 1] + rounding).all(), errors
    assert errors[:, 0].mean() <= 1.15 * errors[:, 1].mean() + rounding, errors


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_block_is_no_worse_than_its_parts(device, variant, dtype):
    block, apart, exact = blocks(device, dtype, **VARIANTS[variant])
    turned = () if variant in ("gpt", "squared") else tables(device, head_dim=block.head_dim)
    for step in range(3):
        x = inputs(device, dtype, step)
        results = [run(block, x, *turned), run(apart, x, *turned), run(exact, x.double(), *turned)]
        assert results[0][0].dtype == dtype
        assert_block_no_worse(*results, dtype)
        fp8.update_scales(block), fp8.update_scales(apart)


@pytest.mark.parametrize("mask", [True, False])
def test_a_mask(device, mask):
    block, _, exact = blocks(device)
    x = inputs(device)
    given = torch.ones(6, 6, dtype=torch.bool, device=device).tril(2) if mask else None
    assert error(block(x, mask=given), exact(x.double(), mask=given)) < 0.06


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["llama", "gpt", "olmo2"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_block_under_autocast(device, given, variant, compiled):
    """float32 parameters: what residuals add up to keeps x's dtype, as in plain PyTorch."""
    block, apart, exact = blocks(device, **VARIANTS[variant])
    turned = () if variant == "gpt" else tables(device)
    inner = torch.compile(block, fullgraph=True, backend="aot_eager") if compiled else block

    def under_autocast(model):
        def call(*args):
            with torch.autocast(device.type, torch.bfloat16):
                return model(*args)

        return call

    for step in range(2):
        x = inputs(device, given, step)
        made = run(block, x, *turned, call=under_autocast(inner))
        assert made[0].dtype == made[1].dtype == given
        of_apart = run(apart, x, *turned, call=under_autocast(apart))
        of_exact = run(exact, x.double(), *turned)
        assert_block_no_worse(made, of_apart, of_exact, torch.bfloat16)
        fp8.update_scales(block), fp8.update_scales(apart)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_casts_of_a_block(device, recipe):
    """Of inputs only the attention's result is cast by itself; of gradients those of o, down, q, k and v."""
    block, _, _ = blocks(device, recipe=recipe)
    for step in range(2):
        with count_casts() as casts:
            run(block, inputs(device, seed=step), *tables(device))
        fp8.update_scales(block)
    assert casts["cast_input"] == 1 and casts["cast_grad_output"] == 5
    assert (casts["fprop"], casts["dgrad"], casts["wgrad"]) == (7, 7, 7)


@pytest.mark.parametrize(
    "variant, recipe", [*((v, RECIPES[0]) for v in VARIANTS), *(("llama", r) for r in RECIPES[1:])], ids=str
)
def test_a_compiled_block(device, variant, recipe):
    block, _, _ = blocks(device, recipe=recipe, **VARIANTS[variant])
    twin = copy.deepcopy(block)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    turned = () if variant in ("gpt", "squared") else tables(device, head_dim=block.head_dim)
    for step in range(3):
        with count_casts() as eager:
            expected = run(block, inputs(device, seed=step), *turned)
        with count_casts() as traced:
            made = run(twin, inputs(device, seed=step), *turned, call=compiled)
        assert torch.equal(made[0], expected[0]), step
        for a, b in zip(made, expected, strict=True):  # a sum of several gradients is rounded in another order
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
        fp8.update_scales(block), fp8.update_scales(twin)
        if step and block.norm_first:  # what comes from outside of a graph is shared by nobody in it
            assert eager["cast_input"] == traced["cast_input"] == 1


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("variant", ["llama", "gpt", "olmo2"])
def test_recomputation_of_a_block(device, reentrant, variant):
    block, _, _ = blocks(device, **VARIANTS[variant])
    twin = copy.deepcopy(block)
    for step in range(3):
        expected = run(twin, inputs(device, seed=step))
        made = run(block, inputs(device, seed=step), call=lambda x: checkpoint(block, x, use_reentrant=reentrant))
        assert_same(made, expected)
        fp8.update_scales(block), fp8.update_scales(twin)
        assert_same_state(block, twin)


@pytest.mark.parametrize(
    "variant, recipe", [*((v, RECIPES[0]) for v in VARIANTS), *(("llama", r) for r in RECIPES[1:])], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # a GEMM adds no gradients of float16
def test_what_a_block_makes_again_in_backward_is_the_same(device, variant, recipe, dtype):
    block, _, _ = blocks(device, dtype, recipe=recipe, **VARIANTS[variant])
    lean, _, _ = blocks(device, dtype, recipe=recipe, recompute=True, **VARIANTS[variant])
    for step in range(3):
        for micro in range(1 + step % 2):
            x = inputs(device, dtype, seed=10 * step + micro)
            assert_same(run(lean, x), run(block, x))
        fp8.update_scales(block), fp8.update_scales(lean)
        assert_same_state(block, lean)
    leaf = inputs(device, dtype).requires_grad_()
    y = lean(leaf).square().sum()
    assert_same(*(torch.autograd.grad(y, [leaf, *lean.parameters()], retain_graph=True) for _ in range(2)))


@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_a_checkpoint_of_a_part_of_a_block_that_makes_again(device, part):
    """It counts what is saved: readers inside take nothing of a norm outside that would have to be made again."""
    block, lean = blocks(device)[0], blocks(device, recompute=True)[0]
    inner = lean.attention if part == "attention" else lean.mlp.forward
    target = lean if part == "attention" else lean.mlp
    setattr(target, "attention" if part == "attention" else "forward",
            lambda *args: checkpoint(inner, *args, use_reentrant=False))  # fmt: skip
    for step in range(3):
        x = inputs(device, seed=step)
        for a, b in zip(run(lean, x), run(block, x), strict=True):
            assert error(a, b) < 0.2  # codes of gradients fall to their neighbours
        fp8.update_scales(block), fp8.update_scales(lean)


def test_what_a_block_keeps_that_makes_again(device):
    """Codes of the attention's result, which nothing else can make."""
    kept = {}
    for recompute in (False, True):
        block, _, _ = blocks(device, recompute=recompute)
        for step in range(2):
            saved = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
                y = block(inputs(device, seed=step))
            y.sum().backward(), fp8.update_scales(block)
        kept[recompute] = {t.data_ptr() for t in saved if t.dtype.itemsize == 1 and t.numel()}
    assert (len(kept[False]), len(kept[True])) == (4 + 7, 1)


@pytest.mark.parametrize("change", ["hook", "written", "frozen weight", "no gradient of x"])
def test_readers_that_cast_keep_their_codes(device, change):
    """Where a norm's codes are not taken, or their transpose is not wanted, there is nothing to be made again."""
    block, lean = blocks(device)[0], blocks(device, recompute=True)[0]
    for model in (block, lean):
        if change == "hook":
            model.attention_norm.register_forward_hook(lambda module, args, y: y * 1)
        elif change == "written":
            model.mlp_norm.register_forward_hook(lambda module, args, made: (made[0].mul_(2), made[1]))
        elif change == "frozen weight":
            model.k_proj.weight.requires_grad_(False), model.mlp.up_proj.weight.requires_grad_(False)
        else:
            model.attention_norm.requires_grad_(False)
    for step in range(3):
        x = inputs(device, seed=step).requires_grad_(change != "no gradient of x")
        made = []
        for model in (block, lean):
            y = model(x)
            y.square().sum().backward()
            made.append([y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
            model.zero_grad()
        assert_same(*made)
        fp8.update_scales(block), fp8.update_scales(lean)
        assert_same_state(block, lean)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_of_a_block_go_on_alike(device, how):
    block, _, _ = blocks(device)
    for step in range(2):
        run(block, inputs(device, seed=step), *tables(device)), fp8.update_scales(block)
    copied = how(block)
    assert copied.attention_norm.readers == (copied.q_proj, copied.k_proj, copied.v_proj)
    for step in range(2):
        x = inputs(device, seed=10 + step)
        with count_casts() as casts:
            made = run(copied, x, *tables(device))
        assert casts["cast_input"] == 1
        assert_same(made, run(block, x, *tables(device)))
        fp8.update_scales(block), fp8.update_scales(copied)
    assert_same_state(block, copied)


def test_a_block_resumes(device):
    block, _, _ = blocks(device)
    for step in range(2):
        run(block, inputs(device, seed=step)), fp8.update_scales(block)
    resumed, _, _ = blocks(device)
    for p in resumed.parameters():
        nn.init.zeros_(p)
    resumed.load_state_dict(block.state_dict()), fp8.load_state_dict(resumed, fp8.state_dict(block))
    for _ in range(2):
        assert_same(run(resumed, inputs(device, seed=9)), run(block, inputs(device, seed=9)))
        fp8.update_scales(block), fp8.update_scales(resumed)
    assert not any("readers" in name or "fp8" in name for name in block.state_dict())


def test_an_optimizer_ends_the_step_of_a_block(device):
    block, _, _ = blocks(device)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    losses = []
    x = inputs(device)
    for _ in range(8):
        loss = (block(x) - x.flip(-1)).square().mean()
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(layer.fp8_slots[:, 3].gt(0).all() for layer in block.modules() if isinstance(layer, fp8.Linear))


@pytest.mark.parametrize("shape", [(0, 6, WIDTH), (2, 0, WIDTH)])
def test_a_block_of_no_rows(device, shape):
    block, _, _ = blocks(device)
    run(block, inputs(device)), fp8.update_scales(block)
    for _ in range(2):
        x = inputs(device, shape=shape).requires_grad_()
        block(x).sum().backward()
        assert x.grad.shape == shape and all(p.grad.eq(0).all() for p in block.parameters())
        block.zero_grad(), fp8.update_scales(block)


def test_convert_and_revert_around_a_block(device):
    block, _, exact = blocks(device)
    x = inputs(device)
    fp8.revert(block)
    assert error(block(x), exact(x.double())) < 1e-5
    fp8.convert(block, RECIPES[0], tokens=None)
    for _ in range(2):
        with count_casts() as casts:
            assert error(run(block, x)[0], exact(x.double())) < 0.06
        fp8.update_scales(block)
    assert casts["cast_grad_output"] == 5


def test_a_frozen_block(device):
    block, _, exact = blocks(device)
    fp8.freeze(block.eval())
    with torch.no_grad():
        x = inputs(device)
        assert error(block(x, *tables(device)), exact(x.double(), *tables(device))) < 0.06


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads, got 3 and 4"),
        ({"num_kv_heads": 0}, "num_kv_heads must divide num_heads, got 0 and 4"),
        ({"norm": "batch"}, "norm must be .* got 'batch'"),
        ({"activation": "swish"}, "activation must be one of silu, .*got 'swish'"),
    ],
)
def test_blocks_that_cannot_be(kwargs, words):
    with pytest.raises(ValueError, match=f"torch_fp8: {words}"):
        fp8.TransformerBlock(WIDTH, HEADS, 96, **kwargs)
    with pytest.raises(ValueError, match="torch_fp8: num_heads must divide hidden_size, got 5 and 64"):
        fp8.TransformerBlock(WIDTH, 5, 96)


def test_tables_that_are_too_short(device):
    block, _, _ = blocks(device)
    cos, sin = tables(device)
    with pytest.raises((ValueError, RuntimeError), match="torch_fp8: .*cos"):
        block(inputs(device), cos[:5], sin[:5])
    with pytest.raises((ValueError, RuntimeError, TypeError), match="torch_fp8: .*sin"):
        block(inputs(device), cos)


def test_wrong_width_of_a_block(device):
    block, _, _ = blocks(device)
    run(block, inputs(device)), fp8.update_scales(block)
    before = fp8.state_dict(block)
    with pytest.raises(RuntimeError, match=r"torch_fp8: gain must have shape \[63\]"):
        block(inputs(device)[..., :63])
    for name, value in fp8.state_dict(block).items():
        assert torch.equal(value, before[name]), name
