"""Atomic files and complete folders: after any failure the earlier content stands, and nothing unfinished remains."""

import json
import os
from pathlib import Path

import pytest

from refreshkv.files import FolderKind, atomic_file, complete_folder, write_bytes, write_json, write_text
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
        with complete_folder(target, KIND) as folder:
            assert not os.path.samefile(folder, target) if target.exists() else True
            (folder / "done").write_text(content)
        assert (target / "done").read_text() == content and os.listdir(target) == ["done"]
    assert os.listdir(tmp_path) == ["made"]


def test_an_error_leaves_the_earlier_folder_and_nothing_else(tmp_path):
    target = tmp_path / "made"
    target.mkdir()
    (target / "done").write_text("first")
    with pytest.raises(OSError, match="full"), complete_folder(target, KIND) as folder:
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
    assert os.listdir(tmp_path / "made") == ["done"]


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
    with pytest.raises(SettingsError, match="--output: cannot write to"):
        complete_folder(tmp_path / "file" / "made", KIND).__enter__()
