"""What training scripts do around the layers: each against plain eager FP8, to the bit if nothing is reassociated."""

import copy
import io
import threading

import pytest
import torch
import torch_fp8 as fp8
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.data import DataLoader, Dataset

STEPS = 5


def call(block, x):
    return block(x)


class Net(nn.Module):
    """Two residual blocks; ``run`` is how a block is called."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 48, dtype=dtype), nn.Tanh(), nn.Linear(48, 32, dtype=dtype)) for _ in range(2)
        )
        self.run = call

    def forward(self, x):
        for block in self.blocks:
            x = x + self.run(block, x)
        return x


def model_on(device, recipe=None, **kwargs):
    return fp8.convert(Net(**kwargs).to(device), recipe or fp8.DelayedScaling(amax_history_len=4), tokens=None)


def batch(step, device, rows=8):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(rows, 32, generator=generator).to(device)


def step_of(model, optimizer, x):
    loss = (model(x) - x.roll(1, 1)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, fp8.Linear)]


def assert_same(a, b, state=True):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name
    for (name, p), q in zip(fp8.state_dict(a).items(), fp8.state_dict(b).values(), strict=True):
        assert not state or torch.equal(p, q), name


# ---- autocast and loss scaling ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_float32_master_weights(device, dtype):
    model = model_on(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(30):
        x = batch(step % 2, device)
        with torch.autocast(device.type, dtype):
            out = model(x)
            loss = (out.float() - x.roll(1, 1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert all(layer.fp8_slots[:, 3].eq(30 % 4 or 4).all() for layer in layers_of(model))


def test_a_skipped_step_poisons_nothing(device):
    """GradScaler skips a step whose gradients overflow: weights, scales and histories stay, and training goes on as if
    the step had not been, but that its gradient's amax (Inf) covers the next one's."""
    models = [model_on(device) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in models]
    scalers = [torch.amp.GradScaler(device.type, init_scale=2.0**10, growth_interval=10**6) for _ in models]

    def train(which, x, factor=1.0):
        model, optimizer, scaler = models[which], optimizers[which], scalers[which]
        with torch.autocast(device.type, torch.float16):
            loss = (model(x).float() - x.roll(1, 1)).square().mean() * factor
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss.item()

    for step in range(2):
        assert train(0, batch(step, device)) == train(1, batch(step, device))
    before = copy.deepcopy(models[0])
    train(0, batch(2, device), factor=1e38)  # overflows in FP16, and so in every gradient
    assert scalers[0].get_scale() == 2.0**9
    for (name, p), q in zip(models[0].named_parameters(), before.parameters()):
        assert torch.equal(p, q), name
    for layer, same in zip(layers_of(models[0]), layers_of(before)):
        assert torch.equal(layer.fp8_history, same.fp8_history)
        assert torch.equal(layer.fp8_slots[:, [0, 1, 3]], same.fp8_slots[:, [0, 1, 3]])
    scalers[1].update(2.0**9)
    for step in range(3, 3 + STEPS):
        assert train(0, batch(step, device)) == pytest.approx(train(1, batch(step, device)), rel=1e-3)
    for layer in layers_of(models[0]):
        assert layer.fp8_slots.isfinite().all() and layer.fp8_history.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0, 1e-42, 3e38])
@pytest.mark.parametrize(
    "recipe", [fp8.DelayedScaling(amax_history_len=2), fp8.CurrentScaling(), fp8.ConstantScaling()]
)
def test_after_a_bad_batch_the_next_good_steps_train_on(device, recipe, bad):
    """NaN and Inf are seen, not repaired: the loss says so, the user skips the step. Zero, denormal and huge batches
    are batches like others. Afterwards scales are finite and the loss falls."""
    model = model_on(device, recipe)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    first, *_ = [step_of(model, optimizer, batch(0, device)) for _ in range(3)]
    x = batch(1, device)
    x[3] = bad
    loss = (model(x) - x.roll(1, 1)).square().mean()
    assert loss.isfinite() == (abs(bad) < float("inf"))
    loss.backward()
    optimizer.zero_grad()  # the step is skipped, its amaxes were recorded
    losses = [step_of(model, optimizer, batch(0, device)) for _ in range(20)]
    assert all(loss == loss for loss in losses) and losses[-1] < 0.9 * first
    for layer in layers_of(model):
        assert layer.fp8_slots.isfinite().all() and layer.fp8_slots[:, 1].gt(0).all()


# ---- activation checkpointing ----------------------------------------------------------------------------------------


def _save_gemms():
    def policy(context, op, *args, **kwargs):
        gemm = op is torch.ops.torch_fp8.gemm.default
        return CheckpointPolicy.MUST_SAVE if gemm else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


CHECKPOINTS = {
    "non-reentrant": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
    "selective": {"use_reentrant": False, "context_fn": _save_gemms},
}


@pytest.mark.parametrize("how", CHECKPOINTS)
@pytest.mark.parametrize("recipe", [fp8.DelayedScaling(amax_history_len=4), fp8.CurrentScaling()], ids=str)
def test_recomputation_gives_the_first_forwards_bits(device, how, recipe):
    plain = model_on(device, recipe)
    recomputing = copy.deepcopy(plain)
    recomputing.run = lambda block, x: checkpoint(block, x, **CHECKPOINTS[how])
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (plain, recomputing)]
    for step in range(STEPS):
        for micro in range(2):
            for model in (plain, recomputing):
                model(batch(2 * step + micro, device).requires_grad_()).square().mean().backward()
        assert_same(plain, recomputing)  # amaxes too, which recomputation sees twice
        for p, q in zip(plain.parameters(), recomputing.parameters()):
            assert torch.equal(p.grad, q.grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_same(plain, recomputing)


# ---- optimizers ------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "Muon": lambda p: torch.optim.Muon([q for q in p if q.dim() == 2], lr=1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("set_to_none", [False, True])
def test_any_optimizer_and_way_to_clear_gradients(device, name, set_to_none):
    """The weights in use are the optimizer's in every step: a model rebuilt from its state gives the same bits."""
    model = model_on(device)
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, total_iters=3)
    losses = []
    for step in range(12):
        x = batch(0, device)
        fresh = model_on(device)
        fresh.load_state_dict(model.state_dict())
        fp8.load_state_dict(fresh, fp8.state_dict(model))
        out = model(x)
        assert torch.equal(out, fresh(x)), step
        loss = (out - x.roll(1, 1)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert all(layer.fp8_slots[:, 3].eq(12 % 4 or 4).all() for layer in layers_of(model))


def test_a_closure_that_runs_the_model_many_times_is_one_step(device):
    model = model_on(device)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    x = batch(0, device)

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - x.roll(1, 1)).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses[-1] < losses[0]
    assert all(layer.fp8_slots[:, 3].eq(3).all() for layer in layers_of(model))


# ---- changes of the weight -------------------------------------------------------------------------------------------

CHANGES = {
    "copy_": lambda layer, new: layer.weight.copy_(new),
    "in place": lambda layer, new: layer.weight.mul_(0).add_(new),
    "a row": lambda layer, new: layer.weight[:].copy_(new),
    "foreach": lambda layer, new: torch._foreach_copy_([layer.weight], [new]),
    "data = ": lambda layer, new: setattr(layer.weight, "data", new.clone()),
    "new Parameter": lambda layer, new: setattr(layer, "weight", nn.Parameter(new.clone())),
    "load_state_dict": lambda layer, new: layer.load_state_dict({"weight": new, "bias": layer.bias}),
    "load_state_dict assign": lambda layer, new: layer.load_state_dict(
        {"weight": new, "bias": layer.bias}, assign=True
    ),
    "vector_to_parameters": lambda layer, new: nn.utils.vector_to_parameters(new.flatten(), [layer.weight]),
}
UNSEEN = {
    "data.copy_": lambda layer, new: layer.weight.data.copy_(new),
    "a flat buffer": lambda layer, new: layer.weight.untyped_storage().copy_(new.clone().untyped_storage()),
}


def _fresh_output(layer, new, x):
    twin = fp8.Linear(*reversed(new.shape), device=new.device, recipe=layer.recipe)
    with torch.no_grad():
        twin.weight.copy_(new), twin.bias.copy_(layer.bias)
    return twin(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_the_weight_is_noticed(device, change, training):
    layer = fp8.Linear(32, 48, device=device, recipe=fp8.CurrentScaling()).train(training)
    x, new = batch(0, device), torch.randn(48, 32, device=device)
    layer(x)
    with torch.no_grad():
        CHANGES[change](layer, new)
    assert torch.equal(layer(x), _fresh_output(layer, new, x))


@pytest.mark.parametrize("change", UNSEEN)
@pytest.mark.parametrize("between", ["optimizer.step()", "evaluation", "forget_weight()"])
def test_a_change_past_the_version_counter(device, change, between):
    """It is noticed wherever it is legitimate: round an optimizer's step, and in evaluation, where EMA weights come and
    go. Between two micro-batches of one step it cannot be seen and has to be told."""
    layer = fp8.Linear(32, 48, device=device, recipe=fp8.CurrentScaling())
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    x, new = batch(0, device), torch.randn(48, 32, device=device)
    layer(x).sum().backward()
    if between == "evaluation":
        layer.eval()
        layer(x)
    UNSEEN[change](layer, new)
    if between == "optimizer.step()":
        optimizer.step()
    elif between == "forget_weight()":
        layer.forget_weight()
    assert torch.equal(layer(x), _fresh_output(layer, new, x))


def test_weights_lent_to_evaluation_and_taken_back(device):
    """EMA weights swapped in through .data, evaluated with and without gradients, and swapped out again."""
    model = model_on(device)
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        step_of(model, optimizer, batch(step, device))
        ema.update_parameters(model)
    x = batch(9, device)
    training = model(x)
    own, averaged = model.eval()(x), ema.module.eval()(x)
    kept = [p.detach().clone() for p in model.parameters()]
    for p, q in zip(model.parameters(), ema.module.parameters()):
        p.data.copy_(q.data)
    assert not torch.equal(own, averaged)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            fp8.load_state_dict(ema.module, fp8.state_dict(model))
            assert torch.equal(model(x), ema.module(x))
    for p, q in zip(model.parameters(), kept):
        p.data.copy_(q)
    assert torch.equal(model(x), own)
    assert torch.equal(model.train()(x), training)


def test_tied_weights_are_one_parameter(device):
    model = nn.Sequential(fp8.Linear(32, 32, device=device), nn.Tanh(), fp8.Linear(32, 32, device=device))
    model[2].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = [step_of(model, optimizer, batch(0, device)) for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]
    assert torch.equal(model[0].fp8_history[1], model[2].fp8_history[1])
    assert len([p for p in model.parameters() if p.dim() == 2]) == 1


def test_parametrized_weights(device):
    """weight_norm computes the weight anew in every access."""
    layer = parametrizations.weight_norm(fp8.Linear(32, 32, device=device, recipe=fp8.CurrentScaling()))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    for step in range(3):
        x = batch(step, device)
        out = layer(x)
        assert torch.equal(out, _fresh_output(layer, layer.weight.detach(), x))
        (out - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert layer.parametrizations.weight.original1.grad is None
    assert layer.fp8_slots[:, 3].eq(1).all() or isinstance(layer.recipe, fp8.CurrentScaling)


# ---- copies, processes, threads, streams -----------------------------------------------------------------------------


class Features(Dataset):
    """A data set that runs a model in its workers."""

    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 2

    def __getitem__(self, index):
        with torch.no_grad():
            return self.model(batch(index, "cpu"))


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_data_loaders_beside_a_model_and_with_one(context):
    torch.set_num_threads(1)  # a forked child cannot use its parent's threads
    model = model_on("cpu").eval()
    loaded = list(DataLoader(Features(model), batch_size=None, num_workers=1, multiprocessing_context=context))
    for index, features in enumerate(loaded):
        assert torch.equal(features, model(batch(index, "cpu")))


def test_threads_at_once(device):
    """Evaluation and training of one model from four threads: each gets what it would get alone."""
    model = model_on(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for step in range(2):
        step_of(model, optimizer, batch(step, device))
    xs = [batch(step, device) for step in range(4)]
    expected = [torch.autograd.grad(model(x).square().sum(), model.blocks[0][0].weight)[0] for x in xs]
    wrong = []

    def work(x, gradient):
        for _ in range(20):
            got = torch.autograd.grad(model(x).square().sum(), model.blocks[0][0].weight)[0]
            if not torch.equal(got, gradient):
                wrong.append(got)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(xs, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_streams_at_once(cuda):
    """A weight that one stream casts is not there yet for another."""
    layer = fp8.Linear(2048, 2048, device=cuda, dtype=torch.bfloat16, recipe=fp8.CurrentScaling())
    x = torch.randn(256, 2048, device=cuda, dtype=torch.bfloat16)
    expected = layer(x)
    streams = [torch.cuda.Stream() for _ in range(3)]
    for _ in range(20):
        layer.forget_weight()
        torch.cuda.synchronize()
        outs = []
        for stream in streams:
            with torch.cuda.stream(stream):
                outs.append(layer(x))
        torch.cuda.synchronize()
        for out in outs:
            assert torch.equal(out, expected)


def test_data_parallel_is_refused(device):
    with pytest.raises(RuntimeError, match="DistributedDataParallel.*torchrun.*CUDA_VISIBLE_DEVICES=0"):
        fp8.Linear(16, 16, device=device)._replicate_for_data_parallel()


# ---- hooks and transforms --------------------------------------------------------------------------------------------


def test_hooks_see_what_they_see_on_a_plain_layer(device):
    layer = fp8.Linear(32, 48, device=device)
    seen = []
    layer.register_forward_pre_hook(lambda module, args: seen.append("pre") or (args[0] * 2,))
    layer.register_forward_hook(lambda module, args, out: seen.append("forward") or out + 1)
    layer.register_full_backward_pre_hook(lambda module, grads: seen.append("backward pre"))
    layer.register_full_backward_hook(lambda module, dx, dy: seen.append(dx[0].shape) or (dx[0] * 3,))
    layer.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.shape))
    x = batch(0, device).requires_grad_()
    layer(x).sum().backward()
    assert set(seen) == {"pre", "forward", "backward pre", x.shape, layer.weight.shape} and len(seen) == 5
    twin = fp8.Linear(32, 48, device=device)
    twin.load_state_dict(layer.state_dict())
    z = batch(0, device).requires_grad_()
    twin(z * 2).sum().backward()
    assert torch.equal(x.grad, 3 * z.grad)


def test_functional_call(device):
    layer = fp8.Linear(32, 48, device=device, recipe=fp8.CurrentScaling())
    x = batch(0, device)
    layer(x)
    other = torch.randn(48, 32, device=device, requires_grad=True)
    out = torch.func.functional_call(layer, {"weight": other}, (x,))
    assert torch.equal(out, _fresh_output(layer, other.detach(), x))
    out.sum().backward()
    assert other.grad is not None and layer.weight.grad is None
    assert torch.equal(layer(x), _fresh_output(layer, layer.weight.detach(), x))


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
        lambda f, x: torch.func.vmap(f)(x[None]),
        lambda f, x: torch.func.jvp(f, (x,), (x,)),
        lambda f, x: torch.func.hessian(lambda x: f(x).sum())(x),
    ],
    ids=["grad", "vmap", "jvp", "hessian"],
)
def test_transforms_are_refused_in_words(device, transform):
    layer = fp8.Linear(32, 48, device=device)
    with pytest.raises(RuntimeError, match="torch.func's transforms .* torch_fp8.disabled"):
        transform(layer, batch(0, device))
    with fp8.disabled(layer):
        transform(layer, batch(0, device))


def test_forward_mode_is_refused_in_words(device):
    layer = fp8.Linear(32, 48, device=device)
    x = batch(0, device)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        layer(torch.autograd.forward_ad.make_dual(x, x))


def test_saved_whole_and_loaded_without_a_warning(device, recwarn):
    model = model_on(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    step_of(model, optimizer, batch(0, device))
    file = io.BytesIO()
    torch.save(model.blocks, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    x = batch(1, device)
    assert torch.equal(F.relu(again[0](x)), F.relu(model.blocks[0](x)))
    assert not [w for w in recwarn if "torch_fp8" in str(w.message)]
