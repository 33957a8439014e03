"""fuse of other people's modules: what computes what a fused module does is fused, and nothing else."""

import contextlib
import copy
import random
from collections import Counter

import pytest
import torch
import torch_fp8 as fp8
from casts import count_casts
from families import (
    converted,
    counts,
    fused_calls,
    fused_model,
    ids_of,
    off,
    transformers,
)
from torch import nn
from torch.nn import functional as F
from torch_fp8.layers.fused import FusedNorm, fused_modules
from torch_fp8.layers.linear import fp8_layers

from models import gpt


class Rms(nn.Module):
    def __init__(self, width=64, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Mlp(nn.Module):
    def __init__(self, width=64, bias=False):
        super().__init__()
        self.w1 = nn.Linear(width, 128, bias)
        self.w2 = nn.Linear(128, width, bias)
        self.w3 = nn.Linear(width, 128, bias)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Mix(nn.Module):
    """In the attention's place."""

    def __init__(self, width=64):
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x, mask=None, *, factor=1.0):
        y = self.b(self.a(x).sin())
        return factor * (y if mask is None else y * mask)


class Block(nn.Module):
    def __init__(self, mlp=Mlp, norm=Rms):
        super().__init__()
        self.n1, self.n2, self.mix, self.mlp = norm(), norm(), Mix(), mlp()

    def forward(self, x):
        x = x + self.mix(self.n1(x))
        return x + self.mlp(self.n2(x))


def of(block, dtype=torch.float32):
    torch.manual_seed(0)
    return fp8.convert(nn.Sequential(block().to(dtype), block().to(dtype)), tokens=None)


def assert_same(model, plain, *args, tolerance=0.08, **kwargs):
    """As a call of each of two models computes it, forward and backward."""
    results = []
    for m in (model, plain):
        torch.manual_seed(5)
        x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = m[0](x, *args, **kwargs)
        y = m[1](y, *args, **kwargs)
        (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
        results.append((y, x.grad, *(p.grad for p in m.parameters() if p.grad is not None)))
        m.zero_grad()
    assert len(results[0]) == len(results[1])
    for got, right in zip(*results):
        assert got.dtype == right.dtype and got.shape == right.shape
        assert off(got, right) < tolerance or right.norm() == 0


def test_ones_own_block():
    plain = of(Block)
    model = fp8.fuse(copy.deepcopy(plain))
    assert counts(model) == (4, 2, 2, 0)
    with fused_calls() as calls:
        assert_same(model, plain)
    assert calls == {True: 2}
    empty = torch.zeros(0, 5, 64)
    assert model(empty).shape == plain(empty).shape


def test_the_gpt_of_the_examples():
    torch.manual_seed(0)
    shape = gpt.Shape(n_layer=2, n_head=4, n_embd=64)
    plain = fp8.convert(gpt.GPT(shape, vocab=97, context=32), tokens=None)
    model = fp8.fuse(copy.deepcopy(plain))
    assert counts(model) == (5, 2, 2, 0)
    losses = []
    for m in (plain, model):
        optimizer = torch.optim.SGD(m.parameters(), 0.1)
        for step in range(4):
            loss = m(ids_of(step), ids_of(step + 1))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert torch.tensor(losses[:4]).sub(torch.tensor(losses[4:])).abs().max() < 0.02


def test_pytorchs_encoder_layer():
    def layer():
        return nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)

    plain = of(layer)
    model = fp8.fuse(copy.deepcopy(plain))
    assert counts(model) == (4, 0, 0, 0)
    assert_same(model, plain)


class Extra(Block):
    """With arguments that are handed on, by position and by keyword, and defaults of its own."""

    def forward(self, x, mask=None, factor=2.0):
        x = x + self.mix(self.n1(x), mask, factor=factor)
        return x + self.mlp(self.n2(x))


def test_arguments_and_defaults():
    plain = of(Extra)
    model = fp8.fuse(copy.deepcopy(plain))
    assert counts(model)[2] == 2
    mask = torch.rand(2, 5, 1, generator=torch.Generator().manual_seed(1))
    with fused_calls() as calls:
        for args, kwargs in (((), {}), ((mask,), {}), ((mask, 3.0), {}), ((), {"mask": mask}), ((), {"factor": 0.5})):
            assert_same(model, plain, *args, **kwargs)
    assert calls == {True: 10}
    for args, kwargs in (
        ((), {}),
        ((1, 2, 3, 4), {}),
        ((torch.ones(2, 64),), {"x": 1}),
        ((torch.ones(2, 64),), {"y": 1}),
    ):
        with pytest.raises(TypeError) as right:
            plain[0](*args, **kwargs)
        with pytest.raises(TypeError) as got:
            model[0](*args, **kwargs)
        assert str(got.value) == str(right.value)


class Switch(Block):
    """Its argument decides what it computes."""

    def forward(self, x, parallel=True):
        if parallel:
            return x + self.mix(self.n1(x)) + self.mlp(self.n2(x))
        x = x + self.mix(self.n1(x))
        return x + self.mlp(self.n2(x))


class Unless(Block):
    def forward(self, x, scale=None):
        x = x + self.mix(self.n1(x))
        return x + self.mlp(self.n2(x)) * (1 if scale is None else scale)


@pytest.mark.parametrize("block, values", [(Switch, (True, False)), (Unless, (None, 3.0))])
def test_arguments_that_decide(block, values):
    plain = of(block)
    model = fp8.fuse(copy.deepcopy(plain))
    for value in values:
        assert_same(model, plain, value)


def test_calls_by_name():
    class Named(Block):
        def forward(self, x):
            x = x + self.mix(x=self.n1(x=x))
            return x + self.mlp(x=self.n2(x=x))

    plain = of(Named)
    model = fp8.fuse(copy.deepcopy(plain))
    assert_same(model, plain)
    norm, mlp = fused_modules(model)["0.n1"], fused_modules(model)["0.mlp"]
    x = torch.randn(2, 64)
    assert torch.equal(norm(x=x), plain[0].n1(x)) and off(mlp(x=x), plain[0].mlp(x)) < 0.05


class Drops(Block):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = x + self.drop(self.mix(self.n1(x)))
        return x + self.mlp(self.n2(x))


class DropsByFunction(Block):
    def forward(self, x):
        x = x + F.dropout(self.mix(self.n1(x)), 0.5, self.training)
        return x + self.mlp(self.n2(x))


class SkipsLayers(Block):
    def forward(self, x):
        if self.training and torch.rand([]) < 1e-9:
            return x
        x = x + self.mix(self.n1(x))
        return x + self.mlp(self.n2(x))


class Multiplies(Block):
    def forward(self, x):
        x = x + 0.22 * self.mix(self.n1(x))
        return x + self.mlp(self.n2(x))


class Learns(Block):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(64))

    def forward(self, x):
        x = x + self.scale * self.mix(self.n1(x))
        return x + self.mlp(self.n2(x))


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(64))

    def forward(self, x):
        return x * self.gamma


class LearnsBelow(Block):
    """timm's LayerScale, of ones."""

    def __init__(self):
        super().__init__()
        self.ls1, self.ls2 = Scale(), Scale()

    def forward(self, x):
        x = x + self.ls1(self.mix(self.n1(x)))
        return x + self.ls2(self.mlp(self.n2(x)))


class Buffered(Block):
    def __init__(self):
        super().__init__()
        self.register_buffer("factor", torch.ones(()))

    def forward(self, x):
        x = x + self.factor * self.mix(self.n1(x))
        return x + self.mlp(self.n2(x))


class Detaches(Block):
    def forward(self, x):
        x = x.detach() + self.mix(self.n1(x))
        return x + self.mlp(self.n2(x))


class Casts(Block):
    def forward(self, x):
        x = x + self.mix(self.n1(x))
        return (x + self.mlp(self.n2(x))).to(x.dtype).to(torch.float64 if x.dtype == torch.float64 else torch.float32)


class InPlace(Block):
    def forward(self, x):
        y = self.mix(self.n1(x))
        y += x
        return y + self.mlp(self.n2(y))


class Pair(Block):
    def forward(self, x):
        x = x + self.mix(self.n1(x))
        return x + self.mlp(self.n2(x)), None


class Twice(Block):
    def forward(self, x):
        x = x + self.mix(self.n1(x))
        x = x + self.mlp(self.n2(x))
        return x + self.mlp(self.n2(x))


class Evaluates(Block):
    def forward(self, x):
        x = x + self.mix(self.n1(x))
        return x + self.mlp(self.n2(x)) if self.training else x - self.mlp(self.n2(x))


class Raises(Block):
    def forward(self, x):
        raise ValueError("no")


class Garbage(Block):
    def forward(self, x):
        return "garbage"


class Open(Block):
    def forward(self, *args):
        (x,) = args
        x = x + self.mix(self.n1(x))
        return x + self.mlp(self.n2(x))


class Clips(Block):
    """Beyond what numbers of a usual size show."""

    def forward(self, x):
        x = x + self.mix(self.n1(x))
        return (x + self.mlp(self.n2(x))).clamp(-6e4, 6e4)


class ClipsHalf(Block):
    def forward(self, x):
        x = x + self.mix(self.n1(x))
        x = x + self.mlp(self.n2(x))
        return x.clamp(-64512, 64512) if x.dtype == torch.float16 else x


class OfBatches(Block):
    def forward(self, x):
        x = x + self.mix(self.n1(x - x.mean(0)))
        return x + self.mlp(self.n2(x))


class OfTokens(Block):
    def forward(self, x):
        x = x + self.mix(self.n1(x))
        return x + self.mlp(self.n2(x)) if x.shape[1] < 4 else x - self.mlp(self.n2(x))


class OfGradients(Block):
    def forward(self, x):
        x = x + self.mix(self.n1(x))
        return x + self.mlp(self.n2(x)) if torch.is_grad_enabled() else x - self.mlp(self.n2(x))


class Auxiliary(Block):
    def forward(self, x):
        self.loss = x.square().mean()
        x = x + self.mix(self.n1(x))
        return x + self.mlp(self.n2(x))


class Appends(Block):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        x = x + self.mix(self.n1(x))
        return x + self.mlp(self.n2(x))


HOSTILE = [
    Clips, ClipsHalf, OfBatches, OfTokens, OfGradients, Auxiliary, Appends, Drops, DropsByFunction, SkipsLayers,
    Multiplies, Learns, LearnsBelow, Buffered, Detaches, Casts, Pair, Twice, Evaluates, Raises, Garbage, Open,
]  # fmt: skip


class Needs(Block):
    """None is an argument, too, and not what the mask that is made of it is."""

    def forward(self, x, mask):
        mask = torch.full((), 0.5) if mask is None else mask
        x = x + self.mix(self.n1(x), mask)
        return x + self.mlp(self.n2(x))


class Converts(Block):
    def forward(self, x, mask=None):
        x = x + self.mix(self.n1(x), 1 - mask if torch.is_tensor(mask) else mask)
        return x + self.mlp(self.n2(x))


class Unpacks(Block):
    def forward(self, x, mask=None):
        if isinstance(mask, dict):
            x = x + mask["prompt"]
        x = x + self.mix(self.n1(x), None if isinstance(mask, dict) else mask)
        return x + self.mlp(self.n2(x))


class ReadsRest(Block):
    def forward(self, x, **kwargs):
        x = x + kwargs.get("scale", 1.0) * self.mix(self.n1(x))
        return x + self.mlp(self.n2(x))


@pytest.mark.parametrize(
    "block, given",
    [
        (Needs, {"mask": None}), (Converts, {"mask": torch.full((), 0.3)}), (ReadsRest, {"scale": 0.3}),
        (Unpacks, {"mask": {"prompt": 2.0}}),
    ],
)  # fmt: skip
def test_arguments_of_which_somebody_asks_what_they_are(block, given):
    plain = block()
    x = torch.randn(2, 3, 64)
    model = fp8.fuse(fp8.convert(copy.deepcopy(plain), tokens=None))
    with torch.no_grad():
        assert off(model(x, **given), plain(x, **given)) < 0.08


@pytest.mark.parametrize("block", HOSTILE)
@pytest.mark.parametrize("training", [True, False])
def test_blocks_that_compute_something_else(block, training):
    plain = of(block).train(training)
    model = fp8.fuse(copy.deepcopy(plain))
    assert counts(model) == (4, 2, 0, 0)
    assert "*" in fp8.summary(model).not_fused
    if block not in (Pair, Raises, Garbage):
        assert_same(model, plain)
        assert_same(model.train(), plain.train())
        assert_same(model.eval(), plain.eval())


def test_a_block_that_adds_in_place():
    plain = of(InPlace)
    assert_same(fp8.fuse(copy.deepcopy(plain)), plain)


def test_granite_with_its_multiplier():
    model = fused_model("granite", residual_multiplier=0.22)
    assert counts(model) == (5, 2, 0, 2)
    assert "not the sum" in fp8.summary(model).not_fused["model.layers.*"] or "no sum" in str(fp8.summary(model))


@pytest.mark.parametrize("family", ["gpt2", "phi3", "gpt_neox"])
def test_dropout_of_transformers(family):
    """Whatever the mode in which it is fused, it drops in training."""
    for training in (True, False):
        model = converted(family, resid_pdrop=0.5, hidden_dropout=0.5).train(training)
        fp8.fuse(model)
        assert counts(model)[1 if family == "gpt2" else 2] == 0
        model.train()
        with torch.no_grad():
            a, b = model(ids_of()).logits, model(ids_of()).logits
        assert off(a, b) > 0.05


class Sneaky(Rms):
    """Norms that differ from one only for some inputs."""

    def forward(self, x, how="eval"):
        y = super().forward(x)
        where = {
            "eval": not self.training,
            "training": self.training,
            "3-D": x.dim() == 3,
            "large": x.abs().max() > 500,
        }
        return 2 * y if where[self.how] else y


@pytest.mark.parametrize("how", ["eval", "training", "3-D", "large"])
def test_norms_that_differ_for_some_inputs(how):
    class Norm(Sneaky):
        pass

    Norm.how = how
    plain = of(lambda: Block(norm=Norm))
    model = fp8.fuse(copy.deepcopy(plain))
    assert counts(model)[0] == 0
    for training in (True, False):
        assert_same(model.train(training), plain.train(training))


class Float32(Rms):
    def forward(self, x):
        return super().forward(x.float())


class OverDim1(Rms):
    def forward(self, x):
        n = x * torch.rsqrt(x.square().mean(1, keepdim=True) + self.eps)
        return n * (self.weight if x.dim() == 2 else 1)


class Stops(Rms):
    def forward(self, x):
        return super().forward(x.detach())


@pytest.mark.parametrize("norm", [Float32, OverDim1, Stops, lambda: nn.GroupNorm(1, 64), lambda: nn.BatchNorm1d(64)])
def test_what_is_no_norm(norm):
    model = fp8.fuse(nn.Sequential(of(Block), norm()))
    assert not isinstance(model[1], FusedNorm)


class Tp(Mlp):
    """As transformers' Llama was: it reads the weights itself where they are sliced."""

    pretraining_tp = 2

    def forward(self, x):
        if self.pretraining_tp == 1:
            return super().forward(x)
        gates, ups = self.w1.weight.chunk(2), self.w3.weight.chunk(2)
        return self.w2(torch.cat([F.silu(F.linear(x, g)) * F.linear(x, u) for g, u in zip(gates, ups)], -1))


class StopsUp(Mlp):
    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x).detach())


class Scaled(Mlp):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.w2(self.scale * F.silu(self.w1(x)) * self.w3(x))


class Clamped(Mlp):
    def forward(self, x):
        return self.w2(F.silu(self.w1(x).clamp(max=1)) * self.w3(x))


class Tanh(Mlp):
    def forward(self, x):
        return self.w2(self.w1(x).tanh() * self.w3(x))


class LateDrop(Mlp):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.3, self.training)


class Adds(Mlp):
    def forward(self, x):
        return x + super().forward(x)


class XieluAct(nn.Module):
    """arXiv 2411.13010, with another slope at 0, and under other names than transformers'."""

    def __init__(self, below=0.0):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.3))
        self.b = nn.Parameter(torch.tensor([0.7]))
        self.register_buffer("slope", torch.tensor(0.25))
        self.register_buffer("below", torch.tensor(below))

    def negative(self):
        return self.slope + F.softplus(self.a)

    def forward(self, x):
        y = torch.where(
            x > 0, F.softplus(self.b) * x * x, self.negative() * (torch.expm1(torch.minimum(x, self.below)) - x)
        )
        return y + self.slope * x


class Xielu(Mlp):
    def __init__(self, act=XieluAct, gated=True):
        super().__init__()
        self.act, self.w3 = act(), self.w3 if gated else None

    def forward(self, x):
        y = self.act(self.w1(x))
        return self.w2(y if self.w3 is None else y * self.w3(x))


@pytest.mark.parametrize("gated", [True, False])
def test_xielu_under_other_names(gated):
    plain = of(lambda: Block(lambda: Xielu(gated=gated)))
    model = fp8.fuse(copy.deepcopy(plain))
    assert counts(model) == (4, 2, 2, 0) and model[0].mlp.fp8_fusion.xielu == ("act", "b", "a", 0.25)
    for mode in (True, False):
        assert_same(model.train(mode), plain.train(mode))
    seen = []
    model[0].mlp.act.register_forward_hook(lambda *args: seen.append(args))
    assert_same(model.train(), plain.train())
    assert len(seen) == 1
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        right = fp8.freeze(fp8.revert(plain))(x)
        assert off(fp8.freeze(model)(x), right) < 0.02
    assert "xielu" in fp8.summary(fp8.fuse(fp8.unfuse(model))).not_fused["*.mlp"]


class Unbounded(XieluAct):
    def negative(self):
        return F.softplus(self.a)


class FixedFactor(XieluAct):
    def negative(self):
        return super().negative().detach()


class LearntSlope(XieluAct):
    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(self.slope)


@pytest.mark.parametrize("act", [Unbounded, FixedFactor, LearntSlope, lambda: XieluAct(below=-1.0)])
def test_what_is_not_xielu(act):
    plain = of(lambda: Block(lambda: Xielu(act)))
    model = fp8.fuse(copy.deepcopy(plain))
    assert counts(model) == (4, 0, 2, 0)
    assert_same(model, plain)


class ClampedFar(Mlp):
    """As DeepSeek-V4's."""

    def forward(self, x):
        return self.w2(F.silu(self.w1(x).clamp(max=10)) * self.w3(x).clamp(-10, 10))


@pytest.mark.parametrize("mlp", [Tp, StopsUp, Scaled, Clamped, ClampedFar, Tanh, LateDrop, Adds])
@pytest.mark.parametrize("training", [True, False])
def test_mlps_that_compute_something_else(mlp, training):
    plain = of(lambda: Block(mlp)).train(training)
    model = fp8.fuse(copy.deepcopy(plain))
    assert counts(model) == (4, 0, 2, 0)
    for mode in (True, False):
        assert_same(model.train(mode), plain.train(mode))


class OneLayer(nn.Module):
    """One layer makes gate and up; by its name it could be anything."""

    halves = staticmethod(lambda y: y.chunk(2, -1))

    def __init__(self, bias=False):
        super().__init__()
        self.last, self.first = nn.Linear(128, 64, bias), nn.Linear(64, 256, bias)

    def forward(self, x):
        gate, up = self.halves(self.first(x))
        return self.last(F.silu(gate) * up)


def one_layer(halves, bias=False):
    class Mlp(OneLayer):
        pass

    Mlp.halves = staticmethod(halves)
    return Mlp(bias)


class Around(nn.Module):
    """As adapters stand around a layer; it says nothing of sizes."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "halves, found",
    [
        (lambda y: y.chunk(2, -1), 1),
        (lambda y: y.unflatten(-1, (2, -1)).unbind(-2), 1),
        (lambda y: y.chunk(2, -1)[::-1], 2),
        (lambda y: (y[..., 128:], y[..., :128]), 2),
    ],
)
def test_gate_and_up_of_one_layer(halves, found, bias):
    plain = of(lambda: Block(lambda: one_layer(halves, bias)))
    model = fp8.fuse(copy.deepcopy(plain))
    assert counts(model) == (4, 2, 2, 0) and fp8.summary(model).fused["Mlp"] == 2
    assert model[0].mlp.fp8_fusion == (None, "first", "last", "silu", None, found)
    assert model[0].n2.fp8_readers == (model[0].mlp.first,)
    for _ in range(2):  # without a history, and with one
        for mode in (True, False):
            with count_casts() as casts:
                assert_same(model.train(mode), plain.train(mode))
            assert casts["activation_backward_cast"] == 2 * 2  # the op, and within it its name; none of plain
        fp8.update_scales(model), fp8.update_scales(plain)
    seen = []
    handle = model[0].mlp.first.register_forward_hook(lambda *args: seen.append(args))
    assert_same(model, plain)
    assert len(seen) == 1
    handle.remove()
    model[1].mlp.first = Around(model[1].mlp.first)
    assert_same(model, plain)
    model[1].mlp.first = model[1].mlp.first.inner
    assert_same(fp8.unfuse(model), plain, tolerance=1e-6)


@pytest.mark.parametrize(
    "halves",
    [
        lambda y: (y[..., ::2], y[..., 1::2]),
        lambda y: (y[..., :128], y[..., :128]),
        lambda y: (y[..., :128], y[..., 128:].detach()),
        lambda y: (y[..., :128], y[..., 128:].flip(-1)),
        lambda y: (y[..., :128], y[..., 128:].clamp(-10, 10)),
    ],
)
def test_what_are_no_halves_of_one_layer(halves):
    plain = of(lambda: Block(lambda: one_layer(halves)))
    model = fp8.fuse(copy.deepcopy(plain))
    assert counts(model) == (4, 0, 2, 0) and "mlp" in str(fp8.summary(model).not_fused)
    assert_same(model, plain)


class Counts(Block):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.log, self.by_name, self.number, self.known = [], {"calls": [0]}, 0, Counter()
        self.inner = nn.Identity()
        self.inner.log = []

    def forward(self, x):
        self.calls += 1
        self.log.append("call")
        self.by_name["calls"][0] += 1
        self.number += 1
        self.known["calls"] += 1
        self.inner.log.append(1)
        torch.rand(())
        x = x + self.inner(self.mix(self.n1(x)))
        return x + self.mlp(self.n2(x))


def test_looking_leaves_no_trace():
    model = of(Counts)
    counting = model[0]
    counting.inner.register_forward_hook(lambda *_: counting.log.append("hook"))
    states = torch.get_rng_state(), random.getstate()
    attributes = {name: [*vars(module)] for name, module in model.named_modules()}
    slots = {name: layer.fp8_slots.clone() for name, layer in fp8_layers(model).items()}
    with contextlib.suppress(ValueError):
        fp8.fuse(model)
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert counting.calls == 0 and counting.log == [] and counting.by_name == {"calls": [0]} and counting.number == 0
    assert not counting.known and counting.inner.log == [] and len(counting.inner._forward_hooks) == 1
    fp8.unfuse(model)
    assert attributes == {name: [*vars(module)] for name, module in model.named_modules()}
    for name, layer in fp8_layers(model).items():
        assert torch.equal(layer.fp8_slots, slots[name])


class Closed(Block):
    def __init_subclass__(cls, **kwargs):
        raise TypeError("nobody derives from this")


def test_a_class_that_nobody_may_derive_from():
    plain = of(Closed)
    model = fp8.fuse(copy.deepcopy(plain))
    assert counts(model) == (4, 2, 0, 0)
    assert "nobody derives from this" in fp8.summary(model).not_fused["*"]


class Clashes(Block):
    """Names that fused modules might use."""

    def __init__(self):
        super().__init__()
        self.fusion, self.readers, self.x = nn.Identity(), [1], nn.Identity()

    def add_to(self, a, b):
        return a + 2 * b

    _sum = of_sum = _fits = add_to

    def forward(self, x, flag=False):
        y = self._sum(x, self.fusion(self.mix(self.n1(x))))
        return self.add_to(y, self.mlp(self.n2(y)))


def test_names_do_not_clash():
    class Plain(Clashes):
        def add_to(self, a, b):
            return a + b

        _sum = add_to

    for block, count in ((Clashes, 0), (Plain, 2)):
        plain = of(block)
        model = fp8.fuse(copy.deepcopy(plain))
        assert counts(model)[2] == count
        assert_same(model, plain)
        assert_same(model, plain, True)
    fp8.unfuse(model)
    assert model[0].readers == [1] and isinstance(model[0].fusion, nn.Identity)


def test_keywords_that_a_decorator_renames():
    """transformers' past_key_values is cache below: it must not get lost on the way."""
    model = fused_model().eval()
    layer, rotary = model.model.layers[0], model.model.rotary_emb
    plain = converted().eval().model.layers[0]
    x = torch.randn(1, 4, 64, dtype=torch.bfloat16)
    positions = rotary(x, torch.arange(4)[None])
    for block in (layer, plain):
        cache = transformers.DynamicCache()
        block(x, past_key_values=cache, position_embeddings=positions, attention_mask=None)
        assert cache.get_seq_length() == 4


def test_nothing_to_fuse():
    model = fp8.convert(nn.Sequential(nn.Linear(64, 64)), tokens=None)
    with pytest.raises(ValueError, match="nothing of Sequential can be fused"):
        fp8.fuse(model)
