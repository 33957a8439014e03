"""fuse and unfuse: what a model computes stays, whatever is around it and whatever comes in between."""

import contextlib
import copy
import io
import random
from collections import Counter

import pytest
import torch
import torch_fp8 as fp8
from torch import nn
from torch.nn import functional as F
from torch_fp8.layers import frozen, fused, given, mlp
from torch_fp8.layers.fused import FusedAttention, FusedBlock, FusedMlp, FusedNorm, fused_modules
from torch_fp8.layers.linear import fp8_layers

from models import gpt

transformers = pytest.importorskip("transformers", minversion="5.24")
transformers.logging.set_verbosity_error()

KINDS = (FusedNorm, FusedMlp, FusedBlock, FusedAttention)
# Of two decoder layers: norms (one of them behind the last layer), MLPs, blocks, attentions.
FAMILIES = {
    "llama": (5, 2, 2, 2), "mistral": (5, 2, 2, 2), "qwen2": (5, 2, 2, 2), "qwen3": (9, 2, 2, 2),
    "smollm3": (5, 2, 2, 2), "phi3": (5, 0, 2, 2), "gemma2": (9, 2, 2, 2), "gemma3_text": (13, 2, 2, 2),
    "olmo2": (9, 2, 2, 2), "mixtral": (5, 0, 2, 2), "gpt_neox": (5, 2, 2, 2), "gpt2": (5, 2, 2, 0),
    "granite": (5, 2, 2, 2), "starcoder2": (5, 2, 2, 2), "cohere": (3, 2, 2, 2), "apertus": (9, 2, 2, 2),
}  # fmt: skip
SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "vocab_size": 97, "max_position_embeddings": 128, "n_embd": 64, "n_head": 4, "n_layer": 2,
    "num_local_experts": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0.0,
    "embd_pdrop": 0.0, "attn_pdrop": 0.0, "hidden_dropout": 0.0, "attention_dropout": 0.0, "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
}  # fmt: skip


def make(family="llama", dtype=torch.bfloat16, **others):
    config = transformers.AutoConfig.for_model(family, **{**SIZES, **others})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():  # gains that are all 1 hide much
        if "norm" in name or "ln_" in name:
            parameter.data += (0.2 * torch.randn(parameter.shape, generator=generator)).to(dtype)
    return model


def converted(family="llama", dtype=torch.bfloat16, **others):
    return fp8.convert(make(family, dtype, **others), tokens=None)


def fused_model(family="llama", dtype=torch.bfloat16, **others):
    return fp8.fuse(converted(family, dtype, **others))


def ids_of(seed=0, shape=(2, 24)):
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(seed))


def counts(model):
    return tuple(sum(isinstance(module, kind) for module in fused_modules(model).values()) for kind in KINDS)


def train(model, steps=4, optimizer=None, first=0):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.05)
    losses = []
    for step in range(first, first + steps):
        ids = ids_of(step % 3)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


def gradients(model, ids):
    model.zero_grad()
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    grads = torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return out.logits.detach().double(), grads


def off(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@contextlib.contextmanager
def fused_calls():
    """How many calls of blocks were fused, and how many were not."""
    seen, fits = Counter(), fused._fits

    def count(*args):
        fit = fits(*args)
        seen[fit] += 1
        return fit

    fused._fits = count
    try:
        yield seen
    finally:
        fused._fits = fits


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
        assert all(type(module).__name__[:5] != "Fused" for module in modules.values()) and classes
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


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
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


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "olmo2"])
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


def test_checkpointing_gives_the_same_bits():
    model = fused_model()
    other = copy.deepcopy(model)
    other.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    other.train()
    assert torch.equal(train(model), train(other))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_compiled(family):
    model = fused_model(family)
    other = copy.deepcopy(model)
    losses = train(model)
    assert (train(torch.compile(other, backend="aot_eager")) - losses).abs().max() < 0.01


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
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
    model = fp8.fuse(fp8.convert(make("phi3"), tokens=None))
    summary = fp8.summary(model)
    assert summary.fused == {"Phi3RMSNorm": 5, "Phi3DecoderLayer": 2, "Phi3Attention": 2}
    assert summary.not_fused == {"model.layers.*.mlp": "its gate and up are one layer, gate_up_proj"}
    assert "not fused: model.layers.*.mlp: its gate and up are one layer" in str(summary)


# ---- other people's modules ------------------------------------------------------------------------------------------


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


HOSTILE = [
    Drops, DropsByFunction, SkipsLayers, Multiplies, Learns, LearnsBelow, Buffered, Detaches, Casts, Pair, Twice,
    Evaluates, Raises, Garbage, Open,
]  # fmt: skip


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


@pytest.mark.parametrize("mlp", [Tp, StopsUp, Scaled, Clamped, Tanh, LateDrop, Adds])
@pytest.mark.parametrize("training", [True, False])
def test_mlps_that_compute_something_else(mlp, training):
    plain = of(lambda: Block(mlp)).train(training)
    model = fp8.fuse(copy.deepcopy(plain))
    assert counts(model) == (4, 0, 2, 0)
    for mode in (True, False):
        assert_same(model.train(mode), plain.train(mode))


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
