"""fuse and unfuse of transformers' models: what a model computes stays, whatever is around it and whatever comes in
between."""

import copy
import io

import pytest
import torch
import torch_fp8 as fp8
from families import (
    FAMILIES,
    converted,
    counts,
    fused_calls,
    fused_model,
    gradients,
    ids_of,
    make,
    off,
    train,
    transformers,
)
from torch import nn
from torch_fp8.layers import frozen, given, mlp
from torch_fp8.layers.fused import Fused, FusedBlock, fused_modules
from torch_fp8.layers.linear import fp8_layers


@pytest.mark.parametrize("family", FAMILIES)
class TestFamilies:
    def test_what_is_fused(self, family):
        model = fused_model(family)
        assert counts(model) == FAMILIES[family]
        with fused_calls() as calls:
            train(model, 1)
        assert calls == {True: 2}

    def test_numbers(self, family):
        """Against float32: no worse than the FP8 layers alone, where everything between them is PyTorch's."""
        exact, plain = make(family, torch.float32), make(family)
        for a, b in zip(exact.parameters(), plain.parameters()):
            a.data.copy_(b.data)
        models = {"16 bits": plain, "fp8": fp8.convert(copy.deepcopy(plain), tokens=None)}
        models["fused"] = fp8.fuse(copy.deepcopy(models["fp8"]))
        errors = {name: torch.zeros(2, dtype=torch.float64) for name in models}
        for seed in range(4):
            right = gradients(exact, ids_of(seed))
            for name, model in models.items():
                got = gradients(model, ids_of(seed))
                errors[name] += torch.tensor([off(a, b) for a, b in zip(got, right)], dtype=torch.float64)
        assert (errors["fused"] <= 1.15 * errors["fp8"]).all(), errors
        assert (errors["fused"] >= errors["16 bits"]).all()  # it is FP8

    @pytest.mark.parametrize("activations", ["token", "static"])
    def test_frozen(self, family, activations, monkeypatch):
        """Norms make the codes of the layers that read them; to the bit what those would make, and no worse in all."""
        exact, model, ids = make(family, torch.float32).eval(), make(family).eval(), ids_of()
        for a, b in zip(exact.parameters(), model.parameters()):
            a.data.copy_(b.data)
        if activations == "static":
            fp8.calibrate(model, [ids])
        fp8.freeze(model, activations, "tensor" if activations == "static" else "channel")
        plain = copy.deepcopy(model)
        fp8.fuse(model)
        assert counts(model)[0] == FAMILIES[family][0] and counts(model)[2:] == FAMILIES[family][2:]
        taken, codes_for = [], given.codes_for
        with torch.no_grad():
            right = exact(ids).logits
            for module in (frozen, mlp):
                monkeypatch.setattr(module, "codes_for", lambda *args: taken.append(codes_for(*args)) or taken[-1])
            logits, made = model(ids).logits, model.generate(ids[:, :20], max_new_tokens=3, do_sample=False)
            # Not where norms stand behind the layers.
            assert sum(map(bool, taken)) >= (0 if family == "olmo2" else 4)
            for module in (frozen, mlp):
                monkeypatch.setattr(module, "codes_for", lambda *args: ())
            assert torch.equal(model(ids).logits, logits)
            assert torch.equal(model.generate(ids[:, :20], max_new_tokens=3, do_sample=False), made)
            assert off(logits, right) <= 1.15 * off(plain(ids).logits, right)

    def test_nothing_moves(self, family):
        model = converted(family)
        before = model.state_dict()
        names, modules = dict(model.named_parameters()), dict(model.named_modules())
        optimizer = torch.optim.AdamW(model.parameters())
        model.eval()
        ids = ids_of()
        with torch.no_grad():
            logits = model(ids).logits
            assert fp8.fuse(model) is model and counts(model) == FAMILIES[family]
            fused_logits = model(ids).logits
            assert off(fused_logits, logits) < 0.05
            assert list(model.state_dict()) == list(before)
            assert all(p is names[name] for name, p in model.named_parameters())
            assert all(module is modules[name] for name, module in model.named_modules())
            assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
            classes = {name: type(module).__mro__[2:] for name, module in modules.items()}
            fp8.unfuse(model)
            assert torch.equal(model(ids).logits, logits)
        assert not fused_modules(model) and not fp8.summary(model).fused and not fp8.summary(model).not_fused
        assert not any(isinstance(module, Fused) for module in modules.values()) and classes
        assert not any(name.startswith("fp8_fus") for module in modules.values() for name in vars(module))

    def test_masks_and_caches(self, family):
        """What is masked says nothing, and generate's logits are those of one pass over all tokens."""
        model = converted(family)
        train(model, 1)  # a history: else one token's scale depends on the others
        model.eval()
        ids, mask = ids_of(), torch.ones(2, 24, dtype=torch.long)
        mask[0, :7] = 0
        other = ids.clone()
        other[0, :7] = 5
        with torch.no_grad(), fused_calls() as calls:
            plain = model(ids, attention_mask=mask).logits
            fp8.fuse(model)
            a, b = (model(x, attention_mask=mask).logits for x in (ids, other))
            assert torch.equal(a[0, 7:], b[0, 7:]) and torch.equal(a[1], b[1])
            assert off(a[:, 7:], plain[:, 7:]) < 0.1
            made = model.generate(
                ids[:, :8], max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
            steps = len(made.logits)
            whole = model(made.sequences).logits[:, -steps - 1 : -1].float()
            assert off(torch.stack(made.logits, 1), whole) < 0.05
        assert not calls[False] and calls[True] >= 12


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi3"])
class TestTraining:
    def test_training(self, family):
        losses = {name: train(model) for name, model in
                  {"16": make(family), "fp8": converted(family), "fused": fused_model(family)}.items()}  # fmt: skip
        assert (losses["fused"] - losses["16"]).abs().max() < 0.03
        assert (losses["fused"] - losses["fp8"]).abs().max() < 0.02

    def test_copies(self, family, tmp_path):
        model = fused_model(family)
        train(model, 2)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copies = [copy.deepcopy(model), torch.load(file, weights_only=False)]
        for other in copies:
            assert counts(other) == counts(model)
            mine = {id(module) for module in model.modules()}
            for module in fused_modules(other).values():
                assert not any(id(reader) in mine for reader in getattr(module, "fp8_readers", ()))
        losses = [train(m, 2, first=2) for m in (model, *copies)]
        assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])

    def test_save_pretrained(self, family, tmp_path):
        model = fused_model(family).eval()
        model.save_pretrained(tmp_path)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert type(again) is type(model)
        assert all(torch.equal(p, q) for p, q in zip(again.parameters(), model.parameters(), strict=True))


# ---- what is around a model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "olmo2", "phi3"])
def test_what_is_made_again_in_backward_is_the_same(family):
    model, lean = fused_model(family), fp8.fuse(converted(family), recompute=True)
    kept = {}
    for m in (model, lean):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            m(input_ids=ids_of()).logits.sum().backward()
        m.zero_grad()
        kept[m] = len({t.data_ptr() for t in saved if t.dtype.itemsize == 1 and t.numel()})
    assert kept[lean] < kept[model] / 2
    assert torch.equal(train(lean), train(model))
    assert fp8.unfuse(lean) is lean and not any(layer.fp8_state.recompute for layer in fp8_layers(lean).values())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_fuse_after_checkpointing_was_switched_on(reentrant, frozen):
    model = fp8.freeze(make()) if frozen else converted()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert counts(fp8.fuse(model)) == FAMILIES["llama"]


def test_classes_keep_their_names():
    """By which accelerate and FSDP's policies find them."""
    model = fused_model()
    assert {type(m).__name__ for m in fused_modules(model).values()} == {
        "LlamaDecoderLayer", "LlamaAttention", "LlamaMLP", "LlamaRMSNorm",
    }  # fmt: skip


def test_convert_again_keeps_what_is_made_again():
    model = fp8.fuse(converted(), recompute=True)
    fp8.convert(model, fp8.CurrentScaling(), tokens=None)
    assert all(layer.fp8_state.recompute for layer in fp8_layers(model).values())


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_checkpointing_gives_the_same_bits(family):
    model = fused_model(family)
    other = copy.deepcopy(model)
    other.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    other.train()
    assert torch.equal(train(model), train(other))


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_compiled(family):
    model = fused_model(family)
    other = copy.deepcopy(model)
    losses = train(model)
    assert (train(torch.compile(other, backend="aot_eager")) - losses).abs().max() < 0.01


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "phi3"])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_autocast(family, weights):
    """Of every block, what the unfused one returns: in its dtype."""
    plain = converted(family, weights)
    model = fp8.fuse(copy.deepcopy(plain))
    dtypes = []
    for m in (plain, model):
        kinds = [type(module).__mro__ for module in model.modules() if isinstance(module, FusedBlock)]
        plain_block = kinds[0][-len(kinds[0]) + 3]
        seen = []
        blocks = [module for module in m.modules() if isinstance(module, plain_block)]
        for block in blocks:
            block.register_forward_hook(lambda _, args, y, seen=seen: seen.append((args[0].dtype, y.dtype)))
        with torch.autocast("cpu", torch.bfloat16):
            seen.append(m(ids_of()).logits)
        dtypes.append(seen)
    assert len(dtypes[0]) == 3 and dtypes[0][:-1] == dtypes[1][:-1]
    assert dtypes[0][-1].dtype == dtypes[1][-1].dtype and off(dtypes[1][-1], dtypes[0][-1]) < 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes(dtype):
    exact = make(dtype=torch.float32)
    model = make(dtype=dtype)
    for a, b in zip(exact.parameters(), model.parameters()):
        a.data.copy_(b.data)
    right = exact(ids_of()).logits
    fp8.convert(model, tokens=None)
    error = off(model(ids_of()).logits, right)
    assert off(fp8.fuse(model)(ids_of()).logits, right) <= 1.15 * error


def test_norms_in_float32_beside_layers_in_16_bits():
    plain = converted("gpt2")
    for name, parameter in plain.named_parameters():
        if "ln_" in name:
            parameter.data = parameter.data.float()
    model = fp8.fuse(copy.deepcopy(plain))
    a, b = model(ids_of()).logits, plain(ids_of()).logits
    assert a.dtype == b.dtype and off(a, b) < 0.1


def test_meta():
    with torch.device("meta"):
        model = make()
    fp8.fuse(fp8.convert(model, tokens=None))
    assert counts(model) == FAMILIES["llama"]
    model.to_empty(device="cpu")
    source = make()
    model.load_state_dict(source.state_dict())
    for a, b in zip(model.buffers(), source.buffers()):
        a.copy_(b)
    assert torch.equal(train(model), train(fp8.fuse(fp8.convert(source, tokens=None))))


def test_default_dtype_and_device_and_no_grad_change_nothing():
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.no_grad(), torch.inference_mode(), torch.autocast("cpu"), torch.device("meta"):
            model = converted()
            model = fp8.fuse(model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert counts(model) == FAMILIES["llama"]


def test_hidden_states_and_attentions():
    plain = converted(attn_implementation="eager").eval()
    model = fp8.fuse(copy.deepcopy(plain))
    a, b = (m(ids_of(), output_hidden_states=True, output_attentions=True) for m in (model, plain))
    for got, right in zip((*a.hidden_states, *a.attentions), (*b.hidden_states, *b.attentions), strict=True):
        assert off(got, right) < 0.1


def test_peft():
    peft = pytest.importorskip("peft")
    losses = []
    for model in (fused_model(), converted()):
        torch.manual_seed(3)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
        adapted = peft.get_peft_model(model, config).to(torch.bfloat16)
        trained = [p for p in adapted.parameters() if p.requires_grad]
        losses.append(train(adapted, 4, torch.optim.SGD(trained, 0.5)))
        adapted.eval()
        before = adapted(ids_of()).logits
        merged = adapted.merge_and_unload()
        assert off(merged(ids_of()).logits, before) < 0.1
    assert (losses[0] - losses[1]).abs().max() < 0.02 and losses[0][3] < losses[0][0]


def test_trainer(tmp_path):
    """Three steps with recomputation; and resumed: the weights of who never stopped."""
    pytest.importorskip("accelerate")
    from torch_fp8.integrations import trainer_callback

    data = [{"input_ids": ids_of(i, (24,)), "labels": ids_of(i, (24,))} for i in range(8)]

    def trained(model, folder, steps, resume=None):
        args = transformers.TrainingArguments(
            output_dir=tmp_path / folder, max_steps=steps, per_device_train_batch_size=2, save_steps=2, logging_steps=1,
            learning_rate=1e-3, lr_scheduler_type="constant", report_to=[], use_cpu=True, gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False}, disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model, args, train_dataset=data, callbacks=[trainer_callback()])
        trainer.train(resume_from_checkpoint=resume)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    whole, again = fused_model(), fused_model()
    losses = trained(whole, "whole", 3)
    assert counts(whole) == FAMILIES["llama"] and len(losses) == 3
    trained(fused_model(), "half", 2)
    trained(again, "half", 3, str(tmp_path / "half" / "checkpoint-2"))
    for a, b in zip(whole.parameters(), again.parameters()):
        assert torch.equal(a, b)


def test_fully_shard_before_and_after(tmp_path):
    """In a group of one: the losses of the model that is not sharded; and unfuse is refused in words behind it."""
    from torch import distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        losses = train(fused_model())
        for first in (True, False):
            model = converted()
            model = fp8.fuse(model) if first else model
            for layer in model.model.layers:
                fully_shard(layer)
            fully_shard(model)
            model = model if first else fp8.fuse(model)
            assert counts(model)[2] == 2
            assert (train(model) - losses).abs().max() < 0.01
            if first:
                with pytest.raises(ValueError, match=r"model\.layers\.0 cannot be unfused.*undo that first"):
                    fp8.unfuse(model)
                assert counts(model) == FAMILIES["llama"]
    finally:
        dist.destroy_process_group()


def test_data_parallel_is_refused_as_ever():
    with pytest.raises(RuntimeError, match="DataParallel"):
        fused_model().model.layers[0].mlp.up_proj._replicate_for_data_parallel()


# ---- hooks and what is changed afterwards ----------------------------------------------------------------------------

PLACES = [
    "input_layernorm", "post_attention_layernorm", "self_attn", "self_attn.q_proj", "self_attn.o_proj", "mlp",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mlp.act_fn",
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hook_fires_with_the_right_values(place, when):
    plain = converted().eval()
    model = copy.deepcopy(plain)
    seen = {}

    def listen(model, key):
        module = model.get_submodule(f"model.layers.1.{place}")
        module.register_forward_hook(
            lambda _, args, y: seen.setdefault(key, []).append(y if torch.is_tensor(y) else y[0])
        )

    listen(plain, "plain")
    if when == "before":
        listen(model, "fused")
    fp8.fuse(model)
    assert "fused" not in seen  # not even while fuse looks
    if when == "after":
        listen(model, "fused")
    a, b = model(ids_of()).logits, plain(ids_of()).logits
    assert off(a, b) < 0.1 and len(seen["fused"]) == len(seen["plain"]) == 1
    assert off(seen["fused"][0], seen["plain"][0]) < 0.1


def test_a_hook_may_change_what_a_module_gives():
    for place in PLACES:
        model = fused_model()
        model(ids_of())
        before = model(ids_of()).logits
        module = model.get_submodule(f"model.layers.0.{place}")
        handle = module.register_forward_hook(lambda _, args, y: 10 * y if torch.is_tensor(y) else (10 * y[0], *y[1:]))
        assert off(model(ids_of()).logits, before) > 0.05, place
        handle.remove()
        assert off(model(ids_of()).logits, before) < 0.05, place


def test_global_hooks_see_all_modules():
    plain = converted().eval()
    model = fp8.fuse(copy.deepcopy(plain))
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(module))
    try:
        plain(ids_of())
        names = {module: name for m in (plain, model) for name, module in m.named_modules()}
        of_plain = [names[module] for module in seen]
        seen.clear()
        model(ids_of())
    finally:
        handle.remove()
    assert [names[module] for module in seen] == of_plain


def test_a_forward_on_the_object_is_used():
    model = fused_model()
    mlp, norm = model.model.layers[0].mlp, model.model.layers[0].post_attention_layernorm
    called = []
    for module in (mlp, norm):
        forward = module.forward
        module.forward = lambda x, forward=forward, module=module: called.append(module) or forward(x)
    model(ids_of())
    assert called == [norm, mlp]
    model = converted()
    model.model.layers[0].mlp.forward = model.model.layers[0].mlp.forward
    fp8.fuse(model)
    assert counts(model) == (5, 1, 2, 2)
    assert fp8.summary(model).not_fused == {"model.layers.*.mlp": "its forward was replaced on the object"}


def test_dropout_that_is_switched_on_later_drops():
    model = fused_model("gpt2")
    ids = ids_of()
    for block in model.transformer.h:
        block.mlp.dropout.p = 1.0
    with torch.no_grad():
        before = model(ids).logits
        for block in model.transformer.h:
            block.mlp.c_fc.weight.data.mul_(2)
        assert torch.equal(model(ids).logits, before)  # the MLPs say nothing any more
        model.eval()
        assert not torch.equal(model(ids).logits, before)


# ---- the order of calls ----------------------------------------------------------------------------------------------

CALLS = {
    "convert": lambda model: fp8.convert(model, tokens=None),
    "current": lambda model: fp8.convert(model, fp8.CurrentScaling(), tokens=None),
    "fuse": fp8.fuse,
    "unfuse": fp8.unfuse,
    "revert": fp8.revert,
    "freeze": fp8.freeze,
    "train": lambda model: train(model, 1, torch.optim.SGD(model.parameters(), 0.0)),
    "copy": lambda model: model.load_state_dict(copy.deepcopy(model).state_dict()),
}
ORDERS = {  # and how far off the 16-bit model the logits are
    "convert fuse fuse train": 0.06, "convert fuse revert": 0.01, "convert fuse revert unfuse": 0,
    "convert fuse revert convert train": 0.06, "convert fuse revert convert fuse train": 0.06,
    "convert train fuse current train": 0.06, "convert fuse train convert": 0.06, "convert fuse freeze": 0.06,
    "convert freeze fuse": 0.06, "convert fuse freeze fuse": 0.06, "convert fuse freeze unfuse": 0.06,
    "freeze fuse unfuse": 0.06, "convert fuse unfuse fuse train": 0.06, "convert fuse unfuse revert": 0,
    "convert unfuse revert": 0, "convert fuse copy train": 0.06,
}  # fmt: skip


@pytest.mark.parametrize("order", ORDERS)
def test_any_order(order):
    model = make()
    right = model.eval()(ids_of()).logits
    for call in order.split():
        CALLS[call](model.train())
    model.eval()
    assert off(model(ids_of()).logits, right) <= ORDERS[order]
    assert off(copy.deepcopy(model)(ids_of()).logits, model(ids_of()).logits) == 0


def test_norms_feed_the_layers_of_another_convert():
    model = fused_model("phi3")
    fp8.convert(model, fp8.CurrentScaling(), tokens=None)
    for norm in (model.model.layers[0].input_layernorm, model.model.layers[0].post_attention_layernorm):
        (reader,) = norm.fp8_readers
        assert reader.fp8_state.group is not None


def test_disabled():
    model, plain = fused_model(), make()
    with fp8.disabled(model):
        assert off(model(ids_of()).logits, plain(ids_of()).logits) < 0.01
    assert off(model(ids_of()).logits, plain(ids_of()).logits) > 0.01


@pytest.mark.parametrize("prepare", [lambda model: model, fp8.revert], ids=["plain", "reverted"])
def test_fuse_before_convert_is_refused(prepare):
    model = make()
    if prepare is fp8.revert:
        fp8.revert(fp8.convert(model, tokens=None))
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="LlamaForCausalLM has none; call torch_fp8.convert first"):
        fp8.fuse(model)
    assert classes == [type(module) for module in model.modules()]


def test_summary():
    model = make("phi3")
    for layer in model.model.layers:
        layer.mlp.activation_fn = torch.nn.Tanh()
    summary = fp8.summary(fp8.fuse(fp8.convert(model, tokens=None)))
    assert summary.fused == {"Phi3RMSNorm": 5, "Phi3DecoderLayer": 2, "Phi3Attention": 2}
    assert summary.not_fused["model.layers.*.mlp"].startswith("what stands between its layers is none of silu")
    assert "not fused: model.layers.*.mlp: what stands between its layers" in str(summary)
    model = fused_model("phi3")
    assert fp8.summary(model).fused["Phi3MLP"] == 2 and not fp8.summary(model).not_fused
