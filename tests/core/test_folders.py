"""Folders of a process's own."""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path

import pytest

from antiphon.core.folders import socket_folder


@pytest.mark.parametrize("letter", ["xyz", "長"])
def test_a_socket_fits_into_the_folder_however_long_the_path_of_others_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, letter: str
) -> None:
    long = tmp_path / (letter * 33)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    folder = socket_folder("antiphon-test-")
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(folder / "front.sock"))
        (folder / "front.sock").unlink()
        assert list(long.iterdir()) == []
        assert folder.stat().st_mode & 0o077 == 0
    finally:
        folder.rmdir()


def test_it_is_where_temporary_files_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        monkeypatch.setattr(tempfile, "tempdir", place)
        assert socket_folder("antiphon-test-").parent == Path(place)
