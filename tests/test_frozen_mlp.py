"""frozen_mlp and the fused MLP over frozen layers: the product cast as it is made, against float64, and against the
layers one by one wherever nothing is cast so."""

import copy

import pytest
import torch
import torch_fp8 as fp8
from oracle import E4M3, OUTPUT, OUTPUT_SUBNORMAL, accumulation, codes, exact_scale, quantised, weight_of
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch_fp8.layers.mlp import mlp

ops = torch.ops.torch_fp8
NONE, STATIC, TENSOR, TOKEN = range(4)
FUNCTIONS = {
    0: F.silu, 1: F.gelu, 2: lambda x: F.gelu(x, approximate="tanh"), 4: lambda x: F.relu(x).square(),
}  # fmt: skip
RELATIVE = 4e-6  # of float32 arithmetic with a GPU's fast exp, and of a scale that is made of it
SLOT = torch.tensor([[1 / 16, 16.0, 0.0, 0.0]])


def layers_of(k, inner, n, kind, activations, device, gated=True, dtype=torch.bfloat16, bias=True):
    """(weight, scale, bias, slot) of gate, up and down, and down's weight in float64."""
    made = []
    for out, width in [(inner, k)] * (2 if gated else 1) + [(n, inner)]:
        weight, scale, exact = weight_of(out, width, kind)
        b = torch.randn(out).to(dtype) if bias else None
        slot = SLOT if len(made) != 1 or not gated else torch.tensor([[1 / 64, 64.0, 0.0, 0.0]])
        made.append([weight, scale, b, slot.clone() if activations == STATIC else None])
    return [[None if t is None else t.to(device) for t in layer] for layer in made], exact


def fused(x, layers, function, activations, dtype=None):
    return ops.frozen_mlp(x, *(list(part) for part in zip(*layers, strict=True)), function, activations, dtype)


def one_by_one(x, layers, function, activations):
    into = [ops.frozen_linear(x, *layer, activations) for layer in layers[:-1]]
    product = FUNCTIONS[function](into[0]) * into[1] if len(into) == 2 else FUNCTIONS[function](into[0])
    return ops.frozen_linear(product, *layers[-1], activations)


def seen_by_down(product, activations):
    """The product in float64 after its way through FP8."""
    if activations == STATIC:
        return codes(product.float(), SLOT[0, 1].item(), E4M3).view(E4M3).double() * SLOT[0, 0].double()
    return torch.stack([quantised(row, exact_scale(row.abs().max().item(), E4M3), E4M3) for row in product])


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activations", [TOKEN, STATIC])
@pytest.mark.parametrize("kind", ["tensor", "channel"])
@pytest.mark.parametrize(
    ("m", "inner", "dtype"),
    [
        (17, 144, torch.bfloat16),
        (33, 136, torch.float16),  # rows of the codes are longer than those of the product
        (300, 24, torch.float32),
    ],
)
def test_against_float64(device, m, inner, dtype, kind, activations, gated, function):
    check(device, m, inner, dtype, kind, activations, gated, function)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("inner", [8000, 16400])  # in the registers of a block of threads, and more than they hold
def test_long_rows(device, inner, gated):
    check(device, 18, inner, torch.bfloat16, "channel", TOKEN, gated, function=0)


@pytest.mark.parametrize("activations", [TOKEN, STATIC])
@pytest.mark.parametrize("inner", [136, 1536])
def test_gate_and_up_of_one_layer(device, inner, activations):
    check(device, 40, inner, torch.bfloat16, "channel", activations, True, function=0, packed=True)
    layers, _ = layers_of(64, inner, 48, "channel", activations, device)
    layers = [packed_layer(*layers[:2]), layers[2]]
    few = torch.randn(2, 4, 64, device=device).bfloat16()
    gate, up = ops.frozen_linear(few, *layers[0], activations).chunk(2, -1)
    assert torch.equal(
        fused(few, layers, 0, activations), ops.frozen_linear(F.silu(gate) * up, *layers[1], activations)
    )


def packed_layer(gate, up):
    return [*(torch.cat(both) for both in zip(gate[:3], up[:3], strict=True)), gate[3]]


def check(device, m, inner, dtype, kind, activations, gated, function, packed=False):
    k, n = 64, 48
    layers, weight = layers_of(k, inner, n, kind, activations, device, gated, dtype)
    x = torch.randn(m, k).to(dtype).to(device)
    if packed:
        layers = [packed_layer(*layers[:2]), layers[2]]
        x = x.view(2, m // 2, k)
    y = fused(x, layers, function, activations)
    x, y = x.view(m, k), y.view(m, n)
    assert y.dtype == dtype
    into = [ops.frozen_linear(x, *layer, activations).cpu().double() for layer in layers[:-1]]
    into = into[0].chunk(2, -1) if packed else into
    product = FUNCTIONS[function](into[0]) * (into[1] if gated else 1)
    seen = seen_by_down(product, activations)
    b = layers[-1][2].cpu().double()
    expected = seen @ weight.T + b
    size = seen.abs() @ weight.abs().T + b.abs()
    # Where float32's rounding decides, a code is its neighbour.
    low, high = (seen_by_down(product * (1 + e), activations) for e in (-RELATIVE, RELATIVE))
    beside = (high - low).abs() @ weight.abs().T
    bound = OUTPUT[dtype] * expected.abs() + OUTPUT_SUBNORMAL[dtype] + accumulation(device, inner) * size + beside
    assert ((y.cpu().double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    ("m", "inner", "kind", "activations"),
    [
        (1, 144, "channel", TOKEN),
        (16, 144, "channel", STATIC),
        (12, 8256, "channel", TOKEN),  # quantised for gate and up alone, whose outputs are many
        (40, 140, "tensor", TOKEN),  # no packs of 8
        (40, 256, "block", TOKEN),
        (40, 256, "block", STATIC),
        (40, 144, "channel", TENSOR),
        (40, 144, "tensor", NONE),
        (0, 144, "channel", TOKEN),
    ],
)
def test_what_is_not_cast_as_it_is_made(device, m, inner, kind, activations, gated):
    layers, _ = layers_of(128, inner, 48, kind, activations, device, gated)
    x = torch.randn(2, m, 128, device=device).bfloat16()[:1].transpose(0, 1)
    for function in FUNCTIONS:
        assert torch.equal(fused(x, layers, function, activations), one_by_one(x, layers, function, activations))


@pytest.mark.parametrize("m", [40, 600])  # by rescaling, and with scales in the GEMM
def test_x_is_cast_once_for_gate_and_up(device, m):
    """To the codes that each would make: with weights of one scale and of many beside each other."""
    layers, _ = layers_of(64, 3072, 32, "channel", TOKEN, device)
    layers[1][1] = layers[1][1][:1, 0].clone()
    x = torch.randn(m, 64, device=device).bfloat16()
    layers[2][0].zero_()
    layers[2][0][:, :32] = torch.eye(32, device=device).to(E4M3)
    gate, up = (ops.frozen_linear(x, *layer, TOKEN).double() for layer in layers[:2])
    product = (F.silu(gate) * up).cpu()
    expected = seen_by_down(product, TOKEN)[:, :32] * layers[2][1].cpu().double().T + layers[2][2].cpu().double()
    torch.testing.assert_close(fused(x, layers, 0, TOKEN).cpu().double(), expected, rtol=0.07, atol=0.02)


@pytest.mark.parametrize("down", ["channel", "block"])
def test_layers_of_several_kinds(device, down):
    """Codes of rows and codes of groups of columns are not those of each other."""
    layers, _ = layers_of(128, 256, 48, "channel", TOKEN, device)
    layers[1] = layers_of(128, 256, 48, "block", TOKEN, device)[0][1]
    layers[2] = layers_of(128, 256, 48, down, TOKEN, device)[0][2]
    x = torch.randn(40, 128, device=device).bfloat16() * torch.tensor([0.01, 30.0], device=device).repeat(64).bfloat16()
    y, apart = fused(x, layers, 0, TOKEN), one_by_one(x, layers, 0, TOKEN)
    if down == "block":
        assert torch.equal(y, apart)
    else:
        torch.testing.assert_close(y, apart, rtol=0.1, atol=0.02 * apart.abs().max().item())


@pytest.mark.parametrize("inner", [136, 16400])
@pytest.mark.parametrize("activations", [TOKEN, STATIC])
@pytest.mark.parametrize("special", [float("inf"), float("nan"), 1e30])
def test_nan_and_inf_are_seen(device, special, activations, inner):
    """In the row that has them; and a product beyond float32 is Inf."""
    layers, _ = layers_of(64, inner, 16, "channel", activations, device, bias=False)
    x = torch.zeros(20, 64)
    x[:, 0] = 1
    for layer in layers[:-1]:
        layer[0].fill_(1)
        layer[1].fill_(1)
    if special == 1e30:
        for layer in layers[:-1]:
            layer[2] = torch.zeros(inner, device=device).bfloat16()
            layer[0][5, 1] = 448
            layer[1][5] = 1e30
        x[7, 1] = 1
        x[[row for row in range(20) if row != 7], 0] = 0
    else:
        x[7, 3] = special
    layers[2][0].fill_(1)
    y = fused(x.bfloat16().to(device), layers, 0, activations)
    finite = torch.ones(20, 16, dtype=torch.bool)
    finite[7] = False
    assert torch.equal(y.isfinite().cpu(), finite)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda a: a["weights"].pop(), ValueError, "two or three weights"),
        (lambda a: a.update(activation=3), ValueError, "activation must be 0"),
        (lambda a: a.update(activations=4), ValueError, "0, 1, 2 or 3"),
        (lambda a: a.update(activations=STATIC), RuntimeError, "calibrate"),
        (lambda a: a.update(x=torch.zeros(20, 63).bfloat16()), RuntimeError, "in_features = 64"),
        (lambda a: a.update(x=torch.zeros(20, 64).double()), TypeError, "bfloat16, float16 or float32"),
        (lambda a: a["weights"].insert(1, a["weights"].pop(1)[:16]), RuntimeError, "weights of one shape"),
        (lambda a: a["weights"].insert(2, a["weights"].pop(2)[:, :40].contiguous()), RuntimeError, "in_features = 40"),
        (lambda a: a.update(x=torch.zeros(20, 64).bfloat16().requires_grad_()), RuntimeError, "computes no gradient"),
    ],
)
def test_bad_arguments_are_named(change, error, match):
    layers, _ = layers_of(64, 48, 32, "tensor", TOKEN, "cpu", bias=False)
    weights, scales, biases, slots = (list(part) for part in zip(*layers, strict=True))
    arguments = {"x": torch.zeros(20, 64).bfloat16(), "weights": weights, "scales": scales, "biases": biases}
    arguments |= {"slots": slots, "activation": 0, "activations": TOKEN}
    change(arguments)
    with pytest.raises(error, match=match):
        ops.frozen_mlp(*arguments.values())


# ---- models ----------------------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    def __init__(self, gated=True, bias=False):
        super().__init__()
        if gated:
            self.gate_proj = nn.Linear(64, 144, bias=bias)
        self.up_proj = nn.Linear(64, 144, bias=bias)
        self.down_proj = nn.Linear(144, 64, bias=bias)
        self.gated = gated

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x) if self.gated else F.gelu(self.up_proj(x)))


class Calls(TorchDispatchMode):
    """How often ops of ours ran."""

    def __init__(self):
        super().__init__()
        self.count = {"frozen_mlp": 0, "frozen_linear": 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition("::")[2]
        if name in self.count:
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


def frozen_model(device, activations="token", weight="channel", gated=True, order="freeze, fuse"):
    model = nn.Sequential(Mlp(gated, bias=True)).bfloat16().to(device)
    if order == "fuse, freeze":
        fp8.convert(model, filter=lambda module, name: True)
        fp8.fuse(model)
    if activations == "static":
        fp8.calibrate(model, [torch.randn(40, 64, device=device).bfloat16()])
    fp8.freeze(model, activations, weight)
    return model if order == "fuse, freeze" else fp8.fuse(model)


@pytest.mark.parametrize("order", ["freeze, fuse", "fuse, freeze"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activations", ["token", "static"])
def test_a_frozen_model_is_fused(device, activations, gated, order):
    model = frozen_model(device, activations, gated=gated, order=order)
    assert "fused: 1 Mlp" in str(fp8.summary(model))
    plain = fp8.unfuse(copy.deepcopy(model))
    assert type(plain[0]) is Mlp
    x = torch.randn(2, 20, 64, device=device).bfloat16()
    with torch.no_grad(), Calls() as calls:
        y = model(x)
    assert calls.count == {"frozen_mlp": 1, "frozen_linear": 0}
    with torch.no_grad():
        torch.testing.assert_close(y, plain(x), rtol=0.05, atol=0.02)
        assert not torch.equal(y, plain(x))  # rounded once, not twice
        few = x[0, :16]
        with Calls() as calls:
            y = model(few)
        assert calls.count == {"frozen_mlp": 0, "frozen_linear": 3 if gated else 2}
        assert torch.equal(y, plain(few))
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_gradients_are_those_of_the_layers(device):
    model = frozen_model(device)
    plain = fp8.unfuse(copy.deepcopy(model))
    inputs = [torch.randn(40, 64, device=device).bfloat16().requires_grad_()]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    outputs = [net(x) for net, x in zip((model, plain), inputs, strict=True)]
    dy = torch.randn_like(outputs[0])
    for y in outputs:
        y.backward(dy)
    assert torch.equal(*outputs) and torch.equal(inputs[0].grad, inputs[1].grad)
    # What it is added to gets its own, beside an MLP that has none.
    residual = torch.randn(40, 64, device=device).bfloat16().requires_grad_()
    with Calls() as calls:
        gate, up, down, activation, *_ = model[0].fp8_fusion
        layers = [None if name is None else getattr(model[0], name) for name in (gate, up, down)]
        mlp(inputs[0].detach(), *layers, activation, residual).backward(dy)
    assert calls.count["frozen_mlp"] == 1 and torch.equal(residual.grad, dy)


def test_hooks_run(device):
    model = frozen_model(device)
    x = torch.randn(40, 64, device=device).bfloat16()
    seen = []
    model[0].down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    with torch.no_grad():
        assert torch.equal(model(x), fp8.unfuse(copy.deepcopy(model))(x))
    assert seen[0] == (40, 144)


@pytest.mark.parametrize("rows", [40, 4])
@pytest.mark.parametrize("activations", ["token", "static"])
def test_compiled(device, activations, rows):
    model = frozen_model(device, activations)
    x = torch.randn(rows, 64, device=device).bfloat16()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
        assert torch.equal(compiled(x.repeat(3, 1)), model(x.repeat(3, 1)))
    with torch.inference_mode():
        assert torch.equal(compiled(x), model(x))


def test_autocast_and_functions(device):
    model = frozen_model(device)
    gate, up, down = (getattr(model[0], name) for name in ("gate_proj", "up_proj", "down_proj"))
    x = torch.randn(40, 64, device=device)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16), Calls() as calls:
        y = mlp(x, gate, up, down, "silu")
    assert y.dtype == torch.bfloat16 and calls.count["frozen_mlp"] == 1
    with torch.no_grad():
        torch.testing.assert_close(y.float(), fp8.unfuse(copy.deepcopy(model))(x), rtol=0.05, atol=0.02)
        rows = torch.vmap(lambda t: mlp(t, gate, up, down, "silu"))(x.view(2, 20, 64))
        assert torch.equal(rows.view(40, 64), fp8.unfuse(copy.deepcopy(model))(x))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        mlp(torch.autograd.forward_ad.make_dual(x, x), gate, up, down, "silu")


@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("activations", ["token", "none"])
def test_gate_and_up_of_one_module(device, activations, halves):
    """In one piece, where the kernels take the layers, and one by one: with few rows, and before they are frozen."""
    both, down = nn.Linear(64, 288), nn.Linear(144, 64)
    model = nn.ModuleList([both, down]).bfloat16().to(device)
    x = torch.randn(2, 20, 64, device=device).bfloat16()

    def expected(x):
        gate, up = both(x).chunk(2, -1)[:: 1 if halves == 1 else -1]
        return down(F.silu(gate) * up)

    def made(x):
        return mlp(x, None, both, down, "silu", halves=halves)

    assert torch.equal(made(x), expected(x))
    fp8.freeze(model, activations)
    with torch.no_grad():
        torch.testing.assert_close(made(x), expected(x), rtol=0.05, atol=0.02)
        assert torch.equal(made(x[:, :8]), expected(x[:, :8]))
        assert torch.equal(torch.compile(made, fullgraph=True, backend="aot_eager")(x), made(x))
        with Calls() as calls:
            made(x)
    assert calls.count["frozen_mlp"] == (activations == "token")


@pytest.mark.parametrize(
    ("activations", "weight", "why"),
    [("token", "block", "block scales"), ("tensor", "channel", "'tensor'"), ("none", "channel", "'none'")],
)
def test_summary_says_what_is_not_fused(activations, weight, why):
    model = nn.Sequential(Mlp(), nn.LayerNorm(64)).bfloat16()
    fp8.fuse(fp8.freeze(model, activations, weight))
    assert "not fused: *: frozen layers make no codes of a product" in str(fp8.summary(model))
    assert why in str(fp8.summary(model))
    mixed = nn.Sequential(Mlp(), nn.LayerNorm(64)).bfloat16()
    fp8.freeze(mixed, filter=["0.gate_proj", "0.up_proj"])
    fp8.freeze(mixed, activations="none", filter=["0.down_proj"])
    assert "down is frozen in another way than up" in str(fp8.summary(fp8.fuse(mixed)))
