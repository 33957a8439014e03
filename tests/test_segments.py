"""README's table for blocks in one piece (norms that hand over codes, MLPs, residuals in GEMMs): each row against the
plain loop, to the bit where nothing is reassociated. test_block.py has compile, autocast, checkpointing, resume and
copies; test_mlp.py hooks, frozen weights and main_grad of an MLP; test_distributed.py FSDP2; test_cuda_graphs.py
graphs."""

import copy
import io
import threading

import pytest
import torch
import torch_fp8 as fp8
from casts import count_casts
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel
from torch_fp8.layers.linear import fp8_layers

WIDTH, TOKENS = 32, 6
STEPS = 5
RECIPES = {
    "delayed": fp8.DelayedScaling(amax_history_len=3),
    "current": fp8.CurrentScaling(power_of_two=True, grad_margin=3),
    "constant": fp8.ConstantScaling(bias=2, grad_margin=1),
}


def model_on(device, dtype=torch.float32, recipe="delayed", blocks=2, **kwargs):
    torch.manual_seed(0)
    made = {"num_kv_heads": 2, "device": device, "dtype": dtype, "recipe": RECIPES[recipe], **kwargs}
    return nn.Sequential(*(fp8.TransformerBlock(WIDTH, 4, 64, **made) for _ in range(blocks)))


def batch(step, device, dtype=torch.float32, samples=2):
    return torch.randn(samples, TOKENS, WIDTH, generator=torch.Generator().manual_seed(step)).to(device, dtype)


def loss_of(model, x):
    return (model(x).float() - x.float().roll(1, -1)).square().mean()


def step_of(model, optimizer, x):
    loss = loss_of(model, x)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def sgd(model, lr=0.05):
    return torch.optim.SGD(model.parameters(), lr)


def trained(device, steps=3, **kwargs):
    model = model_on(device, **kwargs)
    optimizer = sgd(model)
    for step in range(steps):
        step_of(model, optimizer, batch(step, device, kwargs.get("dtype", torch.float32)))
    return model, optimizer


def assert_same(model, other):
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
    for (name, a), b in zip(fp8.state_dict(model).items(), fp8.state_dict(other).values(), strict=True):
        assert torch.equal(a, b), name


def in_one_piece(model, x):
    """Whether norms hand codes over and MLPs are one: of a block's inputs one is cast, of its gradients five."""
    with count_casts() as casts:
        model(x).sum().backward()
    model.zero_grad()
    return (casts["cast_input"], casts["cast_grad_output"]) == (2 * 1, 2 * 5)


def test_this_is_about_blocks_in_one_piece(device):
    assert in_one_piece(trained(device)[0], batch(9, device))


# ---- loops ----------------------------------------------------------------------------------------------------------


def test_a_skipped_step(device):
    """GradScaler: no weight and no history moves, and training goes on."""
    model = model_on(device)
    optimizer, scaler = sgd(model), torch.amp.GradScaler(device.type, init_scale=2.0**10)

    def train(x, factor=1.0):
        with torch.autocast(device.type, torch.float16):
            loss = loss_of(model, x) * factor
        scaler.scale(loss).backward()
        scaler.step(optimizer), scaler.update(), optimizer.zero_grad()
        return loss.item()

    losses = [train(batch(0, device)) for _ in range(3)]
    before = copy.deepcopy(model)
    train(batch(0, device), factor=1e38)
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))
    for layer, same in zip(fp8_layers(model).values(), fp8_layers(before).values(), strict=True):
        assert torch.equal(layer.fp8_history, same.fp8_history)
    losses += [train(batch(0, device)) for _ in range(3)]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_micro_batches(device, micro_batches):
    """Amaxes are those of the largest, and weights are cast once a step, as soon as it is known how many there are."""
    model, optimizer = trained(device)
    for _ in range(2):
        alone = []
        for micro in range(micro_batches):
            twin = copy.deepcopy(model)
            loss_of(twin, batch(micro, device)).backward()
            alone.append(torch.stack([layer.fp8_slots[:, 2] for layer in fp8_layers(twin).values()]))
        with count_casts() as casts:
            for micro in range(micro_batches):
                loss_of(model, batch(micro, device)).backward()
        amaxes = torch.stack([layer.fp8_slots[:, 2] for layer in fp8_layers(model).values()])
        assert torch.equal(amaxes, torch.stack(alone).amax(0))
        optimizer.step(), optimizer.zero_grad()
    assert casts["cast_weight"] == 2 * 7


def _lomo(p):
    p.data.sub_(p.grad, alpha=0.1)
    p.grad = None


@pytest.mark.parametrize("name", ["adamw foreach", "adamw fused", "lbfgs", "by hand", "lomo"])
def test_optimizers_and_loops_without_one(device, name):
    model = model_on(device)
    x = batch(0, device)
    losses = []
    if name == "lbfgs":
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)

        def closure():
            optimizer.zero_grad()
            loss = loss_of(model, x)
            loss.backward()
            return loss

        losses = [optimizer.step(closure).item() for _ in range(6)]
    elif name.startswith("adamw"):
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, **{name.split()[1]: True})
        losses = [step_of(model, optimizer, x) for _ in range(12)]
    else:
        if name == "lomo":
            for p in model.parameters():
                p.register_post_accumulate_grad_hook(_lomo)
        for _ in range(12):
            loss = loss_of(model, x)
            loss.backward()
            losses.append(loss.item())
            if name == "by hand":
                for p in model.parameters():
                    p.data -= 0.1 * p.grad
                model.zero_grad()
    assert losses[-1] < 0.97 * losses[0]
    exact = fp8.revert(copy.deepcopy(model))
    assert abs(loss_of(model, x).item() - loss_of(exact, x).item()) < 0.03 * losses[0]


def test_gradients_in_place(device):
    """main_grad of all layers of a block is what .grad would be."""
    model, _ = trained(device)
    twin = copy.deepcopy(model)
    for layer in fp8_layers(model).values():
        layer.fuse_main_grad = True
        layer.weight.main_grad = torch.zeros_like(layer.weight, dtype=torch.float32)
    x = batch(9, device)
    assert torch.equal(loss_of(model, x), loss_of(twin, x))
    loss_of(model, x).backward(), loss_of(twin, x).backward()
    for layer, other in zip(fp8_layers(model).values(), fp8_layers(twin).values(), strict=True):
        torch.testing.assert_close(layer.weight.main_grad, other.weight.grad, rtol=1e-5, atol=1e-7)
        assert layer.weight.grad is None


def test_an_average_of_weights(device):
    model, optimizer = trained(device)
    average = AveragedModel(model, use_buffers=True)
    for step in range(2):
        step_of(model, optimizer, batch(step, device))
        average.update_parameters(model)
    x = batch(9, device)
    expected = fp8.revert(copy.deepcopy(average.module))(x)
    assert (average(x) - expected).norm() / expected.norm() < 0.06


def test_tied_weights(device):
    model = model_on(device)
    model[1].mlp = model[0].mlp
    model[1].mlp_norm.feeds(*model[1].mlp.readers)
    optimizer = sgd(model)
    for step in range(3):
        step_of(model, optimizer, batch(step, device))
    exact = fp8.revert(copy.deepcopy(model)).double()
    x = batch(9, device)
    loss_of(model, x).backward(), loss_of(exact, x.double()).backward()
    ours, plain = model[0].mlp.up_proj.weight.grad, exact[0].mlp.up_proj.weight.grad
    assert (ours - plain).norm() / plain.norm() < 0.15


@pytest.mark.parametrize("where", ["q_proj", "up_proj", "down_proj", "attention_norm"])
def test_parametrized(device, where):
    model = model_on(device)
    module = next(m for n, m in model.named_modules() if n.endswith(where))
    parametrizations.weight_norm(
        module
    ) if where != "attention_norm" else nn.utils.parametrize.register_parametrization(module, "weight", nn.Softplus())
    exact = copy.deepcopy(model)
    fp8.revert(exact)
    optimizer = sgd(model)
    x = batch(0, device)
    assert abs(loss_of(model, x).item() / loss_of(exact, x).item() - 1) < 0.03
    losses = [step_of(model, optimizer, x) for _ in range(6)]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("change", ["copy_", "load_state_dict", "data", "new", "past the counter"])
@pytest.mark.parametrize("recompute", [False, True])
def test_changes_of_weights_and_gains(device, change, recompute):
    """What is 16 times as large, or as small, is cast as such; together the changes change no result."""
    model, _ = trained(device, recompute=recompute)
    factors = {"q_proj": 16, "k_proj": 1 / 16, "attention_norm": 1.5, "gate_proj": 0.5, "up_proj": 2}
    state = {name: factors.get(name.split(".")[-2], 1) * p.detach() for name, p in model.named_parameters()}
    if change == "load_state_dict":
        model.load_state_dict(state)
    for name, p in list(model.named_parameters()):
        module, _, last = name.rpartition(".")
        if change == "copy_":
            p.detach().copy_(state[name])
        elif change == "data":
            p.data = state[name].clone()
        elif change == "new":
            setattr(model.get_submodule(module), last, nn.Parameter(state[name].clone()))
        elif change == "past the counter":
            p.data.copy_(state[name])
    x = batch(9, device)
    exact = fp8.revert(copy.deepcopy(model)).double()
    for m in (model.eval(), model.train()):
        y, expected = m(x), exact(x.double())
        assert (y - expected).norm() / expected.norm() < 0.1


@pytest.mark.parametrize("change", ["in place", "new"])
def test_a_weight_that_grew_is_no_history_s(device, change):
    """Also where no codes are kept: the same bits."""
    made = []
    for recompute in (False, True):
        model, _ = trained(device, recompute=recompute)
        for layer in fp8_layers(model).values():
            if change == "in place":
                layer.weight.detach().mul_(1.9)
            else:
                layer.weight = nn.Parameter(1.9 * layer.weight.detach())
        loss = loss_of(model, batch(9, device))
        made.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for a, b in zip(*made, strict=True):
        assert torch.equal(a, b)


# ---- what is around a model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["to and back", "to_empty", "share_memory", "torch.save", "default dtype"])
def test_moves(device, how):
    model, optimizer = trained(device)
    twin, of_twin = trained(device)
    if how == "to and back":
        other = torch.device("cpu") if device.type == "cuda" else device
        model.to(other).to(device)
    elif how == "to_empty":
        state, scales = copy.deepcopy(model.state_dict()), copy.deepcopy(fp8.state_dict(model))
        model.to("meta").to_empty(device=device)
        model.load_state_dict(state), fp8.load_state_dict(model, scales)
    elif how == "share_memory":
        model.share_memory()
    elif how == "torch.save":
        file = io.BytesIO()
        torch.save(model, file), file.seek(0)
        model = torch.load(file, weights_only=False)
    elif how == "default dtype":
        torch.set_default_dtype(torch.float64)
    try:
        optimizer = sgd(model)
        for step in range(3, 3 + STEPS):
            x = batch(step, device)
            assert step_of(model, optimizer, x) == step_of(twin, of_twin, x), step
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(model, twin)
    assert in_one_piece(model, batch(9, device))


def test_two_threads_train_two_models(device):
    def losses(model, optimizer, scale):
        return [step_of(model, optimizer, scale * batch(step, device)) for step in range(20)]

    expected = [losses(*trained(device), scale) for scale in (1, 30)]
    pairs, results = [trained(device), trained(device)], [None, None]

    def run(i, scale):
        results[i] = losses(*pairs[i], scale)

    threads = [threading.Thread(target=run, args=(i, scale)) for i, scale in enumerate((1, 30))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == expected


def test_one_model_in_four_threads(device):
    model, _ = trained(device)
    xs = [batch(step, device) for step in range(4)]

    def gradient(x):
        return torch.autograd.grad(loss_of(model, x), [model[0].q_proj.weight, model[1].mlp.down_proj.weight])

    expected, same = [gradient(x) for x in xs], []

    def work(x, grads):
        for _ in range(10):
            same.extend(torch.equal(a, b) for a, b in zip(gradient(x), grads, strict=True))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(xs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * (4 * 10 * 2)


def test_two_streams(cuda):
    model, _ = trained(cuda, dtype=torch.bfloat16)
    x = batch(9, cuda, torch.bfloat16)
    expected = torch.autograd.grad(loss_of(model, x), list(model.parameters()))
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(10):
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                made = torch.autograd.grad(loss_of(model, x), list(model.parameters()))
            torch.cuda.current_stream().wait_stream(stream)
            assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))


def test_functional_call(device):
    model, _ = trained(device)
    state = {name: 0.5 * p.detach() for name, p in model.named_parameters()}
    x = batch(9, device)
    made = torch.func.functional_call(model, state, (x,))
    exact = fp8.revert(copy.deepcopy(model))
    expected = torch.func.functional_call(exact, state, (x,))
    assert (made - expected).norm() / expected.norm() < 0.06
    assert in_one_piece(model, x)


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "twice"])
def test_what_is_refused_in_words(device, transform):
    model, _ = trained(device)
    before = copy.deepcopy(fp8.state_dict(model))
    x = batch(9, device)
    with pytest.raises((RuntimeError, NotImplementedError), match="torch_fp8: "):
        if transform == "grad":
            torch.func.grad(lambda x: loss_of(model, x))(x)
        elif transform == "vmap":
            torch.func.vmap(model)(x)
        elif transform == "jvp":
            torch.func.jvp(model, (x,), (x,))
        else:
            x.requires_grad_()
            torch.autograd.grad(loss_of(model, x), x, create_graph=True)
    if transform == "twice":
        return
    assert all(torch.equal(a, b) for a, b in zip(before.values(), fp8.state_dict(model).values(), strict=True))
    with fp8.disabled(model):
        expected = torch.autograd.grad(loss_of(model, x), x)[0] if x.requires_grad_() is x else None
        x = x.detach()
        if transform == "grad":
            torch.testing.assert_close(torch.func.grad(lambda x: loss_of(model, x))(x), expected, rtol=1e-3, atol=1e-6)
        elif transform == "vmap":
            torch.testing.assert_close(torch.func.vmap(model)(x[:, None])[:, 0], model(x), rtol=1e-4, atol=1e-5)


def test_compiled_autograd(device):
    """One block has all nodes; its input needs a gradient, as that of a block behind another does."""
    model, _ = trained(device, blocks=1)
    x = batch(9, device).requires_grad_()
    expected = torch.autograd.grad(loss_of(model, x), [*model.parameters(), x])
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        loss_of(model, x).backward()
    for p, e in zip([*model.parameters(), x], expected, strict=True):
        torch.testing.assert_close(p.grad, e, rtol=1e-3, atol=1e-3 * e.abs().max().item())


def test_profilers_name_the_parts(device):
    model, _ = trained(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss_of(model, batch(9, device)).backward()
    names = {event.key for event in profile.key_averages()}
    parts = {"norm_cast", "norm_backward", "activation_cast", "activation_backward_cast", "fprop", "dgrad", "wgrad"}
    assert parts <= {name.removeprefix("torch_fp8::") for name in names}


def test_a_monitor_sees_all_layers(device):
    model, optimizer = trained(device)
    twin, of_twin = trained(device)
    with fp8.monitor(model, every=1) as monitor:
        for step in range(2):
            x = batch(step, device)  # in sampled steps an MLP's layers run one by one
            assert step_of(model, optimizer, x) == pytest.approx(step_of(twin, of_twin, x), rel=1e-3)
    seen = {(sample.layer, sample.role) for sample in monitor.samples}
    assert {layer for layer, _ in seen} == set(fp8_layers(model))
    assert len(seen) == 3 * len(fp8_layers(model))


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen_and_no_scale_follows(device, recipe, bad):
    model, optimizer = trained(device, recipe=recipe)
    before = copy.deepcopy(model)
    x = batch(9, device)
    x[0, 3, 5] = bad
    y = model(x)
    exact = fp8.revert(copy.deepcopy(before))(x)
    assert torch.equal(y.isfinite().all(-1), exact.isfinite().all(-1))
    (y.float().nan_to_num(posinf=9) * 1e-3).sum().backward()
    optimizer.zero_grad(), fp8.update_scales(model)
    assert all(layer.fp8_slots[:, :2].isfinite().all() for layer in fp8_layers(model).values())
    losses = [step_of(model, optimizer, batch(0, device)) for _ in range(6)]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("what", ["tokens", "samples"])
@pytest.mark.parametrize("recipe", ["delayed", "constant"])
def test_an_output_depends_on_its_own_inputs_alone(device, recipe, what, recompute):
    model, _ = trained(device, recipe=recipe, recompute=recompute)
    x = batch(9, device)
    other = x.clone()
    changed = (slice(None), slice(3, None)) if what == "tokens" else (slice(1, None),)
    same = (slice(None), slice(0, 3)) if what == "tokens" else (slice(0, 1),)
    other[changed] = 50 * torch.randn_like(other[changed])
    made = []
    for given in (x, other):
        leaf = given.clone().requires_grad_()
        y = model(leaf)
        (y[same].square().sum() * 1e-3).backward()
        made.append((y[same].detach(), leaf.grad[same]))
    assert torch.equal(made[0][0], made[1][0])
    if what == "samples":
        assert torch.equal(made[0][1], made[1][1])
