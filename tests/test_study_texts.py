"""The text of a study: its tokens, how they are kept, and what is refused of them."""

import json
import subprocess

import pytest
import torch
from studying import PLAN, ROOT, SCALES, TINY, command, run

from examples.gpt.errors import UserError
from examples.gpt.tokens import GPT2, Bytes, Corpus, fingerprint
from studies.lib import fog_results, scales_results
from studies.lib.corpus import make_tokens, read_corpus, save_corpus
from studies.lib.lines import read_lines
from studies.lib.runs import all_runs, claim
from studies.lib.training import Plan, check_text


@pytest.mark.parametrize("name", ["tokens", "tokens.xz"])
def test_tokens_are_read_as_they_were_written(tmp_path, tokens, name):
    written = make_tokens(tokens.parent / "text", Bytes(), "bytes", 0.2)
    save_corpus(tmp_path / name, written)
    read = read_corpus(tmp_path / name)
    assert read.train.equal(written.train) and read.val.equal(written.val) and read.val.numel() > 0.15 * 5 * 300 * 40
    assert (read.vocab, read.source, read.fingerprint) == (written.vocab, written.source, written.fingerprint)


def test_tokens_beyond_32767_are_read(tmp_path):
    train, val = torch.tensor([0, 32_768, 50_256, 65_535], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
    save_corpus(tmp_path / "tokens", Corpus(train, val, 65_536, "text", fingerprint(train, val)))
    assert read_corpus(tmp_path / "tokens").train.tolist() == [0, 32_768, 50_256, 65_535]


def test_damaged_tokens_are_refused(tmp_path, tokens):
    path = tmp_path / "tokens"
    save_corpus(path, make_tokens(tokens.parent / "text", Bytes(), "bytes", 0.2))
    content = bytearray(path.read_bytes())
    for damaged in (content[:-2], content + b"ab", b"nothing", content[:-3] + b"\x01" + content[-2:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            read_corpus(path)
    with pytest.raises(UserError, match="No such file"):
        read_corpus(tmp_path / "none")


def test_a_split_that_is_not_the_one_that_was_written_is_noticed(tmp_path, tokens):
    path = tmp_path / "tokens"
    save_corpus(path, make_tokens(tokens.parent / "text", Bytes(), "bytes", 0.2))
    line, _, ids = path.read_bytes().partition(b"\n")
    head = json.loads(line)
    moved = {**head, "train": head["train"] - 16, "val": head["val"] + 16}
    path.write_bytes(json.dumps(moved).encode() + b"\n" + ids)
    with pytest.raises(UserError, match="damaged"):
        read_corpus(path)
    del head["check"]  # which older files have not
    path.write_bytes(json.dumps(head).encode() + b"\n" + ids)
    with pytest.raises(UserError, match="tokens is none, or damaged .*older version.*write it anew"):
        read_corpus(path)
    path.write_bytes(b"[]\n" + ids)
    with pytest.raises(UserError, match="damaged"):
        read_corpus(path)


@pytest.mark.parametrize("share", ["0.9999999", "0.0000001"])
def test_a_text_that_does_not_give_both_splits_is_refused_with_what_the_command_has(tmp_path, share):
    (tmp_path / "text").write_text("a document")
    arguments = ["tokens", "--data", tmp_path / "text", "--tokens", tmp_path / "tokens", "--val-share", share]
    made = command(*arguments)
    assert made.returncode == 2 and made.stderr.endswith("; give more text or another --val-share\n"), made.stderr
    (tmp_path / "text").write_text("two\n<|endoftext|>\ndocuments")
    assert command(*arguments).returncode == 0
    assert read_corpus(tmp_path / "tokens").train.numel() == 5


def test_tokens_are_of_as_many_kinds_as_their_ids_need(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "encoder.json").write_text(json.dumps({"a": 7, "<|endoftext|>": 3}))
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\n")
    assert GPT2(tmp_path).vocab == 8
    (tmp_path / "encoder.json").write_text(json.dumps({"a": 65_536, "<|endoftext|>": 3}))
    with pytest.raises(UserError, match="must fit into two bytes, and this vocabulary has 65,537"):
        make_tokens(None, GPT2(tmp_path), "GPT-2 BPE", 0.2)


def test_a_text_that_is_too_short_is_refused(corpus):
    check_text(corpus, Plan(**PLAN))
    with pytest.raises(UserError, match="training text must be longer than a sequence of 1000000 tokens"):
        check_text(corpus, Plan(**{**PLAN, "context": 1_000_000}))
    with pytest.raises(UserError, match="validation needs 9,000,000 tokens that were held out"):
        check_text(corpus, Plan(**{**PLAN, "validated": 9_000_000}))


def test_a_text_is_not_replaced_by_its_tokens(tmp_path):
    text = tmp_path / "text"
    text.write_text("some words " * 500 + "\n<|endoftext|>\n" + "others " * 500)
    made = [*SCALES, "tokens", "--data", text, "--tokens"]
    refused = subprocess.run([*made, text], capture_output=True, text=True, cwd=ROOT)
    assert refused.returncode == 2 and "which is no file of tokens; name another" in refused.stderr
    assert text.read_text().startswith("some words")
    for _ in range(2):  # tokens may be replaced by tokens
        subprocess.run([*made, tmp_path / "tokens"], check=True, cwd=ROOT)


def test_a_text_split_elsewhere_is_another_text(tmp_path, tokens):
    study = ["parity", *TINY, "--arms", "bf16", "--steps", "2", "--minutes", "0.0001"]
    assert run(*study, tokens=tokens, out=tmp_path / "out").returncode == 0
    elsewhere = make_tokens(tokens.parent / "text", Bytes(), "bytes", 0.5)
    save_corpus(tmp_path / "tokens", elsewhere)
    assert elsewhere.fingerprint == read_corpus(tokens).fingerprint
    refused = run(*study, tokens=tmp_path / "tokens", out=tmp_path / "out")
    assert refused.returncode == 2 and "it differs in split (was " in refused.stderr, refused.stderr
    alone = [*SCALES, "run", tmp_path / "out" / "gpt-tiny_bf16_0", "--tokens", tmp_path / "tokens"]
    refused = subprocess.run(alone, capture_output=True, text=True, cwd=ROOT)
    assert refused.returncode == 2 and "of one split elsewhere: its split is " in refused.stderr, refused.stderr


def test_specs_that_did_not_name_the_split_have_it_where_it_is_known(tmp_path):
    for name, spec in {"known": {"data": "8e6e3b7e09571699"}, "unknown": {"data": "abc"}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "spec.json").write_text(json.dumps(spec))
    claim(tmp_path, {"known": {"data": "8e6e3b7e09571699", "split": 25_624_999}})
    for name, data in {"known": "8e6e3b7e09571699", "unknown": "abc"}.items():
        with pytest.raises(UserError, match="differs in split"):
            claim(tmp_path, {name: {"data": data, "split": 9}})
    for study, kind in {"scales": scales_results.Line, "fog": fog_results.Line}.items():
        lines = read_lines(ROOT / "studies" / "results" / study / "runs.jsonl", kind)
        known = [line.spec["split"] for line in lines if line.spec["data"] == "8e6e3b7e09571699"]
        assert known and set(known) == {25_624_999} and all("split" in line.spec for line in lines)
    (tmp_path / "known" / "spec.json").write_text("3")
    with pytest.raises(UserError, match="a spec must be a JSON object, got 3"):
        all_runs(tmp_path)


def test_tokens_of_a_checkpoint_without_a_tokenizer_are_refused_in_words(tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.24")
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    refused = command("tokens", "--checkpoint", tmp_path / "llama", "--tokens", tmp_path / "tokens")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr, refused.stderr
    said = refused.stderr.splitlines()[-1]
    assert f"--checkpoint: {tmp_path}/llama has no tokenizer that transformers can read" in said
    assert "put its tokenizer.json and tokenizer_config.json there" in said and not (tmp_path / "tokens").exists()
