"""What the package writes is there whole or not at all, and on the disk before it takes its name."""

import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch_fp8.files import new_folder, replacing
from torch_fp8.tuning import file as tuning_file


@pytest.fixture
def calls(monkeypatch):
    """What was synced and renamed, in order."""
    calls, fsync = [], os.fsync

    def synced(handle):
        calls.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def renamed(rename):
        return lambda *paths: (calls.append("rename"), rename(*paths))

    monkeypatch.setattr(os, "fsync", synced)
    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, renamed(getattr(os, name)))
    return calls


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, calls):
    path = tmp_path / "a"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old" and not calls
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a"]
    assert calls == ["file", "rename", "folder"]


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path, calls):
    with new_folder(tmp_path / "in" / "a") as folder:
        for name in "bc":
            (folder / name).write_text(name)
        assert not (tmp_path / "in" / "a").exists() and not calls
    assert sorted(os.listdir(tmp_path / "in" / "a")) == ["b", "c"] and os.listdir(tmp_path / "in") == ["a"]
    assert calls == ["file", "file", "folder", "rename", "folder"]


def test_a_tuning_is_written_that_way(tmp_path, calls):
    tuning_file.write(tmp_path / "tuning.json", {}, [])
    assert calls == ["file", "rename", "folder"] and os.listdir(tmp_path) == ["tuning.json"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("when", ["writing", "syncing"])
def test_an_error_leaves_what_was_there(tmp_path, monkeypatch, error, when):
    path = tmp_path / "a"
    path.write_text("old")

    def fails(*_):
        raise error

    if when == "syncing":
        monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(type(error)), replacing(path) as temporary:
        temporary.write_text("half")
        if when == "writing":
            fails()
    with pytest.raises(type(error)), new_folder(tmp_path / "b") as folder:
        (folder / "c").write_text("half")
        if when == "writing":
            fails()
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_several_may_write_one_file_at_once(tmp_path):
    path, texts = tmp_path / "a", [str(i) * 100_000 for i in range(8)]
    barrier = threading.Barrier(len(texts))

    def write(text):
        with replacing(path) as temporary:
            barrier.wait()
            temporary.write_text(text)

    with ThreadPoolExecutor(len(texts)) as pool:
        list(pool.map(write, texts))
    assert path.read_text() in texts and os.listdir(tmp_path) == ["a"]
