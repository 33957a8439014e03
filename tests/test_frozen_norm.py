"""frozen_norm, and who takes its codes: they are those that the reader would make of the norm's result, to the bit, so
whatever is in between, a model computes the same whether they are taken or not."""

import copy
import io
import pickle

import pytest
import torch
import torch_fp8 as fp8
from oracle import E4M3, codes, exact_scale, weight_of
from test_norm import DTYPES, assert_near, exact_norm, norm_cast, random
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch_fp8.layers import given

ops = torch.ops.torch_fp8
STATIC, TENSOR, TOKEN = 1, 2, 3
EPS = 1e-5
# One pack and none whole, with padding behind it; one warp, two and four packs a thread; beyond what a block holds.
SHAPES = [(1, 17), (3, 5, 40), (20, 264), (18, 1024), (33, 4096), (17, 14336), (17, 40000)]


def slot_of(scale_inv, device):
    return torch.tensor([[scale_inv, 1 / scale_inv, 0.0, 0.0]], device=device)


def frozen_norm(x, residual=None, gain=None, bias=None, *, layer_norm=False, offset=0.0, slot=None, codes=True):
    return ops.frozen_norm(x, residual, gain, bias, EPS, layer_norm, offset, slot, codes)


# ---- the op ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(device, shape, dtype, added, layer_norm, static):
    x = random(shape, dtype, device, 0, scale=2.0, shift=0.5)
    residual = random(shape, dtype, device, 1) if added else None
    gain = random(shape[-1:], torch.float32 if added else dtype, device, 2) if not static or added else None
    bias = random(shape[-1:], dtype, device, 3) if layer_norm else None
    slot = slot_of(1 / 64, device) if static else None
    y, total, q, scale = frozen_norm(x, residual, gain, bias, layer_norm=layer_norm, offset=float(added), slot=slot)
    assert torch.equal(total, x + residual) if added else total.numel() == 0
    exact, error, *_ = exact_norm(total if added else x, gain, bias, layer_norm, float(added))
    assert_near(y, exact, error, dtype)
    assert_codes_of(y, q, scale, slot)
    plain = frozen_norm(x, residual, gain, bias, layer_norm=layer_norm, offset=float(added), slot=slot, codes=False)
    assert torch.equal(plain[0], y) and torch.equal(plain[1], total)
    assert plain[2].numel() == plain[3].numel() == 0


def assert_codes_of(y, q, scale, slot):
    """To the bit those of y: each row by its own amax, or by the slot; and no padding but 0."""
    rows = y.reshape(-1, y.shape[-1]).cpu().float()
    got = q.cpu().view(torch.uint8)
    assert q.dtype == E4M3 and q.is_contiguous() and q.shape == (len(rows), -(-rows.shape[1] // 16) * 16)
    assert not got[:, rows.shape[1] :].any()
    if slot is not None:
        assert scale.numel() == 0
        scales = [slot[0, 1].item()] * len(rows)
    else:
        scales = [exact_scale(row.abs().max().item(), E4M3) for row in rows]
        assert scale.cpu().tolist() == [(1 / torch.tensor(s, dtype=torch.float32)).item() for s in scales]
    for row, code, s in zip(rows, got, scales, strict=True):
        assert torch.equal(code[: rows.shape[1]], codes(row, s, E4M3).view(torch.uint8))


@pytest.mark.parametrize("layer_norm", [False, True])
def test_codes_are_no_worse_than_those_of_a_norm_in_16_bits(device, layer_norm):
    """Of Llama's norm, which rounds before its gain, and of PyTorch's; in FP8 the roundings to 16 bits hardly count."""
    x = random((512, 1024), torch.bfloat16, device, 0, scale=3.0)
    gain, bias = (random((1024,), torch.bfloat16, device, seed, shift=1.0) for seed in (1, 2))
    exact, *_ = exact_norm(x, gain, bias if layer_norm else None, layer_norm, 0.0)
    _, _, q, scale = frozen_norm(x, gain=gain, bias=bias if layer_norm else None, layer_norm=layer_norm)
    if layer_norm:
        others = [F.layer_norm(x, (1024,), gain, bias, EPS)]
    else:
        llama = (x.float() * (x.float().square().mean(-1, keepdim=True) + EPS).rsqrt()).bfloat16() * gain
        others = [F.rms_norm(x, (1024,), gain, EPS), llama]

    def error(values):
        return (values.double() - exact).square().mean().sqrt().item()

    ours = error(q.float().double() * scale.double()[:, None])
    for other in others:
        row = other.float().abs().amax(-1, keepdim=True)
        cast = (other.float() * (448 / row)).to(E4M3).double() * (row / 448).double()
        assert ours <= error(cast) * 1.0005


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("width", [64, 40000, 17])
@pytest.mark.parametrize("special", [float("inf"), float("nan"), float("-inf")])
def test_nan_and_inf_are_seen(device, special, width, static):
    """Through the gain, so that a norm is finite but in one column."""
    x = random((20, width), torch.bfloat16, device, 0)
    gain = torch.ones(width, device=device)
    gain[3] = special
    slot = slot_of(1 / 16, device) if static else None
    y, _, q, scale = frozen_norm(x, gain=gain, slot=slot)
    finite = torch.ones(width, dtype=torch.bool)
    finite[3] = False
    values = q[:, :width].float().cpu()
    assert torch.equal(y.cpu().isfinite(), finite.expand(20, -1))
    assert torch.equal(values.isfinite(), finite.expand(20, -1))
    assert scale.isfinite().all()


@pytest.mark.parametrize("rows", [0, 1])
def test_layouts_and_no_rows(device, rows):
    x = random((64, 2 * rows), torch.bfloat16, device, 0).t()  # columns are not neighbours
    y, _, q, scale = frozen_norm(x)
    dense = frozen_norm(x.contiguous())
    assert torch.equal(y, dense[0]) and torch.equal(q.view(torch.uint8), dense[2].view(torch.uint8))
    assert y.is_contiguous() and scale.shape == (2 * rows,)
    odd = random((40, 72), torch.bfloat16, device, 1)[:, 3:67]  # no packs
    gain = random((65,), torch.bfloat16, device, 2)[1:]  # at no 16-byte boundary
    a, b = frozen_norm(odd, odd, gain), frozen_norm(odd.clone(), odd.clone(), gain.clone())
    for i in (0, 1):
        torch.testing.assert_close(a[i], b[i], rtol=2**-7, atol=0)
    assert_codes_of(a[0], a[2], a[3], None)


def test_bad_arguments_of_the_norm_are_named(device):
    x = torch.zeros(20, 64, device=device).bfloat16()
    for change, error, match in [
        ({"residual": x[:10]}, RuntimeError, "residual must have x's shape"),
        ({"residual": x.float()}, TypeError, "residual must have x's dtype"),
        ({"gain": x[0, :63]}, RuntimeError, "gain must have shape"),
        ({"slot": torch.zeros(3, 4, device=device)}, RuntimeError, "slots must be a contiguous float32 tensor"),
        ({"x": x.double()}, TypeError, "bfloat16, float16 or float32"),
    ]:
        with pytest.raises(error, match=match):
            frozen_norm(**{"x": x, **change})


# ---- codes that are given --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", [TOKEN, STATIC])
@pytest.mark.parametrize("kind", ["tensor", "channel"])
@pytest.mark.parametrize(
    ("m", "k", "n", "dtype"),
    [
        (18, 64, 48, torch.bfloat16),  # a kernel of ours multiplies
        (60, 72, 40, torch.bfloat16),  # codes are wider than x
        (600, 64, 3072, torch.float16),  # scales in the GEMM
        (40, 64, 48, torch.float32),
        (12, 64, 8256, torch.bfloat16),  # few rows, and wide
    ],
)
def test_a_layer_gives_the_same_with_codes(device, m, k, n, dtype, kind, activations):
    weight, scale, _ = weight_of(n, k, kind)
    weight, scale, bias = weight.to(device), scale.to(device), random((n,), dtype, device, 3)
    slot = slot_of(1 / 64, device) if activations == STATIC else None
    y, _, q, of_rows = frozen_norm(random((2, m // 2, k), dtype, device, 0), slot=slot)
    given_codes = (q, None if slot is not None else of_rows)
    apart = ops.frozen_linear(y, weight, scale, bias, slot, activations)
    assert torch.equal(ops.frozen_linear(y, weight, scale, bias, slot, activations, None, *given_codes), apart)
    # It is the codes that are read.
    zeros = torch.zeros_like(q.view(torch.uint8)).view(E4M3)
    none = ops.frozen_linear(y, weight, scale, bias, slot, activations, None, zeros, given_codes[1])
    assert torch.equal(none, bias.expand_as(none))


@pytest.mark.parametrize("activations", [TOKEN, STATIC])
@pytest.mark.parametrize("layers", ["gate, up, down", "both, down", "up, down"])
def test_an_mlp_gives_the_same_with_codes(device, layers, activations):
    slot = slot_of(1 / 64, device) if activations == STATIC else None
    y, _, q, of_rows = frozen_norm(random((40, 64), torch.bfloat16, device, 0), slot=slot)
    sizes = {"gate, up, down": [(144, 64), (144, 64)], "both, down": [(288, 64)], "up, down": [(144, 64)]}[layers]
    made = [weight_of(*size, "channel") for size in [*sizes, (32, 144)]]
    weights, scales = ([layer[i].to(device) for layer in made] for i in (0, 1))
    arguments = (y, weights, scales, [None] * len(made), [slot] * len(made), 0, activations, None)
    given_codes = (q, None if slot is not None else of_rows)
    assert torch.equal(ops.frozen_mlp(*arguments, *given_codes), ops.frozen_mlp(*arguments))
    zeros = torch.zeros_like(q.view(torch.uint8)).view(E4M3)
    assert not ops.frozen_mlp(*arguments, zeros, given_codes[1]).any()


@pytest.mark.parametrize("activations", [TOKEN, STATIC])
def test_few_rows_are_not_read_as_codes(device, activations):
    weight, scale, _ = weight_of(48, 64, "channel")
    weight, scale, slot = weight.to(device), scale.to(device), slot_of(1 / 64, device)
    x = random((16, 64), torch.bfloat16, device, 0)
    q = torch.zeros(16, 64, dtype=torch.uint8, device=device).view(E4M3)
    of_rows = torch.ones(16, device=device) if activations == TOKEN else None
    arguments = (x, weight, scale, None, slot, activations)
    assert torch.equal(ops.frozen_linear(*arguments, None, q, of_rows), ops.frozen_linear(*arguments))


def test_the_gradient_knows_nothing_of_codes(device):
    weight, scale, _ = weight_of(48, 64, "channel")
    y, _, q, of_rows = frozen_norm(random((40, 64), torch.bfloat16, device, 0))
    dy = random((40, 48), torch.bfloat16, device, 1)
    gradients = []
    for codes_of_y in ((), (q, of_rows)):
        x = y.clone().requires_grad_()
        out = ops.frozen_linear(x, weight.to(device), scale.to(device), None, None, TOKEN, None, *codes_of_y)
        out.backward(dy)
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"activations": TENSOR}, ValueError, "x_codes are for activations 1 or 3"),
        ({"activations": 0}, ValueError, "x_codes are for activations 1 or 3"),
        ({"scale": torch.ones(1, 2)}, ValueError, "without a grid of scales"),
        ({"x_codes": torch.zeros(40, 136)}, TypeError, "x_codes must be float8_e4m3fn"),
        ({"x_codes": torch.zeros(39, 144).to(E4M3)}, RuntimeError, r"of shape \[40, 144\]"),
        ({"x_codes": torch.zeros(40, 136).to(E4M3)}, RuntimeError, r"of shape \[40, 144\]"),
        ({"x_codes": torch.zeros(144, 40).to(E4M3).t()}, RuntimeError, "x_codes must be contiguous"),
        ({"x_scale": None}, RuntimeError, "come with x_scale"),
        ({"x_scale": torch.ones(39)}, RuntimeError, r"float32 of shape \[40\]"),
        ({"activations": STATIC, "slot": slot_of(1.0, "cpu")}, RuntimeError, "those by input_slot without"),
    ],
)
def test_bad_codes_are_named(change, error, match):
    arguments = {
        "x": torch.zeros(40, 136), "weight": torch.zeros(48, 136).to(E4M3), "scale": torch.ones(1), "bias": None,
        "slot": None, "activations": TOKEN, "dtype": None, "x_codes": torch.zeros(40, 144).to(E4M3),
        "x_scale": torch.ones(40),
    }  # fmt: skip
    with pytest.raises(error, match=match):
        ops.frozen_linear(*(arguments | change).values())
    meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in (arguments | change).items()}
    with pytest.raises(error, match=match):
        ops.frozen_linear(*meta.values())


# ---- models ----------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Values alone: what counts is who reads what."""

    def __init__(self, between):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(64, 64, bias=False) for _ in range(4))
        self.between = between

    def forward(self, x):
        q = self.q_proj(x)
        if self.between is not None:
            x = self.between(x)
        return self.o_proj(torch.tanh(q + self.k_proj(x)) * self.v_proj(x))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(64, 144, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(144, 64, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rms(width):
    return nn.RMSNorm(width, EPS)


class Block(nn.Module):
    def __init__(self, norm, between):
        super().__init__()
        self.first, self.second = norm(64), norm(64)
        self.attention, self.mlp = Attention(between), Mlp()

    def forward(self, x):
        x = x + self.attention(self.first(x))
        return x + self.mlp(self.second(x))


class Calls(TorchDispatchMode):
    """How often ops of ours ran, and with codes that were given."""

    def __init__(self):
        super().__init__()
        self.count = dict.fromkeys(["frozen_norm", "frozen_linear", "frozen_mlp", "with codes"], 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition("::")[2]
        if name in self.count:
            self.count[name] += 1
            self.count["with codes"] += len(args) > {"frozen_norm": 10, "frozen_linear": 7, "frozen_mlp": 8}[name]
        return func(*args, **(kwargs or {}))


ALL_TAKEN = {"frozen_norm": 4, "frozen_linear": 8, "frozen_mlp": 2, "with codes": 8}


def model_of(device, activations="token", *, norm=rms, between=None, order="freeze, fuse", dtype=torch.bfloat16):
    model = nn.Sequential(*(Block(norm, between) for _ in range(2))).to(dtype).to(device)
    if order == "fuse, freeze":
        fp8.convert(model, filter=lambda module, name: True)
        fp8.fuse(model)
    if activations == "static":
        fp8.calibrate(model, [x_of(device, dtype=dtype)])
    fp8.freeze(model, activations, "tensor" if activations == "static" else "channel")
    return model if order == "fuse, freeze" else fp8.fuse(model)


def x_of(device, shape=(2, 20), dtype=torch.bfloat16):
    return random((*shape, 64), dtype, device, 7)


class Nothing(dict):
    """Of what is laid down in it nothing is found."""

    data = property(lambda self: {})

    def __setitem__(self, key, value):
        pass


@pytest.fixture
def apart(monkeypatch):
    """What a model computes where nobody takes codes."""

    def compute(model, *args):
        with monkeypatch.context() as patch:
            patch.setattr(given, "_offers", Nothing())
            return model(*args)

    return compute


@pytest.mark.parametrize("no_gradients", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("order", ["freeze, fuse", "fuse, freeze"])
@pytest.mark.parametrize("norm", [rms, nn.LayerNorm])
@pytest.mark.parametrize("activations", ["token", "static"])
def test_a_frozen_model_casts_what_norms_give_nowhere(device, activations, norm, order, no_gradients, apart):
    model, x = model_of(device, activations, norm=norm, order=order), x_of(device)
    assert "fused: 2 Block, 4 " in str(fp8.summary(model)) and not fp8.summary(model).not_fused
    with no_gradients():
        y = model(x)
        with Calls() as calls:
            assert torch.equal(model(x), y)
        assert calls.count == ALL_TAKEN
        assert torch.equal(apart(model, x), y)
        plain = fp8.unfuse(copy.deepcopy(model))
        torch.testing.assert_close(y, plain(x), rtol=0.05, atol=0.1)
        with Calls() as calls:  # few rows: the norms make no codes
            few = model(x[:, :8])
        assert calls.count["frozen_norm"] == 4 and calls.count["with codes"] == 0 and not given._offers
        torch.testing.assert_close(few, plain(x[:, :8]), rtol=0.05, atol=0.1)
    assert not given._offers  # which live no longer than the tensors


def write(x):
    x[:, 3] *= 5
    return x


def other_data(x):
    x.data = x.data * 3
    return x


BETWEEN = {
    "written to": write, "another tensor": lambda x: x.clone().mul_(2), "other data": other_data,
    "a view of a part": lambda x: F.pad(x[..., 1:], (0, 1)),
}  # fmt: skip


@pytest.mark.parametrize("no_gradients", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("between", BETWEEN)
def test_what_is_not_the_norms_result_is_cast(device, between, no_gradients, apart):
    model = model_of(device, between=BETWEEN[between])
    with no_gradients():
        with Calls() as calls:
            y = model(x_of(device))
        assert calls.count["with codes"] == 4  # of q, and of the MLP
        assert torch.equal(y, apart(model, x_of(device)))


@pytest.mark.parametrize("hook", ["norm", "q_proj", "mlp", "gate_proj"])
@pytest.mark.parametrize("writes", [False, True])
def test_hooks_run(device, hook, writes, apart):
    model, seen = model_of(device), []
    block = model[0]
    module = {
        "norm": block.first, "q_proj": block.attention.q_proj, "mlp": block.mlp, "gate_proj": block.mlp.gate_proj,
    }[hook]  # fmt: skip

    def see(module, args, output=None):
        x = args[0] if output is None else output
        seen.append(x.shape)
        return x.mul_(2) if writes else None

    module.register_forward_hook(see) if hook == "norm" else module.register_forward_pre_hook(see)
    with torch.no_grad():
        y = model(x_of(device))
        assert torch.equal(y, apart(model, x_of(device)))
        assert len(seen) == 2
        if not writes and hook != "gate_proj":  # which takes the MLP apart
            assert torch.equal(y, without_hooks(model)(x_of(device)))


def without_hooks(model):
    other = copy.deepcopy(model)
    for module in other.modules():
        module._forward_hooks.clear(), module._forward_pre_hooks.clear()
    return other


@pytest.mark.parametrize("change", ["fill", "load", "replace", "data"])
def test_static_scales_that_part_are_followed(device, change, apart):
    """Layers that were calibrated on one tensor take codes of each other's scale, until one of them has another."""
    model, x = model_of(device, "static"), x_of(device)
    k = model[0].attention.k_proj
    with torch.no_grad():
        before = model(x)
        slot = slot_of(k.input_slot[0, 0].item() / 64, device)
        if change == "fill":
            k.input_slot.copy_(slot)
        elif change == "load":
            model.load_state_dict(model.state_dict() | {"0.attention.k_proj.input_slot": slot})
        elif change == "replace":
            k.input_slot = slot
        else:
            k.input_slot.data = slot
        y = model(x)
        with Calls() as calls:
            assert torch.equal(model(x), y)
        assert calls.count["with codes"] == 7
        assert torch.equal(y, apart(model, x)) and not torch.equal(y, before)


def test_an_exported_program_serves_any_number_of_rows(device):
    """Few rows and many are computed in two ways, and a program has one."""
    model = model_of(device)
    dim = torch.export.Dim.DYNAMIC
    with torch.no_grad():
        shapes = ({0: dim, 1: dim},)
        x = x_of(device).view(2, -1, x_of(device).shape[-1])
        program = torch.export.export(model, (x,), dynamic_shapes=shapes).module()
        for given in (x[:, :5], x, torch.cat([x, -x, x])):
            y = model(given)
            assert (program(given).float() - y.float()).norm() < 0.03 * y.float().norm()


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_a_trace_follows_static_scales_that_part(device, called, apart):
    """What a host has read is not in a trace: it would be replayed after the scale has changed."""
    model, x = model_of(device, "static"), x_of(device)
    slot = model[0].attention.k_proj.input_slot
    with torch.no_grad():
        if called:
            model(x)
        traced = torch.jit.trace(model, (x,), check_trace=False)
        model.load_state_dict(
            model.state_dict() | {"0.attention.k_proj.input_slot": slot_of(slot[0, 0].item() / 64, device)}
        )
        y = model(x)
        assert (traced(x).float() - y.float()).norm() < 0.03 * y.float().norm()


def test_layers_of_other_kinds_cast_for_themselves(device, apart):
    """Whatever the first of those that read a norm is."""
    x = x_of(device)
    for first, others in (("token", "static"), ("static", "token"), ("token", "none"), ("token", "block")):
        model = nn.Sequential(Block(rms, None)).bfloat16().to(device)
        fp8.calibrate(model, [x])
        for activations, names in ((first, ["*q_proj", "*gate_proj"]), (others, ["*k_proj", "*v_proj", "*up_proj"])):
            weight = "block" if activations == "block" else "channel"
            fp8.freeze(model, "token" if activations == "block" else activations, weight, filter=names)
        fp8.freeze(model)
        fp8.fuse(model)
        with torch.no_grad():
            with Calls() as calls:
                y = model(x)
            assert calls.count["with codes"] == 2
            assert torch.equal(y, apart(model, x))


@pytest.mark.parametrize("activations", ["token", "static"])
def test_gradients_are_wanted(device, activations):
    """Then norms make no codes for frozen layers, whatever it is that requires one."""
    model = model_of(device, activations)
    plain = fp8.unfuse(copy.deepcopy(model))
    inputs = [x_of(device).requires_grad_() for _ in range(2)]
    with Calls() as calls:
        outputs = [net(x) for net, x in zip((model, plain), inputs, strict=True)]
    assert calls.count["frozen_norm"] == calls.count["with codes"] == 0
    for y in outputs:
        y.backward(torch.ones_like(y))
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=0.1, atol=0.3)


def test_an_adapter_over_what_takes_codes(device, apart):
    """x requires no gradient, the adapter beside the frozen layer does."""
    model = model_of(device)
    frozen = model[0].attention.q_proj
    adapter = nn.Linear(64, 64, bias=False, device=device, dtype=torch.bfloat16)

    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.adapter = frozen, adapter

        def forward(self, x):
            return self.base(x) + self.adapter(x)

    model[0].attention.q_proj = Adapted()
    y = model(x_of(device))
    y.sum().backward()
    gradient, adapter.weight.grad = adapter.weight.grad, None
    other = apart(model, x_of(device))
    other.sum().backward()
    assert torch.equal(y, other) and torch.equal(gradient, adapter.weight.grad) and gradient.any()


@pytest.mark.parametrize("no_gradients", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("activations", ["token", "static"])
def test_compiled(device, activations, no_gradients):
    """In a graph, too, codes are taken; with static scales by the one layer whose slot it is."""
    model, seen = model_of(device, activations), []

    def backend(graph, example_inputs):
        for node in graph.graph.nodes:
            if node.op == "call_function" and "torch_fp8.frozen_linear" in str(node.target):
                seen.append(len(node.args) > 7)
        return graph

    with no_gradients():
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        for x in (x_of(device), x_of(device, (3, 40)), x_of(device, (1, 1))):
            assert torch.equal(compiled(x), model(x))
        assert sum(seen[:8]) == (6 if activations == "token" else 2) and len(seen[:8]) == 8
        if activations == "token":
            whole = torch.compile(model, fullgraph=True, backend="aot_eager")
            assert torch.equal(whole(x_of(device)), model(x_of(device)))


@pytest.mark.parametrize("no_gradients", [torch.no_grad, torch.inference_mode])
def test_compiled_code_that_writes_between(device, no_gradients):
    model = model_of(device, between=write)
    with no_gradients():
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager")
        assert torch.equal(compiled(x_of(device)), model(x_of(device)))


def test_autocast(device, apart):
    """A norm of 16 bits is PyTorch's there, one of float32 is ours."""
    for dtype in (torch.float32, torch.bfloat16):
        model, x = model_of(device, dtype=dtype), x_of(device, dtype=dtype)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            y = model(x)
            assert torch.equal(y, apart(model, x))
            torch.testing.assert_close(y, fp8.unfuse(copy.deepcopy(model))(x), rtol=0.05, atol=0.1)


def test_traces_and_transforms(device):
    model, x = model_of(device), x_of(device)
    with torch.no_grad():
        traced = torch.jit.trace(model, (x,), check_trace=False)
        for x_now in (x, x.flip(0)):  # frozen_mlp is none that it can trace
            torch.testing.assert_close(traced(x_now), model(x_now), rtol=0.05, atol=0.1)
        graph = torch.fx.experimental.proxy_tensor.make_fx(model)(x)
        assert torch.equal(graph(x.flip(0)), model(x.flip(0)))
        exported = torch.export.export(model, (x,))
        assert torch.equal(exported.module()(x.flip(0)), model(x.flip(0)))
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert model(mode.from_tensor(x)).shape == x.shape


def test_the_norms_result_is_a_tensor_like_others(device):
    """It is copied and pickled without its codes; in inference mode it counts its writes."""
    model = model_of(device)
    kept = []
    hook = model[0].first.register_forward_hook(lambda module, args, y: kept.append(y))
    with torch.inference_mode():
        model(x_of(device))
        (y,) = kept
        assert not y.is_inference() and len(given._offers) == 1
        copies = [copy.deepcopy(y), pickle.loads(pickle.dumps(y.cpu()))]
        torch.save(y, io.BytesIO())
        assert all(torch.equal(c, y.to(c.device)) for c in copies) and not vars(copies[0])
        q = model[0].attention.q_proj
        assert torch.equal(q(copies[0]), q(y))
        kept.clear()
        del y
        assert not given._offers
    hook.remove()
    torch.save(model, io.BytesIO())
    pickle.loads(pickle.dumps(model))


def test_in_a_cuda_graph(cuda):
    for activations in ("token", "static"):
        model, x = model_of(cuda, activations), x_of(cuda)
        with torch.no_grad():
            model(x), model(x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = model(x)
            for seed in range(3):
                x.copy_(random(x.shape, x.dtype, cuda, seed))
                graph.replay()
                assert torch.equal(y, model(x))


def test_a_graph_or_stream_of_its_own_casts(cuda):
    """Codes may be let go of, or be older than what is copied into a graph's input, where they were made elsewhere."""
    block = model_of(cuda)[0]
    norm, q = block.first, block.attention.q_proj
    with torch.no_grad():
        x = x_of(cuda)
        y = norm(x)
        other = torch.cuda.Stream()
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other), Calls() as calls:
            assert torch.equal(q(y), q(y.clone()))
        assert calls.count["with codes"] == 0
        torch.cuda.current_stream().wait_stream(other)
        with Calls() as calls:
            q(y)
        assert calls.count["with codes"] == 1
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = q(y)
        y.copy_(norm(3 * x.flip(0)))
        graph.replay()
        assert torch.equal(out, q(y.clone()))


def test_kernels_of_a_frozen_block(cuda):
    """Norms cast for q, k, v, gate and up, SwiGLU for down: what is left is the input of o."""
    from test_launches import device_work

    model = nn.Sequential(Block(rms, None)).bfloat16().to(cuda)
    fp8.fuse(fp8.freeze(model))
    x = random((2, 64, 64), torch.bfloat16, cuda, 0)
    with torch.no_grad():
        model(x)
        names = device_work(lambda: model(x))
    assert sum("norm_rows" in name for name in names) == 2, names
    assert sum("activate_rows" in name for name in names) == 1, names
    assert sum("quantize" in name for name in names) == 1, names


def test_the_same_bits_as_norm_cast():
    """For the norm itself, on the CPU."""
    x = random((20, 100), torch.bfloat16, "cpu", 0)
    gain = random((100,), torch.float32, "cpu", 1)
    assert torch.equal(frozen_norm(x, x, gain, offset=1.0)[0], norm_cast(x, x, gain, offset=1.0)[0])
