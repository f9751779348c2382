"""Trackers: what they are sent, with stand-ins for the libraries, and with TensorBoard itself."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from halfbyte import cli
from halfbyte.config.reading import check
from halfbyte.config.schema import TrainConfig
from halfbyte.errors import ConfigError
from halfbyte.report import open_report
from halfbyte.report.trackers import TRACKERS, open_trackers, tracked


class Library(ModuleType):
    """Looks like wandb and like trackio."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def init(self, **how: Any) -> None:
        self.calls.append(("init", how))

    def log(self, values: dict[str, float], step: int) -> None:
        self.calls.append(("log", values | {"at": step}))

    def finish(self) -> None:
        self.calls.append(("finish", {}))


@pytest.fixture(params=["wandb", "trackio"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Library:
    stand_in = Library(request.param)
    monkeypatch.setitem(sys.modules, request.param, stand_in)
    return stand_in


def a_run(directory: Path, names: list[str], steps: int = 2) -> None:
    with open_report(directory, quiet=True) as report:
        report.track(names)
        report.begin(total_steps=steps, start_step=0, metadata={"model": "m"})
        for step in range(1, steps + 1):
            report.step({"step": step, "loss": 1 / step, "grad_norm": float("nan")})
        report.evaluation({"step": steps, "loss": 0.25, "cases": 3})
        report.finish({"steps": steps})


def test_what_a_tracker_is_sent(library: Library, tmp_path: Path) -> None:
    a_run(tmp_path / "mine", [library.__name__])
    where = {"dir": str(tmp_path / "mine")} if library.__name__ == "wandb" else {}
    settings = {"project": "halfbyte", "name": "mine", "config": {"model": "m"}}
    assert library.calls == [
        ("init", settings | where),
        ("log", {"train/loss": 1.0, "at": 1}),
        ("log", {"train/loss": 0.5, "at": 2}),
        ("log", {"eval/loss": 0.25, "eval/cases": 3.0, "at": 2}),
        ("finish", {}),
    ]


def test_a_project_is_named_by_the_librarys_own_variable(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"{library.__name__.upper()}_PROJECT", "elsewhere")
    a_run(tmp_path / "mine", [library.__name__])
    assert library.calls[0][1]["project"] == "elsewhere"


def test_a_run_that_fails_before_it_begins_sends_nothing(library: Library, tmp_path: Path) -> None:
    with open_report(tmp_path / "r", quiet=True) as report:
        report.track([library.__name__])
    assert library.calls == []


def test_a_library_that_refuses_is_wrong_use(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusal(Exception):
        pass

    def init(**how: Any) -> None:
        raise Refusal("nobody is logged in")

    monkeypatch.setattr(library, "Error", Refusal, raising=False)
    monkeypatch.setattr(library, "init", init)
    with pytest.raises(ConfigError, match=f"{library.__name__} does not begin: nobody is logged"):
        a_run(tmp_path / "r", [library.__name__])


def test_only_finite_numbers_are_sent() -> None:
    record = {"step": 3, "loss": 0.5, "grad_norm": float("inf"), "note": "x", "rate": None}
    assert tracked("step", record) == {"train/loss": 0.5}


def test_a_missing_library_is_wrong_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module, _, _ in TRACKERS.values():
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"`pip install tensorboard wandb`"):
        open_trackers(["tensorboard", "wandb", "tensorboard"], tmp_path)
    line = f"train --model nowhere --data nothing --output {tmp_path / 'out'} --report-to trackio"
    assert cli.main(line.split()) == 2
    said = capsys.readouterr().err
    assert "trackio cannot be imported (" in said
    assert "Install with `pip install trackio`, or leave it out" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("wandb,tensorboard", ("wandb", "tensorboard")),
        ("none", ()),
        ("", ()),
        (["trackio"], ("trackio",)),
    ],
)
def test_names_of_trackers(given: Any, expected: tuple[str, ...]) -> None:
    values = {"model": "m", "data": "d", "output": "o", "report_to": given}
    assert check(TrainConfig, values).report_to == expected


def test_an_unknown_tracker_is_named_with_the_known_ones() -> None:
    values = {"model": "m", "data": "d", "output": "o", "report_to": "mlflow"}
    with pytest.raises(ConfigError, match=r"`report_to`: expected 'tensorboard', 'wandb' or 'tra"):
        check(TrainConfig, values)


def test_tensorboard_itself_reads_the_curves(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    a_run(tmp_path / "mine", ["tensorboard"], steps=3)
    events = EventAccumulator(str(tmp_path / "mine" / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (1, 1.0),
        (2, 0.5),
        (3, pytest.approx(1 / 3)),
    ]
    assert [e.value for e in events.Scalars("eval/loss")] == [0.25]
