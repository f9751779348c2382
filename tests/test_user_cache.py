"""Directories in the user's cache: whole or not there, never removed while used, and limited."""

import os
import subprocess
import sys

import pytest

from halfbyte import user_cache
from halfbyte.errors import DataError, OutputError
from halfbyte.user_cache import cached_directory


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(user_cache, "_locks", {})
    return tmp_path / "cache" / "halfbyte" / "data"


def fill(size=10):
    return lambda path: (path / "rows").write_bytes(b"x" * size)


def names(home):
    return sorted(path.name for path in home.iterdir() if path.name != ".lock")


def release_all():
    for path in list(user_cache._locks):
        user_cache._release(path)


def get(key, make=None, limit=1000, **options):
    return cached_directory("data", key, make or fill(), limit=limit, **options)


def test_a_directory_is_made_once(home):
    made = []

    def make(path):
        made.append(path)
        fill()(path)

    first, second = get("a", make), get("a", make)
    assert first == second == (home / "a", None)
    assert len(made) == 1
    assert (home / "a" / "rows").read_bytes() == b"x" * 10


def test_an_error_while_it_is_made_leaves_nothing(home):
    def fail(path):
        fill()(path)
        raise DataError("a bad row")

    with pytest.raises(DataError, match="a bad row"):
        get("a", fail)
    assert names(home) == []


def test_a_damaged_one_is_made_again(home):
    get("a")
    (home / "a" / "rows").write_bytes(b"")
    found = get("a", is_whole=lambda path: (path / "rows").stat().st_size == 10)
    assert (found.path / "rows").read_bytes() == b"x" * 10


def test_the_least_recently_used_goes_first(home):
    for age, key in enumerate("abc"):
        get(key, fill(300))
        os.utime(home / key, (age, age))
    release_all()
    get("a")  # now the most recent
    release_all()
    get("d", fill(300))
    assert names(home) == ["a", "c", "d"]


def test_what_is_in_use_stays_whatever_the_limit(home, caplog):
    get("a", fill(800))
    get("b", fill(800))
    assert names(home) == ["a", "b"]
    assert "all of it in use" in caplog.text


def test_what_another_process_uses_stays(home):
    program = (
        "import sys; from pathlib import Path; from halfbyte.user_cache import cached_directory\n"
        "cached_directory('data', 'a', lambda p: (p / 'rows').write_bytes(b'x' * 800), limit=1000)"
        "\nprint('ready', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"ready\n"
        get("b", fill(800))
        assert (home / "a").exists()
        other.stdin.close()
        other.wait(10)
    get("c", fill(800))
    assert names(home) == ["b", "c"]


def test_two_that_make_the_same_one_both_have_it(home):
    def slower(path):
        fill(20)(path)
        (home / "a").mkdir()  # another process is done a moment earlier
        fill(10)(home / "a")

    found = get("a", slower)
    assert (found.path / "rows").read_bytes() == b"x" * 10
    assert names(home) == ["a"]


def test_what_a_killed_process_left_is_removed(home):
    program = (
        "import os; from halfbyte.user_cache import cached_directory\n"
        "def make(path):\n    (path / 'rows').write_bytes(b'x'); os.kill(os.getpid(), 9)\n"
        "cached_directory('data', 'a', make, limit=1000)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
    assert len(list(home.glob(".unfinished-*"))) == 1
    get("b")
    assert names(home) == ["b"]


def test_a_cache_that_cannot_be_written_is_replaced_by_a_temporary_directory(home):
    home.parent.parent.mkdir(parents=True)
    home.parent.write_text("in the way")
    found = get("a")
    assert (found.path / "rows").read_bytes() == b"x" * 10
    assert found.note is not None
    assert str(home) in found.note
    assert "for this run only" in found.note
    user_cache._temporary.pop().cleanup()
    assert not found.path.exists()


def test_no_space_is_an_error(home):
    def full(path):
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="no space left on the device"):
        get("a", full)


def test_many_processes_at_once(home, tmp_path):
    program = (
        "from pathlib import Path; from halfbyte.user_cache import cached_directory\n"
        "for n in range(40):\n"
        "    make = lambda p: (p / 'rows').write_bytes(b'x' * 300)\n"
        "    found = cached_directory('data', str(n % 7), make, limit=1000)\n"
        "    assert (found.path / 'rows').read_bytes() == b'x' * 300, found\n"
        "    from halfbyte import user_cache\n"
        "    user_cache._release(found.path)\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(3)]
    assert [one.wait(60) for one in running] == [0, 0, 0]
