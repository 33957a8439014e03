"""The trainers of other libraries: the examples learn, and what they resume goes on to the bit."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch_fp8 as fp8
from scripts import called
from torch import nn

ROOT = Path(__file__).parents[1]
transformers = pytest.importorskip("transformers")


@pytest.fixture
def one_gpu(monkeypatch):
    """Trainer asks how many there are, and wraps in nn.DataParallel where there are several. The example hides all but
    one, which this process, where CUDA runs already, does not notice; and which later tests must not inherit."""
    count = min(1, torch.cuda.device_count())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))


def tiny_llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def losses_of(output):
    return [float(loss) for loss in re.findall(r"(?:\bloss'?:? '?|-> )([0-9.]+)", output)]


@pytest.mark.parametrize(
    ("name", "library"),
    [("trainer", "transformers"), ("accelerate_train", "accelerate"), ("lightning_train", "lightning")],
)
def test_examples_learn_across_a_restart(name, library, tmp_path):
    pytest.importorskip(library)
    script = ROOT / "examples" / f"{name}.py"
    assert len(script.read_text().splitlines()) <= 46
    command = [sys.executable, script, tmp_path / "out", ROOT / "README.md"]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": "0"})
    assert run.returncode == 0, run.stderr[-3000:]
    assert "torch_fp8:" not in run.stderr  # no warning of ours
    losses = losses_of(run.stdout)
    assert losses[0] > 5 and losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("name", "library"),
    [("trainer", "transformers"), ("accelerate_train", "accelerate"), ("lightning_train", "lightning")],
)
def test_examples_tell_how_to_call_them(name, library, tmp_path, monkeypatch, one_gpu):
    pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    example = ROOT / "examples" / f"{name}.py"
    run = called(lambda: runpy.run_path(str(example), run_name="__main__"), example, "--help")
    assert run.returncode == 0 and run.stdout.startswith(f"usage: {name}.py [-h] [folder] [text]")
    assert not list(tmp_path.iterdir())  # nothing was trained


@pytest.mark.parametrize("how", ["True", "path", "moved", "argument"])
def test_trainer_resumes_to_the_bit(tmp_path, how, monkeypatch, one_gpu):
    """Twenty steps at once against ten, a new process' worth of objects, and ten more."""
    monkeypatch.setattr(sys, "argv", ["trainer.py", str(tmp_path / "run"), str(ROOT / "LICENSE")])
    trainer = runpy.run_path(str(ROOT / "examples" / "trainer.py"))["trainer"]
    whole = trainer(20)
    whole.train()
    folder = tmp_path / "run" / "checkpoint-10"
    resume = {"True": True, "path": str(folder), "moved": str(tmp_path / "elsewhere"), "argument": True}[how]
    if how == "moved":
        folder.rename(resume)
    resumed = trainer(20)
    if how == "True":
        (tmp_path / "run" / "checkpoint-20").rename(tmp_path / "later")
    elif how == "argument":
        resume = resumed.args.resume_from_checkpoint = str(folder)
    resumed.train(resume_from_checkpoint=resume)
    for (name, p), q in zip(whole.model.named_parameters(), resumed.model.parameters()):
        assert torch.equal(p, q), name
    for (key, a), b in zip(fp8.state_dict(whole.model).items(), fp8.state_dict(resumed.model).values()):
        assert torch.equal(a, b), key


def test_trainer_warns_of_a_checkpoint_without_scaling_state(tmp_path, monkeypatch, one_gpu):
    monkeypatch.setattr(sys, "argv", ["trainer.py", str(tmp_path), str(ROOT / "LICENSE")])
    trainer = runpy.run_path(str(ROOT / "examples" / "trainer.py"))["trainer"]
    trainer(10).train()
    file = tmp_path / "checkpoint-10" / "trainer_state.json"
    saved = json.loads(file.read_text())
    saved["stateful_callbacks"]["ScalingCallback"]["attributes"]["scaling"] = None
    file.write_text(json.dumps(saved))
    with pytest.warns(UserWarning, match="no scaling state"):
        trainer(12).train(resume_from_checkpoint=True)


def test_checkpoints_are_those_of_the_plain_model(tmp_path):
    model = fp8.convert(tiny_llama(), tokens=None)
    model.save_pretrained(tmp_path)
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    for (name, p), (other, q) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert name == other and torch.equal(p, q)
    again = fp8.convert(plain, tokens=None)
    tokens = torch.arange(16)[None]
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_gradient_checkpointing_of_transformers():
    models = [fp8.convert(tiny_llama(), tokens=None) for _ in range(2)]
    models[1].gradient_checkpointing_enable()
    tokens = torch.arange(32).view(2, 16)
    for model in models:
        model.train()
        model(input_ids=tokens, labels=tokens).loss.backward()
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters()):
        assert torch.equal(p.grad, q.grad), name


@pytest.mark.parametrize("convert_first", [True, False])
def test_lora_over_a_frozen_fp8_base(convert_first):
    peft = pytest.importorskip("peft")
    model = tiny_llama()
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    base = ["model.layers.*"] if convert_first else ["*base_layer", "*k_proj", "*v_proj", "*o_proj"]
    if convert_first:
        fp8.convert(model, filter=base)
    model = peft.get_peft_model(model, config)
    if not convert_first:
        fp8.convert(model, filter=base)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, fp8.Linear)}
    assert len([name for name in layers if "base_layer" in name]) == 4 and not any("lora_" in name for name in layers)
    before = {name: layer.weight.clone() for name, layer in layers.items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens = torch.arange(32).view(2, 16)
    losses = []
    for _ in range(10):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(layer.weight, before[name]) for name, layer in layers.items())
    assert all(layer.fp8_slots[0, 3] > 0 for layer in layers.values())  # scales of a frozen base follow its inputs

    # Merging writes through .data; what is used afterwards is the merged weight.
    merged = model.eval().merge_and_unload()
    layer = merged.model.layers[0].self_attn.q_proj
    assert isinstance(layer, fp8.Linear)
    x = torch.randn(4, 64)
    twin = fp8.Linear(64, 64, bias=False).eval()
    twin.load_state_dict(layer.state_dict())
    fp8.load_state_dict(twin, fp8.state_dict(layer))
    changed = next(weight for name, weight in before.items() if name.endswith("layers.0.self_attn.q_proj.base_layer"))
    assert not torch.equal(layer.weight, changed) and torch.equal(layer(x), twin(x))


def test_scaling_state_is_an_object_for_who_wants_one():
    model = nn.Sequential(fp8.Linear(16, 16))
    state = fp8.ScalingState(model)
    saved = {key: value + 0 for key, value in state.state_dict().items()}
    saved["0.fp8_history"][0, 0] = 3.0
    state.load_state_dict(saved)
    assert model[0].fp8_history[0, 0] == 3.0
