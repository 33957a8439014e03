"""Checkpoints: each dialect that is read, from files written by hand from its description; each that is written, read
back by us and by transformers; and the command line."""

import json
import os
import re
import shutil

import pytest
import safetensors.torch
import torch
import torch_fp8 as fp8
import transformers
from frozen_pairs import freeze
from torch import nn
from torch_fp8.__main__ import main
from torch_fp8.checkpoints import folder
from torch_fp8.layers.frozen import frozen_layers, scale_shape
from torch_fp8.observe.emulate import dequantize

IDS = torch.arange(40).view(2, 20)  # more rows than are left unquantised
E4M3 = torch.float8_e4m3fn


def llama(hidden=192, ffn=320, **options):
    sizes = {"hidden_size": hidden, "intermediate_size": ffn, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=99, num_hidden_layers=2, dtype="bfloat16", **sizes, **options)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.normal_()
    return model


def by_hand(path, tensors, config, quantization, shards=1, **files):
    """A checkpoint in a folder; safetensors' own library writes the files."""
    path.mkdir()
    if quantization is not None:
        config = {**config, "quantization_config": quantization}
    (path / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    if shards == 1:
        safetensors.torch.save_file(tensors, path / "model.safetensors")
        return path
    names = list(tensors)
    where = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        safetensors.torch.save_file({n: tensors[n] for n in names if where[n] == file}, path / file)
    index = {"metadata": {}, "weight_map": where}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def quantized(model, kind):
    """The state of a model with E4M3 weights in the block linears, and scales (float32, not powers of two) by layer."""
    state = {name: t.clone() for name, t in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    scales = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            scale = torch.rand(scale_shape(kind, *module.weight.shape)) * 1e-4 + 1e-4
            codes = (torch.randn(module.weight.shape) * 100).clamp(-448, 448).to(E4M3)
            state[f"{name}.weight"], scales[name] = codes, scale
    return state, scales


COMPRESSED = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}


def compressed(weights, inputs, **more):
    group = {"targets": ["Linear"], "weights": {**COMPRESSED, **weights}, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group},
            "ignore": ["lm_head", "re:.*norm.*"], **more}  # fmt: skip


DYNAMIC_TOKEN = {**COMPRESSED, "strategy": "token", "dynamic": True}
STATIC_TENSOR = {**COMPRESSED, "strategy": "tensor"}
AUTOFP8 = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
FINE = {"quant_method": "fp8", "activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head"]}
SCALAR = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}

# name: (kind, quantization_config, name of the weight's scale, of the input's, how both are stored, activations)
READ = {
    "autofp8": ("tensor", AUTOFP8, "weight_scale", "input_scale", lambda s: s.reshape(()), "static"),
    "autofp8 before 2024-06": ("tensor", AUTOFP8, "weight_scale", "act_scale", lambda s: s.reshape(()), "static"),
    "vllm dynamic": ("tensor", {**FINE}, "weight_scale", None, lambda s: s, "token"),
    "channel": ("channel", compressed({"strategy": "channel"}, DYNAMIC_TOKEN), "weight_scale", None,
                lambda s: s.bfloat16(), "token"),
    "channel, flattened": ("channel", compressed({"strategy": "channel"}, None), "weight_scale", None,
                           lambda s: s.flatten(), "none"),
    "tensor": ("tensor", compressed({"strategy": "tensor"}, STATIC_TENSOR), "weight_scale", "input_scale",
               lambda s: s.bfloat16(), "static"),
    "block": ("block", compressed({"strategy": "block", "block_structure": "128x128"},
                                  {**COMPRESSED, "strategy": "group", "group_size": 128, "dynamic": True}),
              "weight_scale", None, lambda s: s.bfloat16(), "token"),
    "fine-grained": ("block", {**FINE, "weight_block_size": [128, 128]}, "weight_scale_inv", None,
                     lambda s: s, "token"),
    "fine-grained, no size": ("block", FINE, "weight_scale_inv", None, lambda s: s, "token"),
    "ue8m0": ("block", {**FINE, "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}, "weight_scale_inv", None,
              lambda s: s.log2().round().exp2().to(torch.float8_e8m0fnu), "token"),
    "scalar dialect": ("tensor", SCALAR, "weight_scale_inv", "activation_scale",
                       lambda s: s.reshape(()).bfloat16(), "static"),
    "mistral": ("tensor", SCALAR, "qscale_weight", "qscale_act", lambda s: s.reshape(()), "static"),
    "fbgemm": ("channel", {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, "weight_scale", None,
               lambda s: s, "token"),
    "modelopt": ("tensor", MODELOPT, "weight_scale", "input_scale", lambda s: s.reshape(()), "static"),
    "modelopt, file": ("tensor", None, "weight_scale", "input_scale", lambda s: s.reshape(()), "static"),
}  # fmt: skip


class TestRead:
    @pytest.mark.parametrize("shards", [1, 3])
    @pytest.mark.parametrize("dialect", READ)
    def test_dialect(self, tmp_path, dialect, shards):
        kind, quantization, scale_name, input_name, store, activations = READ[dialect]
        plain = llama(attention_bias=True, tie_word_embeddings=shards == 3)
        state, scales = quantized(plain, kind)
        stored = {name: store(scale) for name, scale in scales.items()}
        tensors = {**state, **{f"{name}.{scale_name}": s for name, s in stored.items()}}
        if input_name:
            tensors |= {f"{name}.{input_name}": store(torch.tensor([0.011 + 0.001 * i]))
                        for i, name in enumerate(scales)}  # fmt: skip
        files = {"hf_quant_config": {"quantization": {"quant_algo": "FP8"}}} if quantization is None else {}
        path = by_hand(tmp_path / "in", tensors, plain.config.to_dict(), quantization, shards, **files)
        model = fp8.load_pretrained(path)

        layers = frozen_layers(model)
        assert layers.keys() == scales.keys()
        for name, layer in layers.items():
            assert torch.equal(layer.weight.view(torch.uint8), state[f"{name}.weight"].view(torch.uint8))
            assert layer.weight_scale.dtype == torch.float32 and layer.activations == activations
            assert torch.equal(layer.weight_scale, stored[name].float().reshape(scales[name].shape))
            if input_name:
                assert layer.input_slot[0, 0] == tensors[f"{name}.{input_name}"].float()
            plain.get_submodule(name).weight.copy_(dequantize(layer.weight, layer.weight_scale))
        for name, tensor in state.items():
            if tensor.dtype == torch.bfloat16:
                assert torch.equal(model.state_dict()[name], tensor)
        if shards == 3:
            assert model.lm_head.weight is model.model.embed_tokens.weight
        # Another forward than ours, of the same values: FP8 inputs and a BF16 rounding of the weights lie between.
        logits, expected = model(IDS).logits.float(), plain(IDS).logits.float()
        assert ((logits - expected).norm() / expected.norm()) < 0.15
        assert not model.training and not any(p.requires_grad for p in model.parameters())

    def test_squeezed_grid(self, tmp_path):
        plain = llama(hidden=128, ffn=384)
        state, scales = quantized(plain, "block")
        tensors = {**state, **{f"{name}.weight_scale_inv": s.squeeze() for name, s in scales.items()}}
        quantization = {**FINE, "weight_block_size": [128, 128]}
        model = fp8.load_pretrained(by_hand(tmp_path / "in", tensors, plain.config.to_dict(), quantization))
        for name, layer in frozen_layers(model).items():
            assert torch.equal(layer.weight_scale, scales[name])

    @pytest.mark.parametrize("activations", ["none", "tensor", "token"])
    def test_other_activations(self, tmp_path, activations):
        fp8.save_pretrained(fp8.freeze(llama()), tmp_path / "in")
        model = fp8.load_pretrained(tmp_path / "in", activations=activations)
        assert {layer.activations for layer in frozen_layers(model).values()} == {activations}

    @pytest.mark.parametrize("make", ["llama", "gpt2"])
    def test_plain_checkpoint(self, tmp_path, make):
        if make == "llama":
            plain = llama(rope_parameters={"rope_type": "default", "rope_theta": 123.0})
        else:
            config = transformers.GPT2Config(vocab_size=99, n_positions=64, n_embd=64, n_layer=2, n_head=4)
            plain = transformers.GPT2LMHeadModel(config).bfloat16().eval()
        plain.save_pretrained(tmp_path / "in")
        model = fp8.load_pretrained(tmp_path / "in")
        assert not frozen_layers(model)
        other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "in").eval()
        assert torch.equal(model(IDS).logits, other(IDS).logits)
        assert fp8.load_pretrained(tmp_path / "in", dtype=torch.float32).dtype == torch.float32

    def test_names_without_the_models_own(self, tmp_path):
        config = transformers.GPT2Config(vocab_size=99, n_positions=64, n_embd=64, n_layer=1, n_head=4)
        plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        state = {n.removeprefix("transformer."): t for n, t in plain.state_dict().items() if n != "lm_head.weight"}
        model = fp8.load_pretrained(by_hand(tmp_path / "in", state, config.to_dict(), None), dtype=torch.bfloat16)
        assert torch.equal(model(IDS).logits, plain(IDS).logits)

    def test_a_head_that_is_not_tied_must_be_there(self, tmp_path):
        plain = llama()
        state = {name: tensor for name, tensor in plain.state_dict().items() if name != "lm_head.weight"}
        with pytest.raises(fp8.CheckpointError, match=r"has no tensor lm_head\.weight"):
            fp8.load_pretrained(by_hand(tmp_path / "in", state, plain.config.to_dict(), None))

    def test_generates(self, tmp_path):
        fp8.save_pretrained(fp8.freeze(llama()), tmp_path / "in")
        model = fp8.load_pretrained(tmp_path / "in")
        assert model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 23)


KINDS = {
    "compressed-tensors": ("channel", "token"),
    "block": ("block", "token"),
    "static": ("tensor", "static"),
}


def make_frozen(format, **options):
    model = llama(hidden=256, ffn=384, **options)
    weight, activations = KINDS[format]
    if activations == "static":
        fp8.calibrate(model, [IDS])
    return fp8.freeze(model, activations, weight)


def same_layers(a, b):
    a, b = frozen_layers(a), frozen_layers(b)
    assert a.keys() == b.keys()
    for name in a:
        for key, tensor in a[name].state_dict().items():
            other = b[name].state_dict()[key]
            assert tensor.dtype == other.dtype and tensor.shape == other.shape
            assert torch.equal(tensor.view(torch.uint8), other.view(torch.uint8)), (name, key)
        assert a[name].activations == b[name].activations


@pytest.fixture
def alone(monkeypatch):
    """transformers reads by its own quantisers, as it does where torch_fp8 is not imported."""
    tables = transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    monkeypatch.setitem(tables, "compressed-tensors", transformers.CompressedTensorsConfig)
    monkeypatch.setitem(tables, "fp8", transformers.FineGrainedFP8Config)


class TestWrite:
    @pytest.mark.parametrize("format", KINDS)
    @pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True, "attention_bias": True}])
    @pytest.mark.parametrize("size", [5 * 10**9, 300_000])
    def test_reads_back_to_the_bit(self, tmp_path, format, options, size):
        model = make_frozen(format, **options)
        fp8.save_pretrained(model, tmp_path / "out", format, max_shard_size=size)
        files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
        assert len(files) > 3 if size == 300_000 else files == ["model.safetensors"]
        assert os.listdir(tmp_path) == ["out"]
        tied = options.get("tie_word_embeddings", False)
        assert ("lm_head.weight" in folder.Folder(tmp_path / "out").entries) is not tied
        loaded = fp8.load_pretrained(tmp_path / "out")
        same_layers(model, loaded)
        assert torch.equal(model(IDS).logits, loaded(IDS).logits)

    @pytest.mark.parametrize("weight", ["channel", "tensor", "block"])
    @pytest.mark.parametrize("activations", ["none", "static", "tensor", "token"])
    def test_compressed_tensors_holds_all_kinds(self, tmp_path, weight, activations):
        model = llama(hidden=256, ffn=384)
        freeze(fp8.calibrate(model, [IDS]), activations, weight)
        fp8.save_pretrained(model, tmp_path / "out")
        same_layers(model, fp8.load_pretrained(tmp_path / "out"))
        same_layers(model, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"))

    @pytest.mark.parametrize("format", ["compressed-tensors", "block"])
    def test_transformers_reads_the_same_weights(self, tmp_path, format, alone):
        model = make_frozen(format, attention_bias=True)
        fp8.save_pretrained(model, tmp_path / "out", format, max_shard_size=300_000)
        how = {}
        if format == "block":
            how["quantization_config"] = transformers.FineGrainedFP8Config(dequantize=True)
        else:
            pytest.importorskip("compressed_tensors")
        other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16, **how).eval()
        ours = fp8.load_pretrained(tmp_path / "out", activations="none")
        for name, layer in frozen_layers(ours).items():
            weight = other.get_submodule(name).weight
            if weight.dtype == torch.bfloat16:
                assert torch.equal(weight, dequantize(layer.weight, layer.weight_scale).bfloat16())
        with torch.no_grad():
            logits, expected = ours(IDS).logits.float(), other(IDS).logits.float()
        assert (logits - expected).norm() / expected.norm() < (0.01 if format == "block" else 0.08)

    def test_config_by_the_packages_own_classes(self, tmp_path):
        pytest.importorskip("compressed_tensors")
        from compressed_tensors.quantization import QuantizationConfig

        for weight in ("channel", "tensor", "block"):
            model = fp8.freeze(llama(hidden=256, ffn=384), weight=weight)
            fp8.save_pretrained(model, tmp_path / weight)
            config = json.loads((tmp_path / weight / "config.json").read_text())
            parsed = QuantizationConfig.model_validate(config["quantization_config"])
            assert parsed.config_groups["group_0"].weights.strategy == weight
            assert parsed.ignore == ["lm_head"]
            tensors = safetensors.torch.load_file(tmp_path / weight / "model.safetensors")
            assert tensors["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.bfloat16

    def test_keeps_what_it_does_not_know(self, tmp_path):
        plain = llama()
        state, scales = quantized(plain, "tensor")
        tensors = {**state, **{f"{name}.weight_scale": s.reshape(()) for name, s in scales.items()}}
        tensors |= {f"{name}.input_scale": torch.tensor(0.0103) for name in scales}
        extra = {
            "model.layers.0.self_attn.k_scale": torch.tensor(0.25),
            "model.layers.0.self_attn.v_scale": torch.tensor(0.5),
            "model.layers.7.unknown": torch.arange(5),
        }
        path = by_hand(tmp_path / "in", tensors | extra, plain.config.to_dict(), AUTOFP8)
        (path / "tokenizer.json").write_text("{}")
        (path / "pytorch_model.bin").write_text("not copied")
        model = fp8.load_pretrained(path)
        fp8.save_pretrained(model, tmp_path / "out", "static")
        written = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
        assert written.keys() == (tensors | extra).keys()
        for name, tensor in (tensors | extra).items():
            assert written[name].dtype == tensor.dtype and torch.equal(written[name].float(), tensor.float())
        assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
        assert not (tmp_path / "out" / "pytorch_model.bin").exists()
        # Scales that are no bfloat16 values stay float32.
        fp8.save_pretrained(model, tmp_path / "compressed")
        same_layers(model, fp8.load_pretrained(tmp_path / "compressed"))

    def test_what_a_format_cannot_hold(self, tmp_path):
        model = make_frozen("compressed-tensors")
        for format in ("block", "static"):
            with pytest.raises(ValueError, match=f"format '{format}' holds layers of"):
                fp8.save_pretrained(model, tmp_path / "out", format)
        with pytest.raises(ValueError, match="format must be one of"):
            fp8.save_pretrained(model, tmp_path / "out", "gguf")
        with pytest.raises(ValueError, match=r"is 192 x 192; readers of blocks"):
            fp8.save_pretrained(fp8.freeze(llama(), weight="block"), tmp_path / "out", "block")
        with pytest.raises(ValueError, match="freeze it first"):
            fp8.save_pretrained(llama(), tmp_path / "out")
        mixed = fp8.freeze(llama(), filter=["*.up_proj"])
        fp8.freeze(mixed, weight="tensor", filter=["*.down_proj"])
        with pytest.raises(ValueError, match="layers of one kind"):
            fp8.save_pretrained(mixed, tmp_path / "out")
        config = transformers.GPT2Config(vocab_size=99, n_embd=64, n_layer=1, n_head=4)
        with pytest.raises(ValueError, match="was a Conv1D"):
            fp8.save_pretrained(fp8.freeze(transformers.GPT2LMHeadModel(config)), tmp_path / "out")
        assert os.listdir(tmp_path) == []

    def test_all_or_nothing(self, tmp_path, monkeypatch):
        model = make_frozen("compressed-tensors")
        calls = []

        def full_disk(handle):
            calls.append(handle)
            if len(calls) == 2:
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space left"):
            fp8.save_pretrained(model, tmp_path / "out", max_shard_size=300_000)
        assert os.listdir(tmp_path) == []

    def test_overwrites_nothing(self, tmp_path):
        model = make_frozen("compressed-tensors")
        (tmp_path / "out").mkdir()
        fp8.save_pretrained(model, tmp_path / "out")
        before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
        with pytest.raises(FileExistsError, match="exists already"):
            fp8.save_pretrained(model, tmp_path / "out")
        assert before == {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}


class TestCommandLine:
    @pytest.fixture
    def source(self, tmp_path):
        from tokenizers import Tokenizer, models, pre_tokenizers

        llama(hidden=256, ffn=384, tie_word_embeddings=True).save_pretrained(tmp_path / "in", max_shard_size=500_000)
        tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "in")
        (tmp_path / "text").write_text("a b a " * 300)
        return tmp_path / "in"

    @pytest.mark.parametrize("format", KINDS)
    def test_quantize_is_freeze_and_save(self, source, format, tmp_path, capsys):
        weight, activations = KINDS[format]
        options = ["--calibrate", str(tmp_path / "text")] if format == "static" else []
        assert main(["quantize", str(source), str(tmp_path / "out"), "--format", format, *options]) == 0
        model = fp8.load_pretrained(source)
        if format == "static":
            ids = torch.tensor([[1, 2, 1] * 300])
            fp8.calibrate(model, [ids[:, :512], ids[:, 512:]])
        fp8.freeze(model, activations, weight)
        same_layers(model, fp8.load_pretrained(tmp_path / "out"))
        fp8.save_pretrained(model, tmp_path / "saved", format)
        for config in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            assert (tmp_path / "out" / config).exists() and (tmp_path / "saved" / config).exists()
        quantizations = [json.loads((tmp_path / d / "config.json").read_text())["quantization_config"]
                         for d in ("out", "saved")]  # fmt: skip
        assert quantizations[0] == quantizations[1]

    def test_shards_and_layers(self, source, tmp_path):
        assert main(["quantize", str(source), str(tmp_path / "out"), "--max-shard-size", "300000",
                     "--layers", "model.layers.1.*"]) == 0  # fmt: skip
        assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
        assert len(frozen_layers(fp8.load_pretrained(tmp_path / "out"))) == 7

    def test_one_tensor_at_a_time(self, source, tmp_path, monkeypatch):
        from torch_fp8.checkpoints import shard

        alive, peak, read = [], [], shard.Entry.read

        def watched(entry):
            alive[:] = [ref for ref in alive if ref() is not None]
            tensor = read(entry)
            alive.append(__import__("weakref").ref(tensor))
            peak.append(len(alive))
            return tensor

        monkeypatch.setattr(shard.Entry, "read", watched)
        assert main(["quantize", str(source), str(tmp_path / "out")]) == 0
        assert max(peak) <= 2 and len(peak) > 10

    def test_inspect(self, source, tmp_path, capsys):
        main(["quantize", str(source), str(tmp_path / "out")])
        capsys.readouterr()
        assert main(["inspect", str(tmp_path / "out")]) == 0
        out = capsys.readouterr().out
        assert "model.layers.0.mlp.up_proj.weight  float8_e4m3fn [384, 256]" in out
        assert re.search(r"up_proj.weight_scale  bfloat16 \[384, 1\]  [\d.e-]+ \.\.\. ", out)
        assert "compressed-tensors: weights by channel, activations token" in out

    def test_evaluate(self, source, tmp_path, capsys):
        assert main(["quantize", str(source), str(tmp_path / "out")]) == 0
        capsys.readouterr()
        report = {}
        for other in (source, tmp_path / "out"):
            arguments = ["evaluate", str(source), str(other), "--text", str(tmp_path / "text"), "--tokens", "600"]
            assert main(arguments) == 0
            report[other] = dict(line.split() for line in capsys.readouterr().out.splitlines())
        same, fp8_model = report.values()
        assert float(same["tokens"]) == 598  # two windows, 512 and 88
        assert float(same["kld_mean"]) == 0 and float(same["ppl_ratio"]) == 1 and float(same["top1"]) == 1
        assert 0 < float(fp8_model["kld_mean"]) < 0.1
        assert float(fp8_model["ppl_low"]) <= float(fp8_model["ppl_ratio"]) <= float(fp8_model["ppl_high"])

    def test_errors(self, source, tmp_path, capsys):
        for arguments, message in (
            (["quantize", str(source), str(source)], "exists already"),
            (["quantize", str(source), str(tmp_path / "out"), "--format", "static"], "needs inputs to calibrate"),
            (["quantize", str(source), str(tmp_path / "out"), "--calibrate", str(tmp_path / "text")], "takes no calib"),
            (["quantize", str(tmp_path / "none"), str(tmp_path / "out")], "is no folder"),
            (["inspect", str(tmp_path)], "config.json: does not exist"),
        ):
            assert main(arguments) == 1
            assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        main(["quantize", str(source), str(tmp_path / "once")])
        assert main(["quantize", str(tmp_path / "once"), str(tmp_path / "out")]) == 1
        assert "quantised already" in capsys.readouterr().err

    def test_damaged_weight(self, source, tmp_path, capsys):
        file = next(source.glob("model-00001*"))
        tensors = safetensors.torch.load_file(file)
        name = next(n for n in tensors if n.endswith("_proj.weight"))
        tensors[name][0, 0] = float("nan")
        safetensors.torch.save_file(tensors, file)
        assert main(["quantize", str(source), str(tmp_path / "out")]) == 1
        error = capsys.readouterr().err
        assert f"{name} has Inf or NaN" in error and file.name in error
        assert not (tmp_path / "out").exists()


def test_download_cache(tmp_path):
    """Its snapshots are links to blobs beside them."""
    fp8.save_pretrained(make_frozen("compressed-tensors"), tmp_path / "plain")
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in (tmp_path / "plain").iterdir():
        shutil.move(file, blobs / file.name)
        (snapshot / file.name).symlink_to(os.path.join("..", "..", "blobs", file.name))
    assert frozen_layers(fp8.load_pretrained(snapshot))
    assert folder.Folder(snapshot).others()
