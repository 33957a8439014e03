"""Tuning: when another algorithm is taken, for which problems, and that it is in use then."""

import random
import sys

import pytest
import torch
import torch_fp8 as fp8
from fake_cublaslt import SHAPES
from oracle import E4M3, E5M2
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch_fp8.tuning.search import choose, problems_of
from torch_fp8.tuning.tuning import Problem

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROUNDS = 30


class TestChoice:
    """choose() gets what cuBLASLt's candidates took, round by round; 0 is the default."""

    @staticmethod
    def chosen(*times, margin=0.03):
        return choose([(bytes([i]), list(t)) for i, t in enumerate(times)], margin)

    @staticmethod
    def noisy(rng, level, noise, drift=0.0):
        return [level * (1 + drift * r / ROUNDS) * rng.lognormvariate(0, noise) for r in range(ROUNDS)]

    @pytest.mark.parametrize("noise", [0.01, 0.05, 0.2])
    def test_noise_never_flips(self, noise):
        rng = random.Random(1)
        for _ in range(300):
            assert self.chosen(*(self.noisy(rng, 100, noise, drift=0.2) for _ in range(16))) == 0

    def test_steady_gain_is_kept_under_a_falling_clock(self):
        rng = random.Random(2)
        for _ in range(100):
            assert self.chosen(*(self.noisy(rng, level, 0.02, drift=0.2) for level in (100, 98, 90, 103))) == 2

    def test_small_gain_is_refused_however_steady(self):
        assert self.chosen([100] * ROUNDS, [98] * ROUNDS) == 0
        assert self.chosen([100] * ROUNDS, [97] * ROUNDS) == 0
        assert self.chosen([100] * ROUNDS, [96.9] * ROUNDS) == 1
        assert self.chosen([100] * ROUNDS, [98] * ROUNDS, margin=0.01) == 1

    def test_better_median_of_unsteady_rounds_is_refused(self):
        """10 % better by the median and by every sum, but slower in 4 rounds of 30."""
        default, other = [100] * ROUNDS, [90] * 26 + [101] * 4
        assert self.chosen(default, other) == 0
        assert self.chosen(default, other[:27] + [90] * 3) == 1

    def test_gain_of_unknown_size_is_refused(self):
        """Faster in 27 rounds of 30 and by the median, because something slowed the default in half of them."""
        disturbed = [110 + 10 * i for i in range(15)]
        default, other = [100.5] * 12 + disturbed + [100.5] * 3, [100] * 27 + [250] * 3
        assert self.chosen(default, other) == 0

    def test_best_of_several_and_the_first_of_equals(self):
        assert self.chosen([100] * ROUNDS, [90] * ROUNDS, [80] * ROUNDS, [80] * ROUNDS) == 2
        assert self.chosen([100] * ROUNDS, [100] * ROUNDS) == 0
        assert self.chosen([100] * ROUNDS, margin=0.0) == 0


def layer(inputs=64, outputs=128, bias=False, dtype=BF16, **recipe):
    recipe = fp8.DelayedScaling(**recipe) if recipe else None
    return fp8.Linear(inputs, outputs, bias=bias, device="meta", dtype=dtype, recipe=recipe)


@pytest.fixture
def autocast():
    def switch_on(dtype):
        torch.set_autocast_dtype("cuda", dtype)
        torch.set_autocast_enabled("cuda", True)

    before = torch.get_autocast_dtype("cuda")
    yield switch_on
    torch.set_autocast_enabled("cuda", False)
    torch.set_autocast_dtype("cuda", before)


class TestProblems:
    def problems(self, *layers, tokens=256):
        return problems_of([(layer, tokens) for layer in layers])

    def test_three_gemms(self):
        assert self.problems(layer()) == [
            Problem(256, 128, 64, E4M3, E4M3, BF16, False, False, True),  # fprop
            Problem(256, 64, 128, E5M2, E4M3, BF16, False, False, False),  # dgrad
            Problem(128, 64, 256, E5M2, E4M3, BF16, False, False, False),  # wgrad
        ]

    def test_padding(self):
        """n and k are padded, m is not."""
        assert [p[:3] for p in self.problems(layer(50, 70), tokens=100)] == [
            (100, 80, 64),
            (100, 64, 80),
            (70, 64, 112),
        ]

    def test_recipe(self):
        problems = self.problems(layer(fp8_format="E4M3", fast_accum=("dgrad", "wgrad")))
        assert [p.a_dtype for p in problems] == [E4M3] * 3
        assert [p.fast_accum for p in problems] == [False, True, True]

    @pytest.mark.parametrize("dtype, bias, accumulate", [(BF16, True, False), (FP16, True, False), (FP32, False, True)])
    def test_bias(self, dtype, bias, accumulate):
        """cuBLASLt adds a 16-bit bias in the epilogue; the product is added to a float32 one."""
        fprop, *others = self.problems(layer(bias=True, dtype=dtype))
        assert (fprop.bias, fprop.accumulate) == (bias, accumulate)
        assert {p.out_dtype for p in [fprop, *others]} == {dtype}
        assert not any(p.bias or p.accumulate for p in others)

    def test_autocast(self, autocast):
        autocast(FP16)
        fprop, dgrad, wgrad, dgrad_of_parameters_dtype = self.problems(layer(bias=True, dtype=FP32))
        assert (fprop.out_dtype, fprop.bias, fprop.accumulate) == (FP16, True, False)
        assert (dgrad.out_dtype, dgrad_of_parameters_dtype.out_dtype, wgrad.out_dtype) == (FP16, FP32, FP32)
        assert dgrad_of_parameters_dtype == dgrad._replace(out_dtype=FP32)

    @pytest.mark.parametrize("inputs, accumulate", [(64, True), (50, False)])
    def test_gradient_fused_into_main_grad(self, inputs, accumulate):
        fused = layer(inputs)
        fused.fuse_main_grad = True
        assert [(p.out_dtype, p.accumulate) for p in self.problems(fused)] == [
            (BF16, False), (BF16, False), (FP32, accumulate)
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("granularity", "activations", "tokens", "outputs", "expected"),
        [
            ("tensor", "static", 100, 200, (100, 208, BF16, True, True, "one")),
            ("tensor", "static", 20, 8208, (20, 8208, BF16, True, True, "one")),
            ("channel", "token", 8192, 4096, (8192, 4096, BF16, True, True, "rows")),
            ("channel", "token", 200, 4096, (200, 4096, FP32, False, True, "one")),  # rescaled by a kernel of ours
            ("channel", "static", 8192, 4096, (8192, 4096, BF16, True, True, "rows")),
            ("block", "token", 101, 200, (104, 208, BF16, True, False, "blocks")),
        ],
    )
    def test_frozen(self, granularity, activations, tokens, outputs, expected):
        frozen = fp8.FrozenLinear(256, outputs, device="meta", dtype=BF16, activations=activations, weight=granularity)
        m, n, dtype, bias, fast, scales = expected
        assert self.problems(frozen, tokens=tokens) == [
            Problem(m, n, 256, E4M3, E4M3, dtype, bias, False, fast, scales)
        ]

    @pytest.mark.parametrize(
        ("granularity", "activations", "tokens"),
        [("channel", "token", 32), ("channel", "none", 128), ("block", "static", 64), ("block", "none", 64)],
    )
    def test_frozen_without_a_gemm_in_fp8(self, granularity, activations, tokens):
        frozen = fp8.FrozenLinear(256, 64, device="meta", dtype=BF16, activations=activations, weight=granularity)
        assert self.problems(frozen, tokens=tokens) == []

    @pytest.mark.filterwarnings("ignore:Initializing zero-element")
    def test_each_problem_once(self):
        assert self.problems(layer(), layer(), layer(bias=True)) == [
            *self.problems(layer()), self.problems(layer(bias=True))[0]
        ]  # fmt: skip
        assert self.problems(layer(0, 64)) == []

    def test_siblings_add_to_one_gradient(self):
        class Pair(nn.Module):
            def __init__(self):
                super().__init__()
                self.q_proj, self.k_proj, self.v_proj = (nn.Linear(64, 128, bias=False, dtype=BF16) for _ in range(3))

        model = fp8.convert(Pair(), tokens=None)
        assert model.q_proj.fp8_state.group is not None
        fprop, dgrad, wgrad, added = self.problems(model.q_proj, tokens=256)
        assert (fprop.k, dgrad.n, wgrad.n, dgrad.accumulate) == (64, 64, 64, False)
        assert added == dgrad._replace(accumulate=True)

    def test_gemms_in_16_bits_are_not_tuned(self):
        assert [p.out_dtype for p in self.problems(layer(fp8_gemms=("fprop",)))] == [BF16]

    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("dtype", [BF16, FP32])
    def test_what_a_layer_asks_for(self, device, bias, dtype):
        """The sizes, dtypes and flags that a training step really brings to the backend."""
        real = fp8.Linear(50, 70, bias, device, dtype)
        x = torch.randn(5, 20, 50, device=device, dtype=dtype, requires_grad=True)

        def step():
            with torch.autograd.set_multithreading_enabled(False):  # a GPU's backward has a thread of its own
                real(x).sum().backward()

        assert problems_from(fp8._C.recorded_gemms(step)) == self.problems(real, tokens=100)

    @pytest.mark.parametrize("activations", ["none", "static", "tensor", "token"])
    @pytest.mark.parametrize("weight", ["channel", "tensor", "block"])
    @pytest.mark.parametrize("tokens", [1, 17, 40, 1030])
    def test_what_a_frozen_layer_asks_for(self, device, activations, weight, tokens):
        frozen = fp8.FrozenLinear(256, 1530, device=device, dtype=BF16, activations=activations, weight=weight)
        x = torch.ones(tokens, 256, device=device, dtype=BF16)
        seen = problems_from(fp8._C.recorded_gemms(lambda: frozen(x)))
        if device.type == "cpu" and tokens == 17:  # where a GPU streams the weight
            assert not self.problems(frozen, tokens=tokens) or weight == "block"
            return
        assert seen == self.problems(frozen, tokens=tokens)

    def test_nothing_is_changed_and_little_is_needed(self):
        """The layers are looked at, not called; of other tensors than theirs none has memory."""
        model = fp8.convert(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), tokens=None)
        fp8.freeze(model, filter=["1"])
        for module in model:
            module.forward = None
        before = {name: (t._version, t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
        slots = model[0].fp8_slots.clone()
        problems = self.problems(*model, tokens=2**30)  # x alone would be 128 GiB
        assert len(problems) == 4
        for name, tensor in model.state_dict(keep_vars=True).items():
            version, value = before[name]
            assert tensor._version == version and torch.equal(tensor.view(torch.uint8), value.view(torch.uint8))
        assert torch.equal(model[0].fp8_slots, slots) and model[0].fp8_state.memo.used_roles == 0
        assert all(p.grad is None for p in model.parameters())


def problems_from(gemms):
    return list(dict.fromkeys(Problem(*(getattr(gemm, field) for field in Problem._fields)) for gemm in gemms))


class TestTune:
    def test_what_is_faster_is_in_use_at_once(self, cublaslt):
        tuning = fp8.tune(SHAPES)
        assert [gemm.candidate for gemm in tuning.gemms] == [2, 0, 0] * 2
        assert {(p.m, p.n, p.k): algorithm[0] for p, algorithm in cublaslt.used.items()} == {
            (256, 128, 64): 2, (256, 64, 128): 0, (128, 64, 256): 0,
            (512, 128, 64): 2, (512, 64, 128): 0, (128, 64, 512): 0,
        }  # fmt: skip
        first = tuning.gemms[0]
        assert (first.default_us, first.chosen_us, first.algorithm) == (100.0, 90.0, bytes([2]) * 72)
        assert first.gain == pytest.approx(0.1)
        assert (tuning.cublaslt, tuning.gpu, tuning.capability) == (130100, "NVIDIA H200", "9.0")

    def test_model(self, cublaslt):
        model = fp8.convert(
            nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(64, 128)).bfloat16(), tokens=None
        )
        tuning = fp8.tune(model, tokens=32)
        assert [gemm.problem for gemm in tuning.gemms] == problems_of([(model[0], 32), (model[1], 32)])
        assert len(cublaslt.timed) == len(tuning.gemms) == 6

    def test_the_second_tuning_takes_back_the_first(self, cublaslt):
        fp8.tune(SHAPES)
        fp8.tune(SHAPES, margin=0.2)
        assert {algorithm[0] for algorithm in cublaslt.used.values()} == {0}
        fp8.forget_tuning()
        assert cublaslt.used == {}

    def test_problem_without_algorithms(self, cublaslt):
        tuning = fp8.tune([(64, 16, 16)])
        assert [gemm.problem.k for gemm in tuning.gemms] == [64] and len(cublaslt.timed) == 3

    def test_table(self, cublaslt):
        head, first, second, *_, last = str(fp8.tune(SHAPES)).splitlines()
        assert head.split() == ["m", "x", "n", "x", "k", "default", "us", "chosen", "us", "gain", "which"]
        assert first.startswith("256 x 128 x 64 E4M3 x E4M3 -> bfloat16, fast_accum  ")
        assert first.split()[-5:] == ["100.0", "90.0", "10.0%", "candidate", "2"]
        assert second.split()[-4:] == ["50.0", "50.0", "0.0%", "default"]
        assert len({len(line.rsplit("  ", 1)[0]) for line in (head, first, second)}) == 1  # columns stand in line
        assert last == "2 of 6 GEMMs leave the default of cuBLASLt 130100 on NVIDIA H200"

    def test_without_tqdm(self, cublaslt, monkeypatch):
        monkeypatch.setitem(sys.modules, "tqdm", None)
        assert len(fp8.tune(SHAPES).gemms) == 6

    def test_an_error_changes_nothing(self, cublaslt, monkeypatch):
        fp8.tune(SHAPES)
        before = dict(cublaslt.used)

        def interrupted(problem, rounds):
            if problem.m == 256:
                raise KeyboardInterrupt
            return [(bytes([7]) * 72, [1.0] * rounds)]

        monkeypatch.setattr(fp8._C, "time_algorithms", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fp8.tune(SHAPES[::-1])
        assert cublaslt.used == before

    @pytest.mark.parametrize(
        "what, options, match",
        [
            (SHAPES, {"tokens": 0}, "tokens must be an integer from 1 .*got 0"),
            (SHAPES, {"rounds": 19}, "rounds must be an integer from 20 .*got 19"),
            (SHAPES, {"margin": 1.0}, "margin must be a number from 0 to below 1, got 1.0"),
            (SHAPES, {"margin": float("nan")}, "margin must be a number"),
            (SHAPES, {"margin": "3 %"}, "margin must be a number"),
            (None, {}, r"what must be a model or a list of \(tokens, in_features, out_features\).* got None"),
            ([], {}, r"what must be a model or a list .* got \[\]"),
            ((8192, 4096, 4096), {}, "what must be a model or a list .* got 8192"),
            ([(8192, 4096)], {}, r"what must be a model or a list .* got \(8192, 4096\)"),
            ([(8192, 4096, 0)], {}, r"integers from 1 .* got \(8192, 4096, 0\)"),
            ([(8192, 4096, 1.0)], {}, "integers from 1"),
            (nn.Linear(16, 16), {}, "Linear has no FP8 layer to tune; torch_fp8.convert it first"),
        ],
    )  # fmt: skip
    def test_arguments(self, cublaslt, what, options, match):
        with pytest.raises(ValueError, match=match):
            fp8.tune(what, **options)
        assert not cublaslt.timed and not cublaslt.used

    def test_model_on_another_gpu(self, cublaslt, monkeypatch):
        def on(device):
            there = layer()
            # A tensor that is only said to be there; PyTorch must not look for a real GPU.
            with FakeTensorMode(), monkeypatch.context() as m:
                m.setattr(torch.cuda, "is_available", lambda: False)
                there.weight = nn.Parameter(torch.empty(128, 64, dtype=BF16, device=device))
            return there

        fp8.tune(nn.Sequential(on("cuda:0"), on("cpu"), layer()))
        cublaslt.timed = []
        with pytest.raises(ValueError, match=r"current device, cuda:0, but .* on cuda:1; tune within .*device\(1\)"):
            fp8.tune(nn.Sequential(on("cuda:0"), on("cuda:1")))
        assert not cublaslt.timed


@pytest.fixture(params=["tune", "load"])
def without_gpu(request, tmp_path):
    return {"tune": lambda: fp8.tune(SHAPES), "load": lambda: fp8.load_tuning(tmp_path / "any.json")}[request.param]


class TestNoGpu:
    def test_none_there(self, cublaslt, monkeypatch, without_gpu):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(RuntimeError, match="needs a Hopper GPU, but PyTorch sees none; .* on the machine"):
            without_gpu()

    def test_cpu_only_build(self, cublaslt, monkeypatch, without_gpu):
        monkeypatch.setattr(fp8._C, "toolkit_version", lambda: "")
        monkeypatch.setattr(fp8._C, "why_no_cuda", lambda: "no nvcc")
        with pytest.raises(RuntimeError, match=r"needs a build with CUDA, .* for the CPU only \(no nvcc\); reinstall"):
            without_gpu()

    def test_another_gpu(self, cublaslt, without_gpu):
        cublaslt.gpu, cublaslt.capability = "NVIDIA A100", (8, 0)
        with pytest.raises(RuntimeError, match=r"built for Hopper, but NVIDIA A100 has 8\.0"):
            without_gpu()
        assert not cublaslt.timed
