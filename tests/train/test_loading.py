"""A base model is loaded beside what else is to be done, and not to its end if that fails."""

import threading
import time

import pytest
import torch

from halfbyte.checkpoint.base_model import open_base
from halfbyte.errors import CheckpointError, DataError
from halfbyte.models.build import BaseRecipe
from halfbyte.report import open_report
from halfbyte.train import loading as loading_module
from halfbyte.train.loading import Loading
from tests.tiny import write_tiny_model


@pytest.fixture
def source(tmp_path):
    return open_base(str(write_tiny_model(tmp_path / "model")))


@pytest.mark.parametrize("ahead", [False, True])
def test_it_is_the_same_model_either_way(source, ahead, capsys):
    tokenizer = source.tokenizer()
    with Loading(source, BaseRecipe(), tokenizer=tokenizer) as loading, open_report() as report:
        if ahead:
            loading.start()
        base = loading.result(report)
    assert base.tokenizer is tokenizer
    assert loading.seconds > 0
    wanted = loading_module.load_base(source, BaseRecipe())
    for name, tensor in wanted.model.state_dict().items():
        assert torch.equal(base.model.state_dict()[name], tensor), name
    assert "in 4 bits" in capsys.readouterr().err


def test_it_ends_where_nobody_needs_it(source, monkeypatch):
    asked, ended = threading.Event(), []

    def endless(*_, progress, **__):
        try:
            while True:
                progress(0, 1)
                asked.set()
                time.sleep(0.001)
        except BaseException as error:
            ended.append(type(error).__name__)
            raise

    monkeypatch.setattr(loading_module, "load_base", endless)

    def run():
        with Loading(source, BaseRecipe()) as loading:
            loading.start()
            assert asked.wait(20)
            raise DataError("no rows")

    with pytest.raises(DataError, match="no rows"):
        run()
    assert ended == ["_Stopped"]


@pytest.mark.parametrize("ahead", [False, True])
def test_what_is_wrong_with_it_is_said_when_it_is_asked_for(source, ahead, monkeypatch):
    def fails(*_, **__):
        raise CheckpointError("damaged")

    monkeypatch.setattr(loading_module, "load_base", fails)
    with Loading(source, BaseRecipe()) as loading:
        if ahead:
            loading.start()
        with pytest.raises(CheckpointError, match="damaged"):
            loading.result(None)
