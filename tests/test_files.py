"""What the package writes is there whole or not at all, and on the disk before it takes its name; where it cannot be
written or is none of the package's, that is said."""

import errno
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch_fp8 as fp8
from torch_fp8.files import check_free, new_folder, remove_leftovers, replacing
from torch_fp8.observe.watch import read_log
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


def test_an_error_of_the_disk_names_the_file_or_folder_that_was_to_be_written(tmp_path):
    for writes in (replacing, new_folder):
        with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'a'}'$"), writes(tmp_path / "a"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a write has it
        with pytest.raises(IsADirectoryError, match=f": '{tmp_path / 'a'}'$"), writes(tmp_path / "a") as temporary:
            temporary.mkdir(exist_ok=True)
            try:
                temporary.write_text("")
            finally:
                temporary.rmdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "unlink", lambda path: os.listdir("/none"))  # as on a disk that became read-only
            with pytest.raises(OSError, match=f"space left on device: '{tmp_path / 'a'}'$"), writes(tmp_path / "a"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with pytest.raises(OSError, match="No such file or directory: '/none'$"), writes(tmp_path / "a"):
            os.stat("/none")
        with pytest.raises(OSError, match=r"^torch\.save has other words$"), writes(tmp_path / "a"):
            raise OSError("torch.save has other words")


@pytest.mark.parametrize("below", ["a", "a/b"])
def test_a_folder_that_would_be_in_a_file_is_refused_in_words(tmp_path, below):
    (tmp_path / "file").write_text("text")
    (tmp_path / "lost").symlink_to(tmp_path / "nothing")
    for there in (tmp_path / "file", tmp_path / "lost"):
        path = there / below
        for refuses in (check_free, lambda path: new_folder(path).__enter__()):
            with pytest.raises(FileExistsError, match=f"^torch_fp8: {path} cannot be in {there}, which is no folder;"):
                refuses(path)
    assert sorted(os.listdir(tmp_path)) == ["file", "lost"]


def test_what_a_kill_left_of_a_file_is_removed_and_nothing_else(tmp_path):
    path = tmp_path / "a[1].ckpt"
    path.write_text("old")
    with replacing(path) as first, replacing(path) as second:
        for temporary in (first, second):
            temporary.write_text("new")
    others = [".b.ckpt.0123abcd.tmp", ".a1.ckpt.0123abcd.tmp", "a[1].ckpt.0123abcd.tmp", ".a[1].ckpt.notes.tmp"]
    for name in (first.name, second.name, *others):  # as kills would leave the first two
        (tmp_path / name).write_text("half")
    remove_leftovers(path)
    assert sorted(os.listdir(tmp_path)) == sorted([path.name, *others]) and path.read_text() == "new"
    remove_leftovers(tmp_path / "none" / "a")


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


def sampled():
    """A model's monitor and watch, each with a sample."""
    model = fp8.convert(torch.nn.Sequential(torch.nn.Linear(64, 64)), tokens=None)
    looks = fp8.monitor(model), fp8.watch(model, tokens=1, points={"all": "0"}, metrics="rms/all")
    optimizer = torch.optim.SGD(model.parameters())
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    return looks


@pytest.mark.parametrize("name", ["monitor.save_json", "monitor.save_png", "watch.save_png", "tuning"])
def test_a_file_in_a_folder_that_is_missing_or_in_place_of_a_folder_is_refused(tmp_path, name):
    monitor, watch = sampled()
    save = {
        "monitor.save_json": monitor.save_json,
        "monitor.save_png": monitor.save_png,
        "watch.save_png": watch.save_png,
        "tuning": lambda path: tuning_file.write(path, {}, []),
    }[name]
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match="torch_fp8: its folder does not exist; make it first: .*none/a.png"):
        save(tmp_path / "none" / "a.png")
    with pytest.raises(IsADirectoryError, match="torch_fp8: this is a folder; give the path of a file: .*folder"):
        save(tmp_path / "folder")
    assert [path.name for path in tmp_path.rglob("*")] == ["folder"]
    save(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size


@pytest.mark.parametrize(
    "line",
    ["3", "null", "[1]", '"step"', "{}", '{"step": "3"}', '{"step": -1}', '{"event": "resume", "step": 1}',
     '{"event": "resume", "step": 1, "left": null}'],
)  # fmt: skip
def test_a_log_that_no_watch_has_written_is_refused(tmp_path, line):
    (tmp_path / "log").write_text(f'{{"event": "begin", "step": 0}}\n{line}\n')
    with pytest.raises(ValueError, match="torch_fp8: .*log must be the log of a watch, but line 2 is .*; give another"):
        read_log(tmp_path / "log")


@pytest.mark.parametrize("torn", [b'{"step": 1, "rms', b"\xff\xfe", b"[" * 100_000, b""])
def test_what_is_torn_in_a_log_is_left_out(tmp_path, torn):
    (tmp_path / "log").write_bytes(b'{"event": "begin", "step": 0}\n' + torn + b'\n{"step": 5}\n')
    assert read_log(tmp_path / "log") == [{"step": 5}]
