"""Linear layers of other classes than nn.Linear: subclasses, with a forward of their own or not, and transformers'
Conv1D. They train in FP8, stay what others know them as, and go back. Held against the layer that they were."""

import copy
import io
import pickle

import pytest
import torch
import torch_fp8 as fp8
from casts import count_casts
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

# What FP8 may cost against the 16-bit layer: E4M3 on both sides, or E5M2 on one.
FORWARD, BACKWARD = 0.05, 0.09


class Mixin:
    def name_of(self):
        return "mine"


class Named(nn.Linear, Mixin):
    """Inherits forward, as torchtitan's layers do; has a constructor of its own."""

    def __init__(self, config):
        super().__init__(*config, bias=False)
        self.config = config


class Derived(Named):
    pass


class Module(nn.Module):
    pass


class Diamond(Module, nn.Linear):
    pass


class Slotted(nn.Linear):
    __slots__ = ("note",)


class CastsWeight(nn.Linear):
    """float32 weights, and products in the input's dtype, as nanochat has it."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Doubles(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Twice(nn.Module):
    def forward(self, w):
        return 2 * w


def error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def train(model, x, steps=3, lr=0.0):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return model


def assert_like(layer, plain, x):
    """Output and gradients of an FP8 layer against those of the layer that it was."""
    results = []
    for module in (layer, plain):
        module.zero_grad()
        a = x.detach().clone().requires_grad_()
        y = module(a)
        y.backward(torch.ones_like(y) + torch.arange(y.shape[-1], device=y.device) / 64)
        results.append((y, a.grad, [parameter.grad for parameter in module.parameters()]))
    (y, dx, dp), (y_plain, dx_plain, dp_plain) = results
    assert y.dtype == y_plain.dtype and dx.dtype == x.dtype and dx_plain.dtype == x.dtype
    assert 0 < error(y, y_plain) < FORWARD and 0 < error(dx, dx_plain) < BACKWARD
    for ours, theirs in zip(dp, dp_plain, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and error(ours, theirs) < BACKWARD


@pytest.mark.parametrize(
    "make",
    [lambda: Named((64, 48)), lambda: Derived((64, 48)), lambda: Diamond(64, 48), lambda: Slotted(64, 48, bias=False)],
)
def test_a_subclass_that_inherits_forward_is_converted_and_stays_of_its_class(make, device):
    layer = make().to(device)
    plain, cls = copy.deepcopy(layer), type(layer)
    parameters = dict(layer.named_parameters())
    model = nn.Sequential(layer)
    fp8.convert(model, tokens=None)
    assert model[0] is layer and isinstance(layer, cls) and isinstance(layer, fp8.Linear)
    assert all(parameters[name] is parameter for name, parameter in layer.named_parameters())
    assert list(layer.state_dict()) == list(plain.state_dict())
    assert_like(layer, plain, torch.randn(32, 64, device=device))
    if cls is Derived:
        assert isinstance(layer, Named) and layer.name_of() == "mine" and layer.config == (64, 48)
    fp8.revert(model)
    assert type(layer) is cls and vars(layer).keys() == vars(plain).keys()


def test_layers_of_one_class_share_theirs_and_a_second_convert_keeps_it():
    model = nn.Sequential(Named((32, 32)), Named((32, 32)))
    fp8.convert(model, tokens=None)
    cls = type(model[0])
    assert type(model[1]) is cls
    fp8.convert(model, fp8.CurrentScaling())
    assert type(model[0]) is cls and model[0].recipe == fp8.CurrentScaling()
    assert "FP8Named(in_features=32, out_features=32, bias=False, recipe=CurrentScaling())" in repr(model)


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", [copy.deepcopy, by_pickle, by_torch_save, lambda model: by_pickle(by_pickle(model))])
def test_copies_are_of_the_class_and_train_on_their_own(how, device):
    x = torch.randn(16, 32, device=device)
    model = train(fp8.convert(nn.Sequential(Derived((32, 32)), nn.Linear(32, 32)).to(device), tokens=None), x)
    new = how(model)
    assert type(new[0]) is type(model[0]) and new[0].config == (32, 32)
    assert torch.equal(new[0].fp8_slots, model[0].fp8_slots) and torch.equal(new(x), model(x))
    train(new, x, steps=1)
    assert new[0].fp8_slots[0, 3] == 4 and model[0].fp8_slots[0, 3] == 3


def test_a_forward_of_its_own_is_named_with_the_mend_and_taken_when_vouched_for(device):
    model = nn.Sequential(CastsWeight(32, 48), nn.Linear(48, 32)).to(device)
    fp8.convert(model, tokens=None)
    note = fp8.summary(model)[0].note
    assert type(model[0]) is CastsWeight and "CastsWeight has a forward of its own" in note
    assert "linear_types=[CastsWeight]" in note
    with pytest.raises(ValueError, match=r"cannot be FP8: CastsWeight has a forward.*linear_types=\[CastsWeight\]"):
        fp8.convert(model, filter=["0"])
    plain = copy.deepcopy(model[0])
    fp8.convert(model, tokens=None, linear_types=[CastsWeight])
    assert isinstance(model[0], CastsWeight) and isinstance(model[0], fp8.Linear)
    assert_like(model[0], plain, torch.randn(32, 32, device=device))
    fp8.revert(model)
    assert type(model[0]) is CastsWeight


def test_a_head_of_a_class_that_is_vouched_for_is_called_a_head():
    model = nn.ModuleDict({"up": CastsWeight(32, 32), "lm_head": CastsWeight(32, 32)})
    fp8.convert(model, tokens=None, linear_types=[CastsWeight])
    assert fp8.summary(model)[1].note == "output head"


def test_a_subclass_with_yet_another_forward_is_not_vouched_for():
    class More(CastsWeight):
        def forward(self, x):
            return super().forward(x) + 1

    class Same(CastsWeight):
        pass

    model = nn.Sequential(More(32, 32), Same(32, 32))
    fp8.convert(model, tokens=None, linear_types=(CastsWeight,))
    assert type(model[0]) is More and isinstance(model[1], fp8.Linear) and isinstance(model[1], Same)


def test_disabled_runs_the_forward_that_the_layer_had():
    layer = Doubles(32, 32)
    x = torch.randn(4, 32)
    expected = layer(x)
    fp8.convert(layer, tokens=None, linear_types=[Doubles])
    with fp8.disabled(layer):
        assert torch.equal(layer(x), expected)
    assert error(2 * layer(x), expected) < FORWARD


@pytest.mark.parametrize("types", [[nn.Module], [nn.Embedding], [int], ["CastsWeight"], [None], CastsWeight, 3])
@pytest.mark.parametrize("swap", [fp8.convert, fp8.freeze])
def test_what_is_vouched_for_must_be_a_linear_layer(types, swap):
    model = nn.Sequential(CastsWeight(32, 32), nn.Linear(32, 32))
    before = [dict(vars(module)) for module in model]
    with pytest.raises(TypeError, match="torch_fp8: linear_types"):
        swap(model, linear_types=types)
    assert [type(module) for module in model] == [CastsWeight, nn.Linear]
    assert [vars(module).keys() for module in model] == [state.keys() for state in before]


def test_a_class_that_cannot_be_derived_from_changes_nothing():
    class Final(nn.Linear):
        def __init_subclass__(cls):
            raise TypeError("no subclasses")

    model = nn.Sequential(nn.Linear(32, 32), Final(32, 32))
    with pytest.raises(TypeError, match="no subclasses"):
        fp8.convert(model, tokens=None)
    assert [type(module) for module in model] == [nn.Linear, Final]


def test_a_recipe_that_fails_changes_nothing():
    class Broken(fp8.DelayedScaling):
        def options(self):
            raise RuntimeError("broken")

    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    with pytest.raises(RuntimeError, match="broken"):
        fp8.convert(model, Broken(), tokens=None)
    assert [type(module) for module in model] == [nn.Linear, nn.Linear]
    with pytest.raises(TypeError):
        fp8.convert(model, fp8.Recipe(), tokens=None)
    assert model(torch.randn(2, 32)).shape == (2, 32)


def test_freeze_takes_the_same_classes(device):
    model = nn.Sequential(Named((32, 48)), CastsWeight(48, 32), Doubles(32, 32)).to(device)
    plain = copy.deepcopy(model)
    fp8.freeze(model, linear_types=[CastsWeight])
    assert [row.fp8 for row in fp8.summary(model)] == [True, True, False]
    assert "Doubles has a forward of its own" in fp8.summary(model)[2].note
    x = torch.randn(64, 32, device=device)
    with torch.no_grad():
        assert 0 < error(model(x), plain(x)) < 1.5 * FORWARD


def test_a_lazy_layer_says_that_it_is_not_initialised():
    model = nn.Sequential(nn.LazyLinear(32), nn.Linear(32, 32))
    fp8.convert(model, tokens=None)
    assert "not initialised yet" in fp8.summary(model)[0].note
    model(torch.randn(4, 32))
    fp8.convert(model, tokens=None)
    assert isinstance(model[0], fp8.Linear)


class TestParametrize:
    """torch.nn.utils.parametrize changes the class of a layer, too."""

    def test_before_convert(self, device):
        layer = Named((32, 48)).to(device)
        parametrize.register_parametrization(layer, "weight", Twice())
        x = torch.randn(16, 32, device=device)
        expected = layer(x)
        fp8.convert(layer, tokens=None)
        assert isinstance(layer, Named) and isinstance(layer, fp8.Linear) and 0 < error(layer(x), expected) < FORWARD
        with fp8.disabled(layer):
            assert torch.equal(layer(x), expected)
        parametrize.remove_parametrizations(layer, "weight")
        assert isinstance(layer, Named) and isinstance(layer, fp8.Linear) and error(layer(x), expected) < FORWARD
        fp8.revert(layer)
        assert type(layer) is Named and torch.equal(layer(x), expected)

    def test_after_convert(self, device):
        layer = fp8.convert(Named((32, 48)).to(device), tokens=None)
        parametrize.register_parametrization(layer, "weight", Twice())
        x = torch.randn(16, 32, device=device)
        expected = 2 * x @ layer.parametrizations.weight.original.t()
        assert error(layer(x), expected) < FORWARD
        fp8.revert(layer)  # loses neither the weight nor its parametrization
        assert not isinstance(layer, fp8.Linear) and isinstance(layer, Named)
        assert torch.allclose(layer(x), expected, rtol=1e-5, atol=1e-5)
        parametrize.remove_parametrizations(layer, "weight")
        assert type(layer) is Named and torch.allclose(layer(x), expected, rtol=1e-5, atol=1e-5)

    def test_a_copy_is_updated_by_its_optimizer(self, device):
        layer = fp8.Linear(32, 32, device=device)
        parametrize.register_parametrization(layer, "weight", Twice())
        new = copy.deepcopy(layer)
        train(new, torch.randn(8, 32, device=device), steps=2)
        assert new.fp8_slots[0, 3] == 2 and layer.fp8_slots[0, 3] == 0

    def test_a_class_that_somebody_derived_from_ours_is_not_reverted(self):
        class Own(fp8.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        model = nn.Sequential(nn.Linear(32, 32), Own(32, 32))
        fp8.convert(model, filter=["0"])
        with pytest.raises(ValueError, match="1 cannot be reverted: its class Own was derived from an FP8 layer's"):
            fp8.revert(model)
        assert isinstance(model[0], fp8.Linear)
        fp8.convert(model, fp8.CurrentScaling(), tokens=None)
        assert type(model[1]) is Own and model[1].recipe == fp8.CurrentScaling()
        with pytest.raises(ValueError, match="1 .*cannot be FP8: Own has a forward of its own"):
            fp8.freeze(model, filter=["1"])


class TestFloat32Weights:
    """float32 parameters and 16-bit input, outside of autocast: in the input's dtype, with float32 gradients."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("gemms", [("fprop", "dgrad", "wgrad"), ("fprop",), ("dgrad", "wgrad")])
    def test_like_the_layer_that_casts(self, dtype, bias, gemms, device):
        plain = CastsWeight(64, 48, bias=bias, device=device)
        layer = copy.deepcopy(plain)
        fp8.convert(layer, fp8.DelayedScaling(fp8_gemms=gemms), tokens=None, linear_types=[CastsWeight])
        x = torch.randn(2, 16, 64, device=device, dtype=dtype)
        for _ in range(2):  # by own amaxes, and by the history
            y = layer(x.requires_grad_())
            y.backward(torch.ones_like(y) + torch.arange(48, device=device) / 64)
            fp8.update_scales(layer)
            expected = plain(x.detach())
            assert y.dtype == dtype and error(y, expected) < FORWARD
            assert x.grad.dtype == dtype and layer.weight.grad.dtype == torch.float32
            other = x.detach().clone().requires_grad_()
            plain.zero_grad()
            plain(other).backward(torch.ones_like(y) + torch.arange(48, device=device) / 64)
            assert error(x.grad, other.grad) < BACKWARD
            assert error(layer.weight.grad, plain.weight.grad) < BACKWARD
            if bias:
                assert layer.bias.grad.dtype == torch.float32 and error(layer.bias.grad, plain.bias.grad) < 0.01
            x.grad = None
            layer.zero_grad()

    def test_gradients_are_not_rounded_to_16_bits(self, device):
        layer = fp8.Linear(64, 48, device=device)
        y = layer(torch.randn(32, 64, device=device).bfloat16())
        y.backward(torch.randn_like(y))
        for grad in (layer.weight.grad, layer.bias.grad):
            assert not torch.equal(grad, grad.bfloat16().float())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_compiled_gives_the_bits_of_eager_mode(self, dtype, device):
        eager = nn.Sequential(fp8.Linear(64, 48, device=device), nn.ReLU(), fp8.Linear(48, 64, device=device))
        other = copy.deepcopy(eager)
        compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
        x = torch.randn(32, 64, device=device, dtype=dtype)
        for _ in range(3):
            results = []
            for model, layers in ((eager, eager), (compiled, other)):
                optimizer = torch.optim.SGD(layers.parameters(), lr=0.01)
                y = model(x)
                y.float().square().sum().backward()
                results.append((y, [p.grad for p in layers.parameters()]))
                optimizer.step()
                optimizer.zero_grad()
            (y, grads), (y_compiled, grads_compiled) = results
            assert y.dtype == dtype and torch.equal(y, y_compiled)
            assert all(g.dtype == torch.float32 for g in grads) and all(map(torch.equal, grads, grads_compiled))

    def test_siblings_share_their_input(self, device):
        layers = nn.ModuleDict({name: nn.Linear(64, 48, bias=False) for name in ("q_proj", "k_proj")}).to(device)
        plain = copy.deepcopy(layers)
        fp8.convert(layers, fp8.CurrentScaling(), tokens=None)
        x = torch.randn(32, 64, device=device).bfloat16().requires_grad_()
        (layers["q_proj"](x) + layers["k_proj"](x)).sum().backward()
        expected = torch.ones(32, 48, device=device) @ (plain["q_proj"].weight + plain["k_proj"].weight)
        assert error(x.grad, expected) < BACKWARD

    def test_a_float32_bias_of_a_16_bit_layer(self, device):
        layer = fp8.Linear(64, 48, device=device, dtype=torch.bfloat16)
        layer.bias.data = layer.bias.data.float()
        x = torch.randn(32, 64, device=device).bfloat16()
        expected = F.linear(x, layer.weight, layer.bias.bfloat16())
        y = layer(x)
        assert error(y, expected) < FORWARD and y.dtype == torch.bfloat16
        y.sum().backward()
        assert layer.bias.grad.dtype == torch.float32
        assert torch.equal(torch.compile(layer, backend="aot_eager")(x), y)


def conv1d(in_features, out_features, device):
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(out_features, in_features)
    nn.init.normal_(layer.bias)
    return layer.to(device)


class TestConv1D:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("shape", [(32, 64, 192), (33, 40, 24), (1, 7, 5)])
    @pytest.mark.parametrize("recipe", [fp8.DelayedScaling(), fp8.CurrentScaling(power_of_two=True)])
    def test_against_the_layer_that_it_was(self, shape, dtype, recipe, device):
        m, k, n = shape
        layer = conv1d(k, n, device).to(dtype)
        plain = copy.deepcopy(layer)
        fp8.convert(layer, recipe, tokens=None)
        assert isinstance(layer, type(plain)) and not isinstance(layer, nn.Linear)
        x = torch.randn(2, m, k, device=device, dtype=dtype)
        for _ in range(2):  # by own amaxes, and by the history
            assert_like(layer, plain, x)
            fp8.update_scales(layer)
        assert all(map(torch.equal, layer.state_dict().values(), plain.state_dict().values()))
        assert list(layer.state_dict()) == list(plain.state_dict())
        with fp8.disabled(layer):
            assert torch.equal(layer(x), plain(x))
        fp8.revert(layer)
        assert type(layer) is type(plain) and torch.equal(layer(x), plain(x))

    @pytest.mark.filterwarnings("ignore:torch_fp8. layers with DelayedScaling are trained in eval")
    def test_has_the_bits_of_a_linear_layer(self, device):
        """Through steps with several micro-batches and changes of the weight by others."""
        layer = conv1d(64, 48, device)
        twin = fp8.Linear(64, 48, device=device)
        twin.weight.data, twin.bias.data = layer.weight.data.t().contiguous(), layer.bias.data.clone()
        fp8.convert(layer, tokens=None)
        optimizers = [torch.optim.AdamW(module.parameters(), lr=0.01) for module in (layer, twin)]
        for step in range(6):
            for _ in range(2):
                x = torch.randn(32, 64, device=device)
                outputs = [module(x) for module in (layer, twin)]
                assert torch.equal(*outputs)
                for y in outputs:
                    y.square().sum().backward()
            assert torch.equal(layer.weight.grad.t(), twin.weight.grad)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            assert torch.equal(layer.fp8_slots, twin.fp8_slots)
            if step == 2:
                with torch.no_grad():
                    layer.weight.mul_(1.5)
                    twin.weight.mul_(1.5)
            layer.train(step != 3), twin.train(step != 3)

    def test_a_change_of_the_weight_by_others_is_noticed(self, device):
        layer = conv1d(64, 48, device)
        x = torch.randn(32, 64, device=device)
        train(fp8.convert(layer, tokens=None), x)
        with torch.no_grad():
            layer.weight.mul_(1.9)
        assert error(layer(x), x @ layer.weight + layer.bias) < FORWARD

    def test_the_weight_is_cast_once_for_the_micro_batches_of_a_step(self, device):
        layer = fp8.convert(conv1d(64, 48, device), tokens=None)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)

        def step():
            for _ in range(3):
                layer(torch.randn(32, 64, device=device)).sum().backward()
            optimizer.step()

        step(), step()
        with count_casts() as casts:
            step()
        twin = fp8.Linear(64, 48, device=device)
        optimizer, layer = torch.optim.SGD(twin.parameters(), lr=0.0), twin
        step(), step()
        with count_casts() as expected:
            step()
        assert casts == expected

    def test_compiled_gives_the_bits_of_eager_mode(self, device):
        eager = fp8.convert(nn.Sequential(conv1d(64, 48, device), nn.ReLU(), conv1d(48, 64, device)), tokens=None)
        other = copy.deepcopy(eager)
        compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
        x = torch.randn(32, 64, device=device)
        for _ in range(3):
            grads = []
            for model, layers in ((eager, eager), (compiled, other)):
                optimizer = torch.optim.SGD(layers.parameters(), lr=0.01)
                model(x).square().sum().backward()
                grads.append([p.grad.clone() for p in layers.parameters()])
                optimizer.step()
                optimizer.zero_grad()
            assert all(map(torch.equal, *grads))

    def test_copies(self, device):
        model = nn.Sequential(conv1d(32, 32, device))
        x = torch.randn(16, 32, device=device)
        train(fp8.convert(model, tokens=None), x)
        for new in (copy.deepcopy(model), by_pickle(model)):
            assert type(new[0]) is type(model[0]) and torch.equal(new(x), model(x))
            fp8.revert(new)
            assert type(new[0]).__name__ == "Conv1D"

    def test_main_grad_is_refused_before_anything_changes(self):
        model = nn.Sequential(nn.Linear(32, 32), conv1d(32, 32, "cpu"))
        with pytest.raises(ValueError, match="but 1 is a Conv1D, whose weight is transposed"):
            fp8.convert(model, tokens=None, fuse_main_grad=True)
        assert type(model[0]) is nn.Linear
        fp8.convert(model, filter=["0"], fuse_main_grad=True)

    def test_gpt2_learns_as_in_16_bits(self, device):
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(vocab_size=64, n_positions=32, n_embd=64, n_layer=2, n_head=4, attn_pdrop=0.0,
                            embd_pdrop=0.0, resid_pdrop=0.0)  # fmt: skip
        plain = GPT2LMHeadModel(config).to(device)
        model = fp8.convert(copy.deepcopy(plain), tokens=None)
        rows = fp8.summary(model)
        assert [row.name for row in rows if not row.fp8] == ["lm_head"] and len(rows) == 9
        assert list(model.state_dict()) == list(plain.state_dict())
        plain.load_state_dict(model.state_dict())
        ids = torch.randint(64, (4, 32), device=device)
        losses = []
        for trained in (model, plain):
            optimizer = torch.optim.AdamW(trained.parameters(), lr=3e-3)
            for _ in range(30):
                loss = trained(ids, labels=ids).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[1] < 1.5 and losses[0] == pytest.approx(losses[1], rel=0.05)
        fp8.freeze(model)
        assert sum(row.fp8 for row in fp8.summary(model)) == 8


def test_multihead_attention_keeps_its_16_bit_projection(device):
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, device=device)
    model = fp8.convert(nn.Sequential(layer), tokens=None)
    rows = {row.name: row for row in fp8.summary(model)}
    assert rows["0.linear1"].fp8 and not rows["0.self_attn.out_proj"].fp8
    assert "nn.MultiheadAttention multiplies by its weight itself" in rows["0.self_attn.out_proj"].note
    train(model, torch.randn(2, 8, 32, device=device))
    assert "never called" not in str(fp8.summary(model))
