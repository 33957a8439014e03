"""Bad input: an error that names what was expected, what came and the mend, before any kernel ran."""

import contextlib

import numpy as np
import pytest
import torch
import torch_fp8 as fp8
from oracle import E4M3, E5M2
from torch_fp8 import files
from torch_fp8.checkpoints.folder import Folder
from torch_fp8.observe.watch import read_log
from torch_fp8.tuning import file as tuning_file

ops = torch.ops.torch_fp8


def slots(device="cpu"):
    return fp8._C.new_slots(torch.device(device))


def unaligned(t: torch.Tensor) -> torch.Tensor:
    """The same values, 4 bytes off a 16-byte boundary."""
    storage = torch.empty(t.numel() + 4, dtype=t.dtype, device=t.device)
    return storage[4 // t.element_size() :][: t.numel()].view(t.shape).copy_(t)


class TestQuantize:
    x = torch.randn(16, 32)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float8_e4m3fn, torch.complex64])
    def test_input_dtype(self, device, dtype):
        x = torch.zeros(16, 32, device=device, dtype=torch.float32).to(dtype)
        with pytest.raises(TypeError, match=r"x must be bfloat16, float16 or float32, got .*cast it"):
            ops.quantize(x, slots(device), 0, E4M3)

    def test_output_dtype(self, device):
        with pytest.raises(TypeError, match="dtype must be float8_e4m3fn or float8_e5m2, got Half"):
            ops.quantize(self.x.to(device), slots(device), 0, torch.float16)

    @pytest.mark.parametrize(
        "bad",
        [
            lambda s: s[:, :3],
            lambda s: s.flatten(),
            lambda s: s.double(),
            lambda s: s.t().contiguous().t(),
            lambda s: s[:0],
        ],
        ids=["three columns", "flat", "double", "strided", "no rows"],
    )
    def test_slots(self, device, bad):
        with pytest.raises(RuntimeError, match=r"slots must be a contiguous float32 tensor of shape \(roles, 4\), got"):
            ops.quantize(self.x.to(device), bad(slots(device)), 0, E4M3)

    def test_unaligned_slots(self, device):
        with pytest.raises(RuntimeError, match=r"slots must start at a 16-byte boundary.*use slots.clone\(\)"):
            ops.quantize(self.x.to(device), unaligned(slots(device)), 0, E4M3)

    @pytest.mark.parametrize("role", [-1, 3])
    def test_role(self, device, role):
        with pytest.raises(IndexError, match=rf"role must be in \[0, 3\), got {role}"):
            ops.quantize(self.x.to(device), slots(device), role, E4M3)

    def test_margin_scalar_and_sparse(self, device):
        with pytest.raises(ValueError, match=r"margin must be in \[0, 31\], got 32"):
            ops.quantize(self.x.to(device), slots(device), 0, E4M3, own_amax=True, margin=32)
        with pytest.raises(RuntimeError, match="at least one dimension, got a scalar"):
            ops.quantize(torch.tensor(1.0, device=device), slots(device), 0, E4M3)

    def test_nothing_was_recorded(self, device):
        state = slots(device)
        before = state.clone()
        with pytest.raises(IndexError):
            ops.quantize(self.x.to(device), state, 7, E4M3)
        assert torch.equal(state, before)


class TestGemm:
    def call(self, device, op="gemm", **changes):
        arguments = {
            "a": torch.ones(16, 32, device=device).to(E4M3), "b": torch.ones(48, 32, device=device).to(E4M3),
            "a_scale_inv": torch.ones(1, device=device), "b_scale_inv": torch.ones(1, device=device),
        }  # fmt: skip
        if op == "gemm":
            arguments |= {"bias": None, "size": [16, 48], "dtype": torch.bfloat16}
        else:
            arguments = {"out": torch.zeros(16, 48, device=device), **arguments}
        arguments |= {k: v(arguments[k]) if callable(v) else v for k, v in changes.items()}
        return getattr(ops, op)(**arguments)

    @pytest.mark.parametrize(
        "changes, error, match",
        [
            ({"a": lambda a: a.view(torch.uint8)}, TypeError, "a must be float8_e4m3fn or float8_e5m2, got Byte"),
            ({"a": lambda a: a.to(torch.float32).to(E5M2), "b": lambda b: b.to(torch.float32).to(E5M2)}, RuntimeError,
             "a and b are both float8_e5m2"),
            ({"a": lambda a: a[:, :16].contiguous()}, RuntimeError, r"as many columns .*got \[16, 16\] and \[48, 32\]"),
            ({"b": lambda b: b.t()}, RuntimeError, "b must be a contiguous, 16-byte aligned matrix"),
            ({"a": lambda a: a[:, :24].contiguous()}, RuntimeError, "columns are a multiple of 16, got"),
            ({"size": [17, 48]}, RuntimeError, r"a must have at least the 17 rows that .* needs, got \[16, 32\]"),
            ({"size": [16, 49]}, RuntimeError, r"b must have at least the 64 rows that .* needs, got \[48, 32\]"),
            ({"size": []}, RuntimeError, "size must name at least the output's columns"),
            ({"a_scale_inv": lambda s: s.double()}, RuntimeError, "a_scale_inv must be one float32, got Double"),
            ({"a_scale_inv": lambda s: s.expand(2)}, RuntimeError, "a_scale_inv must be one float32"),
            ({"b_scale_inv": unaligned}, RuntimeError, r"b_scale_inv must lie at a 16-byte boundary .*use .clone\(\)"),
            ({"dtype": torch.float64}, TypeError, "the output must be bfloat16, float16 or float32, got Double"),
            ({"bias": torch.zeros(48)}, RuntimeError, r"bias must be BFloat16 of shape \[48\], got Float \[48\]"),
            ({"bias": torch.zeros(47).bfloat16()}, RuntimeError, r"bias must be .* got BFloat16 \[47\]"),
        ],
    )  # fmt: skip
    def test_arguments(self, device, changes, error, match):
        changes = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in changes.items()}
        with pytest.raises(error, match=match):
            self.call(device, **changes)

    @pytest.mark.parametrize(
        "out, error, match",
        [
            (lambda o: o.half(), TypeError, "out must be float32 or bfloat16 to be accumulated into, got Half"),
            (lambda o: torch.zeros(48, 16, device=o.device).t(), RuntimeError, "out must be contiguous"),
            (unaligned, RuntimeError, "start at a 16-byte boundary"),
            (lambda o: o[:, ::2], RuntimeError, "out must be contiguous"),
        ],
    )
    def test_accumulator(self, device, out, error, match):
        with pytest.raises(error, match=match):
            self.call(device, "gemm_accumulate_", out=out)


class TestLinear:
    def test_dtypes(self, device):
        layer = fp8.Linear(32, 48, device=device, dtype=torch.bfloat16)
        with pytest.raises(TypeError, match=r"the input is Float but the weight is BFloat16; .*torch.autocast"):
            layer(torch.randn(4, 32, device=device))
        with pytest.raises(TypeError, match="the input must be bfloat16, float16 or float32, got Int"):
            layer(torch.zeros(4, 32, device=device, dtype=torch.int32))
        with pytest.raises(TypeError, match=r"the input is Half but the weight is BFloat16"):
            layer(torch.zeros(4, 32, device=device, dtype=torch.float16))
        with pytest.raises(TypeError, match="the weight must be .* got Double"):
            layer.double()(torch.randn(4, 32, device=device))
        layer.float().bias.data = layer.bias.data.half()
        with pytest.raises(TypeError, match="the bias is Half but the weight is Float"):
            layer(torch.randn(4, 32, device=device))

    @pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
    @pytest.mark.parametrize("frozen", [False, True])
    def test_tensors_that_are_not_dense(self, device, frozen):
        layer = torch.nn.Linear(32, 48, device=device)
        fp8.freeze(layer) if frozen else fp8.convert(layer, tokens=None)
        parts = [torch.randn(rows, 32, device=device) for rows in (3, 5)]
        with torch.no_grad():
            with pytest.raises(RuntimeError, match=r"must be a dense tensor, got a nested one; use .values\(\)"):
                layer(torch.nested.nested_tensor(parts))
            with pytest.raises(RuntimeError, match=r"must be a dense .*to_dense\(\)"):
                layer(parts[0].to_sparse())
            jagged = torch.nested.nested_tensor(parts, layout=torch.jagged)
            with pytest.raises(RuntimeError, match="frozen_linear" if frozen else "got a nested one"):
                layer(jagged)
            assert layer(jagged.values()).shape == (8, 48)

    def test_shapes(self, device):
        layer = fp8.Linear(32, 48, device=device)
        with pytest.raises(RuntimeError, match=r"in_features = 32, got an input of shape \[4, 33\]"):
            layer(torch.randn(4, 33, device=device))
        with pytest.raises(RuntimeError, match=r"in_features = 32, got an input of shape \[\]"):
            layer(torch.tensor(1.0, device=device))

    def test_state_replaced_by_something_else(self, device):
        layer = fp8.Linear(32, 48, device=device)
        with pytest.raises(AttributeError):
            layer.fp8_slots = torch.zeros(2, 4, device=device)
        layer.fp8_state.slots = torch.zeros(2, 4, device=device)
        with pytest.raises(RuntimeError, match=r"slots must be a contiguous float32 tensor of shape \(3, 4\), got"):
            layer(torch.randn(4, 32, device=device))

    def test_an_error_records_nothing(self, device):
        layer = fp8.Linear(32, 48, device=device)
        before = layer.fp8_slots.clone()
        with pytest.raises(RuntimeError):
            layer(torch.randn(4, 33, device=device))
        assert torch.equal(layer.fp8_slots, before) and layer.fp8_state.memo.used_roles == 0

    def test_devices(self, cuda):
        layer = fp8.Linear(32, 48, device=cuda)
        with pytest.raises(RuntimeError, match="the input is on cpu but the weight is on cuda:0; move both"):
            layer(torch.randn(4, 32))
        with pytest.raises(RuntimeError, match="slots is on cuda:0 but x is on cpu"):
            ops.quantize(torch.randn(4, 32), slots(cuda), 0, E4M3)


class TestUpdate:
    @pytest.mark.parametrize(
        "changes, match",
        [
            (
                {"targets": [448.0]},
                "1 layers with 3 roles need a target for each role and a power_of_two for each .*, got 1 and 1",
            ),
            ({"targets": [448.0, 0.0, 1.0]}, r"a target must be in \(0, 57344\], got 0"),
            ({"targets": [448.0, float("nan"), 1.0]}, "a target must be"),
            ({"histories": [torch.zeros(2, 4)]}, r"a history must be .* shape \(3, length\), got Float \[2, 4\]"),
            ({"histories": [torch.zeros(3, 0)]}, "a history must be"),
            ({"slots": [torch.zeros(2, 4)]}, r"a history must be .* shape \(2, length\), got Float \[3, 4\]"),
        ],
    )
    def test_arguments(self, device, changes, match):
        arguments = {"slots": [slots()], "histories": [torch.zeros(3, 4)], "targets": [448.0] * 3, "power_of_two": [0]}
        arguments |= changes
        for name in ("slots", "histories"):
            arguments[name] = [t.to(device) for t in arguments[name]]
        with pytest.raises((RuntimeError, ValueError), match=match):
            ops.update_scales_(**arguments)

    def test_model_without_fp8_layers(self):
        with pytest.raises(ValueError, match="Linear has no FP8 layer to update; torch_fp8.convert it first"):
            fp8.update_scales(torch.nn.Linear(4, 4))


@pytest.mark.parametrize("name", ["activations", "convert", "disabled", "freeze", "fuse", "monitor", "reduce_amaxes",
                                  "revert", "state_dict", "summary", "unfuse", "update_scales", "watch"])  # fmt: skip
@pytest.mark.parametrize("model", [None, [torch.nn.Linear(16, 16)]])
def test_what_is_no_model_is_refused(name, model):
    with pytest.raises(ValueError, match="torch_fp8: model must be an nn.Module, got"), contextlib.ExitStack() as stack:
        of = getattr(fp8, name)(model)
        stack.enter_context(of)  # disabled begins here


def test_what_is_no_model_is_refused_beside_another_argument(tmp_path):
    for name, other in (("calibrate", []), ("load_state_dict", {}), ("save_pretrained", tmp_path / "out")):
        with pytest.raises(ValueError, match="torch_fp8: model must be an nn.Module, got None"):
            getattr(fp8, name)(None, other)
    with pytest.raises(TypeError, match="torch_fp8: share_input takes FP8 layers, got NoneType; convert it first"):
        fp8.share_input(None)


RECIPES = {
    "Linear": lambda recipe: fp8.Linear(16, 16, recipe=recipe),
    "MLP": lambda recipe: fp8.MLP(16, 16, recipe=recipe),
    "Attention": lambda recipe: fp8.Attention(32, 2, recipe=recipe),
    "TransformerBlock": lambda recipe: fp8.TransformerBlock(32, 2, 32, recipe=recipe),
    "ScaledDotProductAttention": lambda recipe: fp8.ScaledDotProductAttention(recipe),
    "convert": lambda recipe: fp8.convert(torch.nn.Linear(16, 16), recipe, tokens=None),
}


@pytest.mark.parametrize("of", RECIPES)
@pytest.mark.parametrize("recipe", ["x", 3, fp8.DelayedScaling])
def test_what_is_no_recipe_is_refused(of, recipe):
    with pytest.raises(TypeError, match="torch_fp8: recipe must be a DelayedScaling, CurrentScaling or ConstantScal"):
        RECIPES[of](recipe)


SIZES = {
    "in_features": [lambda n: fp8.Linear(n, 3), lambda n: fp8.FrozenLinear(n, 3)],
    "out_features": [lambda n: fp8.Linear(3, n), lambda n: fp8.FrozenLinear(3, n)],
    "hidden_size": [lambda n: fp8.MLP(n, 16), lambda n: fp8.Attention(n, 2), lambda n: fp8.TransformerBlock(n, 2, 16)],
    "intermediate_size": [lambda n: fp8.MLP(16, n), lambda n: fp8.TransformerBlock(32, 2, n)],
    "num_heads": [lambda n: fp8.Attention(32, n), lambda n: fp8.TransformerBlock(32, n, 16)],
    "num_kv_heads": [lambda n: fp8.Attention(32, 2, num_kv_heads=n)],
    "head_dim": [lambda n: fp8.Attention(32, 2, head_dim=n)],
    "dim": [fp8.RMSNorm, fp8.LayerNorm],
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("size", [None, "a", -1, True, 2.5, (2, 16)])
def test_what_is_no_size_is_refused(name, size):
    if size is None and name in ("num_kv_heads", "head_dim"):
        return  # as the other sizes say
    for make in SIZES[name]:
        with pytest.raises(ValueError, match=f"torch_fp8: {name} must be a whole number of at least 0, got"):
            make(size)


def test_sizes_that_torch_takes_are_sizes():
    size = np.int64(32)
    assert fp8.Linear(size, torch.tensor(3)).weight.shape == fp8.FrozenLinear(size, 3).weight.shape == (3, 32)
    assert fp8.TransformerBlock(size, 2, size)(torch.ones(1, 2, 32)).shape == (1, 2, 32)
    assert fp8.RMSNorm((32,)).weight.shape == fp8.LayerNorm([size]).weight.shape == (32,)
    assert fp8.FrozenLinear(32, 0)(torch.ones(2, 32)).shape == (2, 0)


OPTIONS = [
    (lambda **o: fp8.convert(torch.nn.Linear(16, 16), tokens=None, **o), ["auto_update", "fuse_main_grad"]),
    (lambda **o: fp8.fuse(fp8.MLP(16, 16), **o), ["recompute"]),
    (lambda **o: fp8.Linear(16, 16, **o), ["auto_update", "fuse_main_grad"]),
    (lambda **o: fp8.MLP(16, 16, **o), ["gated", "recompute"]),
    (lambda **o: fp8.TransformerBlock(32, 2, 16, **o), ["norm_first", "gated", "recompute"]),
    (fp8.ScaledDotProductAttention, ["shared_scale", "auto_update"]),
    (fp8.DelayedScaling, ["power_of_two"]),
    (fp8.CurrentScaling, ["power_of_two"]),
]


@pytest.mark.parametrize("call, names", OPTIONS)
@pytest.mark.parametrize("value", ["False", None, 1])
def test_what_is_no_bool_is_refused(call, names, value):
    for name in names:
        with pytest.raises(ValueError, match=f"torch_fp8: {name} must be a bool, got {value!r}"):
            call(**{name: value})


@pytest.mark.parametrize("value", [None, 0, 1])
def test_a_bias_may_be_said_as_with_nn_linear(value):
    """As configurations have it."""
    for make in (torch.nn.Linear, fp8.Linear, fp8.FrozenLinear):
        assert (make(16, 16, bias=value).bias is not None) == bool(value)


def test_a_wrong_option_leaves_the_model_as_it_was():
    model = torch.nn.Sequential(torch.nn.Linear(16, 16))
    for change in ({"recipe": "x"}, {"fuse_main_grad": "x"}, {"auto_update": 1}, {"filter": 3}):
        with pytest.raises((ValueError, TypeError), match="torch_fp8: "):
            fp8.convert(model, tokens=None, **change)
    assert type(model[0]) is torch.nn.Linear


@pytest.mark.parametrize(
    "swap",
    [lambda model, names: fp8.convert(model, filter=names), lambda model, names: fp8.freeze(model, filter=names)],
)
def test_filter(swap):
    with pytest.raises(TypeError, match=r"filter must be a function of \(module, name\) or a list of names, got 3"):
        swap(torch.nn.Sequential(torch.nn.Linear(16, 16)), 3)
    names = (name for name in ["0"])
    assert type(swap(torch.nn.Sequential(torch.nn.Linear(16, 16)), names)[0]) is not torch.nn.Linear


@pytest.mark.parametrize("batches", [None, 3])
def test_batches(batches):
    model = torch.nn.Sequential(torch.nn.Linear(16, 16)).train()
    with pytest.raises(TypeError, match="torch_fp8: batches must be inputs of the model, one after the other, got"):
        fp8.calibrate(model, batches)
    assert model.training


def test_batches_by_index():
    """What a for loop takes, such as a map-style dataset of torch."""

    class Rows:
        def __getitem__(self, index):
            return torch.ones(2, 16)[index : index + 1] if index < 2 else [][index]

    model = fp8.calibrate(torch.nn.Sequential(torch.nn.Linear(16, 16)), Rows())
    fp8.freeze(model, activations="static")


@pytest.mark.parametrize("path", [None, 3, True, b"x", ["x"]])
def test_what_is_no_path_is_refused(path):
    for call in (files.check_free, Folder, read_log, lambda path: tuning_file.read(path, {})):
        with pytest.raises(TypeError, match="torch_fp8: a path must be a str or an os.PathLike, got "):
            call(path)
    for writing in (files.replacing, files.new_folder):
        with pytest.raises(TypeError, match="torch_fp8: a path must be a str or an os.PathLike, got "), writing(path):
            raise AssertionError


def test_a_checkpoint_of_another_library_is_refused(tmp_path):
    pytest.importorskip("transformers")
    model = fp8.freeze(torch.nn.Sequential(torch.nn.Linear(16, 16)))
    with pytest.raises(ValueError, match="torch_fp8: a checkpoint holds a model of transformers, .*got Sequential"):
        fp8.save_pretrained(model, tmp_path / "out")
    assert not any(tmp_path.iterdir())
    with pytest.raises(TypeError, match="torch_fp8: a path must be a str or an os.PathLike, got None"):
        fp8.load_pretrained(None)


@pytest.mark.parametrize("model", [None, {}])
def test_a_scaling_state_of_no_model(model):
    with pytest.raises(ValueError, match="torch_fp8: model must be an nn.Module, got"):
        fp8.ScalingState(model)


@pytest.mark.parametrize("x", [None, "x", 3, [1.0]])
@pytest.mark.parametrize("make", [lambda: fp8.Linear(32, 32), lambda: fp8.Attention(32, 2)])
def test_what_is_no_tensor_is_refused(make, x):
    with pytest.raises(TypeError, match=f"torch_fp8: the input must be a tensor, got {type(x).__name__}"):
        make()(x)


def test_other_gpus_are_refused():
    if not fp8.build_info()["cuda"]:
        with pytest.raises(RuntimeError, match="built for the CPU only"):
            fp8._C.check_capability(9, 0, "NVIDIA H100")
        return
    fp8._C.check_capability(9, 0, "NVIDIA H100")
    for major, minor, name in [(8, 0, "NVIDIA A100"), (8, 9, "NVIDIA L40"), (10, 0, "NVIDIA B200")]:
        with pytest.raises(
            RuntimeError, match=rf"built for Hopper .*but {name} has {major}.{minor}; .*revert\(model\)"
        ):
            fp8._C.check_capability(major, minor, name)


def test_convert_on_a_device_that_cannot_run_it(monkeypatch):
    model = torch.nn.Linear(16, 16, device="meta")
    monkeypatch.setattr(fp8.swap.convert, "check_device", lambda device: fp8._C.check_capability(8, 0, "NVIDIA A100"))
    with pytest.raises(RuntimeError):
        fp8.convert(model, tokens=None)
    assert type(model) is torch.nn.Linear
