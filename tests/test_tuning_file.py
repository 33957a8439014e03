"""A tuning's file: what was saved is what is used, and a file of elsewhere or a damaged one is refused whole."""

import hashlib
import json

import pytest
import torch_fp8 as fp8
from fake_cublaslt import SHAPES


def signed(file):
    """The digest as the format has it, computed here anew."""
    body = {key: value for key, value in file.items() if key != "digest"}
    return {**body, "digest": hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()}


@pytest.fixture
def saved(cublaslt, tmp_path):
    """A tuning's file in a process that has not loaded it, and what it puts to use."""
    path = tmp_path / "tuning.json"
    fp8.tune(SHAPES).save(path)
    expected, cublaslt.used, cublaslt.timed = cublaslt.used, {}, []
    return path, expected


def assert_refused(cublaslt, path, match):
    before = dict(cublaslt.used)
    with pytest.raises(ValueError, match=match) as error:
        fp8.load_tuning(path)
    assert str(path) in str(error.value) and "tune again" in str(error.value)
    assert cublaslt.used == before and not cublaslt.timed


def test_round_trip_times_nothing(cublaslt, saved):
    path, expected = saved
    tuning = fp8.load_tuning(str(path))
    assert cublaslt.used == expected and len(expected) == 6 and not cublaslt.timed
    assert tuning == fp8.tune(SHAPES)


def test_digest_is_what_the_format_says(saved):
    file = json.loads(saved[0].read_text())
    assert signed(file) == file and (file["format"], file["version"]) == ("torch_fp8 tuning", 2)


def test_saving_is_all_or_nothing(saved, monkeypatch):
    path, _ = saved
    before, tuning = path.read_bytes(), fp8.load_tuning(path)

    def full(source, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m, pytest.raises(OSError, match="No space"):
        m.setattr("os.replace", full)
        tuning.save(path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["tuning.json"]
    tuning.save(path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["tuning.json"]


@pytest.mark.parametrize(
    "place, match",
    [
        ({"version": 130200}, "expected a file of cublaslt 130200, got 130100"),
        ({"gpu": "NVIDIA H100 80GB HBM3"}, "expected a file of gpu NVIDIA H100 80GB HBM3, got NVIDIA H200"),
        ({"capability": (9, 1)}, "expected a file of capability 9.1, got 9.0"),
    ],
)
def test_made_elsewhere(cublaslt, saved, monkeypatch, place, match):
    monkeypatch.setattr(fp8._C, "check_capability", lambda major, minor, name: None)
    for name, value in place.items():
        setattr(cublaslt, name, value)
    assert_refused(cublaslt, saved[0], match)


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda text: text[: len(text) // 2], "expected a whole JSON file, got one that does not parse"),
        (lambda text: "", "expected a whole JSON file"),
        (lambda text: "\xff" + text, "expected a whole JSON file"),
        (lambda text: "[" * 100_000, "expected a whole JSON file"),
        (lambda text: "[1]", r"expected a JSON object, got \[1\]"),
        (lambda text: "{}", "expected a file of format torch_fp8 tuning, got null"),
        (lambda text: text.replace('"version": 2,', '"version": 1,'), "expected a file of version 2, got 1"),
        (lambda text: text.replace("90.0", "80.0"), "expected the digest .* they changed since it was saved"),
        (lambda text: text.replace("02" * 72, "03" * 72), "expected the digest"),
        (lambda text: text.replace("H200", "H100"), "expected the digest"),
        (lambda text: text.replace('"digest"', '"other"'), "expected the digest .* got None"),
    ],
    ids=["truncated", "empty", "binary", "deep", "a list", "no format", "another version", "edited time",
         "edited algorithm", "edited GPU", "no digest"],
)  # fmt: skip
def test_damaged(cublaslt, saved, change, match):
    path, _ = saved
    text = path.read_text()
    assert change(text) != text
    path.write_text(change(text), encoding="latin-1")
    assert_refused(cublaslt, path, match)


@pytest.mark.parametrize(
    "field, value",
    [
        ("m", 0), ("m", "256"), ("m", True), ("n", 24), ("k", 1.0), ("a_dtype", "bfloat16"), ("b_dtype", ["x"]),
        ("out_dtype", "float8_e4m3fn"), ("out_dtype", "nn"), ("bias", 0), ("accumulate", None),
        ("fast_accum", "no"), ("scales", "columns"), ("scales", ["one"]), ("default_us", 100),
        ("default_us", float("nan")), ("chosen_us", float("inf")), ("chosen_us", -1.0), ("candidate", -1),
        ("candidate", False), ("algorithm", "00" * 71), ("algorithm", "zz" * 72), ("algorithm", None),
    ],
)  # fmt: skip
def test_wrong_types(cublaslt, saved, field, value):
    """Whole and signed, but with an entry, the last, that no tuning has."""
    path, _ = saved
    file = json.loads(path.read_text())
    file["entries"][-1][field] = value
    path.write_text(json.dumps(signed(file)))
    assert_refused(cublaslt, path, f"expected {field} of entry 5 to be .*, got")


@pytest.mark.parametrize("entry", [None, {}, "missing", "surplus"])
def test_wrong_fields(cublaslt, saved, entry):
    path, _ = saved
    file = json.loads(path.read_text())
    right = dict(file["entries"][-1])
    if entry == "missing":
        entry = {key: value for key, value in right.items() if key != "bias"}
    elif entry == "surplus":
        entry = {**right, "more": 1}
    file["entries"][-1] = entry
    path.write_text(json.dumps(signed(file)))
    assert_refused(cublaslt, path, "expected entry 5 to have the fields m, n, k, ")
    path.write_text(json.dumps(signed({**file, "entries": {}})))
    assert_refused(cublaslt, path, "expected a list of entries, got {}")


def test_refused_algorithm(cublaslt, saved):
    """One that the format allows and cuBLASLt does not: the others are not used either."""
    path, _ = saved
    fp8.tune([(32, 32, 32)])
    cublaslt.refused, cublaslt.timed = {512}, []
    match = "expected an algorithm that cuBLASLt takes for 512 x 128 x 64 .*, got status 15 for 2"
    assert_refused(cublaslt, path, match)


def test_missing_file(cublaslt, tmp_path):
    with pytest.raises(FileNotFoundError, match="none.json"):
        fp8.load_tuning(tmp_path / "none.json")
