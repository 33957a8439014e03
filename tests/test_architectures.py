"""tools/architectures.py, for some: a plain one, and those whose files name, merge or split weights in their own way."""

import importlib.util
from pathlib import Path

import pytest
import torch_fp8 as fp8
import transformers
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
    fp8.freeze(model, activations, weight)
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
