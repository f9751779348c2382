"""Which torch `make` installs, and what it says where there is none; with a pip that is played."""

import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[1] / "Makefile"
KNOWN = "ERROR: Could not find a version that satisfies torch (from versions: 2.12.1, 2.13.0)"
UNREACHED = """WARNING: Retrying after connection broken by 'Failed to establish a new connection'
ERROR: Could not find a version that satisfies torch (from versions: none)"""
FULL = "ERROR: Could not install packages due to an OSError: No space left on device"

# As much of Python as make asks for. With `-m venv` it puts itself there. As pip, it notes what it
# was to install, and fails with what is in the file cpu, if it is asked for a CPU build of torch.
PYTHON = """#!/bin/sh
case "$*" in
    "-m venv"*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    *+cpu*) echo "$*" >>asked; if [ -e cpu ]; then cat cpu >&2; exit 1; fi ;;
    *"-m pip"*) echo "$*" >>asked ;;
esac
"""


@pytest.fixture
def make(tmp_path):
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    (tmp_path / "constraints.txt").write_text("torch==2.13.0\n")
    (tmp_path / "pyproject.toml").write_text("")

    def run(cpu: str = "", *variables: str):
        """Runs `make .venv/.torch`; returns how it went and what pip was asked for."""
        if cpu:
            (tmp_path / "cpu").write_text(cpu)
        command = ["make", "-f", MAKEFILE, ".venv/.torch", f"PYTHON={python}", *variables]
        environment = {"PATH": "/usr/bin:/bin"}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        asked = tmp_path / "asked"
        lines = asked.read_text().splitlines() if asked.exists() else []
        return done, [line.split()[-1] for line in lines]

    if (
        subprocess.run(["/bin/sh", "-c", "PATH=/usr/bin:/bin command -v nvidia-smi"]).returncode
        == 0
    ):
        pytest.skip("there is an NVIDIA driver, so make asks for no CPU build")
    return run


def test_the_cpu_build_is_taken_where_there_is_one(make, tmp_path):
    done, asked = make()
    assert done.returncode == 0
    assert asked == ["torch==2.13.0+cpu"]
    assert sorted(path.name for path in (tmp_path / ".venv").iterdir()) == [".torch", "bin"]


def test_an_index_without_a_cpu_build_gives_the_ordinary_one(make):
    done, asked = make(KNOWN)
    assert done.returncode == 0
    assert asked == ["torch==2.13.0+cpu", "torch==2.13.0"]
    assert "no CPU build of torch 2.13.0 to be had" in done.stderr


@pytest.mark.parametrize("said", [UNREACHED, FULL])
def test_what_is_not_for_lack_of_a_cpu_build_is_told_in_pips_words(make, said, tmp_path):
    done, asked = make(said)
    assert done.returncode != 0
    assert asked == ["torch==2.13.0+cpu"]
    assert said in done.stderr
    assert "no CPU build" not in done.stderr
    assert not (tmp_path / ".venv" / ".torch").exists()


def test_a_torch_that_is_named_is_the_only_one_tried(make):
    done, asked = make("", "TORCH=torch==2.14.0")
    assert done.returncode == 0
    assert asked == ["torch==2.14.0"]
