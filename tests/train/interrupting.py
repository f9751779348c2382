"""A run that is broken off after a step, as by a kill."""

import pytest

from halfbyte.report import open_report
from halfbyte.train.run import train


class BrokenOff(BaseException):
    """Raised in the middle of a run."""


def break_off(config, step):
    """Train, and break off when this step has been logged."""
    with open_report(config.output, quiet=True) as report:
        tell = report.step

        def until_then(record):
            tell(record)
            if record["step"] == step:
                raise BrokenOff

        report.step = until_then
        with pytest.raises(BrokenOff):
            train(config, report)
