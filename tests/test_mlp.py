"""An MLP in one piece against float64, and against the same layers one after the other."""

import copy
import pickle

import pytest
import torch
import torch_fp8 as fp8
from casts import count_casts
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch_fp8.layers.linear import linear_layer
from torch_fp8.layers.mlp import mlp, xielu_alphas

HIDDEN, WIDE = 32, 48
EXACT = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu_squared": lambda x: F.relu(x).square(),
    "xielu": lambda x, p, n: torch.where(x > 0, p * x * x, n * (torch.expm1(x.clamp(max=0)) - x)) + 0.5 * x,
}
RECIPES = [
    fp8.DelayedScaling(amax_history_len=3),
    fp8.DelayedScaling(fp8_format="E4M3", margin=1, power_of_two=True),
    fp8.CurrentScaling(power_of_two=True, grad_margin=3),
    fp8.ConstantScaling(bias=2, grad_margin=1),
]


class Apart(fp8.MLP):
    """The layers one after the other, with the residual added after."""

    def forward(self, x, residual=None):
        y = self.down_proj(self.product(x))
        return y if residual is None else residual + y

    def product(self, x):
        f, alphas = EXACT[self.activation], ()
        if self.activation == "xielu":
            alphas = F.softplus(self.alpha_p), 0.5 + F.softplus(self.alpha_n)
        gate, up = self.factors(x)
        return f(gate, *alphas) * up

    def factors(self, x):
        return (self.gate_proj(x), self.up_proj(x)) if hasattr(self, "gate_proj") else (self.up_proj(x), 1)


class OneLayer(fp8.MLP):
    """One layer makes gate and up, as fuse finds it in other people's models."""

    def __init__(self, hidden, wide, *, halves, bias=False, recipe=None, device=None, dtype=None, **kwargs):
        of_layers = {"bias": bias, "recipe": recipe, "device": device, "dtype": dtype}
        super().__init__(hidden, wide, gated=False, **of_layers, **kwargs)
        self.up_proj = fp8.Linear(hidden, 2 * wide, **of_layers)
        self.up_proj.fp8_state.keep_codes(not self.down_proj.fp8_state.recompute)
        self.halves = halves

    def forward(self, x, residual=None):
        alphas = xielu_alphas(self.alpha_p, self.alpha_n, 0.5) if self.activation == "xielu" else None
        layers = None, self.up_proj, self.down_proj
        return mlp(x, *layers, self.activation, residual, alphas=alphas, halves=self.halves)


class OneLayerApart(Apart):
    def factors(self, x):
        return self.up_proj(x).chunk(2, -1)[:: 1 if self.halves == 1 else -1]


ONE_LAYER = {"gate first": 1, "up first": 2}
GATED = [True, False, *ONE_LAYER]


def twins(device, dtype=torch.float32, hidden=HIDDEN, wide=WIDE, gated=True, **kwargs):
    """An MLP, its copy that runs layer by layer, and its copy in float64 and nn.Linear."""
    torch.manual_seed(0)
    kwargs.setdefault("recipe", RECIPES[0])
    kwargs.update({"halves": ONE_LAYER[gated]} if gated in ONE_LAYER else {"gated": gated})
    model = (OneLayer if gated in ONE_LAYER else fp8.MLP)(hidden, wide, device=device, dtype=dtype, **kwargs)
    apart = copy.deepcopy(model)
    apart.__class__ = OneLayerApart if gated in ONE_LAYER else Apart
    exact = fp8.revert(copy.deepcopy(apart)).double()
    return model, apart, exact


def layers(model):
    return list(model.children())


def run(model, x, residual=None, loss=lambda y: y.square().mean(), call=None):
    """Result and gradients: of x, of the residual, of every parameter; zeros where there is none."""
    leaves = [None if t is None else t.clone().requires_grad_() for t in (x, residual)]
    y = (model if call is None else call)(*leaves)
    loss(y.float() if y.dtype != torch.float64 else y).backward()
    tensors = [t for t in leaves if t is not None] + list(model.parameters())
    made = [y.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad.clone() for t in tensors)]
    model.zero_grad()
    return made


def error(made, exact):
    exact = exact.double()
    return ((made.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def assert_no_worse(made, apart, exact, dtype, spread=1.1):
    """Than the layers one after the other; a rounding of the dtype aside. Two samples of rounding errors in tiny
    tensors differ by a tenth from step to step, and hardly on average."""
    errors = torch.tensor([[error(t, e) for t in pair] for *pair, e in zip(made, apart, exact, strict=True)])
    rounding = torch.finfo(dtype).eps
    # One number's error, as of the gradients of xielu's factors, may be small by chance.
    chance = torch.tensor([0.05 if t.numel() == 1 else 0.0 for t in made])
    assert (errors[:, 0] <= 1.3 * errors[:, 1] + rounding + chance).all(), errors
    errors = errors[chance == 0]
    assert errors[:, 0].mean() <= spread * errors[:, 1].mean() + rounding, errors


def assert_states(model, apart):
    """What reads x, and weights, to the bit; what is made in between within what a code of the product makes of it."""
    for one, other in zip(layers(model), layers(apart), strict=True):
        for role in range(3):
            exact = role == 1 or (role == 0 and one is not model.down_proj)
            if role == 2 and not other.fp8_state.has_history[2]:
                continue  # alone, the layer would need no gradient; in one piece its amax comes with the other's
            for a, b in ((one.fp8_slots, other.fp8_slots), (one.fp8_history, other.fp8_history)):
                if exact:
                    assert torch.equal(a[role], b[role]), role
                else:
                    torch.testing.assert_close(a[role], b[role], rtol=0.15, atol=0)


def inputs(device, dtype=torch.float32, shape=(2, 12, HIDDEN), residual=True, seed=1):
    torch.manual_seed(seed)
    x = torch.randn(shape, device=device).to(dtype)
    return (x, torch.randn(shape, device=device).to(dtype)) if residual else (x,)


@pytest.mark.parametrize("gated", GATED)
@pytest.mark.parametrize("activation", EXACT)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("with_all", [True, False])
def test_errors_are_no_larger_than_those_of_the_layers(device, gated, activation, dtype, with_all):
    """with_all: with biases and a residual."""
    model, apart, exact = twins(device, dtype, gated=gated, activation=activation, bias=with_all)
    for step in range(3):
        given = inputs(device, dtype, residual=with_all, seed=step)
        made, of_apart = run(model, *given), run(apart, *given)
        of_exact = run(exact, *(t.double() for t in given))
        assert made[0].dtype == dtype
        # Of squares a few large elements decide, and so does their rounding.
        assert_no_worse(made, of_apart, of_exact, dtype, 1.25 if activation == "relu_squared" else 1.1)
        assert step > 0 or error(made[0], of_exact[0]) < 0.15  # later, delayed scales may saturate the product, in both
        fp8.update_scales(model), fp8.update_scales(apart)
        assert_states(model, apart)


@pytest.mark.parametrize("gated", GATED)
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_recipes(device, gated, recipe):
    model, apart, exact = twins(device, recipe=recipe, gated=gated, bias=True)
    for step in range(4):
        for micro in range(1 + step % 3):
            given = inputs(device, seed=10 * step + micro)
            made, of_apart, of_exact = run(model, *given), run(apart, *given), run(exact, *(t.double() for t in given))
            assert_no_worse(made, of_apart, of_exact, torch.float32)
        fp8.update_scales(model), fp8.update_scales(apart)
        assert_states(model, apart)


@pytest.mark.parametrize("gated", GATED)
@pytest.mark.parametrize("hidden, wide, rows", [(17, 33, 61), (40, 24, 64), (8, 250, 99), (33, 7, 130)])
def test_odd_widths(device, gated, hidden, wide, rows):
    model, apart, exact = twins(device, torch.bfloat16, hidden, wide, gated=gated, bias=True)
    for step in range(2):
        given = inputs(device, torch.bfloat16, (rows, hidden), seed=step)
        assert_no_worse(
            run(model, *given), run(apart, *given), run(exact, *(t.double() for t in given)), torch.bfloat16
        )
        fp8.update_scales(model), fp8.update_scales(apart)
        assert_states(model, apart)


@pytest.mark.parametrize("gated", GATED)
@pytest.mark.parametrize("shape", [(0, HIDDEN), (2, 0, HIDDEN)])
def test_no_rows(device, gated, shape):
    model, apart, _ = twins(device, gated=gated, bias=True)
    run(model, *inputs(device)), run(apart, *inputs(device))
    fp8.update_scales(model), fp8.update_scales(apart)
    for _ in range(2):
        made = run(model, *inputs(device, shape=shape), loss=torch.Tensor.sum)
        for a, b in zip(made, run(apart, *inputs(device, shape=shape), loss=torch.Tensor.sum), strict=True):
            assert torch.equal(a, b)
        fp8.update_scales(model), fp8.update_scales(apart)
        assert_states(model, apart)


@pytest.mark.parametrize("gated", [True, "gate first"])
def test_strides_of_input_residual_and_gradient(device, gated):
    model, apart, exact = twins(device, gated=gated)
    x, residual = (t.transpose(0, 1) for t in inputs(device, shape=(12, 2, HIDDEN)))
    weight = torch.randn(HIDDEN, device=device)

    def loss(y):
        return (y * weight.to(y.dtype)).sum(-1).sum()  # its gradient is an expanded tensor

    for _ in range(2):
        results = [
            run(m, x.to(d), residual.to(d), loss)
            for m, d in ((model, x.dtype), (apart, x.dtype), (exact, torch.double))
        ]
        assert_no_worse(*results, torch.float32)
        fp8.update_scales(model), fp8.update_scales(apart)


FROZEN = [["gate_proj"], ["up_proj"], ["down_proj"], ["gate_proj", "up_proj"], ["gate_proj", "down_proj"],
          ["gate_proj", "up_proj", "down_proj"]]  # fmt: skip


@pytest.mark.parametrize("of", ["weight", "bias", ""])
@pytest.mark.parametrize(
    "gated, names",
    [*((True, names) for names in FROZEN), *(("up first", [name]) for name in ("up_proj", "down_proj"))],
    ids=str,
)
@pytest.mark.parametrize("x_grad", [True, False])
@pytest.mark.parametrize("residual_grad", [True, False, None])
def test_only_some_gradients_are_wanted(device, of, gated, names, x_grad, residual_grad):
    model, apart, _ = twins(device, bias=True, gated=gated)
    for m in (model, apart):
        for name in names:
            for parameter, p in m.get_submodule(name).named_parameters():
                p.requires_grad_(not parameter.startswith(of))
    for step in range(3):
        results = []
        x, residual = inputs(device, seed=step)
        for m in (model, apart):
            leaf, added = x.clone().requires_grad_(x_grad), residual.clone().requires_grad_(bool(residual_grad))
            y = m(leaf, None if residual_grad is None else added)
            assert y.requires_grad == (x_grad or bool(residual_grad) or any(p.requires_grad for p in m.parameters()))
            if y.requires_grad:
                y.square().mean().backward()
            results.append([y.detach(), leaf.grad, added.grad, *(p.grad for p in m.parameters())])
            m.zero_grad()
            fp8.update_scales(m)
        for a, b in zip(*results, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert error(a, b) < 0.08  # another code of the product now and then
        assert_states(model, apart)


@pytest.mark.parametrize("compiled", [False, True])
def test_only_the_factors_of_xielu_are_trained(device, compiled):
    model, apart, _ = twins(device, activation="xielu")
    for m in (model, apart):
        for layer in layers(m):
            layer.requires_grad_(False)
    call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    for step in range(2):
        x = inputs(device, residual=False, seed=step)[0]
        for m, forward in ((model, call), (apart, apart)):
            forward(x).square().mean().backward()
            fp8.update_scales(m)
        for name in ("alpha_p", "alpha_n"):
            torch.testing.assert_close(getattr(model, name).grad, getattr(apart, name).grad, rtol=0.1, atol=0)
        model.zero_grad(), apart.zero_grad()


def test_gradients_of_some_are_asked_for(device):
    """torch.autograd.grad wants fewer than the forward provided for."""
    model, apart, _ = twins(device, bias=True)
    x, residual = inputs(device)
    for m in (model, apart):
        m.leaves = x.clone().requires_grad_(), residual.clone().requires_grad_()
    wanted = [lambda m, i=i: [[*m.leaves, *m.parameters()][i]] for i in range(2 + 6)]
    wanted += [lambda m: [m.leaves[0], m.down_proj.weight], lambda m: [m.gate_proj.weight, m.up_proj.bias]]
    outs = [m(*m.leaves) for m in (model, apart)]
    everything = torch.autograd.grad(outs[0].square().mean(), [*model.leaves, *model.parameters()], retain_graph=True)
    everything = dict(zip([*map(id, model.leaves), *map(id, model.parameters())], everything))
    for choose in wanted:
        asked = choose(model)
        for p, grad in zip(asked, torch.autograd.grad(outs[0].square().mean(), asked, retain_graph=True)):
            torch.testing.assert_close(grad, everything[id(p)], rtol=1e-5, atol=1e-6)  # biases: another order of sums
        for a, b in zip(
            torch.autograd.grad(outs[0].square().mean(), asked, retain_graph=True),
            torch.autograd.grad(outs[1].square().mean(), choose(apart), retain_graph=True),
        ):
            assert error(a, b) < 0.08


@pytest.mark.parametrize("gated", [True, "gate first"])
@pytest.mark.parametrize("how", ["no_grad", "eval", "eval with gradients"])
def test_inference_records_nothing(device, gated, how):
    model, apart, exact = twins(device, bias=True, gated=gated)
    for m in (model, apart):
        run(m, *inputs(device)), fp8.update_scales(m)
    before = fp8.state_dict(model)
    if how != "no_grad":
        model.eval(), apart.eval()
    given = [10 * t for t in inputs(device)]
    if how == "eval with gradients":
        results = [run(m, *given) for m in (model, apart)] + [run(exact, *(t.double() for t in given))]
        assert_no_worse(*results, torch.float32)
    else:
        with torch.no_grad():
            a, b = model(*given), apart(*given)
        assert not a.requires_grad and error(a, b) < 0.08
    for name, value in fp8.state_dict(model).items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", GATED)
def test_autocast(device, parameters, given, gated):
    model, apart, exact = twins(device, parameters, bias=True, gated=gated)
    for step in range(3):
        x, residual = inputs(device, seed=step)
        x, residual = x.to(given), residual.bfloat16()

        def under_autocast(m, *leaves):
            with torch.autocast(device.type, torch.bfloat16):
                return m(*leaves)

        results = [run(m, x, residual, call=lambda *t, m=m: under_autocast(m, *t)) for m in (model, apart)]
        assert [t.dtype for t in results[0]] == [t.dtype for t in results[1]]
        assert results[0][0].dtype == torch.bfloat16
        assert_no_worse(*results, run(exact, x.double(), residual.double()), torch.bfloat16)
        fp8.update_scales(model), fp8.update_scales(apart)
        assert_states(model, apart)


@pytest.mark.parametrize("gated", [True, "gate first"])
def test_float32_parameters_with_16_bit_input(device, gated):
    model, apart, exact = twins(device, gated=gated)
    for step in range(2):
        given = inputs(device, torch.bfloat16, seed=step)
        results = [run(m, *given) for m in (model, apart)]
        assert [t.dtype for t in results[0]] == [t.dtype for t in results[1]]
        assert_no_worse(*results, run(exact, *(t.double() for t in given)), torch.bfloat16)
        fp8.update_scales(model), fp8.update_scales(apart)


@pytest.mark.parametrize("gated", [True, "gate first"])
@pytest.mark.parametrize("dummy", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_in_place(device, gated, dummy, compiled):
    model, apart, _ = twins(device, bias=True, gated=gated)
    call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    for m in (model, apart):
        for layer in layers(m):
            layer.fuse_main_grad = True
            layer.weight.main_grad = torch.zeros(layer.weight.shape, dtype=torch.float32, device=device)
            if dummy:
                layer.weight.grad_added_to_main_grad = False
    for step in range(3):
        for micro in range(2):
            given = inputs(device, seed=10 * step + micro)
            run(model, *given, call=call), run(apart, *given)
        for one, other in zip(layers(model), layers(apart)):
            assert one.weight.main_grad.any() and error(one.weight.main_grad, other.weight.main_grad) < 0.08
            assert not dummy or one.weight.grad_added_to_main_grad
        fp8.update_scales(model), fp8.update_scales(apart)
        assert_states(model, apart)


@pytest.mark.parametrize("gated", [True, "gate first"])
def test_two_forwards_in_flight(device, gated):
    """Each backward finds what its own forward made."""
    model, _, _ = twins(device, gated=gated)
    run(model, *inputs(device)), fp8.update_scales(model)
    batches = [inputs(device, seed=seed) for seed in (5, 6, 7)]
    expected = [run(model, *given) for given in batches]
    leaves = [[t.clone().requires_grad_() for t in given] for given in batches]
    outs = [model(*given) for given in leaves]
    for i in (1, 0, 2):
        outs[i].square().mean().backward()
        for a, b in zip([outs[i], *(t.grad for t in leaves[i]), *(p.grad for p in model.parameters())], expected[i]):
            assert torch.equal(a, b)
        model.zero_grad()


@pytest.mark.parametrize("gated", GATED)
def test_backward_twice(device, gated):
    model, _, _ = twins(device, gated=gated, bias=True)
    run(model, *inputs(device)), fp8.update_scales(model)
    x = inputs(device)[0].requires_grad_()
    y = model(x, x).square().mean()
    asked = [x, *model.parameters()]
    first, second = (torch.autograd.grad(y, asked, retain_graph=True) for _ in range(2))
    for a, b in zip(first, second):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match=r"torch_fp8: .*create_graph=True.*torch_fp8.disabled"):
        torch.autograd.grad(y, asked, create_graph=True)


def test_siblings_outside_of_the_mlp(device):
    """A third layer reads x together with gate and up, before or after the MLP; x has other readers too."""
    results = []
    for apart in (False, True):
        torch.manual_seed(0)
        model = fp8.MLP(HIDDEN, WIDE, device=device)
        if apart:
            model.__class__ = Apart
        beside = fp8.Linear(HIDDEN, 16, device=device)
        fp8.share_input([model.gate_proj, model.up_proj, beside])
        every = nn.ModuleList([model, beside])
        for step in range(4):
            leaf = inputs(device, seed=step)[0].requires_grad_()
            x = leaf * 1
            seen = []
            x.register_hook(lambda g, seen=seen: seen.append(g.clone()))
            first = beside(x).square().sum() if step % 2 else 0
            loss = first + x.sin().sum() + model(x).square().mean() + (0 if step % 2 else beside(x).square().sum())
            loss.backward()
            results.append([leaf.grad, seen[0], *(p.grad.clone() for p in every.parameters())])
            every.zero_grad()
            fp8.update_scales(every)
    for one, other in zip(results[:4], results[4:], strict=True):
        for a, b in zip(one, other, strict=True):
            assert error(a, b) < 0.05


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("gated, gemms", [(True, 3), ("gate first", 2)])
def test_one_cast_of_the_input_and_none_of_the_product(device, recipe, gated, gemms):
    model, _, _ = twins(device, recipe=recipe, bias=True, gated=gated)
    for step in range(3):
        with count_casts() as casts:
            run(model, *inputs(device, seed=step))
        assert casts["cast_input"] == 1, step
        assert casts["cast_grad_output"] == 1
        assert (casts["fprop"], casts["dgrad"], casts["wgrad"]) == (gemms, gemms, gemms)
        fp8.update_scales(model)


@pytest.mark.parametrize("gated", GATED)
@pytest.mark.parametrize("activation", ["silu", "xielu"])
def test_what_is_made_again_in_backward_is_the_same(device, gated, activation):
    model, _, _ = twins(device, gated=gated, bias=True, activation=activation)
    again, _, _ = twins(device, gated=gated, bias=True, recompute=True, activation=activation)
    for step in range(3):
        for micro in range(1 + step):
            given = inputs(device, seed=10 * step + micro)
            for a, b in zip(run(model, *given), run(again, *given), strict=True):
                assert torch.equal(a, b), step
        fp8.update_scales(model), fp8.update_scales(again)
        for (name, a), b in zip(fp8.state_dict(model).items(), fp8.state_dict(again).values(), strict=True):
            assert torch.equal(a, b), (step, name)


# ---- who runs apart -------------------------------------------------------------------------------------------------


def runs_in_one_piece(model, *given):
    with count_casts() as casts:
        run(model, *given)
    return casts["cast_grad_output"] == 1


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_see_their_layers_call(device, name, kind):
    model, _, _ = twins(device)
    given = inputs(device)
    assert runs_in_one_piece(model, *given)
    seen = []
    layer = model.get_submodule(name)
    handle = getattr(layer, f"register_{kind}_hook")(lambda module, *args: seen.append(module))
    assert not runs_in_one_piece(model, *given) and seen == [layer]
    handle.remove()
    assert runs_in_one_piece(model, *given) and seen == [layer]


def test_a_global_hook_sees_all_layers(device):
    model, _, _ = twins(device)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *args: seen.append(module))
    try:
        run(model, *inputs(device))
    finally:
        handle.remove()
    assert seen == [*layers(model), model]


@pytest.mark.parametrize("change", ["forward", "disabled", "eval", "recipe", "plain", "frozen", "fp8_gemms"])
@pytest.mark.parametrize("activation", ["silu", "xielu"])
def test_what_cannot_run_in_one_piece_runs_apart(device, change, activation):
    model, _, exact = twins(device, activation=activation)
    up, seen = model.up_proj, []
    if change == "forward":
        up.forward = lambda x, forward=up.forward: seen.append(x) or forward(x)
    elif change == "disabled":
        up.fp8_enabled = False
    elif change == "eval":
        up.eval()
    elif change == "recipe":
        model.up_proj = fp8.Linear(HIDDEN, WIDE, False, device, recipe=fp8.CurrentScaling())
        model.up_proj.weight.data.copy_(up.weight)
    elif change == "plain":
        fp8.revert(up)
    elif change == "frozen":
        fp8.freeze(up)
    else:
        recipe = fp8.DelayedScaling(fp8_gemms=("fprop", "dgrad"))
        model, _, exact = twins(device, recipe=recipe, activation=activation)
    given = inputs(device)
    for _ in range(2):
        made, of_exact = run(model, *given), run(exact, *(t.double() for t in given))
        assert error(made[0], of_exact[0]) < 0.1 and error(made[1], of_exact[1]) < 0.25
        fp8.update_scales(model)
    assert len(seen) == (2 if change == "forward" else 0)


@pytest.mark.parametrize("gated", [True, "gate first"])
def test_disabled_is_the_model_in_16_bits(device, gated):
    model, apart, _ = twins(device, torch.bfloat16, gated=gated)
    plain = fp8.revert(copy.deepcopy(apart))
    with fp8.disabled(model):
        for a, b in zip(run(model, *inputs(device, torch.bfloat16)), run(plain, *inputs(device, torch.bfloat16))):
            assert torch.equal(a, b)


# ---- compiled -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("gated", GATED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compiled(device, recipe, gated, dtype):
    model, _, _ = twins(device, dtype, recipe=recipe, gated=gated, bias=True)
    traced = copy.deepcopy(model)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    for step in range(3):
        for micro in range(2):
            given = inputs(device, dtype, seed=10 * step + micro)
            for a, b in zip(run(model, *given), run(traced, *given, call=compiled), strict=True):
                assert torch.equal(a, b), step
        fp8.update_scales(model), fp8.update_scales(traced)
        for (name, a), b in zip(fp8.state_dict(model).items(), fp8.state_dict(traced).values(), strict=True):
            assert torch.equal(a, b), (step, name)


@pytest.mark.parametrize("activation", EXACT)
@pytest.mark.parametrize(
    "gated, frozen",
    [(True, ["gate_proj"]), (True, ["up_proj", "down_proj"]), (True, ["gate_proj", "up_proj"]),
     ("up first", ["up_proj"]), ("gate first", ["down_proj"])],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("x_grad", [True, False])
def test_compiled_with_frozen_weights(device, activation, gated, frozen, x_grad):
    model, _, _ = twins(device, activation=activation, bias=True, gated=gated)
    for name in frozen:
        model.get_submodule(name).weight.requires_grad_(False)
    model.up_proj.bias.requires_grad_(False)
    traced = copy.deepcopy(model)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    for step in range(2):
        for m, call in ((model, model), (traced, compiled)):
            m.leaf = inputs(device, seed=step)[0].requires_grad_(x_grad)
            m.out = call(m.leaf)
            m.out.square().mean().backward()
            fp8.update_scales(m)
        assert torch.equal(model.out, traced.out)
        for a, b in zip([model.leaf, *model.parameters()], [traced.leaf, *traced.parameters()]):
            assert (a.grad is None) == (b.grad is None) and (a.grad is None or torch.equal(a.grad, b.grad))


@pytest.mark.parametrize("gated", [True, "gate first"])
@pytest.mark.parametrize("how", ["no_grad", "eval", "autocast"])
def test_compiled_in_other_modes(device, gated, how):
    model, _, _ = twins(device, bias=True, gated=gated)
    run(model, *inputs(device)), fp8.update_scales(model)
    model.train(how != "eval")
    traced = copy.deepcopy(model)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    x, residual = inputs(device)
    if how == "autocast":
        residual = residual.bfloat16()
    with torch.set_grad_enabled(how != "no_grad"), torch.autocast(device.type, torch.bfloat16, how == "autocast"):
        a, b = model(x, residual), compiled(x, residual)
    assert torch.equal(a, b)
    if how != "no_grad":
        a.float().square().mean().backward(), b.float().square().mean().backward()
        for p, q in zip(model.parameters(), traced.parameters()):
            assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("gated", [True, "up first"])
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_autograd(device, gated, recompute):
    model, _, _ = twins(device, gated=gated, recompute=recompute)
    run(model, *inputs(device)), fp8.update_scales(model)
    expected = run(model, *inputs(device))[3:]
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        model(*inputs(device)).square().mean().backward()
    for p, e in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, e, rtol=1e-3, atol=1e-3 * e.abs().max().item())


# ---- around it ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [True, "gate first"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation(device, gated, reentrant):
    model, _, _ = twins(device, bias=True, gated=gated)
    twin = copy.deepcopy(model)
    for step in range(3):
        given = inputs(device, seed=step)
        expected = run(twin, *given)
        made = run(model, *given, call=lambda *t: checkpoint(model, *t, use_reentrant=reentrant))
        for a, b in zip(made, expected, strict=True):
            assert torch.equal(a, b)
        fp8.update_scales(model), fp8.update_scales(twin)
        for (name, a), b in zip(fp8.state_dict(model).items(), fp8.state_dict(twin).values(), strict=True):
            assert torch.equal(a, b), name


def test_an_optimizers_step_ends_that_of_the_layers(device):
    model, _, _ = twins(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(*inputs(device)).square().mean().backward()
        optimizer.step(), optimizer.zero_grad()
    assert all(layer.fp8_slots[:, 3].eq(2).all() for layer in layers(model))


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_weights_are_cast_once_a_step(device, micro_batches):
    model, _, _ = twins(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        with count_casts() as casts:
            for micro in range(micro_batches):
                model(*inputs(device, seed=micro)).square().mean().backward()
            optimizer.step(), optimizer.zero_grad()
    assert casts["cast_weight"] == 3


def test_a_weight_that_was_written_to_is_cast_again(device):
    model, _, _ = twins(device)
    for _ in range(2):
        for _ in range(2):
            run(model, *inputs(device))
        fp8.update_scales(model)
    run(model, *inputs(device))
    with torch.no_grad():
        model.down_proj.weight.mul_(64)
    made = run(model, *inputs(device))
    exact = fp8.revert(copy.deepcopy(model)).double()
    exact.__class__ = Apart
    assert error(made[0], run(exact, *(t.double() for t in inputs(device)))[0]) < 0.1


@pytest.mark.parametrize("gated", [True, "gate first"])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_go_on_alike_and_by_themselves(device, gated, how):
    model, _, _ = twins(device, bias=True, gated=gated)
    run(model, *inputs(device)), fp8.update_scales(model)
    copied = how(model)
    before = fp8.state_dict(model)
    made = run(copied, *inputs(device))
    for name, value in fp8.state_dict(model).items():
        assert torch.equal(value, before[name])
    for a, b in zip(made, run(model, *inputs(device)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("gated", [True, False])
def test_the_state_dict_is_that_of_plain_layers(gated):
    model = fp8.MLP(HIDDEN, WIDE, bias=True, gated=gated)
    names = ["gate_proj", "up_proj", "down_proj"][not gated :]
    assert list(model.state_dict()) == [f"{name}.{p}" for name in names for p in ("weight", "bias")]
    twin = fp8.MLP(HIDDEN, WIDE, bias=True, gated=gated)
    twin.load_state_dict(model.state_dict(), strict=True)
    fp8.revert(twin)
    assert not any(isinstance(m, fp8.Linear) for m in twin.modules()) and list(twin.state_dict()) == list(
        model.state_dict()
    )


def test_revert_and_convert_around_it(device):
    model, apart, exact = twins(device)
    given = inputs(device)
    fp8.revert(model)
    made, expected = run(model, *given), run(exact, *(t.double() for t in given))
    assert error(made[0], expected[0]) < 1e-5
    fp8.convert(model, RECIPES[0], tokens=None)
    for _ in range(2):
        with count_casts() as casts:
            a, b = run(model, *given), run(apart, *given)
        assert error(a[0], b[0]) < 0.05
        fp8.update_scales(model), fp8.update_scales(apart)
    assert runs_in_one_piece(model, *given)
    assert casts["cast_input"] == 3  # one of x; two of the layers apart


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_one_piece", [True, False])
@pytest.mark.parametrize(
    "change, error_type, words",
    [
        (
            lambda r: r[..., :-1],
            RuntimeError,
            r"residual must have the output's shape \[2, 12, 32\], got \[2, 12, 31\]",
        ),
        (lambda r: r[:1], RuntimeError, r"residual must have the output's shape \[2, 12, 32\], got \[1, 12, 32\]"),
        (lambda r: r.bfloat16(), TypeError, "the residual is .*[bB][fF]loat16 but the output is .*; cast it"),
    ],
)
def test_a_residual_that_does_not_fit(device, in_one_piece, change, error_type, words):
    model, _, _ = twins(device)
    run(model, *inputs(device)), fp8.update_scales(model)
    if not in_one_piece:
        model.up_proj.register_forward_hook(lambda *args: None)
    before = fp8.state_dict(model)
    x, residual = inputs(device)
    with pytest.raises(error_type, match=f"torch_fp8: .*{words}"):
        model(x, change(residual))
    for name, value in fp8.state_dict(model).items():
        assert torch.equal(value, before[name]), name


def test_other_bad_input(device):
    with pytest.raises(ValueError, match="torch_fp8: activation must be one of silu, gelu, gelu_tanh.*, got 'swish'"):
        fp8.MLP(HIDDEN, WIDE, activation="swish")
    model, _, _ = twins(device)
    before = fp8.state_dict(model)
    with pytest.raises(RuntimeError, match="torch_fp8: .*in_features = 32"):
        model(torch.randn(3, 31, device=device))
    with pytest.raises(TypeError, match="torch_fp8: the input must be"):
        model(torch.randn(3, HIDDEN, device=device).to(torch.float64))
    layers = [linear_layer(layer) for layer in (model.up_proj, model.gate_proj, model.down_proj)]
    for up, halves, words in [(layers[1], 1, "by halves gate is up"), (None, 2, "have half of gate's 48 outputs as")]:
        with pytest.raises((ValueError, RuntimeError), match=f"torch_fp8: .*{words}"):
            fp8._C.mlp(inputs(device)[0], None, layers[0], up, layers[2], "silu", halves=halves)
    model.down_proj = fp8.Linear(WIDE + 1, HIDDEN, False, device, recipe=RECIPES[0])
    with pytest.raises(RuntimeError, match=r"torch_fp8: down must have gate's 48 outputs as inputs, got .*\[32, 49\]"):
        model(*inputs(device))
    for name, value in fp8.state_dict(model).items():
        assert name.startswith("down_proj") or torch.equal(value, before[name]), name
