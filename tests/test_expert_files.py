"""Experts in checkpoints: written as the matrices that other readers know, read to the bit, and refused in words where
files do not hold what the config says."""

import json
import random
import shutil

import pytest
import torch
import torch_fp8 as fp8
from safetensors.torch import load_file, save_file
from torch import nn
from torch_fp8.checkpoints.quantize import quantize_checkpoint
from torch_fp8.layers.experts import FrozenExperts
from torch_fp8.observe.emulate import dequantize

transformers = pytest.importorskip("transformers")

IDS = torch.arange(48).view(2, 24)
SIZES = {
    "vocab_size": 99,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ROUTED = {"num_experts_per_tok": 2, "head_dim": 16}
CONFIGS = {
    "mixtral": {"intermediate_size": 112, "num_local_experts": 4, **ROUTED},
    "qwen2_moe": {
        "intermediate_size": 112, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48, "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {"intermediate_size": 112, "moe_intermediate_size": 48, "num_experts": 4, **ROUTED},
    "deepseek_v2": {
        "intermediate_size": 112, "moe_intermediate_size": 48, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 16, "n_group": 1, "topk_group": 1,
    },
    "gpt_oss": {"intermediate_size": 80, "num_local_experts": 4, **ROUTED},
    "llama4_text": {"intermediate_size": 96, "intermediate_size_mlp": 128, "num_local_experts": 4,
                    "num_experts_per_tok": 1, "head_dim": 16},
    "granitemoe": {"intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip
#: Names that vLLM, and llm-compressor for models whose 16-bit files hold stacks, use for the first expert's matrices.
NAMES = {
    "mixtral": "model.layers.1.block_sparse_moe.experts.0.w1 w3 w2",
    "qwen2_moe": "model.layers.1.mlp.experts.0.gate_proj up_proj down_proj",
    "qwen3_moe": "model.layers.1.mlp.experts.0.gate_proj up_proj down_proj",
    "deepseek_v2": "model.layers.1.mlp.experts.0.gate_proj up_proj down_proj",
    "gpt_oss": "model.layers.1.mlp.experts.0.gate_proj up_proj down_proj",
    "llama4_text": "model.layers.1.feed_forward.experts.0.gate_proj up_proj down_proj",
    "granitemoe": "model.layers.1.block_sparse_moe.experts.0.gate_proj up_proj down_proj",
    "olmoe": "model.layers.1.mlp.experts.0.gate_proj up_proj down_proj",
}


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def build(model_type, **options):
    config = transformers.AutoConfig.for_model(model_type, **SIZES | CONFIGS[model_type] | options)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.05)
    return model


@pytest.fixture
def plain(tmp_path):
    """Writes a 16-bit checkpoint; returns the model and the folder."""

    def make(model_type, **options):
        model = build(model_type, **options)
        model.save_pretrained(tmp_path / "plain")
        return model, tmp_path / "plain"

    return make


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and tensor.shape == b[name].shape, name
        assert torch.equal(bits(tensor), bits(b[name])), name


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


class TestRoundTrip:
    @pytest.mark.parametrize("format", ["compressed-tensors", "static"])
    @pytest.mark.parametrize("model_type", CONFIGS)
    def test_freeze_save_load_and_quantize(self, model_type, format, plain, tmp_path):
        model, folder = plain(model_type)
        static = format == "static"
        if static:
            fp8.calibrate(model, [IDS])
        fp8.freeze(model, "static" if static else "token", "tensor" if static else "channel")
        fp8.save_pretrained(model, tmp_path / "saved", format)
        quantize_checkpoint(folder, tmp_path / "quantized", format, batches=[IDS] if static else None)
        assert_same(tensors_of(tmp_path / "saved"), tensors_of(tmp_path / "quantized"))
        for name in ("saved", "quantized"):
            loaded = fp8.load_pretrained(tmp_path / name)
            assert_same(loaded.state_dict(), model.state_dict())
            assert torch.equal(logits(loaded), logits(model))
        fp8.save_pretrained(loaded, tmp_path / "again", format)
        assert_same(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "saved"))

    def test_blocks(self, plain, tmp_path):
        sizes = {"hidden_size": 128, "moe_intermediate_size": 256, "intermediate_size": 256, "head_dim": 32,
                 "num_key_value_heads": 4}  # fmt: skip
        model = build("qwen3_moe", **sizes)
        model.save_pretrained(tmp_path / "plain")
        fp8.freeze(model, weight="block")
        fp8.save_pretrained(model, tmp_path / "saved", "block")
        quantize_checkpoint(tmp_path / "plain", tmp_path / "quantized", "block")
        tensors = tensors_of(tmp_path / "saved")
        assert_same(tensors, tensors_of(tmp_path / "quantized"))
        stem = "model.layers.0.mlp.experts.3.gate_proj"
        assert tensors[f"{stem}.weight_scale_inv"].shape == (2, 1)
        assert_same(fp8.load_pretrained(tmp_path / "saved").state_dict(), model.state_dict())

        # transformers reads it without us, as the fine-grained form of DeepSeek.
        config = json.loads((tmp_path / "saved" / "config.json").read_text())
        del config["quantization_config"]["producer"]
        (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "saved", quantization_config=transformers.FineGrainedFP8Config(dequantize=True),
            dtype=torch.float32,
        )  # fmt: skip
        module = model.model.layers[0].mlp.experts
        codes, scale = module.gate_up_proj[3], module.gate_up_proj_scale[3]
        expected = torch.cat([dequantize(*part) for part in zip(codes.chunk(2), scale.chunk(2), strict=True)])
        torch.testing.assert_close(theirs.model.layers[0].mlp.experts.gate_up_proj[3], expected, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "llama4_text"])
    def test_by_transformers(self, model_type, plain, tmp_path):
        model, folder = plain(model_type)
        fp8.freeze(model)
        model.save_pretrained(tmp_path / "saved")
        made = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=fp8.QuantizationConfig())
        read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        for other in (made, read, fp8.load_pretrained(tmp_path / "saved")):
            assert_same(other.state_dict(), model.state_dict())
            assert torch.equal(logits(other), logits(model))

    @pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "llama4_text"])
    def test_dequantize_gives_16_bit_experts_back(self, model_type):
        model = fp8.freeze(build(model_type))
        frozen = model.model.layers[1].get_submodule("feed_forward" if model_type == "llama4_text" else "mlp").experts
        up, scale, interleaved = frozen.gate_up_proj, frozen.gate_up_proj_scale, frozen.layout.is_interleaved
        values = up.float() * scale
        if interleaved:
            values = torch.stack(values.chunk(2, 1), 2).flatten(1, 2)
        values = values.transpose(1, 2) if frozen.layout.is_transposed else values
        plain = model.dequantize(torch.float32)
        assert not any(isinstance(module, FrozenExperts) for module in plain.modules())
        assert torch.equal(frozen.gate_up_proj, values)
        assert logits(plain.float()).isfinite().all()

    @pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
    def test_a_part_of_the_experts(self, model_type, plain, tmp_path):
        model, folder = plain(model_type)
        fp8.freeze(model, filter=["model.layers.0.mlp.experts", "*.q_proj"])
        fp8.save_pretrained(model, tmp_path / "saved")
        quantize_checkpoint(folder, tmp_path / "quantized", filter=["model.layers.0.mlp.experts", "*.q_proj"])
        assert_same(tensors_of(tmp_path / "saved"), tensors_of(tmp_path / "quantized"))
        loaded = fp8.load_pretrained(tmp_path / "saved")
        assert_same(loaded.state_dict(), model.state_dict())
        ignored = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]["ignore"]
        assert "model.layers.1.mlp.experts" in ignored and "model.layers.0.mlp.experts" not in ignored


class TestFiles:
    @pytest.mark.parametrize("model_type", CONFIGS)
    def test_what_other_readers_find(self, model_type, tmp_path):
        """Each matrix of an expert, by hand: its name, its codes and scales as of one linear layer."""
        model = build(model_type)
        stem, *keys = NAMES[model_type].split()
        stem, first = stem.rsplit(".", 1)
        layer = model.model.layers[1]
        module = next(m for m in layer.modules() if type(m).__name__.endswith("Experts"))
        up = module.gate_up_proj[0].detach()
        if model_type in ("gpt_oss", "llama4_text"):
            up = up.t()
        gate, up = (up[::2], up[1::2]) if model_type == "gpt_oss" else up.chunk(2)
        down = module.down_proj[0].detach()
        matrices = gate, up, down.t() if model_type in ("gpt_oss", "llama4_text") else down
        router = next(name for name, m in layer.named_modules() if name.endswith((".gate", ".router", "router.layer")))
        fp8.save_pretrained(fp8.freeze(model), tmp_path / "saved")
        tensors = tensors_of(tmp_path / "saved")
        for key, matrix in zip((first, *keys), matrices, strict=True):
            alone = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
            alone.weight.data = matrix.float()
            fp8.freeze(alone)
            assert torch.equal(bits(tensors[f"{stem}.{key}.weight"]), bits(alone.weight))
            assert torch.equal(tensors[f"{stem}.{key}.weight_scale"].float(), alone.weight_scale)
            assert tensors[f"{stem}.{key}.weight_scale"].dtype == torch.bfloat16
        quantization = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
        assert any(name.startswith("model.layers.1.") and name.endswith(router) for name in quantization["ignore"])
        assert not any("experts." in name for name in quantization["ignore"])
        left = [
            name for name, t in tensors.items() if t.dim() > 1 and t.dtype == torch.bfloat16 and "scale" not in name
        ]
        assert all("experts" not in name or "shared" in name for name in left)

    def test_a_file_made_by_hand_in_the_static_dialect(self, tmp_path):
        """AutoFP8's form: scales without dimensions, another for gate and up of each expert."""
        model, tensors = build("mixtral"), {}
        for name, parameter in model.state_dict().items():
            if ".experts." not in name:
                tensors[name.replace(".mlp.", ".block_sparse_moe.")] = parameter.clone()
        expected = {}
        for layer in range(2):
            module = model.model.layers[layer].mlp.experts
            for e in range(4):
                parts = (*module.gate_up_proj[e].detach().float().chunk(2), module.down_proj[e].detach().float())
                for key, values in zip(("w1", "w3", "w2"), parts, strict=True):
                    stem, scale = f"model.layers.{layer}.block_sparse_moe.experts.{e}.{key}", values.abs().max() / 448
                    codes = (values / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
                    input_scale = torch.tensor(0.125 if key != "w2" else 0.25)
                    tensors |= {f"{stem}.weight": codes, f"{stem}.weight_scale": scale,
                                f"{stem}.input_scale": input_scale}  # fmt: skip
                    expected[layer, e, key] = codes.float() * scale
        folder = tmp_path / "hand"
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        config = json.loads(model.config.to_json_string())
        config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "static",
                                         "ignored_layers": ["lm_head"]}  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
        loaded = fp8.load_pretrained(folder)
        for layer in range(2):
            module = loaded.model.layers[layer].mlp.experts
            assert isinstance(module, FrozenExperts) and module.granularity == "tensor"
            assert (module.gate_up_proj_slot[:, 0] == 0.125).all() and (module.down_proj_slot[:, 1] == 4).all()
            up = module.gate_up_proj.float() * module.gate_up_proj_scale.repeat_interleave(112, 1)[..., None]
            for e in range(4):
                assert torch.equal(up[e], torch.cat((expected[layer, e, "w1"], expected[layer, e, "w3"])))
                down = module.down_proj[e].float() * module.down_proj_scale[e]
                assert torch.equal(down, expected[layer, e, "w2"])
        exact = logits(model).float()
        assert ((logits(loaded) - exact).norm() / exact.norm()).item() < 0.2
        fp8.save_pretrained(loaded, tmp_path / "again", "static")
        again = tensors_of(tmp_path / "again")
        assert_same({name: again[name] for name in tensors if "experts" in name},
                    {name: tensor for name, tensor in tensors.items() if "experts" in name})  # fmt: skip

    def test_command_line_and_inspect(self, plain, tmp_path, capsys):
        from torch_fp8.__main__ import main

        _, folder = plain("olmoe")
        assert main(["quantize", str(folder), str(tmp_path / "out")]) == 0
        assert main(["inspect", str(tmp_path / "out")]) == 0
        out = capsys.readouterr().out
        assert "model.layers.1.mlp.experts.3.up_proj.weight  float8_e4m3fn [48, 64]" in out
        share = fp8.summary(fp8.load_pretrained(tmp_path / "out")).parameters.share
        assert share > 0.8


@pytest.fixture
def damaged(tmp_path):
    """Writes an FP8 checkpoint of Mixtral, changed by the functions that it is given."""

    def make(change=lambda tensors: None, change_config=lambda config: None, model_type="mixtral"):
        folder = tmp_path / "damaged"
        fp8.save_pretrained(fp8.freeze(build(model_type)), folder)
        tensors = tensors_of(folder)
        change(tensors)
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        change_config(config)
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


W1 = "model.layers.1.block_sparse_moe.experts.2.w1"


def moved(tensors, old, new):
    for name in [name for name in tensors if name.startswith(old)]:
        tensors[new + name.removeprefix(old)] = tensors.pop(name)


class TestBadFiles:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda t: t.update({f"{W1}.weight": t[f"{W1}.weight"][:96]}),
             r"experts.2.w1.weight has shape \[96, 64\], expected \[112, 64\]"),
            (lambda t: t.update({f"{W1}.weight_scale": t[f"{W1}.weight_scale"][:96]}),
             r"experts.2.w1.weight_scale has shape \[96, 1\], expected \[112, 1\]"),
            (lambda t: t.pop(f"{W1}.weight_scale"), "experts.2.w1.weight is FP8 and has no scale"),
            (lambda t: t.pop(f"{W1}.weight"), r"has no .*experts.2.w1.weight: expected 4 experts.*found 3"),
            (lambda t: moved(t, W1, W1.replace("experts.2", "experts.4")), r"has no .*experts.2.w1.weight"),
            (lambda t: moved(t, W1, W1.replace("experts.2", "experts.02")), r"experts.02.w1.weight is no matrix"),
            (lambda t: moved(t, W1, W1.replace("experts.2", "experts.gate")), r"experts.gate.w1.weight is no matrix"),
            (lambda t: t.update({W1.replace("2", "4") + s: t[W1 + s].clone() for s in (".weight", ".weight_scale")}),
             r"experts.4.w1.weight is one too many: expected 4 experts, found 5"),
            (lambda t: t.update({f"{W1}.weight": t[f"{W1}.weight"].bfloat16()}),
             "experts.2.w1.weight is torch.bfloat16, but .* of the same experts is FP8"),
            (lambda t: t.update({f"{W1}.weight_scale": torch.full((112, 1), -1.0)}), "not positive and finite"),
            (lambda t: t.update({f"{W1}.weight_scale": torch.full((112, 1), float("nan"))}), "not positive and finite"),
            (lambda t: t.update({"model.layers.1.block_sparse_moe.gate.weight":
                                 t["model.layers.1.block_sparse_moe.gate.weight"].to(torch.float8_e4m3fn)}),
             r"gate.weight is torch.float8_e4m3fn; FP8 is read as E4M3 weights of linear layers and of experts only"),
            (lambda t: moved(t, "model.layers.1.block_sparse_moe.gate", W1.rsplit(".", 2)[0] + ".gate"),
             "has no tensor .*gate"),
        ],
    )  # fmt: skip
    def test_tensors_that_do_not_fit(self, change, words, damaged):
        folder = damaged(change)
        with pytest.raises(fp8.CheckpointError, match=words) as error:
            fp8.load_pretrained(folder)
        assert str(folder) in str(error.value)

    @pytest.mark.parametrize("experts", [3, 5])
    def test_as_many_experts_as_the_config_says(self, experts, damaged):
        folder = damaged(change_config=lambda config: config.update(num_local_experts=experts))
        with pytest.raises(
            fp8.CheckpointError, match=rf"expected {experts} experts.*found 4|expected \[{experts}, 64\]"
        ):
            fp8.load_pretrained(folder)

    def test_16_bit_experts_too(self, plain, tmp_path):
        _, folder = plain("mixtral")
        tensors = tensors_of(folder)
        name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
        tensors[name.replace(".1.w2", ".7.w2")] = tensors.pop(name)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        for act in (lambda: fp8.load_pretrained(folder), lambda: quantize_checkpoint(folder, tmp_path / "out")):
            with pytest.raises(fp8.CheckpointError, match="has no .*experts.1.w2.weight: expected 4 experts"):
                act()
        assert not (tmp_path / "out").exists()

    def test_biases_that_are_missing(self, damaged):
        folder = damaged(lambda t: t.pop("model.layers.0.mlp.experts.1.up_proj.bias"), model_type="gpt_oss")
        with pytest.raises(
            fp8.CheckpointError, match="has 7 biases for model.layers.0.mlp.experts.gate_up_proj, expected 8"
        ):
            fp8.load_pretrained(folder)

    def test_a_stack_in_fp8(self, damaged):
        """Nobody's scales of it are known."""

        def change(tensors):
            stem = "model.layers.0.feed_forward.experts"
            for name in [name for name in tensors if name.startswith(f"{stem}.")]:
                del tensors[name]
            tensors[f"{stem}.gate_up_proj"] = torch.zeros(4, 64, 192).to(torch.float8_e4m3fn)
            tensors[f"{stem}.down_proj"] = torch.zeros(4, 96, 64).to(torch.float8_e4m3fn)

        with pytest.raises(
            fp8.CheckpointError, match=r"experts.gate_up_proj has shape \[4, 64, 192\], expected \[96, 64\]"
        ):
            fp8.load_pretrained(damaged(change, model_type="llama4_text"))

    def test_experts_of_two_kinds_are_not_written(self, tmp_path):
        model = fp8.freeze(build("mixtral"), filter=["*.experts"])
        fp8.freeze(model, weight="tensor", filter=["*_proj"])
        with pytest.raises(ValueError, match="holds FP8 layers of one kind"):
            fp8.save_pretrained(model, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_blocks_that_do_not_divide_are_not_written(self, tmp_path):
        with pytest.raises(ValueError, match=r"experts.gate_up_proj is 112 x 64; readers of blocks"):
            fp8.save_pretrained(
                fp8.freeze(build("mixtral"), weight="block", filter=["*.experts"]), tmp_path / "out", "block"
            )
        assert not (tmp_path / "out").exists()


def mutations(rng, tensors, config):
    """One change of names, shapes, dtypes or the config, of those that experts depend on."""
    names = [name for name in tensors if "experts" in name]
    name, other = rng.choice(names), rng.choice(names)
    tensor, stem = tensors[name], name.rpartition(".")[0]
    keys = [key for key, value in config.items() if type(value) is int]
    key = rng.choice([k for k in keys if "expert" in k or rng.random() < 0.3] or keys)
    quantization = config["quantization_config"]
    weights = quantization["config_groups"]["group_0"]["weights"]

    def swap():
        tensors[name], tensors[other] = tensors[other], tensors[name]

    def rename(old, *new):
        tensors[name.replace(old, rng.choice(new))] = tensors.pop(name)

    def put(value):
        tensors[name] = value

    def move_all(new):
        moved(tensors, stem, new)

    return rng.choice([
        swap,
        lambda: tensors.pop(name),
        lambda: put(tensor[: max(1, tensor.shape[0] // 2)].clone()),
        lambda: put(tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor.float()),
        lambda: put(tensor.float().bfloat16()),
        lambda: put(tensor.float().unsqueeze(0)),
        lambda: put(torch.full_like(tensor.float(), rng.choice([0.0, -1.0, float("inf")]))),
        lambda: rename("experts.", "experts.9.", "experts.00.", "experts.-1.", "experts.x.", "experts.."),
        lambda: rename(".experts.", ".expert.", ".experts.experts.", "."),
        lambda: rename("w1", "w4", "w3", "gate"),
        lambda: move_all(stem.rpartition(".experts.")[0] + rng.choice([".experts.4.w1", ".experts.04.w1", ".gate"])),
        lambda: config.update({key: rng.choice([0, 1, 2, 3, 5, 8, -1, 10**9])}),
        lambda: config.update({key: rng.choice([None, "four", [4], {}, 1.5])}),
        lambda: config.pop(key),
        lambda: weights.update(strategy=rng.choice(["tensor", "block", "channel", "group", 7])),
        lambda: quantization.update(ignore=[name, "re:.*experts.*"]),
        lambda: quantization.update(quant_method=rng.choice(["fp8", "modelopt", "none"])),
    ])  # fmt: skip


def fuzz(folder, work, rounds, seed):
    """Counts right loads and refusals of mutated checkpoints; whatever else happens is raised."""
    rng, counts = random.Random(seed), {"loads": 0, "refused": 0}
    original, config = tensors_of(folder), json.loads((folder / "config.json").read_text())
    for _ in range(rounds):
        tensors, changed = dict(original), json.loads(json.dumps(config))
        for _ in range(rng.choice([1, 1, 2])):
            mutations(rng, tensors, changed)()
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        save_file({k: v.contiguous().clone() for k, v in tensors.items()}, work / "model.safetensors", {"format": "pt"})
        (work / "config.json").write_text(json.dumps(changed))
        try:
            state = fp8.load_pretrained(work).state_dict()
        except fp8.CheckpointError:
            counts["refused"] += 1
            continue
        counts["loads"] += 1
        # What was read is what stands in the files: by number, name and part.
        for name, tensor in state.items():
            if name.endswith("experts.down_proj") and tensor.dtype == torch.float8_e4m3fn:
                stem = name.replace(".mlp.", ".block_sparse_moe.").removesuffix(".down_proj")
                for e, matrix in enumerate(tensor):
                    assert torch.equal(bits(matrix), bits(tensors[f"{stem}.{e}.w2.weight"])), name
            if name.endswith("experts.gate_up_proj") and tensor.dtype == torch.float8_e4m3fn:
                stem = name.replace(".mlp.", ".block_sparse_moe.").removesuffix(".gate_up_proj")
                for e, matrix in enumerate(tensor):
                    parts = torch.cat([bits(tensors[f"{stem}.{e}.{key}.weight"]) for key in ("w1", "w3")])
                    assert torch.equal(bits(matrix), parts), name
    return counts


@pytest.mark.filterwarnings("ignore:torch_fp8")
def test_mutated_checkpoints(tmp_path):
    fp8.save_pretrained(fp8.freeze(build("mixtral", num_hidden_layers=1)), tmp_path / "right")
    counts = fuzz(tmp_path / "right", tmp_path / "work", 60, seed=0)
    assert counts["refused"] > 20 and sum(counts.values()) == 60
