"""Whoever looks at a frozen layer sees its op: tracers, modes, subclasses, transforms. Held against the same layer in
eager mode, which test_frozen_ops.py holds against float64."""

import copy
import io
import threading
import time
from typing import ClassVar

import pytest
import torch
import torch_fp8 as fp8
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch_fp8.layers.frozen import ACTIVATIONS, WEIGHTS

OP = torch.ops.torch_fp8.frozen_linear
N, K = 144, 256
ROWS = [1, 12, 17, 40]  # the ways that a product may go


@pytest.fixture(params=["token", "static"])
def layer(request, device):
    plain = nn.Linear(K, N, device=device, dtype=torch.bfloat16)
    fp8.calibrate(plain, [torch.randn(8, K, device=device).bfloat16()])
    return fp8.freeze(plain, request.param)


def inputs(rows, device):
    return torch.randn(rows, K, device=device).bfloat16()


def targets(graph):
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


def test_jit_trace(layer, device):
    """A trace keeps the op: what it gives for other inputs, and other numbers of them, is the layer's."""
    traced = torch.jit.trace(layer, inputs(2, device))
    saved = io.BytesIO()
    torch.jit.save(traced, saved)
    saved.seek(0)
    for function in (traced, torch.jit.load(saved)):
        assert "torch_fp8::frozen_linear" in str(function.graph)
        for rows in ROWS:
            x = inputs(rows, device)
            assert torch.equal(function(x), layer(x))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(layer, device, mode):
    graph = make_fx(layer, tracing_mode=mode, _allow_non_fake_inputs=True)(inputs(17, device))
    assert targets(graph) == [OP.default]
    for rows in ROWS:
        x = inputs(rows, device)
        assert torch.equal(graph(x), layer(x))


@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_make_fx_of_everything(layer, device, mode):
    """Weights, scales and slots are inputs of the graph, with symbols for sizes."""
    state = dict(layer.named_buffers())
    graph = make_fx(lambda state, x: torch.func.functional_call(layer, state, (x,)), tracing_mode=mode)(
        state, inputs(17, device)
    )
    assert OP.default in targets(graph)
    for rows in ROWS:
        x = inputs(rows, device)
        assert torch.equal(graph(state, x), layer(x))


def test_export(layer, device):
    rows = torch.export.Dim("rows", min=1, max=64)
    program = torch.export.export(layer, (inputs(17, device),), dynamic_shapes=({0: rows},))
    assert OP.default in targets(program.graph_module)
    for count in ROWS:
        x = inputs(count, device)
        assert torch.equal(program.module()(x), layer(x))


def test_compile(layer, device):
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for rows in ROWS:
            x = inputs(rows, device)
            assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor(layer, cuda, device, mode):
    if device.type != "cuda":
        pytest.skip("once is enough")
    compiled = torch.compile(lambda x: layer(x * 2) + 1, fullgraph=True, mode=mode)
    with torch.no_grad():
        for rows in ROWS:
            for _ in range(3):  # warmed up, captured, replayed
                x = inputs(rows, device)
                assert torch.equal(compiled(x), layer(x * 2) + 1)


def test_fake_tensors(layer):
    with FakeTensorMode(allow_non_fake_inputs=True):
        for rows in ROWS:
            y = layer(torch.empty(3, rows, K, device=layer.weight.device, dtype=torch.bfloat16))
            assert (y.shape, y.dtype, y.device) == ((3, rows, N), torch.bfloat16, layer.weight.device)


def test_fake_input_of_a_real_layer(layer):
    with FakeTensorMode(), pytest.raises(AssertionError, match="FakeTensor"):
        layer(torch.empty(3, K, dtype=torch.bfloat16))


def test_meta():
    for activations in ACTIVATIONS:
        layer = fp8.FrozenLinear(K, N, device="meta", dtype=torch.bfloat16, activations=activations)
        y = layer(torch.empty(2, 17, K, device="meta", dtype=torch.bfloat16))
        assert (y.shape, y.dtype, y.device.type) == ((2, 17, N), torch.bfloat16, "meta")


def test_dispatch_mode(layer, device):
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x = inputs(17, device)
    with Watch():
        y = layer(x)
    assert OP.default in seen and torch.equal(y, layer(x))


def test_function_mode(layer, device):
    class Doubled(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            return 2 * out if "frozen_linear" in str(func) else out

    x = inputs(17, device)
    with Doubled():
        y = layer(x)
    assert torch.equal(y, 2 * layer(x))


def test_subclass_that_takes_functions(layer, device):
    class Tagged(torch.Tensor):
        pass

    x = inputs(17, device)
    y = layer(x.as_subclass(Tagged))
    assert type(y) is Tagged and torch.equal(y.as_subclass(torch.Tensor), layer(x))


class Wrapped(torch.Tensor):
    """A tensor that only holds another one, and nothing where its memory should be."""

    seen: ClassVar[list] = []

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        args = [arg.inner if isinstance(arg, Wrapped) else arg for arg in args]
        return Wrapped(func(*args, **(kwargs or {})))


@pytest.mark.parametrize("rows", ROWS)
def test_subclass_that_takes_ops(layer, device, rows):
    Wrapped.seen.clear()
    x = inputs(rows, device)
    assert torch.equal(layer(Wrapped(x)).inner, layer(x))
    assert Wrapped.seen == [OP.default]


def test_subclass_as_weight(layer, device):
    x = inputs(17, device)
    y = torch.func.functional_call(layer, {"weight": Wrapped(layer.weight)}, (x,))
    assert torch.equal(y.inner, layer(x))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap(layer, device):
    x = torch.randn(3, 17, K, device=device).bfloat16()
    assert torch.equal(torch.func.vmap(layer)(x), torch.stack([layer(part) for part in x]))


def test_functional_call(layer, device):
    x, other = inputs(17, device), torch.zeros_like(layer.weight)
    y = torch.func.functional_call(layer, {"weight": other}, (x,))
    assert torch.equal(y, layer.bias.expand(17, N))


def test_deepcopy(layer, device):
    x = inputs(17, device)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_inference_mode(layer, device):
    with torch.inference_mode():
        there = copy.deepcopy(layer)
        for rows in ROWS:
            x = inputs(rows, device)
            assert torch.equal(there(x), layer(x))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_negative_views(layer, device, rows, dtype):
    """A tensor may be stored with the other sign."""
    if dtype == torch.float32:
        x = torch.randn(rows, K, device=device, dtype=torch.complex64).conj().imag
    else:
        x = torch._neg_view(inputs(rows, device))
    assert x.is_neg()
    assert torch.equal(layer(x), layer(x.resolve_neg().clone()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_part_of_the_graph(layer, device, dtype):
    x = torch.randn(17, K, device=device)
    with torch.autocast(device.type, dtype):
        graph, traced, y = make_fx(layer)(x), torch.jit.trace(layer, x), layer(x)
    assert y.dtype == dtype
    assert torch.equal(graph(x), y) and torch.equal(traced(x), y)


def call_eager(layer, x):
    return layer(x)


def call_meta(layer, x):
    return copy.deepcopy(layer).to("meta")(x.to("meta"))


def call_fake(layer, x):
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        return layer(mode.from_tensor(x))


def call_compiled(layer, x):
    return torch.compile(layer, fullgraph=True, backend="eager")(x)


def call_make_fx(layer, x):
    return make_fx(layer, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x)


@pytest.mark.parametrize("call", [call_eager, call_meta, call_fake, call_compiled, call_make_fx])
@pytest.mark.parametrize(
    ("size", "dtype", "match"),
    [
        ((17, K - 1), torch.bfloat16, f"last dimension must be in_features = {K}, got an input of shape"),
        ((), torch.bfloat16, "last dimension must be in_features"),
        ((17, K), torch.float64, "x must be bfloat16, float16 or float32, got [dD]ouble"),
    ],
)
def test_bad_inputs_are_named_alike(layer, device, call, size, dtype, match):
    with pytest.raises((RuntimeError, TypeError), match=match), torch.no_grad():
        call(layer, torch.zeros(size, dtype=dtype, device=device))


def test_a_parametrised_bias(device):
    layer = fp8.freeze(nn.Linear(K, N, device=device, dtype=torch.bfloat16))

    class Doubled(nn.Module):
        def forward(self, bias):
            return 2 * bias

    x = inputs(17, device)
    with torch.no_grad():
        expected = layer(x).float() + layer.bias.float()
        nn.utils.parametrize.register_parametrization(layer, "bias", Doubled())
        torch.testing.assert_close(layer(x).float(), expected, rtol=2**-7, atol=2**-7)


def test_others_run_meanwhile():
    """The interpreter's lock is free while the op computes."""
    layer, x = fp8.FrozenLinear(2048, 2048, dtype=torch.bfloat16), torch.randn(512, 2048).bfloat16()
    began, done, ticks = threading.Event(), threading.Event(), 0

    def work():
        began.set()
        for _ in range(3):
            layer(x)
        done.set()

    worker = threading.Thread(target=work)
    worker.start()
    began.wait()
    while not done.is_set():
        ticks += 1
        time.sleep(1e-4)
    worker.join()
    assert ticks > 10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_default_dtype_is_for_the_bias_alone(dtype):
    torch.set_default_dtype(dtype)
    try:
        for activations in ACTIVATIONS:
            for weight in WEIGHTS:
                layer = fp8.FrozenLinear(K, N, activations=activations, weight=weight)
                assert layer.weight_scale.dtype == torch.float32 and layer.bias.dtype == dtype
                assert layer.input_slot is None or layer.input_slot.dtype == torch.float32
                layer(torch.ones(17, K))
    finally:
        torch.set_default_dtype(torch.float32)


def test_default_device_is_not_for_a_layer_that_names_one():
    with torch.device("meta"):
        layer = fp8.FrozenLinear(K, N, device="cpu", activations="static")
        assert {buffer.device.type for buffer in layer.buffers()} == {"cpu"}
        assert not layer(torch.ones(17, K, device="cpu")).is_meta
