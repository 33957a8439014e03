"""What the dispatcher knows of the ops: schemas, fake implementations, and that they refuse to be differentiated."""

import pytest
import torch
import torch_fp8
from oracle import E4M3, E5M2
from torch.library import opcheck

ops = torch.ops.torch_fp8


def fp8(rows, cols, dtype, device):
    return torch.randn(rows, cols, device=device).to(dtype)


def samples(device):
    """Arguments of every op, some of each kind."""
    slots = torch_fp8._C.new_slots(device)
    x = torch.randn(3, 5, 40, device=device).bfloat16()
    one = torch.ones(1, device=device)
    a, b = fp8(20, 32, E5M2, device), fp8(48, 32, E4M3, device)
    yield ops.quantize, (x, slots, 0, E4M3), {}
    yield ops.quantize, (x, slots, 2, E5M2), {"columnwise": True, "rowwise": False, "dbias": torch.float32}
    yield ops.quantize, (x.float(), slots, 1, E4M3), {"own_amax": True, "power_of_two": True, "record": False}
    yield ops.quantize, (x * 1e6, slots, 1, E4M3), {"columnwise": True, "dbias": torch.bfloat16, "recast": True}
    yield ops.count_losses, (x, slots, 0, E4M3), {"own_amax": True}
    yield ops.frozen_linear, (x, fp8(24, 40, E4M3, device), torch.ones(24, 1, device=device), None, None, 3), {}
    dy, weight = torch.randn(3, 20, 128, device=device).bfloat16(), fp8(128, 40, E4M3, device)
    stack, of_stack = fp8(3 * 24, 40, E4M3, device).view(3, 24, 40), torch.ones(3, 24, 1, device=device)
    yield ops.frozen_experts, (x[0], torch.tensor([0, 2, 2, 4]), stack, of_stack, None, None, 3), {"parts": 2}
    rows = torch.tensor([0, 2, 2, 19])
    yield ops.frozen_experts_backward, (dy[0, :, :24], rows, stack, of_stack, 3, 2, torch.float32), {}
    for size in ((1,), (128, 1), (1, 1)):
        scale = torch.ones(size, device=device)
        yield ops.frozen_linear_backward, (dy, weight, scale, 3, torch.float32), {}
    yield ops.gemm, (a, b, one, one.clone(), None, [4, 5, 48], torch.bfloat16), {}
    yield ops.gemm, (a, b, one, one.clone(), torch.randn(41, device=device), [20, 41], torch.float32), {}
    yield ops.gemm_accumulate_, (torch.zeros(20, 48, device=device), a, b, one, one.clone()), {}
    states = [torch_fp8._C.new_slots(device) for _ in range(2)]
    histories = [torch.zeros(3, n, device=device) for n in (1, 16)]
    yield ops.update_scales_, (states, histories, [448.0, 448.0, 57344.0] * 2, [0, 1]), {}
    slots_of_ten = torch.ones(10, 4, device=device)
    mixed = [slots_of_ten, torch_fp8._C.new_slots(device)], [torch.zeros(n, 2, device=device) for n in (10, 3)]
    yield ops.update_scales_, (*mixed, [448.0] * 13, [0, 1] * 6 + [0]), {}
    casts = [torch_fp8.DelayedScaling().options().cast(role).packed for role in range(3)]
    yield ops.cast, (x, slots, 0, casts, 0, True, True, False, True), {}
    product = (0, slots, 0, casts, 0, True, True, True, True)
    yield ops.activation_cast, (x, x.clone(), *product), {}
    yield ops.activation_cast, (x, None, *product), {"halves": 1}
    gradient = (0, slots, slots.clone(), 2, casts, [7, 0], True, True, torch.float32)
    yield ops.activation_backward_cast, (x.clone(), x, x * 2, *gradient), {}
    gradient = (0, slots, None, 2, casts, [0], True, True, torch.float32)
    yield ops.activation_backward_cast, (x[..., :20].clone(), x, None, *gradient), {"halves": 2}
    gain, rest = torch.randn(40, device=device), (0, casts, 0, True, True)
    yield ops.norm_cast, (x, x.clone(), gain, None, 1e-5, False, 1.0, slots, *rest, True, True, True), {}
    yield ops.norm_cast, (x, None, gain, gain.clone(), 1e-5, True, 0.0, slots, *rest, True, False, False), {}
    yield ops.norm_cast, (x, None, None, None, 1e-5, False, 0.0, None, *rest, True, True, True), {}
    yield ops.frozen_norm, (x, x.clone(), gain, None, 1e-5, False, 1.0), {}
    yield ops.frozen_norm, (x, None, gain, gain.clone(), 1e-5, True, 0.0, slots[:1].clone()), {}
    yield ops.frozen_norm, (x, None, None, None, 1e-5, False, 0.0), {"codes": False}
    stats = torch.ones(2, 15, device=device)
    yield ops.norm_backward, (x.clone(), x, x * 2, gain, stats, True, 0.0, True, True), {}
    yield ops.norm_backward, (x.clone(), x, None, None, stats[0].clone(), False, 0.0, True, False), {}


def is_fp8(arg):
    return isinstance(arg, torch.Tensor) and arg.dtype in (E4M3, E5M2)


@pytest.mark.parametrize("index", range(29))
def test_opcheck(device, index):
    op, args, kwargs = list(samples(device))[index]
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if any(map(is_fp8, args)):
        # PyTorch's schema check compares arguments with allclose, which has no FP8 kernels; see the next test.
        checks.remove("test_schema")
    opcheck(op.default, args, kwargs, test_utils=checks)


@pytest.mark.parametrize("index", range(29))
def test_only_what_the_schema_names_is_mutated(device, index):
    op, args, kwargs = list(samples(device))[index]
    tensors = [(a, t) for a, arg in zip(op.default._schema.arguments, args)
               for t in (arg if isinstance(arg, list) else [arg]) if isinstance(t, torch.Tensor)]  # fmt: skip
    before = [t.view(torch.uint8).clone() for _, t in tensors]
    op(*args, **kwargs)
    for (argument, after), was in zip(tensors, before):
        mutable = argument.alias_info is not None and argument.alias_info.is_write
        assert mutable or torch.equal(after.view(torch.uint8), was), argument.name


def test_an_op_alone_refuses_to_be_differentiated(device):
    x = torch.randn(16, 16, device=device, requires_grad=True)
    q = ops.quantize(x, torch_fp8._C.new_slots(device), 0, E4M3)[0]
    with pytest.raises(RuntimeError, match=r"torch_fp8::quantize|does not require grad"):
        q.float().sum().backward()
