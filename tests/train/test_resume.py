"""What a checkpoint says about its run is checked before it is believed."""

from typing import Any

import pytest

from halfbyte.checkpoint.run_state import RunState
from halfbyte.config.schema import TrainConfig
from halfbyte.errors import CheckpointError, ConfigError
from halfbyte.train.resume import _options, check_same_run

CONFIG = TrainConfig.model_validate({"model": "m", "data": "d", "output": "o"})
IDENTITY = {"base": "b", "data": "d", "options": _options(CONFIG)}


def resumed(step: int = 3, **progress: Any) -> RunState:
    return RunState({}, {}, IDENTITY | progress, step)


def test_the_same_run_goes_on_up_to_its_last_step() -> None:
    for step in (0, 3, 10):
        check_same_run(resumed(step), IDENTITY, 10)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (resumed(11), "of step 11, and the run has only 10 steps"),
        (resumed(base="other"), "the base model is not that"),
        (resumed(data=None), "the data is not that"),
        (resumed(options=[1]), r"options: expected a mapping, got \[1\]"),
    ],
)
def test_another_state_is_refused(state: RunState, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        check_same_run(state, IDENTITY, 10)


def test_an_option_is_quoted_in_part() -> None:
    options = IDENTITY["options"] | {"lora_r": "x" * 10**6}  # type: ignore[operator]
    with pytest.raises(ConfigError, match="lora_r was 'xxx") as caught:
        check_same_run(resumed(options=options), IDENTITY, 10)
    assert len(str(caught.value)) < 500
