"""Which shapes become CUDA graphs; what a graph computes is tested on a GPU."""

import pytest
import torch

from halfbyte.train import passes
from halfbyte.train.engine import LayerEngine
from halfbyte.train.passes import CapturedPasses
from tests.train.test_engine import FAMILIES, batches_of, model_of


@pytest.fixture
def captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(passes, "MOST_GRAPHS", 2)
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.zeros(2)
    made = CapturedPasses(None, [parameter])

    def capture(key):
        held = passes._Captured([], (), [], [parameter.grad], None, None)
        made._captured[key] = held

    return made, parameter, capture


def test_a_shape_is_captured_when_it_comes_again(captured):
    made, _, capture = captured
    assert not made.wanted("a")
    assert made.wanted("a")
    capture("a")
    assert made.wanted("a")
    assert not made.wanted("b")
    assert made.wanted("b")


def test_there_are_so_many_graphs_and_no_more(captured):
    made, _, capture = captured
    for key in "ab":
        made.wanted(key)
        capture(key)
    assert not made.wanted("c")
    assert not made.full
    assert not made.wanted("c")
    assert made.full
    assert made.wanted("a")


def test_a_graph_that_adds_to_gradients_nobody_sees_is_dropped(captured):
    made, parameter, capture = captured
    made.wanted("a")
    capture("a")
    parameter.grad = torch.zeros(2)
    assert made.wanted("a")
    assert "a" not in made._captured


def test_that_others_are_launched_is_told_once(captured, monkeypatch):
    made, _, capture = captured
    engine = LayerEngine(model_of(FAMILIES["llama"]), fuse=True)
    engine._graphs = made
    for key in "ab":
        capture(key)
    _, passages = engine.enter(batches_of([(2, 9)]))
    for _ in range(4):
        assert not engine._captures("c", passages)
    (note,) = engine.notes
    assert "others are launched" in note
