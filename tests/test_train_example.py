"""examples/train.py as a user meets it: a command that is run, killed, interrupted, resumed and given bad input."""

import json
import lzma
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch_fp8 as fp8
from scripts import called, script
from torch_fp8.picture import picture

TRAIN = Path(__file__).parents[1] / "examples" / "train.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(fp8.__file__).parents[1])}  # the package imported here
# One thread: the order of a sum is fixed, and tests that run beside each other do not wait for each other's threads.
TINY = ["--size", "tiny", "--context", "32", "--batch-tokens", "128", "--eval-batches", "2", "--device", "cpu",
        "--num-threads", "1"]  # fmt: skip
LONG = [*TINY, "--precision", "fp8", "--steps", "60", "--save-every", "10"]
LAST_STEP = 60


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Forty documents of arithmetic, which a model learns something of in a few steps."""
    path = tmp_path_factory.mktemp("data") / "text.txt"
    documents = ("\n".join(f"{i} plus {j} is {i + j}." for j in range(40)) for i in range(40))
    path.write_text("\n<|endoftext|>\n".join(documents))
    return path


def start(*arguments) -> subprocess.Popen:
    command = [sys.executable, str(TRAIN), *map(str, arguments)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    try:
        stdout, stderr = process.communicate(timeout=120)
    finally:
        process.kill()  # in vain where it has ended
    return process.returncode, stdout, stderr


def run(*arguments) -> tuple[int, str, str]:
    return finish(start(*arguments))


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline, f"{path.name} did not appear within a minute"
        time.sleep(0.005)


def log(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps(path: Path) -> list[int]:
    return [record["step"] for record in log(path) if "loss" in record]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_equal_to_the_bit(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), f"{name} differs by {(tensor - theirs[name]).abs().max():.3g}"


@pytest.fixture(scope="module")
def uninterrupted(text, tmp_path_factory):
    """The output folder of a run that nothing happened to. Tests read it and copy from it."""
    out = tmp_path_factory.mktemp("uninterrupted")
    code, _, stderr = run(*LONG, "--data", text, "--out", out)
    assert code == 0, stderr
    return out


def assert_same_outcome(out: Path, uninterrupted: Path) -> None:
    ours, theirs = (torch.load(folder / "fp8.ckpt", weights_only=True) for folder in (out, uninterrupted))
    assert ours["progress"]["step"] == theirs["progress"]["step"] == LAST_STEP
    assert_equal_to_the_bit(ours["model"], theirs["model"])
    assert_equal_to_the_bit(ours["fp8"], theirs["fp8"])
    assert steps(out / "fp8.jsonl") == list(range(1, LAST_STEP + 1))
    last = [[r["val_loss"] for r in log(folder / "fp8.jsonl") if "val_loss" in r] for folder in (out, uninterrupted)]
    assert last[0] == last[1]


def test_both_arms_run_and_learn(text, tmp_path):
    out = tmp_path / "out"
    code, stdout, stderr = run(*TINY, "--steps", 24, "--data", text, "--out", out)
    assert code == 0, stderr
    final = {}
    for arm in ("bf16", "fp8"):
        assert steps(out / f"{arm}.jsonl") == list(range(1, 25))
        records = [record for record in log(out / f"{arm}.jsonl") if "loss" in record]
        assert records[0].keys() == {"step", "loss", "lr", "grad_norm", "tokens", "seconds"}
        assert records[-1]["tokens"] == 24 * 128
        assert records[-1]["loss"] < records[0]["loss"] - 1
        final[arm] = next(r for r in reversed(log(out / f"{arm}.jsonl")) if "val_loss" in r)["val_loss"]
        assert f"{final[arm]:.4f}" in stdout and f"{final[arm]:.4f}" in (out / "summary.md").read_text()
    # The same seed and batches: the arms differ by FP8's rounding alone, but they do differ.
    first = [log(out / f"{arm}.jsonl")[0]["loss"] for arm in ("bf16", "fp8")]
    assert 0 < abs(first[0] - first[1]) < 0.01
    assert 0 < abs(final["bf16"] - final["fp8"]) < 0.1
    over_time = {r["step"]: r["scales"] for r in log(out / "fp8.jsonl") if "scales" in r}
    assert list(over_time) == list(range(1, 25))
    for scales in over_time.values():
        assert len(scales) == 16 and all(scale > 0 for by_role in scales.values() for scale in by_role.values())


def test_only_layers_that_fp8_makes_faster_are_converted_unless_that_is_none(monkeypatch, capsys):
    monkeypatch.syspath_prepend(TRAIN.parent)
    from gpt.arm import to_fp8
    from gpt.settings import SIZES

    from models.gpt import GPT

    for size, tokens, converted in (("124M", 49 * 1024, 48), ("124M", 32 * 1024, 36), ("small", 64 * 256, 24)):
        with torch.device("meta"):
            model = GPT(SIZES[size].shape, vocab=256, context=64)
        to_fp8(model, fp8.DelayedScaling(margin=1), tokens)
        assert {row.note for row in fp8.summary(model) if row.fp8} == {"DelayedScaling(margin=1)"}
        total = 4 * SIZES[size].shape.n_layer + 1
        assert f"fp8: {converted} of {total} linear layers are in FP8" in capsys.readouterr().out


def test_report(uninterrupted):
    summary = (uninterrupted / "summary.md").read_text()
    assert "on CPU" in summary.splitlines()[0] and "Measured on a CPU" in summary
    assert "train.py --size tiny" in summary and torch.__version__ in summary
    assert fp8.build_info()["note"] in summary
    speed = next(line for line in summary.splitlines() if line.startswith("| FP8")).split("|")[5]
    assert int(speed.replace(",", "")) > 0

    image = pytest.importorskip("matplotlib.image").imread(uninterrupted / "loss_and_scales.png")
    height, width, _ = image.shape
    assert width > height > 500
    for half in (image[:, : width // 2], image[:, width // 2 :]):  # losses, scales: not blank, not black
        assert 0.01 < (half[..., :3].min(axis=2) < 0.9).mean() < 0.5


def test_the_picture_shows_the_scales_over_the_steps(tmp_path, monkeypatch):
    """Three panels, each with the range of all layers and the median of a kind of layer at every logged step."""
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(TRAIN.parent)
    from gpt.arm import Progress
    from gpt.plot import fill
    from gpt.report import Result

    def scales(step):
        first = {"input": step, "weight": 2.0 * step, "grad_output": None if step == 1 else 4.0 * step}
        return {"blocks.0.mlp.up": first, "blocks.1.mlp.up": dict.fromkeys(first, 16.0)}

    records = [{"step": step, "loss": 3.0 / step, "val_loss": 3.0} for step in range(1, 6)]
    results = [Result(arm, Progress(), list(records), 1.0, 1.0) for arm in ("bf16", "fp8")]
    results[1].records.extend({"step": step, "scales": scales(step)} for step in range(1, 6))
    with picture(tmp_path / "loss_and_scales.png", "title", (13, 7)) as figure:
        fill(figure, results)
    panels = figure.axes[2:]
    assert [axes.get_title(loc="left") for axes in panels] == [
        "Scales of the inputs", "Scales of the weights", "Scales of the output gradients"
    ]  # fmt: skip
    for axes, factor in zip(panels, (1, 2, 4)):
        (line,) = axes.lines
        assert list(line.get_xdata()) == [1, 2, 3, 4, 5]
        expected = [(16 + factor * step) / 2 for step in range(1, 6)]
        if factor == 4:
            expected[0] = 16.0  # the other layer had no history
        assert list(line.get_ydata()) == expected


def test_tokenizer_and_folder(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    documents = [f"Document {i}:\n\n" + f"line {i} of many,\n  and more\n\nthe end. " * 40 for i in range(60)]
    documents[7] *= 60  # so long that it is encoded in pieces, which must not change a token
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(documents, vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False)
    vocabulary, merges = map(Path, tokenizer.save_model(str(tmp_path)))
    vocabulary.rename(tmp_path / "encoder.json")
    merges.rename(tmp_path / "vocab.bpe")
    folder = tmp_path / "data" / "sub"
    folder.mkdir(parents=True)
    (folder / "b.txt").write_text(documents[-1])
    (folder / "a.txt.xz").write_bytes(lzma.compress("\n<|endoftext|>\n".join(documents[:-1]).encode()))
    (folder / "picture.bin").write_bytes(bytes(100))

    code, stdout, stderr = run(*TINY, "--steps", 2, "--precision", "bf16", "--data", tmp_path / "data", "--tokenizer",
                               tmp_path, "--out", tmp_path / "out")  # fmt: skip
    assert code == 0, stderr
    documents[:-2] = [document + "\n" for document in documents[:-2]]  # the line ends before the separators
    lengths = [len(tokenizer.encode(document).ids) + 1 for document in documents]
    counts = f"{sum(lengths[:-1]):,} training and {lengths[-1]:,} validation tokens"
    assert f"{counts} of {tokenizer.get_vocab_size()} kinds" in stdout
    assert "1 of 3 files" in stdout


def test_killed_and_resumed_is_as_if_nothing_had_happened(text, tmp_path, uninterrupted):
    arguments = [*LONG, "--data", text, "--out", tmp_path]
    process = start(*arguments)
    wait_for(tmp_path / "fp8.ckpt", process)
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    saved = torch.load(tmp_path / "fp8.ckpt", weights_only=True)["progress"]["step"]
    assert 0 < saved < LAST_STEP
    left = tmp_path / ".fp8.ckpt.0123abcd.tmp"  # by a kill in the midst of a save
    left.write_bytes(b"half")
    with open(tmp_path / "fp8.jsonl", "a") as file:  # a later step than was saved, and one cut off by the kill
        file.write(json.dumps({"step": saved + 1, "loss": 0.0}) + '\n{"step": ')
    code, stdout, stderr = run(*arguments, "--resume")
    assert code == 0, stderr
    assert f"goes on after step {saved} " in stdout and not left.exists()
    assert_same_outcome(tmp_path, uninterrupted)


def test_ctrl_c_saves_and_resumes(text, tmp_path, uninterrupted):
    arguments = [*LONG, "--save-every", 1000, "--data", text, "--out", tmp_path]
    process = start(*arguments)
    wait_for(tmp_path / "fp8.jsonl", process)
    process.send_signal(signal.SIGINT)
    code, stdout, stderr = finish(process)
    assert code == 130, stderr
    assert "Traceback" not in stderr and "--resume" in stdout.splitlines()[-1]
    saved = torch.load(tmp_path / "fp8.ckpt", weights_only=True)["progress"]["step"]
    assert 0 < saved < LAST_STEP and steps(tmp_path / "fp8.jsonl") == list(range(1, saved + 1))
    code, _, stderr = run(*arguments, "--resume")
    assert code == 0, stderr
    assert_same_outcome(tmp_path, uninterrupted)


def test_finished_arm_is_not_trained_again(text, uninterrupted):
    before = (uninterrupted / "fp8.ckpt").read_bytes()
    code, stdout, stderr = run(*LONG, "--data", text, "--out", uninterrupted, "--resume")
    assert code == 0, stderr
    assert "validation loss" not in stdout and "| FP8" in stdout
    assert (uninterrupted / "fp8.ckpt").read_bytes() == before
    assert_same_outcome(uninterrupted, uninterrupted)


def test_time_limit_ends_an_arm_with_a_report(text, tmp_path):
    code, stdout, stderr = run(*TINY, "--steps", 10**6, "--time-limit", 1, "--precision", "fp8", "--data", text,
                               "--out", tmp_path)  # fmt: skip
    assert code == 0, stderr
    last = log(tmp_path / "fp8.jsonl")[-1]["step"]
    assert 0 < last < 10**6 and torch.load(tmp_path / "fp8.ckpt", weights_only=True)["progress"]["step"] == last
    assert "| FP8" in stdout and f"| {last} " in stdout


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (["--seed", "1"], "seed (was 0, is 1)"),
        (["--recipe", "delayed", "--margin", "1"], "recipe (was DelayedScaling(), is DelayedScaling(margin=1))"),
        (["--lr", "0.5", "--micro-batch", "2"], "micro_batch (was 4, is 2), lr (was 0.002, is 0.5)"),
    ],
)
def test_resume_with_other_settings_is_refused(text, uninterrupted, changed, named):
    assert_refused([*LONG, "--data", text, "--out", uninterrupted, "--resume", *changed], uninterrupted, named)


def test_resume_with_other_text_is_refused(text, tmp_path, uninterrupted):
    other = tmp_path / "other.txt"
    other.write_text(text.read_text().replace("plus", "and", 1))
    assert_refused([*LONG, "--data", other, "--out", uninterrupted, "--resume"], uninterrupted, "differs in data (was")


def test_earlier_run_is_not_overwritten_unless_told(text, uninterrupted):
    assert_refused([*LONG, "--data", text, "--out", uninterrupted], uninterrupted, "--overwrite")


def test_two_runs_do_not_write_into_one_folder(text, tmp_path):
    first = start(*LONG, "--data", text, "--out", tmp_path / "run")
    wait_for(tmp_path / "run" / "fp8.jsonl", first)
    first.send_signal(signal.SIGSTOP)  # it would end before the others begin
    for option in ("--overwrite", "--resume"):
        code, _, complaint = run(*LONG, "--data", text, "--out", tmp_path / "run", option)
        assert code == 2 and complaint.count("\n") == 1 and "another run is writing to" in complaint
    first.send_signal(signal.SIGCONT)
    assert finish(first)[0] == 0
    assert [record["step"] for record in log(tmp_path / "run" / "fp8.jsonl") if "loss" in record] == list(range(1, 61))


def test_a_full_disk(text, tmp_path):
    """A limit on the size of files stands for it."""
    limit = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); "
    main = "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", limit + main, str(TRAIN)]
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{ENVIRONMENT['PYTHONPATH']}:{TRAIN.parent}"}
    arguments = [*LONG, "--data", str(text), "--out", str(tmp_path / "run")]
    process = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)
    assert process.returncode == 2 and process.stderr.count("\n") == 1, process.stderr
    assert f"could not write {tmp_path / 'run' / 'fp8.ckpt'}: " in process.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["fp8.jsonl"]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign", "emptied"])
def test_damaged_checkpoint_is_refused(text, tmp_path, uninterrupted, damage):
    content = bytearray((uninterrupted / "fp8.ckpt").read_bytes())
    if damage == "truncated":
        del content[len(content) // 2 :]
    elif damage == "flipped":
        content[len(content) // 2] ^= 0x10
    path = tmp_path / "fp8.ckpt"
    path.write_bytes(content)
    if damage == "foreign":
        torch.save({"weight": torch.zeros(3)}, path)
    elif damage == "emptied":
        torch.save({**torch.load(path), "progress": {"steps": 3}}, path)
    assert_refused([*LONG, "--data", text, "--out", tmp_path, "--resume"], tmp_path, "must be a checkpoint")


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("text.txt", b"\n", "is empty"),
        ("text.txt", b"Too little.", "needs 33 tokens"),
        ("text.txt", "drei Äpfel".encode("latin-1"), "0xc4 at offset 5"),
        ("text.txt.xz", lzma.compress(b"A text " * 1000)[:-20], "does not decompress"),
    ],
    ids=["empty", "short", "not UTF-8", "truncated"],
)
def test_bad_text_is_refused(tmp_path, name, content, named):
    path = tmp_path / name
    path.write_bytes(content)
    assert_refused([*TINY, "--data", path, "--out", tmp_path / "out"], tmp_path, named)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--data", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--data", "/proc/self/mem"], "must be readable, /proc/self/mem: Input/output error"),
        (["--tokenizer", "nowhere"], "nowhere/encoder.json is not there"),
        (["--batch-tokens", "100"], "the nearest is 96"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--recipe", "current", "--bias", "3"], "--bias belongs to --recipe constant"),
        (["--margin", "99"], "margin must be an integer from 0 to 31, got 99"),
        (["--model", "fog-max", "--steps", "10", "--warm-up", "11"], "--warm-up must be at most --steps = 10, got 11"),
        (["--model", "fog-max", "--attention", "fp8", "--precision", "bf16"], "which --precision bf16 leaves out"),
        (
            ["--precision", "bf16", "--recipe", "delayed"],
            "--recipe is of the FP8 arm, which --precision bf16 leaves out",
        ),
        (["--precision", "bf16", "--margin", "0"], "--margin is of the FP8 arm"),
        (["--precision", "bf16", "--amax-history-len", "16"], "--amax-history-len is of the FP8 arm"),
        (["--precision", "bf16", "--bias", "0", "--shared-scale"], "--bias, --shared-scale are of the FP8 arm"),
        (["--precision", "bf16", "--attention", "16bit"], "give --precision fp8 or both"),
        (["--out", __file__], "--out must be a folder"),
    ],
)
def test_bad_arguments_are_refused(text, tmp_path, arguments, named):
    assert_refused([*TINY, "--data", text, "--out", tmp_path / "out", *arguments], tmp_path, named)


def assert_refused(arguments: list, folder: Path, named: str) -> None:
    before = contents(folder)
    refused = called(script("examples/train.py").main, TRAIN, *arguments)
    assert refused.returncode == 2, refused.stderr
    complaint = refused.stderr
    assert named in complaint and complaint.startswith("train.py: ") and complaint.count("\n") == 1
    assert contents(folder) == before
