"""tools/architectures.py, for some: a plain one, and those whose files name, merge or split weights in their way."""

import importlib.util
from pathlib import Path

import pytest
import torch_fp8 as fp8
import transformers
from frozen_pairs import freeze
from torch_fp8.checkpoints.folder import Folder
from torch_fp8.layers.frozen import frozen_layers

TOOL = Path(__file__).parent.parent / "tools" / "architectures.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("architectures", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("model_type", "word"),
    [
        ("llama", "passes"),
        ("gpt_neox", "passes"),  # embed_out in files, lm_head in models
        ("mamba2", "passes"),  # Infinity in its config
        ("hrm_text", "passes"),  # files hold gate and up, and the attention's, in one
        ("sarvam_moe", "passes"),  # and here q, k, v, by their sizes
        ("mixtral", "passes"),  # experts
        ("falcon_h1", "passes"),  # buffers that the model computes
        ("gpt2", "refused"),  # Conv1D
    ],
)
def test_round_trips_to_the_bit(tool, model_type, word, tmp_path):
    assert tool.attempt(model_type, tmp_path)[0] == word


@pytest.mark.parametrize("weight", ["channel", "tensor", "block"])
@pytest.mark.parametrize("activations", ["token", "static"])
def test_weights_that_files_hold_in_one(tool, tmp_path, weight, activations):
    """Scales follow the rows; what one scale cannot say is refused, with nothing written."""
    model = tool.build("hrm_text")
    for name, parameter in model.named_parameters():
        if name.endswith("gate_proj.weight"):
            parameter.mul_(8)  # so that one scale does not fit both parts
    ids = tool.torch.arange(20)[None]
    if activations == "static":
        fp8.calibrate(model, [ids])
    freeze(model, activations, weight)
    names = [name for name in frozen_layers(model) if name.endswith(("gate_proj", "up_proj"))]
    assert names
    for save in (model.save_pretrained, lambda path: fp8.save_pretrained(model, path)):
        path = tmp_path / save.__name__.strip("<>")
        if weight == "channel":
            save(path)
            for load in (fp8.load_pretrained, transformers.AutoModelForCausalLM.from_pretrained):
                tool.compare("", model, load(path), tool.logits(model))
        else:
            with pytest.raises(ValueError):
                save(path)
            assert not list(path.glob("*"))


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "gpt_neox"])
@pytest.mark.parametrize("save", ["ours", "transformers", "quantize"])
def test_what_is_not_fp8_is_ignored_by_name(tool, tmp_path, model_type, save):
    """Of every matrix in the files: a reader would take the others for FP8."""
    model = tool.build(model_type)
    model.save_pretrained(tmp_path / "in")
    if save == "quantize":
        tool.quantize_checkpoint(tmp_path / "in", tmp_path / "out")
    else:
        fp8.freeze(model)
        (model.save_pretrained if save == "transformers" else lambda path: fp8.save_pretrained(model, path))(
            tmp_path / "out"
        )
    opened = Folder(tmp_path / "out")
    ignored = opened.config["quantization_config"]["ignore"]
    plain = {
        name.removesuffix(".weight")
        for name, entry in opened.entries.items()
        if len(entry.shape) > 1 and entry.dtype == tool.torch.bfloat16 and "embed" not in name and "scale" not in name
    }
    plain.add("embed_out" if model_type == "gpt_neox" else "lm_head")
    assert plain <= set(ignored)
    assert all(f"{name}.weight_scale" not in opened.entries for name in ignored)
