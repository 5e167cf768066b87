"""Atomic files and complete folders: after any failure the earlier content stands, and nothing unfinished remains."""

import json
import os
from pathlib import Path

import pytest

from refreshkv.files import (
    RECORD_FILE,
    FolderKind,
    atomic_file,
    clear_removed,
    complete_folder,
    not_on_record,
    remove_folder,
    write_bytes,
    write_json,
    write_record,
    write_text,
)
from refreshkv.settings import SettingsError

KIND = FolderKind(
    setting="--output",
    writer="run",
    lock_file=".running",
    is_complete=lambda folder: (folder / "done").exists(),
    error=SettingsError,
)


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced_whole(tmp_path, durable):
    write_text(tmp_path / "text", "ä\n", durable=durable)
    write_json(tmp_path / "values", {"a": 1}, durable=durable)
    write_bytes(tmp_path / "text", b"second", durable=durable)
    assert (tmp_path / "text").read_bytes() == b"second"
    assert json.loads((tmp_path / "values").read_text()) == {"a": 1}
    assert sorted(os.listdir(tmp_path)) == ["text", "values"]


def test_an_error_leaves_the_earlier_file_and_nothing_else(tmp_path, monkeypatch):
    write_text(tmp_path / "text", "first")
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "text") as temporary:
        temporary.write_text("sec")
        raise KeyboardInterrupt

    def full(self: Path, content: bytes) -> None:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "text", "third")
    assert (tmp_path / "text").read_text() == "first" and os.listdir(tmp_path) == ["text"]


def test_a_folder_appears_when_it_is_complete(tmp_path):
    target = tmp_path / "made"
    for content in ("first", "second"):
        with complete_folder(target, KIND, overwrite=True) as folder:
            assert not os.path.samefile(folder, target) if target.exists() else True
            (folder / "done").write_text(content)
        assert (target / "done").read_text() == content and sorted(os.listdir(target)) == [RECORD_FILE, "done"]
    assert os.listdir(tmp_path) == ["made"]


def test_an_error_leaves_the_earlier_folder_and_nothing_else(tmp_path):
    target = tmp_path / "made"
    target.mkdir()
    (target / "done").write_text("first")
    write_record(target)
    with pytest.raises(OSError, match="full"), complete_folder(target, KIND, overwrite=True) as folder:
        (folder / "done").write_text("second")
        raise OSError("full")
    assert (target / "done").read_text() == "first" and os.listdir(tmp_path) == ["made"]


def test_what_a_killed_writer_left_is_cleared(tmp_path):
    partial = tmp_path / "made.partial"
    (partial / "deep").mkdir(parents=True)
    (partial / ".running").touch()
    with complete_folder(tmp_path / "made", KIND) as folder:
        assert os.listdir(folder) == [".running"]
        (folder / "done").touch()
    assert sorted(os.listdir(tmp_path / "made")) == [RECORD_FILE, "done"]


def test_refusals_name_the_setting(tmp_path):
    with complete_folder(tmp_path / "made", KIND) as folder:
        with pytest.raises(SettingsError, match="--output: another run is writing to .*made.partial"):
            complete_folder(tmp_path / "made", KIND).__enter__()
        (folder / "done").touch()
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial" / "thesis.tex").touch()
    with pytest.raises(SettingsError, match="--output: .*mine.partial is needed and holds other files"):
        complete_folder(tmp_path / "mine", KIND).__enter__()
    (tmp_path / "file").touch()
    with pytest.raises(
        SettingsError, match="--output .*made cannot be written to: .*file is no folder; choose another"
    ):
        complete_folder(tmp_path / "file" / "made", KIND).__enter__()


def made(folder, content="first"):
    """A finished folder with a file at its top and one further down."""
    with complete_folder(folder, KIND, overwrite=True) as new:
        (new / "deep").mkdir()
        (new / "deep" / "part").write_text(content)
        (new / "done").write_text(content)
    return folder


def own_file(folder):
    (folder / "notes.txt").write_text("mine")


def own_file_further_down(folder):
    (folder / "deep" / "notes.txt").write_text("mine")


def own_folder(folder):
    (folder / "thesis").mkdir()
    (folder / "thesis" / "chapter.tex").write_text("mine")


def own_link(folder):
    (folder.parent / "elsewhere").mkdir()
    (folder / "link").symlink_to(folder.parent / "elsewhere")


def own_change(folder):
    (folder / "done").write_text("changed by hand")


def link_in_place_of_a_file(folder):
    (folder.parent / "elsewhere").write_text("first")
    (folder / "done").unlink()
    (folder / "done").symlink_to(folder.parent / "elsewhere")


def no_list(folder):
    (folder / RECORD_FILE).unlink()


def no_readable_list(folder):
    (folder / RECORD_FILE).write_text('{"files": ["done"]}')


@pytest.mark.parametrize(
    "change",
    [
        own_file,
        own_file_further_down,
        own_folder,
        own_link,
        own_change,
        link_in_place_of_a_file,
        no_list,
        no_readable_list,
    ],
)
def test_overwriting_removes_only_what_is_on_record(tmp_path, change):
    target = made(tmp_path / "made")
    change(target)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(SettingsError, match="--output .*made .*--overwrite would delete"):
        made(target, "second")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_behind_a_link_the_folder_itself_is_replaced(tmp_path):
    """A link to another disk stays a link; what it leads to is replaced, and nothing of the old folder is left."""
    made(tmp_path / "disk" / "made")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "made")
    made(tmp_path / "link", "second")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "link" / "deep" / "part").read_text() == "second"
    assert os.listdir(tmp_path / "disk") == ["made"] and sorted(os.listdir(tmp_path)) == ["disk", "link"]


class Killed(BaseException):
    """Stands for the end of the process: nothing after it runs."""


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_replacement_may_be_killed_anywhere(tmp_path, monkeypatch, overwrite):
    """Stops at every rename, removal and new folder in turn; the same call afterwards ends as if nothing had been."""
    calls = [("os", "replace"), ("os", "rmdir"), ("os", "unlink"), ("os", "mkdir")]
    for stop in range(40):
        target, left = tmp_path / str(stop) / "made", [stop]
        target.parent.mkdir()
        if overwrite:
            made(target)
        with monkeypatch.context() as patched:
            for module, name in calls:
                plain = getattr(os, name)

                def counted(*arguments, plain=plain, left=left, **options):
                    left[0] -= 1
                    if left[0] < 0:
                        raise Killed
                    return plain(*arguments, **options)

                patched.setattr(f"{module}.{name}", counted)
            try:
                made(target, "second")
                finished = True
            except Killed:
                finished = False
        if KIND.is_complete(target):
            assert not_on_record(target, leave_out=[".running"]) is None
            assert (target / "deep" / "part").read_text() == (target / "done").read_text()
        made(target, "second")
        assert (target / "done").read_text() == "second" and not_on_record(target) is None
        assert os.listdir(target.parent) == ["made"], f"after a stop at {stop}"
        if finished:
            assert stop > 4
            return
    raise AssertionError("the replacement never came to its end")


def test_a_folder_leaves_its_name_before_its_content(tmp_path, monkeypatch):
    folder = made(tmp_path / "made")

    def stopped(path, *arguments, **options):
        assert not folder.exists() and Path(path).name == ".made.removed"
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("refreshkv.files.shutil.rmtree", stopped)
        with pytest.raises(Killed):
            remove_folder(folder)
    assert os.listdir(tmp_path) == [".made.removed"]
    remove_folder(made(folder))
    assert os.listdir(tmp_path) == []
    (tmp_path / ".other.removed" / "deep").mkdir(parents=True)
    clear_removed(tmp_path)
    assert os.listdir(tmp_path) == []


def test_of_a_link_the_link_is_removed(tmp_path):
    made(tmp_path / "made")
    (tmp_path / "link").symlink_to(tmp_path / "made")
    remove_folder(tmp_path / "link")
    assert os.listdir(tmp_path) == ["made"] and KIND.is_complete(tmp_path / "made")


def test_a_removal_that_fails_says_so(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    folder = made(tmp_path / "made")
    monkeypatch.setattr("refreshkv.files.shutil.rmtree", refuse)
    with pytest.raises(PermissionError):
        remove_folder(folder)
