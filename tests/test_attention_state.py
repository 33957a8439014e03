"""The scaling state of attention: ten roles, each with its own cast, in a module without parameters."""

import copy
import gc
import io
import math
import pickle
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch_fp8 as fp8
from oracle import E4M3, E5M2, MAX, amax
from test_scaling import Role, assert_state
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch_fp8.layers import attention as attention_module
from torch_fp8.layers.attention import BACKWARD_ROLES, EVERY_ROLE, FORWARD_ROLES, ROLES, call_of, note_ran

INF, NAN = float("inf"), float("nan")
P = ROLES.index("p")
FORMATS = (E4M3,) * 5 + (E5M2,) * 5


class Recorded(torch.autograd.Function):
    """Attention in plain PyTorch that records the amax of every role, as an op in FP8 does."""

    @staticmethod
    def forward(ctx, module, call, q, k, v):
        ctx.module, ctx.call = module, call
        ctx.save_for_backward(q, k, v)
        p = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1)
        record(module, call, call.slots, (q, k, v, p, p @ v))
        return p @ v

    @staticmethod
    def backward(ctx, do):
        q, k, v = ctx.saved_tensors
        p = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1)
        dp = p * (do @ v.transpose(-1, -2) - (do * (p @ v)).sum(-1, keepdim=True))
        scale = 1 / math.sqrt(q.shape[-1])
        grads = dp @ k * scale, dp.transpose(-1, -2) @ q * scale, p.transpose(-1, -2) @ do
        record(ctx.module, ctx.call, ctx.call.grad_slots, (do, dp, *grads), first=5)
        if ctx.call.training:
            ctx.module.fp8_state.memo.note_used_roles(BACKWARD_ROLES)
        return None, None, *grads


def record(module, call, slots, tensors, first=0):
    for i, tensor in enumerate(tensors, start=first):
        if call.record and not module.fp8_state.roles[i].constant:
            slots[i, 2] = torch.maximum(slots[i, 2], tensor.detach().abs().max().float())


@pytest.fixture(autouse=True)
def fp8_attention(monkeypatch):
    """Attention runs in FP8 wherever it may, as far as its scaling state can tell."""

    def attend(module, *given):
        query, key, value = (tensor for tensor in given if isinstance(tensor, torch.Tensor))
        if not module.fp8_enabled or module.mode == "16bit":
            note_ran(module, "16bit", "disabled" if not module.fp8_enabled else "asked for")
            return F.scaled_dot_product_attention(query, key, value)
        note_ran(module, "fp8", "it is faster")
        return Recorded.apply(module, call_of(module, query, EVERY_ROLE), query, key, value)

    monkeypatch.setattr(attention_module, "_attend", attend)


class Block(nn.Module):
    """Projections around an attention with two heads of 16."""

    def __init__(self, **options):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(32, 32) for _ in range(4))
        self.attention = fp8.ScaledDotProductAttention(**options)

    def forward(self, x):
        q, k, v = (proj(x).unflatten(-1, (2, 16)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(self.attention(q, k, v).transpose(1, 2).flatten(-2))


def make(device, recipe=None, owned=True, **options):
    torch.manual_seed(3)
    recipe = fp8.DelayedScaling(amax_history_len=5) if recipe is None else recipe
    block = fp8.convert(Block(recipe=recipe, **options).to(device), recipe, tokens=None)
    if owned:
        block.attention.goes_with(block.q_proj)
    return block


def sgd(module, lr=0.0):
    return torch.optim.SGD(module.parameters(), lr=lr)


def train(model, optimizer, steps, start=0):
    device = next(model.parameters()).device
    losses = []
    for step in range(start, start + steps):
        x = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(step)).to(device)
        loss = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def cursors(attention):
    return attention.fp8_slots[:, 3].tolist()


STEPPED = [1, 1, 1, 0, 1, 1, 1, 1, 1, 1]  # cursors after one step: p is constant


# ---- roles and casts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["HYBRID", "E4M3"])
@pytest.mark.parametrize("p_scale", [256.0, 1, 0.5, None])
@pytest.mark.parametrize(
    ("recipe", "how", "power_of_two", "margins"),
    [
        (fp8.DelayedScaling, {"margin": 2}, False, (2, 2)),
        (fp8.DelayedScaling, {"power_of_two": True}, True, (0, 0)),
        (fp8.CurrentScaling, {"grad_margin": 3}, False, (0, 3)),
        (fp8.CurrentScaling, {"power_of_two": True}, True, (0, 0)),
        (fp8.ConstantScaling, {"bias": 4, "grad_margin": 7}, True, (0, 7)),
    ],
)
def test_each_role_is_cast_as_the_recipe_says(recipe, how, power_of_two, margins, format, p_scale):
    attention = fp8.ScaledDotProductAttention(recipe(fp8_format=format, **how), p_scale=p_scale)
    state = attention.fp8_state
    kind = {"D": "delayed", "Cu": "current", "Co": "constant"}[recipe.__name__[: 1 if recipe.__name__[0] == "D" else 2]]
    assert [role.name for role in state.roles] == list(ROLES) and state.slots.shape == (10, 4)
    for i, (role, row) in enumerate(zip(state.roles, state.slots.tolist())):
        gradient = role.name.startswith("grad_")
        assert role.cast.dtype == (E5M2 if gradient and format == "HYBRID" else E4M3)
        scale = 2.0 ** (4 - 7 * gradient) if kind == "constant" else 1.0
        if i == P and p_scale is not None:
            assert role.cast.scaling.name == "constant" and role.constant == row[1] == p_scale
            scale = p_scale
        else:
            assert role.cast.scaling.name == kind and bool(role.constant) == (kind == "constant")
            assert role.cast.margin == margins[gradient]
            assert role.cast.power_of_two == (power_of_two or role.name in ("q", "k"))
        assert row == [1 / scale, scale, 0, 0]
        assert state.casts[i] == role.cast.packed
    assert state.is_constant == (kind == "constant")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"mode": "fp16"}, ValueError, "mode must be one of .*'fp8_forward'.*, got 'fp16'"),
        ({"p_scale": 300.0}, ValueError, "p_scale must be None or a power of two from 2\\*\\*-31 to 256, got 300.0"),
        ({"p_scale": 512.0}, ValueError, "p_scale must be .* to 256, got 512.0"),
        ({"p_scale": 0.0}, ValueError, "p_scale must be"),
        ({"p_scale": "256"}, ValueError, "p_scale must be"),
        ({"p_scale": True}, ValueError, "p_scale must be"),
        ({"p_scale": NAN}, ValueError, "p_scale must be"),
        ({"recipe": "delayed"}, TypeError, "recipe must be a DelayedScaling, .*, got str"),
    ],
)
def test_what_no_attention_can_be_is_refused(options, error, match):
    with pytest.raises(error, match=f"torch_fp8: {match}"):
        fp8.ScaledDotProductAttention(**options)
    with pytest.raises(TypeError, match="goes with modules or parameters, got str"):
        fp8.ScaledDotProductAttention().goes_with("q_proj")


def test_without_fp8_it_is_pytorchs(device, monkeypatch):
    monkeypatch.undo()
    attention = fp8.ScaledDotProductAttention(mode="16bit")
    q, k, v = (torch.randn(2, heads, 8, 16, device=device) for heads in (4, 2, 2))
    mask = torch.randn(8, 8, device=device)
    expected = F.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True)
    assert torch.equal(attention(q, k, v, mask, scale=0.3, enable_gqa=True), expected)
    assert attention.last == ("16bit", "asked for")


# ---- the update ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared_scale", [False, True])
@pytest.mark.parametrize("p_scale", [256.0, None])
@pytest.mark.parametrize(
    "recipe",
    [
        fp8.DelayedScaling(amax_history_len=3),
        fp8.DelayedScaling(amax_compute_algo="most_recent", margin=3),
        fp8.DelayedScaling(amax_history_len=16, power_of_two=True, margin=1),
    ],
    ids=str,
)
def test_every_role_follows_its_own_history(device, recipe, p_scale, shared_scale):
    """To the bit, in one update with linear layers and another attention."""
    attentions = [
        fp8.ScaledDotProductAttention(recipe, shared_scale=shared, p_scale=p_scale)
        for shared in (shared_scale, not shared_scale)
    ]
    layers = [fp8.Linear(16, 16, recipe=recipe), *attentions]
    model = nn.ModuleList(layers).to(device)
    formats = [(E4M3, E4M3, E5M2), FORMATS, FORMATS]
    oracles = [[Role(dtype, recipe) for dtype in dtypes] for dtypes in formats]
    for attention, roles in zip(attentions, oracles[1:]):
        for i in range(3 if attention.fp8_state.shared_scale else 2):
            roles[i].recipe = replace(recipe, power_of_two=True)
    if p_scale is not None:
        oracles[1][P].scale = oracles[2][P].scale = p_scale
    generator = torch.Generator().manual_seed(4)
    for step in range(24):
        for layer, roles in zip(layers, oracles):
            amaxes = torch.exp2(torch.randn(len(roles), generator=generator) * 6)
            for special in (0.0, INF, NAN):
                amaxes[torch.rand(len(amaxes), generator=generator) < 0.06] = special
            if p_scale is not None and len(roles) == 10:
                amaxes[P] = 0.0  # a constant role records nothing
            layer.fp8_slots[:, 2] = amaxes.to(device)
            for role, seen in zip(roles, amaxes.tolist()):
                role.amax = seen
            if len(roles) == 10 and layer.fp8_state.shared_scale:
                seen = [role.amax for role in roles[:3]]
                for role in roles[:3]:
                    role.amax = NAN if any(x != x for x in seen) else max(seen)
            for role in roles:
                role.update()
        fp8.update_scales(model)
        for layer, roles in zip(layers, oracles):
            assert_state(layer, roles, (step, type(layer).__name__))


def test_training_records_what_each_role_saw(device):
    block = make(device)
    x = torch.randn(2, 8, 32, device=device)
    seen = {}
    block.attention.register_forward_hook(lambda m, args, out: seen.update(q=args[0], k=args[1], v=args[2], o=out))
    block(x).square().sum().backward()
    rows = dict(zip(ROLES, block.attention.fp8_slots.tolist()))
    for role, tensor in seen.items():
        assert rows[role][2] == amax(tensor.detach())
    assert rows["p"] == [1 / 256, 256, 0, 0]
    assert all(rows[role][2] > 0 for role in ROLES if role != "p")
    before = block.attention.fp8_slots.clone()
    with torch.no_grad():
        block(3 * x)
    block.eval()
    block(5 * x).sum().backward()
    with fp8.disabled(block):
        assert not block.attention.fp8_enabled
        block.train()(7 * x).sum().backward()
    assert block.attention.last == ("16bit", "disabled") and block.attention.fp8_enabled
    assert torch.equal(block.attention.fp8_slots, before)


def test_what_runs_in_16_bits_is_not_updated(device):
    block = make(device, mode="16bit")
    train(block, sgd(block), 2)
    assert cursors(block.attention) == [0] * 10


def test_a_constant_role_is_not_waited_for(device):
    """Or every update would read the device again."""
    block = make(device)
    optimizer = sgd(block)
    for step in range(3):
        block(torch.randn(2, 8, 32, device=device)).square().sum().backward()
        assert fp8.scaling._may_have_begun(block.attention.fp8_state) == (step == 0)
        optimizer.step()
    assert block.attention.fp8_state.has_history == tuple(role != "p" for role in ROLES)
    state = block.attention.fp8_state
    assert state.memo.history(state.slots, EVERY_ROLE) == EVERY_ROLE & ~(1 << P)


def test_a_row_that_is_no_state_is_replaced_when_it_is_read(device):
    attention = make(device).attention
    state = attention.fp8_state
    state.slots[:, :] = torch.tensor([0.5, 2.0, 0.0, 3.0], device=device)  # sound, but not p's
    state.slots[ROLES.index("grad_q")] = NAN
    state.memo.forget()
    rows = state.memo.history(state.slots, 0)
    assert rows == EVERY_ROLE & ~(1 << P) & ~(1 << ROLES.index("grad_q"))
    assert state.slots[P].tolist() == [1 / 256, 256, 0, 0]
    assert state.slots[ROLES.index("grad_q")].tolist() == [1, 1, 0, 0]
    with pytest.raises(RuntimeError, match=r"slots must be .* of shape \(10, 4\), got Float \[3, 4\]"):
        state.memo.forget()
        state.memo.history(fp8._C.new_slots(device), 0)


def test_capture_without_history_names_the_role(cuda):
    block = make(cuda, owned=True)
    optimizer = sgd(block)
    for _ in range(2):
        block(torch.randn(2, 8, 32, device=cuda)).sum().backward()
        optimizer.step()
    state = block.attention.fp8_state
    state.slots[ROLES.index("grad_p"), 3] = 0
    state.memo.forget()
    state.memo.history(state.slots, 0)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="while this layer's grad_p has no amax history"), torch.cuda.graph(graph):
        call_of(block.attention, torch.zeros(1, device=cuda), EVERY_ROLE)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_and_micro_batches_record_maxima(device, use_reentrant):
    states = []
    for recompute in (False, True):
        block = make(device)
        optimizer = sgd(block)
        for step in range(2):
            for micro in range(3):
                x = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(10 * step + micro)).to(device)
                x.requires_grad_()
                y = checkpoint(block, x, use_reentrant=use_reentrant) if recompute else block(x)
                y.square().sum().backward()
            optimizer.step()
        states.append(block.attention.fp8_slots.clone())
        assert cursors(block.attention) == [2 * c for c in STEPPED]
    assert torch.equal(*states)


# ---- whose step ends it ----------------------------------------------------------------------------------------------


class TestWhoUpdates:
    def run(self, block, device):
        block(torch.randn(2, 8, 32, device=device)).square().sum().backward()

    def test_its_owners_optimizer(self, device):
        block = make(device)
        mine, others = sgd(block.q_proj), torch.optim.SGD([*block.k_proj.parameters(), *block.v_proj.parameters()])
        self.run(block, device)
        mine.step(), others.step()
        self.run(block, device)
        others.step()
        assert cursors(block.attention) == STEPPED
        mine.step()
        assert cursors(block.attention) == [2 * c for c in STEPPED]

    def test_a_forward_alone_is_a_step_too(self, device):
        block = make(device)
        block(torch.randn(2, 8, 32, device=device))
        sgd(block).step()
        assert cursors(block.attention) == [c * (i < 5) for i, c in enumerate(STEPPED)]

    def test_another_models_optimizer_leaves_it_alone(self, device):
        block, other = make(device), make(device)
        mine = sgd(block)
        self.run(block, device), mine.step()
        self.run(block, device), self.run(other, device)
        sgd(other).step()
        assert cursors(block.attention) == STEPPED and cursors(other.attention) == STEPPED
        mine.step()
        assert cursors(block.attention) == [2 * c for c in STEPPED]

    def test_a_parameter_may_own_it_and_a_new_one_may_take_its_place(self, device):
        block = make(device, owned=False)
        block.attention.goes_with(block.v_proj.weight)
        self.run(block, device)
        torch.optim.SGD([block.v_proj.weight]).step()
        assert cursors(block.attention) == STEPPED
        block.attention.goes_with(block.k_proj)
        block.k_proj.weight = nn.Parameter(block.k_proj.weight.detach().clone())  # as FSDP2 exchanges them
        self.run(block, device)
        torch.optim.SGD([block.k_proj.weight]).step()
        assert cursors(block.attention) == [2 * c for c in STEPPED]

    def test_without_owners_it_goes_with_its_model(self, device):
        block, other = make(device, owned=False), make(device, owned=False)
        self.run(block, device), self.run(other, device)
        torch.optim.SGD(block.o_proj.parameters()).step()
        assert cursors(block.attention) == STEPPED and cursors(other.attention) == [0] * 10

    def test_without_a_model_it_goes_with_its_thread(self, device):
        attention, linear = fp8.ScaledDotProductAttention(), nn.Linear(16, 16, device=device)
        q = linear(torch.randn(1, 2, 8, 16, device=device))
        attention(q, q, q).square().sum().backward()
        sgd(linear).step()
        assert cursors(attention) == STEPPED

        import threading

        def elsewhere():
            q = torch.randn(1, 2, 8, 16, device=device)
            attention(q, q, q)

        thread = threading.Thread(target=elsewhere)
        thread.start(), thread.join()
        sgd(linear).step()
        assert cursors(attention) == STEPPED

    def test_owners_that_are_frozen_or_gone_do_not_hold_it_back(self, device):
        for case in ("frozen", "gone"):
            block = make(device, owned=False)
            block.attention.fp8_state.model = None
            owner = nn.Linear(4, 4, device=device).requires_grad_(case == "gone")
            block.attention.goes_with(owner)
            if case == "gone":
                del owner
                gc.collect()
                assert block.attention.owners() == []
            self.run(block, device)
            torch.optim.SGD(block.o_proj.parameters()).step()
            assert cursors(block.attention) == STEPPED, case

    def test_masters_of_its_owners(self, device):
        """An optimizer that holds nothing of anybody ends the step of the thread."""
        block = make(device)
        masters = [nn.Parameter(p.detach().clone()) for p in block.parameters()]
        self.run(block, device)
        torch.optim.SGD(masters).step()
        assert cursors(block.attention) == STEPPED

    def test_off_and_by_hand(self, device):
        block = make(device, auto_update=False)
        self.run(block, device)
        sgd(block).step()
        assert cursors(block.attention) == [0] * 10 and (block.attention.fp8_slots[:3, 2] > 0).all()
        fp8.update_scales(block)
        assert cursors(block.attention) == STEPPED


def test_amaxes_of_all_ranks_are_reduced_with_those_of_layers(device):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        block, alone = make(device), make(device)
        fp8.reduce_amaxes(block)
        assert block.attention.fp8_state.reduction is block.q_proj.fp8_state.reduction is not None
        assert train(block, sgd(block), 2) == train(alone, sgd(alone), 2)
        for (key, ours), theirs in zip(fp8.state_dict(block).items(), fp8.state_dict(alone).values()):
            assert torch.equal(ours, theirs), key
        assert copy.deepcopy(block).attention.fp8_state.reduction is None
    finally:
        dist.destroy_process_group()


# ---- saving and loading ----------------------------------------------------------------------------------------------


def state_bits(model):
    return {key: t.cpu().view(torch.uint8) for key, t in {**model.state_dict(), **fp8.state_dict(model)}.items()}


def assert_same(a, b):
    ours, theirs = state_bits(a), state_bits(b)
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


@pytest.mark.parametrize("options", [{}, {"shared_scale": True, "p_scale": None}], ids=str)
@pytest.mark.parametrize("weights_first", [True, False])
def test_resumed_training_gives_the_same_bits(device, weights_first, options):
    straight = make(device, **options)
    optimizer = torch.optim.AdamW(straight.parameters(), lr=1e-2)
    train(straight, optimizer, 4)
    file = io.BytesIO()
    torch.save([straight.state_dict(), optimizer.state_dict(), fp8.state_dict(straight)], file)
    expected = train(straight, optimizer, 4, start=4)

    file.seek(0)
    weights, of_optimizer, scaling = torch.load(file, weights_only=True, map_location=device)
    assert scaling["attention.fp8_slots"].shape == (10, 4) and scaling["attention.fp8_history"].shape == (10, 5)
    resumed = make(device, **options)
    train(resumed, sgd(resumed), 1, start=99)
    optimizer = torch.optim.AdamW(resumed.parameters(), lr=1e-2)
    if weights_first:
        resumed.load_state_dict(weights)
    fp8.load_state_dict(resumed, scaling)
    if not weights_first:
        resumed.load_state_dict(weights)
    optimizer.load_state_dict(of_optimizer)
    assert train(resumed, optimizer, 4, start=4) == expected
    assert_same(resumed, straight)


def test_weights_without_scaling_state_begin_anew(device):
    block = make(device)
    train(block, sgd(block), 2)
    block.load_state_dict(make(device).state_dict())
    assert cursors(block.attention) == [0] * 10 and block.attention.fp8_history.count_nonzero() == 0
    assert block.attention.fp8_slots[P].tolist() == [1 / 256, 256, 0, 0]


def test_constant_scaling_is_not_saved(device):
    block = make(device, fp8.ConstantScaling(bias=3, grad_margin=2))
    train(block, sgd(block), 2)
    assert fp8.state_dict(block) == {}
    assert block.attention.fp8_slots[:, 1].tolist() == [8, 8, 8, 256, 8, 2, 2, 2, 2, 2]
    fp8.load_state_dict(block, {})


def put(row, column, value):
    def change(tensor):
        tensor = tensor.clone()
        tensor[row, column] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("options", "saved", "change", "match"),
    [
        ({}, {}, ("slots", lambda t: t[:3]), r"attention.fp8_slots must have shape \[10, 4\], got \[3, 4\]"),
        ({}, {}, ("history", lambda t: t[:, :2]), r"attention.fp8_history must have shape \[10, 5\], got \[10, 2\]"),
        ({}, {}, ("slots", put(7, 1, NAN)), "attention.fp8_slots holds values that no scaling state has"),
        ({}, {"p_scale": 128.0}, None, "p has the constant scale 256, the saved state 128; build the model with"),
        ({}, {"p_scale": None}, None, "p has the constant scale 256, the saved state one with a history"),
        ({"shared_scale": True}, {}, None, "q, k, v have one scale, in the saved state several"),
        ({"shared_scale": True}, {"shared_scale": True}, ("history", put(1, 4, 77.0)), "q, k, v have one scale"),
    ],
)  # fmt: skip
def test_a_state_that_does_not_fit_is_named_and_nothing_is_loaded(device, options, saved, change, match):
    block, other = make(device, **options), make(device, **saved)
    train(block, sgd(block), 3), train(other, sgd(other), 4, start=50)
    state = fp8.state_dict(other)
    if change is not None:
        key = f"attention.fp8_{change[0]}"
        state[key] = change[1](state[key])
    before = state_bits(block)
    with pytest.raises(ValueError, match=f"torch_fp8: .*{match}"):
        fp8.load_state_dict(block, state)
    after = state_bits(block)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_a_state_without_attention_is_missing_it(device):
    block = make(device)
    state = {key: t for key, t in fp8.state_dict(block).items() if not key.startswith("attention")}
    with pytest.raises(KeyError, match="missing attention.fp8_history, attention.fp8_slots, surplus none"):
        fp8.load_state_dict(block, state)


def test_a_state_is_loaded_into_what_came_from_the_meta_device(device):
    trained = make(device)
    train(trained, sgd(trained), 2)
    with torch.device("meta"):
        block = make("meta")
    assert block.attention.fp8_slots.is_meta
    with pytest.raises(ValueError, match="is on the meta device, where its scaling state has no values"):
        fp8.load_state_dict(block, fp8.state_dict(trained))
    block.load_state_dict(trained.state_dict(), assign=True)
    fp8.load_state_dict(block, fp8.state_dict(trained))
    assert_same(block, trained)
    x = torch.randn(2, 8, 32, device=device)
    assert torch.equal(block(x), trained(x))


# ---- copies, devices, and what fills buffers -------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("owner_first", [True, False])
def test_copies_are_whole_independent_and_their_owners_are_copies(device, copied, owner_first):
    block = make(device)
    if not owner_first:
        block._modules["q_proj"] = block._modules.pop("q_proj")
    train(block, sgd(block), 2)
    twin = copied(block)
    assert_same(twin, block)
    assert {id(p) for p in twin.attention.owners()} == {id(p) for p in twin.q_proj.parameters()}
    before = state_bits(block)
    train(twin, sgd(twin.q_proj), 1)  # ends the twin's step
    assert cursors(twin.attention) == [3 * c for c in STEPPED]
    after = state_bits(block)
    assert all(torch.equal(after[key], before[key]) for key in before)
    train(block, sgd(block), 1)
    assert cursors(block.attention) == [3 * c for c in STEPPED]


def test_a_copy_of_the_attention_alone_has_a_state_of_its_own_and_no_owners(device):
    block = make(device)
    train(block, sgd(block), 1)
    for copied in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        alone = copied(block.attention)
        assert alone.owners() == [] and torch.equal(alone.fp8_slots, block.attention.fp8_slots)
        assert alone.fp8_slots.data_ptr() != block.attention.fp8_slots.data_ptr()
        assert alone.fp8_state.memo is not block.attention.fp8_state.memo
    shallow = copy.copy(block.attention)
    assert [id(p) for p in shallow.owners()] == [id(p) for p in block.q_proj.parameters()]
    shallow.fp8_slots[0, 2] = 5.0
    assert block.attention.fp8_slots[0, 2] == 0


def test_a_file_of_the_whole_model(device):
    block = make(device, shared_scale=True, p_scale=None, mode="fp8")
    train(block, sgd(block), 2)
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert_same(loaded, block)
    assert loaded.attention.mode == "fp8" and loaded.attention.fp8_state.shared_scale
    assert [role.constant for role in loaded.attention.fp8_state.roles] == [0.0] * 10


def test_it_has_nothing_that_others_fill_cast_average_or_broadcast(device):
    block = make(device)
    train(block, sgd(block), 2)
    attention, before = block.attention, fp8.state_dict(block.attention)
    assert not list(attention.parameters()) and not list(attention.buffers()) and not attention.state_dict()
    averaged = torch.optim.swa_utils.AveragedModel(block, use_buffers=True)
    averaged.update_parameters(block)
    for model in (block, averaged):
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.fill_(7)
    for cast in ("bfloat16", "half", "double", "float"):
        getattr(block, cast)()
    block.to(torch.bfloat16).type(torch.float32)
    for state in (attention, averaged.module.attention):
        for key, tensor in fp8.state_dict(state).items():
            assert tensor.dtype == torch.float32 and torch.equal(tensor, before[key])


def test_it_goes_where_the_model_is(device):
    with torch.device("meta"):
        attention = fp8.ScaledDotProductAttention()
    assert attention.fp8_slots.is_meta
    attention.to_empty(device=device)
    assert attention.fp8_slots.device.type == device.type
    assert attention.fp8_slots[:, 1].tolist() == [1, 1, 1, 256, 1, 1, 1, 1, 1, 1]
    train(block := make(device), sgd(block), 1)
    kept = fp8.state_dict(block)
    block.share_memory()
    assert all(torch.equal(t, kept[key]) for key, t in fp8.state_dict(block).items())
    assert device.type == "cuda" or block.attention.fp8_slots.is_shared()
    block.attention(*[torch.empty(1, 2, 8, 16, device="meta")] * 3)  # shapes alone
    assert all(torch.equal(t, kept[key]) for key, t in fp8.state_dict(block).items())

    def of_parameters_alone(tensor):
        assert isinstance(tensor, nn.Parameter)
        return tensor

    block._apply(of_parameters_alone)
    assert all(torch.equal(t, kept[key]) for key, t in fp8.state_dict(block).items())


def test_it_follows_the_queries_to_a_device(cuda):
    block = make("cpu")
    train(block, sgd(block), 2)
    before = fp8.state_dict(block)
    q = torch.randn(1, 2, 8, 16, device=cuda, requires_grad=True)
    block.attention(q, q, q)
    assert block.attention.fp8_slots.is_cuda
    assert torch.equal(block.attention.fp8_slots[:, 1].cpu(), before["attention.fp8_slots"][:, 1])
    block.cuda()
    assert all(t.is_cuda for t in fp8.state_dict(block).values())
    block.cpu()
    assert not any(t.is_cuda for t in fp8.state_dict(block).values())


def test_data_parallel_is_refused(device):
    with pytest.raises(RuntimeError, match="nn.DataParallel copies the layers in every forward"):
        make(device).attention._replicate_for_data_parallel()


# ---- traces ----------------------------------------------------------------------------------------------------------


class Calls(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = fp8.ScaledDotProductAttention(**options)

    def forward(self, q):
        call = call_of(self.attention, q, FORWARD_ROLES)
        note_ran(self.attention, "fp8", "traced")
        return q * call.history + call.record + 2 * call.training + 4 * call.slots[P, 1]


@pytest.mark.parametrize(
    ("recipe", "graphs"), [(fp8.DelayedScaling(), 2), (fp8.CurrentScaling(), 1), (fp8.ConstantScaling(), 1)], ids=str
)
def test_which_roles_have_a_history_is_a_guard(device, recipe, graphs):
    module = Calls(recipe=recipe)
    counter = CompileCounter()
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    q = torch.ones(1, 2, 8, 16, device=device, requires_grad=True)
    records = 3 if not isinstance(recipe, fp8.ConstantScaling) else 2
    for step in range(4):
        history = 0b10111 if step >= 1 and isinstance(recipe, fp8.DelayedScaling) else 0
        for _ in range(2):
            assert torch.equal(compiled(q), q * history + records + 4 * 256)
        for role in (0, 1, 2, 4):
            module.attention.fp8_slots[role, 2] = 1.0 + step
        sgd(nn.Linear(2, 2)).step()  # a stranger's step ends it
        assert module.attention.fp8_state.has_history[:5] == (
            (False,) * 5 if module.attention.fp8_state.is_constant else (True, True, True, False, True)
        )
    assert counter.frame_count == graphs
    assert module.attention.last == ("fp8", "traced")


def test_equal_blocks_share_a_graph_and_each_says_what_it_ran(device):
    blocks = [Calls().to(device) for _ in range(3)]
    counter = CompileCounter()
    for block in blocks:
        block.compile(fullgraph=True, backend=counter)
    q = torch.ones(1, 2, 8, 16, device=device, requires_grad=True)
    for block in blocks:
        block(q)
    assert counter.frame_count == 1
    assert [block.attention.last for block in blocks] == [("fp8", "traced")] * 3


def test_a_trace_within_checkpointing_notes_what_ran(device):
    block = Calls()
    q = torch.ones(1, 2, 8, 16, device=device, requires_grad=True)
    compiled = torch.compile(lambda x: checkpoint(block, x, use_reentrant=False), fullgraph=True, backend="aot_eager")
    compiled(q).sum().backward()
    assert block.attention.last == ("fp8", "traced")


def test_a_trace_finds_the_state_where_the_queries_are(device):
    with torch.device("meta"):
        module = Calls()
    q = torch.ones(1, 2, 8, 16, device=device)
    out = torch.compile(module, fullgraph=True, backend="aot_eager")(q)
    assert module.attention.fp8_slots.device.type == device.type
    assert torch.equal(out, q * 0 + 3 + 4 * 256)


# ---- what is seen of it ----------------------------------------------------------------------------------------------


def test_summary_says_what_ran_and_why(device):
    block = make(device)
    table = fp8.summary(block)
    row = table.attentions[0]
    assert (row.name, row.mode, row.last) == ("attention", "auto", "") and len(table) == 4
    assert row.scales["p"] == 256 and math.isnan(row.scales["q"]) and list(row.scales) == list(ROLES)
    assert "not called" in str(table)
    train(block, sgd(block), 1)
    row = fp8.summary(block).attentions[0]
    assert row.last == "fp8" and row.note == "it is faster; DelayedScaling(amax_history_len=5)"
    assert row.scales == dict(zip(ROLES, block.attention.fp8_slots[:, 1].tolist(), strict=True))
    with fp8.disabled(block):
        block(torch.randn(2, 8, 32, device=device))
        assert "disabled" in fp8.summary(block).attentions[0].note
    text, page = str(fp8.summary(block)), fp8.summary(block)._repr_html_()
    assert "p 256" in text and "<td>attention</td><td>auto</td><td>16bit</td>" in page
    assert not fp8.summary(nn.Sequential(block.q_proj)).attentions


def test_monitor_counts_what_is_seen_and_reports_the_rest(device, tmp_path):
    block = make(device)
    optimizer = sgd(block)
    written = {}

    class Writer:
        def add_scalar(self, tag, value, step):
            written[tag, step] = value

    with fp8.monitor(block, every=1, writer=Writer()) as monitor:
        for step in range(2):
            for micro in range(2 - step):
                x = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(10 * step + micro)).to(device)
                block(x).square().sum().backward()
            before = dict(zip(ROLES, block.attention.fp8_slots.tolist()))
            optimizer.step()
            of_step = [s for s in monitor.samples if s.step == step and s.layer == "attention"]
            samples = {s.role: s for s in of_step}
            counted = ["q", "k", "v", "grad_o"]
            noted = ["o", "grad_p", "grad_q", "grad_k", "grad_v"] if step else []
            assert sorted(samples) == sorted(counted + noted)
            for role in counted:
                assert samples[role].elements == (2 - step) * x.numel()
                assert samples[role].amax == before[role][2]
            for role in noted:
                assert samples[role].elements == 0 and samples[role].amax == before[role][2]
                assert samples[role].scale == before[role][1]
            assert samples["grad_o"].fp8_max == MAX[E5M2] and samples["q"].fp8_max == MAX[E4M3]
    assert ("fp8/amax/grad_p/attention", 1) in written and ("fp8/flushed/q/attention", 1) in written
    assert ("fp8/flushed/grad_p/attention", 1) not in written
    assert "grad_v" in str(monitor)
    pytest.importorskip("matplotlib")
    monitor.save_png(tmp_path / "samples.png")


def test_monitor_changes_nothing(device):
    block = make(device)
    twin = copy.deepcopy(block)
    with fp8.monitor(block, every=1):
        losses = train(block, sgd(block, 0.1), 3)
    assert train(twin, sgd(twin, 0.1), 3) == losses
    assert_same(block, twin)


def test_monitor_sees_nothing_of_what_runs_in_16_bits(device):
    block = make(device, mode="16bit")
    with fp8.monitor(block, every=1) as monitor:
        train(block, sgd(block), 2)
    assert {s.layer for s in monitor.samples} == {"q_proj", "k_proj", "v_proj", "o_proj"}
