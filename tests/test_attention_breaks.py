"""FP8 attention where models, modes and traces come at it in unusual ways: what is not computed is refused in words,
and nothing of one call is left in the next."""

import copy

import pytest
import torch
import torch_fp8 as fp8
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch_fp8.layers import attention as layer

transformers = pytest.importorskip("transformers")


def build(kind, config, device, **more):
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "head_dim": 128, "vocab_size": 64, "max_position_embeddings": 128,
             "pad_token_id": 0}  # fmt: skip
    made = getattr(transformers, config)(**{**sizes, **more})
    return getattr(transformers, kind)(made).to(device, torch.bfloat16).eval()


def llama(device):
    return build("LlamaForCausalLM", "LlamaConfig", device)


def tokens(device, length=48):
    return torch.randint(1, 64, (2, length), generator=torch.Generator().manual_seed(0)).to(device)


def heads(device, count=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, 24, 128, generator=generator).to(device, torch.bfloat16) for _ in range(count)]


@pytest.mark.parametrize("mode", ["auto", "fp8_forward", "fp8"])
@pytest.mark.parametrize("is_module", [True, False])
def test_every_mode_is_compiled_into_one_graph(device, mode, is_module, monkeypatch):
    monkeypatch.setattr(layer, "_STATELESS", {})  # a trace may be the first to ask
    attend = fp8.ScaledDotProductAttention(mode=mode) if is_module else fp8.scaled_dot_product_attention
    options = {"is_causal": True} if is_module else {"is_causal": True, "mode": mode}
    compiled = torch.compile(lambda *t: attend(*t, **options), fullgraph=True, backend="aot_eager")
    made = compiled(*heads(device))
    assert torch.equal(made, attend(*heads(device), **options))


def test_the_first_call_leaves_no_mode_in_later_ones(device, monkeypatch):
    monkeypatch.setattr(layer, "_STATELESS", {})
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = [torch.empty(1, 2, 24, 128, device=device, dtype=torch.bfloat16) for _ in range(3)]
        fp8.scaled_dot_product_attention(*fake, mode="fp8")
    q, k, v = heads(device)
    y = fp8.scaled_dot_product_attention(q, k, v, mode="fp8")
    wanted = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert (y.double() - wanted).norm() < 0.065 * wanted.norm()


@pytest.mark.parametrize("mode", ["auto", "fp8_forward", "fp8"])
def test_shapes_alone(mode):
    q, k, v = (torch.empty(1, 2, 24, 128, device="meta", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    for attend in (
        fp8.ScaledDotProductAttention(mode=mode),
        lambda *t: fp8.scaled_dot_product_attention(*t, mode=mode),
    ):
        y = attend(q, k, v)
        y.sum().backward()
        assert y.shape == q.shape and q.grad.shape == q.shape


@pytest.mark.parametrize("mode", ["fp8_forward", "fp8"])
def test_transforms_are_refused_in_words_and_auto_runs_them_in_16_bits(device, mode):
    q, k, v = heads(device)
    transforms = {
        "vmap": lambda f: torch.func.vmap(f)(*(t[None] for t in (q, k, v))),
        "grad": lambda f: torch.func.grad(lambda t: f(t, k, v).sum())(q),
        "jvp": lambda f: torch.func.jvp(lambda t: f(t, k, v), (q,), (q,))[0],
    }
    for name, transform in transforms.items():
        with pytest.raises(ValueError, match="transform of torch.func.*what can is 16bit"):
            transform(fp8.ScaledDotProductAttention(mode=mode))
        if name != "jvp":
            made, wanted = transform(fp8.ScaledDotProductAttention()), transform(F.scaled_dot_product_attention)
            assert torch.equal(made, wanted)


def test_nested_tensors_run_in_16_bits(device):
    def nested():
        parts = [torch.ones(2, 8, 128, device=device), torch.ones(2, 6, 128, device=device)]
        return torch.nested.nested_tensor(parts, dtype=torch.bfloat16, requires_grad=True)

    attend = fp8.ScaledDotProductAttention()
    made = attend(nested(), nested(), nested())
    assert made.is_nested and attend.last[0] == "16bit"
    with pytest.raises(ValueError, match="not all dense .*what can is 16bit"):
        fp8.scaled_dot_product_attention(nested(), nested(), nested(), mode="fp8")


def test_heads_of_no_width_are_refused(device):
    q = torch.ones(1, 2, 8, 0, device=device, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="head_dim 0, and FP8 takes multiples of 16.*what can is 16bit"):
        fp8.scaled_dot_product_attention(q, q, q, mode="fp8_forward")


def test_a_prompt_of_one_token(device):
    model = fp8.fuse(fp8.convert(llama(device), tokens=None), attention="fp8_forward").eval()
    prompt = tokens(device)[:1, :1]
    with torch.no_grad():
        model(prompt)
        assert model.model.layers[0].self_attn.fp8_attention.last == ("16bit", "there is one query")
        assert model.generate(prompt, max_new_tokens=4, min_new_tokens=4).shape == (1, 5)


MLA = {"num_key_value_heads": 2, "q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64,
       "v_head_dim": 128, "head_dim": 64, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
       "topk_group": 1, "moe_intermediate_size": 64, "first_k_dense_replace": 2, "index_topk": 8, "index_n_heads": 2,
       "index_head_dim": 64}  # fmt: skip
REFUSED = {
    "softcap": ("Gemma2ForCausalLM", "Gemma2Config", {}),
    "s_aux": ("GptOssForCausalLM", "GptOssConfig", {"num_local_experts": 2, "num_experts_per_tok": 1}),
    "indices": ("DeepseekV32ForCausalLM", "DeepseekV32Config", MLA),
}


@pytest.mark.parametrize("asked", REFUSED)
def test_what_is_not_computed_is_refused(device, asked):
    kind, config, more = REFUSED[asked]
    model = build(kind, config, device, **more)
    named = copy.deepcopy(model)
    named.set_attn_implementation("torch_fp8")
    with pytest.raises(ValueError, match=f'asks its attention for {asked}.*attn_implementation="eager"'):
        named(tokens(device))
    before = model.config._attn_implementation
    fp8.convert(model, tokens=None)
    with pytest.raises(ValueError, match=f"asks its attention for {asked}.*call fuse without attention"):
        fp8.fuse(model, attention="auto")
    assert model.config._attn_implementation == before
    assert not any("fp8_fusion" in module.__dict__ for module in model.modules())


OF_NO_SDPA = {
    "SplinterModel": {"hidden_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 512},
    "NllbMoeModel": {"d_model": 256, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
                     "decoder_attention_heads": 2, "encoder_ffn_dim": 512, "decoder_ffn_dim": 512, "num_experts": 2,
                     "pad_token_id": 0},
}  # fmt: skip


@pytest.mark.parametrize("kind", OF_NO_SDPA)
def test_models_that_count_on_a_mask_are_refused(device, kind):
    config = getattr(transformers, kind.replace("Model", "Config"))(vocab_size=64, **OF_NO_SDPA[kind])
    model = getattr(transformers, kind)(config).to(device, torch.bfloat16).eval()
    inputs = {"input_ids": tokens(device)}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens(device)
    fp8.convert(model, tokens=None)
    with pytest.raises(ValueError, match="does not support .*sdpa.*call fuse without|has no attention that could run"):
        fp8.fuse(model, attention="auto")
    model.set_attn_implementation("torch_fp8")
    fp8.convert(model, tokens=None)
    with pytest.raises(ValueError, match='does not support .*sdpa.*attn_implementation="eager"'):
        model(**inputs)


@pytest.mark.parametrize("cache", ["none", "dynamic", "static"])
@pytest.mark.parametrize("keep", [0, 1, 3])
def test_layers_that_share_keys_may_leave_queries_out(device, keep, cache):
    model = build(
        "Gemma4ForCausalLM", "Gemma4TextConfig", device, num_hidden_layers=4, sliding_window=128, global_head_dim=128,
        hidden_size_per_layer_input=32, vocab_size_per_layer_input=64, num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    made = []
    for implementation in ("torch_fp8", "sdpa"):
        model.set_attn_implementation(implementation)
        options = {"use_cache": cache != "none"}
        if cache == "static":
            options["cache"] = transformers.StaticCache(config=model.config, max_cache_len=96)
        with torch.no_grad():
            made.append(model(tokens(device), logits_to_keep=keep, **options).logits)
    assert (made[0] - made[1]).norm() < 0.02 * made[1].norm()


def test_unfuse_gives_modes_and_states_back(device):
    model = llama(device)
    model.set_attn_implementation("torch_fp8")
    fp8.convert(model, tokens=None)
    own = torch.nn.Sequential(fp8.TransformerBlock(256, 2, 512, attention="fp8_forward", device=device))
    attention = model.model.layers[0].self_attn.fp8_attention
    fp8.fuse(model, attention="fp8"), fp8.fuse(model, attention="16bit"), fp8.fuse(own, attention="fp8")
    assert attention.mode == "16bit" and own[0].sdpa.mode == "fp8"
    fp8.unfuse(model), fp8.unfuse(own)
    assert model.config._attn_implementation == "torch_fp8"
    assert model.model.layers[0].self_attn.fp8_attention is attention
    assert attention.mode == "auto" and own[0].sdpa.mode == "fp8_forward"
