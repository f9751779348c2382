"""A directory has one writer, under any of its names, and a killed one leaves nothing behind."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.checkpoint import output_lock as module
from halfbyte.checkpoint.output_lock import is_locked, output_lock
from halfbyte.errors import OutputError


def refused(directory: Path) -> str:
    with pytest.raises(OutputError, match="is being written by") as caught, output_lock(directory):
        pass
    return str(caught.value)


def test_the_second_is_told_who_is_first_and_the_next_is_free(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with output_lock(out):
        message = refused(out)
        assert f"process {os.getpid()} on {os.uname().nodename}, since 20" in message
        assert message.endswith("UTC; wait until that has ended, or give another directory")
        with output_lock(tmp_path / "deep" / "other"):
            pass
    assert list((tmp_path / "deep").iterdir()) == []
    with output_lock(out):
        pass


def test_a_directory_has_one_lock_under_all_its_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    monkeypatch.chdir(tmp_path / "out")
    with output_lock(tmp_path / "out"):
        for name in (tmp_path / "link", Path("../link/."), Path(".")):
            refused(name)


HOLDER = """
import sys, time
from halfbyte.checkpoint.output_lock import is_locked, output_lock
with output_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    words = [sys.executable, "-c", HOLDER, str(tmp_path / "out")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert f"process {process.pid} on " in refused(tmp_path / "out")
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / ".out.lock").exists()
    with output_lock(tmp_path / "out"):
        refused(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_removed_while_it_was_opened_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ".out.lock"
    calls = []

    def lock(descriptor: int) -> bool:
        if not calls:
            path.unlink()  # by its last owner, who has it no more
        calls.append(descriptor)
        return True

    monkeypatch.setattr(module, "lock", lock)
    with output_lock(tmp_path / "out"):
        assert len(calls) == 2
        assert path.exists()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_where_nothing_may_be_created_beside_it_the_lock_is_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    real = os.open

    def refuse(path: Path, *flags: int) -> int:
        if Path(path).parent == tmp_path:
            raise OSError(code, os.strerror(code))
        return real(path, *flags)

    monkeypatch.setattr(os, "open", refuse)
    with output_lock(out):
        assert [path.name for path in out.iterdir()] == [".lock"]
        refused(out)
    assert list(out.iterdir()) == []
    with pytest.raises(OutputError, match="cannot write"), output_lock(tmp_path / "new"):
        pass


def test_the_root_has_no_name_for_a_file_beside_it() -> None:
    assert module._beside(Path("/")) == Path("/.lock")
    assert module._beside(Path("/a/b")) == Path("/a/.b.lock")


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for name in ("file", "file/out"):
        with (
            pytest.raises(OutputError, match="is a file, not a directory"),
            output_lock(tmp_path / name),
        ):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"pid": 1}', b"[" * 4000])
def test_an_owner_that_has_not_said_who_it_is(tmp_path: Path, content: bytes) -> None:
    with open(tmp_path / ".out.lock", "wb") as file:
        file.write(content)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "by another process;" in refused(tmp_path / "out")


def test_an_owner_is_quoted_safely(tmp_path: Path) -> None:
    with open(tmp_path / ".out.lock", "w") as file:
        file.write('{"pid": 1, "host": "\\u001b]0;x\\u0007\\n", "since": "' + "9" * 2000 + '"}')
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        message = refused(tmp_path / "out")
    assert r"\x1b]0;x\x07\x0a" in message
    assert len(message) < 500 + len(str(tmp_path))


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with output_lock(tmp_path / "out"):
        assert "has no locks (Operation not supported)" in caplog.text


def test_whether_it_is_locked_can_be_asked_without_a_trace(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    assert is_locked(out) is False
    assert list(tmp_path.iterdir()) == []
    with output_lock(out):
        assert is_locked(out) is True
    assert is_locked(out) is False
    out.mkdir()
    (out / ".lock").touch()  # where nothing may be created beside it
    assert is_locked(out) is False
    with (out / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert is_locked(out) is True
    (tmp_path / "deep" / ".out.lock").symlink_to("elsewhere")
    assert is_locked(out) is None


def test_who_asks_is_not_taken_for_a_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moment in which `is_locked` has the lock itself is waited for."""
    path = tmp_path / ".out.lock"
    with path.open("w") as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        monkeypatch.setattr(module.time, "sleep", lambda _: fcntl.flock(asking, fcntl.LOCK_UN))
        with output_lock(tmp_path / "out"):
            assert is_locked(tmp_path / "out")
