"""Frozen experts: what they compute beside the 16-bit experts and beside the same codes, whatever the routing, and what
is refused."""

import copy
import io
import pickle

import pytest
import torch
import torch_fp8 as fp8
from frozen_pairs import freeze
from torch import nn
from torch_fp8.layers.experts import FrozenExperts, layout_of
from torch_fp8.layers.frozen import ACTIVATIONS, WEIGHTS

transformers = pytest.importorskip("transformers")
from mixtures import CLASSES, EXPERTS, HIDDEN, INNER, experts, inputs, routing  # noqa: E402

ops = torch.ops.torch_fp8


def frozen(module, activations="token", weight="channel"):
    return fp8.freeze(nn.ModuleDict({"experts": module}), activations, weight)["experts"]


def dequantised(module, projection):
    """The float32 values of a stack, in its order: by hand, expert by expert and part by part."""
    codes, scale, parts = (
        getattr(module, projection),
        getattr(module, f"{projection}_scale"),
        module.layout.parts(projection),
    )
    count, n, k = codes.shape
    values, part = codes.float(), n // parts
    for e in range(count):
        for i in range(parts):
            rows = values[e, i * part : (i + 1) * part]
            if module.granularity == "tensor":
                rows *= scale[e, i]
            elif module.granularity == "channel":
                rows *= scale[e, i * part : (i + 1) * part]
            else:
                grid = -(-part // 128)
                for r in range(part):
                    for c in range(k):
                        rows[r, c] *= scale[e, i * grid + r // 128, c // 128]
    return values


def twin(original, module):
    """The 16-bit experts with the values of the FP8 ones."""
    made, layout = copy.deepcopy(original), layout_of(original)
    for name in module.projections():
        values = dequantised(module, name)
        if layout.is_interleaved and name == "gate_up_proj":
            gates, ups = values.chunk(2, dim=1)
            values = torch.stack((gates, ups), 2).flatten(1, 2)
        getattr(made, name).data = values.transpose(1, 2) if layout.is_transposed else values
    return made


def error(exact, x):
    return ((x.float() - exact.float()).norm() / exact.float().norm()).item()


class TestForward:
    @pytest.mark.parametrize("weight", WEIGHTS)
    @pytest.mark.parametrize("model_type", CLASSES)
    def test_every_layout(self, model_type, weight, device):
        original = experts(model_type, device=device)
        module = frozen(copy.deepcopy(original), "none", weight)
        args = inputs(model_type, 24, device=device)
        with torch.no_grad():
            y, exact, same_codes = module(*args), original(*args), twin(original, module)(*args)
        assert isinstance(module, FrozenExperts) and y.shape == exact.shape and y.dtype == exact.dtype
        assert 0.01 < error(exact, y) < 0.08  # two products of weights that are off by 2.6 % each, and a gate
        assert error(same_codes, y) < (2e-6 if device.type == "cpu" else 1e-3)

    @pytest.mark.parametrize("activations", ACTIVATIONS)
    @pytest.mark.parametrize("weight", WEIGHTS)
    def test_each_expert_is_a_frozen_layer(self, weight, activations, device):
        """Its rows get what a FrozenLinear with its weight would give them, to the bit."""
        layers = []
        for e in range(3):
            layer = nn.Linear(256, 128, device=device, dtype=torch.bfloat16)
            layer.weight.data *= e + 1
            if activations == "static":
                fp8.calibrate(layer, [torch.randn(8, 256, device=device, dtype=torch.bfloat16)])
            layers.append(freeze(layer, activations, weight))
        codes, scale, bias = (torch.stack([getattr(layer, name) for layer in layers])
                              for name in ("weight", "weight_scale", "bias"))  # fmt: skip
        slot = torch.cat([layer.input_slot for layer in layers]) if activations == "static" else None
        x = torch.randn(60, 256, device=device, dtype=torch.bfloat16)
        offsets = torch.tensor([0, 5, 40, 57])
        y = ops.frozen_experts(x, offsets, codes, scale, bias, slot, ACTIVATIONS.index(activations))
        for e, layer in enumerate(layers):
            rows = slice(offsets[e], offsets[e + 1])
            assert torch.equal(y[rows], layer(x[rows].clone()))
        assert not y[57:].any()

    @pytest.mark.parametrize("weight", WEIGHTS)
    @pytest.mark.parametrize("part", [128, 144])
    def test_parts_have_scales_of_their_own(self, weight, part, device):
        """Gate and up of very different sizes lose no more than apart, also where blocks do not divide them."""
        values = torch.randn(2, 2 * part, 256, device=device)
        values[:, part:] *= 1e-4
        module = experts("mixtral", device=device)
        module.gate_up_proj.data, module.down_proj.data = values, torch.randn(2, 256, part, device=device)
        stack = frozen(module, "none", weight).stack("gate_up_proj")
        x = torch.randn(20, 256, device=device)
        y = ops.frozen_experts(x, torch.tensor([0, 13, 20]), *stack, 0, 2)
        for rows, e in ((slice(0, 13), 0), (slice(13, 20), 1)):
            for columns in (slice(0, part), slice(part, 2 * part)):
                assert error(x[rows] @ values[e, columns].t(), y[rows, columns]) < 0.035

    @pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "nemotron_h"])
    @pytest.mark.parametrize("activations", ["token", "static"])
    def test_inputs_in_fp8(self, model_type, activations, device):
        original = experts(model_type, torch.bfloat16, device)
        args = inputs(model_type, 400, torch.bfloat16, device)
        holder = nn.ModuleDict({"experts": copy.deepcopy(original)})
        if activations == "static":
            holder.forward = holder["experts"].forward
            fp8.calibrate(_Model(holder["experts"]), [args])
        fp8.freeze(holder, activations, "tensor" if activations == "static" else "channel")
        with torch.no_grad():
            assert error(original(*args), holder["experts"](*args)) < 0.11

    @pytest.mark.parametrize("tokens", [0, 1, 3, 40])
    def test_tokens(self, tokens, device):
        original = experts("qwen3_moe", device=device)
        module, args = frozen(copy.deepcopy(original), "none"), inputs("qwen3_moe", tokens, device=device)
        with torch.no_grad():
            y, exact = module(*args), twin(original, module)(*args)
        assert y.shape == (tokens, HIDDEN)
        assert not tokens or error(exact, y) < (2e-6 if device.type == "cpu" else 1e-3)

    @pytest.mark.parametrize("index", [[0, 0], [3, 3], [1, 3], [2, 4], [4, 4]])
    def test_who_gets_no_token(self, index, device):
        """All to one expert, empty experts, and 4, which stands for none."""
        original = experts("mixtral", device=device)
        module = frozen(copy.deepcopy(original), "none")
        x, index = torch.randn(20, HIDDEN, device=device), torch.tensor([index] * 20, device=device)
        weights = torch.rand(20, 2, device=device)
        with torch.no_grad():
            y, exact = module(x, index, weights), twin(original, module)(x, index, weights)
        torch.testing.assert_close(y, exact, rtol=1e-3, atol=1e-5 if device.type == "cpu" else 1e-2)
        assert index[0, 0] != 4 or not y.any()

    def test_a_negative_number_of_an_expert(self, device):
        module = frozen(experts("mixtral", device=device))
        index = torch.tensor([[0, -1]], device=device)
        with pytest.raises(IndexError, match="offsets must rise from 0.*negative"):
            module(torch.randn(1, HIDDEN, device=device), index, torch.ones(1, 2, device=device))

    def test_order_and_batch_of_tokens_do_not_matter(self, device):
        """Without quantised inputs, whose number of rows decides, a token's result is its own."""
        module, (x, index, weights) = (
            frozen(experts("olmoe", device=device), "none"),
            inputs("olmoe", 30, device=device),
        )
        order = torch.randperm(30, device=device)
        y = module(x, index, weights)
        torch.testing.assert_close(module(x[order], index[order], weights[order]), y[order], rtol=1e-4, atol=1e-4)
        three = module(x.view(2, 15, -1), index.view(2, 15, -1), weights.view(2, 15, -1))
        assert torch.equal(three.view(30, -1), y)

    def test_autocast_and_dtypes(self, device):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            module = frozen(experts("gpt_oss", dtype, device))
            y = module(*inputs("gpt_oss", 5, dtype, device))
            assert y.dtype == dtype
        args = inputs("gpt_oss", 5, device=device)
        with torch.autocast(device.type, torch.bfloat16):
            under = module(*args)
        assert under.dtype == torch.float32 and 0 < error(module(*args), under) < 0.02

    def test_float32_routing_weights(self, device):
        """A router often gives float32 beside bfloat16 tokens."""
        module = frozen(experts("deepseek_v3", torch.bfloat16, device))
        x, index, weights = inputs("deepseek_v3", 9, torch.bfloat16, device)
        assert module(x, index, weights.float()).dtype == torch.bfloat16

    def test_rows_that_experts_cannot_share(self):
        module = frozen(experts("llama4"))
        with pytest.raises(ValueError, match="4 experts take equally many rows each, got 6"):
            module(torch.randn(6, HIDDEN))

    @pytest.mark.parametrize("weight", WEIGHTS)
    @pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "llama4", "muse_spark"])
    def test_gradients_of_input_and_routing(self, model_type, weight, device):
        """For adapters in front and behind: those of the 16-bit experts with the same values."""
        original = experts(model_type, device=device)
        module = frozen(copy.deepcopy(original), "none", weight)
        made, args = twin(original, module), inputs(model_type, 24, device=device)
        wanted = [arg for arg in args if arg.is_floating_point()]
        for arg in wanted:
            arg.requires_grad_()
        dy = torch.randn_like(made(*args))
        expected, found = (torch.autograd.grad(m(*args), wanted, dy) for m in (made.requires_grad_(False), module))
        for a, b in zip(expected, found, strict=True):
            assert a.dtype == b.dtype and error(a, b) < (1e-5 if device.type == "cpu" else 2e-3)

    def test_gradients_in_fp8(self, device):
        original = experts("qwen3_moe", torch.bfloat16, device)
        module, (x, index, weights) = frozen(copy.deepcopy(original)), inputs("qwen3_moe", 200, torch.bfloat16, device)
        x.requires_grad_()
        dy = torch.randn_like(x)
        exact, found = (torch.autograd.grad(m(x, index, weights), x, dy)[0] for m in (original, module))
        assert 0.01 < error(exact, found) < 0.15

    def test_gradients_that_are_refused(self):
        module, args = frozen(experts("mixtral")), inputs("mixtral", 4)
        args[0].requires_grad_()
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            torch.autograd.grad(module(*args).sum(), args[0], create_graph=True)
        module.gate_up_proj_scale.requires_grad_()
        with pytest.raises(RuntimeError, match="compute the gradient of their input only"):
            module(*args)

    @pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "llama4", "nemotron_h"])
    def test_compiles_to_one_graph(self, model_type, device):
        module = frozen(experts(model_type, torch.bfloat16, device))
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            for tokens in (5, 24):
                args = inputs(model_type, tokens, torch.bfloat16, device)
                assert torch.equal(compiled(*args), module(*args))
        x = args[0].requires_grad_()
        a, b = (torch.autograd.grad(m(*args).sum(), x)[0] for m in (compiled, module))
        assert torch.equal(a, b)

    def test_on_the_meta_device(self):
        module = frozen(experts("mixtral"))
        args = [t.to("meta") for t in inputs("mixtral", 7)]
        assert module.to("meta")(*args).shape == (7, HIDDEN)


class _Model(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, *args):
        return self.experts(*args)


class TestState:
    @pytest.mark.parametrize("weight", WEIGHTS)
    @pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "llama4"])
    def test_casts_and_copies(self, model_type, weight):
        module = frozen(experts(model_type, torch.bfloat16), weight=weight)
        before, args = copy.deepcopy(module.state_dict()), inputs(model_type, 6, torch.bfloat16)
        y = module(*args)
        saved = io.BytesIO()
        torch.save(module.state_dict(), saved)
        other = frozen(experts(model_type, torch.bfloat16), weight=weight)
        other.load_state_dict(torch.load(io.BytesIO(saved.getvalue())))
        for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), other):
            assert torch.equal(again(*args), y)
        module.float().half().to("cpu")
        for name, tensor in module.state_dict().items():
            is_fp8 = not name.endswith("bias")
            assert tensor.dtype == (before[name].dtype if is_fp8 else torch.float16)
            assert not is_fp8 or torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8))

    def test_16_bit_weights_are_gone(self):
        module = experts("mixtral", torch.bfloat16)
        before = sum(p.nbytes for p in module.parameters())
        frozen(module, weight="tensor")
        assert not list(module.parameters())
        assert sum(b.nbytes for b in module.buffers()) == before // 2 + EXPERTS * 3 * 4

    def test_codes_are_those_of_each_matrix(self):
        """As a checkpoint has them: gate, up and down of an expert, each quantised by itself."""
        for model_type in ("mixtral", "gpt_oss", "llama4"):
            original = experts(model_type)
            layout, module = layout_of(original), frozen(copy.deepcopy(original), weight="tensor")
            both = original.gate_up_proj.transpose(1, 2) if layout.is_transposed else original.gate_up_proj
            gates = both[:, ::2] if layout.is_interleaved else both[:, :INNER]
            for e in range(EXPERTS):
                layer = nn.Linear(HIDDEN, INNER, bias=False)
                layer.weight.data = gates[e].clone()
                fp8.freeze(layer, weight="tensor")
                codes = module.gate_up_proj[e, :INNER]
                assert torch.equal(codes.view(torch.uint8), layer.weight.view(torch.uint8))
                assert module.gate_up_proj_scale[e, 0] == layer.weight_scale[0]

    def test_state_that_does_not_fit(self):
        module = frozen(experts("mixtral"))
        with pytest.raises(RuntimeError, match="gate_up_proj must be torch.float8_e4m3fn, got torch.float32"):
            module.load_state_dict({**module.state_dict(), "gate_up_proj": torch.zeros(4, 96, 64)})


def mixtral(**options):
    sizes = {"hidden_size": 64, "intermediate_size": 112, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.MixtralConfig(vocab_size=99, num_hidden_layers=2, num_local_experts=4, **sizes, **options)
    return transformers.MixtralForCausalLM(config).bfloat16().eval()


class TestFreeze:
    def test_whole_model(self, device):
        model, ids = mixtral().to(device), torch.arange(80, device=device).view(2, 40)
        with torch.no_grad():
            expected = model(ids).logits.float()
            fp8.freeze(model)
            assert error(expected, model(ids).logits) < 0.1
        assert isinstance(model.model.layers[0].mlp.experts, FrozenExperts)
        assert not any(p.requires_grad for p in model.parameters())
        assert model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 43)

    def test_filters_know_experts(self):
        model = fp8.freeze(mixtral(), filter=["model.layers.0.*.experts", "*.q_proj"])
        kinds = [type(layer.mlp.experts).__name__ for layer in model.model.layers]
        assert kinds == ["FrozenExperts", "MixtralExperts"]
        model = fp8.freeze(mixtral(), filter=lambda module, name: not name.endswith("experts"))
        assert not any(isinstance(m, FrozenExperts) for m in model.modules())

    def test_routers_stay(self):
        block = {"experts": experts("jamba"), "router": nn.Linear(HIDDEN, EXPERTS), "shared": nn.Linear(HIDDEN, INNER),
                 "shared_expert_gate": nn.Linear(HIDDEN, 1)}  # fmt: skip
        model = fp8.freeze(nn.ModuleDict({"block": nn.ModuleDict(block), "elsewhere": nn.Linear(HIDDEN, EXPERTS)}))
        kept = {name for name, module in model.named_modules() if type(module) is nn.Linear}
        assert kept == {"block.router", "block.shared_expert_gate"}
        assert fp8.freeze(nn.Sequential(nn.Linear(16, 4)))  # where there are no experts it is a layer like others

    def test_nan_is_refused_and_nothing_is_changed(self):
        model = mixtral()
        model.model.layers[1].mlp.experts.down_proj.data[2, 3, 4] = float("nan")
        with pytest.raises(ValueError, match=r"weight of model.layers.1.mlp.experts.down_proj has Inf or NaN"):
            fp8.freeze(model)
        assert not any(isinstance(m, fp8.FrozenLinear | FrozenExperts) for m in model.modules())

    def test_static_needs_calibration(self):
        model, ids = mixtral(), torch.arange(40).view(1, 40)
        with pytest.raises(ValueError, match=r"no input of .*(experts|q_proj) was seen"):
            fp8.freeze(model, "static", "tensor")
        fp8.freeze(fp8.calibrate(model, [ids, {"input_ids": ids}]), "static", "tensor")
        experts = model.model.layers[0].mlp.experts
        up, down = experts.gate_up_proj_slot, experts.down_proj_slot
        assert up.shape == (4, 4) and (up == up[0]).all() and torch.frexp(down[0, 0]).mantissa == 0.5

    def test_calibration_sees_what_the_experts_see(self):
        original = experts("gpt_oss")
        x, index, weights = inputs("gpt_oss", 12)
        fp8.calibrate(_Model(original), [(x, index, weights)])
        seen = []
        original._apply_gate = lambda y: seen.append(type(original)._apply_gate(original, y)) or seen[-1]
        original(x, index, weights)
        assert original._fp8_input_amax == pytest.approx(
            [x.abs().max().item(), max(y.abs().max().item() for y in seen)], rel=1e-5
        )

    def test_experts_that_are_not_understood_stay_and_are_named(self):
        class Experts(nn.Module):
            def __init__(self):
                super().__init__()
                self.gate_up_proj = nn.Parameter(torch.randn(4, 32, 16))
                self.down_proj = nn.Parameter(torch.randn(4, 16, 16))

        class Mine(type(experts("mixtral"))):
            def forward(self, hidden_states, top_k_index, top_k_weights):
                return hidden_states

        from mixtures import Config

        model = nn.ModuleDict({"linear": nn.Linear(16, 16), "experts": Experts(), "mine": Mine(Config())})
        fp8.freeze(model)
        assert isinstance(model["linear"], fp8.FrozenLinear)
        linear, unknown, mine = fp8.summary(model)
        assert linear.fp8 and not unknown.fp8 and not mine.fp8
        assert "what Experts computes is not known" in unknown.note and "Mine" in mine.note
        with pytest.raises(ValueError, match="experts.*cannot be FP8: what Experts computes is not known"):
            fp8.freeze(nn.ModuleDict({"experts": Experts()}), filter=["experts"])
        with pytest.raises(ValueError, match="no layer.*experts: what Experts computes is not known"):
            fp8.freeze(nn.ModuleDict({"experts": Experts()}))

    @pytest.mark.parametrize(
        ("change", "why"),
        [
            (lambda m: setattr(m, "down_proj", nn.Parameter(torch.zeros(3, 64, 48))), "do not fit"),
            (lambda m: setattr(m, "down_proj", nn.Parameter(torch.zeros(4, 64, 40))), "do not fit"),
            (lambda m: setattr(m, "extra", nn.Parameter(torch.zeros(4, 64, 40))), "expected down_proj, gate_up_proj"),
            (lambda m: m.double(), "float64 parameters"),
            (lambda m: setattr(m, "has_bias", True), "has_bias=True"),
            (lambda m: setattr(m, "forward", lambda *args: None), "forward was replaced"),
        ],
    )
    def test_experts_that_do_not_fit(self, change, why):
        module = experts("mixtral")
        change(module)
        before = dict(module.state_dict(keep_vars=True))
        with pytest.raises(ValueError, match=why):
            fp8.freeze(nn.ModuleDict({"experts": module}), filter=["experts"])
        assert all(module.state_dict(keep_vars=True)[name] is tensor for name, tensor in before.items())


class TestSummary:
    def test_what_is_computed(self):
        """Of each projection, where they differ."""
        module, why = experts("mixtral"), "in 16 bits (not by token: in_features is no multiple of 128)"
        (row,) = fp8.summary(nn.ModuleDict({"experts": frozen(copy.deepcopy(module), "token", "block")}))
        assert row.note == f"frozen: activations {why}, weight by block"
        module.gate_up_proj.data, module.down_proj.data = torch.randn(4, 96, 128), torch.randn(4, 128, 48)
        (row,) = fp8.summary(nn.ModuleDict({"experts": frozen(module, "token", "block")}))
        assert row.note == f"frozen: activations of gate_up_proj by token, of down_proj {why}, weight by block"

    def test_share_of_parameters(self):
        model = mixtral()
        experts_have, attention_has = 2 * 4 * (224 * 64 + 64 * 112), 2 * (64 * 64 * 2 + 32 * 64 * 2)
        total = sum(p.numel() for p in model.parameters())
        trained = fp8.summary(fp8.convert(copy.deepcopy(model), tokens=None))
        assert trained.parameters.fp8 == attention_has
        assert trained.parameters.others["model.layers.*.mlp.experts"] == experts_have
        note = next(row.note for row in trained if row.name.endswith("experts"))
        assert note == "experts train in 16 bits; torch_fp8.freeze takes them"
        frozen = fp8.summary(fp8.freeze(model))
        assert frozen.parameters.fp8 == attention_has + experts_have
        assert frozen.parameters.fp8 + frozen.parameters.others.total() == total
        assert f"{100 * (attention_has + experts_have) / total:.3g} % of the parameters" in str(frozen)
        assert "not in FP8: model.embed_tokens 6,336, lm_head 6,336" in str(frozen)
        shapes = {row.shape for row in frozen if row.name.endswith("experts")}
        assert shapes == {"4 x 224 x 64, 4 x 64 x 112"}

    def test_tied_weights_count_once(self):
        model = mixtral(tie_word_embeddings=True)
        counted = fp8.summary(model).parameters
        assert counted.others.total() == sum(p.numel() for p in model.parameters()) and counted.share == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"offsets": torch.tensor([0, 2, 3, 4])}, "offsets must be a contiguous int64 tensor of 3"),
        ({"offsets": torch.tensor([0, 2, 4], dtype=torch.int32)}, "int64 tensor of 3 elements on the CPU, got Int"),
        ({"offsets": torch.tensor([0, 3, 2])}, "offsets must rise"),
        ({"offsets": torch.tensor([0, 2, 5])}, "offsets must rise from 0 to at most 4"),
        ({"x": torch.randn(4, 31)}, r"input must have shape \[rows, 32\], got \[4, 31\]"),
        ({"weight": torch.zeros(2, 48, 32)}, "frozen experts must be float8_e4m3fn"),
        ({"weight_scale": torch.ones(2, 47, 1)}, r"must have shape \[2, 2\], \[2, 48, 1\] or \[2, 2, 1\], got"),
        ({"weight_scale": torch.ones(2)}, "must have shape"),
        ({"bias": torch.zeros(48)}, r"bias must have shape \[2, 48\]"),
        ({"activations": 1}, "static activations need an input_slot"),
        ({"activations": 7}, "activations must be"),
        ({"parts": 5}, "parts must divide the experts' 48 outputs, got 5"),
    ],
)
def test_errors_of_the_op(change, words, device):
    given = {
        "x": torch.randn(4, 32), "offsets": torch.tensor([0, 2, 4]),
        "weight": torch.zeros(2, 48, 32).to(torch.float8_e4m3fn), "weight_scale": torch.ones(2, 48, 1), "bias": None,
        "input_slot": None, "activations": 3, "parts": 2,
    } | change  # fmt: skip
    given = {name: v.to(device) if torch.is_tensor(v) and name != "offsets" else v for name, v in given.items()}
    with pytest.raises((RuntimeError, ValueError, TypeError, IndexError), match=words):
        ops.frozen_experts(**given)


def test_routing_is_of_different_experts():
    index, _ = routing(50)
    assert (index[:, 0] != index[:, 1]).all()
