"""The program as a whole: start-up, exit codes, streams."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from halfbyte import cli
from halfbyte.atomic import new_directory
from halfbyte.errors import (
    DataError,
    Interrupted,
    NonFiniteLossError,
    RunStopped,
    WeightError,
)
from halfbyte.runtime.signals import SIGNALS

SOURCE = Path(cli.__file__).parents[2]


def with_source() -> dict[str, str]:
    """The environment of a fresh interpreter that finds halfbyte, and whatever this one finds."""
    path = [str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path)}


HEAVY = ("torch", "transformers", "numpy", "rich", "safetensors", "gguf")


def halfbyte(*words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run the program in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-m", "halfbyte", *words],
        env=with_source(),
        capture_output=True,
        text=True,
        timeout=60,
        **more,
    )


def modules_after(words: list[str]) -> set[str]:
    """Everything that a command line imports."""
    program = (
        "import sys\n"
        "from halfbyte.cli import main\n"
        f"sys.argv[1:] = {words!r}\n"  # as the program itself is called
        "try:\n"
        "    main()\n"
        "except SystemExit:\n"
        "    pass\n"
        "print('\\n'.join(sys.modules), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=with_source(),
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stderr.splitlines())


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["train", "--help"],
        ["train", "--lerning-rate", "1"],
        ["train", "/nowhere.yaml"],
        ["trian"],
        *([command, "--help"] for command in cli.COMMANDS if command != "train"),
        *([command, "--nonsense"] for command in cli.COMMANDS if command != "train"),
    ],
)
def test_help_and_mistakes_import_nothing_heavy(words: list[str]) -> None:
    assert not modules_after(words) & set(HEAVY)


def test_help_is_quick() -> None:
    def seconds() -> float:
        began = time.perf_counter()
        halfbyte("train", "--help")
        return time.perf_counter() - began

    assert min(seconds() for _ in range(3)) < 0.5


def test_the_package_itself_imports_nothing() -> None:
    program = (
        "import sys, halfbyte; assert halfbyte.__version__; dir(halfbyte)\n"
        f"assert not set(sys.modules) & {{*{HEAVY!r}, 'pydantic', 'yaml'}}\n"
        "halfbyte.TrainConfig\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], env=with_source(), check=True)


def test_the_public_names_are_few_and_known() -> None:
    import halfbyte as package

    assert len(package.__all__) <= 16
    assert set(package._HOMES) | {"__version__", "nf4", "optim", "quant"} == set(package.__all__)
    with pytest.raises(AttributeError, match="no attribute 'finetune'"):
        _ = package.finetune


def test_a_former_name_still_leads_there() -> None:
    import halfbyte.nf4
    from halfbyte import quant

    assert halfbyte.nf4.__all__ == quant.__all__
    assert halfbyte.nf4.quantize is quant.quantize


def test_overview_and_version() -> None:
    for words in ([], ["--help"], ["-h"], ["help"]):
        done = halfbyte(*words)
        assert done.returncode == 0
        assert done.stdout.startswith("usage: halfbyte COMMAND [options]")
        assert all(f"\n  {command} " in done.stdout for command in cli.COMMANDS)
    assert halfbyte("--version").stdout.strip() == f"halfbyte {cli.__version__}"


def test_a_mistake_is_one_message_on_standard_error_and_code_2(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: m\ndata: d\noutput: o\nlerning_rate: 1e-4\n")
    for words in (
        ["train", str(tmp_path / "run.yaml")],
        ["train", "--model", "m", "--data", "d", "--output", "o", "--lerning-rate", "1e-4"],
    ):
        done = halfbyte(*words, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr == (
            "halfbyte train: unknown option `lerning_rate`; did you mean `learning_rate`?\n"
        )
    assert not (tmp_path / "o").exists()


def test_an_unknown_verb() -> None:
    done = halfbyte("trian")
    assert done.returncode == 2
    assert done.stderr.startswith("halfbyte: unknown command `trian`; did you mean `train`?")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A command ``doctor`` that does what its ``main`` is set to."""
    module = ModuleType("halfbyte.cli.doctor")
    monkeypatch.setitem(sys.modules, "halfbyte.cli.doctor", module)
    return module


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (DataError("train.jsonl is empty"), 2, "halfbyte doctor: train.jsonl is empty\n"),
        (WeightError("w holds NaN"), 2, "halfbyte doctor: w holds NaN\n"),
        (NonFiniteLossError("the loss is nan"), 1, "halfbyte doctor: the loss is nan\n"),
        (KeyboardInterrupt(), 130, "\nhalfbyte doctor: interrupted\n"),
        (Interrupted(signal.SIGINT), 130, "\nhalfbyte doctor: interrupted\n"),
        (Interrupted(signal.SIGTERM), 143, "\nhalfbyte doctor: interrupted by SIGTERM\n"),
        (Interrupted(signal.SIGHUP), 129, "\nhalfbyte doctor: interrupted by SIGHUP\n"),
        (RunStopped("saved", signal.SIGTERM), 143, "halfbyte doctor: saved\n"),
        (RunStopped("saved"), 1, "halfbyte doctor: saved\n"),
    ],
)
def test_exit_codes(
    command: ModuleType,
    error: BaseException,
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(argv: list[str]) -> None:
        raise error

    command.main = fail  # type: ignore[attr-defined]
    assert cli.main(["doctor"]) == code
    assert capsys.readouterr() == ("", said)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing_half_written(
    command: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    def write(argv: list[str]) -> None:
        with new_directory(tmp_path / "model") as directory:
            (directory / "half").write_text("")
            os.kill(os.getpid(), number)

    command.main = write  # type: ignore[attr-defined]
    before = {known: signal.getsignal(known) for known in SIGNALS}
    try:
        assert cli.main(["doctor"]) == 128 + number
    finally:
        for known, handler in before.items():
            signal.signal(known, handler)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == f"\nhalfbyte doctor: interrupted by {number.name}\n"


def test_too_little_memory_is_no_bug(
    command: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB"

    def fail(argv: list[str]) -> None:
        raise torch.OutOfMemoryError(f"{said}. Process 7 has 3 MiB. Of that\n much is reserved")

    command.main = fail  # type: ignore[attr-defined]
    assert cli.main(["doctor"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"halfbyte doctor: out of GPU memory: {said}. End other")


def test_a_bug_shows_its_traceback(command: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(argv: list[str]) -> None:
        raise IndexError(argv[0])

    command.main = fail  # type: ignore[attr-defined]
    assert cli.main(["doctor", "word"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert "IndexError: word" in err
    assert "this is a bug in halfbyte" in err.splitlines()[-1]


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["--version"]])
def test_a_reader_that_has_left_is_no_error(words: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "halfbyte", *words],
        env=with_source(),
        stdout=writing,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writing)
    assert done.stderr == b""
    assert done.returncode == 141


def test_ctrl_c_ends_with_130(tmp_path: Path) -> None:
    program = (
        "import sys, time, types\n"
        "from halfbyte.cli import main\n"
        "def wait(argv):\n"
        "    print('waiting', flush=True)\n"
        "    time.sleep(60)\n"
        "sys.modules['halfbyte.cli.doctor'] = types.SimpleNamespace(main=wait)\n"
        "raise SystemExit(main(['doctor']))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env=with_source(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == "\nhalfbyte doctor: interrupted\n"
    assert process.returncode == 130
