"""What is measured of activations, against plain FP64 code; at which points, in which models; and that measuring
changes nothing."""

import copy
import gc
import itertools
import json
import math
import pickle
import warnings
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch_fp8 as fp8
from ranks import Ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch_fp8.observe.activations import measure
from torch_fp8.observe.points import find_points

from models.gpt import GPT
from models.gpt import Shape as GptShape
from models.llama import Llama
from models.llama import Shape as LlamaShape

METRICS = ("kurtosis", "kurtosis_token", "rms", "mean", "outliers", "peak")


def expected(micro_batches, tau):
    """By the definitions, in FP64; micro_batches: (sequences, tokens, features) each."""
    xs = [x.astype(np.float64) for x in micro_batches]
    sequences = [sequence for x in xs for sequence in x]
    kurtosis = [np.mean(s**4) / np.mean(s**2) ** 2 for s in sequences if s.any()]
    of_tokens = [np.mean(t**4) / np.mean(t**2) ** 2 for s in sequences for t in s if t.any()]
    every = np.concatenate([s.ravel() for s in sequences])
    beyond = [np.abs(s) >= tau * np.sqrt(np.mean(s**2)) for s in sequences if s.any()]
    peaks = [np.abs(s).max() / np.sqrt(np.mean(s**2)) for s in sequences if s.any()]
    outliers = sum(b.sum() for b in beyond) / every.size
    return np.mean(kurtosis), np.mean(of_tokens), np.sqrt(np.mean(every**2)), every.mean(), outliers, max(peaks)


class Block(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, n * 8) for n in (2, 1, 1))
        self.o_proj = nn.Linear(16, width)
        self.up_proj, self.down_proj = nn.Linear(width, 32), nn.Linear(32, width)

    def inner(self, x):
        q, k, v = self.q_proj(x).unflatten(-1, (2, 8)), self.k_proj(x), self.v_proj(x)
        weights = torch.einsum("sqhd,skd->shqk", q, k).softmax(-1)
        x = x + self.o_proj(torch.einsum("shqk,skd->sqhd", weights, v).flatten(-2))
        return x + self.down_proj(F.gelu(self.up_proj(x))), None

    def forward(self, x):
        return self.inner(x)


class Net(nn.Module):
    def __init__(self, blocks=2):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(blocks))
        self.reentrant = None

    def forward(self, x):
        for layer in self.layers:
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
            x = x[0]
        return x.square().mean()


def inputs(seed, device="cpu", dtype=torch.float32, sequences=3):
    x = torch.randn(sequences, 5, 16, generator=torch.Generator().manual_seed(seed))
    return (
        (x * torch.logspace(-1, 1, 16)).to(device, dtype).requires_grad_()
    )  # reentrant checkpointing wants a gradient


def train(model, optimizer, device="cpu", dtype=torch.float32, steps=1, micro_batches=1, first=0):
    for step, micro in itertools.product(range(first, first + steps), range(micro_batches)):
        model(inputs(10 * step + micro, device, dtype)).backward()
        if micro == micro_batches - 1:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_metrics_against_fp64(device, dtype):
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(3, 7, width, generator=generator) * scale for width, scale in ((24, 1.0), (8, 0.01), (8, 3.0))]
    parts[0][0, 2, 3] = 40.0  # an outlier
    parts = [part.to(dtype) for part in parts]
    for part in parts:
        part[1, 3] = 0.0  # a token without kurtosis
    tau = 4.0
    measured = measure([part.to(device).transpose(0, 1).contiguous().transpose(0, 1) for part in parts], tau).tolist()
    whole = torch.cat(parts, -1).double().numpy()
    wanted = expected([whole], tau)
    assert fp8.observe.activations._metrics(measured) == pytest.approx(dict(zip(METRICS, wanted)), rel=1e-5)
    assert wanted[4] > 0


def test_huge_and_tiny_numbers_keep_their_kurtosis(device):
    """Squares and fourth powers of bfloat16 numbers, in float32: neither rounded to 8 bits nor out of range."""
    x = torch.randn(2, 64, 128, generator=torch.Generator().manual_seed(2)).bfloat16()
    for exponent in (-24, 0, 24):
        scaled = (x * 2.0**exponent).to(device)
        kurtosis, *_ = expected([scaled.double().cpu().numpy()], 10.0)
        assert measure([scaled], 10.0)[0].item() / 2 == pytest.approx(kurtosis, rel=1e-5)


def test_zeros_have_no_kurtosis_and_nan_has_one_that_is_nan(device):
    metrics = fp8.observe.activations._metrics
    zeros = metrics(measure([torch.zeros(2, 3, 8, device=device)], 2.0).tolist())
    assert zeros == {"rms": 0.0, "mean": 0.0, "outliers": 0.0, "peak": 0.0}
    assert math.isnan(metrics(measure([torch.full((2, 3, 8), math.nan, device=device)], 2.0).tolist())["kurtosis"])


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_point_of_a_step_of_micro_batches(device, dtype, reentrant):
    """Evaluation and no_grad between are not seen, and what is computed again in backward counts once."""
    model = Net().to(device, dtype)
    model.reentrant = reentrant
    seen = {}

    def note(tag, tensor):
        seen.setdefault(tag, []).append(tensor.detach().double().cpu().numpy())

    reference = copy.deepcopy(model)
    reference.reentrant = None
    for i, block in enumerate(reference.layers):
        block.down_proj.register_forward_pre_hook(lambda m, args, i=i: note(f"ffn/layers.{i}", args[0]))
        block.register_forward_hook(lambda m, args, out, i=i: note(f"block/layers.{i}", out[0]))
        for name in ("q_proj", "k_proj", "v_proj"):
            block.get_submodule(name).register_forward_hook(
                lambda m, args, out, i=i, name=name: note(f"{name}/layers.{i}", out)
            )
    for micro in range(3):
        reference(inputs(micro, device, dtype))
    for i in range(2):
        parts = [seen.pop(f"{name}/layers.{i}") for name in ("q_proj", "k_proj", "v_proj")]
        seen[f"qkv/layers.{i}"] = [np.concatenate(of_micro, -1) for of_micro in zip(*parts, strict=True)]

    watched = fp8.activations(model, tau=1.5)
    model.eval()
    model(inputs(7, device, dtype))
    model.train()
    with torch.no_grad():
        model(inputs(8, device, dtype))
    train(model, torch.optim.SGD(model.parameters(), 0.1), device, dtype, micro_batches=3)
    values = watched.readings[0].values
    for tag, xs in seen.items():
        for metric, value in zip(METRICS, expected(xs, 1.5), strict=True):
            assert values[f"{metric}/{tag}"] == pytest.approx(value, rel=1e-4, abs=1e-5), (metric, tag)


def test_what_is_computed_again_counts_once(device):
    """Of two micro-batches one is computed again; each has half of the weight."""
    model = Net().to(device)
    watched = fp8.activations(model)
    seen, optimizer = [], torch.optim.SGD(model.parameters(), 0.1)
    for model.reentrant, seed in ((False, 0), (None, 1)):
        down = model.layers[0].down_proj
        hook = down.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach().double()))
        loss = model(inputs(seed, device) * 3**seed)
        hook.remove()
        loss.backward()
    optimizer.step()
    mean = torch.cat(seen).mean().item()
    assert watched.readings[0].values["mean/ffn/layers.0"] == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gradient_norms_and_loss(device, dtype):
    model = Net().to(device, dtype)
    watched = fp8.activations(model)
    losses = [model(inputs(i, device, dtype)) for i in range(2)]
    total = sum(loss.float() for loss in losses)
    total.backward()
    norms = {name: p.grad.double().norm().item() for name, p in model.named_parameters()}

    class Muon(torch.optim.SGD):  # one that writes to gradients
        def step(self):
            for p in model.parameters():
                p.grad.zero_()

    Muon(model.parameters(), 0.1).step()
    values = watched.readings[0].values
    assert values["loss"] == pytest.approx(total.item() / 2)
    for name, norm in norms.items():
        assert values[f"grad_norm/{name}"] == pytest.approx(norm, rel=1e-5)
    assert values["grad_norm"] == pytest.approx(math.sqrt(sum(n**2 for n in norms.values())), rel=1e-5)


def hooks_of(model):
    return [
        hook for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]  # fmt: skip


MODELS = {
    "plain": lambda: Net(),
    "converted": lambda: fp8.convert(Net(), fp8.DelayedScaling(amax_history_len=2), tokens=None),
    "gpt": lambda: GPT(GptShape(2, 2, 32), vocab=64, context=16),
    "block": lambda: Fp8Net("silu", True),
    "block xielu": lambda: Fp8Net("xielu", False),
}


class Fp8Net(nn.Module):
    def __init__(self, activation, gated):
        super().__init__()
        options = {"num_kv_heads": 1, "activation": activation, "gated": gated}
        self.layers = nn.ModuleList(fp8.TransformerBlock(16, 2, 48, **options) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def feed(model, device, step):
    if isinstance(model, GPT):
        tokens = torch.randint(64, (3, 9), generator=torch.Generator().manual_seed(step)).to(device)
        return model(tokens[:, :-1], tokens[:, 1:])
    return model(inputs(step, device))


@pytest.mark.parametrize("name", MODELS)
def test_nothing_changes_and_nothing_stays(device, name):
    torch.manual_seed(3)
    model = MODELS[name]().to(device)
    twin = copy.deepcopy(model)
    watched = fp8.activations(model, every=2)
    for step, m in itertools.product(range(5), (model, twin)):
        if step == 0:
            m.optimizer = [torch.optim.AdamW(m.parameters(), 1e-2)]
        for micro in range(2):
            feed(m, device, 10 * step + micro).backward()
        m.optimizer[0].step()
        m.optimizer[0].zero_grad()
        assert bool(hooks_of(model)) == (watched.step % 2 == 0)
    watched.close()
    assert not hooks_of(model)
    assert [reading.step for reading in watched.readings] == [0, 2, 4]
    assert all("kurtosis/ffn" in " ".join(reading.values) for reading in watched.readings)
    for (key, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), key
    for key, state in fp8.state_dict(model).items() if name.startswith(("block", "converted")) else ():
        assert torch.equal(state, fp8.state_dict(twin)[key]), key


@pytest.mark.parametrize("activation, gated", [("silu", True), ("gelu", False), ("xielu", False)])
def test_what_a_fused_mlp_hides_is_seen(device, activation, gated):
    """Against the same layers one by one, whose down layer has a hook that is more than a look."""
    model = Fp8Net(activation, gated).to(device)
    twin = copy.deepcopy(model)
    for layer in twin.layers:
        layer.mlp.down_proj.register_forward_hook(lambda module, args, out: None)
    values = []
    for m in (model, twin):
        watched = fp8.activations(m)
        train(m, torch.optim.SGD(m.parameters(), 0.1), device)
        values.append(watched.readings[0].values)
    seen = [key for key in values[0] if "/ffn/" in key]
    assert len(seen) == 2 * len(METRICS) and values[0].keys() == values[1].keys()
    for key in seen:  # the product was rounded to the layers' dtype in one of them
        assert values[0][key] == pytest.approx(values[1][key], rel=0.02, abs=2e-3), key


def test_two_optimizers_and_a_model_that_goes(device):
    model = Net().to(device)
    watched = fp8.activations(model, every=1)
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in model.layers]
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    for step in range(3):
        model(inputs(step, device)).backward()
        for optimizer in (other, *optimizers):
            optimizer.step()
            optimizer.zero_grad()
    assert [reading.step for reading in watched.readings] == [0, 1, 2]
    assert "grad_norm/layers.1.down_proj.weight" in watched.readings[1].values
    gone, going = weakref.ref(model), weakref.ref(watched)
    del model, watched, optimizers, optimizer
    gc.collect()
    assert gone() is None and going() is None
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_a_compiled_model_is_measured_in_eager_steps(device):
    """Also in its first step, which would be traced with the hooks."""
    model, count = Net().to(device), []

    def backend(graph, example):
        count.append(graph)
        return graph.forward

    watched = fp8.activations(model, every=3)
    other = fp8.activations(model, every=2)
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    traced = []
    for step in range(5):
        train(compiled, optimizer, device, first=step)
        traced.append(len(count))
    assert [r.step for r in watched.readings] == [0, 3] and [r.step for r in other.readings] == [0, 2, 4]
    assert traced[0] == 0 and traced[1] > 0 and traced[1] == traced[-1]


@pytest.mark.parametrize("what", ["blocks", "a block within", "optimizer.step", "a function"])
def test_whatever_is_compiled(device, what):
    model = Net().to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step, forward = optimizer.step, model
    if what == "blocks":
        for layer in model.layers:
            layer.compile(backend="aot_eager")
    elif what == "a block within":
        model.layers[0] = torch.compile(model.layers[0], backend="aot_eager")
    elif what == "optimizer.step":
        step = torch.compile(optimizer.step, backend="eager")
    else:
        forward = torch.compile(lambda x: model(x), backend="aot_eager")
    watched = fp8.activations(model, every=2)
    for i in range(5):
        forward(inputs(i, device)).backward()
        step()
        optimizer.zero_grad()
    assert [reading.step for reading in watched.readings] == [0, 2, 4]
    assert all(f"kurtosis/{tag}" in reading.values for reading in watched.readings for tag in watched._tags)
    assert set(watched._tags) == {
        f"{kind}/layers.{i}" for kind in ("qkv", "ffn", "block") for i in range(2)
    }  # fmt: skip


@pytest.mark.parametrize("make", [fp8.activations, fp8.monitor])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_that_is_made_in_a_sampled_step_is_not_sampled(device, make, copied):
    model = fp8.convert(Net().to(device), tokens=None)
    watched = make(model)
    twin = copied(model)
    train(twin, torch.optim.SGD(twin.parameters(), 0.1), device)
    assert not getattr(watched, "readings", None) and not getattr(watched, "samples", None)
    train(model, torch.optim.SGD(model.parameters(), 0.1), device, first=1)
    assert len(getattr(watched, "readings", [1])) == 1


def test_the_users_stance_comes_back():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with torch.compiler.set_stance("fail_on_recompile"):
        fp8.activations(model, every=10)
        train(model, optimizer)
        assert torch._dynamo.eval_frame._stance.stance == "fail_on_recompile"
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_points_of_plain_models():
    gpt = GPT(GptShape(2, 2, 32), vocab=64, context=16)
    llama = Llama(LlamaShape(32, 64, 2, 1), 2, 64)
    assert [point.tag for point in find_points(gpt)] == [
        "qkv/blocks.0.attn", "ffn/blocks.0.mlp", "qkv/blocks.1.attn", "ffn/blocks.1.mlp", "block/blocks.0",
        "block/blocks.1",
    ]  # fmt: skip
    assert {point.tag for point in find_points(llama)} == {
        f"{kind}/layers.{i}{part}" for i in range(2) for kind, part in
        (("qkv", ".attention"), ("ffn", ".ffn"), ("block", ""))
    }  # fmt: skip
    assert [p.tag for p in find_points(nn.Sequential(Block(), Block()))][-2:] == ["block/0", "block/1"]
    moe = nn.Module()
    moe.layers = nn.ModuleList([nn.Module()])
    moe.layers[0].experts = nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(4, 4), "w2": nn.Linear(4, 4)}) for _ in "ab")
    assert [p.tag for p in find_points(moe)] == ["ffn/layers.0.experts.0", "ffn/layers.0.experts.1", "block/layers.0"]


def test_points_that_are_named(device):
    model = Net().to(device)
    points = {"ffn": "layers.*.up_proj:input", "qk": ["layers.*.q_proj", "layers.*.k_proj"]}
    watched = fp8.activations(model, points=points)
    train(model, torch.optim.SGD(model.parameters(), 0.1), device)
    tags = {tag.partition("/")[2] for tag in watched.readings[0].values if tag.startswith("rms/")}
    assert tags == {
        f"{kind}/layers.{i}{part}" for i in range(2)
        for kind, part in (("ffn", ".up_proj"), ("qk", ""), ("qkv", ""), ("block", ""))
    }  # fmt: skip
    assert "qk: 2, layers.0 to layers.1" in watched.found


@pytest.mark.parametrize(
    ("model", "options", "match"),
    [
        (nn.Linear(4, 4), {}, "no point that is known.*points="),
        (Net(), {"every": 0}, "positive number"),
        (Net(), {"tau": -1.0}, "tau must be"),
        (Net(), {"tau": math.nan}, "tau must be"),
        (Net(), {"points": {"x": "layers.0.down_prj"}}, r"matches no module.*near are layers.0.down_proj"),
        (Net(), {"points": {"x": ["layers.0.q_proj", "layers.*.k_proj"]}}, r"equally many.*: 1.*: 2"),
        (Net(), {"points": {"x": ["layers.0.q_proj", "layers.0.k_proj:input"]}}, "all their inputs or all"),
        (Net(), {"points": {"a/b": "layers.0"}}, "kinds without '/'"),
        (Net(), {"points": {"x": []}}, "patterns"),
    ],
)
def test_impossible_ones(model, options, match):
    with pytest.raises(ValueError, match=match):
        fp8.activations(model, **options)
    assert not hooks_of(model)


@pytest.mark.parametrize("seed", range(3))
def test_sharpness_is_the_maximum_over_the_box(device, seed):
    """Against a search: corners (where a convex function has its maximum), random points, and ascent by gradients."""
    generator = torch.Generator().manual_seed(seed)
    z, epsilon = torch.randn(7, generator=generator, dtype=torch.float64) * 5, 0.05
    target = torch.tensor(seed)
    room = epsilon * (z.abs() + 1)
    loss = lambda y: F.cross_entropy(z + y, target.expand(len(y)) if y.dim() > 1 else target, reduction="none")  # noqa: E731
    corners = room * torch.tensor(list(itertools.product((-1.0, 1.0), repeat=7)), dtype=torch.float64)
    at, best = loss(torch.zeros_like(z)), loss(corners).max()
    inside = room * (2 * torch.rand(20_000, 7, generator=generator, dtype=torch.float64) - 1)
    y = torch.zeros_like(z, requires_grad=True)
    for _ in range(200):
        (gradient,) = torch.autograd.grad(loss(y), y)
        y = (y + room * gradient.sign() * 0.1).clamp(-room, room).detach().requires_grad_()
    assert loss(inside).max() <= best and loss(y).item() == pytest.approx(best.item(), rel=1e-12)
    found = fp8.sharpness(z.float()[None].to(device), target[None].to(device), epsilon).item()
    assert found == pytest.approx((100 * (best - at) / (1 + at)).item(), rel=1e-4)


def test_sharpness_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"\[2, 5\], \[3\]"):
        fp8.sharpness(torch.zeros(2, 5), torch.zeros(3, dtype=torch.int64))


def test_sharpness_of_a_model(device):
    model = GPT(GptShape(1, 2, 32), vocab=60, context=16).to(device)
    logits = []
    model.head.register_forward_hook(lambda module, args, out: logits.append(out.detach()))
    tokens = torch.randint(60, (3, 9), generator=torch.Generator().manual_seed(1)).to(device)
    watched = fp8.activations(model)
    targets = tokens[:, 1:].clone()
    targets[1, -1] = -100  # to be ignored, as cross_entropy does
    model(tokens[:, :-1], targets).backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    wanted = fp8.sharpness(logits[0][[0, 2], -1], targets[[0, 2], -1]).mean().item()
    assert watched.readings[0].values["sharpness"] == pytest.approx(wanted, rel=1e-5)
    assert "sharpness" not in watched.found
    assert "sharpness: not available" in fp8.activations(Net()).found


# ---- two ranks -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["gloo", "nccl"])
def ranks(request):
    if request.param == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    ranks = Ranks(request.param)
    yield ranks
    ranks.close()


def sharded(device, how, convert):
    torch.manual_seed(0)
    model = Net().to(device)
    if convert:
        fp8.convert(model, fp8.CurrentScaling(), tokens=None)
    if how == "fsdp":
        for module in (*model.layers, model):
            fully_shard(module)
    elif how == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    watched = fp8.activations(model, every=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(2):
        model(inputs(2 * step + torch.distributed.get_rank(), device)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [reading.values for reading in watched.readings]


@pytest.mark.parametrize("how", ["fsdp", "ddp"])
@pytest.mark.parametrize("convert", [False, True])
def test_each_rank_measures_its_own_tokens_and_the_norms_of_whole_gradients(ranks, how, convert):
    of_ranks = ranks(sharded, how, convert)
    torch.manual_seed(0)
    model = Net().to(ranks.device)
    if convert:
        fp8.convert(model, fp8.CurrentScaling(), tokens=None)
    for rank in range(2):  # the first step's
        watched = fp8.activations(model)
        model(inputs(rank, ranks.device)).div(2).backward()
        torch.optim.SGD(model.parameters(), 0.0, foreach=False).step()
        values = watched.readings[0].values
        watched.close()
        for tag, value in values.items():
            if not tag.startswith("grad_norm") and tag != "loss":
                assert of_ranks[rank][0][tag] == pytest.approx(value, rel=1e-4, abs=1e-5), tag
    norms = {tag: value for tag, value in values.items() if tag.startswith("grad_norm")}  # of the mean of both
    for of_rank in of_ranks:
        assert {tag: of_rank[0][tag] for tag in norms} == pytest.approx(norms, rel=0.02 if convert else 1e-4)
        assert all(of_rank[step].keys() == values.keys() for step in range(2))


def tensor_parallel(device):
    torch.manual_seed(0)
    model = Net().to(device)
    mesh = torch.distributed.init_device_mesh(device.type, (2,))
    plan = {"up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
    for layer in model.layers:
        parallelize_module(layer, mesh, plan)
    watched = fp8.activations(model)
    model(inputs(0, device)).backward()
    torch.optim.SGD(model.parameters(), 0.0, foreach=False).step()
    return watched.readings[0].values


def test_under_tensor_parallelism(ranks):
    """Each rank has half of the features of what the second projection reads, and sees their mean square."""
    of_ranks = ranks(tensor_parallel)
    torch.manual_seed(0)
    model = Net().to(ranks.device)
    watched = fp8.activations(model)
    train(model, torch.optim.SGD(model.parameters(), 0.0), ranks.device)
    values = watched.readings[0].values
    for tag in ("rms/ffn/layers.0", "rms/ffn/layers.1"):
        halves = [of_rank[tag] ** 2 for of_rank in of_ranks]
        assert sum(halves) / 2 == pytest.approx(values[tag] ** 2, rel=1e-4) and halves[0] != halves[1]
    for tag in ("grad_norm", "grad_norm/layers.1.up_proj.weight", "grad_norm/layers.0.down_proj.weight"):
        assert [of_rank[tag] for of_rank in of_ranks] == pytest.approx([values[tag]] * 2, rel=1e-4), tag


class Writer:
    def __init__(self):
        self.scalars = {}

    def add_scalar(self, tag, value, step):
        self.scalars[tag, step] = value


def test_outputs(device):
    model, writer = Net().to(device), Writer()
    watched = fp8.activations(model, every=2, writer=writer)
    assert "no step was sampled yet" in str(watched) and "no step was sampled yet" in watched._repr_html_()
    assert "qkv: 2, layers.0 to layers.1" in str(watched)
    train(model, torch.optim.SGD(model.parameters(), 0.1), device, steps=3)
    lines = str(watched).splitlines()
    assert lines[0].startswith("step 2, loss ") and len(lines) == 2 + 6 + 4
    assert watched._repr_html_().count("<tr>") == 1 + 6
    assert writer.scalars["activations/kurtosis/qkv/layers.0", 2] == watched.readings[1].values["kurtosis/qkv/layers.0"]
    json.dumps(watched.readings[0].values, allow_nan=False)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_neox", "olmo2"])
@pytest.mark.parametrize("way", ["plain", "converted", "fused"])
def test_transformers(family, way):
    families = pytest.importorskip("families")
    model = {"plain": families.make, "converted": families.converted, "fused": families.fused_model}[way](family)
    watched = fp8.activations(model)
    ids = families.ids_of()
    model(ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    values = watched.readings[0].values
    assert sum(tag.startswith("kurtosis/") for tag in values) == 6 and "not seen" not in watched.found
    assert {"loss", "sharpness", "grad_norm"} <= values.keys()


def test_losses_that_are_shares_of_a_batch_are_summed():
    """As transformers' Trainer has it with gradient accumulation: it tells the model ``num_items_in_batch``."""

    class Shares(Net):
        def forward(self, x, num_items_in_batch=None):
            loss = super().forward(x)
            return loss if num_items_in_batch is None else loss * len(x) / num_items_in_batch

    model = Shares()
    watched = fp8.activations(model, every=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    for told in ({}, {"num_items_in_batch": 12}):
        for micro in range(4):
            model(inputs(micro), **told).backward()
        optimizer.step()
    losses = [reading.values["loss"] for reading in watched.readings]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_gradient_norms_are_without_the_scale_of_a_grad_scaler(fused):
    """A fused optimizer is given gradients that are scaled, and the scale beside them."""
    model = Net()
    watched = fp8.activations(model, every=1)
    optimizer = torch.optim.AdamW(model.parameters(), 0.0, fused=fused)
    model(inputs(1)).backward()
    optimizer.step()
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model(inputs(1))).backward()
    scaler.step(optimizer)
    plain, scaled = (reading.values for reading in watched.readings)
    for tag in ("grad_norm", "grad_norm/layers.0.q_proj.weight"):
        assert scaled[tag] == pytest.approx(plain[tag], rel=1e-4)


@pytest.mark.parametrize("as_dict", [False, True])
def test_sharpness_is_of_the_logits_that_a_model_returns(as_dict):
    """Not of what its head gives: Gemma 2 caps that, Granite divides it. A vocabulary may be masked with -inf."""

    class Capped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.lm_head = nn.ModuleList([Block()]), nn.Linear(16, 12)

        def forward(self, x, labels):
            logits = 2 * torch.tanh(self.lm_head(self.layers[0](x)[0]) / 2)
            logits = logits.masked_fill(torch.arange(12) > 9, -math.inf)
            out = {"logits": logits, "loss": F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())}
            self.returned = out["logits"].detach()
            return out if as_dict else SimpleNamespace(**out)

    torch.manual_seed(0)
    model = Capped()
    watched = fp8.activations(model)
    labels = torch.randint(9, (3, 5))
    out = model(inputs(0), labels)
    (out["loss"] if as_dict else out.loss).backward()
    torch.optim.SGD(model.parameters(), 0.0, foreach=False).step()
    wanted = fp8.sharpness(model.returned[:, -2, :10], labels[:, -1]).mean().item()  # without the masked ones
    assert wanted > 0 and watched.readings[0].values["sharpness"] == pytest.approx(wanted, rel=1e-4)


def test_what_gets_no_reading_says_so():
    model = Net().eval()
    watched = fp8.activations(model, every=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, torch.optim.SGD(model.parameters(), 0.0), steps=4)
    said = [str(w.message) for w in caught if "torch_fp8" in str(w.message)]
    assert not watched.readings and len(said) == 1 and "two sampled steps" in said[0] and "model.train()" in said[0]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"points": "layers.0.q_proj"}, r"points must be \{kind: patterns\}"),
        ({"points": {"x": [3]}}, r"points must be \{kind: patterns\}"),
        ({"points": {"x": 3}}, r"points must be \{kind: patterns\}"),
        ({"points": {"x": ["layers.0.*_proj", "layers.1.*_proj"]}}, r"points\['x'\] gives 6 activations .*x/layers.0"),
        ({"writer": 3}, r"writer must be what has add_scalar"),
    ],
)
def test_points_and_writers_that_are_none(options, match):
    model = Net()
    with pytest.raises(ValueError, match=match):
        fp8.activations(model, **options)
    assert not hooks_of(model)
