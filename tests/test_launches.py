"""What a training step puts on the GPU: how many kernels, how much memory, and nothing that grows."""

import resource

import pytest
import torch
import torch_fp8 as fp8
from torch_fp8.layers.mlp import mlp

MIB = 2**20


def trained(m, k, n, cuda, *, bias):
    """A layer in its steady state, an input and a gradient."""
    layer = fp8.Linear(k, n, bias, cuda, torch.bfloat16)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    x = torch.randn(m, k, device=cuda, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(m, n, device=cuda, dtype=torch.bfloat16)
    for _ in range(3):
        layer(x).backward(dy)
        optimizer.step()
        clear(layer, x)
    return layer, x, dy


def clear(layer, x):
    x.grad = layer.weight.grad = None
    if layer.bias is not None:
        layer.bias.grad = None


def device_work(call):
    """Names of all that the call puts on the GPU: kernels, copies, memsets."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    on_gpu = (event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    return [event.name for event in on_gpu]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_kernels_of_a_micro_batch(cuda, bias, first):
    """Forward: cast, GEMM. Backward: cast, two GEMMs, and one kernel for the bias gradient. The first of a step casts
    the weight, too, and sees whether it has left the range of its scale."""
    layer, x, dy = trained(2048, 1024, 2048, cuda, bias=bias)
    for _ in range(4):  # as many micro-batches are looked for in the next step
        layer(x).backward(dy)
    layer.fp8_state.memo.end_step()
    for _ in range(2):
        layer(x).backward(dy)
    if first:
        layer.fp8_state.memo.end_step()
    x.grad = None
    names = device_work(lambda: layer(x).backward(dy))
    ours = [name for name in names if "torch_fp8" in name]
    assert sum("quantize_kernel" in name for name in ours) == 2 + first, names
    assert sum("recast" in name for name in ours) == first, names
    assert sum("add_column_sums" in name for name in ours) == bias, names
    # Some of cuBLASLt's algorithms clear a counter first, one a GEMM; PyTorch adds the parameters' gradients.
    kernels = [name for name in names if not name.startswith("Memset") and "elementwise" not in name]
    assert sum(name.startswith("Memset") for name in names) <= 3, names
    assert len(kernels) == 5 + bias + 2 * first, names


def test_a_scaling_update_is_one_kernel(cuda):
    """From the second on: after the first the host reads which roles have a history now."""
    model = torch.nn.Sequential(*(fp8.Linear(64, 64, device=cuda) for _ in range(20)))
    for _ in range(2):
        model(torch.randn(8, 64, device=cuda)).sum().backward()
        names = device_work(lambda: fp8.update_scales(model))
    assert len(names) == 1 and "update_scales" in names[0], names


@pytest.mark.parametrize("rows, kernels", [(512, 1), (528, 3)])
def test_kernels_of_a_cast_by_the_own_amax(cuda, rows, kernels):
    x = torch.randn(rows, 512, device=cuda, dtype=torch.bfloat16)
    slots = fp8._C.new_slots(cuda)
    names = device_work(lambda: torch.ops.torch_fp8.quantize(x, slots, 0, torch.float8_e4m3fn, own_amax=True))
    assert len(names) == kernels, names


@pytest.mark.parametrize("recipe", [fp8.DelayedScaling(), fp8.CurrentScaling()])
def test_a_small_layer_casts_input_and_weight_in_one_kernel(cuda, recipe):
    layer = fp8.Linear(256, 512, device=cuda, dtype=torch.bfloat16, recipe=recipe)
    x = torch.randn(100, 256, device=cuda, dtype=torch.bfloat16)
    with torch.no_grad():
        layer(x)  # the host reads once whether the roles have a history
        names = [name for name in device_work(lambda: layer(x)) if not name.startswith("Memset")]
    assert len(names) == 2 and "small_cast" in names[0], names


def test_memory_of_forward_and_backward(cuda):
    """After forward: y, and one byte an element of x and of the weight. In backward at most one gradient beside dy's
    two FP8 copies."""
    m, k, n = 4096, 1024, 4096
    layer, x, dy = trained(m, k, n, cuda, bias=False)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = layer(x)
    kept = torch.cuda.memory_allocated() - before
    assert kept <= 2 * m * n + m * k + k * n + MIB
    y.backward(dy)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= kept + 2 * m * n + max(2 * m * k, 2 * k * n) + MIB


def test_10000_steps_of_varying_shapes_leave_memory_flat(cuda):
    layer = fp8.Linear(256, 256, device=cuda, dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-4)
    sizes = torch.randint(1, 200, (10_000,), generator=torch.Generator().manual_seed(0)).tolist()

    def footprint():
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    for step, m in enumerate(sizes):
        layer(torch.randn(m, 256, device=cuda, dtype=torch.bfloat16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 2500:  # by now every shape has come, and has its plans
            on_gpu, on_host = footprint()
    assert footprint()[0] == on_gpu
    assert footprint()[1] - on_host < 16 * MIB


def launches_of_an_mlp(cuda, one_layer, recompute):
    sizes = [(1024, 2 * 2816)] if one_layer else [(1024, 2816)] * 2
    model = torch.nn.ModuleList(fp8.Linear(*size, False, cuda, torch.bfloat16) for size in [*sizes, (2816, 1024)])
    if not one_layer:
        fp8.share_input([*model[:2]])
    for layer in model:
        layer.fp8_state.keep_codes(not recompute)
    layers = (None, *model) if one_layer else model
    x = torch.randn(2048, 1024, device=cuda, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn_like(x)
    for _ in range(3):
        mlp(x, *layers, "silu", halves=int(one_layer)).backward(dy)
        fp8.update_scales(model)
        model.zero_grad()
        x.grad = None
    names = device_work(lambda: mlp(x, *layers, "silu", halves=int(one_layer)).backward(dy))
    return [name for name in names if not name.startswith("Memset")]


@pytest.mark.parametrize("recompute", [False, True])
def test_an_mlp_of_one_layer_launches_less_than_one_of_two(cuda, recompute):
    """And copies nothing: what stands between its layers is read and written where it lies."""
    two, one = (launches_of_an_mlp(cuda, one_layer, recompute) for one_layer in (False, True))
    assert sum("activate_backward" in name for name in one) == 1, one
    assert not any("copy" in name.lower() for name in one), one
    assert len(one) < len(two), (one, two)


def test_a_block_casts_what_its_norms_and_its_mlp_hand_over_nowhere_else(cuda):
    """Casts of a step: of the attention's result, of the gradients of o, down, q, k and v, and of seven weights."""
    block = fp8.TransformerBlock(1024, 8, 2816, num_kv_heads=2, device=cuda, dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.0)
    x = torch.randn(2, 1024, 1024, device=cuda, dtype=torch.bfloat16, requires_grad=True)
    cos, sin = torch.randn(2, 1024, 128, device=cuda)

    def step():
        block(x, cos, sin).sum().backward()

    for _ in range(3):
        step(), optimizer.step(), optimizer.zero_grad()
    names = device_work(step)
    ours = [name for name in names if "torch_fp8" in name]
    assert sum("quantize_kernel" in name for name in ours) == 5 + 6, names
    assert sum("small_cast" in name for name in ours) == 2, names  # the weights of k and v
    assert sum("norm" in name and "backward" not in name and "norm_any" not in name for name in ours) >= 2, names
    assert sum("rotary" in name for name in ours) == 2, names
