"""Only regular files are opened: nothing waits for a writer, and nothing is read without an end."""

import os
import socket
from pathlib import Path

import pytest

from halfbyte.input_files import open_file, read_file


def test_a_file_is_read_through_links(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    assert read_file(tmp_path / "link") == b"content"
    with open_file(tmp_path / "file") as file:
        assert file.read(3) == b"con"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("/dev/zero", "a device"),
        ("directory", "a directory"),
        ("pipe", "a pipe; write what it gives to a file first"),
        ("link", "a pipe; write what it gives to a file first"),
        ("socket", "a socket"),
    ],
)
def test_anything_else_is_refused_at_once(tmp_path: Path, name: str, found: str) -> None:
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(tmp_path)  # a socket's path may have 107 characters
        try:
            server.bind("socket")
        finally:
            os.chdir(here)
        with pytest.raises(OSError, match="expected a file, found") as caught:
            read_file(tmp_path / name)
    assert caught.value.strerror == f"expected a file, found {found}"


def test_standard_input_of_a_pipe_is_no_file() -> None:
    reading, writing = os.pipe()
    try:
        with pytest.raises(OSError, match="found a pipe; write what it gives to a file first"):
            open_file(f"/dev/fd/{reading}")
    finally:
        os.close(reading)
        os.close(writing)


def test_a_pipe_that_takes_the_place_of_a_file_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    before = os.stat(tmp_path / "file")
    monkeypatch.setattr("halfbyte.input_files.os.stat", lambda path: before)
    with pytest.raises(OSError, match="found a pipe"):
        open_file(tmp_path / "pipe")


def test_a_file_that_should_be_small(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(2_000_001))
    assert len(read_file(tmp_path / "file", most=2_000_001)) == 2_000_001
    with pytest.raises(OSError, match=r"at most 1 MB, found 2\.0 MB; is it another file"):
        read_file(tmp_path / "file", most=1_000_000)
