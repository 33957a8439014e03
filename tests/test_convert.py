"""convert, revert, disabled, summary: the same layers, in FP8 and back."""

import warnings

import pytest
import torch
import torch_fp8 as fp8
from torch import nn
from torch_fp8.swap.worth import BF16_FLOPS, FP8_FLOPS, speedup


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self, width=32, vocabulary=50, tied=False):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(2))
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def names(model):
    return [row.name for row in fp8.summary(model) if row.fp8]


BLOCKS = ["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down"]


def test_convert_keeps_what_others_hold(device):
    model = Model().to(device)
    model.layers[0].up.register_forward_hook(lambda *_: None)
    objects = [(name, module, list(module.parameters(recurse=False))) for name, module in model.named_modules()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert fp8.convert(model, tokens=None) is model
    for name, module, parameters in objects:
        assert model.get_submodule(name) is module
        assert all(a is b for a, b in zip(parameters, module.parameters(recurse=False)))
    assert len(model.layers[0].up._forward_hooks) == 1
    assert isinstance(model.layers[0].up, nn.Linear) and isinstance(model.layers[0].up, fp8.Linear)
    before = model.layers[0].up.weight.clone()
    model(torch.arange(10, device=device)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.layers[0].up.weight, before)


def test_state_dict_is_that_of_the_plain_twin_both_ways(device):
    plain, converted = Model().to(device), fp8.convert(Model().to(device), tokens=None)
    assert plain.state_dict().keys() == converted.state_dict().keys()
    assert list(plain.state_dict()) == list(converted.state_dict())
    for ours, theirs in zip(converted.state_dict().values(), plain.state_dict().values()):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    converted.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(converted.state_dict(), strict=True)
    assert all(map(torch.equal, plain.state_dict().values(), converted.state_dict().values()))


def test_default_filter_leaves_the_output_head():
    model = fp8.convert(Model(), tokens=None)
    assert names(model) == BLOCKS
    tied = Model(tied=True)
    tied.unusual_name = tied.lm_head
    del tied.lm_head
    assert names(fp8.convert(tied, tokens=None)) == BLOCKS
    declared = Model()
    declared.make_logits, declared.lm_head = declared.lm_head, None
    declared.get_output_embeddings = lambda: declared.make_logits
    assert names(fp8.convert(declared, tokens=None)) == BLOCKS
    # A block's own "output" is no head.
    block = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"output": nn.Linear(16, 16)})])})
    assert names(fp8.convert(block, tokens=None)) == ["layers.0.output"]


class Wrapped(nn.Module):
    def __init__(self, *sizes):
        super().__init__()
        self.linear = nn.Linear(*sizes)


def with_head(**modules):
    model = Model(width=32, vocabulary=50)
    del model.lm_head
    for name, module in modules.items():
        setattr(model, name, module)
    return model


@pytest.mark.parametrize(
    "model, inner",
    [
        (with_head(to_logits=nn.Linear(32, 77)), []),  # by its name
        (with_head(lm_head=Wrapped(32, 77)), []),  # by the name of what is around it
        (with_head(heads=nn.ModuleList(nn.Linear(32, 77) for _ in range(2))), []),
        (with_head(head=nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 77))), []),
        (with_head(something=nn.Linear(32, 50)), []),  # by the vocabulary
        (with_head(something=Wrapped(32, 50)), []),
        (with_head(something=nn.Linear(32, 51)), ["something"]),
        (nn.ModuleDict({"inner": with_head(something=nn.Linear(32, 50))}), []),
        (nn.ModuleList([nn.Embedding(50, 32), nn.ModuleDict({"output": nn.Linear(32, 50)})]), ["1.output"]),
    ],
)
def test_output_heads_under_other_names(model, inner):
    found = names(fp8.convert(model, tokens=None))
    assert [name for name in found if ".up" not in name and ".down" not in name] == inner
    notes = {row.note for row in fp8.summary(model) if not row.fp8}
    assert notes == (set() if inner else {"output head"})


def test_what_a_model_declares_as_its_output_embeddings_stays_wherever_it_is():
    """In a model within another one, too; and in layers of the declared module."""
    inner = with_head(something=Wrapped(32, 77))
    inner.get_output_embeddings = lambda: inner.something
    outer = nn.ModuleDict({"language_model": inner, "projector": nn.Linear(32, 32)})
    assert names(fp8.convert(outer, tokens=None)) == [*(f"language_model.{name}" for name in BLOCKS), "projector"]
    for broken in (lambda: None, lambda: 3, lambda: inner.nothing):
        model = Model()
        model.get_output_embeddings = broken
        assert names(fp8.convert(model, tokens=None)) == BLOCKS


def test_filters():
    by_function = fp8.convert(Model(), filter=lambda module, name: module.in_features == 128)
    assert names(by_function) == ["layers.0.down", "layers.1.down"]
    assert names(fp8.convert(Model(), filter=["layers.1.*", "lm_head"])) == [*BLOCKS[2:], "lm_head"]
    assert names(fp8.convert(nn.Linear(16, 16), tokens=None)) == [""]


@pytest.mark.parametrize(
    "filter, error, match",
    [
        (
            ["layers.1.*", "lm_heads"],
            ValueError,
            r"'lm_heads' matches none of the 5 linear layers; did you mean lm_head",
        ),
        (lambda module, name: False, ValueError, r"no layer of Model would be converted.*5 linear layers"),
        ([], ValueError, "no layer of Model would be converted"),
        ("lm_head", TypeError, "a function of .* or a list of names, got 'lm_head'"),
        ([3], TypeError, "a list of names"),
        (["double"], ValueError, "double .* cannot be FP8: torch.float64"),
    ],
)
def test_a_filter_that_matches_nothing_changes_nothing(filter, error, match):
    model = Model()
    if filter == ["double"]:
        model.double = nn.Linear(4, 4, dtype=torch.float64)
    with pytest.raises(error, match=match):
        fp8.convert(model, filter=filter)
    assert names(model) == [] and not hasattr(model.layers[0].up, "recipe")


def test_convert_of_nothing_and_of_a_wrong_recipe():
    with pytest.raises(ValueError, match="0 linear layers"):
        fp8.convert(nn.Sequential(nn.ReLU()))
    with pytest.raises(TypeError, match="recipe must be a DelayedScaling.*got str"):
        fp8.convert(Model(), recipe="delayed")


def test_layers_that_fp8_cannot_take_are_named_with_the_reason():
    attention = nn.MultiheadAttention(32, 2)
    model = nn.ModuleDict({"mlp": nn.Linear(32, 32), "attn": attention, "f64": nn.Linear(8, 8, dtype=torch.float64)})
    rows = {row.name: row for row in fp8.summary(fp8.convert(model, tokens=None))}
    assert rows["mlp"].fp8
    assert "nn.MultiheadAttention multiplies by its weight itself" in rows["attn.out_proj"].note
    assert "float64" in rows["f64"].note


def test_summary_prints_scales_and_reasons(device):
    model = fp8.convert(Model().to(device), recipe=fp8.DelayedScaling(amax_history_len=7), tokens=None)
    assert "own amax" in str(fp8.summary(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model(torch.arange(10, device=device)).sum().backward()
    optimizer.step()
    text = str(fp8.summary(model))
    scale = 448 / model.layers[0].up.weight.abs().max().item()
    assert f"{scale:.4g}" in text and "amax_history_len=7" in text
    assert "output head" in text and "4 of 5 linear layers in FP8" in text and "own amax" not in text


def test_revert_gives_plain_layers_back(device):
    model = Model().to(device)
    parameters = list(model.parameters())
    ids = torch.arange(10, device=device)
    expected = model(ids)
    fp8.convert(model, tokens=None)
    assert not torch.equal(model(ids), expected)
    assert fp8.revert(model) is model
    assert type(model.layers[0].up) is nn.Linear and vars(model.layers[0].up).keys() == vars(nn.Linear(1, 1)).keys()
    assert all(a is b for a, b in zip(parameters, model.parameters()))
    assert torch.equal(model(ids), expected)
    assert not list(model.buffers())


def test_disabled_is_the_16_bit_model_for_a_while(device):
    model = Model().to(device)
    ids = torch.arange(10, device=device)
    expected = model(ids)
    fp8.convert(model, tokens=None)
    in_fp8 = model(ids)
    model.layers[0].up.fp8_enabled = False
    with pytest.raises(KeyError), fp8.disabled(model) as same:
        assert same is model and torch.equal(model(ids), expected)
        assert "disabled" in str(fp8.summary(model))
        raise KeyError
    assert [m.fp8_enabled for m in model.modules() if isinstance(m, fp8.Linear)] == [False, True, True, True]
    model.layers[0].up.fp8_enabled = True
    assert torch.equal(model(ids), in_fp8)


def test_convert_again_changes_the_recipe():
    model = fp8.convert(Model(), tokens=None)
    fp8.convert(model, recipe=fp8.CurrentScaling(), filter=["layers.0.*"])
    assert [type(m.recipe).__name__ for m in model.modules() if isinstance(m, fp8.Linear)] == [
        "CurrentScaling", "CurrentScaling", "DelayedScaling", "DelayedScaling",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "tokens, in_features, out_features, pays",
    [
        (8192, 4096, 4096, True),
        (8192, 4096, 1024, True),  # keys and values of Llama 3 8B
        (2048, 4096, 14336, True),
        (50176, 768, 768, True),  # GPT-2 124M in large micro-batches
        (50176, 768, 2304, True),
        (512, 1024, 1024, False),
        (128, 4096, 14336, False),  # the weight's cast alone costs what the GEMMs save
        (2048, 2048, 2048, False),  # faster on the GPU, which waits for the host
        (10**6, 256, 256, False),  # too narrow, however many the tokens
        (1, 1, 1, False),
    ],
)
def test_which_sizes_pay(tokens, in_features, out_features, pays):
    assert (speedup(tokens, in_features, out_features) > 1) == pays
    assert speedup(tokens, out_features, in_features) == pytest.approx(speedup(tokens, in_features, out_features))


def test_more_tokens_never_make_fp8_lose():
    for width in (256, 768, 1024, 4096, 14336):
        for out in (256, 768, 1024, 4096, 14336):
            pays = [speedup(2**i, width, out) > 1 for i in range(24)]
            assert pays == sorted(pays), f"{width} -> {out}: {pays}"
    assert 1.5 < speedup(2**20, 2**14, 2**14) < FP8_FLOPS / BF16_FLOPS


def wide_and_narrow():
    with torch.device("meta"):
        return nn.ModuleDict({"wide": nn.Linear(4096, 4096), "narrow": nn.Linear(64, 64)})


@pytest.mark.parametrize("tokens", [8192, 3000])
def test_a_layer_too_small_for_fp8_stays_in_16_bits(tokens):
    arguments = {} if tokens == 8192 else {"tokens": tokens}
    model = fp8.convert(wide_and_narrow(), **arguments)
    rows = {row.name: row for row in fp8.summary(model)}
    assert rows["wide"].fp8 and not rows["narrow"].fp8 and type(model["narrow"]) is nn.Linear
    assert rows["narrow"].note == f"too small for FP8 to be faster at {tokens} tokens"
    assert rows["narrow"].note in str(fp8.summary(model))


def test_size_does_not_matter_without_tokens_or_with_a_filter():
    assert names(fp8.convert(wide_and_narrow(), tokens=None)) == ["wide", "narrow"]
    assert names(fp8.convert(wide_and_narrow(), filter=["narrow"], tokens=1)) == ["narrow"]
    assert names(fp8.convert(wide_and_narrow(), filter=lambda module, name: True, tokens=1)) == ["wide", "narrow"]


def test_where_all_is_too_small_the_error_names_the_mend(device):
    model = Model().to(device)
    with pytest.raises(ValueError, match=r"5 linear layers \(layers.0.up: too small .* 8192 tokens;.*tokens=None"):
        fp8.convert(model)
    assert {row.note for row in fp8.summary(model)} == {"not converted"}
    with pytest.raises(ValueError, match="lm_head: output head.*; change the filter$"):
        fp8.convert(nn.ModuleDict({"lm_head": nn.Linear(64, 64)}))


@pytest.mark.parametrize("filter", [None, ["wide"]])
@pytest.mark.parametrize(
    "tokens, error", [(0, ValueError), (-8192, ValueError), (8192.0, TypeError), (True, TypeError), ("8192", TypeError)]
)
def test_impossible_tokens_change_nothing(tokens, error, filter):
    model = wide_and_narrow()
    with pytest.raises(error, match=rf"tokens must be a positive integer or None, got {tokens!r}; give the rows"):
        fp8.convert(model, filter=filter, tokens=tokens)
    assert {row.note for row in fp8.summary(model)} == {"not converted"}


def test_a_small_layer_that_is_fp8_already_stays_so_and_takes_the_new_recipe():
    model = nn.ModuleDict({"built": fp8.Linear(64, 64), "listed": nn.Linear(64, 64), "plain": nn.Linear(64, 64)})
    fp8.convert(model, filter=["listed"])
    fp8.convert(model, fp8.CurrentScaling())
    assert names(model) == ["built", "listed"]
    assert model["built"].recipe == model["listed"].recipe == fp8.CurrentScaling()
    assert "too small" in fp8.summary(model)[2].note
    with pytest.raises(ValueError, match="built: too small"):
        fp8.convert(fp8.revert(model))


def test_the_default_converts_all_of_llama_3_8b():
    with torch.device("meta"):
        sizes = {"q": (4096, 4096), "k": (4096, 1024), "v": (4096, 1024), "o": (4096, 4096),
                 "gate": (4096, 14336), "up": (4096, 14336), "down": (14336, 4096)}  # fmt: skip
        block = nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})
        model = nn.ModuleDict({"layers": nn.ModuleList([block]), "lm_head": nn.Linear(4096, 128256, bias=False)})
    assert names(fp8.convert(model.bfloat16())) == [f"layers.0.{name}" for name in sizes]


def test_tied_layers_and_a_layer_in_two_places(device):
    shared = nn.Linear(32, 32)
    twin = nn.Linear(32, 32)
    twin.weight = shared.weight
    model = fp8.convert(nn.Sequential(shared, nn.ReLU(), shared, twin).to(device), tokens=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert model[0].weight is model[3].weight
    for _ in range(3):
        model(torch.randn(8, 32, device=device)).square().sum().backward()
        optimizer.step()
    assert torch.equal(model[0].fp8_slots[1], model[3].fp8_slots[1])  # both saw the same weight
    assert model[0].fp8_slots[0, 3] == 3


@pytest.mark.parametrize(
    "recipe, arguments, match",
    [
        (fp8.DelayedScaling, {"fp8_format": "E5M2"}, "fp8_format must be 'HYBRID' or 'E4M3', got 'E5M2'"),
        (fp8.DelayedScaling, {"amax_history_len": 0}, "amax_history_len must be an integer from 1 .*got 0"),
        (fp8.DelayedScaling, {"amax_history_len": 16.0}, "amax_history_len"),
        (fp8.DelayedScaling, {"amax_compute_algo": "mean"}, "amax_compute_algo must be 'max' or 'most_recent'"),
        (fp8.DelayedScaling, {"margin": -1}, "margin must be an integer from 0 to 31, got -1"),
        (fp8.DelayedScaling, {"margin": True}, "margin"),
        (fp8.DelayedScaling, {"power_of_two": 1}, "power_of_two must be a bool"),
        (fp8.DelayedScaling, {"fast_accum": ("forward",)}, "fast_accum must be names out of"),
        (fp8.CurrentScaling, {"grad_margin": 32}, "grad_margin"),
        (fp8.ConstantScaling, {"bias": 32}, "bias must be an integer from -31 to 31, got 32"),
        (fp8.ConstantScaling, {"bias": 0.5}, "bias"),
    ],
)
def test_impossible_recipes(recipe, arguments, match):
    with pytest.raises(ValueError, match=match):
        recipe(**arguments)


def test_a_forward_replaced_on_the_object_would_hide_ours():
    """accelerate's hooks do that; a changed class would not be seen."""
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    plain = model[0].forward
    model[0].forward = lambda x: plain(x)
    fp8.convert(model, tokens=None)
    assert type(model[0]) is nn.Linear and isinstance(model[1], fp8.Linear)
    assert "accelerate's device_map" in fp8.summary(model)[0].note
    with pytest.raises(ValueError, match="forward was replaced"):
        fp8.convert(model, filter=["0"])
    fp8.revert(model)
    assert type(model[1]) is nn.Linear


def test_a_hooked_fp8_layer_takes_a_recipe_and_is_not_reverted():
    """accelerate's hook holds the FP8 layer's forward."""
    model = fp8.convert(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), tokens=None)
    plain = model[1].forward
    model[1].forward = lambda x: plain(x)
    with pytest.raises(ValueError, match="1 cannot be reverted: its forward was replaced on the object"):
        fp8.revert(model)
    assert isinstance(model[0], fp8.Linear) and isinstance(model[1], fp8.Linear)
    fp8.convert(model, fp8.CurrentScaling())
    assert model[1].recipe == fp8.CurrentScaling()
    del model[1].forward
    assert type(fp8.revert(model)[1]) is nn.Linear


@pytest.mark.parametrize("frozen_too", [["layers.1.down"], ["*up", "*down", "lm_head"]])
def test_a_frozen_layer_has_no_16_bit_weight_to_go_back_to(frozen_too):
    model = fp8.convert(Model(), tokens=None)
    fp8.freeze(model, filter=frozen_too)
    before = [type(module) for module in model.modules()]
    name = "layers.1.down" if len(frozen_too) == 1 else "layers.0.up"
    with pytest.raises(ValueError, match=f"revert needs 16-bit weights, but {name} is frozen"):
        fp8.revert(model)
    with pytest.raises(ValueError, match=f"disabled needs 16-bit weights, but {name} is frozen"), fp8.disabled(model):
        raise AssertionError("not reached")
    assert before == [type(module) for module in model.modules()]
    assert all(layer.fp8_enabled for layer in model.modules() if isinstance(layer, fp8.Linear))


class ReadsWeights(nn.Module):
    """As timm's attentions do: one layer is called, of another the weight is used."""

    def __init__(self):
        super().__init__()
        self.called, self.read = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return self.called(x) + nn.functional.linear(x, self.read.weight, self.read.bias)


NEVER = "never called in {} training steps"


@pytest.mark.parametrize("recipe", [fp8.DelayedScaling(), fp8.CurrentScaling(), fp8.ConstantScaling()])
def test_summary_says_what_was_never_called(recipe, device):
    model = fp8.convert(ReadsWeights().to(device), recipe, tokens=None)
    assert "never called" not in str(fp8.summary(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        model(torch.randn(8, 32, device=device)).sum().backward()
        optimizer.step()
    rows = {row.name: row for row in fp8.summary(model)}
    assert NEVER.format(3) in rows["read"].note and "never called" not in rows["called"].note
    with torch.no_grad():
        model.eval()(torch.randn(8, 32, device=device))
    assert NEVER.format(3) in str(fp8.summary(model))


@pytest.mark.parametrize("recipe", [fp8.DelayedScaling(), fp8.CurrentScaling(), fp8.ConstantScaling()])
def test_a_training_in_eval_is_said(recipe, device):
    """transformers' from_pretrained gives models so, and a loop may not call train()."""
    model = fp8.convert(nn.Sequential(nn.Linear(32, 32)).to(device), recipe, tokens=None).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        optimizer.step()  # of nothing
        assert not said
        model(torch.randn(8, 32, device=device)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        model.train()(torch.randn(8, 32, device=device)).sum().backward()
        optimizer.step()
    messages = [str(one.message) for one in said]
    assert len(messages) == isinstance(recipe, fp8.DelayedScaling)
    assert all("trained in eval()" in message and "Call model.train() before" in message for message in messages)


def test_summary_asks_whether_it_was_in_eval():
    model = fp8.convert(nn.Sequential(nn.Linear(32, 32)), fp8.CurrentScaling(), tokens=None).eval()
    model(torch.randn(8, 32)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    asked = " Or was it in eval(), as it is now?"
    assert NEVER.format(1) in str(fp8.summary(model)) and asked in str(fp8.summary(model))
    assert asked not in str(fp8.summary(model.train()))


def test_summary_says_what_was_never_called_where_no_optimizer_holds_it():
    """Layers that are not trained go with their model; and where nothing was called, the optimizer's steps tell."""
    model = fp8.convert(ReadsWeights(), tokens=None)
    model.read.requires_grad_(False)
    optimizer = torch.optim.SGD(model.called.parameters(), lr=0.01)
    model(torch.randn(8, 32)).sum().backward()
    optimizer.step()
    assert [NEVER.format(1) in row.note for row in fp8.summary(model)] == [False, True]
    model = fp8.convert(ReadsWeights(), filter=["read"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        model(torch.randn(8, 32)).sum().backward()
        optimizer.step()
    assert NEVER.format(2) in fp8.summary(model)[1].note


def test_summary_says_what_was_never_called_in_compiled_steps(device):
    model = fp8.convert(ReadsWeights().to(device), tokens=None)
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        compiled(torch.randn(8, 32, device=device)).sum().backward()
        optimizer.step()
    assert [NEVER.format(3) in row.note for row in fp8.summary(model)] == [False, True]


def test_summary_in_a_notebook():
    model = fp8.convert(nn.ModuleDict({"a<b": nn.Linear(32, 32), "lm_head": nn.Linear(32, 48)}), tokens=None)
    html = fp8.summary(model)._repr_html_()
    assert html.count("<tr>") == 3 and "<td>a&lt;b</td><td>32 x 32</td><td>yes</td><td>own amax</td>" in html
    assert "output head" in html and "1 of 2 linear layers in FP8" in html and "a<b" not in html
