"""Two ranks against one process: DDP, FSDP2, distributed checkpoints, tensor and sequence parallelism.

Gloo on the CPU; NCCL too where there are two GPUs. Both ranks sum two terms, so most comparisons are exact.
"""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch_fp8 as fp8
from casts import count_casts
from ranks import Ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

STEPS = 5
LR = 0.125  # a power of two: PyTorch's loops over long and short tensors multiply and add in one rounding or in two


@pytest.fixture(scope="module", params=["gloo", "nccl"])
def ranks(request):
    if request.param == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    ranks, threads = Ranks(request.param), torch.get_num_threads()
    torch.set_num_threads(1)  # as on the ranks: the order of some of PyTorch's sums depends on it
    yield ranks
    torch.set_num_threads(threads)
    ranks.close()


class Block(nn.Module):
    def __init__(self, dtype=None, device=None):
        super().__init__()
        self.norm = nn.LayerNorm(32, device=device, dtype=dtype)
        self.up = nn.Linear(32, 64, device=device, dtype=dtype)
        self.down = nn.Linear(64, 32, device=device, dtype=dtype)
        self.recompute = False

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False) if self.recompute else self.inner(x)

    def inner(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Attending(fp8.TransformerBlock):
    """Two heads of 128, what FP8's backward pass takes."""

    recompute = False

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False) if self.recompute else super().forward(x)


def attending_on(device, dtype, mode, heads=2, blocks=2, kv_heads=2):
    torch.manual_seed(0)
    made = {"num_kv_heads": kv_heads, "head_dim": 128, "attention": mode, "device": device, "dtype": dtype}
    recipe = fp8.DelayedScaling(amax_history_len=3)
    return nn.Sequential(*(Attending(32, heads, 64, recipe=recipe, **made) for _ in range(blocks)))


def assert_attended(model, mode):
    assert [block.sdpa.last for block in model] == [(mode, "asked for")] * len(model)


def model_on(device, dtype=torch.float32, blocks=2, attention=None):
    if attention is not None:
        return attending_on(device, dtype, attention, blocks=blocks)
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(dtype, device) for _ in range(blocks)))
    return fp8.convert(model, fp8.DelayedScaling(amax_history_len=3), tokens=None)


def batch(step, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(2, 16, 32, generator=generator).to(device, dtype)


def loss_of(model, x):
    return (model(x) - x.roll(1, -1)).float().square().mean()


def cpu(tensors):
    full = (t.full_tensor() if isinstance(t, DTensor) else t for t in tensors)
    return [t.detach().cpu().clone() for t in full]


def assert_equal(tensors, others):
    assert len(tensors) == len(others)
    for index, (a, b) in enumerate(zip(tensors, others)):
        assert torch.equal(a, b), index


# ---- DDP ------------------------------------------------------------------------------------------------------------


def train_ddp(device, reduce, micro_batches=1, wrap=False, attention=None):
    """Parameters, scaling state and number of weight casts; rank r of step s trains on batch 2 s + r."""
    dtype = torch.bfloat16 if attention else torch.float32
    model = model_on(device, dtype, attention=attention)
    if reduce:
        fp8.reduce_amaxes(model)
    module = nn.Sequential(model) if wrap else model
    ddp = DistributedDataParallel(module)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=LR)
    with count_casts() as casts:
        for step in range(STEPS):
            for micro in range(micro_batches - 1):
                with ddp.no_sync():
                    loss_of(ddp, batch(100 + 2 * (step + micro) + dist.get_rank(), device, dtype)).backward()
            loss_of(ddp, batch(2 * step + dist.get_rank(), device, dtype)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return cpu(model.parameters()), cpu(fp8.state_dict(model).values()), casts["cast_weight"]


@pytest.mark.parametrize("wrap", [False, True])
def test_ddp_needs_nothing(ranks, wrap):
    """Each rank follows its own amaxes; weights stay equal."""
    (params, state, _), (others, other_state, _) = ranks(train_ddp, False, 1, wrap)
    assert_equal(params, others)
    if not wrap:  # a wrapped root lets DDP broadcast the buffers, right too where all use all layers
        histories, other_histories = torch.stack(state[1::2]), torch.stack(other_state[1::2])
        assert (histories[:, 0] != other_histories[:, 0]).all()  # of the inputs, in each of the last steps
    assert all(slots[:, 3].eq(STEPS % 3 or 3).all() for slots in state[::2])


@pytest.mark.parametrize("attention", [None, "fp8_forward", "fp8"])
def test_ddp_with_shared_amaxes_is_one_process_with_all_batches(ranks, attention):
    (params, state, _), (others, other_state, _) = ranks(train_ddp, True, 1, False, attention)
    assert_equal(params, others)
    assert_equal(state, other_state)
    dtype = torch.bfloat16 if attention else torch.float32
    one = model_on(torch.device("cpu"), dtype, attention=attention)
    optimizer = torch.optim.SGD(one.parameters(), lr=LR)
    for step in range(STEPS):
        for rank in range(2):
            loss_of(one, batch(2 * step + rank, "cpu", dtype)).backward()
        for p in one.parameters():
            p.grad /= 2
        optimizer.step()
        optimizer.zero_grad()
    if ranks.device.type == "cpu":
        assert_equal(params, cpu(one.parameters()))
        assert_equal(state, cpu(fp8.state_dict(one).values()))


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_ddp_casts_each_weight_once_a_step(ranks, micro_batches):
    for _, _, casts in ranks(train_ddp, False, micro_batches):
        assert casts == (STEPS - 1) * 4 + 4 * micro_batches  # the first step does not know how many there will be


def train_with_a_layer_that_one_rank_leaves_out(device):
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(32, 32, device=device) for _ in range(2))
    fp8.convert(model, tokens=None)
    fp8.reduce_amaxes(model)
    copied = copy.deepcopy(model)  # a process group cannot be copied, and a copy has none
    assert copied[0].fp8_state.reduction is None
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for step in range(3):
        x = batch(2 * step + dist.get_rank(), device)
        y = model[0](x)
        (model[1](y) if dist.get_rank() == 0 else y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return cpu(fp8.state_dict(model).values())


def test_shared_amaxes_of_a_layer_that_one_rank_leaves_out(ranks):
    first, second = ranks(train_with_a_layer_that_one_rank_leaves_out)
    assert_equal(first, second)
    assert all(slots[:, 3].eq(3).all() for slots in first[::2])


def train_several_reductions(device):
    layers = [fp8.Linear(16, 16, device=device) for _ in range(6)]
    for layer in layers:
        fp8.reduce_amaxes(layer)
    optimizer = torch.optim.SGD([p for layer in layers for p in layer.parameters()], lr=LR)
    for index, layer in enumerate(layers):
        layer(torch.full((16, 16), 2.0 ** (index + dist.get_rank()), device=device)).sum().backward()
    optimizer.step()
    return [layer.fp8_history[0].max().item() for layer in layers]


def test_several_reductions_keep_one_order(ranks):
    expected = [2.0 ** (index + 1) for index in range(6)]
    assert ranks(train_several_reductions) == [expected, expected]


def reduce_a_nan(device):
    layer = fp8.Linear(16, 16, device=device)
    fp8.reduce_amaxes(layer)
    nan, inf = float("nan"), float("inf")
    values = [[nan, 1.0, inf], [inf, 2.0, nan]][dist.get_rank()]
    layer.fp8_slots[:, 2] = torch.tensor(values)
    layer.fp8_state.reduction.run()
    return layer.fp8_slots[:, 2].tolist()


def test_nan_is_the_largest_amax(ranks):
    """A maximum over floats may lose it (gloo's does not), and the ranks would disagree on which step was a bad one."""
    for first, second, third in ranks(reduce_a_nan):
        assert first != first and second == 2.0 and third != third


def test_shared_amaxes_need_a_model_and_a_process_group():
    with pytest.raises(ValueError, match="no FP8 layer with amaxes"):
        fp8.reduce_amaxes(nn.Linear(4, 4))
    with pytest.raises(RuntimeError, match="not initialised"):
        fp8.reduce_amaxes(fp8.Linear(16, 16))


# ---- FSDP2 ----------------------------------------------------------------------------------------------------------

FSDP = {
    "bfloat16": {},
    "float32": {"mixed": True},
    "meta": {"meta": True},
    "recompute": {"recompute": True},
    "kept gathered": {"reshard": False},
}
FSDP_ATTENTION = {
    f"{mode}, {name}": {**options, "attention": mode}
    for mode, names in {"fp8_forward": ["float32", "recompute"], "fp8": FSDP}.items()
    for name, options in FSDP.items()
    if name in names
}


def sharded(device, mixed=False, meta=False, recompute=False, reshard=True, attention=None):
    dtype = torch.float32 if mixed else torch.bfloat16
    model = model_on("meta" if meta else device, dtype, attention=attention)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if mixed else MixedPrecisionPolicy()
    for module in (*model, model):
        fully_shard(module, mp_policy=policy, reshard_after_forward=reshard)
    for block in model:
        block.recompute = recompute
    if meta:
        model.to_empty(device=device)
        set_model_state_dict(
            model,
            model_on(device, dtype, attention=attention).state_dict(),
            options=dcp.state_dict.StateDictOptions(full_state_dict=True),
        )
    return model


def train_steps(model, device, dtype, steps, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=LR)
    losses = []
    for step in steps:
        for micro in range(2):
            loss = loss_of(model, batch(2 * step + micro, device, dtype))
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def train_fsdp(device, options, folder=None):
    model = sharded(device, **options)
    losses = train_steps(model, device, torch.float32 if options.get("mixed") else torch.bfloat16, range(STEPS))
    if folder is not None:
        dcp.save({"model": get_model_state_dict(model), "fp8": fp8.state_dict(model)}, checkpoint_id=folder)
    result = losses, cpu(model.parameters()), cpu(fp8.state_dict(model).values())
    if options.get("attention"):
        assert_attended(model, options["attention"])
    for _ in range(2):  # what was gathered for one micro-batch says nothing of the next
        with count_casts() as casts:
            loss_of(model, batch(0, device, torch.float32 if options.get("mixed") else torch.bfloat16)).backward()
        assert casts["cast_weight"] >= 4
    return result


def train_alone(device, mixed=False, attention=None, **_):
    """What FSDP2 computes, in one process: with mixed precision the model is a BF16 copy of float32 weights."""
    model = model_on(device, torch.bfloat16, attention=attention)
    if not mixed:
        losses = train_steps(model, device, torch.bfloat16, range(STEPS))
        return losses, cpu(model.parameters()), cpu(fp8.state_dict(model).values())
    masters = [p.detach().clone() for p in model_on(device, attention=attention).parameters()]
    optimizer = torch.optim.SGD(masters, lr=LR)
    losses = []
    for step in range(STEPS):
        with torch.no_grad():
            for p, master in zip(model.parameters(), masters):
                p.copy_(master)
        for micro in range(2):
            x = batch(2 * step + micro, device)
            loss = (model(x.bfloat16()) - x.roll(1, -1)).float().square().mean()
            loss.backward()
            losses.append(loss.item())
            for p, master in zip(model.parameters(), masters):  # FSDP2 accumulates in float32
                master.grad = p.grad.float() if master.grad is None else master.grad + p.grad.float()
                p.grad = None
        optimizer.step()
        optimizer.zero_grad()
    return losses, cpu(masters), cpu(fp8.state_dict(model).values())


@pytest.mark.parametrize("options", [*FSDP.values(), *FSDP_ATTENTION.values()], ids=[*FSDP, *FSDP_ATTENTION])
def test_fsdp_equals_one_process(ranks, options):
    """Both ranks see the same batch, so that their mean is each one's gradient."""
    losses, params, state = train_alone(ranks.device, **options)
    for rank_losses, rank_params, rank_state in ranks(train_fsdp, options):
        assert rank_losses == losses
        assert_equal(rank_params, params)
        assert_equal(rank_state, state)


class Named(nn.Linear):
    pass


def train_other_classes(device, shard):
    """A subclass of nn.Linear, and a Conv1D, whose weight is gathered and seen transposed."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(Conv1D(48, 32), nn.ReLU(), Named(48, 32)) for _ in range(2))).to(device)
    fp8.convert(model, tokens=None)
    if shard:
        for module in (model[0][2], *model, model):
            fully_shard(module)
    losses = train_steps(model, device, torch.float32, range(3))
    assert isinstance(model[0][0], Conv1D) and isinstance(model[0][2], Named)
    return losses, cpu(model.parameters()), cpu(fp8.state_dict(model).values())


def test_fsdp_of_other_classes_equals_one_process(ranks):
    pytest.importorskip("transformers")
    losses, params, state = train_other_classes(ranks.device, False)
    for rank_losses, rank_params, rank_state in ranks(train_other_classes, True):
        assert rank_losses == losses
        assert_equal(rank_params, params)
        assert_equal(rank_state, state)


def past_the_hooks(device):
    model = sharded(device)
    with pytest.raises(TypeError, match="call the module that fully_shard was given"):
        model[0].up(batch(0, device, torch.bfloat16))


def test_a_sharded_layer_called_past_the_hooks_of_fsdp_is_refused(ranks):
    ranks(past_the_hooks)


@pytest.mark.parametrize("attention", [None, "fp8"])
def test_a_distributed_checkpoint_loads_on_one_process(ranks, tmp_path, attention):
    (_, params, state), _ = ranks(train_fsdp, {"attention": attention}, str(tmp_path))
    model = model_on("cpu", torch.bfloat16, attention=attention)
    loaded = {"model": model.state_dict(), "fp8": fp8.state_dict(model)}
    dcp.load(loaded, checkpoint_id=str(tmp_path))
    model.load_state_dict(loaded["model"])
    fp8.load_state_dict(model, loaded["fp8"])
    assert_equal(cpu(model.parameters()), params)
    assert_equal(cpu(fp8.state_dict(model).values()), state)


def resume_fsdp(device, folder, attention):
    model = sharded(device, meta=True, attention=attention)
    loaded = {"model": get_model_state_dict(model), "fp8": fp8.state_dict(model)}
    dcp.load(loaded, checkpoint_id=folder)
    set_model_state_dict(model, loaded["model"])
    fp8.load_state_dict(model, loaded["fp8"])
    return train_steps(model, device, torch.bfloat16, range(STEPS, STEPS + 2))


@pytest.mark.parametrize("attention", [None, "fp8"])
def test_training_resumes_from_a_distributed_checkpoint(ranks, tmp_path, attention):
    ranks(train_fsdp, {"attention": attention}, str(tmp_path))
    model = model_on(ranks.device, torch.bfloat16, attention=attention)
    train_steps(model, ranks.device, torch.bfloat16, range(STEPS))
    onwards = train_steps(model, ranks.device, torch.bfloat16, range(STEPS, STEPS + 2))
    assert ranks(resume_fsdp, str(tmp_path), attention) == [onwards, onwards]


# ---- tensor and sequence parallelism --------------------------------------------------------------------------------


def plan(sequence_parallel):
    if not sequence_parallel:
        return {"up": ColwiseParallel(), "down": RowwiseParallel()}
    return {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
    }


def train_tensor_parallel(device, state, sequence_parallel):
    mesh = dist.device_mesh.init_device_mesh(device.type, (2,))
    model = model_on(device)
    for block in model:
        parallelize_module(block, mesh, plan(sequence_parallel))
        if sequence_parallel:
            spread = {"input_layouts": Replicate(), "desired_input_layouts": Shard(1)}
            PrepareModuleInput(**spread, use_local_output=False)._apply(block, mesh)
            block.register_forward_hook(lambda module, args, y: y.full_tensor() if isinstance(y, DTensor) else y)
    fp8.load_state_dict(model, state)  # otherwise the first step is scaled by each shard's own amax
    fp8.reduce_amaxes(model)
    losses, grads = [], None
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, foreach=False)  # DTensors and tensors beside each other
    for step in range(STEPS):
        loss = loss_of(model, batch(step, device))
        loss.backward()
        losses.append(loss.item())
        if grads is None:
            grads = cpu(p.grad for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.grad is None or p.placements == p.grad.placements for p in model.parameters())
    return losses, grads, cpu(model.parameters()), cpu(fp8.state_dict(model).values())


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_parallel_equals_one_process(ranks, sequence_parallel):
    """The codes of the first step are the same, the sums are split: up to rounding in the GEMMs. Later a value that
    fell on the other side of a rounding step moves others: sums that are off by 2^-16 of the largest, and as well by
    2^-11, move what five steps change of a parameter by up to 5 %. The biases of the norms begin at 0 and are nothing
    but that change."""
    alone = model_on(ranks.device)
    start = cpu(alone.parameters())
    train_one = torch.optim.SGD(alone.parameters(), lr=0.0)
    loss_of(alone, batch(99, ranks.device)).backward()
    train_one.step()
    train_one.zero_grad()
    state = {key: value.cpu() for key, value in fp8.state_dict(alone).items()}
    losses, grads = [], None
    optimizer = torch.optim.SGD(alone.parameters(), lr=LR)
    for step in range(STEPS):
        loss = loss_of(alone, batch(step, ranks.device))
        loss.backward()
        losses.append(loss.item())
        grads = grads or cpu(p.grad for p in alone.parameters())
        optimizer.step()
        optimizer.zero_grad()
    first, second = ranks(train_tensor_parallel, state, sequence_parallel)
    assert_equal(first[3], second[3])  # the scales of both ranks
    for rank_losses, rank_grads, params, _ in (first, second):
        assert rank_losses == pytest.approx(losses, rel=1e-3)
        for got, expected in zip(rank_grads, grads):
            assert (got - expected).norm() <= 1e-2 * expected.norm()
        for got, expected, before in zip(params, cpu(alone.parameters()), start):
            assert (got - expected).norm() <= 8e-2 * (expected - before).norm()


def replicated_and_refused(device):
    mesh = dist.device_mesh.init_device_mesh(device.type, (2,))
    torch.manual_seed(0)
    layer = fp8.Linear(32, 32, device=device, recipe=fp8.CurrentScaling())
    twin = copy.deepcopy(layer)
    dist.tensor.distribute_module(layer, mesh)  # replicates parameters and buffers
    x = torch.randn(8, 32, device=device)
    y = layer(dist.tensor.distribute_tensor(x, mesh, [Shard(0)]))
    mine = x.chunk(2)[dist.get_rank()]
    assert torch.equal(y.to_local(), twin(mine))
    y.sum().backward()
    gradients = [torch.autograd.grad(twin(half).sum(), twin.weight)[0] for half in x.chunk(2)]
    assert torch.equal(layer.weight.grad.full_tensor(), gradients[0] + gradients[1])
    with pytest.raises(TypeError, match="needs a DTensor as input"):
        layer(x)
    layer.fuse_main_grad = True
    with pytest.raises(NotImplementedError, match="fuse_main_grad"):
        layer(x)
    layer.weight = nn.Parameter(dist.tensor.distribute_tensor(torch.randn(32, 32), dist.device_mesh.init_device_mesh(
        device.type, (1, 2)), [Replicate(), Shard(0)]))  # fmt: skip
    with pytest.raises(NotImplementedError, match="one mesh dimension"):
        layer(x)


def test_replicated_weight_and_refused_placements(ranks):
    ranks(replicated_and_refused)


# ---- blocks ---------------------------------------------------------------------------------------------------------


def blocks_on(device, dtype=torch.bfloat16, recompute=False):
    torch.manual_seed(0)
    recipe = fp8.DelayedScaling(amax_history_len=3)
    made = {"num_kv_heads": 2, "device": device, "dtype": dtype, "recipe": recipe, "recompute": recompute}
    return nn.Sequential(*(fp8.TransformerBlock(32, 4, 64, **made) for _ in range(2)))


def train_blocks(device, how=None, recompute=False, attention=None):
    if attention:
        model = inner = attending_on(device, torch.bfloat16, attention)
        for block in model:
            block.recompute = recompute
    else:
        model = inner = blocks_on(device, recompute=recompute)
    if how:
        fp8.reduce_amaxes(model)
    if how == "fsdp":
        for block in model:
            fully_shard(block)
        fully_shard(model)
    elif how == "ddp":
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    losses = []
    for step in range(STEPS):
        with count_casts() as casts:
            loss = loss_of(model, batch(step, device, torch.bfloat16))
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if attention:
        assert_attended(inner, attention)
    return losses, cpu(model.parameters()), cpu(fp8.state_dict(inner).values()), casts["cast_input"]


@pytest.mark.parametrize("attention", [None, "fp8_forward", "fp8"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("how", ["fsdp", "ddp"])
def test_blocks_on_two_ranks_are_those_of_one_process(ranks, how, recompute, attention):
    """Both ranks train on one batch, so that all is equal to the bit; the norms' codes are taken there, too."""
    (losses, params, state, casts), other = ranks(train_blocks, how, recompute, attention)
    expected = train_blocks(ranks.device, attention=attention)
    assert losses == other[0] == expected[0]
    assert_equal(params, expected[1]), assert_equal(state, expected[2])
    assert expected[3] == 2 and casts == (4 if attention and recompute else 2)  # a checkpoint runs all of it again


def steps_of_blocks(model, device, steps, lr=LR, dtype=torch.float32):
    """Losses, and the gradients of the first step."""
    losses, grads = [], None
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, foreach=False)  # DTensors and tensors beside each other
    for step in steps:
        loss = loss_of(model, batch(step, device, dtype))
        loss.backward()
        losses.append(loss.item())
        grads = grads or cpu(p.grad for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    return losses, grads


def train_parallel_blocks(device, state):
    mesh = dist.device_mesh.init_device_mesh(device.type, (2,))
    model = blocks_on(device, torch.float32)
    across = {name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj", "mlp.gate_proj", "mlp.up_proj")}
    along = {name: RowwiseParallel() for name in ("o_proj", "mlp.down_proj")}
    for block in model:
        parallelize_module(block, mesh, across | along)
    fp8.load_state_dict(model, state)  # otherwise the first step is scaled by each shard's own amax
    fp8.reduce_amaxes(model)
    return *steps_of_blocks(model, device, range(STEPS)), cpu(fp8.state_dict(model).values())


def test_tensor_parallel_blocks(ranks):
    """Their layers run one by one, each on its rank's part: as in one process, up to rounding."""
    alone = blocks_on(ranks.device, torch.float32)
    steps_of_blocks(alone, ranks.device, [99], lr=0.0)
    state = {key: value.cpu() for key, value in fp8.state_dict(alone).items()}
    losses, grads = steps_of_blocks(alone, ranks.device, range(STEPS))
    first, second = ranks(train_parallel_blocks, state)
    assert_equal(first[2], second[2])  # the scales of both ranks
    for rank_losses, rank_grads, _ in (first, second):
        assert rank_losses == pytest.approx(losses, rel=2e-3)
        for got, expected in zip(rank_grads, grads, strict=True):
            assert (got - expected).norm() <= 3e-2 * expected.norm()


# ---- FP8 attention --------------------------------------------------------------------------------------------------


def heads_of(seed, dtype=torch.bfloat16):
    """q, k, v and dy: two samples, four heads over two of keys and values."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, heads, 16, 128, generator=generator).to(dtype) for heads in (4, 2, 2, 4)]


def attend(module, tensors, causal=True):
    """The result and the three gradients of two steps, plain tensors, and the state after them."""
    results = []
    for q, k, v, dy in tensors:
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        y = module(*leaves, is_causal=causal, enable_gqa=True)
        y.backward(dy)
        results += cpu([y, *(leaf.grad for leaf in leaves)])
        fp8.update_scales(module)
    return results, cpu(fp8.state_dict(module).values())


def attention_of(device, mode, state=None):
    module = fp8.ScaledDotProductAttention(fp8.DelayedScaling(amax_history_len=3), mode=mode).to(device)
    if state is not None:
        fp8.load_state_dict(module, state)
    return module


def attend_in_parts(device, mode, state, dim, as_dtensors):
    mesh = dist.device_mesh.init_device_mesh(device.type, (2,))
    module = attention_of(device, mode, state)
    fp8.reduce_amaxes(module)
    steps = [
        [dist.tensor.distribute_tensor(t.to(device), mesh, [Shard(dim)]) for t in heads_of(seed)] for seed in (1, 2)
    ]
    if not as_dtensors:
        steps = [[t.to_local().contiguous() for t in tensors] for tensors in steps]
    results, after = attend(module, steps)
    assert module.last == (mode, "asked for")
    return results, after


@pytest.mark.parametrize("as_dtensors", [True, False])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("mode", ["fp8_forward", "fp8"])
def test_attention_of_each_ranks_heads_or_samples_is_that_of_one_process(ranks, mode, dim, as_dtensors):
    """To the bit, once scales are known: no head and no sample adds to another; and so are the scales after it."""
    alone = attention_of(ranks.device, mode)
    attend(alone, [[t.to(ranks.device) for t in heads_of(0)]])
    state = {key: value.cpu() for key, value in fp8.state_dict(alone).items()}
    results, after = attend(alone, [[t.to(ranks.device) for t in heads_of(seed)] for seed in (1, 2)])
    made = ranks(attend_in_parts, mode, state, dim, as_dtensors)
    for rank, (got, scales) in enumerate(made):
        assert_equal(scales, after)
        assert_equal(got, results if as_dtensors else [t.chunk(2, dim)[rank] for t in results])


def attend_to_dtensors(device):
    mesh = dist.device_mesh.init_device_mesh(device.type, (2,))
    made = heads_of(0)
    q, k, v, _ = (t.to(device) for t in made)

    def lie(*placements, tensors=(q, k, v)):
        return [dist.tensor.distribute_tensor(t, mesh, [place]) for t, place in zip(tensors, placements)]

    attention = attention_of(device, "fp8")
    y = attention(*lie(*[Replicate()] * 3), is_causal=True, enable_gqa=True)
    assert y.placements == (Replicate(),)
    assert torch.equal(y.full_tensor(), attention_of(device, "fp8")(q, k, v, is_causal=True, enable_gqa=True))
    before = attention.fp8_slots.clone()
    odd = [t[:, :count] for t, count in zip((q, k, v), (2, 1, 1))]  # the second rank would have no keys
    three = [t[:, :1].repeat(1, count, 1, 1) for t, count in zip((q, k, v), (6, 3, 3))]  # keys of other queries
    refused = {
        "tokens": lie(*[Shard(2)] * 3),
        "elements": lie(*[Shard(3)] * 3),
        "not alike": lie(Shard(1), Replicate(), Replicate()),
        "of one head": lie(*[Shard(1)] * 3, tensors=odd),
        "three over two": lie(*[Shard(1)] * 3, tensors=three),
        "one alone": [*lie(Shard(1)), k[:, :1], v[:, :1]],
        "not the first": [q[:, :2], *lie(Shard(1), Shard(1), tensors=(k, v))],
    }
    for name, heads in refused.items():
        for mode in ("fp8_forward", "fp8"):
            with pytest.raises(ValueError, match="DTensors that lie as .*; what can is 16bit"):
                (
                    fp8.scaled_dot_product_attention(
                        *heads, is_causal=True, enable_gqa=True, mode=mode, state=attention
                    ),
                    name,
                )
    assert torch.equal(attention.fp8_slots, before)


def test_dtensors_that_no_rank_can_attend_to_alone_are_refused(ranks):
    """Queries would meet the keys of other heads, or too few, and nobody would see it."""
    ranks(attend_to_dtensors)


def train_parallel_attention(device, state, mode, local):
    mesh = dist.device_mesh.init_device_mesh(device.type, (2,))
    model = attending_on(device, torch.bfloat16, mode, heads=4)
    for block in model:
        across = {name: ColwiseParallel(use_local_output=local) for name in ("q_proj", "k_proj", "v_proj")}
        across |= {name: ColwiseParallel() for name in ("mlp.gate_proj", "mlp.up_proj")}
        parallelize_module(block, mesh, across | {name: RowwiseParallel() for name in ("o_proj", "mlp.down_proj")})
    fp8.load_state_dict(model, state)
    fp8.reduce_amaxes(model)
    seen = []
    hook = model[0].sdpa.register_forward_pre_hook(lambda m, args: seen.extend(t.shape[1] for t in args[:3]))
    made = *steps_of_blocks(model, device, range(STEPS), dtype=torch.bfloat16), cpu(fp8.state_dict(model).values())
    hook.remove()
    assert seen[:3] == ([2, 1, 1] if local else [4, 2, 2])
    assert_attended(model, mode)
    return made


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("mode", ["fp8_forward", "fp8"])
def test_tensor_parallel_attention(ranks, mode, local):
    """Each rank attends with its own heads. Sums of two ranks are rounded to 16 bits once more, and a value that falls
    on the other side of a rounding step moves others: gradients stay as far from those in 16 bits as without ranks."""
    alone = attending_on(ranks.device, torch.bfloat16, mode, heads=4)
    steps_of_blocks(alone, ranks.device, [99], lr=0.0, dtype=torch.bfloat16)
    state = {key: value.cpu() for key, value in fp8.state_dict(alone).items()}
    with fp8.disabled(alone):
        _, exact = steps_of_blocks(alone, ranks.device, [0], lr=0.0, dtype=torch.bfloat16)
    losses, grads = steps_of_blocks(alone, ranks.device, range(STEPS), dtype=torch.bfloat16)
    first, second = ranks(train_parallel_attention, state, mode, local)
    assert_equal(first[2], second[2])  # the scales of both ranks
    for rank_losses, rank_grads, _ in (first, second):
        assert rank_losses == pytest.approx(losses, rel=3e-3)
        for got, expected, in_16_bits in zip(rank_grads, grads, exact, strict=True):
            assert (got - in_16_bits).norm() <= 1.5 * (expected - in_16_bits).norm()


def llama_on(device, mode):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 64, "head_dim": 128}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    model = fp8.convert(model.to(device, torch.bfloat16), fp8.DelayedScaling(amax_history_len=3), tokens=None)
    return fp8.fuse(model, attention=mode)


def train_llama(device, mode, state=None):
    """Losses, the gradients of the first step, the scaling state; sharded where a state is given."""
    model = llama_on(device, mode)
    if state is not None:
        mesh = dist.device_mesh.init_device_mesh(device.type, (2,))
        across = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
        plan = {name: ColwiseParallel() for name in across}
        plan |= {name: RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
        for layer in model.model.layers:
            parallelize_module(layer, mesh, plan)
        fp8.load_state_dict(model, state)
        fp8.reduce_amaxes(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0 if state is None else LR, foreach=False)

    def step(seed):
        x = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(seed)).to(device)
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        grads = cpu(p.grad for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        return loss.item(), grads

    if state is None:
        step(99)
        state = {key: value.cpu() for key, value in fp8.state_dict(model).items()}
        with fp8.disabled(model):
            _, exact = step(0)
        optimizer.param_groups[0]["lr"] = LR
    else:
        exact = None
    made = [step(seed) for seed in range(STEPS)]
    for layer in model.model.layers:
        assert layer.self_attn.fp8_attention.last == (mode, "asked for")
    return state, exact, [loss for loss, _ in made], made[0][1], cpu(fp8.state_dict(model).values())


@pytest.mark.parametrize("mode", ["fp8_forward", "fp8"])
def test_a_tensor_parallel_llama_attends_in_fp8(ranks, mode):
    """As the block: q, k, v, gate and up column-wise, o and down row-wise."""
    pytest.importorskip("transformers")
    state, exact, losses, grads, _ = train_llama(ranks.device, mode)
    first, second = ranks(train_llama, mode, state)
    assert_equal(first[4], second[4])
    for _, _, rank_losses, rank_grads, _ in (first, second):
        assert rank_losses == pytest.approx(losses, rel=3e-3)
        for got, expected, in_16_bits in zip(rank_grads, grads, exact, strict=True):
            assert (got - in_16_bits).norm() <= 1.5 * (expected - in_16_bits).norm()
