"""Which torch `make` installs, and what it says where there is none: by pip, of our own index."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[1] / "Makefile"
PATH = "/usr/bin:/bin"

# As much of Python as make asks for; an environment that it makes has the pip of this one.
PYTHON = f"""#!/bin/sh
case "$*" in
    "-m venv"*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    *) exec "{sys.executable}" "$@" ;;
esac
"""


def wheel(directory: Path, version: str) -> None:
    """Writes torch of a version, with nothing in it."""
    directory.mkdir(parents=True, exist_ok=True)
    info = f"torch-{version}.dist-info"
    with zipfile.ZipFile(directory / f"torch-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}")
        tag = "Root-Is-Purelib: true\nTag: py3-none-any"
        file.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nGenerator: tests\n{tag}")
        file.writestr(f"{info}/RECORD", "")


@pytest.fixture
def make(tmp_path):
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    (tmp_path / "constraints.txt").write_text("torch==2.13.0\n")

    def run(*versions: str, target: str = "installed", torch: str = ""):
        """Runs make, with these versions in the index; returns how it went, and what is there."""
        index = tmp_path / "index" / "torch"
        for version in versions:
            wheel(index, version)
        links = [f'<a href="{path.name}">{path.name}</a>' for path in index.glob("*.whl")]
        if versions:
            (index / "index.html").write_text("<!DOCTYPE html>" + "".join(links))
        done = subprocess.run(
            ["make", "-f", MAKEFILE, ".venv/.torch", f"PYTHON={python}", f"TORCH={torch}"],
            cwd=tmp_path,
            env={
                "PATH": PATH,
                "PIP_CONFIG_FILE": "/dev/null",
                "PIP_INDEX_URL": index.parent.as_uri(),
                "PIP_TARGET": str(tmp_path / target),
                "PIP_RETRIES": "0",
            },
            capture_output=True,
            text=True,
        )
        found = (tmp_path / target).glob("torch-*.dist-info") if done.returncode == 0 else []
        return done, [path.name.removesuffix(".dist-info") for path in found]

    if shutil.which("nvidia-smi", path=PATH):
        pytest.skip("there is an NVIDIA driver, so make asks for no CPU build")
    return run


def test_the_cpu_build_is_taken_where_there_is_one(make, tmp_path):
    done, found = make("2.13.0", "2.13.0+cpu")
    assert found == ["torch-2.13.0+cpu"], done.stderr
    assert sorted(path.name for path in (tmp_path / ".venv").iterdir()) == [".torch", "bin"]


def test_an_index_without_a_cpu_build_gives_the_ordinary_one(make):
    done, found = make("2.12.1", "2.13.0")
    assert found == ["torch-2.13.0"], done.stderr
    assert "no CPU build of torch 2.13.0 to be had" in done.stderr


def test_an_index_that_is_not_there_is_told_in_pips_words(make, tmp_path):
    done, _ = make()
    assert done.returncode != 0
    assert "ERROR: No matching distribution found for torch==2.13.0+cpu" in done.stderr
    assert "no CPU build" not in done.stderr
    assert not (tmp_path / ".venv" / ".torch").exists()


def test_what_goes_wrong_with_a_cpu_build_is_told_in_pips_words(make, tmp_path):
    (tmp_path / "file").touch()
    done, _ = make("2.13.0", "2.13.0+cpu", target="file")
    assert done.returncode != 0
    assert "Target path exists but is not a directory" in done.stderr
    assert "no CPU build" not in done.stderr


def test_a_torch_that_is_named_is_the_only_one_tried(make):
    done, _ = make("2.13.0", torch="torch==2.13.0+cpu")
    assert done.returncode != 0
    assert "no CPU build" not in done.stderr
    done, found = make("2.13.0+cpu", torch="torch==2.13.0+cpu")
    assert found == ["torch-2.13.0+cpu"], done.stderr
