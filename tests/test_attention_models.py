"""FP8 attention in models: ``fp8.Attention``, ``TransformerBlock`` and transformers' table of attentions."""

import copy
import math
import pickle

import pytest
import torch
import torch_fp8 as fp8
from torch.nn import functional as F

from models.fog import LM
from models.fog_config import SIZES
from models.fog_fp8 import to_fp8

transformers = pytest.importorskip("transformers")


def llama(**config):
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "head_dim": 128, "vocab_size": 64, "max_position_embeddings": 128}  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **config})).bfloat16()


def tokens(device, batch=2, length=48, seed=0):
    return torch.randint(64, (batch, length), generator=torch.Generator().manual_seed(seed)).to(device)


def losses(model, device, steps=6):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for step in range(steps):
        x = tokens(device, seed=step % 2)
        loss = model(x, labels=x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("mode", ["fp8_forward", "fp8"])
@pytest.mark.parametrize("by", ["name", "fuse"])
def test_a_llama_trains_as_with_attention_in_16_bits(device, by, mode):
    plain = fp8.convert(llama().to(device), tokens=None)
    model = copy.deepcopy(plain)
    names = set(model.state_dict())
    if by == "fuse":
        fp8.fuse(model, attention=mode)
    else:
        model.set_attn_implementation("torch_fp8")
        fp8.convert(model, tokens=None)  # gives the attentions their states
        for module in model.modules():
            if isinstance(module, fp8.ScaledDotProductAttention):
                module.mode = mode
    wanted, got = losses(plain, device), losses(model, device)
    attention = model.model.layers[1].self_attn.fp8_attention
    assert attention.last == (mode, "asked for")
    assert (attention.fp8_slots[[0, 1, 2, 4], 3] == 6).all()  # an amax of each step
    assert (attention.fp8_slots[5:, 3] == (6 if mode == "fp8" else 0)).all()
    assert got != wanted
    assert max(abs(a - b) for a, b in zip(got, wanted)) < 0.03
    assert set(model.state_dict()) == names
    assert mode in str(fp8.summary(model))


def test_summary_says_what_another_implementation_leaves_idle(device):
    model = fp8.fuse(llama().to(device), attention="fp8")
    model(tokens(device))
    assert {row.last for row in fp8.summary(model).attentions} == {"fp8"}
    model.set_attn_implementation("sdpa")
    model(tokens(device))
    for row in fp8.summary(model).attentions:
        assert row.last == "16bit" and 'not asked: attn_implementation is "sdpa"' in row.note


def test_unfuse_gives_the_attention_back(device):
    model = fp8.convert(llama().to(device), tokens=None)
    before, modules = model.config._attn_implementation, [type(m) for m in model.modules()]
    fp8.fuse(model, attention="fp8_forward")
    assert model.config._attn_implementation == "torch_fp8"
    fp8.unfuse(model)
    assert model.config._attn_implementation == before and [type(m) for m in model.modules()] == modules


def test_decoding_with_a_cache_runs_in_16_bits(device):
    model = fp8.fuse(fp8.convert(llama().to(device), tokens=None), attention="fp8_forward").eval()
    attention = model.model.layers[0].self_attn.fp8_attention
    prompt = tokens(device, batch=1)
    with torch.no_grad():
        model(prompt)
    assert attention.last[0] == "fp8_forward"
    plain = copy.deepcopy(model)
    fp8.unfuse(plain)
    made = [m.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0) for m in (model, plain)]
    assert made[0].shape == made[1].shape
    assert attention.last == ("16bit", "keys of a cache")


def test_a_padded_batch_runs_in_16_bits_and_says_so(device):
    model = fp8.fuse(fp8.convert(llama().to(device), tokens=None), attention="fp8_forward")
    twin = fp8.fuse(fp8.convert(llama().to(device), tokens=None))
    x = tokens(device)
    mask = torch.ones_like(x)
    mask[1, :7] = 0
    with torch.no_grad():
        assert torch.equal(model(x, attention_mask=mask).logits, twin(x, attention_mask=mask).logits)
    assert model.model.layers[0].self_attn.fp8_attention.last == ("16bit", "it has a mask")
    assert "it has a mask" in str(fp8.summary(model))


@pytest.mark.parametrize("mode", ["fp8_forward", "fp8"])
def test_a_compiled_llama(device, mode):
    model = fp8.fuse(fp8.convert(llama().to(device), tokens=None), attention=mode)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for step in range(3):
        x = tokens(device, seed=step)
        made = [m(x, labels=x).loss for m in (model, compiled)]
        for loss in made:
            loss.backward()
        assert torch.equal(*made)
        a, b = (m.model.layers[0].self_attn.fp8_attention for m in (model, twin))
        assert a.last == b.last == (mode, "asked for")
        assert torch.equal(a.fp8_slots[:5], b.fp8_slots[:5])
        torch.testing.assert_close(a.fp8_slots[5:], b.fp8_slots[5:], rtol=0.25, atol=0)  # AOT reassociates gradients
        for m in (model, twin):
            m.zero_grad()
            fp8.update_scales(m)


def test_training_resumes_bit_for_bit(device, tmp_path):
    def new():
        model = fp8.fuse(fp8.convert(llama().to(device), tokens=None), attention="fp8")
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(model, optimizer, seed):
        x = tokens(device, seed=seed)
        loss = model(x, labels=x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    model, optimizer = new()
    for seed in range(3):
        step(model, optimizer, seed)
    path = tmp_path / "state.pt"
    torch.save({"model": model.state_dict(), "fp8": fp8.state_dict(model), "optimizer": optimizer.state_dict()}, path)
    wanted = [step(model, optimizer, seed) for seed in range(3, 6)]
    resumed, optimizer = new()
    state = torch.load(path)
    resumed.load_state_dict(state["model"])
    fp8.load_state_dict(resumed, state["fp8"])
    optimizer.load_state_dict(state["optimizer"])
    assert [step(resumed, optimizer, seed) for seed in range(3, 6)] == wanted


def test_disabled_it_is_pytorchs(device):
    model = fp8.convert(llama().to(device), tokens=None).eval()
    model.set_attn_implementation("torch_fp8")
    fp8.convert(model, tokens=None)
    plain = llama().to(device).eval()
    x = tokens(device)
    with torch.no_grad(), fp8.disabled(model):
        assert torch.equal(model(x).logits, plain(x).logits)
    assert model.model.layers[0].self_attn.fp8_attention.last == ("16bit", "disabled")


def test_what_no_attention_of_ours_computes_is_refused(device):
    config = transformers.Gemma2Config(
        hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=128, vocab_size=64, attn_logit_softcapping=50.0,
    )  # fmt: skip
    model = transformers.Gemma2ForCausalLM(config).to(device, torch.bfloat16)
    fp8.convert(model, tokens=None)
    model.set_attn_implementation("torch_fp8")
    with pytest.raises(ValueError, match='asks its attention for softcap.*attn_implementation="eager"'):
        model(tokens(device))


def test_fuse_refuses_an_attention_that_cannot_be(device):
    model = fp8.convert(llama().to(device), tokens=None)
    with pytest.raises(ValueError, match="attention must be one of auto, 16bit, fp8_forward, fp8, got 'fast'"):
        fp8.fuse(model, attention="fast")
    mlp = torch.nn.Sequential(fp8.MLP(64, 128, device=device, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="has no attention that could run"):
        fp8.fuse(mlp, attention="fp8")
    assert not any("fp8_fusion" in module.__dict__ for module in model.modules())


def plain_attention(module, x, cos, sin):
    """What fp8.Attention computes, in float64."""
    q, k, v = (
        (x.double() @ layer.weight.double().T).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        for layer in (module.q_proj, module.k_proj, module.v_proj)
    )
    if module.qk_norm == "tanh":
        q, k = (torch.tanh(n.weight.double() * t) for n, t in ((module.q_norm, q), (module.k_norm, k)))
    elif module.qk_norm:
        q, k = (t * (t.square().mean(-1, keepdim=True) + 1e-5).rsqrt() for t in (q, k))
        if module.qk_norm == "rms":
            q, k = q * module.q_norm.weight.double(), k * module.k_norm.weight.double()
    if cos is not None:
        turned = lambda t: torch.cat([-t[..., 64:], t[..., :64]], -1)  # noqa: E731
        q, k = (t * cos.double() + turned(t) * sin.double() for t in (q, k))
    scale = module.scale or 1 / math.sqrt(module.head_dim)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return y.transpose(1, 2).flatten(2) @ module.o_proj.weight.double().T


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("qk_norm", [False, True, "rms_no_gain", "tanh"])
@pytest.mark.parametrize("mode", ["fp8_forward", "fp8"])
def test_attention_as_a_module(device, mode, qk_norm, rotated):
    module = fp8.Attention(
        256, 2, num_kv_heads=1, qk_norm=qk_norm, mode=mode, scale=0.125, device=device, dtype=torch.bfloat16
    )  # fmt: skip
    x = torch.randn(2, 40, 256).to(device, torch.bfloat16).requires_grad_()
    angles = torch.rand(40, 64).to(device) * 6
    cos, sin = (f(angles).repeat(1, 2).bfloat16() for f in (torch.cos, torch.sin)) if rotated else (None, None)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    dy = torch.randn(2, 40, 256).to(device, torch.bfloat16)
    for step in range(2):
        x.grad = None
        y = module(x, cos, sin)
        y.backward(dy)
        if step:  # whose it is, is known
            other.step()
            assert (module.sdpa.fp8_slots[[0, 1, 2, 4], 3] == step).all()
        optimizer.step()
        assert (module.sdpa.fp8_slots[[0, 1, 2, 4], 3] == step + 1).all()
        exact_x = x.detach().double().requires_grad_()
        wanted = plain_attention(module, exact_x, cos, sin)
        wanted.backward(dy.double())
        assert (y.double() - wanted).norm() < 0.12 * wanted.norm()
        assert (x.grad.double() - exact_x.grad).norm() < 0.25 * exact_x.grad.norm()


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_block_with_fp8_attention(device, norm_first):
    torch.manual_seed(0)
    made = {"num_kv_heads": 1, "norm_first": norm_first, "device": device, "dtype": torch.bfloat16}
    block = fp8.TransformerBlock(256, 2, 512, attention="fp8", **made)
    plain = fp8.TransformerBlock(256, 2, 512, **made)
    plain.load_state_dict(block.state_dict())
    assert plain.sdpa is None and block.sdpa.last is None
    x = torch.randn(2, 40, 256).to(device, torch.bfloat16)
    y, wanted = block(x), plain(x)
    assert block.sdpa.last == ("fp8", "asked for")
    assert not torch.equal(y, wanted) and (y - wanted).norm() < 0.08 * wanted.norm()


def attentions_of(model):
    return [module for module in model.modules() if isinstance(module, fp8.ScaledDotProductAttention)]


def a_fused_llama(recipe):
    return fp8.fuse(fp8.convert(llama(), recipe, tokens=None), attention="fp8")


def a_llama_of_the_table(recipe):
    return fp8.convert(llama(attn_implementation="torch_fp8"), recipe, tokens=None)


def a_block(recipe):
    return fp8.TransformerBlock(256, 2, 512, attention="fp8", recipe=recipe)


def a_block_in_a_file(recipe):
    return pickle.loads(pickle.dumps(a_block(recipe)))


def a_model_of_ours(recipe):
    return to_fp8(LM("llama3", SIZES["tiny"], vocab=64), recipe, attention="fp8")


@pytest.mark.parametrize(
    "made", [a_fused_llama, a_llama_of_the_table, a_block, a_block_in_a_file, a_model_of_ours], ids=lambda f: f.__name__
)
def test_attention_follows_its_layers_through_another_convert(device, made):
    new = fp8.DelayedScaling(amax_history_len=16, fp8_format="E4M3")
    model = made(fp8.CurrentScaling()).to(device)
    assert {attention.recipe for attention in attentions_of(model)} == {fp8.CurrentScaling()}
    shared = [attention.fp8_state.shared_scale for attention in attentions_of(model)]
    for attention in attentions_of(model):
        attention.fp8_slots[:, 3] = 7.0
    fp8.convert(model, new, tokens=None, auto_update=False)
    for attention in attentions_of(model):
        assert attention.recipe == new and not attention.auto_update
        assert attention.fp8_history.shape[1] == 16 and attention.fp8_slots.device.type == torch.device(device).type
        assert (attention.fp8_slots[:, 3] == 0).all()  # what CurrentScaling saw says nothing of a history
        attention.fp8_slots[:, 3] = 7.0
    assert [attention.fp8_state.shared_scale for attention in attentions_of(model)] == shared
    fp8.convert(model, new, tokens=None)
    for attention in attentions_of(model):
        assert attention.auto_update and (attention.fp8_slots[:, 3] == 7).all()  # the same recipe forgets nothing


def test_attention_whose_projections_are_in_16_bits_follows_the_rest_of_the_model(device):
    model = fp8.convert(llama().to(device), fp8.ConstantScaling(), ["*.mlp.*"], auto_update=False)
    fp8.fuse(model, attention="fp8")
    assert [(a.recipe, a.auto_update) for a in attentions_of(model)] == [(fp8.ConstantScaling(), False)] * 2
    fp8.convert(model, fp8.CurrentScaling(), ["*.layers.1.self_attn.*"])
    assert [(a.recipe, a.auto_update) for a in attentions_of(model)] == [
        (fp8.ConstantScaling(), False),
        (fp8.CurrentScaling(), True),
    ]


def test_attention_is_updated_with_its_layers_alone(device):
    model = fp8.fuse(fp8.convert(llama().to(device), tokens=None, auto_update=False), attention="fp8")
    losses(model, device, steps=3)
    first = attentions_of(model)[0]
    assert (first.fp8_slots[[0, 1, 2, 4], 3] == 0).all()
    fp8.update_scales(model)
    assert (first.fp8_slots[[0, 1, 2, 4], 3] == 1).all()


def test_attention_with_a_recipe_of_its_own_keeps_it(device):
    own = fp8.ConstantScaling()
    model = to_fp8(LM("llama3", SIZES["tiny"], vocab=64), attention="fp8", attention_recipe=own).to(device)
    states = [attention.fp8_state for attention in attentions_of(model)]
    fp8.convert(model, fp8.CurrentScaling(), tokens=None, auto_update=False)
    fp8.fuse(model, attention="fp8")
    assert states and [attention.fp8_state for attention in attentions_of(model)] == states
    assert all(attention.recipe == own and attention.auto_update for attention in attentions_of(model))


def test_what_an_attention_cannot_be():
    with pytest.raises(ValueError, match="num_kv_heads must divide num_heads, got 2 and 3"):
        fp8.Attention(384, 3, num_kv_heads=2)
    with pytest.raises(ValueError, match="qk_norm must be one of"):
        fp8.Attention(256, 2, qk_norm="layer")
    with pytest.raises(ValueError, match="mode"):
        fp8.Attention(256, 2, mode="fp16")
