"""What cannot be frozen: layers whose parameters are not their own, whose forward was replaced, and whose weight other
code reads. They stay as they are and are named; asked for by name, they are refused and nothing changes."""

import pytest
import torch
import torch_fp8 as fp8
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune


def sqnr(exact, x):
    return 20 * torch.log10(exact.norm() / (x - exact).norm()).item()


class TestRefused:
    """What cannot be frozen stays as it is and is named; where a list of names asks for it, nothing changes."""

    @staticmethod
    def pruned(layer):
        prune.l1_unstructured(layer, "weight", 0.5)
        return layer

    @staticmethod
    def biased(layer):
        nn.utils.parametrize.register_parametrization(layer, "bias", nn.Identity())
        return layer

    @pytest.mark.parametrize("convert_first", [False, True])
    @pytest.mark.parametrize("how", ["pruned", "biased", "weight_norm", "spectral_norm", "orthogonal"])
    @pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
    def test_parameters_that_are_computed_in_each_forward(self, how, convert_first):
        change = getattr(self, how, None) or getattr(nn.utils.parametrizations, how)
        model = nn.Sequential(nn.Linear(64, 64), change(nn.Linear(64, 64))).eval()
        x = torch.randn(32, 64)
        expected = model(x)
        if convert_first:
            fp8.convert(model, tokens=None)
        with pytest.raises(ValueError, match="1 .*cannot be FP8: its parameters are computed anew in each forward"):
            fp8.freeze(model, filter=["*"])
        assert not any(isinstance(module, fp8.FrozenLinear) for module in model)
        fp8.freeze(model)
        assert "computed anew" in str(fp8.summary(model)) or convert_first
        assert isinstance(model[0], fp8.FrozenLinear) and sqnr(expected, model(x)) > 25

    @pytest.mark.parametrize("old_style", [nn.utils.weight_norm, nn.utils.spectral_norm])
    @pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
    def test_norms_by_hooks(self, old_style):
        model = nn.Sequential(nn.Linear(64, 64), old_style(nn.Linear(64, 64))).eval()
        x = torch.randn(32, 64)
        expected = model(x)
        fp8.freeze(model)
        assert "computed anew" in fp8.summary(model)[1].note and sqnr(expected, model(x)) > 25

    @pytest.mark.parametrize("convert_first", [False, True])
    def test_hooks_of_accelerate(self, convert_first):
        hooks = pytest.importorskip("accelerate.hooks")
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        if convert_first:
            fp8.convert(model, tokens=None)
        before = [type(module) for module in model]
        hooks.add_hook_to_module(model[1], hooks.AlignDevicesHook("cpu"))
        x = torch.randn(32, 64)
        with pytest.raises(ValueError, match="1 .*its forward was replaced on the object, as accelerate's device_map"):
            fp8.freeze(model, filter=["*"])
        assert before == [type(module) for module in model] and model(x).shape == (32, 64)
        fp8.freeze(model)
        assert isinstance(model[0], fp8.FrozenLinear) and type(model[1]) is before[1]
        assert model(x).shape == (32, 64)
        hooks.add_hook_to_module(model[1], hooks.AlignDevicesHook("cpu"))
        with pytest.raises(ValueError, match="no layer of Sequential would be frozen.*1: its forward was replaced"):
            fp8.freeze(model)

    def test_distributed_and_odd_weights(self):
        class Odd(torch.Tensor):
            @classmethod
            def __torch_function__(cls, function, types, args=(), kwargs=None):
                return super().__torch_function__(function, types, args, kwargs or {})

        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        model[1].weight = nn.Parameter(torch.randn(64, 64).as_subclass(Odd))
        for swap in (fp8.freeze, fp8.convert):
            with pytest.raises(ValueError, match="1 .*cannot be FP8: its weight is a Odd"):
                swap(model, filter=["*"])
        with torch.device("cpu"):  # a mode, under which any tensor looks as if it were a subclass
            fp8.convert(model, tokens=None)
        assert isinstance(model[0], fp8.Linear) and type(model[1]) is nn.Linear
        fp8.freeze(model)
        assert "its weight is a Odd" in fp8.summary(model)[1].note

    def test_a_class_of_another_layout(self):
        class Slotted(nn.Linear):
            __slots__ = ("note",)

        model = nn.Sequential(nn.Linear(64, 64), Slotted(64, 64))
        weight = model[1].weight
        fp8.freeze(model)
        assert isinstance(model[0], fp8.FrozenLinear) and model[1].weight is weight
        with pytest.raises(ValueError, match="Python cannot make a FrozenLinear of a Slotted, which has __slots__"):
            fp8.freeze(model, filter=["1"])
        assert type(model[1]) is Slotted and model[1].weight is weight

    def test_the_head_is_no_layer_that_was_forgotten(self):
        model = fp8.freeze(nn.ModuleDict({"up": nn.Linear(64, 64), "lm_head": nn.Linear(64, 64)}))
        assert [row.note for row in fp8.summary(model) if not row.fp8] == ["output head"]


class Reader(nn.Module):
    """Each way to read a weight of which the library knows, and some that do not count."""

    def __init__(self):
        super().__init__()
        self.by_self, self.by_method, self.by_lambda, self.by_property = (nn.Linear(64, 64) for _ in range(4))
        self.listed = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))
        self.inner = nn.ModuleDict({"deep": nn.Linear(64, 64)})
        self.dtype_only, self.device_only, self.at_start, self.called = (nn.Linear(64, 64) for _ in range(4))
        nn.init.zeros_(self.at_start.weight)

    def method(self, x):
        return x @ self.by_method.weight.t()

    @property
    def transposed(self):
        return self.by_property.weight.t()

    @staticmethod
    def of_another(block, x):
        return F.linear(x, block.inner.deep.weight)

    def forward(self, x):
        x = x.to(self.dtype_only.weight.dtype).to(self.device_only.weight.device)
        weight, bias = self.by_self.weight, self.by_self.bias
        x = self.method(F.linear(x, weight, bias)) @ self.transposed
        for i in range(2):
            x = F.linear(x, self.listed[i].weight)
        x = (lambda x: F.linear(x, self.by_lambda.weight))(x)
        assert self.device_only.weight.shape == (64, 64)
        x = self.of_another(self, x)
        return self.called(self.at_start(self.device_only(self.dtype_only(x))))


class TestReaders:
    READ = ("by_self", "by_method", "by_lambda", "by_property", "listed.0", "listed.1", "inner.deep", "dtype_only")

    def test_a_layer_whose_weight_other_code_reads_stays_in_16_bits(self, device):
        model = nn.Sequential(nn.Linear(64, 64), Reader()).to(device)
        x = torch.randn(32, 64, device=device)
        expected = model(x)
        fp8.freeze(model)
        rows = {row.name: row for row in fp8.summary(model)}
        assert {name for name, row in rows.items() if not row.fp8} == {f"1.{name}" for name in self.READ}
        assert rows["1.by_self"].note == "Reader.forward reads its weight itself"
        assert rows["1.by_method"].note == "Reader.method reads its weight itself"
        with torch.no_grad():
            assert sqnr(expected, model(x)) > 20

    @pytest.mark.parametrize("name", READ)
    def test_asked_for_by_name_it_is_refused(self, name):
        model = nn.Sequential(nn.Linear(64, 64), Reader())
        with pytest.raises(ValueError, match=rf"1.{name} .*cannot be FP8: Reader.* reads its weight itself"):
            fp8.freeze(model, filter=["0", f"1.{name}"])
        assert type(model[0]) is nn.Linear

    def test_convert_takes_it(self):
        """The weight is there in 16 bits: what reads it does as before."""
        model = fp8.convert(Reader(), tokens=None)
        assert all(row.fp8 for row in fp8.summary(model))

    @pytest.mark.parametrize(
        "family, config, read",
        [
            ("T5", {"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 4}, {"wo"}),
            ("Mamba", {"hidden_size": 64, "num_hidden_layers": 1}, {"x_proj", "dt_proj", "out_proj"}),
            ("Rwkv", {"hidden_size": 64, "num_hidden_layers": 2, "attention_hidden_size": 64}, {"output", "value"}),
        ],
    )
    def test_models_of_transformers(self, family, config, read):
        transformers = pytest.importorskip("transformers")
        kind = "ForConditionalGeneration" if family == "T5" else "ForCausalLM"
        model = getattr(transformers, family + kind)(getattr(transformers, f"{family}Config")(vocab_size=96, **config))
        inputs = {"input_ids": torch.randint(96, (2, 24))}
        if family == "T5":
            inputs["decoder_input_ids"] = inputs["input_ids"]
        model.eval()
        with torch.no_grad():
            expected = model(**inputs).logits
            fp8.freeze(model)
            rows = [row for row in fp8.summary(model) if "reads its weight itself" in row.note]
            assert {row.name.rpartition(".")[2] for row in rows} - {"lm_head"} == read
            assert sum(row.fp8 for row in fp8.summary(model)) > 0
            assert sqnr(expected, model(**inputs).logits) > 20

    def test_encoders_of_pytorch(self, device):
        """In evaluation they hand their layers' weights to a fused op."""
        layer = nn.TransformerEncoderLayer(64, 4, 64, batch_first=True, device=device)
        model = nn.Sequential(layer, nn.Linear(64, 64, device=device)).eval()
        x = torch.randn(2, 24, 64, device=device)
        with torch.no_grad():
            expected = model(x)
            fp8.freeze(model)
            assert [row.name for row in fp8.summary(model) if row.fp8] == ["1"]
            assert sqnr(expected, model(x)) > 25
