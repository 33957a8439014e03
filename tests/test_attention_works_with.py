"""README's table for FP8 attention: each row against the plain loop, to the bit where nothing is reassociated, or
against attention in 16 bits. test_attention.py has the module alone, test_attention_state.py copies and moves,
test_distributed.py ranks, test_cuda_graphs.py graphs."""

import copy
import io
import threading

import pytest
import torch
import torch_fp8 as fp8
from casts import count_casts
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

MODES = ["fp8_forward", "fp8"]
WIDTH, TOKENS = 32, 16
P = 3  # its scale is constant


class Model(nn.Module):
    """Two blocks with two heads of 128; ``run`` is how a block is called."""

    def __init__(self, device, mode, dtype, recipe):
        super().__init__()
        made = {"num_kv_heads": 1, "head_dim": 128, "attention": mode, "device": device, "dtype": dtype}
        self.blocks = nn.ModuleList(fp8.TransformerBlock(WIDTH, 2, 64, recipe=recipe, **made) for _ in range(2))
        self.run = nn.Module.__call__

    def forward(self, x):
        for block in self.blocks:
            x = self.run(block, x)
        return x


def model_on(device, mode, dtype=torch.bfloat16, recipe=None):
    torch.manual_seed(0)
    return Model(device, mode, dtype, recipe or fp8.DelayedScaling(amax_history_len=3))


def batch(step, device, dtype=torch.bfloat16, samples=2, tokens=TOKENS):
    return torch.randn(samples, tokens, WIDTH, generator=torch.Generator().manual_seed(step)).to(device, dtype)


def loss_of(model, x):
    return (model(x).float() - x.float().roll(1, -1)).square().mean()


def sgd(model, lr=0.05):
    return torch.optim.SGD(model.parameters(), lr)


def step_of(model, optimizer, x):
    loss = loss_of(model, x)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def trained(device, mode, steps=2, **kwargs):
    model = model_on(device, mode, **kwargs)
    optimizer = sgd(model)
    for step in range(steps):
        step_of(model, optimizer, batch(step, device, kwargs.get("dtype", torch.bfloat16)))
    return model, optimizer


def attentions(model):
    return [module for module in model.modules() if isinstance(module, fp8.ScaledDotProductAttention)]


def assert_same(model, other):
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name
    for (name, a), b in zip(fp8.state_dict(model).items(), fp8.state_dict(other).values(), strict=True):
        assert torch.equal(a, b), name


def assert_ran(model, mode, why="asked for"):
    assert [attention.last for attention in attentions(model)] == [(mode, why)] * len(attentions(model)) != []


def in_16_bits(model, x):
    """What the model gives where its linear layers are in FP8 and attention alone is not."""
    model = copy.deepcopy(model)
    for attention in attentions(model):
        attention.mode = "16bit"
    return model(x)


def error(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def gradients(model, x):
    return torch.autograd.grad(loss_of(model, x), list(model.parameters()))


def assert_as_good(grads, expected, exact):
    """Sums of gradients in 16 bits in another order move codes: not much further from what 16 bits give than the order
    of the plain loop."""
    for got, plain, best in zip(grads, expected, exact, strict=True):
        assert error(got, best) <= 2 * error(plain, best)


# ---- loops ----------------------------------------------------------------------------------------------------------


def _save(*saved):
    def policy(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op in saved else CheckpointPolicy.PREFER_RECOMPUTE

    return lambda: create_selective_checkpoint_contexts(policy)


CHECKPOINTS = {
    "non-reentrant": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
    "selective": {"use_reentrant": False, "context_fn": _save(torch.ops.torch_fp8.gemm.default)},
    "attention saved": {"use_reentrant": False, "context_fn": _save(torch.ops.torch_fp8.attention_forward.default)},
}


@pytest.mark.parametrize("how", CHECKPOINTS)
@pytest.mark.parametrize("mode", MODES)
def test_recomputation_gives_the_first_forwards_bits(device, mode, how):
    plain = trained(device, mode, steps=1)[0] if how == "reentrant" else model_on(device, mode)
    recomputing = copy.deepcopy(plain)
    recomputing.run = lambda block, x: checkpoint(block, x, **CHECKPOINTS[how])
    optimizers = [sgd(model) for model in (plain, recomputing)]
    for step in range(1 if how == "reentrant" else 3):
        for micro in range(2):
            for model in (plain, recomputing):
                loss_of(model, batch(2 * step + micro, device).requires_grad_()).backward()
        assert_ran(recomputing, mode)
        if how == "reentrant":  # a block's gradient is then added up outside of it
            for attention, same in zip(attentions(plain), attentions(recomputing), strict=True):
                # A forward without gradients, which is the first, rounds a norm's result before its cast.
                torch.testing.assert_close(attention.fp8_slots[:5], same.fp8_slots[:5], rtol=2**-6, atol=0)
            grads = [[p.grad for p in model.parameters()] for model in (recomputing, plain)]
            with fp8.disabled(plain):
                exact = [gradients(plain, batch(2 * step + micro, device)) for micro in range(2)]
            return assert_as_good(*grads, [a + b for a, b in zip(*exact, strict=True)])
        assert_same(plain, recomputing)  # amaxes too, which recomputation sees twice
        for optimizer in optimizers:
            optimizer.step(), optimizer.zero_grad()
    assert_same(plain, recomputing)
    with count_casts() as casts:
        loss_of(recomputing, batch(9, device).requires_grad_()).backward()
    assert casts["cast_qkv"] == (2 if how == "attention saved" else 4)


@pytest.mark.parametrize("mode", MODES)
def test_micro_batches_record_maxima(device, mode):
    model, optimizer = trained(device, mode)
    for _ in range(2):
        alone = []
        for micro in range(3):
            twin = copy.deepcopy(model)
            loss_of(twin, batch(micro, device)).backward()
            alone.append(torch.stack([attention.fp8_slots[:, 2] for attention in attentions(twin)]))
        for micro in range(3):
            loss_of(model, batch(micro, device)).backward()
        amaxes = torch.stack([attention.fp8_slots[:, 2] for attention in attentions(model)])
        assert torch.equal(amaxes, torch.stack(alone).amax(0))
        assert len(set(torch.stack(alone).argmax(0).flatten().tolist())) > 1
        optimizer.step(), optimizer.zero_grad()


@pytest.mark.parametrize("mode", MODES)
def test_a_skipped_step(device, mode):
    """GradScaler: no weight, no scale and no history moves, and training goes on."""
    model = model_on(device, mode, torch.float32)
    optimizer, scaler = sgd(model), torch.amp.GradScaler(device.type, init_scale=2.0**10)

    def train(x, factor=1.0):
        with torch.autocast(device.type, torch.float16):
            loss = loss_of(model, x) * factor
        scaler.scale(loss).backward()
        scaler.step(optimizer), scaler.update(), optimizer.zero_grad()
        return loss.item()

    x = batch(0, device, torch.float32)
    losses = [train(x) for _ in range(3)]
    before = copy.deepcopy(model)
    train(x, factor=1e38)
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))
    for attention, same in zip(attentions(model), attentions(before), strict=True):
        assert torch.equal(attention.fp8_history, same.fp8_history)
        assert torch.equal(attention.fp8_slots[:, [0, 1, 3]], same.fp8_slots[:, [0, 1, 3]])
    losses += [train(x) for _ in range(3)]
    assert losses == sorted(losses, reverse=True)
    assert_ran(model, mode)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_autocast_keeps_float32_master_weights(device, mode, dtype):
    model = model_on(device, mode, torch.float32)
    optimizer, x = sgd(model), batch(0, device, torch.float32)
    losses = []
    for _ in range(8):
        with torch.autocast(device.type, dtype):
            loss = loss_of(model, x)
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert_ran(model, mode)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    with torch.autocast(device.type, dtype), torch.no_grad():
        assert error(model(x), in_16_bits(model, x)) < 0.03
    with pytest.raises(ValueError, match="float32.*what can is 16bit"):
        model(x)


def _lomo(p):
    p.data.sub_(p.grad, alpha=0.05)
    p.grad = None


@pytest.mark.parametrize("how", ["adamw foreach", "lbfgs", "by hand", "lomo"])
@pytest.mark.parametrize("mode", MODES)
def test_optimizers_and_loops_without_one(device, mode, how):
    model, x = model_on(device, mode), batch(0, device)
    losses = []
    if how == "lbfgs":
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.05, max_iter=2)

        def closure():
            optimizer.zero_grad()
            loss = loss_of(model, x)
            loss.backward()
            return loss

        losses = [optimizer.step(closure).item() for _ in range(7)]
        cursors = {int(c) for a in attentions(model) for c in a.fp8_slots[[0, 1, 2, 4], 3]}
        assert cursors == {1}  # the seventh in a history of three: many forwards are one step
    elif how == "adamw foreach":
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, foreach=True)
        losses = [step_of(model, optimizer, x) for _ in range(8)]
    else:
        if how == "lomo":
            for p in model.parameters():
                p.register_post_accumulate_grad_hook(_lomo)
        for _ in range(8):
            loss = loss_of(model, x)
            loss.backward()
            losses.append(loss.item())
            if how == "by hand":
                for p in model.parameters():
                    p.data -= 0.05 * p.grad
                model.zero_grad()
    assert losses[-1] < 0.97 * losses[0]
    assert error(model(x), in_16_bits(model, x)) < 0.05


@pytest.mark.parametrize("mode", MODES)
def test_an_average_of_weights(device, mode):
    model, optimizer = trained(device, mode)
    average = AveragedModel(model, use_buffers=True)
    for step in range(2):
        step_of(model, optimizer, batch(step, device))
        average.update_parameters(model)
    x = batch(9, device)
    assert_ran(average.module, mode)
    assert error(average(x), in_16_bits(average.module, x)) < 0.03
    twin = copy.deepcopy(model)
    losses = [[step_of(m, sgd(m), batch(step, device)) for step in range(2)] for m in (model, twin)]
    assert losses[0] == losses[1]
    assert_same(model, twin)


# ---- what is around a model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_two_threads_train_two_models(device, mode):
    def losses(model, optimizer, scale):
        return [step_of(model, optimizer, scale * batch(step, device)) for step in range(6)]

    expected = [losses(*trained(device, mode), scale) for scale in (1, 30)]
    pairs, results = [trained(device, mode), trained(device, mode)], [None, None]

    def run(i, scale):
        results[i] = losses(*pairs[i], scale)

    threads = [threading.Thread(target=run, args=(i, scale)) for i, scale in enumerate((1, 30))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == expected


@pytest.mark.parametrize("mode", MODES)
def test_one_attention_in_four_threads(device, mode):
    attention = attentions(trained(device, mode)[0])[0]

    def gradient(seed):
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(2, 2, TOKENS, 128, generator=generator) for _ in range(3))
        leaves = [t.to(device, torch.bfloat16).requires_grad_() for t in (q, k, v)]
        return torch.autograd.grad(attention(*leaves, is_causal=True).float().square().sum(), leaves)

    gradient(0)
    fp8.update_scales(attention)
    expected, same = [gradient(seed) for seed in range(4)], []

    def work(seed, grads):
        for _ in range(20):
            same.extend(torch.equal(a, b) for a, b in zip(gradient(seed), grads, strict=True))

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * (4 * 20 * 3)


@pytest.mark.parametrize("mode", MODES)
def test_two_streams(cuda, mode):
    model, _ = trained(cuda, mode)
    x = batch(9, cuda)
    expected = gradients(model, x)
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(10):
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                made = gradients(model, x)
            torch.cuda.current_stream().wait_stream(stream)
            assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_hooks_see_what_they_see_in_16_bits(device, mode):
    seen = {}
    for name in (mode, "16bit"):
        attention = fp8.ScaledDotProductAttention(mode=name)
        seen[name] = []
        note = seen[name].append
        attention.register_forward_pre_hook(lambda m, args, note=note: note("pre") or (args[0] * 2, *args[1:]))
        attention.register_forward_hook(lambda m, args, out, note=note: note("forward") or out + 1)
        attention.register_full_backward_pre_hook(lambda m, dy, note=note: note("backward pre"))
        attention.register_full_backward_hook(lambda m, dx, dy, note=note: note([t.shape for t in dx if t is not None]))
        torch.manual_seed(0)
        q, k, v = (torch.randn(2, 2, TOKENS, 128).to(device, torch.bfloat16).requires_grad_() for _ in range(3))
        y = attention(q, k, v, is_causal=True)
        y.float().square().sum().backward()
        seen[name].append((y.detach(), q.grad, k.grad, v.grad))
    made, expected = seen[mode].pop(), seen["16bit"].pop()
    assert seen[mode] == seen["16bit"] and len(seen[mode]) == 4
    assert max(error(a, b) for a, b in zip(made, expected)) < 0.16


@pytest.mark.parametrize("mode", MODES)
def test_functional_call(device, mode):
    model, _ = trained(device, mode)
    state = {name: 0.5 * p.detach() for name, p in model.named_parameters()}
    x = batch(9, device)
    made = torch.func.functional_call(model, state, (x,))
    exact = copy.deepcopy(model)
    for attention in attentions(exact):
        attention.mode = "16bit"
    assert error(made, torch.func.functional_call(exact, state, (x,))) < 0.03
    assert_ran(model, mode)


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).float().sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[0],
    "vmap": lambda f, x: torch.func.vmap(f)(x[None])[0],
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "functionalize": lambda f, x: torch.func.functionalize(f)(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("mode", MODES)
def test_transforms_are_refused_in_words(device, mode, transform):
    q, k, v = (torch.randn(2, 2, TOKENS, 128).to(device, torch.bfloat16) for _ in range(3))
    attention = fp8.ScaledDotProductAttention(mode=mode)
    before = attention.fp8_slots.clone()
    with pytest.raises(ValueError, match="torch_fp8: .*under a transform of torch.func.*what can is 16bit"):
        TRANSFORMS[transform](lambda q: attention(q, k, v, is_causal=True), q)
    assert torch.equal(attention.fp8_slots, before)
    if transform == "jvp":
        return  # PyTorch's has none either
    plain = lambda q: F.scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: E731
    automatic = fp8.ScaledDotProductAttention(mode="auto")
    made = TRANSFORMS[transform](lambda q: automatic(q, k, v, is_causal=True), q)
    assert torch.equal(made, TRANSFORMS[transform](plain, q))
    assert automatic.last[0] == "16bit" and "torch.func" in automatic.last[1]


@pytest.mark.parametrize("mode", MODES)
def test_second_derivatives_are_refused_in_words(device, mode):
    model, _ = trained(device, mode)
    attention = attentions(model)[0]
    q = torch.randn(2, 2, TOKENS, 128).to(device, torch.bfloat16).requires_grad_()
    with pytest.raises(RuntimeError, match='torch_fp8: .*cannot be differentiated again.*mode="16bit"'):
        torch.autograd.grad(attention(q, q, q).sum(), q, create_graph=True)
    op = fp8.scaled_dot_product_attention
    with torch.autograd.forward_ad.dual_level(), pytest.raises(ValueError, match="or in forward mode; what can is"):
        op(torch.autograd.forward_ad.make_dual(q.detach(), q.detach()), q, q, mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_compiled_autograd(device, mode):
    attention = fp8.ScaledDotProductAttention(mode=mode)
    leaves = [torch.randn(2, 2, TOKENS, 128).to(device, torch.bfloat16).requires_grad_() for _ in range(3)]
    expected = torch.autograd.grad(attention(*leaves, is_causal=True).float().square().sum(), leaves)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        attention(*leaves, is_causal=True).float().square().sum().backward()
    assert all(torch.equal(t.grad, e) for t, e in zip(leaves, expected, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_profilers_name_the_parts(device, mode):
    model, _ = trained(device, mode)
    with count_casts() as parts:
        loss_of(model, batch(9, device)).backward()
    assert parts["cast_qkv"] == 2
    assert parts["attention_backward_16bit"] == (2 if mode == "fp8_forward" else 0)


@pytest.mark.parametrize("mode", MODES)
def test_training_resumes_to_the_bit_from_a_file(device, mode):
    model, optimizer = trained(device, mode)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "fp8": fp8.state_dict(model)}, file), file.seek(0)
    losses = [step_of(model, optimizer, batch(step, device)) for step in range(3)]
    other = model_on(device, mode)
    state = torch.load(file)
    other.load_state_dict(state["model"]), fp8.load_state_dict(other, state["fp8"])
    assert [step_of(other, sgd(other), batch(step, device)) for step in range(3)] == losses
    assert_same(model, other)


# ---- torch.compile, torch.export ------------------------------------------------------------------------------------


class Counting:
    """aot_eager, and how many graphs it was given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


def compiled_steps(model, device, run, sizes):
    optimizer, losses = sgd(model), []
    for step, (samples, tokens) in enumerate(sizes):
        x = batch(step, device, samples=samples, tokens=tokens)
        loss = (run(x).float() - x.float().roll(1, -1)).square().mean()
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    return losses


SIZES = {
    "one size": [(2, 16)] * 5,
    "batches": [(samples, 16) for samples in (2, 2, 3, 4, 7, 1)],
    "lengths": [(2, tokens) for tokens in (16, 16, 24, 37, 8)],
}
# Without a history, with one, and with one for any size; a batch of one is always a graph of its own.
GRAPHS = {"batches": 4, "lengths": 3}


@pytest.mark.parametrize("sizes", GRAPHS)
@pytest.mark.parametrize("mode", [*MODES, "auto"])
def test_any_size_in_one_more_graph(device, mode, sizes):
    model = model_on(device, mode)
    twin, backend = copy.deepcopy(model), Counting()
    expected = compiled_steps(model, device, model, SIZES[sizes])
    made = compiled_steps(twin, device, torch.compile(twin, fullgraph=True, backend=backend), SIZES[sizes])
    assert made == pytest.approx(expected, rel=5e-3)  # AOT adds the gradients of residuals in another order
    assert backend.graphs <= GRAPHS[sizes]
    assert [a.last for a in attentions(twin)] == [a.last for a in attentions(model)]


@pytest.mark.parametrize("mode", MODES)
def test_compiled_recomputation(device, mode):
    model = model_on(device, mode)
    twin = copy.deepcopy(model)
    twin.run = lambda block, x: checkpoint(block, x, use_reentrant=False)
    expected = compiled_steps(model, device, model, SIZES["one size"])
    made = compiled_steps(twin, device, torch.compile(twin, fullgraph=True, backend="aot_eager"), SIZES["one size"])
    assert made == pytest.approx(expected, rel=5e-3)
    assert_ran(twin, mode)


@pytest.mark.parametrize("mode", [*MODES, "auto"])
def test_cuda_graphs_of_the_default_backend_learn_the_same(cuda, mode):
    model = model_on(cuda, mode)
    twin = copy.deepcopy(model)
    expected = compiled_steps(model, cuda, model, SIZES["one size"])
    made = compiled_steps(twin, cuda, torch.compile(twin, fullgraph=True, mode="reduce-overhead"), SIZES["one size"])
    assert made == pytest.approx(expected, rel=1e-2)
    for attention, of_eager in zip(attentions(twin), attentions(model), strict=True):
        assert attention.last == of_eager.last
        torch.testing.assert_close(attention.fp8_slots[:5], of_eager.fp8_slots[:5], rtol=0.1, atol=0)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_exported_in_evaluation(device, mode, frozen):
    model, _ = trained(device, mode)
    model.eval()
    if frozen:
        fp8.freeze(model)
    x, other = batch(9, device), batch(10, device, samples=3, tokens=24)
    sizes = ({0: torch.export.Dim("samples", min=2, max=64), 1: torch.export.Dim("tokens", min=2, max=512)},)
    with torch.no_grad():
        program, file = torch.export.export(model, (x,), dynamic_shapes=sizes), io.BytesIO()
        torch.export.save(program, file), file.seek(0)
        loaded = torch.export.load(file).module()
        for given in (x, other):  # frozen layers have a way for few rows, and a program has one for all
            assert error(loaded(given), model(given)) <= (0.03 if frozen else 0.0)
    assert any("attention" in str(node.target) and "torch_fp8" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("mode", MODES)
def test_traced_in_evaluation(device, mode):
    attention = attentions(trained(device, mode)[0])[0].eval()
    q = torch.randn(2, 2, TOKENS, 128).to(device, torch.bfloat16)
    with torch.no_grad():
        traced = torch.jit.trace(lambda q: attention(q, q, q, is_causal=True), (q,))
        assert torch.equal(traced(q), attention(q, q, q, is_causal=True))


# ---- transformers, peft ---------------------------------------------------------------------------------------------


def llama_on(device, mode, **config):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 64, "head_dim": 128}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, **config))
    return fp8.fuse(fp8.convert(model.to(device, torch.bfloat16), tokens=None), attention=mode)


def ids(device, seed=0, samples=2, tokens=TOKENS):
    return torch.randint(64, (samples, tokens), generator=torch.Generator().manual_seed(seed)).to(device)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_gradient_checkpointing_of_transformers(device, mode, reentrant):
    models = [llama_on(device, mode) for _ in range(3)]
    models[1].gradient_checkpointing_enable({"use_reentrant": reentrant})
    for model in models:
        model.train()
    for step in range(2):
        for model in models[:2]:
            model(ids(device, step), labels=ids(device, step)).loss.backward()
            fp8.update_scales(model)
        with fp8.disabled(models[2]):
            models[2](ids(device, step), labels=ids(device, step)).loss.backward()
        if reentrant:
            plain, recomputed, exact = ([p.grad for p in model.parameters()] for model in models)
            assert_as_good(recomputed, plain, exact)
        else:
            assert_same(*models[:2])
    assert_ran(models[1], mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("freeze", [False, True])
def test_lora(device, mode, freeze):
    peft = pytest.importorskip("peft")
    model = llama_on(device, mode)
    if freeze:
        fp8.freeze(model)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(input_ids=ids(device), labels=ids(device)).loss
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert_ran(model, mode)
    for attention in attentions(model):
        assert attention.fp8_slots[[0, 1, 2, 4], 3].eq(6).all()  # its scales follow the adapters' steps
    model.eval()
    with torch.no_grad():
        assert error(model(ids(device)).logits, in_16_bits_llama(model, device)) < 0.05
        model.merge_and_unload()
    assert_ran(model, mode)


def in_16_bits_llama(model, device):
    model = copy.deepcopy(model)
    for attention in attentions(model):
        attention.mode = "16bit"
    return model(ids(device)).logits


def test_trainer_resumes_to_the_bit(tmp_path, mode="fp8"):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from torch_fp8.integrations import trainer_callback

    data = [{"input_ids": ids("cpu", i, 1)[0], "labels": ids("cpu", i, 1)[0]} for i in range(8)]

    def trainer(steps):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=steps, save_steps=2, report_to=[],
            use_cpu=True, bf16=False, logging_strategy="no",
        )  # fmt: skip
        model = llama_on("cpu", mode)
        return transformers.Trainer(model=model, args=arguments, train_dataset=data, callbacks=[trainer_callback()])

    whole = trainer(4)
    whole.train()
    resumed = trainer(4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(whole.model, resumed.model)
    assert_ran(resumed.model, mode)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("prompt", [1, 12])
@pytest.mark.parametrize("mode", MODES)
def test_generate(device, mode, prompt, cache):
    """Prefill in FP8, where the cache is no longer than the prompt; each further token in 16 bits."""
    model = llama_on(device, mode, initializer_range=0.15).eval()
    x = ids(device, samples=1, tokens=prompt).clamp(min=1)  # no padding
    options = {
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "do_sample": False,
        "pad_token_id": 0,
        "cache_implementation": cache,
    }
    if cache == "dynamic":
        del options["cache_implementation"]
    attention, ran = attentions(model)[0], []
    attention.register_forward_hook(lambda module, args, out: ran.append(module.last[0]))
    made = model.generate(x, disable_compile=True, output_logits=True, return_dict_in_generate=True, **options)
    assert made.sequences.shape == (1, prompt + 4)
    assert ran == ([mode] if prompt > 1 and cache == "dynamic" else []) and attention.last[0] == "16bit"
    plain = copy.deepcopy(model)
    fp8.unfuse(plain)
    expected = plain.generate(x, disable_compile=True, output_logits=True, return_dict_in_generate=True, **options)
    assert error(made.logits[0], expected.logits[0]) < 0.15
