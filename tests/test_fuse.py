"""fuse and unfuse: what a model computes stays, whatever is around it and whatever comes in between."""

import contextlib
import copy
import io
from collections import Counter

import pytest
import torch
import torch_fp8 as fp8
from torch_fp8.layers import fused
from torch_fp8.layers.fused import FusedAttention, FusedBlock, FusedMlp, FusedNorm, fused_modules

transformers = pytest.importorskip("transformers", minversion="5.24")
transformers.logging.set_verbosity_error()

KINDS = (FusedNorm, FusedMlp, FusedBlock, FusedAttention)
# Of two decoder layers: norms (one of them behind the last layer), MLPs, blocks, attentions.
FAMILIES = {
    "llama": (5, 2, 2, 2), "mistral": (5, 2, 2, 2), "qwen2": (5, 2, 2, 2), "qwen3": (9, 2, 2, 2),
    "smollm3": (5, 2, 2, 2), "phi3": (5, 0, 2, 2), "gemma2": (9, 2, 2, 2), "gemma3_text": (13, 2, 2, 2),
    "olmo2": (9, 2, 2, 2), "mixtral": (5, 0, 2, 2), "gpt_neox": (5, 2, 2, 2), "gpt2": (5, 2, 2, 0),
    "granite": (5, 2, 2, 2), "starcoder2": (5, 2, 2, 2), "cohere": (3, 2, 2, 2),
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
