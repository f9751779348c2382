"""Several command lines in one process: in their order, up to one that fails."""

import pytest

from halfbyte import cli
from halfbyte.cli import series


def test_the_output_is_that_of_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    assert series.run([["--version"], ["--help"]]) == 0
    out, err = capsys.readouterr()
    assert out == cli.overview() + "\n"
    assert err.startswith("halfbyte ")


def test_the_first_that_fails_ends_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert series.run([["train", "/nowhere.yaml"], ["--help"]]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("halfbyte train: ")
