"""Studies that begin from a checkpoint: inference under every policy, and fine-tuning."""

import json
import math
import re
import shutil
from dataclasses import replace

import pytest
import torch
import torch_fp8 as fp8
from studying import PLAN, command, run, scales

from examples.gpt.errors import UserError
from examples.gpt.tokens import Corpus, fingerprint
from studies.lib.arms import arm, make_model
from studies.lib.checkpoints import DITHER, Checkpoint, dither_
from studies.lib.corpus import read_corpus, save_corpus
from studies.lib.runs import all_runs, claim
from studies.lib.training import Plan, validate


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder of transformers' with a small Llama whose tokens are bytes."""
    transformers = pytest.importorskip("transformers", minversion="5.24")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=None, eos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "small_llama"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_inference_of_a_checkpoint_goes_on_from_the_last_whole_policy(tmp_path, tokens, checkpoint):
    study = ["infer", "--checkpoint", checkpoint, "--constants", "0", "1", "--context", "32", "--sweep-tokens", "64"]
    whole = run(*study, tokens=tokens, out=tmp_path / "whole")
    assert whole.returncode == 0 and "all 1 runs are done" in whole.stdout, whole.stderr
    log = tmp_path / "whole" / "small-llama_infer" / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    policies = [
        "bf16",
        "current",
        "amax",
        "cscale:0",
        "cscale:1",
        "histogram",
        "gc-amax",
        "gc-histogram",
        "gc-cscale:0",
    ]
    assert [json.loads(line)["policy"] for line in lines[:-1]] == policies
    result = json.loads(lines[-1])["result"]
    assert list(result["inference"]) == policies and len({of["loss"] for of in result["inference"].values()}) >= 5
    assert set(result["biases"]["model.layers.1.mlp.down_proj"]) == {"x", "w"} and result["parameters"] > 50_000
    assert "lm_head" not in result["biases"]

    # What is there is not measured again, and half a line is not there.
    altered = [lines[0], lines[1].replace(f"{result['inference']['current']['loss']}", "9.0")]
    log.write_text("".join(altered) + lines[2][:20])
    again = run(*study, tokens=tokens, out=tmp_path / "whole")
    assert again.returncode == 0, again.stderr
    assert log.read_text().splitlines(keepends=True)[:-1] == [*altered, *lines[2:-1]]
    assert all_runs(tmp_path / "whole")[0].result()["inference"]["current"]["loss"] == 9.0


def test_random_weights_are_run_by_name(tmp_path, tokens):
    study = ["infer", "--models", "llama-tiny", "--constants", "0", "0", "--context", "32", "--sweep-tokens", "64"]
    made = run(*study, tokens=tokens, out=tmp_path)
    assert made.returncode == 0 and "all 1 runs are done" in made.stdout, made.stderr
    assert all_runs(tmp_path)[0].result()["inference"]["bf16"]["loss"] == pytest.approx(math.log(256), abs=0.3)


def test_fine_tuning_begins_from_the_checkpoint(tmp_path, tokens, checkpoint):
    options = ["--context", "32", "--batch", "4", "--micro-batch", "4", "--val-tokens", "512", "--lr", "1e-9"]
    study = ["finetune", "--checkpoint", checkpoint, *options, "--seeds", "1", "--steps", "3", "--arms"]
    made = run(*study, "bf16", "amax", "--record", "2", tokens=tokens, out=tmp_path / "runs")
    assert made.returncode == 0 and "all 2 runs are done" in made.stdout, made.stderr
    assert all(one.spec["dither"] == DITHER for one in all_runs(tmp_path / "runs"))
    results = {one.name: one.result() for one in all_runs(tmp_path / "runs")}
    # With a learning rate that changes nothing, both arms have the checkpoint's loss.
    model = Checkpoint(checkpoint).model(torch.float32, torch.device("cpu"))
    plan = Plan(**{**PLAN, "context": 32, "validated": 512})
    expected = validate(model, read_corpus(tokens), plan, torch.device("cpu"))["loss"]
    assert [result["loss"] for result in results.values()] == [pytest.approx(expected, rel=1e-3)] * 2
    assert abs(expected - math.log(256)) > 0.5  # which random weights of another seed would not have
    assert results["small-llama_amax_0"]["loss_fp8"] != results["small-llama_amax_0"]["loss"]

    # Other weights are another run.
    other = tmp_path / "small_llama"
    shutil.copytree(checkpoint, other)
    model.model.norm.weight.data += 1
    model.save_pretrained(other)
    refused = run("finetune", "--checkpoint", other, *study[3:], "bf16", tokens=tokens, out=tmp_path / "runs")
    assert refused.returncode == 2 and "differs in checkpoint" in refused.stderr


def test_weights_are_moved_off_ties(checkpoint, corpus):
    """Of numbers of BF16 one in 16 is exactly between two of E4M3, where a change that is as good as none decides."""

    def tipped(weight):
        either = [(256 * weight * (1 + by)).to(torch.float8_e4m3fn).view(torch.uint8) for by in (-2e-7, 2e-7)]
        return either[0].ne(either[1]).float().mean()

    def moved(seed, most=DITHER):
        layer = torch.nn.Linear(512, 256)
        layer.weight.data.copy_(weight)
        dither_(layer, most, seed)
        return layer.weight.detach()

    weight = torch.empty(256, 512).uniform_(-0.1, 0.1).bfloat16().float()
    assert tipped(weight) > 0.03 and tipped(moved(0)) < 0.001
    assert torch.equal(moved(0).bfloat16().float(), weight)  # the same model in 16 bits
    assert torch.equal(moved(0), moved(0)) and not torch.equal(moved(0), moved(1)) and tipped(moved(0, 0.0)) > 0.03

    of_file = Checkpoint(checkpoint).model(torch.float32, torch.device("cpu")).lm_head.weight
    as_is, off = (make_model(PLAN | more, corpus, torch.device("cpu"), Checkpoint(checkpoint)).lm_head.weight
                  for more in ({}, {"dither": DITHER}))  # fmt: skip
    apart = (off / of_file - 1).abs().max()
    assert torch.equal(as_is, of_file) and DITHER / 2 < apart <= DITHER * 1.001


def test_layers_of_gpt_2_are_emulated_and_on_record_as_they_are_in_fp8(tmp_path, corpus):
    """They are no nn.Linear but Conv1D."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=256, n_positions=16, n_embd=64, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None,
        initializer_range=0.3,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match="gpt2 has no tokenizer that transformers can read; put its tokenizer.json"):
        Checkpoint(tmp_path / "gpt2").codec()  # of which the library makes one of a single word
    names = {f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    policies = {"study": "infer", "sweep": [0, 0], "sweep_tokens": 512, "steps": 8}
    specs = {"infer": PLAN | policies}
    specs |= {name: PLAN | arm(name) | {"study": "finetune", "record": 99} for name in ("bf16", "gc-amax", "delayed")}
    results = {}
    for one in claim(tmp_path / "runs", {name: {**spec, "loss_scale": 1.0} for name, spec in specs.items()}):
        assert scales.perform(one, corpus, torch.device("cpu"), lambda: False, tmp_path / "gpt2")
        results[one.name] = one.result()
        assert [of["biases"].keys() for of in [results["infer"], *one.records()] if "biases" in of][-1] == names
    losses = [of["loss"] for of in results.pop("infer")["inference"].values()]
    assert len(losses) == 8 and losses.count(losses[0]) == 1  # no policy is BF16
    assert len({of["loss"] for of in results.values()}) == 3


def test_a_model_without_a_layer_that_fp8_takes_is_refused(tmp_path, corpus):
    transformers = pytest.importorskip("transformers")
    config = transformers.FalconConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, bos_token_id=None, eos_token_id=None
    )
    transformers.FalconForCausalLM(config).save_pretrained(tmp_path / "falcon")
    with pytest.raises(UserError, match="the-falcon has no linear layer that FP8 takes; torch_fp8.convert says why"):
        make_model({"model": "the-falcon"}, corpus, torch.device("cpu"), Checkpoint(tmp_path / "falcon"))


def test_a_checkpoint_that_is_none_or_has_other_tokens_is_refused(tmp_path, tokens, checkpoint):
    for path in (tmp_path, tmp_path / "none.gguf"):
        with pytest.raises(UserError, match="must be a .gguf file or a folder with a config.json"):
            Checkpoint(path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="has a config.json and no weights"):
        Checkpoint(tmp_path)
    train, val = torch.full((99,), 300, dtype=torch.int32), torch.zeros(99, dtype=torch.int32)
    save_corpus(tmp_path / "tokens", Corpus(train, val, 301, "text", fingerprint(train, val)))
    made = run("infer", "--checkpoint", checkpoint, "--context", "8", "--sweep-tokens", "8",
               tokens=tmp_path / "tokens", out=tmp_path / "out")  # fmt: skip
    assert made.returncode == 1 and "the tokens are of 301 kinds and small-llama knows 256" in made.stderr


@pytest.mark.parametrize(
    "name, content",
    [("model.safetensors", None), ("model.safetensors", b""), ("config.json", None), ("config.json", b"null"),
     ("config.json", b"[" * 100_000), ("tokenizer.json", b"[]"), ("tokenizer_config.json", b"[]"),
     ("model.gguf", b""), ("model.gguf", b"GGUF"), ("model.gguf", b"GGUF" + 96 * b"\3")],
)  # fmt: skip
def test_a_damaged_checkpoint_is_refused_with_its_name(tmp_path, checkpoint, name, content):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    (folder / name).write_bytes((folder / name).read_bytes()[:-9] if content is None else content)
    path = folder / name if name.endswith(".gguf") else folder
    if not name.startswith("tokenizer"):
        with pytest.raises(UserError, match=f"{path} has no model that transformers can read; bring its files back"):
            Checkpoint(path).model(torch.float32, torch.device("cpu"))
    if not name.endswith(".safetensors"):
        with pytest.raises(UserError, match=f"{path} has no tokenizer that transformers can read; "):
            Checkpoint(path).codec()


@pytest.mark.parametrize("how", ["all of it", "a part", "a part, and no word of it", "by another method"])
def test_a_checkpoint_that_is_quantised_is_refused_before_anything_is_written(tmp_path, tokens, checkpoint, how):
    """Its FP8 would be called bf16."""
    transformers = pytest.importorskip("transformers")
    model, folder = transformers.AutoModelForCausalLM.from_pretrained(checkpoint), tmp_path / "model"
    if "by another" not in how:
        fp8.freeze(model.bfloat16(), filter=["*.0.*"] if "a part" in how else None)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    if "no word" in how:
        assert config.pop("quantization_config")
    if "by another" in how:
        config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    said = r"model\.layers\.0\.\S+ in model.safetensors is in FP8" if "no word" in how else "its config.json has a quan"
    for study in ("infer", "finetune"):
        made = run(study, "--checkpoint", folder, "--context", "32", tokens=tokens, out=tmp_path / "out")
        assert made.returncode == 2 and re.search(f"{folder} is quantised: {said}.*; give the checkpoint", made.stderr)
        assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_lacks_weights_of_its_model_is_refused(tmp_path, checkpoint):
    """The library would make random ones of them, and the run would not be the checkpoint's."""
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(
        UserError, match=r"model lacks 9 of its model's weights, model\.layers\.2\.\S+ among them; bring"
    ):
        Checkpoint(folder).model(torch.float32, torch.device("cpu"))


def test_a_checkpoint_of_another_config_is_another_one(tmp_path, checkpoint):
    other = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    assert Checkpoint(other).digest == Checkpoint(checkpoint).digest
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    assert Checkpoint(other).digest != Checkpoint(checkpoint).digest


def test_texts_are_tokenised_as_the_checkpoint_has_it(tmp_path, checkpoint):
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 5, "b": 6, "<end>": 7, "?": 8}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(folder)
    (tmp_path / "text").write_text("a b\n<|endoftext|>\nb c\n<|endoftext|>\nb b\n")
    arguments = ["tokens", "--data", tmp_path / "text", "--checkpoint", folder, "--tokens", tmp_path / "tokens"]
    made = command(*arguments, "--val-share", "0.4")
    assert made.returncode == 0, made.stderr
    corpus = read_corpus(tmp_path / "tokens")
    assert corpus.train.tolist() == [5, 6, 7, 6, 8, 7] and corpus.val.tolist() == [6, 6, 7]
    Checkpoint(folder).check_tokens(corpus.vocab)
    assert corpus.vocab == 9  # ids from 0 to the last one, of which four are tokens
    save_corpus(tmp_path / "other", replace(corpus, vocab=corpus.vocab - 1))  # which its embedding has rows for
    for study in ("infer", "finetune"):
        made = run(study, "--checkpoint", folder, "--context", "2", tokens=tmp_path / "other", out=tmp_path / "out")
        assert made.returncode == 2 and "the tokens are of 8 kinds and model knows 9: make them" in made.stderr
        assert not (tmp_path / "out").exists()
