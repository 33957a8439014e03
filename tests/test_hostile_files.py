"""Checkpoints that somebody damaged, or built to do harm: an exception that names file and tensor, and nothing else."""

import copy
import json
import math
import os
import random
import signal
import struct
import subprocess
import sys
import warnings

import pytest
import safetensors.torch
import torch
import torch_fp8 as fp8
import transformers
from torch_fp8.__main__ import main
from torch_fp8.checkpoints.folder import Folder
from torch_fp8.checkpoints.shard import read_header

WEIGHT = "model.layers.0.mlp.up_proj.weight"
SCALE = "model.layers.0.mlp.up_proj.weight_scale"


@pytest.fixture(scope="session")
def sound(tmp_path_factory):
    """A sound static checkpoint, as config and (header, data)."""
    path = tmp_path_factory.mktemp("sound") / "static"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(vocab_size=20, num_hidden_layers=1, dtype="bfloat16", **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    fp8.freeze(fp8.calibrate(model, [torch.arange(20)[None]]), "static", "tensor")
    fp8.save_pretrained(model, path, "static")
    raw = (path / "model.safetensors").read_bytes()
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    return json.loads((path / "config.json").read_text()), json.loads(raw[8:end]), raw[end:]


class Checkpoint:
    """A copy of the sound one that a test damages before it writes it."""

    def __init__(self, sound, path):
        config, header, data = sound
        self.path, self.config, self.data = path, json.loads(json.dumps(config)), bytearray(data)
        self.header = json.loads(json.dumps(header))
        self.file = path / "model.safetensors"

    def write(self, text=None, length=None):
        self.path.mkdir(exist_ok=True)
        text = json.dumps(self.header).encode() if text is None else text
        self.file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + self.data)
        (self.path / "config.json").write_text(json.dumps(self.config))
        return self

    def store(self, name, value):
        begin, end = self.header[name]["data_offsets"]
        assert end - begin == len(value)
        self.data[begin:end] = value

    def remove(self, name):
        """A tensor, and its bytes."""
        begin, end = self.header.pop(name)["data_offsets"]
        del self.data[begin:end]
        for key, entry in self.header.items():
            if key != "__metadata__" and entry["data_offsets"][0] >= end:
                entry["data_offsets"] = [at - (end - begin) for at in entry["data_offsets"]]

    def refused(self, *words):
        """Loading raises an error that has these words."""
        with pytest.raises(fp8.CheckpointError) as error:
            fp8.load_pretrained(self.path)
        for word in words:
            assert word in str(error.value)


@pytest.fixture
def checkpoint(sound, tmp_path):
    return Checkpoint(sound, tmp_path / "in")


def test_the_sound_one_loads(checkpoint):
    fp8.load_pretrained(checkpoint.write().path)


class TestFiles:
    @pytest.mark.parametrize("left", [0, 5, 8, 100, -1])
    def test_truncated(self, checkpoint, left):
        raw = checkpoint.write().file.read_bytes()
        checkpoint.file.write_bytes(raw[:left])
        checkpoint.refused("model.safetensors")

    def test_truncated_between_header_and_tensor(self, checkpoint):
        entry = read_header(checkpoint.write().file)[WEIGHT]
        os.truncate(checkpoint.file, entry.begin + 1)
        with pytest.raises(fp8.CheckpointError, match=f"model.safetensors: {WEIGHT} ends early"):
            entry.read()

    @pytest.mark.parametrize("length", [2**20, 2**40, 2**63, 2**64 - 1])
    def test_header_longer_than_the_file(self, checkpoint, length):
        checkpoint.write(length=length).refused("model.safetensors", "too few for its header", str(length))

    def test_huge_header(self, checkpoint):
        checkpoint.write(text=b" " * (17 * 2**20)).refused("model.safetensors", "has a header of")

    @pytest.mark.parametrize(
        "text", [b"", b"[]", b"null", b"{", b'{"a": }', b"\xff\xfe{}", b'{"a": NaN}', b'"' + b"x" * 1000]
    )
    def test_no_json(self, checkpoint, text):
        checkpoint.write(text=text).refused("model.safetensors")

    @pytest.mark.parametrize("text", [b'{"a":' * 100_000, b"[" * 1_000_000, b'{"a":' + b"9" * 100_000 + b"}"])
    def test_json_bombs(self, checkpoint, text):
        checkpoint.write(text=text).refused("model.safetensors")

    def test_duplicate_keys(self, checkpoint):
        text = json.dumps(checkpoint.header).encode()
        twice = text[:-1] + b"," + json.dumps({WEIGHT: checkpoint.header[WEIGHT]}).encode()[1:]
        checkpoint.write(text=twice).refused("model.safetensors", WEIGHT, "twice")

    def test_overlap(self, checkpoint):
        names = sorted(checkpoint.header.keys() - {"__metadata__"}, key=lambda n: checkpoint.header[n]["data_offsets"])
        first = checkpoint.header[names[0]]
        nbytes = math.prod(first["shape"]) * 2 if first["dtype"] == "BF16" else math.prod(first["shape"])
        checkpoint.header["another"] = {**first, "data_offsets": [0, nbytes]}
        checkpoint.write().refused("model.safetensors", "overlaps")

    def test_hole_and_trailing_bytes(self, checkpoint):
        checkpoint.data += b"12345678"
        checkpoint.write().refused("model.safetensors", "accounts for")
        del checkpoint.header[WEIGHT]
        checkpoint.write().refused("model.safetensors", "leaves a hole before it")

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("shape", [-48, 32]),
            ("shape", [-48, -32]),
            ("shape", [2**63, 2]),
            ("shape", [2**62, 2**62, 4]),
            ("shape", [48.0, 32]),
            ("shape", [True, 48 * 32]),
            ("shape", [48, "32"]),
            ("shape", [1] * 1000),
            ("shape", None),
            ("shape", {"0": 48}),
            ("shape", [48, 33]),
            ("dtype", "F4"),
            ("dtype", "F8_E4M3FNUZ"),
            ("dtype", ["F8_E4M3"]),
            ("dtype", None),
            ("dtype", "BF16"),
            ("data_offsets", [-1, 48 * 32 - 1]),
            ("data_offsets", [0]),
            ("data_offsets", [48 * 32, 0]),
            ("data_offsets", [0, 2**64]),
            ("data_offsets", "ab"),
            ("data_offsets", [0.0, 1536.0]),
        ],
    )
    def test_bad_entries(self, checkpoint, key, value):
        checkpoint.header[WEIGHT][key] = value
        with pytest.raises(fp8.CheckpointError, match=f"model.safetensors: {WEIGHT}"):
            read_header(checkpoint.write().file)

    def test_outside_of_the_file(self, checkpoint):
        checkpoint.header[WEIGHT]["data_offsets"] = [2**40, 2**40 + 48 * 32]
        checkpoint.write().refused("model.safetensors", WEIGHT, "outside of the file")

    @pytest.mark.parametrize("entry", [None, [], "x", {}, {"dtype": "U8", "shape": [0]}])
    def test_entries_that_are_none(self, checkpoint, entry):
        checkpoint.header[WEIGHT] = entry
        checkpoint.write().refused("model.safetensors", WEIGHT)

    @pytest.mark.parametrize("metadata", [[], {"a": 1}, "x"])
    def test_metadata(self, checkpoint, metadata):
        checkpoint.header["__metadata__"] = metadata
        checkpoint.write().refused("model.safetensors", "__metadata__")


class TestTensors:
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0])
    @pytest.mark.parametrize("name", [SCALE, SCALE.replace("weight_scale", "input_scale")])
    def test_scales_that_are_none(self, checkpoint, value, name):
        checkpoint.store(name, struct.pack("<f", value))
        checkpoint.write().refused("model.safetensors", name, "not positive and finite")

    @pytest.mark.parametrize("name", [SCALE, SCALE.replace("weight_scale", "input_scale")])
    def test_missing_scales(self, checkpoint, name):
        checkpoint.remove(name)
        checkpoint.write().refused("model.safetensors", WEIGHT, name.rpartition(".")[2])

    @pytest.mark.parametrize("name", [SCALE, SCALE.replace("weight_scale", "input_scale")])
    def test_scale_of_a_wrong_dtype(self, checkpoint, name):
        checkpoint.header[name]["dtype"] = "I32"
        checkpoint.write().refused("model.safetensors", name, "int32")

    def test_two_scales(self, checkpoint):
        checkpoint.header[SCALE + "_inv"] = {"dtype": "F32", "shape": [], "data_offsets": [len(checkpoint.data)] * 2}
        checkpoint.header[SCALE + "_inv"]["data_offsets"][1] += 4
        checkpoint.data += struct.pack("<f", 1)
        checkpoint.write().refused("model.safetensors", "two scales", SCALE)

    @pytest.mark.parametrize("shape", [[48], [48, 1], [1, 48], [2, 24]])
    def test_scale_of_a_wrong_shape(self, checkpoint, shape):
        checkpoint.remove(SCALE)
        end = len(checkpoint.data)
        checkpoint.header[SCALE] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + 4 * 48]}
        checkpoint.data += struct.pack("<48f", *[1] * 48)
        checkpoint.write().refused("model.safetensors", SCALE, str(shape))

    def test_weight_of_a_wrong_shape(self, checkpoint):
        checkpoint.header[WEIGHT]["shape"] = [32, 48]
        checkpoint.write().refused("model.safetensors", WEIGHT, "[32, 48], expected [48, 32]")

    @pytest.mark.parametrize("dtype", ["F8_E5M2", "U8"])
    def test_weight_of_a_wrong_dtype(self, checkpoint, dtype):
        checkpoint.header[WEIGHT]["dtype"] = dtype
        checkpoint.write().refused("model.safetensors", WEIGHT)

    def test_missing_weight(self, checkpoint):
        checkpoint.remove(WEIGHT)
        checkpoint.write().refused(WEIGHT)

    def test_weights_without_a_place(self, checkpoint):
        checkpoint.config["num_hidden_layers"] = 0
        with pytest.warns(UserWarning, match="9 weights of .* have no place in LlamaForCausalLM"):
            fp8.load_pretrained(checkpoint.write().path)

    def test_fp8_where_no_linear_layer_is(self, checkpoint):
        name = "model.embed_tokens.weight"
        begin, end = checkpoint.header[name]["data_offsets"]
        checkpoint.remove(name)
        at, nbytes = len(checkpoint.data), (end - begin) // 2
        checkpoint.header[name] = {"dtype": "F8_E4M3", "shape": [20, 32], "data_offsets": [at, at + nbytes]}
        checkpoint.data += bytes(nbytes)
        checkpoint.write().refused("model.safetensors", name)


def quantization(**changes):
    def change(config):
        config["quantization_config"].update(changes)

    return change


def compressed(weights=None, inputs=None, **more):
    base = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    group = {"weights": {**base, **(weights or {})}, "input_activations": inputs}

    def change(config):
        config["quantization_config"] = {"quant_method": "compressed-tensors", "format": "float-quantized",
                                         "config_groups": {"group_0": group}, **more}  # fmt: skip

    return change


CONFIGS = {
    "no quantization_config": lambda config: config.pop("quantization_config"),
    "quantization_config is a list": lambda config: config.update(quantization_config=[]),
    "unknown method": quantization(quant_method="awq"),
    "no method": lambda config: config["quantization_config"].pop("quant_method"),
    "method is a list": quantization(quant_method=["fp8"]),
    "block size": quantization(weight_block_size=[64, 64]),
    "block size of another type": quantization(weight_block_size={"a": [128]}),
    "activation scheme": quantization(activation_scheme="magic"),
    "no groups": compressed(config_groups={}),
    "groups of another type": compressed(config_groups={"a": 3}),
    "int8": compressed({"type": "int"}),
    "four bits": compressed({"num_bits": 4}),
    "asymmetric": compressed({"symmetric": False}),
    "no strategy": compressed({"strategy": None}),
    "strategy": compressed({"strategy": "group"}),
    "block structure": compressed({"strategy": "block", "block_structure": [64, 128]}),
    "weights are none": compressed(config_groups={"a": {"weights": None}}),
    "packed": compressed(format="nvfp4-pack-quantized"),
    "sparse": compressed(sparsity_config={"format": "sparse-24-bitmask"}),
    "rotated": compressed(transform_config={"config_groups": {"R1": {}}}),
    "static by token": compressed(inputs={"num_bits": 8, "type": "float", "strategy": "token", "dynamic": False}),
    "two groups that differ": compressed(
        config_groups={
            name: {"weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}, "input_activations": inputs}
            for name, inputs in (("a", None), ("b", {"num_bits": 8, "type": "float", "strategy": "tensor"}))
        }
    ),
    "modelopt of int4": quantization(quant_method="modelopt", quant_algo="W4A16_AWQ"),
    "no model_type": lambda config: config.pop("model_type"),
    "unknown model_type": lambda config: config.update(model_type="../../x"),
    "a billion layers": lambda config: config.update(num_hidden_layers=10**9),
    "minus one layer": lambda config: config.update(num_hidden_layers=-1),
    "another size": lambda config: config.update(hidden_size=64),
    "a huge size": lambda config: config.update(intermediate_size=2**40),
    "a size that overflows": lambda config: config.update(vocab_size=2**63),
    "a size of another type": lambda config: config.update(hidden_size="many"),
    "no heads": lambda config: config.update(num_attention_heads=0),
}


class TestConfigs:
    @pytest.mark.parametrize("change", CONFIGS)
    def test_refused(self, checkpoint, change):
        CONFIGS[change](checkpoint.config)
        checkpoint.write().refused(str(checkpoint.path))

    @pytest.mark.parametrize("text", ["", "[]", "{" * 10, '{"a":' * 100_000, '{"a": 1, "a": 2}', '{"a": NaN}'])
    @pytest.mark.parametrize("name", ["config.json", "generation_config.json", "hf_quant_config.json"])
    def test_json(self, checkpoint, name, text):
        checkpoint.write()
        (checkpoint.path / name).write_text(text)
        checkpoint.refused(name)

    def test_code_of_a_checkpoint_does_not_run(self, checkpoint, tmp_path):
        ran = tmp_path / "ran"
        checkpoint.config |= {
            "auto_map": {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"},
            "attn_implementation": "somebody/kernel",
            "_attn_implementation": "somebody/kernel",
        }
        checkpoint.write()
        (checkpoint.path / "evil.py").write_text(f"open({str(ran)!r}, 'w')")
        fp8.load_pretrained(checkpoint.path)
        assert not ran.exists()


class TestPaths:
    def shard(self, checkpoint, name, **more):
        """The file becomes a shard, which the index calls by a name."""
        checkpoint.write()
        weight_map = dict.fromkeys(checkpoint.header.keys() - {"__metadata__"}, name) | more
        (checkpoint.path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        checkpoint.file.rename(checkpoint.path / "a.safetensors")
        return checkpoint

    def test_a_sound_index(self, checkpoint):
        fp8.load_pretrained(self.shard(checkpoint, "a.safetensors").path)

    @pytest.mark.parametrize(
        "name",
        ["../in/a.safetensors", "./a.safetensors", "/etc/passwd", "", ".", "..", "a.safetensors/", "x\\a.safetensors",
         "a\0.safetensors", "none.safetensors", "config.json", "a" * 10_000 + ".safetensors"],
    )  # fmt: skip
    def test_names_in_the_index(self, checkpoint, name):
        self.shard(checkpoint, name).refused(str(checkpoint.path))

    def test_an_absolute_name(self, checkpoint):
        self.shard(checkpoint, str(checkpoint.path / "a.safetensors")).refused("which is not in it")

    def test_index_and_shards_disagree(self, checkpoint):
        self.shard(checkpoint, "a.safetensors", ghost="a.safetensors").refused("ghost", "does not have it")
        index = checkpoint.path / "model.safetensors.index.json"
        weight_map = dict.fromkeys(checkpoint.header.keys() - {"__metadata__", WEIGHT}, "a.safetensors")
        index.write_text(json.dumps({"weight_map": weight_map}))
        checkpoint.refused(WEIGHT, "does not place there")

    @pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}'])
    def test_index_without_a_map(self, checkpoint, content):
        self.shard(checkpoint, "a.safetensors")
        (checkpoint.path / "model.safetensors.index.json").write_text(content)
        checkpoint.refused("index.json", "weight_map")

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
    def test_links_out_of_the_folder(self, checkpoint, tmp_path, name):
        checkpoint.write()
        (checkpoint.path / "tokenizer.json").write_text("{}")
        (checkpoint.path / name).rename(tmp_path / "elsewhere")
        (checkpoint.path / name).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(fp8.CheckpointError, match=f"{name}: is a link that leaves the folder"):
            Folder(checkpoint.path).others()

    def test_links_to_nothing_and_to_themselves(self, checkpoint):
        checkpoint.write().file.unlink()
        checkpoint.file.symlink_to("nothing")
        checkpoint.refused("model.safetensors", "does not exist")
        checkpoint.file.unlink()
        checkpoint.file.symlink_to("model.safetensors")
        checkpoint.refused("model.safetensors", "does not exist")

    def test_pipes_and_folders(self, checkpoint):
        checkpoint.write().file.unlink()
        os.mkfifo(checkpoint.file)
        checkpoint.refused("model.safetensors", "no regular file")
        checkpoint.file.unlink()
        checkpoint.file.mkdir()
        checkpoint.refused("model.safetensors", "no regular file")

    def test_other_weights_are_not_read(self, checkpoint):
        checkpoint.write().file.rename(checkpoint.path / "pytorch_model.bin")
        checkpoint.refused("has neither")

    def test_nothing_outside_of_the_target_is_written(self, checkpoint, tmp_path):
        """Names of tensors and files go into the target alone, and a refused source leaves no target."""
        checkpoint.config.pop("quantization_config")
        checkpoint.header["../../escape"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(checkpoint.data)] * 2}
        checkpoint.write()
        before = sorted(tmp_path.rglob("*"))
        assert main(["quantize", str(checkpoint.path), str(tmp_path / "out")]) == 1
        assert sorted(tmp_path.rglob("*")) == before


class TestSixteenBits:
    """What is wrong with a checkpoint that is to be quantised is told before anything is written."""

    @pytest.fixture
    def source(self, tmp_path):
        model = small("llama", intermediate_size=48)
        model.save_pretrained(tmp_path / "in")
        return tmp_path / "in"

    def change(self, source, **tensors):
        """Exchange, add or, by None, remove tensors; dots are written __."""
        state = safetensors.torch.load_file(source / "model.safetensors")
        for name, tensor in tensors.items():
            state[name.replace("__", ".")] = tensor
        state = {name: tensor for name, tensor in state.items() if tensor is not None}
        safetensors.torch.save_file(state, source / "model.safetensors", {"format": "pt"})

    def configure(self, source, **values):
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, **values}))

    def refused(self, source, capsys, *words):
        capsys.readouterr()
        before = sorted(source.parent.rglob("*"))
        assert main(["quantize", str(source), str(source.parent / "out")]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and all(word in error for word in words), error
        assert sorted(source.parent.rglob("*")) == before

    @pytest.mark.parametrize(
        ("tensors", "words"),
        [
            ({SCALE.replace(".", "__"): torch.ones(3)}, ("model.safetensors", SCALE, "is not FP8")),
            ({SCALE.replace(".", "__"): torch.ones(48, 1)}, ("model.safetensors", SCALE, "is not FP8")),
            ({WEIGHT.replace(".", "__"): None}, (WEIGHT,)),
            ({"model__norm__weight": None}, ("has no tensor model.norm.weight",)),
            ({"model__norm__weight": torch.ones(32, dtype=torch.int16)}, ("model.norm.weight", "int16")),
            (
                {"model__embed_tokens__weight": torch.ones(20, 31)},
                ("model.embed_tokens.weight", "[20, 31]", "[20, 32]"),
            ),
            *(
                (
                    {WEIGHT.replace(".", "__"): torch.ones(48, 32, dtype=dtype)},
                    ("model.safetensors", WEIGHT, str(dtype)),
                )
                for dtype in (
                    torch.int16,
                    torch.int32,
                    torch.int64,
                    torch.uint16,
                    torch.uint32,
                    torch.uint64,
                    torch.bool,
                )
            ),
        ],
    )
    def test_tensors(self, source, capsys, tensors, words):
        self.change(source, **tensors)
        self.refused(source, capsys, *words)

    @pytest.mark.parametrize(
        "values",
        [
            {"num_labels": 10**8},
            {"model_type": "bart", "decoder_layers": 10**6},
            {"model_type": "gpt_neo", "attention_types": [[["global"], 10**9]]},
            {"model_type": "qwen3", "num_hidden_layers": 10**9},
            {"model_type": "bart", "decoder_layers": 60_000},
            {"model_type": "mixtral", "num_local_experts": 60_000},
            {"model_type": "gpt2", "n_positions": 10**6},
        ],
    )
    def test_configs_that_describe_more_than_there_is(self, source, capsys, values):
        """Without building it."""
        self.configure(source, **values)
        self.refused(source, capsys)

    def test_a_stray_scale_is_not_written_beside_ours(self, source, tmp_path):
        self.change(source, **{SCALE.replace(".", "__"): torch.ones(48, 1)})
        model = fp8.freeze(fp8.load_pretrained(source))
        with pytest.raises(ValueError, match=f"{SCALE} would be written twice"):
            fp8.save_pretrained(model, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_buffers_of_other_kinds_are_no_quantisation(self, source, tmp_path):
        self.change(source, some__mask=torch.ones(4, dtype=torch.bool), some__bytes=torch.ones(4, dtype=torch.uint8))
        assert main(["quantize", str(source), str(tmp_path / "out")]) == 0
        assert Folder(tmp_path / "out").entries["some.mask"].dtype == torch.bool

    def test_infinity(self, source, tmp_path):
        text = (source / "config.json").read_text().replace("{", '{"limits": [0.0, Infinity, -Infinity, 1e400],', 1)
        (source / "config.json").write_text(text)
        assert main(["quantize", str(source), str(tmp_path / "out")]) == 0
        written = (tmp_path / "out" / "config.json").read_text()
        assert json.loads(written, parse_constant=pytest.fail)["limits"][1] == {"__float__": "Infinity"}
        assert fp8.load_pretrained(tmp_path / "out").config.limits == [0.0, math.inf, -math.inf, math.inf]

    def test_float32_without_a_dtype(self, source, tmp_path):
        model = small("llama", intermediate_size=48).float()
        model.save_pretrained(tmp_path / "float32")
        config = json.loads((tmp_path / "float32" / "config.json").read_text())
        del config["dtype"]
        (tmp_path / "float32" / "config.json").write_text(json.dumps(config))
        loaded = fp8.load_pretrained(tmp_path / "float32")
        assert loaded.dtype == torch.float32
        assert main(["quantize", str(tmp_path / "float32"), str(tmp_path / "out")]) == 0
        assert fp8.load_pretrained(tmp_path / "out").dtype == torch.float32
        assert fp8.load_pretrained(source).dtype == torch.bfloat16

    @pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
    def test_ended_by_a_signal(self, source, tmp_path, how):
        slow = """if True:
            import runpy, sys, time
            from torch_fp8.checkpoints import shard
            class Slow:
                def __get__(self, item, kind):
                    def read(*args):
                        print("reading", flush=True)
                        time.sleep(60)
                    return read
            shard.Entry.read = Slow()
            sys.argv[0] = "torch_fp8"
            runpy.run_module("torch_fp8", run_name="__main__")
        """
        command = [sys.executable, "-c", slow, "quantize", str(source), str(tmp_path / "out")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "reading\n"
        assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".partial")]
        process.send_signal(how)
        assert "Traceback" not in process.communicate(timeout=60)[1] and process.returncode == 128 + how
        assert [path.name for path in tmp_path.iterdir()] == ["in"]


class TestSizes:
    def test_inspect_reads_no_gigabytes_of_scales(self, checkpoint, capsys):
        """The file is sparse: a few bytes on the disk."""
        checkpoint.remove(SCALE)
        end, size = len(checkpoint.data), 6 * 2**30
        checkpoint.header[SCALE] = {"dtype": "F32", "shape": [size // 4], "data_offsets": [end, end + size]}
        checkpoint.write()
        os.truncate(checkpoint.file, checkpoint.file.stat().st_size + size)
        assert main(["inspect", str(checkpoint.path)]) == 0
        assert f"BAD: {size} bytes are no scales" in capsys.readouterr().out
        checkpoint.refused("model.safetensors", SCALE, "expected [1]")

    @pytest.mark.parametrize("name", [SCALE, SCALE.replace("weight_scale", "input_scale")])
    def test_scales_without_elements(self, checkpoint, name):
        checkpoint.remove(name)
        checkpoint.header[name] = {"dtype": "F32", "shape": [0], "data_offsets": [len(checkpoint.data)] * 2}
        checkpoint.write().refused("model.safetensors", name)
        assert main(["inspect", str(checkpoint.path)]) == 0

    @pytest.mark.parametrize("value", [2.0**-127, 1e-45, 2.0**127])
    def test_static_scales_without_an_inverse(self, checkpoint, value):
        name = SCALE.replace("weight_scale", "input_scale")
        checkpoint.store(name, struct.pack("<f", value))
        checkpoint.write().refused("model.safetensors", name, "2^-126 ... 2^126")

    def test_a_shard_that_vanishes(self, checkpoint):
        entry = read_header(checkpoint.write().file)[WEIGHT]
        checkpoint.file.unlink()
        with pytest.raises(fp8.CheckpointError, match=f"model.safetensors: {WEIGHT} cannot be read: No such file"):
            entry.read()

    @pytest.mark.parametrize("name", ["\\u001b[31mred", "a\\nb", "\\ud800", "x" * 600, "\\u202e", ""])
    def test_names_that_cannot_be_shown(self, checkpoint, name):
        at = len(checkpoint.data)
        text = (
            json.dumps(checkpoint.header)[:-1]
            + f', "{name}": {{"dtype": "U8", "shape": [0], "data_offsets": [{at}, {at}]}}}}'
        )
        with pytest.raises(fp8.CheckpointError, match="is no name") as error:
            read_header(checkpoint.write(text=text.encode()).file)
        assert str(error.value).isprintable() and len(str(error.value)) < 500

    def test_both_names_of_one_tensor(self, checkpoint):
        name = "model.norm.weight"
        checkpoint.header["norm.weight"] = {**checkpoint.header[name]}
        begin, end = checkpoint.header[name]["data_offsets"]
        checkpoint.header["norm.weight"]["data_offsets"] = [len(checkpoint.data), len(checkpoint.data) + end - begin]
        checkpoint.data += checkpoint.data[begin:end]
        checkpoint.write().refused("model.safetensors", "norm.weight and model.norm.weight are both")


def mutations(rng, raw, header_end):
    """A damaged copy of a file: bits, bytes, numbers and pieces of it."""
    raw = bytearray(raw)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(raw)) if rng.random() < 0.1 else rng.randrange(min(header_end, len(raw)))
        kind = rng.randrange(6)
        if kind == 0:
            raw[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            raw[at] = rng.randrange(256)
        elif kind == 2:
            raw[at : at + 1] = rng.choice([b"9", b"-", b"[", b"{", b'"', b"0", b",", b"1e9", b"null", b"\\u0000"])
        elif kind == 3:
            del raw[at : at + rng.randrange(1, 40)]
        elif kind == 4:
            raw[at:at] = raw[at : at + rng.randrange(1, 40)]
        else:
            del raw[rng.randrange(len(raw)) :]
        if not raw:
            break
    if rng.random() < 0.7 and len(raw) > 8:  # a length that still fits, so that the header is looked at
        raw[:8] = struct.pack("<Q", header_end - 8)
    return bytes(raw)


def test_fuzz(checkpoint):
    """TORCH_FP8_FUZZ=10000 for longer."""
    raw = checkpoint.write().file.read_bytes()
    header_end = 8 + struct.unpack("<Q", raw[:8])[0]
    rng, refused = random.Random(0), 0
    for _ in range(int(os.environ.get("TORCH_FP8_FUZZ", 300))):
        checkpoint.file.write_bytes(mutations(rng, raw, header_end))
        try:
            for entry in read_header(checkpoint.file).values():
                assert entry.read().nbytes == entry.nbytes <= len(raw) + 1000
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of weights without a place
                fp8.load_pretrained(checkpoint.path)
        except fp8.CheckpointError as error:
            assert str(checkpoint.path) in str(error)
            refused += 1
    assert refused > 100


def test_fuzz_config(checkpoint):
    text = json.dumps(checkpoint.write().config).encode()
    rng = random.Random(1)
    for _ in range(int(os.environ.get("TORCH_FP8_FUZZ", 300)) // 6):
        (checkpoint.path / "config.json").write_bytes(mutations(rng, text, len(text)))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                fp8.load_pretrained(checkpoint.path)
        except fp8.CheckpointError as error:
            assert str(checkpoint.path) in str(error)


def small(kind, **sizes):
    config = transformers.CONFIG_MAPPING[kind](
        vocab_size=20, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, **sizes
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


# What is renamed (gpt_neox), merged (mixtral: experts) or has Infinity (mamba2) between file and model; and FP8.
FUZZED = {
    "llama": lambda: fp8.freeze(small("llama", intermediate_size=48)),
    "mixtral": lambda: small("mixtral", intermediate_size=48, num_local_experts=2),
    "gpt_neox": lambda: fp8.freeze(small("gpt_neox", intermediate_size=48)),
    "mamba2": lambda: small("mamba2", num_heads=4, head_dim=16, state_size=8, n_groups=1),
}
ODD = [
    *(-1, 0, 1, 2, 3, 7, 64, 10**5, 2**31, 2**63, 10**40, 0.5, -0.5, 1e308, math.inf, None, True, False),
    *("", "x", "gelu", "float16", "../x", [], [0], [10**9], ["a", "b"], {}, {"a": 1}, {"rope_type": "yarn"}),
    [[["global"], 10**9]],
]


def places(value):
    """Every (container, key) within JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key
        yield from places(item)


def change_values(rng, value):
    """Change, drop, repeat or add some values of JSON, in place."""
    for _ in range(rng.choice([1, 1, 2, 4])):
        (container, key), (other, its) = (rng.choice(list(places(value)) or [({"x": 0}, "x")]) for _ in range(2))
        kind = rng.randrange(6)
        if kind < 3:
            container[key] = copy.deepcopy(rng.choice(ODD))
        elif kind == 3:
            container[key] = copy.deepcopy(other[its])
        elif kind == 4 and isinstance(container, dict):
            name = rng.choice(["num_labels", "decoder_layers", "layer_types", "num_experts", f"{key}s"])
            container[name] = copy.deepcopy(rng.choice(ODD))
        elif isinstance(container, dict):
            del container[key]


@pytest.mark.parametrize("kind", FUZZED)
def test_fuzz_values_of_configs_and_indexes(kind, tmp_path):
    """A CheckpointError, or a model with the file's values; TORCH_FP8_FUZZ=10000 for longer."""
    model = FUZZED[kind]()
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    state, rng, refused = model.state_dict(), random.Random(kind), 0
    files = {name: (tmp_path / name).read_text() for name in ("config.json", "model.safetensors.index.json")}
    for _ in range(int(os.environ.get("TORCH_FP8_FUZZ", 100)) // 4):
        changed = rng.choice(sorted(files))
        value = json.loads(files[changed])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            change_values(rng, value)
            (tmp_path / changed).write_text(json.dumps(value))
            try:
                loaded = fp8.load_pretrained(tmp_path).state_dict()
            except fp8.CheckpointError as error:
                assert str(tmp_path) in str(error)
                refused += 1
            else:
                for name in state.keys() & loaded.keys():
                    expected = state[name].to(loaded[name].dtype)
                    assert torch.equal(expected.view(torch.uint8), loaded[name].view(torch.uint8)), (name, value)
        (tmp_path / changed).write_text(files[changed])
    assert refused > 5
