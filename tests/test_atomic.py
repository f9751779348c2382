"""Whatever goes wrong in writing: what was there stays, and nothing half written is left."""

import contextlib
import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from halfbyte import atomic
from halfbyte.atomic import (
    lock,
    new_directory,
    new_file,
    remove_directory,
    remove_partial,
    require_writable,
)
from halfbyte.errors import OutputError


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def blocked(tmp_path: Path) -> Path:
    """A path below a regular file: nobody can write there, not even root."""
    (tmp_path / "file").write_text("in the way")
    return tmp_path / "file" / "out"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_new_file_replaces_the_old_one_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with new_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_file_leaves_the_old_one(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def interrupted() -> None:
        with new_file(path) as file:
            file.write(b"half of")
            raise error

    with pytest.raises(error):
        interrupted()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_a_new_directory_has_its_name_only_when_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out"
    with new_directory(path) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "x").write_text("1")
        assert not path.exists()
    assert (path / "sub" / "x").read_text() == "1"
    assert names(path.parent) == ["out"]


def test_an_interrupted_directory_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with new_directory(tmp_path / "out") as partial:
            (partial / "x").write_text("1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == []


def test_a_directory_that_is_there_is_replaced_only_if_asked(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.mkdir()
    with new_directory(path) as partial:  # an empty one is no loss
        (partial / "x").write_text("1")
    with (
        pytest.raises(OutputError, match=r"out: it exists already; remove it"),
        new_directory(path),
    ):
        pass
    assert (path / "x").read_text() == "1"
    with new_directory(path, replace=True) as partial:
        (partial / "y").write_text("2")
        assert names(path) == ["x"]
    assert names(path) == ["y"]
    assert names(tmp_path) == ["out"]


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / ".out.partial-1").mkdir()
    (tmp_path / ".out.partial-1" / "x").write_text("1")
    (tmp_path / ".other.partial-1").mkdir()
    with new_directory(tmp_path / "out"):
        pass
    assert names(tmp_path) == [".other.partial-1", "out"]


def test_what_a_living_process_is_writing_stays(tmp_path: Path) -> None:
    for name, holds in ((".out.partial-1", True), (".out.partial-2", False)):
        (tmp_path / name).write_text("half")
        if holds:
            process = open(tmp_path / name, "rb")  # noqa: SIM115
            assert lock(process.fileno())
    with new_file(tmp_path / "out") as file:
        file.write(b"whole")
        remove_partial(tmp_path, "out")  # as another process does
    assert names(tmp_path) == [".out.partial-1", "out"]
    process.close()
    with new_directory(tmp_path / "deep") as partial:
        (partial / "x").write_text("1")
        remove_partial(tmp_path, "deep")
        assert (partial / "x").exists()
    remove_partial(tmp_path, "out")
    assert names(tmp_path) == ["deep", "out"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_directory_is_replaced_in_one_step_or_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    replaced = []
    real = os.replace

    def replace(old: Path, new: Path) -> None:
        replaced.append(old)
        real(old, new)

    monkeypatch.setattr(os, "replace", replace)
    if not can_exchange:
        monkeypatch.setattr(atomic.ctypes, "CDLL", lambda *_, **__: None)
    path = tmp_path / "out"
    for content in "ab":
        with new_directory(path, replace=True) as partial:
            (partial / content).write_text(content)
    assert names(path) == ["b"]
    assert names(tmp_path) == ["out"]
    assert len(replaced) == (1 if can_exchange else 3)


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").write_text("mine")
    (tmp_path / "out").symlink_to("other")
    with new_directory(tmp_path / "out", replace=True) as partial:
        (partial / "y").write_text("new")
    assert names(tmp_path) == ["other", "out"]
    assert names(tmp_path / "other") == ["x"]
    assert names(tmp_path / "out") == ["y"]


def another_file(path: Path) -> None:
    (path / "mine").write_text("1")


def another_directory(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.mkdir()
    (path / "x").write_text("mine")


@pytest.mark.parametrize("change", [another_file, another_directory])
def test_a_directory_that_changed_meanwhile_is_not_replaced(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    path = tmp_path / "out"
    path.mkdir()
    (path / "x").write_text("old")

    def replace() -> None:
        with new_directory(path, replace=True) as partial:
            (partial / "y").write_text("new")
            change(path)

    with pytest.raises(OutputError, match="has changed in the meantime, so it is not replaced"):
        replace()
    assert "y" not in names(path)
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_a_directory_that_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def write(path: Path, *, replace: bool) -> None:
        with new_directory(path, replace=replace):
            path.mkdir()
            (path / "mine").write_text("1")

    for replace in (True, False):
        path = tmp_path / f"out-{replace}"
        with pytest.raises(OutputError, match="it exists since a moment ago"):
            write(path, replace=replace)
        assert names(path) == ["mine"]


def test_names_with_wildcards_are_names(tmp_path: Path) -> None:
    (tmp_path / ".a.partial-1").mkdir()
    with new_directory(tmp_path / "[a]*"):
        pass
    assert names(tmp_path) == [".a.partial-1", "[a]*"]


def test_a_removed_directory_is_gone(tmp_path: Path) -> None:
    with new_directory(tmp_path / "out") as partial:
        (partial / "x").write_text("1")
    remove_directory(tmp_path / "out")
    assert names(tmp_path) == []


def test_unwritable_places_are_told(blocked: Path) -> None:
    message = "is a file, not a directory; choose another directory"
    with pytest.raises(OutputError, match=message):
        require_writable(blocked)
    with pytest.raises(OutputError, match=message), new_file(blocked):
        pass
    with pytest.raises(OutputError, match=message), new_directory(blocked):
        pass


def test_space_is_asked_for_before_the_work(tmp_path: Path) -> None:
    assert require_writable(tmp_path / "a" / "b", 1000) == tmp_path / "a" / "b"
    with pytest.raises(OutputError, match=r"1000000000.00 GB are needed and .* are free"):
        require_writable(tmp_path, 10**18)
    assert names(tmp_path) == ["a"]


def test_a_full_disk_leaves_what_was_there(small_disk: Path) -> None:
    path = small_disk / "a"
    path.write_bytes(b"old")

    def fill() -> None:
        with new_file(path) as file:
            file.write(bytes(100_000))

    def fill_directory() -> None:
        with new_directory(small_disk / "out") as partial:
            (partial / "x").write_bytes(bytes(100_000))

    for writer in (fill, fill_directory):
        with pytest.raises(OutputError, match="no space left on the device; free some"):
            writer()
    assert names(small_disk) == ["a"]
    assert path.read_bytes() == b"old"


def test_a_disk_that_fills_up_at_the_flush_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="no space left"), new_file(tmp_path / "a") as file:
        file.write(b"x")
    with contextlib.suppress(OutputError), new_directory(tmp_path / "out") as partial:
        (partial / "x").write_text("1")
    assert names(tmp_path) == []
