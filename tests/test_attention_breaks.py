"""FP8 attention where models, modes and traces come at it in unusual ways: what is not computed is refused in words,
and nothing of one call is left in the next."""

import pytest
import torch
import torch_fp8 as fp8
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch_fp8.layers import attention as layer


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
