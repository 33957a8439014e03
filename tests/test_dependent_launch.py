"""The kernels for few rows begin while those in front still run. What they read is what a stream's order promises, even
where the last kernel in front wrote it, and lets its successors start before it has stored anything."""

import pytest
import torch
from oracle import E4M3, OUTPUT, accumulation

NONE, TOKEN = 0, 3
ROUNDS = 40  # with fresh values each: a kernel that reads too early is wrong in every second of them
ROWS = [1, 2, 6, 7, 8, 9, 16, 17, 32]
# (out, in): blocks that are all resident at once, and more of them; 7 and 8 rows in a ring.
SIZES = [(4096, 2048), (8192, 2048)]
KINDS = ["tensor", "channel", "block"]
ops = torch.ops.torch_fp8

pytestmark = [
    pytest.mark.parametrize("graphed", [True, False], ids=["graph", "eager"]),
    pytest.mark.parametrize(("n", "k"), SIZES),
    pytest.mark.parametrize("m", ROWS),
]


def random_codes(n, k, device):
    return (torch.randn(n, k, device=device) * 100).clamp(-448, 448).to(E4M3)


def random_scale(n, k, kind, device):
    size = {"tensor": (1,), "channel": (n, 1), "block": (n // 128, k // 128)}[kind]
    return torch.rand(size, device=device) * 2.0**-7 + 2.0**-9


class Layer:
    """frozen_linear on an x that its own quantisation would not change."""

    def __init__(self, m, n, k, device):
        x = random_codes(m, k, device)
        x.view(torch.uint8)[:, ::128] = 0x7E  # 448: every row, and every 128 columns of it, are scaled by 1
        self.x, self.activations = x.bfloat16(), NONE if m <= 16 else TOKEN

    def __call__(self, weight, scale, bias):
        return ops.frozen_linear(self.x, weight, scale, bias, None, self.activations)

    def check(self, y, weight, scale, bias):
        assert torch.equal(y, self(weight, scale, bias))  # by the same kernel, when nothing else runs
        spread = scale.double()
        if scale.dim() == 2 and scale.size(1) > 1:
            spread = spread.repeat_interleave(128, 0).repeat_interleave(128, 1)
        x, w, b = self.x.double(), weight.double() * spread, bias.bfloat16().double()
        expected, size = x @ w.T + b, x.abs() @ w.abs().T + b.abs()
        bound = OUTPUT[torch.bfloat16] * expected.abs() + accumulation(y.device, x.shape[1]) * size
        assert ((y.double() - expected).abs() <= bound).all()


def rounds(work, graphed, renew, write=lambda: None):
    """The results of work(), each time with new values: of a graph of it, or of kernels that wait for the host to have
    queued them all. write() is queued directly in front."""
    graph = torch.cuda.CUDAGraph()
    if graphed:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            result = work()
    for _ in range(ROUNDS):
        renew()
        torch.cuda.synchronize()
        torch.cuda._sleep(2_000_000)
        write()
        if graphed:
            graph.replay()
        else:
            result = work()
        torch.cuda.synchronize()
        yield result


def quantized(source, slots, dbias=None):
    """Codes, their multiplier and the column sums. Each of the kernels lets the next one start at once."""
    weight, _, scale, sums = ops.quantize(source, slots, 0, E4M3, own_amax=True, record=False, dbias=dbias)
    return weight, scale, sums


@pytest.mark.parametrize("kind", KINDS)
def test_codes_that_the_kernel_in_front_writes(cuda, m, n, k, kind, graphed):
    layer, source = Layer(m, n, k, cuda), torch.empty(n, k, device=cuda, dtype=torch.bfloat16)
    bias, scale = torch.randn(n, device=cuda).bfloat16(), random_scale(n, k, kind, cuda)
    slots = torch.zeros(1, 4, device=cuda)

    def work():
        weight, own_scale, _ = quantized(source, slots)
        arguments = weight, own_scale if kind == "tensor" else scale, bias
        return layer(*arguments), arguments

    for y, arguments in rounds(work, graphed, source.normal_):
        layer.check(y, *arguments)


def test_codes_and_scale_behind_further_kernels_that_start_early(cuda, m, n, k, graphed):
    """The kernel in front runs at once with those in front of it."""
    layer, source = Layer(m, n, k, cuda), torch.empty(n, k, device=cuda, dtype=torch.bfloat16)
    rows, slots = torch.empty(256, n, device=cuda, dtype=torch.bfloat16), torch.zeros(1, 4, device=cuda)

    def work():
        weight, scale, _ = quantized(source, slots)
        *_, bias = quantized(rows, slots, torch.bfloat16)
        return layer(weight, scale, bias), (weight, scale, bias)

    def renew():
        source.normal_(), rows.normal_()

    for y, arguments in rounds(work, graphed, renew):
        layer.check(y, *arguments)


@pytest.mark.parametrize(
    ("last", "bias_dtype"),
    [("weight", torch.bfloat16), ("scale", torch.bfloat16), ("bias", torch.bfloat16), ("bias", torch.float32)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_weight_scale_and_bias_that_are_overwritten_between_calls(cuda, m, n, k, kind, last, bias_dtype, graphed):
    """Directly in front of a call, and then once more. The call behind those may read early what stands by then."""
    layer = Layer(m, n, k, cuda)

    def fresh():
        return {
            "weight": random_codes(n, k, cuda),
            "scale": random_scale(n, k, kind, cuda),
            "bias": torch.randn(n, device=cuda, dtype=bias_dtype),
        }

    used, old, new = fresh(), fresh(), fresh()

    def overwrite(values):
        for name in sorted(used, key=last.__eq__):
            to, value = (t.view(torch.int8) if name == "weight" else t for t in (used[name], values[name]))
            torch.add(value, 0, out=to)  # by a kernel; copy_ would be a copy of the driver's

    def work():
        first = layer(**used)
        overwrite(new)
        return first, layer(**used), layer(**used)

    def renew():
        for values in (old, new):
            for name, value in fresh().items():
                values[name].copy_(value)

    for first, second, third in rounds(work, graphed, renew, lambda: overwrite(old)):
        layer.check(first, **old)
        layer.check(second, **new)
        assert torch.equal(second, third)
