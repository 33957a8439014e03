"""Frozen models as transformers knows them: what its own loading makes and its own saving writes."""

import json
import os
import subprocess
import sys

import accelerate
import pytest
import safetensors.torch
import torch
import torch_fp8 as fp8
import transformers
from torch import nn
from torch_fp8.layers.frozen import frozen_layers
from torch_fp8.observe.emulate import dequantize

IDS = torch.arange(40).view(2, 20)
KINDS = [("token", "channel"), ("token", "block"), ("static", "tensor"), ("none", "tensor"), ("tensor", "channel")]


def llama(**options):
    sizes = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=99, num_hidden_layers=2, dtype="bfloat16", **{**sizes, **options})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.normal_()
    return model


def freeze(model, activations="token", weight="channel", **options):
    if activations == "static":
        fp8.calibrate(model, [IDS])
    return fp8.freeze(model, activations, weight, **options)


def read(path, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **options)


def same(a, b):
    """The same state, to the bit, computed with in the same way."""
    states = a.state_dict(), b.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        other = states[1][name]
        assert tensor.dtype == other.dtype and tensor.shape == other.shape
        assert torch.equal(tensor.view(torch.uint8), other.view(torch.uint8)), name
    layers = frozen_layers(a), frozen_layers(b)
    assert layers[0].keys() == layers[1].keys()
    for name, layer in layers[0].items():
        other = layers[1][name]
        assert (layer.activations, layer.granularity) == (other.activations, other.granularity)
    assert torch.equal(a(IDS).logits, b(IDS).logits)


def trainer_saves(model, path):
    trainer = transformers.Trainer(
        model, transformers.TrainingArguments(str(path) + "-run", report_to="none", use_cpu=True)
    )
    trainer.save_model(str(path))


def accelerate_saves(model, path):
    accelerate.Accelerator().save_model(model, path)
    model.config.save_pretrained(path)


SAVE = {
    "save_pretrained": lambda model, path: model.save_pretrained(path),
    "in shards": lambda model, path: model.save_pretrained(path, max_shard_size="300KB"),
    "names of the model": lambda model, path: model.save_pretrained(path, save_original_format=False),
    "Trainer": trainer_saves,
    "accelerate": accelerate_saves,
    "ours": fp8.save_pretrained,
}


class TestSaving:
    @pytest.mark.parametrize("save", SAVE)
    @pytest.mark.parametrize(("activations", "weight"), KINDS)
    def test_reads_back_to_the_bit(self, tmp_path, save, activations, weight):
        model = freeze(llama(attention_bias=True), activations, weight)
        SAVE[save](model, tmp_path / "out")
        same(model, read(tmp_path / "out"))
        same(model, fp8.load_pretrained(tmp_path / "out"))

    @pytest.mark.parametrize("format", ["compressed-tensors", "block", "static"])
    def test_our_formats(self, tmp_path, format):
        kinds = {
            "compressed-tensors": ("token", "channel"),
            "block": ("token", "block"),
            "static": ("static", "tensor"),
        }
        model = freeze(llama(tie_word_embeddings=True), *kinds[format])
        fp8.save_pretrained(model, tmp_path / "out", format)
        loaded = read(tmp_path / "out")
        same(model, loaded)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        # What was loaded is saved again, in the form that transformers' own saving has.
        loaded.save_pretrained(tmp_path / "again")
        same(model, read(tmp_path / "again"))
        trainer_saves(loaded, tmp_path / "by a trainer")
        same(model, read(tmp_path / "by a trainer"))
        fp8.save_pretrained(loaded, tmp_path / "ours", format)
        same(model, fp8.load_pretrained(tmp_path / "ours"))

    def test_what_was_loaded_by_us_is_saved_by_transformers(self, tmp_path):
        fp8.save_pretrained(freeze(llama()), tmp_path / "in")
        model = fp8.load_pretrained(tmp_path / "in")
        model.save_pretrained(tmp_path / "out")
        same(model, read(tmp_path / "out"))

    def test_a_model_that_is_no_causal_one(self, tmp_path):
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
        model = transformers.BertModel(transformers.BertConfig(vocab_size=99, **sizes)).eval()
        fp8.freeze(model)
        model.save_pretrained(tmp_path / "out")
        loaded = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
        assert torch.equal(model(IDS).last_hidden_state, loaded(IDS).last_hidden_state)

    def test_a_model_within_another(self, tmp_path):
        """As in SentenceTransformer, which saves the one within."""
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
        outer = nn.Sequential(
            transformers.BertModel(transformers.BertConfig(vocab_size=99, **sizes)), nn.Linear(64, 64)
        )
        fp8.freeze(outer.eval())
        outer[0].save_pretrained(tmp_path / "out")
        loaded = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
        assert torch.equal(outer[0](IDS).last_hidden_state, loaded(IDS).last_hidden_state)

    def test_a_part_of_a_model(self, tmp_path):
        model = freeze(llama())
        model.model.save_pretrained(tmp_path / "out")
        loaded = transformers.AutoModel.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
        assert torch.equal(model.model(IDS).last_hidden_state, loaded(IDS).last_hidden_state)

    @pytest.mark.parametrize("save", ["save_pretrained", "ours"])
    def test_refused_before_a_byte_is_written(self, tmp_path, save):
        gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=99, n_embd=64, n_layer=1, n_head=4))
        mixed = freeze(llama(), filter=["*.up_proj"])
        for model, message in (
            (fp8.freeze(gpt2), "was a Conv1D, .*; keep the 16-bit checkpoint"),
            (freeze(mixed, "none", "tensor", filter=["*.down_proj"]), "layers of one kind"),
            (freeze(llama(hidden_size=192), weight="block"), "is 192 x 192; readers of blocks"),
        ):
            with pytest.raises(ValueError, match=message):
                SAVE[save](model, tmp_path / "out")
            assert not list(tmp_path.rglob("*.*"))

    def test_a_head_of_its_own_is_no_longer_tied(self, tmp_path):
        model = freeze(llama(tie_word_embeddings=True), filter=["*"])
        assert isinstance(model.lm_head, fp8.FrozenLinear) and not model.config.tie_word_embeddings
        model.tie_weights()
        before = model(IDS).logits
        for save in ("save_pretrained", "ours"):
            SAVE[save](model, tmp_path / save)
            same(model, read(tmp_path / save))
            same(model, fp8.load_pretrained(tmp_path / save))
        assert torch.equal(model(IDS).logits, before)

    def test_where_adapters_alone_are_written_the_base_need_not_be_writable(self):
        """transformers takes the adapters' part of the state then; its own adapters want a newer peft than is here."""
        model = freeze(llama(hidden_size=192), weight="block")
        model._hf_peft_config_loaded = True
        state, _ = model.hf_quantizer.get_state_dict_and_metadata(model)
        assert state.keys() == model.state_dict().keys()

    def test_layers_of_one_block(self, tmp_path):
        model = freeze(llama(hidden_size=128, intermediate_size=128, num_key_value_heads=4), weight="block")
        fp8.save_pretrained(model, tmp_path / "out", "block")
        same(model, fp8.load_pretrained(tmp_path / "out"))

    def test_the_config_tells_what_is_ignored(self, tmp_path):
        model = freeze(llama(), filter=["*.up_proj", "*.down_proj"])
        model.save_pretrained(tmp_path / "out")
        ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
        assert set(ignored) == {name for name, m in model.named_modules() if type(m) is nn.Linear}


def test_another_transformers_freezes_and_does_not_write(tmp_path, monkeypatch):
    """One that lacks something: freezing works, and no codes are written as if they were weights."""
    monkeypatch.setitem(sys.modules, "torch_fp8.checkpoints.quantizer", None)
    model = fp8.freeze(llama())
    assert model(torch.arange(8)[None]).logits.isfinite().all()
    for write in (model.save_pretrained, lambda path: fp8.save_pretrained(model, path)):
        with pytest.raises(ImportError, match=r'lacks something.*pip install "transformers>=5.24"'):
            write(tmp_path / "out")
    assert not (tmp_path / "out").exists()


class TestLoading:
    @pytest.mark.parametrize("weight", ["channel", "block", "tensor"])
    @pytest.mark.parametrize("size", ["5GB", "300KB"])
    def test_frozen_while_weights_arrive(self, tmp_path, weight, size):
        plain = llama(attention_bias=True)
        plain.save_pretrained(tmp_path / "in", max_shard_size=size)
        model = read(tmp_path / "in", quantization_config=fp8.QuantizationConfig(weight=weight))
        same(fp8.freeze(plain, weight=weight), model)
        assert not any(p.requires_grad for p in model.parameters())
        model.save_pretrained(tmp_path / "out")
        same(model, read(tmp_path / "out"))

    def test_the_filter(self, tmp_path):
        llama().save_pretrained(tmp_path / "in")
        model = read(tmp_path / "in", quantization_config=fp8.QuantizationConfig(filter=["*.up_proj"]))
        assert set(frozen_layers(model)) == {f"model.layers.{i}.mlp.up_proj" for i in range(2)}

    def test_no_16_bit_model_is_held(self, tmp_path, monkeypatch):
        """When a weight is quantised, those before it are not alive in 16 bits."""
        import weakref

        from torch_fp8.checkpoints import quantizer

        llama().save_pretrained(tmp_path / "in")
        alive, quantize = [], quantizer.quantize_weight

        def watched(weight, granularity):
            assert not [ref for ref in alive if ref() is not None]
            alive.append(weakref.ref(weight))
            return quantize(weight, granularity)

        monkeypatch.setattr(quantizer, "quantize_weight", watched)
        read(tmp_path / "in", quantization_config=fp8.QuantizationConfig())
        assert len(alive) == 14

    def test_conv1d(self, tmp_path):
        config = transformers.GPT2Config(vocab_size=99, n_positions=64, n_embd=64, n_layer=2, n_head=4)
        plain = transformers.GPT2LMHeadModel(config).bfloat16().eval()
        plain.save_pretrained(tmp_path / "in")
        model = read(tmp_path / "in", quantization_config=fp8.QuantizationConfig())
        assert torch.equal(model(IDS).logits, fp8.freeze(plain)(IDS).logits)

    def test_refused(self, tmp_path):
        plain = llama(tie_word_embeddings=True)
        plain.save_pretrained(tmp_path / "in")
        with pytest.raises(ValueError, match=r"torch_fp8: activations=\"static\" needs typical inputs"):
            read(tmp_path / "in", quantization_config=fp8.QuantizationConfig("static", "tensor"))
        with pytest.raises(ValueError, match="lm_head shares its weight"):
            read(tmp_path / "in", quantization_config=fp8.QuantizationConfig(filter=["*"]))
        with pytest.raises(ValueError, match="weight must be one of"):
            fp8.QuantizationConfig(weight="row")
        with pytest.raises(ValueError, match='activations="tensor", which would leave them in 16 bits; take'):
            fp8.QuantizationConfig("tensor", "block")
        with pytest.raises(ValueError, match="matches none"):
            read(tmp_path / "in", quantization_config=fp8.QuantizationConfig(filter=["*.nothing"]))

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_damaged_weight(self, tmp_path, value):
        plain = llama()
        plain.model.layers[0].mlp.up_proj.weight[0, 0] = value
        plain.save_pretrained(tmp_path / "in")
        with pytest.raises(RuntimeError):
            read(tmp_path / "in", quantization_config=fp8.QuantizationConfig())

    def test_a_missing_weight(self, tmp_path):
        for name, save in (("plain", llama().save_pretrained), ("fp8", freeze(llama()).save_pretrained)):
            save(tmp_path / name)
            file = tmp_path / name / "model.safetensors"
            tensors = safetensors.torch.load_file(file)
            del tensors["model.layers.0.mlp.up_proj.weight"]
            safetensors.torch.save_file(tensors, file, {"format": "pt"})
            options = {"quantization_config": fp8.QuantizationConfig()} if name == "plain" else {}
            with pytest.raises(ValueError, match=r"has no tensor model\.layers\.0\.mlp\.up_proj\.weight"):
                read(tmp_path / name, **options)

    def test_a_missing_bias(self, tmp_path):
        """transformers leaves it as memory was found."""
        for name, save in (("plain", llama().save_pretrained), ("fp8", freeze(llama()).save_pretrained)):
            save(tmp_path / name)
            config = tmp_path / name / "config.json"
            config.write_text(json.dumps({**json.loads(config.read_text()), "mlp_bias": True}))
            options = {"quantization_config": fp8.QuantizationConfig()} if name == "plain" else {}
            with pytest.raises(ValueError, match=r"has no tensor model\.layers\.0\.mlp\.(gate|up|down)_proj\.bias"):
                read(tmp_path / name, **options)

    @pytest.mark.parametrize("codes", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8])
    def test_codes_are_not_taken_for_values(self, tmp_path, codes):
        """FP8 files without a config that says so, and codes of another kind."""
        for name, save in (("plain", llama().save_pretrained), ("fp8", freeze(llama()).save_pretrained)):
            save(tmp_path / name)
            file = tmp_path / name / "model.safetensors"
            tensors = safetensors.torch.load_file(file)
            weight = tensors["model.layers.0.mlp.up_proj.weight"]
            tensors["model.layers.0.mlp.up_proj.weight"] = weight.to(codes)
            safetensors.torch.save_file(tensors, file, {"format": "pt"})
            options = {"quantization_config": fp8.QuantizationConfig()} if name == "plain" else {}
            if name == "plain" or codes != torch.float8_e4m3fn:
                with pytest.raises(fp8.CheckpointError, match=r"safetensors: .*up_proj\.weight is torch\.\w+, "):
                    read(tmp_path / name, **options)

    @pytest.mark.parametrize("first", ["torch_fp8", "transformers"])
    def test_either_may_be_imported_first(self, tmp_path, first):
        freeze(llama()).save_pretrained(tmp_path / "in")
        second = {"torch_fp8": "transformers", "transformers": "torch_fp8"}[first]
        code = f"""if True:
            import sys, torch, {first}
            from transformers import AutoModelForCausalLM{", LlamaForCausalLM" if first == "transformers" else ""}
            import {second}
            model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "in")!r})
            print(type(model.model.layers[0].mlp.up_proj).__name__, end="")
        """
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (run.returncode, run.stdout) == (0, "FrozenLinear"), run.stderr

    def test_right_without_torch_fp8(self, tmp_path):
        """transformers' own reader sees a compressed-tensors checkpoint."""
        pytest.importorskip("compressed_tensors")
        model = freeze(llama())
        model.save_pretrained(tmp_path / "in")
        code = f"""if True:
            import torch
            from transformers import AutoModelForCausalLM
            model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "in")!r})
            torch.save(model(torch.arange(40).view(2, 20)).logits.detach(), {str(tmp_path / "logits")!r})
        """
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        subprocess.run([sys.executable, "-c", code], check=True, env=environment)
        expected = model(IDS).logits.float()
        assert (torch.load(tmp_path / "logits").float() - expected).norm() / expected.norm() < 0.1

    def test_dequantize(self, tmp_path):
        model = freeze(llama(attention_bias=True))
        weights = {name: dequantize(layer.weight, layer.weight_scale) for name, layer in frozen_layers(model).items()}
        plain = model.dequantize()
        assert not frozen_layers(plain) and not hasattr(plain.config, "quantization_config")
        for name, weight in weights.items():
            assert torch.equal(plain.get_submodule(name).weight, weight.bfloat16())
        plain.save_pretrained(tmp_path / "out")
        assert torch.equal(read(tmp_path / "out")(IDS).logits, plain(IDS).logits)
