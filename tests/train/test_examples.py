"""Every configuration in ``examples/`` loads, and opens with its command."""

from pathlib import Path

import pytest

from halfbyte.cli.train import COMMAND
from halfbyte.config.reading import load_config

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").rglob("*.yaml"))


def test_there_are_examples() -> None:
    assert EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_loads_under_our_own_names(path: Path) -> None:
    _, notes = load_config(path, {})
    assert notes == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_its_command_is_one_that_works(path: Path) -> None:
    comment = path.read_text(encoding="utf-8").partition("\n\n")[0]
    [command] = [line for line in comment.splitlines() if line.startswith("#     halfbyte train ")]
    words = COMMAND.words(command.split()[3:])
    assert words.problems == []
    file = ROOT / words.positional["config"]
    assert file == path
    load_config(file, words.given)
