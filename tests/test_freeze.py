"""freeze, calibrate and FrozenLinear: what is in the layers, what they compute, and that they stay what they are."""

import copy
import io
import pickle

import pytest
import torch
import torch_fp8 as fp8
from frozen_pairs import freeze
from torch import nn
from torch_fp8.layers.frozen import ACTIVATIONS, WEIGHTS
from torch_fp8.observe.emulate import emulated_linear

transformers = pytest.importorskip("transformers")
N, K = 144, 272  # ragged in blocks of 128


def bits(x):
    return x.contiguous().view(torch.uint8)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def sqnr(exact, x):
    return 20 * torch.log10(exact.norm() / (x.float() - exact.float()).norm()).item()


def linear(bias=True, dtype=torch.bfloat16, device="cpu"):
    return nn.Linear(K, N, bias, device=device, dtype=dtype)


def frozen(activations="token", weight="channel", **kwargs):
    layer = linear(**kwargs)
    if activations == "static":
        fp8.calibrate(layer, [torch.randn(8, K, dtype=layer.weight.dtype, device=layer.weight.device)])
    return freeze(layer, activations, weight)


def llama(**options):
    sizes = {"hidden_size": 64, "intermediate_size": 112, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=99, num_hidden_layers=2, **sizes, **options)
    return transformers.LlamaForCausalLM(config).bfloat16().eval()


def gpt2():
    config = transformers.GPT2Config(vocab_size=99, n_positions=64, n_embd=64, n_layer=2, n_head=4)
    return transformers.GPT2LMHeadModel(config).bfloat16().eval()


IDS = torch.arange(24).view(2, 12)


class TestWeights:
    @pytest.mark.parametrize("weight", WEIGHTS)
    def test_codes_and_scales_by_definition(self, weight):
        w = (layer := linear()).weight.detach().float()
        fp8.freeze(layer, weight=weight)
        for i in range(0, N, 128 if weight == "block" else 1 if weight == "channel" else N):
            for j in range(0, K, 128 if weight == "block" else K):
                rows = slice(i, i + {"block": 128, "channel": 1, "tensor": N}[weight])
                part = w[rows, j : j + (128 if weight == "block" else K)]
                at = {"block": (i // 128, j // 128), "channel": (i, 0), "tensor": (0,)}[weight]
                scale = layer.weight_scale[at]
                exact = part.abs().max() / 448
                assert exact <= scale <= exact * (2 if weight == "tensor" else 1 + 2**-7)
                assert scale.bfloat16().float() == scale
                expected = (part * (1 / scale)).clamp(-448, 448).to(torch.float8_e4m3fn)
                assert same(layer.weight[rows, j : j + part.shape[1]], expected)
        if weight == "tensor":
            assert torch.frexp(layer.weight_scale).mantissa == 0.5

    @pytest.mark.parametrize("weight", WEIGHTS)
    def test_zeros_have_scale_1(self, weight):
        layer = linear()
        with torch.no_grad():
            layer.weight.zero_()
        fp8.freeze(layer, weight=weight)
        assert bool((layer.weight_scale == 1).all())
        assert not bits(layer.weight).any()

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_nan_and_inf_are_refused_and_nothing_is_changed(self, value):
        model = nn.Sequential(linear(), nn.Linear(N, 16, dtype=torch.bfloat16))
        with torch.no_grad():
            model[1].weight[3, 5] = value
        with pytest.raises(ValueError, match="weight of 1 has Inf or NaN"):
            fp8.freeze(model)
        assert type(model[0]) is nn.Linear

    def test_16_bit_weights_are_gone(self):
        model = llama()
        before = {id(p) for p in model.parameters()}
        layers = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
        weights = sum(m.weight.numel() for m in layers)
        total = sum(p.nbytes for p in model.parameters())
        fp8.freeze(model, weight="tensor")
        left = sum(t.nbytes for t in model.parameters()) + sum(m.weight.nbytes for m in layers)
        assert left == total - weights  # one byte of two
        assert {id(p) for p in model.parameters()} < before
        assert not any(p.requires_grad for p in model.parameters())


class TestForward:
    @pytest.mark.parametrize("rows", [16, 17])
    @pytest.mark.parametrize("activations", ACTIVATIONS)
    @pytest.mark.parametrize("weight", WEIGHTS)
    def test_emulated_twin(self, activations, weight, rows, device):
        layer = frozen(activations, weight, device=device)
        x = torch.randn(rows, K, device=device).bfloat16()
        x[2] = 0
        state = layer.weight, layer.weight_scale, layer.bias, layer.input_slot, ACTIVATIONS.index(activations)
        y, twin = layer(x), emulated_linear(x, *state)
        assert y.dtype == twin.dtype == torch.bfloat16 and y.shape == twin.shape == (rows, N)
        # One rounding to bfloat16, and where terms cancel the accumulation's error beside it; on a GPU that of weights
        # rounded to bfloat16 too, where there is no kernel for the case: 4 sigma of sqrt(272) 2^-9 times the terms.
        torch.testing.assert_close(y, twin, rtol=2**-7, atol=5e-3 if device.type == "cuda" else 1e-5)
        exact = emulated_linear(x.float(), *state[:4], 0)
        quantised = rows > 16 and weight != "block" and activations != "none"
        assert (sqnr(exact, twin) < 35) == quantised  # 31.5 dB is what E4M3 has, 50 what bfloat16 has

    @pytest.mark.parametrize(("rows", "outputs", "quantised"), [(16, N, False), (17, N, True), (9, 8208, True)])
    def test_emulated_twin_of_blocks(self, rows, outputs, quantised, device):
        """Before blocks x is scaled by groups of 128 columns: here of very different sizes, which the weight evens."""
        layer, x = nn.Linear(256, outputs, device=device), torch.randn(rows, 256, device=device).bfloat16()
        layer.weight.data[:, 128:] *= 2.0**12
        x[:, 128:] *= 2.0**-12
        fp8.freeze(layer.bfloat16(), weight="block")
        state = layer.weight, layer.weight_scale, layer.bias, None
        y, twin = layer(x), emulated_linear(x, *state, ACTIVATIONS.index("token"))
        torch.testing.assert_close(y, twin, rtol=2**-7, atol=5e-3 if device.type == "cuda" else 1e-5)
        assert (sqnr(emulated_linear(x.float(), *state, 0), y) < 45) == quantised

    def test_dtypes_and_autocast(self, device):
        for dtype in (torch.float32, torch.float16):
            assert frozen(dtype=dtype, device=device)(torch.randn(2, K, device=device, dtype=dtype)).dtype == dtype
        layer, x = frozen(dtype=torch.float32, device=device), torch.randn(2, K, device=device)
        with torch.autocast(device.type, torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), layer(x), rtol=2**-7, atol=2**-8)

    def test_wrong_shape(self):
        with pytest.raises(RuntimeError, match=r"in_features = 272, got an input of shape \[2, 271\]"):
            frozen()(torch.randn(2, K - 1).bfloat16())

    @pytest.mark.parametrize("activations", ACTIVATIONS)
    def test_compiles_to_one_graph(self, activations):
        layer, x = frozen(activations), torch.randn(2, K).bfloat16()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            assert same(compiled(x), layer(x))

    def test_nothing_in_nothing_out(self):
        for activations in ACTIVATIONS:
            assert frozen(activations)(torch.randn(0, K).bfloat16()).shape == (0, N)


class TestState:
    @pytest.mark.parametrize("cast", ["bfloat16", "half", "float", "double"])
    @pytest.mark.parametrize("weight", WEIGHTS)
    def test_casts_leave_codes_and_scales(self, cast, weight):
        layer = frozen("static", weight)
        before = copy.deepcopy(layer.state_dict())
        getattr(layer, cast)()
        for name in ("weight", "weight_scale", "input_slot"):
            assert same(layer.state_dict()[name], before[name])
        assert layer.bias.dtype == {"half": torch.float16}.get(cast, getattr(torch, cast, None))
        layer.type(torch.float16)
        assert same(layer.weight, before["weight"])

    def test_copies(self):
        layer, x = frozen("static", "block"), torch.randn(2, K).bfloat16()
        saved = io.BytesIO()
        torch.save(layer.state_dict(), saved)
        loaded = fp8.FrozenLinear(K, N, dtype=torch.bfloat16, activations="static", weight="block")
        loaded.load_state_dict(torch.load(io.BytesIO(saved.getvalue())))
        on_meta = fp8.FrozenLinear(K, N, device="meta", dtype=torch.bfloat16, activations="static", weight="block")
        on_meta.to_empty(device="cpu").load_state_dict(layer.state_dict())
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded, on_meta):
            assert same(other(x), layer(x))
            assert other.weight.data_ptr() != layer.weight.data_ptr()
            assert other.state_dict().keys() == layer.state_dict().keys()

    @pytest.mark.parametrize("weight", WEIGHTS)
    @pytest.mark.parametrize(("n", "k"), [(144, 272), (128, 128), (48, 32), (1, 64)])
    def test_granularity_is_what_was_asked_for(self, weight, n, k):
        """Also where a block, or a channel, is all of the weight."""
        layer = fp8.freeze(nn.Linear(k, n).bfloat16(), weight=weight)
        new = fp8.FrozenLinear(k, n, dtype=torch.bfloat16, weight=weight)
        new.load_state_dict(layer.state_dict())
        for other in (layer, new, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert other.granularity == weight and f"weight={weight}" in repr(other)
        assert list(layer.state_dict()) == ["weight", "weight_scale", "bias"]

    @pytest.mark.parametrize("weight", WEIGHTS)
    @pytest.mark.parametrize(("n", "k"), [(144, 272), (48, 32)])
    def test_pickles_of_older_versions(self, weight, n, k):
        """They had no word for it; the scale's shape tells."""
        layer = fp8.freeze(nn.Linear(k, n).bfloat16(), weight=weight)
        state = layer.__getstate__()
        del state["granularity"]
        old = fp8.FrozenLinear.__new__(fp8.FrozenLinear)
        old.__setstate__(state)
        assert old.granularity == weight

    @pytest.mark.parametrize("weight", WEIGHTS)
    def test_a_model_of_single_blocks_is_saved_as_what_it_is(self, weight, tmp_path):
        sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
        config = transformers.LlamaConfig(vocab_size=99, num_hidden_layers=1, **sizes)
        model = fp8.freeze(transformers.LlamaForCausalLM(config).bfloat16().eval(), weight=weight)
        format = "block" if weight == "block" else "compressed-tensors"
        fp8.save_pretrained(model, tmp_path / "out", format)
        loaded = fp8.load_pretrained(tmp_path / "out")
        layers = [m for m in loaded.modules() if isinstance(m, fp8.FrozenLinear)]
        assert {layer.granularity for layer in layers} == {weight} and len(layers) == 7
        for name, tensor in model.state_dict().items():
            assert same(loaded.state_dict()[name], tensor)

    def test_state_that_does_not_fit(self):
        layer = frozen()
        before = layer.weight.clone()
        with pytest.raises(RuntimeError, match="weight must be torch.float8_e4m3fn, got torch.bfloat16"):
            layer.load_state_dict({**layer.state_dict(), "weight": torch.zeros(N, K).bfloat16()})
        with pytest.raises(RuntimeError, match="size mismatch for weight_scale"):
            layer.load_state_dict({**layer.state_dict(), "weight_scale": torch.ones(N + 1, 1)})
        assert same(layer.weight, before)


class TestFreeze:
    @pytest.mark.parametrize("other", ["channel", "tensor", "block"])
    @pytest.mark.parametrize("assign", [False, True])
    def test_a_state_of_another_granularity_changes_nothing(self, other, assign):
        model = fp8.freeze(nn.Linear(256, 256), weight="channel")
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        state = fp8.freeze(nn.Linear(256, 256), weight=other).state_dict()
        if other == "channel":
            model.load_state_dict(state, assign=assign)
            return
        with pytest.raises(RuntimeError, match=r"size mismatch for weight_scale: expected \[256, 1\], got .*; freeze"):
            model.load_state_dict(state, strict=False, assign=assign)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8))

    def test_which_layers(self):
        model = llama(attention_bias=True)
        head, names = model.lm_head, {n for n, m in model.named_modules() if type(m) is nn.Linear}
        fp8.freeze(model)
        assert {n for n, m in model.named_modules() if isinstance(m, fp8.FrozenLinear)} == names - {"lm_head"}
        assert model.lm_head is head and type(head) is nn.Linear
        model = fp8.freeze(llama(), filter=["model.layers.*.mlp.*"])
        assert sum(isinstance(m, fp8.FrozenLinear) for m in model.modules()) == 6
        model = fp8.freeze(llama(), filter=lambda module, name: name == "lm_head")
        assert isinstance(model.lm_head, fp8.FrozenLinear)
        with pytest.raises(ValueError, match="no layer of .* would be frozen"):
            fp8.freeze(model, filter=lambda module, name: False)
        with pytest.raises(ValueError, match="matches none"):
            fp8.freeze(llama(), filter=["encoder.*"])

    def test_tied_head_stays(self):
        model = fp8.freeze(llama(tie_word_embeddings=True))
        assert type(model.lm_head) is nn.Linear
        assert model.lm_head.weight is model.model.embed_tokens.weight

    def test_layers_that_share_a_weight_still_do(self):
        model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
        model[1].weight = model[0].weight
        fp8.freeze(model)
        assert model[0].weight is model[1].weight

    def test_bad_words(self):
        with pytest.raises(ValueError, match="activations must be one of none, static, tensor, token, got 'dynamic'"):
            fp8.freeze(linear(), "dynamic")
        with pytest.raises(ValueError, match="weight must be one of channel, tensor, block, got 'row'"):
            fp8.freeze(linear(), weight="row")
        with pytest.raises(ValueError, match="meta device"):
            fp8.freeze(linear(device="meta"))

    @pytest.mark.parametrize("activations", ["static", "tensor"])
    def test_activations_that_blocks_do_not_take(self, activations):
        """They would be left in 16 bits without a word; and a calibration asked for that nothing uses."""
        layer = nn.Linear(256, 128)
        before = dict(layer.__dict__)
        with pytest.raises(ValueError, match=f'activations="{activations}", .* take activations="token" or "none", or'):
            fp8.freeze(layer, activations, "block")
        assert type(layer) is nn.Linear and layer.__dict__ == before

    @pytest.mark.parametrize("make", [llama, gpt2])
    @pytest.mark.parametrize("activations", ["none", "token", "static"])
    def test_whole_models(self, make, activations):
        model = make()
        with torch.no_grad():
            expected = model(IDS).logits.float()
            if activations == "static":
                fp8.calibrate(model, [IDS, {"input_ids": IDS}, (IDS,)])
            fp8.freeze(model, activations)
            assert any(isinstance(m, fp8.FrozenLinear) for m in model.modules())
            logits = model(IDS).logits.float()
        error = (logits - expected).norm() / expected.norm()
        assert 0 < error < 0.1  # 3 % a layer and operand
        assert model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 15)

    def test_conv1d_is_the_linear_layer_it_stands_for(self):
        model = gpt2()
        conv = model.transformer.h[0].attn.c_attn
        twin = nn.Linear(64, 192, dtype=torch.bfloat16)
        with torch.no_grad():
            twin.weight.copy_(conv.weight.T)
            twin.bias.copy_(conv.bias)
        fp8.freeze(twin)
        fp8.freeze(model)
        assert same(conv.weight, twin.weight) and conv.weight.is_contiguous()
        x = torch.randn(3, 64).bfloat16()
        assert same(conv(x), twin(x))


class TestStatic:
    @pytest.mark.parametrize("weight", ["channel", "tensor"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_whatever_the_defaults_are(self, weight, dtype):
        layer, x = linear(), torch.randn(8, K).bfloat16()
        twin = copy.deepcopy(layer)
        fp8.freeze(fp8.calibrate(layer, [x]), "static", weight)
        torch.set_default_dtype(dtype)
        try:
            with torch.device("meta"):
                fp8.freeze(fp8.calibrate(twin, [x]), "static", weight)
        finally:
            torch.set_default_dtype(torch.float32)
        for name, tensor in layer.state_dict().items():
            assert same(twin.state_dict()[name], tensor)

    def scale(self, amax):
        return 2.0 ** torch.tensor(2 * amax / 448).log2().ceil()

    def test_scale_has_headroom_and_is_a_power_of_two(self):
        layer = linear()
        fp8.calibrate(layer, [torch.full((2, K), 3.0).bfloat16(), torch.full((2, K), -5.0).bfloat16(),
                              torch.ones(1, K).bfloat16()])  # fmt: skip
        fp8.freeze(layer, "static", "tensor")
        assert layer.input_slot.tolist() == [[self.scale(5.0), 1 / self.scale(5.0), 0, 0]]

    def test_from_the_history_of_training(self):
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, bias=False))
        fp8.convert(model, tokens=None)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for factor in (7.0, 1.0):
            model(torch.ones(16, 64) * factor).sum().backward()
            optimizer.step()
        fp8.freeze(model, "static")
        assert model[0].input_slot[0, 0] == self.scale(7.0)
        assert not any("fp8_" in name for name, _ in model.named_buffers())

    def test_nothing_to_take_it_from(self):
        with pytest.raises(ValueError, match="no input of .* was seen.*calibrate"):
            fp8.freeze(linear(), "static")
        with pytest.raises(ValueError, match="no input of .* was seen.*calibrate"):
            fp8.freeze(fp8.convert(linear(), tokens=None), "static")

    def test_calibration_leaves_nothing_behind(self):
        model = llama().train()
        model.model.norm.eval()
        before = {name: module.training for name, module in model.named_modules()}
        keys = list(model.state_dict())
        assert fp8.calibrate(model, [IDS]) is model
        assert before == {name: module.training for name, module in model.named_modules()}
        assert list(model.state_dict()) == keys
        assert not any(m._forward_pre_hooks for m in model.modules())
        with pytest.raises(IndexError):
            fp8.calibrate(model, [torch.full((1, 2), 1000)])
        assert model.training and not any(m._forward_pre_hooks for m in model.modules())

    def test_calibration_errors(self):
        with pytest.raises(ValueError, match="got no batch"):
            fp8.calibrate(linear(), [])
        with pytest.raises(ValueError, match="has Inf or NaN"):
            fp8.calibrate(linear(), [torch.full((1, K), float("nan")).bfloat16()])
        with pytest.raises(ValueError, match="no linear layer"):
            fp8.calibrate(nn.ReLU(), [torch.ones(1)])
        with pytest.raises(TypeError, match="a batch must be"):
            fp8.calibrate(linear(), ["text"])


def test_a_frozen_layer_is_a_linear_layer_that_nothing_converts(tmp_path):
    model = nn.Sequential(fp8.freeze(nn.Linear(32, 48)), nn.Linear(48, 32))
    assert isinstance(model[0], nn.Linear) and not list(model[0].parameters())
    fp8.convert(model, tokens=None)
    assert type(model[0]) is fp8.FrozenLinear and "_not_fp8" not in model[0].__dict__ and type(model[1]) is fp8.Linear
    fp8.save_pretrained(fp8.freeze(llama()), tmp_path / "out")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.quantization_config["ignore"] == ["lm_head"]


def test_summary_lists_frozen_layers():
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 32))
    fp8.freeze(model, filter=["0"])
    frozen, plain = fp8.summary(model)
    assert (frozen.name, frozen.shape, frozen.fp8) == ("0", "48 x 32", True)
    assert frozen.note == "frozen: activations by token, weight by channel"
    assert not plain.fp8 and "1 of 2 linear layers in FP8" in str(fp8.summary(model))


@pytest.mark.parametrize(
    ("activations", "weight", "k", "words"),
    [
        ("none", "channel", 128, "in 16 bits"),
        ("token", "block", 128, "by token"),
        ("token", "block", 192, "in 16 bits (not by token: in_features is no multiple of 128)"),
        ("token", "channel", 192, "by token"),
        ("static", "tensor", 192, "by static"),
        ("static", "block", 128, "in 16 bits (not by static: a weight by block computes so)"),
    ],
)
def test_summary_says_what_is_computed(activations, weight, k, words, device):
    """Which need not be what was asked for."""
    layer, x = nn.Linear(k, 256, device=device).bfloat16(), torch.randn(40, k, device=device).bfloat16()
    freeze(fp8.calibrate(layer, [x]), activations, weight)
    assert fp8.summary(layer)[0].note == f"frozen: activations {words}, weight by {weight}"
    as_asked, layer.activations = layer(x), "none"
    in_16_bits = layer(x)
    layer.activations = activations
    assert layer.quantises_input == (not torch.equal(as_asked, in_16_bits)) == words.startswith("by")
