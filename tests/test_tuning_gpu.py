"""Tuning on a real GPU: every algorithm that may be chosen is right, repeats to the bit, and can be left again."""

from dataclasses import replace

import pytest
import torch
import torch_fp8 as fp8
from oracle import OUTPUT
from test_gemm import assert_within, operand, product, scale_inv
from test_launches import device_work
from torch import nn
from torch_fp8.layers.frozen import ACTIVATIONS
from torch_fp8.observe.emulate import emulated_linear
from torch_fp8.tuning.search import problems_of

SHAPES = ((512, 1024, 768), (100, 72, 200))


@pytest.fixture(autouse=True)
def _untuned(cuda):
    fp8.forget_tuning()
    yield
    fp8.forget_tuning()


def run(problem):
    """The product of the problem's own operands, seeded: (out, exact, bound)."""
    torch.manual_seed(7)
    device = torch.device("cuda")
    a, b = (
        operand(problem.m, problem.k, problem.a_dtype, device),
        operand(problem.n, problem.k, problem.b_dtype, device),
    )
    sa, sb = scale_inv(0.03, device), scale_inv(2.5, device)
    exact, bound = product(a, b, sa, sb, device)
    size, fast = [problem.m, problem.n], problem.fast_accum
    if problem.accumulate:
        out = torch.randn(size, device=device).to(problem.out_dtype)
        exact = exact + out.double()
        torch.ops.torch_fp8.gemm_accumulate_(out, a, b, sa, sb, fast)
    else:
        bias = torch.randn(problem.n, device=device).to(problem.out_dtype) if problem.bias else None
        out = torch.ops.torch_fp8.gemm(a, b, sa, sb, bias, size, problem.out_dtype, fast)
        exact = exact + (bias.double() if problem.bias else 0)
    return out, exact, bound + OUTPUT[problem.out_dtype] * exact.abs()


def fused_model():
    """Every kind of GEMM: with bias in the epilogue, without, and accumulated in float32."""
    model = nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 256, bias=False)).cuda().bfloat16()
    fp8.convert(model, tokens=None)
    model[1].fuse_main_grad = True
    return model


def test_tuned_products_are_right_and_repeat():
    for what in (SHAPES, fused_model()):
        tuning = fp8.tune(what, tokens=384, rounds=20, margin=0.0)
        assert len(tuning.gemms) == 6
        for gemm in tuning.gemms:
            assert 0 < gemm.chosen_us <= gemm.default_us < 1e4
            out, exact, bound = run(gemm.problem)
            assert_within(out, exact, bound)
            assert torch.equal(run(gemm.problem)[0], out)


def test_every_candidate_is_right():
    """Not only the one that wins here today: another GPU or a wider problem may choose any of them."""
    for problem in problems_of([(layer, 384) for layer in fused_model()]):
        candidates = fp8._C.time_algorithms(problem.native(), 2)
        assert len(candidates) > 1
        for algorithm, times in candidates:
            assert len(algorithm) == 72 and len(times) == 2
            fp8._C.check_algorithm(problem.native(), algorithm)
            fp8._C.use_algorithms([(problem.native(), algorithm)])
            out, exact, bound = run(problem)
            assert_within(out, exact, bound)
            assert torch.equal(run(problem)[0], out)


@pytest.mark.parametrize(
    ("weight", "activations"), [("tensor", "tensor"), ("channel", "token"), ("channel", "tensor"), ("block", "token")]
)
@pytest.mark.parametrize("tokens", [100, 2048])
def test_frozen_layers(weight, activations, tokens):
    """What is tuned is what a frozen layer runs: with another algorithm it launches another kernel."""
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(4096, 1280, device="cuda", dtype=torch.bfloat16))
    fp8.freeze(model, activations, weight)
    x = torch.randn(tokens, 4096, device="cuda", dtype=torch.bfloat16)
    expected = emulated_linear(
        x, model[0].weight, model[0].weight_scale, model[0].bias, None, ACTIVATIONS.index(activations)
    ).float()
    (problem,) = problems_of([(model[0], tokens)])
    products = set()
    for algorithm, _ in fp8._C.time_algorithms(problem.native(), 1):
        fp8._C.use_algorithms([(problem.native(), algorithm)])
        assert (model(x).float() - expected).norm() < 0.02 * expected.norm()
        products.add(tuple(name for name in device_work(lambda: model(x)) if "torch_fp8" not in name))
    if problem.scales == "one":  # in the other modes cuBLASLt may have one kernel only
        assert len(products) > 1
    fp8.tune(model, tokens=tokens, rounds=20)


def test_forgotten_tuning_and_default_give_the_same_bits():
    problems = problems_of([(layer, 384) for layer in fused_model()])
    before = [run(problem)[0] for problem in problems]
    fp8.tune(fused_model(), tokens=384, rounds=20, margin=0.99)  # nothing is that much faster
    assert all(torch.equal(run(p)[0], out) for p, out in zip(problems, before, strict=True))
    fp8.tune(fused_model(), tokens=384, rounds=20, margin=0.0)
    fp8.forget_tuning()
    assert all(torch.equal(run(p)[0], out) for p, out in zip(problems, before, strict=True))


def test_round_trip(tmp_path):
    tuning = fp8.tune(SHAPES, rounds=20, margin=0.0)
    tuned = [run(gemm.problem)[0] for gemm in tuning.gemms]
    tuning.save(tmp_path / "tuning.json")
    fp8.forget_tuning()
    assert fp8.load_tuning(tmp_path / "tuning.json") == tuning
    assert all(torch.equal(run(g.problem)[0], out) for g, out in zip(tuning.gemms, tuned, strict=True))


def test_nonsense_is_refused(tmp_path):
    tuning = fp8.tune(SHAPES, rounds=20)
    nonsense = replace(tuning.gemms[-1], algorithm=b"\xff" * 72)
    replace(tuning, gemms=(*tuning.gemms[:-1], nonsense)).save(tmp_path / "tuning.json")
    with pytest.raises(ValueError, match="expected an algorithm that cuBLASLt takes"):
        fp8.load_tuning(tmp_path / "tuning.json")


def test_tuning_leaves_the_random_numbers_alone():
    """Else a run that tuned and one that loaded the tuning would train on different numbers."""
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    fp8.tune(SHAPES, rounds=20)
    assert torch.equal(torch.get_rng_state(), states[0]) and torch.equal(torch.cuda.get_rng_state(), states[1])
