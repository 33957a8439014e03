"""Adapters of peft over frozen layers: they train as over the 16-bit base, and merge, or are refused by name."""

import copy
import pickle

import pytest
import torch
import torch_fp8 as fp8
from ranks import Ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch_fp8.format import dequantize
from torch_fp8.layers.frozen import WEIGHTS, frozen_layers

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
IDS = torch.arange(96).view(3, 32) % 61


def llama(dtype=torch.bfloat16):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype)


def adapted(base, **options):
    torch.manual_seed(1)
    return peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules="all-linear", **options))


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train(model, steps=8, ids=IDS):
    ids = ids.to(next(model.parameters()).device)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=3e-3)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def same(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


class TestTraining:
    @pytest.mark.parametrize(
        ("weight", "dtype"), [*((weight, torch.bfloat16) for weight in WEIGHTS), ("channel", torch.float32)]
    )
    def test_learns_as_over_the_16_bit_base(self, device, weight, dtype):
        plain = adapted(llama(dtype).to(device))
        ours = adapted(fp8.freeze(llama(dtype).to(device), weight=weight))
        base = {name: t.clone() for name, t in ours.state_dict().items() if "lora_" not in name}
        expected, losses = train(plain), train(ours)
        assert expected[-1] < expected[0] - 0.2
        # Rows of 8 bits of noise in every product: a percent of the way.
        assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 0.02 * expected[0]
        assert all(same(t, ours.state_dict()[name]) for name, t in base.items())

    def test_the_same_layers_get_the_same_adapters(self):
        plain, ours = adapted(llama()), adapted(fp8.freeze(llama()))
        assert list(trainable(plain)) == list(trainable(ours)) and len(trainable(ours)) == 14
        for (name, a), b in zip(trainable(plain).items(), trainable(ours).values(), strict=True):
            assert b.dtype == torch.float32 and torch.equal(a.bfloat16(), b.bfloat16()), name  # not rounded to FP8

    def test_one_byte_a_weight(self):
        ours = adapted(fp8.freeze(llama()))
        layers = frozen_layers(ours).values()
        held = sum(t.nbytes for layer in layers for t in layer.state_dict().values())
        assert len(layers) == 7 and held < 0.55 * sum(2 * layer.weight.numel() for layer in layers)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_gradient_checkpointing(self, device, reentrant):
        models = [adapted(fp8.freeze(llama().to(device))) for _ in range(2)]
        models[1].gradient_checkpointing_enable({"use_reentrant": reentrant})
        models[1].enable_input_require_grads()
        ids = IDS.to(device)
        for model in models:
            model.train()(input_ids=ids, labels=ids).loss.backward()
        for (name, p), q in zip(trainable(models[0]).items(), trainable(models[1]).values(), strict=True):
            assert p.grad is not None and torch.equal(p.grad, q.grad), name

    def test_compiled(self, device):
        models = [adapted(fp8.freeze(llama().to(device))) for _ in range(2)]
        compiled = torch.compile(models[1], backend="aot_eager", fullgraph=True)
        ids = IDS.to(device)
        losses = [model(input_ids=ids, labels=ids).loss for model in (models[0], compiled)]
        assert losses[0] == losses[1]
        sum(losses).backward()
        for (name, p), q in zip(trainable(models[0]).items(), trainable(models[1]).values(), strict=True):
            # The compiler fuses in BF16, over the 16-bit base too: a bit here is a code further on.
            assert (p.grad - q.grad).norm() <= 0.05 * p.grad.norm(), name

    def test_autocast(self, device):
        plain, ours = adapted(llama(torch.float32).to(device)), adapted(fp8.freeze(llama(torch.float32).to(device)))
        with torch.autocast(device.type, torch.bfloat16):
            expected, losses = train(plain), train(ours)
        assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 0.02 * expected[0]

    def test_over_a_checkpoint(self, tmp_path):
        pytest.importorskip("transformers", minversion="5.24")
        model = fp8.freeze(llama())
        fp8.save_pretrained(model, tmp_path / "base")
        loaded = fp8.load_pretrained(tmp_path / "base")
        assert all(same(t, loaded.state_dict()[name]) for name, t in model.state_dict().items())
        losses, expected = train(adapted(loaded), 3), train(adapted(model), 3)
        assert losses[-1] < losses[0] and max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 0.01

    def test_saved_adapters_are_adapters_alone(self, tmp_path):
        ours = adapted(fp8.freeze(llama()))
        train(ours, 3)
        assert all("lora_" in name for name in peft.get_peft_model_state_dict(ours))
        ours.save_pretrained(tmp_path / "adapter")
        again = peft.PeftModel.from_pretrained(fp8.freeze(llama()), tmp_path / "adapter").eval()
        assert torch.equal(again(IDS).logits, ours.eval()(IDS).logits)
        over_16_bits = peft.PeftModel.from_pretrained(llama(), tmp_path / "adapter").eval()
        assert (over_16_bits(IDS).logits - again(IDS).logits).norm() < 0.1 * again(IDS).logits.norm()


class TestMerging:
    @pytest.mark.parametrize("weight", WEIGHTS)
    @pytest.mark.parametrize("safe", [True, False])
    def test_merged_values_are_quantised_anew(self, weight, safe):
        ours = adapted(fp8.freeze(llama(), weight=weight))
        train(ours)
        layers = {name: m for name, m in ours.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
        exact = {
            name: dequantize(m.base_layer.weight, m.base_layer.weight_scale) + m.get_delta_weight("default")
            for name, m in layers.items()
        }
        before = {name: t.clone() for name, t in ours.state_dict().items()}
        logits = ours.eval()(IDS).logits
        ours.merge_adapter(safe_merge=safe)
        for name, m in layers.items():
            twin = nn.Linear(m.in_features, m.out_features, bias=False)
            twin.weight.data.copy_(exact[name])
            fp8.freeze(twin, weight=weight)
            assert same(m.base_layer.weight, twin.weight) and same(m.base_layer.weight_scale, twin.weight_scale), name
        merged = ours(IDS).logits
        assert 0 < (merged - logits).norm() < 0.1 * logits.norm()
        ours.unmerge_adapter()
        assert all(same(t, before[name]) for name, t in ours.state_dict().items())
        assert torch.equal(ours(IDS).logits, logits)
        alone = ours.merge_and_unload(safe_merge=safe)
        assert isinstance(alone.model.layers[0].mlp.up_proj, fp8.FrozenLinear)
        assert torch.equal(alone(IDS).logits, merged)

    def test_merging_nothing_changes_nothing(self):
        ours = adapted(fp8.freeze(llama()))
        for layer in frozen_layers(ours).values():  # as of a checkpoint whose scales leave room: others than ours
            layer.weight, layer.weight_scale = (layer.weight.float() / 4).to(layer.weight.dtype), layer.weight_scale * 4
        before = copy.deepcopy(ours.state_dict())
        ours.merge_adapter(adapter_names=[])
        with pytest.warns(UserWarning, match="Already unmerged"):
            ours.unmerge_adapter()
        assert all(same(t, before[name]) for name, t in ours.state_dict().items())

    @pytest.mark.parametrize("safe", [True, False])
    def test_a_broken_adapter_is_not_merged(self, safe):
        ours = adapted(fp8.freeze(llama()))
        layer = ours.base_model.model.model.layers[0].mlp.up_proj
        with torch.no_grad():
            layer.lora_B["default"].weight.fill_(float("nan"))
        before = copy.deepcopy(layer.state_dict())
        with pytest.raises(ValueError, match="NaN"):
            layer.merge(safe_merge=safe)
        assert not layer.merged and all(same(t, before[name]) for name, t in layer.state_dict().items())

    def test_copies_and_pickles_while_merged(self):
        ours = adapted(fp8.freeze(llama()))
        train(ours, 3)
        before = ours.eval()(IDS).logits
        ours.merge_adapter()
        merged = ours(IDS).logits
        for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert torch.equal(other(IDS).logits, merged)
            other.unmerge_adapter()
            assert torch.equal(other(IDS).logits, before)

    def test_a_base_that_is_frozen_under_its_adapter(self):
        ours = adapted(llama())
        fp8.freeze(ours, filter=["*.base_layer"])
        assert len(frozen_layers(ours)) == 7
        for name, p in ours.named_parameters():
            p.requires_grad_("lora_" in name)
        train(ours, 3)
        logits = ours.eval()(IDS).logits
        ours.merge_adapter()
        assert 0 < (ours(IDS).logits - logits).norm() < 0.1 * logits.norm()


def pair():
    """A model whose frozen layers quantise nothing but their weights, and one of their values."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.LayerNorm(64))
    plain = copy.deepcopy(ours)
    fp8.freeze(ours, "none")
    for i in (0, 2):
        plain[i].weight.data.copy_(dequantize(ours[i].weight, ours[i].weight_scale))
    return plain, ours


RIGHT = {
    "LoraConfig": {}, "LoHaConfig": {}, "LoKrConfig": {}, "IA3Config": {"feedforward_modules": []}, "VeraConfig": {},
    "OFTConfig": {"r": 4, "oft_block_size": 0}, "BOFTConfig": {"boft_block_size": 4}, "RoadConfig": {},
    "AdaLoraConfig": {"total_step": 10}, "FourierFTConfig": {"n_frequency": 16}, "RandLoraConfig": {"r": 4},
    "VBLoRAConfig": {"r": 4, "num_vectors": 16, "vector_length": 16}, "MissConfig": {}, "WaveFTConfig": {},
    "C3AConfig": {"block_size": 32}, "GraloraConfig": {},
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_other_adapters(name):
    """Outputs and gradients are those over the values of the codes."""
    if not hasattr(peft, name):
        pytest.skip(f"this peft has no {name}")
    x, found = torch.randn(8, 64), []
    for base in pair():
        torch.manual_seed(1)
        model = peft.get_peft_model(base, getattr(peft, name)(target_modules=["0", "2"], **RIGHT[name]))
        torch.manual_seed(2)
        with torch.no_grad():
            for p in trainable(model).values():
                p.add_(torch.randn(p.shape) * 0.05)
        y = model(x)
        (y * torch.linspace(-1, 1, 64)).sum().backward()
        found.append([y, *(p.grad for p in trainable(model).values())])
    assert any(grad is not None and grad.any() for grad in found[1][1:])
    for expected, ours in zip(*found, strict=True):
        if expected is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "error"),
    [
        ("LoraConfig", {"use_dora": True}, ValueError),
        ("LoraConfig", {"init_lora_weights": "pissa"}, ValueError),
        ("LoraConfig", {"init_lora_weights": "olora"}, ValueError),
        ("LoraConfig", {"init_lora_weights": "orthogonal"}, ValueError),
        ("HRAConfig", {}, TypeError),
        ("ShiraConfig", {}, TypeError),
    ],
)
def test_adapters_that_compute_with_the_weight_are_refused(name, options, error):
    if not hasattr(peft, name):
        pytest.skip(f"this peft has no {name}")
    _, ours = pair()
    with pytest.raises(error, match="torch_fp8: .*the base's weight, which is in FP8; use plain LoRA"):
        peft.get_peft_model(ours, getattr(peft, name)(target_modules=["0", "2"], **options))
    assert isinstance(ours[0], fp8.FrozenLinear) and isinstance(ours[2], fp8.FrozenLinear)


@pytest.mark.parametrize("module", ["0", "2", "1"])
def test_modules_to_save_are_trained_or_refused(module):
    _, ours = pair()
    ours[1] = nn.LayerNorm(ours[0].out_features)
    config = peft.LoraConfig(target_modules=["2" if module == "0" else "0"], modules_to_save=[module])
    if module == "1":
        assert any("modules_to_save" in name for name in trainable(peft.get_peft_model(ours, config)))
        return
    with pytest.raises(TypeError, match="torch_fp8: modules_to_save names a FrozenLinear .* would never be trained; "):
        peft.get_peft_model(ours, config)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_are_trained_or_refused(bias):
    config = peft.LoraConfig(target_modules=["0"], bias=bias)
    base = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    with pytest.raises(ValueError, match=f"torch_fp8: bias='{bias}' trains the base's bias, .* no parameter; use"):
        peft.get_peft_model(fp8.freeze(copy.deepcopy(base), filter=["0"]), config)
    base[0].bias = None
    peft.get_peft_model(fp8.freeze(base, filter=["0"]), config)


def test_a_base_that_was_frozen_while_adapters_were_merged_is_unmerged():
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(128, 128)), torch.randn(64, 128)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["0"], init_lora_weights=False)).eval()
    apart = model(x)
    with model.disable_adapter():
        without = model(x)
    model.merge_adapter()
    fp8.freeze(model, filter=["*base_layer"])
    assert relative(model(x), apart) < 0.05
    model.unmerge_adapter()
    assert relative(model(x), apart) < 0.06
    with model.disable_adapter():
        assert relative(model(x), without) < 0.2  # of the larger weight's rounding


def relative(y, expected):
    return ((y - expected).norm() / expected.norm()).item()


# ---- two ranks ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["gloo", "nccl"])
def ranks(request):
    if request.param == "nccl" and (not fp8.build_info()["cuda"] or torch.cuda.device_count() < 2):
        pytest.skip("NCCL needs two GPUs")
    ranks, threads = Ranks(request.param), torch.get_num_threads()
    torch.set_num_threads(1)
    yield ranks
    torch.set_num_threads(threads)
    ranks.close()


def train_ddp(device, options):
    rank = torch.distributed.get_rank()
    torch.manual_seed(rank)
    base = llama()
    with torch.no_grad():  # DDP sends the first rank's to all
        for p in base.parameters():
            p.mul_(1 + rank)
    model = adapted(fp8.freeze(base.to(device)))
    ddp = DistributedDataParallel(model, **options)
    losses = train(ddp, 3, IDS[rank : rank + 1])
    sent = [name for name in ddp.named_module_buffers if "base_layer" in name]
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    return losses, sent, layer.base_layer.weight.view(torch.uint8).cpu(), layer.lora_A["default"].weight.detach().cpu()


@pytest.mark.parametrize("options", [{}, {"broadcast_buffers": False}], ids=["default", "no_broadcast"])
def test_ddp(ranks, options):
    """Both ranks' batches in one process give the same; the base is sent once, not in each forward."""
    (losses, sent, codes, a), (others, _, other_codes, other_a) = ranks(train_ddp, options)
    assert sent == [] and torch.equal(codes, other_codes) and torch.equal(a, other_a)
    alone = adapted(fp8.freeze(llama().to(ranks.device)))
    for i, loss in enumerate(train(alone, 3, IDS[:2])):
        assert abs((losses[i] + others[i]) / 2 - loss) < 0.01 * loss
