"""models/fog.py: every architecture against plain FP64 that is written here anew, in FP8 against itself in BF16, and
through examples/train.py."""

import copy
import dataclasses
import json
import math
import re
import sys

import pytest
import torch
import torch_fp8 as fp8
from scripts import script
from test_train_example import run
from torch import nn
from torch.nn import functional as F
from torch_fp8.layers.fused import FusedBlock, FusedMlp, fused_modules

from models import gpt, llama
from models.decoder import Decoder
from models.fog import LM, XIELU, Block
from models.fog_config import ARCHITECTURES, SIZES, Architecture, Shape, architecture
from models.fog_fp8 import to_fp8
from models.llama import rotation_of
from models.names import named, parameter_count

train = script("examples/train.py")

TINY = Shape(layers=4, hidden=32, ffn=48, heads=4, kv_heads=2, head=8, scale=0.3)
TOKENS = 7


# ---- the block in FP64 -----------------------------------------------------------------------------------------------


def angles(tokens, head):
    """Of Llama 3.1, as its authors print them: by wavelengths."""
    found = []
    for i in range(head // 2):
        frequency = 500_000 ** (-2 * i / head)
        wavelength = 2 * math.pi / frequency
        if wavelength > 8192 / 1:
            frequency /= 8
        elif wavelength > 8192 / 4:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            frequency = (1 - smooth) * frequency / 8 + smooth * frequency
        found.append(frequency)
    return torch.outer(torch.arange(tokens, dtype=torch.float64), torch.tensor(found, dtype=torch.float64))


def rms(x, gain=None):
    y = x * x.shape[-1] ** 0.5 / (x.square().sum(-1, keepdim=True) + 1e-5 * x.shape[-1]).sqrt()
    return y if gain is None else gain * y


def turned(x):
    """(batch, tokens, dims): element i and its partner in the other half are a complex number."""
    half = x.shape[-1] // 2
    z = torch.complex(x[..., :half], x[..., half:])
    z = z * torch.polar(torch.ones((), dtype=torch.float64), angles(x.shape[1], x.shape[2]))
    return torch.cat([z.real, z.imag], -1)


def attended(p, x, qk, scale, shape):
    makes = {name: x @ p[f"attention.{name}.weight"].T for name in "qkv"}
    results = []
    for head in range(shape.heads):
        of = {"q": head, "k": head * shape.kv_heads // shape.heads, "v": head * shape.kv_heads // shape.heads}
        q, k, v = (makes[name][..., i * shape.head : (i + 1) * shape.head] for name, i in of.items())
        if qk == "rms":
            q, k = rms(q, p["attention.q_gain"]), rms(k, p["attention.k_gain"])
        elif qk == "frozen_rms":
            q, k = rms(q), rms(k)
        elif qk == "tanh":
            q, k = (p["attention.q_gain"] * q).tanh(), (p["attention.k_gain"] * k).tanh()
        scores = scale * turned(q) @ turned(k).mT
        future = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        results.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v)
    return torch.cat(results, -1) @ p["attention.o.weight"].T


def fed(p, x, activation):
    up = x @ p["ffn.up.weight"].T
    if activation == "gelu":
        product = up * (1 + torch.erf(up / 2**0.5)) / 2
    elif activation == "xielu":
        above = (1 + p["ffn.activation.a_p"].exp()).log() * up**2
        below = (0.5 + (1 + p["ffn.activation.a_n"].exp()).log()) * (up.clamp(max=0).exp() - 1 - up)
        product = torch.where(up > 0, above, below) + up / 2
    else:  # the smooth ones are the same function
        gate = x @ p["ffn.gate.weight"].T
        product = gate / (1 + (-gate).exp()) * up
    return product @ p["ffn.down.weight"].T


def plain_block(arch, shape, p, x):
    """p: parameters by name, float64."""

    def post(name, y):
        gain = p.get(f"{name}_post.weight")
        return y if gain is None else gain * y if arch.post == "layer_scale" else rms(y, gain)

    def pre(name, y):
        return rms(y, p[f"{name}_pre.weight"]) if arch.pre_norm else y

    scale = shape.scale if arch.own_scale else shape.head**-0.5
    h = x + post("attention", attended(p, pre("attention", x), arch.qk, scale, shape))
    return h + post("ffn", fed(p, pre("ffn", h), arch.activation))


def stirred(module):
    """Gains that are not 1, and weights so large that every part of a block matters."""
    for i, (_, p) in enumerate(module.named_parameters()):
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise * p.shape[1] ** -0.5 if p.dim() == 2 else p * (1 + 0.2 * noise))
    return module


def of_reference(arch, shape, block, x, dy):
    p = {name: value.detach().double().requires_grad_() for name, value in block.named_parameters()}
    x = x.detach().double().requires_grad_()
    y = plain_block(arch, shape, p, x)
    return y.detach(), torch.autograd.grad(y, [x, *p.values()], dy.double())


def of_block(block, x, dy, shape):
    x = x.detach().clone().requires_grad_()
    like = torch.empty(0, dtype=torch.float32)
    y = block(x, *rotation_of(x.shape[1], shape.head, like, 8.0))
    return y.detach(), torch.autograd.grad(y, [x, *block.parameters()], dy.to(y.dtype))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_block_is_what_the_paper_says(name):
    arch, x, dy = ARCHITECTURES[name], torch.randn(2, TOKENS, 32).double(), torch.randn(2, TOKENS, 32).double()
    block = stirred(Block(arch, TINY)).double()
    y, gradients = of_block(block, x, dy, TINY)
    expected, expected_gradients = of_reference(arch, TINY, block, x, dy)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)  # cos and sin are float32
    for of, a, b in zip(["x", *dict(block.named_parameters())], gradients, expected_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * b.abs().max().item(), msg=lambda m, of=of: f"{of}: {m}")


@pytest.mark.parametrize("attention", ["16bit", "fp8"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_block_in_fp8_is_near_fp64(name, attention):
    """BF16, with linear layers and attention in FP8, fused. Rounding to E4M3 moves a tensor by 2.6 % of its norm, to
    E5M2 by 5.2 %, so a product of two moves by 3.7 or 5.8 %; a branch is two or three such products in a chain, and a
    gradient at most six: 9 and 14 % where errors add up as squares do. Twice that is a bound for a few numbers."""
    arch, shape = ARCHITECTURES[name], SIZES["tiny"]
    model = LM(arch, shape, vocab=64).bfloat16()
    stirred(model.blocks[0])
    to_fp8(model, attention=attention)
    block = model.blocks[0]
    x, dy = torch.randn(2, 33, 256).bfloat16(), torch.randn(2, 33, 256).bfloat16()
    y, gradients = of_block(block, x, dy, shape)
    expected, expected_gradients = of_reference(arch, shape, block, x, dy)
    assert 0 < (y - expected).norm() / expected.norm() < 0.1
    names = ["x", *dict(block.named_parameters())]
    errors = {
        of: ((a - b).norm() / b.norm()).item()
        for of, a, b in zip(names, gradients, expected_gradients, strict=True)
        if b.numel() > 1  # a sum of all elements cancels
    }
    assert max(errors.values()) < 0.3, errors
    if attention != "16bit":
        assert block.attention.attend.last[0] == attention and block.attention.attend.fp8_state.shared_scale


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fuse_takes_what_has_a_norm_and_no_smoothing(name):
    arch, model = ARCHITECTURES[name], to_fp8(LM(name, SIZES["tiny"], vocab=64))
    kinds = {n: type(module) for n, module in fused_modules(model).items()}
    assert issubclass(kinds.get("blocks.0", nn.Module), FusedBlock) == (arch.post != "layer_scale")
    assert issubclass(kinds.get("blocks.1.ffn", nn.Module), FusedMlp) == ("smooth" not in arch.activation)
    rows = {row.name: row.fp8 for row in fp8.summary(model)}
    assert rows.pop("head") is False and all(rows.values()) and len(rows) == (14 if arch.gated else 12)
    groups = model.blocks[0].attention
    assert groups.q.fp8_state.group is groups.k.fp8_state.group is groups.v.fp8_state.group is not None


def test_ffns_alone_can_be_fused():
    model = to_fp8(LM("fog-opt", SIZES["tiny"], vocab=64), fuse="ffn")
    assert list(fused_modules(model)) == ["blocks.0.ffn", "blocks.1.ffn"]
    assert not fused_modules(to_fp8(LM("fog-opt", SIZES["tiny"], vocab=64), fuse="none"))


# ---- sizes, numbers at the start ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size, millions", [("390M", 385.9), ("1.5B", 1543.5), ("8B", 8053.1)])
def test_as_many_parameters_as_the_paper_says(size, millions):
    def counts(name):
        with torch.device("meta"):
            model = LM(name, SIZES[size], vocab=131072)
        return [sum(p.numel() for p in model.parameters() if p.dim() == dim) for dim in (1, 2)]

    matrices = {name: counts(name)[1] for name in ("llama3", "olmo2", "op", "fog-max", "fog-flash", "fog-swiglu")}
    assert set(matrices.values()) == {matrices["llama3"]}
    shape, vectors = SIZES[size], counts("llama3")[0]
    assert round(matrices["llama3"] / 1e5) * 1e5 == pytest.approx(millions * 1e6, abs=1e5)
    assert vectors == (2 * shape.layers + 1) * shape.hidden
    assert counts("fog-max")[0] == 2 * shape.layers * (shape.hidden + 1)  # a_p and a_n
    assert counts("fog-opt")[0] == counts("op-frozen-qk")[0] == 2 * shape.layers * shape.hidden
    assert counts("fog-flash")[0] == counts("fog-max")[0]  # one alpha for q and one for k
    assert counts("olmo2")[0] == vectors + 2 * 128 * shape.layers
    assert counts("op")[0] == 2 * shape.layers * (shape.hidden + 128)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_a_model_begins_with(name):
    arch, model = ARCHITECTURES[name], LM(name, dataclasses.replace(SIZES["tiny"], layers=6, tied=False), vocab=256)
    for of, p in model.named_parameters():
        if p.dim() == 2:
            std = 0.02 / 12**0.5 if of.endswith(("attention.o.weight", "ffn.down.weight")) else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.02), of
        elif "_post" in of:
            assert torch.all(p == (6**-0.5 if name.startswith(("fog", "op")) else 1)), of
        elif "a_" not in of:
            assert torch.all(p == (0.5 if name == "fog-flash" else 1)), of
    assert model.factor == (50 if name.startswith(("fog", "op")) else 1)
    assert isinstance(model.norm, nn.Identity) == name.startswith(("fog", "op"))
    scale = model.blocks[0].attention.scale
    assert scale == pytest.approx(0.17678 if name.startswith("fog") else 128**-0.5, rel=1e-4)
    assert SIZES["390M"].scale == pytest.approx(0.17678, rel=1e-4) and SIZES["1.5B"].scale == SIZES["8B"].scale == 0.125
    assert SIZES["390M"].tied and not SIZES["1.5B"].tied
    assert model.blocks[0].ffn.up.out_features == (256 if arch.gated else 384)


def test_xielu_begins_with_both_factors_at_0_8():
    f = XIELU()
    x = torch.tensor([2.0, 0.0, -50.0])
    torch.testing.assert_close(f(x), torch.tensor([0.8 * 4 + 1, 0, 0.8 * 49 - 25]))
    assert (f.a_p.item(), f.a_n.item()) == pytest.approx((0.2034, -1.0502), abs=1e-4)


def test_the_smooth_products_are_scaled_as_they_say():
    """A token, or a channel, that is a thousand times as large as others is not in what down casts."""
    seen = {}
    for name in ("llama3-smooth-token", "llama3-smooth-channel", "llama3"):
        ffn = stirred(Block(ARCHITECTURES[name], TINY)).ffn
        with torch.no_grad():
            ffn.up.weight[3] *= 1000
            ffn.gate.weight[5] = 0  # a channel of zeros
        x = torch.randn(1, TOKENS, 32)
        x[:, 2] *= 100
        x[:, 4] = 0
        ffn.down.register_forward_pre_hook(lambda module, args, name=name: seen.__setitem__(name, args[0].detach()))
        assert ffn(x).isfinite().all()
    by_channel = seen["llama3-smooth-channel"][0].abs().amax(0)
    assert torch.all(((by_channel >= 0.5) & (by_channel < 1)) | (by_channel == 0)) and by_channel[5] == 0
    by_token, plain = (seen[name][0].abs().amax(-1) for name in ("llama3-smooth-token", "llama3"))
    assert by_token[2] / by_token[1] < 0.1 * plain[2] / plain[1]


# ---- training ------------------------------------------------------------------------------------------------------

TEXT = " ".join(f"{i} plus {j} is {i + j}." for i in range(60) for j in range(60)).encode()


def trained(model, steps=25):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator, text, losses = torch.Generator().manual_seed(0), torch.frombuffer(bytearray(TEXT), dtype=torch.uint8), []
    for _ in range(steps):
        starts = torch.randint(len(text) - 33, (8,), generator=generator)
        window = text[starts[:, None] + torch.arange(33)].long()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(window[:, :-1], window[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["llama3", "llama3-smooth-channel", "olmo2", "op", "fog-max", "fog-flash"])
def test_fp8_falls_beside_bf16(name):
    bf16 = LM(name, Shape(layers=2, hidden=128, ffn=128, heads=1, kv_heads=1), vocab=256)
    ours = to_fp8(copy.deepcopy(bf16), attention="fp8")
    of_bf16, of_fp8 = trained(bf16), trained(ours)
    last = [sum(losses[-5:]) / 5 for losses in (of_bf16, of_fp8)]
    assert last[0] < 0.5 * of_bf16[0]
    assert of_fp8 != of_bf16 and last[1] == pytest.approx(last[0], rel=0.1)


def test_disabled_is_bf16():
    model = LM("fog-opt", SIZES["tiny"], vocab=256)
    x = torch.randint(0, 256, (2, 33))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        plain = model.eval()(x[:, :-1], x[:, 1:])
        torch.testing.assert_close(F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()), plain)
        to_fp8(model, attention="fp8")
        assert model(x[:, :-1], x[:, 1:]) != plain
        with fp8.disabled(model):
            torch.testing.assert_close(model(x[:, :-1], x[:, 1:]), plain, rtol=1e-4, atol=0)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("fog") / "text.txt"
    path.write_bytes(TEXT)
    return path


SMALL = ["--size", "tiny", "--context", "32", "--batch-tokens", "64", "--eval-batches", "1", "--device", "cpu"]


def test_train_py_trains_them_with_a_cooldown_and_without_decay_of_vectors(text, tmp_path):
    out = tmp_path / "out"
    options = ["--steps", 10, "--warm-up", 2, "--cooldown", 4, "--lr", 1e-3, "--data", text, "--out", out]
    options += ["--attention", "fp8", "--shared-scale"]
    code, stdout, stderr = run("--model", "fog-max", *SMALL, *options)
    assert code == 0, stderr
    assert "fog-max tiny in BF16 and FP8, on CPU" in stdout
    for arm in ("bf16", "fp8"):
        records = [json.loads(line) for line in (out / f"{arm}.jsonl").read_text().splitlines()]
        lrs = [record["lr"] / 1e-3 for record in records if "lr" in record]
        assert lrs == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 1 - 0.25**0.5, 1 - 0.5**0.5, 1 - 0.75**0.5])
    saved = torch.load(out / "fp8.ckpt", weights_only=True)
    decays = {group["weight_decay"]: len(group["params"]) for group in saved["optimizer"]["param_groups"]}
    vectors = [value for value in saved["model"].values() if value.dim() == 1]
    assert decays == {0.1: len(saved["model"]) - len(vectors) - 1, 0.0: len(vectors)}  # the head is the embedding
    assert {"model": "fog-max", "cooldown": 4, "attention": "fp8", "shared_scale": True}.items() <= saved[
        "identity"
    ].items()
    # Gone on from there with another model, or in another mode, it would be another run.
    for other in (["--model", "fog-opt", *options], ["--model", "fog-max", *options[:-1]]):
        code, _, stderr = run(*SMALL, *other, "--resume")
        assert code == 2 and re.search(r"differs in (model|shared_scale) \(was (fog-max|True)", stderr)


def test_a_saved_gpt_is_known_by_what_it_was_known_by(text, tmp_path):
    out = tmp_path / "out"
    options = [*SMALL, "--steps", 1, "--data", text, "--out", out, "--precision", "fp8"]
    assert run(*options)[0] == 0
    identity = torch.load(out / "fp8.ckpt", weights_only=True)["identity"]
    assert set(identity) == {"size", "context", "batch_tokens", "micro_batch", "steps", "lr", "warm_up", "seed",
                             "eval_batches", "device", "data", "recipe"}  # fmt: skip
    assert run(*options, "--resume")[0] == 0
    code, _, stderr = run(*options, "--resume", "--model", "fog-opt")
    assert code == 2 and "model (was None, is fog-opt)" in stderr


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        (["--model", "fog-mux"], "got 'fog-mux'; did you mean fog-max"),
        (["--model", "LLAMA3"], "did you mean llama3"),
        (["--model", "xyz"], "--model must be one of gpt, llama3"),
        (["--model", "fog-opt", "--size", "124M"], "must be one of tiny, 25M, 100M, 200M, 390M, 1.5B, 8B, got '124M'"),
        (["--size", "8B"], "--size of --model gpt must be one of tiny, small"),
        (["--attention", "fp8"], "--attention fp8 needs a model whose attention can run in FP8"),
        (["--model", "fog-opt", "--shared-scale"], "give --attention fp8 too"),
        (["--model", "op", "--steps", 10, "--warm-up", 5, "--cooldown", 6], "--cooldown must be from 0 to --steps"),
    ],
)
def test_wrong_options_are_answered_in_one_line(tmp_path, options, words, monkeypatch, capsys):
    arguments = ["train.py", *options, "--device", "cpu", "--out", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    stderr = capsys.readouterr().err if train.main() == 2 else ""
    assert words in stderr and stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"heads": 3}, r"kv_heads must divide heads, got 2 and 3"),
        ({"heads": 8}, r"got 8 x 8 = 64 and hidden 32"),
        ({"hidden": 40}, r"must fill hidden, got 4 x 8 = 32 and hidden 40"),
        ({"layers": 0}, "layers must be a whole number of at least 1, got 0"),
        ({"ffn": 48.0}, "ffn must be a whole number of at least 1, got 48.0"),
        ({"ffn": 49}, "must be even, got 8 and 49"),
        ({"scale": float("nan")}, "scale must be positive and finite, got nan"),
        ({"scale": None}, "scale must be positive and finite, got None"),
    ],
)
def test_a_shape_that_disagrees_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"pre_norm": True, "post": "rms"}, "not both: got pre_norm=True and post='rms'"),
        ({}, "not neither: got pre_norm=False and post='none'"),
        ({"pre_norm": True, "qk": "layer"}, "qk must be one of none, rms, frozen_rms, tanh, got 'layer'"),
        ({"pre_norm": True, "activation": "relu"}, "activation must be one of swiglu"),
        ({"pre_norm": True, "small_gains": True}, "small_gains is of the gains of post"),
        ({"pre_norm": True, "own_scale": True}, 'but qk is "none"'),
    ],
)
def test_an_architecture_that_disagrees_is_refused(change, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Architecture(**change)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: LM(None, TINY, vocab=64), "an architecture's name must be of the type str, got None"),
        (lambda: LM("op", None, vocab=64), "shape must be of the type models.fog_config.Shape, got None"),
        (lambda: LM("op", llama.Shape(), vocab=64), "shape must be of the type models.fog_config.Shape, got Shape("),
        (lambda: LM("op", TINY, vocab=None), "vocab must be a whole number of at least 1, got None"),
        (lambda: gpt.GPT(None, vocab=64, context=8), "shape must be of the type models.gpt.Shape, got None"),
        (lambda: gpt.GPT(gpt.Shape(1, 2, 64), vocab=64, context=0), "context must be a whole number of at least 1"),
        (lambda: gpt.Shape(1, 3, 64), "n_head must divide n_embd, got 3 and 64"),
        (lambda: gpt.Shape(None, 2, 64), "n_layer must be a whole number of at least 1, got None"),
        (lambda: llama.Llama(None, 1, 64), "shape must be of the type models.llama.Shape, got None"),
        (lambda: llama.Llama(llama.Shape(), None, 64), "layers must be a whole number of at least 1, got None"),
        (lambda: llama.Shape(64, 128, 4, 3), "kv_heads must divide heads, got 3 and 4"),
        (lambda: llama.Shape(60, 128, 4, 2), "hidden must be heads of an even size, got 60 and 4 heads"),
        (lambda: Decoder(llama.Shape(), 1, "64"), "vocabulary must be a whole number of at least 1, got '64'"),
        (lambda: Decoder(gpt.Shape(1, 2, 64), 1, 64), "shape must be of the type models.llama.Shape"),
        (lambda: named(None), "a model's name must be of the type str, got None"),
        (lambda: parameter_count("gpt-tiny"), "model must be of the type models.names.Named, got 'gpt-tiny'"),
        (lambda: to_fp8(None), "model must be an nn.Module, got None"),
    ],
)
def test_models_of_what_is_no_shape_are_refused_in_words(make, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        make()


@pytest.mark.parametrize("name", ["gpt-tiny", "llama-tiny"])
@pytest.mark.parametrize("count", ["vocabulary", "context"])
@pytest.mark.parametrize("value", [0, -5, 1.5, True, False, "", "a", []])
def test_a_named_model_refuses_what_is_no_count_in_words(name, count, value):
    with pytest.raises(ValueError, match=re.escape(f"{count} must be a whole number of at least 1, got {value!r}")):
        named(name).build(**{count: value})


@pytest.mark.parametrize(
    "options",
    [
        {"attention": "fp9"},
        {"attention": None},
        {"fuse": "some"},
        {"shared_scale": "False"},
        {"recipe": ""},
        {"attention_recipe": ""},
    ],
)
def test_what_is_no_way_to_fp8_is_refused_and_the_model_is_as_it_was(options):
    model = LM("op", TINY, vocab=64)
    with pytest.raises((ValueError, TypeError), match="must be "):
        to_fp8(model, **options)
    assert not fp8.state_dict(model) and type(model.blocks[0].ffn.up) is torch.nn.Linear


def test_a_wrong_architecture_is_answered_with_the_near_ones():
    with pytest.raises(ValueError, match="'fog-flsh'; did you mean fog-flash"):
        LM("fog-flsh", SIZES["tiny"], vocab=64)
    with pytest.raises(ValueError, match="no architecture has the name 'xyz'; There are llama3"):
        architecture("xyz")
