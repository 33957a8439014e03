"""Models of transformers, tiny and with random weights, and what tests of fuse ask of them."""

import contextlib
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
    "smollm3": (5, 2, 2, 2), "phi3": (5, 2, 2, 2), "gemma2": (9, 2, 2, 2), "gemma3_text": (13, 2, 2, 2),
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
